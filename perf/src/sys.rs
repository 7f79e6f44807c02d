//! The system calls of the lab that the standard library does not have.
//!
//! Everything in here is a safe function over file descriptors and slices; kernel names stay in
//! this file.

#![expect(
    unsafe_code,
    reason = "namespaces, raw sockets and batched datagrams are bare system calls"
)]

use core::ffi::c_int;
use core::mem;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use core::ptr;
use core::time::Duration;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::address::Family;

/// The most datagrams that one call sends or receives.
pub(crate) const BATCH: usize = 64;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn check_size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_negative| io::Error::last_os_error())
}

/// The size of `T` as the kernel wants it in socket calls.
fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}

/// Moves the calling thread, and only it, into a network namespace.
pub(crate) fn enter_network_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns takes a descriptor, which the borrow keeps open, and a flag; no memory.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Whether the process has the rights of root.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Gives the calling thread, and only it, a nice value.
pub(crate) fn set_thread_nice(nice: c_int) -> io::Result<()> {
    // SAFETY: setpriority takes three numbers; no memory. On Linux a "process" 0 is the thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// The calling thread, by the number that the kernel knows it by.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// CPU time that a thread of this process has taken so far.
pub(crate) fn thread_cpu_time(thread: i32) -> io::Result<Duration> {
    // The clock of a thread's CPU time, per thread and as scheduled (include/linux/posix-timers.h, CPUCLOCK_*).
    let clock = (!thread << 3) | 6;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local that is borrowed exclusively across the call.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Ok(Duration::new(seconds, nanoseconds))
}

/// Restricts a thread to one CPU; 0 is the calling thread.
pub(crate) fn pin(thread: i32, cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is an array of numbers, for which all zeroes is a value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    if cpu >= usize::try_from(libc::CPU_SETSIZE).unwrap_or_default() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number has just been checked to lie in the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and the size are those of `set`, which lives across the call.
    check(unsafe { libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set) })
        .map(drop)
}

/// Sends a signal to one process.
pub(crate) fn signal(pid: i32, signal: c_int) -> io::Result<()> {
    // SAFETY: kill takes two numbers; no memory.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Index of an interface in the namespace of the calling thread.
pub(crate) fn interface_index(name: &str) -> io::Result<c_int> {
    let name = CString::new(name)?;
    // SAFETY: the pointer is to a NUL-terminated string that lives across the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    match c_int::try_from(index) {
        Ok(index) if index > 0 => Ok(index),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}

fn socket(domain: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket takes three numbers; no memory.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A raw ICMP socket in the namespace of the calling thread. The checksums of ICMPv6 are the kernel's
/// work, and what it receives comes without IP header.
pub(crate) fn icmp_socket(family: Family) -> io::Result<OwnedFd> {
    match family {
        Family::Ipv4 => socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        Family::Ipv6 => socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
    }
}

/// A raw IPv4 socket in the namespace of the calling thread that receives one protocol, and sends
/// packets with headers of the sender's own making. It does not block.
pub(crate) fn ipv4_socket(protocol: u8) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK;
    let fd = socket(libc::AF_INET, kind, protocol.into())?;
    set_option(&fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    Ok(fd)
}

/// Sends one packet or datagram to an address. Raw sockets have no port: 0.
pub(crate) fn send_to(
    socket: impl AsFd,
    bytes: &[u8],
    destination: SocketAddrV4,
) -> io::Result<usize> {
    let address = socket_address(destination);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: pointers and lengths describe `bytes` and `address`, which live across the call.
    check_size(unsafe {
        libc::sendto(
            fd,
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            (&raw const address).cast(),
            length_of::<libc::sockaddr_in>(),
        )
    })
}

/// Makes a TUN device in the namespace of the calling thread: bare IP packets, no queues, no
/// offloads. It goes when the descriptor is closed, which does not block.
pub(crate) fn tun(name: &str) -> io::Result<OwnedFd> {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is numbers and pointers, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    let fd = file.as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes the ifreq, which is borrowed exclusively across the call.
    check(unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) })?;
    Ok(file.into())
}

/// Reads one packet from a TUN device.
pub(crate) fn read(file: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length are those of `buffer`, which is borrowed exclusively.
    check_size(unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// Writes one packet to a TUN device.
pub(crate) fn write(file: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length are those of `bytes`.
    check_size(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) })
}

/// Waits until one of two descriptors can be read, at most so many milliseconds.
pub(crate) fn wait_readable(
    one: impl AsFd,
    other: impl AsFd,
    timeout_ms: c_int,
) -> io::Result<bool> {
    let entry = |fd: c_int| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut entries = [
        entry(one.as_fd().as_raw_fd()),
        entry(other.as_fd().as_raw_fd()),
    ];
    // SAFETY: the pointer is to two entries, which are borrowed exclusively across the call.
    let ready = check(unsafe { libc::poll(entries.as_mut_ptr(), 2, timeout_ms) })?;
    Ok(ready > 0)
}

/// A packet socket bound to one interface of the calling thread's namespace. With `receive` it
/// gets every frame in both directions; without, none.
pub(crate) fn packet_socket(interface: &str, receive: bool) -> io::Result<OwnedFd> {
    let index = interface_index(interface)?;
    let fd = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    let protocol = if receive { libc::ETH_P_ALL } else { 0 };
    // SAFETY: sockaddr_ll is plain numbers, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
    address.sll_protocol = u16::try_from(protocol).unwrap_or_default().to_be();
    address.sll_ifindex = index;
    // SAFETY: the pointer and the length describe `address`, which lives across the call.
    check(unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            length_of::<libc::sockaddr_ll>(),
        )
    })?;
    Ok(fd)
}

/// Sets a socket option that is one number.
pub(crate) fn set_option(
    socket: impl AsFd,
    level: c_int,
    name: c_int,
    value: c_int,
) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length describe `value`, which lives across the call.
    check(unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            length_of::<c_int>(),
        )
    })
    .map(drop)
}

/// Gives a socket a receive buffer beyond the machine's limit.
pub(crate) fn set_receive_buffer(socket: impl AsFd, bytes: c_int) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)
}

/// Makes a blocking receive on the socket return after so many milliseconds.
pub(crate) fn set_receive_timeout(socket: impl AsFd, timeout_ms: i64) -> io::Result<()> {
    let value = libc::timeval {
        tv_sec: timeout_ms / 1000,
        tv_usec: timeout_ms % 1000 * 1000,
    };
    let fd = socket.as_fd().as_raw_fd();
    let (level, name) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
    // SAFETY: the pointer and the length describe `value`, which lives across the call.
    check(unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            length_of::<libc::timeval>(),
        )
    })
    .map(drop)
}

/// Sets the don't-fragment bit on everything the socket sends; too long a packet is refused.
pub(crate) fn set_dont_fragment(socket: impl AsFd, family: Family) -> io::Result<()> {
    let (level, name, value) = match family {
        Family::Ipv4 => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        ),
        Family::Ipv6 => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        ),
    };
    set_option(socket, level, name, value)
}

/// Datagrams that the kernel threw away because the socket's buffer was full.
pub(crate) fn socket_drops(socket: impl AsFd) -> io::Result<u32> {
    // Position of the drop count in the answer to SO_MEMINFO (uapi/linux/sock_diag.h).
    const SK_MEMINFO_DROPS: usize = 8;
    let mut values = [0_u32; 16];
    let mut length = length_of::<[u32; 16]>();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointers are to `values` and to its length, which live across the call.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    check(result)?;
    Ok(values[SK_MEMINFO_DROPS])
}

/// Frames that a packet socket had to throw away since this was last asked.
pub(crate) fn packet_socket_drops(socket: impl AsFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = length_of::<libc::tpacket_stats>();
    let fd = socket.as_fd().as_raw_fd();
    let (level, name) = (libc::SOL_PACKET, libc::PACKET_STATISTICS);
    // SAFETY: the pointers are to `statistics` and to its length, which live across the call.
    check(unsafe {
        libc::getsockopt(
            fd,
            level,
            name,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    })?;
    Ok(statistics.tp_drops)
}

/// Sends bytes on a connected or bound socket.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length are those of `bytes`.
    check_size(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) })
}

/// Receives into a buffer.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length are those of `buffer`, which is borrowed exclusively.
    check_size(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) })
}

/// Receives one frame from a packet socket; says whether this machine sent it.
pub(crate) fn receive_frame(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    // SAFETY: sockaddr_ll is plain numbers, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    let mut length = length_of::<libc::sockaddr_ll>();
    let fd = socket.as_fd().as_raw_fd();
    let (bytes, capacity) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: `bytes` and `capacity` are those of `buffer`, which is borrowed exclusively; the other
    // two pointers are to locals that live across the call, and `length` is the size of `address`.
    let received = check_size(unsafe {
        libc::recvfrom(
            fd,
            bytes,
            capacity,
            0,
            (&raw mut address).cast(),
            &raw mut length,
        )
    })?;
    Ok((received, address.sll_pkttype == libc::PACKET_OUTGOING))
}

/// Connects a raw socket, so that it receives only what that peer sends.
pub(crate) fn connect(socket: impl AsFd, peer: IpAddr) -> io::Result<()> {
    let address = Address::of(SocketAddr::new(peer, 0));
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length describe `address`, which lives across the call.
    check(unsafe { libc::connect(fd, (&raw const address.storage).cast(), address.length) })
        .map(drop)
}

/// An address as the kernel wants it.
#[derive(Clone, Copy)]
struct Address {
    storage: libc::sockaddr_in6,
    length: libc::socklen_t,
}

impl Address {
    fn of(address: SocketAddr) -> Self {
        // SAFETY: sockaddr_in6 is plain numbers, for which all zeroes is a value.
        let mut storage: libc::sockaddr_in6 = unsafe { mem::zeroed() };
        match address {
            SocketAddr::V4(address) => {
                let four = socket_address(address);
                // SAFETY: both are plain numbers, and the IPv4 form is the shorter and has no
                // stricter alignment.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(four) };
                Self {
                    storage,
                    length: length_of::<libc::sockaddr_in>(),
                }
            }
            SocketAddr::V6(address) => {
                storage.sin6_family = u16::try_from(libc::AF_INET6).unwrap_or_default();
                storage.sin6_port = address.port().to_be();
                storage.sin6_addr.s6_addr = address.ip().octets();
                Self {
                    storage,
                    length: length_of::<libc::sockaddr_in6>(),
                }
            }
        }
    }

    /// The address without its port.
    fn ip(&self) -> IpAddr {
        if i32::from(self.storage.sin6_family) == libc::AF_INET6 {
            return Ipv6Addr::from(self.storage.sin6_addr.s6_addr).into();
        }
        // The IPv4 address stands where an IPv6 one has its flow label.
        Ipv4Addr::from(self.storage.sin6_flowinfo.to_ne_bytes()).into()
    }
}

fn socket_address(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: u16::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.ip().octets()),
        },
        sin_zero: [0; 8],
    }
}

fn empty_message() -> libc::mmsghdr {
    // SAFETY: mmsghdr is numbers and pointers, for which all zeroes is a value (null).
    unsafe { mem::zeroed() }
}

/// Sends up to [`BATCH`] datagrams to one destination in one call. Returns how many were taken;
/// an error means that not even the first was.
pub(crate) fn send_batch(
    socket: impl AsFd,
    destination: SocketAddr,
    datagrams: &[Vec<u8>],
) -> io::Result<usize> {
    let mut address = Address::of(destination);
    let mut vectors = [libc::iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let mut messages = [empty_message(); BATCH];
    let mut count = 0;
    for ((datagram, vector), message) in datagrams.iter().zip(&mut vectors).zip(&mut messages) {
        vector.iov_base = datagram.as_ptr().cast_mut().cast();
        vector.iov_len = datagram.len();
        message.msg_hdr.msg_name = (&raw mut address.storage).cast();
        message.msg_hdr.msg_namelen = address.length;
        message.msg_hdr.msg_iov = vector;
        message.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the first `count` messages point at one vector each, these at the datagrams, and all at
    // `address`; all of them outlive the call, and sending only reads the datagrams.
    let sent = check(unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count, 0) })?;
    Ok(usize::try_from(sent).unwrap_or_default())
}

/// A received datagram: its length, cut off at its buffer's, and its sender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) length: usize,
    pub(crate) source: IpAddr,
}

/// Waits for a datagram, then receives it and what else is there, up to the number of buffers or
/// [`BATCH`]. Returns one arrival per buffer that was filled.
pub(crate) fn receive_batch(
    socket: impl AsFd,
    buffers: &mut [Vec<u8>],
) -> io::Result<Vec<Arrival>> {
    let mut vectors = [libc::iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let mut messages = [empty_message(); BATCH];
    let mut sources = [Address::of((Ipv6Addr::UNSPECIFIED, 0).into()); BATCH];
    let mut count = 0;
    for (((buffer, vector), message), source) in buffers
        .iter_mut()
        .zip(&mut vectors)
        .zip(&mut messages)
        .zip(&mut sources)
    {
        vector.iov_base = buffer.as_mut_ptr().cast();
        vector.iov_len = buffer.len();
        message.msg_hdr.msg_name = (&raw mut source.storage).cast();
        message.msg_hdr.msg_namelen = source.length;
        message.msg_hdr.msg_iov = vector;
        message.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    let fd = socket.as_fd().as_raw_fd();
    let flags = libc::MSG_WAITFORONE;
    // SAFETY: the first `count` messages point at one vector and one address each, and the vectors at
    // the buffers with their initialized lengths; all outlive the call, and the buffers are borrowed
    // exclusively.
    let received =
        check(unsafe { libc::recvmmsg(fd, messages.as_mut_ptr(), count, flags, ptr::null_mut()) })?;
    let arrivals = messages
        .iter()
        .zip(&sources)
        .take(usize::try_from(received).unwrap_or_default());
    Ok(arrivals
        .map(|(message, source)| Arrival {
            length: usize::try_from(message.msg_len).unwrap_or_default(),
            source: source.ip(),
        })
        .collect())
}
