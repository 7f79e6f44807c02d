//! From flannel to Ripstop and back, twice, on a node whose pods talk all the time: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 (flannel, Ripstop, flannel, …) ═╦═ n2 (flannel) ─ n2p0
//!                 │                           ╚═ n3 (Ripstop) ─ n3p0
//!                 └──── API service: the nodes' annotations
//! ```
//!
//! flannel is played: what its vxlan backend does at its start, in its order, with the conditions under which it
//! keeps a device and its own way to read its MAC address. Nobody else may notice anything.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "what each step cost is worth reading")]

#[path = "common/kube.rs"]
mod kube;

use core::time::Duration;
use std::collections::BTreeSet;
use std::fs;
use std::thread::sleep;

use anyhow::{Context as _, Result, bail, ensure};
use kube::api::Api;
use ripstop_perf::{
    DETOUR_TABLE, Families, Family, Host, Injector, Inner, Lab, Mark, Node, TrafficGroup, UdpFlow,
    address, machine, run, wait_until,
};
use serde_json::{Value, json};

/// How long a wait may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(300);
/// Packets a second of each flow.
const RATE: u64 = 1000;
const PREFIX: &str = "flannel.alpha.coreos.com/";

/// The device of a family, the bits of its address, and what tells `ip` the family.
fn device(family: Family) -> (&'static str, u8, &'static str) {
    match family {
        Family::Ipv4 => ("flannel.1", 32, "-4"),
        Family::Ipv6 => ("flannel-v6.1", 128, "-6"),
    }
}

/// The network address of a node's subnet, the subnet, and the node's VTEP MAC address.
fn of_node(node: u8, family: Family) -> (String, String, String) {
    match family {
        Family::Ipv4 => (
            address::subnet(node).to_string(),
            address::subnet_prefix(node),
            address::vtep_mac(node).to_string(),
        ),
        Family::Ipv6 => (
            address::subnet6(node).to_string(),
            address::subnet6_prefix(node),
            address::vtep_mac6(node).to_string(),
        ),
    }
}

/// The annotations of a node that flannel runs on, byte for byte.
fn annotations(lab: &Lab, node: &Node) -> Value {
    let mut all = json!({
        "volumes.kubernetes.io/controller-managed-attach-detach": "true",
        format!("{PREFIX}backend-type"): "vxlan",
        format!("{PREFIX}kube-subnet-manager"): "true",
    });
    for family in lab.families() {
        let (data, ip) = match family {
            Family::Ipv4 => ("backend-data", "public-ip"),
            Family::Ipv6 => ("backend-v6-data", "public-ipv6"),
        };
        let (_, _, mac) = of_node(node.index(), family);
        all[format!("{PREFIX}{data}")] = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#).into();
        all[format!("{PREFIX}{ip}")] = node.address_of(family).to_string().into();
    }
    all
}

/// `subnet.env` as flannel writes it; the MTU is its VXLAN's over IPv4, whatever the families.
fn subnet_env(lab: &Lab, node: &Node) -> String {
    let mut text = String::new();
    for family in lab.families() {
        text += &match family {
            Family::Ipv4 => format!(
                "FLANNEL_NETWORK={}\nFLANNEL_SUBNET={}/24\n",
                address::POD_NETWORK,
                address::gateway(node.index())
            ),
            Family::Ipv6 => format!(
                "FLANNEL_IPV6_NETWORK={}\nFLANNEL_IPV6_SUBNET={}/64\n",
                address::POD_NETWORK6,
                address::gateway6(node.index())
            ),
        };
    }
    text + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
}

fn subnet_env_of(node: &Node) -> std::path::PathBuf {
    node.net_conf_file().with_file_name("subnet.env")
}

/// The MAC address in a node's own annotation, found as flannel finds it: by cutting the text.
fn flannels_mac(data: &str) -> Result<String> {
    let parts: Vec<&str> = data.trim_end_matches(['"', '}']).split(":\"").collect();
    match parts[..] {
        [_, mac] => Ok(mac.to_owned()),
        _ => bail!("flannel finds no MAC address in {data}"),
    }
}

/// Whether flannel keeps this device; what it would make it anew for is an error.
fn flannel_keeps(node: &Node, family: Family) -> Result<Value> {
    let (name, ..) = device(family);
    let links: Value = serde_json::from_str(&run(node, &format!("ip -d -j link show {name}"))?)?;
    let link = links[0].clone();
    let data = &link["linkinfo"]["info_data"];
    let local = match family {
        Family::Ipv4 => "local",
        Family::Ipv6 => "local6",
    };
    for (what, is, wanted) in [
        ("link type", &link["linkinfo"]["info_kind"], json!("vxlan")),
        ("VNI", &data["id"], json!(1)),
        ("LINK", &data["link"], json!("eth0")),
        (
            "LOCAL",
            &data[local],
            json!(node.address_of(family).to_string()),
        ),
        ("GROUP", &data["group"], Value::Null),
        ("REMOTE", &data["remote"], Value::Null),
        ("PORT", &data["port"], json!(address::VXLAN_PORT)),
        ("L2MISS", &data["l2miss"], Value::Null),
        ("GBP", &data["gbp"], Value::Null),
        // Not compared by flannel; it would stay wrong for ever.
        ("LEARNING", &data["learning"], json!(false)),
        (
            "UDP_ZERO_CSUM6_TX",
            &data["udp_zero_csum6_tx"],
            json!(false),
        ),
        (
            "UDP_ZERO_CSUM6_RX",
            &data["udp_zero_csum6_rx"],
            json!(false),
        ),
    ] {
        ensure!(
            *is == wanted,
            "{name}: {what} is {is}, wanted {wanted}: {data}"
        );
    }
    Ok(link)
}

/// flannel's masquerade and forward rules, as recorded.
fn flannels_rules(node: u8, family: Family) -> String {
    let (_, subnet, _) = of_node(node, family);
    let (network, groups) = match family {
        Family::Ipv4 => (address::POD_NETWORK, "224.0.0.0/4"),
        Family::Ipv6 => (address::POD_NETWORK6, "ff00::/8"),
    };
    let masq = "-m comment --comment \"flanneld masq\" -j";
    let forward = "-m comment --comment \"flanneld forward\" -j";
    format!(
        "*filter
:FLANNEL-FWD - [0:0]
-A FORWARD {forward} FLANNEL-FWD
-A FLANNEL-FWD -s {network} {forward} ACCEPT
-A FLANNEL-FWD -d {network} {forward} ACCEPT
COMMIT
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING {masq} FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} RETURN
-A FLANNEL-POSTRTG -s {subnet} -d {network} {masq} RETURN
-A FLANNEL-POSTRTG -s {network} -d {subnet} {masq} RETURN
-A FLANNEL-POSTRTG ! -s {network} -d {subnet} {masq} RETURN
-A FLANNEL-POSTRTG -s {network} ! -d {groups} {masq} MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {network} -d {network} {masq} MASQUERADE --random-fully
COMMIT
"
    )
}

/// What flannel does when it starts on a node whose device is there.
fn flannel_starts(lab: &Lab, node: &Node, api: &Api) -> Result<()> {
    for family in lab.families() {
        let (name, bits, option) = device(family);
        let (network, ..) = of_node(node.index(), family);
        let key = match family {
            Family::Ipv4 => "backend-data",
            Family::Ipv6 => "backend-v6-data",
        };
        let annotations = &api.node(node.name())["metadata"]["annotations"];
        let data = annotations[format!("{PREFIX}{key}")].clone();
        let data = data.as_str().context("backend data")?;
        let link = flannel_keeps(node, family)?;
        ensure!(
            link["address"] == flannels_mac(data)?,
            "{name}'s mac address wanted: {data}, but got: {}",
            link["address"]
        );
        run(
            node,
            &format!("ip {option} addr replace {network}/{bits} dev {name}"),
        )?;
        run(node, &format!("ip link set {name} up"))?;
        let (save, restore) = match family {
            Family::Ipv4 => ("iptables-save", "iptables-restore"),
            Family::Ipv6 => ("ip6tables-save", "ip6tables-restore"),
        };
        let mut rules = flannels_rules(node.index(), family);
        let there = run(node, save)?;
        // The chains are emptied; of jumps that are there it does not make more.
        rules = rules
            .lines()
            .filter(|line| !line.contains("-j FLANNEL-") || !there.contains(*line))
            .map(|line| format!("{line}\n"))
            .collect();
        let file = node.dir().join("flannel.rules");
        fs::write(&file, rules).with_context(|| format!("{}", file.display()))?;
        run(node, &format!("{restore} --noflush {}", file.display()))?;
    }
    fs::write(subnet_env_of(node), subnet_env(lab, node)).context("subnet.env")?;
    for peer in lab
        .nodes()
        .iter()
        .filter(|peer| peer.index() != node.index())
    {
        for family in lab.families() {
            let (name, _, option) = device(family);
            let (network, subnet, mac) = of_node(peer.index(), family);
            let public_ip = peer.address_of(family);
            run(
                node,
                &format!(
                    "ip {option} neigh replace {network} lladdr {mac} dev {name} nud permanent"
                ),
            )?;
            run(
                node,
                &format!("bridge fdb replace {mac} dev {name} dst {public_ip} self permanent"),
            )?;
            run(
                node,
                &format!("ip {option} route replace {subnet} via {network} dev {name} onlink"),
            )?;
        }
    }
    Ok(())
}

/// What a node has that is flannel's. The protocol of its routes is named by whoever made them last.
fn flannels_state(lab: &Lab, node: &Node) -> Result<BTreeSet<String>> {
    let mut state = BTreeSet::new();
    let mut commands = Vec::new();
    for family in lab.families() {
        let (name, _, option) = device(family);
        commands.extend([
            // The number of the interface is of interest: a device that was made anew has another.
            format!("ip -o -d link show {name}"),
            format!("ip -o addr show dev {name} scope global"),
            format!("ip {option} route show dev {name}"),
            format!("ip {option} neigh show dev {name} nud permanent"),
            format!("bridge fdb show dev {name}"),
        ]);
        commands.push(match family {
            Family::Ipv4 => "iptables-save".to_owned(),
            Family::Ipv6 => "ip6tables-save".to_owned(),
        });
    }
    for command in commands {
        let mut table = String::new();
        for line in run(node, &command)?.lines().map(str::trim) {
            let line = line.split(" [").next().unwrap_or_default();
            if line.starts_with('*') {
                line.clone_into(&mut table);
            }
            if !line.is_empty() && !line.starts_with('#') {
                state.insert(format!("{command}: {table}{line}"));
            }
        }
    }
    Ok(state)
}

/// Ours are named by a protocol of their own, flannel's by the one that `ip` leaves unsaid.
fn by_anybody(state: &BTreeSet<String>) -> BTreeSet<String> {
    let lines = state.iter();
    lines.map(|line| line.replace(" proto 82", "")).collect()
}

/// What is left of Ripstop, besides flannel's.
fn ours(node: &Node) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for command in [
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "nft list tables",
        "ip -o link",
    ] {
        let text = run(node, command)?;
        let lines = text.lines().filter(|line| {
            ["proto 82", "ripstop", "rip0"]
                .iter()
                .any(|word| line.contains(word))
        });
        left.extend(lines.map(|line| line.trim().to_owned()));
    }
    Ok(left)
}

/// Whether a tunnel packet of a node that has only just joined reaches a pod of this one.
fn gets_in(lab: &Lab, node: &Node) -> Result<bool> {
    let mut frame = lab.tunnel_frame(2, node.index());
    frame.ethernet.source = address::ATTACKER_MAC;
    frame.ip.source = address::ATTACKER;
    if let Inner::Udp { ip, .. } = &mut frame.inner {
        ip.source = address::pod(66, 0);
    }
    // Nobody listens at its port in the pod, whose kernel counts that.
    let arrived = || -> Result<i64> { Ok(node.pod(0).kernel_counters()?.value("Udp.NoPorts")) };
    let before = arrived()?;
    Injector::open(lab.attacker(), "eth0")?.send(&frame.encode())?;
    let waited = wait_until("it arrives", Duration::from_secs(1), || {
        arrived().is_ok_and(|now| now > before)
    });
    Ok(waited.is_ok())
}

fn lost_between(traffic: &TrafficGroup, start: &[Mark], end: &[Mark]) -> u64 {
    traffic.lost_before(end, QUIET) - traffic.lost_before(start, QUIET)
}

/// Runs a step under traffic; what it cost.
fn step(traffic: &TrafficGroup, what: &str, step: impl FnOnce() -> Result<()>) -> Result<u64> {
    let start = traffic.mark();
    let sent = traffic.snapshot().sent;
    step().with_context(|| what.to_owned())?;
    sleep(Duration::from_millis(400));
    let lost = lost_between(traffic, &start, &traffic.mark());
    let sent = traffic.snapshot().sent - sent;
    println!("  {what:<42} {lost:>4} lost of {sent}");
    Ok(lost)
}

fn there_and_back(families: Families) -> Result<()> {
    let _machine = machine();
    let lab = Lab::builder().linux(2).ripstop(1).families(families);
    lab.run(|lab| {
        let (api, kubeconfig) = kube::serve(lab)?;
        let kubeconfig = kubeconfig.as_str();
        let flags = [
            "--kube-subnet-mgr",
            "--kubeconfig-file",
            kubeconfig,
            "--ip-masq",
        ];
        for node in lab.nodes() {
            let subnets: Vec<String> = lab
                .families()
                .into_iter()
                .map(|family| of_node(node.index(), family).1)
                .collect();
            let subnets: Vec<&str> = subnets.iter().map(String::as_str).collect();
            api.create(node.name(), &subnets, &annotations(lab, node));
        }
        let (node, far) = (lab.node(1), lab.node(3));
        for table in ["ip flannel-ipv4", "ip6 flannel-ipv6"] {
            run(node, &format!("nft delete table {table}"))?;
        }
        flannel_starts(lab, node, &api)?;
        let subnets = 2 * lab.families().len();
        far.start_dataplane()?;
        far.start_controlplane_with(&flags)?;
        far.wait_for_detour(subnets)?;

        let mut flows = Vec::new();
        for family in lab.families() {
            for peer in [2, 3] {
                let (one, other) = (lab.pod(1, 0), lab.pod(peer, 0));
                for (from, to) in [(one, other), (other, one)] {
                    flows.push(
                        UdpFlow::new(from, to)
                            .over(family)
                            .flows(2)
                            .rate(RATE)
                            .start()?,
                    );
                }
            }
        }
        let traffic = TrafficGroup::new(flows);
        wait_until("traffic flows", PATIENCE, || {
            let mut members = traffic.members().iter();
            members.all(|member| member.snapshot().received > RATE / 5)
        })?;
        let as_flannel = flannels_state(lab, node)?;
        let annotated = api.node(node.name())["metadata"]["annotations"].clone();
        ensure!(as_flannel.len() > 20, "{as_flannel:#?}");
        assert_eq!(ours(node)?, Vec::<String>::new());
        println!("\n{families:?}");
        for (round, signal, name) in [(1, libc::SIGTERM, "SIGTERM"), (2, libc::SIGKILL, "SIGKILL")]
        {
            let lost = step(&traffic, &format!("round {round}: Ripstop starts"), || {
                node.start_dataplane()?;
                node.start_controlplane_with(&flags)?;
                node.wait_for_detour(subnets)?;
                wait_until("the peer filter is set", PATIENCE, || {
                    let filter = run(node, "nft list table ip ripstop");
                    filter.is_ok_and(|filter| filter.contains("@peers return"))
                })
            })?;
            assert_eq!(lost, 0, "on the way in");
            assert_eq!(
                by_anybody(&flannels_state(lab, node)?),
                as_flannel,
                "what was there was adopted as it was"
            );
            let workers = node.workers()?.encapsulated();
            let lost = step(&traffic, "workers carry it", || {
                wait_until("workers carry it", PATIENCE, || {
                    let now = node.workers().map(|workers| workers.encapsulated());
                    now.is_ok_and(|now| now > workers + RATE)
                })
            })?;
            assert_eq!(lost, 0, "by the workers");

            let held = node.held_max()?;
            let lost = step(&traffic, &format!("both end by {name}"), || {
                // Whoever stops a pod tells one of its containers first.
                node.signal_controlplane(signal)?;
                sleep(Duration::from_millis(50));
                node.signal_dataplane(signal)?;
                wait_until("both have ended", PATIENCE, || {
                    !node.controlplane_is_running() && !node.dataplane_is_running()
                })
            })?;
            if signal == libc::SIGTERM {
                assert_eq!(lost, 0, "by {name}");
                let rules = [run(node, "ip -4 rule")?, run(node, "ip -6 rule")?].concat();
                assert!(
                    !rules.contains(DETOUR_TABLE),
                    "the detour is withdrawn: {rules}"
                );
            } else {
                // What was in its rings goes with a data plane that is killed.
                assert!(lost <= held, "{lost} lost, {held} held");
            }
            for family in lab.families() {
                flannel_keeps(node, family)?;
            }
            let remains = flannels_state(lab, node)?;
            assert_eq!(
                by_anybody(&remains),
                as_flannel,
                "what remains is flannel's"
            );
            let written = fs::read_to_string(subnet_env_of(node)).context("subnet.env")?;
            let flannels = subnet_env(lab, node);
            match families {
                Families::Ipv4 => assert_eq!(written, flannels),
                // flannel counts 50 bytes over IPv6, where VXLAN takes 70.
                Families::Ipv6 | Families::Dual => {
                    assert_eq!(written, flannels.replace("MTU=1450", "MTU=1430"));
                }
            }
            println!("  left of ours: {:?}", ours(node)?);

            let lost = step(&traffic, "flannel starts", || {
                flannel_starts(lab, node, &api)
            })?;
            assert_eq!(lost, 0, "when flannel starts");
            assert_eq!(
                flannels_state(lab, node)?,
                as_flannel,
                "flannel has it all back"
            );
            // The peer filter is still there, and knows nobody who comes now.
            assert!(
                !gets_in(lab, node)?,
                "a peer that joins before the clean-up"
            );
            let lost = step(&traffic, "ripstop cleanup", || {
                node.ripstop_text(&["cleanup"]).map(drop)
            })?;
            assert_eq!(lost, 0, "by the clean-up");
            assert_eq!(
                flannels_state(lab, node)?,
                as_flannel,
                "the clean-up leaves flannel's"
            );
            assert_eq!(ours(node)?, Vec::<String>::new(), "and nothing of ours");
            assert!(gets_in(lab, node)?, "a peer that joins after the clean-up");
        }
        assert_eq!(
            api.node(node.name())["metadata"]["annotations"],
            annotated,
            "nobody sees a change"
        );
        let patches = api.requests("PATCH");
        let own = patches
            .iter()
            .filter(|patch| patch.target.contains("/nodes/n1/"));
        let of_annotations: Vec<&str> = own
            .map(|patch| patch.body.as_str())
            .filter(|body| body.contains("annotations"))
            .collect();
        assert_eq!(
            of_annotations,
            Vec::<&str>::new(),
            "nothing is even written"
        );
        for report in traffic.stop() {
            println!("  {report}");
            assert_eq!(
                (report.corrupt, report.foreign, report.duplicated),
                (0, 0, 0),
                "{report}"
            );
        }
        Ok(())
    })
}

#[test]
fn from_flannel_and_back_twice() -> Result<()> {
    there_and_back(Families::Ipv4)
}

#[test]
fn from_flannel_and_back_twice_with_both_families() -> Result<()> {
    there_and_back(Families::Dual)
}

/// flannel forgets the MAC address with a prefix that has a slash, and peers send to one that is nobody's.
#[test]
fn the_mac_address_is_kept_with_any_prefix() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(1).run(|lab| {
        let (api, kubeconfig) = kube::serve(lab)?;
        let kubeconfig = kubeconfig.as_str();
        let node = lab.node(1);
        api.create("n1", &["10.244.1.0/24"], &json!({}));
        let mut known = None;
        for _restart in 0..2 {
            node.start_controlplane_with(&[
                "--kube-subnet-mgr",
                "--kubeconfig-file",
                kubeconfig,
                "--kube-annotation-prefix=example.com/net",
            ])?;
            let data = || {
                let annotations = &api.node("n1")["metadata"]["annotations"];
                annotations["example.com/net-backend-data"].clone()
            };
            wait_until("device and annotation agree", PATIENCE, || {
                let link = run(node, "ip -j link show flannel.1").unwrap_or_default();
                let link: Value = serde_json::from_str(&link).unwrap_or_default();
                let annotated = data().as_str().and_then(|data| flannels_mac(data).ok());
                annotated.is_some_and(|mac| link[0]["address"] == *mac)
            })?;
            let first = known.get_or_insert_with(data);
            assert_eq!(*first, data());
            node.kill_controlplane();
            run(node, "ip link del flannel.1")?;
        }
        Ok(())
    })
}
