//! What cutting and joining cost: cycles per packet and per byte, as medians of interleaved rounds.
//!
//! The data lies in the second-level cache, as it does after readv(2) has just copied it there; a frame that is written is
//! one of 64, as in a burst.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark reports by printing and fails by panicking"
)]
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

#[path = "../tests/supers/mod.rs"]
mod supers;

use core::hint::black_box;

use ripstop_dataplane::offload::coalesce::Plan;
use ripstop_dataplane::offload::segment::{self, Task};
use supers::{FLOW, Flow, data, offloaded, packet, segments};

const ROUNDS: usize = 31;
const REPEATS: u64 = 200;
/// Data of a packet whose length is the MTU inside a VXLAN tunnel: 1450 bytes.
const SIZE: u16 = 1398;
/// As much of it as goes into one super-packet.
const DATA: usize = SIZE as usize * 46;

/// Something that is measured: its name, how many packets and bytes one go is, and the go.
struct Case {
    name: &'static str,
    packets: usize,
    bytes: usize,
    run: Box<dyn FnMut()>,
    cycles: Vec<f64>,
}

fn main() {
    // `cargo test` and `--list` run benchmarks only to see that they run.
    let rounds = match std::env::args().any(|argument| argument == "--bench") {
        true => ROUNDS,
        false => 1,
    };
    let tcp6 = Flow { v6: true, ..FLOW };
    let udp = Flow { udp: true, ..FLOW };
    let mut cases = [
        cutting("cut TCP, 46 packets", &FLOW, DATA),
        cutting("cut TCP over IPv6, 46 packets", &tcp6, DATA),
        cutting("cut UDP, 46 packets", &udp, DATA),
        cutting("cut TCP, 2 packets", &FLOW, usize::from(SIZE) + 1),
        completing("complete the checksum of one packet"),
        joining(
            "join TCP, 46 packets",
            segments(&FLOW, &data(DATA, 1), SIZE),
        ),
        joining("join UDP, 46 packets", segments(&udp, &data(DATA, 1), SIZE)),
        joining(
            "look at 64 flows' packets of 1450 bytes",
            of_many(&FLOW, usize::from(SIZE)),
        ),
        joining("look at 64 flows' datagrams of 64 bytes", of_many(&udp, 36)),
        joining("look at 64 acknowledgments", of_many(&FLOW, 0)),
    ];
    for _ in 0..rounds {
        for case in &mut cases {
            let start = cycles();
            for _ in 0..REPEATS {
                (case.run)();
            }
            let taken = f64::from(u32::try_from((cycles() - start) / REPEATS).unwrap());
            case.cycles.push(taken);
        }
    }
    println!("{:<42}{:>14}{:>14}", "", "cycles/packet", "cycles/byte");
    for case in &mut cases {
        case.cycles.sort_by(f64::total_cmp);
        let median = case.cycles[case.cycles.len() / 2];
        let per = |count: usize| median / f64::from(u32::try_from(count).unwrap());
        println!(
            "{:<42}{:>14.1}{:>14.3}",
            case.name,
            per(case.packets),
            per(case.bytes)
        );
    }
}

fn cutting(name: &'static str, flow: &Flow, len: usize) -> Case {
    let mut whole = packet(flow, &data(len, 1));
    let offload = offloaded(flow, SIZE, &mut whole);
    let mut frames = vec![[0u8; 2048]; 64];
    let packets = len.div_ceil(SIZE.into());
    let run = move || {
        let Some(Task::Cut(cut)) = segment::task(&whole, whole.len(), &offload) else {
            panic!("{offload:?} does not fit");
        };
        for index in 0..cut.count() {
            black_box(cut.write(&whole, index, &mut frames[index % 64]));
        }
    };
    Case {
        name,
        packets,
        bytes: len,
        run: Box::new(run),
        cycles: Vec::new(),
    }
}

fn completing(name: &'static str) -> Case {
    let mut whole = packet(&FLOW, &data(SIZE.into(), 1));
    let bytes = whole.len();
    let run = move || segment::complete_checksum(black_box(&mut whole), 20, 36);
    Case {
        name,
        packets: 1,
        bytes,
        run: Box::new(run),
        cycles: Vec::new(),
    }
}

fn joining(name: &'static str, mut burst: Vec<Vec<u8>>) -> Case {
    let mut plan = Plan::with_capacity(64, true);
    let (packets, bytes) = (burst.len(), burst.iter().map(Vec::len).sum());
    let heads: Vec<Vec<u8>> = burst
        .iter()
        .map(|packet| packet[..packet.len().min(100)].to_vec())
        .collect();
    let run = move || {
        plan.make(burst.len(), |index| &burst[index]);
        for group in plan.groups() {
            black_box(group.head(&mut burst[group.first]));
        }
        // As it was, for the next go.
        for group in plan.groups().iter().filter(|group| group.count > 1) {
            let head = &heads[group.first];
            burst[group.first][..head.len()].copy_from_slice(head);
        }
    };
    Case {
        name,
        packets,
        bytes,
        run: Box::new(run),
        cycles: Vec::new(),
    }
}

/// A burst of 64 flows' first packets.
fn of_many(flow: &Flow, len: usize) -> Vec<Vec<u8>> {
    let flows = (0..64).map(|port| Flow {
        port: 1000 + port,
        ..flow.clone()
    });
    flows.map(|flow| packet(&flow, &data(len, 1))).collect()
}

/// Time-stamp counter.
fn cycles() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}
