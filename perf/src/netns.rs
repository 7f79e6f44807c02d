//! Network namespaces by name, as `ip netns` keeps them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::sys;

/// A named network namespace. The value is only the name: creating and deleting are the lab's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    pub(crate) fn named(name: String) -> Self {
        Self { name }
    }

    /// The namespace of whichever thread uses this value. It has no name, and commands run in the process's.
    pub(crate) fn of_this_thread() -> Self {
        Self::named(String::new())
    }

    /// The name under which `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the namespace is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    fn path(&self) -> PathBuf {
        if self.name.is_empty() {
            return "/proc/thread-self/ns/net".into();
        }
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs a closure on a thread of its own inside the namespace. Sockets opened there stay in the
    /// namespace wherever they are used afterwards. `/proc/net` is the process's: read
    /// `/proc/thread-self/net`.
    ///
    /// # Errors
    /// The namespace is not there or cannot be entered.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        let file =
            File::open(self.path()).with_context(|| format!("network namespace {}", self.name))?;
        let outcome = thread::scope(|scope| {
            scope
                .spawn(move || {
                    sys::enter_network_namespace(file.as_fd())?;
                    Ok::<_, std::io::Error>(inside())
                })
                .join()
        });
        match outcome {
            Ok(outcome) => {
                outcome.with_context(|| format!("enter network namespace {}", self.name))
            }
            Err(payload) => panic::resume_unwind(payload),
        }
    }

    /// A command that will run inside, with the `/sys` of the namespace. `ip netns exec` replaces
    /// itself, so the process id is the program's own.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        if self.name.is_empty() {
            return Command::new(program.as_ref());
        }
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name])
            .arg(program.as_ref());
        command
    }

    /// Runs a program inside to its end.
    ///
    /// # Errors
    /// The program cannot be started. Its own failure is in the [`Output`].
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        let Some((program, arguments)) = argv.split_first() else {
            bail!("nothing to run in {}", self.name);
        };
        self.command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {argv:?} in {}", self.name))
    }

    /// Runs a program inside to its end and returns what it printed; its failure is an error.
    ///
    /// # Errors
    /// The program cannot be started, or it fails.
    pub fn output(&self, argv: &[&str]) -> Result<String> {
        let output = self.exec(argv)?;
        checked(&output).with_context(|| format!("{} in {}", argv.join(" "), self.name))
    }

    /// Feeds a batch of commands to `ip` (or `bridge`) inside.
    pub(crate) fn batch(&self, program: &str, lines: &str) -> Result<()> {
        feed(
            Command::new(program).args(["-n", &self.name, "-batch", "-"]),
            lines,
        )
        .with_context(|| format!("set up {}", self.name))
    }

    /// Sets a sysctl inside, given as the path below `/proc/sys`. False when the kernel has none of
    /// that name.
    pub(crate) fn sysctl(&self, key: &str, value: &str) -> Result<bool> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| {
            if !path.exists() {
                return Ok(false);
            }
            std::fs::write(&path, value).map(|()| true)
        })?
        .with_context(|| format!("set {key}={value} in {}", self.name))
    }
}

/// Makes namespaces, all in one go.
pub(crate) fn create(namespaces: &[&Netns]) -> Result<()> {
    let lines: String = namespaces
        .iter()
        .map(|namespace| format!("netns add {}\n", namespace.name))
        .collect();
    feed(Command::new("ip").args(["-batch", "-"]), &lines).context("make network namespaces")
}

/// Deletes namespaces; those already gone are fine, also when another process is deleting them.
pub(crate) fn delete(namespaces: &[&Netns]) -> Result<()> {
    let lines: String = namespaces
        .iter()
        .filter(|namespace| namespace.exists())
        .map(|namespace| format!("netns delete {}\n", namespace.name))
        .collect();
    let outcome = feed(Command::new("ip").args(["-force", "-batch", "-"]), &lines);
    if namespaces.iter().any(|namespace| namespace.exists()) {
        outcome.context("delete network namespaces")?;
    }
    Ok(())
}

fn feed(command: &mut Command, lines: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {:?} (package iproute2)", command.get_program()))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes()).context("feed a batch")?;
    }
    let output = child.wait_with_output().context("wait for a batch")?;
    checked(&output)
        .with_context(|| format!("batch:\n{lines}"))
        .map(drop)
}

fn checked(output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
