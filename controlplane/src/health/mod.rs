//! Health: what the loop tells about itself, and who may ask for it.
//!
//! ```text
//!   loop ──round, figures──► Health ◄── server   /healthz, /readyz, /metrics
//!                               ▲
//!   stats, fib, state file ─────┴────── watch    what an operator must be told (Kubernetes Events)
//! ```
//!
//! The loop stores, the others read; nobody waits for anybody.

pub mod metrics;
pub mod server;
pub mod watch;

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus::core::{AtomicU64, GenericCounter};
use prometheus::{Histogram, HistogramOpts};

use self::metrics::Metric;

/// A loop that has not ended a round for so long stands still. It turns ten times a second, and its slowest work is
/// done in slices of 50 ms.
pub const STILL: Duration = Duration::from_secs(30);

/// What came of a request to write a Kubernetes Event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Outcome {
    /// The server has it.
    Sent,
    /// The server, or the way to it, would not take it.
    Refused,
    /// It is too old to be tried again.
    GivenUp,
}

impl Outcome {
    const NAMES: [&str; 3] = ["sent", "refused", "given_up"];
}

/// A counter; whole numbers.
pub(crate) type Count = GenericCounter<AtomicU64>;

/// What the loop found in a round.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Round {
    /// What is missing before the node is ready; nothing if it is.
    pub unready: Option<String>,
    /// The kernel's path holds all that it should.
    pub standby_complete: bool,
    /// Traffic is led to the workers.
    pub detour_active: bool,
    /// Subnets that are.
    pub detour_routes: usize,
    /// What is wrong, by part.
    pub problems: BTreeMap<&'static str, String>,
}

/// What is counted and timed.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) rounds: Count,
    pub(crate) written: Count,
    pub(crate) healed: Count,
    /// Indexed by [`Outcome`].
    pub(crate) events: [Count; 3],
    pub(crate) publish: Histogram,
    pub(crate) lease: Histogram,
    pub(crate) take_up: Histogram,
}

#[derive(Debug)]
struct Shared {
    ended: Option<Instant>,
    round: Round,
    was_ready: bool,
    failures: BTreeMap<&'static str, u64>,
}

/// What the loop tells about itself.
#[derive(Debug)]
pub struct Health {
    started: f64,
    shared: Mutex<Shared>,
    pub(crate) figures: Figures,
}

impl Health {
    /// A process that has just started. All that will be counted is there from the beginning, as zero.
    ///
    /// # Errors
    /// When a metric has an impossible name, which a test rules out.
    pub fn new() -> Result<Self, prometheus::Error> {
        let counter = |metric: Metric| Count::new(metric.name(), metric.help());
        // From a tenth of a millisecond to 26 seconds.
        let histogram = |metric: Metric| {
            let options = HistogramOpts::new(metric.name(), metric.help());
            let buckets = prometheus::exponential_buckets(0.0001, 4.0, 10)?;
            Histogram::with_opts(options.buckets(buckets))
        };
        Ok(Self {
            started: metrics::unix_seconds(),
            shared: Mutex::new(Shared {
                ended: None,
                round: Round {
                    unready: Some("the control plane starts".to_owned()),
                    ..Round::default()
                },
                was_ready: false,
                failures: BTreeMap::new(),
            }),
            figures: Figures {
                rounds: counter(Metric::Rounds)?,
                written: counter(Metric::StandbyWritten)?,
                healed: counter(Metric::StandbyHealed)?,
                events: [
                    counter(Metric::Events)?,
                    counter(Metric::Events)?,
                    counter(Metric::Events)?,
                ],
                publish: histogram(Metric::PublishSeconds)?,
                lease: histogram(Metric::LeaseSeconds)?,
                take_up: histogram(Metric::TakeUpSeconds)?,
            },
        })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Nobody panics while holding it, and half-written figures would be no reason to stop.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names the parts of a round, so that each has a count from the beginning.
    pub(crate) fn steps(&self, steps: impl IntoIterator<Item = &'static str>) {
        let mut shared = self.shared();
        for step in steps {
            shared.failures.entry(step).or_default();
        }
    }

    /// The loop has ended a round.
    pub fn tell(&self, round: Round) {
        self.figures.rounds.inc();
        let mut shared = self.shared();
        shared.ended = Some(Instant::now());
        if shared.round.unready != round.unready {
            match (&round.unready, shared.was_ready) {
                (Some(reason), false) => tracing::info!("not ready: {reason}"),
                (None, false) => tracing::info!("ready"),
                // For milliseconds after each forwarding table, until workers have taken it up.
                (Some(reason), true) => tracing::debug!("not ready: {reason}"),
                (None, true) => tracing::debug!("ready again"),
            }
        }
        shared.was_ready |= round.unready.is_none();
        shared.round = round;
    }

    /// A part of a round has failed.
    pub(crate) fn failed(&self, step: &'static str) {
        *self.shared().failures.entry(step).or_default() += 1;
    }

    /// A Kubernetes Event was written, or not.
    pub fn event(&self, outcome: Outcome) {
        self.figures.events[outcome as usize].inc();
    }

    pub(crate) fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.shared().failures.clone()
    }

    /// What the loop found last.
    pub fn round(&self) -> Round {
        self.shared().round.clone()
    }

    /// Time since the loop last ended a round; none before the first.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.shared().ended.map(|ended| ended.elapsed())
    }

    /// When this process started, in seconds since 1970.
    pub(crate) fn started(&self) -> f64 {
        self.started
    }

    /// What is wrong if the loop stands still at `now`. Before its first round it waits for others, which may take long.
    fn still(&self, now: Instant) -> Option<String> {
        let ended = self.shared().ended?;
        let age = now.saturating_duration_since(ended);
        (age >= STILL).then(|| {
            format!(
                "flanneld stands still: the control plane's loop has not ended a round for {} s",
                age.as_secs()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_noticed() {
        let health = Health::new().unwrap();
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!(health.still(far), None, "it has not begun");
        health.tell(Round::default());
        let now = Instant::now();
        assert_eq!(health.still(now), None);
        assert_eq!(health.still(now + STILL - Duration::from_secs(1)), None);
        let problem = health.still(now + STILL).unwrap();
        assert!(problem.contains("stands still"), "{problem}");
        health.tell(Round::default());
        assert_eq!(health.still(Instant::now()), None, "it goes on");
    }
}
