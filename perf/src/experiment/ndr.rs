//! The highest rate at which nothing is lost (NDR), and what arrives when as much as possible is sent (MRR).
//!
//! Three figures, because one alone deceives. **MRR** is what a path delivers when it is flooded. **NDR** after RFC 2544
//! (section 26.1) is a bisection in which a single trial decides: one lost packet and the rate is too high. **NDR, repeated** is
//! the same question asked the way MLRsearch does: several trials at each rate, and a rate is too high when more than half of
//! them lose something. A path that hiccups now and then has a low NDR by the one and a sound one by the other; on a virtual
//! machine, where the hypervisor can stop a core for a millisecond, the two are worth looking at together.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::progress::Progress;
use super::scenario::Point;
use super::stats::{Spread, whole};
use crate::measure::{Bed, Limit, Rate};

/// A source that sends less than this share of what it was asked for is at its end.
const SENT_ENOUGH: f64 = 0.97;
/// And so often at one rate, before that is taken for its end.
const SHORT_TRIALS: u32 = 3;
/// No search takes so many rates; it is here so that a bed that contradicts itself cannot keep one going for ever.
const RATES_MAX: usize = 200;

/// How to search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NdrOptions {
    /// The search ends when the rate that loses is so little above the one that does not, as a fraction.
    pub resolution: f64,
    /// Length of each trial.
    pub trial: Duration,
    /// Trials at each rate of the repeated search.
    pub repeats: u32,
    /// Trials for MRR.
    pub mrr_trials: u32,
    /// Share of packets that may be lost: 0 for NDR, 0.005 for what CSIT calls PDR.
    pub loss: f64,
    /// No rate below this is tried.
    pub min_pps: u64,
    /// No rate above this is tried.
    pub max_pps: u64,
}

impl Default for NdrOptions {
    fn default() -> Self {
        Self {
            resolution: 0.01,
            trial: Duration::from_secs(1),
            repeats: 5,
            mrr_trials: 5,
            loss: 0.0,
            min_pps: 1000,
            max_pps: 200_000_000,
        }
    }
}

/// What a search found for one variant at one point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NdrResult {
    /// Which variant.
    pub variant: String,
    /// What was offered; its rate is that of MRR.
    pub point: Point,
    /// What the bed says of itself.
    pub bed: String,
    /// How the search went about it.
    pub options: NdrOptions,
    /// Packets a second that arrived when as many as possible were sent.
    pub mrr: Option<Spread>,
    /// By one trial at each rate.
    pub ndr: Bounds,
    /// By repeated trials.
    pub repeated: Bounds,
    /// All trials, in the order in which they were made.
    pub steps: Vec<Step>,
    /// What the trials have to be read with.
    pub limits: Vec<Limit>,
    /// Whether it was ended before its time.
    pub interrupted: bool,
}

/// Between which rates the highest one without loss lies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bounds {
    /// The highest rate that loses nothing, below all that do; nothing if there is none.
    pub lower: Option<u64>,
    /// The lowest that loses.
    pub upper: Option<u64>,
    /// Whether the source's own end was reached before a rate that loses.
    pub source_bound: bool,
}

/// One trial of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Step {
    /// What was asked for; nothing: as much as possible.
    pub asked_pps: Option<u64>,
    /// Packets sent.
    pub sent: u64,
    /// Packets lost.
    pub lost: u64,
    /// Packets received a second.
    pub received_pps: u64,
}

/// Searches, on a bed that is up. When `stop` is set, it ends after the trial that runs.
///
/// # Errors
/// The options make no sense, or a trial failed.
pub fn search(
    bed: &mut dyn Bed,
    variant: &str,
    point: &Point,
    options: &NdrOptions,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<NdrResult> {
    ensure!(
        options.resolution > 0.0001 && options.resolution < 1.0,
        "a resolution of {}: take one between 0.0001 and 1",
        options.resolution
    );
    ensure!(
        options.min_pps > 0 && options.min_pps < options.max_pps,
        "from {} to {} packets/s there is nothing to search",
        options.min_pps,
        options.max_pps
    );
    ensure!(
        options.repeats > 0 && options.mrr_trials > 0,
        "there has to be at least one trial of each kind"
    );
    progress.watch(bed.watched());
    let mut search = Search {
        bed,
        variant,
        point,
        options,
        progress,
        stop,
        loads: BTreeMap::new(),
        ceiling: None,
        steps: Vec::new(),
        limits: Vec::new(),
    };
    let mut received = Vec::new();
    for _ in 0..options.mrr_trials {
        if let Some(step) = search.trial(None)? {
            received.push(step.received_pps as f64);
        }
    }
    let mrr = Spread::of(&received);
    let mut result = NdrResult {
        variant: variant.to_owned(),
        point: point.clone(),
        bed: String::new(),
        options: options.clone(),
        mrr,
        ndr: Bounds::default(),
        repeated: Bounds::default(),
        steps: Vec::new(),
        limits: Vec::new(),
        interrupted: false,
    };
    if let Some(mrr) = mrr {
        // No path without loss is faster than what it delivers when it is flooded, but for noise.
        let flooded = whole(mrr.max * (1.0 + options.resolution));
        let first = flooded.clamp(options.min_pps, options.max_pps);
        let once = Goal {
            trials: 1,
            exceed: 0.0,
        };
        result.ndr = search.bounds(once, first, first / 4)?;
        let near = result.ndr.lower.unwrap_or(options.min_pps);
        let fine = whole(near as f64 * options.resolution).max(1);
        let repeated = Goal {
            trials: options.repeats,
            exceed: 0.5,
        };
        result.repeated = search.bounds(repeated, near, fine)?;
    }
    result.bed = search.bed.description();
    result.steps = search.steps;
    result.limits = search.limits;
    result.interrupted = stop.load(Ordering::Relaxed);
    Ok(result)
}

/// When a rate is too high: when more than this share of so many trials lose more than they may.
#[derive(Debug, Clone, Copy)]
struct Goal {
    trials: u32,
    exceed: f64,
}

/// Trials at a rate.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    good: u32,
    bad: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Lower,
    Upper,
    Undecided,
}

impl Load {
    /// What the trials so far say, whatever those that are missing would.
    fn class(self, goal: Goal) -> Class {
        let allowed = f64::from(goal.trials) * goal.exceed;
        let missing = goal.trials.saturating_sub(self.good + self.bad);
        // More trials than the goal asks for count in proportion.
        let scale = f64::from(goal.trials) / f64::from(goal.trials.max(self.good + self.bad));
        if f64::from(self.bad) * scale > allowed {
            Class::Upper
        } else if f64::from(self.bad) * scale + f64::from(missing) <= allowed || missing == 0 {
            Class::Lower
        } else {
            Class::Undecided
        }
    }
}

struct Search<'a> {
    bed: &'a mut dyn Bed,
    variant: &'a str,
    point: &'a Point,
    options: &'a NdrOptions,
    progress: &'a Progress,
    stop: &'a AtomicBool,
    loads: BTreeMap<u64, Load>,
    /// What the source reached when it was asked for more.
    ceiling: Option<u64>,
    steps: Vec<Step>,
    limits: Vec<Limit>,
}

impl Search<'_> {
    /// Closes in on the highest rate that meets a goal, from a first guess and a first step.
    fn bounds(&mut self, goal: Goal, first: u64, first_step: u64) -> Result<Bounds> {
        let mut next = first;
        let mut step = first_step.max(1);
        for _ in 0..RATES_MAX {
            if !self.decide(next, goal)? {
                break;
            }
            let bounds = self.known(goal);
            next = match (bounds.lower, bounds.upper) {
                (Some(lower), Some(upper)) => {
                    if (upper - lower) as f64 <= upper as f64 * self.options.resolution
                        || upper - lower < 2
                    {
                        break;
                    }
                    lower + (upper - lower) / 2
                }
                (None, Some(upper)) => {
                    if upper <= self.options.min_pps {
                        break;
                    }
                    let next = upper.saturating_sub(step).max(upper / 2);
                    step = step.saturating_mul(2);
                    next.max(self.options.min_pps)
                }
                (Some(lower), None) => {
                    if bounds.source_bound || lower >= self.options.max_pps {
                        break;
                    }
                    let next = lower.saturating_add(step);
                    step = step.saturating_mul(2);
                    next.min(self.options.max_pps)
                }
                // The source did not reach what it was asked for.
                (None, None) => self.ceiling.unwrap_or(self.options.min_pps),
            };
        }
        Ok(self.known(goal))
    }

    fn known(&self, goal: Goal) -> Bounds {
        let of = |class| {
            let loads = self.loads.iter();
            loads.filter(move |(_, load)| load.class(goal) == class)
        };
        let upper = of(Class::Upper).map(|(rate, _)| *rate).next();
        // A rate that loses says more than a higher one that by chance did not.
        let below = |rate: &u64| upper.is_none_or(|upper| *rate < upper);
        let lower = of(Class::Lower).map(|(rate, _)| *rate).rfind(below);
        let reached = lower.zip(self.ceiling);
        Bounds {
            lower,
            upper,
            source_bound: upper.is_none()
                && reached
                    .is_some_and(|(lower, ceiling)| lower as f64 >= ceiling as f64 * SENT_ENOUGH),
        }
    }

    /// Trials at a rate until they decide; false if the search is to end.
    fn decide(&mut self, rate: u64, goal: Goal) -> Result<bool> {
        let (mut at, mut short) = (rate, 0);
        while self.loads.get(&at).copied().unwrap_or_default().class(goal) == Class::Undecided {
            let Some(step) = self.trial(Some(rate))? else {
                return Ok(false);
            };
            let seconds = self.options.trial.as_secs_f64();
            let sent = whole(step.sent as f64 / seconds);
            if (sent as f64) < rate as f64 * SENT_ENOUGH {
                // Once, somebody else may have had its CPU.
                short += 1;
                if short < SHORT_TRIALS {
                    continue;
                }
                let ceiling = self.ceiling.get_or_insert(sent);
                *ceiling = sent.max(*ceiling);
                at = *ceiling;
            }
            let load = self.loads.entry(at).or_default();
            if step.lost as f64 > step.sent as f64 * self.options.loss {
                load.bad += 1;
            } else {
                load.good += 1;
            }
        }
        Ok(true)
    }

    fn trial(&mut self, asked_pps: Option<u64>) -> Result<Option<Step>> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        self.progress.say(&match asked_pps {
            Some(rate) => format!("{}: {:.3} Mpps", self.variant, rate as f64 / 1e6),
            None => format!("{}: as fast as the source can", self.variant),
        });
        let mut offer = self.point.offer(self.options.trial);
        offer.rate = asked_pps.map_or(Rate::Max, Rate::Pps);
        // A sink that looks at each packet is slower than the paths.
        offer.count_only = true;
        let trial = self.bed.trial(&offer)?;
        let seconds = trial.elapsed.as_secs_f64();
        let step = Step {
            asked_pps,
            sent: trial.sent,
            lost: trial.lost,
            received_pps: if seconds > 0.0 {
                whole(trial.received as f64 / seconds)
            } else {
                0
            },
        };
        self.steps.push(step);
        for limit in trial.limits {
            // That the source is at its end is what a flood is about.
            if asked_pps.is_some() || !matches!(limit, Limit::Source(_)) {
                self.limits.push(limit);
            }
        }
        self.progress.skip(1);
        Ok(Some(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::model::Model;
    use crate::measure::{Size, Work};
    use proptest::prelude::*;

    fn find(model: &mut Model, options: &NdrOptions) -> NdrResult {
        let point = Point {
            sweep: None,
            work: Work::Packets,
            rate: Rate::Max,
            size: Size::Bytes(64),
            flows: 1,
            destinations: 1,
        };
        let stop = AtomicBool::new(false);
        search(model, "model", &point, options, &Progress::hidden(), &stop).unwrap()
    }

    fn within(found: Option<u64>, truth: f64, resolution: f64) -> bool {
        found.is_some_and(|pps| {
            let ratio = pps as f64 / truth;
            ratio > 1.0 - resolution && ratio < 1.0 + resolution
        })
    }

    proptest! {
        #[test]
        fn a_steady_path_is_found_within_the_resolution(
            capacity in 2e3_f64..5e7,
            resolution in 0.002_f64..0.1,
            seed: u64,
        ) {
            let options = NdrOptions { resolution, ..NdrOptions::default() };
            let result = find(&mut Model::new(capacity, seed), &options);
            // The rate below which one second loses not even one packet may be one packet off.
            let slack = resolution + 2.0 / capacity;
            for bounds in [result.ndr, result.repeated] {
                prop_assert!(within(bounds.lower, capacity, slack), "{bounds:?} for {capacity}");
                prop_assert!(bounds.lower.unwrap() as f64 <= capacity + 1.0);
                prop_assert!(bounds.upper.unwrap() as f64 > capacity);
                prop_assert!(!bounds.source_bound);
            }
            prop_assert!((result.mrr.unwrap().median / capacity - 1.0).abs() < 0.01);
            // A bisection: not more trials than bits, and the repeats at a handful of rates.
            prop_assert!(result.steps.len() < 60, "{}", result.steps.len());
        }
    }

    #[test]
    fn repeated_trials_see_through_hiccups() {
        let (mut once, mut repeated) = (0, 0);
        for seed in 0..300 {
            let mut model = Model {
                hiccup: 0.1,
                ..Model::new(1e6, seed)
            };
            let result = find(&mut model, &NdrOptions::default());
            once += u32::from(within(result.ndr.lower, 1e6, 0.03));
            repeated += u32::from(within(result.repeated.lower, 1e6, 0.03));
        }
        // Of the seeds, fixed: three of five trials with a hiccup have a probability of 0.9 % at each of some eight rates.
        assert!(repeated > 270, "{repeated} of 300");
        assert!(once < 220, "{once} of 300: this model is no test");
    }

    #[test]
    fn noise_does_not_widen_what_is_found_beyond_itself() {
        for seed in 0..300 {
            let mut model = Model {
                noise: 0.05,
                ..Model::new(1e6, seed)
            };
            let result = find(&mut model, &NdrOptions::default());
            for bounds in [result.ndr, result.repeated] {
                assert!(within(bounds.lower, 1e6, 0.08), "{seed}: {bounds:?}");
            }
        }
    }

    #[test]
    fn a_path_that_always_loses_has_no_such_rate() {
        let mut model = Model {
            loss: 0.01,
            ..Model::new(1e6, 1)
        };
        let result = find(&mut model, &NdrOptions::default());
        assert_eq!((result.ndr.lower, result.repeated.lower), (None, None));
        assert_eq!(result.ndr.upper, Some(1000));
        // It has one at which no more than 2 % are lost.
        let options = NdrOptions {
            loss: 0.02,
            ..NdrOptions::default()
        };
        let result = find(&mut model, &options);
        assert!(within(result.ndr.lower, 1.01e6, 0.02), "{:?}", result.ndr);
    }

    #[test]
    fn the_source_s_end_is_said_and_not_taken_for_the_path_s() {
        let mut model = Model {
            source: 3e5,
            ..Model::new(1e6, 1)
        };
        let result = find(&mut model, &NdrOptions::default());
        assert!(result.ndr.source_bound && result.repeated.source_bound);
        assert!(within(result.ndr.lower, 3e5, 0.03), "{:?}", result.ndr);
        assert_eq!(result.ndr.upper, None);
    }

    #[test]
    fn rates_have_ends() {
        let options = NdrOptions {
            max_pps: 50_000,
            ..NdrOptions::default()
        };
        let result = find(&mut Model::new(1e6, 1), &options);
        assert_eq!((result.ndr.lower, result.ndr.upper), (Some(50_000), None));
        assert!(!result.ndr.source_bound);
    }

    #[test]
    fn a_failed_trial_is_an_error_and_nonsense_is_refused() {
        let point = find(&mut Model::new(1e4, 1), &NdrOptions::default()).point;
        let go = AtomicBool::new(false);
        let try_with = |options: &NdrOptions, breaks_at| {
            let mut model = Model {
                breaks_at,
                ..Model::new(1e6, 1)
            };
            search(&mut model, "m", &point, options, &Progress::hidden(), &go)
        };
        let good = NdrOptions::default();
        assert!(try_with(&good, None).is_ok());
        let broke = try_with(&good, Some(7)).unwrap_err();
        assert!(broke.to_string().contains("broke"));
        for bad in [
            NdrOptions {
                resolution: 0.0,
                ..good.clone()
            },
            NdrOptions {
                min_pps: 9,
                max_pps: 9,
                ..good.clone()
            },
            NdrOptions {
                repeats: 0,
                ..good.clone()
            },
        ] {
            assert!(try_with(&bad, None).is_err(), "{bad:?}");
        }
        let stopped = AtomicBool::new(true);
        let mut model = Model::new(1e6, 1);
        let result = search(
            &mut model,
            "m",
            &point,
            &good,
            &Progress::hidden(),
            &stopped,
        )
        .unwrap();
        assert!(result.interrupted && result.steps.is_empty());
    }
}
