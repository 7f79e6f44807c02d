//! The commands, one file each, and what they share.

mod across;
pub(crate) mod agent;
pub(crate) mod compare;
pub(crate) mod lab;
pub(crate) mod latency;
pub(crate) mod list;
pub(crate) mod ndr;
pub(crate) mod perf_check;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod scale;
pub(crate) mod soak;

use core::sync::atomic::{AtomicBool, Ordering};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;
use jiff::Timestamp;
use ripstop_perf::engine::agent::TOKEN_MIN;
use ripstop_perf::experiment::{Outcome, Progress, ResultFile, Scenario};
use ripstop_perf::report::{page, text};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use across::Across;

/// Exit status of a program that was ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// What every measurement can be told.
#[derive(Args)]
pub(crate) struct Common {
    /// Take only this variant; may be given several times. The first takes the baseline's place if that is not among them.
    #[arg(long, visible_alias = "variant")]
    only: Vec<String>,
    /// Length of each trial, in seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// Show on the whole of the terminal what the nodes under test carry, once a second, instead of a bar. What the
    /// looking takes is in the figures, like all that the machine spends.
    #[arg(long)]
    live: bool,
    #[command(flatten)]
    across: Across,
    #[command(flatten)]
    output: Output,
}

/// Where results go.
#[derive(Args)]
pub(crate) struct Output {
    /// Print the result file instead of tables.
    #[arg(long)]
    json: bool,
    /// Write the result file here, too.
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Common {
    /// The scenario as it is to be run.
    fn scenario(&self, name_or_file: &str) -> Result<Scenario> {
        let mut scenario = Scenario::load(name_or_file)?;
        if let Some(seconds) = self.seconds {
            scenario.seconds = seconds;
        }
        scenario.keep_only(&self.only)?;
        scenario.check()?;
        Ok(scenario)
    }

    /// What is shown meanwhile. Results are given after it has been dropped.
    fn progress(&self, stop: &Arc<AtomicBool>) -> Result<Progress> {
        if self.live {
            return Progress::live(stop);
        }
        Ok(Progress::on_terminal())
    }
}

impl Output {
    /// Shows a result, keeps it if that is wanted, and says how the program ends.
    fn give(&self, result: &ResultFile, interrupted: bool) -> Result<ExitCode> {
        if let Some(file) = &self.out {
            result.save(file)?;
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(result)?);
        } else {
            print!("{}", text(&page(core::slice::from_ref(result))));
        }
        Ok(if interrupted {
            ExitCode::from(INTERRUPTED)
        } else if has_nothing(result) {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn has_nothing(result: &ResultFile) -> bool {
    match &result.outcome {
        Outcome::Run(run) => run.trials.is_empty(),
        Outcome::Ndr(found) => found.is_empty(),
        Outcome::Soak(soak) => soak.slices.is_empty(),
        Outcome::Check(checked) => checked.is_empty(),
    }
}

/// Reads a token from a file.
fn read_token(file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let token = text.trim().to_owned();
    ensure!(
        token.len() >= TOKEN_MIN,
        "{}: fewer than {TOKEN_MIN} characters",
        file.display()
    );
    Ok(token)
}

/// Set by Ctrl-C. A second one ends the program at once; the next lab removes what that leaves behind.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let status = i32::from(INTERRUPTED);
        flag::register_conditional_shutdown(signal, status, Arc::clone(&stop))
            .context("watch for a second Ctrl-C")?;
        flag::register(signal, Arc::clone(&stop)).context("watch for Ctrl-C")?;
    }
    Ok(stop)
}

fn is_set(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed)
}

fn now() -> Timestamp {
    Timestamp::now()
}
