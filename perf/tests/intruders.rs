//! The classes of attacks on tunnel gateways, against every backend: as root, for real.
//!
//! ```text
//!   attacker ═══════╗
//!   "n2", as n2 is ═╬═══ n1 (victim, Ripstop) ─ cni0 ─ n1p0      must see nothing
//!                   ║                                  └ and is itself an attacker, towards n2 and n3
//!   n2, n3 (plain) ═╝
//! ```
//!
//! Each row is one good packet of the backend with one thing wrong. What the workers must refuse they count under
//! exactly one name; what is not for the tunnel the kernel must have no use for; what pods send as nodes the guard
//! counts; and none of it reaches a pod, or leaves the node again. Without a data plane the same holds for all that is
//! not for the workers alone to see, which is printed. `only_peers.rs` goes further into VXLAN over IPv4.

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use common::{PATIENCE, check_conservation, find, nft_counts, settled};
use ripstop_fib::DropReason;
use ripstop_perf::{
    Backend, Capture, CapturedFrame, Direction, Ethernet, Fabric, Families, Family, Frame, Header,
    Host, Injector, Ipv4, Ipv6, Lab, LabBuilder, Mac, Node, Udp, UdpChecksum, Vxlan, address, icmp,
    icmp6, wait_until,
};

const VICTIM: u8 = 1;
const PEER: u8 = 2;
const OTHER: u8 = 3;
/// So often is each frame sent.
const ROUNDS: u64 = 3;
/// How long workers may take to publish what they have counted; a fraction of a second where the cores are free.
const COUNTED: Duration = Duration::from_secs(20);
/// In every packet that must not arrive, and in the one that must.
const MARKER: &[u8] = b"intruder";
const WELCOME: &[u8] = b"welcome!";

const IPIP: u8 = 4;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

/// Who has to refuse it while the data plane runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// A worker, for this reason.
    Worker(DropReason),
    /// The XDP program leaves it to the kernel, which has no use for it.
    Kernel,
    /// The control plane's guard in the kernel.
    Guard,
}
use Gate::{Guard, Kernel, Worker};

/// Where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    /// The wire, in a peer's name.
    Wire,
    /// The attacker's own interface.
    Attacker,
    /// The victim's own pod.
    Pod,
}

/// One attack.
struct Attack {
    name: String,
    frame: Vec<u8>,
    from: From,
    gate: Gate,
    /// Only the workers look for it: flannel's kernel would let it in, and so does the standby.
    workers_only: bool,
}

/// What is attacked.
#[derive(Debug, Clone, Copy)]
struct Target {
    backend: Backend,
    direct: bool,
    family: Family,
}

impl Target {
    fn lab(self) -> LabBuilder {
        let families = match self.family {
            Family::Ipv4 => Families::Ipv4,
            Family::Ipv6 => Families::Ipv6,
        };
        let builder = Lab::builder()
            .backend(self.backend)
            .families(families)
            .ripstop(1)
            .linux(2);
        if self.direct {
            builder.direct_routing()
        } else {
            builder
        }
    }

    /// Whether packets without a tunnel are taken.
    fn takes_direct(self) -> bool {
        self.direct || self.backend == Backend::HostGw
    }

    fn name(self) -> String {
        let direct = if self.direct { ", DirectRouting" } else { "" };
        format!("{}{direct} over {}", self.backend.name(), self.family)
    }
}

/// Collects the attacks on a target.
struct Attacks<'a> {
    lab: &'a Lab,
    target: Target,
    list: Vec<Attack>,
}

impl Attacks<'_> {
    /// A peer's packet as the backend sends it, with something changed.
    fn peer(&mut self, name: &str, gate: Gate, change: impl FnOnce(&mut Frame)) {
        let mut frame = marked(self.lab.backend_frame(PEER, VICTIM, self.target.family));
        change(&mut frame);
        self.add(name, From::Wire, gate, &frame);
    }

    /// The same without a tunnel.
    fn direct(&mut self, name: &str, gate: Gate, change: impl FnOnce(&mut Frame)) {
        let mut frame = marked(self.lab.direct_frame(PEER, VICTIM, self.target.family));
        change(&mut frame);
        self.add(&format!("no tunnel: {name}"), From::Wire, gate, &frame);
    }

    /// A packet of the victim's pod to the peer's.
    fn pod(&mut self, name: &str, gate: Gate, change: impl FnOnce(&mut Frame)) {
        let mut frame = marked(self.lab.pod_packet(VICTIM, PEER, self.target.family));
        let (pod, gateway) = (self.lab.pod(VICTIM, 0).mac(), address::gateway_mac(VICTIM));
        let ethernet = Ethernet::ip(self.target.family, pod, gateway);
        frame.headers.insert(0, Header::Ethernet(ethernet));
        change(&mut frame);
        self.add(&format!("a pod: {name}"), From::Pod, gate, &frame);
    }

    fn add(&mut self, name: &str, from: From, gate: Gate, frame: &Frame) {
        self.list.push(Attack {
            name: name.to_owned(),
            frame: frame.encode(),
            from,
            gate,
            workers_only: false,
        });
    }

    /// The attack added last passes the kernel of the standby, as it passes flannel's.
    fn workers_only(&mut self) {
        if let Some(attack) = self.list.last_mut() {
            attack.workers_only = true;
        }
    }

    fn has_tunnel(&self) -> bool {
        self.target.backend != Backend::HostGw
    }
}

fn marked(mut frame: Frame) -> Frame {
    frame.payload = MARKER.repeat(4);
    frame
}

/// Changes the source of the innermost packet.
fn spoof(frame: &mut Frame, four: Ipv4Addr, six: Ipv6Addr) {
    inner(frame, |ip| ip.source = four, |ip| ip.source = six);
}

/// Changes its destination.
fn aim(frame: &mut Frame, four: Ipv4Addr, six: Ipv6Addr) {
    inner(frame, |ip| ip.destination = four, |ip| ip.destination = six);
}

/// Changes the innermost IP header, of either family.
fn inner(frame: &mut Frame, four: impl FnOnce(&mut Ipv4), six: impl FnOnce(&mut Ipv6)) {
    if let Some(ip) = frame.ipv4s().last() {
        four(ip);
    } else if let Some(ip) = frame.ipv6s().last() {
        six(ip);
    }
}

/// Changes the outermost IP header.
fn outer(frame: &mut Frame, four: impl FnOnce(&mut Ipv4), six: impl FnOnce(&mut Ipv6)) {
    if let Some(ip) = frame.ipv4s().next() {
        four(ip);
    } else if let Some(ip) = frame.ipv6s().next() {
        six(ip);
    }
}

/// Puts another transport protocol into the innermost packet.
fn carry(frame: &mut Frame, protocol: u8, payload: Vec<u8>) {
    frame.headers.pop();
    inner(
        frame,
        |ip| ip.protocol = protocol,
        |ip| ip.next_header = protocol,
    );
    frame.payload = payload;
}

/// The addresses of the innermost IPv6 header.
fn ends6(frame: &mut Frame) -> [Ipv6Addr; 2] {
    let ip = frame.ipv6s().last();
    ip.map_or([Ipv6Addr::UNSPECIFIED; 2], |ip| [ip.source, ip.destination])
}

fn attacks(lab: &Lab, target: Target) -> Vec<Attack> {
    let mut attacks = Attacks {
        lab,
        target,
        list: Vec::new(),
    };
    if attacks.has_tunnel() {
        unknown_sources(&mut attacks);
        outer_lies(&mut attacks);
        inner_addresses(&mut attacks);
        inner_lies(&mut attacks, false);
    }
    if target.takes_direct() {
        without_a_tunnel(&mut attacks);
        inner_lies(&mut attacks, true);
    }
    other_tunnels(&mut attacks);
    from_a_pod(&mut attacks);
    attacks.list
}

/// Class 1: whoever is no peer.
fn unknown_sources(attacks: &mut Attacks<'_>) {
    for (name, four, six) in [
        ("the attacker", address::ATTACKER, address::ATTACKER6),
        (
            "not on this network",
            Ipv4Addr::new(192, 0, 2, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        ),
        // A loop: what comes from us does not come from the wire.
        (
            "the victim itself",
            address::underlay(VICTIM),
            address::underlay6(VICTIM),
        ),
    ] {
        attacks.peer(
            &format!("unknown source: {name}"),
            Worker(DropReason::UnknownPeer),
            |frame| {
                if name == "the attacker"
                    && let Some(ethernet) = frame.ethernets().next()
                {
                    ethernet.source = address::ATTACKER_MAC;
                }
                outer(frame, |ip| ip.source = four, |ip| ip.source = six);
            },
        );
        if name == "the attacker"
            && let Some(attack) = attacks.list.last_mut()
        {
            attack.from = From::Attacker;
        }
    }
}

/// Class 5, outside: checksums, lengths, fragments, options.
fn outer_lies(attacks: &mut Attacks<'_>) {
    let (backend, family) = (attacks.target.backend, attacks.target.family);
    match family {
        Family::Ipv4 => {
            attacks.peer(
                "outer checksum",
                Worker(DropReason::OuterChecksum),
                |frame| {
                    outer(frame, |ip| ip.checksum = Some(0x1234), |_| {});
                },
            );
            attacks.peer("outer length too long", Kernel, |frame| {
                outer(frame, |ip| ip.total_length = Some(1400), |_| {});
            });
            attacks.peer("outer fragment", Kernel, |frame| {
                outer(frame, |ip| ip.more_fragments = true, |_| {});
            });
            // Sources that the victim knows to be strangers have no use for options either.
            attacks.peer("outer options from a stranger", Kernel, |frame| {
                outer(
                    frame,
                    |ip| (ip.options, ip.source) = (vec![1; 8], address::ATTACKER),
                    |_| {},
                );
            });
        }
        Family::Ipv6 => {
            attacks.peer(
                "outer UDP checksum",
                Worker(DropReason::OuterUdpChecksum),
                |frame| {
                    if let Some(udp) = frame.udps().next() {
                        udp.checksum = UdpChecksum::Wrong(0x1234);
                    }
                },
            );
            attacks.peer("no outer UDP checksum", Kernel, |frame| {
                if let Some(udp) = frame.udps().next() {
                    udp.checksum = UdpChecksum::None;
                }
            });
            attacks.peer("outer length too long", Kernel, |frame| {
                outer(frame, |_| {}, |ip| ip.payload_length = Some(1400));
            });
            attacks.peer("an outer jumbogram", Kernel, |frame| {
                outer(frame, |_| {}, |ip| ip.payload_length = Some(0));
            });
            attacks.peer("outer extension header from a stranger", Kernel, |frame| {
                outer(
                    frame,
                    |_| {},
                    |ip| (ip.next_header, ip.source) = (60, address::ATTACKER6),
                );
                let options = Header::Raw(vec![17, 0, 1, 4, 0, 0, 0, 0]);
                frame.headers.insert(2, options);
            });
        }
    }
    if matches!(backend, Backend::Vxlan | Backend::Udp) {
        for (name, length) in [
            ("too long", 1400),
            ("of the header alone", 8),
            ("impossible", 7),
        ] {
            attacks.peer(&format!("UDP length {name}"), Kernel, |frame| {
                if let Some(udp) = frame.udps().next() {
                    udp.length = Some(length);
                }
            });
        }
    }
    if backend == Backend::Vxlan {
        attacks.peer("another VNI", Kernel, |frame| {
            if let Some(vxlan) = frame.vxlans().next() {
                vxlan.vni = 2;
            }
        });
        attacks.peer(
            "an inner VLAN tag",
            Worker(DropReason::InnerVlan),
            |frame| {
                let ethertype = if family == Family::Ipv4 {
                    0x0800
                } else {
                    0x86dd
                };
                if let Some(ethernet) = frame.ethernets().last() {
                    ethernet.ethertype = 0x8100;
                }
                let at = frame.outer().len();
                frame.headers.insert(at, Header::Vlan(5, ethertype));
            },
        );
        attacks.peer(
            "for another VTEP",
            Worker(DropReason::InnerDestinationMac),
            |frame| {
                if let Some(ethernet) = frame.ethernets().last() {
                    ethernet.destination = Mac([0x02, 0x52, 0x53, 0, 0, OTHER]);
                }
            },
        );
    }
    attacks.peer("cut off", Kernel, |frame| {
        frame.truncate_to = Some(frame.encode().len() - 5);
    });
}

/// Classes 3 and 4: who sends what to whom, inside.
fn inner_addresses(attacks: &mut Attacks<'_>) {
    let strangers = [
        (
            "another peer's pod",
            address::pod(OTHER, 0),
            address::pod6(OTHER, 0),
        ),
        (
            "the victim's own pod",
            address::pod(VICTIM, 0),
            address::pod6(VICTIM, 0),
        ),
        (
            "a node",
            address::underlay(OTHER),
            address::underlay6(OTHER),
        ),
        (
            "the Internet",
            Ipv4Addr::new(192, 0, 2, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        ),
        ("loopback", Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
    ];
    for (name, four, six) in strangers {
        attacks.peer(
            &format!("spoofed inner source: {name}"),
            Worker(DropReason::InnerSource),
            |frame| spoof(frame, four, six),
        );
    }
    let elsewhere = [
        (
            "another node's pod",
            address::pod(OTHER, 0),
            address::pod6(OTHER, 0),
        ),
        (
            "back to the sender's pod",
            address::pod(PEER, 0),
            address::pod6(PEER, 0),
        ),
        (
            "the victim's underlay address",
            address::underlay(VICTIM),
            address::underlay6(VICTIM),
        ),
        (
            "the Internet",
            Ipv4Addr::new(192, 0, 2, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        ),
        (
            "a group",
            Ipv4Addr::new(224, 0, 0, 1),
            Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
        ),
    ];
    for (name, four, six) in elsewhere {
        attacks.peer(
            &format!("inner destination: {name}"),
            Worker(DropReason::InnerDestination),
            |frame| aim(frame, four, six),
        );
    }
    // Class 3: a tunnel packet in a tunnel packet, to be taken apart twice.
    let family = attacks.target.family;
    let nested = marked(attacks.lab.backend_frame(OTHER, VICTIM, family));
    attacks.peer(
        "a tunnel packet in a tunnel packet",
        Worker(DropReason::InnerSource),
        |frame| {
            let outer = frame.outer();
            let packet = Frame {
                headers: nested.headers[1..].to_vec(),
                ..nested.clone()
            };
            *frame = Frame {
                headers: outer,
                payload: packet.encode(),
                truncate_to: None,
            };
        },
    );
}

/// Classes 5 and 6, inside: lengths, checksums, jumbo lies, fragments over headers, neighbour discovery, redirects.
fn inner_lies(attacks: &mut Attacks<'_>, direct: bool) {
    use DropReason::{IcmpRedirect, InnerChecksum, InnerFragment, InnerLength, NeighbourDiscovery};
    let family = attacks.target.family;
    let mut each = |name: &str, gate: Gate, change: &dyn Fn(&mut Frame)| {
        if direct {
            attacks.direct(name, gate, change);
        } else {
            attacks.peer(name, gate, change);
        }
        // Inside of the tunnel, these look whole to the kernel.
        if matches!(
            gate,
            Worker(IcmpRedirect | NeighbourDiscovery | InnerFragment)
        ) {
            attacks.workers_only();
        }
    };
    match family {
        Family::Ipv4 => {
            // Without a tunnel that is the packet's own header, which the XDP program does not sum up.
            each("inner checksum", Worker(InnerChecksum), &|frame| {
                inner(frame, |ip| ip.checksum = Some(0x1234), |_| {});
            });
            for (name, length) in [
                ("one too long", 61),
                ("of a jumbogram", 65_535),
                ("impossible", 19),
            ] {
                each(
                    &format!("inner length {name}"),
                    Worker(InnerLength),
                    &|frame| {
                        // The right length is 60.
                        inner(frame, |ip| ip.total_length = Some(length), |_| {});
                    },
                );
            }
            each("a redirect", Worker(IcmpRedirect), &|frame| {
                carry(frame, ICMP, icmp(5, 1, &MARKER.repeat(4)));
            });
            for (name, offset, more, bytes) in [
                ("a tiny first fragment", 0, true, 8),
                ("a fragment over the ports", 1, false, 32),
                ("a fragment over the flags", 2, true, 32),
                ("a fragment beyond the longest packet", 8189, false, 32),
            ] {
                each(name, Worker(InnerFragment), &|frame| {
                    carry(frame, TCP, MARKER.repeat(4)[..bytes].to_vec());
                    inner(
                        frame,
                        |ip| (ip.fragment_offset, ip.more_fragments) = (offset, more),
                        |_| {},
                    );
                });
            }
        }
        Family::Ipv6 => {
            for (name, length) in [("one too long", 41), ("of the longest packet", 65_535)] {
                each(
                    &format!("inner length {name}"),
                    Worker(InnerLength),
                    &|frame| {
                        // The right length is 40.
                        inner(frame, |_| {}, |ip| ip.payload_length = Some(length));
                    },
                );
            }
            each("a jumbogram's length", Worker(InnerLength), &|frame| {
                // RFC 2675: no length, and a hop-by-hop option that says 70,000.
                let option = [6, 0, 0xc2, 4, 0, 1, 0x11, 0x70];
                carry(frame, 0, [option.as_slice(), &MARKER.repeat(4)].concat());
                inner(frame, |_| {}, |ip| ip.payload_length = Some(0));
            });
            for (name, kind) in [
                ("router solicitation", 133),
                ("router advertisement", 134),
                ("neighbour solicitation", 135),
                ("neighbour advertisement", 136),
                ("redirect", 137),
            ] {
                each(&format!("a {name}"), Worker(NeighbourDiscovery), &|frame| {
                    discover(frame, kind, false);
                });
            }
            each(
                "a router advertisement behind an extension header",
                Worker(NeighbourDiscovery),
                &|frame| discover(frame, 134, true),
            );
            for (name, offset, more, bytes) in [
                ("a tiny first fragment", 0, true, 8),
                ("a fragment over the ports", 1, false, 32),
                ("a fragment beyond the longest packet", 8189, false, 40),
            ] {
                each(name, Worker(InnerFragment), &|frame| {
                    let field = (offset << 3_u16 | u16::from(more)).to_be_bytes();
                    let header = [TCP, 0, field[0], field[1], 0, 0, 0x12, 0x34];
                    let payload = &MARKER.repeat(5)[..bytes];
                    carry(frame, 44, [header.as_slice(), payload].concat());
                });
            }
        }
    }
}

/// Puts neighbour discovery into the packet, with the hop limit that it needs, after `hidden` an extension header.
fn discover(frame: &mut Frame, kind: u8, hidden: bool) {
    let [source, destination] = ends6(frame);
    let message = icmp6(source, destination, kind, 0, &MARKER.repeat(4));
    if hidden {
        let options = [ICMP6, 0, 1, 4, 0, 0, 0, 0];
        carry(frame, 60, [options.as_slice(), &message].concat());
    } else {
        carry(frame, ICMP6, message);
    }
    inner(frame, |_| {}, |ip| ip.hop_limit = 255);
}

/// Where packets come without a tunnel, their source must be somebody's pod.
fn without_a_tunnel(attacks: &mut Attacks<'_>) {
    attacks.direct(
        "from a lease that nobody has",
        Worker(DropReason::UnknownSource),
        |frame| spoof(frame, address::pod(99, 0), address::pod6(99, 0)),
    );
    attacks.workers_only();
}

/// Class 2: another tunnel's packet to an address that takes tunnels apart.
fn other_tunnels(attacks: &mut Attacks<'_>) {
    let (target, lab) = (attacks.target, attacks.lab);
    let packet = marked(lab.pod_packet(PEER, VICTIM, target.family));
    let ethernet = || {
        let (peer, victim) = (address::underlay_mac(PEER), address::underlay_mac(VICTIM));
        Header::Ethernet(Ethernet::ip(target.family, peer, victim))
    };
    let ip = |protocol| match target.family {
        Family::Ipv4 => Header::Ipv4(Ipv4 {
            protocol,
            ..Ipv4::udp(address::underlay(PEER), address::underlay(VICTIM))
        }),
        Family::Ipv6 => Header::Ipv6(Ipv6 {
            next_header: protocol,
            ..Ipv6::udp(address::underlay6(PEER), address::underlay6(VICTIM))
        }),
    };
    let inner_ethernet = || {
        let (from, to) = match target.family {
            Family::Ipv4 => (address::vtep_mac(PEER), address::vtep_mac(VICTIM)),
            Family::Ipv6 => (address::vtep_mac6(PEER), address::vtep_mac6(VICTIM)),
        };
        Header::Ethernet(Ethernet::ip(target.family, from, to))
    };
    let udp = |port| Header::Udp(Udp::ports(50_000, port));
    let vxlan = |port| {
        vec![
            ip(17),
            udp(port),
            Header::Vxlan(Vxlan::vni(1)),
            inner_ethernet(),
        ]
    };
    let gre = match target.family {
        Family::Ipv4 => vec![0, 0, 0x08, 0x00],
        Family::Ipv6 => vec![0, 0, 0x86, 0xdd],
    };
    let in_ip = match target.family {
        Family::Ipv4 => IPIP,
        Family::Ipv6 => 41,
    };
    let mut tunnels = vec![
        ("VXLAN on port 4789", vxlan(4789)),
        ("GRE", vec![ip(47), Header::Raw(gre)]),
        ("IP in UDP on port 5555", vec![ip(17), udp(5555)]),
    ];
    if target.backend != Backend::Vxlan {
        tunnels.push(("VXLAN", vxlan(address::VXLAN_PORT)));
    }
    if target.backend != Backend::Ipip {
        tunnels.push(("IP in IP", vec![ip(in_ip)]));
    }
    if target.backend != Backend::Udp {
        tunnels.push(("IP in UDP", vec![ip(17), udp(address::UDP_PORT)]));
    }
    for (name, outer) in tunnels {
        let mut frame = packet.clone();
        frame.headers.splice(0..0, outer);
        frame.headers.insert(0, ethernet());
        attacks.add(
            &format!("wrong protocol: {name}"),
            From::Wire,
            Kernel,
            &frame,
        );
    }
}

/// Classes 4 and 6, from inside: a pod that pretends to be another pod, or a node, or a router.
fn from_a_pod(attacks: &mut Attacks<'_>) {
    use DropReason::{IcmpRedirect, NeighbourDiscovery, SourceNotLocal};
    for (name, four, six) in [
        (
            "another node's pod",
            address::pod(OTHER, 0),
            address::pod6(OTHER, 0),
        ),
        (
            "a pod of the receiver",
            address::pod(PEER, 9),
            address::pod6(PEER, 9),
        ),
        ("a pod of nobody", address::pod(99, 0), address::pod6(99, 0)),
    ] {
        attacks.pod(
            &format!("in the name of {name}"),
            Worker(SourceNotLocal),
            |frame| spoof(frame, four, six),
        );
        attacks.workers_only();
    }
    for (name, node) in [("another node", OTHER), ("this node", VICTIM)] {
        let (four, six) = (address::underlay(node), address::underlay6(node));
        attacks.pod(&format!("in the name of {name}"), Guard, |frame| {
            spoof(frame, four, six);
        });
        attacks.pod(
            &format!("in the name of {name}, to a node"),
            Guard,
            |frame| {
                spoof(frame, four, six);
                aim(frame, address::underlay(PEER), address::underlay6(PEER));
            },
        );
    }
    match attacks.target.family {
        Family::Ipv4 => {
            attacks.pod("a redirect", Worker(IcmpRedirect), |frame| {
                carry(frame, ICMP, icmp(5, 1, &MARKER.repeat(4)));
            });
            attacks.workers_only();
        }
        Family::Ipv6 => {
            for (name, kind) in [("a router advertisement", 134), ("a redirect", 137)] {
                attacks.pod(name, Worker(NeighbourDiscovery), |frame| {
                    discover(frame, kind, false);
                });
                attacks.workers_only();
            }
        }
    }
}

/// Where attacks go in.
struct Guns {
    wire: Injector,
    attacker: Injector,
    pod: Injector,
}

impl Guns {
    fn new(lab: &Lab) -> Result<Self> {
        Ok(Self {
            wire: Injector::open(lab.fabric(), &Fabric::port(VICTIM))?,
            attacker: Injector::open(lab.attacker(), "eth0")?,
            pod: Injector::open(lab.pod(VICTIM, 0), "eth0")?,
        })
    }

    fn fire(&self, attack: &Attack) -> Result<()> {
        let gun = match attack.from {
            From::Wire => &self.wire,
            From::Attacker => &self.attacker,
            From::Pod => &self.pod,
        };
        (0..ROUNDS)
            .try_for_each(|_round| gun.send(&attack.frame))
            .with_context(|| attack.name.clone())
    }
}

/// Everything that an attack must not reach.
struct Watch {
    captures: Vec<(String, Capture)>,
}

impl Watch {
    fn start(lab: &Lab) -> Result<Self> {
        let mut captures = Vec::new();
        for node in lab.nodes() {
            let pod = node.pod(0);
            let capture = Capture::start_filtered(pod, "eth0", 1000, |frame| {
                frame.direction == Direction::In && is_marked(frame) && !is_icmp_error(frame)
            })?;
            captures.push((format!("arrived at {}", pod.name()), capture));
        }
        let wire = Capture::start_filtered(lab.fabric(), &Fabric::port(VICTIM), 1000, |frame| {
            frame.direction == Direction::In && is_marked(frame) && !is_icmp_error(frame)
        })?;
        captures.push(("left the victim".to_owned(), wire));
        Ok(Self { captures })
    }

    fn finish(self) -> Result<()> {
        let mut faults = Vec::new();
        for (what, capture) in self.captures {
            let captured = capture.stop();
            ensure!(captured.missed == 0, "missed {}", captured.missed);
            for frame in captured.frames {
                faults.push(format!("{what}: {:?}", Frame::parse(&frame.bytes)));
            }
        }
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        Ok(())
    }
}

fn is_marked(frame: &CapturedFrame) -> bool {
    find(&frame.bytes, MARKER).is_some()
}

/// The kernel's word to a sender, which quotes the packet.
fn is_icmp_error(frame: &CapturedFrame) -> bool {
    let bytes = &frame.bytes;
    let at = |position: usize| bytes.get(position).copied().unwrap_or_default();
    match bytes.get(12..14) {
        Some([0x08, 0x00]) => at(23) == ICMP && matches!(at(34), 3 | 11 | 12),
        Some([0x86, 0xdd]) => at(20) == ICMP6 && matches!(at(54), 1..=4),
        _ => false,
    }
}

/// What has been dropped, by name: by the workers, and by the guard.
type Drops = BTreeMap<String, u64>;

const GUARDED: &str = "guard_node_source";

fn drops(node: &Node) -> Result<Drops> {
    let by_workers = node.workers()?.drops().into_iter();
    let mut drops: Drops = by_workers
        .map(|(reason, count)| (reason.to_owned(), count))
        .collect();
    drops.extend(nft_counts(node, ["inet", "ripstop-guard"])?);
    Ok(drops)
}

fn dropped_since(now: Drops, before: &Drops) -> Drops {
    let grown = now.into_iter().map(|(reason, count)| {
        let earlier = before.get(&reason).copied().unwrap_or_default();
        (reason, count - earlier)
    });
    grown.filter(|(_, count)| *count > 0).collect()
}

/// The good packet, by every way it may come: it arrives. So the attacks have not failed for another reason.
fn check_welcome(lab: &Lab, target: Target) -> Result<()> {
    let wire = Injector::open(lab.fabric(), &Fabric::port(VICTIM))?;
    let capture = Capture::start_filtered(lab.pod(VICTIM, 0), "eth0", 10, |frame| {
        frame.direction == Direction::In && find(&frame.bytes, WELCOME).is_some()
    })?;
    let mut frames = vec![lab.backend_frame(PEER, VICTIM, target.family)];
    if target.direct {
        frames.push(lab.direct_frame(PEER, VICTIM, target.family));
    }
    for frame in &mut frames {
        frame.payload = WELCOME.to_vec();
        wire.send(&frame.encode())?;
    }
    capture
        .wait_for(frames.len(), PATIENCE)
        .context("the good packet")
}

/// Fires one attack after the other; returns a line for each, and what went wrong.
fn attack_workers(lab: &Lab, target: Target) -> Result<(Vec<String>, Vec<String>)> {
    let victim = lab.node(VICTIM);
    let (guns, watch) = (Guns::new(lab)?, Watch::start(lab)?);
    let (mut lines, mut faults) = (Vec::new(), Vec::new());
    settled(lab, victim)?;
    let before = drops(victim)?;
    let mut expected = Drops::new();
    for attack in attacks(lab, target) {
        guns.fire(&attack)?;
        let (reason, by) = match attack.gate {
            Worker(reason) => (reason.name(), "a worker"),
            Guard => (GUARDED, "the guard"),
            Kernel => {
                let line = "left to the kernel, which has no use for it";
                lines.push(format!("| {} | {line} |", attack.name));
                continue;
            }
        };
        let alone = if attack.workers_only { " alone" } else { "" };
        lines.push(format!("| {} | {by}{alone}: {reason} |", attack.name));
        *expected.entry(reason.to_owned()).or_default() += ROUNDS;
        let mut found = Drops::new();
        let counted = wait_until("counted", COUNTED, || {
            found = drops(victim).map_or_else(|_| Drops::new(), |now| dropped_since(now, &before));
            found == expected
        });
        if counted.is_err() {
            faults.push(format!(
                "{}: dropped are {found:?} and not {expected:?}",
                attack.name
            ));
            expected = found;
        }
    }
    if let Err(error) = watch.finish() {
        faults.push(format!("{error:#}"));
    }
    // Nothing was counted twice, or later.
    let last = settled(lab, victim)?.0;
    let found = dropped_since(drops(victim)?, &before);
    if found != expected {
        faults.push(format!(
            "in the end dropped are {found:?} and not {expected:?}"
        ));
    }
    check_conservation(victim.name(), &last)?;
    Ok((lines, faults))
}

/// Without a data plane: what is not for the workers alone reaches nobody, and the guard counts as before.
fn attack_kernel(lab: &Lab, target: Target) -> Result<()> {
    let guarded = || {
        let counts = nft_counts(lab.node(VICTIM), ["inet", "ripstop-guard"])?;
        Ok::<_, anyhow::Error>(counts.get(GUARDED).copied().unwrap_or_default())
    };
    let (guns, watch) = (Guns::new(lab)?, Watch::start(lab)?);
    let mut expected = guarded()?;
    for attack in attacks(lab, target) {
        if !attack.workers_only {
            guns.fire(&attack)?;
            expected += if attack.gate == Guard { ROUNDS } else { 0 };
        }
    }
    wait_until("the guard has counted", COUNTED, || {
        guarded().is_ok_and(|count| count >= expected)
    })?;
    let count = guarded()?;
    ensure!(
        count == expected,
        "the guard has counted {count} and not {expected}"
    );
    watch.finish()
}

#[expect(clippy::print_stdout, reason = "a row for each attack, for the reader")]
fn run(target: Target) -> Result<()> {
    let name = target.name();
    target.lab().run(|lab| {
        lab.start_ripstop()?;
        let victim = lab.node(VICTIM);
        wait_until("the guard watches the pods", PATIENCE, || {
            let pods = victim.output(&["nft", "list", "set", "inet", "ripstop-guard", "pods"]);
            pods.is_ok_and(|text| text.contains("cni0"))
        })?;
        check_welcome(lab, target)?;
        let (lines, mut faults) = attack_workers(lab, target)?;
        println!("\n{name}: {} attacks\n\n{}", lines.len(), lines.join("\n"));
        check_welcome(lab, target)?;

        victim.kill_dataplane();
        if let Err(error) = attack_kernel(lab, target) {
            faults.push(format!("without a data plane: {error:#}"));
        }
        ensure!(faults.is_empty(), "{name}:\n{}", faults.join("\n"));
        Ok(())
    })
}

fn target(backend: Backend, direct: bool, family: Family) -> Result<()> {
    run(Target {
        backend,
        direct,
        family,
    })
}

#[test]
fn vxlan_over_ipv4() -> Result<()> {
    target(Backend::Vxlan, false, Family::Ipv4)
}

#[test]
fn vxlan_over_ipv6() -> Result<()> {
    target(Backend::Vxlan, false, Family::Ipv6)
}

#[test]
fn vxlan_with_direct_routing() -> Result<()> {
    target(Backend::Vxlan, true, Family::Ipv4)
}

#[test]
fn ipip() -> Result<()> {
    target(Backend::Ipip, false, Family::Ipv4)
}

#[test]
fn udp() -> Result<()> {
    target(Backend::Udp, false, Family::Ipv4)
}

#[test]
fn host_gw_over_ipv4() -> Result<()> {
    target(Backend::HostGw, false, Family::Ipv4)
}

#[test]
fn host_gw_over_ipv6() -> Result<()> {
    target(Backend::HostGw, false, Family::Ipv6)
}
