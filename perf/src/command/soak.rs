//! `soak`: one variant for long.

use core::time::Duration;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use ripstop_perf::experiment::neighbours::memory_of_ours;
use ripstop_perf::experiment::soak::soak;
use ripstop_perf::experiment::{Outcome, ResultFile, SoakOptions};
use ripstop_perf::measure::Rate;

use super::{Common, is_set, now, stop_flag};

#[derive(Args)]
pub(crate) struct Soak {
    /// Name of a scenario (`ripstop-perf list`), or a file that ends in .json. Its first offer is made, to the variant that
    /// `--variant` names or the baseline.
    scenario: String,
    /// How long.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Packets a second, instead of the scenario's first rate.
    #[arg(long)]
    pps: Option<u64>,
    /// Percent of the packets that may be lost.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    #[command(flatten)]
    common: Common,
}

impl Soak {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let scenario = self.common.scenario(&self.scenario)?;
        let stages = scenario.stages();
        let stage = stages.first().context("a scenario without stages")?;
        let mut point = stage
            .points
            .first()
            .context("a stage without points")?
            .clone();
        if let Some(pps) = self.pps {
            point.rate = Rate::Pps(pps);
        }
        let name = scenario.baseline.clone();
        let length = Duration::from_secs_f64(self.minutes * 60.0);
        let options = SoakOptions {
            length,
            slice: Duration::from_secs(10).min(length / 10),
            loss: self.loss / 100.0,
        };
        let opener = self.common.across.opener(&scenario)?;
        let stop = stop_flag()?;
        let began = now();
        let plan = scenario.plan_of(&name, stage)?;
        let mut bed = opener.open(&plan, &scenario.variant(&name, stage)?)?;
        let progress = self.common.progress(&stop)?;
        let soaked = soak(
            bed.as_mut(),
            &name,
            &point,
            &options,
            memory_of_ours,
            &progress,
            &stop,
        )?;
        drop(progress);
        drop(bed);
        let sound = soaked.problems.is_empty();
        let result = ResultFile::new(scenario, Outcome::Soak(soaked), began).over(opener.facts());
        let code = self.common.output.give(&result, is_set(&stop))?;
        Ok(if sound || is_set(&stop) {
            code
        } else {
            ExitCode::FAILURE
        })
    }
}
