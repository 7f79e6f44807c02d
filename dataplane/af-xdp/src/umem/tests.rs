use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Lender, QueueId, Settled, Umem, UmemOptions};
use crate::frame::Frame;
use crate::sys;

const ONE: Lender = Lender(0);
const OTHER: Lender = Lender(1);

fn umem(frames: u32) -> Umem {
    Umem::new(&UmemOptions {
        frames,
        ..UmemOptions::default()
    })
    .unwrap()
}

fn descriptor(addr: u64, len: u32) -> sys::xdp_desc {
    sys::xdp_desc {
        addr,
        len,
        options: 0,
    }
}

/// All that is wrong with a UMEM whose frames are not each in one place.
fn assert_sums_up(umem: &Umem) {
    let census = umem.census();
    let sum = census.free + census.held + census.receiving + census.transmitting;
    assert_eq!(census.frames, sum);
}

#[test]
fn every_frame_can_be_taken_once() {
    let mut umem = umem(8);
    let mut frames: Vec<_> = (0..8).map(|_| umem.take().unwrap()).collect();
    assert!(umem.take().is_none());
    assert_eq!(umem.outstanding(), 8);
    let chunks: HashSet<_> = frames.iter().map(|frame| frame.chunk).collect();
    assert_eq!(chunks.len(), 8);
    let last = frames.pop().unwrap();
    let chunk = last.chunk;
    umem.give(last);
    let again = umem.take().unwrap();
    assert_eq!(
        again.chunk, chunk,
        "the last frame given is the first taken"
    );
    umem.give(again);
    for frame in frames {
        umem.give(frame);
    }
    assert_eq!(umem.census().free, 8);
}

#[test]
fn slices_of_different_frames_coexist() {
    let mut umem = umem(2);
    let mut one = umem.take().unwrap();
    let mut other = umem.take().unwrap();
    let from = umem.whole_mut(&mut one, 0).unwrap();
    let to = umem.whole_mut(&mut other, 0).unwrap();
    from.fill(1);
    to.fill(2);
    from[5] = 9;
    to[..10].copy_from_slice(&from[..10]);
    assert_eq!(to[..7], [1, 1, 1, 1, 1, 9, 1]);
    let len = from.len();
    one.set_len(len).unwrap();
    assert_eq!(umem.packet(&one).len(), 2048 - 24);
    assert!(umem.spare_mut(&mut one).is_empty());
    umem.give(one);
    umem.give(other);
}

#[test]
fn the_kernel_cannot_return_what_it_was_not_lent() {
    let mut umem = umem(4);
    let lent = umem.lend_to_receive(ONE).unwrap();
    let held = umem.take().unwrap();
    let held_at = u64::from(held.chunk) << 11;
    let wrong = [
        held_at + 256,    // somebody holds it
        3 * 2048 + 256,   // it is free
        4 * 2048 + 256,   // beyond the last frame
        lent + (1 << 43), // far beyond
        u64::MAX,
        u64::MAX << 11,
    ];
    for addr in wrong {
        assert!(
            umem.received(ONE, descriptor(addr, 60)).is_none(),
            "{addr:#x}"
        );
        assert!(!umem.transmitted(ONE, addr), "{addr:#x}");
    }
    assert!(
        umem.received(OTHER, descriptor(lent + 256, 60)).is_none(),
        "lent to another"
    );
    assert!(!umem.transmitted(ONE, lent), "lent for receiving");
    let frame = umem.received(ONE, descriptor(lent + 256, 60)).unwrap();
    assert!(
        umem.received(ONE, descriptor(lent + 256, 60)).is_none(),
        "returned twice"
    );
    assert_sums_up(&umem);

    let sent = umem.lend_to_transmit(ONE, frame);
    assert!(!umem.transmitted(OTHER, sent.addr), "lent to another");
    assert!(umem.received(ONE, sent).is_none(), "lent for transmitting");
    assert!(umem.transmitted(ONE, sent.addr));
    assert!(!umem.transmitted(ONE, sent.addr), "returned twice");
    umem.give(held);
    assert_eq!(umem.census().free, 4);
}

#[test]
fn a_packet_outside_its_frame_is_refused_and_the_frame_is_free() {
    let mut umem = umem(4);
    let wrong = [
        (23, 60),
        (256, 1793),
        (2047, 2),
        (24, 2025),
        (256, u32::MAX),
    ];
    for (start, len) in wrong {
        let lent = umem.lend_to_receive(ONE).unwrap();
        let refused = umem.received(ONE, descriptor(lent + start, len));
        assert!(refused.is_none(), "{start} {len}");
        assert_eq!(umem.census().free, 4);
    }
}

#[test]
fn frames_come_back_when_their_queue_has_another_socket() {
    let mut umem = umem(8);
    let socket = || Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let settled = Settled {
        need_wakeup: true,
        multi_buffer: false,
    };
    let id = |queue| {
        Some(QueueId {
            namespace: 1,
            interface: 2,
            queue,
        })
    };
    let (first, second) = (socket(), socket());
    let one = umem.add_socket(&first, settled, id(0)).unwrap();
    let other = umem.add_socket(&second, settled, id(1)).unwrap();
    let lent = umem.lend_to_receive(one).unwrap();
    let frame = umem.take().unwrap();
    let sent = umem.lend_to_transmit(one, frame).addr;
    umem.lend_to_receive(other).unwrap();
    let held = umem.take().unwrap();

    // The first socket's queue went to a third, while a half of the first is still about.
    let third = umem.add_socket(&socket(), settled, id(0)).unwrap();
    assert_eq!(
        umem.census().free,
        6,
        "one is with the other socket, one is held"
    );
    assert!(umem.received(one, descriptor(lent + 256, 60)).is_none());
    assert!(!umem.transmitted(one, sent));
    assert_ne!(third, one, "stale rings must not speak for a new socket");

    // Once it is gone, its place is free; a place whose frames are not back is not.
    drop(first);
    drop(second);
    assert_eq!(umem.add_socket(&socket(), settled, id(2)).unwrap(), one);
    let again = umem.add_socket(&socket(), settled, id(3)).unwrap();
    assert!(again != other && again != third);
    assert_sums_up(&umem);
    umem.give(held);
}

#[test]
fn a_umem_has_a_limited_number_of_sockets() {
    let mut umem = umem(1);
    let socket = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let settled = Settled {
        need_wakeup: true,
        multi_buffer: false,
    };
    for _ in 0..126 {
        umem.add_socket(&socket, settled, None).unwrap();
    }
    let error = umem.add_socket(&socket, settled, None).unwrap_err();
    assert!(error.to_string().contains("sockets = 127"), "{error}");
}

#[test]
#[should_panic(expected = "a UMEM that it does not belong to")]
fn a_frame_of_another_umem_cannot_be_read() {
    let mut one = umem(1);
    let other = umem(1);
    let frame = one.take().unwrap();
    other.packet(&frame);
}

#[test]
#[should_panic(expected = "a UMEM that it does not belong to")]
fn a_frame_of_another_umem_cannot_be_given() {
    let mut one = umem(1);
    let mut other = umem(1);
    other.give(one.take().unwrap());
}

#[test]
#[should_panic(expected = "a UMEM that it does not belong to")]
fn a_frame_of_another_umem_cannot_be_sent() {
    let mut one = umem(1);
    let mut other = umem(1);
    other.lend_to_transmit(ONE, one.take().unwrap());
}

#[test]
fn a_worker_can_be_moved_to_its_thread() {
    fn is_send<T: Send>() {}
    is_send::<Umem>();
    is_send::<Frame>();
    is_send::<crate::Receiver>();
    is_send::<crate::Transmitter>();
    is_send::<crate::SocketHandle>();
}

#[derive(Clone, Debug)]
enum Edit {
    PushFront(Vec<u8>),
    PopFront(usize),
    Truncate(usize),
    Append(Vec<u8>),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..120).prop_map(Edit::PushFront),
        (0..300_usize).prop_map(Edit::PopFront),
        (0..2100_usize).prop_map(Edit::Truncate),
        prop::collection::vec(any::<u8>(), 0..700).prop_map(Edit::Append),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// A packet in a frame is a deque of bytes with two ends that stop somewhere, and does not
    /// touch its neighbours.
    #[test]
    fn a_packet_is_a_bounded_deque(edits in prop::collection::vec(edit(), 0..40)) {
        let mut umem = umem(3);
        let [mut before, mut frame, mut after] = [(); 3].map(|()| umem.take().unwrap());
        for neighbour in [&mut before, &mut after] {
            umem.whole_mut(neighbour, 0).unwrap().fill(0xaa);
        }
        let mut oracle = VecDeque::new();
        for edit in edits {
            match edit {
                Edit::PushFront(bytes) => {
                    let fits = bytes.len() <= frame.headroom();
                    prop_assert_eq!(frame.push_front(bytes.len()).is_ok(), fits);
                    if fits {
                        umem.packet_mut(&mut frame)[..bytes.len()].copy_from_slice(&bytes);
                        for &byte in bytes.iter().rev() {
                            oracle.push_front(byte);
                        }
                    }
                }
                Edit::PopFront(count) => {
                    let fits = count <= oracle.len();
                    prop_assert_eq!(frame.pop_front(count).is_ok(), fits);
                    if fits {
                        oracle.drain(..count);
                    }
                }
                Edit::Truncate(len) => {
                    frame.truncate(len);
                    oracle.truncate(len);
                }
                Edit::Append(bytes) => {
                    let spare = umem.spare_mut(&mut frame);
                    let fits = bytes.len() <= spare.len();
                    if fits {
                        spare[..bytes.len()].copy_from_slice(&bytes);
                    }
                    prop_assert_eq!(frame.set_len(frame.len() + bytes.len()).is_ok(), fits);
                    if fits {
                        oracle.extend(bytes);
                    }
                }
            }
            prop_assert!(umem.packet(&frame).iter().eq(oracle.iter()));
            prop_assert_eq!(frame.headroom() + frame.len() + frame.tailroom(), 2024);
        }
        for mut neighbour in [before, after] {
            prop_assert!(umem.whole_mut(&mut neighbour, 0).unwrap().iter().all(|&b| b == 0xaa));
            umem.give(neighbour);
        }
        umem.give(frame);
    }

    /// Frames go round between pool, holder and kernel in any order, and none is lost or doubled.
    #[test]
    fn frames_are_conserved(steps in prop::collection::vec((0..6_u8, any::<prop::sample::Index>()), 0..300)) {
        let mut umem = umem(16);
        let mut held: Vec<Frame> = Vec::new();
        let mut receiving = Vec::new();
        let mut transmitting = Vec::new();
        for (step, which) in steps {
            match step {
                0 => held.extend(umem.take()),
                1 => receiving.extend(umem.lend_to_receive(ONE)),
                2 if !held.is_empty() => umem.give(held.swap_remove(which.index(held.len()))),
                3 if !held.is_empty() => {
                    let frame = held.swap_remove(which.index(held.len()));
                    transmitting.push(umem.lend_to_transmit(ONE, frame).addr);
                }
                4 if !receiving.is_empty() => {
                    let address = receiving.swap_remove(which.index(receiving.len()));
                    held.extend(umem.received(ONE, descriptor(address + 256, 60)));
                }
                5 if !transmitting.is_empty() => {
                    let address = transmitting.swap_remove(which.index(transmitting.len()));
                    prop_assert!(umem.transmitted(ONE, address));
                }
                _ => {}
            }
            let census = umem.census();
            prop_assert_eq!(census.held as usize, held.len());
            prop_assert_eq!(census.receiving as usize, receiving.len());
            prop_assert_eq!(census.transmitting as usize, transmitting.len());
            assert_sums_up(&umem);
            let chunks: HashSet<_> = held.iter().map(|frame| frame.chunk).collect();
            prop_assert_eq!(chunks.len(), held.len(), "two tokens for one frame");
        }
    }
}
