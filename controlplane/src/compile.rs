//! From leases to the forwarding table: a pure function of what is known, the same bytes for the same input.

use core::net::Ipv4Addr;

use ripstop_fib::{
    Adjacency, Backend, BuildError, Dscp, Ethernet, FAMILY_IPV4, ImageBuilder, LeaseRecord, Local,
    NICS, NicRecord, Node, Route,
};

use crate::interface::Underlay;
use crate::lease::{Lease, LeaseSet};
use crate::mac::Mac;
use crate::netconf::NetConf;
use crate::standby;

/// Compiles the forwarding table. `next_hop` tells the Ethernet address towards a node, if it is known.
pub fn compile(
    leases: &LeaseSet,
    conf: &NetConf,
    underlay: &Underlay,
    next_hop: impl Fn(Ipv4Addr) -> Option<Mac>,
) -> Result<Vec<u64>, BuildError> {
    let own = &leases.own;
    let mut nics = [NicRecord::default(); NICS];
    nics[0] = NicRecord {
        ifindex: underlay.index,
        uplink: 0,
        vlan: 0,
    };
    let node = Node {
        backend: Backend::Vxlan,
        v4: Some(Local {
            address: own.public_ip,
            subnet: (own.subnet.network(), own.subnet.prefix_len()),
            network: (conf.network.network(), conf.network.prefix_len()),
            pod_mtu: u16::try_from(standby::pod_mtu(conf, underlay)).unwrap_or(u16::MAX),
            vtep_mac: own.vtep_mac.0,
        }),
        v6: None,
        udp_port: conf.vxlan.port,
        vni: conf.vxlan.vni,
        direct: false,
        dscp: Dscp::Fixed(0),
        flow_seed: flow_seed(own),
        nics,
    };
    let mut image = ImageBuilder::new(node);
    image.route4(own.subnet.network(), own.subnet.prefix_len(), Route::Local);
    image.lease(record(own, None, true));
    for peer in &leases.peers {
        let next_hop = next_hop(peer.public_ip);
        let route = match next_hop {
            Some(mac) => Route::Via(image.adjacency(Adjacency::vxlan4(
                &node,
                Ethernet {
                    source: underlay.mac.0,
                    destination: mac.0,
                    vlan: None,
                },
                peer.public_ip,
                peer.vtep_mac.0,
            ))),
            None => Route::Unresolved,
        };
        image.route4(peer.subnet.network(), peer.subnet.prefix_len(), route);
        image.peer4(
            peer.public_ip,
            peer.subnet.network(),
            peer.subnet.prefix_len(),
        );
        image.lease(record(peer, next_hop, false));
    }
    image.build()
}

fn record(lease: &Lease, next_hop: Option<Mac>, local: bool) -> LeaseRecord {
    LeaseRecord {
        name: LeaseRecord::pack_name(&lease.node),
        family: FAMILY_IPV4,
        subnet: u128::from(lease.subnet.network().to_bits()),
        prefix_len: lease.subnet.prefix_len(),
        public_ip: u128::from(lease.public_ip.to_bits()),
        vtep_mac: lease.vtep_mac.0,
        next_hop_mac: next_hop.unwrap_or_default().0,
        resolved: local || next_hop.is_some(),
        local,
        direct: false,
        paths: u8::from(next_hop.is_some()),
    }
}

/// Spreads flows differently on every node and equally after every restart (splitmix64's finalizer).
fn flow_seed(own: &Lease) -> u64 {
    let [a, b, c, d, e, f] = own.vtep_mac.0;
    let mut seed =
        u64::from_be_bytes([a, b, c, d, e, f, 0, 0]) ^ u64::from(own.public_ip.to_bits());
    seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ripstop_fib::{AdjacencyId, Hop, Image, PeerCheck, sync};

    fn lease(n: u8) -> Lease {
        Lease {
            node: format!("n{n}"),
            public_ip: Ipv4Addr::new(10, 199, 0, n),
            subnet: format!("10.244.{n}.0/24").parse().unwrap(),
            vtep_mac: Mac([2, 0x52, 0x53, 0, 0, n]),
        }
    }

    fn input() -> (LeaseSet, NetConf, Underlay) {
        let leases = LeaseSet {
            own: lease(1),
            peers: vec![lease(2), lease(3)],
        };
        let conf =
            NetConf::parse(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        let underlay = Underlay {
            index: 2,
            name: "eth0".to_owned(),
            mac: Mac([2, 0xaa, 0, 0, 0, 1]),
            mtu: 1500,
            address: Ipv4Addr::new(10, 199, 0, 1),
        };
        (leases, conf, underlay)
    }

    /// Node 2 is on the link, node 3 is not resolved.
    fn next_hop(ip: Ipv4Addr) -> Option<Mac> {
        (ip == Ipv4Addr::new(10, 199, 0, 2)).then_some(Mac([2, 0xaa, 0, 0, 0, 2]))
    }

    #[test]
    fn the_header_is_flannels_byte_for_byte() {
        let (leases, conf, underlay) = input();
        let words = sync::words(&compile(&leases, &conf, &underlay, next_hop).unwrap());
        let image = Image::attach(&words).unwrap();
        image.verify().unwrap();
        assert_eq!(image.adjacencies(), 1);
        let header: Vec<u8> = image
            .template(AdjacencyId(0))
            .unwrap()
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        #[rustfmt::skip]
        let expected = [
            // Outer Ethernet: next hop, underlay, IPv4.
            0x02, 0xaa, 0, 0, 0, 2,  0x02, 0xaa, 0, 0, 0, 1,  0x08, 0x00,
            // Outer IPv4: version and length, TOS, length, id, flags (DF clear), TTL 64, UDP.
            0x45, 0x00,  0x00, 0x00,  0x00, 0x00,  0x00, 0x00,  64, 17,
            // The sum of the header, not complemented: 4500 + 4011 + 0ac7 + 0001 + 0ac7 + 0002.
            0x9a, 0xa2,
            10, 199, 0, 1,  10, 199, 0, 2,
            // UDP: source port and length per packet, port 8472, no checksum.
            0, 0,  0x21, 0x18,  0, 0,  0, 0,
            // VXLAN: VNI given, VNI 1.
            0x08, 0, 0, 0,  0, 0, 1, 0,
            // Inner Ethernet: VTEP to VTEP, IPv4.
            0x02, 0x52, 0x53, 0, 0, 2,  0x02, 0x52, 0x53, 0, 0, 1,  0x08, 0x00,
        ];
        assert_eq!(header, expected);
    }

    #[test]
    fn routes_peers_and_leases_say_the_same() {
        let (leases, conf, underlay) = input();
        let words = sync::words(&compile(&leases, &conf, &underlay, next_hop).unwrap());
        let image = Image::attach(&words).unwrap();
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap().to_bits();
        assert_eq!(image.lookup4(address("10.244.1.9")), Hop::Local);
        assert!(matches!(
            image.lookup4(address("10.244.2.9")),
            Hop::Via { .. }
        ));
        assert_eq!(image.lookup4(address("10.244.3.9")), Hop::Unresolved);
        assert_eq!(image.lookup4(address("10.244.4.9")), Hop::None);
        let check = |outer, inner| image.check_peer4(address(outer), address(inner));
        assert_eq!(check("10.199.0.2", "10.244.2.7"), PeerCheck::Allowed);
        assert_eq!(check("10.199.0.3", "10.244.3.7"), PeerCheck::Allowed);
        assert_ne!(check("10.199.0.2", "10.244.3.7"), PeerCheck::Allowed);
        assert_ne!(check("10.199.0.1", "10.244.1.7"), PeerCheck::Allowed);
        let found: Vec<_> = image
            .leases()
            .map(|lease| (lease.node_name().to_owned(), lease.resolved))
            .collect();
        assert_eq!(
            found,
            [
                ("n1".to_owned(), true),
                ("n2".to_owned(), true),
                ("n3".to_owned(), false)
            ]
        );
        let node = image.node();
        assert_eq!(
            (
                node.v4.map(|local| (local.address, local.pod_mtu)),
                node.vni
            ),
            (Some((leases.own.public_ip, 1450)), 1)
        );
    }

    #[test]
    fn the_same_input_gives_the_same_bytes_and_others_give_others() {
        let (leases, conf, underlay) = input();
        let first = compile(&leases, &conf, &underlay, next_hop).unwrap();
        assert_eq!(first, compile(&leases, &conf, &underlay, next_hop).unwrap());
        assert_ne!(first, compile(&leases, &conf, &underlay, |_| None).unwrap());
        let mut moved = leases;
        moved.peers[0].vtep_mac = Mac([2, 9, 9, 9, 9, 9]);
        assert_ne!(first, compile(&moved, &conf, &underlay, next_hop).unwrap());
    }
}
