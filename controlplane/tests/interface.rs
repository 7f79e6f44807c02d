//! Which interface is taken, as the kernel's routes say. Needs root, for a network namespace.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Namespace;
use ripstop_controlplane::family::PerFamily;
use ripstop_controlplane::interface::{self, Selection};
use ripstop_controlplane::netlink::Netlink;

/// The interface and the IPv4 address by which `target` is reached.
fn reaching(namespace: &Namespace, target: &str) -> Result<(String, String), String> {
    let selection = Selection {
        can_reach: Some(target.parse().unwrap()),
        families: PerFamily {
            v4: true,
            v6: target.contains(':'),
        },
        ..Selection::default()
    };
    namespace.enter(|| {
        let mut netlink = Netlink::open().unwrap();
        let (links, addresses) = (netlink.links().unwrap(), netlink.addresses().unwrap());
        let chosen = interface::look(&mut netlink, &selection, &links, &addresses).unwrap();
        let chosen = chosen.map_err(|error| error.to_string())?;
        Ok((chosen.name, chosen.addresses.v4.unwrap().to_string()))
    })
}

#[test]
fn what_has_to_be_reached_names_the_interface_and_the_address() {
    let (node, _outside) = Namespace::node(1);
    node.ip("link add eth1 type veth peer name far1");
    for command in [
        "addr add 10.77.0.1/24 dev eth1",
        "addr add 10.77.0.2/24 dev eth1",
        "addr add fd00:77::1/64 dev eth1 nodad",
        "link set eth1 up",
        "link set far1 up",
        "route add default via 10.199.0.254",
        "route add 10.88.0.0/16 via 10.77.0.9 src 10.77.0.2",
        "route add blackhole 10.99.0.0/16",
    ] {
        node.ip(command);
    }
    let is = |name: &str, address: &str| Ok((name.to_owned(), address.to_owned()));
    assert_eq!(reaching(&node, "8.8.8.8"), is("eth0", "10.199.0.1"));
    assert_eq!(reaching(&node, "10.77.0.200"), is("eth1", "10.77.0.1"));
    // The route's preferred source goes before the order of the addresses.
    assert_eq!(reaching(&node, "10.88.1.1"), is("eth1", "10.77.0.2"));
    assert_eq!(reaching(&node, "fd00:77::5"), is("eth1", "10.77.0.1"));
    for nowhere in ["10.99.1.1", "fd00:5::1", "10.199.0.1"] {
        let error = reaching(&node, nowhere).unwrap_err();
        assert!(
            error.contains(&format!("--iface-can-reach {nowhere}: the interfaces are ")),
            "{error}"
        );
    }
}
