//! The region that the data plane writes and everybody else reads: heartbeats, pins, counters.
//!
//! ```text
//!   word 0    magic          4  process id        8   pin of the watcher: the image that it has accepted
//!        1    ABI version    5  started, ns       16  pin of the watcher: the image that it is checking
//!        2    words          6  workers           24  image that the workers may use
//!        3    most workers   7  NICs
//!   word 64   NIC blocks     (16 × 32 words)   name, queues, XDP mode, counters of the XDP program
//!   word 640  worker blocks  (64 × 256 words)  pin │ identity │ heartbeat │ counters │ drops │ gauges
//! ```
//!
//! A worker counts in plain integers of its own and copies them here in housekeeping, so no counter's cache line is
//! written per packet. The pin has a cache line for itself. Times are CLOCK_MONOTONIC in nanoseconds, which all
//! processes of a machine share.
//!
//! Readers map the region read-only, so they load relaxed and put an acquire fence behind (see [`crate::publish`]):
//!
//! **SYNC format.** The magic is stored last, with release: who sees it sees the rest of the header.
//! **SYNC announce.** The number of workers is stored with release after their identities and the number of NICs: who
//! counts a worker sees its name. **SYNC heartbeat.** A worker's heartbeat is stored with release after its counters:
//! the counters are never older than the heartbeat beside them. None of these guards memory that is written again, so
//! weakening one makes a report stale, not torn.

use alloc::string::String;
use alloc::vec::Vec;

use crate::ABI_VERSION;
use crate::drop_reason::DropReason;
use crate::publish::{ImageRef, RegionError, check_header};
use crate::sync::{Ordering, Word, fence};

/// First word of a stats region: "RIPSSTA1".
pub const STATS_MAGIC: u64 = u64::from_le_bytes(*b"RIPSSTA1");
/// Most workers of one data plane.
pub const WORKERS: usize = 64;
/// Most NICs of one data plane.
pub const NICS: usize = 16;
/// Words of the region.
pub const STATS_WORDS: usize = WORKER_BLOCKS + WORKERS * WORKER_WORDS;

const WATCHER_PIN: usize = 8;
const CHECKING_PIN: usize = 16;
const ACCEPTED: usize = 24;
const NIC_BLOCKS: usize = 64;
const NIC_WORDS: usize = 32;
const WORKER_BLOCKS: usize = 640;
const WORKER_WORDS: usize = 256;

const NIC_NAME: usize = 0; // 2 words
const NIC_FACTS: usize = 2;
const NIC_COUNTERS: usize = 8;

const W_PIN: usize = 0;
const W_NAME: usize = 8; // 2 words
const W_PLACE: usize = 10;
const W_FACTS: usize = 11;
const W_FRAMES: usize = 12;
const W_MEMORY: usize = 13;
const W_WANTED: usize = 14;
const W_HEARTBEAT: usize = 16;
const W_GENERATION: usize = 17;
const W_COUNTERS: usize = 32;
const W_DROPS: usize = 96;
const W_GAUGES: usize = 192;
const W_KERNEL: usize = 208;

macro_rules! catalogue {
    ($(#[doc = $enum_doc:literal])+ $enum:ident { $($(#[doc = $doc:literal])+ $variant:ident = $name:literal;)+ }) => {
        $(#[doc = $enum_doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(usize)]
        pub enum $enum { $($(#[doc = $doc])+ $variant,)+ }

        impl $enum {
            /// All of them, in the order of their place in the region.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in JSON and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it counts, in a sentence.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)+).trim_ascii_start(),)+ }
            }
        }
    };
}

catalogue! {
    /// What a worker counts, apart from drops.
    Counter {
        /// Packets received from the NIC queue.
        NicRxPackets = "nic_rx_packets";
        /// Bytes of those, outer headers included.
        NicRxBytes = "nic_rx_bytes";
        /// Packets handed to the NIC queue for transmission.
        NicTxPackets = "nic_tx_packets";
        /// Bytes of those, outer headers included.
        NicTxBytes = "nic_tx_bytes";
        /// Packets received from the host door.
        HostRxPackets = "host_rx_packets";
        /// Bytes of those.
        HostRxBytes = "host_rx_bytes";
        /// Packets delivered to the host door.
        HostTxPackets = "host_tx_packets";
        /// Bytes of those.
        HostTxBytes = "host_tx_bytes";
        /// Turns of the loop.
        Turns = "turns";
        /// Turns that moved at least one packet.
        BusyTurns = "busy_turns";
        /// Times that the worker went to sleep for want of packets.
        Sleeps = "sleeps";
        /// System calls that told the kernel to transmit or to refill.
        Kicks = "kicks";
        /// Images that the worker changed to.
        ImageSwitches = "image_switches";
        /// Cycles of the processor's time-stamp counter in turns that had a packet in hand; 0 where there is no such counter.
        BusyCycles = "busy_cycles";
        /// The same in turns that had none. Sleep is in neither.
        IdleCycles = "idle_cycles";
        /// Super-packets that the host handed over uncut.
        HostRxSuperPackets = "host_rx_super_packets";
        /// Packets received from the host door that were cut from those.
        HostRxCutPackets = "host_rx_cut_packets";
        /// Super-packets that were joined for the host.
        HostTxSuperPackets = "host_tx_super_packets";
        /// Packets delivered to the host door that went into those.
        HostTxJoinedPackets = "host_tx_joined_packets";
        /// Cycles of the time-stamp counter from the end of the turn before a sleep until the worker was awake again.
        AsleepCycles = "asleep_cycles";
    }
}

catalogue! {
    /// How many frames of a worker's UMEM are where; together they are all frames.
    Gauge {
        /// Free, in the worker's pool.
        Free = "free";
        /// With the NIC queue for receiving: in the fill ring, with the driver, or in the receive ring.
        Receiving = "receiving";
        /// With the NIC queue for transmission: in the transmit ring, with the driver, or in the completion ring.
        Transmitting = "transmitting";
        /// In the worker's hands at this moment.
        Held = "held";
    }
}

catalogue! {
    /// Statistics that the kernel keeps of an AF_XDP socket (`struct xdp_statistics`, include/uapi/linux/if_xdp.h).
    KernelCounter {
        /// Packets that the kernel dropped for reasons other than a full ring, such as a packet larger than a frame.
        RxDropped = "rx_dropped";
        /// Descriptors that the kernel found invalid in the fill ring.
        RxInvalidDescriptors = "rx_invalid_descriptors";
        /// Descriptors that the kernel found invalid in the transmit ring.
        TxInvalidDescriptors = "tx_invalid_descriptors";
        /// Packets that the kernel dropped because the receive ring was full: the worker is too slow or was stopped.
        RxRingFull = "rx_ring_full";
        /// Times that the kernel found no frame in the fill ring.
        FillRingEmpty = "fill_ring_empty";
        /// Times that the kernel found nothing to send in the transmit ring.
        TxRingEmpty = "tx_ring_empty";
        /// Packets of this node that the kernel dropped on the way to the worker: the host door's socket had no room, or the packet did not fit a frame. Of a TUN device the kernel counts them as dropped by rip0.
        HostDropped = "host_dropped";
    }
}

catalogue! {
    /// What became of the frames that the XDP program of a NIC saw. Each frame has exactly one outcome.
    XdpCounter {
        /// Packet from another node's pod, handed to the worker of its receive queue.
        Redirected = "redirected";
        /// Such a packet on a receive queue without a worker, left to the kernel: add a configuration file for that queue.
        NoSocket = "no_socket";
        /// Fragment to this node's tunnel address, left to the kernel: a path MTU below the tunnel's outer packet.
        Fragment = "fragment";
        /// Packet with IP options or IPv6 extension headers to this node's tunnel, left to the kernel.
        IpOptions = "ip_options";
        /// Tunnel packet whose IP, UDP and frame lengths disagree, left to the kernel: a broken or hostile sender.
        BadLength = "bad_length";
        /// Tunnel packet with unknown VXLAN flags or reserved bits, left to the kernel: a sender with extensions.
        VxlanFlags = "vxlan_flags";
        /// Tunnel packet of another VNI, left to the kernel: another overlay, or a peer configured differently.
        OtherVni = "other_vni";
        /// Packet longer than a UMEM frame, left to the kernel: raise umem.frameSize; in generic mode GRO makes them.
        TooLong = "too_long";
        /// Not for a worker, left to the kernel.
        PassedOther = "passed_other";
        /// Packet for a worker that has stopped moving, left to the kernel: look for a stopped or starved data plane.
        Stalled = "stalled";
        /// Frame of another VLAN than the underlay's, left to the kernel: another network; or the NIC has taken the tag off.
        OtherVlan = "other_vlan";
        /// Tunnel packet over IPv6 without a UDP checksum, left to the kernel: a sender that is configured to omit it.
        UdpChecksum = "udp_checksum";
    }
}

catalogue! {
    /// How a worker's socket is bound, as the kernel reports it.
    Mode {
        /// The NIC reads and writes the UMEM itself.
        ZeroCopy = "zero-copy";
        /// The kernel copies between the NIC's buffers and the UMEM.
        Copy = "copy";
        /// Copy mode behind generic XDP, for NICs whose driver has no XDP: the slowest.
        Generic = "generic";
    }
}

catalogue! {
    /// How a worker waits for packets.
    Polling {
        /// Always turning.
        Busy = "busy";
        /// Turning while there are packets, asleep in poll(2) when there are none.
        Adaptive = "adaptive";
    }
}

catalogue! {
    /// What the host door is.
    Door {
        /// A TUN device: super-packets, a system call for each.
        Tun = "tun";
        /// A veth pair with an AF_XDP socket on its far end: small packets for less.
        Veth = "veth";
    }
}

catalogue! {
    /// How a worker sends on a device that it has a socket on.
    Transmit {
        /// By the socket.
        AfXdp = "af-xdp";
        /// Large bursts by XDP live frames, the rest by the socket.
        Inject = "inject";
        /// Super-packets whole, through a TAP device, the rest by the socket.
        TunnelGso = "tunnel-gso";
    }
}

const _: () = assert!(W_COUNTERS + Counter::COUNT <= W_DROPS);
const _: () = assert!(W_DROPS + DropReason::COUNT <= W_GAUGES);
const _: () = assert!(W_GAUGES + Gauge::COUNT <= W_KERNEL);
const _: () = assert!(W_KERNEL + KernelCounter::COUNT <= WORKER_WORDS);
const _: () = assert!(NIC_BLOCKS + NICS * NIC_WORDS <= WORKER_BLOCKS);
const _: () = assert!(NIC_COUNTERS + XdpCounter::COUNT <= NIC_WORDS);

/// What does not change while a worker runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerIdentity {
    /// Name of the NIC, at most 15 bytes.
    pub nic: String,
    /// Queue of the NIC.
    pub queue: u32,
    /// CPU that the worker is pinned to.
    pub cpu: u32,
    /// Mode in use.
    pub mode: Mode,
    /// The configuration asks for zero-copy, or for the best there is. False also where the writer does not say.
    pub wants_zero_copy: bool,
    /// How it waits.
    pub polling: Polling,
    /// Its way into the host.
    pub door: Door,
    /// How it sends on the NIC, and to a host door that is a veth pair.
    pub transmit: [Transmit; 2],
    /// Frames of its UMEM.
    pub frames: u32,
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Whether the UMEM lies on huge pages.
    pub huge_pages: bool,
    /// NUMA node that the UMEM is bound to, on machines that have several.
    pub numa_node: Option<u16>,
}

/// What a worker has counted, in plain integers of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCounters {
    /// Indexed by [`Counter`].
    pub counters: [u64; Counter::COUNT],
    /// Indexed by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

impl Default for WorkerCounters {
    fn default() -> Self {
        Self {
            counters: [0; Counter::COUNT],
            drops: [0; DropReason::COUNT],
        }
    }
}

impl WorkerCounters {
    /// The value of a counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }

    /// Adds to a counter.
    #[inline]
    pub fn add(&mut self, counter: Counter, count: u64) {
        self.counters[counter as usize] += count;
    }

    /// Counts a dropped packet.
    #[inline]
    pub fn dropped(&mut self, reason: DropReason) {
        self.drops[reason.index()] += 1;
    }

    /// All drops together; saturates, since the counts may come from a damaged region.
    pub fn drops_total(&self) -> u64 {
        self.drops
            .iter()
            .fold(0, |total, count| total.saturating_add(*count))
    }
}

/// What the XDP program of a NIC counted, and how it is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicStats {
    /// Name of the NIC, at most 15 bytes.
    pub nic: String,
    /// Queues that the NIC has.
    pub queues: u32,
    /// Whether the program runs in the driver (native) or in the generic hook.
    pub native: bool,
    /// Indexed by [`XdpCounter`].
    pub counters: [u64; XdpCounter::COUNT],
}

/// What a reader sees of one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerStats {
    /// What does not change.
    pub identity: WorkerIdentity,
    /// Time of the last housekeeping, CLOCK_MONOTONIC in nanoseconds.
    pub heartbeat_ns: u64,
    /// Generation of the image in use; 0 if none.
    pub generation: u64,
    /// Counters and drops.
    pub counters: WorkerCounters,
    /// Indexed by [`Gauge`].
    pub gauges: [u64; Gauge::COUNT],
    /// Indexed by [`KernelCounter`].
    pub kernel: [u64; KernelCounter::COUNT],
}

/// A stats region whose header has been checked.
#[derive(Debug, Clone, Copy)]
pub struct Stats<'r> {
    words: &'r [Word],
}

impl<'r> Stats<'r> {
    /// Writes the header of an empty region into zeroed words. Only the data plane does this.
    ///
    /// # Panics
    /// When `words` is not [`STATS_WORDS`] long: the caller sized it.
    pub fn format(words: &'r [Word], pid: u32, now_ns: u64) -> Self {
        assert_eq!(words.len(), STATS_WORDS, "a stats region has a fixed size");
        words[1].store(u64::from(ABI_VERSION), Ordering::Relaxed);
        words[2].store(STATS_WORDS as u64, Ordering::Relaxed);
        words[3].store(WORKERS as u64, Ordering::Relaxed);
        words[4].store(u64::from(pid), Ordering::Relaxed);
        words[5].store(now_ns, Ordering::Relaxed);
        words[0].store(STATS_MAGIC, Ordering::Release); // SYNC format
        Self { words }
    }

    /// Checks the header of an existing region.
    ///
    /// # Errors
    /// When the magic, the version or the size is wrong.
    pub fn attach(words: &'r [Word]) -> Result<Self, RegionError> {
        let wrong = check_header(words, STATS_MAGIC)?;
        if words.len() == STATS_WORDS {
            Ok(Self { words })
        } else {
            Err(wrong)
        }
    }

    /// Process id of the data plane that wrote the header.
    pub fn pid(&self) -> u64 {
        self.load(4)
    }

    /// When that process started, CLOCK_MONOTONIC in nanoseconds.
    pub fn started_ns(&self) -> u64 {
        self.load(5)
    }

    /// Generation of the image that the data plane has checked and lets its workers use; 0 if none.
    pub fn accepted_generation(&self) -> u64 {
        ImageRef(self.load(ACCEPTED)).generation()
    }

    /// The word through which the watcher passes an accepted image on to the workers. Only the watcher stores it.
    pub fn accepted(&self) -> &'r Word {
        &self.words[ACCEPTED]
    }

    /// The two pins of the watcher: of the accepted image, and of the one being checked. Only the watcher stores them.
    pub fn watcher_pins(&self) -> (&'r Word, &'r Word) {
        (&self.words[WATCHER_PIN], &self.words[CHECKING_PIN])
    }

    /// The pin of a worker. Only that worker stores it.
    ///
    /// # Panics
    /// When `worker` is not below [`WORKERS`].
    pub fn worker_pin(&self, worker: usize) -> &'r Word {
        self.worker_word(worker, W_PIN)
    }

    /// Every pin of the region, for the publisher.
    pub fn pins(&self) -> Vec<&'r Word> {
        let (accepted, checking) = self.watcher_pins();
        let workers = (0..WORKERS).map(|worker| self.worker_pin(worker));
        [accepted, checking].into_iter().chain(workers).collect()
    }

    /// Says how many workers and NICs there are; their identities have been written before.
    pub fn announce(&self, workers: usize, nics: usize) {
        self.words[7].store(nics as u64, Ordering::Relaxed);
        self.words[6].store(workers as u64, Ordering::Release); // SYNC announce
    }

    /// Writes the identity of a worker.
    ///
    /// # Panics
    /// When `worker` is not below [`WORKERS`].
    pub fn write_identity(&self, worker: usize, identity: &WorkerIdentity) {
        let [low, high] = pack_name(&identity.nic);
        self.worker_word(worker, W_NAME)
            .store(low, Ordering::Relaxed);
        self.worker_word(worker, W_NAME + 1)
            .store(high, Ordering::Relaxed);
        let place = u64::from(identity.queue) | (u64::from(identity.cpu) << 32);
        self.worker_word(worker, W_PLACE)
            .store(place, Ordering::Relaxed);
        let facts = identity.mode as u64
            | ((identity.polling as u64) << 8)
            | ((identity.door as u64) << 16)
            | ((identity.transmit[0] as u64) << 24)
            | ((identity.transmit[1] as u64) << 32);
        self.worker_word(worker, W_FACTS)
            .store(facts, Ordering::Relaxed);
        let frames = u64::from(identity.frames) | (u64::from(identity.frame_size) << 32);
        self.worker_word(worker, W_FRAMES)
            .store(frames, Ordering::Relaxed);
        self.worker_word(worker, W_WANTED)
            .store(u64::from(identity.wants_zero_copy), Ordering::Relaxed);
        let node = identity.numa_node.map_or(0, |node| 1 + u64::from(node));
        let memory = u64::from(identity.huge_pages) | node << 8;
        self.worker_word(worker, W_MEMORY)
            .store(memory, Ordering::Relaxed);
    }

    /// Publishes a worker's counters, then its heartbeat.
    ///
    /// # Panics
    /// When `worker` is not below [`WORKERS`].
    pub fn write_worker(
        &self,
        worker: usize,
        counters: &WorkerCounters,
        gauges: &[u64; Gauge::COUNT],
        generation: u64,
        now_ns: u64,
    ) {
        self.store_all(worker, W_COUNTERS, &counters.counters);
        self.store_all(worker, W_DROPS, &counters.drops);
        self.store_all(worker, W_GAUGES, gauges);
        self.worker_word(worker, W_GENERATION)
            .store(generation, Ordering::Relaxed);
        self.worker_word(worker, W_HEARTBEAT)
            .store(now_ns, Ordering::Release); // SYNC heartbeat
    }

    /// Publishes the kernel's statistics of a worker's socket.
    ///
    /// # Panics
    /// When `worker` is not below [`WORKERS`].
    pub fn write_kernel(&self, worker: usize, kernel: &[u64; KernelCounter::COUNT]) {
        self.store_all(worker, W_KERNEL, kernel);
    }

    /// Publishes what the XDP program of a NIC counted.
    ///
    /// # Panics
    /// When `nic` is not below [`NICS`].
    pub fn write_nic(&self, nic: usize, stats: &NicStats) {
        assert!(nic < NICS, "a data plane has at most {NICS} NICs");
        let base = NIC_BLOCKS + nic * NIC_WORDS;
        let [low, high] = pack_name(&stats.nic);
        self.words[base + NIC_NAME].store(low, Ordering::Relaxed);
        self.words[base + NIC_NAME + 1].store(high, Ordering::Relaxed);
        let facts = u64::from(stats.queues) | (u64::from(stats.native) << 32);
        self.words[base + NIC_FACTS].store(facts, Ordering::Relaxed);
        for (index, value) in stats.counters.iter().enumerate() {
            self.words[base + NIC_COUNTERS + index].store(*value, Ordering::Relaxed);
        }
    }

    /// All workers, as last published.
    pub fn workers(&self) -> Vec<WorkerStats> {
        (0..self.announced())
            .map(|worker| self.worker(worker))
            .collect()
    }

    /// All NICs, as last published.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "narrow values are packed into words"
    )]
    pub fn nics(&self) -> Vec<NicStats> {
        self.announced(); // Makes the number of NICs and their names visible.
        let count = usize::try_from(self.load(7)).unwrap_or(0).min(NICS);
        let nic = |index: usize| {
            let base = NIC_BLOCKS + index * NIC_WORDS;
            let facts = self.load(base + NIC_FACTS);
            NicStats {
                nic: unpack_name([self.load(base + NIC_NAME), self.load(base + NIC_NAME + 1)]),
                queues: facts as u32,
                native: facts >> 32 != 0,
                counters: core::array::from_fn(|counter| self.load(base + NIC_COUNTERS + counter)),
            }
        };
        (0..count).map(nic).collect()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "narrow values are packed into words"
    )]
    fn worker(&self, worker: usize) -> WorkerStats {
        let load = |field: usize| self.worker_word(worker, field).load(Ordering::Relaxed);
        let heartbeat_ns = load(W_HEARTBEAT);
        fence(Ordering::Acquire); // SYNC heartbeat
        let (place, facts, frames, memory) =
            (load(W_PLACE), load(W_FACTS), load(W_FRAMES), load(W_MEMORY));
        let mode = Mode::ALL
            .get((facts & 0xff) as usize)
            .copied()
            .unwrap_or(Mode::Generic);
        let polling = Polling::ALL
            .get(((facts >> 8) & 0xff) as usize)
            .copied()
            .unwrap_or(Polling::Adaptive);
        let door = Door::ALL
            .get(((facts >> 16) & 0xff) as usize)
            .copied()
            .unwrap_or(Door::Tun);
        let transmit = [24, 32].map(|shift| {
            let kind = Transmit::ALL.get(((facts >> shift) & 0xff) as usize);
            kind.copied().unwrap_or(Transmit::AfXdp)
        });
        WorkerStats {
            identity: WorkerIdentity {
                nic: unpack_name([load(W_NAME), load(W_NAME + 1)]),
                queue: place as u32,
                cpu: (place >> 32) as u32,
                mode,
                wants_zero_copy: load(W_WANTED) & 1 != 0,
                polling,
                door,
                transmit,
                frames: frames as u32,
                frame_size: (frames >> 32) as u32,
                huge_pages: memory & 1 != 0,
                numa_node: ((memory >> 8) as u32)
                    .checked_sub(1)
                    .map(|node| node as u16),
            },
            heartbeat_ns,
            generation: load(W_GENERATION),
            counters: WorkerCounters {
                counters: core::array::from_fn(|index| load(W_COUNTERS + index)),
                drops: core::array::from_fn(|index| load(W_DROPS + index)),
            },
            gauges: core::array::from_fn(|index| load(W_GAUGES + index)),
            kernel: core::array::from_fn(|index| load(W_KERNEL + index)),
        }
    }

    /// Number of workers announced; what was written before the announcement is visible behind this.
    fn announced(&self) -> usize {
        let count = usize::try_from(self.load(6)).unwrap_or(0).min(WORKERS);
        fence(Ordering::Acquire); // SYNC announce
        count
    }

    fn store_all(&self, worker: usize, first: usize, values: &[u64]) {
        for (index, value) in values.iter().enumerate() {
            self.worker_word(worker, first + index)
                .store(*value, Ordering::Relaxed);
        }
    }

    fn worker_word(&self, worker: usize, field: usize) -> &'r Word {
        assert!(
            worker < WORKERS,
            "a data plane has at most {WORKERS} workers"
        );
        &self.words[WORKER_BLOCKS + worker * WORKER_WORDS + field]
    }

    fn load(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Relaxed)
    }
}

/// A device name in two words: at most 15 bytes (IFNAMSIZ - 1), zero-ended.
fn pack_name(name: &str) -> [u64; 2] {
    let mut bytes = [0u8; 16];
    let kept = name.len().min(15);
    bytes[..kept].copy_from_slice(&name.as_bytes()[..kept]);
    let word = |half: &[u8]| {
        half.iter()
            .rev()
            .fold(0u64, |word, byte| (word << 8) | u64::from(*byte))
    };
    [word(&bytes[..8]), word(&bytes[8..])]
}

fn unpack_name(words: [u64; 2]) -> String {
    let bytes: Vec<u8> = words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
