//! A network namespace with veth pairs in it, which nobody else sees.
//!
//! The namespace has no name: only this process holds it, so the kernel destroys it, and all in it,
//! when the `Lab` is dropped or the process ends, however it ends.
#![expect(unsafe_code, reason = "enters network namespaces")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

#[path = "../../examples/common/mod.rs"]
mod redirect;

pub(crate) use redirect::Redirect;

pub(crate) struct Lab {
    namespace: File,
}

impl Lab {
    /// An empty namespace.
    pub(crate) fn new() -> Self {
        // SAFETY: takes nothing and cannot fail.
        let user = unsafe { libc::geteuid() };
        assert_eq!(
            user, 0,
            "this test makes network namespaces: run it as root"
        );
        let namespace = thread::spawn(|| {
            // SAFETY: changes this thread's namespace only, and the thread ends here.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
            File::open("/proc/thread-self/ns/net").expect("the thread has a namespace")
        });
        let namespace = namespace.join().expect("the namespace can be made");
        Self { namespace }
    }

    /// Runs `f` in a thread within the namespace. Sockets and links that it makes stay there.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let within = scope.spawn(|| {
                let namespace = self.namespace.as_raw_fd();
                // SAFETY: takes a descriptor and changes this thread's namespace only.
                let result = unsafe { libc::setns(namespace, libc::CLONE_NEWNET) };
                assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
                f()
            });
            match within.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs `ip` with the given words within the namespace.
    pub(crate) fn ip(&self, words: &str) {
        let output = self.run(|| Command::new("ip").args(words.split(' ')).output());
        let output = output.expect("iproute2 is installed");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {words}: {complaint}");
    }

    /// A veth pair that is up and as silent as it can be.
    pub(crate) fn veth(&self, one: &str, other: &str, mtu: u32) {
        self.ip(&format!(
            "link add {one} mtu {mtu} type veth peer name {other} mtu {mtu}"
        ));
        for end in [one, other] {
            self.ip(&format!("link set {end} addrgenmode none up"));
        }
    }
}

/// Takes `CAP_IPC_LOCK` from the calling thread, and lets threads without it lock 64 KiB. Threads
/// that have it, like all others here, are not affected by the limit.
pub(crate) fn forgo_locked_memory() {
    const CAP_IPC_LOCK: u32 = 14;
    let limit = libc::rlimit {
        rlim_cur: 64 << 10,
        rlim_max: 64 << 10,
    };
    // SAFETY: `limit` is valid for reading.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    assert_eq!(result, 0, "setrlimit: {}", std::io::Error::last_os_error());
    set_capabilities(!(1 << CAP_IPC_LOCK), u32::MAX);
}

/// Takes all capabilities from the calling thread.
pub(crate) fn forgo_all_capabilities() {
    set_capabilities(0, 0);
}

/// Leaves the calling thread those of its capabilities that are in the given sets, 0 to 31 and 32
/// to 63.
fn set_capabilities(low: u32, high: u32) {
    /// `_LINUX_CAPABILITY_VERSION_3` of `include/uapi/linux/capability.h`.
    const VERSION: u32 = 0x2008_0522;
    // Version and thread; then effective, permitted and inheritable of each half.
    let header = [VERSION, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: both arrays are as long as version 3 says.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    assert_eq!(result, 0, "capget: {}", std::io::Error::last_os_error());
    for (place, set) in sets.iter_mut().enumerate() {
        *set &= if place < 3 { low } else { high };
    }
    // SAFETY: as above.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
}
