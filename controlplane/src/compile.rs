//! From leases to the forwarding table: a pure function of what is known, the same bytes for the same input.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hashbrown::HashMap;
use ipnet::IpNet;
use ripstop_fib::{
    Adjacency, AdjacencyId, Backend as FibBackend, BuildError, Ethernet, ImageBuilder, LeaseRecord,
    Local, Node, PATHS_PER_UPLINK, Route,
};

use crate::family::Family;
use crate::interface::Underlay;
use crate::lease::{Lease, LeaseSet};
use crate::mac::Mac;
use crate::netconf::{Backend, Direct, NetConf};
use crate::nexthop::{Path, Ways};
use crate::uplink::{Uplink, nic_records};

/// Compiles the forwarding table. `ways` tells how frames get to a node; without paths it is not resolved.
pub fn compile(
    leases: &LeaseSet,
    conf: &NetConf,
    underlay: &Underlay,
    uplinks: &[Uplink],
    ways: impl Fn(&Lease) -> Ways,
) -> Result<Vec<u64>, BuildError> {
    let node = node(leases, conf, underlay, uplinks);
    let mut image = ImageBuilder::new(node);
    for (_, own) in leases.own.iter() {
        if let Some(own) = own {
            add_route(&mut image, own.subnet, Route::Local);
            image.lease(record(own, &Ways::default(), true));
        }
    }
    let mut direct = HashMap::new();
    for peer in &leases.peers {
        let ways = ways(peer);
        let mut adjacency = |path: &Path| {
            let ethernet = ethernet(uplinks, path);
            // Without a tunnel, a header says nothing about the node: those behind one next hop share it.
            if ways.direct {
                let key = (peer.family(), path.uplink, path.mac);
                return *direct
                    .entry(key)
                    .or_insert_with(|| image.adjacency(direct_header(peer.family(), ethernet)));
            }
            match tunnel_header(&node, peer, ethernet) {
                Some(header) => image.adjacency(header),
                None => image.adjacency(direct_header(peer.family(), ethernet)),
            }
        };
        let paths: Vec<(u8, u16, AdjacencyId)> = ways
            .paths
            .iter()
            .map(|path| (path.uplink, path.weight, adjacency(path)))
            .collect();
        let route = match paths[..] {
            [] => Route::Unresolved,
            [(_, _, only)] => Route::Via(only),
            _ => Route::Paths(image.paths(&shares(&paths))),
        };
        add_route(&mut image, peer.subnet, route);
        match (peer.public_ip, peer.subnet) {
            (IpAddr::V4(outer), IpNet::V4(subnet)) => {
                image.peer4(outer, subnet.network(), subnet.prefix_len());
            }
            (IpAddr::V6(outer), IpNet::V6(subnet)) => {
                image.peer6(outer, subnet.network(), subnet.prefix_len());
            }
            (IpAddr::V4(_), IpNet::V6(_)) | (IpAddr::V6(_), IpNet::V4(_)) => {}
        }
        image.lease(record(peer, &ways, false));
    }
    image.build()
}

fn node(leases: &LeaseSet, conf: &NetConf, underlay: &Underlay, uplinks: &[Uplink]) -> Node {
    let (backend, udp_port, vni) = match conf.backend {
        Backend::Alloc => (FibBackend::Alloc, 0, 0),
        Backend::HostGw => (FibBackend::HostGw, 0, 0),
        Backend::Vxlan(vxlan) => (FibBackend::Vxlan, vxlan.port, vxlan.vni),
        Backend::Ipip { .. } => (FibBackend::Ipip, 0, 0),
        Backend::Udp { port } => (FibBackend::Udp, port, 0),
    };
    let pod_mtu = |family| u16::try_from(conf.pod_mtu(family, underlay.mtu)).unwrap_or(u16::MAX);
    let mac = |own: &Lease| own.vtep_mac.unwrap_or_default().0;
    let v4 = leases.own(Family::V4).and_then(|own| {
        let (IpAddr::V4(address), IpNet::V4(subnet)) = (own.public_ip, own.subnet) else {
            return None;
        };
        let network = conf.network?;
        Some(Local::<Ipv4Addr> {
            address,
            subnet: (subnet.network(), subnet.prefix_len()),
            network: (network.network(), network.prefix_len()),
            pod_mtu: pod_mtu(Family::V4),
            vtep_mac: mac(own),
        })
    });
    let v6 = leases.own(Family::V6).and_then(|own| {
        let (IpAddr::V6(address), IpNet::V6(subnet)) = (own.public_ip, own.subnet) else {
            return None;
        };
        let network = conf.network6?;
        Some(Local::<Ipv6Addr> {
            address,
            subnet: (subnet.network(), subnet.prefix_len()),
            network: (network.network(), network.prefix_len()),
            pod_mtu: pod_mtu(Family::V6),
            vtep_mac: mac(own),
        })
    });
    Node {
        backend,
        v4,
        v6,
        udp_port,
        vni,
        direct: conf.backend.direct() != Direct::None,
        dscp: conf.dscp,
        flow_seed: flow_seed(leases),
        nics: nic_records(uplinks),
    }
}

fn add_route(image: &mut ImageBuilder, subnet: IpNet, route: Route) {
    match subnet {
        IpNet::V4(subnet) => image.route4(subnet.network(), subnet.prefix_len(), route),
        IpNet::V6(subnet) => image.route6(subnet.network(), subnet.prefix_len(), route),
    }
}

fn ethernet(uplinks: &[Uplink], path: &Path) -> Ethernet {
    let uplink = uplinks.get(usize::from(path.uplink));
    Ethernet {
        source: uplink.map(|uplink| uplink.mac).unwrap_or_default().0,
        destination: path.mac.0,
        vlan: uplink.and_then(|uplink| uplink.vlan),
    }
}

fn direct_header(family: Family, ethernet: Ethernet) -> Adjacency {
    match family {
        Family::V4 => Adjacency::direct4(ethernet),
        Family::V6 => Adjacency::direct6(ethernet),
    }
}

/// The tunnel's header towards a node; none where the backend has no tunnel for the family.
fn tunnel_header(node: &Node, peer: &Lease, ethernet: Ethernet) -> Option<Adjacency> {
    let mac = peer.vtep_mac.unwrap_or_default().0;
    match (node.backend, peer.public_ip) {
        (FibBackend::Vxlan, IpAddr::V4(ip)) => Some(Adjacency::vxlan4(node, ethernet, ip, mac)),
        (FibBackend::Vxlan, IpAddr::V6(ip)) => Some(Adjacency::vxlan6(node, ethernet, ip, mac)),
        (FibBackend::Ipip, IpAddr::V4(ip)) => Some(Adjacency::ipip(node, ethernet, ip)),
        (FibBackend::Udp, IpAddr::V4(ip)) => Some(Adjacency::udp(node, ethernet, ip)),
        (FibBackend::Ipip | FibBackend::Udp, IpAddr::V6(_))
        | (FibBackend::Alloc | FibBackend::HostGw, _) => None,
    }
}

/// Repeats each path as often as its weight asks for, within the places that an uplink has.
fn shares(paths: &[(u8, u16, AdjacencyId)]) -> Vec<(u8, AdjacencyId)> {
    let mut entries = Vec::new();
    let mut uplinks: Vec<u8> = paths.iter().map(|path| path.0).collect();
    uplinks.dedup();
    for uplink in uplinks {
        let own = || {
            let own = paths.iter().filter(|path| path.0 == uplink);
            own.take(PATHS_PER_UPLINK)
        };
        let weights = || own().map(|path| usize::from(path.1.max(1)));
        let divisor = weights().fold(0, greatest_common_divisor).max(1);
        let total: usize = weights().map(|weight| weight / divisor).sum();
        let mut spare = PATHS_PER_UPLINK - own().count();
        for (&(_, _, id), weight) in own().zip(weights()) {
            let wanted = weight / divisor;
            // Everyone has one place; the rest are shared out by weight.
            let more = if total <= PATHS_PER_UPLINK {
                wanted - 1
            } else {
                (wanted * PATHS_PER_UPLINK / total)
                    .saturating_sub(1)
                    .min(spare)
            };
            spare = spare.saturating_sub(more);
            entries.extend(core::iter::repeat_n((uplink, id), 1 + more));
        }
    }
    entries
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn record(lease: &Lease, ways: &Ways, local: bool) -> LeaseRecord {
    let next_hop = ways.paths.first().map(|path| path.mac);
    LeaseRecord {
        name: LeaseRecord::pack_name(&lease.node),
        family: lease.family().number(),
        subnet: number(lease.subnet.network()),
        prefix_len: lease.subnet.prefix_len(),
        public_ip: number(lease.public_ip),
        vtep_mac: lease.vtep_mac.unwrap_or_default().0,
        next_hop_mac: next_hop.unwrap_or_default().0,
        resolved: local || next_hop.is_some(),
        local,
        direct: ways.direct,
        paths: u8::try_from(ways.paths.len()).unwrap_or(u8::MAX),
    }
}

/// Spreads flows differently on every node and equally after every restart (splitmix64's finalizer).
fn flow_seed(leases: &LeaseSet) -> u64 {
    let mut seed = 0u64;
    for (_, own) in leases.own.iter() {
        let Some(own) = own else { continue };
        let Mac([a, b, c, d, e, f]) = own.vtep_mac.unwrap_or_default();
        let address = number(own.public_ip);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "both halves of the address take part"
        )]
        let address = (address as u64) ^ ((address >> 64) as u64);
        seed = mixed(seed ^ u64::from_be_bytes([a, b, c, d, e, f, 0, 0]) ^ address);
    }
    seed
}

fn mixed(seed: u64) -> u64 {
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::PerFamily;
    use ripstop_fib::{Encap, Hop, Image, PeerCheck, sync};

    const UPLINK_MAC: Mac = Mac([2, 0xaa, 0, 0, 0, 1]);
    const GATEWAY: Mac = Mac([2, 0xaa, 0, 0, 0, 2]);

    fn lease(n: u8) -> Lease {
        Lease {
            node: format!("n{n}").into(),
            public_ip: Ipv4Addr::new(10, 199, 0, n).into(),
            subnet: format!("10.244.{n}.0/24").parse().unwrap(),
            vtep_mac: Some(Mac([2, 0x52, 0x53, 0, 0, n])),
        }
    }

    fn lease6(n: u8) -> Lease {
        Lease {
            node: format!("n{n}").into(),
            public_ip: format!("fd00:199::{n}").parse().unwrap(),
            subnet: format!("fd00:10:244:{n}::/64").parse().unwrap(),
            vtep_mac: Some(Mac([2, 0x52, 0x53, 0, 6, n])),
        }
    }

    fn leases() -> LeaseSet {
        LeaseSet {
            own: PerFamily {
                v4: Some(lease(1)),
                v6: None,
            },
            peers: vec![lease(2), lease(3)],
        }
    }

    fn conf(backend: &str) -> NetConf {
        let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#);
        NetConf::parse(text.as_bytes()).unwrap()
    }

    fn conf6(backend: &str) -> NetConf {
        let text = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{backend}}}"#
        );
        NetConf::parse(text.as_bytes()).unwrap()
    }

    fn underlay() -> Underlay {
        Underlay {
            index: 2,
            name: "eth0".to_owned(),
            mac: UPLINK_MAC,
            mtu: 1500,
            addresses: PerFamily::default(),
        }
    }

    fn uplink(link: u32, vlan: Option<u16>) -> Uplink {
        Uplink {
            link,
            name: format!("eth{link}"),
            mac: UPLINK_MAC,
            vlan,
            nics: vec![(link, format!("eth{link}"))],
        }
    }

    fn one_way(direct: bool) -> Ways {
        Ways {
            direct,
            paths: vec![Path {
                uplink: 0,
                mac: GATEWAY,
                weight: 1,
            }],
        }
    }

    /// Node 2 is on the link, node 3 is not resolved.
    fn ways(lease: &Lease) -> Ways {
        match &*lease.node {
            "n2" => one_way(false),
            _ => Ways::default(),
        }
    }

    fn built(
        leases: &LeaseSet,
        conf: &NetConf,
        ways: impl Fn(&Lease) -> Ways,
    ) -> Vec<sync::AtomicU64> {
        let words = compile(leases, conf, &underlay(), &[uplink(2, None)], ways).unwrap();
        sync::words(&words)
    }

    /// The header towards node 2 in a set of two nodes.
    fn header(leases: &LeaseSet, conf: &NetConf, uplink: Uplink, direct: bool) -> Vec<u8> {
        let words = compile(leases, conf, &underlay(), &[uplink], |_| one_way(direct)).unwrap();
        let words = sync::words(&words);
        let image = Image::attach(&words).unwrap();
        image.verify().unwrap();
        let hop = match leases.peers[0].subnet {
            IpNet::V4(subnet) => image.lookup4(subnet.network().to_bits() + 9),
            IpNet::V6(subnet) => image.lookup6(&(subnet.network().to_bits() + 9).to_be_bytes()),
        };
        let Hop::Via(encap, id) = hop else {
            panic!("{hop:?}")
        };
        image.header_bytes(encap, id).unwrap()
    }

    fn pair() -> LeaseSet {
        LeaseSet {
            peers: vec![lease(2)],
            ..leases()
        }
    }

    fn pair6() -> LeaseSet {
        LeaseSet {
            own: PerFamily {
                v4: None,
                v6: Some(lease6(1)),
            },
            peers: vec![lease6(2)],
        }
    }

    const ETHERNET: [u8; 12] = [2, 0xaa, 0, 0, 0, 2, 2, 0xaa, 0, 0, 0, 1];

    /// Outer IPv4 header up to the sum; the sum is not complemented, and leaves out what varies per packet.
    fn outer4(tos: u8, flags: u8, ttl: u8, protocol: u8) -> Vec<u8> {
        let mut header = vec![0x45, tos, 0, 0, 0, 0, flags, 0, ttl, protocol, 0, 0];
        header.extend([10, 199, 0, 1, 10, 199, 0, 2]);
        let mut sum: u32 = header
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        sum = (sum & 0xffff) + (sum >> 16);
        header[10..12].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
        header
    }

    #[test]
    fn vxlan_over_ipv4_is_flannels_byte_for_byte() {
        let header = header(
            &pair(),
            &conf(r#"{"Type":"vxlan"}"#),
            uplink(2, None),
            false,
        );
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
    fn vxlan_with_a_tag_and_a_codepoint() {
        let conf = conf(r#"{"Type":"vxlan","VNI":7,"Port":4789,"DSCP":46}"#);
        let header = header(&pair(), &conf, uplink(2, Some(100)), false);
        #[rustfmt::skip]
        let expected = [
            // The tag: 802.1Q, priority 0, 100.
            &ETHERNET[..], &[0x81, 0, 0, 100, 0x08, 0],
            &outer4(0xb8, 0, 64, 17),
            // UDP port 4789; VXLAN with VNI 7.
            &[0, 0, 0x12, 0xb5, 0, 0, 0, 0,  0x08, 0, 0, 0, 0, 0, 7, 0],
            &[2, 0x52, 0x53, 0, 0, 2,  2, 0x52, 0x53, 0, 0, 1,  0x08, 0],
        ].concat();
        assert_eq!(header, expected);
    }

    #[test]
    fn vxlan_over_ipv6() {
        let header = header(
            &pair6(),
            &conf6(r#"{"Type":"vxlan"}"#),
            uplink(2, None),
            false,
        );
        assert_eq!(header[..14], [&ETHERNET[..], &[0x86, 0xdd]].concat());
        // IPv6: version 6, class and label 0, length per packet, UDP, hop limit 64.
        assert_eq!(header[14..22], [0x60, 0, 0, 0, 0, 0, 17, 64]);
        let address = |n| {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&[0xfd, 0, 1, 0x99]);
            bytes[15] = n;
            bytes
        };
        assert_eq!(header[22..38], address(1));
        assert_eq!(header[38..54], address(2));
        // UDP to port 8472; what its checksum field holds is the table's own affair.
        assert_eq!(header[56..58], [0x21, 0x18]);
        #[rustfmt::skip]
        assert_eq!(header[62..], [
            0x08, 0, 0, 0, 0, 0, 1, 0,
            2, 0x52, 0x53, 0, 6, 2,  2, 0x52, 0x53, 0, 6, 1,  0x86, 0xdd,
        ]);
    }

    #[test]
    fn ip_in_ip_and_ip_in_udp() {
        let ipip = header(&pair(), &conf(r#"{"Type":"ipip"}"#), uplink(2, None), false);
        // TTL and DF come from the inner packet.
        assert_eq!(ipip.len(), 34);
        assert_eq!(ipip[..14], [&ETHERNET[..], &[0x08, 0]].concat());
        assert_eq!((ipip[14], ipip[23]), (0x45, 4));
        assert_eq!(ipip[26..34], [10, 199, 0, 1, 10, 199, 0, 2]);
        let udp = header(&pair(), &conf(r#"{"Type":"udp"}"#), uplink(2, None), false);
        #[rustfmt::skip]
        let expected = [
            &ETHERNET[..], &[0x08, 0],
            // DF set, as flannel's socket does.
            &outer4(0, 0x40, 64, 17),
            // Both ports are 8285; length per packet, no checksum.
            &[0x20, 0x5d, 0x20, 0x5d, 0, 0, 0, 0],
        ].concat();
        assert_eq!(udp, expected);
    }

    #[test]
    fn direct_peers_get_an_ethernet_header_alone() {
        let host_gw = r#"{"Type":"host-gw"}"#;
        let header4 = header(&pair(), &conf(host_gw), uplink(2, None), true);
        assert_eq!(header4, [&ETHERNET[..], &[0x08, 0]].concat());
        let header6 = header(&pair6(), &conf6(host_gw), uplink(2, None), true);
        assert_eq!(header6, [&ETHERNET[..], &[0x86, 0xdd]].concat());
        let direct = conf(r#"{"Type":"vxlan","DirectRouting":true}"#);
        let tagged = header(&pair(), &direct, uplink(2, Some(100)), true);
        assert_eq!(
            tagged,
            [&ETHERNET[..], &[0x81, 0, 0, 100, 0x08, 0]].concat()
        );
        // Those behind one next hop share the header.
        let words = built(&leases(), &conf(host_gw), |_| one_way(true));
        assert_eq!(Image::attach(&words).unwrap().adjacencies(), 1);
    }

    #[test]
    fn routes_peers_and_leases_say_the_same() {
        let words = built(&leases(), &conf(r#"{"Type":"vxlan"}"#), ways);
        let image = Image::attach(&words).unwrap();
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap().to_bits();
        assert_eq!(image.lookup4(address("10.244.1.9")), Hop::Local);
        assert!(matches!(
            image.lookup4(address("10.244.2.9")),
            Hop::Via(Encap::Vxlan4, _)
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
            .map(|lease| (lease.node_name().to_owned(), lease.resolved, lease.paths))
            .collect();
        let row = |name: &str, resolved, paths| (name.to_owned(), resolved, paths);
        assert_eq!(
            found,
            [row("n1", true, 0), row("n2", true, 1), row("n3", false, 0)]
        );
        let node = image.node();
        let local = node.v4.unwrap();
        assert_eq!(
            (local.address, local.pod_mtu, local.network.1, node.vni),
            (Ipv4Addr::new(10, 199, 0, 1), 1450, 16, 1)
        );
        assert_eq!((node.nics[0].ifindex, node.nics[1].ifindex), (2, 0));
        assert!(!node.direct && node.v6.is_none());
    }

    #[test]
    fn both_families_stand_side_by_side() {
        let text = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
        let conf = NetConf::parse(text.as_bytes()).unwrap();
        let set = LeaseSet {
            own: PerFamily {
                v4: Some(lease(1)),
                v6: Some(lease6(1)),
            },
            peers: vec![lease(2), lease6(2)],
        };
        let words = built(&set, &conf, |lease| one_way(lease.public_ip.is_ipv6()));
        let image = Image::attach(&words).unwrap();
        let six = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        assert_eq!(image.lookup6(&six("fd00:10:244:1::9")), Hop::Local);
        assert!(matches!(
            image.lookup6(&six("fd00:10:244:2::9")),
            Hop::Via(Encap::Direct, _)
        ));
        assert_eq!(
            image.check_peer6(&six("fd00:199::2"), &six("fd00:10:244:2::7")),
            PeerCheck::Allowed
        );
        assert_ne!(
            image.check_peer6(&six("fd00:199::3"), &six("fd00:10:244:2::7")),
            PeerCheck::Allowed
        );
        let node = image.node();
        assert!(node.direct);
        assert_eq!(
            (node.v4.unwrap().pod_mtu, node.v6.unwrap().pod_mtu),
            (1450, 1430)
        );
        let direct: Vec<_> = image
            .leases()
            .map(|lease| (lease.family, lease.direct))
            .collect();
        assert_eq!(direct, [(4, false), (6, false), (4, false), (6, true)]);
    }

    #[test]
    fn flows_are_spread_over_all_paths_by_their_weights() {
        let paths = |weights: &[(u8, u16)]| -> Vec<Path> {
            (0u8..)
                .zip(weights)
                .map(|(n, &(uplink, weight))| Path {
                    uplink,
                    mac: Mac([2, 0, 0, 0, 0, n]),
                    weight,
                })
                .collect()
        };
        let counts = |weights: &[(u8, u16)]| -> Vec<usize> {
            let list: Vec<_> = (0u32..)
                .zip(paths(weights))
                .map(|(id, path)| (path.uplink, path.weight, AdjacencyId(id)))
                .collect();
            let entries = shares(&list);
            (0u32..)
                .zip(weights)
                .map(|(id, _)| {
                    entries
                        .iter()
                        .filter(|entry| entry.1 == AdjacencyId(id))
                        .count()
                })
                .collect()
        };
        assert_eq!(counts(&[(0, 1), (0, 1)]), [1, 1]);
        assert_eq!(counts(&[(0, 20), (0, 10)]), [2, 1]);
        assert_eq!(counts(&[(0, 3), (1, 1)]), [1, 1]);
        assert_eq!(counts(&[(0, 2), (0, 1), (1, 1)]), [2, 1, 1]);
        let many: Vec<(u8, u16)> = vec![(0, 1); 20];
        assert_eq!(counts(&many).iter().sum::<usize>(), PATHS_PER_UPLINK);
        let skewed = counts(&[(0, 255), (0, 1), (0, 1)]);
        assert!(
            skewed[0] >= 9 && skewed[1] == 1 && skewed.iter().sum::<usize>() <= PATHS_PER_UPLINK,
            "{skewed:?}"
        );
        // And the image takes them.
        let uplinks = [uplink(2, None), uplink(3, None)];
        let all = |_: &Lease| Ways {
            direct: false,
            paths: paths(&[(0, 2), (0, 1), (1, 1)]),
        };
        let words = compile(
            &pair(),
            &conf(r#"{"Type":"vxlan"}"#),
            &underlay(),
            &uplinks,
            all,
        )
        .unwrap();
        let words = sync::words(&words);
        let image = Image::attach(&words).unwrap();
        let Hop::Paths(id) = image.lookup4(0x0af4_0209) else {
            panic!("several paths are a choice")
        };
        let by = |uplink| {
            let hash = |n: u32| n.wrapping_mul(0x9e37_79b9);
            let chosen = (0..100).map(|n| format!("{:?}", image.path(id, uplink, hash(n))));
            chosen.collect::<std::collections::HashSet<_>>().len()
        };
        assert_eq!((by(0), by(1)), (2, 1));
        let lease = image.leases().find(|lease| !lease.local).unwrap();
        assert!(lease.resolved && lease.paths == 3);
    }

    #[test]
    fn alloc_has_leases_and_no_way_anywhere() {
        let words = built(&leases(), &conf(r#"{"Type":"alloc"}"#), |_| Ways::default());
        let image = Image::attach(&words).unwrap();
        assert_eq!(image.adjacencies(), 0);
        assert_eq!(image.leases().len(), 3);
        assert_eq!(image.node().backend, FibBackend::Alloc);
    }

    #[test]
    fn the_same_input_gives_the_same_bytes_and_others_give_others() {
        let (leases, conf, uplinks) = (leases(), conf(r#"{"Type":"vxlan"}"#), [uplink(2, None)]);
        let built = |leases: &LeaseSet, ways: &dyn Fn(&Lease) -> Ways| {
            compile(leases, &conf, &underlay(), &uplinks, ways).unwrap()
        };
        let first = built(&leases, &ways);
        assert_eq!(first, built(&leases, &ways));
        assert_ne!(first, built(&leases, &|_| Ways::default()));
        let mut moved = leases.clone();
        moved.peers[0].vtep_mac = Some(Mac([2, 9, 9, 9, 9, 9]));
        assert_ne!(first, built(&moved, &ways));
    }
}
