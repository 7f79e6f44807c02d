//! Which packets of each flow have come: what is missing, late, or there twice.

/// The least of a flow's past that is remembered, in packets.
const WINDOW_MIN: usize = 64;
/// The most.
const WINDOW_MAX: usize = 1 << 16;
/// What all flows together may take, in packets: bits.
const WINDOWS_ALL: usize = 1 << 24;

/// What an arrival was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The latest of its flow.
    Next,
    /// Came after a later one.
    Late,
    /// Has come before.
    Again,
    /// Older than what is remembered: late or again, it cannot be said which.
    Forgotten,
}

/// The past of all flows.
#[derive(Debug)]
pub(super) struct Order {
    /// The sequence number after the latest that has come, by flow.
    next: Vec<u64>,
    /// Packets that have come, each once, by flow.
    came: Vec<u64>,
    /// A ring of bits for each flow: whether the packet with that number has come.
    seen: Vec<u64>,
    words: usize,
}

impl Order {
    pub(super) fn new(flows: usize) -> Self {
        let window = (WINDOWS_ALL / flows.max(1))
            .clamp(WINDOW_MIN, WINDOW_MAX)
            .next_power_of_two();
        let words = window.min(WINDOW_MAX) / 64;
        Self {
            next: vec![0; flows],
            came: vec![0; flows],
            seen: vec![0; flows * words],
            words,
        }
    }

    /// Packets of each flow that are remembered.
    pub(super) fn window(&self) -> u64 {
        u64::try_from(self.words * 64).unwrap_or(u64::MAX)
    }

    pub(super) fn clear(&mut self) {
        self.next.fill(0);
        self.came.fill(0);
        self.seen.fill(0);
    }

    /// Packets of a flow that have come, each once.
    pub(super) fn came(&self) -> &[u64] {
        &self.came
    }

    /// Takes an arrival down; `None` if there is no such flow.
    #[inline]
    pub(super) fn arrived(&mut self, flow: u32, sequence: u32) -> Option<Place> {
        let flow = usize::try_from(flow).ok()?;
        let next = *self.next.get(flow)?;
        // The number nearest to the one expected that has these bits.
        let low = u32::try_from(next & u64::from(u32::MAX)).unwrap_or_default();
        let ahead = sequence.wrapping_sub(low).cast_signed();
        let number = next.checked_add_signed(ahead.into());
        let window = self.window();
        let Some(number) = number.filter(|number| number + window >= next) else {
            return Some(Place::Forgotten);
        };
        if number >= next {
            self.forget(flow, next, number);
            self.next[flow] = number + 1;
            self.came[flow] += 1;
            *self.word(flow, number) |= 1 << (number % 64);
            return Some(Place::Next);
        }
        let bit = 1 << (number % 64);
        let word = self.word(flow, number);
        if *word & bit != 0 {
            return Some(Place::Again);
        }
        *word |= bit;
        self.came[flow] += 1;
        Some(Place::Late)
    }

    #[inline]
    fn word(&mut self, flow: usize, number: u64) -> &mut u64 {
        let position = usize::try_from(number / 64).unwrap_or_default() % self.words;
        &mut self.seen[flow * self.words + position]
    }

    /// Clears the bits from `first` to `last`, whose places an older packet had.
    #[inline]
    fn forget(&mut self, flow: usize, first: u64, last: u64) {
        let first = first.max((last + 1).saturating_sub(self.window()));
        let mut number = first;
        while number <= last {
            // To the end of the word, or to the last.
            let count = (64 - number % 64).min(last - number + 1);
            let bits = if count == 64 {
                u64::MAX
            } else {
                (1 << count) - 1
            };
            *self.word(flow, number) &= !(bits << (number % 64));
            number += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The obvious way: every number that has come.
    #[derive(Default)]
    struct Oracle {
        seen: HashSet<u64>,
        next: u64,
    }

    impl Oracle {
        fn arrived(&mut self, number: u64, window: u64) -> Place {
            if number + window < self.next {
                return Place::Forgotten;
            }
            let first = self.seen.insert(number);
            if number >= self.next {
                self.next = number + 1;
                Place::Next
            } else if first {
                Place::Late
            } else {
                Place::Again
            }
        }
    }

    #[test]
    fn agrees_with_a_list_of_all_numbers() {
        for flows in [1, 1 << 18] {
            let mut order = Order::new(flows);
            let window = order.window();
            let mut oracle = Oracle::default();
            let mut state = 1_u64;
            // Beyond 2^32, by leaps, and around each a crowd.
            let mut base = 0_u64;
            for round in 0..20_000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                base += match round % 1000 {
                    999 => 0x7000_0000,
                    _ => state >> 62,
                };
                let number = base.saturating_sub(state >> 33 & (2 * window - 1));
                let number = if state >> 40 & 3 == 0 {
                    number
                } else {
                    base.saturating_sub(state >> 33 & 15)
                };
                let low = u32::try_from(number & 0xffff_ffff).expect("32 bits");
                let last = u32::try_from(flows - 1).expect("small");
                assert_eq!(
                    order.arrived(last, low),
                    Some(oracle.arrived(number, window)),
                    "round {round}, number {number}, next {}, window {window}",
                    oracle.next
                );
            }
        }
    }

    #[test]
    fn counts_each_packet_once() {
        let mut order = Order::new(2);
        let places: Vec<_> = [0, 1, 3, 2, 3, 1, 6]
            .map(|sequence| order.arrived(1, sequence).expect("a flow"))
            .to_vec();
        use Place::{Again, Late, Next};
        assert_eq!(places, [Next, Next, Next, Late, Again, Again, Next]);
        assert_eq!(order.came(), [0, 5]);
        assert_eq!(order.arrived(2, 0), None);
        order.clear();
        assert_eq!(order.arrived(1, 0), Some(Next));
        assert_eq!(order.came(), [0, 1]);
    }
}
