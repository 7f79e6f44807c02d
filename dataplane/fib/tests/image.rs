//! Images against a dumb oracle: a sorted list of prefixes and a list of peers.

use core::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use ripstop_fib::sync::words;
use ripstop_fib::{
    Adjacency, AdjacencyId, Backend, Dscp, Encap, Ethernet, Hop, Image, ImageBuilder, Local, NICS,
    NicRecord, Node, PeerCheck, Route,
};

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

fn adjacency(number: u32) -> Adjacency {
    let [a, b, c, d] = number.to_be_bytes();
    Adjacency::vxlan4(
        &node(),
        Ethernet {
            source: [2, 0, 0, 0, 0, 1],
            destination: [2, 1, a, b, c, d],
            vlan: None,
        },
        Ipv4Addr::from(0x0ac7_0000 | number),
        [2, 2, a, b, c, d],
    )
}

/// Routes as the oracle keeps them: the longest prefix that covers the address wins, of equal ones the last.
fn oracle(routes: &[(u128, u8, Route)], bits: u32, addr: u128) -> Hop {
    let covers =
        |addr_r: u128, len: u8| len == 0 || (addr ^ addr_r) >> (bits - u32::from(len)) == 0;
    let best = routes
        .iter()
        .filter(|(prefix, len, _)| covers(*prefix, *len))
        .max_by_key(|(_, len, _)| *len);
    match best {
        None => Hop::None,
        Some((_, _, Route::Local)) => Hop::Local,
        Some((_, _, Route::Unresolved)) => Hop::Unresolved,
        Some((_, _, Route::Via(id))) => Hop::Via(Encap::Vxlan4, *id),
        Some((_, _, Route::Paths(id))) => Hop::Paths(*id),
    }
}

fn route(choice: u32) -> Route {
    match choice % 6 {
        0 => Route::Local,
        1 => Route::Unresolved,
        other => Route::Via(AdjacencyId(other - 2)),
    }
}

/// Under Miri everything takes a thousand times as long, and there are no files to keep failures in.
fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 256 })
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    #[cfg_attr(miri, ignore = "an image with tables is too large")]
    fn ipv4_lookup_equals_the_longest_prefix_of_a_list(
        seeds in prop::collection::vec((any::<u32>(), 0u8..=32, any::<u32>()), 0..200),
        probes in prop::collection::vec(any::<u32>(), 200),
        clustered in any::<bool>(),
    ) {
        let mut builder = ImageBuilder::new(node());
        for number in 0..4 { builder.adjacency(adjacency(number)); }
        let mut routes: Vec<(u128, u8, Route)> = Vec::new();
        for (addr, len, choice) in &seeds {
            // Clustered addresses share their upper half, so that chunks really nest.
            let addr = if clustered { 0x0af4_0000 | (addr & 0x3ff) } else { *addr };
            let addr = if *len == 0 { 0 } else { addr >> (32 - u32::from(*len)) << (32 - u32::from(*len)) };
            routes.retain(|(other, other_len, _)| (*other, *other_len) != (u128::from(addr), *len));
            routes.push((u128::from(addr), *len, route(*choice)));
        }
        for (addr, len, route) in &routes {
            builder.route4(Ipv4Addr::from(u32::try_from(*addr).unwrap()), *len, *route);
        }
        let image = words(&builder.build().unwrap());
        let image = Image::attach(&image).unwrap();
        image.verify().unwrap();
        let edges = routes.iter().flat_map(|(addr, len, _)| {
            let first = u32::try_from(*addr).unwrap();
            let last = first | u32::MAX.checked_shr(u32::from(*len)).unwrap_or(0);
            [first, last, first.wrapping_sub(1), last.wrapping_add(1)]
        });
        for addr in edges.chain(probes) {
            prop_assert_eq!(image.lookup4(addr), oracle(&routes, 32, u128::from(addr)), "address {}", Ipv4Addr::from(addr));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "an image with tables is too large")]
    fn ipv6_lookup_equals_the_longest_prefix_of_a_list(
        seeds in prop::collection::vec((any::<u128>(), 0u8..=128, any::<u32>()), 0..60),
        probes in prop::collection::vec(any::<u128>(), 50),
        shared in 0u32..=120,
    ) {
        let mut builder = ImageBuilder::new(node());
        for number in 0..4 { builder.adjacency(adjacency(number)); }
        let network: u128 = 0xfd10_0244_0000_0000_0000_0000_0000_0001;
        let keep = if shared == 0 { 0 } else { u128::MAX << (128 - shared) };
        let mut routes: Vec<(u128, u8, Route)> = Vec::new();
        for (addr, len, choice) in &seeds {
            let len = u8::try_from(u32::from(*len).max(shared)).unwrap();
            let addr = (network & keep) | (addr & !keep);
            let addr = if len == 0 { 0 } else { addr >> (128 - u32::from(len)) << (128 - u32::from(len)) };
            routes.retain(|(other, other_len, _)| (*other, *other_len) != (addr, len));
            routes.push((addr, len, route(*choice)));
        }
        for (addr, len, route) in &routes { builder.route6(Ipv6Addr::from(*addr), *len, *route); }
        let image = words(&builder.build().unwrap());
        let image = Image::attach(&image).unwrap();
        let edges = routes.iter().flat_map(|(addr, len, _)| {
            let last = addr | u128::MAX.checked_shr(u32::from(*len)).unwrap_or(0);
            [*addr, last, addr.wrapping_sub(1), last.wrapping_add(1)]
        });
        for addr in edges.chain(probes) {
            prop_assert_eq!(image.lookup6(&addr.to_be_bytes()), oracle(&routes, 128, addr), "address {:x}", addr);
        }
    }

    #[test]
    fn a_peer_may_speak_for_its_own_leases_only(
        peers in prop::collection::vec((0u32..40, any::<u8>(), 16u8..=32), 0..60),
        outers in prop::collection::vec(0u32..45, 100),
        inners in prop::collection::vec(any::<u32>(), 100),
    ) {
        let prefix = |addr: u8, len: u8| (0x0af4_0000 | (u32::from(addr) << 8)) & (u32::MAX << (32 - u32::from(len)));
        let mut builder = ImageBuilder::new(node());
        for (outer, addr, len) in &peers {
            builder.peer4(Ipv4Addr::from(*outer), Ipv4Addr::from(prefix(*addr, *len)), *len);
        }
        let image = words(&builder.build().unwrap());
        let image = Image::attach(&image).unwrap();
        for (outer, inner) in outers.iter().zip(&inners) {
            let inner = 0x0af4_0000 | (inner & 0xffff);
            let mut expected = PeerCheck::UnknownPeer;
            for (peer, addr, len) in peers.iter().filter(|peer| peer.0 == *outer) {
                let _ = peer;
                if (inner ^ prefix(*addr, *len)) >> (32 - u32::from(*len)) == 0 { expected = PeerCheck::Allowed; break; }
                expected = PeerCheck::ForeignSource;
            }
            prop_assert_eq!(image.check_peer4(*outer, inner), expected);
        }
    }
}
