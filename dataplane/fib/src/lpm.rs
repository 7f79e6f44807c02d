//! Longest-prefix match: multibit tries of 32-bit entries, two to a word.
//!
//! ```text
//!   IPv4   root[addr >> 16] ──► chunk[(addr >> 8) & 255] ──► chunk[addr & 255]
//!          one load up to /16    two up to /24                three beyond
//!   IPv6   the bits that all routes share are compared at once; then a root of 16 bits and chunks of 8 bits:
//!          /64 leases in one /48 network take one load
//! ```
//!
//! An entry is a leaf, or with its top bit set the number of a chunk of 256 entries. A leaf carries the encapsulation
//! beside the adjacency's index, so that a packet needs no further load to know what to do with it.

use alloc::vec;
use alloc::vec::Vec;

use crate::sync::{Ordering, Word};

/// Entries of the root table: 16 bits of the address.
pub(crate) const ROOT_ENTRIES: usize = 1 << 16;
/// Entries of a chunk: 8 bits of the address.
pub(crate) const CHUNK_ENTRIES: usize = 1 << 8;
/// Words of the root table.
pub(crate) const ROOT_WORDS: usize = ROOT_ENTRIES / 2;
/// Words of a chunk.
pub(crate) const CHUNK_WORDS: usize = CHUNK_ENTRIES / 2;

const CHUNK_FLAG: u32 = 1 << 31;
const KIND_SHIFT: u32 = 27;
const INDEX_MASK: u32 = (1 << KIND_SHIFT) - 1;
const KIND_NONE: u32 = 0;
const KIND_LOCAL: u32 = 1;
const KIND_UNRESOLVED: u32 = 2;
const KIND_VXLAN4: u32 = 3;
const KIND_VXLAN4_TAGGED: u32 = 4;
const KIND_VXLAN6: u32 = 5;
const KIND_IPIP: u32 = 6;
const KIND_UDP: u32 = 7;
const KIND_DIRECT: u32 = 8;
const KIND_PATHS: u32 = 9;

/// Index of an adjacency in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdjacencyId(pub u32);

impl AdjacencyId {
    /// The largest index that a leaf can carry.
    pub const MAX: Self = Self(INDEX_MASK);
}

/// Index of a choice of paths in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathsId(pub u32);

impl PathsId {
    /// The largest index that a leaf can carry.
    pub const MAX: Self = Self(INDEX_MASK);
}

/// How packets to an adjacency are encapsulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encap {
    /// VXLAN (RFC 7348) over IPv4: a header of 64 bytes, outer Ethernet to inner Ethernet.
    Vxlan4,
    /// The same with an 802.1Q tag: 68 bytes.
    Vxlan4Tagged,
    /// VXLAN over IPv6: 84 bytes, 88 with a tag.
    Vxlan6,
    /// IPv4 in IPv4 (RFC 2003): 34 bytes, 38 with a tag.
    Ipip,
    /// IPv4 as the payload of UDP over IPv4: 42 bytes, 46 with a tag.
    Udp,
    /// No tunnel: Ethernet alone, 14 bytes, 18 with a tag.
    Direct,
}

impl Encap {
    /// Whether its templates are among the long ones.
    pub(crate) const fn is_long(self) -> bool {
        match self {
            Self::Vxlan4Tagged | Self::Vxlan6 => true,
            Self::Vxlan4 | Self::Ipip | Self::Udp | Self::Direct => false,
        }
    }

    const fn kind(self) -> u32 {
        match self {
            Self::Vxlan4 => KIND_VXLAN4,
            Self::Vxlan4Tagged => KIND_VXLAN4_TAGGED,
            Self::Vxlan6 => KIND_VXLAN6,
            Self::Ipip => KIND_IPIP,
            Self::Udp => KIND_UDP,
            Self::Direct => KIND_DIRECT,
        }
    }
}

/// What the table says about a destination, as it stands there: [`Hop`] with the question first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf(u32);

impl Leaf {
    /// The adjacency, if packets go through exactly one and are encapsulated so: one comparison.
    #[inline]
    pub const fn via(self, encap: Encap) -> Option<AdjacencyId> {
        if self.0 >> KIND_SHIFT == encap.kind() {
            Some(AdjacencyId(self.0 & INDEX_MASK))
        } else {
            None
        }
    }

    /// All that it says; a kind that this version does not know reads as no route.
    #[inline]
    pub fn hop(self) -> Hop {
        let index = self.0 & INDEX_MASK;
        let via = |encap| Hop::Via(encap, AdjacencyId(index));
        match self.0 >> KIND_SHIFT {
            KIND_VXLAN4 => via(Encap::Vxlan4),
            KIND_VXLAN4_TAGGED => via(Encap::Vxlan4Tagged),
            KIND_VXLAN6 => via(Encap::Vxlan6),
            KIND_IPIP => via(Encap::Ipip),
            KIND_UDP => via(Encap::Udp),
            KIND_DIRECT => via(Encap::Direct),
            KIND_PATHS => Hop::Paths(PathsId(index)),
            KIND_LOCAL => Hop::Local,
            KIND_UNRESOLVED => Hop::Unresolved,
            _ => Hop::None,
        }
    }

    /// An entry found at the end of a walk. One that claims to lead on reads as no route: a damaged table has it.
    #[inline]
    pub(crate) const fn of_entry(entry: u32) -> Self {
        // `CHUNK_FLAG` is part of the kind, and no kind has it.
        Self(entry)
    }
}

/// What the table says about a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// No route covers the address.
    None,
    /// The address belongs to this node's own lease.
    Local,
    /// A lease covers the address, but the way to its node is not known yet.
    Unresolved,
    /// To be sent through an adjacency.
    Via(Encap, AdjacencyId),
    /// To be sent through one of several adjacencies.
    Paths(PathsId),
}

impl Hop {
    pub(crate) fn leaf(self) -> u32 {
        match self {
            Self::None => KIND_NONE << KIND_SHIFT,
            Self::Local => KIND_LOCAL << KIND_SHIFT,
            Self::Unresolved => KIND_UNRESOLVED << KIND_SHIFT,
            Self::Via(encap, id) => (encap.kind() << KIND_SHIFT) | (id.0 & INDEX_MASK),
            Self::Paths(id) => (KIND_PATHS << KIND_SHIFT) | (id.0 & INDEX_MASK),
        }
    }
}

/// One route while the tables are built: `len` leading bits of `addr` (left-aligned in 128 bits) lead to `leaf`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prefix {
    pub(crate) addr: u128,
    pub(crate) len: u32,
    pub(crate) leaf: u32,
}

/// A finished trie as 32-bit entries.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    /// Number of leading bits that every route shares and that the root skips.
    pub(crate) base_bits: u32,
    /// Those bits, left-aligned.
    pub(crate) base: u128,
    pub(crate) root: Vec<u32>,
    pub(crate) chunks: Vec<u32>,
}

/// Left-aligned mask of `bits` ones.
pub(crate) fn mask(bits: u32) -> u128 {
    if bits == 0 {
        0
    } else {
        u128::MAX << (128 - bits)
    }
}

impl Tables {
    /// Builds the trie over routes whose root starts after `base_bits` common bits.
    ///
    /// Shorter prefixes are written first, so a longer one overwrites its part of the range.
    pub(crate) fn build(prefixes: &mut [Prefix], base_bits: u32) -> Self {
        if prefixes.is_empty() {
            return Self::default();
        }
        prefixes.sort_by_key(|prefix| (prefix.len, prefix.addr));
        let base = prefixes[0].addr & mask(base_bits);
        let mut tables = Self {
            base_bits,
            base,
            root: vec![0; ROOT_ENTRIES],
            chunks: Vec::new(),
        };
        for prefix in prefixes.iter() {
            tables.insert(prefix);
        }
        tables
    }

    fn insert(&mut self, prefix: &Prefix) {
        let mut consumed = self.base_bits + 16;
        let root_index = bits_at(prefix.addr, self.base_bits, 16);
        if prefix.len <= consumed {
            let span = 1usize << (consumed - prefix.len);
            self.root[root_index..root_index + span].fill(prefix.leaf);
            return;
        }
        let mut chunk = chunk_below(&mut self.root, root_index, &mut self.chunks);
        loop {
            let index = chunk * CHUNK_ENTRIES + bits_at(prefix.addr, consumed, 8);
            consumed += 8;
            if prefix.len <= consumed {
                let span = 1usize << (consumed - prefix.len);
                self.chunks[index..index + span].fill(prefix.leaf);
                return;
            }
            chunk = child_of(&mut self.chunks, index);
        }
    }
}

/// `count` bits of `addr` after its first `start` bits.
fn bits_at(addr: u128, start: u32, count: u32) -> usize {
    let shifted = addr >> (128 - start - count);
    (shifted & ((1 << count) - 1)) as usize
}

/// The chunk that `root[index]` points to, made (filled with the leaf that stood there) if there is none.
fn chunk_below(root: &mut [u32], index: usize, chunks: &mut Vec<u32>) -> usize {
    let (entry, chunk) = descend(root[index], chunks);
    root[index] = entry;
    chunk
}

/// The chunk that `chunks[index]` points to, made if there is none.
fn child_of(chunks: &mut Vec<u32>, index: usize) -> usize {
    let (entry, chunk) = descend(chunks[index], chunks);
    chunks[index] = entry;
    chunk
}

fn descend(entry: u32, chunks: &mut Vec<u32>) -> (u32, usize) {
    if entry & CHUNK_FLAG != 0 {
        return (entry, (entry & !CHUNK_FLAG) as usize);
    }
    let chunk = chunks.len() / CHUNK_ENTRIES;
    chunks.resize(chunks.len() + CHUNK_ENTRIES, entry);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the region holds fewer than 2^31 chunks"
    )]
    let number = chunk as u32;
    (CHUNK_FLAG | number, chunk)
}

/// Entry `index` of a table that keeps two entries to a word; past its end there is no route.
#[inline]
pub(crate) fn entry(words: &[Word], index: usize) -> u32 {
    let Some(word) = words.get(index >> 1) else {
        return 0;
    };
    let shift = (index & 1) * 32;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the upper half is shifted down where it is meant"
    )]
    let entry = (word.load(Ordering::Relaxed) >> shift) as u32;
    entry
}

/// Finds the leaf of an IPv4 address.
#[inline(always)]
pub(crate) fn lookup4(root: &[Word], chunks: &[Word], addr: u32) -> Leaf {
    let mut found = entry(root, (addr >> 16) as usize);
    if found & CHUNK_FLAG != 0 {
        found = entry(chunks, chunk_index(found, addr >> 8));
        if found & CHUNK_FLAG != 0 {
            found = entry(chunks, chunk_index(found, addr));
        }
    }
    Leaf::of_entry(found)
}

/// The bits that all IPv6 routes share, which are compared at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Base6 {
    /// How many bytes; at most 14.
    pub(crate) bytes: usize,
    /// A mask of so many ones, as an address lies in memory.
    pub(crate) mask: [u64; 2],
    /// What they are, as an address lies in memory.
    pub(crate) addr: [u64; 2],
}

/// Finds the leaf of an IPv6 address.
#[inline(always)]
pub(crate) fn lookup6(base: &Base6, root: &[Word], chunks: &[Word], addr: &[u8; 16]) -> Leaf {
    let [first, second] = memory_words(addr);
    if (first ^ base.addr[0]) & base.mask[0] | (second ^ base.addr[1]) & base.mask[1] != 0 {
        return Leaf::of_entry(0);
    }
    let Some((index, rest)) = addr
        .get(base.bytes..)
        .and_then(<[u8]>::split_first_chunk::<2>)
    else {
        return Leaf::of_entry(0);
    };
    let mut found = entry(root, usize::from(u16::from_be_bytes(*index)));
    let mut rest = rest.iter();
    while found & CHUNK_FLAG != 0
        && let Some(bits) = rest.next()
    {
        found = entry(chunks, chunk_index(found, u32::from(*bits)));
    }
    Leaf::of_entry(found)
}

/// An address in two words as it lies in memory: for comparisons, which need no order of bytes.
#[inline(always)]
pub(crate) fn memory_words(addr: &[u8; 16]) -> [u64; 2] {
    let whole = u128::from_ne_bytes(*addr);
    crate::node::halves(whole)
}

/// Index of an entry in the chunk that `entry` points to; the chunk's bits are the low 8 of `bits`.
#[inline]
fn chunk_index(entry: u32, bits: u32) -> usize {
    (entry & !CHUNK_FLAG) as usize * CHUNK_ENTRIES + (bits & 0xff) as usize
}
