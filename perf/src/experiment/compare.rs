//! Two results, or two variants of one, beside each other.

use super::result::RunResult;
use super::scenario::Scenario;
use super::summary::{Comparison, ratios, series};

/// The variants that two results share, at the points that they share; the first result being 1. Rounds are paired by their
/// number. They were not interleaved: what was different about the machine between the two is in the ratio as well.
#[must_use]
pub fn results(first: (&Scenario, &RunResult), second: (&Scenario, &RunResult)) -> Vec<Comparison> {
    let base = series(first.0, &first.1.trials);
    let mut comparisons = Vec::new();
    for one in series(second.0, &second.1.trials) {
        let same = base
            .iter()
            .find(|other| other.point == one.point && other.variant == one.variant);
        if let Some(other) = same {
            comparisons.push(Comparison {
                point: one.point.clone(),
                variant: one.variant.to_owned(),
                with: one.variant.to_owned(),
                ratios: ratios(&one.rounds, &other.rounds),
            });
        }
    }
    comparisons
}

/// Two variants of one result, the first being 1.
#[must_use]
pub fn variants(
    scenario: &Scenario,
    run: &RunResult,
    first: &str,
    second: &str,
) -> Vec<Comparison> {
    let all = series(scenario, &run.trials);
    let mut comparisons = Vec::new();
    for one in all.iter().filter(|series| series.variant == second) {
        let other = all
            .iter()
            .find(|other| other.point == one.point && other.variant == first);
        if let Some(other) = other {
            comparisons.push(Comparison {
                point: one.point.clone(),
                variant: second.to_owned(),
                with: first.to_owned(),
                ratios: ratios(&one.rounds, &other.rounds),
            });
        }
    }
    comparisons
}
