//! What a packet costs: lookup alone, `forward` alone, and the whole worker on in-memory ports.
//!
//! Criterion measures and keeps the history; the tables at the end give the same in nanoseconds and in cycles of the
//! time-stamp counter (which runs at the nominal clock) as medians of interleaved rounds, for the README and for
//! comparing sizes within one run.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark reports by printing and fails by panicking"
)]
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

#[path = "../tests/packets/mod.rs"]
mod packets;

use core::hint::black_box;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::time::Instant;

use af_xdp::{Umem, UmemOptions};
use criterion::{BenchmarkId, Criterion, Throughput};
use packets::{Inner, Inner6, NIC, Outer, Tunnel, node};
use ripstop_dataplane::forward;
use ripstop_dataplane::kind::Kind;
use ripstop_dataplane::memory::Random;
use ripstop_dataplane::port::{Burst, Port, Transmitted};
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{DropReason, FromHost, FromNic, HEADER_MAX};
use ripstop_dataplane::worker::{Parts, Worker};
use ripstop_fib::stats::{STATS_WORDS, Stats};
use ripstop_fib::sync::{Ordering, words};
use ripstop_fib::{
    Adjacency, Backend, Ethernet, ImageBuilder, Local, Publisher, Reader, Region, Route, Word,
    publish,
};

const BURST: usize = 64;
const LEASES: [usize; 4] = [10, 1_000, 15_000, 100_000];
const FLOWS: [usize; 4] = [1, 100, 10_000, 100_000];
/// Leases that traffic goes to when it is not uniform over all.
const ACTIVE: usize = 1_000;
/// Inner packet lengths in bytes: the smallest frame's, a middle one, the largest with an MTU of 1500.
const SIZES: [usize; 3] = [64, 512, 1450];

fn main() {
    let mut criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(30);
    lookups(&mut criterion);
    forwarding(&mut criterion);
    workers(&mut criterion);
    criterion.final_summary();
    // `cargo test` and `--list` run benchmarks only to see that they run.
    if std::env::args().any(|argument| argument == "--bench") {
        tables();
    }
}

/// Address of lease `number`'s node, and its subnet: /24s in 10.0.0.0/8 and then in 11.0.0.0/8.
fn lease(number: usize) -> (Ipv4Addr, Ipv4Addr) {
    let number = u32::try_from(number).unwrap();
    (
        Ipv4Addr::from(0xac10_0000 + number),
        Ipv4Addr::from(0x0a00_0000 + (number << 8)),
    )
}

/// The same in IPv6: a /64 of fd00::/48 for each.
fn lease6(number: usize) -> (Ipv6Addr, Ipv6Addr) {
    let number = u128::try_from(number).unwrap();
    (
        Ipv6Addr::from(0xfdff << 112 | 1 << 64 | number),
        Ipv6Addr::from(0xfd00 << 112 | number << 64),
    )
}

/// Our own subnets.
const SUBNET: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 0);
const SUBNET6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0xea60, 0, 0, 0, 0);

/// A table of so many leases, and our own beside them.
fn table_words(leases: usize) -> Vec<Word> {
    backend_words(leases, Backend::Vxlan, false, None)
}

/// The same for any backend, with leases of one family.
fn backend_words(leases: usize, backend: Backend, ipv6: bool, vlan: Option<u16>) -> Vec<Word> {
    let mut us = node(1);
    us.backend = backend;
    us.direct = backend == Backend::HostGw;
    us.nics[0].vlan = vlan.unwrap_or(0);
    us.v4 = us.v4.map(|local| Local {
        subnet: (SUBNET, 24),
        ..local
    });
    us.v6 = us.v6.map(|local| Local {
        subnet: (SUBNET6, 64),
        ..local
    });
    let mut builder = ImageBuilder::new(us);
    let ethernet = Ethernet {
        source: [2, 0, 0, 0, 0, 1],
        destination: [2, 0, 0, 0, 0, 2],
        vlan,
    };
    if ipv6 {
        builder.route6(SUBNET6, 64, Route::Local);
    } else {
        builder.route4(SUBNET, 24, Route::Local);
    }
    for number in 0..leases {
        let [a, b, c, d] = u32::try_from(number).unwrap().to_be_bytes();
        let mac = [2, 9, a, b, c, d];
        if ipv6 {
            let (outer, subnet) = lease6(number);
            let id = builder.adjacency(match backend {
                Backend::Vxlan => Adjacency::vxlan6(&us, ethernet, outer, mac),
                Backend::HostGw | Backend::Alloc | Backend::Ipip | Backend::Udp => {
                    Adjacency::direct6(ethernet)
                }
            });
            builder.route6(subnet, 64, Route::Via(id));
            builder.peer6(outer, subnet, 64);
            continue;
        }
        let (outer, subnet) = lease(number);
        let id = builder.adjacency(match backend {
            Backend::Vxlan => Adjacency::vxlan4(&us, ethernet, outer, mac),
            Backend::Ipip => Adjacency::ipip(&us, ethernet, outer),
            Backend::Udp => Adjacency::udp(&us, ethernet, outer),
            Backend::HostGw | Backend::Alloc => Adjacency::direct4(ethernet),
        });
        builder.route4(subnet, 24, Route::Via(id));
        builder.peer4(outer, subnet, 24);
    }
    words(&builder.build().unwrap())
}

/// So many lease numbers below `leases`, each equally likely, in no order: the same ones every time.
fn choose(leases: usize, count: usize) -> Vec<usize> {
    let mut random = Random::new(0x5eed);
    (0..count)
        .map(|_| usize::try_from(random.number() >> 11).unwrap() % leases)
        .collect()
}

/// Where traffic goes: `active` different leases anywhere in the table, in random order. Not every so-manieth one: their
/// cache lines would fall into a few sets of the cache, which is a matter of the step, not of the table.
fn destinations(leases: usize, active: usize, count: usize) -> Vec<usize> {
    let mut random = Random::new(0xac7);
    let mut numbers: Vec<usize> = (0..leases).collect();
    let active = active.min(leases);
    for place in 0..active {
        let left = leases - place;
        let other = place + usize::try_from(random.number() >> 11).unwrap() % left;
        numbers.swap(place, other);
    }
    choose(active, count)
        .into_iter()
        .map(|number| numbers[number])
        .collect()
}

fn pod_packets(leases: usize, active: usize, len: usize, count: usize) -> Vec<Vec<u8>> {
    let packet = |number: usize| {
        let destination = Ipv4Addr::from(u32::from(lease(number).1) + 7).octets();
        let ports = (u16::try_from(number % 60_000).unwrap(), 80);
        Inner {
            source: [192, 168, 0, 5],
            destination,
            ports,
            payload: len - 28,
            ..Inner::default()
        }
        .packet()
    };
    destinations(leases, active, count)
        .into_iter()
        .map(packet)
        .collect()
}

fn tunnel_frames(leases: usize, active: usize, len: usize, count: usize) -> Vec<Vec<u8>> {
    let frame = |number: usize| {
        let (outer, subnet) = lease(number);
        let source = Ipv4Addr::from(u32::from(subnet) + 7).octets();
        let inner = Inner {
            source,
            destination: [192, 168, 0, 5],
            payload: len - 28,
            ..Inner::default()
        };
        Tunnel {
            source: outer.octets(),
            inner,
            ..Tunnel::default()
        }
        .frame()
    };
    destinations(leases, active, count)
        .into_iter()
        .map(frame)
        .collect()
}

thread_local! {
    /// Places for the headers of a burst, as in the packets' frames.
    static FRONTS: core::cell::RefCell<[[u8; HEADER_MAX]; BURST]> =
        const { core::cell::RefCell::new([[0; HEADER_MAX]; BURST]) };
}

/// A burst as the worker handles it: the loop is the first packet's kind's, and everything that will be looked up is
/// touched first.
fn encapsulate_all<P: AsRef<[u8]>>(packets: &[P], table: &Table<'_>) {
    match Kind::from_host(packets[0].as_ref(), table) {
        Kind::Any => encapsulate_mostly(Kind::Any, packets, table),
        Kind::Vxlan4 => encapsulate_mostly(Kind::Vxlan4, packets, table),
        Kind::Vxlan6 => encapsulate_mostly(Kind::Vxlan6, packets, table),
        Kind::Ipip => encapsulate_mostly(Kind::Ipip, packets, table),
        Kind::Udp => encapsulate_mostly(Kind::Udp, packets, table),
        Kind::Direct4 => encapsulate_mostly(Kind::Direct4, packets, table),
        Kind::Direct6 => encapsulate_mostly(Kind::Direct6, packets, table),
    }
}

#[inline(always)]
fn encapsulate_mostly<P: AsRef<[u8]>>(kind: Kind, packets: &[P], table: &Table<'_>) {
    for packet in packets.iter().take(forward::AHEAD) {
        forward::prefetch_from_host(kind, packet.as_ref(), table);
    }
    FRONTS.with_borrow_mut(|fronts| {
        for (at, ((packet, front), id)) in packets.iter().zip(fronts).zip(0u16..).enumerate() {
            if let Some(ahead) = packets.get(at + forward::AHEAD) {
                forward::prefetch_from_host(kind, ahead.as_ref(), table);
            }
            match forward::from_host_mostly(kind, packet.as_ref(), front, table, id) {
                FromHost::Send { push } => drop(black_box(push)),
                FromHost::Drop(reason) => panic!("a good packet was dropped: {}", reason.name()),
            }
        }
    });
}

fn decapsulate_all<P: AsRef<[u8]>>(frames: &[P], table: &Table<'_>) {
    match Kind::from_nic(frames[0].as_ref(), table) {
        Kind::Any => decapsulate_mostly(Kind::Any, frames, table),
        Kind::Vxlan4 => decapsulate_mostly(Kind::Vxlan4, frames, table),
        Kind::Vxlan6 => decapsulate_mostly(Kind::Vxlan6, frames, table),
        Kind::Ipip => decapsulate_mostly(Kind::Ipip, frames, table),
        Kind::Udp => decapsulate_mostly(Kind::Udp, frames, table),
        Kind::Direct4 => decapsulate_mostly(Kind::Direct4, frames, table),
        Kind::Direct6 => decapsulate_mostly(Kind::Direct6, frames, table),
    }
}

#[inline(always)]
fn decapsulate_mostly<P: AsRef<[u8]>>(kind: Kind, frames: &[P], table: &Table<'_>) {
    for frame in frames.iter().take(forward::AHEAD) {
        forward::prefetch_from_nic(kind, frame.as_ref(), table);
    }
    for (at, frame) in frames.iter().enumerate() {
        if let Some(ahead) = frames.get(at + forward::AHEAD) {
            forward::prefetch_from_nic(kind, ahead.as_ref(), table);
        }
        match forward::from_nic_mostly(kind, frame.as_ref(), table) {
            FromNic::Deliver { len, .. } => drop(black_box(len)),
            FromNic::Drop(reason) => panic!("a good packet was dropped: {}", reason.name()),
        }
    }
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    for leases in LEASES {
        let image = table_words(leases);
        let table = Table::attach(&image, NIC).unwrap();
        let addresses = lookup_addresses(leases, ACTIVE.min(leases), 4096);
        group.throughput(Throughput::Elements(addresses.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(leases), |bencher| {
            bencher.iter(|| lookup_all(&addresses, &table));
        });
    }
    group.finish();
}

fn lookup_addresses(leases: usize, active: usize, count: usize) -> Vec<u32> {
    destinations(leases, active, count)
        .into_iter()
        .map(|number| u32::from(lease(number).1) + 7)
        .collect()
}

fn lookup_all(addresses: &[u32], table: &Table<'_>) {
    for address in addresses {
        black_box(table.image.lookup4(*address));
    }
}

fn forwarding(criterion: &mut Criterion) {
    let image = table_words(15_000);
    let table = Table::attach(&image, NIC).unwrap();
    for len in SIZES {
        let mut group = criterion.benchmark_group("forward");
        group.throughput(Throughput::Elements(BURST as u64));
        let packets = pod_packets(15_000, ACTIVE, len, BURST);
        group.bench_function(BenchmarkId::new("encap", len), |b| {
            b.iter(|| encapsulate_all(&packets, &table));
        });
        let frames = tunnel_frames(15_000, ACTIVE, len, BURST);
        group.bench_function(BenchmarkId::new("decap", len), |b| {
            b.iter(|| decapsulate_all(&frames, &table));
        });
        group.finish();
    }
}

/// A port that always has a full burst, copied into the frames as copy mode would, and transmits by giving back.
struct Endless {
    packets: Vec<Vec<u8>>,
    next: usize,
    headroom: usize,
}

impl Port for Endless {
    const REFUSED: DropReason = DropReason::NicTransmitFull;

    fn reclaim(&mut self, _umem: &mut Umem) {}

    fn refill(&mut self, _umem: &mut Umem) {}

    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize) {
        for _ in 0..most.min(self.packets.len()) {
            let packet = &self.packets[self.next];
            self.next = (self.next + 1) % self.packets.len();
            let mut frame = umem.take().unwrap();
            umem.whole_mut(&mut frame, self.headroom).unwrap()[..packet.len()]
                .copy_from_slice(packet);
            frame.set_len(packet.len()).unwrap();
            burst.push(frame);
        }
    }

    fn room(&mut self) -> usize {
        BURST
    }

    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        let sent = Transmitted {
            packets: burst.len() as u64,
            bytes: burst.iter().map(|frame| frame.len() as u64).sum(),
        };
        burst.drain(..).for_each(|frame| umem.give(frame));
        sent
    }

    fn pending(&self) -> usize {
        0
    }

    fn flush(&mut self) -> u64 {
        0
    }
}

/// The regions that a worker looks at, with one table published.
struct Regions {
    fib: Vec<Word>,
    stats: Vec<Word>,
}

impl Regions {
    fn with_leases(leases: usize) -> Self {
        Self::with_table(&table_words(leases))
    }

    fn with_table(table: &[Word]) -> Self {
        let image: Vec<u64> = table
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        let slot_words = image.len();
        let fib = words(&vec![0; publish::region_words(2, slot_words)]);
        let stats = words(&vec![0; STATS_WORDS]);
        let region = Region::format(&fib, 2, slot_words);
        let seen = Stats::format(&stats, 1, 1);
        Publisher::adopt(region)
            .publish(&image, || seen.pins())
            .unwrap();
        seen.accepted()
            .store(region.current().load(Ordering::Acquire), Ordering::Release);
        Self { fib, stats }
    }

    fn worker(&self, nic: Vec<Vec<u8>>, host: Vec<Vec<u8>>) -> Worker<'_, Endless, Endless> {
        let region = Region::attach(&self.fib).unwrap();
        let stats = Stats::attach(&self.stats).unwrap();
        let umem = UmemOptions {
            frames: 4096,
            frame_size: 4096,
            ..UmemOptions::default()
        };
        let host = Endless {
            packets: host,
            next: 0,
            headroom: HEADER_MAX.next_multiple_of(64) - 24,
        };
        let parts = Parts {
            umem: Umem::new(&umem).unwrap(),
            nic: Endless {
                packets: nic,
                next: 0,
                headroom: 232,
            },
            reader: Reader::new(region, stats.worker_pin(0)),
            accepted: stats.accepted(),
            stats,
            index: 0,
            ifindex: NIC,
            burst: BURST,
        };
        Worker::new(parts, host)
    }
}

fn workers(criterion: &mut Criterion) {
    let regions = Regions::with_leases(15_000);
    let mut group = criterion.benchmark_group("worker");
    for len in SIZES {
        let packets = pod_packets(15_000, ACTIVE, len, 1024);
        let frames = tunnel_frames(15_000, ACTIVE, len, 1024);
        for (name, nic, host) in [("encap", vec![], packets), ("decap", frames, vec![])] {
            let mut worker = regions.worker(nic, host);
            group.throughput(Throughput::Elements(BURST as u64));
            group.bench_function(BenchmarkId::new(name, len), |bencher| {
                bencher.iter(|| worker.turn());
            });
            assert_eq!(
                worker.counters().drops_total(),
                0,
                "a benchmark forwards every packet"
            );
        }
    }
    group.finish();
}

/// Something to measure.
type Drive<'a> = Box<dyn FnMut() + 'a>;

/// Time-stamp counter.
fn cycles() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds and cycles per packet, the median of rounds that are interleaved by the caller.
#[derive(Default)]
struct Series {
    nanoseconds: Vec<f64>,
    cycles: Vec<f64>,
}

impl Series {
    fn measure(&mut self, packets: usize, repeats: usize, mut run: impl FnMut()) {
        run();
        let (start, clock) = (cycles(), Instant::now());
        (0..repeats).for_each(|_| run());
        let (spent, elapsed) = (cycles() - start, clock.elapsed());
        let count = (packets * repeats) as f64;
        self.cycles.push(spent as f64 / count);
        self.nanoseconds.push(elapsed.as_nanos() as f64 / count);
    }

    fn row(&self, name: &str) -> String {
        let (low, middle, high) = spread(&self.cycles);
        let (_, nanoseconds, _) = spread(&self.nanoseconds);
        format!("{name:<42} {nanoseconds:>8.1} ns {middle:>8.1} cycles   [{low:.1} .. {high:.1}]")
    }

    /// The median of the rounds' ratios: what slows the machine slows both sides of a round.
    fn ratio(&self, base: &Self) -> f64 {
        let rounds = self.cycles.iter().zip(&base.cycles);
        spread(
            &rounds
                .map(|(cycles, base)| cycles / base)
                .collect::<Vec<_>>(),
        )
        .1
    }
}

fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (
        values[0],
        values[values.len() / 2],
        values[values.len() - 1],
    )
}

const ROUNDS: usize = 21;

fn tables() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or(": unknown");
    println!(
        "\nmedians of {ROUNDS} interleaved rounds, bursts of {BURST}, one core,{}",
        model.trim_start_matches(['\t', ' ', ':'])
    );
    println!(
        "per packet{:>44}   time-stamp counter   [lowest .. highest]",
        ""
    );
    by_size();
    by_backend();
    by_leases();
    by_flows();
}

/// A backend in one family, with the packets that it handles.
struct Case {
    name: &'static str,
    table: Vec<Word>,
    packets: Vec<Vec<u8>>,
    frames: Vec<Vec<u8>>,
}

impl Case {
    fn new(name: &'static str, backend: Backend, ipv6: bool, vlan: Option<u16>) -> Self {
        const LEN: usize = 64;
        let numbers = destinations(15_000, ACTIVE, BURST);
        let outer = |number: usize| Outer {
            vlan,
            source4: lease(number).0,
            source6: lease6(number).0,
            ..Outer::new(backend)
        };
        let inner = |number: usize, out: bool| {
            let ports = (u16::try_from(number % 60_000).unwrap(), 80);
            if ipv6 {
                let theirs = Ipv6Addr::from(u128::from(lease6(number).1) + 7);
                let ours = Ipv6Addr::from(u128::from(SUBNET6) + 5);
                let (source, destination) = if out { (ours, theirs) } else { (theirs, ours) };
                return Inner6 {
                    source,
                    destination,
                    ports,
                    payload: LEN - 48,
                    ..Inner6::default()
                }
                .packet();
            }
            let theirs = Ipv4Addr::from(u32::from(lease(number).1) + 7).octets();
            let ours = Ipv4Addr::from(u32::from(SUBNET) + 5).octets();
            let (source, destination) = if out { (ours, theirs) } else { (theirs, ours) };
            Inner {
                source,
                destination,
                ports,
                payload: LEN - 28,
                ..Inner::default()
            }
            .packet()
        };
        Self {
            name,
            table: backend_words(15_000, backend, ipv6, vlan),
            packets: numbers.iter().map(|number| inner(*number, true)).collect(),
            frames: numbers
                .iter()
                .map(|number| outer(*number).frame(&inner(*number, false)))
                .collect(),
        }
    }
}

fn by_backend() {
    let cases = [
        Case::new("vxlan IPv4", Backend::Vxlan, false, None),
        Case::new("vxlan IPv4, tagged", Backend::Vxlan, false, Some(100)),
        Case::new("vxlan IPv6", Backend::Vxlan, true, None),
        Case::new("ipip", Backend::Ipip, false, None),
        Case::new("udp", Backend::Udp, false, None),
        Case::new("direct IPv4", Backend::HostGw, false, None),
        Case::new("direct IPv6", Backend::HostGw, true, None),
    ];
    let tables: Vec<_> = cases
        .iter()
        .map(|case| Table::attach(&case.table, NIC).unwrap())
        .collect();
    let regions: Vec<_> = cases
        .iter()
        .map(|case| Regions::with_table(&case.table))
        .collect();
    println!("\nby backend, 64-byte packets, 15,000 leases of which {ACTIVE} are active");
    for what in [
        "forward alone, encap",
        "forward alone, decap",
        "whole worker, encap",
        "whole worker, decap",
    ] {
        let mut drives: Vec<(String, Drive<'_>)> = Vec::new();
        for ((case, table), regions) in cases.iter().zip(&tables).zip(&regions) {
            let drive: Drive<'_> = match what {
                "forward alone, encap" => Box::new(move || encapsulate_all(&case.packets, table)),
                "forward alone, decap" => Box::new(move || decapsulate_all(&case.frames, table)),
                "whole worker, encap" => {
                    let mut worker = regions.worker(vec![], case.packets.clone());
                    Box::new(move || {
                        black_box(worker.turn());
                    })
                }
                _ => {
                    let mut worker = regions.worker(case.frames.clone(), vec![]);
                    Box::new(move || {
                        black_box(worker.turn());
                    })
                }
            };
            drives.push((format!("{what}, {}", case.name), drive));
        }
        let mut series: Vec<Series> = drives.iter().map(|_| Series::default()).collect();
        for _ in 0..ROUNDS {
            for (series, (_, run)) in series.iter_mut().zip(drives.iter_mut()) {
                series.measure(BURST, 2000, run);
            }
        }
        for ((name, _), of_case) in drives.iter().zip(&series) {
            let ratio = of_case.ratio(&series[0]);
            println!("{}   {ratio:.2}x of vxlan IPv4", of_case.row(name));
        }
    }
}

fn by_size() {
    let image = table_words(15_000);
    let table = Table::attach(&image, NIC).unwrap();
    let regions = Regions::with_leases(15_000);
    let inputs: Vec<_> = SIZES
        .iter()
        .map(|len| {
            (
                pod_packets(15_000, ACTIVE, *len, BURST),
                tunnel_frames(15_000, ACTIVE, *len, BURST),
            )
        })
        .collect();
    let mut drives: Vec<(String, Drive<'_>)> = Vec::new();
    for (len, (packets, frames)) in SIZES.iter().zip(&inputs) {
        let (table, alone) = (&table, |what| format!("forward alone, {what}, {len} bytes"));
        drives.push((
            alone("encap"),
            Box::new(move || encapsulate_all(packets, table)),
        ));
        drives.push((
            alone("decap"),
            Box::new(move || decapsulate_all(frames, table)),
        ));
        let whole = |what| format!("whole worker, {what}, {len} bytes");
        let mut worker = regions.worker(vec![], pod_packets(15_000, ACTIVE, *len, 1024));
        drives.push((
            whole("encap"),
            Box::new(move || {
                black_box(worker.turn());
            }),
        ));
        let mut worker = regions.worker(tunnel_frames(15_000, ACTIVE, *len, 1024), vec![]);
        drives.push((
            whole("decap"),
            Box::new(move || {
                black_box(worker.turn());
            }),
        ));
    }
    println!("\nby inner packet size, 15,000 leases of which {ACTIVE} are active");
    for row in interleaved(&mut drives, BURST, 2000) {
        println!("{row}");
    }
}

/// One burst of packets whose addresses are rewritten for each packet: as on a NIC, the packet itself is in the cache,
/// so what the table costs can be seen.
struct Rewritten {
    packets: Vec<Vec<u8>>,
    edits: Vec<Edit>,
}

/// The bytes by which the packets to (or from) different leases differ.
#[derive(Clone, Copy)]
enum Edit {
    /// Destination of a pod packet.
    Pod([u8; 4]),
    /// Outer checksum and source, inner checksum and source of a tunnel frame.
    Tunnel([u8; 6], [u8; 6]),
    /// UDP ports of a pod packet, which make it another flow to the same lease.
    Flow([u8; 4]),
    /// Outer UDP source port of a tunnel frame, by which the sender tells flows apart.
    OuterPort([u8; 2]),
}

impl Rewritten {
    fn pods(leases: usize, active: usize, count: usize) -> Self {
        let edit =
            |number: usize| Edit::Pod(Ipv4Addr::from(u32::from(lease(number).1) + 7).octets());
        let edits = destinations(leases, active, count)
            .into_iter()
            .map(edit)
            .collect();
        Self {
            packets: pod_packets(leases, 1, 64, BURST),
            edits,
        }
    }

    fn tunnels(leases: usize, active: usize, count: usize) -> Self {
        let edit = |frame: Vec<u8>| {
            let part = |at: usize| <[u8; 6]>::try_from(&frame[at..at + 6]).unwrap();
            Edit::Tunnel(part(24), part(74))
        };
        let edits = tunnel_frames(leases, active, 64, count)
            .into_iter()
            .map(edit)
            .collect();
        Self {
            packets: tunnel_frames(leases, 1, 64, BURST),
            edits,
        }
    }

    /// Packets of so many flows to one lease and back.
    fn flows(flows: usize, count: usize, out: bool) -> Self {
        let edit = |number: usize| {
            let ports = (u32::try_from(number).unwrap() + 0x0400_0400).to_be_bytes();
            match out {
                true => Edit::Flow(ports),
                false => Edit::OuterPort([ports[2], ports[3]]),
            }
        };
        let make = if out { pod_packets } else { tunnel_frames };
        Self {
            packets: make(15_000, 1, 64, BURST),
            edits: choose(flows, count).into_iter().map(edit).collect(),
        }
    }

    fn run(&mut self, table: &Table<'_>) {
        for burst in self.edits.chunks_exact(BURST) {
            for (packet, edit) in self.packets.iter_mut().zip(burst) {
                match edit {
                    Edit::Pod(destination) => packet[16..20].copy_from_slice(destination),
                    Edit::Tunnel(outer, inner) => {
                        packet[24..30].copy_from_slice(outer);
                        packet[74..80].copy_from_slice(inner);
                    }
                    Edit::Flow(ports) => packet[20..24].copy_from_slice(ports),
                    Edit::OuterPort(port) => packet[34..36].copy_from_slice(port),
                }
            }
            match burst[0] {
                Edit::Pod(..) | Edit::Flow(..) => encapsulate_all(&self.packets, table),
                Edit::Tunnel(..) | Edit::OuterPort(..) => decapsulate_all(&self.packets, table),
            }
        }
    }
}

fn by_leases() {
    let images: Vec<_> = LEASES.iter().map(|leases| table_words(*leases)).collect();
    let tables: Vec<_> = images
        .iter()
        .map(|image| Table::attach(image, NIC).unwrap())
        .collect();
    for (title, uniform) in [
        ("1,000 of them active", false),
        ("traffic uniform over all of them", true),
    ] {
        let active = |leases: usize| if uniform { leases } else { ACTIVE.min(leases) };
        let count = |leases: usize| {
            if uniform {
                (4 * leases).next_multiple_of(BURST).max(4096)
            } else {
                4096
            }
        };
        println!("\nby number of leases, 64-byte packets, {title}");
        for what in ["lookup", "encap", "decap"] {
            let mut drives: Vec<(usize, Drive<'_>)> = Vec::new();
            for (leases, table) in LEASES.into_iter().zip(&tables) {
                let count = count(leases);
                let drive: Drive<'_> = match what {
                    "encap" => {
                        let mut packets = Rewritten::pods(leases, active(leases), count);
                        Box::new(move || packets.run(table))
                    }
                    "decap" => {
                        let mut packets = Rewritten::tunnels(leases, active(leases), count);
                        Box::new(move || packets.run(table))
                    }
                    _ => {
                        let addresses = lookup_addresses(leases, active(leases), count);
                        Box::new(move || lookup_all(&addresses, table))
                    }
                };
                drives.push((count, drive));
            }
            let mut series: Vec<Series> = LEASES.iter().map(|_| Series::default()).collect();
            for _ in 0..ROUNDS {
                for (series, (count, run)) in series.iter_mut().zip(&mut drives) {
                    series.measure(*count, (1 << 17) / *count + 1, run);
                }
            }
            for (leases, of_table) in LEASES.iter().zip(&series) {
                let ratio = of_table.ratio(&series[1]);
                let row = of_table.row(&format!("{what}, {leases} leases"));
                println!("{row}   {ratio:.2}x of 1,000 leases");
            }
        }
    }
}

/// No flow has a state of its own; this would show one.
fn by_flows() {
    let image = table_words(15_000);
    let table = Table::attach(&image, NIC).unwrap();
    println!("\nby number of flows, 64-byte packets to and from one of 15,000 leases");
    for (what, out) in [("encap", true), ("decap", false)] {
        let mut inputs: Vec<_> = FLOWS
            .iter()
            .map(|flows| Rewritten::flows(*flows, 1 << 17, out))
            .collect();
        let mut series: Vec<Series> = FLOWS.iter().map(|_| Series::default()).collect();
        for _ in 0..ROUNDS {
            for (series, input) in series.iter_mut().zip(&mut inputs) {
                series.measure(1 << 17, 1, || input.run(&table));
            }
        }
        for (flows, of_input) in FLOWS.iter().zip(&series) {
            let ratio = of_input.ratio(&series[0]);
            let row = of_input.row(&format!("{what}, {flows} flows"));
            println!("{row}   {ratio:.2}x of one flow");
        }
    }
}

fn interleaved(drives: &mut [(String, Drive<'_>)], packets: usize, repeats: usize) -> Vec<String> {
    let mut series: Vec<Series> = drives.iter().map(|_| Series::default()).collect();
    for _ in 0..ROUNDS {
        for (series, (_, run)) in series.iter_mut().zip(drives.iter_mut()) {
            series.measure(packets, repeats, run);
        }
    }
    drives
        .iter()
        .zip(&series)
        .map(|((name, _), series)| series.row(name))
        .collect()
}
