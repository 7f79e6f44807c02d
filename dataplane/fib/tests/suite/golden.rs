//! Both layouts, word by word. A failure here is a change of layout: it needs another `ABI_VERSION`, and then these
//! numbers.

use crate::example::{image, values};
use ripstop_fib::publish::{SLOT_WORDS, SLOTS, region_words};
use ripstop_fib::stats::{
    Counter, Door, Gauge, KernelCounter, Mode, NicStats, Polling, STATS_WORDS, Stats, Transmit,
    WorkerCounters, WorkerIdentity, XdpCounter,
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
            (1, 1, 0x0000_0040_0000_0002),
            (2, 1, 0x0000_0000_0001_0230),
            (3, 1, 0x6a20_4ab2_b909_dcf8),
            // The node: backend, DSCP 10, both families, direct, port; VNI; flow seed.
            (4, 1, 0x0000_2118_070a_0001),
            (5, 1, 0x0000_0000_0000_0001),
            (6, 1, 0x0000_0000_0000_0007),
            // IPv6: 40 shared bits.
            (7, 1, 0x0000_0000_0000_0028),
            (9, 1, 0xfd10_0244_0000_0000),
            // Sections: start and length.
            (16, 1, 0x0000_8000_0000_0040),
            (17, 1, 0x0000_0100_0000_8040),
            (18, 1, 0x0000_8000_0000_8140),
            (19, 1, 0x0000_0080_0001_0140),
            (20, 1, 0x0000_0008_0001_01c0),
            (21, 1, 0x0000_0020_0001_01c8),
            (22, 1, 0x0000_0018_0001_01e8),
            (23, 1, 0x0000_0008_0001_0200),
            (24, 1, 0x0000_0010_0001_0208),
            (25, 1, 0x0000_0018_0001_0218),
            // IPv4: address and subnet, network, lengths and MTU, VTEP MAC.
            (32, 1, 0x0af4_0100_0ac7_000b),
            (33, 1, 0x0000_0000_0af4_0000),
            (34, 1, 0x0000_0000_05aa_1018),
            (35, 1, 0x0000_0100_0053_5202),
            // IPv6: the same.
            (40, 1, 0x0000_0000_0000_0011),
            (41, 1, 0xfd00_0199_0000_0000),
            (43, 1, 0xfd10_0244_0001_0000),
            (45, 1, 0xfd10_0244_0000_0000),
            (46, 1, 0x0000_0000_0596_2030),
            (47, 1, 0x0000_0106_0053_5202),
            // NICs.
            (48, 1, 0x0000_0000_0000_0002),
            (49, 1, 0x0064_0001_0000_0003),
            // IPv4 root: 10.244.0.0/16 is chunk 0.
            (1466, 1, 0x0000_0000_8000_0000),
            // IPv4 chunk 0: .1 local, .2 adjacency 0, .3 chunk 1, .4 paths 0; chunk 1: its upper half unresolved.
            (32832, 1, 0x0800_0000_0000_0000),
            (32833, 1, 0x8000_0001_1800_0000),
            (32834, 1, 0x0000_0000_4800_0000),
            (33024, 64, 0x1000_0000_1000_0000),
            // IPv6 root: ..01:: local, ..02:: chunk 0 and then long adjacency 0.
            (33216, 128, 0x0800_0000_0800_0000),
            (33344, 1, 0x2800_0000_8000_0000),
            (33345, 7, 0x2800_0000_2800_0000),
            // IPv6 chunk 0: ..0001 unresolved, the rest long adjacency 0.
            (65856, 1, 0x1000_0000_2800_0000),
            (65857, 127, 0x2800_0000_2800_0000),
            // Short template: Ethernet, IPv4 with its sum so far, UDP, VXLAN, inner Ethernet.
            (65984, 1, 0x0002_1200_0000_0002),
            (65985, 1, 0x2845_0008_1100_0000),
            (65986, 1, 0x1140_0000_0000_0000),
            (65987, 1, 0xc70a_0b00_c70a_de9a),
            (65988, 1, 0x0000_1821_0000_0c00),
            (65989, 1, 0x0000_0000_0008_0000),
            (65990, 1, 0x0200_0053_5202_0001),
            (65991, 1, 0x0008_0100_0053_5202),
            // Long templates: length, header. VXLAN over IPv6, then VXLAN over IPv4 with a tag.
            (65992, 1, 0x0000_0000_0000_0054),
            (65997, 1, 0x0000_0002_0000_0000),
            (65998, 1, 0x1100_0000_0002_1200),
            (65999, 1, 0x0000_0000_8062_dd86),
            (66000, 1, 0x0000_9901_00fd_4011),
            (66002, 1, 0x0000_9901_00fd_1100),
            (66004, 1, 0x0000_1821_0000_1200),
            (66005, 1, 0x0000_0000_0008_0565),
            (66006, 1, 0x0206_0053_5202_0001),
            (66007, 1, 0xdd86_0106_0053_5202),
            (66008, 1, 0x0000_0000_0000_0044),
            (66015, 1, 0x0000_0002_0000_0000),
            (66016, 1, 0x1100_0000_0002_1200),
            (66017, 1, 0x2845_0008_6400_0081),
            (66018, 1, 0x1140_0000_0000_0000),
            (66019, 1, 0xc70a_0b00_c70a_de9a),
            (66020, 1, 0x0000_1821_0000_0c00),
            (66021, 1, 0x0000_0000_0008_0000),
            (66022, 1, 0x0200_0053_5202_0001),
            (66023, 1, 0x0008_0100_0053_5202),
            // Paths: uplink 0 has both adjacencies in turn, uplink 1 the tagged one, 2 and 3 none.
            (66024, 6, 0x2000_0001_1800_0000),
            (66030, 6, 0x2000_0001_2000_0001),
            (66036, 12, 0x1000_0000_1000_0000),
            // IPv4 peers: outer address and prefix, mask and presence.
            (66050, 1, 0x0af4_0200_0ac7_000c),
            (66051, 1, 0x0000_0001_ffff_ff00),
            (66052, 1, 0x0af4_0380_0ac7_000d),
            (66053, 1, 0x0000_0001_ffff_ff80),
            // IPv6 peer: outer address, prefix, mask as their octets lie in memory, presence.
            (66056, 1, 0x0000_0000_9901_00fd),
            (66057, 1, 0x1200_0000_0000_0000),
            (66058, 1, 0x0000_0200_4402_10fd),
            (66060, 1, 0x0000_ffff_ffff_ffff),
            (66063, 1, 0x0000_0001_0000_0000),
            // Leases.
            (66072, 1, 0x0000_622d_6564_6f6e),
            (66076, 1, 0x0000_0000_0af4_0200),
            (66078, 1, 0x0000_0000_0ac7_000c),
            (66080, 1, 0x0000_0000_0101_0418),
            (66081, 1, 0x0000_0200_0053_5202),
            (66082, 1, 0x0000_1200_0000_0002),
            (66084, 1, 0x6e2d_6564_6f6e_2d61),
            (66085, 1, 0x676e_6f6c_2d65_6d61),
            (66086, 1, 0x2d6e_6168_742d_7265),
            (66087, 1, 0x002d_7974_7269_6874),
            (66089, 1, 0xfd10_0244_0001_0000),
            (66090, 1, 0x0000_0000_0000_0011),
            (66091, 1, 0xfd00_0000_0000_0000),
            (66092, 1, 0x0000_0000_0006_0630),
            (66093, 1, 0x0000_0100_0053_5202),
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
            (1, 1, 2),
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
        wants_zero_copy: true,
        polling: Polling::Adaptive,
        door: Door::Veth,
        transmit: [Transmit::AfXdp, Transmit::Inject],
        frames: 4096,
        frame_size: 2048,
        huge_pages: true,
        numa_node: Some(3),
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
            (1, 1, 2),
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
            (worker_block + 11, 1, 0x01_0001_0101),
            (worker_block + 12, 1, 2048 << 32 | 4096),
            (worker_block + 13, 1, 4 << 8 | 1),
            (worker_block + 14, 1, 1),
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
        join(Door::ALL.iter().map(|item| item.name()).collect()),
        join(Transmit::ALL.iter().map(|item| item.name()).collect()),
        join(DropReason::ALL.iter().map(|item| item.name()).collect()),
    ];
    let expected = [
        "nic_rx_packets nic_rx_bytes nic_tx_packets nic_tx_bytes host_rx_packets host_rx_bytes \
         host_tx_packets host_tx_bytes turns busy_turns sleeps kicks image_switches busy_cycles idle_cycles \
         host_rx_super_packets host_rx_cut_packets host_tx_super_packets host_tx_joined_packets asleep_cycles",
        "free receiving transmitting held",
        "rx_dropped rx_invalid_descriptors tx_invalid_descriptors rx_ring_full fill_ring_empty \
         tx_ring_empty host_dropped",
        "redirected no_socket fragment ip_options bad_length vxlan_flags other_vni too_long \
         passed_other stalled other_vlan udp_checksum",
        "zero-copy copy generic",
        "busy adaptive",
        "tun veth",
        "af-xdp inject",
        "outer_truncated outer_header outer_fragment outer_checksum outer_length outer_destination \
         vxlan_flags vxlan_vni unknown_peer inner_truncated inner_destination_mac inner_source_mac \
         inner_vlan inner_ether_type inner_header inner_length inner_checksum inner_source \
         inner_destination ecn_not_capable multi_buffer host_write_failed host_without_lease \
         host_header no_route unresolved local_destination too_big no_table table_damaged \
         nic_transmit_full outer_udp_checksum inner_fragment neighbour_discovery icmp_redirect \
         source_not_local unknown_source",
    ];
    for (list, expected) in lists.iter().zip(expected) {
        assert!(list.starts_with(expected), "{list} instead of {expected}");
    }
}
