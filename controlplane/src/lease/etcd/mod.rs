//! Leases from etcd, as flannel keeps them without `--kube-subnet-mgr`.
//!
//! ```text
//!   etcd ──list, watch──► api ──News──► keeper ──► plan, view ──► whole lease sets ──► the loop
//!     ▲                                   │  ▲
//!     └── create, change, renew our key ──┘  └── kernel: our addresses, our device's MAC
//! ```
//!
//! One thread with a small runtime of its own. `api` follows all keys below `subnets/` and never gives up; the keeper has
//! them in memory, and each time that anything changes, it asks `plan` anew which of them is ours. If none is, it makes
//! one; if ours says something else than it should, it is changed; before its time is over, it is renewed. Each write
//! compares with the state that it was decided upon, so it fails if that is not the state any more: two nodes never take
//! one subnet, a renewal cannot take back what another has got meanwhile, and after any failure there is just another look.
//!
//! While etcd is away, and while we have no lease, the last set stays in force.
//!
//! # When our key is lost
//!
//! If it is gone (deleted, or over because etcd could not be reached for a day), the same key is made again, as long as
//! nobody else has the subnet: for running pods nothing changes. If somebody has, there are two nodes with one subnet, and
//! no choice of ours can give the peers' traffic back to our pods: packets to the subnet go to the other node from the
//! moment on at which it wrote its key. Then the other keeps it. We take another subnet, so that new pods work, and follow
//! it with the device, the routes and `subnet.env`. Pods with addresses of the lost subnet are reached from this node only;
//! that is said as long as an interface has such an address, and deleting those pods and the bridge ends it.

mod api;
pub mod flags;
pub mod plan;
pub mod schema;
pub mod view;

use core::net::IpAddr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use ripstop_cni::file::{make_dir, parent, write_atomic};
use ripstop_cni::subnet_env::SubnetEnv;
use tokio::sync::mpsc;

pub use self::api::Access;
use self::api::{ApiError, Connection, Follower, News, Outcome, Raw, Write};
use self::plan::{Entries, Entry, Held, Standing, Us};
use self::schema::{Attributes, Record, Subnets, key_name, parse_key_name};
use self::view::{Own, View};
use super::backoff::{Backoff, random, random_mac};
use super::claims::{leave_macs, name_skipped};
use super::kernel::Kernel;
use super::told::{Told, gather, runtime};
use super::{Lease, LeaseEvent, LeaseSink, LeaseSource};
use crate::family::PerFamily;
use crate::interface::Selection;
use crate::mac::Mac;
use crate::netconf::{NetConf, NetConfError, Pool};
use crate::sys::{Signals, Wake, wait_readable};

/// For how long a lease is taken, as with flannel.
pub const TTL: Duration = Duration::from_secs(86_400);
/// A watch that does not even answer when asked is given up after this long.
pub const SILENT: Duration = Duration::from_secs(60);
/// How long etcd may take before the kept configuration does.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the kernel is asked for our addresses.
const LOOK: Duration = Duration::from_secs(1);
/// News that may wait while one is worked on.
const BACKLOG: usize = 256;
/// What was written is back by the watch in milliseconds; until then nothing is decided.
const ECHO: Duration = Duration::from_secs(2);
/// A peer whose key is gone is sent to for so long all the same: one that lives makes it again at once, or when it has
/// found an etcd that has forgotten everything.
const GRACE: Duration = Duration::from_secs(15);
/// So often a subnet is tried that is free, and still cannot be had.
const REFUSED_MAX: u32 = 3;

/// A network configuration from etcd, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// All but the pools.
    pub conf: NetConf,
    /// Where subnets are chosen from.
    pub pools: PerFamily<Option<Pool>>,
}

impl Config {
    fn parse(bytes: &[u8]) -> Result<Self, NetConfError> {
        let (conf, pools) = NetConf::parse_with_pools(bytes)?;
        Ok(Self { conf, pools })
    }
}

/// Waits for the network configuration in etcd, for as long as it takes. None if a signal came before. What was found is
/// kept in `run_dir`, and does if etcd says nothing soon.
///
/// # Errors
/// The system has no thread or descriptor for it.
pub fn wait_for_config(
    access: &Access,
    run_dir: &Path,
    signals: &Signals,
) -> std::io::Result<Option<Config>> {
    use std::os::fd::AsFd as _;
    let wake = Arc::new(Wake::new()?);
    let (out, found) = crossbeam::channel::bounded(1);
    let runtime = runtime()?;
    let kept = KeptConfig::new(access, run_dir);
    let (access, awake, keeper) = (access.clone(), Arc::clone(&wake), kept.clone());
    std::thread::Builder::new()
        .name("net-conf".to_owned())
        .spawn(move || {
            let (config, bytes) = runtime.block_on(first_config(&access));
            if let Err(error) = keeper.write(&bytes) {
                tracing::warn!(
                    "{}: {error}: a start while etcd is away will wait for it",
                    keeper.path.display()
                );
            }
            // Whoever does not want it any more is on the way out, or has the kept one.
            let _closed = out.send(config);
            awake.signal();
        })?;
    let start = Instant::now();
    let mut kept = Some(kept);
    loop {
        if let Ok(config) = found.try_recv() {
            return Ok(Some(config));
        }
        if signals.arrived() {
            return Ok(None);
        }
        if start.elapsed() >= PATIENCE
            && let Some(config) = kept.take().and_then(|kept| kept.read())
        {
            tracing::warn!("etcd gives no network configuration: the last one that it had is used");
            return Ok(Some(config));
        }
        wait_readable([wake.as_fd(), signals.as_fd()], LOOK);
        wake.clear();
    }
}

/// The network configuration as it was, on disk: the key on a line, and its value.
#[derive(Debug, Clone)]
struct KeptConfig {
    path: PathBuf,
    key: String,
}

impl KeptConfig {
    fn new(access: &Access, run_dir: &Path) -> Self {
        Self {
            path: run_dir.join("net-conf.kept"),
            key: access.keys.config(),
        }
    }

    fn write(&self, value: &[u8]) -> std::io::Result<()> {
        make_dir(parent(&self.path), 0o755)?;
        let content = [self.key.as_bytes(), b"\n", value].concat();
        write_atomic(&self.path, &content, 0o644)
    }

    /// Nothing if there is none, or one of another key.
    fn read(&self) -> Option<Config> {
        let bytes = std::fs::read(&self.path).ok()?;
        let value = bytes
            .strip_prefix(self.key.as_bytes())?
            .strip_prefix(b"\n")?;
        match Config::parse(value) {
            Ok(config) => Some(config),
            Err(error) => {
                tracing::warn!("{} is not used: {error}", self.path.display());
                None
            }
        }
    }
}

async fn first_config(access: &Access) -> (Config, Vec<u8>) {
    let mut backoff = Backoff::default();
    let mut told = None;
    loop {
        let mut problems = Vec::new();
        for endpoint in &access.endpoints {
            match config_at(access, endpoint).await {
                Ok(config) => return config,
                Err(problem) => problems.push(problem),
            }
        }
        let problem = problems.join("; ");
        if told.as_ref() != Some(&problem) {
            tracing::error!("Couldn't fetch network config: {problem}; tried again until it works");
            told = Some(problem);
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

async fn config_at(access: &Access, endpoint: &str) -> Result<(Config, Vec<u8>), String> {
    let connection = access.connect(endpoint).await;
    let connection = connection.map_err(|error| error.to_string())?;
    let bytes = connection.config(&access.keys).await;
    let bytes = bytes.map_err(|error| error.to_string())?;
    let key = access.keys.config();
    let bytes = bytes.ok_or_else(|| {
        format!("flannel config not found in etcd store. Did you create your config using etcdv3 API? The key is {key}")
    })?;
    let config = Config::parse(&bytes).map_err(|error| format!("{key}: {error}"))?;
    Ok((config, bytes))
}

/// What the operator configured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node's name, for ourselves; etcd has none.
    pub node: String,
    /// Where etcd is.
    pub access: Access,
    /// What was found there.
    pub config: Config,
    /// `--iface`, `--public-ip` and `--public-ipv6`.
    pub selection: Selection,
    /// `subnet.env`, which says what we had before.
    pub subnet_file: PathBuf,
    /// [`TTL`], but for tests.
    pub ttl: Duration,
    /// How long before its end a lease is renewed.
    pub margin: Duration,
    /// [`SILENT`], but for tests.
    pub silent: Duration,
}

/// Follows the leases in etcd, and keeps ours.
#[derive(Debug)]
pub struct EtcdSource {
    settings: Settings,
}

impl EtcdSource {
    /// A source that asks etcd in the network namespace of the thread that it runs on.
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    async fn follow(self, sink: &LeaseSink) {
        let follower = Follower {
            access: self.settings.access.clone(),
            silent: self.settings.silent,
        };
        let (out, mut news) = mpsc::channel(BACKLOG);
        tokio::spawn(follower.run(out.clone()));
        let mut keeper = Keeper::new(self.settings, out);
        let mut listening = true;
        while listening {
            let wait = keeper.wait();
            let seen = gather(&mut news, wait, |news| keeper.take(news)).await;
            listening = keeper.round(sink, seen);
        }
    }
}

impl LeaseSource for EtcdSource {
    fn describe(&self) -> String {
        let access = &self.settings.access;
        format!(
            "etcd {} {}",
            access.endpoints.join(","),
            access.keys.subnets()
        )
    }

    fn run(self: Box<Self>, sink: &LeaseSink) {
        match runtime() {
            Ok(runtime) => runtime.block_on(self.follow(sink)),
            Err(error) => drop(sink.send(LeaseEvent::Failed(format!("start: {error}")))),
        }
    }
}

/// A subnet that was ours and is another's.
struct Lost {
    nets: Vec<IpNet>,
    how: String,
}

/// What is known, what was told, and what is being written.
struct Keeper {
    settings: Settings,
    out: mpsc::Sender<News>,
    kernel: Kernel,
    connection: Option<Connection>,
    /// All leases; none before the first list.
    entries: Option<Entries>,
    /// Those that are gone, until they are forgotten.
    gone: Vec<(Arc<str>, Entry, Instant)>,
    /// Up to where they are known.
    revision: i64,
    /// Something of them changed since the last look.
    changed: bool,
    /// Ours, once chosen.
    macs: PerFamily<Option<Mac>>,
    held: Option<Held>,
    /// What we had before, the last first.
    previous: Vec<Subnets>,
    lost: Option<Lost>,
    named: BTreeMap<Arc<str>, String>,
    /// Our own leases as last found.
    own: PerFamily<Option<Lease>>,
    api_problem: Option<String>,
    own_problem: Option<String>,
    write_problem: Option<String>,
    config_problem: Option<String>,
    told: Told,
    /// What could not be made because something is in its way, and how often in a row.
    refused: Option<(Subnets, u32)>,
    /// Something is on its way.
    writing: Option<Write>,
    /// What was written at this revision is waited for, until then.
    echo: Option<(i64, Instant)>,
    backoff: Backoff,
    write_after: Instant,
    /// The etcd lease of our key, and when it is to be renewed.
    renewal: Option<(i64, Instant)>,
    renewing: bool,
    renewal_backoff: Backoff,
    renewal_problem: Option<String>,
}

impl Keeper {
    fn new(settings: Settings, out: mpsc::Sender<News>) -> Self {
        let before = SubnetEnv::read(&settings.subnet_file).ok();
        let before = before.map(|env| Subnets {
            v4: env.subnet.map(IpNet::V4),
            v6: env.subnet_v6.map(IpNet::V6),
        });
        Self {
            settings,
            out,
            kernel: Kernel::default(),
            connection: None,
            entries: None,
            gone: Vec::new(),
            revision: 0,
            changed: false,
            macs: PerFamily::default(),
            held: None,
            previous: before.into_iter().collect(),
            lost: None,
            named: BTreeMap::new(),
            own: PerFamily::default(),
            api_problem: None,
            own_problem: None,
            write_problem: None,
            config_problem: None,
            told: Told::default(),
            refused: None,
            writing: None,
            echo: None,
            backoff: Backoff::default(),
            write_after: Instant::now(),
            renewal: None,
            renewing: false,
            renewal_backoff: Backoff::default(),
            renewal_problem: None,
        }
    }

    /// Until when there is nothing to do.
    fn wait(&self) -> Duration {
        let now = Instant::now();
        let write = Some(self.write_after).filter(|at| *at > now);
        let renew = self.renewal.map(|(_, at)| at).filter(|at| *at > now);
        let next = write.into_iter().chain(renew).min();
        next.map_or(LOOK, |at| (at - now).min(LOOK))
    }

    fn take(&mut self, news: News) {
        match news {
            News::Connected(connection) => self.connection = Some(*connection),
            News::Listed(revision, raws) => {
                let entries: Entries = raws.into_iter().map(entry).collect();
                for (name, entry) in self.entries.replace(entries).unwrap_or_default() {
                    self.remember(name, entry);
                }
                // Also back, where etcd is another.
                self.revision = revision;
                self.echo = None;
                self.changed = true;
                self.write_after = Instant::now();
            }
            News::Put(raw) => {
                self.revision = self.revision.max(raw.changed);
                if let Some(entries) = &mut self.entries {
                    let (name, entry) = entry(raw);
                    if entries.get(&name) != Some(&entry) {
                        entries.insert(name, entry);
                        self.changed = true;
                    }
                }
            }
            News::Deleted(revision, name) => {
                self.revision = self.revision.max(revision);
                let entries = self.entries.as_mut();
                let gone = entries.and_then(|entries| entries.remove_entry(name.as_str()));
                if let Some((name, entry)) = gone {
                    self.changed = true;
                    self.remember(name, entry);
                }
            }
            News::Config(bytes) => self.config_problem = self.compare_config(bytes.as_deref()),
            News::Trouble(problem) => {
                self.api_problem.get_or_insert(problem);
            }
            News::Fine => self.api_problem = None,
            News::Wrote(result) => self.wrote(result),
            News::Kept(lease, asked, result) => self.kept(lease, asked, result),
        }
    }

    /// Keeps a peer that is gone for a while. It is younger than all that are there, so it stands in nobody's way.
    fn remember(&mut self, name: Arc<str>, mut entry: Entry) {
        entry.created = i64::MAX;
        self.gone.push((name, entry, Instant::now() + GRACE));
    }

    /// All leases, and those that are gone for a moment, but for our own.
    fn with_gone(&mut self, entries: &Entries, us: &Us<'_>) -> Entries {
        let before = self.gone.len();
        let now = Instant::now();
        self.gone.retain(|(name, entry, until)| {
            let is_peer = matches!(&entry.record, Ok(record) if !us.is_ours(record));
            is_peer && *until > now && !entries.contains_key(name)
        });
        self.changed |= self.gone.len() != before;
        let mut all = entries.clone();
        let gone = self
            .gone
            .iter()
            .map(|(name, entry, _)| (Arc::clone(name), entry.clone()));
        all.extend(gone);
        all
    }

    /// What the network configuration says was read when we started; what hangs on it is all of us.
    fn compare_config(&self, bytes: Option<&[u8]>) -> Option<String> {
        let key = self.settings.access.keys.config();
        let Some(bytes) = bytes else {
            return Some(format!(
                "{key} is gone from etcd: put it back; this node goes on with what it was"
            ));
        };
        match Config::parse(bytes) {
            Ok(config) if config == self.settings.config => None,
            Ok(_) => Some(format!(
                "{key} has changed: restart this node's control plane to use it"
            )),
            Err(error) => Some(format!(
                "{key} has changed: {error}; this node goes on with what it was"
            )),
        }
    }

    /// One look at everything; false when nobody listens.
    fn round(&mut self, sink: &LeaseSink, seen: Instant) -> bool {
        let echoed = self
            .echo
            .is_none_or(|(revision, until)| self.revision >= revision || Instant::now() >= until);
        let mut listening = true;
        if echoed && let Some(entries) = self.entries.take() {
            self.echo = None;
            let outcome = self.look(&entries, sink, seen);
            self.entries = Some(entries);
            match outcome {
                Ok(still) => {
                    self.own_problem = None;
                    listening = still;
                }
                Err(problem) => self.own_problem = Some(problem),
            }
            self.look_for_lost();
        }
        listening && self.tell_problem(sink)
    }

    /// Our own state against what is in etcd.
    fn look(&mut self, entries: &Entries, sink: &LeaseSink, seen: Instant) -> Result<bool, String> {
        let addresses = self.addresses()?;
        let known = self.known_macs()?;
        let (selection, pools) = (&self.settings.selection, self.settings.config.pools);
        let mut public_ips = addresses;
        for (family, ip) in selection.public_ips.iter() {
            if pools.get(family).is_some() && ip.is_some() {
                *public_ips.get_mut(family) = *ip;
            }
        }
        let held = self.held.clone();
        let us = Us {
            pools: &pools,
            public_ips,
            macs: known,
            held: held.as_ref(),
            previous: self.previous.first().copied().unwrap_or_default(),
        };
        let found = us.find(entries);
        let all = match self.gone.is_empty() {
            true => None,
            false => Some(self.with_gone(entries, &us)),
        };
        let all = all.as_ref().unwrap_or(entries);
        if let (Some(how), Some(held)) = (&found.stolen, &held) {
            self.lose(held.subnets, how);
            self.changed = true;
        }
        match found.standing {
            Standing::Ours(name) => {
                let Some(entry) = entries.get(&name) else {
                    return Ok(true);
                };
                let (Ok(subnets), record) = (&entry.subnets, entry.record.as_ref().ok()) else {
                    return Ok(true);
                };
                let macs = self.choose_macs(known, record);
                self.held = Some(Held {
                    name: Arc::clone(&name),
                    subnets: *subnets,
                    public_ips: record.map_or(public_ips, |record| record.public_ips),
                });
                let mut own = Own {
                    name: Arc::clone(&name),
                    created: entry.created,
                    leases: self.leases(subnets, addresses, macs),
                };
                let (listening, older) = self.tell_set(all, &mut own, found.others, sink, seen);
                if let Some(older) = older {
                    self.give_way(&name, entry, *subnets, &older)?;
                    return Ok(listening);
                }
                let attributes = Attributes {
                    public_ips,
                    vtep_macs: self.macs,
                };
                let value = attributes.render(self.settings.config.conf.backend);
                if entry.value == value.as_bytes() {
                    self.write_problem = None;
                    self.renew(entry.lease);
                } else {
                    self.write(Write::Update {
                        name: name.to_string(),
                        changed: entry.changed,
                        value,
                        lease: entry.lease,
                    });
                }
                Ok(listening)
            }
            Standing::Misfit(name) => {
                let Some(entry) = entries.get(&name) else {
                    return Ok(true);
                };
                let subnets = entry.subnets.clone().unwrap_or_default();
                if self.previous.first() != Some(&subnets) {
                    tracing::warn!(
                        "lease {name} is ours and does not fit the network configuration: it is given up for another"
                    );
                    // What of it still fits is wanted again.
                    self.previous.insert(0, subnets);
                }
                self.held = None;
                self.write(Write::Delete {
                    name: name.to_string(),
                    changed: entry.changed,
                });
                Ok(true)
            }
            Standing::None => {
                let mut wanted: Vec<Subnets> = self.held.iter().map(|held| held.subnets).collect();
                wanted.extend(&self.previous);
                // A key that is none may lie where ours would, so that it can never be made.
                if let Some((refused, REFUSED_MAX..)) = &self.refused {
                    wanted.retain(|subnets| subnets != refused);
                }
                let chosen = us.choose(all, &wanted, random())?;
                let macs = self.choose_macs(known, None);
                // Ours in all but writing: peers' changes are not waited with.
                let mut listening = true;
                if let Some(held) = self.held.clone() {
                    if chosen == held.subnets {
                        let mut own = Own {
                            name: Arc::clone(&held.name),
                            created: i64::MAX,
                            leases: self.leases(&held.subnets, addresses, macs),
                        };
                        (listening, _) = self.tell_set(all, &mut own, found.others, sink, seen);
                    } else {
                        self.lose(
                            held.subnets,
                            "was given to others while it was gone from etcd",
                        );
                    }
                }
                let keys = &self.settings.access.keys;
                let attributes = Attributes {
                    public_ips,
                    vtep_macs: self.macs,
                };
                self.write(Write::Create {
                    subnets: chosen,
                    name: key_name(&chosen),
                    rivals: keys.rivals(&chosen),
                    value: attributes.render(self.settings.config.conf.backend),
                    ttl: self.settings.ttl,
                });
                Ok(listening)
            }
        }
    }

    /// The addresses of the interface that the loop will choose too.
    fn addresses(&mut self) -> Result<PerFamily<Option<IpAddr>>, String> {
        let problem = |error: &dyn core::fmt::Display| format!("our own public IP: {error}");
        let chosen = self.kernel.addresses(&self.settings.selection);
        let chosen = chosen.map_err(|error| problem(&error))?;
        chosen.map_err(|error| problem(&error))
    }

    /// The MAC addresses that we have used, or that our devices have.
    fn known_macs(&mut self) -> Result<PerFamily<Option<Mac>>, String> {
        let conf = &self.settings.config.conf;
        let mut macs = self.macs;
        if conf.backend.vxlan().is_some() {
            for family in conf
                .families()
                .filter(|family| self.macs.get(*family).is_none())
            {
                let device = self.kernel.device_mac(conf.backend, family);
                *macs.get_mut(family) =
                    device.map_err(|error| format!("our tunnel device: {error}"))?;
            }
        }
        Ok(macs)
    }

    /// The MAC addresses by which peers know us: the devices', else those that our key has, else new ones. Chosen once.
    fn choose_macs(
        &mut self,
        known: PerFamily<Option<Mac>>,
        record: Option<&Record>,
    ) -> PerFamily<Option<Mac>> {
        let conf = &self.settings.config.conf;
        if conf.backend.vxlan().is_some() {
            for family in conf.families() {
                if self.macs.get(family).is_none() {
                    let stored = record.and_then(|record| record.mac(family));
                    let device = *known.get(family);
                    let mac = device.or(stored).unwrap_or_else(random_mac);
                    tracing::info!(%family, %mac, device = device.is_some(), stored = stored.is_some(), "VTEP MAC address");
                    *self.macs.get_mut(family) = Some(mac);
                }
            }
        }
        self.macs
    }

    fn leases(
        &self,
        subnets: &Subnets,
        addresses: PerFamily<Option<IpAddr>>,
        macs: PerFamily<Option<Mac>>,
    ) -> PerFamily<Option<Lease>> {
        let mut leases = PerFamily::default();
        for family in self.settings.config.conf.families() {
            if let (&Some(subnet), &Some(public_ip)) = (subnets.get(family), addresses.get(family))
            {
                *leases.get_mut(family) = Some(Lease {
                    node: self.settings.node.as_str().into(),
                    public_ip,
                    subnet,
                    vtep_mac: *macs.get(family),
                });
            }
        }
        leases
    }

    /// Looks at all leases and tells the set if it is another. Who has our subnet by right, if anybody.
    fn tell_set(
        &mut self,
        entries: &Entries,
        own: &mut Own,
        others: BTreeMap<Arc<str>, String>,
        sink: &LeaseSink,
        seen: Instant,
    ) -> (bool, Option<Arc<str>>) {
        if !core::mem::take(&mut self.changed) && own.leases == self.own {
            return (true, None);
        }
        self.own.clone_from(&own.leases);
        let conf = &self.settings.config.conf;
        let mut view = View::of(entries, own, conf, others.clone());
        if leave_macs(view.own_mac_taken, &mut own.leases, &mut self.macs) {
            view = View::of(entries, own, conf, others);
            self.own.clone_from(&own.leases);
        }
        for (name, ..) in &self.gone {
            view.skipped.remove(name);
        }
        name_skipped("lease", &mut self.named, &mut view.skipped);
        if let Some(older) = view.own_subnet_taken {
            // Looked at again as a whole.
            self.changed = true;
            return (true, Some(older));
        }
        let set = view.into_set(own.leases.clone());
        (self.told.set(set, seen, sink), None)
    }

    /// An older lease overlaps ours: peers have decided for it, and so do we.
    fn give_way(
        &mut self,
        name: &Arc<str>,
        entry: &Entry,
        subnets: Subnets,
        older: &str,
    ) -> Result<(), String> {
        if entry.lease == 0 {
            return Err(format!(
                "lease {name}, which is reserved for us, overlaps the older one of {older}, which keeps it: delete the one that is wrong"
            ));
        }
        self.lose(subnets, &format!("overlaps the older lease of {older}"));
        self.write(Write::Delete {
            name: name.to_string(),
            changed: entry.changed,
        });
        Ok(())
    }

    fn lose(&mut self, subnets: Subnets, how: &str) {
        let nets: Vec<IpNet> = subnets.iter().filter_map(|(_, net)| *net).collect();
        // It may take some tries to give it up.
        if self.lost.as_ref().is_none_or(|lost| lost.nets != nets) {
            tracing::error!("our lease {} {how}: taking another", key_name(&subnets));
        }
        self.held = None;
        self.previous.clear();
        self.renewal = None;
        self.lost = Some(Lost {
            nets,
            how: how.to_owned(),
        });
    }

    /// A lost subnet is forgotten when nothing here has an address of it.
    fn look_for_lost(&mut self) {
        let Some(lost) = &self.lost else { return };
        // The tunnel device gets its new address when the loop has the new set.
        let is_settled = self.held.is_some() && self.told.has_set();
        let addresses = self.kernel.all_addresses().unwrap_or_default();
        let is_here = addresses
            .iter()
            .any(|address| lost.nets.iter().any(|net| net.contains(address)));
        if is_settled && !is_here {
            self.lost = None;
        }
    }

    fn lost_problem(&self) -> Option<String> {
        let lost = self.lost.as_ref()?;
        let nets: Vec<String> = lost.nets.iter().map(ToString::to_string).collect();
        Some(format!(
            "this node's lease {} {}: pods that have addresses of it are cut off; delete them and the bridge, so that they are made again",
            nets.join(" and "),
            lost.how
        ))
    }

    /// Tells what is wrong.
    fn tell_problem(&mut self, sink: &LeaseSink) -> bool {
        let lost = self.lost_problem();
        let problems = [
            &self.api_problem,
            &self.own_problem,
            &self.write_problem,
            &self.renewal_problem,
            &self.config_problem,
            &lost,
        ];
        self.told.problems(&problems, sink)
    }

    /// Sends a write, if none is on its way and it is time.
    fn write(&mut self, write: Write) {
        let Some(connection) = self.connection.clone() else {
            return;
        };
        if self.writing.is_some() || Instant::now() < self.write_after {
            return;
        }
        // Once for a row of failures.
        if self.backoff.failures() == 0 {
            tracing::info!("own lease: {write}");
        }
        self.writing = Some(write.clone());
        let (keys, out) = (self.settings.access.keys.clone(), self.out.clone());
        tokio::spawn(async move {
            let result = connection.write(&keys, write).await;
            // Nobody listens any more, so nobody wants to know.
            let _closed = out.send(News::Wrote(result)).await;
        });
    }

    fn wrote(&mut self, result: Result<Outcome, ApiError>) {
        let write = self.writing.take();
        match result {
            Ok(Outcome::Won(revision, granted)) => {
                self.refused = None;
                self.backoff.reset();
                self.write_problem = None;
                self.echo = Some((revision, Instant::now() + ECHO));
                if let Some((lease, asked, ttl)) = granted {
                    self.renewal = Some((lease, asked + self.renew_in(ttl)));
                }
            }
            Ok(Outcome::Lost) => {
                tracing::info!("own lease: another was faster; looking again");
                if let Some(Write::Create { subnets, .. }) = write {
                    self.refused = Some(match self.refused {
                        Some((before, times)) if before == subnets => (subnets, times + 1),
                        Some(_) | None => (subnets, 1),
                    });
                }
                // By then the watch has told what is there.
                self.write_after = Instant::now() + Duration::from_millis(50 + random() % 100);
            }
            Err(error) => {
                self.write_after = Instant::now() + self.backoff.next();
                // The first of a row may be chance.
                if self.backoff.failures() > 1 {
                    self.write_problem.get_or_insert(error.to_string());
                }
            }
        }
    }

    fn renew_in(&self, ttl: Duration) -> Duration {
        let rest = ttl.checked_sub(self.settings.margin);
        rest.filter(|rest| !rest.is_zero()).unwrap_or(ttl / 3)
    }

    /// Renews the etcd lease of our key when it is time; one that is adopted at once, to know how long it has. It goes with
    /// the key, so whoever else has the key by then, it is not ours that is renewed.
    fn renew(&mut self, lease: i64) {
        if lease == 0 {
            self.renewal = None;
            self.renewal_problem = None;
            return;
        }
        let now = Instant::now();
        let due = match self.renewal {
            Some((known, due)) if known == lease => due,
            Some(_) | None => now,
        };
        self.renewal = Some((lease, due));
        let Some(connection) = self.connection.clone() else {
            return;
        };
        if self.renewing || now < due {
            return;
        }
        self.renewing = true;
        let out = self.out.clone();
        tokio::spawn(async move {
            let result = connection.keep(lease).await;
            // Nobody listens any more, so nobody wants to know.
            let _closed = out.send(News::Kept(lease, now, result)).await;
        });
    }

    fn kept(&mut self, lease: i64, asked: Instant, result: Result<i64, ApiError>) {
        self.renewing = false;
        if self.renewal.is_none_or(|(known, _)| known != lease) {
            return;
        }
        match result {
            Ok(seconds) => {
                let ttl = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
                tracing::debug!(seconds, "own lease renewed");
                self.renewal_backoff.reset();
                self.renewal_problem = None;
                // One that is over takes the key with it, which the watch tells.
                let next = if ttl.is_zero() {
                    LOOK
                } else {
                    self.renew_in(ttl)
                };
                self.renewal = Some((lease, asked + next));
            }
            Err(error) => {
                self.renewal = Some((lease, Instant::now() + self.renewal_backoff.next()));
                if self.renewal_backoff.failures() > 1 {
                    self.renewal_problem.get_or_insert(error.to_string());
                }
            }
        }
    }
}

fn entry(raw: Raw) -> (Arc<str>, Entry) {
    let entry = Entry {
        subnets: parse_key_name(&raw.name),
        record: Record::parse(&raw.value),
        value: raw.value,
        created: raw.created,
        changed: raw.changed,
        lease: raw.lease,
    };
    (raw.name.into(), entry)
}
