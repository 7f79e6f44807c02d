//! What every tunnel asks of an inner packet, on its way in and on its way out.

use ripstop_fib::{Hop, PeerCheck};

use crate::ecn;
use crate::table::Table;
use crate::verdict::{DropReason, FromNic};
use crate::wire::{
    self, FRAGMENT_MASK, IPV4_LEN, IPV6_LEN, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP,
    PROTOCOL_UDP,
};

/// Where an inner packet came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sender<A> {
    /// A node with this outer address, with this outer type of service.
    Tunnel(A, u8),
    /// A neighbour: there was no tunnel.
    Direct,
}

/// Decides about an inner IPv4 packet that was `strip` bytes inside its frame; bytes may follow it.
#[inline(always)]
pub(crate) fn deliver4(
    packet: &[u8],
    strip: usize,
    sender: Sender<u32>,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    let (ip, len) = header4(packet)?;
    let source = wire::be32(ip, 12);
    match sender {
        Sender::Tunnel(outer, _) => allowed(table.image.check_peer4(outer, source))?,
        Sender::Direct => known(table.image.lookup4(source))?,
    }
    if !table.v4.is_local(wire::be32(ip, 16)) {
        return Err(DropReason::InnerDestination);
    }
    if is_unusual4(ip) {
        refuse4(packet, ip)?;
    }
    let tos = match sender {
        Sender::Tunnel(_, outer) => ecn::after_decapsulation(ip[1], outer)?,
        Sender::Direct => None,
    };
    Ok(FromNic::Deliver { strip, len, tos })
}

/// As [`deliver4`], for IPv6.
#[inline(always)]
pub(crate) fn deliver6(
    packet: &[u8],
    strip: usize,
    sender: Sender<&[u8; 16]>,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    let ip = packet
        .first_chunk::<IPV6_LEN>()
        .ok_or(DropReason::InnerTruncated)?;
    if ip[0] >> 4 != 6 {
        return Err(DropReason::InnerHeader);
    }
    let len = IPV6_LEN + usize::from(wire::be16(ip, 4));
    if len > packet.len() {
        return Err(DropReason::InnerLength);
    }
    let source = wire::octets(ip, 8);
    match sender {
        Sender::Tunnel(outer, _) => allowed(table.image.check_peer6(outer, source))?,
        Sender::Direct => known(table.image.lookup6(source))?,
    }
    if !table.v6.is_local(wire::ne128(ip, 24)) {
        return Err(DropReason::InnerDestination);
    }
    if is_unusual6(ip) {
        refuse6(&packet[..len], ip)?;
    }
    let class = wire::traffic_class(ip);
    let tos = match sender {
        Sender::Tunnel(_, outer) => ecn::after_decapsulation(class, outer)?,
        Sender::Direct => None,
    };
    Ok(FromNic::Deliver { strip, len, tos })
}

/// A sender that is no peer is the reason before anything that is wrong inside its packet.
#[cold]
#[inline(never)]
pub(crate) fn blame4(reason: DropReason, source: u32, table: &Table<'_>) -> DropReason {
    blame(reason, table.image.check_peer4(source, 0))
}

#[cold]
#[inline(never)]
pub(crate) fn blame6(reason: DropReason, source: &[u8; 16], table: &Table<'_>) -> DropReason {
    blame(reason, table.image.check_peer6(source, &[0; 16]))
}

fn blame(reason: DropReason, check: PeerCheck) -> DropReason {
    match check {
        PeerCheck::UnknownPeer => DropReason::UnknownPeer,
        PeerCheck::Allowed | PeerCheck::ForeignSource => reason,
    }
}

/// The header of an IPv4 packet from the wire, if it is possible, whole and right; and the packet's length.
#[inline(always)]
fn header4(packet: &[u8]) -> Result<(&[u8; IPV4_LEN], usize), DropReason> {
    let ip = packet
        .first_chunk::<IPV4_LEN>()
        .ok_or(DropReason::InnerTruncated)?;
    let total_len = usize::from(wire::be16(ip, 2));
    if ip[0] != 0x45 {
        options(packet, ip)?;
    } else if total_len < IPV4_LEN || total_len > packet.len() {
        return Err(DropReason::InnerLength);
    } else if !wire::ipv4_checksum_is_right(ip) {
        return Err(DropReason::InnerChecksum);
    }
    Ok((ip, total_len))
}

/// The same checks for a header that is not plain: options, or nonsense.
#[cold]
fn options(packet: &[u8], ip: &[u8; IPV4_LEN]) -> Result<(), DropReason> {
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || header_len < IPV4_LEN {
        return Err(DropReason::InnerHeader);
    }
    let total_len = usize::from(wire::be16(ip, 2));
    let header = packet.get(..header_len);
    match header.filter(|_| header_len <= total_len && total_len <= packet.len()) {
        None => Err(DropReason::InnerLength),
        Some(header) if wire::sum(header) != 0xffff => Err(DropReason::InnerChecksum),
        Some(_) => Ok(()),
    }
}

#[inline]
fn allowed(check: PeerCheck) -> Result<(), DropReason> {
    match check {
        PeerCheck::Allowed => Ok(()),
        PeerCheck::ForeignSource => Err(DropReason::InnerSource),
        PeerCheck::UnknownPeer => Err(DropReason::UnknownPeer),
    }
}

/// Whether a source that came without a tunnel is another node's pod.
#[inline]
fn known(hop: Hop) -> Result<(), DropReason> {
    match hop {
        Hop::Via(..) | Hop::Paths(_) | Hop::Unresolved => Ok(()),
        Hop::Local | Hop::None => Err(DropReason::UnknownSource),
    }
}

/// Whether an IPv4 packet needs [`refuse4`]'s look: nearly all are whole and not ICMP.
#[inline]
pub(crate) fn is_unusual4(ip: &[u8; IPV4_LEN]) -> bool {
    // Fragment field, TTL and protocol in one load.
    let word = wire::be32(ip, 6);
    word & u32::from(FRAGMENT_MASK) << 16 != 0 || word & 0xff == u32::from(PROTOCOL_ICMP)
}

/// Refuses redirects, and fragments that overwrite or hide a transport header or reach beyond the longest packet.
/// The header has been checked: its lengths lie within the packet.
#[cold]
pub(crate) fn refuse4(packet: &[u8], ip: &[u8; IPV4_LEN]) -> Result<(), DropReason> {
    /// Octets of the TCP header that must be in the first fragment: up to the flags (RFC 1858 section 3.2.1).
    const TCP_FLAGS_END: usize = 16;
    /// A later fragment that starts before this overwrites the TCP header (RFC 3128).
    const TCP_LEN: usize = 20;
    const REDIRECT: u8 = 5;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let total_len = usize::from(wire::be16(ip, 2));
    let payload_len = total_len.saturating_sub(header_len);
    let field = wire::be16(ip, 6);
    let (offset, more) = (usize::from(field & 0x1fff) * 8, field & 0x2000 != 0);
    let (tcp, icmp) = (ip[9] == PROTOCOL_TCP, ip[9] == PROTOCOL_ICMP);
    if icmp && offset == 0 && packet.get(header_len) == Some(&REDIRECT) {
        return Err(DropReason::IcmpRedirect);
    }
    let hides = tcp && offset == 0 && more && payload_len < TCP_FLAGS_END;
    let overwrites = tcp && offset != 0 && offset < TCP_LEN;
    if hides || overwrites || header_len + offset + payload_len > usize::from(u16::MAX) {
        return Err(DropReason::InnerFragment);
    }
    Ok(())
}

/// Whether an IPv6 packet needs [`refuse6`]'s look: nearly all carry TCP or UDP directly.
#[inline]
pub(crate) fn is_unusual6(ip: &[u8; IPV6_LEN]) -> bool {
    !matches!(ip[6], PROTOCOL_TCP | PROTOCOL_UDP)
}

/// Refuses neighbour discovery, whatever headers it hides behind, and fragments as [`refuse4`] does. `packet` is the
/// whole packet and nothing behind it.
#[cold]
pub(crate) fn refuse6(packet: &[u8], ip: &[u8; IPV6_LEN]) -> Result<(), DropReason> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    /// RFC 8504 section 5.3 lets a node limit them to eight.
    const EXTENSIONS_MAX: usize = 8;
    /// Router solicitation to redirect (RFC 4861 section 4).
    const DISCOVERY: core::ops::RangeInclusive<u8> = 133..=137;
    const TCP_FLAGS_END: usize = 16;
    const TCP_LEN: usize = 20;
    let (mut next, mut rest) = (ip[6], &packet[IPV6_LEN..]);
    let mut first_fragment = false;
    for _ in 0..=EXTENSIONS_MAX {
        // RFC 7112: the first fragment holds all headers. A whole packet does, too.
        let truncated = if first_fragment {
            DropReason::InnerFragment
        } else {
            DropReason::InnerLength
        };
        let header_len = match next {
            HOP_BY_HOP | ROUTING | DESTINATION | AUTHENTICATION => {
                let units = usize::from(*rest.get(1).ok_or(truncated)?);
                if next == AUTHENTICATION {
                    (units + 2) * 4
                } else {
                    (units + 1) * 8
                }
            }
            FRAGMENT => {
                let header = rest.first_chunk::<8>().ok_or(truncated)?;
                let field = wire::be16(header, 2);
                let (offset, more) = (usize::from(field & 0xfff8), field & 1 != 0);
                let payload_len = rest.len() - 8;
                let overwrites = header[0] == PROTOCOL_TCP && offset != 0 && offset < TCP_LEN;
                if overwrites || offset + payload_len > usize::from(u16::MAX) {
                    return Err(DropReason::InnerFragment);
                }
                if offset != 0 {
                    return Ok(());
                }
                first_fragment |= more;
                8
            }
            PROTOCOL_ICMPV6 => {
                return match rest.first() {
                    Some(kind) if DISCOVERY.contains(kind) => Err(DropReason::NeighbourDiscovery),
                    Some(_) => Ok(()),
                    None => Err(truncated),
                };
            }
            PROTOCOL_TCP if first_fragment && rest.len() < TCP_FLAGS_END => {
                return Err(DropReason::InnerFragment);
            }
            _ => return Ok(()),
        };
        next = *rest.first().ok_or(truncated)?;
        rest = rest.get(header_len..).ok_or(truncated)?;
    }
    Err(DropReason::InnerHeader)
}
