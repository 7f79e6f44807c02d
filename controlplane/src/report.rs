//! What the operator's CLI shows: read from the run directory and the kernel, asking no process.

use core::fmt::Write as _;
use core::time::Duration;
use std::collections::HashSet;
use std::io;
use std::path::Path;

use ipnet::IpNet;
use ripstop_fib::map::{
    self, CONTROLPLANE_LOCK, DATAPLANE_LOCK, FIB_FILE, MapError, STATS_FILE, lock_owner, open_fib,
    open_stats,
};
use ripstop_fib::publish::ImageRef;
use ripstop_fib::stats::{Counter, Door, KernelCounter, NicStats, Stats, WorkerStats, XdpCounter};
use ripstop_fib::sync::Ordering;
use ripstop_fib::{Backend, DropReason, Image, LeaseRecord, Node, Region};
use serde::Serialize;

use crate::family::Family;
use crate::mac::Mac;
use crate::netlink::message::RouteFilter;
use crate::netlink::{Netlink, NetlinkError};
use crate::publish::{self, HEARTBEAT_MAX};
use crate::state::{RulesState, State};
use crate::table::{Align, grouped, render, scaled};
use crate::{detour, guard, rules, standby};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Nothing has run here.
    #[error(
        "Ripstop has not run on this node: there is no {0}. Start ripstop-controlplane and ripstop-dataplane, or name their directory with --run-dir"
    )]
    NothingHere(String),
    /// A region is there but cannot be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The forwarding table is damaged.
    #[error(
        "{path}: the forwarding table is damaged: {problem}; a running control plane publishes it anew, restart it"
    )]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

fn present<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The forwarding table as it was at one moment.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) generation: u64,
    pub(crate) node: Node,
    pub(crate) leases: Vec<LeaseRecord>,
    pub(crate) bytes: usize,
}

/// Generation of the forwarding table that is current, if there is one.
pub(crate) fn fib_generation(run_dir: &Path) -> Option<u64> {
    let mapping = open_fib(run_dir).ok()?;
    let region = Region::attach(mapping.words()).ok()?;
    let current = ImageRef(region.current().load(Ordering::Relaxed));
    Some(current.generation()).filter(|&generation| generation > 0)
}

pub(crate) fn read_table(run_dir: &Path) -> Result<Option<Table>, ReportError> {
    let Some(mapping) = present(open_fib(run_dir))? else {
        return Ok(None);
    };
    let path = run_dir.join(FIB_FILE);
    let region = Region::attach(mapping.words()).map_err(|source| MapError::Region {
        path: path.clone(),
        source,
    })?;
    let Some((generation, words)) = region.snapshot() else {
        return Ok(None);
    };
    let damaged = |problem: ripstop_fib::ImageError| ReportError::Damaged {
        path: path.display().to_string(),
        problem: problem.to_string(),
    };
    let image = Image::attach(&words).map_err(damaged)?;
    image.verify().map_err(damaged)?;
    let bytes = image.size_bytes();
    Ok(Some(Table {
        generation,
        node: image.node(),
        leases: image.leases().collect(),
        bytes,
    }))
}

/// What the data plane published at one moment.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) workers: Vec<WorkerStats>,
    pub(crate) nics: Vec<NicStats>,
    pub(crate) started_ns: u64,
    pub(crate) now_ns: u64,
}

pub(crate) fn read_stats(run_dir: &Path) -> Result<Option<Sample>, ReportError> {
    let Some(mapping) = present(open_stats(run_dir))? else {
        return Ok(None);
    };
    let path = run_dir.join(STATS_FILE);
    let stats =
        Stats::attach(mapping.words()).map_err(|source| MapError::Region { path, source })?;
    let (workers, nics, started_ns) = (stats.workers(), stats.nics(), stats.started_ns());
    Ok(Some(Sample {
        workers,
        nics,
        started_ns,
        now_ns: map::monotonic_ns(),
    }))
}

/// What the kernel holds of ours; nothing where it cannot be asked (needs root).
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    pub(crate) rule: bool,
    pub(crate) detour_subnets: HashSet<IpNet>,
    pub(crate) rip0: bool,
    /// Of the devices asked for, those that are not there.
    missing_devices: Vec<String>,
}

pub(crate) fn read_kernel(table: u32, devices: &[String]) -> Result<Kernel, NetlinkError> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let mut kernel = Kernel {
        rip0: links.iter().any(|link| link.name == detour::DEVICE),
        ..Kernel::default()
    };
    let is_missing = |device: &&String| !links.iter().any(|link| link.name == **device);
    kernel.missing_devices = devices.iter().filter(is_missing).cloned().collect();
    for family in Family::ALL {
        let routes = netlink.routes(RouteFilter::table(family, table))?;
        let subnets = routes.iter().map(|route| route.destination);
        let rules = netlink.rules(family)?;
        // Routes that no rule leads to carry nothing.
        if rules.iter().any(|rule| detour::is_our_rule(rule, table)) {
            kernel.rule = true;
            kernel.detour_subnets.extend(subnets);
        }
    }
    Ok(kernel)
}

/// `ripstop status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Everything runs and nothing is wrong.
    pub ok: bool,
    /// The control plane.
    pub control_plane: ControlPlaneStatus,
    /// The data plane.
    pub data_plane: DataPlaneStatus,
    /// The forwarding table; none before the first one was published.
    pub fib: Option<FibStatus>,
    /// The path that traffic takes; none where the kernel cannot be asked.
    pub path: Option<PathStatus>,
    /// What is wrong, as far as it can be seen.
    pub problems: Vec<String>,
}

/// The control plane's part of [`Status`].
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlPlaneStatus {
    /// It runs.
    pub alive: bool,
    /// Its process, if it runs.
    pub pid: Option<u32>,
    /// Its own account, as of its last change.
    pub state: Option<State>,
}

/// The data plane's part of [`Status`].
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DataPlaneStatus {
    /// It runs.
    pub alive: bool,
    /// Its process, if it runs.
    pub pid: Option<u32>,
    /// How long it has run.
    pub uptime_s: Option<u64>,
    /// Its workers.
    pub workers: Vec<WorkerStatus>,
    /// The NICs that its XDP program is attached to.
    pub nics: Vec<NicStatus>,
}

/// One direction of a worker.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Packets since the start.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Packets per second over the sample.
    pub packets_per_s: u64,
    /// Bits per second over the sample.
    pub bits_per_s: u64,
}

/// One worker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerStatus {
    /// NIC.
    pub nic: String,
    /// Queue.
    pub queue: u32,
    /// CPU.
    pub cpu: u32,
    /// Mode in use.
    pub mode: &'static str,
    /// How it waits.
    pub polling: &'static str,
    /// Its way into the host.
    pub host_door: &'static str,
    /// How it sends on the NIC.
    pub transmit: &'static str,
    /// How it sends to a host door that has a socket.
    pub door_transmit: Option<&'static str>,
    /// Its packet memory lies on huge pages.
    pub huge_pages: bool,
    /// NUMA node of its packet memory, on machines that have several.
    pub numa_node: Option<u16>,
    /// Age of its last sign of life.
    pub heartbeat_ms: u64,
    /// The sign of life is recent.
    pub fresh: bool,
    /// Generation that it forwards by.
    pub generation: u64,
    /// From pods to other nodes: transmitted on the NIC.
    pub encapsulated: Flow,
    /// From other nodes to pods: delivered to the host.
    pub decapsulated: Flow,
    /// Packets dropped, all reasons.
    pub drops: u64,
    /// The kernel's statistics of its socket.
    pub kernel: serde_json::Map<String, serde_json::Value>,
}

/// One NIC.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NicStatus {
    /// Its name.
    pub nic: String,
    /// Its queues.
    pub queues: u32,
    /// How the program is attached.
    pub attached: &'static str,
    /// What became of the frames that it saw.
    pub xdp: serde_json::Map<String, serde_json::Value>,
}

/// The forwarding table.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FibStatus {
    /// Its generation.
    pub generation: u64,
    /// Leases, our own included.
    pub leases: usize,
    /// Peers that workers can send to.
    pub resolved: usize,
    /// All peers.
    pub peers: usize,
    /// Its size.
    pub bytes: usize,
    /// How packets reach other nodes.
    pub backend: &'static str,
    /// The VNI, 0 without VXLAN.
    pub vni: u32,
    /// The UDP port, 0 where there is none.
    pub port: u16,
    /// MTU of the pods in IPv4.
    pub pod_mtu: Option<u16>,
    /// MTU of the pods in IPv6.
    pub pod_mtu6: Option<u16>,
    /// Peers that are sent to without a tunnel.
    pub direct: usize,
}

/// Which way traffic to other nodes goes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStatus {
    /// `workers`, `mixed` or `standby`.
    pub in_use: &'static str,
    /// The data plane's device is there.
    pub rip0: bool,
    /// The rule that leads to it is there.
    pub rule: bool,
    /// Subnets routed through it.
    pub detour_routes: usize,
    /// The kernel's tunnel devices are there, as far as the backend has any.
    pub standby_device: bool,
    /// The peer filter is there; none where nft cannot be asked.
    pub peer_filter: Option<bool>,
    /// What keeps pods from sending in the name of nodes; none where nft cannot be asked.
    pub guard: Option<GuardStatus>,
}

/// The guard in the kernel.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuardStatus {
    /// It is there.
    pub on: bool,
    /// Packets that it has dropped.
    pub dropped: u64,
}

fn flow(
    now: &WorkerStats,
    before: Option<&WorkerStats>,
    packets: Counter,
    bytes: Counter,
    interval: Duration,
) -> Flow {
    let value = |counter| now.counters.get(counter);
    let interval_ms = u64::try_from(interval.as_millis())
        .unwrap_or(u64::MAX)
        .max(1);
    let per_s = |counter| {
        let before = before.map_or_else(|| value(counter), |before| before.counters.get(counter));
        value(counter).saturating_sub(before).saturating_mul(1000) / interval_ms
    };
    Flow {
        packets: value(packets),
        bytes: value(bytes),
        packets_per_s: per_s(packets),
        bits_per_s: per_s(bytes).saturating_mul(8),
    }
}

fn named<'a>(
    pairs: impl Iterator<Item = (&'a str, u64)>,
) -> serde_json::Map<String, serde_json::Value> {
    pairs
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

impl Status {
    /// Reads everything; takes `interval` if there are rates to measure.
    pub fn read(run_dir: &Path, interval: Duration) -> Result<Self, ReportError> {
        if !run_dir.exists() {
            return Err(ReportError::NothingHere(run_dir.display().to_string()));
        }
        let control_pid = lock_owner(run_dir, CONTROLPLANE_LOCK)?;
        let data_pid = lock_owner(run_dir, DATAPLANE_LOCK)?;
        let state = State::read(run_dir).ok();
        let mut problems = Vec::new();
        let mut workers = Vec::new();
        let mut nics = Vec::new();
        let mut uptime_s = None;
        if data_pid.is_some()
            && let Some(before) = read_stats(run_dir)?
        {
            if !interval.is_zero() {
                std::thread::sleep(interval);
            }
            let now = read_stats(run_dir)?.unwrap_or(before_again(&before));
            uptime_s = Some(now.now_ns.saturating_sub(now.started_ns) / 1_000_000_000);
            let interval = Duration::from_nanos(now.now_ns.saturating_sub(before.now_ns));
            // A data plane that restarted in between has other counters.
            let same = before.started_ns == now.started_ns;
            for (index, worker) in now.workers.iter().enumerate() {
                let before = before.workers.get(index).filter(|_| same);
                workers.push(worker_status(worker, before, interval, now.now_ns));
            }
            nics = now.nics.iter().map(nic_status).collect();
        }
        let table = read_table(run_dir)?;
        let fib = table.as_ref().map(|table| FibStatus {
            generation: table.generation,
            leases: table.leases.len(),
            resolved: table
                .leases
                .iter()
                .filter(|lease| lease.resolved && !lease.local)
                .count(),
            peers: table.leases.iter().filter(|lease| !lease.local).count(),
            bytes: table.bytes,
            backend: table.node.backend.name(),
            vni: table.node.vni,
            port: table.node.udp_port,
            pod_mtu: table.node.v4.map(|v4| v4.pod_mtu),
            pod_mtu6: table.node.v6.map(|v6| v6.pod_mtu),
            direct: table
                .leases
                .iter()
                .filter(|lease| lease.direct && !lease.local)
                .count(),
        });
        let path = path_status(state.as_ref(), fib.as_ref(), &mut problems);
        if control_pid.is_none() {
            problems.push(
                "the control plane does not run: changes of leases and next hops are not followed"
                    .to_owned(),
            );
        } else if let Some(state) = &state {
            problems.extend(state.problems.iter().cloned());
        }
        if data_pid.is_none() {
            problems.push(
                "the data plane does not run: the kernel's path carries the traffic".to_owned(),
            );
        }
        for worker in workers.iter().filter(|worker| !worker.fresh) {
            problems.push(format!(
                "worker {} queue {} (cpu {}) has given no sign of life for {} ms: it is stopped, or its cpu is taken",
                worker.nic, worker.queue, worker.cpu, worker.heartbeat_ms
            ));
        }
        Ok(Self {
            ok: problems.is_empty(),
            control_plane: ControlPlaneStatus {
                alive: control_pid.is_some(),
                pid: control_pid,
                state,
            },
            data_plane: DataPlaneStatus {
                alive: data_pid.is_some(),
                pid: data_pid,
                uptime_s,
                workers,
                nics,
            },
            fib,
            path,
            problems,
        })
    }
}

fn before_again(before: &Sample) -> Sample {
    Sample {
        workers: before.workers.clone(),
        nics: before.nics.clone(),
        started_ns: before.started_ns,
        now_ns: map::monotonic_ns(),
    }
}

fn worker_status(
    worker: &WorkerStats,
    before: Option<&WorkerStats>,
    interval: Duration,
    now_ns: u64,
) -> WorkerStatus {
    let age = Duration::from_nanos(now_ns.saturating_sub(worker.heartbeat_ns));
    let identity = &worker.identity;
    WorkerStatus {
        nic: identity.nic.clone(),
        queue: identity.queue,
        cpu: identity.cpu,
        mode: identity.mode.name(),
        polling: identity.polling.name(),
        host_door: identity.door.name(),
        transmit: identity.transmit[0].name(),
        door_transmit: match identity.door {
            Door::Tun => None,
            Door::Veth => Some(identity.transmit[1].name()),
        },
        huge_pages: identity.huge_pages,
        numa_node: identity.numa_node,
        heartbeat_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        fresh: age < HEARTBEAT_MAX,
        generation: worker.generation,
        encapsulated: flow(
            worker,
            before,
            Counter::NicTxPackets,
            Counter::NicTxBytes,
            interval,
        ),
        decapsulated: flow(
            worker,
            before,
            Counter::HostTxPackets,
            Counter::HostTxBytes,
            interval,
        ),
        drops: worker.counters.drops_total(),
        kernel: named(
            KernelCounter::ALL
                .iter()
                .map(|&counter| (counter.name(), worker.kernel[counter as usize])),
        ),
    }
}

fn nic_status(nic: &NicStats) -> NicStatus {
    NicStatus {
        nic: nic.nic.clone(),
        queues: nic.queues,
        attached: if nic.native { "native" } else { "generic" },
        xdp: named(
            XdpCounter::ALL
                .iter()
                .map(|&counter| (counter.name(), nic.counters[counter as usize])),
        ),
    }
}

fn path_status(
    state: Option<&State>,
    fib: Option<&FibStatus>,
    problems: &mut Vec<String>,
) -> Option<PathStatus> {
    let table = state.map_or(detour::TABLE, |state| state.table);
    let vxlan = || match fib {
        Some(fib) if fib.vni == 0 => Vec::new(),
        Some(fib) => vec![standby::vxlan_names(fib.vni)[0].clone()],
        None => Vec::new(),
    };
    let devices = state.map_or_else(vxlan, |state| state.standby_devices.clone());
    let kernel = match read_kernel(table, &devices) {
        Ok(kernel) => kernel,
        Err(error) => {
            problems.push(format!("the kernel cannot be asked: {error}"));
            return None;
        }
    };
    let peer_filter = rules::counts().ok().map(|counts| counts.is_some());
    for device in &kernel.missing_devices {
        problems.push(format!("the standby device {device} is missing"));
    }
    let is_filtered = state.is_none_or(|state| !state.filtered.is_empty());
    if peer_filter == Some(false) && is_filtered {
        problems.push(
            "the peer filter is missing: the kernel's path decapsulates packets from anyone"
                .to_owned(),
        );
    }
    let guard = rules::guard_count().ok().map(|count| GuardStatus {
        on: count.is_some(),
        dropped: count.map_or(0, |count| count.packets),
    });
    let is_guarded = state.is_some_and(|state| state.guard);
    if is_guarded && guard.is_some_and(|guard| !guard.on) {
        problems.push("the guard is missing: pods can send in the name of nodes".to_owned());
    }
    let routed = kernel.detour_subnets.len();
    let in_use = match (
        kernel.rule && kernel.rip0,
        routed,
        fib.map_or(0, |fib| fib.peers),
    ) {
        (false, ..) | (true, 0, _) => "standby",
        (true, routed, peers) if routed >= peers => "workers",
        (true, ..) => "mixed",
    };
    Some(PathStatus {
        in_use,
        rip0: kernel.rip0,
        rule: kernel.rule,
        detour_routes: routed,
        standby_device: kernel.missing_devices.is_empty(),
        peer_filter,
        guard,
    })
}

fn yes(condition: bool, yes: &str, no: &str) -> String {
    if condition {
        yes.to_owned()
    } else {
        no.to_owned()
    }
}

fn standby_devices(state: Option<&State>) -> String {
    match state.map(|state| &state.standby_devices[..]) {
        Some([]) => "plain routes".to_owned(),
        Some(devices) => devices.join(", "),
        None => "standby device".to_owned(),
    }
}

fn rules_described(rules: &RulesState) -> String {
    let mut text = format!(
        "masquerade {}, forward {}, in {}",
        yes(rules.masquerade, "on", "off"),
        yes(rules.forward, "on", "off"),
        rules.mode.name()
    );
    if rules.masquerade && !rules.no_masquerade.is_empty() {
        let exempt = rules.no_masquerade.iter().map(ToString::to_string);
        let _ = write!(text, ", not to {}", exempt.collect::<Vec<_>>().join(", "));
    }
    text
}

impl FibStatus {
    /// Backend, its numbers and the pods' MTUs.
    fn described(&self) -> String {
        let mut text = self.backend.to_owned();
        if self.vni != 0 {
            let _ = write!(text, ", VNI {}", self.vni);
        }
        if self.port != 0 {
            let _ = write!(text, ", port {}", self.port);
        }
        if self.direct > 0 {
            let _ = write!(text, ", {} direct", self.direct);
        }
        match (self.pod_mtu, self.pod_mtu6) {
            (Some(v4), Some(v6)) => {
                let _ = write!(text, ", pod MTU {v4} and {v6} in IPv6");
            }
            (Some(mtu), None) | (None, Some(mtu)) => {
                let _ = write!(text, ", pod MTU {mtu}");
            }
            (None, None) => {}
        }
        text
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let process = |alive: bool, pid: Option<u32>| match (alive, pid) {
            (true, Some(pid)) if pid != 0 => format!("running (pid {pid})"),
            (true, _) => "running".to_owned(),
            (false, _) => "not running".to_owned(),
        };
        let control = &self.control_plane;
        write!(f, "control plane  {}", process(control.alive, control.pid))?;
        if let (true, Some(state)) = (control.alive, &control.state) {
            write!(
                f,
                ", node {}, leases from {}",
                state.node, state.lease_source
            )?;
        }
        let data = &self.data_plane;
        write!(f, "\ndata plane     {}", process(data.alive, data.pid))?;
        if let Some(uptime_s) = data.uptime_s {
            write!(f, ", {} workers, up {uptime_s} s", data.workers.len())?;
        }
        match &self.fib {
            Some(fib) => write!(
                f,
                "\nfib            generation {}, {} leases, {} of {} peers resolved, {} KiB, {}",
                fib.generation,
                fib.leases,
                fib.resolved,
                fib.peers,
                fib.bytes / 1024,
                fib.described()
            )?,
            None => write!(f, "\nfib            nothing published yet")?,
        }
        if let Some(state) = &control.state {
            let underlay = state.underlay.as_deref().unwrap_or("none");
            let addresses: Vec<_> = state.public_ips.iter().map(ToString::to_string).collect();
            let addresses = match &addresses[..] {
                [] => "no address".to_owned(),
                some => some.join(", "),
            };
            write!(f, "\nunderlay       {underlay}, {addresses}")?;
            if state.uplinks.iter().any(|uplink| uplink != underlay) {
                write!(f, ", uplinks {}", state.uplinks.join(", "))?;
            }
            if let Some(rules) = &state.rules {
                write!(f, "\nrules          {}", rules_described(rules))?;
            }
        }
        match &self.path {
            Some(path) => write!(
                f,
                "\npath           {} (rip0 {}, rule {}, {} routes; {} {}; peer filter {}; guard {})",
                path.in_use,
                yes(path.rip0, "present", "absent"),
                yes(path.rule, "present", "absent"),
                path.detour_routes,
                standby_devices(control.state.as_ref()),
                yes(path.standby_device, "present", "absent"),
                path.peer_filter.map_or_else(
                    || "unknown".to_owned(),
                    |there| yes(there, "present", "absent")
                ),
                path.guard.map_or_else(
                    || "unknown".to_owned(),
                    |guard| match guard {
                        GuardStatus { on: false, .. } => "off".to_owned(),
                        GuardStatus { dropped: 0, .. } => "on".to_owned(),
                        GuardStatus { dropped, .. } => {
                            format!("on, {} dropped", grouped(dropped))
                        }
                    }
                ),
            )?,
            None => write!(f, "\npath           unknown")?,
        }
        writeln!(f)?;
        if !data.workers.is_empty() {
            let columns = [
                ("NIC", Align::Left),
                ("QUEUE", Align::Right),
                ("CPU", Align::Right),
                ("MODE", Align::Left),
                ("POLLING", Align::Left),
                ("DOOR", Align::Left),
                ("HEARTBEAT", Align::Right),
                ("GENERATION", Align::Right),
                ("ENCAP PKTS", Align::Right),
                ("PKT/S", Align::Right),
                ("BIT/S", Align::Right),
                ("DECAP PKTS", Align::Right),
                ("PKT/S", Align::Right),
                ("BIT/S", Align::Right),
                ("DROPS", Align::Right),
            ];
            let rows: Vec<_> = data.workers.iter().map(worker_row).collect();
            write!(f, "\n{}", render(&columns, &rows))?;
        }
        if !data.nics.is_empty() {
            let count = |nic: &NicStatus, counter: XdpCounter| {
                grouped(
                    nic.xdp
                        .get(counter.name())
                        .and_then(serde_json::Value::as_u64)
                        .unwrap_or(0),
                )
            };
            let punted = |nic: &NicStatus| {
                let punts = XdpCounter::ALL.iter().filter(|&&counter| is_punt(counter));
                punts
                    .filter_map(|counter| nic.xdp.get(counter.name())?.as_u64())
                    .fold(0, u64::saturating_add)
            };
            let columns = [
                ("NIC", Align::Left),
                ("QUEUES", Align::Right),
                ("XDP", Align::Left),
                ("REDIRECTED", Align::Right),
                ("PUNTED", Align::Right),
                ("OTHER", Align::Right),
            ];
            let row = |nic: &NicStatus| {
                vec![
                    nic.nic.clone(),
                    nic.queues.to_string(),
                    nic.attached.to_owned(),
                    count(nic, XdpCounter::Redirected),
                    grouped(punted(nic)),
                    count(nic, XdpCounter::PassedOther),
                ]
            };
            let rows: Vec<_> = data.nics.iter().map(row).collect();
            write!(f, "\n{}", render(&columns, &rows))?;
        }
        if let Some(state) = control
            .state
            .as_ref()
            .filter(|state| control.alive && !state.unresolved.is_empty())
        {
            writeln!(f, "\nnot reachable by workers (the kernel's path is used):")?;
            for peer in &state.unresolved {
                writeln!(f, "  {peer}")?;
            }
        }
        if !self.problems.is_empty() {
            writeln!(f, "\nproblems:")?;
            for problem in &self.problems {
                writeln!(f, "  {problem}")?;
            }
        }
        Ok(())
    }
}

fn worker_row(worker: &WorkerStatus) -> Vec<String> {
    let flow = |flow: &Flow| {
        [
            grouped(flow.packets),
            scaled(flow.packets_per_s),
            scaled(flow.bits_per_s),
        ]
    };
    let mut row = vec![
        worker.nic.clone(),
        worker.queue.to_string(),
        worker.cpu.to_string(),
        worker.mode.to_owned(),
        worker.polling.to_owned(),
        worker.host_door.to_owned(),
        format!("{} ms", worker.heartbeat_ms),
        worker.generation.to_string(),
    ];
    row.extend(flow(&worker.encapsulated));
    row.extend(flow(&worker.decapsulated));
    row.push(grouped(worker.drops));
    row
}

/// A tunnel packet that was left to the kernel.
fn is_punt(counter: XdpCounter) -> bool {
    !matches!(counter, XdpCounter::Redirected | XdpCounter::PassedOther)
}

/// One line of `ripstop leases`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseRow {
    /// The node.
    pub node: String,
    /// Its subnet.
    pub subnet: String,
    /// Its address.
    pub public_ip: String,
    /// Its VTEP MAC; none without VXLAN.
    pub vtep_mac: Option<String>,
    /// `tunnel` or `direct`; none for our own and without a data path.
    pub via: Option<&'static str>,
    /// Number of next hops towards it.
    pub paths: u8,
    /// The Ethernet address of the next hop towards it.
    pub next_hop_mac: Option<String>,
    /// `own`, `resolved` or `unresolved`.
    pub state: &'static str,
    /// `local`, `worker` or `standby`; none where the kernel cannot be asked.
    pub path: Option<&'static str>,
}

/// `ripstop leases`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Leases {
    /// Generation of the table that they come from.
    pub generation: u64,
    /// The leases, by subnet.
    pub leases: Vec<LeaseRow>,
}

impl Leases {
    /// Reads the leases from the forwarding table.
    pub fn read(run_dir: &Path) -> Result<Self, ReportError> {
        let Some(table) = read_table(run_dir)? else {
            return Err(ReportError::NothingHere(
                run_dir.join(FIB_FILE).display().to_string(),
            ));
        };
        let state = State::read(run_dir).ok();
        let number = state.map_or(detour::TABLE, |state| state.table);
        let kernel = read_kernel(number, &[]).ok();
        let backend = table.node.backend;
        let row = |lease: &LeaseRecord| {
            let subnet = publish::subnet(lease);
            let public_ip = publish::address(lease, lease.public_ip);
            let path = kernel.as_ref().map(|kernel| match lease.local {
                true => "local",
                false
                    if kernel.rip0
                        && subnet.is_some_and(|subnet| kernel.detour_subnets.contains(&subnet)) =>
                {
                    "worker"
                }
                false => "standby",
            });
            LeaseRow {
                node: lease.node_name().to_owned(),
                subnet: subnet.map(|subnet| subnet.to_string()).unwrap_or_default(),
                public_ip: public_ip.map(|ip| ip.to_string()).unwrap_or_default(),
                vtep_mac: Some(Mac(lease.vtep_mac))
                    .filter(|mac| !mac.is_zero())
                    .map(|mac| mac.to_string()),
                via: match (backend, lease.local, lease.direct) {
                    (Backend::Alloc, ..) | (_, true, _) => None,
                    (_, false, true) => Some("direct"),
                    (_, false, false) => Some("tunnel"),
                },
                paths: lease.paths,
                next_hop_mac: (lease.resolved && !lease.local)
                    .then(|| Mac(lease.next_hop_mac).to_string()),
                state: match (lease.local, lease.resolved) {
                    (true, _) => "own",
                    (false, true) => "resolved",
                    (false, false) => "unresolved",
                },
                path,
            }
        };
        let mut records = table.leases;
        records.sort_unstable_by_key(|lease| (lease.family, lease.subnet, lease.prefix_len));
        Ok(Self {
            generation: table.generation,
            leases: records.iter().map(row).collect(),
        })
    }
}

impl core::fmt::Display for Leases {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let columns = [
            ("NODE", Align::Left),
            ("SUBNET", Align::Left),
            ("PUBLIC IP", Align::Left),
            ("VTEP MAC", Align::Left),
            ("VIA", Align::Left),
            ("NEXT HOP", Align::Left),
            ("STATE", Align::Left),
            ("PATH", Align::Left),
        ];
        let row = |lease: &LeaseRow| {
            vec![
                lease.node.clone(),
                lease.subnet.clone(),
                lease.public_ip.clone(),
                lease.vtep_mac.clone().unwrap_or_else(|| "-".to_owned()),
                lease.via.unwrap_or("-").to_owned(),
                match (&lease.next_hop_mac, lease.paths) {
                    (None, _) => "-".to_owned(),
                    (Some(mac), 0 | 1) => mac.clone(),
                    (Some(mac), paths) => format!("{mac} and {} more", paths - 1),
                },
                lease.state.to_owned(),
                lease.path.unwrap_or("unknown").to_owned(),
            ]
        };
        let rows: Vec<_> = self.leases.iter().map(row).collect();
        f.write_str(&render(&columns, &rows))
    }
}

/// One line of `ripstop drops`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DropRow {
    /// Who counted: `worker`, `xdp` (left to the kernel), `socket` (the kernel's statistics of the workers' sockets)
    /// `filter` (the standby's peer filter) or `guard` (what keeps pods from sending as nodes).
    #[serde(rename = "where")]
    pub place: &'static str,
    /// The counter's name.
    pub reason: &'static str,
    /// Its value.
    pub packets: u64,
    /// What it means.
    pub explanation: String,
}

/// `ripstop drops`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drops {
    /// The counters, those that are zero only if asked for.
    pub drops: Vec<DropRow>,
    /// Places that could not be read, and why.
    pub unknown: Vec<String>,
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Drops {
    /// Reads all counters; with `all`, also those that are zero.
    pub fn read(run_dir: &Path, all: bool) -> Result<Self, ReportError> {
        if !run_dir.exists() {
            return Err(ReportError::NothingHere(run_dir.display().to_string()));
        }
        let mut drops = Vec::new();
        let mut unknown = Vec::new();
        let mut add = |place, reason, packets, explanation: &str| {
            if all || packets > 0 {
                drops.push(DropRow {
                    place,
                    reason,
                    packets,
                    explanation: one_line(explanation),
                });
            }
        };
        match read_stats(run_dir)? {
            Some(sample) => {
                let sum =
                    |values: &mut dyn Iterator<Item = u64>| values.fold(0, u64::saturating_add);
                for &reason in DropReason::ALL {
                    let mut counts = sample
                        .workers
                        .iter()
                        .map(|worker| worker.counters.drops[reason.index()]);
                    add(
                        "worker",
                        reason.name(),
                        sum(&mut counts),
                        reason.explanation(),
                    );
                }
                for &counter in XdpCounter::ALL.iter().filter(|&&counter| is_punt(counter)) {
                    let mut counts = sample.nics.iter().map(|nic| nic.counters[counter as usize]);
                    add(
                        "xdp",
                        counter.name(),
                        sum(&mut counts),
                        counter.explanation(),
                    );
                }
                // The others of the kernel's statistics count empty rings, not packets.
                for counter in [
                    KernelCounter::RxDropped,
                    KernelCounter::RxRingFull,
                    KernelCounter::RxInvalidDescriptors,
                    KernelCounter::TxInvalidDescriptors,
                ] {
                    let mut counts = sample
                        .workers
                        .iter()
                        .map(|worker| worker.kernel[counter as usize]);
                    add(
                        "socket",
                        counter.name(),
                        sum(&mut counts),
                        counter.explanation(),
                    );
                }
            }
            None => unknown.push("workers: no data plane has run here".to_owned()),
        }
        match rules::counts() {
            Ok(Some(counts)) => {
                for counter in rules::COUNTERS {
                    let count = counts.iter().find(|count| count.name == counter.name);
                    add(
                        "filter",
                        counter.name,
                        count.map_or(0, |count| count.packets),
                        counter.explanation,
                    );
                }
            }
            Ok(None) => unknown.push("filter: the peer filter is not present".to_owned()),
            Err(error) => unknown.push(format!("filter: {error}")),
        }
        // Where nft is missing, the filter has said so.
        let State { guard: wanted, .. } = State::read(run_dir).unwrap_or_default();
        match rules::guard_count() {
            Ok(Some(count)) => add(
                "guard",
                guard::COUNTER.name,
                count.packets,
                guard::COUNTER.explanation,
            ),
            Ok(None) if wanted => unknown.push("guard: it is not present".to_owned()),
            Ok(None) | Err(_) => {}
        }
        Ok(Self { drops, unknown })
    }
}

impl core::fmt::Display for Drops {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let columns = [
            ("WHERE", Align::Left),
            ("REASON", Align::Left),
            ("PACKETS", Align::Right),
            ("MEANING", Align::Left),
        ];
        let row = |drop: &DropRow| {
            vec![
                drop.place.to_owned(),
                drop.reason.to_owned(),
                grouped(drop.packets),
                drop.explanation.clone(),
            ]
        };
        let rows: Vec<_> = self.drops.iter().map(row).collect();
        if rows.is_empty() {
            f.write_str("nothing was dropped\n")?;
        } else {
            f.write_str(&render(&columns, &rows))?;
        }
        let mut notes = String::new();
        for unknown in &self.unknown {
            let _ = writeln!(notes, "unknown: {unknown}");
        }
        f.write_str(&notes)
    }
}
