//! What arrives at a device, as a packet socket sees it.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use af_xdp::Interface;

/// A socket for the frames of a protocol, a number in host order. A read waits for them, but not forever.
pub(crate) fn packet_socket(device: &str, protocol: u16) -> File {
    let protocol = protocol.to_be();
    // SAFETY: takes numbers, and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into()) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { core::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(Interface::by_name(device).unwrap().index()).unwrap();
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: an initialized address of the given length.
    let status = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
    assert_eq!(status, 0, "{}", io::Error::last_os_error());
    let option = |level, name, value: libc::timeval| {
        let len = libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap();
        // SAFETY: an initialized value of the given length.
        let status = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), len) };
        assert_eq!(status, 0, "{}", io::Error::last_os_error());
    };
    let patience = libc::timeval {
        tv_sec: 20,
        tv_usec: 0,
    };
    option(libc::SOL_SOCKET, libc::SO_RCVTIMEO, patience);
    let room: libc::c_int = 16 << 20;
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap();
    let (level, name) = (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE);
    // SAFETY: an initialized value of the given length.
    let status = unsafe { libc::setsockopt(fd, level, name, (&raw const room).cast(), len) };
    assert_eq!(status, 0, "{}", io::Error::last_os_error());
    socket.into()
}
