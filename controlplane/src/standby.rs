//! The standby path: the kernel's own VXLAN device, complete at all times, as flannel would leave it.
//!
//! ```text
//!   pod packet ─► main table: 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink
//!                     ─► neighbour 10.244.2.0 = VTEP MAC of n2 (permanent)
//!                         ─► forwarding entry VTEP MAC = public IP of n2 (permanent) ─► wire
//! ```
//!
//! [`Desired`] says what has to be there, [`Actual`] what is; [`device_ops`] and [`peer_ops`] are their difference,
//! pure. Flannel's routes carry protocol `boot`, which everyone's do; ours carry [`PROTOCOL`], so that ours, when
//! stale, can be told from an operator's. Routes of exactly flannel's shape on the same device are taken over.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::time::Instant;

use hashbrown::{HashMap, HashSet};
use ipnet::Ipv4Net;

use crate::interface::Underlay;
use crate::lease::LeaseSet;
use crate::mac::Mac;
use crate::netconf::NetConf;
use crate::netlink::message::{
    self, Address, FdbEntry, Link, Neighbour, Reachability, Route, RouteFilter, VxlanLink,
};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};

/// Route protocol number of everything Ripstop puts into routing tables ('R'); unused in iproute2's rt_protos.
pub const PROTOCOL: u8 = 82;
/// The main routing table.
pub const TABLE_MAIN: u32 = 254;
/// Outer IPv4, UDP and VXLAN headers and the inner Ethernet header: what a packet grows by.
pub const OVERHEAD: u32 = 50;
/// `RTPROT_BOOT`, which flannel's routes carry.
const PROTOCOL_BOOT: u8 = 3;

/// What the kernel has to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Name of the VXLAN device.
    pub name: String,
    /// Its settings.
    pub vxlan: VxlanLink,
    /// Its MTU, which is also that of the pods.
    pub mtu: u32,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its address, as a /32.
    pub address: Ipv4Addr,
    /// The pod network: other addresses of the device inside it are leftovers.
    pub network: Ipv4Net,
    /// The other nodes.
    pub peers: Vec<Peer>,
}

/// What one other node needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its pod subnet.
    pub subnet: Ipv4Net,
    /// Its VTEP MAC.
    pub mac: Mac,
    /// Its outer address.
    pub public_ip: Ipv4Addr,
}

impl Peer {
    /// The node's own address in its subnet, the next hop of the route.
    pub fn vtep_ip(&self) -> Ipv4Addr {
        self.subnet.network()
    }

    fn route(&self, link: u32) -> Route {
        Route {
            table: TABLE_MAIN,
            destination: self.subnet,
            link,
            gateway: Some(self.vtep_ip()),
            onlink: true,
            source: None,
            protocol: PROTOCOL,
            scope: 0,
            priority: 0,
        }
    }
}

/// MTU of the pods and of the tunnel devices.
pub fn pod_mtu(conf: &NetConf, underlay: &Underlay) -> u32 {
    conf.vxlan
        .mtu
        .unwrap_or(underlay.mtu)
        .saturating_sub(OVERHEAD)
}

/// Name of the VXLAN device for a network identifier.
pub fn device_name(vni: u32) -> String {
    format!("flannel.{vni}")
}

impl Desired {
    /// Derives the kernel's state from the leases, the configuration and the interface.
    pub fn new(leases: &LeaseSet, conf: &NetConf, underlay: &Underlay) -> Self {
        let peer = |lease: &crate::lease::Lease| Peer {
            subnet: lease.subnet,
            mac: lease.vtep_mac,
            public_ip: lease.public_ip,
        };
        Self {
            name: device_name(conf.vxlan.vni),
            vxlan: VxlanLink {
                vni: conf.vxlan.vni,
                link: underlay.index,
                local: Some(leases.own.public_ip),
                port: conf.vxlan.port,
                learning: conf.vxlan.learning,
                ..VxlanLink::default()
            },
            mtu: pod_mtu(conf, underlay),
            mac: leases.own.vtep_mac,
            address: leases.own.vtep_ip(),
            network: conf.network,
            peers: leases.peers.iter().map(peer).collect(),
        }
    }
}

/// One change to the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceOp {
    /// Remove a device that cannot become ours.
    Delete {
        /// Its index.
        index: u32,
        /// What differs.
        why: &'static str,
    },
    /// Make the device.
    Create,
    /// Correct the Ethernet address.
    SetMac(u32),
    /// Correct the MTU.
    SetMtu(u32),
    /// Correct learning.
    SetLearning(u32),
    /// Add the device's address.
    AddAddress(u32),
    /// Remove a leftover address.
    DeleteAddress(u32, Ipv4Net),
    /// Set it up.
    SetUp(u32),
}

impl DeviceOp {
    fn request(&self, desired: &Desired) -> Request {
        match self {
            Self::Delete { index, .. } => message::delete_link(*index),
            Self::Create => {
                message::create_vxlan(&desired.name, &desired.vxlan, desired.mtu, desired.mac)
            }
            Self::SetMac(index) => message::set_mac(*index, desired.mac),
            Self::SetMtu(index) => message::set_mtu(*index, desired.mtu),
            Self::SetLearning(index) => message::set_vxlan_learning(*index, desired.vxlan.learning),
            Self::AddAddress(index) => message::add_address(*index, host(desired.address)),
            Self::DeleteAddress(index, net) => message::delete_address(*index, *net),
            Self::SetUp(index) => message::set_up(*index),
        }
    }
}

fn host(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::new_assert(address, 32)
}

/// Why an existing device of the name cannot be kept: what flannel compares, and what makes a device unusable.
fn incompatible(link: &Link, desired: &Desired) -> Option<&'static str> {
    let Some(actual) = &link.vxlan else {
        return Some("is not a VXLAN device");
    };
    let wanted = &desired.vxlan;
    if actual.external {
        return Some("takes its settings per packet");
    }
    if actual.vni != wanted.vni {
        return Some("has another VNI");
    }
    if actual.link != wanted.link && actual.link != 0 {
        return Some("is bound to another interface");
    }
    if actual.local != wanted.local {
        return Some("has another local address");
    }
    if actual.group != wanted.group {
        return Some("has a multicast group or default remote");
    }
    if actual.l2_miss != wanted.l2_miss {
        return Some("reports unknown destinations");
    }
    if actual.port != wanted.port {
        return Some("has another UDP port");
    }
    if actual.gbp != wanted.gbp {
        return Some("has the group policy extension");
    }
    None
}

/// What has to happen to the device. After `Delete` or `Create`, look again.
pub fn device_ops(desired: &Desired, link: Option<&Link>, addresses: &[Address]) -> Vec<DeviceOp> {
    let Some(link) = link else {
        return vec![DeviceOp::Create];
    };
    if let Some(why) = incompatible(link, desired) {
        return vec![
            DeviceOp::Delete {
                index: link.index,
                why,
            },
            DeviceOp::Create,
        ];
    }
    let mut ops = Vec::new();
    let on_device = |address: &&Address| address.link == link.index;
    if link.mac != Some(desired.mac) {
        ops.push(DeviceOp::SetMac(link.index));
    }
    if link.mtu != desired.mtu {
        ops.push(DeviceOp::SetMtu(link.index));
    }
    if link
        .vxlan
        .as_ref()
        .is_some_and(|vxlan| vxlan.learning != desired.vxlan.learning)
    {
        ops.push(DeviceOp::SetLearning(link.index));
    }
    let wanted = host(desired.address);
    if !addresses
        .iter()
        .filter(on_device)
        .any(|address| address.net == wanted)
    {
        ops.push(DeviceOp::AddAddress(link.index));
    }
    for address in addresses.iter().filter(on_device) {
        if address.net != wanted && desired.network.contains(&address.net.addr()) {
            ops.push(DeviceOp::DeleteAddress(link.index, address.net));
        }
    }
    if !link.up {
        ops.push(DeviceOp::SetUp(link.index));
    }
    ops
}

/// What the kernel holds on the device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual {
    /// Routes of the main table through the device.
    pub routes: Vec<Route>,
    /// Neighbours on the device.
    pub neighbours: Vec<Neighbour>,
    /// Forwarding entries of the device.
    pub fdb: Vec<FdbEntry>,
}

impl Actual {
    /// Takes a picture of the device with index `link`.
    pub fn read(netlink: &mut Netlink, link: u32) -> Result<Self, NetlinkError> {
        Ok(Self {
            routes: netlink.routes(RouteFilter {
                table: TABLE_MAIN,
                link,
            })?,
            neighbours: netlink.neighbours(link)?,
            fdb: netlink.fdb(link)?,
        })
    }
}

/// One change to the entries on the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerOp {
    /// Install a neighbour.
    SetNeighbour(Ipv4Addr, Mac),
    /// Install a forwarding entry.
    SetFdb(Mac, Ipv4Addr),
    /// Install a route.
    SetRoute(Route),
    /// Remove a stale route.
    DeleteRoute(Route),
    /// Remove a stale neighbour.
    DeleteNeighbour(Ipv4Addr),
    /// Remove a stale forwarding entry.
    DeleteFdb(Mac),
}

impl PeerOp {
    fn request(&self, link: u32) -> Request {
        match self {
            Self::SetNeighbour(address, mac) => message::replace_neighbour(link, *address, *mac),
            Self::SetFdb(mac, remote) => message::replace_fdb(link, *mac, *remote),
            Self::SetRoute(route) => message::replace_route(route),
            Self::DeleteRoute(route) => message::delete_route(route),
            Self::DeleteNeighbour(address) => message::delete_neighbour(link, *address),
            Self::DeleteFdb(mac) => message::delete_fdb(link, *mac),
        }
    }

    /// The entry is gone already, which is what was wanted.
    fn is_fulfilled_by(&self, refusal: &Refusal) -> bool {
        match self {
            Self::DeleteRoute(_) | Self::DeleteNeighbour(_) | Self::DeleteFdb(_) => {
                matches!(refusal.errno, libc::ESRCH | libc::ENOENT)
            }
            Self::SetNeighbour(..) | Self::SetFdb(..) | Self::SetRoute(_) => false,
        }
    }
}

impl core::fmt::Display for PeerOp {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::SetNeighbour(address, mac) => write!(f, "set neighbour {address} to {mac}"),
            Self::SetFdb(mac, remote) => write!(f, "set forwarding entry {mac} to {remote}"),
            Self::SetRoute(route) => write!(f, "set route {}", route.destination),
            Self::DeleteRoute(route) => write!(f, "delete route {}", route.destination),
            Self::DeleteNeighbour(address) => write!(f, "delete neighbour {address}"),
            Self::DeleteFdb(mac) => write!(f, "delete forwarding entry {mac}"),
        }
    }
}

/// The route is one that we, or flannel on this device, installed.
pub fn is_ours(route: &Route) -> bool {
    let of_flannels_shape = route.protocol == PROTOCOL_BOOT
        && route.priority == 0
        && route.onlink
        && route.gateway == Some(route.destination.network());
    route.protocol == PROTOCOL || of_flannels_shape
}

/// What has to change on the device with index `link`.
pub fn peer_ops(peers: &[Peer], link: u32, actual: &Actual) -> Vec<PeerOp> {
    let neighbours: HashMap<Ipv4Addr, &Neighbour> = actual
        .neighbours
        .iter()
        .map(|neighbour| (neighbour.address, neighbour))
        .collect();
    let fdb: HashMap<Mac, &FdbEntry> = actual.fdb.iter().map(|entry| (entry.mac, entry)).collect();
    let routes: HashMap<(Ipv4Net, u32), &Route> = actual
        .routes
        .iter()
        .map(|route| ((route.destination, route.priority), route))
        .collect();
    let mut ops = Vec::new();
    // Flannel's order: the route comes last, so that a packet that finds it finds the rest.
    for peer in peers {
        let known = neighbours.get(&peer.vtep_ip());
        if !known.is_some_and(|entry| {
            entry.mac == Some(peer.mac) && entry.state == Reachability::Permanent
        }) {
            ops.push(PeerOp::SetNeighbour(peer.vtep_ip(), peer.mac));
        }
        if !fdb
            .get(&peer.mac)
            .is_some_and(|entry| entry.remote == peer.public_ip && entry.permanent)
        {
            ops.push(PeerOp::SetFdb(peer.mac, peer.public_ip));
        }
        let route = peer.route(link);
        if routes.get(&(peer.subnet, 0)) != Some(&&route) {
            ops.push(PeerOp::SetRoute(route));
        }
    }
    let subnets: HashSet<Ipv4Net> = peers.iter().map(|peer| peer.subnet).collect();
    let addresses: HashSet<Ipv4Addr> = peers.iter().map(Peer::vtep_ip).collect();
    let macs: HashSet<Mac> = peers.iter().map(|peer| peer.mac).collect();
    for route in &actual.routes {
        if is_ours(route) && !(subnets.contains(&route.destination) && route.priority == 0) {
            ops.push(PeerOp::DeleteRoute(route.clone()));
        }
    }
    for neighbour in &actual.neighbours {
        if neighbour.state == Reachability::Permanent && !addresses.contains(&neighbour.address) {
            ops.push(PeerOp::DeleteNeighbour(neighbour.address));
        }
    }
    for entry in &actual.fdb {
        if entry.permanent && !macs.contains(&entry.mac) {
            ops.push(PeerOp::DeleteFdb(entry.mac));
        }
    }
    ops
}

/// What was done to the entries on the device.
#[derive(Debug, Default)]
pub struct PeerOutcome {
    /// Entries changed.
    pub changed: usize,
    /// Entries that the kernel refused, explained.
    pub refused: Vec<String>,
    /// Changes that the budget left for the next time.
    pub remaining: usize,
}

/// What a round did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Changes to the device.
    pub device_changes: Vec<DeviceOp>,
    /// Changes to the entries on it.
    pub peers: PeerOutcome,
}

impl Outcome {
    /// Something was not as it should be.
    pub fn changed(&self) -> bool {
        !self.device_changes.is_empty() || self.peers.changed > 0
    }
}

/// Why the standby cannot be brought about at all.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// Talking to the kernel failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The device cannot be had as it should be.
    #[error("standby device {name}: {op:?}: {refusal}{hint}")]
    Device {
        /// Name of the device.
        name: String,
        /// What was tried.
        op: DeviceOp,
        /// The kernel's answer.
        refusal: Refusal,
        /// What to do about it.
        hint: &'static str,
    },
    /// Somebody undoes every change at once.
    #[error(
        "standby device {name} does not stay as it is set: another program changes it; stop flanneld or exclude the device from the network manager"
    )]
    Contended {
        /// Name of the device.
        name: String,
    },
}

/// Rounds that a device may take: remove, make, set up, and one to see that it is right.
const DEVICE_ROUNDS: usize = 4;

/// Brings the device to the desired state; its index, and what was changed.
pub fn reconcile_device(
    netlink: &mut Netlink,
    desired: &Desired,
) -> Result<(u32, Vec<DeviceOp>), StandbyError> {
    let mut changes = Vec::new();
    for _ in 0..DEVICE_ROUNDS {
        let links = netlink.links()?;
        let link = links.iter().find(|link| link.name == desired.name);
        let addresses = match link {
            Some(_) => netlink.addresses()?,
            None => Vec::new(),
        };
        let ops = device_ops(desired, link, &addresses);
        if let (Some(link), true) = (link, ops.is_empty()) {
            return Ok((link.index, changes));
        }
        for op in ops {
            if let Err(refusal) = netlink.execute_one(op.request(desired))? {
                let hint = match (&op, refusal.errno) {
                    (DeviceOp::Create, libc::EEXIST) => {
                        ": another VXLAN device has this VNI and port; remove it, or change Backend.VNI"
                    }
                    (DeviceOp::Create, libc::EOPNOTSUPP) => {
                        ": the kernel lacks VXLAN; load the module vxlan"
                    }
                    (DeviceOp::SetMtu(_), _) => {
                        ": the MTU is more than the underlay allows; lower Backend.MTU"
                    }
                    _ => "",
                };
                return Err(StandbyError::Device {
                    name: desired.name.clone(),
                    op,
                    refusal,
                    hint,
                });
            }
            changes.push(op);
        }
    }
    Err(StandbyError::Contended {
        name: desired.name.clone(),
    })
}

/// Requests made between two looks at the clock.
const SLICE: usize = 1024;

/// Brings the entries on the device with index `link` to the desired state, as far as `budget` allows.
///
/// The kernel keeps routes that differ only in their gateway in one hash chain (net/ipv4/fib_semantics.c,
/// `fib_info_hashfn_1`), so the first programming of 15,000 peers takes it seconds. Others must not wait that long.
pub fn reconcile_peers(
    netlink: &mut Netlink,
    desired: &Desired,
    link: u32,
    budget: Duration,
) -> Result<PeerOutcome, NetlinkError> {
    let start = Instant::now();
    let ops = peer_ops(&desired.peers, link, &Actual::read(netlink, link)?);
    let mut outcome = PeerOutcome {
        remaining: ops.len(),
        ..PeerOutcome::default()
    };
    for slice in ops.chunks(SLICE) {
        let requests: Vec<Request> = slice.iter().map(|op| op.request(link)).collect();
        let failures = netlink.execute(&requests)?;
        outcome.remaining -= slice.len();
        outcome.changed += slice.len() - failures.len();
        let refused = failures
            .iter()
            .filter(|failure| !slice[failure.index].is_fulfilled_by(&failure.refusal));
        outcome.refused.extend(
            refused.map(|failure| format!("{}: {}", slice[failure.index], failure.refusal)),
        );
        if start.elapsed() >= budget {
            break;
        }
    }
    Ok(outcome)
}

/// Brings the kernel to the desired state, as far as `budget` allows; does nothing where it is there already. Returns
/// the index of the device.
pub fn reconcile(
    netlink: &mut Netlink,
    desired: &Desired,
    budget: Duration,
) -> Result<(u32, Outcome), StandbyError> {
    let (link, device_changes) = reconcile_device(netlink, desired)?;
    let peers = reconcile_peers(netlink, desired, link, budget)?;
    Ok((
        link,
        Outcome {
            device_changes,
            peers,
        },
    ))
}

/// Settings of the device that live under `/proc/sys`, best effort: a container may have it read-only.
pub fn reconcile_sysctls(name: &str) {
    // Router advertisements from inside the tunnel must not configure the node.
    write_sysctl(&format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
    relax_reverse_path(name);
}

/// Lets packets in although the route back leads through the other of the two paths.
///
/// The kernel applies the larger of the values for `all` and for the device: 0 leaves the decision to `all`, and
/// where that is strict (1), only 2 (loose) wins against it.
pub fn relax_reverse_path(name: &str) {
    let all = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter").unwrap_or_default();
    let wanted = if all.trim() == "1" { "2" } else { "0" };
    write_sysctl(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), wanted);
}

/// Writes a setting that is not there yet.
fn write_sysctl(path: &str, wanted: &str) {
    match std::fs::read_to_string(path) {
        Ok(present) if present.trim() != wanted => {
            if let Err(error) = std::fs::write(path, wanted) {
                tracing::debug!(path, wanted, %error, "sysctl not written");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINK: u32 = 7;

    fn peer(n: u8) -> Peer {
        Peer {
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, n, 0), 24),
            mac: Mac([2, 0x52, 0x53, 0, 0, n]),
            public_ip: Ipv4Addr::new(10, 199, 0, n),
        }
    }

    fn desired() -> Desired {
        Desired {
            name: "flannel.1".to_owned(),
            vxlan: VxlanLink {
                vni: 1,
                link: 2,
                local: Some(Ipv4Addr::new(10, 199, 0, 1)),
                port: 8472,
                ..VxlanLink::default()
            },
            mtu: 1450,
            mac: Mac([2, 0x52, 0x53, 0, 0, 1]),
            address: Ipv4Addr::new(10, 244, 1, 0),
            network: "10.244.0.0/16".parse().unwrap(),
            peers: vec![peer(2), peer(3)],
        }
    }

    fn made(desired: &Desired) -> (Link, Vec<Address>) {
        let link = Link {
            index: LINK,
            name: desired.name.clone(),
            mac: Some(desired.mac),
            mtu: desired.mtu,
            up: true,
            running: true,
            loopback: false,
            vxlan: Some(desired.vxlan.clone()),
        };
        (link, vec![address("10.244.1.0/32")])
    }

    fn address(net: &str) -> Address {
        let net = net.parse().unwrap();
        Address {
            link: LINK,
            net,
            global: true,
            permanent: true,
            secondary: false,
            deprecated: false,
        }
    }

    #[test]
    fn a_right_device_is_left_alone() {
        let desired = desired();
        let (link, addresses) = made(&desired);
        assert_eq!(device_ops(&desired, Some(&link), &addresses), []);
        // Bound to no interface at all is compatible for flannel, too.
        let mut unbound = link;
        unbound.vxlan.as_mut().unwrap().link = 0;
        assert_eq!(device_ops(&desired, Some(&unbound), &addresses), []);
    }

    #[test]
    fn small_differences_are_corrected_and_large_ones_make_it_anew() {
        let desired = desired();
        assert_eq!(device_ops(&desired, None, &[]), [DeviceOp::Create]);
        type Change = fn(&mut Link);
        let in_place: [(Change, DeviceOp); 4] = [
            (|link| link.mtu = 1400, DeviceOp::SetMtu(LINK)),
            (
                |link| link.mac = Some(Mac([2, 9, 9, 9, 9, 9])),
                DeviceOp::SetMac(LINK),
            ),
            (|link| link.up = false, DeviceOp::SetUp(LINK)),
            (
                |link| link.vxlan.as_mut().unwrap().learning = true,
                DeviceOp::SetLearning(LINK),
            ),
        ];
        for (change, expected) in in_place {
            let (mut link, addresses) = made(&desired);
            change(&mut link);
            assert_eq!(device_ops(&desired, Some(&link), &addresses), [expected]);
        }
        let anew: [Change; 9] = [
            |link| link.vxlan = None,
            |link| link.vxlan.as_mut().unwrap().vni = 2,
            |link| link.vxlan.as_mut().unwrap().link = 3,
            |link| link.vxlan.as_mut().unwrap().local = None,
            |link| link.vxlan.as_mut().unwrap().group = Some(Ipv4Addr::new(239, 1, 1, 1)),
            |link| link.vxlan.as_mut().unwrap().l2_miss = true,
            |link| link.vxlan.as_mut().unwrap().port = 4789,
            |link| link.vxlan.as_mut().unwrap().gbp = true,
            |link| link.vxlan.as_mut().unwrap().external = true,
        ];
        for change in anew {
            let (mut link, addresses) = made(&desired);
            change(&mut link);
            let ops = device_ops(&desired, Some(&link), &addresses);
            assert!(
                matches!(
                    ops[..],
                    [DeviceOp::Delete { index: LINK, .. }, DeviceOp::Create]
                ),
                "{ops:?}"
            );
        }
    }

    #[test]
    fn leftover_addresses_of_the_network_go_and_others_stay() {
        let desired = desired();
        let (link, _) = made(&desired);
        let addresses = [address("10.244.9.0/32"), address("192.168.0.1/24")];
        let leftover = DeviceOp::DeleteAddress(LINK, "10.244.9.0/32".parse().unwrap());
        assert_eq!(
            device_ops(&desired, Some(&link), &addresses),
            [DeviceOp::AddAddress(LINK), leftover]
        );
    }

    #[test]
    fn flannels_routes_are_taken_over_and_an_operators_stay() {
        let flannels = |n| Route {
            protocol: PROTOCOL_BOOT,
            ..peer(n).route(LINK)
        };
        let operators = Route {
            protocol: 4,
            ..peer(200).route(LINK)
        };
        let shortcut = Route {
            protocol: PROTOCOL_BOOT,
            gateway: None,
            ..peer(201).route(LINK)
        };
        let actual = Actual {
            routes: vec![flannels(2), flannels(9), operators, shortcut],
            ..Actual::default()
        };
        let ops = peer_ops(&[peer(2)], LINK, &actual);
        assert!(ops.contains(&PeerOp::SetRoute(peer(2).route(LINK))));
        let deleted: Vec<_> = ops
            .iter()
            .filter(|op| matches!(op, PeerOp::DeleteRoute(_)))
            .collect();
        assert_eq!(deleted, [&PeerOp::DeleteRoute(flannels(9))]);
    }

    /// What the kernel does with the requests.
    fn apply(actual: &mut Actual, ops: &[PeerOp]) {
        for op in ops {
            match op {
                PeerOp::SetNeighbour(address, mac) => {
                    actual.neighbours.retain(|entry| entry.address != *address);
                    let state = Reachability::Permanent;
                    actual.neighbours.push(Neighbour {
                        link: LINK,
                        address: *address,
                        mac: Some(*mac),
                        state,
                    });
                }
                PeerOp::SetFdb(mac, remote) => {
                    actual.fdb.retain(|entry| entry.mac != *mac);
                    actual.fdb.push(FdbEntry {
                        link: LINK,
                        mac: *mac,
                        remote: *remote,
                        permanent: true,
                    });
                }
                PeerOp::SetRoute(route) => {
                    let key = (route.destination, route.priority);
                    actual
                        .routes
                        .retain(|other| (other.destination, other.priority) != key);
                    actual.routes.push(route.clone());
                }
                PeerOp::DeleteRoute(route) => actual.routes.retain(|other| other != route),
                PeerOp::DeleteNeighbour(address) => {
                    actual.neighbours.retain(|entry| entry.address != *address);
                }
                PeerOp::DeleteFdb(mac) => actual.fdb.retain(|entry| entry.mac != *mac),
            }
        }
    }

    fn any_peers() -> impl Strategy<Value = Vec<Peer>> {
        // Subnet, MAC and address vary independently, so that each of them moves between nodes.
        proptest::collection::vec((0..8u8, 0..8u8, 0..4u8), 0..8).prop_map(|entries| {
            let mut peers: Vec<Peer> = Vec::new();
            for (subnet, mac, ip) in entries {
                let next = Peer {
                    subnet: peer(subnet).subnet,
                    mac: peer(mac).mac,
                    public_ip: peer(ip).public_ip,
                };
                if !peers
                    .iter()
                    .any(|other| other.subnet == next.subnet || other.mac == next.mac)
                {
                    peers.push(next);
                }
            }
            peers
        })
    }

    fn any_actual() -> impl Strategy<Value = Actual> {
        let routes =
            proptest::collection::hash_map((0..10u8, 0..2u32), (0..3u8, any::<bool>()), 0..8);
        let states = prop_oneof![
            Just(Reachability::Permanent),
            Just(Reachability::Stale),
            Just(Reachability::Failed)
        ];
        let neighbours = proptest::collection::hash_map(0..10u8, (0..8u8, states), 0..8);
        let fdb = proptest::collection::hash_map(0..10u8, (0..8u8, any::<bool>()), 0..8);
        (routes, neighbours, fdb).prop_map(|(routes, neighbours, fdb)| Actual {
            routes: routes
                .into_iter()
                .map(|((n, priority), (who, onlink))| Route {
                    protocol: [PROTOCOL, PROTOCOL_BOOT, 4][usize::from(who)],
                    priority,
                    onlink,
                    ..peer(n).route(LINK)
                })
                .collect(),
            neighbours: neighbours
                .into_iter()
                .map(|(n, (mac, state))| Neighbour {
                    link: LINK,
                    address: peer(n).vtep_ip(),
                    mac: Some(peer(mac).mac),
                    state,
                })
                .collect(),
            fdb: fdb
                .into_iter()
                .map(|(mac, (ip, permanent))| FdbEntry {
                    link: LINK,
                    mac: peer(mac).mac,
                    remote: peer(ip).public_ip,
                    permanent,
                })
                .collect(),
        })
    }

    proptest! {
        #[test]
        fn the_difference_applied_is_the_desired_state(peers in any_peers(), before in any_actual()) {
            let mut after = before.clone();
            apply(&mut after, &peer_ops(&peers, LINK, &before));
            prop_assert_eq!(peer_ops(&peers, LINK, &after), []);
            for peer in &peers {
                prop_assert!(after.routes.contains(&peer.route(LINK)));
            }
            // What is not ours and not in the way has survived.
            for route in before.routes.iter().filter(|route| !is_ours(route)) {
                let replaced = peers.iter().any(|peer| peer.subnet == route.destination && route.priority == 0);
                prop_assert_eq!(after.routes.contains(route), !replaced);
            }
            let permanent = after.neighbours.iter().filter(|entry| entry.state == Reachability::Permanent).count();
            prop_assert_eq!(permanent, peers.len());
            prop_assert_eq!(after.fdb.iter().filter(|entry| entry.permanent).count(), peers.len());
        }
    }
}
