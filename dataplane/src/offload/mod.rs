//! Super-packets at the host door: what the kernel hands over uncut is cut here, what arrives cut is joined for it.
//!
//! The kernel's own price for a packet is paid once per super-packet of up to 64 KiB, instead of once per MTU. The
//! tunnel between knows nothing of it: each packet on the wire is whole and has its checksum.
//!
//! Pure: bytes in, bytes out.

pub mod coalesce;
pub mod segment;
mod sum;
pub mod tunnel;

use crate::wire;

/// `struct virtio_net_hdr` without the merged-buffers field (include/uapi/linux/virtio_net.h), in the host's byte
/// order, as a TUN device has it unless told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// The checksum is the sender's to complete: what stands there is the pseudo header's sum.
    pub needs_checksum: bool,
    /// The packet is one of several made one, and of which kind.
    pub joined: Option<Joined>,
    /// The first of them says that the sender's window was reduced (RFC 3168 section 6.1.2).
    pub reduced: bool,
    /// Bytes of headers before the data. The kernel takes it for a hint.
    pub headers: u16,
    /// Bytes of data in each packet but the last.
    pub size: u16,
    /// Where the checksummed part begins.
    pub checksum_start: u16,
    /// Where in that part the checksum is.
    pub checksum_offset: u16,
}

/// Kinds of super-packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP, each packet a datagram.
    Udp,
}

/// Length of the header.
pub const OFFLOAD_LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

impl Offload {
    /// Reads the header; nothing if it says what this has no name for.
    pub fn read(bytes: &[u8; OFFLOAD_LEN]) -> Option<Self> {
        let joined = match bytes[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(Joined::Tcp4),
            GSO_TCPV6 => Some(Joined::Tcp6),
            GSO_UDP_L4 => Some(Joined::Udp),
            _ => return None,
        };
        Some(Self {
            needs_checksum: bytes[0] & NEEDS_CSUM != 0,
            joined,
            reduced: bytes[1] & GSO_ECN != 0,
            headers: wire::ne16(bytes, 2),
            size: wire::ne16(bytes, 4),
            checksum_start: wire::ne16(bytes, 6),
            checksum_offset: wire::ne16(bytes, 8),
        })
    }

    /// The header's bytes.
    pub fn bytes(&self) -> [u8; OFFLOAD_LEN] {
        let kind = match self.joined {
            None => GSO_NONE,
            Some(Joined::Tcp4) => GSO_TCPV4,
            Some(Joined::Tcp6) => GSO_TCPV6,
            Some(Joined::Udp) => GSO_UDP_L4,
        };
        let mut bytes = [0; OFFLOAD_LEN];
        bytes[0] = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        bytes[1] = kind | if self.reduced { GSO_ECN } else { 0 };
        let fields = [
            self.headers,
            self.size,
            self.checksum_start,
            self.checksum_offset,
        ];
        for (place, field) in bytes[2..].as_chunks_mut::<2>().0.iter_mut().zip(fields) {
            *place = field.to_ne_bytes();
        }
        bytes
    }
}

/// TCP flags, in the second octet after the data offset (RFC 9293 section 3.1).
pub(crate) mod flags {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const ECE: u8 = 0x40;
    pub(crate) const CWR: u8 = 0x80;
}

/// Length of a TCP header without options.
pub(crate) const TCP_LEN: usize = 20;
/// Where a TCP header has its checksum.
pub(crate) const TCP_CHECKSUM: usize = 16;
/// Where a UDP header has its checksum.
pub(crate) const UDP_CHECKSUM: usize = 6;

/// Sum of the pseudo header of a packet without its length: addresses and protocol (RFC 9293 section 3.1, RFC 8200
/// section 8.1), folded.
pub(crate) fn pseudo_sum(ip: &[u8], protocol: u8) -> u32 {
    let addresses = match ip[0] >> 4 {
        4 => &ip[12..20],
        _ => &ip[8..40],
    };
    u32::from(wire::sum(addresses)) + u32::from(protocol)
}
