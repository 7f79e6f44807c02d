//! Peers by the thousand, for which the lab has no nodes: their leases, and what the kernel of a plain node needs for them.
//!
//! All leases have one length, so that a table of 10 and one of 100,000 differ by the number alone. Between the lab's
//! underlay (10.199.0.0/16), which no pod network may contain, and its pods (10.244.0.0/16) there is room for that many
//! leases of 16 addresses. With a tunnel these peers lie behind the underlay's router, as racks do; `host-gw` needs them
//! on the link itself.

use core::fmt::Write as _;
use core::net::Ipv4Addr;

use anyhow::{Result, ensure};

use crate::address::{self, Mac};
use crate::lab::{Backend, Host, Lab, Lease, Leases, Node, NodeKind};

/// The pods' network of a bed.
pub(super) const NETWORK: &str = "10.224.0.0/11";
/// All peers that the lab has no node for have their public addresses in here.
const PUBLIC: &str = "172.16.0.0/12";
const LEASE_LENGTH: u32 = 28;
/// Leases below 10.244.0.0/16, which the lab's own nodes have, and above it.
const BELOW: u32 = 20 << (LEASE_LENGTH - 16);
const ABOVE: u32 = 11 << (LEASE_LENGTH - 16);
/// The node of the lab that is the first peer of the node under test.
pub(super) const NEAR: u8 = 2;

/// So many leases are programmed as flannel does it. Linux compares each route's next hop with those of all others on the
/// same device, so that twice the leases take four times as long: 15,000 take twenty seconds, and 100,000 would take a
/// quarter of an hour. Beyond this number, next hops are objects of their own (`ip nexthop`), by which packets take the
/// same way, and Ripstop's control plane is halted when the workers have the table, before it programs its standby.
pub(super) const AS_FLANNEL_MAX: u32 = 20_000;

/// The number of leases that a bed can have.
pub(super) const MAX: u32 = 1 + BELOW + ABOVE;

/// One of them, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Far {
    subnet: Ipv4Addr,
    public: Ipv4Addr,
    mac: Mac,
}

impl Far {
    fn numbered(number: u32) -> Self {
        let own = 1 << (LEASE_LENGTH - 16);
        let place = if number < BELOW { number } else { number + own };
        let base = Ipv4Addr::new(10, 224, 0, 0).to_bits();
        let [_, high, middle, low] = number.to_be_bytes();
        Self {
            subnet: Ipv4Addr::from_bits(base + (place << (32 - LEASE_LENGTH))),
            public: Ipv4Addr::from_bits(Ipv4Addr::new(172, 16, 0, 1).to_bits() + number),
            mac: Mac([0x02, 0x52, 0x53, 0x10 + high, middle, low]),
        }
    }

    fn lease(self, number: u32, backend: Backend) -> Lease {
        Lease {
            node: format!("far-{number}"),
            public_ip: Some(self.public),
            subnet: Some(format!("{}/{LEASE_LENGTH}", self.subnet)),
            vtep_mac: (backend == Backend::Vxlan).then(|| self.mac.to_string()),
            ..Lease::default()
        }
    }
}

/// A pod of each of the first `count` leases, the one of the second node first. The others come in steps of the golden
/// section, so that neighbours in time are none in the table.
pub(super) fn destinations(count: u32) -> Vec<Ipv4Addr> {
    let far = count.saturating_sub(1);
    let step = step(far);
    let pod = |index: u32| {
        let number = u64::from(index) * u64::from(step) % u64::from(far);
        let subnet = Far::numbered(u32::try_from(number).unwrap_or_default()).subnet;
        Ipv4Addr::from_bits(subnet.to_bits() + 2)
    };
    core::iter::once(address::pod(NEAR, 0))
        .chain((0..far).map(pod))
        .collect()
}

/// A number that has no divisor in common with `count`, near its golden section.
fn step(count: u32) -> u32 {
    let divisor = |mut a: u32, mut b: u32| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let golden = u64::from(count) * 618 / 1000;
    let first = u32::try_from(golden).unwrap_or(1).max(1);
    (first..)
        .find(|step| divisor(count, *step) == 1)
        .unwrap_or(1)
}

/// The leases of a lab with so many peers of each node.
pub(super) fn leases(lab: &Lab, count: u32) -> Leases {
    let mut leases = lab.leases();
    let far = (0..count - 1).map(|number| Far::numbered(number).lease(number, lab.backend()));
    leases.leases.extend(far);
    leases
}

/// Makes every next hop of a node known for good: what a neighbour's silence does to a path is not what is measured. With
/// `one_for_all` they all have that Ethernet address, which is the only one at the other end of a wire.
pub(super) fn resolve_next_hops(
    lab: &Lab,
    node: &Node,
    count: u32,
    one_for_all: Option<Mac>,
) -> Result<()> {
    ensure!((1..=MAX).contains(&count), "1 to {MAX} leases, not {count}");
    let router = one_for_all.unwrap_or(address::router_mac(0, 0));
    let mut lines = format!(
        "neigh replace {} lladdr {} dev eth0 nud permanent\n",
        address::FABRIC,
        router,
    );
    for peer in lab
        .nodes()
        .iter()
        .filter(|peer| peer.index() != node.index())
    {
        let mac = one_for_all.unwrap_or(address::underlay_mac(peer.index()));
        writeln!(
            lines,
            "neigh replace {} lladdr {mac} dev eth0 nud permanent",
            peer.address()
        )?;
    }
    for pod in node.pods() {
        let (address, mac) = (pod.address(), pod.mac());
        writeln!(
            lines,
            "neigh replace {address} lladdr {mac} dev cni0 nud permanent"
        )?;
    }
    if lab.backend() == Backend::HostGw && count > 1 {
        writeln!(lines, "route add {PUBLIC} dev eth0")?;
        for number in 0..count - 1 {
            let public = Far::numbered(number).public;
            writeln!(
                lines,
                "neigh replace {public} lladdr {router} dev eth0 nud permanent"
            )?;
        }
    }
    node.netns().batch("ip", &lines)?;
    for pod in node.pods() {
        let (gateway, mac) = (
            address::gateway(pod.node()),
            address::gateway_mac(pod.node()),
        );
        let line = format!("neigh replace {gateway} lladdr {mac} dev eth0 nud permanent\n");
        pod.netns().batch("ip", &line)?;
    }
    Ok(())
}

/// Gives a plain node flannel's routes, neighbours and forwarding entries for the peers that the lab has no node for.
pub(super) fn program_kernel(lab: &Lab, node: &Node, count: u32) -> Result<()> {
    let (mut lines, mut fdb) = (String::new(), String::new());
    for number in 0..count - 1 {
        let Far {
            subnet,
            public,
            mac,
        } = Far::numbered(number);
        let via = match lab.backend() {
            Backend::Vxlan => {
                writeln!(
                    lines,
                    "neigh replace {subnet} lladdr {mac} dev flannel.1 nud permanent"
                )?;
                writeln!(
                    fdb,
                    "fdb add {mac} dev flannel.1 dst {public} self permanent"
                )?;
                format!("via {subnet} dev flannel.1 onlink")
            }
            Backend::HostGw => format!("via {public} dev eth0"),
            Backend::Ipip => format!("via {public} dev flannel.ipip onlink"),
            // One route leads to all, and flannel's process knows the rest.
            Backend::Udp => continue,
        };
        let subnet = format!("{subnet}/{LEASE_LENGTH}");
        if count > AS_FLANNEL_MAX {
            let id = number + 1;
            writeln!(lines, "nexthop add id {id} {via}")?;
            writeln!(lines, "route add {subnet} nhid {id}")?;
        } else {
            writeln!(lines, "route add {subnet} {via}")?;
        }
    }
    node.netns().batch("ip", &lines)?;
    node.netns().batch("bridge", &fdb)
}

/// Takes the next hops that are objects away from the plain nodes of a lab, routes first: when a device goes with its
/// objects, Linux walks through all routes for each, and nobody on the machine can change a link in the meantime.
pub(super) fn withdraw(lab: &Lab, count: u32) -> Result<()> {
    if count <= AS_FLANNEL_MAX {
        return Ok(());
    }
    let plain = |node: &&Node| node.kind() == NodeKind::PlainLinux;
    for node in lab.nodes().iter().filter(plain) {
        let mut lines = String::new();
        if node.output(&["ip", "nexthop"])?.is_empty() {
            continue;
        }
        for number in 0..count - 1 {
            let subnet = Far::numbered(number).subnet;
            writeln!(lines, "route del {subnet}/{LEASE_LENGTH}")?;
        }
        node.netns().batch("ip", &lines)?;
        node.output(&["ip", "nexthop", "flush"])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_leases_overlap_neither_each_other_nor_the_lab() {
        let network =
            Ipv4Addr::new(10, 224, 0, 0).to_bits()..=Ipv4Addr::new(10, 255, 255, 255).to_bits();
        let own =
            Ipv4Addr::new(10, 244, 0, 0).to_bits()..=Ipv4Addr::new(10, 244, 255, 255).to_bits();
        let size = 1 << (32 - LEASE_LENGTH);
        let mut last = 0;
        for number in 0..MAX - 1 {
            let far = Far::numbered(number);
            let first = far.subnet.to_bits();
            assert!(first >= last, "{number}");
            last = first + size;
            assert!(
                network.contains(&first) && network.contains(&(last - 1)),
                "{number}"
            );
            assert!(
                !own.contains(&first) && !own.contains(&(last - 1)),
                "{number}"
            );
        }
        const { assert!(MAX > 100_000) };
        assert_eq!(Far::numbered(0x1_0002).mac.to_string(), "02:52:53:11:00:02");
        assert_eq!(Far::numbered(256).public.to_string(), "172.16.1.1");
    }

    #[test]
    fn every_destination_is_in_a_lease_of_its_own_and_the_first_is_the_lab_s() {
        for count in [1, 2, 3, 7, 1000] {
            let all = destinations(count);
            assert_eq!(all[0].to_string(), "10.244.2.2");
            let mut subnets: Vec<u32> = all[1..].iter().map(|pod| pod.to_bits() - 2).collect();
            subnets.sort_unstable();
            let expected: Vec<u32> = (0..count - 1)
                .map(|number| Far::numbered(number).subnet.to_bits())
                .collect();
            assert_eq!(subnets, expected, "{count}");
        }
        let near = destinations(1000)
            .windows(2)
            .filter(|pair| pair[0].to_bits().abs_diff(pair[1].to_bits()) < 64)
            .count();
        assert_eq!(near, 0, "neighbours in time lie together");
    }
}
