//! The few system calls that the standard library lacks: wake-ups, signals, directory watches, waiting on several.
#![expect(
    unsafe_code,
    reason = "calls libc; every wrapper below is safe to use in any order"
)]

use core::time::Duration;
use std::ffi::CString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// What `setsockopt` is told about an integer.
const INT_LENGTH: libc::socklen_t = 4;

/// Takes ownership of a descriptor that a system call returned, or its error.
fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the callers below pass what a successful system call just returned, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length describe `buffer`, which outlives the call.
    let read = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(read).map_err(|_negative| io::Error::last_os_error())
}

/// Lets any thread wake one that waits in [`wait_readable`].
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// Makes a wake-up that has not been signalled.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(Self)
    }

    /// Makes the descriptor readable. Signals before the next [`Self::clear`] count as one.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // The only failure is a counter that is full, and then the reader is awake already.
        // SAFETY: `one` is eight readable bytes.
        let _written = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Forgets the signals so far.
    pub fn clear(&self) {
        // An error means that there was none.
        let _none = read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// SIGTERM and SIGINT as a descriptor instead of an interruption.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks both signals for this thread and those it starts, and collects them here.
    pub fn take_over() -> io::Result<Self> {
        // SAFETY: all zeros is a valid value of this plain C structure.
        let mut set: libc::sigset_t = unsafe { core::mem::zeroed() };
        // SAFETY: `set` is a live signal set.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in [libc::SIGTERM, libc::SIGINT] {
            // SAFETY: `set` is initialised and the signal number is valid.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let failed = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, core::ptr::null_mut())
        };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        owned(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
            .map(Self)
    }

    /// Whether one of the signals has arrived since the last question.
    pub fn arrived(&self) -> bool {
        read(&self.0, &mut [0; size_of::<libc::signalfd_siginfo>()]).is_ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `fds` is readable (or broken) or the time is over; which ones are ready.
pub fn wait_readable<const N: usize>(fds: [BorrowedFd<'_>; N], timeout: Duration) -> [bool; N] {
    let mut polled = fds.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    // Rounded up: a wait of half a millisecond must not become a spin.
    let timeout_ms = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    let count = polled.len() as libc::nfds_t;
    // SAFETY: `polled` holds `count` initialised entries, whose descriptors the caller keeps open.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, timeout_ms) };
    if ready < 0 {
        return [false; N];
    }
    polled.map(|entry| entry.revents != 0)
}

/// A watch on the names in one directory.
#[derive(Debug)]
pub struct Inotify(OwnedFd);

impl Inotify {
    /// Starts to watch `directory`.
    pub fn watch_directory(directory: &Path) -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
        let path = CString::new(directory.as_os_str().as_bytes())?;
        let mask = libc::IN_CLOSE_WRITE
            | libc::IN_MOVED_TO
            | libc::IN_MOVED_FROM
            | libc::IN_CREATE
            | libc::IN_DELETE
            | libc::IN_DELETE_SELF
            | libc::IN_MOVE_SELF
            | libc::IN_ONLYDIR;
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
        if watch < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Waits for a change or the end of `timeout`, and forgets what changed; false when the directory itself went.
    pub fn wait(&self, timeout: Duration) -> bool {
        wait_readable([self.0.as_fd()], timeout);
        let mut alive = true;
        // Room for the longest name; the kernel never splits an event.
        let mut buffer = [0; 4096];
        while let Ok(length) = read(&self.0, &mut buffer) {
            let gone =
                libc::IN_IGNORED | libc::IN_DELETE_SELF | libc::IN_MOVE_SELF | libc::IN_UNMOUNT;
            let mut rest = &buffer[..length];
            // struct inotify_event: wd, mask, cookie, len (four 32-bit words), then `len` bytes of name.
            while let (Some(mask), Some(name)) = (word(rest, 4), word(rest, 12)) {
                alive &= mask & gone == 0;
                rest = rest.get(16 + name as usize..).unwrap_or_default();
            }
        }
        alive
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

/// Borrows the descriptor of a netlink socket, whose type only hands it out raw.
pub fn borrow_netlink(socket: &netlink_sys::Socket) -> BorrowedFd<'_> {
    // SAFETY: `socket` closes its descriptor when it is dropped, and the result cannot outlive the borrow of it.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Enlarges a socket's receive buffer beyond the system's limit for ordinary users (needs `CAP_NET_ADMIN`).
pub fn force_receive_buffer(socket: &netlink_sys::Socket, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer and length describe `bytes`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            INT_LENGTH,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Where a program of the system may be: a service's `PATH` may lack the second directory.
fn program_paths(program: &str) -> [PathBuf; 2] {
    [program.into(), Path::new("/usr/sbin").join(program)]
}

/// Whether a program can be found by [`spawn_program`].
pub fn has_program(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.push("/usr/sbin".into());
    directories
        .iter()
        .any(|directory| directory.join(program).is_file())
}

/// Starts a program of the system with pipes to all that it reads and writes. Where it is not installed, the error's
/// kind is `NotFound`.
pub fn spawn_program(program: &str, arguments: &[&str]) -> io::Result<Child> {
    let mut result = Err(io::ErrorKind::NotFound.into());
    for path in program_paths(program) {
        result = Command::new(path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        match &result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) | Err(_) => break,
        }
    }
    result
}

/// Runs a program of the system that reads all of its input before it prints anything, or none of it.
pub fn run_program(program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = spawn_program(program, arguments)?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input.as_bytes()) {
            // It has ended, and says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written?,
        }
    }
    child.wait_with_output()
}

/// The host's name, as `uname -n` prints it.
pub fn hostname() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/hostname")?
        .trim()
        .to_owned())
}
