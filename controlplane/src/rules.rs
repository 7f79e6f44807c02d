//! The standby's peer filter: only peers may tunnel into the kernel's VXLAN device.
//!
//! A VXLAN device decapsulates from anyone. The workers check every packet; the kernel's path is given the same
//! checks by nftables, in a table of our own:
//!
//! - `standby` (hook input, behind defragmentation): a datagram to the tunnel's port must be addressed to our public
//!   address, carry our VNI and IPv4 from a single sender, and come from a pair of outer and inner source that is in the set `peers`.
//! - `decapsulated` (hook prerouting): what comes out of the device must be addressed to our own subnet.
//!
//! A rule whose packet is too short to be looked at does not match, so the chain ends with the drop and not with the
//! exceptions. Changes go through the `nft` program. The filter outlives the control plane on purpose; `ripstop
//! cleanup` removes it.
//!
//! There is no moment without the filter, and none in which it drops what a peer sends. The second takes care: a set
//! with intervals shows new elements only some time after the rules of the same transaction are in force
//! (net/netfilter/nf_tables_api.c, `nft_set_commit_update` at the end of `nf_tables_commit`), and for that time a new
//! set is empty. So elements come first and rules second, in a transaction of their own, and elements that are right
//! stay untouched.

use core::fmt::Write as _;
use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use ipnet::Ipv4Net;

use crate::lease::LeaseSet;
use crate::netconf::NetConf;
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesetMonitor;
use crate::standby;
use crate::sys::{Wake, wait_readable};

/// Name of our table, family `ip`.
pub const TABLE: &str = "ripstop";

/// A named counter of the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterCounter {
    /// Its name in nftables.
    pub name: &'static str,
    /// What it counts, for `ripstop drops`.
    pub explanation: &'static str,
}

/// All counters, in the order of the checks.
pub const COUNTERS: [FilterCounter; 8] = [
    FilterCounter {
        name: "standby_outer_destination",
        explanation: "The kernel's path received a tunnel packet for another of this node's addresses than its public IP.",
    },
    FilterCounter {
        name: "standby_truncated",
        explanation: "The kernel's path received a tunnel packet too short to hold an inner IPv4 header.",
    },
    FilterCounter {
        name: "standby_vxlan_flags",
        explanation: "The kernel's path received a VXLAN packet without a VNI, or with flags of another format.",
    },
    FilterCounter {
        name: "standby_vxlan_vni",
        explanation: "The kernel's path received a tunnel packet of another VNI: another overlay on our port.",
    },
    FilterCounter {
        name: "standby_inner_source_mac",
        explanation: "The kernel's path received a tunnel packet whose inner frame comes from a group address.",
    },
    FilterCounter {
        name: "standby_inner_ether_type",
        explanation: "The kernel's path received a tunnel packet that carries something else than IPv4.",
    },
    FilterCounter {
        name: "standby_unknown_peer",
        explanation: "The kernel's path received a tunnel packet from no peer, or with an inner source outside that peer's lease.",
    },
    FilterCounter {
        name: "standby_not_local",
        explanation: "The kernel's path decapsulated a packet whose inner destination is outside this node's subnet.",
    },
];

/// What the filter has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Our outer address.
    pub public_ip: Ipv4Addr,
    /// The tunnel's UDP port.
    pub port: u16,
    /// The tunnel's VNI.
    pub vni: u32,
    /// The VXLAN device.
    pub device: String,
    /// Our own subnet.
    pub subnet: Ipv4Net,
    /// Outer address and subnet of each peer.
    pub peers: BTreeSet<(Ipv4Addr, Ipv4Net)>,
}

impl Filter {
    /// Derives the filter from the leases.
    pub fn new(leases: &LeaseSet, conf: &NetConf) -> Self {
        Self {
            public_ip: leases.own.public_ip,
            port: conf.vxlan.port,
            vni: conf.vxlan.vni,
            device: standby::device_name(conf.vxlan.vni),
            subnet: leases.own.subnet,
            peers: leases
                .peers
                .iter()
                .map(|peer| (peer.public_ip, peer.subnet))
                .collect(),
        }
    }

    /// The transaction that puts the whole filter in the place of any other; counters start at `counts`.
    pub fn replace(&self, counts: &[Count]) -> String {
        let mut text = String::with_capacity(1024 + self.peers.len() * 48);
        // "add" so that "delete" finds something; one transaction, so nothing is visible in between.
        let _ = writeln!(
            text,
            "add table ip {TABLE}\ndelete table ip {TABLE}\ntable ip {TABLE} {{"
        );
        for counter in COUNTERS {
            let count = counts.iter().find(|count| count.name == counter.name);
            let (packets, bytes) = count.map_or((0, 0), |count| (count.packets, count.bytes));
            let _ = writeln!(
                text,
                "counter {} {{ packets {packets} bytes {bytes}; }}",
                counter.name
            );
        }
        let _ = writeln!(text, "set peers {{ {PEERS}");
        if !self.peers.is_empty() {
            let _ = write!(text, "elements = {{ ");
            write_elements(&mut text, self.peers.iter().map(element));
            let _ = writeln!(text, " }}");
        }
        let _ = writeln!(text, "}}");
        for Chain { name, hook, rules } in self.chains() {
            let hook = hook.map_or(String::new(), |hook| format!("{hook}\n"));
            let _ = writeln!(text, "chain {name} {{\n{hook}{}\n}}", rules.join("\n"));
        }
        let _ = writeln!(text, "}}");
        text
    }

    fn chains(&self) -> [Chain; 3] {
        let Self {
            public_ip,
            port,
            vni,
            device,
            subnet,
            ..
        } = self;
        let [
            other_address,
            too_short,
            flags,
            wrong_vni,
            from_group,
            not_ipv4,
            unknown,
            not_local,
        ] = COUNTERS.map(|counter| format!("counter name {} drop", counter.name));
        let tunnel = vec![
            format!("ip daddr != {public_ip} {other_address}"),
            format!("udp length < 50 {too_short}"),
            format!("@th,64,8 != 0x08 {flags}"),
            format!("@th,96,24 != {vni} {wrong_vni}"),
            format!("@th,183,1 1 {from_group}"),
            format!("@th,224,16 != 0x0800 {not_ipv4}"),
            "ip saddr . @th,336,32 @peers return".to_owned(),
            unknown,
        ];
        let standby = vec![format!("udp dport {port} jump tunnel")];
        let decapsulated = vec![format!(
            "iifname \"{device}\" ip daddr != {subnet} {not_local}"
        )];
        let chain = |name, hook, rules| Chain { name, hook, rules };
        [
            chain("tunnel", None, tunnel),
            chain(
                "standby",
                Some("type filter hook input priority -10; policy accept;"),
                standby,
            ),
            chain(
                "decapsulated",
                Some("type filter hook prerouting priority -300; policy accept;"),
                decapsulated,
            ),
        ]
    }

    /// The first of the two transactions that lead from any state to this filter: counters and peers.
    fn elements(&self, present: &Present) -> String {
        let mut text = format!("add table ip {TABLE}\n");
        for counter in COUNTERS {
            let _ = writeln!(text, "add counter ip {TABLE} {}", counter.name);
        }
        let _ = writeln!(text, "add set ip {TABLE} peers {{ {PEERS} }}");
        let wanted: BTreeSet<Element> = self.peers.iter().map(element).collect();
        write_changes(
            &mut text,
            present.elements.difference(&wanted).copied(),
            wanted.difference(&present.elements).copied(),
        );
        text
    }

    /// The second of them: the rules, and nothing of anybody else's.
    fn rules(&self, present: &Present) -> String {
        let mut text = String::new();
        for Chain { name, hook, rules } in self.chains() {
            let hook = hook.map_or(String::new(), |hook| format!(" {{ {hook} }}"));
            let _ = writeln!(text, "add chain ip {TABLE} {name}{hook}");
            let _ = writeln!(text, "flush chain ip {TABLE} {name}");
            for rule in rules {
                let _ = writeln!(text, "add rule ip {TABLE} {name} {rule}");
            }
        }
        // Chains refer to each other and to sets, so all of them are emptied first.
        let chains = || present.foreign.iter().filter(|(kind, _)| kind == "chain");
        for (_, name) in chains() {
            let _ = writeln!(text, "flush chain ip {TABLE} {name}");
        }
        let others = present.foreign.iter().filter(|(kind, _)| kind != "chain");
        for (kind, name) in chains().chain(others) {
            let _ = writeln!(text, "delete {kind} ip {TABLE} {name}");
        }
        text
    }

    /// The transaction that leads from `before` to this filter, if only the peers differ.
    pub fn update(&self, before: &Self) -> Option<String> {
        let same = Self {
            peers: BTreeSet::new(),
            ..self.clone()
        } == Self {
            peers: BTreeSet::new(),
            ..before.clone()
        };
        if !same {
            return None;
        }
        let mut text = String::new();
        write_changes(
            &mut text,
            before.peers.difference(&self.peers).map(element),
            self.peers.difference(&before.peers).map(element),
        );
        Some(text)
    }
}

/// The set of peers: outer source, and first and last inner source as numbers, for a raw payload field takes no
/// prefixes. Offsets are in bits from the start of the UDP header: UDP 8, VXLAN 8, Ethernet 14 bytes, then the inner
/// IPv4 header with its source at 12.
const PEERS: &str = "typeof ip saddr . @th,336,32; flags interval;";

type Element = (Ipv4Addr, u32, u32);

fn element((outer, subnet): &(Ipv4Addr, Ipv4Net)) -> Element {
    (
        *outer,
        subnet.network().to_bits(),
        subnet.broadcast().to_bits(),
    )
}

fn write_changes(
    text: &mut String,
    stale: impl Iterator<Item = Element>,
    missing: impl Iterator<Item = Element>,
) {
    let mut write = |verb, elements: Vec<Element>| {
        if !elements.is_empty() {
            let _ = write!(text, "{verb} element ip {TABLE} peers {{ ");
            write_elements(text, elements.into_iter());
            let _ = writeln!(text, " }}");
        }
    };
    write("delete", stale.collect());
    write("add", missing.collect());
}

fn write_elements(text: &mut String, elements: impl Iterator<Item = Element>) {
    for (index, (outer, first, last)) in elements.enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        let _ = write!(text, "{separator}{outer} . {first:#010x}-{last:#010x}");
    }
}

/// One chain of the filter.
struct Chain {
    name: &'static str,
    /// Where the kernel calls it, if it does.
    hook: Option<&'static str>,
    rules: Vec<String>,
}

/// What the kernel has in the table of our name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Present {
    elements: BTreeSet<Element>,
    /// Kind and name of what is not ours.
    foreign: Vec<(String, String)>,
}

impl Present {
    /// Looks; `None` when there is something that cannot be understood.
    fn read() -> Option<Self> {
        let output = nft(&["-j", "list", "table", "ip", TABLE], "").ok()?;
        if output.status.success() {
            Self::parse(&serde_json::from_slice(&output.stdout).ok()?)
        } else {
            Some(Self::default())
        }
    }

    fn parse(listing: &serde_json::Value) -> Option<Self> {
        let mut present = Self::default();
        for object in listing["nftables"].as_array()? {
            for (kind, content) in object.as_object()? {
                let name = content["name"].as_str().unwrap_or_default();
                let ours = match kind.as_str() {
                    "metainfo" | "table" | "rule" => true,
                    "chain" => ["tunnel", "standby", "decapsulated"].contains(&name),
                    "counter" => COUNTERS.iter().any(|counter| counter.name == name),
                    "set" => name == "peers",
                    _ => false,
                };
                if !ours {
                    present.foreign.push((kind.clone(), name.to_owned()));
                }
                if kind == "set" && ours {
                    let elements = content["elem"].as_array();
                    for element in elements.map(Vec::as_slice).unwrap_or_default() {
                        let fields = &element["concat"];
                        let bound = |index| u32::try_from(fields[1]["range"][index].as_u64()?).ok();
                        let outer = fields[0].as_str()?.parse().ok()?;
                        present.elements.insert((outer, bound(0)?, bound(1)?));
                    }
                }
            }
        }
        Some(present)
    }
}

/// A counter's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    /// Its name.
    pub name: String,
    /// Packets counted.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
}

/// Why the filter cannot be set or read.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// There is no `nft`.
    #[error(
        "peer filter: the program nft is missing: install the package nftables; until then the kernel's path decapsulates packets from anyone"
    )]
    Missing,
    /// It cannot be run.
    #[error("peer filter: run nft: {0}")]
    Run(#[from] io::Error),
    /// It refuses.
    #[error("peer filter: nft: {0}")]
    Refused(String),
}

fn nft(arguments: &[&str], input: &str) -> Result<Output, FilterError> {
    // A service's PATH may lack the directory.
    for program in ["nft", "/usr/sbin/nft"] {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(mut stdin) = child.stdin.take() {
            // nft reads all of its input before it prints anything.
            stdin.write_all(input.as_bytes())?;
        }
        return Ok(child.wait_with_output()?);
    }
    Err(FilterError::Missing)
}

fn run(arguments: &[&str], input: &str) -> Result<String, FilterError> {
    let output = nft(arguments, input)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    // The first line says what; the following ones quote the input.
    Err(FilterError::Refused(
        errors
            .lines()
            .next()
            .unwrap_or("no reason given")
            .to_owned(),
    ))
}

/// The counters, if the filter is there.
pub fn counts() -> Result<Option<Vec<Count>>, FilterError> {
    let output = nft(&["-j", "list", "counters", "table", "ip", TABLE], "")?;
    if !output.status.success() {
        return Ok(None);
    }
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| FilterError::Refused(format!("unreadable answer: {error}")))?;
    let objects = json["nftables"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let count = |object: &serde_json::Value| {
        let counter = object.get("counter")?;
        Some(Count {
            name: counter["name"].as_str()?.to_owned(),
            packets: counter["packets"].as_u64()?,
            bytes: counter["bytes"].as_u64()?,
        })
    };
    let found: Vec<Count> = objects.iter().filter_map(count).collect();
    // Some versions list no counters and succeed where there is no such table.
    Ok(if found.is_empty() { None } else { Some(found) })
}

/// Removes the filter; whether there was one.
pub fn remove() -> Result<bool, FilterError> {
    let present = nft(&["-t", "list", "table", "ip", TABLE], "")?
        .status
        .success();
    if present {
        run(&["delete", "table", "ip", TABLE], "")?;
    }
    Ok(present)
}

/// What the filter looks like apart from its elements and counts, to see whether someone changed it.
fn listing() -> Result<String, FilterError> {
    run(&["-t", "-s", "list", "table", "ip", TABLE], "")
}

/// Keeps the filter in force, on a thread of its own: a transaction of many elements takes a good part of a second,
/// during which the main loop has heartbeats to watch.
#[derive(Debug)]
pub struct FilterKeeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wanted: Mutex<Wanted>,
    wake: Wake,
}

#[derive(Debug, Default)]
struct Wanted {
    filter: Option<Filter>,
    stop: bool,
    problem: Option<String>,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long after a failure the next attempt is made.
const RETRY: Duration = Duration::from_secs(5);
/// Lets another program that writes the same table finish before the next attempt.
const CONTENTION_PAUSE: Duration = Duration::from_millis(200);
/// How often the filter is looked at without an announcement.
const RECHECK: Duration = Duration::from_secs(30);

impl FilterKeeper {
    /// Starts the thread, in the network namespace of the caller.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            wanted: Mutex::default(),
            wake: Wake::new()?,
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("filter".to_owned())
            .spawn(move || keep(&for_thread))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Says what the filter should be from here on.
    pub fn set(&self, filter: Filter) {
        let mut wanted = self.shared.lock();
        if wanted.filter.as_ref() != Some(&filter) {
            wanted.filter = Some(filter);
            self.shared.wake.signal();
        }
    }

    /// What keeps the filter from being in force, if anything.
    pub fn problem(&self) -> Option<String> {
        self.shared.lock().problem.clone()
    }
}

impl Drop for FilterKeeper {
    /// Ends the thread; the filter stays.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// What is in force, as far as we know.
#[derive(Debug)]
struct Loaded {
    filter: Filter,
    listing: String,
}

fn keep(shared: &Shared) {
    let mut monitor: Option<RulesetMonitor> = None;
    let mut loaded: Option<Loaded> = None;
    let mut checked = Instant::now();
    loop {
        // Cleared before the wish is read: one that comes later wakes the wait below.
        shared.wake.clear();
        if monitor.is_none() {
            monitor = RulesetMonitor::open(TABLE).ok();
        }
        let wanted = {
            let wanted = shared.lock();
            if wanted.stop {
                return;
            }
            wanted.filter.clone()
        };
        if let (Some(current), true) = (&loaded, checked.elapsed() >= RECHECK) {
            checked = Instant::now();
            if listing().ok().as_ref() != Some(&current.listing) {
                tracing::warn!("the peer filter was changed by another program, setting it again");
                loaded = None;
            }
        }
        let mut problem = None;
        if let Some(wanted) =
            wanted.filter(|wanted| loaded.as_ref().map(|loaded| &loaded.filter) != Some(wanted))
        {
            let mut transactions = 1;
            match load(wanted, loaded.take().as_ref()) {
                Ok((now_loaded, count)) => (loaded, transactions) = (Some(now_loaded), count),
                Err(error) => problem = Some(error.to_string()),
            }
            // Our own transactions are announced, too, as one batch each.
            let others = |monitor| drain(monitor, transactions);
            if monitor.as_mut().and_then(others) == Some(true) {
                loaded = None;
                std::thread::sleep(CONTENTION_PAUSE);
                continue;
            }
        }
        let failed = problem.is_some();
        report(shared, problem);
        let timeout = if failed { RETRY } else { RECHECK };
        match &mut monitor {
            Some(watched) => {
                let [_, announced] = wait_readable([shared.wake.as_fd(), watched.as_fd()], timeout);
                if announced {
                    match drain(watched, 0) {
                        Some(true) if loaded.is_some() => {
                            tracing::warn!(
                                "the peer filter was changed by another program, setting it again"
                            );
                            loaded = None;
                        }
                        Some(_) => {}
                        None => monitor = None,
                    }
                }
            }
            None => {
                wait_readable([shared.wake.as_fd()], timeout.min(RETRY));
            }
        }
    }
}

/// Whether more than `expected` transactions touched our table; `None` when the monitor broke.
fn drain(monitor: &mut RulesetMonitor, expected: usize) -> Option<bool> {
    match monitor.drain() {
        Ok(batches) => Some(batches > expected),
        // Too many announcements: the periodic look tells.
        Err(NetlinkError::Overrun) => Some(false),
        Err(
            NetlinkError::Open { .. }
            | NetlinkError::Io { .. }
            | NetlinkError::Dump { .. }
            | NetlinkError::Timeout,
        ) => None,
    }
}

/// Puts the filter into force, gently if possible; also says how many transactions that took.
fn load(wanted: Filter, before: Option<&Loaded>) -> Result<(Loaded, usize), FilterError> {
    let start = Instant::now();
    let mut transactions = 0;
    let mut commit = |text: &str| {
        run(&["-f", "-"], text)?;
        transactions += 1;
        Ok::<_, FilterError>(())
    };
    let update = before.and_then(|before| wanted.update(&before.filter));
    // An update fails where another program has taken an element.
    let updated = update.is_some_and(|update| commit(&update).is_ok());
    if !updated {
        let in_two_steps = Present::read().is_some_and(|present| {
            commit(&wanted.elements(&present)).is_ok() && commit(&wanted.rules(&present)).is_ok()
        });
        // Something of another kind stands under one of our names: away with all of it.
        if !in_two_steps {
            let counts = counts().ok().flatten().unwrap_or_default();
            commit(&wanted.replace(&counts))?;
        }
    }
    let listing = listing()?;
    tracing::info!(
        peers = wanted.peers.len(),
        whole = !updated,
        took_ms = start.elapsed().as_millis(),
        "peer filter set"
    );
    let loaded = Loaded {
        filter: wanted,
        listing,
    };
    Ok((loaded, transactions))
}

fn report(shared: &Shared, problem: Option<String>) {
    let mut wanted = shared.lock();
    if wanted.problem != problem {
        match &problem {
            Some(problem) => tracing::warn!("{problem}"),
            None => tracing::info!("the peer filter is in force again"),
        }
        wanted.problem = problem;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(peers: &[(&str, &str)]) -> Filter {
        Filter {
            public_ip: Ipv4Addr::new(10, 199, 0, 1),
            port: 8472,
            vni: 1,
            device: "flannel.1".to_owned(),
            subnet: "10.244.1.0/24".parse().unwrap(),
            peers: peers
                .iter()
                .map(|(ip, net)| (ip.parse().unwrap(), net.parse().unwrap()))
                .collect(),
        }
    }

    #[test]
    fn only_peers_are_updated_in_place() {
        let before = filter(&[
            ("10.199.0.2", "10.244.2.0/24"),
            ("10.199.0.3", "10.244.3.0/24"),
        ]);
        let after = filter(&[
            ("10.199.0.2", "10.244.2.0/24"),
            ("10.199.0.3", "10.244.4.0/23"),
        ]);
        assert_eq!(
            after.update(&before).unwrap(),
            "delete element ip ripstop peers { 10.199.0.3 . 0x0af40300-0x0af403ff }\n\
             add element ip ripstop peers { 10.199.0.3 . 0x0af40400-0x0af405ff }\n"
        );
        assert_eq!(after.update(&after).unwrap(), "");
        let mut other = after.clone();
        other.vni = 2;
        assert_eq!(other.update(&after), None);
    }

    #[test]
    fn elements_come_first_and_only_those_that_are_missing() {
        let wanted = filter(&[
            ("10.199.0.2", "10.244.2.0/24"),
            ("10.199.0.3", "10.244.3.0/24"),
        ]);
        let listing = serde_json::json!({ "nftables": [
            { "metainfo": {} },
            { "table": { "name": "ripstop" } },
            { "counter": { "name": "standby_unknown_peer" } },
            { "counter": { "name": "somebodys" } },
            { "chain": { "name": "tunnel" } },
            { "chain": { "name": "side_door" } },
            { "set": { "name": "peers", "elem": [
                { "concat": ["10.199.0.2", { "range": [0x0af4_0200, 0x0af4_02ff] }] },
                { "concat": ["10.199.0.9", { "range": [0x0af4_0900, 0x0af4_09ff] }] },
            ] } },
            { "rule": { "chain": "tunnel" } },
        ] });
        let present = Present::parse(&listing).unwrap();
        let elements = wanted.elements(&present);
        assert!(
            elements.ends_with(
                "delete element ip ripstop peers { 10.199.0.9 . 0x0af40900-0x0af409ff }\n\
                 add element ip ripstop peers { 10.199.0.3 . 0x0af40300-0x0af403ff }\n"
            ),
            "{elements}"
        );
        let rules = wanted.rules(&present);
        assert!(
            rules.ends_with(
                "flush chain ip ripstop side_door\n\
                 delete chain ip ripstop side_door\n\
                 delete counter ip ripstop somebodys\n"
            ),
            "{rules}"
        );
        assert!(!rules.contains("element"), "{rules}");
        let unknown = serde_json::json!({ "nftables": [
            { "set": { "name": "peers", "elem": ["10.199.0.2"] } },
        ] });
        assert_eq!(Present::parse(&unknown), None);
    }

    #[test]
    fn the_whole_text_holds_every_check() {
        let count = Count {
            name: "standby_unknown_peer".to_owned(),
            packets: 3,
            bytes: 300,
        };
        let text = filter(&[("10.199.0.2", "10.244.2.0/24")]).replace(&[count]);
        for part in [
            "delete table ip ripstop",
            "counter standby_unknown_peer { packets 3 bytes 300; }",
            "elements = { 10.199.0.2 . 0x0af40200-0x0af402ff }",
            "ip daddr != 10.199.0.1 counter name standby_outer_destination drop",
            "udp dport 8472 jump tunnel",
            "iifname \"flannel.1\" ip daddr != 10.244.1.0/24",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert!(!filter(&[]).replace(&[]).contains("elements"));
    }
}
