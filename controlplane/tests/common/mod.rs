//! Network namespaces for tests that need a kernel of their own to work on. They need root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "setns(2) has no safe interface in std")]
#![expect(dead_code, reason = "every test binary uses its own part")]

use core::net::IpAddr;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use ripstop_controlplane::family::PerFamily;
use ripstop_controlplane::interface::Underlay;
use ripstop_controlplane::lease::{Lease, LeaseSet};
use ripstop_controlplane::mac::Mac;
use ripstop_controlplane::netconf::NetConf;

pub(crate) mod api;
pub(crate) mod etcd;
pub(crate) mod node;
pub(crate) mod source;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace, removed with everything in it on drop.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    /// Makes a namespace with `lo` up.
    pub(crate) fn new() -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("rcp-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Makes a node: `eth0` with 10.199.0.`n`/24 and fd00:199::`n`/64 and its other end, `peer0`, in a namespace of its own.
    pub(crate) fn node(n: u8) -> (Self, Self) {
        let (node, outside) = (Self::new(), Self::new());
        node.ip(&format!(
            "link add eth0 type veth peer name peer0 netns {}",
            outside.name
        ));
        node.ip(&format!("link set eth0 address 02:aa:00:00:00:{n:02x}"));
        node.ip(&format!("addr add 10.199.0.{n}/24 dev eth0"));
        node.ip(&format!("addr add fd00:199::{n}/64 dev eth0 nodad"));
        node.ip("link set eth0 up");
        outside.ip("link set peer0 address 02:bb:00:00:00:01");
        outside.ip("link set peer0 up");
        (node, outside)
    }

    /// Runs `ip` in the namespace; its output.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.command("ip", arguments)
    }

    /// Runs a program in the namespace; its output. Panics if it fails.
    pub(crate) fn command(&self, program: &str, arguments: &str) -> String {
        let output = self.try_command(program, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a program in the namespace.
    pub(crate) fn try_command(&self, program: &str, arguments: &str) -> Output {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name, program])
            .args(arguments.split_whitespace());
        command.output().unwrap_or_else(|error| {
            panic!("{program}: {error} (these tests need root and iproute2)")
        })
    }

    /// Starts a program in the namespace.
    pub(crate) fn spawn(&self, program: &str, arguments: &[&str]) -> Process {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name, program])
            .args(arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Process(command.spawn().unwrap())
    }

    /// Calls `body` on a thread that lives in the namespace.
    pub(crate) fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: takes no pointers; `file` is open. It changes this thread only, which ends below.
                let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(
                    result,
                    0,
                    "setns: {} (these tests need root)",
                    std::io::Error::last_os_error()
                );
                body()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// A process that is killed on drop.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: takes no pointers; the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(i32::try_from(self.0.id()).unwrap(), signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program; panics if it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {errors} (these tests need root)"
    );
}

/// Waits until `condition` gives a value; how long it took.
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> (T, Duration) {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return (value, start.elapsed());
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "after 60 s still not: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The IPv4 lease of node `n`: 10.199.0.n, 10.244.n.0/24.
pub(crate) fn lease(n: u8) -> Lease {
    Lease {
        node: format!("n{n}").into(),
        public_ip: ip(&format!("10.199.0.{n}")),
        subnet: format!("10.244.{n}.0/24").parse().unwrap(),
        vtep_mac: Some(Mac([2, 0x52, 0x53, 0, 0, n])),
    }
}

/// Its IPv6 lease: fd00:199::n, fd00:10:244:n::/64.
pub(crate) fn lease6(n: u8) -> Lease {
    Lease {
        node: format!("n{n}").into(),
        public_ip: ip(&format!("fd00:199::{n}")),
        subnet: format!("fd00:10:244:{n}::/64").parse().unwrap(),
        vtep_mac: Some(Mac([2, 0x52, 0x53, 0, 6, n])),
    }
}

/// An address.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A set with `own` as seen by its node and the others as peers, IPv4 alone.
pub(crate) fn leases(own: u8, peers: &[u8]) -> LeaseSet {
    LeaseSet {
        own: PerFamily {
            v4: Some(lease(own)),
            v6: None,
        },
        peers: peers.iter().map(|&n| lease(n)).collect(),
    }
}

/// The same in both families.
pub(crate) fn leases_dual(own: u8, peers: &[u8]) -> LeaseSet {
    let four = peers.iter().map(|&n| lease(n));
    LeaseSet {
        own: PerFamily {
            v4: Some(lease(own)),
            v6: Some(lease6(own)),
        },
        peers: four.chain(peers.iter().map(|&n| lease6(n))).collect(),
    }
}

/// A lease file's text; leases of the same node become one entry.
pub(crate) fn lease_file<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> String {
    let mut entries: Vec<serde_json::Value> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for lease in leases {
        let at = *places.entry(lease.node.clone()).or_insert(entries.len());
        if at == entries.len() {
            entries.push(serde_json::json!({ "node": &*lease.node }));
        }
        let keys = match lease.public_ip {
            IpAddr::V4(_) => ["publicIP", "subnet", "vtepMAC"],
            IpAddr::V6(_) => ["publicIPv6", "ipv6Subnet", "vtepMACv6"],
        };
        let entry = &mut entries[at];
        entry[keys[0]] = lease.public_ip.to_string().into();
        entry[keys[1]] = lease.subnet.to_string().into();
        if let Some(mac) = lease.vtep_mac {
            entry[keys[2]] = mac.to_string().into();
        }
    }
    serde_json::json!({"version": 1, "leases": entries}).to_string()
}

/// The default configuration.
pub(crate) fn netconf() -> NetConf {
    conf(VXLAN)
}

/// The default configuration's text.
pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// A configuration of IPv4 with this backend.
pub(crate) fn backend(text: &str) -> String {
    format!(r#"{{"Network":"10.244.0.0/16","Backend":{text}}}"#)
}

/// A configuration of both families with this backend.
pub(crate) fn dual(text: &str) -> String {
    format!(
        r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{text}}}"#
    )
}

/// A configuration.
pub(crate) fn conf(text: &str) -> NetConf {
    NetConf::parse(text.as_bytes()).unwrap()
}

/// `eth0` of a namespace made by [`Namespace::node`].
pub(crate) fn underlay(namespace: &Namespace, n: u8) -> Underlay {
    let link = namespace.enter(|| {
        let links = ripstop_controlplane::netlink::Netlink::open()
            .unwrap()
            .links()
            .unwrap();
        links.into_iter().find(|link| link.name == "eth0").unwrap()
    });
    Underlay {
        index: link.index,
        name: link.name,
        mac: link.mac.unwrap(),
        mtu: link.mtu,
        addresses: PerFamily {
            v4: Some(ip(&format!("10.199.0.{n}"))),
            v6: Some(ip(&format!("fd00:199::{n}"))),
        },
    }
}
