//! UDP datagrams there and back, compared byte for byte.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::UdpSocket;
use std::thread;

use anyhow::{Context, Result};

use super::{Pattern, run_tag, udp_socket};
use crate::address::Family;
use crate::lab::Host;
use crate::sys;

/// How long a datagram may take there and back.
const ANSWER: Duration = Duration::from_secs(2);

/// What became of the datagrams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EchoReport {
    /// Sent.
    pub sent: usize,
    /// Came back as they were sent.
    pub received: usize,
    /// The payload sizes of those that the kernel refused, that did not come back in time, or came
    /// back changed.
    pub failed: Vec<(usize, String)>,
}

/// Sends one datagram of each payload size, with DF set, from one host to another, which sends each
/// back, with DF set as well.
///
/// # Errors
/// A socket cannot be opened. Lost and changed datagrams are in the report.
pub fn udp_echo(from: &dyn Host, to: &dyn Host, payload_sizes: &[usize]) -> Result<EchoReport> {
    udp_echo_over(Family::Ipv4, true, from, to, payload_sizes)
}

/// The same over either family; without DF, datagrams longer than the MTU go in fragments.
///
/// # Errors
/// As [`udp_echo`].
pub fn udp_echo_over(
    family: Family,
    dont_fragment: bool,
    from: &dyn Host,
    to: &dyn Host,
    payload_sizes: &[usize],
) -> Result<EchoReport> {
    let (client, server) = (udp_socket(from, family)?, udp_socket(to, family)?);
    for socket in [&client, &server] {
        if dont_fragment {
            sys::set_dont_fragment(socket, family).context("DF")?;
        }
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .context("receive timeout")?;
    }
    client
        .connect(server.local_addr().context("address of the far end")?)
        .context("connect UDP")?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| send_back(&server, &stop));
        let mut report = EchoReport::default();
        for size in payload_sizes {
            report.sent += 1;
            match exchange(&client, *size) {
                Ok(()) => report.received += 1,
                Err(error) => report.failed.push((*size, format!("{error:#}"))),
            }
        }
        stop.store(true, Ordering::Release);
        Ok(report)
    })
}

fn send_back(server: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        if let Ok((length, peer)) = server.recv_from(&mut buffer) {
            // If it cannot be sent the client misses it, and says so.
            drop(server.send_to(&buffer[..length], peer));
        }
    }
}

fn exchange(client: &UdpSocket, size: usize) -> Result<()> {
    let mut sent = vec![0; size];
    Pattern::seeded(run_tag().into()).fill(&mut sent);
    client.send(&sent).context("send")?;
    let mut buffer = vec![0; 65_536];
    let start = std::time::Instant::now();
    loop {
        match client.recv(&mut buffer) {
            Ok(length) if buffer[..length] == sent => return Ok(()),
            // A late answer to an earlier size is no damage; of this size, it is.
            Ok(length) => anyhow::ensure!(length != size, "came back changed"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("receive"),
        }
        anyhow::ensure!(
            start.elapsed() < ANSWER,
            "did not come back within {ANSWER:?}"
        );
    }
}
