//! Flannel's `udp` backend: the IPv4 packet is the payload of a UDP datagram, nothing between. Flannel's proxy lowers
//! the inner TTL by one at each end; here it stays as the kernel's routing left it.
//!
//! ```text
//!   last words of the header, by bytes before the packet
//!    32                    24                        16                       8                          0
//!    … │ 45 TOS │ length   │ id │ flags │TTL│proto│sum │ source │ destination  │ sport │ dport │ len │ sum  │ inner …
//!           word 4               word 5                     word 6                      word 7
//! ```

use crate::inner::{self, Sender};
use crate::table::Table;
use crate::verdict::{DropReason, FromNic, Front};
use crate::wire::{self, IPV4_LEN, PROTOCOL_UDP, UDP_LEN};

use super::{field, field_of, length, outer4, write};

/// Takes a received packet apart that begins `at` bytes inside its frame, or says why not.
#[inline(always)]
pub(crate) fn decapsulate(
    packet: &[u8],
    at: usize,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    let (ip, total_len) = outer4(packet, table.v4.address, PROTOCOL_UDP)?;
    let udp = packet[IPV4_LEN..]
        .first_chunk::<UDP_LEN>()
        .ok_or(DropReason::OuterTruncated)?;
    if wire::be16(udp, 2) != table.udp_port {
        return Err(DropReason::OuterDestination);
    }
    let udp_len = usize::from(wire::be16(udp, 4));
    if udp_len + IPV4_LEN != total_len {
        return Err(DropReason::OuterLength);
    }
    let inner = packet
        .get(IPV4_LEN + UDP_LEN..total_len)
        .ok_or(DropReason::OuterLength)?;
    let source = wire::be32(ip, 12);
    let sender = Sender::Tunnel(source, ip[1]);
    inner::deliver4(inner, at + IPV4_LEN + UDP_LEN, sender, table)
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
    let udp_len = length(packet.len() + UDP_LEN);
    let total_len = length(packet.len() + UDP_LEN + IPV4_LEN);
    let tos = ip[1] & table.tos_mask;
    let sum = u32::from(field_of(words[5], 6))
        + u32::from(total_len)
        + u32::from(identification)
        + u32::from(tos);
    words[4] |= u64::from(tos) << 40 | field(total_len, 6);
    words[5] = words[5] & 0xffff_ffff_ffff | field(identification, 0) | field(!wire::fold(sum), 6);
    words[7] |= field(udp_len, 4);
    write(&words, front);
    (template[0] & 0xff) as usize
}
