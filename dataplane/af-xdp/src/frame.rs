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
        let wanted = start.saturating_add(usize::from(offset) + CHECKSUM_LEN);
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

#[cfg(test)]
mod tests {
    use super::{Frame, NoRoom};

    fn frame(start: u16, len: u32) -> Frame {
        Frame::new(1, 0, 11, start, len).unwrap()
    }

    fn place(frame: &Frame) -> (usize, usize, usize) {
        (frame.headroom(), frame.len(), frame.tailroom())
    }

    #[test]
    fn a_packet_lies_within_its_frame() {
        assert_eq!(place(&frame(24, 0)), (0, 0, 2024));
        assert_eq!(place(&frame(24, 2024)), (0, 2024, 0));
        assert_eq!(place(&frame(2048, 0)), (2024, 0, 0));
        for (start, len) in [(23, 1), (0, 0), (24, 2025), (2048, 1), (2049, 0)] {
            assert!(Frame::new(1, 0, 11, start, len).is_none(), "{start} {len}");
        }
        for len in [u32::MAX, u32::MAX - 23, 1 << 16] {
            assert!(Frame::new(1, 0, 11, 24, len).is_none(), "{len}");
        }
        assert_eq!(
            place(&Frame::new(1, 0, 12, 24, 4072).unwrap()),
            (0, 4072, 0)
        );
    }

    #[test]
    fn the_start_moves_within_headroom_and_packet() {
        let mut frame = frame(256, 100);
        frame.push_front(50).unwrap();
        assert_eq!(place(&frame), (182, 150, 1692));
        frame.push_front(182).unwrap();
        assert_eq!(place(&frame), (0, 332, 1692));
        let refused = NoRoom {
            wanted: 1,
            available: 0,
        };
        assert_eq!(frame.push_front(1), Err(refused));
        frame.pop_front(332).unwrap();
        assert_eq!(place(&frame), (332, 0, 1692));
        assert!(frame.pop_front(1).is_err());
        for absurd in [usize::MAX, 1 << 16, (1 << 16) + 1] {
            assert!(frame.push_front(absurd).is_err());
            assert!(frame.pop_front(absurd).is_err());
            assert!(frame.set_len(absurd).is_err());
            assert!(frame.reset(absurd).is_err());
        }
        assert_eq!(
            place(&frame),
            (332, 0, 1692),
            "what was refused changed nothing"
        );
    }

    #[test]
    fn the_end_moves_within_the_frame() {
        let mut frame = frame(256, 100);
        frame.truncate(200);
        assert_eq!(place(&frame), (232, 100, 1692), "truncate does not grow");
        frame.truncate(10);
        assert_eq!(place(&frame), (232, 10, 1782));
        frame.set_len(1792).unwrap();
        assert_eq!(place(&frame), (232, 1792, 0));
        assert!(frame.set_len(1793).is_err());
        frame.reset(2024).unwrap();
        assert_eq!(place(&frame), (2024, 0, 0));
        assert!(frame.reset(2025).is_err());
    }

    #[test]
    fn a_checksum_request_stays_with_its_bytes() {
        let mut frame = frame(256, 100);
        frame.request_checksum(34, 6).unwrap();
        assert_eq!(frame.checksum(), Some((34, 6)));
        frame.push_front(50).unwrap();
        assert_eq!(frame.checksum(), Some((84, 6)));
        frame.pop_front(84).unwrap();
        assert_eq!(frame.checksum(), Some((0, 6)));
        frame.truncate(8);
        assert_eq!(
            frame.checksum(),
            Some((0, 6)),
            "the sum's last byte is still there"
        );
        frame.truncate(7);
        assert_eq!(frame.checksum(), None);
    }

    #[test]
    fn a_checksum_whose_bytes_are_gone_does_not_come_back() {
        let mut popped = frame(256, 100);
        popped.request_checksum(34, 6).unwrap();
        popped.pop_front(35).unwrap();
        popped.push_front(35).unwrap();
        assert_eq!(popped.checksum(), None);
        let mut cut = frame(256, 100);
        cut.request_checksum(34, 6).unwrap();
        cut.set_len(40).unwrap();
        cut.set_len(100).unwrap();
        assert_eq!(cut.checksum(), None);
        let mut reused = frame(256, 100);
        reused.request_checksum(34, 6).unwrap();
        reused.set_continues(true);
        reused.reset(232).unwrap();
        assert_eq!((reused.checksum(), reused.continues()), (None, false));
    }
}
