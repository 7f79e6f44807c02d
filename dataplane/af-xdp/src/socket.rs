//! AF_XDP sockets: opened on one queue of an interface, split into halves that each own their
//! rings.
#![expect(unsafe_code, reason = "hands mapped memory to the rings")]

use core::ffi::c_int;
use core::fmt;
use core::time::Duration;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::error::Error;
use crate::frame::Frame;
use crate::mapping::Mapping;
use crate::ring::{Area, Consumer, Producer};
use crate::sys;
use crate::umem::{Lender, QueueId, Settled, Umem};

/// Frames that one packet may consist of: `MAX_SKB_FRAGS` as large as a kernel can be configured
/// (45, `net/Kconfig`), and the first one.
pub const PACKET_FRAMES_MAX: usize = 46;

/// How long an attempt to bind a busy queue rests before the next. A queue whose owner has closed
/// it was seen busy for 1 to 24 ms.
const BUSY_RETRY: Duration = Duration::from_millis(2);

/// An interface of the network namespace in which it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    name: String,
    index: u32,
}

impl Interface {
    /// Looks an interface up by its name, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::NoInterface`].
    pub fn by_name(name: &str) -> Result<Self, Error> {
        let index = sys::interface_index(name).map_err(|source| Error::NoInterface {
            interface: name.to_owned(),
            source,
        })?;
        Ok(Self {
            name: name.to_owned(),
            index,
        })
    }

    /// Looks an interface up by its index, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::NoInterface`].
    pub fn by_index(index: u32) -> Result<Self, Error> {
        let name = sys::interface_name(index).map_err(|source| Error::NoInterface {
            interface: format!("with index {index}"),
            source,
        })?;
        Ok(Self { name, index })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index.
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// How packets shall move between the device and the UMEM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Zero-copy if driver and queue can, copy if not.
    #[default]
    Auto,
    /// The device reads and writes the UMEM itself, or opening fails.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// How packets do move, as the kernel reports it (`XDP_OPTIONS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeInUse {
    /// The device reads and writes the UMEM itself.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

impl fmt::Display for ModeInUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
        })
    }
}

/// Lets system calls on the socket run the device's receive routine (`SO_PREFER_BUSY_POLL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyPoll {
    /// How long one call may poll, in microseconds (`SO_BUSY_POLL`).
    pub timeout_us: u32,
    /// Packets that one call may process (`SO_BUSY_POLL_BUDGET`).
    pub budget: u32,
}

/// How the kernel gets to know a UMEM that has a socket already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Registration {
    /// By the first socket, whose registration is shared (`XDP_SHARED_UMEM`).
    #[default]
    Shared,
    /// By a registration of its own. So one UMEM serves a queue in zero-copy mode and another in
    /// copy mode; its memory counts twice towards the limit of locked memory.
    Own,
}

/// What a socket shall be.
///
/// Sockets that share a registration inherit `mode`, `need_wakeup` and `multi_buffer` from the
/// first: the kernel allows no choice (`xsk_bind` in `net/xdp/xsk.c`). Opening fails if they ask
/// for a mode that the first has not got.
#[derive(Clone, Debug)]
pub struct SocketOptions {
    /// How packets shall move.
    pub mode: Mode,
    /// Whether the kernel may sleep and say so (`XDP_USE_NEED_WAKEUP`).
    pub need_wakeup: bool,
    /// Whether packets may span frames (`XDP_USE_SG`, Linux 6.6). Without it a packet larger than
    /// a frame is dropped and counted in [`Statistics::rx_dropped`].
    pub multi_buffer: bool,
    /// Entries of the fill ring, a power of two.
    pub fill_entries: u32,
    /// Entries of the RX ring, a power of two.
    pub rx_entries: u32,
    /// Entries of the TX ring, a power of two.
    pub tx_entries: u32,
    /// Entries of the completion ring, a power of two.
    pub completion_entries: u32,
    /// Busy polling, if any.
    pub busy_poll: Option<BusyPoll>,
    /// Packets that one system call may send in copy mode (`XDP_MAX_TX_BUDGET`, Linux 6.17); left
    /// at the kernel's 32 where it knows no such option.
    pub tx_budget: Option<u32>,
    /// How long to wait for a queue that another socket holds.
    pub busy_wait: Duration,
    /// Whether to share the registration of a socket that the UMEM has already.
    pub registration: Registration,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            need_wakeup: true,
            multi_buffer: false,
            fill_entries: 2048,
            rx_entries: 2048,
            tx_entries: 2048,
            completion_entries: 2048,
            busy_poll: None,
            tx_budget: None,
            busy_wait: Duration::from_secs(2),
            registration: Registration::Shared,
        }
    }
}

impl SocketOptions {
    fn check(&self, settled: Settled) -> Result<(), Error> {
        let rings = [
            ("fill_entries", self.fill_entries),
            ("rx_entries", self.rx_entries),
            ("tx_entries", self.tx_entries),
            ("completion_entries", self.completion_entries),
        ];
        for (name, entries) in rings {
            if !entries.is_power_of_two() || entries > RING_ENTRIES_MAX {
                return Err(Error::Setting {
                    name,
                    value: entries.into(),
                    rule: "the size of a ring is a power of two, at most 1048576",
                });
            }
            if settled.multi_buffer && (entries as usize) < PACKET_FRAMES_MAX {
                return Err(Error::Setting {
                    name,
                    value: entries.into(),
                    rule: "with multi_buffer a ring must hold a packet of 46 frames",
                });
            }
        }
        Ok(())
    }
}

/// Largest ring that this crate asks for; far beyond use, and far below where sizes overflow.
const RING_ENTRIES_MAX: u32 = 1 << 20;

/// The kernel's own counters of one socket (`struct xdp_statistics`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets dropped on receive: too large for a frame, or no frame to put them in.
    pub rx_dropped: u64,
    /// Descriptors in the fill ring that the kernel refused.
    pub rx_invalid_descs: u64,
    /// Descriptors in the TX ring that the kernel refused.
    pub tx_invalid_descs: u64,
    /// Packets dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found no frame in the fill ring.
    pub rx_fill_ring_empty_descs: u64,
    /// Times that the kernel found nothing in the TX ring.
    pub tx_ring_empty_descs: u64,
}

/// An open AF_XDP socket, in the three parts that its users need apart. It is closed, and its
/// queue given up, when all three are dropped.
#[derive(Debug)]
pub struct Socket {
    /// Fill and RX ring.
    pub receiver: Receiver,
    /// TX and completion ring.
    pub transmitter: Transmitter,
    /// The socket itself.
    pub handle: SocketHandle,
}

impl Socket {
    /// Opens a socket on one queue of an interface, in the network namespace of the calling
    /// thread.
    ///
    /// The first socket on a UMEM registers it; others share that, unless they are to have their
    /// own, each with fill and completion rings of its own, so each must be on another queue or
    /// interface. Nothing is received
    /// before [`Receiver::refill`], nor before an XDP program redirects packets to the socket.
    ///
    /// Frames that a closed socket still had in its rings stay lent until the UMEM gets another
    /// socket on the same queue: only that proves that the kernel has let go of them.
    ///
    /// # Errors
    ///
    /// Any [`Error`] but [`Error::NoHugePages`].
    pub fn open(
        umem: &mut Umem,
        interface: &Interface,
        queue: u32,
        options: &SocketOptions,
    ) -> Result<Self, Error> {
        let shared = match options.registration {
            Registration::Shared => umem.registered_on(),
            Registration::Own => None,
        };
        let settled = match &shared {
            Some((_, settled)) => *settled,
            None => Settled {
                need_wakeup: options.need_wakeup,
                multi_buffer: options.multi_buffer,
            },
        };
        options.check(settled)?;
        let opening = Opening {
            object: format!("{} queue {queue}", interface.name),
            interface,
            queue,
            options,
        };
        let socket = sys::open_socket()
            .map_err(|source| Error::system("open socket for", &*opening.object, source))?;
        let socket = Arc::new(socket);
        let fd = socket.as_fd();
        opening.set_up(fd)?;

        // Rings before bind: older kernels map none afterwards.
        let at: sys::xdp_mmap_offsets = opening.option(fd, sys::XDP_MMAP_OFFSETS)?;
        let page = sys::XDP_UMEM_PGOFF_FILL_RING;
        let (area, memory) = opening.ring(fd, &at.fr, page, options.fill_entries)?;
        // SAFETY: `ring_area` checks that the area lies within the memory that it mapped for the kernel's
        // fill ring, whose only producer is the holder of this new socket, and u64 takes any bits.
        let fill = unsafe { Producer::new(area, memory) };
        let page = sys::XDP_PGOFF_RX_RING as u64;
        let (area, memory) = opening.ring(fd, &at.rx, page, options.rx_entries)?;
        // SAFETY: as above, for the RX ring and its only consumer; a descriptor is three integers.
        let rx = unsafe { Consumer::new(area, memory) };
        let page = sys::XDP_PGOFF_TX_RING as u64;
        let (area, memory) = opening.ring(fd, &at.tx, page, options.tx_entries)?;
        // SAFETY: as above, for the TX ring and its only producer.
        let tx = unsafe { Producer::new(area, memory) };
        let page = sys::XDP_UMEM_PGOFF_COMPLETION_RING;
        let (area, memory) = opening.ring(fd, &at.cr, page, options.completion_entries)?;
        // SAFETY: as above, for the completion ring and its only consumer.
        let completion = unsafe { Consumer::new(area, memory) };

        match &shared {
            Some((first, _)) => opening.bind_shared(fd, first.as_fd())?,
            None => {
                umem.register(fd)?;
                opening.bind_first(fd, settled)?;
            }
        }
        let in_use: sys::xdp_options = opening.option(fd, sys::XDP_OPTIONS)?;
        let mode = if in_use.flags & sys::XDP_OPTIONS_ZEROCOPY == 0 {
            ModeInUse::Copy
        } else {
            ModeInUse::ZeroCopy
        };
        opening.check_mode(mode)?;
        let namespace = sys::option(fd, sys::SOL_SOCKET, sys::SO_NETNS_COOKIE).ok();
        let id = namespace.map(|namespace| QueueId {
            namespace,
            interface: interface.index,
            queue,
        });
        let lender = umem.add_socket(&socket, settled, id)?;
        let object: Arc<str> = opening.object.into();
        Ok(Self {
            receiver: Receiver {
                fill,
                rx,
                umem: umem.id(),
                lender,
                multi_buffer: settled.multi_buffer,
                discarding: false,
                refused: 0,
                waking: Waking::new(options),
                socket: Arc::clone(&socket),
                object: Arc::clone(&object),
            },
            transmitter: Transmitter {
                tx,
                completion,
                umem: umem.id(),
                lender,
                settled,
                mode,
                refused: 0,
                unsendable: 0,
                waking: Waking::new(options),
                socket: Arc::clone(&socket),
                object: Arc::clone(&object),
            },
            handle: SocketHandle {
                socket,
                interface: interface.clone(),
                queue,
                mode,
                object,
            },
        })
    }
}

/// A socket on its way to being open.
struct Opening<'a> {
    /// Interface and queue, for messages.
    object: String,
    interface: &'a Interface,
    queue: u32,
    options: &'a SocketOptions,
}

impl Opening<'_> {
    fn error(&self, operation: &'static str, source: io::Error) -> Error {
        Error::system(operation, &*self.object, source)
    }

    fn option<T: sys::OptionValue>(&self, fd: BorrowedFd<'_>, name: c_int) -> Result<T, Error> {
        sys::option(fd, sys::SOL_XDP, name).map_err(|e| self.error("read options of", e))
    }

    /// Sets all that must be set before bind.
    fn set_up(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let options = self.options;
        let rings = [
            (sys::XDP_UMEM_FILL_RING, options.fill_entries),
            (sys::XDP_UMEM_COMPLETION_RING, options.completion_entries),
            (sys::XDP_RX_RING, options.rx_entries),
            (sys::XDP_TX_RING, options.tx_entries),
        ];
        for (ring, entries) in rings {
            sys::set_option(fd, sys::SOL_XDP, ring, entries)
                .map_err(|e| self.error("make a ring for", e))?;
        }
        if let Some(budget) = options.tx_budget {
            // An older kernel refuses, and sends fewer packets per call.
            let _ = sys::set_option(fd, sys::SOL_XDP, sys::XDP_MAX_TX_BUDGET, budget);
        }
        if let Some(busy_poll) = options.busy_poll {
            let settings = [
                (sys::SO_PREFER_BUSY_POLL, 1),
                (sys::SO_BUSY_POLL, busy_poll.timeout_us),
                (sys::SO_BUSY_POLL_BUDGET, busy_poll.budget),
            ];
            for (name, value) in settings {
                sys::set_option(fd, sys::SOL_SOCKET, name, value)
                    .map_err(|e| self.error("set busy polling for", e))?;
            }
        }
        Ok(())
    }

    /// Maps one ring and finds its parts.
    fn ring<T>(
        &self,
        fd: BorrowedFd<'_>,
        at: &sys::xdp_ring_offset,
        page_offset: u64,
        entries: u32,
    ) -> Result<(Area<T>, Mapping), Error> {
        let impossible = || {
            let source = io::Error::other("the kernel describes a ring that cannot be");
            self.error("map a ring of", source)
        };
        let (len, offset) = ring_extent::<T>(at, page_offset, entries).ok_or_else(impossible)?;
        let memory =
            Mapping::shared(fd, len, offset).map_err(|e| self.error("map a ring of", e))?;
        let area = ring_area(&memory, at, entries).ok_or_else(impossible)?;
        Ok((area, memory))
    }

    /// Binds a socket that has its own registration, in the best mode that is allowed.
    fn bind_first(&self, fd: BorrowedFd<'_>, settled: Settled) -> Result<(), Error> {
        const ZERO_COPY: (u16, &str) = (sys::XDP_ZEROCOPY, "zero-copy");
        const COPY: (u16, &str) = (sys::XDP_COPY, "copy");
        let modes: &[_] = match self.options.mode {
            Mode::Auto => &[ZERO_COPY, COPY],
            Mode::ZeroCopy => &[ZERO_COPY],
            Mode::Copy => &[COPY],
        };
        let mut flags = 0;
        if settled.need_wakeup {
            flags |= sys::XDP_USE_NEED_WAKEUP;
        }
        if settled.multi_buffer {
            flags |= sys::XDP_USE_SG;
        }
        let mut refusal = None;
        for &(flag, mode) in modes {
            let Err(source) = self.bind(fd, flags | flag, 0) else {
                return Ok(());
            };
            match source.raw_os_error() {
                Some(libc::EBUSY) => return Err(self.busy()),
                // What kernel and drivers answer when they cannot do a mode.
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT) => {
                    refusal = Some((mode, source));
                }
                _ => return Err(self.error("bind", source)),
            }
        }
        match refusal {
            Some((mode, source)) => Err(Error::ModeRefused {
                object: self.object.clone(),
                mode,
                source,
            }),
            None => Ok(()),
        }
    }

    /// Binds a socket that shares the registration of `first`.
    fn bind_shared(&self, fd: BorrowedFd<'_>, first: BorrowedFd<'_>) -> Result<(), Error> {
        let first = first.as_raw_fd().cast_unsigned();
        // Other flags are refused together with this one.
        let Err(source) = self.bind(fd, sys::XDP_SHARED_UMEM, first) else {
            return Ok(());
        };
        Err(match source.raw_os_error() {
            Some(libc::EBUSY) => self.busy(),
            Some(libc::EOPNOTSUPP | libc::EINVAL) => Error::System {
                operation: "bind",
                object: self.object.clone(),
                source,
                advice: "each socket of a UMEM must be on another existing queue, and its driver \
                         must offer the mode of the UMEM's first socket",
            },
            _ => self.error("bind", source),
        })
    }

    fn busy(&self) -> Error {
        Error::QueueBusy {
            object: self.object.clone(),
            waited: self.options.busy_wait,
        }
    }

    /// Binds, and waits for a busy queue as long as the options say.
    fn bind(&self, fd: BorrowedFd<'_>, flags: u16, umem_fd: u32) -> io::Result<()> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the family is a small constant"
        )]
        let family = libc::AF_XDP as u16;
        let address = sys::sockaddr_xdp {
            sxdp_family: family,
            sxdp_flags: flags,
            sxdp_ifindex: self.interface.index,
            sxdp_queue_id: self.queue,
            sxdp_shared_umem_fd: umem_fd,
        };
        let begin = Instant::now();
        loop {
            match sys::bind(fd, &address) {
                Err(e)
                    if e.raw_os_error() == Some(libc::EBUSY)
                        && begin.elapsed() < self.options.busy_wait =>
                {
                    thread::sleep(BUSY_RETRY);
                }
                result => return result,
            }
        }
    }

    /// Sees to it that a socket which inherits its mode got the one that it wants.
    fn check_mode(&self, in_use: ModeInUse) -> Result<(), Error> {
        let decided = match (self.options.mode, in_use) {
            (Mode::Auto, _)
            | (Mode::ZeroCopy, ModeInUse::ZeroCopy)
            | (Mode::Copy, ModeInUse::Copy) => return Ok(()),
            (Mode::ZeroCopy, ModeInUse::Copy) => "copy mode",
            (Mode::Copy, ModeInUse::ZeroCopy) => "zero-copy mode",
        };
        Err(Error::Inherited {
            object: self.object.clone(),
            decided,
        })
    }
}

/// How much of the socket to map for a ring of entries `T`, in bytes, and from where.
fn ring_extent<T>(
    at: &sys::xdp_ring_offset,
    page_offset: u64,
    entries: u32,
) -> Option<(usize, libc::off_t)> {
    let entries_len = (entries as usize).checked_mul(size_of::<T>())?;
    let len = usize::try_from(at.desc).ok()?.checked_add(entries_len)?;
    Some((len, page_offset.try_into().ok()?))
}

/// Where the parts of a ring lie in its memory, which has the extent that `ring_extent` gives.
fn ring_area<T>(memory: &Mapping, at: &sys::xdp_ring_offset, entries: u32) -> Option<Area<T>> {
    Some(Area {
        producer: memory.part(at.producer, 1)?,
        consumer: memory.part(at.consumer, 1)?,
        flags: memory.part(at.flags, 1)?,
        entries: memory.part(at.desc, entries)?,
        size: entries,
    })
}

/// Calls in a row that have moved nothing, after which a socket that polls asks for an interrupt.
const FRUITLESS_CALLS: u32 = 16;

/// How a half of a socket makes the kernel look at its ring.
///
/// A zero-copy socket that prefers polling has its system calls poll one routine of the driver and wake nobody
/// (`xsk_no_wakeup`, net/xdp/xsk.c). That moves nothing where another routine sends (virtio_net; igb with up to four
/// queues), nor when the driver has made its routines anew (igb, whenever its number of queues changes): the socket
/// remembers the first for ever (`__sk_mark_napi_id_once`, include/net/busy_poll.h). So after some fruitless calls one
/// is made without the preference.
#[derive(Debug)]
struct Waking {
    prefers_polling: bool,
    fruitless: u32,
}

impl Waking {
    fn new(options: &SocketOptions) -> Self {
        Self {
            prefers_polling: options.busy_poll.is_some(),
            fruitless: 0,
        }
    }

    /// Makes the system call, in the way that is due.
    fn call(
        &self,
        socket: &OwnedFd,
        wakeup: fn(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let fd = socket.as_fd();
        if self.fruitless < FRUITLESS_CALLS {
            return wakeup(fd);
        }
        let prefer = |polling: c_int| {
            sys::set_option(fd, sys::SOL_SOCKET, sys::SO_PREFER_BUSY_POLL, polling)
        };
        prefer(0)?;
        let outcome = wakeup(fd);
        // Refused to a process that has given its rights away since it opened the socket: then interrupts it is.
        let _ = prefer(1);
        outcome
    }

    /// Takes note of whether the last call has moved anything.
    fn note(&mut self, moved: bool) {
        self.fruitless = match self.fruitless {
            _ if moved || !self.prefers_polling => 0,
            FRUITLESS_CALLS.. => 0,
            calls => calls + 1,
        };
    }
}

/// The receiving half of a socket.
#[derive(Debug)]
pub struct Receiver {
    fill: Producer<u64, Mapping>,
    rx: Consumer<sys::xdp_desc, Mapping>,
    umem: u16,
    lender: Lender,
    multi_buffer: bool,
    /// Whether the rest of a packet of which a descriptor was refused is being thrown away.
    discarding: bool,
    /// Descriptors refused.
    refused: u64,
    waking: Waking,
    socket: Arc<OwnedFd>,
    object: Arc<str>,
}

impl Receiver {
    /// Lends the kernel up to `frames_max` free frames to receive into; returns how many. Less when
    /// the fill ring is full or the pool empty.
    ///
    /// # Panics
    ///
    /// When `umem` is not the one that the socket was opened on.
    #[inline]
    pub fn refill(&mut self, umem: &mut Umem, frames_max: usize) -> usize {
        check_umem(self.umem, umem);
        let wanted = umem.free().min(to_entries(frames_max));
        let mut entries = self.fill.reserve(wanted);
        let granted = entries.left();
        while entries.left() > 0 {
            let Some(address) = umem.lend_to_receive(self.lender) else {
                break;
            };
            entries.push(address);
        }
        let lent = granted - entries.left();
        entries.commit();
        lent as usize
    }

    /// Appends up to `frames_max` received frames to `burst`; returns how many. Allocates only if
    /// the burst's capacity is less.
    ///
    /// With multi-buffer, all frames of a packet arrive in one burst, one behind the other, each
    /// but the last with [`Frame::continues`]; so that this can be kept, `frames_max` counts as at
    /// least [`PACKET_FRAMES_MAX`].
    ///
    /// # Panics
    ///
    /// When `umem` is not the one that the socket was opened on.
    #[inline]
    pub fn receive(&mut self, umem: &mut Umem, burst: &mut Vec<Frame>, frames_max: usize) -> usize {
        check_umem(self.umem, umem);
        if self.multi_buffer {
            return self.receive_packets(umem, burst, frames_max);
        }
        let before = burst.len();
        let mut descriptors = self.rx.peek(to_entries(frames_max));
        for descriptor in &mut descriptors {
            match umem.received(self.lender, descriptor) {
                // Nothing continues on a socket without multi-buffer.
                Some(frame) if !frame.continues() => burst.push(frame),
                Some(frame) => {
                    umem.give(frame);
                    self.refused += 1;
                }
                None => self.refused += 1,
            }
        }
        descriptors.release();
        burst.len() - before
    }

    /// As `receive`, for packets that may span frames. Apart, so that the common case stays short.
    #[inline(never)]
    fn receive_packets(
        &mut self,
        umem: &mut Umem,
        burst: &mut Vec<Frame>,
        frames_max: usize,
    ) -> usize {
        let before = burst.len();
        let most = to_entries(frames_max.max(PACKET_FRAMES_MAX));
        let mut descriptors = self.rx.peek(most);
        let continues = |d: sys::xdp_desc| d.options & sys::XDP_PKT_CONTD != 0;
        let whole = (0..descriptors.left())
            .rev()
            .find(|&ahead| descriptors.look(ahead).is_some_and(|d| !continues(d)))
            .map_or(0, |last| last + 1);
        // A packet without end is not waited for: it would block the ring.
        let endless = whole == 0 && descriptors.left() as usize >= PACKET_FRAMES_MAX;
        let count = if endless { descriptors.left() } else { whole };
        if endless {
            self.discarding = true;
            self.refused += 1;
        }
        let mut packet = burst.len();
        for descriptor in descriptors.by_ref().take(count as usize) {
            let frame = umem.received(self.lender, descriptor);
            if frame.is_none() {
                self.refused += 1;
                self.discarding = true;
            }
            burst.extend(frame);
            if self.discarding {
                for frame in burst.drain(packet..) {
                    umem.give(frame);
                }
            }
            if !continues(descriptor) {
                packet = burst.len();
                self.discarding = false;
            }
        }
        descriptors.release();
        burst.len() - before
    }

    /// Whether the kernel waits for [`Receiver::wake`] before it looks at the fill ring again.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.fill.needs_wakeup()
    }

    /// Makes the kernel look at the fill ring; with busy polling, lets it receive.
    ///
    /// # Errors
    ///
    /// [`Error::System`] when the interface is down or gone.
    pub fn wake(&mut self) -> Result<(), Error> {
        let outcome = self.waking.call(&self.socket, sys::receive_wakeup);
        self.waking.note(!self.fill.needs_wakeup());
        match outcome {
            Err(e) if !is_more_to_do(&e) => Err(Error::system("wake", &*self.object, e)),
            _ => Ok(()),
        }
    }

    /// Frames in the fill ring, which the kernel has not taken yet.
    pub fn in_fill(&self) -> usize {
        self.fill.pending() as usize
    }

    /// Frames in the RX ring, which wait for [`Receiver::receive`].
    pub fn in_rx(&self) -> usize {
        self.rx.pending() as usize
    }

    /// Descriptors and ring indices from the kernel that could not be true, and were refused. A
    /// number other than 0 is a fault of kernel or driver.
    pub fn faults(&self) -> u64 {
        self.refused + self.fill.faults() + self.rx.faults()
    }
}

impl AsFd for Receiver {
    /// For `poll`, and for an XSKMAP.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The transmitting half of a socket.
#[derive(Debug)]
pub struct Transmitter {
    tx: Producer<sys::xdp_desc, Mapping>,
    completion: Consumer<u64, Mapping>,
    umem: u16,
    lender: Lender,
    settled: Settled,
    mode: ModeInUse,
    /// Completions refused.
    refused: u64,
    /// Frames not sent because no kernel would send them.
    unsendable: u64,
    waking: Waking,
    socket: Arc<OwnedFd>,
    object: Arc<str>,
}

impl Transmitter {
    /// Moves as many frames as the TX ring has room for from the front of `frames` to it; returns
    /// how many. What remains in `frames` did not fit. Frames of one packet stay together.
    ///
    /// Packets that the kernel would refuse without ever giving their frames back go to the pool
    /// instead and are counted by [`Transmitter::unsendable`]: a frame without a byte, and a packet
    /// of several frames on a socket without multi-buffer.
    ///
    /// The kernel may not look at the ring before [`Transmitter::kick`].
    ///
    /// # Panics
    ///
    /// When `umem` is not the one that the socket was opened on, or a frame is of another.
    #[inline]
    pub fn send(&mut self, umem: &mut Umem, frames: &mut Vec<Frame>) -> usize {
        check_umem(self.umem, umem);
        let may_continue = self.settled.multi_buffer;
        if frames
            .iter()
            .any(|f| f.is_empty() || f.continues() && !may_continue)
        {
            self.remove_unsendable(umem, frames);
        }
        let mut entries = self.tx.reserve(to_entries(frames.len()));
        let mut count = entries.left() as usize;
        while count > 0 && frames[count - 1].continues() {
            count -= 1;
        }
        for frame in frames.drain(..count) {
            entries.push(umem.lend_to_transmit(self.lender, frame));
        }
        entries.commit();
        count
    }

    #[cold]
    fn remove_unsendable(&mut self, umem: &mut Umem, frames: &mut Vec<Frame>) {
        let mut start = 0;
        while start < frames.len() {
            let last = frames[start..].iter().position(|f| !f.continues());
            let end = last.map_or(frames.len(), |last| start + last + 1);
            let packet = &frames[start..end];
            let several = packet[0].continues();
            if packet.iter().all(|f| !f.is_empty()) && (self.settled.multi_buffer || !several) {
                start = end;
                continue;
            }
            for frame in frames.drain(start..end) {
                umem.give(frame);
                self.unsendable += 1;
            }
        }
    }

    /// Takes up to `frames_max` frames that have been sent back into the pool; returns how many.
    ///
    /// # Panics
    ///
    /// When `umem` is not the one that the socket was opened on.
    #[inline]
    pub fn reclaim(&mut self, umem: &mut Umem, frames_max: usize) -> usize {
        check_umem(self.umem, umem);
        let mut reclaimed = 0;
        let mut addresses = self.completion.peek(to_entries(frames_max));
        for address in &mut addresses {
            if umem.transmitted(self.lender, address) {
                reclaimed += 1;
            } else {
                self.refused += 1;
            }
        }
        addresses.release();
        reclaimed
    }

    /// Whether the kernel waits for [`Transmitter::kick`] before it looks at the TX ring again. In
    /// copy mode it always does. The answer is a hint that can be a moment old: ask again as long
    /// as frames are [`Transmitter::in_tx`].
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        !self.settled.need_wakeup || self.tx.needs_wakeup()
    }

    /// Makes the kernel send what is in the TX ring; returns how many frames are still there.
    ///
    /// In copy mode one system call sends a part of the ring, 32 frames unless
    /// [`SocketOptions::tx_budget`] says otherwise, so it is repeated until the ring is empty or
    /// nothing moves any more: the device's queue is full, or the completion ring is. In zero-copy
    /// mode the device sends by itself, and one call wakes it.
    ///
    /// # Errors
    ///
    /// [`Error::System`] when the interface is down or gone.
    pub fn kick(&mut self) -> Result<usize, Error> {
        let mut pending = self.tx.pending();
        // Each turn takes at least one frame off the ring, or is the last.
        for _ in 0..self.tx.size() {
            if pending == 0 {
                break;
            }
            match self.waking.call(&self.socket, sys::send_wakeup) {
                Err(e) if !is_more_to_do(&e) => {
                    return Err(Error::system("send on", &*self.object, e));
                }
                _ => {}
            }
            let before = pending;
            pending = self.tx.pending();
            self.waking.note(pending < before);
            if self.mode == ModeInUse::ZeroCopy || pending == before {
                break;
            }
        }
        Ok(pending as usize)
    }

    /// Frames in the TX ring, which the kernel has not taken yet.
    pub fn in_tx(&self) -> usize {
        self.tx.pending() as usize
    }

    /// Frames in the completion ring, which wait for [`Transmitter::reclaim`].
    pub fn in_completion(&self) -> usize {
        self.completion.pending() as usize
    }

    /// Frames that [`Transmitter::send`] put into the pool because no kernel would send them.
    pub fn unsendable(&self) -> u64 {
        self.unsendable
    }

    /// Completions and ring indices from the kernel that could not be true, and were refused. A
    /// number other than 0 is a fault of kernel or driver.
    pub fn faults(&self) -> u64 {
        self.refused + self.tx.faults() + self.completion.faults()
    }
}

impl AsFd for Transmitter {
    /// For `poll`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The socket itself: what it is, and how it fares.
#[derive(Debug)]
pub struct SocketHandle {
    socket: Arc<OwnedFd>,
    interface: Interface,
    queue: u32,
    mode: ModeInUse,
    object: Arc<str>,
}

impl SocketHandle {
    /// The interface it is bound to.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// The queue it is bound to.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// How packets move.
    pub fn mode(&self) -> ModeInUse {
        self.mode
    }

    /// The kernel's counters.
    ///
    /// # Errors
    ///
    /// [`Error::System`].
    pub fn statistics(&self) -> Result<Statistics, Error> {
        let read: sys::xdp_statistics =
            sys::option(self.socket.as_fd(), sys::SOL_XDP, sys::XDP_STATISTICS)
                .map_err(|e| Error::system("read statistics of", &*self.object, e))?;
        Ok(Statistics {
            rx_dropped: read.rx_dropped,
            rx_invalid_descs: read.rx_invalid_descs,
            tx_invalid_descs: read.tx_invalid_descs,
            rx_ring_full: read.rx_ring_full,
            rx_fill_ring_empty_descs: read.rx_fill_ring_empty_descs,
            tx_ring_empty_descs: read.tx_ring_empty_descs,
        })
    }

    /// Reads and clears the socket's pending error (`SO_ERROR`): `ENETDOWN` once the interface has
    /// gone or its driver has given the socket up.
    ///
    /// # Errors
    ///
    /// The pending error, or the failure to read it, as [`Error::System`].
    pub fn socket_error(&self) -> Result<(), Error> {
        let errno: c_int = sys::option(self.socket.as_fd(), sys::SOL_SOCKET, libc::SO_ERROR)
            .map_err(|e| Error::system("read error of", &*self.object, e))?;
        if errno == 0 {
            return Ok(());
        }
        let source = io::Error::from_raw_os_error(errno);
        Err(Error::system("use", &*self.object, source))
    }
}

impl AsFd for SocketHandle {
    /// For an XSKMAP.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether the kernel says "call again", rather than "cannot".
fn is_more_to_do(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// A number of frames as a number of ring entries; no ring has as many as do not fit.
#[inline]
fn to_entries(frames: usize) -> u32 {
    u32::try_from(frames).unwrap_or(u32::MAX)
}

#[inline]
fn check_umem(expected: u16, umem: &Umem) {
    assert!(
        umem.id() == expected,
        "a socket was used with a UMEM that it was not opened on"
    );
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
