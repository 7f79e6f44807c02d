//! Every backend against the devices with which the kernel itself does it: in a guest of the VM lab (`make test-vm`), whose
//! kernels have ipip and FOU.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═╗
//!   n2p0 ─ n2 ─ rip0 ─ worker ═╬═ fabric         the data plane of n2 is killed: it goes on through flannel.ipip,
//!   n3p0 ─ n3 ─ kernel ════════╝                 flannel0 (FOU), flannel-v6.1 or plain routes
//! ```

#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
mod talk;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use anyhow::{Context, Result, ensure};
use ripstop_perf::{Backend, Families, Host, Lab, LabBuilder, wait_until};
use talk::{Carried, check_no_damage, talk};
use vm::PATIENCE;

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
