//! What can be measured, in the Prometheus text format (version 0.0.4).
//!
//! One list says what there is: it makes the exposition, the table in the README, and the test of the dashboard. The
//! figures are read from the shared regions and the state file, so that `ripstop metrics` prints them without the help
//! of any process; a control plane that runs adds what only it knows. No worker notices: regions are mapped read-only.

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use hashbrown::HashSet;
use prometheus::core::Collector;
use prometheus::proto::{self, MetricFamily, MetricType};
use prometheus::{Histogram, TextEncoder};
use ripstop_fib::map::{CONTROLPLANE_LOCK, DATAPLANE_LOCK, lock_owner};
use ripstop_fib::stats::{Counter, Gauge, KernelCounter, WorkerStats, XdpCounter};
use ripstop_fib::{ABI_VERSION, Backend, DropReason, FAMILY_IPV4};

use super::{Health, Outcome};
use crate::report::{self, ReportError, Sample};
use crate::state::State;
use crate::{detour, guard, rules};

/// The rules' counters come from a program, `nft`: however often we are asked, it is started only so often.
const RULES_EVERY: Duration = Duration::from_secs(2);

macro_rules! metrics {
    ($($variant:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        /// A family of metrics. What each is stands in [`Metric::help`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(usize)]
        #[expect(missing_docs, reason = "the help text is the documentation")]
        pub enum Metric { $($variant,)+ }

        impl Metric {
            /// All of them, in the order of the exposition.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The names of the labels.
            pub const fn labels(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($label),*],)+ }
            }

            /// What it is, in a sentence.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)+ }
            }

            const fn kind(self) -> MetricType {
                match self { $(Self::$variant => MetricType::$kind,)+ }
            }
        }
    };
}

metrics! {
    BuildInfo = GAUGE "ripstop_build_info" ["version", "abi"] "Version of the program that prints this, and of the layout of the shared regions.";
    ProcessUp = GAUGE "ripstop_process_up" ["process"] "Whether the process runs.";
    ProcessStart = GAUGE "ripstop_process_start_time_seconds" ["process"] "When the process started, in seconds since 1970.";
    Ready = GAUGE "ripstop_ready" [] "Whether /readyz says so: all peers programmed in the kernel and, while workers live, in their table.";
    Problem = GAUGE "ripstop_problem" ["part"] "1 for each part that has a problem, which `ripstop status` names.";
    Leases = GAUGE "ripstop_leases" ["family"] "Leases in the forwarding table, our own included.";
    Peers = GAUGE "ripstop_peers" ["family", "state"] "Other nodes' leases by whether workers can send to them: resolved, unresolved.";
    DirectPeers = GAUGE "ripstop_direct_peers" ["family"] "Other nodes' leases that are reached without a tunnel.";
    Generation = GAUGE "ripstop_fib_generation" [] "Generation of the forwarding table as published.";
    GenerationTakenUp = GAUGE "ripstop_fib_generation_taken_up" [] "Oldest generation that a worker forwards by; 0 if one has none.";
    FibBytes = GAUGE "ripstop_fib_size_bytes" [] "Size of the forwarding table.";
    PublishSeconds = HISTOGRAM "ripstop_publish_duration_seconds" [] "Time to compile the forwarding table and to publish it.";
    LeaseSeconds = HISTOGRAM "ripstop_lease_to_published_duration_seconds" [] "Time from the source's news of a lease to the forwarding table that has it.";
    TakeUpSeconds = HISTOGRAM "ripstop_take_up_duration_seconds" [] "Time from publishing a forwarding table until all workers were seen to use it.";
    DetourActive = GAUGE "ripstop_detour_active" [] "Whether traffic to other nodes is led to the workers, for at least some of them.";
    DetourRoutes = GAUGE "ripstop_detour_routes" [] "Other nodes' subnets that are led to the workers.";
    StandbyInUse = GAUGE "ripstop_standby_in_use" [] "Whether the kernel's own path carries the traffic to at least one other node.";
    StandbyComplete = GAUGE "ripstop_standby_complete" [] "Whether the kernel's own path holds all that it should.";
    StandbyWritten = COUNTER "ripstop_standby_entries_written_total" [] "Devices, routes, neighbours and forwarding entries that were put right in the kernel's path, for whatever reason.";
    StandbyHealed = COUNTER "ripstop_standby_entries_healed_total" [] "Those of them that nothing of ours called for: somebody had changed or removed them.";
    Rounds = COUNTER "ripstop_reconcile_rounds_total" [] "Rounds of the control plane's loop.";
    RoundAge = GAUGE "ripstop_reconcile_last_round_age_seconds" [] "Time since the loop ended a round; /healthz fails when it is over 30.";
    StepFailures = COUNTER "ripstop_reconcile_failures_total" ["step"] "Failures of the parts of a round; each is tried again.";
    Events = COUNTER "ripstop_kubernetes_events_total" ["outcome"] "Requests about Kubernetes Events: sent, refused by the API server, or given up.";
    FilterDrops = COUNTER "ripstop_filter_drops_total" ["reason"] "Packets that the nftables rules dropped: the peer filter of the kernel's path, and the guard.";
    WorkerInfo = GAUGE "ripstop_worker_info" ["nic", "queue", "cpu", "mode", "polling", "host_door", "huge_pages", "numa_node"] "1 for each worker: where it is, how its socket is bound (zero-copy, copy, generic), how it waits, and what its host door is (tun, veth).";
    WorkerHeartbeat = GAUGE "ripstop_worker_heartbeat_age_seconds" ["nic", "queue"] "Time since the worker's last sign of life; over 1, it is taken for stopped.";
    WorkerGeneration = GAUGE "ripstop_worker_fib_generation" ["nic", "queue"] "Generation of the forwarding table that the worker uses.";
    WorkerPackets = COUNTER "ripstop_worker_packets_total" ["nic", "queue", "port", "direction"] "Packets by port (nic, host) and direction (receive, transmit).";
    WorkerBytes = COUNTER "ripstop_worker_bytes_total" ["nic", "queue", "port", "direction"] "Bytes of those; on the NIC with tunnel headers.";
    WorkerSuperPackets = COUNTER "ripstop_worker_super_packets_total" ["nic", "queue", "direction"] "Super-packets at the host door: cut after receiving (receive), joined for delivery (transmit).";
    WorkerSuperMembers = COUNTER "ripstop_worker_super_packet_members_total" ["nic", "queue", "direction"] "Packets that those were cut into or joined from; ripstop_worker_packets_total has them, too.";
    WorkerDrops = COUNTER "ripstop_worker_drops_total" ["nic", "queue", "reason"] "Packets that the worker dropped; `ripstop drops` explains the reasons.";
    WorkerTurns = COUNTER "ripstop_worker_turns_total" ["nic", "queue", "state"] "Turns of the worker's loop: busy (a burst was moved), idle.";
    WorkerCycles = COUNTER "ripstop_worker_cycles_total" ["nic", "queue", "state"] "Time-stamp counter's cycles in turns with packets (busy), in turns without (idle), and asleep; busy by packets received is cycles per packet.";
    WorkerSleeps = COUNTER "ripstop_worker_sleeps_total" ["nic", "queue"] "Times that the worker went to sleep for want of packets.";
    WorkerKicks = COUNTER "ripstop_worker_kicks_total" ["nic", "queue"] "System calls that told the kernel to transmit or to refill.";
    WorkerSwitches = COUNTER "ripstop_worker_fib_switches_total" ["nic", "queue"] "Forwarding tables that the worker changed to.";
    WorkerFrames = GAUGE "ripstop_worker_frames" ["nic", "queue", "state"] "Frames of the worker's memory by where they are.";
    SocketDrops = COUNTER "ripstop_worker_socket_drops_total" ["nic", "queue", "reason"] "Packets that the kernel dropped at the worker's AF_XDP socket.";
    RingEmpty = COUNTER "ripstop_worker_ring_empty_total" ["nic", "queue", "ring"] "Times that the kernel found nothing in a ring of the worker's socket: fill, transmit.";
    NicInfo = GAUGE "ripstop_nic_info" ["nic", "attached"] "1 for each NIC: how the XDP program is attached (native, generic).";
    NicQueues = GAUGE "ripstop_nic_queues" ["nic"] "Queues that the NIC has.";
    NicPackets = COUNTER "ripstop_nic_xdp_packets_total" ["nic", "outcome"] "Frames that the XDP program saw, by what became of them.";
}

impl Metric {
    /// `counter`, `gauge` or `histogram`.
    pub const fn kind_name(self) -> &'static str {
        match self.kind() {
            MetricType::COUNTER => "counter",
            MetricType::GAUGE => "gauge",
            MetricType::HISTOGRAM => "histogram",
            MetricType::SUMMARY => "summary",
            MetricType::UNTYPED => "untyped",
        }
    }
}

/// The table of the README.
pub fn readme_table() -> String {
    let row = |metric: &Metric| {
        let labels = metric.labels().join("`, `");
        let labels = match labels.is_empty() {
            true => "–".to_owned(),
            false => format!("`{labels}`"),
        };
        format!(
            "| `{}` | {} | {labels} | {} |\n",
            metric.name(),
            metric.kind_name(),
            metric.help()
        )
    };
    let rows: String = Metric::ALL.iter().map(row).collect();
    format!("| Metric | Kind | Labels | What it is |\n|---|---|---|---|\n{rows}")
}

/// Figures on their way to text.
#[derive(Debug)]
struct Exposition {
    /// Indexed by [`Metric`].
    families: Vec<Vec<proto::Metric>>,
}

/// Our counts fit: 2^53 packets take years.
#[expect(
    clippy::cast_precision_loss,
    reason = "figures are floating point in this format"
)]
fn float(count: u64) -> f64 {
    count as f64
}

fn count(count: usize) -> f64 {
    float(u64::try_from(count).unwrap_or(u64::MAX))
}

fn switch(on: bool) -> f64 {
    f64::from(u8::from(on))
}

impl Exposition {
    fn new() -> Self {
        Self {
            families: vec![Vec::new(); Metric::ALL.len()],
        }
    }

    /// Adds a figure; `labels` are the values, in the order of the names.
    fn add(&mut self, metric: Metric, labels: &[&str], value: f64) {
        let pairs = metric.labels().iter().zip(labels).map(|(name, value)| {
            let mut pair = proto::LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        let mut sample = proto::Metric::from_label(pairs.collect());
        if metric.kind() == MetricType::COUNTER {
            let mut counter = proto::Counter::default();
            counter.set_value(value);
            sample.set_counter(counter);
        } else {
            let mut gauge = proto::Gauge::default();
            gauge.set_value(value);
            sample.set_gauge(gauge);
        }
        self.families[metric as usize].push(sample);
    }

    fn add_histogram(&mut self, metric: Metric, histogram: &Histogram) {
        for family in histogram.collect() {
            self.families[metric as usize].extend(family.get_metric().iter().cloned());
        }
    }

    fn text(self) -> String {
        let families = Metric::ALL.iter().zip(self.families);
        let families: Vec<MetricFamily> = families
            .filter(|(_, samples)| !samples.is_empty())
            .map(|(metric, samples)| {
                let mut family = MetricFamily::default();
                family.set_name(metric.name().to_owned());
                family.set_help(metric.help().to_owned());
                family.set_field_type(metric.kind());
                family.set_metric(samples);
                family
            })
            .collect();
        let mut text = String::new();
        // It refuses families without name or figure, which these are not, and writing to a string cannot fail.
        let _infallible = TextEncoder::new().encode_utf8(&families, &mut text);
        text
    }
}

/// Leases in the forwarding table, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FibFigures {
    generation: u64,
    bytes: usize,
    /// There is a way to the others at all, with or without workers.
    has_path: bool,
    /// IPv4, IPv6.
    families: [FamilyFigures; 2],
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FamilyFigures {
    leases: usize,
    resolved: usize,
    unresolved: usize,
    direct: usize,
}

/// Reads the figures of one node, again and again.
#[derive(Debug)]
pub struct Scraper {
    run_dir: PathBuf,
    health: Option<std::sync::Arc<Health>>,
    fib: Option<FibFigures>,
    rules: Vec<(&'static str, u64)>,
    rules_read: Option<Instant>,
}

impl Scraper {
    /// Reads what is in `run_dir`, and what the loop of this process says, if there is one.
    pub fn new(run_dir: &Path, health: Option<std::sync::Arc<Health>>) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            health,
            fib: None,
            rules: Vec::new(),
            rules_read: None,
        }
    }

    /// All figures, as text. What cannot be read is left out.
    ///
    /// # Errors
    /// When nothing of Ripstop's has run here.
    pub fn text(&mut self) -> Result<String, ReportError> {
        if !self.run_dir.exists() && self.health.is_none() {
            return Err(ReportError::NothingHere(self.run_dir.display().to_string()));
        }
        let mut out = Exposition::new();
        let abi = ABI_VERSION.to_string();
        out.add(
            Metric::BuildInfo,
            &[env!("CARGO_PKG_VERSION"), abi.as_str()],
            1.0,
        );
        let sample = report::read_stats(&self.run_dir).ok().flatten();
        self.add_processes(&mut out, sample.as_ref());
        self.read_fib();
        let fib = self.fib.clone().unwrap_or_default();
        add_fib(&mut out, &fib);
        let peers: usize = fib
            .families
            .iter()
            .filter(|_| fib.has_path)
            .map(|family| family.resolved + family.unresolved)
            .sum();
        match self.health.clone() {
            Some(health) => add_health(&mut out, &health, peers),
            None => self.add_from_outside(&mut out, peers),
        }
        if let Some(sample) = &sample {
            add_sample(&mut out, sample);
        }
        self.read_rules();
        for (reason, packets) in &self.rules {
            out.add(Metric::FilterDrops, &[reason], float(*packets));
        }
        Ok(out.text())
    }

    fn runs(&self, lock: &str) -> bool {
        lock_owner(&self.run_dir, lock).is_ok_and(|owner| owner.is_some())
    }

    fn add_processes(&self, out: &mut Exposition, sample: Option<&Sample>) {
        let data_plane = sample.map(|sample| {
            let age = Duration::from_nanos(sample.now_ns.saturating_sub(sample.started_ns));
            unix_seconds() - age.as_secs_f64()
        });
        let control_plane = match &self.health {
            Some(health) => Some(health.started()),
            None => State::read(&self.run_dir).ok().map(|state| state.started),
        };
        for (process, up, started) in [
            (
                "controlplane",
                self.health.is_some() || self.runs(CONTROLPLANE_LOCK),
                control_plane,
            ),
            ("dataplane", self.runs(DATAPLANE_LOCK), data_plane),
        ] {
            out.add(Metric::ProcessUp, &[process], switch(up));
            if let Some(started) = started.filter(|started| up && *started > 0.0) {
                // To the millisecond: two clocks read one after the other do not agree to more.
                let started = (started * 1000.0).round() / 1000.0;
                out.add(Metric::ProcessStart, &[process], started);
            }
        }
    }

    /// Counts the leases, unless the table is the one that was counted last.
    fn read_fib(&mut self) {
        let known = self.fib.as_ref().map(|fib| fib.generation);
        match report::fib_generation(&self.run_dir) {
            Some(generation) if known == Some(generation) => return,
            Some(_) => {}
            None => {
                self.fib = None;
                return;
            }
        }
        let Ok(Some(table)) = report::read_table(&self.run_dir) else {
            return;
        };
        let mut figures = FibFigures {
            generation: table.generation,
            bytes: table.bytes,
            has_path: table.node.backend != Backend::Alloc,
            ..FibFigures::default()
        };
        for lease in &table.leases {
            let family = &mut figures.families[usize::from(lease.family != FAMILY_IPV4)];
            family.leases += 1;
            family.resolved += usize::from(!lease.local && lease.resolved);
            family.unresolved += usize::from(!lease.local && !lease.resolved);
            family.direct += usize::from(!lease.local && lease.direct);
        }
        self.fib = Some(figures);
    }

    /// What the kernel and the state file say of a control plane in another process, which may be dead.
    fn add_from_outside(&self, out: &mut Exposition, peers: usize) {
        let state = State::read(&self.run_dir).ok();
        let table = state.as_ref().map_or(detour::TABLE, |state| state.table);
        if let Ok(kernel) = report::read_kernel(table, &[]) {
            let active = kernel.rule && kernel.rip0;
            let routes = match active {
                true => kernel.detour_subnets.len(),
                false => 0,
            };
            add_path(out, active, routes, peers);
        }
        let alive = self.runs(CONTROLPLANE_LOCK);
        for part in state
            .filter(|_| alive)
            .iter()
            .flat_map(|state| &state.problem_parts)
        {
            out.add(Metric::Problem, &[part.as_str()], 1.0);
        }
    }

    fn read_rules(&mut self) {
        if self
            .rules_read
            .is_some_and(|read| read.elapsed() < RULES_EVERY)
        {
            return;
        }
        self.rules_read = Some(Instant::now());
        self.rules.clear();
        if let Ok(Some(counts)) = rules::counts() {
            for counter in rules::COUNTERS {
                let count = counts.iter().find(|count| count.name == counter.name);
                self.rules
                    .push((counter.name, count.map_or(0, |count| count.packets)));
            }
        }
        if let Ok(Some(count)) = rules::guard_count() {
            self.rules.push((guard::COUNTER.name, count.packets));
        }
    }
}

/// The time, in seconds since 1970.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn add_fib(out: &mut Exposition, fib: &FibFigures) {
    for (name, family) in ["ipv4", "ipv6"].into_iter().zip(&fib.families) {
        out.add(Metric::Leases, &[name], count(family.leases));
        for (state, peers) in [
            ("resolved", family.resolved),
            ("unresolved", family.unresolved),
        ] {
            out.add(Metric::Peers, &[name, state], count(peers));
        }
        out.add(Metric::DirectPeers, &[name], count(family.direct));
    }
    out.add(Metric::Generation, &[], float(fib.generation));
    out.add(Metric::FibBytes, &[], count(fib.bytes));
}

fn add_path(out: &mut Exposition, active: bool, routes: usize, peers: usize) {
    out.add(Metric::DetourActive, &[], switch(active));
    out.add(Metric::DetourRoutes, &[], count(routes));
    out.add(Metric::StandbyInUse, &[], switch(routes < peers));
}

fn add_health(out: &mut Exposition, health: &Health, peers: usize) {
    let round = health.round();
    let routes = match round.detour_active {
        true => round.detour_routes,
        false => 0,
    };
    add_path(out, round.detour_active, routes, peers);
    out.add(Metric::Ready, &[], switch(round.unready.is_none()));
    out.add(Metric::StandbyComplete, &[], switch(round.standby_complete));
    for part in round.problems.keys() {
        out.add(Metric::Problem, &[part], 1.0);
    }
    let figures = &health.figures;
    out.add(Metric::StandbyWritten, &[], float(figures.written.get()));
    out.add(Metric::StandbyHealed, &[], float(figures.healed.get()));
    out.add(Metric::Rounds, &[], float(figures.rounds.get()));
    if let Some(age) = health.age() {
        out.add(Metric::RoundAge, &[], age.as_secs_f64());
    }
    for (step, failures) in health.failures() {
        out.add(Metric::StepFailures, &[step], float(failures));
    }
    for (outcome, counter) in Outcome::NAMES.iter().zip(&figures.events) {
        out.add(Metric::Events, &[outcome], float(counter.get()));
    }
    out.add_histogram(Metric::PublishSeconds, &figures.publish);
    out.add_histogram(Metric::LeaseSeconds, &figures.lease);
    out.add_histogram(Metric::TakeUpSeconds, &figures.take_up);
}

fn add_sample(out: &mut Exposition, sample: &Sample) {
    let mut seen = HashSet::new();
    let oldest = sample.workers.iter().map(|worker| worker.generation).min();
    out.add(Metric::GenerationTakenUp, &[], float(oldest.unwrap_or(0)));
    for worker in &sample.workers {
        // Two of one name, which only a damaged region has, would spoil the whole text.
        if seen.insert((worker.identity.nic.clone(), worker.identity.queue)) {
            add_worker(out, worker, sample.now_ns);
        }
    }
    let mut seen = HashSet::new();
    for nic in &sample.nics {
        if !seen.insert(&nic.nic) {
            continue;
        }
        let attached = if nic.native { "native" } else { "generic" };
        out.add(Metric::NicInfo, &[&nic.nic, attached], 1.0);
        out.add(Metric::NicQueues, &[&nic.nic], f64::from(nic.queues));
        for &outcome in XdpCounter::ALL {
            let packets = float(nic.counters[outcome as usize]);
            out.add(Metric::NicPackets, &[&nic.nic, outcome.name()], packets);
        }
    }
}

fn add_worker(out: &mut Exposition, worker: &WorkerStats, now_ns: u64) {
    let identity = &worker.identity;
    let queue = identity.queue.to_string();
    let (nic, queue) = (identity.nic.as_str(), queue.as_str());
    let node = identity.numa_node.map(|node| node.to_string());
    let info = [
        nic,
        queue,
        &identity.cpu.to_string(),
        identity.mode.name(),
        identity.polling.name(),
        identity.door.name(),
        if identity.huge_pages { "true" } else { "false" },
        node.as_deref().unwrap_or(""),
    ];
    out.add(Metric::WorkerInfo, &info, 1.0);
    let age = Duration::from_nanos(now_ns.saturating_sub(worker.heartbeat_ns));
    out.add(Metric::WorkerHeartbeat, &[nic, queue], age.as_secs_f64());
    let generation = float(worker.generation);
    out.add(Metric::WorkerGeneration, &[nic, queue], generation);
    let value = |counter| worker.counters.get(counter);
    for (port, direction, packets, bytes) in [
        ("nic", "receive", Counter::NicRxPackets, Counter::NicRxBytes),
        (
            "nic",
            "transmit",
            Counter::NicTxPackets,
            Counter::NicTxBytes,
        ),
        (
            "host",
            "receive",
            Counter::HostRxPackets,
            Counter::HostRxBytes,
        ),
        (
            "host",
            "transmit",
            Counter::HostTxPackets,
            Counter::HostTxBytes,
        ),
    ] {
        let labels = [nic, queue, port, direction];
        out.add(Metric::WorkerPackets, &labels, float(value(packets)));
        out.add(Metric::WorkerBytes, &labels, float(value(bytes)));
    }
    for &reason in DropReason::ALL {
        let drops = float(worker.counters.drops[reason.index()]);
        out.add(Metric::WorkerDrops, &[nic, queue, reason.name()], drops);
    }
    let (turns, busy) = (value(Counter::Turns), value(Counter::BusyTurns));
    for (metric, state, value) in [
        (Metric::WorkerTurns, "busy", busy),
        (Metric::WorkerTurns, "idle", turns.saturating_sub(busy)),
        (Metric::WorkerCycles, "busy", value(Counter::BusyCycles)),
        (Metric::WorkerCycles, "idle", value(Counter::IdleCycles)),
        (Metric::WorkerCycles, "asleep", value(Counter::AsleepCycles)),
    ] {
        out.add(metric, &[nic, queue, state], float(value));
    }
    for (direction, supers, members) in [
        (
            "receive",
            Counter::HostRxSuperPackets,
            Counter::HostRxCutPackets,
        ),
        (
            "transmit",
            Counter::HostTxSuperPackets,
            Counter::HostTxJoinedPackets,
        ),
    ] {
        let labels = [nic, queue, direction];
        out.add(Metric::WorkerSuperPackets, &labels, float(value(supers)));
        out.add(Metric::WorkerSuperMembers, &labels, float(value(members)));
    }
    for (metric, counter) in [
        (Metric::WorkerSleeps, Counter::Sleeps),
        (Metric::WorkerKicks, Counter::Kicks),
        (Metric::WorkerSwitches, Counter::ImageSwitches),
    ] {
        out.add(metric, &[nic, queue], float(value(counter)));
    }
    for &state in Gauge::ALL {
        let frames = float(worker.gauges[state as usize]);
        out.add(Metric::WorkerFrames, &[nic, queue, state.name()], frames);
    }
    for &counter in KernelCounter::ALL {
        let (metric, label) = match counter {
            KernelCounter::RxDropped
            | KernelCounter::RxInvalidDescriptors
            | KernelCounter::TxInvalidDescriptors
            | KernelCounter::RxRingFull
            | KernelCounter::HostDropped => (Metric::SocketDrops, counter.name()),
            KernelCounter::FillRingEmpty => (Metric::RingEmpty, "fill"),
            KernelCounter::TxRingEmpty => (Metric::RingEmpty, "transmit"),
        };
        let value = float(worker.kernel[counter as usize]);
        out.add(metric, &[nic, queue, label], value);
    }
}
