//! What pods of two nodes do with each other, one kind of traffic each: the columns of the matrix.

use core::time::Duration;

use anyhow::{Context, Result, ensure};
use ripstop_perf::{
    Capture, CapturedFrame, Direction, Ethernet, Family, Frame, Header, Host, Injector, Ipv4, Ipv6,
    Lab, NodeKind, Ping, Pod, Udp, address, tcp_transfer_over, udp_echo_over, udp_payload_max_over,
};

/// How long a wait may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much longer than the MTU the pods' links are where packets shall be too long for the tunnel.
const EXCESS: u16 = 200;
/// UDP port to which nobody listens, and which draws no answer: the receiver has a filter in front.
const DISCARD: u16 = 9;

/// One kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cell {
    Icmp,
    Udp,
    Tcp,
    /// Datagrams that the pods cut, and on IPv4 one that the node has to cut.
    Fragments,
    /// As long as fits, not to be cut.
    Full,
    /// One byte more.
    TooBig,
}

impl Cell {
    pub(crate) const ALL: [Self; 6] = [
        Self::Icmp,
        Self::Udp,
        Self::Tcp,
        Self::Fragments,
        Self::Full,
        Self::TooBig,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Icmp => "ICMP",
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
            Self::Fragments => "fragments",
            Self::Full => "full MTU, DF",
            Self::TooBig => "too big",
        }
    }

    /// The least number of packets that go each way between the nodes.
    pub(crate) fn packets_min(self) -> u64 {
        match self {
            Self::Icmp => 4,
            Self::Udp => 8,
            Self::Tcp => 300,
            Self::Fragments => 9,
            Self::Full => 3,
            Self::TooBig => 0,
        }
    }

    /// Runs the traffic between the first pods of two nodes, begun from either.
    pub(crate) fn check(self, lab: &Lab, family: Family, one: u8, other: u8) -> Result<()> {
        for (from, to) in [(one, other), (other, one)] {
            self.one_way(lab, family, from, to)
                .with_context(|| format!("from n{from} to n{to}"))?;
        }
        Ok(())
    }

    fn one_way(self, lab: &Lab, family: Family, from: u8, to: u8) -> Result<()> {
        let mtu = lab.pod_mtu_of(family);
        let full = udp_payload_max_over(family, mtu);
        let (source, target) = (lab.pod(from, 0), lab.pod(to, 0));
        match self {
            Self::Icmp => {
                answered(Ping::over(family, source, target).count(2))?;
                answered(Ping::over(family, source, target).payload_bytes(1))
            }
            Self::Udp => echoed(family, true, source, target, &[1, 64, 511, 1200]),
            Self::Tcp => tcp_transfer_over(family, source, target, 500_000).map(drop),
            Self::Fragments => {
                // Conntrack on the first node joins the fragments. Without a tunnel it sends on whole what
                // fits the underlay, and where that does not fit the far pod's link, IPv6 must refuse it.
                let whole = if lab.is_direct(from, to) {
                    udp_payload_max_over(family, lab.mtu())
                } else {
                    full
                };
                echoed(family, false, source, target, &[whole + 1, 3000, 8000])?;
                if family == Family::Ipv4 {
                    cut_by_the_node(lab, from, to)?;
                }
                Ok(())
            }
            Self::Full => {
                let full_size = || {
                    answered(Ping::over(family, source, target).full(mtu))?;
                    echoed(family, true, source, target, &[full - 1, full])
                };
                if mtu <= lab.pod_mtu() {
                    full_size()
                } else {
                    // The pods' links are those of the family with the smaller packets.
                    with_longer_links(lab, [from, to], full_size)
                }
            }
            Self::TooBig => too_big(lab, family, from, to),
        }
    }
}

fn answered(ping: Ping<'_>) -> Result<()> {
    let report = ping.run()?;
    ensure!(report.failed.is_empty(), "{:?}", report.failed);
    Ok(())
}

fn echoed(
    family: Family,
    dont_fragment: bool,
    from: &Pod,
    to: &Pod,
    sizes: &[usize],
) -> Result<()> {
    let report = udp_echo_over(family, dont_fragment, from, to, sizes)?;
    ensure!(report.failed.is_empty(), "{:?}", report.failed);
    Ok(())
}

/// Gives the link of a node's first pod, and the bridge, another MTU.
fn set_pod_mtu(lab: &Lab, node: u8, mtu: u16) -> Result<()> {
    let mtu = mtu.to_string();
    let set = |host: &dyn Host, device: &str| -> Result<()> {
        host.output(&["ip", "link", "set", device, "mtu", &mtu])
            .map(drop)
    };
    set(lab.node(node), "pod0")?;
    set(lab.node(node), "cni0")?;
    set(lab.pod(node, 0), "eth0")
}

/// Runs something while the first pods of two nodes may send more than fits the tunnel.
fn with_longer_links(lab: &Lab, nodes: [u8; 2], test: impl FnOnce() -> Result<()>) -> Result<()> {
    let longer = lab.mtu() + EXCESS;
    nodes
        .iter()
        .try_for_each(|node| set_pod_mtu(lab, *node, longer))?;
    let outcome = test();
    let back = nodes
        .iter()
        .try_for_each(|node| set_pod_mtu(lab, *node, lab.pod_mtu()));
    outcome.and(back)
}

/// A UDP packet of so many bytes from the first pod of a node, as the pod sends it.
pub(crate) fn packet_of(
    lab: &Lab,
    family: Family,
    from: u8,
    to: u8,
    bytes: u16,
    dont_fragment: bool,
) -> Frame {
    let ip = match family {
        Family::Ipv4 => Header::Ipv4(Ipv4 {
            dont_fragment,
            identification: 0x4242,
            ..Ipv4::udp(address::pod(from, 0), address::pod(to, 0))
        }),
        Family::Ipv6 => Header::Ipv6(Ipv6::udp(address::pod6(from, 0), address::pod6(to, 0))),
    };
    let (pod, gateway) = (lab.pod(from, 0).mac(), address::gateway_mac(from));
    Frame {
        headers: vec![
            Header::Ethernet(Ethernet::ip(family, pod, gateway)),
            ip,
            Header::Udp(Udp::ports(4000, DISCARD)),
        ],
        payload: vec![0x5a; udp_payload_max_over(family, bytes)],
        truncate_to: None,
    }
}

/// A datagram that fits the pod's link and not the tunnel, and may be cut: the far pod gets all of it.
fn cut_by_the_node(lab: &Lab, from: u8, to: u8) -> Result<()> {
    with_longer_links(lab, [from, to], || {
        let frame = packet_of(lab, Family::Ipv4, from, to, lab.mtu() + 100, false);
        let wanted = frame.payload.len() + 8;
        let capture = Capture::start_filtered(lab.pod(to, 0), "eth0", 10, from_pod(from))?;
        Injector::open(lab.pod(from, 0), "eth0")?.send(&frame.encode())?;
        let arrived = |frames: &[CapturedFrame]| -> usize {
            // Conntrack on the far node may join the fragments and cut them again.
            let lengths = frames.iter().filter_map(|frame| {
                let [high, low] = [*frame.bytes.get(16)?, *frame.bytes.get(17)?];
                Some(usize::from(u16::from_be_bytes([high, low])) - 20)
            });
            lengths.sum()
        };
        // One packet, if conntrack joins the fragments and the link is long enough.
        capture.wait_for(1, PATIENCE)?;
        let frames = capture.stop().frames;
        ensure!(
            arrived(&frames) == wanted,
            "{} of {wanted} bytes arrived in {} fragments",
            arrived(&frames),
            frames.len()
        );
        Ok(())
    })
}

fn from_pod(node: u8) -> impl Fn(&CapturedFrame) -> bool + Send + 'static {
    let source = address::pod(node, 0).octets();
    move |frame| {
        frame.direction == Direction::In
            && frame.bytes.get(12..14) == Some(&[8, 0])
            && frame.bytes.get(23) == Some(&17)
            && frame.bytes.get(26..30) == Some(&source)
    }
}

/// One byte more than fits: the node says so, and how much fits, as its kernel would.
fn too_big(lab: &Lab, family: Family, from: u8, to: u8) -> Result<()> {
    with_longer_links(lab, [from, to], || {
        // Next to a peer on the same segment flannel's route leads to the underlay's own device.
        let kernel_alone = lab.node(from).kind() == NodeKind::PlainLinux;
        let fits = if kernel_alone && lab.is_direct(from, to) {
            lab.mtu()
        } else {
            lab.pod_mtu_of(family)
        };
        let sent = packet_of(lab, family, from, to, fits + 1, true);
        let answers = Capture::start_filtered(lab.pod(from, 0), "eth0", 10, is_too_big)?;
        let arrivals = Capture::start_filtered(lab.pod(to, 0), "eth0", 10, |frame| {
            frame.direction == Direction::In && frame.bytes.ends_with(&[0x5a; 100])
        })?;
        Injector::open(lab.pod(from, 0), "eth0")?.send(&sent.encode())?;
        answers
            .wait_for(1, PATIENCE)
            .context("no answer that it is too big")?;
        let answers = answers.stop().frames;
        ensure!(answers.len() == 1, "{} answers", answers.len());
        let (said, source, quoted) = read_too_big(family, &answers[0].bytes)?;
        ensure!(
            said == u32::from(fits),
            "the answer says {said} and not {fits}"
        );
        let gateway: core::net::IpAddr = match family {
            Family::Ipv4 => address::gateway(from).into(),
            Family::Ipv6 => address::gateway6(from).into(),
        };
        ensure!(
            source == gateway,
            "the answer comes from {source} and not {gateway}"
        );
        let original = sent.innermost().encode();
        let ports = usize::from(family.udp_headers());
        // The node has not counted its TTL down yet, or it has: kernels differ.
        ensure!(
            quoted.len() >= ports && quoted[ports - 8..ports] == original[ports - 8..ports],
            "the answer quotes another packet: {quoted:?}"
        );
        ensure!(arrivals.stop().frames.is_empty(), "it arrived all the same");
        Ok(())
    })
}

fn is_too_big(frame: &CapturedFrame) -> bool {
    let bytes = &frame.bytes;
    let four = bytes.get(12..14) == Some(&[8, 0])
        && bytes.get(23) == Some(&1)
        && bytes.get(34..36) == Some(&[3, 4]);
    let six = bytes.get(12..14) == Some(&[0x86, 0xdd])
        && bytes.get(20) == Some(&58)
        && bytes.get(54..56) == Some(&[2, 0]);
    frame.direction == Direction::In && (four || six)
}

/// The MTU that the message tells, who sent it, and the packet that it quotes.
fn read_too_big(family: Family, bytes: &[u8]) -> Result<(u32, core::net::IpAddr, Vec<u8>)> {
    let mut frame = Frame::parse(bytes)?;
    let message = frame.payload.clone();
    ensure!(
        message.len() > 8,
        "{} bytes are no ICMP error",
        message.len()
    );
    let word = u32::from_be_bytes([message[4], message[5], message[6], message[7]]);
    let source = match family {
        Family::Ipv4 => frame.ipv4s().next().map(|ip| ip.source.into()),
        Family::Ipv6 => frame.ipv6s().next().map(|ip| ip.source.into()),
    };
    Ok((word, source.context("no IP header")?, message[8..].to_vec()))
}
