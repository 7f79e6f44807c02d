//! `list`: the scenarios.

use std::process::ExitCode;

use anyhow::Result;
use ripstop_perf::experiment::Scenario;

pub(crate) fn run() -> Result<ExitCode> {
    for scenario in Scenario::built_in()? {
        let variants = scenario.variant_names().join(", ");
        println!("{:<22} {}", scenario.name, scenario.about);
        println!("{:<22} {variants}; {} rounds\n", "", scenario.rounds);
    }
    Ok(ExitCode::SUCCESS)
}
