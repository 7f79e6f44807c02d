//! The main loop: what should be, what is, and the difference.
//!
//! ```text
//!   lease set ─┐             ┌─ 1 underlay   which interface, which address
//!   netlink ───┼─► round ───►├─ 2 next hops  which frames reach each peer
//!   stats ─────┤             ├─ 3 withdraw   routes through rip0 that workers can no longer serve
//!   timers ────┘             ├─ 4 publish    the forwarding table, if a bit of it changed
//!                            ├─ 5 standby    the kernel's own path
//!                            ├─ 6 filter     who may tunnel into it
//!                            └─ 7 detour     routes through rip0 that every worker can serve
//! ```
//!
//! The order of 3, 4 and 7 matters: a peer leaves the detour before the workers are told to forget it, and enters
//! it only after all of them have been seen to know it. Turned around, its packets would die in a worker while the
//! standby could have carried them.
//!
//! Every part fails on its own: it is reported once, tried again later, and the others go on.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Receiver;
use hashbrown::{HashMap, HashSet};
use ipnet::Ipv4Net;
use ripstop_fib::BuildError;
use ripstop_fib::map::MapError;

use crate::compile::compile;
use crate::detour;
use crate::interface::{self, InterfaceError, Selection, Underlay, View};
use crate::lease::{LeaseEvent, LeaseSet};
use crate::mac::Mac;
use crate::netconf::NetConf;
use crate::netlink::message::{Link, RouteFilter};
use crate::netlink::monitor::{Dirty, Interests, Monitor};
use crate::netlink::{Netlink, NetlinkError};
use crate::nexthop::{NextHop, NextHops};
use crate::problems::Problems;
use crate::publish::{DataPlane, Fib, FibError, Published};
use crate::rules::{Filter, FilterKeeper};
use crate::standby::{self, StandbyError, TABLE_MAIN};
use crate::state::State;
use crate::sys::{Signals, Wake, wait_readable};

/// How often heartbeats are looked at: a data plane that stands still is noticed within this and the age allowed.
const TICK: Duration = Duration::from_millis(100);
/// The same while workers are about to take up a new table.
const TICK_AWAITING: Duration = Duration::from_millis(2);
/// Workers that need longer than this to take up a table are waited for at the ordinary pace.
const AWAITING_MAX: Duration = Duration::from_secs(1);
/// Changes come in bursts; a burst is answered once.
const COALESCE: Duration = Duration::from_millis(2);
/// Neighbours that are being resolved are looked at this often.
const RECHECK_UNRESOLVED: Duration = Duration::from_millis(500);
/// Everything is looked at this often, in case an announcement was lost.
const RECHECK_ALL: Duration = Duration::from_secs(5);
/// The first wait after a failure, doubled with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(8);
/// Time for the standby in one round; the rest follows in the next ones.
const STANDBY_BUDGET: Duration = Duration::from_millis(50);
/// Generations whose content is remembered: workers are at most a few behind.
const HISTORY: usize = 16;
/// Unresolved peers named in the state file.
const UNRESOLVED_SHOWN: usize = 20;

/// Why a part of a round failed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    #[error(transparent)]
    Standby(#[from] StandbyError),
    #[error(transparent)]
    Fib(#[from] FibError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("compile forwarding table: {0}")]
    Compile(BuildError),
    #[error("{count} entries refused by the kernel, first: {first}")]
    Refused { count: usize, first: String },
}

fn refusals(refused: Vec<String>) -> Result<(), StepError> {
    let count = refused.len();
    refused
        .into_iter()
        .next()
        .map_or(Ok(()), |first| Err(StepError::Refused { count, first }))
}

/// Why the loop could not begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No connection to the kernel.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The forwarding table cannot be published.
    #[error(transparent)]
    Fib(#[from] FibError),
    /// A thread or descriptor cannot be had.
    #[error("start: {0}")]
    Io(#[from] std::io::Error),
}

/// One part of a round: whether it is due, and how long to leave it alone after failures.
#[derive(Debug)]
struct Step {
    name: &'static str,
    due: bool,
    failures: u32,
    not_before: Instant,
}

impl Step {
    fn new(name: &'static str, now: Instant) -> Self {
        Self {
            name,
            due: true,
            failures: 0,
            not_before: now,
        }
    }

    /// News: the reason of the failure may be gone.
    fn wake(&mut self) {
        self.due = true;
    }

    fn is_ready(&self, now: Instant) -> bool {
        self.due && now >= self.not_before
    }

    fn finish(&mut self, result: Result<(), StepError>, problems: &mut Problems, now: Instant) {
        match result {
            Ok(()) => {
                self.due = false;
                self.failures = 0;
                self.not_before = now;
                problems.clear(self.name);
            }
            Err(error) => {
                let delay = BACKOFF_FIRST
                    .saturating_mul(1 << self.failures.min(8))
                    .min(BACKOFF_MAX);
                self.failures += 1;
                self.not_before = now + delay;
                problems.raise(self.name, format!("{}: {error}", self.name));
            }
        }
    }
}

#[derive(Debug)]
struct Steps {
    underlay: Step,
    next_hops: Step,
    publish: Step,
    standby: Step,
    detour: Step,
}

/// What the operator configured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node's name.
    pub node: String,
    /// `net-conf.json`.
    pub conf: NetConf,
    /// `--iface` and `--public-ip`; the lease's address is filled in here.
    pub selection: Selection,
    /// Where the regions are.
    pub run_dir: PathBuf,
    /// Number of our routing table.
    pub table: u32,
    /// What the lease source calls itself.
    pub lease_source: String,
}

/// The state of the loop.
#[derive(Debug)]
pub struct Reconciler {
    settings: Settings,
    netlink: Netlink,
    monitor: Monitor,
    fib: Fib,
    filter: FilterKeeper,
    problems: Problems,
    steps: Steps,
    /// In force.
    leases: Option<Arc<LeaseSet>>,
    /// To be put into force once it fits an interface.
    pending: Option<Arc<LeaseSet>>,
    leases_seen: Option<Instant>,
    links: Vec<Link>,
    underlay: Option<Underlay>,
    standby_link: u32,
    /// The standby's budget was used up: when its work began, and what it has done.
    standby_unfinished: bool,
    standby_since: Option<Instant>,
    standby_changes: usize,
    hops: NextHops,
    /// Next hops as published, to see whether they changed.
    published_macs: HashMap<Ipv4Addr, Option<Mac>>,
    /// Resolved subnets of the last generations.
    history: VecDeque<(u64, HashSet<Ipv4Net>)>,
    published_at: Instant,
    data_plane: DataPlane,
    detour_desired: Option<detour::Desired>,
    last_recheck: Instant,
    last_unresolved_recheck: Instant,
    state: State,
}

impl Reconciler {
    /// Opens everything that the loop needs, in the network namespace of the caller.
    pub fn new(settings: Settings) -> Result<Self, StartError> {
        let fib = Fib::open(&settings.run_dir)?;
        // Subscribed before the first look: what changes in between is announced.
        let monitor = Monitor::open()?;
        let netlink = Netlink::open()?;
        let filter = FilterKeeper::start()?;
        let now = Instant::now();
        let generation = fib.generation()?;
        let resolved: HashSet<Ipv4Net> = fib
            .resolved_subnets()?
            .into_iter()
            .filter_map(|(subnet, length)| {
                let address = Ipv4Addr::from(u32::try_from(subnet).ok()?);
                Ipv4Net::new(address, length).ok()
            })
            .collect();
        if generation > 0 {
            tracing::info!(
                generation,
                resolved = resolved.len(),
                "forwarding table adopted"
            );
        }
        let steps = Steps {
            underlay: Step::new("underlay", now),
            next_hops: Step::new("next hops", now),
            publish: Step::new("publish", now),
            standby: Step::new("standby", now),
            detour: Step::new("detour", now),
        };
        Ok(Self {
            settings,
            netlink,
            monitor,
            fib,
            filter,
            problems: Problems::default(),
            steps,
            leases: None,
            pending: None,
            leases_seen: None,
            links: Vec::new(),
            underlay: None,
            standby_link: 0,
            standby_unfinished: false,
            standby_since: None,
            standby_changes: 0,
            hops: NextHops::default(),
            published_macs: HashMap::new(),
            history: VecDeque::from([(generation, resolved)]),
            published_at: now,
            data_plane: DataPlane::default(),
            detour_desired: None,
            last_recheck: now,
            last_unresolved_recheck: now,
            state: State::default(),
        })
    }

    /// Runs until a signal arrives. Everything stays in place then.
    pub fn run(&mut self, leases: &Receiver<LeaseEvent>, wake: &Wake, signals: &Signals) {
        while !signals.arrived() {
            self.round(Instant::now());
            let fds = [wake.as_fd(), signals.as_fd(), self.monitor.as_fd()];
            let [_, _, announced] = wait_readable(fds, self.tick());
            wake.clear();
            if announced {
                std::thread::sleep(COALESCE);
            }
            for event in leases.try_iter() {
                self.take_leases(event);
            }
            self.take_announcements();
        }
    }

    fn tick(&self) -> Duration {
        let awaiting = self.data_plane.is_forwarding()
            && self.data_plane.generation < self.current_generation()
            && self.published_at.elapsed() < AWAITING_MAX;
        let unfinished = self.standby_unfinished && self.steps.standby.is_ready(Instant::now());
        match (unfinished, awaiting) {
            (true, _) => Duration::ZERO,
            (false, true) => TICK_AWAITING,
            (false, false) => TICK,
        }
    }

    fn current_generation(&self) -> u64 {
        self.history.back().map_or(0, |(generation, _)| *generation)
    }

    fn take_leases(&mut self, event: LeaseEvent) {
        match event {
            LeaseEvent::Set { leases, seen } => {
                tracing::info!(
                    leases = leases.peers.len() + 1,
                    took_us = seen.elapsed().as_micros(),
                    "leases loaded"
                );
                self.problems.clear("leases");
                self.pending = Some(leases);
                self.leases_seen = Some(seen);
                for step in self.all_steps() {
                    step.wake();
                    // A new set may be the cure, so failures of the one before do not count.
                    step.not_before = seen;
                }
            }
            LeaseEvent::Failed(reason) => {
                let consequence = match (&self.leases, &self.pending) {
                    (None, None) => "; waiting for it",
                    _ => "; the leases before stay in force",
                };
                self.problems
                    .raise("leases", format!("{reason}{consequence}"));
            }
            LeaseEvent::Recovered => self.problems.clear("leases"),
        }
    }

    fn all_steps(&mut self) -> [&mut Step; 5] {
        let Steps {
            underlay,
            next_hops,
            publish,
            standby,
            detour,
        } = &mut self.steps;
        [underlay, next_hops, publish, standby, detour]
    }

    fn take_announcements(&mut self) {
        let interests = Interests {
            vxlan_link: self.standby_link,
            underlay_link: self.underlay.as_ref().map_or(0, |underlay| underlay.index),
            table: self.settings.table,
        };
        match self.monitor.drain(interests) {
            Ok(dirty) => self.mark(dirty),
            Err(error) => {
                self.problems
                    .raise("monitor", format!("watch the kernel: {error}"));
                if let Ok(monitor) = Monitor::open() {
                    self.monitor = monitor;
                    self.problems.clear("monitor");
                }
                self.mark(Dirty::ALL);
            }
        }
    }

    fn mark(&mut self, dirty: Dirty) {
        let steps = &mut self.steps;
        if dirty.links {
            steps.underlay.wake();
        }
        if dirty.routes {
            self.hops.forget_routes();
        }
        if dirty.routes || dirty.neighbours {
            steps.next_hops.wake();
        }
        if dirty.standby {
            steps.standby.wake();
        }
        if dirty.detour {
            steps.detour.wake();
        }
    }

    /// One look at everything that is due.
    fn round(&mut self, now: Instant) {
        let worked = self.all_steps().iter().any(|step| step.is_ready(now));
        self.look(now);
        let problems = self.problems();
        if worked || problems != self.state.problems {
            self.write_state(problems);
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = self.problems.list();
        problems.extend(self.filter.problem());
        problems
    }

    fn look(&mut self, now: Instant) {
        if now.duration_since(self.last_recheck) >= RECHECK_ALL {
            self.last_recheck = now;
            self.mark(Dirty::ALL);
        }
        if now.duration_since(self.last_unresolved_recheck) >= RECHECK_UNRESOLVED {
            self.last_unresolved_recheck = now;
            if self.published_macs.values().any(Option::is_none) {
                self.steps.next_hops.wake();
            }
        }
        if self.steps.underlay.is_ready(now) {
            let result = self.find_underlay();
            self.steps
                .underlay
                .finish(result, &mut self.problems, Instant::now());
        }
        self.observe_data_plane(now);
        let (Some(leases), Some(underlay)) = (self.leases.clone(), self.underlay.clone()) else {
            return;
        };
        macro_rules! step {
            ($step:ident, $run:expr) => {
                if self.steps.$step.is_ready(now) {
                    let result = $run;
                    self.steps
                        .$step
                        .finish(result, &mut self.problems, Instant::now());
                }
            };
        }
        step!(next_hops, self.follow_next_hops(&leases, &underlay, now));
        if self.steps.publish.is_ready(now) && self.steps.detour.is_ready(now) {
            let result = self.keep_detour(&leases, &underlay, detour::Op::withdraws);
            // Success is not the end of it: what is to be added is added below.
            if result.is_err() {
                self.steps
                    .detour
                    .finish(result, &mut self.problems, Instant::now());
            }
        }
        step!(publish, self.publish(&leases, &underlay));
        step!(standby, self.keep_standby(&leases, &underlay));
        if self.standby_unfinished {
            self.steps.standby.wake();
        }
        self.observe_data_plane(now);
        step!(detour, self.keep_detour(&leases, &underlay, |_| true));
    }

    /// Chooses the interface, and with it puts a new lease set into force: one whose own lease fits no interface
    /// would tear down a path that works.
    fn find_underlay(&mut self) -> Result<(), StepError> {
        self.links = self.netlink.links()?;
        let Some(leases) = self.pending.as_ref().or(self.leases.as_ref()) else {
            return Ok(());
        };
        let addresses = self.netlink.addresses()?;
        let selection = Selection {
            lease_ip: Some(leases.own.public_ip),
            ..self.settings.selection.clone()
        };
        let view = View {
            links: &self.links,
            addresses: &addresses,
            routes: &[],
        };
        let chosen = match interface::select(&selection, view) {
            // The main table is large; it is read only when nothing else decides.
            Err(InterfaceError::NoDefault { .. }) => {
                let routes = self.netlink.routes(RouteFilter {
                    table: TABLE_MAIN,
                    link: 0,
                })?;
                interface::select(
                    &selection,
                    View {
                        routes: &routes,
                        ..view
                    },
                )
            }
            other => other,
        };
        // While an interface is down and without address the last choice stays: the standby device is bound to it.
        let chosen = chosen?;
        if self.underlay.as_ref() != Some(&chosen) {
            tracing::info!(
                interface = chosen.name,
                address = %chosen.address,
                mac = %chosen.mac,
                mtu = chosen.mtu,
                "underlay interface"
            );
            self.underlay = Some(chosen);
            self.hops.forget_routes();
            self.steps.next_hops.wake();
            self.steps.publish.wake();
            self.steps.standby.wake();
        }
        if let Some(pending) = self.pending.take() {
            self.filter.set(Filter::new(&pending, &self.settings.conf));
            self.leases = Some(pending);
            for step in self.all_steps() {
                step.wake();
            }
        }
        Ok(())
    }

    fn follow_next_hops(
        &mut self,
        leases: &LeaseSet,
        underlay: &Underlay,
        now: Instant,
    ) -> Result<(), StepError> {
        let peers = leases.peers.iter().map(|peer| peer.public_ip);
        let refused = self.hops.update(
            &mut self.netlink,
            underlay,
            leases.own.public_ip,
            peers,
            now,
        )?;
        match refused {
            None => self.problems.clear("neighbours"),
            Some(refusal) if refusal.errno == libc::ENOBUFS => self.problems.raise(
                "neighbours",
                format!(
                    "the kernel's neighbour table is full, {} next hops are needed: raise net.ipv4.neigh.default.gc_thresh3",
                    self.hops.neighbours_in_use()
                ),
            ),
            Some(refusal) => self.problems.raise("neighbours", format!("resolve next hops: {refusal}")),
        }
        let changed = leases.peers.iter().any(|peer| {
            self.published_macs.get(&peer.public_ip) != Some(&self.hops.mac(peer.public_ip))
        });
        if changed {
            self.steps.publish.wake();
            self.steps.detour.wake();
        }
        Ok(())
    }

    fn publish(&mut self, leases: &LeaseSet, underlay: &Underlay) -> Result<(), StepError> {
        let start = Instant::now();
        let image = compile(leases, &self.settings.conf, underlay, |peer| {
            self.hops.mac(peer)
        })
        .map_err(StepError::Compile)?;
        let compile_us = start.elapsed().as_micros();
        let start = Instant::now();
        let published = self.fib.publish(&image)?;
        let publish_us = start.elapsed().as_micros();
        self.published_macs = leases
            .peers
            .iter()
            .map(|peer| (peer.public_ip, self.hops.mac(peer.public_ip)))
            .collect();
        let resolved: HashSet<Ipv4Net> = leases
            .peers
            .iter()
            .filter(|peer| self.hops.mac(peer.public_ip).is_some())
            .map(|peer| peer.subnet)
            .collect();
        let since_change_us = self
            .leases_seen
            .take()
            .map(|seen| seen.elapsed().as_micros());
        if let Published::New(generation) = published {
            tracing::info!(
                generation,
                leases = leases.peers.len() + 1,
                resolved = resolved.len(),
                bytes = image.len() * 8,
                compile_us,
                publish_us,
                since_change_us,
                "published"
            );
            self.published_at = start;
        }
        self.history
            .retain(|(generation, _)| *generation != published.generation());
        self.history.push_back((published.generation(), resolved));
        while self.history.len() > HISTORY {
            self.history.pop_front();
        }
        self.steps.detour.wake();
        Ok(())
    }

    fn keep_standby(&mut self, leases: &LeaseSet, underlay: &Underlay) -> Result<(), StepError> {
        let desired = standby::Desired::new(leases, &self.settings.conf, underlay);
        let start = self.standby_since.take().unwrap_or_else(Instant::now);
        let (link, outcome) = standby::reconcile(&mut self.netlink, &desired, STANDBY_BUDGET)?;
        self.standby_link = link;
        standby::reconcile_sysctls(&desired.name);
        self.standby_changes += outcome.peers.changed;
        if outcome.changed() {
            // Routes through rip0 name the device's address as their source; it may have been away.
            self.steps.detour.wake();
        }
        if !outcome.device_changes.is_empty() {
            tracing::info!(device = desired.name, changes = ?outcome.device_changes, "standby device set");
        }
        self.standby_unfinished = outcome.peers.remaining > 0;
        if self.standby_unfinished {
            self.standby_since = Some(start);
        } else if self.standby_changes > 0 {
            let entries = core::mem::take(&mut self.standby_changes);
            tracing::info!(
                device = desired.name,
                entries,
                took_us = start.elapsed().as_micros(),
                "standby path set"
            );
        }
        refusals(outcome.peers.refused)
    }

    fn observe_data_plane(&mut self, now: Instant) {
        match DataPlane::observe(&self.settings.run_dir) {
            Ok(seen) => {
                self.problems.clear("data plane");
                let before = core::mem::replace(&mut self.data_plane, seen);
                if before.is_forwarding() != seen.is_forwarding() {
                    tracing::info!(
                        alive = seen.alive,
                        workers = seen.workers,
                        fresh = seen.fresh,
                        generation = seen.generation,
                        "data plane {}",
                        if seen.is_forwarding() {
                            "forwards"
                        } else {
                            "does not forward"
                        }
                    );
                }
                if before != seen {
                    self.steps.detour.wake();
                    self.steps.detour.not_before = now;
                }
            }
            Err(error) => {
                if self.data_plane != DataPlane::default() {
                    self.data_plane = DataPlane::default();
                    self.steps.detour.wake();
                }
                self.problems
                    .raise("data plane", format!("look at the data plane: {error}"));
            }
        }
    }

    /// Subnets that every worker can send to, whatever generation it is at.
    fn served(&self, leases: &LeaseSet) -> HashSet<Ipv4Net> {
        let oldest = self.data_plane.generation;
        if oldest == 0
            || !self
                .history
                .iter()
                .any(|(generation, _)| *generation == oldest)
        {
            return HashSet::new();
        }
        let in_use: Vec<_> = self
            .history
            .iter()
            .filter(|(generation, _)| *generation >= oldest)
            .collect();
        leases
            .peers
            .iter()
            .filter(|peer| self.hops.mac(peer.public_ip).is_some())
            .map(|peer| peer.subnet)
            .filter(|subnet| in_use.iter().all(|(_, resolved)| resolved.contains(subnet)))
            .collect()
    }

    /// Makes those changes to the detour that `which` selects.
    fn keep_detour(
        &mut self,
        leases: &LeaseSet,
        underlay: &Underlay,
        which: impl Fn(&detour::Op) -> bool,
    ) -> Result<(), StepError> {
        let device = self.links.iter().find(|link| link.name == detour::DEVICE);
        let mut refused = Vec::new();
        if let Some(device) = device {
            let mtu = standby::pod_mtu(&self.settings.conf, underlay);
            refused = detour::prepare_device(&mut self.netlink, device, mtu)?;
        }
        let subnets = self.served(leases);
        let desired = detour::Desired {
            link: device.map(|device| device.index),
            table: self.settings.table,
            source: leases.own.vtep_ip(),
            active: device.is_some() && self.data_plane.is_forwarding() && !subnets.is_empty(),
            subnets,
        };
        let planned = detour::plan(&mut self.netlink, &desired)?;
        let ops: Vec<_> = planned.iter().filter(|op| which(op)).cloned().collect();
        refused.extend(detour::apply(&mut self.netlink, &ops)?);
        let was_active = self
            .detour_desired
            .as_ref()
            .is_some_and(|before| before.active);
        if was_active != desired.active {
            tracing::info!(
                active = desired.active,
                subnets = desired.subnets.len(),
                since_publish_ms = self.published_at.elapsed().as_millis(),
                "detour through {}",
                detour::DEVICE
            );
        }
        self.detour_desired = Some(desired);
        refusals(refused)
    }

    fn write_state(&mut self, problems: Vec<String>) {
        let unresolved = self
            .leases
            .iter()
            .flat_map(|leases| &leases.peers)
            .filter_map(|peer| match self.hops.get(peer.public_ip) {
                NextHop::Resolved(_) => None,
                NextHop::Unresolved(reason) => {
                    Some(format!("{} ({}): {reason}", peer.node, peer.public_ip))
                }
            });
        let state = State {
            node: self.settings.node.clone(),
            lease_source: self.settings.lease_source.clone(),
            standby_device: standby::device_name(self.settings.conf.vxlan.vni),
            underlay: self.underlay.as_ref().map(|underlay| underlay.name.clone()),
            public_ip: self.leases.as_ref().map(|leases| leases.own.public_ip),
            pod_mtu: self
                .underlay
                .as_ref()
                .map(|underlay| standby::pod_mtu(&self.settings.conf, underlay)),
            table: self.settings.table,
            unresolved: unresolved.take(UNRESOLVED_SHOWN).collect(),
            problems,
        };
        if state == self.state {
            return;
        }
        if let Err(error) = state.write(&self.settings.run_dir) {
            self.problems.raise(
                "state",
                format!("write state for `ripstop status`: {error}"),
            );
            return;
        }
        self.state = state;
    }
}
