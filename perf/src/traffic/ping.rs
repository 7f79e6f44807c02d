//! ICMP echo with the payload compared.

use core::net::IpAddr;
use core::time::Duration;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Slice, Icmpv4Type, Icmpv6Header, Icmpv6Slice, Icmpv6Type,
    Ipv4HeaderSlice,
};

use super::{Pattern, run_tag};
use crate::address::Family;
use crate::lab::Host;
use crate::sys;

const ANSWER: Duration = Duration::from_secs(2);

/// A row of echo requests to send.
#[derive(Debug)]
#[must_use]
pub struct Ping<'a> {
    from: &'a dyn Host,
    to: IpAddr,
    count: u16,
    payload_bytes: usize,
    dont_fragment: bool,
}

/// What became of the echo requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PingReport {
    /// Requests that were sent, or should have been.
    pub sent: u16,
    /// Answers with the payload of the request.
    pub received: u16,
    /// What went wrong, one line each: answers that did not come or were changed, packets that the
    /// kernel refused to send, ICMP errors from anywhere on the way.
    pub failed: Vec<String>,
    /// TTL of the last answer; of IPv4 alone.
    pub ttl: Option<u8>,
    /// The longest round trip.
    pub slowest: Duration,
}

impl<'a> Ping<'a> {
    /// One echo request with 56 bytes, from one host to another.
    pub fn new(from: &'a dyn Host, to: &dyn Host) -> Self {
        Self::to_address(from, to.address())
    }

    /// The same over either family.
    pub fn over(family: Family, from: &'a dyn Host, to: &dyn Host) -> Self {
        Self::to_address(from, to.address_of(family))
    }

    /// The same, to any address.
    pub fn to_address(from: &'a dyn Host, to: impl Into<IpAddr>) -> Self {
        Self {
            from,
            to: to.into(),
            count: 1,
            payload_bytes: 56,
            dont_fragment: false,
        }
    }

    /// So many requests, one after the other.
    pub fn count(mut self, count: u16) -> Self {
        self.count = count;
        self
    }

    /// Payload bytes of each; the packet has 28 more, over IPv6 48.
    pub fn payload_bytes(mut self, bytes: usize) -> Self {
        self.payload_bytes = bytes;
        self
    }

    /// The longest packets that fit an MTU, with DF set.
    pub fn full(self, mtu: u16) -> Self {
        // The header of an echo request is as long as UDP's.
        let bytes = super::udp_payload_max_over(self.family(), mtu);
        self.payload_bytes(bytes).dont_fragment()
    }

    /// Sets DF on each.
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    fn family(&self) -> Family {
        match self.to {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        }
    }

    /// Sends them.
    ///
    /// # Errors
    /// The socket cannot be opened. What is lost or refused is in the report.
    pub fn run(self) -> Result<PingReport> {
        let socket = self
            .from
            .netns()
            .run(|| sys::icmp_socket(self.family()))?
            .context("raw ICMP socket")?;
        sys::set_receive_timeout(&socket, 50).context("receive timeout")?;
        if self.dont_fragment {
            sys::set_dont_fragment(&socket, self.family()).context("DF")?;
        }
        let mut report = PingReport::default();
        let tag = run_tag().to_be_bytes();
        let id = u16::from_be_bytes([tag[0], tag[1]]);
        if let Err(error) = sys::connect(&socket, self.to) {
            report.sent = self.count;
            report
                .failed
                .push(format!("connect to {}: {error}", self.to));
            return Ok(report);
        }
        for seq in 1..=self.count {
            if seq > 1 {
                thread::sleep(Duration::from_millis(5));
            }
            report.sent += 1;
            match self.exchange(&socket, id, seq) {
                Ok((ttl, time)) => {
                    report.received += 1;
                    report.ttl = ttl;
                    report.slowest = report.slowest.max(time);
                }
                Err(error) => report
                    .failed
                    .push(format!("request {seq} to {}: {error:#}", self.to)),
            }
        }
        Ok(report)
    }

    fn exchange(&self, socket: &OwnedFd, id: u16, seq: u16) -> Result<(Option<u8>, Duration)> {
        let mut payload = vec![0; self.payload_bytes];
        Pattern::seeded(u64::from(id) << 16 | u64::from(seq)).fill(&mut payload);
        let echo = IcmpEchoHeader { id, seq };
        let request = match self.family() {
            Family::Ipv4 => {
                let header =
                    Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &payload).to_bytes();
                [header.as_slice(), &payload].concat()
            }
            // The checksum is made by the kernel, which knows the source address.
            Family::Ipv6 => {
                let header = Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes();
                [header.as_slice(), &payload].concat()
            }
        };
        let start = Instant::now();
        sys::send(socket, &request).context("send")?;
        let mut buffer = vec![0; 65_536];
        while start.elapsed() < ANSWER {
            let length = match sys::receive(socket, &mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                // An ICMP error on its way back to a connected socket.
                Err(error) => return Err(error).context("answer"),
            };
            let (answer, ttl) = match self.family() {
                Family::Ipv4 => {
                    let header = Ipv4HeaderSlice::from_slice(&buffer[..length])
                        .context("IPv4 header of an answer")?;
                    (&buffer[header.slice().len()..length], Some(header.ttl()))
                }
                Family::Ipv6 => (&buffer[..length], None),
            };
            let (is_ours, content) = match self.family() {
                Family::Ipv4 => {
                    let icmp =
                        Icmpv4Slice::from_slice(answer).context("ICMP header of an answer")?;
                    let is_ours = icmp.icmp_type() == Icmpv4Type::EchoReply(echo);
                    (is_ours, icmp.payload())
                }
                Family::Ipv6 => {
                    let icmp =
                        Icmpv6Slice::from_slice(answer).context("ICMPv6 header of an answer")?;
                    let is_ours = icmp.icmp_type() == Icmpv6Type::EchoReply(echo);
                    (is_ours, icmp.payload())
                }
            };
            if is_ours {
                anyhow::ensure!(content == payload, "answer with a changed payload");
                return Ok((ttl, start.elapsed()));
            }
        }
        anyhow::bail!("no answer within {ANSWER:?}")
    }
}
