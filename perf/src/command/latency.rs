//! `latency`: how long packets take.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ripstop_perf::measure::Rate;

use super::Common;
use super::run::{Rounds, measure};

#[derive(Args)]
pub(crate) struct Latency {
    /// Name of a scenario (`ripstop-perf list`), or a file that ends in .json.
    #[arg(default_value = "round-trips")]
    scenario: String,
    /// Packets or requests a second, instead of the scenario's own rates. Latency under a flood is that of full queues.
    #[arg(long)]
    pps: Vec<u64>,
    #[command(flatten)]
    rounds: Rounds,
    #[command(flatten)]
    common: Common,
}

impl Latency {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let mut scenario = self.common.scenario(&self.scenario)?;
        if !self.pps.is_empty() {
            scenario.offers.rates = self.pps.into_iter().map(Rate::Pps).collect();
        }
        measure(scenario, &self.rounds, &self.common)
    }
}
