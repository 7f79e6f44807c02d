//! Configuration of the workers: one JSON file per NIC queue in one directory, or a template for all queues of a NIC.
//!
//! Three steps, each a plain function. [`load_dir`] turns files into checked
//! values and knows nothing of the machine. [`HostFacts::read`] asks the
//! machine. [`check_host`] holds one against the other. Each collects every
//! error that it can find, so that all are mended in one go; nothing has been
//! opened, allocated or attached by then. What becomes of templates is in [`crate::auto`].
//!
//! The raw types mirror the file. The checked types cannot hold a ring size
//! that is not a power of two, or a UMEM that is too small for its rings.

use core::fmt;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::nic::{Nic, NicError};
use crate::tun::Offloads;
use crate::veth;

/// One worker: one NIC queue, one core, one UMEM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerConfig {
    /// File that this came from.
    pub file: PathBuf,
    /// NIC's name.
    pub nic: String,
    /// Receive queue of the NIC.
    pub queue: u32,
    /// CPU to pin the worker to.
    pub cpu: u32,
    /// How frames get from the NIC into the UMEM.
    pub mode: Mode,
    /// Sizes of the four rings.
    pub rings: Rings,
    /// The frames.
    pub umem: Umem,
    /// Frames handled in one go.
    pub burst: Burst,
    /// What the worker does when there is nothing to do.
    pub polling: Polling,
    /// When an adaptive one lets packets gather, if it is to.
    pub coalesce: Option<Coalesce>,
    /// The worker's way into the host.
    pub host_door: HostDoor,
    /// How it sends on the NIC.
    pub transmit: Transmit,
    /// How it sends to a host door that has a socket.
    pub door_transmit: Transmit,
    /// Whether super-packets pass there, if the file says so.
    pub host_offload: Option<Offloads>,
    /// Poll the NIC from the worker's own system calls, if set.
    pub busy_poll: Option<BusyPoll>,
    /// How long the NIC's interrupts are put off, if that is to be changed.
    pub napi_deferral: Option<NapiDeferral>,
    /// Which CPUs get the queue's interrupt.
    pub interrupt: Interrupt,
}

/// A file that stands for several workers: those of a NIC's queues.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Template {
    /// File that this came from.
    pub file: PathBuf,
    /// The NIC's name; `None` is `auto`: the NIC that the tunnel packets leave by.
    pub nic: Option<String>,
    /// Receive queues; `None` is `auto`: all.
    pub queues: Option<BTreeSet<u32>>,
    /// CPUs to choose from; `None` is `auto`: all that the process may run on.
    pub cpus: Option<BTreeSet<u32>>,
    /// The rest of the file, with NIC, queue and CPU still to be filled in.
    pub worker: WorkerConfig,
    /// The keys of that rest, as they are written.
    pub keys: serde_json::Map<String, serde_json::Value>,
}

/// What a directory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Configured {
    /// One per file for a queue.
    pub workers: Vec<WorkerConfig>,
    /// One per file for the queues of a NIC.
    pub templates: Vec<Template>,
}

/// How frames get from the NIC into the UMEM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The best that the driver can do: zero-copy, else copy, else generic.
    #[default]
    Auto,
    /// The NIC writes into the UMEM; an error if the driver cannot.
    ZeroCopy,
    /// Native XDP, one copy.
    Copy,
    /// XDP behind the driver: works everywhere, slowest.
    Generic,
}

/// When an adaptive worker lets packets gather instead of looking for more at once: what `ethtool -C` calls coalescing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coalesce {
    /// The pause (`rx-usecs`); waking up comes on top.
    pub pause: Duration,
    /// A turn that had fewer packets is followed by a pause (`rx-frames`).
    pub packets: u32,
}

/// What a worker does when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Polling {
    /// Spin: lowest latency, takes the whole core always.
    Busy,
    /// Spin for a while, then sleep until a packet comes.
    #[default]
    Adaptive,
}

/// A worker's way into the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostDoor {
    /// A queue of the TUN device `rip0`.
    #[default]
    Tun,
    /// An AF_XDP socket on the far end of the veth pair `rip0`.
    Veth,
}

/// How packets are sent on a device that a worker has a socket on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transmit {
    /// By the socket.
    #[default]
    AfXdp,
    /// Large bursts by XDP live frames, which veth takes for less.
    Inject,
    /// Super-packets of the host door whole, for the kernel or the NIC to cut.
    TunnelGso,
}

impl Transmit {
    /// The name in files.
    const fn name(self) -> &'static str {
        match self {
            Self::AfXdp => "af-xdp",
            Self::Inject => "inject",
            Self::TunnelGso => "tunnel-gso",
        }
    }
}

impl HostDoor {
    /// The name in files.
    const fn name(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Veth => "veth",
        }
    }
}

/// Number of entries of a ring: a power of two from 64 to 32768.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

impl RingSize {
    /// Smallest ring.
    pub const MIN: u32 = 64;
    /// Largest ring.
    pub const MAX: u32 = 32768;

    /// Checks `entries`.
    pub const fn new(entries: u32) -> Option<Self> {
        if entries.is_power_of_two() && entries >= Self::MIN && entries <= Self::MAX {
            Some(Self(entries))
        } else {
            None
        }
    }

    /// Number of entries.
    pub const fn entries(self) -> u32 {
        self.0
    }
}

/// Sizes of a socket's four rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Received frames.
    pub rx: RingSize,
    /// Frames to transmit.
    pub tx: RingSize,
    /// Empty frames for the NIC to fill.
    pub fill: RingSize,
    /// Transmitted frames.
    pub completion: RingSize,
}

impl Rings {
    fn entries(&self) -> u32 {
        [self.rx, self.tx, self.fill, self.completion]
            .map(RingSize::entries)
            .iter()
            .sum()
    }
}

/// Frames handled in one go: 1 to 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst(u32);

impl Burst {
    /// Largest burst.
    pub const MAX: u32 = 256;

    /// Checks `frames`.
    pub const fn new(frames: u32) -> Option<Self> {
        if frames >= 1 && frames <= Self::MAX {
            Some(Self(frames))
        } else {
            None
        }
    }

    /// Number of frames.
    pub const fn frames(self) -> u32 {
        self.0
    }
}

/// Size of a UMEM frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameSize {
    /// 2048 bytes.
    Bytes2048,
    /// 4096 bytes.
    Bytes4096,
}

impl FrameSize {
    /// What the kernel keeps free ahead of each packet (XDP_PACKET_HEADROOM).
    pub const HEADROOM: u32 = 256;

    const fn new(bytes: u32) -> Option<Self> {
        match bytes {
            2048 => Some(Self::Bytes2048),
            4096 => Some(Self::Bytes4096),
            _ => None,
        }
    }

    /// The whole frame.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bytes2048 => 2048,
            Self::Bytes4096 => 4096,
        }
    }

    /// Longest packet, with its Ethernet header, that is received into it
    /// when no headroom is asked for beyond the kernel's own.
    pub const fn packet_bytes_max(self) -> u32 {
        self.bytes() - Self::HEADROOM
    }
}

/// The memory that frames live in, large enough for its worker's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Umem {
    frames: u32,
    frame_size: FrameSize,
    huge_pages: bool,
}

impl Umem {
    /// Largest number of frames: 4 GiB of the larger ones.
    pub const FRAMES_MAX: u32 = 1 << 20;
    const HUGE_PAGE_BYTES: u64 = 2 << 20;

    /// Fewest frames with which no ring can starve another: all four rings
    /// full, those of the host door too if it has any (its receive and fill
    /// ring as large as `rx`, the others as `tx`), and a burst in hand from
    /// either side.
    pub fn frames_min(rings: &Rings, burst: Burst, door: HostDoor) -> u32 {
        let of_door = match door {
            HostDoor::Tun => 0,
            HostDoor::Veth => 2 * (rings.rx.entries() + rings.tx.entries()),
        };
        rings.entries() + of_door + 2 * burst.frames()
    }

    /// Number of frames.
    pub const fn frames(&self) -> u32 {
        self.frames
    }

    /// Size of a frame.
    pub const fn frame_size(&self) -> FrameSize {
        self.frame_size
    }

    /// Whether it lies on 2 MiB pages.
    pub const fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Memory that it takes: whole pages.
    pub const fn bytes(&self) -> u64 {
        let bytes = self.frames as u64 * self.frame_size.bytes() as u64;
        let page = if self.huge_pages {
            Self::HUGE_PAGE_BYTES
        } else {
            4096
        };
        bytes.next_multiple_of(page)
    }
}

/// Polling the NIC from the worker's own system calls (SO_PREFER_BUSY_POLL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyPoll {
    /// How long one call may poll (SO_BUSY_POLL).
    pub microseconds: u32,
    /// Packets in one call (SO_BUSY_POLL_BUDGET).
    pub budget: u16,
}

/// How long the interrupts of a whole NIC are put off while it is polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NapiDeferral {
    /// How many interrupts in a row (`napi_defer_hard_irqs`).
    pub hard_irqs: u32,
    /// How long one of them (`gro_flush_timeout`, there in nanoseconds).
    pub timeout_microseconds: u32,
}

/// Which CPUs get a queue's interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interrupt {
    /// Those that get it already.
    #[default]
    Keep,
    /// What the polling wants: the worker's CPU if it sleeps, the others if it never does.
    Auto,
    /// The worker's CPU: what the kernel does for the queue is done beside the worker.
    WorkerCpu,
    /// All CPUs but those of workers that never sleep.
    OtherCpus,
}

/// Something wrong with the configuration, or with the host for it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The directory cannot be listed.
    #[error("{}: cannot list the configuration directory: {source}: name the one that holds a file per NIC queue with --config-dir", .path.display())]
    Directory {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no file in the directory.
    #[error("{}: no *.json file: write one per NIC queue, such as eth0-q0.json with {{\"nic\": \"eth0\", \"queue\": 0, \"cpu\": 1}}", .path.display())]
    Empty {
        /// Directory.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{}: cannot read: {source}", .file.display())]
    Read {
        /// File.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not JSON.
    #[error("{}: not JSON: {source}: correct it there (half-written? write to another name, then rename)", .file.display())]
    Syntax {
        /// File.
        file: PathBuf,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// A key is unknown, missing, double, or of the wrong type.
    #[error("{}: {source}: correct it there (configs/dataplane/README.md lists the keys)", .file.display())]
    Key {
        /// File.
        file: PathBuf,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// A file is about one queue and about several.
    #[error("{}: {one} and {several} do not go together: a file for one queue has queue and cpu, a template for several has queues and, if wanted, cpus", .file.display())]
    OneAndSeveral {
        /// File.
        file: PathBuf,
        /// Key of a file for one queue.
        one: &'static str,
        /// Key of a template.
        several: &'static str,
    },
    /// A template's list is no list.
    #[error("{}: {key}: {value:?} is neither \"auto\" nor a list such as \"0-3,8\": correct it there", .file.display())]
    List {
        /// File.
        file: PathBuf,
        /// Key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// It cannot be told which NIC a template means.
    #[error("{}: nic: \"auto\" finds none: {problem}: name the NIC there, or the interface with --iface", .file.display())]
    NoUnderlay {
        /// File.
        file: PathBuf,
        /// What was sought in vain.
        problem: String,
    },
    /// A template leaves no CPU to run on.
    #[error("{}: cpus: this process may run on none of {wanted}, only on {allowed}: use some of these, or widen its cpuset", .file.display())]
    NoCpu {
        /// File.
        file: PathBuf,
        /// CPUs to choose from, as ranges.
        wanted: String,
        /// CPUs allowed, as ranges.
        allowed: String,
    },
    /// Two templates are about one NIC.
    #[error("{} and {}: both are templates for NIC {nic}: remove one, or name another NIC there", .first.display(), .second.display())]
    DuplicateTemplate {
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
        /// NIC of both.
        nic: String,
    },
    /// Not the name of a NIC.
    #[error("{}: nic: {nic:?} cannot be the name of a NIC: 1 to 15 bytes without space or slash", .file.display())]
    NicName {
        /// File.
        file: PathBuf,
        /// The value.
        nic: String,
    },
    /// A ring size is not a power of two or out of range.
    #[error("{}: rings.{ring}: {entries} is not a power of two from 64 to 32768: use {nearest}", .file.display())]
    RingSize {
        /// File.
        file: PathBuf,
        /// Key under `rings`.
        ring: &'static str,
        /// The value.
        entries: u32,
        /// The next allowed value.
        nearest: u32,
    },
    /// The burst is out of range.
    #[error("{}: burst: {burst} is not from 1 to 256: 64 suits most", .file.display())]
    Burst {
        /// File.
        file: PathBuf,
        /// The value.
        burst: u32,
    },
    /// The frame size is not one that the kernel takes.
    #[error("{}: umem.frameSize: {bytes} is neither 2048 nor 4096: use 4096", .file.display())]
    FrameSize {
        /// File.
        file: PathBuf,
        /// The value.
        bytes: u32,
    },
    /// The UMEM cannot fill the rings.
    #[error("{}: umem.frames: {frames} is fewer than the {min} that the rings and two bursts hold: use {min} or more, or leave the key out", .file.display())]
    UmemTooSmall {
        /// File.
        file: PathBuf,
        /// The value.
        frames: u32,
        /// The fewest that are enough.
        min: u32,
    },
    /// The UMEM is absurdly large.
    #[error("{}: umem.frames: {frames} is more than {}: use fewer, or leave the key out", .file.display(), Umem::FRAMES_MAX)]
    UmemTooLarge {
        /// File.
        file: PathBuf,
        /// The value.
        frames: u32,
    },
    /// A number of one of the optional parts is out of range.
    #[error("{}: {part}.{key}: {value} is not from 1 to {max}: use {typical}, or leave {part} out", .file.display())]
    Range {
        /// File.
        file: PathBuf,
        /// The part.
        part: &'static str,
        /// Key under it.
        key: &'static str,
        /// The value.
        value: u32,
        /// The largest that the kernel takes, or that makes sense.
        max: u32,
        /// A usual value.
        typical: u32,
    },
    /// A worker that never sleeps is to pause.
    #[error("{}: coalesce is for workers that sleep: set polling to \"adaptive\", or leave coalesce out", .file.display())]
    CoalesceBusy {
        /// File.
        file: PathBuf,
    },
    /// Two files want different things of one NIC.
    #[error("{} and {}: napiDeferral differs, and NIC {nic} has only one: write the same into both, or into one of them", .first.display(), .second.display())]
    DifferentDeferral {
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
        /// NIC of both.
        nic: String,
    },
    /// Two files want different things of the host door, of which there is one.
    #[error("{} and {}: hostDoor.offload differs, and there is only one host door for all queues: write the same into both, or into one of them", .first.display(), .second.display())]
    DifferentOffload {
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
    /// Two files want different host doors.
    #[error("{} and {}: hostDoor.kind is \"{}\" in one and \"{}\" in the other, and there is only one rip0: write the same into all files", .first.display(), .second.display(), .kinds[0], .kinds[1])]
    DifferentDoors {
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
        /// What they want.
        kinds: [&'static str; 2],
    },
    /// The NIC's packets do not fit through the host door.
    #[error("{}: hostDoor.kind: \"veth\" takes packets of up to {max} bytes{}, and NIC {nic} has MTU {mtu}: use \"tun\", or lower the NIC's MTU", .file.display(), if *.short_frames { " with umem.frameSize 2048" } else { "" })]
    DoorMtu {
        /// File.
        file: PathBuf,
        /// NIC.
        nic: String,
        /// Its MTU.
        mtu: u32,
        /// Largest that fits.
        max: u32,
        /// Whether larger frames would take more.
        short_frames: bool,
    },
    /// A way to transmit is not possible.
    #[error("{}: {key}: \"{kind}\" does not work here: {problem}", .file.display())]
    Transmit {
        /// File.
        file: PathBuf,
        /// Key.
        key: &'static str,
        /// Its value.
        kind: &'static str,
        /// Why, and what to do.
        problem: &'static str,
    },
    /// Two files are about one queue.
    #[error("{} and {}: both are for NIC {nic} queue {queue}: remove one or change its queue", .first.display(), .second.display())]
    DuplicateQueue {
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
        /// NIC of both.
        nic: String,
        /// Queue of both.
        queue: u32,
    },
    /// There is no such NIC.
    #[error("{}: nic: {nic} does not exist in this network namespace: use one of {}", .file.display(), .existing.join(", "))]
    UnknownNic {
        /// File.
        file: PathBuf,
        /// The value.
        nic: String,
        /// NICs that exist.
        existing: Vec<String>,
    },
    /// The NIC is down.
    #[error("{}: nic: {nic} is down: ip link set dev {nic} up", .file.display())]
    NicDown {
        /// File.
        file: PathBuf,
        /// NIC.
        nic: String,
    },
    /// The NIC has fewer queues.
    #[error("{}: queue: NIC {nic} has {queues} receive queue(s), numbered from 0, and no queue {queue}: correct the number, or raise the count with ethtool -L {nic}", .file.display())]
    QueueBeyondNic {
        /// File.
        file: PathBuf,
        /// NIC.
        nic: String,
        /// The value.
        queue: u32,
        /// Receive queues that the NIC uses.
        queues: u32,
    },
    /// The process may not run on this CPU.
    #[error("{}: cpu: this process may not run on CPU {cpu}, only on {allowed}: use one of these, or widen its cpuset", .file.display())]
    CpuNotAllowed {
        /// File.
        file: PathBuf,
        /// The value.
        cpu: u32,
        /// CPUs allowed, as ranges.
        allowed: String,
    },
    /// This driver corrupts frames of this size.
    #[error("{}: umem.frameSize: with 2048, zero-copy of driver {driver} (NIC {nic}) cuts packets over 1024 bytes in two: use 4096, or mode \"copy\"", .file.display())]
    FrameSizeOfDriver {
        /// File.
        file: PathBuf,
        /// NIC.
        nic: String,
        /// Its driver.
        driver: String,
    },
    /// The kernel will not let the process pin so much memory.
    #[error("the frames of all workers take {need} bytes of locked memory and the limit is {limit}: grant CAP_IPC_LOCK, raise the limit (LimitMEMLOCK={need} in systemd, ulimit -l {} in a shell), or lower umem.frames", need.div_ceil(1024))]
    LockedMemory {
        /// Bytes that all workers take together.
        need: u64,
        /// RLIMIT_MEMLOCK in bytes.
        limit: u64,
    },
    /// Not enough huge pages are free.
    #[error("the workers with hugePages take {need} huge pages of 2 MiB and {free} are free: echo {} > /proc/sys/vm/nr_hugepages adds them, or set hugePages to false", total + need - free)]
    HugePages {
        /// Pages that the workers take together.
        need: u64,
        /// Pages that are free.
        free: u64,
        /// Pages that exist, free or not.
        total: u64,
    },
    /// Not enough huge pages are free on a NIC's NUMA node.
    #[error("the workers of NICs on NUMA node {node} with hugePages take {need} huge pages of 2 MiB and {free} are free there: echo {} > {NODES}/node{node}/hugepages/hugepages-2048kB/nr_hugepages adds them, or set hugePages to false", total + need - free)]
    HugePagesOfNode {
        /// The node.
        node: u32,
        /// Pages that the workers take together.
        need: u64,
        /// Pages that are free.
        free: u64,
        /// Pages that exist, free or not.
        total: u64,
    },
    /// The process may not do what workers do.
    #[error(
        "this process lacks {missing}: run it as root or grant them (setcap, AmbientCapabilities=, securityContext)"
    )]
    Capabilities {
        /// What is missing, and for what.
        missing: String,
    },
}

/// Everything that is wrong, at least one thing.
#[derive(Debug)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The errors, in the order of the files.
    pub fn errors(&self) -> &[ConfigError] {
        &self.0
    }

    /// `value`, unless there were errors.
    pub(crate) fn unless<T>(errors: Vec<ConfigError>, value: T) -> Result<T, Self> {
        if errors.is_empty() {
            Ok(value)
        } else {
            Err(Self(errors))
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, error) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl core::error::Error for ConfigErrors {}

/// Something that works, but perhaps not as meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigWarning {
    /// Several workers share a CPU.
    SharedCpu {
        /// CPU.
        cpu: u32,
        /// How many workers.
        workers: usize,
        /// Whether one of them never sleeps.
        busy: bool,
    },
    /// Some receive queues have no worker.
    UncoveredQueues {
        /// NIC.
        nic: String,
        /// Queues without a worker.
        queues: Vec<u32>,
    },
    /// A worker runs far from its NIC's memory.
    FarCpu {
        /// File.
        file: PathBuf,
        /// CPU.
        cpu: u32,
        /// NIC.
        nic: String,
        /// The NIC's NUMA node.
        node: u32,
        /// CPUs of that node, as ranges.
        near: String,
    },
    /// The NIC's longest packets do not fit a frame.
    LongPackets {
        /// File.
        file: PathBuf,
        /// NIC.
        nic: String,
        /// Its MTU.
        mtu: u32,
        /// Longest Ethernet frame that fits.
        packet_bytes_max: u32,
    },
}

impl fmt::Display for ConfigWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedCpu { cpu, workers, busy } => {
                write!(f, "{workers} workers share CPU {cpu}")?;
                if *busy {
                    f.write_str(
                        ", and at least one never sleeps: set its polling to \"adaptive\"",
                    )?;
                }
                Ok(())
            }
            Self::UncoveredQueues { nic, queues } => write!(
                f,
                "NIC {nic}: queues {queues:?} have no worker; the kernel carries their tunnel packets"
            ),
            Self::FarCpu {
                file,
                cpu,
                nic,
                node,
                near,
            } => write!(
                f,
                "{}: CPU {cpu} is on another NUMA node than NIC {nic}, so that every packet crosses between the two: use a CPU of node {node} ({near})",
                file.display()
            ),
            Self::LongPackets {
                file,
                nic,
                mtu,
                packet_bytes_max,
            } => write!(
                f,
                "{}: NIC {nic} has MTU {mtu}; the kernel carries packets over {packet_bytes_max} bytes, for which umem.frameSize has no room",
                file.display()
            ),
        }
    }
}

/// A list of numbers as text, for people who would write an array or a number.
fn list_text<'de, D: serde::Deserializer<'de>>(text: D) -> Result<Option<String>, D::Error> {
    struct ListText;
    impl serde::de::Visitor<'_> for ListText {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("queues and cpus as text like \"0-3,8\", or \"auto\"")
        }

        fn visit_str<E>(self, text: &str) -> Result<Option<String>, E> {
            Ok(Some(text.to_owned()))
        }

        fn visit_unit<E>(self) -> Result<Option<String>, E> {
            Ok(None)
        }
    }
    text.deserialize_any(ListText)
}

/// The file as it stands.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawWorker {
    nic: String,
    queue: Option<u32>,
    cpu: Option<u32>,
    #[serde(default, deserialize_with = "list_text")]
    queues: Option<String>,
    #[serde(default, deserialize_with = "list_text")]
    cpus: Option<String>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    rings: RawRings,
    #[serde(default)]
    umem: RawUmem,
    #[serde(default)]
    huge_pages: bool,
    #[serde(default = "default_burst")]
    burst: u32,
    #[serde(default)]
    polling: Polling,
    coalesce: Option<RawCoalesce>,
    #[serde(default)]
    host_door: RawHostDoor,
    #[serde(default)]
    transmit: Transmit,
    busy_poll: Option<RawBusyPoll>,
    napi_deferral: Option<RawNapiDeferral>,
    #[serde(default)]
    interrupt: Interrupt,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRings {
    rx: u32,
    tx: u32,
    fill: u32,
    completion: u32,
}

impl Default for RawRings {
    /// Fill is larger by one receive ring: a zero-copy driver takes a whole
    /// ring of frames as soon as the socket is bound.
    fn default() -> Self {
        Self {
            rx: 2048,
            tx: 2048,
            fill: 4096,
            completion: 2048,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawUmem {
    frames: Option<u32>,
    frame_size: u32,
}

impl Default for RawUmem {
    fn default() -> Self {
        Self {
            frames: None,
            frame_size: 4096,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHostDoor {
    #[serde(default)]
    kind: RawHostDoorKind,
    #[serde(default)]
    transmit: Transmit,
    offload: Option<Offloads>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawHostDoorKind {
    #[default]
    Tun,
    Veth,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBusyPoll {
    microseconds: u32,
    budget: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCoalesce {
    microseconds: u32,
    packets: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawNapiDeferral {
    hard_irqs: u32,
    timeout_microseconds: u32,
}

const fn default_burst() -> u32 {
    64
}

/// Reads every `*.json` file of `directory`, in the order of their names.
/// Hidden files are editors' and are left out.
pub fn load_dir(directory: &Path) -> Result<Configured, ConfigErrors> {
    let files = list(directory).map_err(|source| {
        ConfigErrors(vec![ConfigError::Directory {
            path: directory.to_owned(),
            source,
        }])
    })?;
    let mut configured = Configured::default();
    let mut errors = Vec::new();
    if files.is_empty() {
        errors.push(ConfigError::Empty {
            path: directory.to_owned(),
        });
    }
    for file in files {
        let parsed = match fs::read_to_string(&file) {
            Ok(text) => File::parse(&file, &text),
            Err(source) => Err(ConfigErrors(vec![ConfigError::Read { file, source }])),
        };
        match parsed {
            Ok(File::Worker(worker)) => {
                errors.extend(conflicts(&configured.workers, &worker));
                configured.workers.push(worker);
            }
            Ok(File::Template(template)) => configured.templates.push(template),
            Err(found) => errors.extend(found.0),
        }
    }
    ConfigErrors::unless(errors, configured)
}

/// Puts together the workers of several files.
///
/// # Errors
/// Two are about one queue, or want different things of one NIC.
pub fn together(workers: Vec<WorkerConfig>) -> Result<Vec<WorkerConfig>, ConfigErrors> {
    let errors = (0..workers.len())
        .flat_map(|at| conflicts(&workers[..at], &workers[at]))
        .collect();
    ConfigErrors::unless(errors, workers)
}

/// What of `worker` contradicts those before it.
fn conflicts(before: &[WorkerConfig], worker: &WorkerConfig) -> Vec<ConfigError> {
    let mut errors = Vec::new();
    let same = |other: &&WorkerConfig| (&other.nic, other.queue) == (&worker.nic, worker.queue);
    if let Some(first) = before.iter().find(same) {
        errors.push(ConfigError::DuplicateQueue {
            first: first.file.clone(),
            second: worker.file.clone(),
            nic: worker.nic.clone(),
            queue: worker.queue,
        });
    }
    if let Some(first) = before
        .iter()
        .find(|other| other.host_door != worker.host_door)
    {
        errors.push(ConfigError::DifferentDoors {
            first: first.file.clone(),
            second: worker.file.clone(),
            kinds: [first.host_door.name(), worker.host_door.name()],
        });
    }
    let differs = |other: &&WorkerConfig| {
        other.nic == worker.nic
            && other.napi_deferral.is_some()
            && other.napi_deferral != worker.napi_deferral
    };
    if worker.napi_deferral.is_some()
        && let Some(first) = before.iter().find(differs)
    {
        errors.push(ConfigError::DifferentDeferral {
            first: first.file.clone(),
            second: worker.file.clone(),
            nic: worker.nic.clone(),
        });
    }
    let differs = |other: &&WorkerConfig| {
        other.host_offload.is_some() && other.host_offload != worker.host_offload
    };
    if worker.host_offload.is_some()
        && let Some(first) = before.iter().find(differs)
    {
        errors.push(ConfigError::DifferentOffload {
            first: first.file.clone(),
            second: worker.file.clone(),
        });
    }
    errors
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "json")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The text of one file, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum File {
    /// For one queue.
    Worker(WorkerConfig),
    /// For the queues of a NIC.
    Template(Template),
}

/// What a template says where the node is to choose.
const AUTO: &str = "auto";

impl File {
    /// Checks the text of one file; `file` is its name in errors.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let key = |source| ConfigError::Key {
            file: file.to_owned(),
            source,
        };
        let raw: RawWorker = serde_json::from_str(text).map_err(|source| {
            let file = file.to_owned();
            ConfigErrors(vec![if source.is_data() {
                key(source)
            } else {
                ConfigError::Syntax { file, source }
            }])
        })?;
        let one = raw.queue.map(|_| "queue").or(raw.cpu.map(|_| "cpu"));
        let several = raw.queues.as_ref().map(|_| "queues");
        if let (Some(one), Some(several)) = (one, several.or(raw.cpus.as_ref().map(|_| "cpus"))) {
            return Err(ConfigErrors(vec![ConfigError::OneAndSeveral {
                file: file.to_owned(),
                one,
                several,
            }]));
        }
        if several.is_none() {
            let missing = [("queue", raw.queue), ("cpu", raw.cpu)]
                .into_iter()
                .filter(|(_, value)| value.is_none());
            let missing: Vec<ConfigError> = missing
                .map(|(name, _)| key(serde::de::Error::missing_field(name)))
                .collect();
            ConfigErrors::unless(missing, ())?;
            return WorkerConfig::check(file, raw).map(Self::Worker);
        }
        Template::check(file, text, raw).map(Self::Template)
    }
}

impl Template {
    fn check(file: &Path, text: &str, mut raw: RawWorker) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let mut list = |key, value: Option<String>| {
            let value = value.filter(|value| value != AUTO)?;
            let list = parse_cpu_list(&value);
            if list.is_none() {
                errors.push(ConfigError::List {
                    file: file.to_owned(),
                    key,
                    value,
                });
            }
            list
        };
        let queues = list("queues", raw.queues.take());
        let cpus = list("cpus", raw.cpus.take());
        let nic = Some(raw.nic.clone()).filter(|nic| nic != AUTO);
        let worker = match WorkerConfig::check(file, raw) {
            Ok(worker) => worker,
            Err(found) => {
                errors.extend(found.0);
                return Err(ConfigErrors(errors));
            }
        };
        let mut keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
            .map_err(|source| {
                let file = file.to_owned();
                ConfigErrors(vec![ConfigError::Key { file, source }])
            })?;
        keys.retain(|key, _| !["nic", "queues", "cpus"].contains(&key.as_str()));
        let template = Self {
            file: file.to_owned(),
            nic,
            queues,
            cpus,
            worker,
            keys,
        };
        ConfigErrors::unless(errors, template)
    }
}

impl WorkerConfig {
    /// Whether it sends live frames anywhere.
    pub fn injects(&self) -> bool {
        [self.transmit, self.door_transmit].contains(&Transmit::Inject)
    }

    /// Whether its host door hands super-packets over, if the kernel has any.
    pub fn hands_super_packets_over(&self) -> bool {
        self.host_door == HostDoor::Tun && self.host_offload != Some(Offloads::Off)
    }

    fn check(file: &Path, raw: RawWorker) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let name_fits = (1..=15).contains(&raw.nic.len())
            && raw
                .nic
                .chars()
                .all(|c| c != '/' && !c.is_whitespace() && !c.is_control());
        if !name_fits {
            errors.push(ConfigError::NicName {
                file: file.to_owned(),
                nic: raw.nic.clone(),
            });
        }
        let rings = check_rings(file, &raw.rings, &mut errors);
        let burst = Burst::new(raw.burst);
        if burst.is_none() {
            errors.push(ConfigError::Burst {
                file: file.to_owned(),
                burst: raw.burst,
            });
        }
        let frame_size = FrameSize::new(raw.umem.frame_size);
        if frame_size.is_none() {
            errors.push(ConfigError::FrameSize {
                file: file.to_owned(),
                bytes: raw.umem.frame_size,
            });
        }
        let mut ranges = Ranges {
            file,
            errors: &mut errors,
        };
        let busy_poll = raw.busy_poll.and_then(|raw| ranges.busy_poll(&raw));
        let napi_deferral = raw.napi_deferral.and_then(|raw| ranges.napi_deferral(&raw));
        let coalesce = raw.coalesce.and_then(|raw| ranges.coalesce(&raw));
        if coalesce.is_some() && raw.polling == Polling::Busy {
            errors.push(ConfigError::CoalesceBusy {
                file: file.to_owned(),
            });
        }
        // What depends on several values is checked once each of them is good.
        let (Some(rings), Some(burst), Some(frame_size)) = (rings, burst, frame_size) else {
            return Err(ConfigErrors(errors));
        };
        let host_door = match raw.host_door.kind {
            RawHostDoorKind::Tun => HostDoor::Tun,
            RawHostDoorKind::Veth => HostDoor::Veth,
        };
        let injects = [
            ("transmit", raw.transmit),
            ("hostDoor.transmit", raw.host_door.transmit),
        ];
        for (key, transmit) in injects {
            let problem = match (transmit, host_door) {
                (Transmit::AfXdp, _) => continue,
                (Transmit::Inject, HostDoor::Tun) if key == "hostDoor.transmit" => {
                    "a TUN device has no socket: leave it out, or use the kind \"veth\""
                }
                (Transmit::TunnelGso, _) if key == "hostDoor.transmit" => {
                    "no tunnel leads into the host: it is for the NIC, as \"transmit\" beside \"hostDoor\""
                }
                (Transmit::Inject, _) if raw.huge_pages => {
                    "the packet memory is a BPF map then, which cannot lie on huge pages: set hugePages to false"
                }
                (Transmit::Inject | Transmit::TunnelGso, _) => continue,
            };
            errors.push(ConfigError::Transmit {
                file: file.to_owned(),
                key,
                kind: transmit.name(),
                problem,
            });
        }
        let min = Umem::frames_min(&rings, burst, host_door);
        let frames = raw.umem.frames.unwrap_or(min);
        if frames < min {
            errors.push(ConfigError::UmemTooSmall {
                file: file.to_owned(),
                frames,
                min,
            });
        }
        if frames > Umem::FRAMES_MAX {
            errors.push(ConfigError::UmemTooLarge {
                file: file.to_owned(),
                frames,
            });
        }
        let worker = Self {
            file: file.to_owned(),
            nic: raw.nic,
            queue: raw.queue.unwrap_or_default(),
            cpu: raw.cpu.unwrap_or_default(),
            mode: raw.mode,
            rings,
            umem: Umem {
                frames,
                frame_size,
                huge_pages: raw.huge_pages,
            },
            burst,
            polling: raw.polling,
            coalesce,
            host_door,
            transmit: raw.transmit,
            door_transmit: raw.host_door.transmit,
            host_offload: raw.host_door.offload,
            busy_poll,
            napi_deferral,
            interrupt: raw.interrupt,
        };
        ConfigErrors::unless(errors, worker)
    }
}

fn check_rings(file: &Path, raw: &RawRings, errors: &mut Vec<ConfigError>) -> Option<Rings> {
    let mut check = |ring, entries: u32| {
        let size = RingSize::new(entries);
        if size.is_none() {
            errors.push(ConfigError::RingSize {
                file: file.to_owned(),
                ring,
                entries,
                nearest: entries
                    .clamp(RingSize::MIN, RingSize::MAX)
                    .next_power_of_two(),
            });
        }
        size
    };
    // All four, so that each bad one is reported.
    let rx = check("rx", raw.rx);
    let tx = check("tx", raw.tx);
    let fill = check("fill", raw.fill);
    let completion = check("completion", raw.completion);
    Some(Rings {
        rx: rx?,
        tx: tx?,
        fill: fill?,
        completion: completion?,
    })
}

/// Checks numbers of the optional parts of a file.
struct Ranges<'a> {
    file: &'a Path,
    errors: &'a mut Vec<ConfigError>,
}

impl Ranges<'_> {
    /// `value` of a part's key, if it is from 1 to `max`.
    fn check(
        &mut self,
        [part, key]: [&'static str; 2],
        value: u32,
        max: u32,
        typical: u32,
    ) -> Option<u32> {
        let good = Some(value).filter(|value| (1..=max).contains(value));
        if good.is_none() {
            self.errors.push(ConfigError::Range {
                file: self.file.to_owned(),
                part,
                key,
                value,
                max,
                typical,
            });
        }
        good
    }

    fn busy_poll(&mut self, raw: &RawBusyPoll) -> Option<BusyPoll> {
        // A tenth of a second: beyond that it is a mistake in the unit.
        let microseconds = self.check(["busyPoll", "microseconds"], raw.microseconds, 100_000, 20);
        let budget = self.check(["busyPoll", "budget"], raw.budget, u16::MAX.into(), 64);
        Some(BusyPoll {
            microseconds: microseconds?,
            budget: u16::try_from(budget?).ok()?,
        })
    }

    fn napi_deferral(&mut self, raw: &RawNapiDeferral) -> Option<NapiDeferral> {
        // A tenth of a second without an interrupt is a mistake in the unit.
        let hard_irqs = self.check(["napiDeferral", "hardIrqs"], raw.hard_irqs, 1000, 2);
        let timeout = self.check(
            ["napiDeferral", "timeoutMicroseconds"],
            raw.timeout_microseconds,
            100_000,
            200,
        );
        Some(NapiDeferral {
            hard_irqs: hard_irqs?,
            timeout_microseconds: timeout?,
        })
    }

    fn coalesce(&mut self, raw: &RawCoalesce) -> Option<Coalesce> {
        // Rings hold some thousand packets: what comes in more than a few milliseconds does not fit.
        let microseconds = self.check(["coalesce", "microseconds"], raw.microseconds, 5000, 50);
        let packets = self.check(["coalesce", "packets"], raw.packets, 256, 32);
        Some(Coalesce {
            pause: Duration::from_micros(microseconds?.into()),
            packets: packets?,
        })
    }
}

/// What the machine offers to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// CPUs that the process may run on: its affinity and cgroup cpuset.
    pub cpus: BTreeSet<u32>,
    /// The NICs asked for, as far as they exist.
    pub nics: BTreeMap<String, Nic>,
    /// Names of all NICs in this network namespace.
    pub nic_names: Vec<String>,
    /// RLIMIT_MEMLOCK in bytes, unless unlimited.
    pub locked_bytes_max: Option<u64>,
    /// What the process may do.
    pub capabilities: Capabilities,
    /// Huge pages of 2 MiB that are free.
    pub huge_pages_free: u64,
    /// Huge pages of 2 MiB that exist.
    pub huge_pages_total: u64,
    /// The machine's NUMA nodes by number; a machine without them has one or none.
    pub numa_nodes: BTreeMap<u32, NumaNode>,
    /// CPUs that share their core with one of a lower number.
    pub siblings: BTreeSet<u32>,
}

/// What belongs to one NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Its CPUs.
    pub cpus: BTreeSet<u32>,
    /// Huge pages of 2 MiB that are free.
    pub huge_pages_free: u64,
    /// Huge pages of 2 MiB that exist.
    pub huge_pages_total: u64,
}

impl HostFacts {
    /// The node that a NIC's memory should lie on, where that makes a difference.
    pub fn node_of(&self, nic: &Nic) -> Option<u32> {
        nic.numa_node.filter(|_| self.numa_nodes.len() > 1)
    }
}

/// Why the machine could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of the kernel's is not readable or not understood.
    #[error("{path}: cannot read {what}: {source}: is /proc mounted?")]
    Proc {
        /// File.
        path: &'static str,
        /// What was sought in it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A NIC exists and cannot be used or described.
    #[error(transparent)]
    Nic(#[from] NicError),
}

const STATUS: &str = "/proc/thread-self/status";
const LIMITS: &str = "/proc/thread-self/limits";
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const NODES: &str = "/sys/devices/system/node";
const CPUS: &str = "/sys/devices/system/cpu";

/// A count of huge pages; a kernel without them has none to offer.
fn huge_pages(directory: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The nodes that `directory` shows; a kernel without NUMA shows none.
fn numa_nodes(directory: &Path) -> BTreeMap<u32, NumaNode> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeMap::new();
    };
    let node = |entry: io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        let number = path.file_name()?.to_str()?.strip_prefix("node")?;
        let pages = path.join("hugepages/hugepages-2048kB");
        // A node of memory only has an empty list.
        let cpus = fs::read_to_string(path.join("cpulist")).ok()?;
        let node = NumaNode {
            cpus: parse_cpu_list(cpus.trim()).unwrap_or_default(),
            huge_pages_free: huge_pages(&pages, "free_hugepages"),
            huge_pages_total: huge_pages(&pages, "nr_hugepages"),
        };
        Some((number.parse().ok()?, node))
    };
    entries.filter_map(node).collect()
}

/// The CPUs below `directory` that share their core with one of a lower number.
fn siblings(directory: &Path) -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeSet::new();
    };
    let sibling = |entry: io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        let number: u32 = path
            .file_name()?
            .to_str()?
            .strip_prefix("cpu")?
            .parse()
            .ok()?;
        let core = fs::read_to_string(path.join("topology/thread_siblings_list")).ok()?;
        let first = parse_cpu_list(core.trim())?.into_iter().next()?;
        (first < number).then_some(number)
    };
    entries.filter_map(sibling).collect()
}

impl HostFacts {
    /// Asks the machine; `nics` are the NICs to ask about, doubles allowed.
    pub fn read<'a>(nics: impl IntoIterator<Item = &'a str>) -> Result<Self, HostError> {
        let proc = |path, what| move |source| HostError::Proc { path, what, source };
        let status = fs::read_to_string(STATUS).map_err(proc(STATUS, "the CPUs allowed"))?;
        let limits =
            fs::read_to_string(LIMITS).map_err(proc(LIMITS, "the limit of locked memory"))?;
        let mut found = BTreeMap::new();
        for name in nics {
            if found.contains_key(name) {
                continue;
            }
            match Nic::open(name) {
                Ok(nic) => {
                    found.insert(name.to_owned(), nic);
                }
                Err(NicError::Unknown { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self {
            cpus: field(&status, "Cpus_allowed_list:")
                .and_then(parse_cpu_list)
                .ok_or_else(malformed)
                .map_err(proc(STATUS, "the CPUs allowed"))?,
            nics: found,
            nic_names: Nic::names(),
            locked_bytes_max: parse_locked_limit(&limits)
                .ok_or_else(malformed)
                .map_err(proc(LIMITS, "the limit of locked memory"))?,
            capabilities: Capabilities::from_status(&status)
                .ok_or_else(malformed)
                .map_err(proc(STATUS, "the capabilities"))?,
            huge_pages_free: huge_pages(Path::new(HUGE_PAGES), "free_hugepages"),
            huge_pages_total: huge_pages(Path::new(HUGE_PAGES), "nr_hugepages"),
            numa_nodes: numa_nodes(Path::new(NODES)),
            siblings: siblings(Path::new(CPUS)),
        })
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not in the expected form")
}

/// The rest of the line that begins with `name`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// A list such as `0-3,8`.
pub(crate) fn parse_cpu_list(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse().ok()?);
        // More than any machine has: a slip that would fill the memory.
        if first > last || last > u32::from(u16::MAX) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

pub(crate) fn format_cpu_list(cpus: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let texts: Vec<String> = ranges
        .iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    texts.join(",")
}

/// The soft limit; `Some(None)` is "unlimited".
fn parse_locked_limit(limits: &str) -> Option<Option<u64>> {
    match field(limits, "Max locked memory")?
        .split_whitespace()
        .next()?
    {
        "unlimited" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    }
}

/// A capability that workers need or profit from; the value is the kernel's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capability {
    NetAdmin = 12,
    NetRaw = 13,
    IpcLock = 14,
    SysAdmin = 21,
    Bpf = 39,
}

/// The effective capabilities of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// From a bit mask in the kernel's numbering (capabilities(7)).
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Those of the calling thread.
    pub fn effective() -> io::Result<Self> {
        let status = fs::read_to_string(STATUS)?;
        Self::from_status(&status).ok_or_else(malformed)
    }

    fn from_status(status: &str) -> Option<Self> {
        let bits = u64::from_str_radix(field(status, "CapEff:")?, 16).ok()?;
        Some(Self(bits))
    }

    const fn has(self, capability: Capability) -> bool {
        self.0 >> capability as u32 & 1 == 1
    }

    /// Those that a worker cannot do without, and what for.
    pub fn missing(self) -> Option<String> {
        let bpf = self.has(Capability::Bpf) || self.has(Capability::SysAdmin);
        let needs = [
            (
                self.has(Capability::NetAdmin),
                "CAP_NET_ADMIN (to attach the XDP program and create rip0)",
            ),
            (
                self.has(Capability::NetRaw),
                "CAP_NET_RAW (to open AF_XDP sockets)",
            ),
            (bpf, "CAP_BPF (to load the XDP program)"),
        ];
        let missing: Vec<&str> = needs
            .iter()
            .filter(|(held, _)| !held)
            .map(|(_, name)| *name)
            .collect();
        (!missing.is_empty()).then(|| missing.join(" and "))
    }
}

/// Checks that the host has what `workers` ask for.
pub fn check_host(workers: &[WorkerConfig], host: &HostFacts) -> Result<(), ConfigErrors> {
    let mut errors = Vec::new();
    for worker in workers {
        check_nic(worker, host, &mut errors);
        if !host.cpus.contains(&worker.cpu) {
            errors.push(ConfigError::CpuNotAllowed {
                file: worker.file.clone(),
                cpu: worker.cpu,
                allowed: format_cpu_list(&host.cpus),
            });
        }
    }
    // In zero-copy mode the host door's socket has a registration of its own (`veth::socket_options`).
    let registrations = |worker: &WorkerConfig| match (worker.host_door, worker.mode) {
        (HostDoor::Veth, Mode::ZeroCopy) => 2,
        (HostDoor::Veth, Mode::Auto | Mode::Copy | Mode::Generic) | (HostDoor::Tun, _) => 1,
    };
    let bytes = |worker| registrations(worker) * worker.umem.bytes();
    let need = workers.iter().map(bytes).sum();
    // The kernel charges UMEM to RLIMIT_MEMLOCK, huge pages too, except with
    // CAP_IPC_LOCK (net/xdp/xdp_umem.c, xdp_umem_account_pages).
    if let Some(limit) = host.locked_bytes_max
        && need > limit
        && !host.capabilities.has(Capability::IpcLock)
    {
        errors.push(ConfigError::LockedMemory { need, limit });
    }
    let huge = workers.iter().filter(|worker| worker.umem.huge_pages);
    let need: u64 = huge
        .map(|worker| worker.umem.bytes() / Umem::HUGE_PAGE_BYTES)
        .sum();
    if need <= host.huge_pages_free {
        check_nodes(workers, host, &mut errors);
    } else {
        errors.push(ConfigError::HugePages {
            need,
            free: host.huge_pages_free,
            total: host.huge_pages_total,
        });
    }
    if let Some(missing) = host.capabilities.missing() {
        errors.push(ConfigError::Capabilities { missing });
    }
    let veth = workers
        .iter()
        .any(|worker| worker.host_door == HostDoor::Veth);
    let injects = workers.iter().any(|worker| worker.injects());
    if (veth || injects) && !host.capabilities.has(Capability::SysAdmin) {
        errors.push(ConfigError::Capabilities {
            missing: "CAP_SYS_ADMIN (for the network namespace behind hostDoor.kind \"veth\" and transmit \"inject\")"
                .to_owned(),
        });
    }
    ConfigErrors::unless(errors, ())
}

/// Checks that there are huge pages on the nodes of the NICs. The kernel would take those of another node instead, which
/// is what nobody asks for who sets huge pages aside.
fn check_nodes(workers: &[WorkerConfig], host: &HostFacts, errors: &mut Vec<ConfigError>) {
    let mut needs: BTreeMap<u32, u64> = BTreeMap::new();
    for worker in workers.iter().filter(|worker| worker.umem.huge_pages) {
        let nic = host.nics.get(&worker.nic);
        if let Some(node) = nic.and_then(|nic| host.node_of(nic)) {
            *needs.entry(node).or_default() += worker.umem.bytes() / Umem::HUGE_PAGE_BYTES;
        }
    }
    for (node, need) in needs {
        let facts = host.numa_nodes.get(&node).cloned().unwrap_or_default();
        if need > facts.huge_pages_free {
            errors.push(ConfigError::HugePagesOfNode {
                node,
                need,
                free: facts.huge_pages_free,
                total: facts.huge_pages_total,
            });
        }
    }
}

fn check_nic(worker: &WorkerConfig, host: &HostFacts, errors: &mut Vec<ConfigError>) {
    let file = worker.file.clone();
    let Some(nic) = host.nics.get(&worker.nic) else {
        errors.push(ConfigError::UnknownNic {
            file,
            nic: worker.nic.clone(),
            existing: host.nic_names.clone(),
        });
        return;
    };
    if !nic.up {
        errors.push(ConfigError::NicDown {
            file: file.clone(),
            nic: nic.name.clone(),
        });
    }
    if worker.queue >= nic.rx_queues {
        errors.push(ConfigError::QueueBeyondNic {
            file: file.clone(),
            nic: nic.name.clone(),
            queue: worker.queue,
            queues: nic.rx_queues,
        });
    }
    if worker.transmit == Transmit::Inject && nic.driver != "veth" {
        errors.push(ConfigError::Transmit {
            file: file.clone(),
            key: "transmit",
            kind: worker.transmit.name(),
            problem: "it is for veth devices, and the NIC is none: a NIC's own transmit ring is cheaper, leave it out",
        });
    }
    if worker.host_door == HostDoor::Veth {
        let short_frames = worker.umem.frame_size == FrameSize::Bytes2048;
        let max = veth::mtu_max(worker.umem.frame_size);
        if nic.mtu > max {
            errors.push(ConfigError::DoorMtu {
                file: file.clone(),
                nic: nic.name.clone(),
                mtu: nic.mtu,
                max,
                short_frames,
            });
        }
    }
    // igb programs its buffer size in steps of 1024 and rounds 2048 - 256 down.
    if nic.driver == "igb"
        && worker.umem.frame_size == FrameSize::Bytes2048
        && matches!(worker.mode, Mode::Auto | Mode::ZeroCopy)
    {
        errors.push(ConfigError::FrameSizeOfDriver {
            file,
            nic: nic.name.clone(),
            driver: nic.driver.clone(),
        });
    }
}

/// What works, but perhaps not as meant.
pub fn warnings(workers: &[WorkerConfig], host: &HostFacts) -> Vec<ConfigWarning> {
    let mut warnings = Vec::new();
    let mut by_cpu: BTreeMap<u32, Vec<Polling>> = BTreeMap::new();
    let mut by_nic: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    for worker in workers {
        by_cpu.entry(worker.cpu).or_default().push(worker.polling);
        by_nic.entry(&worker.nic).or_default().insert(worker.queue);
        let node = host.nics.get(&worker.nic).and_then(|nic| host.node_of(nic));
        if let Some(node) = node
            && let Some(facts) = host.numa_nodes.get(&node)
            && !facts.cpus.contains(&worker.cpu)
        {
            warnings.push(ConfigWarning::FarCpu {
                file: worker.file.clone(),
                cpu: worker.cpu,
                nic: worker.nic.clone(),
                node,
                near: format_cpu_list(&facts.cpus),
            });
        }
        let packet_bytes_max = worker.umem.frame_size.packet_bytes_max();
        // The Ethernet header is not part of the MTU.
        if let Some(nic) = host.nics.get(&worker.nic)
            && nic.mtu.saturating_add(14) > packet_bytes_max
        {
            warnings.push(ConfigWarning::LongPackets {
                file: worker.file.clone(),
                nic: nic.name.clone(),
                mtu: nic.mtu,
                packet_bytes_max,
            });
        }
    }
    for (cpu, polling) in by_cpu {
        if polling.len() > 1 {
            warnings.push(ConfigWarning::SharedCpu {
                cpu,
                workers: polling.len(),
                busy: polling.contains(&Polling::Busy),
            });
        }
    }
    for (name, covered) in by_nic {
        let queues: Vec<u32> = host.nics.get(name).map_or_else(Vec::new, |nic| {
            (0..nic.rx_queues)
                .filter(|queue| !covered.contains(queue))
                .collect()
        });
        if !queues.is_empty() {
            warnings.push(ConfigWarning::UncoveredQueues {
                nic: name.to_owned(),
                queues,
            });
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_and_written() {
        for text in ["0", "0-3", "0-3,8", "1,3,5-6", "1024-1027"] {
            assert_eq!(format_cpu_list(&parse_cpu_list(text).unwrap()), text);
        }
        assert_eq!(parse_cpu_list("2-3").unwrap(), BTreeSet::from([2, 3]));
        for text in ["", "a", "1-", "0,,2", "3-1", "0-4294967295"] {
            assert_eq!(parse_cpu_list(text), None, "{text:?}");
        }
    }

    #[test]
    fn numa_nodes_are_read() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(numa_nodes(&root.path().join("none")), BTreeMap::new());
        write("node0/cpulist", "0-1,4\n");
        write("node0/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        write("node0/hugepages/hugepages-2048kB/nr_hugepages", "8\n");
        write("node12/cpulist", "\n");
        write("online", "0,12\n");
        let first = NumaNode {
            cpus: BTreeSet::from([0, 1, 4]),
            huge_pages_free: 3,
            huge_pages_total: 8,
        };
        let expected = BTreeMap::from([(0, first), (12, NumaNode::default())]);
        assert_eq!(numa_nodes(root.path()), expected);
    }

    #[test]
    fn siblings_are_read() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(siblings(&root.path().join("none")), BTreeSet::new());
        for (cpu, core) in [(0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5"), (6, "6")] {
            let topology = root.path().join(format!("cpu{cpu}/topology"));
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("thread_siblings_list"), format!("{core}\n")).unwrap();
        }
        fs::create_dir(root.path().join("cpu7")).unwrap();
        fs::create_dir(root.path().join("cpufreq")).unwrap();
        assert_eq!(siblings(root.path()), BTreeSet::from([4, 5]));
    }

    #[test]
    fn the_limit_of_locked_memory_is_read() {
        let header = "Limit                     Soft Limit           Hard Limit           Units\n";
        let line = |soft| {
            format!("{header}Max locked memory         {soft}              9           bytes\n")
        };
        assert_eq!(parse_locked_limit(&line("8388608")), Some(Some(8_388_608)));
        assert_eq!(parse_locked_limit(&line("unlimited")), Some(None));
        assert_eq!(parse_locked_limit(header), None);
    }

    #[test]
    fn capabilities_are_read_and_named() {
        let held = Capabilities::from_status("Name:\tx\nCapEff:\t000001ffffffffff\n").unwrap();
        assert_eq!(held.missing(), None);
        let none = Capabilities::from_bits(0).missing().unwrap();
        for name in ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF"] {
            assert!(none.contains(name), "{none}");
        }
        // CAP_SYS_ADMIN stands in for CAP_BPF.
        let old = Capabilities::from_bits(1 << 12 | 1 << 13 | 1 << 21);
        assert_eq!(old.missing(), None);
    }

    #[test]
    fn this_process_can_be_asked() {
        let host = HostFacts::read(["lo", "lo", "nic-of-nobody"]).unwrap();
        assert!(!host.cpus.is_empty());
        assert_eq!(host.nics.keys().collect::<Vec<_>>(), ["lo"]);
        assert!(host.nic_names.contains(&"lo".to_owned()));
    }
}
