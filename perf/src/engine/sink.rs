//! Sinks: BPF programs take test packets away, and count them or hand them to a thread that checks.
//!
//! ```text
//!   Count   program ─► slots, one to a CPU, which user space has mapped
//!   Check   program ─► AF_XDP sockets, or a ring of notes and payloads ─► thread: Reader, Order, histogram
//! ```

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use af_xdp::{Interface, Receiver, Socket, SocketHandle, SocketOptions, Umem, UmemOptions};
use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use libbpf_rs::{MapHandle, RingBufferBuilder};

use super::bpf::{self, Attached, Config, NOTE_BYTES, Program, QUEUES_MAX, SLOT_WORDS, Sizes};
use super::kernel::{self, AttachPoint, Properties, Words, monotonic_ns};
use super::order::{Order, Place as Sequence};
use super::packet::{self, Places, Reader, Reading};
use super::{Detail, Hook, Place, Progress, Sink, SinkOptions, SinkReport};
use crate::measure::{Limit, Stream, histogram};
use crate::sys;

/// Frames taken at a time.
const BURST: usize = 64;
/// How long nothing must come before a sink gives up what is missing.
const QUIET: Duration = Duration::from_millis(200);
/// How often a waiting sink looks.
const LOOK: Duration = Duration::from_millis(1);
/// The longest time on the way that is told from longer ones: what 32 bits of 8 ns hold.
const AGE_MAX: u64 = histogram::LONGEST_NS;
/// A thread that works more than this share of the time, in percent, has no time to spare.
const BUSY_PERCENT: u32 = 95;

/// The program, where it is attached, and its counters.
#[derive(Debug)]
struct Tap {
    /// Ahead of the program, so that a drop detaches first.
    _attached: Attached,
    program: Program,
    hook: Hook,
    driver: String,
}

pub(super) fn make(
    place: &Place<'_>,
    stream: &Stream,
    detail: Detail,
    options: &SinkOptions,
) -> Result<Box<dyn Sink>> {
    ensure!(
        options.ring_entries.is_power_of_two() && options.ring_entries >= 16,
        "a ring of {} entries: a power of two, at least 16",
        options.ring_entries
    );
    let properties = place
        .netns
        .run(|| kernel::properties(&place.interface))?
        .with_context(|| format!("interface {}", place.interface))?;
    ensure!(properties.up, "interface {} is down", place.interface);
    match detail {
        Detail::Count => {
            let tap = Tap::attach(
                place,
                stream,
                &properties,
                options,
                ["count_xdp", "count_tc"],
            )?;
            Ok(Box::new(Count::new(place, tap)?))
        }
        Detail::Check => {
            let tap = Tap::attach(
                place,
                stream,
                &properties,
                options,
                ["check_xdp", "check_tc"],
            )?;
            Ok(Box::new(Check::new(
                place,
                stream,
                &properties,
                options,
                tap,
            )?))
        }
    }
}

impl Tap {
    fn attach(
        place: &Place<'_>,
        stream: &Stream,
        properties: &Properties,
        options: &SinkOptions,
        names: [&'static str; 2],
    ) -> Result<Self> {
        let family = packet::family(stream)?;
        let config = Config::of_sink(stream.tunnel.as_ref(), family, properties.ethernet);
        // Room for so many of the longest payloads; the kernel wants a power of two of pages.
        let ring = options.ring_entries.saturating_mul(2048).max(4096);
        let try_at = |hook: Hook| {
            let (name, point, ring) = match hook {
                Hook::Xdp => (names[0], AttachPoint::Driver, 4096),
                Hook::Auto | Hook::Ingress => (names[1], AttachPoint::Ingress, ring),
            };
            let program = Program::load(
                name,
                &config,
                Sizes {
                    ring,
                    ..Sizes::default()
                },
            )?;
            let attached = place.netns.run(|| {
                let interface = Interface::by_name(&place.interface)?;
                program.attach(place.netns, &place.interface, interface.index(), point)
            })??;
            Ok(Self {
                _attached: attached,
                program,
                hook,
                driver: properties.driver.clone(),
            })
        };
        match options.hook {
            // XDP programs of a device without Ethernet headers see what the stack of such devices makes of them.
            Hook::Xdp if !properties.ethernet => {
                bail!(
                    "{} has no Ethernet headers: take the hook \"ingress\"",
                    place.interface
                )
            }
            Hook::Xdp => try_at(Hook::Xdp),
            Hook::Auto if properties.ethernet => {
                try_at(Hook::Xdp).or_else(|_no_driver_has_it| try_at(Hook::Ingress))
            }
            Hook::Auto | Hook::Ingress => try_at(Hook::Ingress),
        }
    }

    fn describe(&self, what: &str, place: &str) -> String {
        let hook = match self.hook {
            Hook::Xdp => "XDP in the driver",
            Hook::Auto | Hook::Ingress => "the ingress of the stack",
        };
        format!("{what} at {hook} of {place} ({})", self.driver)
    }
}

/// Words of all CPUs' slots.
fn column(words: &Words, which: usize) -> impl Iterator<Item = u64> {
    let column = words.iter().skip(which).step_by(SLOT_WORDS);
    column.map(|word| word.load(Ordering::Relaxed))
}

/// Waits until so many packets have come, or none comes any more.
fn drain(wanted: u64, so_far: impl Fn() -> u64) {
    let (mut last, mut since) = (so_far(), monotonic_ns());
    loop {
        let (came, now) = (so_far(), monotonic_ns());
        if came >= wanted {
            return;
        }
        if came != last {
            (last, since) = (came, now);
        } else if now - since > kernel::nanoseconds(QUIET) {
            return;
        }
        thread::sleep(LOOK);
    }
}

/// The sink that counts.
#[derive(Debug)]
struct Count {
    tap: Tap,
    place: String,
    slots: Words,
    progress: Arc<Progress>,
    /// Packets and bytes at the last reset.
    base: [u64; 2],
}

impl Count {
    fn new(place: &Place<'_>, tap: Tap) -> Result<Self> {
        let progress = Progress {
            slots: Some(tap.program.words("slots")?),
            ..Progress::default()
        };
        Ok(Self {
            slots: tap.program.words("slots")?,
            tap,
            place: place.interface.clone(),
            progress: Arc::new(progress),
            base: [0; 2],
        })
    }

    fn totals(&self) -> [u64; 2] {
        [column(&self.slots, 0).sum(), column(&self.slots, 1).sum()]
    }
}

impl Sink for Count {
    fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn reset(&mut self) -> Result<()> {
        self.base = self.totals();
        Ok(())
    }

    fn finish(&mut self, sent_by_flow: &[u64]) -> Result<SinkReport> {
        let sent: u64 = sent_by_flow.iter().sum();
        drain(self.base[0] + sent, || self.totals()[0]);
        let totals = self.totals();
        let received = totals[0] - self.base[0];
        let last_ns = column(&self.slots, 2).max().filter(|_| received > 0);
        Ok(SinkReport {
            received,
            received_bytes: totals[1] - self.base[1],
            lost: sent.saturating_sub(received),
            last_ns,
            ..SinkReport::default()
        })
    }

    fn describe(&self) -> String {
        self.tap.describe("counts", &self.place)
    }
}

/// What a checking sink has seen since the last reset.
#[derive(Debug)]
struct Account {
    reader: Reader,
    order: Order,
    /// Packets from before the reset are not of this account.
    since_ns: u64,
    /// The source has another clock.
    foreign_clock: bool,
    received: u64,
    received_bytes: u64,
    reordered: u64,
    duplicated: u64,
    corrupt: u64,
    forgotten: u64,
    first_ns: Option<u64>,
    last_ns: Option<u64>,
    latency: Histogram<u64>,
}

impl Account {
    fn new(flows: usize, foreign_clock: bool) -> Result<Self> {
        Ok(Self {
            reader: Reader::new(),
            order: Order::new(flows),
            since_ns: monotonic_ns(),
            foreign_clock,
            received: 0,
            received_bytes: 0,
            reordered: 0,
            duplicated: 0,
            corrupt: 0,
            forgotten: 0,
            first_ns: None,
            last_ns: None,
            latency: histogram::new()?,
        })
    }

    fn clear(&mut self) {
        self.order.clear();
        self.since_ns = monotonic_ns();
        [
            self.received,
            self.received_bytes,
            self.reordered,
            self.duplicated,
            self.corrupt,
            self.forgotten,
        ] = [0; 6];
        (self.first_ns, self.last_ns) = (None, None);
        self.latency.reset();
    }

    /// Takes down a packet that came at a time, with a payload and headers of so many bytes.
    #[inline]
    fn take(&mut self, at_ns: u64, payload: &[u8], headers: usize) {
        let (flow, sequence, age_ns) = match self.reader.read(payload, at_ns) {
            Reading::Good {
                flow,
                sequence,
                age_ns,
            } => {
                // Sent before the reset; an age of half the range is a stamp of a moment that this CPU has not reached yet.
                // With another clock nobody can tell.
                let before = at_ns.saturating_sub(age_ns) < self.since_ns && age_ns < AGE_MAX / 2;
                if before && !self.foreign_clock {
                    return;
                }
                (flow, sequence, age_ns)
            }
            Reading::Pktgen { sequence, made_us } => {
                let now_us = u64::try_from(kernel::realtime().as_micros()).unwrap_or(0);
                let since_arrival = monotonic_ns().saturating_sub(at_ns);
                let age = (now_us.saturating_sub(made_us) * 1000).saturating_sub(since_arrival);
                (0, sequence, age)
            }
            Reading::Corrupt => {
                self.corrupt += 1;
                return self.seen(at_ns);
            }
        };
        match self.order.arrived(flow, sequence) {
            Some(Sequence::Next) => {}
            Some(Sequence::Late) => self.reordered += 1,
            Some(Sequence::Again) => {
                self.duplicated += 1;
                return self.seen(at_ns);
            }
            Some(Sequence::Forgotten) => {
                self.forgotten += 1;
                return self.seen(at_ns);
            }
            // A flow that the stream does not have.
            None => {
                self.corrupt += 1;
                return self.seen(at_ns);
            }
        }
        self.received += 1;
        self.received_bytes += u64::try_from(payload.len() + headers).unwrap_or_default();
        if !self.foreign_clock {
            self.latency.saturating_record(age_ns);
        }
        self.seen(at_ns);
    }

    fn seen(&mut self, at_ns: u64) {
        self.first_ns.get_or_insert(at_ns);
        self.last_ns = Some(at_ns);
    }
}

/// What the thread of a checking sink and its owner share.
#[derive(Debug)]
struct Shared {
    account: Mutex<Account>,
    stop: AtomicBool,
    cpu_ns: AtomicU64,
    progress: Arc<Progress>,
}

impl Shared {
    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How packets come to the thread.
enum Feed {
    Sockets(Vec<Queue>),
    Ring(MapHandle),
}

/// One receive queue.
struct Queue {
    umem: Umem,
    receiver: Receiver,
    burst: Vec<af_xdp::Frame>,
}

/// The sink that checks.
#[derive(Debug)]
struct Check {
    tap: Tap,
    place: String,
    sockets: Vec<SocketHandle>,
    slots: Words,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
    /// When the account began, the thread's CPU time then, and what the sink itself had lost.
    base: (u64, u64, u64),
}

impl Check {
    fn new(
        place: &Place<'_>,
        stream: &Stream,
        properties: &Properties,
        options: &SinkOptions,
        tap: Tap,
    ) -> Result<Self> {
        let family = packet::family(stream)?;
        let places = Places::of(stream.tunnel.as_ref(), family, properties.ethernet);
        let (feed, sockets) = match tap.hook {
            Hook::Xdp => {
                let longest = packet::sizes(stream.size).0.into_iter().max();
                let frame = places.inner + usize::from(longest.unwrap_or_default());
                let (queues, handles) = open_queues(place, frame, options)?;
                let map = tap.program.map("sockets")?;
                for handle in &handles {
                    bpf::set_socket(&map, handle.queue(), handle.as_fd())?;
                }
                (Feed::Sockets(queues), handles)
            }
            Hook::Auto | Hook::Ingress => (Feed::Ring(tap.program.map("ring")?), Vec::new()),
        };
        let shared = Arc::new(Shared {
            account: Mutex::new(Account::new(
                packet::flow_count(stream),
                options.foreign_clock,
            )?),
            stop: AtomicBool::new(false),
            cpu_ns: AtomicU64::new(0),
            progress: Arc::default(),
        });
        let thread = thread::spawn({
            let (shared, cpu, rest) = (Arc::clone(&shared), place.cpu, options.rest);
            let headers = places.payload - places.inner;
            move || {
                if let Some(cpu) = cpu {
                    sys::pin(0, cpu).with_context(|| format!("keep the sink to CPU {cpu}"))?;
                }
                match feed {
                    Feed::Sockets(queues) => receive(&shared, queues, headers, rest),
                    Feed::Ring(map) => read_ring(&shared, &map, headers, rest),
                }
            }
        });
        let mut check = Self {
            slots: tap.program.words("slots")?,
            tap,
            place: place.interface.clone(),
            sockets,
            shared,
            thread: Some(thread),
            base: (0, 0, 0),
        };
        check.reset()?;
        Ok(check)
    }

    /// Packets that came to the sink, and that it had no room for.
    fn lost_here(&self) -> Result<u64> {
        let mut lost: u64 = column(&self.slots, 3).sum();
        for socket in &self.sockets {
            let statistics = socket.statistics()?;
            lost += statistics.rx_dropped + statistics.rx_ring_full;
        }
        Ok(lost)
    }

    /// Why the thread has ended, if it has.
    fn check_alive(&mut self) -> Result<()> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished)
            && let Some(thread) = self.thread.take()
        {
            match thread.join() {
                Ok(outcome) => outcome?,
                Err(_panic) => bail!("the sink's thread panicked"),
            }
        }
        ensure!(self.thread.is_some(), "the sink's thread has ended");
        Ok(())
    }
}

impl Sink for Check {
    fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.shared.progress)
    }

    fn reset(&mut self) -> Result<()> {
        self.check_alive()?;
        self.shared.account().clear();
        let cpu = self.shared.cpu_ns.load(Ordering::Relaxed);
        self.base = (monotonic_ns(), cpu, self.lost_here()?);
        Ok(())
    }

    fn finish(&mut self, sent_by_flow: &[u64]) -> Result<SinkReport> {
        let sent: u64 = sent_by_flow.iter().sum();
        drain(sent, || {
            let account = self.shared.account();
            account.received + account.corrupt + account.forgotten
        });
        self.check_alive()?;
        let (begin, cpu, lost_before) = self.base;
        let lost_here = self.lost_here()? - lost_before;
        let cpu = Duration::from_nanos(self.shared.cpu_ns.load(Ordering::Relaxed) - cpu);
        let account = self.shared.account();
        let missing: u64 = sent_by_flow
            .iter()
            .zip(account.order.came())
            .map(|(sent, came)| sent.saturating_sub(*came))
            .sum();
        let mut limits = Vec::new();
        if lost_here > 0 {
            limits.push(Limit::Sink(format!(
                "the sink itself had no room for {lost_here} packets"
            )));
        }
        let until = account.last_ns.unwrap_or(begin);
        let wall = Duration::from_nanos(until.saturating_sub(begin));
        if cpu * 100 > wall * BUSY_PERCENT && wall > QUIET {
            limits.push(Limit::Sink(format!(
                "its thread was busy for {cpu:.1?} of {wall:.1?}"
            )));
        }
        if account.forgotten > 0 {
            limits.push(Limit::Sink(format!(
                "{} packets came more than {} behind a later one of their flow: late or twice, it cannot be said; they count as lost",
                account.forgotten,
                account.order.window()
            )));
        }
        Ok(SinkReport {
            received: account.received,
            received_bytes: account.received_bytes,
            lost: missing.saturating_sub(account.corrupt),
            reordered: account.reordered,
            duplicated: account.duplicated,
            corrupt: account.corrupt,
            first_ns: account.first_ns,
            last_ns: account.last_ns,
            latency: (!account.foreign_clock).then(|| account.latency.clone()),
            cpu,
            limits,
        })
    }

    fn describe(&self) -> String {
        let modes: Vec<_> = self
            .sockets
            .iter()
            .map(|socket| socket.mode().to_string())
            .collect();
        let what = match modes.first() {
            Some(mode) => format!("checks ({} AF_XDP sockets, {mode})", modes.len()),
            None => "checks (BPF ring)".to_owned(),
        };
        self.tap.describe(&what, &self.place)
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed, and an error has nobody to go to.
            drop(thread.join());
        }
    }
}

/// Opens a socket on each queue of the interface.
fn open_queues(
    place: &Place<'_>,
    frame_bytes: usize,
    options: &SinkOptions,
) -> Result<(Vec<Queue>, Vec<SocketHandle>)> {
    place.netns.run(|| {
        let interface = Interface::by_name(&place.interface)?;
        let (mut queues, mut handles) = (Vec::new(), Vec::new());
        for queue in 0..QUEUES_MAX {
            let entries = options.ring_entries;
            let mut umem = Umem::new(&UmemOptions {
                frames: 2 * entries,
                // Behind what the kernel leaves free (256) and the crate reserves.
                frame_size: if frame_bytes > 2048 - 320 { 4096 } else { 2048 },
                ..UmemOptions::default()
            })?;
            let opened = Socket::open(
                &mut umem,
                &interface,
                queue,
                &SocketOptions {
                    fill_entries: entries,
                    rx_entries: entries,
                    tx_entries: 16,
                    completion_entries: 16,
                    ..SocketOptions::default()
                },
            );
            let mut socket = match opened {
                Ok(socket) => socket,
                // There are no more.
                Err(_) if queue > 0 => break,
                Err(error) => return Err(error.into()),
            };
            socket.receiver.refill(&mut umem, usize::try_from(entries)?);
            queues.push(Queue {
                umem,
                receiver: socket.receiver,
                burst: Vec::with_capacity(BURST),
            });
            handles.push(socket.handle);
        }
        Ok((queues, handles))
    })?
}

/// The thread of a sink with sockets.
fn receive(shared: &Shared, mut queues: Vec<Queue>, headers: usize, rest: Duration) -> Result<()> {
    let mut entries: Vec<_> = queues
        .iter()
        .map(|queue| kernel::readable(queue.receiver.as_fd()))
        .collect();
    while !shared.stop.load(Ordering::Relaxed) {
        let mut taken = 0;
        for queue in &mut queues {
            let Queue {
                umem,
                receiver,
                burst,
            } = queue;
            receiver.receive(umem, burst, BURST);
            if burst.is_empty() {
                continue;
            }
            taken += burst.len();
            let mut account = shared.account();
            for frame in burst.iter() {
                take_frame(&mut account, umem.packet(frame), headers);
            }
            drop(account);
            shared
                .progress
                .add(u64::try_from(burst.len()).unwrap_or_default());
            for frame in burst.drain(..) {
                umem.give(frame);
            }
            receiver.refill(umem, 2 * BURST);
        }
        shared
            .cpu_ns
            .store(kernel::nanoseconds(kernel::thread_cpu()), Ordering::Relaxed);
        if taken == 0 {
            for queue in &mut queues {
                if queue.receiver.needs_wakeup() {
                    queue.receiver.wake()?;
                }
            }
            kernel::wait_readable(&mut entries, 10 * LOOK)?;
        } else if rest > Duration::ZERO {
            thread::sleep(rest);
        }
    }
    Ok(())
}

/// Takes down a frame over whose first bytes the program has written its note (`struct engine_note`).
#[inline]
fn take_frame(account: &mut Account, frame: &[u8], headers: usize) {
    let Some(note) = frame.first_chunk::<NOTE_BYTES>() else {
        return;
    };
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *note;
    let at_ns = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    let start = usize::from(u16::from_ne_bytes([i, j]));
    let length = usize::from(u16::from_ne_bytes([k, l]));
    // A payload that was cut off is a wrong one.
    let end = (start + length).min(frame.len());
    account.take(at_ns, frame.get(start..end).unwrap_or_default(), headers);
}

/// The thread of a sink without sockets.
fn read_ring(shared: &Shared, map: &MapHandle, headers: usize, rest: Duration) -> Result<()> {
    let mut builder = RingBufferBuilder::new();
    builder.add(map, |record| {
        take_frame(&mut shared.account(), record, headers);
        shared.progress.add(1);
        0
    })?;
    let ring = builder.build()?;
    while !shared.stop.load(Ordering::Relaxed) {
        let taken = ring.consume_raw_n(BURST);
        ensure!(taken >= 0, "the ring broke: {taken}");
        shared
            .cpu_ns
            .store(kernel::nanoseconds(kernel::thread_cpu()), Ordering::Relaxed);
        if taken == 0 {
            thread::sleep(LOOK / 10);
        } else if rest > Duration::ZERO {
            thread::sleep(rest);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Mac;
    use crate::engine::packet::Shape;
    use crate::measure::Size;

    /// The payload of a packet that was made at this time.
    fn payload(made_ns: u64) -> Vec<u8> {
        let stream = Stream {
            to_mac: Mac([2, 0, 0, 0, 0, 2]),
            from_mac: Mac([2, 0, 0, 0, 0, 1]),
            from: [10, 244, 1, 2].into(),
            to: vec![[10, 244, 2, 2].into()],
            first_port: 20_000,
            flows: 1,
            size: Size::Bytes(64),
            tunnel: None,
        };
        let shape = Shape::of(&stream, true).expect("sizes are good");
        let mut frame = vec![0; shape.frame_bytes_max()];
        shape.write(0, 0, 0, made_ns, &mut frame);
        let family = packet::family(&stream).expect("one family");
        frame.split_off(Places::of(None, family, true).payload)
    }

    /// What is received of a packet with the time stamp of a second before the account began, and the ages that were recorded.
    fn taken(foreign_clock: bool) -> (u64, u64) {
        let mut account = Account::new(1, foreign_clock).expect("bounds");
        let now = account.since_ns + 1000;
        account.take(now, &payload(now - 1_000_000_000), 28);
        assert_eq!(account.corrupt, 0);
        (account.received, account.latency.len())
    }

    #[test]
    fn stamps_of_another_clock_say_nothing() {
        assert_eq!(taken(false), (0, 0), "of the trial before");
        assert_eq!(taken(true), (1, 0), "of a clock that is behind");
    }
}
