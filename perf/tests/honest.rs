//! What a run reports of a path whose harm is known, and of a machine that is shared: by the command line, into the result file.
//!
//! ```text
//!   n1p0 ── cni0 ── n1 ── rip0, worker ── eth0 ═══ fabric        every 20th packet is dropped,
//!                    └ harm0 ┘ 20 ms                             every 10th comes 20 ms later than the others
//! ```
//!
//! The harm comes with a `ripstop-dataplane` that does it to its node before it becomes the real one.

#![expect(unsafe_code, reason = "a TUN device by hand")]
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use core::time::Duration;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use ripstop_perf::experiment::{Figure, Outcome, ResultFile, RunResult};
use ripstop_perf::measure::Limit;
use tempfile::TempDir;

const DELAY: Duration = Duration::from_millis(20);

/// Runs the data plane's node with the harm, in the node's namespace.
const SCRIPT: &str = r#"#!/bin/sh
set -e
setpriv --pdeathsig KILL "TEST" --exact this_is_the_harm --ignored --nocapture >/dev/null 2>&1 </dev/null &
until ip link show dev harm0 >/dev/null 2>&1; do sleep 0.01; done
ip link set harm0 up
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
echo 0 > /proc/sys/net/ipv4/conf/harm0/rp_filter
ip route add default dev harm0 table 4711
ip rule add pref 1 fwmark 4711 lookup 4711
nft -f - <<RULES
table ip harm {
  chain prerouting {
    type filter hook prerouting priority -150;
    iifname "cni0" meta l4proto udp numgen inc mod 10 0 meta mark set 4711
    iifname "cni0" meta l4proto udp numgen inc mod 20 5 drop
  }
}
RULES
exec "REAL" "$@"
"#;

#[test]
#[ignore = "run by the other tests, in the namespace of the node under test"]
fn this_is_the_harm() {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: `ifreq` is plain integers and a union of them, for which zero is valid.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"harm0") {
        *to = libc::c_char::try_from(*from).unwrap();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap();
    // SAFETY: the descriptor is open, and the request takes a valid `ifreq`.
    let answer = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    assert_eq!(answer, 0);
    let (late, waiting) = mpsc::channel::<(Instant, Vec<u8>)>();
    let mut out = tun.try_clone().unwrap();
    thread::spawn(move || {
        for (due, packet) in waiting {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            out.write_all(&packet).unwrap();
        }
    });
    let mut buffer = [0; 2048];
    let mut tun = tun;
    loop {
        let Ok(length) = tun.read(&mut buffer) else {
            // Not up yet.
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let packet = buffer[..length].to_vec();
        late.send((Instant::now() + DELAY, packet)).unwrap();
    }
}

/// Somebody else on this machine who takes as much of a CPU as he gets.
struct Neighbour(Child);

impl Neighbour {
    fn start() -> Self {
        Self(
            Command::new("sh")
                .args(["-c", "while :; do :; done"])
                .spawn()
                .unwrap(),
        )
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the programs under test are.
fn programs() -> &'static Path {
    let perf = Path::new(env!("CARGO_BIN_EXE_ripstop-perf"));
    perf.parent().unwrap()
}

/// Runs a scenario of these variants and rates; the result, and what was said.
fn run(folder: &TempDir, programs: &Path, variants: &str, rates: &str) -> (RunResult, String) {
    let (scenario, out) = (
        folder.path().join("honest.json"),
        folder.path().join("out.json"),
    );
    let text = r#"{
        "about": "known harm",
        "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 1, "mtu": 1500},
        "baseline": "wire", "variants": {VARIANTS "wire": {"path": "wire"}},
        "offers": {"work": "packets", "rates": [RATES], "sizes": [64]},
        "seconds": 1, "warmUpSeconds": 0.1, "rounds": 1
    }"#;
    fs::write(
        &scenario,
        text.replace("VARIANTS", variants).replace("RATES", rates),
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ripstop-perf"));
    command.arg("run").arg(&scenario).arg("--out").arg(&out);
    let output = command
        .env("RIPSTOP_BIN_DIR", programs)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    let Outcome::Run(run) = ResultFile::load(&out).unwrap().outcome else {
        unreachable!("run makes runs");
    };
    assert!(run.failures.is_empty(), "{said}");
    (run, said)
}

#[test]
fn known_harm_is_in_the_result_exactly() {
    let folder = TempDir::new().unwrap();
    let real = programs();
    let this = std::env::current_exe().unwrap();
    let script = SCRIPT
        .replace("TEST", &this.to_string_lossy())
        .replace("REAL", &real.join("ripstop-dataplane").to_string_lossy());
    let harmful = folder.path().join("ripstop-dataplane");
    fs::write(&harmful, script).unwrap();
    fs::set_permissions(&harmful, fs::Permissions::from_mode(0o755)).unwrap();
    symlink(
        real.join("ripstop-controlplane"),
        folder.path().join("ripstop-controlplane"),
    )
    .unwrap();

    let ripstop = r#""ripstop": {"path": "ripstop", "dataplane": {"polling": "adaptive"}},"#;
    let (run, said) = run(&folder, folder.path(), ripstop, r#"{"pps": 2000}"#);
    let find = |name: &str| {
        run.trials
            .iter()
            .find(|trial| trial.variant == name)
            .unwrap()
    };
    let harmed = &find("ripstop").measured;
    let (sent, lost, late) = (harmed.sent, harmed.lost, harmed.reordered);
    assert!(sent >= 200, "{said}");
    // Counting began with the warm-up, so that a trial has one more or less; of the last that is late none may be later.
    assert!(
        lost.abs_diff(sent / 20) <= 1,
        "lost {lost} of {sent}\n{said}"
    );
    assert!(
        late.abs_diff(sent / 10) <= 2,
        "late {late} of {sent}\n{said}"
    );
    assert_eq!(
        (harmed.received, harmed.duplicated, harmed.corrupt),
        (sent - lost, 0, 0)
    );
    // The slowest twentieth are all of those that were delayed; the histogram has three digits.
    let slow = Duration::from_nanos(harmed.latency_at(0.95).unwrap());
    assert!(slow >= DELAY * 99 / 100, "{slow:?}");
    // The same source and sink without the path: no harm is theirs, and what they cost is told.
    let wire = &find("wire").measured;
    assert_eq!(
        (wire.lost, wire.reordered, wire.duplicated, wire.corrupt),
        (0, 0, 0, 0)
    );
    assert!(!wire.source_cpu.is_zero() && !wire.sink_cpu.is_zero() && !harmed.source_cpu.is_zero());
    let row = run
        .summary
        .rows
        .iter()
        .find(|row| row.variant == "ripstop")
        .unwrap();
    let loss = row.figures[&Figure::Loss].median;
    assert!((loss - lost as f64 / sent as f64).abs() < 1e-9);
}

#[test]
fn who_limits_and_who_disturbs_is_in_the_result() {
    let folder = TempDir::new().unwrap();
    let cpus = thread::available_parallelism().unwrap().get();
    let neighbours: Vec<_> = (0..=cpus / 8).map(|_| Neighbour::start()).collect();
    let (run, said) = run(&folder, programs(), "", r#"{"pps": 100000000}, "max""#);
    drop(neighbours);
    for trial in &run.trials {
        let is_source = |limit: &Limit| matches!(limit, Limit::Source(_));
        let limits = &trial.measured.limits;
        assert!(
            limits.iter().any(is_source) || trial.measured.lost > 0,
            "{limits:?}"
        );
        // Nobody else on a wire could have lost them.
        let is_sink = |limit: &Limit| matches!(limit, Limit::Sink(_));
        assert!(
            trial.measured.lost == 0 || limits.iter().any(is_sink),
            "{limits:?}"
        );
        assert!(trial.foreign.ticks > 0, "{:?}", trial.foreign);
    }
    for part in ["the source is the limit", "other processes took"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}
