//! What tests of devices need: a network namespace of their own, and `ip`.

use std::process::Command;
use std::{fs, io};

/// Gives the calling thread a network namespace, which the kernel removes with the thread.
pub(crate) fn own_namespace() {
    // SAFETY: takes a number; only this thread changes its namespace.
    let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    let why = "these tests need root (a network namespace of their own)";
    assert_eq!(status, 0, "{why}: {}", io::Error::last_os_error());
}

/// What `ip` says.
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// What a program says that does what it is told.
pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; make setup installs it"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Version of the running kernel.
pub(crate) fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}
