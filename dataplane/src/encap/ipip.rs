//! IPv4 in IPv4 (RFC 2003), with the outer header as a kernel IPIP device sends it: TTL and "don't fragment" are the
//! inner packet's.
//!
//! ```text
//!   last words of the header, by bytes before the packet
//!    24                     16                      8                       0
//!    … │ 45 TOS │ length    │ id │ flags │TTL│proto│ sum │ source │ destination │ inner IPv4 …
//!           word 5                word 6                     word 7
//! ```

use crate::inner::{self, Sender};
use crate::table::Table;
use crate::verdict::{DropReason, FromNic, Front};
use crate::wire::{self, DONT_FRAGMENT, IPV4_LEN, PROTOCOL_IPIP};

use super::{field, field_of, length, outer4, write};

/// Takes a received packet apart that begins `at` bytes inside its frame, or says why not.
#[inline(always)]
pub(crate) fn decapsulate(
    packet: &[u8],
    at: usize,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    let (ip, total_len) = outer4(packet, table.v4.address, PROTOCOL_IPIP)?;
    let inner = packet
        .get(IPV4_LEN..total_len)
        .ok_or(DropReason::OuterLength)?;
    let source = wire::be32(ip, 12);
    let sender = Sender::Tunnel(source, ip[1]);
    inner::deliver4(inner, at + IPV4_LEN, sender, table)
        .map_err(|reason| inner::blame4(reason, source, table))
}

/// Fills a header template in for one packet and puts it before it.
#[inline(always)]
pub(crate) fn encapsulate(
    template: &[u64; 8],
    packet: &[u8],
    ip: &[u8; IPV4_LEN],
    table: &Table<'_>,
    identification: u16,
    front: &mut Front,
) -> usize {
    let mut words = *template;
    let total_len = length(packet.len() + IPV4_LEN);
    let tos = ip[1] & table.tos_mask;
    let flags = wire::be16(ip, 6) & DONT_FRAGMENT;
    let sum = u32::from(field_of(words[6], 6))
        + u32::from(total_len)
        + u32::from(identification)
        + u32::from(flags)
        + u32::from(tos)
        + (u32::from(ip[8]) << 8);
    words[5] |= u64::from(tos) << 40 | field(total_len, 6);
    words[6] = words[6] & 0xffff_ffff_ffff
        | field(identification, 0)
        | field(flags, 2)
        | u64::from(ip[8]) << 32
        | field(!wire::fold(sum), 6);
    write(&words, front);
    (template[0] & 0xff) as usize
}
