//! Masquerade and forward rules on a real kernel. Needs root, nftables and iptables.
//!
//! ```text
//!   pod (10.244.1.5) ── cni0 ── node (control plane) ── eth0 ══ peer0 ── outside (10.199.0.2: who is it that calls?)
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::Arc;
use std::thread::JoinHandle;

use common::node::{CONTROLPLANE, Node, wait_exit};
use common::{Namespace, Process, backend, eventually, ip, lease, lease6};
use ripstop_controlplane::family::PerFamily;
use ripstop_controlplane::traffic::{Keeper, Mode, Networks, Wanted};

/// What flannel leaves, as `iptables-save` prints it.
const IPTABLES: &str = include_str!("recorded/iptables.txt");

/// The same in nftables: flannel's table, but for the first rule's mask and the fourth rule (see `nft.rs`).
const NFTABLES: &str = include_str!("recorded/nftables.txt");

/// Of an IPv4 text, the IPv6 one.
fn six(text: &str) -> String {
    text.replace("10.244.1.0/24", "fd10:244:0:1::/64")
        .replace("10.244.0.0/16", "fd10:244::/48")
        .replace("224.0.0.0/4", "ff00::/8")
        .replace("flannel-ipv4", "flannel-ipv6")
        .replace("ip ", "ip6 ")
}

fn wanted(subnet: &str) -> Wanted {
    let pods = |network: &str, subnet: &str| {
        Some(Networks {
            network: network.parse().unwrap(),
            subnet: subnet.parse().unwrap(),
        })
    };
    Wanted {
        masquerade: true,
        forward: true,
        random_fully: true,
        families: PerFamily {
            v4: pods("10.244.0.0/16", subnet),
            v6: pods("fd10:244::/48", "fd10:244:0:1::/64"),
        },
        no_masquerade: Vec::new(),
    }
}

/// The rules of iptables, without what tells when they were listed.
fn saved(namespace: &Namespace, program: &str) -> String {
    let text = namespace.command(program, "");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Flannel's tables.
fn listed(namespace: &Namespace) -> [String; 2] {
    ["ip flannel-ipv4", "ip6 flannel-ipv6"].map(|table| {
        let output = namespace.try_command("nft", &format!("list table {table}"));
        String::from_utf8(output.stdout).unwrap()
    })
}

/// Everything that a mode has set, in one text.
fn state(namespace: &Namespace, mode: Mode) -> String {
    match mode {
        Mode::Nftables => listed(namespace).concat(),
        Mode::Iptables => ["iptables-save", "ip6tables-save"]
            .map(|program| saved(namespace, program))
            .concat(),
    }
}

fn golden(mode: Mode) -> String {
    let text = match mode {
        Mode::Nftables => NFTABLES,
        Mode::Iptables => IPTABLES,
    };
    text.to_owned() + &six(text)
}

fn keeper(namespace: &Namespace, mode: Mode, wanted: Wanted) -> Keeper {
    let keeper = namespace.enter(|| Keeper::start(mode, Duration::from_secs(1)).unwrap());
    keeper.set(wanted);
    keeper
}

/// Waits for the rules as recorded; how long that took.
fn wait_for(namespace: &Namespace, mode: Mode, what: &str) -> Duration {
    eventually(what, || {
        (state(namespace, mode) == golden(mode)).then_some(())
    })
    .1
}

const MODES: [Mode; 2] = [Mode::Iptables, Mode::Nftables];

#[test]
fn the_rules_are_flannels_byte_for_byte_and_follow_the_subnet() {
    for mode in MODES {
        let namespace = Namespace::new();
        let keeper = keeper(&namespace, mode, wanted("10.244.9.0/24"));
        eventually("the rules of the subnet before", || {
            let text = state(&namespace, mode);
            (text.contains("10.244.9.0/24") && text.contains("fd10:244:0:1::/64")).then_some(())
        });
        keeper.set(wanted("10.244.1.0/24"));
        wait_for(
            &namespace,
            mode,
            "flannel's rules, and none of the subnet before",
        );
        // Without masquerade, without anything, for one family: what is not wanted goes.
        keeper.set(Wanted {
            masquerade: false,
            ..wanted("10.244.1.0/24")
        });
        eventually("forward rules alone", || {
            let text = state(&namespace, mode).to_lowercase();
            (!text.contains("postrtg") && !text.contains("masquerade") && text.contains("accept"))
                .then_some(())
        });
        keeper.set(Wanted::default());
        eventually("nothing", || {
            let text = state(&namespace, mode);
            (!text.contains("FLANNEL") && !text.contains("flannel")).then_some(())
        });
        assert_eq!(keeper.problems(), Vec::<String>::new(), "{mode:?}");
    }
}

/// All that nftables holds of IPv4, iptables-nft's tables included, with the handles by which one rule is told from
/// another in its place.
fn handles(namespace: &Namespace) -> String {
    let text = namespace.command("nft", "-a list ruleset ip");
    assert!(text.contains("# handle"), "{text}");
    text
}

/// What is right is not touched, also not what flannel has left.
#[test]
fn rules_that_are_right_are_adopted() {
    for mode in MODES {
        let namespace = Namespace::new();
        let file = tempfile::NamedTempFile::new().unwrap();
        let load = match mode {
            Mode::Nftables => vec![("nft", "-f", golden(mode))],
            Mode::Iptables => vec![
                ("iptables-restore", "", IPTABLES.to_owned()),
                ("ip6tables-restore", "", six(IPTABLES)),
            ],
        };
        for (program, option, text) in load {
            std::fs::write(file.path(), text).unwrap();
            namespace.command(program, &format!("{option} {}", file.path().display()));
        }
        assert_eq!(state(&namespace, mode), golden(mode));
        let before = handles(&namespace);
        let mut other = wanted("10.244.1.0/24");
        other.no_masquerade = vec!["fd99::/64".parse().unwrap()];
        let keeper = keeper(&namespace, mode, other);
        // IPv4 is looked at first.
        eventually("a change of IPv6's rules", || {
            state(&namespace, mode).contains("fd99::/64").then_some(())
        });
        assert_eq!(handles(&namespace), before, "{mode:?}");
        assert_eq!(keeper.problems(), Vec::<String>::new());
    }
}

/// Whatever others do to the rules, they are back within the time between two looks.
#[test]
fn rules_heal() {
    const IN_IPTABLES: [(&str, &[&str]); 9] = [
        ("rule deleted", &["iptables -t nat -D FLANNEL-POSTRTG 3"]),
        ("chain flushed", &["iptables -t nat -F FLANNEL-POSTRTG"]),
        ("jump deleted", &["iptables -t nat -D POSTROUTING 1"]),
        (
            "jump duplicated",
            &[
                "iptables -t nat -A POSTROUTING -m comment --comment flanneld_masq -j FLANNEL-POSTRTG",
            ],
        ),
        (
            "order swapped",
            &[
                "iptables -t nat -D FLANNEL-POSTRTG 1",
                "iptables -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN",
            ],
        ),
        (
            "rule duplicated",
            &["iptables -A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT"],
        ),
        (
            "foreign rule in the chain",
            &["ip6tables -t nat -I FLANNEL-POSTRTG -j RETURN"],
        ),
        ("table deleted", &["nft delete table ip nat"]),
        (
            "all flushed",
            &[
                "iptables -F",
                "iptables -t nat -F",
                "ip6tables -F",
                "ip6tables -t nat -F",
            ],
        ),
    ];
    const IN_NFTABLES: [(&str, &[&str]); 7] = [
        (
            "chain flushed",
            &["nft flush chain ip flannel-ipv4 postrtg"],
        ),
        (
            "rule duplicated",
            &["nft add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept"],
        ),
        (
            "foreign rule in the chain",
            &["nft insert rule ip6 flannel-ipv6 postrtg return"],
        ),
        (
            "foreign chain in the table",
            &["nft add chain ip flannel-ipv4 mine"],
        ),
        (
            "table asleep",
            &["nft add table ip flannel-ipv4 { flags dormant; }"],
        ),
        (
            "chain deleted",
            &["nft delete chain ip flannel-ipv4 postrtg"],
        ),
        (
            "tables deleted",
            &[
                "nft delete table ip flannel-ipv4",
                "nft delete table ip6 flannel-ipv6",
            ],
        ),
    ];
    for mode in MODES {
        let damages: &[(&str, &[&str])] = match mode {
            Mode::Iptables => &IN_IPTABLES,
            Mode::Nftables => &IN_NFTABLES,
        };
        let namespace = Namespace::new();
        let keeper = keeper(&namespace, mode, wanted("10.244.1.0/24"));
        wait_for(&namespace, mode, "the rules");
        for (what, commands) in damages {
            for command in *commands {
                let (program, arguments) = command.split_once(' ').unwrap();
                namespace.command(program, arguments);
            }
            let took = wait_for(&namespace, mode, what);
            println!("{mode:?}: {what}: back after {took:?}");
        }
        // Over and over, also in the middle of a repair: what is not there to be deleted does not matter.
        for round in 0..60 {
            namespace.try_command("nft", "delete table ip flannel-ipv4");
            namespace.try_command("nft", "delete table ip6 flannel-ipv6");
            namespace.try_command("iptables", "-t nat -F FLANNEL-POSTRTG");
            std::thread::sleep(Duration::from_millis(round % 20));
        }
        let took = wait_for(&namespace, mode, "the rules after all that");
        println!("{mode:?}: damaged sixty times in a row: back after {took:?}");
        assert_eq!(keeper.problems(), Vec::<String>::new(), "{mode:?}");
    }
}

/// What stands behind our jump stays behind it, and what others have stays whole.
#[test]
fn a_duplicated_jump_is_mended_in_its_place() {
    let namespace = Namespace::new();
    let keeper = keeper(&namespace, Mode::Iptables, wanted("10.244.1.0/24"));
    wait_for(&namespace, Mode::Iptables, "the rules");
    let jump = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";
    let text = IPTABLES.replace(
        jump,
        &format!("-A FORWARD -o lo -j ACCEPT\n{jump}-A FORWARD -j DROP\n{jump}{jump}"),
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    namespace.command("iptables-restore", &file.path().display().to_string());
    let expected = IPTABLES.replace(
        jump,
        &format!("-A FORWARD -o lo -j ACCEPT\n{jump}-A FORWARD -j DROP\n"),
    );
    eventually("one jump between the others' rules", || {
        (saved(&namespace, "iptables-save") == expected).then_some(())
    });
    assert_eq!(keeper.problems(), Vec::<String>::new());
}

/// Flannel's image brings an iptables of its own choice, which may have written where the system's does not look.
#[test]
fn what_the_other_variant_of_iptables_has_goes_and_others_rules_stay() {
    let others = "-A FORWARD -o lo -j ACCEPT\n";
    let left = IPTABLES.replace("-A FORWARD -m", &format!("{others}-A FORWARD -m"));
    let file = tempfile::NamedTempFile::new().unwrap();
    for mode in MODES {
        for program in ["iptables-legacy", "ip6tables-legacy"] {
            let namespace = Namespace::new();
            let is_six = program.starts_with("ip6");
            let text = if is_six { six(&left) } else { left.clone() };
            std::fs::write(file.path(), text).unwrap();
            let restore = file.path().display().to_string();
            namespace.command(&format!("{program}-restore"), &restore);
            let keeper = keeper(&namespace, mode, wanted("10.244.1.0/24"));
            wait_for(&namespace, mode, "the rules");
            eventually("the old place holds what others put there", || {
                let present = saved(&namespace, &format!("{program}-save"));
                (!present.contains("FLANNEL") && present.contains(others)).then_some(())
            });
            assert_eq!(keeper.problems(), Vec::<String>::new());
        }
    }
}

const PORT: u16 = 9999;

/// A node with a pod, and who is called outside.
struct Lab {
    node: Node,
    pod: Namespace,
}

fn net_conf(mode: Mode) -> String {
    let nftables = mode == Mode::Nftables;
    backend(&format!(
        r#"{{"Type":"host-gw"}},"EnableNFTables":{nftables}"#
    ))
}

fn lab() -> Lab {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2)]);
    let (namespace, pod) = (&node.namespace, Namespace::new());
    namespace.ip(&format!(
        "link add cni0 type veth peer name eth0 netns {}",
        pod.name
    ));
    for (host, setting) in [
        (namespace, "addr add 10.244.1.1/24 dev cni0"),
        (namespace, "link set cni0 up"),
        (&pod, "addr add 10.244.1.5/24 dev eth0"),
        (&pod, "link set eth0 up"),
        (&pod, "route add default via 10.244.1.1"),
        (&node.outside, "route add 10.244.1.0/24 via 10.199.0.1"),
    ] {
        host.ip(setting);
    }
    namespace.command("sysctl", "-qw net.ipv4.ip_forward=1");
    Lab { node, pod }
}

impl Lab {
    fn start(&self, mode: Mode, flags: &[&str]) -> Process {
        self.node.write_conf(&net_conf(mode));
        let flags = [&["--ip-masq", "--iptables-resync=1"], flags].concat();
        self.node.start_through(&[CONTROLPLANE], &flags)
    }

    /// Waits until this mode has its rules, and the other has none.
    fn wait_alone(&self, mode: Mode) {
        let namespace = &self.node.namespace;
        eventually(&format!("rules of {mode:?} alone"), || {
            let tables = listed(namespace)[0].contains("masquerade");
            let chains = saved(namespace, "iptables-save");
            let alone = match mode {
                Mode::Nftables => tables && !chains.contains("FLANNEL"),
                Mode::Iptables => {
                    let table = namespace.try_command("nft", "list table ip flannel-ipv4");
                    chains.contains("MASQUERADE") && !table.status.success()
                }
            };
            alone.then_some(())
        });
    }
}

/// A pod that calls somebody outside again and again, each time anew, and what address the calls come from.
struct Calls {
    stop: Arc<AtomicBool>,
    caller: JoinHandle<u64>,
    listener: JoinHandle<BTreeMap<IpAddr, u64>>,
}

impl Calls {
    fn start(lab: &Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let socket = lab
            .node
            .outside
            .enter(|| UdpSocket::bind(("10.199.0.2", PORT)).unwrap());
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let listener = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut seen = BTreeMap::new();
                let mut buffer = [0; 8];
                loop {
                    match socket.recv_from(&mut buffer) {
                        Ok((_, from)) => *seen.entry(from.ip()).or_default() += 1,
                        Err(_) if stop.load(Ordering::Relaxed) => return seen,
                        Err(_) => {}
                    }
                }
            }
        });
        let pod = lab.pod.name.clone();
        let caller = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let pod = core::mem::ManuallyDrop::new(Namespace { name: pod });
                pod.enter(|| {
                    let mut calls = 0;
                    while !stop.load(Ordering::Relaxed) {
                        // A flow is masqueraded by its first packet, or never.
                        let socket = UdpSocket::bind(("10.244.1.5", 0)).unwrap();
                        socket.send_to(&[0; 8], ("10.199.0.2", PORT)).unwrap();
                        calls += 1;
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    calls
                })
            }
        });
        Self {
            stop,
            caller,
            listener,
        }
    }

    /// All calls came in the name of the node; how many there were.
    fn check(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let calls = self.caller.join().unwrap();
        let seen = self.listener.join().unwrap();
        let sources: Vec<IpAddr> = seen.keys().copied().collect();
        assert_eq!(sources, [ip("10.199.0.1")], "{seen:?}");
        assert!(calls > 100, "{calls}");
        calls
    }
}

#[test]
fn masquerade_is_never_absent_while_the_process_dies_and_the_mode_changes() {
    let lab = lab();
    let mut process = lab.start(Mode::Iptables, &[]);
    lab.wait_alone(Mode::Iptables);
    let calls = Calls::start(&lab);
    for (round, mode) in [
        Mode::Iptables,
        Mode::Nftables,
        Mode::Nftables,
        Mode::Iptables,
        Mode::Nftables,
        Mode::Iptables,
    ]
    .into_iter()
    .enumerate()
    {
        process.signal([libc::SIGKILL, libc::SIGTERM][round % 2]);
        drop(process);
        // Rules that are wrong, so that they are set anew while flows begin.
        let flags: &[&str] = if round % 2 == 0 {
            &["--no-masquerade=172.16.0.0/12"]
        } else {
            &[]
        };
        process = lab.start(mode, flags);
        lab.wait_alone(mode);
        eventually("the exempt destination", || {
            let text = state(&lab.node.namespace, mode);
            (text.contains("172.16.0.0/12") != flags.is_empty()).then_some(())
        });
    }
    // And others damage what does not matter to these flows.
    for _ in 0..5 {
        let namespace = &lab.node.namespace;
        namespace.command("iptables", "-t nat -D FLANNEL-POSTRTG 1");
        eventually("the rule is back", || {
            saved(namespace, "iptables-save")
                .contains("-A FLANNEL-POSTRTG -m mark")
                .then_some(())
        });
    }
    println!(
        "six restarts, four changes of mode, five repairs: {} new flows, all in the node's name",
        calls.check()
    );
}

#[test]
fn the_operator_sees_and_removes_the_rules() {
    let lab = lab();
    let namespace = &lab.node.namespace;
    lab.pod.ip("link set eth0 down");
    namespace.ip("link del cni0");
    for mode in MODES {
        let flags = [
            "--ip-masq-fully-random-disable",
            "--no-masquerade=192.168.0.0/16,10.9.0.0/16",
            "--ip-blackhole-route",
        ];
        let process = lab.start(mode, &flags);
        lab.wait_alone(mode);
        let text = state(namespace, mode).to_lowercase();
        assert!(!text.contains("random"), "{text}");
        for net in ["192.168.0.0/16", "10.9.0.0/16"] {
            assert!(text.contains(net), "{text}");
        }
        lab.node.wait_ip("route show type blackhole", |text| {
            text.contains("blackhole 10.244.1.0/24 proto 82")
        });
        namespace.ip("route del blackhole 10.244.1.0/24");
        let took = lab.node.wait_ip("route show type blackhole", |text| {
            text.contains("blackhole 10.244.1.0/24")
        });
        println!("blackhole route: back after {took:?}");
        let line = format!(
            "masquerade on, forward on, in {}, not to 192.168.0.0/16, 10.9.0.0/16",
            mode.name()
        );
        eventually("status", || {
            lab.node
                .cli("status --interval 0")
                .0
                .contains(&line)
                .then_some(())
        });
        let (text, _) = lab.node.cli("status --json --interval 0");
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rules = &json["controlPlane"]["state"]["rules"];
        assert_eq!(rules["mode"], mode.name(), "{text}");
        assert_eq!(
            json["controlPlane"]["state"]["problems"],
            serde_json::json!([])
        );
        let before = state(namespace, mode);
        process.signal(libc::SIGTERM);
        assert_eq!(wait_exit(process).0, 0);
        // Pods go on without a control plane, also without what is Ripstop's alone.
        lab.node.cli("cleanup");
        assert_eq!(state(namespace, mode), before);
        let (text, code) = lab.node.cli("cleanup --standby");
        assert!(
            text.contains("masquerade and forward rules") && code == 0,
            "{text}"
        );
        assert!(text.contains("blackhole"), "{text}");
        let left = state(namespace, mode);
        assert!(!left.to_lowercase().contains("flannel"), "{left}");
        assert_eq!(namespace.ip("route show type blackhole"), "");
        let (text, _) = lab.node.cli("cleanup --standby");
        assert!(!text.contains("masquerade"), "{text}");
    }
}

/// The route that refuses follows the lease, goes when it is not wanted, and a bridge is no place for it.
#[test]
fn the_blackhole_route_follows_the_lease() {
    let lab = lab();
    let namespace = &lab.node.namespace;
    let both = |n| {
        let mut lease = [lease(1), lease6(1)];
        lease[0].subnet = format!("10.244.{n}.0/24").parse().unwrap();
        lease[1].subnet = format!("fd00:10:244:{n}::/64").parse().unwrap();
        lease
    };
    lab.node.write_conf(&common::dual(r#"{"Type":"host-gw"}"#));
    lab.node.write_leases(&both(7));
    let start = |flags: &[&str]| lab.node.start_through(&[CONTROLPLANE], flags);
    let process = start(&["--ip-blackhole-route"]);
    let wait = |n: &str| {
        for (family, prefix) in [
            ("-4", format!("10.244.{n}.0/24")),
            ("-6", format!("fd00:10:244:{n}::/64")),
        ] {
            lab.node
                .wait_ip(&format!("{family} route show type blackhole"), |text| {
                    text.trim().lines().count() == 1 && text.contains(&prefix)
                });
        }
    };
    wait("7");
    lab.node.write_leases(&both(8));
    wait("8");
    // The bridge has this one.
    lab.node.write_leases(&both(1));
    eventually("the problem", || {
        let problems = lab.node.state().problems.join("\n");
        problems
            .contains("--ip-blackhole-route is for networks without a bridge")
            .then_some(())
    });
    namespace.ip("link del cni0");
    wait("1");
    eventually("no problem", || {
        lab.node.state().problems.is_empty().then_some(())
    });
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
    wait("1");
    let _process = start(&[]);
    for family in ["-4", "-6"] {
        lab.node.wait_ip(
            &format!("{family} route show type blackhole"),
            str::is_empty,
        );
    }
}

/// The program behind a script that changes the file system that it sees.
fn start_hiding(node: &Node, script: &str, flags: &[&str]) -> Process {
    let script = format!("{script} && exec \"$@\"");
    let command = ["unshare", "-m", "sh", "-c", &script, "sh", CONTROLPLANE];
    node.start_through(&command, flags)
}

#[test]
fn without_iptables_nftables_holds_the_rules() {
    let lab = lab();
    lab.node.write_conf(&net_conf(Mode::Iptables));
    let hide = "cp /usr/sbin/nft /run/ripstop-test-nft.$$ && mount -t tmpfs none /usr/sbin && mv /run/ripstop-test-nft.$$ /usr/sbin/nft";
    let process = start_hiding(&lab.node, hide, &["--ip-masq"]);
    lab.wait_alone(Mode::Nftables);
    let (text, _) = lab.node.cli("status --interval 0");
    assert!(
        text.contains("masquerade on, forward on, in nftables"),
        "{text}"
    );
    assert_eq!(lab.node.state().problems, Vec::<String>::new());
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0);
    assert_eq!(log.matches("iptables is not installed").count(), 1, "{log}");
}

#[test]
fn without_br_netfilter_there_is_one_problem_and_all_the_rest() {
    let lab = lab();
    lab.node.write_conf(&net_conf(Mode::Iptables));
    let hide = "mount -t tmpfs none /proc/sys/net/bridge";
    let flags = ["--ip-masq", "--iptables-resync=1"];
    let process = start_hiding(&lab.node, hide, &flags);
    lab.wait_alone(Mode::Iptables);
    eventually("the problem", || {
        let problems = lab.node.state().problems.join("\n");
        problems.contains("bridge-nf-call-iptables").then_some(())
    });
    let namespace = &lab.node.namespace;
    namespace.command("iptables", "-t nat -F FLANNEL-POSTRTG");
    lab.wait_alone(Mode::Iptables);
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0);
    assert_eq!(log.matches("br_netfilter, or").count(), 1, "{log}");
}
