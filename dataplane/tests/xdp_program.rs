//! The XDP program itself, loaded into this kernel: what it answers for each
//! kind of frame (BPF_PROG_TEST_RUN: the frame goes nowhere), and how it gets
//! onto a NIC and off it again.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread; no device of the machine
//! is touched.

#![expect(unsafe_code, reason = "unshare, AF_XDP sockets and capset by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::net::Ipv4Addr;
use core::time::Duration;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use etherparse::{
    EtherType, Ethernet2Header, Ethernet2Slice, IpFragOffset, IpNumber, Ipv4Header,
    Ipv4HeaderSlice, Ipv4Options, UdpHeader, UdpHeaderSlice,
};
use libbpf_rs::{ObjectBuilder, Xdp, XdpFlags};
use proptest::prelude::*;
use ripstop_dataplane::nic::Nic;
use ripstop_dataplane::xdp::{
    Action, AttachMode, AttachedMode, Buffers, Outcome, TunnelMatch, XdpError, XdpProgram,
};

const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const TUNNEL: TunnelMatch = TunnelMatch {
    local: LOCAL,
    port: 8472,
    vni: 0x01_0203,
};
/// What a UMEM frame of 4096 bytes holds.
const FRAME_BYTES_MAX: u32 = 3840;

/// A tunnel packet as fields. The default is exactly ours and, with its
/// 14 bytes of inner packet, 64 bytes long.
#[derive(Clone, Debug)]
struct Packet {
    ether_type: EtherType,
    /// Replaces version and header length, which are right by default.
    first_byte: Option<u8>,
    options: Vec<u8>,
    total_length: Option<u16>,
    more_fragments: bool,
    fragment_offset: u16,
    protocol: IpNumber,
    destination: Ipv4Addr,
    port: u16,
    udp_length: Option<u16>,
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
            ether_type: EtherType::IPV4,
            first_byte: None,
            options: Vec::new(),
            total_length: None,
            more_fragments: false,
            fragment_offset: 0,
            protocol: IpNumber::UDP,
            destination: TUNNEL.local,
            port: TUNNEL.port,
            udp_length: None,
            flags: 0x0800_0000,
            vni: TUNNEL.vni,
            reserved: 0,
            inner: 14,
            padding: 0,
        }
    }
}

impl Packet {
    fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut packet = Self::default();
        change(&mut packet);
        packet
    }

    fn bytes(&self) -> Vec<u8> {
        let udp_length = u16::try_from(8 + 8 + self.inner).unwrap();
        let mut ip = Ipv4Header::new(
            udp_length,
            64,
            self.protocol,
            PEER.octets(),
            self.destination.octets(),
        )
        .unwrap();
        ip.options = Ipv4Options::try_from(&self.options[..]).unwrap();
        ip.total_len = self
            .total_length
            .unwrap_or(20 + u16::try_from(self.options.len()).unwrap() + udp_length);
        ip.dont_fragment = false;
        ip.more_fragments = self.more_fragments;
        ip.fragment_offset = IpFragOffset::try_new(self.fragment_offset).unwrap();
        ip.header_checksum = ip.calc_header_checksum();
        let udp = UdpHeader {
            source_port: 50_000,
            destination_port: self.port,
            length: self.udp_length.unwrap_or(udp_length),
            checksum: 0,
        };
        let ethernet = Ethernet2Header {
            source: [2, 0, 0, 0, 0, 2],
            destination: [2, 0, 0, 0, 0, 1],
            ether_type: self.ether_type,
        };

        let mut frame = Vec::new();
        ethernet.write(&mut frame).unwrap();
        ip.write_raw(&mut frame).unwrap();
        udp.write(&mut frame).unwrap();
        frame.extend(self.flags.to_be_bytes());
        frame.extend((self.vni << 8 | u32::from(self.reserved)).to_be_bytes());
        frame.resize(frame.len() + self.inner, 0xa5);
        frame.resize(frame.len() + self.padding, 0);
        if let Some(first_byte) = self.first_byte {
            frame[14] = first_byte;
        }
        frame
    }
}

/// The rule, said once more and with another library: is this frame exactly ours?
fn exactly_ours(frame: &[u8]) -> bool {
    let Ok(ethernet) = Ethernet2Slice::from_slice_without_fcs(frame) else {
        return false;
    };
    let payload = ethernet.payload().payload;
    let Ok(ip) = Ipv4HeaderSlice::from_slice(payload) else {
        return false;
    };
    if ethernet.ether_type() != EtherType::IPV4
        || ip.ihl() != 5
        || ip.is_fragmenting_payload()
        || ip.protocol() != IpNumber::UDP
        || ip.destination_addr() != TUNNEL.local
    {
        return false;
    }
    let Ok(udp) = UdpHeaderSlice::from_slice(&payload[20..]) else {
        return false;
    };
    let Some(vxlan) = payload.get(28..36) else {
        return false;
    };
    udp.destination_port() == TUNNEL.port
        && usize::from(ip.total_len()) <= payload.len()
        && usize::from(udp.length()) >= 16
        && u32::from(ip.total_len()) == u32::from(udp.length()) + 20
        && vxlan[..4] == [8, 0, 0, 0]
        && vxlan[4..7] == TUNNEL.vni.to_be_bytes()[1..]
        && vxlan[7] == 0
        && frame.len() <= FRAME_BYTES_MAX as usize
}

/// Gives the calling thread a network namespace of its own.
fn enter_own_namespace() {
    // SAFETY: takes a number; only this thread changes its namespace.
    let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        status,
        0,
        "these tests need root (a network namespace of their own): {}",
        io::Error::last_os_error()
    );
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A veth end with two receive queues, up, in a namespace of this thread.
fn veth() -> Nic {
    enter_own_namespace();
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
        assert!(start.elapsed() < Duration::from_secs(10), "still not so");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An AF_XDP socket; a map entry does not require that it be bound.
fn xdp_socket() -> OwnedFd {
    // SAFETY: takes plain numbers.
    let socket = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(socket >= 0, "AF_XDP socket: {}", io::Error::last_os_error());
    // SAFETY: a descriptor that the kernel has just given to us alone.
    unsafe { OwnedFd::from_raw_fd(socket) }
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
            Packet::with(|p| p.ether_type = EtherType::ARP),
            Outcome::PassedOther,
        ),
        (
            "IPv6",
            Packet::with(|p| p.ether_type = EtherType::IPV6),
            Outcome::PassedOther,
        ),
        (
            "VLAN",
            Packet::with(|p| p.ether_type = EtherType::VLAN_TAGGED_FRAME),
            Outcome::PassedOther,
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
            Packet::with(|p| p.destination = PEER),
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
            Packet::with(|p| (p.more_fragments, p.destination) = (true, PEER)),
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
            Packet::with(|p| p.total_length = Some(51)),
            Outcome::BadLength,
        ),
        (
            "IP length one too short",
            Packet::with(|p| p.total_length = Some(49)),
            Outcome::BadLength,
        ),
        (
            "IP length 0",
            Packet::with(|p| p.total_length = Some(0)),
            Outcome::BadLength,
        ),
        (
            "lengths agree, and exceed the frame",
            Packet::with(|p| (p.total_length, p.udp_length) = (Some(51), Some(31))),
            Outcome::BadLength,
        ),
        (
            "lengths agree, and leave no room for VXLAN",
            Packet::with(|p| (p.total_length, p.udp_length) = (Some(35), Some(15))),
            Outcome::BadLength,
        ),
        (
            "lengths agree with 16 bits of overflow",
            Packet::with(|p| (p.total_length, p.udp_length) = (Some(10), Some(65526))),
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
            exactly_ours(&frame),
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
    let mut rig = Rig::new();
    let ours = Packet::default().bytes();
    let other = TunnelMatch {
        local: PEER,
        port: 4789,
        vni: 0xff_ffff,
    };
    let others = Packet::with(|p| {
        (p.destination, p.port, p.vni) = (other.local, other.port, other.vni);
    })
    .bytes();

    rig.program.disable().unwrap();
    assert_eq!(rig.outcome(&ours), Outcome::PassedOther);
    rig.program.configure(&TUNNEL).unwrap();
    assert_eq!(rig.outcome(&ours), Outcome::Redirected);
    assert_eq!(rig.outcome(&others), Outcome::PassedOther);
    rig.program.configure(&other).unwrap();
    assert_eq!(rig.outcome(&ours), Outcome::PassedOther);
    assert_eq!(rig.outcome(&others), Outcome::Redirected);

    let error = rig
        .program
        .configure(&TunnelMatch {
            vni: 1 << 24,
            ..TUNNEL
        })
        .unwrap_err();
    assert!(error.to_string().contains("16777216"), "{error}");
    assert_eq!(
        rig.outcome(&others),
        Outcome::Redirected,
        "what ran goes on"
    );
}

#[test]
fn every_generation_of_the_configuration_is_valid() {
    let mut rig = Rig::new();
    let frame = Packet::default().bytes();
    // Past the wrap of the 16 bits, where 0 would mean "off".
    for generation in 0..=65_537 {
        rig.program.configure(&TUNNEL).unwrap();
        if generation % 4096 == 0 || generation > 65_530 {
            assert_eq!(rig.outcome(&frame), Outcome::Redirected, "{generation}");
        }
    }
}

#[test]
fn a_frame_before_any_configuration_is_passed() {
    enter_own_namespace();
    let program = XdpProgram::load(FRAME_BYTES_MAX).unwrap();
    let socket = xdp_socket();
    program.register_socket(0, socket.as_fd()).unwrap();
    // The second is what a configuration of zeros would match.
    let zeros = Packet::with(|p| (p.destination, p.port, p.vni) = (Ipv4Addr::UNSPECIFIED, 0, 0));
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
    enter_own_namespace();
    let jumbo = Packet::with(|p| p.inner = 8950).bytes();
    for (frame_bytes_max, expected, outcome) in [
        (FRAME_BYTES_MAX, Action::Pass, Outcome::TooLong),
        (9000, Action::Redirect, Outcome::Redirected),
    ] {
        let mut program = XdpProgram::load(frame_bytes_max).unwrap();
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
fn a_socket_gets_exactly_what_is_ours() {
    let rig = Rig::new();
    // Mostly ours with a few bytes changed in the headers, so that both answers occur.
    let mutation = (0usize..50, any::<u8>());
    let frame = (
        0usize..200,
        proptest::collection::vec(mutation, 0..3),
        proptest::option::weighted(0.2, 14usize..250),
    )
        .prop_map(|(inner, mutations, length)| {
            let mut frame = Packet::with(|p| p.inner = inner).bytes();
            for (at, value) in mutations {
                frame[at] = value;
            }
            if let Some(length) = length {
                frame.resize(length, 0);
            }
            frame
        });
    // A failure prints its input; a file of them in the source tree helps nobody.
    let config = ProptestConfig {
        cases: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(frame in frame)| {
        let (action, _) = rig.on_queue(0, &frame);
        prop_assert_eq!(action == Action::Redirect, exactly_ours(&frame));
    });
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
    enter_own_namespace();
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
    let object = concat!(env!("OUT_DIR"), "/ripstop.bpf.o");
    let foreign = ObjectBuilder::default()
        .open_file(object)
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
    let object = fs::read(concat!(env!("OUT_DIR"), "/ripstop.bpf.o")).unwrap();
    let source = env!("CARGO_MANIFEST_DIR").as_bytes();
    assert!(!object.windows(source.len()).any(|window| window == source));
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
