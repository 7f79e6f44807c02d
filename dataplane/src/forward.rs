//! The decision about one packet: bytes and table in, verdict out. No clock, no counter, no I/O, no state.
//!
//! ```text
//!   from the NIC    outer headers exact? ─► sender a peer? ─► inner source in its lease? ─► inner destination ours? ─► deliver
//!   from the host   whole, and from our pods? ─► longest prefix ─► path of the flow ─► header template ─► send
//! ```
//!
//! The encapsulations are leaves in `encap`; which one applies is decided here. The loop over a burst is compiled for each
//! [`Kind`] of packet by itself and chosen by the burst's first one, so that no kind pays for another's code. That is a
//! guess about the others, and no more: what is not of the kind is decided as any packet is.

use ripstop_fib::{AdjacencyId, Backend, Encap, Hop, LongTemplate};

use crate::encap::{direct, ipip, udp, vxlan};
use crate::flow;
use crate::inner;
use crate::kind::Kind;
use crate::table::{Number, Side, Table};
use crate::verdict::{DropReason, FromHost, FromNic, Front};
use crate::wire::{
    self, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, IPV4_LEN, IPV6_LEN,
    VLAN_LEN,
};

/// Decides about a frame that the NIC received: Ethernet header first.
pub fn from_nic(frame: &[u8], table: &Table<'_>) -> FromNic {
    from_nic_mostly(Kind::from_nic(frame, table), frame, table)
}

/// [`from_nic`] where most frames are of one kind. Give it as a constant: the code is compiled for each kind by itself.
#[inline(always)]
pub fn from_nic_mostly(kind: Kind, frame: &[u8], table: &Table<'_>) -> FromNic {
    let received = match usual_from_nic(kind, frame, table) {
        Some(received) => received,
        None => received(frame, table),
    };
    match received {
        Ok(deliver) => deliver,
        Err(reason) => FromNic::Drop(reason),
    }
}

/// Decides about a packet that the kernel routed to the host door: IP header first. The outer header is written to the
/// end of `front`, which may be written to in any case.
///
/// `identification` becomes the outer header's; the caller counts it up, so that fragments made on the way are put
/// together rightly (RFC 6864 section 4.3).
pub fn from_host(
    packet: &[u8],
    front: &mut Front,
    table: &Table<'_>,
    identification: u16,
) -> FromHost {
    let kind = Kind::from_host(packet, table);
    from_host_mostly(kind, packet, front, table, identification)
}

/// [`from_host`] where most packets are of one kind; as [`from_nic_mostly`].
#[inline(always)]
pub fn from_host_mostly(
    kind: Kind,
    packet: &[u8],
    front: &mut Front,
    table: &Table<'_>,
    identification: u16,
) -> FromHost {
    let sent = match usual_from_host(kind, packet, front, table, identification) {
        Some(push) => Ok(push),
        None => sent(packet, front, table, identification),
    };
    match sent {
        Ok(push) => FromHost::Send { push },
        Err(reason) => FromHost::Drop(reason),
    }
}

/// The commonest frames from the NIC, each kind's for itself: untagged, over the family and through the tunnel of the
/// kind. `None` about all others, which are decided one by one.
#[inline(always)]
fn usual_from_nic(
    kind: Kind,
    frame: &[u8],
    table: &Table<'_>,
) -> Option<Result<FromNic, DropReason>> {
    const AT: usize = ETHERNET_LEN;
    match kind {
        Kind::Any => None,
        Kind::Vxlan4 => tunnelled4(frame, table, Backend::Vxlan)
            .map(|packet| vxlan::decapsulate4(packet, AT, table)),
        Kind::Ipip => tunnelled4(frame, table, Backend::Ipip)
            .map(|packet| ipip::decapsulate(packet, AT, table)),
        Kind::Udp => {
            tunnelled4(frame, table, Backend::Udp).map(|packet| udp::decapsulate(packet, AT, table))
        }
        Kind::Direct4 => untagged(frame, table, ETHERTYPE_IPV4)
            .filter(|packet| direct::is_for_us4(packet, table))
            .map(|packet| direct::receive4(packet, AT, table)),
        Kind::Vxlan6 => untagged(frame, table, ETHERTYPE_IPV6)
            .filter(|packet| version(packet) == Some(6) && table.backend == Backend::Vxlan)
            .filter(|packet| !direct::is_for_us6(packet, table))
            .map(|packet| vxlan::decapsulate6(packet, AT, table)),
        Kind::Direct6 => untagged(frame, table, ETHERTYPE_IPV6)
            .filter(|packet| version(packet) == Some(6) && direct::is_for_us6(packet, table))
            .map(|packet| direct::receive6(packet, AT, table)),
    }
}

/// The commonest packets from the host, each kind's for itself: plain, from our pods, through one adjacency of the kind.
/// `None` about all others, which are decided one by one.
#[inline(always)]
fn usual_from_host(
    kind: Kind,
    packet: &[u8],
    front: &mut Front,
    table: &Table<'_>,
    id: u16,
) -> Option<usize> {
    match kind {
        Kind::Any => None,
        Kind::Vxlan4 => {
            let (ip, template) = plain4(packet, table, Encap::Vxlan4)?;
            let hash = flow::hash4_plain(packet, ip, table.flow_seed, ip[0] == 0x45);
            Some(vxlan::encapsulate4(
                &template, packet, ip, table, hash, id, front,
            ))
        }
        Kind::Ipip => {
            let (ip, template) = plain4(packet, table, Encap::Ipip)?;
            Some(ipip::encapsulate(&template, packet, ip, table, id, front))
        }
        Kind::Udp => {
            let (ip, template) = plain4(packet, table, Encap::Udp)?;
            Some(udp::encapsulate(&template, packet, ip, table, id, front))
        }
        Kind::Direct4 => {
            let (_, template) = plain4(packet, table, Encap::Direct)?;
            Some(direct::encapsulate(&template, front))
        }
        Kind::Vxlan6 => {
            let (ip, id) = plain6(packet, table, Encap::Vxlan6)?;
            let template = table.image.long_template(id)?;
            let hash = flow::hash6(packet, ip, table.flow_seed);
            Some(vxlan::encapsulate6(
                &template, packet, ip, table, hash, front,
            ))
        }
        Kind::Direct6 => {
            let (_, id) = plain6(packet, table, Encap::Direct)?;
            Some(direct::encapsulate(&table.image.template(id)?, front))
        }
    }
}

/// How many packets ahead of the one that is decided about [`prefetch_from_nic`] and [`prefetch_from_host`] are called.
/// Enough to hide a miss of the second-level cache; with more of them, lines are pushed out of the first before their use.
pub const AHEAD: usize = 8;

/// Brings what [`from_nic`] will look up towards the cache.
#[inline(always)]
pub fn prefetch_from_nic(kind: Kind, frame: &[u8], table: &Table<'_>) {
    let image = &table.image;
    let packet = frame.get(ETHERNET_LEN..).unwrap_or_default();
    match kind {
        Kind::Any => prefetch_from_nic_otherwise(frame, table),
        Kind::Vxlan4 | Kind::Ipip | Kind::Udp => {
            if let Some(source) = packet.get(12..16) {
                image.prefetch_peer4(wire::be32(source, 0));
            }
        }
        Kind::Direct4 => {
            if let Some(source) = packet.get(12..16) {
                image.prefetch_route4(wire::be32(source, 0));
            }
        }
        Kind::Vxlan6 => {
            if let Some(source) = packet.get(8..24) {
                image.prefetch_peer6(wire::octets(source, 0));
            }
        }
        Kind::Direct6 => {
            if let Some(source) = packet.get(8..24) {
                image.prefetch_route6(wire::octets(source, 0));
            }
        }
    }
}

/// Brings what [`from_host`] will look up towards the cache; as [`prefetch_from_nic`].
#[inline(always)]
pub fn prefetch_from_host(kind: Kind, packet: &[u8], table: &Table<'_>) {
    let image = &table.image;
    match (kind, kind.encap()) {
        (Kind::Vxlan6 | Kind::Direct6, Some(encap)) => {
            if let Some(to) = packet.get(24..40) {
                image.prefetch_template6(wire::octets(to, 0), encap);
            }
        }
        (Kind::Vxlan4 | Kind::Ipip | Kind::Udp | Kind::Direct4, Some(encap)) => {
            if let Some(to) = packet.get(16..20) {
                image.prefetch_template4(wire::be32(to, 0), encap);
            }
        }
        (Kind::Any, _) | (_, None) => prefetch_from_host_otherwise(packet, table),
    }
}

#[inline(never)]
fn prefetch_from_nic_otherwise(frame: &[u8], table: &Table<'_>) {
    let at = match table.vlan {
        0 => ETHERNET_LEN,
        _ => ETHERNET_LEN + VLAN_LEN,
    };
    let packet = frame.get(at..).unwrap_or_default();
    let direct = table.backend == Backend::HostGw;
    let image = &table.image;
    let source4 = packet.get(12..16).map(|source| wire::be32(source, 0));
    let source6 = packet.get(8..24).map(|source| wire::octets(source, 0));
    match (version(packet), source4, source6) {
        (Some(4), Some(source), _) if direct => image.prefetch_route4(source),
        (Some(4), Some(source), _) => image.prefetch_peer4(source),
        (Some(6), _, Some(source)) if direct => image.prefetch_route6(source),
        (Some(6), _, Some(source)) => image.prefetch_peer6(source),
        _ => {}
    }
}

#[inline(never)]
fn prefetch_from_host_otherwise(packet: &[u8], table: &Table<'_>) {
    let to4 = packet.get(16..20).map(|to| wire::be32(to, 0));
    let to6 = packet.get(24..40).map(|to| wire::octets(to, 0));
    match (version(packet), to4, to6) {
        (Some(4), Some(to), _) => table.image.prefetch_route4(to),
        (Some(6), _, Some(to)) => table.image.prefetch_route6(to),
        _ => {}
    }
}

/// The IP version that a packet claims.
#[inline(always)]
fn version(packet: &[u8]) -> Option<u8> {
    packet.first().map(|first| first >> 4)
}

/// What is behind the Ethernet header of an untagged frame of this EtherType, on an untagged underlay.
#[inline(always)]
fn untagged<'f>(frame: &'f [u8], table: &Table<'_>, ether_type: u16) -> Option<&'f [u8]> {
    let (ethernet, packet) = frame.split_first_chunk::<ETHERNET_LEN>()?;
    let usual = table.vlan == 0 && wire::be16(ethernet, 12) == ether_type;
    usual.then_some(packet)
}

/// An IPv4 packet to our outer address, where `backend` is what such packets are taken apart by.
#[inline(always)]
fn tunnelled4<'f>(frame: &'f [u8], table: &Table<'_>, backend: Backend) -> Option<&'f [u8]> {
    let packet = untagged(frame, table, ETHERTYPE_IPV4)?;
    let ours = table.backend == backend && !direct::is_for_us4(packet, table);
    ours.then_some(packet)
}

/// A packet that one of our pods may send as it is, and the template of its one adjacency of this kind.
#[inline(always)]
fn plain4<'p>(
    packet: &'p [u8],
    table: &Table<'_>,
    encap: Encap,
) -> Option<(&'p [u8; IPV4_LEN], [u64; 8])> {
    let ip = packet.first_chunk::<IPV4_LEN>()?;
    let usual = ip[0] == 0x45
        && usize::from(wire::be16(ip, 2)) == packet.len()
        && packet.len() <= usize::from(table.v4.pod_mtu)
        && table.v4.is_local(wire::be32(ip, 12))
        && !inner::is_unusual4(ip);
    let id = table.image.leaf4(wire::be32(ip, 16)).via(encap)?;
    let template = table.image.template(id)?;
    usual.then_some((ip, template))
}

/// As [`plain4`], but for the template.
#[inline(always)]
fn plain6<'p>(
    packet: &'p [u8],
    table: &Table<'_>,
    encap: Encap,
) -> Option<(&'p [u8; IPV6_LEN], AdjacencyId)> {
    let ip = packet.first_chunk::<IPV6_LEN>()?;
    let usual = ip[0] >> 4 == 6
        && IPV6_LEN + usize::from(wire::be16(ip, 4)) == packet.len()
        && packet.len() <= usize::from(table.v6.pod_mtu)
        && table.v6.is_local(wire::ne128(ip, 8))
        && !inner::is_unusual6(ip);
    let id = table.image.leaf6(wire::octets(ip, 24)).via(encap)?;
    usual.then_some((ip, id))
}

/// Finds the IP header behind the Ethernet header, with a VLAN tag exactly if the underlay has one.
#[inline(never)]
fn received(frame: &[u8], table: &Table<'_>) -> Result<FromNic, DropReason> {
    let (ethernet, rest) = frame
        .split_first_chunk::<ETHERNET_LEN>()
        .ok_or(DropReason::OuterTruncated)?;
    let ether_type = wire::be16(ethernet, 12);
    let (packet, ether_type, at) = if table.vlan == 0 {
        (rest, ether_type, ETHERNET_LEN)
    } else {
        let (tag, packet) = rest
            .split_first_chunk::<VLAN_LEN>()
            .ok_or(DropReason::OuterTruncated)?;
        if ether_type != ETHERTYPE_VLAN || wire::be16(tag, 0) & 0x0fff != table.vlan {
            return Err(DropReason::OuterHeader);
        }
        (packet, wire::be16(tag, 2), ETHERNET_LEN + VLAN_LEN)
    };
    received_ip(packet, ether_type, at, table)
}

/// Decides about a packet that begins `at` bytes inside its frame.
#[inline]
fn received_ip(
    packet: &[u8],
    ether_type: u16,
    at: usize,
    table: &Table<'_>,
) -> Result<FromNic, DropReason> {
    match ether_type {
        ETHERTYPE_IPV4 => {
            if direct::is_for_us4(packet, table) {
                return direct::receive4(packet, at, table);
            }
            match table.backend {
                Backend::Vxlan => vxlan::decapsulate4(packet, at, table),
                Backend::Ipip => ipip::decapsulate(packet, at, table),
                Backend::Udp => udp::decapsulate(packet, at, table),
                Backend::HostGw | Backend::Alloc => Err(DropReason::OuterDestination),
            }
        }
        ETHERTYPE_IPV6 => {
            let ip = packet
                .first_chunk::<IPV6_LEN>()
                .ok_or(DropReason::OuterTruncated)?;
            if ip[0] >> 4 != 6 {
                return Err(DropReason::OuterHeader);
            }
            if direct::is_for_us6(packet, table) {
                return direct::receive6(packet, at, table);
            }
            match table.backend {
                Backend::Vxlan => vxlan::decapsulate6(packet, at, table),
                Backend::Ipip | Backend::Udp | Backend::HostGw | Backend::Alloc => {
                    Err(DropReason::OuterDestination)
                }
            }
        }
        _ => Err(DropReason::OuterHeader),
    }
}

/// Decides about a packet from the host, whatever it is.
#[inline(never)]
fn sent(
    packet: &[u8],
    front: &mut Front,
    table: &Table<'_>,
    identification: u16,
) -> Result<usize, DropReason> {
    match version(packet) {
        Some(4) => send4(packet, front, table, identification),
        Some(6) => send6(packet, front, table),
        _ => Err(DropReason::HostHeader),
    }
}

#[inline]
fn send4(
    packet: &[u8],
    front: &mut Front,
    table: &Table<'_>,
    id: u16,
) -> Result<usize, DropReason> {
    let ip = header4(packet)?;
    fits(packet, &table.v4)?;
    if inner::is_unusual4(ip) {
        inner::refuse4(packet, ip)?;
    }
    let hash = || flow::hash4(packet, ip, table.flow_seed);
    let (encap, adjacency) = path(table.image.lookup4(wire::be32(ip, 16)), hash, table)?;
    may_send(&table.v4, wire::be32(ip, 12), encap)?;
    if encap == Encap::Vxlan4Tagged {
        let template = &long(table, adjacency)?;
        return Ok(vxlan::encapsulate4_tagged(
            template,
            packet,
            ip,
            table,
            hash(),
            id,
            front,
        ));
    }
    let template = &table
        .image
        .template(adjacency)
        .ok_or(DropReason::TableDamaged)?;
    match encap {
        Encap::Ipip => Ok(ipip::encapsulate(template, packet, ip, table, id, front)),
        Encap::Udp => Ok(udp::encapsulate(template, packet, ip, table, id, front)),
        Encap::Direct => Ok(direct::encapsulate(template, front)),
        Encap::Vxlan4 => Ok(vxlan::encapsulate4(
            template,
            packet,
            ip,
            table,
            hash(),
            id,
            front,
        )),
        Encap::Vxlan4Tagged | Encap::Vxlan6 => Err(DropReason::TableDamaged),
    }
}

#[inline]
fn send6(packet: &[u8], front: &mut Front, table: &Table<'_>) -> Result<usize, DropReason> {
    let ip = header6(packet)?;
    fits(packet, &table.v6)?;
    if inner::is_unusual6(ip) {
        inner::refuse6(packet, ip)?;
    }
    let hash = || flow::hash6(packet, ip, table.flow_seed);
    let (encap, id) = path(table.image.lookup6(wire::octets(ip, 24)), hash, table)?;
    let source = wire::ne128(ip, 8);
    may_send(&table.v6, source, encap)?;
    Ok(match encap {
        Encap::Vxlan6 => vxlan::encapsulate6(&long(table, id)?, packet, ip, table, hash(), front),
        Encap::Direct => {
            let template = table.image.template(id);
            direct::encapsulate(&template.ok_or(DropReason::TableDamaged)?, front)
        }
        Encap::Vxlan4 | Encap::Vxlan4Tagged | Encap::Ipip | Encap::Udp => {
            return Err(DropReason::TableDamaged);
        }
    })
}

#[inline]
fn long<'r>(table: &Table<'r>, id: AdjacencyId) -> Result<LongTemplate<'r>, DropReason> {
    table
        .image
        .long_template(id)
        .ok_or(DropReason::TableDamaged)
}

/// Chooses among the paths of a flow, where there are several.
#[inline]
fn path(
    hop: Hop,
    hash: impl Fn() -> u64,
    table: &Table<'_>,
) -> Result<(Encap, AdjacencyId), DropReason> {
    let hop = match (hop, table.uplink) {
        (Hop::Paths(id), Some(uplink)) => table.image.path(id, uplink, flow::path_bits(hash())),
        (Hop::Paths(_), None) => Hop::Unresolved,
        (hop, _) => hop,
    };
    match hop {
        Hop::Via(encap, id) => Ok((encap, id)),
        Hop::Local => Err(DropReason::LocalDestination),
        Hop::Unresolved | Hop::Paths(_) => Err(DropReason::Unresolved),
        Hop::None => Err(DropReason::NoRoute),
    }
}

/// Pods send from this node's lease; the node itself, where there is no tunnel, from its own address, too.
#[inline]
fn may_send<A: Number>(side: &Side<A>, source: A, encap: Encap) -> Result<(), DropReason> {
    if side.is_local(source) || encap == Encap::Direct && source == side.address {
        Ok(())
    } else {
        Err(DropReason::SourceNotLocal)
    }
}

#[inline]
fn fits<A>(packet: &[u8], side: &Side<A>) -> Result<(), DropReason> {
    if packet.len() <= usize::from(side.pod_mtu) {
        Ok(())
    } else if side.pod_mtu == 0 {
        Err(DropReason::HostWithoutLease)
    } else {
        Err(DropReason::TooBig)
    }
}

/// The IPv4 header of a packet from the host. The kernel has checked it; this guards against a door that lies.
#[inline]
fn header4(packet: &[u8]) -> Result<&[u8; IPV4_LEN], DropReason> {
    let ip = packet
        .first_chunk::<IPV4_LEN>()
        .ok_or(DropReason::HostHeader)?;
    let total_len = usize::from(wire::be16(ip, 2));
    // Nearly all headers have no options, and then the length cannot be shorter than the header.
    let whole = total_len == packet.len() && (ip[0] == 0x45 || holds_options(ip));
    if whole {
        Ok(ip)
    } else {
        Err(DropReason::HostHeader)
    }
}

/// Whether an IPv4 packet is long enough for the header that it claims.
#[cold]
fn holds_options(ip: &[u8; IPV4_LEN]) -> bool {
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    (IPV4_LEN..=usize::from(wire::be16(ip, 2))).contains(&header_len)
}

/// As [`header4`].
#[inline]
fn header6(packet: &[u8]) -> Result<&[u8; IPV6_LEN], DropReason> {
    let ip = packet
        .first_chunk::<IPV6_LEN>()
        .ok_or(DropReason::HostHeader)?;
    if IPV6_LEN + usize::from(wire::be16(ip, 4)) != packet.len() {
        return Err(DropReason::HostHeader);
    }
    Ok(ip)
}
