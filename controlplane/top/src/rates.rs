//! From two snapshots to rates: a pure function.
//!
//! Counters only ever grow while a data plane runs. A rate is the growth between the snapshots by the time between them;
//! where a counter has shrunk, or its owner was not there before, there is no rate rather than an absurd one.

use core::time::Duration;

use ripstop_fib::DropReason;
use ripstop_fib::stats::{Counter, Gauge, KernelCounter, NicStats, WorkerStats, XdpCounter};
use serde::Serialize;

use crate::snapshot::{DataPlane, Snapshot};

/// A worker whose last sign of life is older than this is stuck. The control plane takes it for stopped then, too.
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(1);

/// Snapshots closer to each other say nothing: workers publish some hundred times a second.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// What the workers do.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Whose workers these are.
    #[serde(skip)]
    pub data_plane: DataPlane,
    /// Process of the data plane, if it runs.
    pub pid: Option<u32>,
    /// How long it has run.
    pub uptime_s: Option<u64>,
    /// Time over which rates are measured; none if there was nothing to compare with.
    pub interval_s: Option<f64>,
    /// Generation of the forwarding table that is published.
    pub generation: Option<u64>,
    /// Its workers.
    pub workers: Vec<Worker>,
    /// All workers together.
    pub total: Figures,
    /// Its NICs.
    pub nics: Vec<Nic>,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// NIC.
    pub nic: String,
    /// Queue of it.
    pub queue: u32,
    /// CPU.
    pub cpu: u32,
    /// Mode of its socket.
    pub mode: &'static str,
    /// How it waits.
    pub polling: &'static str,
    /// Its door to the host.
    pub door: &'static str,
    /// Generation of the table that it forwards by, 0 without any.
    pub generation: u64,
    /// Age of its last sign of life; none if it has given none.
    pub heartbeat_ms: Option<u64>,
    /// It has given no sign of life for [`HEARTBEAT_MAX`].
    pub stuck: bool,
    /// What it does.
    #[serde(flatten)]
    pub figures: Figures,
}

/// What a worker does, or several together. What cannot be known is none.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// From pods to other nodes: transmitted on the NIC.
    pub encapsulated: Flow,
    /// From other nodes to pods: delivered to the host.
    pub decapsulated: Flow,
    /// Packets received, from both sides.
    pub received_per_s: Option<f64>,
    /// Cycles of the time-stamp counter in turns that had a packet in hand, by packets received.
    pub cycles_per_packet: Option<f64>,
    /// Packets received by turns that received any.
    pub packets_per_burst: Option<f64>,
    /// The share of its time that the worker was asleep, or turned without a packet in hand: 0 to 1. Time that others
    /// had its CPU counts as what it was at.
    pub idle: Option<f64>,
    /// Where the frames are.
    pub frames: Frames,
    /// Packets dropped, all reasons.
    pub dropped: Count,
    /// Packets dropped, by reason, in the order of their numbers.
    pub drops: Vec<Count>,
    /// The kernel's statistics of the sockets.
    pub kernel: Vec<Count>,
}

/// One direction.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Packets a second.
    pub packets_per_s: Option<f64>,
    /// Bytes of those, a second.
    pub bytes_per_s: Option<f64>,
}

/// Where the frames of the packet memory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Frames {
    /// In the worker's pool.
    pub free: u64,
    /// With the NIC queue for receiving.
    pub receiving: u64,
    /// With the NIC queue for transmission.
    pub transmitting: u64,
    /// In the worker's hands.
    pub held: u64,
}

/// A counter.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Count {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    #[serde(skip)]
    pub explanation: &'static str,
    /// Its value.
    pub total: u64,
    /// Its growth a second.
    pub per_s: Option<f64>,
}

/// A NIC.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Nic {
    /// Its name.
    pub nic: String,
    /// Queues that it has.
    pub queues: u32,
    /// How the XDP program is attached.
    pub attached: &'static str,
    /// What became of the frames that the program saw, in the order of [`XdpCounter`].
    pub xdp: Vec<Count>,
}

impl Frames {
    /// All frames.
    pub fn all(&self) -> u64 {
        [self.free, self.receiving, self.transmitting, self.held]
            .iter()
            .fold(0, |sum, frames| sum.saturating_add(*frames))
    }

    fn of(gauges: &[u64; Gauge::COUNT]) -> Self {
        let value = |gauge: Gauge| gauges[gauge as usize];
        Self {
            free: value(Gauge::Free),
            receiving: value(Gauge::Receiving),
            transmitting: value(Gauge::Transmitting),
            held: value(Gauge::Held),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            free: self.free.saturating_add(other.free),
            receiving: self.receiving.saturating_add(other.receiving),
            transmitting: self.transmitting.saturating_add(other.transmitting),
            held: self.held.saturating_add(other.held),
        }
    }
}

/// All counters of a worker, or their growth.
#[derive(Debug, Clone, Copy)]
struct Counted {
    counters: [u64; Counter::COUNT],
    drops: [u64; DropReason::COUNT],
    kernel: [u64; KernelCounter::COUNT],
}

impl Counted {
    const NOTHING: Self = Self {
        counters: [0; Counter::COUNT],
        drops: [0; DropReason::COUNT],
        kernel: [0; KernelCounter::COUNT],
    };

    fn of(worker: &WorkerStats) -> Self {
        Self {
            counters: worker.counters.counters,
            drops: worker.counters.drops,
            kernel: worker.kernel,
        }
    }

    fn since(&self, before: &Self) -> Option<Self> {
        Some(Self {
            counters: growth(&self.counters, &before.counters)?,
            drops: growth(&self.drops, &before.drops)?,
            kernel: growth(&self.kernel, &before.kernel)?,
        })
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            counters: sum(&self.counters, &other.counters),
            drops: sum(&self.drops, &other.drops),
            kernel: sum(&self.kernel, &other.kernel),
        }
    }

    fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }
}

/// What was added; none if one of them has shrunk, for then they belong to another owner. A counter that went over its
/// end has grown by little, one that began anew has, seen so, grown by nearly everything.
fn growth<const N: usize>(now: &[u64; N], before: &[u64; N]) -> Option<[u64; N]> {
    let mut grown = [0; N];
    for ((grown, now), before) in grown.iter_mut().zip(now).zip(before) {
        *grown = now.wrapping_sub(*before);
        if *grown > u64::MAX / 2 {
            return None;
        }
    }
    Some(grown)
}

fn sum<const N: usize>(one: &[u64; N], other: &[u64; N]) -> [u64; N] {
    core::array::from_fn(|index| one[index].saturating_add(other[index]))
}

/// What was added over a time in seconds, which is above zero.
#[derive(Debug, Clone, Copy)]
struct Growth {
    counted: Counted,
    seconds: f64,
}

#[expect(clippy::cast_precision_loss, reason = "a few digits are shown")]
fn float(count: u64) -> f64 {
    count as f64
}

/// The share, or the quotient; none of nothing.
pub(crate) fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| float(part) / float(whole))
}

impl Figures {
    fn of(total: &Counted, growth: Option<&Growth>, frames: Frames) -> Self {
        let per_s = |count: &dyn Fn(&Counted) -> u64| {
            growth.map(|growth| float(count(&growth.counted)) / growth.seconds)
        };
        let rate = |counter| per_s(&|counted| counted.get(counter));
        let flow = |packets, bytes| Flow {
            packets_per_s: rate(packets),
            bytes_per_s: rate(bytes),
        };
        let received = |counted: &Counted| {
            let nic = counted.get(Counter::NicRxPackets);
            nic.saturating_add(counted.get(Counter::HostRxPackets))
        };
        let dropped = |counted: &Counted| counted.drops.iter().fold(0, saturating);
        let grown = |part: &dyn Fn(&Counted) -> u64, whole: &dyn Fn(&Counted) -> u64| {
            growth.and_then(|growth| ratio(part(&growth.counted), whole(&growth.counted)))
        };
        let busy_cycles = |counted: &Counted| counted.get(Counter::BusyCycles);
        let idle_cycles = |counted: &Counted| {
            let idle = counted.get(Counter::IdleCycles);
            idle.saturating_add(counted.get(Counter::AsleepCycles))
        };
        let all_cycles =
            |counted: &Counted| busy_cycles(counted).saturating_add(idle_cycles(counted));
        Self {
            encapsulated: flow(Counter::NicTxPackets, Counter::NicTxBytes),
            decapsulated: flow(Counter::HostTxPackets, Counter::HostTxBytes),
            received_per_s: per_s(&received),
            // Zero cycles: the processor has no counter of them.
            cycles_per_packet: grown(&busy_cycles, &received).filter(|cycles| *cycles > 0.0),
            packets_per_burst: grown(&received, &|counted| counted.get(Counter::BusyTurns)),
            idle: grown(&idle_cycles, &all_cycles),
            frames,
            dropped: Count {
                name: "dropped",
                explanation: "Packets dropped, all reasons.",
                total: dropped(total),
                per_s: per_s(&dropped),
            },
            drops: DropReason::ALL
                .iter()
                .map(|&reason| Count {
                    name: reason.name(),
                    explanation: reason.explanation(),
                    total: total.drops[reason.index()],
                    per_s: per_s(&|counted| counted.drops[reason.index()]),
                })
                .collect(),
            kernel: KernelCounter::ALL
                .iter()
                .map(|&counter| Count {
                    name: counter.name(),
                    explanation: counter.explanation(),
                    total: total.kernel[counter as usize],
                    per_s: per_s(&|counted| counted.kernel[counter as usize]),
                })
                .collect(),
        }
    }

    /// One of the kernel's statistics.
    pub fn kernel(&self, counter: KernelCounter) -> Count {
        self.kernel
            .get(counter as usize)
            .copied()
            .unwrap_or_default()
    }
}

fn saturating(sum: u64, count: &u64) -> u64 {
    sum.saturating_add(*count)
}

impl Rates {
    /// What workers did between two snapshots. Without one before, or with one of another process, there are no rates.
    pub fn between(before: Option<&Snapshot>, now: &Snapshot) -> Self {
        let (pid, uptime_s) = match now.data_plane {
            DataPlane::Running { pid, started_ns } => {
                let uptime = Duration::from_nanos(now.at_ns.saturating_sub(started_ns));
                (Some(pid), Some(uptime.as_secs()))
            }
            DataPlane::Never | DataPlane::Ended => (None, None),
        };
        let before = before.filter(|before| before.data_plane == now.data_plane);
        let time =
            before.map(|before| Duration::from_nanos(now.at_ns.saturating_sub(before.at_ns)));
        let seconds = time
            .filter(|time| *time >= INTERVAL_MIN)
            .map(|time| time.as_secs_f64());
        let mut total = Counted::NOTHING;
        let mut total_growth: Option<Growth> = None;
        let mut total_frames = Frames::default();
        let mut workers = Vec::with_capacity(now.workers.len());
        for worker in &now.workers {
            let is_same = |other: &&WorkerStats| {
                (&other.identity.nic, other.identity.queue)
                    == (&worker.identity.nic, worker.identity.queue)
            };
            let counted = Counted::of(worker);
            let before = before.and_then(|before| before.workers.iter().find(is_same));
            let growth = before.zip(seconds).and_then(|(before, seconds)| {
                let counted = counted.since(&Counted::of(before))?;
                Some(Growth { counted, seconds })
            });
            let frames = Frames::of(&worker.gauges);
            total = total.plus(&counted);
            total_frames = total_frames.plus(frames);
            if let Some(growth) = growth {
                let counted = total_growth.map_or(Counted::NOTHING, |growth| growth.counted);
                let counted = counted.plus(&growth.counted);
                total_growth = Some(Growth { counted, ..growth });
            }
            let figures = Figures::of(&counted, growth.as_ref(), frames);
            workers.push(Worker::of(worker, now.at_ns, figures));
        }
        let nic = |nic: &NicStats| {
            let before = before.and_then(|before| {
                let mut nics = before.nics.iter();
                nics.find(|other| other.nic == nic.nic)
            });
            let grown = before.and_then(|before| growth(&nic.counters, &before.counters));
            Nic::of(nic, grown.zip(seconds))
        };
        Self {
            data_plane: now.data_plane,
            pid,
            uptime_s,
            interval_s: seconds,
            generation: now.generation,
            workers,
            total: Figures::of(&total, total_growth.as_ref(), total_frames),
            nics: now.nics.iter().map(nic).collect(),
        }
    }
}

impl Worker {
    fn of(worker: &WorkerStats, at_ns: u64, figures: Figures) -> Self {
        let identity = &worker.identity;
        let heartbeat = (worker.heartbeat_ns > 0)
            .then(|| Duration::from_nanos(at_ns.saturating_sub(worker.heartbeat_ns)));
        Self {
            nic: identity.nic.clone(),
            queue: identity.queue,
            cpu: identity.cpu,
            mode: identity.mode.name(),
            polling: identity.polling.name(),
            door: identity.door.name(),
            generation: worker.generation,
            heartbeat_ms: heartbeat.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            stuck: heartbeat.is_none_or(|age| age >= HEARTBEAT_MAX),
            figures,
        }
    }

    /// NIC and queue.
    pub fn name(&self) -> String {
        format!("{}/{}", self.nic, self.queue)
    }
}

impl Nic {
    fn of(nic: &NicStats, grown: Option<([u64; XdpCounter::COUNT], f64)>) -> Self {
        let count = |&counter: &XdpCounter| Count {
            name: counter.name(),
            explanation: counter.explanation(),
            total: nic.counters[counter as usize],
            per_s: grown.map(|(grown, seconds)| float(grown[counter as usize]) / seconds),
        };
        Self {
            nic: nic.nic.clone(),
            queues: nic.queues,
            attached: if nic.native { "native" } else { "generic" },
            xdp: XdpCounter::ALL.iter().map(count).collect(),
        }
    }

    /// One of the program's counters.
    pub fn count(&self, counter: XdpCounter) -> Count {
        self.xdp.get(counter as usize).copied().unwrap_or_default()
    }

    /// Tunnel packets that were left to the kernel, by reason.
    pub fn punts(&self) -> impl Iterator<Item = &Count> {
        let counts = self.xdp.iter().zip(XdpCounter::ALL);
        counts.filter_map(|(count, counter)| {
            let punted = !matches!(counter, XdpCounter::Redirected | XdpCounter::PassedOther);
            punted.then_some(count)
        })
    }
}
