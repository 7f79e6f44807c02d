//! Beds: paths to measure, set up in a [`Lab`] and ready between a source and a sink.
//!
//! ```text
//!  gateway, encap   n1p0 [source] ── cni0 ── n1: kernel or Ripstop ── eth0 ═══ n1 [sink] fabric
//!           at the door           [source] rip0 or flannel.1 ─┘
//!  gateway, decap   n1p0 [sink]   ── cni0 ── n1: kernel or Ripstop ── eth0 ═══ n1 [source] fabric
//!  testpmd          as encap and decap, with testpmd on n1's two interfaces; on null ports without any
//!  wire             n1 eth0 [source] ═══════════════════════════════════════ n1 [sink] fabric
//!
//!  pods             n1p0 ── n1 ═══ fabric ═══ n2 ── n2p0      TCP, requests and answers, or engines
//! ```
//!
//! Across a wire the switch's end of n1's NIC is an agent's on another machine (`wire.rs`), and the rest is the same.
//!
//! A gateway's other end is the switch's end of its NIC, so that nothing behind it costs. What a bed says about a path it
//! has seen: after each trial the counters of workers and of the kernel's tunnel device tell which one carried it.

mod framework;
mod gateway;
mod meter;
mod peers;
mod placement;
mod pods;
mod ripstop;
mod round_trips;
mod tcp;
pub mod testpmd;
mod wire;

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value};

use crate::engine::{self, Detail};
use crate::lab::{Backend, Lab, LabBuilder};
use crate::measure::{
    Bed, BedPlan, Offer, Path, Rate, Size, SourceKind, Stream, Topology, Trial, Variant,
};

use meter::Books;
use placement::Placement;
use wire::End;

pub use wire::Wire;

/// Sets a path up, ready for trials.
///
/// # Errors
/// Not root; a plan that contradicts itself or asks for what this machine does not have (the message says what); or
/// something did not come up. What was there already is taken down again.
pub fn open(plan: &BedPlan, variant: &Variant) -> Result<Box<dyn Bed>> {
    open_on(plan, variant, None)
}

/// As [`open`], with the NIC of a wire in place of the lab's own, and the agent there in place of the switch's end.
///
/// # Errors
/// As [`open`], or the plan cannot cross a wire.
pub fn open_across(plan: &BedPlan, variant: &Variant, wire: &Wire) -> Result<Box<dyn Bed>> {
    let gateway = plan.topology == Topology::Gateway;
    let is_testpmd = matches!(variant.path, Path::TestpmdAfxdp | Path::TestpmdNull);
    ensure!(
        gateway && !is_testpmd,
        "only packets through a gateway cross a wire, by the kernel, Ripstop or nobody: take the topology \"gateway\", and no testpmd"
    );
    open_on(plan, variant, Some(wire))
}

fn open_on(plan: &BedPlan, variant: &Variant, wire: Option<&Wire>) -> Result<Box<dyn Bed>> {
    let backend = backend(&plan.backend)?;
    ensure!(
        (1..=peers::MAX).contains(&plan.leases),
        "1 to {} leases, not {}",
        peers::MAX,
        plan.leases
    );
    let placement = Placement::parse(variant.placement.as_deref())?;
    let setup = Setup {
        plan: plan.clone(),
        path: variant.path,
        // Without a tunnel, the kernel's own forwarding is what host-gw leaves to it.
        backend: match variant.path {
            Path::Routing => Backend::HostGw,
            Path::Kernel | Path::Ripstop | Path::Wire | Path::TestpmdAfxdp | Path::TestpmdNull => {
                backend
            }
        },
        dataplane: variant.dataplane.clone(),
        placement,
        wire: wire.cloned(),
    };
    match (variant.path, plan.topology) {
        (Path::TestpmdNull, _) => framework::open(&setup),
        (Path::TestpmdAfxdp, Topology::Pods) => {
            bail!("testpmd has no pods: measure it in the topology \"gateway\"")
        }
        (Path::Kernel, _) if backend == Backend::Udp => bail!(
            "the udp backend of flannel is a process of flannel's own, which is not part of this: measure vxlan"
        ),
        (Path::Kernel, _) if backend == Backend::HostGw => {
            bail!("with host-gw the kernel forwards without a tunnel: that is the path \"routing\"")
        }
        (
            Path::Kernel | Path::Ripstop | Path::Routing | Path::Wire | Path::TestpmdAfxdp,
            Topology::Gateway,
        ) => gateway::open(setup),
        (Path::Kernel | Path::Ripstop | Path::Routing, Topology::Pods) => pods::open(setup),
        (Path::Wire, Topology::Pods) => {
            bail!("a wire has no pods: measure it in the topology \"gateway\"")
        }
    }
}

fn backend(name: &str) -> Result<Backend> {
    let all = [Backend::Vxlan, Backend::Ipip, Backend::Udp, Backend::HostGw];
    match all.into_iter().find(|backend| backend.name() == name) {
        Some(backend) => Ok(backend),
        None => bail!("{name:?} is none of vxlan, ipip, udp, host-gw"),
    }
}

/// What a bed is made from.
#[derive(Debug)]
struct Setup {
    plan: BedPlan,
    path: Path,
    backend: Backend,
    dataplane: Map<String, Value>,
    placement: Placement,
    /// What is at the NIC of the node under test, if that is no port of the lab's switch.
    wire: Option<Wire>,
}

impl Setup {
    /// The lab that all beds begin with. Its first node is the one under test.
    fn builder(&self) -> LabBuilder {
        let builder = Lab::builder()
            .backend(self.backend)
            .mtu(self.plan.mtu)
            .pod_network(peers::NETWORK)
            .dataplane_config(Value::Object(self.dataplane.clone()));
        match &self.wire {
            Some(wire) => builder.nic(wire.borrowed()),
            None => builder,
        }
    }

    /// Brings the lab up, without what would be heard in it beside the packets of a trial, and looks whether a kernel
    /// node has what it is to have.
    fn up(&self, builder: LabBuilder) -> Result<Lab> {
        let lab = builder.up()?;
        for host in lab.hosts() {
            // Neighbour discovery and multicast reports, which nobody here listens to. A kernel without IPv6 has none.
            for conf in ["all", "default"] {
                host.netns()
                    .sysctl(&format!("net/ipv6/conf/{conf}/disable_ipv6"), "1")?;
            }
        }
        ensure!(
            !lab.nodes()
                .iter()
                .any(|node| node.has_userland_tunnel() && self.path == Path::Kernel),
            "this kernel has no {} device (module ipip): its path cannot be measured here",
            self.backend.name()
        );
        Ok(lab)
    }

    /// Who carries packets, for a person.
    fn describe(&self) -> String {
        let backend = self.backend.name();
        let many = self.plan.leases > peers::AS_FLANNEL_MAX;
        let leases = match self.plan.leases {
            1 => "1 lease".to_owned(),
            leases => format!("{leases} leases"),
        };
        let as_objects = if many { ", next hops as objects" } else { "" };
        let halted = if many { ", control plane halted" } else { "" };
        match self.path {
            Path::Kernel => format!("kernel, {backend}, {leases}{as_objects}"),
            Path::Ripstop => format!("Ripstop, {backend}, {leases}{halted}"),
            Path::Routing => format!("kernel without a tunnel, {leases}{as_objects}"),
            Path::Wire if self.wire.is_some() => "one wire".to_owned(),
            Path::Wire => "one veth pair".to_owned(),
            Path::TestpmdAfxdp => "DPDK's testpmd, frames from port to port".to_owned(),
            Path::TestpmdNull => "DPDK's testpmd on null ports".to_owned(),
        }
    }
}

/// Sends packets from one end to the other, and returns what became of them; `engines` gets what the engines say of
/// themselves. The CPUs' time is that of the sending: what is then still on its way is less than the path's queues.
fn packets(
    setup: &Setup,
    lab: &Lab,
    [from, to]: [(&End, &Stream); 2],
    offer: &Offer,
    kind: SourceKind,
    engines: &mut Option<String>,
) -> Result<Trial> {
    let longest = match offer.size {
        Size::Bytes(bytes) => bytes,
        Size::Imix => 1450,
    };
    let mtu = lab.pod_mtu();
    ensure!(
        longest <= mtu,
        "packets of {longest} bytes do not fit the pods' MTU of {mtu}"
    );
    // Looking at every packet costs more than forwarding it: only where the rate leaves room for that.
    let detail = match offer.rate {
        Rate::Pps(_) if !offer.count_only => Detail::Check,
        Rate::Pps(_) | Rate::Max | Rate::Window(_) => Detail::Count,
    };
    let mut sink = to.0.sink(from.0, to.1, detail)?;
    let mut source = from.0.source(from.1, kind)?;
    from.0.await_carrier()?;
    to.0.await_carrier()?;
    *engines = Some(format!("{} to {}", source.describe(), sink.describe()));
    let before = Books::read(lab)?;
    let mut trial = engine::trial(source.as_mut(), sink.as_mut(), offer.rate, offer.duration)?;
    meter::note_steal(&mut trial);
    let after = Books::read(lab)?;
    settle(setup, [&before, &after], &mut trial)?;
    Ok(trial)
}

/// Closes the books of a trial, and makes sure that its packets went the way they are said to have gone.
fn settle(setup: &Setup, [before, after]: [&Books; 2], trial: &mut Trial) -> Result<()> {
    after.since(before, trial)?;
    let workers = trial.workers.map(|workers| workers.packets);
    check_path(
        setup,
        trial.received,
        workers,
        after.standby - before.standby,
    )
}

/// Holds the packets received against those that the workers and the kernel's tunnel device have seen.
fn check_path(setup: &Setup, received: u64, workers: Option<u64>, standby: u64) -> Result<()> {
    match (setup.path, workers) {
        (Path::Ripstop, Some(workers)) => ensure!(
            workers >= received && workers >= standby * 100,
            "of {received} packets received the workers saw {workers} and the kernel's tunnel {standby}: that is not Ripstop's path"
        ),
        (Path::Ripstop, None) => bail!("no data plane runs"),
        (Path::Kernel, _) => ensure!(
            standby >= received,
            "of {received} packets received the kernel's tunnel saw {standby}: that is not its path"
        ),
        (Path::Routing | Path::Wire | Path::TestpmdAfxdp | Path::TestpmdNull, _) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Direction, PodSide};

    #[test]
    fn a_path_that_others_carried_is_not_what_was_measured() {
        let check = |path, received, workers, standby| {
            let plan = BedPlan {
                topology: Topology::Gateway,
                direction: Direction::Encap,
                pod_side: PodSide::Pod,
                backend: "vxlan".to_owned(),
                leases: 1,
                source: SourceKind::Auto,
                mtu: 1500,
                underlay_offloads: false,
            };
            let setup = Setup {
                plan,
                path,
                backend: Backend::Vxlan,
                dataplane: Map::new(),
                placement: Placement::parse(None).expect("is read"),
                wire: None,
            };
            check_path(&setup, received, workers, standby).is_ok()
        };
        assert!(check(Path::Ripstop, 1000, Some(1000), 0));
        assert!(check(Path::Ripstop, 1000, Some(1000), 10));
        assert!(!check(Path::Ripstop, 1000, Some(1000), 11));
        assert!(!check(Path::Ripstop, 1000, Some(999), 0));
        assert!(!check(Path::Ripstop, 1000, None, 1000));
        assert!(check(Path::Kernel, 1000, None, 1000));
        assert!(!check(Path::Kernel, 1000, None, 999));
        assert!(check(Path::Routing, 1000, None, 0));
    }
}
