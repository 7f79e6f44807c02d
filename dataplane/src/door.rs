//! `rip0` as a network device, whatever is behind it: kept quiet, sized, brought up and taken down.
//!
//! What is done here is the same for each kind of host door. Packets are the business of [`crate::tun`] and
//! [`crate::veth`].
#![expect(unsafe_code, reason = "devices are asked and told by ioctl(2)")]

use core::ffi::{c_int, c_short};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// Name of the host door.
pub const HOST_DOOR: &str = "rip0";

/// The host door, in the network namespace of the calling thread.
pub const RIP0: Device<'static> = Device(HOST_DOOR);

/// Packets that the kernel queues for a worker that is late. The kernel's own default of 500 is 25 ms of 20,000
/// packets a second, less than a busy machine's scheduler takes now and then.
const QUEUE_PACKETS: c_int = 2048;

/// Directory in place of `/proc/sys`, which a container has read-only: the host's, mounted elsewhere.
const SYSCTL_VARIABLE: &str = "RIPSTOP_PROC_SYS";

/// Least MTU for IPv6 (RFC 8200 section 5); the kernel has no IPv6 on a device of less.
const IPV6_MTU_MIN: u16 = 1280;

/// A device in the network namespace of the calling thread, by its name.
#[derive(Debug, Clone, Copy)]
pub struct Device<'n>(pub(crate) &'n str);

impl Device<'_> {
    /// The file of a setting of the device.
    fn sysctl(self, family: &str, setting: &str) -> PathBuf {
        std::env::var_os(SYSCTL_VARIABLE)
            .map_or_else(|| PathBuf::from("/proc/sys"), PathBuf::from)
            .join(format!("net/{family}/conf/{}/{setting}", self.0))
    }

    /// Keeps the kernel from sending packets of its own to the device: they would arrive at the workers, who have no
    /// use for them. To be called before the device is up. Best effort: a kernel without IPv6 has none of this.
    ///
    /// IPv6 itself stays on, because pods are reached over it. What it would send are a neighbour solicitation for a
    /// link-local address, router solicitations, and reports of multicast groups. There is no such address, nobody
    /// listens to routers, and a device that is not capable of multicast is in no group but those that are never
    /// reported. Nobody is asked for a MAC address either.
    pub(crate) fn keep_quiet(self) {
        let _ = self.change_flags(|flags| flags & !libc::IFF_MULTICAST | libc::IFF_NOARP);
        // Where forwarding is on, the device has joined the group of routers when it was made, and leaving it is
        // reported, too. So let IPv6 forget the device, and take it up again as it is (net/ipv6/addrconf.c,
        // NETDEV_CHANGEMTU).
        if let Ok(mtu) = self
            .mtu()
            .and_then(|mtu| u16::try_from(mtu).map_err(io::Error::other))
        {
            let _ = self
                .change_mtu(IPV6_MTU_MIN - 1)
                .and_then(|()| self.change_mtu(mtu));
        }
        self.configure_nothing();
    }

    /// No address, no autoconfiguration, no routers.
    fn configure_nothing(self) {
        for (setting, value) in [
            ("addr_gen_mode", "1"),
            ("accept_ra", "0"),
            ("autoconf", "0"),
            ("router_solicitations", "0"),
        ] {
            let _ = std::fs::write(self.sysctl("ipv6", setting), value);
        }
    }

    /// Lets packets in from sources that are not routed to the device.
    ///
    /// They come in here while the way back may still lead through the standby. A reverse-path filter takes that for
    /// forgery, even a loose one (2, as systemd sets it for new devices), because this device has no address
    /// (net/ipv4/fib_frontend.c, `last_resort` in `__fib_validate_source`). The workers check each source.
    pub(crate) fn accept_any_source(self) {
        let _ = std::fs::write(self.sysctl("ipv4", "rp_filter"), "0");
    }

    /// Switches IPv6 on where the machine's default has it off, as pods are to be reached over it.
    ///
    /// # Errors
    /// When the kernel has no IPv6, or does not let this process change it.
    pub fn enable_ipv6(self) -> io::Result<()> {
        let path = self.sysctl("ipv6", "disable_ipv6");
        if std::fs::read_to_string(&path)?.trim() == "0" {
            return Ok(());
        }
        std::fs::write(path, "0")
    }

    /// Largest packet that the kernel hands to the device.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn mtu(self) -> io::Result<u32> {
        let answer = self.ioctl(libc::SIOCGIFMTU, |_request| {})?;
        // SAFETY: SIOCGIFMTU has filled the union's MTU.
        let mtu = unsafe { answer.ifr_ifru.ifru_mtu };
        Ok(mtu.unsigned_abs())
    }

    /// Changes the largest packet that the kernel hands to the device.
    ///
    /// # Errors
    /// When the device is gone or cannot do it, or the process lacks CAP_NET_ADMIN.
    pub fn set_mtu(self, mtu: u16) -> io::Result<()> {
        self.change_mtu(mtu)?;
        // From less than IPv6 needs to enough, the kernel has just taken IPv6 up with its own defaults.
        self.configure_nothing();
        Ok(())
    }

    fn change_mtu(self, mtu: u16) -> io::Result<()> {
        self.ioctl(libc::SIOCSIFMTU, |request| {
            request.ifr_ifru.ifru_mtu = mtu.into();
        })?;
        Ok(())
    }

    /// Sets the transmit queue's length and brings the device up.
    pub(crate) fn set_up(self) -> io::Result<()> {
        self.ioctl(libc::SIOCSIFTXQLEN, |request| {
            // struct ifreq has no name for ifr_qlen; it shares the union's first integer with the metric.
            request.ifr_ifru.ifru_metric = QUEUE_PACKETS;
        })?;
        self.change_flags(|flags| flags | libc::IFF_UP)
    }

    /// Takes the device down: the kernel withdraws every route through it at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take_down(self) -> io::Result<()> {
        self.change_flags(|flags| flags & !libc::IFF_UP)
    }

    fn change_flags(self, change: impl FnOnce(c_int) -> c_int) -> io::Result<()> {
        let answer = self.ioctl(libc::SIOCGIFFLAGS, |_request| {})?;
        // SAFETY: SIOCGIFFLAGS has filled the union's flags.
        let current = unsafe { answer.ifr_ifru.ifru_flags };
        let wanted = change(c_int::from(current));
        self.ioctl(libc::SIOCSIFFLAGS, |request| {
            request.ifr_ifru.ifru_flags = short(wanted);
        })?;
        Ok(())
    }

    /// Its MAC address.
    pub(crate) fn mac(self) -> io::Result<[u8; 6]> {
        let answer = self.ioctl(libc::SIOCGIFHWADDR, |_request| {})?;
        // SAFETY: SIOCGIFHWADDR has filled the union's address.
        let address = unsafe { answer.ifr_ifru.ifru_hwaddr };
        let mut mac = [0; 6];
        for (place, byte) in mac.iter_mut().zip(address.sa_data) {
            [*place] = byte.to_ne_bytes();
        }
        Ok(mac)
    }

    /// Sets or reads one of the values of ethtool's oldest commands (`struct ethtool_value`,
    /// include/uapi/linux/ethtool.h); the value that the kernel leaves.
    pub(crate) fn ethtool(self, command: u32, value: u32) -> io::Result<u32> {
        let mut data = [command, value];
        self.ioctl(libc::SIOCETHTOOL, |request| {
            request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        })?;
        Ok(data[1])
    }

    /// An `ifreq` that names the device.
    pub(crate) fn request(self) -> libc::ifreq {
        // SAFETY: `ifreq` is plain integers and bytes, for which zero is valid.
        let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(self.0.bytes()) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        request
    }

    /// An interface ioctl on the device, through a socket made for it.
    fn ioctl(
        self,
        command: libc::c_ulong,
        fill: impl FnOnce(&mut libc::ifreq),
    ) -> io::Result<libc::ifreq> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")
            .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
        let mut request = self.request();
        fill(&mut request);
        // SAFETY: interface ioctls read and write the `ifreq` that they are given, which is valid and whole, and what
        // it points to: `ethtool`'s array, which is as long as the command says and outlives the call.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), command, &raw mut request) })?;
        Ok(request)
    }
}

/// The answer of a system call that returns -1 for an error.
pub(crate) fn check(answer: c_int) -> io::Result<()> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Interface flags as the kernel's `short`: the bits are kept, the sign means nothing.
pub(crate) fn short(flags: c_int) -> c_short {
    let [low, high, ..] = flags.to_le_bytes();
    c_short::from_le_bytes([low, high])
}
