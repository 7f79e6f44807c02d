//! The standby's peer filter against crafted tunnel packets, on a real kernel. Needs root and nftables.
//!
//! ```text
//!   outside (peer0: 10.199.0.2, .3, .99) ── veth ── node (eth0: 10.199.0.1, .50; flannel.1: 10.244.1.0)
//!   UDP payload = VXLAN | Ethernet | IPv4 | UDP ──────────► a socket on 10.244.1.0
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Instant;

use common::{Namespace, backend, conf, dual, eventually, leases, leases_dual, netconf, underlay};
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
        UdpSocket::bind(("0.0.0.0", PORT)).unwrap()
    });
    Lab {
        node,
        outside,
        receiver,
    }
}

/// Length of the next datagram, which has all the time that a busy machine may take.
fn arrives(receiver: &UdpSocket) -> usize {
    let patience = Some(Duration::from_secs(60));
    receiver.set_read_timeout(patience).unwrap();
    receiver.recv(&mut [0; 4096]).expect("a packet")
}

/// Whether nothing has come, and nothing comes for a while.
fn is_empty(receiver: &UdpSocket) -> bool {
    let moment = Some(Duration::from_millis(300));
    receiver.set_read_timeout(moment).unwrap();
    receiver.recv(&mut [0; 4096]).is_err()
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
    // The kernel's tunnel is open to all.
    arrives(&lab.receiver);

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
        assert_eq!(arrives(&lab.receiver), good.payload, "{good:?}");
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
        assert!(is_empty(&lab.receiver), "{bad:?} got in");
    }
    // Peers leave and come; counts and the rest of the filter stay.
    let counted = count(&lab.node, "standby_unknown_peer");
    keeper.set(Filter::new(&leases(1, &[3]), &netconf()));
    wait_for_elements(&lab.node, 1);
    GOOD.send(&lab.outside);
    eventually("a peer that has left is counted", || {
        (count(&lab.node, "standby_unknown_peer") == counted + 1).then_some(())
    });
    assert!(is_empty(&lab.receiver), "the peer has left");
    keeper.set(filter.clone());
    wait_for_elements(&lab.node, 2);
    GOOD.send(&lab.outside);
    arrives(&lab.receiver);
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

/// The ones' complement sum that UDP over IPv6 carries (RFC 8200 section 8.1).
fn udp6_checksum(source: Ipv6Addr, destination: Ipv6Addr, udp: &[u8]) -> u16 {
    let mut bytes = [source.octets(), destination.octets()].concat();
    bytes.extend(u32::try_from(udp.len()).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, 17]);
    bytes.extend(udp);
    checksum(&bytes)
}

/// A tunnel packet of VXLAN over IPv6, from a pod to the node.
fn vxlan6(inner_source: &str, inner_destination: &str, ether_type: u16) -> Vec<u8> {
    let mut bytes = vec![0x08, 0, 0, 0, 0, 0, 1, 0];
    bytes.extend([2, 0x52, 0x53, 0, 6, 1, 2, 0x52, 0x53, 0, 6, 2]);
    bytes.extend(ether_type.to_be_bytes());
    let [source, destination] =
        [inner_source, inner_destination].map(|text| text.parse::<Ipv6Addr>().unwrap());
    let mut udp: Vec<u8> = [5555, PORT, 28, 0].map(u16::to_be_bytes).concat();
    udp.extend([7; 20]);
    let sum = udp6_checksum(source, destination, &udp);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    bytes.extend([0x60, 0, 0, 0, 0, 28, 17, 63]);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(udp);
    bytes
}

#[test]
fn only_peers_get_into_the_kernels_ipv6_tunnel() {
    let (node, outside) = Namespace::node(1);
    for n in [2, 3, 99] {
        outside.ip(&format!("addr add fd00:199::{n}/64 dev peer0 nodad"));
    }
    let conf = conf(&dual(r#"{"Type":"vxlan"}"#));
    let set = leases_dual(1, &[2, 3]);
    let desired = Desired::new(Family::V6, &set, &conf, &underlay(&node, 1), |_| None).unwrap();
    let receiver = node.enter(|| {
        standby::reconcile(&mut Netlink::open().unwrap(), &desired, Duration::MAX).unwrap();
        UdpSocket::bind(("::", PORT)).unwrap()
    });
    let keeper = node.enter(|| FilterKeeper::start().unwrap());
    keeper.set(Filter::new(&set, &conf));
    eventually("both tables are loaded", || {
        let loaded = |family: &str| {
            let output = node.try_command("nft", &format!("list table {family} ripstop"));
            String::from_utf8_lossy(&output.stdout).contains("iifname")
        };
        (loaded("ip") && loaded("ip6")).then_some(())
    });
    assert_eq!(keeper.problem(), None);
    let send = |from: &str, payload: &[u8]| {
        outside.enter(|| {
            let socket = UdpSocket::bind((from, 0)).unwrap();
            socket.send_to(payload, ("fd00:199::1", 8472)).unwrap();
        });
    };
    let (peer, own) = ("fd00:199::2", "fd00:10:244:1::");
    for inner in [
        "fd00:10:244:2::5",
        "fd00:10:244:2::",
        "fd00:10:244:2:ffff:ffff:ffff:ffff",
    ] {
        send(peer, &vxlan6(inner, own, 0x86dd));
        assert_eq!(arrives(&receiver), 20, "{inner}");
    }
    let good = vxlan6("fd00:10:244:2::5", own, 0x86dd);
    for (from, packet, counter) in [
        ("fd00:199::99", good.clone(), "standby_unknown_peer"),
        (
            peer,
            vxlan6("fd00:10:244:3::5", own, 0x86dd),
            "standby_unknown_peer",
        ),
        (
            peer,
            vxlan6("fd00:199::2", own, 0x86dd),
            "standby_unknown_peer",
        ),
        (
            peer,
            vxlan6("fd00:10:244:2::5", own, 0x0800),
            "standby_inner_ether_type",
        ),
        (peer, good[..61].to_vec(), "standby_truncated"),
        (
            peer,
            vxlan6("fd00:10:244:2::5", "fd00:199::1", 0x86dd),
            "standby_not_local",
        ),
        (
            peer,
            vxlan6("fd00:10:244:2::5", "ff02::1", 0x86dd),
            "standby_not_local",
        ),
    ] {
        let before = count(&node, counter);
        send(from, &packet);
        eventually(&format!("counted as {counter}"), || {
            (count(&node, counter) == before + 1).then_some(())
        });
        assert!(is_empty(&receiver), "{counter}: got in");
    }
    // A family that is switched off takes its table along, and the other stays.
    let four = common::netconf();
    keeper.set(Filter::new(&leases(1, &[2]), &four));
    eventually("the IPv6 table is gone", || {
        let tables = node.command("nft", "list tables");
        (!tables.contains("ip6 ripstop")).then_some(())
    });
    assert!(
        node.command("nft", "list tables")
            .contains("table ip ripstop")
    );
    // A backend without a tunnel has no filter at all.
    keeper.set(Filter::new(
        &leases(1, &[2]),
        &common::conf(&backend(r#"{"Type":"host-gw"}"#)),
    ));
    eventually("no table is left", || {
        (!node.command("nft", "list tables").contains("ripstop")).then_some(())
    });
}

/// Where the kernel has no foo-over-UDP, an ordinary socket on the port shows what the filter lets through.
#[test]
fn only_peers_get_into_the_udp_tunnel() {
    let (node, outside) = Namespace::node(1);
    node.ip("addr add 10.199.0.50/24 dev eth0");
    for n in [2, 3, 99] {
        outside.ip(&format!("addr add 10.199.0.{n}/24 dev peer0"));
    }
    let receiver = node.enter(|| UdpSocket::bind(("0.0.0.0", 8285)).unwrap());
    let conf = conf(&backend(r#"{"Type":"udp"}"#));
    let keeper = node.enter(|| FilterKeeper::start().unwrap());
    keeper.set(Filter::new(&leases(1, &[2, 3]), &conf));
    wait_for_elements(&node, 2);
    eventually("the rules are in force", || {
        let rules = node.command("nft", "list table ip ripstop");
        rules.contains("iifname").then_some(())
    });
    let inner = |source: &str, version: u8, length: usize| {
        let mut packet = vec![version << 4 | 5, 0, 0, 28, 0, 0, 0, 0, 63, 17, 0, 0];
        for address in [source, "10.244.1.5"] {
            packet.extend(address.parse::<Ipv4Addr>().unwrap().octets());
        }
        packet.extend([0; 8]);
        packet.truncate(length);
        packet
    };
    let send = |from: &str, to: &str, payload: &[u8]| {
        outside.enter(|| {
            let socket = UdpSocket::bind((from, 8285)).unwrap();
            socket.send_to(payload, (to, 8285)).unwrap();
        });
    };
    let (peer, own) = ("10.199.0.2", "10.199.0.1");
    for (source, length) in [("10.244.2.5", 28), ("10.244.2.0", 20)] {
        send(peer, own, &inner(source, 4, length));
        assert_eq!(arrives(&receiver), length);
    }
    for (from, to, payload, counter) in [
        (
            "10.199.0.99",
            own,
            inner("10.244.2.5", 4, 28),
            "standby_unknown_peer",
        ),
        (
            peer,
            own,
            inner("10.244.3.5", 4, 28),
            "standby_unknown_peer",
        ),
        (
            peer,
            own,
            inner("10.199.0.2", 4, 28),
            "standby_unknown_peer",
        ),
        (
            peer,
            "10.199.0.50",
            inner("10.244.2.5", 4, 28),
            "standby_outer_destination",
        ),
        (
            peer,
            own,
            inner("10.244.2.5", 6, 28),
            "standby_inner_ether_type",
        ),
        (peer, own, inner("10.244.2.5", 4, 19), "standby_truncated"),
        (peer, own, Vec::new(), "standby_truncated"),
    ] {
        let before = count(&node, counter);
        send(from, to, &payload);
        eventually(&format!("{from} to {to} counted as {counter}"), || {
            (count(&node, counter) == before + 1).then_some(())
        });
        assert!(is_empty(&receiver), "{counter}: got in");
    }
}

/// The rules of IP in IP are ones that the kernel takes; its packets are looked at where there is such a device.
#[test]
fn the_ipip_filter_loads() {
    let (node, _outside) = Namespace::node(1);
    let conf = conf(&backend(r#"{"Type":"ipip"}"#));
    let keeper = node.enter(|| FilterKeeper::start().unwrap());
    keeper.set(Filter::new(&leases(1, &[2, 3]), &conf));
    wait_for_elements(&node, 2);
    eventually("the rules are in force", || {
        let rules = node.command("nft", "list table ip ripstop");
        let wanted = [
            "daddr 10.199.0.1 jump tunnel",
            "ip length < 40",
            "@th,96,32 @peers return",
        ];
        wanted.iter().all(|part| rules.contains(part)).then_some(())
    });
    assert_eq!(keeper.problem(), None);
}
