//! Six workers share a core politely: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ workers q0 q1 q2 q3 q4 q5, all on CPU 0 ═══ the same on n2 ─ n2p0
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::time::Duration;
use std::fs;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use common::{ECHO_REPLY, check_conservation, check_no_damage, kernel_counters, quiet, xdp};
use ripstop_fib::stats::{Counter, Polling, XdpCounter};
use ripstop_perf::{
    Fabric, Host, Injector, Inner, Ipv4, Lab, Node, UDP_PAYLOAD_MIN, UdpFlow, Workers, machine,
    tcp_transfer, udp_payload_max,
};
use serde_json::json;

const QUEUES: u16 = 6;
/// So many flows leave one of the queues of rip0 out, on either node, once in 10^11 runs; with 96 it is once in 10^6.
const FLOWS: u16 = 160;
/// How long idle workers are watched.
const IDLE: Duration = Duration::from_secs(2);
/// How long a crowded machine has been so.
const CROWDED: Duration = Duration::from_secs(3);
/// The part of a core, in percent, that six idle workers and their watcher may take together.
const IDLE_PERCENT_MAX: u64 = 20;

#[test]
fn six_workers_on_one_core_sleep_when_idle_and_all_carry_traffic() -> Result<()> {
    let config = json!({
        "cpu": 0,
        "polling": "adaptive",
        "rings": { "rx": 512, "tx": 512, "fill": 1024, "completion": 512 },
    });
    let lab = Lab::builder()
        .ripstop(2)
        .queues(QUEUES)
        .dataplane_config(config);
    let _machine = machine();
    lab.run(|lab| {
        lab.start_ripstop()?;
        let damage = kernel_counters(lab)?;
        check_idle(lab)?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        let sizes = [UDP_PAYLOAD_MIN, 300, udp_payload_max(lab.pod_mtu())];
        let flow = |from, to| {
            UdpFlow::new(from, to)
                .flows(FLOWS)
                .payload_sizes(&sizes)
                .rate(4000)
                .count(8000)
                .start()
        };
        let flows = [flow(one, other)?, flow(other, one)?];
        tcp_transfer(one, other, 2_000_000)?;
        for flow in flows {
            let report = flow.wait();
            println!("{report}");
            assert!(report.is_perfect(), "{report}");
        }
        for (from, to) in [(1, 2), (2, 1)] {
            send_to_queues(lab, from, to)?;
        }
        for node in lab.nodes() {
            check_every_worker(lab, node)?;
        }
        check_no_damage(lab, &damage)
    })
}

/// Whoever says that the workers move gets to say it where others of the workers' own priority fill every core.
#[test]
fn workers_are_not_taken_for_stuck_on_a_crowded_machine() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let cpus = thread::available_parallelism()?.get();
        let mut crowd = Vec::new();
        for cpu in (0..cpus).cycle().take(2 * cpus) {
            // It ends by itself, if later.
            let spin = "i=0; while [ $i -lt 30000000 ]; do i=$((i+1)); done";
            let mut spinner = Command::new("taskset");
            spinner.args([
                "-c",
                &cpu.to_string(),
                "nice",
                "-n",
                "-15",
                "sh",
                "-c",
                spin,
            ]);
            crowd.push(spinner.spawn()?);
        }
        // Three times as long as XDP believes what it was told.
        thread::sleep(CROWDED);
        let outcome = send_to_queues(lab, 1, 2);
        for mut spinner in crowd {
            spinner.kill()?;
            spinner.wait()?;
        }
        outcome?;
        let workers = quiet(lab, lab.node(2))?;
        let counts = [XdpCounter::Redirected, XdpCounter::Stalled];
        let [redirected, stalled] = counts.map(|counter| xdp(&workers, counter));
        println!("{redirected} packets for the worker, {stalled} left to the kernel");
        assert!(redirected >= 300 && stalled == 0, "{workers:#?}");
        Ok(())
    })
}

/// Each worker sleeps again and again, and all of a node take next to nothing.
fn check_idle(lab: &Lab) -> Result<()> {
    let before: Vec<(Workers, u64)> = lab
        .nodes()
        .iter()
        .map(|node| Ok((quiet(lab, node)?, cpu_ticks(node)?)))
        .collect::<Result<_>>()?;
    thread::sleep(IDLE);
    for (node, (before, ticks)) in lab.nodes().iter().zip(before) {
        let (taken, after) = (cpu_ticks(node)? - ticks, node.workers()?);
        // The kernel counts a process's time in hundredths of a second, whatever its own tick is.
        let percent = taken * 100 / (IDLE.as_secs() * 100);
        println!(
            "{}: the idle data plane took {percent} % of a core",
            node.name()
        );
        assert!(
            percent < IDLE_PERCENT_MAX,
            "the idle data plane of {} took {percent} % of a core",
            node.name()
        );
        assert_eq!(after.workers.len(), usize::from(QUEUES));
        for (before, after) in before.workers.iter().zip(&after.workers) {
            let sleeps = after.counters.get(Counter::Sleeps) - before.counters.get(Counter::Sleeps);
            assert!(
                sleeps >= 5,
                "worker {} of {} slept {sleeps} times",
                after.identity.queue,
                node.name()
            );
            assert_eq!(
                (after.identity.cpu, after.identity.polling),
                (0, Polling::Adaptive)
            );
        }
    }
    Ok(())
}

/// User and system time of a node's data plane.
fn cpu_ticks(node: &Node) -> Result<u64> {
    let pid = node.dataplane_pid().context("the data plane has a pid")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a process name")?;
    let times = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>);
    times.sum::<Result<u64, _>>().with_context(|| stat.clone())
}

/// Sends a node tunnel packets of many flows, as a switch does, from which a NIC chooses the queue by the flow's hash.
///
/// The lab's fabric does so only with packets that did not come through a queue themselves. A veth keeps the number of
/// the queue that a packet was sent through in a field in which a bridge then reads it, less one, as that of the queue
/// it was received on: between six queues and six queues hardly anything ever arrives on the last.
fn send_to_queues(lab: &Lab, from: u8, to: u8) -> Result<()> {
    let injector = Injector::open(lab.fabric(), &Fabric::port(to))?;
    let mut frame = lab.tunnel_frame(from, to);
    if let Inner::Udp { ip, .. } = &frame.inner {
        frame.inner = Inner::Ipv4 {
            ip: Ipv4 {
                protocol: 1,
                ..ip.clone()
            },
            payload: ECHO_REPLY.to_vec(),
        };
    }
    for port in 0..300 {
        frame.udp.source = 40_000 + port;
        injector.send(&frame.encode())?;
    }
    Ok(())
}

/// Each queue has carried packets both ways, on CPU 0, and none has come to a queue without a worker.
fn check_every_worker(lab: &Lab, node: &Node) -> Result<()> {
    let workers = quiet(lab, node)?;
    for worker in &workers.workers {
        let count = |counter| worker.counters.get(counter);
        let (sent, received) = (count(Counter::NicTxPackets), count(Counter::HostTxPackets));
        println!(
            "{} queue {}: {sent} packets sent, {received} received",
            node.name(),
            worker.identity.queue
        );
        assert!(sent > 0 && received > 0, "an idle queue: {worker:#?}");
    }
    assert_eq!(xdp(&workers, XdpCounter::NoSocket), 0);
    check_conservation(node.name(), &workers)?;
    let pid = node.dataplane_pid().context("the data plane has a pid")?;
    let mut pinned = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        if status.starts_with("Name:\tworker-") {
            assert!(status.contains("\nCpus_allowed_list:\t0\n"), "{status}");
            pinned += 1;
        }
    }
    assert_eq!(pinned, QUEUES, "worker threads");
    Ok(())
}
