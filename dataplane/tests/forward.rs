//! `forward` case by case: the packet written as fields, the verdict expected. One row per drop reason.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod packets;

use etherparse::{Ipv4HeaderSlice, UdpHeaderSlice};
use packets::{Inner, NIC, Tunnel, table_words, vtep_mac};
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{DropReason, FromNic};

fn from_nic(frame: &[u8]) -> FromNic {
    let words = table_words();
    packets::received(frame, &Table::attach(&words, NIC).unwrap())
}

/// The frame that a packet from the host becomes.
fn from_host(packet: &[u8]) -> Result<Vec<u8>, DropReason> {
    let words = table_words();
    packets::sent(packet, &Table::attach(&words, NIC).unwrap())
}

#[test]
fn a_good_tunnel_packet_is_delivered_without_its_headers() {
    for payload in [0, 1, 64, 512, 1422] {
        let inner = Inner {
            payload,
            ..Inner::default()
        };
        let frame = Tunnel {
            inner: inner.clone(),
            ..Tunnel::default()
        }
        .frame();
        let len = inner.packet().len();
        assert_eq!(
            from_nic(&frame),
            FromNic::Deliver {
                strip: 64,
                len,
                tos: None
            }
        );
        assert_eq!(&frame[64..64 + len], inner.packet());
    }
}

#[test]
fn padding_behind_the_inner_packet_is_cut_off() {
    let inner = Inner {
        payload: 3,
        ..Inner::default()
    };
    let len = inner.packet().len();
    let padded = Tunnel {
        inner: inner.clone(),
        padding: 18,
        ..Tunnel::default()
    }
    .frame();
    assert_eq!(
        from_nic(&padded),
        FromNic::Deliver {
            strip: 64,
            len,
            tos: None
        }
    );
    let mut trailer = Tunnel {
        inner,
        ..Tunnel::default()
    }
    .frame();
    trailer.extend([0; 10]);
    assert_eq!(
        from_nic(&trailer),
        FromNic::Deliver {
            strip: 64,
            len,
            tos: None
        }
    );
}

#[test]
fn each_fault_has_its_own_reason() {
    let good = Tunnel::default;
    let inner = Inner::default;
    let rows: Vec<(&str, Vec<u8>, DropReason)> = vec![
        (
            "outer is IPv6",
            Tunnel {
                ether_type: 0x86dd,
                ..good()
            }
            .frame(),
            DropReason::OuterHeader,
        ),
        (
            "outer has options",
            Tunnel {
                version_ihl: 0x46,
                ..good()
            }
            .frame(),
            DropReason::OuterHeader,
        ),
        (
            "outer more fragments",
            Tunnel {
                fragment: 0x2000,
                ..good()
            }
            .frame(),
            DropReason::OuterFragment,
        ),
        (
            "outer later fragment",
            Tunnel {
                fragment: 0x0007,
                ..good()
            }
            .frame(),
            DropReason::OuterFragment,
        ),
        (
            "outer checksum off by one",
            Tunnel {
                checksum_error: 1,
                ..good()
            }
            .frame(),
            DropReason::OuterChecksum,
        ),
        (
            "other destination",
            Tunnel {
                destination: [10, 199, 0, 12],
                ..good()
            }
            .frame(),
            DropReason::OuterDestination,
        ),
        (
            "not UDP",
            Tunnel {
                protocol: 6,
                ..good()
            }
            .frame(),
            DropReason::OuterDestination,
        ),
        (
            "other port",
            Tunnel {
                port: 4789,
                ..good()
            }
            .frame(),
            DropReason::OuterDestination,
        ),
        (
            "IP longer than the frame",
            Tunnel {
                total_len_error: 4,
                ..good()
            }
            .frame(),
            DropReason::OuterLength,
        ),
        (
            "UDP longer than IP",
            Tunnel {
                udp_len_error: 4,
                ..good()
            }
            .frame(),
            DropReason::OuterLength,
        ),
        (
            "UDP shorter than IP",
            Tunnel {
                udp_len_error: -4,
                ..good()
            }
            .frame(),
            DropReason::OuterLength,
        ),
        (
            "VXLAN without I flag",
            Tunnel { flags: 0, ..good() }.frame(),
            DropReason::VxlanFlags,
        ),
        (
            "VXLAN with group policy",
            Tunnel {
                flags: 0x8800_0000,
                ..good()
            }
            .frame(),
            DropReason::VxlanFlags,
        ),
        (
            "VXLAN reserved octet",
            Tunnel {
                reserved: 1,
                ..good()
            }
            .frame(),
            DropReason::VxlanFlags,
        ),
        (
            "other VNI",
            Tunnel { vni: 2, ..good() }.frame(),
            DropReason::VxlanVni,
        ),
        (
            "unknown peer",
            Tunnel {
                source: [10, 199, 0, 66],
                ..good()
            }
            .frame(),
            DropReason::UnknownPeer,
        ),
        (
            "unknown peer with a broken inner packet",
            Tunnel {
                source: [10, 199, 0, 66],
                inner_ether_type: 0x0806,
                ..good()
            }
            .frame(),
            DropReason::UnknownPeer,
        ),
        (
            "inner for another VTEP",
            Tunnel {
                inner_destination: [2, 0, 0, 0, 0, 9],
                ..good()
            }
            .frame(),
            DropReason::InnerDestinationMac,
        ),
        (
            "inner broadcast",
            Tunnel {
                inner_destination: [0xff; 6],
                ..good()
            }
            .frame(),
            DropReason::InnerDestinationMac,
        ),
        (
            "inner from ourselves",
            Tunnel {
                inner_source: vtep_mac(1),
                ..good()
            }
            .frame(),
            DropReason::InnerSourceMac,
        ),
        (
            "inner from a group",
            Tunnel {
                inner_source: [3, 0, 0, 0, 0, 1],
                ..good()
            }
            .frame(),
            DropReason::InnerSourceMac,
        ),
        (
            "inner VLAN",
            Tunnel {
                inner_ether_type: 0x8100,
                ..good()
            }
            .frame(),
            DropReason::InnerVlan,
        ),
        (
            "inner QinQ",
            Tunnel {
                inner_ether_type: 0x88a8,
                ..good()
            }
            .frame(),
            DropReason::InnerVlan,
        ),
        (
            "inner ARP",
            Tunnel {
                inner_ether_type: 0x0806,
                ..good()
            }
            .frame(),
            DropReason::InnerEtherType,
        ),
        (
            "inner IPv6",
            Tunnel {
                inner_ether_type: 0x86dd,
                ..good()
            }
            .frame(),
            DropReason::InnerEtherType,
        ),
        (
            "inner version 6",
            Tunnel {
                inner: Inner {
                    version_ihl: 0x65,
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerHeader,
        ),
        (
            "inner header of 16 bytes",
            Tunnel {
                inner: Inner {
                    version_ihl: 0x44,
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerHeader,
        ),
        (
            "inner longer than the tunnel packet",
            Tunnel {
                inner: Inner {
                    total_len_error: 1,
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerLength,
        ),
        (
            "inner shorter than its header",
            Tunnel {
                inner: Inner {
                    total_len: Some(19),
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerLength,
        ),
        (
            "inner checksum off by one",
            Tunnel {
                inner: Inner {
                    checksum_error: 1,
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerChecksum,
        ),
        (
            "inner source of another peer",
            Tunnel {
                inner: Inner {
                    source: [10, 244, 3, 2],
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerSource,
        ),
        (
            "inner source of our own",
            Tunnel {
                inner: Inner {
                    source: [10, 244, 1, 5],
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerSource,
        ),
        (
            "inner source from outside",
            Tunnel {
                inner: Inner {
                    source: [8, 8, 8, 8],
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerSource,
        ),
        (
            "inner destination of another node",
            Tunnel {
                inner: Inner {
                    destination: [10, 244, 3, 2],
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerDestination,
        ),
        (
            "inner destination multicast",
            Tunnel {
                inner: Inner {
                    destination: [224, 0, 0, 1],
                    ..inner()
                },
                ..good()
            }
            .frame(),
            DropReason::InnerDestination,
        ),
        (
            "congestion, not capable",
            Tunnel { tos: 3, ..good() }.frame(),
            DropReason::EcnNotCapable,
        ),
    ];
    for (what, frame, reason) in rows {
        assert_eq!(from_nic(&frame), FromNic::Drop(reason), "{what}");
    }
}

#[test]
fn a_frame_cut_anywhere_is_dropped() {
    let frame = Tunnel::default().frame();
    for len in 0..frame.len() {
        let expected = if len < 50 {
            DropReason::OuterTruncated
        } else {
            DropReason::OuterLength
        };
        assert_eq!(
            from_nic(&frame[..len]),
            FromNic::Drop(expected),
            "cut to {len} bytes"
        );
    }
    // The same with outer lengths that agree with the cut: the inner packet is what is short.
    for inner_len in 0..34 {
        let cut = Tunnel {
            inner_cut: Some(inner_len),
            ..Tunnel::default()
        }
        .frame();
        assert_eq!(
            from_nic(&cut),
            FromNic::Drop(DropReason::InnerTruncated),
            "inner frame of {inner_len} bytes"
        );
    }
    let cut = Tunnel {
        inner_cut: Some(34),
        ..Tunnel::default()
    }
    .frame();
    assert_eq!(from_nic(&cut), FromNic::Drop(DropReason::InnerLength));
}

/// RFC 6040 section 4.2, figure 4: rows are the inner field, columns the outer: Not-ECT, ECT(0), ECT(1), CE.
#[test]
fn congestion_marks_survive_decapsulation() {
    const DROP: u8 = 0xff;
    let figure = [
        (0b00, [0b00, 0b00, 0b00, DROP]),
        (0b10, [0b10, 0b10, 0b01, 0b11]),
        (0b01, [0b01, 0b01, 0b01, 0b11]),
        (0b11, [0b11, 0b11, 0b11, 0b11]),
    ];
    for (inner_ecn, expected) in figure {
        for (outer_ecn, result) in [0b00, 0b10, 0b01, 0b11].into_iter().zip(expected) {
            let inner = Inner {
                tos: 0xb8 | inner_ecn,
                ..Inner::default()
            };
            let verdict = from_nic(
                &Tunnel {
                    tos: 0x28 | outer_ecn,
                    inner,
                    ..Tunnel::default()
                }
                .frame(),
            );
            let tos = match verdict {
                FromNic::Deliver { tos, .. } => tos.unwrap_or(0xb8 | inner_ecn),
                FromNic::Drop(reason) => {
                    assert_eq!(reason, DropReason::EcnNotCapable);
                    DROP
                }
            };
            let wanted = if result == DROP { DROP } else { 0xb8 | result };
            assert_eq!(tos, wanted, "inner {inner_ecn:02b}, outer {outer_ecn:02b}");
        }
    }
}

#[test]
fn inner_options_are_delivered_when_their_checksum_is_right() {
    let inner = Inner {
        options: vec![1, 1, 1, 0],
        ..Inner::default()
    };
    let len = inner.packet().len();
    let frame = Tunnel {
        inner: inner.clone(),
        ..Tunnel::default()
    }
    .frame();
    assert_eq!(
        from_nic(&frame),
        FromNic::Deliver {
            strip: 64,
            len,
            tos: None
        }
    );
    let wrong = Tunnel {
        inner: Inner {
            checksum_error: 1,
            ..inner
        },
        ..Tunnel::default()
    }
    .frame();
    assert_eq!(from_nic(&wrong), FromNic::Drop(DropReason::InnerChecksum));
}

#[test]
fn a_peer_node_itself_may_send() {
    // flannel's own packets to remote pods carry the network address of the node's subnet, and go to ours.
    let inner = Inner {
        source: [10, 244, 2, 0],
        destination: [10, 244, 1, 0],
        ..Inner::default()
    };
    assert!(matches!(
        from_nic(
            &Tunnel {
                inner,
                ..Tunnel::default()
            }
            .frame()
        ),
        FromNic::Deliver { .. }
    ));
}

fn outgoing() -> Inner {
    Inner {
        source: [10, 244, 1, 5],
        destination: [10, 244, 2, 7],
        ..Inner::default()
    }
}

#[test]
fn a_packet_for_a_peer_gets_the_header_of_a_kernel_vxlan_device() {
    for payload in [0, 1, 100, 1422] {
        // RFC 6040 section 4.1, normal mode: the field is copied.
        for ecn in [0, 1, 2, 3] {
            let packet = Inner {
                payload,
                tos: 0xb8 | ecn,
                ..outgoing()
            }
            .packet();
            let frame = from_host(&packet).unwrap();
            assert_eq!(frame[64..], packet, "the packet itself");
            assert_eq!(frame[..6], [2, 0xee, 0, 0, 0, 2], "next hop");
            assert_eq!(frame[6..12], [2, 0xee, 0, 0, 0, 1], "our NIC");
            let ip = Ipv4HeaderSlice::from_slice(&frame[14..]).unwrap();
            assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
            assert_eq!(usize::from(ip.total_len()), frame.len() - 14);
            assert_eq!(
                (ip.ttl(), ip.identification(), ip.dont_fragment()),
                (64, 77, false)
            );
            assert_eq!((ip.dcp().value(), ip.ecn().value()), (0, ecn));
            assert_eq!(
                (ip.source(), ip.destination()),
                ([10, 199, 0, 11], [10, 199, 0, 12])
            );
            let udp = UdpHeaderSlice::from_slice(&frame[34..]).unwrap();
            assert_eq!(usize::from(udp.length()), frame.len() - 34);
            assert_eq!((udp.destination_port(), udp.checksum()), (8472, 0));
            assert!((32768..61000).contains(&udp.source_port()));
            assert_eq!(frame[42..50], [8, 0, 0, 0, 0, 0, 1, 0], "VXLAN, VNI 1");
            assert_eq!(
                frame[50..62],
                [2, 0x52, 0x53, 0, 0, 2, 2, 0x52, 0x53, 0, 0, 1],
                "VTEP to VTEP"
            );
        }
    }
}

#[test]
fn what_we_send_a_peer_accepts() {
    let words = packets::peer_table_words();
    let peer = Table::attach(&words, NIC).unwrap();
    let packet = outgoing().packet();
    let frame = from_host(&packet).unwrap();
    let len = packet.len();
    assert_eq!(
        packets::received(&frame, &peer),
        FromNic::Deliver {
            strip: 64,
            len,
            tos: None
        }
    );
}

#[test]
fn flows_differ_in_source_port_and_fragments_of_a_datagram_do_not() {
    let port = |inner: &Inner| {
        let frame = from_host(&inner.packet()).unwrap();
        u16::from_be_bytes([frame[34], frame[35]])
    };
    let of_flow = |number: u16| Inner {
        ports: (10_000 + number, 80),
        ..outgoing()
    };
    let ports: std::collections::HashSet<u16> =
        (0..1000).map(|number| port(&of_flow(number))).collect();
    assert!(
        ports.len() > 950,
        "1000 flows use only {} ports",
        ports.len()
    );
    assert_eq!(
        port(&of_flow(1)),
        port(&Inner {
            payload: 500,
            ..of_flow(1)
        }),
        "a flow keeps its port"
    );
    let first = Inner {
        fragment: 0x2000,
        ..of_flow(1)
    };
    let later = Inner {
        fragment: 0x00b9,
        ports: (0xdead, 0xbeef),
        ..of_flow(1)
    };
    assert_eq!(port(&first), port(&later), "fragments of one datagram");
    let tcp = Inner {
        protocol: 6,
        ..of_flow(1)
    };
    assert_ne!(port(&tcp), port(&of_flow(1)), "protocol counts");
}

#[test]
fn each_fault_of_the_host_has_its_own_reason() {
    let rows = [
        ("nothing", Vec::new(), DropReason::HostHeader),
        ("version 5", vec![0x50; 60], DropReason::HostHeader),
        ("too short", vec![0x45; 19], DropReason::HostHeader),
        (
            "header of 16 bytes",
            Inner {
                version_ihl: 0x44,
                ..outgoing()
            }
            .packet(),
            DropReason::HostHeader,
        ),
        (
            "length lies",
            Inner {
                total_len_error: 1,
                ..outgoing()
            }
            .packet(),
            DropReason::HostHeader,
        ),
        (
            "no lease",
            Inner {
                destination: [10, 244, 99, 1],
                ..outgoing()
            }
            .packet(),
            DropReason::NoRoute,
        ),
        (
            "next hop unknown",
            Inner {
                destination: [10, 244, 4, 1],
                ..outgoing()
            }
            .packet(),
            DropReason::Unresolved,
        ),
        (
            "our own lease",
            Inner {
                destination: [10, 244, 1, 9],
                ..outgoing()
            }
            .packet(),
            DropReason::LocalDestination,
        ),
        (
            "larger than the pod MTU",
            Inner {
                payload: 1423,
                ..outgoing()
            }
            .packet(),
            DropReason::TooBig,
        ),
        (
            "another node's pod as source",
            Inner {
                source: [10, 244, 2, 5],
                ..outgoing()
            }
            .packet(),
            DropReason::SourceNotLocal,
        ),
        (
            "the node as source",
            Inner {
                source: [10, 199, 0, 11],
                ..outgoing()
            }
            .packet(),
            DropReason::SourceNotLocal,
        ),
    ];
    for (what, packet, reason) in rows {
        assert_eq!(from_host(&packet), Err(reason), "{what}");
    }
}
