//! UDP at a steady rate, with an account of every packet.
//!
//! Each packet says which run, flow and place in the flow it is, when it was sent, and is filled
//! with a pattern that follows from all of that. The receiver checks every byte and remembers every
//! sequence number, so that lost, duplicated, reordered and damaged packets are counted and not
//! estimated, and a packet that did not arrive is never explained away.
//!
//! ```text
//!  0      4      6      8       12      16         24
//!  ├──────┼──────┼──────┼───────┼───────┼──────────┼─────────────
//!  │ tag  │ flow │ size │  seq  │ check │ sent, ns │ pattern …
//! ```

use core::fmt;
use core::net::{IpAddr, SocketAddr};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::net::UdpSocket;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::histogram::Histogram;
use super::{Pattern, run_tag, udp_socket};
use crate::address::Family;
use crate::lab::Host;
use crate::sys;

/// The least payload of a counted packet.
pub const UDP_PAYLOAD_MIN: usize = HEADER;

const HEADER: usize = 24;
/// The sender wakes this often, where the machine lets it. At 50,000 packets a second a tick is 50
/// packets, one system call.
const TICK: Duration = Duration::from_millis(1);
/// A sender that was not scheduled catches up on at most so much,
const DEBT: Duration = Duration::from_millis(500);
/// and in bursts of at most so much, and of at most so many packets: what a short queue on the way
/// still holds. On two busy cores a tick takes 4 to 5 ms, so this keeps up the rate there.
const BURST: Duration = Duration::from_millis(8);
const BURST_PACKETS: u128 = 256;

/// Sender and receiver are the measuring instrument: what else wants the cores waits for them. No
/// more than this, so that workers on the same cores keep a fair share.
const NICE: i32 = -5;

/// A description of paced UDP traffic from one host to another.
#[derive(Debug)]
#[must_use]
pub struct UdpFlow<'a> {
    from: &'a dyn Host,
    to: &'a dyn Host,
    family: Family,
    flows: u16,
    sizes: Vec<usize>,
    rate: u64,
    count: Option<u64>,
    duration: Option<Duration>,
    drain: Duration,
}

impl<'a> UdpFlow<'a> {
    /// One flow of 1,000 packets a second with 64 bytes of payload, until it is stopped.
    pub fn new(from: &'a dyn Host, to: &'a dyn Host) -> Self {
        Self {
            from,
            to,
            family: Family::Ipv4,
            flows: 1,
            sizes: vec![64],
            rate: 1000,
            count: None,
            duration: None,
            drain: Duration::from_millis(300),
        }
    }

    /// Over this family; IPv4 unless said otherwise.
    pub fn over(mut self, family: Family) -> Self {
        self.family = family;
        self
    }

    /// So many flows, each with a source port of its own, taking turns.
    pub fn flows(mut self, flows: u16) -> Self {
        self.flows = flows;
        self
    }

    /// Payload bytes of the packets, in turn within each flow; at least [`UDP_PAYLOAD_MIN`].
    pub fn payload_sizes(mut self, sizes: &[usize]) -> Self {
        self.sizes = sizes.to_vec();
        self
    }

    /// Packets a second, over all flows.
    pub fn rate(mut self, packets_per_second: u64) -> Self {
        self.rate = packets_per_second;
        self
    }

    /// Ends after so many packets, over all flows.
    pub fn count(mut self, packets: u64) -> Self {
        self.count = Some(packets);
        self
    }

    /// Ends after so much time.
    pub fn duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// After the last packet was sent, the receiver listens on until nothing has come for so long.
    pub fn drain(mut self, quiet: Duration) -> Self {
        self.drain = quiet;
        self
    }

    /// Starts sending and receiving in the background.
    ///
    /// # Errors
    /// The description makes no sense, or a socket cannot be opened.
    pub fn start(self) -> Result<TrafficHandle> {
        ensure!(self.flows > 0 && self.rate > 0, "no flows or no rate");
        ensure!(!self.sizes.is_empty(), "no packet size");
        let size_max = self.sizes.iter().copied().max().unwrap_or_default();
        ensure!(
            self.sizes.iter().all(|size| *size >= UDP_PAYLOAD_MIN),
            "a payload below {UDP_PAYLOAD_MIN} bytes"
        );
        ensure!(size_max <= 65_507, "a payload above 65507 bytes");
        let sink = udp_socket(self.to, self.family)?;
        sys::set_receive_buffer(&sink, 64 << 20).context("receive buffer of a sink")?;
        sys::set_receive_timeout(&sink, 20).context("receive timeout of a sink")?;
        let destination = sink.local_addr().context("address of a sink")?;
        let sources: Vec<UdpSocket> = (0..self.flows)
            .map(|_| udp_socket(self.from, self.family))
            .collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            tag: run_tag(),
            start: Instant::now(),
            source: self.from.address_of(self.family),
            sent: sources.iter().map(|_| AtomicU64::new(0)).collect(),
            refused: AtomicU64::new(0),
            stop_sending: AtomicBool::new(false),
            sending_ns: AtomicU64::new(0),
            drain_ns: AtomicU64::new(u64::MAX),
            sink,
            tally: Mutex::new(Tally::new(self.flows.into())),
        });
        let drain = self.drain;
        let receiver = thread::spawn({
            let shared = Arc::clone(&shared);
            move || receive(&shared, size_max)
        });
        let sender = thread::spawn({
            let shared = Arc::clone(&shared);
            let sender = Sender {
                sources,
                destination,
                sizes: self.sizes,
                rate: self.rate,
                count: self.count.unwrap_or(u64::MAX),
                duration: self.duration.unwrap_or(Duration::MAX),
            };
            move || sender.run(&shared)
        });
        Ok(TrafficHandle {
            shared,
            sender: Some(sender),
            receiver: Some(receiver),
            drain,
        })
    }

    /// Runs the traffic to its end, which a count or a duration gives.
    ///
    /// # Errors
    /// As [`UdpFlow::start`]; also when there is neither.
    pub fn run(self) -> Result<TrafficReport> {
        ensure!(
            self.count.is_some() || self.duration.is_some(),
            "traffic without an end: give a count or a duration"
        );
        Ok(self.start()?.wait())
    }
}

impl fmt::Debug for dyn Host + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What sender and receiver have in common.
#[derive(Debug)]
struct Shared {
    tag: u32,
    start: Instant,
    source: IpAddr,
    /// Per flow; only the sender stores these.
    sent: Vec<AtomicU64>,
    refused: AtomicU64,
    stop_sending: AtomicBool,
    /// How long the sender ran; only the sender stores it, when it ends.
    sending_ns: AtomicU64,
    /// The quiet time after which the receiver ends; endless while the sender runs.
    drain_ns: AtomicU64,
    sink: UdpSocket,
    tally: Mutex<Tally>,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        // Each packet is counted in one go, so the tally is whole also when a holder has panicked.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ns(&self) -> u64 {
        nanoseconds(self.start.elapsed())
    }

    fn report(&self) -> TrafficReport {
        let tally = self.tally();
        let sent_by_flow: Vec<u64> = self
            .sent
            .iter()
            .map(|sent| sent.load(Ordering::Acquire))
            .collect();
        let sent: u64 = sent_by_flow.iter().sum();
        let received: u64 = tally.flows.iter().map(|flow| flow.received).sum();
        let gap_packets = tally
            .flows
            .iter()
            .zip(&sent_by_flow)
            .map(|(flow, sent)| flow.longest_hole(*sent))
            .max();
        let sending_ns = self.sending_ns.load(Ordering::Acquire);
        TrafficReport {
            sent,
            received,
            lost: sent.saturating_sub(received),
            duplicated: tally.flows.iter().map(|flow| flow.duplicated).sum(),
            reordered: tally.flows.iter().map(|flow| flow.reordered).sum(),
            corrupt: tally.corrupt,
            foreign: tally.foreign,
            refused: self.refused.load(Ordering::Acquire),
            sink_drops: sys::socket_drops(&self.sink).unwrap_or_default().into(),
            longest_gap: Duration::from_nanos(tally.longest_gap_ns),
            longest_gap_packets: gap_packets.unwrap_or_default(),
            latency_p50: tally.latency.percentile(50),
            latency_p99: tally.latency.percentile(99),
            duration: if sending_ns > 0 {
                Duration::from_nanos(sending_ns)
            } else {
                self.start.elapsed()
            },
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The account of a run of traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrafficReport {
    /// Packets that the sender's kernel took.
    pub sent: u64,
    /// Of these, arrived whole; each counted once.
    pub received: u64,
    /// Sent and not received. In a [`TrafficHandle::snapshot`] this includes what is on its way.
    pub lost: u64,
    /// Arrived again.
    pub duplicated: u64,
    /// Arrived after a later packet of the same flow.
    pub reordered: u64,
    /// Arrived damaged; these are lost as well.
    pub corrupt: u64,
    /// Arrived from an address that is not the sender's: someone translated it. Received as well.
    pub foreign: u64,
    /// Send calls that the sender's kernel refused. The packet was sent again, so it is not lost.
    pub refused: u64,
    /// Lost in front of the receiver's very socket, because its buffer was full.
    pub sink_drops: u64,
    /// The longest time between two arrivals, over all flows.
    pub longest_gap: Duration,
    /// The most packets missing in a row within a flow.
    pub longest_gap_packets: u64,
    /// Half of the packets took at most so long, from before their send call (which they share with
    /// up to 63 others) to after their receive call.
    pub latency_p50: Duration,
    /// 99 % of the packets took at most so long.
    pub latency_p99: Duration,
    /// How long the sender sent.
    pub duration: Duration,
}

impl TrafficReport {
    /// Everything arrived, once, whole, in order, from the sender's own address.
    #[must_use]
    pub fn is_perfect(&self) -> bool {
        let faults = [
            self.lost,
            self.duplicated,
            self.reordered,
            self.corrupt,
            self.foreign,
        ];
        self.sent > 0 && faults.iter().all(|count| *count == 0)
    }

    /// Several accounts as one: packets added up, of times the worst.
    pub(super) fn sum(reports: impl Iterator<Item = Self>) -> Self {
        let none = Self {
            sent: 0,
            received: 0,
            lost: 0,
            duplicated: 0,
            reordered: 0,
            corrupt: 0,
            foreign: 0,
            refused: 0,
            sink_drops: 0,
            longest_gap: Duration::ZERO,
            longest_gap_packets: 0,
            latency_p50: Duration::ZERO,
            latency_p99: Duration::ZERO,
            duration: Duration::ZERO,
        };
        reports.fold(none, |sum, one| Self {
            sent: sum.sent + one.sent,
            received: sum.received + one.received,
            lost: sum.lost + one.lost,
            duplicated: sum.duplicated + one.duplicated,
            reordered: sum.reordered + one.reordered,
            corrupt: sum.corrupt + one.corrupt,
            foreign: sum.foreign + one.foreign,
            refused: sum.refused + one.refused,
            sink_drops: sum.sink_drops + one.sink_drops,
            longest_gap: sum.longest_gap.max(one.longest_gap),
            longest_gap_packets: sum.longest_gap_packets.max(one.longest_gap_packets),
            latency_p50: sum.latency_p50.max(one.latency_p50),
            latency_p99: sum.latency_p99.max(one.latency_p99),
            duration: sum.duration.max(one.duration),
        })
    }

    /// Packets a second that were really sent.
    #[must_use]
    pub fn rate(&self) -> u64 {
        let rate = u128::from(self.sent) * 1_000_000_000 / self.duration.as_nanos().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for TrafficReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sent {} ({}/s), received {}, lost {} (in a row {}, at the sink {}), duplicated {}, reordered {}, corrupt {}, \
             foreign {}, refused {}, longest gap {:.1?}, latency p50 {:.1?} p99 {:.1?}",
            self.sent,
            self.rate(),
            self.received,
            self.lost,
            self.longest_gap_packets,
            self.sink_drops,
            self.duplicated,
            self.reordered,
            self.corrupt,
            self.foreign,
            self.refused,
            self.longest_gap,
            self.latency_p50,
            self.latency_p99,
        )
    }
}

/// A place in running traffic: the packets that had been sent when it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// By flow.
    sent: Vec<u64>,
}

/// Traffic that runs in the background. Dropping it stops it.
#[derive(Debug)]
pub struct TrafficHandle {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
    drain: Duration,
}

impl TrafficHandle {
    /// The account so far; what is on its way counts as lost.
    #[must_use]
    pub fn snapshot(&self) -> TrafficReport {
        self.shared.report()
    }

    /// How far the sender has come.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            sent: self
                .shared
                .sent
                .iter()
                .map(|sent| sent.load(Ordering::Acquire))
                .collect(),
        }
    }

    /// How many of the packets that were sent before the mark have not arrived, while traffic goes
    /// on. Waits as long as stragglers come in, and until `quiet` has passed without one.
    #[must_use]
    pub fn lost_before(&self, mark: &Mark, quiet: Duration) -> u64 {
        let missing = || {
            let tally = self.shared.tally();
            let flows = tally.flows.iter().zip(&mark.sent);
            flows
                .map(|(flow, sent)| sent.saturating_sub(flow.received_before(*sent)))
                .sum()
        };
        let mut lost: u64 = missing();
        let mut since = Instant::now();
        while lost > 0 && since.elapsed() < quiet {
            thread::sleep(Duration::from_millis(10));
            let now = missing();
            if now != lost {
                lost = now;
                since = Instant::now();
            }
        }
        lost
    }

    /// Stops sending, lets what is on its way arrive, and returns the account.
    #[must_use]
    pub fn stop(self) -> TrafficReport {
        self.stop_sending();
        self.wait()
    }

    /// Tells the sender to stop, and returns before it has.
    pub(super) fn stop_sending(&self) {
        self.shared.stop_sending.store(true, Ordering::Release);
    }

    /// Waits for the sender's end, lets what is on its way arrive, and returns the account.
    #[must_use]
    pub fn wait(mut self) -> TrafficReport {
        self.join();
        self.shared.report()
    }

    fn join(&mut self) {
        // The threads end by panic only for a bug of this module, which they then have printed.
        if let Some(sender) = self.sender.take() {
            drop(sender.join());
        }
        self.shared
            .drain_ns
            .store(nanoseconds(self.drain), Ordering::Release);
        if let Some(receiver) = self.receiver.take() {
            drop(receiver.join());
        }
    }
}

impl Drop for TrafficHandle {
    fn drop(&mut self) {
        self.stop_sending();
        self.join();
    }
}

struct Sender {
    sources: Vec<UdpSocket>,
    destination: SocketAddr,
    sizes: Vec<usize>,
    rate: u64,
    count: u64,
    duration: Duration,
}

impl Sender {
    fn run(self, shared: &Shared) {
        prefer_this_thread();
        let start = Instant::now();
        let mut next = vec![0_u64; self.sources.len()];
        let mut buffers = vec![Vec::new(); sys::BATCH];
        // Packets that are due, in billionths.
        let mut due: u128 = 0;
        let due_max = u128::from(self.rate) * DEBT.as_nanos();
        let burst_max =
            (u128::from(self.rate) * BURST.as_nanos() / 1_000_000_000).clamp(2, BURST_PACKETS);
        let mut last = start;
        let mut turn = 0;
        loop {
            let now = Instant::now();
            let sent: u64 = next.iter().sum();
            let over = now.duration_since(start) >= self.duration || sent >= self.count;
            if over || shared.stop_sending.load(Ordering::Acquire) {
                break;
            }
            due = (due + u128::from(self.rate) * now.duration_since(last).as_nanos()).min(due_max);
            last = now;
            let burst = (due / 1_000_000_000)
                .min(burst_max)
                .min(u128::from(self.count - sent));
            let mut burst = usize::try_from(burst).unwrap_or(usize::MAX);
            due -= u128::try_from(burst).unwrap_or_default() * 1_000_000_000;
            // Divide the burst among the flows; the odd ones go to each flow in turn.
            for step in 0..self.sources.len() {
                let flow = (turn + step) % self.sources.len();
                let share = burst.div_ceil(self.sources.len() - step);
                burst -= share;
                self.send_share(shared, flow, share, &mut next[flow], &mut buffers);
            }
            turn += 1;
            thread::sleep(TICK);
        }
        shared
            .sending_ns
            .store(nanoseconds(start.elapsed()).max(1), Ordering::Release);
    }

    fn send_share(
        &self,
        shared: &Shared,
        flow: usize,
        share: usize,
        next: &mut u64,
        buffers: &mut [Vec<u8>],
    ) {
        let mut left = share;
        while left > 0 {
            let batch = &mut buffers[..left.min(sys::BATCH)];
            let now = shared.now_ns();
            for (seq, buffer) in (*next..).zip(batch.iter_mut()) {
                let turn = usize::try_from(seq).unwrap_or_default() % self.sizes.len();
                write_packet(buffer, self.sizes[turn], shared.tag, flow, seq, now);
            }
            match sys::send_batch(&self.sources[flow], self.destination, batch) {
                Ok(0) | Err(_) => {
                    // The rest of the share is given up; the sequence goes on where it stood, so
                    // nothing that was not sent can count as lost.
                    shared.refused.fetch_add(1, Ordering::AcqRel);
                    return;
                }
                Ok(taken) => {
                    *next += u64::try_from(taken).unwrap_or_default();
                    left -= taken.min(left);
                    shared.sent[flow].store(*next, Ordering::Release);
                }
            }
        }
    }
}

fn write_packet(buffer: &mut Vec<u8>, size: usize, tag: u32, flow: usize, seq: u64, sent_ns: u64) {
    // A flow's sequence number has 32 bits on the wire: a day at 50,000 packets a second.
    let header = Header {
        tag,
        flow: u16::try_from(flow).unwrap_or(u16::MAX),
        size: u16::try_from(size).unwrap_or(u16::MAX),
        seq: u32::try_from(seq).unwrap_or(u32::MAX),
        sent_ns,
    };
    buffer.resize(size, 0);
    buffer[..HEADER].copy_from_slice(&header.encode());
    header.pattern().fill(&mut buffer[HEADER..]);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    tag: u32,
    flow: u16,
    size: u16,
    seq: u32,
    sent_ns: u64,
}

impl Header {
    /// The pattern of this packet's payload: no two packets of a run have the same.
    fn pattern(self) -> Pattern {
        let place = u64::from(self.tag) << 32 | u64::from(self.flow) << 16 | u64::from(self.size);
        let mut pattern = Pattern::seeded(place ^ self.sent_ns.rotate_left(32));
        Pattern::seeded(pattern.word() ^ u64::from(self.seq))
    }

    fn check(self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.pattern().word().to_be_bytes();
        [a, b, c, d]
    }

    fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&self.tag.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flow.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.size.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.seq.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.check());
        bytes[16..24].copy_from_slice(&self.sent_ns.to_be_bytes());
        bytes
    }

    /// The header of a packet whose every byte is as it was sent.
    fn parse(packet: &[u8]) -> Option<Self> {
        let header = Self {
            tag: u32::from_be_bytes(packet.get(0..4)?.try_into().ok()?),
            flow: u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?),
            size: u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?),
            seq: u32::from_be_bytes(packet.get(8..12)?.try_into().ok()?),
            sent_ns: u64::from_be_bytes(packet.get(16..24)?.try_into().ok()?),
        };
        let whole = usize::from(header.size) == packet.len()
            && header.check() == packet[12..16]
            && header.pattern().matches(&packet[HEADER..]);
        whole.then_some(header)
    }
}

fn prefer_this_thread() {
    // Without the right to it, traffic runs like anyone else.
    drop(sys::set_thread_nice(NICE));
}

fn receive(shared: &Shared, size_max: usize) {
    prefer_this_thread();
    // One byte more than the longest packet: a longer one does not match its own size then.
    let mut buffers = vec![vec![0; size_max + 1]; sys::BATCH];
    let mut last_arrival = Instant::now();
    loop {
        if let Ok(arrivals) = sys::receive_batch(&shared.sink, &mut buffers) {
            last_arrival = Instant::now();
            let now = shared.now_ns();
            let mut tally = shared.tally();
            for (buffer, arrival) in buffers.iter().zip(arrivals) {
                if tally.count(&buffer[..arrival.length], shared.tag, now)
                    && arrival.source != shared.source
                {
                    tally.foreign += 1;
                }
            }
        }
        let quiet = nanoseconds(last_arrival.elapsed());
        if quiet > shared.drain_ns.load(Ordering::Acquire) {
            return;
        }
    }
}

/// What has arrived.
#[derive(Debug)]
struct Tally {
    flows: Vec<FlowTally>,
    corrupt: u64,
    foreign: u64,
    last_arrival_ns: Option<u64>,
    longest_gap_ns: u64,
    latency: Histogram,
}

impl Tally {
    fn new(flows: usize) -> Self {
        Self {
            flows: (0..flows).map(|_| FlowTally::default()).collect(),
            corrupt: 0,
            foreign: 0,
            last_arrival_ns: None,
            longest_gap_ns: 0,
            latency: Histogram::new(),
        }
    }

    /// Counts a packet; false when it is not one of this run, whole.
    fn count(&mut self, packet: &[u8], tag: u32, now_ns: u64) -> bool {
        let header = Header::parse(packet).filter(|header| header.tag == tag);
        let Some((header, flow)) =
            header.and_then(|header| Some((header, self.flows.get_mut(usize::from(header.flow))?)))
        else {
            self.corrupt += 1;
            return false;
        };
        if let Some(last) = self.last_arrival_ns {
            self.longest_gap_ns = self.longest_gap_ns.max(now_ns.saturating_sub(last));
        }
        self.last_arrival_ns = Some(now_ns);
        self.latency.record(now_ns.saturating_sub(header.sent_ns));
        flow.count(header.seq.into());
        true
    }
}

#[derive(Debug, Default)]
struct FlowTally {
    /// One bit per sequence number.
    seen: Vec<u64>,
    received: u64,
    duplicated: u64,
    reordered: u64,
    /// One more than the highest sequence number that has arrived.
    end: u64,
}

impl FlowTally {
    fn count(&mut self, seq: u64) {
        let (word, bit) = (
            usize::try_from(seq / 64).unwrap_or_default(),
            1 << (seq % 64),
        );
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.seen[word] |= bit;
        self.received += 1;
        if seq < self.end {
            self.reordered += 1;
        } else {
            self.end = seq + 1;
        }
    }

    /// How many of the first `sent` packets have arrived.
    fn received_before(&self, sent: u64) -> u64 {
        let mut left = sent;
        let mut received = 0;
        for word in &self.seen {
            let wanted = if left < 64 { (1 << left) - 1 } else { u64::MAX };
            received += u64::from((word & wanted).count_ones());
            left = left.saturating_sub(64);
        }
        received
    }

    /// The most packets in a row, of the first `sent`, that have not arrived.
    fn longest_hole(&self, sent: u64) -> u64 {
        let (mut longest, mut hole) = (0_u64, 0);
        let mut seq = 0;
        while seq < sent {
            let word = usize::try_from(seq / 64)
                .ok()
                .and_then(|word| self.seen.get(word));
            let here = word.copied().unwrap_or_default() >> (seq % 64);
            // Skip to the next packet that arrived, or past a row of those that did.
            let step = if here == 0 {
                64 - seq % 64
            } else if here & 1 == 0 {
                here.trailing_zeros().into()
            } else {
                u64::from(here.trailing_ones()).min(64 - seq % 64)
            };
            let step = step.min(sent - seq);
            hole = if here & 1 == 0 { hole + step } else { 0 };
            longest = longest.max(hole);
            seq += step;
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_before_a_mark_are_counted() {
        let mut flow = FlowTally::default();
        let arrived = [0, 1, 5, 63, 64, 200];
        arrived.into_iter().for_each(|seq| flow.count(seq));
        for sent in 0..300 {
            let expected = arrived.iter().filter(|seq| **seq < sent).count();
            assert_eq!(flow.received_before(sent), expected as u64, "of {sent}");
        }
    }

    fn packet(flow: usize, seq: u64, size: usize) -> Vec<u8> {
        let mut buffer = Vec::new();
        write_packet(&mut buffer, size, 7, flow, seq, 1000);
        buffer
    }

    #[test]
    fn a_flipped_bit_anywhere_is_corrupt() {
        for size in [UDP_PAYLOAD_MIN, 25, 64, 333] {
            let whole = packet(0, 3, size);
            assert!(Header::parse(&whole).is_some());
            for bit in 0..size * 8 {
                let mut damaged = whole.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Header::parse(&damaged), None, "size {size}, bit {bit}");
            }
            assert_eq!(Header::parse(&whole[..size - 1]), None, "one byte short");
            assert_eq!(
                Header::parse(&[whole.as_slice(), &[0]].concat()),
                None,
                "one byte long"
            );
        }
        assert_eq!(Header::parse(&[]), None);
    }

    #[test]
    fn the_tally_tells_loss_duplicates_and_reordering_apart() {
        let mut tally = Tally::new(2);
        for seq in [0, 1, 4, 3, 3, 9] {
            tally.count(&packet(0, seq, 64), 7, 2000);
        }
        tally.count(&packet(1, 0, 64), 7, 5000);
        tally.count(&packet(0, 5, 64), 8, 6000);
        tally.count(&packet(2, 0, 64), 7, 6000);
        tally.count(b"something else", 7, 6000);
        let flow = &tally.flows[0];
        assert_eq!((flow.received, flow.duplicated, flow.reordered), (5, 1, 1));
        assert_eq!(flow.longest_hole(10), 4, "5 to 8 are missing");
        assert_eq!(flow.longest_hole(20), 10, "10 to 19 are missing");
        assert_eq!(flow.longest_hole(2), 0);
        assert_eq!(flow.longest_hole(500), 490, "a hole over many words");
        let mut gaps = FlowTally::default();
        (0..300)
            .filter(|seq| !(50..200).contains(seq))
            .for_each(|seq| gaps.count(seq));
        assert_eq!((gaps.longest_hole(300), gaps.longest_hole(60)), (150, 10));
        assert_eq!(tally.flows[1].received, 1);
        assert_eq!(
            tally.corrupt, 3,
            "another run's packet, an unknown flow, and noise"
        );
        assert_eq!(tally.longest_gap_ns, 3000);
    }
}
