//! Every packet and every frame is accounted for, after all that can happen to a node: as root, for real.
//!
//! ```text
//!   fabric ─► XDP program ─► socket ─► worker ─► rip0 ─► pods
//!          = redirected    = received + lost by the kernel, which says so
//!            + passed to                = transmitted + dropped, each for a reason
//!            the kernel                 frames: all there, none in anybody's hands
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod attacks;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::time::Duration;
use std::thread;

use anyhow::{Result, bail, ensure};
use attacks::{Guns, PEER, VICTIM};
use common::{PATIENCE, check_conservation, quiet, settled};
use ripstop_fib::stats::{Counter, KernelCounter};
use ripstop_perf::{
    Fabric, Host, Lab, Lease, Leases, Node, TrafficHandle, UDP_PAYLOAD_MIN, UdpFlow, Workers,
    tcp_transfer, udp_payload_max, wait_until,
};
use serde_json::json;

const QUEUES: u16 = 2;

/// What a node's XDP programs have seen: by their own account, and by that of the fabric, which has sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    by_programs: u64,
    by_fabric: u64,
}

/// Reads both accounts at a moment when nothing arrives, so that they are of the same time.
fn seen(lab: &Lab, node: &Node) -> Result<Seen> {
    let port = Fabric::port(node.index());
    let sent = || Ok::<_, anyhow::Error>(lab.fabric().link_counters(&port)?.tx_packets);
    for _attempt in 0..20 {
        let before = sent()?;
        let (workers, probes) = settled(lab, node)?;
        let by_fabric = sent()?;
        if by_fabric == before + probes {
            let by_programs = workers.nics.iter().flat_map(|nic| nic.counters).sum();
            return Ok(Seen {
                by_programs,
                by_fabric,
            });
        }
    }
    bail!("{} never rests", node.name())
}

#[test]
fn no_packet_and_no_frame_is_lost_from_the_books() -> Result<()> {
    Lab::builder()
        .ripstop(2)
        .linux(1)
        .queues(QUEUES)
        .run(|lab| {
            let (victim, peer) = (lab.node(VICTIM), lab.node(PEER));
            shrink_rings(peer)?;
            lab.start_ripstop()?;
            let before = [seen(lab, victim)?, seen(lab, peer)?];
            mixed_load(lab)?;
            overrun(lab)?;
            for (node, before) in [victim, peer].into_iter().zip(before) {
                let workers = quiet(lab, node)?;
                check_conservation(node.name(), &workers)?;
                check_host_door(node, &workers)?;
                let after = seen(lab, node)?;
                let by_programs = after.by_programs - before.by_programs;
                let by_fabric = after.by_fabric - before.by_fabric;
                print_books(node, &workers, by_programs);
                assert_eq!(
                    by_programs,
                    by_fabric,
                    "frames that the XDP program of {} has seen",
                    node.name()
                );
            }
            let refused = victim.workers()?.drops();
            assert!(
                refused.len() > 10,
                "the attacks have left few traces: {refused:?}"
            );
            Ok(())
        })
}

/// Good traffic of every kind with all attacks in the midst of it, while the control plane is killed and the workers
/// change tables.
fn mixed_load(lab: &Lab) -> Result<()> {
    let sizes = [UDP_PAYLOAD_MIN, 64, 512, 4000];
    let load = |from, to| {
        UdpFlow::new(lab.pod(from, 0), lab.pod(to, 0))
            .flows(8)
            .payload_sizes(&sizes)
            .rate(2000)
            .start()
    };
    let loads = [load(3, VICTIM)?, load(VICTIM, 3)?];
    tcp_transfer(lab.pod(VICTIM, 0), lab.pod(PEER, 0), 3_000_000)?;
    tcp_transfer(lab.pod(3, 0), lab.pod(VICTIM, 0), 3_000_000)?;
    let guns = Guns::new(lab)?;
    for attack in attacks::attacks(lab)? {
        guns.fire(&attack)?;
    }
    restart_controlplane(lab.node(VICTIM))?;
    for report in loads.map(TrafficHandle::stop) {
        println!("{report}");
        // Fragments take other queues than whole packets, and may overtake them.
        let bad = report.lost + report.duplicated + report.corrupt + report.foreign;
        ensure!(report.received > 0 && bad == 0, "{report}");
    }
    Ok(())
}

/// Gives a node's workers rings that overflow soon.
fn shrink_rings(node: &Node) -> Result<()> {
    for queue in 0..QUEUES {
        let config = json!({
            "nic": "eth0",
            "queue": queue,
            "cpu": 0,
            "rings": { "rx": 128, "tx": 256, "fill": 256, "completion": 256 },
        });
        node.write_queue_config(queue, &config)?;
    }
    Ok(())
}

/// Kills the control plane and starts it again with one lease more.
fn restart_controlplane(node: &Node) -> Result<()> {
    let generation = node.workers()?.generation();
    node.kill_controlplane();
    let mut leases = Leases::default();
    leases.leases.extend([1, 2, 3, 9].map(Lease::of_node));
    node.write_leases(&leases)?;
    node.start_controlplane()?;
    wait_until("the workers have the new table", PATIENCE, || {
        node.workers()
            .is_ok_and(|workers| workers.generation() > generation)
    })
}

/// Stops the workers of one node for so long that the kernel's rings overflow, which its control plane does not notice
/// yet. Each packet that does not arrive is in somebody's books: it found a ring or a queue full.
fn overrun(lab: &Lab) -> Result<()> {
    const STOP: Duration = Duration::from_millis(700);
    let stopped = lab.node(PEER);
    let before = lost_on_the_way(lab)?;
    let sizes = [UDP_PAYLOAD_MIN, 64, 512, udp_payload_max(lab.pod_mtu())];
    let load = |from, to| {
        UdpFlow::new(lab.pod(from, 0), lab.pod(to, 0))
            .flows(8)
            .payload_sizes(&sizes)
            .rate(2000)
            .start()
    };
    let loads = [load(VICTIM, PEER)?, load(PEER, VICTIM)?, load(PEER, 3)?];
    wait_until("traffic flows", PATIENCE, || {
        loads.iter().all(|load| load.snapshot().received > 100)
    })?;
    stopped.signal_dataplane(libc::SIGSTOP)?;
    thread::sleep(STOP);
    stopped.signal_dataplane(libc::SIGCONT)?;
    let resumed = loads[0].snapshot().received;
    wait_until("traffic flows again", PATIENCE, || {
        loads[0].snapshot().received > resumed + 100
    })?;
    let mut missing = 0;
    for report in loads.map(TrafficHandle::stop) {
        println!("{report}");
        missing += report.lost;
        ensure!(
            report.corrupt + report.duplicated + report.foreign == 0,
            "{report}"
        );
    }
    let lost = lost_on_the_way(lab)? - before;
    assert!(
        lost > 0,
        "the stopped workers of {} have missed nothing",
        stopped.name()
    );
    assert_eq!(
        missing, lost,
        "packets that did not arrive, and those that the kernel counted lost"
    );
    Ok(())
}

/// Packets that the kernel of any Ripstop node had to drop, in front of the workers' rings or of the host door.
fn lost_on_the_way(lab: &Lab) -> Result<u64> {
    let of_node = |node: &Node| {
        let workers = quiet(lab, node)?;
        let in_rings = workers.kernel(KernelCounter::RxRingFull)
            + workers.kernel(KernelCounter::RxDropped)
            + workers.kernel(KernelCounter::HostDropped);
        Ok::<_, anyhow::Error>(in_rings + node.link_counters("rip0")?.tx_dropped)
    };
    lab.ripstop_nodes().map(of_node).sum()
}

/// The kernel has counted the same packets at the host door, each super-packet as one.
fn check_host_door(node: &Node, workers: &Workers) -> Result<()> {
    let door = node.link_counters("rip0")?;
    let name = node.name();
    let total = |counter| workers.total(counter);
    assert_eq!(
        total(Counter::HostRxPackets) - total(Counter::HostRxCutPackets)
            + total(Counter::HostRxSuperPackets),
        door.tx_packets,
        "packets from rip0 of {name}"
    );
    assert_eq!(
        total(Counter::HostTxPackets) - total(Counter::HostTxJoinedPackets)
            + total(Counter::HostTxSuperPackets),
        door.rx_packets,
        "packets into rip0 of {name}"
    );
    Ok(())
}

fn print_books(node: &Node, workers: &Workers, seen: u64) {
    let total = |counter| workers.total(counter);
    println!(
        "{}: {seen} frames seen by XDP; from the NIC {}, from pods {}; to pods {}, to the NIC {}; dropped {:?}; \
         lost by the kernel: {} for want of memory, {} as the ring was full",
        node.name(),
        total(Counter::NicRxPackets),
        total(Counter::HostRxPackets),
        total(Counter::HostTxPackets),
        total(Counter::NicTxPackets),
        workers.drops(),
        workers.kernel(KernelCounter::RxDropped),
        workers.kernel(KernelCounter::RxRingFull),
    );
}
