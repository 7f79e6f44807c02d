//! The decision about one packet: bytes and table in, verdict out. No clock, no counter, no I/O, no state.
//!
//! ```text
//!   from the NIC    outer headers exact? ─► sender a peer? ─► inner source in its lease? ─► inner destination ours? ─► deliver
//!   from the host   IPv4 and whole? ─► longest prefix ─► header template of the next hop ─► send
//! ```
//!
//! The encapsulations are leaves in `encap`; which one applies is decided here.

use ripstop_fib::{Encap, Hop};

use crate::encap::vxlan;
use crate::table::Table;
use crate::verdict::{DropReason, FromHost, FromNic};
use crate::wire::{self, ETHERNET_LEN, IPV4_LEN};

/// Decides about a frame that the NIC received: Ethernet header first.
#[inline]
pub fn from_nic(frame: &[u8], table: &Table<'_>) -> FromNic {
    match vxlan::decapsulate(frame, table) {
        Ok(deliver) => deliver,
        Err(reason) => FromNic::Drop(reason),
    }
}

/// Decides about a packet that the kernel routed to the host door: IP header first.
///
/// `identification` becomes the outer header's; the caller counts it up, so that fragments made on the way are put
/// together rightly (RFC 6864 section 4.3).
#[inline]
pub fn from_host(packet: &[u8], table: &Table<'_>, identification: u16) -> FromHost {
    match encapsulated(packet, table, identification) {
        Ok(header) => FromHost::Send(header),
        Err(reason) => FromHost::Drop(reason),
    }
}

/// Brings what [`from_nic`] will look up towards the cache; called for all frames of a burst before the first decision.
/// The value means nothing.
#[inline]
pub fn warm_from_nic(frame: &[u8], table: &Table<'_>) -> u64 {
    let source = ETHERNET_LEN + 12;
    match frame.get(source..source + 4) {
        Some(source) => table.image.warm_peer4(wire::be32(source, 0)),
        None => 0,
    }
}

/// Brings what [`from_host`] will look up towards the cache; as [`warm_from_nic`].
#[inline]
pub fn warm_from_host(packet: &[u8], table: &Table<'_>) -> u64 {
    match packet.get(16..20) {
        Some(destination) => table.image.warm_route4(wire::be32(destination, 0)),
        None => 0,
    }
}

#[inline]
fn encapsulated(
    packet: &[u8],
    table: &Table<'_>,
    identification: u16,
) -> Result<[u8; 64], DropReason> {
    let ip = inner_header(packet)?;
    if packet.len() > usize::from(table.pod_mtu) {
        return Err(DropReason::TooBig);
    }
    match table.image.lookup4(wire::be32(ip, 16)) {
        Hop::Via(Encap::Vxlan4, adjacency) => {
            let template = table
                .image
                .template(adjacency)
                .ok_or(DropReason::TableDamaged)?;
            Ok(vxlan::encapsulate(
                &template,
                packet,
                ip,
                table.flow_seed,
                identification,
            ))
        }
        Hop::Local => Err(DropReason::LocalDestination),
        Hop::Unresolved | Hop::Via(..) | Hop::Paths(_) => Err(DropReason::Unresolved),
        Hop::None => Err(DropReason::NoRoute),
    }
}

/// The IPv4 header of a packet from the host. The kernel has checked it; this guards against a door that lies.
#[inline]
fn inner_header(packet: &[u8]) -> Result<&[u8; IPV4_LEN], DropReason> {
    let version = packet.first().ok_or(DropReason::HostHeader)? >> 4;
    if version != 4 {
        return Err(DropReason::HostNotIpv4);
    }
    let ip = packet
        .first_chunk::<IPV4_LEN>()
        .ok_or(DropReason::HostHeader)?;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let total_len = usize::from(wire::be16(ip, 2));
    if header_len < IPV4_LEN || total_len < header_len || total_len != packet.len() {
        return Err(DropReason::HostHeader);
    }
    Ok(ip)
}
