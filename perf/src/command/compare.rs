//! `compare`: two results, or two variants of one, beside each other.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use clap::Args;
use ripstop_perf::experiment::compare::{results, variants};
use ripstop_perf::experiment::{Outcome, ResultFile, RunResult};
use ripstop_perf::report::{Section, comparisons, text};

#[derive(Args)]
pub(crate) struct Compare {
    /// The first result file, which counts as 1; with --in, the first variant.
    first: String,
    /// The second.
    second: String,
    /// Compare two variants of this result file.
    #[arg(long = "in", value_name = "FILE")]
    within: Option<PathBuf>,
}

impl Compare {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let (first, second) = (&self.first, &self.second);
        let found = match &self.within {
            Some(file) => {
                let file = ResultFile::load(file)?;
                for name in [first, second] {
                    file.scenario.has(name)?;
                }
                variants(&file.scenario, run_of(&file)?, first, second)
            }
            None => {
                let load = |name: &str| ResultFile::load(Path::new(name));
                let (a, b) = (load(first)?, load(second)?);
                let found = results((&a.scenario, run_of(&a)?), (&b.scenario, run_of(&b)?));
                println!(
                    "These two were not measured in turns: what was different about the machine is in the ratios, too.\n"
                );
                found
            }
        };
        ensure!(
            !found.is_empty(),
            "there is nothing that {first} and {second} have both measured"
        );
        let title = format!("{second}, {first} being 1");
        let section = Section {
            parts: vec![comparisons("Ratios", &found)],
            title,
        };
        print!("{}", text(&[section]));
        Ok(ExitCode::SUCCESS)
    }
}

fn run_of(file: &ResultFile) -> Result<&RunResult> {
    match &file.outcome {
        Outcome::Run(run) => Ok(run),
        Outcome::Ndr(_) | Outcome::Soak(_) | Outcome::Check(_) => {
            bail!(
                "only results of run can be compared, this is {}",
                file.title()
            )
        }
    }
}
