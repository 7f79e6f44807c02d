//! Any bytes through `forward`, both ways: it never panics, and what it lets through is what promise 4 allows.
//!
//! The first byte chooses the direction and whether the rest is a packet as it is or a list of changes to a good one;
//! the second form gets past the checks that noise never passes.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/packets/mod.rs"]
mod packets;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use packets::{Inner, Tunnel, checksum, local_node, peer_table_words, table_words};
use ripstop_dataplane::forward;
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{FromHost, FromNic};
use ripstop_fib::Word;

static OURS: LazyLock<Vec<Word>> = LazyLock::new(table_words);
static PEERS: LazyLock<Vec<Word>> = LazyLock::new(peer_table_words);

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let table = Table::attach(&OURS).expect("the test table is whole");
    let good = if choice & 1 == 0 {
        Tunnel::default().frame()
    } else {
        Inner {
            source: [10, 244, 1, 5],
            destination: [10, 244, 2, 7],
            ..Inner::default()
        }
        .packet()
    };
    let ip_offsets: &[usize] = if choice & 1 == 0 { &[14, 64] } else { &[0] };
    let bytes = if choice & 2 == 0 {
        rest.to_vec()
    } else {
        changed(good, rest, choice & 4 != 0, ip_offsets)
    };
    if choice & 1 == 0 {
        from_nic(&bytes, &table)
    } else {
        from_host(&bytes, &table)
    }
});

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
        header[10..12].fill(0);
        let sum = checksum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn from_nic(frame: &[u8], table: &Table<'_>) {
    let FromNic::Deliver { strip, len, tos } = forward::from_nic(frame, table) else {
        return;
    };
    let inner = &frame[strip..strip + len];
    let outer_source = &frame[26..30];
    assert!(
        matches!(outer_source, [10, 199, 0, 12..=14]),
        "the sender is a peer"
    );
    assert_eq!(
        inner[12..15],
        [10, 244, outer_source[3] - 10],
        "it speaks for its own lease"
    );
    assert_eq!(inner[16..19], [10, 244, 1], "the destination is ours");
    assert_eq!(
        frame[30..34],
        local_node().local.octets(),
        "it was sent to us"
    );
    assert_eq!(
        usize::from(u16::from_be_bytes([inner[2], inner[3]])),
        len,
        "the inner packet is whole"
    );
    assert!(
        tos.is_none_or(|tos| tos & !3 == inner[1] & !3),
        "only congestion marks change"
    );
}

fn from_host(packet: &[u8], table: &Table<'_>) {
    let FromHost::Send(header) = forward::from_host(packet, table, 1) else {
        return;
    };
    assert_eq!(
        checksum(&header[14..34]),
        0,
        "the outer header checksum is right"
    );
    assert_eq!(packet[16..18], [10, 244], "only leases are sent to");
    assert_eq!(
        header[33],
        packet[18] + 10,
        "to the node that holds the lease"
    );
    if packet[18] == 2
        && packet[12..15] == [10, 244, 1]
        && packet[0] == 0x45
        && checksum(&packet[..20]) == 0
    {
        let peer = Table::attach(&PEERS).expect("the test table is whole");
        let frame = [&header[..], packet].concat();
        assert_eq!(
            forward::from_nic(&frame, &peer),
            FromNic::Deliver {
                strip: 64,
                len: packet.len(),
                tos: None
            },
            "the other end takes what we send"
        );
    }
}
