//! Only peers get in, and what does not get in has its reason: as root, for real.
//!
//! ```text
//!   attacker ═══════╗
//!   "n2", as n2 is ═╬═══ n1 (victim) ─ cni0 ─ n1p0      must see nothing
//!   n3 (a peer)  ═══╝
//! ```
//!
//! Every attack is one good packet of a peer with one thing wrong, sent several times. While the workers are up each
//! has one counter, which must count exactly that. Then the same attacks meet the standby: the data plane killed, and
//! then the control plane, too. During the attacks no other packets are on their way, so whatever IPv4 packet a pod
//! sees has got in.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::net::Ipv4Addr;
use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use common::{PATIENCE, by_worker, by_xdp, check_conservation, quiet, refused_since, xdp};
use ripstop_fib::DropReason;
use ripstop_fib::stats::{Counter, XdpCounter};
use ripstop_perf::{
    Capture, CapturedFrame, Direction, Ethernet, Fabric, Host, Injector, Inner, Ipv4, Lab, Mac,
    Node, Ping, VxlanFrame, address, tcp_transfer, udp_echo, udp_payload_max, wait_until,
};
use serde_json::Value;

/// Who is attacked.
const VICTIM: u8 = 1;
/// The peer in whose name the attacks are.
const PEER: u8 = 2;
/// Another peer, which runs no Ripstop.
const OTHER: u8 = 3;
/// So often is each frame of an attack sent.
const ROUNDS: u64 = 3;

const INNER_FRAME: usize = 50;
const OUTER_HEADERS: usize = 42;
const VXLAN_HEADER: usize = 8;
const INNER_HEADERS: usize = 34;

/// Who refuses an attack while the workers are up.
#[derive(Debug, Clone, Copy)]
enum Gate {
    /// The XDP program hands it to a worker, which drops it for this reason.
    Worker(DropReason),
    /// The XDP program leaves it to the kernel, and says that it is almost ours.
    Xdp(XdpCounter),
    /// The XDP program leaves it to the kernel: it is not for the tunnel.
    NotOurs,
}
use Gate::{NotOurs, Worker, Xdp};

/// One attack.
struct Attack {
    name: String,
    frames: Vec<Vec<u8>>,
    /// Sent by the attacker himself, and not in the name of a peer.
    by_attacker: bool,
    gate: Gate,
    /// The counter of the standby's filter that counts it when it gets to the kernel, and how many packets that makes
    /// of the frames; without, the kernel itself has no use for it.
    filter: Option<(&'static str, u64)>,
}

/// The filter's counters.
const OUTER_DESTINATION: &str = "standby_outer_destination";
const TRUNCATED: &str = "standby_truncated";
const FLAGS: &str = "standby_vxlan_flags";
const OTHER_VNI: &str = "standby_vxlan_vni";
const SOURCE_MAC: &str = "standby_inner_source_mac";
const ETHER_TYPE: &str = "standby_inner_ether_type";
const UNKNOWN_PEER: &str = "standby_unknown_peer";
const NOT_LOCAL: &str = "standby_not_local";

/// Collects attacks.
struct Attacks<'a> {
    lab: &'a Lab,
    list: Vec<Attack>,
}

impl Attacks<'_> {
    /// A packet as the peer would send it, with something changed.
    fn peer(
        &mut self,
        name: &str,
        gate: Gate,
        filter: impl Into<Option<&'static str>>,
        change: impl Fn(&mut VxlanFrame),
    ) {
        let mut frame = named(self.lab.tunnel_frame(PEER, VICTIM), name);
        change(&mut frame);
        self.frames(name, gate, filter, vec![frame.encode()]);
    }

    /// The same with a change to the inner IPv4 header.
    fn inner(
        &mut self,
        name: &str,
        gate: Gate,
        filter: impl Into<Option<&'static str>>,
        change: impl Fn(&mut Ipv4),
    ) {
        self.peer(name, gate, filter, |frame| change(inner_ip(frame)));
    }

    /// A packet from the attacker's own address, with something changed besides.
    fn attacker(
        &mut self,
        name: &str,
        gate: Gate,
        filter: &'static str,
        change: impl Fn(&mut VxlanFrame),
    ) {
        let name = format!("the attacker: {name}");
        let mut frame = named(from_attacker(self.lab), &name);
        change(&mut frame);
        self.frames(&name, gate, filter, vec![frame.encode()]);
        self.by_attacker();
    }

    /// Frames made by hand.
    fn frames(
        &mut self,
        name: &str,
        gate: Gate,
        filter: impl Into<Option<&'static str>>,
        frames: Vec<Vec<u8>>,
    ) {
        let count = u64::try_from(frames.len()).unwrap_or_default();
        let filter = filter.into().map(|counter| (counter, count));
        self.list.push(Attack {
            name: name.to_owned(),
            frames,
            by_attacker: false,
            gate,
            filter,
        });
    }

    /// The attack added last comes from the attacker's own interface.
    fn by_attacker(&mut self) {
        if let Some(attack) = self.list.last_mut() {
            attack.by_attacker = true;
        }
    }

    /// The attack added last makes one packet of its frames.
    fn one_packet(&mut self) {
        if let Some(Attack {
            filter: Some((_, packets)),
            ..
        }) = self.list.last_mut()
        {
            *packets = 1;
        }
    }
}

fn named(mut frame: VxlanFrame, name: &str) -> VxlanFrame {
    if let Inner::Udp { payload, .. } = &mut frame.inner {
        *payload = format!("attack: {name}").into_bytes();
    }
    frame
}

fn from_attacker(lab: &Lab) -> VxlanFrame {
    let good = lab.tunnel_frame(PEER, VICTIM);
    VxlanFrame {
        ethernet: Ethernet::ipv4(address::ATTACKER_MAC, address::underlay_mac(VICTIM)),
        ip: Ipv4 {
            source: address::ATTACKER,
            ..good.ip
        },
        ..good
    }
}

fn inner_ip(frame: &mut VxlanFrame) -> &mut Ipv4 {
    match &mut frame.inner {
        Inner::Udp { ip, .. } | Inner::Ipv4 { ip, .. } => ip,
        Inner::Raw(_) => panic!("an inner packet without an IPv4 header"),
    }
}

/// A tunnel packet with correct lengths around any UDP payload.
fn with_udp_payload(like: &VxlanFrame, payload: &[u8]) -> Result<Vec<u8>> {
    let ports = [
        like.udp.source,
        like.udp.destination,
        u16::try_from(payload.len() + 8)?,
        0,
    ];
    let udp: Vec<u8> = ports
        .iter()
        .flat_map(|field| field.to_be_bytes())
        .chain(payload.iter().copied())
        .collect();
    Ok([&like.encode()[..14], &like.ip.encode(&udp)].concat())
}

/// The frame's packet in two fragments.
fn in_fragments(frame: &VxlanFrame, identification: u16) -> Vec<Vec<u8>> {
    let bytes = frame.encode();
    let (ethernet, datagram) = (&bytes[..14], &bytes[34..]);
    let ip = Ipv4 {
        identification,
        ..frame.ip.clone()
    };
    let first = Ipv4 {
        more_fragments: true,
        ..ip.clone()
    }
    .encode(&datagram[..48]);
    let last = Ipv4 {
        fragment_offset: 48 / 8,
        ..ip
    }
    .encode(&datagram[48..]);
    vec![[ethernet, &first].concat(), [ethernet, &last].concat()]
}

fn attacks(lab: &Lab) -> Result<Vec<Attack>> {
    let mut attacks = Attacks {
        lab,
        list: Vec::new(),
    };
    outer_addresses(&mut attacks);
    outer_headers(&mut attacks);
    vxlan_header(&mut attacks);
    inner_ethernet(&mut attacks);
    inner_addresses(&mut attacks);
    inner_headers(&mut attacks);
    truncated(&mut attacks)?;
    Ok(attacks.list)
}

fn outer_addresses(attacks: &mut Attacks<'_>) {
    use DropReason::UnknownPeer;
    attacks.attacker(
        "a good packet otherwise",
        Worker(UnknownPeer),
        UNKNOWN_PEER,
        |_| {},
    );
    attacks.attacker("for himself", Worker(UnknownPeer), UNKNOWN_PEER, |frame| {
        inner_ip(frame).source = address::ATTACKER;
    });
    // Who is no peer is told nothing about the rest.
    attacks.attacker(
        "another VTEP MAC",
        Worker(UnknownPeer),
        UNKNOWN_PEER,
        |frame| {
            frame.inner_ethernet.destination = address::vtep_mac(OTHER);
        },
    );
    attacks.attacker(
        "to another node's pod",
        Worker(UnknownPeer),
        UNKNOWN_PEER,
        |frame| {
            inner_ip(frame).destination = address::pod(OTHER, 0);
        },
    );
    attacks.attacker("inner IPv6", Worker(UnknownPeer), ETHER_TYPE, |frame| {
        frame.inner_ethernet.ethertype = 0x86dd;
    });
    attacks.attacker(
        "inner checksum",
        Worker(UnknownPeer),
        UNKNOWN_PEER,
        |frame| {
            inner_ip(frame).checksum = Some(0x1234);
        },
    );
    attacks.attacker(
        "IP options",
        Xdp(XdpCounter::IpOptions),
        UNKNOWN_PEER,
        |frame| frame.ip.options = vec![1; 8],
    );
    attacks.attacker(
        "another VNI",
        Xdp(XdpCounter::OtherVni),
        OTHER_VNI,
        |frame| frame.vxlan.vni = 2,
    );
    let name = "the attacker: in fragments";
    let fragments = in_fragments(&named(from_attacker(attacks.lab), name), 0x0a01);
    attacks.frames(name, Xdp(XdpCounter::Fragment), UNKNOWN_PEER, fragments);
    attacks.by_attacker();
    attacks.one_packet();
    // Sources that the kernel knows to be impossible do not get as far as the filter.
    for (name, source) in [
        ("the victim's own address", address::underlay(VICTIM)),
        ("no address", Ipv4Addr::UNSPECIFIED),
        ("loopback", Ipv4Addr::LOCALHOST),
        ("a group", Ipv4Addr::new(224, 0, 0, 1)),
        ("broadcast", Ipv4Addr::BROADCAST),
    ] {
        attacks.peer(
            &format!("outer source: {name}"),
            Worker(UnknownPeer),
            None,
            |frame| frame.ip.source = source,
        );
    }
    attacks.peer(
        "outer source: not on this network",
        Worker(UnknownPeer),
        UNKNOWN_PEER,
        |frame| {
            frame.ip.source = Ipv4Addr::new(192, 0, 2, 1);
        },
    );
    for (name, destination, filter) in [
        (
            "the victim's cni0",
            address::gateway(VICTIM),
            Some(OUTER_DESTINATION),
        ),
        (
            "the victim's flannel.1",
            address::subnet(VICTIM),
            Some(OUTER_DESTINATION),
        ),
        (
            "everybody",
            Ipv4Addr::new(10, 199, 0, 255),
            Some(OUTER_DESTINATION),
        ),
        (
            "a group",
            Ipv4Addr::new(224, 0, 0, 1),
            Some(OUTER_DESTINATION),
        ),
        ("loopback", Ipv4Addr::LOCALHOST, None),
    ] {
        attacks.peer(
            &format!("outer destination: {name}"),
            NotOurs,
            filter,
            |frame| {
                frame.ip.destination = destination;
            },
        );
    }
}

fn outer_headers(attacks: &mut Attacks<'_>) {
    let bad_length = || Xdp(XdpCounter::BadLength);
    attacks.peer("outer EtherType IPv6", NotOurs, None, |frame| {
        frame.ethernet.ethertype = 0x86dd;
    });
    attacks.peer("outer EtherType ARP", NotOurs, None, |frame| {
        frame.ethernet.ethertype = 0x0806;
    });
    let mut tagged = named(attacks.lab.tunnel_frame(PEER, VICTIM), "outer VLAN tag").encode();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    attacks.frames("outer VLAN tag", NotOurs, None, vec![tagged]);
    for (name, version_ihl) in [
        ("version 6", 0x65),
        ("header of 16 bytes", 0x44),
        ("header of 60 bytes", 0x4f),
    ] {
        attacks.peer(&format!("outer {name}"), NotOurs, None, |frame| {
            frame.ip.version_ihl = Some(version_ihl);
        });
    }
    attacks.peer("outer protocol TCP", NotOurs, None, |frame| {
        frame.ip.protocol = 6;
    });
    for port in [8471, 8473, 4789] {
        attacks.peer(&format!("outer port {port}"), NotOurs, None, |frame| {
            frame.udp.destination = port;
        });
    }
    attacks.peer(
        "outer checksum",
        Worker(DropReason::OuterChecksum),
        None,
        |frame| frame.ip.checksum = Some(0x1234),
    );
    for (name, length, filter) in [
        ("too long", 1400, None),
        ("one too short", 101, None),
        // Whose packet it is cannot be seen.
        ("headers only", 28, Some(UNKNOWN_PEER)),
        ("impossible", 19, None),
    ] {
        attacks.peer(
            &format!("outer length {name}"),
            bad_length(),
            filter,
            |frame| {
                // The right length is 102.
                payload(frame).resize(24, 0);
                frame.ip.total_length = Some(length);
            },
        );
    }
    for (name, length, filter) in [
        ("too long", 1400, None),
        ("one too long", 96, None),
        ("one too short", 94, None),
        ("of the header alone", 8, Some(TRUNCATED)),
        ("impossible", 7, Some(TRUNCATED)),
        ("zero", 0, Some(TRUNCATED)),
    ] {
        attacks.peer(
            &format!("UDP length {name}"),
            bad_length(),
            filter,
            |frame| {
                // The right length is 95.
                payload(frame).resize(37, 0);
                frame.udp.length = Some(length);
            },
        );
    }
    let fragment = || Xdp(XdpCounter::Fragment);
    attacks.peer("a first fragment alone", fragment(), None, |frame| {
        (frame.ip.more_fragments, frame.ip.identification) = (true, 0x0b01);
    });
    attacks.peer("a last fragment alone", fragment(), None, |frame| {
        (frame.ip.fragment_offset, frame.ip.identification) = (6, 0x0b02);
    });
    let mut foreign = named(
        attacks.lab.tunnel_frame(PEER, VICTIM),
        "foreign source in fragments",
    );
    inner_ip(&mut foreign).source = address::pod(OTHER, 0);
    attacks.frames(
        "foreign source in fragments",
        fragment(),
        UNKNOWN_PEER,
        in_fragments(&foreign, 0x0b03),
    );
    attacks.one_packet();
    attacks.peer(
        "foreign source behind IP options",
        Xdp(XdpCounter::IpOptions),
        UNKNOWN_PEER,
        |frame| {
            frame.ip.options = vec![1; 40];
            inner_ip(frame).source = address::pod(OTHER, 0);
        },
    );
}

fn payload(frame: &mut VxlanFrame) -> &mut Vec<u8> {
    match &mut frame.inner {
        Inner::Udp { payload, .. } | Inner::Ipv4 { payload, .. } | Inner::Raw(payload) => payload,
    }
}

fn vxlan_header(attacks: &mut Attacks<'_>) {
    for vni in [0, 2, 0x0001_0001, 0x00ff_ffff] {
        attacks.peer(
            &format!("VNI {vni}"),
            Xdp(XdpCounter::OtherVni),
            OTHER_VNI,
            |frame| frame.vxlan.vni = vni,
        );
    }
    let flags = || Xdp(XdpCounter::VxlanFlags);
    for bits in [0x00, 0x09, 0x0c, 0x88, 0xff] {
        attacks.peer(
            &format!("VXLAN flags {bits:#04x}"),
            flags(),
            FLAGS,
            |frame| frame.vxlan.flags = bits,
        );
    }
    for (name, reserved) in [("first", [1, 0, 0]), ("third", [0, 0, 1])] {
        attacks.peer(&format!("{name} reserved byte"), flags(), None, |frame| {
            frame.vxlan.reserved = reserved;
        });
    }
    attacks.peer("last reserved byte", flags(), None, |frame| {
        frame.vxlan.reserved_last = 1;
    });
}

fn inner_ethernet(attacks: &mut Attacks<'_>) {
    use DropReason::{InnerDestinationMac, InnerEtherType, InnerSourceMac, InnerVlan};
    for (name, mac) in [
        ("another VTEP", address::vtep_mac(OTHER)),
        ("the victim's underlay MAC", address::underlay_mac(VICTIM)),
        ("the target pod", address::pod_mac(VICTIM, 0)),
        ("a group", Mac([0x01, 0, 0x5e, 0, 0, 1])),
        ("everybody", Mac([0xff; 6])),
    ] {
        attacks.peer(
            &format!("inner frame to {name}"),
            Worker(InnerDestinationMac),
            None,
            |frame| {
                frame.inner_ethernet.destination = mac;
            },
        );
    }
    for (name, mac, filter) in [
        ("the victim itself", address::vtep_mac(VICTIM), None),
        ("a group", Mac([0x01, 0, 0x5e, 0, 0, 1]), Some(SOURCE_MAC)),
        ("everybody", Mac([0xff; 6]), Some(SOURCE_MAC)),
    ] {
        attacks.peer(
            &format!("inner frame from {name}"),
            Worker(InnerSourceMac),
            filter,
            |frame| {
                frame.inner_ethernet.source = mac;
            },
        );
    }
    for (ethertype, reason) in [
        (0x8100, InnerVlan),
        (0x88a8, InnerVlan),
        (0x0806, InnerEtherType),
        (0x86dd, InnerEtherType),
        (0x0801, InnerEtherType),
        (0x0000, InnerEtherType),
    ] {
        attacks.peer(
            &format!("inner EtherType {ethertype:#06x}"),
            Worker(reason),
            ETHER_TYPE,
            |frame| {
                frame.inner_ethernet.ethertype = ethertype;
                if reason == InnerVlan {
                    // Behind the tag the packet is a good one.
                    let packet = frame.encode()[INNER_FRAME + 14..].to_vec();
                    frame.inner = Inner::Raw([&[0, 5, 8, 0], packet.as_slice()].concat());
                }
            },
        );
    }
}

fn inner_addresses(attacks: &mut Attacks<'_>) {
    for (name, source) in [
        ("another peer's pod", address::pod(OTHER, 0)),
        ("the victim's own pod", address::pod(VICTIM, 0)),
        ("the peer's underlay address", address::underlay(PEER)),
        (
            "the lease behind the peer's",
            Ipv4Addr::new(10, 244, PEER + 20, 2),
        ),
        ("the Internet", Ipv4Addr::new(192, 0, 2, 1)),
        ("no address", Ipv4Addr::UNSPECIFIED),
        ("loopback", Ipv4Addr::LOCALHOST),
        ("a group", Ipv4Addr::new(224, 0, 0, 1)),
        ("broadcast", Ipv4Addr::BROADCAST),
    ] {
        attacks.inner(
            &format!("inner source: {name}"),
            Worker(DropReason::InnerSource),
            UNKNOWN_PEER,
            |ip| {
                ip.source = source;
            },
        );
    }
    attacks.peer(
        "one peer's packet from another",
        Worker(DropReason::InnerSource),
        UNKNOWN_PEER,
        |frame| {
            frame.ethernet.source = address::underlay_mac(OTHER);
            frame.ip.source = address::underlay(OTHER);
        },
    );
    for (name, destination) in [
        ("another node's pod", address::pod(OTHER, 0)),
        ("back to the sender's pod", address::pod(PEER, 0)),
        ("the victim's underlay address", address::underlay(VICTIM)),
        ("the gateway", address::FABRIC),
        ("the Internet", Ipv4Addr::new(192, 0, 2, 1)),
        ("no address", Ipv4Addr::UNSPECIFIED),
        ("loopback", Ipv4Addr::LOCALHOST),
        ("a group", Ipv4Addr::new(224, 0, 0, 1)),
        ("broadcast", Ipv4Addr::BROADCAST),
    ] {
        attacks.inner(
            &format!("inner destination: {name}"),
            Worker(DropReason::InnerDestination),
            NOT_LOCAL,
            |ip| {
                ip.destination = destination;
            },
        );
    }
}

fn inner_headers(attacks: &mut Attacks<'_>) {
    use DropReason::{EcnNotCapable, InnerChecksum, InnerHeader, InnerLength};
    for (name, version_ihl, reason) in [
        ("version 6", 0x65, InnerHeader),
        ("version 0", 0x05, InnerHeader),
        ("header of 16 bytes", 0x44, InnerHeader),
        (
            "header of 60 bytes, longer than the packet",
            0x4f,
            InnerLength,
        ),
    ] {
        attacks.peer(&format!("inner {name}"), Worker(reason), None, |frame| {
            payload(frame).truncate(20);
            inner_ip(frame).version_ihl = Some(version_ihl);
        });
    }
    for (name, length) in [
        ("one too long", 49),
        ("far too long", 65_535),
        ("impossible", 19),
        ("zero", 0),
    ] {
        attacks.peer(
            &format!("inner length {name}"),
            Worker(InnerLength),
            None,
            |frame| {
                // The right length is 48.
                payload(frame).resize(20, 0);
                inner_ip(frame).total_length = Some(length);
            },
        );
    }
    attacks.inner("inner checksum", Worker(InnerChecksum), None, |ip| {
        ip.checksum = Some(0x1234);
    });
    attacks.inner("inner checksum zero", Worker(InnerChecksum), None, |ip| {
        ip.checksum = Some(0);
    });
    attacks.inner(
        "inner checksum over options",
        Worker(InnerChecksum),
        None,
        |ip| {
            (ip.options, ip.checksum) = (vec![1; 8], Some(0x1234));
        },
    );
    attacks.peer(
        "congestion marked on what cannot be marked",
        Worker(EcnNotCapable),
        None,
        |frame| {
            frame.ip.tos = 0b11;
        },
    );
}

/// The packet cut off after each of its bytes; once with the lengths that it had, once with lengths that fit.
fn truncated(attacks: &mut Attacks<'_>) -> Result<()> {
    let good = named(attacks.lab.tunnel_frame(PEER, VICTIM), "cut off");
    let bytes = good.encode();
    let cut =
        |range: core::ops::Range<usize>| range.map(|length| bytes[..length].to_vec()).collect();
    attacks.frames(
        "cut off in the outer headers",
        NotOurs,
        None,
        cut(14..OUTER_HEADERS),
    );
    let rest = cut(OUTER_HEADERS..bytes.len());
    attacks.frames(
        "cut off behind the outer headers",
        Xdp(XdpCounter::BadLength),
        None,
        rest,
    );

    let honest = |like: &VxlanFrame, range: core::ops::Range<usize>| -> Result<Vec<Vec<u8>>> {
        range
            .map(|length| with_udp_payload(like, &bytes[OUTER_HEADERS..OUTER_HEADERS + length]))
            .collect()
    };
    let inner_end = VXLAN_HEADER + INNER_HEADERS;
    let end = bytes.len() - OUTER_HEADERS;
    for (name, gate, filter, range) in [
        (
            "short of a VXLAN header",
            Xdp(XdpCounter::BadLength),
            Some(TRUNCATED),
            0..VXLAN_HEADER,
        ),
        (
            "short of the inner headers",
            Worker(DropReason::InnerTruncated),
            Some(TRUNCATED),
            VXLAN_HEADER..inner_end,
        ),
        (
            "short of the inner packet",
            Worker(DropReason::InnerLength),
            None,
            inner_end..end,
        ),
    ] {
        attacks.frames(name, gate, filter, honest(&good, range)?);
    }
    let stranger = named(from_attacker(attacks.lab), "cut off");
    for (name, filter, range) in [
        (
            "the attacker: short of the inner headers",
            TRUNCATED,
            VXLAN_HEADER..inner_end,
        ),
        (
            "the attacker: short of the inner packet",
            UNKNOWN_PEER,
            inner_end..end,
        ),
    ] {
        attacks.frames(
            name,
            Worker(DropReason::UnknownPeer),
            filter,
            honest(&stranger, range)?,
        );
        attacks.by_attacker();
    }
    Ok(())
}

/// Where attacks go in.
struct Guns {
    wire: Injector,
    attacker: Injector,
}

impl Guns {
    fn new(lab: &Lab) -> Result<Self> {
        Ok(Self {
            wire: Injector::open(lab.fabric(), &Fabric::port(VICTIM))?,
            attacker: Injector::open(lab.attacker(), "eth0")?,
        })
    }

    fn fire(&self, attack: &Attack) -> Result<()> {
        let gun = if attack.by_attacker {
            &self.attacker
        } else {
            &self.wire
        };
        for _round in 0..ROUNDS {
            for frame in &attack.frames {
                gun.send(frame).with_context(|| attack.name.clone())?;
            }
        }
        Ok(())
    }
}

/// Everything that an attack must not reach.
struct Watch {
    pods: Vec<(String, Capture)>,
    cni0: Capture,
    wire: Capture,
}

impl Watch {
    fn start(lab: &Lab) -> Result<Self> {
        let pods = lab.nodes().iter().map(|node| {
            let pod = node.pod(0);
            let capture = Capture::start_filtered(pod, "eth0", 1000, |frame| {
                frame.direction == Direction::In && is_ipv4(frame)
            })?;
            Ok((pod.name().to_owned(), capture))
        });
        Ok(Self {
            pods: pods.collect::<Result<_>>()?,
            cni0: Capture::start_filtered(lab.node(VICTIM), "cni0", 1000, is_ipv4)?,
            wire: Capture::start_filtered(lab.fabric(), &Fabric::port(VICTIM), 1000, |frame| {
                frame.direction == Direction::In && is_ipv4(frame) && !is_icmp_error(frame)
            })?,
        })
    }

    /// Sends one good packet, which must be the only one that has got in, and nothing may have gone out again.
    fn finish(self, lab: &Lab, guns: &Guns) -> Result<()> {
        let mut good = lab.tunnel_frame(PEER, VICTIM);
        // Nobody answers an answer.
        let ip = Ipv4 {
            protocol: 1,
            ..inner_ip(&mut good).clone()
        };
        good.inner = Inner::Ipv4 {
            ip,
            payload: vec![0; 16],
        };
        guns.wire.send(&good.encode())?;
        let target = &self.pods[usize::from(VICTIM) - 1].1;
        target.wait_for(1, PATIENCE)?;
        for (pod, capture) in self.pods {
            let expected = usize::from(pod == lab.pod(VICTIM, 0).name());
            check_capture(
                &format!("packets that have reached {pod}"),
                capture,
                expected,
            )?;
        }
        check_capture("packets on the victim's cni0", self.cni0, 1)?;
        check_capture("packets that the victim has sent out", self.wire, 0)
    }
}

fn check_capture(what: &str, capture: Capture, expected: usize) -> Result<()> {
    let captured = capture.stop();
    let frames = &captured.frames;
    let text = |frame: &CapturedFrame| String::from_utf8_lossy(&frame.bytes).into_owned();
    ensure!(
        frames.len() == expected && captured.missed == 0,
        "{} and not {expected} {what}: {:?}",
        frames.len(),
        frames.iter().map(text).collect::<Vec<_>>()
    );
    Ok(())
}

/// An IPv4 packet; but for IGMP, in which bridges talk.
fn is_ipv4(frame: &CapturedFrame) -> bool {
    frame.bytes.get(12..14) == Some(&[0x08, 0x00]) && frame.bytes.get(23) != Some(&2)
}

/// The kernel's word to a sender: unreachable, time exceeded, parameter problem.
fn is_icmp_error(frame: &CapturedFrame) -> bool {
    frame.bytes.get(23) == Some(&1) && matches!(frame.bytes.get(34), Some(3 | 11 | 12))
}

/// The filter's counters.
fn filter_counts(node: &Node) -> Result<BTreeMap<String, u64>> {
    let text = node.output(&["nft", "-j", "list", "counters", "table", "ip", "ripstop"])?;
    let answer: Value = serde_json::from_str(&text).context("answer of nft")?;
    let objects = answer["nftables"].as_array().context("answer of nft")?;
    let counters = objects.iter().filter_map(|object| {
        let counter = object.get("counter")?;
        Some((
            counter["name"].as_str()?.to_owned(),
            counter["packets"].as_u64()?,
        ))
    });
    Ok(counters.filter(|(_, packets)| *packets > 0).collect())
}

fn wait_for_filter(node: &Node) -> Result<()> {
    wait_until("the standby's filter is there", PATIENCE, || {
        node.exec(&["nft", "list", "table", "ip", "ripstop"])
            .is_ok_and(|output| output.status.success())
    })
}

/// All that peers may send still arrives, and the answers go back.
fn check_good_traffic(lab: &Lab) -> Result<()> {
    let target = lab.pod(VICTIM, 0);
    let sizes = [1, 500, udp_payload_max(lab.pod_mtu())];
    for peer in [lab.pod(PEER, 0), lab.pod(OTHER, 0)] {
        for (from, to) in [(peer, target), (target, peer)] {
            assert_eq!(
                Ping::new(from, to).full(lab.pod_mtu()).run()?.failed,
                Vec::<String>::new()
            );
            assert_eq!(udp_echo(from, to, &sizes)?.failed, []);
        }
        tcp_transfer(peer, target, 100_000)?;
        assert_eq!(
            Ping::to_address(peer, address::subnet(VICTIM))
                .run()?
                .failed,
            Vec::<String>::new()
        );
    }
    Ok(())
}

#[test]
fn workers_refuse_each_attack_for_its_own_reason() -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let victim = lab.node(VICTIM);
        wait_for_filter(victim)?;
        let (guns, attacks, watch) = (Guns::new(lab)?, attacks(lab)?, Watch::start(lab)?);
        let first = quiet(victim)?;
        let mut refused: BTreeMap<String, u64> = BTreeMap::new();
        let mut not_ours = 0;
        let mut filtered = filter_counts(victim)?;
        let mut dropped = 0;
        for attack in &attacks {
            let frames = ROUNDS * u64::try_from(attack.frames.len())?;
            guns.fire(attack)?;
            match attack.gate {
                Worker(reason) => {
                    *refused.entry(by_worker(reason)).or_default() += frames;
                    dropped += frames;
                }
                Xdp(outcome) => *refused.entry(by_xdp(outcome)).or_default() += frames,
                NotOurs => not_ours += frames,
            }
            if let (Xdp(_) | NotOurs, Some((counter, packets))) = (attack.gate, attack.filter) {
                *filtered.entry(counter.to_owned()).or_default() += ROUNDS * packets;
            }
            let mut found = BTreeMap::new();
            let outcome = wait_until("the attack is counted as it should be", PATIENCE, || {
                let Ok(workers) = victim.workers() else {
                    return false;
                };
                found = refused_since(&workers, &first);
                let passed =
                    xdp(&workers, XdpCounter::PassedOther) - xdp(&first, XdpCounter::PassedOther);
                found == refused && passed >= not_ours
            });
            outcome.with_context(|| {
                format!("{}: refused are {found:?} and not {refused:?}", attack.name)
            })?;
        }
        watch.finish(lab, &guns)?;
        let last = quiet(victim)?;
        // Nothing was counted twice, or later, or delivered.
        assert_eq!(refused_since(&last, &first), refused);
        assert_eq!(filter_counts(victim)?, filtered);
        let grown = |counter| last.total(counter) - first.total(counter);
        assert_eq!(
            grown(Counter::NicRxPackets),
            dropped + 1,
            "packets that workers have received"
        );
        assert_eq!(
            grown(Counter::HostTxPackets),
            1,
            "packets that workers have delivered"
        );
        check_conservation(victim.name(), &last)?;
        check_command_line(victim, &refused, &filtered)?;
        check_good_traffic(lab)
    })
}

/// The operator is told the same.
fn check_command_line(
    node: &Node,
    refused: &BTreeMap<String, u64>,
    filtered: &BTreeMap<String, u64>,
) -> Result<()> {
    let drops = node.ripstop(&["drops", "--json"])?;
    let rows = drops["drops"]
        .as_array()
        .with_context(|| format!("{drops:#}"))?;
    let mut told = BTreeMap::new();
    for row in rows {
        let (place, reason) = (
            row["where"].as_str().unwrap_or_default(),
            row["reason"].as_str().unwrap_or_default(),
        );
        let explanation = row["explanation"].as_str().unwrap_or_default();
        ensure!(
            !explanation.is_empty() && !explanation.contains('\n'),
            "no explanation of one line: {row:#}"
        );
        told.insert(
            format!("{place}: {reason}"),
            row["packets"].as_u64().unwrap_or_default(),
        );
    }
    let filtered = filtered
        .iter()
        .map(|(counter, packets)| (format!("filter: {counter}"), *packets));
    let expected: BTreeMap<String, u64> = refused.clone().into_iter().chain(filtered).collect();
    assert_eq!(told, expected);
    Ok(())
}

#[test]
fn the_standby_refuses_the_same_attacks() -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let victim = lab.node(VICTIM);
        wait_for_filter(victim)?;
        let guns = Guns::new(lab)?;
        victim.kill_dataplane();
        attack_standby(lab, &guns).context("without a data plane")?;
        victim.kill_controlplane();
        attack_standby(lab, &guns).context("without any process")
    })
}

fn attack_standby(lab: &Lab, guns: &Guns) -> Result<()> {
    let victim = lab.node(VICTIM);
    let (attacks, watch) = (attacks(lab)?, Watch::start(lab)?);
    let mut filtered = filter_counts(victim)?;
    for attack in &attacks {
        guns.fire(attack)?;
        let Some((counter, packets)) = attack.filter else {
            continue;
        };
        *filtered.entry(counter.to_owned()).or_default() += ROUNDS * packets;
        let mut found = BTreeMap::new();
        let outcome = wait_until("the attack is counted as it should be", PATIENCE, || {
            found = filter_counts(victim).unwrap_or_default();
            found == filtered
        });
        outcome.with_context(|| {
            format!(
                "{}: filtered are {found:?} and not {filtered:?}",
                attack.name
            )
        })?;
    }
    watch.finish(lab, guns)?;
    assert_eq!(filter_counts(victim)?, filtered);
    check_good_traffic(lab)
}
