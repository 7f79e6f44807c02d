//! `perf-check`: two commits side by side.
//!
//! Both are built in worktrees and target folders of their own below `target/perf-check`. Each round runs this very program
//! twice, once with each set of programs, so that source, sink and arithmetic are the same for both.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{Write as _, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ripstop_perf::experiment::check::{Judgement, Side, check, worst};
use ripstop_perf::experiment::{Outcome, Progress, ResultFile, RunResult, Scenario};

use super::{Output, is_set, now, stop_flag};

#[derive(Args)]
pub(crate) struct PerfCheck {
    /// The commit to compare with, or a folder with its programs.
    base: String,
    /// The commit that may be slower, or a folder with its programs.
    #[arg(default_value = "HEAD")]
    head: String,
    /// Name of a scenario, or a file that ends in .json. Its rounds are not looked at.
    #[arg(long, default_value = "check")]
    scenario: String,
    /// How often both are measured.
    #[arg(long, default_value_t = 12)]
    rounds: u32,
    /// Slower by so many percent is allowed.
    #[arg(long, default_value_t = 5.0)]
    allowed: f64,
    #[command(flatten)]
    output: Output,
}

impl PerfCheck {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let scenario = Scenario::load(&self.scenario)?;
        let stop = stop_flag()?;
        let began = now();
        let base = programs(&self.base, "base")?;
        let head = programs(&self.head, "head")?;
        let progress = Progress::on_terminal();
        progress.begin(u64::from(self.rounds) * 2);
        let measure = |side| {
            let (name, folder) = match side {
                Side::Base => (&self.base, &base),
                Side::Head => (&self.head, &head),
            };
            progress.say(name);
            let measured = one_round(&self.scenario, folder);
            progress.skip(1);
            measured.with_context(|| format!("measure {name}"))
        };
        let checked = check(&scenario, self.rounds, self.allowed / 100.0, measure, &stop)?;
        progress.end();
        let judgement = worst(&checked);
        let result = ResultFile::new(scenario, Outcome::Check(checked), began);
        let code = self.output.give(&result, is_set(&stop))?;
        if is_set(&stop) {
            return Ok(code);
        }
        let (allowed, base, head) = (self.allowed, &self.base, &self.head);
        let verdict = match judgement {
            Judgement::Good => {
                format!("ok: {head} is not more than {allowed} % slower than {base}")
            }
            Judgement::Slower => {
                format!("FAILED: {head} is more than {allowed} % slower than {base}")
            }
            Judgement::Inconclusive => {
                format!(
                    "inconclusive: whether {head} is more than {allowed} % slower than {base} cannot be told; more rounds may"
                )
            }
            Judgement::NotMeasured => {
                format!("FAILED: not all of {base} and {head} could be measured")
            }
        };
        writeln!(stderr(), "perf-check: {verdict}")?;
        Ok(match judgement {
            Judgement::Good | Judgement::Inconclusive => ExitCode::SUCCESS,
            Judgement::Slower | Judgement::NotMeasured => ExitCode::FAILURE,
        })
    }
}

/// This program once, with the others from a folder.
fn one_round(scenario: &str, folder: &Path) -> Result<RunResult> {
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["run", scenario, "--rounds", "1", "--json"]);
    command.env("RIPSTOP_BIN_DIR", folder);
    let output = command.output().context("run this program again")?;
    let text = String::from_utf8(output.stdout).context("read its result")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !text.is_empty(),
        "it ended with {} and no result: {said}",
        output.status
    );
    let Outcome::Run(run) = ResultFile::parse(&text)?.outcome else {
        return Ok(RunResult::default());
    };
    for failure in &run.failures {
        writeln!(stderr(), "{}: {}", failure.variant, failure.why)?;
    }
    Ok(run)
}

/// The folder with the programs of a commit, which are built there if it is not a folder already.
fn programs(commit_or_folder: &str, side: &str) -> Result<PathBuf> {
    let folder = Path::new(commit_or_folder);
    if folder.join("ripstop-dataplane").is_file() {
        return folder.canonicalize().context("find the programs");
    }
    let place = env::current_dir()
        .context("find the working directory")?
        .join("target/perf-check")
        .join(side);
    let (tree, build) = (place.join("tree"), place.join("build"));
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    // What a run that was killed has left.
    if tree.exists() {
        git(&[
            OsStr::new("worktree"),
            "remove".as_ref(),
            "--force".as_ref(),
            tree.as_ref(),
        ])?;
    }
    git(&["worktree".as_ref(), "prune".as_ref()])?;
    git(&[
        "worktree".as_ref(),
        "add".as_ref(),
        "--detach".as_ref(),
        tree.as_ref(),
        commit_or_folder.as_ref(),
    ])?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args([
        "build",
        "--release",
        "--package",
        "ripstop-dataplane",
        "--package",
        "ripstop-controlplane",
        "--bins",
    ]);
    command.current_dir(&tree).env("CARGO_TARGET_DIR", &build);
    let built = command.status().context("run cargo");
    git(&[
        "worktree".as_ref(),
        "remove".as_ref(),
        "--force".as_ref(),
        tree.as_ref(),
    ])?;
    ensure!(built?.success(), "{commit_or_folder} does not build");
    Ok(build.join("release"))
}

fn git(arguments: &[&OsStr]) -> Result<()> {
    let output = Command::new("git")
        .args(arguments)
        .output()
        .context("run git")?;
    ensure!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
