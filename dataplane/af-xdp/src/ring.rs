//! One ring of an AF_XDP socket, seen from its producing or its consuming end.
//!
//! ```text
//!            consumer                producer
//!               │                       │
//!   ┌─────┬─────▼─────┬─────┬─────┬─────▼─────┬─────┐
//!   │room │  entry    │entry│entry│   room    │room │     size = 2^n entries
//!   └─────┴───────────┴─────┴─────┴───────────┴─────┘     place = index & (size - 1)
//!          producer - consumer = entries in the ring; both indices run freely through u32
//! ```
//!
//! Each end keeps its own count in private memory and stores it to the shared word; it never reads
//! that word back after creation, and it never read-modify-writes it, because nobody else stores
//! it. The other end's word is loaded only when the cached copy of it says "not enough".
//!
//! Two pairs of orderings carry the protocol. The kernel's ends are in `net/xdp/xsk_queue.h`.
//!
//! - `SYNC entries`: the producer's release store of `producer` makes the entries below it visible;
//!   the consumer's acquire load of `producer` sees them. Otherwise the consumer may read an entry
//!   before it is written and take a stale descriptor for a frame.
//! - `SYNC room`: the consumer's release store of `consumer` comes after its reads of the entries
//!   below it; the producer's acquire load of `consumer` comes before it overwrites them. Otherwise
//!   the consumer may read the next lap's descriptor in place of its own.
//!
//! Indices stored by the other side are not trusted: a distance greater than the ring's size is
//! impossible, is counted in `faults`, and gives no room and no entries.
//!
//! This file uses memory that it is given. Mapping it is the business of `mapping` and `socket`.
#![expect(unsafe_code, reason = "reads and writes memory shared with the kernel")]

use core::ptr::NonNull;

use crate::sync::{AtomicU32, Ordering, UnsafeCell, order};

/// The flag word's bit by which the kernel asks for a system call.
const NEED_WAKEUP: u32 = 1;

/// Where one ring lies in memory.
#[derive(Debug)]
pub(crate) struct Area<T> {
    /// Only the producing end stores this.
    pub(crate) producer: NonNull<AtomicU32>,
    /// Only the consuming end stores this.
    pub(crate) consumer: NonNull<AtomicU32>,
    /// Only the kernel stores this.
    pub(crate) flags: NonNull<AtomicU32>,
    /// `size` entries; those between `consumer` and `producer` belong to the consuming end, the
    /// others to the producing end.
    pub(crate) entries: NonNull<UnsafeCell<T>>,
    /// Number of entries, a power of two.
    pub(crate) size: u32,
}

impl<T: Copy> Area<T> {
    #[inline]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points to a live word for as long as the ring lives, by `Producer::new` and
        // `Consumer::new`'s contract.
        unsafe { self.producer.as_ref() }
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as for `producer`.
        unsafe { self.consumer.as_ref() }
    }

    #[inline]
    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as for `producer`.
        unsafe { self.flags.as_ref() }
    }

    #[inline]
    fn entry(&self, index: u32) -> &UnsafeCell<T> {
        let place = (index & (self.size - 1)) as usize;
        // SAFETY: the mask keeps `place` below `size`, and `entries` points to `size` entries by
        // the contract of `new`.
        let entry = unsafe { self.entries.add(place) };
        // SAFETY: lies within the entries, as above; a cell may be written by the other side while
        // this reference exists.
        unsafe { entry.as_ref() }
    }
}

/// The producing end: fill and TX rings.
#[derive(Debug)]
pub(crate) struct Producer<T, M> {
    area: Area<T>,
    /// Entries produced so far; the shared word holds the same once committed.
    produced: u32,
    /// The consumer's word as last loaded.
    consumed: u32,
    /// Impossible distances seen.
    faults: u64,
    /// Keeps the memory of `area` alive.
    _memory: M,
}

// SAFETY: the ring is the only user of its end of the memory (contract of `new`), the memory is
// kept by `M`, and the address space is the same for every thread. It is not `Sync`: `NonNull`
// takes care of that.
unsafe impl<T: Send, M: Send> Send for Producer<T, M> {}

impl<T: Copy, M> Producer<T, M> {
    /// Takes the producing end of the ring at `area`, at the indices found there.
    ///
    /// # Safety
    ///
    /// - The pointers of `area` are aligned and valid for reads and writes for as long as `memory`
    ///   lives, `entries` for `size` entries, and `size` is a power of two.
    /// - Nobody else produces into this ring, and the consuming side keeps to the protocol above
    ///   as far as the entries' memory is concerned; any index values are allowed.
    /// - Every bit pattern is a valid `T`.
    pub(crate) unsafe fn new(area: Area<T>, memory: M) -> Self {
        let produced = area.producer().load(Ordering::Relaxed);
        // SYNC room
        let consumed = area.consumer().load(order::observe_room());
        Self {
            area,
            produced,
            consumed,
            faults: 0,
            _memory: memory,
        }
    }

    /// Opens up to `wanted` entries for writing; may grant fewer, or none.
    #[inline]
    pub(crate) fn reserve(&mut self, wanted: u32) -> Reservation<'_, T, M> {
        let mut room = self.room();
        if room < wanted {
            // SYNC room
            self.consumed = self.area.consumer().load(order::observe_room());
            if self.produced.wrapping_sub(self.consumed) > self.area.size {
                self.faults += 1;
            }
            room = self.room();
        }
        Reservation {
            granted: wanted.min(room),
            written: 0,
            ring: self,
        }
    }

    #[inline]
    fn room(&self) -> u32 {
        self.area
            .size
            .saturating_sub(self.produced.wrapping_sub(self.consumed))
    }

    /// Entries that the consumer has not taken yet.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        // A count, which gives access to nothing: no pair needed.
        let consumed = self.area.consumer().load(Ordering::Relaxed);
        self.produced.wrapping_sub(consumed).min(self.area.size)
    }

    /// Whether the kernel asks to be called before it looks at this ring again.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        // A hint, which gives access to nothing: no pair needed.
        self.area.flags().load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }

    pub(crate) fn size(&self) -> u32 {
        self.area.size
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults
    }
}

/// Entries being written. Nothing is visible to the other side before [`Reservation::commit`];
/// dropping it undoes it.
#[derive(Debug)]
pub(crate) struct Reservation<'a, T, M> {
    ring: &'a mut Producer<T, M>,
    granted: u32,
    written: u32,
}

impl<T: Copy, M> Reservation<'_, T, M> {
    /// Entries that can still be pushed.
    #[inline]
    pub(crate) fn left(&self) -> u32 {
        self.granted - self.written
    }

    /// Writes the next entry.
    ///
    /// # Panics
    ///
    /// When nothing is left.
    #[inline]
    pub(crate) fn push(&mut self, value: T) {
        assert!(self.written < self.granted, "a push beyond the reservation");
        let index = self.ring.produced.wrapping_add(self.written);
        self.ring.area.entry(index).with_mut(|entry| {
            // SAFETY: entries from `produced` to `produced + granted` are the producer's own: room
            // was observed by `SYNC room`, and this is the sole producer (contract of `new`).
            unsafe { entry.write_volatile(value) }
        });
        self.written += 1;
    }

    /// Hands the written entries to the consuming side.
    #[inline]
    pub(crate) fn commit(self) {
        // An idle loop must not take the shared cache line from the other side.
        if self.written == 0 {
            return;
        }
        self.ring.produced = self.ring.produced.wrapping_add(self.written);
        // SYNC entries
        self.ring
            .area
            .producer()
            .store(self.ring.produced, order::publish_entries());
    }
}

/// The consuming end: RX and completion rings.
#[derive(Debug)]
pub(crate) struct Consumer<T, M> {
    area: Area<T>,
    /// Entries consumed so far; the shared word holds the same once released.
    consumed: u32,
    /// The producer's word as last loaded.
    produced: u32,
    /// Impossible distances seen.
    faults: u64,
    /// Keeps the memory of `area` alive.
    _memory: M,
}

// SAFETY: as for `Producer`.
unsafe impl<T: Send, M: Send> Send for Consumer<T, M> {}

impl<T: Copy, M> Consumer<T, M> {
    /// Takes the consuming end of the ring at `area`, at the indices found there.
    ///
    /// # Safety
    ///
    /// As for [`Producer::new`], with the ends exchanged.
    pub(crate) unsafe fn new(area: Area<T>, memory: M) -> Self {
        let consumed = area.consumer().load(Ordering::Relaxed);
        Self {
            area,
            consumed,
            // Equal indices mean "empty as far as known": the first peek loads the word.
            produced: consumed,
            faults: 0,
            _memory: memory,
        }
    }

    /// Opens up to `wanted` entries for reading; there may be fewer, or none.
    #[inline]
    pub(crate) fn peek(&mut self, wanted: u32) -> Peek<'_, T, M> {
        let mut available = self.available();
        if available < wanted {
            // SYNC entries
            self.produced = self.area.producer().load(order::observe_entries());
            if self.produced.wrapping_sub(self.consumed) > self.area.size {
                self.faults += 1;
                self.produced = self.consumed;
            }
            available = self.available();
        }
        Peek {
            granted: wanted.min(available),
            read: 0,
            ring: self,
        }
    }

    #[inline]
    fn available(&self) -> u32 {
        self.produced.wrapping_sub(self.consumed)
    }

    /// Entries that wait to be taken.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        // A count, which gives access to nothing: no pair needed.
        let produced = self.area.producer().load(Ordering::Relaxed);
        produced.wrapping_sub(self.consumed).min(self.area.size)
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults
    }
}

/// Entries being read. They stay in the ring until [`Peek::release`]; dropping it leaves them
/// there.
#[derive(Debug)]
pub(crate) struct Peek<'a, T, M> {
    ring: &'a mut Consumer<T, M>,
    granted: u32,
    read: u32,
}

impl<T: Copy, M> Peek<'_, T, M> {
    /// Entries that can still be read.
    #[inline]
    pub(crate) fn left(&self) -> u32 {
        self.granted - self.read
    }

    /// Reads the entry `ahead` places after the next one, without moving on.
    #[inline]
    pub(crate) fn look(&self, ahead: u32) -> Option<T> {
        (ahead < self.left()).then(|| self.entry(self.read + ahead))
    }

    #[inline]
    fn entry(&self, offset: u32) -> T {
        let index = self.ring.consumed.wrapping_add(offset);
        self.ring.area.entry(index).with(|entry| {
            // SAFETY: entries from `consumed` to `consumed + granted` are the consumer's own: they
            // were observed by `SYNC entries`, and this is the sole consumer (contract of `new`).
            // Volatile, so that a checked value is the value that is used, whatever the other
            // side does.
            unsafe { entry.read_volatile() }
        })
    }

    /// Gives the entries read so far back to the producing side.
    #[inline]
    pub(crate) fn release(self) {
        // As in `commit`.
        if self.read == 0 {
            return;
        }
        self.ring.consumed = self.ring.consumed.wrapping_add(self.read);
        // SYNC room
        self.ring
            .area
            .consumer()
            .store(self.ring.consumed, order::publish_room());
    }
}

impl<T: Copy, M> Iterator for Peek<'_, T, M> {
    type Item = T;

    #[inline]
    fn next(&mut self) -> Option<T> {
        if self.read == self.granted {
            return None;
        }
        let entry = self.entry(self.read);
        self.read += 1;
        Some(entry)
    }
}

#[cfg(test)]
mod memory;
#[cfg(test)]
#[cfg(loom)]
mod model_loom;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
