//! What others take away or change is back at once, and meanwhile pods talk by the other path: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 ─ rule ─ table 21097 ─ rip0 ─ worker ═══ fabric ═══ n2 ─ n2p0      two families, both ways
//!           └── main table ─ flannel.1, neighbour, FDB ═══╝
//! ```
//!
//! Each thing is damaged twice. First while the control plane sleeps, so that nobody can mend it: the damage is there to
//! be seen, the other path alone carries, and nothing is lost. Then while it is awake: the time until all is as it
//! was. The promise is a second; the bound is wider, because the machine may have much else to do.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "how long each took is worth reading")]

#[path = "common/kube.rs"]
mod kube;

use core::time::Duration;
use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ripstop_perf::{
    Backend, Fabric, Families, Family, Host, Lab, Lease, Mark, Node, Ping, TrafficGroup, UdpFlow,
    address, machine, run, wait_until,
};
use serde_json::json;

/// How long a wait may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// The promise is a second.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(300);
/// Packets a second of each flow.
const RATE: u64 = 1000;
/// How long the other path is watched.
const WATCH: Duration = Duration::from_millis(300);

/// What some commands show of a node, without what differs from one look to the next: numbers of interfaces, counters
/// of chains, times. Of what is not there, nothing.
fn look(node: &Node, commands: &[&str]) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for command in commands {
        let argv: Vec<&str> = command.split_whitespace().collect();
        let output = node.exec(&argv)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in text.lines().map(str::trim) {
            let numbered = line.split_once(": ");
            let line = match numbered {
                Some((number, rest)) if number.parse::<u32>().is_ok() => rest,
                Some(_) | None => line,
            };
            let line = line.split(" [").next().unwrap_or_default().trim();
            if !line.is_empty() && !line.starts_with('#') {
                seen.insert(format!("{command}: {line}"));
            }
        }
    }
    Ok(seen)
}

/// Everything that the control plane keeps in a node's kernel.
const ALL: [&str; 16] = [
    "ip -o -d link show flannel.1",
    "ip -o -d link show flannel-v6.1",
    "ip -o addr show dev flannel.1 scope global",
    "ip -o addr show dev flannel-v6.1 scope global",
    "ip -4 route show proto 82",
    "ip -6 route show proto 82",
    "ip -4 route show table 21097",
    "ip -6 route show table 21097",
    "ip -4 rule",
    "ip -6 rule",
    "ip neigh show nud permanent",
    "bridge fdb show dev flannel.1",
    "bridge fdb show dev flannel-v6.1",
    "nft -s list table ip ripstop",
    "nft -s list table ip6 ripstop",
    "nft -s list table inet ripstop-guard",
];
/// The masquerade rules: in iptables they are looked at once in `--iptables-resync` seconds, the shortest of which is one.
const RULES: [&str; 4] = [
    "iptables-save -t nat",
    "iptables-save -t filter",
    "ip6tables-save -t nat",
    "ip6tables-save -t filter",
];

/// Who carries pods' packets while a part is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carrier {
    Workers,
    Kernel,
}

/// A node that is damaged under traffic.
struct Patient<'a> {
    node: &'a Node,
    traffic: TrafficGroup,
    healthy: BTreeSet<String>,
    table: Vec<String>,
}

impl<'a> Patient<'a> {
    /// The lab's first node, with traffic to and from the second in all families.
    fn new(lab: &'a Lab) -> Result<Self> {
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane_with(&["--ip-masq", "--iptables-resync=1"])?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(lab.families().len())?;
        }
        let (node, one, other) = (lab.node(1), lab.pod(1, 0), lab.pod(2, 0));
        wait_until("the rules are there", PATIENCE, || {
            let nat = look(node, &[RULES[0]]).unwrap_or_default();
            let filter = look(node, &["nft -s list table ip ripstop"]).unwrap_or_default();
            let tunnel = lab.backend() != Backend::HostGw;
            nat.iter().any(|line| line.contains("FLANNEL-POSTRTG"))
                && (!tunnel || filter.iter().any(|line| line.contains("@peers return")))
        })?;
        let mut flows = Vec::new();
        for family in lab.families() {
            for (from, to) in [(one, other), (other, one)] {
                let flow = UdpFlow::new(from, to).over(family).flows(4).rate(RATE);
                flows.push(flow.start()?);
            }
        }
        let traffic = TrafficGroup::new(flows);
        wait_until("traffic flows", PATIENCE, || {
            let mut members = traffic.members().iter();
            members.all(|member| member.snapshot().received > RATE / 5)
        })?;
        let mut patient = Self {
            node,
            traffic,
            healthy: BTreeSet::new(),
            table: Vec::new(),
        };
        patient.healthy = patient.all()?;
        ensure!(
            patient.healthy.len() > 20,
            "little to lose: {:?}",
            patient.healthy
        );
        Ok(patient)
    }

    fn all(&self) -> Result<BTreeSet<String>> {
        look(self.node, &[&ALL[..], &RULES[..]].concat())
    }

    fn lost_between(&self, start: &[Mark], end: &[Mark]) -> u64 {
        self.traffic.lost_before(end, QUIET) - self.traffic.lost_before(start, QUIET)
    }

    fn is_healthy(&self) -> Result<()> {
        let mut last = BTreeSet::new();
        let outcome = wait_until("everything is as before", PATIENCE, || {
            last = self.all().unwrap_or_default();
            last == self.healthy
        });
        outcome.with_context(|| {
            let missing: Vec<_> = self.healthy.difference(&last).collect();
            let added: Vec<_> = last.difference(&self.healthy).collect();
            format!("missing {missing:#?}\nadded {added:#?}")
        })
    }

    /// Damages a part while the control plane sleeps, and again while it is awake. Nothing may be lost.
    fn damage(&mut self, what: &str, carrier: Carrier, damage: &[String]) -> Result<()> {
        let node = self.node;
        let hurt = || -> Result<()> {
            let mut commands = damage.iter();
            commands.try_for_each(|command| run(node, command).map(drop))
        };
        let start = self.traffic.mark();
        node.signal_controlplane(libc::SIGSTOP)?;
        let outcome = hurt().and_then(|()| {
            // What the workers have in hand when the routes go is theirs, and is counted a little later.
            sleep(Duration::from_millis(100));
            let (sent, carried) = (self.traffic.snapshot().sent, node.workers()?.encapsulated());
            sleep(WATCH);
            let carried = node.workers()?.encapsulated() - carried;
            Ok((
                self.all()?,
                self.traffic.snapshot().sent - sent,
                carried,
                node.standby_counters()?,
            ))
        });
        let asleep_end = self.traffic.mark();
        node.signal_controlplane(libc::SIGCONT)?;
        let (damaged, sent, by_workers, _) = outcome?;
        assert_ne!(damaged, self.healthy, "{what}: nothing is damaged");
        self.is_healthy()
            .with_context(|| format!("{what}, when the control plane woke"))?;
        let asleep_lost = self.lost_between(&start, &asleep_end);
        assert_eq!(asleep_lost, 0, "{what}: lost while nobody mended it");
        match carrier {
            Carrier::Workers => assert!(
                by_workers > sent / 4,
                "{what}: workers carried {by_workers} of {sent}"
            ),
            Carrier::Kernel => assert_eq!(by_workers, 0, "{what}: workers carried of {sent}"),
        }
        let differs = |command: &&str| {
            let of = |all: &BTreeSet<String>| -> Vec<String> {
                let lines = all.iter().filter(|line| line.starts_with(command));
                lines.cloned().collect()
            };
            of(&damaged) != of(&self.healthy)
        };
        let parts: Vec<&str> = [&ALL[..], &RULES[..]].concat();
        let parts: Vec<&str> = parts.into_iter().filter(differs).collect();
        let start = self.traffic.mark();
        let took = self.awake(what, &parts, hurt)?;
        sleep(Duration::from_millis(100));
        let lost = self.lost_between(&start, &self.traffic.mark());
        assert_eq!(lost, 0, "{what}: lost while it was mended");
        let by = match carrier {
            Carrier::Workers => "workers",
            Carrier::Kernel => "kernel",
        };
        self.table.push(format!(
            "{what:<34} {took:>9.1?} {sent:>9} {by:<8} {lost:>5}"
        ));
        Ok(())
    }

    /// Makes a change while the control plane is awake; how long until the parts that it concerns are as they were.
    fn awake(
        &self,
        what: &str,
        parts: &[&str],
        change: impl FnOnce() -> Result<()>,
    ) -> Result<Duration> {
        let started = Instant::now();
        change()?;
        let of_parts = |line: &&String| parts.iter().any(|part| line.starts_with(part));
        let wanted: BTreeSet<String> = self.healthy.iter().filter(of_parts).cloned().collect();
        wait_until(what, PATIENCE, || {
            look(self.node, parts).is_ok_and(|seen| seen == wanted)
        })?;
        let took = started.elapsed();
        self.is_healthy().with_context(|| what.to_owned())?;
        assert!(took < BACK_WITHIN, "{what}: back after {took:?}");
        Ok(took)
    }

    /// A change that takes the link away for a moment: what was on the way then is lost, and nothing after it.
    fn interrupt(&mut self, what: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = self.traffic.mark();
        let took = self.awake(what, &ALL, change)?;
        self.on_the_workers()?;
        let lost = self.lost_between(&start, &self.traffic.mark());
        let (sent, by) = ("", "(nobody)");
        self.table.push(format!(
            "{what:<34} {took:>9.1?} {sent:>9} {by:<8} {lost:>5}"
        ));
        Ok(())
    }

    /// The link goes down, once for a moment and once for longer, and comes up. What else the kernel forgets then, whoever
    /// has configured it gives back.
    fn flap(&mut self, lab: &Lab) -> Result<()> {
        let node = self.node;
        let mut commands = vec![
            "ip link set eth0 up".to_owned(),
            format!("ip route replace default via {}", address::FABRIC),
        ];
        if lab.families().contains(&Family::Ipv6) {
            commands.push(format!("ip addr add {}/64 dev eth0 nodad", node.address6()));
            commands.push(format!("ip -6 route replace ::/0 via {}", address::FABRIC6));
        }
        for (what, down) in [
            ("eth0 up after a moment", Duration::ZERO),
            ("eth0 up after 4 s", Duration::from_secs(4)),
        ] {
            run(node, "ip link set eth0 down")?;
            sleep(down);
            let up = || {
                commands
                    .iter()
                    .try_for_each(|command| run(node, command).map(drop))
            };
            self.interrupt(what, up)?;
        }
        Ok(())
    }

    /// From here on nothing is lost, and the workers carry it.
    fn on_the_workers(&self) -> Result<()> {
        let node = self.node;
        let mut before = node.workers()?.encapsulated();
        wait_until(
            "the workers carry traffic, and lose nothing",
            PATIENCE,
            || {
                let start = self.traffic.mark();
                sleep(WATCH);
                let end = self.traffic.mark();
                let now = node
                    .workers()
                    .map_or(before, |workers| workers.encapsulated());
                let carried = now - before;
                before = now;
                carried > RATE / 5 && self.lost_between(&start, &end) == 0
            },
        )
    }

    fn finish(self, title: &str) -> Result<()> {
        println!("\n{title}");
        println!(
            "{:<34} {:>9} {:>9} {:<8} {:>5}",
            "damage", "back in", "meanwhile", "by", "lost"
        );
        for row in &self.table {
            println!("{row}");
        }
        for report in self.traffic.stop() {
            println!("  {report}");
            assert_eq!(
                (report.corrupt, report.foreign, report.duplicated),
                (0, 0, 0),
                "{report}"
            );
        }
        Ok(())
    }
}

/// Commands that delete all rules that lead to the workers.
fn delete_rules(node: &Node) -> Result<Vec<String>> {
    let mut commands = Vec::new();
    for family in ["-4", "-6"] {
        let rules = node.output(&["ip", family, "rule", "show"])?;
        let ours = rules.lines().filter(|line| line.contains("proto 82"));
        for rule in ours {
            let priority = rule.split(':').next().unwrap_or_default();
            commands.push(format!("ip {family} rule del priority {priority}"));
        }
    }
    ensure!(!commands.is_empty(), "no rule leads to the workers");
    Ok(commands)
}

fn texts(commands: &[&str]) -> Vec<String> {
    commands.iter().map(ToString::to_string).collect()
}

#[test]
fn a_vxlan_node_heals_in_both_families() -> Result<()> {
    let _machine = machine();
    let lab = Lab::builder().ripstop(2).families(Families::Dual);
    lab.run(|lab| {
        let node = lab.node(1);
        let mut patient = Patient::new(lab)?;
        let (subnet, subnet6) = (address::subnet(2), address::subnet6(2));
        let (prefix, prefix6) = (address::subnet_prefix(2), address::subnet6_prefix(2));
        let (vtep, vtep6) = (address::vtep_mac(2), address::vtep_mac6(2));
        let workers: Vec<(&str, Vec<String>)> = vec![
            ("flannel.1 deleted", texts(&["ip link del flannel.1"])),
            ("flannel-v6.1 deleted", texts(&["ip link del flannel-v6.1"])),
            (
                "flannel.1 down and up",
                texts(&["ip link set flannel.1 down", "ip link set flannel.1 up"]),
            ),
            (
                "flannel-v6.1 down and up",
                texts(&[
                    "ip link set flannel-v6.1 down",
                    "ip link set flannel-v6.1 up",
                ]),
            ),
            ("flannel.1 down", texts(&["ip link set flannel.1 down"])),
            (
                "flannel.1 with another MAC",
                texts(&["ip link set flannel.1 address 02:00:00:00:00:99"]),
            ),
            (
                "flannel.1 with another MTU",
                texts(&["ip link set flannel.1 mtu 1300"]),
            ),
            (
                "flannel.1 without its address",
                vec![format!(
                    "ip addr del {}/32 dev flannel.1",
                    address::subnet(1)
                )],
            ),
            (
                "main route",
                vec![format!("ip route del {prefix} dev flannel.1")],
            ),
            (
                "main route, IPv6",
                vec![format!("ip -6 route del {prefix6} dev flannel-v6.1")],
            ),
            (
                "neighbour",
                vec![format!("ip neigh del {subnet} dev flannel.1")],
            ),
            (
                "neighbour, IPv6",
                vec![format!("ip -6 neigh del {subnet6} dev flannel-v6.1")],
            ),
            (
                "FDB entry",
                vec![format!("bridge fdb del {vtep} dev flannel.1 self")],
            ),
            (
                "FDB entry, IPv6",
                vec![format!("bridge fdb del {vtep6} dev flannel-v6.1 self")],
            ),
            ("peer filter", texts(&["nft delete table ip ripstop"])),
            (
                "peer filter, IPv6",
                texts(&["nft delete table ip6 ripstop"]),
            ),
            ("guard", texts(&["nft delete table inet ripstop-guard"])),
            (
                "masquerade rule (iptables)",
                texts(&["iptables -t nat -D FLANNEL-POSTRTG 2"]),
            ),
            (
                "forward rules, IPv6 (ip6tables)",
                texts(&["ip6tables -F FLANNEL-FWD"]),
            ),
        ];
        for (what, damage) in workers {
            patient.damage(what, Carrier::Workers, &damage)?;
        }
        let kernel = [
            ("rules to the workers", delete_rules(node)?),
            (
                "routes to the workers",
                vec![
                    format!("ip -4 route del {prefix} table 21097"),
                    format!("ip -6 route del {prefix6} table 21097"),
                ],
            ),
        ];
        for (what, damage) in kernel {
            patient.damage(what, Carrier::Kernel, &damage)?;
        }
        patient.flap(lab)?;
        patient.interrupt("eth0 with MTU 1400, and 1500 again", || {
            for mtu in [1400, 1500] {
                run(node, &format!("ip link set eth0 mtu {mtu}"))?;
                wait_until("all devices follow", PATIENCE, || {
                    let tunnels = [("rip0", 50), ("flannel.1", 50), ("flannel-v6.1", 70)];
                    tunnels.iter().all(|(device, overhead)| {
                        let shown = node.output(&["ip", "link", "show", device]);
                        let fits = format!("mtu {} ", mtu - overhead);
                        shown.is_ok_and(|shown| shown.contains(&fits))
                    })
                })?;
            }
            Ok(())
        })?;
        patient.finish("vxlan, IPv4 and IPv6")
    })
}

#[test]
fn a_host_gw_node_heals() -> Result<()> {
    let _machine = machine();
    let lab = Lab::builder().ripstop(2).backend(Backend::HostGw);
    lab.families(Families::Dual).run(|lab| {
        let node = lab.node(1);
        let mut patient = Patient::new(lab)?;
        let (prefix, prefix6) = (address::subnet_prefix(2), address::subnet6_prefix(2));
        for (what, damage) in [
            ("main route", vec![format!("ip route del {prefix}")]),
            (
                "main route, IPv6",
                vec![format!("ip -6 route del {prefix6}")],
            ),
            (
                "main route by another gateway",
                vec![format!("ip route replace {prefix} via {}", address::FABRIC)],
            ),
            ("guard", texts(&["nft delete table inet ripstop-guard"])),
            (
                "masquerade rule (iptables)",
                texts(&["iptables -t nat -D FLANNEL-POSTRTG 2"]),
            ),
        ] {
            patient.damage(what, Carrier::Workers, &damage)?;
        }
        for (what, damage) in [
            ("rules to the workers", delete_rules(node)?),
            (
                "routes to the workers",
                vec![
                    format!("ip -4 route del {prefix} table 21097"),
                    format!("ip -6 route del {prefix6} table 21097"),
                ],
            ),
        ] {
            patient.damage(what, Carrier::Kernel, &damage)?;
        }
        patient.flap(lab)?;
        patient.finish("host-gw, IPv4 and IPv6")
    })
}

/// The NIC itself is made anew, with another number: the data plane, which held it, ends and is started again.
#[test]
fn a_nic_that_is_made_anew_is_used_again() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let (node, fabric, port) = (lab.node(1), lab.fabric(), Fabric::port(1));
        let parts = [
            "ip -o -d link show flannel.1",
            "ip -4 route show proto 82",
            "ip neigh show nud permanent",
            "bridge fdb show dev flannel.1",
        ];
        let healthy = look(node, &parts)?;
        run(node, "ip link del eth0")?;
        wait_until("the data plane ends with its NIC", PATIENCE, || {
            !node.dataplane_is_running()
        })?;
        assert!(node.controlplane_is_running());
        let started = Instant::now();
        run(
            fabric,
            &format!(
                "ip link add name {port} mtu 1500 numrxqueues 1 numtxqueues 1 type veth peer name eth0 address {} \
                 mtu 1500 numrxqueues 1 numtxqueues 1 netns {}",
                address::underlay_mac(1),
                node.netns().name()
            ),
        )?;
        run(fabric, &format!("ip link set {port} master br0 up"))?;
        let ends: [(&dyn Host, &str); 2] = [(fabric, &port), (node, "eth0")];
        for (host, name) in ends {
            run(host, &format!("ethtool -K {name} tx off gro off"))?;
        }
        run(node, "ip link set eth0 up")?;
        run(node, &format!("ip addr add {}/24 dev eth0", node.address()))?;
        run(node, &format!("ip route add default via {}", address::FABRIC))?;
        wait_until("the device and all its peers are back", PATIENCE, || {
            look(node, &parts).is_ok_and(|seen| seen == healthy)
        })?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        wait_until("pods talk by the kernel", PATIENCE, || {
            Ping::new(one, other).run().is_ok_and(|ping| ping.received == 1)
        })?;
        println!("NIC made anew: standby whole and carrying after {:.1?}", started.elapsed());
        node.start_dataplane()?;
        node.wait_for_detour(1)?;
        let before = node.workers()?.encapsulated();
        let report = UdpFlow::new(one, other).rate(RATE).count(RATE).run()?;
        assert!(report.is_perfect(), "{report}");
        wait_until("the workers carried it", PATIENCE, || {
            let workers = node.workers();
            workers.is_ok_and(|workers| workers.encapsulated() >= before + RATE)
        })
    })
}

/// Nodes leave while nobody looks, and leave behind what others have made of them too.
#[test]
fn peers_that_left_while_nobody_looked_are_forgotten() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        let mut leases = lab.leases();
        leases.leases.push(Lease::of_node(9));
        lab.write_leases(&leases)?;
        lab.start_ripstop()?;
        let node = lab.node(1);
        let parts = [
            "ip -4 route show dev flannel.1",
            "ip neigh show dev flannel.1 nud permanent",
            "bridge fdb show dev flannel.1",
        ];
        let nine = |seen: &BTreeSet<String>| {
            let is_of_nine =
                |line: &&String| line.contains("10.244.9.") || line.contains("10.199.0.19");
            seen.iter().filter(is_of_nine).count()
        };
        wait_until("node 9 is known", PATIENCE, || {
            look(node, &parts).is_ok_and(|seen| nine(&seen) == 3)
        })?;
        node.kill_controlplane();
        // With it goes rip0, which has the node's address in its subnet too.
        node.kill_dataplane();
        leases.leases.retain(|lease| lease.node != "n9");
        lab.write_leases(&leases)?;
        // flannel's routes, of a node that is gone and of one that had our subnet before: that leads our pods' packets away.
        for command in [
            "ip route add 10.244.8.0/24 via 10.244.8.0 dev flannel.1 onlink",
            "ip addr del 10.244.1.0/32 dev flannel.1",
            "ip addr del 10.244.1.1/24 dev cni0",
            "ip route add 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink",
            "ip addr add 10.244.1.1/24 brd + dev cni0",
            "ip addr add 10.244.1.0/32 dev flannel.1",
        ] {
            run(node, command)?;
        }
        let to_own = Ping::new(node, lab.pod(1, 0)).run()?;
        assert_eq!(
            to_own.received, 0,
            "the stale route does what it is here for"
        );
        let started = Instant::now();
        node.start_controlplane()?;
        wait_until("only what leads to node 2 is left", PATIENCE, || {
            look(node, &parts).is_ok_and(|seen| {
                let lines: Vec<&String> = seen.iter().collect();
                lines.len() == 3 && nine(&seen) == 0
            })
        })?;
        println!(
            "stale entries gone {:.1?} after the start",
            started.elapsed()
        );
        assert_eq!(Ping::new(node, lab.pod(1, 0)).run()?.received, 1);
        assert_eq!(Ping::new(lab.pod(1, 0), lab.pod(2, 0)).run()?.received, 1);
        Ok(())
    })
}

/// The node's address changes: with Kubernetes it tells the others by itself, and they follow.
#[test]
fn a_node_that_gets_another_address_is_followed() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        let (api, kubeconfig) = kube::serve(lab)?;
        let kubeconfig = kubeconfig.as_str();
        for node in lab.nodes() {
            let subnet = node.lease().subnet.context("subnet")?;
            api.create(node.name(), &[&subnet], &json!({}));
        }
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane_with(&["--kube-subnet-mgr", "--kubeconfig-file", kubeconfig])?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(1)?;
        }
        let (node, peer) = (lab.node(1), lab.node(2));
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        let flow = |from, to| UdpFlow::new(from, to).flows(4).rate(RATE).start();
        let traffic = TrafficGroup::new(vec![flow(one, other)?, flow(other, one)?]);
        let arriving = |traffic: &TrafficGroup| {
            let before: Vec<u64> = traffic.members().iter().map(|m| m.snapshot().received).collect();
            let mut members = traffic.members().iter().zip(before);
            wait_until("packets arrive both ways", PATIENCE, || {
                members.all(|(member, before)| member.snapshot().received > before + RATE / 10)
            })
        };
        arriving(&traffic)?;
        let mac = |node: &Node| node.output(&["cat", "/sys/class/net/flannel.1/address"]);
        let mac_before = mac(node)?;
        let mut now = node.address().to_string();
        for next in ["10.199.0.51", "10.199.0.52", &node.address().to_string()] {
            let started = Instant::now();
            let start = traffic.mark();
            run(node, &format!("ip addr del {now}/24 dev eth0"))?;
            run(node, &format!("ip addr add {next}/24 dev eth0"))?;
            run(node, &format!("ip route add default via {}", address::FABRIC))?;
            wait_until("its device sends by the new address", PATIENCE, || {
                let link = node.output(&["ip", "-d", "link", "show", "flannel.1"]);
                link.is_ok_and(|link| link.contains(&format!("local {next} ")))
            })?;
            let device = started.elapsed();
            wait_until("its annotation says so", PATIENCE, || {
                let node = api.node(node.name());
                node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] == next
            })?;
            let annotated = started.elapsed();
            wait_until("the peer follows", PATIENCE, || {
                let fdb = peer.output(&["bridge", "fdb", "show", "dev", "flannel.1"]);
                fdb.is_ok_and(|fdb| fdb.contains(&format!("dst {next} ")))
            })?;
            let followed = started.elapsed();
            lab.ripstop_nodes()
                .try_for_each(|node| node.wait_for_detour(1))?;
            wait_until("nothing is lost any more", PATIENCE, || {
                let start = traffic.mark();
                sleep(WATCH);
                let end = traffic.mark();
                traffic.lost_before(&end, QUIET) == traffic.lost_before(&start, QUIET)
            })?;
            let lost = traffic.lost_before(&traffic.mark(), QUIET) - traffic.lost_before(&start, QUIET);
            println!(
                "{now} to {next}: device {device:.1?}, annotation {annotated:.1?}, peer {followed:.1?}; {lost} lost at {}/s",
                2 * RATE
            );
            assert!(followed < 2 * BACK_WITHIN, "followed after {followed:?}");
            next.clone_into(&mut now);
        }
        assert_eq!(mac(node)?, mac_before, "the MAC address is kept");
        for report in traffic.stop() {
            println!("  {report}");
            assert_eq!((report.corrupt, report.duplicated), (0, 0), "{report}");
        }
        Ok(())
    })
}
