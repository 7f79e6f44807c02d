//! Cycles and instructions of the whole machine, from the processor's counters (`perf_event_open(2)`).

use std::fs::File;
use std::io::Read;

use super::kernel;
use crate::measure::PerfCounters;

/// `PERF_COUNT_HW_CPU_CYCLES` and `PERF_COUNT_HW_INSTRUCTIONS`.
const EVENTS: [u64; 2] = [0, 1];

/// Counters that run, on all CPUs.
#[derive(Debug)]
pub struct Counting {
    /// For each CPU the counters of `EVENTS`.
    files: Vec<[File; 2]>,
}

impl Counting {
    /// Starts to count; `None` where the machine has no such counters (most virtual ones), or does not let us.
    #[must_use]
    pub fn start() -> Option<Self> {
        let cpus = libbpf_rs::num_possible_cpus().ok()?;
        let open = |cpu: usize, event: u64| kernel::count_event(cpu, event).ok().map(File::from);
        let files: Vec<_> = (0..cpus)
            // A CPU that is offline has none.
            .filter_map(|cpu| Some([open(cpu, EVENTS[0])?, open(cpu, EVENTS[1])?]))
            .collect();
        (!files.is_empty()).then_some(Self { files })
    }

    /// What was counted since the start; `None` if a counter could not be read.
    #[must_use]
    pub fn finish(self) -> Option<PerfCounters> {
        let mut sum = PerfCounters::default();
        for [cycles, instructions] in self.files {
            sum.cycles += value(cycles)?;
            sum.instructions += value(instructions)?;
        }
        Some(sum)
    }
}

fn value(mut counter: File) -> Option<u64> {
    let mut bytes = [0; 8];
    counter.read_exact(&mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_or_says_that_it_cannot() {
        let Some(counting) = Counting::start() else {
            assert!(kernel::count_event(0, EVENTS[0]).is_err());
            return;
        };
        let counted = counting.finish().expect("readable");
        assert!(
            counted.cycles > 0 && counted.instructions > 0,
            "{counted:?}"
        );
    }
}
