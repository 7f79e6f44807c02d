//! Cutting and joining of super-packets: what is cut is what etherparse calls a right packet, what is joined comes out
//! of cutting again as it was.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod supers;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use ripstop_dataplane::offload::coalesce::{MEMBERS_MAX, Plan};
use ripstop_dataplane::offload::segment::{self, Task};
use ripstop_dataplane::offload::{OFFLOAD_LEN, Offload};
use supers::{
    Change, FLOW, Flow, changed, cut, data, joined, lengthen, offloaded, packet, segments, shorten,
};

fn flow() -> impl Strategy<Value = Flow> {
    let flags = prop::sample::select(vec![0x10u8, 0x18, 0x11, 0x50, 0x90, 0x98]);
    (
        any::<(bool, bool, bool, u32, u16, bool)>(),
        1u16..6,
        flags,
        0u8..4,
    )
        .prop_map(
            |((v6, udp, options, sequence, identification, dont_fragment), port, flags, tos)| {
                Flow {
                    v6,
                    udp,
                    port,
                    options,
                    sequence,
                    identification,
                    dont_fragment,
                    flags,
                    tos,
                }
            },
        )
}

/// Checks lengths and checksums by another's code, and returns sequence number, flags and data.
fn parsed(packet: &[u8]) -> (u32, u8, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let (v4, v6) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(usize::from(header.total_len), packet.len());
            (Some((header.source, header.destination)), None)
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            assert_eq!(usize::from(header.payload_length) + 40, packet.len());
            (None, Some((header.source, header.destination)))
        }
        NetSlice::Arp(_) => panic!("not IP"),
    };
    let (said, right, seen) = match sliced.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => {
            let v4 = v4.map(|(from, to)| tcp.calc_checksum_ipv4(from, to));
            let right = v4.or_else(|| v6.map(|(from, to)| tcp.calc_checksum_ipv6(from, to)));
            let seen = (
                tcp.sequence_number(),
                tcp.slice()[13],
                tcp.payload().to_vec(),
            );
            (tcp.checksum(), right.unwrap().unwrap(), seen)
        }
        TransportSlice::Udp(udp) => {
            assert_eq!(usize::from(udp.length()), udp.slice().len());
            let (header, payload) = (udp.to_header(), udp.payload());
            let v4 = v4.map(|(from, to)| header.calc_checksum_ipv4_raw(from, to, payload));
            let right = v4
                .or_else(|| v6.map(|(from, to)| header.calc_checksum_ipv6_raw(from, to, payload)));
            (
                udp.checksum(),
                right.unwrap().unwrap(),
                (0, 0, payload.to_vec()),
            )
        }
        TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_) => {
            panic!("neither TCP nor UDP")
        }
    };
    assert_eq!(said, right);
    seen
}

proptest! {
    #[test]
    fn the_kernels_header_is_read_as_it_is_written(bytes in any::<[u8; OFFLOAD_LEN]>()) {
        if let Some(offload) = Offload::read(&bytes) {
            let again = Offload::read(&offload.bytes());
            prop_assert_eq!(again, Some(offload));
        }
    }

    #[test]
    fn what_is_cut_is_whole_and_joins_to_what_it_was(
        flow in flow(), len in 1usize..40_000, size in 200u16..9000, seed in any::<u8>(),
    ) {
        let data = data(len, seed);
        let whole = packet(&flow, &data);
        let segments = segments(&flow, &data, size);
        prop_assert_eq!(segments.len(), len.div_ceil(usize::from(size)));
        let mut sequence = flow.sequence;
        let mut together = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            let (at, flags, part) = parsed(segment);
            let (first, last) = (index == 0, index + 1 == segments.len());
            let mut expected = flow.flags;
            if !first { expected &= !0x80; }
            if !last { expected &= !0x09; }
            if !flow.udp {
                prop_assert_eq!((at, flags), (sequence, expected));
            }
            sequence = sequence.wrapping_add(u32::try_from(part.len()).unwrap());
            together.extend(part);
        }
        prop_assert_eq!(&together, &data);
        // The way back: as few super-packets as there may be, and each comes out as it was.
        let groups = joined(&segments);
        // A packet that says that the window was reduced stays alone.
        let alone = usize::from(!flow.udp && flow.flags & 0x80 != 0);
        prop_assert_eq!(groups.len(), alone + (segments.len() - alone).div_ceil(MEMBERS_MAX));
        let mut again = Vec::new();
        for (members, bytes, said) in &groups {
            match members.len() {
                1 => again.push(bytes.clone()),
                _ => again.extend(cut(bytes, said)),
            }
        }
        prop_assert_eq!(&again, &segments);
        // A single one has all that the first one had, once its checksum is complete.
        if let [(_, bytes, said)] = &groups[..] {
            let mut completed = bytes.clone();
            if said.needs_checksum {
                let start = usize::from(said.checksum_start);
                let at = start + usize::from(said.checksum_offset);
                segment::complete_checksum(&mut completed, start, at);
            }
            prop_assert_eq!(parsed(&completed), parsed(&whole));
        }
    }

    /// Bursts of anything: several flows, packets changed, repeated and turned round. Joined or not, each packet comes
    /// out as it was, once, and in its flow's order.
    #[test]
    fn nothing_is_lost_changed_or_overtaken(
        flows in prop::collection::vec((flow(), 1usize..9000, 200u16..1500), 1..5),
        order in prop::collection::vec((any::<prop::sample::Index>(), any::<(u16, u8)>(), 0u8..12), 1..64),
    ) {
        let mut queues: Vec<Vec<Vec<u8>>> = flows
            .iter()
            .map(|(flow, len, size)| {
                let mut segments = segments(flow, &data(*len, 1), *size);
                segments.reverse();
                segments
            })
            .collect();
        let mut burst: Vec<Vec<u8>> = Vec::new();
        for (which, (place, bits), mischief) in order {
            let queue = which.get(&queues).clone();
            let at = queues.iter().position(|other| *other == queue).unwrap();
            let Some(mut packet) = queues[at].pop() else { continue };
            match mischief {
                0 => {
                    let place = usize::from(place) % packet.len();
                    packet[place] ^= bits;
                }
                1 => burst.push(packet.clone()),
                2 => drop(queues[at].pop()),
                3 => packet.truncate(usize::from(place) % packet.len()),
                _ => {}
            }
            burst.push(packet);
        }
        let groups = joined(&burst);
        let mut seen = vec![false; burst.len()];
        let mut out: Vec<usize> = Vec::new();
        for (members, bytes, said) in &groups {
            for &member in members {
                prop_assert!(!core::mem::replace(&mut seen[member], true));
            }
            out.extend(members);
            if members.len() == 1 {
                prop_assert_eq!(bytes, &burst[members[0]]);
                continue;
            }
            let again = cut(bytes, said);
            prop_assert_eq!(again.len(), members.len());
            for (&member, mut packet) in members.iter().zip(again) {
                // With "don't fragment", a repeated identification is joined as well and comes out counted.
                if packet[0] == 0x45 && packet[6] & 0x40 != 0 {
                    packet[4..6].copy_from_slice(&burst[member][4..6]);
                    packet[10..12].copy_from_slice(&burst[member][10..12]);
                }
                prop_assert_eq!(&packet, &burst[member]);
            }
        }
        prop_assert!(seen.iter().all(|seen| *seen));
        // Addresses, protocol and ports, where the packet is whole and has no options.
        let key = |index: usize| {
            let packet = &burst[index];
            match packet.first()? {
                0x45 if packet.get(6)? & 0x3f == 0 && packet.get(7)? == &0 =>
                    Some((*packet.get(9)?, packet.get(12..24)?)),
                0x60..=0x6f => Some((*packet.get(6)?, packet.get(8..44)?)),
                _ => None,
            }
        };
        for (at, &one) in out.iter().enumerate() {
            for &other in &out[at + 1..] {
                let same = key(one).is_some() && key(one) == key(other);
                prop_assert!(one < other || !same, "{one} before {other}");
            }
        }
    }
}

/// Which packets of a burst go together.
fn groups_of(burst: &[Vec<u8>]) -> Vec<Vec<usize>> {
    joined(burst)
        .into_iter()
        .map(|(members, ..)| members)
        .collect()
}

/// Each rule by itself: the third of four packets is changed, and ends what is open or does not.
#[test]
fn what_keeps_packets_apart() {
    const TOGETHER: &[&[usize]] = &[&[0, 1, 2, 3]];
    const OUT: &[&[usize]] = &[&[0, 1], &[2], &[3]];
    /// It begins another, which goes on.
    const BEGINS: &[&[usize]] = &[&[0, 1], &[2, 3]];
    const ENDS: &[&[usize]] = &[&[0, 1, 2], &[3]];
    let tcp6 = Flow { v6: true, ..FLOW };
    let udp = Flow { udp: true, ..FLOW };
    let udp6 = Flow {
        udp: true,
        ..tcp6.clone()
    };
    let counted = Flow {
        dont_fragment: false,
        ..FLOW
    };
    let rows: &[(&str, &Flow, Change, &[&[usize]])] = &[
        ("nothing", &FLOW, |_| {}, TOGETHER),
        ("nothing, IPv6", &tcp6, |_| {}, TOGETHER),
        ("nothing, UDP", &udp, |_| {}, TOGETHER),
        ("nothing, UDP over IPv6", &udp6, |_| {}, TOGETHER),
        ("type of service", &FLOW, |p| p[1] ^= 4, OUT),
        ("type of service, UDP", &udp, |p| p[1] ^= 4, OUT),
        ("congestion mark", &FLOW, |p| p[1] ^= 3, OUT),
        ("congestion mark, IPv6", &tcp6, |p| p[1] ^= 0x30, OUT),
        (
            "congestion mark, UDP over IPv6",
            &udp6,
            |p| p[1] ^= 0x30,
            OUT,
        ),
        ("flow label", &tcp6, |p| p[3] ^= 1, OUT),
        ("time to live", &FLOW, |p| p[8] -= 1, OUT),
        ("hop limit", &udp6, |p| p[7] -= 1, OUT),
        ("identification", &FLOW, |p| p[5] ^= 0x40, OUT),
        ("identification, UDP", &udp, |p| p[5] ^= 0x40, OUT),
        (
            "identification that stays",
            &counted,
            |p| p[5] = p[5].wrapping_sub(1),
            OUT,
        ),
        ("don't fragment", &FLOW, |p| p[6] ^= 0x40, OUT),
        ("reserved flag", &FLOW, |p| p[6] ^= 0x80, OUT),
        ("more fragments", &FLOW, |p| p[6] ^= 0x20, OUT),
        ("fragment offset", &udp, |p| p[7] ^= 1, OUT),
        ("IP checksum", &FLOW, |p| p[10] ^= 1, TOGETHER), // Made right again.
        ("extension header", &tcp6, |p| p[6] = 60, OUT),
        ("sequence number", &FLOW, |p| p[27] ^= 1, OUT),
        ("acknowledgment", &FLOW, |p| p[31] ^= 1, OUT),
        ("reserved bits", &tcp6, |p| p[52] ^= 2, OUT),
        ("window", &FLOW, |p| p[35] ^= 1, OUT),
        ("urgent pointer", &FLOW, |p| p[39] ^= 1, OUT),
        ("options", &tcp6, |p| p[71] ^= 1, OUT),
        ("SYN", &FLOW, |p| p[33] ^= 2, OUT),
        ("RST", &FLOW, |p| p[33] ^= 4, OUT),
        ("URG", &FLOW, |p| p[33] ^= 0x20, OUT),
        ("CWR", &FLOW, |p| p[33] ^= 0x80, OUT),
        ("ECE", &FLOW, |p| p[33] ^= 0x40, OUT),
        ("PSH", &FLOW, |p| p[33] ^= 8, ENDS),
        ("FIN", &tcp6, |p| p[53] ^= 1, ENDS),
        ("shorter", &FLOW, |p| shorten(p, 1), ENDS),
        ("shorter, UDP", &udp, |p| shorten(p, 1), ENDS),
        ("no data", &FLOW, |p| shorten(p, 1000), OUT),
        ("no data, UDP", &udp, |p| shorten(p, 1000), OUT),
        ("longer", &udp6, |p| lengthen(p), BEGINS),
        ("UDP length", &udp, |p| p[25] ^= 1, OUT),
    ];
    for (name, flow, change, expected) in rows {
        let mut burst = segments(flow, &data(4000, 3), 1000);
        burst[2] = changed(burst[2].clone(), *change);
        assert_eq!(groups_of(&burst), *expected, "{name}");
    }
    // Of another flow, which it does not concern.
    let rows: &[(&str, &Flow, Change)] = &[
        ("source", &FLOW, |p| p[15] ^= 1),
        ("destination, IPv6", &tcp6, |p| p[39] ^= 1),
        ("source port", &FLOW, |p| p[21] ^= 1),
        ("destination port, UDP", &udp, |p| p[23] ^= 1),
        ("protocol", &FLOW, |p| p[9] = 132),
    ];
    for (name, flow, change) in rows {
        let mut burst = segments(flow, &data(4000, 3), 1000);
        burst.insert(2, changed(burst[2].clone(), *change));
        assert_eq!(groups_of(&burst), [vec![0, 1, 3, 4], vec![2]], "{name}");
    }
    let rows: &[(&str, &Flow, Change, &[&[usize]])] = &[
        ("checksum", &FLOW, |p| p[36] ^= 1, OUT),
        ("checksum, IPv6", &tcp6, |p| p[1050] ^= 1, OUT),
        ("checksum, UDP", &udp, |p| p[500] ^= 1, OUT),
        ("no checksum", &udp, |p| p[26..28].fill(0), OUT),
        ("no checksum, IPv6", &udp6, |p| p[46..48].fill(0), OUT),
        ("IP checksum", &FLOW, |p| p[10] ^= 1, OUT),
        ("total length", &FLOW, |p| p.push(0), OUT),
        ("cut off", &udp6, |p| p.truncate(900), OUT),
    ];
    for (name, flow, change, expected) in rows {
        let mut burst = segments(flow, &data(4000, 3), 1000);
        change(&mut burst[2]);
        assert_eq!(groups_of(&burst), *expected, "{name}");
        // The same in the first place, where nothing is open.
        burst.swap(0, 2);
        let bad = burst[0].clone();
        let first = joined(&burst).remove(0);
        assert_eq!(first, (vec![0], bad, Offload::default()), "{name}");
    }
    let mut burst = segments(&FLOW, &data(4000, 3), 1000);
    for packet in &mut burst[2..] {
        *packet = changed(packet.clone(), |p| p[35] ^= 1);
    }
    assert_eq!(groups_of(&burst), BEGINS);
}

/// With "don't fragment" an identification may stay the same, or count; but not the one and then the other.
#[test]
fn identifications_stay_or_count() {
    let with = |identifications: [u8; 4], dont_fragment| {
        let flow = Flow {
            identification: 0,
            dont_fragment,
            ..FLOW
        };
        let mut burst = segments(&flow, &data(4000, 3), 1000);
        for (packet, identification) in burst.iter_mut().zip(identifications) {
            let mut one = packet.clone();
            one[5] = identification;
            *packet = changed(one, |_| {});
        }
        groups_of(&burst)
    };
    assert_eq!(with([7, 8, 9, 10], true), [[0, 1, 2, 3]]);
    assert_eq!(with([7, 8, 9, 10], false), [[0, 1, 2, 3]]);
    assert_eq!(with([7, 7, 7, 7], true), [[0, 1, 2, 3]]);
    assert_eq!(with([7, 7, 7, 7], false), [[0], [1], [2], [3]]);
    assert_eq!(with([7, 7, 9, 10], true), [[0, 1], [2, 3]]);
    assert_eq!(with([7, 8, 7, 7], true), [[0, 1], [2, 3]]);
    assert_eq!(with([7, 6, 5, 4], true), [[0], [1], [2], [3]]);
}

/// What a connection is told by the other side does not end what it says itself; nor does another connection's.
#[test]
fn acknowledgments_of_others_part_nothing() {
    let back = Flow { port: 6000, ..FLOW };
    let acknowledgment = packet(&back, &[]);
    let mut burst = segments(&FLOW, &data(4000, 3), 1000);
    burst.insert(2, acknowledgment);
    assert_eq!(groups_of(&burst), [vec![0, 1, 3, 4], vec![2]]);
    // Its own would be overtaken.
    burst[2] = packet(&FLOW, &[]);
    assert_eq!(groups_of(&burst), [vec![0, 1], vec![2], vec![3, 4]]);
}

/// A kernel without UDP segmentation gets none.
#[test]
fn datagrams_stay_apart_where_the_kernel_does_not_take_them() {
    let burst = segments(&Flow { udp: true, ..FLOW }, &data(4000, 3), 1000);
    let mut plan = Plan::with_capacity(burst.len(), false);
    plan.make(burst.len(), |index| &burst[index]);
    assert_eq!(plan.groups().len(), 4);
}

/// However many flows there are, each keeps its order.
#[test]
fn many_flows_share_a_burst() {
    let flows = (0..40).map(|port| Flow {
        port: 1000 + port,
        ..FLOW
    });
    let mut burst = Vec::new();
    let cuts: Vec<_> = flows
        .map(|flow| segments(&flow, &data(3000, 3), 1000))
        .collect();
    for turn in 0..3 {
        burst.extend(cuts.iter().map(|segments| segments[turn].clone()));
    }
    let groups = groups_of(&burst);
    let together: Vec<usize> = groups
        .iter()
        .filter(|group| group.len() == 3)
        .map(|group| group[0])
        .collect();
    assert_eq!(together, (0..16).collect::<Vec<_>>());
    assert_eq!(groups.len(), 16 + 3 * 24);
}

proptest! {
    /// Whatever a header says, of whatever packet: it is cut inside its bounds, or not at all.
    #[test]
    fn nonsense_is_refused(
        flow in flow(), len in 0usize..5000, header in any::<[u8; OFFLOAD_LEN]>(), kind in 0u8..8,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        head in 0usize..200, keep in any::<[bool; 4]>(),
    ) {
        let mut whole = packet(&flow, &data(len, 9));
        let good = offloaded(&flow, 1000, &mut whole);
        for (place, byte) in changes {
            let at = place.index(whole.len().min(80));
            whole[at] = byte;
        }
        let mut header = header;
        header[1] = kind;
        if let Some(mut offload) = Offload::read(&header) {
            // Some of it is right, so that the rest is looked at.
            if keep[0] { offload.needs_checksum = true; offload.joined = good.joined; }
            if keep[1] { offload.size = good.size; }
            if keep[2] { offload.checksum_start = good.checksum_start; }
            if keep[3] { offload.checksum_offset = good.checksum_offset; }
            let seen = whole.len().min(head.max(if keep[0] { 100 } else { 0 }));
            match segment::task(&whole[..seen], whole.len(), &offload) {
                None | Some(Task::Whole) => {}
                Some(Task::Checksum { start, at }) => segment::complete_checksum(&mut whole, start, at),
                Some(Task::Cut(cut)) => {
                    let mut out = vec![0; cut.longest()];
                    for index in 0..cut.count() {
                        prop_assert!(cut.write(&whole, index, &mut out).is_some());
                    }
                    prop_assert_eq!(cut.write(&whole, cut.count(), &mut out), None);
                }
            }
        }
    }
}
