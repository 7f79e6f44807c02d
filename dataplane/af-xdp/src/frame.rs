//! One frame as a token, and the arithmetic of where its packet lies.

use core::fmt;

/// Bytes at the front of each frame that a packet never covers: a packet can always be preceded by
/// its TX metadata, whether the UMEM was made for it or not.
pub const FRAME_RESERVED: u16 = 24;

/// The right to one frame of one UMEM, and where the packet in it lies.
///
/// Whoever holds the value owns the frame's bytes. It cannot be copied or made; it comes from
/// [`Umem::take`](crate::Umem::take) or from a [`Receiver`](crate::Receiver) and goes to
/// [`Umem::give`](crate::Umem::give) or to a [`Transmitter`](crate::Transmitter). A frame that is
/// dropped is lost to its UMEM until the UMEM itself is dropped, and shows in
/// [`Census::held`](crate::Census).
///
/// ```text
///  0        24                start            start+len      capacity
///  ├────────┼──── headroom ───┼──── packet ────┼── tailroom ──┤
///   reserved
/// ```
#[must_use = "a dropped frame is lost to its UMEM: give it back"]
pub struct Frame {
    /// Which frame of the UMEM.
    pub(crate) chunk: u32,
    /// Which UMEM of this process.
    umem: u16,
    /// Where the packet starts, from the frame's first byte; at least `FRAME_RESERVED`.
    start: u16,
    /// The packet's length; `start + len` is at most the capacity.
    len: u16,
    /// Where the kernel shall start to sum, from the frame's first byte; 0 if it shall not.
    checksum_start: u16,
    /// Where it shall store the sum, from `checksum_start`.
    checksum_offset: u8,
    /// The frame's size as a power of two.
    shift: u8,
    /// Whether the packet goes on in the next frame.
    continues: bool,
}

const _: () = assert!(size_of::<Frame>() == 16, "four frames in a cache line");

/// A packet's start or end cannot move that far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// Bytes that were asked for.
    pub wanted: usize,
    /// Bytes that there are.
    pub available: usize,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes wanted in a frame that has {}",
            self.wanted, self.available
        )
    }
}

impl core::error::Error for NoRoom {}

impl Frame {
    /// The token for `chunk`. `None` if the packet would leave the frame.
    ///
    /// The caller, `Umem`, sees to it that there is one token per chunk.
    #[inline]
    pub(crate) fn new(umem: u16, chunk: u32, shift: u8, start: u16, len: u32) -> Option<Self> {
        let end = u32::from(start).checked_add(len)?;
        if start < FRAME_RESERVED || end > 1 << shift {
            return None;
        }
        Some(Self {
            chunk,
            umem,
            start,
            len: u16::try_from(len).ok()?,
            checksum_start: 0,
            checksum_offset: 0,
            shift,
            continues: false,
        })
    }

    /// The packet's length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether the packet has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes by which the packet can grow at its front.
    #[inline]
    pub fn headroom(&self) -> usize {
        usize::from(self.start - FRAME_RESERVED)
    }

    /// Bytes by which the packet can grow at its end.
    #[inline]
    pub fn tailroom(&self) -> usize {
        self.capacity() - self.end()
    }

    /// Whether the packet goes on in the next frame of the same burst (`XDP_PKT_CONTD`).
    #[inline]
    pub fn continues(&self) -> bool {
        self.continues
    }

    /// Says whether the packet goes on in the next frame that is sent.
    #[inline]
    pub fn set_continues(&mut self, continues: bool) {
        self.continues = continues;
    }

    /// Grows the packet by `bytes` at its front; what is there is undefined, write it.
    ///
    /// # Errors
    ///
    /// When there is less headroom; the frame is unchanged.
    #[inline]
    pub fn push_front(&mut self, bytes: usize) -> Result<(), NoRoom> {
        let count = within(bytes, self.headroom())?;
        self.start -= count;
        self.len += count;
        Ok(())
    }

    /// Takes `bytes` off the packet's front.
    ///
    /// # Errors
    ///
    /// When the packet is shorter; the frame is unchanged.
    #[inline]
    pub fn pop_front(&mut self, bytes: usize) -> Result<(), NoRoom> {
        let count = within(bytes, self.len())?;
        self.start += count;
        self.len -= count;
        self.forget_lost_checksum();
        Ok(())
    }

    /// Cuts the packet to `len` bytes; does nothing if it is not longer.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if let Ok(len) = within(len, self.len()) {
            self.len = len;
            self.forget_lost_checksum();
        }
    }

    /// Makes the packet `len` bytes long, from where it starts. Bytes that this adds are whatever
    /// the frame held there.
    ///
    /// # Errors
    ///
    /// When the frame ends before; the frame is unchanged.
    #[inline]
    pub fn set_len(&mut self, len: usize) -> Result<(), NoRoom> {
        self.len = within(len, self.capacity() - usize::from(self.start))?;
        self.forget_lost_checksum();
        Ok(())
    }

    /// Makes the packet an empty one, with `headroom` bytes before it.
    ///
    /// # Errors
    ///
    /// When the frame is smaller; the frame is unchanged.
    #[inline]
    pub fn reset(&mut self, headroom: usize) -> Result<(), NoRoom> {
        let room = self.capacity() - usize::from(FRAME_RESERVED);
        self.start = FRAME_RESERVED + within(headroom, room)?;
        self.len = 0;
        self.checksum_start = 0;
        self.continues = false;
        Ok(())
    }

    /// The frame's size in bytes.
    #[inline]
    fn capacity(&self) -> usize {
        1 << self.shift
    }

    /// Where the packet starts, from the frame's first byte.
    #[inline]
    pub(crate) fn start(&self) -> usize {
        usize::from(self.start)
    }

    /// Where the packet ends, from the frame's first byte.
    #[inline]
    pub(crate) fn end(&self) -> usize {
        usize::from(self.start) + usize::from(self.len)
    }

    #[inline]
    pub(crate) fn umem(&self) -> u16 {
        self.umem
    }

    /// Where the kernel shall sum from and store to, from the packet's first byte and from there.
    #[inline]
    pub(crate) fn checksum(&self) -> Option<(u16, u16)> {
        (self.checksum_start != 0).then(|| {
            (
                self.checksum_start - self.start,
                u16::from(self.checksum_offset),
            )
        })
    }

    /// Asks the kernel to sum from byte `start` of the packet on and to store at `start + offset`.
    /// The request stays with those bytes when the packet's front moves.
    pub(crate) fn request_checksum(&mut self, start: usize, offset: u8) -> Result<(), NoRoom> {
        let wanted = start + usize::from(offset) + CHECKSUM_LEN;
        within(wanted, self.len())?;
        self.checksum_start = self.start + within(start, self.len())?;
        self.checksum_offset = offset;
        Ok(())
    }

    /// Forgets a checksum whose bytes are no longer in the packet. The kernel would refuse the
    /// descriptor for ever and send nothing behind it (`xsk_build_skb` in `net/xdp/xsk.c`).
    #[inline]
    fn forget_lost_checksum(&mut self) {
        let stored = usize::from(self.checksum_start) + usize::from(self.checksum_offset);
        if self.checksum_start < self.start || stored + CHECKSUM_LEN > self.end() {
            self.checksum_start = 0;
        }
    }
}

/// Size of an Internet checksum in bytes.
const CHECKSUM_LEN: usize = 2;

/// `wanted` as the short integer that frames are described by, if it is at most `available`.
#[inline]
fn within(wanted: usize, available: usize) -> Result<u16, NoRoom> {
    match u16::try_from(wanted) {
        Ok(short) if wanted <= available => Ok(short),
        _ => Err(NoRoom { wanted, available }),
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("len", &self.len)
            .field("headroom", &self.headroom())
            .field("tailroom", &self.tailroom())
            .field("continues", &self.continues)
            .field("checksum", &self.checksum())
            .finish_non_exhaustive()
    }
}
