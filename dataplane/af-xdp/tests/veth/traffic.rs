//! Packets through sockets, and where the frames are meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;

use af_xdp::{BusyPoll, Memory, ModeInUse, Registration, SocketOptions, Umem, UmemOptions};

use crate::lab::Lab;
use crate::port::{
    BURST, Port, assert_conserved, flush, listen, open, packet, read_packet, redirect, small_umem,
    until, write_packet,
};

#[test]
fn packets_arrive_whole_and_in_order() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions::default();
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let mut to = Port::open(&lab, "b0", &small_umem(), &options).listening(&lab, false);
    assert_eq!(
        to.socket.handle.mode(),
        ModeInUse::Copy,
        "veth has no zero-copy"
    );
    assert!(
        from.socket.transmitter.needs_wakeup(),
        "copy mode waits for a kick"
    );

    for (round, len) in (0..100).zip((60..1514).step_by(13)) {
        let numbers = round * BURST..(round + 1) * BURST;
        from.send(numbers.clone(), len);
        to.expect(numbers);
    }
    for port in [&from, &to] {
        port.assert_conserved();
        assert_eq!(port.umem.outstanding(), 0);
    }
}

#[test]
fn packets_pass_through_a_umem_with_other_settings() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let umem = UmemOptions {
        frames: 256,
        frame_size: 4096,
        headroom: 128,
        memory: Memory::File,
        tx_metadata: true,
        ..UmemOptions::default()
    };
    let options = SocketOptions {
        need_wakeup: false,
        fill_entries: 64,
        rx_entries: 128,
        tx_entries: 64,
        completion_entries: 128,
        busy_poll: Some(BusyPoll {
            timeout_us: 20,
            budget: 64,
        }),
        tx_budget: Some(64),
        ..SocketOptions::default()
    };
    let mut from = Port::open(&lab, "a0", &umem, &options);
    let mut to = Port::open(&lab, "b0", &umem, &options).listening(&lab, false);
    assert!(
        from.socket.transmitter.needs_wakeup(),
        "without need-wakeup, always kick"
    );
    for round in 0..20 {
        let numbers = round * BURST..(round + 1) * BURST;
        from.send(numbers.clone(), 1514);
        to.expect(numbers);
        to.socket.receiver.wake().expect("the interface is up");
    }
    from.assert_conserved();
    to.assert_conserved();
}

#[test]
fn received_packets_have_headroom_for_a_tunnel_header() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions::default();
    for headroom in [0, 100] {
        let umem = UmemOptions {
            headroom,
            ..small_umem()
        };
        let mut from = Port::open(&lab, "a0", &small_umem(), &options);
        let mut to = Port::open(&lab, "b0", &umem, &options).listening(&lab, false);
        from.send(0..1, 60);
        let mut burst = Vec::new();
        until("a packet", || {
            to.socket.receiver.receive(&mut to.umem, &mut burst, 1) == 1
        });
        let frame = burst.pop().expect("one frame");
        let fresh = to.umem.take().expect("a free frame");
        assert_eq!(frame.headroom(), 256 - 24 + usize::from(headroom));
        assert_eq!(
            frame.headroom(),
            fresh.headroom(),
            "fresh frames are like received ones"
        );
        to.umem.give(frame);
        to.umem.give(fresh);
    }
}

/// A worker between two pairs, on one UMEM: every packet is encapsulated in place and leaves on
/// the other port.
#[test]
fn two_sockets_on_one_umem_forward_in_place() {
    forward_in_place(Registration::Shared);
}

#[test]
fn two_sockets_with_a_registration_each_forward_in_place() {
    forward_in_place(Registration::Own);
}

fn forward_in_place(registration: Registration) {
    const OUTER: usize = 50;
    let lab = Lab::new();
    lab.veth("g0", "w0", 1500);
    lab.veth("w1", "s0", 1600);
    let options = SocketOptions::default();
    let mut generator = Port::open(&lab, "g0", &small_umem(), &options);
    let mut sink = Port::open(&lab, "s0", &small_umem(), &options).listening(&lab, false);

    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let mut inner = open(&lab, &mut umem, "w0", &options);
    let second = SocketOptions {
        registration,
        // What a shared registration would have to inherit.
        need_wakeup: registration == Registration::Shared,
        ..options.clone()
    };
    let mut outer = open(&lab, &mut umem, "w1", &second);
    let _redirect = listen(&lab, &mut umem, &mut inner, false);
    let mut burst = Vec::with_capacity(BURST as usize);

    for round in 0..100 {
        let numbers = round * BURST..(round + 1) * BURST;
        generator.send(numbers.clone(), 60);
        let mut next = numbers.start;
        until("forwarded packets", || {
            outer.transmitter.reclaim(&mut umem, usize::MAX);
            inner.receiver.refill(&mut umem, BURST as usize);
            inner
                .receiver
                .receive(&mut umem, &mut burst, BURST as usize);
            for frame in &mut burst {
                // The number moves out with the start, so the sink sees one packet of 110 bytes.
                let number = read_packet(umem.packet(frame)).unwrap_or(u32::MAX);
                frame
                    .push_front(OUTER)
                    .expect("headroom for an outer header");
                write_packet(umem.packet_mut(frame), number);
            }
            flush(&mut outer.transmitter, &mut umem, &mut burst);
            let census = umem.census();
            let sum = census.free + census.held + census.receiving + census.transmitting;
            assert_eq!(
                sum, census.frames,
                "a frame is nowhere or twice: {census:?}"
            );
            for number in sink.receive() {
                if number != u32::MAX {
                    assert_eq!(number, next, "a packet was lost, doubled or overtaken");
                    next += 1;
                }
            }
            next == numbers.end
        });
    }
    outer.transmitter.reclaim(&mut umem, usize::MAX);
    let sockets = [
        (&inner.receiver, &inner.transmitter),
        (&outer.receiver, &outer.transmitter),
    ];
    assert_conserved(&umem, &sockets);
    assert_eq!(umem.outstanding(), 0);
    generator.assert_conserved();
    sink.assert_conserved();
}

#[test]
fn a_dropped_frame_shows_as_held() {
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let _lost = umem.take();
    let kept = umem.take();
    assert_eq!(umem.outstanding(), 2);
    umem.give(kept.expect("a free frame"));
    assert_eq!(umem.outstanding(), 1, "one frame was dropped");
}

#[test]
fn frames_that_no_kernel_would_send_return_to_the_pool() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions::default();
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let mut to = Port::open(&lab, "b0", &small_umem(), &options).listening(&lab, false);

    let empty = from.umem.take().expect("a free frame");
    let mut half = packet(&mut from.umem, 99, 60).expect("a free frame");
    half.set_continues(true);
    let other_half = packet(&mut from.umem, 99, 60).expect("a free frame");
    let good = packet(&mut from.umem, 0, 60).expect("a free frame");
    let mut burst = vec![empty, half, other_half, good];
    flush(&mut from.socket.transmitter, &mut from.umem, &mut burst);
    to.expect(0..1);
    assert_eq!(from.socket.transmitter.unsendable(), 3);
    from.socket.transmitter.reclaim(&mut from.umem, usize::MAX);
    assert_eq!(from.umem.census().free, from.umem.census().frames);
    let statistics = from.socket.handle.statistics().expect("statistics");
    assert_eq!(statistics.tx_invalid_descs, 0);
}

#[test]
fn what_does_not_fit_stays_with_the_sender() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions {
        tx_entries: 8,
        ..SocketOptions::default()
    };
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let transmitter = &mut from.socket.transmitter;
    let mut burst: Vec<_> = (0..20)
        .filter_map(|n| packet(&mut from.umem, n, 60))
        .collect();
    assert_eq!(transmitter.send(&mut from.umem, &mut burst), 8);
    assert_eq!((burst.len(), transmitter.in_tx()), (12, 8));
    assert_eq!(transmitter.send(&mut from.umem, &mut burst), 0);
    assert_eq!(transmitter.kick().expect("the interface is up"), 0);
    flush(transmitter, &mut from.umem, &mut burst);
}

#[test]
fn the_kernel_counts_what_it_drops() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions {
        rx_entries: 8,
        ..SocketOptions::default()
    };
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let mut to = Port::open(&lab, "b0", &small_umem(), &options).listening(&lab, false);
    from.send(0..20, 60);
    until("the RX ring to overflow", || {
        let statistics = to.socket.handle.statistics().expect("statistics");
        statistics.rx_ring_full >= 12
    });
    assert_eq!(to.socket.receiver.in_rx(), 8);
    to.expect(0..8);
    assert_eq!(to.socket.receiver.in_rx(), 0);
}

#[test]
fn without_refill_nothing_is_received() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions::default();
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let mut to = Port::open(&lab, "b0", &small_umem(), &options);
    let _redirect = redirect(&lab, &to.socket, false);
    from.send(0..5, 60);
    until("the fill ring to be found empty", || {
        let statistics = to.socket.handle.statistics().expect("statistics");
        statistics.rx_fill_ring_empty_descs >= 5
    });
    assert_eq!(to.socket.receiver.in_rx(), 0);
    to.socket.receiver.refill(&mut to.umem, 64);
    from.send(5..6, 60);
    to.expect(5..6);
    to.assert_conserved();
}

#[test]
fn a_umem_in_a_file_can_be_seen_through_it() {
    let umem = UmemOptions {
        memory: Memory::File,
        ..small_umem()
    };
    let mut umem = Umem::new(&umem).expect("memory for a UMEM");
    let frame = packet(&mut umem, 7, 60).expect("a free frame");
    #[expect(unsafe_code, reason = "the file is only read")]
    // SAFETY: nobody writes through this descriptor.
    let file = unsafe { umem.file() }.expect("the UMEM has a file");
    let file = File::from(file.try_clone_to_owned().expect("a second descriptor"));
    assert_eq!(file.metadata().expect("it is a file").len(), 512 * 2048);
    assert!(file.set_len(0).is_err(), "the length is sealed");
    let mut seen = [0; 60];
    file.read_exact_at(&mut seen, 256).expect("the first frame");
    assert_eq!(seen, umem.packet(&frame));
    umem.give(frame);
}
