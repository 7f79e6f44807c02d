//! Pods of different nodes talk through the workers, whatever moves the packets at the other end: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═╗
//!   n2p0 ─ n2 ─ rip0 ─ worker ═╬═ fabric
//!   n3p0 ─ n3 ─ flannel.1 ═════╝   (plain Linux)
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use common::{
    PATIENCE, check_conservation, check_no_damage, kernel_counters, quiet, refused_since, xdp,
};
use ripstop_fib::stats::{Counter, XdpCounter};
use ripstop_perf::{
    Capture, Direction, Host, KernelCounters, Lab, LinkCounters, Ping, UdpFlow, Workers, address,
    tcp_transfer, udp_echo, udp_payload_max,
};
use serde_json::json;

/// Two nodes with Ripstop, one without.
fn mixed_lab(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        test(lab)
    })
}

/// How many packets went from one node to another.
#[derive(Debug, Default)]
struct Sent(BTreeMap<(u8, u8), u64>);

impl Sent {
    /// So many packets there and as many back.
    fn both_ways(&mut self, one: u8, other: u8, packets: u64) {
        self.one_way(one, other, packets);
        self.one_way(other, one, packets);
    }

    fn one_way(&mut self, from: u8, to: u8, packets: u64) {
        *self.0.entry((from, to)).or_default() += packets;
    }

    fn by(&self, node: u8) -> u64 {
        self.0
            .iter()
            .filter(|((from, _), _)| *from == node)
            .map(|(_, packets)| packets)
            .sum()
    }

    fn to(&self, node: u8) -> u64 {
        self.0
            .iter()
            .filter(|((_, to), _)| *to == node)
            .map(|(_, packets)| packets)
            .sum()
    }
}

/// What is compared before and after the traffic.
struct Before {
    kernel: Vec<(String, KernelCounters)>,
    nodes: BTreeMap<u8, (Workers, LinkCounters)>,
}

impl Before {
    fn read(lab: &Lab) -> Result<Self> {
        let nodes = lab.ripstop_nodes().map(|node| {
            let standby = node.standby_counters()?;
            Ok((node.index(), (quiet(lab, node)?, standby)))
        });
        Ok(Self {
            kernel: kernel_counters(lab)?,
            nodes: nodes.collect::<Result<_>>()?,
        })
    }

    /// The workers carried exactly these packets (or at least these), the standby none, and nothing was refused or
    /// damaged on the way.
    fn check(&self, lab: &Lab, sent: &Sent, exactly: bool) -> Result<()> {
        for node in lab.ripstop_nodes() {
            let (before, standby_before) =
                self.nodes.get(&node.index()).context("was read before")?;
            let (after, standby) = (quiet(lab, node)?, node.standby_counters()?);
            let grown = |counter| after.total(counter) - before.total(counter);
            let redirected =
                xdp(&after, XdpCounter::Redirected) - xdp(before, XdpCounter::Redirected);
            for (what, packets, expected) in [
                (
                    "received from pods",
                    grown(Counter::HostRxPackets),
                    sent.by(node.index()),
                ),
                (
                    "sent to other nodes",
                    grown(Counter::NicTxPackets),
                    sent.by(node.index()),
                ),
                (
                    "received from other nodes",
                    grown(Counter::NicRxPackets),
                    sent.to(node.index()),
                ),
                (
                    "delivered to pods",
                    grown(Counter::HostTxPackets),
                    sent.to(node.index()),
                ),
                (
                    "redirected by the XDP program",
                    redirected,
                    sent.to(node.index()),
                ),
            ] {
                let right = if exactly {
                    packets == expected
                } else {
                    packets >= expected
                };
                let bound = if exactly { "exactly" } else { "at least" };
                assert!(
                    right,
                    "{}: {packets} packets {what}, {bound} {expected} were sent",
                    node.name()
                );
            }
            assert_eq!(
                refused_since(&after, before),
                BTreeMap::new(),
                "refused by {}",
                node.name()
            );
            let packets = |link: &LinkCounters| (link.rx_packets, link.tx_packets);
            assert_eq!(
                packets(&standby),
                packets(standby_before),
                "packets that the standby of {} received and sent",
                node.name()
            );
            check_conservation(node.name(), &after)?;
        }
        check_no_damage(lab, &self.kernel)
    }
}

#[test]
fn icmp_and_udp_arrive_byte_for_byte_and_every_packet_is_accounted_for() -> Result<()> {
    mixed_lab(|lab| {
        let (before, mut sent) = (Before::read(lab)?, Sent::default());
        let mtu = lab.pod_mtu();
        let full = udp_payload_max(mtu);
        let sizes = [0, 1, 17, 64, 511, 1000, full - 1, full];
        assert_eq!(lab.pod_pairs().len(), 6);
        for (from, to) in lab.pod_pairs() {
            let name = format!("{} to {}", from.name(), to.name());
            for ping in [
                Ping::new(from, to),
                Ping::new(from, to).payload_bytes(0),
                Ping::new(from, to).dont_fragment(),
                Ping::new(from, to).full(mtu),
            ] {
                let report = ping.count(5).run()?;
                assert_eq!((report.received, &report.failed), (5, &vec![]), "{name}");
                assert_eq!(report.ttl, Some(62), "two routers between pods, {name}");
            }
            sent.both_ways(from.node(), to.node(), 4 * 5);
            let echo = udp_echo(from, to, &sizes)?;
            assert_eq!(
                (echo.received, &echo.failed),
                (sizes.len(), &vec![]),
                "{name}"
            );
            sent.both_ways(from.node(), to.node(), sizes.len().try_into()?);
        }
        before.check(lab, &sent, true)
    })
}

#[test]
fn tcp_streams_arrive_byte_for_byte() -> Result<()> {
    mixed_lab(|lab| {
        let (before, mut sent) = (Before::read(lab)?, Sent::default());
        const BYTES: u64 = 2_000_003;
        for (from, to) in lab.pod_pairs() {
            tcp_transfer(from, to, BYTES)?;
            // Timestamps are in every segment: 20 bytes IPv4, 32 bytes TCP.
            sent.both_ways(
                from.node(),
                to.node(),
                BYTES / u64::from(lab.pod_mtu() - 52),
            );
        }
        before.check(lab, &sent, false)
    })
}

#[test]
fn large_datagrams_arrive_in_fragments() -> Result<()> {
    mixed_lab(|lab| {
        let (before, mut sent) = (Before::read(lab)?, Sent::default());
        // Data of a fragment comes in units of 8 bytes.
        let fragment = (u64::from(lab.pod_mtu()) - 20) / 8 * 8;
        let sizes = [udp_payload_max(lab.pod_mtu()) + 1, 4000, 20_000, 65_507];
        let rounds = 10;
        for (from, to) in lab.pod_pairs() {
            let datagrams = u64::try_from(sizes.len())? * rounds;
            let report = UdpFlow::new(from, to)
                .payload_sizes(&sizes)
                .rate(200)
                .count(datagrams)
                .run()?;
            assert!(
                report.is_perfect(),
                "{} to {}: {report}",
                from.name(),
                to.name()
            );
            assert_eq!(report.received, datagrams);
            for size in sizes {
                let fragments = (u64::try_from(size)? + 8).div_ceil(fragment);
                sent.one_way(from.node(), to.node(), rounds * fragments);
            }
        }
        before.check(lab, &sent, true)
    })
}

/// A node speaks for itself with the network address of its lease, and can be reached there.
#[test]
fn nodes_and_pods_of_other_nodes_talk() -> Result<()> {
    mixed_lab(|lab| {
        let (before, mut sent) = (Before::read(lab)?, Sent::default());
        let mtu = lab.pod_mtu();
        for (near, far) in lab.pod_pairs() {
            let capture = Capture::start_filtered(far, "eth0", 100, |frame| {
                frame.direction == Direction::In && is_echo_request(&frame.bytes)
            })?;
            let node = lab.node(near.node());
            for ping in [Ping::new(node, far), Ping::new(node, far).full(mtu)] {
                let report = ping.count(3).run()?;
                assert_eq!(
                    (report.received, &report.failed),
                    (3, &vec![]),
                    "{} to {}",
                    node.name(),
                    far.name()
                );
            }
            capture.wait_for(6, PATIENCE)?;
            for frame in capture.stop().frames {
                let source = &frame.bytes[26..30];
                assert_eq!(
                    source,
                    address::subnet(near.node()).octets(),
                    "source of {}'s own packets",
                    node.name()
                );
            }
            let own = address::subnet(far.node());
            for ping in [
                Ping::to_address(near, own),
                Ping::to_address(near, own).full(mtu),
            ] {
                let report = ping.count(3).run()?;
                assert_eq!(
                    (report.received, &report.failed),
                    (3, &vec![]),
                    "{} to {own}",
                    near.name()
                );
                assert_eq!(report.ttl, Some(63), "one router between a pod and a node");
            }
            let report = Ping::to_address(node, own).run()?;
            assert_eq!(
                (report.received, &report.failed),
                (1, &vec![]),
                "{} to {own}",
                node.name()
            );
            sent.both_ways(near.node(), far.node(), 6 + 6 + 1);
        }
        before.check(lab, &sent, true)
    })
}

fn is_echo_request(frame: &[u8]) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 8
}

/// The operator sees the same as the tests.
#[test]
fn the_command_line_reports_the_worker_path() -> Result<()> {
    mixed_lab(|lab| {
        assert_eq!(
            Ping::new(lab.pod(1, 0), lab.pod(3, 0))
                .count(4)
                .run()?
                .received,
            4
        );
        for node in lab.ripstop_nodes() {
            let stats = quiet(lab, node)?;
            let status = node.ripstop(&["status", "--json", "--interval", "0"])?;
            assert_eq!(status["ok"], json!(true), "{status:#}");
            assert_eq!(status["path"]["inUse"], json!("workers"), "{status:#}");
            assert_eq!(status["path"]["peerFilter"], json!(true), "{status:#}");
            assert_eq!(
                (&status["fib"]["peers"], &status["fib"]["resolved"]),
                (&json!(2), &json!(2)),
                "{status:#}"
            );
            let worker = &status["dataPlane"]["workers"][0];
            assert_eq!(
                worker["encapsulated"]["packets"],
                json!(stats.total(Counter::NicTxPackets)),
                "{status:#}"
            );
            assert_eq!(
                worker["decapsulated"]["packets"],
                json!(stats.total(Counter::HostTxPackets)),
                "{status:#}"
            );
        }
        Ok(())
    })
}
