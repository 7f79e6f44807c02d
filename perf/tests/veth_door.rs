//! The veth host door in a whole lab: it carries everything, and it fails open: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ══ far ─ worker ═══ fabric ═══ worker ─ far ══ rip0 ─ n2 ─ n2p0
//!           └── flannel.1 ═════════════╝   ╚═══ n3 (plain Linux) ─ n3p0
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use anyhow::{Result, ensure};
use cells::Cell;
use common::PATIENCE;
use ripstop_fib::stats::{Door, KernelCounter};
use ripstop_perf::{
    Backend, Fabric, Families, Family, Host, Lab, LabBuilder, Node, TrafficHandle, UdpFlow,
    machine, wait_until,
};
use serde_json::json;

fn lab() -> LabBuilder {
    Lab::builder()
        .ripstop(2)
        .dataplane_config(json!({ "hostDoor": { "kind": "veth" } }))
}

/// Every kind of traffic between two nodes.
fn talk(lab: &Lab, family: Family, pair: [u8; 2]) -> Result<()> {
    for cell in Cell::ALL {
        cell.check(lab, family, pair[0], pair[1])?;
    }
    Ok(())
}

/// The same at a veth door, where the kernel also counts what the door's socket had no room for.
fn check_books(lab: &Lab, node: &Node) -> Result<()> {
    let dropped = common::check_books(lab, node)?.kernel(KernelCounter::HostDropped);
    assert_eq!(dropped, 0, "{} and its rip0", node.name());
    Ok(())
}

#[test]
fn it_carries_everything_over_both_families() -> Result<()> {
    let _machine = machine();
    lab()
        .linux(1)
        .queues(2)
        .families(Families::Dual)
        .run(|lab| {
            lab.start_ripstop()?;
            for node in lab.ripstop_nodes() {
                let workers = node.workers()?.workers;
                assert!(
                    workers
                        .iter()
                        .all(|worker| worker.identity.door == Door::Veth)
                );
                let status = node.ripstop(&["status", "--json", "--interval", "0"])?;
                let shown = &status["dataPlane"]["workers"][0]["hostDoor"];
                assert_eq!(shown, &json!("veth"), "{status:#}");
            }
            let standby = |node: &Node| Ok::<_, anyhow::Error>(node.standby_counters()?.tx_packets);
            let before = [standby(lab.node(1))?, standby(lab.node(2))?];
            for family in [Family::Ipv4, Family::Ipv6] {
                talk(lab, family, [1, 2])?;
                talk(lab, family, [1, 3])?;
            }
            for (node, before) in lab.ripstop_nodes().zip(before) {
                check_books(lab, node)?;
                assert_eq!(standby(node)?, before, "{}'s standby", node.name());
            }
            Ok(())
        })
}

#[test]
fn it_carries_every_backend() -> Result<()> {
    let _machine = machine();
    for backend in [Backend::Ipip, Backend::Udp, Backend::HostGw] {
        lab().backend(backend).run(|lab| {
            lab.start_ripstop()?;
            talk(lab, Family::Ipv4, [1, 2])?;
            lab.ripstop_nodes()
                .try_for_each(|node| check_books(lab, node))
        })?;
    }
    Ok(())
}

/// What has to be so for the kernel to carry the traffic: no door, no routes through it.
fn fallen_back(node: &Node) -> bool {
    let links = node.output(&["ip", "-br", "link"]);
    links.is_ok_and(|links| !links.contains("rip0"))
        && node.detour().is_ok_and(|way| way.is_empty())
}

#[test]
fn it_goes_with_its_process_and_comes_back() -> Result<()> {
    let _machine = machine();
    lab().run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(1);
        let flow = |from, to| {
            UdpFlow::new(lab.pod(from, 0), lab.pod(to, 0))
                .flows(4)
                .rate(2000)
                .start()
        };
        let flows = [flow(1, 2)?, flow(2, 1)?];
        let received = |more: u64| {
            let before = flows.each_ref().map(|flow| flow.snapshot().received);
            wait_until("traffic flows", PATIENCE, || {
                let now = flows.each_ref().map(|flow| flow.snapshot().received);
                now.iter()
                    .zip(before)
                    .all(|(now, before)| *now > before + more)
            })
        };
        received(200)?;
        for end in [libc::SIGKILL, libc::SIGTERM] {
            let standby = node.standby_counters()?;
            node.signal_dataplane(end)?;
            wait_until("the data plane has ended", PATIENCE, || {
                !node.dataplane_is_running()
            })?;
            wait_until("the kernel has taken over", PATIENCE, || fallen_back(node))?;
            received(1000)?;
            let now = node.standby_counters()?;
            assert!(now.tx_packets > standby.tx_packets + 500, "{now:?}");
            assert!(now.rx_packets > standby.rx_packets + 500, "{now:?}");
            node.start_dataplane()?;
            node.wait_for_detour(1)?;
            received(200)?;
        }
        // The one that died at once lost what was inside; the one that was told to stop lost nothing, which `kill.rs`
        // measures.
        let held = node.held_max()?;
        for report in flows.map(TrafficHandle::stop) {
            let bad = report.duplicated + report.corrupt + report.foreign;
            ensure!(bad == 0 && report.lost <= held, "{report}");
        }
        // The kinds change places on one node, which needs the name.
        for kind in ["tun", "veth"] {
            let config =
                json!({ "nic": "eth0", "queue": 0, "cpu": 0, "hostDoor": { "kind": kind } });
            node.write_queue_config(0, &config)?;
            node.signal_dataplane(libc::SIGTERM)?;
            wait_until("the data plane has ended", PATIENCE, || {
                !node.dataplane_is_running()
            })?;
            node.start_dataplane()?;
            node.wait_for_detour(1)?;
            assert_eq!(node.workers()?.workers[0].identity.door.name(), kind);
            talk(lab, Family::Ipv4, [1, 2])?;
        }
        Ok(())
    })
}

/// Live frames are as good as the socket's: large bursts go that way, and where the peer would drop them none does.
#[test]
fn live_frames_carry_what_the_socket_does() -> Result<()> {
    let _machine = machine();
    let keys = json!({
        "transmit": "inject",
        "hostDoor": { "kind": "veth", "transmit": "inject" },
    });
    lab().dataplane_config(keys).run(|lab| {
        // The fabric's port to n1 takes frames, that to n2 does not.
        let port = Fabric::port(1);
        lab.fabric()
            .output(&["ethtool", "-K", &port, "gro", "on"])?;
        lab.start_ripstop()?;
        let kinds = |node: &Node| {
            let status = node.ripstop(&["status", "--json", "--interval", "0"])?;
            let worker = &status["dataPlane"]["workers"][0];
            Ok::<_, anyhow::Error>([worker["transmit"].clone(), worker["doorTransmit"].clone()])
        };
        assert_eq!(kinds(lab.node(1))?, [json!("inject"), json!("inject")]);
        assert_eq!(kinds(lab.node(2))?, [json!("af-xdp"), json!("inject")]);
        let log = lab.node(2).dataplane_log();
        assert!(log.contains("takes no frames"), "{log}");
        talk(lab, Family::Ipv4, [1, 2])?;
        let flow = |from, to| {
            UdpFlow::new(lab.pod(from, 0), lab.pod(to, 0))
                .flows(4)
                .rate(20_000)
                .start()
        };
        let flows = [flow(1, 2)?, flow(2, 1)?];
        let received = |enough: u64| {
            wait_until("traffic flows", PATIENCE, || {
                flows.iter().all(|flow| flow.snapshot().received > enough)
            })
        };
        received(10_000)?;
        // Somebody switches it off: the socket sends, a second later at most.
        lab.fabric()
            .output(&["ethtool", "-K", &port, "gro", "off"])?;
        wait_until("the worker has noticed", PATIENCE, || {
            lab.node(1)
                .dataplane_log()
                .contains("takes no live frames any more")
        })?;
        received(flows[0].snapshot().received + 10_000)?;
        for report in flows.map(TrafficHandle::stop) {
            let bad = report.duplicated + report.corrupt + report.foreign;
            ensure!(bad == 0 && report.reordered == 0, "{report}");
        }
        lab.ripstop_nodes()
            .try_for_each(|node| check_books(lab, node))
    })
}

#[test]
fn two_labs_do_not_meet() -> Result<()> {
    let _machine = machine();
    lab().run(|one| {
        one.start_ripstop()?;
        lab().run(|other| {
            other.start_ripstop()?;
            talk(one, Family::Ipv4, [1, 2])?;
            talk(other, Family::Ipv4, [1, 2])?;
            other.node(1).kill_dataplane();
            wait_until("the kernel has taken over", PATIENCE, || {
                fallen_back(other.node(1))
            })?;
            talk(one, Family::Ipv4, [1, 2])?;
            one.ripstop_nodes()
                .try_for_each(|node| check_books(one, node))
        })
    })
}
