//! The demo: a cluster of four nodes, traffic between its pods, and one kill of each process.
//!
//! Each step says what is about to happen and what to look for, then shows a line of counters a
//! second, and at its end holds what was counted against what it promised. The first promise that
//! does not hold ends the demo as failed.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Error, Result, bail, ensure};
use ripstop_perf::{
    Host, Lab, Node, NodeKind, TrafficGroup, TrafficReport, UdpFlow, udp_payload_max,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Packets a second of each pair of pods.
const RATE: u64 = 1500;
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(300);
/// How long a process gets to come up.
const START: Duration = Duration::from_secs(15);
/// Exit status of a program that was ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Who talks to whom, by node and pod: Ripstop to Ripstop, and plain Linux (n4) in both directions.
const PAIRS: [[(u8, u8); 2]; 7] = [
    [(1, 0), (2, 0)],
    [(2, 0), (3, 0)],
    [(3, 0), (1, 0)],
    [(1, 1), (4, 0)],
    [(4, 0), (1, 1)],
    [(2, 1), (4, 1)],
    [(4, 1), (3, 1)],
];

/// Runs the demo. The lab is down again when this returns, however it went.
pub(crate) fn run() -> Result<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register(signal, Arc::clone(&interrupted)).context("watch for Ctrl-C")?;
    }
    let start = Instant::now();
    let outcome = in_a_lab(&interrupted);
    let mut out = io::stdout();
    if interrupted.load(Ordering::Relaxed) {
        writeln!(out, "\ndemo: interrupted, nothing is left behind")?;
        return Ok(ExitCode::from(INTERRUPTED));
    }
    match outcome {
        Ok(()) => {
            writeln!(
                out,
                "\nEverything has been taken down, after {:.0} s.",
                start.elapsed().as_secs_f64()
            )?;
            writeln!(out, "demo: ok")?;
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            writeln!(out, "\ndemo: FAILED: {why:#}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn in_a_lab(interrupted: &AtomicBool) -> Result<()> {
    let mut out = io::stdout();
    writeln!(
        out,
        "A Kubernetes pod network in miniature: three nodes run Ripstop, one has nothing but the Linux\n\
         kernel's VXLAN, as flannel sets it up. Every node and every pod is a network namespace of its own,\n\
         the workers poll real AF_XDP sockets. Takes about 35 seconds; Ctrl-C ends it and cleans up."
    )?;
    let lab = Lab::builder().ripstop(3).linux(1).pods(2).up()?;
    let demo = Demo {
        lab: &lab,
        interrupted,
    };
    let outcome = demo.steps();
    if outcome.is_err() && !interrupted.load(Ordering::Relaxed) {
        // For whoever has to find out why.
        drop(writeln!(io::stderr(), "{}", lab.dump()));
    }
    lab.down().and(outcome)
}

struct Demo<'a> {
    lab: &'a Lab,
    interrupted: &'a AtomicBool,
}

/// What the two paths of a node have carried so far, and whether its workers live.
#[derive(Debug, Clone, Copy)]
struct Carried {
    workers: Option<u64>,
    kernel: u64,
}

/// Traffic and counters at the beginning of a step, to see what it changes.
struct Before {
    lost: u64,
    report: TrafficReport,
}

/// What a step has cost.
struct Cost {
    lost: u64,
    reordered: u64,
    duplicated: u64,
}

impl Demo<'_> {
    fn steps(&self) -> Result<()> {
        self.title(1, "The lab")?;
        self.say("Each pod has an address of its node's lease; pods of other nodes are reached by tunnels.\n")?;
        self.say(picture(self.lab).trim_end())?;
        self.start()?;
        let traffic = self.traffic()?;
        self.watch_workers(&traffic)?;
        self.kill_controlplane(&traffic)?;
        self.kill_dataplane(&traffic)?;
        self.restart(&traffic)?;
        self.account(traffic)
    }

    fn start(&self) -> Result<()> {
        self.title(2, "Starting Ripstop on n1, n2 and n3")?;
        self.say(
            "The control plane reads the leases (which node has which pods), programs the kernel's own tunnel\n\
             as a standby, and publishes a forwarding table. The data plane's workers pick it up, and only\n\
             then the kernel is told to send pod traffic to them.\n",
        )?;
        let begin = Instant::now();
        for node in self.lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane()?;
        }
        for node in self.lab.ripstop_nodes() {
            self.wait_for_workers(node)?;
        }
        let took = begin.elapsed().as_secs_f64();
        self.say(&format!(
            "Ready after {took:.1} s: six processes, and the workers of each node reach the other three nodes."
        ))
    }

    fn traffic(&self) -> Result<TrafficGroup> {
        self.title(3, "Traffic between pods")?;
        let names: Vec<String> = PAIRS
            .iter()
            .map(|[from, to]| format!("n{}p{} to n{}p{}", from.0, from.1, to.0, to.1))
            .collect();
        self.say(&format!(
            "Seven pairs of pods, {} packets a second each, small and full-size in turn, every byte checked:\n  \
             {}\n  {}\n\
             n4 is the plain Linux node: it cannot tell Ripstop from flannel.\n\
             Look for: all packets go through the workers, none through the kernel's tunnel, nothing is lost.\n",
            grouped(RATE),
            names[..4].join(", "),
            names[4..].join(", "),
        ))?;
        let sizes = [64, 512, udp_payload_max(self.lab.pod_mtu())];
        let start = |[from, to]: &[(u8, u8); 2]| {
            UdpFlow::new(self.lab.pod(from.0, from.1), self.lab.pod(to.0, to.1))
                .flows(4)
                .payload_sizes(&sizes)
                .rate(RATE)
                .start()
        };
        let members = PAIRS.iter().map(start).collect::<Result<Vec<_>>>()?;
        Ok(TrafficGroup::new(members))
    }

    fn watch_workers(&self, traffic: &TrafficGroup) -> Result<()> {
        self.pause(Duration::from_millis(300))?;
        let before = self.before(traffic);
        let counters = self.carried()?;
        self.head()?;
        self.rows(traffic, 6)?;
        let cost = self.cost(traffic, &before);
        cost.ensure_nothing("while nothing was killed")?;
        let moved = self.moved_since(&counters)?;
        for (node, (workers, kernel)) in self.lab.ripstop_nodes().zip(moved) {
            let name = node.name();
            ensure!(
                kernel == 0,
                "{kernel} packets took the kernel's tunnel on {name}"
            );
            ensure!(
                workers > RATE,
                "the workers of {name} carried only {workers} packets"
            );
        }
        self.say(&format!(
            "Held: {}. The workers carried all of it.",
            cost.in_words()
        ))
    }

    fn kill_controlplane(&self, traffic: &TrafficGroup) -> Result<()> {
        let node = self.lab.node(1);
        self.title(4, "Killing the control plane of n1")?;
        self.say(
            "It only writes the table; nobody waits for it while packets move.\n\
             Look for: no difference at all.\n",
        )?;
        let before = self.before(traffic);
        let counters = self.carried()?;
        self.head()?;
        self.rows(traffic, 1)?;
        self.note(
            "SIGKILL to the control plane of n1",
            node.controlplane_pid(),
        )?;
        node.kill_controlplane();
        self.rows(traffic, 5)?;
        let cost = self.cost(traffic, &before);
        cost.ensure_nothing("by killing a control plane")?;
        for (node, (_, kernel)) in self.lab.ripstop_nodes().zip(self.moved_since(&counters)?) {
            let name = node.name();
            ensure!(
                kernel == 0,
                "{kernel} packets took the kernel's tunnel on {name}"
            );
        }
        self.say(&format!(
            "Held: {}. The workers of n1 go on with the table they have.",
            cost.in_words()
        ))
    }

    fn kill_dataplane(&self, traffic: &TrafficGroup) -> Result<()> {
        let node = self.lab.node(2);
        self.title(5, "Killing the data plane of n2")?;
        let held = node.held_max()?;
        self.say(&format!(
            "With the process the kernel removes its device, its routes and its XDP program, and the next packet\n\
             takes the standby tunnel: no program has to run for that. What its rings and queues held at that\n\
             moment is lost, at most {} packets.\n\
             Look for: the traffic of n2 moves from \"workers\" to \"kernel\", and goes on.\n",
            grouped(held)
        ))?;
        let before = self.before(traffic);
        self.head()?;
        self.rows(traffic, 1)?;
        self.note("SIGKILL to the data plane of n2", node.dataplane_pid())?;
        node.kill_dataplane();
        self.pause(Duration::from_millis(300))?;
        let cost = self.cost(traffic, &before);
        let (after, counters) = (self.before(traffic), self.carried()?);
        self.rows(traffic, 5)?;
        ensure!(
            cost.lost <= held,
            "{} packets were lost by the kill, more than the {held} that can have been inside",
            cost.lost
        );
        ensure!(
            cost.duplicated == 0,
            "{} packets arrived twice",
            cost.duplicated
        );
        let standby = self.cost(traffic, &after);
        standby.ensure_nothing("on the standby path")?;
        let moved = self.moved_since(&counters)?;
        let (_, kernel) = moved[1];
        ensure!(
            kernel > 5 * RATE,
            "the kernel of n2 carried only {kernel} packets"
        );
        self.say(&format!(
            "Held: {} by the kill; since then {}.\nThe kernel carries the traffic of n2.",
            cost.in_words(),
            standby.in_words()
        ))
    }

    fn restart(&self, traffic: &TrafficGroup) -> Result<()> {
        let (first, second) = (self.lab.node(1), self.lab.node(2));
        self.title(6, "Starting both again")?;
        self.say(
            "The control plane goes on from the table it finds. The data plane sets its sockets up, and when its\n\
             workers have the table, the traffic comes back to them.\n\
             Look for: the traffic of n2 moves back from \"kernel\" to \"workers\", and nothing is lost.\n",
        )?;
        let before = self.before(traffic);
        let generation = first.fib_generation()?;
        self.head()?;
        self.rows(traffic, 1)?;
        first.start_controlplane()?;
        second.start_dataplane()?;
        self.note("started the control plane of n1", first.controlplane_pid())?;
        self.note("started the data plane of n2", second.dataplane_pid())?;
        for node in [first, second] {
            self.wait_for_workers(node)?;
        }
        self.rows(traffic, 2)?;
        let counters = self.carried()?;
        self.rows(traffic, 4)?;
        let cost = self.cost(traffic, &before);
        ensure!(
            cost.lost == 0,
            "{} packets were lost in going back to the workers",
            cost.lost
        );
        ensure!(
            cost.duplicated == 0,
            "{} packets arrived twice",
            cost.duplicated
        );
        let found = first.fib_generation()?;
        ensure!(
            found >= generation,
            "the table went from generation {generation} to {found}"
        );
        for (node, (workers, kernel)) in self.lab.ripstop_nodes().zip(self.moved_since(&counters)?)
        {
            let name = node.name();
            ensure!(
                kernel == 0 && workers > RATE,
                "{name}: {workers} packets through the workers and {kernel} through the kernel"
            );
        }
        self.say(&format!(
            "Held: {}. All traffic is back on the workers.",
            cost.in_words()
        ))
    }

    fn account(&self, traffic: TrafficGroup) -> Result<()> {
        self.title(7, "The account, and what the operator sees")?;
        for arguments in [&["status"][..], &["leases"]] {
            self.say(&format!("n2$ ripstop {}", arguments.join(" ")))?;
            self.say(&self.lab.node(2).ripstop_text(arguments)?)?;
        }
        let reports = traffic.stop();
        let sum = |value: fn(&TrafficReport) -> u64| reports.iter().map(value).sum::<u64>();
        let [sent, received, lost] = [
            sum(|report| report.sent),
            sum(|report| report.received),
            sum(|report| report.lost),
        ];
        self.say(&format!(
            "All in all: {} packets sent, {} arrived, {} lost (by the kill in step 5), {} damaged, {} twice.",
            grouped(sent),
            grouped(received),
            grouped(lost),
            sum(|report| report.corrupt),
            sum(|report| report.duplicated),
        ))?;
        ensure!(
            sum(|report| report.corrupt) == 0 && sum(|report| report.foreign) == 0,
            "packets were damaged or translated on the way"
        );
        ensure!(sent == received + lost, "the account does not add up");
        Ok(())
    }

    /// Waits until the workers of a node carry its traffic to all others.
    fn wait_for_workers(&self, node: &Node) -> Result<()> {
        let begin = Instant::now();
        let peers = self.lab.nodes().len() - 1;
        while node.detour()?.len() < peers {
            ensure!(
                node.dataplane_is_running() && node.controlplane_is_running(),
                "a process of {} has ended",
                node.name()
            );
            ensure!(
                begin.elapsed() < START,
                "the workers of {} do not carry its traffic after {START:?}",
                node.name()
            );
            self.pause(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Shows a line of rates a second.
    fn rows(&self, traffic: &TrafficGroup, seconds: u32) -> Result<()> {
        let look = || Ok::<_, Error>((Instant::now(), self.carried()?, traffic.snapshot()));
        let mut before = look()?;
        let mut mark = traffic.mark();
        for _ in 0..seconds {
            self.pause(Duration::from_secs(1))?;
            let now = look()?;
            let time_ms = now.0.duration_since(before.0).as_millis().max(1);
            let rate = |packets: u64| grouped_u128(u128::from(packets) * 1000 / time_ms);
            let mut line = String::from(" ");
            for (now, before) in now.1.iter().zip(&before.1) {
                let workers = match now.workers {
                    // A new data plane counts from zero.
                    Some(now) => rate(now.checked_sub(before.workers.unwrap_or(0)).unwrap_or(now)),
                    None => "dead".to_owned(),
                };
                let kernel = rate(now.kernel - before.kernel);
                line.push_str(&format!(" {workers:>9} {kernel:>9}  |"));
            }
            let arrived = rate(now.2.received - before.2.received);
            let lost = grouped(traffic.lost_before(&mark, Duration::ZERO));
            self.say(&format!("{line} {arrived:>9} {lost:>11}"))?;
            before = now;
            mark = traffic.mark();
        }
        Ok(())
    }

    /// The head of the table that [`Demo::rows`] fills.
    fn head(&self) -> Result<()> {
        let nodes = self
            .lab
            .ripstop_nodes()
            .map(|node| format!("{:^22}|", node.name()));
        let columns: String = nodes.collect();
        self.say(&format!(" {columns}{:^22}", "all pods"))?;
        let each = format!(" {:>9} {:>9}  |", "workers/s", "kernel/s");
        let each = each.repeat(self.lab.ripstop_nodes().count());
        self.say(&format!(" {each} {:>9} {:>11}", "arrived/s", "lost so far"))
    }

    /// What has gone through workers and standby of each Ripstop node, in either direction.
    fn carried(&self) -> Result<Vec<Carried>> {
        let of = |node: &Node| {
            let workers = if node.dataplane_is_running() {
                let workers = node.workers()?;
                Some(workers.encapsulated() + workers.decapsulated())
            } else {
                None
            };
            let standby = node.standby_counters()?;
            Ok(Carried {
                workers,
                kernel: standby.tx_packets + standby.rx_packets,
            })
        };
        self.lab.ripstop_nodes().map(of).collect()
    }

    /// How much each node's workers and kernel have carried since.
    fn moved_since(&self, before: &[Carried]) -> Result<Vec<(u64, u64)>> {
        let moved = |(now, before): (Carried, &Carried)| {
            let workers = now.workers.unwrap_or(0);
            (
                workers.saturating_sub(before.workers.unwrap_or(0)),
                now.kernel - before.kernel,
            )
        };
        Ok(self.carried()?.into_iter().zip(before).map(moved).collect())
    }

    fn before(&self, traffic: &TrafficGroup) -> Before {
        Before {
            lost: traffic.lost_before(&traffic.mark(), QUIET),
            report: traffic.snapshot(),
        }
    }

    /// What has been lost of the packets sent since, once stragglers have had their time.
    fn cost(&self, traffic: &TrafficGroup, before: &Before) -> Cost {
        let lost = traffic.lost_before(&traffic.mark(), QUIET) - before.lost;
        let now = traffic.snapshot();
        Cost {
            lost,
            reordered: now.reordered - before.report.reordered,
            duplicated: now.duplicated - before.report.duplicated,
        }
    }

    fn title(&self, number: u32, title: &str) -> Result<()> {
        self.say(&format!("\n[{number}/7] {title}\n"))
    }

    fn note(&self, what: &str, pid: Option<i32>) -> Result<()> {
        let pid = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
        self.say(&format!("   >>> {what}{pid}"))
    }

    fn say(&self, text: &str) -> Result<()> {
        self.go_on()?;
        writeln!(io::stdout(), "{text}").context("standard output")
    }

    /// Sleeps, unless somebody wants the demo to end.
    fn pause(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.go_on()?;
            thread::sleep(left.min(Duration::from_millis(50)));
        }
        self.go_on()
    }

    fn go_on(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }
}

impl Cost {
    fn ensure_nothing(&self, when: &str) -> Result<()> {
        ensure!(
            self.lost == 0 && self.reordered == 0 && self.duplicated == 0,
            "{} {when}",
            self.in_words()
        );
        Ok(())
    }

    fn in_words(&self) -> String {
        format!(
            "{} lost, {} out of order, {} twice",
            grouped(self.lost),
            grouped(self.reordered),
            grouped(self.duplicated)
        )
    }
}

/// The nodes side by side under their switch.
fn picture(lab: &Lab) -> String {
    const WIDTH: usize = 21;
    let row = |left: &str, right: &str, cell: &dyn Fn(&Node) -> String| {
        let cells = lab.nodes().iter().map(cell);
        let boxes: Vec<String> = cells
            .map(|text| format!("{left}{text:WIDTH$}{right}"))
            .collect();
        format!("  {}\n", boxes.join(" "))
    };
    let line = |count: usize| "─".repeat(count);
    let half = WIDTH / 2;
    let between = line(WIDTH + 2);
    let arms = vec![between.as_str(); lab.nodes().len() - 1].join("┬");
    let mut text = format!("{:^97}\n", "one switch: the underlay");
    text.push_str(&format!("  {}┌{arms}┐\n", " ".repeat(half + 1)));
    let top = format!("{}┴{}", line(half), line(WIDTH - half - 1));
    text.push_str(&row("┌", "┐", &|_| top.clone()));
    text.push_str(&row("│", "│", &|node| {
        format!(" {} eth0 {}", node.name(), node.address())
    }));
    text.push_str(&row("│", "│", &|node| match node.kind() {
        NodeKind::Ripstop => " Ripstop".to_owned(),
        NodeKind::PlainLinux => " plain Linux VXLAN".to_owned(),
    }));
    text.push_str(&row("├", "┤", &|_| line(WIDTH)));
    let pods = lab.nodes().iter().map(|node| node.pods().len()).max();
    for pod in 0..pods.unwrap_or_default() {
        text.push_str(&row("│", "│", &|node| {
            let pod = node.pods().get(pod);
            pod.map_or(String::new(), |pod| {
                format!(" {}  {}", pod.name(), pod.address())
            })
        }));
    }
    text.push_str(&row("└", "┘", &|_| line(WIDTH)));
    text
}

/// A number with a comma between thousands.
fn grouped(number: u64) -> String {
    grouped_u128(number.into())
}

fn grouped_u128(number: u128) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }
}
