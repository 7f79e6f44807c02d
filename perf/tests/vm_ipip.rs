//! The kernel's ipip device and `forward` do the same with the same packets: in a guest of the VM lab (`make test-vm`), whose
//! kernels have the device.
//!
//! ```text
//!   n1p0 ── generated packets ── n1 routes ── flannel.ipip (the kernel) ──► port of the switch ─┐
//!                                         └── forward, with n1's table ─────────────────────────┴─ equal, byte for byte
//! ```
//!
//! And the same from the switch's port to what comes out of flannel.ipip. Free are the outer identification, with the header
//! checksum that follows from it, and on the way out the form of a congestion mark.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

mod compare;
mod generate;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use compare::{
    ECN, HERE, THERE, decapsulated, encapsulated, identity, packets, seed, send, tos_of, with_tos,
};
use generate::Random;
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::DropReason;
use ripstop_fib::{
    Adjacency, Backend, Dscp, Ethernet as Uplink, ImageBuilder, Local, NICS, NicRecord, Node,
    Route, sync,
};
use ripstop_perf::{
    Backend as LabBackend, Capture, CapturedFrame, Direction, Ethernet, Fabric, Family, Frame,
    Header, Host, Injector, Ipv4, Lab, Ping, address,
};

const DEVICE: &str = "flannel.ipip";
const IPIP: u8 = 4;
const IFINDEX: u32 = 7;
/// Bytes of Ethernet and outer IP.
const HEADERS: usize = 34;
/// Of the outer header: identification, header checksum.
const FREE: [core::ops::Range<usize>; 2] = [18..20, 24..26];
const CE: u8 = 0b11;
const ECT_0: u8 = 0b10;

/// A lab of two plain nodes that look into no packet: no filter, no connection tracking, which would join fragments.
fn with_lab(test: impl FnOnce(&Lab, &Table<'_>) -> Result<()>) -> Result<()> {
    Lab::builder()
        .linux(2)
        .backend(LabBackend::Ipip)
        .run(|lab| {
            ensure!(
                !lab.node(HERE).has_userland_tunnel(),
                "this kernel has no ipip device"
            );
            for (from, to) in [(HERE, THERE), (THERE, HERE)] {
                // So that the nodes know each other's MAC addresses.
                let ping = Ping::new(lab.pod(from, 0), lab.pod(to, 0)).run()?;
                ensure!(ping.received == 1, "{:?}", ping.failed);
            }
            for node in lab.nodes() {
                node.output(&["nft", "flush", "ruleset"])?;
                node.output(&["nft", "add table inet deaf"])?;
                node.output(&[
                    "nft",
                    "add chain inet deaf rx { type filter hook prerouting priority -450; }",
                ])?;
                node.output(&["nft", "add rule inet deaf rx iifname flannel.ipip drop"])?;
                // It would join segments of one flow, and change the order.
                node.output(&["ethtool", "-K", DEVICE, "gro", "off"])?;
            }
            let words = sync::words(&table_words(lab)?);
            let table =
                Table::attach(&words, IFINDEX).map_err(|error| anyhow::anyhow!("{error}"))?;
            test(lab, &table)
        })
}

/// The table that n1 would have.
fn table_words(lab: &Lab) -> Result<Vec<u64>> {
    let mut nics = [NicRecord::default(); NICS];
    nics[0] = NicRecord {
        ifindex: IFINDEX,
        uplink: 0,
        vlan: 0,
    };
    let node = Node {
        backend: Backend::Ipip,
        v4: Some(Local {
            address: address::underlay(HERE),
            subnet: (address::subnet(HERE), 24),
            network: ([10, 244, 0, 0].into(), 16),
            pod_mtu: lab.pod_mtu(),
            vtep_mac: [0; 6],
        }),
        v6: None,
        udp_port: 0,
        vni: 0,
        direct: false,
        dscp: Dscp::Fixed(0),
        flow_seed: 0x5eed,
        nics,
    };
    let ethernet = Uplink {
        source: address::underlay_mac(HERE).0,
        destination: address::underlay_mac(THERE).0,
        vlan: None,
    };
    let mut image = ImageBuilder::new(node);
    let way = image.adjacency(Adjacency::ipip(&node, ethernet, address::underlay(THERE)));
    image.route4(address::subnet(HERE), 24, Route::Local);
    image.route4(address::subnet(THERE), 24, Route::Via(way));
    image.peer4(address::underlay(THERE), address::subnet(THERE), 24);
    image.build().map_err(|error| anyhow::anyhow!("{error}"))
}

/// Packets of a pod that its node's routing lets pass: from no address of the node's own or of its subnet as a whole, and
/// with a hop left.
fn routable(packet: &[u8]) -> bool {
    packet[8] > 1 && !matches!(packet[15], 0 | 1 | 255)
}

/// The packet after the node has routed it: one hop less (RFC 1812, 5.3.1), and the checksum that belongs to it.
fn routed(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[8] -= 1;
    let tos = tos_of(&packet);
    with_tos(packet, tos)
}

fn is_ipip(frame: &CapturedFrame) -> bool {
    frame.direction == Direction::In
        && frame.bytes.get(12..14) == Some(&[8, 0])
        && frame.bytes.get(23) == Some(&IPIP)
}

#[test]
fn encapsulation_is_the_kernels() -> Result<()> {
    let mut random = Random::seeded(seed("encapsulation")?);
    with_lab(|lab, table| {
        let mut packets = packets(&mut random, Family::Ipv4, HERE, THERE, lab.pod_mtu());
        packets.retain(|packet| routable(packet));
        let from_pod = Ethernet::ip(
            Family::Ipv4,
            lab.pod(HERE, 0).mac(),
            address::gateway_mac(HERE),
        );
        let frames: Vec<Vec<u8>> = packets
            .iter()
            .map(|packet| in_ethernet(&from_pod, packet))
            .collect();
        let port = Fabric::port(HERE);
        let capture = Capture::start_filtered(lab.fabric(), &port, 2 * frames.len(), is_ipip)?;
        let pod = Injector::open(lab.pod(HERE, 0), "eth0")?;
        send(&pod, &frames, &vec![true; frames.len()], &capture)?;
        let captured = capture.stop();
        assert_eq!((captured.frames.len(), captured.missed), (frames.len(), 0));
        let kernels: BTreeMap<Vec<u8>, Vec<u8>> = captured
            .frames
            .into_iter()
            .map(|frame| (identity(&frame.bytes[HEADERS..]), frame.bytes))
            .collect();
        for packet in &packets {
            let what = || format!("{packet:02x?}");
            let kernels = kernels.get(&identity(&routed(packet))).with_context(what)?;
            let ours = encapsulated(&kernels[HEADERS..], table)
                .map_err(|reason| anyhow::anyhow!("dropped: {}", reason.name()))
                .with_context(what)?;
            compare(&ours, kernels).with_context(what)?;
        }
        Ok(())
    })
}

fn in_ethernet(ethernet: &Ethernet, packet: &[u8]) -> Vec<u8> {
    Frame {
        headers: vec![Header::Ethernet(ethernet.clone())],
        payload: packet.to_vec(),
        truncate_to: None,
    }
    .encode()
}

/// Compares a frame of ours with the kernel's.
fn compare(ours: &[u8], kernels: &[u8]) -> Result<()> {
    for (whose, bytes) in [("ours", ours), ("the kernel's", kernels)] {
        let mut outer = Frame::parse(bytes)?;
        let outer = outer.ipv4s().next().context("no IPv4")?;
        assert_eq!(outer.checksum, None, "{whose}: header checksum");
    }
    // Of a congestion mark the kernel shows outside only that it could be marked (RFC 3168 section 9.1.1);
    // RFC 6040 section 4.1 copies it.
    let mut expected = kernels.to_vec();
    if tos_of(&ours[HEADERS..]) & ECN == CE {
        assert_eq!(expected[15] & ECN, ECT_0, "the kernel's form of a mark");
        expected[15] |= CE;
    }
    assert_eq!(ours.len(), expected.len(), "length");
    let differences: Vec<String> = (0..ours.len())
        .filter(|at| !FREE.iter().any(|free| free.contains(at)) && ours[*at] != expected[*at])
        .map(|at| {
            let (ours, expected) = (ours[at], expected[at]);
            format!("byte {at} is {ours:#04x} and not {expected:#04x}")
        })
        .collect();
    ensure!(differences.is_empty(), "{differences:?}\n{ours:02x?}");
    Ok(())
}

#[test]
fn decapsulation_is_the_kernels() -> Result<()> {
    let mut random = Random::seeded(seed("decapsulation")? ^ 1);
    with_lab(|lab, table| {
        let packets = packets(&mut random, Family::Ipv4, THERE, HERE, lab.pod_mtu());
        let frames: Vec<Vec<u8>> = packets
            .iter()
            .map(|packet| arriving(&mut random, packet))
            .collect();
        let ours: Vec<_> = frames
            .iter()
            .map(|frame| decapsulated(frame, table))
            .collect();
        let arrive: Vec<bool> = ours.iter().map(core::result::Result::is_ok).collect();
        let network = address::subnet(THERE).octets();
        // A tunnel device has no Ethernet: its packets begin with the IP header.
        let capture =
            Capture::start_filtered(lab.node(HERE), DEVICE, 2 * frames.len(), move |frame| {
                frame.direction == Direction::In && frame.bytes.get(12..15) == Some(&network[..3])
            })?;
        let wire = Injector::open(lab.fabric(), &Fabric::port(HERE))?;
        send(&wire, &frames, &arrive, &capture)?;
        let captured = capture.stop();
        assert_eq!(captured.missed, 0);
        let expected = arrive.iter().filter(|arrives| **arrives).count();
        assert_eq!(
            captured.frames.len(),
            expected,
            "packets that the kernel has let in"
        );
        let kernels: BTreeMap<Vec<u8>, Vec<u8>> = captured
            .frames
            .into_iter()
            .map(|frame| (identity(&frame.bytes), frame.bytes))
            .collect();
        for ((packet, ours), frame) in packets.iter().zip(&ours).zip(&frames) {
            let what = || format!("{frame:02x?}");
            let kernels = kernels.get(&identity(packet));
            match ours {
                Ok(ours) => assert_eq!(Some(ours), kernels, "{}", what()),
                Err(reason) => {
                    // The one thing that both refuse.
                    assert_eq!(*reason, DropReason::EcnNotCapable, "{}", what());
                    assert_eq!(kernels, None, "{}", what());
                }
            }
        }
        Ok(())
    })
}

/// A frame as the other node may send it around a packet: outer fields are whatever they may be, congestion in all its
/// combinations among them.
fn arriving(random: &mut Random, packet: &[u8]) -> Vec<u8> {
    let outer = Ipv4 {
        protocol: IPIP,
        tos: random.byte(),
        identification: random.short(),
        dont_fragment: random.once_in(2),
        ttl: random.byte().max(1),
        ..Ipv4::udp(address::underlay(THERE), address::underlay(HERE))
    };
    let (from, to) = (address::underlay_mac(THERE), address::underlay_mac(HERE));
    Frame {
        headers: vec![
            Header::Ethernet(Ethernet::ip(Family::Ipv4, from, to)),
            Header::Ipv4(outer),
        ],
        payload: packet.to_vec(),
        truncate_to: None,
    }
    .encode()
}
