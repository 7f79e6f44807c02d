//! The standby path on a real kernel, in namespaces of the test's own. Needs root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::fmt::Write as _;
use core::net::Ipv4Addr;
use core::time::Duration;
use std::process::Command;
use std::time::Instant;

use common::{Namespace, backend, conf, dual, ip, lease, leases, leases_dual, netconf, underlay};
use ripstop_controlplane::family::Family;
use ripstop_controlplane::lease::LeaseSet;
use ripstop_controlplane::mac::Mac;
use ripstop_controlplane::netconf::NetConf;
use ripstop_controlplane::netlink::Netlink;
use ripstop_controlplane::standby::{self, Actual, Desired, DeviceOp, Outcome, StandbyError};

/// The kernel's state in IPv4 for these leases, none of them direct.
fn desired(namespace: &Namespace, leases: &LeaseSet, conf: &NetConf, family: Family) -> Desired {
    Desired::new(family, leases, conf, &underlay(namespace, 1), |_| None).unwrap()
}

fn apply(namespace: &Namespace, desired: &Desired) -> Outcome {
    namespace.enter(|| {
        let (_, outcome) =
            standby::reconcile(&mut Netlink::open().unwrap(), desired, Duration::MAX).unwrap();
        if let Some(device) = &desired.device {
            standby::reconcile_sysctls(&device.name);
        }
        outcome
    })
}

fn reconcile(namespace: &Namespace, leases: &LeaseSet) -> Outcome {
    apply(
        namespace,
        &desired(namespace, leases, &netconf(), Family::V4),
    )
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
    changed.peers[0].vtep_mac = Some(Mac([2, 0x52, 0x53, 0, 0, 0xee]));
    changed.peers[1].public_ip = ip("10.199.0.33");
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
    moved.own.v4.as_mut().unwrap().public_ip = ip("10.199.0.50");
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
    let text = reconcile(&node, &leases(1, &[2]))
        .device_error
        .unwrap()
        .to_string();
    assert!(text.contains("flannel.1") && text.contains("VNI"), "{text}");
}

#[test]
fn fifteen_thousand_peers_are_programmed() {
    let (node, _outside) = Namespace::node(1);
    let mut set = leases(1, &[]);
    set.own.v4.as_mut().unwrap().subnet = "10.200.0.0/24".parse().unwrap();
    set.peers = (0..15_000u32)
        .map(|i| {
            let [_, _, high, low] = i.to_be_bytes();
            let mut lease = lease(2);
            lease.node = format!("node-{i}").into();
            lease.public_ip = Ipv4Addr::from(0xac10_0000 + i).into();
            let subnet = ipnet::Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (i << 8)), 24).unwrap();
            lease.subnet = subnet.into();
            lease.vtep_mac = Some(Mac([2, 0x52, 0x54, 0, high, low]));
            lease
        })
        .collect();
    let conf = conf(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#);
    let desired = desired(&node, &set, &conf, Family::V4);
    node.enter(|| {
        let mut netlink = Netlink::open().unwrap();
        let start = Instant::now();
        let (link, outcome) = standby::reconcile(&mut netlink, &desired, Duration::MAX).unwrap();
        println!("15,000 peers programmed in {:?}", start.elapsed());
        assert_eq!(outcome.peers.refused, Vec::<String>::new());
        assert_eq!(outcome.peers.changed, 45_000);
        let start = Instant::now();
        let actual = Actual::read(&mut netlink, Family::V4, link).unwrap();
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

#[test]
fn the_ipv6_state_is_flannels() {
    let (node, _outside) = Namespace::node(1);
    let set = leases_dual(1, &[2, 3]);
    let conf = conf(&dual(r#"{"Type":"vxlan"}"#));
    let desired = desired(&node, &set, &conf, Family::V6);
    let outcome = apply(&node, &desired);
    assert!(outcome.device_error.is_none(), "{outcome:?}");
    assert_eq!(outcome.peers.refused, Vec::<String>::new());
    let outcome = apply(&node, &desired);
    assert!(!outcome.changed(), "{outcome:?}");
    let device = node.ip("-d addr show flannel-v6.1");
    for part in [
        "mtu 1430 qdisc noqueue state UNKNOWN",
        "link/ether 02:52:53:00:06:01",
        "vxlan id 1 local fd00:199::1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
        "inet6 fd00:10:244:1::/128 scope global",
    ] {
        assert!(device.contains(part), "{part:?} is not in {device}");
    }
    let route = node.ip("-6 route show fd00:10:244:2::/64");
    assert_eq!(
        route.trim(),
        "fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 proto 82 metric 1024 onlink pref medium"
    );
    let neighbours = node.ip("-6 neigh show dev flannel-v6.1 nud permanent");
    assert!(
        neighbours.contains("fd00:10:244:2:: lladdr 02:52:53:00:06:02 PERMANENT"),
        "{neighbours}"
    );
    let fdb = node.command("bridge", "fdb show dev flannel-v6.1");
    assert!(
        fdb.contains("02:52:53:00:06:03 dst fd00:199::3 self permanent"),
        "{fdb}"
    );
    let accept_ra = node.command("sysctl", "-n net.ipv6.conf.flannel-v6/1.accept_ra");
    assert_eq!(accept_ra.trim(), "0");
    // What others delete comes back; the peer that leaves goes with everything.
    for damage in [
        "-6 route del fd00:10:244:2::/64",
        "-6 neigh del fd00:10:244:2:: dev flannel-v6.1",
        "addr del fd00:10:244:1::/128 dev flannel-v6.1",
        "link set flannel-v6.1 down",
        "link set flannel-v6.1 mtu 1300",
        "-6 route replace fd00:10:244:2::/64 via fd00:199::9 dev eth0",
        "link del flannel-v6.1",
    ] {
        node.ip(damage);
        assert!(apply(&node, &desired).changed(), "{damage} was not noticed");
        let outcome = apply(&node, &desired);
        assert!(
            !outcome.changed() && outcome.peers.refused.is_empty(),
            "{damage}: {outcome:?}"
        );
    }
    let fewer = Desired {
        peers: vec![desired.peers[1]],
        ..desired
    };
    apply(&node, &fewer);
    assert!(!node.ip("-6 route").contains("fd00:10:244:2::/64"));
    assert_eq!(
        node.command("bridge", "fdb show dev flannel-v6.1")
            .lines()
            .count(),
        1
    );
}

/// Section 12, defect 9 of the upstream list: flannel's re-created device came back without its peers.
#[test]
fn defect_9_a_device_made_anew_has_all_its_peers() {
    let (node, _outside) = Namespace::node(1);
    let set = leases_dual(1, &[2, 3]);
    let conf = conf(&dual(r#"{"Type":"vxlan"}"#));
    for (family, device) in [(Family::V4, "flannel.1"), (Family::V6, "flannel-v6.1")] {
        let desired = desired(&node, &set, &conf, family);
        apply(&node, &desired);
        node.ip(&format!("link del {device}"));
        let outcome = apply(&node, &desired);
        assert_eq!(outcome.device_changes.first(), Some(&DeviceOp::Create));
        // Route, neighbour and forwarding entry of both peers.
        assert_eq!(outcome.peers.changed, 6, "{family}");
        assert_eq!(outcome.peers.refused, Vec::<String>::new());
    }
}

/// Defect 10: the forwarding entry of a peer's old VTEP MAC stayed for ever.
#[test]
fn defect_10_an_old_vtep_mac_is_not_left_behind() {
    let (node, _outside) = Namespace::node(1);
    let mut set = leases_dual(1, &[2]);
    let conf = conf(&dual(r#"{"Type":"vxlan"}"#));
    for family in Family::ALL {
        apply(&node, &desired(&node, &set, &conf, family));
    }
    for peer in &mut set.peers {
        peer.vtep_mac.as_mut().unwrap().0[5] = 0xee;
    }
    for (family, device) in [(Family::V4, "flannel.1"), (Family::V6, "flannel-v6.1")] {
        apply(&node, &desired(&node, &set, &conf, family));
        let fdb = node.command("bridge", &format!("fdb show dev {device}"));
        assert_eq!(fdb.lines().count(), 1, "{fdb}");
        assert!(fdb.contains(":ee dst "), "{fdb}");
    }
}

/// Defect 11: a change of `MTU` or `Learning` had no effect on a device that was there.
#[test]
fn defect_11_settings_reach_a_device_that_is_there() {
    let (node, _outside) = Namespace::node(1);
    let set = leases(1, &[2]);
    reconcile(&node, &set);
    let index = || {
        node.ip("-o link show flannel.1")
            .split(':')
            .next()
            .unwrap()
            .to_owned()
    };
    let before = index();
    let changed = conf(&backend(
        r#"{"Type":"vxlan","MTU":1400,"Learning":true,"DSCP":46}"#,
    ));
    let outcome = apply(&node, &desired(&node, &set, &changed, Family::V4));
    assert!(outcome.changed(), "{outcome:?}");
    let device = node.ip("-d link show flannel.1");
    assert!(
        device.contains("mtu 1350")
            && device.contains("tos 0xb8")
            && !device.contains("nolearning"),
        "{device}"
    );
    assert_eq!(index(), before, "the device was kept");
    assert!(node.ip("route").contains("10.244.2.0/24"));
    // GBP cannot be switched on a device that is there.
    let gbp = conf(&backend(r#"{"Type":"vxlan","GBP":true,"DSCP":"inherit"}"#));
    let outcome = apply(&node, &desired(&node, &set, &gbp, Family::V4));
    assert!(
        outcome.device_changes.contains(&DeviceOp::Create),
        "{outcome:?}"
    );
    let device = node.ip("-d link show flannel.1");
    assert!(
        device.contains("gbp") && device.contains("tos inherit"),
        "{device}"
    );
    let outcome = apply(&node, &desired(&node, &set, &gbp, Family::V4));
    assert!(!outcome.changed(), "{outcome:?}");
}

/// Defect 12: IPv6 pods were given an MTU 20 bytes too large.
#[test]
fn defect_12_ipv6_has_an_overhead_of_70() {
    let (node, _outside) = Namespace::node(1);
    let conf = conf(&dual(r#"{"Type":"vxlan"}"#));
    let mtu = |family| conf.pod_mtu(family, 1500);
    assert_eq!((mtu(Family::V4), mtu(Family::V6)), (1450, 1430));
    apply(
        &node,
        &desired(&node, &leases_dual(1, &[2]), &conf, Family::V6),
    );
    assert!(node.ip("link show flannel-v6.1").contains("mtu 1430"));
}

#[test]
fn host_gw_is_plain_routes_and_nothing_else() {
    let (node, _outside) = Namespace::node(1);
    let set = leases_dual(1, &[2, 3]);
    let conf = conf(&dual(r#"{"Type":"host-gw"}"#));
    for family in Family::ALL {
        let desired = desired(&node, &set, &conf, family);
        let outcome = apply(&node, &desired);
        assert_eq!(outcome.peers.refused, Vec::<String>::new());
        let outcome = apply(&node, &desired);
        assert!(!outcome.changed(), "{outcome:?}");
    }
    let route = node.ip("-d route show 10.244.2.0/24");
    assert_eq!(
        route.trim(),
        "unicast 10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82 scope global"
    );
    let route = node.ip("-6 route show fd00:10:244:2::/64");
    assert_eq!(
        route.trim(),
        "fd00:10:244:2::/64 via fd00:199::2 dev eth0 proto 82 metric 1024 pref medium"
    );
    assert!(!node.ip("link").contains("flannel"));
    // A node that leaves takes its route along; one behind a gateway is refused by the kernel.
    let mut far = leases(1, &[3]);
    far.peers[0].public_ip = ip("172.16.0.3");
    let outcome = apply(&node, &desired(&node, &far, &conf, Family::V4));
    assert!(
        outcome.peers.refused.len() == 1 && outcome.peers.refused[0].contains("via 172.16.0.3"),
        "{outcome:?}"
    );
    assert!(!node.ip("route").contains("10.244.2.0/24"));
}

#[test]
fn direct_peers_have_plain_routes_and_change_in_one_step() {
    let (node, _outside) = Namespace::node(1);
    let set = leases(1, &[2, 3]);
    let conf = conf(&backend(r#"{"Type":"vxlan","DirectRouting":true}"#));
    let underlay = underlay(&node, 1);
    let with_direct = |direct: &[u8]| {
        let desired = Desired::new(Family::V4, &set, &conf, &underlay, |lease| {
            let is_direct = direct.iter().any(|n| *lease.node == *format!("n{n}"));
            is_direct.then_some(underlay.index)
        });
        apply(&node, &desired.unwrap())
    };
    with_direct(&[2]);
    let routes = node.ip("route");
    for part in [
        "10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82",
        "10.244.3.0/24 via 10.244.3.0 dev flannel.1 proto 82 onlink",
    ] {
        assert!(routes.contains(part), "{part:?} is not in {routes}");
    }
    assert_eq!(
        node.command("bridge", "fdb show dev flannel.1")
            .lines()
            .count(),
        1
    );
    with_direct(&[3]);
    let routes = node.ip("route");
    for part in [
        "10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 82 onlink",
        "10.244.3.0/24 via 10.199.0.3 dev eth0 proto 82",
    ] {
        assert!(routes.contains(part), "{part:?} is not in {routes}");
    }
    assert_eq!(
        node.ip("neigh show dev flannel.1 nud permanent")
            .lines()
            .count(),
        1
    );
    assert!(!with_direct(&[3]).changed());
}

#[test]
fn direct_peers_change_in_one_step_in_ipv6_too() {
    let (node, _outside) = Namespace::node(1);
    let set = leases_dual(1, &[2]);
    let conf = conf(&dual(r#"{"Type":"vxlan","DirectRouting":true}"#));
    let underlay = underlay(&node, 1);
    let with_direct = |direct: bool| {
        let desired = Desired::new(Family::V6, &set, &conf, &underlay, |_| {
            direct.then_some(underlay.index)
        });
        let outcome = apply(&node, &desired.unwrap());
        assert!(outcome.changed(), "{outcome:?}");
        assert_eq!(outcome.peers.refused, Vec::<String>::new());
        node.ip("-6 route show root fd00:10:244:2::/64")
    };
    let tunnelled = "fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 proto 82 metric 1024 onlink pref medium";
    let direct = "fd00:10:244:2::/64 via fd00:199::2 dev eth0 proto 82 metric 1024 pref medium";
    for _ in 0..2 {
        assert_eq!(with_direct(false).trim(), tunnelled);
        assert_eq!(with_direct(true).trim(), direct);
    }
}

#[test]
fn a_kernel_without_the_device_still_gets_its_plain_routes() {
    let (node, _outside) = Namespace::node(1);
    let probe = node.try_command("ip", "link add probe type ipip local 10.199.0.1");
    if probe.status.success() {
        println!("this kernel has ipip: see the test of it");
        return;
    }
    let set = leases(1, &[2, 3]);
    let conf = conf(&backend(r#"{"Type":"ipip","DirectRouting":true}"#));
    let underlay = underlay(&node, 1);
    let desired = Desired::new(Family::V4, &set, &conf, &underlay, |lease| {
        (&*lease.node == "n2").then_some(underlay.index)
    });
    let outcome = apply(&node, &desired.unwrap());
    assert!(
        matches!(outcome.device_error, Some(StandbyError::NoKind { .. })),
        "{outcome:?}"
    );
    let text = outcome.device_error.unwrap().to_string();
    assert_eq!(
        text,
        "standby missing: kernel lacks ipip; load the module ipip"
    );
    let routes = node.ip("route");
    assert!(
        routes.contains("10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82 onlink"),
        "{routes}"
    );
    assert!(!routes.contains("10.244.3.0/24"), "{routes}");
}

/// Where the kernel has `ipip`: what flannel's device looks like.
#[test]
fn an_ipip_device_is_flannels() {
    let (node, _outside) = Namespace::node(1);
    let probe = node.try_command("ip", "link add probe type ipip local 10.199.0.99");
    if !probe.status.success() {
        println!("not run: this kernel has no ipip");
        return;
    }
    node.ip("link del probe");
    let set = leases(1, &[2]);
    let conf = conf(&backend(r#"{"Type":"ipip"}"#));
    let desired = desired(&node, &set, &conf, Family::V4);
    let outcome = apply(&node, &desired);
    assert!(
        outcome.device_error.is_none() && outcome.peers.refused.is_empty(),
        "{outcome:?}"
    );
    let outcome = apply(&node, &desired);
    assert!(!outcome.changed(), "{outcome:?}");
    let device = node.ip("-d addr show flannel.ipip");
    for part in [
        "mtu 1480",
        "ipip remote any local 10.199.0.1 ttl inherit nopmtudisc",
        "10.244.1.0/32",
    ] {
        assert!(device.contains(part), "{part:?} is not in {device}");
    }
    let route = node.ip("route show 10.244.2.0/24");
    assert_eq!(
        route.trim(),
        "10.244.2.0/24 via 10.199.0.2 dev flannel.ipip proto 82 onlink"
    );
}
