//! What comparisons of `forward` with a device of the kernel share: packets by their identity, bursts, both of `forward`'s ways.

use core::time::Duration;
use std::collections::BTreeSet;

use anyhow::{Context, Result};
use ripstop_dataplane::forward;
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{DropReason, FromHost, FromNic, HEADER_MAX};
use ripstop_perf::{Capture, Family, Injector};

use crate::generate::{self, Random};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Packets of each family and direction.
pub(crate) const PACKETS: usize = 4000;
/// So many at once: what the queues on the way hold.
pub(crate) const BURST: usize = 100;
/// The node whose kernel and whose table are compared, and the other one.
pub(crate) const HERE: u8 = 1;
pub(crate) const THERE: u8 = 2;
pub(crate) const ECN: u8 = 0b11;

/// The frame that `forward` makes around a packet.
pub(crate) fn encapsulated(
    packet: &[u8],
    table: &Table<'_>,
) -> core::result::Result<Vec<u8>, DropReason> {
    let mut front = [0; HEADER_MAX];
    match forward::from_host(packet, &mut front, table, 0x1d1d) {
        FromHost::Send { push } => Ok([&front[HEADER_MAX - push..], packet].concat()),
        FromHost::Drop(reason) => Err(reason),
    }
}

/// The packet that `forward` takes out of a frame, as the worker hands it on.
pub(crate) fn decapsulated(
    frame: &[u8],
    table: &Table<'_>,
) -> core::result::Result<Vec<u8>, DropReason> {
    match forward::from_nic(frame, table) {
        FromNic::Deliver { strip, len, tos } => {
            let packet = frame[strip..strip + len].to_vec();
            Ok(match tos {
                Some(tos) => with_tos(packet, tos),
                None => packet,
            })
        }
        FromNic::Drop(reason) => Err(reason),
    }
}

/// The packet with another type of service or traffic class, and the checksum that belongs to it.
pub(crate) fn with_tos(mut packet: Vec<u8>, tos: u8) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        packet[0] = 0x60 | tos >> 4;
        packet[1] = packet[1] & 0x0f | tos << 4;
        return packet;
    }
    packet[1] = tos;
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 0x0f) * 4;
    let mut sum: u32 = packet[..header]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(sum).unwrap_or_default();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

pub(crate) fn tos_of(packet: &[u8]) -> u8 {
    if packet[0] >> 4 == 6 {
        packet[0] << 4 | packet[1] >> 4
    } else {
        packet[1]
    }
}

/// What a packet is known by, whatever happened to its congestion field.
pub(crate) fn identity(packet: &[u8]) -> Vec<u8> {
    with_tos(packet.to_vec(), tos_of(packet) & !ECN)
}

/// Different packets, no two of which are the same but for congestion.
pub(crate) fn packets(
    random: &mut Random,
    family: Family,
    from: u8,
    to: u8,
    mtu: u16,
) -> Vec<Vec<u8>> {
    let mut seen = BTreeSet::new();
    let mut packets = Vec::new();
    while packets.len() < PACKETS {
        let packet = generate::packet(random, family, from, to, mtu);
        if seen.insert(identity(&packet)) {
            packets.push(packet);
        }
    }
    packets
}

/// Sends frames in bursts, each when all that the one before leads to has been captured.
pub(crate) fn send(
    into: &Injector,
    frames: &[Vec<u8>],
    arrive: &[bool],
    capture: &Capture,
) -> Result<()> {
    let mut due = 0;
    for (frames, arrive) in frames.chunks(BURST).zip(arrive.chunks(BURST)) {
        frames.iter().try_for_each(|frame| into.send(frame))?;
        due += arrive.iter().filter(|arrives| **arrives).count();
        capture.wait_for(due, PATIENCE)?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a failed test is repeated with this")]
pub(crate) fn seed(what: &str) -> Result<u64> {
    let seed = match std::env::var("RIPSTOP_SEED") {
        Ok(text) => text.parse().context("RIPSTOP_SEED is a number")?,
        Err(_) => 0x0052_6970_7374_6f70,
    };
    println!("{what}: RIPSTOP_SEED={seed}, {PACKETS} packets");
    Ok(seed)
}
