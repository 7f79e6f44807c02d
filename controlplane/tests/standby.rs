//! The standby path on a real kernel, in namespaces of the test's own. Needs root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::fmt::Write as _;
use core::net::Ipv4Addr;
use core::time::Duration;
use std::process::Command;
use std::time::Instant;

use common::{Namespace, lease, leases, netconf, underlay};
use ripstop_controlplane::lease::LeaseSet;
use ripstop_controlplane::mac::Mac;
use ripstop_controlplane::netlink::Netlink;
use ripstop_controlplane::standby::{self, Actual, Desired, DeviceOp, Outcome};

fn reconcile(namespace: &Namespace, leases: &LeaseSet) -> Outcome {
    let desired = Desired::new(leases, &netconf(), &underlay(namespace, 1));
    namespace.enter(|| {
        let (_, outcome) =
            standby::reconcile(&mut Netlink::open().unwrap(), &desired, Duration::MAX).unwrap();
        standby::reconcile_sysctls(&desired.name);
        outcome
    })
}

fn settled(namespace: &Namespace, leases: &LeaseSet) {
    let outcome = reconcile(namespace, leases);
    assert!(
        !outcome.changed() && outcome.peers.refused.is_empty(),
        "{outcome:?}"
    );
}

#[test]
fn the_state_is_flannels() {
    let (node, _outside) = Namespace::node(1);
    let set = leases(1, &[2]);
    let outcome = reconcile(&node, &set);
    assert_eq!(outcome.peers.refused, Vec::<String>::new());
    settled(&node, &set);

    let device = node.ip("-d addr show flannel.1");
    for part in [
        "mtu 1450 qdisc noqueue state UNKNOWN",
        "<BROADCAST,MULTICAST,UP,LOWER_UP>",
        "link/ether 02:52:53:00:00:01",
        "vxlan id 1 local 10.199.0.1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
        "inet 10.244.1.0/32 scope global flannel.1",
    ] {
        assert!(device.contains(part), "{part:?} is not in {device}");
    }
    let route = node.ip("-d route show dev flannel.1");
    assert_eq!(
        route.trim(),
        "unicast 10.244.2.0/24 via 10.244.2.0 proto 82 scope global onlink"
    );
    let neighbours = node.ip("neigh show dev flannel.1");
    assert_eq!(
        neighbours.trim(),
        "10.244.2.0 lladdr 02:52:53:00:00:02 PERMANENT"
    );
    let fdb = node.command("bridge", "fdb show dev flannel.1");
    assert_eq!(
        fdb.trim(),
        "02:52:53:00:00:02 dst 10.199.0.2 self permanent"
    );
    for (setting, value) in [
        ("net.ipv6.conf.flannel/1.accept_ra", "0"),
        ("net.ipv6.conf.flannel/1.addr_gen_mode", "0"),
        ("net.ipv4.conf.flannel/1.rp_filter", "0"),
    ] {
        let output = node.try_command("sysctl", &format!("-n {setting}"));
        if output.status.success() {
            assert_eq!(
                String::from_utf8_lossy(&output.stdout).trim(),
                value,
                "{setting}"
            );
        }
    }
}

#[test]
fn what_others_delete_or_change_is_put_back() {
    let (node, _outside) = Namespace::node(1);
    let set = leases(1, &[2, 3]);
    reconcile(&node, &set);
    let state = || {
        [
            node.ip("-d -4 addr show flannel.1"),
            node.ip("-d route"),
            node.ip("neigh show dev flannel.1"),
        ]
    };
    let before = state();
    for damage in [
        "link set flannel.1 address 02:99:99:99:99:99",
        "link set flannel.1 mtu 1400",
        "link set flannel.1 down",
        "link set flannel.1 type vxlan id 1 learning",
        "addr del 10.244.1.0/32 dev flannel.1",
        "addr add 10.244.77.0/32 dev flannel.1",
        "route del 10.244.2.0/24",
        "route replace 10.244.2.0/24 dev eth0",
        "route replace unreachable 10.244.2.0/24",
        "neigh del 10.244.2.0 dev flannel.1",
        "neigh replace 10.244.2.0 lladdr 02:99:99:99:99:99 dev flannel.1 nud permanent",
        "neigh flush all",
    ] {
        node.ip(damage);
        let outcome = reconcile(&node, &set);
        assert!(
            outcome.changed() || damage.contains("flush"),
            "{damage} was not noticed"
        );
        assert_eq!(outcome.peers.refused, Vec::<String>::new(), "{damage}");
        assert_eq!(state(), before, "{damage}");
        settled(&node, &set);
    }
    for damage in [
        "fdb del 02:52:53:00:00:02 dev flannel.1 self",
        "fdb replace 02:52:53:00:00:02 dev flannel.1 dst 10.199.0.99 self permanent",
    ] {
        node.command("bridge", damage);
        assert_eq!(reconcile(&node, &set).peers.changed, 1, "{damage}");
        settled(&node, &set);
    }
    for damage in [
        "link del flannel.1",
        "link del flannel.1 && link add flannel.1 type bridge",
        "link del flannel.1 && link add flannel.1 type vxlan id 1 dev eth0 local 10.199.0.1 dstport 4789",
    ] {
        for step in damage.split("&&") {
            node.ip(step.trim());
        }
        let outcome = reconcile(&node, &set);
        assert!(
            outcome.device_changes.contains(&DeviceOp::Create),
            "{damage}: {outcome:?}"
        );
        assert_eq!(
            outcome.peers.changed, 6,
            "{damage}: all peers are programmed anew"
        );
        settled(&node, &set);
    }
}

#[test]
fn leases_that_change_leave_nothing_behind() {
    let (node, _outside) = Namespace::node(1);
    reconcile(&node, &leases(1, &[2, 3, 4]));
    let mut changed = leases(1, &[2, 3]);
    changed.peers[0].vtep_mac = Mac([2, 0x52, 0x53, 0, 0, 0xee]);
    changed.peers[1].public_ip = Ipv4Addr::new(10, 199, 0, 33);
    let outcome = reconcile(&node, &changed);
    assert_eq!(outcome.peers.refused, Vec::<String>::new());
    let mut fdb: Vec<_> = node
        .command("bridge", "fdb show dev flannel.1")
        .lines()
        .map(|line| line.trim().to_owned())
        .collect();
    fdb.sort();
    assert_eq!(
        fdb,
        [
            "02:52:53:00:00:03 dst 10.199.0.33 self permanent",
            "02:52:53:00:00:ee dst 10.199.0.2 self permanent"
        ]
    );
    let mut moved = changed.clone();
    moved.peers[1].subnet = "10.244.9.0/24".parse().unwrap();
    reconcile(&node, &moved);
    let routes = node.ip("route show dev flannel.1");
    assert_eq!(routes.lines().count(), 2, "{routes}");
    assert!(
        routes.contains("10.244.9.0/24") && !routes.contains("10.244.3.0/24"),
        "{routes}"
    );
    assert_eq!(
        node.ip("neigh show dev flannel.1 nud permanent")
            .lines()
            .count(),
        2
    );
    // The own lease moves to another address.
    node.ip("addr add 10.199.0.50/24 dev eth0");
    moved.own.public_ip = Ipv4Addr::new(10, 199, 0, 50);
    let outcome = reconcile(&node, &moved);
    assert!(
        outcome.device_changes.contains(&DeviceOp::Create),
        "{outcome:?}"
    );
    assert!(
        node.ip("-d link show flannel.1")
            .contains("local 10.199.0.50")
    );
    settled(&node, &moved);
}

#[test]
fn what_flannel_made_is_adopted() {
    let (node, _outside) = Namespace::node(1);
    node.ip("link add flannel.1 mtu 1450 address 02:52:53:00:00:01 type vxlan id 1 dev eth0 local 10.199.0.1 dstport 8472 nolearning");
    node.ip("addr add 10.244.1.0/32 dev flannel.1");
    node.ip("link set flannel.1 up");
    let index = node
        .ip("-o link show flannel.1")
        .split(':')
        .next()
        .unwrap()
        .to_owned();
    for n in [2, 9] {
        node.ip(&format!(
            "neigh add 10.244.{n}.0 lladdr 02:52:53:00:00:0{n} dev flannel.1 nud permanent"
        ));
        node.command(
            "bridge",
            &format!("fdb add 02:52:53:00:00:0{n} dev flannel.1 dst 10.199.0.{n} self permanent"),
        );
        node.ip(&format!(
            "route add 10.244.{n}.0/24 via 10.244.{n}.0 dev flannel.1 onlink proto boot"
        ));
    }
    // An operator's own routes, one of them through the device.
    node.ip("route add 192.168.7.0/24 via 10.244.2.0 dev flannel.1 onlink proto static");
    node.ip("route add 192.168.8.0/24 via 10.199.0.2 proto boot");
    let outcome = reconcile(&node, &leases(1, &[2]));
    assert_eq!(outcome.device_changes, []);
    assert_eq!(outcome.peers.refused, Vec::<String>::new());
    assert_eq!(
        node.ip("-o link show flannel.1").split(':').next().unwrap(),
        index,
        "the device was kept"
    );
    let routes = node.ip("route");
    assert!(
        routes.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 82 onlink"),
        "{routes}"
    );
    assert!(!routes.contains("10.244.9.0/24"), "{routes}");
    assert!(
        routes.contains("192.168.7.0/24") && routes.contains("192.168.8.0/24"),
        "{routes}"
    );
    // And back: flannel replaces routes, so it adopts ours.
    node.ip("route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink");
    assert!(!node.ip("route").contains("proto 82"));
}

#[test]
fn one_bad_entry_does_not_stop_the_others() {
    let (node, _outside) = Namespace::node(1);
    let mut set = leases(1, &[2, 3]);
    // The kernel refuses a route whose next hop is our own address.
    set.peers[0].subnet = "10.244.1.0/24".parse().unwrap();
    let outcome = reconcile(&node, &set);
    assert!(!outcome.peers.refused.is_empty(), "{outcome:?}");
    assert!(
        node.ip("route")
            .contains("10.244.3.0/24 via 10.244.3.0 dev flannel.1")
    );
}

#[test]
fn a_device_of_another_program_with_our_vni_is_named() {
    let (node, _outside) = Namespace::node(1);
    node.ip("link add vx9 type vxlan id 1 dev eth0 dstport 8472 local 10.199.0.1");
    let desired = Desired::new(&leases(1, &[2]), &netconf(), &underlay(&node, 1));
    let error = node.enter(|| {
        standby::reconcile(&mut Netlink::open().unwrap(), &desired, Duration::MAX).unwrap_err()
    });
    let text = error.to_string();
    assert!(text.contains("flannel.1") && text.contains("VNI"), "{text}");
}

#[test]
fn fifteen_thousand_peers_are_programmed() {
    let (node, _outside) = Namespace::node(1);
    let mut set = leases(1, &[]);
    set.own.subnet = "10.200.0.0/24".parse().unwrap();
    set.peers = (0..15_000u32)
        .map(|i| {
            let [_, _, high, low] = i.to_be_bytes();
            let mut lease = lease(2);
            lease.node = format!("node-{i}");
            lease.public_ip = Ipv4Addr::from(0xac10_0000 + i);
            lease.subnet = ipnet::Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (i << 8)), 24).unwrap();
            lease.vtep_mac = Mac([2, 0x52, 0x54, 0, high, low]);
            lease
        })
        .collect();
    let mut conf = netconf();
    conf.network = "10.0.0.0/8".parse().unwrap();
    let desired = Desired::new(&set, &conf, &underlay(&node, 1));
    node.enter(|| {
        let mut netlink = Netlink::open().unwrap();
        let start = Instant::now();
        let (link, outcome) = standby::reconcile(&mut netlink, &desired, Duration::MAX).unwrap();
        println!("15,000 peers programmed in {:?}", start.elapsed());
        assert_eq!(outcome.peers.refused, Vec::<String>::new());
        assert_eq!(outcome.peers.changed, 45_000);
        let start = Instant::now();
        let actual = Actual::read(&mut netlink, link).unwrap();
        println!("and read back in {:?}", start.elapsed());
        assert_eq!(
            (
                actual.routes.len(),
                actual.neighbours.len(),
                actual.fdb.len()
            ),
            (15_000, 15_000, 15_000)
        );
        assert_eq!(standby::peer_ops(&desired.peers, link, &actual), []);
    });
    let mut batch = String::new();
    let _ = write!(
        batch,
        "ip netns exec {} ip route show dev flannel.1 | wc -l",
        node.name
    );
    let output = Command::new("sh").args(["-c", &batch]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "15000");
}
