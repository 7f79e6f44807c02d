//! Transmitting by live frames: a worker's packets are sent by an XDP program that the worker runs once for each
//! (`BPF_PROG_RUN` with `BPF_F_TEST_XDP_LIVE_FRAMES`, net/bpf/test_run.c, Linux 5.18).
//!
//! ```text
//!   UMEM = BPF map "frames" ◄── order: frame, start, length ── worker
//!              │ bpf_xdp_store_bytes                             │ one call per burst
//!              ▼                                                 ▼
//!         live frame ── bpf_redirect_map ──► device's ndo_xdp_xmit: no socket buffer, one NAPI run for all
//! ```
//!
//! For veth this is cheaper than an AF_XDP socket, which makes a socket buffer of each packet and has the peer receive
//! each by itself. A call has a price of its own, so that small bursts, and packets that do not fit, are left to the
//! socket. It is a test facility of the kernel, to be asked for. The peer must take frames, that is have an XDP program
//! or GRO; the kernel tells (`NETDEV_XDP_ACT_NDO_XMIT`, Linux 6.3), because it would drop them without a word.
//!
//! Each call would take 20 ms if the kernel had to learn of the program first. It knows those that are on a device. So
//! the program is put on a veth pair that serves no other purpose, in a namespace that only this process holds.
#![expect(
    unsafe_code,
    reason = "runs a BPF program and writes to a map in place"
)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use af_xdp::{Interface, Umem, UmemOptions};
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, Object};

use crate::port::{Burst, Transmitted};
use crate::veth::Namespace;
use crate::xdp::{self, Aligned, AttachedMode, XdpError};

/// Most frames of a call (`ORDERS` in bpf/inject.bpf.c, and the kernel's `TEST_XDP_MAX_BATCH`).
const ORDERS: usize = 256;
/// A packet begins before this byte of its frame (`START`).
const START: usize = 512;
/// Longest packet of large frames (`LENGTH_MAX`).
const LENGTH_MAX: usize = 3392;
/// Fewest packets for which a call costs less than a socket: 16 were 0.8 of its speed, 32 were 1.4 times it.
pub const BURST_MIN: usize = 32;
/// Calls that are interrupted in a row before the rest is left to the socket.
const ATTEMPTS: usize = 4;
/// Calls or writes that fail in a row before no more are made.
const FAILURES: u32 = 8;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`.
const LIVE_FRAMES: u32 = 1 << 1;

static OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/inject.bpf.o")));

/// Why live frames cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The program or a map of it is refused.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// The packet memory cannot be had.
    #[error(transparent)]
    Memory(af_xdp::Error),
    /// An operation was refused.
    #[error("{operation}: {source}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The device's peer would drop the frames.
    #[error(
        "the other end of {device} takes no frames: switch GRO on there (ethtool -K … gro on), or give it an XDP program; needs Linux 6.3"
    )]
    Peer {
        /// The device.
        device: String,
    },
}

fn refused(operation: &'static str) -> impl Fn(io::Error) -> InjectError {
    move |source| InjectError::Refused { operation, source }
}

/// Makes a UMEM that programs can read: it lies in the map that is returned with it.
///
/// # Errors
/// The kernel refuses the map, or the memory.
pub fn memory(options: &UmemOptions) -> Result<(MapHandle, Umem), InjectError> {
    let step = "make a map for the packet memory";
    let create = sys::bpf_map_create_opts {
        sz: size_of::<sys::bpf_map_create_opts>() as sys::size_t,
        map_flags: sys::BPF_F_MMAPABLE,
        ..Default::default()
    };
    let map = MapHandle::create(
        MapType::Array,
        Some("frames"),
        4,
        options.frame_size,
        options.frames,
        &create,
    )
    .map_err(|source| xdp::refused(step, source))?;
    let file = map.as_fd().try_clone_to_owned().map_err(refused(step))?;
    // SAFETY: the map is ours alone; the program only reads it, and a map keeps its size.
    let umem = unsafe { Umem::from_file(options, file) }.map_err(InjectError::Memory)?;
    Ok((map, umem))
}

/// Whether frames that are injected into a device arrive: for veth, whether its peer has NAPI. In the network namespace
/// of the calling thread; false also where the kernel does not tell.
pub fn takes_frames(interface: u32) -> bool {
    /// `NETDEV_XDP_ACT_NDO_XMIT` (include/uapi/linux/netdev.h).
    const NDO_XMIT: u64 = 1 << 2;
    let mut answer = sys::bpf_xdp_query_opts {
        sz: size_of::<sys::bpf_xdp_query_opts>() as sys::size_t,
        ..Default::default()
    };
    let interface = i32::try_from(interface).unwrap_or(i32::MAX);
    // SAFETY: `answer` is whole, carries its own size and outlives the call.
    let status = unsafe { sys::bpf_xdp_query(interface, 0, &raw mut answer) };
    status == 0 && answer.feature_flags & NDO_XMIT != 0
}

/// Aims at a device; where that fails, says why and that the socket sends instead.
pub(crate) fn aims(injector: &Injector, device: &Interface) -> bool {
    let outcome = injector.aim(device);
    if let Err(error) = &outcome {
        tracing::warn!(
            device = device.name(),
            "{error}; packets are sent by the AF_XDP socket"
        );
    }
    outcome.is_ok()
}

/// What a worker's injector, or its way for super-packets, and whoever watches the device tell each other.
#[derive(Debug, Default)]
pub struct Switch {
    /// Whether what is sent this way arrives.
    taken: AtomicBool,
    /// The error for which the worker has given up, until it is asked for; 0 if there is none.
    gave_up: AtomicI32,
}

impl Switch {
    /// Says whether what is sent this way arrives, and returns what was so before.
    pub fn set_taken(&self, taken: bool) -> bool {
        self.taken.swap(taken, Ordering::Relaxed)
    }

    /// Why the worker has given up, once.
    pub fn take_error(&self) -> Option<io::Error> {
        let error = self.gave_up.swap(0, Ordering::Relaxed);
        (error != 0).then(|| io::Error::from_raw_os_error(error))
    }
}

/// The worker's end of a [`Switch`], with what it remembers of refusals.
#[derive(Debug, Default)]
pub(crate) struct Way {
    switch: Arc<Switch>,
    failures: u32,
}

impl Way {
    /// Whether it is worth trying: what is sent this way arrives, and the kernel has not refused it too often in a row.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.failures < FAILURES && self.switch.taken.load(Ordering::Relaxed)
    }

    /// The kernel has done it.
    #[inline]
    pub(crate) fn worked(&mut self) {
        self.failures = 0;
    }

    /// The kernel has refused it with this error.
    #[cold]
    pub(crate) fn failed(&mut self, error: i32) {
        self.failures += 1;
        if self.failures == FAILURES {
            self.switch.gave_up.store(error, Ordering::Relaxed);
        }
    }

    /// For whoever watches the device.
    pub(crate) fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }
}

/// Transmits frames of one UMEM into one device.
#[derive(Debug)]
pub struct Injector {
    orders: Orders,
    target: MapHandle,
    length_max: usize,
    way: Way,
    calls: u64,
    program: OwnedFd,
    _link: OwnedFd,
    _spare: Namespace,
    _object: Object,
}

impl Injector {
    /// Makes one for the packet memory in `frames`, of frames of this size.
    ///
    /// # Errors
    /// The kernel refuses the program, the map or the spare pair.
    pub fn new(frames: &MapHandle, frame_size: u32) -> Result<Self, InjectError> {
        let large = frame_size == 4096;
        let (map_name, program_name) = if large {
            ("frames4096", "inject4096")
        } else {
            ("frames2048", "inject2048")
        };
        let object = xdp::load_object(&OBJECT.0, "inject", |open| {
            for mut map in open.maps_mut() {
                let name = map.name().to_string_lossy().into_owned();
                if name == map_name {
                    map.reuse_fd(frames.as_fd())?;
                } else if name.starts_with("frames") {
                    map.set_autocreate(false)?;
                }
            }
            for mut program in open.progs_mut() {
                let wanted = program.name() == program_name;
                program.set_autoload(wanted);
            }
            Ok(())
        })?;
        let layout = |what| XdpError::Layout { what };
        let program = object
            .progs()
            .find(|program| program.name() == program_name);
        let program = program.ok_or_else(|| layout("program"))?;
        let program = program.as_fd().try_clone_to_owned();
        let program = program.map_err(refused("hold the injecting program"))?;
        let map = |name: &str, what| {
            let map = object.maps().find(|map| map.name() == name);
            let map = map.ok_or_else(|| layout(what))?;
            MapHandle::try_from(&map).map_err(|source| xdp::refused("hold a map", source))
        };
        let orders = map("orders", "orders")?;
        if orders.value_size() as usize != size_of::<List>() {
            return Err(layout("orders").into());
        }
        let orders = Orders::map(orders.as_fd().as_raw_fd())
            .map_err(refused("map the orders of the injecting program"))?;
        let spare = Namespace::new().map_err(refused("make a network namespace"))?;
        let link = spare
            .run(|| {
                crate::veth::make_pair("spare", "other")?;
                let interface = Interface::by_name("spare").map_err(io::Error::other)?;
                xdp::link_create(program.as_fd(), interface.index(), AttachedMode::Native)
            })
            .and_then(|link| link)
            .map_err(refused("put the injecting program on a spare veth pair"))?;
        Ok(Self {
            orders,
            target: map("target", "target")?,
            length_max: if large { LENGTH_MAX } else { 2048 - START },
            way: Way::default(),
            calls: 0,
            program,
            _link: link,
            _spare: spare,
            _object: object,
        })
    }

    /// Aims at a device of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`InjectError::Peer`], or the kernel refuses the device.
    pub fn aim(&self, device: &Interface) -> Result<(), InjectError> {
        if !takes_frames(device.index()) {
            let device = device.name().to_owned();
            return Err(InjectError::Peer { device });
        }
        let index = device.index().to_ne_bytes();
        self.target
            .update(&[0; 4], &index, MapFlags::ANY)
            .map_err(|source| xdp::refused("aim the injecting program at a device", source))?;
        self.way.switch().set_taken(true);
        Ok(())
    }

    /// For whoever watches the device.
    pub fn switch(&self) -> Arc<Switch> {
        Arc::clone(self.way.switch())
    }

    /// Transmits from the front of the burst, if that is worth a call. What it leaves is the socket's.
    #[inline]
    pub fn transmit(&mut self, umem: &mut Umem, burst: &mut Burst) -> Transmitted {
        if burst.len() < BURST_MIN || !self.way.is_open() {
            return Transmitted::default();
        }
        let mut count = 0;
        for frame in burst.iter().take(ORDERS) {
            let (number, start) = umem.place(frame);
            if start >= START || frame.len() > self.length_max {
                break;
            }
            self.orders.put(count, number, start, frame.len());
            count += 1;
        }
        if count < BURST_MIN {
            return Transmitted::default();
        }
        let ran = self.run(count);
        // What the program has refused goes to the front, to be sent by the socket.
        let mut kept = 0;
        let mut sent = Transmitted::default();
        for at in 0..ran {
            if self.orders.refused(at) {
                burst.swap(kept, at);
                kept += 1;
            } else {
                sent.packets += 1;
                sent.bytes += burst[at].len() as u64;
            }
        }
        for frame in burst.drain(kept..ran) {
            umem.give(frame);
        }
        sent
    }

    /// Runs the program for so many orders; for how many it did run.
    fn run(&mut self, count: usize) -> usize {
        self.orders.begin(count);
        let mut done = 0;
        for _ in 0..ATTEMPTS {
            let left = u32::try_from(count - done).unwrap_or(u32::MAX);
            self.calls += 1;
            let answer = self.call(left);
            done = self.orders.next().min(count);
            match answer {
                _ if done == count => {
                    self.way.worked();
                    break;
                }
                // A signal, or work that is pending for the thread (`bpf_test_timer_continue`).
                0 | libc::EINTR | libc::EAGAIN => {}
                error => {
                    self.way.failed(error);
                    break;
                }
            }
        }
        done
    }

    /// The system call; an error number or 0.
    fn call(&self, repeat: u32) -> i32 {
        // Only its length counts (`EMPTY`): the program writes every byte that is sent.
        let empty = [0u8; 64];
        let mut options = sys::bpf_test_run_opts {
            sz: size_of::<sys::bpf_test_run_opts>() as sys::size_t,
            data_in: empty.as_ptr().cast(),
            data_size_in: 64,
            repeat: i32::try_from(repeat).unwrap_or(i32::MAX),
            flags: LIVE_FRAMES,
            batch_size: repeat,
            ..Default::default()
        };
        // SAFETY: the program's descriptor is open; `options` is whole and carries its own size; it and the data that it
        // points to outlive the call.
        let status =
            unsafe { sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), &raw mut options) };
        -status
    }

    /// System calls since the last question.
    pub fn take_calls(&mut self) -> u64 {
        core::mem::take(&mut self.calls)
    }
}

/// `struct order`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Order {
    frame: u32,
    start: u16,
    length: u16,
}

/// `struct orders`.
#[repr(C)]
struct List {
    next: u32,
    count: u32,
    order: [Order; ORDERS],
}

/// The map of orders, in this process's memory. The program writes there during a call, and nobody else ever.
#[derive(Debug)]
struct Orders(NonNull<List>);

// SAFETY: the mapping belongs to the process, and only the holder of this value reaches it.
unsafe impl Send for Orders {}

impl Orders {
    fn map(file: libc::c_int) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (len, flags) = (size_of::<List>(), libc::MAP_SHARED);
        // SAFETY: a null hint replaces no existing mapping; bad arguments are errors.
        let base = unsafe { libc::mmap(core::ptr::null_mut(), len, protection, flags, file, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast())
            .map(Self)
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Writes an order. Neither place nor length is more than a frame's size, which fits.
    #[inline]
    fn put(&mut self, at: usize, frame: u32, start: usize, length: usize) {
        assert!(at < ORDERS, "a call has at most {ORDERS} orders");
        let short = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        let order = Order {
            frame,
            start: short(start),
            length: short(length),
        };
        // SAFETY: the mapping is as long as the list and page-aligned.
        let place = unsafe { &raw mut (*self.0.as_ptr()).order };
        let place = place.cast::<Order>().wrapping_add(at);
        // SAFETY: `at` is within the array, and the program does not run.
        unsafe { place.write_volatile(order) };
    }

    /// Whether the program has refused an order: it has set the length to zero.
    #[inline]
    fn refused(&self, at: usize) -> bool {
        assert!(at < ORDERS, "a call has at most {ORDERS} orders");
        // SAFETY: as in `put`.
        let place = unsafe { &raw const (*self.0.as_ptr()).order };
        let place = place.cast::<Order>().wrapping_add(at);
        // SAFETY: `at` is within the array, any bytes are an order, and the program does not run.
        unsafe { place.read_volatile() }.length == 0
    }

    fn begin(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        // SAFETY: as in `put`.
        let place = unsafe { &raw mut (*self.0.as_ptr()).count };
        // SAFETY: within the mapping, and the program does not run.
        unsafe { place.write_volatile(count) };
        // SAFETY: as above.
        let place = unsafe { &raw mut (*self.0.as_ptr()).next };
        // SAFETY: as above.
        unsafe { place.write_volatile(0) };
    }

    fn next(&self) -> usize {
        // SAFETY: as in `put`.
        let place = unsafe { &raw const (*self.0.as_ptr()).next };
        // SAFETY: within the mapping, and the program does not run.
        unsafe { place.read_volatile() as usize }
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, with this length; nobody else has the address.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<List>()) };
    }
}
