//! Sends packets out of one queue, with no XDP program involved.
//!
//! `tx_burst <interface> <queue> <packets> [<bytes>]`
#![expect(clippy::print_stdout, reason = "the output of the example")]

use core::error::Error;
use std::env;
use std::time::Instant;

use af_xdp::{Interface, Socket, SocketOptions, Umem, UmemOptions};

const BURST: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = env::args().skip(1).collect();
    let [name, queue, packets, rest @ ..] = &words[..] else {
        return Err("usage: tx_burst <interface> <queue> <packets> [<bytes>]".into());
    };
    let packets: u64 = packets.parse()?;
    let len: usize = rest.first().map_or(Ok(60), |len| len.parse())?;

    let mut umem = Umem::new(&UmemOptions::default())?;
    let interface = Interface::by_name(name)?;
    let socket = Socket::open(
        &mut umem,
        &interface,
        queue.parse()?,
        &SocketOptions::default(),
    )?;
    let Socket {
        mut transmitter,
        handle,
        ..
    } = socket;
    println!("{name} queue {queue}: {} mode", handle.mode());

    let begin = Instant::now();
    let mut burst = Vec::with_capacity(BURST);
    let mut sent = 0;
    while sent < packets {
        transmitter.reclaim(&mut umem, BURST);
        while burst.len() < BURST && sent + (burst.len() as u64) < packets {
            let Some(mut frame) = umem.take() else {
                break;
            };
            frame.set_len(len)?;
            let packet = umem.packet_mut(&mut frame);
            packet.fill(0);
            // A broadcast of the EtherType for local experiments.
            packet
                .get_mut(..6)
                .ok_or("a packet has at least 14 bytes")?
                .fill(0xff);
            packet
                .get_mut(12..14)
                .ok_or("a packet has at least 14 bytes")?
                .copy_from_slice(&[0x88, 0xb5]);
            burst.push(frame);
        }
        sent += transmitter.send(&mut umem, &mut burst) as u64;
        transmitter.kick()?;
    }
    while transmitter.kick()? > 0 {
        transmitter.reclaim(&mut umem, BURST);
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{sent} packets of {len} bytes in {seconds:.3} s; {:?}",
        handle.statistics()?
    );
    Ok(())
}
