//! The example that the tests share: a node with two peers, one of them reachable.

use core::net::Ipv4Addr;

use ripstop_fib::sync::Ordering;
use ripstop_fib::{
    Adjacency, FAMILY_IPV4, FAMILY_IPV6, ImageBuilder, LeaseRecord, Node, Route, Word,
};

pub(crate) fn node() -> Node {
    Node {
        local: Ipv4Addr::new(10, 199, 0, 11),
        udp_port: 8472,
        vni: 1,
        vtep_mac: [2, 0x52, 0x53, 0, 0, 1],
        subnet: (Ipv4Addr::new(10, 244, 1, 0), 24),
        pod_mtu: 1450,
        underlay_ifindex: 2,
        flow_seed: 7,
    }
}

pub(crate) fn adjacency() -> Adjacency {
    Adjacency::vxlan4(
        &node(),
        [2, 0, 0, 0, 0, 0x11],
        [2, 0, 0, 0, 0, 0x12],
        Ipv4Addr::new(10, 199, 0, 12),
        [2, 0x52, 0x53, 0, 0, 2],
    )
}

/// An IPv4-mapped number as lease records keep it.
fn wide(addr: Ipv4Addr) -> u128 {
    u128::from(u32::from(addr))
}

/// Every section of this image has something in it (except under Miri).
pub(crate) fn builder() -> ImageBuilder {
    let mut builder = ImageBuilder::new(node());
    let via = Route::Via(builder.adjacency(adjacency()));
    // Tables of 66,000 words would take Miri minutes.
    if !cfg!(miri) {
        builder.route4(Ipv4Addr::new(10, 244, 1, 0), 24, Route::Local);
        builder.route4(Ipv4Addr::new(10, 244, 2, 0), 24, via);
        builder.route4(Ipv4Addr::new(10, 244, 3, 128), 25, Route::Unresolved);
        builder.route6(0xfd10_0244_0001 << 80, 48, Route::Local);
        builder.route6(0xfd10_0244_0002 << 80, 52, via);
        builder.route6(0xfd10_0244_0002_0001 << 64, 64, Route::Unresolved);
    }
    builder.peer4(
        Ipv4Addr::new(10, 199, 0, 12),
        Ipv4Addr::new(10, 244, 2, 0),
        24,
    );
    builder.peer4(
        Ipv4Addr::new(10, 199, 0, 13),
        Ipv4Addr::new(10, 244, 3, 128),
        25,
    );
    builder.lease(LeaseRecord {
        name: LeaseRecord::pack_name("node-b"),
        family: FAMILY_IPV4,
        subnet: wide(Ipv4Addr::new(10, 244, 2, 0)),
        prefix_len: 24,
        public_ip: wide(Ipv4Addr::new(10, 199, 0, 12)),
        vtep_mac: [2, 0x52, 0x53, 0, 0, 2],
        next_hop_mac: [2, 0, 0, 0, 0, 0x12],
        resolved: true,
        local: false,
    });
    builder.lease(LeaseRecord {
        name: LeaseRecord::pack_name("a-node-name-longer-than-thirty-one-bytes"),
        family: FAMILY_IPV6,
        subnet: 0xfd10_0244_0001 << 80,
        prefix_len: 48,
        public_ip: 0xfd00 << 112 | 0x11,
        vtep_mac: [2, 0x52, 0x53, 0, 0, 1],
        next_hop_mac: [0; 6],
        resolved: false,
        local: true,
    });
    builder
}

pub(crate) fn image() -> Vec<u64> {
    builder().build().unwrap()
}

pub(crate) fn values(words: &[Word]) -> Vec<u64> {
    let load = |word: &Word| word.load(Ordering::Relaxed);
    words.iter().map(load).collect()
}
