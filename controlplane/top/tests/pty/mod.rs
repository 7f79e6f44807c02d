//! A program on a terminal whose far side is in the test's hands.

use core::time::Duration;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Longest wait for what takes milliseconds, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

const ENTER: &str = "\u{1b}[?1049h";
pub(crate) const LEAVE: &str = "\u{1b}[?1049l";
const SHOW_CURSOR: &str = "\u{1b}[?25h";

/// The terminal, and a child on it.
pub(crate) struct Session {
    pub(crate) keyboard: File,
    /// Our own handle of the child's side.
    terminal: OwnedFd,
    seen: Arc<Mutex<Vec<u8>>>,
    child: Child,
    before: libc::termios,
}

fn settings(terminal: &OwnedFd) -> libc::termios {
    // SAFETY: `termios` is plain integers, for which zero is valid.
    let mut settings: libc::termios = unsafe { core::mem::zeroed() };
    // SAFETY: the descriptor is open and `settings` a valid `termios` that the call fills.
    let answer = unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) };
    assert_eq!(answer, 0);
    settings
}

impl Session {
    /// Runs a program on a terminal of so many columns and rows, with what `more` adds to its command.
    pub(crate) fn of(program: &Path, size: (u16, u16), more: impl FnOnce(&mut Command)) -> Self {
        let (mut ours, mut theirs) = (-1, -1);
        // SAFETY: the two descriptors are written; null is allowed for all else.
        let answer = unsafe {
            libc::openpty(
                &raw mut ours,
                &raw mut theirs,
                core::ptr::null_mut(),
                core::ptr::null(),
                core::ptr::null(),
            )
        };
        assert_eq!(answer, 0);
        // SAFETY: openpty has just made it, and nobody else has it.
        let keyboard = unsafe { File::from_raw_fd(ours) };
        // SAFETY: as above.
        let terminal = unsafe { OwnedFd::from_raw_fd(theirs) };
        set_size(&keyboard, size);
        let before = settings(&terminal);
        let side = || Stdio::from(terminal.try_clone().unwrap());
        // In a session of its own, whose terminal this becomes.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(program);
        command.stdin(side()).stdout(side()).stderr(side());
        more(&mut command);
        let child = command.spawn().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut screen, kept) = (keyboard.try_clone().unwrap(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                kept.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self {
            keyboard,
            terminal,
            seen,
            child,
            before,
        }
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    pub(crate) fn until(&self, what: &str, seen: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !seen(&self.seen()) {
            let first: String = self.seen().chars().take(1000).collect();
            assert!(start.elapsed() < PATIENCE, "{what}: {first:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether keys come one by one.
    pub(crate) fn is_raw(&self) -> bool {
        settings(&self.terminal).c_lflag & libc::ICANON == 0
    }

    pub(crate) fn keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    pub(crate) fn kill(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: kill takes two integers; the child has not been waited for, so the number is its own.
        let answer = unsafe { libc::kill(pid, signal) };
        assert_eq!(answer, 0);
    }

    /// How the child ended. The terminal must be as it was.
    pub(crate) fn end(mut self) -> ExitStatus {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        self.until("the screen is left", |seen| {
            let left = seen.rfind(LEAVE);
            left.is_some() && left > seen.rfind(ENTER) && seen.rfind(SHOW_CURSOR) > left
        });
        let after = settings(&self.terminal);
        let modes = |of: &libc::termios| (of.c_iflag, of.c_oflag, of.c_cflag, of.c_lflag, of.c_cc);
        assert_eq!(modes(&after), modes(&self.before));
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn set_size(terminal: &File, (columns, rows): (u16, u16)) {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open and `size` is what the request reads.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(answer, 0);
}
