//! The XDP program on a NIC: loading, attaching, telling it which tunnel is
//! ours and which queues have a socket, and reading what it did.
//!
//! One [`XdpProgram`] belongs to one NIC, for its sockets are found by queue
//! number. It is attached by a BPF link, in native and in generic mode alike:
//! the kernel detaches it when the last descriptor of the link is closed, that
//! is on drop, and also when the process is killed. Nothing is ever pinned.
//!
//! What the program decides is written in `bpf/ripstop.bpf.c`; the layouts that
//! both sides share are in `bpf/ripstop.h` and are mirrored here.
//!
//! The program's configuration is one small map that lies in the single place
//! of another map. Each change makes a fresh map and swaps it for the old one,
//! so that a frame is judged by the old configuration or by the new one.

#![expect(unsafe_code, reason = "BPF links with flags")]

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::ops::Index;
use core::time::Duration;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{
    ErrorKind, MapCore, MapFlags, MapHandle, MapType, Object, ObjectBuilder, PrintLevel,
    ProgramHandle, ProgramInput, ProgramMut, Xdp, XdpFlags,
};

use crate::config::Capabilities;
use crate::nic::Nic;

/// A compiled program. Aligned, because libelf reads its tables in place.
#[repr(C, align(8))]
pub(crate) struct Aligned<Bytes: ?Sized>(pub(crate) Bytes);
static OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/ripstop.bpf.o")));

/// Receive queues that the program has room for (`RIPSTOP_QUEUES_MAX`).
pub const QUEUES_MAX: u32 = 1024;

/// Largest MTU at which every driver still puts a frame into one buffer: igb
/// refuses a single-buffer program from 3498 on, veth and virtio from 3507.
const SINGLE_BUFFER_MTU_MAX: u32 = 3497;

/// What is ours on one NIC: what goes to the sockets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelMatch {
    /// The tunnel that pod packets come in.
    pub tunnel: Tunnel,
    /// The 802.1Q tag that every packet of ours carries, in the frame; without it, none of ours carries any.
    pub vlan: Option<u16>,
    /// This node in IPv4.
    pub v4: Option<Match<Ipv4Addr>>,
    /// This node in IPv6. Only VXLAN has tunnels there.
    pub v6: Option<Match<Ipv6Addr>>,
}

/// A tunnel as it is told apart from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// No tunnel: at most packets that need none are ours.
    None,
    /// Ethernet frames in VXLAN.
    Vxlan {
        /// UDP destination port.
        port: u16,
        /// VXLAN network identifier, 24 bits.
        vni: u32,
    },
    /// IPv4 packets in UDP.
    Udp {
        /// UDP destination port.
        port: u16,
    },
    /// IPv4 packets in IPv4.
    Ipip,
}

/// What is ours in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match<A> {
    /// Destination of tunnel packets: this node's underlay address.
    pub local: A,
    /// Which packets without a tunnel are ours, if any are.
    pub direct: Option<Direct<A>>,
}

/// Packets that come from another node's pod without a tunnel: to `subnet`,
/// from `network` and not from `subnet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct<A> {
    /// This node's pods: address and prefix length.
    pub subnet: (A, u8),
    /// All pods: address and prefix length.
    pub network: (A, u8),
}

impl TunnelMatch {
    /// Nothing is ours.
    pub const OFF: Self = Self {
        tunnel: Tunnel::None,
        vlan: None,
        v4: None,
        v6: None,
    };

    /// The bytes of `struct ripstop_match`.
    fn bytes(&self, frame_bytes_max: u32) -> Result<[u8; MATCH_BYTES], XdpError> {
        let (tunnel4, tunnel6, port, vni) = match self.tunnel {
            Tunnel::None => (0, 0, 0, 0),
            Tunnel::Vxlan { port, vni } => (1, 1, port, vni),
            Tunnel::Udp { port } => (2, 0, port, 0),
            Tunnel::Ipip => (3, 0, 0, 0),
        };
        if vni >= 1 << 24 {
            return Err(XdpError::Vni { vni });
        }
        if let Some(vlan) = self.vlan.filter(|vlan| !(1..4095).contains(vlan)) {
            return Err(XdpError::Vlan { vlan });
        }
        let mut words = Layout::default();
        words.family(tunnel4, self.v4.as_ref())?;
        words.family(tunnel6, self.v6.as_ref())?;
        words.number(vni);
        words.bytes(&port.to_be_bytes());
        words.bytes(&self.vlan.unwrap_or(0).to_be_bytes());
        words.number(frame_bytes_max);
        Ok(words.done())
    }
}

/// An address whose bytes can be written and cut to a prefix.
trait Address: Copy + fmt::Display {
    /// How many bytes it has.
    const BYTES: usize;

    /// Its bytes in network order, from the left.
    fn padded(self) -> [u8; 16];
}

impl Address for Ipv4Addr {
    const BYTES: usize = 4;

    fn padded(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.octets());
        bytes
    }
}

impl Address for Ipv6Addr {
    const BYTES: usize = 16;

    fn padded(self) -> [u8; 16] {
        self.octets()
    }
}

/// `struct ripstop_match`, written field by field. Addresses, masks, port and
/// tag are the bytes of the packet, the rest are the machine's own integers.
struct Layout {
    bytes: [u8; MATCH_BYTES],
    end: usize,
}

/// Size of `struct ripstop_match`.
const MATCH_BYTES: usize = 128;
/// Sizes of key and value of the map that holds one; the kernel refuses a map
/// of other sizes than the program was compiled for.
const MATCH_MAP: (u32, u32) = (4, 128);

impl Default for Layout {
    fn default() -> Self {
        Self {
            bytes: [0; MATCH_BYTES],
            end: 0,
        }
    }
}

impl Layout {
    fn bytes(&mut self, bytes: &[u8]) {
        let end = self.end + bytes.len();
        self.bytes[self.end..end].copy_from_slice(bytes);
        self.end = end;
    }

    fn number(&mut self, number: u32) {
        self.bytes(&number.to_ne_bytes());
    }

    fn address<A: Address>(&mut self, address: A) {
        self.bytes(&address.padded()[..A::BYTES]);
    }

    /// Address and mask; the address without the bits beyond the prefix, as the program compares it.
    fn prefix<A: Address>(&mut self, (address, len): (A, u8)) -> Result<(), XdpError> {
        if usize::from(len) > A::BYTES * 8 {
            return Err(XdpError::Prefix {
                prefix: format!("{address}/{len}"),
            });
        }
        let mask: u128 = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
        let address = u128::from_be_bytes(address.padded()) & mask;
        self.bytes(&address.to_be_bytes()[..A::BYTES]);
        self.bytes(&mask.to_be_bytes()[..A::BYTES]);
        Ok(())
    }

    /// `struct ripstop_match4` or `struct ripstop_match6`.
    fn family<A: Address>(
        &mut self,
        tunnel: u32,
        family: Option<&Match<A>>,
    ) -> Result<(), XdpError> {
        let Some(family) = family else {
            self.end += 8 + 5 * A::BYTES;
            return Ok(());
        };
        self.number(tunnel);
        self.address(family.local);
        self.number(u32::from(family.direct.is_some()));
        match family.direct {
            None => self.end += 4 * A::BYTES,
            Some(direct) => {
                self.prefix(direct.subnet)?;
                self.prefix(direct.network)?;
            }
        }
        Ok(())
    }

    fn done(self) -> [u8; MATCH_BYTES] {
        assert_eq!(self.end, MATCH_BYTES, "every field has been written");
        self.bytes
    }
}

/// How to attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// Native if the driver can, else generic.
    #[default]
    Auto,
    /// In the driver, before the kernel allocates anything for the packet.
    Native,
    /// Behind the driver, on the kernel's packet buffers: slower, works on any NIC.
    Generic,
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// Behind the driver.
    Generic,
}

impl AttachedMode {
    const fn flags(self) -> u32 {
        match self {
            Self::Native => sys::XDP_FLAGS_DRV_MODE,
            Self::Generic => sys::XDP_FLAGS_SKB_MODE,
        }
    }
}

impl fmt::Display for AttachedMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// How a NIC lays a frame out, which decides between the two programs in the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// A frame lies in one buffer.
    One,
    /// A frame may lie in several (jumbo frames).
    Several,
}

impl Buffers {
    /// What a NIC of this MTU needs.
    pub const fn for_mtu(mtu: u32) -> Self {
        if mtu > SINGLE_BUFFER_MTU_MAX {
            Self::Several
        } else {
            Self::One
        }
    }

    const fn program(self) -> &'static str {
        match self {
            Self::One => "ripstop",
            Self::Several => "ripstop_frags",
        }
    }
}

/// What became of a frame (`enum ripstop_outcome`): every frame that the program sees has exactly one.
pub use ripstop_fib::stats::XdpCounter as Outcome;

/// Frames seen so far, by outcome, over all CPUs.
///
/// The counters live as long as the loaded program and only grow. Each is read
/// by itself while the program runs, so that a reading is not one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpCounters {
    frames: [u64; Outcome::COUNT],
}

impl XdpCounters {
    /// All counters, in the order of [`Outcome::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Outcome, u64)> {
        Outcome::ALL.iter().copied().zip(self.frames)
    }

    /// Frames that the program has seen.
    pub fn seen(&self) -> u64 {
        self.frames.iter().sum()
    }

    /// Frames that went the kernel's way, for whatever reason.
    pub fn passed(&self) -> u64 {
        self.seen() - self[Outcome::Redirected]
    }
}

impl Index<Outcome> for XdpCounters {
    type Output = u64;

    fn index(&self, outcome: Outcome) -> &u64 {
        &self.frames[outcome as usize]
    }
}

/// What the program answers for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Left to the kernel.
    Pass,
    /// To the socket of its queue.
    Redirect,
}

/// Why the XDP program could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// The process may not do this.
    #[error(
        "{step}: not permitted; this process lacks {missing}. Run as root or grant them (setcap, AmbientCapabilities=, securityContext)"
    )]
    Permission {
        /// What was attempted.
        step: String,
        /// Capabilities that it takes and the process does not have.
        missing: String,
    },
    /// libbpf or the kernel refused.
    #[error(
        "{step}: {source:#}. Kernel 6.1 or later is required; RUST_LOG=libbpf=debug shows the verifier's words"
    )]
    Bpf {
        /// What was attempted.
        step: String,
        /// libbpf's error.
        source: libbpf_rs::Error,
    },
    /// The embedded object is not what this module mirrors.
    #[error(
        "the embedded XDP object has no {what} of the expected form: rebuild ripstop-dataplane from one source tree"
    )]
    Layout {
        /// What is missing or different.
        what: &'static str,
    },
    /// Somebody else's XDP program is on the NIC.
    #[error(
        "NIC {nic} already runs XDP program {id} ({program}), and it runs only one: take it off (`ip link set dev {nic} {off} off`; if that answers \"busy\", stop the process that holds it), or choose another NIC"
    )]
    Foreign {
        /// NIC.
        nic: String,
        /// Identifier of the program there, as `bpftool prog` shows it.
        id: u32,
        /// Its name.
        program: String,
        /// What `ip link set` calls the mode that it is attached in.
        off: &'static str,
    },
    /// The kernel refused the attachment.
    #[error("attach the XDP program to NIC {nic} in {mode} mode: {source}. {hint}")]
    Attach {
        /// NIC.
        nic: String,
        /// Mode that was tried.
        mode: AttachedMode,
        /// The kernel's answer.
        source: io::Error,
        /// What to try.
        hint: &'static str,
    },
    /// `attach` was called twice.
    #[error("this XDP program is already attached to NIC {nic}: load one program per NIC")]
    AlreadyAttached {
        /// NIC.
        nic: String,
    },
    /// The VNI does not fit its field.
    #[error("VNI {vni} does not fit the 24 bits of the VXLAN header: choose one up to 16777215")]
    Vni {
        /// The value.
        vni: u32,
    },
    /// The VLAN identifier is none that a frame can belong to.
    #[error("VLAN {vlan} does not exist: choose one from 1 to 4094")]
    Vlan {
        /// The value.
        vlan: u16,
    },
    /// A prefix is longer than its address.
    #[error("{prefix} is not a network: its prefix is longer than the address")]
    Prefix {
        /// The value.
        prefix: String,
    },
    /// The queue number is beyond the socket map.
    #[error("receive queue {queue} is beyond the {QUEUES_MAX} that the XDP program has room for")]
    Queue {
        /// The number.
        queue: u32,
    },
}

/// The link that holds the program on a NIC, for as long as it is open.
#[derive(Debug)]
struct Attachment {
    nic: String,
    mode: AttachedMode,
    link: OwnedFd,
}

impl Drop for Attachment {
    /// Closing alone would detach later if another descriptor of the link is
    /// open, as in a child between fork and exec.
    fn drop(&mut self) {
        // SAFETY: an open descriptor; the call reads nothing else.
        let status = unsafe { sys::bpf_link_detach(self.link.as_raw_fd()) };
        if status < 0 {
            let error = io::Error::from_raw_os_error(-status);
            tracing::debug!(nic = self.nic, %error, "the kernel detaches when the link is closed");
        }
    }
}

/// The loaded program and its maps.
#[derive(Debug)]
pub struct XdpProgram {
    /// Ahead of the object, so that a drop detaches first.
    attachment: Option<Attachment>,
    object: Object,
    sockets: MapHandle,
    outcomes: MapHandle,
    deadlines: MapHandle,
    configuration: MapHandle,
    frame_bytes_max: u32,
}

impl XdpProgram {
    /// Loads the program into the kernel; it does nothing yet.
    ///
    /// `frame_bytes_max` is the longest Ethernet frame that every socket of
    /// this NIC can hold; longer ones are left to the kernel.
    pub fn load(frame_bytes_max: u32) -> Result<Self, XdpError> {
        let object = load_object(&OBJECT.0, "ripstop", |_open| Ok(()))?;

        let map = |name: &str, what, value_size: usize, entries: usize| {
            let map = object
                .maps()
                .find(|map| map.name() == name)
                .filter(|map| map.value_size() as usize == value_size)
                .filter(|map| map.max_entries() as usize == entries)
                .ok_or(XdpError::Layout { what })?;
            MapHandle::try_from(&map).map_err(|source| refused("hold a map", source))
        };
        let sockets = map(
            "sockets",
            "socket map",
            size_of::<u32>(),
            QUEUES_MAX as usize,
        )?;
        let deadlines = map(
            "deadlines",
            "deadlines",
            size_of::<u64>(),
            QUEUES_MAX as usize,
        )?;
        let outcomes = map("outcomes", "counters", size_of::<u64>(), Outcome::ALL.len())?;
        let configuration = map("configuration", "configuration", size_of::<u32>(), 1)?;
        let loaded = Self {
            attachment: None,
            object,
            sockets,
            outcomes,
            deadlines,
            configuration,
            frame_bytes_max,
        };
        loaded.program(Buffers::One)?;
        loaded.program(Buffers::Several)?;
        Ok(loaded)
    }

    /// Attaches to `nic` and answers with the mode in use.
    ///
    /// Until [`configure`](Self::configure) and
    /// [`register_socket`](Self::register_socket) everything is passed.
    /// Some drivers reset the NIC for it: traffic may be lost for seconds.
    pub fn attach(&mut self, nic: &Nic, mode: AttachMode) -> Result<AttachedMode, XdpError> {
        if let Some(attachment) = &self.attachment {
            return Err(XdpError::AlreadyAttached {
                nic: attachment.nic.clone(),
            });
        }
        self.refuse_foreign(nic)?;
        let (mode, link) = match mode {
            AttachMode::Native => (AttachedMode::Native, self.link(nic, AttachedMode::Native)?),
            AttachMode::Generic => (
                AttachedMode::Generic,
                self.link(nic, AttachedMode::Generic)?,
            ),
            AttachMode::Auto => match self.link(nic, AttachedMode::Native) {
                Ok(link) => (AttachedMode::Native, link),
                Err(refusal @ XdpError::Attach { .. }) => {
                    tracing::warn!(nic = nic.name, "{refusal} Falling back to generic mode.");
                    (
                        AttachedMode::Generic,
                        self.link(nic, AttachedMode::Generic)?,
                    )
                }
                Err(error) => return Err(error),
            },
        };
        self.attachment = Some(Attachment {
            nic: nic.name.clone(),
            mode,
            link,
        });
        Ok(mode)
    }

    /// Takes the program off its NIC; the kernel gets all packets again.
    pub fn detach(&mut self) {
        self.attachment = None;
    }

    /// Mode in use, while attached.
    pub fn attached(&self) -> Option<AttachedMode> {
        self.attachment.as_ref().map(|attachment| attachment.mode)
    }

    /// Makes `ours` what goes to the sockets. A frame that falls into the
    /// change is judged by what was, or by what is; after the return no frame
    /// is judged by what was any more.
    pub fn configure(&self, ours: &TunnelMatch) -> Result<(), XdpError> {
        let value = ours.bytes(self.frame_bytes_max)?;
        let options = sys::bpf_map_create_opts {
            sz: size_of::<sys::bpf_map_create_opts>() as sys::size_t,
            ..Default::default()
        };
        let (key_bytes, value_bytes) = MATCH_MAP;
        let fresh = MapHandle::create(
            MapType::Array,
            Some("match"),
            key_bytes,
            value_bytes,
            1,
            &options,
        )
        .map_err(|source| refused("make a map for the XDP program's configuration", source))?;
        fresh
            .update(&ONLY, &value, MapFlags::ANY)
            .and_then(|()| {
                let descriptor = fresh.as_fd().as_raw_fd().to_ne_bytes();
                self.configuration.update(&ONLY, &descriptor, MapFlags::ANY)
            })
            .map_err(|source| refused("configure the XDP program", source))
    }

    /// Changes the longest Ethernet frame for a socket, from the next [`configure`](Self::configure) on.
    pub fn limit_frames(&mut self, frame_bytes_max: u32) {
        self.frame_bytes_max = frame_bytes_max;
    }

    /// Passes everything to the kernel until the next [`configure`](Self::configure).
    pub fn disable(&self) -> Result<(), XdpError> {
        match self.configuration.delete(&ONLY) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(refused("switch the XDP program off", source))
            }
            _ => Ok(()),
        }
    }

    /// Sends the tunnel's packets of receive queue `queue` to `socket`, an
    /// AF_XDP socket bound to that queue of the attached NIC. Closing the
    /// socket unregisters it, too.
    pub fn register_socket(&self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), XdpError> {
        if queue >= QUEUES_MAX {
            return Err(XdpError::Queue { queue });
        }
        self.sockets
            .update(
                &queue.to_ne_bytes(),
                &socket.as_raw_fd().to_ne_bytes(),
                MapFlags::ANY,
            )
            .map_err(|source| refused(format!("register the socket of queue {queue}"), source))
    }

    /// Leaves the packets of receive queue `queue` to the kernel.
    pub fn unregister_socket(&self, queue: u32) -> Result<(), XdpError> {
        if queue >= QUEUES_MAX {
            return Err(XdpError::Queue { queue });
        }
        match self.sockets.delete(&queue.to_ne_bytes()) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(refused(
                format!("unregister the socket of queue {queue}"),
                source,
            )),
            _ => Ok(()),
        }
    }

    /// Lets the worker of receive queue `queue` count as moving until `deadline_ns` (CLOCK_MONOTONIC in nanoseconds).
    /// From then on its packets are passed to the kernel. A queue for which this was never called has no deadline.
    pub fn keep_alive(&self, queue: u32, deadline_ns: u64) -> Result<(), XdpError> {
        if queue >= QUEUES_MAX {
            return Err(XdpError::Queue { queue });
        }
        let (key, value) = (queue.to_ne_bytes(), deadline_ns.to_ne_bytes());
        self.deadlines
            .update(&key, &value, MapFlags::ANY)
            .map_err(|source| refused(format!("set the deadline of queue {queue}"), source))
    }

    /// What became of the frames seen so far.
    pub fn counters(&self) -> Result<XdpCounters, XdpError> {
        let mut counters = XdpCounters::default();
        for (outcome, frames) in Outcome::ALL.iter().zip(&mut counters.frames) {
            let per_cpu = self
                .outcomes
                .lookup_percpu(&(*outcome as u32).to_ne_bytes(), MapFlags::ANY)
                .map_err(|source| refused("read the XDP counters", source))?
                .ok_or(XdpError::Layout { what: "counters" })?;
            for bytes in per_cpu {
                let Ok(value) = bytes.try_into() else {
                    return Err(XdpError::Layout { what: "counters" });
                };
                *frames += u64::from_ne_bytes(value);
            }
        }
        Ok(counters)
    }

    /// Runs the program once on `frame`, as if it had come in on queue 0 of
    /// the loopback device or, if given, on (interface index, queue). The
    /// frame goes nowhere, but its outcome is counted. For tests.
    pub fn run(
        &self,
        buffers: Buffers,
        frame: &[u8],
        received_on: Option<(u32, u32)>,
    ) -> Result<Action, XdpError> {
        self.run_often(buffers, frame, received_on, 1)
            .map(|(action, _)| action)
    }

    /// Like [`run`](Self::run), `times` over in one call; tells how long one
    /// took on average. For tests. A call that the kernel interrupts is made
    /// again, so that there may be more runs than asked for.
    pub fn run_often(
        &self,
        buffers: Buffers,
        frame: &[u8],
        received_on: Option<(u32, u32)>,
        times: u32,
    ) -> Result<(Action, Duration), XdpError> {
        let step = "run the XDP program on a frame";
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let mut context = [0u8; 24];
        if let Some((interface, queue)) = received_on {
            let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            context[4..8].copy_from_slice(&length.to_ne_bytes());
            context[12..16].copy_from_slice(&interface.to_ne_bytes());
            context[16..20].copy_from_slice(&queue.to_ne_bytes());
        }
        let output = loop {
            let answer = self.program(buffers)?.test_run(ProgramInput {
                context_in: received_on.is_some().then_some(&mut context[..]),
                data_in: Some(frame),
                repeat: times,
                ..ProgramInput::default()
            });
            match answer {
                // A long run gives way to any work that is pending for the thread (net/bpf/test_run.c,
                // bpf_test_timer_continue).
                Err(source) if source.kind() == ErrorKind::Interrupted => {}
                answer => break answer.map_err(|source| refused(step, source))?,
            }
        };
        let action = match output.return_value {
            sys::XDP_PASS => Action::Pass,
            sys::XDP_REDIRECT => Action::Redirect,
            _ => return Err(XdpError::Layout { what: "program" }),
        };
        Ok((action, output.duration))
    }

    fn program(&self, buffers: Buffers) -> Result<ProgramMut<'_>, XdpError> {
        self.object
            .progs_mut()
            .find(|program| program.name() == buffers.program())
            .ok_or(XdpError::Layout { what: "program" })
    }

    fn refuse_foreign(&self, nic: &Nic) -> Result<(), XdpError> {
        let program = self.program(Buffers::for_mtu(nic.mtu))?;
        let present = Xdp::new(program.as_fd())
            .query(interface_index(nic), XdpFlags::NONE)
            .map_err(|source| {
                refused(
                    format!("ask for the XDP program on NIC {}", nic.name),
                    source,
                )
            })?;
        let (id, off) = match present {
            on if on.drv_prog_id != 0 => (on.drv_prog_id, "xdp"),
            on if on.skb_prog_id != 0 => (on.skb_prog_id, "xdpgeneric"),
            on if on.hw_prog_id != 0 => (on.hw_prog_id, "xdpoffload"),
            on if on.prog_id != 0 => (on.prog_id, "xdp"),
            _ => return Ok(()),
        };
        Err(XdpError::Foreign {
            nic: nic.name.clone(),
            id,
            program: ProgramHandle::from_prog_id(id).map_or_else(
                |_| "of unknown name".to_owned(),
                |handle| handle.name().to_string_lossy().into_owned(),
            ),
            off,
        })
    }

    /// libbpf's own attach call has no flags, hence no choice of mode.
    fn link(&self, nic: &Nic, mode: AttachedMode) -> Result<OwnedFd, XdpError> {
        let program = self.program(Buffers::for_mtu(nic.mtu))?;
        let source = match link_create(program.as_fd(), nic.index, mode) {
            Ok(link) => return Ok(link),
            Err(source) => source,
        };
        let hint = match source.raw_os_error().unwrap_or_default() {
            libc::EPERM | libc::EACCES => {
                if let Some(missing) = missing_capabilities() {
                    let step = format!("attach the XDP program to NIC {}", nic.name);
                    return Err(XdpError::Permission { step, missing });
                }
                "A user namespace, a seccomp filter or a security module forbids it."
            }
            libc::EBUSY | libc::EEXIST => {
                // Somebody was faster than our question.
                self.refuse_foreign(nic)?;
                "Something else holds the NIC's XDP hook, or the bond that it is in runs an XDP program: take that off the bond, or choose another NIC."
            }
            libc::EOPNOTSUPP => "Its driver cannot do this: choose mode \"generic\", or \"auto\".",
            libc::EINVAL | libc::ERANGE => {
                "Lower the NIC's MTU, switch its LRO off, or choose mode \"generic\"."
            }
            libc::ENODEV => "The NIC has gone: check `ip link`.",
            _ => "The kernel's log (dmesg) may say more.",
        };
        Err(XdpError::Attach {
            nic: nic.name.clone(),
            mode,
            source,
            hint,
        })
    }
}

/// Attaches a program to an interface of the calling thread's network namespace, for as long as the link is open.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    interface: u32,
    mode: AttachedMode,
) -> io::Result<OwnedFd> {
    link_at(program, interface, sys::BPF_XDP, mode.flags())
}

/// As [`link_create`], at any of an interface's hooks.
pub(crate) fn link_at(
    program: BorrowedFd<'_>,
    interface: u32,
    hook: sys::bpf_attach_type,
    flags: u32,
) -> io::Result<OwnedFd> {
    let options = sys::bpf_link_create_opts {
        sz: size_of::<sys::bpf_link_create_opts>() as sys::size_t,
        flags,
        ..Default::default()
    };
    // Interface indices are positive and fit, because the kernel keeps them in an int.
    let interface = i32::try_from(interface).unwrap_or(i32::MAX);
    // SAFETY: the program's descriptor is open, `options` is whole, carries its own size and
    // outlives the call; the zeroed rest means "absent".
    let link =
        unsafe { sys::bpf_link_create(program.as_raw_fd(), interface, hook, &raw const options) };
    if link < 0 {
        return Err(io::Error::from_raw_os_error(-link));
    }
    // SAFETY: a descriptor that the kernel has just given to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Loads a compiled object into the kernel.
pub(crate) fn load_object(
    bytes: &[u8],
    name: &'static str,
    prepare: impl FnOnce(&mut libbpf_rs::OpenObject) -> Result<(), libbpf_rs::Error>,
) -> Result<Object, XdpError> {
    libbpf_rs::set_print(Some((PrintLevel::Debug, log)));
    let mut open = ObjectBuilder::default()
        .name(name)
        .and_then(|builder| builder.open_memory(bytes))
        .map_err(|source| refused(format!("open the XDP object {name}"), source))?;
    prepare(&mut open)
        .map_err(|source| refused(format!("prepare the XDP object {name}"), source))?;
    open.load()
        .map_err(|source| refused(format!("load the XDP program {name}"), source))
}

/// Key of the only entry of the configuration's maps.
const ONLY: [u8; 4] = [0; 4];

/// Interface indices are positive and fit, because the kernel keeps them in an int.
fn interface_index(nic: &Nic) -> i32 {
    i32::try_from(nic.index).unwrap_or(i32::MAX)
}

/// A refusal for want of rights names them; the verifier answers EACCES as well.
pub(crate) fn refused(step: impl Into<String>, source: libbpf_rs::Error) -> XdpError {
    let step = step.into();
    match missing_capabilities() {
        Some(missing) if source.kind() == ErrorKind::PermissionDenied => {
            XdpError::Permission { step, missing }
        }
        _ => XdpError::Bpf { step, source },
    }
}

fn missing_capabilities() -> Option<String> {
    Capabilities::effective().ok()?.missing()
}

/// libbpf prints to standard error unless told otherwise.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that libbpf-rs calls"
)]
fn log(_level: PrintLevel, message: String) {
    tracing::debug!(target: "libbpf", "{}", message.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_holds_the_bytes_of_the_packet() {
        let ours = TunnelMatch {
            tunnel: Tunnel::Vxlan {
                port: 8472,
                vni: 0x00ab_cdef,
            },
            vlan: Some(0x0102),
            v4: Some(Match {
                local: Ipv4Addr::new(192, 0, 2, 1),
                direct: Some(Direct {
                    subnet: (Ipv4Addr::new(10, 1, 2, 3), 24),
                    network: (Ipv4Addr::new(10, 1, 2, 3), 15),
                }),
            }),
            v6: Some(Match {
                local: "2001:db8::1".parse().unwrap(),
                direct: Some(Direct {
                    subnet: ("fd00::ffff:0:0:1".parse().unwrap(), 65),
                    network: (Ipv6Addr::UNSPECIFIED, 0),
                }),
            }),
        };
        let all = ours.bytes(3840).unwrap();
        // The offsets of bpf/ripstop.h.
        let at = |offset: usize, part: &[u8]| {
            assert_eq!(&all[offset..offset + part.len()], part, "at {offset}");
        };
        at(0, &1u32.to_ne_bytes());
        at(4, &[192, 0, 2, 1]);
        at(8, &1u32.to_ne_bytes());
        at(12, &[10, 1, 2, 0, 255, 255, 255, 0]);
        at(20, &[10, 0, 0, 0, 255, 254, 0, 0]);
        at(28, &1u32.to_ne_bytes());
        at(32, &[0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0]);
        at(40, &[0, 0, 0, 0, 0, 0, 0, 1]);
        at(48, &1u32.to_ne_bytes());
        at(52, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]);
        at(68, &[255; 8]);
        at(76, &[0x80, 0, 0, 0, 0, 0, 0, 0]);
        at(84, &[0; 32]);
        at(116, &0x00ab_cdefu32.to_ne_bytes());
        at(120, &[0x21, 0x18, 1, 2]);
        at(124, &3840u32.to_ne_bytes());
        assert_eq!(TunnelMatch::OFF.bytes(0).unwrap(), [0; MATCH_BYTES]);
    }

    #[test]
    fn the_header_numbers_the_outcomes_alike() {
        let header = include_str!("../bpf/ripstop.h");
        for outcome in Outcome::ALL {
            let line = format!(
                "RIPSTOP_{} = {},",
                outcome.name().to_uppercase(),
                *outcome as u32
            );
            assert!(header.contains(&line), "{line}");
        }
        assert!(header.contains(&format!("RIPSTOP_OUTCOMES = {},", Outcome::ALL.len())));
        assert!(header.contains(&format!("#define RIPSTOP_QUEUES_MAX {QUEUES_MAX}")));
    }
}
