//! The standby's peer filter against crafted tunnel packets, on a real kernel. Needs root and nftables.
//!
//! ```text
//!   outside (peer0: 10.199.0.2, .3, .99) ── veth ── node (eth0: 10.199.0.1, .50; flannel.1: 10.244.1.0)
//!   UDP payload = VXLAN | Ethernet | IPv4 | UDP ──────────► a socket on 10.244.1.0
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Instant;

use common::{Namespace, conf, dual, eventually, ip, leases, leases_dual, netconf, underlay};
use ripstop_controlplane::family::Family;
use ripstop_controlplane::netlink::Netlink;
use ripstop_controlplane::rules::{self, Filter, FilterKeeper};
use ripstop_controlplane::standby::{self, Desired};

const PORT: u16 = 9999;

/// A tunnel packet from pod to node, and how it is sent.
#[derive(Debug, Clone)]
struct Packet {
    outer_source: &'static str,
    outer_destination: &'static str,
    flags: u8,
    vni: u32,
    mac_source: [u8; 6],
    ether_type: u16,
    inner_source: &'static str,
    inner_destination: &'static str,
    payload: usize,
    /// Bytes kept of the whole.
    length: usize,
}

const GOOD: Packet = Packet {
    outer_source: "10.199.0.2",
    outer_destination: "10.199.0.1",
    flags: 0x08,
    vni: 1,
    mac_source: [2, 0x52, 0x53, 0, 0, 2],
    ether_type: 0x0800,
    inner_source: "10.244.2.5",
    inner_destination: "10.244.1.0",
    payload: 20,
    length: usize::MAX,
};

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.flags, 0, 0, 0];
        bytes.extend((self.vni << 8).to_be_bytes());
        bytes.extend([2, 0x52, 0x53, 0, 0, 1]);
        bytes.extend(self.mac_source);
        bytes.extend(self.ether_type.to_be_bytes());
        let length = u16::try_from(28 + self.payload).unwrap().to_be_bytes();
        let mut ip = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 63, 17, 0, 0];
        for address in [self.inner_source, self.inner_destination] {
            ip.extend(address.parse::<Ipv4Addr>().unwrap().octets());
        }
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(ip);
        for word in [5555, PORT, u16::try_from(8 + self.payload).unwrap(), 0] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(vec![7; self.payload]);
        bytes.truncate(self.length);
        bytes
    }

    fn send(&self, outside: &Namespace) {
        outside.enter(|| {
            let socket = UdpSocket::bind((self.outer_source, 0)).unwrap();
            socket
                .send_to(&self.bytes(), (self.outer_destination, 8472))
                .unwrap();
        });
    }
}

struct Lab {
    node: Namespace,
    outside: Namespace,
    receiver: UdpSocket,
}

fn lab() -> Lab {
    let (node, outside) = Namespace::node(1);
    node.ip("addr add 10.199.0.50/24 dev eth0");
    for n in [2, 3, 99] {
        outside.ip(&format!("addr add 10.199.0.{n}/24 dev peer0"));
    }
    let desired = Desired::new(
        Family::V4,
        &leases(1, &[2, 3]),
        &netconf(),
        &underlay(&node, 1),
        |_| None,
    )
    .unwrap();
    let receiver = node.enter(|| {
        standby::reconcile(&mut Netlink::open().unwrap(), &desired, Duration::MAX).unwrap();
        let receiver = UdpSocket::bind(("0.0.0.0", PORT)).unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        receiver
    });
    Lab {
        node,
        outside,
        receiver,
    }
}

fn count(node: &Namespace, name: &str) -> u64 {
    let counts = node
        .enter(rules::counts)
        .unwrap()
        .expect("the filter is there");
    counts
        .iter()
        .find(|count| count.name == name)
        .unwrap_or_else(|| panic!("no counter {name}"))
        .packets
}

fn keeper(lab: &Lab, filter: &Filter) -> FilterKeeper {
    let keeper = lab.node.enter(|| FilterKeeper::start().unwrap());
    keeper.set(filter.clone());
    let table = filter.tables.v4.as_ref().unwrap();
    wait_for_elements(&lab.node, table.peers.len());
    keeper
}

fn wait_for_elements(node: &Namespace, wanted: usize) {
    eventually("the set is loaded", || {
        let output = node.try_command("nft", "list set ip ripstop peers");
        (String::from_utf8_lossy(&output.stdout)
            .matches(" . ")
            .count()
            == wanted + 1)
            .then_some(())
    });
}

#[test]
fn only_peers_get_into_the_kernels_tunnel() {
    let lab = lab();
    // Without the filter, the kernel takes a packet from anyone: what the filter is for.
    Packet {
        outer_source: "10.199.0.99",
        ..GOOD
    }
    .send(&lab.outside);
    lab.receiver
        .recv(&mut [0; 4096])
        .expect("the kernel's tunnel is open to all");

    let filter = Filter::new(&leases(1, &[2, 3]), &netconf());
    let keeper = keeper(&lab, &filter);
    assert_eq!(keeper.problem(), None);
    for good in [
        GOOD,
        // A node's own traffic has the first address of its subnet.
        Packet {
            inner_source: "10.244.2.0",
            ..GOOD
        },
        Packet {
            outer_source: "10.199.0.3",
            inner_source: "10.244.3.255",
            ..GOOD
        },
        Packet { payload: 0, ..GOOD },
        // Larger than the MTU: the outer packet arrives in fragments.
        Packet {
            payload: 3000,
            ..GOOD
        },
    ] {
        good.send(&lab.outside);
        let mut buffer = [0; 4096];
        let received = lab
            .receiver
            .recv(&mut buffer)
            .unwrap_or_else(|error| panic!("{good:?}: {error}"));
        assert_eq!(received, good.payload);
    }
    let ipv6 = 0x86dd;
    for (bad, counter) in [
        (
            Packet {
                outer_source: "10.199.0.99",
                ..GOOD
            },
            "standby_unknown_peer",
        ),
        (
            Packet {
                outer_source: "10.199.0.99",
                inner_source: "10.244.99.5",
                ..GOOD
            },
            "standby_unknown_peer",
        ),
        (
            Packet {
                inner_source: "10.244.3.5",
                ..GOOD
            },
            "standby_unknown_peer",
        ),
        (
            Packet {
                inner_source: "10.244.1.0",
                ..GOOD
            },
            "standby_unknown_peer",
        ),
        (
            Packet {
                inner_source: "10.199.0.2",
                ..GOOD
            },
            "standby_unknown_peer",
        ),
        (
            Packet {
                outer_destination: "10.199.0.50",
                ..GOOD
            },
            "standby_outer_destination",
        ),
        (Packet { vni: 2, ..GOOD }, "standby_vxlan_vni"),
        (Packet { flags: 0, ..GOOD }, "standby_vxlan_flags"),
        (
            Packet {
                flags: 0x88,
                ..GOOD
            },
            "standby_vxlan_flags",
        ),
        (
            Packet {
                mac_source: [1, 0, 0x5e, 0, 0, 1],
                ..GOOD
            },
            "standby_inner_source_mac",
        ),
        (
            Packet {
                ether_type: ipv6,
                ..GOOD
            },
            "standby_inner_ether_type",
        ),
        (
            Packet {
                ether_type: 0x8100,
                ..GOOD
            },
            "standby_inner_ether_type",
        ),
        (Packet { length: 41, ..GOOD }, "standby_truncated"),
        (Packet { length: 22, ..GOOD }, "standby_truncated"),
        (Packet { length: 3, ..GOOD }, "standby_truncated"),
        (Packet { length: 0, ..GOOD }, "standby_truncated"),
        (
            Packet {
                inner_destination: "10.199.0.1",
                ..GOOD
            },
            "standby_not_local",
        ),
        (
            Packet {
                inner_destination: "10.244.3.1",
                ..GOOD
            },
            "standby_not_local",
        ),
        (
            Packet {
                inner_destination: "127.0.0.1",
                ..GOOD
            },
            "standby_not_local",
        ),
        (
            Packet {
                inner_destination: "255.255.255.255",
                ..GOOD
            },
            "standby_not_local",
        ),
    ] {
        let before = count(&lab.node, counter);
        bad.send(&lab.outside);
        eventually(&format!("{bad:?} counted as {counter}"), || {
            (count(&lab.node, counter) == before + 1).then_some(())
        });
        let received = lab.receiver.recv(&mut [0; 4096]);
        assert!(received.is_err(), "{bad:?} got in");
    }
    // Peers leave and come; counts and the rest of the filter stay.
    let counted = count(&lab.node, "standby_unknown_peer");
    keeper.set(Filter::new(&leases(1, &[3]), &netconf()));
    wait_for_elements(&lab.node, 1);
    GOOD.send(&lab.outside);
    assert!(
        lab.receiver.recv(&mut [0; 4096]).is_err(),
        "the peer has left"
    );
    assert_eq!(count(&lab.node, "standby_unknown_peer"), counted + 1);
    keeper.set(filter.clone());
    wait_for_elements(&lab.node, 2);
    GOOD.send(&lab.outside);
    lab.receiver.recv(&mut [0; 4096]).expect("the peer is back");
    // The filter outlives its keeper, and a restart keeps the counts.
    drop(keeper);
    assert_eq!(count(&lab.node, "standby_unknown_peer"), counted + 1);
    let _keeper = self::keeper(&lab, &filter);
    assert_eq!(count(&lab.node, "standby_unknown_peer"), counted + 1);
    assert!(lab.node.enter(rules::remove).unwrap());
}

#[test]
fn fifteen_thousand_peers_are_loaded_and_changed() {
    let lab = lab();
    let mut filter = Filter::new(&leases(1, &[]), &netconf());
    filter.tables.v4.as_mut().unwrap().peers = (0..15_000u32)
        .map(|i| {
            let subnet = ipnet::Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (i << 8)), 24).unwrap();
            (Ipv4Addr::from(0xac10_0000 + i).into(), subnet.into())
        })
        .collect::<BTreeSet<_>>();
    let start = Instant::now();
    let keeper = keeper(&lab, &filter);
    println!("15,000 peers loaded and listed after {:?}", start.elapsed());
    let table = filter.tables.v4.as_mut().unwrap();
    let removed = table.peers.pop_first().unwrap();
    let start = Instant::now();
    keeper.set(filter.clone());
    wait_for_elements(&lab.node, 14_999);
    println!("one of them removed after {:?}", start.elapsed());
    assert!(
        !lab.node
            .command("nft", "list set ip ripstop peers")
            .contains(&format!("{} . ", removed.0))
    );
}
