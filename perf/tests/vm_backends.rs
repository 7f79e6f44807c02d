//! Every backend against the devices with which the kernel itself does it: in a guest of the VM lab (`make test-vm`), whose
//! kernels have ipip and FOU.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═╗                 all alive;
//!   n2p0 ─ n2 ─ rip0 ─ worker ═╬═ fabric         then n2's data plane is killed, then n1's, and what goes on does so
//!   n3p0 ─ n3 ─ kernel ════════╝                 through flannel.ipip, flannel0 (FOU), flannel-v6.1 or plain routes
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
use ripstop_perf::{Backend, Families, Family, Host, Lab, LabBuilder, Node, NodeKind, wait_until};
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
            carried_by_whom(lab, node, before, cell)
                .with_context(|| format!("{}: {}", what(), node.name()))?;
        }
    }
    Ok(())
}

/// A living data plane carries its node's traffic, and a dead one none. What a living one is too slow to carry, because the
/// guest does not get to run, the kernel carries.
fn carried_by_whom(lab: &Lab, node: &Node, before: Carried, cell: Cell) -> Result<()> {
    let (least, alive) = (cell.packets_min(), node.dataplane_is_running());
    let has_device = lab
        .families()
        .into_iter()
        .any(|family| lab.backend().device(family).is_some());
    // Packets on plain routes are not counted apart from the node's others, and fragments without a tunnel are the
    // kernel's.
    let countable = has_device || alive && cell != Cell::Fragments;
    let mut now = before;
    let counted = wait_until(
        "as many packets are counted as were exchanged",
        PATIENCE,
        || {
            now = Carried::by(node).unwrap_or(before).since(before);
            // To the kernel's devices several segments of TCP are one packet.
            let least = if alive { least } else { least.min(1) };
            !countable || (0..2).all(|way| now.workers[way] + now.kernel[way] >= least)
        },
    );
    counted.with_context(|| format!("at least {least}: {now:?}"))?;
    if alive {
        let worked = now.workers.iter().all(|packets| *packets > 0);
        ensure!(
            worked || !countable || least == 0,
            "the workers have not carried it: {now:?}"
        );
    } else {
        assert_eq!(now.workers, [0, 0], "there are no workers: {now:?}");
    }
    Ok(())
}

/// All nodes talk while data planes die. `builder` says how they are joined.
fn while_data_planes_die(builder: LabBuilder) -> Result<()> {
    builder.ripstop(2).linux(1).run(|lab| {
        ensure!(
            lab.backend() == Backend::Udp || !lab.node(3).has_userland_tunnel(),
            "this kernel has no {} device",
            lab.backend().name()
        );
        lab.start_ripstop()?;
        let damage = common::kernel_counters(lab)?;
        let all = |pairs: &[[u8; 2]]| {
            lab.families()
                .into_iter()
                .try_for_each(|family| pairs.iter().try_for_each(|pair| talk(lab, family, *pair)))
        };
        all(&[[1, 2], [1, 3]]).context("with both data planes")?;
        for (dead, pairs) in [(2, [[1, 2], [2, 3]]), (1, [[1, 2], [1, 3]])] {
            let node = lab.node(dead);
            node.kill_dataplane();
            let what = format!("n{dead} sends nothing to workers that are dead");
            wait_until(&what, PATIENCE, || {
                node.detour().is_ok_and(|routes| routes.is_empty())
            })?;
            all(&pairs).with_context(|| format!("after the death of n{dead}'s data plane"))?;
        }
        for node in lab.nodes() {
            println!("{}: {:?}", node.name(), Carried::by(node)?);
        }
        common::check_no_damage(lab, &damage)
    })
}

#[test]
fn ipip_is_the_kernels_ipip() -> Result<()> {
    while_data_planes_die(Lab::builder().backend(Backend::Ipip))
}

/// flannel's own end of this backend is a process, for which the lab has a thread; the other two change between workers and FOU.
#[test]
fn udp_is_the_kernels_fou() -> Result<()> {
    while_data_planes_die(Lab::builder().backend(Backend::Udp))
}

#[test]
fn host_gw_is_the_kernels_routes() -> Result<()> {
    while_data_planes_die(
        Lab::builder()
            .backend(Backend::HostGw)
            .families(Families::Dual),
    )
}

#[test]
fn vxlan_is_the_kernels_in_both_families() -> Result<()> {
    while_data_planes_die(Lab::builder().families(Families::Dual))
}
