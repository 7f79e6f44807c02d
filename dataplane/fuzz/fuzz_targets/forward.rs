//! Any bytes through `forward`, both ways: it never panics, and what it lets through is what promise 4 allows.
//!
//! The first byte chooses backend, family, direction, and whether the rest is a packet as it is or a list of changes to a
//! good one; the second form gets past the checks that noise never passes.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/packets/mod.rs"]
mod packets;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use packets::{Inner, Inner6, NIC, Outer, checksum, checksum6, image_with};
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::FromNic;
use ripstop_fib::sync::words;
use ripstop_fib::{Backend, Word};

const BACKENDS: [Backend; 4] = [Backend::Vxlan, Backend::Ipip, Backend::Udp, Backend::HostGw];

/// The tables of nodes 1 and 2, by backend.
static TABLES: LazyLock<Vec<[Vec<Word>; 2]>> = LazyLock::new(|| {
    BACKENDS
        .into_iter()
        .map(|backend| {
            [1, 2].map(|own| {
                words(&image_with(
                    own,
                    |node| {
                        node.backend = backend;
                        node.direct = backend == Backend::HostGw;
                    },
                    None,
                ))
            })
        })
        .collect()
});

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let which = usize::from(choice >> 3 & 3);
    let (backend, [ours, theirs]) = (BACKENDS[which], &TABLES[which]);
    let attach = |words| Table::attach(words, NIC).expect("the test table is whole");
    let (ours, theirs) = (attach(ours), attach(theirs));
    let from_nic = choice & 1 == 0;
    let ipv6 = choice & 0x20 != 0;
    let inner = good_inner(ipv6, from_nic);
    let outer = Outer::new(backend);
    let (good, ip_offsets) = if from_nic {
        (outer.frame(&inner), vec![14, outer.len(inner[0] >> 4)])
    } else {
        (inner, vec![0])
    };
    let bytes = if choice & 2 == 0 {
        rest.to_vec()
    } else {
        changed(good, rest, choice & 4 != 0, &ip_offsets)
    };
    if from_nic {
        received(&bytes, &ours, backend);
    } else {
        sent(&bytes, &ours, &theirs);
    }
});

fn good_inner(ipv6: bool, from_nic: bool) -> Vec<u8> {
    let (v4, v6) = (Inner::default(), Inner6::default());
    match (ipv6, from_nic) {
        (false, true) => v4.packet(),
        (false, false) => Inner {
            source: [10, 244, 1, 5],
            destination: [10, 244, 2, 7],
            ..v4
        }
        .packet(),
        (true, true) => v6.packet(),
        (true, false) => Inner6 {
            source: v6.destination,
            destination: v6.source,
            ..v6
        }
        .packet(),
    }
}

/// Applies triples of (place, place, value) to a packet; mends the header checksums if asked to, so that the checks
/// behind them are reached.
fn changed(mut packet: Vec<u8>, changes: &[u8], mend: bool, ip_offsets: &[usize]) -> Vec<u8> {
    for change in changes.chunks_exact(3) {
        let place = usize::from(u16::from_be_bytes([change[0], change[1]])) % (packet.len() + 8);
        match packet.get_mut(place) {
            Some(byte) => *byte = change[2],
            None => packet.truncate(usize::from(change[2])),
        }
        if packet.is_empty() {
            break;
        }
    }
    for at in ip_offsets.iter().filter(|_| mend) {
        let Some(header) = packet.get_mut(*at..*at + 20) else {
            continue;
        };
        if header[0] >> 4 == 4 {
            header[10..12].fill(0);
            let sum = checksum(header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
    }
    packet
}

/// Node number of an outer or inner address, as the test cluster numbers them.
fn node_of(address: &[u8]) -> u8 {
    match address {
        [10, 199, 0, last] => last - 10,
        [0xfd, 0, 0x01, 0x99, .., last] => last - 16,
        [10, 244, node, _] | [0xfd, 0x10, 0x02, 0x44, 0, 0, 0, node, ..] => *node,
        other => panic!("an address of nobody: {other:?}"),
    }
}

fn received(frame: &[u8], table: &Table<'_>, backend: Backend) {
    let FromNic::Deliver { strip, len, tos } = packets::received(frame, table) else {
        return;
    };
    let inner = &frame[strip..strip + len];
    let (source, destination, whole, class) = match inner[0] >> 4 {
        6 => (
            &inner[8..24],
            &inner[24..40],
            40 + usize::from(u16::from_be_bytes([inner[4], inner[5]])),
            inner[0] << 4 | inner[1] >> 4,
        ),
        _ => (
            &inner[12..16],
            &inner[16..20],
            usize::from(u16::from_be_bytes([inner[2], inner[3]])),
            inner[1],
        ),
    };
    assert_eq!(node_of(destination), 1, "the destination is ours");
    assert!(
        (2..=4).contains(&node_of(source)),
        "the source is a peer's pod"
    );
    assert_eq!(whole, len, "the inner packet is whole");
    assert!(
        tos.is_none_or(|tos| tos & !3 == class & !3),
        "only congestion marks change"
    );
    if backend != Backend::HostGw {
        let (from, to) = match frame[14] >> 4 {
            6 => (&frame[22..38], &frame[38..54]),
            _ => (&frame[26..30], &frame[30..34]),
        };
        assert_eq!(
            node_of(from),
            node_of(source),
            "it speaks for its own lease"
        );
        assert_eq!(node_of(to), 1, "it was sent to us");
    }
}

fn sent(packet: &[u8], table: &Table<'_>, peer: &Table<'_>) {
    let Ok(frame) = packets::sent(packet, table) else {
        return;
    };
    let ipv6 = packet[0] >> 4 == 6;
    let outer = &frame[14..];
    if frame.len() > packet.len() + 14 {
        if ipv6 {
            let address = |at: usize| {
                let octets: [u8; 16] = outer[at..at + 16].try_into().expect("16 bytes");
                octets.into()
            };
            let datagram = outer[40..].to_vec();
            let unverified = packet[6] == 17 || packet[6] == 6 || packet[6] == 58;
            // The sum of these is derived from the inner checksum, which noise has wrong.
            if !unverified {
                let mut zeroed = datagram.clone();
                zeroed[6..8].fill(0);
                let sum = checksum6(address(8), address(24), 17, &zeroed);
                assert_eq!(
                    datagram[6..8],
                    sum.to_be_bytes(),
                    "the UDP checksum is right"
                );
            }
        } else {
            assert_eq!(checksum(&outer[..20]), 0, "the outer checksum is right");
        }
        let (inner_to, outer_to) = if ipv6 {
            (&packet[24..40], &outer[24..40])
        } else {
            (&packet[16..20], &outer[16..20])
        };
        assert_eq!(
            node_of(inner_to),
            node_of(outer_to),
            "to the node that holds the lease"
        );
    }
    let to_peer = if ipv6 { packet[31] } else { packet[18] } == 2;
    let good_header = ipv6 || packet[0] == 0x45 && checksum(&packet[..20]) == 0;
    let plain = ipv6 || packet[6] & 0x3f == 0 && packet[7] == 0;
    let from_pod = node_of(if ipv6 {
        &packet[8..24]
    } else {
        &packet[12..16]
    }) == 1;
    let tunnel = frame.len() > packet.len() + 14;
    if to_peer && good_header && (plain || tunnel) && from_pod {
        let strip = frame.len() - packet.len();
        let verdict = packets::received(&frame, peer);
        let own_address =
            !tunnel && verdict == FromNic::Drop(ripstop_fib::DropReason::UnknownSource);
        assert!(
            own_address
                || verdict
                    == FromNic::Deliver {
                        strip,
                        len: packet.len(),
                        tos: None
                    },
            "the other end takes what we send: {verdict:?}"
        );
    }
}
