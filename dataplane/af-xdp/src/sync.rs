//! Atomics, shared cells and the orderings of the ring protocol.
//!
//! Everything that two parties touch goes through this module, so that the same ring code runs on
//! the processor's atomics and on loom's model of them. The four orderings that the protocol rests
//! on are functions here and nowhere else: under loom and Miri, and only there, the environment
//! variable `RIPSTOP_MUTATE` weakens one of them by name, which is how `mutations.sh` proves that
//! the concurrency tests would notice.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::AtomicU32;
pub(crate) use core::sync::atomic::Ordering;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicU32;

#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;

/// A cell that another party writes too. Same interface as loom's, same layout as its content.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    #[cfg(test)]
    pub(crate) fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    #[inline]
    pub(crate) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get().cast_const())
    }

    #[inline]
    pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

/// The orderings of the two pairs that `ring` describes.
pub(crate) mod order {
    use super::Ordering;

    /// `SYNC entries`, producer's end.
    #[inline]
    pub(crate) fn publish_entries() -> Ordering {
        choose("publish_entries", Ordering::Release)
    }

    /// `SYNC entries`, consumer's end.
    #[inline]
    pub(crate) fn observe_entries() -> Ordering {
        choose("observe_entries", Ordering::Acquire)
    }

    /// `SYNC room`, consumer's end.
    #[inline]
    pub(crate) fn publish_room() -> Ordering {
        choose("publish_room", Ordering::Release)
    }

    /// `SYNC room`, producer's end.
    #[inline]
    pub(crate) fn observe_room() -> Ordering {
        choose("observe_room", Ordering::Acquire)
    }

    #[cfg(not(any(loom, miri)))]
    #[inline(always)]
    fn choose(_name: &str, proper: Ordering) -> Ordering {
        proper
    }

    #[cfg(any(loom, miri))]
    fn choose(name: &str, proper: Ordering) -> Ordering {
        use std::sync::OnceLock;
        static MUTATION: OnceLock<String> = OnceLock::new();
        let mutation = MUTATION.get_or_init(|| std::env::var("RIPSTOP_MUTATE").unwrap_or_default());
        if mutation == name {
            Ordering::Relaxed
        } else {
            proper
        }
    }
}
