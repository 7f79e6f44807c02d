//! `forward` for every backend and family, against frames that are built field by field.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod packets;

use core::net::{Ipv4Addr, Ipv6Addr};
use std::collections::BTreeSet;

use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice};
use packets::{Inner, Inner6, NIC, Outer, checksum6, ethernet, image_with, node};
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{DropReason, FromNic};
use ripstop_fib::sync::words;
use ripstop_fib::{Adjacency, Backend, Dscp, ImageBuilder, Node, Route, Word};

const TUNNELS: [Backend; 3] = [Backend::Vxlan, Backend::Ipip, Backend::Udp];
const TAGS: [Option<u16>; 2] = [None, Some(100)];

fn table(own: u8, backend: Backend, vlan: Option<u16>) -> Vec<Word> {
    table_with(own, vlan, |node| {
        node.backend = backend;
        node.direct = backend == Backend::HostGw;
    })
}

fn table_with(own: u8, vlan: Option<u16>, change: impl Fn(&mut Node)) -> Vec<Word> {
    let image = image_with(
        own,
        |node| {
            node.nics[0].vlan = vlan.unwrap_or(0);
            change(node);
        },
        vlan,
    );
    words(&image)
}

fn receive(words: &[Word], frame: &[u8]) -> Result<(usize, usize, Option<u8>), DropReason> {
    match packets::received(frame, &Table::attach(words, NIC).unwrap()) {
        FromNic::Deliver { strip, len, tos } => Ok((strip, len, tos)),
        FromNic::Drop(reason) => Err(reason),
    }
}

fn send(words: &[Word], packet: &[u8]) -> Result<Vec<u8>, DropReason> {
    packets::sent(packet, &Table::attach(words, NIC).unwrap())
}

/// A pod of ours to a pod of node 2.
fn outgoing4() -> Inner {
    Inner {
        source: [10, 244, 1, 5],
        destination: [10, 244, 2, 7],
        ..Inner::default()
    }
}

fn outgoing6() -> Inner6 {
    let good = Inner6::default();
    Inner6 {
        source: good.destination,
        destination: good.source,
        ..good
    }
}

/// Backends and the inner packets that each carries.
fn cases(out: bool) -> Vec<(Backend, Vec<u8>)> {
    let v4 = |payload| {
        let inner = if out { outgoing4() } else { Inner::default() };
        Inner { payload, ..inner }.packet()
    };
    let v6 = |payload| {
        let inner = if out { outgoing6() } else { Inner6::default() };
        Inner6 { payload, ..inner }.packet()
    };
    let mut cases = Vec::new();
    for payload in [0, 1, 36, 37, 1000, 1382] {
        for backend in [Backend::Vxlan, Backend::Ipip, Backend::Udp, Backend::HostGw] {
            cases.push((backend, v4(payload)));
        }
        for backend in [Backend::Vxlan, Backend::HostGw] {
            cases.push((backend, v6(payload)));
        }
    }
    cases
}

#[test]
fn a_peers_packet_is_delivered_as_it_was_sent() {
    for vlan in TAGS {
        for (backend, packet) in cases(false) {
            for padding in [0, 1, 18] {
                let outer = Outer {
                    vlan,
                    padding,
                    ..Outer::new(backend)
                };
                let frame = outer.frame(&packet);
                let expected = (outer.len(packet[0] >> 4), packet.len(), None);
                let what = format!("{} tag {vlan:?} padding {padding}", backend.name());
                let words = table(1, backend, vlan);
                assert_eq!(receive(&words, &frame), Ok(expected), "{what}");
                let (strip, len, _) = expected;
                assert_eq!(frame[strip..strip + len], packet, "{what}");
            }
        }
    }
}

#[test]
fn what_we_send_is_what_the_other_node_takes() {
    for vlan in TAGS {
        for (backend, packet) in cases(true) {
            let frame = send(&table(1, backend, vlan), &packet).unwrap();
            let (strip, len, tos) = receive(&table(2, backend, vlan), &frame).unwrap();
            let what = format!("{} tag {vlan:?}", backend.name());
            assert_eq!((len, tos), (packet.len(), None), "{what}");
            assert_eq!(frame[strip..], packet, "{what}");
            // The Ethernet header: next hop, our NIC, tag, family.
            assert_eq!(frame[..6], packets::nic_mac(2), "{what}");
            assert_eq!(frame[6..12], packets::nic_mac(1), "{what}");
            let rest = match vlan {
                Some(_) => {
                    assert_eq!(frame[12..16], [0x81, 0, 0, 100], "{what}");
                    &frame[16..]
                }
                None => &frame[12..],
            };
            let family: &[u8] = if packet[0] >> 4 == 6 {
                &[0x86, 0xdd]
            } else {
                &[8, 0]
            };
            assert_eq!(&rest[..2], family, "{what}");
        }
    }
}

/// Outer fields of IPv4 tunnels: (protocol, TTL, DF) for an inner packet with TTL 63 and this DF.
#[test]
fn outer_ipv4_headers_are_the_kernels() {
    for vlan in TAGS {
        let at = 14 + vlan.map_or(0, |_| 4);
        for dont_fragment in [false, true] {
            let expected = [
                (Backend::Vxlan, 17, 64, false),
                (Backend::Ipip, 4, 63, dont_fragment),
                (Backend::Udp, 17, 64, true),
            ];
            for (backend, protocol, ttl, outer_df) in expected {
                let packet = Inner {
                    tos: 0xb9,
                    fragment: if dont_fragment { 0x4000 } else { 0 },
                    ..outgoing4()
                }
                .packet();
                let frame = send(&table(1, backend, vlan), &packet).unwrap();
                let ip = Ipv4HeaderSlice::from_slice(&frame[at..]).unwrap();
                assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
                assert_eq!(usize::from(ip.total_len()), frame.len() - at);
                assert_eq!(
                    (ip.protocol().0, ip.ttl(), ip.dont_fragment()),
                    (protocol, ttl, outer_df),
                    "{}",
                    backend.name()
                );
                assert_eq!((ip.identification(), ip.more_fragments()), (77, false));
                assert_eq!((ip.dcp().value(), ip.ecn().value()), (0, 1));
                assert_eq!(ip.source_addr(), node(1).v4.unwrap().address);
                assert_eq!(ip.destination_addr(), node(2).v4.unwrap().address);
                if backend == Backend::Udp {
                    let udp = &frame[at + 20..at + 28];
                    assert_eq!(
                        udp[..4],
                        [8472_u16.to_be_bytes(), 8472_u16.to_be_bytes()].concat()
                    );
                    let len = u16::try_from(packet.len() + 8).unwrap();
                    assert_eq!(udp[4..], [len.to_be_bytes(), [0, 0]].concat());
                }
            }
        }
    }
}

/// The outer UDP checksum over IPv6 is the sum over all bytes, however it was computed.
#[test]
fn the_outer_udp_checksum_over_ipv6_is_right() {
    let fragment = |offset_and_more: u16| {
        let [high, low] = offset_and_more.to_be_bytes();
        (44, vec![17, 0, high, low, 1, 2, 3, 4])
    };
    let mut packets = Vec::new();
    for payload in [0, 1, 2, 3, 77, 1000, 1362] {
        for protocol in [6, 17, 58, 132, 50, 4] {
            // Type and code of ICMPv6 are where ports are: an echo request.
            let ports = if protocol == 58 {
                (128 << 8, 80)
            } else {
                (1234, 80)
            };
            let mut inner = Inner6 {
                payload: payload + 12,
                protocol,
                ports,
                extensions: (protocol, Vec::new()),
                class: 0x2e,
                ..outgoing6()
            };
            // The place of the checksum is UDP's; other protocols get one of their own, below, or none.
            if protocol != 17 {
                inner.checksum_error = None;
            }
            let mut packet = inner.packet();
            let place = match protocol {
                6 => Some(40 + 16),
                58 => Some(40 + 2),
                _ => None,
            };
            if let Some(at) = place {
                packet[at..at + 2].fill(0);
                let sum = checksum6(inner.source, inner.destination, protocol, &packet[40..]);
                packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
            packets.push(packet);
        }
        packets.push(
            Inner6 {
                payload,
                checksum_error: None,
                ..outgoing6()
            }
            .packet(),
        );
        packets.push(
            Inner6 {
                payload,
                extensions: fragment(1),
                ..outgoing6()
            }
            .packet(),
        );
        packets.push(
            Inner6 {
                payload,
                extensions: fragment(0x0100),
                ..outgoing6()
            }
            .packet(),
        );
        packets.push(
            Inner6 {
                payload,
                extensions: (0, vec![17, 0, 1, 4, 0, 0, 0, 0]),
                ..outgoing6()
            }
            .packet(),
        );
    }
    for vlan in TAGS {
        let at = 14 + vlan.map_or(0, |_| 4);
        for packet in &packets {
            let frame = send(&table(1, Backend::Vxlan, vlan), packet).unwrap();
            let ip = Ipv6HeaderSlice::from_slice(&frame[at..]).unwrap();
            assert_eq!(usize::from(ip.payload_length()), frame.len() - at - 40);
            assert_eq!((ip.hop_limit(), ip.next_header().0), (64, 17));
            assert_eq!(ip.flow_label().value(), 0);
            assert_eq!(
                ip.traffic_class(),
                packet_class(packet) & 3,
                "DSCP 0, ECN copied"
            );
            let (from, to) = (ip.source_addr(), ip.destination_addr());
            assert_eq!(from, node(1).v6.unwrap().address);
            assert_eq!(to, node(2).v6.unwrap().address);
            let mut udp = frame[at + 40..].to_vec();
            let found = u16::from_be_bytes([udp[6], udp[7]]);
            udp[6..8].fill(0);
            assert_ne!(found, 0);
            assert_eq!(
                found,
                checksum6(from, to, 17, &udp),
                "protocol {}",
                packet[6]
            );
            let taken = receive(&table(2, Backend::Vxlan, vlan), &frame);
            assert_eq!(
                taken,
                Ok((at + 70, packet.len(), None)),
                "protocol {}",
                packet[6]
            );
        }
    }
}

fn packet_class(packet: &[u8]) -> u8 {
    packet[0] << 4 | packet[1] >> 4
}

/// A sum that comes out as zero is sent as all ones: searched for by varying the payload's last word.
#[test]
fn an_outer_checksum_of_zero_is_sent_as_all_ones() {
    let words = table(1, Backend::Vxlan, None);
    let mut seen = false;
    for word in 0..=u16::MAX {
        // No transport checksum, so that the outer one depends on every byte.
        let mut packet = Inner6 {
            checksum_error: None,
            ..outgoing6()
        }
        .packet();
        let end = packet.len();
        packet[end - 2..].copy_from_slice(&word.to_be_bytes());
        let frame = send(&words, &packet).unwrap();
        let sum = u16::from_be_bytes([frame[60], frame[61]]);
        assert_ne!(sum, 0);
        seen |= sum == u16::MAX;
    }
    assert!(seen, "one of all payloads has the sum zero");
}

#[test]
fn a_wrong_outer_checksum_over_ipv6_is_dropped() {
    let words = table(1, Backend::Vxlan, None);
    let good = Outer::new(Backend::Vxlan);
    let packets = [
        Inner6::default(),
        Inner6 {
            checksum_error: None,
            ..Inner6::default()
        },
        Inner6 {
            extensions: (50, Vec::new()),
            ..Inner6::default()
        },
    ];
    for inner in packets {
        for error in [Some(1), Some(0x8000), None] {
            let frame = Outer {
                udp_checksum_error: error,
                ..good.clone()
            }
            .frame(&inner.packet());
            assert_eq!(
                receive(&words, &frame),
                Err(DropReason::OuterUdpChecksum),
                "{error:?}"
            );
        }
    }
    // Each single damaged bit of outer addresses, VXLAN and inner Ethernet header is noticed by one check or another.
    let frame = good.frame(&Inner6::default().packet());
    for bit in 14 * 8..84 * 8 {
        let mut damaged = frame.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // Flow label, traffic class and hop limit are covered by no checksum: as in the kernel.
        let free = (15..18).contains(&(bit / 8)) || bit / 8 == 21 || bit / 8 == 14 && bit % 8 < 4;
        assert_eq!(receive(&words, &damaged).is_ok(), free, "bit {bit}");
    }
}

/// RFC 6040 section 4.2, figure 4, and section 4.1, normal mode, for every tunnel.
#[test]
fn congestion_marks_go_in_and_out() {
    const DROP: u8 = 0xff;
    const CODES: [u8; 4] = [0b00, 0b10, 0b01, 0b11];
    let figure = [
        [0b00, 0b00, 0b00, DROP],
        [0b10, 0b10, 0b01, 0b11],
        [0b01, 0b01, 0b01, 0b11],
        [0b11, 0b11, 0b11, 0b11],
    ];
    for backend in TUNNELS {
        for ipv6 in [false, true] {
            if ipv6 && backend != Backend::Vxlan {
                continue;
            }
            let words = table(1, backend, None);
            for (inner, row) in CODES.into_iter().zip(figure) {
                let tos = 0xb8 | inner;
                let (packet, back) = if ipv6 {
                    (
                        Inner6 {
                            class: tos,
                            ..Inner6::default()
                        }
                        .packet(),
                        Inner6 {
                            class: tos,
                            ..outgoing6()
                        }
                        .packet(),
                    )
                } else {
                    (
                        Inner {
                            tos,
                            ..Inner::default()
                        }
                        .packet(),
                        Inner { tos, ..outgoing4() }.packet(),
                    )
                };
                for (outer, expected) in CODES.into_iter().zip(row) {
                    let frame = Outer {
                        tos: 0x28 | outer,
                        ..Outer::new(backend)
                    }
                    .frame(&packet);
                    let found = match receive(&words, &frame) {
                        Ok((_, _, changed)) => changed.unwrap_or(tos) & 3,
                        Err(reason) => {
                            assert_eq!(reason, DropReason::EcnNotCapable);
                            DROP
                        }
                    };
                    assert_eq!(
                        found,
                        expected,
                        "{} inner {inner:02b} outer {outer:02b}",
                        backend.name()
                    );
                }
                let frame = send(&words, &back).unwrap();
                let outer = if ipv6 {
                    packet_class(&frame[14..])
                } else {
                    frame[15]
                };
                assert_eq!(outer, inner, "{} copies {inner:02b}", backend.name());
            }
        }
    }
}

#[test]
fn dscp_is_fixed_or_inherited() {
    for backend in TUNNELS {
        for (dscp, expected) in [
            (Dscp::Fixed(0), 0),
            (Dscp::Fixed(46), 46),
            (Dscp::Inherit, 10),
        ] {
            for vlan in TAGS {
                let at = 14 + vlan.map_or(0, |_| 4);
                let words = table_with(1, vlan, |node| {
                    node.backend = backend;
                    node.dscp = dscp;
                });
                let frame = send(
                    &words,
                    &Inner {
                        tos: 10 << 2 | 2,
                        ..outgoing4()
                    }
                    .packet(),
                )
                .unwrap();
                let ip = Ipv4HeaderSlice::from_slice(&frame[at..]).unwrap();
                assert_eq!((ip.dcp().value(), ip.ecn().value()), (expected, 2));
                assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
                if backend == Backend::Vxlan {
                    let packet = Inner6 {
                        class: 10 << 2 | 2,
                        ..outgoing6()
                    }
                    .packet();
                    let frame = send(&words, &packet).unwrap();
                    assert_eq!(packet_class(&frame[at..]), expected << 2 | 2);
                    let taken = receive(&table(2, backend, vlan), &frame);
                    assert!(
                        taken.is_ok(),
                        "the checksum covers no traffic class: {taken:?}"
                    );
                }
            }
        }
    }
}

/// What is dropped on its way in from another node, for every tunnel and without one.
#[test]
fn attacks_from_the_wire_have_their_reasons() {
    let v4 = Inner::default;
    let v6 = Inner6::default;
    let lla = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let icmp6 = |kind: u16| Inner6 {
        extensions: (58, Vec::new()),
        protocol: 58,
        ports: (kind << 8, 0),
        ..v6()
    };
    let tcp_fragment = |fragment, payload| {
        Inner {
            protocol: 6,
            fragment,
            payload,
            ..v4()
        }
        .packet()
    };
    let rows4: Vec<(&str, Vec<u8>, DropReason)> = vec![
        (
            "a source outside the lease",
            Inner {
                source: [10, 244, 3, 7],
                ..v4()
            }
            .packet(),
            DropReason::InnerSource,
        ),
        (
            "a node as source",
            Inner {
                source: [10, 199, 0, 13],
                ..v4()
            }
            .packet(),
            DropReason::InnerSource,
        ),
        (
            "our own pod as source",
            Inner {
                source: [10, 244, 1, 9],
                ..v4()
            }
            .packet(),
            DropReason::InnerSource,
        ),
        (
            "a destination elsewhere",
            Inner {
                destination: [10, 244, 3, 5],
                ..v4()
            }
            .packet(),
            DropReason::InnerDestination,
        ),
        (
            "this node as destination",
            Inner {
                destination: [10, 199, 0, 11],
                ..v4()
            }
            .packet(),
            DropReason::InnerDestination,
        ),
        (
            "a redirect",
            Inner {
                protocol: 1,
                ports: (0x0501, 0),
                ..v4()
            }
            .packet(),
            DropReason::IcmpRedirect,
        ),
        (
            "a first fragment without TCP flags",
            tcp_fragment(0x2000, 0),
            DropReason::InnerFragment,
        ),
        (
            "a fragment over the TCP header",
            tcp_fragment(0x0001, 100),
            DropReason::InnerFragment,
        ),
        (
            "a fragment over the TCP header's end",
            tcp_fragment(0x0002, 100),
            DropReason::InnerFragment,
        ),
        (
            "a fragment beyond the longest packet",
            Inner {
                fragment: 0x1fff,
                ..v4()
            }
            .packet(),
            DropReason::InnerFragment,
        ),
        (
            "an impossible header length",
            Inner {
                version_ihl: 0x44,
                ..v4()
            }
            .packet(),
            DropReason::InnerHeader,
        ),
        (
            "a length beyond the packet",
            Inner {
                total_len_error: 1,
                ..v4()
            }
            .packet(),
            DropReason::InnerLength,
        ),
        (
            "a length within the header",
            Inner {
                total_len: Some(19),
                ..v4()
            }
            .packet(),
            DropReason::InnerLength,
        ),
        (
            "a wrong header checksum",
            Inner {
                checksum_error: 1,
                ..v4()
            }
            .packet(),
            DropReason::InnerChecksum,
        ),
    ];
    for vlan in TAGS {
        for backend in TUNNELS {
            let words = table(1, backend, vlan);
            let outer = Outer {
                vlan,
                ..Outer::new(backend)
            };
            for (what, packet, reason) in &rows4 {
                let found = receive(&words, &outer.frame(packet));
                assert_eq!(found, Err(*reason), "{}: {what}", backend.name());
            }
            let stranger = Outer {
                source4: Ipv4Addr::new(10, 199, 0, 99),
                ..outer.clone()
            };
            for (what, packet, _) in &rows4 {
                let found = receive(&words, &stranger.frame(packet));
                assert_eq!(
                    found,
                    Err(DropReason::UnknownPeer),
                    "{}: {what}, stranger",
                    backend.name()
                );
            }
        }
    }
    let rows6: Vec<(&str, Vec<u8>, DropReason)> = vec![
        (
            "a source outside the lease",
            Inner6 {
                source: Ipv6Addr::new(0xfd10, 0x244, 0, 3, 0, 0, 0, 7),
                ..v6()
            }
            .packet(),
            DropReason::InnerSource,
        ),
        (
            "a link-local source",
            Inner6 {
                source: lla,
                ..v6()
            }
            .packet(),
            DropReason::InnerSource,
        ),
        (
            "a destination elsewhere",
            Inner6 {
                destination: Ipv6Addr::new(0xfd10, 0x244, 0, 3, 0, 0, 0, 7),
                ..v6()
            }
            .packet(),
            DropReason::InnerDestination,
        ),
        (
            "all nodes as destination",
            Inner6 {
                destination: Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
                ..v6()
            }
            .packet(),
            DropReason::InnerDestination,
        ),
        (
            "a router advertisement",
            icmp6(134).packet(),
            DropReason::NeighbourDiscovery,
        ),
        (
            "a neighbour advertisement",
            icmp6(136).packet(),
            DropReason::NeighbourDiscovery,
        ),
        (
            "an IPv6 redirect",
            icmp6(137).packet(),
            DropReason::NeighbourDiscovery,
        ),
        (
            "a router advertisement behind a hop-by-hop header",
            Inner6 {
                extensions: (0, vec![58, 0, 1, 4, 0, 0, 0, 0]),
                ..icmp6(134)
            }
            .packet(),
            DropReason::NeighbourDiscovery,
        ),
        (
            "a router advertisement in a first fragment",
            Inner6 {
                extensions: (44, vec![58, 0, 0, 1, 0, 0, 0, 9]),
                ..icmp6(134)
            }
            .packet(),
            DropReason::NeighbourDiscovery,
        ),
        (
            "a first fragment that hides its headers",
            Inner6 {
                extensions: (44, vec![0, 0, 0, 1, 0, 0, 0, 9, 17, 9]),
                payload: 0,
                ..v6()
            }
            .packet(),
            DropReason::InnerFragment,
        ),
        (
            "a fragment over the TCP header",
            Inner6 {
                extensions: (44, vec![6, 0, 0, 8, 0, 0, 0, 9]),
                ..v6()
            }
            .packet(),
            DropReason::InnerFragment,
        ),
        (
            "a fragment beyond the longest packet",
            Inner6 {
                extensions: (44, vec![17, 0, 0xff, 0xf8, 0, 0, 0, 9]),
                ..v6()
            }
            .packet(),
            DropReason::InnerFragment,
        ),
        (
            "an extension header beyond the packet",
            Inner6 {
                extensions: (60, vec![17, 200, 0, 0, 0, 0, 0, 0]),
                ..v6()
            }
            .packet(),
            DropReason::InnerLength,
        ),
        (
            "nine extension headers",
            Inner6 {
                extensions: (60, [[60u8, 0, 1, 4, 0, 0, 0, 0]; 9].concat()),
                ..v6()
            }
            .packet(),
            DropReason::InnerHeader,
        ),
        (
            "a length beyond the packet",
            Inner6 {
                payload_len_error: 1,
                ..v6()
            }
            .packet(),
            DropReason::InnerLength,
        ),
    ];
    for vlan in TAGS {
        let words = table(1, Backend::Vxlan, vlan);
        let outer = Outer {
            vlan,
            ..Outer::new(Backend::Vxlan)
        };
        let stranger = Outer {
            source6: Ipv6Addr::LOCALHOST,
            ..outer.clone()
        };
        for (what, packet, reason) in &rows6 {
            assert_eq!(
                receive(&words, &outer.frame(packet)),
                Err(*reason),
                "{what}"
            );
            let found = receive(&words, &stranger.frame(packet));
            assert_eq!(found, Err(DropReason::UnknownPeer), "{what}, stranger");
        }
        // Without a tunnel, all but those whose addresses are somebody else's.
        let outer = Outer {
            vlan,
            ..Outer::new(Backend::HostGw)
        };
        let words = table(1, Backend::HostGw, vlan);
        let by_address = [DropReason::InnerSource, DropReason::InnerDestination];
        for (what, packet, reason) in rows4.iter().chain(&rows6) {
            if !by_address.contains(reason) {
                let found = receive(&words, &outer.frame(packet));
                assert_eq!(found, Err(*reason), "without a tunnel: {what}");
            }
        }
    }
}

/// Without a tunnel the source must be in a peer's lease; what is not for our pods never gets here.
#[test]
fn packets_without_a_tunnel_must_come_from_a_lease() {
    let outer = Outer::new(Backend::HostGw);
    for backend in [Backend::HostGw, Backend::Vxlan] {
        let words = table_with(1, None, |node| {
            node.backend = backend;
            node.direct = true;
        });
        // Peer 4's own next hop is not resolved: its packets are taken all the same.
        for (source, expected) in [
            ([10, 244, 2, 7], Ok(())),
            ([10, 244, 4, 7], Ok(())),
            ([10, 244, 9, 7], Err(DropReason::UnknownSource)),
            ([10, 244, 1, 7], Err(DropReason::UnknownSource)),
            ([10, 199, 0, 12], Err(DropReason::UnknownSource)),
        ] {
            let frame = outer.frame(
                &Inner {
                    source,
                    ..Inner::default()
                }
                .packet(),
            );
            assert_eq!(receive(&words, &frame).map(|_| ()), expected, "{source:?}");
        }
        for (subnet, expected) in [
            (2, Ok(())),
            (4, Ok(())),
            (9, Err(DropReason::UnknownSource)),
            (1, Err(DropReason::UnknownSource)),
        ] {
            let source = Ipv6Addr::new(0xfd10, 0x244, 0, subnet, 0, 0, 0, 7);
            let frame = outer.frame(
                &Inner6 {
                    source,
                    ..Inner6::default()
                }
                .packet(),
            );
            assert_eq!(receive(&words, &frame).map(|_| ()), expected, "{source}");
        }
        let redirect = Inner {
            protocol: 1,
            ports: (0x0501, 0),
            ..Inner::default()
        }
        .packet();
        assert_eq!(
            receive(&words, &outer.frame(&redirect)),
            Err(DropReason::IcmpRedirect)
        );
        let options = vec![1; 40];
        let rows = [
            ("a first fragment", 0x2000, 17, vec![], Ok(())),
            ("a last fragment", 0x0003, 6, vec![], Ok(())),
            ("options", 0, 17, options.clone(), Ok(())),
            (
                "a fragment over the ports",
                0x0001,
                6,
                options,
                Err(DropReason::InnerFragment),
            ),
        ];
        for (what, fragment, protocol, options, expected) in rows {
            let packet = Inner {
                fragment,
                protocol,
                options,
                ..Inner::default()
            }
            .packet();
            let found = receive(&words, &outer.frame(&packet)).map(|_| ());
            assert_eq!(found, expected, "{what}");
        }
    }
    // A node that is not told to accept them does not.
    let words = table(1, Backend::Vxlan, None);
    let found = receive(&words, &outer.frame(&Inner::default().packet()));
    assert_eq!(found, Err(DropReason::OuterDestination));
}

/// A tunnel packet of every backend, at a node of every other.
#[test]
fn another_backends_packets_are_not_taken() {
    for ours in [
        Backend::Vxlan,
        Backend::Ipip,
        Backend::Udp,
        Backend::HostGw,
        Backend::Alloc,
    ] {
        let words = table(1, ours, None);
        for (theirs, packet) in cases(false) {
            let found = receive(&words, &Outer::new(theirs).frame(&packet));
            let same = ours == theirs;
            assert_eq!(
                found.is_ok(),
                same,
                "{} to {}: {found:?}",
                theirs.name(),
                ours.name()
            );
            assert!(same || found != Err(DropReason::TableDamaged));
        }
        for vlan in [Some(101), None] {
            let tagged = table(1, ours, Some(100));
            let frame = Outer {
                vlan,
                ..Outer::new(ours)
            }
            .frame(&Inner::default().packet());
            assert_eq!(
                receive(&tagged, &frame),
                Err(DropReason::OuterHeader),
                "tag {vlan:?}"
            );
        }
    }
}

#[test]
fn the_host_may_not_send_these() {
    for backend in [Backend::Vxlan, Backend::Ipip, Backend::Udp, Backend::HostGw] {
        let words = table(1, backend, None);
        let direct = backend == Backend::HostGw;
        let rows = [
            (
                "another node's pod",
                Inner {
                    source: [10, 244, 2, 9],
                    ..outgoing4()
                },
                Err(DropReason::SourceNotLocal),
            ),
            (
                "another node",
                Inner {
                    source: [10, 199, 0, 12],
                    ..outgoing4()
                },
                Err(DropReason::SourceNotLocal),
            ),
            (
                "this node",
                Inner {
                    source: [10, 199, 0, 11],
                    ..outgoing4()
                },
                if direct {
                    Ok(())
                } else {
                    Err(DropReason::SourceNotLocal)
                },
            ),
            (
                "a redirect",
                Inner {
                    protocol: 1,
                    ports: (0x0500, 0),
                    ..outgoing4()
                },
                Err(DropReason::IcmpRedirect),
            ),
            (
                "a tiny fragment",
                Inner {
                    protocol: 6,
                    fragment: 0x2000,
                    payload: 0,
                    ..outgoing4()
                },
                Err(DropReason::InnerFragment),
            ),
            ("a good packet", outgoing4(), Ok(())),
        ];
        for (what, inner, expected) in rows {
            assert_eq!(
                send(&words, &inner.packet()).map(|_| ()),
                expected,
                "{} {what}",
                backend.name()
            );
        }
    }
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let words = table(1, backend, None);
        let rows = [
            (
                "another node's pod",
                Inner6 {
                    source: Inner6::default().source,
                    ..outgoing6()
                },
                Err(DropReason::SourceNotLocal),
            ),
            (
                "a router advertisement",
                Inner6 {
                    extensions: (58, vec![]),
                    ports: (134 << 8, 0),
                    ..outgoing6()
                },
                Err(DropReason::NeighbourDiscovery),
            ),
            (
                "a length that lies",
                Inner6 {
                    payload_len_error: -1,
                    ..outgoing6()
                },
                Err(DropReason::HostHeader),
            ),
            (
                "larger than the pod MTU",
                Inner6 {
                    payload: 1383,
                    ..outgoing6()
                },
                Err(DropReason::TooBig),
            ),
            (
                "a good packet",
                Inner6 {
                    payload: 1382,
                    ..outgoing6()
                },
                Ok(()),
            ),
        ];
        for (what, inner, expected) in rows {
            assert_eq!(
                send(&words, &inner.packet()).map(|_| ()),
                expected,
                "{} {what}",
                backend.name()
            );
        }
        let v4_only = table_with(1, None, |node| {
            node.backend = backend;
            node.v6 = None;
        });
        let found = send(&v4_only, &outgoing6().packet());
        assert_eq!(found, Err(DropReason::HostWithoutLease));
    }
}

/// Three gateways through one uplink, two through another: each flow keeps to one, all are used, in equal shares.
#[test]
fn flows_keep_to_their_path_and_all_paths_are_used() {
    let mut us = node(1);
    us.nics[1].ifindex = 7;
    us.nics[1].uplink = 1;
    let mut builder = ImageBuilder::new(us);
    let peer = node(2);
    let mut paths = Vec::new();
    for gateway in 11..=15u8 {
        let uplink = u8::from(gateway > 13);
        let ethernet = ethernet(1, gateway, None);
        let (address, mac) = (peer.v4.unwrap().address, peer.v4.unwrap().vtep_mac);
        paths.push((
            uplink,
            builder.adjacency(Adjacency::vxlan4(&us, ethernet, address, mac)),
        ));
    }
    let paths4 = builder.paths(&paths);
    builder.route4(Ipv4Addr::new(10, 244, 2, 0), 24, Route::Paths(paths4));
    let mut paths = Vec::new();
    for gateway in 11..=13u8 {
        let ethernet = ethernet(1, gateway, None);
        let (address, mac) = (peer.v6.unwrap().address, peer.v6.unwrap().vtep_mac);
        paths.push((
            0,
            builder.adjacency(Adjacency::vxlan6(&us, ethernet, address, mac)),
        ));
    }
    let paths6 = builder.paths(&paths);
    builder.route6(peer.v6.unwrap().subnet.0, 64, Route::Paths(paths6));
    let words = words(&builder.build().unwrap());
    for (nic, gateways) in [(NIC, 11..=13u8), (7, 14..=15)] {
        let table = Table::attach(&words, nic).unwrap();
        let mut ports = vec![BTreeSet::new(); 16];
        let count = 3000;
        for flow in 0..count {
            let inner = Inner {
                ports: (flow, 80),
                ..outgoing4()
            };
            let frame = packets::sent(&inner.packet(), &table).unwrap();
            let longer = packets::sent(
                &Inner {
                    payload: 900,
                    ..inner
                }
                .packet(),
                &table,
            )
            .unwrap();
            assert_eq!(frame[..6], longer[..6], "a flow keeps to its path");
            ports[usize::from(frame[5])].insert([frame[34], frame[35]]);
            if nic == NIC {
                let inner = Inner6 {
                    ports: (flow, 80),
                    ..outgoing6()
                };
                let frame = packets::sent(&inner.packet(), &table).unwrap();
                ports[usize::from(frame[5])].insert([frame[54], frame[55]]);
            }
        }
        let families = if nic == NIC { 2 } else { 1 };
        let share = families * usize::from(count) / gateways.clone().count();
        for gateway in gateways {
            let used = ports[usize::from(gateway)].len();
            assert!(
                used * 10 > share * 7,
                "gateway {gateway}: {used} source ports, fair are {share}"
            );
        }
    }
    // A NIC that the underlay does not use has no path.
    let elsewhere = Table::attach(&words, 99).unwrap();
    let found = packets::sent(&outgoing4().packet(), &elsewhere);
    assert_eq!(found, Err(DropReason::Unresolved));
}

#[test]
fn flows_of_ipv6_differ_in_source_port_and_fragments_of_a_datagram_do_not() {
    let words = table(1, Backend::Vxlan, None);
    let port = |inner: &Inner6| {
        let frame = send(&words, &inner.packet()).unwrap();
        u16::from_be_bytes([frame[54], frame[55]])
    };
    let of_flow = |number: u16| Inner6 {
        ports: (10_000 + number, 80),
        ..outgoing6()
    };
    let ports: BTreeSet<u16> = (0..1000).map(|number| port(&of_flow(number))).collect();
    assert!(
        ports.len() > 950,
        "1000 flows use only {} ports",
        ports.len()
    );
    let by_address = |number: u16| {
        let source = Ipv6Addr::new(0xfd10, 0x244, 0, 1, 0, number, 0, 5);
        Inner6 {
            source,
            ..outgoing6()
        }
    };
    let ports: BTreeSet<u16> = (0..1000).map(|number| port(&by_address(number))).collect();
    assert!(
        ports.len() > 950,
        "1000 pods use only {} ports",
        ports.len()
    );
    assert_eq!(
        port(&of_flow(1)),
        port(&Inner6 {
            payload: 500,
            flow_label: 7,
            ..of_flow(1)
        })
    );
    let fragment = |offset: u8, more: u8| (44, vec![17, 0, 0, offset << 3 | more, 1, 2, 3, 4]);
    let first = Inner6 {
        extensions: fragment(0, 1),
        ..of_flow(1)
    };
    let later = Inner6 {
        extensions: fragment(20, 0),
        ports: (0xdead, 0xbeef),
        ..of_flow(1)
    };
    assert_eq!(port(&first), port(&later), "fragments of one datagram");
    assert_ne!(port(&first), port(&of_flow(1)));
}
