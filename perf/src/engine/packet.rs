//! The test packet: what a source writes and a sink understands.
//!
//! A UDP packet to [`TEST_PORT`], over IPv4 or IPv6, by itself or in a tunnel. Its payload, big-endian:
//!
//! ```text
//!  0        2        4                 8                12               16
//!  ├ magic ─┼ check ─┼───── flow ──────┼─── sequence ───┼───── time ─────┼── pattern …
//! ```
//!
//! - *check* makes the Internet checksum of the payload 0. So it guards every byte, and the UDP checksum of a packet does
//!   not depend on the payload: it is 0 (none) over IPv4, and over IPv6 follows from addresses, ports and length.
//! - *sequence* counts a flow's packets from 0, modulo 2^32.
//! - *time* is CLOCK_MONOTONIC in units of 8 ns, modulo 2^32: 34 s.
//! - *pattern* is a stretch of one table of random bytes; where it begins follows from flow and sequence. A source copies
//!   it, a sink compares.
//!
//! The kernel's pktgen writes 16 bytes of its own: its magic, a sequence of all packets from 1 on, and CLOCK_REALTIME in
//! seconds and microseconds (`net/core/pktgen.c`, `struct pktgen_hdr`).

use core::net::IpAddr;

use anyhow::{Result, bail, ensure};

use crate::address::Family;
use crate::frame::{Ethernet, Ipv4, Udp, UdpChecksum, Vxlan};
use crate::measure::{Size, Stream, Tunnel};
use crate::stack::{Frame, Header, Ipv6};

/// UDP destination port of test packets: discard (RFC 863).
pub const TEST_PORT: u16 = 9;

/// The shortest payload of a test packet in bytes.
pub const PAYLOAD_MIN: usize = 16;

/// The longest inner packet: what a page takes as a live frame, with an outer header.
const INNER_BYTES_MAX: usize = 3200;

/// `MAGIC` of `bpf/engine.h`: "RS".
const MAGIC: u16 = 0x5253;
/// Pktgen's.
const PKTGEN_MAGIC: u32 = 0xbe9b_e955;
/// Stretches of the table that a pattern can be: it begins at 8 times flow plus sequence, modulo this.
pub(super) const STRETCHES: usize = 64;
/// Bytes of the table.
pub(super) const TABLE_BYTES: usize = 4096;
/// What CLOCK_MONOTONIC is divided by, as a power of two.
const TIME_SHIFT: u32 = 3;

const IP_BYTES: [usize; 2] = [20, 40];
const UDP_BYTES: usize = 8;
const ETHERNET_BYTES: usize = 14;
const VXLAN_BYTES: usize = 8;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const PROTOCOL_IPIP: u8 = 4;

/// The packet sizes of a stream, and their order.
pub(super) fn sizes(size: Size) -> (Vec<u16>, Vec<u8>) {
    match size {
        Size::Bytes(bytes) => (vec![bytes], vec![0]),
        // Seven small, four middle, one large, spread out.
        Size::Imix => (
            vec![64, 594, 1450],
            vec![0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 1, 0],
        ),
    }
}

/// How many flows a stream has.
pub(super) fn flow_count(stream: &Stream) -> usize {
    usize::try_from(stream.flows)
        .unwrap_or(usize::MAX)
        .max(stream.to.len())
        .max(1)
}

/// What differs from flow to flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flow {
    /// Inner destination; an IPv4 address in the first four bytes.
    pub(super) to: [u8; 16],
    /// Inner source port.
    pub(super) port: u16,
    /// Source port of the outer UDP header, if there is one.
    pub(super) outer_port: u16,
    /// What `to` and, where the UDP checksum counts, `port` add to the checksum at [`Places::checksum`].
    pub(super) sum: u16,
}

/// What differs from size to size.
#[derive(Debug, Clone)]
pub(super) struct Form {
    /// All headers, of the stream's first flow, without destination, source port and inner checksum.
    pub(super) headers: Vec<u8>,
    /// The sum of what [`Places::checksum`] covers, without what a flow adds.
    pub(super) sum: u16,
    /// Bytes of the UDP payload.
    pub(super) payload: usize,
    /// Bytes of the inner packet.
    pub(super) inner: usize,
    /// The sum of each stretch of the table as long as this form's pattern.
    pub(super) pattern_sums: [u16; STRETCHES],
}

/// Where things are in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    /// The outer UDP source port, where it tells flows apart.
    pub(super) outer_port: Option<usize>,
    /// The inner IP header.
    pub(super) inner: usize,
    /// The inner destination address.
    pub(super) to: usize,
    /// Its bytes.
    pub(super) to_bytes: usize,
    /// The inner source port.
    pub(super) port: usize,
    /// The checksum that covers the destination: IPv4's own, or UDP's over IPv6.
    pub(super) checksum: usize,
    /// The UDP payload.
    pub(super) payload: usize,
}

/// The packets of a stream, ready to be written.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) family: Family,
    pub(super) places: Places,
    pub(super) forms: Vec<Form>,
    pub(super) order: Vec<u8>,
    pub(super) flows: Vec<Flow>,
    pub(super) table: Box<[u8; TABLE_BYTES]>,
}

impl Shape {
    /// Works a stream out for an interface with Ethernet frames, or (`link` false) bare IP packets.
    pub(super) fn of(stream: &Stream, link: bool) -> Result<Self> {
        let family = family(stream)?;
        let table = table();
        let (sizes, order) = sizes(stream.size);
        let places = Places::of(stream.tunnel.as_ref(), family, link);
        let forms = sizes
            .iter()
            .map(|size| Form::of(stream, usize::from(*size), places, &table, link))
            .collect::<Result<_>>()?;
        Ok(Self {
            family,
            places,
            forms,
            order,
            flows: flows(stream)?,
            table,
        })
    }

    /// Bytes of the longest frame.
    pub(super) fn frame_bytes_max(&self) -> usize {
        let payload = self.forms.iter().map(|form| form.payload).max();
        self.places.payload + payload.unwrap_or_default()
    }

    /// Bytes of a frame of this form.
    pub(super) fn frame_bytes(&self, form: usize) -> usize {
        self.places.payload + self.forms[form].payload
    }

    /// Writes a whole frame.
    #[inline]
    pub(super) fn write(
        &self,
        form: usize,
        flow: usize,
        sequence: u32,
        now_ns: u64,
        out: &mut [u8],
    ) {
        let (places, form) = (&self.places, &self.forms[form]);
        let number = u32::try_from(flow).unwrap_or_default();
        let flow = &self.flows[flow];
        let (headers, payload) = out.split_at_mut(places.payload);
        headers.copy_from_slice(&form.headers);
        if let Some(at) = places.outer_port {
            headers[at..at + 2].copy_from_slice(&flow.outer_port.to_be_bytes());
        }
        headers[places.to..places.to + places.to_bytes]
            .copy_from_slice(&flow.to[..places.to_bytes]);
        headers[places.port..places.port + 2].copy_from_slice(&flow.port.to_be_bytes());
        let checksum = self.checksum(form, flow);
        headers[places.checksum..places.checksum + 2].copy_from_slice(&checksum.to_be_bytes());
        let stretch = stretch(number, sequence);
        let (head, pattern) = payload.split_at_mut(PAYLOAD_MIN);
        head.copy_from_slice(&test_header(
            number,
            sequence,
            time(now_ns),
            form.pattern_sums[stretch],
        ));
        pattern.copy_from_slice(&self.table[stretch * 8..stretch * 8 + pattern.len()]);
    }

    fn checksum(&self, form: &Form, flow: &Flow) -> u16 {
        match (self.family, !add(form.sum, flow.sum)) {
            // Zero would mean that there is none (RFC 8200, section 8.1).
            (Family::Ipv6, 0) => 0xffff,
            (Family::Ipv4 | Family::Ipv6, sum) => sum,
        }
    }
}

/// The first bytes of a payload.
fn test_header(flow: u32, sequence: u32, time: u32, pattern_sum: u16) -> [u8; PAYLOAD_MIN] {
    let mut head = [0; PAYLOAD_MIN];
    head[..2].copy_from_slice(&MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&flow.to_be_bytes());
    head[8..12].copy_from_slice(&sequence.to_be_bytes());
    head[12..].copy_from_slice(&time.to_be_bytes());
    let check = !add(sum(&head), pattern_sum);
    head[2..4].copy_from_slice(&check.to_be_bytes());
    head
}

impl Places {
    pub(super) fn of(tunnel: Option<&Tunnel>, family: Family, link: bool) -> Self {
        let link = if link { ETHERNET_BYTES } else { 0 };
        let (outer, outer_port) = match tunnel {
            None => (0, None),
            Some(Tunnel::Ipip { .. }) => (IP_BYTES[0], None),
            // Flannel's process sends from the port that it listens on.
            Some(Tunnel::Udp { .. }) => (IP_BYTES[0] + UDP_BYTES, None),
            Some(Tunnel::Vxlan { .. }) => (
                IP_BYTES[0] + UDP_BYTES + VXLAN_BYTES + ETHERNET_BYTES,
                Some(link + IP_BYTES[0]),
            ),
        };
        let inner = link + outer;
        let (ip, to, to_bytes) = match family {
            Family::Ipv4 => (IP_BYTES[0], 16, 4),
            Family::Ipv6 => (IP_BYTES[1], 24, 16),
        };
        Self {
            outer_port,
            inner,
            to: inner + to,
            to_bytes,
            port: inner + ip,
            checksum: inner
                + match family {
                    Family::Ipv4 => 10,
                    Family::Ipv6 => ip + 6,
                },
            payload: inner + ip + UDP_BYTES,
        }
    }
}

impl Form {
    fn of(
        stream: &Stream,
        inner: usize,
        places: Places,
        table: &[u8; TABLE_BYTES],
        link: bool,
    ) -> Result<Self> {
        let headers = places.payload - places.inner;
        ensure!(
            (headers + PAYLOAD_MIN..=INNER_BYTES_MAX).contains(&inner),
            "a test packet of {inner} bytes cannot be: {} to {INNER_BYTES_MAX} can",
            headers + PAYLOAD_MIN
        );
        let payload = inner - headers;
        let mut headers = frame(stream, payload, link)?.encode();
        headers.truncate(places.payload);
        headers[places.to..places.to + places.to_bytes].fill(0);
        headers[places.port..places.port + 2].fill(0);
        headers[places.checksum..places.checksum + 2].fill(0);
        let base = match family(stream)? {
            Family::Ipv4 => sum(&headers[places.inner..places.inner + IP_BYTES[0]]),
            Family::Ipv6 => {
                // The pseudo header: source, length, protocol; and the UDP header, which holds the length again.
                let from = sum(&headers[places.inner + 8..places.inner + 24]);
                let length = u16::try_from(payload + UDP_BYTES)?;
                let udp = sum(&headers[places.port..places.payload]);
                add(add(from, udp), add(length, 17))
            }
        };
        let mut pattern_sums = [0; STRETCHES];
        for (stretch, sum_of) in pattern_sums.iter_mut().enumerate() {
            *sum_of = sum(&table[stretch * 8..stretch * 8 + payload - PAYLOAD_MIN]);
        }
        Ok(Self {
            headers,
            sum: base,
            payload,
            inner,
            pattern_sums,
        })
    }
}

/// The family of a stream's inner packets.
pub(super) fn family(stream: &Stream) -> Result<Family> {
    ensure!(!stream.to.is_empty(), "a stream without destination");
    let v4 = stream.from.is_ipv4();
    ensure!(
        stream.to.iter().all(|to| to.is_ipv4() == v4),
        "a stream between two address families"
    );
    match (v4, &stream.tunnel) {
        (true, _) => Ok(Family::Ipv4),
        (false, None | Some(Tunnel::Vxlan { .. })) => Ok(Family::Ipv6),
        (false, Some(Tunnel::Ipip { .. } | Tunnel::Udp { .. })) => {
            bail!("this tunnel carries no IPv6")
        }
    }
}

/// A frame of the stream's first flow, with zeroes as payload.
fn frame(stream: &Stream, payload: usize, link: bool) -> Result<Frame> {
    let mut headers = Vec::new();
    let inner_type = if stream.from.is_ipv4() { IPV4 } else { IPV6 };
    if link {
        headers.push(Header::Ethernet(Ethernet {
            destination: stream.to_mac,
            source: stream.from_mac,
            ethertype: if stream.tunnel.is_some() {
                IPV4
            } else {
                inner_type
            },
        }));
    }
    let outer_udp = |port| Udp {
        checksum: UdpChecksum::None,
        ..Udp::ports(port, port)
    };
    match stream.tunnel {
        None => {}
        Some(Tunnel::Ipip { from, to }) => headers.push(Header::Ipv4(Ipv4 {
            protocol: PROTOCOL_IPIP,
            ..Ipv4::udp(from, to)
        })),
        Some(Tunnel::Udp { from, to, port }) => headers.extend([
            Header::Ipv4(Ipv4::udp(from, to)),
            Header::Udp(outer_udp(port)),
        ]),
        Some(Tunnel::Vxlan {
            from,
            to,
            vni,
            port,
            inner_to_mac,
            inner_from_mac,
        }) => headers.extend([
            Header::Ipv4(Ipv4::udp(from, to)),
            Header::Udp(outer_udp(port)),
            Header::Vxlan(Vxlan::vni(vni)),
            Header::Ethernet(Ethernet {
                destination: inner_to_mac,
                source: inner_from_mac,
                ethertype: inner_type,
            }),
        ]),
    }
    match (stream.from, stream.to.first()) {
        (IpAddr::V4(from), Some(IpAddr::V4(to))) => headers.extend([
            Header::Ipv4(Ipv4::udp(from, *to)),
            Header::Udp(Udp {
                checksum: UdpChecksum::None,
                ..Udp::ports(stream.first_port, TEST_PORT)
            }),
        ]),
        (IpAddr::V6(from), Some(IpAddr::V6(to))) => headers.extend([
            Header::Ipv6(Ipv6::udp(from, *to)),
            Header::Udp(Udp::ports(stream.first_port, TEST_PORT)),
        ]),
        (IpAddr::V4(_) | IpAddr::V6(_), _) => bail!("a stream between two address families"),
    }
    Ok(Frame {
        headers,
        payload: vec![0; payload],
        truncate_to: None,
    })
}

/// A stream's flows: ports and destinations in turn, no pair twice as long as there are enough of them.
fn flows(stream: &Stream) -> Result<Vec<Flow>> {
    let v4 = stream.from.is_ipv4();
    let ports = usize::from(u16::MAX - stream.first_port) + 1;
    let rows = usize::try_from(stream.flows)?.max(1);
    ensure!(
        rows.div_ceil(ports) <= stream.to.len(),
        "{rows} flows need more than {ports} source ports from {}: give more destinations",
        stream.first_port
    );
    (0..flow_count(stream))
        .map(|number| {
            let row = number % rows;
            let port = stream.first_port + u16::try_from(row % ports)?;
            let mut to = [0; 16];
            // Each time that the ports begin anew, the destinations are one further.
            let round = row / ports;
            match stream.to[(number - round * ports + round) % stream.to.len()] {
                IpAddr::V4(address) => to[..4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => to = address.octets(),
            }
            let entropy = u32::try_from(number)?.wrapping_mul(0x9e37_79b1) >> 18;
            Ok(Flow {
                to,
                port,
                // The dynamic ports (RFC 6335, section 6), as RFC 7348, section 5 wants it.
                outer_port: 0xc000 | u16::try_from(entropy)?,
                sum: add(sum(&to), if v4 { 0 } else { port }),
            })
        })
        .collect()
}

/// The ones' complement sum of two words.
#[inline]
fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

/// The ones' complement sum of big-endian words; an odd byte counts as if a zero followed.
fn sum(bytes: &[u8]) -> u16 {
    !crate::frame::internet_checksum(bytes)
}

/// Which stretch of the table a packet's pattern is.
#[inline]
fn stretch(flow: u32, sequence: u32) -> usize {
    usize::try_from(flow.wrapping_add(sequence)).unwrap_or_default() % STRETCHES
}

/// A time as packets bear it.
#[inline]
fn time(now_ns: u64) -> u32 {
    u32::try_from(now_ns >> TIME_SHIFT & u64::from(u32::MAX)).unwrap_or_default()
}

/// Random bytes, the same everywhere (SplitMix64).
fn table() -> Box<[u8; TABLE_BYTES]> {
    let mut bytes = Box::new([0; TABLE_BYTES]);
    let mut state = 0_u64;
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ mixed >> 31).to_be_bytes());
    }
    bytes
}

/// What a payload says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// A test packet as it was made.
    Good {
        /// Its flow.
        flow: u32,
        /// Its number in the flow.
        sequence: u32,
        /// Nanoseconds on its way.
        age_ns: u64,
    },
    /// Pktgen's.
    Pktgen {
        /// Its number, from 0.
        sequence: u32,
        /// When it was made, CLOCK_REALTIME in microseconds.
        made_us: u64,
    },
    /// Not as it was made.
    Corrupt,
}

/// Reads payloads.
#[derive(Debug)]
pub(super) struct Reader {
    table: Box<[u8; TABLE_BYTES]>,
    /// The sum of the table's words before each, not folded.
    sums: Vec<u32>,
}

impl Reader {
    pub(super) fn new() -> Self {
        let table = table();
        let words = table.chunks_exact(2);
        let sums = words.scan(0_u32, |sum, word| {
            let before = *sum;
            *sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
            Some(before)
        });
        Self {
            sums: sums.collect(),
            table,
        }
    }

    /// The sum of so many bytes of the table from an even place on: what a pattern that is these bytes adds.
    #[inline]
    fn table_sum(&self, at: usize, length: usize) -> u16 {
        let end = at + length;
        let mut sum = self.sums[end / 2] - self.sums[at / 2];
        if !end.is_multiple_of(2) {
            sum += u32::from(self.table[end - 1]) << 8;
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap_or_default()
    }

    /// Reads a payload that came at this time (CLOCK_MONOTONIC).
    #[inline]
    pub(super) fn read(&self, payload: &[u8], at_ns: u64) -> Reading {
        let Some((head, pattern)) = payload.split_first_chunk::<PAYLOAD_MIN>() else {
            return Reading::Corrupt;
        };
        let word =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(0) == PKTGEN_MAGIC {
            return Reading::Pktgen {
                sequence: word(4).wrapping_sub(1),
                made_us: u64::from(word(8)) * 1_000_000 + u64::from(word(12)),
            };
        }
        let (flow, sequence) = (word(4), word(8));
        let at = stretch(flow, sequence) * 8;
        if word(0) >> 16 != u32::from(MAGIC)
            || self.table.get(at..at + pattern.len()) != Some(pattern)
            || add(sum(head), self.table_sum(at, pattern.len())) != 0xffff
        {
            return Reading::Corrupt;
        }
        // The packet's time is the latest before its arrival that has these bits.
        let age = time(at_ns).wrapping_sub(word(12));
        let age_ns = u64::from(age) << TIME_SHIFT;
        Reading::Good {
            flow,
            sequence,
            age_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::address::Mac;
    use crate::stack::wire_faults;

    const MAC: [Mac; 4] = [
        Mac([2, 0, 0, 0, 0, 1]),
        Mac([2, 0, 0, 0, 0, 2]),
        Mac([2, 0, 0, 0, 0, 3]),
        Mac([2, 0, 0, 0, 0, 4]),
    ];

    fn stream(v6: bool, tunnel: Option<Tunnel>, size: Size) -> Stream {
        let address = |last: u8| -> IpAddr {
            if v6 {
                Ipv6Addr::from([0xfd, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, last]).into()
            } else {
                Ipv4Addr::new(10, 244, 1, last).into()
            }
        };
        Stream {
            to_mac: MAC[0],
            from_mac: MAC[1],
            from: address(1),
            to: vec![address(2), address(3)],
            first_port: 20_000,
            flows: 3,
            size,
            tunnel,
        }
    }

    fn tunnels() -> [Option<Tunnel>; 4] {
        let (from, to) = (Ipv4Addr::new(10, 199, 0, 11), Ipv4Addr::new(10, 199, 0, 12));
        [
            None,
            Some(Tunnel::Ipip { from, to }),
            Some(Tunnel::Udp {
                from,
                to,
                port: 8285,
            }),
            Some(Tunnel::Vxlan {
                from,
                to,
                vni: 1,
                port: 8472,
                inner_to_mac: MAC[2],
                inner_from_mac: MAC[3],
            }),
        ]
    }

    #[test]
    fn every_frame_is_right_and_reads_back_as_written() {
        for v6 in [false, true] {
            for tunnel in tunnels() {
                for size in [
                    Size::Bytes(76),
                    Size::Bytes(1449),
                    Size::Bytes(1450),
                    Size::Imix,
                ] {
                    let stream = stream(v6, tunnel, size);
                    let Ok(shape) = Shape::of(&stream, true) else {
                        assert!(v6, "{tunnel:?} {size:?}");
                        continue;
                    };
                    let reader = Reader::new();
                    for form in 0..shape.forms.len() {
                        for flow in 0..shape.flows.len() {
                            let mut bytes = vec![0xaa; shape.frame_bytes(form)];
                            shape.write(form, flow, 0xffff_fffe, 1_000_000, &mut bytes);
                            check(&shape, form, flow, &bytes, &reader);
                        }
                    }
                }
            }
        }
    }

    fn check(shape: &Shape, form: usize, flow: usize, bytes: &[u8], reader: &Reader) {
        let faults: Vec<_> = wire_faults(bytes, 1500)
            .into_iter()
            .filter(|fault| !fault.contains("no UDP checksum"))
            .collect();
        assert_eq!(faults, Vec::<String>::new(), "{shape:?}");
        let mut frame = Frame::parse(bytes).expect("parses");
        let udp = frame.udps().last().expect("a UDP header").clone();
        assert_eq!(
            (udp.source, udp.destination),
            (shape.flows[flow].port, TEST_PORT)
        );
        assert_eq!(frame.payload.len(), shape.forms[form].payload);
        assert_eq!(bytes.len() - shape.places.inner, shape.forms[form].inner);
        let good = Reading::Good {
            flow: u32::try_from(flow).expect("small"),
            sequence: 0xffff_fffe,
            age_ns: 8_000,
        };
        assert_eq!(reader.read(&frame.payload, 1_008_000), good);
        for at in 0..frame.payload.len() {
            let mut damaged = frame.payload.clone();
            damaged[at] ^= 0x10;
            assert_eq!(
                reader.read(&damaged, 1_008_000),
                Reading::Corrupt,
                "byte {at}"
            );
        }
    }

    #[test]
    fn a_bare_packet_has_no_ethernet_header() {
        let shape = Shape::of(&stream(true, None, Size::Bytes(80)), false).expect("fits");
        assert_eq!((shape.frame_bytes_max(), shape.places.inner), (80, 0));
        let mut bytes = vec![0; 80];
        shape.write(0, 2, 7, 0, &mut bytes);
        let frame = Frame::parse_packet(&bytes).expect("parses");
        assert!(
            matches!(&frame.headers[1], Header::Udp(udp) if udp.checksum == UdpChecksum::Correct)
        );
    }

    #[test]
    fn sixty_four_bytes_are_enough_in_both_families() {
        for v6 in [false, true] {
            assert!(Shape::of(&stream(v6, None, Size::Bytes(64)), true).is_ok());
            assert!(Shape::of(&stream(v6, None, Size::Bytes(43)), true).is_err());
        }
    }

    #[test]
    fn imix_is_seven_to_four_to_one() {
        let (sizes, order) = sizes(Size::Imix);
        let count = |form| order.iter().filter(|of| **of == form).count();
        assert_eq!(
            (sizes, count(0), count(1), count(2)),
            (vec![64, 594, 1450], 7, 4, 1)
        );
    }

    #[test]
    fn no_two_flows_are_one() {
        let mut stream = stream(false, None, Size::Bytes(64));
        for (flows, destinations) in [(1, 1), (3, 2), (1, 2), (100_000, 3), (7, 2)] {
            stream.flows = flows;
            stream.to = (0..destinations)
                .map(|last| Ipv4Addr::new(10, 244, 1, last).into())
                .collect();
            let made = super::flows(&stream).expect("enough ports");
            let mut pairs: Vec<_> = made.iter().map(|flow| (flow.to, flow.port)).collect();
            assert_eq!(pairs.len(), flow_count(&stream));
            pairs.sort_unstable();
            pairs.dedup();
            assert_eq!(
                pairs.len(),
                made.len(),
                "{flows} flows, {destinations} destinations"
            );
        }
        stream.to.truncate(2);
        assert!(
            super::flows(&Stream {
                flows: 100_000,
                ..stream
            })
            .is_err()
        );
    }

    #[test]
    fn pktgen_is_understood() {
        let mut payload = [0; 18];
        payload[..4].copy_from_slice(&PKTGEN_MAGIC.to_be_bytes());
        payload[4..8].copy_from_slice(&1_u32.to_be_bytes());
        payload[8..12].copy_from_slice(&5_u32.to_be_bytes());
        payload[12..16].copy_from_slice(&250_000_u32.to_be_bytes());
        let reading = Reading::Pktgen {
            sequence: 0,
            made_us: 5_250_000,
        };
        assert_eq!(Reader::new().read(&payload, 0), reading);
    }
}
