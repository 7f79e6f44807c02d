//! What `forward` looks packets up in: a pinned image, and the node's own facts in the form that packets are compared
//! with.

use core::net::Ipv6Addr;
use core::ops::{BitAnd, BitXor};

use ripstop_fib::{Backend, Dscp, Image, ImageError, Local, Word};

use crate::encap::vxlan;
use crate::wire::ECN_MASK;

/// Longest inner packet whose outer packet still has a length field that holds it: 65535 less the outer headers.
const INNER_MAX: u16 = u16::MAX - 50;

/// This node in one address family, addresses as numbers.
#[derive(Debug, Clone, Copy)]
pub struct Side<A> {
    /// Our outer address.
    pub address: A,
    /// Network address of our own lease.
    subnet: A,
    /// Mask of our own lease.
    mask: A,
    /// Largest inner packet in bytes; 0 if this node has no lease in this family.
    pub pod_mtu: u16,
    /// MAC of our VTEP.
    pub vtep_mac: [u8; 6],
}

/// An address as a number: `u32`, or `u128` as its octets lie in memory.
pub trait Number:
    Copy + Default + PartialEq + BitAnd<Output = Self> + BitXor<Output = Self>
{
}
impl Number for u32 {}
impl Number for u128 {}

impl<A: Number> Side<A> {
    fn new<N>(
        local: Option<Local<N>>,
        number: impl Fn(N) -> A,
        mask: impl Fn(u8) -> A,
        all_ones: A,
    ) -> Self {
        match local {
            Some(local) => Self {
                address: number(local.address),
                subnet: number(local.subnet.0),
                mask: mask(local.subnet.1),
                pod_mtu: local.pod_mtu.min(INNER_MAX),
                vtep_mac: local.vtep_mac,
            },
            // The subnet is one address that no packet carries as its destination.
            None => Self {
                address: A::default(),
                subnet: A::default(),
                mask: all_ones,
                pod_mtu: 0,
                vtep_mac: [0; 6],
            },
        }
    }

    /// Whether an inner address belongs to this node's lease.
    #[inline]
    pub fn is_local(&self, addr: A) -> bool {
        (addr ^ self.subnet) & self.mask == A::default()
    }
}

/// A forwarding table for one worker, made anew whenever the worker moves to another image.
#[derive(Debug, Clone, Copy)]
pub struct Table<'r> {
    /// Routes, templates and peers.
    pub image: Image<'r>,
    /// Which tunnel packets are taken apart.
    pub backend: Backend,
    /// Whether packets without a tunnel are.
    pub direct: bool,
    /// This node in IPv4.
    pub v4: Side<u32>,
    /// This node in IPv6.
    pub v6: Side<u128>,
    /// UDP port of the tunnel.
    pub udp_port: u16,
    /// The VXLAN header's second word: the VNI and a zero octet.
    pub vni_word: u32,
    /// What all VXLAN packets over IPv6 add to their UDP checksum.
    pub(crate) vxlan6_sum: u64,
    /// Bits of the inner type-of-service octet that are copied into the outer one.
    pub tos_mask: u8,
    /// Uplink of the worker's NIC; `None` if packets of the underlay do not use that NIC.
    pub uplink: Option<u8>,
    /// 802.1Q identifier that frames on the worker's NIC carry; 0 for none.
    pub vlan: u16,
    /// Seed of the flow hash.
    pub flow_seed: u64,
}

impl<'r> Table<'r> {
    /// Reads the node's facts out of an image, for a worker on the NIC with this interface index.
    pub fn new(image: Image<'r>, ifindex: u32) -> Self {
        let node = image.node();
        let nic = node.nic(ifindex);
        let mask4 = |len: u8| {
            let host_bits = 32 - u32::from(len.min(32));
            u32::MAX.checked_shl(host_bits).unwrap_or(0)
        };
        let octets6 = |address: Ipv6Addr| u128::from_ne_bytes(address.octets());
        let mask6 = |len: u8| {
            let host_bits = 128 - u32::from(len.min(128));
            u128::MAX.checked_shl(host_bits).unwrap_or(0).to_be()
        };
        let v6 = Side::new(node.v6, octets6, mask6, u128::MAX);
        Self {
            image,
            backend: node.backend,
            direct: node.direct,
            v4: Side::new(node.v4, u32::from, mask4, u32::MAX),
            v6,
            udp_port: node.udp_port,
            vni_word: node.vni << 8,
            vxlan6_sum: vxlan::known_sum6(v6.address, node.vni << 8),
            tos_mask: match node.dscp {
                Dscp::Fixed(_) => ECN_MASK,
                Dscp::Inherit => u8::MAX,
            },
            uplink: nic.map(|nic| nic.uplink),
            vlan: nic.map_or(0, |nic| nic.vlan),
            flow_seed: node.flow_seed,
        }
    }

    /// Makes a table of the words of an image.
    ///
    /// # Errors
    /// When they are no image of this version.
    pub fn attach(words: &'r [Word], ifindex: u32) -> Result<Self, ImageError> {
        Image::attach(words).map(|image| Self::new(image, ifindex))
    }
}
