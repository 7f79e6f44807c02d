//! Growing waits, and the chance that spreads them.

use core::time::Duration;

use crate::mac::Mac;

/// The first and the longest wait between tries.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Any number; good for spreading load and for addresses, not for secrets.
pub(super) fn random() -> u64 {
    use core::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

/// Growing waits, spread so that a thousand nodes do not knock together.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure.
    pub(super) fn next(&mut self) -> Duration {
        let full = RETRY_FIRST
            .saturating_mul(1 << self.failures.min(8))
            .min(RETRY_MAX);
        self.failures += 1;
        let half = full / 2;
        let spread = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
        half + Duration::from_micros(random() % spread)
    }
}

/// A locally administered unicast address.
pub(super) fn random_mac() -> Mac {
    let [a, b, c, d, e, f, ..] = random().to_ne_bytes();
    Mac([a & 0xfe | 2, b, c, d, e, f])
}
