//! The bytes of the protocols: fields at fixed places, and the Internet checksum. No policy.

/// Length of an Ethernet header without a VLAN tag.
pub const ETHERNET_LEN: usize = 14;
/// Length of an 802.1Q tag.
pub const VLAN_LEN: usize = 4;
/// Length of an IPv4 header without options (RFC 791 section 3.1).
pub const IPV4_LEN: usize = 20;
/// Length of an IPv6 header without extension headers (RFC 8200 section 3).
pub const IPV6_LEN: usize = 40;
/// Length of a UDP header (RFC 768).
pub const UDP_LEN: usize = 8;
/// Length of a VXLAN header (RFC 7348 section 5).
pub const VXLAN_LEN: usize = 8;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of an 802.1ad tag.
pub const ETHERTYPE_QINQ: u16 = 0x88a8;
/// IP protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of IPv4 in IP (RFC 2003).
pub const PROTOCOL_IPIP: u8 = 4;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;
/// IP protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = 132;

/// Bits of the IPv4 flags and fragment offset field that make a packet a fragment: MF and the offset.
pub const FRAGMENT_MASK: u16 = 0x3fff;
/// "Don't fragment" in the same field.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// Bits of the IPv4 type-of-service octet and the IPv6 traffic class that carry ECN (RFC 3168 section 5).
pub const ECN_MASK: u8 = 0b11;

/// Two bytes at `at`, big-endian. The place must lie within `bytes`: callers pass arrays whose length they know.
#[inline]
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Four bytes at `at`, big-endian; as [`be16`].
#[inline]
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The octets of an IPv6 address at `at`; as [`be16`].
#[inline(always)]
pub fn octets(bytes: &[u8], at: usize) -> &[u8; 16] {
    bytes[at..].first_chunk().unwrap_or(&[0; 16])
}

/// An IPv6 address at `at` as it lies in memory: a number for comparisons, which need no order of bytes; as [`be16`].
#[inline(always)]
pub fn ne128(bytes: &[u8], at: usize) -> u128 {
    u128::from_ne_bytes(*octets(bytes, at))
}

/// Two bytes at `at` as they lie in memory: for sums, which need no order of bytes (RFC 1071 section 2, B).
#[inline(always)]
pub fn ne16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

/// Eight bytes at `at`; as [`ne16`].
#[inline(always)]
pub fn ne64(bytes: &[u8], at: usize) -> u64 {
    match bytes[at..].first_chunk() {
        Some(word) => u64::from_ne_bytes(*word),
        None => 0,
    }
}

/// The traffic class of an IPv6 header, which has the bits of the IPv4 type-of-service octet.
#[inline]
pub fn traffic_class(ip: &[u8; IPV6_LEN]) -> u8 {
    ip[0] << 4 | ip[1] >> 4
}

/// Folds a sum of 16-bit words to 16 bits (RFC 1071 section 2).
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "two foldings leave 16 bits"
    )]
    let folded = sum as u16;
    folded
}

/// Whether a sum of 16-bit words, some of which are not zero, is all ones once it is folded: it is a multiple of that.
#[inline(always)]
pub fn is_all_ones(sum: u64) -> bool {
    sum.is_multiple_of(0xffff)
}

/// Whether the checksum of an IPv4 header without options is right (RFC 1071). The header must not be all zeros.
#[inline(always)]
pub fn ipv4_checksum_is_right(header: &[u8; IPV4_LEN]) -> bool {
    let mut sum = 0;
    for word in header.as_chunks::<4>().0 {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    is_all_ones(sum)
}

/// Ones' complement sum of any bytes up to 64 KiB; an odd last byte is padded with zero.
#[inline]
pub fn sum(bytes: &[u8]) -> u16 {
    sum_here(bytes)
}

/// [`sum`], compiled for the function that calls it.
#[inline(always)]
pub(crate) fn sum_here(bytes: &[u8]) -> u16 {
    let (quads, rest) = bytes.as_chunks::<4>();
    // In memory order: a sum of swapped words is the swapped sum (RFC 1071 section 2, B).
    let mut sum: u64 = quads
        .iter()
        .map(|quad| u64::from(u32::from_ne_bytes(*quad)))
        .sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_ne_bytes(last));
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "three 16-bit numbers add up to 18 bits"
    )]
    let folded = fold(sum as u32);
    u16::from_be_bytes(folded.to_ne_bytes())
}

/// Sum of the 16-bit words in a few long ones, all as they lie in memory, folded to 33 bits.
#[inline(always)]
pub fn sum_words<const N: usize>(words: [u64; N]) -> u64 {
    let (mut sum, mut carry) = (0u64, false);
    for word in words {
        // The carry goes round: one's complement arithmetic, whatever the width.
        (sum, carry) = sum.carrying_add(word, carry);
    }
    (sum & 0xffff_ffff) + (sum >> 32) + u64::from(carry)
}

/// The checksum after one 16-bit word of the data changed from `old` to `new` (RFC 1624 section 3, equation 3).
#[inline]
pub fn checksum_after(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

/// Whether a protocol over IPv6 has the Internet checksum over segment and pseudo header; UDP may still go without.
#[inline]
pub fn has_transport_checksum(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_ICMPV6)
}

/// Ones' complement sum of an IPv6 packet, not folded, without a look at the payload where that is possible.
///
/// A transport checksum makes the sum of transport segment and pseudo header all ones, which counts as zero; so the
/// segment's sum is known from the pseudo header. Addresses and length stand in both headers and cancel out (the
/// kernel's "local checksum offload", Documentation/networking/checksum-offloads.rst). `None` where no such checksum
/// is: other protocols, fragments, extension headers, UDP without checksum. If the checksum is there and wrong, so is
/// the sum.
#[inline(always)]
pub fn ipv6_sum_by_transport(packet: &[u8], ip: &[u8; IPV6_LEN]) -> Option<u32> {
    let protocol = ip[6];
    let no_checksum = protocol == PROTOCOL_UDP
        && matches!(
            packet.get(IPV6_LEN + 6..IPV6_LEN + UDP_LEN),
            None | Some([0, 0])
        );
    if no_checksum || !has_transport_checksum(protocol) {
        return None;
    }
    let header = u32::from(be16(ip, 0)) + u32::from(be16(ip, 2)) + u32::from(be16(ip, 6));
    Some(header + u32::from(!u16::from(protocol)))
}
