//! A process of the lab, known by pid and start time, so that no other process is ever ended.

use core::time::Duration;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self as this_process, Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::proc_stat::ProcStat;
use crate::sys;

/// What makes a process unmistakable: a pid alone is given out again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pid: i32,
    /// In clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    start_time: u64,
}

impl Identity {
    pub(super) fn of_this_process() -> Result<Self> {
        Self::of(i32::try_from(this_process::id()).context("own pid")?)
    }

    fn of(pid: i32) -> Result<Self> {
        let ProcStat { start_time, .. } =
            ProcStat::of(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Self { pid, start_time })
    }

    /// Whether this very process still runs. One that only waits to be collected does not, once its last thread is over:
    /// the first may be so long before, and until then sockets and programs on NICs are held.
    pub(super) fn is_alive(&self) -> bool {
        ProcStat::of(self.pid).is_some_and(|stat| {
            let over = match stat.state {
                'X' => true,
                'Z' => stat.threads <= 1,
                _ => false,
            };
            stat.start_time == self.start_time && !over
        })
    }
}

/// A started process. A record beside its log lets another run of the lab's command line end it.
#[derive(Debug)]
pub(super) struct Process {
    program: String,
    identity: Identity,
    /// Only in the run that started it.
    child: Option<Child>,
    record: PathBuf,
    released: bool,
}

#[derive(Serialize, Deserialize)]
struct Record {
    program: String,
    identity: Identity,
}

impl Process {
    /// Starts the command, which runs `program`, with its output appended to `<dir>/<program>.log`.
    pub(super) fn start(command: &mut Command, program: &str, dir: &Path) -> Result<Self> {
        let log_path = Self::log_path(dir, program);
        let log = File::options().create(true).append(true).open(&log_path);
        let log = log.with_context(|| format!("{}", log_path.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("log file")?)
            .stderr(log)
            // Out of reach of a Ctrl-C meant for the lab's own process.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let pid = i32::try_from(child.id()).context("pid")?;
        let record = Self::record_path(dir, program);
        let mut process = Self {
            program: program.to_owned(),
            identity: Identity { pid, start_time: 0 },
            child: Some(child),
            record,
            released: false,
        };
        // An uncollected child keeps its entry in /proc, so this finds even one that has failed already.
        process.identity = Identity::of(pid)?;
        let text = serde_json::to_string(&Record {
            program: program.to_owned(),
            identity: process.identity.clone(),
        });
        fs::write(&process.record, text.context("process record")?)
            .with_context(|| format!("{}", process.record.display()))?;
        Ok(process)
    }

    /// The process that an earlier run of the command line has recorded, if it still runs.
    pub(super) fn adopt(program: &str, dir: &Path) -> Option<Self> {
        let record = Self::record_path(dir, program);
        let Record { program, identity } =
            serde_json::from_str(&fs::read_to_string(&record).ok()?).ok()?;
        let process = Self {
            program,
            identity,
            child: None,
            record,
            released: false,
        };
        process.is_running().then_some(process)
    }

    pub(super) fn log_path(dir: &Path, program: &str) -> PathBuf {
        dir.join(format!("{program}.log"))
    }

    fn record_path(dir: &Path, program: &str) -> PathBuf {
        dir.join(format!("{program}.pid.json"))
    }

    pub(super) fn pid(&self) -> i32 {
        self.identity.pid
    }

    /// Whether it runs. A child of ours cannot be mistaken; an adopted process must also still be the
    /// program that was started.
    pub(super) fn is_running(&self) -> bool {
        self.identity.is_alive() && (self.child.is_some() || self.runs_its_program())
    }

    fn runs_its_program(&self) -> bool {
        let command_line =
            fs::read(format!("/proc/{}/cmdline", self.identity.pid)).unwrap_or_default();
        let program = command_line
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        let program = String::from_utf8_lossy(program);
        program.rsplit('/').next() == Some(self.program.as_str())
    }

    /// Lets the process run on without this value; its record stays for [`Process::adopt`].
    pub(super) fn release(mut self) {
        self.released = true;
    }

    pub(super) fn signal(&self, signal: i32) -> Result<()> {
        ensure!(
            self.is_running(),
            "{} (pid {}) does not run",
            self.program,
            self.identity.pid
        );
        sys::signal(self.identity.pid, signal)
            .with_context(|| format!("signal {} to {}", signal, self.program))
    }
}

impl Drop for Process {
    /// SIGKILL, and wait until it is gone.
    fn drop(&mut self) {
        if self.released {
            return;
        }
        if let Some(child) = &mut self.child {
            // An uncollected child's pid cannot have passed to another process. Both calls fail only
            // when it has ended and was collected.
            drop(child.kill());
            drop(child.wait());
        } else if self.is_running() {
            // Fails only when it ended just now.
            drop(sys::signal(self.identity.pid, libc::SIGKILL));
            while self.identity.is_alive() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        // Without a record there is nothing to remove.
        drop(fs::remove_file(&self.record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_not_taken_for_another_with_its_pid() {
        let this = Identity::of_this_process().expect("own identity");
        assert!(this.is_alive());
        let other = Identity {
            start_time: this.start_time + 1,
            ..this
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_process_lives_as_long_as_its_last_thread() {
        let threads = "import ctypes, threading, time\n\
                       threading.Thread(target=time.sleep, args=(60,)).start()\n\
                       ctypes.CDLL(None).pthread_exit(None)";
        let mut child = Command::new("python3")
            .args(["-c", threads])
            .spawn()
            .expect("starts");
        let pid = i32::try_from(child.id()).expect("a pid");
        let identity = Identity::of(pid).expect("it runs");
        let first = crate::wait_until("its first thread is over", Duration::from_secs(20), || {
            ProcStat::of(pid).is_some_and(|stat| stat.state == 'Z')
        });
        let lives = identity.is_alive();
        child.kill().expect("its other thread can be ended");
        child.wait().expect("it ends");
        first.expect("a first thread that ends");
        assert!(lives, "it has another thread");
        assert!(!identity.is_alive());
    }

    #[test]
    fn a_process_ends_with_its_value() {
        let dir = std::env::temp_dir().join(format!("ripstop-perf-process-{}", this_process::id()));
        fs::create_dir_all(&dir).expect("directory");
        let process =
            Process::start(Command::new("sleep").arg("60"), "sleep", &dir).expect("starts");
        let identity = process.identity.clone();
        // Between fork and exec the command line is still this test's.
        crate::wait_until("sleep runs", Duration::from_secs(5), || {
            process.is_running()
        })
        .expect("runs");
        process.signal(libc::SIGSTOP).expect("stops");
        assert!(process.is_running(), "stopped is not dead");
        drop(process);
        assert!(!identity.is_alive());
        fs::remove_dir_all(&dir).expect("directory is ours");
    }
}
