//! What a trial comes to: rates, costs, times.
//!
//! Costs are **box-wide**: user, system, irq and softirq of all CPUs, whoever spent them, because a path that moves its work to
//! another CPU has not saved it. *Gross* includes the engines that make and count the packets; *net* is without what they
//! cost by themselves in the same run, as the scenario's `wire` variant says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::stats::Better;
use crate::measure::{Trial, Work};

/// One number of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Figure {
    /// Million packets received a second; for round trips, answers.
    Mpps,
    /// Inner gigabits received a second.
    GbitsPerSecond,
    /// CPU seconds of the whole machine for a million packets.
    CpuSecondsGross,
    /// The same without the engines.
    CpuSecondsNet,
    /// Thousand packets for a CPU second of the whole machine.
    KpacketsPerCpuSecondGross,
    /// The same without the engines.
    KpacketsPerCpuSecondNet,
    /// Inner gigabits for a CPU second of the whole machine.
    GbitsPerCpuSecond,
    /// Core cycles of the whole machine for a packet, from the processor's counters.
    Cycles,
    /// Instructions of the whole machine for a packet.
    Instructions,
    /// Cycles of the workers' busy turns for a packet.
    WorkerCycles,
    /// Packets in each of the workers' busy turns.
    PacketsPerBurst,
    /// Share of the workers' cycles in turns without a packet.
    WorkerIdle,
    /// Share of the packets sent that did not arrive.
    Loss,
    /// Microseconds that half of the packets do not exceed.
    LatencyP50,
    /// That 90 % do not exceed.
    LatencyP90,
    /// That 99 % do not exceed.
    LatencyP99,
    /// That 99.9 % do not exceed.
    LatencyP999,
    /// That none exceeds.
    LatencyMax,
}

impl Figure {
    /// Name and unit, for a person.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Mpps => "Mpps",
            Self::GbitsPerSecond => "Gb/s",
            Self::CpuSecondsGross => "CPU s/Mpkt gross",
            Self::CpuSecondsNet => "CPU s/Mpkt net",
            Self::KpacketsPerCpuSecondGross => "kpkt/CPU s gross",
            Self::KpacketsPerCpuSecondNet => "kpkt/CPU s net",
            Self::GbitsPerCpuSecond => "Gb/CPU s gross",
            Self::Cycles => "cycles/pkt, box",
            Self::Instructions => "instructions/pkt, box",
            Self::WorkerCycles => "cycles/pkt, workers",
            Self::PacketsPerBurst => "pkts/burst",
            Self::WorkerIdle => "workers idle",
            Self::Loss => "lost",
            Self::LatencyP50 => "p50 µs",
            Self::LatencyP90 => "p90 µs",
            Self::LatencyP99 => "p99 µs",
            Self::LatencyP999 => "p99.9 µs",
            Self::LatencyMax => "max µs",
        }
    }

    /// Whether more of it is better.
    #[must_use]
    pub const fn better(self) -> Better {
        match self {
            Self::Mpps
            | Self::GbitsPerSecond
            | Self::KpacketsPerCpuSecondGross
            | Self::KpacketsPerCpuSecondNet
            | Self::GbitsPerCpuSecond
            | Self::PacketsPerBurst
            | Self::WorkerIdle => Better::More,
            Self::CpuSecondsGross
            | Self::CpuSecondsNet
            | Self::Cycles
            | Self::Instructions
            | Self::WorkerCycles
            | Self::Loss
            | Self::LatencyP50
            | Self::LatencyP90
            | Self::LatencyP99
            | Self::LatencyP999
            | Self::LatencyMax => Better::Less,
        }
    }

    /// As text, with as many digits as it has a meaning.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        match self {
            Self::WorkerIdle => format!("{:.0} %", value * 100.0),
            Self::Loss if value == 0.0 => "0".to_owned(),
            Self::Loss if value < 0.0001 => format!("{:.1} ppm", value * 1e6),
            Self::Loss => format!("{:.2} %", value * 100.0),
            Self::Cycles | Self::Instructions | Self::WorkerCycles => format!("{value:.0}"),
            Self::KpacketsPerCpuSecondGross | Self::KpacketsPerCpuSecondNet => {
                format!("{value:.0}")
            }
            Self::Mpps
            | Self::GbitsPerSecond
            | Self::CpuSecondsGross
            | Self::CpuSecondsNet
            | Self::GbitsPerCpuSecond
            | Self::PacketsPerBurst
            | Self::LatencyP50
            | Self::LatencyP90
            | Self::LatencyP99
            | Self::LatencyP999
            | Self::LatencyMax => significant(value),
        }
    }

    /// What a kind of work is compared by, the most important first.
    #[must_use]
    pub const fn headline(work: Work) -> &'static [Self] {
        match work {
            Work::Packets => &[
                Self::KpacketsPerCpuSecondGross,
                Self::KpacketsPerCpuSecondNet,
                Self::Mpps,
                Self::LatencyP99,
            ],
            Work::Tcp => &[Self::GbitsPerSecond, Self::GbitsPerCpuSecond],
            Work::RoundTrips => &[
                Self::LatencyP50,
                Self::LatencyP99,
                Self::KpacketsPerCpuSecondGross,
            ],
        }
    }

    /// What is told of each variant.
    #[must_use]
    pub const fn told(work: Work) -> &'static [Self] {
        match work {
            Work::Packets => &[
                Self::Mpps,
                Self::GbitsPerSecond,
                Self::Loss,
                Self::KpacketsPerCpuSecondGross,
                Self::KpacketsPerCpuSecondNet,
                Self::CpuSecondsGross,
                Self::CpuSecondsNet,
                Self::WorkerCycles,
                Self::PacketsPerBurst,
                Self::WorkerIdle,
                Self::Cycles,
                Self::Instructions,
                Self::LatencyP50,
                Self::LatencyP99,
            ],
            Work::Tcp => &[
                Self::GbitsPerSecond,
                Self::GbitsPerCpuSecond,
                Self::WorkerCycles,
                Self::PacketsPerBurst,
                Self::WorkerIdle,
            ],
            Work::RoundTrips => &[
                Self::LatencyP50,
                Self::LatencyP90,
                Self::LatencyP99,
                Self::LatencyP999,
                Self::LatencyMax,
                Self::Loss,
                Self::KpacketsPerCpuSecondGross,
                Self::WorkerIdle,
            ],
        }
    }
}

/// Three digits that count, and no more than three behind the point.
pub(crate) fn significant(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// All figures that a trial allows, but those net of the engines.
#[must_use]
pub fn of(measured: &Trial) -> BTreeMap<Figure, f64> {
    let mut figures = BTreeMap::new();
    let mut add = |figure, numerator: f64, denominator: f64| {
        if denominator > 0.0 {
            figures.insert(figure, numerator / denominator);
        }
    };
    let seconds = measured.elapsed.as_secs_f64();
    let packets = measured.received as f64;
    let gbits = measured.received_bytes as f64 * 8.0 / 1e9;
    let cpu = measured.busy_seconds();
    // A TCP stream has bytes, and packets only where its segments were counted.
    let counted = if packets > 0.0 { seconds } else { 0.0 };
    add(Figure::Mpps, packets / 1e6, counted);
    add(Figure::GbitsPerSecond, gbits, seconds);
    add(Figure::GbitsPerCpuSecond, gbits, cpu);
    if packets > 0.0 && cpu > 0.0 {
        add(Figure::CpuSecondsGross, cpu * 1e6, packets);
        add(Figure::KpacketsPerCpuSecondGross, packets / 1e3, cpu);
    }
    if let Some(counters) = &measured.counters {
        add(Figure::Cycles, counters.cycles as f64, packets);
        add(Figure::Instructions, counters.instructions as f64, packets);
    }
    if let Some(workers) = &measured.workers {
        let (busy, idle) = (workers.busy_cycles as f64, workers.idle_cycles as f64);
        let handled = workers.packets as f64;
        add(Figure::WorkerCycles, busy, handled);
        add(Figure::PacketsPerBurst, handled, workers.busy_turns as f64);
        add(Figure::WorkerIdle, idle, busy + idle);
    }
    add(Figure::Loss, measured.lost as f64, measured.sent as f64);
    for (figure, quantile) in [
        (Figure::LatencyP50, 0.5),
        (Figure::LatencyP90, 0.9),
        (Figure::LatencyP99, 0.99),
        (Figure::LatencyP999, 0.999),
        (Figure::LatencyMax, 1.0),
    ] {
        if let Some(nanoseconds) = measured.latency_at(quantile) {
            figures.insert(figure, nanoseconds as f64 / 1e3);
        }
    }
    figures
}

/// Adds the figures net of what the engines cost: `engines` CPU seconds for a million packets.
pub fn add_net(figures: &mut BTreeMap<Figure, f64>, engines: f64) {
    let Some(gross) = figures.get(&Figure::CpuSecondsGross) else {
        return;
    };
    let net = gross - engines;
    // What costs no more than the engines cannot be told from nothing.
    if net > 0.0 {
        figures.insert(Figure::CpuSecondsNet, net);
        figures.insert(Figure::KpacketsPerCpuSecondNet, 1e3 / net);
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use super::*;
    use crate::measure::{CpuTimes, PerfCounters, WorkerCost};
    use hdrhistogram::Histogram;

    fn trial() -> Trial {
        let mut latency = Histogram::new(3).unwrap();
        for nanoseconds in 1..=1000 {
            latency.record(nanoseconds * 1000).unwrap();
        }
        Trial {
            sent: 2_500_000,
            received: 2_000_000,
            received_bytes: 128_000_000,
            lost: 500_000,
            elapsed: Duration::from_secs(2),
            latency: Some(latency),
            cpus: CpuTimes {
                user: Duration::from_millis(500),
                system: Duration::from_millis(1000),
                irq: Duration::from_millis(100),
                softirq: Duration::from_millis(1400),
                steal: Duration::from_millis(7000),
                idle: Duration::from_millis(9000),
            },
            counters: Some(PerfCounters {
                cycles: 6_000_000_000,
                instructions: 8_000_000_000,
            }),
            workers: Some(WorkerCost {
                packets: 2_000_000,
                busy_turns: 50_000,
                busy_cycles: 500_000_000,
                idle_cycles: 1_500_000_000,
            }),
            ..Trial::default()
        }
    }

    #[test]
    fn figures_of_a_known_trial() {
        let mut figures = of(&trial());
        add_net(&mut figures, 0.5);
        let close = |figure: Figure, expected: f64| {
            let found = figures[&figure];
            assert!((found / expected - 1.0).abs() < 2e-3, "{figure:?}: {found}");
        };
        for (figure, expected) in [
            (Figure::Mpps, 1.0),
            (Figure::GbitsPerSecond, 0.512),
            (Figure::CpuSecondsGross, 1.5),
            (Figure::CpuSecondsNet, 1.0),
            (Figure::KpacketsPerCpuSecondGross, 666.67),
            (Figure::KpacketsPerCpuSecondNet, 1000.0),
            (Figure::GbitsPerCpuSecond, 1.024 / 3.0),
            (Figure::Cycles, 3000.0),
            (Figure::Instructions, 4000.0),
            (Figure::WorkerCycles, 250.0),
            (Figure::PacketsPerBurst, 40.0),
            (Figure::WorkerIdle, 0.75),
            (Figure::Loss, 0.2),
            (Figure::LatencyP50, 500.0),
            (Figure::LatencyP90, 900.0),
            (Figure::LatencyP99, 990.0),
            (Figure::LatencyP999, 999.0),
            (Figure::LatencyMax, 1000.0),
        ] {
            close(figure, expected);
        }
        assert_eq!(figures.len(), 18, "{figures:?}");
    }

    #[test]
    fn nothing_received_has_no_cost() {
        let nothing = of(&Trial {
            sent: 10,
            lost: 10,
            ..Trial::default()
        });
        assert_eq!(nothing, BTreeMap::from([(Figure::Loss, 1.0)]));
        let mut figures = of(&trial());
        add_net(&mut figures, 1.5);
        assert!(!figures.contains_key(&Figure::CpuSecondsNet));
    }

    #[test]
    fn figures_are_shown_with_their_digits() {
        for (figure, value, text) in [
            (Figure::Mpps, 0.75, "0.750"),
            (Figure::Mpps, 1.234, "1.23"),
            (Figure::KpacketsPerCpuSecondGross, 612.4, "612"),
            (Figure::Loss, 0.0, "0"),
            (Figure::Loss, 0.000_002, "2.0 ppm"),
            (Figure::Loss, 0.0312, "3.12 %"),
            (Figure::WorkerIdle, 0.126, "13 %"),
            (Figure::LatencyP50, 17.26, "17.3"),
        ] {
            assert_eq!(figure.show(value), text);
        }
    }
}
