//! Who may send us tunnel packets, and for which inner sources: an open-addressing hash table.
//!
//! One bucket is two words (IPv4), keyed by the outer source address. A node that holds several leases has several
//! buckets with the same key; they follow each other in probe order. The table is at most half full, so a run ends
//! soon, and the walk is bounded by the table's size even when the table is damaged.

use alloc::vec;
use alloc::vec::Vec;

use crate::sync::{Ordering, Word};

/// Words of one bucket: `outer | prefix << 32`, `mask | PRESENT`.
pub(crate) const BUCKET_WORDS: usize = 2;
const PRESENT: u64 = 1 << 32;

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

/// One entry while the table is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Peer4 {
    pub(crate) outer: u32,
    pub(crate) prefix: u32,
    pub(crate) mask: u32,
}

#[inline]
fn hash4(outer: u32, buckets: usize) -> usize {
    // Multiplicative hashing; the product's upper half is well mixed, the table size is a power of two.
    let mixed = u64::from(outer).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let index = mixed as usize;
    index & (buckets - 1)
}

/// Where the search for an outer source begins, in words.
#[inline]
pub(crate) fn place4(table: &[Word], outer: u32) -> usize {
    match table.len() / BUCKET_WORDS {
        0 => 0,
        buckets => hash4(outer, buckets) * BUCKET_WORDS,
    }
}

/// Builds the table; `peers` in any order gives the same table after sorting by the caller.
pub(crate) fn build4(peers: &[Peer4]) -> Vec<u64> {
    if peers.is_empty() {
        return Vec::new();
    }
    let buckets = (peers.len() * 2).next_power_of_two();
    let mut words = vec![0u64; buckets * BUCKET_WORDS];
    for peer in peers {
        let mut index = hash4(peer.outer, buckets);
        while words[index * BUCKET_WORDS + 1] & PRESENT != 0 {
            index = (index + 1) & (buckets - 1);
        }
        words[index * BUCKET_WORDS] = u64::from(peer.outer) | (u64::from(peer.prefix) << 32);
        words[index * BUCKET_WORDS + 1] = u64::from(peer.mask) | PRESENT;
    }
    words
}

/// Looks up an outer source and checks the inner source against its leases.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "buckets keep two 32-bit values in a word"
)]
pub(crate) fn check4(table: &[Word], outer: u32, inner: u32) -> PeerCheck {
    let buckets = table.len() / BUCKET_WORDS;
    if buckets == 0 {
        return PeerCheck::UnknownPeer;
    }
    let mut known = PeerCheck::UnknownPeer;
    let mut index = hash4(outer, buckets);
    for _ in 0..buckets {
        let Some([key, rule]) =
            table.get(index * BUCKET_WORDS..index * BUCKET_WORDS + BUCKET_WORDS)
        else {
            break;
        };
        let rule = rule.load(Ordering::Relaxed);
        if rule & PRESENT == 0 {
            break;
        }
        let key = key.load(Ordering::Relaxed);
        if key as u32 == outer {
            if (inner ^ (key >> 32) as u32) & rule as u32 == 0 {
                return PeerCheck::Allowed;
            }
            known = PeerCheck::ForeignSource;
        }
        index = (index + 1) & (buckets - 1);
    }
    known
}
