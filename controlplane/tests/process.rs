//! The control plane as a process, against a data plane that is played by the test. Needs root.

mod common;

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use common::node::{CONTROLPLANE, FakeDataPlane, Node, wait_exit};
use common::{VXLAN, backend, eventually, lease, lease_file};
use ripstop_controlplane::lease::Lease;

#[test]
fn leases_reach_the_kernel_the_table_and_the_detour() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2), lease(3)]);
    let process = node.start();
    let first = node.wait_resolved(&["n2", "n3"]);
    assert!(
        node.namespace
            .ip("route")
            .contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 82 onlink")
    );
    assert_eq!(node.detour(), "", "no data plane, no detour");
    assert!(!node.namespace.ip("rule").contains("32000"));

    let data_plane = FakeDataPlane::start(&node);
    let took = node.wait_ip("rule", |rules| {
        rules.contains("32000:\tfrom all lookup 21097 proto 82")
    });
    println!("detour open {took:?} after the data plane came");
    let detour = node.detour();
    assert!(
        detour.contains("10.244.2.0/24 dev rip0 proto 82 scope link src 10.244.1.0")
            || detour.contains("10.244.2.0/24 dev rip0 proto 82 src 10.244.1.0"),
        "{detour}"
    );
    assert!(
        node.namespace
            .ip("route get 10.244.2.7")
            .contains("dev rip0")
    );

    // A worker that stands still loses the traffic, but keeps its routes for when it comes back.
    data_plane.stalled.store(true, Ordering::Relaxed);
    let took = node.wait_ip("route get 10.244.2.7", |route| {
        route.contains("dev flannel.1")
    });
    println!("standby takes over {took:?} after the heartbeat stopped");
    data_plane.stalled.store(false, Ordering::Relaxed);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));

    // A lease that workers have not taken up yet is not routed to them.
    data_plane.accept_until.store(first, Ordering::Relaxed);
    let mut added = lease(4);
    added.public_ip = "10.199.0.2".parse().unwrap();
    let start = Instant::now();
    node.write_leases(&[lease(1), lease(2), lease(3), added.clone()]);
    node.wait_resolved(&["n2", "n3", "n4"]);
    println!("lease file written to published: {:?}", start.elapsed());
    node.wait_ip("route get 10.244.4.7", |route| {
        route.contains("dev flannel.1")
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        !node.detour().contains("10.244.4.0/24"),
        "{}",
        node.detour()
    );
    assert!(
        node.namespace
            .ip("route get 10.244.2.7")
            .contains("dev rip0"),
        "others are not disturbed"
    );
    data_plane.accept_until.store(u64::MAX, Ordering::Relaxed);
    node.wait_ip("route get 10.244.4.7", |route| route.contains("dev rip0"));

    // Removed.
    node.write_leases(&[lease(1), lease(2)]);
    node.wait_resolved(&["n2"]);
    node.wait_ip("route show table 21097", |routes| {
        !routes.contains("10.244.3.0/24")
    });
    node.wait_ip("route", |routes| !routes.contains("10.244.3.0/24"));

    // The data plane dies: the main table answers without anybody's doing.
    drop(data_plane);
    assert!(
        node.namespace
            .ip("route get 10.244.2.7")
            .contains("dev flannel.1")
    );
    node.wait_ip("rule", |rules| !rules.contains("32000"));

    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0, "{log}");
    assert!(
        node.namespace.ip("route").contains("10.244.2.0/24"),
        "everything stays"
    );
    assert!(
        log.contains("published") && log.contains("leases loaded"),
        "{log}"
    );
}

#[test]
fn a_restart_adopts_what_it_finds() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let process = node.start();
    let generation = node.wait_resolved(&["n2"]);
    let _data_plane = FakeDataPlane::start(&node);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    process.signal(libc::SIGKILL);
    drop(process);
    let index = node
        .namespace
        .ip("-o link show flannel.1")
        .split(':')
        .next()
        .unwrap()
        .to_owned();
    let process = node.start();
    // Whatever it does, traffic stays where it is.
    for _ in 0..100 {
        assert!(
            node.namespace
                .ip("route get 10.244.2.7")
                .contains("dev rip0")
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(node.fib().unwrap().0, generation, "nothing was published");
    assert_eq!(
        node.namespace
            .ip("-o link show flannel.1")
            .split(':')
            .next()
            .unwrap(),
        index
    );
    process.signal(libc::SIGTERM);
    let (_, log) = wait_exit(process);
    assert!(
        !log.contains("standby path set") && log.contains("adopted"),
        "{log}"
    );
}

#[test]
fn a_bad_lease_file_disturbs_nothing() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let process = node.start();
    node.wait_resolved(&["n2"]);
    let mut overlapping = lease(3);
    overlapping.subnet = "10.244.2.128/25".parse().unwrap();
    let mut elsewhere = lease(1);
    elsewhere.public_ip = "10.199.0.77".parse().unwrap();
    for bad in [
        lease_file(&[lease(1), lease(2)])[..40].to_owned(),
        lease_file(&[lease(1), lease(2), overlapping]),
        lease_file(&[lease(2)]),
        lease_file(&[elsewhere, lease(2)]),
    ] {
        node.write_lease_text(&bad);
        let state =
            |node: &Node| ripstop_controlplane::state::State::read(&node.run_dir()).unwrap();
        let (problem, took) = eventually("the problem is reported", || {
            state(&node).problems.into_iter().next()
        });
        println!("reported after {took:?}: {problem}");
        node.namespace.ip("route del 10.244.2.0/24");
        node.wait_ip("route", |routes| routes.contains("10.244.2.0/24"));
        node.write_leases(&[lease(1), lease(2)]);
        eventually("the problem is gone", || {
            state(&node).problems.is_empty().then_some(())
        });
    }
    // And it goes on from there.
    node.write_leases(&[lease(1), lease(2), lease(3)]);
    node.wait_resolved(&["n2", "n3"]);
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
}

#[test]
fn next_hops_are_followed() {
    let node = Node::new(1);
    // Node 2 is on the link; node 9 is behind a gateway; node 8 has no route, node 7 no answer.
    node.outside.ip("addr add 10.199.0.254/24 dev peer0");
    node.namespace
        .ip("route add 172.16.9.0/24 via 10.199.0.254");
    let far = |n: u8, ip: &str| Lease {
        public_ip: ip.parse().unwrap(),
        ..lease(n)
    };
    node.write_leases(&[
        lease(1),
        lease(2),
        far(9, "172.16.9.9"),
        far(8, "172.16.8.8"),
        far(7, "10.199.0.7"),
    ]);
    let process = node.start();
    node.wait_resolved(&["n2", "n9"]);
    let mac_of = |name: &str| {
        let (_, leases) = node.fib().unwrap();
        leases
            .iter()
            .find(|lease| lease.node_name() == name)
            .unwrap()
            .next_hop_mac
    };
    assert_eq!(mac_of("n2"), [2, 0xbb, 0, 0, 0, 1]);
    assert_eq!(mac_of("n9"), [2, 0xbb, 0, 0, 0, 1]);
    // The entries are ordinary ones.
    assert!(
        !node
            .namespace
            .ip("neigh show dev eth0")
            .contains("PERMANENT")
    );
    // A route appears.
    node.namespace
        .ip("route add 172.16.8.0/24 via 10.199.0.254");
    node.wait_resolved(&["n2", "n8", "n9"]);
    // The gateway's Ethernet address changes, and says so.
    node.outside.ip("link set peer0 address 02:bb:00:00:00:02");
    node.namespace
        .ip("neigh replace 10.199.0.254 lladdr 02:bb:00:00:00:02 dev eth0 nud reachable");
    let (_, took) = eventually("the change is followed", || {
        (mac_of("n9") == [2, 0xbb, 0, 0, 0, 2]).then_some(())
    });
    println!("neighbour change followed after {took:?}");
    // A neighbour fails.
    node.namespace
        .ip("neigh replace 10.199.0.2 dev eth0 nud failed");
    eventually("n2 comes back by itself", || {
        (mac_of("n2") == [2, 0xbb, 0, 0, 0, 2]).then_some(())
    });
    // A static entry of the operator is used and left alone.
    node.namespace
        .ip("neigh replace 10.199.0.7 lladdr 02:bb:00:00:00:07 dev eth0 nud permanent");
    node.wait_resolved(&["n2", "n7", "n8", "n9"]);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(
        node.namespace
            .ip("neigh show 10.199.0.7")
            .contains("PERMANENT")
    );
    // The route goes.
    node.namespace.ip("route del 172.16.9.0/24");
    node.wait_resolved(&["n2", "n7", "n8"]);
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
}

#[test]
fn what_others_delete_is_back_within_a_second() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let process = node.start();
    node.wait_resolved(&["n2"]);
    let _data_plane = FakeDataPlane::start(&node);
    node.wait_ip("rule", |rules| rules.contains("32000"));
    eventually("the filter", || {
        node.namespace
            .try_command("nft", "list table ip ripstop")
            .status
            .success()
            .then_some(())
    });
    for (damage, look, sign) in [
        (
            "ip link del flannel.1",
            "ip neigh show dev flannel.1",
            "10.244.2.0 lladdr 02:52:53:00:00:02 PERMANENT",
        ),
        (
            "ip link set flannel.1 address 02:99:99:99:99:99",
            "ip link show flannel.1",
            "02:52:53:00:00:01",
        ),
        (
            "ip link set flannel.1 down",
            "ip route show dev flannel.1",
            "10.244.2.0/24",
        ),
        ("ip route del 10.244.2.0/24", "ip route", "10.244.2.0/24"),
        (
            "ip neigh del 10.244.2.0 dev flannel.1",
            "ip neigh show dev flannel.1",
            "10.244.2.0",
        ),
        (
            "bridge fdb del 02:52:53:00:00:02 dev flannel.1 self",
            "bridge fdb show dev flannel.1",
            "dst 10.199.0.2",
        ),
        ("ip rule del pref 32000", "ip rule", "32000"),
        (
            "ip route flush table 21097",
            "ip route get 10.244.2.7",
            "rip0",
        ),
        (
            "ip addr del 10.244.1.0/32 dev flannel.1",
            "ip addr show flannel.1",
            "10.244.1.0/32",
        ),
        (
            "nft delete table ip ripstop",
            "nft list table ip ripstop",
            "standby_unknown_peer",
        ),
        (
            "nft flush ruleset",
            "nft list table ip ripstop",
            "standby_unknown_peer",
        ),
        (
            "nft flush set ip ripstop peers",
            "nft list table ip ripstop",
            "10.199.0.2",
        ),
    ] {
        let (program, arguments) = damage.split_once(' ').unwrap();
        node.namespace.command(program, arguments);
        let (program, arguments) = look.split_once(' ').unwrap();
        let (_, took) = eventually(damage, || {
            let output = node.namespace.try_command(program, arguments);
            String::from_utf8_lossy(&output.stdout)
                .contains(sign)
                .then_some(())
        });
        println!("{damage}: healed after {took:?}");
        node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    }
    // The NIC flaps: the kernel drops what hangs on it.
    node.namespace.ip("link set eth0 down");
    std::thread::sleep(Duration::from_millis(300));
    node.namespace.ip("link set eth0 up");
    node.wait_ip("route", |routes| routes.contains("10.244.2.0/24"));
    node.wait_resolved(&["n2"]);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
}

#[test]
fn bad_starts_say_why() {
    let node = Node::new(1);
    let process = node.namespace.spawn(CONTROLPLANE, &["--no-such-flag"]);
    assert_eq!(wait_exit(process).0, 2);
    node.write_conf(&backend(r#"{"Type":"wireguard"}"#));
    let (code, log) = wait_exit(node.start());
    assert_eq!(code, 1);
    assert!(
        log.contains("net-conf.json") && log.contains("\"wireguard\" is not implemented"),
        "{log}"
    );
    node.write_conf(VXLAN);
    // No lease file: it waits, and goes on when there is one.
    let process = node.start();
    eventually("the problem is reported", || {
        let state = ripstop_controlplane::state::State::read(&node.run_dir()).ok()?;
        state
            .problems
            .iter()
            .any(|problem| problem.contains("leases.json"))
            .then_some(())
    });
    node.write_leases(&[lease(1), lease(2)]);
    node.wait_resolved(&["n2"]);
    // A second one on the same directory.
    let (code, log) = wait_exit(node.start());
    assert_eq!(code, 1);
    assert!(log.contains("in use by process"), "{log}");
    process.signal(libc::SIGINT);
    assert_eq!(wait_exit(process).0, 0);
    // A region of something else.
    std::fs::write(node.run_dir().join("fib"), vec![7; 4096]).unwrap();
    let (code, log) = wait_exit(node.start());
    assert_eq!(code, 1);
    assert!(
        log.contains("wrong magic") && log.contains("remove the file"),
        "{log}"
    );
}

#[test]
fn the_operator_sees_and_cleans_up() {
    let node = Node::new(1);
    let (text, code) = node.cli("status");
    assert!(
        code == 1 && text.contains("has not run on this node") && text.contains("--run-dir"),
        "{text}"
    );
    assert_eq!(node.cli("frobnicate").1, 2);
    node.write_leases(&[
        lease(1),
        lease(2),
        Lease {
            public_ip: "172.16.8.8".parse().unwrap(),
            ..lease(3)
        },
    ]);
    let process = node.start();
    node.wait_resolved(&["n2"]);
    let (text, code) = node.cli("status");
    assert_eq!(code, 1, "no data plane is a problem: {text}");
    for part in [
        "control plane  running",
        "data plane     not running",
        "1 of 2 peers resolved",
        "path           standby",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let data_plane = FakeDataPlane::start(&node);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    // The guard comes after the filter.
    eventually("filter and guard", || {
        node.namespace
            .try_command("nft", "list table inet ripstop-guard")
            .status
            .success()
            .then_some(())
    });
    let (text, code) = node.cli("status --interval 0.1");
    println!("{text}");
    assert_eq!(code, 0, "{text}");
    for part in [
        "path           mixed",
        "rip0 present, rule present, 1 routes",
        "peer filter present; guard on",
        "copy",
        "n3 (172.16.8.8): no route",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let (text, code) = node.cli("status --json --interval 0");
    assert_eq!(code, 0, "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["dataPlane"]["workers"][0]["mode"], "copy");
    assert_eq!(json["path"]["inUse"], "mixed");
    let (text, _) = node.cli("leases");
    println!("{text}");
    let line = |name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .unwrap()
            .to_owned()
    };
    assert!(
        line("n1").contains("own") && line("n1").contains("local"),
        "{text}"
    );
    assert!(
        line("n2").contains("tunnel  02:bb:00:00:00:01  resolved    worker"),
        "{text}"
    );
    assert!(line("n3").contains("unresolved  standby"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&node.cli("leases --json").0).unwrap();
    assert_eq!(json["leases"][1]["publicIp"], "10.199.0.2");
    let (text, code) = node.cli("drops");
    assert_eq!((text.as_str(), code), ("nothing was dropped\n", 0));
    let (text, _) = node.cli("drops --all");
    println!("{text}");
    for part in [
        "unknown_peer",
        "standby_unknown_peer",
        "rx_ring_full",
        "other_vni",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    // Nothing is torn down under a process that runs.
    let (text, code) = node.cli("cleanup");
    assert!(
        code == 1 && text.contains("the control plane runs"),
        "{text}"
    );
    process.signal(libc::SIGKILL);
    drop(process);
    let (text, code) = node.cli("status");
    assert!(
        code == 1 && text.contains("control plane  not running"),
        "{text}"
    );
    let (text, _) = node.cli("cleanup");
    assert!(text.contains("the data plane runs"), "{text}");
    drop(data_plane);
    let foreign = [
        "rule add pref 31000 lookup 100",
        "route add 192.168.9.0/24 via 10.199.0.2 proto static",
    ];
    for command in foreign {
        node.namespace.ip(command);
    }
    node.namespace.command("nft", "add table ip somebody");
    let (text, code) = node.cli("cleanup");
    println!("{text}");
    assert_eq!(code, 0, "{text}");
    assert!(!node.run_dir().exists(), "{text}");
    assert!(!node.namespace.ip("rule").contains("21097"));
    assert!(
        !node
            .namespace
            .command("nft", "list tables")
            .contains("ripstop")
    );
    assert!(
        node.namespace
            .ip("route")
            .contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1"),
        "as flannel leaves it"
    );
    let (text, code) = node.cli("cleanup --standby");
    assert!(code == 0 && text.contains("device flannel.1"), "{text}");
    assert!(
        !node.namespace.ip("route").contains("10.244."),
        "the standby is gone"
    );
    assert!(
        node.namespace.ip("route").contains("192.168.9.0/24")
            && node.namespace.ip("rule").contains("31000")
    );
    assert!(
        node.namespace
            .command("nft", "list tables")
            .contains("somebody")
    );
    assert_eq!(
        node.cli("cleanup --standby").0,
        "nothing of Ripstop's was found\n"
    );
}

#[test]
fn fifteen_thousand_leases_take_effect() {
    let node = Node::new(1);
    let conf = r#"{"Network":"10.0.0.0/9","Backend":{"Type":"vxlan"}}"#;
    node.write_conf(conf);
    node.outside.ip("addr add 10.199.0.254/24 dev peer0");
    node.namespace
        .ip("route add 172.16.0.0/16 via 10.199.0.254");
    let own = Lease {
        subnet: "10.127.0.0/24".parse().unwrap(),
        ..lease(1)
    };
    let mut all: Vec<Lease> = (0..15_000u32)
        .map(|i| {
            let [_, _, high, low] = i.to_be_bytes();
            Lease {
                node: format!("node-{i:05}").into(),
                public_ip: core::net::Ipv4Addr::from(0xac10_0000 + i).into(),
                subnet: ipnet::Ipv4Net::new(core::net::Ipv4Addr::from(0x0a00_0000 + (i << 8)), 24)
                    .unwrap()
                    .into(),
                vtep_mac: Some(ripstop_controlplane::mac::Mac([
                    2, 0x52, 0x54, 0, high, low,
                ])),
            }
        })
        .collect();
    all.push(own);
    node.write_leases(&all);
    let start = Instant::now();
    let process = node.start();
    let resolved = |wanted: usize| {
        eventually("all are resolved", || {
            let (generation, leases) = node.fib()?;
            let resolved = leases
                .iter()
                .filter(|lease| lease.resolved && !lease.local)
                .count();
            (resolved == wanted).then_some(generation)
        })
        .0
    };
    resolved(15_000);
    println!(
        "15,000 leases: started to published, resolved: {:?}",
        start.elapsed()
    );
    let routes = |arguments: &str| {
        let output = node.namespace.try_command("ip", arguments);
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    eventually("the standby is programmed", || {
        (routes("route show dev flannel.1") == 15_000).then_some(())
    });
    println!("standby programmed: {:?}", start.elapsed());
    let _data_plane = FakeDataPlane::start(&node);
    eventually("the detour is programmed", || {
        (routes("route show table 21097") == 15_000).then_some(())
    });
    println!("detour programmed: {:?}", start.elapsed());
    // One lease goes.
    let start = Instant::now();
    all.remove(0);
    node.write_leases(&all);
    resolved(14_999);
    println!("one lease removed, published: {:?}", start.elapsed());
    eventually("the standby follows", || {
        (routes("route show dev flannel.1") == 14_999).then_some(())
    });
    println!("one lease removed, standby followed: {:?}", start.elapsed());
    std::thread::sleep(Duration::from_secs(6));
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0, "{log}");
    println!("{log}");
}
