//! Leases and neighbours change while traffic of others goes on: nobody else notices, and the change takes effect.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0        traffic all the time: nothing is lost
//!                    ║
//!                    n3 (plain Linux) ─ n3p0  joins, changes its MAC, address and subnet, leaves
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(
    clippy::print_stdout,
    reason = "how long each change took is worth reading"
)]

use core::fmt::Write as _;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::collections::BTreeSet;
use std::fs;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context, Result};
use ripstop_perf::{
    Host, Lab, Lease, Leases, Mac, Netns, Node, Ping, TrafficGroup, TrafficHandle, UdpFlow,
    address, machine, run, wait_until,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(300);

/// Traffic both ways between two pods, already flowing.
fn steady(one: &dyn Host, other: &dyn Host, rate: u64) -> Result<TrafficGroup> {
    let flow = |from, to| UdpFlow::new(from, to).flows(4).rate(rate / 2).start();
    let traffic = TrafficGroup::new(vec![flow(one, other)?, flow(other, one)?]);
    wait_until("traffic flows", PATIENCE, || {
        traffic
            .members()
            .iter()
            .all(|member| member.snapshot().received > 100)
    })?;
    Ok(traffic)
}

fn assert_undisturbed(traffic: TrafficGroup) {
    for report in traffic.stop() {
        println!("  meanwhile: {report}");
        assert!(report.is_perfect(), "{report}");
    }
}

/// A pod under an address that is not the lab's own for it.
struct Moved<'a> {
    pod: &'a dyn Host,
    address: Ipv4Addr,
}

impl Host for Moved<'_> {
    fn netns(&self) -> &Netns {
        self.pod.netns()
    }

    fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn address6(&self) -> Ipv6Addr {
        self.pod.address6()
    }

    fn name(&self) -> &str {
        self.pod.name()
    }
}

/// What a plain Linux node has of flannel's, under a lease that may differ from the lab's own.
fn program(lab: &Lab, node: &Node, lease: &Lease) -> Result<()> {
    let (subnet, public_ip, mac) = parts(lease);
    let (vtep_ip, _length) = subnet.split_once('/').context("subnet without length")?;
    let mut commands = vec![
        "ip link del flannel.1".to_owned(),
        format!(
            "ip link add flannel.1 address {mac} mtu {} type vxlan id {} local {public_ip} dev eth0 dstport {} nolearning",
            lab.pod_mtu(),
            address::VNI,
            address::VXLAN_PORT,
        ),
        format!("ip addr add {vtep_ip}/32 dev flannel.1"),
        "ip link set flannel.1 up".to_owned(),
    ];
    for peer in lab.ripstop_nodes().map(Node::index) {
        let (subnet, vtep) = (address::subnet(peer), address::vtep_mac(peer));
        let public = address::underlay(peer);
        commands.push(format!(
            "ip neigh replace {subnet} lladdr {vtep} dev flannel.1 nud permanent"
        ));
        commands.push(format!(
            "ip route add {subnet}/24 via {subnet} dev flannel.1 onlink"
        ));
        commands.push(format!(
            "bridge fdb append {vtep} dev flannel.1 dst {public} self permanent"
        ));
    }
    commands
        .iter()
        .try_for_each(|command| run(node, command).map(drop))
}

/// Subnet, underlay address and VTEP MAC of a lease, which all leases here have.
fn parts(lease: &Lease) -> (&str, Ipv4Addr, &str) {
    (
        lease.subnet.as_deref().unwrap_or_default(),
        lease.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED),
        lease.vtep_mac.as_deref().unwrap_or_default(),
    )
}

fn sysctl(host: &dyn Host, key: &str, value: u32) -> Result<()> {
    let line = format!("echo {value} > /proc/sys/net/ipv4/{key}");
    host.output(&["sh", "-c", &line]).map(drop)
}

/// Routes, neighbours and forwarding entries of a node's standby device.
fn standby(node: &Node) -> Result<[BTreeSet<String>; 3]> {
    let lines = |command: &str| -> Result<BTreeSet<String>> {
        let argv: Vec<&str> = command.split(' ').collect();
        let text = node.output(&argv)?;
        Ok(text.lines().map(|line| line.trim().to_owned()).collect())
    };
    Ok([
        lines("ip -4 route show dev flannel.1")?,
        lines("ip -4 neigh show dev flannel.1")?,
        lines("bridge fdb show dev flannel.1")?,
    ])
}

fn standby_of(peers: &[&Lease]) -> [BTreeSet<String>; 3] {
    let set = |line: &dyn Fn(&Lease, &str) -> String| {
        let of = |lease: &&Lease| line(lease, parts(lease).0.split('/').next().unwrap_or_default());
        peers.iter().map(of).collect()
    };
    [
        set(&|lease, vtep| format!("{} via {vtep} proto 82 onlink", parts(lease).0)),
        set(&|lease, vtep| format!("{vtep} lladdr {} PERMANENT", parts(lease).2)),
        set(&|lease, _| {
            let (_, public_ip, mac) = parts(lease);
            format!("{mac} dst {public_ip} self permanent")
        }),
    ]
}

/// Whether a change stops what n3 sends until the others know it. That it gets nothing goes without saying.
#[derive(Clone, Copy, PartialEq)]
enum Until {
    /// The sender's VTEP MAC is no part of what a lease permits.
    Heard,
    Unheard,
}

/// Writes leases with n3 as given, and measures until its pod is reached both ways and workers carry that.
fn change(lab: &Lab, what: &str, lease: &Lease, pod: &dyn Host, until: Until) -> Result<()> {
    let node = lab.node(1);
    let probe = |from, to| UdpFlow::new(from, to).rate(2000).start();
    let probes = [probe(lab.pod(1, 0), pod)?, probe(pod, lab.pod(1, 0))?];
    let arrived = |probe: &TrafficHandle| probe.snapshot().received;
    sleep(Duration::from_millis(200));
    if until == Until::Heard {
        wait_until(&format!("{what}: n3 is heard"), PATIENCE, || {
            arrived(&probes[1]) > 0
        })?;
    }
    let [there, back] = probes.each_ref().map(arrived);
    assert_eq!(
        (there, back > 0),
        (0, until == Until::Heard),
        "{what}: before"
    );

    let mut leases = lab.leases();
    leases.leases[2] = lease.clone();
    let start = Instant::now();
    lab.write_leases(&leases)?;
    let mut first = [None; 2];
    wait_until(&format!("{what} takes effect"), PATIENCE, || {
        for (first, probe) in first.iter_mut().zip(&probes) {
            if first.is_none() && arrived(probe) > 0 {
                *first = Some(start.elapsed());
            }
        }
        first.iter().all(Option::is_some)
    })?;
    let subnets: BTreeSet<String> = [address::subnet_prefix(2), parts(lease).0.to_owned()].into();
    wait_until(&format!("{what}: workers carry it"), PATIENCE, || {
        let detour = node.detour().unwrap_or_default();
        detour.into_iter().collect::<BTreeSet<_>>() == subnets
    })?;
    let carried = start.elapsed();
    let [there, back] = first.map(Option::unwrap_or_default);
    let back = match until {
        Until::Heard => String::new(),
        Until::Unheard => format!(" and {back:.1?} back"),
    };
    println!(
        "{what}: file written to first packet {there:.1?} there{back}, carried by workers within {carried:.1?}"
    );

    sleep(Duration::from_millis(200));
    let (marks, before) = (
        probes.each_ref().map(TrafficHandle::mark),
        node.standby_counters()?,
    );
    let missing = |which: usize| probes[which].lost_before(&marks[which], QUIET);
    let lost_before = [missing(0), missing(1)];
    sleep(Duration::from_millis(500));
    let after = node.standby_counters()?;
    assert_eq!(
        (after.tx_packets, after.rx_packets),
        (before.tx_packets, before.rx_packets),
        "{what}: packets on the standby"
    );
    let lost = probes.map(|probe| probe.stop().lost);
    assert_eq!(lost, lost_before, "{what}: lost once workers carry it");
    let own = Lease::of_node(2);
    assert_eq!(
        standby(node)?,
        standby_of(&[&own, lease]),
        "{what}: standby"
    );
    Ok(())
}

#[test]
fn changed_leases_take_effect_and_disturb_nobody() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        let newcomer = lab.node(3);
        let mut known = lab.leases();
        known.leases.truncate(2);
        lab.write_leases(&known)?;
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane()?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(1)?;
        }
        let traffic = steady(lab.pod(1, 0), lab.pod(2, 0), 16_000)?;

        let mut lease = Lease::of_node(3);
        change(lab, "a new lease", &lease, lab.pod(3, 0), Until::Unheard)?;

        lease.vtep_mac = Some(Mac([0x02, 0x52, 0x53, 0, 0, 0x33]).to_string());
        program(lab, newcomer, &lease)?;
        change(lab, "another VTEP MAC", &lease, lab.pod(3, 0), Until::Heard)?;

        lease.public_ip = Some(Ipv4Addr::new(10, 199, 0, 43));
        run(newcomer, "ip addr del 10.199.0.13/24 dev eth0")?;
        run(newcomer, "ip addr add 10.199.0.43/24 dev eth0")?;
        program(lab, newcomer, &lease)?;
        change(
            lab,
            "another public IP",
            &lease,
            lab.pod(3, 0),
            Until::Unheard,
        )?;

        lease.subnet = Some("10.244.43.0/24".to_owned());
        run(newcomer, "ip addr add 10.244.43.1/24 dev cni0")?;
        run(lab.pod(3, 0), "ip addr add 10.244.43.2/24 dev eth0")?;
        program(lab, newcomer, &lease)?;
        let moved = Moved {
            pod: lab.pod(3, 0),
            address: Ipv4Addr::new(10, 244, 43, 2),
        };
        change(lab, "another subnet", &lease, &moved, Until::Unheard)?;
        let old = Ping::new(lab.pod(1, 0), lab.pod(3, 0)).run()?;
        assert_eq!(old.received, 0, "the old subnet still answers");

        // Without a lease it is nobody's peer.
        lab.write_leases(&known)?;
        let gone = standby_of(&[&Lease::of_node(2)]);
        wait_until("the lease is gone", PATIENCE, || {
            standby(lab.node(1)).is_ok_and(|state| state == gone)
        })?;
        assert_eq!(lab.node(1).detour()?, [address::subnet_prefix(2)]);
        let drops = |node: &Node| -> Result<u64> {
            let drops = node.workers()?.drops();
            let found = drops.iter().find(|(name, _)| *name == "unknown_peer");
            Ok(found.map_or(0, |(_, count)| *count))
        };
        let before = drops(lab.node(1))?;
        let intruder = UdpFlow::new(&moved, lab.pod(1, 0)).count(50).run()?;
        assert_eq!((intruder.sent, intruder.received), (50, 0));
        wait_until("the drops are counted", PATIENCE, || {
            drops(lab.node(1)).is_ok_and(|now| now - before == 50)
        })?;
        assert_undisturbed(traffic);
        Ok(())
    })
}

/// The Ethernet address that frames to a node get, as the forwarding table has it.
fn next_hop(node: &Node, peer: &str) -> Result<String> {
    let report = node.ripstop(&["leases", "--json"])?;
    let rows = report["leases"].as_array().context("no leases")?;
    let row = rows.iter().find(|row| row["node"] == peer);
    let mac = row.and_then(|row| row["nextHopMac"].as_str());
    Ok(mac.unwrap_or("unresolved").to_owned())
}

#[test]
fn a_peer_s_network_card_is_changed() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(1).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let (node, peer) = (lab.node(1), lab.node(2));
        // One way only: a peer that sends would ask for our address and so make its own known.
        let traffic = UdpFlow::new(lab.pod(1, 0), lab.pod(2, 0))
            .flows(4)
            .rate(4000)
            .start()?;
        // A neighbour's address is followed once a second at most (locktime).
        sleep(Duration::from_millis(1200));
        assert_eq!(traffic.lost_before(&traffic.mark(), QUIET), 0);
        sysctl(peer, "conf/eth0/arp_notify", 1)?;
        replace_card(node, peer, &traffic, "announced", 0x71)?;

        // A card that does not announce itself is found by asking, which the test has done sooner than usual.
        sysctl(peer, "conf/eth0/arp_notify", 0)?;
        for (key, value) in [
            ("base_reachable_time_ms", 1000),
            ("delay_first_probe_time", 1),
            ("retrans_time_ms", 200),
        ] {
            sysctl(node, &format!("neigh/eth0/{key}"), value)?;
        }
        replace_card(node, peer, &traffic, "silent", 0x72)?;
        let report = traffic.stop();
        println!("  meanwhile: {report}");
        assert_eq!((report.duplicated, report.corrupt), (0, 0), "{report}");
        Ok(())
    })
}

fn replace_card(
    node: &Node,
    peer: &Node,
    traffic: &TrafficHandle,
    what: &str,
    last: u8,
) -> Result<()> {
    let mac = Mac([0x02, 0x52, 0x53, 0x01, 0, last]).to_string();
    let old = next_hop(node, "n2")?;
    run(peer, &format!("ip link set dev eth0 address {mac}"))?;
    let start = Instant::now();
    wait_until("the table has the new address", 2 * PATIENCE, || {
        next_hop(node, "n2").is_ok_and(|now| now == mac)
    })?;
    let published = start.elapsed();
    let before = traffic.snapshot().received;
    wait_until("traffic has healed", PATIENCE, || {
        traffic.snapshot().received > before + 200
    })?;
    node.wait_for_detour(1)?;
    sleep(Duration::from_millis(200));
    let (mark, standby_before) = (traffic.mark(), node.standby_counters()?);
    let lost_before = traffic.lost_before(&mark, QUIET);
    sleep(Duration::from_millis(500));
    let (mark, standby_after) = (traffic.mark(), node.standby_counters()?);
    assert_eq!(traffic.lost_before(&mark, QUIET), lost_before, "healed");
    assert_eq!(
        standby_after.tx_packets, standby_before.tx_packets,
        "packets on the standby"
    );
    println!("next hop {old} replaced by {mac}, {what}: published after {published:.1?}");
    Ok(())
}

#[test]
fn a_bad_lease_file_changes_nothing() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        let node = lab.node(1);
        // Of its own: what is bad for this node may be good for the other.
        node.write_leases(&lab.leases())?;
        lab.start_ripstop()?;
        let traffic = steady(lab.pod(1, 0), lab.pod(2, 0), 8000)?;
        let (generation, routes) = (node.fib_generation()?, standby(node)?);
        let good = fs::read_to_string(node.lease_file())?;
        let with = |lease: Lease| {
            let mut leases = lab.leases();
            leases.leases.push(lease);
            serde_json::to_string_pretty(&leases)
        };
        let third = Lease::of_node(3);
        let in_force = "the leases before stay in force";
        let cases: [(&str, String, &[&str]); 9] = [
            (
                "half written",
                good[..good.len() / 2].to_owned(),
                &["line ", "column ", "rename it into place", in_force],
            ),
            ("empty", String::new(), &["line 1", in_force]),
            (
                "overlapping subnets",
                with(Lease {
                    subnet: Some("10.244.2.128/25".to_owned()),
                    ..third.clone()
                })?,
                &[
                    "n2",
                    "n3",
                    "overlap: 10.244.2.0/24 and 10.244.2.128/25",
                    in_force,
                ],
            ),
            (
                "one node twice",
                with(Lease {
                    node: "n2".to_owned(),
                    ..third.clone()
                })?,
                &["entries 2", "and 3", "name the same node"],
            ),
            (
                "one VTEP MAC twice",
                with(Lease {
                    vtep_mac: Some(address::vtep_mac(2).to_string()),
                    ..third.clone()
                })?,
                &[
                    "have the same VTEP MAC 02:52:53:00:00:02",
                    "give each its own",
                ],
            ),
            (
                "no address",
                good.replace("10.199.0.12", "10.199.0.1200"),
                &[
                    "entry 2 (node \"n2\")",
                    "\"publicIP\" is \"10.199.0.1200\"",
                    "write one like",
                ],
            ),
            (
                "outside the pod network",
                with(Lease {
                    subnet: Some("10.245.3.0/24".to_owned()),
                    ..third.clone()
                })?,
                &[
                    "entry 3",
                    "10.245.3.0/24",
                    "is not inside the pod network 10.244.0.0/16",
                ],
            ),
            (
                "unknown key",
                good.replacen("\"publicIP\"", "\"publicIp\"", 1),
                &["publicIp", "expected one of"],
            ),
            (
                "without this node",
                serde_json::to_string(&Leases {
                    leases: vec![Lease::of_node(2), third],
                })?,
                &["no entry for this node, \"n1\"", "--node-name"],
            ),
        ];
        let mut seen = node.controlplane_log().len();
        let mut expect = |what: &str, parts: &[&str]| -> Result<()> {
            let mut news = String::new();
            let outcome = wait_until(&format!("{what}: logged"), PATIENCE, || {
                news = node.controlplane_log()[seen..].to_owned();
                parts.iter().all(|part| news.contains(part))
            });
            outcome.with_context(|| format!("expected {parts:?}, logged was {news:?}"))?;
            seen += news.len();
            assert_eq!(node.fib_generation()?, generation, "{what}: published");
            assert_eq!(standby(node)?, routes, "{what}: standby");
            assert_eq!(node.detour()?.len(), 1, "{what}: detour");
            Ok(())
        };
        let file = node.lease_file();
        for (what, text, parts) in cases {
            // As a careless editor does it, not by rename.
            fs::write(&file, text)?;
            expect(what, &["ERROR", &file.display().to_string()])
                .and_then(|()| expect_parts(node, what, parts))?;
        }
        fs::remove_file(&file)?;
        expect("removed", &["create it, or name another with --lease-file"])?;
        node.write_leases(&lab.leases())?;
        expect("good again", &["works again"])?;
        assert!(node.controlplane_is_running());
        assert_undisturbed(traffic);
        Ok(())
    })
}

/// The last error that a control plane logged says all of this.
fn expect_parts(node: &Node, what: &str, parts: &[&str]) -> Result<()> {
    let log = node.controlplane_log();
    let mut errors = log.lines().filter(|line| line.contains("ERROR"));
    let last = errors.next_back().context("no error was logged")?;
    for part in parts {
        assert!(last.contains(part), "{what}: {part:?} is not in {last}");
    }
    Ok(())
}

/// The value of a field in a line of a log.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let start = line.find(&format!(" {name}="))? + name.len() + 2;
    line[start..].split_whitespace().next()
}

#[test]
fn fifteen_thousand_leases_arrive_under_traffic() -> Result<()> {
    const LEASES: usize = 15_000;
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        for node in lab.ripstop_nodes() {
            // Large enough for all, without the underlay.
            node.write_net_conf(&json!({
                "Network": "10.240.0.0/12",
                "Backend": { "Type": "vxlan" },
            }))?;
        }
        lab.start_ripstop()?;
        let traffic = steady(lab.pod(1, 0), lab.pod(2, 0), 8000)?;
        let node = lab.node(1);
        let mut leases = lab.leases();
        for number in 0u32.. {
            if leases.leases.len() == LEASES {
                break;
            }
            // Behind the underlay's gateway, 32 pods each.
            let subnet = Ipv4Addr::from_bits(Ipv4Addr::new(10, 248, 0, 0).to_bits() + number * 32);
            let [_, _, high, low] = number.to_be_bytes();
            leases.leases.push(Lease {
                node: format!("far-{number}"),
                public_ip: Some(Ipv4Addr::from_bits(
                    Ipv4Addr::new(172, 16, 0, 1).to_bits() + number,
                )),
                subnet: Some(format!("{subnet}/27")),
                vtep_mac: Some(Mac([0x02, 0x52, 0x53, 0x10, high, low]).to_string()),
                ..Lease::default()
            });
        }
        let seen = node.controlplane_log().len();
        let start = Instant::now();
        lab.write_leases(&leases)?;
        wait_until("the table is published", PATIENCE, || {
            node.controlplane_log()[seen..].contains(&format!("leases={LEASES} resolved"))
        })?;
        let published = start.elapsed();
        wait_until("workers carry all of it", 3 * PATIENCE, || {
            node.detour().is_ok_and(|detour| detour.len() == LEASES - 1)
        })?;
        let carried = start.elapsed();
        // The kernel's path is programmed in slices, so that this takes no core away from traffic.
        wait_until("the standby has all of it", 6 * PATIENCE, || {
            sleep(Duration::from_millis(200));
            standby(node).is_ok_and(|state| state.iter().all(|lines| lines.len() == LEASES - 1))
        })?;
        let complete = start.elapsed();
        let log = node.controlplane_log();
        let news = &log[seen..];
        let mut steps = String::new();
        for (message, fields) in [
            ("leases loaded", &["leases", "took_us"][..]),
            (" published ", &["resolved", "bytes", "compile_us", "publish_us", "since_change_us"]),
            ("standby path set", &["entries", "took_us"]),
            ("peer filter set", &["peers", "took_ms"]),
        ] {
            for line in news.lines().filter(|line| line.contains(message)) {
                write!(steps, "\n  {}:", message.trim())?;
                for name in fields {
                    write!(steps, " {name}={}", field(line, name).unwrap_or("?"))?;
                }
            }
        }
        println!(
            "{LEASES} leases: published {published:.1?} after the file was written, carried by workers after \
             {carried:.1?}, on the standby after {complete:.1?}{steps}"
        );
        for report in traffic.stop() {
            println!("  meanwhile: {report}");
            // Order is not asked for: the pods' own kernels shuffle a flow when the cores are this busy.
            assert_eq!((report.lost, report.duplicated, report.corrupt), (0, 0, 0), "{report}");
        }
        Ok(())
    })
}
