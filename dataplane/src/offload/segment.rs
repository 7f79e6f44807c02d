//! Cutting: one super-packet from the kernel into packets of the path's size.
//!
//! What the kernel's own segmentation would have made (net/ipv4/tcp_offload.c `tcp_gso_segment`, net/ipv4/udp_offload.c
//! `__udp_gso_segment`, net/ipv4/af_inet.c `inet_gso_segment`): each packet has the headers, with its own lengths,
//! sequence number, identification and checksums.

use super::sum::sum;
use super::{Joined, Offload, TCP_CHECKSUM, TCP_LEN, UDP_CHECKSUM, flags};
use crate::wire::{self, IPV4_LEN, IPV6_LEN, PROTOCOL_TCP, PROTOCOL_UDP, UDP_LEN};

/// What has to be done to a packet from the kernel before it can go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Nothing.
    Whole,
    /// Its checksum is to be completed: [`complete_checksum`].
    Checksum {
        /// Where the checksummed part begins.
        start: usize,
        /// Where in the packet the checksum is.
        at: usize,
    },
    /// It is to be cut.
    Cut(Cut),
}

/// How a super-packet is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Where TCP or UDP begins.
    transport: usize,
    /// Where the data begins.
    data: usize,
    /// Where it ends.
    end: usize,
    /// Data in each packet but the last.
    size: usize,
    udp: bool,
    v6: bool,
    /// Whether the first says that the sender's window was reduced.
    reduced: bool,
    /// Sum of the pseudo header without the length.
    pseudo: u32,
}

/// Looks at the first bytes of a packet of `len` bytes, all headers among them, and at what the kernel says of it; nothing
/// if the two do not fit: then it is not what it seems, and must not go.
pub fn task(head: &[u8], len: usize, offload: &Offload) -> Option<Task> {
    let start = usize::from(offload.checksum_start);
    let at = start + usize::from(offload.checksum_offset);
    let Some(joined) = offload.joined else {
        return match offload.needs_checksum {
            false => Some(Task::Whole),
            true => (at + 2 <= len).then_some(Task::Checksum { start, at }),
        };
    };
    let (v6, udp) = match (head.first()? >> 4, joined) {
        (4, Joined::Tcp4) => (false, false),
        (6, Joined::Tcp6) => (true, false),
        (4, Joined::Udp) => (false, true),
        (6, Joined::Udp) => (true, true),
        _ => return None,
    };
    let ip_fits = match v6 {
        false => {
            let ip = head.first_chunk::<IPV4_LEN>()?;
            let protocol = if udp { PROTOCOL_UDP } else { PROTOCOL_TCP };
            ip[9] == protocol
                && start >= IPV4_LEN
                && start == usize::from(ip[0] & 0x0f) * 4
                && len == usize::from(wire::be16(ip, 2))
        }
        // Extension headers are the kernel's affair.
        true => {
            let ip = head.first_chunk::<IPV6_LEN>()?;
            start >= IPV6_LEN && len == IPV6_LEN + usize::from(wire::be16(ip, 4))
        }
    };
    let transport = head.get(start..)?;
    let (data, checksum) = match udp {
        true => (UDP_LEN, UDP_CHECKSUM),
        false => (usize::from(transport.get(12)? >> 4) * 4, TCP_CHECKSUM),
    };
    let size = usize::from(offload.size);
    let fits = ip_fits
        && offload.needs_checksum
        && at == start + checksum
        && (udp || data >= TCP_LEN)
        && data <= transport.len()
        && start + data < len
        && size > 0;
    fits.then(|| {
        // What stands in the checksum's place has the length of the whole in it.
        let pseudo = wire::be16(transport, checksum);
        let length = low16(len - start);
        Task::Cut(Cut {
            transport: start,
            data: start + data,
            end: len,
            size,
            udp,
            v6,
            reduced: offload.reduced,
            pseudo: u32::from(pseudo) + u32::from(!length),
        })
    })
}

/// Completes a checksum that covers everything from `start` on; the pseudo header's sum stands in its place.
///
/// # Panics
/// When the two places are not inside the packet; those of a [`Task`] are.
pub fn complete_checksum(packet: &mut [u8], start: usize, at: usize) {
    let sum = !sum(&packet[start..]);
    // Zero would say that there is none (RFC 768); in TCP both zeros mean the same.
    let sum = if sum == 0 { 0xffff } else { sum };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

impl Cut {
    /// How many packets come of it.
    pub fn count(&self) -> usize {
        (self.end - self.data).div_ceil(self.size)
    }

    /// Length of the longest of them.
    pub fn longest(&self) -> usize {
        self.data + self.size.min(self.end - self.data)
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.count() * self.data + self.end - self.data
    }

    /// Length of the super-packet.
    pub fn whole(&self) -> usize {
        self.end
    }

    /// What the kernel is told of the super-packet, for it to do the cutting.
    pub fn offload(&self) -> Offload {
        Offload {
            needs_checksum: true,
            joined: Some(match (self.udp, self.v6) {
                (true, _) => Joined::Udp,
                (false, false) => Joined::Tcp4,
                (false, true) => Joined::Tcp6,
            }),
            reduced: self.reduced,
            headers: low16(self.data),
            size: low16(self.size),
            checksum_start: low16(self.transport),
            checksum_offset: match self.udp {
                true => low16(UDP_CHECKSUM),
                false => low16(TCP_CHECKSUM),
            },
        }
    }

    /// Writes the packet with number `index` of the super-packet that [`task`] has seen; its length. Nothing when `out`
    /// is too short for it, or there is none of this number.
    #[inline]
    pub fn write(&self, packet: &[u8], index: usize, out: &mut [u8]) -> Option<usize> {
        let begin = self.data + index * self.size;
        let data = packet.get(begin..self.end.min(begin + self.size))?;
        if data.is_empty() {
            return None;
        }
        let len = self.data + data.len();
        let out = out.get_mut(..len)?;
        let (headers, place) = out.split_at_mut(self.data);
        headers.copy_from_slice(packet.get(..self.data)?);
        place.copy_from_slice(data);
        let sum = u32::from(sum(place));
        let is_last = begin + self.size >= self.end;
        let length = self.data - self.transport + data.len();
        let (ip, transport) = headers.split_at_mut(self.transport);
        self.finish_ip(ip, length, index);
        let checksum_at = match self.udp {
            true => {
                transport[4..6].copy_from_slice(&low16(length).to_be_bytes());
                UDP_CHECKSUM
            }
            false => {
                let advanced = u32::try_from(index * self.size).unwrap_or(0);
                let sequence = wire::be32(transport, 4).wrapping_add(advanced);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                if !is_last {
                    transport[13] &= !(flags::FIN | flags::PSH);
                }
                if index > 0 {
                    transport[13] &= !flags::CWR;
                }
                TCP_CHECKSUM
            }
        };
        transport[checksum_at..checksum_at + 2].fill(0);
        let sum = sum + u32::from(wire::sum(transport)) + self.pseudo + u32::from(low16(length));
        let checksum = match !wire::fold(sum) {
            0 if self.udp => 0xffff,
            checksum => checksum,
        };
        transport[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
        Some(len)
    }

    /// Lengths, identification and checksum of the IP header.
    #[inline]
    fn finish_ip(&self, ip: &mut [u8], transport_len: usize, index: usize) {
        if self.v6 {
            let payload = low16(self.transport - IPV6_LEN + transport_len);
            ip[4..6].copy_from_slice(&payload.to_be_bytes());
            return;
        }
        let total = low16(self.transport + transport_len);
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        let identification = wire::be16(ip, 4).wrapping_add(low16(index));
        ip[4..6].copy_from_slice(&identification.to_be_bytes());
        ip[10..12].fill(0);
        let checksum = !wire::sum(ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Lengths and numbers inside a packet of at most 64 KiB.
fn low16(number: usize) -> u16 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "headers count modulo 2^16; lengths are those of packets from the kernel, which fit"
    )]
    let low = number as u16;
    low
}
