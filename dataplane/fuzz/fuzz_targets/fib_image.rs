//! Any words as an image, a fib region or a stats region: refused, or every question gets an answer. Never a panic.
//!
//! The first byte chooses what the rest is: the words themselves, or changes to a good image or region, which get past
//! the checks that noise never passes. A change is ten bytes: the word's index and what is added to its value.
#![no_main]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use ripstop_fib::publish::region_words;
use ripstop_fib::stats::{STATS_WORDS, Stats};
use ripstop_fib::sync::words;
use ripstop_fib::{
    Adjacency, AdjacencyId, Backend, Dscp, Encap, Ethernet, FAMILY_IPV4, Image, ImageBuilder,
    LeaseRecord, Local, NICS, NicRecord, Node, PathsId, Publisher, Reader, Region, Route, Word,
};

const SLOTS: usize = 2;
const SLOT_WORDS: usize = 256;
const HEADER_WORDS: usize = 64;

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    match choice % 5 {
        0 => ask_image(&words(&read(rest))),
        1 => changed_image(small_image(), rest),
        2 => changed_image(large_image(), rest),
        3 => ask_region(&words(&changed(&region(), rest, HEADER_WORDS))),
        _ => ask_stats(&words(&changed(&stats(), rest, HEADER_WORDS))),
    }
});

fn read(bytes: &[u8]) -> Vec<u64> {
    let word = |part: &[u8]| {
        part.iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    bytes.chunks(8).map(word).collect()
}

/// A good image or region with changes. Indices are taken from the whole, or with their top bit from the first words.
fn changed(good: &[u64], changes: &[u8], first: usize) -> Vec<u64> {
    let mut values = good.to_vec();
    for change in changes.chunks_exact(10) {
        let (place, value) = change.split_at(2);
        let place = usize::from(u16::from_le_bytes([place[0], place[1]]));
        let index = if place >> 15 == 0 {
            place * 3 % values.len()
        } else {
            place % first
        };
        values[index] = values[index].wrapping_add(read(value)[0]);
    }
    values
}

fn changed_image(good: &[u64], changes: &[u8]) {
    let values = changed(good, changes, HEADER_WORDS);
    let image = words(&values);
    if let Ok(image) = Image::attach(&image) {
        assert_eq!(
            image.verify().is_ok(),
            values == good,
            "the checksum notices a change"
        );
    }
    ask_image(&image);
}

fn ask_image(words: &[Word]) {
    let Ok(image) = Image::attach(words) else {
        return;
    };
    let _ = image.verify();
    let node = image.node();
    for lease in image.leases() {
        let _ = (lease.node_name().len(), lease.subnet);
    }
    let adjacencies = image.adjacencies() as u32;
    for id in (0..=adjacencies).chain([AdjacencyId::MAX.0, u32::MAX]) {
        for encap in [Encap::Vxlan4, Encap::Vxlan6, Encap::Ipip] {
            let _ = image.header_bytes(encap, AdjacencyId(id));
        }
        for uplink in [0, 3, 4, u8::MAX] {
            let _ = image.path(PathsId(id), uplink, node.vni);
        }
    }
    let mut seed = image.checksum() ^ node.flow_seed;
    for step in 0..256u32 {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let random = (seed >> 32) as u32;
        for addr in [
            random,
            0x0af4_0000 | random & 0xffff,
            step << 24 | step,
            node.v4.map_or(0, |local| local.address.into()),
        ] {
            image.lookup4(addr);
            image.check_peer4(addr, random);
            image.check_peer4(0x0ac7_000c, addr);
        }
        let wide = u128::from(seed) << (step % 65);
        let peer: u128 = 0xfd00_0199 << 96 | 0x12;
        let octets = u128::to_be_bytes;
        image.check_peer6(&octets(wide), &octets(wide));
        image.check_peer6(&octets(peer), &octets(wide));
        image.lookup6(&octets(wide));
        image.lookup6(&octets(0xfd10_0244_0002 << 80 | wide));
    }
}

fn ask_region(words: &[Word]) {
    let Ok(region) = Region::attach(words) else {
        return;
    };
    if let Some((_, copy)) = region.snapshot() {
        ask_image(&copy);
    }
    let pin = Word::new(0);
    let mut reader = Reader::new(region, &pin);
    reader.follow(region.current());
    ask_image(reader.words());
    let mut publisher = Publisher::adopt(region);
    let _ = publisher.current_words().map(<[Word]>::len);
    for _ in 0..3 {
        let _ = publisher.publish(small_image(), || vec![&pin]);
        reader.follow(region.current());
    }
}

fn ask_stats(words: &[Word]) {
    let Ok(stats) = Stats::attach(words) else {
        return;
    };
    for worker in stats.workers() {
        let _ = (worker.identity.nic.len(), worker.counters.drops_total());
    }
    let _ = stats.nics().len();
    let _ = (
        stats.pid(),
        stats.started_ns(),
        stats.accepted_generation(),
        stats.pins().len(),
    );
}

fn node() -> Node {
    let mut nics = [NicRecord::default(); NICS];
    nics[0] = NicRecord {
        ifindex: 2,
        uplink: 0,
        vlan: 0,
    };
    nics[1] = NicRecord {
        ifindex: 3,
        uplink: 1,
        vlan: 100,
    };
    Node {
        backend: Backend::Vxlan,
        v4: Some(Local {
            address: Ipv4Addr::new(10, 199, 0, 11),
            subnet: (Ipv4Addr::new(10, 244, 1, 0), 24),
            network: (Ipv4Addr::new(10, 244, 0, 0), 16),
            pod_mtu: 1450,
            vtep_mac: [2, 0x52, 0x53, 0, 0, 1],
        }),
        v6: Some(Local {
            address: Ipv6Addr::from(0xfd00_0199 << 96 | 0x11),
            subnet: (Ipv6Addr::from(0xfd10_0244_0001 << 80), 48),
            network: (Ipv6Addr::from(0xfd10_0244 << 96), 32),
            pod_mtu: 1430,
            vtep_mac: [2, 0x52, 0x53, 0, 6, 1],
        }),
        udp_port: 8472,
        vni: 1,
        direct: true,
        dscp: Dscp::Fixed(10),
        flow_seed: 7,
        nics,
    }
}

/// An image without routes, so that the few words there are get their share of changes.
fn small_image() -> &'static [u64] {
    static IMAGE: OnceLock<Vec<u64>> = OnceLock::new();
    IMAGE.get_or_init(|| small_builder().build().expect("a good image"))
}

fn small_builder() -> ImageBuilder {
    let (peer, subnet) = (Ipv4Addr::new(10, 199, 0, 12), Ipv4Addr::new(10, 244, 2, 0));
    let mut builder = ImageBuilder::new(node());
    let ethernet = Ethernet {
        source: [2; 6],
        destination: [4; 6],
        vlan: None,
    };
    let peer6 = Ipv6Addr::from(0xfd00_0199 << 96 | 0x12);
    let first = builder.adjacency(Adjacency::vxlan4(&node(), ethernet, peer, [6; 6]));
    let second = builder.adjacency(Adjacency::vxlan6(&node(), ethernet, peer6, [6; 6]));
    builder.paths(&[(0, first), (1, second)]);
    builder.peer4(peer, subnet, 24);
    builder.peer6(peer6, Ipv6Addr::from(0xfd10_0244_0002 << 80), 48);
    builder.peer4(peer, Ipv4Addr::new(10, 244, 3, 0), 25);
    builder.lease(LeaseRecord {
        name: LeaseRecord::pack_name("node-b"),
        family: FAMILY_IPV4,
        subnet: u32::from(subnet).into(),
        prefix_len: 24,
        public_ip: u32::from(peer).into(),
        vtep_mac: [6; 6],
        next_hop_mac: [4; 6],
        resolved: true,
        local: false,
        direct: false,
        paths: 1,
    });
    builder
}

fn large_image() -> &'static [u64] {
    static IMAGE: OnceLock<Vec<u64>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let mut builder = small_builder();
        let via = Route::Via(AdjacencyId(0));
        builder.route4(Ipv4Addr::new(10, 244, 2, 0), 24, via);
        builder.route4(Ipv4Addr::new(10, 244, 3, 0), 25, Route::Unresolved);
        builder.route6(
            Ipv6Addr::from(0xfd10_0244_0002 << 80),
            52,
            Route::Via(AdjacencyId(1)),
        );
        builder.route4(Ipv4Addr::new(10, 244, 5, 0), 24, Route::Paths(PathsId(0)));
        builder.route6(
            Ipv6Addr::from(0xfd10_0244_0002_0001 << 64),
            64,
            Route::Local,
        );
        builder.build().expect("a good image")
    })
}

/// A region with two images in it.
fn region() -> Vec<u64> {
    let shared = words(&vec![0; region_words(SLOTS, SLOT_WORDS)]);
    let mut publisher = Publisher::adopt(Region::format(&shared, SLOTS, SLOT_WORDS));
    for _ in 0..2 {
        publisher
            .publish(small_image(), Vec::new)
            .expect("nothing is pinned");
    }
    values(&shared)
}

fn stats() -> Vec<u64> {
    let shared = words(&vec![0; STATS_WORDS]);
    Stats::format(&shared, 1, 1).announce(2, 1);
    values(&shared)
}

fn values(words: &[Word]) -> Vec<u64> {
    words
        .iter()
        .map(|word| word.load(ripstop_fib::sync::Ordering::Relaxed))
        .collect()
}
