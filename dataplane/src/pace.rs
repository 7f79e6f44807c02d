//! When a worker turns, sleeps and does its housekeeping. The worker itself reads no clock.
#![expect(unsafe_code, reason = "poll(2) has no safe interface in std")]

use core::time::Duration;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use ripstop_fib::map::monotonic_ns;
use ripstop_fib::stats::Polling;

use crate::config::Coalesce;
use crate::worker::HOUSEKEEPING_TURNS;

/// Turns without a packet before an adaptive worker sleeps: some ten microseconds, about what waking up costs.
const IDLE_TURNS: u32 = 16;
/// Packets in hand that make a turn count for one more. On a virtual NIC the kernel does all of the way to the receiver
/// within the worker's system calls, some microseconds per packet: 256 turns of full bursts would take so long on a CPU
/// that is shared that the worker's heartbeat looks like that of a stuck one.
const TURN_PACKETS: u8 = 16;
/// Longest sleep in milliseconds. A heartbeat older than a second means that the worker is stuck.
const SLEEP_MS: i32 = 100;
/// Least time between two housekeepings that are done on the way to sleep.
const HOUSEKEEPING_NS: u64 = 10_000_000;

/// What is due after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// The next turn.
    Turn,
    /// Housekeeping at this time (CLOCK_MONOTONIC in nanoseconds), then the next turn.
    Housekeeping(u64),
    /// Sleep, as nothing comes; housekeeping at this time first, if given.
    Sleep(Option<u64>),
    /// Let packets gather for this long, as too few come to be worth a turn.
    Gather(Duration),
}

/// Decides what is due, and sleeps.
#[derive(Debug)]
pub struct Pace {
    polling: Polling,
    coalesce: Option<Coalesce>,
    /// Readable when there is something to do: NIC queue, host door, and the watcher's wake-up.
    wakers: Vec<OwnedFd>,
    turns: u32,
    idle: u32,
    last_housekeeping_ns: u64,
    /// When the last turn or sleep ended, and what turns and sleeps have taken since they were asked for.
    last_cycles: u64,
    cycles: Cycles,
}

/// What turns and sleeps have taken, in cycles of the time-stamp counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cycles {
    /// Turns that had a packet in hand.
    pub busy: u64,
    /// Turns that had none.
    pub idle: u64,
    /// From the end of the turn before a sleep until the worker was awake again.
    pub asleep: u64,
}

/// The time-stamp counter, some ten nanoseconds to read; 0 where the processor has none that counts cycles.
#[inline]
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 processor has the instruction, and Linux lets processes use it.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        0
    }
}

impl Pace {
    /// A pace for a worker that any of `wakers` wakes.
    pub fn new(polling: Polling, coalesce: Option<Coalesce>, wakers: Vec<OwnedFd>) -> Self {
        Self {
            polling,
            coalesce: coalesce.filter(|_| polling == Polling::Adaptive),
            wakers,
            turns: 0,
            idle: 0,
            last_housekeeping_ns: 0,
            last_cycles: cycles(),
            cycles: Cycles::default(),
        }
    }

    /// What is due after a turn that had `work` packets in hand.
    #[inline]
    pub fn after_turn(&mut self, work: usize) -> Due {
        self.turns += 1 + u32::from(u8::try_from(work).unwrap_or(u8::MAX) / TURN_PACKETS);
        let now = cycles();
        // Another CPU's counter may be behind.
        let took = now.saturating_sub(self.last_cycles);
        self.last_cycles = now;
        if work > 0 {
            self.cycles.busy += took;
            self.idle = 0;
            if let Some(coalesce) = self.coalesce
                && work < coalesce.packets as usize
                && self.turns < HOUSEKEEPING_TURNS
            {
                return Due::Gather(coalesce.pause);
            }
        } else {
            self.cycles.idle += took;
            self.idle += 1;
            if self.polling == Polling::Adaptive && self.idle >= IDLE_TURNS {
                return self.before_sleep();
            }
            core::hint::spin_loop();
        }
        if self.turns < HOUSEKEEPING_TURNS {
            Due::Turn
        } else {
            Due::Housekeeping(self.housekeeping_at(monotonic_ns()))
        }
    }

    /// What turns and sleeps since the last question have taken.
    pub fn take_cycles(&mut self) -> Cycles {
        core::mem::take(&mut self.cycles)
    }

    /// Sleeps until a packet arrives, somebody wakes the worker, or it is time for a heartbeat.
    pub fn sleep(&mut self) {
        let poll = |fd: &OwnedFd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [libc::pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        }; 4];
        for (place, fd) in fds.iter_mut().zip(&self.wakers) {
            *place = poll(fd);
        }
        // SAFETY: `fds` is an array of as many valid entries as stated; entries with descriptor -1 are ignored.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, SLEEP_MS) };
        if let Some(wake) = self
            .wakers
            .last()
            .filter(|_| fds.iter().any(|fd| fd.revents != 0))
        {
            drain(wake);
        }
        self.idle = 0;
        let now = cycles();
        self.cycles.asleep += now.saturating_sub(self.last_cycles);
        self.last_cycles = now;
    }

    /// Lets packets gather.
    pub fn gather(&mut self, pause: Duration) {
        std::thread::sleep(pause);
        let now = cycles();
        self.cycles.asleep += now.saturating_sub(self.last_cycles);
        self.last_cycles = now;
    }

    #[cold]
    fn before_sleep(&mut self) -> Due {
        let now = monotonic_ns();
        let due = now.saturating_sub(self.last_housekeeping_ns) >= HOUSEKEEPING_NS;
        Due::Sleep(due.then(|| self.housekeeping_at(now)))
    }

    fn housekeeping_at(&mut self, now: u64) -> u64 {
        self.turns = 0;
        self.last_housekeeping_ns = now;
        now
    }
}

/// Nice value of a worker: where it shares its core it runs before ordinary processes, which lose little by it because
/// an idle worker sleeps. A burst of packets waits in finite rings, a compiler does not.
const NICE: i32 = -15;

/// Lets the calling thread run before ordinary processes.
///
/// # Errors
/// Without CAP_SYS_NICE; the thread runs on as it was.
pub fn run_first() -> io::Result<()> {
    // SAFETY: setpriority(2) takes three integers; with PRIO_PROCESS, 0 is the calling thread.
    let answer = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// An event counter by which another thread wakes a worker.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// A new one.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd(2) takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else has it.
        Ok(Self(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes eight bytes that live for the call. A full counter means that a wake-up is pending.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Another handle, for the worker to sleep on.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn handle(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

/// Resets an event counter.
fn drain(fd: &OwnedFd) {
    let mut count = [0u8; 8];
    // SAFETY: reads at most eight bytes into an array of eight; the descriptor does not block.
    unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_turns_are_fewer_between_two_housekeepings() {
        for (work, turns) in [(0, 256), (15, 256), (16, 128), (110, 37), (usize::MAX, 16)] {
            let mut pace = Pace::new(Polling::Busy, None, Vec::new());
            for _ in 1..turns {
                assert_eq!(pace.after_turn(work), Due::Turn, "{work} packets");
            }
            let due = pace.after_turn(work);
            assert!(
                matches!(due, Due::Housekeeping(_)),
                "{work} packets: {due:?}"
            );
        }
    }
}
