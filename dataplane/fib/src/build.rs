//! Compiles routes, adjacencies and peers into an image: a pure function, the same input gives the same words.
//!
//! ```text
//!   word 0   magic
//!        1   ABI version | header words << 32
//!        2   words of the whole image
//!        3   checksum of all words but this one
//!        4   local address | UDP port << 32 | pod MTU << 48
//!        5   own VTEP MAC (first byte lowest)
//!        6   VNI | underlay interface index << 32
//!        7   own subnet | its prefix length << 32
//!        8   flow seed
//!        9   IPv6: bits that all routes share (count)
//!    10,11   IPv6: those bits, low and high word
//!   16..32   section table: offset in words | length in words << 32, in the order of `Section`
//!   32..     sections, each starting on a cache line (8 words)
//! ```

use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

use crate::ABI_VERSION;
use crate::checksum::checksum_image;
use crate::lpm::{AdjacencyId, Encap, Hop, Prefix, Tables, mask};
use crate::peers::{self, Peer4};

/// First word of an image: "RIPSIMG1".
pub(crate) const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"RIPSIMG1");
pub(crate) const HEADER_WORDS: usize = 32;
pub(crate) const CHECKSUM_WORD: usize = 3;
pub(crate) const SECTION_TABLE: usize = 16;
/// Words of a header template: 64 bytes, one cache line.
pub(crate) const TEMPLATE_WORDS: usize = 8;
/// Words of a lease record.
pub(crate) const LEASE_WORDS: usize = 12;
const NAME_BYTES: usize = 32;

/// Address family of a lease record: IPv4.
pub const FAMILY_IPV4: u8 = 4;
/// Address family of a lease record: IPv6.
pub const FAMILY_IPV6: u8 = 6;

/// The parts of an image after its header, in the order of the section table.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Section {
    Root4 = 0,
    Chunks4 = 1,
    Root6 = 2,
    Chunks6 = 3,
    Templates = 4,
    Peers4 = 5,
    Leases = 6,
}

pub(crate) const SECTIONS: usize = 7;

/// What an image says about the node that forwards by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Address that tunnel packets to this node carry as outer destination.
    pub local: Ipv4Addr,
    /// UDP destination port of the tunnel.
    pub udp_port: u16,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// MAC of this node's VTEP: inner destination of what it receives, inner source of what it sends.
    pub vtep_mac: [u8; 6],
    /// This node's own lease: network address and prefix length.
    pub subnet: (Ipv4Addr, u8),
    /// Largest inner packet in bytes.
    pub pod_mtu: u16,
    /// Interface index of the underlay NIC, for people who read the table.
    pub underlay_ifindex: u32,
    /// Seeds the hash that picks UDP source ports, so that flows keep their port across restarts.
    pub flow_seed: u64,
}

/// A finished outer header for one next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adjacency {
    /// The encapsulation that the header belongs to.
    pub encap: Encap,
    /// The header's bytes. For [`Encap::Vxlan4`]: Ethernet 14, IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14. Total
    /// length, identification, UDP source port and UDP length are zero, and so are the ECN bits; the IPv4 checksum
    /// field holds the *complement-free* 16-bit ones' complement sum of the rest of the IPv4 header, so that a worker
    /// adds its per-packet fields and complements once. See [`Adjacency::vxlan4`].
    pub header: [u8; 64],
}

impl Adjacency {
    /// Builds the VXLAN header template: outer Ethernet from `source_mac` to `next_hop_mac`, IPv4 with TTL 64 and DF
    /// clear, UDP without checksum (RFC 7348 section 5 allows zero over IPv4), VXLAN with the I flag, inner Ethernet
    /// from VTEP to VTEP.
    pub fn vxlan4(
        node: &Node,
        source_mac: [u8; 6],
        next_hop_mac: [u8; 6],
        peer: Ipv4Addr,
        peer_mac: [u8; 6],
    ) -> Self {
        let mut header = [0u8; 64];
        header[0..6].copy_from_slice(&next_hop_mac);
        header[6..12].copy_from_slice(&source_mac);
        header[12..14].copy_from_slice(&[0x08, 0x00]);
        header[14] = 0x45;
        header[22] = 64;
        header[23] = 17;
        header[26..30].copy_from_slice(&node.local.octets());
        header[30..34].copy_from_slice(&peer.octets());
        let sum = ones_complement_sum(&header[14..34]);
        header[24..26].copy_from_slice(&sum.to_be_bytes());
        header[36..38].copy_from_slice(&node.udp_port.to_be_bytes());
        header[42] = 0x08;
        header[46..50].copy_from_slice(&(node.vni << 8).to_be_bytes());
        header[50..56].copy_from_slice(&peer_mac);
        header[56..62].copy_from_slice(&node.vtep_mac);
        header[62..64].copy_from_slice(&[0x08, 0x00]);
        Self {
            encap: Encap::Vxlan4,
            header,
        }
    }
}

/// 16-bit ones' complement sum (RFC 1071) of an even number of bytes, not complemented.
fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    let folded = sum as u16;
    folded
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To this node's own pods.
    Local,
    /// Through an adjacency of the same image.
    Via(AdjacencyId),
    /// To a node whose next hop is not known yet.
    Unresolved,
}

/// One lease, for people: the workers do not read these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRecord {
    /// Name of the node, at most 31 bytes of it; the rest is zero.
    pub name: [u8; NAME_BYTES],
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    pub family: u8,
    /// Network address of the subnet; an IPv4 address in the low 32 bits.
    pub subnet: u128,
    /// Prefix length of the subnet.
    pub prefix_len: u8,
    /// Outer address of the node, in the form of `subnet`.
    pub public_ip: u128,
    /// MAC of the node's VTEP.
    pub vtep_mac: [u8; 6],
    /// MAC of the underlay next hop towards the node; zero while not resolved.
    pub next_hop_mac: [u8; 6],
    /// Whether packets to the subnet can be sent, that is the next hop is known.
    pub resolved: bool,
    /// Whether this is the node's own lease.
    pub local: bool,
}

impl LeaseRecord {
    /// Cuts a node name to what a record holds, at a character boundary.
    pub fn pack_name(name: &str) -> [u8; NAME_BYTES] {
        let mut end = name.len().min(NAME_BYTES - 1);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        let mut packed = [0; NAME_BYTES];
        packed[..end].copy_from_slice(&name.as_bytes()[..end]);
        packed
    }

    /// The name as text; bytes that are not UTF-8 end it.
    pub fn node_name(&self) -> &str {
        let end = self
            .name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(NAME_BYTES);
        let name = &self.name[..end];
        match core::str::from_utf8(name) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&name[..error.valid_up_to()]).unwrap_or_default(),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "128-bit values are kept as two words"
    )]
    pub(crate) fn encode(&self, words: &mut Vec<u64>) {
        for part in self.name.chunks_exact(8) {
            words.push(
                part.iter()
                    .rev()
                    .fold(0, |word, byte| (word << 8) | u64::from(*byte)),
            );
        }
        words.extend([self.subnet as u64, (self.subnet >> 64) as u64]);
        words.extend([self.public_ip as u64, (self.public_ip >> 64) as u64]);
        let flags = u64::from(self.resolved) | (u64::from(self.local) << 1);
        words.push(u64::from(self.prefix_len) | (u64::from(self.family) << 8) | (flags << 16));
        words.extend([pack_mac(self.vtep_mac), pack_mac(self.next_hop_mac), 0]);
    }

    pub(crate) fn decode(words: &[u64; LEASE_WORDS]) -> Self {
        let mut name = [0; NAME_BYTES];
        for (part, word) in name.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        let wide = |low: u64, high: u64| u128::from(low) | (u128::from(high) << 64);
        let [prefix_len, family, flags, ..] = words[8].to_le_bytes();
        Self {
            name,
            family,
            subnet: wide(words[4], words[5]),
            prefix_len,
            public_ip: wide(words[6], words[7]),
            vtep_mac: unpack_mac(words[9]),
            next_hop_mac: unpack_mac(words[10]),
            resolved: flags & 1 != 0,
            local: flags & 2 != 0,
        }
    }
}

pub(crate) fn pack_mac(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

pub(crate) fn unpack_mac(word: u64) -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = word.to_le_bytes();
    [a, b, c, d, e, f]
}

/// Why an image could not be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildError {
    /// A prefix is longer than its address family allows.
    PrefixLength {
        /// The length given.
        len: u8,
        /// The longest allowed: 32 or 128.
        max: u8,
    },
    /// A prefix has bits set behind its length.
    HostBits {
        /// The address, IPv4 in the low 32 bits.
        addr: u128,
        /// The prefix length.
        len: u8,
    },
    /// A route names an adjacency that was not added.
    UnknownAdjacency(AdjacencyId),
    /// More adjacencies than a route can name.
    TooManyAdjacencies(usize),
    /// The VNI does not fit 24 bits.
    Vni(u32),
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PrefixLength { len, max } => {
                write!(f, "prefix length {len} is longer than {max}")
            }
            Self::HostBits { addr, len } => write!(
                f,
                "address {addr:#x} has bits set behind its prefix of {len}"
            ),
            Self::UnknownAdjacency(id) => {
                write!(f, "a route names adjacency {}, which was not added", id.0)
            }
            Self::TooManyAdjacencies(count) => {
                write!(
                    f,
                    "{count} adjacencies are more than the {} that a table holds",
                    AdjacencyId::MAX.0
                )
            }
            Self::Vni(vni) => write!(f, "VNI {vni} does not fit 24 bits"),
        }
    }
}

impl core::error::Error for BuildError {}

/// Collects the parts of an image; [`ImageBuilder::build`] lays them out.
#[derive(Debug)]
pub struct ImageBuilder {
    node: Node,
    adjacencies: Vec<Adjacency>,
    routes4: Vec<(Ipv4Addr, u8, Route)>,
    routes6: Vec<(u128, u8, Route)>,
    peers4: Vec<(Ipv4Addr, Ipv4Addr, u8)>,
    leases: Vec<LeaseRecord>,
}

impl ImageBuilder {
    /// Starts an image for a node.
    pub fn new(node: Node) -> Self {
        let (adjacencies, routes4, routes6, peers4, leases) = Default::default();
        Self {
            node,
            adjacencies,
            routes4,
            routes6,
            peers4,
            leases,
        }
    }

    /// Adds an adjacency and returns its index for [`Route::Via`].
    pub fn adjacency(&mut self, adjacency: Adjacency) -> AdjacencyId {
        let index = u32::try_from(self.adjacencies.len()).unwrap_or(u32::MAX);
        self.adjacencies.push(adjacency);
        AdjacencyId(index)
    }

    /// Adds an IPv4 route. Of two routes with the same prefix the later wins.
    pub fn route4(&mut self, addr: Ipv4Addr, len: u8, route: Route) {
        self.routes4.push((addr, len, route));
    }

    /// Adds an IPv6 route, the address as a number.
    pub fn route6(&mut self, addr: u128, len: u8, route: Route) {
        self.routes6.push((addr, len, route));
    }

    /// Lets the node with outer address `outer` send inner packets with sources in `prefix`/`len`.
    pub fn peer4(&mut self, outer: Ipv4Addr, prefix: Ipv4Addr, len: u8) {
        self.peers4.push((outer, prefix, len));
    }

    /// Adds a lease record.
    pub fn lease(&mut self, lease: LeaseRecord) {
        self.leases.push(lease);
    }

    /// Lays the image out.
    ///
    /// # Errors
    /// When a prefix is impossible, a route names an unknown adjacency, or a number does not fit its field.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "128-bit values are kept as two words"
    )]
    pub fn build(&self) -> Result<Vec<u64>, BuildError> {
        if self.node.vni >> 24 != 0 {
            return Err(BuildError::Vni(self.node.vni));
        }
        if self.adjacencies.len() > AdjacencyId::MAX.0 as usize {
            return Err(BuildError::TooManyAdjacencies(self.adjacencies.len()));
        }
        let tables4 = Tables::build(&mut self.prefixes4()?, 0);
        let mut prefixes6 = self.prefixes6()?;
        let base_bits = shared_bits(&prefixes6);
        let tables6 = Tables::build(&mut prefixes6, base_bits);

        let mut image = alloc::vec![0u64; HEADER_WORDS];
        section(&mut image, Section::Root4, |image| {
            image.extend(pairs(&tables4.root));
        });
        section(&mut image, Section::Chunks4, |image| {
            image.extend(pairs(&tables4.chunks));
        });
        section(&mut image, Section::Root6, |image| {
            image.extend(pairs(&tables6.root));
        });
        section(&mut image, Section::Chunks6, |image| {
            image.extend(pairs(&tables6.chunks));
        });
        section(&mut image, Section::Templates, |image| {
            for adjacency in &self.adjacencies {
                let words = adjacency.header.chunks_exact(8);
                image.extend(words.map(|part| {
                    part.iter()
                        .rev()
                        .fold(0, |word, byte| (word << 8) | u64::from(*byte))
                }));
            }
        });
        let peers = self.peers4()?;
        section(&mut image, Section::Peers4, |image| {
            image.extend(peers::build4(&peers));
        });
        section(&mut image, Section::Leases, |image| {
            self.leases.iter().for_each(|lease| lease.encode(image));
        });

        let node = &self.node;
        image[0] = IMAGE_MAGIC;
        image[1] = u64::from(ABI_VERSION) | ((HEADER_WORDS as u64) << 32);
        image[2] = image.len() as u64;
        image[4] = u64::from(u32::from(node.local))
            | (u64::from(node.udp_port) << 32)
            | (u64::from(node.pod_mtu) << 48);
        image[5] = pack_mac(node.vtep_mac);
        image[6] = u64::from(node.vni) | (u64::from(node.underlay_ifindex) << 32);
        image[7] = u64::from(u32::from(node.subnet.0)) | (u64::from(node.subnet.1) << 32);
        image[8] = node.flow_seed;
        image[9] = u64::from(tables6.base_bits);
        image[10] = tables6.base as u64;
        image[11] = (tables6.base >> 64) as u64;
        image[CHECKSUM_WORD] = checksum_image(&image, CHECKSUM_WORD);
        Ok(image)
    }

    fn leaf(&self, route: Route) -> Result<u32, BuildError> {
        Ok(match route {
            Route::Local => Hop::Local.leaf(),
            Route::Unresolved => Hop::Unresolved.leaf(),
            Route::Via(id) => {
                let adjacency = self
                    .adjacencies
                    .get(id.0 as usize)
                    .ok_or(BuildError::UnknownAdjacency(id))?;
                Hop::Via(adjacency.encap, id).leaf()
            }
        })
    }

    fn prefixes4(&self) -> Result<Vec<Prefix>, BuildError> {
        let prefix = |(addr, len, route): &(Ipv4Addr, u8, Route)| {
            let addr = u128::from(u32::from(*addr));
            check_prefix(addr << 96, addr, *len, 32)?;
            Ok(Prefix {
                addr: addr << 96,
                len: u32::from(*len),
                leaf: self.leaf(*route)?,
            })
        };
        self.routes4.iter().map(prefix).collect()
    }

    fn prefixes6(&self) -> Result<Vec<Prefix>, BuildError> {
        let prefix = |(addr, len, route): &(u128, u8, Route)| {
            check_prefix(*addr, *addr, *len, 128)?;
            Ok(Prefix {
                addr: *addr,
                len: u32::from(*len),
                leaf: self.leaf(*route)?,
            })
        };
        self.routes6.iter().map(prefix).collect()
    }

    fn peers4(&self) -> Result<Vec<Peer4>, BuildError> {
        let peer = |(outer, prefix, len): &(Ipv4Addr, Ipv4Addr, u8)| {
            let addr = u128::from(u32::from(*prefix));
            check_prefix(addr << 96, addr, *len, 32)?;
            let mask = (mask(u32::from(*len)) >> 96) as u32;
            Ok(Peer4 {
                outer: u32::from(*outer),
                prefix: u32::from(*prefix),
                mask,
            })
        };
        let mut peers: Vec<Peer4> = self.peers4.iter().map(peer).collect::<Result<_, _>>()?;
        peers.sort_unstable();
        peers.dedup();
        Ok(peers)
    }
}

fn check_prefix(aligned: u128, addr: u128, len: u8, max: u8) -> Result<(), BuildError> {
    if len > max {
        return Err(BuildError::PrefixLength { len, max });
    }
    if aligned & !mask(u32::from(len)) != 0 {
        return Err(BuildError::HostBits { addr, len });
    }
    Ok(())
}

/// Leading bits that all IPv6 routes have in common, at most 112 so that a root of 16 bits fits behind them.
fn shared_bits(prefixes: &[Prefix]) -> u32 {
    let Some(first) = prefixes.first() else {
        return 0;
    };
    let shared = prefixes
        .iter()
        .map(|prefix| prefix.len.min((prefix.addr ^ first.addr).leading_zeros()))
        .min();
    shared.unwrap_or(0).min(112) & !7
}

fn pairs(entries: &[u32]) -> impl Iterator<Item = u64> + '_ {
    entries
        .chunks_exact(2)
        .map(|pair| u64::from(pair[0]) | (u64::from(pair[1]) << 32))
}

/// Appends a section on a cache line of its own and enters it into the section table.
fn section(image: &mut Vec<u64>, which: Section, fill: impl FnOnce(&mut Vec<u64>)) {
    image.resize(image.len().next_multiple_of(8), 0);
    let start = image.len();
    fill(image);
    image[SECTION_TABLE + which as usize] = (start as u64) | (((image.len() - start) as u64) << 32);
}
