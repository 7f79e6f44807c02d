//! Traffic between hosts of the lab, every byte of it checked.
//!
//! A socket stays in the namespace where it was opened. So each kind of traffic opens its sockets
//! on a thread inside the namespaces, and then uses them from ordinary threads.

mod echo;
mod flow;
mod group;
mod histogram;
mod ping;
mod tcp;

pub use echo::{EchoReport, udp_echo, udp_echo_over};
pub use flow::{Mark, TrafficHandle, TrafficReport, UDP_PAYLOAD_MIN, UdpFlow};
pub use group::TrafficGroup;
pub use ping::{Ping, PingReport};
pub(crate) use tcp::accept;
pub use tcp::{TcpReport, tcp_transfer, tcp_transfer_over};

use std::net::UdpSocket;

use anyhow::{Context, Result};

use crate::address::Family;
use crate::lab::Host;

/// The longest UDP payload that fits an IPv4 packet of `mtu` bytes.
#[must_use]
pub const fn udp_payload_max(mtu: u16) -> usize {
    udp_payload_max_over(Family::Ipv4, mtu)
}

/// The longest UDP payload that fits a packet of `mtu` bytes.
#[must_use]
pub const fn udp_payload_max_over(family: Family, mtu: u16) -> usize {
    (mtu - family.udp_headers()) as usize
}

/// A UDP socket bound to a host's address and a free port.
pub(crate) fn udp_socket(host: &dyn Host, family: Family) -> Result<UdpSocket> {
    let address = (host.address_of(family), 0);
    host.netns()
        .run(|| UdpSocket::bind(address))?
        .with_context(|| format!("UDP socket on {}", host.name()))
}

/// A generator of bytes that a receiver can repeat (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    state: u64,
}

impl Pattern {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { state: seed }
    }

    fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.word().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// Whether the bytes are those that [`Pattern::fill`] would have written.
    pub(crate) fn matches(&mut self, bytes: &[u8]) -> bool {
        let mut same = true;
        for chunk in bytes.chunks(8) {
            let word = self.word().to_le_bytes();
            same &= *chunk == word[..chunk.len()];
        }
        same
    }
}

/// A number that differs from run to run and from call to call, so that late packets of one run
/// are not taken for another's.
pub(crate) fn run_tag() -> u32 {
    use core::hash::{BuildHasher, Hasher};
    let hash = std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish();
    u32::try_from(hash & u64::from(u32::MAX)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_itself_and_nothing_else() {
        let mut bytes = [0; 61];
        Pattern::seeded(5).fill(&mut bytes);
        assert!(Pattern::seeded(5).matches(&bytes));
        assert!(!Pattern::seeded(6).matches(&bytes));
        for position in 0..bytes.len() {
            let mut damaged = bytes;
            damaged[position] ^= 0x10;
            assert!(
                !Pattern::seeded(5).matches(&damaged),
                "flipped bit in byte {position}"
            );
        }
    }
}
