//! One worker: one core, one UMEM, one NIC queue, one queue of the host door.
//!
//! A packet from another node arrives in the NIC queue's receive ring, `forward` checks it, its tunnel headers are cut
//! off in place, and the same frame is written to the host door. A packet from a pod is read from the host door into a
//! frame with room in front, `forward` finds its next hop's header, the header is put before it, and the same frame
//! goes to the NIC queue's transmit ring. A packet that does not go on leaves through `drop_packet`, with its reason.
//!
//! The loop takes no lock, allocates nothing and logs nothing. It picks a new forwarding table up between bursts.

use core::sync::atomic::{AtomicBool, Ordering};

use af_xdp::{Frame, Umem};
use ripstop_fib::stats::{Counter, Gauge, Stats, WorkerCounters};
use ripstop_fib::{Reader, Word};

use crate::forward;
use crate::kind::Kind;
use crate::pace::{Cycles, Due, Pace};
use crate::port::{Burst, Port, WholeSent};
use crate::table::Table;
use crate::verdict::{DropReason, FromHost, FromNic};
use crate::wire;

/// Turns between two housekeepings of a worker that never sleeps.
pub const HOUSEKEEPING_TURNS: u32 = 256;

/// Everything that one worker owns.
#[derive(Debug)]
pub struct Worker<'r, N, H> {
    umem: Umem,
    nic: N,
    host: H,
    reader: Reader<'r>,
    accepted: &'r Word,
    table: Option<Table<'r>>,
    received: Burst,
    forwarded: Burst,
    burst: usize,
    identification: u16,
    /// Whether the packet that a multi-buffer packet began is still going on.
    inside_packet: bool,
    counters: WorkerCounters,
    stats: Stats<'r>,
    index: usize,
    ifindex: u32,
}

/// What a worker is made of, apart from its queue of the host door.
#[derive(Debug)]
pub struct Parts<'r, N> {
    /// Its frames.
    pub umem: Umem,
    /// Its NIC queue.
    pub nic: N,
    /// Its view of the fib region.
    pub reader: Reader<'r>,
    /// Names the image that the watcher has accepted.
    pub accepted: &'r Word,
    /// Where it publishes.
    pub stats: Stats<'r>,
    /// Its number in the stats region.
    pub index: usize,
    /// Interface index of its NIC.
    pub ifindex: u32,
    /// Most packets of a burst.
    pub burst: usize,
}

impl<'r, N: Port, H: Port> Worker<'r, N, H> {
    /// Puts a worker together.
    pub fn new(parts: Parts<'r, N>, host: H) -> Self {
        let Parts {
            umem,
            nic,
            reader,
            accepted,
            stats,
            index,
            ifindex,
            burst,
        } = parts;
        Self {
            umem,
            nic,
            host,
            reader,
            accepted,
            table: None,
            received: Burst::with_capacity(burst),
            forwarded: Burst::with_capacity(burst),
            burst,
            identification: 0,
            inside_packet: false,
            counters: WorkerCounters::default(),
            stats,
            index,
            ifindex,
        }
    }

    /// Turns until `stop` is set.
    pub fn run(&mut self, pace: &mut Pace, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let work = self.turn();
            match pace.after_turn(work) {
                Due::Turn => {}
                Due::Housekeeping(now_ns) => {
                    self.count_cycles(pace.take_cycles());
                    self.housekeeping(now_ns);
                }
                Due::Sleep(housekeeping) => {
                    self.counters.add(Counter::Sleeps, 1);
                    if let Some(now_ns) = housekeeping {
                        self.count_cycles(pace.take_cycles());
                        self.housekeeping(now_ns);
                    }
                    pace.sleep();
                }
                Due::Gather(pause) => pace.gather(pause),
            }
        }
    }

    /// One turn of the loop. Returns how many packets it received or still has in hand.
    #[inline]
    pub fn turn(&mut self) -> usize {
        self.follow_table();
        self.nic.reclaim(&mut self.umem);
        self.host.reclaim(&mut self.umem);
        self.nic.refill(&mut self.umem);
        self.host.refill(&mut self.umem);
        let received = self.nic_to_host() + self.host_to_nic();
        let calls = self.nic.flush() + self.host.flush();
        self.counters.add(Counter::Kicks, calls);
        self.counters.add(Counter::Turns, 1);
        self.counters
            .add(Counter::BusyTurns, u64::from(received > 0));
        received + self.nic.pending() + self.host.pending()
    }

    fn count_cycles(&mut self, cycles: Cycles) {
        self.counters.add(Counter::BusyCycles, cycles.busy);
        self.counters.add(Counter::IdleCycles, cycles.idle);
        self.counters.add(Counter::AsleepCycles, cycles.asleep);
    }

    /// Publishes counters and heartbeat.
    pub fn housekeeping(&mut self, now_ns: u64) {
        let generation = self.table.map_or(0, |_| self.reader.pinned().generation());
        let supers = self.host.take_super_packets();
        for (counter, count) in [
            (Counter::HostRxSuperPackets, supers.received),
            (Counter::HostRxCutPackets, supers.cut),
            (Counter::HostTxSuperPackets, supers.transmitted),
            (Counter::HostTxJoinedPackets, supers.joined),
        ] {
            self.counters.add(counter, count);
        }
        self.stats.write_worker(
            self.index,
            &self.counters,
            &self.gauges(),
            generation,
            now_ns,
        );
    }

    /// What the worker has counted.
    pub fn counters(&self) -> &WorkerCounters {
        &self.counters
    }

    /// Where the frames are.
    pub fn gauges(&self) -> [u64; Gauge::COUNT] {
        let census = self.umem.census();
        let mut gauges = [0; Gauge::COUNT];
        gauges[Gauge::Free as usize] = census.free.into();
        gauges[Gauge::Receiving as usize] = census.receiving.into();
        gauges[Gauge::Transmitting as usize] = census.transmitting.into();
        gauges[Gauge::Held as usize] = census.held.into();
        gauges
    }

    /// The two ports, for whoever drives the worker by hand.
    pub fn ports(&mut self) -> (&mut Umem, &mut N, &mut H) {
        (&mut self.umem, &mut self.nic, &mut self.host)
    }

    /// Moves to the image that the watcher has accepted, if that is a new one: one load a turn while nothing changes.
    #[inline]
    fn follow_table(&mut self) {
        if self.reader.follow(self.accepted) {
            // The watcher has attached these very words before, so this fails only for "no image".
            self.table = Table::attach(self.reader.words(), self.ifindex).ok();
            // Packets of the host that this worker's NIC cannot send are for the other workers.
            let uplink = self.table.and_then(|table| table.uplink);
            self.host.open(uplink.is_some());
            self.counters.add(Counter::ImageSwitches, 1);
        }
    }

    /// Receives a burst from other nodes and delivers it to this node.
    #[inline]
    fn nic_to_host(&mut self) -> usize {
        self.nic
            .receive(&mut self.umem, &mut self.received, self.burst);
        let received = self.received.len();
        if received == 0 {
            return 0;
        }
        // Each arm compiles the loop for its kind.
        let bytes = match self.first_kind(Kind::from_nic) {
            Kind::Any => self.decide_from_nic(Kind::Any),
            Kind::Vxlan4 => self.decide_from_nic(Kind::Vxlan4),
            Kind::Vxlan6 => self.decide_from_nic(Kind::Vxlan6),
            Kind::Ipip => self.decide_from_nic(Kind::Ipip),
            Kind::Udp => self.decide_from_nic(Kind::Udp),
            Kind::Direct4 => self.decide_from_nic(Kind::Direct4),
            Kind::Direct6 => self.decide_from_nic(Kind::Direct6),
        };
        self.counters.add(Counter::NicRxPackets, received as u64);
        self.counters.add(Counter::NicRxBytes, bytes);
        let sent = self.host.transmit(&mut self.umem, &mut self.forwarded);
        self.counters.add(Counter::HostTxPackets, sent.packets);
        self.counters.add(Counter::HostTxBytes, sent.bytes);
        for frame in self.forwarded.drain(..) {
            drop_packet(&mut self.umem, &mut self.counters, frame, H::REFUSED);
        }
        received
    }

    /// Receives a burst from this node's pods and sends it to other nodes. Takes no more than can be sent, so that a
    /// full transmit ring slows the pods down instead of losing their packets.
    #[inline]
    fn host_to_nic(&mut self) -> usize {
        let most = self.burst.min(self.nic.room());
        self.host.keep_whole(self.nic.takes_whole());
        self.host.receive(&mut self.umem, &mut self.received, most);
        let received = self.received.len();
        if received > 0 {
            self.packets_to_nic(received);
        }
        received + self.whole_to_nic()
    }

    /// Decides about the packets of a burst from the host, and sends them.
    #[inline]
    fn packets_to_nic(&mut self, received: usize) {
        let bytes = match self.first_kind(Kind::from_host) {
            Kind::Any => self.decide_from_host(Kind::Any),
            Kind::Vxlan4 => self.decide_from_host(Kind::Vxlan4),
            Kind::Vxlan6 => self.decide_from_host(Kind::Vxlan6),
            Kind::Ipip => self.decide_from_host(Kind::Ipip),
            Kind::Udp => self.decide_from_host(Kind::Udp),
            Kind::Direct4 => self.decide_from_host(Kind::Direct4),
            Kind::Direct6 => self.decide_from_host(Kind::Direct6),
        };
        self.counters.add(Counter::HostRxPackets, received as u64);
        self.counters.add(Counter::HostRxBytes, bytes);
        let sent = self.nic.transmit(&mut self.umem, &mut self.forwarded);
        self.counters.add(Counter::NicTxPackets, sent.packets);
        self.counters.add(Counter::NicTxBytes, sent.bytes);
        for frame in self.forwarded.drain(..) {
            drop_packet(&mut self.umem, &mut self.counters, frame, N::REFUSED);
        }
    }

    /// Sends a super-packet of the host as it is, if one waits for that. Decided is about its first packet: the others
    /// differ in nothing that counts, and are no longer. One that may not go is cut, so that each of its packets is
    /// dropped and counted. Returns how many packets that were.
    #[inline]
    fn whole_to_nic(&mut self) -> usize {
        if self.host.whole().is_none() {
            return 0;
        }
        // What has to wait is work in hand: the worker does not go to sleep over it.
        let Some(mut frame) = self.umem.take() else {
            return 1;
        };
        let identification = self.identification.wrapping_add(1);
        let table = self.table.as_ref();
        let sent = if self.host.first_of_whole(&self.umem, &mut frame) {
            let inner = frame.len();
            let decided = from_host(Kind::Any, &self.umem, &mut frame, table, identification);
            let push = frame.len() - inner;
            match (decided, self.host.whole()) {
                (Ok(()), Some(whole)) => {
                    let outer = &mut self.umem.packet_mut(&mut frame)[..push];
                    let packets = whole.cut.count();
                    let bytes = whole.cut.bytes();
                    Some((
                        self.nic.transmit_whole(outer, &whole),
                        packets,
                        bytes,
                        packets * push,
                    ))
                }
                _ => None,
            }
        } else {
            None
        };
        self.umem.give(frame);
        match sent {
            Some((WholeSent::Taken, packets, bytes, outer)) => {
                let (count, bytes, outer) = (packets as u64, bytes as u64, outer as u64);
                self.counters.add(Counter::HostRxPackets, count);
                self.counters.add(Counter::HostRxBytes, bytes);
                self.counters.add(Counter::NicTxPackets, count);
                self.counters.add(Counter::NicTxBytes, bytes + outer);
                // Each packet has an identification of its own, counted up by whoever cuts.
                #[expect(clippy::cast_possible_truncation, reason = "counts modulo 2^16")]
                let used = packets as u16;
                self.identification = self.identification.wrapping_add(used);
                self.host.end_whole(true);
                packets
            }
            Some((WholeSent::Later, ..)) => 1,
            Some((WholeSent::Refused, ..)) | None => {
                self.host.end_whole(false);
                0
            }
        }
    }

    /// What the packets of a burst that was received mostly are, to judge by the first.
    #[inline]
    fn first_kind(&self, kind: impl Fn(&[u8], &Table<'_>) -> Kind) -> Kind {
        match (self.received.first(), &self.table) {
            (Some(frame), Some(table)) => kind(self.umem.packet(frame), table),
            _ => Kind::Any,
        }
    }

    /// Decides about each frame of a burst from the NIC; what goes on is left in `forwarded`. Returns the bytes.
    #[inline(always)]
    fn decide_from_nic(&mut self, kind: Kind) -> u64 {
        let prefetch = |umem: &Umem, frame: &Frame| {
            if let Some(table) = &self.table {
                forward::prefetch_from_nic(kind, umem.packet(frame), table);
            }
        };
        for frame in self.received.iter().take(forward::AHEAD) {
            prefetch(&self.umem, frame);
        }
        let mut bytes = 0;
        let mut received = self.received.drain(..);
        while let Some(mut frame) = received.next() {
            if let Some(ahead) = received.as_slice().get(forward::AHEAD - 1) {
                prefetch(&self.umem, ahead);
            }
            bytes += frame.len() as u64;
            let (table, inside_packet) = (self.table.as_ref(), &mut self.inside_packet);
            match from_nic(kind, &self.umem, &mut frame, table, inside_packet) {
                Ok(()) => self.forwarded.push(frame),
                Err(reason) => drop_packet(&mut self.umem, &mut self.counters, frame, reason),
            }
        }
        bytes
    }

    /// Decides about each packet of a burst from the host; as [`Self::decide_from_nic`].
    #[inline(always)]
    fn decide_from_host(&mut self, kind: Kind) -> u64 {
        let prefetch = |umem: &Umem, frame: &Frame| {
            if let Some(table) = &self.table {
                forward::prefetch_from_host(kind, umem.packet(frame), table);
            }
        };
        for frame in self.received.iter().take(forward::AHEAD) {
            prefetch(&self.umem, frame);
        }
        let mut bytes = 0;
        let mut received = self.received.drain(..);
        while let Some(mut frame) = received.next() {
            if let Some(ahead) = received.as_slice().get(forward::AHEAD - 1) {
                prefetch(&self.umem, ahead);
            }
            bytes += frame.len() as u64;
            self.identification = self.identification.wrapping_add(1);
            let (table, identification) = (self.table.as_ref(), self.identification);
            match from_host(kind, &self.umem, &mut frame, table, identification) {
                Ok(()) => self.forwarded.push(frame),
                Err(reason) => drop_packet(&mut self.umem, &mut self.counters, frame, reason),
            }
        }
        bytes
    }
}

/// The one door through which a packet leaves that is not forwarded.
#[inline]
fn drop_packet(umem: &mut Umem, counters: &mut WorkerCounters, frame: Frame, reason: DropReason) {
    counters.dropped(reason);
    umem.give(frame);
}

/// Decides about a frame from the NIC and, if it is for this node, leaves only the inner packet in it.
#[inline(always)]
fn from_nic(
    kind: Kind,
    umem: &Umem,
    frame: &mut Frame,
    table: Option<&Table<'_>>,
    inside_packet: &mut bool,
) -> Result<(), DropReason> {
    // Every part of a packet that spans frames is a packet that we do not forward.
    let part = *inside_packet || frame.continues();
    *inside_packet = frame.continues();
    if part {
        return Err(DropReason::MultiBuffer);
    }
    let table = table.ok_or(DropReason::NoTable)?;
    match forward::from_nic_mostly(kind, umem.packet(frame), table) {
        FromNic::Deliver { strip, len, tos } => {
            frame
                .pop_front(strip)
                .map_err(|_no_room| DropReason::InnerTruncated)?;
            frame.truncate(len);
            if let Some(tos) = tos {
                write_tos(umem.packet_mut(frame), tos);
            }
            Ok(())
        }
        FromNic::Drop(reason) => Err(reason),
    }
}

/// Decides about a packet from the host and, if its next hop is known, puts the tunnel header before it.
#[inline(always)]
fn from_host(
    kind: Kind,
    umem: &Umem,
    frame: &mut Frame,
    table: Option<&Table<'_>>,
    identification: u16,
) -> Result<(), DropReason> {
    let table = table.ok_or(DropReason::NoTable)?;
    // Every port leaves room for a header, so neither of these fails.
    let (front, packet) = umem.front_and_packet(frame).ok_or(DropReason::TooBig)?;
    match forward::from_host_mostly(kind, packet, front, table, identification) {
        FromHost::Send { push } => frame
            .push_front(push)
            .map_err(|_no_room| DropReason::TooBig),
        FromHost::Drop(reason) => Err(reason),
    }
}

/// Changes the type-of-service octet of an IPv4 header, and its checksum with it, or the traffic class of an IPv6 one.
fn write_tos(packet: &mut [u8], tos: u8) {
    let Some(ip) = packet.first_chunk_mut::<{ wire::IPV4_LEN }>() else {
        return;
    };
    let old = wire::be16(ip, 0);
    if ip[0] >> 4 == 6 {
        let new = old & 0xf00f | u16::from(tos) << 4;
        ip[0..2].copy_from_slice(&new.to_be_bytes());
        return;
    }
    ip[1] = tos;
    let checksum = wire::checksum_after(wire::be16(ip, 10), old, wire::be16(ip, 0));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
}
