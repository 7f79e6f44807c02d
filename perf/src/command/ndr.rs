//! `ndr`: the highest rate without loss.

use core::time::Duration;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ripstop_perf::experiment::ndr::search;
use ripstop_perf::experiment::{NdrOptions, Outcome, Point, ResultFile};
use ripstop_perf::measure::Rate;

use super::{Common, is_set, now, stop_flag};

#[derive(Args)]
pub(crate) struct Ndr {
    /// Name of a scenario (`ripstop-perf list`), or a file that ends in .json.
    scenario: String,
    /// Ends when the rate that loses is so little above the one that does not, in percent.
    #[arg(long, default_value_t = 1.0)]
    resolution: f64,
    /// Trials at each rate of the repeated search.
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Trials for MRR.
    #[arg(long, default_value_t = 5)]
    mrr_trials: u32,
    /// Percent of the packets that may be lost: 0, or 0.5 for what CSIT calls PDR.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// No rate below this is tried.
    #[arg(long, default_value_t = 1000)]
    min_pps: u64,
    /// No rate above this is tried.
    #[arg(long, default_value_t = 200_000_000)]
    max_pps: u64,
    #[command(flatten)]
    common: Common,
}

impl Ndr {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let scenario = self.common.scenario(&self.scenario)?;
        let options = NdrOptions {
            resolution: self.resolution / 100.0,
            trial: Duration::from_secs_f64(scenario.seconds),
            repeats: self.repeats,
            mrr_trials: self.mrr_trials,
            loss: self.loss / 100.0,
            min_pps: self.min_pps,
            max_pps: self.max_pps,
        };
        let opener = self.common.across.opener(&scenario)?;
        let stop = stop_flag()?;
        let began = now();
        let progress = self.common.progress(&stop)?;
        let mut found = Vec::new();
        'all: for stage in scenario.stages() {
            for name in scenario.variant_names() {
                let plan = scenario.plan_of(name, &stage)?;
                let mut bed = opener.open(&plan, &scenario.variant(name, &stage)?)?;
                for point in without_rates(&stage.points) {
                    if is_set(&stop) {
                        break 'all;
                    }
                    progress.begin(0);
                    let one = search(bed.as_mut(), name, &point, &options, &progress, &stop);
                    progress.end();
                    found.push(one?);
                }
            }
        }
        drop(progress);
        let result = ResultFile::new(scenario, Outcome::Ndr(found), began).over(opener.facts());
        self.common.output.give(&result, is_set(&stop))
    }
}

/// The points that are still different when the rate is what is searched for.
fn without_rates(points: &[Point]) -> Vec<Point> {
    let mut apart: Vec<Point> = Vec::new();
    for point in points {
        let rate = Rate::Max;
        let point = Point {
            rate,
            ..point.clone()
        };
        if !apart.contains(&point) {
            apart.push(point);
        }
    }
    apart
}
