//! The atomics that everything shared is made of: the core ones, or loom's when loom explores the protocol.

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering, fence};

/// The unit of shared memory: eight bytes that any process may load and one process stores.
pub type Word = AtomicU64;

/// Owned words with the given values, for images and regions outside shared memory.
pub fn words(values: &[u64]) -> alloc::vec::Vec<Word> {
    values.iter().map(|value| Word::new(*value)).collect()
}
