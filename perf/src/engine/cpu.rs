//! What the whole machine spends: CPU time, from `/proc/stat` (proc(5)), and the processor's own counters.

use core::time::Duration;
use std::fs;

use anyhow::{Context, Result};

use super::counters::Counting;
use crate::measure::{CpuTimes, PerfCounters};

/// Ticks of `/proc/stat` in a second, as the kernel shows them to user space on every architecture (`USER_HZ`).
const USER_HZ: u64 = 100;

/// The machine's CPUs from a moment on.
#[derive(Debug)]
pub(crate) struct Window {
    before: CpuTimes,
    counting: Option<Counting>,
}

impl Window {
    pub(crate) fn open() -> Result<Self> {
        let counting = Counting::start();
        let before = cpu_times()?;
        Ok(Self { before, counting })
    }

    /// What was spent since; the second where the machine has such counters.
    pub(crate) fn close(self) -> Result<(CpuTimes, Option<PerfCounters>)> {
        let times = since(&cpu_times()?, &self.before);
        Ok((times, self.counting.and_then(Counting::finish)))
    }
}

/// CPU time since boot, all CPUs added up. Resolution: 10 ms.
///
/// # Errors
/// `/proc` is not there.
pub fn cpu_times() -> Result<CpuTimes> {
    parse(&fs::read_to_string("/proc/stat").context("/proc/stat")?)
}

/// What went by between two readings.
#[must_use]
pub fn since(now: &CpuTimes, before: &CpuTimes) -> CpuTimes {
    CpuTimes {
        user: now.user.saturating_sub(before.user),
        system: now.system.saturating_sub(before.system),
        irq: now.irq.saturating_sub(before.irq),
        softirq: now.softirq.saturating_sub(before.softirq),
        steal: now.steal.saturating_sub(before.steal),
        idle: now.idle.saturating_sub(before.idle),
    }
}

/// Reads the line of all CPUs: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest nice. The kernel has
/// counted guests in user and nice already (`account_guest_time`).
fn parse(text: &str) -> Result<CpuTimes> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "));
    let line = line.context("no line of all CPUs in /proc/stat")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("/proc/stat: cpu {line}"))?;
    let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
        anyhow::bail!("/proc/stat has {} numbers", ticks.len());
    };
    let time = |ticks: u64| Duration::from_millis(ticks * (1000 / USER_HZ));
    Ok(CpuTimes {
        user: time(user + nice),
        system: time(system),
        irq: time(irq),
        softirq: time(softirq),
        steal: time(steal),
        idle: time(idle + iowait),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_time_is_read() {
        let text = "cpu  100 20 300 4000 50 6 70 8 90 1\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        let times = parse(text).expect("parses");
        let expected = [1200, 3000, 60, 700, 80, 40_500].map(Duration::from_millis);
        let CpuTimes {
            user,
            system,
            irq,
            softirq,
            steal,
            idle,
        } = times;
        assert_eq!([user, system, irq, softirq, steal, idle], expected);
        assert_eq!(since(&times, &times), CpuTimes::default());
        assert!(parse("cpu0 1 2 3").is_err());
        assert!(parse("cpu  1 2 three 4 5 6 7 8").is_err());
        assert!(parse("cpu  1 2 3").is_err());
    }

    #[test]
    fn this_machine_has_them() {
        let times = cpu_times().expect("/proc/stat");
        assert!(times.idle + times.user > Duration::ZERO);
    }
}
