//! Receives what arrives on one queue, counts it, and forgets it.
//!
//! `rx_drop <interface> <queue> <seconds>`: takes all packets of the queue away from the kernel
//! for that time.
#![expect(clippy::print_stdout, reason = "the output of the example")]

use core::error::Error;
use core::time::Duration;
use std::env;
use std::time::Instant;

use af_xdp::{Interface, Socket, SocketOptions, Umem, UmemOptions};

mod common;

const BURST: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = env::args().skip(1).collect();
    let [name, queue, seconds] = &words[..] else {
        return Err("usage: rx_drop <interface> <queue> <seconds>".into());
    };
    let queue: u32 = queue.parse()?;
    let time = Duration::from_secs(seconds.parse()?);

    let mut umem = Umem::new(&UmemOptions::default())?;
    let interface = Interface::by_name(name)?;
    let socket = Socket::open(&mut umem, &interface, queue, &SocketOptions::default())?;
    let Socket {
        mut receiver,
        handle,
        ..
    } = socket;
    println!("{name} queue {queue}: {} mode", handle.mode());
    receiver.refill(&mut umem, usize::MAX);
    let redirect = common::Redirect::attach(&interface, queue + 1, false)?;
    redirect.insert(queue, &handle)?;

    let begin = Instant::now();
    let mut burst = Vec::with_capacity(BURST);
    let (mut packets, mut bytes) = (0_u64, 0_u64);
    while begin.elapsed() < time {
        packets += receiver.receive(&mut umem, &mut burst, BURST) as u64;
        for frame in burst.drain(..) {
            bytes += frame.len() as u64;
            umem.give(frame);
        }
        receiver.refill(&mut umem, BURST);
        if receiver.needs_wakeup() {
            receiver.wake()?;
        }
    }
    println!(
        "{packets} packets, {bytes} bytes; {:?}",
        handle.statistics()?
    );
    Ok(())
}
