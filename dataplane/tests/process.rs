//! The whole process on veth devices: what it does to NICs and host door as tables come and NICs go.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread and the process in it.

#![expect(unsafe_code, reason = "unshare, signals and packet sockets by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use ripstop_dataplane::door::RIP0;
use ripstop_dataplane::nic::{Feature, Nic};
use ripstop_dataplane::nic_settings::FILE;
use ripstop_fib::map;
use ripstop_fib::stats::{NicStats, Stats, XdpCounter};
use ripstop_fib::{
    Backend, Dscp, ImageBuilder, Local, NICS, NicRecord, Node, Publisher, Region, Route,
};
use tempfile::TempDir;

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use common::{ip, own_namespace};

const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Gives the calling thread a network namespace with two NICs of two queues, `px0` and `py0`.
fn enter_namespace() {
    own_namespace();
    for pair in ["px", "py"] {
        ip(&format!(
            "link add {pair}0 numrxqueues 4 numtxqueues 4 type veth peer name {pair}1 numrxqueues 4 numtxqueues 4"
        ));
        for end in [0, 1] {
            ip(&format!("link set {pair}{end} addrgenmode none up"));
        }
    }
}

/// A directory with a worker's file for each queue, and a running data plane.
struct DataPlane {
    directory: TempDir,
    process: Child,
}

impl DataPlane {
    fn start(queues: &[(&str, u32)], keys: &str) -> Self {
        let directory = Self::files(queues, keys);
        let process = Self::spawn(directory.path());
        let data_plane = Self { directory, process };
        data_plane.wait_until_up(queues.len());
        data_plane
    }

    fn files(queues: &[(&str, u32)], keys: &str) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("config")).unwrap();
        fs::create_dir(directory.path().join("run")).unwrap();
        for (nic, queue) in queues {
            let text = format!(
                r#"{{"nic": "{nic}", "queue": {queue}, "cpu": 0, "burst": 16,
                     "rings": {{"rx": 64, "tx": 64, "fill": 128, "completion": 64}} {keys}}}"#
            );
            let file = format!("config/{nic}-q{queue}.json");
            fs::write(directory.path().join(file), text).unwrap();
        }
        directory
    }

    fn spawn(directory: &Path) -> Child {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(directory.join("log"))
            .unwrap();
        // In a guest of the VM lab the program is elsewhere.
        let program = std::env::var_os("RIPSTOP_BIN_DIR").map_or_else(
            || env!("CARGO_BIN_EXE_ripstop-dataplane").into(),
            |directory| Path::new(&directory).join("ripstop-dataplane"),
        );
        // Forked from this thread, and so in its namespace.
        Command::new(program)
            .arg("--config-dir")
            .arg(directory.join("config"))
            .arg("--run-dir")
            .arg(directory.join("run"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn wait_until_up(&self, workers: usize) {
        self.eventually("up", || {
            self.stats(|stats| {
                stats.pid() == u64::from(self.process.id()) && stats.workers().len() == workers
            })
        });
    }

    fn restart(&mut self, workers: usize) {
        self.process = Self::spawn(self.directory.path());
        self.wait_until_up(workers);
    }

    fn run_dir(&self) -> std::path::PathBuf {
        self.directory.path().join("run")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    fn stats<T: Default>(&self, read: impl FnOnce(&Stats<'_>) -> T) -> T {
        let Ok(mapping) = map::open_stats(&self.run_dir()) else {
            return T::default();
        };
        Stats::attach(mapping.words()).map_or_else(|_| T::default(), |stats| read(&stats))
    }

    fn nic(&self, name: &str) -> NicStats {
        let find = |stats: &Stats<'_>| stats.nics().into_iter().find(|nic| nic.nic == name);
        self.stats(find).unwrap()
    }

    /// Publishes a table, as a control plane would.
    fn publish(&self, node: Node) {
        let mut image = ImageBuilder::new(node);
        if let Some(local) = node.v4 {
            image.route4(local.subnet.0, local.subnet.1, Route::Local);
        }
        let mapping = map::open_fib_for_publishing(&self.run_dir()).unwrap();
        let region = Region::attach(mapping.words()).unwrap();
        let stats = map::open_stats(&self.run_dir()).unwrap();
        let generation = Publisher::adopt(region)
            .publish(&image.build().unwrap(), || {
                Stats::attach(stats.words()).unwrap().pins()
            })
            .unwrap();
        self.eventually("use of the table", || {
            self.stats(|stats| {
                let used =
                    |worker: &ripstop_fib::stats::WorkerStats| worker.generation == generation;
                stats.workers().iter().all(used)
            })
        });
    }

    fn eventually(&self, what: &str, mut happened: impl FnMut() -> bool) {
        let start = Instant::now();
        while !happened() {
            let waited = start.elapsed();
            assert!(
                waited < Duration::from_secs(20),
                "no {what}: {}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&mut self, signal: libc::c_int) -> ExitStatus {
        let pid = libc::pid_t::try_from(self.process.id()).unwrap();
        // SAFETY: takes numbers; the child has not been waited for, so that its number is its own.
        unsafe { libc::kill(pid, signal) };
        self.process.wait().unwrap()
    }

    /// Waits for the process to end by itself, with an error that says all of `parts`.
    fn ends_with(&mut self, parts: &[&str]) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{}", self.log());
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.code(), Some(1));
        let log = self.log();
        let error = log.lines().find(|line| line.contains("ERROR")).unwrap();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn local<A: Copy>(address: A, subnet: (A, u8), pod_mtu: u16) -> Local<A> {
    Local {
        address,
        subnet,
        network: subnet,
        pod_mtu,
        vtep_mac: [2, 0, 0, 0, 0, 7],
    }
}

/// A node with these NICs, each with its VLAN.
fn node(nics: &[(&str, u16)], mtu4: u16, mtu6: Option<u16>) -> Node {
    let mut records = [NicRecord::default(); NICS];
    for (record, (name, vlan)) in records.iter_mut().zip(nics) {
        record.ifindex = Nic::open(name).unwrap().index;
        record.vlan = *vlan;
    }
    let pods4 = (Ipv4Addr::new(10, 244, 1, 0), 24);
    let pods6 = (Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0), 64);
    Node {
        backend: Backend::Vxlan,
        v4: Some(local(LOCAL, pods4, mtu4)),
        v6: mtu6.map(|mtu| local(Ipv6Addr::LOCALHOST, pods6, mtu)),
        udp_port: 8472,
        vni: 1,
        direct: false,
        dscp: Dscp::Fixed(0),
        flow_seed: 0,
        nics: records,
    }
}

/// A tunnel packet to this node, with or without a tag, as little of it as must be right.
fn frame(vlan: Option<u16>, bytes: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    let mut ip = vec![0; usize::from(bytes)];
    ip[..2].copy_from_slice(&[0x45, 0]);
    ip[2..4].copy_from_slice(&bytes.to_be_bytes());
    ip[8..10].copy_from_slice(&[64, 17]);
    ip[16..20].copy_from_slice(&LOCAL.octets());
    ip[22..24].copy_from_slice(&8472u16.to_be_bytes());
    ip[24..26].copy_from_slice(&(bytes - 20).to_be_bytes());
    ip[28] = 8;
    ip[34] = 1;
    frame.extend([8, 0]);
    frame.extend(ip);
    frame
}

/// Puts a frame on the wire at the far end of a pair.
fn send(from: &str, frame: &[u8]) {
    // SAFETY: takes plain numbers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(socket >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a descriptor that the kernel has just given to us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = libc::sockaddr_ll {
        sll_family: libc::c_ushort::try_from(libc::AF_PACKET).unwrap(),
        sll_protocol: 0,
        sll_ifindex: i32::try_from(Nic::open(from).unwrap().index).unwrap(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: frame and address are alive for the call and as long as stated.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            length,
        )
    };
    let error = io::Error::last_os_error();
    assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{error}");
}

/// Sends a frame to `px0` or `py0` until one is counted as `outcome`: the queue that it comes in on is the kernel's
/// choice, and the statistics are published every now and then.
fn assert_outcome(data_plane: &DataPlane, pair: &str, frame: &[u8], outcome: XdpCounter) {
    let near = format!("{pair}0");
    let before = data_plane.nic(&near).counters[outcome as usize];
    data_plane.eventually(outcome.name(), || {
        send(&format!("{pair}1"), frame);
        data_plane.nic(&near).counters[outcome as usize] > before
    });
}

const ALL_QUEUES: &[(&str, u32)] = &[
    ("px0", 0),
    ("px0", 1),
    ("px0", 2),
    ("px0", 3),
    ("py0", 0),
    ("py0", 1),
    ("py0", 2),
    ("py0", 3),
];

#[test]
fn nics_and_host_door_follow_the_table() {
    enter_namespace();
    let mut data_plane = DataPlane::start(ALL_QUEUES, "");
    let tags_off = |nic: &str| Feature::RxVlanOffload.is_on(nic).unwrap();
    assert_outcome(
        &data_plane,
        "px",
        &frame(None, 100),
        XdpCounter::PassedOther,
    );

    data_plane.publish(node(&[("px0", 100)], 1400, Some(1380)));
    data_plane.eventually("MTU", || RIP0.mtu().unwrap() == 1400);
    assert_eq!((tags_off("px0"), tags_off("py0")), (false, true));
    assert!(data_plane.run_dir().join(FILE).exists());
    assert_outcome(
        &data_plane,
        "px",
        &frame(Some(100), 100),
        XdpCounter::Redirected,
    );
    assert_outcome(&data_plane, "px", &frame(None, 100), XdpCounter::OtherVlan);
    assert_outcome(
        &data_plane,
        "py",
        &frame(Some(100), 100),
        XdpCounter::PassedOther,
    );
    assert_outcome(
        &data_plane,
        "py",
        &frame(None, 100),
        XdpCounter::PassedOther,
    );

    // Two NICs without tags, and an MTU that only IPv6 has.
    data_plane.publish(node(&[("px0", 0), ("py0", 0)], 1300, Some(1500)));
    data_plane.eventually("MTU", || RIP0.mtu().unwrap() == 1500);
    assert_eq!((tags_off("px0"), tags_off("py0")), (true, true));
    assert!(!data_plane.run_dir().join(FILE).exists());
    for pair in ["px", "py"] {
        assert_outcome(&data_plane, pair, &frame(None, 100), XdpCounter::Redirected);
        assert_outcome(
            &data_plane,
            pair,
            &frame(Some(100), 100),
            XdpCounter::OtherVlan,
        );
    }

    data_plane.publish(node(&[("py0", 0)], 1200, None));
    data_plane.eventually("MTU", || RIP0.mtu().unwrap() == 1200);
    assert_outcome(
        &data_plane,
        "px",
        &frame(None, 100),
        XdpCounter::PassedOther,
    );
    assert_outcome(&data_plane, "py", &frame(None, 100), XdpCounter::Redirected);
    // Whoever changes it is overruled.
    RIP0.set_mtu(1100).unwrap();
    data_plane.eventually("MTU", || RIP0.mtu().unwrap() == 1200);

    // What is longer than the NIC's MTU was not sent like that. The peer's is larger.
    ip("link set py1 mtu 3000");
    ip("link set py0 mtu 3000");
    assert_outcome(
        &data_plane,
        "py",
        &frame(None, 2900),
        XdpCounter::Redirected,
    );
    ip("link set py0 mtu 1500");
    assert_outcome(
        &data_plane,
        "py",
        &frame(None, 1500),
        XdpCounter::Redirected,
    );

    assert!(
        data_plane.signal(libc::SIGTERM).success(),
        "{}",
        data_plane.log()
    );
    assert!(RIP0.mtu().is_err(), "the host door is gone");
}

#[test]
fn a_killed_data_plane_leaves_nothing_changed_for_good() {
    enter_namespace();
    let mut data_plane = DataPlane::start(&[("px0", 0)], "");
    data_plane.publish(node(&[("px0", 100)], 1400, None));
    let tags_off = || Feature::RxVlanOffload.is_on("px0").unwrap();
    data_plane.eventually("offload switched off", || !tags_off());
    data_plane.signal(libc::SIGKILL);
    assert!(!tags_off(), "nobody has put it back");
    // The next one puts it back, finds the table, and changes it again: what was before that is still known.
    data_plane.restart(1);
    data_plane.eventually("offload switched off", || !tags_off());
    assert!(data_plane.log().contains("NIC setting put back"));
    assert!(data_plane.signal(libc::SIGTERM).success());
    assert!(tags_off());
    assert!(!data_plane.run_dir().join(FILE).exists());
}

#[test]
fn in_generic_mode_nothing_is_merged() {
    enter_namespace();
    Feature::Gro.switch("px0", true).unwrap();
    let gro = || Feature::Gro.is_on("px0").unwrap();
    let mut data_plane = DataPlane::start(&[("px0", 0)], r#", "mode": "generic""#);
    assert!(!gro());
    assert!(data_plane.signal(libc::SIGTERM).success());
    assert!(gro());
}

#[test]
fn a_nic_that_vanishes_ends_the_process() {
    enter_namespace();
    let mut data_plane = DataPlane::start(&[("px0", 0), ("py0", 1)], "");
    ip("link del py0");
    data_plane.ends_with(&["py0", "the kernel's own tunnel path carries the traffic"]);
}

#[test]
fn a_nic_that_moves_away_ends_the_process() {
    enter_namespace();
    let mut data_plane = DataPlane::start(&[("px0", 0)], "");
    // Another namespace, for as long as this process is in it.
    let mut elsewhere = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo ready; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    io::Read::read_exact(elsewhere.stdout.as_mut().unwrap(), &mut ready).unwrap();
    ip(&format!("link set px0 netns {}", elsewhere.id()));
    data_plane.ends_with(&["px0", "the kernel's own tunnel path carries the traffic"]);
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
}

/// Sets a NIC's number of receive and of transmit queues.
fn set_queues(nic: &str, queues: u32) -> io::Result<()> {
    const ETHTOOL_SCHANNELS: u32 = 0x3d;
    // struct ethtool_channels: command, four maxima, then receive, transmit, other, combined.
    let mut channels = [ETHTOOL_SCHANNELS, 0, 0, 0, 0, queues, queues, 0, 0];
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(nic.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: the request is whole and points to the structure of its command, which outlives the call.
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[test]
fn the_kernel_keeps_a_workers_queue_and_new_ones_are_noticed() {
    enter_namespace();
    for nic in ["px0", "px1"] {
        set_queues(nic, 3).unwrap();
    }
    let mut data_plane = DataPlane::start(&[("px0", 0), ("px0", 1), ("px0", 2)], "");
    assert_eq!(data_plane.nic("px0").queues, 3);
    // The queue of a bound socket, in copy mode as in zero-copy.
    let refused = set_queues("px0", 2).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    set_queues("px0", 4).unwrap();
    data_plane.eventually("new queue", || data_plane.nic("px0").queues == 4);
    let log = data_plane.log();
    assert!(log.contains("without a worker: [3]"), "{log}");
    set_queues("px0", 3).unwrap();
    data_plane.eventually("old number", || data_plane.nic("px0").queues == 3);
    assert!(data_plane.signal(libc::SIGTERM).success());
}

/// Machines have huge pages set aside or not; both are right, but silence is not.
#[test]
fn huge_pages_are_used_or_asked_for() {
    enter_namespace();
    let free = || {
        let file = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        let text = fs::read_to_string(file).unwrap_or_default();
        text.trim().parse::<u32>().unwrap_or(0)
    };
    let before = free();
    let keys = r#", "hugePages": true"#;
    // One for each worker.
    let queues = &ALL_QUEUES[..4];
    if before >= 4 {
        let mut data_plane = DataPlane::start(queues, keys);
        let identity = data_plane
            .stats(|stats| stats.workers().pop())
            .unwrap()
            .identity;
        assert!(identity.huge_pages);
        assert_eq!(free(), before - 4);
        data_plane.publish(node(&[("px0", 0)], 1400, None));
        assert_outcome(&data_plane, "px", &frame(None, 100), XdpCounter::Redirected);
        assert!(data_plane.signal(libc::SIGTERM).success());
        assert_eq!(free(), before);
    } else {
        let directory = DataPlane::files(queues, keys);
        let process = DataPlane::spawn(directory.path());
        let mut data_plane = DataPlane { directory, process };
        data_plane.ends_with(&["4 huge pages", "nr_hugepages", "hugePages to false"]);
    }
}

#[test]
fn a_key_that_means_nothing_at_this_door_is_named() {
    for (offload, named) in [("", false), (r#", "offload": "off""#, true)] {
        enter_namespace();
        let keys = format!(r#", "hostDoor": {{"kind": "veth"{offload}}}"#);
        let data_plane = DataPlane::start(ALL_QUEUES, &keys);
        assert_eq!(data_plane.log().contains("hostDoor.offload"), named);
    }
}
