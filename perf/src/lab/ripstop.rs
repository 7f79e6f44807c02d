//! Ripstop at work on a node, as the node itself tells it: the shared-memory regions in its run
//! directory, and the kernel's routes.

use core::time::Duration;
use std::fs;

use anyhow::{Context, Result};
use ripstop_fib::map::{self, FIB_FILE, STATS_FILE};
use ripstop_fib::publish::ImageRef;
use ripstop_fib::stats::{Counter, KernelCounter, NicStats, Stats, WorkerStats, XdpCounter};
use ripstop_fib::sync::Ordering;
use ripstop_fib::{DropReason, Region};
use serde_json::Value;

use super::{Host, Lab, Node, NodeKind, wait_until};
use crate::address::Family;
use crate::counters::LinkCounters;

/// Number of the routing table that leads to the workers, as text for `ip`.
pub const DETOUR_TABLE: &str = "21097";

/// How long Ripstop gets to come up: it takes a fraction of a second where the cores are free, and many in an emulator.
const START: Duration = Duration::from_secs(60);

/// What a configuration file need not say: entries of a ring, packets of a burst.
const RING: u64 = 2048;
const BURST: u64 = 64;
/// Packets that a queue of the TUN device holds, and those that a queue of a veth pair does
/// (`VETH_RING_SIZE`, drivers/net/veth.c).
const TUN_QUEUE: u64 = 2048;
const VETH_RING: u64 = 256;

/// The workers of a node, all together, as their data plane last published them. That of a dead
/// data plane stays readable; a new one counts from zero.
#[derive(Debug, Clone)]
pub struct Workers {
    /// When this was read (CLOCK_MONOTONIC).
    read_ns: u64,
    /// Process id of the data plane that published it.
    pub pid: u64,
    /// One entry per worker.
    pub workers: Vec<WorkerStats>,
    /// One entry per NIC.
    pub nics: Vec<NicStats>,
}

impl Workers {
    /// A counter, over all workers.
    #[must_use]
    pub fn total(&self, counter: Counter) -> u64 {
        let values = self.workers.iter();
        values.map(|worker| worker.counters.get(counter)).sum()
    }

    /// Packets that came from this node's pods and went to other nodes.
    #[must_use]
    pub fn encapsulated(&self) -> u64 {
        self.total(Counter::NicTxPackets)
    }

    /// Packets that came from other nodes and went to this node's pods.
    #[must_use]
    pub fn decapsulated(&self) -> u64 {
        self.total(Counter::HostTxPackets)
    }

    /// Packets dropped, by reason, without the reasons that did not occur.
    #[must_use]
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let of = |reason: &DropReason| -> u64 {
            let workers = self.workers.iter();
            workers
                .map(|worker| worker.counters.drops[reason.index()])
                .sum()
        };
        let counts = DropReason::ALL
            .iter()
            .map(|reason| (reason.name(), of(reason)));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// One of the kernel's statistics of the workers' sockets.
    #[must_use]
    pub fn kernel(&self, counter: KernelCounter) -> u64 {
        let workers = self.workers.iter();
        workers.map(|worker| worker.kernel[counter as usize]).sum()
    }

    /// What became of the frames that the XDP programs saw, by name.
    #[must_use]
    pub fn xdp(&self) -> Vec<(&'static str, u64)> {
        let of = |counter: XdpCounter| {
            self.nics
                .iter()
                .map(|nic| nic.counters[counter as usize])
                .sum()
        };
        let all = XdpCounter::ALL.iter();
        all.map(|counter| (counter.name(), of(*counter))).collect()
    }

    /// The oldest table that a worker forwards by; 0 if one has none.
    #[must_use]
    pub fn generation(&self) -> u64 {
        let generations = self.workers.iter().map(|worker| worker.generation);
        generations.min().unwrap_or_default()
    }

    /// Age of the oldest heartbeat.
    #[must_use]
    pub fn heartbeat_age(&self) -> Duration {
        let beats = self.workers.iter().map(|worker| worker.heartbeat_ns);
        let oldest = beats.min().unwrap_or_default();
        Duration::from_nanos(self.read_ns.saturating_sub(oldest))
    }
}

impl Lab {
    /// The nodes that run Ripstop.
    pub fn ripstop_nodes(&self) -> impl Iterator<Item = &Node> {
        let nodes = self.nodes().iter();
        nodes.filter(|node| node.kind() == NodeKind::Ripstop)
    }

    /// Starts both processes on every Ripstop node, and waits until the workers of each carry its
    /// traffic to all other nodes.
    ///
    /// # Errors
    /// A process cannot be started or does not get that far.
    pub fn start_ripstop(&self) -> Result<()> {
        for node in self.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane()?;
        }
        let subnets = (self.nodes().len() - 1) * self.families().len();
        self.ripstop_nodes()
            .try_for_each(|node| node.wait_for_detour(subnets))
    }
}

impl Node {
    /// What its workers have counted.
    ///
    /// # Errors
    /// No data plane has run here, or what it left cannot be read.
    pub fn workers(&self) -> Result<Workers> {
        let file = self.run_dir().join(STATS_FILE);
        let what = || format!("{}", file.display());
        let mapping = map::open_stats(&self.run_dir()).with_context(what)?;
        let stats = Stats::attach(mapping.words()).with_context(what)?;
        let (workers, nics) = (stats.workers(), stats.nics());
        Ok(Workers {
            read_ns: map::monotonic_ns(),
            pid: stats.pid(),
            workers,
            nics,
        })
    }

    /// Generation of the forwarding table that is published; 0 if none is.
    ///
    /// # Errors
    /// There is no fib region, or it cannot be read.
    pub fn fib_generation(&self) -> Result<u64> {
        let file = self.run_dir().join(FIB_FILE);
        let what = || format!("{}", file.display());
        let mapping = map::open_fib(&self.run_dir()).with_context(what)?;
        let region = Region::attach(mapping.words()).with_context(what)?;
        let current = region.current().load(Ordering::Relaxed);
        Ok(ImageRef(current).generation())
    }

    /// The subnets of all families that its kernel sends to the workers: none of a family without the
    /// rule that leads there.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn detour(&self) -> Result<Vec<String>> {
        let mut subnets = Vec::new();
        for family in self.plan().families() {
            subnets.extend(self.detour_of(family)?);
        }
        Ok(subnets)
    }

    fn detour_of(&self, family: Family) -> Result<Vec<String>> {
        if !self.has_rule(family)? {
            return Ok(Vec::new());
        }
        // A table that has never had a route is an error to `ip`.
        let show = ["-j", "route", "show", "table", DETOUR_TABLE];
        let output = self.exec(&[&["ip", option(family)], show.as_slice()].concat())?;
        let routes: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let routes = routes.as_array().into_iter().flatten();
        let through_door = routes.filter(|route| route["dev"] == "rip0");
        Ok(through_door
            .filter_map(|route| route["dst"].as_str().map(str::to_owned))
            .collect())
    }

    /// Whether its kernel has a rule that leads to the workers' routes.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn has_detour_rule(&self) -> Result<bool> {
        for family in self.plan().families() {
            if self.has_rule(family)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn has_rule(&self, family: Family) -> Result<bool> {
        let rules = self.output(&["ip", option(family), "-j", "rule"])?;
        let rules: Value = serde_json::from_str(&rules).context("output of ip -j rule")?;
        let mut rules = rules.as_array().into_iter().flatten();
        Ok(rules.any(|rule| rule["table"] == DETOUR_TABLE))
    }

    /// Waits until its kernel sends so many subnets to the workers.
    ///
    /// # Errors
    /// It does not within some seconds, or a process has ended.
    pub fn wait_for_detour(&self, subnets: usize) -> Result<()> {
        let what = format!(
            "workers of {} carry traffic to {subnets} nodes",
            self.name()
        );
        let outcome = wait_until(&what, START, || {
            self.detour().is_ok_and(|found| found.len() >= subnets)
        });
        outcome.with_context(|| format!("on {}: {}", self.name(), self.process_summary()))
    }

    /// The most packets that can be inside its data plane and go with it when it is killed: in the
    /// rings as configured, a burst in hand each way, and in the queues of the kernel that end with
    /// the TUN device and the XDP program.
    ///
    /// # Errors
    /// Its configuration cannot be read.
    pub fn held_max(&self) -> Result<u64> {
        let mut held = 0;
        let dir = self.config_dir();
        for entry in fs::read_dir(&dir).with_context(|| format!("{}", dir.display()))? {
            let path = entry.context("configuration")?.path();
            let what = || format!("{}", path.display());
            let text = fs::read_to_string(&path).with_context(what)?;
            let config: Value = serde_json::from_str(&text).with_context(what)?;
            let number = |pointer, default| {
                let value = config.pointer(pointer).and_then(Value::as_u64);
                value.unwrap_or(default)
            };
            held += number("/rings/rx", RING) + number("/rings/tx", RING);
            held += 2 * number("/burst", BURST) + VETH_RING;
            held += match config.pointer("/hostDoor/kind").and_then(Value::as_str) {
                Some("veth") => number("/rings/rx", RING) + number("/rings/tx", RING) + VETH_RING,
                _ => TUN_QUEUE,
            };
        }
        Ok(held)
    }

    /// The counters of its kernel's tunnel devices, which the traffic takes when no worker does, all
    /// together; of a kernel or a backend without such a device, nothing.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn standby_counters(&self) -> Result<LinkCounters> {
        let plan = self.plan();
        let links: Value = serde_json::from_str(&self.output(&["ip", "-j", "link"])?)
            .context("output of ip -j link")?;
        let links = links.as_array().into_iter().flatten();
        let names: Vec<&str> = links.filter_map(|link| link["ifname"].as_str()).collect();
        let mut sum = LinkCounters::default();
        for device in plan
            .families()
            .filter_map(|family| plan.backend.device(family))
        {
            if names.contains(&device) {
                sum += self.link_counters(device)?;
            }
        }
        Ok(sum)
    }
}

/// What tells `ip` the family.
fn option(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "-4",
        Family::Ipv6 => "-6",
    }
}
