//! Super-packets that stay whole: what the kernel must be told to cut one behind its tunnel headers.
//!
//! ```text
//!   virtio-net header ─ Ethernet ─ IP ─ UDP ─ VXLAN ─ Ethernet ─│─ inner IP ─ TCP ─ up to 64 KiB
//!   TUNNEL_LEN          outer, as the first packet has it       │  as the host handed it over
//! ```
//!
//! The kernel gives each packet its lengths, identifications and checksums (net/ipv4/udp_offload.c,
//! `__skb_udp_tunnel_segment`); a NIC that knows how does so in its place.

use super::segment::Cut;
use super::{OFFLOAD_LEN, pseudo_sum};
use crate::wire::{
    self, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, UDP_LEN,
    VXLAN_LEN,
};

/// Length of `struct virtio_net_hdr_v1_hash_tunnel` (include/uapi/linux/virtio_net.h).
pub const TUNNEL_LEN: usize = 24;

/// `VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM`.
const OUTER_CHECKSUM: u8 = 8;
/// `VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4` and `_IPV6`.
const OVER_IPV4: u8 = 0x20;
const OVER_IPV6: u8 = 0x40;

/// From the outer UDP header to the inner IP header.
const TUNNEL: usize = UDP_LEN + VXLAN_LEN + ETHERNET_LEN;
const OUTER4: usize = ETHERNET_LEN + IPV4_LEN + TUNNEL;
const OUTER6: usize = ETHERNET_LEN + IPV6_LEN + TUNNEL;

/// Makes the tunnel headers of a super-packet's first packet those of the whole; what to tell the kernel of it, with all
/// numbers little-endian. Nothing if they are not those of VXLAN without a VLAN tag: then they are as they were.
pub fn describe(outer: &mut [u8], cut: &Cut) -> Option<[u8; TUNNEL_LEN]> {
    let udp_len = TUNNEL + cut.whole();
    let over = if let Ok(headers) = <&mut [u8; OUTER4]>::try_from(&mut *outer) {
        whole4(headers, udp_len)?
    } else {
        whole6(outer.try_into().ok()?, udp_len)?
    };
    let mut offload = cut.offload();
    let behind = length(outer.len());
    offload.headers += behind;
    offload.checksum_start += behind;
    let mut bytes = [0; TUNNEL_LEN];
    bytes[..OFFLOAD_LEN].copy_from_slice(&offload.bytes());
    for field in bytes[2..OFFLOAD_LEN].as_chunks_mut::<2>().0 {
        *field = u16::from_ne_bytes(*field).to_le_bytes();
    }
    bytes[1] |= over;
    if over == OVER_IPV6 {
        bytes[0] |= OUTER_CHECKSUM;
    }
    let udp_at = behind - length(TUNNEL);
    bytes[20..22].copy_from_slice(&udp_at.to_le_bytes());
    bytes[22..24].copy_from_slice(&behind.to_le_bytes());
    Some(bytes)
}

fn whole4(headers: &mut [u8; OUTER4], udp_len: usize) -> Option<u8> {
    let ip = &headers[ETHERNET_LEN..];
    let is_udp = wire::be16(headers, 12) == ETHERTYPE_IPV4 && ip[9] == PROTOCOL_UDP;
    if !is_udp {
        return None;
    }
    let (old, new) = (wire::be16(ip, 2), length(IPV4_LEN + udp_len));
    let checksum = wire::checksum_after(wire::be16(ip, 10), old, new);
    let ip = &mut headers[ETHERNET_LEN..];
    ip[2..4].copy_from_slice(&new.to_be_bytes());
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    ip[IPV4_LEN + 4..IPV4_LEN + 6].copy_from_slice(&length(udp_len).to_be_bytes());
    Some(OVER_IPV4)
}

/// The UDP checksum becomes the pseudo header's sum, as the kernel wants it of a packet that it is to complete.
fn whole6(headers: &mut [u8; OUTER6], udp_len: usize) -> Option<u8> {
    let is_udp =
        wire::be16(headers, 12) == ETHERTYPE_IPV6 && headers[ETHERNET_LEN + 6] == PROTOCOL_UDP;
    if !is_udp {
        return None;
    }
    let (ip, udp) = headers[ETHERNET_LEN..].split_at_mut(IPV6_LEN);
    // The length counts with all of its bits here (RFC 8200 section 8.1).
    let [_, _, high, low] = u32::try_from(udp_len).ok()?.to_be_bytes().map(u32::from);
    let carry = u32::try_from(udp_len >> 16).ok()?;
    let sum = wire::fold(pseudo_sum(ip, PROTOCOL_UDP) + carry + (high << 8 | low));
    ip[4..6].copy_from_slice(&length(udp_len).to_be_bytes());
    udp[4..6].copy_from_slice(&length(udp_len).to_be_bytes());
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    Some(OVER_IPV6)
}

/// A length field. One that does not hold the length says zero, as the kernel's do.
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::segment::{self, Task};
    use super::super::{Joined, Offload};
    use super::*;

    /// An IPv4 super-packet of so many bytes with a TCP header without options.
    fn cut(len: u16) -> Cut {
        let mut head = [0; 40];
        head[0] = 0x45;
        head[2..4].copy_from_slice(&len.to_be_bytes());
        (head[9], head[32]) = (6, 0x50);
        let offload = Offload {
            needs_checksum: true,
            joined: Some(Joined::Tcp4),
            reduced: true,
            headers: 40,
            size: 1410,
            checksum_start: 20,
            checksum_offset: 16,
        };
        match segment::task(&head, len.into(), &offload) {
            Some(Task::Cut(cut)) => cut,
            other => panic!("{other:?}"),
        }
    }

    fn outer(len: usize, ether_type: u16) -> Vec<u8> {
        let mut outer = vec![0; len];
        outer[12..14].copy_from_slice(&ether_type.to_be_bytes());
        let at = if ether_type == ETHERTYPE_IPV6 { 6 } else { 9 };
        outer[ETHERNET_LEN + at] = PROTOCOL_UDP;
        outer
    }

    #[test]
    fn the_kernel_is_told_where_all_is() {
        let mut four = outer(OUTER4, ETHERTYPE_IPV4);
        let told = describe(&mut four, &cut(10_000)).unwrap();
        // Flags, type with ECN; headers, size, start, offset; buffers, hash; outer transport, inner network.
        let expected = [
            1, 0xa1, 104, 0, 0x82, 5, 84, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 34, 0, 64, 0,
        ];
        assert_eq!(told, expected);
        assert_eq!(wire::be16(&four, ETHERNET_LEN + 2), 10_050);
        assert_eq!(wire::be16(&four, ETHERNET_LEN + IPV4_LEN + 4), 10_030);
        let mut six = outer(OUTER6, ETHERTYPE_IPV6);
        let told = describe(&mut six, &cut(65_535)).unwrap();
        assert_eq!(told[..2], [9, 0xc1]);
        assert_eq!(told[20..], [54, 0, 84, 0]);
        // Longer than the fields can say. The pseudo header's sum knows: 65565 is 0x1001d.
        assert_eq!(wire::be16(&six, ETHERNET_LEN + 4), 0);
        let sum = wire::be16(&six, ETHERNET_LEN + IPV6_LEN + 6);
        assert_eq!(sum, 1 + 0x1d + u16::from(PROTOCOL_UDP));
    }

    #[test]
    fn other_headers_are_left_as_they_are() {
        let headers = [
            outer(ETHERNET_LEN + IPV4_LEN, ETHERTYPE_IPV4),
            outer(ETHERNET_LEN + IPV4_LEN + UDP_LEN, ETHERTYPE_IPV4),
            outer(OUTER4, ETHERTYPE_IPV6),
            outer(OUTER6, ETHERTYPE_IPV4),
            outer(OUTER4 + 4, 0x8100),
            vec![0; OUTER4],
            vec![0; OUTER6],
        ];
        for headers in headers {
            let mut changed = headers.clone();
            assert_eq!(describe(&mut changed, &cut(10_000)), None, "{headers:02x?}");
            assert_eq!(changed, headers);
        }
    }
}
