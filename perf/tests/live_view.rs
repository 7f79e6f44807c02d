//! The live view on a real terminal, of a real run, as root. The terminal is put back.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]
#![expect(unsafe_code, reason = "pseudo terminals have no safe interface in std")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use ripstop_perf::experiment::{Outcome, ResultFile};
use tempfile::TempDir;

#[path = "../../controlplane/top/tests/pty/mod.rs"]
mod pty;

use pty::Session;

/// A folder with a scenario, `live.json`.
fn scenario(path: &str, rounds: u32) -> TempDir {
    let folder = TempDir::new().unwrap();
    let text = r#"{
        "about": "packets in a terminal",
        "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 1, "mtu": 1500},
        "baseline": "one", "variants": {"one": {"path": "PATH"}},
        "offers": {"work": "packets", "rates": [{"pps": 1000}], "sizes": [64]},
        "seconds": 1.5, "warmUpSeconds": 0, "rounds": ROUNDS
    }"#;
    let text = text
        .replace("PATH", path)
        .replace("ROUNDS", &rounds.to_string());
    fs::write(folder.path().join("live.json"), text).unwrap();
    folder
}

/// Runs a command of `ripstop-perf` with `--live` on a terminal, in a folder that gets its result.
fn session_of(command: &str, more: &[&str], folder: &TempDir) -> Session {
    let program = Path::new(env!("CARGO_BIN_EXE_ripstop-perf"));
    Session::of(program, (120, 24), |process| {
        process
            .args([command, "./live.json", "--live", "--out", "out.json"])
            .args(more)
            .current_dir(folder.path())
            .stdout(Stdio::null());
    })
}

fn session(path: &str, rounds: u32) -> (Session, TempDir) {
    let folder = scenario(path, rounds);
    (session_of("run", &[], &folder), folder)
}

/// The exit status and the result. The terminal must be as it was.
fn end(session: Session, folder: &TempDir) -> (Option<i32>, ResultFile) {
    let status = session.end();
    let result = ResultFile::load(&folder.path().join("out.json")).unwrap();
    (status.code(), result)
}

#[test]
fn workers_are_seen_while_a_run_goes_on_to_its_end() {
    let (session, folder) = session("ripstop", 1);
    session.until("a worker", |seen| {
        seen.contains("eth0/0") && seen.contains("ENCAP/S")
    });
    assert!(session.is_raw(), "keys come one by one");
    let (code, result) = end(session, &folder);
    assert_eq!(code, Some(0));
    assert!(result.command_line.iter().any(|word| word == "--live"));
    assert!(matches!(result.outcome, Outcome::Run(run) if run.trials.len() == 1));
}

#[test]
fn a_key_or_a_signal_ends_it_as_ctrl_c_does() {
    for by_key in [true, false] {
        let (mut session, folder) = session("kernel", 1000);
        session.until("an interface", |seen| {
            seen.contains("flannel.1") && seen.contains("kernel")
        });
        if by_key {
            session.keys("q");
        } else {
            session.kill(libc::SIGTERM);
        }
        let (code, result) = end(session, &folder);
        assert_eq!(code, Some(130));
        assert!(matches!(result.outcome, Outcome::Run(run) if run.interrupted));
    }
}

#[test]
fn searches_and_soaks_are_seen_too() {
    let search = [
        "--min-pps",
        "1000",
        "--max-pps",
        "2000",
        "--resolution",
        "50",
    ];
    let search = [&search[..], &["--repeats", "1", "--mrr-trials", "1"]].concat();
    for (command, more) in [("ndr", search), ("soak", vec!["--minutes", "0.05"])] {
        let folder = scenario("kernel", 1);
        let session = session_of(command, &more, &folder);
        session.until(command, |seen| seen.contains("flannel.1"));
        let (code, result) = end(session, &folder);
        assert_eq!(code, Some(0), "{command}");
        match result.outcome {
            Outcome::Ndr(found) => assert_eq!(found.len(), 1),
            Outcome::Soak(soaked) => assert!(soaked.problems.is_empty()),
            other @ (Outcome::Run(_) | Outcome::Check(_)) => panic!("{command}: {other:?}"),
        }
    }
}

#[test]
fn without_a_terminal_it_says_so_and_measures_nothing() {
    for command in ["run", "ndr", "soak"] {
        let folder = scenario("kernel", 1);
        let output = Command::new(env!("CARGO_BIN_EXE_ripstop-perf"))
            .args([command, "./live.json", "--live", "--out", "out.json"])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("terminal"),
            "{said}"
        );
        assert!(!folder.path().join("out.json").exists());
    }
}
