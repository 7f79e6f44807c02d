//! What the packets of a burst mostly are, by a look at one of them.

use ripstop_fib::{Backend, Encap, Hop};

use crate::encap::direct;
use crate::table::Table;
use crate::wire::{self, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6};

/// Kinds of packets that have a loop of their own. All but [`Kind::Any`] are without a VLAN tag on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// None in particular.
    Any,
    /// VXLAN over IPv4.
    Vxlan4,
    /// VXLAN over IPv6.
    Vxlan6,
    /// IPv4 in IPv4.
    Ipip,
    /// IPv4 as the payload of UDP over IPv4.
    Udp,
    /// IPv4 without a tunnel.
    Direct4,
    /// IPv6 without a tunnel.
    Direct6,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Any,
        Self::Vxlan4,
        Self::Vxlan6,
        Self::Ipip,
        Self::Udp,
        Self::Direct4,
        Self::Direct6,
    ];

    /// The kind of a frame from the NIC.
    pub fn from_nic(frame: &[u8], table: &Table<'_>) -> Self {
        let Some((ethernet, packet)) = frame.split_first_chunk::<ETHERNET_LEN>() else {
            return Self::Any;
        };
        match (wire::be16(ethernet, 12), table.backend) {
            (ETHERTYPE_IPV4, _) if direct::is_for_us4(packet, table) => Self::Direct4,
            (ETHERTYPE_IPV6, _) if direct::is_for_us6(packet, table) => Self::Direct6,
            (ETHERTYPE_IPV4, Backend::Vxlan) => Self::Vxlan4,
            (ETHERTYPE_IPV6, Backend::Vxlan) => Self::Vxlan6,
            (ETHERTYPE_IPV4, Backend::Ipip) => Self::Ipip,
            (ETHERTYPE_IPV4, Backend::Udp) => Self::Udp,
            _ => Self::Any,
        }
    }

    /// The kind of a packet from the host.
    pub fn from_host(packet: &[u8], table: &Table<'_>) -> Self {
        let (hop, direct) = match packet.first().map(|first| first >> 4) {
            Some(4) => match packet.get(16..20) {
                Some(to) => (table.image.lookup4(wire::be32(to, 0)), Self::Direct4),
                None => return Self::Any,
            },
            Some(6) => match packet.get(24..40) {
                Some(to) => (table.image.lookup6(wire::octets(to, 0)), Self::Direct6),
                None => return Self::Any,
            },
            _ => return Self::Any,
        };
        match hop {
            Hop::Via(Encap::Vxlan4, _) => Self::Vxlan4,
            Hop::Via(Encap::Vxlan6, _) => Self::Vxlan6,
            Hop::Via(Encap::Ipip, _) => Self::Ipip,
            Hop::Via(Encap::Udp, _) => Self::Udp,
            Hop::Via(Encap::Direct, _) => direct,
            Hop::Via(Encap::Vxlan4Tagged, _)
            | Hop::Paths(_)
            | Hop::None
            | Hop::Local
            | Hop::Unresolved => Self::Any,
        }
    }

    /// How packets of this kind are sent.
    #[inline]
    pub(crate) const fn encap(self) -> Option<Encap> {
        match self {
            Self::Any => None,
            Self::Vxlan4 => Some(Encap::Vxlan4),
            Self::Vxlan6 => Some(Encap::Vxlan6),
            Self::Ipip => Some(Encap::Ipip),
            Self::Udp => Some(Encap::Udp),
            Self::Direct4 | Self::Direct6 => Some(Encap::Direct),
        }
    }
}
