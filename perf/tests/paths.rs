//! Several ways to one peer: a flow keeps to one of them, and all are used. As root, for real.
//!
//! ```text
//!                    ┌─ router ─┐                              ┌─ eth0 ═ router ─┐
//!   n1 (Ripstop) ════╡          ╞═ n2 (plain)    n1 (Ripstop) ─┤                 ╞═ n2 (plain)
//!                    └─ router ─┘                              └─ eth1 ═ router ─┘
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use common::{PATIENCE, find};
use ripstop_fib::stats::Counter;
use ripstop_perf::{
    Backend, Capture, Direction, Ethernet, Fabric, Families, Family, Frame, Header, Injector, Lab,
    LabBuilder, Mac, Node, Ping, address, tcp_transfer_over, wait_until,
};

const HERE: u8 = 1;
const THERE: u8 = 2;
const FLOWS: u16 = 64;
const ROUNDS: usize = 4;
const MARKER: &[u8] = b"a path for each flow";

/// A way: the uplink's number, and the MAC address of the router behind it.
type Way = (u8, Mac);

/// Sends packets of many flows from the first pod, and finds out which way each has taken.
fn ways(lab: &Lab, family: Family, uplinks: u8) -> Result<BTreeMap<u16, BTreeSet<Way>>> {
    let captures = (0..uplinks)
        .map(|uplink| {
            let port = Fabric::uplink_port(HERE, uplink);
            let wanted = |frame: &ripstop_perf::CapturedFrame| {
                frame.direction == Direction::In && find(&frame.bytes, MARKER).is_some()
            };
            Ok((
                uplink,
                Capture::start_filtered(lab.fabric(), &port, 10_000, wanted)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let eth0 = Injector::open(lab.pod(HERE, 0), "eth0")?;
    for _round in 0..ROUNDS {
        for flow in 0..FLOWS {
            let mut frame = lab.pod_packet(HERE, THERE, family);
            frame.payload = MARKER.to_vec();
            for udp in frame.udps() {
                udp.source = 10_000 + flow;
            }
            let (pod, gateway) = (lab.pod(HERE, 0).mac(), address::gateway_mac(HERE));
            let ethernet = Ethernet::ip(family, pod, gateway);
            frame.headers.insert(0, Header::Ethernet(ethernet));
            eth0.send(&frame.encode())?;
        }
    }
    let sent = ROUNDS * usize::from(FLOWS);
    wait_until("all packets are on their way", PATIENCE, || {
        captures
            .iter()
            .map(|(_, capture)| capture.count())
            .sum::<usize>()
            >= sent
    })?;
    let mut ways: BTreeMap<u16, BTreeSet<Way>> = BTreeMap::new();
    for (uplink, capture) in captures {
        for frame in capture.stop().frames {
            let mut frame = Frame::parse(&frame.bytes)?;
            let router = frame
                .ethernets()
                .next()
                .map(|ethernet| ethernet.destination);
            let flow = frame.udps().last().map(|udp| udp.source);
            let (router, flow) = (router.context("no Ethernet")?, flow.context("no UDP")?);
            ways.entry(flow).or_default().insert((uplink, router));
        }
    }
    Ok(ways)
}

/// Each flow has kept to one way, and each way has got its part of the flows.
fn check(lab: &Lab, family: Family, expected: &[Way]) -> Result<()> {
    let uplinks = expected
        .iter()
        .map(|(uplink, _)| uplink + 1)
        .max()
        .unwrap_or(1);
    let ways = ways(lab, family, uplinks)?;
    assert_eq!(ways.len(), usize::from(FLOWS), "{family}: flows");
    let mut used: BTreeMap<Way, u32> = BTreeMap::new();
    for (flow, ways) in &ways {
        assert_eq!(ways.len(), 1, "{family}: ways of flow {flow}: {ways:?}");
        for way in ways {
            *used.entry(*way).or_default() += 1;
        }
    }
    let all: BTreeSet<&Way> = used.keys().collect();
    assert_eq!(all, expected.iter().collect(), "{family}: {used:?}");
    // Of 64 flows over two ways, fewer than 8 on one come once in 10^10 times.
    assert!(used.values().all(|flows| *flows >= 8), "{family}: {used:?}");
    Ok(())
}

/// A node that has several ways behind routers to a plain one.
fn lab(backend: Backend, families: Families) -> LabBuilder {
    Lab::builder()
        .ripstop(1)
        .linux(1)
        .segments(&[0, 1])
        .backend(backend)
        .families(families)
}

fn over_two_routers(backend: Backend, families: Families) -> Result<()> {
    lab(backend, families).routers(2).run(|lab| {
        lab.start_ripstop()?;
        let routers = [0, 1].map(|number| (0, address::router_mac(0, number)));
        for family in lab.families() {
            // The kernel asks for a router's MAC address only when something goes there.
            let ping = Ping::over(family, lab.pod(HERE, 0), lab.pod(THERE, 0)).run()?;
            assert_eq!(ping.failed, Vec::<String>::new(), "{family}");
            check(lab, family, &routers)?;
            tcp_transfer_over(family, lab.pod(HERE, 0), lab.pod(THERE, 0), 500_000)?;
        }
        Ok(())
    })
}

/// The instrument itself: plain nodes talk over several ways.
#[test]
fn plain_linux_nodes_talk_over_several_ways() -> Result<()> {
    for (routers, uplinks) in [(2, 1), (1, 2), (2, 2)] {
        let lab = Lab::builder().linux(2).segments(&[0, 1]);
        let lab = lab
            .families(Families::Dual)
            .routers(routers)
            .uplinks(uplinks);
        lab.run(|lab| {
            for family in lab.families() {
                tcp_transfer_over(family, lab.pod(HERE, 0), lab.pod(THERE, 0), 100_000)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn vxlan_uses_both_routers() -> Result<()> {
    over_two_routers(Backend::Vxlan, Families::Dual)
}

#[test]
fn ipip_uses_both_routers() -> Result<()> {
    over_two_routers(Backend::Ipip, Families::Ipv4)
}

#[test]
fn udp_uses_both_routers() -> Result<()> {
    over_two_routers(Backend::Udp, Families::Ipv4)
}

/// How many packets each worker of a node has received from its NIC.
fn received(node: &Node) -> Result<Vec<u64>> {
    let workers = node.workers()?.workers;
    Ok(workers
        .iter()
        .map(|worker| worker.counters.get(Counter::NicRxPackets))
        .collect())
}

#[test]
fn both_uplinks_are_used_each_way() -> Result<()> {
    lab(Backend::Vxlan, Families::Dual).uplinks(2).run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(HERE);
        let uplinks = [0, 1].map(|uplink| (uplink, address::router_mac(node.uplink(uplink).0, 0)));
        for family in lab.families() {
            check(lab, family, &uplinks)?;
            // The fabric spreads what comes back by its flow, so that it arrives on either. Where all connections so far
            // have drawn the same uplink, more of them are made.
            let before = received(node)?;
            let both = |now: &[u64]| {
                let grown = now.iter().zip(&before);
                now.len() == 2 && grown.into_iter().all(|(now, before)| *now > before + 5)
            };
            let mut connections = 0;
            while connections < FLOWS && !both(&received(node)?) {
                for _connection in 0..8 {
                    tcp_transfer_over(family, lab.pod(HERE, 0), lab.pod(THERE, 0), 50_000)?;
                }
                connections += 8;
            }
            wait_until("both uplinks have received", PATIENCE, || {
                received(node).is_ok_and(|now| both(&now))
            })?;
        }
        Ok(())
    })
}
