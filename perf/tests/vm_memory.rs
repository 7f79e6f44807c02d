//! Where the packet memory lies: in a guest of the VM lab (`make test-vm`) with one or two NUMA nodes, whose near NIC is on the
//! second.
//!
//! ```text
//!   node 0: CPUs, memory, far NIC        node 1: CPUs, memory with huge pages ── 2 workers ── near NIC
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use std::fs;

use anyhow::{Context, Result, ensure};
use ripstop_fib::stats::Mode;
use ripstop_perf::{Lab, Node, Ping, UdpFlow, udp_payload_max, wait_until};
use serde_json::json;
use vm::{Books, BusDevice, PATIENCE};

const WORKERS: u16 = 2;
const PACKETS: u64 = 400;
const PINGS: u16 = 3;
const MEMORY: &str = "/proc/meminfo";

/// A Ripstop node on the real NIC and a plain Linux node. Nothing of Ripstop runs yet.
fn on_the_driver(
    huge_pages: bool,
    test: impl FnOnce(&Lab, &Node, Option<u16>) -> Result<()>,
) -> Result<()> {
    let numa_node = BusDevice::of_near()?.numa_node()?;
    Lab::builder()
        .ripstop(1)
        .linux(1)
        .queues(WORKERS)
        .dataplane_config(json!({ "hugePages": huge_pages }))
        .run(|lab| {
            let node = lab.node(1);
            vm::plug_in(lab, node, WORKERS)?;
            test(lab, node, numa_node)
        })
}

/// The workers have such memory, and carry the longest packets and others through it.
fn check_workers(lab: &Lab, huge_pages: bool, numa_node: Option<u16>) -> Result<()> {
    let node = lab.node(1);
    let identities: Vec<_> = node
        .workers()?
        .workers
        .into_iter()
        .map(|worker| worker.identity)
        .collect();
    assert_eq!(identities.len(), usize::from(WORKERS));
    for identity in &identities {
        let found = (identity.mode, identity.huge_pages, identity.numa_node);
        println!("queue {}: {found:?}", identity.queue);
        let mode = if vm::kernel()? >= (6, 14) {
            Mode::ZeroCopy
        } else {
            Mode::Copy
        };
        assert_eq!(found, (mode, huge_pages, numa_node), "{identity:?}");
    }
    vm::reaches_the_switch(node)?;
    let books = Books::open(lab)?;
    for (from, to) in lab.pod_pairs() {
        let ping = Ping::new(from, to).full(lab.pod_mtu()).count(PINGS).run()?;
        ensure!(ping.received == PINGS, "{ping:?}");
        let sizes = [64, 512, udp_payload_max(lab.pod_mtu())];
        let flow = UdpFlow::new(from, to).flows(16).rate(200).count(PACKETS);
        let report = flow.payload_sizes(&sizes).run()?;
        let bad = report.lost + report.duplicated + report.corrupt + report.foreign;
        ensure!(report.received == PACKETS && bad == 0, "{report}");
    }
    // A ping is a packet in and a packet out, whoever begins.
    let packets = PACKETS + 2 * u64::from(PINGS);
    let by_standby = books.close(lab, |_node| (packets, packets))?;
    println!("packets on the standby: {by_standby}");
    Ok(())
}

/// A line of the kernel's account of memory.
fn meminfo(what: &str) -> Result<u64> {
    let text = fs::read_to_string(MEMORY).context(MEMORY)?;
    let line = text.lines().find_map(|line| line.strip_prefix(what));
    let value = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {what} in {MEMORY}"))
}

/// Does what the process's last words say: `echo <pages> > <file>`.
fn follow_advice(node: &Node) -> Result<()> {
    let log = node.dataplane_log();
    let advice = log
        .rsplit("echo ")
        .next()
        .filter(|rest| rest.len() < log.len());
    let advice = advice.with_context(|| format!("no advice in the log: {log}"))?;
    let mut words = advice.split_whitespace();
    let (Some(pages), Some(">"), Some(file)) = (words.next(), words.next(), words.next()) else {
        anyhow::bail!("advice {advice:?}");
    };
    println!("echo {pages} > {file}");
    fs::write(file, pages).with_context(|| format!("{pages} > {file}"))?;
    let had = fs::read_to_string(file).with_context(|| file.to_owned())?;
    ensure!(had.trim() == pages, "of {pages} pages the guest had {had}");
    Ok(())
}

#[test]
fn ordinary_pages_lie_on_the_nics_node() -> Result<()> {
    on_the_driver(false, |lab, _node, numa_node| {
        lab.start_ripstop()?;
        check_workers(lab, false, numa_node)
    })
}

/// Without huge pages the process says what to do; who does it has them, on the NIC's node, for as long as the process lives.
#[test]
fn huge_pages_are_asked_for_used_and_given_back() -> Result<()> {
    on_the_driver(true, |lab, node, numa_node| {
        assert_eq!(meminfo("HugePages_Total")?, 0, "huge pages at the start");
        // Once for the machine, and where it has nodes once for the NIC's.
        for _time in 0..=usize::from(numa_node.is_some()) {
            node.start_dataplane()?;
            wait_until("the data plane has given up", PATIENCE, || {
                !node.dataplane_is_running()
            })?;
            follow_advice(node)?;
        }
        lab.start_ripstop()?;
        ensure!(
            meminfo("HugePages_Free")? < meminfo("HugePages_Total")?,
            "nobody uses a huge page"
        );
        check_workers(lab, true, numa_node)?;
        node.kill_dataplane();
        wait_until("all huge pages are free", PATIENCE, || {
            meminfo("HugePages_Free").ok() == meminfo("HugePages_Total").ok()
        })?;
        fs::write("/proc/sys/vm/nr_hugepages", "0").context("huge pages back")
    })
}
