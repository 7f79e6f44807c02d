//! Compiles routes, adjacencies and peers into an image: a pure function, the same input gives the same words.
//!
//! ```text
//!   word 0   magic
//!        1   ABI version | header words << 32
//!        2   words of the whole image
//!        3   checksum of all words but this one
//!        4   backend | DSCP << 16 | families, direct, inherited DSCP << 24 | UDP port << 32
//!        5   VNI
//!        6   flow seed
//!        7   IPv6: bits that all routes share (count)
//!     8, 9   IPv6: those bits, low and high word
//!   16..26   section table: offset in words | length in words << 32, in the order of `Section`
//!   32..36   IPv4: address | subnet << 32; network; prefix lengths, pod MTU << 16; VTEP MAC (first byte lowest)
//!   40..48   IPv6: address, subnet, network, low half first; prefix lengths, pod MTU << 16; VTEP MAC
//!   48..64   NICs: interface index | uplink << 32 | VLAN << 48
//!   64..     sections, each starting on a cache line (8 words)
//! ```

use alloc::vec::Vec;
use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

use crate::ABI_VERSION;
use crate::adjacency::Adjacency;
use crate::checksum::checksum_image;
use crate::lpm::{AdjacencyId, Hop, PathsId, Prefix, Tables, mask};
use crate::node::{Dscp, Node, UPLINKS, halves, whole};
use crate::peers::{self, Peer4, Peer6};

/// First word of an image: "RIPSIMG1".
pub(crate) const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"RIPSIMG1");
pub(crate) const HEADER_WORDS: usize = 64;
pub(crate) const CHECKSUM_WORD: usize = 3;
pub(crate) const SECTION_TABLE: usize = 16;
/// Word of the number of bits that all IPv6 routes share; behind it the bits.
pub(crate) const BASE6_WORD: usize = 7;
/// Paths that a choice can have through one uplink. Divisible by the usual numbers of next hops, so that these get
/// equal shares.
pub const PATHS_PER_UPLINK: usize = 12;
/// Words of a choice of paths: a leaf for each place of each uplink, two to a word.
pub(crate) const PATHS_WORDS: usize = UPLINKS * PATHS_PER_UPLINK / 2;
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
    LongTemplates = 5,
    Paths = 6,
    Peers4 = 7,
    Peers6 = 8,
    Leases = 9,
}

pub(crate) const SECTIONS: usize = 10;

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To this node's own pods.
    Local,
    /// Through an adjacency of the same image.
    Via(AdjacencyId),
    /// Through one of several adjacencies of the same image, by flow.
    Paths(PathsId),
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
    /// Whether packets to the subnet are sent without a tunnel.
    pub direct: bool,
    /// How many paths lead there.
    pub paths: u8,
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

    pub(crate) fn encode(&self, words: &mut Vec<u64>) {
        for part in self.name.chunks_exact(8) {
            words.push(
                part.iter()
                    .rev()
                    .fold(0, |word, byte| (word << 8) | u64::from(*byte)),
            );
        }
        words.extend(halves(self.subnet));
        words.extend(halves(self.public_ip));
        let flags =
            u8::from(self.resolved) | u8::from(self.local) << 1 | u8::from(self.direct) << 2;
        words.push(u64::from_le_bytes([
            self.prefix_len,
            self.family,
            flags,
            self.paths,
            0,
            0,
            0,
            0,
        ]));
        words.extend([pack_mac(self.vtep_mac), pack_mac(self.next_hop_mac), 0]);
    }

    pub(crate) fn decode(words: &[u64; LEASE_WORDS]) -> Self {
        let mut name = [0; NAME_BYTES];
        for (part, word) in name.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        let [prefix_len, family, flags, paths, ..] = words[8].to_le_bytes();
        Self {
            name,
            family,
            subnet: whole([words[4], words[5]]),
            prefix_len,
            public_ip: whole([words[6], words[7]]),
            vtep_mac: unpack_mac(words[9]),
            next_hop_mac: unpack_mac(words[10]),
            resolved: flags & 1 != 0,
            local: flags & 2 != 0,
            direct: flags & 4 != 0,
            paths,
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
    /// A route names a choice of paths that was not added.
    UnknownPaths(PathsId),
    /// An uplink's number is too large.
    Uplink(u8),
    /// A choice has more paths through one uplink than there are places.
    TooManyPaths(usize),
    /// The DSCP does not fit 6 bits.
    Dscp(u8),
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
            Self::UnknownPaths(id) => {
                write!(f, "a route names the paths {}, which were not added", id.0)
            }
            Self::Uplink(uplink) => write!(
                f,
                "uplink {uplink} is one too many, the numbers are below {UPLINKS}"
            ),
            Self::TooManyPaths(count) => write!(
                f,
                "{count} paths through one uplink are more than {PATHS_PER_UPLINK}"
            ),
            Self::Dscp(codepoint) => write!(f, "DSCP {codepoint} does not fit 6 bits"),
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
    routes6: Vec<(Ipv6Addr, u8, Route)>,
    paths: Vec<Vec<(u8, AdjacencyId)>>,
    peers4: Vec<(Ipv4Addr, Ipv4Addr, u8)>,
    peers6: Vec<(Ipv6Addr, Ipv6Addr, u8)>,
    leases: Vec<LeaseRecord>,
}

impl ImageBuilder {
    /// Starts an image for a node.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            adjacencies: Vec::new(),
            routes4: Vec::new(),
            routes6: Vec::new(),
            paths: Vec::new(),
            peers4: Vec::new(),
            peers6: Vec::new(),
            leases: Vec::new(),
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

    /// Adds an IPv6 route; as [`ImageBuilder::route4`].
    pub fn route6(&mut self, addr: Ipv6Addr, len: u8, route: Route) {
        self.routes6.push((addr, len, route));
    }

    /// Adds a choice of paths, each with the uplink that it leaves by, and returns its index for [`Route::Paths`]. A
    /// flow stays on one of those of its worker's uplink; one that is named twice gets twice the flows.
    pub fn paths(&mut self, paths: &[(u8, AdjacencyId)]) -> PathsId {
        let index = u32::try_from(self.paths.len()).unwrap_or(u32::MAX);
        self.paths.push(paths.to_vec());
        PathsId(index)
    }

    /// Lets the node with outer address `outer` send inner packets with sources in `prefix`/`len`.
    pub fn peer4(&mut self, outer: Ipv4Addr, prefix: Ipv4Addr, len: u8) {
        self.peers4.push((outer, prefix, len));
    }

    /// As [`ImageBuilder::peer4`].
    pub fn peer6(&mut self, outer: Ipv6Addr, prefix: Ipv6Addr, len: u8) {
        self.peers6.push((outer, prefix, len));
    }

    /// Adds a lease record.
    pub fn lease(&mut self, lease: LeaseRecord) {
        self.leases.push(lease);
    }

    /// Lays the image out.
    ///
    /// # Errors
    /// When a prefix is impossible, a route names an unknown adjacency, or a number does not fit its field.
    pub fn build(&self) -> Result<Vec<u64>, BuildError> {
        self.check_node()?;
        let leaves = self.adjacency_leaves()?;
        let tables4 = Tables::build(&mut self.prefixes4(&leaves)?, 0);
        let mut prefixes6 = self.prefixes6(&leaves)?;
        let base_bits = shared_bits(&prefixes6);
        let tables6 = Tables::build(&mut prefixes6, base_bits);
        let paths = self.path_entries(&leaves)?;
        let (peers4, peers6) = (self.peers4()?, self.peers6()?);

        let mut image = alloc::vec![0u64; HEADER_WORDS];
        let tables = [
            (Section::Root4, &tables4.root),
            (Section::Chunks4, &tables4.chunks),
            (Section::Root6, &tables6.root),
            (Section::Chunks6, &tables6.chunks),
        ];
        for (which, entries) in tables {
            section(&mut image, which, |image| image.extend(pairs(entries)));
        }
        for (which, long) in [(Section::Templates, false), (Section::LongTemplates, true)] {
            let of_kind = self.adjacencies.iter();
            let of_kind = of_kind.filter(|adjacency| adjacency.encap.is_long() == long);
            section(&mut image, which, |image| {
                of_kind.for_each(|adjacency| adjacency.words(image));
            });
        }
        section(&mut image, Section::Paths, |image| {
            image.extend(pairs(&paths));
        });
        section(&mut image, Section::Peers4, |image| {
            image.extend(peers::build4(&peers4));
        });
        section(&mut image, Section::Peers6, |image| {
            image.extend(peers::build6(&peers6));
        });
        section(&mut image, Section::Leases, |image| {
            self.leases.iter().for_each(|lease| lease.encode(image));
        });

        image[0] = IMAGE_MAGIC;
        image[1] = u64::from(ABI_VERSION) | ((HEADER_WORDS as u64) << 32);
        image[2] = image.len() as u64;
        self.node.encode(&mut image);
        image[BASE6_WORD] = u64::from(tables6.base_bits);
        image[BASE6_WORD + 1..BASE6_WORD + 3].copy_from_slice(&halves(tables6.base));
        image[CHECKSUM_WORD] = checksum_image(&image, CHECKSUM_WORD);
        Ok(image)
    }

    fn check_node(&self) -> Result<(), BuildError> {
        let node = &self.node;
        if node.vni >> 24 != 0 {
            return Err(BuildError::Vni(node.vni));
        }
        if let Dscp::Fixed(codepoint) = node.dscp
            && codepoint > 0x3f
        {
            return Err(BuildError::Dscp(codepoint));
        }
        let mut uplinks = node.nics.iter().map(|nic| nic.uplink);
        if let Some(uplink) = uplinks.find(|uplink| usize::from(*uplink) >= UPLINKS) {
            return Err(BuildError::Uplink(uplink));
        }
        let lengths4 = node
            .v4
            .map(|local| (local.subnet.1.max(local.network.1), 32));
        let lengths6 = node
            .v6
            .map(|local| (local.subnet.1.max(local.network.1), 128));
        for (len, max) in [lengths4, lengths6].into_iter().flatten() {
            if len > max {
                return Err(BuildError::PrefixLength { len, max });
            }
        }
        Ok(())
    }

    /// The leaf of each adjacency: its index is counted among those with templates of its length.
    fn adjacency_leaves(&self) -> Result<Vec<u32>, BuildError> {
        if self.adjacencies.len() > AdjacencyId::MAX.0 as usize {
            return Err(BuildError::TooManyAdjacencies(self.adjacencies.len()));
        }
        let mut next = [0u32; 2];
        let leaf = |adjacency: &Adjacency| {
            let index = &mut next[usize::from(adjacency.encap.is_long())];
            let leaf = Hop::Via(adjacency.encap, AdjacencyId(*index)).leaf();
            *index += 1;
            leaf
        };
        Ok(self.adjacencies.iter().map(leaf).collect())
    }

    /// The entries of all choices of paths: of each uplink, its paths in turn until the places are full.
    fn path_entries(&self, leaves: &[u32]) -> Result<Vec<u32>, BuildError> {
        let mut entries = Vec::new();
        for choice in &self.paths {
            if let Some((uplink, _)) = choice
                .iter()
                .find(|(uplink, _)| usize::from(*uplink) >= UPLINKS)
            {
                return Err(BuildError::Uplink(*uplink));
            }
            for uplink in 0..UPLINKS {
                let of_uplink: Vec<u32> = choice
                    .iter()
                    .filter(|(of, _)| usize::from(*of) == uplink)
                    .map(|(_, id)| adjacency_leaf(leaves, *id))
                    .collect::<Result<_, _>>()?;
                if of_uplink.len() > PATHS_PER_UPLINK {
                    return Err(BuildError::TooManyPaths(of_uplink.len()));
                }
                let places = of_uplink.iter().copied().cycle();
                let none = core::iter::repeat(Hop::Unresolved.leaf());
                entries.extend(places.chain(none).take(PATHS_PER_UPLINK));
            }
        }
        Ok(entries)
    }

    fn leaf(&self, leaves: &[u32], route: Route) -> Result<u32, BuildError> {
        match route {
            Route::Local => Ok(Hop::Local.leaf()),
            Route::Unresolved => Ok(Hop::Unresolved.leaf()),
            Route::Via(id) => adjacency_leaf(leaves, id),
            Route::Paths(id) if (id.0 as usize) < self.paths.len() => Ok(Hop::Paths(id).leaf()),
            Route::Paths(id) => Err(BuildError::UnknownPaths(id)),
        }
    }

    fn prefixes4(&self, leaves: &[u32]) -> Result<Vec<Prefix>, BuildError> {
        let prefix = |(addr, len, route): &(Ipv4Addr, u8, Route)| {
            Ok(Prefix {
                addr: aligned4(*addr, *len)?,
                len: u32::from(*len),
                leaf: self.leaf(leaves, *route)?,
            })
        };
        self.routes4.iter().map(prefix).collect()
    }

    fn prefixes6(&self, leaves: &[u32]) -> Result<Vec<Prefix>, BuildError> {
        let prefix = |(addr, len, route): &(Ipv6Addr, u8, Route)| {
            Ok(Prefix {
                addr: aligned6(*addr, *len)?,
                len: u32::from(*len),
                leaf: self.leaf(leaves, *route)?,
            })
        };
        self.routes6.iter().map(prefix).collect()
    }

    fn peers4(&self) -> Result<Vec<Peer4>, BuildError> {
        let peer = |(outer, prefix, len): &(Ipv4Addr, Ipv4Addr, u8)| {
            aligned4(*prefix, *len)?;
            let mask = (mask(u32::from(*len)) >> 96) as u32;
            Ok(Peer4 {
                outer: u32::from(*outer),
                prefix: u32::from(*prefix),
                mask,
            })
        };
        let peers: Result<Vec<Peer4>, _> = self.peers4.iter().map(peer).collect();
        peers.map(sorted)
    }

    fn peers6(&self) -> Result<Vec<Peer6>, BuildError> {
        let peer = |(outer, prefix, len): &(Ipv6Addr, Ipv6Addr, u8)| {
            Ok(Peer6 {
                outer: u128::from(*outer),
                prefix: aligned6(*prefix, *len)?,
                mask: mask(u32::from(*len)),
            })
        };
        let peers: Result<Vec<Peer6>, _> = self.peers6.iter().map(peer).collect();
        peers.map(sorted)
    }
}

/// In the one order that gives the same table for the same peers, each once.
fn sorted<P: Ord>(mut peers: Vec<P>) -> Vec<P> {
    peers.sort_unstable();
    peers.dedup();
    peers
}

fn adjacency_leaf(leaves: &[u32], id: AdjacencyId) -> Result<u32, BuildError> {
    let leaf = leaves.get(id.0 as usize).copied();
    leaf.ok_or(BuildError::UnknownAdjacency(id))
}

/// A checked prefix, left-aligned in 128 bits.
fn aligned4(addr: Ipv4Addr, len: u8) -> Result<u128, BuildError> {
    let addr = u128::from(u32::from(addr));
    check_prefix(addr << 96, addr, len, 32)?;
    Ok(addr << 96)
}

/// A checked prefix.
fn aligned6(addr: Ipv6Addr, len: u8) -> Result<u128, BuildError> {
    let addr = u128::from(addr);
    check_prefix(addr, addr, len, 128)?;
    Ok(addr)
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
