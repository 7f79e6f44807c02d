//! Masquerade and forward rules, with the meaning that flannel's rules in iptables have.
//!
//! A pod that talks to somebody outside the pod network does so in the name of its node, and forwarded packets of pods
//! are accepted. What the rules say is decided here, once (`Rule`); `iptables.rs` and `nft.rs` only write it down,
//! so that both modes mean the same.
//!
//! Everything is compared before it is changed, and changed in one transaction that empties and fills a chain, never in
//! two: a flow that begins in a moment without masquerade would be without for as long as it lives. The rules outlive
//! the process on purpose; `ripstop cleanup` removes them. No rule asks connection tracking anything, so what pods send
//! to pods by the workers does not depend on it.

use core::time::Duration;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::family::{Family, PerFamily};
use crate::keeper::{self, Desk};
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesetMonitor;
use crate::problems::Problems;
use crate::sys::wait_readable;

pub mod blackhole;
mod iptables;
mod nft;

use iptables::Iptables;
use nft::Nft;

/// Who holds the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// nftables, in tables of flannel's names.
    Nftables,
    /// iptables, in chains of flannel's names.
    Iptables,
}

impl Mode {
    /// What `EnableNFTables` asks for; without iptables, nftables in any case.
    pub fn choose(enable_nftables: bool) -> Self {
        if enable_nftables {
            return Self::Nftables;
        }
        if iptables::is_installed() {
            return Self::Iptables;
        }
        tracing::warn!(
            "iptables is not installed: masquerade and forward rules are kept in nftables; set \"EnableNFTables\": true if that is meant"
        );
        Self::Nftables
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// What the operator configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Who holds the rules.
    pub mode: Mode,
    /// Pods talk to the outside in the name of their node.
    pub masquerade: bool,
    /// Forwarded packets from and to pods are accepted.
    pub forward: bool,
    /// Masqueraded flows get random ports, where that can be had.
    pub random_fully: bool,
    /// Destinations that pods reach with their own address.
    pub no_masquerade: Vec<IpNet>,
    /// How often the rules are looked at without an announcement.
    pub resync: Duration,
    /// There is a route that refuses what is for no pod.
    pub blackhole: bool,
}

/// The pods of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Networks {
    /// All nodes' pods.
    pub network: IpNet,
    /// This node's.
    pub subnet: IpNet,
}

/// What the rules should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// There is a masquerade chain.
    pub masquerade: bool,
    /// There is a forward chain.
    pub forward: bool,
    /// Masqueraded flows get random ports, where that can be had.
    pub random_fully: bool,
    /// The pods; none of a family that is off.
    pub families: PerFamily<Option<Networks>>,
    /// Destinations that pods reach with their own address, of either family.
    pub no_masquerade: Vec<IpNet>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It leaves the chain as it is.
    Return,
    /// It gets the address of the interface that it leaves by.
    Masquerade,
    /// It passes.
    Accept,
}

/// Addresses inside a prefix, or all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Match {
    inside: bool,
    net: IpNet,
}

/// One rule of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    /// Only packets that kube-proxy has marked for masquerading ([`MARK`]): that is its own business.
    marked: bool,
    source: Option<Match>,
    destination: Option<Match>,
    verdict: Verdict,
}

/// The bit of a packet's mark by which kube-proxy marks what it masquerades itself.
const MARK: u32 = 0x4000;

/// What is not sent to a single receiver, and keeps its source therefore.
fn multicast(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::new_assert([224, 0, 0, 0].into(), 4),
        Family::V6 => IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    }
}

impl Wanted {
    /// The rules of a family's masquerade chain, in their order; empty where there is to be none.
    fn masquerade(&self, family: Family) -> Vec<Rule> {
        let (true, Some(Networks { network, subnet })) =
            (self.masquerade, self.families.get(family))
        else {
            return Vec::new();
        };
        let within = |net: &IpNet| {
            let net = net.trunc();
            Some(Match { inside: true, net })
        };
        let outside = |net: &IpNet| {
            let net = net.trunc();
            Some(Match { inside: false, net })
        };
        let rule = |source, destination, verdict| Rule {
            marked: false,
            source,
            destination,
            verdict,
        };
        let mut rules = vec![
            Rule {
                marked: true,
                ..rule(None, None, Verdict::Return)
            },
            rule(within(subnet), within(network), Verdict::Return),
            rule(within(network), within(subnet), Verdict::Return),
            // Who comes from outside to a pod of ours keeps its address.
            rule(outside(network), within(subnet), Verdict::Return),
        ];
        let mut exempt: Vec<IpNet> = self.no_masquerade.iter().map(IpNet::trunc).collect();
        exempt.retain(|net| Family::of_net(*net) == family);
        exempt.sort_unstable();
        exempt.dedup();
        rules.extend(exempt.iter().map(|net| {
            // A prefix of no bits is no condition, and is not listed as one.
            let destination = within(net).filter(|_| net.prefix_len() > 0);
            rule(within(network), destination, Verdict::Return)
        }));
        rules.extend([
            rule(
                within(network),
                outside(&multicast(family)),
                Verdict::Masquerade,
            ),
            // The node's own, and what it forwards: the answer of another node's pod must come back by this one.
            rule(outside(network), within(network), Verdict::Masquerade),
        ]);
        rules
    }

    /// The rules of a family's forward chain, in their order; empty where there is to be none.
    fn forward(&self, family: Family) -> Vec<Rule> {
        let (true, Some(Networks { network, .. })) = (self.forward, self.families.get(family))
        else {
            return Vec::new();
        };
        let within = Some(Match {
            inside: true,
            net: network.trunc(),
        });
        let accept = |source, destination| Rule {
            marked: false,
            source,
            destination,
            verdict: Verdict::Accept,
        };
        vec![accept(within, None), accept(None, within)]
    }
}

/// Why rules cannot be set or read.
#[derive(Debug, thiserror::Error)]
pub enum TrafficError {
    /// A program is not installed.
    #[error("{program} is not installed, it is in the package {package}")]
    Missing {
        /// Its name.
        program: &'static str,
        /// Where it is from.
        package: &'static str,
    },
    /// It cannot be run.
    #[error("run {program}: {source}")]
    Run {
        /// Its name.
        program: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// It refuses.
    #[error("{program}: {reason}")]
    Refused {
        /// Its name.
        program: &'static str,
        /// Its first line.
        reason: String,
    },
}

impl TrafficError {
    fn run(program: &'static str, package: &'static str, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound {
            Self::Missing { program, package }
        } else {
            Self::Run { program, source }
        }
    }

    fn refused(program: &'static str, errors: &[u8]) -> Self {
        let errors = String::from_utf8_lossy(errors);
        let reason = errors.lines().find(|line| !line.trim().is_empty());
        Self::Refused {
            program,
            // The first line says what; the following ones quote the input.
            reason: reason.unwrap_or("no reason given").to_owned(),
        }
    }
}

/// Removes all rules of both modes, of both families; what was removed.
pub fn remove() -> (Vec<String>, Vec<TrafficError>) {
    let (mut removed, mut errors) = (Vec::new(), Vec::new());
    let nothing = Wanted::default();
    let (mut nft, mut iptables) = (Nft::default(), Iptables::default());
    let mut elsewhere = Iptables::elsewhere();
    for family in Family::ALL {
        let mut results = vec![
            (nft::place(family), nft.keep(family, &nothing)),
            (iptables::place(family), iptables.keep(family, &nothing)),
        ];
        if let Some(elsewhere) = &mut elsewhere {
            results.push((iptables::place(family), elsewhere.keep(family, &nothing)));
        }
        for (what, result) in results {
            match result {
                Ok(true) => removed.push(format!("masquerade and forward rules ({what})")),
                Ok(false) => {}
                Err(error) => errors.push(error),
            }
        }
    }
    (removed, errors)
}

/// Keeps the rules in force, on a thread of its own: programs are called, and one of them may wait for others.
#[derive(Debug)]
pub struct Keeper(keeper::Keeper<Wanted>);

/// How long after a failure the next attempt is made.
const RETRY: Duration = Duration::from_secs(1);
/// Lets another program that writes the same table finish before the next look.
const CONTENTION_PAUSE: Duration = Duration::from_millis(50);

impl Keeper {
    /// Starts the thread, in the network namespace of the caller; it ends with the value, and the rules stay. Nothing is
    /// touched before [`Self::set`].
    pub fn start(mode: Mode, resync: Duration) -> io::Result<Self> {
        keeper::Keeper::start("traffic", move |desk| keep(desk, mode, resync)).map(Self)
    }

    /// Says what the rules should be from here on.
    pub fn set(&self, wanted: Wanted) {
        self.0.set(wanted);
    }

    /// What keeps the rules from being in force, and what else is wrong.
    pub fn problems(&self) -> Vec<String> {
        self.0.problems()
    }
}

/// The rules in the kernel, by whoever holds them.
#[derive(Debug)]
struct Rules {
    mode: Mode,
    nft: Nft,
    iptables: Iptables,
    /// What another variant of iptables, legacy or nft, has set: flannel's image may bring one that the system has not.
    elsewhere: Option<Iptables>,
    /// The other mode's rules are known to be away.
    others_away: PerFamily<bool>,
    problems: Problems,
}

impl Rules {
    /// Looks at everything and mends what is wrong; true if nothing failed.
    fn keep(&mut self, wanted: &Wanted) -> bool {
        let mut well = true;
        for family in Family::ALL {
            let (own, other) = match family {
                Family::V4 => ("masquerade and forward rules", "rules of the other mode"),
                Family::V6 => (
                    "IPv6 masquerade and forward rules",
                    "IPv6 rules of the other mode",
                ),
            };
            let kept = match self.mode {
                Mode::Nftables => self.nft.keep(family, wanted),
                Mode::Iptables => self.iptables.keep(family, wanted),
            };
            well &= self.note(own, &kept);
            // Its own rules stand first, so that at no time there are none.
            if kept.is_err() || *self.others_away.get(family) {
                continue;
            }
            let nothing = Wanted::default();
            let removed = match self.mode {
                Mode::Nftables => self.iptables.keep(family, &nothing),
                Mode::Iptables => self.nft.keep(family, &nothing),
            };
            let removed = removed.and_then(|removed| {
                let elsewhere = self.elsewhere.as_mut();
                let more = elsewhere.map(|elsewhere| elsewhere.keep(family, &nothing));
                Ok(removed | more.transpose()?.unwrap_or(false))
            });
            if let Ok(true) = removed {
                tracing::info!("{other} removed");
            }
            *self.others_away.get_mut(family) = self.note(other, &removed);
            well &= removed.is_ok();
        }
        self.look_at_bridges(wanted);
        well
    }

    fn note(&mut self, part: &'static str, result: &Result<bool, TrafficError>) -> bool {
        match result {
            Ok(_) => self.problems.clear(part),
            Err(error) => self.problems.raise(part, format!("{part}: {error}")),
        }
        result.is_ok()
    }

    /// Without `br_netfilter`, rules of iptables do not see what one pod sends to another of the same node, so that
    /// services answer such pods past the translation of their address.
    fn look_at_bridges(&mut self, wanted: &Wanted) {
        const PART: &str = "br_netfilter";
        let missing = wanted.families.iter().find_map(|(family, pods)| {
            let name = match family {
                Family::V4 => "bridge-nf-call-iptables",
                Family::V6 => "bridge-nf-call-ip6tables",
            };
            let is_there = || Path::new("/proc/sys/net/bridge").join(name).exists();
            (pods.is_some() && !is_there()).then_some(name)
        });
        let wanted = wanted.masquerade || wanted.forward;
        match missing.filter(|_| wanted && self.mode == Mode::Iptables) {
            Some(name) => self.problems.raise(
                PART,
                format!(
                    "there is no /proc/sys/net/bridge/{name}: services may not answer pods of their own node; load the kernel module br_netfilter, or set \"EnableNFTables\": true"
                ),
            ),
            None => self.problems.clear(PART),
        }
    }
}

fn keep(desk: &Desk<Wanted>, mode: Mode, resync: Duration) {
    let mut rules = Rules {
        mode,
        nft: Nft::default(),
        iptables: Iptables::default(),
        elsewhere: Iptables::elsewhere(),
        others_away: PerFamily::default(),
        problems: Problems::default(),
    };
    let mut monitor: Option<RulesetMonitor> = None;
    while let Some(wanted) = desk.wanted() {
        if monitor.is_none() && mode == Mode::Nftables {
            monitor = RulesetMonitor::open(&nft::TABLES).ok();
        }
        let Some(wanted) = wanted else {
            wait_readable([desk.wake.as_fd()], resync);
            continue;
        };
        let well = rules.keep(&wanted);
        desk.report(rules.problems.list());
        // Our own transactions are announced, too. Another's among them may have come after our last look.
        let own = rules.nft.take_transactions();
        if monitor.as_mut().and_then(|monitor| drain(monitor, own)) == Some(true) {
            rules.nft.forget();
            std::thread::sleep(CONTENTION_PAUSE);
            continue;
        }
        let timeout = if well { resync } else { resync.min(RETRY) };
        match &mut monitor {
            Some(watched) => {
                let fds = [desk.wake.as_fd(), watched.as_fd()];
                if let [_, true] = wait_readable(fds, timeout)
                    && drain(watched, 0).is_none()
                {
                    monitor = None;
                }
            }
            None => {
                wait_readable([desk.wake.as_fd()], timeout);
            }
        }
    }
}

/// Whether more than `expected` transactions touched our tables; `None` when the monitor broke.
fn drain(monitor: &mut RulesetMonitor, expected: usize) -> Option<bool> {
    match monitor.drain() {
        Ok(batches) => Some(batches > expected),
        // Too many announcements: look again.
        Err(NetlinkError::Overrun) => Some(true),
        Err(
            NetlinkError::Open { .. }
            | NetlinkError::Io { .. }
            | NetlinkError::Dump { .. }
            | NetlinkError::Timeout,
        ) => None,
    }
}

/// The pods of [`Wanted`] as flannel's recorded rules have them.
#[cfg(test)]
fn recorded() -> Wanted {
    let pods = |network: &str, subnet: &str| {
        Some(Networks {
            network: network.parse().expect("a prefix"),
            subnet: subnet.parse().expect("a prefix"),
        })
    };
    Wanted {
        masquerade: true,
        forward: true,
        random_fully: true,
        families: PerFamily {
            v4: pods("10.244.0.0/16", "10.244.1.0/24"),
            v6: pods("fd10:244::/48", "fd10:244:0:1::/64"),
        },
        no_masquerade: Vec::new(),
    }
}
