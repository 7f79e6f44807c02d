//! AF_XDP sockets: packets from and to a network queue through memory shared with the kernel.
//!
//! ```text
//!                  ┌───────────────── Umem ─────────────────┐
//!                  │ pool of free frames │ frames in memory │
//!                  └──┬───────────▲──────────────▲──────────┘
//!              refill │           │ give         │ reclaim
//!   Receiver  ┌───────▼─────┐     │       ┌──────┴──────┐   Transmitter
//!             │ fill     rx │   Frame     │ tx   compl. │
//!             └───────┬───▲─┘  receive →  └──┬──────▲───┘
//!                     ▼   │   your code      ▼      │
//!   kernel  ══════════════╧═════ → send ════════════╧═══════ queue n of an interface
//! ```
//!
//! The one idea: a [`Frame`] is a token that moves. Whoever holds it owns its bytes; sending it
//! consumes it; there is no address to copy. Several sockets may share one [`Umem`], so what one
//! received another transmits without a copy, and headers are pushed and popped by moving the
//! packet's start within the frame.
//!
//! A worker owns its [`Umem`] and the halves of its sockets. All of them are `Send`, so they can be
//! made in one thread and moved to another; none is meant for two threads at a time.
//!
//! The crate does not load or attach XDP programs: give [`SocketHandle::as_fd`] to whatever fills
//! the XSKMAP.
//!
//! [`SocketHandle::as_fd`]: std::os::fd::AsFd::as_fd
//!
//! ```no_run
//! use af_xdp::{Interface, Socket, SocketOptions, Umem, UmemOptions};
//!
//! # fn main() -> Result<(), Box<dyn core::error::Error>> {
//! let mut umem = Umem::new(&UmemOptions::default())?;
//! let interface = Interface::by_name("eth0")?;
//! let mut socket = Socket::open(&mut umem, &interface, 0, &SocketOptions::default())?;
//! socket.receiver.refill(&mut umem, 1024);
//! let mut burst = Vec::with_capacity(64);
//! socket.receiver.receive(&mut umem, &mut burst, 64);
//! for frame in burst.drain(..) {
//!     let _first = umem.packet(&frame).first();
//!     umem.give(frame);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What must not compile: a frame is not copied,
//!
//! ```compile_fail,E0382
//! # let mut umem = af_xdp::Umem::new(&af_xdp::UmemOptions::default()).unwrap();
//! let frame = umem.take().unwrap();
//! umem.give(frame);
//! umem.packet(&frame);
//! ```
//!
//! and its bytes are not changed while they are read.
//!
//! ```compile_fail,E0502
//! # let mut umem = af_xdp::Umem::new(&af_xdp::UmemOptions::default()).unwrap();
//! let mut frame = umem.take().unwrap();
//! let read = umem.packet(&frame);
//! umem.packet_mut(&mut frame).fill(0);
//! assert_eq!(read[0], 0);
//! ```

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod error;
mod frame;
mod mapping;
mod numa;
mod ring;
mod socket;
mod sync;
mod sys;
mod umem;

pub use error::Error;
pub use frame::{FRAME_RESERVED, Frame, NoRoom};
pub use socket::{
    BusyPoll, Interface, Mode, ModeInUse, PACKET_FRAMES_MAX, Receiver, Registration, Socket,
    SocketHandle, SocketOptions, Statistics, Transmitter,
};
pub use umem::{Census, ChecksumError, Memory, Umem, UmemOptions};
