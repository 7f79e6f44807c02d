//! Which flow a packet belongs to, as a number: it picks the outer UDP source port and the path.
//!
//! The number depends on addresses, protocol, and ports where every packet of the flow shows them. The fragments of a
//! datagram must take one path, so none of them uses ports; nor does a packet whose ports lie behind options or
//! extension headers. The seed is the node's, so that nobody outside can tell which flows will share a port.

use crate::wire::{
    self, FRAGMENT_MASK, IPV4_LEN, IPV6_LEN, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP,
};

/// The golden ratio's fraction: multiplication by it mixes low bits into high ones.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
/// First UDP source port, and how many: the default of `net.ipv4.ip_local_port_range`, which the kernel's device uses.
const SOURCE_PORTS: (u16, u32) = (32768, 28232);

/// The flow of an IPv4 packet.
#[inline]
pub(crate) fn hash4(packet: &[u8], ip: &[u8; IPV4_LEN], seed: u64) -> u64 {
    let plain = wire::be16(ip, 6) & FRAGMENT_MASK == 0 && ip[0] == 0x45;
    hash4_plain(packet, ip, seed, plain)
}

/// The same for a packet of which is known whether it is `plain`: no fragment, no options.
#[inline]
pub(crate) fn hash4_plain(packet: &[u8], ip: &[u8; IPV4_LEN], seed: u64, plain: bool) -> u64 {
    let addresses = u64::from(wire::be32(ip, 12)) << 32 | u64::from(wire::be32(ip, 16));
    let mixed = (addresses ^ seed).wrapping_mul(MULTIPLIER);
    finish(mixed, transport(packet.get(IPV4_LEN..), ip[9], plain))
}

/// The flow of an IPv6 packet. The flow label is left out: it may change within a flow, and be the same in two.
#[inline(always)]
pub(crate) fn hash6(packet: &[u8], ip: &[u8; IPV6_LEN], seed: u64) -> u64 {
    let word = |at: usize| match ip[at..].first_chunk() {
        Some(word) => u64::from_be_bytes(*word),
        None => 0,
    };
    let source = product(word(8) ^ seed, word(16) ^ MULTIPLIER);
    let destination = product(word(24) ^ seed.rotate_left(32), word(32) ^ !MULTIPLIER);
    let mixed = source ^ destination.rotate_left(23);
    finish(mixed, transport(packet.get(IPV6_LEN..), ip[6], true))
}

/// Mixes two numbers: both halves of their product.
#[inline(always)]
fn product(a: u64, b: u64) -> u64 {
    let [low, high] = ripstop_fib::halves(u128::from(a) * u128::from(b));
    low ^ high
}

/// Protocol and, if they are to be used and there, ports.
#[inline(always)]
fn transport(payload: Option<&[u8]>, protocol: u8, use_ports: bool) -> u64 {
    let has_ports = matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP);
    let ports = match payload.and_then(|payload| payload.get(..4)) {
        Some(ports) if has_ports && use_ports => wire::be32(ports, 0),
        _ => 0,
    };
    u64::from(ports) << 8 | u64::from(protocol)
}

#[inline]
fn finish(mixed: u64, transport: u64) -> u64 {
    let mixed = (mixed ^ (mixed >> 29) ^ transport).wrapping_mul(MULTIPLIER);
    mixed ^ (mixed >> 32)
}

/// The outer UDP source port of a flow.
#[inline]
pub(crate) fn source_port(hash: u64) -> u16 {
    let (first, count) = SOURCE_PORTS;
    // The upper half of a 32-bit multiplication: even over the range, without a division.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "below `count`, which is below 2^16"
    )]
    let offset = (((hash & 0xffff_ffff) * u64::from(count)) >> 32) as u16;
    first + offset
}

/// The bits of a flow's number that pick its path: others than the source port's, or each path would see a part of the
/// ports only.
#[inline]
pub(crate) fn path_bits(hash: u64) -> u32 {
    (hash >> 32) as u32
}
