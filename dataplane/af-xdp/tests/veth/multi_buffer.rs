//! Packets that span frames.

use af_xdp::{Frame, PACKET_FRAMES_MAX, SocketOptions, Umem};

use crate::lab::Lab;
use crate::port::{Port, read_packet, small_umem, until, write_packet};

const MTU: u32 = 9000;
const LEN: usize = 9014;

fn multi_buffer() -> SocketOptions {
    SocketOptions {
        multi_buffer: true,
        ..SocketOptions::default()
    }
}

/// Spreads packet `number` over frames that begin as received ones do.
fn large_packet(umem: &mut Umem, number: u32) -> Vec<Frame> {
    let mut whole = vec![0; LEN];
    write_packet(&mut whole, number);
    let mut frames = Vec::new();
    let mut rest = &whole[..];
    while !rest.is_empty() {
        let mut frame = umem.take().expect("a free frame");
        let part = rest.len().min(frame.tailroom());
        frame.set_len(part).expect("it is the tailroom");
        umem.packet_mut(&mut frame).copy_from_slice(&rest[..part]);
        rest = &rest[part..];
        frame.set_continues(!rest.is_empty());
        frames.push(frame);
    }
    frames
}

/// Joins the frames of each packet, checks it, and gives the frames back.
fn read_large_packets(umem: &mut Umem, burst: &mut Vec<Frame>) -> Vec<u32> {
    let mut numbers = Vec::new();
    let mut whole = Vec::new();
    for frame in burst.drain(..) {
        whole.extend_from_slice(umem.packet(&frame));
        if !frame.continues() {
            numbers.extend(read_packet(&whole));
            whole.clear();
        }
        umem.give(frame);
    }
    assert!(whole.is_empty(), "a burst ended within a packet");
    numbers
}

#[test]
fn large_packets_cross_in_several_frames() {
    let lab = Lab::new();
    lab.veth("a0", "b0", MTU);
    let mut from = Port::open(&lab, "a0", &small_umem(), &multi_buffer());
    let mut to = Port::open(&lab, "b0", &small_umem(), &multi_buffer()).listening(&lab, true);
    let mut next = 0;
    for number in 0..500 {
        let (umem, transmitter) = (&mut from.umem, &mut from.socket.transmitter);
        let mut burst = large_packet(umem, number);
        assert!(burst.len() >= 5, "{} frames of 2 KiB", burst.len());
        crate::port::flush(transmitter, umem, &mut burst);
        if number % 8 != 7 {
            continue;
        }
        until("large packets", || {
            let (umem, receiver) = (&mut to.umem, &mut to.socket.receiver);
            let mut burst = Vec::new();
            // Less than a packet: it must still come whole.
            receiver.receive(umem, &mut burst, 1);
            assert!(burst.len() <= PACKET_FRAMES_MAX);
            for number in read_large_packets(umem, &mut burst) {
                assert_eq!(number, next, "a packet was lost, doubled or overtaken");
                next += 1;
            }
            receiver.refill(umem, 64);
            next > number
        });
    }
    from.socket.transmitter.reclaim(&mut from.umem, usize::MAX);
    from.assert_conserved();
    to.assert_conserved();
    assert_eq!(to.umem.outstanding() + from.umem.outstanding(), 0);
}

#[test]
fn an_unfinished_packet_is_not_sent() {
    let lab = Lab::new();
    lab.veth("a0", "b0", MTU);
    let mut from = Port::open(&lab, "a0", &small_umem(), &multi_buffer());
    let mut burst = large_packet(&mut from.umem, 0);
    burst.extend(large_packet(&mut from.umem, 1));
    let packet_frames = burst.len() / 2;
    let last = burst.pop().expect("a last frame");
    let transmitter = &mut from.socket.transmitter;
    assert_eq!(transmitter.send(&mut from.umem, &mut burst), packet_frames);
    assert_eq!(burst.len(), packet_frames - 1);
    burst.push(last);
    assert_eq!(transmitter.send(&mut from.umem, &mut burst), packet_frames);
}

#[test]
fn without_multi_buffer_large_packets_are_dropped_and_counted() {
    let lab = Lab::new();
    lab.veth("a0", "b0", MTU);
    let mut from = Port::open(&lab, "a0", &small_umem(), &multi_buffer());
    let to = Port::open(&lab, "b0", &small_umem(), &SocketOptions::default());
    let mut to = to.listening(&lab, true);
    let (umem, transmitter) = (&mut from.umem, &mut from.socket.transmitter);
    let mut burst = large_packet(umem, 1);
    crate::port::flush(transmitter, umem, &mut burst);
    until("the drop to be counted", || {
        let statistics = to.socket.handle.statistics().expect("statistics");
        statistics.rx_dropped >= 1
    });
    from.send(2..3, 60);
    to.expect(2..3);
    to.assert_conserved();
}
