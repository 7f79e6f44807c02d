//! VXLAN (RFC 7348), with the outer header as a kernel VXLAN device sends it: IPv4 packets over IPv4, IPv6 over IPv6.
//!
//! ```text
//!   IPv4   Ethernet 14 │ IPv4 20, TTL 64      │ UDP 8     │ VXLAN 8  │ inner Ethernet 14 │ inner IPv4 …
//!   IPv6   Ethernet 14 │ IPv6 40, hop limit 64│ UDP 8     │ VXLAN 8  │ inner Ethernet 14 │ inner IPv6 …
//!                                               0 sport     0 flags    0 our VTEP
//!                                               4 length    4 VNI      6 their VTEP
//!                                               6 checksum
//! ```
//!
//! Over IPv4 the UDP checksum is zero, which RFC 7348 section 5 asks for and every receiver of VXLAN over IPv4 accepts.
//! On receipt a non-zero one is not verified (section 5: "MAY"): it would cost a pass over the payload, and the inner
//! packet has its own. Over IPv6 there is no header checksum, so a UDP checksum must be there and be right (RFC 8200
//! section 8.1); mostly it is made and verified without a look at the payload, see [`wire::ipv6_sum_by_transport`].

use ripstop_fib::LongTemplate;

use crate::flow::source_port;
use crate::inner::{self, Sender};
use crate::table::Table;
use crate::verdict::{DropReason, FromNic, Front};
use crate::wire::{
    self, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, IPV4_LEN,
    IPV6_LEN, PROTOCOL_UDP, UDP_LEN, VXLAN_LEN,
};

use super::{field, field_of, length, outer4, store, write};

/// What is between the outer and the inner IP header.
const MIDDLE_LEN: usize = UDP_LEN + VXLAN_LEN + ETHERNET_LEN;

/// Flags word of a VXLAN header: the I bit and nothing else (RFC 7348 section 5).
const VXLAN_FLAGS: u32 = 0x0800_0000;

/// Takes a received IPv4 packet apart that begins `at` bytes inside its frame, or says why not.
#[inline(always)]
pub(crate) fn decapsulate4(
    packet: &[u8],
    at: usize,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    const INNER: usize = IPV4_LEN + UDP_LEN + VXLAN_LEN;
    let head = packet
        .first_chunk::<INNER>()
        .ok_or(DropReason::OuterTruncated)?;
    let (ip, total_len) = outer4(head, table.v4.address, PROTOCOL_UDP)?;
    let source = wire::be32(ip, 12);
    let Some(tunnel) = head.last_chunk::<{ UDP_LEN + VXLAN_LEN }>() else {
        return Err(DropReason::OuterTruncated);
    };
    let udp_len = udp(tunnel, table)?;
    if total_len > packet.len() || udp_len + IPV4_LEN != total_len {
        return Err(DropReason::OuterLength);
    }
    vxlan(tunnel, table)?;
    let inner = packet
        .get(INNER..total_len)
        .ok_or(DropReason::OuterLength)?;
    let sender = Sender::Tunnel(source, ip[1]);
    let delivered = match ethernet(inner, &table.v4.vtep_mac, ETHERTYPE_IPV4) {
        Ok(packet) => inner::deliver4(packet, at + INNER + ETHERNET_LEN, sender, table),
        Err(reason) => Err(reason),
    };
    match delivered {
        Ok(verdict) => Ok(verdict),
        Err(reason) => Err(inner::blame4(reason, source, table)),
    }
}

/// As [`decapsulate4`], for IPv6.
#[inline(always)]
pub(crate) fn decapsulate6(
    packet: &[u8],
    at: usize,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    const INNER: usize = IPV6_LEN + UDP_LEN + VXLAN_LEN;
    let head = packet
        .first_chunk::<INNER>()
        .ok_or(DropReason::OuterTruncated)?;
    let (Some(ip), Some(tunnel)) = (
        head.first_chunk::<IPV6_LEN>(),
        head.last_chunk::<{ UDP_LEN + VXLAN_LEN }>(),
    ) else {
        return Err(DropReason::OuterTruncated);
    };
    if ip[6] != PROTOCOL_UDP || wire::ne128(ip, 24) != table.v6.address {
        return Err(DropReason::OuterDestination);
    }
    let udp_len = udp(tunnel, table)?;
    let payload_len = usize::from(wire::be16(ip, 4));
    if payload_len + IPV6_LEN > packet.len() || udp_len != payload_len {
        return Err(DropReason::OuterLength);
    }
    vxlan(tunnel, table)?;
    let inner = packet
        .get(INNER..IPV6_LEN + payload_len)
        .ok_or(DropReason::OuterLength)?;
    let source = wire::octets(ip, 8);
    let delivered = udp6_checksum(packet, table)
        .and_then(|()| ethernet(inner, &table.v6.vtep_mac, ETHERTYPE_IPV6))
        .and_then(|packet| {
            let sender = Sender::Tunnel(source, wire::traffic_class(ip));
            inner::deliver6(packet, at + INNER + ETHERNET_LEN, sender, table)
        });
    match delivered {
        Ok(verdict) => Ok(verdict),
        Err(reason) => Err(inner::blame6(reason, source, table)),
    }
}

/// Checks port and room for the VXLAN header; returns the datagram's length.
#[inline(always)]
fn udp(tunnel: &[u8; UDP_LEN + VXLAN_LEN], table: &Table<'_>) -> Result<usize, DropReason> {
    if wire::be16(tunnel, 2) != table.udp_port {
        return Err(DropReason::OuterDestination);
    }
    let udp_len = usize::from(wire::be16(tunnel, 4));
    if udp_len < UDP_LEN + VXLAN_LEN {
        return Err(DropReason::OuterLength);
    }
    Ok(udp_len)
}

#[inline(always)]
fn vxlan(tunnel: &[u8; UDP_LEN + VXLAN_LEN], table: &Table<'_>) -> Result<(), DropReason> {
    if wire::be32(tunnel, UDP_LEN) != VXLAN_FLAGS || tunnel[UDP_LEN + 7] != 0 {
        return Err(DropReason::VxlanFlags);
    }
    if wire::be32(tunnel, UDP_LEN + 4) != table.vni_word {
        return Err(DropReason::VxlanVni);
    }
    Ok(())
}

/// Checks the inner Ethernet header: to our VTEP, from another, of the tunnel's family. Returns what is behind it.
#[inline(always)]
fn ethernet<'p>(
    inner: &'p [u8],
    vtep_mac: &[u8; 6],
    ether_type: u16,
) -> Result<&'p [u8], DropReason> {
    let (head, packet) = inner
        .split_first_chunk::<ETHERNET_LEN>()
        .ok_or(DropReason::InnerTruncated)?;
    let (destination, source) = (&head[0..6], &head[6..12]);
    // Ahead of the addresses: a frame that ends inside its IP header is cut off, whatever its Ethernet header says.
    if packet.len() < IPV4_LEN {
        return Err(DropReason::InnerTruncated);
    }
    if destination != vtep_mac {
        return Err(DropReason::InnerDestinationMac);
    }
    if source == vtep_mac || source[0] & 1 != 0 {
        return Err(DropReason::InnerSourceMac);
    }
    match wire::be16(head, 12) {
        found if found == ether_type => Ok(packet),
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => Err(DropReason::InnerVlan),
        _ => Err(DropReason::InnerEtherType),
    }
}

/// Verifies the UDP checksum over IPv6 of a packet to our address with our VXLAN header and right outer lengths. First as
/// if the inner transport checksum were right: if it is not, a packet that passes here is refused by the pod. Only if
/// that does not add up, all bytes are summed.
#[inline(always)]
fn udp6_checksum(packet: &[u8], table: &Table<'_>) -> Result<(), DropReason> {
    if adds_up_by_transport(packet, table.vxlan6_sum) {
        Ok(())
    } else {
        udp6_checksum_of_all(packet)
    }
}

/// Whether a UDP checksum over IPv6 is right if the inner transport checksum is. `known` is what [`known_sum6`] gives.
#[inline(always)]
fn adds_up_by_transport(packet: &[u8], known: u64) -> bool {
    const INNER: usize = IPV6_LEN + MIDDLE_LEN;
    let Some(head) = packet.first_chunk::<{ INNER + IPV6_LEN + UDP_LEN }>() else {
        return false;
    };
    let protocol = head[INNER + 6];
    let has_checksum = match protocol {
        PROTOCOL_UDP => wire::ne16(head, INNER + IPV6_LEN + 6) != 0,
        _ => wire::has_transport_checksum(protocol),
    };
    let given = wire::ne16(head, IPV6_LEN + 6) != 0;
    // Bytes behind the inner packet are in the outer checksum and not in the inner one.
    let whole = usize::from(wire::be16(head, INNER + 4)) + MIDDLE_LEN + IPV6_LEN
        == usize::from(wire::be16(head, 4));
    // Of the inner packet there remain version, class and flow, protocol and hop limit, less the protocol: see
    // `wire::ipv6_sum_by_transport`.
    let sum = known
        + wire::sum_words([
            wire::ne64(head, 8),
            wire::ne64(head, 16),
            wire::ne64(head, IPV6_LEN),
            wire::ne64(head, INNER - 14),
            wire::ne64(head, INNER - 6),
        ])
        + u64::from(wire::ne16(head, 4))
        + u64::from(wire::ne16(head, INNER + 2))
        + u64::from(wire::ne16(head, INNER + 6))
        + u64::from(!u16::from(protocol).to_be());
    has_checksum && given && whole && wire::is_all_ones(sum)
}

/// What of the sum over a UDP datagram is the same in all that arrive: our address, the pseudo header's protocol and the
/// VXLAN header. Folded, of words as they lie in memory.
pub(crate) fn known_sum6(address: u128, vni_word: u32) -> u64 {
    let [low, high] = ripstop_fib::halves(address);
    let vxlan = u64::from(VXLAN_FLAGS) << 32 | u64::from(vni_word);
    wire::sum_words([low, high, vxlan.to_be()]) + u64::from(u16::from(PROTOCOL_UDP).to_be())
}

#[cold]
fn udp6_checksum_of_all(packet: &[u8]) -> Result<(), DropReason> {
    let payload_len = wire::be16(packet, 4);
    let end = IPV6_LEN + usize::from(payload_len);
    let given = wire::be16(packet, IPV6_LEN + 6) != 0;
    let sum = packet.get(8..end).map(|summed| {
        wire::fold(u32::from(wire::sum(summed)) + u32::from(PROTOCOL_UDP) + u32::from(payload_len))
    });
    if given && sum == Some(0xffff) {
        Ok(())
    } else {
        Err(DropReason::OuterUdpChecksum)
    }
}

/// Fills a header template in for one IPv4 packet and puts it before it.
#[inline(always)]
pub(crate) fn encapsulate4(
    template: &[u64; 8],
    packet: &[u8],
    ip: &[u8; IPV4_LEN],
    table: &Table<'_>,
    hash: u64,
    identification: u16,
    front: &mut Front,
) -> usize {
    write(
        &filled4(template, packet, ip, table, hash, identification),
        front,
    );
    64
}

/// The same for a header with a VLAN tag, whose first bytes do not vary.
#[inline]
pub(crate) fn encapsulate4_tagged(
    template: &LongTemplate<'_>,
    packet: &[u8],
    ip: &[u8; IPV4_LEN],
    table: &Table<'_>,
    hash: u64,
    identification: u16,
    front: &mut Front,
) -> usize {
    let mut words = template.header();
    if let Some(last) = words.last_chunk_mut::<8>() {
        *last = filled4(last, packet, ip, table, hash, identification);
    }
    store(&words, front);
    template.length()
}

/// ```text
///   the last eight words of the header, by bytes from their start
///      8              16                  24                 32                     40
///      … │ 45 TOS     │ length │ id │ …   │ sum │ source …   │ … │ sport │ … │ len  │ sum │ VXLAN …
///          word 1       word 2              word 3             word 4                 word 5
/// ```
#[inline(always)]
fn filled4(
    template: &[u64; 8],
    packet: &[u8],
    ip: &[u8; IPV4_LEN],
    table: &Table<'_>,
    hash: u64,
    identification: u16,
) -> [u64; 8] {
    let mut words = *template;
    let udp_len = length(packet.len() + MIDDLE_LEN);
    let total_len = length(packet.len() + MIDDLE_LEN + IPV4_LEN);
    let tos = ip[1] & table.tos_mask;
    let sum = u32::from(field_of(words[3], 0))
        + u32::from(total_len)
        + u32::from(identification)
        + u32::from(tos);
    words[1] |= u64::from(tos) << 56;
    words[2] |= field(total_len, 0) | field(identification, 2);
    words[3] = words[3] & !0xffff | field(!wire::fold(sum), 0);
    words[4] |= field(source_port(hash), 2) | field(udp_len, 6);
    words
}

/// Fills a header template in for one IPv6 packet and puts it before it.
///
/// ```text
///   the words of the template, by bytes from their start
///      24                                  32        64                              72
///      … │ 6, traffic class, 0 │ length    │ …       … │ sport │ dport │ length      │ sum │ VXLAN …
///          word 3                                      word 8                          word 9
/// ```
#[inline(always)]
pub(crate) fn encapsulate6(
    template: &LongTemplate<'_>,
    packet: &[u8],
    ip: &[u8; IPV6_LEN],
    table: &Table<'_>,
    hash: u64,
    front: &mut Front,
) -> usize {
    let mut words = template.header();
    let udp_len = length(packet.len() + MIDDLE_LEN);
    let class = wire::traffic_class(ip) & table.tos_mask;
    let port = source_port(hash);
    let inner = match wire::ipv6_sum_by_transport(packet, ip) {
        Some(sum) => sum,
        None => u32::from(wire::sum(packet)),
    };
    // The length counts twice: in the pseudo header and in the UDP header.
    let sum = u32::from(field_of(words[9], 0)) + 2 * u32::from(udp_len) + u32::from(port) + inner;
    // What adds up to zero is sent as all ones: zero would mean "none" (RFC 8200 section 8.1).
    let checksum = match !wire::fold(sum) {
        0 => u16::MAX,
        checksum => checksum,
    };
    words[3] |= field(u16::from(class) << 4, 2) | field(udp_len, 6);
    words[8] |= field(port, 2) | field(udp_len, 6);
    words[9] = words[9] & !0xffff | field(checksum, 0);
    store(&words, front);
    template.length()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From fd00:199::12 to fd00:199::11, VNI 1; inside, UDP from fd10:244:2::7 to fd10:244:1::5.
    const FRAME: &str = "6000000000720b28fd000199000000000000000000000012fd0001990000000000000000000000119c40211800727a73\
        0800000000000100025253000601025253000602\
        86dd60001234002c113ffd100244000200000000000000000007fd10024400010000000000000000000504d20050002cc876\
        000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223";

    fn packet() -> Vec<u8> {
        let digits: Vec<char> = FRAME.chars().collect();
        digits
            .chunks_exact(2)
            .filter_map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).ok())
            .collect()
    }

    /// Whoever else looks at the answer only cannot tell: what does not add up here is summed as a whole.
    #[test]
    fn a_good_udp_checksum_over_ipv6_needs_no_look_at_the_payload() {
        let address = 0xfd00_0199_0000_0000_0000_0000_0000_0011_u128;
        let known = known_sum6(address.to_be(), 1 << 8);
        let good = packet();
        assert_eq!(udp6_checksum_of_all(&good), Ok(()));
        assert!(adds_up_by_transport(&good, known));
        for at in 8..IPV6_LEN + MIDDLE_LEN + 4 {
            // Our address and the VXLAN header are known, and compared elsewhere.
            if (24..IPV6_LEN).contains(&at) || (48..56).contains(&at) {
                continue;
            }
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            assert!(!adds_up_by_transport(&bad, known), "byte {at}");
        }
        for len in 0..IPV6_LEN + MIDDLE_LEN + IPV6_LEN + UDP_LEN {
            assert!(!adds_up_by_transport(&good[..len], known), "{len} bytes");
        }
    }
}
