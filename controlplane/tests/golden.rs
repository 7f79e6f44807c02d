//! What flannel v0.28.9 was recorded to leave on a node and to write elsewhere, and that the program does the same on a node
//! with the same addresses. Each deviation is a line of `DEVIATIONS`, or stands in the test with its reason.
//!
//! Formats that no program run shows are compared beside the code that writes them; `README.md` has the list, and the
//! last test here holds it to the truth. Needs root, for network namespaces.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;

use common::api::Api;
use common::node::{CONTROLPLANE, Node};
use common::{Process, eventually};
use serde_json::Value;

/// What `ip` and the others showed, and what they show of ours.
const DEVIATIONS: [(&str, &str); 3] = [
    // Our routes have a protocol of their own, by which stale ones are told from an operator's.
    ("proto boot scope global", "proto 82 scope global"),
    (
        "dev flannel-v6.1 metric 1024 onlink",
        "dev flannel-v6.1 proto 82 metric 1024 onlink",
    ),
    // VXLAN over IPv6 takes 70 bytes, and pods are told so.
    (
        "FLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64\nFLANNEL_MTU=1450",
        "FLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64\nFLANNEL_MTU=1430",
    ),
];

/// Masquerade and forward rules as `iptables-save` showed them.
const RULES: &str = include_str!("recorded/iptables.txt");

/// The same in nftables; two of the rules are ours, because flannel's do not mean what they do in iptables.
const NFT_RULES: &str = include_str!("recorded/nftables.txt");

/// What was recorded with one `net-conf.json`.
struct Recorded {
    net_conf: &'static str,
    /// Annotations of node1 and of node2, without flannel's prefix.
    annotations: [&'static [(&'static str, &'static str)]; 2],
    subnet_env: &'static str,
    /// Beginnings of the lines that `ip -d addr show` prints of each device.
    devices: &'static [(&'static str, &'static [&'static str])],
    /// Command and all that it prints.
    tables: &'static [(&'static str, &'static str)],
}

const VXLAN: Recorded = Recorded {
    net_conf: r#"{"Network":"10.244.0.0/16","EnableNFTables":false,"Backend":{"Type":"vxlan"}}"#,
    annotations: [
        &[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"ee:a0:a2:5f:df:49"}"#),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.11"),
        ],
        &[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"12:d3:27:c5:15:72"}"#),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.12"),
        ],
    ],
    subnet_env: "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    devices: &[(
        "flannel.1",
        &[
            "flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN group default",
            "link/ether ee:a0:a2:5f:df:49",
            "vxlan id 1 local 10.199.0.11 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
            "inet 10.244.1.0/32 scope global flannel.1",
            "inet6 fe80::eca0:a2ff:fe5f:df49/64 scope link",
        ],
    )],
    tables: &[
        (
            "ip -d route show root 10.244.0.0/16",
            "unicast 10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto boot scope global onlink",
        ),
        (
            "ip neigh show dev flannel.1",
            "10.244.2.0 lladdr 12:d3:27:c5:15:72 PERMANENT",
        ),
        (
            "bridge fdb show dev flannel.1",
            "12:d3:27:c5:15:72 dst 10.199.0.12 self permanent",
        ),
    ],
};

const DUAL_STACK: Recorded = Recorded {
    net_conf: r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd10:244::/48","EnableNFTables":false,"Backend":{"Type":"vxlan"}}"#,
    annotations: [
        &[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"1a:27:39:74:99:2a"}"#),
            ("backend-type", "vxlan"),
            (
                "backend-v6-data",
                r#"{"VNI":1,"VtepMAC":"02:1b:d1:d6:d6:01"}"#,
            ),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.11"),
            ("public-ipv6", "fd99::11"),
        ],
        &[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"62:7d:0d:47:73:b6"}"#),
            ("backend-type", "vxlan"),
            (
                "backend-v6-data",
                r#"{"VNI":1,"VtepMAC":"72:aa:e6:09:50:42"}"#,
            ),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.12"),
            ("public-ipv6", "fd99::12"),
        ],
    ],
    subnet_env: "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd10:244::/48\n\
        FLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    devices: &[
        (
            "flannel.1",
            &[
                "flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN group default",
                "link/ether 1a:27:39:74:99:2a",
                "vxlan id 1 local 10.199.0.11 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
                "inet 10.244.1.0/32 scope global flannel.1",
                "inet6 fe80::1827:39ff:fe74:992a/64 scope link",
            ],
        ),
        (
            "flannel-v6.1",
            &[
                "flannel-v6.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1430 qdisc noqueue state UNKNOWN group default",
                "link/ether 02:1b:d1:d6:d6:01",
                "vxlan id 1 local fd99::11 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
                "inet6 fd10:244:0:1::/128 scope global",
                "inet6 fe80::1b:d1ff:fed6:d601/64 scope link",
            ],
        ),
    ],
    tables: &[
        (
            "ip -d route show root 10.244.0.0/16",
            "unicast 10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto boot scope global onlink",
        ),
        (
            "ip -6 route show root fd10:244:0:2::/64",
            "fd10:244:0:2::/64 via fd10:244:0:2:: dev flannel-v6.1 metric 1024 onlink pref medium",
        ),
        (
            "ip neigh show dev flannel.1",
            "10.244.2.0 lladdr 62:7d:0d:47:73:b6 PERMANENT",
        ),
        (
            "ip neigh show dev flannel-v6.1",
            "fd10:244:0:2:: lladdr 72:aa:e6:09:50:42 PERMANENT",
        ),
        (
            "bridge fdb show dev flannel.1",
            "62:7d:0d:47:73:b6 dst 10.199.0.12 self permanent",
        ),
        (
            "bridge fdb show dev flannel-v6.1",
            "72:aa:e6:09:50:42 dst fd99::12 self permanent",
        ),
    ],
};

const DIRECT_ROUTING: Recorded = Recorded {
    net_conf: r#"{"Network":"10.244.0.0/16","EnableNFTables":false,"Backend":{"Type":"vxlan","VNI":4096,"Port":4789,"DirectRouting":true}}"#,
    annotations: [
        &[
            (
                "backend-data",
                r#"{"VNI":4096,"VtepMAC":"a6:39:3a:e8:b8:c4"}"#,
            ),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.11"),
        ],
        &[
            (
                "backend-data",
                r#"{"VNI":4096,"VtepMAC":"0e:49:f5:7b:5f:8c"}"#,
            ),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.12"),
        ],
    ],
    subnet_env: VXLAN.subnet_env,
    devices: &[(
        "flannel.4096",
        &[
            "flannel.4096: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN group default",
            "link/ether a6:39:3a:e8:b8:c4",
            "vxlan id 4096 local 10.199.0.11 dev eth0 srcport 0 0 dstport 4789 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx",
            "inet 10.244.1.0/32 scope global flannel.4096",
            "inet6 fe80::a439:3aff:fee8:b8c4/64 scope link",
        ],
    )],
    tables: &[
        (
            "ip -d route show root 10.244.0.0/16",
            "unicast 10.244.2.0/24 via 10.199.0.12 dev eth0 proto boot scope global",
        ),
        ("ip neigh show dev flannel.4096", ""),
        ("bridge fdb show dev flannel.4096", ""),
    ],
};

const HOST_GW: Recorded = Recorded {
    net_conf: r#"{"Network":"10.244.0.0/16","EnableNFTables":false,"Backend":{"Type":"host-gw"}}"#,
    annotations: [
        &[
            ("backend-data", "null"),
            ("backend-type", "host-gw"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.11"),
        ],
        &[
            ("backend-data", "null"),
            ("backend-type", "host-gw"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "10.199.0.12"),
        ],
    ],
    subnet_env: "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=true\n",
    devices: &[],
    tables: &[(
        "ip -d route show root 10.244.0.0/16",
        "unicast 10.244.2.0/24 via 10.199.0.12 dev eth0 proto boot scope global",
    )],
};

/// What was recorded, as it has to be of ours.
fn ours(recorded: &str) -> String {
    let replace = |text: String, (theirs, ours): &(&str, &str)| text.replace(theirs, ours);
    DEVIATIONS.iter().fold(recorded.to_owned(), replace)
}

fn annotations(pairs: &[(&str, &str)]) -> Value {
    let named = |(key, value): &(&str, &str)| {
        (
            format!("flannel.alpha.coreos.com/{key}"),
            Value::from(*value),
        )
    };
    let mut all: serde_json::Map<String, Value> = pairs.iter().map(named).collect();
    let of_the_kubelet = "volumes.kubernetes.io/controller-managed-attach-detach";
    all.insert(of_the_kubelet.to_owned(), "true".into());
    all.into()
}

/// node1 as it was recorded, before flannel has run there; what its annotation says of the MAC addresses is kept, so that
/// they are the recorded ones.
fn start(recorded: &Recorded) -> (Node, Api, Process) {
    let node = Node::new(11);
    for command in [
        "-6 addr flush dev eth0 scope global",
        "addr add fd99::11/64 dev eth0 nodad",
        "route add default via 10.199.0.1",
        "-6 route add default via fd99::1",
    ] {
        node.namespace.ip(command);
    }
    node.write_conf(recorded.net_conf);
    let api = Api::serve(
        node.namespace
            .enter(|| TcpListener::bind("127.0.0.1:0").unwrap()),
    );
    let cidrs = |n: u8| [format!("10.244.{n}.0/24"), format!("fd10:244:0:{n}::/64")];
    let [own, peer] = recorded.annotations;
    let data: Vec<(&str, &str)> = own
        .iter()
        .filter(|(key, _)| key.ends_with("data"))
        .copied()
        .collect();
    for (name, n, annotations) in [
        ("node1", 1, annotations(&data)),
        ("node2", 2, annotations(peer)),
    ] {
        let [first, second] = cidrs(n);
        let families = if recorded.net_conf.contains("IPv6") {
            2
        } else {
            1
        };
        api.create(name, &[first.as_str(), &second][..families], &annotations);
    }
    let path = |name: &str| node.directory.path().join(name).display().to_string();
    std::fs::write(path("kubeconfig"), api.kubeconfig()).unwrap();
    let process = node.namespace.spawn(
        CONTROLPLANE,
        &[
            "--ip-masq",
            "--kube-subnet-mgr",
            &format!("--net-config-path={}", path("net-conf.json")),
            &format!("--subnet-file={}", path("subnet.env")),
            &format!("--run-dir={}", path("run")),
            &format!("--kubeconfig-file={}", path("kubeconfig")),
            "--node-name=node1",
        ],
    );
    (node, api, process)
}

/// Runs the program until everything is as recorded; says what is not.
fn is_as_recorded(recorded: &Recorded) {
    let (node, api, _process) = start(recorded);
    let wait = |what: &str, actual: &dyn Fn() -> String, wanted: &str| {
        let start = std::time::Instant::now();
        loop {
            let actual = actual();
            if actual == wanted {
                return;
            }
            if start.elapsed() > core::time::Duration::from_secs(30) {
                assert_eq!(actual, wanted, "{what} with {}", recorded.net_conf);
            }
            std::thread::sleep(core::time::Duration::from_millis(50));
        }
    };
    let wanted = annotations(recorded.annotations[0]);
    wait(
        "annotations",
        &|| format!("{:#}", api.node("node1")["metadata"]["annotations"]),
        &format!("{wanted:#}"),
    );
    let file = node.directory.path().join("subnet.env");
    wait(
        "subnet.env",
        &|| std::fs::read_to_string(&file).unwrap_or_default(),
        &ours(recorded.subnet_env),
    );
    for (name, lines) in recorded.devices {
        let wanted: Vec<String> = lines.iter().map(ToString::to_string).collect();
        let shown = || {
            let output = node
                .namespace
                .try_command("ip", &format!("-d addr show {name}"))
                .stdout;
            let text = String::from_utf8(output).unwrap();
            let found = lines.iter().filter(|line| {
                text.lines().any(|shown| {
                    let shown = shown.trim();
                    let (_number, rest) = shown.split_once(": ").unwrap_or(("", shown));
                    shown.starts_with(**line) || rest.starts_with(**line)
                })
            });
            found.map(|line| format!("{line}\n")).collect::<String>()
        };
        wait(name, &shown, &format!("{}\n", wanted.join("\n")));
    }
    for (command, text) in recorded.tables {
        let (program, arguments) = command.split_once(' ').unwrap();
        let shown = || {
            let output = node.namespace.try_command(program, arguments).stdout;
            let text = String::from_utf8(output).unwrap();
            let lines = text.lines().map(str::trim);
            lines
                .filter(|line| !line.contains("cni0"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        wait(command, &shown, &ours(text));
    }
    let six = RULES
        .replace("10.244.1.0/24", "fd10:244:0:1::/64")
        .replace("10.244.0.0/16", "fd10:244::/48")
        .replace("224.0.0.0/4", "ff00::/8");
    let dual = recorded.net_conf.contains("IPv6");
    for (program, text) in [("iptables-save", RULES), ("ip6tables-save", &six)] {
        if dual || program == "iptables-save" {
            let shown = || {
                let text = node.namespace.command(program, "");
                sorted(&text)
            };
            wait(program, &shown, &sorted(text));
        }
    }
    eventually("the condition", || {
        let conditions = &api.node("node1")["status"]["conditions"];
        (conditions[0]["message"] == "Flannel is running on this node").then_some(())
    });
}

/// Lines of all tables, of which one may come before the other; without counters and comments.
fn sorted(text: &str) -> String {
    let text = text.replace(" [", "\n#[");
    let mut lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn vxlan() {
    is_as_recorded(&VXLAN);
}

#[test]
fn vxlan_with_both_families() {
    is_as_recorded(&DUAL_STACK);
}

#[test]
fn vxlan_with_direct_routing() {
    is_as_recorded(&DIRECT_ROUTING);
}

#[test]
fn host_gw() {
    is_as_recorded(&HOST_GW);
}

#[test]
fn vxlan_with_nftables() {
    let net_conf =
        r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
    let (node, _api, _process) = start(&Recorded { net_conf, ..VXLAN });
    let table = || {
        let output = node
            .namespace
            .try_command("nft", "list table ip flannel-ipv4");
        String::from_utf8(output.stdout).unwrap()
    };
    eventually("the table", || {
        table()
            .contains("ip daddr 10.244.0.0/16 accept")
            .then_some(())
    });
    assert_eq!(table(), NFT_RULES);
    let tables = node.namespace.command("nft", "list tables");
    // flannel makes an empty table for a family that is off.
    assert!(!tables.contains("flannel-ipv6"), "{tables}");
}

/// The lists in README.md name tests as `file.rs::test`; each is there.
#[test]
fn the_readme_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let words = readme.split(|c: char| c.is_whitespace() || "`|,;()".contains(c));
    let named: BTreeSet<(&str, &str)> = words.filter_map(|word| word.split_once(".rs::")).collect();
    assert!(named.len() > 60, "{}", named.len());
    for (file, test) in named {
        let path = root.join(format!("{file}.rs"));
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        assert!(
            text.contains(&format!("fn {test}(")),
            "{file}.rs has no test {test}"
        );
    }
}
