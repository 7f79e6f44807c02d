//! Memory mappings: made here, used elsewhere.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use core::ffi::c_int;
use core::ptr::{self, NonNull};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A readable and writable mapping of this process, unmapped on drop. It hands out only a pointer;
/// what may be done with the bytes is decided where they are used.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it, and this type gives
// access to no byte of it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Zeroed memory of this process alone.
    pub(crate) fn anonymous(len: usize, flags: c_int) -> io::Result<Self> {
        // Miri maps private anonymous memory, but knows no other flags.
        let populate = if cfg!(miri) { 0 } else { libc::MAP_POPULATE };
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | populate;
        Self::map(len, flags, -1, 0)
    }

    /// `len` bytes of `fd` from `offset` on, shared with its other users.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: usize, offset: libc::off_t) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map(len, flags, fd.as_raw_fd(), offset)
    }

    fn map(len: usize, flags: c_int, fd: c_int, offset: libc::off_t) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a null hint without MAP_FIXED replaces no existing mapping; bad arguments are
        // errors, not faults.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where `count` values of type `T` lie, `offset` bytes from the start; `None` if they would not
    /// be aligned or not lie within.
    pub(crate) fn part<T>(&self, offset: u64, count: u32) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?;
        let len = size_of::<T>().checked_mul(count as usize)?;
        let place = self.base.as_ptr().wrapping_add(offset).cast::<T>();
        if offset.checked_add(len)? > self.len || !place.is_aligned() {
            return None;
        }
        NonNull::new(place)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are of a mapping made by `map`, which no one else unmaps, and
        // users of its bytes hold or borrow this value.
        let unmapped = unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, 0, "a mapping could not be unmapped");
    }
}
