//! Forwards frames between the same queue of two interfaces, both ways, without a copy of its own:
//! both sockets share one UMEM, so what one received the other sends.
//!
//! `l2fwd <interface> <interface> <queue> <seconds>`: takes all packets of the queues away from
//! the kernel for that time.
#![expect(clippy::print_stdout, reason = "the output of the example")]

use core::error::Error;
use core::time::Duration;
use std::env;
use std::time::Instant;

use af_xdp::{Frame, Interface, Receiver, Socket, SocketOptions, Transmitter, Umem, UmemOptions};

mod common;

const BURST: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = env::args().skip(1).collect();
    let [one, other, queue, seconds] = &words[..] else {
        return Err("usage: l2fwd <interface> <interface> <queue> <seconds>".into());
    };
    let queue: u32 = queue.parse()?;
    let time = Duration::from_secs(seconds.parse()?);

    let mut umem = Umem::new(&UmemOptions::default())?;
    let options = SocketOptions::default();
    let one = Interface::by_name(one)?;
    let other = Interface::by_name(other)?;
    let mut left = Socket::open(&mut umem, &one, queue, &options)?;
    let mut right = Socket::open(&mut umem, &other, queue, &options)?;
    let mut redirects = Vec::new();
    for (interface, socket) in [(&one, &mut left), (&other, &mut right)] {
        // A quarter each; the rest is on its way.
        socket.receiver.refill(&mut umem, 1024);
        let redirect = common::Redirect::attach(interface, queue + 1, false)?;
        redirect.insert(queue, &socket.handle)?;
        redirects.push(redirect);
    }

    let begin = Instant::now();
    let mut burst = Vec::with_capacity(BURST);
    let (mut to_right, mut to_left) = (0, 0);
    while begin.elapsed() < time {
        to_right += forward(
            &mut umem,
            &mut left.receiver,
            &mut right.transmitter,
            &mut burst,
        )?;
        to_left += forward(
            &mut umem,
            &mut right.receiver,
            &mut left.transmitter,
            &mut burst,
        )?;
    }
    println!(
        "{to_right} packets from left to right, {to_left} back; {:?}",
        umem.census()
    );
    Ok(())
}

/// One burst from a socket to another; gives the number of packets sent.
fn forward(
    umem: &mut Umem,
    from: &mut Receiver,
    to: &mut Transmitter,
    burst: &mut Vec<Frame>,
) -> Result<usize, af_xdp::Error> {
    to.reclaim(umem, BURST);
    from.refill(umem, BURST);
    if from.receive(umem, burst, BURST) == 0 && to.in_tx() == 0 {
        return Ok(0);
    }
    let sent = to.send(umem, burst);
    // What does not fit is dropped: the other side is too slow.
    for frame in burst.drain(..) {
        umem.give(frame);
    }
    if to.needs_wakeup() {
        to.kick()?;
    }
    Ok(sent)
}
