//! The halves against a kernel that the test plays, on rings in private memory: what a real kernel
//! does not do must do no harm.

use core::ffi::c_int;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::{
    BusyPoll, FRUITLESS_CALLS, ModeInUse, PACKET_FRAMES_MAX, Receiver, SocketOptions, Transmitter,
    Waking, ring_area,
};
use crate::frame::Frame;
use crate::mapping::Mapping;
use crate::ring::{Area, Consumer, Producer};
use crate::sys;
use crate::umem::{Settled, Umem, UmemOptions};

const ENTRIES: u32 = 128;

/// A socket whose kernel is the test.
struct Fake {
    umem: Umem,
    receiver: Receiver,
    transmitter: Transmitter,
    kernel_fill: Consumer<u64, ()>,
    kernel_rx: Producer<sys::xdp_desc, ()>,
    kernel_tx: Consumer<sys::xdp_desc, ()>,
    kernel_completion: Producer<u64, ()>,
}

/// One ring seen from both sides, and its memory.
fn ring<T>() -> (Area<T>, Area<T>, Mapping) {
    let at = sys::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        flags: 128,
        desc: 192,
    };
    let len = 192 + ENTRIES as usize * size_of::<T>();
    let memory = Mapping::anonymous(len, 0).unwrap();
    let area = || ring_area(&memory, &at, ENTRIES).unwrap();
    (area(), area(), memory)
}

fn fake(multi_buffer: bool) -> Fake {
    let mut umem = Umem::new(&UmemOptions {
        frames: 256,
        ..UmemOptions::default()
    })
    .unwrap();
    let socket: Arc<OwnedFd> = Arc::new(File::open("/dev/null").unwrap().into());
    let settled = Settled {
        need_wakeup: true,
        multi_buffer,
    };
    let lender = umem.add_socket(&socket, settled, None).unwrap();
    let (fill, kernel_fill, fill_memory) = ring();
    let (rx, kernel_rx, rx_memory) = ring();
    let (tx, kernel_tx, tx_memory) = ring();
    let (completion, kernel_completion, completion_memory) = ring();
    let receiver = Receiver {
        // SAFETY: `ring` gives areas within the memory that goes with it; one producer.
        fill: unsafe { Producer::new(fill, fill_memory) },
        // SAFETY: as above; one consumer.
        rx: unsafe { Consumer::new(rx, rx_memory) },
        umem: umem.id(),
        lender,
        multi_buffer,
        discarding: false,
        refused: 0,
        waking: Waking::new(&SocketOptions::default()),
        socket: Arc::clone(&socket),
        object: "fake0 queue 0".into(),
    };
    let transmitter = Transmitter {
        // SAFETY: as above; one producer.
        tx: unsafe { Producer::new(tx, tx_memory) },
        // SAFETY: as above; one consumer.
        completion: unsafe { Consumer::new(completion, completion_memory) },
        umem: umem.id(),
        lender,
        settled,
        mode: ModeInUse::Copy,
        refused: 0,
        unsendable: 0,
        waking: Waking::new(&SocketOptions::default()),
        socket,
        object: "fake0 queue 0".into(),
    };
    Fake {
        umem,
        receiver,
        transmitter,
        // SAFETY: the memory lives in `receiver`, beside this; one consumer.
        kernel_fill: unsafe { Consumer::new(kernel_fill, ()) },
        // SAFETY: as above; one producer.
        kernel_rx: unsafe { Producer::new(kernel_rx, ()) },
        // SAFETY: the memory lives in `transmitter`, beside this; one consumer.
        kernel_tx: unsafe { Consumer::new(kernel_tx, ()) },
        // SAFETY: as above; one producer.
        kernel_completion: unsafe { Producer::new(kernel_completion, ()) },
    }
}

impl Fake {
    /// Refills and takes so many frames as the kernel would.
    fn frames(&mut self, count: u32) -> Vec<u64> {
        self.receiver.refill(&mut self.umem, count as usize);
        let mut entries = self.kernel_fill.peek(count);
        let addresses: Vec<_> = entries.by_ref().collect();
        entries.release();
        assert_eq!(addresses.len(), count as usize);
        addresses
    }

    /// Puts descriptors into the RX ring: address, and whether the packet goes on.
    fn deliver(&mut self, descriptors: &[(u64, bool)]) {
        let mut entries = self
            .kernel_rx
            .reserve(descriptors.len().try_into().unwrap());
        for &(address, continues) in descriptors {
            entries.push(sys::xdp_desc {
                addr: address + 256,
                len: 60,
                options: if continues { sys::XDP_PKT_CONTD } else { 0 },
            });
        }
        entries.commit();
    }

    /// Receives, and gives the chain of `continues` that arrived.
    fn receive(&mut self, frames_max: usize) -> Vec<bool> {
        let mut burst = Vec::new();
        let count = self
            .receiver
            .receive(&mut self.umem, &mut burst, frames_max);
        assert_eq!(count, burst.len());
        let chain = burst.iter().map(Frame::continues).collect();
        for frame in burst {
            self.umem.give(frame);
        }
        chain
    }
}

#[test]
fn a_frame_delivered_twice_is_received_once() {
    let mut fake = fake(false);
    let [one, two] = fake.frames(2)[..] else {
        unreachable!()
    };
    fake.deliver(&[(one, false), (one, false), (two, false), (1 << 40, false)]);
    assert_eq!(fake.receive(64), [false, false]);
    assert_eq!(fake.receiver.faults(), 2);
    assert_eq!(fake.umem.census().free, 256);
}

#[test]
fn a_continued_packet_on_a_plain_socket_is_refused() {
    let mut fake = fake(false);
    let frames = fake.frames(2);
    fake.deliver(&[(frames[0], true), (frames[1], false)]);
    assert_eq!(fake.receive(64), [false]);
    assert_eq!(fake.receiver.faults(), 1);
    assert_eq!(fake.umem.census().free, 256);
}

#[test]
fn packets_of_several_frames_are_never_torn() {
    let mut fake = fake(true);
    let at = fake.frames(8);
    // One frame, three frames, and a beginning.
    let chain = [false, true, true, false, true, true];
    let descriptors: Vec<_> = at.iter().copied().zip(chain).collect();
    fake.deliver(&descriptors);
    assert_eq!(
        fake.receive(1),
        chain[..4],
        "no packet is cut, and no beginning comes alone"
    );
    assert_eq!(fake.receive(64), [false; 0]);
    assert_eq!(fake.receiver.in_rx(), 2);
    fake.deliver(&[(at[6], false), (at[7], false)]);
    assert_eq!(fake.receive(64), [true, true, false, false]);
    assert_eq!(fake.receiver.faults(), 0);
    assert_eq!(fake.umem.census().free, 256);
}

#[test]
fn a_packet_with_a_refused_frame_is_thrown_away_whole() {
    for bad in 0..3 {
        let mut fake = fake(true);
        let at = fake.frames(5);
        let mut packet = [(at[1], true), (at[2], true), (at[3], false)];
        packet[bad].0 = at[0];
        fake.deliver(&[(at[0], false)]);
        fake.deliver(&packet);
        fake.deliver(&[(at[4], false)]);
        // at[0] comes first and again within the packet, when it is no longer lent.
        assert_eq!(
            fake.receive(64),
            [false, false],
            "frame {bad} of the packet is bad"
        );
        assert_eq!(fake.receiver.faults(), 1);
        let census = fake.umem.census();
        assert_eq!(
            (census.held, census.receiving),
            (0, 1),
            "the frame not delivered"
        );
    }
}

#[test]
fn a_packet_without_end_does_not_block_the_ring() {
    let mut fake = fake(true);
    let count = u32::try_from(PACKET_FRAMES_MAX).unwrap();
    let at = fake.frames(count + 3);
    let endless: Vec<_> = at[..PACKET_FRAMES_MAX].iter().map(|&a| (a, true)).collect();
    fake.deliver(&endless);
    assert_eq!(fake.receive(64), [false; 0]);
    assert_eq!(fake.receiver.faults(), 1);
    let rest = &at[PACKET_FRAMES_MAX..];
    fake.deliver(&[(rest[0], true), (rest[1], false), (rest[2], false)]);
    assert_eq!(fake.receive(64), [false], "its end is thrown away too");
    assert_eq!(fake.umem.census().free, 256);
}

#[test]
fn a_frame_completed_twice_is_free_once() {
    let mut fake = fake(false);
    let mut frame = fake.umem.take().unwrap();
    frame.set_len(60).unwrap();
    let mut burst = vec![frame];
    assert_eq!(fake.transmitter.send(&mut fake.umem, &mut burst), 1);
    assert_eq!(fake.umem.census().transmitting, 1);
    let mut entries = fake.kernel_tx.peek(1);
    let sent = entries.next().unwrap();
    entries.release();
    let mut entries = fake.kernel_completion.reserve(3);
    for address in [sent.addr, sent.addr, u64::MAX] {
        entries.push(address);
    }
    entries.commit();
    assert_eq!(fake.transmitter.reclaim(&mut fake.umem, 64), 1);
    assert_eq!(fake.transmitter.faults(), 2);
    assert_eq!(fake.umem.census().free, 256);
}

#[test]
#[should_panic(expected = "a UMEM that it was not opened on")]
fn a_socket_refuses_another_umem() {
    let mut one = fake(false);
    let mut other = fake(false);
    one.receiver.refill(&mut other.umem, 1);
}

fn prefers_polling(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let value: c_int = sys::option(fd, sys::SOL_SOCKET, sys::SO_PREFER_BUSY_POLL)?;
    Ok(value != 0)
}

/// A driver that only an interrupt moves.
fn wakeup_without_polling(fd: BorrowedFd<'_>) -> io::Result<()> {
    match prefers_polling(fd)? {
        false => Ok(()),
        true => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// As root: the preference takes CAP_NET_ADMIN. Any socket has it.
#[test]
fn a_socket_whose_polling_moves_nothing_asks_for_an_interrupt() {
    let socket: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
    let fd = socket.as_fd();
    sys::set_option(fd, sys::SOL_SOCKET, sys::SO_PREFER_BUSY_POLL, 1).unwrap();
    let mut waking = Waking::new(&SocketOptions {
        busy_poll: Some(BusyPoll {
            timeout_us: 20,
            budget: 64,
        }),
        ..SocketOptions::default()
    });
    for _time in 0..2 {
        for _call in 0..FRUITLESS_CALLS {
            assert!(waking.call(&socket, wakeup_without_polling).is_err());
            waking.note(false);
        }
        waking.call(&socket, wakeup_without_polling).unwrap();
        assert!(prefers_polling(fd).unwrap(), "polling goes on");
        waking.note(true);
    }
}

#[test]
fn a_socket_that_does_not_poll_is_woken_as_it_is() {
    let socket: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
    let mut waking = Waking::new(&SocketOptions::default());
    for _call in 0..=2 * FRUITLESS_CALLS {
        waking.call(&socket, wakeup_without_polling).unwrap();
        waking.note(false);
    }
    assert!(!prefers_polling(socket.as_fd()).unwrap());
}
