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
#[inline(never)]
pub(crate) fn receive4(packet: &[u8], at: usize, table: &Table<'_>) -> Result<FromNic, DropReason> {
    inner::deliver4(packet, at, Sender::Direct, table)
}

/// As [`receive4`], for IPv6.
#[inline]
pub(crate) fn receive6(packet: &[u8], at: usize, table: &Table<'_>) -> Result<FromNic, DropReason> {
    inner::deliver6(packet, at, Sender::Direct, table)
}

/// Puts the Ethernet header before a packet.
#[inline]
pub(crate) fn encapsulate(template: &[u64; 8], front: &mut Front) -> usize {
    write(template, front);
    (template[0] & 0xff) as usize
}

/// Whether a packet to this destination is for our pods, if it carries no tunnel.
#[inline]
pub(crate) fn is_for_us4(ip: &[u8; IPV4_LEN], table: &Table<'_>) -> bool {
    table.direct && table.v4.is_local(wire::be32(ip, 16))
}

/// As [`is_for_us4`].
#[inline]
pub(crate) fn is_for_us6(ip: &[u8; IPV6_LEN], table: &Table<'_>) -> bool {
    table.direct && table.v6.is_local(wire::be128(ip, 24))
}
