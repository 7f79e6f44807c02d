//! Super-packets and what they are cut into, written as fields. Shared by tests, each of which uses a part.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses a part of it"
)]

use core::net::{Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use ripstop_dataplane::offload::coalesce::Plan;
use ripstop_dataplane::offload::segment::{self, Cut, Task};
use ripstop_dataplane::offload::{Joined, Offload};

/// Between whom all of it is.
pub(crate) const FROM4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
pub(crate) const TO4: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 3);
pub(crate) const FROM6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2);
pub(crate) const TO6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 3);

/// One connection's direction.
#[derive(Debug, Clone)]
pub(crate) struct Flow {
    pub(crate) v6: bool,
    pub(crate) udp: bool,
    pub(crate) port: u16,
    pub(crate) options: bool,
    pub(crate) sequence: u32,
    pub(crate) identification: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) flags: u8,
    pub(crate) tos: u8,
}

pub(crate) const FLOW: Flow = Flow {
    v6: false,
    udp: false,
    port: 5000,
    options: true,
    sequence: 0xffff_f000,
    identification: 0xfffe,
    dont_fragment: true,
    flags: 0x10,
    tos: 0,
};

pub(crate) fn data(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 7 + at / 251 + usize::from(seed)) % 256).unwrap();
    (0..len).map(byte).collect()
}

/// A packet with right checksums, of any length up to 64 KiB.
pub(crate) fn packet(flow: &Flow, data: &[u8]) -> Vec<u8> {
    let options: &[u8] = match flow.options {
        true => &[1, 1, 8, 10, 0, 1, 2, 3, 9, 9, 9, 9],
        false => &[],
    };
    let (destination, window) = (80, 501);
    let builder = match flow.v6 {
        true => PacketBuilder::ipv6(FROM6.octets(), TO6.octets(), 63),
        false => PacketBuilder::ipv4(FROM4.octets(), TO4.octets(), 63),
    };
    let mut bytes = Vec::new();
    if flow.udp {
        let udp = builder.udp(flow.port, destination);
        udp.write(&mut bytes, data).unwrap();
        return with_ip(flow, bytes);
    }
    let bit = |mask: u8| flow.flags & mask != 0;
    let mut tcp = builder
        .tcp(flow.port, destination, flow.sequence, window)
        .ack(77)
        .options_raw(options)
        .unwrap();
    if bit(0x08) {
        tcp = tcp.psh();
    }
    if bit(0x01) {
        tcp = tcp.fin();
    }
    if bit(0x40) {
        tcp = tcp.ece();
    }
    if bit(0x80) {
        tcp = tcp.cwr();
    }
    tcp.write(&mut bytes, data).unwrap();
    with_ip(flow, bytes)
}

/// Sets what the builder leaves open.
pub(crate) fn with_ip(flow: &Flow, mut bytes: Vec<u8>) -> Vec<u8> {
    if flow.v6 {
        bytes[1] = bytes[1] & 0x0f | flow.tos << 4;
    } else {
        bytes[1] = flow.tos;
        bytes[4..6].copy_from_slice(&flow.identification.to_be_bytes());
        bytes[6] = if flow.dont_fragment { 0x40 } else { 0 };
        let mut header = etherparse::Ipv4Header::from_slice(&bytes).unwrap().0;
        header.header_checksum = header.calc_header_checksum();
        bytes[..20].copy_from_slice(&header.to_bytes());
    }
    bytes
}

/// What the kernel says of a super-packet of this flow, whose checksum it makes the pseudo header's sum.
pub(crate) fn offloaded(flow: &Flow, size: u16, packet: &mut [u8]) -> Offload {
    let start = if flow.v6 { 40 } else { 20 };
    let offset = if flow.udp { 6 } else { 16 };
    let addresses = if flow.v6 { 8..40 } else { 12..20 };
    let mut sum = if flow.udp { 17 } else { 6 } + u32::try_from(packet.len() - start).unwrap();
    for word in packet[addresses].chunks(2) {
        sum += u32::from(u16::from_be_bytes(word.try_into().unwrap()));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = u16::try_from(sum).unwrap();
    packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    Offload {
        needs_checksum: true,
        joined: Some(match (flow.udp, flow.v6) {
            (true, _) => Joined::Udp,
            (false, false) => Joined::Tcp4,
            (false, true) => Joined::Tcp6,
        }),
        reduced: !flow.udp && flow.flags & 0x80 != 0,
        headers: 0,
        size,
        checksum_start: u16::try_from(start).unwrap(),
        checksum_offset: u16::try_from(offset).unwrap(),
    }
}

/// The packets of so much data of a flow.
pub(crate) fn segments(flow: &Flow, data: &[u8], size: u16) -> Vec<Vec<u8>> {
    let mut whole = packet(flow, data);
    let offload = offloaded(flow, size, &mut whole);
    cut(&whole, &offload)
}

pub(crate) fn cut(packet: &[u8], offload: &Offload) -> Vec<Vec<u8>> {
    let Some(Task::Cut(cut)) = segment::task(packet, packet.len(), offload) else {
        panic!("{offload:?} does not fit");
    };
    (0..cut.count())
        .map(|index| written(&cut, packet, index))
        .collect()
}

pub(crate) fn written(cut: &Cut, packet: &[u8], index: usize) -> Vec<u8> {
    let mut out = vec![0xaa; cut.longest()];
    assert_eq!(cut.write(packet, index, &mut out[..20]), None, "too short");
    let len = cut.write(packet, index, &mut out).unwrap();
    out.truncate(len);
    out
}

/// A change to a packet, after which its checksums are made right again.
pub(crate) type Change = fn(&mut Vec<u8>);

pub(crate) fn changed(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut packet);
    let v6 = packet[0] >> 4 == 6;
    let (ip, protocol) = if v6 { (40, packet[6]) } else { (20, packet[9]) };
    if !v6 {
        let mut header = etherparse::Ipv4Header::from_slice(&packet).unwrap().0;
        header.header_checksum = header.calc_header_checksum();
        packet[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
    }
    let flow = Flow {
        v6,
        udp: protocol == 17,
        ..FLOW
    };
    let offload = offloaded(&flow, 1, &mut packet);
    let at = usize::from(offload.checksum_start + offload.checksum_offset);
    segment::complete_checksum(&mut packet, ip, at);
    packet
}

pub(crate) fn shorten(packet: &mut Vec<u8>, bytes: usize) {
    packet.truncate(packet.len() - bytes);
    set_lengths(packet);
}

pub(crate) fn lengthen(packet: &mut Vec<u8>) {
    packet.push(7);
    set_lengths(packet);
}

/// Makes the lengths of IP and UDP headers that of the packet.
pub(crate) fn set_lengths(packet: &mut [u8]) {
    let len = u16::try_from(packet.len()).unwrap();
    let (ip, field, protocol) = match packet[0] >> 4 {
        6 => (40, 4, packet[6]),
        _ => (20, 2, packet[9]),
    };
    let said = if field == 4 { len - 40 } else { len };
    packet[field..field + 2].copy_from_slice(&said.to_be_bytes());
    if protocol == 17 {
        let said = len - u16::try_from(ip).unwrap();
        packet[ip + 4..ip + 6].copy_from_slice(&said.to_be_bytes());
    }
}

/// What the plan makes of a burst: each group's numbers, and the super-packet with what is said of it.
pub(crate) fn joined(burst: &[Vec<u8>]) -> Vec<(Vec<usize>, Vec<u8>, Offload)> {
    let mut plan = Plan::with_capacity(burst.len(), true);
    plan.make(burst.len(), |index| &burst[index]);
    let whole = |group: &_| {
        let members: Vec<usize> = plan.members(group).collect();
        let mut bytes = burst[group.first].clone();
        let offload = group.head(&mut bytes);
        for &member in &members[1..] {
            bytes.extend_from_slice(&burst[member][group.headers()..]);
        }
        assert_eq!((members.len(), bytes.len()), (group.count, group.length));
        (members, bytes, offload)
    };
    plan.groups().iter().map(whole).collect()
}
