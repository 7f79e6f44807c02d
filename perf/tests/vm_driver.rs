//! The data plane on a real driver with several queues: in a guest of the VM lab (`make test-vm`), whose two NICs are joined by
//! a wire.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ 4 workers ─ 4 queues of the driver ══ wire ══ NIC ─ fabric ─ n2 flannel.1 ─ n2p0
//!          Ripstop                  (eth0)                                          plain Linux
//! ```
//!
//! Zero-copy came to virtio_net with Linux 6.14 and to igb in the same release: before it, the workers must take copy mode by
//! themselves, and say so.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use anyhow::{Result, ensure};
use ripstop_fib::stats::Counter;
use ripstop_perf::{Host, Lab, Ping, UDP_PAYLOAD_MIN, UdpFlow, Workers, udp_payload_max};
use serde_json::json;
use vm::Books;

const QUEUES: u16 = 4;

/// A Ripstop node on the real NIC and a plain Linux node.
fn on_the_driver(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::builder()
        .ripstop(1)
        .linux(1)
        .queues(QUEUES)
        .run(|lab| {
            vm::plug_in(lab, lab.node(1), QUEUES)?;
            lab.start_ripstop()?;
            vm::reaches_the_switch(lab.node(1))?;
            test(lab)
        })
}

/// What the driver of this kernel can do.
fn best_mode() -> Result<&'static str> {
    Ok(if vm::kernel()? >= (6, 14) {
        "zero-copy"
    } else {
        "copy"
    })
}

/// Packets that each worker got from the wire.
fn per_queue(workers: &Workers) -> Vec<u64> {
    let workers = workers.workers.iter();
    workers
        .map(|worker| worker.counters.get(Counter::NicRxPackets))
        .collect()
}

#[test]
fn workers_use_the_best_mode_of_the_driver_and_report_it() -> Result<()> {
    on_the_driver(|lab| {
        let status = lab
            .node(1)
            .ripstop(&["status", "--json", "--interval", "0"])?;
        let workers = status["dataPlane"]["workers"].as_array();
        let modes: Vec<_> = workers
            .into_iter()
            .flatten()
            .map(|worker| &worker["mode"])
            .collect();
        let driver = lab.node(1).netns().output(&["ethtool", "-i", "eth0"])?;
        println!("{}: {modes:?}", driver.lines().next().unwrap_or_default());
        let expected = json!(best_mode()?);
        assert_eq!(modes, [&expected; QUEUES as usize], "{status:#}");
        assert_eq!(status["path"]["inUse"], json!("workers"), "{status:#}");
        Ok(())
    })
}

#[test]
fn pods_talk_and_every_packet_and_frame_is_accounted_for() -> Result<()> {
    on_the_driver(|lab| {
        const PINGS: u16 = 5;
        const DATAGRAMS: u64 = 1600;
        let node = lab.node(1);
        let books = Books::open(lab)?;
        let full = udp_payload_max(lab.pod_mtu());
        for (from, to) in lab.pod_pairs() {
            for ping in [Ping::new(from, to), Ping::new(from, to).full(lab.pod_mtu())] {
                let report = ping.count(PINGS).run()?;
                ensure!(
                    (report.received, report.ttl) == (PINGS, Some(62)),
                    "{report:?}"
                );
            }
            let flow = UdpFlow::new(from, to).flows(16).rate(400).count(DATAGRAMS);
            let report = flow
                .payload_sizes(&[UDP_PAYLOAD_MIN, 64, 512, full])
                .run()?;
            println!("{report}");
            let bad = report.lost + report.duplicated + report.corrupt + report.foreign;
            ensure!(report.received == DATAGRAMS && bad == 0, "{report}");
        }
        // Two rounds of pings from here and two from there: each is a packet in and a packet out.
        let packets = DATAGRAMS + 4 * u64::from(PINGS);
        let by_standby = books.close(lab, |_node| (packets, packets))?;
        let queues = per_queue(&node.workers()?);
        println!("packets from the wire by queue: {queues:?}; on the standby: {by_standby}");
        ensure!(
            queues.iter().sum::<u64>() > 0,
            "the workers have carried nothing"
        );
        Ok(())
    })
}
