//! The example that the tests share: a node with two peers, one of them reachable.

use core::net::{Ipv4Addr, Ipv6Addr};

use ripstop_fib::sync::Ordering;
use ripstop_fib::{
    Adjacency, Backend, Dscp, Ethernet, FAMILY_IPV4, FAMILY_IPV6, ImageBuilder, LeaseRecord, Local,
    NICS, NicRecord, Node, Route, Word,
};

pub(crate) fn node() -> Node {
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

pub(crate) fn adjacency() -> Adjacency {
    Adjacency::vxlan4(
        &node(),
        ethernet(None),
        Ipv4Addr::new(10, 199, 0, 12),
        [2, 0x52, 0x53, 0, 0, 2],
    )
}

pub(crate) fn ethernet(vlan: Option<u16>) -> Ethernet {
    Ethernet {
        source: [2, 0, 0, 0, 0, 0x11],
        destination: [2, 0, 0, 0, 0, 0x12],
        vlan,
    }
}

pub(crate) fn adjacency6() -> Adjacency {
    Adjacency::vxlan6(
        &node(),
        ethernet(None),
        Ipv6Addr::from(0xfd00_0199 << 96 | 0x12),
        [2, 0x52, 0x53, 0, 6, 2],
    )
}

/// An IPv4-mapped number as lease records keep it.
fn wide(addr: Ipv4Addr) -> u128 {
    u128::from(u32::from(addr))
}

fn wide6(addr: u128) -> Ipv6Addr {
    Ipv6Addr::from(addr)
}

/// Every section of this image has something in it (except under Miri).
pub(crate) fn builder() -> ImageBuilder {
    let mut builder = ImageBuilder::new(node());
    let (via4, via6) = (
        builder.adjacency(adjacency()),
        builder.adjacency(adjacency6()),
    );
    let other = builder.adjacency(Adjacency::vxlan4(
        &node(),
        ethernet(Some(100)),
        Ipv4Addr::new(10, 199, 0, 12),
        [2, 0x52, 0x53, 0, 0, 2],
    ));
    let paths = builder.paths(&[(0, via4), (1, other), (0, other)]);
    // Tables of 66,000 words would take Miri minutes.
    if !cfg!(miri) {
        builder.route4(Ipv4Addr::new(10, 244, 1, 0), 24, Route::Local);
        builder.route4(Ipv4Addr::new(10, 244, 2, 0), 24, Route::Via(via4));
        builder.route4(Ipv4Addr::new(10, 244, 4, 0), 24, Route::Paths(paths));
        builder.route4(Ipv4Addr::new(10, 244, 3, 128), 25, Route::Unresolved);
        builder.route6(wide6(0xfd10_0244_0001 << 80), 48, Route::Local);
        builder.route6(wide6(0xfd10_0244_0002 << 80), 52, Route::Via(via6));
        builder.route6(wide6(0xfd10_0244_0002_0001 << 64), 64, Route::Unresolved);
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
    builder.peer6(
        wide6(0xfd00_0199 << 96 | 0x12),
        wide6(0xfd10_0244_0002 << 80),
        48,
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
        direct: false,
        paths: 1,
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
        direct: true,
        paths: 0,
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
