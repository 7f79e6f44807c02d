//! A ring in plain memory, as if kernel and socket were two parts of one program.

use core::ptr::NonNull;
use std::sync::Arc;

use super::{Area, Consumer, Producer};
use crate::sync::{AtomicU32, UnsafeCell};

pub(super) struct Plain<T> {
    pub(super) producer: AtomicU32,
    pub(super) consumer: AtomicU32,
    pub(super) flags: AtomicU32,
    entries: Box<[UnsafeCell<T>]>,
}

// SAFETY: the cells are reached only through the two ends of the ring, whose protocol keeps their
// accesses apart; that it does is what the tests are for.
unsafe impl<T: Send> Sync for Plain<T> {}

pub(super) type Ends<T> = (Producer<T, Arc<Plain<T>>>, Consumer<T, Arc<Plain<T>>>);

/// An empty ring of `size` entries whose indices stand at `start`.
pub(super) fn ring<T: Copy + Default>(size: u32, start: u32) -> (Ends<T>, Arc<Plain<T>>) {
    let memory = Arc::new(Plain {
        producer: AtomicU32::new(start),
        consumer: AtomicU32::new(start),
        flags: AtomicU32::new(0),
        entries: (0..size).map(|_| UnsafeCell::new(T::default())).collect(),
    });
    (ends(&memory), memory)
}

/// Both ends of a ring where it stands. The ends made before must be gone.
pub(super) fn ends<T: Copy>(memory: &Arc<Plain<T>>) -> Ends<T> {
    let area = || Area {
        producer: NonNull::from(&memory.producer),
        consumer: NonNull::from(&memory.consumer),
        flags: NonNull::from(&memory.flags),
        entries: NonNull::from(&*memory.entries).cast(),
        size: memory.entries.len().try_into().unwrap(),
    };
    // SAFETY: the memory is kept by the ring, has `size` entries, and gets one producer; integers
    // take any bits.
    let producer = unsafe { Producer::new(area(), Arc::clone(memory)) };
    // SAFETY: as above, and one consumer.
    let consumer = unsafe { Consumer::new(area(), Arc::clone(memory)) };
    (producer, consumer)
}

/// Writes `value` and commits it, if there is room.
pub(super) fn push<T: Copy, M>(producer: &mut Producer<T, M>, value: T) -> bool {
    let mut entries = producer.reserve(1);
    if entries.left() == 0 {
        return false;
    }
    entries.push(value);
    entries.commit();
    true
}

/// Reads an entry and releases it, if there is one.
pub(super) fn pop<T: Copy, M>(consumer: &mut Consumer<T, M>) -> Option<T> {
    let mut entries = consumer.peek(1);
    let value = entries.next();
    entries.release();
    value
}
