//! The host door in this kernel: what arrives in its queues, and what does not.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread.

#![expect(unsafe_code, reason = "unshare and poll by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::time::Duration;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::Instant;

use ripstop_dataplane::port::Port;
use ripstop_dataplane::tun::{self, TunQueue};

/// `struct virtio_net_hdr` before each packet.
const HEADER: usize = 10;

/// Gives the calling thread a network namespace with addresses and routes to two networks behind the host door.
fn host_door(queues: usize) -> Vec<TunQueue> {
    // SAFETY: takes a number; only this thread changes its namespace.
    let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        status,
        0,
        "these tests need root (a network namespace of their own): {}",
        io::Error::last_os_error()
    );
    for family in ["ipv4", "ipv6"] {
        sysctl(family, "1");
    }
    ip("link set lo up");
    ip("address add 192.0.2.1/32 dev lo");
    ip("address add 2001:db8::1/128 dev lo nodad");
    let queues = tun::open(queues).unwrap();
    ip("route add 10.244.0.0/16 dev rip0");
    ip("route add fd00::/16 dev rip0");
    queues
}

fn sysctl(family: &str, forwarding: &str) {
    fs::write(
        format!("/proc/sys/net/{family}/conf/all/forwarding"),
        forwarding,
    )
    .unwrap();
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

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

/// Sends `flows` UDP packets of different flows to a pod behind the host door.
fn send(to: &str, flows: u32) {
    for _ in 0..flows {
        let any = if to.contains('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.send_to(b"hello", to).unwrap();
    }
}

#[test]
fn the_kernel_sends_nothing_of_its_own() {
    let queues = host_door(2);
    // The first report of a group comes within a second of joining it, the next ones within two more
    // (net/ipv6/mcast.c, mld_ifc_event and unsolicited_report_interval).
    let stray = arrivals(&queues, Duration::from_secs(4));
    assert_eq!(count(&stray), [0, 0], "{stray:02x?}");
    // Turning forwarding on makes a device join the groups of routers.
    for forwarding in ["0", "1"] {
        sysctl("ipv6", forwarding);
        sysctl("ipv4", forwarding);
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
    let mut queues = host_door(2);
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

    let delivered = || {
        let shown = ip("-statistics -oneline link show dev rip0");
        let mut words = shown
            .split_whitespace()
            .skip_while(|word| *word != "errors");
        let packets = words.find_map(|word| word.parse::<u64>().ok().map(|_| word));
        let _bytes = packets.unwrap();
        words.next().unwrap().parse::<u64>().unwrap()
    };
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

#[test]
fn the_mtu_follows() {
    let queues = host_door(1);
    assert_eq!(tun::mtu().unwrap(), 1500);
    for mtu in [1430, 1450, 8930] {
        tun::set_mtu(mtu).unwrap();
        assert_eq!(tun::mtu().unwrap(), u32::from(mtu));
    }
    drop(queues);
    assert!(tun::mtu().is_err(), "the device went with its queues");
}

#[test]
fn ipv6_is_on_even_where_the_default_is_off() {
    // SAFETY: takes a number; only this thread changes its namespace.
    unsafe { libc::unshare(libc::CLONE_NEWNET) };
    let off = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    fs::write(off, "1").unwrap();
    let queues = tun::open(1).unwrap();
    let setting = "/proc/sys/net/ipv6/conf/rip0/disable_ipv6";
    assert_eq!(fs::read_to_string(setting).unwrap().trim(), "1");
    tun::enable_ipv6().unwrap();
    assert_eq!(fs::read_to_string(setting).unwrap().trim(), "0");
    tun::enable_ipv6().unwrap();
    let stray = arrivals(&queues, Duration::from_secs(3));
    assert_eq!(count(&stray), [0], "{stray:02x?}");
}
