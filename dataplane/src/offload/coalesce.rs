//! Joining: packets of one burst that continue each other become one super-packet.
//!
//! Strict, as the kernel's own (net/ipv4/tcp_offload.c `tcp_gro_receive`, net/ipv4/udp_offload.c
//! `udp_gro_receive_segment`, include/net/gro.h `inet_gro_flush`), and stricter where that costs little:
//!
//! | packets are joined if | |
//! |---|---|
//! | TCP or UDP, with data, whole, no IP options or extension headers | and their lengths agree |
//! | addresses, ports, TTL, type of service with ECN, flow label, flags of the IP header | are the same |
//! | identification (IPv4) | counts up; or, with "don't fragment", stays the same |
//! | TCP: acknowledgment, window, urgent pointer, options, flags but PSH and FIN | are the same |
//! | TCP: flags | none of SYN, RST, URG, CWR; PSH or FIN only on the last |
//! | TCP: sequence number | continues |
//! | data | the first's length; the last may have less |
//! | all | [`MEMBERS_MAX`] packets and 65,535 bytes at most |
//! | checksums | are there and right; they are looked at last, where all else fits |
//!
//! So what is joined comes out of the kernel's segmentation again as it was, byte for byte, but for an identification
//! that stays the same, which means nothing (RFC 6864 section 4.1) and comes out counted. A packet that fits nowhere is
//! handed over as it came. Nothing waits for the next burst, and the packets of one flow keep their order: what cannot
//! continue its flow's super-packet ends it.

use super::sum::sum;
use super::{Joined, Offload, TCP_CHECKSUM, TCP_LEN, UDP_CHECKSUM, flags, pseudo_sum};
use crate::wire::{
    self, DONT_FRAGMENT, FRAGMENT_MASK, IPV4_LEN, IPV6_LEN, PROTOCOL_ICMPV6, PROTOCOL_TCP,
    PROTOCOL_UDP, UDP_LEN,
};

/// Longest super-packet: the IPv4 header's length field.
const LONGEST: usize = 65_535;
/// Most packets of a super-packet: of a usual path's size, more would be longer than 64 KiB. UDP's receivers take no more
/// (net/ipv4/udp_offload.c `UDP_GRO_CNT_MAX`).
pub const MEMBERS_MAX: usize = 64;
/// Longest headers of a packet that is joined: IPv6, and TCP with all its options.
pub const HEADERS_MAX: usize = IPV6_LEN + 60;
/// Flows that are told apart in one burst. Those beyond are handed over packet by packet.
const OPEN_MAX: usize = 16;

/// What of a packet says which flow it belongs to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Flow {
    v6: bool,
    /// The addresses, mixed: where this differs, they do.
    addresses: u32,
    /// Nothing where it is behind extension headers.
    protocol: Option<u8>,
    /// Nothing where there are none, or where they are out of sight: in fragments, behind options.
    ports: Option<u32>,
}

impl Flow {
    /// A number that different flows mostly do not share.
    #[inline]
    fn key(&self) -> u64 {
        let kind = u32::from(self.v6) << 8 | u32::from(self.protocol.unwrap_or(0));
        u64::from(self.addresses ^ kind) << 32 | u64::from(self.ports.unwrap_or(0))
    }

    /// Whether a packet may belong to this flow, of which all is known, as far as its own flow is known.
    #[inline]
    fn may_have(&self, packet: &Self) -> bool {
        (self.v6, self.addresses) == (packet.v6, packet.addresses)
            && (packet.protocol.is_none() || packet.protocol == self.protocol)
            && (packet.ports.is_none() || packet.ports == self.ports)
    }
}

/// What of a packet that may be joined says whether it continues another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Shape {
    v6: bool,
    udp: bool,
    /// Bytes of all headers.
    headers: usize,
    /// Bytes of data.
    data: usize,
    /// Of TCP.
    sequence: u32,
    /// Of TCP.
    flags: u8,
    /// Of IPv4.
    identification: u16,
}

impl Shape {
    const fn ip_len(&self) -> usize {
        if self.v6 { IPV6_LEN } else { IPV4_LEN }
    }

    const fn protocol(&self) -> u8 {
        if self.udp { PROTOCOL_UDP } else { PROTOCOL_TCP }
    }

    /// Whether nothing may follow.
    const fn ends(&self) -> bool {
        self.flags & (flags::PSH | flags::FIN) != 0
    }
}

/// Reads what flow a packet belongs to, and its shape if it may be joined. Checksums of the data are not looked at.
#[inline]
fn look(packet: &[u8]) -> Option<(Flow, Option<Shape>)> {
    match packet.first()? >> 4 {
        4 => look4(packet),
        6 => look6(packet),
        _ => None,
    }
}

#[inline]
fn look4(packet: &[u8]) -> Option<(Flow, Option<Shape>)> {
    let ip = packet.first_chunk::<IPV4_LEN>()?;
    let (field, protocol) = (wire::be16(ip, 6), ip[9]);
    let plain = ip[0] == 0x45 && field & FRAGMENT_MASK == 0;
    let flow = Flow {
        v6: false,
        addresses: wire::be32(ip, 12).rotate_left(7) ^ wire::be32(ip, 16),
        protocol: Some(protocol),
        ports: ports(packet, IPV4_LEN, protocol).filter(|_| plain),
    };
    let good = plain
        && field & !DONT_FRAGMENT == 0
        && usize::from(wire::be16(ip, 2)) == packet.len()
        && wire::ipv4_checksum_is_right(ip);
    let shape = shape(packet, IPV4_LEN, protocol).filter(|_| good);
    let shape = shape.map(|shape| Shape {
        identification: wire::be16(ip, 4),
        ..shape
    });
    Some((flow, shape))
}

#[inline]
fn look6(packet: &[u8]) -> Option<(Flow, Option<Shape>)> {
    let ip = packet.first_chunk::<IPV6_LEN>()?;
    let protocol = ip[6];
    let in_sight = matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_ICMPV6);
    let mix = wire::ne128(ip, 8).rotate_left(7) ^ wire::ne128(ip, 24);
    #[expect(clippy::cast_possible_truncation, reason = "a mixture of all bits")]
    let addresses = (mix ^ mix >> 32 ^ mix >> 64 ^ mix >> 96) as u32;
    let flow = Flow {
        v6: true,
        addresses,
        protocol: in_sight.then_some(protocol),
        ports: ports(packet, IPV6_LEN, protocol),
    };
    let good = IPV6_LEN + usize::from(wire::be16(ip, 4)) == packet.len();
    let shape = shape(packet, IPV6_LEN, protocol).filter(|_| good);
    let shape = shape.map(|shape| Shape { v6: true, ..shape });
    Some((flow, shape))
}

#[inline]
fn ports(packet: &[u8], ip: usize, protocol: u8) -> Option<u32> {
    let ports = packet.get(ip..ip + 4)?;
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP).then(|| wire::be32(ports, 0))
}

/// The shape of a packet whose IP header is fine, if it is TCP or UDP and may be joined.
#[inline]
fn shape(packet: &[u8], ip: usize, protocol: u8) -> Option<Shape> {
    match protocol {
        PROTOCOL_TCP => {
            let tcp = packet.get(ip..)?.first_chunk::<TCP_LEN>()?;
            let headers = ip + usize::from(tcp[12] >> 4) * 4;
            let data = packet.len().checked_sub(headers)?;
            // The kernel ends a flow's super-packet at all others, too. CWR is a first packet's alone, but with accurate
            // ECN (RFC 9768) it is a bit of a number.
            let joinable = flags::ACK | flags::PSH | flags::FIN | flags::ECE;
            let good = headers >= ip + TCP_LEN && data > 0 && tcp[13] & !joinable == 0;
            good.then(|| Shape {
                headers,
                data,
                sequence: wire::be32(tcp, 4),
                flags: tcp[13],
                ..Shape::default()
            })
        }
        PROTOCOL_UDP => {
            let udp = packet.get(ip..)?.first_chunk::<UDP_LEN>()?;
            let data = packet.len() - ip - UDP_LEN;
            let good = usize::from(wire::be16(udp, 4)) == packet.len() - ip
                && data > 0
                && wire::be16(udp, UDP_CHECKSUM) != 0;
            good.then(|| Shape {
                udp: true,
                headers: ip + UDP_LEN,
                data,
                ..Shape::default()
            })
        }
        _ => None,
    }
}

/// Whether the checksum over the data is right.
fn is_right(packet: &[u8], shape: &Shape) -> bool {
    let segment = &packet[shape.ip_len()..];
    let Ok(len) = u32::try_from(segment.len()) else {
        return false;
    };
    let sum = u32::from(sum(segment)) + pseudo_sum(packet, shape.protocol()) + len;
    wire::fold(sum) == 0xffff
}

/// Everything but what follows from the place in the super-packet is the same; ports and lengths of headers are known
/// to be.
fn is_alike(first: &[u8], packet: &[u8], shape: &Shape) -> bool {
    let ip = shape.ip_len();
    let (a, b) = (&first[..shape.headers], &packet[..shape.headers]);
    let ip_alike = match shape.v6 {
        true => a[..4] == b[..4] && a[7] == b[7],
        // Type of service; flags and time to live.
        false => a[1] == b[1] && a[6..9] == b[6..9],
    };
    let (a, b) = (&a[ip..], &b[ip..]);
    // Acknowledgment and data offset; window; urgent pointer and options.
    let tcp_alike = || a[8..13] == b[8..13] && a[14..16] == b[14..16] && a[18..] == b[18..];
    ip_alike && (shape.udp || tcp_alike())
}

fn same_addresses(first: &[u8], packet: &[u8], v6: bool) -> bool {
    let (from, to) = if v6 { (8, IPV6_LEN) } else { (12, IPV4_LEN) };
    first.get(from..to) == packet.get(from..to)
}

/// A super-packet, or a packet by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Number of its first packet in the burst.
    pub first: usize,
    /// Number of the last.
    last: usize,
    /// How many packets.
    pub count: usize,
    /// Length of all headers and all data.
    pub length: usize,
    /// Of the first.
    shape: Shape,
    /// Flags that the last has added.
    flags: u8,
    /// The checksum of the first is right.
    verified: bool,
    /// The identification stays the same.
    fixed: bool,
}

/// Groups that may go on, at most one of a flow. All is known of their flows.
#[derive(Debug, Default)]
struct Open {
    count: usize,
    /// [`Flow::key`] of each, for a look at all of them at once.
    keys: [u64; OPEN_MAX],
    flows: [Flow; OPEN_MAX],
    groups: [usize; OPEN_MAX],
}

impl Open {
    #[inline]
    fn push(&mut self, flow: Flow, group: usize) {
        if self.count < OPEN_MAX {
            self.keys[self.count] = flow.key();
            self.flows[self.count] = flow;
            self.groups[self.count] = group;
            self.count += 1;
        }
    }

    fn remove(&mut self, at: usize) {
        self.count -= 1;
        self.keys[at] = self.keys[self.count];
        self.flows[at] = self.flows[self.count];
        self.groups[at] = self.groups[self.count];
    }

    /// The first group from `at` on that a packet may belong to, as far as its flow says.
    #[inline]
    fn find(&self, flow: &Flow, at: usize) -> Option<usize> {
        if flow.protocol.is_some() && flow.ports.is_some() {
            let key = flow.key();
            let found = self.keys[at..self.count]
                .iter()
                .position(|other| *other == key);
            return found.map(|found| at + found);
        }
        (at..self.count).find(|at| self.flows[*at].may_have(flow))
    }
}

/// What becomes of a burst. Its memory is made once.
#[derive(Debug)]
pub struct Plan {
    udp: bool,
    groups: Vec<Group>,
    open: Open,
    /// For each packet the one that continues it.
    next: Vec<Option<u16>>,
}

impl Plan {
    /// A plan for bursts of up to `burst` packets; of UDP, too, if the kernel takes that.
    pub fn with_capacity(burst: usize, udp: bool) -> Self {
        Self {
            udp,
            groups: Vec::with_capacity(burst),
            open: Open::default(),
            next: Vec::with_capacity(burst),
        }
    }

    /// Makes the plan of a burst: `packet` gives the bytes of each of `count` packets.
    #[inline]
    pub fn make<'p>(&mut self, count: usize, packet: impl Fn(usize) -> &'p [u8]) {
        self.groups.clear();
        self.open.count = 0;
        self.next.clear();
        self.next.resize(count, None);
        for index in 0..count {
            let bytes = packet(index);
            let looked = look(bytes);
            let shape = looked
                .and_then(|(_, shape)| shape)
                .filter(|shape| self.udp || !shape.udp);
            if let Some((flow, _)) = looked
                && self.continues(index, bytes, &flow, shape.as_ref(), &packet)
            {
                continue;
            }
            if let (Some((flow, _)), Some(shape)) = (looked, shape)
                && !shape.ends()
            {
                self.open.push(flow, self.groups.len());
            }
            self.groups.push(Group::of(index, bytes.len(), shape));
        }
    }

    /// Whether a packet continues an open group, and is taken in. If it only belongs to its flow, or may, it ends the group:
    /// what comes later of the flow must not overtake it.
    #[inline]
    fn continues<'p>(
        &mut self,
        index: usize,
        bytes: &[u8],
        flow: &Flow,
        shape: Option<&Shape>,
        packet: impl Fn(usize) -> &'p [u8],
    ) -> bool {
        let mut at = 0;
        while let Some(found) = self.open.find(flow, at) {
            let group = &mut self.groups[self.open.groups[found]];
            let first = packet(group.first);
            if !self.open.flows[found].may_have(flow) || !same_addresses(first, bytes, flow.v6) {
                at = found + 1;
                continue;
            }
            let follows = shape.filter(|shape| group.may_take(first, bytes, shape));
            if let (Some(shape), Ok(number)) = (follows, u16::try_from(index)) {
                self.next[group.last] = Some(number);
                if !group.take(index, shape) {
                    self.open.remove(found);
                }
                return true;
            }
            self.open.remove(found);
            at = found;
        }
        false
    }

    /// What is handed over, in order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The packets of a group.
    pub fn members(&self, group: &Group) -> impl Iterator<Item = usize> {
        let mut next = Some(group.first);
        core::iter::from_fn(move || {
            let index = next?;
            next = self.next.get(index).copied().flatten().map(usize::from);
            Some(index)
        })
    }
}

impl Group {
    fn of(first: usize, length: usize, shape: Option<Shape>) -> Self {
        Self {
            first,
            last: first,
            count: 1,
            length,
            shape: shape.unwrap_or_default(),
            flags: 0,
            verified: false,
            fixed: false,
        }
    }

    /// Whether a packet of the same flow continues this group.
    fn may_take(&mut self, first: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let joined = self.length - self.shape.headers;
        let follows = shape.headers == self.shape.headers
            && shape.data <= self.shape.data
            && self.length + shape.data <= LONGEST
            && self.count < MEMBERS_MAX
            && (shape.udp || self.tcp_follows(shape, joined))
            && (shape.v6 || self.identification_follows(packet, shape))
            && is_alike(first, packet, shape);
        if follows && !self.verified {
            self.verified = is_right(first, &self.shape);
        }
        follows && self.verified && is_right(packet, shape)
    }

    fn tcp_follows(&self, shape: &Shape, joined: usize) -> bool {
        let flags_differ = (shape.flags ^ self.shape.flags) & !(flags::PSH | flags::FIN);
        let advanced = u32::try_from(joined).unwrap_or(u32::MAX);
        flags_differ == 0 && shape.sequence == self.shape.sequence.wrapping_add(advanced)
    }

    /// It counts the packets, as it will when they are cut again; or, as the second has shown, it does not.
    fn identification_follows(&self, packet: &[u8], shape: &Shape) -> bool {
        let step = shape.identification.wrapping_sub(self.shape.identification);
        let stays = step == 0 && wire::be16(packet, 6) & DONT_FRAGMENT != 0;
        let counts = usize::from(step) == self.count;
        match self.count {
            1 => stays || counts,
            _ if self.fixed => stays,
            _ => counts,
        }
    }

    /// Takes a packet in; whether another may follow.
    fn take(&mut self, index: usize, shape: &Shape) -> bool {
        if self.count == 1 {
            self.fixed = shape.identification == self.shape.identification;
        }
        self.last = index;
        self.count += 1;
        self.length += shape.data;
        self.flags |= shape.flags & (flags::PSH | flags::FIN);
        !shape.ends() && shape.data == self.shape.data
    }

    /// Bytes of headers, which only the first packet keeps.
    pub fn headers(&self) -> usize {
        self.shape.headers
    }

    /// Changes the first packet's headers to those of the whole, and says what the kernel has to know.
    pub fn head(&self, first: &mut [u8]) -> Offload {
        if self.count == 1 {
            return Offload::default();
        }
        let (ip, protocol) = (self.shape.ip_len(), self.shape.protocol());
        let small = |number: usize| u16::try_from(number).unwrap_or(u16::MAX);
        let transport_len = small(self.length - ip);
        if self.shape.v6 {
            first[4..6].copy_from_slice(&transport_len.to_be_bytes());
        } else {
            let (old, length) = (wire::be16(first, 2), small(self.length));
            first[2..4].copy_from_slice(&length.to_be_bytes());
            let checksum = wire::checksum_after(wire::be16(first, 10), old, length);
            first[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        let pseudo = wire::fold(pseudo_sum(first, protocol) + u32::from(transport_len));
        let transport = &mut first[ip..];
        let checksum = match self.shape.udp {
            true => {
                transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
                UDP_CHECKSUM
            }
            false => {
                transport[13] |= self.flags;
                TCP_CHECKSUM
            }
        };
        transport[checksum..checksum + 2].copy_from_slice(&pseudo.to_be_bytes());
        Offload {
            needs_checksum: true,
            joined: Some(match (self.shape.udp, self.shape.v6) {
                (true, _) => Joined::Udp,
                (false, false) => Joined::Tcp4,
                (false, true) => Joined::Tcp6,
            }),
            reduced: false,
            headers: small(self.shape.headers),
            size: small(self.shape.data),
            checksum_start: small(ip),
            checksum_offset: small(checksum),
        }
    }
}
