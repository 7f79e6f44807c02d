//! What the kernel says about one NIC.
//!
//! A [`Nic`] is a snapshot taken once, at start; nothing here watches the NIC
//! afterwards. Everything is asked in the caller's network namespace, and for
//! that reason not through `/sys/class/net`: a process that entered a
//! namespace by `setns` still sees there the NICs of the one it came from,
//! often under the same names.

#![expect(
    unsafe_code,
    reason = "ioctl and if_nameindex have no safe wrapper in libc"
)]

use core::ffi::CStr;
use core::mem;
use core::net::IpAddr;
use core::ptr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// One network interface, as it was when [`Nic::open`] asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Name, such as `eth0`.
    pub name: String,
    /// Interface index in its network namespace.
    pub index: u32,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Longest IP packet in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Whether it is administratively up. Sockets cannot be bound while it is down.
    pub up: bool,
    /// Receive queues in use: the queues a worker can be bound to are `0..rx_queues`.
    pub rx_queues: u32,
    /// Driver's name, such as `virtio_net`; empty if the NIC does not tell.
    pub driver: String,
    /// NUMA node that the NIC's DMA is closest to, if the machine says.
    pub numa_node: Option<u32>,
}

/// Why a NIC could not be described.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// No interface of this name in this network namespace.
    #[error("NIC {name} does not exist in this network namespace; those that do: {}", .existing.join(", "))]
    Unknown {
        /// Name asked for.
        name: String,
        /// Names of all interfaces that exist.
        existing: Vec<String>,
    },
    /// The name is too long or holds a zero byte.
    #[error("{name:?} cannot be the name of a NIC: 1 to 15 bytes, none of them zero")]
    BadName {
        /// Name asked for.
        name: String,
    },
    /// The interface carries no Ethernet frames (a tunnel, for example).
    #[error("{name} is not an Ethernet NIC (link type {link_type}); a worker needs one")]
    NotEthernet {
        /// Name asked for.
        name: String,
        /// The kernel's ARPHRD number.
        link_type: u16,
    },
    /// The kernel refused a question.
    #[error("{question} of NIC {name}: {source}")]
    Question {
        /// Name asked for.
        name: String,
        /// What was asked.
        question: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Nic {
    /// Asks the kernel about the NIC `name`.
    pub fn open(name: &str) -> Result<Self, NicError> {
        let control = Control::open(name)?;
        let index = control.interface(libc::SIOCGIFINDEX, "index")?;
        // SAFETY: SIOCGIFINDEX fills `ifru_ifindex`.
        let index = unsafe { index.ifr_ifru.ifru_ifindex };
        let address = control.interface(libc::SIOCGIFHWADDR, "hardware address")?;
        // SAFETY: SIOCGIFHWADDR fills `ifru_hwaddr`.
        let address = unsafe { address.ifr_ifru.ifru_hwaddr };
        if address.sa_family != libc::ARPHRD_ETHER && address.sa_family != libc::ARPHRD_LOOPBACK {
            return Err(NicError::NotEthernet {
                name: name.to_owned(),
                link_type: address.sa_family,
            });
        }
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(address.sa_data) {
            *to = from.to_ne_bytes()[0];
        }
        let mtu = control.interface(libc::SIOCGIFMTU, "MTU")?;
        // SAFETY: SIOCGIFMTU fills `ifru_mtu`.
        let mtu = unsafe { mtu.ifr_ifru.ifru_mtu };
        let flags = control.interface(libc::SIOCGIFFLAGS, "flags")?;
        // SAFETY: SIOCGIFFLAGS fills `ifru_flags`.
        let flags = unsafe { flags.ifr_ifru.ifru_flags };

        let driver = control.driver()?;
        Ok(Self {
            name: name.to_owned(),
            index: index.unsigned_abs(),
            mac,
            mtu: mtu.unsigned_abs(),
            up: i32::from(flags) & libc::IFF_UP != 0,
            rx_queues: control.rx_queues()?,
            numa_node: numa_node(&text(&driver.bus_info)),
            driver: text(&driver.driver),
        })
    }

    /// Names of all interfaces in this network namespace, in the kernel's order.
    pub fn names() -> Vec<String> {
        let mut names = Vec::new();
        // SAFETY: takes nothing; answers null or an array that stays ours until freed below.
        let list = unsafe { libc::if_nameindex() };
        if list.is_null() {
            return names;
        }
        for position in 0.. {
            // SAFETY: the array ends with an entry of index 0, which stops the loop.
            let entry = unsafe { list.add(position) };
            // SAFETY: in bounds as above; entries are plain data, written before the call returned.
            let entry = unsafe { ptr::read(entry) };
            if entry.if_index == 0 {
                break;
            }
            // SAFETY: `if_name` of a valid entry is a terminated string that lives as long as the array.
            let name = unsafe { CStr::from_ptr(entry.if_name) };
            names.push(name.to_string_lossy().into_owned());
        }
        // SAFETY: from if_nameindex, freed once, not used afterwards.
        unsafe { libc::if_freenameindex(list) };
        names
    }
}

/// Name of the interface in this network namespace that has `address`.
pub fn interface_of(address: IpAddr) -> Option<String> {
    let mut list = ptr::null_mut();
    // SAFETY: writes the head of a list that stays ours until freed below, or fails and leaves the pointer null.
    unsafe { libc::getifaddrs(&raw mut list) };
    let mut next = list;
    let mut found = None;
    while !next.is_null() && found.is_none() {
        // SAFETY: not null, so a whole entry, written before the call returned.
        let entry = unsafe { ptr::read(next) };
        if address_in(entry.ifa_addr) == Some(address) {
            // SAFETY: the name of an entry is a terminated string that lives as long as the list.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found = Some(name.to_string_lossy().into_owned());
        }
        next = entry.ifa_next;
    }
    if !list.is_null() {
        // SAFETY: from getifaddrs, freed once, not used afterwards.
        unsafe { libc::freeifaddrs(list) };
    }
    found
}

/// The IP address in an entry of getifaddrs, which may have one of another kind or none.
fn address_in(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: not null, so at least a sockaddr, whose family says what it is.
    let family = unsafe { ptr::read_unaligned(address) }.sa_family;
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: of this family, so a whole sockaddr_in.
            let v4 = unsafe { ptr::read_unaligned(address.cast::<libc::sockaddr_in>()) };
            Some(IpAddr::V4(u32::from_be(v4.sin_addr.s_addr).into()))
        }
        libc::AF_INET6 => {
            // SAFETY: of this family, so a whole sockaddr_in6.
            let v6 = unsafe { ptr::read_unaligned(address.cast::<libc::sockaddr_in6>()) };
            Some(IpAddr::V6(v6.sin6_addr.s6_addr.into()))
        }
        _ => None,
    }
}

/// Something that a NIC, or the kernel for it, does to frames that it receives, and that can be switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Taking VLAN tags off (`ethtool -K … rxvlan`).
    RxVlanOffload,
    /// Merging packets of a flow (`ethtool -K … gro`).
    Gro,
}

impl Feature {
    /// The commands that read and write it, and its bit in the value; one of these flags is one of several.
    const fn commands(self) -> (u32, u32, u32) {
        match self {
            Self::RxVlanOffload => (ETHTOOL_GFLAGS, ETHTOOL_SFLAGS, ETH_FLAG_RXVLAN),
            Self::Gro => (ETHTOOL_GGRO, ETHTOOL_SGRO, 1),
        }
    }

    /// Whether it is on.
    ///
    /// # Errors
    /// When there is no such NIC.
    pub fn is_on(self, nic: &str) -> io::Result<bool> {
        let (_, value) = self.value(nic)?;
        Ok(value & self.commands().2 != 0)
    }

    /// Switches it.
    ///
    /// # Errors
    /// When there is no such NIC, or its driver does not change this.
    pub fn switch(self, nic: &str, on: bool) -> io::Result<()> {
        let (control, value) = self.value(nic)?;
        let (_, command, bit) = self.commands();
        let value = if on { value | bit } else { value & !bit };
        let mut request = EthtoolValue { command, value };
        match control.ethtool(&mut request, "features") {
            Ok(true) => Ok(()),
            Ok(false) => Err(io::ErrorKind::Unsupported.into()),
            Err(error) => Err(kernels_answer(error)),
        }
    }

    fn value(self, nic: &str) -> io::Result<(Control, u32)> {
        let control = Control::open(nic).map_err(kernels_answer)?;
        let (command, ..) = self.commands();
        let mut request = EthtoolValue { command, value: 0 };
        control
            .ethtool(&mut request, "features")
            .map_err(kernels_answer)?;
        Ok((control, request.value))
    }
}

fn kernels_answer(error: NicError) -> io::Error {
    match error {
        NicError::Question { source, .. } => source,
        other @ (NicError::Unknown { .. }
        | NicError::BadName { .. }
        | NicError::NotEthernet { .. }) => io::Error::other(other),
    }
}

/// `struct ethtool_value` (linux/ethtool.h).
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// `struct ethtool_drvinfo` (linux/ethtool.h).
#[repr(C)]
struct EthtoolDriver {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware_version: [u8; 32],
    bus_info: [u8; 32],
    rest: [u8; 64],
}

/// `struct ethtool_channels` (linux/ethtool.h).
#[repr(C)]
struct EthtoolChannels {
    command: u32,
    rx_max: u32,
    tx_max: u32,
    other_max: u32,
    combined_max: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

const _: () = assert!(size_of::<EthtoolDriver>() == 196);
const _: () = assert!(size_of::<EthtoolChannels>() == 36);

const _: () = assert!(size_of::<EthtoolValue>() == 8);

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;
/// NETIF_F_HW_VLAN_CTAG_RX among the flags.
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// Structures that the kernel accepts behind `ifr_data` of SIOCETHTOOL.
///
/// # Safety
/// The type is `repr(C)`, any bytes are a valid value of it, it begins with
/// the command, and it is at least as large as what the kernel writes for
/// each command that is put there.
unsafe trait EthtoolCommand {}
// SAFETY: mirrors the kernel's struct, size asserted above, plain bytes and integers.
unsafe impl EthtoolCommand for EthtoolDriver {}
// SAFETY: mirrors the kernel's struct, size asserted above, plain integers.
unsafe impl EthtoolCommand for EthtoolChannels {}

// SAFETY: mirrors the kernel's struct, size asserted above, plain integers.
unsafe impl EthtoolCommand for EthtoolValue {}

/// A socket to ask about one interface through.
struct Control {
    name: String,
    socket: OwnedFd,
    /// With the name in place and the rest zero.
    request: libc::ifreq,
}

impl Control {
    fn open(name: &str) -> Result<Self, NicError> {
        // SAFETY: all-zero bytes are a valid ifreq: an array and a union of plain data.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        let bytes = name.as_bytes();
        // `<`: the kernel wants the terminating zero inside the array.
        if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
            return Err(NicError::BadName {
                name: name.to_owned(),
            });
        }
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        // SAFETY: takes plain numbers.
        let socket =
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(NicError::Question {
                name: name.to_owned(),
                question: "opening a socket to ask for the properties",
                source: io::Error::last_os_error(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            // SAFETY: a descriptor that the kernel has just given to us alone.
            socket: unsafe { OwnedFd::from_raw_fd(socket) },
            request,
        })
    }

    fn refused(&self, question: &'static str, source: io::Error) -> NicError {
        if source.raw_os_error() == Some(libc::ENODEV) {
            return NicError::Unknown {
                name: self.name.clone(),
                existing: Nic::names(),
            };
        }
        NicError::Question {
            name: self.name.clone(),
            question,
            source,
        }
    }

    /// One of the SIOCGIF* questions, whose answers lie inside the request.
    fn interface(
        &self,
        code: libc::Ioctl,
        question: &'static str,
    ) -> Result<libc::ifreq, NicError> {
        let mut request = self.request;
        // SAFETY: `request` is a whole ifreq that outlives the call; SIOCGIF* codes write only into it.
        let status = unsafe { libc::ioctl(self.socket.as_raw_fd(), code, &raw mut request) };
        if status < 0 {
            return Err(self.refused(question, io::Error::last_os_error()));
        }
        Ok(request)
    }

    /// Fills `command`; `false` if this driver has no such command.
    fn ethtool<T: EthtoolCommand>(
        &self,
        command: &mut T,
        question: &'static str,
    ) -> Result<bool, NicError> {
        let mut request = self.request;
        request.ifr_ifru.ifru_data = ptr::from_mut(command).cast();
        // SAFETY: `request` outlives the call, and `ifru_data` points to a live structure of the
        // size and form that the kernel expects (contract of `EthtoolCommand`).
        let status =
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        if status == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            unsupported if unsupported.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            error => Err(self.refused(question, error)),
        }
    }

    fn driver(&self) -> Result<EthtoolDriver, NicError> {
        let mut answer = EthtoolDriver {
            command: ETHTOOL_GDRVINFO,
            driver: [0; 32],
            version: [0; 32],
            firmware_version: [0; 32],
            bus_info: [0; 32],
            rest: [0; 64],
        };
        self.ethtool(&mut answer, "driver")?;
        Ok(answer)
    }

    /// Queues in use, not the most the NIC could have: RSS feeds only these.
    /// A NIC that does not tell is taken to have one; drivers with several tell.
    fn rx_queues(&self) -> Result<u32, NicError> {
        let mut answer = EthtoolChannels {
            command: ETHTOOL_GCHANNELS,
            rx_max: 0,
            tx_max: 0,
            other_max: 0,
            combined_max: 0,
            rx: 0,
            tx: 0,
            other: 0,
            combined: 0,
        };
        let told = self.ethtool(&mut answer, "queue count")?;
        let queues = answer.combined.saturating_add(answer.rx);
        Ok(if told && queues > 0 { queues } else { 1 })
    }
}

/// Node of the PCI device behind the NIC. The NIC's own bus address and not
/// its entry in sysfs: a virtio NIC has no node there, only its PCI parent has.
fn numa_node(bus_info: &str) -> Option<u32> {
    if bus_info.is_empty() || bus_info.contains('/') {
        return None;
    }
    let path = format!("/sys/bus/pci/devices/{bus_info}/numa_node");
    // -1, which does not parse, says that the machine has no nodes.
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Text in a fixed field, up to the first zero byte.
fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_known() {
        let loopback = Nic::open("lo").unwrap();
        assert_eq!((loopback.index, loopback.rx_queues), (1, 1));
        assert_eq!(loopback.mac, [0; 6]);
        assert_eq!(loopback.numa_node, None);
    }

    #[test]
    fn the_owner_of_an_address_is_known() {
        let owner = |address: &str| interface_of(address.parse().unwrap());
        assert_eq!(owner("127.0.0.1").as_deref(), Some("lo"));
        assert_eq!(owner("192.0.2.77"), None);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = Nic::open("nic-of-nobody").unwrap_err().to_string();
        assert!(
            error.contains("nic-of-nobody") && error.contains("lo"),
            "{error}"
        );
    }

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", "a-name-of-16-byt", "a\0b"] {
            assert!(
                matches!(Nic::open(name), Err(NicError::BadName { .. })),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_field_ends_at_its_first_zero() {
        assert_eq!(text(b"veth\0\0junk"), "veth");
        assert_eq!(text(b"full"), "full");
    }
}
