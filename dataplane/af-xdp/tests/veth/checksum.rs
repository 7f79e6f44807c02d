//! Checksums left to the transmitting side.

use core::time::Duration;
use std::net::UdpSocket;

use af_xdp::{ChecksumError, Frame, SocketOptions, Umem, UmemOptions};

use crate::lab::Lab;
use crate::port::{Port, flush, small_umem};

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;

/// An internet checksum before it is inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded to 16 bits")
}

/// A UDP packet from 10.9.0.1 to 10.9.0.2 port 4321 whose checksum covers the pseudo header only.
fn udp_packet(umem: &mut Umem, payload: &[u8]) -> Frame {
    let udp_len = u16::try_from(UDP + payload.len())
        .expect("a short payload")
        .to_be_bytes();
    let ip_len = u16::try_from(IPV4 + UDP + payload.len())
        .expect("a short payload")
        .to_be_bytes();
    let addresses = [10, 9, 0, 1, 10, 9, 0, 2];
    let pseudo = [&addresses[..], &[0, 17], &udp_len[..]].concat();
    let mut ip = [
        &[0x45, 0],
        &ip_len[..],
        &[0, 0, 0, 0, 64, 17, 0, 0],
        &addresses[..],
    ]
    .concat();
    let ip_sum = !sum(&ip);
    ip[10..12].copy_from_slice(&ip_sum.to_be_bytes());
    let pseudo_sum = sum(&pseudo).to_be_bytes();
    let ports = [0x11, 0x11, 0x10, 0xe1];
    let packet = [
        &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0],
        &ip[..],
        &ports,
        &udp_len,
        &pseudo_sum,
        payload,
    ]
    .concat();
    let mut frame = umem.take().expect("a free frame");
    frame.set_len(packet.len()).expect("a short packet");
    umem.packet_mut(&mut frame).copy_from_slice(&packet);
    frame
}

/// The kernel's own UDP receiver is the judge: it drops what has a wrong checksum.
#[test]
fn a_requested_checksum_is_finished_on_the_way() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    lab.ip("link set b0 address 02:00:00:00:00:02");
    lab.ip("address add 10.9.0.2/24 dev b0");
    let receiver = lab
        .run(|| UdpSocket::bind("10.9.0.2:4321"))
        .expect("a UDP socket");
    let patience = Some(Duration::from_secs(30));
    receiver
        .set_read_timeout(patience)
        .expect("a timeout can be set");

    let umem = UmemOptions {
        tx_metadata: true,
        ..small_umem()
    };
    let mut port = Port::open(&lab, "a0", &umem, &SocketOptions::default());
    let umem = &mut port.umem;
    let unfinished = udp_packet(umem, b"unfinished");
    let mut finished = udp_packet(umem, b"finished by the kernel");
    umem.request_checksum(&mut finished, ETHERNET + IPV4, 6)
        .expect("it lies within");
    // The request stays with its bytes when the packet's start moves.
    let mut moved = udp_packet(umem, b"moved");
    let ethernet = umem.packet(&moved)[..ETHERNET].to_vec();
    umem.request_checksum(&mut moved, ETHERNET + IPV4, 6)
        .expect("it lies within");
    moved
        .pop_front(ETHERNET)
        .expect("there is an Ethernet header");
    moved.push_front(ETHERNET).expect("there was one");
    umem.packet_mut(&mut moved)[..ETHERNET].copy_from_slice(&ethernet);

    let mut burst = vec![unfinished, finished, moved];
    flush(&mut port.socket.transmitter, umem, &mut burst);
    let mut payload = [0; 100];
    for expected in [&b"finished by the kernel"[..], b"moved"] {
        let len = receiver.recv(&mut payload).expect("a UDP packet");
        assert_eq!(
            &payload[..len],
            expected,
            "the unfinished one must not pass"
        );
    }
    let statistics = port.socket.handle.statistics().expect("statistics");
    assert_eq!(statistics.tx_invalid_descs, 0);
}

#[test]
fn a_checksum_that_cannot_be_is_refused() {
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let mut frame = udp_packet(&mut umem, b"");
    let refused = umem.request_checksum(&mut frame, ETHERNET + IPV4, 6);
    assert_eq!(refused, Err(ChecksumError::NoMetadata));

    let with_metadata = UmemOptions {
        tx_metadata: true,
        ..small_umem()
    };
    let mut umem = Umem::new(&with_metadata).expect("memory for a UMEM");
    let mut frame = udp_packet(&mut umem, b"");
    for (start, offset) in [(34, 7), (41, 0), (42, 0), (usize::MAX, 255), (0, 41)] {
        let refused = umem.request_checksum(&mut frame, start, offset);
        assert!(
            matches!(refused, Err(ChecksumError::Outside(_))),
            "{start} {offset}"
        );
    }
    umem.request_checksum(&mut frame, 34, 6)
        .expect("the last two bytes");
}

/// A request for bytes that are cut off is forgotten: the kernel would refuse the packet for ever
/// and block the ring with it.
#[test]
fn a_checksum_that_is_cut_off_does_not_block_the_ring() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let umem = UmemOptions {
        tx_metadata: true,
        ..small_umem()
    };
    let mut port = Port::open(&lab, "a0", &umem, &SocketOptions::default());
    let umem = &mut port.umem;
    let mut burst = Vec::new();
    for cut in 0..3 {
        let mut frame = udp_packet(umem, b"some payload");
        umem.request_checksum(&mut frame, 34, 6)
            .expect("it lies within");
        match cut {
            0 => frame.truncate(41),
            1 => frame.set_len(35).expect("it is shorter"),
            _ => frame.pop_front(35).expect("it is longer"),
        }
        burst.push(frame);
    }
    flush(&mut port.socket.transmitter, umem, &mut burst);
    crate::port::until("all frames to return", || {
        port.socket.transmitter.reclaim(&mut port.umem, usize::MAX);
        port.umem.census().free == port.umem.census().frames
    });
}
