//! No tunnel: a packet of a peer's pod as it is, behind its Ethernet header (flannel's `host-gw`, and peers that are
//! reached directly with `DirectRouting`).

use crate::inner::{self, Sender};
use crate::table::Table;
use crate::verdict::{DropReason, FromNic, Front};
use crate::wire::{self, IPV4_LEN, IPV6_LEN};

use super::write;

/// Decides about an IPv4 packet that came without a tunnel, `at` bytes inside its frame. Its one header is an inner one:
/// fragments and options are as welcome in it as in a tunnel.
///
/// What the sender's Ethernet address is does not matter: on one link everybody can forge it, and when a node's changes
/// its packets must go on.
#[inline(always)]
pub(crate) fn receive4(packet: &[u8], at: usize, table: &Table<'_>) -> Result<FromNic, DropReason> {
    inner::deliver4(packet, at, Sender::Direct, table)
}

/// As [`receive4`], for IPv6.
#[inline(always)]
pub(crate) fn receive6(packet: &[u8], at: usize, table: &Table<'_>) -> Result<FromNic, DropReason> {
    inner::deliver6(packet, at, Sender::Direct, table)
}

/// Puts the Ethernet header before a packet.
#[inline]
pub(crate) fn encapsulate(template: &[u64; 8], front: &mut Front) -> usize {
    write(template, front);
    (template[0] & 0xff) as usize
}

/// Whether an IPv4 packet is for our pods, if it carries no tunnel.
#[inline(always)]
pub(crate) fn is_for_us4(packet: &[u8], table: &Table<'_>) -> bool {
    let ours = |ip: &[u8; IPV4_LEN]| table.v4.is_local(wire::be32(ip, 16));
    table.direct && packet.first_chunk().is_some_and(ours)
}

/// As [`is_for_us4`], for IPv6.
#[inline(always)]
pub(crate) fn is_for_us6(packet: &[u8], table: &Table<'_>) -> bool {
    let ours = |ip: &[u8; IPV6_LEN]| table.v6.is_local(wire::ne128(ip, 24));
    table.direct && packet.first_chunk().is_some_and(ours)
}
