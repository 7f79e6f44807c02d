//! Every backend against the devices with which the kernel itself does it: in a guest of the VM lab (`make test-vm`), whose
//! kernels have ipip and FOU.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═╗
//!   n2p0 ─ n2 ─ rip0 ─ worker ═╬═ fabric         the data plane of n2 is killed: it goes on through flannel.ipip,
//!   n3p0 ─ n3 ─ kernel ════════╝                 flannel0 (FOU), flannel-v6.1 or plain routes
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use anyhow::{Context, Result, ensure};
use cells::Cell;
use ripstop_fib::stats::Counter;
use ripstop_perf::{
    Backend, Families, Family, Host, KernelCounters, Lab, LabBuilder, Node, NodeKind, wait_until,
};
use vm::PATIENCE;

/// Packets that have left a node for others, and that have come from others, by who carried them.
#[derive(Debug, Clone, Copy)]
struct Carried {
    workers: [u64; 2],
    kernel: [u64; 2],
}

impl Carried {
    fn by(node: &Node) -> Result<Self> {
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

    fn since(self, before: Self) -> Self {
        let grown = |now: [u64; 2], before: [u64; 2]| [now[0] - before[0], now[1] - before[1]];
        Self {
            workers: grown(self.workers, before.workers),
            kernel: grown(self.kernel, before.kernel),
        }
    }
}

/// Runs every kind of traffic between two nodes, and checks on both who has carried it.
fn talk(lab: &Lab, family: Family, pair: [u8; 2]) -> Result<()> {
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
            assert_eq!(now.workers, [0, 0], "there are no workers: {}", what());
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
fn check_no_damage(lab: &Lab, before: &[(String, KernelCounters)]) -> Result<()> {
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

/// All nodes talk, and one data plane dies. `builder` says how they are joined.
fn while_a_data_plane_dies(builder: LabBuilder) -> Result<()> {
    builder.ripstop(2).linux(1).run(|lab| {
        ensure!(
            lab.backend() == Backend::Udp || !lab.node(3).has_userland_tunnel(),
            "this kernel has no {} device",
            lab.backend().name()
        );
        lab.start_ripstop()?;
        let before = common::kernel_counters(lab)?;
        let all = |pairs: &[[u8; 2]]| {
            lab.families()
                .into_iter()
                .try_for_each(|family| pairs.iter().try_for_each(|pair| talk(lab, family, *pair)))
        };
        // What two data planes do with each other, every kernel does (`matrix`).
        all(&[[1, 3]]).context("with the data plane")?;
        let node = lab.node(2);
        node.kill_dataplane();
        wait_until(
            "n2 sends nothing to workers that are dead",
            PATIENCE,
            || node.detour().is_ok_and(|routes| routes.is_empty()),
        )?;
        all(&[[1, 2], [2, 3]]).context("after the death of n2's data plane")?;
        for node in lab.nodes() {
            println!("{}: {:?}", node.name(), Carried::by(node)?);
        }
        check_no_damage(lab, &before)
    })
}

#[test]
fn ipip_is_the_kernels_ipip() -> Result<()> {
    while_a_data_plane_dies(Lab::builder().backend(Backend::Ipip))
}

/// flannel's own end of this backend is a process, for which the lab has a thread; the other two change between workers and FOU.
#[test]
fn udp_is_the_kernels_fou() -> Result<()> {
    // Nothing in the kernel asks for this module by itself: it is for the node's administrator to load.
    vm::run(&["modprobe", "-a", "fou", "ipip"])?;
    while_a_data_plane_dies(Lab::builder().backend(Backend::Udp))
}

#[test]
fn host_gw_is_the_kernels_routes() -> Result<()> {
    while_a_data_plane_dies(
        Lab::builder()
            .backend(Backend::HostGw)
            .families(Families::Dual),
    )
}

#[test]
fn vxlan_is_the_kernels_in_both_families() -> Result<()> {
    while_a_data_plane_dies(Lab::builder().families(Families::Dual))
}
