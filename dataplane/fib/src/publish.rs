//! How an image becomes current, and when its memory may be written again.
//!
//! ```text
//!   region   header │ current │ slot headers │ slot 0 │ slot 1 │ …
//!                       │                        ▲
//!                       └── generation, slot ────┘
//!
//!   publisher                                     reader
//!   no pin names the slot?                        target = current
//!   slot.generation = 0 (free it)                 pin = target                           release   // SYNC unpin
//!   fence                          // SYNC pin    fence                         // SYNC pin, publish
//!   still no pin names the slot?                  slot.generation == target's generation?
//!   fence                acquire   // SYNC unpin    yes: the image is pinned, read at leisure
//!   write the image                                 no: it is being replaced, take `current` again
//!   slot.generation = new
//!   current = new        release   // SYNC publish
//! ```
//!
//! **SYNC publish.** The publisher's release store to `current` makes the image's words, and the slot's generation and
//! length, visible to whoever loads that value and then passes an acquire fence. Without it a reader would see the new
//! name and old or half-written words. A reader's fence is the one of SYNC pin, which it needs anyway; a snapshot has a
//! fence of its own. In the data plane one reader (the watcher) follows `current`, checks the image and hands the same
//! value to the workers through a second word ([`Reader::pass_on`]), again with release and acquire.
//!
//! **SYNC pin.** Store then load on both sides: the publisher stores `generation = 0` and loads the pins; a reader
//! stores its pin and loads the generation. The two sequentially consistent fences forbid that both miss the other's
//! store. So either the publisher sees the pin and leaves the slot alone, or the reader sees that the slot is going
//! and does not read it. Without a fence a worker could read an image while it is being overwritten.
//!
//! **SYNC unpin.** A reader moves on by storing its next pin with release; the publisher's loads of the pins and the
//! acquire fence behind them order all the reader's earlier reads of the old image before the publisher's writes into
//! it. Without it a slow load of the old image could return a word of the next one.
//!
//! **SYNC snapshot.** A copy taken without a pin is checked like a sequence lock: a copied word that was written later
//! makes the `generation = 0` before it (and before the publisher's fence) visible behind the copier's acquire fence,
//! so the copy is thrown away. Without that fence a mixed copy could pass for whole.
//!
//! **SYNC format.** The magic is stored last, with release: who sees it sees the rest of the header.
//!
//! Readers map the region read-only, and on such memory only relaxed loads are sure to be plain loads (core's
//! documentation of atomics says so): so every load that another process's read-only mapping may see is relaxed, and
//! the acquire is a fence behind it.
//!
//! A pin counts by the slot that it names, whatever the generation: a publisher that was killed after it freed a slot
//! leaves generation 0 there, perhaps beside a reader that had pinned it just before.
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

// Loom keeps a history of every word and Miri is slow: in their models no room is spared for cache lines, and a reader
// gives up soon.
const MODELLED: bool = cfg!(any(loom, all(miri, test)));
const HEADER_WORDS: usize = if MODELLED { 32 } else { 512 };
const CURRENT: usize = 8;
const SLOT_HEADERS: usize = 16;
const SLOT_HEADER_WORDS: usize = if MODELLED { 2 } else { 8 };
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

    /// Whether this is an image of that slot, of whatever generation.
    fn lies_in(self, slot: usize) -> bool {
        self.generation() != 0 && self.slot() == slot
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

/// Checks what all regions begin with: magic, version, size. Returns the error to give when the size, right as it is,
/// does not suit what else the header says.
pub(crate) fn check_header(words: &[Word], expected: u64) -> Result<RegionError, RegionError> {
    let load = |index: usize| {
        words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    };
    let found = load(0);
    if found != expected {
        return Err(RegionError::Magic { found, expected });
    }
    fence(Ordering::Acquire); // SYNC format
    if load(1) != u64::from(ABI_VERSION) {
        return Err(RegionError::Abi { found: load(1) });
    }
    let wrong = RegionError::Length {
        claimed: load(2),
        words: words.len(),
    };
    if load(2) == words.len() as u64 && words.len() >= HEADER_WORDS {
        Ok(wrong)
    } else {
        Err(wrong)
    }
}

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
        words[0].store(FIB_MAGIC, Ordering::Release); // SYNC format
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
        let wrong = check_header(words, FIB_MAGIC)?;
        let load = |index: usize| usize::try_from(words[index].load(Ordering::Relaxed));
        let (Ok(slots), Ok(slot_words)) = (load(3), load(4)) else {
            return Err(wrong);
        };
        let possible = (2..=SLOTS).contains(&slots) && slot_words <= words.len();
        if !possible || words.len() != region_words(slots, slot_words) {
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

    /// Copies the current image out, for a process that holds no pin (the operator's command line); `None` if nothing
    /// usable has been published.
    ///
    /// Checked like a sequence lock: the copy counts only if the slot still has its generation afterwards.
    pub fn snapshot(&self) -> Option<(u64, Vec<Word>)> {
        for _ in 0..SNAPSHOT_TRIES {
            let target = ImageRef(self.current().load(Ordering::Relaxed));
            snapshot_begins(); // SYNC publish
            if target.generation() == 0 {
                return None;
            }
            // Gone already when two images have been published since: the next try finds the newer one.
            let Some(words) = self.image_words(target) else {
                continue;
            };
            let copy: Vec<Word> = words
                .iter()
                .map(|word| Word::new(word.load(Ordering::Relaxed)))
                .collect();
            snapshot_ends(); // SYNC snapshot
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
    /// The sole writer's own copy of the slots' generations.
    generations: [u64; SLOTS],
}

impl<'r> Publisher<'r> {
    /// Takes over a region: goes on from the generation that it finds.
    pub fn adopt(region: Region<'r>) -> Self {
        let published = ImageRef(region.current().load(Ordering::Acquire));
        let generations = core::array::from_fn(|slot| {
            if slot < region.slots {
                region
                    .slot_word(slot, SLOT_GENERATION)
                    .load(Ordering::Relaxed)
            } else {
                0
            }
        });
        Self {
            region,
            published,
            generations,
        }
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
    /// after the slot has been marked free. A data plane that restarts has its pins in another stats region, so the
    /// caller opens that region anew for each call: a data plane that starts after that finds the image that was
    /// current before this call, and this call leaves that one alone.
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
        Ok(self.fill(slot, image))
    }

    /// Finds a slot that is not current and that no reader pins, and marks it free.
    fn free_slot<'p>(&mut self, pins: impl Fn() -> Vec<&'p Word>) -> Option<usize> {
        let pinned = |slot: usize| {
            pins()
                .iter()
                .any(|pin| ImageRef(pin.load(Ordering::Relaxed)).lies_in(slot))
        };
        for slot in (0..self.region.slots).filter(|slot| !self.published.lies_in(*slot)) {
            // A slot that is seen pinned is not even marked: a reader about to share that pin would be turned away.
            if pinned(slot) {
                continue;
            }
            let generation = self.region.slot_word(slot, SLOT_GENERATION);
            generation.store(0, Ordering::Relaxed);
            publisher_pin_fence(); // SYNC pin
            if !pinned(slot) {
                unpin_fence(); // SYNC unpin
                self.generations[slot] = 0;
                return Some(slot);
            }
            generation.store(self.generations[slot], Ordering::Relaxed);
        }
        None
    }

    /// Writes an image into a slot that has been freed, and makes it current.
    fn fill(&mut self, slot: usize, image: &[u64]) -> u64 {
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
        self.generations[slot] = generation;
        self.published = ImageRef::new(generation, slot);
        self.region.current().store(self.published.0, ORDER_PUBLISH); // SYNC publish
        generation
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
        // Relaxed: the image's words are read behind the fence in `move_to`.
        let target = ImageRef(source.load(Ordering::Relaxed));
        if target == self.pinned {
            return false;
        }
        self.move_to(target, source)
    }

    /// Names the pinned image in `accepted`, for readers that follow that word instead of the region's `current`.
    ///
    /// The image stays pinned until they had time to follow: pass on first, then let go of the image before.
    pub fn pass_on(&self, accepted: &Word) {
        accepted.store(self.pinned.0, ORDER_PASS_ON); // SYNC publish
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
            reader_pin_fence(); // SYNC pin, publish
            if let Some(words) = self.region.image_words(target) {
                self.words = words;
                self.pinned = target;
                return true;
            }
            target = ImageRef(source.load(Ordering::Relaxed));
        }
        self.unpin();
        true
    }
}

const MOVE_TRIES: usize = if MODELLED { 2 } else { 1024 };
const SNAPSHOT_TRIES: usize = if MODELLED { 2 } else { 64 };

/// The orderings that the protocol rests on have names, so that the models can weaken each in turn and must then fail
/// (`mutations.sh` beside this crate's manifest).
mod order {
    use super::{Ordering, fence};

    /// Whether the ordering of this name is to be weakened, which only the builds for loom and Miri can ask for.
    #[cfg(any(loom, miri))]
    const fn weak(name: &str) -> bool {
        let Some(asked) = option_env!("RIPSTOP_MUTATE") else {
            return false;
        };
        let (name, asked) = (name.as_bytes(), asked.as_bytes());
        let mut same = name.len() == asked.len();
        let mut index = 0;
        while same && index < name.len() {
            same = name[index] == asked[index];
            index += 1;
        }
        same
    }

    #[cfg(not(any(loom, miri)))]
    const fn weak(_name: &str) -> bool {
        false
    }

    const fn release(name: &str) -> Ordering {
        if weak(name) {
            Ordering::Relaxed
        } else {
            Ordering::Release
        }
    }

    pub(super) const ORDER_PUBLISH: Ordering = release("publish");
    pub(super) const ORDER_PASS_ON: Ordering = release("pass-on");
    pub(super) const ORDER_UNPIN: Ordering = release("unpin");

    #[inline]
    pub(super) fn publisher_pin_fence() {
        fence(if weak("pin-publisher") {
            Ordering::AcqRel
        } else {
            Ordering::SeqCst
        });
    }

    #[inline]
    pub(super) fn reader_pin_fence() {
        fence(if weak("pin-reader") {
            Ordering::AcqRel
        } else if weak("follow") {
            Ordering::Release
        } else {
            Ordering::SeqCst
        });
    }

    #[inline]
    pub(super) fn unpin_fence() {
        if !weak("unpin-seen") {
            fence(Ordering::Acquire);
        }
    }

    pub(super) fn snapshot_begins() {
        if !weak("snapshot-begin") {
            fence(Ordering::Acquire);
        }
    }

    pub(super) fn snapshot_ends() {
        if !weak("snapshot-end") {
            fence(Ordering::Acquire);
        }
    }
}

use order::{
    ORDER_PASS_ON, ORDER_PUBLISH, ORDER_UNPIN, publisher_pin_fence, reader_pin_fence,
    snapshot_begins, snapshot_ends, unpin_fence,
};

#[cfg(test)]
mod loom_model;
