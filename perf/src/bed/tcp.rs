//! TCP streams one way between two pods: how many bytes their processes get.
//!
//! The bytes follow a pattern with a period of a million, shifted for each stream, and the receiver looks at a few words
//! of each read: a byte that is lost, repeated or of another stream shifts all that follow, and damage to a whole packet
//! is seen, while the looking costs next to nothing.

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use core::time::Duration;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::meter::CpuWindow;
use crate::lab::{Host, wait_until};
use crate::measure::Trial;
use crate::sys;
use crate::traffic::{Pattern, accept, run_tag};

/// Windows grow during this; nothing of it counts.
const RAMP: Duration = Duration::from_millis(200);
/// How long a connection, or the first byte on it, may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of a write, and of a read.
const CHUNK: usize = 256 << 10;
/// A prime, so that no multiple of a packet's or a buffer's size is a multiple of it.
const PERIOD: usize = 1_048_573;
/// One word of so many bytes is compared.
const SAMPLE: usize = 1024;

/// What both ends of a stream share with the one who measures.
#[derive(Debug, Default)]
struct Shared {
    received: AtomicU64,
    corrupt: AtomicU64,
    sender: AtomicI32,
    receiver: AtomicI32,
}

/// Runs `streams` from one host to the other, and writes bytes, CPU and damage during `duration` into the trial.
pub(super) fn run(
    [from, to]: [&dyn Host; 2],
    streams: u32,
    duration: Duration,
    cpus: [Option<usize>; 2],
    trial: &mut Trial,
) -> Result<()> {
    ensure!(
        (1..=1000).contains(&streams),
        "1 to 1000 streams, not {streams}"
    );
    let listener = to.netns().run(|| TcpListener::bind((to.address(), 0)))?;
    let listener = listener.with_context(|| format!("listen on {}", to.name()))?;
    let address = listener.local_addr().context("listener")?;
    let mut ends = Vec::new();
    for _stream in 0..streams {
        let client = from
            .netns()
            .run(|| TcpStream::connect_timeout(&address, CONNECT))?;
        let client = client.with_context(|| format!("connect {} to {}", from.name(), to.name()))?;
        ends.push((client, accept(&listener)?));
    }
    let mut pattern = vec![0; PERIOD + CHUNK];
    Pattern::seeded(run_tag().into()).fill(&mut pattern[..PERIOD]);
    pattern.copy_within(..CHUNK, PERIOD);
    let shared: Vec<Shared> = ends.iter().map(|_end| Shared::default()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, ((client, server), shared)) in ends.iter().zip(&shared).enumerate() {
            let (pattern, stop) = (&pattern[..], &stop);
            let first = number * 7919;
            threads.push(scope.spawn(move || send(client, pattern, first, cpus[0], shared, stop)));
            threads
                .push(scope.spawn(move || receive(server, pattern, first, cpus[1], shared, stop)));
        }
        let outcome = measure(&shared, &threads, duration, trial);
        stop.store(true, Ordering::Release);
        for (client, server) in &ends {
            // An end that has failed is closed already.
            drop(client.shutdown(Shutdown::Both));
            drop(server.shutdown(Shutdown::Both));
        }
        let ends = threads.into_iter().map(|thread| {
            let end = thread.join();
            end.unwrap_or_else(|_panic| Err(anyhow!("a stream's thread has panicked")))
        });
        let ends: Result<Vec<()>> = ends.collect();
        // Why a stream broke says more than that it did.
        ends.and(outcome)
    })
}

fn measure(
    shared: &[Shared],
    threads: &[ScopedJoinHandle<'_, Result<()>>],
    duration: Duration,
    trial: &mut Trial,
) -> Result<()> {
    let broken = || threads.iter().any(ScopedJoinHandle::is_finished);
    let total = |of: fn(&Shared) -> &AtomicU64| -> u64 {
        shared
            .iter()
            .map(|stream| of(stream).load(Ordering::Relaxed))
            .sum()
    };
    wait_until("every stream carries bytes", CONNECT, || {
        let flows = |stream: &Shared| stream.received.load(Ordering::Relaxed) > 0;
        broken() || shared.iter().all(flows)
    })?;
    thread::sleep(RAMP);
    let cpu = |of: fn(&Shared) -> &AtomicI32| -> Result<Duration> {
        let times = shared.iter().map(|stream| {
            let thread = of(stream).load(Ordering::Relaxed);
            sys::thread_cpu_time(thread).context("CPU time of a stream's thread")
        });
        times.sum()
    };
    let cpus = || -> Result<[Duration; 2]> { Ok([cpu(|s| &s.sender)?, cpu(|s| &s.receiver)?]) };
    let of_threads = cpus()?;
    let window = CpuWindow::open()?;
    let (start, before) = (Instant::now(), total(|stream| &stream.received));
    while start.elapsed() < duration && !broken() {
        let left = duration.saturating_sub(start.elapsed());
        thread::sleep(left.min(Duration::from_millis(50)));
    }
    let received = total(|stream| &stream.received) - before;
    trial.elapsed = start.elapsed();
    window.close(trial)?;
    ensure!(!broken(), "a stream ended before its time");
    let [source, sink] = cpus()?;
    trial.received_bytes = received;
    trial.source_cpu = source.saturating_sub(of_threads[0]);
    trial.sink_cpu = sink.saturating_sub(of_threads[1]);
    trial.corrupt = total(|stream| &stream.corrupt);
    Ok(())
}

fn send(
    mut stream: &TcpStream,
    pattern: &[u8],
    first: usize,
    cpu: Option<usize>,
    shared: &Shared,
    stop: &AtomicBool,
) -> Result<()> {
    begin(&shared.sender, cpu)?;
    let mut position = first % PERIOD;
    loop {
        match stream.write(&pattern[position..position + CHUNK]) {
            _ if stop.load(Ordering::Acquire) => return Ok(()),
            Ok(written) => position = (position + written) % PERIOD,
            Err(error) => return Err(error).context("send"),
        }
    }
}

fn receive(
    mut stream: &TcpStream,
    pattern: &[u8],
    first: usize,
    cpu: Option<usize>,
    shared: &Shared,
    stop: &AtomicBool,
) -> Result<()> {
    begin(&shared.receiver, cpu)?;
    let mut buffer = vec![0; CHUNK];
    let (mut position, mut received, mut corrupt) = (first % PERIOD, 0_u64, 0_u64);
    loop {
        match stream.read(&mut buffer) {
            _ if stop.load(Ordering::Acquire) => return Ok(()),
            Ok(0) => return Err(anyhow!("the sender has closed the stream")),
            Ok(read) => {
                corrupt += wrong_samples(&buffer[..read], &pattern[position..]);
                position = (position + read) % PERIOD;
                received += u64::try_from(read)?;
                shared.corrupt.store(corrupt, Ordering::Relaxed);
                shared.received.store(received, Ordering::Relaxed);
            }
            Err(error) => return Err(error).context("receive"),
        }
    }
}

fn begin(thread: &AtomicI32, cpu: Option<usize>) -> Result<()> {
    thread.store(sys::thread_id(), Ordering::Relaxed);
    match cpu {
        Some(cpu) => {
            sys::pin(0, cpu).with_context(|| format!("pin a stream's thread to CPU {cpu}"))
        }
        None => Ok(()),
    }
}

/// How many of the looked-at words differ: the first of each [`SAMPLE`] bytes, and the last.
fn wrong_samples(bytes: &[u8], expected: &[u8]) -> u64 {
    const WORD: usize = 8;
    let last = bytes.len().saturating_sub(WORD);
    let places = (0..last).step_by(SAMPLE).chain([last]);
    let wrong = places.filter(|place| {
        let word = *place..(place + WORD).min(bytes.len());
        bytes.get(word.clone()) != expected.get(word)
    });
    u64::try_from(wrong.count()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_and_a_damaged_packet_are_seen() {
        let mut expected = vec![0; 64 << 10];
        Pattern::seeded(7).fill(&mut expected);
        assert_eq!(wrong_samples(&expected, &expected), 0);
        for length in [1, 7, 8, 1023, 1024, 1025, 64 << 10] {
            assert_eq!(wrong_samples(&expected[..length], &expected), 0, "{length}");
        }
        let shifted = &expected[1..];
        assert!(wrong_samples(shifted, &expected) > 60);
        let mut damaged = expected.clone();
        damaged[20_000..21_448].fill(0);
        assert!(wrong_samples(&damaged, &expected) >= 1);
    }
}
