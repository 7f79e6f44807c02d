//! The protocol on plain memory: what holds after each step, whoever stops where.

use core::time::Duration;
use std::thread;
use std::time::Instant;

use ripstop_fib::publish::{ImageRef, PublishError, SLOTS, region_words};
use ripstop_fib::sync::{Ordering, words};
use ripstop_fib::{Publisher, Reader, Region, Word};

use crate::example::values;

const CURRENT: usize = 8;
const SLOT_WORDS: usize = 64;
/// Where the generation of a slot lies.
const fn generation_of(slot: usize) -> usize {
    16 + slot * 8
}

fn memory(slots: usize) -> Vec<Word> {
    let shared = words(&vec![0; region_words(slots, SLOT_WORDS)]);
    Region::format(&shared, slots, SLOT_WORDS);
    shared
}

/// An image whose every word tells its generation, of a length that varies.
fn content(generation: u64) -> Vec<u64> {
    let length = SLOT_WORDS / 2 + usize::try_from(generation % 32).unwrap();
    (0..length as u64)
        .map(|index| generation << 16 | index)
        .collect()
}

fn publish(publisher: &mut Publisher<'_>, pins: &[Word]) -> Result<u64, PublishError> {
    publisher.publish(&content(publisher.generation() + 1), || {
        pins.iter().collect()
    })
}

#[test]
fn a_reader_follows_from_image_to_image() {
    let shared = memory(2);
    let region = Region::attach(&shared).unwrap();
    let pins = words(&[0]);
    let mut reader = Reader::new(region, &pins[0]);
    assert!(!reader.follow(region.current()));
    assert_eq!((reader.pinned(), reader.words().len()), (ImageRef(0), 0));
    assert!(region.snapshot().is_none());

    let mut publisher = Publisher::adopt(region);
    assert_eq!(publisher.generation(), 0);
    assert!(publisher.current_words().is_none());
    for generation in 1..=5 {
        assert_eq!(publish(&mut publisher, &pins), Ok(generation));
        assert!(reader.follow(region.current()));
        assert!(!reader.follow(region.current()));
        assert_eq!(reader.pinned().generation(), generation);
        assert_eq!(values(reader.words()), content(generation));
        assert_eq!(
            values(publisher.current_words().unwrap()),
            content(generation)
        );
        let (found, copy) = region.snapshot().unwrap();
        assert_eq!((found, values(&copy)), (generation, content(generation)));
    }
    reader.unpin();
    assert_eq!((reader.pinned(), values(&pins)), (ImageRef(0), vec![0]));
    assert!(reader.follow(region.current()));
    assert_eq!(reader.pinned().generation(), 5);
}

#[test]
fn a_publisher_goes_on_where_the_last_one_stopped() {
    let shared = memory(3);
    let region = Region::attach(&shared).unwrap();
    let pins = words(&[0]);
    for generation in 1..20 {
        let mut publisher = Publisher::adopt(Region::attach(&shared).unwrap());
        assert_eq!(publisher.generation(), generation - 1);
        assert_eq!(publish(&mut publisher, &pins), Ok(generation));
    }
    let mut reader = Reader::new(region, &pins[0]);
    reader.follow(region.current());
    assert_eq!(values(reader.words()), content(19));
}

/// The steps of a publication as single stores; a publisher may be killed after each.
#[test]
fn a_killed_publisher_leaves_the_old_image_whole() {
    let image = content(2);
    let length = image.len() as u64;
    let mut steps: Vec<(usize, u64)> = vec![(generation_of(1), 0)];
    let slot = 512 + SLOT_WORDS;
    steps.extend(
        image
            .iter()
            .enumerate()
            .map(|(index, value)| (slot + index, *value)),
    );
    steps.extend([(generation_of(1) + 1, length), (generation_of(1), 2)]);
    for killed_after in 0..=steps.len() {
        let shared = memory(2);
        let region = Region::attach(&shared).unwrap();
        let pins = words(&[0, 0]);
        publish(&mut Publisher::adopt(region), &pins).unwrap();
        let mut early = Reader::new(region, &pins[0]);
        early.follow(region.current());
        for (index, value) in &steps[..killed_after] {
            shared[*index].store(*value, Ordering::Relaxed);
        }

        let mut late = Reader::new(region, &pins[1]);
        late.follow(region.current());
        for reader in [&early, &late] {
            assert_eq!(
                reader.pinned().generation(),
                1,
                "after {killed_after} steps"
            );
            assert_eq!(values(reader.words()), content(1));
        }
        assert_eq!(region.snapshot().unwrap().0, 1);

        let mut next = Publisher::adopt(region);
        assert_eq!(publish(&mut next, &pins), Ok(2));
        late.follow(region.current());
        assert_eq!(values(late.words()), content(2));
        assert_eq!(values(early.words()), content(1));
    }
}

/// A publisher freed a slot, a reader that had pinned it just before kept it, and then the publisher was killed: there
/// is no generation in the slot any more, but there is a pin.
#[test]
fn a_pin_counts_although_a_killed_publisher_freed_the_slot() {
    let shared = memory(3);
    let region = Region::attach(&shared).unwrap();
    let pins = words(&[0, 0]);
    let mut publisher = Publisher::adopt(region);
    publish(&mut publisher, &pins).unwrap();
    let mut reader = Reader::new(region, &pins[0]);
    reader.follow(region.current());
    publish(&mut publisher, &pins).unwrap();
    shared[generation_of(0)].store(0, Ordering::Relaxed);

    let mut next = Publisher::adopt(region);
    for generation in 3..10 {
        assert_eq!(publish(&mut next, &pins), Ok(generation));
        assert_eq!(values(reader.words()), content(1));
    }
}

#[test]
fn a_stopped_readers_image_is_never_overwritten() {
    let shared = memory(SLOTS);
    let region = Region::attach(&shared).unwrap();
    let pins = words(&[0; 8]);
    let mut publisher = Publisher::adopt(region);
    let mut stopped: Vec<Reader<'_>> = Vec::new();
    let mut running = Reader::new(region, &pins[7]);
    for generation in 1..=if cfg!(miri) { 40 } else { 600 } {
        assert_eq!(publish(&mut publisher, &pins), Ok(generation));
        running.follow(region.current());
        assert_eq!(values(running.words()), content(generation));
        if generation % 5 == 0 && stopped.len() < SLOTS - 2 {
            let mut reader = Reader::new(region, &pins[stopped.len()]);
            reader.follow(region.current());
            stopped.push(reader);
        }
        for reader in &stopped {
            assert_eq!(
                values(reader.words()),
                content(reader.pinned().generation())
            );
        }
    }
}

#[test]
fn nothing_changes_when_every_slot_is_pinned() {
    let shared = memory(SLOTS);
    let region = Region::attach(&shared).unwrap();
    let pins = words(&[0; SLOTS]);
    let mut publisher = Publisher::adopt(region);
    let mut readers: Vec<Reader<'_>> = Vec::new();
    for pin in &pins {
        publish(&mut publisher, &pins).unwrap();
        let mut reader = Reader::new(region, pin);
        reader.follow(region.current());
        readers.push(reader);
    }
    let before = values(&shared);
    let error = publish(&mut publisher, &pins).unwrap_err();
    assert_eq!(error, PublishError::AllPinned);
    assert!(
        error
            .to_string()
            .contains("look for stopped workers in `ripstop status`")
    );
    assert_eq!(values(&shared), before);
    assert_eq!(publisher.generation(), 8);

    readers[3].unpin();
    assert_eq!(publish(&mut publisher, &pins), Ok(9));
    for (reader, generation) in readers
        .iter()
        .zip(1..)
        .filter(|(_, generation)| *generation != 4)
    {
        assert_eq!(values(reader.words()), content(generation));
    }
}

/// `current` is read by everybody; what it says is never believed unchecked.
#[test]
fn an_impossible_current_is_no_image() {
    let lengths = [0, 1, SLOT_WORDS as u64 + 1, u64::MAX];
    for current in [1, 0x00ff, 0x0102, 0x01ff, 0x0200, 1 << 63, u64::MAX] {
        for length in lengths {
            let shared = memory(2);
            let region = Region::attach(&shared).unwrap();
            let pins = words(&[0]);
            publish(&mut Publisher::adopt(region), &pins).unwrap();
            shared[generation_of(0) + 1].store(length, Ordering::Relaxed);
            shared[CURRENT].store(current, Ordering::Relaxed);
            let mut reader = Reader::new(region, &pins[0]);
            reader.follow(region.current());
            assert_eq!((reader.pinned(), reader.words().len()), (ImageRef(0), 0));
            assert!(region.snapshot().is_none());
            let mut publisher = Publisher::adopt(region);
            assert!(publisher.current_words().is_none());
            // The first may repeat a generation that nobody can ask for; then all is well again.
            publish(&mut publisher, &pins).unwrap();
            publish(&mut publisher, &pins).unwrap();
            assert!(reader.follow(region.current()));
        }
    }
}

/// Real threads: one publisher, a watcher that passes on, workers that follow it, one that follows by itself and often
/// stops for a while, and one that copies.
#[test]
fn every_image_is_whole_while_the_publisher_runs() {
    let duration = Duration::from_millis(if cfg!(miri) { 1 } else { 700 });
    let last = if cfg!(miri) { 12 } else { u64::MAX };
    let shared = memory(4);
    let (pins, accepted) = (words(&[0; 6]), Word::new(0));
    let done = Word::new(0);
    let running = || done.load(Ordering::Relaxed) == 0;
    let region = Region::attach(&shared).unwrap();
    let check = |words: &[Word], generation: u64| {
        let expected = if generation == 0 {
            Vec::new()
        } else {
            content(generation)
        };
        assert_eq!(values(words), expected, "generation {generation}");
    };
    let (published, refused) = thread::scope(|scope| {
        for pin in &pins[2..5] {
            let accepted = &accepted;
            scope.spawn(move || {
                let mut worker = Reader::new(region, pin);
                while running() {
                    worker.follow(accepted);
                    check(worker.words(), worker.pinned().generation());
                }
            });
        }
        scope.spawn(|| {
            let mut checking = Reader::new(region, &pins[0]);
            let mut kept = Reader::new(region, &pins[1]);
            while running() {
                checking.follow(region.current());
                check(checking.words(), checking.pinned().generation());
                if checking.pinned() != kept.pinned() && checking.pinned().generation() != 0 {
                    checking.pass_on(&accepted);
                    core::mem::swap(&mut checking, &mut kept);
                    checking.unpin();
                }
            }
        });
        scope.spawn(|| {
            let mut late = Reader::new(region, &pins[5]);
            while running() {
                late.follow(region.current());
                for _ in 0..50 {
                    check(late.words(), late.pinned().generation());
                    thread::yield_now();
                }
            }
        });
        scope.spawn(|| {
            while running() {
                if let Some((generation, copy)) = region.snapshot() {
                    check(&copy, generation);
                }
            }
        });
        let mut publisher = Publisher::adopt(region);
        let (start, mut refused) = (Instant::now(), 0u64);
        while start.elapsed() < duration && publisher.generation() < last {
            if publish(&mut publisher, &pins).is_err() {
                refused += 1;
                thread::yield_now();
            }
        }
        done.store(1, Ordering::Relaxed);
        (publisher.generation(), refused)
    });
    assert!(
        published > 10 || cfg!(miri),
        "published {published}, refused {refused}"
    );
}
