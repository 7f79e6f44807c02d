//! The host door in this kernel: what arrives in its queues, and what does not.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread.

#![expect(unsafe_code, reason = "system calls by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::time::Duration;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use af_xdp::{Umem, UmemOptions};
use ripstop_dataplane::door::RIP0;
use ripstop_dataplane::port::{Burst, Port, SuperPackets};
use ripstop_dataplane::tun::{self, Offloads, TunQueue};

mod common;
mod networks;

use common::{ip, kernel, own_namespace};
use networks::{behind, forward, send};

/// `struct virtio_net_hdr` before each packet.
const HEADER: usize = 10;

fn file(queue: &TunQueue) -> File {
    File::from(queue.as_fd().try_clone_to_owned().unwrap())
}

/// What arrives in the queues within `time`: packets, by queue.
fn arrivals(queues: &[TunQueue], time: Duration) -> Vec<Vec<Vec<u8>>> {
    let mut packets = vec![Vec::new(); queues.len()];
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        let mut polled: Vec<libc::pollfd> = queues
            .iter()
            .map(|queue| libc::pollfd {
                fd: queue.as_fd().as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let count = libc::nfds_t::try_from(polled.len()).unwrap();
        let wait = i32::try_from(left.as_millis()).unwrap();
        // SAFETY: an array of as many valid entries as stated.
        unsafe { libc::poll(polled.as_mut_ptr(), count, wait) };
        for (queue, packets) in queues.iter().zip(&mut packets) {
            let mut buffer = [0; 2048];
            while let Ok(length) = file(queue).read(&mut buffer) {
                packets.push(buffer[HEADER..length].to_vec());
            }
        }
    }
    packets
}

fn count(arrived: &[Vec<Vec<u8>>]) -> Vec<usize> {
    arrived.iter().map(Vec::len).collect()
}

#[test]
fn the_kernel_sends_nothing_of_its_own() {
    let queues = behind(|| tun::open(2, Offloads::Off).unwrap());
    // The first report of a group comes within a second of joining it, the next ones within two more
    // (net/ipv6/mcast.c, mld_ifc_event and unsolicited_report_interval).
    let stray = arrivals(&queues, Duration::from_secs(4));
    assert_eq!(count(&stray), [0, 0], "{stray:02x?}");
    // Turning forwarding on makes a device join the groups of routers.
    for forwarding in ["0", "1"] {
        forward("ipv6", forwarding);
        forward("ipv4", forwarding);
    }
    ip("link set rip0 down");
    ip("link set rip0 up");
    ip("route add fd00::/16 dev rip0");
    let stray = arrivals(&queues, Duration::from_secs(4));
    assert_eq!(count(&stray), [0, 0], "{stray:02x?}");
    // It was not deaf.
    send("[fd00::7]:9", 10);
    let arrived = arrivals(&queues, Duration::from_millis(100));
    assert_eq!(count(&arrived).iter().sum::<usize>(), 10);
}

#[test]
fn a_closed_queue_gets_nothing_and_still_delivers() {
    let mut queues = behind(|| tun::open(2, Offloads::Off).unwrap());
    let received_by = |queues: &[TunQueue]| {
        send("10.244.2.7:9", 100);
        let arrived = count(&arrivals(queues, Duration::from_millis(100)));
        assert_eq!(arrived.iter().sum::<usize>(), 100, "{arrived:?}");
        arrived
    };
    let both = received_by(&queues);
    assert!(both.iter().all(|packets| *packets > 0), "{both:?}");
    for _ in 0..2 {
        queues[0].open(false);
        assert_eq!(received_by(&queues), [0, 100]);
    }

    let before = delivered();
    let mut packet = [0; HEADER + 20];
    packet[HEADER] = 0x45;
    packet[HEADER + 3] = 20;
    file(&queues[0]).write_all(&packet).unwrap();
    assert_eq!(delivered(), before + 1);

    for _ in 0..2 {
        queues[0].open(true);
    }
    let both = received_by(&queues);
    assert!(both.iter().all(|packets| *packets > 0), "{both:?}");
}

/// Five datagrams in one piece come as five, and go back in one piece.
#[test]
fn super_packets_are_cut_and_joined() {
    const SIZE: usize = 1000;
    let mut queues = behind(|| tun::open(1, Offloads::Auto).unwrap());
    let queue = &mut queues[0];
    let socket = UdpSocket::bind("192.0.2.1:4000").unwrap();
    socket.connect("10.244.2.7:9").unwrap();
    let size = libc::c_int::try_from(SIZE).unwrap();
    // SAFETY: the option's value is a whole integer of the stated length.
    let set = unsafe {
        let value = (&raw const size).cast();
        let len = libc::socklen_t::try_from(size_of_val(&size)).unwrap();
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            value,
            len,
        )
    };
    assert_eq!(set, 0);
    let data: Vec<u8> = (0..4 * SIZE + 500).map(|at| at.to_le_bytes()[0]).collect();
    socket.send(&data).unwrap();

    let options = UmemOptions {
        frames: 64,
        frame_size: 4096,
        ..UmemOptions::default()
    };
    let mut umem = Umem::new(&options).unwrap();
    let mut burst = Burst::with_capacity(64);
    // In two goes, as if there were no room for more.
    for (most, received) in [(3, 3), (64, 2)] {
        let before = burst.len();
        let mut part = Burst::with_capacity(64);
        queue.receive(&mut umem, &mut part, most);
        burst.append(&mut part);
        assert_eq!(burst.len() - before, received);
    }
    assert_eq!(queue.pending(), 0);
    for (frame, data) in burst.iter_mut().zip(data.chunks(SIZE)) {
        let packet = umem.packet_mut(frame);
        assert_eq!(&packet[28..], data);
        // Back to where it came from; the sums stay the same.
        packet[12..20].rotate_left(4);
        packet[20..24].rotate_left(2);
    }

    let before = delivered();
    let sent = queue.transmit(&mut umem, &mut burst);
    assert_eq!((sent.packets, sent.bytes), (5, 5 * 28 + 4500));
    assert!(burst.is_empty());
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut buffer = [0; 2 * SIZE];
    for data in data.chunks(SIZE) {
        let len = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], data);
    }
    // Each by itself where the kernel is older than 6.2.
    let known = kernel() >= (6, 2);
    let expected = SuperPackets {
        received: 1,
        cut: 5,
        transmitted: 1,
        joined: 5,
    };
    let counted = queue.take_super_packets();
    assert_eq!(
        counted,
        if known {
            expected
        } else {
            SuperPackets::default()
        }
    );
    assert_eq!(queue.take_super_packets(), SuperPackets::default());
    assert_eq!(delivered() - before, if known { 1 } else { 5 });
}

/// Packets that the kernel has taken from the queues.
fn delivered() -> u64 {
    let shown = ip("-statistics -oneline link show dev rip0");
    let mut words = shown
        .split_whitespace()
        .skip_while(|word| *word != "errors");
    let packets = words.find_map(|word| word.parse::<u64>().ok().map(|_| word));
    let _bytes = packets.unwrap();
    words.next().unwrap().parse::<u64>().unwrap()
}

#[test]
fn the_mtu_follows() {
    let queues = behind(|| tun::open(1, Offloads::Off).unwrap());
    assert_eq!(RIP0.mtu().unwrap(), 1500);
    for mtu in [1430, 1450, 8930] {
        RIP0.set_mtu(mtu).unwrap();
        assert_eq!(RIP0.mtu().unwrap(), u32::from(mtu));
    }
    drop(queues);
    assert!(RIP0.mtu().is_err(), "the device went with its queues");
}

#[test]
fn ipv6_is_on_even_where_the_default_is_off() {
    own_namespace();
    let off = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    fs::write(off, "1").unwrap();
    let queues = tun::open(1, Offloads::Off).unwrap();
    let setting = "/proc/sys/net/ipv6/conf/rip0/disable_ipv6";
    assert_eq!(fs::read_to_string(setting).unwrap().trim(), "1");
    RIP0.enable_ipv6().unwrap();
    assert_eq!(fs::read_to_string(setting).unwrap().trim(), "0");
    RIP0.enable_ipv6().unwrap();
    let stray = arrivals(&queues, Duration::from_secs(3));
    assert_eq!(count(&stray), [0], "{stray:02x?}");
}
