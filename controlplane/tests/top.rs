//! `ripstop top` reads a real stats region, which the test writes in place of a data plane.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use ripstop_fib::DropReason;
use ripstop_fib::map::{self, DATAPLANE_LOCK, ProcessLock, create_stats};
use ripstop_fib::stats::{
    Counter, Door, Gauge, KernelCounter, Mode, NicStats, Polling, Stats, WorkerCounters,
    WorkerIdentity, XdpCounter,
};

fn top(run_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ripstop"));
    command.args(["top", "--run-dir"]).arg(run_dir);
    command.args(arguments).stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Plays a data plane of two workers while `then` runs: the first moves packets, the second has stopped.
fn with_data_plane<T>(run_dir: &Path, then: impl FnOnce() -> T) -> T {
    let _lock = ProcessLock::acquire(run_dir, DATAPLANE_LOCK).unwrap();
    let mapping = create_stats(run_dir, std::process::id(), map::monotonic_ns()).unwrap();
    let stats = Stats::attach(mapping.words()).unwrap();
    for queue in 0..2 {
        let identity = WorkerIdentity {
            nic: "eth7".to_owned(),
            queue,
            cpu: 3,
            mode: Mode::Copy,
            wants_zero_copy: true,
            polling: Polling::Adaptive,
            transmit: [ripstop_fib::stats::Transmit::AfXdp; 2],
            door: Door::Veth,
            frames: 64,
            frame_size: 2048,
            huge_pages: false,
            numa_node: None,
        };
        stats.write_identity(queue as usize, &identity);
    }
    let gauges = [16, 32, 16, 0];
    assert_eq!(gauges.len(), Gauge::COUNT);
    // An hour ago, as far as the clock goes back.
    stats.write_worker(1, &WorkerCounters::default(), &gauges, 1, 1);
    let mut nic = NicStats {
        nic: "eth7".to_owned(),
        queues: 2,
        native: true,
        counters: [0; XdpCounter::COUNT],
    };
    stats.write_nic(0, &nic);
    stats.announce(2, 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut counters = WorkerCounters::default();
            let mut kernel = [0; KernelCounter::COUNT];
            while !stop.load(Ordering::Relaxed) {
                for (counter, count) in [
                    (Counter::NicRxPackets, 10),
                    (Counter::HostTxPackets, 9),
                    (Counter::HostTxBytes, 900),
                    (Counter::BusyTurns, 2),
                    (Counter::BusyCycles, 1230),
                    (Counter::IdleCycles, 230),
                    (Counter::AsleepCycles, 1000),
                ] {
                    counters.add(counter, count);
                }
                counters.dropped(DropReason::UnknownPeer);
                kernel[KernelCounter::RxRingFull as usize] += 1;
                nic.counters[XdpCounter::Redirected as usize] += 11;
                stats.write_worker(0, &counters, &gauges, 1, map::monotonic_ns());
                stats.write_kernel(0, &kernel);
                stats.write_nic(0, &nic);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = then();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// What is below a title in a line of the text, by the words of both.
fn below<'a>(text: &'a str, row: &str, title: &str) -> &'a str {
    let line = |first: &str| {
        let mut lines = text.lines().map(str::split_whitespace);
        let line = lines.find(|line| line.clone().next() == Some(first));
        line.unwrap_or_else(|| panic!("no {first}: {text}"))
    };
    // Two titles are of two words.
    let mut titles = line("WORKER").filter(|word| !["ENC", "DEC"].contains(word));
    let place = titles.position(|word| word == title).unwrap();
    line(row).nth(place).unwrap()
}

#[test]
fn a_pipe_gets_one_look_as_text() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&["--interval", "0.1"][..], &["--interval", "0.1", "--once"]] {
        let output = with_data_plane(dir.path(), || top(dir.path(), arguments).output().unwrap());
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.starts_with("ripstop top  2 workers, "), "{text}");
        for (title, wanted) in [
            ("CPU", "3"),
            ("MODE", "copy"),
            ("POLLING", "adaptive"),
            ("DOOR", "veth"),
            ("TABLE", "1"),
            ("FREE", "25%"),
            ("RECV", "50%"),
        ] {
            assert_eq!(below(&text, "eth7/0", title), wanted, "{title}: {text}");
        }
        assert_eq!(below(&text, "eth7/1", "BEAT"), "stuck");
        assert!(text.contains("\neth7          2  native "), "{text}");
    }
}

/// Frame after frame, until one is as wanted: a look may come in the middle of a publication, or too early.
#[test]
fn a_pipe_gets_as_many_looks_as_it_wants() {
    let dir = tempfile::tempdir().unwrap();
    with_data_plane(dir.path(), || {
        let arguments = ["--interval", "0.1", "--count", "500"];
        let child = top(dir.path(), &arguments).stdout(Stdio::piped()).spawn();
        let mut child = Killed(child.unwrap());
        let mut frame = String::new();
        for line in BufReader::new(child.0.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let is_whole = line.starts_with("ripstop top") && !frame.is_empty();
            let wanted = [
                ("ENCAP/S", "0"),
                ("CYC/PKT", "123"),
                ("PKT/BURST", "5"),
                ("IDLE", "50%"),
            ];
            let moving = ["DECAP/S", "DROPS/S", "KFULL/S"];
            if is_whole
                && wanted
                    .iter()
                    .all(|(title, wanted)| below(&frame, "eth7/0", title) == *wanted)
                && moving
                    .iter()
                    .all(|title| !["0", "-"].contains(&below(&frame, "eth7/0", title)))
                && frame.contains("unknown_peer")
                && frame.contains("rx_ring_full")
            {
                return;
            }
            if is_whole {
                frame.clear();
            }
            frame.push_str(&line);
            frame.push('\n');
        }
        panic!("no such frame; the last: {frame}");
    });
}

#[test]
fn programs_get_json() {
    let dir = tempfile::tempdir().unwrap();
    with_data_plane(dir.path(), || {
        let arguments = ["--json", "--interval", "0.1", "--count", "500"];
        let child = top(dir.path(), &arguments).stdout(Stdio::piped()).spawn();
        let mut child = Killed(child.unwrap());
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut looks =
            lines.map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
        let look = looks.find(|look| look["workers"][0]["cyclesPerPacket"] == 123.0);
        let look = look.unwrap();
        let worker = &look["workers"][0];
        assert_eq!(worker["door"], "veth");
        assert_eq!(worker["frames"]["free"], 16);
        assert!(worker["receivedPerS"].as_f64().unwrap() > 0.0);
        assert_eq!(worker["drops"].as_array().unwrap().len(), DropReason::COUNT);
        assert_eq!(look["workers"][1]["stuck"], true);
        assert_eq!(look["nics"][0]["xdp"][0]["name"], "redirected");
    });
}

#[test]
fn without_a_data_plane_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent");
    let say = |run_dir: &Path| {
        let output = top(run_dir, &["--interval", "0.1"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        text(&output)
    };
    assert!(say(&absent).contains("no data plane has run here"));
    assert!(say(dir.path()).contains("no data plane has run here"));
    with_data_plane(dir.path(), || ());
    assert!(say(dir.path()).contains("the data plane does not run"));
}

#[test]
fn a_region_of_another_version_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("stats"), [0; 64]).unwrap();
    let output = top(dir.path(), &["--once"]).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.contains("not a region of this version"), "{errors}");
}

#[test]
fn a_restart_in_between_makes_no_rates() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--json", "--interval", "0.1", "--count", "500"];
    let mut child = with_data_plane(dir.path(), || {
        let stdout = top(dir.path(), &arguments).stdout(Stdio::piped()).spawn();
        Killed(stdout.unwrap())
    });
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let mut looks =
        lines.map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    let mut until = |what: &str, wanted: &dyn Fn(&serde_json::Value) -> bool| {
        let found = looks.find(|look| {
            let rate = &look["workers"][0]["receivedPerS"];
            assert!(
                rate.as_f64().is_none_or(|rate| (0.0..1e6).contains(&rate)),
                "{look}"
            );
            wanted(look)
        });
        found.unwrap_or_else(|| panic!("no look {what}"))
    };
    let has_rates = |look: &serde_json::Value| look["workers"][0]["receivedPerS"].is_number();
    until("without a data plane", &|look| look["pid"].is_null());
    with_data_plane(dir.path(), || {
        until("with rates", &has_rates);
    });
    with_data_plane(dir.path(), || {
        until("without rates", &|look| {
            look["workers"][0]["receivedPerS"].is_null() && look["pid"].is_number()
        });
        until("with rates again", &has_rates);
    });
}

#[test]
fn a_terminal_gets_the_view_and_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_ripstop");
    let run_dir = dir.path().display();
    let command = format!(
        "stty cols 100 rows 30; {program} top --run-dir {run_dir} --count 2 --interval 0.1"
    );
    let output = with_data_plane(dir.path(), || {
        // A terminal of its own, whose output it copies.
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
        script.stdin(Stdio::null()).output().unwrap()
    });
    let seen = text(&output);
    assert!(output.status.success(), "{seen}");
    let place = |what| {
        seen.find(what)
            .unwrap_or_else(|| panic!("no {what:?}: {seen:?}"))
    };
    let (entered, left) = (place("\u{1b}[?1049h"), place("\u{1b}[?1049l"));
    assert!((entered..left).contains(&place("eth7/0")), "{seen:?}");
}

#[test]
fn a_worker_is_stuck_when_the_control_plane_takes_it_for_stopped() {
    let control_plane = ripstop_controlplane::publish::HEARTBEAT_MAX;
    assert_eq!(ripstop_top::HEARTBEAT_MAX, control_plane);
}

#[test]
fn bad_flags_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["--interval", "0.01"][..],
        &["--interval", "soon"],
        &["--count", "0"],
        &["--once", "--count", "2"],
    ] {
        let output = top(dir.path(), arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}
