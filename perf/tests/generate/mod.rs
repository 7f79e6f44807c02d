//! Packets as pods and their kernels may send them, in all variety, from a seed.
//!
//! Everything made here may pass: no redirects, no neighbour discovery, no fragment that hides or overwrites a
//! header. What is refused is the business of the attacks.

use core::net::IpAddr;

use ripstop_perf::{
    Family, Frame, Header, Ipv4, Ipv6, Udp, UdpChecksum, address, icmp, icmp6, transport_checksum,
};

/// A generator of numbers (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { state: seed }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// A number below the end.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).unwrap_or(1);
        usize::try_from(self.next() % end).unwrap_or_default()
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(crate) fn short(&mut self) -> u16 {
        let [low, high, ..] = self.next().to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    fn choose<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len())]
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
/// GRE, ESP, OSPF, SCTP, UDP-Lite, one for experiments.
const OTHERS: [u8; 6] = [47, 50, 89, 132, 136, 253];

/// A packet of a pod of one node to one of another, from its IP header on, at most `mtu` bytes.
pub(crate) fn packet(random: &mut Random, family: Family, from: u8, to: u8, mtu: u16) -> Vec<u8> {
    match family {
        Family::Ipv4 => packet4(random, from, to, mtu),
        Family::Ipv6 => packet6(random, from, to, mtu),
    }
}

/// Bytes that a header may still have behind it: often few, now and then all.
fn length(random: &mut Random, left: usize) -> usize {
    let limit = random.choose(&[64, 256, left, left + 1]);
    match limit {
        full if full > left => left,
        limit => random.below(limit.min(left) + 1),
    }
}

fn packet4(random: &mut Random, from: u8, to: u8, mtu: u16) -> Vec<u8> {
    let mut source = address::subnet(from).octets();
    let mut destination = address::subnet(to).octets();
    (source[3], destination[3]) = (random.byte(), random.byte());
    let mut ip = Ipv4 {
        tos: random.byte(),
        identification: random.short(),
        dont_fragment: random.once_in(2),
        ttl: random.byte().max(1),
        ..Ipv4::udp(source.into(), destination.into())
    };
    if random.once_in(6) {
        // No operation, many times; and an end.
        ip.options = vec![1; 4 * (1 + random.below(10))];
        if random.once_in(2) {
            ip.options.pop();
            ip.options.push(0);
        }
    }
    let left = usize::from(mtu) - 20 - ip.options.len();
    ip.protocol = match random.below(8) {
        0..=2 => UDP,
        3..=5 => TCP,
        6 => ICMP,
        _ => random.choose(&OTHERS),
    };
    if random.once_in(5) {
        let payload = fragment4(random, &mut ip, left);
        return ip.encode(&payload);
    }
    match ip.protocol {
        UDP => udp(random, Header::Ipv4(ip), left),
        TCP => {
            let payload = tcp(random, [source.into(), destination.into()], left);
            ip.encode(&payload)
        }
        ICMP => {
            // Echo, its answer, unreachable, time exceeded, parameter problem, timestamp.
            let kind = random.choose(&[0, 3, 8, 11, 12, 13]);
            let count = 4 + length(random, left - 8);
            let body = random.bytes(count);
            ip.encode(&icmp(kind, 0, &body))
        }
        _ => {
            let count = length(random, left);
            let payload = random.bytes(count);
            ip.encode(&payload)
        }
    }
}

/// Makes the packet a first, middle or last fragment; a first one holds all of a transport header.
fn fragment4(random: &mut Random, ip: &mut Ipv4, left: usize) -> Vec<u8> {
    ip.dont_fragment = false;
    (ip.more_fragments, ip.fragment_offset) = match random.below(3) {
        0 => (true, 0),
        1 => (true, 3 + random.short() % 7000),
        _ => (false, 3 + random.short() % 7000),
    };
    let mut count = 24 + length(random, left - 24);
    if ip.more_fragments {
        count -= count % 8;
    }
    let mut payload = random.bytes(count);
    if ip.protocol == ICMP {
        payload[0] = 8;
    }
    payload
}

fn udp(random: &mut Random, ip: Header, left: usize) -> Vec<u8> {
    let mut udp = Udp::ports(random.short(), random.short());
    let wrong = random.short().max(1);
    udp.checksum = match random.below(8) {
        0 => UdpChecksum::None,
        // The pod's to find.
        1 => UdpChecksum::Wrong(wrong),
        _ => UdpChecksum::Correct,
    };
    let count = length(random, left - 8);
    Frame {
        headers: vec![ip, Header::Udp(udp)],
        payload: random.bytes(count),
        truncate_to: None,
    }
    .encode()
}

/// A TCP header of any flags and options; a wrong checksum is the pod's to find.
fn tcp(random: &mut Random, ends: [IpAddr; 2], left: usize) -> Vec<u8> {
    let options = 4 * random.below(11);
    let mut segment = random.bytes(20 + options);
    segment[12] = u8::try_from((20 + options) / 4 * 16).unwrap_or(0x50);
    let count = length(random, left - segment.len());
    segment.extend(random.bytes(count));
    if !random.once_in(8) {
        segment[16..18].fill(0);
        let checksum = transport_checksum(ends, TCP, &segment);
        segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    }
    segment
}

fn packet6(random: &mut Random, from: u8, to: u8, mtu: u16) -> Vec<u8> {
    let mut source = address::subnet6(from).octets();
    let mut destination = address::subnet6(to).octets();
    source[8..].copy_from_slice(&random.next().to_be_bytes());
    destination[8..].copy_from_slice(&random.next().to_be_bytes());
    let label = if random.once_in(4) {
        0
    } else {
        random.next() & 0xf_ffff
    };
    let mut ip = Ipv6 {
        traffic_class: random.byte(),
        flow_label: u32::try_from(label).unwrap_or_default(),
        hop_limit: random.byte().max(1),
        ..Ipv6::udp(source.into(), destination.into())
    };
    let mut left = usize::from(mtu) - 40;
    let protocol = match random.below(8) {
        0..=2 => UDP,
        3..=5 => TCP,
        6 => ICMP6,
        _ => random.choose(&OTHERS),
    };
    let mut chain = Vec::new();
    if random.once_in(4) {
        chain = extensions(random);
    }
    let is_fragment = random.once_in(6);
    if is_fragment {
        chain.push((44, vec![0; 7]));
    }
    // Each header names the next one.
    let mut extensions = Vec::new();
    for (position, (_, body)) in chain.iter().enumerate() {
        let next = chain.get(position + 1).map_or(protocol, |(kind, _)| *kind);
        extensions.push(next);
        extensions.extend(body);
    }
    ip.next_header = chain.first().map_or(protocol, |(kind, _)| *kind);
    left -= extensions.len();
    if is_fragment {
        // Offset, more fragments, identification.
        let (offset, more) = match random.below(3) {
            0 => (0, 1),
            1 => (3 + random.short() % 7000, 1),
            _ => (3 + random.short() % 7000, 0),
        };
        let at = extensions.len() - 6;
        extensions[at..at + 2].copy_from_slice(&(offset << 3 | more).to_be_bytes());
        let identification = random.bytes(4);
        extensions[at + 2..].copy_from_slice(&identification);
        let mut count = 24 + length(random, left - 24);
        if more == 1 {
            count -= count % 8;
        }
        let mut payload = random.bytes(count);
        if protocol == ICMP6 {
            payload[0] = 128;
        }
        return ip.encode(&[extensions, payload].concat());
    }
    let payload = match protocol {
        UDP => {
            let whole = udp(random, Header::Ipv6(ip.clone()), left);
            whole[40..].to_vec()
        }
        TCP => tcp(random, [source.into(), destination.into()], left),
        ICMP6 => {
            // Unreachable, too big, time exceeded, parameter problem, echo, its answer, listener report.
            let kind = random.choose(&[1, 2, 3, 4, 128, 129, 143]);
            let count = 4 + length(random, left - 8);
            let body = random.bytes(count);
            icmp6(ip.source, ip.destination, kind, 0, &body)
        }
        _ => {
            let count = length(random, left);
            random.bytes(count)
        }
    };
    ip.encode(&[extensions, payload].concat())
}

/// Extension headers in an order that RFC 8200 recommends, without the first byte of each.
fn extensions(random: &mut Random) -> Vec<(u8, Vec<u8>)> {
    /// Hop-by-hop options, and destination options.
    const KINDS: [u8; 2] = [0, 60];
    let mut chain = Vec::new();
    for kind in KINDS {
        if random.once_in(2) {
            let units = random.below(3);
            let mut body = vec![u8::try_from(units).unwrap_or_default()];
            // Padding of the length that is left: option 1, and so many bytes.
            let padding = 8 * (units + 1) - 4;
            body.extend([1, u8::try_from(padding).unwrap_or_default()]);
            body.resize(8 * (units + 1) - 1, 0);
            chain.push((kind, body));
        }
    }
    chain
}
