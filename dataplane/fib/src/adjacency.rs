//! Adjacencies: finished outer headers, built once per next hop.
//!
//! A header stands at the *end* of its template, where the inner packet follows: the place of every field, counted
//! from there, is the same with and without a VLAN tag in front.
//!
//! ```text
//!   short   8 words    │ length of the header, if below 64 │ … header │   VXLAN over IPv4, IPIP, UDP, direct
//!   long   16 words    │ length of the header │ 0 0 0 │   … header   │   VXLAN with a tag, VXLAN over IPv6
//!                        word 0                  words 4 to 15
//! ```
//!
//! What varies per packet is zero in a template; [`Adjacency::header`] tells which fields are. Checksum fields hold the
//! ones' complement sum of what does not vary, *not* complemented: a worker adds its fields and complements once.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::lpm::Encap;
use crate::node::{Dscp, Node};

/// Longest header of an adjacency in bytes; a worker leaves as much room before a packet.
pub const HEADER_MAX: usize = 96;
/// Words of a short template: 64 bytes, one cache line.
pub(crate) const SHORT_WORDS: usize = 8;
/// Words of a long template.
pub(crate) const LONG_WORDS: usize = 16;
/// Words before the header of a long template.
pub(crate) const LONG_HEADER_WORD: usize = LONG_WORDS - HEADER_MAX / 8;

const TTL: u8 = 64;
const IPIP: u8 = 4;
const UDP: u8 = 17;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
/// The I bit of a VXLAN header (RFC 7348 section 5).
const VNI_PRESENT: u32 = 0x0800_0000;
/// Flags and offset field of an IPv4 header with "don't fragment" set.
const DONT_FRAGMENT: u16 = 0x4000;

/// The Ethernet header towards a next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ethernet {
    /// MAC of the uplink.
    pub source: [u8; 6],
    /// MAC of the next hop.
    pub destination: [u8; 6],
    /// 802.1Q identifier, if the underlay is a tagged one.
    pub vlan: Option<u16>,
}

/// A finished outer header for one next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adjacency {
    /// The encapsulation that the header belongs to.
    pub encap: Encap,
    bytes: [u8; HEADER_MAX],
    len: usize,
}

impl Adjacency {
    /// VXLAN over IPv4: TTL 64, DF clear, UDP without checksum (RFC 7348 section 5 allows zero over IPv4), the I flag,
    /// inner Ethernet from VTEP to VTEP.
    ///
    /// Per packet: IPv4 length, identification, ECN (and DSCP where it is inherited), checksum; UDP source port, length.
    pub fn vxlan4(node: &Node, ethernet: Ethernet, peer: Ipv4Addr, peer_mac: [u8; 6]) -> Self {
        let encap = match ethernet.vlan {
            None => Encap::Vxlan4,
            Some(_) => Encap::Vxlan4Tagged,
        };
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV4);
        header.ipv4(node, UDP, TTL, 0, peer);
        header.udp(0, node.udp_port);
        header.vxlan(
            node,
            node.v4.map(|local| local.vtep_mac),
            peer_mac,
            ETHERTYPE_IPV4,
        );
        header.finish(encap)
    }

    /// VXLAN over IPv6: hop limit 64, flow label 0, UDP with checksum (RFC 8200 section 8.1), otherwise as
    /// [`Adjacency::vxlan4`].
    ///
    /// Per packet: traffic class, payload length; UDP source port, length and checksum, whose field holds the sum of
    /// addresses, protocol, destination port, VXLAN header and inner Ethernet header.
    pub fn vxlan6(node: &Node, ethernet: Ethernet, peer: Ipv6Addr, peer_mac: [u8; 6]) -> Self {
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV6);
        let addresses = header.ipv6(node, peer);
        let udp = header.len;
        header.udp(0, node.udp_port);
        header.vxlan(
            node,
            node.v6.map(|local| local.vtep_mac),
            peer_mac,
            ETHERTYPE_IPV6,
        );
        let constant = ones_complement_sum(&header.bytes[addresses..addresses + 32])
            .checked_add(u32::from(UDP))
            .and_then(|sum| sum.checked_add(ones_complement_sum(&header.bytes[udp..header.len])));
        let checksum = fold(constant.unwrap_or(0)).to_be_bytes();
        header.bytes[udp + 6..udp + 8].copy_from_slice(&checksum);
        header.finish(Encap::Vxlan6)
    }

    /// IPv4 in IPv4.
    ///
    /// Per packet: length, identification, ECN (and DSCP), DF and TTL (both the inner ones), checksum.
    pub fn ipip(node: &Node, ethernet: Ethernet, peer: Ipv4Addr) -> Self {
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV4);
        header.ipv4(node, IPIP, 0, 0, peer);
        header.finish(Encap::Ipip)
    }

    /// IPv4 as the payload of UDP: DF set and both ports the tunnel's, as the socket of flannel's proxy has it, TTL 64,
    /// UDP without checksum (RFC 768).
    ///
    /// Per packet: IPv4 length, identification, ECN (and DSCP), checksum; UDP length.
    pub fn udp(node: &Node, ethernet: Ethernet, peer: Ipv4Addr) -> Self {
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV4);
        header.ipv4(node, UDP, TTL, DONT_FRAGMENT, peer);
        header.udp(node.udp_port, node.udp_port);
        header.finish(Encap::Udp)
    }

    /// No tunnel, for IPv4: Ethernet alone. Nothing varies.
    pub fn direct4(ethernet: Ethernet) -> Self {
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV4);
        header.finish(Encap::Direct)
    }

    /// No tunnel, for IPv6: Ethernet alone. Nothing varies.
    pub fn direct6(ethernet: Ethernet) -> Self {
        let mut header = Header::default();
        header.ethernet(ethernet, ETHERTYPE_IPV6);
        header.finish(Encap::Direct)
    }

    /// The header's bytes, outer Ethernet first.
    pub fn header(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The template's words, first byte lowest.
    pub(crate) fn words(&self, into: &mut alloc::vec::Vec<u64>) {
        let mut bytes = [0; LONG_WORDS * 8];
        let template = if self.encap.is_long() {
            &mut bytes[..]
        } else {
            &mut bytes[..SHORT_WORDS * 8]
        };
        let end = template.len();
        template[end - self.len..].copy_from_slice(self.header());
        if self.len < end {
            // Above 255 it would not fit; `HEADER_MAX` is less.
            template[0] = self.len.to_le_bytes()[0];
        }
        let words = template.as_chunks::<8>().0;
        into.extend(words.iter().copied().map(u64::from_le_bytes));
    }
}

/// A header in the making.
struct Header {
    bytes: [u8; HEADER_MAX],
    len: usize,
}

impl Default for Header {
    fn default() -> Self {
        Self {
            bytes: [0; HEADER_MAX],
            len: 0,
        }
    }
}

impl Header {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn ethernet(&mut self, ethernet: Ethernet, ether_type: u16) {
        self.put(&ethernet.destination);
        self.put(&ethernet.source);
        if let Some(vlan) = ethernet.vlan {
            self.put(&ETHERTYPE_VLAN.to_be_bytes());
            self.put(&(vlan & 0x0fff).to_be_bytes());
        }
        self.put(&ether_type.to_be_bytes());
    }

    fn ipv4(&mut self, node: &Node, protocol: u8, ttl: u8, flags: u16, peer: Ipv4Addr) {
        let start = self.len;
        let source = node.v4.map_or(Ipv4Addr::UNSPECIFIED, |local| local.address);
        self.put(&[0x45, fixed_dscp(node) << 2, 0, 0, 0, 0]);
        self.put(&flags.to_be_bytes());
        self.put(&[ttl, protocol, 0, 0]);
        self.put(&source.octets());
        self.put(&peer.octets());
        let sum = fold(ones_complement_sum(&self.bytes[start..self.len]));
        self.bytes[start + 10..start + 12].copy_from_slice(&sum.to_be_bytes());
    }

    /// Returns where the addresses begin.
    fn ipv6(&mut self, node: &Node, peer: Ipv6Addr) -> usize {
        let source = node.v6.map_or(Ipv6Addr::UNSPECIFIED, |local| local.address);
        let first = 6 << 28 | u32::from(fixed_dscp(node)) << 22;
        self.put(&first.to_be_bytes());
        self.put(&[0, 0, UDP, TTL]);
        let addresses = self.len;
        self.put(&source.octets());
        self.put(&peer.octets());
        addresses
    }

    fn udp(&mut self, source: u16, destination: u16) {
        self.put(&source.to_be_bytes());
        self.put(&destination.to_be_bytes());
        self.put(&[0; 4]);
    }

    fn vxlan(&mut self, node: &Node, own_mac: Option<[u8; 6]>, peer_mac: [u8; 6], ether_type: u16) {
        self.put(&VNI_PRESENT.to_be_bytes());
        self.put(&(node.vni << 8).to_be_bytes());
        self.put(&peer_mac);
        self.put(&own_mac.unwrap_or_default());
        self.put(&ether_type.to_be_bytes());
    }

    fn finish(self, encap: Encap) -> Adjacency {
        Adjacency {
            encap,
            bytes: self.bytes,
            len: self.len,
        }
    }
}

fn fixed_dscp(node: &Node) -> u8 {
    match node.dscp {
        Dscp::Fixed(codepoint) => codepoint & 0x3f,
        Dscp::Inherit => 0,
    }
}

/// Sum of the 16-bit words of an even number of bytes (RFC 1071), neither folded nor complemented.
fn ones_complement_sum(bytes: &[u8]) -> u32 {
    let words = bytes.as_chunks::<2>().0;
    words
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    let folded = sum as u16;
    folded
}
