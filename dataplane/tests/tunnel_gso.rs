//! Super-packets that leave whole, in this kernel: what it makes of them is what workers make that cut, byte for byte.
//!
//! ```text
//!   super-packets ─► pods ──► kernel ─► rip0 ─► worker that cuts ─────────► AF_XDP socket ─► near ══ peer ─► frames
//!               the same ─────────────────────► worker that does not ─► TAP ─► kernel cuts ─► …   =   the same frames
//! ```
//!
//! Needs root, and Linux 6.17. Each test works in unnamed network namespaces of its own threads. Inputs are made from a
//! seed, which a failure prints; `RIPSTOP_SEED` repeats a run.

#![expect(unsafe_code, reason = "TUN devices and packet sockets by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::ffi::c_short;
use core::net::Ipv6Addr;
use core::time::Duration;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use af_xdp::{Interface, Mode, Socket, SocketOptions, Umem, UmemOptions};
use ripstop_dataplane::memory::Random;
use ripstop_dataplane::nic_queue::NicQueue;
use ripstop_dataplane::offload::Offload;
use ripstop_dataplane::tun::{self, Offloads, TunQueue};
use ripstop_dataplane::tunnel_gso::{self, TunnelGso, TunnelGsoError};
use ripstop_dataplane::worker::{Parts, Worker};
use ripstop_fib::stats::{Counter, STATS_WORDS, Stats};
use ripstop_fib::sync::{Ordering, words};
use ripstop_fib::{DropReason, Publisher, Reader, Region, Word, publish};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
mod packets;
mod sockets;
mod supers;

use common::{ip, own_namespace, run};
use sockets::packet_socket;
use supers::{FLOW, Flow, TO4, data, offloaded, packet};

const FRAMES: u32 = 1024;
const SLOT_WORDS: usize = 1 << 17;
/// Pods of node 1 and node 2.
const FROM6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0x244, 0, 1, 0, 0, 0, 2);
const TO6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0x244, 0, 2, 0, 0, 0, 3);
/// How long the kernel may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(20);
/// Every EtherType (include/uapi/linux/if_ether.h).
const ETH_P_ALL: u16 = 3;

/// What a pod's kernel hands over: a super-packet or a packet.
#[derive(Debug, Clone)]
struct Handed {
    offload: Offload,
    packet: Vec<u8>,
}

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    frames: Vec<Vec<u8>>,
    counters: [u64; 6],
    too_big: u64,
}

const COUNTERS: [Counter; 6] = [
    Counter::HostRxPackets,
    Counter::HostRxBytes,
    Counter::NicTxPackets,
    Counter::NicTxBytes,
    Counter::HostRxSuperPackets,
    Counter::HostRxCutPackets,
];

/// A pair of veth devices like a wire, of which the near one is the NIC.
fn wire() -> Interface {
    own_namespace();
    ip("link add near type veth peer name peer");
    for device in ["near", "peer"] {
        run(
            "ethtool",
            &format!("-K {device} tx off tso off gso off gro off"),
        );
        ip(&format!("link set {device} up"));
    }
    Interface::by_name("near").unwrap()
}

/// A TUN device that packets of pods come from.
fn pods() -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: `ifreq` is plain integers and bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(*b"pods") {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = c_short::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF reads and writes the `ifreq` that it is given, which is valid and whole.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    ip("link set dev pods up");
    file
}

/// A node in a network namespace of its own: pods that packets come from, and what the worker and the wire need.
struct Machine {
    near: Interface,
    pods: File,
    sink: File,
    fib: Vec<Word>,
    stats: Vec<Word>,
}

impl Machine {
    /// A machine, and its host door.
    fn new() -> (Self, TunQueue) {
        let near = wire();
        for family in ["ipv4", "ipv6"] {
            fs::write(format!("/proc/sys/net/{family}/conf/all/forwarding"), "1").unwrap();
        }
        let pods = pods();
        let mut door = tun::open(1, Offloads::Auto).unwrap();
        ip("route add 10.244.1.0/24 dev pods");
        ip("route add 10.244.2.0/24 dev rip0");
        ip("route add fd10:244:0:1::/64 dev pods");
        ip("route add fd10:244:0:2::/64 dev rip0");
        let sink = packet_socket("peer", ETH_P_ALL);
        let fib = words(&vec![0; publish::region_words(3, SLOT_WORDS)]);
        let stats = words(&vec![0; STATS_WORDS]);
        Region::format(&fib, 3, SLOT_WORDS);
        Stats::format(&stats, 1, 1);
        let machine = Self {
            near,
            pods,
            sink,
            fib,
            stats,
        };
        machine.publish();
        (machine, door.remove(0))
    }

    fn regions(&self) -> (Region<'_>, Stats<'_>) {
        let region = Region::attach(&self.fib).unwrap();
        (region, Stats::attach(&self.stats).unwrap())
    }

    fn publish(&self) {
        let (region, stats) = self.regions();
        let image = packets::image_with(1, |node| node.nics[0].ifindex = self.near.index(), None);
        let published = Publisher::adopt(region).publish(&image, || stats.pins());
        published.unwrap();
        let current = region.current().load(Ordering::Acquire);
        stats.accepted().store(current, Ordering::Release);
    }

    /// A worker that cuts, or leaves that to the kernel.
    fn worker(&self, door: TunQueue, cuts: bool) -> Worker<'_, NicQueue, TunQueue> {
        let (region, stats) = self.regions();
        let options = UmemOptions {
            frames: FRAMES,
            frame_size: 2048,
            ..UmemOptions::default()
        };
        let mut umem = Umem::new(&options).unwrap();
        let copy = SocketOptions {
            mode: Mode::Copy,
            ..SocketOptions::default()
        };
        let socket = Socket::open(&mut umem, &self.near, 0, &copy).unwrap();
        let nic = NicQueue::new(socket.receiver, socket.transmitter, 2048, 512);
        let whole = (!cuts).then(|| TunnelGso::new(&self.near, "veth").unwrap());
        let parts = Parts {
            umem,
            nic: nic.with_tunnel_gso(whole),
            reader: Reader::new(region, stats.worker_pin(0)),
            accepted: stats.accepted(),
            stats,
            index: 0,
            ifindex: self.near.index(),
            burst: 64,
        };
        Worker::new(parts, door)
    }

    /// A pod's kernel hands something over.
    fn hand_over(&self, handed: &Handed) {
        let bytes = [&handed.offload.bytes()[..], &handed.packet].concat();
        (&self.pods).write_all(&bytes).unwrap();
    }
}

/// Sends all of it through a worker, which cuts or does not.
fn through_worker(handed: &[Handed], cuts: bool) -> Outcome {
    let handed = handed.to_vec();
    let thread = std::thread::spawn(move || in_own_namespace(&handed, cuts));
    thread.join().unwrap()
}

fn in_own_namespace(handed: &[Handed], cuts: bool) -> Outcome {
    let (machine, door) = Machine::new();
    let mut worker = machine.worker(door, cuts);
    let before = tap_packets();
    let mut frames = Vec::new();
    for handed in handed {
        machine.hand_over(handed);
        while worker.turn() > 0 {}
        frames.extend(arrived(&machine.sink));
    }
    worker.housekeeping(1);
    let census = worker.ports().0.census();
    assert_eq!((census.held, census.transmitting), (0, 0), "{census:?}");
    let whole = tap_packets() - before;
    assert_eq!(whole > 0, !cuts, "{whole} super-packets have left whole");
    let counters = worker.counters();
    Outcome {
        frames,
        counters: COUNTERS.map(|counter| counters.get(counter)),
        too_big: counters.drops[DropReason::TooBig.index()],
    }
}

/// How many packets the kernel has had from TAP devices of workers.
fn tap_packets() -> u64 {
    let links = ip("-s -o link");
    let taps = links.lines().filter(|line| line.contains("rip0-gso"));
    taps.map(|line| {
        let (_, received) = line.split_once("RX:").unwrap();
        let values = received.split('\\').nth(1).unwrap();
        let packets = values.split_whitespace().nth(1).unwrap();
        packets.parse::<u64>().unwrap()
    })
    .sum()
}

/// The tunnel frames that have arrived.
fn arrived(sink: &File) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut bytes = vec![0; 70_000];
    loop {
        let (room, at_once) = (bytes.len(), libc::MSG_DONTWAIT);
        // SAFETY: as much memory as stated, borrowed exclusively for the call.
        let len = unsafe { libc::recv(sink.as_raw_fd(), bytes.as_mut_ptr().cast(), room, at_once) };
        let Ok(len) = usize::try_from(len) else {
            return frames;
        };
        if bytes[..6] == packets::nic_mac(2) {
            frames.push(bytes[..len].to_vec());
        }
    }
}

fn below(random: &mut Random, end: usize) -> usize {
    usize::try_from(random.number() >> 11).unwrap() % end
}

/// Super-packets of every kind, and packets between them.
fn any(random: &mut Random) -> Handed {
    let bits = random.number();
    let bit = |number: u32| bits >> number & 1 != 0;
    let flag = |number: u32, flag: u8| if bit(number) { flag } else { 0 };
    let [_, _, _, _, low, high, tos, _] = bits.to_le_bytes();
    let flow = Flow {
        v6: bit(0),
        udp: bit(1) && bit(2),
        port: 5000 + u16::from(low % 8),
        options: bit(3),
        sequence: u32::from_le_bytes([low, high, tos, 0xff]),
        identification: u16::from_le_bytes([low, high]),
        dont_fragment: bit(4),
        flags: 0x10 | flag(5, 0x08) | flag(6, 0x01) | flag(7, 0x40) | flag(8, 0x80),
        tos: tos & if bit(9) { 0x0f } else { 3 },
    };
    // Some are too long for the path of one family or of both.
    let size = match below(random, 8) {
        0 => 1330 + below(random, 120),
        _ => 100 + below(random, 1230),
    };
    let most = if flow.udp { 120 * size } else { 65_435 };
    let len = match below(random, 4) {
        0 => 1 + below(random, size),
        1 => 65_435.min(most),
        _ => 1 + below(random, 64 * size),
    };
    let data = data(len.min(most).min(65_435), tos);
    let mut packet = packet(&flow, &data);
    if flow.v6 {
        packet[8..24].copy_from_slice(&FROM6.octets());
        packet[24..40].copy_from_slice(&TO6.octets());
    } else {
        assert_eq!(packet[16..20], TO4.octets());
    }
    let mut offload = offloaded(&flow, u16::try_from(size).unwrap(), &mut packet);
    let start = usize::from(offload.checksum_start);
    let transport = if flow.udp { 2 } else { packet[start + 12] >> 4 };
    offload.headers = offload.checksum_start + u16::from(transport) * 4;
    if data.len() <= size {
        // A single one is none.
        (offload.joined, offload.reduced) = (None, false);
    }
    Handed { offload, packet }
}

#[test]
fn the_kernel_makes_the_same_frames() {
    let seed = match std::env::var("RIPSTOP_SEED") {
        Ok(seed) => seed.parse().expect("RIPSTOP_SEED is a number"),
        Err(_) => 0x0052_6970_7374_6f70,
    };
    eprintln!("RIPSTOP_SEED={seed}");
    let mut random = Random::new(seed);
    let handed: Vec<Handed> = (0..300).map(|_| any(&mut random)).collect();
    let [ours, kernels] = [true, false].map(|cuts| through_worker(&handed, cuts));
    assert_eq!(kernels.counters, ours.counters, "{COUNTERS:?}");
    assert_eq!(kernels.too_big, ours.too_big);
    assert!(ours.too_big > 0);
    assert_eq!(kernels.frames.len(), ours.frames.len());
    assert!(ours.frames.len() > 3000, "{}", ours.frames.len());
    for (number, (kernels, ours)) in kernels.frames.iter().zip(&ours.frames).enumerate() {
        let differ =
            (0..kernels.len().max(ours.len())).find(|at| kernels.get(*at) != ours.get(*at));
        assert!(
            differ.is_none(),
            "frame {number} differs from byte {differ:?} on: {:02x?} and not {:02x?}",
            &kernels[..kernels.len().min(120)],
            &ours[..ours.len().min(120)]
        );
    }
}

/// A packet of a flow with so much data.
fn small(len: usize) -> Handed {
    let packet = packet(&FLOW, &data(len, 1));
    let offload = Offload::default();
    Handed { offload, packet }
}

/// Four packets of the same flow, of 1000 bytes each.
fn large() -> Handed {
    let mut packet = packet(&FLOW, &data(4000, 1));
    let offload = offloaded(&FLOW, 1000, &mut packet);
    Handed { offload, packet }
}

/// Lengths of the data in the packets of [`FLOW`] that arrive, when each of these is handed over and then the worker
/// turns; before that, `change` is done to the machine.
fn arrive(bursts: &[&[Handed]], change: impl FnOnce()) -> Vec<usize> {
    let (machine, door) = Machine::new();
    let mut worker = machine.worker(door, false);
    change();
    for burst in bursts {
        for handed in *burst {
            machine.hand_over(handed);
        }
        while worker.turn() > 0 {}
    }
    let headers = 64 + 52;
    let arrived = arrived(&machine.sink).into_iter();
    arrived.map(|frame| frame.len() - headers).collect()
}

/// Behind each other without a turn between: packets do not overtake super-packets, nor these those.
#[test]
fn the_order_of_a_flow_is_kept() {
    let burst = [small(1), small(2), large(), small(3), large(), small(4)];
    let expected = [1, 2, 1000, 1000, 1000, 1000, 3, 1000, 1000, 1000, 1000, 4];
    assert_eq!(arrive(&[&burst], || {}), expected);
}

/// Whoever takes the device down takes nothing away from pods: what it refuses is cut.
#[test]
fn what_the_device_refuses_is_cut() {
    let burst = [large(), small(5)];
    let bursts = [&burst[..]; 10];
    let arrived = arrive(&bursts, || {
        ip("link set rip0-gso0 down");
    });
    assert_eq!(arrived, [1000, 1000, 1000, 1000, 5].repeat(10));
}

/// Where the receiver would see unfinished checksums, and when that changes.
#[test]
fn a_veth_device_with_checksum_offload_is_refused() {
    let near = wire();
    run("ethtool", "-K near tx on");
    let refused = TunnelGso::new(&near, "veth").unwrap_err();
    assert!(matches!(refused, TunnelGsoError::Checksums { .. }));
    let text = refused.to_string();
    assert!(text.contains("ethtool -K near tx off"), "{text}");
    assert!(tunnel_gso::arrives_whole("near", "ixgbe"));
    run("ethtool", "-K near tx off");
    assert!(tunnel_gso::arrives_whole("near", "veth"));
    let whole = TunnelGso::new(&near, "veth").unwrap();
    assert!(whole.may());
    // Each worker has its own, and they go with it.
    let other = TunnelGso::new(&near, "veth").unwrap();
    let names = [whole.name().to_owned(), other.name().to_owned()];
    assert_eq!(names, ["rip0-gso0", "rip0-gso1"]);
    whole.switch().set_taken(false);
    assert!(!whole.may() && other.may());
    drop((whole, other));
    // Another test's child holds a copy of the descriptors until it executes its program.
    let end = Instant::now() + PATIENCE;
    while ip("-br link").contains("gso") {
        assert!(Instant::now() < end, "the devices stay");
    }
}
