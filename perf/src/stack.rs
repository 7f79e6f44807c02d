//! Frames of any encapsulation: a list of headers, outermost first, and what they carry.
//!
//! ```text
//!   vxlan    Ethernet  IPv4|IPv6  UDP 8472  VXLAN  Ethernet  │ IPv4|IPv6  …
//!   ipip     Ethernet  IPv4, protocol 4                      │ IPv4  …
//!   udp      Ethernet  IPv4  UDP 8285                        │ IPv4  …
//!   host-gw  Ethernet                                        │ IPv4|IPv6  …
//! ```
//!
//! As in [`crate::VxlanFrame`], lengths and checksums are right unless a field says otherwise: a test
//! changes one thing of a good [`Frame`], and a captured one says where its sender was wrong.

use core::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result, ensure};

use crate::address::{Family, Mac, UDP_PORT, VXLAN_PORT};
use crate::frame::{
    Ethernet, Ipv4, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Udp, UdpChecksum, Vxlan,
    internet_checksum, transport_checksum,
};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const PROTOCOL_IPIP: u8 = 4;
const PROTOCOL_ICMP6: u8 = 58;
const IPV6_LEN: usize = 40;

/// An IPv6 header. `None` stands for the right value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the header's fields")]
pub struct Ipv6 {
    pub version: u8,
    /// Six bits DSCP, two bits ECN.
    pub traffic_class: u8,
    /// 20 bits.
    pub flow_label: u32,
    pub payload_length: Option<u16>,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: Ipv6Addr,
    pub destination: Ipv6Addr,
}

impl Ipv6 {
    /// The header of a UDP packet as Linux sends it through a tunnel: hop limit 64, no flow label.
    #[must_use]
    pub fn udp(source: Ipv6Addr, destination: Ipv6Addr) -> Self {
        Self {
            version: 6,
            traffic_class: 0,
            flow_label: 0,
            payload_length: None,
            next_header: PROTOCOL_UDP,
            hop_limit: 64,
            source,
            destination,
        }
    }

    /// The packet: this header in front of `payload`.
    #[must_use]
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let first = u32::from(self.version) << 28
            | u32::from(self.traffic_class) << 20
            | self.flow_label & 0xf_ffff;
        let right_length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
        let length = self.payload_length.unwrap_or(right_length);
        [
            first.to_be_bytes().as_slice(),
            &length.to_be_bytes(),
            &[self.next_header, self.hop_limit],
            &self.source.octets(),
            &self.destination.octets(),
            payload,
        ]
        .concat()
    }

    /// Reads a packet. What follows the packet's own length (Ethernet's padding) is left out.
    ///
    /// # Errors
    /// It is shorter than the header.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8])> {
        ensure!(
            bytes.len() >= IPV6_LEN,
            "{} bytes are no IPv6 header",
            bytes.len()
        );
        let (header, rest) = bytes.split_at(IPV6_LEN);
        let first = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let length = u16::from_be_bytes([header[4], header[5]]);
        let address = |at: usize| -> Ipv6Addr {
            let mut octets = [0; 16];
            octets.copy_from_slice(&header[at..at + 16]);
            octets.into()
        };
        let whole = rest.get(..length.into());
        let ip = Self {
            version: header[0] >> 4,
            traffic_class: u8::try_from(first >> 20 & 0xff).unwrap_or_default(),
            flow_label: first & 0xf_ffff,
            payload_length: whole.is_none().then_some(length),
            next_header: header[6],
            hop_limit: header[7],
            source: address(8),
            destination: address(24),
        };
        Ok((ip, whole.unwrap_or(rest)))
    }
}

/// One header of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// Ethernet.
    Ethernet(Ethernet),
    /// The four bytes of a VLAN tag behind the two of its own EtherType: tag, and the EtherType of
    /// what follows.
    Vlan(u16, u16),
    /// IPv4.
    Ipv4(Ipv4),
    /// IPv6.
    Ipv6(Ipv6),
    /// UDP, whose checksum covers addresses of the IP header before it.
    Udp(Udp),
    /// VXLAN.
    Vxlan(Vxlan),
    /// Any other, such as an extension header of IPv6.
    Raw(Vec<u8>),
}

/// A frame, or with an IP header at its front a packet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// Outermost first.
    pub headers: Vec<Header>,
    /// What the last header carries.
    pub payload: Vec<u8>,
    /// Cut the finished frame off after so many bytes, with lengths and checksums as they were.
    pub truncate_to: Option<usize>,
}

impl Frame {
    /// The frame's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.payload.clone();
        for (position, header) in self.headers.iter().enumerate().rev() {
            bytes = match header {
                Header::Ethernet(ethernet) => ethernet.encode(&bytes),
                Header::Vlan(tag, ethertype) => [
                    &tag.to_be_bytes(),
                    &ethertype.to_be_bytes(),
                    bytes.as_slice(),
                ]
                .concat(),
                Header::Ipv4(ip) => ip.encode(&bytes),
                Header::Ipv6(ip) => ip.encode(&bytes),
                Header::Udp(udp) => udp.encode_between(self.addresses_before(position), &bytes),
                Header::Vxlan(vxlan) => vxlan.encode(&bytes),
                Header::Raw(raw) => [raw.as_slice(), &bytes].concat(),
            };
        }
        if let Some(length) = self.truncate_to {
            bytes.truncate(length);
        }
        bytes
    }

    fn addresses_before(&self, position: usize) -> [IpAddr; 2] {
        let before = self.headers[..position].iter().rev();
        let mut addresses = before.filter_map(|header| match header {
            Header::Ipv4(ip) => Some([ip.source.into(), ip.destination.into()]),
            Header::Ipv6(ip) => Some([ip.source.into(), ip.destination.into()]),
            Header::Ethernet(_)
            | Header::Vlan(..)
            | Header::Udp(_)
            | Header::Vxlan(_)
            | Header::Raw(_) => None,
        });
        addresses
            .next()
            .unwrap_or([Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()])
    }

    /// Reads a frame from its Ethernet header on, through every tunnel of flannel's on its way.
    ///
    /// # Errors
    /// A header is cut off.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut frame = Self::default();
        let rest = frame.read_ethernet(bytes)?;
        frame.payload = rest.to_vec();
        Ok(frame)
    }

    /// Reads a packet from its IP header on.
    ///
    /// # Errors
    /// A header is cut off.
    pub fn parse_packet(bytes: &[u8]) -> Result<Self> {
        let mut frame = Self::default();
        let ethertype = match bytes.first().map(|first| first >> 4) {
            Some(6) => ETHERTYPE_IPV6,
            _ => ETHERTYPE_IPV4,
        };
        let rest = frame.read(ethertype, bytes)?;
        frame.payload = rest.to_vec();
        Ok(frame)
    }

    fn read_ethernet<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let (ethernet, rest) = Ethernet::parse(bytes)?;
        let ethertype = ethernet.ethertype;
        self.headers.push(Header::Ethernet(ethernet));
        self.read(ethertype, rest)
    }

    fn read<'a>(&mut self, ethertype: u16, bytes: &'a [u8]) -> Result<&'a [u8]> {
        match ethertype {
            ETHERTYPE_VLAN => {
                let (tag, rest) = bytes.split_at_checked(4).context("VLAN tag cut off")?;
                let inside = u16::from_be_bytes([tag[2], tag[3]]);
                let tag = u16::from_be_bytes([tag[0], tag[1]]);
                self.headers.push(Header::Vlan(tag, inside));
                self.read(inside, rest)
            }
            ETHERTYPE_IPV4 => {
                let (ip, rest) = Ipv4::parse(bytes)?;
                let whole = ip.is_whole();
                let (protocol, ends) = (ip.protocol, [ip.source.into(), ip.destination.into()]);
                self.headers.push(Header::Ipv4(ip));
                if whole {
                    self.read_transport(protocol, ends, rest)
                } else {
                    Ok(rest)
                }
            }
            ETHERTYPE_IPV6 => {
                let (ip, rest) = Ipv6::parse(bytes)?;
                let (protocol, ends) = (ip.next_header, [ip.source.into(), ip.destination.into()]);
                self.headers.push(Header::Ipv6(ip));
                self.read_transport(protocol, ends, rest)
            }
            _ => Ok(bytes),
        }
    }

    fn read_transport<'a>(
        &mut self,
        protocol: u8,
        ends: [IpAddr; 2],
        bytes: &'a [u8],
    ) -> Result<&'a [u8]> {
        match protocol {
            PROTOCOL_IPIP => self.read(ETHERTYPE_IPV4, bytes),
            PROTOCOL_UDP => {
                let (udp, rest) = Udp::parse_between(ends, bytes)?;
                let port = udp.destination;
                self.headers.push(Header::Udp(udp));
                match port {
                    VXLAN_PORT => {
                        let (vxlan, rest) = Vxlan::parse(rest)?;
                        self.headers.push(Header::Vxlan(vxlan));
                        self.read_ethernet(rest)
                    }
                    UDP_PORT => self.read(ETHERTYPE_IPV4, rest),
                    _ => Ok(rest),
                }
            }
            _ => Ok(bytes),
        }
    }

    /// The Ethernet headers, outermost first.
    pub fn ethernets(&mut self) -> impl Iterator<Item = &mut Ethernet> {
        self.headers.iter_mut().filter_map(|header| {
            if let Header::Ethernet(ethernet) = header {
                Some(ethernet)
            } else {
                None
            }
        })
    }

    /// The IPv4 headers, outermost first.
    pub fn ipv4s(&mut self) -> impl Iterator<Item = &mut Ipv4> {
        self.headers.iter_mut().filter_map(|header| {
            if let Header::Ipv4(ip) = header {
                Some(ip)
            } else {
                None
            }
        })
    }

    /// The IPv6 headers, outermost first.
    pub fn ipv6s(&mut self) -> impl Iterator<Item = &mut Ipv6> {
        self.headers.iter_mut().filter_map(|header| {
            if let Header::Ipv6(ip) = header {
                Some(ip)
            } else {
                None
            }
        })
    }

    /// The UDP headers, outermost first.
    pub fn udps(&mut self) -> impl Iterator<Item = &mut Udp> {
        self.headers.iter_mut().filter_map(|header| {
            if let Header::Udp(udp) = header {
                Some(udp)
            } else {
                None
            }
        })
    }

    /// The VXLAN headers, outermost first.
    pub fn vxlans(&mut self) -> impl Iterator<Item = &mut Vxlan> {
        self.headers.iter_mut().filter_map(|header| {
            if let Header::Vxlan(vxlan) = header {
                Some(vxlan)
            } else {
                None
            }
        })
    }

    /// How many IP headers it has: one without a tunnel, two with one.
    #[must_use]
    pub fn packets(&self) -> usize {
        let is_ip = |header: &&Header| matches!(header, Header::Ipv4(_) | Header::Ipv6(_));
        self.headers.iter().filter(is_ip).count()
    }

    /// From the innermost IP header on: the pod's packet.
    #[must_use]
    pub fn innermost(&self) -> Self {
        let is_ip = |header: &Header| matches!(header, Header::Ipv4(_) | Header::Ipv6(_));
        let position = self.headers.iter().rposition(is_ip).unwrap_or_default();
        Self {
            headers: self.headers[position..].to_vec(),
            payload: self.payload.clone(),
            truncate_to: None,
        }
    }

    /// Splits the headers in front of the innermost IP header from the rest.
    #[must_use]
    pub fn outer(&self) -> Vec<Header> {
        let inner = self.innermost().headers.len();
        self.headers[..self.headers.len() - inner].to_vec()
    }

    /// The innermost IP packet has one hop less to go, as behind a router.
    pub fn count_down(&mut self) {
        let inner = self
            .headers
            .iter_mut()
            .rev()
            .find_map(|header| match header {
                Header::Ipv4(ip) => Some(&mut ip.ttl),
                Header::Ipv6(ip) => Some(&mut ip.hop_limit),
                Header::Ethernet(_)
                | Header::Vlan(..)
                | Header::Udp(_)
                | Header::Vxlan(_)
                | Header::Raw(_) => None,
            });
        if let Some(hops) = inner {
            *hops = hops.saturating_sub(1);
        }
    }
}

impl Ethernet {
    /// The header of a frame with an IP packet of a family.
    #[must_use]
    pub fn ip(family: Family, source: Mac, destination: Mac) -> Self {
        let ethertype = match family {
            Family::Ipv4 => ETHERTYPE_IPV4,
            Family::Ipv6 => ETHERTYPE_IPV6,
        };
        Self {
            destination,
            source,
            ethertype,
        }
    }
}

/// An ICMP message with its checksum.
#[must_use]
pub fn icmp(kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = [&[kind, code, 0, 0], body].concat();
    let checksum = internet_checksum(&bytes);
    bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// An ICMPv6 message with its checksum.
#[must_use]
pub fn icmp6(source: Ipv6Addr, destination: Ipv6Addr, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = [&[kind, code, 0, 0], body].concat();
    let checksum = transport_checksum([source.into(), destination.into()], PROTOCOL_ICMP6, &bytes);
    bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// What a receiver on a real wire would object to in a frame: longer than the MTU allows, a wrong
/// length, a wrong or missing checksum; in the packets inside of tunnels as well. Empty when all is
/// well. Only length is looked at in what is not IP.
#[must_use]
pub fn wire_faults(frame: &[u8], mtu: u16) -> Vec<String> {
    let mut faults = Vec::new();
    let tag = if frame.get(12..14) == Some(&ETHERTYPE_VLAN.to_be_bytes()) {
        4
    } else {
        0
    };
    let bytes_max = usize::from(mtu) + 14 + tag;
    if frame.len() > bytes_max {
        faults.push(format!(
            "{} bytes, at most {bytes_max} fit the wire",
            frame.len()
        ));
    }
    let parsed = match Frame::parse(frame) {
        Ok(parsed) => parsed,
        Err(error) => {
            faults.push(format!("{error:#}"));
            return faults;
        }
    };
    let mut layer = "";
    let mut ends = String::new();
    let mut last = None;
    let mut seen_ip = false;
    for (position, header) in parsed.headers.iter().enumerate() {
        if matches!(header, Header::Ipv4(_) | Header::Ipv6(_)) {
            if seen_ip {
                layer = "inner: ";
            }
            seen_ip = true;
        }
        let mut fault = |what: String| faults.push(format!("{layer}{what}{ends}"));
        match header {
            Header::Ipv4(ip) => {
                ends = format!(" from {} to {}", ip.source, ip.destination);
                let mut fault = |what: String| faults.push(format!("{layer}{what}{ends}"));
                if let Some(length) = ip.total_length {
                    fault(format!("IPv4 length {length} of too few bytes"));
                }
                if ip.checksum.is_some() {
                    fault("wrong IPv4 checksum".to_owned());
                }
                last = ip.is_whole().then_some(ip.protocol);
            }
            Header::Ipv6(ip) => {
                ends = format!(" from {} to {}", ip.source, ip.destination);
                let mut fault = |what: String| faults.push(format!("{layer}{what}{ends}"));
                if let Some(length) = ip.payload_length {
                    fault(format!("IPv6 length {length} of too few bytes"));
                }
                if ip.version != 6 {
                    fault(format!("version {}", ip.version));
                }
                last = Some(ip.next_header);
            }
            Header::Udp(udp) => {
                last = None;
                if let Some(length) = udp.length {
                    fault(format!("UDP length {length} of another number of bytes"));
                }
                match udp.checksum {
                    UdpChecksum::Correct => {}
                    UdpChecksum::None => fault("no UDP checksum".to_owned()),
                    UdpChecksum::Wrong(_) => fault("wrong UDP checksum".to_owned()),
                }
            }
            Header::Ethernet(_) | Header::Vlan(..) | Header::Vxlan(_) | Header::Raw(_) => {}
        }
        if position + 1 == parsed.headers.len() {
            let ends_of = parsed.addresses_before(position + 1);
            let wrong = match last {
                Some(PROTOCOL_TCP) => transport_checksum(ends_of, PROTOCOL_TCP, &parsed.payload),
                Some(PROTOCOL_ICMP6) => {
                    transport_checksum(ends_of, PROTOCOL_ICMP6, &parsed.payload)
                }
                Some(PROTOCOL_ICMP) => internet_checksum(&parsed.payload),
                _ => 0,
            };
            if wrong != 0 {
                let protocol = last.unwrap_or_default();
                faults.push(format!(
                    "{layer}wrong checksum of protocol {protocol}{ends}"
                ));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address;

    fn ethernet(family: Family) -> Header {
        let (source, destination) = (address::underlay_mac(1), address::underlay_mac(2));
        Header::Ethernet(Ethernet::ip(family, source, destination))
    }

    fn inner(family: Family) -> Vec<Header> {
        let ip = match family {
            Family::Ipv4 => Header::Ipv4(Ipv4::udp(address::pod(1, 0), address::pod(2, 0))),
            Family::Ipv6 => Header::Ipv6(Ipv6 {
                flow_label: 0x12345,
                traffic_class: 0xb9,
                ..Ipv6::udp(address::pod6(1, 0), address::pod6(2, 0))
            }),
        };
        vec![ip, Header::Udp(Udp::ports(4000, 4001))]
    }

    /// A good frame of each backend and family, and how many bytes it has in front of the packet.
    fn good() -> Vec<(&'static str, usize, Frame)> {
        let outer4 = |protocol| {
            Header::Ipv4(Ipv4 {
                protocol,
                ..Ipv4::udp(address::underlay(1), address::underlay(2))
            })
        };
        let outer6 = Header::Ipv6(Ipv6::udp(address::underlay6(1), address::underlay6(2)));
        let vxlan = |family| {
            vec![
                Header::Udp(Udp::ports(50_000, VXLAN_PORT)),
                Header::Vxlan(Vxlan::vni(1)),
                ethernet(family),
            ]
        };
        let four = || ethernet(Family::Ipv4);
        let udp = Header::Udp(Udp::ports(UDP_PORT, UDP_PORT));
        let tagged = vec![
            Header::Ethernet(Ethernet {
                ethertype: ETHERTYPE_VLAN,
                ..Ethernet::ipv4(address::underlay_mac(1), address::underlay_mac(2))
            }),
            Header::Vlan(100, ETHERTYPE_IPV4),
        ];
        let with = |mut outer: Vec<Header>, family| {
            outer.extend(inner(family));
            Frame {
                headers: outer,
                payload: b"odd".to_vec(),
                truncate_to: None,
            }
        };
        let joined = |first: Vec<Header>, rest: Vec<Header>| [first, rest].concat();
        let (ipv4, ipv6) = (Family::Ipv4, Family::Ipv6);
        vec![
            (
                "vxlan",
                50,
                with(joined(vec![four(), outer4(17)], vxlan(ipv4)), ipv4),
            ),
            (
                "vxlan6",
                70,
                with(joined(vec![ethernet(ipv6), outer6], vxlan(ipv6)), ipv6),
            ),
            ("ipip", 20, with(vec![four(), outer4(4)], ipv4)),
            ("udp", 28, with(vec![four(), outer4(17), udp], ipv4)),
            ("direct", 0, with(vec![four()], ipv4)),
            ("direct6", 0, with(vec![ethernet(ipv6)], ipv6)),
            (
                "ipip, tagged",
                24,
                with(joined(tagged, vec![outer4(4)]), ipv4),
            ),
        ]
    }

    #[test]
    fn good_frames_have_no_faults_and_read_back_as_built() {
        for (name, overhead, frame) in good() {
            let bytes = frame.encode();
            let ip = if name.ends_with('6') { 40 } else { 20 };
            assert_eq!(bytes.len(), 14 + overhead + ip + 8 + 3, "{name}");
            assert_eq!(wire_faults(&bytes, 1500), Vec::<String>::new(), "{name}");
            assert_eq!(Frame::parse(&bytes).expect(name), frame, "{name}");
            // Ethernet's padding belongs to nobody.
            let padded = [bytes.as_slice(), &[0xee; 20]].concat();
            if !name.starts_with("vxlan") {
                assert_eq!(Frame::parse(&padded).expect(name), frame, "{name}");
            }
            let packet = frame.innermost().encode();
            assert!(bytes.ends_with(&packet), "{name}");
            let parsed = Frame::parse_packet(&packet).expect(name);
            assert_eq!(parsed, frame.innermost(), "{name}");
        }
    }

    #[test]
    fn a_flipped_bit_in_a_packet_is_found() {
        for (name, overhead, frame) in good() {
            let bytes = frame.encode();
            // The payload's last byte is covered by every UDP checksum around it.
            let mut damaged = bytes.clone();
            damaged[bytes.len() - 1] ^= 0x10;
            let faults = wire_faults(&damaged, 1500).join("; ");
            assert!(faults.contains("wrong UDP checksum"), "{name}: {faults:?}");
            // Any bit of an address, inside or outside.
            for start in [14, 14 + overhead] {
                let mut damaged = bytes.clone();
                damaged[start + 15] ^= 1;
                if name.ends_with("tagged") && start == 14 {
                    continue;
                }
                assert!(!wire_faults(&damaged, 1500).is_empty(), "{name} at {start}");
            }
        }
    }

    #[test]
    fn lengths_and_missing_checksums_are_faults() {
        for (name, _, frame) in good() {
            let mut short = frame.clone();
            short.truncate_to = Some(frame.encode().len() - 1);
            let faults = wire_faults(&short.encode(), 1500).join("; ");
            assert!(faults.contains("length"), "{name}: {faults:?}");
            let mut unsummed = frame.clone();
            for udp in unsummed.udps() {
                udp.checksum = UdpChecksum::None;
            }
            let faults = wire_faults(&unsummed.encode(), 1500).join("; ");
            assert!(faults.contains("no UDP checksum"), "{name}: {faults:?}");
            let tall = wire_faults(&frame.encode(), 30).join("; ");
            assert!(tall.contains("fit the wire"), "{name}: {tall:?}");
        }
    }

    #[test]
    fn etherparse_agrees_on_the_checksums_of_ipv6() {
        let (source, destination) = (address::pod6(1, 0), address::pod6(2, 0));
        let message = icmp6(source, destination, 128, 0, &[0, 7, 0, 1, 9, 9, 9]);
        let header = etherparse::Icmpv6Slice::from_slice(&message).expect("parses");
        assert!(header.is_checksum_valid(source.octets(), destination.octets()));
        for (name, _, frame) in good().into_iter().filter(|(name, ..)| name.ends_with('6')) {
            let bytes = frame.innermost().encode();
            let sliced = etherparse::SlicedPacket::from_ip(&bytes).expect("parses");
            let Some(etherparse::NetSlice::Ipv6(ip)) = sliced.net else {
                panic!("{name}: no IPv6 header")
            };
            assert_eq!(ip.header().flow_label().value(), 0x12345);
            assert_eq!(ip.header().traffic_class(), 0xb9);
            let Some(etherparse::TransportSlice::Udp(udp)) = sliced.transport else {
                panic!("{name}: no UDP header")
            };
            let sum = udp
                .to_header()
                .calc_checksum_ipv6_raw(source.octets(), destination.octets(), udp.payload())
                .expect("short enough");
            assert_eq!(sum, udp.checksum(), "{name}");
        }
    }
}
