//! A node with a control plane to run on it, and a data plane that is played by the test.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ripstop_controlplane::lease::Lease;
use ripstop_controlplane::state::State;
use ripstop_fib::map::{self, DATAPLANE_LOCK, ProcessLock, open_fib};
use ripstop_fib::stats::{
    Door, Gauge, KernelCounter, Mode, NicStats, Polling, Stats, Transmit, WorkerCounters,
    WorkerIdentity,
};
use ripstop_fib::{Image, LeaseRecord, Region};

use super::{Namespace, Process, VXLAN, eventually, lease_file};

pub(crate) const CONTROLPLANE: &str = env!("CARGO_BIN_EXE_ripstop-controlplane");
const CLI: &str = env!("CARGO_BIN_EXE_ripstop");

/// A node with its files, and the control plane to run on it.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) own: u8,
}

impl Node {
    pub(crate) fn new(own: u8) -> Self {
        let (namespace, outside) = Namespace::node(own);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("net-conf.json"), VXLAN).unwrap();
        // The other nodes are addresses of the veth's far end.
        for n in [2, 3] {
            outside.ip(&format!("addr add 10.199.0.{n}/24 dev peer0"));
            outside.ip(&format!("addr add fd00:199::{n}/64 dev peer0 nodad"));
        }
        Self {
            namespace,
            outside,
            directory,
            own,
        }
    }

    /// Writes `net-conf.json`, which the next start reads.
    pub(crate) fn write_conf(&self, text: &str) {
        std::fs::write(self.directory.path().join("net-conf.json"), text).unwrap();
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    pub(crate) fn write_leases(&self, leases: &[Lease]) {
        self.write_lease_text(&lease_file(leases));
    }

    pub(crate) fn write_lease_text(&self, text: &str) {
        let temporary = self.directory.path().join("leases.tmp");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.directory.path().join("leases.json")).unwrap();
    }

    pub(crate) fn start(&self) -> Process {
        self.start_through(&[CONTROLPLANE], &[])
    }

    /// Starts it by another command, with further flags.
    pub(crate) fn start_through(&self, command: &[&str], flags: &[&str]) -> Process {
        let path = |name: &str| {
            self.directory
                .path()
                .join(name)
                .to_str()
                .unwrap()
                .to_owned()
        };
        let node_name = format!("n{}", self.own);
        let (conf, leases, run_dir) = (path("net-conf.json"), path("leases.json"), path("run"));
        let subnet_file = path("flannel/subnet.env");
        let own = [
            "--subnet-file",
            &subnet_file,
            "--net-config-path",
            &conf,
            "--run-dir",
            &run_dir,
            "--node-name",
            &node_name,
        ];
        // Leases come from one place.
        let elsewhere =
            |flag: &&str| flag.starts_with("--kube-subnet-mgr") || flag.starts_with("--etcd-");
        let source = ["--lease-file", &leases];
        let source = if flags.iter().any(elsewhere) {
            &[][..]
        } else {
            &source
        };
        let arguments = [&command[1..], &own, source, flags].concat();
        self.namespace.spawn(command[0], &arguments)
    }

    pub(crate) fn cli(&self, arguments: &str) -> (String, i32) {
        let run_dir = self.run_dir();
        let output = self
            .namespace
            .try_command(CLI, &format!("--run-dir {} {arguments}", run_dir.display()));
        let text = [output.stdout, output.stderr].concat();
        (
            String::from_utf8(text).unwrap(),
            output.status.code().unwrap(),
        )
    }

    pub(crate) fn fib(&self) -> Option<(u64, Vec<LeaseRecord>)> {
        let mapping = open_fib(&self.run_dir()).ok()?;
        let (generation, words) = Region::attach(mapping.words()).ok()?.snapshot()?;
        Some((generation, Image::attach(&words).ok()?.leases().collect()))
    }

    /// What the table says about this node.
    pub(crate) fn table_node(&self) -> ripstop_fib::Node {
        let mapping = open_fib(&self.run_dir()).unwrap();
        let (_, words) = Region::attach(mapping.words()).unwrap().snapshot().unwrap();
        Image::attach(&words).unwrap().node()
    }

    /// The record of a node's lease in a family (4 or 6).
    pub(crate) fn record(&self, name: &str, family: u8) -> Option<LeaseRecord> {
        let (_, leases) = self.fib()?;
        let wanted = |lease: &LeaseRecord| lease.node_name() == name && lease.family == family;
        leases.into_iter().find(wanted)
    }

    pub(crate) fn state(&self) -> State {
        State::read(&self.run_dir()).unwrap_or_default()
    }

    pub(crate) fn wait_resolved(&self, names: &[&str]) -> u64 {
        let what = format!("{names:?} resolved in the forwarding table");
        eventually(&what, || {
            let (generation, leases) = self.fib()?;
            let resolved = leases.iter().filter(|lease| lease.resolved && !lease.local);
            let mut found: Vec<_> = resolved.map(LeaseRecord::node_name).collect();
            found.sort_unstable();
            (found == names).then_some(generation)
        })
        .0
    }

    pub(crate) fn wait_ip(&self, arguments: &str, condition: impl Fn(&str) -> bool) -> Duration {
        eventually(arguments, || {
            condition(&self.namespace.ip(arguments)).then_some(())
        })
        .1
    }

    pub(crate) fn detour(&self) -> String {
        let output = self.namespace.try_command("ip", "route show table 21097");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Plays the data plane: the lock, the stats region with one worker, `rip0`.
pub(crate) struct FakeDataPlane {
    _lock: ProcessLock,
    stop: Arc<AtomicBool>,
    pub(crate) stalled: Arc<AtomicBool>,
    pub(crate) accept_until: Arc<AtomicU64>,
    shown: Arc<Mutex<Shown>>,
    thread: Option<JoinHandle<()>>,
    namespace: String,
}

impl FakeDataPlane {
    pub(crate) fn start(node: &Node) -> Self {
        let run_dir = node.run_dir();
        let lock = ProcessLock::acquire(&run_dir, DATAPLANE_LOCK).unwrap();
        node.namespace.ip("tuntap add rip0 mode tun");
        node.namespace.ip("link set rip0 up");
        let (stop, stalled) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let accept_until = Arc::new(AtomicU64::new(u64::MAX));
        let shown = Arc::new(Mutex::new(Shown::default()));
        let thread = std::thread::spawn({
            let (stop, stalled, accept_until) =
                (stop.clone(), stalled.clone(), accept_until.clone());
            let shown = Arc::clone(&shown);
            move || work(&run_dir, &stop, &stalled, &accept_until, &shown)
        });
        Self {
            _lock: lock,
            stop,
            stalled,
            accept_until,
            shown,
            thread: Some(thread),
            namespace: node.namespace.name.clone(),
        }
    }

    /// Changes what it shows of itself.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap());
    }
}

/// What a played data plane shows of itself in the stats region.
pub(crate) struct Shown {
    pub(crate) counters: WorkerCounters,
    pub(crate) kernel: [u64; KernelCounter::COUNT],
    pub(crate) mode: Mode,
    pub(crate) nic: Option<NicStats>,
}

impl Default for Shown {
    fn default() -> Self {
        Self {
            counters: WorkerCounters::default(),
            kernel: [0; KernelCounter::COUNT],
            mode: Mode::Copy,
            nic: None,
        }
    }
}

fn work(
    run_dir: &Path,
    stop: &AtomicBool,
    stalled: &AtomicBool,
    accept_until: &AtomicU64,
    shown: &Mutex<Shown>,
) {
    let mapping = map::create_stats(run_dir, std::process::id(), map::monotonic_ns()).unwrap();
    let stats = Stats::attach(mapping.words()).unwrap();
    let identity = |mode| WorkerIdentity {
        nic: "eth0".to_owned(),
        queue: 0,
        cpu: 0,
        mode,
        wants_zero_copy: true,
        polling: Polling::Adaptive,
        door: Door::Tun,
        transmit: [Transmit::AfXdp; 2],
        frames: 64,
        frame_size: 2048,
        huge_pages: false,
        numa_node: None,
    };
    stats.write_identity(0, &identity(Mode::Copy));
    stats.announce(1, 0);
    while !stop.load(Ordering::Relaxed) {
        let generation = open_fib(run_dir)
            .ok()
            .and_then(|mapping| Some(Region::attach(mapping.words()).ok()?.snapshot()?.0))
            .unwrap_or(0)
            .min(accept_until.load(Ordering::Relaxed));
        if !stalled.load(Ordering::Relaxed) {
            let shown = shown.lock().unwrap();
            stats.write_identity(0, &identity(shown.mode));
            stats.write_kernel(0, &shown.kernel);
            if let Some(nic) = &shown.nic {
                stats.write_nic(0, nic);
                stats.announce(1, 1);
            }
            stats.write_worker(
                0,
                &shown.counters,
                &[0; Gauge::COUNT],
                generation,
                map::monotonic_ns(),
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for FakeDataPlane {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        let arguments = ["-n", &self.namespace, "link", "del", "rip0"];
        let _ = std::process::Command::new("ip").args(arguments).status();
    }
}

/// Waits for the process to end; its exit code and what it wrote to stderr.
pub(crate) fn wait_exit(mut process: Process) -> (i32, String) {
    let status = eventually("the process ends", || process.0.try_wait().unwrap()).0;
    let mut errors = String::new();
    process
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    (status.code().unwrap(), errors)
}
