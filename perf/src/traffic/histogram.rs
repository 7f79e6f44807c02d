//! A histogram of times with sixteen buckets per power of two: 6 % resolution, constant size.

use core::time::Duration;

const STEPS_LOG2: u32 = 4;
const STEPS: u64 = 1 << STEPS_LOG2;
const BUCKETS: usize = 61 * 16;

#[derive(Debug, Clone)]
pub(super) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    pub(super) fn new() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            count: 0,
        }
    }

    pub(super) fn record(&mut self, nanoseconds: u64) {
        self.buckets[bucket(nanoseconds)] += 1;
        self.count += 1;
    }

    /// The time that `percent` of all records do not exceed (up to the resolution); zero when
    /// nothing was recorded.
    pub(super) fn percentile(&self, percent: u64) -> Duration {
        let wanted = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(upper_edge(index));
            }
        }
        Duration::ZERO
    }
}

/// Values below 16 have a bucket each; above, the top five bits choose.
fn bucket(value: u64) -> usize {
    let index = if value < STEPS {
        value
    } else {
        let shift = value.ilog2() - STEPS_LOG2;
        u64::from(shift) * STEPS + (value >> shift)
    };
    usize::try_from(index)
        .unwrap_or(BUCKETS - 1)
        .min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper_edge(index: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    if index < STEPS {
        return index;
    }
    let shift = index / STEPS - 1;
    let step = index % STEPS + STEPS;
    ((step + 1) << shift).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        for value in (0..5000).chain([u64::from(u32::MAX), 1 << 40, u64::MAX / 3, u64::MAX]) {
            let index = bucket(value);
            assert!(index < BUCKETS, "{value}");
            assert!(
                value <= upper_edge(index),
                "{value} is above bucket {index}"
            );
            assert!(
                index == 0 || value > upper_edge(index - 1),
                "{value} is below bucket {index}"
            );
        }
    }

    #[test]
    fn percentiles_of_a_known_row() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.percentile(50), Duration::ZERO);
        (1..=1000).for_each(|value| histogram.record(value * 1000));
        let near = |time: Duration, value: u128| {
            time.as_nanos() >= value && time.as_nanos() < value * 107 / 100
        };
        assert!(near(histogram.percentile(50), 500_000));
        assert!(near(histogram.percentile(99), 990_000));
    }
}
