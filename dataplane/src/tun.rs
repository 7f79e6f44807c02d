//! The host door as a TUN device: `rip0`, one queue per worker.
//!
//! The device is not persistent: it lives as long as this process holds its descriptors. When the process dies the
//! kernel removes it, with it every route through it, and the next packet takes the main table.
//!
//! Each read or write is a packet with a virtio-net header before it, or a super-packet of up to 64 KiB: the kernel
//! hands over what a pod's TCP (or UDP, with segmentation) has given it, uncut and without checksums, and takes the same.
//! So what a packet costs in the kernel is paid once for many of them. Cutting and joining is [`crate::offload`]'s.
#![expect(
    unsafe_code,
    reason = "TUN queues are made by ioctl(2) and read with readv(2)"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use af_xdp::{Frame, Umem};

use crate::door::{HOST_DOOR, RIP0, check, short};
use crate::offload::coalesce::{self, Plan};
use crate::offload::segment::{self, Cut, Task};
use crate::offload::{OFFLOAD_LEN, Offload};
use crate::port::{Burst, Port, SuperPackets, Transmitted, Whole};
use crate::verdict::{DropReason, HEADER_MAX};

/// Longest super-packet.
const SUPER_MAX: usize = 65_536;
/// Largest burst that a configuration may ask for.
const BURST_MAX: usize = 256;
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
    /// What super-packets take, unless there are none.
    supers: Option<Supers>,
}

/// Whether the kernel may hand over super-packets, and is given them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offloads {
    /// As far as it knows how.
    #[default]
    Auto,
    /// Each packet by itself.
    Off,
}

/// Memory for super-packets, made once.
#[derive(Debug)]
struct Supers {
    /// The one that is being cut.
    buffer: Box<[u8]>,
    rest: Option<Rest>,
    /// Whether super-packets are to wait whole.
    keep: bool,
    plan: Plan,
    /// Headers of a packet that is about to become a super-packet's first.
    headers: [u8; coalesce::HEADERS_MAX],
    /// For each packet of a burst, whether the kernel has refused it.
    refused: Vec<bool>,
    counted: SuperPackets,
}

/// What is left of the super-packet in the buffer.
#[derive(Debug, Clone, Copy)]
struct Rest {
    cut: Cut,
    len: usize,
    /// Number of the next packet.
    next: usize,
    /// Whether it waits to be transmitted whole.
    whole: bool,
}

impl Supers {
    fn new(burst: usize, udp: bool) -> Self {
        Self {
            buffer: vec![0; SUPER_MAX].into(),
            rest: None,
            keep: false,
            plan: Plan::with_capacity(burst, udp),
            headers: [0; coalesce::HEADERS_MAX],
            refused: Vec::with_capacity(burst),
            counted: SuperPackets::default(),
        }
    }

    fn waits_whole(&self) -> bool {
        self.rest.is_some_and(|rest| rest.whole)
    }

    /// Writes the next packet of the super-packet to a frame; false if none is left, or it waits whole.
    #[inline]
    fn cut_next(&mut self, umem: &Umem, frame: &mut Frame) -> bool {
        let Some(rest) = self.rest.as_mut().filter(|rest| !rest.whole) else {
            return false;
        };
        let Ok(place) = umem.whole_mut(frame, HEADROOM) else {
            return false;
        };
        let written = rest.cut.write(&self.buffer[..rest.len], rest.next, place);
        rest.next += 1;
        if written.is_none() || rest.next >= rest.cut.count() {
            self.rest = None;
        }
        let cut = written.is_some_and(|len| frame.set_len(len).is_ok());
        self.counted.cut += u64::from(cut);
        cut
    }
}

/// Makes the device with `queues` queues and brings it up.
///
/// # Errors
/// When there is no TUN driver, a device of this name exists, or CAP_NET_ADMIN is missing.
pub fn open(queues: usize, offloads: Offloads) -> Result<Vec<TunQueue>, TunError> {
    let opened: Vec<TunQueue> = (0..queues)
        .map(|_| TunQueue::new(offloads))
        .collect::<Result<_, _>>()?;
    RIP0.keep_quiet();
    RIP0.accept_any_source();
    RIP0.set_up().map_err(|source| TunError::Refused {
        operation: "bring up",
        source,
        advice: "the process needs CAP_NET_ADMIN",
    })?;
    Ok(opened)
}

impl TunQueue {
    fn new(offloads: Offloads) -> Result<Self, TunError> {
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
        let mut request = RIP0.request();
        request.ifr_ifru.ifru_flags = short(flags);
        // SAFETY: TUNSETIFF reads and writes the `ifreq` that it is given, which is valid and whole.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        let taken = "if another program made a device of this name, remove it (ip link del rip0); CAP_NET_ADMIN is needed";
        check(answer).map_err(refused("make a queue of", taken))?;
        let negotiated = match offloads {
            Offloads::Auto => negotiate(&file),
            Offloads::Off => Negotiated::Nothing,
        };
        let supers = match negotiated {
            Negotiated::TcpAndUdp => Some(Supers::new(BURST_MAX, true)),
            Negotiated::Tcp => Some(Supers::new(BURST_MAX, false)),
            Negotiated::Nothing => {
                let off = set_offloads(&file, 0);
                off.map_err(refused(
                    "switch offloads off on",
                    "this kernel's TUN driver is too old",
                ))?;
                None
            }
        };
        Ok(Self {
            file,
            open: true,
            supers,
        })
    }

    #[inline]
    fn waits_whole(&self) -> bool {
        self.supers.as_ref().is_some_and(Supers::waits_whole)
    }

    /// Reads one packet into a frame, or the first of a super-packet; false when there is none.
    #[inline]
    fn read_frame(&mut self, umem: &Umem, frame: &mut Frame) -> bool {
        let Ok(place) = umem.whole_mut(frame, HEADROOM) else {
            return false;
        };
        let room = place.len();
        let beyond = self.supers.as_mut();
        let beyond = beyond.and_then(|supers| supers.buffer.get_mut(room..));
        let Some((len, offload)) = read(&self.file, place, beyond.unwrap_or_default()) else {
            return false;
        };
        let in_frame = len.min(room);
        let task = offload.and_then(|offload| segment::task(&place[..in_frame], len, &offload));
        match (task, &mut self.supers) {
            (Some(Task::Cut(cut)), Some(supers)) if cut.longest() <= room => {
                supers.buffer[..in_frame].copy_from_slice(&place[..in_frame]);
                supers.rest = Some(Rest {
                    cut,
                    len,
                    next: 0,
                    // One that is as short as its packets is none for the kernel (`__virtio_net_hdr_to_skb`).
                    whole: supers.keep && cut.count() > 1,
                });
                supers.counted.received += 1;
                return supers.cut_next(umem, frame);
            }
            (Some(Task::Checksum { start, at }), _) if len <= room => {
                segment::complete_checksum(&mut place[..len], start, at);
            }
            (Some(Task::Whole), _) if len <= room => {}
            // Too long for every path, or not what the kernel says that it is. `forward` has a reason for what is empty.
            (_, _) => return frame.set_len(0).is_ok(),
        }
        frame.set_len(in_frame).is_ok()
    }

    /// Writes the packets of a burst one by one, those that continue each other as one.
    #[inline]
    fn write_joined(&mut self, umem: &Umem, burst: &mut Burst) {
        let Some(supers) = &mut self.supers else {
            return;
        };
        supers.refused.clear();
        supers.refused.resize(burst.len(), false);
        supers
            .plan
            .make(burst.len(), |index| umem.packet(&burst[index]));
        for group in supers.plan.groups() {
            if group.count == 1 {
                let packet = umem.packet(&burst[group.first]);
                supers.refused[group.first] = write(&self.file, packet).is_err();
                continue;
            }
            let first = umem.packet_mut(&mut burst[group.first]);
            let headers = &mut supers.headers[..group.headers()];
            headers.copy_from_slice(&first[..group.headers()]);
            let head = group.head(first).bytes();
            let mut parts = [IoSlice::new(&[]); coalesce::MEMBERS_MAX + 1];
            parts[0] = IoSlice::new(&head);
            for (number, member) in supers.plan.members(group).enumerate() {
                let skip = if number == 0 { 0 } else { group.headers() };
                parts[number + 1] = IoSlice::new(&umem.packet(&burst[member])[skip..]);
            }
            if (&self.file).write_vectored(&parts[..=group.count]).is_ok() {
                supers.counted.transmitted += 1;
                supers.counted.joined += group.count as u64;
                continue;
            }
            // Whatever the kernel has against it, each packet by itself is as it came.
            let first = umem.packet_mut(&mut burst[group.first]);
            first[..headers.len()].copy_from_slice(headers);
            for member in supers.plan.members(group) {
                let packet = umem.packet(&burst[member]);
                supers.refused[member] = write(&self.file, packet).is_err();
            }
        }
    }
}

/// Writes one packet that is as it shall arrive.
#[inline]
fn write(mut file: &File, packet: &[u8]) -> io::Result<usize> {
    file.write_vectored(&[IoSlice::new(&[0; OFFLOAD_LEN]), IoSlice::new(packet)])
}

/// Reads one packet into `place`, and what does not fit in there into `beyond`; its length and what the kernel says of
/// it, or nothing when there is none.
#[inline]
fn read(file: &File, place: &mut [u8], beyond: &mut [u8]) -> Option<(usize, Option<Offload>)> {
    let mut header = [0u8; OFFLOAD_LEN];
    let part = |bytes: &mut [u8]| libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let parts = [part(&mut header), part(place), part(beyond)];
    // SAFETY: all parts point to memory of the stated length that is borrowed exclusively for the call.
    let read = unsafe { libc::readv(file.as_raw_fd(), parts.as_ptr(), 3) };
    let len = usize::try_from(read).ok()?.checked_sub(OFFLOAD_LEN)?;
    Some((len, Offload::read(&header)))
}

/// What super-packets a kernel knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Negotiated {
    /// Both, since Linux 6.2.
    TcpAndUdp,
    Tcp,
    Nothing,
}

/// Has the kernel hand over checksums and segmentation, as far as it knows how. What it hands over it also takes.
fn negotiate(file: &File) -> Negotiated {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let knows = |wanted| set_offloads(file, wanted).is_ok();
    if knows(tcp | udp) {
        Negotiated::TcpAndUdp
    } else if knows(tcp) {
        Negotiated::Tcp
    } else {
        Negotiated::Nothing
    }
}

fn set_offloads(file: &File, wanted: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, wanted) })
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
        let mut request = RIP0.request();
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
        while burst.len() < most && !self.waits_whole() {
            let Some(mut frame) = umem.take() else { return };
            let rest = self.supers.as_mut();
            if rest.is_some_and(|supers| supers.cut_next(umem, &mut frame))
                || self.read_frame(umem, &mut frame)
            {
                burst.push(frame);
            } else {
                umem.give(frame);
                return;
            }
        }
    }

    fn room(&mut self) -> usize {
        usize::MAX
    }

    /// Writes each packet; one that the kernel refuses stays in the burst.
    #[inline]
    fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        if self.supers.is_some() {
            self.write_joined(umem, burst);
        }
        let mut sent = Transmitted::default();
        let mut refused = 0;
        for at in 0..burst.len() {
            let packet = umem.packet(&burst[at]);
            let bytes = packet.len() as u64;
            let taken = match &self.supers {
                Some(supers) => !supers.refused[at],
                None => write(&self.file, packet).is_ok(),
            };
            if taken {
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

    fn keep_whole(&mut self, keep: bool) {
        if let Some(supers) = &mut self.supers {
            supers.keep = keep;
            if let Some(rest) = supers.rest.as_mut().filter(|_| !keep) {
                rest.whole = false;
            }
        }
    }

    #[inline]
    fn first_of_whole(&self, umem: &Umem, frame: &mut Frame) -> bool {
        let (Some(whole), Ok(place)) = (self.whole(), umem.whole_mut(frame, HEADROOM)) else {
            return false;
        };
        let written = whole.cut.write(whole.packet, 0, place);
        written.is_some_and(|len| frame.set_len(len).is_ok())
    }

    #[inline]
    fn whole(&self) -> Option<Whole<'_>> {
        let supers = self.supers.as_ref()?;
        let rest = supers.rest.as_ref().filter(|rest| rest.whole)?;
        Some(Whole {
            packet: supers.buffer.get(..rest.len)?,
            cut: &rest.cut,
        })
    }

    fn end_whole(&mut self, transmitted: bool) {
        let Some(supers) = &mut self.supers else {
            return;
        };
        let Some(rest) = &mut supers.rest else { return };
        if transmitted {
            supers.counted.cut += rest.cut.count() as u64;
            supers.rest = None;
        } else {
            rest.whole = false;
        }
    }

    fn pending(&self) -> usize {
        let rest = self.supers.as_ref().and_then(|supers| supers.rest);
        rest.map_or(0, |rest| rest.cut.count() - rest.next)
    }

    fn take_super_packets(&mut self) -> SuperPackets {
        let counted = self.supers.as_mut().map(|supers| &mut supers.counted);
        counted.map(core::mem::take).unwrap_or_default()
    }

    fn flush(&mut self) -> u64 {
        0
    }
}
