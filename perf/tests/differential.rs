//! The kernel's VXLAN device and `forward` do the same with the same packets: as root, for real.
//!
//! ```text
//!                      ┌─ flannel.1 of n1 (the kernel) ─┐
//!   generated packets ─┤                                ├─ equal, byte for byte
//!                      └─ forward, with n1's table ─────┘
//! ```
//!
//! Both ways, both families. Outside a short list of free fields, each of which is checked to have one of its
//! allowed values, no byte differs.

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
    Capture, CapturedFrame, Direction, Ethernet, Fabric, Families, Family, Frame, Header, Host,
    Injector, Ipv4, Ipv6, Lab, Ping, Udp, UdpChecksum, Vxlan, address, wire_faults,
};

const IFINDEX: u32 = 7;

/// A lab of two plain nodes whose kernels do nothing with packets that came through the tunnel.
fn with_lab(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::builder().linux(2).families(Families::Dual).run(|lab| {
        for (family, from, to) in [
            (Family::Ipv4, HERE, THERE),
            (Family::Ipv6, HERE, THERE),
            (Family::Ipv4, THERE, HERE),
            (Family::Ipv6, THERE, HERE),
        ] {
            // So that the nodes know each other's MAC addresses.
            let ping = Ping::over(family, lab.pod(from, 0), lab.pod(to, 0)).run()?;
            ensure!(ping.received == 1, "{:?}", ping.failed);
        }
        for node in lab.nodes() {
            node.output(&["nft", "add table inet deaf"])?;
            node.output(&[
                "nft",
                "add chain inet deaf rx { type filter hook prerouting priority -450; }",
            ])?;
            node.output(&["nft", "add rule inet deaf rx iifname \"flannel*\" drop"])?;
            for device in ["flannel.1", "flannel-v6.1"] {
                // It would join segments of one flow, and change the order.
                node.output(&["ethtool", "-K", device, "gro", "off"])?;
            }
        }
        test(lab)
    })
}

/// The table that n1 would have.
fn table_words(lab: &Lab) -> Result<Vec<u64>> {
    let network4 = ([10, 244, 0, 0].into(), 16);
    let network6 = ("fd00:10:244::".parse()?, 48);
    let mut nics = [NicRecord::default(); NICS];
    nics[0] = NicRecord {
        ifindex: IFINDEX,
        uplink: 0,
        vlan: 0,
    };
    let node = Node {
        backend: Backend::Vxlan,
        v4: Some(Local {
            address: address::underlay(HERE),
            subnet: (address::subnet(HERE), 24),
            network: network4,
            pod_mtu: lab.pod_mtu_of(Family::Ipv4),
            vtep_mac: address::vtep_mac(HERE).0,
        }),
        v6: Some(Local {
            address: address::underlay6(HERE),
            subnet: (address::subnet6(HERE), 64),
            network: network6,
            pod_mtu: lab.pod_mtu_of(Family::Ipv6),
            vtep_mac: address::vtep_mac6(HERE).0,
        }),
        udp_port: address::VXLAN_PORT,
        vni: address::VNI,
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
    let way4 = image.adjacency(Adjacency::vxlan4(
        &node,
        ethernet,
        address::underlay(THERE),
        address::vtep_mac(THERE).0,
    ));
    let way6 = image.adjacency(Adjacency::vxlan6(
        &node,
        ethernet,
        address::underlay6(THERE),
        address::vtep_mac6(THERE).0,
    ));
    image.route4(address::subnet(HERE), 24, Route::Local);
    image.route6(address::subnet6(HERE), 64, Route::Local);
    image.route4(address::subnet(THERE), 24, Route::Via(way4));
    image.route6(address::subnet6(THERE), 64, Route::Via(way6));
    image.peer4(address::underlay(THERE), address::subnet(THERE), 24);
    image.peer6(address::underlay6(THERE), address::subnet6(THERE), 64);
    image.build().map_err(|error| anyhow::anyhow!("{error}"))
}

fn device(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "flannel.1",
        Family::Ipv6 => "flannel-v6.1",
    }
}

/// Ethernet from one VTEP to the other.
fn inner_ethernet(family: Family, from: u8, to: u8) -> Ethernet {
    match family {
        Family::Ipv4 => Ethernet::ip(family, address::vtep_mac(from), address::vtep_mac(to)),
        Family::Ipv6 => Ethernet::ip(family, address::vtep_mac6(from), address::vtep_mac6(to)),
    }
}

/// Bytes of Ethernet, outer IP, UDP, VXLAN and inner Ethernet.
fn headers(family: Family) -> usize {
    match family {
        Family::Ipv4 => 64,
        Family::Ipv6 => 84,
    }
}

/// The outer fields that flannel leaves open.
struct Free {
    family: Family,
}

impl Free {
    /// Bytes that are not compared, because [`Free::check`] does more than that.
    fn has(&self, at: usize) -> bool {
        match self.family {
            // Identification, header checksum, source port, UDP checksum.
            Family::Ipv4 => [18..20, 24..26, 34..36, 40..42]
                .iter()
                .any(|free| free.contains(&at)),
            // Source port, UDP checksum.
            Family::Ipv6 => [54..56, 60..62].iter().any(|free| free.contains(&at)),
        }
    }

    /// Both frames have one of the allowed values everywhere.
    fn check(&self, ours: &[u8], kernels: &[u8], ports: &[u16; 2]) -> Result<()> {
        for (whose, bytes, checksum) in [
            (
                "ours",
                ours,
                match self.family {
                    Family::Ipv4 => Some(UdpChecksum::None),
                    Family::Ipv6 => (!has_wrong_checksum(&ours[headers(self.family)..]))
                        .then_some(UdpChecksum::Correct),
                },
            ),
            ("the kernel's", kernels, Some(UdpChecksum::Correct)),
        ] {
            let frame = Frame::parse(bytes)?;
            let udp = frame.headers.iter().find_map(|header| match header {
                Header::Udp(udp) => Some(udp),
                Header::Ipv4(ip) => {
                    assert_eq!(ip.checksum, None, "{whose}: IPv4 checksum");
                    None
                }
                Header::Ethernet(_)
                | Header::Vlan(..)
                | Header::Ipv6(_)
                | Header::Vxlan(_)
                | Header::Raw(_) => None,
            });
            let udp = udp.context("no UDP")?;
            match checksum {
                Some(checksum) => assert_eq!(udp.checksum, checksum, "{whose}"),
                None => assert!(matches!(udp.checksum, UdpChecksum::Wrong(_)), "{udp:?}"),
            }
            assert_eq!(udp.length, None, "{whose}");
            ensure!(
                (ports[0]..=ports[1]).contains(&udp.source),
                "{whose}: source port {}",
                udp.source
            );
        }
        Ok(())
    }
}

/// Whether the transport checksum of an IPv6 packet is wrong. `forward` takes its word for the payload's sum, so
/// the outer one is wrong then, too, and the far kernel drops what otherwise the far pod would have to.
fn has_wrong_checksum(packet: &[u8]) -> bool {
    let ethernet = inner_ethernet(Family::Ipv6, HERE, THERE);
    let frame = Frame {
        headers: vec![Header::Ethernet(ethernet)],
        payload: packet.to_vec(),
        truncate_to: None,
    };
    let faults = wire_faults(&frame.encode(), u16::MAX);
    let of_transport = ["wrong UDP checksum", "wrong checksum of protocol 6"];
    faults
        .iter()
        .any(|fault| of_transport.iter().any(|what| fault.contains(what)))
}

/// Compares a frame of ours with the kernel's.
fn compare(family: Family, ours: &[u8], kernels: &[u8], ports: &[u16; 2]) -> Result<()> {
    let free = Free { family };
    free.check(ours, kernels, ports)?;
    // Of a congestion mark the kernel shows outside only that it could be marked (RFC 3168 section 9.1.1);
    // RFC 6040 section 4.1 copies it.
    let mut expected = kernels.to_vec();
    let inner = &ours[headers(family)..];
    if tos_of(inner) & ECN == 0b11 {
        let outer = tos_of(&kernels[14..]);
        assert_eq!(outer & ECN, 0b10, "the kernel's form of a mark");
        let marked = with_tos(kernels[14..34].to_vec(), outer | ECN);
        expected[14..16].copy_from_slice(&marked[..2]);
    }
    assert_eq!(ours.len(), expected.len(), "length");
    let differences: Vec<String> = (0..ours.len())
        .filter(|at| !free.has(*at) && ours[*at] != expected[*at])
        .map(|at| {
            format!(
                "byte {at} is {:#04x} and not {:#04x}",
                ours[at], expected[at]
            )
        })
        .collect();
    ensure!(differences.is_empty(), "{differences:?}\n{ours:02x?}");
    Ok(())
}

fn is_tunnel(family: Family) -> impl Fn(&CapturedFrame) -> bool + Send + 'static {
    let source = address::underlay_mac(HERE).0;
    move |frame| {
        let (protocol, port) = match family {
            Family::Ipv4 => (23, 36),
            Family::Ipv6 => (20, 56),
        };
        frame.direction == Direction::In
            && frame.bytes.get(6..12) == Some(&source)
            && frame.bytes.get(protocol) == Some(&17)
            && frame.bytes.get(port..port + 2) == Some(&address::VXLAN_PORT.to_be_bytes())
    }
}

/// The kernel's frames around packets, by the packet.
fn by_kernel(lab: &Lab, family: Family, packets: &[Vec<u8>]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let capture = Capture::start_filtered(
        lab.fabric(),
        &Fabric::port(HERE),
        2 * packets.len(),
        is_tunnel(family),
    )?;
    let into = Injector::open(lab.node(HERE), device(family))?;
    let ethernet = Header::Ethernet(inner_ethernet(family, HERE, THERE));
    let frames: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| {
            Frame {
                headers: vec![ethernet.clone()],
                payload: packet.clone(),
                truncate_to: None,
            }
            .encode()
        })
        .collect();
    send(&into, &frames, &vec![true; packets.len()], &capture)?;
    let captured = capture.stop();
    assert_eq!((captured.frames.len(), captured.missed), (packets.len(), 0));
    let frames = captured.frames.into_iter();
    Ok(frames
        .map(|frame| (frame.bytes[headers(family)..].to_vec(), frame.bytes))
        .collect())
}

fn port_range(lab: &Lab) -> Result<[u16; 2]> {
    let range = lab
        .node(HERE)
        .output(&["cat", "/proc/sys/net/ipv4/ip_local_port_range"])?;
    let bounds: Vec<u16> = range
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    <[u16; 2]>::try_from(bounds).map_err(|bounds| anyhow::anyhow!("port range {bounds:?}"))
}

#[test]
fn encapsulation_is_the_kernels() -> Result<()> {
    let mut random = Random::seeded(seed("encapsulation")?);
    with_lab(|lab| {
        let words = sync::words(&table_words(lab)?);
        let table = Table::attach(&words, IFINDEX).map_err(|error| anyhow::anyhow!("{error}"))?;
        let ports = port_range(lab)?;
        for family in Family::ALL {
            let packets = packets(&mut random, family, HERE, THERE, lab.pod_mtu_of(family));
            let kernels = by_kernel(lab, family, &packets)?;
            assert_eq!(kernels.len(), packets.len(), "{family}");
            for packet in &packets {
                let what = || format!("{family}: {packet:02x?}");
                let ours = encapsulated(packet, &table)
                    .map_err(|reason| anyhow::anyhow!("dropped: {}", reason.name()))
                    .with_context(what)?;
                let kernels = kernels.get(packet).with_context(what)?;
                compare(family, &ours, kernels, &ports).with_context(what)?;
            }
        }
        Ok(())
    })
}

/// A frame as the other node may send it around a packet: outer fields are whatever they may be.
fn arriving(random: &mut Random, family: Family, packet: &[u8]) -> Frame {
    let tos = random.byte();
    arriving_with(random, family, packet, tos)
}

fn arriving_with(random: &mut Random, family: Family, packet: &[u8], tos: u8) -> Frame {
    let ip = match family {
        Family::Ipv4 => Header::Ipv4(Ipv4 {
            tos,
            identification: random.short(),
            dont_fragment: random.once_in(2),
            ttl: random.byte().max(1),
            ..Ipv4::udp(address::underlay(THERE), address::underlay(HERE))
        }),
        Family::Ipv6 => Header::Ipv6(Ipv6 {
            traffic_class: tos,
            flow_label: u32::from(random.short()),
            hop_limit: random.byte().max(1),
            ..Ipv6::udp(address::underlay6(THERE), address::underlay6(HERE))
        }),
    };
    let mut udp = Udp::ports(random.short().max(1), address::VXLAN_PORT);
    if family == Family::Ipv4 && random.once_in(2) {
        udp.checksum = UdpChecksum::None;
    }
    let (from, to) = (address::underlay_mac(THERE), address::underlay_mac(HERE));
    Frame {
        headers: vec![
            Header::Ethernet(Ethernet::ip(family, from, to)),
            ip,
            Header::Udp(udp),
            Header::Vxlan(Vxlan::vni(address::VNI)),
            Header::Ethernet(inner_ethernet(family, THERE, HERE)),
        ],
        payload: packet.to_vec(),
        truncate_to: None,
    }
}

/// The packets that the kernel takes out of frames, by their identity. `arrive` tells which it will take.
fn taken_by_kernel(
    lab: &Lab,
    family: Family,
    frames: &[Vec<u8>],
    arrive: &[bool],
) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let ethertype = match family {
        Family::Ipv4 => [0x08, 0x00],
        Family::Ipv6 => [0x86, 0xdd],
    };
    let from_peer = inner_ethernet(family, THERE, HERE).source.0;
    let capture = Capture::start_filtered(
        lab.node(HERE),
        device(family),
        2 * frames.len(),
        move |frame| {
            frame.direction == Direction::In
                && frame.bytes.get(6..12) == Some(&from_peer)
                && frame.bytes.get(12..14) == Some(&ethertype)
        },
    )?;
    let into = Injector::open(lab.fabric(), &Fabric::port(HERE))?;
    send(&into, frames, arrive, &capture)?;
    let captured = capture.stop();
    assert_eq!(captured.missed, 0);
    let expected = arrive.iter().filter(|arrives| **arrives).count();
    assert_eq!(
        captured.frames.len(),
        expected,
        "packets that the kernel has let in"
    );
    let packets = captured
        .frames
        .into_iter()
        .map(|frame| frame.bytes[14..].to_vec());
    Ok(packets.map(|packet| (identity(&packet), packet)).collect())
}

#[test]
fn decapsulation_is_the_kernels() -> Result<()> {
    let mut random = Random::seeded(seed("decapsulation")? ^ 1);
    with_lab(|lab| {
        let words = sync::words(&table_words(lab)?);
        let table = Table::attach(&words, IFINDEX).map_err(|error| anyhow::anyhow!("{error}"))?;
        for family in Family::ALL {
            let packets = packets(&mut random, family, THERE, HERE, lab.pod_mtu_of(family));
            let frames: Vec<Vec<u8>> = packets
                .iter()
                .map(|packet| arriving(&mut random, family, packet).encode())
                .collect();
            let ours: Vec<_> = frames
                .iter()
                .map(|frame| decapsulated(frame, &table))
                .collect();
            let arrive: Vec<bool> = ours.iter().map(core::result::Result::is_ok).collect();
            let kernels = taken_by_kernel(lab, family, &frames, &arrive)?;
            for ((packet, ours), frame) in packets.iter().zip(&ours).zip(&frames) {
                let what = || format!("{family}: {frame:02x?}");
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
        }
        Ok(())
    })
}

const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const ECT_0: u8 = 0b10;
const CE: u8 = 0b11;

/// The inner field afterwards, by the outer one; nothing where the packet is dropped.
type Row = [(u8, Option<u8>); 4];

/// RFC 6040, figure 4: what becomes of an inner field (rows) inside an outer one (columns).
const FIGURE_4: [(u8, Row); 4] = [
    (
        NOT_ECT,
        [
            (NOT_ECT, Some(NOT_ECT)),
            (ECT_0, Some(NOT_ECT)),
            (ECT_1, Some(NOT_ECT)),
            (CE, None),
        ],
    ),
    (
        ECT_0,
        [
            (NOT_ECT, Some(ECT_0)),
            (ECT_0, Some(ECT_0)),
            (ECT_1, Some(ECT_1)),
            (CE, Some(CE)),
        ],
    ),
    (
        ECT_1,
        [
            (NOT_ECT, Some(ECT_1)),
            (ECT_0, Some(ECT_1)),
            (ECT_1, Some(ECT_1)),
            (CE, Some(CE)),
        ],
    ),
    (
        CE,
        [
            (NOT_ECT, Some(CE)),
            (ECT_0, Some(CE)),
            (ECT_1, Some(CE)),
            (CE, Some(CE)),
        ],
    ),
];

/// All sixteen combinations on the way in, all four on the way out: `forward`, the kernel and the RFC.
#[test]
fn congestion_goes_both_ways_as_in_rfc_6040() -> Result<()> {
    let mut random = Random::seeded(seed("congestion")? ^ 2);
    with_lab(|lab| {
        let words = sync::words(&table_words(lab)?);
        let table = Table::attach(&words, IFINDEX).map_err(|error| anyhow::anyhow!("{error}"))?;
        for family in Family::ALL {
            let mut cases = Vec::new();
            for (inner, row) in FIGURE_4 {
                for (outer, expected) in row {
                    let packet = generate::packet(&mut random, family, THERE, HERE, 500);
                    let packet = with_tos(packet, 0xb8 | inner);
                    // The outer DSCP stays outside.
                    let frame = arriving_with(&mut random, family, &packet, 0x28 | outer);
                    let after = expected.map(|ecn| with_tos(packet.clone(), 0xb8 | ecn));
                    cases.push((
                        format!("{inner:02b} in {outer:02b}"),
                        packet,
                        frame.encode(),
                        after,
                    ));
                }
            }
            let frames: Vec<Vec<u8>> = cases.iter().map(|case| case.2.clone()).collect();
            let arrive: Vec<bool> = cases.iter().map(|case| case.3.is_some()).collect();
            let kernels = taken_by_kernel(lab, family, &frames, &arrive)?;
            for (name, packet, frame, after) in &cases {
                let ours = decapsulated(frame, &table);
                match after {
                    Some(after) => assert_eq!(ours.as_ref(), Ok(after), "{family}: {name}"),
                    None => assert_eq!(ours, Err(DropReason::EcnNotCapable), "{family}: {name}"),
                }
                let kernels = kernels.get(&identity(packet));
                assert_eq!(kernels, after.as_ref(), "the kernel, {family}: {name}");
            }

            let sent: Vec<Vec<u8>> = [NOT_ECT, ECT_1, ECT_0, CE]
                .map(|ecn| {
                    let packet = generate::packet(&mut random, family, HERE, THERE, 500);
                    with_tos(packet, 0xb8 | ecn)
                })
                .to_vec();
            let kernels = by_kernel(lab, family, &sent)?;
            for packet in &sent {
                let ecn = tos_of(packet) & ECN;
                let ours = encapsulated(packet, &table)
                    .map_err(|reason| anyhow::anyhow!("dropped: {}", reason.name()))?;
                // Normal mode: the field is copied. The kernel shows a mark as the ability to be marked.
                assert_eq!(tos_of(&ours[14..]), ecn, "{family}: {ecn:02b}");
                let kernels = tos_of(&kernels.get(packet).context("not captured")?[14..]);
                assert_eq!(
                    kernels,
                    if ecn == CE { ECT_0 } else { ecn },
                    "the kernel, {family}"
                );
            }
        }
        Ok(())
    })
}
