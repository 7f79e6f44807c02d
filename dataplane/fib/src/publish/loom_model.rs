//! The protocol explored: by loom in every interleaving of a tiny region, by Miri in many random ones, natively a few
//! thousand times. One body for all three.
//!
//! Values alone cannot show a missing SYNC unpin, for neither tool lets a load return a value that is stored later.
//! So every slot has a *witness* beside it, memory that is not atomic: written where the publisher may write the slot,
//! read where a reader may read it. Both tools report any two such accesses that nothing orders.
#![expect(
    unsafe_code,
    reason = "the witness is memory whose accesses only the protocol orders"
)]

use alloc::vec::Vec;

#[cfg(loom)]
use loom::{cell::UnsafeCell, sync::Arc, thread};
#[cfg(not(loom))]
use std::{sync::Arc, thread};

use super::{ImageRef, Publisher, Reader, Region, region_words};
use crate::sync::{Word, words};

/// Two are the fewest: one current, one to write. So every publication but the first writes where the one before last
/// was, which is what the protocol is about.
const SLOTS: usize = 2;
const SLOT_WORDS: usize = 2;
const PINS: usize = 3;
/// Loom finds every chance in the fewest steps. Where chance decides, more steps are more chances.
const ROUNDS: usize = if cfg!(loom) { 1 } else { 8 };
const PUBLICATIONS: usize = if cfg!(loom) { 2 } else { 8 };
const GENERATIONS: usize = PUBLICATIONS + 2;

struct Shared {
    region: Vec<Word>,
    pins: [Word; PINS],
    accepted: Word,
    witnesses: [UnsafeCell<u64>; SLOTS],
    /// What the watcher notes about an image before it passes it on, one place for each generation.
    notes: [UnsafeCell<u64>; GENERATIONS],
}

// SAFETY: the words are atomics; whether the witnesses may be shared is what the tests find out.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        let shared = Self {
            region: words(&[0; region_words(SLOTS, SLOT_WORDS)]),
            pins: core::array::from_fn(|_| Word::new(0)),
            accepted: Word::new(0),
            witnesses: core::array::from_fn(|_| UnsafeCell::new(0)),
            notes: core::array::from_fn(|_| UnsafeCell::new(0)),
        };
        Region::format(&shared.region, SLOTS, SLOT_WORDS);
        Arc::new(shared)
    }

    /// The region without the checks of `attach`, whose loads loom would explore for nothing.
    fn region(&self) -> Region<'_> {
        Region {
            words: &self.region,
            slots: SLOTS,
            slot_words: SLOT_WORDS,
        }
    }

    fn publish(&self, publisher: &mut Publisher<'_>) {
        let image = content(publisher.generation() + 1);
        let Some(slot) = publisher.free_slot(|| self.pins.iter().collect()) else {
            return;
        };
        // SAFETY: the pointer is valid; the slot has been freed, so no reader reads it.
        self.witnesses[slot].with_mut(|witness| unsafe { *witness = image[0] });
        publisher.fill(slot, &image);
    }

    fn publish_several(&self) {
        let mut publisher = Publisher::adopt(self.region());
        for _ in 0..PUBLICATIONS {
            self.publish(&mut publisher);
        }
    }

    fn follow_and_check(&self, reader: &mut Reader<'_>, source: &Word) {
        reader.follow(source);
        let ImageRef(pinned) = reader.pinned();
        if pinned == 0 {
            return;
        }
        let expected = content(reader.pinned().generation());
        assert_eq!(values(reader.words()), expected, "another image's words");
        // SAFETY: the pointer is valid; the slot is pinned, so the publisher does not write it.
        let witness = self.witnesses[reader.pinned().slot()].with(|witness| unsafe { *witness });
        assert_eq!(witness, expected[0], "another image's witness");
    }
}

impl Shared {
    /// The watcher: follows `current` with one pin, checks, passes on, and lets go of the image before.
    fn watch(&self) {
        let mut checking = Reader::new(self.region(), &self.pins[0]);
        let mut accepted = Reader::new(self.region(), &self.pins[1]);
        for _ in 0..ROUNDS {
            if self.check_and_pass_on(&mut checking, accepted.pinned()) {
                core::mem::swap(&mut checking, &mut accepted);
                checking.unpin();
            }
        }
    }

    fn check_and_pass_on(&self, checking: &mut Reader<'_>, accepted: ImageRef) -> bool {
        self.follow_and_check(checking, self.region().current());
        if checking.pinned() == ImageRef(0) || checking.pinned() == accepted {
            return false;
        }
        let note = &self.notes[place(checking)];
        // SAFETY: the pointer is valid; nobody reads the note before the image has been passed on.
        note.with_mut(|note| unsafe { *note = checking.pinned().0 });
        checking.pass_on(&self.accepted);
        true
    }

    /// A worker: follows what the watcher passes on.
    fn work(&self) {
        let mut worker = Reader::new(self.region(), &self.pins[2]);
        for _ in 0..ROUNDS {
            self.follow_and_check(&mut worker, &self.accepted);
            if worker.pinned() != ImageRef(0) {
                // SAFETY: the pointer is valid; the watcher wrote the note before it passed the image on.
                let note = self.notes[place(&worker)].with(|note| unsafe { *note });
                assert_eq!(note, worker.pinned().0, "used before it was checked");
            }
        }
    }
}

/// Every word is a function of the generation, and no two are alike.
fn content(generation: u64) -> [u64; SLOT_WORDS] {
    [generation * 10 + 1, generation * 10 + 2]
}

fn values(words: &[Word]) -> Vec<u64> {
    let load = |word: &Word| word.load(super::Ordering::Relaxed);
    words.iter().map(load).collect()
}

/// The first image: nothing is pinned, so only SYNC publish is at work.
#[test]
fn a_reader_that_sees_the_first_image_sees_it_whole() {
    explore(3, || {
        let shared = Shared::new();
        let publishing = spawn(&shared, |shared| {
            shared.publish(&mut Publisher::adopt(shared.region()));
        });
        let mut reader = Reader::new(shared.region(), &shared.pins[0]);
        for _ in 0..ROUNDS {
            shared.follow_and_check(&mut reader, shared.region().current());
        }
        publishing.join().unwrap();
    });
}

/// The reader's image is replaced, and its slot wanted, while it reads, moves on and lets go.
#[test]
fn a_pinned_image_is_not_written() {
    explore(3, || {
        let shared = Shared::new();
        shared.publish(&mut Publisher::adopt(shared.region()));
        let publishing = spawn(&shared, Shared::publish_several);
        let mut reader = Reader::new(shared.region(), &shared.pins[0]);
        for _ in 0..ROUNDS {
            shared.follow_and_check(&mut reader, shared.region().current());
            shared.follow_and_check(&mut reader, shared.region().current());
            reader.unpin();
        }
        publishing.join().unwrap();
    });
}

/// The data plane's hand-over: what the watcher noted about an image before it passed it on is there for the worker.
///
/// The watcher ends there. Loom makes every sequentially consistent fence happen before the next one and does not try
/// other threads at fences, so the fence of a further move would hide a hand-over without release.
#[test]
fn a_worker_uses_only_what_the_watcher_has_checked() {
    explore(3, || {
        let shared = Shared::new();
        shared.publish(&mut Publisher::adopt(shared.region()));
        let watching = spawn(&shared, |shared| {
            let mut checking = Reader::new(shared.region(), &shared.pins[0]);
            shared.check_and_pass_on(&mut checking, ImageRef(0));
        });
        shared.work();
        watching.join().unwrap();
    });
}

/// The same while images are replaced: both of the watcher's pins and the worker's are at work.
#[test]
fn a_worker_gets_whole_images_from_the_watcher() {
    explore(2, || {
        let shared = Shared::new();
        let publishing = spawn(&shared, Shared::publish_several);
        let watching = spawn(&shared, Shared::watch);
        shared.work();
        publishing.join().unwrap();
        watching.join().unwrap();
    });
}

/// A copy without a pin is whole or thrown away.
#[test]
fn a_snapshot_is_one_image() {
    explore(3, || {
        let shared = Shared::new();
        shared.publish(&mut Publisher::adopt(shared.region()));
        let publishing = spawn(&shared, Shared::publish_several);
        for _ in 0..ROUNDS {
            if let Some((generation, copy)) = shared.region().snapshot() {
                assert_eq!(values(&copy), content(generation), "a mixed copy");
            }
        }
        publishing.join().unwrap();
    });
}

/// Where the note about the reader's image lies.
fn place(reader: &Reader<'_>) -> usize {
    usize::try_from(reader.pinned().generation()).unwrap()
}

fn spawn(
    shared: &Arc<Shared>,
    body: impl FnOnce(&Shared) + Send + 'static,
) -> thread::JoinHandle<()> {
    let shared = Arc::clone(shared);
    thread::spawn(move || body(&shared))
}

/// Runs a body in all interleavings with at most so many preemptions.
#[cfg(loom)]
fn explore(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(preemptions);
    }
    builder.check(body);
}

/// Runs a body again and again: under Miri the seed decides what happens in each run.
#[cfg(not(loom))]
fn explore(_preemptions: usize, body: impl Fn()) {
    for _ in 0..if cfg!(miri) { 2 } else { 1000 } {
        body();
    }
}

/// The cell that loom checks, without loom: Miri checks any memory.
#[cfg(not(loom))]
struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
