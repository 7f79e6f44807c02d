//! What the trials of a run come to: medians and spreads, ratios, and what they have to be read with.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::figures::{self, Figure};
use super::result::{Failure, TrialRecord};
use super::scenario::{Point, Scenario};
use super::stats::{Ratio, Spread};
use crate::measure::{Limit, Path, Rate, Size, Work, histogram};

/// From this share of the machine on, what other processes took is worth a word.
const FOREIGN_SHARE: f64 = 0.03;
/// The same for what the hypervisor takes.
const STEAL_SHARE: f64 = 0.01;
/// The distance between quartiles, from the median, beyond which a figure is called unsteady.
const UNSTEADY: f64 = 0.15;

/// What a run comes to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Summary {
    /// One for each point and variant, in the order of the scenario, the baseline first.
    pub rows: Vec<Row>,
    /// The further comparisons that the scenario asks for.
    pub also: Vec<Comparison>,
    /// What the figures have to be read with.
    pub warnings: Vec<String>,
}

/// A variant at a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Row {
    /// Where.
    pub point: Point,
    /// What.
    pub variant: String,
    /// Median and spread of each figure.
    pub figures: BTreeMap<Figure, Spread>,
    /// Ratio of each figure to the baseline's in the same round.
    pub to_baseline: BTreeMap<Figure, Ratio>,
    /// Ratio of each figure to that at the first value of the sweep in the same round.
    pub to_first: BTreeMap<Figure, Ratio>,
    /// Packets dropped in all rounds together, by who says so and why.
    pub drops: BTreeMap<String, u64>,
    /// Latencies in nanoseconds, and how many packets took them, of all rounds together.
    pub latency: Vec<(u64, u64)>,
    /// What the beds say of themselves.
    pub bed: Vec<String>,
}

/// One variant beside another at a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Comparison {
    /// Where.
    pub point: Point,
    /// What is compared.
    pub variant: String,
    /// With what.
    pub with: String,
    /// Ratio of each figure, the second being 1.
    pub ratios: BTreeMap<Figure, Ratio>,
}

/// Figures of a variant at a point, by round.
pub(crate) type ByRound = BTreeMap<u32, BTreeMap<Figure, f64>>;

impl Summary {
    /// Of a scenario's trials.
    #[must_use]
    pub fn of(scenario: &Scenario, trials: &[TrialRecord], failures: &[Failure]) -> Self {
        let series = series(scenario, trials);
        let find = |point: &Point, variant: &str| {
            let found = series
                .iter()
                .find(|s| s.point == point && s.variant == variant);
            found.map(|series| &series.rounds)
        };
        let mut summary = Self::default();
        for one in &series {
            let against = |other: Option<&ByRound>| other.map(|other| ratios(&one.rounds, other));
            // The engines alone are no alternative to a path.
            let is_path = |name: &str| !is_wire(scenario, name);
            let comparable = is_path(one.variant) || !is_path(&scenario.baseline);
            let baseline = (one.variant != scenario.baseline && comparable)
                .then(|| find(one.point, &scenario.baseline))
                .flatten();
            let first = series.iter().find(|s| {
                s.variant == one.variant
                    && s.point.apart_from_sweep() == one.point.apart_from_sweep()
            });
            let first = first
                .filter(|first| one.point.sweep.is_some() && first.point != one.point)
                .filter(|_| is_path(one.variant))
                .map(|first| &first.rounds);
            summary.rows.push(Row {
                point: one.point.clone(),
                variant: one.variant.to_owned(),
                figures: spreads(&one.rounds),
                to_baseline: against(baseline).unwrap_or_default(),
                to_first: against(first).unwrap_or_default(),
                drops: drops(&one.trials),
                latency: latency(&one.trials),
                bed: beds(&one.trials),
            });
        }
        for [variant, with] in &scenario.also {
            for one in series.iter().filter(|series| series.variant == variant) {
                if let Some(other) = find(one.point, with) {
                    summary.also.push(Comparison {
                        point: one.point.clone(),
                        variant: variant.clone(),
                        with: with.clone(),
                        ratios: ratios(&one.rounds, other),
                    });
                }
            }
        }
        summary.warnings = warnings(scenario, &series, failures);
        summary
    }

    /// The points, in order.
    #[must_use]
    pub fn points(&self) -> Vec<&Point> {
        let mut points: Vec<&Point> = Vec::new();
        for row in &self.rows {
            if !points.contains(&&row.point) {
                points.push(&row.point);
            }
        }
        points
    }
}

fn is_wire(scenario: &Scenario, variant: &str) -> bool {
    let planned = scenario.variants.get(variant);
    planned.is_some_and(|variant| variant.path == Path::Wire)
}

/// The trials of a variant at a point.
pub(crate) struct Series<'a> {
    pub(crate) point: &'a Point,
    pub(crate) variant: &'a str,
    pub(crate) trials: Vec<&'a TrialRecord>,
    pub(crate) rounds: ByRound,
}

/// Trials by point and variant, in the order of the scenario.
pub(crate) fn series<'a>(scenario: &Scenario, trials: &'a [TrialRecord]) -> Vec<Series<'a>> {
    let mut all: Vec<Series<'a>> = Vec::new();
    for trial in trials {
        let known = all
            .iter_mut()
            .find(|s| s.point == &trial.point && s.variant == trial.variant);
        match known {
            Some(series) => series.trials.push(trial),
            None => all.push(Series {
                point: &trial.point,
                variant: &trial.variant,
                trials: vec![trial],
                rounds: ByRound::new(),
            }),
        }
    }
    let points: Vec<Point> = scenario
        .stages()
        .into_iter()
        .flat_map(|stage| stage.points)
        .collect();
    let names = scenario.variant_names();
    let place = |series: &Series<'_>| {
        let point = points.iter().position(|point| point == series.point);
        (point, names.iter().position(|name| *name == series.variant))
    };
    all.sort_by_key(place);
    let engines = |at: &Point| {
        let same = |trial: &&TrialRecord, exactly: bool| {
            let p = &trial.point;
            is_wire(scenario, &trial.variant)
                && if exactly {
                    p == at
                } else {
                    (p.size, p.rate, p.work) == (at.size, at.rate, at.work)
                }
        };
        let costs = |exactly: bool| {
            let trials = trials.iter().filter(|trial| same(trial, exactly));
            let costs = trials.filter_map(|t| {
                figures::of(&t.measured)
                    .get(&Figure::CpuSecondsGross)
                    .copied()
            });
            Spread::of(&costs.collect::<Vec<_>>()).map(|spread| spread.median)
        };
        costs(true).or_else(|| costs(false))
    };
    for series in &mut all {
        let engines = (!is_wire(scenario, series.variant))
            .then(|| engines(series.point))
            .flatten();
        for trial in &series.trials {
            let mut figures = figures::of(&trial.measured);
            if let Some(engines) = engines {
                figures::add_net(&mut figures, engines);
            }
            series.rounds.insert(trial.round, figures);
        }
    }
    all
}

fn spreads(rounds: &ByRound) -> BTreeMap<Figure, Spread> {
    let mut values: BTreeMap<Figure, Vec<f64>> = BTreeMap::new();
    for (figure, value) in rounds.values().flatten() {
        values.entry(*figure).or_default().push(*value);
    }
    values
        .into_iter()
        .filter_map(|(figure, values)| Some((figure, Spread::of(&values)?)))
        .collect()
}

/// Ratio of each figure in the rounds that have both.
pub(crate) fn ratios(these: &ByRound, those: &ByRound) -> BTreeMap<Figure, Ratio> {
    let mut pairs: BTreeMap<Figure, Vec<(f64, f64)>> = BTreeMap::new();
    for (round, figures) in these {
        let Some(others) = those.get(round) else {
            continue;
        };
        for (figure, value) in figures {
            if let Some(other) = others.get(figure) {
                pairs.entry(*figure).or_default().push((*value, *other));
            }
        }
    }
    pairs
        .into_iter()
        .filter_map(|(figure, pairs)| Some((figure, Ratio::of(&pairs)?)))
        .collect()
}

fn drops(trials: &[&TrialRecord]) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    for (reason, count) in trials.iter().flat_map(|trial| &trial.measured.drops) {
        if *count > 0 {
            *drops.entry(reason.clone()).or_default() += count;
        }
    }
    drops
}

fn latency(trials: &[&TrialRecord]) -> Vec<(u64, u64)> {
    let mut values: BTreeMap<u64, u64> = BTreeMap::new();
    for (value, count) in trials
        .iter()
        .filter_map(|trial| trial.measured.latency.as_ref())
        .flat_map(histogram::pairs)
    {
        *values.entry(value).or_default() += count;
    }
    values.into_iter().collect()
}

fn beds(trials: &[&TrialRecord]) -> Vec<String> {
    let mut beds: Vec<String> = Vec::new();
    for trial in trials {
        if !beds.contains(&trial.bed) {
            beds.push(trial.bed.clone());
        }
    }
    beds
}

fn warnings(scenario: &Scenario, all: &[Series<'_>], failures: &[Failure]) -> Vec<String> {
    let mut warnings: Vec<String> = failures
        .iter()
        .map(|failure| {
            let at = failure
                .point
                .as_ref()
                .map(|point| format!(" at {}", describe(point)));
            let (variant, round) = (&failure.variant, failure.round + 1);
            format!(
                "{variant}{} in round {round}: not measured: {}",
                at.unwrap_or_default(),
                failure.why
            )
        })
        .collect();
    for series in all {
        let name = format!("{}, {}", series.variant, describe(series.point));
        warnings.extend(
            of_series(series, scenario)
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    }
    let rounds = all.iter().map(|series| series.rounds.len()).min();
    if let Some(rounds) = rounds
        && scenario.variants.len() > 1
        && let Some(ratio) = Ratio::of(&vec![(1.0, 1.0); rounds])
        && !ratio.is_sure()
    {
        warnings.push(format!(
            "{rounds} rounds allow a confidence of no more than {:.0} %: no difference is claimed with less than 95 %, which takes six",
            ratio.confidence * 100.0
        ));
    }
    warnings
}

/// What limits mean, each kind once: how many of so many trials have it, and one of them for instance. Where source and sink
/// are all there is, they are the limit as they should be.
pub(crate) fn words_of_limits<'a>(
    limits: impl Iterator<Item = &'a Limit>,
    trials: usize,
    is_wire: bool,
) -> Vec<String> {
    let mut kinds: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for limit in limits {
        let (kind, why) = match limit {
            Limit::Source(why) if is_wire => ("the source is the limit, as it should be here", why),
            Limit::Sink(why) if is_wire => ("the sink is the limit, as it should be here", why),
            Limit::Source(why) => ("the source is the limit, the path may be faster", why),
            Limit::Sink(why) => ("the sink is the limit, the path may be faster", why),
            Limit::Neighbours(why) => ("noisy neighbours", why),
        };
        kinds.entry(kind).or_insert((0, why)).0 += 1;
    }
    let words = kinds.into_iter().map(|(kind, (with, why))| {
        format!("{kind} ({with} of {trials} trials, for instance: {why})")
    });
    words.collect()
}

fn of_series(series: &Series<'_>, scenario: &Scenario) -> Vec<String> {
    let mut warnings = Vec::new();
    let count = series.trials.len();
    let is_wire = is_wire(scenario, series.variant);
    let limits = series.trials.iter();
    let limits = limits.flat_map(|trial| &trial.measured.limits);
    warnings.extend(words_of_limits(limits, count, is_wire));
    let (mut foreign, mut steal, mut who) = (0.0_f64, 0.0_f64, None);
    for trial in &series.trials {
        if trial.foreign.of_ticks > 0 {
            let share = trial.foreign.ticks as f64 / trial.foreign.of_ticks as f64;
            if share > foreign {
                foreign = share;
                who = trial.foreign.most.as_deref();
            }
        }
        let capacity = trial.measured.cpu_seconds();
        if capacity > 0.0 {
            steal = steal.max(trial.measured.cpus.steal.as_secs_f64() / capacity);
        }
    }
    if foreign > FOREIGN_SHARE {
        let who = who.unwrap_or("nobody in particular");
        warnings.push(format!(
            "other processes took up to {:.0} % of the machine ({who})",
            foreign * 100.0
        ));
    }
    if steal > STEAL_SHARE {
        warnings.push(format!(
            "the hypervisor took up to {:.0} % of the machine (steal)",
            steal * 100.0
        ));
    }
    let corrupt: u64 = series
        .trials
        .iter()
        .map(|trial| trial.measured.corrupt)
        .sum();
    if corrupt > 0 {
        warnings.push(format!("{corrupt} packets came with wrong bytes"));
    }
    let spreads = spreads(&series.rounds);
    for figure in Figure::headline(series.point.work) {
        if let Some(spread) = spreads.get(figure)
            && spread.relative() > UNSTEADY
        {
            warnings.push(format!(
                "unsteady: {} from {} to {}, half of the trials within {:.0} %",
                figure.title(),
                figure.show(spread.min),
                figure.show(spread.max),
                spread.relative() * 100.0
            ));
        }
    }
    warnings
}

/// A point in a few words.
#[must_use]
pub fn describe(point: &Point) -> String {
    let mut words = Vec::new();
    if let Some((over, value)) = point.sweep {
        words.push(format!("{value} {}", over.name()));
    }
    match point.work {
        Work::Tcp => words.push(format!("{} TCP stream(s)", point.flows)),
        Work::Packets | Work::RoundTrips => {
            words.push(match point.size {
                Size::Bytes(bytes) => format!("{bytes} bytes"),
                Size::Imix => "IMIX".to_owned(),
            });
            if point.flows > 1 && point.sweep.is_none_or(|(over, _)| over.name() != "flows") {
                words.push(format!("{} flows", point.flows));
            }
            if point.destinations > 1
                && point
                    .sweep
                    .is_none_or(|(over, _)| over.name() != "destinations")
            {
                words.push(format!("{} destinations", point.destinations));
            }
            words.push(rate(point.rate));
        }
    }
    words.join(", ")
}

fn rate(rate: Rate) -> String {
    match rate {
        Rate::Pps(pps) => format!("{pps} packets/s"),
        Rate::Max => "as fast as the source can".to_owned(),
        Rate::Window(packets) => format!("lossless, window {packets}"),
    }
}
