use core::sync::atomic::Ordering;
use std::collections::VecDeque;
use std::thread;

use proptest::prelude::*;

use super::memory::{ends, pop, push, ring};

/// Where indices start in the table-driven tests: fresh, about to wrap, and wrapping in the middle
/// of a ring of four.
const STARTS: [u32; 4] = [0, u32::MAX, u32::MAX - 1, u32::MAX - 2];

#[test]
fn a_ring_holds_exactly_its_size() {
    for start in STARTS {
        let ((mut producer, mut consumer), _memory) = ring::<u32>(4, start);
        for lap in 0..3 {
            for value in 0..4 {
                assert!(push(&mut producer, lap * 4 + value));
            }
            assert!(!push(&mut producer, 99), "the ring is full");
            assert_eq!((producer.pending(), consumer.pending()), (4, 4));
            for value in 0..4 {
                assert_eq!(pop(&mut consumer), Some(lap * 4 + value));
            }
            assert_eq!(pop(&mut consumer), None, "the ring is empty");
            assert_eq!((producer.pending(), consumer.pending()), (0, 0));
        }
    }
}

#[test]
fn nothing_moves_before_commit_and_release() {
    let ((mut producer, mut consumer), _memory) = ring::<u32>(4, u32::MAX);
    producer.reserve(2).push(1);
    assert_eq!(pop(&mut consumer), None, "an uncommitted entry was seen");

    let mut entries = producer.reserve(4);
    entries.push(2);
    entries.push(3);
    entries.commit();
    let mut entries = consumer.peek(4);
    assert_eq!(entries.left(), 2, "only what was written is committed");
    assert_eq!(entries.next(), Some(2));
    assert_eq!(pop(&mut consumer), Some(2), "an unreleased entry stays");
    assert_eq!(pop(&mut consumer), Some(3));
}

#[test]
fn looking_ahead_takes_nothing() {
    let ((mut producer, mut consumer), _memory) = ring::<u32>(2, u32::MAX);
    push(&mut producer, 1);
    push(&mut producer, 2);
    let mut entries = consumer.peek(2);
    assert_eq!(
        [entries.look(0), entries.look(1), entries.look(2)],
        [Some(1), Some(2), None]
    );
    assert_eq!(entries.next(), Some(1));
    assert_eq!([entries.look(0), entries.look(1)], [Some(2), None]);
}

#[test]
fn an_end_goes_on_where_the_ring_stands() {
    let ((mut producer, _), memory) = ring::<u32>(4, u32::MAX);
    push(&mut producer, 1);
    push(&mut producer, 2);
    let (mut producer, mut consumer) = ends(&memory);
    assert!(push(&mut producer, 3));
    assert!(push(&mut producer, 4));
    assert!(!push(&mut producer, 5), "the adopted ring is full");
    for value in 1..=4 {
        assert_eq!(pop(&mut consumer), Some(value));
    }
}

#[test]
fn impossible_indices_give_nothing_and_are_counted() {
    for wild in [5, 6, 1 << 31, u32::MAX - 4, u32::MAX] {
        for start in STARTS {
            let ((mut producer, mut consumer), memory) = ring::<u32>(4, start);
            memory
                .producer
                .store(start.wrapping_add(wild), Ordering::Relaxed);
            assert_eq!(consumer.peek(4).left(), 0, "{wild} entries in a ring of 4");
            assert_eq!(consumer.peek(4).left(), 0, "still");
            assert_eq!(consumer.faults(), 2);
            assert!(consumer.pending() <= 4);
            // Once the other side is sane again, so is this one.
            memory.producer.store(start, Ordering::Relaxed);
            assert!(push(&mut producer, 7));
            assert_eq!(pop(&mut consumer), Some(7));

            let ((mut producer, _consumer), memory) = ring::<u32>(4, start);
            memory
                .consumer
                .store(start.wrapping_add(wild), Ordering::Relaxed);
            let granted = producer.reserve(4).left();
            assert!(granted <= 4, "{granted} entries granted in a ring of 4");
            while push(&mut producer, 0) {}
            assert!(producer.pending() <= 4);
        }
    }
}

#[test]
fn the_kernel_asks_for_a_wakeup() {
    let ((producer, _consumer), memory) = ring::<u32>(4, 0);
    assert!(!producer.needs_wakeup());
    memory.flags.store(1, Ordering::Relaxed);
    assert!(producer.needs_wakeup());
}

#[test]
#[should_panic(expected = "a push beyond the reservation")]
fn a_reservation_cannot_be_overrun() {
    let ((mut producer, _consumer), _memory) = ring::<u32>(4, 0);
    let mut entries = producer.reserve(1);
    entries.push(1);
    entries.push(2);
}

/// Two threads at full speed; Miri looks for data races in it.
#[test]
fn two_threads_exchange_everything() {
    let count = if cfg!(miri) { 40_u64 } else { 200_000 };
    let ((mut producer, mut consumer), _memory) = ring::<[u64; 2]>(4, u32::MAX - 7);
    let producing = thread::spawn(move || {
        let mut next = 0;
        while next < count {
            let wanted = 1 + u32::try_from(next % 3).unwrap();
            let mut entries = producer.reserve(wanted);
            if entries.left() == 0 {
                thread::yield_now();
            }
            while entries.left() > 0 {
                entries.push([next, !next]);
                next += 1;
            }
            entries.commit();
        }
        next
    });
    let mut next = 0;
    // The producer may write a little more than `count`.
    while next < count {
        let mut entries = consumer.peek(3);
        if entries.left() == 0 {
            thread::yield_now();
        }
        for value in &mut entries {
            assert_eq!(value, [next, !next]);
            next += 1;
        }
        entries.release();
    }
    assert!(producing.join().unwrap() >= next);
}

#[derive(Clone, Debug)]
enum Step {
    /// Reserve, write some of it, commit or not.
    Produce {
        reserve: u32,
        write: u32,
        commit: bool,
    },
    /// Peek, read some of it, release or not.
    Consume { peek: u32, read: u32, release: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20_u32, 0..20_u32, any::<bool>()).prop_map(|(reserve, write, commit)| Step::Produce {
            reserve,
            write,
            commit
        }),
        (0..20_u32, 0..20_u32, any::<bool>()).prop_map(|(peek, read, release)| Step::Consume {
            peek,
            read,
            release
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 512 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// A ring is a FIFO of bounded length, whatever the order of steps and wherever indices start.
    #[test]
    fn a_ring_is_a_fifo(
        exponent in 0..5_u32,
        start in prop_oneof![any::<u32>(), u32::MAX - 40..=u32::MAX],
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let size = 1 << exponent;
        let ((mut producer, mut consumer), _memory) = ring::<u32>(size, start);
        let mut oracle = VecDeque::new();
        let mut next = 0;
        for step in steps {
            match step {
                Step::Produce { reserve, write, commit } => {
                    let mut entries = producer.reserve(reserve);
                    let room = size - u32::try_from(oracle.len()).unwrap();
                    prop_assert_eq!(entries.left(), reserve.min(room));
                    let written = write.min(entries.left());
                    for value in next..next + written {
                        entries.push(value);
                    }
                    if commit {
                        entries.commit();
                        oracle.extend(next..next + written);
                        next += written;
                    }
                }
                Step::Consume { peek, read, release } => {
                    let mut entries = consumer.peek(peek);
                    let there = u32::try_from(oracle.len()).unwrap();
                    prop_assert_eq!(entries.left(), peek.min(there));
                    let read: Vec<_> = entries.by_ref().take(read as usize).collect();
                    prop_assert!(read.iter().eq(oracle.iter().take(read.len())));
                    if release {
                        entries.release();
                        oracle.drain(..read.len());
                    }
                }
            }
            prop_assert_eq!(producer.pending() as usize, oracle.len());
            prop_assert_eq!(consumer.pending() as usize, oracle.len());
            prop_assert_eq!(producer.faults() + consumer.faults(), 0);
        }
    }
}
