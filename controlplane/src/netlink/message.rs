//! The kernel objects that the control plane looks at and changes: links, addresses, routes, rules, neighbours
//! and VXLAN forwarding entries; how each is read, and the requests that change them.

use core::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_core::{NLA_ALIGNTO, NLA_HEADER_SIZE, NLA_TYPE_MASK};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};

use super::{Netlink, NetlinkError, Request};
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

/// Attribute numbers of the kernel's headers (if_link.h, if_addr.h, rtnetlink.h, neighbour.h, fib_rules.h).
mod attribute {
    pub(super) const IFLA_ADDRESS: u16 = 1;
    pub(super) const IFLA_IFNAME: u16 = 3;
    pub(super) const IFLA_MTU: u16 = 4;
    pub(super) const IFLA_LINKINFO: u16 = 18;
    pub(super) const IFLA_INFO_KIND: u16 = 1;
    pub(super) const IFLA_INFO_DATA: u16 = 2;
    pub(super) const IFLA_VXLAN_ID: u16 = 1;
    pub(super) const IFLA_VXLAN_GROUP: u16 = 2;
    pub(super) const IFLA_VXLAN_LINK: u16 = 3;
    pub(super) const IFLA_VXLAN_LOCAL: u16 = 4;
    pub(super) const IFLA_VXLAN_LEARNING: u16 = 7;
    pub(super) const IFLA_VXLAN_L2MISS: u16 = 13;
    pub(super) const IFLA_VXLAN_PORT: u16 = 15;
    pub(super) const IFLA_VXLAN_GBP: u16 = 23;
    pub(super) const IFLA_VXLAN_COLLECT_METADATA: u16 = 25;
    pub(super) const IFA_ADDRESS: u16 = 1;
    pub(super) const IFA_LOCAL: u16 = 2;
    pub(super) const IFA_FLAGS: u16 = 8;
    pub(super) const RTA_DST: u16 = 1;
    pub(super) const RTA_OIF: u16 = 4;
    pub(super) const RTA_GATEWAY: u16 = 5;
    pub(super) const RTA_PRIORITY: u16 = 6;
    pub(super) const RTA_PREFSRC: u16 = 7;
    pub(super) const RTA_TABLE: u16 = 15;
    pub(super) const NDA_DST: u16 = 1;
    pub(super) const NDA_LLADDR: u16 = 2;
    pub(super) const FRA_PRIORITY: u16 = 6;
    pub(super) const FRA_TABLE: u16 = 15;
    pub(super) const FRA_PROTOCOL: u16 = 21;
}
use attribute::{
    FRA_PRIORITY, FRA_PROTOCOL, FRA_TABLE, IFA_ADDRESS, IFA_FLAGS, IFA_LOCAL, IFLA_ADDRESS,
    IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU,
    IFLA_VXLAN_COLLECT_METADATA, IFLA_VXLAN_GBP, IFLA_VXLAN_GROUP, IFLA_VXLAN_ID,
    IFLA_VXLAN_L2MISS, IFLA_VXLAN_LEARNING, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL, IFLA_VXLAN_PORT,
    NDA_DST, NDA_LLADDR, RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE,
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

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// VXLAN settings, if it is a VXLAN device.
    pub vxlan: Option<VxlanLink>,
}

/// Settings of a VXLAN device that decide whether it is the one we want.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VxlanLink {
    /// Network identifier.
    pub vni: u32,
    /// Index of the underlay interface; 0 is none.
    pub link: u32,
    /// Outer source address.
    pub local: Option<Ipv4Addr>,
    /// Multicast group or default remote.
    pub group: Option<Ipv4Addr>,
    /// UDP port.
    pub port: u16,
    /// Learns addresses from packets.
    pub learning: bool,
    /// Reports unknown destinations.
    pub l2_miss: bool,
    /// Group policy extension.
    pub gbp: bool,
    /// Takes its settings per packet instead.
    pub external: bool,
}

impl Link {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        // struct ifinfomsg: family, pad, type; index at 4; flags at 8; change at 12.
        let index = u32_at(payload, 4)?;
        let flags = LinkFlags::from_bits_retain(u32_at(payload, 8)?);
        let mut link = Self {
            index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: flags.contains(LinkFlags::Up),
            running: flags.contains(LinkFlags::Running),
            loopback: flags.contains(LinkFlags::Loopback),
            vxlan: None,
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
                IFLA_LINKINFO => link.vxlan = VxlanLink::parse(value),
                _ => {}
            }
        }
        Some(link)
    }
}

impl VxlanLink {
    fn parse(info: &[u8]) -> Option<Self> {
        let is_vxlan = attributes(info)
            .any(|(kind, value)| kind == IFLA_INFO_KIND && value.starts_with(b"vxlan"));
        if !is_vxlan {
            return None;
        }
        let (_, settings) = attributes(info).find(|(kind, _)| *kind == IFLA_INFO_DATA)?;
        let mut vxlan = Self::default();
        let set = |value: &[u8]| value.first().is_some_and(|&byte| byte != 0);
        for (kind, value) in attributes(settings) {
            match kind {
                IFLA_VXLAN_ID => vxlan.vni = u32_at(value, 0)?,
                IFLA_VXLAN_GROUP => vxlan.group = ipv4(value),
                IFLA_VXLAN_LINK => vxlan.link = u32_at(value, 0)?,
                IFLA_VXLAN_LOCAL => vxlan.local = ipv4(value),
                IFLA_VXLAN_LEARNING => vxlan.learning = set(value),
                IFLA_VXLAN_L2MISS => vxlan.l2_miss = set(value),
                IFLA_VXLAN_PORT => vxlan.port = u16::from_be_bytes(value.try_into().ok()?),
                IFLA_VXLAN_GBP => vxlan.gbp = true,
                IFLA_VXLAN_COLLECT_METADATA => vxlan.external = set(value),
                _ => {}
            }
        }
        Some(vxlan)
    }
}

/// An IPv4 address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Interface index.
    pub link: u32,
    /// The address with its prefix length.
    pub net: Ipv4Net,
    /// Usable beyond the link.
    pub global: bool,
    /// Does not expire (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// Secondary on its subnet (`IFA_F_SECONDARY`).
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
                IFA_LOCAL => local = ipv4(value),
                IFA_ADDRESS => address = ipv4(value),
                IFA_FLAGS => flags = u32_at(value, 0)?,
                _ => {}
            }
        }
        Some(Self {
            link,
            net: Ipv4Net::new(local.or(address)?, prefix_len).ok()?,
            global: AddressScope::from(scope) == AddressScope::Universe,
            permanent: flags & PERMANENT != 0,
            secondary: flags & SECONDARY != 0,
            deprecated: flags & DEPRECATED != 0,
        })
    }
}

/// An IPv4 unicast route with one next hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Table number.
    pub table: u32,
    /// Destination.
    pub destination: Ipv4Net,
    /// Outgoing interface; 0 when there are several.
    pub link: u32,
    /// Next hop.
    pub gateway: Option<Ipv4Addr>,
    /// The next hop is taken to be on the link.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<Ipv4Addr>,
    /// Who installed it (`RTPROT_*`).
    pub protocol: u8,
    /// Its scope, 0 is global.
    pub scope: u8,
    /// Metric.
    pub priority: u32,
}

impl Route {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type; flags at 8.
        let [_, length, _, _, table, protocol, scope, kind] = *payload.first_chunk::<8>()?;
        let flags = RouteFlags::from_bits_retain(u32_at(payload, 8)?);
        if RouteType::from(kind) != RouteType::Unicast {
            return None;
        }
        let mut route = Self {
            table: u32::from(table),
            destination: Ipv4Net::new(Ipv4Addr::UNSPECIFIED, length).ok()?,
            link: 0,
            gateway: None,
            onlink: flags.contains(RouteFlags::Onlink),
            source: None,
            protocol,
            scope,
            priority: 0,
        };
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                RTA_DST => route.destination = Ipv4Net::new(ipv4(value)?, length).ok()?,
                RTA_OIF => route.link = u32_at(value, 0)?,
                RTA_GATEWAY => route.gateway = ipv4(value),
                RTA_PRIORITY => route.priority = u32_at(value, 0)?,
                RTA_PREFSRC => route.source = ipv4(value),
                RTA_TABLE => route.table = u32_at(value, 0)?,
                _ => {}
            }
        }
        Some(route)
    }
}

/// The kernel's answer to "how would this be sent".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteAnswer {
    /// Outgoing interface.
    pub link: u32,
    /// Next hop, if not on the link itself.
    pub gateway: Option<Ipv4Addr>,
    /// It is a unicast route (not local, broadcast or a refusal).
    pub unicast: bool,
}

impl RouteAnswer {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let kind = RouteType::from(*payload.get(7)?);
        let mut answer = Self {
            link: 0,
            gateway: None,
            unicast: kind == RouteType::Unicast,
        };
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                RTA_OIF => answer.link = u32_at(value, 0)?,
                RTA_GATEWAY => answer.gateway = ipv4(value),
                _ => {}
            }
        }
        Some(answer)
    }
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

/// An IPv4 neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Interface index.
    pub link: u32,
    /// Address of the neighbour.
    pub address: Ipv4Addr,
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
                NDA_DST => address = ipv4(value),
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
    pub remote: Ipv4Addr,
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
                NDA_DST => remote = ipv4(value),
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
    /// Position.
    pub priority: u32,
    /// Table it leads to.
    pub table: u32,
    /// Who installed it.
    pub protocol: u8,
    /// It matches every packet: no selector but the ones above is set.
    pub matches_all: bool,
}

impl Rule {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
        const FRA_SUPPRESS_IFGROUP: u16 = 13;
        const FRA_PAD: u16 = 18;
        // struct fib_rule_hdr: family, dst_len, src_len, tos, table, res1, res2, action; flags at 8.
        let [_, dst_len, src_len, tos, table, _, _, action] = *payload.first_chunk::<8>()?;
        let mut rule = Self {
            priority: 0,
            table: u32::from(table),
            protocol: 0,
            matches_all: dst_len == 0
                && src_len == 0
                && tos == 0
                && RuleAction::from(action) == RuleAction::ToTable
                && u32_at(payload, 8)? == 0,
        };
        for (kind, value) in attributes(payload.get(12..)?) {
            match kind {
                FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
                FRA_TABLE => rule.table = u32_at(value, 0)?,
                FRA_PROTOCOL => rule.protocol = *value.first()?,
                // "No limit" is all ones; anything else restricts the rule.
                FRA_SUPPRESS_PREFIXLEN | FRA_SUPPRESS_IFGROUP => {
                    rule.matches_all &= u32_at(value, 0)? == u32::MAX;
                }
                FRA_PAD => {}
                _ => rule.matches_all = false,
            }
        }
        Some(rule)
    }
}

/// What to list routes by.
#[derive(Debug, Clone, Copy)]
pub struct RouteFilter {
    /// Only this table.
    pub table: u32,
    /// Only routes through this interface; 0 is any.
    pub link: u32,
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

    /// All IPv4 addresses.
    pub fn addresses(&mut self) -> Result<Vec<Address>, NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let request = RouteNetlinkMessage::GetAddress(message);
        let mut addresses = Vec::new();
        self.dump("addresses", &request, RTM_NEWADDR, |payload| {
            addresses.extend(Address::parse(payload));
        })?;
        Ok(addresses)
    }

    /// IPv4 unicast routes.
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.attributes.push(RouteAttribute::Table(filter.table));
        if filter.link != 0 {
            message.attributes.push(RouteAttribute::Oif(filter.link));
        }
        let request = RouteNetlinkMessage::GetRoute(message);
        let mut routes = Vec::new();
        self.dump("routes", &request, RTM_NEWROUTE, |payload| {
            // Kernels before 4.20 ignore the filter.
            routes.extend(Route::parse(payload).filter(|route| {
                route.table == filter.table && (filter.link == 0 || route.link == filter.link)
            }));
        })?;
        Ok(routes)
    }

    /// IPv4 neighbour entries on one interface.
    pub fn neighbours(&mut self, link: u32) -> Result<Vec<Neighbour>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.attributes.push(NeighbourAttribute::IfIndex(link));
        let request = RouteNetlinkMessage::GetNeighbour(message);
        let mut neighbours = Vec::new();
        self.dump("neighbours", &request, RTM_NEWNEIGH, |payload| {
            neighbours.extend(Neighbour::parse(payload).filter(|neighbour| neighbour.link == link));
        })?;
        Ok(neighbours)
    }

    /// Forwarding entries of one VXLAN device that lead to an IPv4 address.
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

    /// All IPv4 rules.
    pub fn rules(&mut self) -> Result<Vec<Rule>, NetlinkError> {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        let request = RouteNetlinkMessage::GetRule(message);
        let mut rules = Vec::new();
        self.dump("rules", &request, RTM_NEWRULE, |payload| {
            rules.extend(Rule::parse(payload));
        })?;
        Ok(rules)
    }
}

pub(super) fn lookup_route(source: Ipv4Addr, destination: Ipv4Addr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 32;
    message.header.source_prefix_length = 32;
    // The transport as well: rules may select by it.
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(destination)),
        RouteAttribute::Source(RouteAddress::Inet(source)),
        RouteAttribute::IpProto(u8::from(IpProtocol::Udp)),
    ];
    RouteNetlinkMessage::GetRoute(message)
}

/// Makes a VXLAN device the way flannel does, down and without addresses.
pub fn create_vxlan(name: &str, vxlan: &VxlanLink, mtu: u32, mac: Mac) -> Request {
    let mut settings = vec![
        InfoVxlan::Id(vxlan.vni),
        InfoVxlan::Link(vxlan.link),
        InfoVxlan::Ttl(0),
        InfoVxlan::Tos(0),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Proxy(false),
        InfoVxlan::Rsc(false),
        InfoVxlan::L2Miss(vxlan.l2_miss),
        InfoVxlan::L3Miss(false),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
        InfoVxlan::Port(vxlan.port),
    ];
    settings.extend(vxlan.local.map(InfoVxlan::Local));
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(settings)),
        ]),
    ];
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
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

/// Switches a VXLAN device's learning.
pub fn set_vxlan_learning(index: u32, learning: bool) -> Request {
    let settings = InfoData::Vxlan(vec![InfoVxlan::Learning(learning)]);
    change_link(
        index,
        vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(settings),
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

fn address_message(link: u32, net: Ipv4Net) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = link;
    message.attributes = vec![
        AddressAttribute::Local(net.addr().into()),
        AddressAttribute::Address(net.addr().into()),
    ];
    message
}

/// Gives an interface an address.
pub fn add_address(link: u32, net: Ipv4Net) -> Request {
    Request {
        message: RouteNetlinkMessage::NewAddress(address_message(link, net)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
    }
}

/// Takes an address from an interface.
pub fn delete_address(link: u32, net: Ipv4Net) -> Request {
    Request {
        message: RouteNetlinkMessage::DelAddress(address_message(link, net)),
        flags: 0,
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = RouteScope::from(route.scope);
    message.header.kind = RouteType::Unicast;
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(RouteAddress::Inet(
        route.destination.network(),
    )));
    attributes.extend(
        route
            .gateway
            .map(|gateway| RouteAttribute::Gateway(RouteAddress::Inet(gateway))),
    );
    attributes.extend(
        route
            .source
            .map(|source| RouteAttribute::PrefSource(RouteAddress::Inet(source))),
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

fn neighbour_message(link: u32, address: Ipv4Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = link;
    message.header.kind = RouteType::Unicast;
    message
        .attributes
        .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(
            address,
        )));
    message
}

/// Installs a permanent neighbour entry.
pub fn replace_neighbour(link: u32, address: Ipv4Addr, mac: Mac) -> Request {
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
pub fn delete_neighbour(link: u32, address: Ipv4Addr) -> Request {
    Request {
        message: RouteNetlinkMessage::DelNeighbour(neighbour_message(link, address)),
        flags: 0,
    }
}

/// Has the kernel resolve or confirm a neighbour as if a packet were on its way there. The entry stays an ordinary
/// one. Not for permanent entries: the kernel would make them dynamic (net/core/neighbour.c, `__neigh_update`).
pub fn use_neighbour(link: u32, address: Ipv4Addr) -> Request {
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
pub fn replace_fdb(link: u32, mac: Mac, remote: Ipv4Addr) -> Request {
    let mut message = fdb_message(link, mac);
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(
            remote,
        )));
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
    message.header.family = AddressFamily::Inet;
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)),
    ];
    message
}

/// Installs a rule that matches everything.
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
