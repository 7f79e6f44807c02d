//! The host door as a TUN device: `rip0`, one queue per worker.
//!
//! The device is not persistent: it lives as long as this process holds its descriptors. When the process dies the
//! kernel removes it, with it every route through it, and the next packet takes the main table.
//!
//! Each packet is one read or write, with a virtio-net header before it. No offload is negotiated, so that header is
//! always zero: checksums are complete and no packet is longer than the MTU.
#![expect(
    unsafe_code,
    reason = "TUN queues are made by ioctl(2) and read with readv(2)"
)]

use core::ffi::{c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use af_xdp::Umem;

use crate::port::{Burst, Port, Transmitted};
use crate::verdict::{DropReason, HEADER_MAX};

/// Name of the host door.
pub const HOST_DOOR: &str = "rip0";

/// Length of `struct virtio_net_hdr` without the merged-buffers field (include/uapi/linux/virtio_net.h).
const VIRTIO_HEADER_LEN: usize = 10;
/// Packets that the kernel queues for a worker that is late. The kernel's own default of 500 is 25 ms of 20,000
/// packets a second, less than a busy machine's scheduler takes now and then.
const QUEUE_PACKETS: c_int = 2048;
/// Room before a packet for the longest header that is pushed, so placed that the packet starts on a cache line.
const HEADROOM: usize = (FRAME_RESERVED + HEADER_MAX).next_multiple_of(CACHE_LINE) - FRAME_RESERVED;
const FRAME_RESERVED: usize = af_xdp::FRAME_RESERVED as usize;
const CACHE_LINE: usize = 64;

/// Why the host door could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The TUN driver is missing.
    #[error(
        "open /dev/net/tun: {source}; load the tun module (modprobe tun), and in a container mount /dev/net/tun"
    )]
    Device {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused an operation on the device.
    #[error("{operation} {HOST_DOOR}: {source}; {advice}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
}

/// One queue of the device.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
    /// Whether the kernel hands packets to this queue.
    open: bool,
}

/// Makes the device with `queues` queues and brings it up.
///
/// # Errors
/// When there is no TUN driver, a device of this name exists, or CAP_NET_ADMIN is missing.
pub fn open(queues: usize) -> Result<Vec<TunQueue>, TunError> {
    let opened: Vec<TunQueue> = (0..queues)
        .map(|_| TunQueue::new())
        .collect::<Result<_, _>>()?;
    keep_quiet();
    // Packets come in here while the way back may still lead through the standby. A reverse-path filter takes that for
    // forgery, even a loose one (2, as systemd sets it for new devices), because this device has no address
    // (net/ipv4/fib_frontend.c, `last_resort` in `__fib_validate_source`). The workers check each source.
    let _ = std::fs::write(sysctl("ipv4", "rp_filter"), "0");
    set_up(QUEUE_PACKETS).map_err(|source| TunError::Refused {
        operation: "bring up",
        source,
        advice: "the process needs CAP_NET_ADMIN",
    })?;
    Ok(opened)
}

/// Directory in place of `/proc/sys`, which a container has read-only: the host's, mounted elsewhere.
const SYSCTL_VARIABLE: &str = "RIPSTOP_PROC_SYS";

/// The file of a setting of the device.
fn sysctl(family: &str, setting: &str) -> PathBuf {
    std::env::var_os(SYSCTL_VARIABLE)
        .map_or_else(|| PathBuf::from("/proc/sys"), PathBuf::from)
        .join(format!("net/{family}/conf/{HOST_DOOR}/{setting}"))
}

/// Least MTU for IPv6 (RFC 8200 section 5); the kernel has no IPv6 on a device of less.
const IPV6_MTU_MIN: u16 = 1280;

/// Keeps the kernel from sending packets of its own to the device: they would arrive at the workers, who have no use
/// for them. To be called before the device is up. Best effort: a kernel without IPv6 has none of this.
///
/// IPv6 itself stays on, because pods are reached over it. What it would send are a neighbour solicitation for a
/// link-local address, router solicitations, and reports of multicast groups. There is no such address, nobody listens
/// to routers, and a device that is not capable of multicast is in no group but those that are never reported.
fn keep_quiet() {
    let _ = change_flags(|flags| flags & !libc::IFF_MULTICAST);
    // Where forwarding is on, the device has joined the group of routers when it was made, and leaving it is reported,
    // too. So let IPv6 forget the device, and take it up again as it is (net/ipv6/addrconf.c, NETDEV_CHANGEMTU).
    if let Ok(mtu) = mtu().and_then(|mtu| u16::try_from(mtu).map_err(io::Error::other)) {
        let _ = change_mtu(IPV6_MTU_MIN - 1).and_then(|()| change_mtu(mtu));
    }
    configure_nothing();
}

/// No address, no autoconfiguration, no routers.
fn configure_nothing() {
    for (setting, value) in [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("autoconf", "0"),
        ("router_solicitations", "0"),
    ] {
        let _ = std::fs::write(sysctl("ipv6", setting), value);
    }
}

/// Switches IPv6 on where the machine's default has it off, as pods are to be reached over it.
///
/// # Errors
/// When the kernel has no IPv6, or does not let this process change it.
pub fn enable_ipv6() -> io::Result<()> {
    let path = sysctl("ipv6", "disable_ipv6");
    if std::fs::read_to_string(&path)?.trim() == "0" {
        return Ok(());
    }
    std::fs::write(path, "0")
}

/// Largest packet that the kernel hands to the device.
///
/// # Errors
/// When the device is gone.
pub fn mtu() -> io::Result<u32> {
    let answer = interface_ioctl(libc::SIOCGIFMTU, |_request| {})?;
    // SAFETY: SIOCGIFMTU has filled the union's MTU.
    let mtu = unsafe { answer.ifr_ifru.ifru_mtu };
    Ok(mtu.unsigned_abs())
}

/// Changes the largest packet that the kernel hands to the device.
///
/// # Errors
/// When the device is gone, or the process lacks CAP_NET_ADMIN.
pub fn set_mtu(mtu: u16) -> io::Result<()> {
    change_mtu(mtu)?;
    // From less than IPv6 needs to enough, the kernel has just taken IPv6 up with its own defaults.
    configure_nothing();
    Ok(())
}

fn change_mtu(mtu: u16) -> io::Result<()> {
    interface_ioctl(libc::SIOCSIFMTU, |request| {
        request.ifr_ifru.ifru_mtu = mtu.into();
    })?;
    Ok(())
}

impl TunQueue {
    fn new() -> Result<Self, TunError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options
            .open("/dev/net/tun")
            .map_err(|source| TunError::Device { source })?;
        let refused = |operation, advice| {
            move |source| TunError::Refused {
                operation,
                source,
                advice,
            }
        };
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let mut request = request();
        request.ifr_ifru.ifru_flags = short(flags);
        // SAFETY: TUNSETIFF reads and writes the `ifreq` that it is given, which is valid and whole.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        let taken = "if another program made a device of this name, remove it (ip link del rip0); CAP_NET_ADMIN is needed";
        check(answer).map_err(refused("make a queue of", taken))?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0) };
        check(answer).map_err(refused(
            "switch offloads off on",
            "this kernel's TUN driver is too old",
        ))?;
        Ok(Self { file, open: true })
    }

    /// Reads one packet into `buffer`; `None` when there is none.
    fn read(&self, buffer: &mut [u8]) -> Option<usize> {
        let mut header = [0u8; VIRTIO_HEADER_LEN];
        let parts = [
            libc::iovec {
                iov_base: header.as_mut_ptr().cast(),
                iov_len: header.len(),
            },
            libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            },
        ];
        // SAFETY: both parts point to memory of the stated length that is borrowed exclusively for the call.
        let read = unsafe { libc::readv(self.file.as_raw_fd(), parts.as_ptr(), 2) };
        usize::try_from(read).ok()?.checked_sub(VIRTIO_HEADER_LEN)
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Port for TunQueue {
    const REFUSED: DropReason = DropReason::HostWriteFailed;

    /// Attaches or detaches the queue. A detached one gets no packets, and the kernel spreads its flows over the others;
    /// what it writes is still taken. Packets that wait in it are lost.
    fn open(&mut self, open: bool) {
        if open == self.open {
            return;
        }
        let flag = if open {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut request = request();
        request.ifr_ifru.ifru_flags = short(flag);
        // SAFETY: TUNSETQUEUE reads the `ifreq` that it is given, which is valid and whole.
        let answer =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        // The kernel refuses only what is so already.
        if check(answer).is_ok() {
            self.open = open;
        }
    }

    fn reclaim(&mut self, _umem: &mut Umem) {}

    fn refill(&mut self, _umem: &mut Umem) {}

    #[inline]
    fn receive(&mut self, umem: &mut Umem, burst: &mut Burst, most: usize) {
        while burst.len() < most {
            let Some(mut frame) = umem.take() else { return };
            let read = match umem.whole_mut(&mut frame, HEADROOM) {
                Ok(buffer) => self.read(buffer),
                Err(_no_room) => None,
            };
            match read {
                Some(len) if frame.set_len(len).is_ok() => burst.push(frame),
                _ => {
                    umem.give(frame);
                    return;
                }
            }
        }
    }

    fn room(&mut self) -> usize {
        usize::MAX
    }

    /// Writes each packet; one that the kernel refuses stays in the burst.
    #[inline]
    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        let mut sent = Transmitted::default();
        let mut refused = 0;
        for at in 0..burst.len() {
            let packet = umem.packet(&burst[at]);
            let bytes = packet.len() as u64;
            let parts = [IoSlice::new(&[0; VIRTIO_HEADER_LEN]), IoSlice::new(packet)];
            if (&self.file).write_vectored(&parts).is_ok() {
                sent.packets += 1;
                sent.bytes += bytes;
            } else {
                burst.swap(refused, at);
                refused += 1;
            }
        }
        for frame in burst.drain(refused..) {
            umem.give(frame);
        }
        sent
    }

    fn pending(&self) -> usize {
        0
    }

    fn flush(&mut self) -> u64 {
        0
    }
}

/// An `ifreq` that names the device.
fn request() -> libc::ifreq {
    // SAFETY: `ifreq` is plain integers and bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(HOST_DOOR.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    request
}

/// Sets the transmit queue's length and brings the device up.
fn set_up(queue_packets: c_int) -> io::Result<()> {
    interface_ioctl(libc::SIOCSIFTXQLEN, |request| {
        // struct ifreq has no name for ifr_qlen; it shares the union's first integer with the metric.
        request.ifr_ifru.ifru_metric = queue_packets;
    })?;
    change_flags(|flags| flags | libc::IFF_UP)
}

/// Takes the device down: the kernel withdraws every route through it at once.
///
/// # Errors
/// When the kernel refuses.
pub fn take_down() -> io::Result<()> {
    change_flags(|flags| flags & !libc::IFF_UP)
}

fn change_flags(change: impl FnOnce(c_int) -> c_int) -> io::Result<()> {
    let answer = interface_ioctl(libc::SIOCGIFFLAGS, |_request| {})?;
    // SAFETY: SIOCGIFFLAGS has filled the union's flags.
    let current = unsafe { answer.ifr_ifru.ifru_flags };
    let wanted = change(c_int::from(current));
    interface_ioctl(libc::SIOCSIFFLAGS, |request| {
        request.ifr_ifru.ifru_flags = short(wanted);
    })?;
    Ok(())
}

/// An interface ioctl on the device, through a socket made for it.
fn interface_ioctl(
    command: libc::c_ulong,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<libc::ifreq> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")
        .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
    let mut request = request();
    fill(&mut request);
    // SAFETY: interface ioctls read and write the `ifreq` that they are given, which is valid and whole.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), command, &raw mut request) })?;
    Ok(request)
}

fn check(answer: c_int) -> io::Result<()> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Interface flags as the kernel's `short`: the bits are kept, the sign means nothing.
fn short(flags: c_int) -> c_short {
    let [low, high, ..] = flags.to_le_bytes();
    c_short::from_le_bytes([low, high])
}
