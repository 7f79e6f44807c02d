//! Who may send us tunnel packets, and for which inner sources: open-addressing hash tables, one per address family.
//!
//! A bucket is two words (IPv4) or eight (IPv6), keyed by the outer source address. A node that holds several leases
//! has several buckets with the same key; they follow each other in probe order. A table is at most half full, so a
//! run ends soon, and the walk is bounded by the table's size even when the table is damaged.

use alloc::vec;
use alloc::vec::Vec;

use crate::lpm::memory_words;
use crate::sync::{Ordering, Word};

/// Words of an IPv4 bucket: `outer | prefix << 32`, `mask | PRESENT`.
pub(crate) const BUCKET4_WORDS: usize = 2;
/// Words of an IPv6 bucket: outer, prefix and mask, two words each as the octets lie in memory; zero; [`PRESENT`].
pub(crate) const BUCKET6_WORDS: usize = 8;
const PRESENT: u64 = 1 << 32;
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Whether an outer source may send a packet with this inner source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerCheck {
    /// The outer source is a peer and the inner source lies in a lease of its.
    Allowed,
    /// The outer source is a peer, but the inner source lies in no lease of its.
    ForeignSource,
    /// The outer source is no peer.
    UnknownPeer,
}

/// One IPv4 entry while the table is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Peer4 {
    pub(crate) outer: u32,
    pub(crate) prefix: u32,
    pub(crate) mask: u32,
}

/// One IPv6 entry while the table is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Peer6 {
    pub(crate) outer: u128,
    pub(crate) prefix: u128,
    pub(crate) mask: u128,
}

#[inline]
fn hash4(outer: u32, buckets: usize) -> usize {
    // Multiplicative hashing; the product's upper half is well mixed, the table size is a power of two.
    let mixed = u64::from(outer).wrapping_mul(MULTIPLIER) >> 32;
    let index = mixed as usize;
    index & (buckets - 1)
}

#[inline(always)]
fn hash6([low, high]: [u64; 2], buckets: usize) -> usize {
    // Nodes differ in a few bits anywhere in the address: both words are mixed before they meet.
    let mixed =
        (low ^ high.wrapping_mul(MULTIPLIER).rotate_left(31)).wrapping_mul(MULTIPLIER) >> 32;
    let index = mixed as usize;
    index & (buckets - 1)
}

/// Where the search for an outer source begins, in words.
#[inline]
pub(crate) fn place4(table: &[Word], outer: u32) -> usize {
    match table.len() / BUCKET4_WORDS {
        0 => 0,
        buckets => hash4(outer, buckets) * BUCKET4_WORDS,
    }
}

/// As [`place4`].
#[inline(always)]
pub(crate) fn place6(table: &[Word], outer: &[u8; 16]) -> usize {
    match table.len() / BUCKET6_WORDS {
        0 => 0,
        buckets => hash6(memory_words(outer), buckets) * BUCKET6_WORDS,
    }
}

/// Builds the IPv4 table; `peers` in any order gives the same table after sorting by the caller.
pub(crate) fn build4(peers: &[Peer4]) -> Vec<u64> {
    build(peers, |peer, buckets| {
        let words = [
            u64::from(peer.outer) | (u64::from(peer.prefix) << 32),
            u64::from(peer.mask) | PRESENT,
        ];
        (hash4(peer.outer, buckets), words)
    })
}

/// Builds the IPv6 table; as [`build4`].
pub(crate) fn build6(peers: &[Peer6]) -> Vec<u64> {
    build(peers, |peer, buckets| {
        let [outer, prefix, mask] =
            [peer.outer, peer.prefix, peer.mask].map(|number| memory_words(&number.to_be_bytes()));
        let words = [
            outer[0], outer[1], prefix[0], prefix[1], mask[0], mask[1], 0, PRESENT,
        ];
        (hash6(outer, buckets), words)
    })
}

/// Puts each peer into the first free bucket from its own on. `bucket` gives that and its words, [`PRESENT`] in the
/// last.
fn build<P, const N: usize>(
    peers: &[P],
    bucket: impl Fn(&P, usize) -> (usize, [u64; N]),
) -> Vec<u64> {
    if peers.is_empty() {
        return Vec::new();
    }
    let buckets = (peers.len() * 2).next_power_of_two();
    let mut words = vec![0u64; buckets * N];
    for peer in peers {
        let (mut index, content) = bucket(peer, buckets);
        while words[(index + 1) * N - 1] & PRESENT != 0 {
            index = (index + 1) & (buckets - 1);
        }
        words[index * N..(index + 1) * N].copy_from_slice(&content);
    }
    words
}

/// What a bucket says about a packet.
enum Seen {
    /// Nothing: the search is over.
    Empty,
    /// It is about another outer source.
    Other,
    /// The outer source has a lease, but the inner source is not in it.
    Foreign,
    /// The inner source is in a lease of the outer source.
    Allowed,
}

/// A packet's question to the buckets of `N` words. (Closures in its place are not always inlined.)
trait Question<const N: usize> {
    fn ask(&self, bucket: &[Word; N]) -> Seen;
}

struct Question4 {
    outer: u32,
    inner: u32,
}

impl Question<BUCKET4_WORDS> for Question4 {
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "buckets keep two 32-bit values in a word"
    )]
    fn ask(&self, [key, rule]: &[Word; BUCKET4_WORDS]) -> Seen {
        let rule = rule.load(Ordering::Relaxed);
        if rule & PRESENT == 0 {
            return Seen::Empty;
        }
        let key = key.load(Ordering::Relaxed);
        if key as u32 != self.outer {
            Seen::Other
        } else if (self.inner ^ (key >> 32) as u32) & rule as u32 == 0 {
            Seen::Allowed
        } else {
            Seen::Foreign
        }
    }
}

/// Addresses as they lie in memory.
struct Question6 {
    outer: [u64; 2],
    inner: [u64; 2],
}

impl Question<BUCKET6_WORDS> for Question6 {
    #[inline(always)]
    fn ask(&self, bucket: &[Word; BUCKET6_WORDS]) -> Seen {
        let word = |index: usize| bucket[index].load(Ordering::Relaxed);
        if word(BUCKET6_WORDS - 1) & PRESENT == 0 {
            return Seen::Empty;
        }
        let [first, second] = self.inner;
        if word(0) != self.outer[0] || word(1) != self.outer[1] {
            Seen::Other
        } else if (first ^ word(2)) & word(4) | (second ^ word(3)) & word(5) == 0 {
            Seen::Allowed
        } else {
            Seen::Foreign
        }
    }
}

/// Looks up an outer source and checks the inner source against its leases.
#[inline(always)]
pub(crate) fn check4(table: &[Word], outer: u32, inner: u32) -> PeerCheck {
    search(table, place4(table, outer), &Question4 { outer, inner })
}

/// As [`check4`].
#[inline(always)]
pub(crate) fn check6(table: &[Word], outer: &[u8; 16], inner: &[u8; 16]) -> PeerCheck {
    let question = Question6 {
        outer: memory_words(outer),
        inner: memory_words(inner),
    };
    search(table, place6(table, outer), &question)
}

/// Walks the buckets of `N` words from the one at word `place` on, once around at most.
#[inline(always)]
fn search<const N: usize>(table: &[Word], place: usize, question: &impl Question<N>) -> PeerCheck {
    let mut known = PeerCheck::UnknownPeer;
    let mut place = place;
    for _ in 0..table.len() / N {
        let Some(bucket) = table.get(place..).and_then(<[Word]>::first_chunk) else {
            break;
        };
        match question.ask(bucket) {
            Seen::Empty => break,
            Seen::Other => {}
            Seen::Foreign => known = PeerCheck::ForeignSource,
            Seen::Allowed => return PeerCheck::Allowed,
        }
        // The table's length is a power of two of buckets, and so of words.
        place = (place + N) & (table.len() - 1);
    }
    known
}
