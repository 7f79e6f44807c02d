//! Packets written as fields, and a small table to forward them by. Shared by tests, each of which uses a part.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses a part of it"
)]

use core::net::{Ipv4Addr, Ipv6Addr};

use ripstop_dataplane::forward;
use ripstop_dataplane::kind::Kind;
use ripstop_dataplane::table::Table;
use ripstop_dataplane::verdict::{DropReason, FromHost, FromNic, HEADER_MAX};
use ripstop_fib::sync::words;
use ripstop_fib::{
    Adjacency, Backend, Dscp, Ethernet, ImageBuilder, Local, NICS, NicRecord, Node, Route, Word,
};

/// An inner IPv4 packet with a UDP-like transport header.
#[derive(Debug, Clone)]
pub(crate) struct Inner {
    pub(crate) source: [u8; 4],
    pub(crate) destination: [u8; 4],
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) options: Vec<u8>,
    pub(crate) ports: (u16, u16),
    /// Bytes behind the 8 bytes of the transport header.
    pub(crate) payload: usize,
    pub(crate) total_len: Option<u16>,
    pub(crate) total_len_error: i16,
    pub(crate) checksum_error: u16,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            source: [10, 244, 2, 7],
            destination: [10, 244, 1, 5],
            version_ihl: 0x45,
            tos: 0,
            fragment: 0,
            protocol: 17,
            options: Vec::new(),
            ports: (1234, 80),
            payload: 36,
            total_len: None,
            total_len_error: 0,
            checksum_error: 0,
        }
    }
}

impl Inner {
    /// The packet's bytes. The transport checksum is left zero.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let len = header_len + 8 + self.payload;
        let total_len = self
            .total_len
            .unwrap_or_else(|| u16::try_from(len).unwrap());
        let version_ihl = if self.options.is_empty() {
            self.version_ihl
        } else {
            0x40 | u8::try_from(header_len / 4).unwrap()
        };
        let mut packet = vec![version_ihl, self.tos];
        packet.extend(
            total_len
                .wrapping_add_signed(self.total_len_error)
                .to_be_bytes(),
        );
        packet.extend([0x12, 0x34]);
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([63, self.protocol, 0, 0]);
        packet.extend(self.source);
        packet.extend(self.destination);
        packet.extend(&self.options);
        let checksum = checksum(&packet).wrapping_add(self.checksum_error);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        packet.extend(self.ports.0.to_be_bytes());
        packet.extend(self.ports.1.to_be_bytes());
        packet.extend(u16::try_from(8 + self.payload).unwrap().to_be_bytes());
        packet.extend([0, 0]);
        packet.extend((0..self.payload).map(|at| u8::try_from(at % 251).unwrap()));
        packet
    }
}

/// A tunnel frame as it lies in the receive ring; the default is a good one from the peer 10.199.0.12 to us.
#[derive(Debug, Clone)]
pub(crate) struct Tunnel {
    pub(crate) ether_type: u16,
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) source: [u8; 4],
    pub(crate) destination: [u8; 4],
    pub(crate) port: u16,
    pub(crate) flags: u32,
    pub(crate) vni: u32,
    pub(crate) reserved: u8,
    pub(crate) inner_destination: [u8; 6],
    pub(crate) inner_source: [u8; 6],
    pub(crate) inner_ether_type: u16,
    pub(crate) inner: Inner,
    /// Bytes between the inner packet's end and the tunnel packet's.
    pub(crate) padding: usize,
    /// Keeps only so many bytes of the inner frame, with outer lengths that agree.
    pub(crate) inner_cut: Option<usize>,
    pub(crate) total_len_error: i16,
    pub(crate) udp_len_error: i16,
    pub(crate) checksum_error: u16,
}

impl Default for Tunnel {
    fn default() -> Self {
        Self {
            ether_type: 0x0800,
            version_ihl: 0x45,
            tos: 0,
            fragment: 0,
            protocol: 17,
            source: [10, 199, 0, 12],
            destination: [10, 199, 0, 11],
            port: 8472,
            flags: 0x0800_0000,
            vni: 1,
            reserved: 0,
            inner_destination: vtep_mac(1),
            inner_source: [2, 0x52, 0x53, 0, 0, 2],
            inner_ether_type: 0x0800,
            inner: Inner::default(),
            padding: 0,
            inner_cut: None,
            total_len_error: 0,
            udp_len_error: 0,
            checksum_error: 0,
        }
    }
}

impl Tunnel {
    /// The frame's bytes.
    pub(crate) fn frame(&self) -> Vec<u8> {
        let mut inner = [self.inner_destination, self.inner_source].concat();
        inner.extend(self.inner_ether_type.to_be_bytes());
        inner.extend(self.inner.packet());
        inner.extend(vec![0; self.padding]);
        inner.truncate(self.inner_cut.unwrap_or(inner.len()));
        let udp_len = u16::try_from(16 + inner.len()).unwrap();
        let mut ip = vec![self.version_ihl, self.tos];
        ip.extend(
            (udp_len + 20)
                .wrapping_add_signed(self.total_len_error)
                .to_be_bytes(),
        );
        ip.extend([0x43, 0x21]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, self.protocol, 0, 0]);
        ip.extend(self.source);
        ip.extend(self.destination);
        let checksum = checksum(&ip).wrapping_add(self.checksum_error);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());

        let mut frame = [nic_mac(1), nic_mac(2)].concat();
        frame.extend(self.ether_type.to_be_bytes());
        frame.extend(ip);
        frame.extend(40000u16.to_be_bytes());
        frame.extend(self.port.to_be_bytes());
        frame.extend(
            udp_len
                .wrapping_add_signed(self.udp_len_error)
                .to_be_bytes(),
        );
        frame.extend([0, 0]);
        frame.extend(self.flags.to_be_bytes());
        frame.extend((self.vni << 8 | u32::from(self.reserved)).to_be_bytes());
        frame.extend(inner);
        frame
    }
}

/// The dumb checksum: RFC 1071 section 4.1, word by word.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// NIC of the test cluster's nodes, and its index.
pub(crate) const NIC: u32 = 2;

/// A node of the test cluster: node `n` has the addresses 10.199.0.(10+n) and fd00:199::1n, the leases 10.244.n.0/24
/// and fd10:244:0:n::/64.
pub(crate) fn node(number: u8) -> Node {
    let mut nics = [NicRecord::default(); NICS];
    nics[0].ifindex = NIC;
    Node {
        backend: Backend::Vxlan,
        v4: Some(Local {
            address: Ipv4Addr::new(10, 199, 0, 10 + number),
            subnet: (Ipv4Addr::new(10, 244, number, 0), 24),
            network: (Ipv4Addr::new(10, 244, 0, 0), 16),
            pod_mtu: 1450,
            vtep_mac: [2, 0x52, 0x53, 0, 0, number],
        }),
        v6: Some(Local {
            address: Ipv6Addr::new(0xfd00, 0x199, 0, 0, 0, 0, 0, 0x10 + u16::from(number)),
            subnet: (
                Ipv6Addr::new(0xfd10, 0x244, 0, number.into(), 0, 0, 0, 0),
                64,
            ),
            network: (Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, 0), 48),
            pod_mtu: 1430,
            vtep_mac: [2, 0x52, 0x53, 0, 6, number],
        }),
        udp_port: 8472,
        vni: 1,
        direct: false,
        dscp: Dscp::Fixed(0),
        flow_seed: 0x5eed,
        nics,
    }
}

/// Node 1, which "we" are.
pub(crate) fn local_node() -> Node {
    node(1)
}

/// MAC of node `n`'s NIC.
pub(crate) fn nic_mac(number: u8) -> [u8; 6] {
    [2, 0xee, 0, 0, 0, number]
}

/// MAC of the VTEP of an address family of node `n`.
pub(crate) fn vtep_mac(number: u8) -> [u8; 6] {
    node(number).v4.unwrap().vtep_mac
}

/// The Ethernet header from one node to another.
pub(crate) fn ethernet(from: u8, to: u8, vlan: Option<u16>) -> Ethernet {
    Ethernet {
        source: nic_mac(from),
        destination: nic_mac(to),
        vlan,
    }
}

/// Our table: peers 2 and 3 reachable, peer 4 not resolved.
pub(crate) fn table_words() -> Vec<Word> {
    words(&image_of(1))
}

/// The table of node 2.
pub(crate) fn peer_table_words() -> Vec<Word> {
    words(&image_of(2))
}

/// The image of a node of the cluster of four, with VXLAN.
pub(crate) fn image_of(own: u8) -> Vec<u64> {
    image_with(own, |_| {}, None)
}

/// The same with another node configuration, and a VLAN tag on the underlay.
pub(crate) fn image_with(own: u8, change: impl Fn(&mut Node), vlan: Option<u16>) -> Vec<u64> {
    let mut us = node(own);
    change(&mut us);
    let mut builder = ImageBuilder::new(us);
    for peer in 1..=4u8 {
        let them = node(peer);
        let ethernet = ethernet(own, peer, vlan);
        if let (Some(ours), Some(theirs)) = (us.v4, them.v4) {
            let route = if peer == own {
                Route::Local
            } else if peer == 4 {
                Route::Unresolved
            } else {
                let to = theirs.address;
                Route::Via(builder.adjacency(match us.backend {
                    Backend::Vxlan => Adjacency::vxlan4(&us, ethernet, to, theirs.vtep_mac),
                    Backend::Ipip => Adjacency::ipip(&us, ethernet, to),
                    Backend::Udp => Adjacency::udp(&us, ethernet, to),
                    Backend::HostGw | Backend::Alloc => Adjacency::direct4(ethernet),
                }))
            };
            builder.route4(theirs.subnet.0, theirs.subnet.1, route);
            if peer != own && ours.address != theirs.address {
                builder.peer4(theirs.address, theirs.subnet.0, theirs.subnet.1);
            }
        }
        let ipv6 = !matches!(us.backend, Backend::Ipip | Backend::Udp);
        if let (true, Some(_), Some(theirs)) = (ipv6, us.v6, them.v6) {
            let route = if peer == own {
                Route::Local
            } else if peer == 4 {
                Route::Unresolved
            } else {
                Route::Via(builder.adjacency(match us.backend {
                    Backend::Vxlan => {
                        Adjacency::vxlan6(&us, ethernet, theirs.address, theirs.vtep_mac)
                    }
                    Backend::HostGw | Backend::Alloc | Backend::Ipip | Backend::Udp => {
                        Adjacency::direct6(ethernet)
                    }
                }))
            };
            builder.route6(theirs.subnet.0, theirs.subnet.1, route);
            if peer != own {
                builder.peer6(theirs.address, theirs.subnet.0, theirs.subnet.1);
            }
        }
    }
    builder.build().unwrap()
}

/// The decision about a frame from the NIC, which is the same whatever kind of packets was expected.
pub(crate) fn received(frame: &[u8], table: &Table<'_>) -> FromNic {
    let verdict = forward::from_nic(frame, table);
    for kind in Kind::ALL {
        let mostly = forward::from_nic_mostly(kind, frame, table);
        assert_eq!(mostly, verdict, "among {kind:?}");
    }
    verdict
}

/// The frame that a packet from the host becomes, which is the same whatever kind of packets was expected.
#[expect(
    clippy::panic_in_result_fn,
    reason = "the error is a verdict; what differs by kind is a fault"
)]
pub(crate) fn sent(packet: &[u8], table: &Table<'_>) -> Result<Vec<u8>, DropReason> {
    let among = |kind| {
        let mut front = [0xa5; HEADER_MAX];
        match forward::from_host_mostly(kind, packet, &mut front, table, 77) {
            FromHost::Send { push } => Ok([&front[HEADER_MAX - push..], packet].concat()),
            FromHost::Drop(reason) => Err(reason),
        }
    };
    let sent = among(Kind::from_host(packet, table));
    for kind in Kind::ALL {
        assert_eq!(among(kind), sent, "among {kind:?}");
    }
    sent
}

/// An inner IPv6 packet; UDP with a right checksum unless told otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Inner6 {
    pub(crate) source: Ipv6Addr,
    pub(crate) destination: Ipv6Addr,
    pub(crate) class: u8,
    pub(crate) flow_label: u32,
    /// Extension headers, and what the IPv6 header says comes first.
    pub(crate) extensions: (u8, Vec<u8>),
    pub(crate) protocol: u8,
    pub(crate) ports: (u16, u16),
    /// Bytes behind the 8 bytes of the transport header.
    pub(crate) payload: usize,
    /// Added to the transport checksum; `None` leaves the checksum zero.
    pub(crate) checksum_error: Option<u16>,
    pub(crate) payload_len_error: i16,
}

impl Default for Inner6 {
    fn default() -> Self {
        Self {
            source: Ipv6Addr::new(0xfd10, 0x244, 0, 2, 0, 0, 0, 7),
            destination: Ipv6Addr::new(0xfd10, 0x244, 0, 1, 0, 0, 0, 5),
            class: 0,
            flow_label: 0x1234,
            extensions: (17, Vec::new()),
            protocol: 17,
            ports: (1234, 80),
            payload: 36,
            checksum_error: Some(0),
            payload_len_error: 0,
        }
    }
}

impl Inner6 {
    /// The packet's bytes.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let mut transport = self.ports.0.to_be_bytes().to_vec();
        transport.extend(self.ports.1.to_be_bytes());
        transport.extend(u16::try_from(8 + self.payload).unwrap().to_be_bytes());
        transport.extend([0, 0]);
        transport.extend((0..self.payload).map(|at| u8::try_from(at % 251).unwrap()));
        if let Some(error) = self.checksum_error {
            let sum = checksum6(self.source, self.destination, self.protocol, &transport);
            transport[6..8].copy_from_slice(&sum.wrapping_add(error).to_be_bytes());
        }
        let (first, extensions) = &self.extensions;
        let len = u16::try_from(extensions.len() + transport.len()).unwrap();
        let mut packet = ip6(
            self.source,
            self.destination,
            self.class,
            self.flow_label,
            *first,
            len.wrapping_add_signed(self.payload_len_error),
            63,
        );
        packet.extend(extensions);
        packet.extend(transport);
        packet
    }
}

/// The UDP or TCP checksum over IPv6, computed from all bytes (RFC 8200 section 8.1).
pub(crate) fn checksum6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: u8,
    segment: &[u8],
) -> u16 {
    let mut bytes = [source.octets(), destination.octets()].concat();
    bytes.extend(u32::try_from(segment.len()).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(segment);
    match checksum(&bytes) {
        0 => 0xffff,
        sum => sum,
    }
}

fn ip6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    class: u8,
    flow_label: u32,
    next: u8,
    len: u16,
    hop_limit: u8,
) -> Vec<u8> {
    let first = 6 << 28 | u32::from(class) << 20 | flow_label;
    let mut ip = first.to_be_bytes().to_vec();
    ip.extend(len.to_be_bytes());
    ip.extend([next, hop_limit]);
    ip.extend(source.octets());
    ip.extend(destination.octets());
    ip
}

/// A packet as another node sends it to node 1, for every backend: built plainly, without the code under test.
#[derive(Debug, Clone)]
pub(crate) struct Outer {
    pub(crate) backend: Backend,
    pub(crate) vlan: Option<u16>,
    pub(crate) source4: Ipv4Addr,
    pub(crate) source6: Ipv6Addr,
    pub(crate) tos: u8,
    /// Added to the outer UDP checksum over IPv6; `None` leaves it zero.
    pub(crate) udp_checksum_error: Option<u16>,
    /// Bytes behind the inner packet.
    pub(crate) padding: usize,
}

impl Outer {
    /// From node 2.
    pub(crate) fn new(backend: Backend) -> Self {
        let them = node(2);
        Self {
            backend,
            vlan: None,
            source4: them.v4.unwrap().address,
            source6: them.v6.unwrap().address,
            tos: 0,
            udp_checksum_error: Some(0),
            padding: 0,
        }
    }

    /// Length of the outer headers of a packet of this family.
    pub(crate) fn len(&self, version: u8) -> usize {
        let tunnel = match (self.backend, version) {
            (Backend::Vxlan, 4) => 20 + 8 + 8 + 14,
            (Backend::Vxlan, _) => 40 + 8 + 8 + 14,
            (Backend::Ipip, _) => 20,
            (Backend::Udp, _) => 20 + 8,
            (Backend::HostGw | Backend::Alloc, _) => 0,
        };
        14 + self.vlan.map_or(0, |_| 4) + tunnel
    }

    /// The frame around an inner packet.
    pub(crate) fn frame(&self, inner: &[u8]) -> Vec<u8> {
        let us = local_node();
        let version = inner[0] >> 4;
        let ether_type = if version == 6 { 0x86dd_u16 } else { 0x0800 };
        let mut inner = inner.to_vec();
        inner.resize(inner.len() + self.padding, 0);
        let payload = match self.backend {
            Backend::Vxlan => {
                let macs = |node: Node| {
                    if version == 6 {
                        node.v6.unwrap().vtep_mac
                    } else {
                        node.v4.unwrap().vtep_mac
                    }
                };
                let mut vxlan = vec![8, 0, 0, 0, 0, 0, 1, 0];
                vxlan.extend(macs(us));
                vxlan.extend(macs(node(2)));
                vxlan.extend(ether_type.to_be_bytes());
                vxlan.extend(&inner);
                self.udp(version, 40_000, &vxlan)
            }
            Backend::Udp => self.udp(4, us.udp_port, &inner),
            Backend::Ipip | Backend::HostGw | Backend::Alloc => inner,
        };
        let mut frame = [nic_mac(1), nic_mac(2)].concat();
        if let Some(vlan) = self.vlan {
            frame.extend([0x81, 0x00]);
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend(ether_type.to_be_bytes());
        let len = u16::try_from(payload.len()).unwrap();
        match (self.backend, version) {
            (Backend::HostGw | Backend::Alloc, _) => {}
            (Backend::Vxlan, 6) => {
                let to = us.v6.unwrap().address;
                frame.extend(ip6(self.source6, to, self.tos, 0, 17, len, 64));
            }
            (backend, _) => {
                let protocol = if backend == Backend::Ipip { 4 } else { 17 };
                let mut ip = vec![0x45, self.tos];
                ip.extend((len + 20).to_be_bytes());
                ip.extend([0x43, 0x21, 0, 0, 64, protocol, 0, 0]);
                ip.extend(self.source4.octets());
                ip.extend(us.v4.unwrap().address.octets());
                let checksum = checksum(&ip);
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                frame.extend(ip);
            }
        }
        frame.extend(payload);
        frame
    }

    fn udp(&self, version: u8, source_port: u16, payload: &[u8]) -> Vec<u8> {
        let us = local_node();
        let mut udp = source_port.to_be_bytes().to_vec();
        udp.extend(us.udp_port.to_be_bytes());
        udp.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(payload);
        if let (6, Some(error)) = (version, self.udp_checksum_error) {
            let sum = checksum6(self.source6, us.v6.unwrap().address, 17, &udp);
            udp[6..8].copy_from_slice(&sum.wrapping_add(error).to_be_bytes());
        }
        udp
    }
}
