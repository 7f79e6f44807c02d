//! VXLAN over IPv4 (RFC 7348), with the outer header as a kernel VXLAN device sends it.
//!
//! ```text
//!   0           14              34        42        50                64
//!   │ Ethernet  │ IPv4, TTL 64  │ UDP     │ VXLAN   │ inner Ethernet  │ inner IPv4 …
//!                  2 length        0 sport   0 flags   0 our VTEP
//!                  4 id            4 length  4 VNI     6 their VTEP
//!                 10 checksum
//! ```
//!
//! The UDP checksum is zero, which RFC 7348 section 5 asks for and every receiver of VXLAN over IPv4 accepts. On
//! receipt a non-zero one is not verified (section 5: "MAY"): it would cost a pass over the payload, and the inner
//! packet has its own.

use ripstop_fib::PeerCheck;

use crate::table::Table;
use crate::verdict::{DropReason, FromNic};
use crate::wire::{
    self, ECN_MASK, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_QINQ, ETHERTYPE_VLAN, FRAGMENT_MASK,
    IPV4_LEN, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, UDP_LEN, VXLAN_LEN,
};

const OUTER_IP: usize = ETHERNET_LEN;
const OUTER_UDP: usize = OUTER_IP + IPV4_LEN;
const VXLAN: usize = OUTER_UDP + UDP_LEN;
const INNER: usize = VXLAN + VXLAN_LEN;
const INNER_IP: usize = INNER + ETHERNET_LEN;

/// Flags word of a VXLAN header: the I bit and nothing else (RFC 7348 section 5).
const VXLAN_FLAGS: u32 = 0x0800_0000;

/// First UDP source port, and how many: the default of `net.ipv4.ip_local_port_range`, which the kernel's device uses.
const SOURCE_PORTS: (u16, u32) = (32768, 28232);

/// Congestion experienced (RFC 3168 section 5).
const CE: u8 = 0b11;
/// ECN-capable transport, codepoint 1.
const ECT1: u8 = 0b01;
/// ECN-capable transport, codepoint 0.
const ECT0: u8 = 0b10;

/// Takes a received tunnel frame apart, or says why not.
#[inline]
pub(crate) fn decapsulate(frame: &[u8], table: &Table<'_>) -> Result<FromNic, DropReason> {
    let head = frame
        .first_chunk::<INNER>()
        .ok_or(DropReason::OuterTruncated)?;
    let end = outer(head, frame.len(), table)?;
    let source = wire::be32(head, OUTER_IP + 12);
    let inner = frame.get(INNER..end).ok_or(DropReason::OuterLength)?;
    match inner_packet(inner, head[OUTER_IP + 1], source, table) {
        Ok(verdict) => Ok(verdict),
        Err(reason) => Err(blame(reason, source, table)),
    }
}

/// Checks the outer headers; returns where the tunnel packet ends in the frame.
#[inline]
fn outer(head: &[u8; INNER], frame_len: usize, table: &Table<'_>) -> Result<usize, DropReason> {
    let Some(ip) = head[OUTER_IP..].first_chunk::<IPV4_LEN>() else {
        return Err(DropReason::OuterTruncated);
    };
    if wire::be16(head, 12) != ETHERTYPE_IPV4 || ip[0] != 0x45 {
        return Err(DropReason::OuterHeader);
    }
    if wire::be16(ip, 6) & FRAGMENT_MASK != 0 {
        return Err(DropReason::OuterFragment);
    }
    if wire::ipv4_sum(ip) != 0xffff {
        return Err(DropReason::OuterChecksum);
    }
    if ip[9] != PROTOCOL_UDP
        || wire::be32(ip, 16) != table.local
        || wire::be16(head, OUTER_UDP + 2) != table.udp_port
    {
        return Err(DropReason::OuterDestination);
    }
    let total_len = usize::from(wire::be16(ip, 2));
    let udp_len = usize::from(wire::be16(head, OUTER_UDP + 4));
    let end = OUTER_IP + total_len;
    if end > frame_len || udp_len + IPV4_LEN != total_len || udp_len < UDP_LEN + VXLAN_LEN {
        return Err(DropReason::OuterLength);
    }
    if wire::be32(head, VXLAN) != VXLAN_FLAGS || head[VXLAN + 7] != 0 {
        return Err(DropReason::VxlanFlags);
    }
    if wire::be32(head, VXLAN + 4) != table.vni_word {
        return Err(DropReason::VxlanVni);
    }
    Ok(end)
}

/// Checks the inner frame: addressed to our VTEP, IPv4 and whole, from a source that `outer_source` may speak for, to
/// a destination of ours.
#[inline]
fn inner_packet(
    inner: &[u8],
    outer_tos: u8,
    outer_source: u32,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    let head = inner
        .first_chunk::<{ ETHERNET_LEN + IPV4_LEN }>()
        .ok_or(DropReason::InnerTruncated)?;
    inner_ethernet(head, table)?;
    let Some(ip) = head[ETHERNET_LEN..].first_chunk::<IPV4_LEN>() else {
        return Err(DropReason::InnerTruncated);
    };
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || header_len < IPV4_LEN {
        return Err(DropReason::InnerHeader);
    }
    let total_len = usize::from(wire::be16(ip, 2));
    if total_len < header_len || ETHERNET_LEN + total_len > inner.len() {
        return Err(DropReason::InnerLength);
    }
    let sum = if header_len == IPV4_LEN {
        wire::ipv4_sum(ip)
    } else {
        wire::sum(
            inner
                .get(ETHERNET_LEN..ETHERNET_LEN + header_len)
                .ok_or(DropReason::InnerLength)?,
        )
    };
    if sum != 0xffff {
        return Err(DropReason::InnerChecksum);
    }
    match table.image.check_peer4(outer_source, wire::be32(ip, 12)) {
        PeerCheck::Allowed => {}
        PeerCheck::ForeignSource => return Err(DropReason::InnerSource),
        PeerCheck::UnknownPeer => return Err(DropReason::UnknownPeer),
    }
    if !table.is_local(wire::be32(ip, 16)) {
        return Err(DropReason::InnerDestination);
    }
    let tos = ecn_after_decapsulation(ip[1], outer_tos)?;
    Ok(FromNic::Deliver {
        strip: INNER_IP,
        len: total_len,
        tos: (tos != ip[1]).then_some(tos),
    })
}

#[inline]
fn inner_ethernet(
    head: &[u8; ETHERNET_LEN + IPV4_LEN],
    table: &Table<'_>,
) -> Result<(), DropReason> {
    let (destination, source) = (&head[0..6], &head[6..12]);
    if destination != table.vtep_mac {
        return Err(DropReason::InnerDestinationMac);
    }
    if source == table.vtep_mac || source[0] & 1 != 0 {
        return Err(DropReason::InnerSourceMac);
    }
    match wire::be16(head, 12) {
        ETHERTYPE_IPV4 => Ok(()),
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => Err(DropReason::InnerVlan),
        _ => Err(DropReason::InnerEtherType),
    }
}

/// A sender that is no peer is the reason before anything that is wrong inside its packet.
#[cold]
fn blame(reason: DropReason, source: u32, table: &Table<'_>) -> DropReason {
    match table.image.check_peer4(source, 0) {
        PeerCheck::UnknownPeer => DropReason::UnknownPeer,
        PeerCheck::Allowed | PeerCheck::ForeignSource => reason,
    }
}

/// The inner type-of-service octet after decapsulation: RFC 6040 section 4.2, figure 4.
#[inline]
fn ecn_after_decapsulation(inner_tos: u8, outer_tos: u8) -> Result<u8, DropReason> {
    match (inner_tos & ECN_MASK, outer_tos & ECN_MASK) {
        (0, CE) => Err(DropReason::EcnNotCapable),
        (ECT0 | ECT1, CE) => Ok(inner_tos | CE),
        (ECT0, ECT1) => Ok(inner_tos & !ECN_MASK | ECT1),
        _ => Ok(inner_tos),
    }
}

/// Fills a header template in for one packet: lengths, identification, ECN, checksum, source port.
///
/// DSCP stays zero, as flannel has it; ECN goes to the outer header as the kernel puts it there, see [`outer_ecn`].
#[inline]
pub(crate) fn encapsulate(
    template: &[u64; 8],
    packet: &[u8],
    ip: &[u8; IPV4_LEN],
    flow_seed: u64,
    identification: u16,
) -> [u8; INNER_IP] {
    let mut header = [0; INNER_IP];
    for (bytes, word) in header.as_chunks_mut::<8>().0.iter_mut().zip(template) {
        *bytes = word.to_le_bytes();
    }
    let udp_len = length(packet.len() + UDP_LEN + VXLAN_LEN + ETHERNET_LEN);
    let total_len = length(packet.len() + INNER_IP - OUTER_IP);
    let ecn = outer_ecn(ip[1]);
    let prepared = wire::be16(&header, OUTER_IP + 10);
    let sum =
        u32::from(prepared) + u32::from(total_len) + u32::from(identification) + u32::from(ecn);
    header[OUTER_IP + 1] = ecn;
    header[OUTER_IP + 2..OUTER_IP + 4].copy_from_slice(&total_len.to_be_bytes());
    header[OUTER_IP + 4..OUTER_IP + 6].copy_from_slice(&identification.to_be_bytes());
    header[OUTER_IP + 10..OUTER_IP + 12].copy_from_slice(&(!wire::fold(sum)).to_be_bytes());
    let port = source_port(flow_hash(packet, ip, flow_seed));
    header[OUTER_UDP..OUTER_UDP + 2].copy_from_slice(&port.to_be_bytes());
    header[OUTER_UDP + 4..OUTER_UDP + 6].copy_from_slice(&udp_len.to_be_bytes());
    header
}

/// The outer ECN field: the inner one, but a mark that is inside already shows outside only as the ability to be marked
/// (RFC 3168 section 9.1.1, full functionality). RFC 6040 would copy the mark; the kernel's device does not, and the
/// receiver makes the same of both.
#[inline]
fn outer_ecn(inner_tos: u8) -> u8 {
    match inner_tos & ECN_MASK {
        CE => ECT0,
        ecn => ecn,
    }
}

/// A length field. `Table::new` bounds the pod MTU so that no packet with its headers is longer than 65535 bytes.
#[inline]
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).unwrap_or(u16::MAX)
}

/// A hash of the inner flow: addresses, protocol, and ports where every packet of the flow shows them.
///
/// Fragments of a datagram must take one path, so none of them uses ports; with IP options the ports lie elsewhere.
#[inline]
fn flow_hash(packet: &[u8], ip: &[u8; IPV4_LEN], seed: u64) -> u64 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let addresses = u64::from(wire::be32(ip, 12)) << 32 | u64::from(wire::be32(ip, 16));
    let has_ports = matches!(ip[9], PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP);
    let whole = wire::be16(ip, 6) & FRAGMENT_MASK == 0 && ip[0] == 0x45;
    let ports = match packet.get(IPV4_LEN..IPV4_LEN + 4) {
        Some(ports) if has_ports && whole => wire::be32(ports, 0),
        _ => 0,
    };
    let transport = u64::from(ports) << 8 | u64::from(ip[9]);
    let mixed = (addresses ^ seed).wrapping_mul(MULTIPLIER);
    let mixed = (mixed ^ (mixed >> 29) ^ transport).wrapping_mul(MULTIPLIER);
    mixed ^ (mixed >> 32)
}

#[inline]
fn source_port(hash: u64) -> u16 {
    let (first, count) = SOURCE_PORTS;
    // The upper half of a 32-bit multiplication: even over the range, without a division.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "below `count`, which is below 2^16"
    )]
    let offset = (((hash & 0xffff_ffff) * u64::from(count)) >> 32) as u16;
    first + offset
}
