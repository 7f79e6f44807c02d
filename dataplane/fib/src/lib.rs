//! The memory contract between Ripstop's control plane and data plane.
//!
//! Two files in shared memory, each with one writing process:
//!
//! ```text
//!   control plane ──writes──► fib   ──reads──► data plane   (module `publish`: slots of immutable images)
//!   control plane ◄──reads─── stats ◄─writes── data plane   (module `stats`: heartbeats, counters, pins)
//! ```
//!
//! An *image* is everything that a worker forwards by, compiled off-line into one block of words: routes (longest
//! prefix match), adjacencies (finished outer headers) and the peers with the prefix that each may speak for. It is
//! never changed in place: [`Publisher`] copies it into a free slot of the region and makes it current by one release
//! store; a [`Reader`] sees that by one load, *pins* it and reads behind a fence, and a pinned slot is not written again.
//!
//! Everything here works on `&[Word]`, whatever memory that is; only the module `map` knows files. So Miri and loom,
//! which cannot map files, check all the rest. The crate has no dependencies apart from libc in `map`.
//!
//! What it does not do: talk to the kernel, decide what the routes are, forward packets.
#![cfg_attr(not(any(test, feature = "map", loom)), no_std)]

extern crate alloc;

mod adjacency;
mod build;
mod checksum;
mod drop_reason;
mod image;
mod lpm;
#[cfg(feature = "map")]
pub mod map;
mod node;
mod peers;
mod prefetch;
pub mod publish;
pub mod stats;
pub mod sync;

pub use adjacency::{Adjacency, Ethernet, HEADER_MAX};
pub use build::{
    BuildError, FAMILY_IPV4, FAMILY_IPV6, ImageBuilder, LeaseRecord, PATHS_PER_UPLINK, Route,
};
pub use drop_reason::DropReason;
pub use image::{Hop, Image, ImageError, Leaf, LongTemplate};
pub use lpm::{AdjacencyId, Encap, PathsId};
pub use node::{Backend, Dscp, Local, NICS, NicRecord, Node, UPLINKS, halves};
pub use peers::PeerCheck;
pub use publish::{Publisher, Reader, Region};
pub use sync::Word;

/// Version of both layouts. A change of any offset or meaning changes it; regions of another version are refused.
/// What is appended in words that were zero changes nothing for those who do not know it: zero means "not said".
pub const ABI_VERSION: u32 = 2;
