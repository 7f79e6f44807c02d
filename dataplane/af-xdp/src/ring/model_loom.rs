//! Both ends at once, in every order that the memory model allows.
//!
//! Each end tries a fixed number of times and never waits for the other, so that loom can go
//! through all executions to their end: what arrives must be a beginning of what was sent. The
//! indices wrap on the way.

use super::memory::{pop, push, ring};

/// Entries one by one through a ring of one: each overwrites the one before, so both pairs of
/// orderings are needed.
#[test]
fn entries_arrive_once_whole_and_in_order() {
    loom::model(|| {
        let ((mut producer, mut consumer), _memory) = ring::<u32>(1, u32::MAX);
        let producing = loom::thread::spawn(move || {
            let mut next = 1;
            for _ in 0..3 {
                if push(&mut producer, next) {
                    next += 1;
                }
            }
        });
        let mut seen = 0;
        for _ in 0..3 {
            if let Some(value) = pop(&mut consumer) {
                seen += 1;
                assert_eq!(value, seen);
            }
        }
        producing.join().unwrap();
    });
}

/// Bursts of two through a ring of two: a guard covers several entries with one store.
#[test]
fn bursts_arrive_whole() {
    loom::model(|| {
        let ((mut producer, mut consumer), _memory) = ring::<u32>(2, u32::MAX - 1);
        let producing = loom::thread::spawn(move || {
            let mut next = 1;
            for _ in 0..3 {
                let mut entries = producer.reserve(2);
                while entries.left() > 0 {
                    entries.push(next);
                    next += 1;
                }
                entries.commit();
            }
        });
        let mut seen = 0;
        for _ in 0..3 {
            let mut entries = consumer.peek(2);
            for value in &mut entries {
                seen += 1;
                assert_eq!(value, seen);
            }
            entries.release();
        }
        producing.join().unwrap();
    });
}
