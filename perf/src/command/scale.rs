//! `scale`: how cost grows.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::Common;
use super::run::{Rounds, measure};

#[derive(Args)]
pub(crate) struct Scale {
    /// With what: leases, leases-uniform, flows, workers; or a scenario file with a sweep.
    #[arg(default_value = "leases")]
    over: String,
    /// Values, instead of the scenario's own.
    #[arg(long, value_delimiter = ',')]
    values: Vec<u32>,
    #[command(flatten)]
    rounds: Rounds,
    #[command(flatten)]
    common: Common,
}

impl Scale {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let name = if self.over.ends_with(".json") {
            self.over
        } else {
            format!("scale-{}", self.over)
        };
        let mut scenario = self.common.scenario(&name)?;
        let sweep = scenario.sweep.as_mut();
        let sweep = sweep.with_context(|| format!("scenario {name} has no \"sweep\": use run"))?;
        if !self.values.is_empty() {
            sweep.values = self.values;
        }
        measure(scenario, &self.rounds, &self.common)
    }
}
