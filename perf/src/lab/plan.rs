//! What a lab's nodes are joined by: flannel's backend, the address families, the shape of the underlay.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::address::{self, Family};

/// How a pod's packet gets to another node, by flannel's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Backend {
    /// Ethernet in VXLAN in UDP, over the family of the pod.
    Vxlan,
    /// IPv4 in IPv4.
    Ipip,
    /// IPv4 in UDP.
    Udp,
    /// As it is, to the node as next hop.
    HostGw,
}

impl Backend {
    /// Its name in net-conf.json.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Ipip => "ipip",
            Self::Udp => "udp",
            Self::HostGw => "host-gw",
        }
    }

    /// Whether flannel has it for this family.
    #[must_use]
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::Vxlan | Self::HostGw => true,
            Self::Ipip | Self::Udp => family == Family::Ipv4,
        }
    }

    /// What it adds to a pod's packet.
    #[must_use]
    pub fn overhead(self, family: Family) -> u16 {
        match (self, family) {
            (Self::Vxlan, Family::Ipv4) => address::VXLAN_OVERHEAD,
            (Self::Vxlan, Family::Ipv6) => address::VXLAN_OVERHEAD6,
            (Self::Ipip, _) => 20,
            (Self::Udp, _) => 28,
            (Self::HostGw, _) => 0,
        }
    }

    /// The kernel's tunnel device for a family, where it has one.
    #[must_use]
    pub fn device(self, family: Family) -> Option<&'static str> {
        match (self, family) {
            (Self::Vxlan, Family::Ipv4) => Some("flannel.1"),
            (Self::Vxlan, Family::Ipv6) => Some("flannel-v6.1"),
            (Self::Ipip, Family::Ipv4) => Some("flannel.ipip"),
            (Self::Udp, Family::Ipv4) => Some("flannel0"),
            (Self::Ipip | Self::Udp, Family::Ipv6) | (Self::HostGw, _) => None,
        }
    }
}

/// The families that pods and underlay have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Families {
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both.
    Dual,
}

impl Families {
    /// Whether this one is among them.
    #[must_use]
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::Ipv4 => family == Family::Ipv4,
            Self::Ipv6 => family == Family::Ipv6,
            Self::Dual => true,
        }
    }

    /// They, one by one.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        Family::ALL
            .into_iter()
            .filter(move |family| self.has(*family))
    }
}

/// What a node's underlay interface is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Underlay {
    /// The NIC itself, `eth0`.
    Nic,
    /// Frames of `eth0` with this 802.1Q id, `eth0.<id>`.
    Vlan(u16),
    /// Two NICs, `eth0` and `eth1`, joined as `bond0`.
    Bond(BondMode),
    /// The frames of these two with this 802.1Q id, `bond0.<id>`.
    VlanOnBond(BondMode, u16),
}

impl Underlay {
    /// The 802.1Q id that all frames between nodes carry.
    #[must_use]
    pub fn vlan(self) -> Option<u16> {
        match self {
            Self::Vlan(id) | Self::VlanOnBond(_, id) => Some(id),
            Self::Nic | Self::Bond(_) => None,
        }
    }

    /// How the two NICs are joined, if there are two.
    #[must_use]
    pub fn bond(self) -> Option<BondMode> {
        match self {
            Self::Bond(mode) | Self::VlanOnBond(mode, _) => Some(mode),
            Self::Nic | Self::Vlan(_) => None,
        }
    }

    /// The interface that has the node's addresses.
    #[must_use]
    pub fn interface(self) -> String {
        match self {
            Self::Nic => "eth0".to_owned(),
            Self::Vlan(id) => format!("eth0.{id}"),
            Self::Bond(_) => "bond0".to_owned(),
            Self::VlanOnBond(_, id) => format!("bond0.{id}"),
        }
    }
}

/// Modes of a bond (Documentation/networking/bonding.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BondMode {
    /// One NIC carries everything, the other stands by. The switch knows of nothing.
    ActiveBackup,
    /// Both carry, each flow keeps to one; the switch has joined its two ports, too.
    BalanceXor,
    /// The same, agreed upon by LACP.
    Lacp,
}

impl BondMode {
    /// Whether the switch has joined its two ports as well.
    pub(super) fn has_two_ends(self) -> bool {
        match self {
            Self::ActiveBackup => false,
            Self::BalanceXor | Self::Lacp => true,
        }
    }

    /// What `ip link add type bond` is told: the kernel looks at the carrier every 50 ms, and a flow is told
    /// from others by addresses and ports, of the inner packet where there is one.
    pub(super) fn options(self) -> &'static str {
        match self {
            Self::ActiveBackup => "mode active-backup miimon 50",
            Self::BalanceXor => "mode balance-xor xmit_hash_policy encap3+4 miimon 50",
            Self::Lacp => "mode 802.3ad lacp_rate fast xmit_hash_policy encap3+4 miimon 50",
        }
    }
}

/// The plan of a lab's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) backend: Backend,
    /// Peers on the same segment get packets without a tunnel (`DirectRouting`).
    pub(super) direct: bool,
    pub(super) families: Families,
    /// The IPv4 network that all leases lie in.
    pub(super) network: String,
    pub(super) mtu: u16,
    /// The segment of each node; beyond the end, segment 0. Segments are joined by the fabric as a router.
    pub(super) segments: Vec<u8>,
    /// Routers of each segment. A node's default route goes over all of them.
    pub(super) routers: u8,
    /// Uplinks of each node, 1 or 2. Its default route goes over all of them.
    pub(super) uplinks: u8,
    /// What an uplink is made of; anything but a NIC only where there is one.
    pub(super) underlay: Underlay,
}

impl Plan {
    pub(super) fn flat() -> Self {
        Self {
            backend: Backend::Vxlan,
            direct: false,
            families: Families::Ipv4,
            network: address::POD_NETWORK.to_owned(),
            mtu: 1500,
            segments: Vec::new(),
            routers: 1,
            uplinks: 1,
            underlay: Underlay::Nic,
        }
    }

    /// The segment of a node's first uplink.
    pub(super) fn segment(&self, node: u8) -> u8 {
        let position = usize::from(node).wrapping_sub(1);
        self.segments.get(position).copied().unwrap_or_default()
    }

    /// All segments, those of second uplinks included.
    pub(super) fn all_segments(&self) -> Vec<u8> {
        let mut segments = self.segments.clone();
        segments.push(0);
        segments.sort_unstable();
        segments.dedup();
        if self.uplinks > 1 {
            segments.extend(
                segments
                    .clone()
                    .iter()
                    .map(|segment| address::SECOND_UPLINK + segment),
            );
        }
        segments
    }

    /// The families that there is a pod network for.
    pub(super) fn families(&self) -> impl Iterator<Item = Family> {
        let backend = self.backend;
        self.families
            .iter()
            .filter(move |family| backend.has(*family))
    }

    /// The longest packet that a pod of this family can send to another node.
    pub(super) fn pod_mtu(&self, family: Family) -> u16 {
        self.mtu - self.backend.overhead(family)
    }

    /// MTU of the pods' interfaces: both families share it, so that of the smaller.
    pub(super) fn interface_mtu(&self) -> u16 {
        let mtus = self.families().map(|family| self.pod_mtu(family));
        mtus.min().unwrap_or(self.mtu)
    }

    /// Whether packets between two nodes go without a tunnel.
    pub(super) fn is_direct(&self, one: u8, other: u8) -> bool {
        self.backend == Backend::HostGw || (self.direct && self.segment(one) == self.segment(other))
    }

    /// The network interfaces of a node's uplinks: what has its addresses.
    pub(super) fn interfaces(&self) -> Vec<String> {
        if self.uplinks > 1 {
            return self.nics().iter().map(ToString::to_string).collect();
        }
        vec![self.underlay.interface()]
    }

    /// The NICs below them.
    pub(super) fn nics(&self) -> &'static [&'static str] {
        if self.uplinks > 1 || self.underlay.bond().is_some() {
            &["eth0", "eth1"]
        } else {
            &["eth0"]
        }
    }

    /// What stands in net-conf.json.
    pub(super) fn net_conf(&self) -> Value {
        let mut conf = json!({ "Backend": { "Type": self.backend.name() } });
        if self.direct {
            conf["Backend"]["DirectRouting"] = true.into();
        }
        if self.families.has(Family::Ipv6) {
            conf["EnableIPv6"] = true.into();
            conf["IPv6Network"] = address::POD_NETWORK6.into();
        }
        if self.families.has(Family::Ipv4) {
            conf["Network"] = self.network.as_str().into();
        } else {
            conf["EnableIPv4"] = false.into();
        }
        conf
    }
}
