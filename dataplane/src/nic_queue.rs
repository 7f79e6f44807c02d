//! The underlay side of a worker: an AF_XDP socket on one NIC queue.

use af_xdp::{Frame, Receiver, Transmitter, Umem};

use crate::inject::Injector;
use crate::port::{Burst, Port, Transmitted, Whole, WholeSent};
use crate::tunnel_gso::TunnelGso;
use crate::verdict::DropReason;

/// Both halves of the socket, and how many frames of the UMEM it may lend to the kernel for receiving.
#[derive(Debug)]
pub struct NicQueue {
    receiver: Receiver,
    transmitter: Transmitter,
    /// Frames that stay in the pool whatever the fill ring could take, so that the host side can always receive.
    reserve: usize,
    tx_entries: usize,
    /// Takes large bursts ahead of the socket, if there is one.
    injector: Option<Injector>,
    /// Takes super-packets, if there is one.
    tunnel_gso: Option<TunnelGso>,
    /// System calls ahead of super-packets.
    kicks: u64,
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
            injector: None,
            tunnel_gso: None,
            kicks: 0,
        }
    }

    /// The same with live frames for large bursts. The injector is for the same UMEM, and aimed at the same device.
    pub fn with_injector(self, injector: Option<Injector>) -> Self {
        Self { injector, ..self }
    }

    /// The same with a way for super-packets. It leads to the same device.
    pub fn with_tunnel_gso(self, tunnel_gso: Option<TunnelGso>) -> Self {
        Self { tunnel_gso, ..self }
    }

    /// Its way for super-packets, if it has one.
    pub fn tunnel_gso(&self) -> Option<&TunnelGso> {
        self.tunnel_gso.as_ref()
    }

    /// Its injector, if it has one.
    pub fn injector(&self) -> Option<&Injector> {
        self.injector.as_ref()
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
        let mut injected = Transmitted::default();
        // Not past packets that still wait in the ring.
        if let Some(injector) = &mut self.injector
            && self.transmitter.in_tx() == 0
        {
            injected = injector.transmit(umem, burst);
        }
        let offered: u64 = burst.iter().map(|frame| frame.len() as u64).sum();
        let packets = self.transmitter.send(umem, burst) as u64;
        let refused: u64 = burst.iter().map(|frame: &Frame| frame.len() as u64).sum();
        Transmitted {
            packets: injected.packets + packets,
            bytes: injected.bytes + offered - refused,
        }
    }

    #[inline]
    fn takes_whole(&self) -> bool {
        self.tunnel_gso.as_ref().is_some_and(TunnelGso::may)
    }

    #[inline]
    fn transmit_whole(&mut self, outer: &mut [u8], whole: &Whole<'_>) -> WholeSent {
        let Some(tunnel_gso) = &mut self.tunnel_gso else {
            return WholeSent::Refused;
        };
        // Not past packets that wait in the ring.
        if self.transmitter.in_tx() > 0 {
            self.kicks += 1;
            let _ = self.transmitter.kick();
            if self.transmitter.in_tx() > 0 {
                return WholeSent::Later;
            }
        }
        tunnel_gso.transmit(outer, whole)
    }

    #[inline]
    fn pending(&self) -> usize {
        self.transmitter.in_tx()
    }

    #[inline]
    fn flush(&mut self) -> u64 {
        let mut calls = self.injector.as_mut().map_or(0, Injector::take_calls);
        calls += core::mem::take(&mut self.kicks);
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
