//! The bytes of the protocols: fields at fixed places, and the Internet checksum. No policy.

/// Length of an Ethernet header without a VLAN tag.
pub const ETHERNET_LEN: usize = 14;
/// Length of an IPv4 header without options (RFC 791 section 3.1).
pub const IPV4_LEN: usize = 20;
/// Length of a UDP header (RFC 768).
pub const UDP_LEN: usize = 8;
/// Length of a VXLAN header (RFC 7348 section 5).
pub const VXLAN_LEN: usize = 8;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of an 802.1ad tag.
pub const ETHERTYPE_QINQ: u16 = 0x88a8;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = 132;

/// Bits of the IPv4 flags and fragment offset field that make a packet a fragment: MF and the offset.
pub const FRAGMENT_MASK: u16 = 0x3fff;
/// Bits of the IPv4 type-of-service octet that carry ECN (RFC 3168 section 5).
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

/// Folds a sum of 16-bit words to 16 bits (RFC 1071 section 2).
#[inline]
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

/// Ones' complement sum of an IPv4 header without options; all ones when its checksum is right (RFC 1071).
#[inline]
pub fn ipv4_sum(header: &[u8; IPV4_LEN]) -> u16 {
    let mut sum = 0;
    let mut at = 0;
    while at < IPV4_LEN {
        sum += u32::from(be16(header, at));
        at += 2;
    }
    fold(sum)
}

/// Ones' complement sum of bytes of any even length up to 64 KiB; an odd last byte is padded with zero.
pub fn sum(bytes: &[u8]) -> u16 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let mut sum: u32 = pairs
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum();
    if let [last] = rest {
        sum += u32::from(*last) << 8;
    }
    fold(sum)
}

/// The checksum after one 16-bit word of the data changed from `old` to `new` (RFC 1624 section 3, equation 3).
#[inline]
pub fn checksum_after(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}
