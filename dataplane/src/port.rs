//! What a worker moves packets between: the NIC queue and the host door are both a [`Port`].

use af_xdp::{Frame, Umem};

use crate::verdict::DropReason;

/// A burst of frames. Its capacity is made once, so that pushing never allocates.
pub type Burst = Vec<Frame>;

/// What a port did with a burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transmitted {
    /// Packets taken.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
}

/// Super-packets that passed a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SuperPackets {
    /// Received uncut.
    pub received: u64,
    /// Packets that were cut from them.
    pub cut: u64,
    /// Transmitted.
    pub transmitted: u64,
    /// Packets that were joined for that.
    pub joined: u64,
}

/// One side of a worker. Frames are tokens: what a port takes is gone from the caller, what it returns is the caller's.
pub trait Port {
    /// Why a packet that this port would not take is dropped.
    const REFUSED: DropReason;

    /// Says whether this port should receive at all. The NIC queue has no choice; the host door gives packets that it
    /// does not want to the other workers' queues.
    fn open(&mut self, _open: bool) {}

    /// Brings back the frames whose transmission is over.
    fn reclaim(&mut self, umem: &mut Umem);

    /// Lends free frames for receiving.
    fn refill(&mut self, umem: &mut Umem);

    /// Appends at most `most` received packets to an empty burst.
    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize);

    /// How many packets [`Port::transmit`] is sure to take at this moment.
    fn room(&mut self) -> usize;

    /// Transmits from the front of the burst; what it leaves in the burst was refused.
    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted;

    /// How many packets it has in hand: that wait to be transmitted, or to be received.
    fn pending(&self) -> usize;

    /// Super-packets since this was last called. Elsewhere what is counted are packets as they are on the wire: those that
    /// a super-packet was cut into or joined from.
    fn take_super_packets(&mut self) -> SuperPackets {
        SuperPackets::default()
    }

    /// Tells the kernel what it must be told after a turn; returns the number of system calls that took.
    fn flush(&mut self) -> u64;
}
