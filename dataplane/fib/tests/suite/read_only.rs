//! Readers map the fib region read-only, and observers the stats region. Core promises only relaxed atomic loads to
//! work there; Miri knows that rule and stops at any other, so it must be Miri that runs this.
#![expect(unsafe_code, reason = "memory that is really read-only is a static")]

use ripstop_fib::publish::region_words;
use ripstop_fib::stats::{STATS_WORDS, Stats};
use ripstop_fib::{Publisher, Reader, Region, Word};

const FIB_WORDS: usize = region_words(2, 2);

/// A region with generation 1 in slot 0.
static FIB: [u64; FIB_WORDS] = {
    let mut words = [0; FIB_WORDS];
    words[0] = ripstop_fib::publish::FIB_MAGIC;
    words[1] = 2;
    words[2] = FIB_WORDS as u64;
    words[3] = 2;
    words[4] = 2;
    words[8] = 1 << 8;
    words[16] = 1;
    words[17] = 1;
    words
};

/// A region of one worker.
static STATS: [u64; STATS_WORDS] = {
    let mut words = [0; STATS_WORDS];
    words[0] = ripstop_fib::stats::STATS_MAGIC;
    words[1] = 2;
    words[2] = STATS_WORDS as u64;
    words[6] = 1;
    words[7] = 1;
    words
};

fn shared(words: *const [u64]) -> &'static [Word] {
    // SAFETY: a static lives for ever, and an atomic has the layout of its integer. Relaxed loads are all that happens
    // to it, which is what these tests are about.
    unsafe { &*(words as *const [Word]) }
}

#[test]
#[cfg_attr(
    miri,
    ignore = "only tree borrows allow an atomic in such memory at all"
)]
fn readers_load_what_read_only_memory_allows() {
    let region = Region::attach(shared(&raw const FIB)).unwrap();
    let pin = Word::new(0);
    let mut reader = Reader::new(region, &pin);
    assert!(reader.follow(region.current()));
    assert_eq!((reader.pinned().generation(), reader.words().len()), (1, 1));
    assert_eq!(region.snapshot().unwrap().0, 1);
    reader.unpin();
}

#[test]
#[cfg_attr(
    miri,
    ignore = "only tree borrows allow an atomic in such memory at all"
)]
fn observers_load_what_read_only_memory_allows() {
    let stats = Stats::attach(shared(&raw const STATS)).unwrap();
    assert_eq!((stats.workers().len(), stats.nics().len()), (1, 1));
    // The publisher reads the pins of a data plane whose region it cannot write.
    let fib: Vec<Word> = FIB.iter().map(|value| Word::new(*value)).collect();
    let mut publisher = Publisher::adopt(Region::attach(&fib).unwrap());
    assert_eq!(publisher.publish(&[1], || stats.pins()), Ok(2));
}
