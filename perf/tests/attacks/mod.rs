//! The attacks: each a good packet of a peer with one thing wrong, and who has to refuse it.

use core::net::Ipv4Addr;
use core::ops::Range;

use anyhow::{Context, Result};
use ripstop_fib::DropReason;
use ripstop_fib::stats::XdpCounter;
use ripstop_perf::{Ethernet, Fabric, Injector, Inner, Ipv4, Lab, Mac, VxlanFrame, address};

/// Who is attacked.
pub(crate) const VICTIM: u8 = 1;
/// The peer in whose name the attacks are.
pub(crate) const PEER: u8 = 2;
/// Another peer, which runs no Ripstop.
pub(crate) const OTHER: u8 = 3;
/// So often is each frame of an attack sent.
pub(crate) const ROUNDS: u64 = 3;

/// Where the inner frame begins.
pub(crate) const INNER_FRAME: usize = 50;
const OUTER_HEADERS: usize = 42;
const VXLAN_HEADER: usize = 8;
const INNER_HEADERS: usize = 34;

/// Who refuses an attack while the workers are up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Gate {
    /// The XDP program hands it to a worker, which drops it for this reason.
    Worker(DropReason),
    /// The XDP program leaves it to the kernel, and says that it is almost ours.
    Xdp(XdpCounter),
    /// The XDP program leaves it to the kernel: it is not for the tunnel.
    NotOurs,
}
use Gate::{NotOurs, Worker, Xdp};

/// One attack.
pub(crate) struct Attack {
    pub(crate) name: String,
    pub(crate) frames: Vec<Vec<u8>>,
    /// Sent by the attacker himself, and not in the name of a peer.
    pub(crate) by_attacker: bool,
    pub(crate) gate: Gate,
    /// The counter of the standby's filter that counts it when it gets to the kernel, and how many packets that makes
    /// of the frames; without, the kernel itself has no use for it.
    pub(crate) filter: Option<(&'static str, u64)>,
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

/// Says in the payload which attack it is.
pub(crate) fn named(mut frame: VxlanFrame, name: &str) -> VxlanFrame {
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

/// The inner IPv4 header.
pub(crate) fn inner_ip(frame: &mut VxlanFrame) -> &mut Ipv4 {
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
pub(crate) fn in_fragments(frame: &VxlanFrame, identification: u16) -> Vec<Vec<u8>> {
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

/// All attacks.
pub(crate) fn attacks(lab: &Lab) -> Result<Vec<Attack>> {
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
    let other_vlan = Xdp(XdpCounter::OtherVlan);
    attacks.frames("outer VLAN tag", other_vlan, None, vec![tagged]);
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

/// The innermost payload.
pub(crate) fn payload(frame: &mut VxlanFrame) -> &mut Vec<u8> {
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
    let cut = |range: Range<usize>| range.map(|length| bytes[..length].to_vec()).collect();
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

    let honest = |like: &VxlanFrame, range: Range<usize>| -> Result<Vec<Vec<u8>>> {
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
pub(crate) struct Guns {
    pub(crate) wire: Injector,
    attacker: Injector,
}

impl Guns {
    pub(crate) fn new(lab: &Lab) -> Result<Self> {
        Ok(Self {
            wire: Injector::open(lab.fabric(), &Fabric::port(VICTIM))?,
            attacker: Injector::open(lab.attacker(), "eth0")?,
        })
    }

    pub(crate) fn fire(&self, attack: &Attack) -> Result<()> {
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
