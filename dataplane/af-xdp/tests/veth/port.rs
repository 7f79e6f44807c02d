//! One end of a veth pair, driven through AF_XDP.

use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use af_xdp::{Frame, Interface, Receiver, Socket, SocketOptions, Transmitter, Umem, UmemOptions};

use crate::lab::{Lab, Redirect};

/// Frames that the tests handle at a time.
pub(crate) const BURST: u32 = 64;

/// EtherType for local experiments (IEEE 802), by which the tests know their own packets.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Calls `step` until it says that all is done. Panics when that takes absurdly long.
pub(crate) fn until(what: &str, mut step: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !step() {
        let patient = begin.elapsed() < Duration::from_secs(30);
        assert!(patient, "gave up waiting for {what}");
        std::thread::yield_now();
    }
}

/// Fills `packet` with a frame for everybody that carries `number`, and with bytes that depend on
/// it.
pub(crate) fn write_packet(packet: &mut [u8], number: u32) {
    packet[..6].fill(0xff);
    packet[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    packet[12..14].copy_from_slice(&ETHERTYPE);
    packet[14..18].copy_from_slice(&number.to_be_bytes());
    let mut byte = number.to_be_bytes()[3];
    for place in &mut packet[18..] {
        byte = byte.wrapping_mul(5).wrapping_add(1);
        *place = byte;
    }
}

/// The number of one of our packets, every byte of which is checked; `None` for others, such as
/// the kernel's own.
pub(crate) fn read_packet(packet: &[u8]) -> Option<u32> {
    if packet.get(12..14)? != ETHERTYPE {
        return None;
    }
    let number = u32::from_be_bytes(packet.get(14..18)?.try_into().ok()?);
    let mut expected = vec![0; packet.len()];
    write_packet(&mut expected, number);
    assert_eq!(packet, expected, "packet {number} arrived damaged");
    Some(number)
}

/// A UMEM as large as the tests need.
pub(crate) fn small_umem() -> UmemOptions {
    UmemOptions {
        frames: 512,
        ..UmemOptions::default()
    }
}

pub(crate) fn interface(lab: &Lab, name: &str) -> Interface {
    lab.run(|| Interface::by_name(name))
        .expect("the interface exists")
}

/// Opens a socket on queue 0.
pub(crate) fn open(lab: &Lab, umem: &mut Umem, name: &str, options: &SocketOptions) -> Socket {
    let interface = interface(lab, name);
    let socket = lab.run(|| Socket::open(umem, &interface, 0, options));
    socket.expect("a socket on a veth")
}

/// Redirects the interface's packets to the socket.
pub(crate) fn redirect(lab: &Lab, socket: &Socket, frags: bool) -> Redirect {
    let interface = socket.handle.interface();
    let redirect = lab.run(|| Redirect::attach(interface, 1, frags));
    let redirect = redirect.expect("the program loads and attaches");
    let inserted = redirect.insert(socket.handle.queue(), &socket.handle);
    inserted.expect("the socket goes into the map");
    redirect
}

/// Lends half of the UMEM to the socket and redirects the interface's packets to it.
pub(crate) fn listen(lab: &Lab, umem: &mut Umem, socket: &mut Socket, frags: bool) -> Redirect {
    let half = umem.census().frames / 2;
    socket.receiver.refill(umem, half as usize);
    redirect(lab, socket, frags)
}

/// Takes a free frame and writes packet `number` of `len` bytes into it.
pub(crate) fn packet(umem: &mut Umem, number: u32, len: usize) -> Option<Frame> {
    let mut frame = umem.take()?;
    frame.set_len(len).expect("the packet fits");
    write_packet(umem.packet_mut(&mut frame), number);
    Some(frame)
}

/// Sends the whole burst.
pub(crate) fn flush(transmitter: &mut Transmitter, umem: &mut Umem, burst: &mut Vec<Frame>) {
    until("room to send", || {
        transmitter.send(umem, burst);
        transmitter.kick().expect("the interface is up");
        transmitter.reclaim(umem, usize::MAX);
        burst.is_empty()
    });
}

/// All that the kernel holds is seen in one of the rings, and every frame is somewhere once.
pub(crate) fn assert_conserved(umem: &Umem, sockets: &[(&Receiver, &Transmitter)]) {
    let census = umem.census();
    let receiving = sockets.iter().map(|(r, _)| r.in_fill() + r.in_rx());
    let transmitting = sockets.iter().map(|(_, t)| t.in_tx() + t.in_completion());
    assert_eq!(
        receiving.sum::<usize>(),
        census.receiving as usize,
        "{census:?}"
    );
    assert_eq!(
        transmitting.sum::<usize>(),
        census.transmitting as usize,
        "{census:?}"
    );
    let somewhere = census.free + census.held + census.receiving + census.transmitting;
    assert_eq!(census.frames, somewhere, "{census:?}");
    for (receiver, transmitter) in sockets {
        assert_eq!(receiver.faults() + transmitter.faults(), 0);
    }
}

/// A socket on a UMEM of its own.
pub(crate) struct Port {
    pub(crate) umem: Umem,
    pub(crate) socket: Socket,
    burst: Vec<Frame>,
    _redirect: Option<Redirect>,
}

impl Port {
    pub(crate) fn open(lab: &Lab, name: &str, umem: &UmemOptions, options: &SocketOptions) -> Self {
        let mut umem = Umem::new(umem).expect("memory for a UMEM");
        let socket = open(lab, &mut umem, name, options);
        Self {
            umem,
            socket,
            burst: Vec::with_capacity(BURST as usize),
            _redirect: None,
        }
    }

    /// Lets the port receive what arrives.
    pub(crate) fn listening(mut self, lab: &Lab, frags: bool) -> Self {
        self._redirect = Some(listen(lab, &mut self.umem, &mut self.socket, frags));
        self
    }

    /// Sends packets of `len` bytes with these numbers.
    pub(crate) fn send(&mut self, numbers: Range<u32>, len: usize) {
        let transmitter = &mut self.socket.transmitter;
        for number in numbers {
            until("a free frame", || {
                let frame = packet(&mut self.umem, number, len);
                let taken = frame.is_some();
                self.burst.extend(frame);
                transmitter.reclaim(&mut self.umem, usize::MAX);
                taken
            });
            if self.burst.len() == self.burst.capacity() {
                flush(transmitter, &mut self.umem, &mut self.burst);
            }
        }
        flush(transmitter, &mut self.umem, &mut self.burst);
    }

    /// Receives once and refills; gives the numbers of our packets.
    pub(crate) fn receive(&mut self) -> Vec<u32> {
        let receiver = &mut self.socket.receiver;
        receiver.receive(&mut self.umem, &mut self.burst, BURST as usize);
        let mut numbers = Vec::new();
        for frame in self.burst.drain(..) {
            numbers.extend(read_packet(self.umem.packet(&frame)));
            self.umem.give(frame);
        }
        receiver.refill(&mut self.umem, BURST as usize);
        numbers
    }

    /// Receives until exactly these numbers have arrived, in order.
    pub(crate) fn expect(&mut self, numbers: Range<u32>) {
        let mut next = numbers.start;
        until("all packets", || {
            for number in self.receive() {
                assert_eq!(number, next, "a packet was lost, doubled or overtaken");
                next += 1;
            }
            next >= numbers.end
        });
        assert_eq!(next, numbers.end, "more packets than were sent");
    }

    pub(crate) fn assert_conserved(&self) {
        let socket = &self.socket;
        assert_conserved(&self.umem, &[(&socket.receiver, &socket.transmitter)]);
    }
}
