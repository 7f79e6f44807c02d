//! When a source sends the next packets.

use core::time::Duration;
use std::sync::Arc;
use std::thread;

use anyhow::{Result, ensure};

use super::Progress;
use super::kernel::{monotonic_ns, nanoseconds};
use crate::measure::{Limit, Rate};

/// How far a source that was held up may catch up; what is older is never sent, and said.
const CATCH_UP: Duration = Duration::from_millis(2);
/// A wait this long is slept, but for `SPIN`.
const SLEEP_FROM: u64 = 150_000;
/// Nanoseconds before the time at which a sleep ends.
const SPIN: u64 = 80_000;
/// How long a window may stay shut before the packets in it count as lost.
const SHUT_MAX: u64 = 100_000_000;
/// How long a source sleeps before a shut window. It takes some 100 µs in all, which a window of this many packets outlasts
/// at millions a second. A source that turned instead would be busy for as long as a path on another CPU is, and the path
/// would be charged with that.
const NAP: Duration = Duration::from_micros(20);
const NAP_FROM: u32 = 256;
/// Of an asked rate, what may be missing without a word: one in so many.
const TOLERANCE: u64 = 1000;

/// A source's schedule: asked before each burst, it says how many packets are due.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Rate,
    begin_ns: u64,
    end_ns: u64,
    sent: u64,
    /// Packets of a rate that were given up.
    skipped: u64,
    feedback: Option<Arc<Progress>>,
    /// The sink's count at the start.
    base: u64,
    /// Packets that count as arrived because they will not.
    given_up: u64,
    arrived: u64,
    arrived_ns: u64,
    reopened: u64,
    burst: u64,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Send so many, at least one.
    Send(u64),
    /// Nothing is due yet.
    Wait,
    /// The duration is over.
    End,
}

impl Pace {
    /// A schedule from now on, in bursts of at most so many.
    pub(super) fn new(
        rate: Rate,
        duration: Duration,
        burst: u64,
        feedback: Option<Arc<Progress>>,
    ) -> Result<Self> {
        ensure!(
            feedback.is_some() || !matches!(rate, Rate::Window(_)),
            "a window needs the sink's progress"
        );
        let base = feedback.as_ref().map_or(0, |progress| progress.packets());
        let begin_ns = monotonic_ns();
        Ok(Self {
            rate,
            begin_ns,
            end_ns: begin_ns.saturating_add(nanoseconds(duration)),
            sent: 0,
            skipped: 0,
            feedback,
            base,
            given_up: 0,
            arrived: 0,
            arrived_ns: begin_ns,
            reopened: 0,
            burst,
        })
    }

    pub(super) fn begin_ns(&self) -> u64 {
        self.begin_ns
    }

    /// What is due at this time.
    #[inline]
    pub(super) fn turn(&mut self, now_ns: u64) -> Turn {
        if now_ns >= self.end_ns {
            return Turn::End;
        }
        let due = match self.rate {
            Rate::Max => self.burst,
            Rate::Pps(pps) => self.due(pps, now_ns),
            Rate::Window(window) => self.open(window.into(), now_ns),
        };
        match due.min(self.burst) {
            0 => Turn::Wait,
            due => Turn::Send(due),
        }
    }

    fn due(&mut self, pps: u64, now_ns: u64) -> u64 {
        let due = by_now(pps, now_ns - self.begin_ns);
        let behind = due.saturating_sub(self.sent + self.skipped);
        let behind_max = by_now(pps, nanoseconds(CATCH_UP)).max(self.burst);
        self.skipped += behind.saturating_sub(behind_max);
        behind.min(behind_max)
    }

    fn open(&mut self, window: u64, now_ns: u64) -> u64 {
        // The sink's counter is asked only when what is known of it does not suffice.
        let room = (self.arrived + window).saturating_sub(self.sent);
        if room >= self.burst {
            return room;
        }
        let Some(feedback) = &self.feedback else {
            return 0;
        };
        let arrived = feedback.packets().saturating_sub(self.base) + self.given_up;
        // A window that has just shut opens for a burst, not for each packet that comes out of it: those would cost the
        // source more than they do the path.
        let least = self.burst.min(window / 4).max(1);
        if arrived != self.arrived {
            self.arrived = arrived;
            self.arrived_ns = now_ns;
        } else if room < least && now_ns.saturating_sub(self.arrived_ns) > SHUT_MAX {
            self.given_up += self.sent - self.arrived;
            self.arrived = self.sent;
            self.arrived_ns = now_ns;
            self.reopened += 1;
        }
        let room = (self.arrived + window).saturating_sub(self.sent);
        if room < least { 0 } else { room }
    }

    /// Takes down what was sent of what was due.
    #[inline]
    pub(super) fn sent(&mut self, packets: u64) {
        self.sent += packets;
    }

    /// Waits a moment: asleep if the next packet is far, else turning.
    #[inline]
    pub(super) fn wait(&self, now_ns: u64) {
        let next = match self.rate {
            Rate::Pps(pps) => {
                let number = u128::from(self.sent + self.skipped + 1);
                let after = number * 1_000_000_000 / u128::from(pps.max(1));
                self.begin_ns
                    .saturating_add(u64::try_from(after).unwrap_or(u64::MAX))
            }
            Rate::Max | Rate::Window(_) => now_ns,
        };
        let left = next.min(self.end_ns).saturating_sub(now_ns);
        if left > SLEEP_FROM {
            // A packet in a while does not make a stop wait long.
            thread::sleep(Duration::from_nanos((left - SPIN).min(20_000_000)));
            return;
        }
        let is_far = self.feedback.as_ref().is_some_and(|sink| sink.is_far);
        match self.rate {
            Rate::Window(NAP_FROM..) => thread::sleep(NAP),
            // It tells now and then.
            Rate::Window(_) if is_far => thread::sleep(NAP),
            // The sink may be on this CPU.
            Rate::Window(_) => thread::yield_now(),
            Rate::Max | Rate::Pps(_) => core::hint::spin_loop(),
        }
    }

    /// What the source was not able to do.
    pub(super) fn limits(&self, end_ns: u64) -> Vec<Limit> {
        let mut limits = Vec::new();
        if let Rate::Pps(pps) = self.rate {
            let asked = by_now(pps, end_ns.min(self.end_ns).saturating_sub(self.begin_ns));
            if self.sent + asked / TOLERANCE + self.burst < asked {
                limits.push(Limit::Source(format!(
                    "offered {} of the {asked} packets that were asked for",
                    self.sent
                )));
            }
        }
        if self.reopened > 0 {
            limits.push(Limit::Source(format!(
                "{} times nothing came out of a full window for {} ms: the packets in it were taken for lost",
                self.reopened,
                SHUT_MAX / 1_000_000
            )));
        }
        limits
    }
}

/// Packets due after a time.
fn by_now(pps: u64, elapsed_ns: u64) -> u64 {
    u64::try_from(u128::from(pps) * u128::from(elapsed_ns) / 1_000_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace(rate: Rate, feedback: Option<Arc<Progress>>) -> Pace {
        Pace::new(rate, SECOND, 16, feedback).expect("begins")
    }

    #[test]
    fn a_rate_is_kept_and_what_was_missed_is_said() {
        let mut pace = pace(Rate::Pps(1_000_000), None);
        let begin = pace.begin_ns();
        assert_eq!(pace.turn(begin), Turn::Wait);
        assert_eq!(pace.turn(begin + 5_000), Turn::Send(5));
        pace.sent(5);
        assert_eq!(pace.turn(begin + 5_000), Turn::Wait);
        // Held up for half a second: two milliseconds are caught up, in bursts.
        let mut caught_up = 0;
        while let Turn::Send(due) = pace.turn(begin + 500_000_000) {
            pace.sent(due);
            caught_up += due;
        }
        assert_eq!(caught_up, 2_000);
        assert_eq!(pace.turn(begin + 1_000_000_000), Turn::End);
        let limits = pace.limits(begin + 1_000_000_000);
        let said = "offered 2005 of the 1000000 packets that were asked for";
        assert_eq!(limits, [Limit::Source(said.into())]);
    }

    #[test]
    fn a_window_is_kept_and_opens_again_after_loss() {
        let progress = Arc::new(Progress::default());
        progress.add(100);
        let mut pace = pace(Rate::Window(20), Some(Arc::clone(&progress)));
        let now = pace.begin_ns();
        assert_eq!(pace.turn(now), Turn::Send(16));
        pace.sent(16);
        // Room for four is not worth a burst, for five it is.
        assert_eq!(pace.turn(now), Turn::Wait);
        progress.add(1);
        assert_eq!(pace.turn(now), Turn::Send(5));
        pace.sent(5);
        progress.add(4);
        assert_eq!(pace.turn(now), Turn::Wait);
        assert_eq!(pace.turn(now + SHUT_MAX), Turn::Wait);
        assert_eq!(pace.turn(now + SHUT_MAX + 1), Turn::Send(16));
        assert_eq!(pace.limits(now).len(), 1);
        assert!(Pace::new(Rate::Window(1), SECOND, 16, None).is_err());
    }
}
