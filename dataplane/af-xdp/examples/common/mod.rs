//! The smallest XDP program that AF_XDP needs: redirect what arrives on a queue to that queue's
//! socket, and pass everything on queues without one to the kernel. Loaded by raw bpf(2) calls, so
//! that examples and tests need no BPF library.
#![expect(unsafe_code, reason = "bpf(2) system calls")]

use core::ffi::{c_long, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use af_xdp::Interface;

/// An attached program and its map of sockets. Dropping it detaches.
#[derive(Debug)]
pub(crate) struct Redirect {
    sockets: OwnedFd,
    _link: OwnedFd,
}

impl Redirect {
    /// Loads the program and attaches it to `interface` in the network namespace of the calling
    /// thread; `frags` says that it copes with packets in several buffers.
    pub(crate) fn attach(interface: &Interface, queues: u32, frags: bool) -> io::Result<Self> {
        let sockets = bpf(
            MAP_CREATE,
            &MapCreate {
                map_type: MAP_TYPE_XSKMAP,
                key_size: 4,
                value_size: 4,
                max_entries: queues,
            },
        )?;
        let instructions = program(sockets.as_raw_fd());
        let program = bpf(
            PROG_LOAD,
            &ProgLoad {
                prog_type: PROG_TYPE_XDP,
                insn_cnt: INSTRUCTIONS,
                insns: instructions.as_ptr().expose_provenance() as u64,
                license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
                prog_flags: if frags { F_XDP_HAS_FRAGS } else { 0 },
                ..ProgLoad::default()
            },
        )?;
        let link = bpf(
            LINK_CREATE,
            &LinkCreate {
                prog_fd: descriptor(&program),
                target_ifindex: interface.index(),
                attach_type: ATTACH_XDP,
                flags: 0,
            },
        )?;
        Ok(Self {
            sockets,
            _link: link,
        })
    }

    /// Sends what arrives on `queue` to `socket`.
    pub(crate) fn insert(&self, queue: u32, socket: impl AsFd) -> io::Result<()> {
        let value = socket.as_fd().as_raw_fd();
        bpf_call(
            MAP_UPDATE_ELEM,
            &MapUpdate {
                map_fd: descriptor(&self.sockets),
                pad: 0,
                key: (&raw const queue).expose_provenance() as u64,
                value: (&raw const value).expose_provenance() as u64,
                flags: 0,
            },
        )
        .map(drop)
    }
}

const INSTRUCTIONS: u32 = 6;

/// `return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);`
fn program(map: i32) -> [Instruction; INSTRUCTIONS as usize] {
    const R1: u8 = 1;
    const R2: u8 = 2;
    const R3: u8 = 3;
    const RX_QUEUE_INDEX: i16 = 16; // offset in struct xdp_md
    const PSEUDO_MAP_FD: u8 = 1;
    const XDP_PASS: i32 = 2;
    const REDIRECT_MAP: i32 = 51;
    [
        Instruction::new(0x61, R2, R1, RX_QUEUE_INDEX, 0), // r2 = *(u32 *)(r1 + 16)
        Instruction::new(0x18, R1, PSEUDO_MAP_FD, 0, map), // r1 = map, in two halves
        Instruction::new(0x00, 0, 0, 0, 0),
        Instruction::new(0xb7, R3, 0, 0, XDP_PASS), // r3 = XDP_PASS
        Instruction::new(0x85, 0, 0, 0, REDIRECT_MAP),
        Instruction::new(0x95, 0, 0, 0, 0), // return r0
    ]
}

/// `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: source << 4 | destination,
            offset,
            immediate,
        }
    }
}

const MAP_CREATE: c_uint = 0;
const MAP_UPDATE_ELEM: c_uint = 2;
const PROG_LOAD: c_uint = 5;
const LINK_CREATE: c_uint = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const F_XDP_HAS_FRAGS: u32 = 1 << 5;

// The parts of `union bpf_attr` (include/uapi/linux/bpf.h) that are used, without padding.

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[derive(Default)]
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A descriptor as bpf(2) wants it.
fn descriptor(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A bpf(2) call that answers with a descriptor.
fn bpf<T>(command: c_uint, attributes: &T) -> io::Result<OwnedFd> {
    let fd = i32::try_from(bpf_call(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: a descriptor just received, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf_call<T>(command: c_uint, attributes: &T) -> io::Result<c_long> {
    let (place, len) = (&raw const *attributes, size_of::<T>());
    // SAFETY: the attributes are `len` initialized bytes, and what they point to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, place, len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
