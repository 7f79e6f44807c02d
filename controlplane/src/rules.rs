//! The standby's peer filter: only peers may tunnel into the kernel's tunnel devices.
//!
//! A tunnel device decapsulates from anyone. The workers check every packet; the kernel's path is given the same
//! checks by nftables, in a table of our own for each family:
//!
//! - `standby` (hook input, behind defragmentation): a tunnel packet must be addressed to our public address, have the
//!   form of our tunnel (with VXLAN: our VNI, and IP of the family from a single sender), and come from a pair of outer
//!   and inner source that is in the set `peers`.
//! - `decapsulated` (hook prerouting): what comes out of the device must be addressed to our own subnet.
//!
//! Packets of direct peers come without a tunnel: they are routed as any others, and none of this concerns them.
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
use core::net::IpAddr;
use core::time::Duration;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::process::Output;
use std::time::Instant;

use ipnet::IpNet;

use crate::family::{Family, PerFamily};
use crate::guard::{self, Guard};
use crate::keeper::{Desk, Keeper};
use crate::lease::LeaseSet;
use crate::netconf::{Backend, NetConf};
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesetMonitor;
use crate::standby;
use crate::sys::{run_program, wait_readable};

/// Name of our tables, families `ip` and `ip6`.
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
pub const COUNTERS: [FilterCounter; 9] = [
    FilterCounter {
        name: "standby_outer_destination",
        explanation: "The kernel's path received a tunnel packet for another of this node's addresses than its public IP.",
    },
    FilterCounter {
        name: "standby_truncated",
        explanation: "The kernel's path received a tunnel packet too short to hold an inner IP header.",
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
        explanation: "The kernel's path received a tunnel packet that carries something else than IP of its device's family.",
    },
    FilterCounter {
        name: "standby_other_tunnel",
        explanation: "The kernel's path received IP in IP without the UDP header that the udp backend has.",
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

/// What the filter has to say: a table for each family that has a tunnel, and the guard's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// The tables.
    pub tables: PerFamily<Option<Table>>,
    /// The guard, unless it is off.
    pub guard: Option<Guard>,
}

/// The filter of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which.
    pub family: Family,
    /// Our outer address.
    pub public_ip: IpAddr,
    /// What tunnel packets look like.
    pub tunnel: Tunnel,
    /// The tunnel device.
    pub device: String,
    /// Our own subnet.
    pub subnet: IpNet,
    /// Outer address and subnet of each peer.
    pub peers: BTreeSet<(IpAddr, IpNet)>,
}

/// What tunnel packets look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// VXLAN.
    Vxlan {
        /// UDP port.
        port: u16,
        /// Network identifier.
        vni: u32,
        /// Packets may carry a policy.
        gbp: bool,
    },
    /// IP in IP.
    Ipip,
    /// IP in UDP.
    Udp {
        /// UDP port.
        port: u16,
    },
}

impl Filter {
    /// Derives the filter from the leases, without a guard.
    pub fn new(leases: &LeaseSet, conf: &NetConf) -> Self {
        let tunnel = match conf.backend {
            Backend::Vxlan(vxlan) => Tunnel::Vxlan {
                port: vxlan.port,
                vni: vxlan.vni,
                gbp: vxlan.gbp,
            },
            Backend::Ipip { .. } => Tunnel::Ipip,
            Backend::Udp { port } => Tunnel::Udp { port },
            Backend::Alloc | Backend::HostGw => return Self::default(),
        };
        let table = |family| {
            let own = leases.own(family)?;
            Some(Table {
                family,
                public_ip: own.public_ip,
                tunnel,
                device: standby::device_name(conf.backend, family)?,
                subnet: own.subnet,
                peers: leases
                    .peers(family)
                    .map(|peer| (peer.public_ip, peer.subnet))
                    .collect(),
            })
        };
        Self {
            tables: PerFamily {
                v4: table(Family::V4),
                v6: table(Family::V6),
            },
            guard: None,
        }
    }

    fn table(&self, family: Family) -> Option<&Table> {
        self.tables.get(family).as_ref()
    }
}

/// The words of a table in nftables.
fn place(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip ripstop",
        Family::V6 => "ip6 ripstop",
    }
}

impl Table {
    fn place(&self) -> &'static str {
        place(self.family)
    }

    /// Bits from the start of the transport header to the inner IP header.
    fn inner(&self) -> u32 {
        match self.tunnel {
            // UDP 8, VXLAN 8, Ethernet 14 bytes.
            Tunnel::Vxlan { .. } => 30 * 8,
            Tunnel::Ipip => 0,
            Tunnel::Udp { .. } => 8 * 8,
        }
    }

    /// The inner source address as a raw payload field.
    fn inner_source(&self) -> String {
        let inner = self.inner();
        match self.family {
            Family::V4 => format!("@th,{},32", inner + 12 * 8),
            Family::V6 => format!("@th,{},128", inner + 8 * 8),
        }
    }

    /// The set of peers: outer source, and first and last inner source as numbers, for a raw payload field takes no
    /// prefixes.
    fn peers_type(&self) -> String {
        let Self { family, .. } = self;
        let source = match family {
            Family::V4 => "ip saddr",
            Family::V6 => "ip6 saddr",
        };
        format!("typeof {source} . {}; flags interval;", self.inner_source())
    }

    /// The transaction that puts the whole table in the place of any other; counters start at `counts`.
    pub fn replace(&self, counts: &[Count]) -> String {
        let mut text = String::with_capacity(1024 + self.peers.len() * 48);
        let place = self.place();
        // "add" so that "delete" finds something; one transaction, so nothing is visible in between.
        let _ = writeln!(
            text,
            "add table {place}\ndelete table {place}\ntable {place} {{"
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
        let _ = writeln!(text, "set peers {{ {}", self.peers_type());
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
            family,
            public_ip,
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
            not_ip,
            other_tunnel,
            unknown,
            not_local,
        ] = COUNTERS.map(|counter| format!("counter name {} drop", counter.name));
        let (ip, header, version, ether_type) = match family {
            Family::V4 => ("ip", 20, "0x40", "0x0800"),
            Family::V6 => ("ip6", 40, "0x60", "0x86dd"),
        };
        let inner = self.inner();
        let shortest = inner / 8 + header;
        let mut tunnel = Vec::new();
        let standby = match self.tunnel {
            Tunnel::Vxlan { port, vni, gbp } => {
                let allowed = if gbp { "{ 0x08, 0x88 }" } else { "0x08" };
                tunnel.extend([
                    format!("{ip} daddr != {public_ip} {other_address}"),
                    format!("udp length < {shortest} {too_short}"),
                    format!("@th,64,8 != {allowed} {flags}"),
                    format!("@th,96,24 != {vni} {wrong_vni}"),
                    format!("@th,183,1 1 {from_group}"),
                    format!("@th,224,16 != {ether_type} {not_ip}"),
                ]);
                vec![format!("udp dport {port} jump tunnel")]
            }
            // Another address of ours may be the end of somebody else's tunnel.
            Tunnel::Ipip => {
                tunnel.extend([
                    format!("ip length < {} {too_short}", header + shortest),
                    format!("@th,0,8 & 0xf0 != {version} {not_ip}"),
                ]);
                vec![format!("ip protocol 4 ip daddr {public_ip} jump tunnel")]
            }
            Tunnel::Udp { port } => {
                tunnel.extend([
                    format!("{ip} daddr != {public_ip} {other_address}"),
                    format!("udp length < {shortest} {too_short}"),
                    format!("@th,64,8 & 0xf0 != {version} {not_ip}"),
                ]);
                vec![
                    format!("udp dport {port} jump tunnel"),
                    // The device would take it without the UDP header, too.
                    format!("ip protocol 4 ip daddr {public_ip} {other_tunnel}"),
                ]
            }
        };
        tunnel.push(format!(
            "{ip} saddr . {} @peers return",
            self.inner_source()
        ));
        tunnel.push(unknown);
        let decapsulated = vec![format!(
            "iifname \"{device}\" {ip} daddr != {subnet} {not_local}"
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

    /// The first of the two transactions that lead from any state to this table: counters and peers.
    fn elements(&self, present: &Present) -> String {
        let place = self.place();
        let mut text = format!("add table {place}\n");
        for counter in COUNTERS {
            let _ = writeln!(text, "add counter {place} {}", counter.name);
        }
        let _ = writeln!(text, "add set {place} peers {{ {} }}", self.peers_type());
        let wanted: BTreeSet<Element> = self.peers.iter().map(element).collect();
        write_changes(
            &mut text,
            place,
            present.elements.difference(&wanted).copied(),
            wanted.difference(&present.elements).copied(),
        );
        text
    }

    /// The second of them: the rules, and nothing of anybody else's.
    fn rules(&self, present: &Present) -> String {
        let place = self.place();
        let mut text = String::new();
        for Chain { name, hook, rules } in self.chains() {
            let hook = hook.map_or(String::new(), |hook| format!(" {{ {hook} }}"));
            let _ = writeln!(text, "add chain {place} {name}{hook}");
            let _ = writeln!(text, "flush chain {place} {name}");
            for rule in rules {
                let _ = writeln!(text, "add rule {place} {name} {rule}");
            }
        }
        // Chains refer to each other and to sets, so all of them are emptied first.
        let chains = || present.foreign.iter().filter(|(kind, _)| kind == "chain");
        for (_, name) in chains() {
            let _ = writeln!(text, "flush chain {place} {name}");
        }
        let others = present.foreign.iter().filter(|(kind, _)| kind != "chain");
        for (kind, name) in chains().chain(others) {
            let _ = writeln!(text, "delete {kind} {place} {name}");
        }
        text
    }

    /// The transaction that leads from `before` to this table, if only the peers differ.
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
            self.place(),
            before.peers.difference(&self.peers).map(element),
            self.peers.difference(&before.peers).map(element),
        );
        Some(text)
    }
}

/// Outer source, first and last inner source.
type Element = (IpAddr, u128, u128);

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn element((outer, subnet): &(IpAddr, IpNet)) -> Element {
    (*outer, number(subnet.network()), number(subnet.broadcast()))
}

fn write_changes(
    text: &mut String,
    place: &str,
    stale: impl Iterator<Item = Element>,
    missing: impl Iterator<Item = Element>,
) {
    let mut write = |verb, elements: Vec<Element>| {
        if !elements.is_empty() {
            let _ = write!(text, "{verb} element {place} peers {{ ");
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
        let width = if outer.is_ipv4() { 10 } else { 34 };
        let _ = write!(
            text,
            "{separator}{outer} . {first:#0width$x}-{last:#0width$x}"
        );
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
    fn read(family: Family) -> Option<Self> {
        let output = nft(&list(place(family), &["-j"]), "").ok()?;
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
                        let bound = |index: usize| bound(&fields[1]["range"][index]);
                        let outer = fields[0].as_str()?.parse().ok()?;
                        present.elements.insert((outer, bound(0)?, bound(1)?));
                    }
                }
            }
        }
        Some(present)
    }
}

/// Reads a number, which nft writes as text where it does not fit 64 bits.
fn bound(value: &serde_json::Value) -> Option<u128> {
    match value.as_u64() {
        Some(number) => Some(number.into()),
        None => u128::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok(),
    }
}

/// The arguments that list a table, given by family and name.
fn list(place: &'static str, options: &[&'static str]) -> Vec<&'static str> {
    let words = place.split(' ');
    let command = options.iter().copied().chain(["list", "table"]);
    command.chain(words).collect()
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
        "peer filter: the program nft is missing: install the package nftables; until then the kernel's path decapsulates packets from anyone, and pods can send in the name of nodes"
    )]
    Missing,
    /// It cannot be run.
    #[error("peer filter: run nft: {0}")]
    Run(#[from] io::Error),
    /// It refuses.
    #[error("peer filter: nft: {0}")]
    Refused(String),
    /// It refuses the guard, which alone needs the kernel's `fib` expression.
    #[error(
        "guard: nft: {0}: does the kernel have nft_fib_inet (CONFIG_NFT_FIB_INET)? Until then pods can send in the name of nodes; --guard off accepts that"
    )]
    Guard(String),
}

fn nft(arguments: &[&str], input: &str) -> Result<Output, FilterError> {
    run_program("nft", arguments, input).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            FilterError::Missing
        } else {
            error.into()
        }
    })
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

/// The counters of both families' tables together, if one of them is there.
pub fn counts() -> Result<Option<Vec<Count>>, FilterError> {
    let mut sums: Option<Vec<Count>> = None;
    for family in Family::ALL {
        for count in counts_in(place(family))?.unwrap_or_default() {
            let sums = sums.get_or_insert_default();
            match sums.iter_mut().find(|sum| sum.name == count.name) {
                Some(sum) => {
                    sum.packets = sum.packets.saturating_add(count.packets);
                    sum.bytes = sum.bytes.saturating_add(count.bytes);
                }
                None => sums.push(count),
            }
        }
    }
    Ok(sums)
}

/// The guard's counter, if the guard is there.
pub fn guard_count() -> Result<Option<Count>, FilterError> {
    let counts = counts_in(guard::PLACE)?.unwrap_or_default();
    Ok(counts
        .into_iter()
        .find(|count| count.name == guard::COUNTER.name))
}

/// The counters of one table, if it is there.
fn counts_in(place: &'static str) -> Result<Option<Vec<Count>>, FilterError> {
    let listing = list(place, &[]);
    let output = nft(&[&["-j", "list", "counters"], &listing[1..]].concat(), "")?;
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

/// Removes a table; whether there was one.
fn remove_table(place: &'static str) -> Result<bool, FilterError> {
    let present = nft(&list(place, &["-t"]), "")?.status.success();
    if present {
        run(&["-f", "-"], &format!("delete table {place}\n"))?;
    }
    Ok(present)
}

/// Removes the guard; whether there was one.
pub fn remove_guard() -> Result<bool, FilterError> {
    remove_table(guard::PLACE)
}

/// Removes the filter; whether there was one.
pub fn remove() -> Result<bool, FilterError> {
    let mut present = false;
    for family in Family::ALL {
        present |= remove_table(place(family))?;
    }
    Ok(present)
}

/// What the tables look like apart from their elements and counts, to see whether someone changed them.
fn listing(filter: &Filter) -> Result<String, FilterError> {
    let mut text = String::new();
    for (family, table) in filter.tables.iter() {
        if table.is_some() {
            text += &run(&list(place(family), &["-t", "-s"]), "")?;
        }
    }
    if filter.guard.is_some() {
        text += &run(&list(guard::PLACE, &["-t", "-s"]), "")?;
    }
    Ok(text)
}

/// Keeps the filter in force, on a thread of its own: a transaction of many elements takes a good part of a second,
/// during which the main loop has heartbeats to watch.
#[derive(Debug)]
pub struct FilterKeeper(Keeper<Filter>);

/// How long after a failure the next attempt is made.
const RETRY: Duration = Duration::from_secs(5);
/// Lets another program that writes the same table finish before the next attempt.
const CONTENTION_PAUSE: Duration = Duration::from_millis(200);
/// How often the filter is looked at without an announcement.
const RECHECK: Duration = Duration::from_secs(30);

impl FilterKeeper {
    /// Starts the thread, in the network namespace of the caller. It ends with the value; the filter stays.
    pub fn start() -> io::Result<Self> {
        Keeper::start("filter", keep).map(Self)
    }

    /// Says what the filter should be from here on.
    pub fn set(&self, filter: Filter) {
        self.0.set(filter);
    }

    /// Says what the guard should be from here on; the filter must have been set before.
    pub fn set_guard(&self, guard: Option<Guard>) {
        self.0.change(|filter| match filter {
            Some(filter) if filter.guard != guard => {
                filter.guard = guard;
                true
            }
            Some(_) | None => false,
        });
    }

    /// What keeps the filter or the guard from being in force, if anything.
    pub fn problem(&self) -> Option<String> {
        self.0.problems().pop()
    }
}

/// What is in force, as far as we know.
#[derive(Debug)]
struct Loaded {
    filter: Filter,
    listing: String,
}

fn keep(desk: &Desk<Filter>) {
    let mut monitor: Option<RulesetMonitor> = None;
    let mut loaded: Option<Loaded> = None;
    let mut checked = Instant::now();
    while let Some(wanted) = desk.wanted() {
        if monitor.is_none() {
            monitor = RulesetMonitor::open(&[TABLE, guard::TABLE]).ok();
        }
        if let (Some(current), true) = (&loaded, checked.elapsed() >= RECHECK) {
            checked = Instant::now();
            if listing(&current.filter).ok().as_ref() != Some(&current.listing) {
                tracing::warn!("the peer filter was changed by another program, setting it again");
                loaded = None;
            }
        }
        let mut problem = None;
        if let Some(wanted) =
            wanted.filter(|wanted| loaded.as_ref().map(|loaded| &loaded.filter) != Some(wanted))
        {
            let mut transactions = 0;
            match load(wanted, loaded.take().as_ref(), &mut transactions) {
                Ok((now_loaded, error)) => {
                    loaded = Some(now_loaded);
                    problem = error.map(|error| error.to_string());
                }
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
        report(desk, problem);
        let timeout = if failed { RETRY } else { RECHECK };
        match &mut monitor {
            Some(watched) => {
                let [_, announced] = wait_readable([desk.wake.as_fd(), watched.as_fd()], timeout);
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
                wait_readable([desk.wake.as_fd()], timeout.min(RETRY));
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

/// Puts filter and guard into force, gently if possible, and counts transactions. A guard that cannot be had does not
/// stop the filter: what was loaded is then without one, beside the reason.
fn load(
    mut wanted: Filter,
    before: Option<&Loaded>,
    transactions: &mut usize,
) -> Result<(Loaded, Option<FilterError>), FilterError> {
    let start = Instant::now();
    let already = *transactions;
    let mut whole = false;
    for (family, table) in wanted.tables.iter() {
        match table {
            Some(table) => {
                let before = before.and_then(|before| before.filter.table(family));
                whole |= !load_table(table, before, transactions)?;
            }
            // Known to be away, or another backend's.
            None if before.is_some_and(|before| before.filter.table(family).is_none()) => {}
            None => *transactions += usize::from(remove_table(place(family))?),
        }
    }
    let guarded = load_guard(wanted.guard.as_ref(), before, transactions);
    if guarded.is_err() {
        wanted.guard = None;
    }
    let listing = listing(&wanted)?;
    if *transactions > already {
        tracing::info!(
            peers = wanted
                .tables
                .iter()
                .filter_map(|(_, table)| Some(table.as_ref()?.peers.len()))
                .sum::<usize>(),
            guarded = ?wanted.guard.as_ref().map(|guard| &guard.interfaces),
            whole,
            took_ms = start.elapsed().as_millis(),
            "peer filter set"
        );
    }
    let loaded = Loaded {
        filter: wanted,
        listing,
    };
    Ok((loaded, guarded.err()))
}

/// Puts the guard into force, or away.
fn load_guard(
    wanted: Option<&Guard>,
    before: Option<&Loaded>,
    transactions: &mut usize,
) -> Result<(), FilterError> {
    let before = before.map(|before| before.filter.guard.as_ref());
    let Some(wanted) = wanted else {
        if before != Some(None) {
            *transactions += usize::from(remove_guard()?);
        }
        return Ok(());
    };
    if let Some(Some(before)) = before {
        let update = wanted.update(before);
        // An update fails where another program has taken an element.
        if update.is_empty() {
            return Ok(());
        }
        if run(&["-f", "-"], &update).is_ok() {
            *transactions += 1;
            return Ok(());
        }
    }
    let text = wanted.replace(guard_count()?.as_ref());
    run(&["-f", "-"], &text).map_err(|error| match error {
        FilterError::Refused(reason) => FilterError::Guard(reason),
        other @ (FilterError::Missing | FilterError::Run(_) | FilterError::Guard(_)) => other,
    })?;
    *transactions += 1;
    Ok(())
}

/// Puts one table into force; whether changing its elements was enough.
fn load_table(
    wanted: &Table,
    before: Option<&Table>,
    transactions: &mut usize,
) -> Result<bool, FilterError> {
    let mut commit = |text: &str| {
        // Nothing to change: the kernel would announce nothing, either.
        if !text.is_empty() {
            run(&["-f", "-"], text)?;
            *transactions += 1;
        }
        Ok::<_, FilterError>(())
    };
    let update = before.and_then(|before| wanted.update(before));
    // An update fails where another program has taken an element.
    if update.is_some_and(|update| commit(&update).is_ok()) {
        return Ok(true);
    }
    let in_two_steps = Present::read(wanted.family).is_some_and(|present| {
        commit(&wanted.elements(&present)).is_ok() && commit(&wanted.rules(&present)).is_ok()
    });
    // Something of another kind stands under one of our names: away with all of it.
    if !in_two_steps {
        let counts = counts_in(place(wanted.family))
            .ok()
            .flatten()
            .unwrap_or_default();
        commit(&wanted.replace(&counts))?;
    }
    Ok(false)
}

fn report(desk: &Desk<Filter>, problem: Option<String>) {
    if desk.report(Vec::from_iter(problem.clone())) {
        match problem {
            Some(problem) => tracing::warn!("{problem}"),
            None => tracing::info!("peer filter and guard are in force again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(peers: &[(&str, &str)]) -> Table {
        Table {
            family: Family::V4,
            public_ip: "10.199.0.1".parse().unwrap(),
            tunnel: Tunnel::Vxlan {
                port: 8472,
                vni: 1,
                gbp: false,
            },
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
        other.tunnel = Tunnel::Ipip;
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

    #[test]
    fn every_backend_has_its_checks() {
        let table = |tunnel| Table {
            tunnel,
            ..filter(&[("10.199.0.2", "10.244.2.0/24")])
        };
        let gbp = Tunnel::Vxlan {
            port: 4789,
            vni: 7,
            gbp: true,
        };
        let six = Table {
            family: Family::V6,
            public_ip: "fd00:199::1".parse().unwrap(),
            device: "flannel-v6.1".to_owned(),
            subnet: "fd00:10:244:1::/64".parse().unwrap(),
            peers: [(
                "fd00:199::2".parse().unwrap(),
                "fd00:10:244:2::/64".parse().unwrap(),
            )]
            .into(),
            ..filter(&[])
        };
        let cases: [(Table, &[&str]); 4] = [
            (
                table(gbp),
                &[
                    "udp dport 4789",
                    "@th,64,8 != { 0x08, 0x88 }",
                    "@th,96,24 != 7",
                ],
            ),
            (
                table(Tunnel::Ipip),
                &[
                    "ip protocol 4 ip daddr 10.199.0.1 jump tunnel",
                    "ip length < 40",
                    "@th,0,8 & 0xf0 != 0x40",
                    "ip saddr . @th,96,32 @peers return",
                    "elements = { 10.199.0.2 . 0x0af40200-0x0af402ff }",
                ],
            ),
            (
                table(Tunnel::Udp { port: 8285 }),
                &[
                    "udp dport 8285 jump tunnel",
                    "udp length < 28",
                    "@th,64,8 & 0xf0 != 0x40",
                    "ip saddr . @th,160,32 @peers return",
                    "ip protocol 4 ip daddr 10.199.0.1 counter name standby_other_tunnel drop",
                ],
            ),
            (
                six,
                &[
                    "delete table ip6 ripstop",
                    "ip6 daddr != fd00:199::1",
                    "udp length < 70",
                    "@th,224,16 != 0x86dd",
                    "ip6 saddr . @th,304,128 @peers return",
                    "fd00:199::2 . 0xfd000010024400020000000000000000-0xfd00001002440002ffffffffffffffff",
                    "iifname \"flannel-v6.1\" ip6 daddr != fd00:10:244:1::/64",
                ],
            ),
        ];
        for (table, parts) in cases {
            let text = table.replace(&[]);
            for part in parts {
                assert!(text.contains(part), "{part:?} is not in {text}");
            }
        }
    }
}
