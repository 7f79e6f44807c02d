//! What a report says, whatever it is written in.

use std::collections::BTreeMap;

use super::plot::{Axis, Bar, Line, Plot};
use super::{Part, Section, Table};
use crate::experiment::figures::{Figure, significant};
use crate::experiment::ndr::{Bounds, NdrResult};
use crate::experiment::result::{Checked, Outcome, ResultFile, RunResult};
use crate::experiment::scenario::{Point, Scenario};
use crate::experiment::soak::SoakResult;
use crate::experiment::stats::{Ratio, Spread};
use crate::experiment::summary::{Comparison, Row, Summary, describe, words_of_limits};
use crate::measure::Work;

/// Everything that result files say: a section for each of them, and one for each machine that they come from.
#[must_use]
pub fn page(results: &[ResultFile]) -> Vec<Section> {
    let mut sections: Vec<Section> = results.iter().map(section).collect();
    let mut machines: Vec<(Vec<[String; 2]>, Vec<String>)> = Vec::new();
    for result in results {
        let mut facts = result.host.rows();
        // That is different from one run to the next, and does not make it another machine.
        facts.retain(|[name, _]| name != "load average");
        match machines.iter_mut().find(|(known, _)| *known == facts) {
            Some((_, titles)) => titles.push(result.title()),
            None => machines.push((facts, vec![result.title()])),
        }
    }
    for (facts, titles) in machines {
        let mut table = Table::new("The machine", vec!["fact".to_owned(), "value".to_owned()]);
        table.rows = facts.into_iter().map(Vec::from).collect();
        sections.push(Section {
            title: "Where this was measured".to_owned(),
            parts: vec![
                Part::Text(format!("For: {}.", titles.join(", "))),
                Part::Table(table),
            ],
        });
    }
    sections
}

fn section(result: &ResultFile) -> Section {
    let scenario = &result.scenario;
    let mut parts = vec![
        Part::Text(scenario.about.clone()),
        Part::Text(format!(
            "Measured {}, load average then {}.",
            result.date, result.host.load
        )),
        Part::Command(result.command_line.join(" ")),
    ];
    match &result.outcome {
        Outcome::Run(run) => parts.extend(of_run(scenario, run)),
        Outcome::Ndr(found) => parts.extend(of_ndr(found)),
        Outcome::Soak(soak) => parts.extend(of_soak(soak)),
        Outcome::Check(all) => parts.push(checked(all)),
    }
    Section {
        title: result.title(),
        parts,
    }
}

fn of_run(scenario: &Scenario, run: &RunResult) -> Vec<Part> {
    let summary = &run.summary;
    let mut parts = Vec::new();
    if run.interrupted {
        parts.push(Part::Text(
            "It was ended before its time: fewer rounds than planned.".to_owned(),
        ));
    }
    parts.push(figures(scenario, summary));
    parts.push(ratios_to_baseline(scenario, summary));
    if !summary.also.is_empty() {
        parts.push(comparisons("Further ratios", &summary.also));
    }
    if scenario.sweep.is_some() {
        parts.push(flatness(summary));
    }
    parts.extend(plots(scenario, summary));
    parts.push(drops(summary));
    parts.push(beds(summary));
    parts.push(Part::Warnings(summary.warnings.clone()));
    parts.retain(|part| !matches!(part, Part::Table(table) if table.rows.is_empty()));
    parts.retain(|part| !matches!(part, Part::Warnings(warnings) if warnings.is_empty()));
    parts
}

fn median_and_range(figure: Figure, spread: &Spread) -> String {
    let show = |value| figure.show(value);
    if spread.count == 1 || show(spread.min) == show(spread.max) {
        return show(spread.median);
    }
    format!(
        "{} ({}–{})",
        show(spread.median),
        show(spread.min),
        show(spread.max)
    )
}

fn work_of(summary: &Summary) -> Work {
    summary
        .rows
        .first()
        .map_or(Work::Packets, |row| row.point.work)
}

fn figures(scenario: &Scenario, summary: &Summary) -> Part {
    let told = Figure::told(work_of(summary));
    let mut columns = vec!["offer".to_owned(), "variant".to_owned()];
    columns.extend(told.iter().map(|figure| figure.title().to_owned()));
    columns.push("rounds".to_owned());
    let mut table = Table::new("Figures: median (smallest–largest)", columns);
    for row in &summary.rows {
        let mut cells = vec![describe(&row.point), marked(scenario, &row.variant)];
        cells.extend(told.iter().map(|figure| {
            let spread = row.figures.get(figure);
            spread.map_or_else(String::new, |spread| median_and_range(*figure, spread))
        }));
        let rounds = row.figures.values().map(|spread| spread.count).max();
        cells.push(rounds.unwrap_or_default().to_string());
        table.rows.push(cells);
    }
    Part::Table(table.without_empty_columns())
}

fn marked(scenario: &Scenario, variant: &str) -> String {
    if variant == scenario.baseline && scenario.variants.len() > 1 {
        format!("{variant} (baseline)")
    } else {
        variant.to_owned()
    }
}

fn ratio_columns() -> Vec<String> {
    [
        "offer",
        "variant",
        "figure",
        "ratio [interval]",
        "confidence",
        "that is",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn ratio_row(point: &Point, variant: String, figure: Figure, ratio: &Ratio) -> Vec<String> {
    vec![
        describe(point),
        variant,
        figure.title().to_owned(),
        ratio.to_string(),
        format!("{:.0} %", ratio.confidence * 100.0),
        ratio.verdict(figure.better()).to_string(),
    ]
}

fn ratios_to_baseline(scenario: &Scenario, summary: &Summary) -> Part {
    let title = format!("Ratios to {}, round by round", scenario.baseline);
    let mut table = Table::new(title, ratio_columns());
    for row in &summary.rows {
        for figure in Figure::headline(row.point.work) {
            if let Some(ratio) = row.to_baseline.get(figure) {
                let cells = ratio_row(&row.point, row.variant.clone(), *figure, ratio);
                table.rows.push(cells);
            }
        }
    }
    Part::Table(table)
}

/// A table of comparisons by the headline figures.
#[must_use]
pub fn comparisons(title: &str, comparisons: &[Comparison]) -> Part {
    let mut table = Table::new(title, ratio_columns());
    for one in comparisons {
        let names = if one.variant == one.with {
            one.variant.clone()
        } else {
            format!("{} to {}", one.variant, one.with)
        };
        for figure in Figure::headline(one.point.work) {
            if let Some(ratio) = one.ratios.get(figure) {
                table
                    .rows
                    .push(ratio_row(&one.point, names.clone(), *figure, ratio));
            }
        }
    }
    Part::Table(table)
}

/// How the cost of a packet stands at each value of a sweep to that at the first.
fn flatness(summary: &Summary) -> Part {
    let columns = [
        "value",
        "variant",
        "offer",
        "figure",
        "to the first [interval]",
        "confidence",
        "within 10 %",
    ];
    let mut table = Table::new("How the cost grows", columns.map(str::to_owned).to_vec());
    for row in &summary.rows {
        let Some((over, value)) = row.point.sweep else {
            continue;
        };
        for figure in [
            Figure::CpuSecondsGross,
            Figure::CpuSecondsNet,
            Figure::WorkerCycles,
        ] {
            if let Some(ratio) = row.to_first.get(&figure) {
                let flat = if !ratio.is_sure() {
                    "too few rounds"
                } else if ratio.high <= 1.1 {
                    "yes"
                } else if ratio.low > 1.1 {
                    "no"
                } else {
                    "not shown"
                };
                let offer = Point {
                    sweep: None,
                    ..row.point.clone()
                };
                table.rows.push(vec![
                    format!("{value} {}", over.name()),
                    row.variant.clone(),
                    describe(&offer),
                    figure.title().to_owned(),
                    ratio.to_string(),
                    format!("{:.0} %", ratio.confidence * 100.0),
                    flat.to_owned(),
                ]);
            }
        }
    }
    Part::Table(table)
}

fn drops(summary: &Summary) -> Part {
    let columns = ["offer", "variant", "who and why", "packets, all rounds"];
    let mut table = Table::new("Drops", columns.map(str::to_owned).to_vec());
    for row in &summary.rows {
        for (reason, count) in &row.drops {
            table.rows.push(vec![
                describe(&row.point),
                row.variant.clone(),
                reason.clone(),
                count.to_string(),
            ]);
        }
    }
    Part::Table(table)
}

fn beds(summary: &Summary) -> Part {
    let mut table = Table::new(
        "What was measured",
        vec!["variant".to_owned(), "as it came to be".to_owned()],
    );
    for row in &summary.rows {
        for bed in &row.bed {
            let cells = vec![row.variant.clone(), bed.clone()];
            if !table.rows.contains(&cells) {
                table.rows.push(cells);
            }
        }
    }
    Part::Table(table)
}

fn plots(scenario: &Scenario, summary: &Summary) -> Vec<Part> {
    let work = work_of(summary);
    let mut parts = Vec::new();
    if let Some(sweep) = &scenario.sweep {
        // Without an offset, what grows and what does not looks as it is.
        let figure = match work {
            Work::Packets => Figure::CpuSecondsGross,
            Work::Tcp => Figure::GbitsPerSecond,
            Work::RoundTrips => Figure::LatencyP99,
        };
        let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for row in &summary.rows {
            if let (Some((_, value)), Some(spread)) = (row.point.sweep, row.figures.get(&figure)) {
                let offers = summary.points().len() > sweep.values.len();
                let apart = Point {
                    sweep: None,
                    ..row.point.clone()
                };
                let name = if offers {
                    format!("{}, {}", row.variant, describe(&apart))
                } else {
                    row.variant.clone()
                };
                lines
                    .entry(name)
                    .or_default()
                    .push((f64::from(value), spread.median));
            }
        }
        parts.push(Part::Plot(Plot {
            title: format!("{} by {}", figure.title(), sweep.over.name()),
            axis: Axis::Lines {
                x: sweep.over.name().to_owned(),
                y: figure.title().to_owned(),
                logarithmic: true,
                lines: lines
                    .into_iter()
                    .map(|(name, points)| Line { name, points })
                    .collect(),
            },
        }));
    } else if let Some(figure) = Figure::headline(work).first() {
        for point in summary.points() {
            let rows = summary.rows.iter().filter(|row| row.point == *point);
            let bars: Vec<Bar> = rows
                .filter_map(|row| Some((row, row.figures.get(figure)?)))
                .map(bar)
                .collect();
            if !bars.is_empty() {
                parts.push(Part::Plot(Plot {
                    title: format!("{}: {}", figure.title(), describe(point)),
                    axis: Axis::Bars {
                        unit: figure.title().to_owned(),
                        bars,
                    },
                }));
            }
        }
    }
    let with_latency = |row: &&Row| !row.latency.is_empty();
    if work == Work::RoundTrips && summary.rows.iter().any(|row| with_latency(&row)) {
        for point in summary.points() {
            let rows = summary
                .rows
                .iter()
                .filter(|row| row.point == *point)
                .filter(with_latency);
            let lines = rows.map(|row| Line {
                name: row.variant.clone(),
                points: percentiles(&row.latency),
            });
            parts.push(Part::Plot(Plot {
                title: format!(
                    "µs that all but one of so many packets do not exceed: {}",
                    describe(point)
                ),
                axis: Axis::Lines {
                    x: "one of".to_owned(),
                    y: "µs".to_owned(),
                    logarithmic: true,
                    lines: lines.collect(),
                },
            }));
        }
    }
    parts
}

fn bar((row, spread): (&Row, &Spread)) -> Bar {
    Bar {
        name: row.variant.clone(),
        value: spread.median,
        from: spread.min,
        to: spread.max,
    }
}

/// One of 1, 2, 5, 10, … packets takes longer than so many microseconds.
fn percentiles(latency: &[(u64, u64)]) -> Vec<(f64, f64)> {
    let total: u64 = latency.iter().map(|(_, count)| count).sum();
    let mut points = Vec::new();
    let mut decade = 1_u64;
    while decade <= total {
        for one_of in [decade, decade.saturating_mul(2), decade.saturating_mul(5)] {
            if one_of > total {
                break;
            }
            let mut above = total;
            let found = latency.iter().find(|(_, count)| {
                above -= count;
                above.saturating_mul(one_of) <= total
            });
            if let Some((nanoseconds, _)) = found.filter(|_| one_of > 1) {
                points.push((one_of as f64, *nanoseconds as f64 / 1e3));
            }
        }
        decade = decade.saturating_mul(10);
    }
    points
}

fn of_ndr(found: &[NdrResult]) -> Vec<Part> {
    let columns = [
        "variant",
        "offer",
        "MRR",
        "NDR, RFC 2544",
        "loses at",
        "NDR, repeated",
        "loses at",
        "trials",
    ];
    let mut table = Table::new("Highest rates, Mpps", columns.map(str::to_owned).to_vec());
    let mut warnings = Vec::new();
    let mut bars = Vec::new();
    for one in found {
        let mpps = |pps: u64| significant(pps as f64 / 1e6);
        let lower = |bounds: &Bounds| {
            let sign = if bounds.source_bound { "≥ " } else { "" };
            let least = one.options.min_pps as f64 / 1e3;
            bounds.lower.map_or_else(
                || format!("none above {least:.0} kpps"),
                |pps| format!("{sign}{}", mpps(pps)),
            )
        };
        let upper = |bounds: &Bounds| bounds.upper.map_or_else(String::new, mpps);
        let point = describe(&one.point);
        table.rows.push(vec![
            one.variant.clone(),
            point.clone(),
            one.mrr.as_ref().map_or_else(String::new, |mrr| {
                let millions = |value: f64| significant(value / 1e6);
                format!(
                    "{} ({}–{})",
                    millions(mrr.median),
                    millions(mrr.min),
                    millions(mrr.max)
                )
            }),
            lower(&one.ndr),
            upper(&one.ndr),
            lower(&one.repeated),
            upper(&one.repeated),
            one.steps.len().to_string(),
        ]);
        if let Some(mrr) = &one.mrr {
            let [median, from, to] = [mrr.median, mrr.min, mrr.max].map(|pps| pps / 1e6);
            bars.push(Bar {
                name: format!("{} MRR", one.variant),
                value: median,
                from,
                to,
            });
        }
        if let Some(pps) = one.repeated.lower {
            let value = pps as f64 / 1e6;
            bars.push(Bar {
                name: format!("{} NDR", one.variant),
                value,
                from: value,
                to: value,
            });
        }
        if one.interrupted {
            warnings.push(format!("{}, {point}: ended before its time", one.variant));
        }
        let limits = words_of_limits(one.limits.iter(), one.steps.len(), false);
        let said = limits.into_iter();
        warnings.extend(said.map(|limits| format!("{}, {point}: {limits}", one.variant)));
    }
    let how = found.first().map(|one| {
        let o = &one.options;
        format!(
            "MRR: what arrives when as much as possible is sent, median of {} trials. NDR: the highest rate at which no more than a \
             share of {} is lost, by a bisection to {} % with trials of {} s: RFC 2544 by one trial at each rate, repeated by up to \
             {} of which at most half may lose more.",
            o.mrr_trials,
            o.loss,
            o.resolution * 100.0,
            o.trial.as_secs_f64(),
            o.repeats
        )
    });
    let mut parts = vec![Part::Text(how.unwrap_or_default()), Part::Table(table)];
    if !bars.is_empty() {
        parts.push(Part::Plot(Plot {
            title: "MRR and NDR (repeated), Mpps".to_owned(),
            axis: Axis::Bars {
                unit: "Mpps".to_owned(),
                bars,
            },
        }));
    }
    if !warnings.is_empty() {
        parts.push(Part::Warnings(warnings));
    }
    parts
}

fn of_soak(soak: &SoakResult) -> Vec<Part> {
    let sum =
        |of: fn(&crate::experiment::soak::Slice) -> u64| soak.slices.iter().map(of).sum::<u64>();
    let mut table = Table::new("All in all", ["what", "value"].map(str::to_owned).to_vec());
    let mut row = |what: &str, value: String| table.rows.push(vec![what.to_owned(), value]);
    row("variant", soak.variant.clone());
    row("offer", describe(&soak.point));
    row("bed", soak.bed.clone());
    row(
        "length",
        format!("{:.0} s", soak.slices.last().map_or(0.0, |slice| slice.at)),
    );
    row("packets sent", sum(|slice| slice.sent).to_string());
    row("packets lost", sum(|slice| slice.lost).to_string());
    let mut drops: BTreeMap<&str, u64> = BTreeMap::new();
    for (reason, count) in soak.slices.iter().flat_map(|slice| &slice.drops) {
        *drops.entry(reason).or_default() += count;
    }
    for (reason, count) in drops {
        row(&format!("dropped: {reason}"), count.to_string());
    }
    let mut memory: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for slice in &soak.slices {
        for (name, bytes) in &slice.memory {
            let mebibytes = *bytes as f64 / f64::from(1_u32 << 20);
            memory.entry(name).or_default().push((slice.at, mebibytes));
        }
    }
    for (name, points) in &memory {
        if let (Some((_, first)), Some((_, last))) = (points.first(), points.last()) {
            row(
                &format!("memory of {name}"),
                format!("{first:.1} MiB, at the end {last:.1}"),
            );
        }
    }
    row(
        "verdict",
        if soak.problems.is_empty() {
            "as it should be".to_owned()
        } else {
            "see below".to_owned()
        },
    );
    let over_time = |title: &str, lines: Vec<Line>| {
        Part::Plot(Plot {
            title: title.to_owned(),
            axis: Axis::Lines {
                x: "seconds".to_owned(),
                y: title.to_owned(),
                logarithmic: false,
                lines,
            },
        })
    };
    let line = |name: &str, of: &dyn Fn(&crate::experiment::soak::Slice) -> Option<f64>| Line {
        name: name.to_owned(),
        points: soak
            .slices
            .iter()
            .filter_map(|slice| Some((slice.at, of(slice)?)))
            .collect(),
    };
    let memory = memory.into_iter().map(|(name, points)| Line {
        name: name.to_owned(),
        points,
    });
    let mut parts = vec![
        Part::Table(table),
        over_time(
            "packets lost",
            vec![line("lost", &|slice| Some(slice.lost as f64))],
        ),
        over_time("p99 µs", vec![line("p99", &|slice| slice.latency_p99)]),
        over_time("MiB", memory.collect()),
    ];
    parts.retain(|part| match part {
        Part::Plot(plot) => plot.has_points(),
        Part::Text(_) | Part::Command(_) | Part::Table(_) | Part::Warnings(_) => true,
    });
    if !soak.problems.is_empty() {
        parts.push(Part::Warnings(soak.problems.clone()));
    }
    parts
}

/// A table of what two sets of programs came to.
#[must_use]
pub fn checked(all: &[Checked]) -> Part {
    let columns = [
        "variant",
        "offer",
        "speed, the base being 1",
        "confidence",
        "judgement",
    ];
    let mut table = Table::new(
        "Speed of the second commit",
        columns.map(str::to_owned).to_vec(),
    );
    for one in all {
        table.rows.push(vec![
            one.variant.clone(),
            describe(&one.point),
            one.speed
                .map_or_else(String::new, |speed| speed.to_string()),
            one.speed.map_or_else(String::new, |speed| {
                format!("{:.0} %", speed.confidence * 100.0)
            }),
            one.judgement.to_string(),
        ]);
    }
    Part::Table(table)
}
