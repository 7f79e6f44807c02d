//! What a worker moves packets between: the NIC queue and the host door are both a [`Port`].

use af_xdp::{Frame, Umem};

use crate::offload::segment::Cut;
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

/// A super-packet as the host has handed it over.
#[derive(Debug, Clone, Copy)]
pub struct Whole<'p> {
    /// Its bytes.
    pub packet: &'p [u8],
    /// How it is to be cut.
    pub cut: &'p Cut,
}

/// What a port did with a [`Whole`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WholeSent {
    /// All of its packets are transmitted.
    Taken,
    /// There is no room for it at this moment.
    Later,
    /// It has to be cut.
    Refused,
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

    /// Says whether [`Port::receive`] should leave super-packets whole, and stop at each of them.
    fn keep_whole(&mut self, _keep: bool) {}

    /// Writes the first packet of the super-packet that waits whole to a frame, if there is one.
    fn first_of_whole(&self, _umem: &Umem, _frame: &mut Frame) -> bool {
        false
    }

    /// The super-packet that waits whole.
    fn whole(&self) -> Option<Whole<'_>> {
        None
    }

    /// Ends the wait: the super-packet has been transmitted, or is to be received in packets.
    fn end_whole(&mut self, _transmitted: bool) {}

    /// Whether it takes super-packets whole.
    fn takes_whole(&self) -> bool {
        false
    }

    /// Transmits a super-packet behind all that was transmitted before. `outer` are the tunnel headers of its first
    /// packet, which become those of the whole.
    fn transmit_whole(&mut self, _outer: &mut [u8], _whole: &Whole<'_>) -> WholeSent {
        WholeSent::Refused
    }

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
