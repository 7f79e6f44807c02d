//! The standby path: what the kernel itself needs to carry pod traffic, complete at all times, as flannel would leave
//! it. Once for each address family.
//!
//! ```text
//!   pod packet ─► main table, by the backend:
//!     vxlan    10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink
//!                ─► neighbour 10.244.2.0 = VTEP MAC of n2 (permanent)
//!                    ─► forwarding entry VTEP MAC = public IP of n2 (permanent) ─► wire
//!     ipip     10.244.2.0/24 via 10.199.0.2 dev flannel.ipip onlink
//!     udp      10.244.2.0/24 via 10.199.0.2 dev flannel0 onlink     (ipip in foo-over-UDP)
//!     host-gw  10.244.2.0/24 via 10.199.0.2 dev eth0                (and the direct peers of vxlan and ipip)
//! ```
//!
//! [`Desired`] says what has to be there, [`Actual`] what is; [`device_ops`] and [`peer_ops`] are their difference,
//! pure. Flannel's routes carry protocol `boot`, which everyone's do; ours carry [`PROTOCOL`], so that ours, when
//! stale, can be told from an operator's, on whatever interface they are. Routes of exactly flannel's shape on its
//! own device are taken over.

use core::net::IpAddr;
use core::time::Duration;
use std::path::PathBuf;
use std::time::Instant;

use hashbrown::{HashMap, HashSet};
use ipnet::IpNet;
use ripstop_fib::Dscp;

use crate::family::{Family, host};
use crate::interface::Underlay;
use crate::lease::{Lease, LeaseSet};
use crate::mac::Mac;
use crate::netconf::{Backend, NetConf};
use crate::netlink::message::{
    self, Address, FdbEntry, IpipLink, Link, LinkKind, METRIC_V6_DEFAULT, Neighbour, Reachability,
    Route, RouteFilter, VxlanLink,
};
use crate::netlink::{Failure, Netlink, NetlinkError, Refusal, Request};

/// Route protocol number of everything Ripstop puts into routing tables ('R'); unused in iproute2's rt_protos.
pub const PROTOCOL: u8 = 82;
/// The main routing table.
pub const TABLE_MAIN: u32 = 254;
/// `RTPROT_BOOT`, which flannel's routes carry.
const PROTOCOL_BOOT: u8 = 3;
/// Name of the `ipip` backend's device.
pub const IPIP_DEVICE: &str = "flannel.ipip";
/// Name of the `udp` backend's device.
pub const UDP_DEVICE: &str = "flannel0";

/// What the kernel has to hold for one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Which.
    pub family: Family,
    /// The tunnel device, where the backend has one.
    pub device: Option<Device>,
    /// The other nodes.
    pub peers: Vec<Peer>,
}

/// A tunnel device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its settings.
    pub kind: Kind,
    /// Its MTU, which is also that of the pods.
    pub mtu: u32,
    /// Its Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Its address, alone in its prefix.
    pub address: IpAddr,
    /// The pod network: other addresses of the device inside it are leftovers.
    pub network: IpNet,
}

/// Settings of a tunnel device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// `vxlan`.
    Vxlan(VxlanLink),
    /// `ipip`.
    Ipip(IpipLink),
}

/// What one other node needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its pod subnet.
    pub subnet: IpNet,
    /// Its outer address.
    pub public_ip: IpAddr,
    /// How its packets travel.
    pub via: Via,
}

/// How a node's packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// In VXLAN, to this VTEP MAC.
    Vxlan(Mac),
    /// In a tunnel whose device finds the node by its address.
    Tunnel,
    /// As they are, by this interface.
    Direct {
        /// Its index.
        link: u32,
        /// The node is taken to be on the link.
        onlink: bool,
    },
}

impl Peer {
    /// The node's own address in its subnet, the next hop of a route through VXLAN.
    pub fn vtep_ip(&self) -> IpAddr {
        self.subnet.network()
    }

    /// Its VTEP MAC, if its packets travel in VXLAN.
    fn vtep_mac(&self) -> Option<Mac> {
        match self.via {
            Via::Vxlan(mac) => Some(mac),
            Via::Tunnel | Via::Direct { .. } => None,
        }
    }

    /// Its route; none for one that needs a device where there is none.
    fn route(&self, device: Option<u32>) -> Option<Route> {
        let (link, gateway, onlink) = match self.via {
            Via::Vxlan(_) => (device?, self.vtep_ip(), true),
            Via::Tunnel => (device?, self.public_ip, true),
            Via::Direct { link, onlink } => (link, self.public_ip, onlink),
        };
        Some(Route {
            link,
            gateway: Some(gateway),
            onlink,
            ..Route::to(self.subnet, TABLE_MAIN, PROTOCOL)
        })
    }
}

/// Name of the tunnel device of a family, where the backend has one.
pub fn device_name(backend: Backend, family: Family) -> Option<String> {
    match (backend, family) {
        (Backend::Vxlan(vxlan), Family::V4) => Some(vxlan_name(vxlan.vni)),
        (Backend::Vxlan(vxlan), Family::V6) => Some(vxlan6_name(vxlan.vni)),
        (Backend::Ipip { .. }, Family::V4) => Some(IPIP_DEVICE.to_owned()),
        (Backend::Udp { .. }, Family::V4) => Some(UDP_DEVICE.to_owned()),
        (Backend::Ipip { .. } | Backend::Udp { .. }, Family::V6)
        | (Backend::Alloc | Backend::HostGw, _) => None,
    }
}

fn vxlan_name(vni: u32) -> String {
    format!("flannel.{vni}")
}

fn vxlan6_name(vni: u32) -> String {
    format!("flannel-v6.{vni}")
}

/// Names of the VXLAN devices of a network identifier.
pub fn vxlan_names(vni: u32) -> [String; 2] {
    [vxlan_name(vni), vxlan6_name(vni)]
}

/// The device has a name and a form that some backend would have given it.
pub fn has_our_form(link: &Link) -> bool {
    match &link.kind {
        LinkKind::Vxlan(vxlan) => {
            link.name == vxlan_name(vxlan.vni) || link.name == vxlan6_name(vxlan.vni)
        }
        LinkKind::Ipip(_) => link.name == IPIP_DEVICE || link.name == UDP_DEVICE,
        LinkKind::Other | LinkKind::Vlan(_) | LinkKind::Bond(_) => false,
    }
}

/// The outer TOS in the form that tunnel devices take: a fixed byte, or 1 for "as the inner one".
fn device_tos(dscp: Dscp) -> u8 {
    match dscp {
        Dscp::Fixed(dscp) => dscp << 2,
        Dscp::Inherit => 1,
    }
}

impl Desired {
    /// Derives the kernel's state from the leases, the configuration and the interface. `direct` tells by which
    /// interface a node is reached without the tunnel, if it is. None where the family is off or has no data path.
    pub fn new(
        family: Family,
        leases: &LeaseSet,
        conf: &NetConf,
        underlay: &Underlay,
        direct: impl Fn(&Lease) -> Option<u32>,
    ) -> Option<Self> {
        let (own, network) = (leases.own(family)?, conf.network(family)?);
        let tos = device_tos(conf.dscp);
        let local = match own.public_ip {
            IpAddr::V4(local) => Some(local),
            IpAddr::V6(_) => None,
        };
        let kind = match conf.backend {
            Backend::Alloc => return None,
            Backend::HostGw => None,
            Backend::Vxlan(vxlan) => Some(Kind::Vxlan(VxlanLink {
                vni: vxlan.vni,
                link: underlay.index,
                local: Some(own.public_ip),
                port: vxlan.port,
                tos,
                learning: vxlan.learning,
                gbp: vxlan.gbp,
                ..VxlanLink::default()
            })),
            // The kernel's defaults, as flannel leaves them: TTL and DF of the inner packet.
            Backend::Ipip { .. } => Some(Kind::Ipip(IpipLink {
                local,
                tos,
                ..IpipLink::default()
            })),
            // Flannel's process sends from an ordinary socket: TTL 64 and DF set.
            Backend::Udp { port } => Some(Kind::Ipip(IpipLink {
                local,
                tos,
                ttl: 64,
                path_mtu_discovery: true,
                fou_port: port,
                ..IpipLink::default()
            })),
        };
        let device = device_name(conf.backend, family)
            .zip(kind)
            .map(|(name, kind)| Device {
                name,
                kind,
                mtu: conf.pod_mtu(family, underlay.mtu),
                mac: own.vtep_mac,
                address: own.vtep_ip(),
                network,
            });
        let onlink = matches!(conf.backend, Backend::Ipip { .. });
        let peer = |lease: &Lease| Peer {
            subnet: lease.subnet,
            public_ip: lease.public_ip,
            via: match (conf.backend, direct(lease), lease.vtep_mac) {
                (Backend::HostGw, ..) => Via::Direct {
                    link: underlay.index,
                    onlink,
                },
                (_, Some(link), _) => Via::Direct { link, onlink },
                (_, None, Some(mac)) => Via::Vxlan(mac),
                (_, None, None) => Via::Tunnel,
            },
        };
        Some(Self {
            family,
            device,
            peers: leases.peers(family).map(peer).collect(),
        })
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
    /// Correct those of its settings that can be changed: learning, TOS, TTL, path MTU discovery.
    SetSettings(u32),
    /// Add the device's address.
    AddAddress(u32),
    /// Remove a leftover address.
    DeleteAddress(u32, IpNet),
    /// Set it up.
    SetUp(u32),
}

impl DeviceOp {
    fn request(&self, desired: &Device) -> Request {
        match (self, &desired.kind) {
            (Self::Delete { index, .. }, _) => message::delete_link(*index),
            (Self::Create, Kind::Vxlan(vxlan)) => {
                message::create_vxlan(&desired.name, vxlan, desired.mtu, desired.mac)
            }
            (Self::Create, Kind::Ipip(ipip)) => {
                message::create_ipip(&desired.name, ipip, desired.mtu)
            }
            (Self::SetMac(index), _) => message::set_mac(*index, desired.mac.unwrap_or_default()),
            (Self::SetMtu(index), _) => message::set_mtu(*index, desired.mtu),
            (Self::SetSettings(index), Kind::Vxlan(vxlan)) => message::set_vxlan(*index, vxlan),
            (Self::SetSettings(index), Kind::Ipip(ipip)) => message::set_ipip(*index, ipip),
            (Self::AddAddress(index), _) => message::add_address(*index, host(desired.address)),
            (Self::DeleteAddress(index, net), _) => message::delete_address(*index, *net),
            (Self::SetUp(index), _) => message::set_up(*index),
        }
    }
}

/// Why an existing device of the name cannot be kept: what flannel compares, and what makes a device unusable.
fn incompatible(actual: &LinkKind, wanted: &Kind) -> Option<&'static str> {
    match (actual, wanted) {
        (LinkKind::Vxlan(actual), Kind::Vxlan(wanted)) => incompatible_vxlan(actual, wanted),
        (LinkKind::Ipip(actual), Kind::Ipip(wanted)) => incompatible_ipip(actual, wanted),
        (_, Kind::Vxlan(_)) => Some("is not a VXLAN device"),
        (_, Kind::Ipip(_)) => Some(NOT_IPIP),
    }
}

/// Flannel leaves such a device to the operator, unlike one that is not VXLAN.
const NOT_IPIP: &str = "is not an ipip device";

fn incompatible_vxlan(actual: &VxlanLink, wanted: &VxlanLink) -> Option<&'static str> {
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
        return Some("differs in the group policy extension");
    }
    if actual.zero_checksum6 && wanted.local.is_some_and(|local| local.is_ipv6()) {
        return Some("does without UDP checksums");
    }
    None
}

fn incompatible_ipip(actual: &IpipLink, wanted: &IpipLink) -> Option<&'static str> {
    if actual.external || actual.fou_port != wanted.fou_port {
        return Some("has another encapsulation");
    }
    if actual.local != wanted.local {
        return Some("has another local address");
    }
    if actual.remote.is_some() {
        return Some("has a fixed remote address");
    }
    None
}

/// The settings that can be changed are right.
fn has_right_settings(actual: &LinkKind, wanted: &Kind) -> bool {
    match (actual, wanted) {
        (LinkKind::Vxlan(actual), Kind::Vxlan(wanted)) => {
            (actual.learning, actual.tos) == (wanted.learning, wanted.tos)
        }
        (LinkKind::Ipip(actual), Kind::Ipip(wanted)) => actual == wanted,
        _ => false,
    }
}

/// What has to happen to the device. After `Delete` or `Create`, look again.
pub fn device_ops(desired: &Device, link: Option<&Link>, addresses: &[Address]) -> Vec<DeviceOp> {
    let Some(link) = link else {
        return vec![DeviceOp::Create];
    };
    if let Some(why) = incompatible(&link.kind, &desired.kind) {
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
    if desired.mac.is_some() && link.mac != desired.mac {
        ops.push(DeviceOp::SetMac(link.index));
    }
    if link.mtu != desired.mtu {
        ops.push(DeviceOp::SetMtu(link.index));
    }
    if !has_right_settings(&link.kind, &desired.kind) {
        ops.push(DeviceOp::SetSettings(link.index));
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

/// What the kernel holds for one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual {
    /// Routes of the main table that are ours, and those on the device that may be flannel's.
    pub routes: Vec<Route>,
    /// Neighbours on the device.
    pub neighbours: Vec<Neighbour>,
    /// Forwarding entries of the device.
    pub fdb: Vec<FdbEntry>,
}

impl Actual {
    /// Takes a picture: our own routes, and what is on the device with index `device`.
    pub fn read(
        netlink: &mut Netlink,
        family: Family,
        device: Option<u32>,
    ) -> Result<Self, NetlinkError> {
        let main = RouteFilter::table(family, TABLE_MAIN);
        let mut actual = Self {
            routes: netlink.routes(RouteFilter {
                protocol: PROTOCOL,
                ..main
            })?,
            ..Self::default()
        };
        if let Some(link) = device {
            actual.routes.extend(netlink.routes(RouteFilter {
                link,
                protocol: PROTOCOL_BOOT,
                ..main
            })?);
            actual.neighbours = netlink.neighbours(family, link)?;
            actual.fdb = netlink.fdb(link)?;
        }
        Ok(actual)
    }
}

/// One change to the entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerOp {
    /// Install a neighbour.
    SetNeighbour(IpAddr, Mac),
    /// Install a forwarding entry.
    SetFdb(Mac, IpAddr),
    /// Install a route.
    SetRoute(Route),
    /// Remove a stale route.
    DeleteRoute(Route),
    /// Remove a stale neighbour.
    DeleteNeighbour(IpAddr),
    /// Remove a stale forwarding entry.
    DeleteFdb(Mac),
}

impl PeerOp {
    fn request(&self, device: u32) -> Request {
        match self {
            Self::SetNeighbour(address, mac) => message::replace_neighbour(device, *address, *mac),
            Self::SetFdb(mac, remote) => message::replace_fdb(device, *mac, *remote),
            Self::SetRoute(route) => message::replace_route(route),
            Self::DeleteRoute(route) => message::delete_route(route),
            Self::DeleteNeighbour(address) => message::delete_neighbour(device, *address),
            Self::DeleteFdb(mac) => message::delete_fdb(device, *mac),
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
            Self::SetRoute(route) => {
                write!(f, "set route {}", route.destination)?;
                match route.gateway {
                    Some(gateway) => write!(f, " via {gateway}"),
                    None => Ok(()),
                }
            }
            Self::DeleteRoute(route) => write!(f, "delete route {}", route.destination),
            Self::DeleteNeighbour(address) => write!(f, "delete neighbour {address}"),
            Self::DeleteFdb(mac) => write!(f, "delete forwarding entry {mac}"),
        }
    }
}

/// The route is one that we, or flannel on its device with index `device`, installed.
pub fn is_ours(route: &Route, device: Option<u32>) -> bool {
    let of_flannels_shape = route.protocol == PROTOCOL_BOOT
        && matches!(route.priority, 0 | METRIC_V6_DEFAULT)
        && route.onlink
        && route.gateway == Some(route.destination.network())
        && device == Some(route.link);
    route.protocol == PROTOCOL || of_flannels_shape
}

/// What has to change. Entries of direct peers are on no device of ours, so there need not be one.
pub fn peer_ops(peers: &[Peer], device: Option<u32>, actual: &Actual) -> Vec<PeerOp> {
    let neighbours: HashMap<IpAddr, &Neighbour> = actual
        .neighbours
        .iter()
        .map(|neighbour| (neighbour.address, neighbour))
        .collect();
    let fdb: HashMap<Mac, &FdbEntry> = actual.fdb.iter().map(|entry| (entry.mac, entry)).collect();
    let routes: HashMap<(IpNet, u32), &Route> = actual
        .routes
        .iter()
        .map(|route| ((route.destination, route.priority), route))
        .collect();
    let mut ops = Vec::new();
    let mut wanted: HashSet<(IpNet, u32)> = HashSet::with_capacity(peers.len());
    // Flannel's order: the route comes last, so that a packet that finds it finds the rest.
    for peer in peers {
        if let (Some(mac), Some(_)) = (peer.vtep_mac(), device) {
            let known = neighbours.get(&peer.vtep_ip());
            if !known.is_some_and(|entry| {
                entry.mac == Some(mac) && entry.state == Reachability::Permanent
            }) {
                ops.push(PeerOp::SetNeighbour(peer.vtep_ip(), mac));
            }
            if !fdb
                .get(&mac)
                .is_some_and(|entry| entry.remote == peer.public_ip && entry.permanent)
            {
                ops.push(PeerOp::SetFdb(mac, peer.public_ip));
            }
        }
        let Some(route) = peer.route(device) else {
            continue;
        };
        let key = (route.destination, route.priority);
        wanted.insert(key);
        if routes.get(&key) != Some(&&route) {
            ops.push(PeerOp::SetRoute(route));
        }
    }
    let addresses: HashSet<IpAddr> = peers
        .iter()
        .filter(|peer| peer.vtep_mac().is_some())
        .map(Peer::vtep_ip)
        .collect();
    let macs: HashSet<Mac> = peers.iter().filter_map(Peer::vtep_mac).collect();
    for route in &actual.routes {
        if is_ours(route, device) && !wanted.contains(&(route.destination, route.priority)) {
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
    /// Why the device cannot be had.
    pub device_error: Option<StandbyError>,
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
    /// The kernel has no devices of the kind.
    #[error("standby missing: kernel lacks {kind}; load the module {kind}")]
    NoKind {
        /// The kind.
        kind: &'static str,
    },
    /// The name is taken by something that is not ours to remove.
    #[error("{name} isn't an ipip mode device, please remove device and try again")]
    Foreign {
        /// Name of the device.
        name: String,
    },
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
    desired: &Device,
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
            if matches!(op, DeviceOp::Delete { why: NOT_IPIP, .. }) {
                return Err(StandbyError::Foreign {
                    name: desired.name.clone(),
                });
            }
            if let Err(refusal) = netlink.execute_one(op.request(desired))? {
                return Err(device_error(desired, op, refusal));
            }
            changes.push(op);
        }
    }
    Err(StandbyError::Contended {
        name: desired.name.clone(),
    })
}

fn device_error(desired: &Device, op: DeviceOp, refusal: Refusal) -> StandbyError {
    let kind = match desired.kind {
        Kind::Vxlan(_) => "vxlan",
        Kind::Ipip(_) => "ipip",
    };
    let hint = match (&op, refusal.errno, &desired.kind) {
        (DeviceOp::Create, libc::EOPNOTSUPP, _) => return StandbyError::NoKind { kind },
        (DeviceOp::Create, libc::EEXIST, Kind::Vxlan(_)) => {
            ": another VXLAN device has this VNI and port; remove it, or change Backend.VNI"
        }
        (DeviceOp::Create, libc::EEXIST, Kind::Ipip(_)) => {
            ": another ipip device has this local address and no remote one; remove it"
        }
        (DeviceOp::SetMtu(_), ..) => {
            ": the MTU is more than the underlay allows; lower Backend.MTU"
        }
        _ => "",
    };
    StandbyError::Device {
        name: desired.name.clone(),
        op,
        refusal,
        hint,
    }
}

/// Requests made between two looks at the clock.
const SLICE: usize = 1024;

/// Brings the entries to the desired state, those on the device with index `device` included, as far as `budget`
/// allows.
///
/// The kernel keeps routes that differ only in their gateway in one hash chain (net/ipv4/fib_semantics.c,
/// `fib_info_hashfn_1`), so the first programming of 15,000 peers takes it seconds. Others must not wait that long.
pub fn reconcile_peers(
    netlink: &mut Netlink,
    desired: &Desired,
    device: Option<u32>,
    budget: Duration,
) -> Result<PeerOutcome, NetlinkError> {
    let start = Instant::now();
    let actual = Actual::read(netlink, desired.family, device)?;
    let ops = peer_ops(&desired.peers, device, &actual);
    let mut outcome = PeerOutcome {
        remaining: ops.len(),
        ..PeerOutcome::default()
    };
    for slice in ops.chunks(SLICE) {
        let requests: Vec<Request> = slice
            .iter()
            .map(|op| op.request(device.unwrap_or_default()))
            .collect();
        let mut failures = netlink.execute(&requests)?;
        let mut retried = Vec::new();
        for failure in failures.extract_if(.., |failure| failure.refusal.errno == libc::EINVAL) {
            let bridged = match &slice[failure.index] {
                PeerOp::SetRoute(route) => bridged(netlink, route)?,
                PeerOp::SetNeighbour(..)
                | PeerOp::SetFdb(..)
                | PeerOp::DeleteRoute(_)
                | PeerOp::DeleteNeighbour(_)
                | PeerOp::DeleteFdb(_) => None,
            };
            match bridged {
                Some(Ok(())) => {}
                Some(Err(refusal)) => retried.push(Failure { refusal, ..failure }),
                None => retried.push(failure),
            }
        }
        failures.extend(retried);
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

/// Installs an IPv6 route whose next hop is reached by another interface so far, or tells that it is none of these.
///
/// The kernel takes an `onlink` next hop only if its tables do not lead to it by another device (net/ipv6/route.c,
/// `ip6_route_check_nh_onlink`), and the plain route to be replaced leads to it. So the next hop gets a route of its own
/// first: there is no moment without a route to the subnet.
fn bridged(
    netlink: &mut Netlink,
    route: &Route,
) -> Result<Option<Result<(), Refusal>>, NetlinkError> {
    let (IpNet::V6(_), Some(gateway), true) = (route.destination, route.gateway, route.onlink)
    else {
        return Ok(None);
    };
    let next_hop = Route {
        link: route.link,
        ..Route::to(host(gateway), TABLE_MAIN, PROTOCOL)
    };
    if let Err(refusal) = netlink.execute_one(message::replace_route(&next_hop))? {
        return Ok(Some(Err(refusal)));
    }
    let done = netlink.execute_one(message::replace_route(route))?;
    // Were it to stay, it would be a stale route of ours, which the next round removes.
    let _gone = netlink.execute_one(message::delete_route(&next_hop))?;
    Ok(Some(done))
}

/// Brings the kernel to the desired state, as far as `budget` allows; does nothing where it is there already. Returns
/// the index of the device.
///
/// A device that cannot be had does not keep the direct peers waiting: its error is in the outcome.
pub fn reconcile(
    netlink: &mut Netlink,
    desired: &Desired,
    budget: Duration,
) -> Result<(Option<u32>, Outcome), NetlinkError> {
    let mut outcome = Outcome::default();
    let mut link = None;
    if let Some(device) = &desired.device {
        match reconcile_device(netlink, device) {
            Ok((index, changes)) => {
                link = Some(index);
                outcome.device_changes = changes;
            }
            Err(StandbyError::Netlink(error)) => return Err(error),
            Err(error) => outcome.device_error = Some(error),
        }
    }
    outcome.peers = reconcile_peers(netlink, desired, link, budget)?;
    Ok((link, outcome))
}

/// Devices that another backend left: ours by the account of a control plane before (`known`) or by the routes that
/// lie on them, and none of the `wanted` names.
pub fn stale_devices(
    netlink: &mut Netlink,
    links: &[Link],
    wanted: &[String],
    known: &[String],
) -> Result<Vec<Link>, NetlinkError> {
    let mut stale = Vec::new();
    let candidates = links.iter().filter(|link| has_our_form(link));
    for link in candidates.filter(|link| !wanted.contains(&link.name)) {
        let mut ours = known.contains(&link.name);
        for family in Family::ALL {
            let filter = RouteFilter {
                link: link.index,
                protocol: PROTOCOL,
                ..RouteFilter::table(family, TABLE_MAIN)
            };
            ours = ours || !netlink.routes(filter)?.is_empty();
        }
        if ours {
            stale.push(link.clone());
        }
    }
    Ok(stale)
}

/// Settings of the device that live under `/proc/sys`, best effort: a container may have it read-only.
pub fn reconcile_sysctls(name: &str) {
    // Router advertisements from inside the tunnel must not configure the node.
    write_sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0");
    relax_reverse_path(name);
}

/// Lets packets in although the route back leads through the other of the two paths.
///
/// The kernel applies the larger of the values for `all` and for the device: 0 leaves the decision to `all`, and
/// where that is strict (1), only 2 (loose) wins against it.
pub fn relax_reverse_path(name: &str) {
    let all = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter").unwrap_or_default();
    let wanted = if all.trim() == "1" { "2" } else { "0" };
    write_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), wanted);
}

/// Directory in place of `/proc/sys`, which a container has read-only: the host's, mounted elsewhere.
const SYSCTL_VARIABLE: &str = "RIPSTOP_PROC_SYS";

/// Writes a setting that is not there yet.
fn write_sysctl(path: &str, wanted: &str) {
    let path = std::env::var_os(SYSCTL_VARIABLE)
        .map_or_else(|| PathBuf::from("/proc/sys"), PathBuf::from)
        .join(path);
    match std::fs::read_to_string(&path) {
        Ok(present) if present.trim() != wanted => {
            if let Err(error) = std::fs::write(&path, wanted) {
                tracing::debug!(path = %path.display(), wanted, %error, "sysctl not written");
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
            subnet: format!("10.244.{n}.0/24").parse().unwrap(),
            public_ip: ip(&format!("10.199.0.{n}")),
            via: Via::Vxlan(mac(n)),
        }
    }

    fn mac(n: u8) -> Mac {
        Mac([2, 0x52, 0x53, 0, 0, n])
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn vxlan_route(n: u8) -> Route {
        peer(n).route(Some(LINK)).unwrap()
    }

    fn desired() -> Device {
        Device {
            name: "flannel.1".to_owned(),
            kind: Kind::Vxlan(VxlanLink {
                vni: 1,
                link: 2,
                local: Some(ip("10.199.0.1")),
                port: 8472,
                ..VxlanLink::default()
            }),
            mtu: 1450,
            mac: Some(mac(1)),
            address: ip("10.244.1.0"),
            network: "10.244.0.0/16".parse().unwrap(),
        }
    }

    fn desired_ipip(fou_port: u16) -> Device {
        let local = Some(core::net::Ipv4Addr::new(10, 199, 0, 1));
        Device {
            name: "flannel.ipip".to_owned(),
            kind: Kind::Ipip(IpipLink {
                local,
                fou_port,
                ..IpipLink::default()
            }),
            mtu: 1480,
            mac: None,
            ..desired()
        }
    }

    fn made(desired: &Device) -> (Link, Vec<Address>) {
        let link = Link {
            index: LINK,
            name: desired.name.clone(),
            mac: desired.mac,
            mtu: desired.mtu,
            up: true,
            running: true,
            kind: match &desired.kind {
                Kind::Vxlan(vxlan) => LinkKind::Vxlan(vxlan.clone()),
                Kind::Ipip(ipip) => LinkKind::Ipip(ipip.clone()),
            },
            ..Link::default()
        };
        (link, vec![address("10.244.1.0/32")])
    }

    fn vxlan_of(link: &mut Link) -> &mut VxlanLink {
        let LinkKind::Vxlan(vxlan) = &mut link.kind else {
            panic!("{} is no VXLAN device", link.name)
        };
        vxlan
    }

    fn ipip_of(link: &mut Link) -> &mut IpipLink {
        let LinkKind::Ipip(ipip) = &mut link.kind else {
            panic!("{} is no ipip device", link.name)
        };
        ipip
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
        vxlan_of(&mut unbound).link = 0;
        assert_eq!(device_ops(&desired, Some(&unbound), &addresses), []);
    }

    #[test]
    fn small_differences_are_corrected_and_large_ones_make_it_anew() {
        let desired = desired();
        assert_eq!(device_ops(&desired, None, &[]), [DeviceOp::Create]);
        type Change = fn(&mut Link);
        let in_place: [(Change, DeviceOp); 5] = [
            (|link| link.mtu = 1400, DeviceOp::SetMtu(LINK)),
            (
                |link| link.mac = Some(Mac([2, 9, 9, 9, 9, 9])),
                DeviceOp::SetMac(LINK),
            ),
            (|link| link.up = false, DeviceOp::SetUp(LINK)),
            (
                |link| vxlan_of(link).learning = true,
                DeviceOp::SetSettings(LINK),
            ),
            (
                |link| vxlan_of(link).tos = 0xb8,
                DeviceOp::SetSettings(LINK),
            ),
        ];
        for (change, expected) in in_place {
            let (mut link, addresses) = made(&desired);
            change(&mut link);
            assert_eq!(device_ops(&desired, Some(&link), &addresses), [expected]);
        }
        let anew: [Change; 9] = [
            |link| link.kind = LinkKind::Other,
            |link| vxlan_of(link).vni = 2,
            |link| vxlan_of(link).link = 3,
            |link| vxlan_of(link).local = None,
            |link| vxlan_of(link).group = Some(ip("239.1.1.1")),
            |link| vxlan_of(link).l2_miss = true,
            |link| vxlan_of(link).port = 4789,
            |link| vxlan_of(link).gbp = true,
            |link| vxlan_of(link).external = true,
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
    fn an_ipip_device_is_compared_field_by_field() {
        for port in [0, 8285] {
            let desired = desired_ipip(port);
            let (link, addresses) = made(&desired);
            assert_eq!(device_ops(&desired, Some(&link), &addresses), []);
            type Change = fn(&mut IpipLink);
            let in_place: [Change; 3] = [
                |ipip| ipip.ttl = 7,
                |ipip| ipip.tos = 1,
                |ipip| ipip.path_mtu_discovery = true,
            ];
            for change in in_place {
                let mut link = link.clone();
                change(ipip_of(&mut link));
                let ops = device_ops(&desired, Some(&link), &addresses);
                assert_eq!(ops, [DeviceOp::SetSettings(LINK)]);
            }
            let anew: [Change; 4] = [
                |ipip| ipip.local = None,
                |ipip| ipip.remote = Some(core::net::Ipv4Addr::new(10, 199, 0, 9)),
                |ipip| ipip.fou_port = 9999,
                |ipip| ipip.external = true,
            ];
            for change in anew {
                let mut link = link.clone();
                change(ipip_of(&mut link));
                let ops = device_ops(&desired, Some(&link), &addresses);
                assert!(
                    matches!(ops[..], [DeviceOp::Delete { .. }, DeviceOp::Create]),
                    "{ops:?}"
                );
            }
        }
    }

    #[test]
    fn each_kind_of_peer_has_its_route() {
        let route = |via, subnet: &str, public_ip: &str| {
            let peer = Peer {
                subnet: subnet.parse().unwrap(),
                public_ip: ip(public_ip),
                via,
            };
            peer.route(Some(LINK)).unwrap()
        };
        let (subnet, public_ip) = ("10.244.2.0/24", "10.199.0.2");
        let vxlan = route(Via::Vxlan(mac(2)), subnet, public_ip);
        assert_eq!(
            (vxlan.link, vxlan.gateway, vxlan.onlink),
            (LINK, Some(ip("10.244.2.0")), true)
        );
        let ipip = route(Via::Tunnel, subnet, public_ip);
        assert_eq!(
            (ipip.link, ipip.gateway, ipip.onlink),
            (LINK, Some(ip(public_ip)), true)
        );
        let direct = route(
            Via::Direct {
                link: 2,
                onlink: false,
            },
            subnet,
            public_ip,
        );
        assert_eq!(
            (direct.link, direct.gateway, direct.onlink),
            (2, Some(ip(public_ip)), false)
        );
        let six = route(Via::Vxlan(mac(2)), "fd00:10:244:2::/64", "fd00:199::2");
        assert_eq!(
            (six.gateway, six.priority),
            (Some(ip("fd00:10:244:2::")), 1024)
        );
        // Without the device there is no route, and none is left behind.
        assert_eq!(peer(2).route(None), None);
    }

    #[test]
    fn a_peer_changes_between_tunnel_and_plain_route_in_one_step() {
        let mut actual = Actual::default();
        let tunnelled = peer(2);
        let direct = Peer {
            via: Via::Direct {
                link: 2,
                onlink: false,
            },
            ..tunnelled
        };
        let first = peer_ops(&[tunnelled], Some(LINK), &actual);
        apply(&mut actual, &first);
        let there = peer_ops(&[direct], Some(LINK), &actual);
        // The route is replaced before what it used goes away.
        assert_eq!(
            there,
            [
                PeerOp::SetRoute(direct.route(Some(LINK)).unwrap()),
                PeerOp::DeleteNeighbour(ip("10.244.2.0")),
                PeerOp::DeleteFdb(mac(2))
            ]
        );
        apply(&mut actual, &there);
        let back = peer_ops(&[tunnelled], Some(LINK), &actual);
        assert!(
            matches!(
                back[..],
                [
                    PeerOp::SetNeighbour(..),
                    PeerOp::SetFdb(..),
                    PeerOp::SetRoute(_)
                ]
            ),
            "{back:?}"
        );
        // A direct peer that leaves takes its plain route along.
        let gone = peer_ops(&[], Some(LINK), &actual);
        assert!(
            matches!(&gone[..], [PeerOp::DeleteRoute(route), ..] if route.link == 2),
            "{gone:?}"
        );
        // And needs no device.
        assert_eq!(peer_ops(&[direct], None, &Actual::default()).len(), 1);
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
            ..vxlan_route(n)
        };
        let operators = Route {
            protocol: 4,
            ..vxlan_route(200)
        };
        let shortcut = Route {
            protocol: PROTOCOL_BOOT,
            gateway: None,
            ..vxlan_route(201)
        };
        let actual = Actual {
            routes: vec![flannels(2), flannels(9), operators, shortcut],
            ..Actual::default()
        };
        let ops = peer_ops(&[peer(2)], Some(LINK), &actual);
        assert!(ops.contains(&PeerOp::SetRoute(vxlan_route(2))));
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
        let entries = proptest::collection::vec((0..8u8, 0..8u8, 0..4u8, any::<bool>()), 0..8);
        entries.prop_map(|entries| {
            let mut peers: Vec<Peer> = Vec::new();
            for (subnet, vtep, ip, direct) in entries {
                let next = Peer {
                    subnet: peer(subnet).subnet,
                    public_ip: peer(ip).public_ip,
                    via: match direct {
                        true => Via::Direct {
                            link: 2,
                            onlink: false,
                        },
                        false => Via::Vxlan(mac(vtep)),
                    },
                };
                if !peers
                    .iter()
                    .any(|other| other.subnet == next.subnet || (!direct && other.via == next.via))
                {
                    peers.push(next);
                }
            }
            peers
        })
    }

    fn any_actual() -> impl Strategy<Value = Actual> {
        let routes = proptest::collection::hash_map(
            (0..10u8, 0..2u32),
            (0..3u8, any::<bool>(), any::<bool>()),
            0..8,
        );
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
                .map(|((n, priority), (who, onlink, elsewhere))| Route {
                    link: if elsewhere { 2 } else { LINK },
                    protocol: [PROTOCOL, PROTOCOL_BOOT, 4][usize::from(who)],
                    priority,
                    onlink,
                    ..vxlan_route(n)
                })
                .collect(),
            neighbours: neighbours
                .into_iter()
                .map(|(n, (vtep, state))| Neighbour {
                    link: LINK,
                    address: peer(n).vtep_ip(),
                    mac: Some(mac(vtep)),
                    state,
                })
                .collect(),
            fdb: fdb
                .into_iter()
                .map(|(vtep, (ip, permanent))| FdbEntry {
                    link: LINK,
                    mac: mac(vtep),
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
            apply(&mut after, &peer_ops(&peers, Some(LINK), &before));
            prop_assert_eq!(peer_ops(&peers, Some(LINK), &after), []);
            for peer in &peers {
                prop_assert!(after.routes.contains(&peer.route(Some(LINK)).unwrap()));
            }
            // What is not ours and not in the way has survived.
            for route in before.routes.iter().filter(|route| !is_ours(route, Some(LINK))) {
                let replaced = peers.iter().any(|peer| peer.subnet == route.destination && route.priority == 0);
                prop_assert_eq!(after.routes.contains(route), !replaced);
            }
            let permanent = after.neighbours.iter().filter(|entry| entry.state == Reachability::Permanent).count();
            let tunnelled = peers.iter().filter(|peer| peer.vtep_mac().is_some()).count();
            prop_assert_eq!(permanent, tunnelled);
            prop_assert_eq!(after.fdb.iter().filter(|entry| entry.permanent).count(), tunnelled);
        }
    }
}
