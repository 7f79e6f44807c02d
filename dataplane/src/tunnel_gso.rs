//! Transmitting super-packets whole: behind their tunnel headers a worker writes them to a TAP device of its own, and
//! the kernel, or the NIC, cuts them (tunnel GSO of TUN/TAP devices, Linux 6.17).
//!
//! ```text
//!   worker ─ write ─► TAP ─ BPF program ─► NIC's queueing discipline ─ cut ─► wire
//!     └─ AF_XDP socket: everything that is no super-packet ──────────────────►
//! ```
//!
//! So the price of a packet in the kernel is paid once for up to 64 KiB there, too, and the worker neither copies nor
//! sums them. The program sends what arrives at the TAP to the NIC and nowhere else: no route, neighbour or filter of
//! the host has a say, as with the socket. TAP and program go with the process.
//!
//! On veth the sender's checksums may be left to the receiver, whose worker would take them for wrong: there it works
//! only with checksum offload off.
#![expect(
    unsafe_code,
    reason = "TAP devices are made by ioctl(2) and written with writev(2)"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use af_xdp::Interface;
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{MapCore, MapFlags, Object};

use crate::door::{Device, check, short};
use crate::inject::{Switch, Way};
use crate::offload::tunnel::{self, TUNNEL_LEN};
use crate::port::{Whole, WholeSent};
use crate::xdp::{self, Aligned, XdpError};

/// Name of the devices; the kernel puts the first free number in.
const NAME: &str = "rip0-gso%d";
/// `TUN_F_UDP_TUNNEL_GSO` and `TUN_F_UDP_TUNNEL_GSO_CSUM` (include/uapi/linux/if_tun.h, Linux 6.17).
const TUNNEL_GSO: libc::c_uint = 0x80 | 0x100;
/// `ETHTOOL_GTXCSUM` (include/uapi/linux/ethtool.h).
const GET_TX_CHECKSUM: u32 = 0x16;
/// Bytes that may be under way through the device, as the kernel counts them. What is beyond waits with the pods.
const UNDER_WAY: libc::c_int = 4 << 20;

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
    env!("OUT_DIR"),
    "/tunnel_gso.bpf.o"
)));

/// Why super-packets cannot be sent whole.
#[derive(Debug, thiserror::Error)]
pub enum TunnelGsoError {
    /// The kernel is too old.
    #[error("this kernel's TAP devices cannot cut what is in a tunnel: that needs Linux 6.17")]
    Kernel,
    /// Packets would arrive with unfinished checksums.
    #[error(
        "{nic} is a veth device that leaves checksums to the receiver, whose XDP program would see them unfinished: ethtool -K {nic} tx off"
    )]
    Checksums {
        /// The NIC.
        nic: String,
    },
    /// The program is refused.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// An operation was refused.
    #[error("{operation}: {source}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn refused(operation: &'static str) -> impl Fn(io::Error) -> TunnelGsoError {
    move |source| TunnelGsoError::Refused { operation, source }
}

/// Whether packets that the kernel cuts arrive at the NIC's peers as they should. In the network namespace of the
/// calling thread.
pub fn arrives_whole(nic: &str, driver: &str) -> bool {
    driver != "veth"
        || Device(nic)
            .ethtool(GET_TX_CHECKSUM, 0)
            .is_ok_and(|on| on == 0)
}

/// A way for super-packets into one NIC.
#[derive(Debug)]
pub struct TunnelGso {
    tap: File,
    name: String,
    way: Way,
    _link: OwnedFd,
    _object: Object,
}

impl TunnelGso {
    /// Makes the TAP device and leads it to a NIC of the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel is too old, the NIC is a veth device with checksum offload, or something is refused.
    pub fn new(nic: &Interface, driver: &str) -> Result<Self, TunnelGsoError> {
        if !arrives_whole(nic.name(), driver) {
            let nic = nic.name().to_owned();
            return Err(TunnelGsoError::Checksums { nic });
        }
        let (tap, name) = make_tap()?;
        let device = Device(&name);
        let step = "look up the TAP device for super-packets";
        let interface =
            Interface::by_name(&name).map_err(|error| refused(step)(io::Error::other(error)))?;
        let object = xdp::load_object(&OBJECT.0, "tunnel_gso", |_open| Ok(()))?;
        let layout = |what| XdpError::Layout { what };
        let target = object.maps().find(|map| map.name() == "nic");
        target
            .ok_or_else(|| layout("nic"))?
            .update(&[0; 4], &nic.index().to_ne_bytes(), MapFlags::ANY)
            .map_err(|source| xdp::refused("tell a BPF program its NIC", source))?;
        let program = object.progs().find(|it| it.name() == "tunnel_gso");
        let program = program.ok_or_else(|| layout("program"))?;
        let link = xdp::link_at(program.as_fd(), interface.index(), sys::BPF_TCX_INGRESS, 0)
            .map_err(refused(
                "put a BPF program on the TAP device for super-packets",
            ))?;
        // Nothing comes in before the program is there.
        device.keep_quiet();
        device
            .set_up()
            .map_err(refused("bring up the TAP device for super-packets"))?;
        let way = Way::default();
        way.switch().set_taken(true);
        Ok(Self {
            tap,
            name,
            way,
            _link: link,
            _object: object,
        })
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For whoever watches the NIC.
    pub fn switch(&self) -> Arc<Switch> {
        Arc::clone(self.way.switch())
    }

    /// Whether super-packets may be sent.
    #[inline]
    pub fn may(&self) -> bool {
        self.way.is_open()
    }

    /// Sends a super-packet behind the tunnel headers of its first packet, which become those of the whole.
    #[inline]
    pub fn transmit(&mut self, outer: &mut [u8], whole: &Whole<'_>) -> WholeSent {
        let Some(head) = tunnel::describe(outer, whole.cut) else {
            return WholeSent::Refused;
        };
        let parts = [&head[..], outer, whole.packet].map(IoSlice::new);
        match (&self.tap).write_vectored(&parts) {
            Ok(_) => {
                self.way.worked();
                WholeSent::Taken
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => WholeSent::Later,
            Err(error) => {
                self.way.failed(error.raw_os_error().unwrap_or(libc::EIO));
                WholeSent::Refused
            }
        }
    }
}

/// Makes a TAP device that takes super-packets in tunnels; with its name.
fn make_tap() -> Result<(File, String), TunnelGsoError> {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(refused("open /dev/net/tun"))?;
    let file = tap.as_raw_fd();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = Device(NAME).request();
    request.ifr_ifru.ifru_flags = short(flags);
    // SAFETY: TUNSETIFF reads and writes the `ifreq` that it is given, which is valid and whole.
    let answer = unsafe { libc::ioctl(file, libc::TUNSETIFF, &raw mut request) };
    check(answer).map_err(refused("make a TAP device for super-packets"))?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| byte.to_ne_bytes()[0])
        .take_while(|byte| *byte != 0)
        .collect();
    let name = String::from_utf8_lossy(&name).into_owned();
    let header = libc::c_int::try_from(TUNNEL_LEN).unwrap_or(libc::c_int::MAX);
    let settings = [
        (libc::TUNSETVNETHDRSZ, header),
        (libc::TUNSETVNETLE, 1),
        (libc::TUNSETSNDBUF, UNDER_WAY),
    ];
    for (setting, value) in settings {
        // SAFETY: each reads the one number that it is given a pointer to, which outlives the call.
        let answer = unsafe { libc::ioctl(file, setting, &raw const value) };
        check(answer).map_err(refused("set up the TAP device for super-packets"))?;
    }
    let wanted = libc::TUN_F_CSUM
        | libc::TUN_F_TSO4
        | libc::TUN_F_TSO6
        | libc::TUN_F_TSO_ECN
        | libc::TUN_F_USO4
        | libc::TUN_F_USO6
        | TUNNEL_GSO;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(file, libc::TUNSETOFFLOAD, wanted) })
        .map_err(|_old| TunnelGsoError::Kernel)?;
    Ok((tap, name))
}
