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

mod attacks;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use attacks::{
    Gate, Guns, INNER_FRAME, OTHER, PEER, ROUNDS, VICTIM, attacks, in_fragments, inner_ip, named,
    payload,
};
use common::{
    ECHO_REPLY, PATIENCE, by_worker, by_xdp, check_conservation, nft_counts, quiet, refused_since,
    xdp,
};
use ripstop_fib::stats::{Counter, XdpCounter};
use ripstop_perf::{
    Capture, CapturedFrame, Direction, Fabric, Host, Inner, Ipv4, Lab, Mac, Node, Ping, Udp,
    UdpChecksum, VxlanFrame, address, tcp_transfer, udp_echo, udp_payload_max, wait_until,
};

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
        let ip = Ipv4 {
            protocol: 1,
            ..inner_ip(&mut good).clone()
        };
        good.inner = Inner::Ipv4 {
            ip,
            payload: ECHO_REPLY.to_vec(),
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
    nft_counts(node, ["ip", "ripstop"])
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
        let first = quiet(lab, victim)?;
        let mut refused: BTreeMap<String, u64> = BTreeMap::new();
        let mut not_ours = 0;
        let mut filtered = filter_counts(victim)?;
        let mut dropped = 0;
        for attack in &attacks {
            let frames = ROUNDS * u64::try_from(attack.frames.len())?;
            guns.fire(attack)?;
            match attack.gate {
                Gate::Worker(reason) => {
                    *refused.entry(by_worker(reason)).or_default() += frames;
                    dropped += frames;
                }
                Gate::Xdp(outcome) => *refused.entry(by_xdp(outcome)).or_default() += frames,
                Gate::NotOurs => not_ours += frames,
            }
            if let (Gate::Xdp(_) | Gate::NotOurs, Some((counter, packets))) =
                (attack.gate, attack.filter)
            {
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
        let last = quiet(lab, victim)?;
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

/// A packet that may get in, however odd it looks.
struct Odd {
    name: &'static str,
    frames: Vec<Vec<u8>>,
    /// The packets that reach the pod: the node has counted their TTL down.
    arrive: Vec<Vec<u8>>,
    /// The XDP program leaves it to the kernel, which lets it in.
    through_kernel: bool,
    /// The kernel would not let it in.
    refused_by_standby: bool,
}

fn odd_packets(lab: &Lab) -> Vec<Odd> {
    let mut list: Vec<Odd> = Vec::new();
    let good = || named(lab.tunnel_frame(PEER, VICTIM), "none");
    let mut add = |name: &'static str, change: &dyn Fn(&mut VxlanFrame)| {
        let mut frame = good();
        change(&mut frame);
        let arrived = as_arrived(&frame);
        list.push(Odd {
            name,
            frames: vec![frame.encode()],
            arrive: vec![arrived],
            through_kernel: false,
            refused_by_standby: false,
        });
    };
    add("nothing odd", &|_| {});
    add("full size", &|frame| {
        payload(frame).resize(udp_payload_max(lab.pod_mtu()), 7);
    });
    add("no outer UDP checksum", &|frame| {
        frame.udp.checksum = UdpChecksum::None;
    });
    add("outer TTL 1", &|frame| frame.ip.ttl = 1);
    add("outer DF", &|frame| frame.ip.dont_fragment = true);
    add("outer DSCP", &|frame| frame.ip.tos = 0xb8);
    add("outer source port 1", &|frame| frame.udp.source = 1);
    add("a sender with another VTEP MAC", &|frame| {
        frame.inner_ethernet.source = Mac([2, 0, 0, 0, 0, 9]);
    });
    add("from the peer itself", &|frame| {
        inner_ip(frame).source = address::subnet(PEER);
    });
    add("TTL 2", &|frame| inner_ip(frame).ttl = 2);
    add("IP options", &|frame| inner_ip(frame).options = vec![1; 40]);
    add("TOS and DF", &|frame| {
        (inner_ip(frame).tos, inner_ip(frame).dont_fragment) = (0xbb, true);
    });
    add("no UDP checksum", &|frame| {
        inner_udp(frame).checksum = UdpChecksum::None;
    });
    add(
        "a wrong UDP checksum, which is the pod's to find",
        &|frame| {
            inner_udp(frame).checksum = UdpChecksum::Wrong(0x1234);
        },
    );
    add("another protocol", &|frame| {
        let ip = Ipv4 {
            protocol: 253,
            ..inner_ip(frame).clone()
        };
        frame.inner = Inner::Ipv4 {
            ip,
            payload: vec![7; 11],
        };
    });
    add("a first fragment", &|frame| {
        let ip = Ipv4 {
            more_fragments: true,
            identification: 0x0c01,
            ..inner_ip(frame).clone()
        };
        frame.inner = Inner::Ipv4 {
            ip,
            payload: vec![7; 64],
        };
    });
    add("a last fragment", &|frame| {
        let ip = Ipv4 {
            fragment_offset: 9,
            identification: 0x0c02,
            ..inner_ip(frame).clone()
        };
        frame.inner = Inner::Ipv4 {
            ip,
            payload: vec![7; 33],
        };
    });
    add(
        "a wrong outer UDP checksum, which workers do not verify",
        &|frame| {
            frame.udp.checksum = UdpChecksum::Wrong(0x1234);
        },
    );
    if let Some(odd) = list.last_mut() {
        odd.refused_by_standby = true;
    }
    // RFC 6040 section 4.2: inner, outer, inner afterwards.
    for (inner, outer, afterwards) in [
        (2, 3, 3),
        (1, 3, 3),
        (3, 0, 3),
        (2, 1, 1),
        (1, 2, 1),
        (0, 2, 0),
    ] {
        let mut frame = good();
        (frame.ip.tos, inner_ip(&mut frame).tos) = (outer, 0x28 | inner);
        let sent = frame.encode();
        inner_ip(&mut frame).tos = 0x28 | afterwards;
        list.push(Odd {
            name: "congestion marks",
            ..odd(vec![sent], vec![as_arrived(&frame)])
        });
    }
    let mut padded = good().encode();
    padded.extend([0xee; 20]);
    list.push(Odd {
        name: "Ethernet padding",
        ..odd(vec![padded], vec![as_arrived(&good())])
    });
    let mut inside = good();
    inside.inner = Inner::Raw([&good().encode()[INNER_FRAME + 14..], &[0xee; 20]].concat());
    list.push(Odd {
        name: "padding of the inner frame",
        ..odd(vec![inside.encode()], vec![as_arrived(&good())])
    });
    let mut options = good();
    options.ip.options = vec![1; 8];
    list.push(Odd {
        name: "outer IP options",
        through_kernel: true,
        ..odd(vec![options.encode()], vec![as_arrived(&good())])
    });
    list.push(Odd {
        name: "in outer fragments",
        through_kernel: true,
        ..odd(in_fragments(&good(), 0x0c03), vec![as_arrived(&good())])
    });
    list
}

fn odd(frames: Vec<Vec<u8>>, arrive: Vec<Vec<u8>>) -> Odd {
    Odd {
        name: "",
        frames,
        arrive,
        through_kernel: false,
        refused_by_standby: false,
    }
}

/// The inner packet of a frame as the pod gets it.
fn as_arrived(frame: &VxlanFrame) -> Vec<u8> {
    let mut frame = frame.clone();
    inner_ip(&mut frame).ttl -= 1;
    frame.encode()[INNER_FRAME + 14 + frame.ip.options.len()..].to_vec()
}

fn inner_udp(frame: &mut VxlanFrame) -> &mut Udp {
    match &mut frame.inner {
        Inner::Udp { udp, .. } => udp,
        Inner::Ipv4 { .. } | Inner::Raw(_) => panic!("no inner UDP header"),
    }
}

#[test]
fn what_peers_may_send_gets_in_unchanged() -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let victim = lab.node(VICTIM);
        wait_for_filter(victim)?;
        let before = quiet(lab, victim)?;
        let standby = victim.standby_counters()?;
        let odd = odd_packets(lab);
        send_odd(lab, &odd, |_| true)?;
        let after = quiet(lab, victim)?;
        let through_kernel = odd.iter().filter(|odd| odd.through_kernel).count();
        let delivered = after.total(Counter::HostTxPackets) - before.total(Counter::HostTxPackets);
        assert_eq!(
            delivered,
            u64::try_from(odd.len() - through_kernel)?,
            "delivered by workers"
        );
        let decapsulated = victim.standby_counters()?.rx_packets - standby.rx_packets;
        assert_eq!(
            decapsulated,
            u64::try_from(through_kernel)?,
            "delivered by the kernel"
        );
        let expected = [
            (by_xdp(XdpCounter::Fragment), 2),
            (by_xdp(XdpCounter::IpOptions), 1),
        ];
        assert_eq!(refused_since(&after, &before), expected.into());

        victim.kill_dataplane();
        send_odd(lab, &odd, |odd| !odd.refused_by_standby).context("without a data plane")
    })
}

/// Sends each packet, and compares what the pod gets.
fn send_odd(lab: &Lab, odd: &[Odd], arrives: impl Fn(&Odd) -> bool) -> Result<()> {
    let guns = Guns::new(lab)?;
    for odd in odd {
        let capture = Capture::start_filtered(lab.pod(VICTIM, 0), "eth0", 10, |frame| {
            frame.direction == Direction::In && is_ipv4(frame)
        })?;
        for frame in &odd.frames {
            guns.wire.send(frame)?;
        }
        let expected: &[Vec<u8>] = if arrives(odd) { &odd.arrive } else { &[] };
        capture
            .wait_for(expected.len(), PATIENCE)
            .with_context(|| odd.name)?;
        let arrived: Vec<Vec<u8>> = capture
            .stop()
            .frames
            .into_iter()
            .map(|frame| frame.bytes[14..].to_vec())
            .collect();
        assert_eq!(arrived, expected, "{}", odd.name);
    }
    Ok(())
}
