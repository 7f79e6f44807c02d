//! The two regions as files: creating, locking and mapping them.
//!
//! `<run-dir>/fib` is made once and outlives every process; the control plane that publishes in it holds a write lock
//! on `<run-dir>/controlplane.lock` while it runs. `<run-dir>/stats` is made anew by every data plane, which holds a
//! write lock on `<run-dir>/dataplane.lock` while it runs. The kernel gives a lock back when its process dies, so
//! asking for the lock's holder is asking who is alive. (A child that is forked without exec would keep it.)
//!
//! A region is never truncated or written by anything but its owner: who maps a file that is cut short gets SIGBUS on
//! the missing pages. Nothing here does that (a region is replaced by renaming, and the old mapping stays whole), and
//! the files are open to root only.
#![expect(
    unsafe_code,
    reason = "mmap(2) and record locks have no safe interface in std"
)]

use core::ptr::NonNull;
use core::time::Duration;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::string::String;
use std::time::Instant;
use std::{format, io};

use core::fmt;

use crate::publish::{self, Region, RegionError, SLOT_WORDS, SLOTS};
use crate::stats::{STATS_WORDS, Stats};
use crate::sync::Word;

/// How long a lock is waited for. A process that was killed while it started another one leaves its lock with that one
/// until the new program runs; a successor must not give up for these few milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Name of the fib region in the run directory.
pub const FIB_FILE: &str = "fib";
/// Name of the stats region in the run directory.
pub const STATS_FILE: &str = "stats";
/// Name of the file that a running data plane keeps locked.
pub const DATAPLANE_LOCK: &str = "dataplane.lock";
/// Name of the file that a running control plane keeps locked.
pub const CONTROLPLANE_LOCK: &str = "controlplane.lock";

/// Why a region could not be opened, made or locked.
#[derive(Debug)]
pub enum MapError {
    /// A system call failed.
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is not a region that this version can use.
    Region {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: RegionError,
    },
    /// Another process holds the lock.
    Locked {
        /// Which file.
        path: PathBuf,
        /// The holder's process id, 0 if it did not say.
        pid: u32,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io {
                operation,
                path,
                source,
            } => write!(f, "{operation} {}: {source}", path.display()),
            Self::Region { path, source } => write!(
                f,
                "{}: {source}; it is not a region of this version of Ripstop: stop Ripstop on this node, remove the file, start again",
                path.display()
            ),
            Self::Locked { path, pid } => {
                let who = if *pid == 0 {
                    String::from("another process")
                } else {
                    format!("process {pid}")
                };
                write!(
                    f,
                    "{}: in use by {who}; only one may run per run directory (--run-dir)",
                    path.display()
                )
            }
        }
    }
}

impl core::error::Error for MapError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Region { source, .. } => Some(source),
            Self::Locked { .. } => None,
        }
    }
}

/// A shared mapping of a whole file, as words.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<Word>,
    words: usize,
}

// SAFETY: the mapping is plain memory that any thread may use; all access goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above: `words` gives out only shared references to atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `words` words of a file for reading and, if asked, writing.
    fn of(file: &File, words: usize, writable: bool) -> io::Result<Self> {
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice; the arguments are a valid length and descriptor.
        let start = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                words * size_of::<Word>(),
                libc::PROT_READ | write,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<Word>()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, words })
    }

    /// The mapped words. Storing into a mapping that was opened for reading ends the process (SIGSEGV).
    pub fn words(&self) -> &[Word] {
        // SAFETY: the mapping is page-aligned, `words` words long (checked against the file's size before mapping),
        // and stays until drop. `Word` is an atomic with the size of u64, for which every bit pattern is valid and
        // which other processes may change at any time.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what `of` mapped; no reference outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<Word>()) };
    }
}

/// A lock that the process holds until it drops this or dies.
#[derive(Debug)]
pub struct ProcessLock {
    _file: File,
}

impl ProcessLock {
    /// Takes the lock on `<run-dir>/<name>`, creating the file.
    ///
    /// # Errors
    /// [`MapError::Locked`] when another process holds it, [`MapError::Io`] when the file cannot be made.
    pub fn acquire(run_dir: &Path, name: &str) -> Result<Self, MapError> {
        let path = run_dir.join(name);
        let io = |operation| {
            let path = path.clone();
            move |source| MapError::Io {
                operation,
                path,
                source,
            }
        };
        std::fs::create_dir_all(run_dir).map_err(io("create directory for"))?;
        let mut file = open_options(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io("open lock file"))?;
        // An open-file-description lock: it goes with this file, not with the first descriptor of it that is closed.
        let give_up = Instant::now() + LOCK_PATIENCE;
        loop {
            match record_lock(&file, libc::F_OFD_SETLK) {
                Ok(_) => break,
                // Linux says EAGAIN; fcntl(2) allows EACCES as well.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    if Instant::now() >= give_up {
                        return Err(MapError::Locked {
                            path: path.clone(),
                            pid: written_pid(&path),
                        });
                    }
                    std::thread::sleep(LOCK_RETRY);
                }
                Err(error) => return Err(io("lock")(error)),
            }
        }
        file.set_len(0).map_err(io("empty"))?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes())
            .map_err(io("write the process id to"))?;
        Ok(Self { _file: file })
    }
}

/// The process that holds the lock on `<run-dir>/<name>`; `None` if nobody does, 0 if it did not say who it is.
///
/// # Errors
/// When the file exists but cannot be asked.
pub fn lock_owner(run_dir: &Path, name: &str) -> Result<Option<u32>, MapError> {
    let path = run_dir.join(name);
    let io = |source| MapError::Io {
        operation: "ask for the lock of",
        path: path.clone(),
        source,
    };
    let file = match open_options(false).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let found = record_lock(&file, libc::F_OFD_GETLK).map_err(io)?;
    let locked = i32::from(found.l_type) != libc::F_UNLCK;
    Ok(locked.then(|| written_pid(&path)))
}

fn written_pid(path: &Path) -> u32 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn record_lock(file: &File, command: libc::c_int) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain integers, for which zero is valid; open-file-description locks want `l_pid` zero.
    let mut lock: libc::flock = unsafe { core::mem::zeroed() };
    lock.l_type = i16::try_from(libc::F_WRLCK).map_err(io::Error::other)?;
    lock.l_whence = i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open and `lock` is a valid `flock` that the kernel may write.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock)
    }
}

fn open_options(writable: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(writable).mode(0o600);
    options
}

/// Opens the fib region for publishing, making an empty one if there is none.
///
/// # Errors
/// When the file cannot be made or mapped, or is something else than a fib region of this version.
pub fn open_fib_for_publishing(run_dir: &Path) -> Result<Mapping, MapError> {
    ensure_fib(run_dir)?;
    open(&run_dir.join(FIB_FILE), true, |words| {
        Region::attach(words).map(drop)
    })
}

/// Opens the fib region for reading, making an empty one if there is none: a data plane need not wait for a control
/// plane to have run.
///
/// # Errors
/// When the file cannot be made or mapped, or is something else than a fib region of this version.
pub fn open_or_create_fib(run_dir: &Path) -> Result<Mapping, MapError> {
    ensure_fib(run_dir)?;
    open_fib(run_dir)
}

/// Makes an empty fib region unless there is one. Of two processes that try at once, one makes it.
fn ensure_fib(run_dir: &Path) -> Result<(), MapError> {
    let path = run_dir.join(FIB_FILE);
    if path.exists() {
        return Ok(());
    }
    let words = publish::region_words(SLOTS, SLOT_WORDS);
    let (temporary, _mapping) = prepare(&path, words, |words| {
        Region::format(words, SLOTS, SLOT_WORDS);
    })?;
    let io = |operation| {
        move |source| MapError::Io {
            operation,
            path: path.clone(),
            source,
        }
    };
    let linked = match std::fs::hard_link(&temporary, run_dir.join(FIB_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(io("link into place")),
    };
    let _ = std::fs::remove_file(&temporary);
    linked
}

/// Opens the fib region for reading.
///
/// # Errors
/// When there is none, or it is something else than a fib region of this version.
pub fn open_fib(run_dir: &Path) -> Result<Mapping, MapError> {
    open(&run_dir.join(FIB_FILE), false, |words| {
        Region::attach(words).map(drop)
    })
}

/// Makes a new stats region in place of any old one, for the data plane that holds [`DATAPLANE_LOCK`].
///
/// # Errors
/// When the file cannot be made or mapped.
pub fn create_stats(run_dir: &Path, pid: u32, now_ns: u64) -> Result<Mapping, MapError> {
    let path = run_dir.join(STATS_FILE);
    create(&path, STATS_WORDS, |words| {
        Stats::format(words, pid, now_ns);
    })
}

/// Opens the stats region for reading. A data plane that restarts makes a new file: open it anew for each look.
///
/// # Errors
/// When there is none, or it is something else than a stats region of this version.
pub fn open_stats(run_dir: &Path) -> Result<Mapping, MapError> {
    open(&run_dir.join(STATS_FILE), false, |words| {
        Stats::attach(words).map(drop)
    })
}

/// Makes a region and renames it into place: nobody sees it half-made.
fn create(path: &Path, words: usize, format: impl FnOnce(&[Word])) -> Result<Mapping, MapError> {
    let (temporary, mapping) = prepare(path, words, format)?;
    let io = |source| MapError::Io {
        operation: "rename into place",
        path: path.to_owned(),
        source,
    };
    std::fs::rename(&temporary, path).map_err(io)?;
    Ok(mapping)
}

/// Makes a region beside its place, under another name.
fn prepare(
    path: &Path,
    words: usize,
    format: impl FnOnce(&[Word]),
) -> Result<(PathBuf, Mapping), MapError> {
    let io = |operation| {
        move |source| MapError::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io("create directory for"))?;
    }
    // The process id alone may not be unique: two containers that share the directory have one process 1 each. Nor is
    // an existing file taken over: its maker may have it mapped, and truncating it would kill that process.
    let unique = format!("new-{}-{:x}", std::process::id(), monotonic_ns());
    let temporary = path.with_extension(unique);
    let file = open_options(true)
        .create_new(true)
        .open(&temporary)
        .map_err(io("create"))?;
    let made = file
        .set_len((words * size_of::<Word>()) as u64)
        .and_then(|()| Mapping::of(&file, words, true));
    match made {
        Ok(mapping) => {
            format(mapping.words());
            Ok((temporary, mapping))
        }
        Err(error) => {
            let _ = std::fs::remove_file(&temporary);
            Err(io("size and map")(error))
        }
    }
}

fn open(
    path: &Path,
    writable: bool,
    check: impl FnOnce(&[Word]) -> Result<(), RegionError>,
) -> Result<Mapping, MapError> {
    let io = |operation| {
        move |source| MapError::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let file = open_options(writable).open(path).map_err(io("open"))?;
    let length = file.metadata().map_err(io("read the size of"))?.len();
    let words = usize::try_from(length).unwrap_or(0) / size_of::<Word>();
    if words == 0 {
        let source = RegionError::Length { claimed: 0, words };
        return Err(MapError::Region {
            path: path.to_owned(),
            source,
        });
    }
    let mapping = Mapping::of(&file, words, writable).map_err(io("map"))?;
    check(mapping.words()).map_err(|source| MapError::Region {
        path: path.to_owned(),
        source,
    })?;
    Ok(mapping)
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of heartbeats.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec that the kernel fills; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}
