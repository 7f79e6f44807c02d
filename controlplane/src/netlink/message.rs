//! The kernel objects that the control plane looks at and changes: links, addresses, routes, rules, neighbours
//! and VXLAN forwarding entries; how each is read, and the requests that change them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLA_ALIGNTO, NLA_HEADER_SIZE, NLA_TYPE_MASK};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoIpTunnel, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    TunnelEncapFlags, TunnelEncapType,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};

use super::{Netlink, NetlinkError, Request};
use crate::family::Family;
use crate::mac::Mac;

pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_DELLINK: u16 = 17;
pub(crate) const RTM_NEWADDR: u16 = 20;
pub(crate) const RTM_DELADDR: u16 = 21;
pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_DELROUTE: u16 = 25;
pub(crate) const RTM_NEWNEIGH: u16 = 28;
pub(crate) const RTM_DELNEIGH: u16 = 29;
pub(crate) const RTM_NEWRULE: u16 = 32;
pub(crate) const RTM_DELRULE: u16 = 33;

/// Metric that the kernel gives an IPv6 route for which none is asked (`IP6_RT_PRIO_USER`).
pub const METRIC_V6_DEFAULT: u32 = 1024;

/// Attribute numbers of the kernel's headers (if_link.h, if_tunnel.h, if_addr.h, rtnetlink.h, neighbour.h,
/// fib_rules.h).
mod attribute {
    pub(super) const IFLA_ADDRESS: u16 = 1;
    pub(super) const IFLA_IFNAME: u16 = 3;
    pub(super) const IFLA_MTU: u16 = 4;
    pub(super) const IFLA_LINK: u16 = 5;
    pub(super) const IFLA_MASTER: u16 = 10;
    pub(super) const IFLA_LINKINFO: u16 = 18;
    pub(super) const IFLA_INFO_KIND: u16 = 1;
    pub(super) const IFLA_INFO_DATA: u16 = 2;
    pub(super) const IFLA_VXLAN_ID: u16 = 1;
    pub(super) const IFLA_VXLAN_GROUP: u16 = 2;
    pub(super) const IFLA_VXLAN_LINK: u16 = 3;
    pub(super) const IFLA_VXLAN_LOCAL: u16 = 4;
    pub(super) const IFLA_VXLAN_TOS: u16 = 6;
    pub(super) const IFLA_VXLAN_LEARNING: u16 = 7;
    pub(super) const IFLA_VXLAN_L2MISS: u16 = 13;
    pub(super) const IFLA_VXLAN_PORT: u16 = 15;
    pub(super) const IFLA_VXLAN_GROUP6: u16 = 16;
    pub(super) const IFLA_VXLAN_LOCAL6: u16 = 17;
    pub(super) const IFLA_VXLAN_UDP_ZERO_CSUM6_TX: u16 = 19;
    pub(super) const IFLA_VXLAN_UDP_ZERO_CSUM6_RX: u16 = 20;
    pub(super) const IFLA_VXLAN_GBP: u16 = 23;
    pub(super) const IFLA_VXLAN_COLLECT_METADATA: u16 = 25;
    pub(super) const IFLA_IPTUN_LOCAL: u16 = 2;
    pub(super) const IFLA_IPTUN_REMOTE: u16 = 3;
    pub(super) const IFLA_IPTUN_TTL: u16 = 4;
    pub(super) const IFLA_IPTUN_TOS: u16 = 5;
    pub(super) const IFLA_IPTUN_PMTUDISC: u16 = 10;
    pub(super) const IFLA_IPTUN_ENCAP_TYPE: u16 = 15;
    pub(super) const IFLA_IPTUN_ENCAP_SPORT: u16 = 17;
    pub(super) const IFLA_IPTUN_ENCAP_DPORT: u16 = 18;
    pub(super) const IFLA_IPTUN_COLLECT_METADATA: u16 = 19;
    pub(super) const IFLA_VLAN_ID: u16 = 1;
    pub(super) const IFLA_BOND_MODE: u16 = 1;
    pub(super) const IFLA_BOND_ACTIVE_SLAVE: u16 = 2;
    pub(super) const IFA_ADDRESS: u16 = 1;
    pub(super) const IFA_LOCAL: u16 = 2;
    pub(super) const IFA_FLAGS: u16 = 8;
    pub(super) const RTA_DST: u16 = 1;
    pub(super) const RTA_OIF: u16 = 4;
    pub(super) const RTA_GATEWAY: u16 = 5;
    pub(super) const RTA_PRIORITY: u16 = 6;
    pub(super) const RTA_PREFSRC: u16 = 7;
    pub(super) const RTA_METRICS: u16 = 8;
    pub(super) const RTA_MULTIPATH: u16 = 9;
    pub(super) const RTA_TABLE: u16 = 15;
    pub(super) const RTA_VIA: u16 = 18;
    pub(super) const RTAX_MTU: u16 = 2;
    pub(super) const NDA_DST: u16 = 1;
    pub(super) const NDA_LLADDR: u16 = 2;
    pub(super) const FRA_SRC: u16 = 2;
    pub(super) const FRA_PRIORITY: u16 = 6;
    pub(super) const FRA_FWMARK: u16 = 10;
    pub(super) const FRA_TABLE: u16 = 15;
    pub(super) const FRA_FWMASK: u16 = 16;
    pub(super) const FRA_PROTOCOL: u16 = 21;
}
use attribute::{
    FRA_FWMARK, FRA_FWMASK, FRA_PRIORITY, FRA_PROTOCOL, FRA_SRC, FRA_TABLE, IFA_ADDRESS, IFA_FLAGS,
    IFA_LOCAL, IFLA_ADDRESS, IFLA_BOND_ACTIVE_SLAVE, IFLA_BOND_MODE, IFLA_IFNAME, IFLA_INFO_DATA,
    IFLA_INFO_KIND, IFLA_IPTUN_COLLECT_METADATA, IFLA_IPTUN_ENCAP_DPORT, IFLA_IPTUN_ENCAP_SPORT,
    IFLA_IPTUN_ENCAP_TYPE, IFLA_IPTUN_LOCAL, IFLA_IPTUN_PMTUDISC, IFLA_IPTUN_REMOTE,
    IFLA_IPTUN_TOS, IFLA_IPTUN_TTL, IFLA_LINK, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_VLAN_ID,
    IFLA_VXLAN_COLLECT_METADATA, IFLA_VXLAN_GBP, IFLA_VXLAN_GROUP, IFLA_VXLAN_GROUP6,
    IFLA_VXLAN_ID, IFLA_VXLAN_L2MISS, IFLA_VXLAN_LEARNING, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL,
    IFLA_VXLAN_LOCAL6, IFLA_VXLAN_PORT, IFLA_VXLAN_TOS, IFLA_VXLAN_UDP_ZERO_CSUM6_RX,
    IFLA_VXLAN_UDP_ZERO_CSUM6_TX, NDA_DST, NDA_LLADDR, RTA_DST, RTA_GATEWAY, RTA_METRICS,
    RTA_MULTIPATH, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTA_VIA, RTAX_MTU,
};

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

/// Walks the attributes of a message; ends at the first malformed one.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    core::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(NLA_HEADER_SIZE..length)?;
        bytes = bytes
            .get(length.next_multiple_of(NLA_ALIGNTO)..)
            .unwrap_or_default();
        Some((kind, value))
    })
}

/// Reads an address of either family, told apart by its length.
fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes)
            .ok()
            .map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// The same, where the kernel writes zeros for "none".
fn some_ip(bytes: &[u8]) -> Option<IpAddr> {
    ip(bytes).filter(|address| !address.is_unspecified())
}

/// Reads `RTA_VIA`: an address of a family of its own.
fn via_ip(bytes: &[u8]) -> Option<IpAddr> {
    ip(bytes.get(2..)?)
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Ethernet address; none on interfaces without.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Carrier is there.
    pub running: bool,
    /// A loopback interface.
    pub loopback: bool,
    /// The interface that it lies on (`IFLA_LINK`), 0 is none. Only for a VLAN sure to be in this namespace.
    pub lower: u32,
    /// The interface that it is a port of (`IFLA_MASTER`), 0 is none.
    pub master: u32,
    /// What kind of device it is, as far as that matters.
    pub kind: LinkKind,
}

/// Kinds of devices with the settings that matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LinkKind {
    /// Any other.
    #[default]
    Other,
    /// `vxlan`.
    Vxlan(VxlanLink),
    /// `ipip`, with or without an encapsulation of its own.
    Ipip(IpipLink),
    /// `vlan`, with its 802.1Q id.
    Vlan(u16),
    /// `bond`.
    Bond(BondLink),
}

/// Settings of a VXLAN device that decide whether it is the one we want.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VxlanLink {
    /// Network identifier.
    pub vni: u32,
    /// Index of the underlay interface; 0 is none.
    pub link: u32,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// Multicast group or default remote.
    pub group: Option<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// Outer TOS or traffic class; 1 is "as the inner one".
    pub tos: u8,
    /// Learns addresses from packets.
    pub learning: bool,
    /// Reports unknown destinations.
    pub l2_miss: bool,
    /// Group policy extension.
    pub gbp: bool,
    /// Takes its settings per packet instead.
    pub external: bool,
    /// Sends or accepts IPv6 datagrams without a checksum.
    pub zero_checksum6: bool,
}

/// Settings of an `ipip` device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IpipLink {
    /// Outer source address.
    pub local: Option<Ipv4Addr>,
    /// Fixed outer destination.
    pub remote: Option<Ipv4Addr>,
    /// Outer TTL; 0 is "as the inner one".
    pub ttl: u8,
    /// Outer TOS; bit 0 is "as the inner one".
    pub tos: u8,
    /// Sets DF in every outer header.
    pub path_mtu_discovery: bool,
    /// UDP port of foo-over-UDP, source and destination; 0 is none.
    pub fou_port: u16,
    /// Takes its settings per packet instead.
    pub external: bool,
}

/// Settings of a bond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BondLink {
    /// One port carries everything.
    pub active_backup: bool,
    /// Which, if one does.
    pub active: u32,
}

impl Link {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        // struct ifinfomsg: family, pad, type; index at 4; flags at 8; change at 12.
        let index = u32_at(payload, 4)?;
        let flags = LinkFlags::from_bits_retain(u32_at(payload, 8)?);
        let mut link = Self {
            index,
            up: flags.contains(LinkFlags::Up),
            running: flags.contains(LinkFlags::Running),
            loopback: flags.contains(LinkFlags::Loopback),
            ..Self::default()
        };
        for (kind, value) in attributes(payload.get(16..)?) {
            match kind {
                IFLA_ADDRESS => link.mac = Mac::from_slice(value),
                IFLA_IFNAME => {
                    link.name = String::from_utf8_lossy(value)
                        .trim_end_matches('\0')
                        .to_owned();
                }
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_LINK => link.lower = u32_at(value, 0)?,
                IFLA_MASTER => link.master = u32_at(value, 0)?,
                IFLA_LINKINFO => link.kind = LinkKind::parse(value).unwrap_or_default(),
                _ => {}
            }
        }
        Some(link)
    }

    /// Its settings as a VXLAN device, if it is one.
    pub fn vxlan(&self) -> Option<&VxlanLink> {
        match &self.kind {
            LinkKind::Vxlan(vxlan) => Some(vxlan),
            LinkKind::Other | LinkKind::Ipip(_) | LinkKind::Vlan(_) | LinkKind::Bond(_) => None,
        }
    }
}

impl LinkKind {
    fn parse(info: &[u8]) -> Option<Self> {
        let (_, kind) = attributes(info).find(|(kind, _)| *kind == IFLA_INFO_KIND)?;
        let settings = attributes(info)
            .find(|(kind, _)| *kind == IFLA_INFO_DATA)
            .map_or(&[][..], |(_, settings)| settings);
        Some(match kind.split(|&byte| byte == 0).next()? {
            b"vxlan" => Self::Vxlan(VxlanLink::parse(settings)?),
            b"ipip" => Self::Ipip(IpipLink::parse(settings)?),
            b"vlan" => {
                let (_, id) = attributes(settings).find(|(kind, _)| *kind == IFLA_VLAN_ID)?;
                Self::Vlan(u16_at(id, 0)?)
            }
            b"bond" => Self::Bond(BondLink::parse(settings)?),
            _ => Self::Other,
        })
    }
}

fn is_set(value: &[u8]) -> bool {
    value.first().is_some_and(|&byte| byte != 0)
}

fn u16_be(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_be_bytes)
}

impl VxlanLink {
    fn parse(settings: &[u8]) -> Option<Self> {
        let mut vxlan = Self::default();
        for (kind, value) in attributes(settings) {
            match kind {
                IFLA_VXLAN_ID => vxlan.vni = u32_at(value, 0)?,
                IFLA_VXLAN_GROUP | IFLA_VXLAN_GROUP6 => vxlan.group = some_ip(value),
                IFLA_VXLAN_LINK => vxlan.link = u32_at(value, 0)?,
                IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = some_ip(value),
                IFLA_VXLAN_TOS => vxlan.tos = *value.first()?,
                IFLA_VXLAN_LEARNING => vxlan.learning = is_set(value),
                IFLA_VXLAN_L2MISS => vxlan.l2_miss = is_set(value),
                IFLA_VXLAN_PORT => vxlan.port = u16_be(value)?,
                IFLA_VXLAN_UDP_ZERO_CSUM6_TX | IFLA_VXLAN_UDP_ZERO_CSUM6_RX => {
                    vxlan.zero_checksum6 |= is_set(value);
                }
                IFLA_VXLAN_GBP => vxlan.gbp = true,
                IFLA_VXLAN_COLLECT_METADATA => vxlan.external = is_set(value),
                _ => {}
            }
        }
        Some(vxlan)
    }
}

impl IpipLink {
    fn parse(settings: &[u8]) -> Option<Self> {
        /// `TUNNEL_ENCAP_FOU` (if_tunnel.h).
        const FOU: u16 = 1;
        let ipv4 = |value: &[u8]| match some_ip(value) {
            Some(IpAddr::V4(address)) => Some(address),
            Some(IpAddr::V6(_)) | None => None,
        };
        let mut ipip = Self::default();
        let (mut encapsulation, mut source, mut destination) = (0, 0, 0);
        for (kind, value) in attributes(settings) {
            match kind {
                IFLA_IPTUN_LOCAL => ipip.local = ipv4(value),
                IFLA_IPTUN_REMOTE => ipip.remote = ipv4(value),
                IFLA_IPTUN_TTL => ipip.ttl = *value.first()?,
                IFLA_IPTUN_TOS => ipip.tos = *value.first()?,
                IFLA_IPTUN_PMTUDISC => ipip.path_mtu_discovery = is_set(value),
                IFLA_IPTUN_ENCAP_TYPE => encapsulation = u16_at(value, 0)?,
                IFLA_IPTUN_ENCAP_SPORT => source = u16_be(value)?,
                IFLA_IPTUN_ENCAP_DPORT => destination = u16_be(value)?,
                IFLA_IPTUN_COLLECT_METADATA => ipip.external = true,
                _ => {}
            }
        }
        if encapsulation == FOU && source == destination {
            ipip.fou_port = destination;
        } else if encapsulation != 0 {
            // Another encapsulation, or ports that differ: no device of ours has these.
            ipip.external = true;
        }
        Some(ipip)
    }
}

impl BondLink {
    fn parse(settings: &[u8]) -> Option<Self> {
        /// `BOND_MODE_ACTIVEBACKUP` (if_bonding.h).
        const ACTIVE_BACKUP: u8 = 1;
        let mut bond = Self::default();
        for (kind, value) in attributes(settings) {
            match kind {
                IFLA_BOND_MODE => bond.active_backup = *value.first()? == ACTIVE_BACKUP,
                IFLA_BOND_ACTIVE_SLAVE => bond.active = u32_at(value, 0)?,
                _ => {}
            }
        }
        Some(bond)
    }
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Interface index.
    pub link: u32,
    /// The address with its prefix length.
    pub net: IpNet,
    /// Usable beyond the link.
    pub global: bool,
    /// Does not expire (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// Secondary on its subnet, or with IPv6 temporary (`IFA_F_SECONDARY`, `IFA_F_TEMPORARY`: the same bit).
    pub secondary: bool,
    /// On its way out (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

impl Address {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        const SECONDARY: u32 = 0x01;
        const DEPRECATED: u32 = 0x20;
        const PERMANENT: u32 = 0x80;
        // struct ifaddrmsg: family, prefix length, flags, scope; index at 4.
        let [_, prefix_len, flags, scope] = *payload.first_chunk::<4>()?;
        let link = u32_at(payload, 4)?;
        let mut flags = u32::from(flags);
        let (mut local, mut address) = (None, None);
        for (kind, value) in attributes(payload.get(8..)?) {
            match kind {
                IFA_LOCAL => local = ip(value),
                IFA_ADDRESS => address = ip(value),
                IFA_FLAGS => flags = u32_at(value, 0)?,
                _ => {}
            }
        }
        Some(Self {
            link,
            net: IpNet::new(local.or(address)?, prefix_len).ok()?,
            global: AddressScope::from(scope) == AddressScope::Universe,
            permanent: flags & PERMANENT != 0,
            secondary: flags & SECONDARY != 0,
            deprecated: flags & DEPRECATED != 0,
        })
    }
}

/// A unicast route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Table number.
    pub table: u32,
    /// Destination.
    pub destination: IpNet,
    /// Outgoing interface; 0 when there are several.
    pub link: u32,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// The next hop is taken to be on the link.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Who installed it (`RTPROT_*`).
    pub protocol: u8,
    /// Its scope, 0 is global.
    pub scope: u8,
    /// Metric.
    pub priority: u32,
    /// Largest packet, where the route says so.
    pub mtu: Option<u32>,
}

impl Route {
    /// A route of ours, to be completed: no next hop yet, the metric that its family has by default.
    pub fn to(destination: IpNet, table: u32, protocol: u8) -> Self {
        Self {
            table,
            destination,
            link: 0,
            gateway: None,
            onlink: false,
            source: None,
            protocol,
            scope: 0,
            priority: match destination {
                IpNet::V4(_) => 0,
                IpNet::V6(_) => METRIC_V6_DEFAULT,
            },
            mtu: None,
        }
    }

    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        // IPv6 lists what it has learned, like path MTUs, among the routes.
        let flags = RouteFlags::from_bits_retain(u32_at(payload, 8)?);
        match flags.contains(RouteFlags::Cloned) {
            true => None,
            false => Self::parse_kind(payload, RouteType::Unicast),
        }
    }

    /// The kernel's answer to a question for one destination, which it marks as made for that alone.
    pub(super) fn parse_answer(payload: &[u8]) -> Option<Self> {
        Self::parse_kind(payload, RouteType::Unicast)
    }

    fn parse_kind(payload: &[u8], wanted: RouteType) -> Option<Self> {
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type; flags at 8.
        let [family, length, _, _, table, protocol, scope, kind] = *payload.first_chunk::<8>()?;
        let flags = RouteFlags::from_bits_retain(u32_at(payload, 8)?);
        if RouteType::from(kind) != wanted {
            return None;
        }
        let any: IpAddr = match Family::from_netlink(family)? {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut route = Self {
            onlink: flags.contains(RouteFlags::Onlink),
            scope,
            priority: 0,
            ..Self::to(IpNet::new(any, length).ok()?, u32::from(table), protocol)
        };
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                RTA_DST => route.destination = IpNet::new(ip(value)?, length).ok()?,
                RTA_OIF => route.link = u32_at(value, 0)?,
                RTA_GATEWAY => route.gateway = ip(value),
                RTA_VIA => route.gateway = via_ip(value),
                RTA_PRIORITY => route.priority = u32_at(value, 0)?,
                RTA_PREFSRC => route.source = ip(value),
                RTA_TABLE => route.table = u32_at(value, 0)?,
                RTA_METRICS => {
                    let mut metrics = attributes(value);
                    let mtu = metrics.find(|(kind, _)| *kind == RTAX_MTU);
                    route.mtu = mtu.and_then(|(_, value)| u32_at(value, 0));
                }
                _ => {}
            }
        }
        Some(route)
    }
}

/// One way that a packet may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hop {
    /// Outgoing interface.
    pub link: u32,
    /// Next hop, if not on the link itself.
    pub gateway: Option<IpAddr>,
    /// Share of the flows, from 1.
    pub weight: u16,
}

/// The kernel's answer to "how would this be sent".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteAnswer {
    /// It is a unicast route (not local, broadcast or a refusal).
    pub unicast: bool,
    /// The ways, those that the kernel knows to be dead left out.
    pub hops: Vec<Hop>,
}

impl RouteAnswer {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        /// `RTNH_F_DEAD`, `RTNH_F_LINKDOWN` (rtnetlink.h).
        const UNUSABLE: u8 = 1 | 16;
        let kind = RouteType::from(*payload.get(7)?);
        let (mut link, mut gateway) = (0, None);
        let mut hops = Vec::new();
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                RTA_OIF => link = u32_at(value, 0)?,
                RTA_GATEWAY => gateway = ip(value),
                RTA_VIA => gateway = via_ip(value),
                RTA_MULTIPATH => hops = next_hops(value),
                _ => {}
            }
        }
        if hops.is_empty() {
            let weight = 1;
            hops.push((
                0,
                Hop {
                    link,
                    gateway,
                    weight,
                },
            ));
        }
        // A link without carrier carries nothing, although the kernel goes on sending there unless told otherwise.
        if hops.iter().any(|(flags, _)| flags & UNUSABLE == 0) {
            hops.retain(|(flags, _)| flags & UNUSABLE == 0);
        }
        Some(Self {
            unicast: kind == RouteType::Unicast,
            hops: hops.into_iter().map(|(_, hop)| hop).collect(),
        })
    }
}

/// Reads `RTA_MULTIPATH`: next hops with their flags.
fn next_hops(mut bytes: &[u8]) -> Vec<(u8, Hop)> {
    let mut hops = Vec::new();
    // struct rtnexthop: length, flags, weight less one, interface; then attributes.
    while let (Some(length), Some(&[_, _, flags, weight]), Some(link)) =
        (u16_at(bytes, 0), bytes.first_chunk::<4>(), u32_at(bytes, 4))
    {
        let length = usize::from(length);
        let Some(inner) = bytes.get(8..length) else {
            break;
        };
        let mut hop = Hop {
            link,
            gateway: None,
            weight: u16::from(weight) + 1,
        };
        for (kind, value) in attributes(inner) {
            match kind {
                RTA_GATEWAY => hop.gateway = ip(value),
                RTA_VIA => hop.gateway = via_ip(value),
                _ => {}
            }
        }
        hops.push((flags, hop));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// The state of a neighbour entry (`NUD_*`), reduced to what decides about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachability {
    /// Confirmed, or configured, or does not need it: `REACHABLE`, `NOARP`.
    Confirmed,
    /// Configured for good: `PERMANENT`. Never touched.
    Permanent,
    /// Usable, its confirmation has lapsed: `STALE`.
    Stale,
    /// Usable, being confirmed: `DELAY`, `PROBE`.
    Probing,
    /// Being asked for: `INCOMPLETE`.
    Incomplete,
    /// Does not answer, or nothing is known: `FAILED`, `NONE`.
    Failed,
}

impl Reachability {
    fn from_state(state: u16) -> Self {
        const STALE: u16 = 0x04;
        const DELAY: u16 = 0x08;
        const PROBE: u16 = 0x10;
        const INCOMPLETE: u16 = 0x01;
        const REACHABLE: u16 = 0x02;
        const NOARP: u16 = 0x40;
        const PERMANENT: u16 = 0x80;
        match state {
            state if state & PERMANENT != 0 => Self::Permanent,
            state if state & (REACHABLE | NOARP) != 0 => Self::Confirmed,
            state if state & STALE != 0 => Self::Stale,
            state if state & (DELAY | PROBE) != 0 => Self::Probing,
            state if state & INCOMPLETE != 0 => Self::Incomplete,
            _ => Self::Failed,
        }
    }

    /// The Ethernet address of the entry may be used.
    pub fn is_usable(self) -> bool {
        match self {
            Self::Confirmed | Self::Permanent | Self::Stale | Self::Probing => true,
            Self::Incomplete | Self::Failed => false,
        }
    }
}

/// A neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Interface index.
    pub link: u32,
    /// Address of the neighbour.
    pub address: IpAddr,
    /// Its Ethernet address, when known.
    pub mac: Option<Mac>,
    /// How well it is known.
    pub state: Reachability,
}

impl Neighbour {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        // struct ndmsg: family and padding; index at 4; state at 8; flags, type at 10.
        let link = u32_at(payload, 4)?;
        let state = Reachability::from_state(u16_at(payload, 8)?);
        let (mut address, mut mac) = (None, None);
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                NDA_DST => address = ip(value),
                NDA_LLADDR => mac = Mac::from_slice(value),
                _ => {}
            }
        }
        Some(Self {
            link,
            address: address?,
            mac,
            state,
        })
    }
}

/// A forwarding entry of a VXLAN device: which node has an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdbEntry {
    /// Interface index of the VXLAN device.
    pub link: u32,
    /// Inner Ethernet address.
    pub mac: Mac,
    /// Outer destination.
    pub remote: IpAddr,
    /// Does not expire.
    pub permanent: bool,
}

impl FdbEntry {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let link = u32_at(payload, 4)?;
        let permanent = Reachability::from_state(u16_at(payload, 8)?) == Reachability::Permanent;
        let (mut mac, mut remote) = (None, None);
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                NDA_DST => remote = ip(value),
                NDA_LLADDR => mac = Mac::from_slice(value),
                _ => {}
            }
        }
        Some(Self {
            link,
            mac: mac?,
            remote: remote?,
            permanent,
        })
    }
}

/// A policy routing rule, as far as ours needs to be recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Address family.
    pub family: Family,
    /// Position.
    pub priority: u32,
    /// Table it leads to.
    pub table: u32,
    /// Who installed it.
    pub protocol: u8,
    /// Sources that it matches; none is all.
    pub source: Option<IpNet>,
    /// Firewall mark and mask that it matches; a mask of 0 is all.
    pub mark: (u32, u32),
    /// It matches by nothing else.
    pub plain: bool,
}

impl Rule {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
        const FRA_SUPPRESS_IFGROUP: u16 = 13;
        const FRA_PAD: u16 = 18;
        // struct fib_rule_hdr: family, dst_len, src_len, tos, table, res1, res2, action; flags at 8.
        let [family, dst_len, src_len, tos, table, _, _, action] = *payload.first_chunk::<8>()?;
        let mut rule = Self {
            family: Family::from_netlink(family)?,
            priority: 0,
            table: u32::from(table),
            protocol: 0,
            source: None,
            mark: (0, 0),
            plain: dst_len == 0
                && tos == 0
                && RuleAction::from(action) == RuleAction::ToTable
                && u32_at(payload, 8)? == 0,
        };
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
                FRA_TABLE => rule.table = u32_at(value, 0)?,
                FRA_PROTOCOL => rule.protocol = *value.first()?,
                FRA_SRC => rule.source = IpNet::new(ip(value)?, src_len).ok(),
                // The kernel leaves out a mark of 0 even where it is asked for.
                FRA_FWMARK => rule.mark.0 = u32_at(value, 0)?,
                FRA_FWMASK => rule.mark.1 = u32_at(value, 0)?,
                // "No limit" is all ones; anything else restricts the rule.
                FRA_SUPPRESS_PREFIXLEN | FRA_SUPPRESS_IFGROUP => {
                    rule.plain &= u32_at(value, 0)? == u32::MAX;
                }
                FRA_PAD => {}
                _ => rule.plain = false,
            }
        }
        Some(rule)
    }
}

/// What to list routes by.
#[derive(Debug, Clone, Copy)]
pub struct RouteFilter {
    /// Address family.
    pub family: Family,
    /// Only this table.
    pub table: u32,
    /// Only routes through this interface; 0 is any.
    pub link: u32,
    /// Only routes that this protocol installed; 0 is any.
    pub protocol: u8,
}

impl RouteFilter {
    /// All routes of a table.
    pub fn table(family: Family, table: u32) -> Self {
        Self {
            family,
            table,
            link: 0,
            protocol: 0,
        }
    }

    fn matches(&self, route: &Route) -> bool {
        route.table == self.table
            && (self.link == 0 || route.link == self.link)
            && (self.protocol == 0 || route.protocol == self.protocol)
    }
}

impl Netlink {
    /// All interfaces.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let mut links = Vec::new();
        self.dump("links", &request, RTM_NEWLINK, |payload| {
            links.extend(Link::parse(payload));
        })?;
        Ok(links)
    }

    /// All addresses, of both families.
    pub fn addresses(&mut self) -> Result<Vec<Address>, NetlinkError> {
        let mut addresses = Vec::new();
        for family in Family::ALL {
            let mut message = AddressMessage::default();
            message.header.family = family.netlink();
            let request = RouteNetlinkMessage::GetAddress(message);
            self.dump("addresses", &request, RTM_NEWADDR, |payload| {
                addresses.extend(Address::parse(payload));
            })?;
        }
        Ok(addresses)
    }

    /// Unicast routes.
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = filter.family.netlink();
        message.header.protocol = RouteProtocol::from(filter.protocol);
        message.attributes.push(RouteAttribute::Table(filter.table));
        if filter.link != 0 {
            message.attributes.push(RouteAttribute::Oif(filter.link));
        }
        let request = RouteNetlinkMessage::GetRoute(message);
        let mut routes = Vec::new();
        self.dump("routes", &request, RTM_NEWROUTE, |payload| {
            // Kernels before 4.20 ignore the filter.
            routes.extend(Route::parse(payload).filter(|route| filter.matches(route)));
        })?;
        Ok(routes)
    }

    /// Routes of a table that drop what they match.
    pub fn blackholes(&mut self, family: Family, table: u32) -> Result<Vec<Route>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.netlink();
        message.header.kind = RouteType::BlackHole;
        message.attributes.push(RouteAttribute::Table(table));
        let request = RouteNetlinkMessage::GetRoute(message);
        let filter = RouteFilter::table(family, table);
        let mut routes = Vec::new();
        self.dump("routes", &request, RTM_NEWROUTE, |payload| {
            let route = Route::parse_kind(payload, RouteType::BlackHole);
            routes.extend(route.filter(|route| filter.matches(route)));
        })?;
        Ok(routes)
    }

    /// Neighbour entries of one family on one interface.
    pub fn neighbours(
        &mut self,
        family: Family,
        link: u32,
    ) -> Result<Vec<Neighbour>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family.netlink();
        message.attributes.push(NeighbourAttribute::IfIndex(link));
        let request = RouteNetlinkMessage::GetNeighbour(message);
        let mut neighbours = Vec::new();
        self.dump("neighbours", &request, RTM_NEWNEIGH, |payload| {
            neighbours.extend(Neighbour::parse(payload).filter(|neighbour| neighbour.link == link));
        })?;
        Ok(neighbours)
    }

    /// Forwarding entries of one VXLAN device that lead to an address.
    pub fn fdb(&mut self, link: u32) -> Result<Vec<FdbEntry>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = link;
        let request = RouteNetlinkMessage::GetNeighbour(message);
        let mut entries = Vec::new();
        self.dump("forwarding entries", &request, RTM_NEWNEIGH, |payload| {
            entries.extend(FdbEntry::parse(payload).filter(|entry| entry.link == link));
        })?;
        Ok(entries)
    }

    /// All rules of one family.
    pub fn rules(&mut self, family: Family) -> Result<Vec<Rule>, NetlinkError> {
        let mut message = RuleMessage::default();
        message.header.family = family.netlink();
        let request = RouteNetlinkMessage::GetRule(message);
        let mut rules = Vec::new();
        self.dump("rules", &request, RTM_NEWRULE, |payload| {
            rules.extend(Rule::parse(payload));
        })?;
        Ok(rules)
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// Asks for the way that the node's own packets take.
pub(super) fn route_to(destination: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = Family::of(destination).netlink();
    message.header.destination_prefix_length = Family::of(destination).bits();
    message.attributes = vec![RouteAttribute::Destination(route_address(destination))];
    RouteNetlinkMessage::GetRoute(message)
}

/// Asks for the whole route that matches, so that all its ways are seen and not the one a flow would take.
pub(super) fn lookup_route(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
) -> RouteNetlinkMessage {
    let bits = Family::of(destination).bits();
    let mut message = RouteMessage::default();
    message.header.address_family = Family::of(destination).netlink();
    message.header.destination_prefix_length = bits;
    message.header.source_prefix_length = bits;
    message.header.flags = RouteFlags::FibMatch;
    // The transport as well: rules may select by it.
    message.attributes = vec![
        RouteAttribute::Destination(route_address(destination)),
        RouteAttribute::Source(route_address(source)),
    ];
    // The kernel knows no others here (net/ipv4/fib_frontend.c, `rtm_getroute_parse_ip_proto`).
    if protocol == u8::from(IpProtocol::Udp) {
        message.attributes.push(RouteAttribute::IpProto(protocol));
    }
    RouteNetlinkMessage::GetRoute(message)
}

fn create_link(name: &str, mtu: u32, mac: Option<Mac>, kind: InfoKind, data: InfoData) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
    ];
    message
        .attributes
        .extend(mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(kind),
        LinkInfo::Data(data),
    ]));
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// Makes a VXLAN device the way flannel does, down and without addresses.
pub fn create_vxlan(name: &str, vxlan: &VxlanLink, mtu: u32, mac: Option<Mac>) -> Request {
    let mut settings = vec![
        InfoVxlan::Id(vxlan.vni),
        InfoVxlan::Link(vxlan.link),
        InfoVxlan::Ttl(0),
        InfoVxlan::Tos(vxlan.tos),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Proxy(false),
        InfoVxlan::Rsc(false),
        InfoVxlan::L2Miss(vxlan.l2_miss),
        InfoVxlan::L3Miss(false),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
        InfoVxlan::Port(vxlan.port),
    ];
    settings.extend(vxlan.local.map(|local| match local {
        IpAddr::V4(local) => InfoVxlan::Local(local),
        IpAddr::V6(local) => InfoVxlan::Local6(local),
    }));
    // Its presence is its value.
    if vxlan.gbp {
        settings.push(InfoVxlan::Gbp);
    }
    create_link(name, mtu, mac, InfoKind::Vxlan, InfoData::Vxlan(settings))
}

fn ipip_settings(ipip: &IpipLink) -> Vec<InfoIpTunnel> {
    let mut settings = vec![
        InfoIpTunnel::Ttl(ipip.ttl),
        InfoIpTunnel::Tos(ipip.tos),
        InfoIpTunnel::PMtuDisc(ipip.path_mtu_discovery),
    ];
    settings.extend(ipip.local.map(|local| InfoIpTunnel::Local(local.into())));
    if ipip.fou_port != 0 {
        settings.extend([
            InfoIpTunnel::EncapType(TunnelEncapType::Fou),
            InfoIpTunnel::EncapFlags(TunnelEncapFlags::empty()),
            InfoIpTunnel::EncapSPort(ipip.fou_port),
            InfoIpTunnel::EncapDPort(ipip.fou_port),
        ]);
    }
    settings
}

/// Makes an `ipip` device, down and without addresses.
pub fn create_ipip(name: &str, ipip: &IpipLink, mtu: u32) -> Request {
    let data = InfoData::IpTunnel(ipip_settings(ipip));
    create_link(name, mtu, None, InfoKind::IpIp, data)
}

fn change_link(index: u32, attributes: Vec<LinkAttribute>) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: 0,
    }
}

/// Changes those settings of a VXLAN device that can be changed: learning and TOS.
pub fn set_vxlan(index: u32, vxlan: &VxlanLink) -> Request {
    let settings = vec![
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Tos(vxlan.tos),
    ];
    change_link(
        index,
        vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(settings)),
        ])],
    )
}

/// Changes the settings of an `ipip` device. What is not said goes back to its default, so all is said.
pub fn set_ipip(index: u32, ipip: &IpipLink) -> Request {
    change_link(
        index,
        vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::IpIp),
            LinkInfo::Data(InfoData::IpTunnel(ipip_settings(ipip))),
        ])],
    )
}

/// Changes an interface's MTU.
pub fn set_mtu(index: u32, mtu: u32) -> Request {
    change_link(index, vec![LinkAttribute::Mtu(mtu)])
}

/// Changes an interface's Ethernet address.
pub fn set_mac(index: u32, mac: Mac) -> Request {
    change_link(index, vec![LinkAttribute::Address(mac.0.to_vec())])
}

/// Sets an interface up.
pub fn set_up(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: 0,
    }
}

/// Removes an interface.
pub fn delete_link(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    Request {
        message: RouteNetlinkMessage::DelLink(message),
        flags: 0,
    }
}

fn address_message(link: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = Family::of_net(net).netlink();
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = link;
    message.attributes = vec![
        AddressAttribute::Local(net.addr()),
        AddressAttribute::Address(net.addr()),
    ];
    message
}

/// Gives an interface an address.
pub fn add_address(link: u32, net: IpNet) -> Request {
    let mut message = address_message(link, net);
    // Nobody else can have an address of our own lease, and one that is still being checked is no source address.
    if Family::of_net(net) == Family::V6 {
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request {
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Takes an address from an interface.
pub fn delete_address(link: u32, net: IpNet) -> Request {
    Request {
        message: RouteNetlinkMessage::DelAddress(address_message(link, net)),
        flags: 0,
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = Family::of_net(route.destination).netlink();
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = RouteScope::from(route.scope);
    message.header.kind = RouteType::Unicast;
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(route_address(
        route.destination.network(),
    )));
    let (gateway, source) = (route.gateway, route.source);
    attributes.extend(gateway.map(|gateway| RouteAttribute::Gateway(route_address(gateway))));
    attributes.extend(source.map(|source| RouteAttribute::PrefSource(route_address(source))));
    attributes.extend(
        route
            .mtu
            .map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])),
    );
    if route.link != 0 {
        attributes.push(RouteAttribute::Oif(route.link));
    }
    if route.priority != 0 {
        attributes.push(RouteAttribute::Priority(route.priority));
    }
    attributes.push(RouteAttribute::Table(route.table));
    message
}

/// Installs a route in the place of any other to the same destination with the same metric.
pub fn replace_route(route: &Route) -> Request {
    Request {
        message: RouteNetlinkMessage::NewRoute(route_message(route)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Removes exactly this route.
pub fn delete_route(route: &Route) -> Request {
    Request {
        message: RouteNetlinkMessage::DelRoute(route_message(route)),
        flags: 0,
    }
}

fn blackhole_message(route: &Route) -> RouteMessage {
    let mut message = route_message(route);
    message.header.kind = RouteType::BlackHole;
    message
}

/// Has what is for this destination dropped, unless there is a route to it already.
pub fn add_blackhole(destination: IpNet, table: u32, protocol: u8) -> Request {
    let route = Route::to(destination, table, protocol);
    Request {
        message: RouteNetlinkMessage::NewRoute(blackhole_message(&route)),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// Removes a route that [`Netlink::blackholes`] has found.
pub fn delete_blackhole(route: &Route) -> Request {
    // The kernel lists them with the loopback interface, and wants none.
    let route = Route {
        link: 0,
        ..route.clone()
    };
    Request {
        message: RouteNetlinkMessage::DelRoute(blackhole_message(&route)),
        flags: 0,
    }
}

fn neighbour_address(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }
}

fn neighbour_message(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = Family::of(address).netlink();
    message.header.ifindex = link;
    message.header.kind = RouteType::Unicast;
    message
        .attributes
        .push(NeighbourAttribute::Destination(neighbour_address(address)));
    message
}

/// Installs a permanent neighbour entry.
pub fn replace_neighbour(link: u32, address: IpAddr, mac: Mac) -> Request {
    let mut message = neighbour_message(link, address);
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    Request {
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Removes a neighbour entry.
pub fn delete_neighbour(link: u32, address: IpAddr) -> Request {
    Request {
        message: RouteNetlinkMessage::DelNeighbour(neighbour_message(link, address)),
        flags: 0,
    }
}

/// Has the kernel resolve or confirm a neighbour as if a packet were on its way there. The entry stays an ordinary
/// one. Not for permanent entries: the kernel would make them dynamic (net/core/neighbour.c, `__neigh_update`).
pub fn use_neighbour(link: u32, address: IpAddr) -> Request {
    let mut message = neighbour_message(link, address);
    message.header.flags = NeighbourFlags::Use;
    Request {
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE,
    }
}

fn fdb_message(link: u32, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = link;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    message
}

/// Installs a permanent forwarding entry.
pub fn replace_fdb(link: u32, mac: Mac, remote: IpAddr) -> Request {
    let mut message = fdb_message(link, mac);
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::Destination(neighbour_address(remote)));
    Request {
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Removes a forwarding entry.
pub fn delete_fdb(link: u32, mac: Mac) -> Request {
    Request {
        message: RouteNetlinkMessage::DelNeighbour(fdb_message(link, mac)),
        flags: 0,
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = rule.family.netlink();
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)),
    ];
    if let Some(source) = rule.source {
        message.header.src_len = source.prefix_len();
        message
            .attributes
            .push(RuleAttribute::Source(source.network()));
    }
    if rule.mark.1 != 0 {
        message.attributes.extend([
            RuleAttribute::FwMark(rule.mark.0),
            RuleAttribute::FwMask(rule.mark.1),
        ]);
    }
    message
}

/// Installs a rule.
pub fn add_rule(rule: &Rule) -> Request {
    Request {
        message: RouteNetlinkMessage::NewRule(rule_message(rule)),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// Removes a rule.
pub fn delete_rule(rule: &Rule) -> Request {
    Request {
        message: RouteNetlinkMessage::DelRule(rule_message(rule)),
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable as _;

    /// The payload of a request, as the kernel reads it.
    fn payload(request: &Request) -> Vec<u8> {
        let mut bytes = vec![0; request.message.buffer_len()];
        request.message.emit(&mut bytes);
        bytes
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn devices_are_read_as_they_are_made() {
        let vxlan6 = VxlanLink {
            vni: 7,
            link: 2,
            local: Some(ip("fd00:199::1")),
            port: 8472,
            tos: 0xb8,
            gbp: true,
            ..VxlanLink::default()
        };
        let mac = Mac([2, 0x52, 0x53, 0, 6, 1]);
        let made = payload(&create_vxlan("flannel-v6.7", &vxlan6, 1430, Some(mac)));
        let link = Link::parse(&made).unwrap();
        assert_eq!(
            (link.name.as_str(), link.mtu, link.mac),
            ("flannel-v6.7", 1430, Some(mac))
        );
        assert_eq!(link.kind, LinkKind::Vxlan(vxlan6));
        let local = Some(Ipv4Addr::new(10, 199, 0, 1));
        for fou_port in [0, 8285] {
            let ipip = IpipLink {
                local,
                ttl: 64,
                tos: 1,
                path_mtu_discovery: true,
                fou_port,
                ..IpipLink::default()
            };
            let made = payload(&create_ipip("flannel0", &ipip, 1472));
            let link = Link::parse(&made).unwrap();
            assert_eq!(
                (link.name.as_str(), link.mtu, link.mac),
                ("flannel0", 1472, None)
            );
            assert_eq!(link.kind, LinkKind::Ipip(ipip));
        }
    }

    #[test]
    fn routes_and_rules_are_read_as_they_are_made() {
        let v6 = Route {
            link: 5,
            source: Some(ip("fd00:10:244:1::")),
            mtu: Some(1430),
            ..Route::to("fd00:10:244:2::/64".parse().unwrap(), 21097, 82)
        };
        let v4 = Route {
            link: 2,
            gateway: Some(ip("10.199.0.2")),
            onlink: true,
            ..Route::to("10.244.2.0/24".parse().unwrap(), 254, 82)
        };
        for route in [v4, v6] {
            assert_eq!(Route::parse(&payload(&replace_route(&route))), Some(route));
        }
        let rule = Rule {
            family: Family::V6,
            priority: 32_000,
            table: 21097,
            protocol: 82,
            source: Some("fd00:10:244:1::/64".parse().unwrap()),
            mark: (0, 0xffff),
            plain: true,
        };
        assert_eq!(Rule::parse(&payload(&add_rule(&rule))), Some(rule.clone()));
        let all = Rule {
            family: Family::V4,
            source: None,
            mark: (0, 0),
            ..rule
        };
        assert_eq!(Rule::parse(&payload(&add_rule(&all))), Some(all));
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(4 + value.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A next hop of `RTA_MULTIPATH`.
    fn next_hop(flags: u8, weight: u8, link: u32, gateway: &[u8]) -> Vec<u8> {
        let gateway = attribute(RTA_GATEWAY, gateway);
        let length = u16::try_from(8 + gateway.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([flags, weight - 1]);
        bytes.extend(link.to_ne_bytes());
        bytes.extend(gateway);
        bytes
    }

    #[test]
    fn all_live_next_hops_of_an_answer_are_read() {
        let answer = |family: u8, attributes: &[u8]| {
            let mut bytes = vec![family, 16, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
            bytes.extend(attributes);
            RouteAnswer::parse(&bytes).unwrap().hops
        };
        let hop = |link, gateway: &str, weight| Hop {
            link,
            gateway: Some(ip(gateway)),
            weight,
        };
        let (a, b) = ([10, 199, 0, 254], [10, 198, 0, 254]);
        let both = [next_hop(0, 2, 2, &a), next_hop(0, 1, 3, &b)].concat();
        assert_eq!(
            answer(2, &attribute(RTA_MULTIPATH, &both)),
            [hop(2, "10.199.0.254", 2), hop(3, "10.198.0.254", 1)]
        );
        // RTNH_F_DEAD and RTNH_F_LINKDOWN.
        let one = [
            next_hop(1, 2, 2, &a),
            next_hop(0, 1, 3, &b),
            next_hop(16, 1, 4, &a),
        ]
        .concat();
        assert_eq!(
            answer(2, &attribute(RTA_MULTIPATH, &one)),
            [hop(3, "10.198.0.254", 1)]
        );
        // Where all are without carrier, the kernel has nothing better, either.
        let none = next_hop(16, 1, 2, &a);
        assert_eq!(answer(2, &attribute(RTA_MULTIPATH, &none)).len(), 1);
        let single = [
            attribute(RTA_OIF, &7u32.to_ne_bytes()),
            attribute(
                RTA_GATEWAY,
                &"fd00:199::fe".parse::<Ipv6Addr>().unwrap().octets(),
            ),
        ]
        .concat();
        assert_eq!(answer(10, &single), [hop(7, "fd00:199::fe", 1)]);
        let on_link = attribute(RTA_OIF, &7u32.to_ne_bytes());
        assert_eq!(answer(2, &on_link)[0].gateway, None);
        // Cut off anywhere, nothing panics.
        let whole = attribute(RTA_MULTIPATH, &both);
        for end in 0..whole.len() {
            answer(2, &whole[..end]);
        }
    }

    #[test]
    fn vlans_and_bonds_are_recognised() {
        let info = |kind: &[u8], settings: &[u8]| {
            let kind = attribute(IFLA_INFO_KIND, kind);
            let data = attribute(IFLA_INFO_DATA, settings);
            LinkKind::parse(&[kind, data].concat()).unwrap()
        };
        let vlan = attribute(IFLA_VLAN_ID, &100u16.to_ne_bytes());
        assert_eq!(info(b"vlan\0", &vlan), LinkKind::Vlan(100));
        let bond = [
            attribute(IFLA_BOND_MODE, &[1]),
            attribute(IFLA_BOND_ACTIVE_SLAVE, &4u32.to_ne_bytes()),
        ]
        .concat();
        let active_backup = BondLink {
            active_backup: true,
            active: 4,
        };
        assert_eq!(info(b"bond\0", &bond), LinkKind::Bond(active_backup));
        let lacp = attribute(IFLA_BOND_MODE, &[4]);
        assert_eq!(info(b"bond\0", &lacp), LinkKind::Bond(BondLink::default()));
        assert_eq!(info(b"vlanx\0", &vlan), LinkKind::Other);
    }
}
