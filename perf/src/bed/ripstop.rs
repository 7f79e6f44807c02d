//! Ripstop in a bed: both processes with all leases, on the CPUs that the placement has for the workers.

use core::time::Duration;
use std::fs;
use std::thread;

use anyhow::{Context, Result, ensure};
use libc::SIGSTOP;
use serde_json::{Map, Value};

use super::meter::wait_for_rest;
use super::peers;
use crate::lab::{Host, Lab, Node, NodeKind, wait_until};
use crate::measure::Watched;

/// How long it may take until workers carry traffic to all peers, and until all is at rest: for the first, and for each
/// thousand.
const START: Duration = Duration::from_secs(60);
const START_PER_THOUSAND: Duration = Duration::from_secs(10);

/// Starts Ripstop on the Ripstop nodes of a lab, and waits until their workers carry traffic to so many peers each and
/// the control planes have nothing left to do. Each node's workers keep to the CPUs given, a queue for each.
pub(super) fn start(lab: &Lab, leases: u32, cpus: &[(u8, Vec<usize>)]) -> Result<()> {
    lab.write_leases(&peers::leases(lab, leases))?;
    for (index, cpus) in cpus {
        let node = lab.node(*index);
        for (queue, cpu) in (0..).zip(cpus) {
            let file = node.queue_config_file(queue);
            let what = || format!("{}", file.display());
            let text = fs::read_to_string(&file).with_context(what)?;
            let mut config: Value = serde_json::from_str(&text).with_context(what)?;
            config["cpu"] = Value::from(*cpu);
            node.write_queue_config(queue, &config)?;
        }
    }
    for node in lab.ripstop_nodes() {
        node.start_dataplane()?;
        node.start_controlplane()?;
    }
    let within = START + START_PER_THOUSAND * (leases / 1000);
    lab.ripstop_nodes()
        .try_for_each(|node| wait_for_workers(node, leases, within))
}

fn wait_for_workers(node: &Node, leases: u32, within: Duration) -> Result<()> {
    let all = usize::try_from(leases)?;
    let runs = || node.dataplane_is_running() && node.controlplane_is_running();
    let what = format!("workers of {} carry traffic to {leases} peers", node.name());
    let outcome = wait_until(&what, within, || {
        // To look is work as well, with many of them.
        thread::sleep(Duration::from_micros(leases.into()));
        !runs() || node.detour().is_ok_and(|subnets| subnets.len() >= all)
    });
    outcome
        .and_then(|()| {
            ensure!(runs(), "a process of Ripstop has ended");
            if leases > peers::AS_FLANNEL_MAX {
                return node.signal_controlplane(SIGSTOP);
            }
            let pid = node.controlplane_pid().context("no control plane")?;
            wait_for_rest(
                &format!("the control plane of {}", node.name()),
                pid,
                within,
            )
        })
        .with_context(|| {
            format!(
                "end of the logs:\n{}\n{}",
                tail(&node.dataplane_log()),
                tail(&node.controlplane_log())
            )
        })
}

/// A node, for whoever watches.
pub(super) fn watched(node: &Node) -> Watched {
    match node.kind() {
        NodeKind::Ripstop => Watched::Workers {
            name: node.name().to_owned(),
            run_dir: node.run_dir(),
        },
        NodeKind::PlainLinux => Watched::Kernel(node.netns().clone()),
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// A node's workers and its host door, for a person, with what the configuration has beyond the bed's own.
pub(super) fn describe(node: &Node, dataplane: &Map<String, Value>) -> Result<String> {
    let workers = node.workers()?.workers.into_iter().map(|worker| {
        let identity = worker.identity;
        format!(
            "{} queue {} {} {} on CPU {}",
            identity.nic,
            identity.queue,
            identity.mode.name(),
            identity.polling.name(),
            identity.cpu
        )
    });
    let workers = workers.collect::<Vec<_>>().join(", ");
    let door = node.output(&["ip", "-d", "-j", "link", "show", "dev", "rip0"])?;
    let door: Value = serde_json::from_str(&door).context("output of ip -j link")?;
    let kind = door
        .pointer("/0/linkinfo/info_kind")
        .and_then(Value::as_str);
    let door = kind.unwrap_or("of no known kind");
    let keys = if dataplane.is_empty() {
        String::new()
    } else {
        format!(", with {}", Value::from(dataplane.clone()))
    };
    Ok(format!(
        "{}: {workers}; host door {door}{keys}",
        node.name()
    ))
}
