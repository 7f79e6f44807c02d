//! Real sockets on veth pairs. See README.md in this directory for the drawing of each.

use std::time::{Duration, Instant};

use af_xdp::{
    Frame, Interface, ModeInUse, Receiver, Socket, SocketOptions, Transmitter, Umem, UmemOptions,
};

mod lab;

use lab::{Lab, Redirect};

/// EtherType for local experiments (IEEE 802), by which the tests know their own packets.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const BURST: usize = 64;

/// Calls `step` until it says that all is done. Panics with `what` when that takes absurdly long.
fn until(what: &str, mut step: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !step() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "gave up waiting: {what}"
        );
        std::thread::yield_now();
    }
}

/// A packet of `len` bytes that carries its number.
fn write_packet(packet: &mut [u8], number: u32) {
    packet[..6].fill(0xff);
    packet[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    packet[12..14].copy_from_slice(&ETHERTYPE);
    packet[14..18].copy_from_slice(&number.to_be_bytes());
    for (place, byte) in packet[18..].iter_mut().enumerate() {
        *byte = (number as usize + place) as u8;
    }
}

/// The number of one of our packets, whose every byte is checked.
fn read_packet(packet: &[u8]) -> Option<u32> {
    if packet.get(12..14)? != ETHERTYPE {
        return None;
    }
    let number = u32::from_be_bytes(packet.get(14..18)?.try_into().ok()?);
    let mut expected = vec![0; packet.len()];
    write_packet(&mut expected, number);
    assert_eq!(packet, expected, "packet {number} arrived damaged");
    Some(number)
}

/// One socket with a UMEM of its own.
struct Port {
    umem: Umem,
    socket: Socket,
    burst: Vec<Frame>,
    _redirect: Option<Redirect>,
}

impl Port {
    fn open(lab: &Lab, name: &str, umem: &UmemOptions, options: &SocketOptions) -> Self {
        let mut umem = Umem::new(umem).expect("memory for a UMEM");
        let socket = open(lab, &mut umem, name, options);
        Self {
            umem,
            socket,
            burst: Vec::with_capacity(BURST),
            _redirect: None,
        }
    }

    /// Lets the port receive what arrives.
    fn listen(mut self, lab: &Lab, name: &str, frags: bool) -> Self {
        self._redirect = Some(listen(lab, name, &mut self.umem, &mut self.socket, frags));
        self
    }

    /// Sends packets with these numbers, as many at a time as there are frames.
    fn send(&mut self, numbers: core::ops::Range<u32>, len: usize) {
        let transmitter = &mut self.socket.transmitter;
        for number in numbers {
            let mut taken = None;
            until("a free frame to send", || {
                transmitter.reclaim(&mut self.umem, usize::MAX);
                taken = self.umem.take();
                taken.is_some() || transmitter.kick().is_err()
            });
            let mut frame = taken.expect("a frame");
            frame.set_len(len).expect("a packet fits");
            write_packet(self.umem.packet_mut(&mut frame), number);
            self.burst.push(frame);
            if self.burst.len() == BURST {
                flush(transmitter, &mut self.umem, &mut self.burst);
            }
        }
        flush(transmitter, &mut self.umem, &mut self.burst);
    }

    /// Receives once; gives back the numbers of our packets.
    fn receive(&mut self) -> Vec<u32> {
        let receiver = &mut self.socket.receiver;
        receiver.receive(&mut self.umem, &mut self.burst, BURST);
        let mut numbers = Vec::new();
        for frame in self.burst.drain(..) {
            numbers.extend(read_packet(self.umem.packet(&frame)));
            self.umem.give(frame);
        }
        receiver.refill(&mut self.umem, usize::MAX);
        numbers
    }
}

fn open(lab: &Lab, umem: &mut Umem, name: &str, options: &SocketOptions) -> Socket {
    lab.run(|| {
        let interface = Interface::by_name(name)?;
        Socket::open(umem, &interface, 0, options)
    })
    .expect("a socket on a veth")
}

/// Fills the socket's ring and redirects the interface's packets to it.
fn listen(lab: &Lab, name: &str, umem: &mut Umem, socket: &mut Socket, frags: bool) -> Redirect {
    socket
        .receiver
        .refill(umem, umem.census().frames as usize / 2);
    let redirect = lab.run(|| {
        let interface = Interface::by_name(name).expect("the interface exists");
        Redirect::attach(&interface, 1, frags).expect("the program loads and attaches")
    });
    redirect
        .insert(0, &socket.handle)
        .expect("the socket goes into the map");
    redirect
}

/// Sends the whole burst.
fn flush(transmitter: &mut Transmitter, umem: &mut Umem, burst: &mut Vec<Frame>) {
    until("room to send", || {
        transmitter.send(umem, burst);
        transmitter.kick().expect("the interface is up");
        transmitter.reclaim(umem, usize::MAX);
        burst.is_empty()
    });
}

/// Everything that the kernel holds is seen in a ring, and nothing is held twice or lost.
fn assert_conserved(umem: &Umem, sockets: &[(&Receiver, &Transmitter)]) {
    let census = umem.census();
    let receiving: usize = sockets.iter().map(|(r, _)| r.in_fill() + r.in_rx()).sum();
    let transmitting: usize = sockets
        .iter()
        .map(|(_, t)| t.in_tx() + t.in_completion())
        .sum();
    assert_eq!(receiving, census.receiving as usize, "{census:?}");
    assert_eq!(transmitting, census.transmitting as usize, "{census:?}");
    assert_eq!(
        census.frames,
        census.free + census.held + census.receiving + census.transmitting
    );
}

fn small_umem() -> UmemOptions {
    UmemOptions {
        frames: 512,
        ..UmemOptions::default()
    }
}

#[test]
fn packets_arrive_whole_and_in_order() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions::default();
    let mut from = Port::open(&lab, "a0", &small_umem(), &options);
    let mut to = Port::open(&lab, "b0", &small_umem(), &options).listen(&lab, "b0", false);
    assert_eq!(
        to.socket.handle.mode(),
        ModeInUse::Copy,
        "veth has no zero-copy"
    );

    let mut next = 0;
    for round in 0..100_u32 {
        let sent = (round + 1) * BURST as u32;
        let len = 60 + (round as usize * 13) % 1400;
        from.send(round * BURST as u32..sent, len);
        until("all packets", || {
            for number in to.receive() {
                assert_eq!(number, next, "a packet was lost or overtaken");
                next += 1;
            }
            next == sent
        });
    }
    from.socket.transmitter.reclaim(&mut from.umem, usize::MAX);
    for port in [&from, &to] {
        assert_conserved(
            &port.umem,
            &[(&port.socket.receiver, &port.socket.transmitter)],
        );
        assert_eq!(port.umem.outstanding(), 0);
        assert_eq!(port.socket.receiver.faults(), 0);
        assert_eq!(port.socket.transmitter.faults(), 0);
    }
}
