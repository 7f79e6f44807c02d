//! What can happen to a real NIC, under traffic: in a guest of the VM lab (`make test-vm`), whose two NICs are joined by a wire.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ 2 workers ─ 2 of 4 queues ══ wire ══ NIC ─ fabric ─ n2 flannel.1 ─ n2p0
//!                                   queues come and go; the link goes down; driver or NIC go away
//! ```
//!
//! Nobody may lose a packet's frame, nor turn for ever over a NIC that is not there.

#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use core::time::Duration;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use ripstop_fib::map::monotonic_ns;
use ripstop_fib::stats::Counter;
use ripstop_perf::{Host, Lab, Node, TrafficGroup, UdpFlow, wait_until};
use serde_json::{Value, json};
use vm::{BusDevice, Monitor, NEAR_DEVICE, PATIENCE};

const WORKERS: u16 = 2;
const QUEUES: u16 = 4;
/// Packets a second each way, of which a guest may carry fewer.
const RATE: u64 = 200;
/// So many more mean that traffic flows.
const FLOWS: u64 = 50;
/// How long the data plane is watched while nothing can pass: it looks at its NICs every second.
const WATCH: Duration = Duration::from_secs(3);

/// A Ripstop node on the real NIC and a plain Linux node; their pods send each other datagrams all the time.
fn under_traffic(test: impl FnOnce(&Lab, &BusDevice, &TrafficGroup) -> Result<()>) -> Result<()> {
    under_traffic_with(json!({}), test)
}

/// The same with keys of the data plane's configuration.
fn under_traffic_with(
    keys: Value,
    test: impl FnOnce(&Lab, &BusDevice, &TrafficGroup) -> Result<()>,
) -> Result<()> {
    let device = BusDevice::of_near()?;
    Lab::builder()
        .ripstop(1)
        .linux(1)
        .queues(WORKERS)
        .dataplane_config(keys)
        .run(|lab| {
            vm::plug_in(lab, lab.node(1), WORKERS)?;
            lab.start_ripstop()?;
            vm::reaches_the_switch(lab.node(1))?;
            let flow = |from, to| UdpFlow::new(from, to).flows(16).rate(RATE).start();
            let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
            let traffic = TrafficGroup::new(vec![flow(one, other)?, flow(other, one)?]);
            workers_carry(lab.node(1), &traffic)?;
            test(lab, &device, &traffic)?;
            for report in traffic.stop() {
                println!("{report}");
                ensure!(report.corrupt + report.foreign == 0, "{report}");
            }
            if lab.node(1).dataplane_is_running() {
                check_books(lab)?;
            }
            Ok(())
        })
}

/// Traffic flows both ways, whoever carries it.
fn flows(traffic: &TrafficGroup) -> Result<()> {
    for member in traffic.members() {
        let before = member.snapshot().received;
        wait_until("traffic flows", PATIENCE, || {
            member.snapshot().received > before + FLOWS
        })?;
    }
    Ok(())
}

/// Traffic flows both ways, and through the workers.
fn workers_carry(node: &Node, traffic: &TrafficGroup) -> Result<()> {
    let carried = || -> Result<[u64; 2]> {
        let workers = node.workers()?;
        Ok([Counter::NicTxPackets, Counter::NicRxPackets].map(|counter| workers.total(counter)))
    };
    let before = carried()?;
    flows(traffic)?;
    wait_until("the workers carry it", PATIENCE, || {
        carried().is_ok_and(|now| now[0] > before[0] + FLOWS && now[1] > before[1] + FLOWS)
    })
}

/// No packet and no frame is lost inside.
fn check_books(lab: &Lab) -> Result<()> {
    let node = lab.node(1);
    common::check_conservation(node.name(), &common::quiet(lab, node)?)
}

fn link_is_up(node: &Node) -> bool {
    let link = node.output(&["ip", "-j", "link", "show", "dev", "eth0"]);
    let link: Value = serde_json::from_str(&link.unwrap_or_default()).unwrap_or_default();
    let flags = link[0]["flags"].as_array();
    flags.is_some_and(|flags| flags.contains(&json!("LOWER_UP")))
}

/// The process ends by itself, says why, and leaves nothing behind that leads packets astray.
fn ends_and_says_why(node: &Node) -> Result<()> {
    wait_until("the data plane ends", PATIENCE, || {
        !node.dataplane_is_running()
    })?;
    let log = node.dataplane_log();
    println!("{}", log.lines().last().unwrap_or_default());
    ensure!(
        log.contains("eth0") && log.contains("the kernel's own tunnel path carries the traffic"),
        "the log does not say why it has ended: {log}"
    );
    ensure!(!log.contains("panicked"), "{log}");
    let links = node.output(&["ip", "-o", "link"])?;
    ensure!(
        !links.contains("rip0"),
        "the host door is left over: {links}"
    );
    wait_until("nothing leads to workers", PATIENCE, || {
        node.detour().is_ok_and(|routes| routes.is_empty())
    })
}

/// The kernel takes no queue from a socket (net/ethtool/channels.c), and virtio_net changes none while a program is attached.
#[test]
fn a_worker_keeps_its_queue_and_more_may_come() -> Result<()> {
    queues_come_under_workers(json!({}))
}

/// igb makes its receive routines anew with its queues, and a socket remembers the one that it polls for ever.
#[test]
fn a_worker_that_polls_its_nic_keeps_its_queue_too() -> Result<()> {
    queues_come_under_workers(json!({ "busyPoll": { "microseconds": 20, "budget": 64 } }))
}

fn queues_come_under_workers(keys: Value) -> Result<()> {
    under_traffic_with(keys, |lab, device, traffic| {
        let node = lab.node(1);
        ensure!(
            vm::set_channels(node, WORKERS - 1).is_err(),
            "the kernel has taken a queue from a bound socket"
        );
        workers_carry(node, traffic).context("after a refused change")?;
        match vm::set_channels(node, QUEUES) {
            Ok(()) => {
                wait_until("the data plane has noticed", PATIENCE, || {
                    node.dataplane_log()
                        .contains("the NIC's queues have changed")
                })?;
                flows(traffic).context("with queues that have no worker")?;
                // Both nodes have one address each, by which igb chooses one queue: it may be one without a worker.
                // To a virtio NIC the tap gives each flow's packets by the queue that sends it.
                if !device.driver()?.ends_with("virtio_net") {
                    vm::command(node, &format!("ethtool -X eth0 equal {WORKERS}"))?;
                }
            }
            Err(error) => println!("this driver has no more queues to give: {error:#}"),
        }
        workers_carry(node, traffic).context("at the end")
    })
}

#[test]
fn a_link_that_comes_back_is_used_again() -> Result<()> {
    under_traffic(|lab, _device, traffic| {
        let node = lab.node(1);
        let mut monitor = Monitor::open()?;
        let mut set_link = |up: bool| -> Result<()> {
            monitor.execute("set_link", &json!({ "name": NEAR_DEVICE, "up": up }))?;
            wait_until("the NIC has noticed", PATIENCE, || link_is_up(node) == up)
        };
        set_link(false)?;
        let until = monotonic_ns() + u64::try_from(WATCH.as_nanos())?;
        wait_until("the workers go on without a link", PATIENCE, || {
            node.workers().is_ok_and(|workers| {
                workers
                    .workers
                    .iter()
                    .all(|worker| worker.heartbeat_ns > until)
            })
        })?;
        ensure!(node.dataplane_is_running(), "{}", node.dataplane_log());
        set_link(true)?;
        vm::reaches_the_switch(node)?;
        workers_carry(node, traffic)
    })
}

#[test]
fn an_unbound_driver_ends_the_process_and_a_bound_one_is_used_again() -> Result<()> {
    let driver = BusDevice::of_near()?.driver()?;
    if driver.ends_with("virtio_net") {
        return vm::not_run(
            "unbound under traffic, virtio_net waits for ever for two references to the NIC, also after the data plane has ended (6.12, 7.3)",
        );
    }
    under_traffic(|lab, device, traffic| {
        let node = lab.node(1);
        // Returns when nobody has the NIC any more, which is for the data plane to see to.
        let (sender, free) = mpsc::channel();
        thread::spawn({
            let (device, driver) = (device.clone(), driver.clone());
            move || sender.send(device.set_bound(&driver, false))
        });
        ends_and_says_why(node)?;
        free.recv_timeout(PATIENCE)
            .context("the kernel still waits for somebody who holds the NIC")??;
        device.set_bound(&driver, true)?;
        vm::plug_in_near(lab, node, WORKERS)?;
        flows(traffic).context("through the kernel, without workers")?;
        node.start_dataplane()?;
        node.wait_for_detour(1)?;
        workers_carry(node, traffic).context("through the NIC that is back")
    })
}

/// Comes last by its name: the guest has no near NIC afterwards.
#[test]
fn an_unplugged_nic_ends_the_process() -> Result<()> {
    under_traffic(|lab, _device, _traffic| {
        let id = json!({ "id": NEAR_DEVICE });
        Monitor::open()?.execute("device_del", &id)?;
        ends_and_says_why(lab.node(1))
    })
}
