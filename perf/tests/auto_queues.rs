//! One template for all nodes: each makes its own workers of it, one per queue of its NIC, and pods talk.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ workers q0 q1 q2 ═══ workers q0 q1 q2 ─ rip0 ─ n2 ─ n2p0
//!           template.json, used as it is      written down first (--generate-configs), then used
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use common::{check_conservation, check_no_damage, kernel_counters, quiet};
use ripstop_fib::stats::{Counter, Polling};
use ripstop_perf::{Host, Lab, Node, UdpFlow, tcp_transfer};

const QUEUES: u16 = 3;
/// So many flows leave one of three queues out, on either node, once in 3 x 10^10 runs.
const FLOWS: u16 = 64;
/// Busy on purpose: on CPUs that have to be shared that must not be.
const TEMPLATE: &str = r#"{ "nic": "auto", "queues": "auto", "polling": "busy" }"#;

#[test]
fn every_queue_gets_a_worker_and_traffic_flows() -> Result<()> {
    Lab::builder()
        .name("auto")
        .ripstop(2)
        .queues(QUEUES)
        .run(|lab| {
            for node in lab.ripstop_nodes() {
                fs::remove_dir_all(node.config_dir()).context("the lab's own files")?;
                fs::create_dir(node.config_dir()).context("configuration directory")?;
                fs::write(node.config_dir().join("template.json"), TEMPLATE).context("template")?;
            }
            let (one, other) = (lab.node(1), lab.node(2));
            write_down(other)?;
            one.start_dataplane()?;
            other.start_dataplane()?;
            for node in lab.ripstop_nodes() {
                node.start_controlplane()?;
            }
            for node in lab.ripstop_nodes() {
                node.wait_for_detour(1)?;
            }
            let log = one.dataplane_log();
            for part in [
                "template.json: NIC eth0 (the default route's interface) has 3 receive queue(s)",
                "queues on CPUs",
            ] {
                assert!(log.contains(part), "{part:?} is not in {log}");
            }
            let damage = kernel_counters(lab)?;
            let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
            let flows = [(from, to), (to, from)].map(|(from, to)| {
                let flow = UdpFlow::new(from, to).flows(FLOWS);
                flow.rate(2000).count(6000).start()
            });
            tcp_transfer(from, to, 1_000_000)?;
            for flow in flows {
                let report = flow?.wait();
                println!("{report}");
                assert!(report.is_perfect(), "{report}");
            }
            for node in lab.ripstop_nodes() {
                check_workers(lab, node)?;
            }
            check_no_damage(lab, &damage)
        })
}

/// Has the node write down what the template comes to, and takes the template away.
fn write_down(node: &Node) -> Result<()> {
    let mut command = node.dataplane_command(&[])?;
    let written = node.dir().join("written");
    let output = command
        .args(["--iface", &node.address().to_string(), "--generate-configs"])
        .arg(&written)
        .output()
        .context("--generate-configs")?;
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{log}");
    assert!(log.contains("NIC eth0 (by --iface)"), "{log}");
    assert_eq!(fs::read_dir(&written)?.count(), usize::from(QUEUES));
    fs::remove_dir_all(node.config_dir())?;
    fs::rename(written, node.config_dir()).context("use what was written")
}

/// One worker for each queue, on CPUs that are allowed and evenly shared, and each has carried packets.
fn check_workers(lab: &Lab, node: &Node) -> Result<()> {
    let workers = quiet(lab, node)?;
    let mut load: BTreeMap<u32, u32> = BTreeMap::new();
    let mut queues = Vec::new();
    for worker in &workers.workers {
        *load.entry(worker.identity.cpu).or_default() += 1;
        queues.push(worker.identity.queue);
        let sent = worker.counters.get(Counter::NicTxPackets);
        println!("{} {:?}: {sent} packets sent", node.name(), worker.identity);
        assert!(sent > 0, "an idle queue: {worker:#?}");
    }
    assert_eq!(queues, [0, 1, 2]);
    let cpus = std::thread::available_parallelism()?.get();
    assert_eq!(load.len(), cpus.min(usize::from(QUEUES)), "{load:?}");
    let (least, most) = (load.values().min(), load.values().max());
    assert!(
        most.zip(least)
            .is_some_and(|(most, least)| most - least <= 1)
    );
    let sharing = |cpu| load.get(&cpu).is_some_and(|workers| *workers > 1);
    for worker in &workers.workers {
        if cpus <= usize::from(QUEUES) || sharing(worker.identity.cpu) {
            assert_eq!(worker.identity.polling, Polling::Adaptive);
        }
    }
    check_conservation(node.name(), &workers)
}
