//! Ripstop's packets on the wire are those of a kernel VXLAN device as flannel sets it up: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 (Ripstop) ════╗  capture: what n1 sends
//!                           ╠═══ n2 ─ n2p0
//!   n3p0 ─ n3 (plain Linux) ╝  capture: what n3 sends
//! ```
//!
//! Both pods send the same packets to the third, byte for byte but for their own address.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use common::{PATIENCE, find};
use ripstop_perf::{
    Capture, Direction, Fabric, Host, Injector, Inner, Ipv4, Lab, NodeKind, Pod, Udp, UdpChecksum,
    VxlanFrame, address, tcp_transfer, udp_echo, udp_payload_max,
};

/// The fields that flannel leaves open, and where they are in a frame. In all other bytes Ripstop's packets are those
/// of the kernel. (The outer MAC addresses follow the underlay, which in the lab is known.)
const FREE: [(&str, Range<usize>); 4] = [
    ("IPv4 identification", 18..20),
    (
        "IPv4 header checksum, which follows from it and is checked to be right",
        24..26,
    ),
    ("UDP source port, which is checked by flow", 34..36),
    (
        "UDP checksum: Ripstop's is zero, as RFC 7348 has it; the kernel makes one",
        40..42,
    ),
];

/// The node that sends with Ripstop, the one that sends with the kernel, and the one to which both send.
const RIPSTOP: u8 = 1;
const TARGET: u8 = 2;
const KERNEL: u8 = 3;

/// Where the inner packet begins.
const INNER: usize = 64;
/// In every 16 bytes of every payload, so also in every fragment.
const MARKER: &[u8; 8] = b"ripstop ";
const ECN: u8 = 0b11;
const CONGESTION_EXPERIENCED: u8 = 0b11;
const ECN_CAPABLE: u8 = 0b10;

fn mixed_lab(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        test(lab)
    })
}

/// Captures the tunnel packets that a node sends around packets with the marker.
fn capture_marked(lab: &Lab, node: u8) -> Result<Capture> {
    Capture::start_filtered(lab.fabric(), &Fabric::port(node), 60_000, |frame| {
        frame.direction == Direction::In
            && find(&frame.bytes, MARKER).is_some()
            && VxlanFrame::parse(&frame.bytes).is_ok()
    })
}

/// Checks a frame from node `from` to node `to` against what flannel's VXLAN device sends around the same inner packet.
fn check_frame(lab: &Lab, from: u8, to: u8, bytes: &[u8]) -> Result<VxlanFrame> {
    let packet = VxlanFrame::parse(bytes)?;
    let mut expected = VxlanFrame {
        inner: packet.inner.clone(),
        ..lab.tunnel_frame(from, to)
    };
    expected.ip.tos = outer_tos(lab.node(from).kind(), bytes[INNER + 1]);
    let differences = differences(bytes, &expected.encode());
    ensure!(differences.is_empty(), "{differences:?} in {packet:?}");
    ensure!(
        packet.ip.checksum.is_none(),
        "wrong outer IPv4 checksum in {packet:?}"
    );
    let checksum = match lab.node(from).kind() {
        NodeKind::Ripstop => UdpChecksum::None,
        NodeKind::PlainLinux => UdpChecksum::Correct,
    };
    ensure!(
        packet.udp.checksum == checksum,
        "not {checksum:?} in {packet:?}"
    );
    Ok(packet)
}

/// What a node makes of an inner type-of-service octet: DSCP stays inside, ECN is passed on. Ripstop copies a congestion
/// mark as well (RFC 6040 section 4.1, normal mode); the kernel shows it outside only as the ability to be marked (RFC
/// 3168 section 9.1.1, full functionality).
fn outer_tos(kind: NodeKind, inner: u8) -> u8 {
    match (kind, inner & ECN) {
        (NodeKind::PlainLinux, CONGESTION_EXPERIENCED) => ECN_CAPABLE,
        (_, ecn) => ecn,
    }
}

/// Where two frames differ outside the free fields, in words.
fn differences(frame: &[u8], expected: &[u8]) -> Vec<String> {
    let text = |byte: Option<&u8>| byte.map_or("nothing".to_owned(), |byte| format!("{byte:#04x}"));
    (0..frame.len().max(expected.len()))
        .filter(|at| !FREE.iter().any(|(_, free)| free.contains(at)))
        .filter(|at| frame.get(*at) != expected.get(*at))
        .map(|at| {
            format!(
                "byte {at} is {} and not {}",
                text(frame.get(at)),
                text(expected.get(at))
            )
        })
        .collect()
}

fn payload(bytes: usize) -> Vec<u8> {
    MARKER.iter().copied().cycle().take(bytes).collect()
}

/// All the packets that a pod of node `from` sends to one of the target node, as they are when its node has routed
/// them.
fn packets(lab: &Lab, from: u8) -> Vec<(String, VxlanFrame)> {
    let mut packets = Vec::new();
    let mut add = |name: &str, change: &dyn Fn(Ipv4) -> Inner| {
        let ip = Ipv4::udp(address::pod(from, 0), address::pod(TARGET, 0));
        let inner = change(Ipv4 {
            ttl: 63,
            identification: 0x1234,
            ..ip
        });
        packets.push((
            name.to_owned(),
            VxlanFrame {
                inner,
                ..lab.tunnel_frame(from, TARGET)
            },
        ));
    };
    let ports = || Udp::ports(5000, 6000);
    let udp = |ip: Ipv4, bytes| Inner::Udp {
        ip,
        udp: ports(),
        payload: payload(bytes),
    };
    let full = udp_payload_max(lab.pod_mtu());
    for bytes in [16, 17, 64, 511, 1200, full - 1, full] {
        add(&format!("UDP, {bytes} bytes"), &|ip| udp(ip, bytes));
        add(&format!("UDP, {bytes} bytes, DF"), &|ip| {
            udp(
                Ipv4 {
                    dont_fragment: true,
                    ..ip
                },
                bytes,
            )
        });
    }
    for tos in [0x01, 0x02, 0x03, 0x04, 0xb8, 0xb9, 0xba, 0xbb, 0xfc] {
        add(&format!("TOS {tos:#04x}"), &|ip| {
            udp(Ipv4 { tos, ..ip }, 16)
        });
    }
    for ttl in [1, 2, 62, 254] {
        add(&format!("TTL {ttl}"), &|ip| udp(Ipv4 { ttl, ..ip }, 16));
    }
    for checksum in [UdpChecksum::None, UdpChecksum::Wrong(0x1234)] {
        add(&format!("UDP checksum {checksum:?}"), &|ip| Inner::Udp {
            ip,
            udp: Udp {
                checksum,
                ..ports()
            },
            payload: payload(16),
        });
    }
    add("IP options", &|ip| {
        udp(
            Ipv4 {
                options: vec![1; 8],
                ..ip
            },
            16,
        )
    });
    for protocol in [47, 50, 132, 253] {
        add(&format!("protocol {protocol}"), &|ip| Inner::Ipv4 {
            ip: Ipv4 { protocol, ..ip },
            payload: payload(40),
        });
    }
    // An answer that nobody has asked for draws no answer.
    let echo_reply = [[0, 0, 0, 0, 0, 1, 0, 1].as_slice(), &payload(32)].concat();
    let reset = [
        [
            19, 136, 23, 112, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 4, 0, 0, 0, 0, 0, 0,
        ]
        .as_slice(),
        &payload(32),
    ];
    for (name, protocol, payload) in [("ICMP", 1, echo_reply), ("TCP", 6, reset.concat())] {
        add(name, &|ip| Inner::Ipv4 {
            ip: Ipv4 { protocol, ..ip },
            payload: payload.clone(),
        });
    }
    // A datagram of 1600 bytes, cut as every kernel cuts it: connection tracking on a node joins the fragments and cuts
    // them again. Only the first has a UDP header.
    let datagram = [
        [19, 136, 23, 112, 0x06, 0x40, 0, 0].as_slice(),
        &payload(1592),
    ]
    .concat();
    let (first, last) = datagram.split_at(1424);
    add("first fragment", &|ip| Inner::Ipv4 {
        ip: Ipv4 {
            more_fragments: true,
            ..ip
        },
        payload: first.to_vec(),
    });
    add("last fragment", &|ip| Inner::Ipv4 {
        ip: Ipv4 {
            fragment_offset: 1424 / 8,
            ..ip
        },
        payload: last.to_vec(),
    });
    packets
}

/// Sends the inner packet of a frame out of a pod: as it was before the node has routed it, and with Ethernet padding,
/// which ends at the node.
fn send_from_pod(pod: &Pod, eth0: &Injector, frame: &VxlanFrame) -> Result<()> {
    let mut frame = frame.clone();
    match &mut frame.inner {
        Inner::Udp { ip, .. } | Inner::Ipv4 { ip, .. } => ip.ttl += 1,
        Inner::Raw(_) => {}
    }
    let addresses = [address::gateway_mac(pod.node()).0, pod.mac().0];
    let mut bytes = [
        addresses.as_flattened(),
        &[0x08, 0x00],
        &frame.encode()[INNER..],
    ]
    .concat();
    bytes.resize(bytes.len().max(60), 0xee);
    eth0.send(&bytes)
}

/// The same packet with another sender, who passes on congestion marks in its own way.
fn as_if_from(lab: &Lab, packet: VxlanFrame, from: u8) -> VxlanFrame {
    let mut inner = packet.inner;
    let mut tos = packet.ip.tos;
    match &mut inner {
        Inner::Udp { ip, .. } | Inner::Ipv4 { ip, .. } => {
            ip.source = address::pod(from, 0);
            tos = outer_tos(lab.node(from).kind(), ip.tos);
        }
        Inner::Raw(_) => {}
    }
    let like = lab.tunnel_frame(from, TARGET);
    VxlanFrame {
        ethernet: like.ethernet,
        ip: Ipv4 {
            source: like.ip.source,
            tos,
            ..packet.ip
        },
        udp: packet.udp,
        vxlan: packet.vxlan,
        inner_ethernet: like.inner_ethernet,
        inner,
        truncate_to: None,
    }
}

#[test]
fn every_byte_that_flannel_fixes_is_the_kernels() -> Result<()> {
    mixed_lab(|lab| {
        let mut captured = Vec::new();
        for from in [RIPSTOP, KERNEL] {
            let packets = packets(lab, from);
            let capture = capture_marked(lab, from)?;
            let eth0 = Injector::open(lab.pod(from, 0), "eth0")?;
            for (_, packet) in &packets {
                send_from_pod(lab.pod(from, 0), &eth0, packet)?;
            }
            capture.wait_for(packets.len(), PATIENCE)?;
            let frames = capture.stop().frames;
            assert_eq!(frames.len(), packets.len(), "one frame for each packet");
            for ((name, sent), frame) in packets.iter().zip(&frames) {
                let packet = check_frame(lab, from, TARGET, &frame.bytes)
                    .with_context(|| format!("{name} from {}", lab.node(from).name()))?;
                assert_eq!(
                    packet.inner,
                    sent.inner,
                    "{name} from {}",
                    lab.node(from).name()
                );
            }
            captured.push(frames);
        }
        let names = packets(lab, RIPSTOP).into_iter().map(|(name, _)| name);
        for ((name, ours), kernels) in names.zip(&captured[0]).zip(&captured[1]) {
            let kernels = as_if_from(lab, VxlanFrame::parse(&kernels.bytes)?, RIPSTOP);
            assert_eq!(
                differences(&ours.bytes, &kernels.encode()),
                Vec::<String>::new(),
                "{name}"
            );
        }
        Ok(())
    })
}

/// What pods' sockets send, with all that their kernel's TCP and UDP do; to both kinds of node.
#[test]
fn the_packets_of_sockets_look_the_same_way() -> Result<()> {
    mixed_lab(|lab| {
        for (from, to) in [(RIPSTOP, TARGET), (RIPSTOP, KERNEL), (KERNEL, RIPSTOP)] {
            let capture =
                Capture::start_filtered(lab.fabric(), &Fabric::port(from), 60_000, |frame| {
                    frame.direction == Direction::In && VxlanFrame::parse(&frame.bytes).is_ok()
                })?;
            tcp_transfer(lab.pod(from, 0), lab.pod(to, 0), 3 << 20)?;
            let sizes = [1, 100, udp_payload_max(lab.pod_mtu())];
            assert_eq!(
                udp_echo(lab.pod(from, 0), lab.pod(to, 0), &sizes)?.failed,
                []
            );
            let captured = capture.stop();
            assert_eq!(captured.missed, 0);
            let mut full = 0;
            for frame in &captured.frames {
                check_frame(lab, from, to, &frame.bytes)?;
                full += usize::from(frame.bytes.len() == 14 + usize::from(lab.mtu()));
            }
            assert!(
                full > 500,
                "{full} frames of {} are full",
                captured.frames.len()
            );
        }
        Ok(())
    })
}

#[test]
fn a_flow_keeps_its_source_port_and_flows_have_different_ones() -> Result<()> {
    const FLOWS: u16 = 64;
    mixed_lab(|lab| {
        let range = lab
            .node(KERNEL)
            .output(&["cat", "/proc/sys/net/ipv4/ip_local_port_range"])?;
        let bounds: Vec<u16> = range
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [first, last] = bounds[..] else {
            anyhow::bail!("port range {range:?}");
        };
        for from in [RIPSTOP, KERNEL] {
            let capture = capture_marked(lab, from)?;
            let eth0 = Injector::open(lab.pod(from, 0), "eth0")?;
            for _round in 0..3 {
                for flow in 0..FLOWS {
                    let mut frame = lab.tunnel_frame(from, TARGET);
                    if let Inner::Udp { udp, payload, .. } = &mut frame.inner {
                        udp.source = 10_000 + flow;
                        *payload = crate::payload(16);
                    }
                    send_from_pod(lab.pod(from, 0), &eth0, &frame)?;
                }
            }
            capture.wait_for(3 * usize::from(FLOWS), PATIENCE)?;
            let mut ports: BTreeMap<u16, BTreeSet<u16>> = BTreeMap::new();
            for frame in capture.stop().frames {
                let packet = VxlanFrame::parse(&frame.bytes)?;
                if let Inner::Udp { udp, .. } = &packet.inner {
                    ports
                        .entry(udp.source)
                        .or_default()
                        .insert(packet.udp.source);
                }
            }
            let name = lab.node(from).name();
            assert_eq!(ports.len(), usize::from(FLOWS), "flows from {name}");
            for (flow, ports) in &ports {
                assert_eq!(
                    ports.len(),
                    1,
                    "source ports of flow {flow} from {name}: {ports:?}"
                );
                assert!(
                    ports.iter().all(|port| (first..=last).contains(port)),
                    "{ports:?} from {name}"
                );
            }
            let different: BTreeSet<&u16> = ports.values().flatten().collect();
            // Of 64 flows over 28,000 ports, two may fall on one; six times once in 10^10 runs, where the kernel draws.
            assert!(
                different.len() >= 58,
                "{} ports for {FLOWS} flows from {name}",
                different.len()
            );
        }
        Ok(())
    })
}
