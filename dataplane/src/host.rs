//! Setting the data plane up, and taking it down in an order that loses nothing.
//!
//! ```text
//!   check every configuration file ─► lock ─► regions ─► host door ─► per NIC: XDP program
//!                                                                 ─► per queue: UMEM, socket, worker thread
//!   then: watch the fib region, publish statistics, wait for a signal
//! ```
//!
//! Until the first table is accepted the XDP programs pass everything, so a data plane without a control plane
//! changes nothing for anybody. When the process ends, however it ends, the kernel detaches the programs, closes the
//! sockets and removes the host door: its own tunnel path carries the traffic.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use af_xdp::{Interface, Memory, Socket, SocketHandle, SocketOptions, Umem, UmemOptions};
use crossbeam::channel::{Receiver, RecvTimeoutError};
use crossbeam::utils::CachePadded;
use libbpf_rs::MapHandle;
use ripstop_fib::map::{self, MapError, Mapping, ProcessLock};
use ripstop_fib::stats::{Door, KernelCounter, Mode, Polling, Stats, Transmit, WorkerIdentity};
use ripstop_fib::{Node, Reader, Region};

use crate::auto::{self, NetFiles};
use crate::config::{self, ConfigErrors, HostFacts, WorkerConfig};
use crate::door::{HOST_DOOR, RIP0};
use crate::inject::{self, Injector, Switch};
use crate::nic::{Nic, NicError};
use crate::nic_queue::NicQueue;
use crate::nic_settings::{NicSettings, Setting};
use crate::pace::{self, Pace, Waker};
use crate::port::Port;
use crate::tun::{self, TunError, TunQueue};
use crate::tunnel_gso::{self, TunnelGso};
use crate::veth::{self, QueueError, VethDoor, VethError, VethQueue};
use crate::watcher::{self, Accepted, TableWatcher};
use crate::worker::{Parts, Worker};
use crate::xdp::{AttachMode, AttachedMode, TunnelMatch, XdpError, XdpProgram};

/// How often the watcher looks for a new table.
const WATCH: Duration = Duration::from_millis(2);
/// A worker whose heartbeat is older than this counts as stuck. It beats every 100 ms when it has nothing to do, and
/// more often when it has.
const HEARTBEAT_MAX_NS: u64 = 500_000_000;
/// How long the XDP program believes that a worker moves.
const BELIEF_NS: u64 = 1_000_000_000;
/// How often the kernel's statistics are published, and how often the XDP programs hear that the workers move.
const VOUCH: Duration = Duration::from_millis(100);
/// How often the kernel is asked about the NICs.
const ASK: Duration = Duration::from_secs(1);
/// How long the control plane gets to lead traffic away from workers that will stop: it looks every 100 ms.
const WITHDRAW: Duration = Duration::from_millis(250);
/// How long packets that are on their way through the workers get before the workers stop.
const DRAIN: Duration = Duration::from_millis(50);

/// Where the data plane finds its files.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory with one JSON file per NIC queue, or templates.
    pub config_dir: PathBuf,
    /// Interfaces that a template's NIC may be meant by, names or addresses.
    pub ifaces: Vec<String>,
    /// Directory of the shared-memory regions.
    pub run_dir: PathBuf,
}

/// Why the data plane could not be set up, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Something is wrong in the configuration, or the machine does not have what it asks for.
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    /// The machine could not be asked.
    #[error(transparent)]
    Facts(#[from] config::HostError),
    /// A shared-memory region or the lock is not to be had.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A region is not of this version.
    #[error("{}: {source}; stop Ripstop on this node, remove the file, start again", path.display())]
    Region {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ripstop_fib::publish::RegionError,
    },
    /// The host door could not be made.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// The same of the other kind.
    #[error(transparent)]
    Veth(#[from] VethError),
    /// A worker's queue of the host door could not be had.
    #[error("{}: {source}", file.display())]
    Queue {
        /// The queue's configuration file.
        file: PathBuf,
        /// What failed.
        source: QueueError,
    },
    /// The XDP program could not be loaded, attached or configured.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// A socket or its UMEM could not be had.
    #[error("{}: {source}", file.display())]
    Socket {
        /// The queue's configuration file.
        file: PathBuf,
        /// What failed.
        source: af_xdp::Error,
    },
    /// Files about one NIC ask for XDP in different places.
    #[error("{}: mode generic, but {} wants another mode on the same NIC; the XDP program sits in one place per NIC: use one mode for all its queues", generic.display(), other.display())]
    MixedModes {
        /// A file that asks for generic mode.
        generic: PathBuf,
        /// A file that does not.
        other: PathBuf,
    },
    /// There are more workers or NICs than the stats region has places for.
    #[error(
        "{count} {what}, at most {max} are possible; use fewer files in the configuration directory"
    )]
    TooMany {
        /// Workers or NICs.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A thread or a wake-up could not be made.
    #[error("start worker of {}: {source}", file.display())]
    Thread {
        /// The queue's configuration file.
        file: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The thread that asks about the NICs could not be made.
    #[error("start the thread that watches the NICs: {source}")]
    Watching {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The NIC is not there any more, or another one has its name.
    #[error(
        "NIC {nic} is gone; the kernel's own tunnel path carries the traffic, start the data plane again when the NIC is back"
    )]
    NicVanished {
        /// The NIC.
        nic: String,
    },
    /// The NIC has lost the queue of a running worker.
    #[error(
        "NIC {nic} has {queues} receive queue(s) left, and a worker is on queue {queue}: ethtool -L {nic} brings it back, or remove the worker's file; the kernel's own tunnel path carries the traffic"
    )]
    QueueGone {
        /// The NIC.
        nic: String,
        /// The worker's queue.
        queue: u32,
        /// Queues that the NIC has.
        queues: u32,
    },
    /// The NIC went away under a running worker.
    #[error(
        "{nic} queue {queue}: {source}; the kernel's own tunnel path carries the traffic, start the data plane again when the NIC is back"
    )]
    NicGone {
        /// The NIC.
        nic: String,
        /// The queue.
        queue: u32,
        /// What the socket reports.
        source: af_xdp::Error,
    },
}

/// What a configuration directory comes to on this machine.
#[derive(Debug)]
pub struct Planned {
    /// From files for one queue.
    pub workers: Vec<WorkerConfig>,
    /// From templates.
    pub chosen: Vec<auto::Worker>,
    /// The machine.
    pub facts: HostFacts,
}

/// Reads the configuration and makes workers of its templates, with a line of log for what is decided.
///
/// # Errors
/// What is wrong in the files, or a template that fits nothing here.
pub fn plan(config_dir: &Path, ifaces: &[String]) -> Result<Planned, HostError> {
    let configured = config::load_dir(config_dir)?;
    let templates = auto::resolve(configured.templates, ifaces, &NetFiles::default())?;
    let workers = configured.workers;
    let nics = workers.iter().map(|worker| &worker.nic);
    let nics = nics.chain(templates.iter().flat_map(|template| &template.nics));
    let facts = HostFacts::read(nics.map(String::as_str))?;
    let places = ripstop_fib::stats::WORKERS.saturating_sub(workers.len());
    let explain = |text: String| tracing::info!("{text}");
    let chosen = auto::expand(&workers, &templates, &facts, places, explain)?;
    Ok(Planned {
        workers,
        chosen,
        facts,
    })
}

/// Reads and checks the configuration against the machine, and changes nothing.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn check(
    config_dir: &Path,
    ifaces: &[String],
) -> Result<(Vec<WorkerConfig>, HostFacts), HostError> {
    let Planned {
        mut workers,
        chosen,
        facts,
    } = plan(config_dir, ifaces)?;
    workers.extend(chosen.into_iter().map(|worker| worker.config));
    let workers = config::together(workers)?;
    config::check_host(&workers, &facts)?;
    check_modes(&workers)?;
    at_most("workers", workers.len(), ripstop_fib::stats::WORKERS)?;
    at_most("NICs", facts.nics.len(), ripstop_fib::stats::NICS)?;
    for warning in config::warnings(&workers, &facts) {
        tracing::warn!("{warning}");
    }
    Ok((workers, facts))
}

/// Runs the data plane until `signals` delivers one (or is closed).
///
/// # Errors
/// When it cannot be set up, or has to stop because a NIC is gone.
pub fn run(options: &Options, signals: &Receiver<i32>) -> Result<(), HostError> {
    let (workers, facts) = check(&options.config_dir, &options.ifaces)?;
    let lock = ProcessLock::acquire(&options.run_dir, map::DATAPLANE_LOCK)?;
    let regions = Regions::open(&options.run_dir)?;
    let mut settings = NicSettings::open(&options.run_dir);
    let mut nics = attach_programs(&workers, &facts)?;
    tune(&mut settings, &workers, &nics);
    let mut door = HostDoor::open(&workers)?;
    let stop = Arc::new(CachePadded::new(AtomicBool::new(false)));
    let mut running = Vec::new();
    for (index, config) in workers.iter().enumerate() {
        let Some(nic) = nics.get_mut(&config.nic) else {
            continue;
        };
        let node = facts.node_of(&nic.nic);
        running.push(start(index, config, nic, node, &mut door, regions, &stop)?);
    }
    if let HostDoor::Veth(pair) = &mut door {
        pair.seal();
    }
    // Ahead of the announcement: who counts a NIC sees its name.
    publish_statistics(regions.stats, &nics, &running)?;
    regions.stats.announce(workers.len(), nics.len());
    tracing::info!(
        workers = running.len(),
        nics = nics.len(),
        "data plane is up, waiting for tables"
    );

    let outcome = watch(regions, &mut nics, &mut settings, &running, signals);
    shut_down(regions.stats, &mut nics, running, &stop);
    settings.restore();
    // With the lock gone nobody takes these workers for living ones, and their last counters can be read.
    drop(lock);
    regions.stats.announce(workers.len(), nics.len());
    outcome
}

/// The two shared-memory regions. They are mapped for as long as the process lives.
#[derive(Debug, Clone, Copy)]
struct Regions {
    fib: Region<'static>,
    stats: Stats<'static>,
}

impl Regions {
    fn open(run_dir: &Path) -> Result<Self, HostError> {
        let forever = |mapping: Mapping| Box::leak(Box::new(mapping)).words();
        let bad = |name: &str| {
            let path = run_dir.join(name);
            move |source| HostError::Region { path, source }
        };
        let fib = forever(map::open_or_create_fib(run_dir)?);
        let stats = forever(map::create_stats(
            run_dir,
            std::process::id(),
            map::monotonic_ns(),
        )?);
        Ok(Self {
            fib: Region::attach(fib).map_err(bad(map::FIB_FILE))?,
            stats: Stats::attach(stats).map_err(bad(map::STATS_FILE))?,
        })
    }
}

/// A NIC with our XDP program on it.
#[derive(Debug)]
struct AttachedNic {
    nic: Nic,
    program: XdpProgram,
    mode: AttachedMode,
    index: usize,
    /// What the program takes for ours.
    ours: TunnelMatch,
    /// Longest frame that every socket of the NIC can hold.
    frame_bytes_max: u32,
}

/// Ethernet header and VLAN tag, which do not count towards an MTU.
const ETHERNET_BYTES: u32 = 18;

impl AttachedNic {
    /// Longest frame for a socket. One that is longer than the MTU is no packet as it was sent, but several that were
    /// merged, for example; a pod would not take it.
    fn frame_limit(&self) -> u32 {
        self.frame_bytes_max.min(self.nic.mtu + ETHERNET_BYTES)
    }
}

fn attach_programs(
    workers: &[WorkerConfig],
    facts: &HostFacts,
) -> Result<BTreeMap<String, AttachedNic>, HostError> {
    let mut attached = BTreeMap::new();
    for (index, (name, nic)) in facts.nics.iter().enumerate() {
        let of_nic = || workers.iter().filter(|worker| worker.nic == *name);
        let frame_bytes = of_nic()
            .map(|worker| worker.umem.frame_size().packet_bytes_max())
            .min()
            .unwrap_or(0);
        let wanted = if of_nic().any(|worker| worker.mode == config::Mode::Generic) {
            AttachMode::Generic
        } else if of_nic().all(|worker| worker.mode == config::Mode::Auto) {
            AttachMode::Auto
        } else {
            AttachMode::Native
        };
        let mut program = XdpProgram::load(frame_bytes)?;
        let mode = program.attach(nic, wanted)?;
        tracing::info!(nic = name, driver = nic.driver, queues = nic.rx_queues, %mode, "XDP program attached");
        attached.insert(
            name.clone(),
            AttachedNic {
                nic: nic.clone(),
                program,
                mode,
                index,
                ours: TunnelMatch::OFF,
                frame_bytes_max: frame_bytes,
            },
        );
    }
    Ok(attached)
}

fn check_modes(workers: &[WorkerConfig]) -> Result<(), HostError> {
    let generic = |worker: &&WorkerConfig| worker.mode == config::Mode::Generic;
    for worker in workers.iter().filter(generic) {
        let other = workers
            .iter()
            .find(|other| other.nic == worker.nic && !generic(other));
        if let Some(other) = other {
            return Err(HostError::MixedModes {
                generic: worker.file.clone(),
                other: other.file.clone(),
            });
        }
    }
    Ok(())
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), HostError> {
    if count > max {
        Err(HostError::TooMany { what, count, max })
    } else {
        Ok(())
    }
}

/// The host door, of which each worker gets a queue.
#[derive(Debug)]
enum HostDoor {
    /// Queues that no worker has yet.
    Tun(std::vec::IntoIter<TunQueue>),
    Veth(VethDoor),
}

impl HostDoor {
    /// Makes it for so many workers. All want the same kind, which `config::together` has seen to.
    fn open(workers: &[WorkerConfig]) -> Result<Self, HostError> {
        let kind = workers
            .first()
            .map_or(config::HostDoor::Tun, |worker| worker.host_door);
        Ok(match kind {
            config::HostDoor::Tun => {
                let offloads = workers.iter().find_map(|worker| worker.host_offload);
                Self::Tun(tun::open(workers.len(), offloads.unwrap_or_default())?.into_iter())
            }
            config::HostDoor::Veth => {
                if workers.iter().any(|worker| worker.host_offload.is_some()) {
                    tracing::warn!(
                        "hostDoor.offload means nothing where hostDoor.kind is \"veth\": through that door packets go one by one, each no longer than the MTU"
                    );
                }
                let inject =
                    |worker: &WorkerConfig| worker.door_transmit == config::Transmit::Inject;
                Self::Veth(VethDoor::open(workers.len(), workers.iter().any(inject))?)
            }
        })
    }
}

/// A worker's thread, and what the watcher needs of it.
#[derive(Debug)]
struct Running {
    thread: JoinHandle<()>,
    socket: SocketHandle,
    /// Its socket at the host door, if that has any.
    door: Option<SocketHandle>,
    waker: Waker,
    /// Where it injects live frames, and whether it may.
    watched: Vec<(Frames, Arc<Switch>)>,
}

/// A worker's queue of the host door.
enum DoorQueue {
    Tun(Box<TunQueue>),
    Veth(Box<(VethQueue, SocketHandle)>),
}

/// Where live frames go.
#[derive(Debug, Clone)]
enum Frames {
    /// Into the NIC of this name and interface index.
    Into(String, u32),
    /// Into the far end of the host door.
    IntoDoor,
    /// Super-packets, for the kernel to cut, into the NIC of this name and driver.
    Whole(String, String),
}

impl Frames {
    /// Has frames sent this way only as long as they arrive, and says what has changed.
    fn watch(&self, switch: &Switch) {
        const GONE: &str = "the other end takes no live frames any more (GRO was switched off there, or its XDP program is gone); the AF_XDP socket sends";
        const BACK: &str = "the other end takes live frames again";
        const REFUSED: &str = "the kernel refuses to run the program for live frames; the AF_XDP socket sends from here on";
        let (device, arrives, [gone, back, refused]) = match self {
            Self::Into(name, index) => {
                let arrives = inject::takes_frames(*index);
                (name.as_str(), arrives, [GONE, BACK, REFUSED])
            }
            Self::IntoDoor => (HOST_DOOR, veth::takes_frames(), [GONE, BACK, REFUSED]),
            Self::Whole(name, driver) => {
                let says = [
                    "checksum offload was switched on, which on veth leaves checksums to the receiver; super-packets are cut, and sent by the AF_XDP socket",
                    "super-packets are sent whole again",
                    "the kernel refuses super-packets; they are cut, and sent by the AF_XDP socket from here on",
                ];
                (name.as_str(), tunnel_gso::arrives_whole(name, driver), says)
            }
        };
        match (switch.set_taken(arrives), arrives) {
            (true, false) => tracing::warn!(device, "{gone}"),
            (false, true) => tracing::info!(device, "{back}"),
            (true, true) | (false, false) => {}
        }
        if let Some(error) = switch.take_error() {
            tracing::warn!(device, %error, "{refused}");
        }
    }
}

fn start(
    index: usize,
    config: &WorkerConfig,
    nic: &mut AttachedNic,
    node: Option<u32>,
    door: &mut HostDoor,
    regions: Regions,
    stop: &Arc<CachePadded<AtomicBool>>,
) -> Result<Running, HostError> {
    let socket_error = |source| HostError::Socket {
        file: config.file.clone(),
        source,
    };
    let thread_error = |source| HostError::Thread {
        file: config.file.clone(),
        source,
    };
    let (frames, mut umem) = packet_memory(config, node).map_err(socket_error)?;
    let lies_on = node.and_then(|_| umem.numa_node());
    if lies_on != node {
        tracing::warn!(
            nic = config.nic,
            queue = config.queue,
            wanted = node,
            "the packet memory does not lie on the NIC's NUMA node alone: free memory there, or widen the process's cpuset.mems"
        );
    }
    let interface = Interface::by_index(nic.nic.index).map_err(socket_error)?;
    let options = socket_options(config);
    let Socket {
        receiver,
        transmitter,
        handle,
    } = Socket::open(&mut umem, &interface, config.queue, &options).map_err(socket_error)?;
    let injector = |wanted| injector(wanted, frames.as_ref(), config);
    let nic_injector = injector(config.transmit).filter(|it| inject::aims(it, &interface));
    let tunnel_gso = way_for_super_packets(config, &interface, &nic.nic.driver);
    let mut identity = WorkerIdentity {
        numa_node: lies_on.and_then(|node| u16::try_from(node).ok()),
        ..identity(config, nic.mode, &handle)
    };
    let burst = config.burst.frames() as usize;
    let mut nic_queue = NicQueue::new(
        receiver,
        transmitter,
        options.tx_entries as usize,
        2 * burst,
    )
    .with_injector(nic_injector)
    .with_tunnel_gso(tunnel_gso);
    nic_queue.refill(&mut umem);
    let mut watched = Vec::new();
    if let Some(injector) = nic_queue.injector() {
        identity.transmit[0] = Transmit::Inject;
        let frames = Frames::Into(config.nic.clone(), nic.nic.index);
        watched.push((frames, injector.switch()));
    }
    if let Some(tunnel_gso) = nic_queue.tunnel_gso() {
        identity.transmit[0] = Transmit::TunnelGso;
        let supers = Frames::Whole(config.nic.clone(), nic.nic.driver.clone());
        watched.push((supers, tunnel_gso.switch()));
    }
    let door =
        match door {
            HostDoor::Tun(queues) => DoorQueue::Tun(Box::new(queues.next().ok_or_else(|| {
                thread_error(io::Error::other("the host door has no queue left"))
            })?)),
            HostDoor::Veth(pair) => {
                let options = veth::socket_options(&options, handle.mode());
                let injector = injector(config.door_transmit);
                let queue = pair.queue(index, &mut umem, &options, 2 * burst, injector);
                let (queue, socket) = queue.map_err(|source| HostError::Queue {
                    file: config.file.clone(),
                    source,
                })?;
                if let Some(injector) = queue.injector() {
                    identity.transmit[1] = Transmit::Inject;
                    watched.push((Frames::IntoDoor, injector.switch()));
                }
                DoorQueue::Veth(Box::new((queue, socket)))
            }
        };
    tracing::info!(
        nic = config.nic,
        queue = config.queue,
        cpu = config.cpu,
        mode = identity.mode.name(),
        polling = identity.polling.name(),
        host_door = identity.door.name(),
        transmit = identity.transmit[0].name(),
        door_transmit = identity.transmit[1].name(),
        huge_pages = identity.huge_pages,
        numa_node = identity.numa_node,
        "worker starts"
    );
    // Vouched for from the first packet on: a process that is stopped before the watcher's first look is seen to be.
    let belief_ns = map::monotonic_ns() + BELIEF_NS;
    nic.program.keep_alive(config.queue, belief_ns)?;
    nic.program.register_socket(config.queue, handle.as_fd())?;
    regions.stats.write_identity(index, &identity);
    let parts = Parts {
        umem,
        nic: nic_queue,
        reader: Reader::new(regions.fib, regions.stats.worker_pin(index)),
        accepted: regions.stats.accepted(),
        stats: regions.stats,
        index,
        ifindex: nic.nic.index,
        burst,
    };
    let begin = Begin {
        config,
        polling: identity.polling,
        socket: handle,
        watched,
        stop,
    };
    match door {
        DoorQueue::Tun(queue) => {
            let wakes = queue.as_fd().try_clone_to_owned().map_err(thread_error)?;
            begin.spawn(parts, *queue, None, wakes)
        }
        DoorQueue::Veth(both) => {
            let (queue, socket) = *both;
            let wakes = socket.as_fd().try_clone_to_owned().map_err(thread_error)?;
            begin.spawn(parts, queue, Some(socket), wakes)
        }
    }
    .map_err(thread_error)
}

/// What a worker's thread begins with, apart from the worker.
struct Begin<'a> {
    config: &'a WorkerConfig,
    polling: Polling,
    socket: SocketHandle,
    watched: Vec<(Frames, Arc<Switch>)>,
    stop: &'a Arc<CachePadded<AtomicBool>>,
}

impl Begin<'_> {
    /// Starts the thread. `door` and `wakes` are the worker's socket at the host door, and what is readable when a
    /// packet waits there.
    fn spawn<H: Port + Send + 'static>(
        self,
        parts: Parts<'static, NicQueue>,
        host: H,
        door: Option<SocketHandle>,
        wakes: OwnedFd,
    ) -> io::Result<Running> {
        let waker = Waker::new()?;
        let nic = self.socket.as_fd().try_clone_to_owned()?;
        let mut pace = Pace::new(
            self.polling,
            self.config.coalesce,
            vec![nic, wakes, waker.handle()?],
        );
        let mut worker = Worker::new(parts, host);
        let stop = Arc::clone(self.stop);
        let cpu = self.config.cpu as usize;
        let thread = std::thread::Builder::new()
            .name(format!("worker-{}-q{}", self.config.nic, self.config.queue))
            .spawn(move || {
                let _abort = AbortOnPanic;
                if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
                    tracing::error!(
                        cpu,
                        "the worker could not be pinned to its CPU; it runs where the scheduler puts it"
                    );
                }
                if let Err(error) = pace::run_first() {
                    tracing::info!(%error, "the worker runs at ordinary priority; CAP_SYS_NICE would let it run first on a shared CPU");
                }
                worker.housekeeping(map::monotonic_ns());
                worker.run(&mut pace, &stop);
                worker.housekeeping(map::monotonic_ns());
            })?;
        Ok(Running {
            thread,
            socket: self.socket,
            door,
            waker,
            watched: self.watched,
        })
    }
}

/// The frames of a worker. For live frames they lie in a map of the kernel's; where it refuses that, the AF_XDP sockets
/// send alone.
fn packet_memory(
    config: &WorkerConfig,
    node: Option<u32>,
) -> Result<(Option<MapHandle>, Umem), af_xdp::Error> {
    let options = umem_options(config, node);
    if config.injects() {
        match inject::memory(&options) {
            Ok((frames, umem)) => return Ok((Some(frames), umem)),
            Err(error) => {
                tracing::warn!("{error}; packets are sent by the AF_XDP sockets");
            }
        }
    }
    Ok((None, Umem::new(&options)?))
}

/// An injector, if that is wanted and can be had.
fn injector(
    wanted: config::Transmit,
    frames: Option<&MapHandle>,
    config: &WorkerConfig,
) -> Option<Injector> {
    let frames = frames.filter(|_| wanted == config::Transmit::Inject)?;
    let made = Injector::new(frames, config.umem.frame_size().bytes());
    made.inspect_err(|error| {
        tracing::warn!("{error}; packets are sent by the AF_XDP socket");
    })
    .ok()
}

/// A way for super-packets into the NIC, if that is wanted and can be had.
fn way_for_super_packets(
    config: &WorkerConfig,
    nic: &Interface,
    driver: &str,
) -> Option<TunnelGso> {
    if config.transmit != config::Transmit::TunnelGso {
        return None;
    }
    if !config.hands_super_packets_over() {
        tracing::warn!(
            nic = config.nic,
            "transmit \"tunnel-gso\" means nothing where the host door hands no super-packets over: hostDoor.kind \"tun\" does, unless hostDoor.offload is \"off\""
        );
        return None;
    }
    TunnelGso::new(nic, driver)
        .inspect_err(|error| {
            tracing::warn!(
                nic = config.nic,
                "{error}; super-packets are cut, and sent by the AF_XDP socket"
            );
        })
        .ok()
}

fn umem_options(config: &WorkerConfig, node: Option<u32>) -> UmemOptions {
    UmemOptions {
        frames: config.umem.frames(),
        frame_size: config.umem.frame_size().bytes(),
        memory: Memory::File,
        huge_pages: config.umem.huge_pages(),
        numa_node: node,
        ..UmemOptions::default()
    }
}

fn socket_options(config: &WorkerConfig) -> SocketOptions {
    SocketOptions {
        mode: match config.mode {
            config::Mode::Auto => af_xdp::Mode::Auto,
            config::Mode::ZeroCopy => af_xdp::Mode::ZeroCopy,
            config::Mode::Copy | config::Mode::Generic => af_xdp::Mode::Copy,
        },
        fill_entries: config.rings.fill.entries(),
        rx_entries: config.rings.rx.entries(),
        tx_entries: config.rings.tx.entries(),
        completion_entries: config.rings.completion.entries(),
        busy_poll: config.busy_poll.map(|poll| af_xdp::BusyPoll {
            timeout_us: poll.microseconds,
            budget: poll.budget.into(),
        }),
        ..SocketOptions::default()
    }
}

fn identity(
    config: &WorkerConfig,
    attached: AttachedMode,
    socket: &SocketHandle,
) -> WorkerIdentity {
    WorkerIdentity {
        nic: config.nic.clone(),
        queue: config.queue,
        cpu: config.cpu,
        mode: match (attached, socket.mode()) {
            (AttachedMode::Generic, _) => Mode::Generic,
            (AttachedMode::Native, af_xdp::ModeInUse::ZeroCopy) => Mode::ZeroCopy,
            (AttachedMode::Native, af_xdp::ModeInUse::Copy) => Mode::Copy,
        },
        wants_zero_copy: matches!(config.mode, config::Mode::Auto | config::Mode::ZeroCopy),
        polling: match config.polling {
            config::Polling::Busy => Polling::Busy,
            config::Polling::Adaptive => Polling::Adaptive,
        },
        door: match config.host_door {
            config::HostDoor::Tun => Door::Tun,
            config::HostDoor::Veth => Door::Veth,
        },
        transmit: [Transmit::AfXdp; 2],
        frames: config.umem.frames(),
        frame_size: config.umem.frame_size().bytes(),
        huge_pages: config.umem.huge_pages(),
        numa_node: None,
    }
}

/// Ends the process when a worker panics: a process with a dead worker would hold its queue and the host door open
/// and serve neither, while a dead process leaves both to the kernel.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Follows the fib region and publishes statistics until a signal comes.
fn watch(
    regions: Regions,
    nics: &mut BTreeMap<String, AttachedNic>,
    settings: &mut NicSettings,
    running: &[Running],
    signals: &Receiver<i32>,
) -> Result<(), HostError> {
    let mut tables = TableWatcher::new(regions.fib, regions.stats);
    let watched = running.iter().flat_map(|worker| worker.watched.clone());
    let answers =
        ask_about(nics, watched.collect()).map_err(|source| HostError::Watching { source })?;
    // Workers that fill their CPUs must not keep this thread from saying that they move. Where they may not run before
    // others, it may not either.
    let _ = pace::run_first();
    let mut door = DoorMtu::default();
    let mut vouched: Option<Instant> = None;
    loop {
        match tables.look(|node| door.before(node)) {
            Some(Ok(accepted)) => {
                tracing::info!(
                    generation = accepted.generation,
                    bytes = accepted.bytes,
                    "table accepted"
                );
                for attached in nics.values_mut() {
                    configure(attached, &accepted.node, settings)?;
                }
                running.iter().for_each(|worker| worker.waker.wake());
                door.accepted(&accepted);
            }
            Some(Err(error)) => {
                tracing::error!(%error, "new table refused, the workers go on with the one they have");
            }
            None => {}
        }
        // By the clock: on a busy machine looks come late.
        if vouched.is_none_or(|at| at.elapsed() >= VOUCH) {
            vouched = Some(Instant::now());
            publish_statistics(regions.stats, nics, running)?;
            vouch(regions.stats, nics)?;
            door.follow(regions.stats);
        }
        while let Ok(answer) = answers.try_recv() {
            follow_nic(answer, nics, running)?;
        }
        match signals.recv_timeout(WATCH) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(signal) => {
                tracing::info!(signal, "stopping");
                return Ok(());
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Tells a NIC's XDP program what is ours, if that has changed.
fn configure(
    attached: &mut AttachedNic,
    node: &Node,
    settings: &mut NicSettings,
) -> Result<(), HostError> {
    let ours = watcher::tunnel_match(node, attached.nic.index);
    if ours == attached.ours {
        return Ok(());
    }
    if ours == TunnelMatch::OFF {
        tracing::info!(
            nic = attached.nic.name,
            "the table does not name this NIC: the kernel gets all of its packets"
        );
        attached.program.disable()?;
    } else {
        keep_tags(settings, &attached.nic, ours.vlan.is_some());
        attached.program.limit_frames(attached.frame_limit());
        attached.program.configure(&ours)?;
    }
    attached.ours = ours;
    Ok(())
}

/// Sees to it that the VLAN tags of received frames stay in the frame where ours are tagged: the XDP program cannot see
/// one that the NIC has taken off, and would hand the packets of one VLAN over for those of another.
fn keep_tags(settings: &mut NicSettings, nic: &Nic, tagged: bool) {
    if !tagged {
        settings.put_back(nic, Setting::RxVlanOffload);
        return;
    }
    if let Err(error) = settings.set(nic, Setting::RxVlanOffload, "off") {
        tracing::error!(%error, "frames arrive without their VLAN tag and go the kernel's way; ethtool -K {} rxvlan off", nic.name);
    }
}

/// Changes on the NICs what the configuration asks for. None of it is needed for a packet to arrive, so that a refusal
/// is told and no more.
fn tune(
    settings: &mut NicSettings,
    workers: &[WorkerConfig],
    nics: &BTreeMap<String, AttachedNic>,
) {
    let sleepless: BTreeSet<u32> = workers
        .iter()
        .filter(|worker| worker.polling == config::Polling::Busy)
        .map(|worker| worker.cpu)
        .collect();
    for attached in nics
        .values()
        .filter(|nic| nic.mode == AttachedMode::Generic)
    {
        // There the XDP program sees what GRO has merged, which has no valid checksum (net/ipv4/tcp_offload.c,
        // tcp_gro_complete) and is longer than what was sent.
        if let Err(error) = settings.set(&attached.nic, Setting::Gro, "off") {
            tracing::warn!(
                "{error}; TCP over NIC {nic} may stall in generic mode: ethtool -K {nic} gro off",
                nic = attached.nic.name
            );
        }
    }
    for worker in workers {
        let Some(nic) = nics.get(&worker.nic).map(|attached| &attached.nic) else {
            continue;
        };
        let mut set = |setting, value: &str, advice: &str| {
            if let Err(error) = settings.set(nic, setting, value) {
                tracing::warn!("{error}; {advice}");
            }
        };
        if let Some(deferral) = worker.napi_deferral {
            let nanoseconds = u64::from(deferral.timeout_microseconds) * 1000;
            let advice = "leave napiDeferral out, or let the process write to sysfs";
            // The timeout first: interrupts that are put off without one would not come back.
            set(Setting::GroFlushTimeout, &nanoseconds.to_string(), advice);
            let hard_irqs = deferral.hard_irqs.to_string();
            set(Setting::NapiDeferHardIrqs, &hard_irqs, advice);
        }
        let on_worker_cpu = match (worker.interrupt, worker.polling) {
            (config::Interrupt::Keep, _) => continue,
            (config::Interrupt::WorkerCpu, _)
            | (config::Interrupt::Auto, config::Polling::Adaptive) => true,
            (config::Interrupt::OtherCpus, _)
            | (config::Interrupt::Auto, config::Polling::Busy) => false,
        };
        let Some(irq) = settings.queue_interrupt(nic, worker.queue) else {
            tracing::info!(
                nic = nic.name,
                queue = worker.queue,
                "no interrupt is known to be this queue's, so none is moved"
            );
            continue;
        };
        let cpus = if on_worker_cpu {
            Some(worker.cpu.to_string())
        } else {
            settings.cpus_except(&sleepless)
        };
        match cpus {
            Some(cpus) => {
                let advice = "the interrupt stays where it is: drivers with managed interrupts do not let them be moved";
                if let Err(error) = settings.set(nic, Setting::IrqAffinity(irq), &cpus) {
                    tracing::warn!("{error}; {advice}");
                }
            }
            None => tracing::warn!(
                nic = nic.name,
                queue = worker.queue,
                "no CPU is left for the interrupt: every one has a worker that never sleeps"
            ),
        }
    }
}

/// Keeps the host door's MTU at what the table says.
///
/// A worker drops what is longer than its table allows, so that the kernel must not hand it such a packet: a smaller
/// MTU comes into force before the workers see the new table, a larger one when they all have. From then on it is
/// compared again and again, because anybody may change it.
#[derive(Debug, Default)]
struct DoorMtu {
    wanted: Option<u16>,
    /// Generation of the table that says so.
    generation: u64,
    /// What went wrong last, so that it is said once.
    complaint: Option<String>,
}

impl DoorMtu {
    /// Called with a table that no worker has seen.
    fn before(&mut self, node: &Node) {
        let Some(mtu) = watcher::host_door_mtu(node) else {
            return;
        };
        if node.v6.is_some() {
            let outcome = RIP0.enable_ipv6();
            self.complain(outcome, "IPv6 is off on", "ipv6.disable=0 on the kernel's command line and /proc/sys/net/ipv6/conf/rip0/disable_ipv6 must allow it");
        }
        if RIP0.mtu().is_ok_and(|current| u32::from(mtu) < current) {
            self.set(mtu);
        }
    }

    /// Called when the workers may use the table.
    fn accepted(&mut self, accepted: &Accepted) {
        self.wanted = watcher::host_door_mtu(&accepted.node);
        self.generation = accepted.generation;
    }

    fn follow(&mut self, stats: Stats<'_>) {
        let Some(wanted) = self.wanted else { return };
        let now = map::monotonic_ns();
        let behind = stats.workers().into_iter().any(|worker| {
            let moving = now.saturating_sub(worker.heartbeat_ns) < HEARTBEAT_MAX_NS;
            moving && worker.generation != self.generation
        });
        if !behind && RIP0.mtu().is_ok_and(|current| u32::from(wanted) != current) {
            self.set(wanted);
        }
    }

    fn set(&mut self, mtu: u16) {
        let outcome = RIP0.set_mtu(mtu);
        if outcome.is_ok() {
            tracing::info!(mtu, "{} follows the table's MTU", HOST_DOOR);
        }
        let advice = format!("ip link set dev {} mtu {mtu}", HOST_DOOR);
        self.complain(outcome, "the MTU cannot be changed on", &advice);
    }

    fn complain(&mut self, outcome: io::Result<()>, what: &str, advice: &str) {
        let Err(error) = outcome else { return };
        let text = format!("{what} {}: {error}; {advice}", HOST_DOOR);
        if self.complaint.as_ref() != Some(&text) {
            tracing::error!("{text}");
            self.complaint = Some(text);
        }
    }
}

/// Tells the XDP programs which workers move. Nobody vouches for a process that is stopped: the kernel then gets its
/// packets as if it were dead.
fn vouch(stats: Stats<'_>, nics: &BTreeMap<String, AttachedNic>) -> Result<(), HostError> {
    let now = map::monotonic_ns();
    for worker in stats.workers() {
        let moving = now.saturating_sub(worker.heartbeat_ns) < HEARTBEAT_MAX_NS;
        if let Some(attached) = nics.get(&worker.identity.nic).filter(|_| moving) {
            attached
                .program
                .keep_alive(worker.identity.queue, now + BELIEF_NS)?;
        }
    }
    Ok(())
}

/// Asks about the NICs every second, in a thread of its own: drivers answer under the kernel's one lock for network
/// devices, which somebody else may hold for seconds, and the watcher must not wait.
fn ask_about(
    nics: &BTreeMap<String, AttachedNic>,
    watched: Vec<(Frames, Arc<Switch>)>,
) -> io::Result<Receiver<Answer>> {
    let (sender, answers) = crossbeam::channel::bounded(nics.len().max(1));
    let names: Vec<String> = nics.keys().cloned().collect();
    std::thread::Builder::new()
        .name("nics".to_owned())
        .spawn(move || {
            loop {
                for name in &names {
                    if sender.send((name.clone(), Nic::open(name))).is_err() {
                        return;
                    }
                }
                for (frames, switch) in &watched {
                    frames.watch(switch);
                }
                std::thread::sleep(ASK);
            }
        })?;
    Ok(answers)
}

/// A NIC's name, and what the kernel says about it.
type Answer = (String, Result<Nic, NicError>);

/// Notices what has become of a NIC. A socket on a queue that exists no more receives nothing and says nothing, and so
/// does one whose error somebody has read: hence the question is put to the NIC.
fn follow_nic(
    (name, answer): Answer,
    nics: &mut BTreeMap<String, AttachedNic>,
    running: &[Running],
) -> Result<(), HostError> {
    let Some(attached) = nics.get_mut(&name) else {
        return Ok(());
    };
    let nic = match answer {
        Ok(nic) if nic.index == attached.nic.index => nic,
        Ok(_) | Err(NicError::Unknown { .. }) => return Err(HostError::NicVanished { nic: name }),
        Err(error) => return Err(HostError::Facts(error.into())),
    };
    let queues: Vec<u32> = running
        .iter()
        .filter(|worker| worker.socket.interface().index() == nic.index)
        .map(|worker| worker.socket.queue())
        .collect();
    if let Some(queue) = queues.iter().find(|queue| **queue >= nic.rx_queues) {
        return Err(HostError::QueueGone {
            nic: name,
            queue: *queue,
            queues: nic.rx_queues,
        });
    }
    if nic.rx_queues != attached.nic.rx_queues {
        let uncovered: Vec<u32> = (0..nic.rx_queues)
            .filter(|queue| !queues.contains(queue))
            .collect();
        tracing::warn!(
            nic = name,
            before = attached.nic.rx_queues,
            now = nic.rx_queues,
            "the NIC's queues have changed; the kernel carries the tunnel packets of those without a worker: {uncovered:?}"
        );
    }
    let before = attached.frame_limit();
    attached.nic = nic;
    let limit = attached.frame_limit();
    if limit != before && attached.ours != TunnelMatch::OFF {
        attached.program.limit_frames(limit);
        attached.program.configure(&attached.ours)?;
    }
    Ok(())
}

fn publish_statistics(
    stats: Stats<'_>,
    nics: &BTreeMap<String, AttachedNic>,
    running: &[Running],
) -> Result<(), HostError> {
    for attached in nics.values() {
        let counters = attached.program.counters()?;
        let native = attached.mode == AttachedMode::Native;
        let of_nic = watcher::nic_stats(
            &attached.nic.name,
            attached.nic.rx_queues,
            native,
            &counters,
        );
        stats.write_nic(attached.index, &of_nic);
    }
    for (index, worker) in running.iter().enumerate() {
        let socket = &worker.socket;
        let gone = |source| HostError::NicGone {
            nic: socket.interface().name().to_owned(),
            queue: socket.queue(),
            source,
        };
        socket.socket_error().map_err(gone)?;
        let kernel = socket.statistics().map_err(gone)?;
        let mut values = [0; KernelCounter::COUNT];
        values[KernelCounter::RxDropped as usize] = kernel.rx_dropped;
        values[KernelCounter::RxInvalidDescriptors as usize] = kernel.rx_invalid_descs;
        values[KernelCounter::TxInvalidDescriptors as usize] = kernel.tx_invalid_descs;
        values[KernelCounter::RxRingFull as usize] = kernel.rx_ring_full;
        values[KernelCounter::FillRingEmpty as usize] = kernel.rx_fill_ring_empty_descs;
        values[KernelCounter::TxRingEmpty as usize] = kernel.tx_ring_empty_descs;
        if let Some(door) = &worker.door {
            // Its far end goes only with the process, so that there is nothing to be told of errors.
            let door = door.statistics().unwrap_or_default();
            values[KernelCounter::HostDropped as usize] = door.rx_dropped + door.rx_ring_full;
        }
        stats.write_kernel(index, &values);
    }
    Ok(())
}

/// Hands the traffic back to the kernel, then lets the workers finish what they have.
///
/// The kernel drops what is routed to a device between taking it down and withdrawing its routes, which is some
/// milliseconds. So the control plane gets the time to withdraw them first: it sees that there are no workers. If it
/// is dead, those milliseconds are lost.
fn shut_down(
    stats: Stats<'_>,
    nics: &mut BTreeMap<String, AttachedNic>,
    running: Vec<Running>,
    stop: &AtomicBool,
) {
    stats.announce(0, nics.len());
    for attached in nics.values_mut() {
        if let Err(error) = attached.program.disable() {
            tracing::warn!(%error, "the XDP program could not be switched off; it goes with the process");
        }
    }
    std::thread::sleep(WITHDRAW);
    if let Err(error) = RIP0.take_down() {
        tracing::warn!(%error, "{} could not be taken down; it goes with the process", HOST_DOOR);
    }
    std::thread::sleep(DRAIN);
    stop.store(true, Ordering::Relaxed);
    for worker in running {
        worker.waker.wake();
        // A worker that panicked has ended the process already.
        let _ = worker.thread.join();
    }
    tracing::info!("data plane stopped");
}
