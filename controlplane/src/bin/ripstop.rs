//! The operator's command line: shows what the processes on this node do, from the run directory alone.

use core::time::Duration;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use ripstop_cni::file::write_atomic;
use ripstop_controlplane::cleanup::cleanup;
use ripstop_controlplane::health::metrics::Scraper;
use ripstop_controlplane::report::{Drops, Leases, Status};
use ripstop_controlplane::{DEFAULT_RUN_DIR, explained};
use ripstop_top::terminal::{self, End};
use ripstop_top::{DataPlane, Panel, Rates, Snapshot};
use serde::Serialize;

/// Shows and cleans up what Ripstop does on this node. Exit codes: 0 all is well, 1 there is a problem, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "ripstop", version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
    /// Directory of the regions that the processes share
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Processes, workers with their rates, forwarding table, and the path that traffic takes
    Status {
        /// Seconds over which rates are measured; 0 for none
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
        interval: Duration,
    },
    /// Every node's lease, the next hop towards it, and whether workers or the kernel carry its traffic
    Leases,
    /// Why packets were not forwarded, with an explanation each
    Drops {
        /// Show reasons that never occurred, too
        #[arg(long)]
        all: bool,
    },
    /// What each worker does, live; without a terminal, once and as text
    Top {
        /// Seconds between two looks, 0.1 at least
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// One look, as text
        #[arg(long, conflicts_with = "count")]
        once: bool,
        /// End after so many looks; without a terminal 1 unless given
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Everything that can be measured, for Prometheus; also while no process runs
    Metrics {
        /// Write a file, whole or not at all, as the textfile collector of node_exporter wants it
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Remove everything of Ripstop's from the kernel and the run directory
    Cleanup {
        /// Even if a process of Ripstop's runs
        #[arg(long)]
        force: bool,
        /// Also the kernel's tunnel devices and plain routes, which flannel would leave: pods lose other nodes
        #[arg(long)]
        standby: bool,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_not_one| "give a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|interval| *interval <= Duration::from_secs(3600))
        .ok_or_else(|| "give a number of seconds from 0 to 3600".to_owned())
}

fn interval(text: &str) -> Result<Duration, String> {
    seconds(text).and_then(|interval| match interval >= Duration::from_millis(100) {
        true => Ok(interval),
        false => Err("give a number of seconds from 0.1 to 3600".to_owned()),
    })
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    match run(&flags) {
        Ok((text, true)) => print(&text, ExitCode::SUCCESS),
        Ok((text, false)) => print(&text, ExitCode::FAILURE),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ripstop: {}", explained(&error));
            ExitCode::FAILURE
        }
    }
}

/// A reader that closes the pipe has seen enough.
fn print(text: &str, code: ExitCode) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    code
}

fn run(flags: &Flags) -> anyhow::Result<(String, bool)> {
    let run_dir = &flags.run_dir;
    Ok(match &flags.command {
        Command::Status { interval } => {
            let status = Status::read(run_dir, *interval)?;
            (shown(flags.json, &status)?, status.ok)
        }
        Command::Leases => (shown(flags.json, &Leases::read(run_dir)?)?, true),
        Command::Drops { all } => (shown(flags.json, &Drops::read(run_dir, *all)?)?, true),
        Command::Top {
            interval,
            once,
            count,
        } => {
            let panel = Panel::new("ripstop top", *interval);
            let is_live = !once && !flags.json && std::io::stdout().is_terminal();
            let count = count.or((!is_live).then_some(1));
            let runs = match is_live {
                true => top_live(run_dir, panel, count)?,
                false => top_printed(run_dir, &panel, count.unwrap_or(1), flags.json)?,
            };
            (String::new(), runs)
        }
        Command::Metrics { .. } if flags.json => {
            anyhow::bail!("metrics are text alone: leave --json out")
        }
        Command::Metrics { output } => {
            let text = Scraper::new(run_dir, None).text()?;
            match output {
                None => (text, true),
                Some(path) => {
                    // Nobody ever reads half of it.
                    write_atomic(path, text.as_bytes(), 0o644)
                        .with_context(|| format!("write {}", path.display()))?;
                    (String::new(), true)
                }
            }
        }
        Command::Cleanup { force, standby } => {
            let done = cleanup(run_dir, *force, *standby)?;
            (shown(flags.json, &done)?, done.left.is_empty())
        }
    })
}

/// Shows the workers until the user has seen enough. Always true: there is nobody that an exit code would tell more.
fn top_live(run_dir: &Path, mut panel: Panel, count: Option<u64>) -> anyhow::Result<bool> {
    let mut look = || Snapshot::read(run_dir);
    match terminal::live(&mut panel, count, &mut look).context("use the terminal")? {
        End::Done => Ok(true),
        End::Signal(signal) => {
            signal_hook::low_level::emulate_default_handler(signal)?;
            Ok(true)
        }
    }
}

/// Prints `count` looks. Returns whether a data plane runs, as of the last.
fn top_printed(run_dir: &Path, panel: &Panel, count: u64, json: bool) -> anyhow::Result<bool> {
    let mut out = std::io::stdout();
    let mut before = Snapshot::read(run_dir)?;
    for _ in 0..count {
        std::thread::sleep(panel.interval);
        let now = Snapshot::read(run_dir)?;
        let rates = Rates::between(Some(&before), &now);
        let text = match json {
            true => serde_json::to_string(&rates)? + "\n",
            false => panel.text(&rates),
        };
        if out.write_all(text.as_bytes()).is_err() {
            break;
        }
        before = now;
    }
    Ok(matches!(before.data_plane, DataPlane::Running { .. }))
}

fn shown(json: bool, report: &(impl Serialize + core::fmt::Display)) -> anyhow::Result<String> {
    Ok(if json {
        serde_json::to_string_pretty(report)? + "\n"
    } else {
        report.to_string()
    })
}
