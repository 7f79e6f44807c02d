//! `ripstop-perf perf-check` between two commits of a repository of the test's own: built where nothing else is, measured
//! for real, as root, and nothing left behind. What is in the commits is not compiled: in cargo's place is a script that
//! hands out this build's programs and writes down what it was asked for.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result};
use ripstop_perf::experiment::{Outcome, ResultFile};
use tempfile::TempDir;

/// A repository with two commits, whose file `version` says which.
struct Repository(TempDir);

impl Repository {
    fn new() -> Result<Self> {
        let repository = Self(TempDir::new()?);
        repository.git(&["init", "--quiet"])?;
        for version in ["one", "two"] {
            fs::write(repository.path("version"), version)?;
            repository.git(&["add", "version"])?;
            repository.git(&["commit", "--quiet", "--message", version])?;
            repository.git(&["tag", version])?;
        }
        let script = "#!/bin/sh\nset -e\necho \"$(cat version): $*\" >> \"$ASKED\"\nmkdir -p \"$CARGO_TARGET_DIR\"\nln -sfn \"$PROGRAMS\" \"$CARGO_TARGET_DIR/release\"\ntest \"$(cat version)\" != broken\n";
        fs::write(repository.path("cargo"), script)?;
        fs::set_permissions(repository.path("cargo"), fs::Permissions::from_mode(0o755))?;
        let scenario = r#"{
            "about": "a moment of packets",
            "plan": {"topology": "gateway", "direction": "encap", "podSide": "door", "backend": "vxlan", "leases": 2, "mtu": 1500},
            "baseline": "tun",
            "variants": {"tun": {"path": "ripstop"}},
            "offers": {"work": "packets", "rates": [{"window": 64}], "sizes": [64]},
            "seconds": 0.1, "warmUpSeconds": 0.1, "rounds": 1
        }"#;
        fs::write(repository.path("moment.json"), scenario)?;
        Ok(repository)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn git(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("git")
            .current_dir(self.0.path())
            .args(["-c", "user.name=test", "-c", "user.email=test@example.org"])
            .args(arguments)
            .output()?;
        assert!(output.status.success(), "git {arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn perf_check(&self, arguments: &[&str]) -> Result<Output> {
        let program = Path::new(env!("CARGO_BIN_EXE_ripstop-perf"));
        let programs = program.parent().context("the programs have a folder")?;
        let mut command = Command::new(program);
        command
            .current_dir(self.0.path())
            .args(["perf-check", "--scenario", "./moment.json", "--rounds", "2"])
            .args(arguments)
            .env("CARGO", self.path("cargo"))
            .env("ASKED", self.path("asked"))
            .env("PROGRAMS", programs);
        command.output().context("run ripstop-perf")
    }
}

fn said(output: &Output) -> String {
    let (out, error) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(&[out.as_slice(), error].concat()).into_owned()
}

#[test]
fn two_commits_are_built_apart_and_measured_in_turns() -> Result<()> {
    let repository = Repository::new()?;
    // What a run that was killed leaves: a work tree that git knows, and one that it does not know any more.
    let left = repository.path("target/perf-check/base/tree");
    fs::create_dir_all(&left)?;
    fs::write(left.join("version"), "left")?;
    let head = repository.path("target/perf-check/head/tree");
    let head = head.to_string_lossy();
    repository.git(&["worktree", "add", "--quiet", "--detach", &head, "one"])?;
    fs::write(repository.path("version"), "not committed")?;

    let output = repository.perf_check(&["one", "two", "--out", "result.json"])?;
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("1 changed file(s) are not committed"),
        "{text}"
    );
    // Two rounds are too few to be sure of anything.
    assert!(text.contains("perf-check: inconclusive"), "{text}");
    let Outcome::Check(checked) = ResultFile::load(&repository.path("result.json"))?.outcome else {
        unreachable!("perf-check makes checks");
    };
    assert!(
        checked.len() == 1 && checked[0].speed.is_some(),
        "{checked:?}"
    );
    let asked = fs::read_to_string(repository.path("asked"))?;
    let built: Vec<_> = asked
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let versions: Vec<_> = built.iter().map(|(version, _)| *version).collect();
    assert_eq!(versions, ["one", "two"], "{asked}");
    assert!(
        built.iter().all(|(_, how)| how.contains("--release")),
        "{asked}"
    );
    let trees = repository.git(&["worktree", "list"])?;
    assert_eq!(trees.lines().count(), 1, "{trees}");
    assert_eq!(
        fs::read_to_string(repository.path("version"))?,
        "not committed"
    );
    Ok(())
}

#[test]
fn what_cannot_be_built_is_named_and_nothing_stays() -> Result<()> {
    let repository = Repository::new()?;
    let output = repository.perf_check(&["one", "three"])?;
    let text = said(&output);
    assert!(!output.status.success(), "{text}");
    assert!(
        text.contains("\"three\" is neither a commit of this repository nor a folder"),
        "{text}"
    );
    // Nothing is built for nothing.
    assert!(!repository.path("asked").exists());

    fs::write(repository.path("version"), "broken")?;
    repository.git(&["commit", "--all", "--quiet", "--message", "broken"])?;
    let output = repository.perf_check(&["one", "HEAD"])?;
    let text = said(&output);
    assert!(
        !output.status.success() && text.contains("does not build"),
        "{text}"
    );
    let trees = repository.git(&["worktree", "list"])?;
    assert_eq!(trees.lines().count(), 1, "{trees}");
    Ok(())
}
