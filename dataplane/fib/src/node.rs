//! What an image says about the node that forwards by it.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::build::{pack_mac, unpack_mac};

/// Uplinks that an image can name: interfaces that routes of the underlay leave by.
pub const UPLINKS: usize = 4;
/// NICs that an image can name: an uplink is one of them, or is made of several (a bond).
pub const NICS: usize = 16;

/// Word that the facts common to both families begin at.
pub(crate) const NODE_WORD: usize = 4;
/// Word that the IPv4 facts begin at.
const LOCAL4_WORD: usize = 32;
/// Word that the IPv6 facts begin at.
const LOCAL6_WORD: usize = 40;
/// Word of the first NIC; one word each.
const NICS_WORD: usize = 48;

const HAS_IPV4: u64 = 1 << 24;
const HAS_IPV6: u64 = 1 << 25;
const DIRECT: u64 = 1 << 26;
const INHERIT_DSCP: u64 = 1 << 27;

/// Which tunnel packets a node takes apart: flannel's `Backend.Type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Backend {
    /// Leases only, no data path.
    Alloc = 0,
    /// VXLAN (RFC 7348), IPv4 packets over IPv4 and IPv6 packets over IPv6.
    Vxlan = 1,
    /// IPv4 in IPv4 (RFC 2003).
    Ipip = 2,
    /// IPv4 packets as the payload of UDP over IPv4, without a header between.
    Udp = 3,
    /// No tunnel: packets of pods as they are.
    HostGw = 4,
}

impl Backend {
    /// All backends.
    pub const ALL: [Self; 5] = [
        Self::Alloc,
        Self::Vxlan,
        Self::Ipip,
        Self::Udp,
        Self::HostGw,
    ];

    /// Flannel's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alloc => "alloc",
            Self::Vxlan => "vxlan",
            Self::Ipip => "ipip",
            Self::Udp => "udp",
            Self::HostGw => "host-gw",
        }
    }

    /// A number that this version does not know reads as no data path.
    fn from_word(word: u64) -> Self {
        let number = word & 0xff;
        let known = Self::ALL
            .into_iter()
            .find(|backend| *backend as u64 == number);
        known.unwrap_or(Self::Alloc)
    }
}

/// Which differentiated services codepoint (RFC 2474) the outer header carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dscp {
    /// Always this one, 0 to 63.
    Fixed(u8),
    /// The inner packet's.
    Inherit,
}

/// This node in one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local<A> {
    /// Outer source of what it sends, outer destination of what it receives.
    pub address: A,
    /// Its own lease: network address and prefix length.
    pub subnet: (A, u8),
    /// The network that all leases come from.
    pub network: (A, u8),
    /// Largest inner packet in bytes.
    pub pod_mtu: u16,
    /// MAC of its VTEP: inner destination of what it receives, inner source of what it sends. Zero without VXLAN.
    pub vtep_mac: [u8; 6],
}

/// A network device that packets of the underlay arrive on and leave by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NicRecord {
    /// Its interface index; 0 if the record is not used.
    pub ifindex: u32,
    /// Which uplink it belongs to, below [`UPLINKS`].
    pub uplink: u8,
    /// 802.1Q identifier of the tag that its frames carry; 0 if they carry none.
    pub vlan: u16,
}

/// What an image says about the node that forwards by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The tunnel.
    pub backend: Backend,
    /// IPv4, if the node has pods there.
    pub v4: Option<Local<Ipv4Addr>>,
    /// IPv6, if the node has pods there.
    pub v6: Option<Local<Ipv6Addr>>,
    /// UDP destination port of the tunnel, of [`Backend::Vxlan`] and [`Backend::Udp`].
    pub udp_port: u16,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// Whether packets of peers' pods are accepted without a tunnel: [`Backend::HostGw`], or direct routing.
    pub direct: bool,
    /// DSCP of outer headers.
    pub dscp: Dscp,
    /// Seeds the hash that picks UDP source ports and paths, so that flows keep theirs across restarts.
    pub flow_seed: u64,
    /// The NICs of the underlay; records that are not used follow those that are.
    pub nics: [NicRecord; NICS],
}

impl Node {
    /// The record of a NIC, if packets of the underlay use it.
    pub fn nic(&self, ifindex: u32) -> Option<NicRecord> {
        let wanted = |record: &NicRecord| ifindex != 0 && record.ifindex == ifindex;
        self.nics.into_iter().find(wanted)
    }

    /// Writes the node's words into an image's header.
    pub(crate) fn encode(&self, header: &mut [u64]) {
        let mut facts = self.backend as u64 | u64::from(self.udp_port) << 32;
        match self.dscp {
            Dscp::Fixed(codepoint) => facts |= u64::from(codepoint & 0x3f) << 16,
            Dscp::Inherit => facts |= INHERIT_DSCP,
        }
        if self.direct {
            facts |= DIRECT;
        }
        if let Some(local) = &self.v4 {
            facts |= HAS_IPV4;
            let [address, subnet, network] = [local.address, local.subnet.0, local.network.0]
                .map(|addr| u64::from(u32::from(addr)));
            header[LOCAL4_WORD] = address | subnet << 32;
            header[LOCAL4_WORD + 1] = network;
            header[LOCAL4_WORD + 2] = sizes(local);
            header[LOCAL4_WORD + 3] = pack_mac(local.vtep_mac);
        }
        if let Some(local) = &self.v6 {
            facts |= HAS_IPV6;
            let addresses = [local.address, local.subnet.0, local.network.0];
            for (pair, address) in header[LOCAL6_WORD..]
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .zip(addresses)
            {
                *pair = halves(u128::from(address));
            }
            header[LOCAL6_WORD + 6] = sizes(local);
            header[LOCAL6_WORD + 7] = pack_mac(local.vtep_mac);
        }
        header[NODE_WORD] = facts;
        header[NODE_WORD + 1] = u64::from(self.vni);
        header[NODE_WORD + 2] = self.flow_seed;
        for (word, nic) in header[NICS_WORD..].iter_mut().zip(&self.nics) {
            *word =
                u64::from(nic.ifindex) | u64::from(nic.uplink) << 32 | u64::from(nic.vlan) << 48;
        }
    }

    /// Reads the node's words; `load` gives a word of the header.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "narrow values are packed into words"
    )]
    pub(crate) fn decode(load: impl Fn(usize) -> u64) -> Self {
        let facts = load(NODE_WORD);
        let v4 = || {
            let (first, network) = (load(LOCAL4_WORD), load(LOCAL4_WORD + 1));
            let subnet = Ipv4Addr::from((first >> 32) as u32);
            local(
                [
                    Ipv4Addr::from(first as u32),
                    subnet,
                    Ipv4Addr::from(network as u32),
                ],
                load(LOCAL4_WORD + 2),
                load(LOCAL4_WORD + 3),
            )
        };
        let v6 = || {
            let address = |word: usize| {
                Ipv6Addr::from(whole([
                    load(LOCAL6_WORD + word),
                    load(LOCAL6_WORD + word + 1),
                ]))
            };
            local(
                [address(0), address(2), address(4)],
                load(LOCAL6_WORD + 6),
                load(LOCAL6_WORD + 7),
            )
        };
        let nic = |index: usize| {
            let word = load(NICS_WORD + index);
            NicRecord {
                ifindex: word as u32,
                uplink: (word >> 32) as u8,
                vlan: (word >> 48) as u16,
            }
        };
        Self {
            backend: Backend::from_word(facts),
            v4: (facts & HAS_IPV4 != 0).then(v4),
            v6: (facts & HAS_IPV6 != 0).then(v6),
            udp_port: (facts >> 32) as u16,
            vni: load(NODE_WORD + 1) as u32,
            direct: facts & DIRECT != 0,
            dscp: if facts & INHERIT_DSCP != 0 {
                Dscp::Inherit
            } else {
                Dscp::Fixed((facts >> 16) as u8 & 0x3f)
            },
            flow_seed: load(NODE_WORD + 2),
            nics: core::array::from_fn(nic),
        }
    }
}

/// Prefix lengths and MTU in one word.
fn sizes<A>(local: &Local<A>) -> u64 {
    u64::from(local.subnet.1) | u64::from(local.network.1) << 8 | u64::from(local.pod_mtu) << 16
}

fn local<A>([address, subnet, network]: [A; 3], sizes: u64, mac: u64) -> Local<A> {
    let [subnet_len, network_len, low, high, ..] = sizes.to_le_bytes();
    Local {
        address,
        subnet: (subnet, subnet_len),
        network: (network, network_len),
        pod_mtu: u16::from_le_bytes([low, high]),
        vtep_mac: unpack_mac(mac),
    }
}

/// A 128-bit number as two words, low one first.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the halves are what is wanted"
)]
pub fn halves(number: u128) -> [u64; 2] {
    [number as u64, (number >> 64) as u64]
}

/// The number that [`halves`] split.
pub(crate) fn whole([low, high]: [u64; 2]) -> u128 {
    u128::from(low) | u128::from(high) << 64
}
