//! The underlay side of a worker: an AF_XDP socket on one NIC queue.

use af_xdp::{Frame, Receiver, Transmitter, Umem};

use crate::port::{Burst, Port, Transmitted};
use crate::verdict::DropReason;

/// Both halves of the socket, and how many frames of the UMEM it may lend to the kernel for receiving.
#[derive(Debug)]
pub struct NicQueue {
    receiver: Receiver,
    transmitter: Transmitter,
    /// Frames that stay in the pool whatever the fill ring could take, so that the host side can always receive.
    reserve: usize,
    tx_entries: usize,
}

/// Frames moved between a ring and the pool at a time.
const RECLAIM_MOST: usize = 512;

impl NicQueue {
    /// Joins the halves of a socket. `tx_entries` is the size of its transmit ring; `reserve` frames are never lent.
    pub fn new(
        receiver: Receiver,
        transmitter: Transmitter,
        tx_entries: usize,
        reserve: usize,
    ) -> Self {
        Self {
            receiver,
            transmitter,
            reserve,
            tx_entries,
        }
    }
}

impl Port for NicQueue {
    const REFUSED: DropReason = DropReason::NicTransmitFull;

    #[inline]
    fn reclaim(&mut self, umem: &mut Umem) {
        self.transmitter.reclaim(umem, RECLAIM_MOST);
    }

    #[inline]
    fn refill(&mut self, umem: &mut Umem) {
        let spare = (umem.census().free as usize).saturating_sub(self.reserve);
        if spare > 0 {
            self.receiver.refill(umem, spare.min(RECLAIM_MOST));
        }
    }

    #[inline]
    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize) {
        self.receiver.receive(umem, burst, most);
    }

    #[inline]
    fn room(&mut self) -> usize {
        self.tx_entries.saturating_sub(self.transmitter.in_tx())
    }

    #[inline]
    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        let offered: u64 = burst.iter().map(|frame| frame.len() as u64).sum();
        let packets = self.transmitter.send(umem, burst) as u64;
        let refused: u64 = burst.iter().map(|frame: &Frame| frame.len() as u64).sum();
        Transmitted {
            packets,
            bytes: offered - refused,
        }
    }

    #[inline]
    fn pending(&self) -> usize {
        self.transmitter.in_tx()
    }

    #[inline]
    fn flush(&mut self) -> u64 {
        let mut calls = 0;
        if self.transmitter.in_tx() > 0 && self.transmitter.needs_wakeup() {
            calls += 1;
            // Fails only when the NIC is down or gone; the watcher sees that too, and says so once.
            let _ = self.transmitter.kick();
        }
        if self.receiver.needs_wakeup() {
            calls += 1;
            let _ = self.receiver.wake();
        }
        calls
    }
}
