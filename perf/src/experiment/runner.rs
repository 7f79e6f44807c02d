//! Runs a scenario: each round sets every variant up, warms it up, measures it, and takes it down.
//!
//! ```text
//!   round 0:  A B C    round 1:  C B A    round 2:  A B C  …
//! ```
//!
//! What drifts while this goes on (temperature, neighbours, memory that falls into pieces) meets all variants alike, and a bed
//! that came up badly is one round of several.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeSet;

use anyhow::Result;

use super::neighbours::Neighbours;
use super::progress::Progress;
use super::result::{Failure, RunResult, TrialRecord};
use super::scenario::{Point, Scenario, Stage};
use super::summary::{self, Summary};
use crate::measure::{Bed, BedPlan, Variant};

/// Runs all rounds, or as many as there are before `stop` is set: then the bed that is up is taken down after its trial, and
/// what was measured so far is the result. What cannot be measured is kept as a failure; a variant that does not come up is
/// not tried again at that stage.
///
/// # Errors
/// The scenario contradicts itself.
pub fn run(
    scenario: &Scenario,
    opener: impl Fn(&BedPlan, &Variant) -> Result<Box<dyn Bed>>,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<RunResult> {
    scenario.check()?;
    let mut result = RunResult::default();
    let mut given_up = BTreeSet::new();
    let stages = scenario.stages();
    let names = scenario.variant_names();
    let trials: usize = stages.iter().map(|stage| stage.points.len()).sum();
    progress.begin(u64::from(scenario.rounds) * (names.len() * trials) as u64);
    'rounds: for round in 0..scenario.rounds {
        for (number, stage) in stages.iter().enumerate() {
            let mut order = names.clone();
            if round % 2 == 1 {
                order.reverse();
            }
            for name in order {
                if stop.load(Ordering::Relaxed) {
                    result.interrupted = true;
                    break 'rounds;
                }
                if given_up.contains(&(number, name)) {
                    progress.skip(stage.points.len() as u64);
                    continue;
                }
                progress.say(&format!("round {}/{}, {name}", round + 1, scenario.rounds));
                let visit = Visit {
                    scenario,
                    stage,
                    round,
                    name,
                    progress,
                    stop,
                };
                let plan = scenario.plan_of(name, stage)?;
                match opener(&plan, &scenario.variant(name, stage)?) {
                    Ok(bed) => visit.measure(bed, &mut result),
                    Err(error) => {
                        given_up.insert((number, name));
                        progress.skip(stage.points.len() as u64);
                        result.failures.push(visit.failure(None, &error));
                    }
                }
            }
        }
    }
    progress.end();
    result.interrupted |= stop.load(Ordering::Relaxed);
    result.summary = Summary::of(scenario, &result.trials, &result.failures);
    Ok(result)
}

/// A variant in a round.
struct Visit<'a> {
    scenario: &'a Scenario,
    stage: &'a Stage,
    round: u32,
    name: &'a str,
    progress: &'a Progress,
    stop: &'a AtomicBool,
}

impl Visit<'_> {
    /// One trial to warm up, then those that count. The bed goes down at the end.
    fn measure(&self, mut bed: Box<dyn Bed>, result: &mut RunResult) {
        self.progress.watch(bed.watched());
        self.measure_points(bed.as_mut(), result);
        self.progress.watch(Vec::new());
    }

    fn measure_points(&self, bed: &mut dyn Bed, result: &mut RunResult) {
        let warm_up = Duration::from_secs_f64(self.scenario.warm_up_seconds);
        let first = self.stage.points.first();
        if let Some(point) = first.filter(|_| !warm_up.is_zero())
            && let Err(error) = bed.trial(&point.offer(warm_up))
        {
            self.progress.skip(self.stage.points.len() as u64);
            result.failures.push(self.failure(Some(point), &error));
            return;
        }
        let length = Duration::from_secs_f64(self.scenario.seconds);
        for point in &self.stage.points {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            self.progress.say(&format!(
                "round {}/{}, {}: {}",
                self.round + 1,
                self.scenario.rounds,
                self.name,
                summary::describe(point)
            ));
            let neighbours = Neighbours::look();
            match bed.trial(&point.offer(length)) {
                Ok(trial) => result.trials.push(TrialRecord {
                    round: self.round,
                    variant: self.name.to_owned(),
                    point: point.clone(),
                    bed: bed.description(),
                    foreign: neighbours.since(),
                    measured: trial,
                }),
                // Ctrl-C reaches the processes of the bed as well.
                Err(_) if self.stop.load(Ordering::Relaxed) => return,
                Err(error) => result.failures.push(self.failure(Some(point), &error)),
            }
            self.progress.skip(1);
        }
    }

    fn failure(&self, point: Option<&Point>, error: &anyhow::Error) -> Failure {
        Failure {
            round: self.round,
            variant: self.name.to_owned(),
            point: point.cloned(),
            why: format!("{error:#}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;

    use anyhow::bail;

    use super::*;
    use crate::experiment::figures::Figure;
    use crate::experiment::model::Model;
    use crate::experiment::scenario::Over;
    use crate::experiment::stats::Verdict;
    use crate::measure::{Limit, Path};

    pub(crate) const SCENARIO: &str = r#"{
        "about": "models side by side",
        "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 100, "mtu": 1500},
        "baseline": "kernel",
        "variants": {"kernel": {"path": "kernel"}, "ripstop": {"path": "ripstop"}, "wire": {"path": "wire"}},
        "offers": {"work": "packets", "rates": ["max"], "sizes": [64]},
        "seconds": 1, "warmUpSeconds": 0.1, "rounds": 6
    }"#;

    fn scenario() -> Scenario {
        Scenario::parse("models", SCENARIO).unwrap()
    }

    fn go() -> AtomicBool {
        AtomicBool::new(false)
    }

    /// The kernel costs 3 CPU seconds for a million packets, Ripstop 1.5, and the engines 0.5 of both.
    fn model(variant: &Variant) -> Model {
        let (capacity, cpu) = match variant.path {
            Path::Wire => (5e6, 0.5),
            Path::Kernel => (4e5, 3.0),
            Path::Ripstop | Path::Routing | Path::TestpmdAfxdp | Path::TestpmdNull => (8e5, 1.5),
        };
        Model {
            cpu,
            noise: 0.02,
            ..Model::new(capacity, 1)
        }
    }

    #[test]
    fn variants_take_turns_in_alternating_order() {
        let opened = RefCell::new(Vec::new());
        let opener = |_: &BedPlan, variant: &Variant| {
            opened.borrow_mut().push(variant.path);
            Ok(Box::new(model(variant)) as Box<dyn Bed>)
        };
        let result = run(&scenario(), opener, &Progress::hidden(), &go()).unwrap();
        let forth = [Path::Kernel, Path::Ripstop, Path::Wire];
        let back = [Path::Wire, Path::Ripstop, Path::Kernel];
        assert_eq!(opened.into_inner(), [forth, back].concat().repeat(3));
        assert_eq!((result.trials.len(), result.failures.len()), (18, 0));
        assert!(!result.interrupted);
    }

    #[test]
    fn ratios_gross_and_net_are_those_of_the_models() {
        let opener = |_: &BedPlan, variant: &Variant| Ok(Box::new(model(variant)) as Box<dyn Bed>);
        let result = run(&scenario(), opener, &Progress::hidden(), &go()).unwrap();
        let rows = &result.summary.rows;
        assert_eq!(rows.len(), 3);
        let ripstop = rows.iter().find(|row| row.variant == "ripstop").unwrap();
        let gross = ripstop.to_baseline[&Figure::KpacketsPerCpuSecondGross];
        assert!((gross.median - 2.0).abs() < 1e-3, "{gross}");
        let net = ripstop.to_baseline[&Figure::KpacketsPerCpuSecondNet];
        assert!((net.median - 2.5).abs() < 1e-3, "{net}");
        let mpps = ripstop.to_baseline[&Figure::Mpps];
        assert!((mpps.median - 2.0).abs() < 0.1, "{mpps}");
        assert_eq!(mpps.verdict(Figure::Mpps.better()), Verdict::Better);
        assert!(ripstop.bed[0].starts_with("model of 800000"));
        let baseline = rows.iter().find(|row| row.variant == "kernel").unwrap();
        assert!(baseline.to_baseline.is_empty());
    }

    #[test]
    fn what_does_not_come_up_is_said_once_and_the_rest_goes_on() {
        let opener = |_: &BedPlan, variant: &Variant| match variant.path {
            Path::Ripstop => bail!("no such program"),
            Path::Kernel | Path::Wire | Path::Routing | Path::TestpmdAfxdp | Path::TestpmdNull => {
                Ok(Box::new(model(variant)) as Box<dyn Bed>)
            }
        };
        let result = run(&scenario(), opener, &Progress::hidden(), &go()).unwrap();
        assert_eq!((result.trials.len(), result.failures.len()), (12, 1));
        assert_eq!(result.failures[0].why, "no such program");
        let said = result.summary.warnings.join("\n");
        assert!(
            said.contains("ripstop") && said.contains("no such program"),
            "{said}"
        );
    }

    #[test]
    fn a_trial_that_fails_is_kept_as_failure() {
        let opener = |_: &BedPlan, variant: &Variant| {
            let breaks_at = (variant.path == Path::Ripstop).then_some(2);
            Ok(Box::new(Model {
                breaks_at,
                ..model(variant)
            }) as Box<dyn Bed>)
        };
        let result = run(&scenario(), opener, &Progress::hidden(), &go()).unwrap();
        // The first trial warms up, the second breaks, in each of six rounds.
        assert_eq!((result.trials.len(), result.failures.len()), (12, 6));
        assert!(result.failures[0].point.is_some());
    }

    #[test]
    fn stopping_keeps_what_is_measured_and_drops_the_bed() {
        struct Counted<'a>(Model, &'a AtomicBool, &'a RefCell<i32>);
        impl Bed for Counted<'_> {
            fn description(&self) -> String {
                self.0.description()
            }
            fn trial(&mut self, offer: &crate::measure::Offer) -> Result<crate::measure::Trial> {
                // Somebody presses Ctrl-C during the second trial of this bed, which is the first that counts.
                self.1.store(self.0.trials == 1, Ordering::Relaxed);
                self.0.trial(offer)
            }
        }
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                *self.2.borrow_mut() -= 1;
            }
        }
        // Beds are 'static where they are made.
        let stop: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let up: &'static RefCell<i32> = Box::leak(Box::new(RefCell::new(0)));
        let opener = |_: &BedPlan, variant: &Variant| {
            *up.borrow_mut() += 1;
            Ok(Box::new(Counted(model(variant), stop, up)) as Box<dyn Bed>)
        };
        let result = run(&scenario(), opener, &Progress::hidden(), stop).unwrap();
        assert!(result.interrupted);
        assert_eq!((result.trials.len(), *up.borrow()), (1, 0));
        assert_eq!(result.summary.rows.len(), 1);
    }

    #[test]
    fn limits_and_spread_become_warnings() {
        let opener = |_: &BedPlan, variant: &Variant| {
            let limits = match variant.path {
                Path::Wire => vec![Limit::Source("always busy".to_owned())],
                Path::Kernel => vec![Limit::Sink("ring overran".to_owned())],
                Path::Ripstop => vec![Limit::Neighbours("steal 7 %".to_owned())],
                Path::Routing | Path::TestpmdAfxdp | Path::TestpmdNull => Vec::new(),
            };
            let noise = if variant.path == Path::Ripstop {
                0.9
            } else {
                0.0
            };
            let seed = 7;
            Ok(Box::new(Model {
                limits,
                noise,
                random: Model::new(1.0, seed).random,
                ..model(variant)
            }) as Box<dyn Bed>)
        };
        let mut scenario = scenario();
        scenario.rounds = 4;
        let result = run(&scenario, opener, &Progress::hidden(), &go()).unwrap();
        let said = result.summary.warnings.join("\n");
        for part in [
            "the source is the limit",
            "always busy",
            "the sink is the limit",
            "ring overran",
            "steal 7 %",
            "4 rounds",
        ] {
            assert!(said.contains(part), "{part:?} is not in: {said}");
        }
    }

    #[test]
    fn a_sweep_opens_a_bed_for_each_value_and_compares_with_the_first() {
        let text = SCENARIO.replace(
            r#""seconds""#,
            r#""sweep": {"over": "leases", "values": [10, 1000]}, "seconds""#,
        );
        let scenario = Scenario::parse("models", &text).unwrap();
        let opener = |plan: &BedPlan, variant: &Variant| {
            let mut model = model(variant);
            if plan.leases > 10 && variant.path == Path::Ripstop {
                model.cpu *= 1.25;
            }
            Ok(Box::new(model) as Box<dyn Bed>)
        };
        let result = run(&scenario, opener, &Progress::hidden(), &go()).unwrap();
        assert_eq!((result.trials.len(), result.summary.rows.len()), (36, 6));
        let row = |variant: &str, leases| {
            let rows = result.summary.rows.iter();
            rows.clone()
                .find(|row| {
                    row.variant == variant && row.point.sweep == Some((Over::Leases, leases))
                })
                .unwrap()
        };
        let cost = |variant| row(variant, 1000).to_first[&Figure::CpuSecondsGross].median;
        assert!((cost("ripstop") - 1.25).abs() < 1e-3);
        assert!((cost("kernel") - 1.0).abs() < 1e-3);
        assert!(row("ripstop", 10).to_first.is_empty());
    }
}
