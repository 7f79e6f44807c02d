//! What the kernel makes of super-packets and of bursts, and what we make of the same: equal, byte for byte.
//!
//! ```text
//!   super-packet ─► TUN a ─► kernel ─► TUN b, which takes none:      its segmentation  =  ours
//!   burst ─► TUN a, with NAPI ─► GRO ─► kernel ─► TUN b, which does: its joining       =  ours
//! ```
//!
//! Needs root. Each test works in unnamed namespaces of its own thread, which the kernel removes with the thread.
//! Inputs are made from a seed, which a failure prints; `RIPSTOP_SEED` repeats a run.
//!
//! Where we differ from the kernel on purpose is written down in [`where_we_differ_on_purpose`], by burst and by what
//! becomes of it: generated bursts hold none of that.
#![expect(unsafe_code, reason = "namespaces and TUN devices by hand")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says its seed"
)]

mod supers;

use core::ffi::{CStr, c_int, c_short};
use core::time::Duration;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::Instant;

use ripstop_dataplane::memory::Random;
use ripstop_dataplane::offload::{OFFLOAD_LEN, Offload};
use supers::{
    FLOW, FROM4, FROM6, Flow, TO4, TO6, changed, cut, data, joined, offloaded, packet, segments,
    shorten,
};

/// How long the kernel may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(20);
const MTU: usize = 9300;

#[test]
fn the_kernel_cuts_as_we_do() {
    let (mut a, mut b) = doors(0, 0);
    let mut random = Random::new(seed());
    for case in 0..300 {
        let (flow, data, size) = any_super_packet(&mut random, a.knows_udp);
        let mut whole = packet(&flow, &data);
        let mut offload = offloaded(&flow, size, &mut whole);
        if !flow.v6 && random.number().is_multiple_of(4) {
            whole = with_ip_options(&whole);
            offload.checksum_start += 4;
        }
        let start = usize::from(offload.checksum_start);
        let transport = if flow.udp { 2 } else { whole[start + 12] >> 4 };
        offload.headers = offload.checksum_start + u16::from(transport) * 4;
        let ours = if data.len() > usize::from(size) {
            cut(&whole, &offload)
        } else {
            // A single one is none: all that it wants is its checksum.
            (offload.joined, offload.reduced) = (None, false);
            vec![completed(&whole, &offload)]
        };
        a.write(&offload, &whole);
        let ours: Vec<_> = ours.into_iter().map(forwarded).collect();
        for (number, ours) in ours.iter().enumerate() {
            let what = format!(
                "case {case}, {flow:?}, {} bytes by {size}, {offload:?}, packet {number}",
                data.len()
            );
            let (said, kernels) = b.read(&what);
            assert_eq!(said, Offload::default(), "{what}");
            assert!(kernels == *ours, "{what}: {}", difference(&kernels, ours));
        }
    }
    b.assert_silent();
}

/// A packet that has all but the checksum.
fn completed(whole: &[u8], offload: &Offload) -> Vec<u8> {
    let mut whole = whole.to_vec();
    let start = usize::from(offload.checksum_start);
    let at = start + usize::from(offload.checksum_offset);
    ripstop_dataplane::offload::segment::complete_checksum(&mut whole, start, at);
    whole
}

fn any_super_packet(random: &mut Random, udp: bool) -> (Flow, Vec<u8>, u16) {
    let flow = any_flow(random, 5000, udp);
    let size = 100 + below(random, 1300);
    let len = match below(random, 4) {
        0 => 1 + below(random, usize::from(u16::try_from(size).unwrap())),
        // The longest. Of UDP the kernel takes no more than 128 (include/linux/udp.h, UDP_MAX_SEGMENTS).
        1 if !flow.udp || size > 520 => 65_435,
        _ => 1 + below(random, 64 * size),
    };
    let data = data(len.min(65_435), random.number().to_le_bytes()[0]);
    (flow, data, u16::try_from(size).unwrap())
}

fn any_flow(random: &mut Random, port: u16, udp: bool) -> Flow {
    let bits = random.number();
    let bit = |number: u32| bits >> number & 1 != 0;
    let flag = |number: u32, flag: u8| if bit(number) { flag } else { 0 };
    let flags = [
        flag(8, 0x08),
        flag(9, 0x01) & flag(10, 0x01),
        flag(11, 0x40),
    ];
    let [_, _, _, _, low, high, tos, _] = bits.to_le_bytes();
    Flow {
        v6: bit(0),
        udp: udp && bit(1),
        port,
        options: bit(2),
        sequence: u32::from_le_bytes([low, high, tos, if bit(3) { 0xff } else { low }]),
        identification: if bit(3) {
            0xffff - u16::from(low % 16)
        } else {
            u16::from_le_bytes([low, high])
        },
        dont_fragment: bit(4),
        flags: flags.iter().fold(0x10, |all, flag| all | flag) | flag(12, 0x80) & flag(13, 0x80),
        tos: tos & if bit(14) { 0x0f } else { 3 },
    }
}

#[test]
fn the_kernel_joins_as_we_do() {
    let (mut a, mut b) = joining_doors();
    let mut random = Random::new(seed());
    let mut joined_packets = 0;
    for case in 0..300 {
        let burst = any_burst(&mut random, a.knows_udp);
        let (kernels, ours) = both_ways(&mut a, &mut b, &burst);
        joined_packets += burst.len() - ours.values().map(Vec::len).sum::<usize>();
        for (flow, ours) in &ours {
            let kernels = kernels.get(flow).map_or(&[][..], Vec::as_slice);
            let lengths =
                |all: &[Handed]| -> Vec<usize> { all.iter().map(|one| one.packet.len()).collect() };
            assert_eq!(
                lengths(kernels),
                lengths(ours),
                "case {case}, {flow:02x?}, of {:#?}",
                all_of(&burst, flow)
            );
            for (kernels, ours) in kernels.iter().zip(ours) {
                assert_eq!(kernels.offload, ours.offload, "case {case}");
                assert!(
                    kernels.packet == ours.packet,
                    "case {case}: {}",
                    difference(&kernels.packet, &ours.packet)
                );
            }
        }
        assert_eq!(kernels.len(), ours.len(), "case {case}");
    }
    // It was about something.
    assert!(joined_packets > 3000, "{joined_packets}");
}

/// Packets of a few flows, mixed, in the order of each but for some that are lost, repeated, turned round or changed.
fn any_burst(random: &mut Random, udp: bool) -> Vec<Vec<u8>> {
    let count = 1 + below(random, 4);
    let mut flows: Vec<Vec<Vec<u8>>> = Vec::new();
    for port in 0..u16::try_from(count).unwrap() {
        let mut flow = any_flow(random, 5000 + port, udp);
        flow.flags &= !0x80;
        let size = 100 + below(random, 1200);
        let len = 1 + below(random, size * 40);
        let data = data(len.min(65_000), random.number().to_le_bytes()[0]);
        let mut packets = segments(&flow, &data, u16::try_from(size).unwrap());
        packets.reverse();
        flows.push(packets);
    }
    let mut burst: Vec<Vec<u8>> = Vec::new();
    while burst.len() < 60 && flows.iter().any(|packets| !packets.is_empty()) {
        let which = below(random, flows.len());
        for _ in 0..=below(random, 8) {
            let Some(next) = flows[which].pop() else {
                break;
            };
            match below(random, 40) {
                0 => {}
                1 if !is_fragile_datagram(&next) => burst.extend([next.clone(), next]),
                2 => {
                    let other = flows[which].pop();
                    burst.extend(other.into_iter().chain([next]));
                }
                3 => burst.push(mischief(random, next)),
                _ => burst.push(next),
            }
        }
    }
    burst.truncate(60);
    burst
}

/// Whether it is a datagram that may become fragments: repeated, the kernel joins it.
fn is_fragile_datagram(packet: &[u8]) -> bool {
    packet[0] == 0x45 && packet[9] == 17 && packet[6] & 0x40 == 0
}

/// A packet that its flow did not expect, with right checksums.
fn mischief(random: &mut Random, packet: Vec<u8>) -> Vec<u8> {
    let v6 = packet[0] >> 4 == 6;
    let (ip, protocol) = if v6 { (40, packet[6]) } else { (20, packet[9]) };
    let kind = below(random, 9);
    changed(packet, |packet| match (kind, protocol) {
        // Type of service, time to live.
        (0, _) if v6 => packet[1] ^= 0x20,
        (0, _) => packet[1] ^= 2,
        (1, _) => packet[if v6 { 7 } else { 8 }] -= 3,
        (2, _) => shorten(packet, data_of(packet).div_ceil(2)),
        // Flags: PSH, FIN, RST, ECE.
        (3, 6) => packet[ip + 13] ^= 8,
        (4, 6) => packet[ip + 13] ^= 1,
        (5, 6) => packet[ip + 13] ^= 4,
        (6, 6) => packet[ip + 13] ^= 0x40,
        // Window; acknowledgment.
        (7, 6) => packet[ip + 15] ^= 1,
        (8, 6) => packet[ip + 11] ^= 1,
        // No checksum, as far as that may be.
        (3.., _) if !v6 => packet[5] ^= 0x20,
        (_, _) => {}
    })
}

/// A flow's packets in a burst: lengths and headers.
fn all_of(burst: &[Vec<u8>], flow: &[u8]) -> Vec<String> {
    let of_flow = burst.iter().filter(|packet| key(packet) == flow);
    of_flow
        .map(|packet| format!("{} {:02x?}", packet.len(), &packet[..packet.len().min(60)]))
        .collect()
}

/// What is handed over: a packet or a super-packet.
#[derive(Debug, PartialEq, Eq)]
struct Handed {
    packet: Vec<u8>,
    offload: Offload,
}

/// What is handed over, in the order of each flow.
type ByFlow = BTreeMap<Vec<u8>, Vec<Handed>>;

/// What the kernel hands to TUN b when TUN a gets the burst, and what we would.
fn both_ways(a: &mut Door, b: &mut Door, burst: &[Vec<u8>]) -> (ByFlow, ByFlow) {
    for packet in burst {
        a.write(&Offload::default(), packet);
    }
    let mut kernels: ByFlow = BTreeMap::new();
    let mut left = burst.len();
    while left > 0 {
        let (offload, packet) = b.read(&format!("{left} of {}", burst.len()));
        let count = match offload.joined {
            // What it says of the headers' length is a hint.
            Some(_) => data_of(&packet).div_ceil(offload.size.into()),
            None => 1,
        };
        left -= count.min(left);
        let offload = Offload {
            headers: 0,
            ..offload
        };
        kernels
            .entry(key(&packet))
            .or_default()
            .push(Handed { packet, offload });
    }
    b.assert_silent();
    let mut ours: ByFlow = BTreeMap::new();
    for (_, packet, offload) in joined(burst) {
        let packet = forwarded(packet);
        let offload = Offload {
            headers: 0,
            ..offload
        };
        ours.entry(key(&packet))
            .or_default()
            .push(Handed { packet, offload });
    }
    (kernels, ours)
}

/// What tells flows apart here: version, protocol and ports.
fn key(packet: &[u8]) -> Vec<u8> {
    let (protocol, ip) = if packet[0] >> 4 == 6 {
        (packet[6], 40)
    } else {
        (packet[9], 20)
    };
    [&[packet[0] >> 4, protocol], &packet[ip..ip + 2]].concat()
}

/// Bytes of data of a packet.
fn data_of(packet: &[u8]) -> usize {
    let (protocol, ip) = match packet[0] >> 4 {
        6 => (packet[6], 40),
        _ => (packet[9], 20),
    };
    let transport = if protocol == 17 {
        2
    } else {
        packet[ip + 12] >> 4
    };
    packet.len() - ip - usize::from(transport) * 4
}

/// A packet as a router passes it on.
fn forwarded(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return packet;
    }
    packet[8] -= 1;
    // RFC 1624, as the kernel does it (include/net/ip.h, ip_decrease_ttl).
    let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x0100;
    let new = u16::try_from((sum + u32::from(sum >= 0xffff)) & 0xffff).unwrap();
    packet[10..12].copy_from_slice(&new.to_be_bytes());
    packet
}

fn with_ip_options(packet: &[u8]) -> Vec<u8> {
    let mut longer = [&packet[..20], &[1, 1, 1, 0], &packet[20..]].concat();
    longer[0] = 0x46;
    let len = u16::try_from(longer.len()).unwrap();
    longer[2..4].copy_from_slice(&len.to_be_bytes());
    let mut header = etherparse::Ipv4Header::from_slice(&longer).unwrap().0;
    header.header_checksum = header.calc_header_checksum();
    longer[..24].copy_from_slice(&header.to_bytes());
    longer
}

fn difference(kernels: &[u8], ours: &[u8]) -> String {
    let places: Vec<_> = (0..kernels.len().min(ours.len()))
        .filter(|at| kernels[*at] != ours[*at])
        .take(10)
        .map(|at| {
            format!(
                "byte {at} is {:#04x} and not {:#04x}",
                ours[at], kernels[at]
            )
        })
        .collect();
    format!(
        "{} bytes and the kernel's {}; {}",
        ours.len(),
        kernels.len(),
        places.join(", ")
    )
}

fn below(random: &mut Random, end: usize) -> usize {
    usize::try_from(random.number() >> 11).unwrap() % end
}

fn seed() -> u64 {
    let seed = match std::env::var("RIPSTOP_SEED") {
        Ok(seed) => seed.parse().expect("RIPSTOP_SEED is a number"),
        Err(_) => 0x0052_6970_7374_6f70,
    };
    eprintln!("RIPSTOP_SEED={seed}");
    seed
}

/// Super-packets of either kind.
const TCP: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// A TUN device with one queue.
struct Door {
    file: File,
    name: String,
    /// Since Linux 6.2.
    knows_udp: bool,
}

impl Door {
    fn open(name: String, flags: c_int, offloads: libc::c_uint) -> Self {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let file = options.open("/dev/net/tun").unwrap();
        // SAFETY: `ifreq` is plain integers and bytes, for which zero is valid.
        let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
        request.ifr_ifru.ifru_flags = c_short::try_from(flags).unwrap();
        // SAFETY: TUNSETIFF reads and writes the `ifreq` that it is given, which is valid and whole.
        assert_ok(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
        let set = |offloads: libc::c_uint| {
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) >= 0 }
        };
        let knows_udp = set(TCP | UDP);
        assert!(set(if knows_udp { offloads } else { offloads & !UDP }));
        run(
            "ip",
            &format!("link set dev {name} mtu {MTU} txqueuelen 4096 up"),
        );
        Self {
            file,
            name,
            knows_udp,
        }
    }

    fn write(&mut self, offload: &Offload, packet: &[u8]) {
        let parts =
            [IoSlice::new(&offload.bytes()), IoSlice::new(packet)].map(|part| part.to_vec());
        let written = self.file.write(&parts.concat());
        written.unwrap_or_else(|error| {
            panic!(
                "{} takes no {offload:?} of {} bytes: {error}",
                self.name,
                packet.len()
            )
        });
    }

    /// The next packet to one of ours.
    fn read(&mut self, what: &str) -> (Offload, Vec<u8>) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(read) = self.next() {
                return read;
            }
            let left = end.checked_duration_since(Instant::now());
            self.wait(left.unwrap_or_else(|| panic!("{} does not get {what}", self.name)));
        }
    }

    fn wait(&self, time: Duration) {
        let mut poll = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let time = c_int::try_from(time.as_millis()).unwrap();
        // SAFETY: one valid entry, as stated.
        unsafe { libc::poll(&raw mut poll, 1, time) };
    }

    /// What there is at once; what the kernel sends of its own is left out.
    fn next(&mut self) -> Option<(Offload, Vec<u8>)> {
        let mut bytes = vec![0; 70_000];
        loop {
            let len = match self.file.read(&mut bytes) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => panic!("{}: {error}", self.name),
            };
            let (head, packet) = bytes[..len].split_first_chunk::<OFFLOAD_LEN>().unwrap();
            let to_ours = match packet[0] >> 4 {
                4 => packet[16..20] == TO4.octets(),
                _ => packet[24..40] == TO6.octets(),
            };
            if to_ours {
                return Some((Offload::read(head).unwrap(), packet.to_vec()));
            }
        }
    }

    fn assert_silent(&mut self) {
        assert_eq!(self.next(), None);
    }
}

/// A namespace in which the kernel forwards between two TUN devices.
fn doors(flags_of_a: c_int, offloads_of_b: libc::c_uint) -> (Door, Door) {
    // SAFETY: takes a number; only this thread changes its namespaces.
    assert_ok(unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) });
    // Only for this thread: the /sys of its network namespace.
    mount(c"none", c"/", c"", libc::MS_REC | libc::MS_PRIVATE);
    mount(c"sysfs", c"/sys", c"sysfs", 0);
    for setting in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"] {
        fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    for scope in ["all", "default"] {
        fs::write(format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter"), "0").unwrap();
    }
    // Kernel threads have their names from the device, and all namespaces see them.
    // SAFETY: takes nothing.
    let thread = unsafe { libc::gettid() };
    let a = Door::open(format!("a{thread}"), flags_of_a, 0);
    let b = Door::open(format!("b{thread}"), 0, offloads_of_b);
    for (address, name) in [
        (FROM4.to_string(), &a.name),
        (TO4.to_string(), &b.name),
        (FROM6.to_string(), &a.name),
        (TO6.to_string(), &b.name),
    ] {
        run("ip", &format!("route add {address} dev {name}"));
    }
    (a, b)
}

/// The same with GRO behind TUN a, which sees what is written until this thread waits as one burst: it runs in a kernel
/// thread on this thread's CPU, which does not give way to it.
fn joining_doors() -> (Door, Door) {
    let doors = doors(libc::IFF_NAPI, TCP | UDP);
    let name = &doors.0.name;
    run("ethtool", &format!("-K {name} rx-udp-gro-forwarding on"));
    fs::write(format!("/sys/class/net/{name}/threaded"), "1").unwrap();
    let napi = napi_threads(&format!("napi/{name}-"));
    assert_eq!(napi.len(), 1, "{napi:?}");
    // SAFETY: takes nothing.
    let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap();
    for thread in [0, napi[0]] {
        // SAFETY: a set of CPUs is plain bits, for which zero is valid.
        let mut cpus: libc::cpu_set_t = unsafe { core::mem::zeroed() };
        // SAFETY: the set is whole.
        unsafe { libc::CPU_SET(cpu, &mut cpus) };
        // SAFETY: the set is whole, and as long as stated.
        assert_ok(unsafe { libc::sched_setaffinity(thread, size_of_val(&cpus), &raw const cpus) });
    }
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters are whole; 0 is this thread.
    assert_ok(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first) });
    doors
}

/// Kernel threads whose name starts so.
fn napi_threads(name: &str) -> Vec<libc::pid_t> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if comm.starts_with(name) {
            found.push(path.file_name().unwrap().to_str().unwrap().parse().unwrap());
        }
    }
    found
}

fn mount(what: &CStr, place: &CStr, kind: &CStr, flags: libc::c_ulong) {
    // SAFETY: three strings that end in zero, and no data.
    assert_ok(unsafe {
        libc::mount(
            what.as_ptr(),
            place.as_ptr(),
            kind.as_ptr(),
            flags,
            core::ptr::null(),
        )
    });
}

fn assert_ok(answer: c_int) {
    assert!(
        answer >= 0,
        "these tests need root: {}",
        io::Error::last_os_error()
    );
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
}

/// Bursts of four packets, most of them changed: into how many the kernel joins them and into how many we do.
#[test]
fn where_we_differ_on_purpose() {
    let (mut a, mut b) = joining_doors();
    let knows_udp = a.knows_udp;
    let tcp6 = Flow { v6: true, ..FLOW };
    let udp = Flow { udp: true, ..FLOW };
    type Row<'r> = (&'r str, &'r Flow, fn(&mut Vec<Vec<u8>>), [usize; 2]);
    let rows: &[Row<'_>] = &[
        ("nothing", &FLOW, |_| {}, [1, 1]),
        // Stricter: what is joined shall be what it was when it is cut again.
        (
            "an urgent pointer that is not in use",
            &FLOW,
            |burst| third(burst, |p| p[39] ^= 1),
            [1, 3],
        ),
        (
            "an identification that stays, where there may be fragments",
            &udp,
            |burst| {
                all(burst, |p| {
                    p[6] = 0;
                    p[4..6].fill(9);
                });
            },
            [1, 4],
        ),
        // Stricter: nothing overtakes what may be of the same flow.
        (
            "another flow label",
            &tcp6,
            |burst| again(burst, |p| p[3] ^= 1),
            [2, 3],
        ),
        (
            "a wrong checksum",
            &FLOW,
            |burst| {
                again(burst, |_| {});
                burst[2][36] ^= 1;
            },
            [2, 3],
        ),
        (
            "a fragment",
            &udp,
            |burst| again(burst, |p| p[6] ^= 0x20),
            [2, 3],
        ),
        // The kernel joins it and cuts it again for a TUN device, as the header cannot say it (SKB_GSO_TCP_FIXEDID). With
        // "don't fragment" the identification means nothing.
        (
            "an identification that stays",
            &FLOW,
            |burst| all(burst, |p| p[4..6].fill(9)),
            [4, 1],
        ),
    ];
    let known = rows.iter().filter(|(_, flow, ..)| knows_udp || !flow.udp);
    for (name, flow, change, expected) in known {
        let mut burst = segments(flow, &data(4000, 3), 1000);
        change(&mut burst);
        let (kernels, ours) = both_ways(&mut a, &mut b, &burst);
        let count = |all: BTreeMap<_, Vec<_>>| all.values().map(Vec::len).sum::<usize>();
        assert_eq!([count(kernels), count(ours)], *expected, "{name}");
    }
}

/// Puts a third packet like the next, but for the change, before that.
fn again(burst: &mut Vec<Vec<u8>>, change: fn(&mut Vec<u8>)) {
    burst.insert(2, changed(burst[2].clone(), change));
}

fn third(burst: &mut [Vec<u8>], change: fn(&mut Vec<u8>)) {
    burst[2] = changed(burst[2].clone(), change);
}

fn all(burst: &mut [Vec<u8>], change: fn(&mut Vec<u8>)) {
    for packet in burst {
        *packet = changed(packet.clone(), change);
    }
}
