//! What a trial costs and where packets got lost: CPU time of the whole machine, hardware counters, and everybody's books
//! before and after.

use core::time::Duration;
use std::collections::BTreeMap;
use std::fs;
use std::thread;

use anyhow::{Context, Result, ensure};

use ripstop_fib::map::monotonic_ns;
use ripstop_fib::stats::{Counter, KernelCounter, XdpCounter};

use crate::engine::Window;
use crate::lab::{Host, Lab, Workers, wait_until};
use crate::measure::{CpuTimes, Limit, Trial, WorkerCost};
use crate::netns::Netns;
use crate::proc_stat::ProcStat;

/// How long a data plane may take to say what it has counted: it does many times a second, where it gets a CPU.
const PUBLISH: Duration = Duration::from_secs(10);
/// Share of all CPU time, in percent, from which what others took is worth a word.
const STEAL_PERCENT: u32 = 2;

/// The machine's CPUs from a moment on.
#[derive(Debug)]
pub(super) struct CpuWindow(Window);

impl CpuWindow {
    pub(super) fn open() -> Result<Self> {
        Window::open().map(Self)
    }

    /// Writes what was spent since into a trial.
    pub(super) fn close(self, trial: &mut Trial) -> Result<()> {
        (trial.cpus, trial.counters) = self.0.close()?;
        note_steal(trial);
        Ok(())
    }
}

/// Says of a trial that the hypervisor took what it should have had.
pub(super) fn note_steal(trial: &mut Trial) {
    let CpuTimes {
        user,
        system,
        irq,
        softirq,
        steal,
        idle,
    } = trial.cpus;
    let all = user + system + irq + softirq + steal + idle;
    if steal * 100 > all * STEAL_PERCENT {
        trial.limits.push(Limit::Neighbours(format!(
            "the hypervisor gave {steal:.2?} of {all:.2?} CPU time to others"
        )));
    }
}

/// What everybody in a lab has counted.
#[derive(Debug, Clone)]
pub(super) struct Books {
    /// Packets that went nowhere, by who says so and why.
    losses: BTreeMap<String, u64>,
    /// Data planes, by process id.
    dataplanes: Vec<u64>,
    cost: WorkerCost,
    /// Packets that the kernel's tunnel devices of the node under test have sent and received.
    pub(super) standby: u64,
}

/// Counters of the kernel's protocols that stand for packets that went nowhere, or had to be sent again.
const KERNEL: [&str; 18] = [
    "Icmp.InErrors",
    "Ip.InAddrErrors",
    "Ip.InDiscards",
    "Ip.InHdrErrors",
    "Ip.InUnknownProtos",
    "Ip.OutDiscards",
    "Ip.OutNoRoutes",
    "Ip.ReasmFails",
    "IpExt.InNoRoutes",
    "IpExt.InTruncatedPkts",
    "Tcp.InCsumErrors",
    "Tcp.InErrs",
    "Tcp.RetransSegs",
    "Udp.InCsumErrors",
    "Udp.InErrors",
    "Udp.NoPorts",
    "Udp.RcvbufErrors",
    "Udp.SndbufErrors",
];

/// Columns of `/proc/net/stat/nf_conntrack` that do.
const CONNTRACK: [&str; 3] = ["drop", "early_drop", "insert_failed"];

/// What the kernel took for a worker's socket, or from it, and did not deliver.
const SOCKET: [KernelCounter; 4] = [
    KernelCounter::RxDropped,
    KernelCounter::RxInvalidDescriptors,
    KernelCounter::TxInvalidDescriptors,
    KernelCounter::RxRingFull,
];

impl Books {
    /// Reads all books of a lab, after its data planes have published what they have done before this call.
    pub(super) fn read(lab: &Lab) -> Result<Self> {
        let mut books = Self {
            losses: BTreeMap::new(),
            dataplanes: Vec::new(),
            cost: WorkerCost::default(),
            standby: lab
                .node(1)
                .standby_counters()
                .map(|counters| counters.tx_packets + counters.rx_packets)?,
        };
        let running = lab
            .ripstop_nodes()
            .filter(|node| node.dataplane_is_running());
        for node in running {
            // The kernel's counters come after the heartbeat, so they are complete with the next one.
            for _beat in 0..2 {
                let now = monotonic_ns();
                let what = format!("{} publishes what its workers counted", node.name());
                wait_until(&what, PUBLISH, || {
                    let mut workers = node.workers().into_iter().flat_map(|all| all.workers);
                    workers.all(|worker| worker.heartbeat_ns > now)
                })?;
            }
            books.add_workers(node.name(), &node.workers()?);
        }
        for host in lab.hosts() {
            let (links, conntrack) = host.netns().run(|| {
                let net = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
                // Without connection tracking there is no such file.
                net("dev").map(|links| (links, net("stat/nf_conntrack").unwrap_or_default()))
            })??;
            let kernel = host.kernel_counters()?;
            let counted = KERNEL.map(|name| {
                let count = u64::try_from(kernel.value(name)).unwrap_or_default();
                (name.to_owned(), count)
            });
            let all = counted
                .into_iter()
                .chain(link_losses(&links))
                .chain(conntrack_losses(&conntrack));
            for (name, count) in all {
                books.lose(host.name(), &name, count);
            }
        }
        Ok(books)
    }

    fn lose(&mut self, who: &str, why: &str, count: u64) {
        if count > 0 {
            *self.losses.entry(format!("{who}.{why}")).or_default() += count;
        }
    }

    fn add_workers(&mut self, node: &str, workers: &Workers) {
        self.dataplanes.push(workers.pid);
        for (reason, count) in workers.drops() {
            self.lose(node, &format!("dataplane.{reason}"), count);
        }
        for counter in SOCKET {
            let why = format!("socket.{}", counter.name());
            self.lose(node, &why, workers.kernel(counter));
        }
        let taken = [XdpCounter::Redirected, XdpCounter::PassedOther].map(XdpCounter::name);
        for (outcome, count) in workers.xdp() {
            if !taken.contains(&outcome) {
                self.lose(node, &format!("xdp.{outcome}"), count);
            }
        }
        let WorkerCost {
            packets,
            busy_turns,
            busy_cycles,
            idle_cycles,
        } = &mut self.cost;
        *packets += workers.total(Counter::NicRxPackets) + workers.total(Counter::HostRxPackets);
        *busy_turns += workers.total(Counter::BusyTurns);
        *busy_cycles += workers.total(Counter::BusyCycles);
        *idle_cycles += workers.total(Counter::IdleCycles);
    }

    /// Writes what was counted after `earlier` into a trial.
    pub(super) fn since(&self, earlier: &Self, trial: &mut Trial) -> Result<()> {
        ensure!(
            self.dataplanes == earlier.dataplanes,
            "a data plane ended or was started anew during the trial"
        );
        if !self.dataplanes.is_empty() {
            let (now, then) = (&self.cost, &earlier.cost);
            trial.workers = Some(WorkerCost {
                packets: now.packets - then.packets,
                busy_turns: now.busy_turns - then.busy_turns,
                busy_cycles: now.busy_cycles - then.busy_cycles,
                idle_cycles: now.idle_cycles - then.idle_cycles,
            });
        }
        for (name, count) in &self.losses {
            let before = earlier.losses.get(name).copied().unwrap_or_default();
            // An interface may have gone and come, and counts from zero then.
            if let Some(lost) = count.checked_sub(before).filter(|lost| *lost > 0) {
                trial.drops.insert(name.clone(), lost);
            }
        }
        Ok(())
    }
}

/// Dropped and damaged packets of every interface, from `/proc/net/dev`.
fn link_losses(text: &str) -> Vec<(String, u64)> {
    // Errors and drops are the third and fourth number of each direction, which has eight.
    const COLUMNS: [(usize, &str); 4] = [
        (2, "rx_errors"),
        (3, "rx_dropped"),
        (10, "tx_errors"),
        (11, "tx_dropped"),
    ];
    let mut losses = Vec::new();
    for (link, numbers) in text.lines().filter_map(|line| line.split_once(':')) {
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        for (column, name) in COLUMNS {
            let number = numbers.get(column).and_then(|number| number.parse().ok());
            losses.push((format!("{}.{name}", link.trim()), number.unwrap_or(0)));
        }
    }
    losses
}

/// A head line with names, then a line of hexadecimal numbers for each CPU.
fn conntrack_losses(text: &str) -> Vec<(String, u64)> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines
        .next()
        .into_iter()
        .flat_map(str::split_whitespace)
        .collect();
    let mut losses = Vec::new();
    for line in lines {
        for (name, number) in names.iter().zip(line.split_whitespace()) {
            if CONNTRACK.contains(name) {
                let count = u64::from_str_radix(number, 16).unwrap_or_default();
                losses.push((format!("conntrack.{name}"), count));
            }
        }
    }
    losses
}

/// Waits until a process uses hardly any CPU time: it has done what it had to.
pub(super) fn wait_for_rest(what: &str, pid: i32, within: Duration) -> Result<()> {
    const LOOK: Duration = Duration::from_millis(200);
    let ticks = || {
        let stat = ProcStat::of(pid).with_context(|| format!("{what} has ended"))?;
        anyhow::Ok(stat.ticks)
    };
    let (mut before, mut failure) = (ticks()?, None);
    wait_until(&format!("{what} is at rest"), within, || {
        thread::sleep(LOOK);
        match ticks() {
            Ok(now) => now <= core::mem::replace(&mut before, now) + 1,
            Err(error) => {
                failure = Some(error);
                true
            }
        }
    })?;
    failure.map_or(Ok(()), Err)
}

/// The names of the kernel's threads that do an interface's receive work.
pub(super) fn napi_threads(interface: &str) -> Result<Vec<i32>> {
    let prefix = format!("napi/{interface}-");
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let name = entry.context("/proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // It may have ended since.
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if comm.starts_with(&prefix) {
            threads.push(pid);
        }
    }
    Ok(threads)
}

/// Runs a shell line in a namespace, with the `/sys` of that namespace.
pub(super) fn shell(netns: &Netns, line: &str) -> Result<String> {
    netns.output(&["sh", "-c", line])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_of_links_and_of_connection_tracking_are_read() {
        let links = "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop\n  \
            eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n";
        let named = |name: &str, count| (name.to_owned(), count);
        assert_eq!(
            link_losses(links),
            [
                named("eth0.rx_errors", 3),
                named("eth0.rx_dropped", 4),
                named("eth0.tx_errors", 7),
                named("eth0.tx_dropped", 8),
            ]
        );
        let conntrack = "entries found insert_failed drop early_drop\n1 2 a 0 1\n1 2 1 3 0\n";
        let losses = conntrack_losses(conntrack);
        let of = |name| {
            losses
                .iter()
                .filter(|loss| loss.0 == name)
                .map(|loss| loss.1)
                .sum::<u64>()
        };
        assert_eq!(
            [
                of("conntrack.insert_failed"),
                of("conntrack.drop"),
                of("conntrack.early_drop")
            ],
            [11, 3, 1]
        );
    }

    #[test]
    fn the_machine_s_time_passes() {
        let window = CpuWindow::open().expect("opens");
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(50) {}
        let mut trial = Trial::default();
        window.close(&mut trial).expect("closes");
        let CpuTimes { user, idle, .. } = trial.cpus;
        assert!(user + idle >= Duration::from_millis(20), "{:?}", trial.cpus);
    }
}
