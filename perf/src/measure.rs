//! What the parts of the harness owe each other: engines make packets and count them, beds put a path between two
//! engines, experiments run trials over beds, reports show results.
//!
//! ```text
//!   scenario file ─► experiment ─► Bed::trial(&Offer) ─► Trial ─► result file ─► report
//!                                   │
//!                                   └─ source ═══ path under test (kernel, Ripstop, …) ═══ sink
//! ```

use core::net::{IpAddr, Ipv4Addr};
use core::time::Duration;
use std::collections::BTreeMap;
use std::path::PathBuf;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::address::Mac;
use crate::netns::Netns;

/// A path that is set up and ready, between a source and a sink. Dropping it takes everything down.
pub trait Bed {
    /// What it is, for a person: variant, devices, modes as they came to be.
    fn description(&self) -> String;

    /// Offers packets (or streams, or requests) and returns what became of them.
    ///
    /// # Errors
    /// The path broke, or an engine could not be started. A trial with loss is no error.
    fn trial(&mut self, offer: &Offer) -> anyhow::Result<Trial>;

    /// The nodes under test, for whoever wants to see what they do meanwhile.
    fn watched(&self) -> Vec<Watched> {
        Vec::new()
    }
}

/// A node under test that can be looked at without taking part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watched {
    /// Ripstop's.
    Workers {
        /// The node's name.
        name: String,
        /// Where the workers' statistics are.
        run_dir: PathBuf,
    },
    /// One of the kernel alone.
    Kernel(Netns),
}

/// One end of a wire between two machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireEnd {
    /// The interface.
    pub nic: String,
    /// Its driver; empty where none is told.
    pub driver: String,
    /// Megabits a second, where the driver tells.
    pub speed_mbps: Option<u32>,
    /// Kernel release of the machine.
    pub kernel: String,
}

/// A wire between two machines, for a result file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireFacts {
    /// The end of the machine under test.
    pub near: WireEnd,
    /// The end of the agent's machine.
    pub far: WireEnd,
    /// Where the agent listens.
    pub agent: String,
}

/// What to offer in one trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Offer {
    /// What kind of traffic.
    pub work: Work,
    /// How fast. TCP streams take what they get.
    pub rate: Rate,
    /// How long to send. What is on its way at the end is waited for, and not part of this.
    pub duration: Duration,
    /// Sizes of the inner packets.
    pub size: Size,
    /// Inner flows (source ports), or TCP streams.
    pub flows: u32,
    /// Leases that packets go to, round robin; 1 is one peer's lease.
    pub destinations: u32,
    /// Whether packets are only counted where there would be time to look at each.
    #[serde(default)]
    pub count_only: bool,
}

/// What kind of traffic a trial is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// UDP packets of our own engines, one way.
    Packets,
    /// TCP streams between two pods, one way, by the kernel's stack.
    Tcp,
    /// A UDP request at a time, answered by the other pod's process; the rate is that of requests.
    RoundTrips,
}

/// How fast packets are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rate {
    /// So many packets a second, evenly, in bursts as small as the source can.
    Pps(u64),
    /// As fast as the source can: for the maximum receive rate (MRR).
    Max,
    /// As fast as the path takes them without loss: never more than so many packets between source and sink. For cost per
    /// packet: nothing is spent on packets that are lost. Where the ends are on two machines, each hears of the other some
    /// 0.2 ms late, and so many packets in that time are the limit.
    Window(u32),
}

/// Sizes of inner packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Size {
    /// Bytes from the IP header to the end: 64 to the pod MTU.
    Bytes(u16),
    /// 7 of 64, 4 of 594, 1 of 1450 bytes and again (the "simple IMIX" with the last one cut to a VXLAN pod's MTU).
    Imix,
}

/// What became of an offer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Trial {
    /// Packets that the source handed over (for TCP: segments' worth is unknown, 0; for round trips: requests).
    pub sent: u64,
    /// Packets that the sink took, each counted once (for round trips: answers).
    pub received: u64,
    /// Inner bytes of those (for TCP: bytes of the streams).
    pub received_bytes: u64,
    /// Sent and never seen.
    pub lost: u64,
    /// Came after a later one of their flow.
    pub reordered: u64,
    /// Came again.
    pub duplicated: u64,
    /// Came with wrong bytes.
    pub corrupt: u64,
    /// From the first packet sent to the last received, or to the source's end if that was later.
    pub elapsed: Duration,
    /// Nanoseconds: one way for packets where both ends share a clock, there and back for round trips.
    /// In files pairs of a value and how often it was recorded.
    #[serde(with = "histogram")]
    pub latency: Option<Histogram<u64>>,
    /// All CPUs of the machine during the trial, from /proc/stat.
    pub cpus: CpuTimes,
    /// CPU time of the source's own threads, and of the sink's.
    pub source_cpu: Duration,
    /// See `source_cpu`.
    pub sink_cpu: Duration,
    /// Cycles and instructions of the whole machine, where the processor's counters can be had.
    pub counters: Option<PerfCounters>,
    /// What Ripstop's workers counted, where there are any.
    pub workers: Option<WorkerCost>,
    /// Packets that went nowhere, by who says so and why: "dataplane.too_big", "n1.eth0.tx_dropped", …
    pub drops: BTreeMap<String, u64>,
    /// What the result must be read with.
    pub limits: Vec<Limit>,
}

impl Trial {
    /// What all CPUs were busy for, without what the hypervisor took.
    #[must_use]
    pub fn busy_seconds(&self) -> f64 {
        let cpus = &self.cpus;
        (cpus.user + cpus.system + cpus.irq + cpus.softirq).as_secs_f64()
    }

    /// What all CPUs had to give.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        self.busy_seconds() + (self.cpus.idle + self.cpus.steal).as_secs_f64()
    }

    /// The nanoseconds that this share of the packets does not exceed. Nothing where none was timed.
    #[must_use]
    pub fn latency_at(&self, quantile: f64) -> Option<u64> {
        let latency = self.latency.as_ref().filter(|latency| !latency.is_empty());
        latency.map(|latency| latency.value_at_quantile(quantile))
    }
}

/// CPU time of the whole machine by kind, all CPUs added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuTimes {
    /// User, nice included.
    pub user: Duration,
    /// Kernel on behalf of processes.
    pub system: Duration,
    /// Hardware interrupts.
    pub irq: Duration,
    /// Soft interrupts.
    pub softirq: Duration,
    /// Taken by the hypervisor for others.
    pub steal: Duration,
    /// Idle, waiting for I/O included.
    pub idle: Duration,
}

/// Hardware counters of all CPUs during a trial.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PerfCounters {
    /// Core cycles.
    pub cycles: u64,
    /// Instructions retired.
    pub instructions: u64,
}

/// What workers spent, from their statistics region, all workers of the node under test added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerCost {
    /// Packets from the NIC and from the host.
    pub packets: u64,
    /// Turns that had a packet.
    pub busy_turns: u64,
    /// Time-stamp-counter cycles in those turns.
    pub busy_cycles: u64,
    /// The same in turns that had none.
    pub idle_cycles: u64,
}

/// Why a figure says less about the path than it seems to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The source could not offer what was asked, or was always busy and nothing was lost: the path may be faster.
    Source(String),
    /// The sink itself lost packets or was always busy: the path may be faster.
    Sink(String),
    /// Others took CPU time: steal, or load that is not ours.
    Neighbours(String),
}

/// What lies between source and sink.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Variant {
    /// Which path.
    pub path: Path,
    /// Keys for each file of the data plane's configuration directory, over the bed's own (`hostDoor`, `polling`, …).
    #[serde(default)]
    pub dataplane: Map<String, Value>,
    /// Where the kernel's softirqs run, the source's, the sink's and the workers' CPUs; by default the bed decides.
    #[serde(default)]
    pub placement: Option<String>,
}

/// The paths that can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// Flannel's path: the kernel's tunnel device, neighbours and routes, no Ripstop process.
    Kernel,
    /// Ripstop, both processes.
    Ripstop,
    /// The kernel forwards without a tunnel: the floor.
    Routing,
    /// Source and sink on the two ends of one veth pair: what the engines themselves cost and reach.
    Wire,
    /// DPDK's testpmd on two AF_XDP ports.
    TestpmdAfxdp,
    /// DPDK's testpmd on null ports: what its framework costs by itself.
    TestpmdNull,
}

/// Which set-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Topology {
    /// One node under test. The source is a pod (or feeds the tunnel's own device), the sink is at the other end of the
    /// node's NIC; or the other way round.
    Gateway,
    /// Two nodes with a pod each, a switch between: what pods see.
    Pods,
}

/// Which way packets go through a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From pods into the tunnel.
    Encap,
    /// Out of the tunnel to pods.
    Decap,
}

/// Where packets enter (encap) or end (decap) on the side of the pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodSide {
    /// In a pod: through its veth, the bridge and the kernel's routing, as users' packets do.
    #[default]
    Pod,
    /// At the tunnel's own device (`rip0`, `flannel.1`): the gateway by itself.
    Door,
}

/// What a bed is to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BedPlan {
    /// Which set-up.
    pub topology: Topology,
    /// Which way, in a gateway.
    pub direction: Direction,
    /// See [`PodSide`].
    #[serde(default)]
    pub pod_side: PodSide,
    /// `vxlan`, `ipip`, `udp`, `host-gw`.
    pub backend: String,
    /// Leases in the table.
    pub leases: u32,
    /// Which engine sends.
    #[serde(default)]
    pub source: SourceKind,
    /// MTU of the underlay.
    pub mtu: u16,
    /// Whether the underlay passes the kernel's 64 KB packets unsegmented, as veth does and no wire does.
    #[serde(default)]
    pub underlay_offloads: bool,
}

/// The engines that send packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// The fastest that works on the interface.
    #[default]
    Auto,
    /// Our AF_XDP generator.
    AfXdp,
    /// XDP live frames (`BPF_PROG_RUN`): the fastest on veth.
    LiveFrames,
    /// The kernel's pktgen, where the module exists.
    Pktgen,
}

/// What a source sends: one template, and what differs from packet to packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stream {
    /// Ethernet destination of each frame.
    pub to_mac: Mac,
    /// Ethernet source of each frame.
    pub from_mac: Mac,
    /// Inner source address.
    pub from: IpAddr,
    /// Inner destination addresses, taken in turn.
    pub to: Vec<IpAddr>,
    /// Inner UDP source ports are `first_port` + flow; the destination port is the sink's mark.
    pub first_port: u16,
    /// Number of flows. A flow is one source port; each has sequence numbers of its own.
    pub flows: u32,
    /// Sizes of the inner packets.
    pub size: Size,
    /// The tunnel that the frames are already in, for decapsulation.
    pub tunnel: Option<Tunnel>,
}

/// An outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tunnel {
    /// VXLAN over IPv4.
    Vxlan {
        /// Outer source.
        from: Ipv4Addr,
        /// Outer destination.
        to: Ipv4Addr,
        /// Network identifier.
        vni: u32,
        /// UDP destination port.
        port: u16,
        /// Inner Ethernet destination.
        inner_to_mac: Mac,
        /// Inner Ethernet source.
        inner_from_mac: Mac,
    },
    /// IP in IP.
    Ipip {
        /// Outer source.
        from: Ipv4Addr,
        /// Outer destination.
        to: Ipv4Addr,
    },
    /// IP in UDP, flannel's `udp` backend.
    Udp {
        /// Outer source.
        from: Ipv4Addr,
        /// Outer destination.
        to: Ipv4Addr,
        /// UDP port.
        port: u16,
    },
}

/// Times in nanoseconds, and how they are kept: as pairs of a value and how often it was recorded.
pub(crate) mod histogram {
    use hdrhistogram::Histogram;
    use hdrhistogram::errors::CreationError;
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// The longest time that it has: 34 s.
    pub(crate) const LONGEST_NS: u64 = 34_000_000_000;

    /// An empty one, of three digits.
    pub(crate) fn new() -> Result<Histogram<u64>, CreationError> {
        Histogram::new_with_bounds(1, LONGEST_NS, 3)
    }

    /// In order.
    pub(crate) fn pairs(histogram: &Histogram<u64>) -> impl Iterator<Item = (u64, u64)> {
        let values = histogram.iter_recorded();
        values.map(|value| (value.value_iterated_to(), value.count_at_value()))
    }

    pub(crate) fn serialize<S: Serializer>(
        histogram: &Option<Histogram<u64>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let pairs = histogram.as_ref().map(pairs);
        pairs.map(Vec::from_iter).serialize(serializer)
    }

    pub(crate) fn deserialize<'a, D: Deserializer<'a>>(
        deserializer: D,
    ) -> Result<Option<Histogram<u64>>, D::Error> {
        let Some(pairs) = Option::<Vec<(u64, u64)>>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let mut histogram = new().map_err(D::Error::custom)?;
        for (value, count) in pairs {
            histogram.record_n(value, count).map_err(D::Error::custom)?;
        }
        Ok(Some(histogram))
    }
}
