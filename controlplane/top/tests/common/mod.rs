//! Snapshots made by hand.

use ripstop_fib::DropReason;
use ripstop_fib::stats::{
    Counter, Door, Gauge, KernelCounter, Mode, NicStats, Polling, WorkerCounters, WorkerIdentity,
    WorkerStats, XdpCounter,
};
use ripstop_top::{DataPlane, Snapshot};

pub(crate) const SECOND: u64 = 1_000_000_000;

/// An hour after the machine was started, a data plane that was started with it.
pub(crate) const START: u64 = 3600 * SECOND;

pub(crate) fn worker(queue: u32) -> WorkerStats {
    let mut gauges = [0; Gauge::COUNT];
    gauges[Gauge::Free as usize] = 2000;
    gauges[Gauge::Receiving as usize] = 2048;
    gauges[Gauge::Transmitting as usize] = 48;
    WorkerStats {
        identity: WorkerIdentity {
            nic: "eth1".to_owned(),
            queue,
            cpu: 2 + queue,
            mode: Mode::ZeroCopy,
            wants_zero_copy: true,
            polling: Polling::Adaptive,
            transmit: [ripstop_fib::stats::Transmit::AfXdp; 2],
            door: Door::Tun,
            frames: 4096,
            frame_size: 2048,
            huge_pages: true,
            numa_node: None,
        },
        heartbeat_ns: START,
        generation: 17,
        counters: WorkerCounters::default(),
        gauges,
        kernel: [0; KernelCounter::COUNT],
    }
}

pub(crate) fn snapshot(at_ns: u64, workers: Vec<WorkerStats>) -> Snapshot {
    Snapshot {
        at_ns,
        data_plane: DataPlane::Running {
            pid: 4711,
            started_ns: SECOND,
        },
        generation: Some(17),
        workers,
        nics: vec![NicStats {
            nic: "eth1".to_owned(),
            queues: 4,
            native: true,
            counters: [0; XdpCounter::COUNT],
        }],
    }
}

/// A second of work of a worker.
pub(crate) fn works(worker: &mut WorkerStats, packets: u64) {
    worker.heartbeat_ns += SECOND - 3_000_000;
    let counters = &mut worker.counters;
    for (counter, count) in [
        (Counter::NicRxPackets, packets),
        (Counter::NicRxBytes, packets * 150),
        (Counter::HostTxPackets, packets - 30),
        (Counter::HostTxBytes, (packets - 30) * 100),
        (Counter::HostRxPackets, packets),
        (Counter::HostRxBytes, packets * 100),
        (Counter::NicTxPackets, packets),
        (Counter::NicTxBytes, packets * 150),
        (Counter::BusyTurns, packets / 20),
        (Counter::Turns, packets / 10),
        (Counter::BusyCycles, packets * 2 * 120),
        (Counter::IdleCycles, packets * 60),
        (Counter::AsleepCycles, packets * 180),
    ] {
        counters.add(counter, count);
    }
    counters.drops[DropReason::UnknownPeer.index()] += 20;
    counters.drops[DropReason::TooBig.index()] += 10;
    worker.kernel[KernelCounter::RxRingFull as usize] += 5;
}
