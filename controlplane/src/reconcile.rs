//! The main loop: what should be, what is, and the difference.
//!
//! ```text
//!   lease set ─┐             ┌─ 1 underlay   which interface, which address
//!   netlink ───┼─► round ───►├─ 2 next hops  which frames reach each peer, by which uplinks, in the tunnel or not
//!   stats ─────┤             ├─ 3 withdraw   routes through rip0 that workers can no longer serve
//!   timers ────┘             ├─ 4 publish    the forwarding table, if a bit of it changed
//!                            ├─ 5 standby    the kernel's own path
//!                            ├─ 6 filter     who may tunnel into it; the guard: no pod as a node; masquerade
//!                            └─ 7 detour     routes through rip0 that every worker can serve
//! ```
//!
//! The order of 3, 4 and 7 matters: a peer leaves the detour before the workers are told to forget it, and enters
//! it only after all of them have been seen to know it. Turned around, its packets would die in a worker while the
//! standby could have carried them.
//!
//! Every part fails on its own: it is reported once, tried again later, and the others go on.

use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Receiver;
use hashbrown::{HashMap, HashSet};
use ipnet::{IpNet, Ipv4Net};
use ripstop_fib::BuildError;
use ripstop_fib::map::MapError;

use crate::compile::compile;
use crate::conflist::{self, ConflistFlags};
use crate::detour;
use crate::family::{Family, PerFamily};
use crate::fou::{self, Fou, FouError};
use crate::guard::{self, Guard};
use crate::health::{Health, Round};
use crate::interface::{self, InterfaceError, Selection, Underlay};
use crate::lease::{Lease, LeaseEvent, LeaseSet};
use crate::netconf::{Backend, Direct, NetConf};
use crate::netlink::message::{self, Address, Link};
use crate::netlink::monitor::{Dirty, Interests, Monitor};
use crate::netlink::{Netlink, NetlinkError};
use crate::nexthop::{NextHops, Query, Ways};
use crate::problems::Problems;
use crate::publish::{DataPlane, Fib, FibError, Published};
use crate::rules::{Filter, FilterKeeper};
use crate::standby::{self, StandbyError};
use crate::state::{RulesState, State};
use crate::subnet_file;
use crate::sys::{Signals, Wake, wait_readable};
use crate::traffic::{self, Networks, blackhole};
use crate::uplink::{self, Uplink};

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

/// Protocol number of UDP.
const UDP: u8 = 17;

/// Uplinks as people read them.
fn described(uplinks: &[Uplink]) -> Vec<String> {
    let describe = |uplink: &Uplink| {
        let mut parts: Vec<String> = uplink.nics.iter().map(|nic| nic.1.clone()).collect();
        parts.extend(uplink.vlan.map(|id| format!("tag {id}")));
        match &parts[..] {
            [only] if *only == uplink.name => uplink.name.clone(),
            _ => format!("{} ({})", uplink.name, parts.join(", ")),
        }
    };
    uplinks.iter().map(describe).collect()
}

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
    #[error(transparent)]
    Fou(#[from] FouError),
    #[error("{0}; {1}")]
    Both(Box<StepError>, Box<StepError>),
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

/// Tells the service manager, if there is one, that this service is up.
fn announce_readiness() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager could not be told that the node is ready");
    }
}

/// Problems by part, of which one may have several.
fn by_part(problems: Vec<(&'static str, String)>) -> BTreeMap<&'static str, String> {
    let mut parts: BTreeMap<&'static str, String> = BTreeMap::new();
    for (part, problem) in problems {
        match parts.get_mut(part) {
            Some(before) => *before = format!("{before}; {problem}"),
            None => drop(parts.insert(part, problem)),
        }
    }
    parts
}

/// Collects what failed while the rest went on.
fn all_of(errors: Vec<StepError>) -> Result<(), StepError> {
    let both = |first, second| StepError::Both(Box::new(first), Box::new(second));
    errors.into_iter().reduce(both).map_or(Ok(()), Err)
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
    /// All was done but for entries that the kernel refuses.
    refused: bool,
    not_before: Instant,
}

impl Step {
    fn new(name: &'static str, now: Instant) -> Self {
        Self {
            name,
            due: true,
            failures: 0,
            refused: false,
            not_before: now,
        }
    }

    /// There is something to do.
    fn wake(&mut self) {
        self.due = true;
    }

    /// The same after news: the reason of a failure may be gone, so the wait after it is short again.
    fn news(&mut self) {
        self.wake();
        self.not_before = self.not_before.min(Instant::now() + BACKOFF_FIRST);
    }

    fn is_ready(&self, now: Instant) -> bool {
        self.due && now >= self.not_before
    }

    fn is_done(&self) -> bool {
        !self.due && self.failures == 0
    }

    fn finish(&mut self, result: Result<(), StepError>, told: Told<'_>, now: Instant) {
        let Told { problems, health } = told;
        self.refused = matches!(result, Err(StepError::Refused { .. }));
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
                health.failed(self.name);
                self.not_before = now + delay;
                let text = error.to_string();
                problems.raise(
                    self.name,
                    match text.starts_with(self.name) {
                        true => text,
                        false => format!("{}: {text}", self.name),
                    },
                );
            }
        }
    }
}

/// Who is told what came of a step.
struct Told<'a> {
    problems: &'a mut Problems,
    health: &'a Health,
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
    /// `--iface`, `--public-ip` and `--public-ipv6`; the leases' addresses are filled in here.
    pub selection: Selection,
    /// Where the regions are.
    pub run_dir: PathBuf,
    /// Number of our routing table.
    pub table: u32,
    /// Pods may not send in the name of nodes.
    pub guard: bool,
    /// Masquerade and forward rules.
    pub traffic: traffic::Settings,
    /// What the lease source calls itself.
    pub lease_source: String,
    /// Where pods find this node's subnet, if anywhere.
    pub subnet_file: Option<PathBuf>,
    /// `--install-cni-conf`.
    pub conflist: ConflistFlags,
    /// Set, for good, once pods' packets get to the peers in one way or another.
    pub ready: Arc<AtomicBool>,
    /// Where the loop tells how it is.
    pub health: Arc<Health>,
}

/// The state of the loop.
#[derive(Debug)]
pub struct Reconciler {
    settings: Settings,
    netlink: Netlink,
    monitor: Monitor,
    fib: Fib,
    filter: FilterKeeper,
    traffic: traffic::Keeper,
    problems: Problems,
    steps: Steps,
    conflist: conflist::Keeper,
    /// In force.
    leases: Option<Arc<LeaseSet>>,
    /// To be put into force once it fits an interface.
    pending: Option<Arc<LeaseSet>>,
    leases_seen: Option<Instant>,
    /// Underlay addresses of all nodes of `leases`.
    nodes: Arc<BTreeSet<IpAddr>>,
    links: Vec<Link>,
    underlay: Option<Underlay>,
    /// Tunnel devices of the standby, 0 where there is none.
    standby_links: PerFamily<u32>,
    /// What a control plane before us left, by its own account: to be removed where we want something else.
    former_devices: Vec<String>,
    former_fou: Option<u16>,
    /// There may be blackhole routes of ours that nobody wants.
    former_blackholes: bool,
    /// What came of loading the module for it, if that was tried.
    fou_module: Option<Result<(), String>>,
    /// The standby's budget was used up: when its work began, and what it has done.
    standby_unfinished: bool,
    standby_since: Option<Instant>,
    standby_changes: usize,
    /// Leases or ways have changed since the standby was last complete, so that it has to.
    standby_news: bool,
    hops: NextHops,
    /// The interfaces that workers send by.
    uplinks: Vec<Uplink>,
    /// NICs that had a worker when last there was one.
    worker_nics: Vec<String>,
    /// Next hops as published, to see whether they changed.
    published_ways: HashMap<IpAddr, Ways>,
    /// Resolved subnets of the last generations.
    history: VecDeque<(u64, HashSet<IpNet>)>,
    published_at: Instant,
    /// Workers have yet to be seen to use what was published.
    taking_up: bool,
    data_plane: DataPlane,
    detour_active: bool,
    detour_routes: usize,
    /// The subnet file says what it should.
    subnet_kept: bool,
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
        let traffic = traffic::Keeper::start(settings.traffic.mode, settings.traffic.resync)?;
        let now = Instant::now();
        let generation = fib.generation()?;
        let resolved: HashSet<IpNet> = fib.resolved_subnets()?.into_iter().collect();
        let former = State::read(&settings.run_dir).unwrap_or_default();
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
        let names = [
            &steps.underlay,
            &steps.next_hops,
            &steps.publish,
            &steps.standby,
            &steps.detour,
        ];
        settings.health.steps(names.map(|step| step.name));
        Ok(Self {
            conflist: conflist::Keeper::new(settings.conflist.clone()),
            settings,
            netlink,
            monitor,
            fib,
            filter,
            traffic,
            problems: Problems::default(),
            steps,
            leases: None,
            pending: None,
            leases_seen: None,
            nodes: Arc::default(),
            links: Vec::new(),
            underlay: None,
            standby_links: PerFamily::default(),
            former_devices: former.standby_devices,
            former_fou: former.fou_port,
            former_blackholes: true,
            fou_module: None,
            standby_unfinished: false,
            standby_since: None,
            standby_changes: 0,
            standby_news: true,
            hops: NextHops::default(),
            uplinks: Vec::new(),
            worker_nics: Vec::new(),
            published_ways: HashMap::new(),
            history: VecDeque::from([(generation, resolved)]),
            published_at: now,
            taking_up: false,
            data_plane: DataPlane::default(),
            detour_active: false,
            detour_routes: 0,
            subnet_kept: false,
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
                    leases = leases.count(),
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
        let tunnels = self.standby_links.iter().map(|(_, &link)| link);
        let underlay = self.underlay.as_ref().map(|underlay| underlay.index);
        let interests = Interests {
            tunnels: tunnels.filter(|&link| link != 0).collect(),
            uplinks: self.hops.links().iter().copied().chain(underlay).collect(),
            table: self.settings.table,
        };
        match self.monitor.drain(&interests) {
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
            steps.underlay.news();
        }
        if dirty.routes {
            self.hops.forget_routes();
        }
        if dirty.routes || dirty.neighbours {
            steps.next_hops.news();
        }
        if dirty.standby {
            steps.standby.news();
        }
        if dirty.detour {
            steps.detour.news();
        }
    }

    /// One look at everything that is due.
    fn round(&mut self, now: Instant) {
        let worked = self.all_steps().iter().any(|step| step.is_ready(now));
        self.look(now);
        let problems = self.problems();
        let known = self.state.problems.iter();
        if worked || known.ne(problems.iter().map(|(_, problem)| problem)) {
            self.write_state(&problems);
        }
        self.settings.health.tell(Round {
            unready: self.unready(),
            standby_complete: self.is_standby_programmed(),
            detour_active: self.detour_active,
            detour_routes: self.detour_routes,
            problems: by_part(problems),
        });
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.problems.with_parts();
        problems.extend(self.filter.problem().map(|problem| ("filter", problem)));
        let traffic = self.traffic.problems().into_iter();
        problems.extend(traffic.map(|problem| ("traffic", problem)));
        problems
    }

    /// The kernel's path has all that the kernel takes; what it refuses is named as a problem.
    fn is_standby_programmed(&self) -> bool {
        let step = &self.steps.standby;
        self.leases.is_some() && !self.standby_unfinished && (step.is_done() || step.refused)
    }

    /// What is missing before all known peers are programmed in the kernel and, while workers live, in their table.
    fn unready(&self) -> Option<String> {
        let missing = if self.leases.is_none() {
            "no leases yet"
        } else if self.underlay.is_none() {
            "no interface towards the other nodes"
        } else if !self.steps.publish.is_done() {
            "the forwarding table is not published"
        } else if !self.is_standby_programmed() {
            "the kernel's path to the other nodes is not complete"
        } else if self.data_plane.is_alive()
            && self.data_plane.generation < self.current_generation()
        {
            "the workers have not taken up the forwarding table"
        } else if self.settings.subnet_file.is_some() && !self.subnet_kept {
            "the subnet file is not written"
        } else {
            return None;
        };
        Some(missing.to_owned())
    }

    fn look(&mut self, now: Instant) {
        if now.duration_since(self.last_recheck) >= RECHECK_ALL {
            self.last_recheck = now;
            self.mark(Dirty::ALL);
        }
        if now.duration_since(self.last_unresolved_recheck) >= RECHECK_UNRESOLVED {
            self.last_unresolved_recheck = now;
            if self
                .published_ways
                .values()
                .any(|ways| ways.paths.is_empty())
            {
                self.steps.next_hops.wake();
            }
        }
        if self.steps.underlay.is_ready(now) {
            let result = self.find_underlay();
            let told = Told {
                problems: &mut self.problems,
                health: &self.settings.health,
            };
            self.steps.underlay.finish(result, told, Instant::now());
        }
        self.observe_data_plane(now);
        let (Some(leases), Some(underlay)) = (self.leases.clone(), self.underlay.clone()) else {
            return;
        };
        macro_rules! step {
            ($step:ident, $run:expr) => {
                if self.steps.$step.is_ready(now) {
                    let result = $run;
                    let told = Told {
                        problems: &mut self.problems,
                        health: &self.settings.health,
                    };
                    self.steps.$step.finish(result, told, Instant::now());
                }
            };
        }
        step!(next_hops, self.follow_next_hops(&leases, &underlay, now));
        if self.steps.publish.is_ready(now) && self.steps.detour.is_ready(now) {
            let result = self.keep_detours(&leases, &underlay, detour::Op::withdraws);
            // Success is not the end of it: what is to be added is added below.
            if result.is_err() {
                let told = Told {
                    problems: &mut self.problems,
                    health: &self.settings.health,
                };
                self.steps.detour.finish(result, told, Instant::now());
            }
        }
        step!(publish, self.publish(&leases, &underlay));
        step!(standby, self.keep_standby(&leases, &underlay));
        if self.standby_unfinished {
            self.steps.standby.wake();
        }
        self.observe_data_plane(now);
        step!(detour, self.keep_detours(&leases, &underlay, |_| true));
        if self.steps.publish.is_done() && (self.is_standby_programmed() || self.detour_active) {
            let was_ready = self.settings.ready.swap(true, Ordering::Relaxed);
            self.keep_subnet_file(&leases, &underlay);
            // Whoever makes pods because of it needs that file.
            if !self.problems.is_standing("subnet file") {
                self.conflist.look(now, &mut self.problems);
            }
            if !was_ready {
                announce_readiness();
            }
        }
    }

    /// Tells pods of the subnet, now that their packets get through.
    fn keep_subnet_file(&mut self, leases: &LeaseSet, underlay: &Underlay) {
        let Settings { conf, traffic, .. } = &self.settings;
        let Some(path) = &self.settings.subnet_file else {
            return;
        };
        let wanted = subnet_file::wanted(conf, leases, underlay.mtu, traffic.masquerade);
        let kept = wanted.map(|wanted| subnet_file::keep(path, &wanted));
        self.subnet_kept = matches!(kept, Some(Ok(_)));
        match kept {
            None | Some(Ok(false)) => self.problems.clear("subnet file"),
            Some(Ok(true)) => {
                tracing::info!(path = %path.display(), "subnet file written");
                self.problems.clear("subnet file");
            }
            Some(Err(error)) => self.problems.raise(
                "subnet file",
                format!(
                    "write {}: {error}: pods cannot be made until it is there; make its directory writable, or name another with --subnet-file",
                    path.display()
                ),
            ),
        }
    }

    /// Chooses the interface, and with it puts a new lease set into force: one whose own lease fits no interface
    /// would tear down a path that works.
    fn find_underlay(&mut self) -> Result<(), StepError> {
        self.links = self.netlink.links()?;
        let Some(leases) = self.pending.as_ref().or(self.leases.as_ref()) else {
            return Ok(());
        };
        let addresses = self.netlink.addresses()?;
        if let Some(leases) = &self.leases {
            self.filter.set_guard(self.guard(leases, &addresses));
        }
        let lease_ip = |family| leases.own(family).map(|own: &Lease| own.public_ip);
        let selection = Selection {
            lease_ips: PerFamily {
                v4: lease_ip(Family::V4),
                v6: lease_ip(Family::V6),
            },
            ..self.settings.selection.clone()
        };
        let chosen = interface::look(&mut self.netlink, &selection, &self.links, &addresses)?;
        // While an interface is down and without address the last choice stays: the standby device is bound to it.
        let chosen = chosen?;
        if self.underlay.as_ref() != Some(&chosen) {
            let addresses = chosen.addresses.iter();
            let addresses: Vec<IpAddr> = addresses.filter_map(|(_, address)| *address).collect();
            tracing::info!(
                interface = chosen.name,
                ?addresses,
                mac = %chosen.mac,
                mtu = chosen.mtu,
                "underlay interface"
            );
            self.underlay = Some(chosen);
            self.hops.forget_routes();
            self.steps.next_hops.news();
            self.steps.publish.news();
            self.steps.standby.news();
            self.standby_news = true;
        }
        // A bond's ports come and go without a route changing.
        let now_there = |uplink: &Uplink| Uplink::of(&self.links, uplink.link);
        if !self
            .uplinks
            .iter()
            .all(|uplink| now_there(uplink).as_ref() == Some(uplink))
        {
            self.steps.next_hops.wake();
        }
        if let Some(pending) = self.pending.take() {
            self.nodes = guard::nodes(&pending);
            self.filter.set(Filter {
                guard: self.guard(&pending, &addresses),
                ..Filter::new(&pending, &self.settings.conf)
            });
            self.traffic.set(self.rules_wanted(&pending));
            self.leases = Some(pending);
            self.standby_news = true;
            for step in self.all_steps() {
                step.news();
            }
        }
        Ok(())
    }

    /// Whether there is to be a guard: what other nodes' pods get is not the `alloc` backend's business.
    fn is_guarded(&self) -> bool {
        self.settings.guard && self.settings.conf.backend != Backend::Alloc
    }

    /// What the guard has to be, unless it is off.
    fn guard(&self, leases: &LeaseSet, addresses: &[Address]) -> Option<Guard> {
        self.is_guarded().then(|| Guard {
            nodes: Arc::clone(&self.nodes),
            interfaces: guard::interfaces(leases, &self.settings.conf, &self.links, addresses),
        })
    }

    /// What the masquerade and forward rules have to be.
    fn rules_wanted(&self, leases: &LeaseSet) -> traffic::Wanted {
        let traffic::Settings {
            masquerade,
            forward,
            random_fully,
            no_masquerade,
            ..
        } = &self.settings.traffic;
        let networks = |family| {
            Some(Networks {
                network: self.settings.conf.network(family)?,
                subnet: leases.own(family)?.subnet,
            })
        };
        traffic::Wanted {
            masquerade: *masquerade,
            forward: *forward,
            random_fully: *random_fully,
            families: PerFamily {
                v4: networks(Family::V4),
                v6: networks(Family::V6),
            },
            no_masquerade: no_masquerade.clone(),
        }
    }

    fn follow_next_hops(
        &mut self,
        leases: &LeaseSet,
        underlay: &Underlay,
        now: Instant,
    ) -> Result<(), StepError> {
        if self.settings.conf.backend == Backend::Alloc {
            return Ok(());
        }
        let source = |family| leases.own(family).map(|own| own.public_ip);
        let query = Query {
            sources: PerFamily {
                v4: source(Family::V4),
                v6: source(Family::V6),
            },
            protocol: match self.settings.conf.backend {
                Backend::Vxlan(_) | Backend::Udp { .. } => UDP,
                Backend::Ipip { .. } | Backend::HostGw | Backend::Alloc => 0,
            },
            direct: self.settings.conf.backend.direct(),
            underlay: underlay.index,
        };
        let peers = leases.peers.iter().map(|peer| peer.public_ip);
        let refused = self.hops.update(&mut self.netlink, query, peers, now)?;
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
        let uplinks = self.choose_uplinks(leases, underlay);
        let mut changed = uplinks != self.uplinks;
        if changed {
            tracing::info!(uplinks = ?described(&uplinks), "uplinks");
            self.uplinks = uplinks;
        }
        let mut rerouted = false;
        for peer in &leases.peers {
            let ways = self.ways(peer);
            let before = self.published_ways.get(&peer.public_ip);
            changed |= before != Some(&ways);
            rerouted |= before.is_some_and(|before| before.direct != ways.direct);
        }
        if changed {
            self.steps.publish.wake();
            self.steps.detour.wake();
        }
        // Its route in the main table is of the other kind from here on.
        if rerouted {
            self.steps.standby.wake();
            self.standby_news = true;
        }
        Ok(())
    }

    /// How frames get to a peer.
    fn ways(&self, peer: &Lease) -> Ways {
        let ways = self.hops.ways(peer.public_ip, &self.uplinks);
        ways.unwrap_or_else(|_| Ways {
            direct: self.is_direct(peer),
            paths: Vec::new(),
        })
    }

    fn is_direct(&self, peer: &Lease) -> bool {
        match self.settings.conf.backend.direct() {
            Direct::None => false,
            Direct::OnLink => self.hops.direct(peer.public_ip).is_some(),
            Direct::All => true,
        }
    }

    /// The interfaces that workers are to send by.
    fn choose_uplinks(&self, leases: &LeaseSet, underlay: &Underlay) -> Vec<Uplink> {
        let mut fit: HashMap<u32, bool> = HashMap::new();
        // An interface without a worker would only lose peers.
        let is_fit = |link: u32| {
            Uplink::of(&self.links, link).is_some_and(|uplink| {
                let has_worker = |nic: &(u32, String)| self.worker_nics.contains(&nic.1);
                !uplink.nics.is_empty()
                    && (self.worker_nics.is_empty() || uplink.nics.iter().any(has_worker))
            })
        };
        let peers: Vec<_> = leases
            .peers
            .iter()
            .map(|peer| {
                let mut exits = self.hops.exits(peer.public_ip);
                exits.retain(|exit| *fit.entry(exit.link).or_insert_with(|| is_fit(exit.link)));
                exits
            })
            .collect();
        uplink::choose(underlay.index, &peers)
            .into_iter()
            .filter_map(|link| Uplink::of(&self.links, link))
            .collect()
    }

    fn publish(&mut self, leases: &LeaseSet, underlay: &Underlay) -> Result<(), StepError> {
        let start = Instant::now();
        let ways = |peer: &Lease| self.ways(peer);
        let image = compile(leases, &self.settings.conf, underlay, &self.uplinks, ways)
            .map_err(StepError::Compile)?;
        let compiled = start.elapsed();
        let start = Instant::now();
        let published = self.fib.publish(&image)?;
        let took = start.elapsed();
        self.published_ways = leases
            .peers
            .iter()
            .map(|peer| (peer.public_ip, self.ways(peer)))
            .collect();
        let resolved: HashSet<IpNet> = leases
            .peers
            .iter()
            .filter(|peer| !self.published_ways[&peer.public_ip].paths.is_empty())
            .map(|peer| peer.subnet)
            .collect();
        let since_change = self.leases_seen.take().map(|seen| seen.elapsed());
        if let Published::New(generation) = published {
            let figures = &self.settings.health.figures;
            figures.publish.observe((compiled + took).as_secs_f64());
            if let Some(since_change) = since_change {
                figures.lease.observe(since_change.as_secs_f64());
            }
            tracing::info!(
                generation,
                leases = leases.count(),
                resolved = resolved.len(),
                bytes = image.len() * 8,
                compile_us = compiled.as_micros(),
                publish_us = took.as_micros(),
                since_change_us = since_change.map(|since| since.as_micros()),
                "published"
            );
            self.published_at = start;
            self.taking_up = self.data_plane.is_forwarding();
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
        let start = self.standby_since.take().unwrap_or_else(Instant::now);
        let mut errors = Vec::new();
        errors.extend(self.remove_former().err());
        if let Backend::Udp { port } = self.settings.conf.backend {
            let ensured = self.open_fou().and_then(|mut fou| fou.ensure(port));
            errors.extend(ensured.err().map(StepError::Fou));
        }
        let mut remaining = 0;
        let mut refused = Vec::new();
        let round = Instant::now();
        for family in Family::ALL {
            let conf = &self.settings.conf;
            let direct = |peer: &Lease| self.hops.direct(peer.public_ip);
            let desired = standby::Desired::new(family, leases, conf, underlay, direct);
            // Where there is nothing to hold, what was held before goes.
            let desired = desired.unwrap_or(standby::Desired {
                family,
                device: None,
                peers: Vec::new(),
            });
            // What the first family leaves of the time; a slice is done in any case.
            let budget = STANDBY_BUDGET.saturating_sub(round.elapsed());
            let (link, outcome) = standby::reconcile(&mut self.netlink, &desired, budget)?;
            *self.standby_links.get_mut(family) = link.unwrap_or(0);
            if let (Some(device), Some(_)) = (&desired.device, link) {
                standby::reconcile_sysctls(&device.name);
            }
            let changes = outcome.peers.changed + outcome.device_changes.len();
            let figures = &self.settings.health.figures;
            let count = u64::try_from(changes).unwrap_or(u64::MAX);
            figures.written.inc_by(count);
            if !self.standby_news {
                figures.healed.inc_by(count);
            }
            self.standby_changes += outcome.peers.changed;
            if outcome.changed() {
                // Routes through rip0 name the device's address as their source; it may have been away.
                self.steps.detour.wake();
            }
            if !outcome.device_changes.is_empty() {
                let device = desired.device.map(|device| device.name).unwrap_or_default();
                tracing::info!(device, changes = ?outcome.device_changes, "standby device set");
            }
            remaining += outcome.peers.remaining;
            refused.extend(outcome.peers.refused);
            errors.extend(outcome.device_error.map(StepError::Standby));
        }
        self.keep_blackholes(leases)?;
        self.standby_unfinished = remaining > 0;
        self.standby_news &= self.standby_unfinished || !errors.is_empty();
        if self.standby_unfinished {
            self.standby_since = Some(start);
        } else if self.standby_changes > 0 {
            let entries = core::mem::take(&mut self.standby_changes);
            tracing::info!(
                entries,
                took_us = start.elapsed().as_micros(),
                "standby path set"
            );
        }
        errors.extend(refusals(refused).err());
        all_of(errors)
    }

    /// The routes that refuse what is for no pod of ours.
    fn keep_blackholes(&mut self, leases: &LeaseSet) -> Result<(), StepError> {
        let wanted = self.settings.traffic.blackhole;
        if !wanted && !self.former_blackholes {
            return Ok(());
        }
        let mut refused = None;
        for family in Family::ALL {
            let own = leases.own(family).filter(|_| wanted);
            let subnet = own.map(|own| own.subnet);
            let outcome = blackhole::keep(&mut self.netlink, family, subnet)?;
            if outcome.changed > 0 {
                tracing::info!(%family, ?subnet, "blackhole route set");
            }
            refused = refused.or(outcome.refused);
        }
        self.former_blackholes = false;
        match refused {
            Some(refusal) => self.problems.raise(
                "blackhole",
                format!(
                    "blackhole route: {refusal}: another route to this node's subnet is there; --ip-blackhole-route is for networks without a bridge"
                ),
            ),
            None => self.problems.clear("blackhole"),
        }
        Ok(())
    }

    /// Opens foo-over-UDP; where the kernel lacks it, has the module loaded, once.
    fn open_fou(&mut self) -> Result<Fou, FouError> {
        let opened = Fou::open();
        if !matches!(opened, Err(FouError::Missing { .. })) {
            return opened;
        }
        let first = self.fou_module.is_none();
        let loaded = self.fou_module.get_or_insert_with(fou::load_module);
        match loaded {
            Ok(()) if first => Fou::open(),
            // Loaded and still not there, or taken away since.
            Ok(()) => opened,
            Err(modprobe) => Err(FouError::Missing {
                modprobe: modprobe.clone(),
            }),
        }
    }

    /// Removes tunnel devices and the receive port that another backend of ours left.
    fn remove_former(&mut self) -> Result<(), StepError> {
        let conf = &self.settings.conf;
        let names = conf
            .families()
            .filter_map(|family| standby::device_name(conf.backend, family));
        let wanted: Vec<String> = names.collect();
        // Announced links wake this step before the list of them is read anew.
        let links = self.netlink.links()?;
        let former = &self.former_devices;
        for link in standby::stale_devices(&mut self.netlink, &links, &wanted, former)? {
            match self.netlink.execute_one(message::delete_link(link.index))? {
                Ok(()) => tracing::info!(device = link.name, "device of another backend removed"),
                Err(refusal) => tracing::warn!(device = link.name, %refusal, "not removed"),
            }
        }
        let port = match conf.backend {
            Backend::Udp { port } => Some(port),
            Backend::Alloc | Backend::HostGw | Backend::Vxlan(_) | Backend::Ipip { .. } => None,
        };
        if let Some(former) = self.former_fou.filter(|former| Some(*former) != port) {
            match Fou::open().and_then(|mut fou| fou.remove(former)) {
                // What the kernel does not have, it does not hold.
                Ok(_) | Err(FouError::Missing { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.former_fou = None;
        Ok(())
    }

    fn observe_data_plane(&mut self, now: Instant) {
        match DataPlane::observe(&self.settings.run_dir) {
            Ok(seen) => {
                self.problems.clear("data plane");
                let before = core::mem::replace(&mut self.data_plane, seen);
                let seen = &self.data_plane;
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
                if !seen.nics.is_empty() && seen.nics != self.worker_nics {
                    self.worker_nics.clone_from(&seen.nics);
                    self.steps.next_hops.wake();
                }
                if self.taking_up
                    && (!seen.is_forwarding() || seen.generation >= self.current_generation())
                {
                    self.taking_up = false;
                    if seen.is_forwarding() {
                        let took = self.published_at.elapsed();
                        let figures = &self.settings.health.figures;
                        figures.take_up.observe(took.as_secs_f64());
                    }
                }
                let seen = &self.data_plane;
                if before != *seen {
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

    /// Subnets of a family that every worker can send to, whatever generation it is at.
    fn served<'a>(&self, leases: &'a LeaseSet, family: Family) -> Vec<&'a Lease> {
        let oldest = self.data_plane.generation;
        if oldest == 0
            || !self
                .history
                .iter()
                .any(|(generation, _)| *generation == oldest)
        {
            return Vec::new();
        }
        let in_use: Vec<_> = self
            .history
            .iter()
            .filter(|(generation, _)| *generation >= oldest)
            .collect();
        leases
            .peers(family)
            .filter(|peer| {
                let resolved =
                    |(_, resolved): &&(u64, HashSet<IpNet>)| resolved.contains(&peer.subnet);
                in_use.iter().all(resolved) && !self.ways(peer).paths.is_empty()
            })
            .collect()
    }

    /// Makes those changes to the detours of both families that `which` selects.
    fn keep_detours(
        &mut self,
        leases: &LeaseSet,
        underlay: &Underlay,
        which: impl Fn(&detour::Op) -> bool,
    ) -> Result<(), StepError> {
        let conf = &self.settings.conf;
        let device = self.links.iter().find(|link| link.name == detour::DEVICE);
        let mtu = conf
            .families()
            .map(|family| conf.pod_mtu(family, underlay.mtu))
            .max()
            .unwrap_or(underlay.mtu);
        let mut refused = Vec::new();
        if let Some(device) = device {
            let own = leases.own.iter().filter_map(|(_, own)| own.as_ref());
            let addresses: Vec<IpAddr> = match conf.backend.is_tunnel() {
                true => own.map(Lease::vtep_ip).collect(),
                false => Vec::new(),
            };
            refused = detour::prepare_device(&mut self.netlink, device, &addresses)?;
        }
        let (mut active, mut subnets) = (false, 0);
        for family in Family::ALL {
            let desired = self.detour(leases, underlay, family, mtu);
            active |= desired.active;
            subnets += desired.subnets();
            let planned = detour::plan(&mut self.netlink, &desired)?;
            let ops: Vec<_> = planned.iter().filter(|op| which(op)).cloned().collect();
            refused.extend(detour::apply(&mut self.netlink, &ops)?);
        }
        if self.detour_active != active {
            tracing::info!(
                active,
                subnets,
                since_publish_ms = self.published_at.elapsed().as_millis(),
                "detour through {}",
                detour::DEVICE
            );
        }
        self.detour_active = active;
        self.detour_routes = if active { subnets } else { 0 };
        self.check_reverse_path(active);
        refusals(refused)
    }

    /// What the detour of a family has to be.
    fn detour(
        &self,
        leases: &LeaseSet,
        underlay: &Underlay,
        family: Family,
        device_mtu: u32,
    ) -> detour::Desired {
        let conf = &self.settings.conf;
        let device = self.links.iter().find(|link| link.name == detour::DEVICE);
        let own = leases.own(family);
        let served = match own {
            Some(_) => self.served(leases, family),
            None => Vec::new(),
        };
        let (plain, tunnelled): (Vec<&Lease>, Vec<&Lease>) =
            served.into_iter().partition(|peer| self.is_direct(peer));
        let subnets = |leases: Vec<&Lease>| leases.iter().map(|lease| lease.subnet).collect();
        let has_worker = |uplink: &Uplink| {
            let nics = uplink.nics.iter();
            nics.into_iter()
                .any(|(_, name)| self.data_plane.nics.contains(name))
        };
        let is_served = !(plain.is_empty() && tunnelled.is_empty());
        detour::Desired {
            family,
            link: device.map(|device| device.index),
            table: self.settings.table,
            direct: conf.backend.direct(),
            policies: conf.backend.vxlan().is_some_and(|vxlan| vxlan.gbp),
            // Of a family that is off there is nothing, so these are not looked at.
            network: conf
                .network(family)
                .unwrap_or(IpNet::V4(Ipv4Net::default())),
            own_subnet: own.map_or(IpNet::V4(Ipv4Net::default()), |own| own.subnet),
            mtu: Some(conf.pod_mtu(family, underlay.mtu)).filter(|&mtu| mtu < device_mtu),
            tunnelled: subnets(tunnelled),
            plain: subnets(plain),
            active: device.is_some()
                && self.data_plane.is_forwarding()
                && self.uplinks.iter().any(has_worker)
                && is_served,
        }
    }

    /// Packets of direct peers that the workers leave to the kernel arrive by the uplink, while the route back leads
    /// through `rip0`: a strict check would drop them.
    fn check_reverse_path(&mut self, active: bool) {
        let strict = |name: &str| {
            let value = |name: &str| {
                let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
                let text = std::fs::read_to_string(path).unwrap_or_default();
                text.trim().parse::<u8>().unwrap_or(0)
            };
            value("all").max(value(name)) == 1
        };
        let concerned = active
            && self.settings.conf.network.is_some()
            && self.settings.conf.backend.direct() != Direct::None;
        let uplink = self.uplinks.iter().find(|uplink| strict(&uplink.name));
        match uplink.filter(|_| concerned) {
            Some(uplink) => {
                let name = &uplink.name;
                self.problems.raise(
                    "reverse path",
                    format!(
                        "{name} checks reverse paths strictly: packets from direct peers that no worker takes (too long for one, or on a receive queue without) are lost; set net.ipv4.conf.{name}.rp_filter=2"
                    ),
                );
            }
            None => self.problems.clear("reverse path"),
        }
    }

    fn write_state(&mut self, problems: &[(&'static str, String)]) {
        let conf = &self.settings.conf;
        let peers = self.leases.iter().flat_map(|leases| &leases.peers);
        let unresolved = peers
            .filter(|_| conf.backend != Backend::Alloc)
            .filter_map(|peer| {
                let reason = self.hops.ways(peer.public_ip, &self.uplinks).err()?;
                Some(format!("{} ({}): {reason}", peer.node, peer.public_ip))
            });
        let own = self.leases.iter().flat_map(|leases| leases.own.iter());
        let own: Vec<&Lease> = own.filter_map(|(_, own)| own.as_ref()).collect();
        let devices = || {
            conf.families()
                .filter_map(|family| Some((family, standby::device_name(conf.backend, family)?)))
        };
        let pod_mtu = |family: Family| {
            conf.network(family)?;
            let underlay = self.underlay.as_ref()?;
            Some(conf.pod_mtu(family, underlay.mtu))
        };
        let state = State {
            node: self.settings.node.clone(),
            lease_source: self.settings.lease_source.clone(),
            backend: conf.backend.name().to_owned(),
            standby_devices: devices().map(|(_, name)| name).collect(),
            fou_port: match conf.backend {
                Backend::Udp { port } => Some(port),
                Backend::Alloc | Backend::HostGw | Backend::Vxlan(_) | Backend::Ipip { .. } => None,
            },
            filtered: devices().map(|(family, _)| family.to_string()).collect(),
            guard: self.is_guarded(),
            rules: Some(RulesState {
                mode: self.settings.traffic.mode,
                masquerade: self.settings.traffic.masquerade,
                forward: self.settings.traffic.forward,
                no_masquerade: self.settings.traffic.no_masquerade.clone(),
            }),
            underlay: self.underlay.as_ref().map(|underlay| underlay.name.clone()),
            uplinks: described(&self.uplinks),
            public_ips: own.iter().map(|own| own.public_ip).collect(),
            pod_mtu: pod_mtu(Family::V4),
            pod_mtu6: pod_mtu(Family::V6),
            table: self.settings.table,
            unresolved: unresolved.take(UNRESOLVED_SHOWN).collect(),
            problems: problems.iter().map(|(_, text)| text.clone()).collect(),
            problem_parts: {
                let parts = by_part(problems.to_vec()).into_keys();
                parts.map(str::to_owned).collect()
            },
            started: self.settings.health.started(),
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
