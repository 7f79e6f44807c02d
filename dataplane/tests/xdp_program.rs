//! The XDP program itself, loaded into this kernel: what it answers for each
//! kind of frame (BPF_PROG_TEST_RUN: the frame goes nowhere), and how it gets
//! onto a NIC and off it again.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread; no device of the machine
//! is touched.

#![expect(unsafe_code, reason = "unshare, AF_XDP sockets and capset by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use etherparse::{
    EtherType, Ethernet2Slice, IpFragOffset, IpNumber, Ipv4Header, Ipv4HeaderSlice, Ipv4Options,
    Ipv6Header, Ipv6HeaderSlice, SingleVlanSlice, UdpHeader, UdpHeaderSlice,
};
use libbpf_rs::{ObjectBuilder, Xdp, XdpFlags};
use proptest::prelude::*;
use ripstop_dataplane::nic::Nic;
use ripstop_dataplane::xdp::{
    Action, AttachMode, AttachedMode, Buffers, Direct, Match, Outcome, Tunnel, TunnelMatch,
    XdpError, XdpProgram,
};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use common::{ip, own_namespace};

const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const LOCAL6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const PEER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
/// Pods of this node and of another, the second in the same half of the cluster's network.
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 7);
const FAR_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 7);
const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 10, 244, 1, 0, 0, 0x0100, 7);
const FAR_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 10, 244, 2, 0, 0, 0x0100, 7);
const VNI: u32 = 0x01_0203;
const VXLAN: Tunnel = Tunnel::Vxlan {
    port: 8472,
    vni: VNI,
};
const VLAN: u16 = 100;
/// The compiled program, which a test of this binary may need where the source tree is not.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ripstop.bpf.o"));
/// What a UMEM frame of 4096 bytes holds.
const FRAME_BYTES_MAX: u32 = 3840;

/// This node in IPv4, without and with packets that need no tunnel.
const V4: Match<Ipv4Addr> = Match {
    local: LOCAL,
    direct: None,
};
const DIRECT4: Match<Ipv4Addr> = Match {
    local: LOCAL,
    direct: Some(Direct {
        subnet: (Ipv4Addr::new(10, 244, 1, 0), 24),
        network: (Ipv4Addr::new(10, 244, 0, 0), 16),
    }),
};
const V6: Match<Ipv6Addr> = Match {
    local: LOCAL6,
    direct: None,
};
const DIRECT6: Match<Ipv6Addr> = Match {
    local: LOCAL6,
    direct: Some(Direct {
        // Longer than usual, so that every word of the address counts.
        subnet: (Ipv6Addr::new(0xfd00, 10, 244, 1, 0, 0, 0x0100, 0), 104),
        network: (Ipv6Addr::new(0xfd00, 10, 244, 0, 0, 0, 0, 0), 48),
    }),
};

const TUNNEL: TunnelMatch = TunnelMatch {
    tunnel: VXLAN,
    v4: Some(V4),
    ..TunnelMatch::OFF
};

/// What lies in the IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// UDP, VXLAN, and then the inner bytes.
    Vxlan,
    /// UDP, and then the inner bytes.
    Udp,
    /// The inner bytes.
    Ip,
}

/// A packet as fields. The default is exactly our VXLAN over IPv4 and, with
/// its 14 bytes of inner packet, 64 bytes long.
#[derive(Clone, Debug)]
struct Packet {
    destination_mac: [u8; 6],
    /// Protocol and control word of each VLAN tag.
    tags: Vec<(EtherType, u16)>,
    /// Replaces what fits the addresses.
    ether_type: Option<EtherType>,
    /// Replaces version and header length, which are right by default.
    first_byte: Option<u8>,
    source: IpAddr,
    destination: IpAddr,
    /// IPv4 only.
    options: Vec<u8>,
    /// Of the whole IPv4 packet, or behind the IPv6 header.
    length: Option<u16>,
    more_fragments: bool,
    fragment_offset: u16,
    protocol: IpNumber,
    content: Content,
    port: u16,
    udp_length: Option<u16>,
    udp_checksum: u16,
    /// First word of the VXLAN header.
    flags: u32,
    vni: u32,
    /// Last byte of the VXLAN header.
    reserved: u8,
    inner: usize,
    /// Ethernet padding behind the IP packet.
    padding: usize,
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            destination_mac: [2, 0, 0, 0, 0, 1],
            tags: Vec::new(),
            ether_type: None,
            first_byte: None,
            source: PEER.into(),
            destination: LOCAL.into(),
            options: Vec::new(),
            length: None,
            more_fragments: false,
            fragment_offset: 0,
            protocol: IpNumber::UDP,
            content: Content::Vxlan,
            port: 8472,
            udp_length: None,
            udp_checksum: 0,
            flags: 0x0800_0000,
            vni: VNI,
            reserved: 0,
            inner: 14,
            padding: 0,
        }
    }
}

impl Packet {
    fn with(change: impl FnOnce(&mut Self)) -> Self {
        Self::default().but(change)
    }

    fn but(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut packet = self.clone();
        change(&mut packet);
        packet
    }

    /// Our VXLAN over IPv6.
    fn vxlan6() -> Self {
        Self::with(|p| {
            (p.source, p.destination) = (PEER6.into(), LOCAL6.into());
            p.udp_checksum = 0x1234;
        })
    }

    /// Our tunnel of flannel's UDP backend.
    fn udp() -> Self {
        Self::with(|p| (p.content, p.port, p.inner) = (Content::Udp, 8285, 20))
    }

    /// Our IPIP tunnel.
    fn ipip() -> Self {
        Self::with(|p| (p.content, p.protocol, p.inner) = (Content::Ip, IpNumber::IPV4, 20))
    }

    /// From pod to pod without a tunnel.
    fn direct4() -> Self {
        Self::with(|p| {
            (p.content, p.protocol) = (Content::Ip, IpNumber::TCP);
            (p.source, p.destination) = (FAR_POD.into(), POD.into());
        })
    }

    fn direct6() -> Self {
        Self::direct4().but(|p| (p.source, p.destination) = (FAR_POD6.into(), POD6.into()))
    }

    fn tagged(&self, vlan: u16) -> Self {
        self.but(|p| p.tags = vec![(EtherType::VLAN_TAGGED_FRAME, vlan)])
    }

    fn ip_payload(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        if self.content != Content::Ip {
            let vxlan = if self.content == Content::Vxlan { 8 } else { 0 };
            let udp = UdpHeader {
                source_port: 50_000,
                destination_port: self.port,
                length: self
                    .udp_length
                    .unwrap_or(u16::try_from(8 + vxlan + self.inner).unwrap()),
                checksum: self.udp_checksum,
            };
            udp.write(&mut payload).unwrap();
        }
        if self.content == Content::Vxlan {
            payload.extend(self.flags.to_be_bytes());
            payload.extend((self.vni << 8 | u32::from(self.reserved)).to_be_bytes());
        }
        payload.resize(payload.len() + self.inner, 0xa5);
        payload
    }

    fn ip_header(&self, payload_bytes: usize) -> Vec<u8> {
        let mut header = Vec::new();
        let payload_bytes = u16::try_from(payload_bytes).unwrap();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (source, destination) = (source.octets(), destination.octets());
                let mut ip = Ipv4Header::new(0, 64, self.protocol, source, destination).unwrap();
                ip.options = Ipv4Options::try_from(&self.options[..]).unwrap();
                ip.total_len = self
                    .length
                    .unwrap_or(20 + u16::try_from(self.options.len()).unwrap() + payload_bytes);
                ip.dont_fragment = false;
                ip.more_fragments = self.more_fragments;
                ip.fragment_offset = IpFragOffset::try_new(self.fragment_offset).unwrap();
                ip.header_checksum = ip.calc_header_checksum();
                ip.write_raw(&mut header).unwrap();
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let ip = Ipv6Header {
                    payload_length: self.length.unwrap_or(payload_bytes),
                    next_header: self.protocol,
                    hop_limit: 64,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Ipv6Header::default()
                };
                ip.write(&mut header).unwrap();
            }
            _ => panic!("both addresses are of one family"),
        }
        if let Some(first_byte) = self.first_byte {
            header[0] = first_byte;
        }
        header
    }

    fn bytes(&self) -> Vec<u8> {
        let fitting = match self.destination {
            IpAddr::V4(_) => EtherType::IPV4,
            IpAddr::V6(_) => EtherType::IPV6,
        };
        let mut frame = self.destination_mac.to_vec();
        frame.extend([2, 0, 0, 0, 0, 2]);
        for (protocol, control) in &self.tags {
            frame.extend(protocol.0.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        frame.extend(self.ether_type.unwrap_or(fitting).0.to_be_bytes());
        let payload = self.ip_payload();
        frame.extend(self.ip_header(payload.len()));
        frame.extend(payload);
        frame.resize(frame.len() + self.padding, 0);
        frame
    }
}

/// The rule, said once more and with another library: is this frame exactly ours?
fn exactly_ours(ours: &TunnelMatch, frame: &[u8]) -> bool {
    let Ok(ethernet) = Ethernet2Slice::from_slice_without_fcs(frame) else {
        return false;
    };
    if ethernet.destination()[0] % 2 == 1 || frame.len() > FRAME_BYTES_MAX as usize {
        return false;
    }
    let (mut ether_type, mut packet) = (ethernet.ether_type(), ethernet.payload_slice());
    if let Some(vlan) = ours.vlan {
        let Ok(tag) = SingleVlanSlice::from_slice(packet) else {
            return false;
        };
        if ether_type != EtherType::VLAN_TAGGED_FRAME || tag.vlan_identifier().value() != vlan {
            return false;
        }
        (ether_type, packet) = (tag.ether_type(), tag.payload_slice());
    }
    match ether_type {
        EtherType::IPV4 => ours
            .v4
            .is_some_and(|family| exactly_ours4(ours.tunnel, &family, packet)),
        EtherType::IPV6 => ours
            .v6
            .is_some_and(|family| exactly_ours6(ours.tunnel, &family, packet)),
        _ => false,
    }
}

fn exactly_ours4(tunnel: Tunnel, family: &Match<Ipv4Addr>, packet: &[u8]) -> bool {
    let Some(fixed) = packet.first_chunk::<20>() else {
        return false;
    };
    if !(0x45..=0x4f).contains(&fixed[0]) {
        return false;
    }
    let address = |at: usize| Ipv4Addr::from([0, 1, 2, 3].map(|byte| fixed[at + byte]));
    let (source, destination) = (address(12), address(16));
    if destination != family.local {
        let within = |address: Ipv4Addr, (prefix, len): (Ipv4Addr, u8)| {
            u64::from(address.to_bits() ^ prefix.to_bits()) >> (32 - len) == 0
        };
        return family.direct.is_some_and(|direct| {
            within(destination, direct.subnet)
                && within(source, direct.network)
                && !within(source, direct.subnet)
        });
    }
    let Ok(ip) = Ipv4HeaderSlice::from_slice(packet) else {
        return false;
    };
    let length = usize::from(ip.total_len());
    if ip.ihl() != 5 || ip.is_fragmenting_payload() || length < 20 || length > packet.len() {
        return false;
    }
    // What the lengths leave may be less than a header; padding is not part of it.
    is_tunnel(tunnel, ip.protocol(), &packet[20..], length - 20)
}

fn exactly_ours6(tunnel: Tunnel, family: &Match<Ipv6Addr>, packet: &[u8]) -> bool {
    let Ok(ip) = Ipv6HeaderSlice::from_slice(packet) else {
        return false;
    };
    if ip.destination_addr() != family.local {
        let within = |address: Ipv6Addr, (prefix, len): (Ipv6Addr, u8)| {
            let differing = address.to_bits() ^ prefix.to_bits();
            differing.leading_zeros() >= u32::from(len)
        };
        return family.direct.is_some_and(|direct| {
            within(ip.destination_addr(), direct.subnet)
                && within(ip.source_addr(), direct.network)
                && !within(ip.source_addr(), direct.subnet)
        });
    }
    let length = usize::from(ip.payload_length());
    let Tunnel::Vxlan { .. } = tunnel else {
        return false;
    };
    let udp_checksum = packet.get(46..48).unwrap_or(&[0, 0]);
    40 + length <= packet.len()
        && udp_checksum != [0, 0]
        && is_tunnel(tunnel, ip.next_header(), &packet[40..], length)
}

fn is_tunnel(tunnel: Tunnel, protocol: IpNumber, payload: &[u8], length: usize) -> bool {
    let (port, header) = match tunnel {
        Tunnel::None => return false,
        Tunnel::Ipip => return protocol == IpNumber::IPV4,
        Tunnel::Udp { port } => (port, 8),
        Tunnel::Vxlan { port, .. } => (port, 16),
    };
    let Ok(udp) = UdpHeaderSlice::from_slice(payload) else {
        return false;
    };
    let vxlan = |vni: u32| {
        payload.get(8..16).is_some_and(|bytes| {
            bytes[..4] == [8, 0, 0, 0] && bytes[4..] == (vni << 8).to_be_bytes()
        })
    };
    protocol == IpNumber::UDP
        && udp.destination_port() == port
        && usize::from(udp.length()) == length
        && length >= header
        && match tunnel {
            Tunnel::Vxlan { vni, .. } => vxlan(vni),
            Tunnel::None | Tunnel::Udp { .. } | Tunnel::Ipip => true,
        }
}

/// A veth end with two receive queues, up, in a namespace of this thread.
fn veth() -> Nic {
    own_namespace();
    ip("link add vx0 numrxqueues 2 type veth peer name vx1 numtxqueues 2");
    for end in ["vx0", "vx1"] {
        // Without an address of its own the kernel has nothing to announce on it.
        ip(&format!("link set {end} addrgenmode none"));
        ip(&format!("link set {end} up"));
    }
    Nic::open("vx0").unwrap()
}

/// Waits for what happens when the last copy of a descriptor is closed: a test
/// that runs beside this one may hold a copy between its fork and its exec.
fn eventually(mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(60), "still not so");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An AF_XDP socket with a receive ring, without which Linux 7.3 does not take it into a map. It need not be bound.
fn xdp_socket() -> OwnedFd {
    // SAFETY: takes plain numbers.
    let socket = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(socket >= 0, "AF_XDP socket: {}", io::Error::last_os_error());
    // SAFETY: a descriptor that the kernel has just given to us alone.
    let owned = unsafe { OwnedFd::from_raw_fd(socket) };
    let entries: libc::c_int = 64;
    // SAFETY: the value is alive for the call and four bytes long, as stated.
    let status = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_XDP,
            libc::XDP_RX_RING,
            (&raw const entries).cast(),
            4,
        )
    };
    assert_eq!(status, 0, "receive ring: {}", io::Error::last_os_error());
    owned
}

/// The program with a socket for queue 0. It is attached, because the kernel
/// takes 20 ms to run a program that is not.
struct Rig {
    program: XdpProgram,
    nic: Nic,
    socket: Option<OwnedFd>,
}

impl Rig {
    fn new() -> Self {
        let nic = veth();
        let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
        program.attach(&nic, AttachMode::Native).unwrap();
        program.configure(&TUNNEL).unwrap();
        let socket = xdp_socket();
        program.register_socket(0, socket.as_fd()).unwrap();
        Self {
            program,
            nic,
            socket: Some(socket),
        }
    }

    /// Action and outcome of a frame on `queue`, both programs alike; one
    /// counter went up by one and no other moved.
    fn on_queue(&self, queue: u32, frame: &[u8]) -> (Action, Outcome) {
        let answers = [Buffers::One, Buffers::Several].map(|buffers| {
            let before = self.program.counters().unwrap();
            let action = self
                .program
                .run(buffers, frame, Some((self.nic.index, queue)))
                .unwrap();
            let after = self.program.counters().unwrap();
            let moved: Vec<Outcome> = Outcome::ALL
                .iter()
                .copied()
                .filter(|outcome| before[*outcome] != after[*outcome])
                .collect();
            assert_eq!(moved.len(), 1, "counters that moved: {moved:?}");
            assert_eq!(after.seen(), before.seen() + 1);
            assert_eq!(
                action == Action::Redirect,
                moved[0] == Outcome::Redirected,
                "{action:?} was counted as {moved:?}"
            );
            (action, moved[0])
        });
        assert_eq!(answers[0], answers[1], "the two programs differ");
        answers[0]
    }

    fn outcome(&self, frame: &[u8]) -> Outcome {
        self.on_queue(0, frame).1
    }
}

#[test]
fn each_kind_of_frame_has_its_outcome() {
    let rig = Rig::new();
    let table: Vec<(&str, Packet, Outcome)> = vec![
        ("ours", Packet::default(), Outcome::Redirected),
        (
            "ours, full size",
            Packet::with(|p| p.inner = 1464),
            Outcome::Redirected,
        ),
        (
            "ours, padded by Ethernet",
            Packet::with(|p| p.padding = 10),
            Outcome::Redirected,
        ),
        (
            "ours, longest that fits",
            Packet::with(|p| p.inner = 3840 - 50),
            Outcome::Redirected,
        ),
        (
            "one byte too long",
            Packet::with(|p| p.inner = 3840 - 49),
            Outcome::TooLong,
        ),
        (
            "padded one byte too long",
            Packet::with(|p| p.padding = 3840 - 63),
            Outcome::TooLong,
        ),
        (
            "no inner packet",
            Packet::with(|p| p.inner = 0),
            Outcome::Redirected,
        ),
        (
            "ARP",
            Packet::with(|p| p.ether_type = Some(EtherType::ARP)),
            Outcome::PassedOther,
        ),
        (
            "IPv6",
            Packet::with(|p| p.ether_type = Some(EtherType::IPV6)),
            Outcome::PassedOther,
        ),
        (
            "VLAN",
            Packet::with(|p| p.ether_type = Some(EtherType::VLAN_TAGGED_FRAME)),
            Outcome::OtherVlan,
        ),
        (
            "IP version 6",
            Packet::with(|p| p.first_byte = Some(0x65)),
            Outcome::PassedOther,
        ),
        (
            "IP version 0",
            Packet::with(|p| p.first_byte = Some(0x05)),
            Outcome::PassedOther,
        ),
        (
            "IP header of 16 bytes",
            Packet::with(|p| p.first_byte = Some(0x44)),
            Outcome::PassedOther,
        ),
        (
            "TCP to us",
            Packet::with(|p| p.protocol = IpNumber::TCP),
            Outcome::PassedOther,
        ),
        (
            "another address",
            Packet::with(|p| p.destination = PEER.into()),
            Outcome::PassedOther,
        ),
        (
            "another port",
            Packet::with(|p| p.port = 8473),
            Outcome::PassedOther,
        ),
        (
            "port with its bytes swapped",
            Packet::with(|p| p.port = 8472u16.swap_bytes()),
            Outcome::PassedOther,
        ),
        (
            "first fragment",
            Packet::with(|p| p.more_fragments = true),
            Outcome::Fragment,
        ),
        (
            "middle fragment",
            Packet::with(|p| (p.more_fragments, p.fragment_offset) = (true, 100)),
            Outcome::Fragment,
        ),
        (
            "last fragment",
            Packet::with(|p| p.fragment_offset = 0x1fff),
            Outcome::Fragment,
        ),
        (
            "fragment for another port",
            Packet::with(|p| (p.more_fragments, p.port) = (true, 53)),
            Outcome::Fragment,
        ),
        (
            "fragment to another address",
            Packet::with(|p| (p.more_fragments, p.destination) = (true, PEER.into())),
            Outcome::PassedOther,
        ),
        (
            "TCP fragment",
            Packet::with(|p| (p.more_fragments, p.protocol) = (true, IpNumber::TCP)),
            Outcome::PassedOther,
        ),
        (
            "IP options",
            Packet::with(|p| p.options = vec![1; 4]),
            Outcome::IpOptions,
        ),
        (
            "all of the IP options",
            Packet::with(|p| p.options = vec![1; 40]),
            Outcome::IpOptions,
        ),
        (
            "IP options, another port",
            Packet::with(|p| (p.options, p.port) = (vec![1; 8], 53)),
            Outcome::PassedOther,
        ),
        (
            "UDP length one too long",
            Packet::with(|p| p.udp_length = Some(31)),
            Outcome::BadLength,
        ),
        (
            "UDP length one too short",
            Packet::with(|p| p.udp_length = Some(29)),
            Outcome::BadLength,
        ),
        (
            "UDP length 0",
            Packet::with(|p| p.udp_length = Some(0)),
            Outcome::BadLength,
        ),
        (
            "UDP length 65535",
            Packet::with(|p| p.udp_length = Some(65535)),
            Outcome::BadLength,
        ),
        (
            "IP length one too long",
            Packet::with(|p| p.length = Some(51)),
            Outcome::BadLength,
        ),
        (
            "IP length one too short",
            Packet::with(|p| p.length = Some(49)),
            Outcome::BadLength,
        ),
        (
            "IP length 0",
            Packet::with(|p| p.length = Some(0)),
            Outcome::BadLength,
        ),
        (
            "lengths agree, and exceed the frame",
            Packet::with(|p| (p.length, p.udp_length) = (Some(51), Some(31))),
            Outcome::BadLength,
        ),
        (
            "lengths agree, and leave no room for VXLAN",
            Packet::with(|p| (p.length, p.udp_length) = (Some(35), Some(15))),
            Outcome::BadLength,
        ),
        (
            "lengths agree with 16 bits of overflow",
            Packet::with(|p| (p.length, p.udp_length) = (Some(10), Some(65526))),
            Outcome::BadLength,
        ),
        (
            "VXLAN without flags",
            Packet::with(|p| p.flags = 0),
            Outcome::VxlanFlags,
        ),
        (
            "VXLAN-GPE flags",
            Packet::with(|p| p.flags = 0x0c00_0000),
            Outcome::VxlanFlags,
        ),
        (
            "VXLAN-GBP",
            Packet::with(|p| p.flags = 0x8800_0007),
            Outcome::VxlanFlags,
        ),
        (
            "reserved after the flags",
            Packet::with(|p| p.flags = 0x0800_0001),
            Outcome::VxlanFlags,
        ),
        (
            "reserved after the VNI",
            Packet::with(|p| p.reserved = 1),
            Outcome::VxlanFlags,
        ),
        (
            "another VNI",
            Packet::with(|p| p.vni = 1),
            Outcome::OtherVni,
        ),
        (
            "VNI with its top bit flipped",
            Packet::with(|p| p.vni ^= 0x80_0000),
            Outcome::OtherVni,
        ),
    ];
    for (name, packet, expected) in table {
        let frame = packet.bytes();
        assert_eq!(rig.outcome(&frame), expected, "{name}: {packet:?}");
        assert_eq!(
            exactly_ours(&TUNNEL, &frame),
            expected == Outcome::Redirected,
            "{name}: the oracle"
        );
    }
}

#[test]
fn a_frame_cut_short_anywhere_is_passed() {
    let rig = Rig::new();
    let whole = Packet::default().bytes();
    assert_eq!(whole.len(), 64);
    for length in 14..=64 {
        let expected = match length {
            // Up to the end of the UDP header nothing says that it is ours.
            ..42 => Outcome::PassedOther,
            42..64 => Outcome::BadLength,
            _ => Outcome::Redirected,
        };
        assert_eq!(rig.outcome(&whole[..length]), expected, "{length} bytes");
    }
}

#[test]
fn a_queue_without_a_socket_is_the_kernels() {
    let mut rig = Rig::new();
    let frame = Packet::default().bytes();
    assert_eq!(
        rig.on_queue(0, &frame),
        (Action::Redirect, Outcome::Redirected)
    );
    assert_eq!(rig.on_queue(1, &frame), (Action::Pass, Outcome::NoSocket));

    let second = xdp_socket();
    rig.program.register_socket(1, second.as_fd()).unwrap();
    assert_eq!(
        rig.on_queue(1, &frame),
        (Action::Redirect, Outcome::Redirected)
    );
    rig.program.unregister_socket(1).unwrap();
    rig.program.unregister_socket(1).unwrap();
    assert_eq!(rig.on_queue(1, &frame), (Action::Pass, Outcome::NoSocket));

    // A socket that is closed, by a dying process for example, leaves no trace.
    rig.socket = None;
    eventually(|| rig.on_queue(0, &frame) == (Action::Pass, Outcome::NoSocket));

    let beyond = rig
        .program
        .register_socket(1024, second.as_fd())
        .unwrap_err();
    assert!(beyond.to_string().contains("1024"), "{beyond}");
}

#[test]
fn configuration_takes_effect_at_once_and_can_be_switched_off() {
    let rig = Rig::new();
    let ours = Packet::default().bytes();
    let other = TunnelMatch {
        tunnel: Tunnel::Vxlan {
            port: 4789,
            vni: 0xff_ffff,
        },
        v4: Some(Match { local: PEER, ..V4 }),
        ..TunnelMatch::OFF
    };
    let others = Packet::with(|p| {
        (p.destination, p.port, p.vni) = (PEER.into(), 4789, 0xff_ffff);
    })
    .bytes();

    for _ in 0..2 {
        rig.program.disable().unwrap();
        assert_eq!(rig.outcome(&ours), Outcome::PassedOther);
    }
    rig.program.configure(&TUNNEL).unwrap();
    assert_eq!(rig.outcome(&ours), Outcome::Redirected);
    assert_eq!(rig.outcome(&others), Outcome::PassedOther);
    rig.program.configure(&other).unwrap();
    assert_eq!(rig.outcome(&ours), Outcome::PassedOther);
    assert_eq!(rig.outcome(&others), Outcome::Redirected);

    let bad_subnet = Direct {
        subnet: (POD, 33),
        network: (POD, 16),
    };
    let bad_direct = Match {
        local: LOCAL,
        direct: Some(bad_subnet),
    };
    let table = [
        (
            TunnelMatch {
                tunnel: Tunnel::Vxlan {
                    port: 8472,
                    vni: 1 << 24,
                },
                ..TUNNEL
            },
            "16777216",
        ),
        (
            TunnelMatch {
                vlan: Some(4095),
                ..TUNNEL
            },
            "VLAN 4095",
        ),
        (
            TunnelMatch {
                vlan: Some(0),
                ..TUNNEL
            },
            "VLAN 0",
        ),
        (
            TunnelMatch {
                v4: Some(bad_direct),
                ..TUNNEL
            },
            "10.244.1.7/33",
        ),
    ];
    for (bad, said) in table {
        let error = rig.program.configure(&bad).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(
            rig.outcome(&others),
            Outcome::Redirected,
            "what ran goes on"
        );
    }
}

/// While the program judges frames without a pause, the configuration changes
/// over and over between two that share no field. A frame that both take is
/// always taken, and frames that only a mix of the two would take never are.
#[test]
fn no_frame_is_judged_by_a_mix_of_two_configurations() {
    let rig = Rig::new();
    let first = TunnelMatch {
        tunnel: Tunnel::Vxlan {
            port: 8472,
            vni: VNI,
        },
        v4: Some(DIRECT4),
        ..TunnelMatch::OFF
    };
    // Takes the first one's tunnel packets as direct ones: from PEER to LOCAL.
    let second = TunnelMatch {
        tunnel: Tunnel::Vxlan { port: 4789, vni: 7 },
        v4: Some(Match {
            local: Ipv4Addr::new(198, 51, 100, 1),
            direct: Some(Direct {
                subnet: (LOCAL, 32),
                network: (Ipv4Addr::new(192, 0, 2, 0), 24),
            }),
        }),
        ..TunnelMatch::OFF
    };
    rig.program.configure(&first).unwrap();
    let both = Packet::default().bytes();
    let mixed = [
        Packet::with(|p| (p.port, p.vni) = (4789, VNI)),
        Packet::with(|p| (p.port, p.vni) = (8472, 7)),
        Packet::with(|p| (p.port, p.vni) = (4789, 7)),
    ]
    // The second must not take them as direct ones.
    .map(|packet| packet.but(|p| p.source = FAR_POD.into()).bytes());

    let before = rig.program.counters().unwrap();
    let stop = AtomicBool::new(false);
    let (swaps, runs, wrong) = thread::scope(|scope| {
        let judge = scope.spawn(|| {
            let run = |frame: &[u8]| {
                let received_on = Some((rig.nic.index, 0));
                rig.program
                    .run_often(Buffers::One, frame, received_on, 20_000)
                    .unwrap();
            };
            let mut runs = 0u64;
            let mut wrong = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let before = rig.program.counters().unwrap();
                run(&both);
                let between = rig.program.counters().unwrap();
                wrong += between.passed() - before.passed();
                mixed.iter().for_each(|frame| run(frame));
                let after = rig.program.counters().unwrap();
                wrong += after[Outcome::Redirected] - between[Outcome::Redirected];
                runs += 1;
            }
            (runs, wrong)
        });
        let start = Instant::now();
        let mut swaps = 0;
        while start.elapsed() < Duration::from_secs(2) || swaps < 20 {
            for ours in [&second, &first] {
                rig.program.configure(ours).unwrap();
                swaps += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let (runs, wrong) = judge.join().unwrap();
        (swaps, runs, wrong)
    });
    let seen = rig.program.counters().unwrap().seen() - before.seen();
    assert!(seen >= runs * 80_000, "{seen} frames in {runs} runs");
    assert_eq!(wrong, 0, "of {seen} frames, under {swaps} changes");
}

#[test]
fn a_frame_before_any_configuration_is_passed() {
    own_namespace();
    let program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    let socket = xdp_socket();
    program.register_socket(0, socket.as_fd()).unwrap();
    // The second is what a configuration of zeros would match.
    let zeros =
        Packet::with(|p| (p.destination, p.port, p.vni) = (Ipv4Addr::UNSPECIFIED.into(), 0, 0));
    for packet in [Packet::default(), zeros] {
        let action = program.run(Buffers::One, &packet.bytes(), None);
        assert_eq!(action.unwrap(), Action::Pass);
    }
    let counters = program.counters().unwrap();
    assert_eq!(counters[Outcome::PassedOther], 2);
    assert_eq!((counters.seen(), counters.passed()), (2, 2));
}

#[test]
fn jumbo_frames_are_measured_over_all_their_buffers() {
    own_namespace();
    let jumbo = Packet::with(|p| p.inner = 8950).bytes();
    for (frame_bytes_max, expected, outcome) in [
        (FRAME_BYTES_MAX, Action::Pass, Outcome::TooLong),
        (9000, Action::Redirect, Outcome::Redirected),
    ] {
        let program = XdpProgram::load(frame_bytes_max).unwrap();
        let socket = xdp_socket();
        program.configure(&TUNNEL).unwrap();
        program.register_socket(0, socket.as_fd()).unwrap();
        assert_eq!(
            program.run(Buffers::Several, &jumbo, None).unwrap(),
            expected
        );
        assert_eq!(program.counters().unwrap()[outcome], 1);
    }
}

#[test]
fn the_limit_can_be_changed() {
    let mut rig = Rig::new();
    let frame = Packet::default().bytes();
    for (limit, expected) in [
        (64, Outcome::Redirected),
        (63, Outcome::TooLong),
        (64, Outcome::Redirected),
    ] {
        rig.program.limit_frames(limit);
        rig.program.configure(&TUNNEL).unwrap();
        assert_eq!(rig.outcome(&frame), expected, "{limit}");
    }
}

/// Every configuration that a NIC can have, by name.
fn configurations() -> Vec<(&'static str, TunnelMatch)> {
    let both = |tunnel, v4, v6| TunnelMatch {
        tunnel,
        vlan: None,
        v4: Some(v4),
        v6: Some(v6),
    };
    let udp = Tunnel::Udp { port: 8285 };
    let mut all = vec![
        ("vxlan, IPv4", TUNNEL),
        (
            "vxlan, IPv6",
            TunnelMatch {
                v4: None,
                v6: Some(V6),
                ..TUNNEL
            },
        ),
        ("vxlan", both(VXLAN, V4, V6)),
        ("vxlan with DirectRouting", both(VXLAN, DIRECT4, DIRECT6)),
        ("udp", both(udp, V4, V6)),
        ("ipip", both(Tunnel::Ipip, V4, V6)),
        (
            "ipip with DirectRouting",
            both(Tunnel::Ipip, DIRECT4, DIRECT6),
        ),
        ("host-gw", both(Tunnel::None, DIRECT4, DIRECT6)),
        ("alloc", both(Tunnel::None, V4, V6)),
        ("off", TunnelMatch::OFF),
    ];
    all.extend(all.clone().into_iter().map(|(name, ours)| {
        let vlan = Some(VLAN);
        (name, TunnelMatch { vlan, ..ours })
    }));
    all
}

/// The packet that is exactly each backend's, and in which configurations it is ours.
fn exact_packets() -> Vec<(Packet, &'static [&'static str])> {
    vec![
        (
            Packet::default(),
            &["vxlan, IPv4", "vxlan", "vxlan with DirectRouting"],
        ),
        (
            Packet::vxlan6(),
            &["vxlan, IPv6", "vxlan", "vxlan with DirectRouting"],
        ),
        (Packet::udp(), &["udp"]),
        (Packet::ipip(), &["ipip", "ipip with DirectRouting"]),
        (
            Packet::direct4(),
            &[
                "vxlan with DirectRouting",
                "ipip with DirectRouting",
                "host-gw",
            ],
        ),
        (
            Packet::direct6(),
            &[
                "vxlan with DirectRouting",
                "ipip with DirectRouting",
                "host-gw",
            ],
        ),
    ]
}

#[test]
fn each_configuration_takes_its_own_packets_and_no_others() {
    let rig = Rig::new();
    for (name, ours) in configurations() {
        rig.program.configure(&ours).unwrap();
        for (packet, takers) in exact_packets() {
            let taken = takers.contains(&name);
            for tags in [&[][..], &[VLAN], &[VLAN + 1], &[0], &[VLAN, VLAN]] {
                let packet = packet.but(|p| {
                    p.tags = tags
                        .iter()
                        .map(|vlan| (EtherType::VLAN_TAGGED_FRAME, *vlan))
                        .collect();
                });
                let right_tags = tags == ours.vlan.as_slice();
                let expected = match (right_tags, taken) {
                    (true, true) => Outcome::Redirected,
                    (true, false) => Outcome::PassedOther,
                    (false, _) => Outcome::OtherVlan,
                };
                let frame = packet.bytes();
                let found = rig.outcome(&frame);
                assert_eq!(found, expected, "{name}, VLAN {:?}: {packet:?}", ours.vlan);
                assert_eq!(exactly_ours(&ours, &frame), right_tags && taken, "{name}");
            }
        }
    }
}

/// A deviation from an exact packet, and what becomes of it.
type Deviation = (&'static str, fn(&mut Packet), Outcome);

/// Checks each deviation of `exact`, without and with a VLAN tag.
fn assert_deviations(rig: &Rig, ours: &TunnelMatch, exact: &Packet, table: &[Deviation]) {
    for vlan in [None, Some(VLAN)] {
        let ours = TunnelMatch { vlan, ..*ours };
        rig.program.configure(&ours).unwrap();
        let exact = vlan.map_or(exact.clone(), |vlan| exact.tagged(vlan));
        assert_eq!(rig.outcome(&exact.bytes()), Outcome::Redirected);
        for (name, deviate, expected) in table {
            let packet = exact.but(deviate);
            let frame = packet.bytes();
            let name = format!("{name}, VLAN {vlan:?}: {packet:?}");
            assert_eq!(rig.outcome(&frame), *expected, "{name}");
            let redirected = *expected == Outcome::Redirected;
            assert_eq!(exactly_ours(&ours, &frame), redirected, "{name}: oracle");
        }
    }
}

/// What holds for every packet of every backend.
const ANY_PACKET: &[Deviation] = &[
    (
        "to a multicast MAC",
        |p| p.destination_mac = [1, 0, 0x5e, 0, 0, 1],
        Outcome::PassedOther,
    ),
    (
        "to all",
        |p| p.destination_mac = [0xff; 6],
        Outcome::PassedOther,
    ),
    (
        "to another unicast MAC, which a worker judges",
        |p| p.destination_mac = [2, 0, 0, 0, 0, 9],
        Outcome::Redirected,
    ),
    (
        "ARP",
        |p| p.ether_type = Some(EtherType::ARP),
        Outcome::PassedOther,
    ),
    (
        "no version",
        |p| p.first_byte = Some(0x05),
        Outcome::PassedOther,
    ),
    (
        "one tag more",
        |p| p.tags.push((EtherType::VLAN_TAGGED_FRAME, VLAN)),
        Outcome::OtherVlan,
    ),
    (
        "a provider's tag",
        |p| p.tags = vec![(EtherType::PROVIDER_BRIDGING, VLAN)],
        Outcome::OtherVlan,
    ),
    ("full size", |p| p.inner = 1400, Outcome::Redirected),
    (
        "padded by Ethernet",
        |p| p.padding = 10,
        Outcome::Redirected,
    ),
    (
        "padded beyond a UMEM frame",
        |p| p.padding = 3840,
        Outcome::TooLong,
    ),
    (
        "too long for a UMEM frame",
        |p| p.inner = 3840,
        Outcome::TooLong,
    ),
];

const ANY_IPV4: &[Deviation] = &[
    (
        "IP version 6",
        |p| p.first_byte = Some(0x65),
        Outcome::PassedOther,
    ),
    (
        "IP header of 16 bytes",
        |p| p.first_byte = Some(0x44),
        Outcome::PassedOther,
    ),
    (
        "labelled as IPv6",
        |p| p.ether_type = Some(EtherType::IPV6),
        Outcome::PassedOther,
    ),
];

const ANY_TUNNEL4: &[Deviation] = &[
    (
        "first fragment",
        |p| p.more_fragments = true,
        Outcome::Fragment,
    ),
    (
        "last fragment",
        |p| p.fragment_offset = 1,
        Outcome::Fragment,
    ),
    ("IP options", |p| p.options = vec![1; 4], Outcome::IpOptions),
    ("IP length 0", |p| p.length = Some(0), Outcome::BadLength),
    ("IP length 19", |p| p.length = Some(19), Outcome::BadLength),
    (
        "IP length beyond the frame",
        |p| p.length = Some(100),
        Outcome::BadLength,
    ),
];

/// What a worker judges, where there is no tunnel.
const ANY_DIRECT4: &[Deviation] = &[
    (
        "first fragment",
        |p| p.more_fragments = true,
        Outcome::Redirected,
    ),
    (
        "last fragment",
        |p| p.fragment_offset = 1,
        Outcome::Redirected,
    ),
    (
        "IP options",
        |p| p.options = vec![1; 4],
        Outcome::Redirected,
    ),
    (
        "all of the IP options",
        |p| p.options = vec![1; 40],
        Outcome::Redirected,
    ),
    (
        "a header longer than the frame",
        |p| (p.first_byte, p.inner) = (Some(0x4f), 0),
        Outcome::Redirected,
    ),
    ("IP length 0", |p| p.length = Some(0), Outcome::Redirected),
    ("IP length 19", |p| p.length = Some(19), Outcome::Redirected),
    (
        "IP length beyond the frame",
        |p| p.length = Some(100),
        Outcome::Redirected,
    ),
];

const ANY_IPV6: &[Deviation] = &[
    (
        "IP version 4",
        |p| p.first_byte = Some(0x45),
        Outcome::PassedOther,
    ),
    (
        "labelled as IPv4",
        |p| p.ether_type = Some(EtherType::IPV4),
        Outcome::PassedOther,
    ),
];

const ANY_TUNNEL6: &[Deviation] = &[
    (
        "fragment",
        |p| p.protocol = IpNumber::IPV6_FRAGMENTATION_HEADER,
        Outcome::Fragment,
    ),
    (
        "hop-by-hop options",
        |p| p.protocol = IpNumber::IPV6_HEADER_HOP_BY_HOP,
        Outcome::IpOptions,
    ),
    (
        "routing header",
        |p| p.protocol = IpNumber::IPV6_ROUTE_HEADER,
        Outcome::IpOptions,
    ),
    (
        "destination options",
        |p| p.protocol = IpNumber::IPV6_DESTINATION_OPTIONS,
        Outcome::IpOptions,
    ),
    (
        "payload length beyond the frame",
        |p| p.length = Some(100),
        Outcome::BadLength,
    ),
];

const ANY_DIRECT6: &[Deviation] = &[
    (
        "fragment",
        |p| p.protocol = IpNumber::IPV6_FRAGMENTATION_HEADER,
        Outcome::Redirected,
    ),
    (
        "hop-by-hop options",
        |p| p.protocol = IpNumber::IPV6_HEADER_HOP_BY_HOP,
        Outcome::Redirected,
    ),
    (
        "routing header",
        |p| p.protocol = IpNumber::IPV6_ROUTE_HEADER,
        Outcome::Redirected,
    ),
    (
        "destination options",
        |p| p.protocol = IpNumber::IPV6_DESTINATION_OPTIONS,
        Outcome::Redirected,
    ),
    (
        "payload length beyond the frame",
        |p| p.length = Some(100),
        Outcome::Redirected,
    ),
];

const ANY_VXLAN: &[Deviation] = &[
    ("no flags", |p| p.flags = 0, Outcome::VxlanFlags),
    (
        "group policy",
        |p| p.flags = 0x8800_0007,
        Outcome::VxlanFlags,
    ),
    (
        "generic protocol extension",
        |p| p.flags = 0x0c00_0000,
        Outcome::VxlanFlags,
    ),
    (
        "reserved bit after the flags",
        |p| p.flags = 0x0800_0001,
        Outcome::VxlanFlags,
    ),
    (
        "reserved after the VNI",
        |p| p.reserved = 1,
        Outcome::VxlanFlags,
    ),
    ("another VNI", |p| p.vni += 1, Outcome::OtherVni),
    ("no inner packet", |p| p.inner = 0, Outcome::Redirected),
    (
        "UDP length that cuts the VXLAN header",
        |p| (p.udp_length, p.inner) = (Some(15), 0),
        Outcome::BadLength,
    ),
];

const ANY_UDP: &[Deviation] = &[
    ("another port", |p| p.port += 1, Outcome::PassedOther),
    (
        "port with its bytes swapped",
        |p| p.port = p.port.swap_bytes(),
        Outcome::PassedOther,
    ),
    ("TCP", |p| p.protocol = IpNumber::TCP, Outcome::PassedOther),
    (
        "IPIP",
        |p| p.protocol = IpNumber::IPV4,
        Outcome::PassedOther,
    ),
    (
        "UDP length 0",
        |p| p.udp_length = Some(0),
        Outcome::BadLength,
    ),
    (
        "UDP length 7",
        |p| p.udp_length = Some(7),
        Outcome::BadLength,
    ),
    (
        "UDP length one too short",
        |p| p.udp_length = Some(u16::try_from(p.ip_payload().len()).unwrap() - 1),
        Outcome::BadLength,
    ),
    (
        "UDP length one too long",
        |p| p.udp_length = Some(u16::try_from(p.ip_payload().len()).unwrap() + 1),
        Outcome::BadLength,
    ),
];

#[test]
fn every_deviation_from_vxlan_over_ipv4_is_passed() {
    let table: &[Deviation] = &[
        (
            "another address",
            |p| p.destination = PEER.into(),
            Outcome::PassedOther,
        ),
        (
            "with a UDP checksum, which a worker judges",
            |p| p.udp_checksum = 0x1234,
            Outcome::Redirected,
        ),
        (
            "fragment for another port",
            |p| (p.more_fragments, p.port) = (true, 53),
            Outcome::Fragment,
        ),
        (
            "fragment of TCP",
            |p| (p.more_fragments, p.protocol) = (true, IpNumber::TCP),
            Outcome::PassedOther,
        ),
        (
            "IP options, another port",
            |p| (p.options, p.port) = (vec![1; 8], 53),
            Outcome::PassedOther,
        ),
    ];
    let rig = Rig::new();
    let exact = Packet::default();
    for table in [ANY_PACKET, ANY_IPV4, ANY_TUNNEL4, ANY_UDP, ANY_VXLAN, table] {
        assert_deviations(&rig, &TUNNEL, &exact, table);
    }
}

#[test]
fn every_deviation_from_vxlan_over_ipv6_is_passed() {
    let table: &[Deviation] = &[
        (
            "no UDP checksum",
            |p| p.udp_checksum = 0,
            Outcome::UdpChecksum,
        ),
        (
            "no UDP checksum, another port",
            |p| (p.udp_checksum, p.port) = (0, 53),
            Outcome::PassedOther,
        ),
        (
            "last word of the address",
            |p| p.destination = PEER6.into(),
            Outcome::PassedOther,
        ),
        (
            "first word of the address",
            |p| p.destination = Ipv6Addr::new(0x2001, 0xdb9, 0, 0, 0, 0, 0, 1).into(),
            Outcome::PassedOther,
        ),
        (
            "second word of the address",
            |p| p.destination = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1).into(),
            Outcome::PassedOther,
        ),
        (
            "third word of the address",
            |p| p.destination = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 1, 0, 1).into(),
            Outcome::PassedOther,
        ),
        (
            "payload length 0",
            |p| p.length = Some(0),
            Outcome::BadLength,
        ),
        (
            "payload length one too short",
            |p| p.length = Some(8 + 8 + 13),
            Outcome::BadLength,
        ),
        (
            "fragment to another address",
            |p| {
                p.destination = PEER6.into();
                p.protocol = IpNumber::IPV6_FRAGMENTATION_HEADER;
            },
            Outcome::PassedOther,
        ),
    ];
    let rig = Rig::new();
    let ours = TunnelMatch {
        v6: Some(V6),
        ..TUNNEL
    };
    for table in [ANY_PACKET, ANY_IPV6, ANY_TUNNEL6, ANY_UDP, ANY_VXLAN, table] {
        assert_deviations(&rig, &ours, &Packet::vxlan6(), table);
    }
}

#[test]
fn every_deviation_from_the_udp_tunnel_is_passed() {
    let table: &[Deviation] = &[
        (
            "another address",
            |p| p.destination = PEER.into(),
            Outcome::PassedOther,
        ),
        (
            "no inner packet, which a worker judges",
            |p| p.inner = 0,
            Outcome::Redirected,
        ),
        (
            "with a UDP checksum, which a worker judges",
            |p| p.udp_checksum = 0x1234,
            Outcome::Redirected,
        ),
    ];
    let rig = Rig::new();
    let ours = TunnelMatch {
        tunnel: Tunnel::Udp { port: 8285 },
        v6: Some(V6),
        ..TUNNEL
    };
    for table in [ANY_PACKET, ANY_IPV4, ANY_TUNNEL4, ANY_UDP, table] {
        assert_deviations(&rig, &ours, &Packet::udp(), table);
    }
}

#[test]
fn every_deviation_from_ipip_is_passed() {
    let table: &[Deviation] = &[
        (
            "another address",
            |p| p.destination = PEER.into(),
            Outcome::PassedOther,
        ),
        (
            "IPv6 in IPv4",
            |p| p.protocol = IpNumber::IPV6,
            Outcome::PassedOther,
        ),
        ("GRE", |p| p.protocol = IpNumber::GRE, Outcome::PassedOther),
        ("UDP", |p| p.protocol = IpNumber::UDP, Outcome::PassedOther),
        (
            "fragment of UDP",
            |p| (p.protocol, p.more_fragments) = (IpNumber::UDP, true),
            Outcome::PassedOther,
        ),
        (
            "no inner packet, which a worker judges",
            |p| p.inner = 0,
            Outcome::Redirected,
        ),
    ];
    let rig = Rig::new();
    let ours = TunnelMatch {
        tunnel: Tunnel::Ipip,
        v6: Some(V6),
        ..TUNNEL
    };
    for table in [ANY_PACKET, ANY_IPV4, ANY_TUNNEL4, table] {
        assert_deviations(&rig, &ours, &Packet::ipip(), table);
    }
}

#[test]
fn whose_a_direct_packet_is_its_addresses_say() {
    let addresses4: &[Deviation] = &[
        (
            "to another node's pod",
            |p| p.destination = Ipv4Addr::new(10, 244, 3, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "to the node itself",
            |p| p.destination = LOCAL.into(),
            Outcome::PassedOther,
        ),
        (
            "from this node's pod",
            |p| p.source = Ipv4Addr::new(10, 244, 1, 8).into(),
            Outcome::PassedOther,
        ),
        (
            "from outside the cluster",
            |p| p.source = Ipv4Addr::new(10, 245, 2, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "from a node",
            |p| p.source = PEER.into(),
            Outcome::PassedOther,
        ),
        (
            "fragment from outside the cluster",
            |p| (p.source, p.more_fragments) = (PEER.into(), true),
            Outcome::PassedOther,
        ),
        ("UDP", |p| p.protocol = IpNumber::UDP, Outcome::Redirected),
        ("nothing but a header", |p| p.inner = 0, Outcome::Redirected),
    ];
    let addresses6: &[Deviation] = &[
        (
            "to another node's pod",
            |p| p.destination = Ipv6Addr::new(0xfd00, 10, 244, 3, 0, 0, 0x0100, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "first word of the destination",
            |p| p.destination = Ipv6Addr::new(0xfd00, 11, 244, 1, 0, 0, 0x0100, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "third word of the destination",
            |p| p.destination = Ipv6Addr::new(0xfd00, 10, 244, 1, 0, 1, 0x0100, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "fourth word of the destination",
            |p| p.destination = Ipv6Addr::new(0xfd00, 10, 244, 1, 0, 0, 0x0200, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "to the node itself",
            |p| p.destination = LOCAL6.into(),
            Outcome::PassedOther,
        ),
        (
            "from this node's pod",
            |p| p.source = Ipv6Addr::new(0xfd00, 10, 244, 1, 0, 0, 0x01ff, 9).into(),
            Outcome::PassedOther,
        ),
        (
            "from outside the cluster",
            |p| p.source = Ipv6Addr::new(0xfd00, 10, 245, 2, 0, 0, 0, 7).into(),
            Outcome::PassedOther,
        ),
        (
            "from a router",
            |p| p.source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(),
            Outcome::PassedOther,
        ),
        (
            "extension headers from outside the cluster",
            |p| (p.source, p.protocol) = (PEER6.into(), IpNumber::IPV6_ROUTE_HEADER),
            Outcome::PassedOther,
        ),
        (
            "ICMPv6",
            |p| p.protocol = IpNumber::IPV6_ICMP,
            Outcome::Redirected,
        ),
        (
            "nothing but a header",
            |p| (p.inner, p.protocol) = (0, IpNumber::IPV6_NO_NEXT_HEADER),
            Outcome::Redirected,
        ),
    ];
    let rig = Rig::new();
    let host_gw = TunnelMatch {
        tunnel: Tunnel::None,
        vlan: None,
        v4: Some(DIRECT4),
        v6: Some(DIRECT6),
    };
    let with_tunnel = TunnelMatch {
        tunnel: VXLAN,
        ..host_gw
    };
    for ours in [host_gw, with_tunnel] {
        for table in [ANY_PACKET, ANY_IPV4, ANY_DIRECT4, addresses4] {
            assert_deviations(&rig, &ours, &Packet::direct4(), table);
        }
        for table in [ANY_PACKET, ANY_IPV6, ANY_DIRECT6, addresses6] {
            assert_deviations(&rig, &ours, &Packet::direct6(), table);
        }
    }
}

#[test]
fn without_a_tunnel_everything_to_the_node_is_passed() {
    let rig = Rig::new();
    rig.program
        .configure(&TunnelMatch {
            tunnel: Tunnel::None,
            vlan: None,
            v4: Some(DIRECT4),
            v6: Some(DIRECT6),
        })
        .unwrap();
    for (packet, _) in exact_packets() {
        let to_pod = packet.content == Content::Ip && packet.protocol == IpNumber::TCP;
        // Port 0 is what a tunnel without one would have.
        let changes: [fn(&mut Packet); 4] = [
            |_| (),
            |p| p.more_fragments = true,
            |p| (p.content, p.port, p.vni) = (Content::Vxlan, 0, 0),
            |p| (p.content, p.port) = (Content::Udp, 0),
        ];
        for change in changes.iter().filter(|_| !to_pod) {
            let packet = packet.but(change);
            let found = rig.outcome(&packet.bytes());
            assert_eq!(found, Outcome::PassedOther, "{packet:?}");
        }
    }
}

#[test]
fn priority_and_drop_eligibility_of_the_tag_do_not_matter() {
    let rig = Rig::new();
    rig.program
        .configure(&TunnelMatch {
            vlan: Some(VLAN),
            ..TUNNEL
        })
        .unwrap();
    for control in [0x0000, 0x1000, 0xe000, 0xf000] {
        let packet = Packet::default().tagged(control | VLAN);
        assert_eq!(rig.outcome(&packet.bytes()), Outcome::Redirected);
    }
}

#[test]
fn a_socket_gets_exactly_what_is_ours() {
    let rig = Rig::new();
    for (name, ours) in configurations() {
        rig.program.configure(&ours).unwrap();
        // Mostly ours with a few bytes changed in the headers, so that both answers occur.
        let mutation = (0usize..90, any::<u8>());
        let packets = exact_packets().into_iter().map(|(packet, _)| packet);
        let frame = (
            proptest::sample::select(packets.collect::<Vec<_>>()),
            proptest::option::weighted(0.9, Just(ours.vlan)),
            0usize..200,
            proptest::collection::vec(mutation, 0..3),
            proptest::option::weighted(0.2, 14usize..250),
        )
            .prop_map(|(packet, vlan, inner, mutations, length)| {
                let packet = packet.but(|p| p.inner = inner);
                let mut frame = match vlan.unwrap_or(Some(VLAN)) {
                    Some(vlan) => packet.tagged(vlan).bytes(),
                    None => packet.bytes(),
                };
                for (at, value) in mutations {
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = value;
                    }
                }
                if let Some(length) = length {
                    frame.resize(length, 0);
                }
                frame
            });
        // A failure prints its input; a file of them in the source tree helps nobody.
        let config = ProptestConfig {
            cases: 600,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        proptest!(config, |(frame in frame)| {
            let (action, _) = rig.on_queue(0, &frame);
            prop_assert_eq!(action == Action::Redirect, exactly_ours(&ours, &frame), "{}", name);
        });
    }
}

/// What `ip` says about XDP on vx0: `xdp`, `xdpgeneric`, or nothing.
fn shown_by_ip() -> Option<String> {
    let text = ip("-details link show dev vx0");
    let mut words = text.split_whitespace();
    words
        .find(|word| word.starts_with("xdp") || word.starts_with("prog/xdp"))
        .map(str::to_owned)
}

#[test]
fn the_program_is_on_the_nic_only_while_it_is_held() {
    let nic = veth();
    assert_eq!(
        (nic.rx_queues, nic.driver.as_str(), nic.up),
        (2, "veth", true)
    );
    for (asked, expected, shown) in [
        (AttachMode::Native, AttachedMode::Native, "xdp"),
        (AttachMode::Generic, AttachedMode::Generic, "xdpgeneric"),
        (AttachMode::Auto, AttachedMode::Native, "xdp"),
    ] {
        let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
        assert_eq!(program.attached(), None);
        assert_eq!(program.attach(&nic, asked).unwrap(), expected);
        assert_eq!(program.attached(), Some(expected));
        assert_eq!(shown_by_ip().as_deref(), Some(shown), "{asked:?}");
        let again = program.attach(&nic, asked).unwrap_err();
        assert!(matches!(again, XdpError::AlreadyAttached { .. }), "{again}");
        drop(program);
        assert_eq!(shown_by_ip(), None, "{asked:?}");
    }

    let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    program.attach(&nic, AttachMode::Auto).unwrap();
    program.detach();
    assert_eq!((program.attached(), shown_by_ip()), (None, None));
}

#[test]
fn a_jumbo_nic_is_attached_natively() {
    veth();
    for mtu in [1500, 3497, 3498, 9000] {
        ip(&format!("link set vx0 mtu {mtu}"));
        ip(&format!("link set vx1 mtu {mtu}"));
        let nic = Nic::open("vx0").unwrap();
        let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
        let mode = program.attach(&nic, AttachMode::Native);
        assert_eq!(mode.unwrap(), AttachedMode::Native, "MTU {mtu}");
    }
}

#[test]
fn a_driver_without_native_mode_falls_back_only_if_allowed() {
    own_namespace();
    let nic = Nic::open("lo").unwrap();
    let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    let refusal = program
        .attach(&nic, AttachMode::Native)
        .unwrap_err()
        .to_string();
    for part in ["lo", "native", "generic"] {
        assert!(refusal.contains(part), "{refusal}");
    }
    assert_eq!(
        program.attach(&nic, AttachMode::Auto).unwrap(),
        AttachedMode::Generic
    );
}

#[test]
fn a_foreign_program_is_named_and_left_alone() {
    let nic = veth();
    let foreign = ObjectBuilder::default()
        .open_memory(OBJECT)
        .unwrap()
        .load()
        .unwrap();
    let foreign = foreign
        .progs()
        .find(|program| program.name() == "ripstop")
        .unwrap();
    let index = i32::try_from(nic.index).unwrap();

    for (flags, shown, fix) in [
        (XdpFlags::DRV_MODE, "xdp", "ip link set dev vx0 xdp off"),
        (
            XdpFlags::SKB_MODE,
            "xdpgeneric",
            "ip link set dev vx0 xdpgeneric off",
        ),
    ] {
        Xdp::new(foreign.as_fd()).attach(index, flags).unwrap();
        for mode in [AttachMode::Auto, AttachMode::Native, AttachMode::Generic] {
            let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
            let error = program.attach(&nic, mode).unwrap_err().to_string();
            for part in ["vx0", "(ripstop)", fix, "choose another NIC"] {
                assert!(error.contains(part), "{error}");
            }
        }
        assert_eq!(shown_by_ip().as_deref(), Some(shown), "it is still there");
        // The advice works.
        ip(fix.strip_prefix("ip ").unwrap());
        assert_eq!(shown_by_ip(), None);
    }

    let mut first = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    first.attach(&nic, AttachMode::Auto).unwrap();
    let mut second = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    let error = second
        .attach(&nic, AttachMode::Auto)
        .unwrap_err()
        .to_string();
    assert!(error.contains("stop the process that holds it"), "{error}");
    drop(first);
    second.attach(&nic, AttachMode::Auto).unwrap();
}

/// Environment variable that tells the child of the next test its mode.
const HOLD: &str = "RIPSTOP_TEST_HOLD_XDP";

#[test]
#[ignore = "the child of the_program_dies_with_its_process, useless by itself"]
fn hold_the_program_until_killed() {
    let mode = match std::env::var(HOLD).as_deref() {
        Ok("native") => AttachMode::Native,
        Ok("generic") => AttachMode::Generic,
        _ => return,
    };
    let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    program.attach(&Nic::open("vx0").unwrap(), mode).unwrap();
    println!("\nattached");
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_program_dies_with_its_process() {
    veth();
    for mode in ["native", "generic"] {
        // The child is forked from this thread and so shares its namespace.
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "hold_the_program_until_killed",
            ])
            .env(HOLD, mode)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let attached = lines.map_while(Result::ok).any(|line| line == "attached");
        let held = shown_by_ip();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(attached && held.is_some(), "{mode}: {held:?}");
        eventually(|| shown_by_ip().is_none());
    }
}

/// Takes all capabilities but `kept` (a mask) from the calling thread.
fn keep_capabilities(kept: u64) {
    const VERSION_3: u32 = 0x2008_0522;
    let low = u32::try_from(kept & 0xffff_ffff).unwrap();
    let high = u32::try_from(kept >> 32).unwrap();
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; low words first.
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: version 3 reads two words of header and six of sets, which outlive the call;
    // thread 0 is the calling one.
    let status = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(status, 0, "capset: {}", io::Error::last_os_error());
}

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_NET_RAW: u64 = 1 << 13;
const CAP_BPF: u64 = 1 << 39;

/// In a thread of its own, which takes its loss of rights into the grave.
fn with_capabilities<T: Send>(kept: u64, body: impl FnOnce(Nic) -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let nic = veth();
            keep_capabilities(kept);
            body(nic)
        });
        thread.join().unwrap()
    })
}

#[test]
fn three_capabilities_are_enough() {
    let mode = with_capabilities(CAP_NET_ADMIN | CAP_NET_RAW | CAP_BPF, |nic| {
        let mut program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
        let mode = program.attach(&nic, AttachMode::Auto).unwrap();
        program.configure(&TUNNEL).unwrap();
        program.register_socket(0, xdp_socket().as_fd()).unwrap();
        program.counters().unwrap();
        mode
    });
    assert_eq!(mode, AttachedMode::Native);
}

#[test]
fn a_missing_capability_is_named() {
    let table = [
        (CAP_NET_ADMIN | CAP_NET_RAW, "CAP_BPF"),
        (CAP_BPF | CAP_NET_RAW, "CAP_NET_ADMIN"),
    ];
    for (kept, name) in table {
        let error = with_capabilities(kept, |nic| {
            XdpProgram::load(FRAME_BYTES_MAX)
                .and_then(|mut program| program.attach(&nic, AttachMode::Auto))
                .unwrap_err()
        });
        assert!(matches!(error, XdpError::Permission { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn the_embedded_object_names_no_path_of_the_build() {
    let source = env!("CARGO_MANIFEST_DIR").as_bytes();
    assert!(!OBJECT.windows(source.len()).any(|window| window == source));
}

#[test]
fn the_kernel_gets_the_packets_of_a_worker_that_has_stopped() {
    let rig = Rig::new();
    let frame = Packet::default().bytes();
    assert_eq!(rig.outcome(&frame), Outcome::Redirected, "no deadline yet");
    let now = ripstop_fib::map::monotonic_ns();
    rig.program.keep_alive(0, now - 1).unwrap();
    assert_eq!(rig.on_queue(0, &frame), (Action::Pass, Outcome::Stalled));
    rig.program.keep_alive(0, now + 3_600_000_000_000).unwrap();
    assert_eq!(
        rig.on_queue(0, &frame),
        (Action::Redirect, Outcome::Redirected)
    );
}

#[test]
#[ignore = "a measurement: prints what the program takes for a frame, tests nothing"]
fn what_a_frame_costs() {
    let rig = Rig::new();
    let arp = Packet::with(|p| p.ether_type = Some(EtherType::ARP));
    let tcp = Packet::with(|p| p.protocol = IpNumber::TCP);
    for (name, frame) in [
        ("VXLAN/IPv4, ours", Packet::default()),
        ("TCP to this node", tcp),
        ("ARP", arp),
    ] {
        let mut costs: Vec<u128> = (0..15)
            .map(|_| {
                let run = rig.program.run_often(
                    Buffers::One,
                    &frame.bytes(),
                    Some((rig.nic.index, 0)),
                    1_000_000,
                );
                run.unwrap().1.as_nanos()
            })
            .collect();
        costs.sort_unstable();
        println!(
            "{name}: {} ns (middle of {} to {})",
            costs[7], costs[0], costs[14]
        );
    }
}
