//! The guard against pods that send in the name of nodes, on a real kernel. Needs root and nftables.
//!
//! ```text
//!   pod (10.244.1.5, forges what it likes) ── cni0 ── node ── eth0 ──┬── outside (peer0: 10.199.0.2, .3; peer1)
//!                                                        └─── eth1 ──┘
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::net::IpAddr;
use core::time::Duration;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Instant;

use common::node::{CONTROLPLANE, Node, wait_exit};
use common::{Namespace, Process, conf, dual, eventually, ip, lease, lease6, leases};
use ripstop_controlplane::guard::Guard;
use ripstop_controlplane::rules::{self, Filter, FilterKeeper};

const PORT: u16 = 9999;
/// How long what must arrive may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node with a pod and two uplinks, and what receives outside.
struct Lab {
    node: Node,
    pod: Namespace,
    receivers: [UdpSocket; 2],
}

fn lab() -> Lab {
    let node = Node::new(1);
    node.write_conf(&dual(r#"{"Type":"host-gw"}"#));
    let mut all: Vec<_> = (1..=5).map(lease).collect();
    all.extend((1..=5).map(lease6));
    node.write_leases(&all);
    let (namespace, outside, pod) = (&node.namespace, &node.outside, Namespace::new());
    namespace.ip(&format!(
        "link add cni0 type veth peer name eth0 netns {}",
        pod.name
    ));
    namespace.ip(&format!(
        "link add eth1 type veth peer name peer1 netns {}",
        outside.name
    ));
    for (host, setting) in [
        (namespace, "addr add 10.244.1.1/24 dev cni0"),
        (namespace, "addr add fd00:10:244:1::1/64 dev cni0 nodad"),
        (namespace, "addr add 10.198.0.1/24 dev eth1"),
        (namespace, "link set cni0 up"),
        (namespace, "link set eth1 up"),
        (outside, "addr add 10.198.0.2/24 dev peer1"),
        (outside, "link set peer1 up"),
        // A node that sends by the other uplink.
        (outside, "addr add 10.199.0.4/32 dev lo"),
        (outside, "route add 10.244.1.0/24 via 10.198.0.1"),
        (&pod, "link set eth0 address 02:cc:00:00:00:05"),
        (&pod, "addr add 10.244.1.5/24 dev eth0"),
        (&pod, "addr add fd00:10:244:1::5/64 dev eth0 nodad"),
        (&pod, "link set eth0 up"),
        (&pod, "route add default via 10.244.1.1"),
        (&pod, "route add default via fd00:10:244:1::1"),
    ] {
        host.ip(setting);
    }
    for setting in [
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.eth0.rp_filter=0",
        "net.ipv4.conf.eth1.rp_filter=0",
        "net.ipv4.conf.cni0.rp_filter=0",
    ] {
        namespace.command("sysctl", &format!("-qw {setting}"));
    }
    let receivers = ["10.199.0.2", "fd00:199::2"].map(|address| receiver(outside, address));
    Lab {
        node,
        pod,
        receivers,
    }
}

fn receiver(host: &Namespace, address: &str) -> UdpSocket {
    let socket = host.enter(|| UdpSocket::bind((address, PORT)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends from any address that the host has.
fn send(host: &Namespace, from: &str, to: &str, payload: &[u8]) {
    host.enter(|| {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        socket.send_to(payload, (to, PORT)).unwrap();
    });
}

fn next(receiver: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 64];
    let length = receiver.recv(&mut buffer).expect("a packet");
    buffer[..length].to_vec()
}

fn dropped(node: &Namespace) -> Option<u64> {
    let count = node.enter(rules::guard_count).unwrap();
    count.map(|count| count.packets)
}

/// The tables with their handles, by which one is told from another in its place.
fn handles(node: &Namespace) -> String {
    let tables = node.command("nft", "-j list tables");
    assert!(tables.contains("\"handle\""), "{tables}");
    tables
}

impl Lab {
    /// Waits until these interfaces, and no others, are watched.
    fn wait_watched(&self, interfaces: &str) {
        eventually(&format!("{interfaces} watched"), || {
            let output = self
                .node
                .namespace
                .try_command("nft", "list set inet ripstop-guard pods");
            let text = String::from_utf8_lossy(&output.stdout);
            let elements = text.lines().find_map(|line| {
                line.trim()
                    .strip_prefix("elements = { ")?
                    .strip_suffix(" }")
            });
            (output.status.success() && elements.unwrap_or_default() == interfaces).then_some(())
        });
    }

    /// The pod sends as `from`, which it has been given: it arrives or is dropped and counted.
    fn pod_sends(&self, from: &str, arrives: bool) {
        let six = usize::from(from.contains(':'));
        let to = ["10.199.0.2", "fd00:199::2"][six];
        let own = ["10.244.1.5", "fd00:10:244:1::5"][six];
        let before = dropped(&self.node.namespace).unwrap();
        send(&self.pod, from, to, from.as_bytes());
        let mut counted = 0;
        if arrives {
            assert_eq!(next(&self.receivers[six]), from.as_bytes());
        } else {
            counted = 1;
            eventually(&format!("{from} is counted"), || {
                (dropped(&self.node.namespace)? > before).then_some(())
            });
        }
        // The pod's own go on, and nothing is in front of them.
        send(&self.pod, own, to, own.as_bytes());
        assert_eq!(next(&self.receivers[six]), own.as_bytes(), "after {from}");
        let after = dropped(&self.node.namespace).unwrap();
        assert_eq!(after, before + counted, "{from}");
    }
}

#[test]
fn a_pod_cannot_send_in_the_name_of_a_node() {
    let lab = lab();
    for address in ["10.199.0.1", "10.199.0.5", "10.199.0.77", "10.198.0.4"] {
        lab.pod.ip(&format!("addr add {address}/32 dev lo"));
    }
    for address in ["fd00:199::1", "fd00:199::5", "fd00:199::77"] {
        lab.pod.ip(&format!("addr add {address}/128 dev lo nodad"));
    }
    let namespace = &lab.node.namespace;
    let process = lab.node.start();
    lab.wait_watched("\"cni0\"");
    for (from, arrives) in [
        ("10.199.0.5", false),
        ("10.199.0.1", false),
        ("fd00:199::5", false),
        ("fd00:199::1", false),
        // Who is no node is not the guard's business.
        ("10.199.0.77", true),
        ("10.198.0.4", true),
        ("fd00:199::77", true),
    ] {
        lab.pod_sends(from, arrives);
    }
    let (text, code) = lab.node.cli("status --json --interval 0");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (
            &json["path"]["guard"]["on"],
            &json["path"]["guard"]["dropped"]
        ),
        (&true.into(), &4.into()),
        "{code}: {text}"
    );
    assert!(
        lab.node
            .cli("status --interval 0")
            .0
            .contains("guard on, 4 dropped")
    );
    let (text, _) = lab.node.cli("drops");
    assert!(text.contains("guard_node_source"), "{text}");

    // What leads back by the pod's interface is legitimate, by that alone or among others.
    namespace.ip("route add 10.199.0.5/32 via 10.244.1.5");
    lab.pod_sends("10.199.0.5", true);
    namespace.ip("route replace 10.199.0.5/32 nexthop via 10.199.0.3 nexthop via 10.244.1.5");
    lab.pod_sends("10.199.0.5", true);
    namespace.ip("route del 10.199.0.5/32");
    lab.pod_sends("10.199.0.5", false);

    // A node's packet to a pod by an uplink that leads nowhere, and what the node itself sends.
    let at_pod = receiver(&lab.pod, "10.244.1.5");
    send(&lab.node.outside, "10.199.0.4", "10.244.1.5", b"uplink");
    assert_eq!(next(&at_pod), b"uplink");
    lab.pod.ip("addr del 10.199.0.1/32 dev lo");
    send(namespace, "10.199.0.1", "10.244.1.5", b"node");
    assert_eq!(next(&at_pod), b"node");
    send(namespace, "10.199.0.1", "10.199.0.1", b"nobody");
    assert_eq!(dropped(namespace), Some(5));

    // Others take it away, in part or whole; the node restarts; each time it is as before.
    namespace.command("nft", "delete element inet ripstop-guard pods { cni0 }");
    lab.wait_watched("\"cni0\"");
    lab.pod_sends("10.199.0.5", false);
    process.signal(libc::SIGKILL);
    drop(process);
    lab.pod_sends("10.199.0.5", false);
    let (counted, before) = (dropped(namespace).unwrap(), handles(namespace));
    let process = lab.node.start();
    eventually("another table in its place", || {
        (handles(namespace) != before).then_some(())
    });
    assert_eq!(dropped(namespace), Some(counted), "the counter goes on");
    namespace.command("nft", "delete table inet ripstop-guard");
    lab.wait_watched("\"cni0\"");
    lab.pod_sends("10.199.0.5", false);

    // Interfaces and nodes come and go.
    namespace.ip("addr del 10.244.1.1/24 dev cni0");
    namespace.ip("addr del fd00:10:244:1::1/64 dev cni0");
    lab.wait_watched("");
    namespace.ip("link set cni0 down");
    namespace.ip("link set cni0 name cbr0");
    namespace.ip("link set cbr0 up");
    namespace.ip("addr add 10.244.1.1/24 dev cbr0");
    namespace.ip("addr add fd00:10:244:1::1/64 dev cbr0 nodad");
    lab.wait_watched("\"cbr0\"");
    lab.pod_sends("10.199.0.5", false);
    let fewer: Vec<_> = (1..=4).flat_map(|n| [lease(n), lease6(n)]).collect();
    lab.node.write_leases(&fewer);
    eventually("n5 is forgotten", || {
        let text = namespace.command("nft", "list set inet ripstop-guard nodes6");
        (!text.contains("fd00:199::5")).then_some(())
    });
    lab.pod_sends("10.199.0.5", true);
    lab.pod_sends("fd00:199::5", true);

    // It stays at exit, and goes with a cleanup.
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
    assert!(dropped(namespace).is_some());
    let (text, code) = lab.node.cli("cleanup");
    assert!(
        text.contains("removed guard (nftables table ripstop-guard)"),
        "{text}"
    );
    assert_eq!((code, dropped(namespace)), (0, None), "{text}");
}

#[test]
fn the_guard_can_be_switched_off() {
    let lab = lab();
    let process = lab.node.start();
    lab.wait_watched("\"cni0\"");
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
    let _process = lab
        .node
        .start_through(&["env", "RIPSTOP_GUARD=off", CONTROLPLANE], &[]);
    eventually("the guard is away", || {
        dropped(&lab.node.namespace).is_none().then_some(())
    });
    let (text, _) = lab.node.cli("status --json --interval 0");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["path"]["guard"]["on"], false, "{text}");
    assert!(!text.contains("guard is missing"), "{text}");
}

/// With an `nft` that refuses `fib`, as where the kernel lacks it: one warning, the filter, and all the rest.
#[test]
fn a_kernel_without_the_expression_gets_one_warning() {
    const REFUSING: &str = r#"#!/bin/sh
[ "$1" = -f ] || exec /usr/sbin/nft "$@"
input=$(cat)
case "$input" in *fib*)
    echo attempt >> "$0.attempts"
    echo 'Error: Could not process rule: No such file or directory' >&2
    exit 1
esac
printf '%s\n' "$input" | /usr/sbin/nft -f -
"#;
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let nft = node.directory.path().join("nft");
    std::fs::write(&nft, REFUSING).unwrap();
    std::fs::set_permissions(&nft, std::fs::Permissions::from_mode(0o755)).unwrap();
    let inherited = std::env::var("PATH").unwrap();
    let path = format!("PATH={}:{inherited}", node.directory.path().display());
    let process = node.start_through(&["env", &path, CONTROLPLANE], &[]);
    let warning = "does the kernel have nft_fib_inet";
    eventually("two attempts, the problem, and the filter", || {
        let attempts = std::fs::read_to_string(nft.with_extension("attempts")).unwrap_or_default();
        let problems = node.state().problems.join("\n");
        let list = node
            .namespace
            .try_command("nft", "list set ip ripstop peers");
        let filter = String::from_utf8_lossy(&list.stdout).contains("10.199.0.2");
        (attempts.lines().count() > 1 && problems.contains(warning) && filter).then_some(())
    });
    check_all_but_the_guard(&node, process, warning);
}

/// Without the program: one warning, and all the rest.
#[test]
fn without_nft_there_is_one_warning() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let hide = "mount -t tmpfs none /usr/sbin && exec \"$@\"";
    let process = node.start_through(
        &["unshare", "-m", "sh", "-c", hide, "sh", CONTROLPLANE],
        &[],
    );
    let warning = "install the package nftables";
    eventually("the problem is known", || {
        let problems = node.state().problems.join("\n");
        problems.contains(warning).then_some(())
    });
    check_all_but_the_guard(&node, process, warning);
}

fn check_all_but_the_guard(node: &Node, process: Process, warning: &str) {
    node.wait_resolved(&["n2"]);
    node.wait_ip("route", |text| {
        text.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1")
    });
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0);
    assert_eq!(log.matches(warning).count(), 1, "{log}");
}

/// With as many nodes as a cluster may have, a change costs what it changes.
#[test]
fn fifteen_thousand_nodes_are_changed_one_by_one() {
    const NODES: u32 = 15_000;
    let namespace = Namespace::new();
    let guard = |first: u32| Guard {
        nodes: Arc::new(
            (first..first + NODES)
                .map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes()))
                .chain([ip("fd00:199::1")])
                .collect(),
        ),
        interfaces: ["cni0".to_owned()].into(),
    };
    let keeper = namespace.enter(|| FilterKeeper::start().unwrap());
    let base = Filter::new(
        &leases(1, &[]),
        &conf(&common::backend(r#"{"Type":"host-gw"}"#)),
    );
    let shown = |address: &str| {
        let arguments = format!("get element inet ripstop-guard nodes {{ {address} }}");
        namespace.try_command("nft", &arguments).status.success()
    };
    let start = Instant::now();
    keeper.set(Filter {
        guard: Some(guard(1)),
        ..base
    });
    eventually("all are there", || shown("10.0.58.152").then_some(()));
    println!("{NODES} nodes: {:?}", start.elapsed());
    let before = handles(&namespace);
    let start = Instant::now();
    keeper.set_guard(Some(guard(2)));
    eventually("the change is there", || {
        (shown("10.0.58.153") && !shown("10.0.0.1")).then_some(())
    });
    println!("one of them changed: {:?}", start.elapsed());
    assert!(shown("10.0.0.2"));
    assert_eq!(handles(&namespace), before, "the table is the same");
    assert_eq!(keeper.problem(), None);
}
