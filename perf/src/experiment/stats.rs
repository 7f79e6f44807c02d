//! Medians, spreads, and what pairs of measurements allow to claim.
//!
//! A ratio is that of two variants in one round, so that whatever slows the machine for a while slows both. The figure is the
//! median of these ratios. Its interval is that of the sign test: between the k-th smallest and the k-th largest ratio, with
//! the largest k for which the true median lies outside with a probability of at most 5 %. It holds for any distribution of
//! the noise, which a bootstrap of half a dozen rounds does not, and its price is that less than six rounds prove nothing.

use core::fmt;

use serde::{Deserialize, Serialize};

/// What an interval has to hold the true median with, before it says that two things differ.
pub const CONFIDENCE: f64 = 0.95;

/// Beyond this the sums of binomial coefficients leave what an `f64` holds.
pub const ROUNDS_MAX: u32 = 1000;

/// A row of measurements of the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// The one in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// A quarter of them is below.
    pub lower_quartile: f64,
    /// A quarter of them is above.
    pub upper_quartile: f64,
}

impl Spread {
    /// Of at least one value.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        let at = |fraction| quantile(&sorted, fraction);
        Some(Self {
            count: sorted.len(),
            median: at(0.5)?,
            min: at(0.0)?,
            max: at(1.0)?,
            lower_quartile: at(0.25)?,
            upper_quartile: at(0.75)?,
        })
    }

    /// The distance between the quartiles, as a fraction of the median.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.median == 0.0 {
            return 0.0;
        }
        ((self.upper_quartile - self.lower_quartile) / self.median).abs()
    }
}

/// How one thing stands to another, measured in pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ratio {
    /// Pairs.
    pub count: usize,
    /// The median of the ratios.
    pub median: f64,
    /// Where the true median begins, with `confidence`.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
    /// The probability that it lies between the two.
    pub confidence: f64,
}

impl Ratio {
    /// Of at least one pair of what is measured and what it is measured against. Pairs with a zero are left out.
    #[must_use]
    pub fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        let ratios: Vec<f64> = pairs
            .iter()
            .filter(|(value, base)| *value > 0.0 && *base > 0.0)
            .map(|(value, base)| value / base)
            .collect();
        let sorted = sorted(&ratios);
        let (outside, confidence) = sign_interval(sorted.len());
        Some(Self {
            count: sorted.len(),
            median: quantile(&sorted, 0.5)?,
            low: *sorted.get(outside)?,
            high: *sorted.get(sorted.len() - 1 - outside)?,
            confidence,
        })
    }

    /// Whether the interval is as sure as a claim has to be.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        self.confidence >= CONFIDENCE
    }

    /// What may be claimed, if `more` of the figure is better, or if less is.
    #[must_use]
    pub fn verdict(&self, better: Better) -> Verdict {
        let (more, less) = match better {
            Better::More => (Verdict::Better, Verdict::Worse),
            Better::Less => (Verdict::Worse, Verdict::Better),
        };
        if !self.is_sure() {
            Verdict::TooFewRounds
        } else if self.low > 1.0 {
            more
        } else if self.high < 1.0 {
            less
        } else {
            Verdict::NoDifference
        }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2}× [{:.2}, {:.2}]", self.median, self.low, self.high)
    }
}

/// Which way a figure is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The larger the better.
    More,
    /// The smaller the better.
    Less,
}

/// What a ratio allows to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Better than what it is compared with.
    Better,
    /// Worse.
    Worse,
    /// The interval holds 1: no difference is shown, which does not say that there is none.
    NoDifference,
    /// The interval cannot be sure enough.
    TooFewRounds,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::NoDifference => "no difference shown",
            Self::TooFewRounds => "too few rounds",
        })
    }
}

/// How many ratios lie outside the interval on each side, and the probability that the true median lies inside.
fn sign_interval(count: usize) -> (usize, f64) {
    // P(at most `k` of `count` fair coins show heads), one term after the other.
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = term;
    let mut outside = 0;
    let mut confidence = 1.0 - 2.0 * tail;
    for k in 1..count.div_ceil(2) {
        term *= as_f64(count - k + 1) / as_f64(k);
        tail += term;
        if 1.0 - 2.0 * tail < CONFIDENCE {
            break;
        }
        outside = k;
        confidence = 1.0 - 2.0 * tail;
    }
    (outside, confidence.max(0.0))
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Between neighbours by their distance.
fn quantile(sorted: &[f64], fraction: f64) -> Option<f64> {
    let position = as_f64(sorted.len().checked_sub(1)?) * fraction;
    let below = whole(position.floor());
    let lower = sorted.get(usize::try_from(below).ok()?)?;
    let upper = sorted
        .get(usize::try_from(below + 1).ok()?)
        .unwrap_or(lower);
    Some(lower + (upper - lower) * position.fract())
}

/// A count as a number to divide by.
#[must_use]
pub fn as_f64(count: usize) -> f64 {
    count as f64
}

/// The whole part of a number; zero for what is below, the largest for what is above.
#[must_use]
pub fn whole(value: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the conversion saturates, which is what is wanted"
    )]
    {
        value as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::model::Random;
    use proptest::prelude::*;

    #[test]
    fn spreads_of_known_rows() {
        assert_eq!(Spread::of(&[]), None);
        let one = Spread::of(&[3.0]).unwrap();
        assert_eq!((one.median, one.min, one.max), (3.0, 3.0, 3.0));
        let five = Spread::of(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!((five.lower_quartile, five.median), (2.0, 3.0));
        assert_eq!((five.upper_quartile, five.relative()), (4.0, 2.0 / 3.0));
        assert_eq!(Spread::of(&[1.0, 2.0]).unwrap().median, 1.5);
    }

    /// From tables of the sign test: how many of n may lie outside at 95 %.
    #[test]
    fn intervals_of_the_sign_test() {
        for (count, outside, confidence) in [
            (1, 0, 0.0),
            (2, 0, 0.5),
            (5, 0, 0.9375),
            (6, 0, 0.96875),
            (8, 0, 0.9921875),
            (9, 1, 0.9609375),
            (12, 2, 0.961426),
            (15, 3, 0.964844),
            (20, 5, 0.958611),
            (25, 7, 0.956715),
        ] {
            let (found, sure) = sign_interval(count);
            assert_eq!(found, outside, "{count}");
            assert!((sure - confidence).abs() < 1e-5, "{count}: {sure}");
        }
        let (outside, confidence) = sign_interval(1000);
        assert!((460..475).contains(&outside) && confidence >= CONFIDENCE);
    }

    #[test]
    fn five_rounds_prove_nothing_and_six_do() {
        let pairs = [(2.0, 1.0); 6];
        let verdict = |count: usize| Ratio::of(&pairs[..count]).unwrap().verdict(Better::More);
        assert_eq!(verdict(5), Verdict::TooFewRounds);
        assert_eq!(verdict(6), Verdict::Better);
        let less = Ratio::of(&pairs).unwrap().verdict(Better::Less);
        assert_eq!(less, Verdict::Worse);
        let equal = Ratio::of(&[(1.0, 1.0); 6]).unwrap();
        assert_eq!(equal.verdict(Better::More), Verdict::NoDifference);
        assert_eq!(Ratio::of(&[(1.0, 0.0)]), None);
    }

    /// How often of 1,000 seeds two noisy things with this ratio are called different.
    fn called_different(true_ratio: f64, rounds: usize) -> u32 {
        let mut different = 0;
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            // The machine as a whole drifts by a factor of two; each measurement is off by up to 10 %, now and then by half.
            let mut measure = |truth: f64, drift: f64| {
                let outlier = if random.below(20) == 0 { 0.5 } else { 1.0 };
                truth * drift * outlier * random.between(0.9, 1.1)
            };
            let pairs: Vec<(f64, f64)> = (0..rounds)
                .map(|round| {
                    let drift = 1.0 + as_f64(round) / as_f64(rounds);
                    (measure(true_ratio, drift), measure(1.0, drift))
                })
                .collect();
            let verdict = Ratio::of(&pairs).unwrap().verdict(Better::More);
            different += u32::from(matches!(verdict, Verdict::Better | Verdict::Worse));
        }
        different
    }

    #[test]
    fn equal_things_are_called_different_no_more_often_than_stated() {
        for rounds in [6, 7, 9, 12, 20] {
            let (_, confidence) = sign_interval(rounds);
            // What is stated, and three standard deviations of 1,000 tries. The seeds are fixed: no chance is left.
            let stated = (1.0 - confidence) * 1000.0;
            let allowed = stated + 3.0 * (stated * confidence).sqrt();
            let found = called_different(1.0, rounds);
            assert!(f64::from(found) <= allowed, "{rounds}: {found} of 1000");
        }
    }

    #[test]
    fn different_things_are_called_so() {
        for (true_ratio, rounds) in [(1.5, 6), (1.2, 12), (1.08, 40)] {
            let found = called_different(true_ratio, rounds);
            assert!(found > 600, "{true_ratio} in {rounds}: {found} of 1000");
        }
    }

    proptest! {
        #[test]
        fn a_ratio_lies_in_its_interval(pairs in prop::collection::vec((0.1_f64..10.0, 0.1_f64..10.0), 1..50)) {
            let ratio = Ratio::of(&pairs).unwrap();
            prop_assert!(ratio.low <= ratio.median && ratio.median <= ratio.high);
            // Turned around, it says the opposite.
            let turned: Vec<_> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
            let turned = Ratio::of(&turned).unwrap();
            prop_assert!((turned.low * ratio.high - 1.0).abs() < 1e-9);
            prop_assert_eq!(turned.verdict(Better::Less), ratio.verdict(Better::More));
        }

        #[test]
        fn a_spread_is_in_order(values in prop::collection::vec(-1e9_f64..1e9, 1..100)) {
            let s = Spread::of(&values).unwrap();
            prop_assert!(s.min <= s.lower_quartile && s.lower_quartile <= s.median);
            prop_assert!(s.median <= s.upper_quartile && s.upper_quartile <= s.max);
        }
    }
}
