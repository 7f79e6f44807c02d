//! A UDP request at a time from one pod to the other, whose process answers: how long that takes.
//!
//! Both processes sleep in their receive calls, as users' processes do, so waking up is part of every time.

use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use core::time::Duration;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::meter::CpuWindow;
use crate::address::Family;
use crate::lab::Host;
use crate::measure::{Rate, Size, Trial, histogram};
use crate::sys;
use crate::traffic::{Pattern, run_tag, udp_socket};

/// An answer that has not come within this is lost.
const ANSWER: Duration = Duration::from_secs(1);
/// Requests that go first and do not count: neighbours and caches are learned by them.
const WARM_UP: u64 = 20;
/// The simple IMIX by turns.
const IMIX: [u16; 12] = [64, 64, 594, 64, 64, 594, 64, 64, 594, 64, 594, 1450];

/// What became of a request.
enum Outcome {
    Answer(Duration),
    Wrong,
    Lost,
}

/// Sends requests at a rate for so long, and writes times, losses and CPU into the trial.
pub(super) fn run(
    [from, to]: [&dyn Host; 2],
    rate: Rate,
    size: Size,
    duration: Duration,
    cpus: [Option<usize>; 2],
    trial: &mut Trial,
) -> Result<()> {
    let interval = match rate {
        Rate::Pps(0) => return Err(anyhow!("0 requests a second")),
        Rate::Pps(rate) => Some(Duration::from_nanos(1_000_000_000 / rate)),
        // As soon as the answer is there.
        Rate::Max | Rate::Window(_) => None,
    };
    let client = udp_socket(from, Family::Ipv4)?;
    let server = udp_socket(to, Family::Ipv4)?;
    let address = server
        .local_addr()
        .context("address of the answering end")?;
    client.connect(address).context("connect")?;
    client
        .set_read_timeout(Some(ANSWER))
        .context("receive timeout")?;
    server
        .set_read_timeout(Some(Duration::from_millis(50)))
        .context("receive timeout")?;
    let (stop, answering) = (AtomicBool::new(false), AtomicI32::new(0));
    thread::scope(|scope| {
        let server = scope.spawn(|| answer(&server, cpus[1], &answering, &stop));
        let asking = scope.spawn(|| {
            if let Some(cpu) = cpus[0] {
                sys::pin(0, cpu).with_context(|| format!("pin to CPU {cpu}"))?;
            }
            ask(&client, interval, size, duration, &answering, trial)
        });
        let panicked = |_panic| Err(anyhow!("a thread has panicked"));
        let asked = asking.join().unwrap_or_else(panicked);
        stop.store(true, Ordering::Release);
        server.join().unwrap_or_else(panicked).and(asked)
    })
}

fn ask(
    client: &UdpSocket,
    interval: Option<Duration>,
    size: Size,
    duration: Duration,
    answering: &AtomicI32,
    trial: &mut Trial,
) -> Result<()> {
    let tag = u64::from(run_tag()) << 32;
    let mut times = histogram::new().context("histogram")?;
    let (mut request, mut buffer) = (Vec::new(), vec![0; 65_536]);
    let mut exchange = |number: u64| -> Result<(Outcome, usize)> {
        let length = payload(size, number)?;
        request.resize(length, 0);
        Pattern::seeded(tag + number).fill(&mut request);
        Ok((one(client, &request, &mut buffer)?, length))
    };
    for number in 0..WARM_UP {
        exchange(number)?;
    }
    // Answering, it has said who it is.
    let [this, other] = [sys::thread_id(), answering.load(Ordering::Relaxed)];
    let cpus = || -> Result<[Duration; 2]> {
        let of = |thread| sys::thread_cpu_time(thread).context("CPU time of a thread");
        Ok([of(this)?, of(other)?])
    };
    let of_threads = cpus()?;
    let window = CpuWindow::open()?;
    let start = Instant::now();
    while start.elapsed() < duration {
        let (outcome, length) = exchange(WARM_UP + trial.sent)?;
        trial.sent += 1;
        match outcome {
            Outcome::Answer(time) => {
                trial.received += 1;
                trial.received_bytes +=
                    u64::try_from(length)? + u64::from(Family::Ipv4.udp_headers());
                let time = u64::try_from(time.as_nanos())?.clamp(1, histogram::LONGEST_NS);
                times.record(time).context("histogram")?;
            }
            Outcome::Wrong => trial.corrupt += 1,
            Outcome::Lost => trial.lost += 1,
        }
        if let Some(interval) = interval {
            // The next is due when it is due, however long this one took.
            let due = interval * u32::try_from(trial.sent).unwrap_or(u32::MAX);
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }
    trial.elapsed = start.elapsed();
    window.close(trial)?;
    let [source, sink] = cpus()?;
    trial.source_cpu = source.saturating_sub(of_threads[0]);
    trial.sink_cpu = sink.saturating_sub(of_threads[1]);
    trial.latency = Some(times);
    Ok(())
}

fn one(client: &UdpSocket, request: &[u8], buffer: &mut [u8]) -> Result<Outcome> {
    let start = Instant::now();
    client.send(request).context("send a request")?;
    loop {
        match client.recv(buffer) {
            Ok(length) if buffer[..length] == *request => {
                return Ok(Outcome::Answer(start.elapsed()));
            }
            // The first word is the request's own.
            Ok(length) if length >= 8 && buffer[..8] == request[..8] => return Ok(Outcome::Wrong),
            // A late answer to an earlier request, which counts as lost already.
            Ok(_other) if start.elapsed() < ANSWER => {}
            Ok(_other) => return Ok(Outcome::Lost),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(Outcome::Lost);
            }
            Err(error) => return Err(error).context("receive an answer"),
        }
    }
}

fn answer(
    server: &UdpSocket,
    cpu: Option<usize>,
    thread: &AtomicI32,
    stop: &AtomicBool,
) -> Result<()> {
    thread.store(sys::thread_id(), Ordering::Relaxed);
    if let Some(cpu) = cpu {
        sys::pin(0, cpu).with_context(|| format!("pin to CPU {cpu}"))?;
    }
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        match server.recv_from(&mut buffer) {
            // What cannot be sent the other end misses, and says so.
            Ok((length, peer)) => drop(server.send_to(&buffer[..length], peer)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error).context("receive a request"),
        }
    }
    Ok(())
}

/// Bytes of UDP payload of a request.
fn payload(size: Size, number: u64) -> Result<usize> {
    let bytes = match size {
        Size::Bytes(bytes) => bytes,
        Size::Imix => IMIX[usize::try_from(number % 12)?],
    };
    let headers = Family::Ipv4.udp_headers();
    ensure!(
        bytes >= headers + 8,
        "no request fits a packet of {bytes} bytes"
    );
    Ok(usize::from(bytes - headers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imix_is_what_it_is_called() {
        let count = |bytes: u16| IMIX.iter().filter(|size| **size == bytes).count();
        assert_eq!([count(64), count(594), count(1450)], [7, 4, 1]);
        assert_eq!(payload(Size::Imix, 11).expect("fits"), 1422);
        assert_eq!(payload(Size::Bytes(64), 5).expect("fits"), 36);
        assert!(payload(Size::Bytes(30), 0).is_err());
    }
}
