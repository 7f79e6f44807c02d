//! The guard: no pod sends in the name of a node.
//!
//! Where there is no tunnel, a node's own packets reach other nodes' pods with the node's underlay address as their
//! source, and the kernel forwards whatever carries such an address, also what a pod has made. Workers refuse that, but
//! see only what leads through `rip0`. So the kernel is told: a packet that comes in by an interface of our pods, has
//! the address of any node of the cluster as its source, and to which an answer would leave by another interface, is
//! dropped and counted.
//!
//! Only interfaces that own an address in this node's leases are watched (a bridge such as `cni0`, or the host's ends
//! of pods' links). So whatever comes by the underlay, by any of several ways or not the way that answers go, by a
//! tunnel, by `rip0` or by `lo` is none of its business; neither is what the node itself sends, which never passes the
//! hook. It is a table of our own, kept by the keeper of the peer filter (`rules.rs`). The sets have no intervals, so
//! a change of their elements is seen at once, and only what differs is changed.

use core::fmt::Write as _;
use core::net::IpAddr;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::detour;
use crate::family::Family;
use crate::lease::LeaseSet;
use crate::netconf::NetConf;
use crate::netlink::message::{Address, Link};
use crate::rules::{Count, FilterCounter};
use crate::standby;

/// Name of our table.
pub const TABLE: &str = "ripstop-guard";
/// The same with its family, which has both.
pub(crate) const PLACE: &str = "inet ripstop-guard";

/// Its counter.
pub const COUNTER: FilterCounter = FilterCounter {
    name: "guard_node_source",
    explanation: "A packet came from a pod with the address of a node as its source: a pod that pretends to be that node.",
};

/// What the guard has to know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guard {
    /// Underlay addresses of all nodes, our own included.
    pub nodes: Arc<BTreeSet<IpAddr>>,
    /// Interfaces that pods' packets come in by.
    pub interfaces: BTreeSet<String>,
}

/// The addresses of all nodes.
pub fn nodes(leases: &LeaseSet) -> Arc<BTreeSet<IpAddr>> {
    let own = leases.own.iter().filter_map(|(_, own)| own.as_ref());
    let addresses = own.chain(&leases.peers).map(|lease| lease.public_ip);
    Arc::new(addresses.collect())
}

/// The interfaces that own an address in this node's leases and are none of Ripstop's.
pub fn interfaces(
    leases: &LeaseSet,
    conf: &NetConf,
    links: &[Link],
    addresses: &[Address],
) -> BTreeSet<String> {
    let tunnel = |family| standby::device_name(conf.backend, family);
    let ours: Vec<String> = Family::ALL
        .into_iter()
        .filter_map(tunnel)
        .chain([detour::DEVICE.to_owned()])
        .collect();
    let is_pods = |address: &&Address| {
        let own = leases.own(Family::of_net(address.net));
        own.is_some_and(|own| own.subnet.contains(&address.net.addr()))
    };
    let link = |address: &Address| links.iter().find(|link| link.index == address.link);
    addresses
        .iter()
        .filter(is_pods)
        .filter_map(link)
        .filter(|link| !link.loopback && !ours.contains(&link.name))
        .map(|link| link.name.clone())
        .collect()
}

/// The sets: name, type and elements.
type Set = (&'static str, &'static str, Vec<String>);

/// Elements of the three sets.
fn sets<'a>(
    nodes: impl IntoIterator<Item = &'a IpAddr>,
    interfaces: impl IntoIterator<Item = &'a String>,
) -> [Set; 3] {
    let (four, six): (Vec<&IpAddr>, Vec<&IpAddr>) =
        nodes.into_iter().partition(|address| address.is_ipv4());
    let texts = |addresses: Vec<&IpAddr>| addresses.iter().map(ToString::to_string).collect();
    let names = interfaces.into_iter().map(|name| format!("\"{name}\""));
    [
        ("nodes", "ipv4_addr", texts(four)),
        ("nodes6", "ipv6_addr", texts(six)),
        ("pods", "ifname", names.collect()),
    ]
}

impl Guard {
    /// The transaction that puts the whole table in the place of any other; the counter starts at `count`.
    pub fn replace(&self, count: Option<&Count>) -> String {
        // "add" so that "delete" finds something.
        let mut text = format!("add table {PLACE}\ndelete table {PLACE}\ntable {PLACE} {{\n");
        let (packets, bytes) = count.map_or((0, 0), |count| (count.packets, count.bytes));
        let counter = COUNTER.name;
        let _ = writeln!(
            text,
            "counter {counter} {{ packets {packets} bytes {bytes}; }}"
        );
        for (name, kind, elements) in sets(&*self.nodes, &self.interfaces) {
            let _ = writeln!(text, "set {name} {{ type {kind};");
            if !elements.is_empty() {
                let _ = writeln!(text, "elements = {{ {} }}", elements.join(", "));
            }
            let _ = writeln!(text, "}}");
        }
        let refuse = format!("fib saddr . iif oif missing counter name {counter} drop");
        let _ = writeln!(
            text,
            "chain from_pod {{\nip saddr @nodes {refuse}\nip6 saddr @nodes6 {refuse}\n}}\n\
             chain guard {{\ntype filter hook prerouting priority -300; policy accept;\niifname @pods jump from_pod\n}}\n}}"
        );
        text
    }

    /// The transaction that leads from `before` to this; empty if nothing differs.
    pub fn update(&self, before: &Self) -> String {
        let mut text = String::new();
        let differing = |this: &Self, other: &Self| {
            sets(
                this.nodes.difference(&other.nodes),
                this.interfaces.difference(&other.interfaces),
            )
        };
        for (verb, sets) in [
            ("delete", differing(before, self)),
            ("add", differing(self, before)),
        ] {
            for (name, _, elements) in sets {
                if !elements.is_empty() {
                    let elements = elements.join(", ");
                    let _ = writeln!(text, "{verb} element {PLACE} {name} {{ {elements} }}");
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(nodes: &[&str], interfaces: &[&str]) -> Guard {
        Guard {
            nodes: Arc::new(nodes.iter().map(|node| node.parse().unwrap()).collect()),
            interfaces: interfaces.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let before = guard(&["10.199.0.1", "10.199.0.2", "fd00:199::1"], &["cni0"]);
        let after = guard(&["10.199.0.1", "10.199.0.3", "fd00:199::1"], &[]);
        assert_eq!(after.update(&after), "");
        assert_eq!(
            after.update(&before),
            "delete element inet ripstop-guard nodes { 10.199.0.2 }\n\
             delete element inet ripstop-guard pods { \"cni0\" }\n\
             add element inet ripstop-guard nodes { 10.199.0.3 }\n"
        );
    }

    #[test]
    fn the_whole_text_holds_every_check() {
        let count = Count {
            name: COUNTER.name.to_owned(),
            packets: 3,
            bytes: 300,
        };
        let text =
            guard(&["10.199.0.1", "10.199.0.2", "fd00:199::1"], &["cni0"]).replace(Some(&count));
        for part in [
            "delete table inet ripstop-guard",
            "counter guard_node_source { packets 3 bytes 300; }",
            "elements = { 10.199.0.1, 10.199.0.2 }",
            "elements = { fd00:199::1 }",
            "elements = { \"cni0\" }",
            "iifname @pods jump from_pod",
            "ip6 saddr @nodes6 fib saddr . iif oif missing counter name guard_node_source drop",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert!(!guard(&[], &[]).replace(None).contains("elements"));
    }

    #[test]
    fn pods_interfaces_have_an_address_of_a_lease() {
        let lease = |ip: &str, subnet: &str| crate::lease::Lease {
            node: "n1".into(),
            public_ip: ip.parse().unwrap(),
            subnet: subnet.parse().unwrap(),
            vtep_mac: None,
        };
        let leases = LeaseSet {
            own: crate::family::PerFamily {
                v4: Some(lease("10.199.0.1", "10.244.1.0/24")),
                v6: Some(lease("fd00:199::1", "fd00:10:244:1::/64")),
            },
            peers: vec![lease("10.199.0.2", "10.244.2.0/24")],
        };
        let link = |index, name: &str, loopback| Link {
            index,
            name: name.to_owned(),
            loopback,
            ..Link::default()
        };
        let links = [
            link(1, "lo", true),
            link(2, "eth0", false),
            link(3, "cni0", false),
            link(4, "flannel.1", false),
            link(5, "rip0", false),
            link(6, "veth1", false),
            link(7, "other", false),
        ];
        let address = |link, net: &str| Address {
            link,
            net: net.parse().unwrap(),
            global: true,
            permanent: true,
            secondary: false,
            deprecated: false,
        };
        let addresses = [
            address(1, "10.244.1.9/32"),
            address(2, "10.199.0.1/24"),
            address(3, "10.244.1.1/24"),
            address(4, "10.244.1.0/32"),
            address(5, "10.244.1.0/32"),
            address(6, "fd00:10:244:1::1/128"),
            address(7, "10.244.2.1/24"),
        ];
        let conf = NetConf::parse(
            br#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#,
        )
        .unwrap();
        let found = interfaces(&leases, &conf, &links, &addresses);
        assert_eq!(found, ["cni0".to_owned(), "veth1".to_owned()].into());
        assert_eq!(nodes(&leases).len(), 3);
    }
}
