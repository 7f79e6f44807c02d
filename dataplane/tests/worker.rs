//! The whole worker on in-memory ports, with faults that a seed decides.
//!
//! Two promises are checked after every run: received = transmitted + dropped + in flight, and every frame of the
//! UMEM is where a gauge says it is. `RIPSTOP_SEED` repeats a run; each failure prints its seed.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod packets;

use core::sync::atomic::AtomicBool;
use core::time::Duration;
use std::time::Instant;

use af_xdp::{Umem, UmemOptions};
use packets::{Inner, Tunnel, image_of};
use ripstop_dataplane::config::Coalesce;
use ripstop_dataplane::memory::{Faults, MemoryPort, Random};
use ripstop_dataplane::pace::{Due, Pace};
use ripstop_dataplane::worker::{HOUSEKEEPING_TURNS, Parts, Worker};
use ripstop_fib::stats::{Counter, Gauge, Polling, STATS_WORDS, Stats};
use ripstop_fib::sync::{Ordering, words};
use ripstop_fib::{DropReason, Publisher, Reader, Region, Word, publish};

const FRAMES: u32 = 256;
const BURST: usize = 32;
const SLOT_WORDS: usize = 1 << 17;

/// The memory that a worker looks at, and the publisher that writes it.
struct Regions {
    fib: Vec<Word>,
    stats: Vec<Word>,
}

impl Regions {
    fn new() -> Self {
        let fib = words(&vec![0; publish::region_words(3, SLOT_WORDS)]);
        let stats = words(&vec![0; STATS_WORDS]);
        Region::format(&fib, 3, SLOT_WORDS);
        Stats::format(&stats, 1, 1);
        Self { fib, stats }
    }

    fn region(&self) -> Region<'_> {
        Region::attach(&self.fib).unwrap()
    }

    fn stats(&self) -> Stats<'_> {
        Stats::attach(&self.stats).unwrap()
    }

    fn publish(&self, image: &[u64]) -> u64 {
        let generation = Publisher::adopt(self.region())
            .publish(image, || self.stats().pins())
            .unwrap();
        let current = self.region().current().load(Ordering::Acquire);
        self.stats().accepted().store(current, Ordering::Release);
        generation
    }

    fn worker(&self, faults: Faults, seed: u64) -> Worker<'_, MemoryPort, MemoryPort> {
        let umem = UmemOptions {
            frames: FRAMES,
            frame_size: 4096,
            ..UmemOptions::default()
        };
        let host = MemoryPort::new(64, 104, faults, seed.rotate_left(17));
        let parts = Parts {
            umem: Umem::new(&umem).unwrap(),
            nic: MemoryPort::new(64, 256, faults, seed),
            reader: Reader::new(self.region(), self.stats().worker_pin(0)),
            accepted: self.stats().accepted(),
            stats: self.stats(),
            index: 0,
            ifindex: packets::NIC,
            burst: BURST,
        };
        Worker::new(parts, host)
    }
}

/// Frames from the wire: mostly good, some with one byte changed, some cut, some noise.
fn wire_frame(random: &mut Random) -> Vec<u8> {
    let payload = usize::try_from(random.number() % 1400).unwrap();
    let mut frame = Tunnel {
        inner: Inner {
            payload,
            ..Inner::default()
        },
        ..Tunnel::default()
    }
    .frame();
    let place = usize::try_from(random.number()).unwrap_or(0) % frame.len();
    match random.number() % 8 {
        0 => frame[place] ^= 1 << (random.number() % 8),
        1 => frame.truncate(place),
        2 => frame[..place].fill_with(|| random.number().to_le_bytes()[0]),
        _ => {}
    }
    frame
}

/// Packets from pods: to peers that are reachable, to one that is not, to nobody; some damaged.
fn pod_packet(random: &mut Random) -> Vec<u8> {
    let payload = usize::try_from(random.number() % 1430).unwrap();
    let node = u8::try_from(random.number() % 6).unwrap();
    let inner = Inner {
        source: [10, 244, 1, 5],
        destination: [10, 244, node, 9],
        payload,
        ..Inner::default()
    };
    let mut packet = inner.packet();
    if random.number().is_multiple_of(8) {
        let place = usize::try_from(random.number()).unwrap_or(0) % packet.len();
        packet[place] ^= 0x55;
    }
    packet
}

fn assert_conserved(worker: &Worker<'_, MemoryPort, MemoryPort>, seed: u64) {
    let counters = worker.counters();
    let received = counters.get(Counter::NicRxPackets) + counters.get(Counter::HostRxPackets);
    let transmitted = counters.get(Counter::NicTxPackets) + counters.get(Counter::HostTxPackets);
    assert_eq!(
        received,
        transmitted + counters.drops_total(),
        "packets are conserved, seed {seed}"
    );
}

fn assert_no_frame_lost(worker: &mut Worker<'_, MemoryPort, MemoryPort>, seed: u64) {
    let (_, nic, host) = worker.ports();
    let with_ports = u64::try_from(nic.in_flight() + host.in_flight()).unwrap();
    let gauges = worker.gauges();
    assert_eq!(
        gauges.iter().sum::<u64>(),
        u64::from(FRAMES),
        "frames add up, seed {seed}"
    );
    assert_eq!(
        gauges[Gauge::Held as usize],
        with_ports,
        "only ports hold frames between turns, seed {seed}"
    );
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("RIPSTOP_SEED") {
        Ok(seed) => vec![seed.parse().expect("RIPSTOP_SEED is a number")],
        Err(_) => (1..=count)
            .map(|seed| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect(),
    }
}

#[test]
fn packets_and_frames_are_conserved_under_faults() {
    let faults = Faults {
        receive_nothing: 20,
        no_room: 40,
        refuse: 10,
        complete_late: 90,
    };
    for seed in seeds(24) {
        let regions = Regions::new();
        let mut worker = regions.worker(faults, seed);
        let mut random = Random::new(seed);
        for round in 0..4400u32 {
            let (_, nic, host) = worker.ports();
            // What came faster than the faults let it through comes through when no more comes.
            if round < 400 {
                if round % 100 == 7 {
                    regions.publish(&image_of(1));
                }
                for _ in 0..random.number() % 40 {
                    nic.incoming.push_back(wire_frame(&mut random));
                    host.incoming.push_back(pod_packet(&mut random));
                }
            } else if nic.incoming.is_empty() && host.incoming.is_empty() {
                break;
            }
            worker.turn();
            assert_conserved(&worker, seed);
            assert_no_frame_lost(&mut worker, seed);
        }
        let (_, nic, host) = worker.ports();
        let waiting = (nic.incoming.len(), host.incoming.len());
        assert_eq!(waiting, (0, 0), "nothing stays, seed {seed}");
        let counters = worker.counters().clone();
        assert!(
            counters.get(Counter::NicTxPackets) > 1000,
            "the run forwards, seed {seed}"
        );
        assert!(
            counters.get(Counter::HostTxPackets) > 1000,
            "the run delivers, seed {seed}"
        );
        let (_, nic, host) = worker.ports();
        let transmitted = nic.outgoing.len() + host.outgoing.len();
        let counted = counters.get(Counter::NicTxPackets) + counters.get(Counter::HostTxPackets);
        assert_eq!(
            u64::try_from(transmitted).unwrap(),
            counted,
            "what was counted was transmitted, seed {seed}"
        );
    }
}

#[test]
fn without_a_table_everything_is_dropped_for_that_reason() {
    let regions = Regions::new();
    let mut worker = regions.worker(Faults::default(), 1);
    let (_, nic, host) = worker.ports();
    nic.incoming.push_back(Tunnel::default().frame());
    host.incoming.push_back(
        Inner {
            destination: [10, 244, 2, 7],
            ..Inner::default()
        }
        .packet(),
    );
    worker.turn();
    assert_eq!(worker.counters().drops[DropReason::NoTable.index()], 2);
    assert_conserved(&worker, 1);
}

#[test]
fn a_packet_keeps_its_bytes_both_ways() {
    let regions = Regions::new();
    regions.publish(&image_of(1));
    let mut worker = regions.worker(Faults::default(), 1);
    let inner = Inner {
        payload: 700,
        tos: 0xb8 | 0b10,
        ..Inner::default()
    };
    let pod = Inner {
        source: [10, 244, 1, 5],
        destination: [10, 244, 2, 7],
        ..inner.clone()
    };
    let (_, nic, host) = worker.ports();
    nic.incoming.push_back(
        Tunnel {
            tos: 0b11,
            inner: inner.clone(),
            ..Tunnel::default()
        }
        .frame(),
    );
    host.incoming.push_back(pod.packet());
    worker.turn();
    let (_, nic, host) = worker.ports();
    // Congestion was marked on the way, so the mark and the header checksum differ, and nothing else.
    let marked = Inner {
        tos: 0xb8 | 0b11,
        ..inner
    };
    assert_eq!(host.outgoing, [marked.packet()]);
    assert_eq!(nic.outgoing[0][64..], pod.packet());
}

#[test]
fn a_new_table_is_followed_between_bursts_and_its_generation_published() {
    let regions = Regions::new();
    let mut worker = regions.worker(Faults::default(), 1);
    for expected in 1..=20 {
        assert_eq!(regions.publish(&image_of(1)), expected);
        worker.turn();
        worker.housekeeping(expected);
        regions.stats().announce(1, 0);
        let seen = &regions.stats().workers()[0];
        assert_eq!((seen.generation, seen.heartbeat_ns), (expected, expected));
    }
    assert_eq!(worker.counters().get(Counter::ImageSwitches), 20);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn turns_with_packets_and_turns_without_are_timed_apart() {
    let regions = Regions::new();
    regions.publish(&image_of(1));
    let mut worker = regions.worker(Faults::default(), 1);
    let mut random = Random::new(1);
    let (_, nic, _) = worker.ports();
    nic.incoming
        .extend((0..500).map(|_| wire_frame(&mut random)));
    regions.stats().announce(1, 0);
    let (stop, stats) = (AtomicBool::new(false), regions.stats());
    let counted = |counter| stats.workers()[0].counters.get(counter);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let both = || counted(Counter::BusyCycles) > 0 && counted(Counter::IdleCycles) > 0;
            while !both() && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        worker.run(&mut Pace::new(Polling::Busy, None, Vec::new()), &stop);
    });
    let (busy, packets) = (counted(Counter::BusyCycles), counted(Counter::NicRxPackets));
    println!("{} cycles per packet, unoptimized", busy / packets);
    assert!(busy > packets, "a packet takes more than a cycle");
    assert!(counted(Counter::IdleCycles) > 0);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn sleep_is_timed_apart_from_turns() {
    let regions = Regions::new();
    let mut worker = regions.worker(Faults::default(), 1);
    regions.stats().announce(1, 0);
    let (stop, stats) = (AtomicBool::new(false), regions.stats());
    let asleep = || stats.workers()[0].counters.get(Counter::AsleepCycles);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while asleep() == 0 && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        worker.run(&mut Pace::new(Polling::Adaptive, None, Vec::new()), &stop);
    });
    assert!(asleep() > 0);
}

/// Small bursts are followed by a pause, but for a worker that never sleeps, and housekeeping comes all the same.
#[test]
fn packets_gather_where_that_is_asked_for() {
    let coalesce = Coalesce {
        pause: Duration::from_micros(50),
        packets: 32,
    };
    let pace = |polling| Pace::new(polling, Some(coalesce), Vec::new());
    let mut adaptive = pace(Polling::Adaptive);
    assert_eq!(adaptive.after_turn(31), Due::Gather(coalesce.pause));
    assert_eq!(adaptive.after_turn(32), Due::Turn);
    assert_eq!(adaptive.after_turn(0), Due::Turn);
    assert_eq!(pace(Polling::Busy).after_turn(31), Due::Turn);
    let mut without = Pace::new(Polling::Adaptive, None, Vec::new());
    assert_eq!(without.after_turn(31), Due::Turn);
    let turns = (0..HOUSEKEEPING_TURNS).map(|_| adaptive.after_turn(1));
    let housekeeping = turns.filter(|due| matches!(due, Due::Housekeeping(_)));
    assert_eq!(housekeeping.count(), 1);
    // The pause is sleep, not work.
    adaptive.take_cycles();
    adaptive.gather(coalesce.pause);
    let cycles = adaptive.take_cycles();
    assert_eq!((cycles.busy, cycles.idle), (0, 0));
    assert!(cfg!(not(target_arch = "x86_64")) || cycles.asleep > 0);
}

#[test]
fn a_full_transmit_side_slows_the_host_down_instead_of_losing_packets() {
    let regions = Regions::new();
    regions.publish(&image_of(1));
    let mut worker = regions.worker(
        Faults {
            complete_late: 255,
            ..Faults::default()
        },
        3,
    );
    let (_, _, host) = worker.ports();
    host.incoming.extend((0..500).map(|_| {
        Inner {
            source: [10, 244, 1, 5],
            destination: [10, 244, 2, 7],
            ..Inner::default()
        }
        .packet()
    }));
    for _ in 0..20 {
        worker.turn();
    }
    assert_eq!(worker.counters().drops_total(), 0);
    let (_, _, host) = worker.ports();
    assert!(!host.incoming.is_empty(), "packets wait at the host door");
    for _ in 0..20_000 {
        worker.turn();
    }
    let (_, nic, host) = worker.ports();
    assert!(host.incoming.is_empty());
    assert_eq!(nic.outgoing.len(), 500);
    assert_eq!(worker.counters().drops_total(), 0);
}
