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
        let (base, head) = (Programs::find(&self.base)?, Programs::find(&self.head)?);
        warn_of_changes([&base, &head])?;
        let (base, head) = (base.build("base")?, head.build("head")?);
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

/// What a side is named by: a folder with programs, or a commit, which is found before anything is built.
enum Programs {
    Folder(PathBuf),
    Commit(String),
}

impl Programs {
    fn find(commit_or_folder: &str) -> Result<Self> {
        let folder = Path::new(commit_or_folder);
        if folder.join("ripstop-dataplane").is_file() {
            let folder = folder.canonicalize().context("find the programs")?;
            return Ok(Self::Folder(folder));
        }
        let commit = format!("{commit_or_folder}^{{commit}}");
        let known = git([&"rev-parse", &"--verify", &"--end-of-options", &commit]);
        let known = known.with_context(|| {
            format!(
                "{commit_or_folder:?} is neither a commit of this repository nor a folder with ripstop-dataplane in it"
            )
        })?;
        Ok(Self::Commit(known))
    }

    /// The folder they are in; those of a commit are built, which may take minutes.
    fn build(self, side: &str) -> Result<PathBuf> {
        let commit = match self {
            Self::Folder(folder) => return Ok(folder),
            Self::Commit(commit) => commit,
        };
        let place = env::current_dir()
            .context("find the working directory")?
            .join("target/perf-check")
            .join(side);
        fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
        let (tree, build) = (place.join("tree"), place.join("build"));
        // What a run that was killed has left.
        remove(&tree)?;
        git([&"worktree", &"add", &"--detach", &tree, &commit])?;
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
        remove(&tree)?;
        ensure!(built?.success(), "{commit} does not build");
        Ok(build.join("release"))
    }
}

/// Removes a work tree, also one that git does not know any more.
fn remove(tree: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    git([&"worktree", &"prune"]).map(drop)
}

/// Says that what is not committed is not measured, where a commit is.
fn warn_of_changes(sides: [&Programs; 2]) -> Result<()> {
    if sides.iter().all(|side| matches!(side, Programs::Folder(_))) {
        return Ok(());
    }
    let changed = git([&"status", &"--porcelain", &"--untracked-files=no"])?;
    if !changed.is_empty() {
        writeln!(
            stderr(),
            "perf-check: {} changed file(s) are not committed, and not measured: commit them, or name a folder with the programs",
            changed.lines().count()
        )?;
    }
    Ok(())
}

/// What git prints.
fn git<const N: usize>(arguments: [&dyn AsRef<OsStr>; N]) -> Result<String> {
    let arguments = arguments.map(AsRef::as_ref);
    let output = Command::new("git")
        .args(arguments)
        .output()
        .context("run git")?;
    ensure!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
