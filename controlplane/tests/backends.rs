//! The control plane as a process with each backend and both families, against a data plane that is played by the test.
//! Needs root.
//!
//! ```text
//!   peer0 (10.199.0.2, .3, .254; fd00:199::2, ::3) ── veth ── eth0 ── node: control plane, rip0, cni0 (10.244.1.1)
//!   peer1 (10.198.0.254)                           ── veth ── eth1 ──┘
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::os::unix::fs::PermissionsExt as _;

use common::node::{CONTROLPLANE, FakeDataPlane, Node, wait_exit};
use common::{backend, dual, eventually, ip, lease, lease6};
use ripstop_controlplane::fou::Fou;
use ripstop_controlplane::lease::Lease;

/// Gives the node a bridge with an address of its subnets, so that "from a pod" can be asked for.
fn add_pods(node: &Node) {
    node.namespace.ip("link add cni0 type bridge");
    node.namespace.ip("addr add 10.244.1.1/24 dev cni0");
    node.namespace
        .ip("addr add fd00:10:244:1::1/64 dev cni0 nodad");
    node.namespace.ip("link set cni0 up");
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        node.namespace.command("sysctl", &format!("-qw {setting}"));
    }
}

/// The route that a pod's packet takes.
fn from_pod(node: &Node, to: &str) -> String {
    let from = if to.contains(':') {
        "fd00:10:244:1::5"
    } else {
        "10.244.1.5"
    };
    node.namespace
        .ip(&format!("route get {to} from {from} iif cni0"))
}

fn stop(process: common::Process) {
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0, "{log}");
}

fn wait(node: &Node, what: &str, sign: &str) {
    let (program, arguments) = what.split_once(' ').unwrap();
    eventually(&format!("{what}: {sign}"), || {
        let output = node.namespace.try_command(program, arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        text.contains(sign).then_some(())
    });
}

fn wait_gone(node: &Node, what: &str, sign: &str) {
    let (program, arguments) = what.split_once(' ').unwrap();
    eventually(&format!("{what}: no {sign}"), || {
        let output = node.namespace.try_command(program, arguments);
        let text = String::from_utf8_lossy(&output.stdout);
        (!text.contains(sign)).then_some(())
    });
}

fn resolved(node: &Node, name: &str, family: u8) {
    eventually(&format!("{name} resolved in family {family}"), || {
        node.record(name, family)?.resolved.then_some(())
    });
}

#[test]
fn dual_stack_has_everything_twice() {
    let node = Node::new(1);
    node.write_conf(&dual(r#"{"Type":"vxlan"}"#));
    node.write_leases(&[lease(1), lease6(1), lease(2), lease6(2), lease(3)]);
    let process = node.start();
    for (name, family) in [("n2", 4), ("n2", 6), ("n3", 4)] {
        resolved(&node, name, family);
    }
    assert_eq!(
        node.record("n2", 6).unwrap().next_hop_mac,
        [2, 0xbb, 0, 0, 0, 1]
    );
    wait(
        &node,
        "ip -6 route",
        "fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 proto 82",
    );
    let data_plane = FakeDataPlane::start(&node);
    wait(
        &node,
        "ip -6 rule",
        "32000:\tfrom all lookup 21097 proto 82",
    );
    let detour = node.namespace.ip("-6 route show table 21097");
    for part in [
        "fd00:10:244:2::/64 dev rip0 proto 82 src fd00:10:244:1:: metric 1024",
        "mtu 1430",
    ] {
        assert!(detour.contains(part), "{part:?} is not in {detour}");
    }
    let device = node.namespace.ip("addr show rip0");
    for part in ["10.244.1.0/32", "fd00:10:244:1::/128"] {
        assert!(device.contains(part), "{part:?} is not in {device}");
    }
    let route = node.namespace.ip("route get fd00:10:244:2::7");
    assert!(
        route.contains("dev rip0") && route.contains("src fd00:10:244:1::"),
        "{route}"
    );
    // Each family on its own: node 3 has no IPv6.
    assert!(node.record("n3", 6).is_none());
    wait(&node, "nft list table ip6 ripstop", "fd00:199::2");
    wait(&node, "nft list table ip ripstop", "10.199.0.3");
    for damage in [
        "link del flannel-v6.1",
        "-6 rule del pref 32000",
        "-6 route flush table 21097",
        "addr flush dev rip0",
    ] {
        node.namespace.ip(damage);
        wait(&node, "ip -6 neigh show dev flannel-v6.1", "PERMANENT");
        wait(&node, "ip -6 route get fd00:10:244:2::7", "dev rip0");
        wait(&node, "ip addr show rip0", "fd00:10:244:1::/128");
    }
    // The underlay's MTU is followed in both.
    node.outside.ip("link set peer0 mtu 9000");
    node.namespace.ip("link set eth0 mtu 9000");
    wait(&node, "ip link show flannel-v6.1", "mtu 8930");
    wait(&node, "ip link show flannel.1", "mtu 8950");
    wait(&node, "ip -6 route show table 21097", "mtu 8930");
    let table = node.table_node();
    assert_eq!(
        (table.v4.unwrap().pod_mtu, table.v6.unwrap().pod_mtu),
        (8950, 8930)
    );
    let (text, code) = node.cli("status --interval 0");
    println!("{text}");
    assert_eq!(code, 0, "{text}");
    for part in [
        "vxlan, VNI 1, port 8472, pod MTU 8950 and 8930 in IPv6",
        "10.199.0.1, fd00:199::1",
        "flannel.1, flannel-v6.1 present",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let (text, _) = node.cli("leases");
    println!("{text}");
    assert!(text.contains("fd00:10:244:2::/64"), "{text}");
    // The data plane dies: the main table answers.
    drop(data_plane);
    let route = node.namespace.ip("route get fd00:10:244:2::7");
    assert!(route.contains("dev flannel-v6.1"), "{route}");
    stop(process);
    let (text, code) = node.cli("cleanup --standby");
    assert_eq!(code, 0, "{text}");
    for (look, sign) in [
        ("link", "flannel"),
        ("-6 route", "proto 82"),
        ("-6 rule", "21097"),
    ] {
        assert!(!node.namespace.ip(look).contains(sign), "{sign} is left");
    }
    assert!(
        !node
            .namespace
            .command("nft", "list tables")
            .contains("ripstop")
    );
}

#[test]
fn ipv6_alone_needs_nothing_of_ipv4() {
    let node = Node::new(1);
    node.write_conf(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#);
    node.write_leases(&[lease6(1), lease6(2)]);
    let process = node.start();
    resolved(&node, "n2", 6);
    let _data_plane = FakeDataPlane::start(&node);
    wait(&node, "ip -6 route get fd00:10:244:2::7", "dev rip0");
    wait(&node, "ip link show flannel-v6.1", "mtu 1430");
    assert!(!node.namespace.ip("link").contains("flannel.1"));
    assert!(!node.namespace.ip("rule").contains("21097"));
    assert!(node.table_node().v4.is_none());
    stop(process);
}

/// Which peer is direct follows the kernel's routing, there and back, while traffic stays where workers can serve it.
#[test]
fn direct_routing_follows_the_kernels_routing() {
    let node = Node::new(1);
    add_pods(&node);
    node.outside.ip("addr add 10.199.0.254/24 dev peer0");
    node.namespace
        .ip("route add 172.16.3.0/24 via 10.199.0.254");
    node.write_conf(&backend(r#"{"Type":"vxlan","DirectRouting":true}"#));
    let far = Lease {
        public_ip: ip("172.16.3.3"),
        ..lease(3)
    };
    node.write_leases(&[lease(1), lease(2), far]);
    let process = node.start();
    node.wait_resolved(&["n2", "n3"]);
    wait(
        &node,
        "ip route",
        "10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82",
    );
    wait(
        &node,
        "ip route",
        "10.244.3.0/24 via 10.244.3.0 dev flannel.1 proto 82 onlink",
    );
    let direct = |name: &str| node.record(name, 4).unwrap().direct;
    assert!(direct("n2") && !direct("n3") && node.table_node().direct);
    let _data_plane = FakeDataPlane::start(&node);
    wait(
        &node,
        "ip rule",
        "32000:\tfrom 10.244.0.0/16 lookup 21097 proto 82",
    );
    wait(&node, "ip rule", "32001:\tfrom all lookup 21098 proto 82");
    // Pods' packets go to the workers, the node's own to a direct peer stay on the plain route.
    for n in [2, 3] {
        let route = from_pod(&node, &format!("10.244.{n}.7"));
        assert!(route.contains("dev rip0"), "{route}");
    }
    let own = |n: u8| node.namespace.ip(&format!("route get 10.244.{n}.7"));
    assert!(
        own(2).contains("dev eth0") && own(2).contains("src 10.199.0.1"),
        "{}",
        own(2)
    );
    assert!(
        own(3).contains("dev rip0") && own(3).contains("src 10.244.1.0"),
        "{}",
        own(3)
    );
    for _ in 0..3 {
        node.namespace
            .ip("route add 10.199.0.2/32 via 10.199.0.254");
        eventually("n2 is tunnelled", || {
            for n in [2, 3] {
                let route = from_pod(&node, &format!("10.244.{n}.7"));
                assert!(route.contains("dev rip0"), "{route}");
            }
            (!direct("n2")).then_some(())
        });
        wait(
            &node,
            "ip route",
            "10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 82 onlink",
        );
        wait(
            &node,
            "bridge fdb show dev flannel.1",
            "02:52:53:00:00:02 dst 10.199.0.2",
        );
        wait(&node, "ip route show table 21098", "10.244.2.0/24");
        node.namespace.ip("route del 10.199.0.2/32");
        eventually("n2 is direct", || {
            let route = from_pod(&node, "10.244.2.7");
            assert!(route.contains("dev rip0"), "{route}");
            direct("n2").then_some(())
        });
        wait(
            &node,
            "ip route",
            "10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82",
        );
        wait_gone(&node, "bridge fdb show dev flannel.1", "02:52:53:00:00:02");
        wait_gone(&node, "ip route show table 21098", "10.244.2.0/24");
    }
    let (text, _) = node.cli("leases");
    println!("{text}");
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
    assert!(
        line("n2").contains("direct") && line("n3").contains("tunnel"),
        "{text}"
    );
    // Removal takes away the right kind.
    node.write_leases(&[lease(1)]);
    wait_gone(&node, "ip route", "10.244.2.0/24");
    wait_gone(&node, "ip route", "10.244.3.0/24");
    wait_gone(&node, "ip rule", "lookup 21097");
    stop(process);
}

#[test]
fn host_gw_leaves_the_nodes_own_packets_alone() {
    let node = Node::new(1);
    add_pods(&node);
    node.write_conf(&dual(r#"{"Type":"host-gw"}"#));
    node.write_leases(&[lease(1), lease6(1), lease(2), lease6(2)]);
    let process = node.start();
    resolved(&node, "n2", 4);
    resolved(&node, "n2", 6);
    wait(
        &node,
        "ip route",
        "10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82",
    );
    wait(
        &node,
        "ip -6 route",
        "fd00:10:244:2::/64 via fd00:199::2 dev eth0 proto 82",
    );
    let _data_plane = FakeDataPlane::start(&node);
    wait(
        &node,
        "ip rule",
        "32000:\tfrom 10.244.0.0/16 lookup 21097 proto 82",
    );
    wait(
        &node,
        "ip -6 rule",
        "32000:\tfrom fd00:10:244::/48 lookup 21097 proto 82",
    );
    for to in ["10.244.2.7", "fd00:10:244:2::7"] {
        let route = from_pod(&node, to);
        assert!(route.contains("dev rip0"), "{route}");
        let route = node.namespace.ip(&format!("route get {to}"));
        assert!(route.contains("dev eth0"), "{route}");
    }
    let device = node.namespace.ip("addr show rip0");
    assert!(
        device.contains("mtu 1500") && !device.contains("10.244."),
        "{device}"
    );
    wait(&node, "nft list tables", "inet ripstop-guard");
    let tables = node.namespace.command("nft", "list tables");
    assert!(
        !tables.contains("ip ripstop"),
        "no tunnel, no filter: {tables}"
    );
    let (text, code) = node.cli("status --interval 0");
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("host-gw, 2 direct, pod MTU 1500") && text.contains("plain routes"),
        "{text}"
    );
    stop(process);
}

#[test]
fn several_uplinks_are_used_and_lost_one_by_one() {
    let node = Node::new(1);
    let second = |name: &str| {
        node.namespace.ip(&format!(
            "link add eth1 type veth peer name peer1 netns {name}"
        ));
        node.namespace.ip("addr add 10.198.0.1/24 dev eth1");
        node.namespace.ip("link set eth1 up");
        node.outside.ip("link set peer1 address 02:bb:00:00:00:02");
        node.outside.ip("addr add 10.198.0.254/24 dev peer1");
        node.outside.ip("link set peer1 up");
    };
    second(&node.outside.name);
    node.outside.ip("addr add 10.199.0.254/24 dev peer0");
    let both =
        "route replace 172.16.0.0/16 nexthop via 10.199.0.254 weight 2 nexthop via 10.198.0.254";
    node.namespace.ip(both);
    let far = |n: u8| Lease {
        public_ip: ip(&format!("172.16.0.{n}")),
        ..lease(n)
    };
    node.write_leases(&[lease(1), far(2), far(3)]);
    let process = node.start();
    let uplinks = |wanted: &[&str], paths: u8| {
        eventually(&format!("uplinks {wanted:?}"), || {
            let records = node.table_node().nics;
            let count = records.iter().filter(|nic| nic.ifindex != 0).count();
            let is_right = node.state().uplinks == wanted && count == wanted.len();
            let all = ["n2", "n3"].iter().all(|name| {
                let record = node.record(name, 4).unwrap();
                record.resolved && record.paths == paths
            });
            (is_right && all).then_some(())
        })
    };
    node.wait_resolved(&["n2", "n3"]);
    let (_, took) = uplinks(&["eth0", "eth1"], 2);
    println!("both uplinks after {took:?}");
    assert_eq!(node.table_node().nics[1].uplink, 1);
    // A gateway that does not answer takes its path along, and comes back.
    node.outside.ip("addr del 10.198.0.254/24 dev peer1");
    node.namespace.ip("neigh del 10.198.0.254 dev eth1");
    let (_, took) = uplinks(&["eth0"], 1);
    println!("a silent gateway was given up after {took:?}");
    node.outside.ip("addr add 10.198.0.254/24 dev peer1");
    uplinks(&["eth0", "eth1"], 2);
    // The interface goes, and comes back.
    node.namespace.ip("link set eth1 down");
    let (_, took) = uplinks(&["eth0"], 1);
    println!("an interface that went down was given up after {took:?}");
    node.namespace.ip("link set eth1 up");
    node.namespace.ip(both);
    uplinks(&["eth0", "eth1"], 2);
    // The route goes.
    node.namespace
        .ip("route replace 172.16.0.0/16 via 10.199.0.254");
    uplinks(&["eth0"], 1);
    node.namespace.ip(both);
    uplinks(&["eth0", "eth1"], 2);
    // A data plane that works on eth0 alone: the other uplink would only lose peers.
    let data_plane = FakeDataPlane::start(&node);
    uplinks(&["eth0"], 1);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    drop(data_plane);
    stop(process);
}

#[test]
fn a_policy_takes_the_kernels_device() {
    let node = Node::new(1);
    node.write_conf(&backend(r#"{"Type":"vxlan","GBP":true,"DSCP":46}"#));
    node.write_leases(&[lease(1), lease(2)]);
    let process = node.start();
    node.wait_resolved(&["n2"]);
    let _data_plane = FakeDataPlane::start(&node);
    wait(
        &node,
        "ip rule",
        "from all fwmark 0/0xffff lookup 21097 proto 82",
    );
    let route = |mark: &str| {
        node.namespace
            .ip(&format!("route get 10.244.2.7 mark {mark}"))
    };
    assert!(route("0").contains("dev rip0") && route("0x10000").contains("dev rip0"));
    assert!(route("0x7").contains("dev flannel.1"), "{}", route("0x7"));
    let device = node.namespace.ip("-d link show flannel.1");
    assert!(
        device.contains("gbp") && device.contains("tos 0xb8"),
        "{device}"
    );
    wait(&node, "nft list table ip ripstop", "0x88");
    // Nothing is undone and done again.
    let before = node.namespace.ip("-o link show flannel.1");
    node.wait_ip("rule", |rules| rules.contains("21097"));
    assert_eq!(node.namespace.ip("-o link show flannel.1"), before);
    stop(process);
}

#[test]
fn a_backend_that_changes_leaves_nothing_of_ours() {
    let node = Node::new(1);
    let probe = node
        .namespace
        .try_command("ip", "link add probe type ipip local 10.199.0.99");
    let has_ipip = probe.status.success();
    if has_ipip {
        node.namespace.ip("link del probe");
    }
    // Somebody else's device of flannel's form, and routes.
    node.namespace
        .ip("link add flannel.77 type vxlan id 77 dev eth0 local 10.199.0.1 dstport 7777");
    node.namespace
        .ip("route add 192.168.9.0/24 via 10.199.0.2 proto static");
    node.write_conf(&dual(r#"{"Type":"vxlan"}"#));
    node.write_leases(&[lease(1), lease6(1), lease(2), lease6(2)]);
    let process = node.start();
    resolved(&node, "n2", 4);
    wait(&node, "ip -6 route", "dev flannel-v6.1 proto 82");
    wait(&node, "nft list tables", "table ip6 ripstop");
    stop(process);
    node.write_conf(&dual(r#"{"Type":"host-gw"}"#));
    let process = node.start();
    wait(
        &node,
        "ip route",
        "10.244.2.0/24 via 10.199.0.2 dev eth0 proto 82",
    );
    wait(
        &node,
        "ip -6 route",
        "fd00:10:244:2::/64 via fd00:199::2 dev eth0 proto 82",
    );
    wait_gone(&node, "ip link", "flannel.1:");
    wait_gone(&node, "ip link", "flannel-v6.1:");
    wait_gone(&node, "nft list tables", "ip ripstop");
    wait(&node, "nft list tables", "inet ripstop-guard");
    stop(process);
    // IPv4 alone, in a tunnel that this kernel may not have.
    node.write_conf(&backend(r#"{"Type":"ipip"}"#));
    node.write_leases(&[lease(1), lease(2)]);
    let process = node.start();
    wait_gone(&node, "ip -6 route", "proto 82");
    wait_gone(&node, "ip route", "via 10.199.0.2 dev eth0 proto 82");
    wait(&node, "nft list table ip ripstop", "ip protocol");
    node.wait_resolved(&["n2"]);
    if !has_ipip {
        eventually("the missing standby is reported", || {
            let problems = node.state().problems;
            let wanted = "standby missing: kernel lacks ipip; load the module ipip";
            problems
                .iter()
                .any(|problem| problem.contains(wanted))
                .then_some(())
        });
    }
    // The detour works all the same, and the node's own packets have their source.
    let data_plane = FakeDataPlane::start(&node);
    wait(&node, "ip route get 10.244.2.7", "dev rip0");
    let route = node.namespace.ip("route get 10.244.2.7");
    assert!(route.contains("src 10.244.1.0"), "{route}");
    assert_eq!(node.table_node().v4.map(|local| local.pod_mtu), Some(1480));
    drop(data_plane);
    stop(process);
    node.write_conf(&backend(r#"{"Type":"udp"}"#));
    let process = node.start();
    wait(&node, "nft list table ip ripstop", "udp dport 8285");
    node.wait_resolved(&["n2"]);
    assert_eq!(node.table_node().v4.unwrap().pod_mtu, 1472);
    stop(process);
    node.write_conf(&backend(r#"{"Type":"alloc"}"#));
    let process = node.start();
    wait_gone(&node, "nft list tables", "ripstop");
    wait_gone(&node, "ip route", "proto 82");
    eventually("the table has leases and no more", || {
        let record = node.record("n2", 4)?;
        let no_backend = node.table_node().backend == ripstop_fib::Backend::Alloc;
        (no_backend && !record.resolved).then_some(())
    });
    let _data_plane = FakeDataPlane::start(&node);
    std::thread::sleep(core::time::Duration::from_millis(500));
    assert_eq!(node.detour(), "", "no data path, no detour");
    assert_eq!(node.state().problems, Vec::<String>::new());
    stop(process);
    let rest = node.namespace.ip("link") + &node.namespace.ip("route");
    assert!(
        rest.contains("flannel.77") && rest.contains("192.168.9.0/24"),
        "{rest}"
    );
}

#[test]
fn host_gw_refuses_another_address_than_the_interfaces() {
    let node = Node::new(1);
    node.write_conf(&backend(r#"{"Type":"host-gw"}"#));
    let elsewhere = Lease {
        public_ip: ip("192.0.2.1"),
        ..lease(1)
    };
    node.namespace.ip("route add default via 10.199.0.2");
    node.write_leases(&[elsewhere, lease(2)]);
    let process = node.start();
    eventually("the refusal is reported", || {
        let problems = node.state().problems;
        let wanted = "your PublicIP differs from interface IP";
        problems
            .iter()
            .any(|problem| problem.contains(wanted))
            .then_some(())
    });
    assert!(!node.namespace.ip("route").contains("proto 82"));
    stop(process);
}

/// The kernel does not load the module of foo-over-UDP by itself: `modprobe` is asked for it, once.
#[test]
fn the_module_of_the_udp_backend_is_loaded() {
    let node = Node::new(1);
    node.write_conf(&backend(r#"{"Type":"udp"}"#));
    node.write_leases(&[lease(1), lease(2)]);
    let has_fou = node.namespace.enter(|| Fou::open().is_ok());
    let modprobe = node.directory.path().join("modprobe");
    let refusing = "#!/bin/sh\necho \"$@\" >> \"$0.asked\"\necho 'modprobe: FATAL: not this one' >&2\nexit 1\n";
    std::fs::write(&modprobe, refusing).unwrap();
    std::fs::set_permissions(&modprobe, std::fs::Permissions::from_mode(0o755)).unwrap();
    let inherited = std::env::var("PATH").unwrap();
    let path = format!("PATH={}:{inherited}", node.directory.path().display());
    let process = node.start_through(&["env", &path, CONTROLPLANE], &[]);
    node.wait_resolved(&["n2"]);
    let asked = || std::fs::read_to_string(modprobe.with_extension("asked")).unwrap_or_default();
    if has_fou {
        // There is nothing to load.
        wait(&node, "ip route", "dev flannel0");
        assert_eq!(asked(), "");
    } else {
        let reported = || {
            let wanted = "load the module fou (CONFIG_NET_FOU): modprobe: FATAL: not this one";
            let problems = node.state().problems.join("\n");
            problems.contains(wanted).then_some(())
        };
        eventually("what modprobe said is reported", reported);
        // Everything is looked at again; the answer is the same, and nobody is asked again.

        node.namespace.ip("route add 192.0.2.0/24 dev lo");
        node.write_leases(&[lease(1), lease(2), lease(3)]);
        node.wait_resolved(&["n2", "n3"]);
        eventually("and again", reported);
        assert_eq!(asked(), "fou\n");
    }
    stop(process);
}

/// Nodes that announce themselves by BGP have their address on `lo`, and only way stations on their uplinks.
#[test]
fn a_public_ip_on_loopback_is_one_of_the_default_routes_interface() {
    let node = Node::new(1);
    node.write_conf(&dual(r#"{"Type":"vxlan"}"#));
    let floating = |n: u8| {
        let four = Lease {
            public_ip: ip(&format!("10.200.0.{n}")),
            ..lease(n)
        };
        let six = Lease {
            public_ip: ip(&format!("fd00:200::{n}")),
            ..lease6(n)
        };
        [four, six]
    };
    node.write_leases(&[floating(1), floating(2)].concat());
    for setting in [
        "addr add 10.200.0.1/32 dev lo",
        "addr add fd00:200::1/128 dev lo",
        "route add default via 10.199.0.2",
        "route add default via fd00:199::2",
    ] {
        node.namespace.ip(setting);
    }
    let process = node.start();
    node.wait_resolved(&["n2", "n2"]);
    let state = node.state();
    assert_eq!(state.underlay.as_deref(), Some("eth0"));
    assert_eq!(state.public_ips, [ip("10.200.0.1"), ip("fd00:200::1")]);
    assert_eq!(state.pod_mtu, Some(1450));
    wait(
        &node,
        "ip -d link show flannel.1",
        "local 10.200.0.1 dev eth0",
    );
    wait(
        &node,
        "ip -d link show flannel-v6.1",
        "local fd00:200::1 dev eth0",
    );
    let own = node.table_node();
    let addresses: [core::net::IpAddr; 2] = [
        own.v4.unwrap().address.into(),
        own.v6.unwrap().address.into(),
    ];
    assert_eq!(addresses, [ip("10.200.0.1"), ip("fd00:200::1")]);
    stop(process);
}
