//! Measuring across a wire: two network namespaces are the machines, a veth pair is the wire, programs run as an operator
//! runs them.
//!
//! ```text
//!   n1: ripstop-perf run --nic wire0 --peer 10.199.0.12:…        n2: ripstop-perf agent --nic wire1
//!   eth0 10.199.0.11 ─────────────── fabric: the other network ─────────────── eth0 10.199.0.12
//!   wire0 ═══════════════════════════════ the wire ═══════════════════════════════════════ wire1
//!     while it is measured: eth0 of the first node of a lab of its own
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::time::Duration;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use ripstop_perf::experiment::{Outcome, ResultFile, RunResult};
use ripstop_perf::measure::Rate;
use ripstop_perf::{Host, Lab, Node, wait_until};
use serde_json::Value;
use tempfile::TempDir;

/// The tests need the cores for themselves.
static ALONE: Mutex<()> = Mutex::new(());

/// On a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN: &str = "the token of the two machines";
const PORT: u16 = 7007;
/// What the NIC has, and must have again.
const NIC_ADDRESSES: [&str; 2] = ["192.0.2.1/24", "2001:db8::1/64"];

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Two machines, a wire between them, and an agent on the second.
struct Machines<'a> {
    lab: &'a Lab,
    folder: TempDir,
    _agent: Running,
}

impl<'a> Machines<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let (one, two) = (lab.node(1), lab.node(2));
        one.output(&[
            "ip",
            "link",
            "add",
            "wire0",
            "type",
            "veth",
            "peer",
            "name",
            "wire1",
            "netns",
            two.netns().name(),
        ])?;
        for (host, end) in [(one, "wire0"), (two, "wire1")] {
            host.output(&["ip", "link", "set", end, "up"])?;
        }
        one.output(&["ip", "link", "set", "wire0", "mtu", "3000"])?;
        two.output(&["ip", "link", "set", "wire1", "mtu", "3000"])?;
        for address in NIC_ADDRESSES {
            one.output(&["ip", "addr", "add", address, "dev", "wire0"])?;
        }
        let folder = TempDir::new()?;
        fs::write(folder.path().join("token"), TOKEN)?;
        let agent = agent(two, &folder.path().join("token"))?;
        Ok(Self {
            lab,
            folder,
            _agent: agent,
        })
    }

    /// Where the NIC is at home.
    fn near(&self) -> &Node {
        self.lab.node(1)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command of the first machine's operator, with another token or NIC if that is wanted.
    fn start(&self, command: &str, scenario: &Path, more: &[&str]) -> Result<Child> {
        let token = self.file("token");
        let peer = format!("{}:{PORT}", self.lab.node(2).address());
        // A child is born in the namespace of the thread that starts it, and sees the machine's other files.
        let child = self.near().netns().run(|| {
            let mut program = Command::new(env!("CARGO_BIN_EXE_ripstop-perf"));
            program.arg(command).arg(scenario);
            program.args(["--peer", &peer]);
            if !more.contains(&"--nic") {
                program.args(["--nic", "wire0", "--nic-in-use"]);
            }
            if !more.contains(&"--token-file") {
                program.arg("--token-file").arg(token);
            }
            program.args(more);
            program
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        })??;
        Ok(child)
    }

    /// The same to its end.
    fn go(&self, command: &str, scenario: &Path, more: &[&str]) -> Result<Output> {
        Ok(self.start(command, scenario, more)?.wait_with_output()?)
    }

    /// What a run measured.
    fn measure(&self, scenario: &Path) -> Result<(ResultFile, RunResult)> {
        let out = self.file("result.json");
        let output = self.go("run", scenario, &["--out", &out.to_string_lossy()])?;
        assert!(output.status.success(), "{}", said(&output));
        let result = ResultFile::load(&out)?;
        let Outcome::Run(run) = result.outcome.clone() else {
            unreachable!("run makes runs");
        };
        Ok((result, run))
    }

    /// Whether the NIC is back, and as it was.
    fn nic_is_back(&self) -> bool {
        let show = ["ip", "-j", "address", "show", "dev", "wire0"];
        let Ok(text) = self.near().output(&show) else {
            return false;
        };
        let links: Value = serde_json::from_str(&text).unwrap_or_default();
        let link = &links[0];
        let flags = link["flags"].as_array().cloned().unwrap_or_default();
        let addresses = link["addr_info"].as_array().cloned().unwrap_or_default();
        let has = |wanted: &str| {
            addresses.iter().any(|address| {
                format!("{}/{}", text_of(&address["local"]), address["prefixlen"]) == *wanted
            })
        };
        link["mtu"] == 3000
            && flags.contains(&"UP".into())
            && NIC_ADDRESSES.iter().all(|address| has(address))
    }
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn agent(host: &dyn Host, token: &Path) -> Result<Running> {
    let mut command = host.netns().command(env!("CARGO_BIN_EXE_ripstop-perf"));
    let listen = format!("{}:{PORT}", host.address());
    command.args([
        "agent",
        "--listen",
        &listen,
        "--nic",
        "wire1",
        "--token-file",
    ]);
    let mut child = command.arg(token).stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().context("no output")?;
    let agent = Running(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    ensure!(line.contains("agent for wire1"), "it says {line:?}");
    Ok(agent)
}

/// A scenario in a file of the machines' folder: trials of so many seconds, so often.
fn scenario(
    machines: &Machines<'_>,
    [direction, variants, rate]: [&str; 3],
    (seconds, rounds): (f64, u32),
) -> Result<PathBuf> {
    let path = machines.file(&format!("{direction}.json"));
    let text = format!(
        r#"{{
            "about": "packets across a wire",
            "plan": {{"topology": "gateway", "direction": "{direction}", "backend": "vxlan", "leases": 3, "mtu": 1500}},
            "baseline": "kernel",
            "variants": {{{variants}}},
            "offers": {{"work": "packets", "rates": [{rate}], "sizes": [200]}},
            "seconds": {seconds}, "warmUpSeconds": 0, "rounds": {rounds}
        }}"#
    );
    fs::write(&path, text)?;
    Ok(path)
}

/// One short trial of each variant.
const ONCE: (f64, u32) = (0.2, 1);
const KERNEL: &str = r#""kernel": {"path": "kernel"}"#;
const ALL: &str = r#""kernel": {"path": "kernel"}, "wire": {"path": "wire"},
    "ripstop": {"path": "ripstop", "dataplane": {"polling": "adaptive"}}"#;

fn said(output: &Output) -> String {
    let (out, error) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(&[out.as_slice(), error].concat()).into_owned()
}

/// Runs a test between two machines. The workers of their labs are on the CPUs of all others.
fn between(test: impl FnOnce(&Machines<'_>) -> Result<()>) -> Result<()> {
    let _alone = alone();
    Lab::builder()
        .linux(2)
        .pods(1)
        .run(|lab| test(&Machines::new(lab)?))
}

#[test]
fn every_path_carries_all_packets_across_the_wire() -> Result<()> {
    between(|machines| {
        let rates = r#"{"pps": 4000}, {"window": 64}"#;
        for direction in ["encap", "decap"] {
            let scenario = scenario(machines, [direction, ALL, rates], ONCE)?;
            let (result, run) = machines.measure(&scenario)?;
            assert_eq!(
                (run.trials.len(), &run.failures[..]),
                (6, &[][..]),
                "{direction}"
            );
            for trial in &run.trials {
                let measured = &trial.measured;
                let what = format!("{direction}, {}: {measured:?}", trial.variant);
                // A window of which nothing is heard opens ten times a second.
                let window = matches!(trial.point.rate, Rate::Window(_));
                let least = if window && trial.variant != "ripstop" {
                    1000
                } else {
                    100
                };
                assert!(measured.sent > least, "{what}");
                assert_eq!(
                    (measured.received, measured.lost),
                    (measured.sent, 0),
                    "{what}"
                );
                // Where each packet is looked at, because both namespaces have one clock.
                let looked_at = matches!(trial.point.rate, Rate::Pps(_));
                assert_eq!(measured.latency.is_some(), looked_at, "{what}");
                assert!(
                    trial.bed.contains("by the agent at wire1 of"),
                    "{}",
                    trial.bed
                );
            }
            let wire = result.host.wire.context("the result file names no wire")?;
            assert_eq!(
                (wire.near.nic.as_str(), wire.far.nic.as_str()),
                ("wire0", "wire1")
            );
            assert_eq!([&*wire.near.driver, &*wire.far.driver], ["veth"; 2]);
            assert_eq!(
                [&wire.near.kernel, &wire.far.kernel],
                [&result.host.kernel; 2]
            );
            assert!(machines.nic_is_back(), "after {direction}");
        }
        Ok(())
    })
}

#[test]
fn what_cannot_be_is_refused_and_the_nic_stays() -> Result<()> {
    between(|machines| {
        let good = scenario(machines, ["encap", KERNEL, r#"{"pps": 1000}"#], ONCE)?;
        let wrong = machines.file("wrong");
        fs::write(&wrong, "a token that is none")?;
        let wrong = wrong.to_string_lossy().into_owned();
        let of_lab = |name: &str| PathBuf::from(name);
        for (scenario, more, parts) in [
            (
                &good,
                &["--nic", "wire7"][..],
                &["no NIC \"wire7\"", "wire0"][..],
            ),
            (&good, &["--nic", "lo"], &["lo is no NIC"]),
            (
                &good,
                &["--nic", "eth0"],
                &["eth0 has this machine's default route"],
            ),
            (
                &good,
                &["--nic", "wire0"],
                &["wire0 has the address 192.0.2.1", "--nic-in-use"],
            ),
            (&good, &["--token-file", &wrong], &["is the token right"]),
            (
                &of_lab("tcp-one"),
                &[],
                &["tcp-one needs a pod at both ends", "small-udp-encap"],
            ),
            (&of_lab("testpmd"), &[], &["testpmd's", "--only kernel"]),
        ] {
            let output = machines.go("run", scenario, more)?;
            let said = said(&output);
            assert!(!output.status.success(), "{more:?}: {said}");
            for part in parts {
                assert!(said.contains(part), "{part:?} is not in {said}");
            }
            assert!(machines.nic_is_back(), "after {more:?}");
        }
        Ok(())
    })
}

/// The lab of a process that is measuring, once the NIC is in it.
fn lab_of(machines: &Machines<'_>, child: &Running) -> Result<Lab> {
    wait_until("the NIC is away", PATIENCE, || !machines.nic_is_back())?;
    let prefix = format!("{:x}-", child.0.id());
    let names = Lab::names();
    let name = names.iter().find(|name| name.starts_with(&prefix));
    Lab::open(name.context("the process has no lab")?)
}

fn ended(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Its first thread may be over before others.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.is_empty() || stat.contains(") Z ") && threads <= 1
}

/// Nobody gives the NIC back then but the next who wants it, and the agent hears of it from its connection alone.
#[test]
fn a_run_that_is_killed_costs_neither_the_nic_nor_the_agent() -> Result<()> {
    between(|machines| {
        let long = r#""kernel": {"path": "ripstop", "dataplane": {"polling": "adaptive"}}"#;
        let long = scenario(machines, ["decap", long, r#"{"pps": 2000}"#], (600.0, 1))?;
        let mut run = Running(machines.start("run", &long, &[])?);
        let lab = lab_of(machines, &run)?;
        let sent = || {
            let counters = machines.lab.node(2).link_counters("wire1");
            counters.map(|counters| counters.tx_packets)
        };
        let before = sent()?;
        wait_until("the agent sends", PATIENCE, || {
            sent().is_ok_and(|now| now > before + 1000)
        })?;
        // The lab's owner has started them since.
        let lab = Lab::open(lab.name())?;
        let pids = [lab.node(1).dataplane_pid(), lab.node(1).controlplane_pid()];
        let pids = pids.map(|pid| pid.unwrap_or_default());
        assert!(pids.iter().all(|pid| *pid > 0 && !ended(*pid)), "{pids:?}");
        run.0.kill()?;
        run.0.wait()?;
        wait_until("the agent stops", PATIENCE, || {
            let before = sent().unwrap_or_default();
            std::thread::sleep(Duration::from_millis(200));
            sent().is_ok_and(|now| now == before)
        })?;

        let next = scenario(machines, ["encap", KERNEL, r#"{"pps": 1000}"#], ONCE)?;
        let (_, measured) = machines.measure(&next)?;
        assert_eq!((measured.trials.len(), measured.failures.len()), (1, 0));
        assert!(machines.nic_is_back(), "after the next run");
        assert!(pids.iter().all(|pid| ended(*pid)), "{pids:?} still run");
        assert!(!Lab::names().iter().any(|name| name == lab.name()));
        Ok(())
    })
}

#[test]
fn ctrl_c_gives_the_nic_back() -> Result<()> {
    between(|machines| {
        let many = scenario(machines, ["encap", KERNEL, r#"{"pps": 1000}"#], (1.5, 1000))?;
        let mut run = Running(machines.start("run", &many, &[])?);
        // Between two beds it may be there for a moment; in the first it is away for longer than a second one takes to look.
        wait_until("the NIC is away", PATIENCE, || !machines.nic_is_back())?;
        let second = said(&machines.go("run", &many, &[])?);
        assert!(second.contains("wait until that run ends"), "{second}");
        let pid = run.0.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-INT", &pid])
                .status()?
                .success()
        );
        wait_until("it ends", PATIENCE, || {
            run.0.try_wait().is_ok_and(|status| status.is_some())
        })?;
        assert_eq!(run.0.wait()?.code(), Some(130));
        assert!(machines.nic_is_back());
        Ok(())
    })
}
