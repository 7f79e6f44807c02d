//! Rates from two snapshots.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod common;

use proptest::prelude::*;
use ripstop_fib::DropReason;
use ripstop_fib::stats::{Counter, KernelCounter, WorkerStats, XdpCounter};
use ripstop_top::{Count, DataPlane, Figures, Rates, Snapshot};

use common::{SECOND, START, snapshot, worker, works};

fn between(before: &Snapshot, now: &Snapshot) -> Rates {
    Rates::between(Some(before), now)
}

/// Two workers, one of which works for a second.
fn a_second() -> (Snapshot, Snapshot) {
    let before = snapshot(START, vec![worker(0), worker(1)]);
    let mut now = snapshot(START + SECOND, before.workers.clone());
    works(&mut now.workers[0], 1000);
    now.nics[0].counters[XdpCounter::Redirected as usize] = 1000;
    (before, now)
}

/// All rates; what is not known is left out.
fn known(figures: &Figures) -> Vec<f64> {
    let counts = figures.drops.iter().chain(&figures.kernel);
    let rates = counts.map(|count: &Count| count.per_s);
    rates
        .chain([
            figures.encapsulated.packets_per_s,
            figures.encapsulated.bytes_per_s,
            figures.decapsulated.packets_per_s,
            figures.decapsulated.bytes_per_s,
            figures.received_per_s,
            figures.cycles_per_packet,
            figures.packets_per_burst,
            figures.idle,
            figures.dropped.per_s,
        ])
        .flatten()
        .collect()
}

#[test]
fn a_worker_has_rates_and_so_have_all_together() {
    let (before, now) = a_second();
    let rates = between(&before, &now);
    assert_eq!((rates.pid, rates.uptime_s), (Some(4711), Some(3600)));
    assert_eq!(rates.interval_s, Some(1.0));
    let [worker, other] = &rates.workers[..] else {
        panic!("two workers")
    };
    let figures = &worker.figures;
    assert_eq!(figures.encapsulated.packets_per_s, Some(1000.0));
    assert_eq!(figures.encapsulated.bytes_per_s, Some(150_000.0));
    assert_eq!(figures.decapsulated.packets_per_s, Some(970.0));
    assert_eq!(figures.decapsulated.bytes_per_s, Some(97_000.0));
    assert_eq!(figures.received_per_s, Some(2000.0));
    assert_eq!(figures.cycles_per_packet, Some(120.0));
    assert_eq!(figures.packets_per_burst, Some(40.0));
    assert_eq!(figures.idle, Some(0.5));
    assert_eq!(figures.dropped.per_s, Some(30.0));
    let too_big = figures.drops[DropReason::TooBig.index()];
    assert_eq!(
        (too_big.name, too_big.total, too_big.per_s),
        ("too_big", 10, Some(10.0))
    );
    let full = figures.kernel(KernelCounter::RxRingFull);
    assert_eq!((full.total, full.per_s), (5, Some(5.0)));
    assert_eq!((worker.heartbeat_ms, worker.stuck), (Some(3), false));
    // The other one gave its last sign of life a second ago, and did nothing.
    assert_eq!((other.heartbeat_ms, other.stuck), (Some(1000), true));
    assert_eq!(other.figures.received_per_s, Some(0.0));
    assert_eq!(
        (other.figures.cycles_per_packet, other.figures.idle),
        (None, None)
    );
    let nic = rates.nics[0].count(XdpCounter::Redirected);
    assert_eq!((nic.total, nic.per_s), (1000, Some(1000.0)));
    let total = &rates.total;
    assert_eq!(known(total), known(figures));
    assert_eq!(total.frames.all(), 2 * 4096);
}

#[test]
fn without_anything_before_there_are_totals_alone() {
    let (before, now) = a_second();
    let soon = Snapshot {
        at_ns: now.at_ns + 999_999,
        ..now.clone()
    };
    let earlier = Snapshot {
        at_ns: now.at_ns - 1,
        ..now.clone()
    };
    let ended = Snapshot {
        data_plane: DataPlane::Ended,
        ..before
    };
    for rates in [
        Rates::between(None, &now),
        between(&now, &soon),
        between(&now, &earlier),
        between(&ended, &now),
    ] {
        assert_eq!(known(&rates.total), []);
        assert_eq!(known(&rates.workers[0].figures), []);
        assert_eq!(rates.nics[0].count(XdpCounter::Redirected).per_s, None);
        assert_eq!(rates.workers[0].figures.dropped.total, 30);
        assert_eq!(rates.interval_s, None);
    }
}

#[test]
fn a_data_plane_that_was_restarted_has_no_rates_at_first() {
    let (before, mut now) = a_second();
    now.data_plane = DataPlane::Running {
        pid: 4711,
        started_ns: START + 1,
    };
    let rates = between(&before, &now);
    assert_eq!(known(&rates.total), []);
    assert_eq!(rates.uptime_s, Some(0));
}

#[test]
fn a_counter_that_shrinks_takes_the_workers_rates_away_and_no_others() {
    let (mut before, now) = a_second();
    // One that was at 1000 begins anew: seen as a counter that went over its end, it would be an absurd rate.
    before.workers[1].kernel[KernelCounter::FillRingEmpty as usize] = 1000;
    before.nics[0].counters[XdpCounter::Fragment as usize] = 1;
    let rates = between(&before, &now);
    assert_eq!(known(&rates.workers[1].figures), []);
    assert_eq!(known(&rates.total), known(&rates.workers[0].figures));
    assert_eq!(rates.total.received_per_s, Some(2000.0));
    assert_eq!(rates.nics[0].count(XdpCounter::Redirected).per_s, None);
}

#[test]
fn a_counter_may_go_over_its_end() {
    let mut before = snapshot(START, vec![worker(0)]);
    before.workers[0]
        .counters
        .add(Counter::BusyCycles, u64::MAX - 9);
    let mut now = snapshot(START + SECOND, before.workers.clone());
    now.workers[0].counters.counters[Counter::BusyCycles as usize] = 90;
    now.workers[0].counters.add(Counter::NicRxPackets, 2);
    let rates = between(&before, &now);
    assert_eq!(rates.total.cycles_per_packet, Some(50.0));
}

#[test]
fn workers_come_and_go() {
    let (before, now) = a_second();
    let one = |snapshot: &Snapshot, worker: usize| Snapshot {
        workers: vec![snapshot.workers[worker].clone()],
        ..snapshot.clone()
    };
    // A worker is known by its NIC and queue, not by its place in the list.
    let rates = between(&before, &one(&now, 1));
    assert_eq!(rates.workers[0].figures.received_per_s, Some(0.0));
    let rates = between(&one(&before, 1), &now);
    assert_eq!(known(&rates.workers[0].figures), []);
    assert_eq!(rates.total.received_per_s, Some(0.0));
    let rates = between(&before, &snapshot(START + SECOND, Vec::new()));
    assert_eq!(
        (rates.workers, known(&rates.total)),
        (Vec::new(), Vec::new())
    );
}

#[test]
fn a_worker_that_never_gave_a_sign_of_life_is_stuck() {
    let mut silent = worker(0);
    silent.heartbeat_ns = 0;
    let mut ahead = worker(1);
    ahead.heartbeat_ns = START + 5;
    let rates = Rates::between(None, &snapshot(START, vec![silent, ahead]));
    let signs = rates
        .workers
        .iter()
        .map(|worker| (worker.heartbeat_ms, worker.stuck));
    assert_eq!(signs.collect::<Vec<_>>(), [(None, true), (Some(0), false)]);
}

/// Any counters, near the ends of their range as often as not.
fn any_worker() -> impl Strategy<Value = WorkerStats> {
    let count = prop_oneof![0..1000u64, any::<u64>(), u64::MAX - 1000..=u64::MAX];
    let counts = Counter::COUNT + DropReason::COUNT + KernelCounter::COUNT;
    proptest::collection::vec(count, counts).prop_map(|counts| {
        let mut worker = worker(0);
        let mut counts = counts.into_iter();
        let all = worker.counters.counters.iter_mut();
        let all = all
            .chain(&mut worker.counters.drops)
            .chain(&mut worker.kernel);
        all.for_each(|counter| *counter = counts.next().unwrap());
        worker
    })
}

proptest! {
    #[test]
    fn no_counters_make_absurd_rates(before in any_worker(), now in any_worker(), time in 0..10 * SECOND) {
        let before = snapshot(START, vec![before, worker(1)]);
        let now = snapshot(START + time, vec![now, worker(1)]);
        let rates = between(&before, &now);
        for figures in [&rates.workers[0].figures, &rates.workers[1].figures, &rates.total] {
            for rate in known(figures) {
                prop_assert!(rate.is_finite() && rate >= 0.0);
            }
            prop_assert!(figures.idle.is_none_or(|idle| idle <= 1.0));
        }
    }

    #[test]
    fn a_rate_is_growth_by_time(
        (before, grown) in any_worker().prop_flat_map(|before| {
            let grown = proptest::collection::vec(0..u64::from(u32::MAX), Counter::COUNT);
            (Just(before), grown)
        }),
        ms in 1..100_000u32,
    ) {
        let mut now = before.clone();
        for (counter, grown) in now.counters.counters.iter_mut().zip(&grown) {
            *counter = counter.wrapping_add(*grown);
        }
        let later = START + u64::from(ms) * 1_000_000;
        let rates = between(&snapshot(START, vec![before]), &snapshot(later, vec![now]));
        let value = |counter: Counter| f64::from(u32::try_from(grown[counter as usize]).unwrap());
        let seconds = f64::from(ms) / 1000.0;
        for figures in [&rates.workers[0].figures, &rates.total] {
            for (rate, counter) in [
                (figures.encapsulated.packets_per_s, Counter::NicTxPackets),
                (figures.encapsulated.bytes_per_s, Counter::NicTxBytes),
                (figures.decapsulated.packets_per_s, Counter::HostTxPackets),
                (figures.decapsulated.bytes_per_s, Counter::HostTxBytes),
            ] {
                let wanted = value(counter) / seconds;
                prop_assert!((rate.unwrap() - wanted).abs() <= wanted * 1e-9);
            }
        }
    }
}
