//! One variant for long: loss, latency, drops and the memory of its processes over time.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::figures::Figure;
use super::progress::Progress;
use super::scenario::Point;
use super::stats::{Spread, as_f64};
use super::{figures, summary};
use crate::measure::Bed;

/// Slices are made longer rather than more than this, so that the result stays small however long it goes on.
const SLICES_MAX: f64 = 1000.0;
/// Fewer than this say nothing about growth.
const SLICES_MIN: usize = 8;
/// Memory that a process may gain between the first and the last quarter: pages that are touched for the first time.
const GROWTH_MAX: u64 = 4 << 20;

/// How long, and what is allowed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SoakOptions {
    /// All in all.
    pub length: Duration,
    /// Of each look at it.
    pub slice: Duration,
    /// Share of the packets that may be lost.
    pub loss: f64,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SoakResult {
    /// Which variant.
    pub variant: String,
    /// What was offered.
    pub point: Point,
    /// What the bed says of itself.
    pub bed: String,
    /// How long, and what was allowed.
    pub options: SoakOptions,
    /// In order.
    pub slices: Vec<Slice>,
    /// What is not as it should be.
    pub problems: Vec<String>,
    /// Whether it was ended before its time.
    pub interrupted: bool,
}

/// A look at it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Slice {
    /// Seconds that it had been offered for.
    pub at: f64,
    /// Packets.
    pub sent: u64,
    /// Packets.
    pub lost: u64,
    /// Packets with wrong bytes.
    pub corrupt: u64,
    /// Million packets a second.
    pub mpps: f64,
    /// Microseconds.
    pub latency_p99: Option<f64>,
    /// Packets dropped, by who says so and why.
    pub drops: BTreeMap<String, u64>,
    /// Resident bytes of the processes under test, by name.
    pub memory: BTreeMap<String, u64>,
}

/// Offers the same again and again, on a bed that is up. `memory` tells resident bytes by process name.
///
/// # Errors
/// The options make no sense, or a trial failed.
pub fn soak(
    bed: &mut dyn Bed,
    variant: &str,
    point: &Point,
    options: &SoakOptions,
    memory: impl Fn() -> BTreeMap<String, u64>,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<SoakResult> {
    ensure!(
        !options.slice.is_zero() && options.slice <= options.length,
        "slices of {:?} in {:?}: take shorter ones",
        options.slice,
        options.length
    );
    let length = options.length.as_secs_f64();
    let slice = options.slice.as_secs_f64().max(length / SLICES_MAX);
    let offer = point.offer(Duration::from_secs_f64(slice));
    let mut slices = Vec::new();
    progress.begin(super::stats::whole((length / slice).ceil()));
    progress.say(&format!("{variant}, {}", summary::describe(point)));
    progress.watch(bed.watched());
    // Counted in what was offered, so that a model's hours pass in no time.
    while as_f64(slices.len()) * slice < length && !stop.load(Ordering::Relaxed) {
        let measured = bed.trial(&offer)?;
        let figures = figures::of(&measured);
        slices.push(Slice {
            at: as_f64(slices.len() + 1) * slice,
            sent: measured.sent,
            lost: measured.lost,
            corrupt: measured.corrupt,
            mpps: figures.get(&Figure::Mpps).copied().unwrap_or_default(),
            latency_p99: figures.get(&Figure::LatencyP99).copied(),
            drops: measured.drops.into_iter().filter(|(_, n)| *n > 0).collect(),
            memory: memory(),
        });
        progress.skip(1);
    }
    progress.end();
    Ok(SoakResult {
        variant: variant.to_owned(),
        point: point.clone(),
        bed: bed.description(),
        options: options.clone(),
        problems: problems(&slices, options),
        slices,
        interrupted: stop.load(Ordering::Relaxed),
    })
}

fn problems(slices: &[Slice], options: &SoakOptions) -> Vec<String> {
    let mut problems = Vec::new();
    let sum = |of: fn(&Slice) -> u64| slices.iter().map(of).sum::<u64>();
    let (sent, lost, corrupt) = (sum(|s| s.sent), sum(|s| s.lost), sum(|s| s.corrupt));
    if lost as f64 > sent as f64 * options.loss {
        problems.push(format!(
            "{lost} of {sent} packets were lost, allowed is a share of {}",
            options.loss
        ));
    }
    if corrupt > 0 {
        problems.push(format!("{corrupt} packets came with wrong bytes"));
    }
    if let Some(silent) = slices.iter().find(|slice| slice.mpps == 0.0) {
        problems.push(format!("nothing arrived at {:.0} s", silent.at));
    }
    if slices.len() < SLICES_MIN {
        problems.push(format!(
            "{} slices are too few to see whether memory grows: go on for longer",
            slices.len()
        ));
        return problems;
    }
    // The first slices are those in which memory is touched for the first time.
    let quarter = slices.len() / 4;
    let median = |slices: &[Slice], name: &str| {
        let values = slices.iter().filter_map(|slice| slice.memory.get(name));
        Spread::of(&values.map(|bytes| *bytes as f64).collect::<Vec<_>>())
            .map(|spread| spread.median)
    };
    for name in slices
        .iter()
        .flat_map(|slice| slice.memory.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        let first = slices
            .get(1..=quarter)
            .and_then(|slices| median(slices, name));
        let last = slices
            .get(slices.len() - quarter..)
            .and_then(|slices| median(slices, name));
        match (first, last) {
            (Some(first), Some(last))
                if last > first + GROWTH_MAX as f64 && last > first * 1.02 =>
            {
                let mebibytes = |bytes: f64| bytes / f64::from(1_u32 << 20);
                problems.push(format!(
                    "{name} grew from {:.1} to {:.1} MiB",
                    mebibytes(first),
                    mebibytes(last)
                ));
            }
            (Some(_), Some(_)) => {}
            (None, _) | (_, None) => problems.push(format!("{name} was not there all the time")),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;
    use crate::experiment::model::Model;
    use crate::measure::{Rate, Size, Work};

    fn run(model: &mut Model, hours: u64, loss: f64, growth: u64) -> SoakResult {
        let point = Point {
            sweep: None,
            work: Work::Packets,
            rate: Rate::Pps(100_000),
            size: Size::Bytes(64),
            flows: 1,
            destinations: 1,
        };
        let options = SoakOptions {
            length: Duration::from_secs(hours * 3600),
            slice: Duration::from_secs(10),
            loss,
        };
        let bytes = Cell::new(50 << 20);
        let memory = || {
            bytes.set(bytes.get() + growth);
            BTreeMap::from([("ripstop-dataplane".to_owned(), bytes.get())])
        };
        let go = AtomicBool::new(false);
        soak(
            model,
            "model",
            &point,
            &options,
            memory,
            &Progress::hidden(),
            &go,
        )
        .unwrap()
    }

    #[test]
    fn a_sound_path_has_no_problems_and_a_small_result() {
        let result = run(&mut Model::new(1e6, 1), 24, 0.0, 0);
        assert_eq!(result.problems, Vec::<String>::new());
        assert_eq!(result.slices.len(), 1000);
        let hour = run(&mut Model::new(1e6, 1), 1, 0.0, 0);
        assert_eq!(hour.slices.len(), 360);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let leak = run(&mut Model::new(1e6, 1), 1, 0.0, 100 << 10);
        assert_eq!(leak.problems.len(), 1);
        assert!(
            leak.problems[0].contains("ripstop-dataplane grew from"),
            "{:?}",
            leak.problems
        );

        let mut lossy = Model {
            loss: 0.001,
            ..Model::new(1e6, 1)
        };
        let lost = run(&mut lossy, 1, 0.0005, 0);
        assert!(
            lost.problems[0].contains("packets were lost"),
            "{:?}",
            lost.problems
        );
        assert_eq!(run(&mut lossy, 1, 0.002, 0).problems, Vec::<String>::new());

        let silent = run(&mut Model::new(0.0, 1), 1, 1.0, 0);
        assert!(
            silent.problems[0].contains("nothing arrived"),
            "{:?}",
            silent.problems
        );
    }

    #[test]
    fn too_short_is_said() {
        let point = run(&mut Model::new(1e6, 1), 1, 0.0, 0).point;
        let options = SoakOptions {
            length: Duration::from_secs(30),
            slice: Duration::from_secs(10),
            loss: 0.0,
        };
        let go = AtomicBool::new(false);
        let mut model = Model::new(1e6, 1);
        let result = soak(
            &mut model,
            "m",
            &point,
            &options,
            BTreeMap::new,
            &Progress::hidden(),
            &go,
        )
        .unwrap();
        assert!(result.problems[0].contains("3 slices are too few"));
    }
}
