//! The system calls, and the kernel's names for what they take.
//!
//! Sources: `include/uapi/linux/if_xdp.h`, `net/xdp/xsk.c`, `net/xdp/xdp_umem.c`. Every function
//! here is safe: it passes the kernel only pointers to values that it borrows.
#![expect(unsafe_code, reason = "system calls")]

use core::ffi::{CStr, c_int};
use core::mem::{self, size_of};
use core::ptr;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub(crate) use libc::{
    SO_BUSY_POLL, SO_BUSY_POLL_BUDGET, SO_PREFER_BUSY_POLL, SOL_SOCKET, SOL_XDP, XDP_COPY,
    XDP_MMAP_OFFSETS, XDP_OPTIONS, XDP_OPTIONS_ZEROCOPY, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
    XDP_PKT_CONTD, XDP_RX_RING, XDP_SHARED_UMEM, XDP_STATISTICS, XDP_TX_METADATA, XDP_TX_RING,
    XDP_TXMD_FLAGS_CHECKSUM, XDP_UMEM_COMPLETION_RING, XDP_UMEM_FILL_RING,
    XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XDP_UMEM_REG,
    XDP_UMEM_TX_METADATA_LEN, XDP_USE_NEED_WAKEUP, XDP_USE_SG, XDP_ZEROCOPY, sockaddr_xdp,
    xdp_desc, xdp_mmap_offsets, xdp_options, xdp_ring_offset, xdp_statistics, xdp_umem_reg,
};

/// Descriptors that one `sendto` may send in copy mode (Linux 6.17, not in libc).
pub(crate) const XDP_MAX_TX_BUDGET: c_int = 9;

/// The network namespace of a socket as a number (Linux 5.14, `include/uapi/asm-generic/socket.h`,
/// not in libc).
pub(crate) const SO_NETNS_COOKIE: c_int = 71;

/// Bytes that copy mode leaves free before a received packet, whatever the UMEM's headroom.
pub(crate) const XDP_PACKET_HEADROOM: u16 = 256;

/// `struct xsk_tx_metadata` as of Linux 6.14, whose request part has a launch time that libc's
/// lacks. It lies directly before the packet.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TxMetadata {
    pub(crate) flags: u64,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
    pub(crate) pad: u32,
    pub(crate) launch_time: u64,
}

const _: () = assert!(size_of::<TxMetadata>() == 24);

/// Values that travel through socket options: plain integers, for which any bytes are a value.
///
/// # Safety
///
/// Every bit pattern, all zeros among them, is a valid value, and the type has no padding.
pub(crate) unsafe trait OptionValue: Copy {}

// SAFETY: an integer.
unsafe impl OptionValue for c_int {}
// SAFETY: an integer.
unsafe impl OptionValue for u32 {}
// SAFETY: an integer.
unsafe impl OptionValue for u64 {}
// SAFETY: two u64, then four u32: no padding.
unsafe impl OptionValue for xdp_umem_reg {}
// SAFETY: only u64.
unsafe impl OptionValue for xdp_mmap_offsets {}
// SAFETY: only u64.
unsafe impl OptionValue for xdp_statistics {}
// SAFETY: one u32.
unsafe impl OptionValue for xdp_options {}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn socklen<T>() -> libc::socklen_t {
    const { assert!(size_of::<T>() <= 1024) };
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let len = size_of::<T>() as libc::socklen_t;
    len
}

/// Opens an AF_XDP socket in the network namespace of the calling thread.
pub(crate) fn open_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_XDP, kind, 0) })?;
    // SAFETY: a descriptor just received, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets a socket option.
pub(crate) fn set_option<T: OptionValue>(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: T,
) -> io::Result<()> {
    let place = ptr::from_ref(&value).cast();
    // SAFETY: `place` points to `socklen` initialized bytes for the duration of the call.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, place, socklen::<T>()) };
    check(result).map(drop)
}

/// Reads a socket option. What an older kernel does not fill in is zero.
pub(crate) fn option<T: OptionValue>(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
) -> io::Result<T> {
    // SAFETY: all zeros is a valid `T` by the contract of `OptionValue`.
    let mut value: T = unsafe { mem::zeroed() };
    let mut len = socklen::<T>();
    let place = ptr::from_mut(&mut value).cast();
    // SAFETY: `place` is valid for writing `len` bytes, and any bytes are a valid `T`.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, place, &raw mut len) };
    check(result)?;
    Ok(value)
}

/// Binds the socket to a queue.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &sockaddr_xdp) -> io::Result<()> {
    let place = ptr::from_ref(address).cast();
    // SAFETY: `place` points to an initialized address of the given length.
    let result = unsafe { libc::bind(fd.as_raw_fd(), place, socklen::<sockaddr_xdp>()) };
    check(result).map(drop)
}

/// Tells the kernel to look at the TX ring.
#[inline]
pub(crate) fn send_wakeup(fd: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, flags) = (fd.as_raw_fd(), libc::MSG_DONTWAIT);
    // SAFETY: no buffer and no address are passed, with lengths of zero.
    let sent = unsafe { libc::sendto(fd, ptr::null(), 0, flags, ptr::null(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Tells the kernel to look at the fill ring.
#[inline]
pub(crate) fn receive_wakeup(fd: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, flags) = (fd.as_raw_fd(), libc::MSG_DONTWAIT);
    let (address, len) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: no buffer and no address are passed.
    let received = unsafe { libc::recvfrom(fd, ptr::null_mut(), 0, flags, address, len) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a memory file of `len` bytes whose length is sealed, so that no holder of it can shrink
/// it below a mapping.
pub(crate) fn memory_file(len: libc::off_t, flags: libc::c_uint) -> io::Result<OwnedFd> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string with its terminating zero.
    let fd = check(unsafe { libc::memfd_create(c"af-xdp umem".as_ptr(), flags) })?;
    // SAFETY: a descriptor just received, which nobody else owns.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes no pointers.
    check(unsafe { libc::ftruncate(file.as_raw_fd(), len) })?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: takes no pointers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// The index of a network interface, in the network namespace of the calling thread.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a string with its terminating zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(index)
}

/// The name of a network interface, in the network namespace of the calling thread.
pub(crate) fn interface_name(index: u32) -> io::Result<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the length that the call requires.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has written a string with its terminating zero.
    let name = unsafe { CStr::from_ptr(found) };
    Ok(name.to_string_lossy().into_owned())
}

/// The limit of locked memory of this process, in bytes.
pub(crate) fn locked_memory_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for writing.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    debug_assert_eq!(result, 0, "getrlimit knows RLIMIT_MEMLOCK");
    limit.rlim_cur
}
