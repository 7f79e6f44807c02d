//! The system calls of the engines that no crate has: maps in memory, BPF links, clocks, interface properties.

#![expect(unsafe_code, reason = "bare system calls and mapped memory")]

use core::ffi::{c_int, c_ulong};
use core::mem;
use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU64;
use core::time::Duration;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

use crate::address::Mac;

/// An interface of Ethernet frames (`ARPHRD_ETHER`).
const HARDWARE_ETHERNET: u16 = 1;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The words of a mapped BPF array map. The kernel's programs write them at any time.
#[derive(Debug)]
pub(super) struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the memory is shared with the kernel anyway, and reached only through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps so many words of a map made with `BPF_F_MMAPABLE`.
    pub(super) fn map(map: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, flags) = (map.as_raw_fd(), libc::MAP_SHARED);
        // SAFETY: a mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe { libc::mmap(ptr::null_mut(), count * 8, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { start, count })
    }
}

impl core::ops::Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `map` mapped so many words there, page-aligned, and they stay until `drop`; an atomic may be shared
        // with whoever else writes it.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: `map` mapped exactly this, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * 8) };
    }
}

/// Where a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttachPoint {
    /// XDP in the driver.
    Driver,
    /// `tcx`, before what is there.
    Ingress,
}

/// Attaches a program to an interface of the calling thread's namespace. Closing the link, as the end of the process
/// does, detaches it.
pub(super) fn link(
    program: BorrowedFd<'_>,
    interface: u32,
    point: AttachPoint,
) -> io::Result<OwnedFd> {
    let (kind, flags) = match point {
        AttachPoint::Driver => (libbpf_sys::BPF_XDP, libbpf_sys::XDP_FLAGS_DRV_MODE),
        AttachPoint::Ingress => (libbpf_sys::BPF_TCX_INGRESS, libbpf_sys::BPF_F_BEFORE),
    };
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        flags,
        ..Default::default()
    };
    let interface = c_int::try_from(interface).map_err(io::Error::other)?;
    // SAFETY: the program's descriptor is open, `options` is whole, carries its own size and outlives the call.
    let link = unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), interface, kind, &raw const options)
    };
    if link < 0 {
        return Err(io::Error::from_raw_os_error(-link));
    }
    // SAFETY: a descriptor that the kernel has just given to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Runs an XDP program on so many frames of the kernel's own, which then go where it redirects them
/// (`BPF_F_TEST_XDP_LIVE_FRAMES`). They begin as a copy of `blank`, or as whoever had the page left it.
pub(super) fn run_live(program: BorrowedFd<'_>, blank: &[u8], frames: u32) -> io::Result<()> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: blank.as_ptr().cast(),
        data_size_in: u32::try_from(blank.len()).map_err(io::Error::other)?,
        repeat: c_int::try_from(frames).map_err(io::Error::other)?,
        flags: libbpf_sys::BPF_F_TEST_XDP_LIVE_FRAMES,
        ..Default::default()
    };
    // SAFETY: the descriptor is open, `options` is whole and carries its own size, and with `blank`, which the kernel only
    // reads, outlives the call.
    let result =
        unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(())
}

fn clock(which: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local that lives across the call.
    unsafe { libc::clock_gettime(which, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanoseconds)
}

/// A duration in nanoseconds.
pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// CLOCK_MONOTONIC in nanoseconds: what BPF programs call `bpf_ktime_get_ns`.
pub(super) fn monotonic_ns() -> u64 {
    nanoseconds(clock(libc::CLOCK_MONOTONIC))
}

/// CLOCK_REALTIME.
pub(super) fn realtime() -> Duration {
    clock(libc::CLOCK_REALTIME)
}

/// CPU time of the calling thread.
pub(super) fn thread_cpu() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Makes sleeps of the calling thread end within a microsecond of their time instead of 50.
pub(super) fn sleep_exactly() {
    // SAFETY: a number; no memory.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as c_ulong) };
}

/// Waits until one of the descriptors can be read, at most so long.
pub(super) fn wait_readable(entries: &mut [libc::pollfd], timeout: Duration) -> io::Result<bool> {
    let count = libc::nfds_t::try_from(entries.len()).map_err(io::Error::other)?;
    let timeout = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: the pointer and the number are those of `entries`, which are borrowed exclusively.
    Ok(check(unsafe { libc::poll(entries.as_mut_ptr(), count, timeout) })? > 0)
}

/// What to wait for on a descriptor.
pub(super) fn readable(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

/// Moves the calling thread, and only it, into a network namespace that did not exist.
pub(super) fn unshare_network() -> io::Result<()> {
    // SAFETY: a flag; no memory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// What an interface is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Properties {
    /// Whether its frames have Ethernet headers.
    pub(super) ethernet: bool,
    /// Whether it is up.
    pub(super) up: bool,
    /// Whether it can send and receive, as far as the driver knows: a NIC has a carrier.
    pub(super) running: bool,
    /// Its driver's name; empty where none is told.
    pub(super) driver: String,
    /// Its address, where it has Ethernet headers.
    pub(super) mac: Mac,
    /// Megabits a second, where the driver tells.
    pub(super) speed_mbps: Option<u32>,
}

/// Asks an interface of the calling thread's namespace.
pub(super) fn properties(name: &str) -> io::Result<Properties> {
    let socket = std::net::UdpSocket::bind((core::net::Ipv4Addr::UNSPECIFIED, 0))
        .or_else(|_no_v4| std::net::UdpSocket::bind((core::net::Ipv6Addr::UNSPECIFIED, 0)))?;
    // SAFETY: ifreq is numbers and pointers, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: SIOCGIFHWADDR reads and writes the ifreq, which is borrowed exclusively across the call.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFHWADDR, &raw mut request) })?;
    // SAFETY: the call above has filled this member.
    let hardware = unsafe { request.ifr_ifru.ifru_hwaddr };
    let [a, b, c, d, e, f, ..] = hardware.sa_data.map(libc::c_char::cast_unsigned);
    // SAFETY: as the first call.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the call above has filled this member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(Properties {
        ethernet: hardware.sa_family == HARDWARE_ETHERNET,
        up: i32::from(flags) & libc::IFF_UP != 0,
        running: i32::from(flags) & libc::IFF_RUNNING != 0,
        driver: driver(fd, request).unwrap_or_default(),
        mac: Mac([a, b, c, d, e, f]),
        speed_mbps: speed(fd, request).ok().flatten(),
    })
}

/// Bytes of `struct ethtool_drvinfo` (uapi/linux/ethtool.h), and where the driver's name is in it.
const DRIVER_INFO_BYTES: usize = 196;
const DRIVER_NAME: core::ops::Range<usize> = 4..36;
const ETHTOOL_GDRVINFO: u32 = 3;

fn driver(fd: c_int, mut request: libc::ifreq) -> io::Result<String> {
    let mut information = [0_u32; DRIVER_INFO_BYTES / 4];
    information[0] = ETHTOOL_GDRVINFO;
    request.ifr_ifru.ifru_data = information.as_mut_ptr().cast();
    // SAFETY: SIOCETHTOOL reads the ifreq, and reads and writes the drvinfo that it points to; both live across the call.
    check(unsafe { libc::ioctl(fd, libc::SIOCETHTOOL, &raw mut request) })?;
    let bytes: Vec<u8> = information
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let name = bytes[DRIVER_NAME].split(|byte| *byte == 0).next();
    Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned())
}

/// Bytes of `struct ethtool_cmd` (uapi/linux/ethtool.h), which every driver answers to, and where the two halves of the speed
/// are in it.
const SETTINGS_BYTES: usize = 44;
const SPEED_LOW: usize = 12;
const SPEED_HIGH: usize = 28;
const ETHTOOL_GSET: u32 = 1;
/// `SPEED_UNKNOWN`.
const UNKNOWN: u32 = u32::MAX;

fn speed(fd: c_int, mut request: libc::ifreq) -> io::Result<Option<u32>> {
    let mut settings = [0_u32; SETTINGS_BYTES / 4];
    settings[0] = ETHTOOL_GSET;
    request.ifr_ifru.ifru_data = settings.as_mut_ptr().cast();
    // SAFETY: SIOCETHTOOL reads the ifreq, and reads and writes the ethtool_cmd that it points to; both live across the call.
    check(unsafe { libc::ioctl(fd, libc::SIOCETHTOOL, &raw mut request) })?;
    let bytes: Vec<u8> = settings
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let half = |at: usize| u32::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
    let speed = half(SPEED_HIGH) << 16 | half(SPEED_LOW);
    // Some say 65535 where they know nothing.
    Ok(Some(speed).filter(|speed| !matches!(*speed, 0 | 0xffff | UNKNOWN)))
}

/// Bytes of `struct perf_event_attr` in its first version (`PERF_ATTR_SIZE_VER0`): type, size, config, and more that is 0.
const EVENT_BYTES: u32 = 64;
/// Of `perf_event_open(2)`.
const PERF_FLAG_FD_CLOEXEC: c_ulong = 1 << 3;

/// A counter of a hardware event on one CPU, for all processes; it runs.
pub(super) fn count_event(cpu: usize, event: u64) -> io::Result<OwnedFd> {
    let mut attribute = [0_u64; 8];
    // Type 0 is hardware; the size is in the upper half of the first word on a little-endian machine.
    let [kind, size] = [0_u32.to_ne_bytes(), EVENT_BYTES.to_ne_bytes()];
    let [a, b, c, d] = kind;
    let [e, f, g, h] = size;
    attribute[0] = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    attribute[1] = event;
    let cpu = c_int::try_from(cpu).map_err(io::Error::other)?;
    let (all, no_group, flags) = (-1, -1, PERF_FLAG_FD_CLOEXEC);
    // SAFETY: the kernel reads as many bytes as the attribute says it has, which are there across the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attribute.as_ptr(),
            all,
            cpu,
            no_group,
            flags,
        )
    };
    let fd = c_int::try_from(fd).map_err(io::Error::other)?;
    check(fd)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
