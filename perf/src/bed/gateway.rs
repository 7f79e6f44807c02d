//! One node under test, packets through it one way: between its pod (or its tunnel's own device) and the switch's end of
//! its NIC.

use core::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail, ensure};

use super::meter::shell;
use super::placement::{Softirqs, set_offloads_of_receive};
use super::testpmd::{Forward, Options, Ports, Testpmd};
use super::{End, Setup, Wire, packets, peers, ripstop};
use crate::address;
use crate::lab::{Backend, Fabric, Host, Lab, Node, NodeKind};
use crate::measure::{
    Bed, Direction, Limit, Offer, Path, PodSide, SourceKind, Stream, Trial, Tunnel, Watched, Work,
};
use crate::netns::Netns;

/// The node under test, and the one that packets come from or go to.
const NODE: u8 = 1;
const PEER: u8 = peers::NEAR;
/// Inner source ports begin here.
const FIRST_PORT: u16 = 10_000;

struct Gateway {
    // The engines are made for each trial, and gone before the lab is.
    testpmd: Option<Testpmd>,
    lab: Lab,
    setup: Setup,
    source: End,
    sink: End,
    description: String,
    engines: Option<String>,
}

pub(super) fn open(setup: Setup) -> Result<Box<dyn Bed>> {
    check(&setup)?;
    let workers = setup.placement.gateway_workers();
    let builder = match setup.path {
        Path::Ripstop => setup
            .builder()
            .ripstop(1)
            .queues(u16::try_from(workers.len())?),
        Path::Kernel | Path::Routing | Path::Wire | Path::TestpmdAfxdp | Path::TestpmdNull => {
            setup.builder().linux(1)
        }
    };
    let lab = setup.up(builder.linux(1))?;
    let [source, sink] = ends(&setup, &lab);
    let mut description = setup.describe();
    if setup.wire.is_none() {
        // So that live frames arrive here, also of a worker that looks for that when it starts. Of what a sink takes,
        // nothing gets as far as GRO.
        set_offloads_of_receive(lab.fabric().netns(), &Fabric::port(NODE))?;
    } else if setup.path == Path::Ripstop && setup.plan.direction == Direction::Decap {
        check_queues(lab.node(NODE), &setup, workers.len())?;
    }
    let mut testpmd = None;
    if setup.path == Path::TestpmdAfxdp {
        let started = between(&lab, &setup, &workers)?;
        description = format!("{description}; {}", started.command_line());
        testpmd = Some(started);
    } else if setup.path != Path::Wire {
        let (node, leases) = (lab.node(NODE), setup.plan.leases);
        let far = setup.wire.as_ref().map(|wire| wire.macs()[1]);
        peers::resolve_next_hops(&lab, node, leases, far)?;
        if node.kind() == NodeKind::Ripstop {
            ripstop::start(&lab, leases, &[(NODE, workers)])?;
            let node = ripstop::describe(node, &setup.dataplane)?;
            description = format!("{description}; {node}");
        } else {
            peers::program_kernel(&lab, node, leases)?;
        }
        // A NIC of the machine's stays as it is.
        let own = |interface: &&str| setup.wire.is_none() || *interface != "eth0";
        if let Some(way_in) = way_in(&setup).filter(own) {
            if matches!(setup.plan.source, SourceKind::Auto | SourceKind::LiveFrames) {
                // With an XDP program the interface has it already.
                set_offloads_of_receive(node.netns(), way_in)?;
            }
            setup.placement.apply(node.netns(), way_in)?;
        }
        description = format!("{description}; {}", receive_work(&setup));
    }
    Ok(Box::new(Gateway {
        testpmd,
        lab,
        setup,
        source,
        sink,
        description,
        engines: None,
    }))
}

/// Who takes in what arrives at the node, for a person.
fn receive_work(setup: &Setup) -> String {
    match way_in(setup) {
        Some("eth0") if setup.wire.is_some() => {
            "receive work where the NIC's interrupts go".to_owned()
        }
        Some(_) | None => setup.placement.describe(),
    }
}

/// Makes sure that all that arrives comes to a worker.
fn check_queues(node: &Node, setup: &Setup, workers: usize) -> Result<()> {
    let queues = shell(
        node.netns(),
        "ls -d /sys/class/net/eth0/queues/rx-* | wc -l",
    )?;
    let nic = setup.wire.as_ref().map_or("eth0", Wire::nic);
    ensure!(
        queues.trim() == workers.to_string(),
        "{nic} has {} receive queues for {workers} worker(s), and packets on a queue without one take the kernel's path: \
         ethtool -L {nic} combined {workers}, or a placement with as many workers (workers=1+2)",
        queues.trim()
    );
    Ok(())
}

/// A testpmd that takes frames from the pod's side of the node to its NIC and back, as they are.
fn between(lab: &Lab, setup: &Setup, workers: &[usize]) -> Result<Testpmd> {
    let node = lab.node(NODE);
    for interface in ["pod0", "eth0"] {
        // So that frames get through to a program that has not attached its own yet, and to the sink.
        set_offloads_of_receive(node.netns(), interface)?;
    }
    let ports = Ports::AfXdp(["pod0".to_owned(), "eth0".to_owned()]);
    let cpu = workers.first().copied().unwrap_or_default();
    let mut options = Options::new(ports, Forward::Io, setup.placement.source_cpu(), cpu);
    options.namespace = Some(node.netns().clone());
    Testpmd::start(&options)
}

fn check(setup: &Setup) -> Result<()> {
    let at_door = setup.plan.pod_side == PodSide::Door;
    if setup.backend == Backend::HostGw {
        ensure!(
            setup.path != Path::Ripstop || setup.plan.direction == Direction::Encap,
            "with host-gw packets come without a tunnel, and the kernel takes them to the pods: that is the path \"routing\""
        );
        ensure!(
            !at_door || setup.path != Path::Routing,
            "without a tunnel there is no tunnel's device to be the door"
        );
    }
    ensure!(
        way_in(setup).is_some() || setup.placement.softirqs == Softirqs::Sender,
        "what enters at the door is taken in by nobody: rps and threaded mean nothing there"
    );
    ensure!(
        setup.wire.is_none()
            || way_in(setup) != Some("eth0")
            || setup.placement.softirqs == Softirqs::Sender,
        "rps and threaded are for links of the lab's own: the receive work of a NIC is where its interrupts go \
         (/proc/irq/*/smp_affinity_list)"
    );
    Ok(())
}

/// The interface of the node under test that the source's packets arrive at.
fn way_in(setup: &Setup) -> Option<&'static str> {
    match (setup.path, setup.plan.direction, setup.plan.pod_side) {
        (Path::Wire | Path::TestpmdAfxdp, _, _) | (_, Direction::Encap, PodSide::Door) => None,
        (_, Direction::Encap, PodSide::Pod) => Some("pod0"),
        (_, Direction::Decap, _) => Some("eth0"),
    }
}

/// Where source and sink are.
fn ends(setup: &Setup, lab: &Lab) -> [End; 2] {
    let (node, pod) = (lab.node(NODE), lab.pod(NODE, 0));
    let [source_cpu, sink_cpu] = [setup.placement.source_cpu(), setup.placement.sink_cpu()];
    let (pods_cpu, wire_cpu) = match setup.plan.direction {
        Direction::Encap => (source_cpu, sink_cpu),
        Direction::Decap => (sink_cpu, source_cpu),
    };
    let at = |netns: &Netns, interface: &str, cpu| End::Here {
        netns: netns.clone(),
        interface: interface.to_owned(),
        cpu,
    };
    let wire = match &setup.wire {
        Some(wire) => End::There(wire.peer().clone()),
        None => at(lab.fabric().netns(), &Fabric::port(NODE), wire_cpu),
    };
    let at = |netns, interface| at(netns, interface, pods_cpu);
    let pods = match (setup.path, setup.plan.pod_side) {
        (Path::Wire, _) => at(node.netns(), "eth0"),
        (Path::TestpmdAfxdp, _) | (_, PodSide::Pod) => at(pod.netns(), "eth0"),
        (Path::Ripstop, PodSide::Door) => at(node.netns(), "rip0"),
        (_, PodSide::Door) => {
            let device = setup.backend.device(address::Family::Ipv4);
            at(node.netns(), device.unwrap_or_default())
        }
    };
    match setup.plan.direction {
        Direction::Encap => [pods, wire],
        Direction::Decap => [wire, pods],
    }
}

/// The outer header of packets from one node of the lab to another.
fn tunnel(backend: Backend, from: u8, to: u8) -> Option<Tunnel> {
    let (outer_from, outer_to) = (address::underlay(from), address::underlay(to));
    match backend {
        Backend::Vxlan => Some(Tunnel::Vxlan {
            from: outer_from,
            to: outer_to,
            vni: address::VNI,
            port: address::VXLAN_PORT,
            inner_to_mac: address::vtep_mac(to),
            inner_from_mac: address::vtep_mac(from),
        }),
        Backend::Ipip => Some(Tunnel::Ipip {
            from: outer_from,
            to: outer_to,
        }),
        Backend::Udp => Some(Tunnel::Udp {
            from: outer_from,
            to: outer_to,
            port: address::UDP_PORT,
        }),
        Backend::HostGw => None,
    }
}

impl Gateway {
    /// What the source sends, and what arrives at the sink.
    fn streams(&self, offer: &Offer) -> Result<[Stream; 2]> {
        let Setup {
            plan,
            backend,
            path,
            ..
        } = &self.setup;
        ensure!(
            (1..=plan.leases).contains(&offer.destinations),
            "1 to {} destinations, not {}: there are so many leases",
            plan.leases,
            offer.destinations
        );
        let (from, to) = match plan.direction {
            Direction::Encap => (
                address::pod(NODE, 0),
                peers::destinations(offer.destinations),
            ),
            Direction::Decap => {
                ensure!(
                    offer.destinations == 1,
                    "packets out of the tunnel come from one peer to the node's own pod: 1 destination, not {}",
                    offer.destinations
                );
                (address::pod(PEER, 0), vec![address::pod(NODE, 0)])
            }
        };
        let inner = Stream {
            to_mac: address::gateway_mac(NODE),
            from_mac: address::pod_mac(NODE, 0),
            from: from.into(),
            to: to
                .into_iter()
                .map(|to: Ipv4Addr| IpAddr::from(to))
                .collect(),
            first_port: FIRST_PORT,
            flows: offer.flows,
            size: offer.size,
            tunnel: None,
        };
        let on_pods_side = match (plan.pod_side, plan.direction) {
            // To and from the bridge, as pods do.
            (PodSide::Pod, Direction::Encap) => inner.clone(),
            (PodSide::Pod, Direction::Decap) => Stream {
                to_mac: inner.from_mac,
                from_mac: inner.to_mac,
                ..inner.clone()
            },
            // The kernel's device looks for the peer by this address; others have none.
            (PodSide::Door, Direction::Encap) => Stream {
                to_mac: address::vtep_mac(PEER),
                from_mac: address::vtep_mac(NODE),
                ..inner.clone()
            },
            (PodSide::Door, Direction::Decap) => Stream {
                to_mac: address::vtep_mac(NODE),
                from_mac: address::vtep_mac(PEER),
                ..inner.clone()
            },
        };
        let mac = |node| match &self.setup.wire {
            Some(wire) => wire.macs()[usize::from(node != NODE)],
            None => address::underlay_mac(node),
        };
        let outer = |from, to| Stream {
            to_mac: mac(to),
            from_mac: mac(from),
            tunnel: tunnel(*backend, from, to),
            ..inner.clone()
        };
        Ok(match (path, plan.direction) {
            (Path::Wire | Path::TestpmdAfxdp, Direction::Encap) => {
                // A NIC takes what is for its own address.
                let bare = Stream {
                    tunnel: None,
                    ..outer(NODE, PEER)
                };
                [bare.clone(), bare]
            }
            (Path::Wire | Path::TestpmdAfxdp, Direction::Decap) => {
                [outer(PEER, NODE), outer(PEER, NODE)]
            }
            (_, Direction::Encap) => [on_pods_side, outer(NODE, PEER)],
            (_, Direction::Decap) => [outer(PEER, NODE), on_pods_side],
        })
    }

    fn kind(&self) -> SourceKind {
        let plan = &self.setup.plan;
        let at_door = (plan.direction, plan.pod_side) == (Direction::Encap, PodSide::Door);
        match plan.source {
            // Only what makes an skb of each packet gets into a tunnel's device, the kernel's as well as Ripstop's.
            SourceKind::Auto
                if at_door && !matches!(self.setup.path, Path::Wire | Path::TestpmdAfxdp) =>
            {
                SourceKind::AfXdp
            }
            kind @ (SourceKind::Auto
            | SourceKind::AfXdp
            | SourceKind::LiveFrames
            | SourceKind::Pktgen) => kind,
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // The lab takes down what this leaves, only slower.
        drop(peers::withdraw(&self.lab, self.setup.plan.leases));
    }
}

impl Bed for Gateway {
    fn description(&self) -> String {
        let direction = match self.setup.plan.direction {
            Direction::Encap => "encap",
            Direction::Decap => "decap",
        };
        let engines = self
            .engines
            .clone()
            .unwrap_or_else(|| format!("{} to {}", self.source.describe(), self.sink.describe()));
        format!("gateway {direction}: {}; {engines}", self.description)
    }

    fn watched(&self) -> Vec<Watched> {
        vec![ripstop::watched(self.lab.node(NODE))]
    }

    fn trial(&mut self, offer: &Offer) -> Result<Trial> {
        let Setup { plan, path, .. } = &self.setup;
        if offer.work != Work::Packets {
            bail!(
                "a gateway is for packets of the engines: TCP and round trips need the topology \"pods\""
            );
        }
        let [sent, arriving] = self.streams(offer)?;
        let ends = [(&self.source, &sent), (&self.sink, &arriving)];
        let kind = self.kind();
        let before = self.testpmd.as_mut().map(Testpmd::counts).transpose()?;
        let mut trial = packets(&self.setup, &self.lab, ends, offer, kind, &mut self.engines)
            .with_context(|| self.description.clone())?;
        if let (Some(testpmd), Some(before)) = (&mut self.testpmd, before) {
            let after = testpmd.counts()?;
            let ports = after.ports.iter().zip(&before.ports);
            for (name, (now, then)) in ["pod0", "eth0"].into_iter().zip(ports) {
                let lost = now.rx_missed - then.rx_missed + now.tx_dropped - then.tx_dropped;
                if lost > 0 {
                    trial.drops.insert(format!("testpmd.{name}"), lost);
                }
            }
        }
        let at_kernel_s_door = (plan.direction, plan.pod_side, *path)
            == (Direction::Encap, PodSide::Door, Path::Kernel);
        if at_kernel_s_door && offer.destinations > 1 {
            trial.limits.push(Limit::Source(format!(
                "the kernel's tunnel device looks at Ethernet addresses, and the source has one: all packets to {} destinations went to one peer, which is cheaper",
                offer.destinations
            )));
        }
        Ok(trial)
    }
}
