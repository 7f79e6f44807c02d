//! Engines: what makes test packets, and what counts them. They lie at the two ends of a path under test.
//!
//! ```text
//!   Source ── interface ═══ path under test ═══ interface ── Sink
//!     │  stays at most n packets ahead of ◄──── Progress ──────┘     (Rate::Window)
//! ```
//!
//! | source | how |
//! |---|---|
//! | AF_XDP | frames in a UMEM of the `af-xdp` crate; works on every interface, zero-copy where the driver can |
//! | live frames | a BPF program that the kernel runs on frames of its own (`BPF_PROG_RUN`), which writes each and redirects it: no skb, the fastest on veth |
//! | pktgen | the kernel's module, where there is one |
//!
//! | sink | what it knows |
//! |---|---|
//! | [`Detail::Count`] | packets and bytes: a BPF program counts and drops |
//! | [`Detail::Check`] | per flow what was lost, came late, twice or wrong, and how long each was on its way |
//!
//! A sink takes test packets (`packet.rs`) and nothing else; ARP and the rest go on to the kernel. A source and a sink
//! say what their figures are worth: [`Limit`].

pub mod agent;
mod bpf;
pub mod counters;
pub mod cpu;
mod kernel;
mod order;
mod pace;
mod packet;
mod sink;
mod source;

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use self::kernel::Words;
use crate::address::Mac;
use crate::lab::wait_until;
use crate::measure::{Limit, Rate, SourceKind, Stream, Trial, WireEnd};
use crate::netns::Netns;

pub(crate) use cpu::Window;
pub use cpu::cpu_times;
pub use packet::{PAYLOAD_MIN, TEST_PORT};

/// How long a NIC may take to agree with its other end on a speed.
const CARRIER: Duration = Duration::from_secs(20);

/// Where an engine runs.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// The network namespace.
    pub netns: &'a Netns,
    /// An interface there.
    pub interface: String,
    /// The CPU that the engine's thread shall keep to; by default the scheduler's choice.
    pub cpu: Option<usize>,
}

/// What makes test packets. Dropping it ends what it does, and leaves nothing behind.
pub trait Source: Send {
    /// Begins to send, each flow from sequence number 0 on. Returns at once.
    ///
    /// With [`Rate::Window`], `feedback` is the sink's [`Sink::progress`]; other rates need none.
    ///
    /// # Errors
    /// It is sending already, the rate needs feedback that is not there, or the engine cannot be started.
    fn start(
        &mut self,
        rate: Rate,
        duration: Duration,
        feedback: Option<Arc<Progress>>,
    ) -> Result<()>;

    /// Whether it is still sending. One that has been started and is not is waiting for [`Source::finish`].
    fn is_sending(&self) -> bool;

    /// Waits until the duration is over and all is handed to the interface.
    ///
    /// # Errors
    /// Nothing was started, or the engine broke.
    fn finish(&mut self) -> Result<SourceReport>;

    /// What it is, for a person: engine, interface, modes as they came to be.
    fn describe(&self) -> String;
}

/// What takes test packets. It does so from its making on. Dropping it leaves nothing behind.
pub trait Sink: Send {
    /// How many packets have arrived, while they do.
    fn progress(&self) -> Arc<Progress>;

    /// Forgets everything that has arrived. Call it before each start of a source.
    ///
    /// # Errors
    /// The engine broke.
    fn reset(&mut self) -> Result<()>;

    /// Waits for what is still on its way, until all that was sent has arrived or nothing more comes, and reports. What
    /// was sent is the source's [`SourceReport::sent_by_flow`].
    ///
    /// # Errors
    /// The engine broke.
    fn finish(&mut self, sent_by_flow: &[u64]) -> Result<SinkReport>;

    /// What it is, for a person: engine, interface, modes as they came to be.
    fn describe(&self) -> String;
}

/// How much a sink looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Detail {
    /// Number of packets and bytes: the cheapest.
    Count,
    /// Each packet: sequence per flow, every byte, time on the way.
    Check,
}

/// Where a sink takes packets away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// [`Hook::Xdp`] where the interface has XDP of its own and no other program there, else [`Hook::Ingress`].
    #[default]
    Auto,
    /// In the driver. The cheapest for frames that come without an skb; on veth it costs a copy of those that come with
    /// one, and turns the peer's TSO off.
    Xdp,
    /// Where the kernel's stack begins (`tcx` or `clsact`): behind the making of an skb, on any device, `rip0`,
    /// `flannel.1` and other tunnels included.
    Ingress,
}

/// Packets that a sink has taken, each arrival counted. Only grows.
#[derive(Debug, Default)]
pub struct Progress {
    own: AtomicU64,
    /// The counters of a BPF program, which counts by itself.
    slots: Option<Words>,
    /// The sink is on another machine: this is what it last told.
    is_far: bool,
}

impl Progress {
    /// Packets so far.
    #[must_use]
    pub fn packets(&self) -> u64 {
        let slots = self
            .slots
            .iter()
            .flat_map(|words| words.iter().step_by(bpf::SLOT_WORDS));
        let counted: u64 = slots.map(|word| word.load(Ordering::Relaxed)).sum();
        counted + self.own.load(Ordering::Relaxed)
    }

    fn far() -> Self {
        Self {
            is_far: true,
            ..Self::default()
        }
    }

    /// Takes down what a far sink has told.
    fn set(&self, packets: u64) {
        self.own.store(packets, Ordering::Relaxed);
    }

    fn add(&self, packets: u64) {
        self.own.fetch_add(packets, Ordering::Relaxed);
    }
}

/// What a source did between `start` and `finish`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceReport {
    /// Packets that the interface took.
    pub sent: u64,
    /// The same by flow. A flow is a pair of source port and destination, numbered as [`Stream`] takes them in turn:
    /// there are as many as the larger of `flows` and `to.len()`. One number for all from pktgen, which has but one
    /// sequence.
    pub sent_by_flow: Vec<u64>,
    /// Inner bytes of those packets.
    pub bytes: u64,
    /// When the first was sent: CLOCK_MONOTONIC in nanoseconds.
    pub first_ns: u64,
    /// From the first to the last.
    pub elapsed: Duration,
    /// CPU time of the source's thread: with the interface's work, and on veth the peer's, as far as the kernel
    /// does that in the sender's name.
    pub cpu: Duration,
    /// What the figures must be read with.
    pub limits: Vec<Limit>,
}

/// What a sink saw between `reset` and `finish`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SinkReport {
    /// Packets that were as they should be, each once. From a sink that only counts: all that came.
    pub received: u64,
    /// Inner bytes of those.
    pub received_bytes: u64,
    /// Sent, and neither received nor corrupt.
    pub lost: u64,
    /// Came after a later one of their flow.
    pub reordered: u64,
    /// Came again.
    pub duplicated: u64,
    /// Came with wrong bytes, so that it cannot be said which they were.
    pub corrupt: u64,
    /// When the first came: CLOCK_MONOTONIC in nanoseconds.
    pub first_ns: Option<u64>,
    /// When the last came.
    pub last_ns: Option<u64>,
    /// Nanoseconds from a packet's making to its arrival at the sink's hook; where source and sink share a clock, and
    /// the sink checks.
    #[serde(with = "crate::measure::histogram")]
    pub latency: Option<Histogram<u64>>,
    /// CPU time of the sink's thread; a sink that only counts has none, and works in the interface's receive routine.
    pub cpu: Duration,
    /// What the figures must be read with.
    pub limits: Vec<Limit>,
}

/// Makes a source of a stream's packets.
///
/// [`SourceKind::Auto`] tries whether live frames go through a veth pair, for which the path behind it must be up, and takes
/// AF_XDP where they do not, and on every other interface.
///
/// # Errors
/// The interface is not there, the kind does not work on it (the message says what is missing), the stream has sizes that
/// no test packet can have, or there is no right to do this.
pub fn source(place: &Place<'_>, stream: &Stream, kind: SourceKind) -> Result<Box<dyn Source>> {
    source::make(place, stream, kind)
        .with_context(|| format!("source on {} of {}", place.interface, place.netns.name()))
}

/// Makes a sink for a stream's packets as they arrive: `stream.tunnel` says whether they are in a tunnel there.
///
/// # Errors
/// As [`source`].
pub fn sink(place: &Place<'_>, stream: &Stream, detail: Detail) -> Result<Box<dyn Sink>> {
    sink_with(place, stream, detail, &SinkOptions::default())
}

/// As [`sink`], with more of a say.
///
/// # Errors
/// As [`source`].
pub fn sink_with(
    place: &Place<'_>,
    stream: &Stream,
    detail: Detail,
    options: &SinkOptions,
) -> Result<Box<dyn Sink>> {
    sink::make(place, stream, detail, options)
        .with_context(|| format!("sink on {} of {}", place.interface, place.netns.name()))
}

/// What a sink may be told besides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SinkOptions {
    /// Where to take packets away.
    pub hook: Hook,
    /// Packets that may wait for a sink that checks; a power of two.
    pub ring_entries: u32,
    /// A rest after each burst of a sink that checks. Only to show what a sink that is too slow reports.
    pub rest: Duration,
    /// The source is on a machine with another clock: its time stamps say nothing here, and there is no latency.
    pub foreign_clock: bool,
}

impl Default for SinkOptions {
    fn default() -> Self {
        Self {
            hook: Hook::Auto,
            ring_entries: 4096,
            rest: Duration::ZERO,
            foreign_clock: false,
        }
    }
}

/// What an interface of a namespace is, and its Ethernet address.
///
/// # Errors
/// There is none of that name, or it has no Ethernet address.
pub(crate) fn wire_end(netns: &Netns, interface: &str) -> Result<(Mac, WireEnd)> {
    let properties = netns
        .run(|| kernel::properties(interface))?
        .with_context(|| format!("interface {interface}"))?;
    ensure!(
        properties.ethernet,
        "{interface} has no Ethernet headers: name a NIC"
    );
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let end = WireEnd {
        nic: interface.to_owned(),
        driver: properties.driver,
        speed_mbps: properties.speed_mbps,
        kernel: kernel.trim().to_owned(),
    };
    Ok((properties.mac, end))
}

/// Waits until an interface has a carrier. Many a NIC loses it for a second or more when it gets an XDP program or a socket,
/// and what is sent meanwhile is lost.
///
/// # Errors
/// It has none for long, or is not there.
pub(crate) fn await_carrier(netns: &Netns, interface: &str) -> Result<()> {
    let what = format!("{interface} has a carrier: is the other end up?");
    let running = || {
        let properties = netns.run(|| kernel::properties(interface));
        matches!(properties, Ok(Ok(properties)) if properties.running)
    };
    wait_until(&what, CARRIER, running)
}

/// Runs one trial, and accounts for it: all but what a path alone can know.
///
/// # Errors
/// An engine broke.
pub fn trial(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    rate: Rate,
    duration: Duration,
) -> Result<Trial> {
    sink.reset()?;
    let window = Window::open()?;
    // A far sink tells its progress only if it is asked to.
    let feedback = matches!(rate, Rate::Window(_)).then(|| sink.progress());
    source.start(rate, duration, feedback)?;
    let sent = source.finish()?;
    let (cpus, counters) = window.close()?;
    let came = sink.finish(&sent.sent_by_flow)?;
    let last = came.last_ns.unwrap_or(0);
    let mut limits = [sent.limits, came.limits].concat();
    if rate == Rate::Max && came.lost == 0 && sent.sent > 0 {
        limits.push(Limit::Source(
            "it was always busy and nothing was lost: the path may be faster".into(),
        ));
    }
    Ok(Trial {
        sent: sent.sent,
        received: came.received,
        received_bytes: came.received_bytes,
        lost: came.lost,
        reordered: came.reordered,
        duplicated: came.duplicated,
        corrupt: came.corrupt,
        // To the source's end at least: of a path that breaks half way, what came until then is no rate.
        elapsed: Duration::from_nanos(last.saturating_sub(sent.first_ns)).max(sent.elapsed),
        latency: came.latency,
        cpus,
        source_cpu: sent.cpu,
        sink_cpu: came.cpu,
        counters,
        limits,
        ..Trial::default()
    })
}
