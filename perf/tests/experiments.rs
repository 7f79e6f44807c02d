//! The command line measures for real, as root: two nodes of plain Linux, requests and answers between their pods.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0      with the kernel's VXLAN, and without a tunnel
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::time::Duration;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::Result;
use ripstop_perf::experiment::{Outcome, ResultFile};
use ripstop_perf::{Lab, wait_until};
use tempfile::TempDir;

/// On a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ripstop-perf"))
}

fn scenario(folder: &TempDir, rounds: u32) -> Result<PathBuf> {
    let path = folder.path().join("trips.json");
    let text = r#"{
        "about": "requests and answers between two pods of plain Linux nodes",
        "plan": {"topology": "pods", "direction": "encap", "backend": "vxlan", "leases": 2, "mtu": 1500},
        "baseline": "kernel",
        "variants": {"kernel": {"path": "kernel"}, "routing": {"path": "routing"}},
        "offers": {"work": "round-trips", "rates": [{"pps": 500}], "sizes": [64]},
        "seconds": 0.2, "warmUpSeconds": 0.1, "rounds": ROUNDS
    }"#;
    fs::write(&path, text.replace("ROUNDS", &rounds.to_string()))?;
    Ok(path)
}

fn said(output: &Output) -> String {
    let (out, error) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(&[out.as_slice(), error].concat()).into_owned()
}

#[test]
fn a_scenario_is_measured_reported_and_compared() -> Result<()> {
    let folder = TempDir::new()?;
    let file = |name: &str| folder.path().join(name);
    let out = file("result.json");
    let output = program()
        .arg("run")
        .arg(scenario(&folder, 2)?)
        .arg("--out")
        .arg(&out)
        .output()?;
    assert!(output.status.success(), "{}", said(&output));
    let result = ResultFile::load(&out)?;
    let Outcome::Run(run) = &result.outcome else {
        unreachable!("run makes runs");
    };
    let order: Vec<&str> = run
        .trials
        .iter()
        .map(|trial| trial.variant.as_str())
        .collect();
    assert_eq!(
        order,
        ["kernel", "routing", "routing", "kernel"],
        "{:?}",
        run.failures
    );
    for trial in &run.trials {
        let measured = &trial.measured;
        assert!(
            measured.received > 0 && measured.latency.is_some(),
            "{measured:?}"
        );
        assert!(
            measured.busy_seconds() > 0.0 && !trial.bed.is_empty(),
            "{trial:?}"
        );
    }
    assert!(!result.host.kernel.is_empty() && result.command_line.len() == 5);
    let shown = said(&output);
    for part in [
        "p50 µs",
        "kernel (baseline)",
        "Ratios to kernel",
        "2 rounds",
    ] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }

    let (html, markdown) = (file("report.html"), file("report.md"));
    let mut report = program();
    report
        .arg("report")
        .arg(&out)
        .arg("--html")
        .arg(&html)
        .arg("--markdown")
        .arg(&markdown);
    let output = report.output()?;
    assert!(output.status.success(), "{}", said(&output));
    for path in [html, markdown] {
        assert!(fs::read_to_string(path)?.contains(&result.host.kernel));
    }
    let compare = |arguments: &[&str]| -> Result<String> {
        Ok(said(&program().arg("compare").args(arguments).output()?))
    };
    let out = out.to_string_lossy();
    let two = compare(&["--in", &out, "routing", "kernel"])?;
    assert!(
        two.contains("kernel to routing") && two.contains("too few rounds"),
        "{two}"
    );
    let same = compare(&[&out, &out])?;
    assert!(same.contains("1.00× [1.00, 1.00]"), "{same}");
    let unknown = compare(&["--in", &out, "kernel", "tun"])?;
    assert!(unknown.contains("no variant \"tun\""), "{unknown}");
    Ok(())
}

/// The labs of a process carry its pid.
fn labs_of(pid: u32) -> Vec<String> {
    let mut names = Lab::names();
    names.retain(|name| name.starts_with(&format!("{pid:x}-")));
    names
}

#[test]
fn ctrl_c_takes_down_what_is_up_and_keeps_what_was_measured() -> Result<()> {
    let folder = TempDir::new()?;
    let out = folder.path().join("result.json");
    let mut run = program();
    run.arg("run")
        .arg(scenario(&folder, 1000)?)
        .arg("--out")
        .arg(&out);
    let mut child = run.stdout(Stdio::null()).spawn()?;
    let pid = child.id();
    let outcome = wait_until("a lab is up", PATIENCE, || !labs_of(pid).is_empty());
    let sent = Command::new("kill")
        .arg("-INT")
        .arg(pid.to_string())
        .status()?;
    let ended = wait_until("it ends", PATIENCE, || {
        child.try_wait().is_ok_and(|status| status.is_some())
    });
    if ended.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    outcome.and(ended)?;
    assert!(sent.success());
    assert_eq!(status.code(), Some(130));
    assert_eq!(labs_of(pid), Vec::<String>::new());
    let namespaces = fs::read_dir("/run/netns")?.flatten();
    let prefix = format!("rs-{pid:x}-");
    let mut left =
        namespaces.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    assert!(left.next().is_none());
    let Outcome::Run(run) = ResultFile::load(&out)?.outcome else {
        unreachable!("run makes runs");
    };
    assert!(run.interrupted);
    Ok(())
}

/// With folders of programs instead of commits, and paths that need none of them.
#[test]
fn two_sets_of_programs_are_measured_in_turns() -> Result<()> {
    let folder = TempDir::new()?;
    fs::write(folder.path().join("ripstop-dataplane"), "")?;
    let scenario = scenario(&folder, 1)?;
    let place: &Path = folder.path();
    let mut check = program();
    check
        .arg("perf-check")
        .arg(place)
        .arg(place)
        .arg("--scenario")
        .arg(scenario);
    let output = check.args(["--rounds", "2"]).output()?;
    let shown = said(&output);
    // Two rounds prove nothing, whatever they come to; that is no failure.
    assert!(output.status.success(), "{shown}");
    assert!(shown.contains("perf-check: inconclusive"), "{shown}");
    Ok(())
}
