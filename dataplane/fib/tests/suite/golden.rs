//! Both layouts, word by word. A failure here is a change of layout: it needs another `ABI_VERSION`, and then these
//! numbers.

use crate::example::{image, values};
use ripstop_fib::publish::{SLOT_WORDS, SLOTS, region_words};
use ripstop_fib::stats::{
    Counter, Gauge, KernelCounter, Mode, NicStats, Polling, STATS_WORDS, Stats, WorkerCounters,
    WorkerIdentity, XdpCounter,
};
use ripstop_fib::sync::words;
use ripstop_fib::{ABI_VERSION, DropReason, Publisher, Reader, Region, Word};

/// A run of equal words: the first one's index, how many, their value. All others are zero.
type Run = (usize, usize, u64);

fn runs(values: &[u64]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, value) in values.iter().enumerate().filter(|(_, value)| **value != 0) {
        match runs.last_mut() {
            Some((first, count, same)) if *first + *count == index && same == value => *count += 1,
            _ => runs.push((index, 1, *value)),
        }
    }
    runs
}

#[track_caller]
fn assert_runs(what: &str, found: &[Run], expected: &[Run]) {
    let text = |runs: &[Run]| -> Vec<String> {
        let line = |(first, count, value): &Run| format!("({first}, {count}, {value:#018x}),");
        runs.iter().map(line).collect()
    };
    let (found, expected) = (text(found), text(expected));
    assert_eq!(
        found,
        expected,
        "{what} of layout version {ABI_VERSION}, found:\n{}",
        found.join("\n")
    );
}

#[test]
#[cfg_attr(miri, ignore = "an image with tables is too large")]
fn an_image() {
    assert_runs(
        "image",
        &runs(&image()),
        &[
            // Magic, version and header length, length, checksum.
            (0, 1, 0x3147_4d49_5350_4952),
            (1, 1, 0x0000_0020_0000_0001),
            (2, 1, 0x0000_0000_0001_01c8),
            (3, 1, 0xd313_4600_5c6a_760d),
            // The node.
            (4, 1, 0x05aa_2118_0ac7_000b),
            (5, 1, 0x0000_0100_0053_5202),
            (6, 1, 0x0000_0002_0000_0001),
            (7, 1, 0x0000_0018_0af4_0100),
            (8, 1, 0x0000_0000_0000_0007),
            // IPv6: 40 shared bits.
            (9, 1, 0x0000_0000_0000_0028),
            (11, 1, 0xfd10_0244_0000_0000),
            // Sections: start and length.
            (16, 1, 0x0000_8000_0000_0020),
            (17, 1, 0x0000_0100_0000_8020),
            (18, 1, 0x0000_8000_0000_8120),
            (19, 1, 0x0000_0080_0001_0120),
            (20, 1, 0x0000_0008_0001_01a0),
            (21, 1, 0x0000_0008_0001_01a8),
            (22, 1, 0x0000_0018_0001_01b0),
            // IPv4 root: 10.244.0.0/16 is chunk 0.
            (1434, 1, 0x0000_0000_8000_0000),
            // IPv4 chunk 0: .1 local, .2 adjacency 0, .3 chunk 1; chunk 1: its upper half unresolved.
            (32800, 1, 0x0800_0000_0000_0000),
            (32801, 1, 0x8000_0001_1800_0000),
            (32992, 64, 0x1000_0000_1000_0000),
            // IPv6 root: ..01:: local, ..02:: chunk 0 and then adjacency 0.
            (33184, 128, 0x0800_0000_0800_0000),
            (33312, 1, 0x1800_0000_8000_0000),
            (33313, 7, 0x1800_0000_1800_0000),
            // IPv6 chunk 0: ..0001 unresolved, the rest adjacency 0.
            (65824, 1, 0x1000_0000_1800_0000),
            (65825, 127, 0x1800_0000_1800_0000),
            // Template: Ethernet, IPv4 with its checksum so far, UDP, VXLAN, inner Ethernet.
            (65952, 1, 0x0002_1200_0000_0002),
            (65953, 1, 0x0045_0008_1100_0000),
            (65954, 1, 0x1140_0000_0000_0000),
            (65955, 1, 0xc70a_0b00_c70a_b69a),
            (65956, 1, 0x0000_1821_0000_0c00),
            (65957, 1, 0x0000_0000_0008_0000),
            (65958, 1, 0x0200_0053_5202_0001),
            (65959, 1, 0x0008_0100_0053_5202),
            // Peers: outer address and prefix, mask and presence.
            (65962, 1, 0x0af4_0200_0ac7_000c),
            (65963, 1, 0x0000_0001_ffff_ff00),
            (65964, 1, 0x0af4_0380_0ac7_000d),
            (65965, 1, 0x0000_0001_ffff_ff80),
            // Leases.
            (65968, 1, 0x0000_622d_6564_6f6e),
            (65972, 1, 0x0000_0000_0af4_0200),
            (65974, 1, 0x0000_0000_0ac7_000c),
            (65976, 1, 0x0000_0000_0001_0418),
            (65977, 1, 0x0000_0200_0053_5202),
            (65978, 1, 0x0000_1200_0000_0002),
            (65980, 1, 0x6e2d_6564_6f6e_2d61),
            (65981, 1, 0x676e_6f6c_2d65_6d61),
            (65982, 1, 0x2d6e_6168_742d_7265),
            (65983, 1, 0x002d_7974_7269_6874),
            (65985, 1, 0xfd10_0244_0001_0000),
            (65986, 1, 0x0000_0000_0000_0011),
            (65987, 1, 0xfd00_0000_0000_0000),
            (65988, 1, 0x0000_0000_0002_0630),
            (65989, 1, 0x0000_0100_0053_5202),
        ],
    );
}

#[test]
fn a_fib_region() {
    assert_eq!((SLOTS, SLOT_WORDS), (8, 4 << 20));
    assert_eq!(region_words(SLOTS, SLOT_WORDS), 512 + (32 << 20));
    let shared = words(&vec![0; region_words(3, 4)]);
    let mut publisher = Publisher::adopt(Region::format(&shared, 3, 4));
    let pin = Word::new(0);
    let region = Region::attach(&shared).unwrap();
    publisher.publish(&[0x11, 0x12, 0x13], Vec::new).unwrap();
    let mut reader = Reader::new(region, &pin);
    reader.follow(region.current());
    publisher.publish(&[0x21], || vec![&pin]).unwrap();
    publisher
        .publish(&[0x31, 0x32, 0x33, 0x34], || vec![&pin])
        .unwrap();
    assert_runs(
        "fib region",
        &runs(&values(&shared)),
        &[
            (0, 1, 0x3142_4946_5350_4952),
            (1, 1, 1),
            (2, 1, 524),
            (3, 1, 3),
            (4, 1, 4),
            // Generation 3, slot 2.
            (8, 1, 0x0302),
            // Generation and length of each slot.
            (16, 1, 1),
            (17, 1, 3),
            (24, 1, 2),
            (25, 1, 1),
            (32, 1, 3),
            (33, 1, 4),
            (512, 1, 0x11),
            (513, 1, 0x12),
            (514, 1, 0x13),
            (516, 1, 0x21),
            (520, 1, 0x31),
            (521, 1, 0x32),
            (522, 1, 0x33),
            (523, 1, 0x34),
        ],
    );
    assert_eq!(values(&[pin]), [0x0100]);
}

#[test]
fn a_stats_region() {
    assert_eq!(STATS_WORDS, 17024);
    let shared = words(&vec![0; STATS_WORDS]);
    let stats = Stats::format(&shared, 4711, 99);
    let store = |word: &Word, value| word.store(value, ripstop_fib::sync::Ordering::Relaxed);
    let (accepted, checking) = stats.watcher_pins();
    store(accepted, 0xa1);
    store(checking, 0xa2);
    store(stats.accepted(), 0xa3);
    store(stats.worker_pin(1), 0xa4);
    let identity = WorkerIdentity {
        nic: "enp1s0f0np0".to_owned(),
        queue: 3,
        cpu: 5,
        mode: Mode::Copy,
        polling: Polling::Adaptive,
        frames: 4096,
        frame_size: 2048,
    };
    stats.write_identity(1, &identity);
    let mut counters = WorkerCounters::default();
    counters.counters.fill(0xc0);
    counters.drops.fill(0xd0);
    stats.write_worker(1, &counters, &[0xe0; Gauge::COUNT], 0xa5, 0xa6);
    stats.write_kernel(1, &[0xf0; KernelCounter::COUNT]);
    let nic = NicStats {
        nic: "eth0".to_owned(),
        queues: 2,
        native: true,
        counters: [0xb0; XdpCounter::COUNT],
    };
    stats.write_nic(1, &nic);
    stats.announce(2, 2);
    let (nic_block, worker_block) = (64 + 32, 640 + 256);
    assert_runs(
        "stats region",
        &runs(&values(&shared)),
        &[
            (0, 1, 0x3141_5453_5350_4952),
            (1, 1, 1),
            (2, 1, 17024),
            (3, 1, 64),
            (4, 1, 4711),
            (5, 1, 99),
            (6, 2, 2),
            (8, 1, 0xa1),
            (16, 1, 0xa2),
            (24, 1, 0xa3),
            (nic_block, 1, u64::from_le_bytes(*b"eth0\0\0\0\0")),
            (nic_block + 2, 1, 1 << 32 | 2),
            (nic_block + 8, XdpCounter::COUNT, 0xb0),
            (worker_block, 1, 0xa4),
            (worker_block + 8, 1, u64::from_le_bytes(*b"enp1s0f0")),
            (worker_block + 9, 1, u64::from_le_bytes(*b"np0\0\0\0\0\0")),
            (worker_block + 10, 1, 5 << 32 | 3),
            (worker_block + 11, 1, 0x0101),
            (worker_block + 12, 1, 2048 << 32 | 4096),
            (worker_block + 16, 1, 0xa6),
            (worker_block + 17, 1, 0xa5),
            (worker_block + 32, Counter::COUNT, 0xc0),
            (worker_block + 96, DropReason::COUNT, 0xd0),
            (worker_block + 192, Gauge::COUNT, 0xe0),
            (worker_block + 208, KernelCounter::COUNT, 0xf0),
        ],
    );
    let read = Stats::attach(&shared).unwrap();
    assert_eq!((read.pid(), read.started_ns()), (4711, 99));
    assert_eq!(read.nics()[1], nic);
    let worker = &read.workers()[1];
    assert_eq!((&worker.identity, &worker.counters), (&identity, &counters));
    assert_eq!((worker.heartbeat_ns, worker.generation), (0xa6, 0xa5));
    assert_eq!((worker.gauges[0], worker.kernel[0]), (0xe0, 0xf0));
}

/// The place of a counter is its place in its list, so a list only grows at its end.
#[test]
fn the_catalogues() {
    let join = |names: Vec<&'static str>| names.join(" ");
    let lists = [
        join(Counter::ALL.iter().map(|item| item.name()).collect()),
        join(Gauge::ALL.iter().map(|item| item.name()).collect()),
        join(KernelCounter::ALL.iter().map(|item| item.name()).collect()),
        join(XdpCounter::ALL.iter().map(|item| item.name()).collect()),
        join(Mode::ALL.iter().map(|item| item.name()).collect()),
        join(Polling::ALL.iter().map(|item| item.name()).collect()),
        join(DropReason::ALL.iter().map(|item| item.name()).collect()),
    ];
    let expected = [
        "nic_rx_packets nic_rx_bytes nic_tx_packets nic_tx_bytes host_rx_packets host_rx_bytes \
         host_tx_packets host_tx_bytes turns busy_turns sleeps kicks image_switches",
        "free receiving transmitting held",
        "rx_dropped rx_invalid_descriptors tx_invalid_descriptors rx_ring_full fill_ring_empty \
         tx_ring_empty",
        "redirected no_socket fragment ip_options bad_length vxlan_flags other_vni too_long \
         passed_other stalled other_vlan udp_checksum",
        "zero-copy copy generic",
        "busy adaptive",
        "outer_truncated outer_header outer_fragment outer_checksum outer_length outer_destination \
         vxlan_flags vxlan_vni unknown_peer inner_truncated inner_destination_mac inner_source_mac \
         inner_vlan inner_ether_type inner_header inner_length inner_checksum inner_source \
         inner_destination ecn_not_capable multi_buffer host_write_failed host_not_ipv4 \
         host_header no_route unresolved local_destination too_big no_table table_damaged \
         nic_transmit_full",
    ];
    for (list, expected) in lists.iter().zip(expected) {
        assert!(list.starts_with(expected), "{list} instead of {expected}");
    }
}
