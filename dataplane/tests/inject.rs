//! Live frames in this kernel: what is injected into a device arrives at its peer, as it was.
//!
//! Needs root, and Linux 6.3. Each test works in an unnamed network namespace of its own thread.

#![expect(unsafe_code, reason = "unshare and packet sockets by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use std::fs::File;
use std::io::Read;

use af_xdp::{Interface, Mode, Socket, SocketOptions, Umem, UmemOptions};
use ripstop_dataplane::inject::{self, BURST_MIN, InjectError, Injector};
use ripstop_dataplane::nic_queue::NicQueue;
use ripstop_dataplane::port::{Burst, Port, Transmitted};

mod common;
mod sockets;

use common::{ip, kernel, own_namespace, run};
use sockets::packet_socket;

const FRAMES: u32 = 2048;
/// An EtherType for experiments (IEEE 802), which no stack looks at.
const ETHER_TYPE: u16 = 0x88b5;

/// A pair of veth devices: a port on one, a packet socket on the other.
struct Rig {
    port: NicQueue,
    umem: Umem,
    switch: std::sync::Arc<inject::Switch>,
    sink: File,
    next: u32,
}

/// The pair, in a namespace of the calling thread's own, with a peer that takes frames or does not.
fn pair(peer_takes_frames: bool) -> Interface {
    own_namespace();
    ip("link add near type veth peer name peer");
    for device in ["near", "peer"] {
        ip(&format!("link set {device} mtu 3500"));
    }
    if peer_takes_frames {
        run("ethtool", "-K peer gro on");
    }
    for device in ["near", "peer"] {
        ip(&format!("link set {device} up"));
    }
    Interface::by_name("near").unwrap()
}

impl Rig {
    fn new(frame_size: u32) -> Self {
        Self::aimed(frame_size, true)
    }

    fn aimed(frame_size: u32, aim: bool) -> Self {
        let near = pair(true);
        let options = UmemOptions {
            frames: FRAMES,
            frame_size,
            ..UmemOptions::default()
        };
        let (frames, mut umem) = inject::memory(&options).unwrap();
        let socket_options = SocketOptions {
            mode: Mode::Copy,
            ..SocketOptions::default()
        };
        let socket = Socket::open(&mut umem, &near, 0, &socket_options).unwrap();
        let injector = Injector::new(&frames, frame_size).unwrap();
        let switch = injector.switch();
        if aim {
            injector.aim(&near).unwrap();
        }
        let port = NicQueue::new(socket.receiver, socket.transmitter, 2048, 64)
            .with_injector(Some(injector));
        Self {
            port,
            umem,
            switch,
            sink: packet_socket("peer", ETHER_TYPE),
            next: 0,
        }
    }

    /// Transmits packets of these lengths, and checks that they arrive as they were, and in this order. How many system
    /// calls that took.
    fn check(&mut self, lengths: &[usize]) -> u64 {
        let mut burst = Burst::with_capacity(lengths.len());
        let mut sent = Vec::new();
        for len in lengths {
            let packet = packet(self.next, *len);
            self.next += 1;
            let mut frame = self.umem.take().unwrap();
            // Packets begin anywhere in their frame's first bytes.
            let headroom = usize::try_from(self.next).unwrap() * 7 % 400;
            let headroom = headroom.min(2000 - (*len).min(1700));
            let room = self.umem.whole_mut(&mut frame, headroom).unwrap();
            room[..*len].copy_from_slice(&packet);
            frame.set_len(*len).unwrap();
            burst.push(frame);
            sent.push(packet);
        }
        let expected = Transmitted {
            packets: lengths.len() as u64,
            bytes: lengths.iter().sum::<usize>() as u64,
        };
        assert_eq!(self.port.transmit(&mut self.umem, &mut burst), expected);
        assert!(burst.is_empty());
        let mut calls = 0;
        // What a call of the socket leaves (`socket_calls`) a worker sends in its next round.
        for _round in 0..lengths.len() {
            calls += self.port.flush();
            self.port.reclaim(&mut self.umem);
            if self.umem.census().transmitting == 0 {
                break;
            }
        }
        for packet in sent {
            let mut received = [0; 4096];
            let len = self.sink.read(&mut received).unwrap();
            assert_eq!(len, packet.len());
            assert!(received[..len] == packet, "a packet of {len} bytes");
        }
        let census = self.umem.census();
        assert_eq!((census.free, census.held), (FRAMES, 0), "{census:?}");
        calls
    }
}

/// How many calls the socket needs for so many packets: one, and before Linux 6.17 one for each 32.
fn socket_calls(packets: u64) -> u64 {
    if kernel() >= (6, 17) {
        1
    } else {
        packets.div_ceil(32)
    }
}

/// A frame with a number, and bytes that follow from it.
fn packet(number: u32, len: usize) -> Vec<u8> {
    let mut packet = vec![0xff; 12];
    packet.extend(ETHER_TYPE.to_be_bytes());
    packet.extend(number.to_be_bytes());
    let byte = |at: usize| (at * 31 + usize::try_from(number).unwrap()).to_le_bytes()[0];
    packet.extend((18..len).map(byte));
    packet
}

#[test]
fn bursts_of_all_sizes_arrive_as_they_were() {
    let mut rig = Rig::new(4096);
    for count in [
        1,
        BURST_MIN - 1,
        BURST_MIN,
        BURST_MIN + 1,
        63,
        64,
        65,
        255,
        256,
        257,
        300,
    ] {
        let calls = rig.check(&vec![60; count]);
        // One call for up to 256, and at least one of the socket for what is left of a burst.
        assert!(calls >= 1, "{count} packets took {calls} calls");
        if (BURST_MIN..=256).contains(&count) {
            assert_eq!(calls, 1, "{count} packets");
        }
    }
}

#[test]
fn packets_of_all_lengths_arrive_as_they_were() {
    let lengths = |max: usize| {
        let some = [
            18, 59, 60, 61, 63, 64, 65, 127, 128, 1000, 1499, 1500, 1514, 1518,
        ];
        let all = (0..64).map(|at| max - at * 23).chain(some);
        all.filter(|len| *len <= max).collect::<Vec<_>>()
    };
    let mut small = Rig::new(2048);
    assert_eq!(small.check(&lengths(1536)), 1);
    drop(small);
    let mut large = Rig::new(4096);
    assert_eq!(large.check(&lengths(3392)), 1);
    // What is too long for a live frame goes by the socket, and everything behind it in its order.
    let mut mixed = vec![60; 40];
    mixed[35] = 3393;
    assert_eq!(large.check(&mixed), 2);
    let mut early = vec![60; 40];
    early[3] = 3393;
    assert_eq!(large.check(&early), socket_calls(40));
}

#[test]
fn the_socket_sends_what_is_not_injected() {
    let mut rig = Rig::new(2048);
    assert_eq!(rig.check(&[60; 64]), 1);
    rig.switch.set_taken(false);
    assert_eq!(rig.check(&[60; 64]), socket_calls(64));
    // A program without a device refuses every order, and the socket sends them all.
    let mut aimless = Rig::aimed(2048, false);
    aimless.switch.set_taken(true);
    assert_eq!(aimless.check(&[60; 64]), 1 + socket_calls(64));
}

#[test]
fn a_peer_that_would_drop_frames_is_seen() {
    let near = pair(false);
    let options = UmemOptions::default();
    let (frames, _umem) = inject::memory(&options).unwrap();
    let injector = Injector::new(&frames, options.frame_size).unwrap();
    let refusal = injector.aim(&near);
    assert!(
        matches!(refusal, Err(InjectError::Peer { .. })),
        "{refusal:?}"
    );
    assert!(!injector.switch().set_taken(false));
    run("ethtool", "-K peer gro on");
    injector.aim(&near).unwrap();
    assert!(inject::takes_frames(near.index()));
    run("ethtool", "-K peer gro off");
    assert!(!inject::takes_frames(near.index()));
}
