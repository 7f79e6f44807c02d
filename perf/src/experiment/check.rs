//! Whether one set of programs is slower than another: the question behind `make perf-check`.
//!
//! Both are measured in the same run, in turns, with the same harness. Only a slowdown that is certain to exceed what is
//! allowed is called one. A run that cannot tell says so: it is no failure, and no acquittal either.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::figures::Figure;
use super::result::{Checked, RunResult, TrialRecord};
use super::scenario::Scenario;
use super::stats::{Better, Ratio};
use super::summary::series;

/// Which of the two sets of programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is compared with.
    Base,
    /// What may be slower.
    Head,
}

/// What the ratio says about a slowdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judgement {
    /// It is certain that it is not slower by more than is allowed.
    Good,
    /// It is certain that it is.
    Slower,
    /// The interval holds what is allowed.
    Inconclusive,
    /// One of the two was not measured.
    NotMeasured,
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "good",
            Self::Slower => "SLOWER",
            Self::Inconclusive => "inconclusive",
            Self::NotMeasured => "not measured",
        })
    }
}

/// What to say of a speed (1: as fast as before) if a slowdown by this fraction is allowed.
#[must_use]
pub fn judge(speed: Option<&Ratio>, allowed: f64) -> Judgement {
    match speed {
        None => Judgement::NotMeasured,
        Some(speed) if !speed.is_sure() => Judgement::Inconclusive,
        Some(speed) if speed.high < 1.0 - allowed => Judgement::Slower,
        Some(speed) if speed.low > 1.0 - allowed => Judgement::Good,
        Some(_) => Judgement::Inconclusive,
    }
}

/// Measures both sides in turns, `rounds` times, and judges each variant at each point by the first headline figure of its
/// work. `measure` runs one round of the scenario with one side's programs. When `stop` is set, the rounds so far count.
///
/// # Errors
/// `measure` failed.
pub fn check(
    scenario: &Scenario,
    rounds: u32,
    allowed: f64,
    mut measure: impl FnMut(Side) -> Result<RunResult>,
    stop: &AtomicBool,
) -> Result<Vec<Checked>> {
    let mut trials: BTreeMap<bool, Vec<TrialRecord>> = BTreeMap::new();
    for round in 0..rounds {
        let order = match round % 2 {
            0 => [Side::Base, Side::Head],
            _ => [Side::Head, Side::Base],
        };
        for side in order {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let measured = measure(side)?.trials.into_iter();
            let measured = measured.map(|trial| TrialRecord { round, ..trial });
            let of_side = trials.entry(side == Side::Head).or_default();
            of_side.extend(measured);
        }
    }
    let none = Vec::new();
    let of = |head| series(scenario, trials.get(&head).unwrap_or(&none));
    let (base, head) = (of(false), of(true));
    let mut checked = Vec::new();
    for stage in scenario.stages() {
        for point in stage.points {
            for variant in scenario.variant_names() {
                let find = |all: &'_ [super::summary::Series<'_>]| {
                    let found = all
                        .iter()
                        .find(|s| *s.point == point && s.variant == variant);
                    found.map(|series| series.rounds.clone())
                };
                let speed = find(&head).zip(find(&base)).and_then(|(head, base)| {
                    let figure = *Figure::headline(point.work).first()?;
                    let ratios = match figure.better() {
                        Better::More => super::summary::ratios(&head, &base),
                        Better::Less => super::summary::ratios(&base, &head),
                    };
                    ratios.get(&figure).copied()
                });
                checked.push(Checked {
                    variant: variant.to_owned(),
                    point: point.clone(),
                    speed,
                    judgement: judge(speed.as_ref(), allowed),
                });
            }
        }
    }
    Ok(checked)
}

/// The worst that was found.
#[must_use]
pub fn worst(checked: &[Checked]) -> Judgement {
    let found = |judgement| checked.iter().any(|one| one.judgement == judgement);
    [
        Judgement::Slower,
        Judgement::NotMeasured,
        Judgement::Inconclusive,
    ]
    .into_iter()
    .find(|judgement| found(*judgement))
    .unwrap_or(Judgement::Good)
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use super::*;
    use crate::experiment::model::Model;
    use crate::experiment::neighbours::Foreign;
    use crate::measure::Bed as _;

    const SCENARIO: &str = r#"{
        "about": "models of two commits",
        "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 1, "mtu": 1500},
        "baseline": "tun",
        "variants": {"tun": {"path": "ripstop"}},
        "offers": {"work": "packets", "rates": ["max"], "sizes": [64]},
        "seconds": 1, "warmUpSeconds": 0, "rounds": 1
    }"#;

    /// Two commits, the second slower by this fraction, measured with this noise.
    fn judgement(slowdown: f64, noise: f64, rounds: u32, seed: u64) -> Judgement {
        let scenario = Scenario::parse("check", SCENARIO).unwrap();
        let mut random = Model::new(1.0, seed).random;
        let go = AtomicBool::new(false);
        let checked = check(
            &scenario,
            rounds,
            0.05,
            |side| {
                let off = random.between(1.0 - noise, 1.0 + noise);
                let slower = if side == Side::Head {
                    1.0 / (1.0 - slowdown)
                } else {
                    1.0
                };
                let mut model = Model {
                    cpu: off * slower,
                    ..Model::new(1e6, 1)
                };
                let point = &scenario.stages()[0].points[0];
                let trial = model.trial(&point.offer(Duration::from_secs(1)))?;
                Ok(RunResult {
                    trials: vec![TrialRecord {
                        round: 0,
                        variant: "tun".to_owned(),
                        point: point.clone(),
                        bed: model.description(),
                        foreign: Foreign::default(),
                        measured: trial,
                    }],
                    ..RunResult::default()
                })
            },
            &go,
        );
        worst(&checked.unwrap())
    }

    #[test]
    fn verdicts_for_known_slowdowns() {
        for (slowdown, noise, rounds, expected) in [
            (0.0, 0.0, 8, Judgement::Good),
            (0.0, 0.01, 12, Judgement::Good),
            (0.04, 0.001, 12, Judgement::Good),
            (0.08, 0.01, 12, Judgement::Slower),
            (-0.3, 0.02, 12, Judgement::Good),
            // Four rounds prove nothing.
            (0.5, 0.0, 4, Judgement::Inconclusive),
            // The noise is larger than what is asked for.
            (0.05, 0.2, 12, Judgement::Inconclusive),
        ] {
            assert_eq!(
                judgement(slowdown, noise, rounds, 5),
                expected,
                "{slowdown} {noise} {rounds}"
            );
        }
    }

    #[test]
    fn innocents_are_not_convicted() {
        let convicted = |slowdown, noise| {
            let slower = |seed| judgement(slowdown, noise, 12, seed) == Judgement::Slower;
            (0..300).filter(|seed| slower(*seed)).count()
        };
        assert_eq!(convicted(0.0, 0.02), 0);
        // Three times the standard deviation above the 4 % outside a 96 % interval, were the slowdown at the very limit.
        assert!(convicted(0.05, 0.02) < 300 * 4 / 100 + 11);
        assert!(convicted(0.04, 0.02) < 300 * 4 / 100);
        assert!(convicted(0.08, 0.01) > 280);
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let scenario = Scenario::parse("check", SCENARIO).unwrap();
        let go = AtomicBool::new(false);
        let nothing = |_: Side| Ok(RunResult::default());
        let checked = check(&scenario, 6, 0.05, nothing, &go).unwrap();
        assert_eq!(worst(&checked), Judgement::NotMeasured);
        assert_eq!(checked.len(), 1);
    }
}
