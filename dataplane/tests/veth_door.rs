//! The veth host door in this kernel: what arrives in its queues, what does not, and how it goes.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread.

#![expect(unsafe_code, reason = "system calls by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::net::IpAddr;
use core::time::Duration;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Instant;

use af_xdp::{Census, ModeInUse, SocketOptions, Umem, UmemOptions};
use ripstop_dataplane::door::RIP0;
use ripstop_dataplane::port::{Burst, Port};
use ripstop_dataplane::veth::{self, VethDoor, VethQueue};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
mod networks;

use common::ip;
use networks::{behind, forward, send};

/// How long what must come may take.
const PATIENCE: Duration = Duration::from_secs(20);
const POD: &str = "10.244.2.7";
const POD6: &str = "fd00::7";

/// A host door with a UMEM for each queue, in a namespace with addresses and routes to two networks behind it.
struct Rig {
    queues: Vec<(VethQueue, Umem)>,
    door: VethDoor,
}

impl Rig {
    fn new(queues: usize, frame_size: u32) -> Self {
        let mut door = behind(|| VethDoor::open(queues, false).unwrap());
        let options = veth::socket_options(&SocketOptions::default(), ModeInUse::Copy);
        let queues = (0..queues)
            .map(|queue| {
                let mut umem = Umem::new(&UmemOptions {
                    frames: 6144,
                    frame_size,
                    ..UmemOptions::default()
                })
                .unwrap();
                let (port, _handle) = door.queue(queue, &mut umem, &options, 64, None).unwrap();
                (port, umem)
            })
            .collect();
        Self { queues, door }
    }

    /// What waits in the queues: packets, by queue.
    fn received(&mut self) -> Vec<Vec<Vec<u8>>> {
        let mut burst = Burst::with_capacity(64);
        let mut packets = Vec::new();
        for (port, umem) in &mut self.queues {
            port.reclaim(umem);
            port.refill(umem);
            port.receive(umem, &mut burst, 64);
            packets.push(
                burst
                    .iter()
                    .map(|frame| umem.packet(frame).to_vec())
                    .collect(),
            );
            burst.drain(..).for_each(|frame| umem.give(frame));
        }
        packets
    }

    /// How many packets arrive in each queue, until so many have.
    fn arrivals(&mut self, expected: usize) -> Vec<usize> {
        let mut counts = vec![0; self.queues.len()];
        let end = Instant::now() + PATIENCE;
        while counts.iter().sum::<usize>() < expected && Instant::now() < end {
            for (count, packets) in counts.iter_mut().zip(self.received()) {
                *count += packets.len();
            }
        }
        assert_eq!(counts.iter().sum::<usize>(), expected, "{counts:?}");
        counts
    }

    /// What arrives within `time` without having been sent.
    fn stray(&mut self, time: Duration) -> Vec<Vec<u8>> {
        let end = Instant::now() + time;
        let mut stray = Vec::new();
        while Instant::now() < end {
            stray.extend(self.received().into_iter().flatten());
            thread::sleep(Duration::from_millis(5));
        }
        stray
    }

    /// Hands packets to the kernel through a queue.
    fn deliver(&mut self, queue: usize, packets: &[Vec<u8>]) {
        let (port, umem) = &mut self.queues[queue];
        for some in packets.chunks(64) {
            let mut burst = Burst::with_capacity(64);
            for packet in some {
                let mut frame = umem.take().unwrap();
                umem.whole_mut(&mut frame, 232).unwrap()[..packet.len()].copy_from_slice(packet);
                frame.set_len(packet.len()).unwrap();
                burst.push(frame);
            }
            let bytes = some.iter().map(|packet| packet.len() as u64).sum::<u64>();
            let sent = port.transmit(umem, &mut burst);
            assert_eq!((sent.packets, sent.bytes), (some.len() as u64, bytes));
            assert!(burst.is_empty());
            port.flush();
            port.reclaim(umem);
        }
    }

    fn census(&self, queue: usize) -> Census {
        self.queues[queue].1.census()
    }
}

/// An IPv4 or IPv6 packet with UDP and its checksum.
fn udp(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    use etherparse::PacketBuilder;
    let mut packet = Vec::new();
    match (source.parse(), destination.parse()) {
        (Ok(IpAddr::V4(source)), Ok(IpAddr::V4(destination))) => {
            let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64);
            builder.udp(7, port).write(&mut packet, payload).unwrap();
        }
        (Ok(IpAddr::V6(source)), Ok(IpAddr::V6(destination))) => {
            let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), 64);
            builder.udp(7, port).write(&mut packet, payload).unwrap();
        }
        _ => panic!("{source} and {destination}"),
    }
    packet
}

#[test]
fn the_kernel_sends_nothing_of_its_own() {
    let mut rig = Rig::new(2, 2048);
    let stray = rig.stray(Duration::from_secs(3));
    assert!(stray.is_empty(), "{stray:02x?}");
    // Turning forwarding on makes a device join the groups of routers; an address is given as the control plane does.
    for forwarding in ["0", "1"] {
        forward("ipv6", forwarding);
    }
    ip("link set rip0 down");
    ip("link set rip0 up");
    ip("address add fd00:1::/128 dev rip0");
    ip("address add 10.244.1.0/32 dev rip0");
    ip("route replace fd00::/16 dev rip0");
    ip("route replace 10.244.0.0/16 dev rip0");
    let stray = rig.stray(Duration::from_secs(3));
    assert!(stray.is_empty(), "{stray:02x?}");
    // It was not deaf, and what it hears begins with the IP header.
    send(&format!("[{POD6}]:9"), 10);
    send(&format!("{POD}:9"), 10);
    let mut packets = Vec::new();
    let end = Instant::now() + PATIENCE;
    while packets.len() < 20 && Instant::now() < end {
        packets.extend(rig.received().into_iter().flatten());
    }
    let of = |version| {
        packets
            .iter()
            .filter(move |packet| packet[0] >> 4 == version)
    };
    assert_eq!((of(6).count(), of(4).count()), (10, 10));
    assert!(of(6).all(|packet| packet.len() == 40 + 8 + 5));
    assert!(of(4).all(|packet| packet.len() == 20 + 8 + 5));
}

#[test]
fn flows_are_spread_over_the_open_queues() {
    let mut rig = Rig::new(3, 2048);
    for pod in [format!("{POD}:9"), format!("[{POD6}]:9")] {
        send(&pod, 200);
        let all = rig.arrivals(200);
        assert!(all.iter().all(|packets| *packets > 0), "{all:?}");
        for _ in 0..2 {
            rig.queues[1].0.open(false);
            send(&pod, 200);
            let open = rig.arrivals(200);
            assert!(open[0] > 0 && open[1] == 0 && open[2] > 0, "{open:?}");
        }
        // It still delivers.
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let port = socket.local_addr().unwrap().port();
        rig.deliver(1, &[udp(POD, "192.0.2.1", port, b"from a pod")]);
        let mut text = [0; 32];
        let (len, from) = socket.recv_from(&mut text).unwrap();
        assert_eq!(&text[..len], b"from a pod");
        assert_eq!(from.ip().to_string(), POD);
        rig.queues[1].0.open(true);
        send(&pod, 200);
        let all = rig.arrivals(200);
        assert!(all.iter().all(|packets| *packets > 0), "{all:?}");
    }
}

#[test]
fn packets_of_all_sizes_arrive_as_they_were_sent() {
    let mut rig = Rig::new(1, 4096);
    RIP0.set_mtu(3506).unwrap();
    for (here, pod) in [("192.0.2.1", POD), ("2001:db8::1", POD6)] {
        let socket = UdpSocket::bind((here, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let port = socket.local_addr().unwrap().port();
        let header = if here.contains(':') { 48 } else { 28 };
        let sizes = [0, 1, 63, 64, 65, 1400, 1472, 1473, 2000, 3506 - header];
        let payloads = sizes.map(|size| {
            (0..size)
                .map(|at: usize| at.to_le_bytes()[0])
                .collect::<Vec<u8>>()
        });
        let packets: Vec<_> = payloads
            .iter()
            .map(|payload| udp(pod, here, port, payload))
            .collect();
        rig.deliver(0, &packets);
        for payload in &payloads {
            let mut text = [0; 4096];
            let (len, _) = socket.recv_from(&mut text).unwrap();
            assert_eq!(&text[..len], payload);
            socket.send_to(payload, (pod, 9)).unwrap();
            let end = Instant::now() + PATIENCE;
            let packet = loop {
                if let Some(packet) = rig.received().into_iter().flatten().next() {
                    break packet;
                }
                assert!(Instant::now() < end, "{} bytes to {pod}", payload.len());
            };
            // Complete with its checksum, which etherparse computes again.
            let mut expected = udp(here, pod, 9, payload);
            expected[header - 8..header - 6].copy_from_slice(&port.to_be_bytes());
            let checksum = packet[header - 2..header].to_vec();
            let parsed = etherparse::SlicedPacket::from_ip(&packet).unwrap();
            let Some(etherparse::TransportSlice::Udp(sent)) = parsed.transport else {
                panic!("{packet:02x?}");
            };
            let sum = match parsed.net.unwrap() {
                etherparse::NetSlice::Ipv4(ip) => sent
                    .to_header()
                    .calc_checksum_ipv4(&ip.header().to_header(), sent.payload()),
                etherparse::NetSlice::Ipv6(ip) => sent
                    .to_header()
                    .calc_checksum_ipv6(&ip.header().to_header(), sent.payload()),
                etherparse::NetSlice::Arp(_) => panic!("{packet:02x?}"),
            };
            assert_eq!(checksum, sum.unwrap().to_be_bytes());
            assert_eq!(&packet[header..], payload);
        }
    }
    // Every frame is where it can be used again.
    let end = Instant::now() + PATIENCE;
    while rig.census(0).transmitting > 0 && Instant::now() < end {
        rig.received();
    }
    let census = rig.census(0);
    assert_eq!((census.held, census.transmitting), (0, 0), "{census:?}");
}

/// A socket of the node's own talks TCP with itself, through the door and back with both addresses changed: so what is
/// received is checked by the kernel's own TCP.
#[test]
fn tcp_is_handed_over_in_packets_of_the_mtu_with_finished_checksums() {
    let mut rig = Rig::new(1, 2048);
    RIP0.set_mtu(1450).unwrap();
    let listener = TcpListener::bind("192.0.2.1:5001").unwrap();
    let data: Vec<u8> = (0..1_000_000u32)
        .map(|at| ((at * 7) >> 3).to_le_bytes()[0])
        .collect();
    let sent = data.clone();
    let namespace = fs::File::open("/proc/thread-self/ns/net").unwrap();
    let client = thread::spawn(move || {
        use std::os::fd::AsRawFd;
        // SAFETY: takes an open descriptor and a number; only this thread changes its namespace.
        unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        let mut stream = TcpStream::connect((POD, 5001)).unwrap();
        stream.write_all(&sent).unwrap();
    });
    let server = thread::spawn(move || {
        let mut received = Vec::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_end(&mut received)
            .unwrap();
        received
    });
    let longest = thread::scope(|_| {
        let mut longest = 0;
        let end = Instant::now() + PATIENCE;
        while !server.is_finished() && Instant::now() < end {
            let packets: Vec<Vec<u8>> = rig
                .received()
                .into_iter()
                .flatten()
                .map(|mut packet| {
                    longest = longest.max(packet.len());
                    // To the pod becomes from it, so sums stay as they are but for the two addresses, which swap.
                    let (source, destination) = (packet[12..16].to_vec(), packet[16..20].to_vec());
                    packet[12..16].copy_from_slice(&destination);
                    packet[16..20].copy_from_slice(&source);
                    packet
                })
                .collect();
            rig.deliver(0, &packets);
        }
        longest
    });
    assert_eq!(longest, 1450);
    client.join().unwrap();
    assert!(server.join().unwrap() == data, "what was sent has arrived");
}

#[test]
fn the_pair_goes_with_its_owner() {
    let rig = Rig::new(2, 2048);
    assert_eq!(RIP0.mtu().unwrap(), 1500);
    let shown = ip("-details link show dev rip0");
    assert!(shown.contains("NOARP"), "{shown}");
    assert!(!shown.contains("MULTICAST"), "{shown}");
    let Rig { queues, door } = rig;
    drop(queues);
    drop(door);
    assert!(RIP0.mtu().is_err(), "the device went with its owner");
    // Another one at once.
    let door = VethDoor::open(1, false).unwrap();
    drop(door);
    // A device of that name that belongs to somebody else stays, and is named.
    ip("link add rip0 type veth peer name other");
    let error = VethDoor::open(1, false).unwrap_err().to_string();
    assert!(
        error.contains("rip0") && error.contains("ip link del"),
        "{error}"
    );
    assert!(RIP0.mtu().is_ok());
}
