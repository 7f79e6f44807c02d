//! A tear does not run: one process after the other is killed, stopped and hung under 24,000 packets a second.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═══ fabric ═══ worker ─ rip0 ─ n2 ─ n2p0      four flows each way
//!           └── flannel.1 ═════════╝ ╚═══════════ flannel.1 ──┘             the standby path
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "what each death cost is worth reading")]

use core::time::Duration;
use std::collections::BTreeSet;
use std::fs;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ripstop_fib::stats::KernelCounter;
use ripstop_perf::{
    DETOUR_TABLE, Host, Lab, LinkCounters, Mark, Node, NodeKind, Ping, TrafficGroup, UdpFlow,
    Workers, address, machine, wait_until,
};

/// What is asked for, both ways together, and what it has to come to.
const RATE: u64 = 24_000;
const RATE_MIN: u64 = 20_000;
/// How long a wait may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(20);
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(300);

/// Two Ripstop nodes whose workers carry traffic both ways.
fn under_traffic(test: impl FnOnce(&Lab, TrafficGroup) -> Result<()>) -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        let flow = |from, to| UdpFlow::new(from, to).flows(4).rate(RATE / 2).start();
        let traffic = TrafficGroup::new(vec![flow(one, other)?, flow(other, one)?]);
        wait_until("traffic flows", PATIENCE, || {
            let members = traffic.members().iter();
            members
                .map(|member| member.snapshot().received)
                .all(|received| received > RATE / 10)
        })?;
        test(lab, traffic)
    })
}

/// Ends the traffic; fails when it was too little to prove anything.
fn end(traffic: TrafficGroup) -> Result<[u64; 3]> {
    // A loss that is hard to explain is easier to when others wanted the cores as well.
    let pressure = fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    println!(
        "  cpu pressure: {}",
        pressure.lines().next().unwrap_or("unknown")
    );
    let reports = traffic.stop();
    let rate: u64 = reports.iter().map(|report| report.rate()).sum();
    for report in &reports {
        println!("  {report}");
        assert_eq!((report.corrupt, report.foreign), (0, 0), "{report}");
    }
    ensure!(
        rate >= RATE_MIN,
        "this machine sent {rate} packets/s of {RATE}: too busy to prove what {RATE_MIN} would"
    );
    let sum = |value: fn(&ripstop_perf::TrafficReport) -> u64| reports.iter().map(value).sum();
    Ok([
        sum(|report| report.lost),
        sum(|report| report.reordered),
        sum(|report| report.duplicated),
    ])
}

/// What a node's two paths have carried.
struct Paths {
    workers: Workers,
    standby: LinkCounters,
}

impl Paths {
    fn of(node: &Node) -> Result<Self> {
        Ok(Self {
            workers: node.workers()?,
            standby: node.standby_counters()?,
        })
    }

    /// Packets sent and received by the workers, and by the standby device, since.
    fn since(&self, before: &Self) -> [u64; 4] {
        [
            self.workers.encapsulated() - before.workers.encapsulated(),
            self.workers.decapsulated() - before.workers.decapsulated(),
            self.standby.tx_packets - before.standby.tx_packets,
            self.standby.rx_packets - before.standby.rx_packets,
        ]
    }
}

/// Lets traffic run for a while; what both paths of a node carried of it, and how much was lost.
fn watch(node: &Node, traffic: &TrafficGroup, time: Duration) -> Result<([u64; 4], u64)> {
    let (start, before) = (traffic.mark(), Paths::of(node)?);
    sleep(time);
    let (end, after) = (traffic.mark(), Paths::of(node)?);
    let lost = lost_between(traffic, &start, &end);
    Ok((after.since(&before), lost))
}

fn lost_between(traffic: &TrafficGroup, start: &[Mark], end: &[Mark]) -> u64 {
    traffic.lost_before(end, QUIET) - traffic.lost_before(start, QUIET)
}

#[test]
fn nothing_is_lost_while_the_control_plane_is_dead() -> Result<()> {
    under_traffic(|lab, traffic| {
        let node = lab.node(1);
        let before = [Paths::of(lab.node(1))?, Paths::of(lab.node(2))?];
        let (start, generation) = (traffic.snapshot(), node.fib_generation()?);
        node.kill_controlplane();
        sleep(Duration::from_millis(3500));
        node.start_controlplane()?;
        sleep(Duration::from_millis(2000));
        assert!(
            node.controlplane_is_running(),
            "{}",
            node.controlplane_log()
        );
        let end_of_watch = traffic.snapshot();
        let after = [Paths::of(lab.node(1))?, Paths::of(lab.node(2))?];
        assert_eq!(end(traffic)?, [0, 0, 0], "lost, reordered, duplicated");

        let log = node.controlplane_log();
        assert!(log.contains("forwarding table adopted"), "{log}");
        assert_eq!(
            node.fib_generation()?,
            generation,
            "the restarted control plane goes on from the table it finds"
        );
        // Counters are published every few milliseconds, so a watch ends a little early.
        let sent = end_of_watch.sent - start.sent;
        let carried: u64 = before
            .iter()
            .zip(&after)
            .map(|(before, after)| {
                let [encapsulated, _, out, back] = after.since(before);
                assert_eq!([out, back], [0, 0], "the standby carried some");
                encapsulated
            })
            .sum();
        assert!(
            carried + RATE / 4 > sent,
            "workers carried {carried} of {sent}"
        );
        println!("control plane killed and restarted: {sent} packets, 0 lost, all by workers");
        Ok(())
    })
}

/// Kills the data plane of n1 under traffic, and starts it again.
fn kill_the_dataplane(lab: &Lab, traffic: TrafficGroup, alone: bool) -> Result<()> {
    let node = lab.node(1);
    if alone {
        node.kill_controlplane();
        sleep(Duration::from_millis(300));
    }
    let healthy = traffic.mark();
    assert_eq!(traffic.lost_before(&healthy, QUIET), 0, "before the kill");
    let generation = node.fib_generation()?;
    let killed_at = Instant::now();
    node.kill_dataplane();
    let took = killed_at.elapsed();
    sleep(Duration::from_millis(200));
    let dead = traffic.mark();
    let cost = traffic.lost_before(&dead, QUIET);
    let gap = traffic.snapshot().longest_gap;
    let bound = node.held_max()?;
    println!(
        "data plane killed{}: {cost} lost of at most {bound} held, longest gap {gap:.1?}, end took {took:.1?}",
        if alone { ", no control plane" } else { "" }
    );
    assert!(cost <= bound, "{cost} lost, rings and queues hold {bound}");
    let links = node.output(&["ip", "-br", "link"])?;
    assert!(!links.contains("rip0"), "{links}");
    let (start, at_start) = (traffic.snapshot().sent, node.standby_counters()?);
    sleep(Duration::from_secs(1));
    let (end_mark, at_end) = (traffic.mark(), node.standby_counters()?);
    let sent = traffic.snapshot().sent - start;
    assert_eq!(
        lost_between(&traffic, &dead, &end_mark),
        0,
        "on the standby path"
    );
    for carried in [
        at_end.tx_packets - at_start.tx_packets,
        at_end.rx_packets - at_start.rx_packets,
    ] {
        assert!(
            carried > sent / 3,
            "the standby carried {carried} of {sent}"
        );
    }
    assert_eq!(traffic.snapshot().reordered, 0, "by falling back");

    if alone {
        // Without a control plane the way back leads through the standby; a reverse-path filter, which systemd sets
        // for every new device, must not mind.
        let line = "echo 2 > /proc/sys/net/ipv4/conf/default/rp_filter";
        node.output(&["sh", "-c", line])?;
    }
    node.start_dataplane()?;
    if alone {
        // The table outlives its publisher: what comes in is taken by the workers at once.
        let pid = u64::try_from(node.dataplane_pid().context("pid")?)?;
        wait_until("workers receive", PATIENCE, || {
            node.workers()
                .is_ok_and(|workers| workers.pid == pid && workers.decapsulated() > RATE / 10)
        })?;
        assert_eq!(node.workers()?.generation(), generation);
        node.start_controlplane()?;
    }
    node.wait_for_detour(1)?;
    sleep(Duration::from_millis(200));
    let back = traffic.mark();
    let switch_lost = lost_between(&traffic, &end_mark, &back);
    let reordered = traffic.snapshot().reordered;
    println!("data plane restarted: {switch_lost} lost, {reordered} reordered in switching back");
    assert_eq!(switch_lost, 0, "in switching back");
    on_the_workers(node, &traffic)?;
    let totals = end(traffic)?;
    assert_eq!(totals, [cost, reordered, 0], "lost, reordered, duplicated");
    Ok(())
}

/// For a second all traffic goes through the workers and nothing is lost.
fn on_the_workers(node: &Node, traffic: &TrafficGroup) -> Result<()> {
    let ([encapsulated, decapsulated, out, back], lost) =
        watch(node, traffic, Duration::from_secs(1))?;
    assert_eq!(lost, 0, "on the workers");
    assert_eq!([out, back], [0, 0], "packets on the standby");
    for carried in [encapsulated, decapsulated] {
        assert!(carried > RATE / 4, "workers carried {carried} in a second");
    }
    Ok(())
}

#[test]
fn the_kernel_takes_over_from_a_killed_data_plane() -> Result<()> {
    under_traffic(|lab, traffic| kill_the_dataplane(lab, traffic, false))
}

#[test]
fn nobody_is_needed_to_take_over_from_a_killed_data_plane() -> Result<()> {
    under_traffic(|lab, traffic| kill_the_dataplane(lab, traffic, true))
}

#[test]
fn a_starting_control_plane_lets_the_standby_s_traffic_pass() -> Result<()> {
    under_traffic(|lab, traffic| {
        let node = lab.node(1);
        node.kill_dataplane();
        sleep(Duration::from_millis(200));
        let mut mark = traffic.mark();
        for filter in ["kept", "kept", "kept", "missing"] {
            node.kill_controlplane();
            if filter == "missing" {
                // As on a node that has run flannel until then.
                node.output(&["nft", "delete", "table", "ip", "ripstop"])?;
            }
            let seen = node.controlplane_log().len();
            node.start_controlplane()?;
            wait_until("the peer filter is set", PATIENCE, || {
                node.controlplane_log()[seen..].contains("peer filter set")
            })?;
            sleep(Duration::from_millis(300));
            let now = traffic.mark();
            let lost = lost_between(&traffic, &mark, &now);
            assert_eq!(lost, 0, "by a start with the peer filter {filter}");
            mark = now;
        }
        let rules = node.output(&["nft", "list", "table", "ip", "ripstop"])?;
        for part in ["jump tunnel", "10.199.0.12 . ", "@peers return"] {
            assert!(rules.contains(part), "{part:?} is not in {rules}");
        }
        end(traffic).map(drop)
    })
}

#[test]
fn a_data_plane_that_is_told_to_stop_hands_over() -> Result<()> {
    under_traffic(|lab, traffic| {
        let node = lab.node(1);
        let before = traffic.mark();
        node.signal_dataplane(libc::SIGTERM)?;
        wait_until("the data plane has ended", PATIENCE, || {
            !node.dataplane_is_running()
        })?;
        assert!(
            node.dataplane_log().contains("data plane stopped"),
            "{}",
            node.dataplane_log()
        );
        sleep(Duration::from_millis(200));
        let after = traffic.mark();
        let stop_lost = lost_between(&traffic, &before, &after);
        let stop_reordered = traffic.snapshot().reordered;
        println!(
            "data plane stopped: {stop_lost} lost, {stop_reordered} reordered; its workers dropped {:?}",
            node.workers()?.drops()
        );
        for member in traffic.members() {
            println!("  {}", member.snapshot());
        }
        assert_eq!(stop_lost, 0, "in stopping");

        node.start_dataplane()?;
        node.wait_for_detour(1)?;
        sleep(Duration::from_millis(200));
        let start_lost = lost_between(&traffic, &after, &traffic.mark());
        println!("data plane started again: {start_lost} lost");
        assert_eq!(start_lost, 0, "in starting again");
        on_the_workers(node, &traffic)?;
        let [lost, _, duplicated] = end(traffic)?;
        assert_eq!([lost, duplicated], [0, 0], "lost, duplicated");
        Ok(())
    })
}

#[test]
fn a_hung_data_plane_loses_the_traffic_to_the_kernel() -> Result<()> {
    under_traffic(|lab, traffic| {
        let node = lab.node(1);
        let before = node.workers()?;
        let hung_at = Instant::now();
        node.signal_dataplane(libc::SIGSTOP)?;
        wait_until("the rule is withdrawn", PATIENCE, || {
            node.has_detour_rule().is_ok_and(|there| !there)
        })?;
        let withdrawn = hung_at.elapsed();
        assert!(
            withdrawn < Duration::from_secs(2),
            "the rule was there for {withdrawn:?}"
        );
        // The XDP program stops to believe in the worker at about the same time, without being told.
        let passed = |standby: &LinkCounters| standby.rx_packets > RATE / 100;
        wait_until(
            "the kernel gets what enters",
            Duration::from_secs(2),
            || node.standby_counters().is_ok_and(|now| passed(&now)),
        )?;
        let stalled = hung_at.elapsed();
        let (start, standby) = (traffic.mark(), node.standby_counters()?);
        sleep(Duration::from_secs(1));
        let (end_of_watch, now) = (traffic.mark(), node.standby_counters()?);
        assert_eq!(
            lost_between(&traffic, &start, &end_of_watch),
            0,
            "on the standby path"
        );
        for carried in [
            now.tx_packets - standby.tx_packets,
            now.rx_packets - standby.rx_packets,
        ] {
            assert!(carried > RATE / 4, "the standby carried {carried}");
        }
        println!(
            "data plane hung: rule withdrawn after {withdrawn:.1?}, NIC queue to the kernel after {stalled:.1?}"
        );

        node.signal_dataplane(libc::SIGCONT)?;
        node.wait_for_detour(1)?;
        sleep(Duration::from_millis(500));
        on_the_workers(node, &traffic)?;
        let after = node.workers()?;
        let xdp = after.xdp();
        let stalled = xdp.iter().find(|(name, _)| *name == "stalled");
        println!(
            "data plane continued: {} refused by its full receive ring meanwhile, then {stalled:?}",
            after.kernel(KernelCounter::RxRingFull) - before.kernel(KernelCounter::RxRingFull)
        );
        assert!(
            stalled.is_some_and(|(_, count)| *count > RATE / 4),
            "{xdp:?}"
        );
        let [_, _, duplicated] = end(traffic)?;
        assert_eq!(duplicated, 0);
        Ok(())
    })
}

/// Everything that Ripstop could leave in a node's kernel, by the command that shows it.
fn kernel_state(node: &Node) -> Result<Vec<(&'static str, BTreeSet<String>)>> {
    let commands = [
        "ip -d link",
        "ip rule",
        "ip -6 rule",
        "ip -4 -d route show table all type unicast",
        "ip -4 addr",
        "ip neigh show nud permanent",
        "bridge fdb show dev eth0",
        "nft list ruleset",
    ];
    let lines = |command: &'static str| {
        let argv: Vec<&str> = command.split(' ').collect();
        let text = node.output(&argv)?;
        // `ip -d link` shows since when a bridge's timers run.
        let fixed = text.lines().filter(|line| !line.contains("_timer"));
        Ok((command, fixed.map(str::to_owned).collect()))
    };
    commands.into_iter().map(lines).collect()
}

fn shown<'a>(state: &'a [(&'static str, BTreeSet<String>)], command: &str) -> &'a BTreeSet<String> {
    let entry = state.iter().find(|(name, _)| *name == command);
    entry.map_or_else(|| panic!("{command} was not asked"), |(_, lines)| lines)
}

/// What of somebody else's stands beside Ripstop, some of it in its very places.
fn set_up_foreign_things(node: &Node) -> Result<()> {
    for command in [
        "nft add table ip somebody",
        "nft add chain ip somebody input { type filter hook input priority 5 ; }",
        "nft add rule ip somebody input udp dport 9 counter drop",
        "nft add table inet ripstop",
        "iptables -A FORWARD -i nowhere -j DROP",
        "ip rule add priority 150 to 192.0.2.0/24 table 777",
        "ip rule add priority 31999 to 198.51.100.0/24 table 21097",
        "ip route add 192.0.2.0/24 dev eth0 table 777",
        "ip route add 198.51.100.0/24 dev eth0 table 21097",
        "ip route add 203.0.113.0/24 dev eth0 proto static",
        "ip link add name other.1 type vxlan id 7 local 10.199.0.11 dev eth0 dstport 4789",
    ] {
        let argv: Vec<&str> = command.split(' ').collect();
        node.output(&argv)?;
    }
    fs::write(node.run_dir().join("notes.txt"), "somebody's")?;
    Ok(())
}

#[test]
fn the_dead_leave_what_flannel_leaves_and_cleanup_takes_the_rest() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        let (node, plain) = (lab.node(1), lab.node(3));
        assert_eq!(plain.kind(), NodeKind::PlainLinux);
        set_up_foreign_things(node)?;
        let untouched = kernel_state(node)?;
        lab.start_ripstop()?;
        // In this order nobody sees the data plane die.
        node.kill_controlplane();
        node.kill_dataplane();
        let dead = kernel_state(node)?;

        // Links: what was there before, and the tunnel device, with the same settings as on a node of flannel's.
        let links = |node: &Node| -> Result<BTreeSet<String>> {
            let text = node.output(&["ip", "-br", "link"])?;
            let names = text
                .lines()
                .filter_map(|line| line.split([' ', '@']).next());
            Ok(names.map(str::to_owned).collect())
        };
        let mut expected = links(plain)?;
        expected.insert("other.1".to_owned());
        assert_eq!(links(node)?, expected);
        let all: String = shown(&dead, "ip -d link").iter().cloned().collect();
        assert!(!all.contains("xdp"), "an XDP program is left: {all}");
        let vxlan = |node: &Node| -> Result<String> {
            let text = node.output(&["ip", "-d", "link", "show", "flannel.1"])?;
            let line = text.lines().find(|line| line.contains("vxlan id"));
            Ok(line
                .context("flannel.1 is no VXLAN device")?
                .replace(&node.address().to_string(), "ME"))
        };
        assert_eq!(vxlan(node)?, vxlan(plain)?);

        // Routes: flannel's, and nothing in the table of the detour but what is somebody else's.
        let new = |command| -> BTreeSet<String> {
            shown(&dead, command)
                .difference(shown(&untouched, command))
                .map(|line| line.trim().to_owned())
                .collect()
        };
        let route = |to: u8| {
            let subnet = address::subnet(to);
            format!("unicast {subnet}/24 via {subnet} dev flannel.1 table main proto 82 scope global onlink")
        };
        assert_eq!(
            new("ip -4 -d route show table all type unicast"),
            [2, 3].map(route).into_iter().collect()
        );
        let neighbour = |to: u8| {
            format!(
                "{} dev flannel.1 lladdr {} PERMANENT",
                address::subnet(to),
                address::vtep_mac(to)
            )
        };
        assert_eq!(
            new("ip neigh show nud permanent"),
            [2, 3].map(neighbour).into_iter().collect()
        );
        let entry = |to: u8| {
            format!(
                "{} dst {} self permanent",
                address::vtep_mac(to),
                address::underlay(to)
            )
        };
        let fdb = node.output(&["bridge", "fdb", "show", "dev", "flannel.1"])?;
        assert_eq!(
            fdb.lines()
                .map(|line| line.trim().to_owned())
                .collect::<BTreeSet<_>>(),
            [2, 3].map(entry).into_iter().collect()
        );
        let filter = new("nft list ruleset");
        assert!(filter.contains("table ip ripstop {"), "{filter:?}");
        assert_eq!(new("bridge fdb show dev eth0"), BTreeSet::new());
        // The kernel has no rule that goes with a device. This one leads to nothing, so it changes no packet's way.
        let rules = new("ip rule");
        println!("rules left by the dead: {rules:?}");
        let harmless = format!("32000:\tfrom all lookup {DETOUR_TABLE} proto 82");
        assert!(rules.iter().all(|rule| *rule == harmless), "{rules:?}");
        for (from, to) in lab.pod_pairs() {
            assert_eq!(
                Ping::new(from, to).run()?.received,
                1,
                "{} to {}",
                from.name(),
                to.name()
            );
        }

        // Cleaned up, with the standby: as it was before Ripstop came.
        let standby_before = node.output(&["ip", "-d", "route", "show", "dev", "flannel.1"])?;
        println!("{}", node.ripstop_text(&["cleanup"])?);
        let clean = kernel_state(node)?;
        assert_eq!(shown(&clean, "ip rule"), shown(&untouched, "ip rule"));
        // Of the rules, what flannel leaves as well.
        let (now, before) = (
            shown(&clean, "nft list ruleset"),
            shown(&untouched, "nft list ruleset"),
        );
        assert!(before.is_subset(now), "{now:?}");
        let of_flannels = |line: &&String| {
            line.contains("FLANNEL-FWD") || line.contains(&format!("addr {} ", address::POD_NETWORK))
        };
        let left = now.difference(before).filter(|line| !line.is_empty());
        let left: Vec<_> = left.collect();
        assert!(left.len() == 4 && left.iter().all(of_flannels), "{left:?}");
        assert_eq!(
            node.output(&["ip", "-d", "route", "show", "dev", "flannel.1"])?,
            standby_before
        );
        assert_eq!(Ping::new(lab.pod(1, 0), lab.pod(2, 0)).run()?.received, 1);
        let files = fs::read_dir(node.run_dir())?.map(|entry| Ok(entry?.file_name()));
        assert_eq!(files.collect::<Result<Vec<_>>>()?, ["notes.txt"]);
        println!("{}", node.ripstop_text(&["cleanup", "--standby"])?);
        for ((command, now), (_, before)) in kernel_state(node)?.iter().zip(&untouched) {
            assert_eq!(now, before, "{command}");
        }
        Ok(())
    })
}

#[test]
fn cleanup_leaves_what_runs_alone() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(1);
        let error = node
            .ripstop_text(&["cleanup"])
            .map(drop)
            .expect_err("both run");
        let pid = node.controlplane_pid().context("pid")?.to_string();
        let text = format!("{error:#}");
        for part in ["control plane runs", &pid, "stop it first"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        node.kill_controlplane();
        let text = format!(
            "{:#}",
            node.ripstop_text(&["cleanup"])
                .map(drop)
                .expect_err("one runs")
        );
        assert!(text.contains("data plane runs"), "{text}");
        assert_eq!(
            node.detour()?,
            [address::subnet_prefix(2)],
            "table {DETOUR_TABLE}"
        );
        Ok(())
    })
}
