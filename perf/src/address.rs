//! The lab's address plan: pure functions from a node's number to every address it has.
//!
//! Nodes count from 1, pods of a node from 0. Every MAC address is locally administered, carries
//! `RS` in bytes 1 and 2 and its kind in byte 3, so that a dump reads itself.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// An address family: which of its two addresses a host is talked to by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// Bytes of an IP header without options, and of a UDP header.
    #[must_use]
    pub const fn udp_headers(self) -> u16 {
        match self {
            Self::Ipv4 => 28,
            Self::Ipv6 => 48,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// The most nodes that one lab can have: the underlay address after the last one stays free for
/// the attacker.
pub const NODES_MAX: u8 = 50;
/// The most pods that one node can have.
pub const PODS_MAX: u8 = 100;
/// The underlay's switch and gateway.
pub const FABRIC: Ipv4Addr = Ipv4Addr::new(10, 199, 0, 1);
/// The attacker, who sits on the underlay and is nobody's peer.
pub const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 199, 0, 66);
/// The same for IPv6.
pub const FABRIC6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x199, 0, 0, 0, 0, 0, 1);
/// The same for IPv6.
pub const ATTACKER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x199, 0, 0, 0, 0, 0, 0x66);
/// The attacker's MAC address on the underlay.
pub const ATTACKER_MAC: Mac = Mac([0x02, 0x52, 0x53, 0x66, 0, 0x66]);
/// The pod network, as net-conf.json has it.
pub const POD_NETWORK: &str = "10.244.0.0/16";
/// The same for IPv6.
pub const POD_NETWORK6: &str = "fd00:10:244::/48";
/// UDP port of the VXLAN tunnel (flannel's default on Linux).
pub const VXLAN_PORT: u16 = 8472;
/// UDP port of the tunnel of flannel's udp backend.
pub const UDP_PORT: u16 = 8285;
/// VNI of the tunnel (flannel's default).
pub const VNI: u32 = 1;
/// What VXLAN over IPv4 adds to a pod's packet.
pub const VXLAN_OVERHEAD: u16 = 50;
/// What VXLAN over IPv6 adds.
pub const VXLAN_OVERHEAD6: u16 = 70;
/// The segment of a node's second uplink is the first one's number plus this.
pub const SECOND_UPLINK: u8 = 100;

/// Underlay address of a node where all nodes are on one segment.
#[must_use]
pub fn underlay(node: u8) -> Ipv4Addr {
    underlay_in(0, node)
}

/// The same for IPv6.
#[must_use]
pub fn underlay6(node: u8) -> Ipv6Addr {
    underlay6_in(0, node)
}

/// Underlay address of a node on a segment.
#[must_use]
pub fn underlay_in(segment: u8, node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 199, segment, 10 + node)
}

/// The same for IPv6.
#[must_use]
pub fn underlay6_in(segment: u8, node: u8) -> Ipv6Addr {
    Ipv6Addr::new(
        0xfd00,
        0x199,
        segment.into(),
        0,
        0,
        0,
        0,
        0x10 + u16::from(node),
    )
}

/// Address of a segment's router; a segment may have several, which count from 0.
#[must_use]
pub fn router(segment: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 199, segment, 1 + number)
}

/// The same for IPv6.
#[must_use]
pub fn router6(segment: u8, number: u8) -> Ipv6Addr {
    Ipv6Addr::new(
        0xfd00,
        0x199,
        segment.into(),
        0,
        0,
        0,
        0,
        1 + u16::from(number),
    )
}

/// MAC address of a segment's router.
#[must_use]
pub fn router_mac(segment: u8, number: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x05, segment, number])
}

/// MAC address of a node's `eth0`.
#[must_use]
pub fn underlay_mac(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x01, 0, node])
}

/// MAC address of a node's second uplink, `eth1`.
#[must_use]
pub fn second_uplink_mac(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x04, 0, node])
}

/// MAC address of the switch's end of a node's bond.
#[must_use]
pub fn switch_mac(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x08, 0, node])
}

/// MAC address of a node's tunnel end point.
#[must_use]
pub fn vtep_mac(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0, 0, node])
}

/// MAC address of a node's tunnel end point for IPv6.
#[must_use]
pub fn vtep_mac6(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x06, 0, node])
}

/// Network address of a node's lease for IPv6, also the address of its `flannel-v6.1`.
#[must_use]
pub fn subnet6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 0)
}

/// A node's lease for IPv6 in prefix notation.
#[must_use]
pub fn subnet6_prefix(node: u8) -> String {
    format!("{}/64", subnet6(node))
}

/// The IPv6 address of a node's `cni0`, the gateway of its pods.
#[must_use]
pub fn gateway6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 1)
}

/// The IPv6 address of a pod.
#[must_use]
pub fn pod6(node: u8, pod: u8) -> Ipv6Addr {
    Ipv6Addr::new(
        0xfd00,
        0x10,
        0x244,
        node.into(),
        0,
        0,
        0,
        2 + u16::from(pod),
    )
}

/// Network address of a node's lease, also the address of its `flannel.1`.
#[must_use]
pub fn subnet(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 0)
}

/// A node's lease in prefix notation.
#[must_use]
pub fn subnet_prefix(node: u8) -> String {
    format!("{}/24", subnet(node))
}

/// Address of a node's `cni0`, the gateway of its pods.
#[must_use]
pub fn gateway(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 1)
}

/// MAC address of a node's `cni0`.
#[must_use]
pub fn gateway_mac(node: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x03, 0, node])
}

/// Address of a pod.
#[must_use]
pub fn pod(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 2 + pod)
}

/// MAC address of a pod's `eth0`.
#[must_use]
pub fn pod_mac(node: u8, pod: u8) -> Mac {
    Mac([0x02, 0x52, 0x53, 0x02, node, pod])
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .with_context(|| format!("MAC address {text:?} is too short"))?;
            *byte =
                u8::from_str_radix(part, 16).with_context(|| format!("MAC address {text:?}"))?;
        }
        if parts.next().is_some() {
            bail!("MAC address {text:?} is too long");
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_has_no_two_owners_of_one_address() {
        assert_eq!(underlay(1).to_string(), "10.199.0.11");
        assert_eq!(vtep_mac(1).to_string(), "02:52:53:00:00:01");
        assert_eq!(subnet_prefix(3), "10.244.3.0/24");
        assert_eq!(pod(2, 0).to_string(), "10.244.2.2");
        assert!(underlay(NODES_MAX) < ATTACKER);
        assert_eq!(underlay6(1).to_string(), "fd00:199::11");
        assert_eq!(underlay6_in(1, 2).to_string(), "fd00:199:1::12");
        assert_eq!(subnet6_prefix(1), "fd00:10:244:1::/64");
        assert_eq!(pod6(2, 0).to_string(), "fd00:10:244:2::2");
        assert!(underlay6(NODES_MAX) < ATTACKER6);
        const { assert!(PODS_MAX < 253, "the last octet of a pod's address") };
    }

    #[test]
    fn mac_addresses_read_back_as_written() {
        let mac = pod_mac(7, 9);
        assert_eq!(mac.to_string().parse::<Mac>().expect("parses"), mac);
        for wrong in ["", "02:52", "02:52:53:00:00:01:02", "zz:52:53:00:00:01"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong:?} is no MAC address");
        }
    }
}
