//! `run`: variants side by side.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ripstop_perf::experiment::{Outcome, ResultFile, Scenario, runner};
use ripstop_perf::measure::{BedPlan, Variant};

use super::{Common, now, stop_flag};

#[derive(Args)]
pub(crate) struct Run {
    /// Name of a scenario (`ripstop-perf list`), or a file that ends in .json.
    scenario: String,
    #[command(flatten)]
    rounds: Rounds,
    #[command(flatten)]
    common: Common,
}

/// How often.
#[derive(Args)]
pub(crate) struct Rounds {
    /// How often each variant is set up and measured. Six are the least that can show a difference.
    #[arg(long)]
    rounds: Option<u32>,
}

impl Run {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let scenario = self.common.scenario(&self.scenario)?;
        measure(scenario, &self.rounds, &self.common)
    }
}

/// Runs a scenario and gives its result.
pub(super) fn measure(
    mut scenario: Scenario,
    rounds: &Rounds,
    common: &Common,
) -> Result<ExitCode> {
    if let Some(rounds) = rounds.rounds {
        scenario.rounds = rounds;
    }
    let opener = common.across.opener(&scenario)?;
    let stop = stop_flag()?;
    let began = now();
    let open = |plan: &BedPlan, variant: &Variant| opener.open(plan, variant);
    let run = runner::run(&scenario, open, &common.progress(&stop)?, &stop)?;
    let interrupted = run.interrupted;
    let result = ResultFile::new(scenario, Outcome::Run(run), began).over(opener.facts());
    common.output.give(&result, interrupted)
}
