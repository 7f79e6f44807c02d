//! Leases: which node owns which pod subnet, and where sources of them plug in.
//!
//! A source is a stream of *whole* sets. Nobody downstream ever sees "lease added" or "lease removed":
//! what changed is always the difference of two sets, so a lost event can delay a change but not lose it.

#[cfg(feature = "clusters")]
mod backoff;
#[cfg(feature = "clusters")]
mod claims;
#[cfg(feature = "clusters")]
pub mod etcd;
pub mod file;
#[cfg(feature = "clusters")]
pub mod kept;
#[cfg(feature = "clusters")]
mod kernel;
#[cfg(feature = "clusters")]
pub mod kube;
#[cfg(feature = "clusters")]
mod told;

use core::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Sender;
use ipnet::IpNet;

use crate::family::{Family, PerFamily};
use crate::mac::Mac;
use crate::sys::Wake;

/// One node's claim on a pod subnet of one address family, with what others need to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Name of the node, which has a lease in each family.
    pub node: Arc<str>,
    /// Address of the node on the underlay: the outer address of its tunnel packets.
    pub public_ip: IpAddr,
    /// Pod subnet, host bits clear; of the same family as the address.
    pub subnet: IpNet,
    /// Ethernet address of the node's tunnel end point; VXLAN alone has one.
    pub vtep_mac: Option<Mac>,
}

impl Lease {
    /// The node's own address in its subnet (`.0`): address of its tunnel device and source of its host traffic.
    pub fn vtep_ip(&self) -> IpAddr {
        self.subnet.network()
    }

    /// Its address family.
    pub fn family(&self) -> Family {
        Family::of_net(self.subnet)
    }
}

/// A complete, checked view of the cluster: our own leases and everyone else's, sorted by subnet.
///
/// Holding one means that no two subnets overlap and no VTEP MAC, node name or own identity is doubtful.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSet {
    /// This node's leases: one for each family that is on.
    pub own: PerFamily<Option<Lease>>,
    /// All other leases, sorted by subnet, IPv4 first.
    pub peers: Vec<Lease>,
}

impl LeaseSet {
    /// This node's lease of a family.
    pub fn own(&self, family: Family) -> Option<&Lease> {
        self.own.get(family).as_ref()
    }

    /// The other nodes' leases of a family.
    pub fn peers(&self, family: Family) -> impl Iterator<Item = &Lease> {
        self.peers
            .iter()
            .filter(move |lease| lease.family() == family)
    }

    /// Number of leases, our own included.
    pub fn count(&self) -> usize {
        self.peers.len() + self.own.iter().filter(|(_, own)| own.is_some()).count()
    }
}

/// Why an address cannot be a node's public IP; nothing if it can.
pub(crate) fn public_ip_problem(address: IpAddr) -> Option<&'static str> {
    let is_broadcast = address == IpAddr::V4(core::net::Ipv4Addr::BROADCAST);
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast {
        return Some("cannot be the address of a node: use its underlay address");
    }
    match address {
        IpAddr::V6(address)
            if address.is_unicast_link_local() || address.to_ipv4_mapped().is_some() =>
        {
            Some("does not lead to one node from everywhere: use a global or unique local address")
        }
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

/// What makes an Ethernet address unfit for a tunnel end point; nothing if it is fit.
pub(crate) fn vtep_mac_problem(mac: Mac) -> Option<&'static str> {
    match (mac.is_zero(), mac.is_multicast()) {
        (true, _) => Some("zero"),
        (_, true) => Some("a group address"),
        (false, false) => None,
    }
}

/// What a source reports.
#[derive(Debug)]
pub enum LeaseEvent {
    /// A whole set replaces the one before.
    Set {
        /// The set.
        leases: Arc<LeaseSet>,
        /// When the source saw the change, to measure how long it takes to take effect.
        seen: Instant,
    },
    /// The source cannot give a set; the last one stays in force.
    Failed(String),
    /// The source works again, with the set that is already in force.
    Recovered,
}

/// Where a source puts its events: a queue that also wakes the main loop.
#[derive(Debug, Clone)]
pub struct LeaseSink {
    queue: Sender<LeaseEvent>,
    wake: Arc<Wake>,
}

impl LeaseSink {
    /// Makes a sink that feeds `queue` and signals `wake` after each event.
    pub fn new(queue: Sender<LeaseEvent>, wake: Arc<Wake>) -> Self {
        Self { queue, wake }
    }

    /// Hands over one event; false when nobody listens any more and the source should end.
    pub fn send(&self, event: LeaseEvent) -> bool {
        let delivered = self.queue.send(event).is_ok();
        self.wake.signal();
        delivered
    }
}

/// A stream of whole lease sets: a file, the Kubernetes API or etcd.
pub trait LeaseSource: Send {
    /// What to call the source in logs and status.
    fn describe(&self) -> String;

    /// Runs on a thread of its own until the sink is closed. Transient trouble is reported, not fatal.
    fn run(self: Box<Self>, sink: &LeaseSink);
}
