//! Nodes that talk in every way, and who has carried it: workers, or the kernel's tunnel devices.

use anyhow::{Context, Result, ensure};
use ripstop_fib::stats::Counter;
use ripstop_perf::{Family, Host, KernelCounters, Lab, Node, NodeKind, wait_until};

use crate::cells::Cell;
use crate::common;
use crate::vm::PATIENCE;

/// Packets that have left a node for others, and that have come from others, by who carried them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Carried {
    pub(crate) workers: [u64; 2],
    pub(crate) kernel: [u64; 2],
}

impl Carried {
    pub(crate) fn by(node: &Node) -> Result<Self> {
        let kernel = node.standby_counters()?;
        let workers = match node.kind() {
            NodeKind::Ripstop => {
                let workers = node.workers()?;
                [Counter::NicTxPackets, Counter::NicRxPackets].map(|counter| workers.total(counter))
            }
            NodeKind::PlainLinux => [0; 2],
        };
        Ok(Self {
            workers,
            kernel: [kernel.tx_packets, kernel.rx_packets],
        })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        let grown = |now: [u64; 2], before: [u64; 2]| [now[0] - before[0], now[1] - before[1]];
        Self {
            workers: grown(self.workers, before.workers),
            kernel: grown(self.kernel, before.kernel),
        }
    }
}

/// Runs every kind of traffic between two nodes, and checks on both who has carried it.
pub(crate) fn talk(lab: &Lab, family: Family, pair: [u8; 2]) -> Result<()> {
    let nodes = pair.map(|index| lab.node(index));
    let start = [Carried::by(nodes[0])?, Carried::by(nodes[1])?];
    for cell in Cell::ALL {
        let what = || {
            format!(
                "{family} {} between n{} and n{}",
                cell.name(),
                pair[0],
                pair[1]
            )
        };
        let before = [Carried::by(nodes[0])?, Carried::by(nodes[1])?];
        cell.check(lab, family, pair[0], pair[1])
            .with_context(what)?;
        for (node, before) in nodes.into_iter().zip(before) {
            somebody_counts(lab, node, before, cell)
                .with_context(|| format!("{}: {}", what(), node.name()))?;
        }
    }
    for (node, start) in nodes.into_iter().zip(start) {
        let now = Carried::by(node)?.since(start);
        let worked = now.workers.iter().all(|packets| *packets > 0);
        let what = || {
            let xdp = node.workers().map(|workers| workers.xdp());
            format!("{family} {}: {now:?}, {xdp:?}", node.name())
        };
        if node.dataplane_is_running() {
            ensure!(worked, "the workers have carried nothing: {}", what());
        } else {
            ensure!(now.workers == [0, 0], "there are no workers: {}", what());
        }
    }
    Ok(())
}

/// The workers and the tunnel's device together have carried as many packets as were exchanged. What a living data plane is too
/// slow to carry, because the guest does not get to run, the kernel carries; on plain routes nobody counts that.
fn somebody_counts(lab: &Lab, node: &Node, before: Carried, cell: Cell) -> Result<()> {
    let mut families = lab.families().into_iter();
    if !families.any(|family| lab.backend().device(family).is_some()) {
        return Ok(());
    }
    let least = match cell.packets_min() {
        least if node.dataplane_is_running() => least,
        // To the kernel's devices several segments of TCP are one packet.
        least => least.min(1),
    };
    let mut now = before;
    let counted = wait_until("all packets are counted", PATIENCE, || {
        now = Carried::by(node).unwrap_or(before).since(before);
        (0..2).all(|way| now.workers[way] + now.kernel[way] >= least)
    });
    counted.with_context(|| format!("at least {least}: {now:?}"))
}

/// Fails if the kernel of any host has met a wrong checksum or length since. A pod that is told about a packet of which its
/// kernel knows nothing, because a test has made it, counts that as an error.
pub(crate) fn check_no_damage(lab: &Lab, before: &[(String, KernelCounters)]) -> Result<()> {
    for ((name, before), (_, after)) in before.iter().zip(common::kernel_counters(lab)?) {
        let mut damage = after.since(before).damage();
        damage.retain(|(what, _)| !matches!(*what, "Icmp.InErrors" | "Icmp6.InErrors"));
        ensure!(
            damage.is_empty(),
            "damaged packets arrived at {name}: {damage:?}"
        );
    }
    Ok(())
}
