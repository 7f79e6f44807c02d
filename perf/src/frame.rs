//! Frames as fields: built for attacks, read back from captures, checked as a receiver would.
//!
//! A [`VxlanFrame`] carries every field of both packets. Lengths and checksums are right unless a
//! field says otherwise, so a test changes one thing and leaves the rest correct; and a frame that
//! was captured and parsed says by `None` and [`UdpChecksum::Correct`] that its sender was right.

use core::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use etherparse::checksum::Sum16BitWords;
use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options,
    UdpHeader,
};

use crate::address::{Mac, VXLAN_PORT};

const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
const VXLAN_HEADER: usize = 8;

/// An Ethernet header.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the header's fields")]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    pub ethertype: u16,
}

impl Ethernet {
    /// The header of an IPv4 frame.
    #[must_use]
    pub fn ipv4(source: Mac, destination: Mac) -> Self {
        Self {
            destination,
            source,
            ethertype: ETHERTYPE_IPV4,
        }
    }

    pub(crate) fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let header = Ethernet2Header {
            source: self.source.0,
            destination: self.destination.0,
            ether_type: EtherType(self.ethertype),
        };
        [&header.to_bytes(), payload].concat()
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let (header, payload) = Ethernet2Header::from_slice(bytes).context("Ethernet header")?;
        let ethernet = Self {
            destination: Mac(header.destination),
            source: Mac(header.source),
            ethertype: header.ether_type.0,
        };
        Ok((ethernet, payload))
    }
}

/// An IPv4 header. `None` stands for the right value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the header's fields")]
pub struct Ipv4 {
    /// The first byte, version and header length.
    pub version_ihl: Option<u8>,
    /// The former type of service: six bits DSCP, two bits ECN.
    pub tos: u8,
    pub total_length: Option<u16>,
    pub identification: u16,
    pub dont_fragment: bool,
    pub more_fragments: bool,
    /// In units of 8 bytes, as on the wire; 13 bits.
    pub fragment_offset: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: Option<u16>,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// At most 40 bytes; padded with zeroes to a multiple of 4.
    pub options: Vec<u8>,
}

impl Ipv4 {
    /// The header of a UDP packet as Linux sends it: TTL 64, no DF, no options.
    #[must_use]
    pub fn udp(source: Ipv4Addr, destination: Ipv4Addr) -> Self {
        Self {
            version_ihl: None,
            tos: 0,
            total_length: None,
            identification: 0,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset: 0,
            ttl: 64,
            protocol: PROTOCOL_UDP,
            checksum: None,
            source,
            destination,
            options: Vec::new(),
        }
    }

    fn header(&self, payload_bytes: usize) -> Ipv4Header {
        let mut padded = self.options.clone();
        padded.truncate(40);
        padded.resize(padded.len().next_multiple_of(4), 0);
        let mut header = Ipv4Header {
            dscp: IpDscp::try_new(self.tos >> 2).unwrap_or_default(),
            ecn: IpEcn::try_new(self.tos & 3).unwrap_or_default(),
            identification: self.identification,
            dont_fragment: self.dont_fragment,
            more_fragments: self.more_fragments,
            fragment_offset: IpFragOffset::try_new(self.fragment_offset & 0x1fff)
                .unwrap_or_default(),
            time_to_live: self.ttl,
            protocol: IpNumber(self.protocol),
            source: self.source.octets(),
            destination: self.destination.octets(),
            options: Ipv4Options::try_from(padded.as_slice()).unwrap_or_default(),
            ..Ipv4Header::default()
        };
        let right_length = u16::try_from(header.header_len() + payload_bytes).unwrap_or(u16::MAX);
        header.total_len = self.total_length.unwrap_or(right_length);
        header
    }

    /// The packet: this header in front of `payload`. The checksum fits what is sent, lies included,
    /// unless `checksum` says otherwise.
    #[must_use]
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = self.header(payload.len()).to_bytes().to_vec();
        if let Some(version_ihl) = self.version_ihl {
            bytes[0] = version_ihl;
        }
        bytes[10..12].fill(0);
        let checksum = self.checksum.unwrap_or_else(|| internet_checksum(&bytes));
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Reads a packet. What follows the packet's own length (Ethernet's padding) is left out.
    pub(crate) fn parse(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let (header, _rest) = Ipv4Header::from_slice(bytes).context("IPv4 header")?;
        let (start, end) = (header.header_len(), usize::from(header.total_len));
        let whole = start <= end && end <= bytes.len();
        let payload = if whole {
            &bytes[start..end]
        } else {
            &bytes[start..]
        };
        let ip = Self {
            version_ihl: None,
            tos: header.dscp.value() << 2 | header.ecn.value(),
            total_length: (!whole).then_some(header.total_len),
            identification: header.identification,
            dont_fragment: header.dont_fragment,
            more_fragments: header.more_fragments,
            fragment_offset: header.fragment_offset.value(),
            ttl: header.time_to_live,
            protocol: header.protocol.0,
            checksum: (internet_checksum(&bytes[..start]) != 0).then_some(header.header_checksum),
            source: header.source.into(),
            destination: header.destination.into(),
            options: header.options.to_vec(),
        };
        Ok((ip, payload))
    }

    pub(crate) fn is_whole(&self) -> bool {
        !self.more_fragments && self.fragment_offset == 0
    }
}

/// What stands in a UDP header's checksum field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpChecksum {
    /// The right sum.
    Correct,
    /// Zero: the sender made no checksum.
    None,
    /// This value, which is wrong.
    Wrong(u16),
}

/// A UDP header. `None` stands for the right value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the header's fields")]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    pub length: Option<u16>,
    pub checksum: UdpChecksum,
}

impl Udp {
    /// A header with these ports.
    #[must_use]
    pub fn ports(source: u16, destination: u16) -> Self {
        Self {
            source,
            destination,
            length: None,
            checksum: UdpChecksum::Correct,
        }
    }

    fn encode(&self, ip: &Ipv4, payload: &[u8]) -> Vec<u8> {
        self.encode_between([ip.source.into(), ip.destination.into()], payload)
    }

    pub(crate) fn encode_between(&self, ends: [IpAddr; 2], payload: &[u8]) -> Vec<u8> {
        let right_length = u16::try_from(UdpHeader::LEN + payload.len()).unwrap_or(u16::MAX);
        let mut header = UdpHeader {
            source_port: self.source,
            destination_port: self.destination,
            length: self.length.unwrap_or(right_length),
            checksum: 0,
        };
        header.checksum = match self.checksum {
            UdpChecksum::Correct => {
                let unsummed = [&header.to_bytes(), payload].concat();
                // A sum of zero is sent as all ones: zero means "no checksum" (RFC 768).
                match transport_checksum(ends, PROTOCOL_UDP, &unsummed) {
                    0 => 0xffff,
                    sum => sum,
                }
            }
            UdpChecksum::None => 0,
            UdpChecksum::Wrong(value) => value,
        };
        [&header.to_bytes(), payload].concat()
    }

    fn parse<'a>(ip: &Ipv4, bytes: &'a [u8]) -> Result<(Self, &'a [u8])> {
        Self::parse_between([ip.source.into(), ip.destination.into()], bytes)
    }

    pub(crate) fn parse_between(ends: [IpAddr; 2], bytes: &[u8]) -> Result<(Self, &[u8])> {
        let (header, payload) = UdpHeader::from_slice(bytes).context("UDP header")?;
        let checksum = match header.checksum {
            0 => UdpChecksum::None,
            _ if transport_checksum(ends, PROTOCOL_UDP, bytes) == 0 => UdpChecksum::Correct,
            value => UdpChecksum::Wrong(value),
        };
        let udp = Self {
            source: header.source_port,
            destination: header.destination_port,
            length: (usize::from(header.length) != bytes.len()).then_some(header.length),
            checksum,
        };
        Ok((udp, payload))
    }
}

/// A VXLAN header (RFC 7348, section 5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The flags; 0x08 says that the VNI is valid.
    pub flags: u8,
    /// The 24 bits after the flags.
    pub reserved: [u8; 3],
    /// The network identifier; 24 bits.
    pub vni: u32,
    /// The last byte.
    pub reserved_last: u8,
}

impl Vxlan {
    /// A correct header of a network.
    #[must_use]
    pub fn vni(vni: u32) -> Self {
        Self {
            flags: 0x08,
            reserved: [0; 3],
            vni,
            reserved_last: 0,
        }
    }

    pub(crate) fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let [a, b, c] = self.reserved;
        let [_, x, y, z] = self.vni.to_be_bytes();
        [&[self.flags, a, b, c, x, y, z, self.reserved_last], payload].concat()
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<(Self, &[u8])> {
        ensure!(
            bytes.len() >= VXLAN_HEADER,
            "{} bytes are no VXLAN header",
            bytes.len()
        );
        let vxlan = Self {
            flags: bytes[0],
            reserved: [bytes[1], bytes[2], bytes[3]],
            vni: u32::from_be_bytes([0, bytes[4], bytes[5], bytes[6]]),
            reserved_last: bytes[7],
        };
        Ok((vxlan, &bytes[VXLAN_HEADER..]))
    }
}

/// What is inside the inner Ethernet frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants' fields are what their names say")]
pub enum Inner {
    /// A UDP datagram.
    Udp {
        ip: Ipv4,
        udp: Udp,
        payload: Vec<u8>,
    },
    /// Another IPv4 packet; also a fragment, or a header whose payload is too short for UDP.
    Ipv4 { ip: Ipv4, payload: Vec<u8> },
    /// Anything else.
    Raw(Vec<u8>),
}

/// A whole VXLAN packet, outermost header first.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are the headers that their names say"
)]
pub struct VxlanFrame {
    pub ethernet: Ethernet,
    pub ip: Ipv4,
    pub udp: Udp,
    pub vxlan: Vxlan,
    pub inner_ethernet: Ethernet,
    pub inner: Inner,
    /// Cut the finished frame off after so many bytes, with lengths and checksums as they were.
    pub truncate_to: Option<usize>,
}

impl VxlanFrame {
    /// The frame's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let inner = match &self.inner {
            Inner::Udp { ip, udp, payload } => ip.encode(&udp.encode(ip, payload)),
            Inner::Ipv4 { ip, payload } => ip.encode(payload),
            Inner::Raw(bytes) => bytes.clone(),
        };
        let vxlan = self.vxlan.encode(&self.inner_ethernet.encode(&inner));
        let mut bytes = self
            .ethernet
            .encode(&self.ip.encode(&self.udp.encode(&self.ip, &vxlan)));
        if let Some(length) = self.truncate_to {
            bytes.truncate(length);
        }
        bytes
    }

    /// Reads a captured frame.
    ///
    /// # Errors
    /// It is not VXLAN over UDP over IPv4 on flannel's port, or is cut off before the inner packet.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (ethernet, packet) = Ethernet::parse(bytes)?;
        ensure!(
            ethernet.ethertype == ETHERTYPE_IPV4,
            "ethertype {:#06x} is not IPv4",
            ethernet.ethertype
        );
        let (ip, segment) = Ipv4::parse(packet)?;
        ensure!(
            ip.protocol == PROTOCOL_UDP && ip.is_whole(),
            "not a whole UDP packet"
        );
        let (udp, payload) = Udp::parse(&ip, segment)?;
        ensure!(
            udp.destination == VXLAN_PORT,
            "UDP port {} is not VXLAN's",
            udp.destination
        );
        let (vxlan, payload) = Vxlan::parse(payload)?;
        let (inner_ethernet, packet) = Ethernet::parse(payload).context("inner frame")?;
        let inner = match Ipv4::parse(packet) {
            Ok((ip, segment)) if inner_ethernet.ethertype == ETHERTYPE_IPV4 => {
                Self::parse_inner(ip, segment)
            }
            Ok(_) | Err(_) => Inner::Raw(packet.to_vec()),
        };
        Ok(Self {
            ethernet,
            ip,
            udp,
            vxlan,
            inner_ethernet,
            inner,
            truncate_to: None,
        })
    }

    fn parse_inner(ip: Ipv4, segment: &[u8]) -> Inner {
        if ip.protocol == PROTOCOL_UDP
            && ip.is_whole()
            && let Ok((udp, payload)) = Udp::parse(&ip, segment)
        {
            let payload = payload.to_vec();
            return Inner::Udp { ip, udp, payload };
        }
        Inner::Ipv4 {
            ip,
            payload: segment.to_vec(),
        }
    }
}

/// The checksum of RFC 1071. Over bytes that contain their own right checksum it is 0.
pub(crate) fn internet_checksum(bytes: &[u8]) -> u16 {
    // The library sums in native byte order.
    Sum16BitWords::new()
        .add_slice(bytes)
        .ones_complement()
        .to_be()
}

/// The checksum of UDP, TCP and ICMPv6 with their pseudo header, between two addresses of one family.
#[must_use]
pub fn transport_checksum(ends: [IpAddr; 2], protocol: u8, segment: &[u8]) -> u16 {
    // The pseudo header of IPv6 has wider fields, whose upper halves are zero.
    let length = u16::try_from(segment.len()).unwrap_or(u16::MAX);
    let mut sum = Sum16BitWords::new();
    for end in ends {
        sum = match end {
            IpAddr::V4(address) => sum.add_4bytes(address.octets()),
            IpAddr::V6(address) => sum.add_16bytes(address.octets()),
        };
    }
    sum.add_2bytes([0, protocol])
        .add_2bytes(length.to_be_bytes())
        .add_slice(segment)
        .ones_complement()
        .to_be()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address;
    use crate::stack::wire_faults;

    /// A name, and what it does to a good frame.
    type Change = (&'static str, fn(&mut VxlanFrame));

    fn good() -> VxlanFrame {
        VxlanFrame {
            ethernet: Ethernet::ipv4(address::underlay_mac(1), address::underlay_mac(2)),
            ip: Ipv4::udp(address::underlay(1), address::underlay(2)),
            udp: Udp::ports(50_000, VXLAN_PORT),
            vxlan: Vxlan::vni(1),
            inner_ethernet: Ethernet::ipv4(address::vtep_mac(1), address::vtep_mac(2)),
            inner: Inner::Udp {
                ip: Ipv4 {
                    dont_fragment: true,
                    ttl: 63,
                    ..Ipv4::udp(address::pod(1, 0), address::pod(2, 0))
                },
                udp: Udp::ports(7, 8),
                payload: b"odd".to_vec(),
            },
            truncate_to: None,
        }
    }

    #[test]
    fn a_good_frame_has_no_faults_and_reads_back_as_built() {
        let bytes = good().encode();
        assert_eq!(bytes.len(), 14 + 20 + 8 + 8 + 14 + 20 + 8 + 3);
        assert_eq!(wire_faults(&bytes, 1500), Vec::<String>::new());
        assert_eq!(VxlanFrame::parse(&bytes).expect("parses"), good());
    }

    #[test]
    fn etherparse_agrees_on_the_checksums() {
        let bytes = good().encode();
        let sliced = etherparse::SlicedPacket::from_ethernet(&bytes).expect("parses");
        let Some(etherparse::NetSlice::Ipv4(ip)) = sliced.net else {
            panic!("no IPv4 header")
        };
        let header = ip.header().to_header();
        assert_eq!(header.calc_header_checksum(), header.header_checksum);
        let Some(etherparse::TransportSlice::Udp(udp)) = sliced.transport else {
            panic!("no UDP header")
        };
        let sum = udp
            .to_header()
            .calc_checksum_ipv4(&header, udp.payload())
            .expect("short enough");
        assert_eq!(sum, udp.checksum());
    }

    #[test]
    fn every_lie_survives_the_way_to_the_wire_and_back() {
        let lies: [Change; 12] = [
            ("tos", |f| f.ip.tos = 0xb9),
            ("fragment", |f| {
                f.inner = Inner::Ipv4 {
                    ip: Ipv4 {
                        more_fragments: true,
                        fragment_offset: 5,
                        ..Ipv4::udp(address::FABRIC, address::ATTACKER)
                    },
                    payload: vec![1; 16],
                }
            }),
            ("options", |f| f.ip.options = vec![1, 1, 1, 1]),
            ("ip checksum", |f| f.ip.checksum = Some(0x1234)),
            ("ip length", |f| f.ip.total_length = Some(2000)),
            ("udp length", |f| f.udp.length = Some(60)),
            ("udp no checksum", |f| f.udp.checksum = UdpChecksum::None),
            ("udp checksum", |f| {
                f.udp.checksum = UdpChecksum::Wrong(0x1234);
            }),
            ("flags", |f| f.vxlan.flags = 0),
            ("reserved", |f| f.vxlan.reserved = [1, 2, 3]),
            ("vni", |f| f.vxlan.vni = 0x00ab_cdef),
            ("ethertype", |f| {
                f.inner_ethernet.ethertype = 0x86dd;
                f.inner = Inner::Raw(vec![9; 10]);
            }),
        ];
        for (name, lie) in lies {
            let mut frame = good();
            lie(&mut frame);
            let bytes = frame.encode();
            let parsed =
                VxlanFrame::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error:#}"));
            if name == "udp length" {
                // The payload ends where the header says, so the inner packet is shorter too.
                assert_eq!(parsed.udp.length, Some(60), "{name}");
            } else {
                // A checksum lie aside, sums are made over the lies, and are right.
                assert_eq!(parsed, frame, "{name}");
            }
        }
    }

    #[test]
    fn faults_are_found_in_both_packets() {
        let cases: [Change; 6] = [
            ("wrong IPv4 checksum from 10.199.0.11", |f| {
                f.ip.checksum = Some(1);
            }),
            ("wrong UDP checksum from 10.199.0.11", |f| {
                f.udp.checksum = UdpChecksum::Wrong(1);
            }),
            ("no UDP checksum from 10.199.0.11", |f| {
                f.udp.checksum = UdpChecksum::None;
            }),
            ("IPv4 length 2000", |f| f.ip.total_length = Some(2000)),
            ("inner: wrong UDP checksum", |f| {
                if let Inner::Udp { udp, .. } = &mut f.inner {
                    udp.checksum = UdpChecksum::Wrong(1);
                }
            }),
            ("1600 bytes, at most 1514", |f| {
                if let Inner::Udp { payload, .. } = &mut f.inner {
                    payload.resize(1600 - 92, 0);
                }
            }),
        ];
        for (expected, change) in cases {
            let mut frame = good();
            change(&mut frame);
            let faults = wire_faults(&frame.encode(), 1500).join("; ");
            assert!(
                faults.contains(expected),
                "{expected:?} is not in {faults:?}"
            );
        }
    }
}
