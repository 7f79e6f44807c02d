//! Whole frames in and out of an interface of the lab: captures and injections.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use core::time::Duration;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::lab::{Host, wait_until};
use crate::sys;

/// How long a stopped capture goes on collecting where the traffic does not end.
const DRAIN: Duration = Duration::from_millis(300);

/// Which way a captured frame went, seen from the namespace of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Received on the interface. On a fabric port: sent by the node.
    In,
    /// Sent out of the interface. On a fabric port: on its way to the node.
    Out,
}

/// A frame as it was on the interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedFrame {
    /// Which way it went.
    pub direction: Direction,
    /// From the Ethernet header to the last byte.
    pub bytes: Vec<u8>,
}

/// A finished capture.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// The frames in the order in which they passed.
    pub frames: Vec<CapturedFrame>,
    /// Frames that passed and were missed, because the capture was too slow or was full.
    pub missed: u64,
}

#[derive(Debug, Default)]
struct Shared {
    frames: Mutex<Vec<CapturedFrame>>,
    count: AtomicUsize,
    over_limit: AtomicUsize,
    stop: AtomicBool,
}

/// A running capture on one interface. What XDP takes away from a node's `eth0` is not seen there;
/// the fabric's port sees it.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    socket: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts to collect every frame, until there are `frames_max`.
    ///
    /// # Errors
    /// There is no such interface, or no right to open a packet socket.
    pub fn start(host: &dyn Host, interface: &str, frames_max: usize) -> Result<Self> {
        Self::start_filtered(host, interface, frames_max, |_frame| true)
    }

    /// Starts to collect the frames that a filter wants.
    ///
    /// # Errors
    /// As [`Capture::start`].
    pub fn start_filtered(
        host: &dyn Host,
        interface: &str,
        frames_max: usize,
        wanted: impl Fn(&CapturedFrame) -> bool + Send + 'static,
    ) -> Result<Self> {
        let socket = host
            .netns()
            .run(|| sys::packet_socket(interface, true))?
            .with_context(|| format!("capture on {interface} of {}", host.name()))?;
        sys::set_receive_buffer(&socket, 64 << 20).context("receive buffer of a capture")?;
        sys::set_receive_timeout(&socket, 20).context("receive timeout of a capture")?;
        let socket = Arc::new(socket);
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let (shared, socket) = (Arc::clone(&shared), Arc::clone(&socket));
            move || collect(&shared, &socket, frames_max, wanted)
        });
        Ok(Self {
            shared,
            socket,
            thread: Some(thread),
        })
    }

    /// Frames collected so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.count.load(Ordering::Acquire)
    }

    /// Waits until so many frames are there.
    ///
    /// # Errors
    /// They did not come within the time.
    pub fn wait_for(&self, frames: usize, within: Duration) -> Result<()> {
        let outcome = wait_until(&format!("{frames} captured frames"), within, || {
            self.count() >= frames
        });
        outcome.with_context(|| format!("{} came", self.count()))
    }

    /// Ends the capture, once what is already in the socket has been collected.
    #[must_use]
    pub fn stop(mut self) -> Captured {
        self.join();
        let frames = core::mem::take(
            &mut *self
                .shared
                .frames
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let dropped = sys::packet_socket_drops(&*self.socket).unwrap_or_default();
        let over_limit =
            u64::try_from(self.shared.over_limit.load(Ordering::Acquire)).unwrap_or(u64::MAX);
        Captured {
            frames,
            missed: over_limit + u64::from(dropped),
        }
    }

    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // The thread ends by panic only if a filter does, and then has printed why.
            drop(thread.join());
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.join();
    }
}

fn collect(
    shared: &Shared,
    socket: &OwnedFd,
    frames_max: usize,
    wanted: impl Fn(&CapturedFrame) -> bool,
) {
    let mut buffer = vec![0; 256 << 10];
    let mut stop_seen = None;
    loop {
        // Read before receiving: what came before the stop is then in the socket, and is collected.
        let stopping = shared.stop.load(Ordering::Acquire);
        if stopping && stop_seen.get_or_insert_with(Instant::now).elapsed() > DRAIN {
            return;
        }
        match sys::receive_frame(socket, &mut buffer) {
            Ok((length, outgoing)) => {
                let direction = if outgoing {
                    Direction::Out
                } else {
                    Direction::In
                };
                let frame = CapturedFrame {
                    direction,
                    bytes: buffer[..length.min(buffer.len())].to_vec(),
                };
                if !wanted(&frame) {
                    continue;
                }
                let mut frames = shared.frames.lock().unwrap_or_else(PoisonError::into_inner);
                if frames.len() < frames_max {
                    frames.push(frame);
                    shared.count.store(frames.len(), Ordering::Release);
                } else {
                    shared.over_limit.fetch_add(1, Ordering::AcqRel);
                }
            }
            Err(_) if stopping => return,
            // Nothing came for a moment; or the interface went down, and may come back.
            Err(_) => {}
        }
    }
}

/// Sends frames out of an interface exactly as they are.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
    interface: String,
}

impl Injector {
    /// Opens an interface for sending.
    ///
    /// # Errors
    /// There is no such interface, or no right to open a packet socket.
    pub fn open(host: &dyn Host, interface: &str) -> Result<Self> {
        let socket = host
            .netns()
            .run(|| sys::packet_socket(interface, false))?
            .with_context(|| format!("inject into {interface} of {}", host.name()))?;
        Ok(Self {
            socket,
            interface: interface.to_owned(),
        })
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// The kernel does not take it, for instance because it is longer than the MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = sys::send(&self.socket, frame)
            .with_context(|| format!("send {} bytes out of {}", frame.len(), self.interface))?;
        ensure!(
            sent == frame.len(),
            "{sent} of {} bytes went out of {}",
            frame.len(),
            self.interface
        );
        Ok(())
    }
}
