//! How an image becomes current, and when its memory may be written again.
//!
//! ```text
//!   region   header │ current │ slot headers │ slot 0 │ slot 1 │ …
//!                       │                        ▲
//!                       └── generation, slot ────┘
//!
//!   publisher                                     reader
//!   slot.generation = 0 (free it)                 target = current                       acquire   // SYNC publish
//!   fence                          // SYNC pin    pin = target                           release   // SYNC unpin
//!   every pin != this slot's word? // SYNC unpin  fence                                            // SYNC pin
//!   write the image                               slot.generation == target's generation?
//!   slot.generation = new                           yes: the image is pinned, read at leisure
//!   current = new       release    // SYNC publish  no: it is being replaced, take `current` again
//! ```
//!
//! **SYNC publish.** The publisher's release store to `current` makes the image's words, and the slot's generation and
//! length, visible to a reader whose acquire load returns that value. Without it a reader would see the new name and
//! old or half-written words. In the data plane one reader (the watcher) loads `current`, checks the image and hands
//! the same value to the workers through an atomic of the process, again with release and acquire.
//!
//! **SYNC pin.** Store then load on both sides: the publisher stores `generation = 0` and loads the pins; a reader
//! stores its pin and loads the generation. The two sequentially consistent fences forbid that both miss the other's
//! store. So either the publisher sees the pin and leaves the slot alone, or the reader sees that the slot is going
//! and does not read it. Without a fence a worker could read an image while it is being overwritten.
//!
//! **SYNC unpin.** A reader moves on by storing its next pin with release; the publisher's acquire load of that value
//! orders all the reader's earlier reads of the old image before the publisher's writes into it.
//!
//! A reader that is stopped (or just slow) keeps its pin, and its slot is not reused however long it takes: the
//! publisher goes on with the others. A publisher that dies in the middle leaves a free slot and `current` as it was.

use alloc::vec::Vec;
use core::fmt;

use crate::ABI_VERSION;
use crate::sync::{Ordering, Word, fence};

/// First word of a fib region: "RIPSFIB1".
pub const FIB_MAGIC: u64 = u64::from_le_bytes(*b"RIPSFIB1");
/// Slots of a region: one current, one being written, the rest for readers that are late.
pub const SLOTS: usize = 8;
/// Words of one slot: 32 MiB, of which only what is written takes memory; 100,000 leases need about 20 MiB.
pub const SLOT_WORDS: usize = 4 << 20;

const HEADER_WORDS: usize = 512;
const CURRENT: usize = 8;
const SLOT_HEADERS: usize = 16;
const SLOT_HEADER_WORDS: usize = 8;
const SLOT_GENERATION: usize = 0;
const SLOT_LENGTH: usize = 1;
const SLOT_BITS: u32 = 8;

const _: () = assert!(SLOT_HEADERS + SLOTS * SLOT_HEADER_WORDS <= HEADER_WORDS);
const _: () = assert!(SLOTS <= 1 << SLOT_BITS);

/// Words of a fib region with `slots` slots of `slot_words` words.
pub const fn region_words(slots: usize, slot_words: usize) -> usize {
    HEADER_WORDS + slots * slot_words
}

/// The name of a published image: its generation (counting from 1) and the slot that it lies in. Zero is no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageRef(pub u64);

impl ImageRef {
    fn new(generation: u64, slot: usize) -> Self {
        Self((generation << SLOT_BITS) | slot as u64)
    }

    /// The generation; 0 when nothing has been published.
    pub fn generation(self) -> u64 {
        self.0 >> SLOT_BITS
    }

    fn slot(self) -> usize {
        (self.0 & ((1 << SLOT_BITS) - 1)) as usize
    }
}

/// Why a region cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionError {
    /// The first word is not the magic number of such a region.
    Magic {
        /// The word found.
        found: u64,
        /// The word expected.
        expected: u64,
    },
    /// Written by a version with another layout.
    Abi {
        /// The version found.
        found: u64,
    },
    /// The size in the header does not match the memory, or is impossible.
    Length {
        /// Words that the header claims.
        claimed: u64,
        /// Words there are.
        words: usize,
    },
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic { found, expected } => {
                write!(
                    f,
                    "wrong magic: starts with {found:#018x}, a region of this kind with {expected:#018x}"
                )
            }
            Self::Abi { found } => write!(
                f,
                "layout version {found}, this program uses version {ABI_VERSION}"
            ),
            Self::Length { claimed, words } => {
                write!(f, "header claims {claimed} words, the region has {words}")
            }
        }
    }
}

impl core::error::Error for RegionError {}

/// A fib region whose header has been checked.
#[derive(Debug, Clone, Copy)]
pub struct Region<'r> {
    words: &'r [Word],
    slots: usize,
    slot_words: usize,
}

impl<'r> Region<'r> {
    /// Writes the header of an empty region into zeroed words. Only the publisher's process does this.
    ///
    /// # Panics
    /// When `words` is not [`region_words`] long: the caller sized it.
    pub fn format(words: &'r [Word], slots: usize, slot_words: usize) -> Self {
        assert_eq!(
            words.len(),
            region_words(slots, slot_words),
            "a fib region has exactly its header and its slots"
        );
        words[1].store(u64::from(ABI_VERSION), Ordering::Relaxed);
        words[2].store(words.len() as u64, Ordering::Relaxed);
        words[3].store(slots as u64, Ordering::Relaxed);
        words[4].store(slot_words as u64, Ordering::Relaxed);
        // Last, so that a file whose writer died half-way is refused instead of half-believed.
        words[0].store(FIB_MAGIC, Ordering::Release);
        Self {
            words,
            slots,
            slot_words,
        }
    }

    /// Checks the header of an existing region.
    ///
    /// # Errors
    /// When the magic, the version or the size is wrong.
    pub fn attach(words: &'r [Word]) -> Result<Self, RegionError> {
        let load = |index: usize| {
            words
                .get(index)
                .map_or(0, |word| word.load(Ordering::Acquire))
        };
        if load(0) != FIB_MAGIC {
            return Err(RegionError::Magic {
                found: load(0),
                expected: FIB_MAGIC,
            });
        }
        if load(1) != u64::from(ABI_VERSION) {
            return Err(RegionError::Abi { found: load(1) });
        }
        let wrong = RegionError::Length {
            claimed: load(2),
            words: words.len(),
        };
        let (Ok(slots), Ok(slot_words)) = (usize::try_from(load(3)), usize::try_from(load(4)))
        else {
            return Err(wrong);
        };
        let possible = (2..=SLOTS).contains(&slots) && slot_words <= words.len();
        if load(2) != words.len() as u64
            || !possible
            || words.len() != region_words(slots, slot_words)
        {
            return Err(wrong);
        }
        Ok(Self {
            words,
            slots,
            slot_words,
        })
    }

    /// The word that names the current image. Only the publisher stores it.
    pub fn current(&self) -> &'r Word {
        &self.words[CURRENT]
    }

    /// Copies the current image out, for a process that holds no pin (the operator's command line).
    ///
    /// Checked like a sequence lock: the copy counts only if the slot still has its generation afterwards.
    pub fn snapshot(&self) -> Option<(u64, Vec<Word>)> {
        for _ in 0..64 {
            let target = ImageRef(self.current().load(Ordering::Acquire)); // SYNC publish
            let words = self.image_words(target)?;
            let copy: Vec<Word> = words
                .iter()
                .map(|word| Word::new(word.load(Ordering::Relaxed)))
                .collect();
            fence(Ordering::Acquire);
            if self
                .slot_word(target.slot(), SLOT_GENERATION)
                .load(Ordering::Relaxed)
                == target.generation()
            {
                return Some((target.generation(), copy));
            }
        }
        None
    }

    /// The words of an image, if its slot still holds that generation with a possible length.
    fn image_words(&self, target: ImageRef) -> Option<&'r [Word]> {
        let slot = target.slot();
        if target.generation() == 0 || slot >= self.slots {
            return None;
        }
        if self
            .slot_word(slot, SLOT_GENERATION)
            .load(Ordering::Relaxed)
            != target.generation()
        {
            return None;
        }
        let length =
            usize::try_from(self.slot_word(slot, SLOT_LENGTH).load(Ordering::Relaxed)).ok()?;
        self.slot(slot).get(..length)
    }

    fn slot_word(&self, slot: usize, field: usize) -> &'r Word {
        &self.words[SLOT_HEADERS + slot * SLOT_HEADER_WORDS + field]
    }

    fn slot(&self, slot: usize) -> &'r [Word] {
        let start = HEADER_WORDS + slot * self.slot_words;
        &self.words[start..start + self.slot_words]
    }
}

/// Why an image could not be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishError {
    /// The image is larger than a slot.
    TooLarge {
        /// Words of the image.
        words: usize,
        /// Words of a slot.
        slot_words: usize,
    },
    /// Every other slot is pinned by a reader that has not moved on.
    AllPinned,
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { words, slot_words } => {
                write!(f, "the table has {} KiB, the region holds {} KiB", words / 128, slot_words / 128)
            }
            Self::AllPinned => f.write_str(
                "every free table slot is held by a worker that stopped running; look for stopped workers in `ripstop status`",
            ),
        }
    }
}

impl core::error::Error for PublishError {}

/// The one writer of a fib region.
#[derive(Debug)]
pub struct Publisher<'r> {
    region: Region<'r>,
    /// The sole writer's own copy of `current`.
    published: ImageRef,
}

impl<'r> Publisher<'r> {
    /// Takes over a region: goes on from the generation that it finds.
    pub fn adopt(region: Region<'r>) -> Self {
        let published = ImageRef(region.current().load(Ordering::Acquire));
        Self { region, published }
    }

    /// Generation of the last image published, 0 if none.
    pub fn generation(&self) -> u64 {
        self.published.generation()
    }

    /// The words of the current image, for comparing; `None` if nothing usable has been published.
    pub fn current_words(&self) -> Option<&'r [Word]> {
        self.region.image_words(self.published)
    }

    /// Copies an image into a slot that no reader pins and makes it current. Returns its generation.
    ///
    /// `pins` are the pin words of all readers that may be alive (see [`crate::stats::Stats::pins`]); they are read
    /// after the slot has been marked free.
    ///
    /// # Errors
    /// When the image does not fit, or every slot but the current one is pinned. Nothing has changed then.
    pub fn publish<'p>(
        &mut self,
        image: &[u64],
        pins: impl Fn() -> Vec<&'p Word>,
    ) -> Result<u64, PublishError> {
        if image.len() > self.region.slot_words {
            return Err(PublishError::TooLarge {
                words: image.len(),
                slot_words: self.region.slot_words,
            });
        }
        let slot = self.free_slot(pins).ok_or(PublishError::AllPinned)?;
        let generation = self.published.generation() + 1;
        for (word, value) in self.region.slot(slot).iter().zip(image) {
            word.store(*value, Ordering::Relaxed);
        }
        self.region
            .slot_word(slot, SLOT_LENGTH)
            .store(image.len() as u64, Ordering::Relaxed);
        self.region
            .slot_word(slot, SLOT_GENERATION)
            .store(generation, Ordering::Relaxed);
        self.published = ImageRef::new(generation, slot);
        self.region.current().store(self.published.0, ORDER_PUBLISH); // SYNC publish
        Ok(generation)
    }

    /// Finds a slot that is not current and that no reader pins, and marks it free.
    fn free_slot<'p>(&self, pins: impl Fn() -> Vec<&'p Word>) -> Option<usize> {
        let current = self.published;
        let candidates = (0..self.region.slots)
            .filter(|slot| current.generation() == 0 || *slot != current.slot());
        for slot in candidates {
            let word = self.region.slot_word(slot, SLOT_GENERATION);
            let old = word.load(Ordering::Relaxed);
            let held = ImageRef::new(old, slot).0;
            let unpinned =
                || old == 0 || pins().iter().all(|pin| pin.load(ORDER_UNPIN_LOAD) != held); // SYNC unpin
            // A slot that is seen pinned is not even marked: a reader about to share that pin would be turned away.
            if !unpinned() {
                continue;
            }
            word.store(0, Ordering::Relaxed);
            pin_fence(); // SYNC pin
            if unpinned() {
                return Some(slot);
            }
            word.store(old, Ordering::Relaxed);
        }
        None
    }
}

/// A reader that pins the image it uses. One per thread; its pin word is stored by nobody else.
#[derive(Debug)]
pub struct Reader<'r> {
    region: Region<'r>,
    pin: &'r Word,
    pinned: ImageRef,
    words: &'r [Word],
}

impl<'r> Reader<'r> {
    /// A reader that has nothing pinned yet.
    pub fn new(region: Region<'r>, pin: &'r Word) -> Self {
        pin.store(0, Ordering::Release);
        Self {
            region,
            pin,
            pinned: ImageRef::default(),
            words: &[],
        }
    }

    /// The image that is pinned; generation 0 if none.
    pub fn pinned(&self) -> ImageRef {
        self.pinned
    }

    /// The words of the pinned image.
    pub fn words(&self) -> &'r [Word] {
        self.words
    }

    /// Moves to the image that `source` names, if that is another one than the pinned one; returns whether it moved.
    ///
    /// `source` is the region's `current`, or a copy of it that another reader passes on after checking the image.
    /// The words of the image pinned before must not be used after this call: the caller takes [`Reader::words`] anew.
    #[inline]
    pub fn follow(&mut self, source: &Word) -> bool {
        let target = ImageRef(source.load(ORDER_FOLLOW)); // SYNC publish
        if target == self.pinned {
            return false;
        }
        self.move_to(target, source)
    }

    /// Gives up the pinned image.
    pub fn unpin(&mut self) {
        self.pinned = ImageRef::default();
        self.words = &[];
        self.pin.store(0, ORDER_UNPIN); // SYNC unpin
    }

    #[cold]
    fn move_to(&mut self, mut target: ImageRef, source: &Word) -> bool {
        // Each failure means that the publisher moved on meanwhile, so `source` names a newer image soon.
        for _ in 0..MOVE_TRIES {
            self.pin.store(target.0, ORDER_UNPIN); // SYNC unpin
            pin_fence(); // SYNC pin
            if let Some(words) = self.region.image_words(target) {
                self.words = words;
                self.pinned = target;
                return true;
            }
            target = ImageRef(source.load(ORDER_FOLLOW)); // SYNC publish
        }
        self.unpin();
        true
    }
}

#[cfg(not(loom))]
const MOVE_TRIES: usize = 1024;
#[cfg(loom)]
const MOVE_TRIES: usize = 2;

// The orderings that the protocol rests on have names, so that the concurrency tests can weaken each in turn
// (see tests/README.md) and must then fail.
mod order {
    use super::{Ordering, fence};

    pub(super) const ORDER_PUBLISH: Ordering = Ordering::Release;
    pub(super) const ORDER_FOLLOW: Ordering = Ordering::Acquire;
    pub(super) const ORDER_UNPIN: Ordering = Ordering::Release;
    pub(super) const ORDER_UNPIN_LOAD: Ordering = Ordering::Acquire;

    #[inline]
    pub(super) fn pin_fence() {
        fence(Ordering::SeqCst);
    }
}

use order::{ORDER_FOLLOW, ORDER_PUBLISH, ORDER_UNPIN, ORDER_UNPIN_LOAD, pin_fence};
