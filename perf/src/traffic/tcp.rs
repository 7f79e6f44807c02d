//! Bulk TCP in both directions at once, compared byte for byte.

use core::time::Duration;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::{Pattern, run_tag};
use crate::address::Family;
use crate::lab::{Host, wait_until};

/// A connection on which nothing moves for so long has failed.
const STALL: Duration = Duration::from_secs(20);
const CHUNK: usize = 64 << 10;

/// A completed transfer. All bytes have arrived as they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpReport {
    /// Bytes that went each way.
    pub bytes_each_way: u64,
    /// From before the connect to the last byte.
    pub duration: Duration,
}

/// Connects from one host to another and sends so many bytes each way at the same time.
///
/// # Errors
/// No connection, a stall, an early end, or a byte that differs; the error says at which offset.
pub fn tcp_transfer(from: &dyn Host, to: &dyn Host, bytes: u64) -> Result<TcpReport> {
    tcp_transfer_over(Family::Ipv4, from, to, bytes)
}

/// The same over either family.
///
/// # Errors
/// As [`tcp_transfer`].
pub fn tcp_transfer_over(
    family: Family,
    from: &dyn Host,
    to: &dyn Host,
    bytes: u64,
) -> Result<TcpReport> {
    let what = || format!("TCP over {family} from {} to {}", from.name(), to.name());
    let address = (to.address_of(family), 0);
    let listener = to
        .netns()
        .run(|| TcpListener::bind(address))?
        .with_context(what)?;
    let server_address = listener.local_addr().with_context(what)?;
    let local = from.address_of(family);
    let start = Instant::now();
    let client = from
        .netns()
        .run(|| TcpStream::connect_timeout(&server_address, STALL))?;
    let client = client.with_context(|| format!("{}: connect", what()))?;
    let server = accept(&listener).with_context(what)?;
    let seen = server.peer_addr().with_context(what)?;
    if seen.ip() != local {
        bail!(
            "{}: the far end sees {} and not {}",
            what(),
            seen.ip(),
            local
        );
    }
    let (there, back) = (u64::from(run_tag()), u64::from(run_tag()));
    let outcomes = thread::scope(|scope| {
        let threads = [
            scope.spawn(|| send(&client, there, bytes).context("sending there")),
            scope.spawn(|| receive(&server, there, bytes).context("receiving there")),
            scope.spawn(|| send(&server, back, bytes).context("sending back")),
            scope.spawn(|| receive(&client, back, bytes).context("receiving back")),
        ];
        threads.map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_panic| Err(anyhow!("a traffic thread has panicked")))
        })
    });
    let mut failures = outcomes
        .into_iter()
        .filter_map(Result::err)
        .map(|error| format!("{error:#}"));
    if let Some(first) = failures.next() {
        bail!(
            "{}: {}",
            what(),
            failures.fold(first, |all, next| format!("{all}; {next}"))
        );
    }
    Ok(TcpReport {
        bytes_each_way: bytes,
        duration: start.elapsed(),
    })
}

/// The client's connect may be complete an instant before the server's side of it.
pub(crate) fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true).context("listener")?;
    let mut accepted = None;
    wait_until("the connection is accepted", STALL, || {
        accepted = listener.accept().ok();
        accepted.is_some()
    })?;
    let (stream, _peer) = accepted.context("accept")?;
    stream
        .set_nonblocking(false)
        .context("accepted connection")?;
    Ok(stream)
}

fn send(mut stream: &TcpStream, seed: u64, bytes: u64) -> Result<()> {
    stream
        .set_write_timeout(Some(STALL))
        .context("send timeout")?;
    let mut pattern = Pattern::seeded(seed);
    let mut chunk = vec![0; CHUNK];
    let mut sent = 0;
    while sent < bytes {
        let length = CHUNK.min(usize::try_from(bytes - sent).unwrap_or(CHUNK));
        pattern.fill(&mut chunk[..length]);
        stream
            .write_all(&chunk[..length])
            .with_context(|| format!("after {sent} bytes"))?;
        sent += u64::try_from(length)?;
    }
    stream.shutdown(Shutdown::Write).context("end of stream")
}

fn receive(mut stream: &TcpStream, seed: u64, bytes: u64) -> Result<()> {
    stream
        .set_read_timeout(Some(STALL))
        .context("receive timeout")?;
    let mut pattern = Pattern::seeded(seed);
    let (mut chunk, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut received = 0;
    while received < bytes {
        let length = CHUNK.min(usize::try_from(bytes - received).unwrap_or(CHUNK));
        stream
            .read_exact(&mut chunk[..length])
            .with_context(|| format!("after {received} bytes"))?;
        pattern.fill(&mut expected[..length]);
        if let Some(offset) = (0..length).find(|offset| chunk[*offset] != expected[*offset]) {
            bail!(
                "byte {} differs from what was sent",
                received + u64::try_from(offset)?
            );
        }
        received += u64::try_from(length)?;
    }
    if stream.read(&mut chunk).context("end of stream")? != 0 {
        bail!("more than the {bytes} bytes that were sent");
    }
    Ok(())
}
