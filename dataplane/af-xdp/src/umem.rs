//! The memory that packets live in.
//!
//! ```text
//!            ┌──────── frame 0 ────────┬──────── frame 1 ────────┬─ …
//!   memory   │ reserved│headroom│packet│                         │
//!            └─────────────────────────┴─────────────────────────┴─ …
//!   owners    one byte for each frame:  free │ held │ receiving on socket n │ transmitting on n
//! ```
//!
//! At any time one party owns a frame's bytes: the pool, whoever holds its [`Frame`], or the kernel
//! on behalf of one socket. `owners` records which, and every hand-over checks and changes it.
//! That is what makes the safe interface sound:
//!
//! 1. A `Frame` for chunk *c* exists only while `owners[c]` is `HELD`, and at most one does: it is
//!    made only by a step from `FREE` (`take`) or from `receiving` (`received`) to `HELD`, and
//!    consumed by the steps back. A kernel that returns a frame twice, or one that it was not lent,
//!    is refused and counted.
//! 2. The bytes of *c* are reached only through its `Frame`: shared through `&Frame`, exclusively
//!    through `&mut Frame`. So slices of different frames may coexist, and slices of one frame obey
//!    the borrow checker.
//! 3. The kernel touches only frames in the fill and TX rings, which are not `HELD`.
//! 4. Each packet lies within its frame (`frame.rs`), and each frame within the memory (`chunk` is
//!    below the number of frames when the token is made).
#![expect(unsafe_code, reason = "turns frames into slices of the mapping")]

use core::fmt;
use core::slice;
use core::sync::atomic::{AtomicU16, Ordering};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use crate::error::Error;
use crate::frame::{FRAME_RESERVED, Frame, NoRoom};
use crate::mapping::Mapping;
use crate::numa;
use crate::sys;

/// Where a UMEM's memory comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// Memory of this process alone.
    #[default]
    Anonymous,
    /// A memory file, which another process can map to take the sockets over.
    File,
}

/// What a UMEM shall be.
#[derive(Clone, Debug)]
pub struct UmemOptions {
    /// Number of frames.
    pub frames: u32,
    /// Size of each frame in bytes: 2048 or 4096.
    pub frame_size: u32,
    /// Bytes that the kernel leaves free before a received packet, beyond the 256
    /// (`XDP_PACKET_HEADROOM`) that it always leaves.
    pub headroom: u16,
    /// Where the memory comes from.
    pub memory: Memory,
    /// Whether to back it by huge pages of 2 MiB.
    pub huge_pages: bool,
    /// NUMA node that the memory shall lie on; [`Umem::numa_node`] tells where it does.
    pub numa_node: Option<u32>,
    /// Whether packets may carry requests to the transmitting side, such as checksum offload.
    /// Needs Linux 6.11.
    pub tx_metadata: bool,
}

impl Default for UmemOptions {
    fn default() -> Self {
        Self {
            frames: 4096,
            frame_size: 2048,
            headroom: 0,
            memory: Memory::Anonymous,
            huge_pages: false,
            numa_node: None,
            tx_metadata: false,
        }
    }
}

/// Where a UMEM's frames are. `frames` is the sum of the others, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// All frames.
    pub frames: u32,
    /// In the pool.
    pub free: u32,
    /// Held as a [`Frame`], or lost by dropping one.
    pub held: u32,
    /// In fill and RX rings, or between the two.
    pub receiving: u32,
    /// In TX and completion rings, or between the two.
    pub transmitting: u32,
}

/// A checksum request that the UMEM or the packet cannot take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumError {
    /// The UMEM was made without TX metadata.
    NoMetadata,
    /// The checksum would lie outside the packet's bytes in this frame.
    Outside(NoRoom),
}

impl fmt::Display for ChecksumError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMetadata => f.write_str("the UMEM was made without TX metadata"),
            Self::Outside(room) => write!(f, "the checksum lies outside the packet: {room}"),
        }
    }
}

impl core::error::Error for ChecksumError {}

/// Who owns a frame's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner(u8);

impl Owner {
    const FREE: Self = Self(0);
    const HELD: Self = Self(1);

    #[inline]
    fn receiving(lender: Lender) -> Self {
        Self(2 + 2 * lender.0)
    }

    #[inline]
    fn transmitting(lender: Lender) -> Self {
        Self(3 + 2 * lender.0)
    }
}

/// Which of a UMEM's sockets frames are lent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lender(u8);

/// What the first socket on a UMEM decides for all that share its registration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settled {
    pub(crate) need_wakeup: bool,
    pub(crate) multi_buffer: bool,
}

/// A queue that no other queue of this machine is mistaken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueId {
    /// The network namespace's cookie; interface indices are its own.
    pub(crate) namespace: u64,
    pub(crate) interface: u32,
    pub(crate) queue: u32,
}

/// What is known of a socket on this memory.
#[derive(Debug)]
struct Slot {
    socket: Weak<OwnedFd>,
    settled: Settled,
    /// Where it is bound; `None` if the kernel cannot tell namespaces apart (before Linux 5.14).
    queue: Option<QueueId>,
    /// Whether the frames lent to it were taken back, because the queue has another socket.
    recovered: bool,
}

/// Sockets that one UMEM can have; bounded by `Owner`'s byte.
const LENDERS_MAX: usize = 126;

/// Memory of equal frames, shared with the kernel, and the pool of those that are free.
///
/// One worker owns it: it is `Send` and not `Sync`. Frames leave the pool by [`Umem::take`] and
/// come back by [`Umem::give`]; sockets lend them to the kernel and take them back.
pub struct Umem {
    memory: Mapping,
    file: Option<OwnedFd>,
    id: u16,
    shift: u8,
    frames: u32,
    headroom: u16,
    huge_pages: bool,
    tx_metadata: bool,
    /// Free frames, the last used on top, where it may still be in the cache. Never grows beyond
    /// its first capacity.
    free: Vec<u32>,
    owners: Box<[Owner]>,
    receiving: u32,
    transmitting: u32,
    /// The sockets opened on this memory, some of them perhaps closed since; `Lender` counts them.
    slots: Vec<Slot>,
}

/// Size of a huge page in bytes.
const HUGE_PAGE: u64 = 2 << 20;

impl Umem {
    /// Makes a UMEM of which all frames are free.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for impossible options, [`Error::NoHugePages`], or [`Error::System`] when
    /// the memory cannot be had.
    pub fn new(options: &UmemOptions) -> Result<Self, Error> {
        let len = options.check()?;
        let (memory, file) = numa::on_node(options.numa_node, || options.map(len))?;
        Self::on(options, memory, file)
    }

    /// Makes a UMEM of the first bytes of `file`, such as a BPF map that a program reads packets from. Of the options,
    /// `memory`, `huge_pages` and `numa_node` are the file's and do not count.
    ///
    /// # Errors
    ///
    /// As [`Umem::new`]; the file cannot be mapped, for example because it is shorter.
    ///
    /// # Safety
    ///
    /// As long as the UMEM lives nobody but the UMEM writes those bytes of the file or takes them away.
    pub unsafe fn from_file(options: &UmemOptions, file: OwnedFd) -> Result<Self, Error> {
        let options = UmemOptions {
            huge_pages: false,
            ..options.clone()
        };
        let len = options.check()?;
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let memory = Mapping::shared(file.as_fd(), bytes, 0)
            .map_err(|source| Error::system("map", format!("UMEM of {len} bytes"), source))?;
        Self::on(&options, memory, Some(file))
    }

    fn on(options: &UmemOptions, memory: Mapping, file: Option<OwnedFd>) -> Result<Self, Error> {
        let frames = options.frames;
        // The first frame to be taken is the first in memory.
        let free = (0..frames).rev().collect();
        Ok(Self {
            memory,
            file,
            id: next_id()?,
            shift: if options.frame_size == 4096 { 12 } else { 11 },
            frames,
            headroom: options.headroom,
            huge_pages: options.huge_pages,
            tx_metadata: options.tx_metadata,
            free,
            owners: vec![Owner::FREE; frames as usize].into(),
            receiving: 0,
            transmitting: 0,
            slots: Vec::new(),
        })
    }

    /// Takes a free frame: an empty packet with the headroom that a received one would have.
    #[inline]
    pub fn take(&mut self) -> Option<Frame> {
        let chunk = self.free.pop()?;
        self.owners[chunk as usize] = Owner::HELD;
        Frame::new(self.id, chunk, self.shift, self.default_start(), 0)
    }

    /// Where a frame's packet lies: the frame's number, which times the frame size is its place in the memory, and the
    /// packet's first byte in the frame. For others who read the memory, such as a BPF program.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn place(&self, frame: &Frame) -> (u32, usize) {
        self.check(frame);
        (frame.chunk, frame.start())
    }

    /// Puts a frame back into the pool.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    #[expect(clippy::needless_pass_by_value, reason = "consumes the token")]
    pub fn give(&mut self, frame: Frame) {
        self.check(&frame);
        self.owners[frame.chunk as usize] = Owner::FREE;
        self.free.push(frame.chunk);
    }

    /// The packet.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn packet<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        let start = self.pointer(frame, frame.start());
        // SAFETY: `pointer` gives `frame.end() - frame.start()` bytes and more within the mapping,
        // and by points 1 to 3 of the module's head nobody writes them while `frame` is borrowed.
        unsafe { slice::from_raw_parts(start, frame.len()) }
    }

    /// The packet, to be changed in place.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn packet_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        let len = frame.len();
        self.bytes_mut(frame, frame.start(), len)
    }

    /// The packet, and the `N` bytes directly before it: write a header to their end and call
    /// [`Frame::push_front`] with its length. `None` if there is less headroom.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn front_and_packet<'a, const N: usize>(
        &'a self,
        frame: &'a mut Frame,
    ) -> Option<(&'a mut [u8; N], &'a mut [u8])> {
        if frame.headroom() < N {
            return None;
        }
        let (start, len) = (frame.start() - N, N + frame.len());
        self.bytes_mut(frame, start, len).split_first_chunk_mut()
    }

    /// Starts a packet: makes it empty, with `headroom` bytes before it, and gives all the bytes
    /// from there to the frame's end. Write a packet there and call [`Frame::set_len`].
    ///
    /// # Errors
    ///
    /// When the frame is smaller than the headroom.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn whole_mut<'a>(
        &'a self,
        frame: &'a mut Frame,
        headroom: usize,
    ) -> Result<&'a mut [u8], NoRoom> {
        frame.reset(headroom)?;
        Ok(self.spare_mut(frame))
    }

    /// The bytes between the packet's end and the frame's. Write them and call
    /// [`Frame::set_len`].
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    pub fn spare_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        let len = frame.tailroom();
        self.bytes_mut(frame, frame.end(), len)
    }

    /// Asks the transmitting side to finish an Internet checksum: to sum from byte `start` of the
    /// packet to its end and to store the result at `start + offset`, where the sum of the pseudo
    /// header must already be. The request stays with these bytes when headers are pushed or
    /// popped before them, and is forgotten when they are cut off.
    ///
    /// In copy mode the kernel does what it would for its own packets: the device sums if it can,
    /// the kernel if not (`xsk_build_skb` in `net/xdp/xsk.c`).
    ///
    /// # Errors
    ///
    /// When the UMEM was made without TX metadata, or the checksum is not within the packet.
    ///
    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    pub fn request_checksum(
        &self,
        frame: &mut Frame,
        start: usize,
        offset: u8,
    ) -> Result<(), ChecksumError> {
        self.check(frame);
        if !self.tx_metadata {
            return Err(ChecksumError::NoMetadata);
        }
        frame
            .request_checksum(start, offset)
            .map_err(ChecksumError::Outside)
    }

    /// Where the frames are.
    pub fn census(&self) -> Census {
        Census {
            frames: self.frames,
            free: self.free(),
            held: self.outstanding(),
            receiving: self.receiving,
            transmitting: self.transmitting,
        }
    }

    /// Frames that are held as [`Frame`]s, or were lost by dropping one.
    pub fn outstanding(&self) -> u32 {
        self.frames - self.free() - self.receiving - self.transmitting
    }

    /// Size of a frame in bytes.
    pub fn frame_size(&self) -> usize {
        1 << self.shift
    }

    /// NUMA node that all of the memory lies on; `None` if it lies on several, or the kernel does not
    /// tell.
    pub fn numa_node(&self) -> Option<u32> {
        let page = if self.huge_pages { HUGE_PAGE } else { 4096 };
        numa::node_of(&self.memory, usize::try_from(page).ok()?)
    }

    /// The memory file, if the UMEM has one. Its length is sealed.
    ///
    /// # Safety
    ///
    /// Whoever writes to the file, or to another mapping of it, must own the frames that it writes
    /// to: only frames that this process has handed over, and not through this `Umem`, whose
    /// slices would change under their borrowers.
    pub unsafe fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Where a packet starts in a fresh frame, as in one that the kernel received in copy mode.
    #[inline]
    fn default_start(&self) -> u16 {
        sys::XDP_PACKET_HEADROOM + self.headroom
    }

    /// # Panics
    ///
    /// When the frame belongs to another UMEM.
    #[inline]
    fn check(&self, frame: &Frame) {
        assert!(
            frame.umem() == self.id,
            "a frame was used with a UMEM that it does not belong to"
        );
    }

    /// The byte at `offset` of the frame. Everything from there to the frame's end lies within the
    /// mapping.
    #[inline]
    fn pointer(&self, frame: &Frame, offset: usize) -> *mut u8 {
        self.check(frame);
        debug_assert!(offset <= self.frame_size(), "an offset beyond the frame");
        let place = ((frame.chunk as usize) << self.shift) + offset;
        // SAFETY: the frame is of this UMEM (checked), so its chunk is below `frames` (point 4 of
        // the module's head), callers pass an offset of at most the frame's size (`frame.rs`), and
        // `frames` times the frame's size is at most the mapping's length (`UmemOptions::check`).
        let byte = unsafe { self.memory.base().add(place) };
        byte.as_ptr()
    }

    /// `len` bytes of the frame from `offset` on; both as `frame.rs` computes them, so that they
    /// lie within the frame.
    #[inline]
    fn bytes_mut<'a>(&'a self, frame: &'a mut Frame, offset: usize, len: usize) -> &'a mut [u8] {
        let start = self.pointer(frame, offset);
        // SAFETY: `offset + len` is at most the frame's size (callers), the frame lies within the
        // mapping, and by points 1 to 3 of the module's head the exclusive borrow of `frame` is an
        // exclusive borrow of its bytes.
        unsafe { slice::from_raw_parts_mut(start, len) }
    }
}

impl fmt::Debug for Umem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Umem")
            .field("id", &self.id)
            .field("frame_size", &self.frame_size())
            .field("census", &self.census())
            .finish_non_exhaustive()
    }
}

/// What sockets need: registration, and lending frames to the kernel.
impl Umem {
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// Tells the kernel of this memory, on a socket that has none yet.
    pub(crate) fn register(&self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        let bytes = u64::from(self.frames) << self.shift;
        let (flags, metadata_len) = if self.tx_metadata {
            (sys::XDP_UMEM_TX_METADATA_LEN, u32::from(FRAME_RESERVED))
        } else {
            (0, 0)
        };
        let registration = sys::xdp_umem_reg {
            addr: self.memory.base().as_ptr().expose_provenance() as u64,
            len: bytes,
            chunk_size: 1 << self.shift,
            headroom: self.headroom.into(),
            flags,
            tx_metadata_len: metadata_len,
        };
        sys::set_option(socket, sys::SOL_XDP, sys::XDP_UMEM_REG, registration).map_err(|source| {
            let object = format!("UMEM of {} frames", self.frames);
            match source.raw_os_error() {
                Some(libc::ENOBUFS) => Error::LockedMemory {
                    bytes,
                    limit: sys::locked_memory_limit(),
                    source,
                },
                Some(libc::EINVAL) if self.tx_metadata => Error::System {
                    operation: "register",
                    object,
                    source,
                    advice: "TX metadata needs Linux 6.11 or later",
                },
                _ => Error::system("register", object, source),
            }
        })
    }

    /// A socket that this memory is registered on and that is still open, and what it settled.
    pub(crate) fn registered_on(&self) -> Option<(Arc<OwnedFd>, Settled)> {
        let open = |slot: &Slot| Some((slot.socket.upgrade()?, slot.settled));
        self.slots.iter().find_map(open)
    }

    /// Adds a socket that was just bound to `queue`; gives what its frames are lent under.
    ///
    /// Frames that an earlier socket on the same queue took with it become free: the kernel binds a
    /// queue only when it has taken it from its last owner, rings, driver and all (`xp_assign_dev`
    /// and `xp_clear_dev` in `net/xdp/xsk_buff_pool.c`), so nobody will touch them any more.
    pub(crate) fn add_socket(
        &mut self,
        socket: &Arc<OwnedFd>,
        settled: Settled,
        queue: Option<QueueId>,
    ) -> Result<Lender, Error> {
        for place in 0..self.slots.len() {
            if queue.is_some() && self.slots[place].queue == queue {
                self.recover(place);
            }
        }
        let added = Slot {
            socket: Arc::downgrade(socket),
            settled,
            queue,
            recovered: false,
        };
        // A half of the old socket that is still about would be taken for one of the new.
        let vacant = |slot: &Slot| slot.recovered && slot.socket.strong_count() == 0;
        let place = self
            .slots
            .iter()
            .position(vacant)
            .unwrap_or(self.slots.len());
        if place == LENDERS_MAX {
            return Err(Error::Setting {
                name: "sockets",
                value: place as u64 + 1,
                rule: "a UMEM can have at most 126 sockets",
            });
        }
        if place == self.slots.len() {
            self.slots.push(added);
        } else {
            self.slots[place] = added;
        }
        #[expect(clippy::cast_possible_truncation, reason = "below LENDERS_MAX")]
        Ok(Lender(place as u8))
    }

    /// Puts all frames that were lent to the socket in this slot back into the pool.
    fn recover(&mut self, place: usize) {
        #[expect(clippy::cast_possible_truncation, reason = "below LENDERS_MAX")]
        let lender = Lender(place as u8);
        for (owner, chunk) in self.owners.iter_mut().zip(0..) {
            if *owner == Owner::receiving(lender) {
                self.receiving -= 1;
            } else if *owner == Owner::transmitting(lender) {
                self.transmitting -= 1;
            } else {
                continue;
            }
            *owner = Owner::FREE;
            self.free.push(chunk);
        }
        self.slots[place].recovered = true;
    }

    /// Free frames.
    #[inline]
    pub(crate) fn free(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    /// Lends a free frame for receiving; gives the address for the fill ring.
    #[inline]
    pub(crate) fn lend_to_receive(&mut self, lender: Lender) -> Option<u64> {
        let chunk = self.free.pop()?;
        self.owners[chunk as usize] = Owner::receiving(lender);
        self.receiving += 1;
        Some(u64::from(chunk) << self.shift)
    }

    /// Takes a received frame back; `None` if the kernel names a frame that it was not lent, or a
    /// place that is not within it (the frame is then free).
    #[inline]
    pub(crate) fn received(&mut self, lender: Lender, descriptor: sys::xdp_desc) -> Option<Frame> {
        let (chunk, start) = self.locate(descriptor.addr)?;
        let owner = self.owners.get_mut(chunk as usize)?;
        if *owner != Owner::receiving(lender) {
            return None;
        }
        self.receiving -= 1;
        let Some(mut frame) = Frame::new(self.id, chunk, self.shift, start, descriptor.len) else {
            *owner = Owner::FREE;
            self.free.push(chunk);
            return None;
        };
        *owner = Owner::HELD;
        frame.set_continues(descriptor.options & sys::XDP_PKT_CONTD != 0);
        Some(frame)
    }

    /// Lends a frame for transmitting; gives the descriptor for the TX ring.
    #[inline]
    #[expect(clippy::needless_pass_by_value, reason = "consumes the token")]
    pub(crate) fn lend_to_transmit(&mut self, lender: Lender, frame: Frame) -> sys::xdp_desc {
        self.check(&frame);
        let mut options = 0;
        if frame.continues() {
            options |= sys::XDP_PKT_CONTD;
        }
        if let Some((csum_start, csum_offset)) = frame.checksum() {
            self.write_metadata(&frame, csum_start, csum_offset);
            options |= sys::XDP_TX_METADATA;
        }
        self.owners[frame.chunk as usize] = Owner::transmitting(lender);
        self.transmitting += 1;
        sys::xdp_desc {
            addr: (u64::from(frame.chunk) << self.shift) + frame.start() as u64,
            #[expect(clippy::cast_possible_truncation, reason = "at most the frame's size")]
            len: frame.len() as u32,
            options,
        }
    }

    /// Takes a transmitted frame back into the pool; `false` if the kernel names a frame that it
    /// was not lent.
    #[inline]
    pub(crate) fn transmitted(&mut self, lender: Lender, address: u64) -> bool {
        let Some((chunk, _)) = self.locate(address) else {
            return false;
        };
        match self.owners.get_mut(chunk as usize) {
            Some(owner) if *owner == Owner::transmitting(lender) => {
                *owner = Owner::FREE;
                self.transmitting -= 1;
                self.free.push(chunk);
                true
            }
            _ => false,
        }
    }

    /// Splits the kernel's address into frame and offset.
    #[inline]
    fn locate(&self, address: u64) -> Option<(u32, u16)> {
        let chunk = u32::try_from(address >> self.shift).ok()?;
        #[expect(clippy::cast_possible_truncation, reason = "masked to 12 bits at most")]
        let offset = (address & ((1 << self.shift) - 1)) as u16;
        Some((chunk, offset))
    }

    /// Writes the request that lies directly before the packet.
    #[inline]
    fn write_metadata(&mut self, frame: &Frame, csum_start: u16, csum_offset: u16) {
        let metadata = sys::TxMetadata {
            flags: sys::XDP_TXMD_FLAGS_CHECKSUM.into(),
            csum_start,
            csum_offset,
            pad: 0,
            launch_time: 0,
        };
        let place = self.pointer(frame, frame.start() - size_of::<sys::TxMetadata>());
        let place = place.cast::<sys::TxMetadata>();
        // SAFETY: a packet starts at `FRAME_RESERVED` or later, which is the metadata's size, so
        // the place lies within the frame; the caller holds the frame's token; alignment is not
        // required.
        unsafe { place.write_unaligned(metadata) };
    }
}

const _: () = assert!(size_of::<sys::TxMetadata>() == FRAME_RESERVED as usize);

impl UmemOptions {
    /// The size of the memory in bytes.
    fn check(&self) -> Result<u64, Error> {
        let refuse = |name, value, rule| Err(Error::Setting { name, value, rule });
        if self.frame_size != 2048 && self.frame_size != 4096 {
            let rule = "the size of a frame is 2048 or 4096 bytes";
            return refuse("frame_size", self.frame_size.into(), rule);
        }
        if self.frames == 0 {
            return refuse("frames", 0, "a UMEM has at least one frame");
        }
        // The kernel's rule (net/xdp/xdp_umem.c), with room for at least one byte.
        let room = self.frame_size - u32::from(sys::XDP_PACKET_HEADROOM);
        if u32::from(self.headroom) >= room {
            let rule = "headroom and the kernel's 256 bytes leave no room for a packet";
            return refuse("headroom", self.headroom.into(), rule);
        }
        let len = u64::from(self.frames) * u64::from(self.frame_size);
        if self.huge_pages {
            return Ok(len.next_multiple_of(HUGE_PAGE));
        }
        Ok(len)
    }

    fn map(&self, len: u64) -> Result<(Mapping, Option<OwnedFd>), Error> {
        let refuse = |source: std::io::Error| match source.raw_os_error() {
            Some(libc::ENOMEM) if self.huge_pages => Error::NoHugePages {
                pages: len / HUGE_PAGE,
                source,
            },
            _ => Error::system("map", format!("UMEM of {len} bytes"), source),
        };
        // Neither fails on the 64-bit machines that AF_XDP drivers exist for.
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let file_len = libc::off_t::try_from(len).unwrap_or(libc::off_t::MAX);
        match self.memory {
            Memory::Anonymous => {
                let huge = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
                let flags = if self.huge_pages { huge } else { 0 };
                let memory = Mapping::anonymous(bytes, flags).map_err(refuse)?;
                Ok((memory, None))
            }
            Memory::File => {
                let huge = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
                let flags = if self.huge_pages { huge } else { 0 };
                let file = sys::memory_file(file_len, flags).map_err(refuse)?;
                let memory = Mapping::shared(file.as_fd(), bytes, 0).map_err(refuse)?;
                Ok((memory, Some(file)))
            }
        }
    }
}

/// A number that no other UMEM of this process has or had.
fn next_id() -> Result<u16, Error> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    NEXT.try_update(Ordering::Relaxed, Ordering::Relaxed, |id| id.checked_add(1))
        .map_err(|id| Error::Setting {
            name: "UMEMs",
            value: id.into(),
            rule: "a process can make at most 65535 UMEMs in its life",
        })
}

#[cfg(test)]
mod tests;
