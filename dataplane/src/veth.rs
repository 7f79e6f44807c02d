//! The host door as one end of a veth pair: `rip0`, one queue per worker, and an AF_XDP socket on each queue of the
//! other end.
//!
//! ```text
//!   the node's namespace          an unnamed namespace, which only this process holds
//!   ┌──────────────────┐          ┌─────────────────────────────────────────────────┐
//!   │ kernel ── rip0 ══╪══ veth ══╪══ far ── XDP: queue n ──► AF_XDP socket of worker n │
//!   └──────────────────┘          └─────────────────────────────────────────────────┘
//! ```
//!
//! The sockets lie on the workers' own UMEMs, so a packet goes from the NIC to the host and back without a copy of
//! ours. When the process dies, however it dies, nobody holds the namespace: the kernel destroys it, with it the pair,
//! with it every route through `rip0`, and the next packet takes the main table.
//!
//! Packets here have an Ethernet header, which means nothing: it is taken off what comes from the kernel, and put on
//! what goes there. There are no super-packets: the kernel cuts what pods give it, with all checksums, before it gets
//! here. Small packets are cheaper than through a TUN device, bulk transfers dearer.
#![expect(
    unsafe_code,
    reason = "namespaces and netlink have no safe interface in std"
)]

use core::time::Duration;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use af_xdp::{Interface, Registration, Socket, SocketHandle, SocketOptions, Umem};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object};

use crate::config;
use crate::door::{Device, HOST_DOOR, RIP0, check};
use crate::inject::{Injector, aims};
use crate::nic_queue::NicQueue;
use crate::nic_settings::own_sysfs;
use crate::port::{Burst, Port, Transmitted};
use crate::verdict::DropReason;
use crate::xdp::{self, Aligned, AttachedMode, XdpError};

/// Largest MTU: what a frame in one buffer can have on a veth pair with an XDP program: 3506 where a page has 4096
/// bytes and a cache line 64 (`veth_xdp_set`, drivers/net/veth.c).
const MTU_MAX: u32 = 3506;

/// Ethernet header.
const ETHERNET: usize = 14;
/// The other end of the pair.
const FAR: Device = Device("far");
/// How long to wait for the `rip0` of a process that has died to go. The kernel takes some milliseconds.
const GONE: Duration = Duration::from_secs(5);
const GONE_LOOK: Duration = Duration::from_millis(5);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/door.bpf.o")));

/// Why the host door could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VethError {
    /// The far end has no place to live.
    #[error(
        "make a network namespace for the far end of {HOST_DOOR}: {source}; it takes CAP_SYS_ADMIN, or set hostDoor.kind to \"tun\""
    )]
    Namespace {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused an operation on the pair.
    #[error("{operation} {HOST_DOOR}: {source}; {advice}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// The XDP program of the far end could not be loaded or used.
    #[error(transparent)]
    Xdp(#[from] XdpError),
}

fn refused(operation: &'static str, advice: &'static str) -> impl Fn(io::Error) -> VethError {
    move |source| VethError::Refused {
        operation,
        source,
        advice,
    }
}

/// Largest packet that the kernel can hand over in frames of this size.
pub fn mtu_max(frame: config::FrameSize) -> u32 {
    const { assert!(ETHERNET == 14) };
    MTU_MAX.min(frame.packet_bytes_max() - 14)
}

/// A network namespace without a name.
#[derive(Debug)]
pub(crate) struct Namespace(OwnedFd);

impl Namespace {
    pub(crate) fn new() -> io::Result<Self> {
        elsewhere(|| {
            // SAFETY: takes a number; only this thread changes its namespace.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?.into()))
        })
    }

    /// Runs `work` in a thread that is in the namespace.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        elsewhere(|| {
            // SAFETY: takes an open descriptor and a number; only this thread changes its namespace.
            check(unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) })?;
            Ok(work())
        })
    }
}

/// Runs `work` in a thread of its own, for what cannot be taken back.
fn elsewhere<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        let panicked = |_payload| io::Error::other("a thread for another namespace panicked");
        thread.join().map_err(panicked)?
    })
}

/// The pair, its far namespace, and the program that leads to the workers.
#[derive(Debug)]
pub struct VethDoor {
    _pair: Pair,
    /// Until all sockets are open. From then on they alone hold it: closing the last of them is what the kernel does
    /// first about a process that has died (descriptors go from the highest down), and is all that the pair waits for.
    far: Option<Namespace>,
    sockets: MapHandle,
    _program: Object,
    _link: OwnedFd,
    /// Ethernet header of packets to the kernel, but for the type.
    macs: [u8; 12],
    spread: Vec<Option<Spread>>,
}

impl VethDoor {
    /// Makes the pair with `queues` queues and brings it up. What the kernel sends is dropped until there are sockets.
    ///
    /// # Errors
    /// When an interface of this name exists and does not go, or the process lacks CAP_SYS_ADMIN (for the namespace) or
    /// CAP_NET_ADMIN.
    ///
    /// To take live frames `rip0` must have its own receive routine, which it gets with GRO.
    pub fn open(queues: usize, live_frames: bool) -> Result<Self, VethError> {
        let far = Namespace::new().map_err(|source| VethError::Namespace { source })?;
        let pair = Pair::new(queues, &far)?;
        RIP0.keep_quiet();
        RIP0.accept_any_source();
        // Ahead of bringing the far end up, which is when the kernel looks whether it takes frames.
        RIP0.ethtool(ETHTOOL_SGRO, live_frames.into())
            .map_err(refused(
                "switch GRO on or off on",
                "the process needs CAP_NET_ADMIN",
            ))?;
        let object = xdp::load_object(&OBJECT.0, "door", |_open| Ok(()))?;
        let program = object.progs().next();
        let program = program.ok_or(XdpError::Layout { what: "program" })?;
        let map = object.maps().find(|map| map.name() == "sockets");
        let map = map.ok_or(XdpError::Layout { what: "socket map" })?;
        let sockets = MapHandle::try_from(&map)
            .map_err(|source| xdp::refused("hold the host door's socket map", source))?;
        let in_far = refused(
            "enter the namespace of the far end of",
            "the process needs CAP_SYS_ADMIN",
        );
        let set_up = refused(
            "set up the far end of",
            "the process needs CAP_NET_ADMIN, and the kernel a veth driver with XDP (4.19)",
        );
        let program_fd = program.as_fd();
        let (link, far_mac) = far
            .run(|| {
                FAR.keep_quiet();
                // What rip0 may send, the far end must take, whatever the table makes of rip0's MTU.
                FAR.set_mtu(u16::MAX)?;
                let interface = Interface::by_name(FAR.0).map_err(io::Error::other)?;
                let link = xdp::link_create(program_fd, interface.index(), AttachedMode::Native)?;
                FAR.set_up()?;
                Ok((link, FAR.mac()?))
            })
            .map_err(in_far)?
            .map_err(&set_up)?;
        // Left on, checksums would arrive unfinished (and those of SCTP); segmentation is off where XDP is on.
        RIP0.ethtool(ETHTOOL_STXCSUM, 0).map_err(refused(
            "switch checksum offload off on",
            "the process needs CAP_NET_ADMIN",
        ))?;
        let mut macs = [0; 12];
        macs[..6].copy_from_slice(&RIP0.mac().map_err(set_up)?);
        macs[6..].copy_from_slice(&far_mac);
        let spread = Spread::of(queues);
        RIP0.set_up()
            .map_err(refused("bring up", "the process needs CAP_NET_ADMIN"))?;
        Ok(Self {
            _pair: pair,
            far: Some(far),
            sockets,
            _program: object,
            _link: link,
            macs,
            spread,
        })
    }

    /// Opens a worker's queue on the worker's UMEM. `reserve` frames are never lent to the kernel for receiving. The
    /// injector, if given, is for the same UMEM; it is not used if the kernel does not take live frames here.
    ///
    /// # Errors
    /// What [`Socket::open`] says, or the kernel's refusal to lead packets to it.
    pub fn queue(
        &mut self,
        queue: usize,
        umem: &mut Umem,
        options: &SocketOptions,
        reserve: usize,
        injector: Option<Injector>,
    ) -> Result<(VethQueue, SocketHandle), QueueError> {
        let number = u32::try_from(queue).unwrap_or(u32::MAX);
        let entered = |source| QueueError::Door(VethError::Namespace { source });
        let sealed = || entered(io::Error::other("the host door is sealed"));
        let opened = self.far.as_ref().ok_or_else(sealed)?.run(|| {
            let interface = Interface::by_name(FAR.0)?;
            let injector = injector.filter(|injector| aims(injector, &interface));
            Ok((injector, Socket::open(umem, &interface, number, options)?))
        });
        let (injector, socket) = opened.map_err(entered)?.map_err(QueueError::Socket)?;
        let Socket {
            receiver,
            transmitter,
            handle,
        } = socket;
        let entries = options.tx_entries as usize;
        let mut queue_port = VethQueue {
            socket: NicQueue::new(receiver, transmitter, entries, reserve).with_injector(injector),
            headers: [0x0800, 0x86dd].map(|kind: u16| {
                let mut header = [0; ETHERNET];
                header[..12].copy_from_slice(&self.macs);
                header[12..].copy_from_slice(&kind.to_be_bytes());
                header
            }),
            spread: self.spread.get_mut(queue).and_then(Option::take),
            open: true,
        };
        queue_port.refill(umem);
        let descriptor = handle.as_fd().as_raw_fd().to_ne_bytes();
        self.sockets
            .update(&number.to_ne_bytes(), &descriptor, MapFlags::ANY)
            .map_err(|source| {
                let step = format!("register the socket of host door queue {queue}");
                QueueError::Door(xdp::refused(step, source).into())
            })?;
        Ok((queue_port, handle))
    }

    /// Leaves the pair to the sockets: no more can be opened, and when the last is closed the pair goes.
    pub fn seal(&mut self) {
        self.far = None;
    }
}

/// Why a queue of the host door could not be had.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The socket could not be opened.
    #[error("host door: {0}")]
    Socket(af_xdp::Error),
    /// Something else.
    #[error(transparent)]
    Door(VethError),
}

/// What a socket on the far end shall be: as the worker's socket on its NIC, but in copy mode, which is what veth has.
///
/// Where the NIC's is in zero-copy mode the registration of the UMEM cannot be shared: the kernel would want the same
/// mode of veth.
pub fn socket_options(nic: &SocketOptions, mode: af_xdp::ModeInUse) -> SocketOptions {
    SocketOptions {
        mode: af_xdp::Mode::Copy,
        fill_entries: nic.rx_entries,
        completion_entries: nic.tx_entries,
        registration: match mode {
            af_xdp::ModeInUse::ZeroCopy => Registration::Own,
            af_xdp::ModeInUse::Copy => Registration::Shared,
        },
        busy_poll: None,
        tx_budget: Some(config::Burst::MAX),
        ..nic.clone()
    }
}

/// One queue of the door.
#[derive(Debug)]
pub struct VethQueue {
    socket: NicQueue,
    /// For IPv4 and for IPv6.
    headers: [[u8; ETHERNET]; 2],
    spread: Option<Spread>,
    /// Whether the kernel hands packets to this queue.
    open: bool,
}

impl VethQueue {
    /// Its injector, if it has one.
    pub fn injector(&self) -> Option<&Injector> {
        self.socket.injector()
    }
}

impl Port for VethQueue {
    const REFUSED: DropReason = DropReason::HostWriteFailed;

    /// Gives the queue its part of the host's flows, or spreads them over the others. What it transmits is still taken.
    /// Flows of the node's own sockets stay for as long as they have a packet under way.
    fn open(&mut self, open: bool) {
        if open == self.open {
            return;
        }
        self.open = open;
        if let Some(spread) = &mut self.spread {
            spread.set(open);
        }
    }

    #[inline]
    fn reclaim(&mut self, umem: &mut Umem) {
        self.socket.reclaim(umem);
    }

    #[inline]
    fn refill(&mut self, umem: &mut Umem) {
        self.socket.refill(umem);
    }

    #[inline]
    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize) {
        let before = burst.len();
        self.socket.receive(umem, burst, most);
        for frame in &mut burst[before..] {
            // No frame is shorter than its Ethernet header; one that were would be no packet to `forward` either.
            let _ = frame.pop_front(ETHERNET);
        }
    }

    fn room(&mut self) -> usize {
        self.socket.room()
    }

    /// Puts Ethernet headers on and transmits; what the ring has no room for stays in the burst.
    #[inline]
    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        for frame in burst.iter_mut() {
            let Some((front, packet)) = umem.front_and_packet::<ETHERNET>(frame) else {
                // Packets come with the room that their tunnel's headers had, or the NIC's own.
                continue;
            };
            let version = packet.first().map_or(0, |first| first >> 4);
            *front = self.headers[usize::from(version == 6)];
            let _ = frame.push_front(ETHERNET);
        }
        let sent = self.socket.transmit(umem, burst);
        Transmitted {
            bytes: sent.bytes - sent.packets * ETHERNET as u64,
            ..sent
        }
    }

    fn pending(&self) -> usize {
        self.socket.pending()
    }

    fn flush(&mut self) -> u64 {
        self.socket.flush()
    }
}

/// Says which CPUs' packets go to a queue (`xps_cpus`): those of all, or of none. The kernel spreads the flows of a CPU
/// over the queues that it may use.
#[derive(Debug)]
struct Spread {
    file: File,
    all: String,
}

impl Spread {
    /// One per queue, if there are several. Best effort: without them a worker gets packets that it has no way for.
    fn of(queues: usize) -> Vec<Option<Self>> {
        if queues < 2 {
            return Vec::new();
        }
        let of_queue = |sysfs: &OwnedFd, queue: usize| {
            let directory = format!("/proc/self/fd/{}", sysfs.as_raw_fd());
            let path = format!("{directory}/class/net/{HOST_DOOR}/queues/tx-{queue}/xps_cpus");
            let mut file = File::options().read(true).write(true).open(path)?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            let possible = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
            let cpus = config::parse_cpu_list(possible.trim()).unwrap_or_default();
            let mut spread = Self {
                file,
                all: cpu_mask(cpus.last().map_or(1, |last| last + 1)),
            };
            spread.write(true)?;
            Ok(spread)
        };
        let all: io::Result<Vec<_>> = own_sysfs().and_then(|sysfs| {
            (0..queues)
                .map(|queue| of_queue(&sysfs, queue).map(Some))
                .collect()
        });
        all.unwrap_or_else(|error| {
            tracing::warn!(%error, "packets cannot be kept from a worker whose NIC is not in use: the kernel spreads flows over all queues of {HOST_DOOR}");
            Vec::new()
        })
    }

    fn set(&mut self, open: bool) {
        if let Err(error) = self.write(open) {
            tracing::warn!(%error, open, "the queues of {HOST_DOOR} that get packets could not be changed");
        }
    }

    fn write(&mut self, open: bool) -> io::Result<()> {
        let mask = if open { &self.all } else { "0" };
        self.file.write_all(mask.as_bytes())
    }
}

/// The mask of the first `count` CPUs, as the kernel reads it: 32 at a time, in hexadecimal, the last first.
fn cpu_mask(count: u32) -> String {
    let words = (0..count.div_ceil(32)).rev().map(|word| {
        let bits = (count - word * 32).min(32);
        format!("{:08x}", u32::MAX >> (32 - bits))
    });
    words.collect::<Vec<_>>().join(",")
}

/// Whether `rip0` still takes live frames: somebody may have switched its GRO off.
pub(crate) fn takes_frames() -> bool {
    RIP0.ethtool(ETHTOOL_GGRO, 0).is_ok_and(|on| on != 0)
}

/// From include/uapi/linux/ethtool.h, not in libc.
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;

/// The pair in the node's namespace. Without it the kernel would take it away some time after the namespace has gone.
#[derive(Debug)]
struct Pair {
    index: u32,
}

impl Pair {
    fn new(queues: usize, far: &Namespace) -> Result<Self, VethError> {
        let queues = u32::try_from(queues).unwrap_or(u32::MAX);
        let peer = u32::try_from(far.0.as_raw_fd()).unwrap_or(u32::MAX);
        let request = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, 0)
            .end_of_pair(HOST_DOOR, queues)
            .veth(|end| {
                end.end_of_pair(FAR.0, queues)
                    .put(libc::IFLA_NET_NS_FD, &peer.to_ne_bytes())
            });
        let make = refused(
            "make the veth pair of",
            "if another program made a device of this name, remove it (ip link del rip0); CAP_NET_ADMIN and a kernel with veth are needed",
        );
        let begin = Instant::now();
        loop {
            match request.send() {
                Err(source)
                    if source.raw_os_error() == Some(libc::EEXIST) && begin.elapsed() < GONE =>
                {
                    std::thread::sleep(GONE_LOOK);
                }
                outcome => break outcome.map_err(&make)?,
            }
        }
        let interface = Interface::by_name(HOST_DOOR).map_err(io::Error::other);
        Ok(Self {
            index: interface.map_err(make)?.index(),
        })
    }
}

/// Makes a plain pair in the calling thread's namespace.
pub(crate) fn make_pair(one: &str, other: &str) -> io::Result<()> {
    Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, 0)
        .end_of_pair(one, 1)
        .veth(|end| end.end_of_pair(other, 1))
        .send()
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Err(error) = Message::new(libc::RTM_DELLINK, 0, self.index).send() {
            tracing::debug!(%error, "{HOST_DOOR} goes with its namespace");
        }
    }
}

/// From include/uapi/linux/veth.h, not in libc.
const VETH_INFO_PEER: u16 = 1;

/// A request to the kernel's link table (rtnetlink(7)).
struct Message(Vec<u8>);

impl Message {
    /// Begins a request about the link of this index, or about one that has none yet.
    fn new(kind: u16, flags: libc::c_int, index: u32) -> Self {
        let flags = flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        let [low, high, ..] = flags.to_le_bytes();
        let mut header = vec![0; 4];
        header.extend(kind.to_ne_bytes());
        header.extend(u16::from_le_bytes([low, high]).to_ne_bytes());
        header.extend([0; 8]);
        Self(header).link(index)
    }

    /// `struct ifinfomsg`.
    fn link(mut self, index: u32) -> Self {
        self.0.extend([0; 4]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend([0; 8]);
        self
    }

    fn end_of_pair(self, name: &str, queues: u32) -> Self {
        let name = [name.as_bytes(), b"\0"].concat();
        self.put(libc::IFLA_IFNAME, &name)
            .put(libc::IFLA_NUM_TX_QUEUES, &queues.to_ne_bytes())
            .put(libc::IFLA_NUM_RX_QUEUES, &queues.to_ne_bytes())
    }

    /// Says that the link is a veth, with what `end` appends as its other end.
    fn veth(self, end: impl FnOnce(Self) -> Self) -> Self {
        self.nest(libc::IFLA_LINKINFO, |info| {
            info.put(libc::IFLA_INFO_KIND, b"veth")
                .nest(libc::IFLA_INFO_DATA, |data| {
                    data.nest(VETH_INFO_PEER, |peer| end(peer.link(0)))
                })
        })
    }

    fn put(self, kind: u16, value: &[u8]) -> Self {
        self.nest(kind, |mut message| {
            message.0.extend(value);
            message
        })
    }

    /// An attribute whose value `fill` appends.
    fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let begin = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        let mut message = fill(self);
        let len = u16::try_from(message.0.len() - begin).unwrap_or(u16::MAX);
        message.0[begin..begin + 2].copy_from_slice(&len.to_ne_bytes());
        message.0.resize(message.0.len().next_multiple_of(4), 0);
        message
    }

    /// Sends it in the calling thread's namespace; the kernel's answer.
    fn send(&self) -> io::Result<()> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: takes numbers, and returns a new descriptor or -1.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        check(socket)?;
        // SAFETY: the descriptor is new and nobody else has it.
        let mut socket = File::from(unsafe { OwnedFd::from_raw_fd(socket) });
        let mut message = self.0.clone();
        let len = u32::try_from(message.len()).map_err(io::Error::other)?;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        socket.write_all(&message)?;
        let mut answer = [0; 4096];
        let len = socket.read(&mut answer)?;
        // `struct nlmsgerr` behind the header: zero, or an error number with its sign changed.
        let code = answer[..len]
            .get(16..20)
            .and_then(|code| code.first_chunk());
        match code.map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::cpu_mask;

    #[test]
    fn a_mask_holds_the_first_cpus() {
        for (count, mask) in [
            (1, "00000001"),
            (2, "00000003"),
            (32, "ffffffff"),
            (33, "00000001,ffffffff"),
            (100, "0000000f,ffffffff,ffffffff,ffffffff"),
        ] {
            assert_eq!(cpu_mask(count), mask);
        }
    }
}
