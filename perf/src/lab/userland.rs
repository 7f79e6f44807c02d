//! A tunnel in userland: what stands in for a plain node's tunnel where its kernel has no such device.
//!
//! ```text
//!   pods ── cni0 ── routing ──► TUN device ──► this thread ──► IPv4 socket ──► peers
//!                              flannel.ipip                    protocol 4
//!                              flannel0                        UDP 8285
//! ```
//!
//! It is the oracle of the packet format, so it shares no code with the data plane, and is written to
//! be read: a packet in, a packet out. It checks of a received packet what the kernel would.

use core::net::{Ipv4Addr, SocketAddrV4};
use core::sync::atomic::{AtomicBool, Ordering};
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use super::{Host, Node};
use crate::address;
use crate::frame::Ipv4;
use crate::sys;

/// How often the thread looks whether it shall end.
const LOOK_MS: i32 = 20;
const IPIP: u8 = 4;
const ECN: u8 = 0b11;
const ECT_1: u8 = 0b01;
const ECT_0: u8 = 0b10;
const CE: u8 = 0b11;

/// How the tunnel wraps packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TunnelKind {
    /// As the kernel's ipip device (net/ipv4/ipip.c, ip_tunnel.c) with flannel's settings.
    Ipip,
    /// As flannel's udp backend.
    Udp,
}

/// The running tunnel. Dropping it ends the thread, and with it the device.
#[derive(Debug)]
pub(super) struct UserlandTunnel {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UserlandTunnel {
    /// Makes the device, and carries its packets to the peers: subnets of 24 bits and where they are.
    pub(super) fn start(
        node: &Node,
        device: &str,
        kind: TunnelKind,
        mtu: u16,
        peers: Vec<(Ipv4Addr, Ipv4Addr)>,
    ) -> Result<Self> {
        let local = node.address();
        let (tun, wire) = node
            .netns()
            .run(|| std::io::Result::Ok((sys::tun(device)?, Wire::open(kind, local)?)))?
            .with_context(|| format!("tunnel {device} in userland on {}", node.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let tunnel = Tunnel {
            tun,
            wire,
            local,
            own: address::subnet(node.index()),
            mtu: mtu.into(),
            peers,
        };
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || tunnel.run(&stop)
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for UserlandTunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It ends by panic only for a bug of this module, which it then has printed.
            drop(thread.join());
        }
    }
}

/// The socket on the underlay.
#[derive(Debug)]
enum Wire {
    Ipip(OwnedFd),
    Udp(UdpSocket),
}

impl Wire {
    fn open(kind: TunnelKind, local: Ipv4Addr) -> std::io::Result<Self> {
        match kind {
            TunnelKind::Ipip => sys::ipv4_socket(IPIP).map(Self::Ipip),
            TunnelKind::Udp => {
                let socket = UdpSocket::bind((local, address::UDP_PORT))?;
                socket.set_nonblocking(true)?;
                Ok(Self::Udp(socket))
            }
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Ipip(socket) => socket.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
        }
    }
}

struct Tunnel {
    tun: OwnedFd,
    wire: Wire,
    local: Ipv4Addr,
    /// Network address of the node's own lease, also the device's address.
    own: Ipv4Addr,
    mtu: usize,
    peers: Vec<(Ipv4Addr, Ipv4Addr)>,
}

impl Tunnel {
    fn run(&self, stop: &AtomicBool) {
        let mut buffer = vec![0; 65_536];
        let mut identification = 0_u16;
        while !stop.load(Ordering::Acquire) {
            if !sys::wait_readable(&self.tun, &self.wire, LOOK_MS).unwrap_or_default() {
                continue;
            }
            // What cannot be sent or delivered is lost, as in any tunnel.
            while let Ok(length) = sys::read(&self.tun, &mut buffer) {
                identification = identification.wrapping_add(1);
                drop(self.send(&mut buffer[..length], identification));
            }
            while let Ok(length) = sys::receive(&self.wire, &mut buffer) {
                drop(self.deliver(&mut buffer[..length]));
            }
        }
    }

    /// A packet that the kernel has routed to the device.
    fn send(&self, packet: &mut [u8], identification: u16) -> Result<()> {
        let (ip, _payload) = Ipv4::parse(packet)?;
        let [a, b, c, _] = ip.destination.octets();
        let subnet = Ipv4Addr::new(a, b, c, 0);
        let peer = self.peers.iter().find(|(of_peer, _)| *of_peer == subnet);
        match (&self.wire, peer) {
            (Wire::Ipip(socket), Some((_, public))) => {
                let outer = Ipv4 {
                    protocol: IPIP,
                    identification,
                    dont_fragment: ip.dont_fragment,
                    ttl: ip.ttl,
                    // ip_tunnel_ecn_encap (include/net/inet_ecn.h): a mark shows as "can be marked".
                    tos: match ip.tos & ECN {
                        CE => ECT_0,
                        ecn => ecn,
                    },
                    ..Ipv4::udp(self.local, *public)
                };
                let bytes = outer.encode(packet);
                sys::send_to(socket, &bytes, SocketAddrV4::new(*public, 0))?;
            }
            (Wire::Udp(socket), Some((_, public))) => {
                if count_down(packet) {
                    socket.send_to(packet, (*public, address::UDP_PORT))?;
                }
            }
            (Wire::Ipip(_), None) => {}
            (Wire::Udp(_), None) => self.answer_unreachable(&ip, packet)?,
        }
        Ok(())
    }

    /// A packet from the underlay.
    fn deliver(&self, bytes: &mut [u8]) -> Result<()> {
        match self.wire {
            Wire::Ipip(_) => {
                let (outer, inner) = Ipv4::parse(bytes)?;
                let (start, end) = (bytes.len() - inner.len(), bytes.len());
                let packet = &mut bytes[start..end];
                if let Some(packet) = with_congestion_of(outer.tos, packet) {
                    sys::write(&self.tun, packet)?;
                }
            }
            Wire::Udp(_) => {
                let length = bytes.len().min(self.mtu);
                let packet = &mut bytes[..length];
                Ipv4::parse(packet)?;
                if count_down(packet) {
                    sys::write(&self.tun, packet)?;
                }
            }
        }
        Ok(())
    }

    /// flannel's proxy tells the sender itself: type 3, code 0, TTL 8; not about ICMP and not about
    /// fragments behind the first.
    fn answer_unreachable(&self, ip: &Ipv4, packet: &[u8]) -> Result<()> {
        if ip.protocol == 1 || ip.fragment_offset > 0 {
            return Ok(());
        }
        let quoted = &packet[..packet.len().min(20 + ip.options.len() + 8)];
        let mut icmp = [&[3, 0, 0, 0, 0, 0, 0, 0], quoted].concat();
        let checksum = crate::frame::internet_checksum(&icmp);
        icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
        let answer = Ipv4 {
            protocol: 1,
            ttl: 8,
            ..Ipv4::udp(self.own, ip.source)
        };
        sys::write(&self.tun, &answer.encode(&icmp))?;
        Ok(())
    }
}

/// Takes one off the TTL; false when nothing is left of it.
fn count_down(packet: &mut [u8]) -> bool {
    if packet[8] <= 1 {
        return false;
    }
    packet[8] -= 1;
    renew_checksum(packet);
    true
}

/// The packet with the congestion marks of RFC 6040 section 4.2 (figure 4); nothing where those say
/// that it shall be dropped.
fn with_congestion_of(outer_tos: u8, packet: &mut [u8]) -> Option<&[u8]> {
    let after = match (packet[1] & ECN, outer_tos & ECN) {
        (0, CE) => return None,
        (0, _) => 0,
        (_, CE) => CE,
        (ECT_0, ECT_1) => ECT_1,
        (inner, _) => inner,
    };
    packet[1] = packet[1] & !ECN | after;
    renew_checksum(packet);
    Some(packet)
}

fn renew_checksum(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 0x0f) * 4;
    packet[10..12].fill(0);
    let checksum = crate::frame::internet_checksum(&packet[..header]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn congestion_marks_follow_figure_4_of_rfc_6040() {
        // By the inner field, then by the outer one: Not-ECT, ECT(1), ECT(0), CE.
        let figure: [[Option<u8>; 4]; 4] = [
            [Some(0), Some(0), Some(0), None],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(2), Some(1), Some(2), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        for (inner, row) in (0..).zip(figure) {
            for (outer, expected) in (0..).zip(row) {
                let ip = Ipv4 {
                    tos: 0xb8 | inner,
                    ..Ipv4::udp(address::pod(1, 0), address::pod(2, 0))
                };
                let mut packet = ip.encode(&[7; 9]);
                let after = with_congestion_of(outer, &mut packet);
                let parsed = after.map(|packet| Ipv4::parse(packet).expect("parses").0);
                let tos = parsed.as_ref().map(|ip| ip.tos);
                assert_eq!(tos, expected.map(|ecn| 0xb8 | ecn), "{inner} in {outer}");
                assert!(parsed.is_none_or(|ip| ip.checksum.is_none()));
            }
        }
    }

    #[test]
    fn each_half_of_the_udp_tunnel_is_a_hop() {
        let ip = |ttl| Ipv4 {
            ttl,
            ..Ipv4::udp(address::pod(1, 0), address::pod(2, 0))
        };
        let mut packet = ip(2).encode(&[1; 3]);
        assert!(count_down(&mut packet));
        assert_eq!(packet, ip(1).encode(&[1; 3]));
        assert!(!count_down(&mut packet), "nothing is left");
    }
}
