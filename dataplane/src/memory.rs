//! A port in plain memory, for tests, benchmarks and fuzzing: the whole worker runs without a kernel.
//!
//! It behaves like the real ports, faults included: it receives less than asked for, has no room, refuses packets,
//! and gives transmitted frames back late. What it does when is decided by a seeded generator, so a run repeats.

use std::collections::VecDeque;

use af_xdp::{Frame, Umem};

use crate::port::{Burst, Port, Transmitted};
use crate::verdict::DropReason;

/// How often a port misbehaves, in 256ths; zero is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Receives nothing although there is something.
    pub receive_nothing: u8,
    /// Has no room.
    pub no_room: u8,
    /// Refuses a packet.
    pub refuse: u8,
    /// Gives no transmitted frame back in this turn.
    pub complete_late: u8,
}

/// A small generator (xorshift64*): good enough for choosing faults, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator; the same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn happens(&mut self, per_256: u8) -> bool {
        per_256 != 0 && (self.number() & 0xff) < u64::from(per_256)
    }
}

/// A port whose wire is two queues of packets.
#[derive(Debug)]
pub struct MemoryPort {
    /// Packets to be received.
    pub incoming: VecDeque<Vec<u8>>,
    /// Packets that were transmitted.
    pub outgoing: Vec<Vec<u8>>,
    in_flight: VecDeque<Frame>,
    room: usize,
    headroom: usize,
    faults: Faults,
    random: Random,
}

impl MemoryPort {
    /// A port that has room for `room` packets at a time and leaves `headroom` bytes before each received one.
    pub fn new(room: usize, headroom: usize, faults: Faults, seed: u64) -> Self {
        let (incoming, outgoing, in_flight) = Default::default();
        Self {
            incoming,
            outgoing,
            in_flight,
            room,
            headroom,
            faults,
            random: Random::new(seed),
        }
    }

    /// Frames that were transmitted and not given back yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

impl Port for MemoryPort {
    const REFUSED: DropReason = DropReason::HostWriteFailed;

    fn reclaim(&mut self, umem: &mut Umem) {
        if !self.random.happens(self.faults.complete_late) {
            self.in_flight.drain(..).for_each(|frame| umem.give(frame));
        }
    }

    fn refill(&mut self, _umem: &mut Umem) {}

    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize) {
        while burst.len() < most
            && !self.incoming.is_empty()
            && !self.random.happens(self.faults.receive_nothing)
        {
            let Some(mut frame) = umem.take() else { return };
            let packet = self.incoming.pop_front().unwrap_or_default();
            match umem.whole_mut(&mut frame, self.headroom) {
                Ok(buffer) if packet.len() <= buffer.len() => {
                    buffer[..packet.len()].copy_from_slice(&packet);
                }
                _ => {
                    umem.give(frame);
                    continue;
                }
            }
            if frame.set_len(packet.len()).is_ok() {
                burst.push(frame);
            } else {
                umem.give(frame);
            }
        }
    }

    fn room(&mut self) -> usize {
        if self.random.happens(self.faults.no_room) {
            0
        } else {
            self.room.saturating_sub(self.in_flight.len())
        }
    }

    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        let mut sent = Transmitted::default();
        let mut refused = 0;
        for at in 0..burst.len() {
            if self.random.happens(self.faults.refuse) {
                burst.swap(refused, at);
                refused += 1;
                continue;
            }
            let packet = umem.packet(&burst[at]);
            sent.packets += 1;
            sent.bytes += packet.len() as u64;
            self.outgoing.push(packet.to_vec());
        }
        self.in_flight.extend(burst.drain(refused..));
        sent
    }

    fn pending(&self) -> usize {
        0
    }

    fn flush(&mut self) -> u64 {
        0
    }
}
