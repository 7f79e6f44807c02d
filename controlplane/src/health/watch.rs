//! What an operator must be told although nobody asks: found by comparing what is with what was.
//!
//! Looked at once a second; what comes and goes in between is for the metrics. Deciding is pure, so that it can be
//! tested without workers; who is told, and how often, is for others.

use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ripstop_fib::DropReason;
use ripstop_fib::stats::{Mode, WorkerStats};

use super::Health;
use crate::publish::DataPlane;
use crate::report::{self, Sample};

/// So many packets from unknown sources within ten seconds are a burst: a stale table costs a few, a scan or a node that
/// was forgotten costs more.
pub const BURST: u64 = 1000;
const WINDOW: Duration = Duration::from_secs(10);
/// A problem that goes by itself within this is not worth a word.
const STANDING: Duration = Duration::from_secs(10);

/// The kinds of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Pods' traffic has fallen back to the kernel's path.
    StandbyInUse,
    /// It is back with the workers.
    WorkersInUse,
    /// A worker wants zero-copy and has it not.
    ZeroCopyUnavailable,
    /// Many packets came from sources that are no peers.
    UnknownSources,
    /// The source of leases, or what it says, needs the operator.
    LeaseProblem,
    /// No interface or address fits.
    AddressProblem,
    /// Another part needs the operator.
    NetworkProblem,
}

impl Reason {
    /// The name in Kubernetes Events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StandbyInUse => "StandbyInUse",
            Self::WorkersInUse => "WorkersInUse",
            Self::ZeroCopyUnavailable => "ZeroCopyUnavailable",
            Self::UnknownSources => "UnknownSources",
            Self::LeaseProblem => "LeaseProblem",
            Self::AddressProblem => "AddressProblem",
            Self::NetworkProblem => "NetworkProblem",
        }
    }

    /// Something is wrong.
    pub const fn is_warning(self) -> bool {
        !matches!(self, Self::WorkersInUse)
    }

    fn of_part(part: &str) -> Self {
        match part {
            "leases" => Self::LeaseProblem,
            "underlay" => Self::AddressProblem,
            _ => Self::NetworkProblem,
        }
    }
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Its kind.
    pub reason: Reason,
    /// What happened, and what to do.
    pub message: String,
}

/// What there is to see at one moment.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// The loop has looked.
    begun: bool,
    detour_active: bool,
    data_plane: DataPlane,
    /// Tells one data plane from the next.
    started_ns: u64,
    workers: Vec<WorkerStats>,
    problems: BTreeMap<&'static str, String>,
}

/// A standing problem.
#[derive(Debug)]
struct Standing {
    since: Instant,
    told: Option<String>,
}

/// Compares moments.
#[derive(Debug)]
pub struct Watcher {
    run_dir: PathBuf,
    health: Arc<Health>,
    detour_active: bool,
    fell_back: bool,
    /// The data plane whose modes were told.
    modes_told: u64,
    unknown: VecDeque<(Instant, u64)>,
    problems: BTreeMap<&'static str, Standing>,
}

impl Watcher {
    /// Watches what is in `run_dir`, and what the loop says.
    pub fn new(run_dir: PathBuf, health: Arc<Health>) -> Self {
        Self {
            run_dir,
            health,
            detour_active: false,
            fell_back: false,
            modes_told: 0,
            unknown: VecDeque::new(),
            problems: BTreeMap::new(),
        }
    }

    /// Looks, and says what is new.
    pub fn look(&mut self) -> Vec<News> {
        let round = self.health.round();
        let data_plane = DataPlane::observe(&self.run_dir).unwrap_or_default();
        let sample = report::read_stats(&self.run_dir).ok().flatten();
        let (workers, started_ns) = match sample.filter(|_| data_plane.alive) {
            Some(Sample {
                workers,
                started_ns,
                ..
            }) => (workers, started_ns),
            None => (Vec::new(), 0),
        };
        let seen = Seen {
            begun: self.health.age().is_some(),
            detour_active: round.detour_active,
            data_plane,
            started_ns,
            workers,
            problems: round.problems,
        };
        self.compare(seen, Instant::now())
    }

    fn compare(&mut self, seen: Seen, now: Instant) -> Vec<News> {
        let mut news = Vec::new();
        let mut tell = |reason, message| news.push(News { reason, message });
        if seen.begun && seen.detour_active != self.detour_active {
            self.detour_active = seen.detour_active;
            if !seen.detour_active {
                self.fell_back = true;
                let why = why_not(&seen.data_plane);
                tell(
                    Reason::StandbyInUse,
                    format!(
                        "pods' traffic to other nodes has fallen back to the kernel's path: {why}; it works, but slower; see `ripstop status`"
                    ),
                );
            } else if core::mem::take(&mut self.fell_back) {
                tell(
                    Reason::WorkersInUse,
                    "pods' traffic to other nodes is back with the data plane's workers".to_owned(),
                );
            }
        }
        if !seen.workers.is_empty() && seen.started_ns != self.modes_told {
            self.modes_told = seen.started_ns;
            if let Some(message) = without_zero_copy(&seen.workers) {
                tell(Reason::ZeroCopyUnavailable, message);
            }
        }
        if let Some(count) = self.burst(&seen.workers, now) {
            tell(
                Reason::UnknownSources,
                format!(
                    "{count} packets from sources that are no peers were dropped within {} s: a node that the leases lack, or an attack; see `ripstop drops`, unknown_peer and unknown_source",
                    WINDOW.as_secs()
                ),
            );
        }
        self.problems
            .retain(|part, _| seen.problems.contains_key(part));
        for (part, text) in seen.problems {
            let standing = self.problems.entry(part).or_insert(Standing {
                since: now,
                told: None,
            });
            if now.saturating_duration_since(standing.since) >= STANDING
                && standing.told.as_ref() != Some(&text)
            {
                standing.told = Some(text.clone());
                tell(Reason::of_part(part), text);
            }
        }
        news
    }

    /// How many packets came from unknown sources within the window, if those are many. Each counts in one burst only.
    fn burst(&mut self, workers: &[WorkerStats], now: Instant) -> Option<u64> {
        let of = |worker: &WorkerStats| {
            let drops = &worker.counters.drops;
            drops[DropReason::UnknownPeer.index()]
                .saturating_add(drops[DropReason::UnknownSource.index()])
        };
        let total = workers.iter().map(of).fold(0, u64::saturating_add);
        let is_old = |(at, _): &(Instant, u64)| now.saturating_duration_since(*at) > WINDOW;
        while self.unknown.front().is_some_and(is_old) {
            self.unknown.pop_front();
        }
        // A data plane that has restarted counts from zero.
        if self.unknown.back().is_some_and(|(_, last)| *last > total) {
            self.unknown.clear();
        }
        let before = self.unknown.front().map_or(total, |(_, count)| *count);
        let count = total.saturating_sub(before);
        if count >= BURST {
            self.unknown.clear();
        }
        self.unknown.push_back((now, total));
        (count >= BURST).then_some(count)
    }
}

fn why_not(data_plane: &DataPlane) -> &'static str {
    match data_plane {
        DataPlane { alive: false, .. } => "the data plane does not run",
        DataPlane { workers: 0, .. } => "the data plane starts",
        DataPlane { fresh: false, .. } => {
            "a worker gives no sign of life: it is stopped, or its cpu is taken"
        }
        DataPlane { generation: 0, .. } => "the workers have no forwarding table",
        DataPlane { .. } => "workers can send to no other node",
    }
}

/// Which workers wanted zero-copy in vain.
fn without_zero_copy(workers: &[WorkerStats]) -> Option<String> {
    let short = workers
        .iter()
        .filter(|worker| worker.identity.wants_zero_copy && worker.identity.mode != Mode::ZeroCopy);
    let names: Vec<String> = short
        .map(|worker| {
            let identity = &worker.identity;
            format!(
                "{} queue {} ({})",
                identity.nic,
                identity.queue,
                identity.mode.name()
            )
        })
        .collect();
    (!names.is_empty()).then(|| {
        format!(
            "zero-copy is not available for {}: packets are copied, which costs throughput; the NIC's driver lacks it, or its settings forbid it; with \"mode\": \"copy\" this is not said",
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ripstop_fib::stats::{
        Door, Gauge, KernelCounter, Polling, Transmit, WorkerCounters, WorkerIdentity,
    };

    fn watcher() -> Watcher {
        Watcher::new(PathBuf::new(), Arc::new(Health::new().unwrap()))
    }

    fn worker(queue: u32, mode: Mode, wants_zero_copy: bool, unknown: u64) -> WorkerStats {
        let mut counters = WorkerCounters::default();
        counters.drops[DropReason::UnknownPeer.index()] = unknown;
        WorkerStats {
            identity: WorkerIdentity {
                nic: "eth0".to_owned(),
                queue,
                cpu: 0,
                mode,
                wants_zero_copy,
                polling: Polling::Adaptive,
                door: Door::Tun,
                transmit: [Transmit::AfXdp; 2],
                frames: 64,
                frame_size: 2048,
                huge_pages: false,
                numa_node: None,
            },
            heartbeat_ns: 0,
            generation: 1,
            counters,
            gauges: [0; Gauge::COUNT],
            kernel: [0; KernelCounter::COUNT],
        }
    }

    fn reasons(news: &[News]) -> Vec<Reason> {
        news.iter().map(|news| news.reason).collect()
    }

    #[test]
    fn falling_back_and_coming_back_are_told() {
        let mut watcher = watcher();
        let now = Instant::now();
        let active = |detour_active| Seen {
            begun: true,
            detour_active,
            ..Seen::default()
        };
        assert_eq!(watcher.compare(Seen::default(), now), []);
        assert_eq!(
            watcher.compare(active(false), now),
            [],
            "nothing to fall from"
        );
        assert_eq!(
            watcher.compare(active(true), now),
            [],
            "nothing to come back from"
        );
        let news = watcher.compare(active(false), now);
        assert_eq!(reasons(&news), [Reason::StandbyInUse]);
        assert!(news[0].message.contains("the data plane does not run"));
        assert_eq!(watcher.compare(active(false), now), []);
        let news = watcher.compare(active(true), now);
        assert_eq!(reasons(&news), [Reason::WorkersInUse]);
        assert_eq!(watcher.compare(active(true), now), []);
    }

    #[test]
    fn a_mode_below_the_wish_is_told_once_for_each_data_plane() {
        let mut watcher = watcher();
        let now = Instant::now();
        let seen = |started_ns, workers: &[WorkerStats]| Seen {
            started_ns,
            workers: workers.to_vec(),
            ..Seen::default()
        };
        let content = [
            worker(0, Mode::ZeroCopy, true, 0),
            worker(1, Mode::Copy, false, 0),
        ];
        assert_eq!(watcher.compare(seen(1, &content), now), []);
        let short = [
            worker(0, Mode::ZeroCopy, true, 0),
            worker(1, Mode::Copy, true, 0),
        ];
        assert_eq!(watcher.compare(seen(2, &[]), now), [], "not yet announced");
        let news = watcher.compare(seen(2, &short), now);
        assert_eq!(reasons(&news), [Reason::ZeroCopyUnavailable]);
        assert!(
            news[0].message.contains("eth0 queue 1 (copy)") && !news[0].message.contains("queue 0"),
            "{news:?}"
        );
        assert_eq!(watcher.compare(seen(2, &short), now), []);
        assert_eq!(watcher.compare(seen(3, &short), now).len(), 1);
    }

    #[test]
    fn a_burst_is_many_packets_in_a_short_time() {
        let mut watcher = watcher();
        let start = Instant::now();
        let mut at = |second: u64, unknown| {
            let seen = Seen {
                started_ns: 1,
                workers: vec![worker(0, Mode::ZeroCopy, true, unknown)],
                ..Seen::default()
            };
            let news = watcher.compare(seen, start + Duration::from_secs(second));
            reasons(&news)
        };
        assert_eq!(at(0, 5_000_000), [], "what was before us");
        assert_eq!(at(5, 5_000_999), []);
        assert_eq!(at(16, 5_001_500), [], "slowly");
        assert_eq!(at(17, 5_002_499), []);
        assert_eq!(at(18, 5_002_500), [Reason::UnknownSources]);
        assert_eq!(at(19, 5_002_501), [], "each packet counts once");
        assert_eq!(at(20, 10), [], "another data plane");
        assert_eq!(at(21, 1010), [Reason::UnknownSources]);
    }

    #[test]
    fn problems_that_stay_are_told_once() {
        let mut watcher = watcher();
        let start = Instant::now();
        let mut at = |second: u64, problems: &[(&'static str, &str)]| {
            let problems = problems
                .iter()
                .map(|(part, text)| (*part, (*text).to_owned()));
            let seen = Seen {
                problems: problems.collect(),
                ..Seen::default()
            };
            watcher.compare(seen, start + Duration::from_secs(second))
        };
        assert_eq!(at(0, &[("leases", "a")]), []);
        assert_eq!(at(9, &[("leases", "b")]), []);
        assert_eq!(at(10, &[]), []);
        assert_eq!(at(11, &[("leases", "b"), ("underlay", "c")]), []);
        let news = at(21, &[("leases", "b"), ("underlay", "c"), ("filter", "d")]);
        assert_eq!(
            reasons(&news),
            [Reason::LeaseProblem, Reason::AddressProblem]
        );
        assert_eq!(news[0].message, "b");
        assert_eq!(at(22, &[("leases", "b"), ("underlay", "c")]), []);
        assert_eq!(at(23, &[("leases", "e"), ("underlay", "c")]).len(), 1);
    }
}
