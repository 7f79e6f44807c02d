//! The encapsulations: one module each, straight-line and pure. `forward` decides which applies.
//!
//! A leaf takes a header template and writes the header's words, with what varies per packet filled in, to the end of
//! the bytes before the packet. A header's last 64 bytes are eight words; the fields' places in them, counted from the
//! packet, are in each leaf's drawing.

pub mod direct;
pub mod ipip;
pub mod udp;
pub mod vxlan;

use crate::verdict::{DropReason, Front};
use crate::wire::{self, FRAGMENT_MASK, IPV4_LEN};

/// A field of `value`, big-endian, at byte `at` of a word whose first byte is its lowest.
#[inline]
const fn field(value: u16, at: u32) -> u64 {
    (value.swap_bytes() as u64) << (8 * at)
}

/// Two bytes at byte `at` of a word, big-endian.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the upper bytes are other fields"
)]
const fn field_of(word: u64, at: u32) -> u16 {
    ((word >> (8 * at)) as u16).swap_bytes()
}

/// Puts the last 64 bytes of a header before the packet.
#[inline]
fn write(words: &[u64; 8], front: &mut Front) {
    if let Some(last) = front.last_chunk_mut::<64>() {
        store(words, last);
    }
}

/// Stores words, lowest byte first. `bytes` is eight times as long as `words`.
#[inline]
fn store(words: &[u64], bytes: &mut [u8]) {
    for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
}

/// A length field. `Table::new` bounds the pod MTU so that no packet with its headers is longer than 65535 bytes.
#[inline]
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).unwrap_or(u16::MAX)
}

/// Checks the outer IPv4 header of a tunnel packet: plain, whole, right, to us, of this protocol. Returns it with the
/// packet's length, which is not yet compared with the frame's.
#[inline(always)]
fn outer4(packet: &[u8], local: u32, protocol: u8) -> Result<(&[u8; IPV4_LEN], usize), DropReason> {
    let ip = packet
        .first_chunk::<IPV4_LEN>()
        .ok_or(DropReason::OuterTruncated)?;
    plain4(ip)?;
    if !wire::ipv4_checksum_is_right(ip) {
        return Err(DropReason::OuterChecksum);
    }
    if ip[9] != protocol || wire::be32(ip, 16) != local {
        return Err(DropReason::OuterDestination);
    }
    Ok((ip, usize::from(wire::be16(ip, 2))))
}

/// An IPv4 header without options, of no fragment: with either, the XDP program leaves the packet to the kernel.
#[inline]
fn plain4(ip: &[u8; IPV4_LEN]) -> Result<(), DropReason> {
    if ip[0] != 0x45 {
        return Err(DropReason::OuterHeader);
    }
    if wire::be16(ip, 6) & FRAGMENT_MASK != 0 {
        return Err(DropReason::OuterFragment);
    }
    Ok(())
}
