//! Two nodes with a pod each: what pods see of a path.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::meter::Books;
use super::placement::{pass_large_packets, set_offloads_of_receive};
use super::{End, Setup, packets, peers, ripstop, round_trips, settle, tcp};
use crate::address;
use crate::lab::{Fabric, Host, Lab, NodeKind};
use crate::measure::{Bed, Offer, Path, SourceKind, Stream, Trial, Watched, Work};

const NODES: [u8; 2] = [1, peers::NEAR];
/// Inner source ports of packets begin here.
const FIRST_PORT: u16 = 10_000;

struct Pods {
    lab: Lab,
    setup: Setup,
    description: String,
    engines: Option<String>,
}

pub(super) fn open(setup: Setup) -> Result<Box<dyn Bed>> {
    let sides: u8 = if setup.placement.one_sided { 1 } else { 2 };
    let is_busy = setup.dataplane.get("polling") == Some(&Value::from("busy"));
    ensure!(
        setup.path != Path::Ripstop || !is_busy || setup.placement.has_room_for_busy(sides.into()),
        "workers that poll busily on both nodes leave no CPU for the pods: it takes three CPUs; or measure \"polling\": \"adaptive\", or place Ripstop \"one-sided\""
    );
    let builder = match setup.path {
        Path::Ripstop if sides == 1 => setup
            .builder()
            .ripstop(1)
            .linux(1)
            .queues(setup.placement.queues),
        Path::Ripstop => setup.builder().ripstop(2).queues(setup.placement.queues),
        Path::Kernel | Path::Routing | Path::Wire | Path::TestpmdAfxdp | Path::TestpmdNull => {
            setup.builder().linux(2).queues(setup.placement.queues)
        }
    };
    let lab = setup.up(builder)?;
    let leases = setup.plan.leases;
    if setup.plan.underlay_offloads {
        for index in NODES {
            pass_large_packets(lab.node(index).netns(), "eth0")?;
            pass_large_packets(lab.fabric().netns(), &Fabric::port(index))?;
        }
    }
    let injects = setup.dataplane.get("transmit") == Some(&Value::from("inject"));
    for index in NODES.into_iter().filter(|_node| injects) {
        // Where workers send live frames the switch must take them.
        set_offloads_of_receive(lab.fabric().netns(), &Fabric::port(index))?;
    }
    for index in NODES {
        let node = lab.node(index);
        peers::resolve_next_hops(&lab, node, leases, None)?;
        if node.kind() == NodeKind::PlainLinux {
            peers::program_kernel(&lab, node, leases)?;
        }
    }
    let mut description = setup.describe();
    if setup.path == Path::Ripstop {
        // Without a word on it, neighbours in the lab have different CPUs.
        let cpus = setup.placement.workers.iter().map(|cpu| vec![*cpu]);
        let cpus: Vec<(u8, Vec<usize>)> = NODES.into_iter().zip(cpus).take(sides.into()).collect();
        ripstop::start(&lab, leases, &cpus)?;
        for node in lab.ripstop_nodes() {
            let node = ripstop::describe(node, &setup.dataplane)?;
            description = format!("{description}; {node}");
        }
        if sides == 1 {
            description.push_str("; n2: kernel");
        }
    }
    for index in NODES {
        let netns = lab.node(index).netns();
        if setup.plan.source == SourceKind::LiveFrames {
            set_offloads_of_receive(netns, "pod0")?;
        }
        // What comes from the pod of the one is what the other gets from its NIC.
        let way_in = if index == NODES[0] { "pod0" } else { "eth0" };
        setup.placement.apply(netns, way_in)?;
    }
    let underlay = if setup.plan.underlay_offloads {
        "the underlay passes packets of 64 KB"
    } else {
        "the underlay passes packets of its MTU, as wires do"
    };
    let gro = if injects {
        ", and its switch merges what it can (GRO)"
    } else {
        ""
    };
    description = format!(
        "{description}; {}; {underlay}{gro}",
        setup.placement.describe()
    );
    Ok(Box::new(Pods {
        lab,
        setup,
        description,
        engines: None,
    }))
}

impl Pods {
    fn packets(&mut self, offer: &Offer) -> Result<Trial> {
        let [source, sink] = NODES.map(|node| self.lab.pod(node, 0));
        let stream = Stream {
            to_mac: address::gateway_mac(NODES[0]),
            from_mac: source.mac(),
            from: source.address().into(),
            to: vec![sink.address().into()],
            first_port: FIRST_PORT,
            flows: offer.flows,
            size: offer.size,
            tunnel: None,
        };
        let arriving = Stream {
            to_mac: sink.mac(),
            from_mac: address::gateway_mac(NODES[1]),
            ..stream.clone()
        };
        let end = |pod: &dyn Host, cpu| End::Here {
            netns: pod.netns().clone(),
            interface: "eth0".to_owned(),
            cpu,
        };
        let source = end(source, self.setup.placement.source_cpu());
        let sink = end(sink, self.setup.placement.sink_cpu());
        let ends = [(&source, &stream), (&sink, &arriving)];
        let kind = match self.setup.plan.source {
            // Frames that no skb is made of need a receiver set up for them, which users' packets do without.
            SourceKind::Auto => SourceKind::AfXdp,
            kind @ (SourceKind::AfXdp | SourceKind::LiveFrames | SourceKind::Pktgen) => kind,
        };
        packets(&self.setup, &self.lab, ends, offer, kind, &mut self.engines)
    }

    /// By the kernel's own sockets.
    fn sockets(&mut self, offer: &Offer) -> Result<Trial> {
        let pods: [&dyn Host; 2] = NODES.map(|node| self.lab.pod(node, 0) as &dyn Host);
        let placement = &self.setup.placement;
        let cpus = [placement.source, placement.sink];
        let mut trial = Trial::default();
        let before = Books::read(&self.lab)?;
        let (duration, rate) = (offer.duration, offer.rate);
        if offer.work == Work::Tcp {
            tcp::run(pods, offer.flows, duration, cpus, &mut trial)?;
        } else {
            round_trips::run(pods, rate, offer.size, duration, cpus, &mut trial)?;
        }
        let after = Books::read(&self.lab)?;
        settle(&self.setup, [&before, &after], &mut trial)?;
        self.engines = Some(match offer.work {
            Work::Tcp => format!("{} TCP streams, a thread at each end", offer.flows),
            Work::RoundTrips | Work::Packets => {
                "UDP requests one at a time, both ends asleep in between".to_owned()
            }
        });
        Ok(trial)
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        // The lab takes down what this leaves, only slower.
        drop(peers::withdraw(&self.lab, self.setup.plan.leases));
    }
}

impl Bed for Pods {
    fn description(&self) -> String {
        let engines = self.engines.as_deref().unwrap_or("n1p0 to n2p0");
        format!("pods: {}; {engines}", self.description)
    }

    fn watched(&self) -> Vec<Watched> {
        NODES
            .map(|node| ripstop::watched(self.lab.node(node)))
            .into()
    }

    fn trial(&mut self, offer: &Offer) -> Result<Trial> {
        ensure!(
            offer.destinations == 1,
            "between two pods there is 1 destination, not {}",
            offer.destinations
        );
        let trial = match offer.work {
            Work::Packets => self.packets(offer),
            Work::Tcp | Work::RoundTrips => self.sockets(offer),
        };
        trial.with_context(|| self.description.clone())
    }
}
