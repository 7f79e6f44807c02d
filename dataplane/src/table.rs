//! What `forward` looks packets up in: a pinned image, and the node's own facts in the form that packets are compared
//! with.

use ripstop_fib::{Image, ImageError, Node, Word};

/// Longest inner packet whose outer packet still has a length field that holds it: 65535 less the outer headers.
const INNER_MAX: u16 = u16::MAX - 50;

/// A forwarding table for one worker, made anew whenever the worker moves to another image.
#[derive(Debug, Clone, Copy)]
pub struct Table<'r> {
    /// Routes, templates and peers.
    pub image: Image<'r>,
    /// Our outer address.
    pub local: u32,
    /// UDP port of the tunnel.
    pub udp_port: u16,
    /// The VXLAN header's second word: the VNI and a zero octet.
    pub vni_word: u32,
    /// MAC of our VTEP.
    pub vtep_mac: [u8; 6],
    /// Network address of our own lease.
    pub subnet: u32,
    /// Mask of our own lease.
    pub subnet_mask: u32,
    /// Largest inner packet in bytes.
    pub pod_mtu: u16,
    /// Seed of the flow hash.
    pub flow_seed: u64,
}

impl<'r> Table<'r> {
    /// Reads the node's facts out of an image.
    pub fn new(image: Image<'r>) -> Self {
        let Node {
            v4,
            udp_port,
            vni,
            flow_seed,
            ..
        } = image.node();
        let (local, subnet, pod_mtu, vtep_mac) = match v4 {
            Some(v4) => (v4.address, v4.subnet, v4.pod_mtu, v4.vtep_mac),
            None => (
                core::net::Ipv4Addr::UNSPECIFIED,
                (core::net::Ipv4Addr::UNSPECIFIED, 32),
                0,
                [0; 6],
            ),
        };
        Self {
            image,
            local: local.into(),
            udp_port,
            vni_word: vni << 8,
            vtep_mac,
            subnet: subnet.0.into(),
            subnet_mask: u32::MAX
                .checked_shl(32 - u32::from(subnet.1.min(32)))
                .unwrap_or(0),
            pod_mtu: pod_mtu.min(INNER_MAX),
            flow_seed,
        }
    }

    /// Makes a table of the words of an image.
    ///
    /// # Errors
    /// When they are no image of this version.
    pub fn attach(words: &'r [Word]) -> Result<Self, ImageError> {
        Image::attach(words).map(Self::new)
    }

    /// Whether an inner destination belongs to this node.
    #[inline]
    pub fn is_local(&self, addr: u32) -> bool {
        (addr ^ self.subnet) & self.subnet_mask == 0
    }
}
