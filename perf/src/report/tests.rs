//! The writers, on results of models.

use core::sync::atomic::AtomicBool;
use core::time::Duration;
use std::collections::BTreeMap;

use super::*;
use crate::experiment::check::Judgement;
use crate::experiment::host::Host;
use crate::experiment::model::Model;
use crate::experiment::ndr::{self, NdrOptions};
use crate::experiment::result::{Checked, Outcome, ResultFile};
use crate::experiment::scenario::Scenario;
use crate::experiment::soak::{SoakOptions, soak};
use crate::experiment::stats::Ratio;
use crate::experiment::{Progress, runner};
use crate::measure::{Bed, BedPlan, Limit, Path, Variant};

const SCENARIO: &str = r#"{
    "about": "Models side by side: a | b <c> & d.",
    "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 1000, "mtu": 1500},
    "baseline": "kernel",
    "variants": {"kernel": {"path": "kernel"}, "tun": {"path": "ripstop"}, "wire": {"path": "wire"}},
    "also": [["tun", "wire"]],
    "offers": {"work": "packets", "rates": [{"window": 512}, "max"], "sizes": [64]},
    "seconds": 1, "warmUpSeconds": 0.1, "rounds": 6
}"#;

fn model(variant: &Variant) -> Model {
    let (capacity, cpu, limit) = match variant.path {
        Path::Wire => (5e6, 0.5, Some(Limit::Source("always busy".to_owned()))),
        Path::Kernel => (4e5, 3.0, None),
        Path::Ripstop | Path::Routing | Path::TestpmdAfxdp | Path::TestpmdNull => {
            (8e5, 1.5, Some(Limit::Sink("its ring was full".to_owned())))
        }
    };
    Model {
        cpu,
        limits: limit.into_iter().collect(),
        noise: 0.02,
        timed: true,
        ..Model::new(capacity, 1)
    }
}

/// Everything that says where and when is made up, so that it is the same everywhere.
fn file(scenario: Scenario, outcome: Outcome) -> ResultFile {
    let mut file = ResultFile::new(scenario, outcome, jiff::Timestamp::UNIX_EPOCH);
    file.command_line = vec![
        "ripstop-perf".to_owned(),
        "run".to_owned(),
        "models".to_owned(),
    ];
    file.host = Host {
        cpu: "Made Up 9000".to_owned(),
        cpus: 2,
        numa_nodes: 1,
        memory_bytes: 8 << 30,
        kernel: "6.99.0".to_owned(),
        system: "Some Linux 1".to_owned(),
        load: "0.10 0.20 0.30".to_owned(),
        clock_source: "tsc".to_owned(),
        commit: "0123456789ab".to_owned(),
        ..Host::default()
    };
    file
}

fn run(text: &str) -> ResultFile {
    let scenario = Scenario::parse("models", text).unwrap();
    let opener = |plan: &BedPlan, variant: &Variant| {
        let mut model = model(variant);
        model.cpu *= 1.0 + f64::from(plan.leases) / 1e6;
        Ok(Box::new(model) as Box<dyn Bed>)
    };
    let go = AtomicBool::new(false);
    let mut run = runner::run(&scenario, opener, &Progress::hidden(), &go).unwrap();
    // What others do on the machine that runs the tests.
    for trial in &mut run.trials {
        trial.foreign = crate::experiment::neighbours::Foreign::default();
    }
    run.summary = crate::experiment::summary::Summary::of(&scenario, &run.trials, &run.failures);
    file(scenario, Outcome::Run(run))
}

fn everything() -> Vec<ResultFile> {
    let plain = run(SCENARIO);
    let sweep = r#""sweep": {"over": "leases", "values": [10, 100000]}, "seconds""#;
    let swept = run(&SCENARIO.replace("\"seconds\"", sweep));
    let round_trips = SCENARIO
        .replace("\"packets\"", "\"round-trips\"")
        .replace(r#"[{"window": 512}, "max"]"#, r#"[{"pps": 1000}]"#);
    let round_trips = run(&round_trips);
    let scenario = plain.scenario.clone();
    let point = scenario.stages()[0].points[1].clone();
    let go = AtomicBool::new(false);
    let quiet = Progress::hidden();
    let options = NdrOptions::default();
    let found = ndr::search(
        &mut Model::new(1e6, 1),
        "tun",
        &point,
        &options,
        &quiet,
        &go,
    )
    .unwrap();
    let options = SoakOptions {
        length: Duration::from_secs(3600),
        slice: Duration::from_secs(10),
        loss: 0.0,
    };
    let memory = || BTreeMap::from([("ripstop-dataplane".to_owned(), 50 << 20)]);
    let mut lossy = Model {
        loss: 0.01,
        timed: true,
        ..Model::new(1e6, 1)
    };
    let soaked = soak(&mut lossy, "tun", &point, &options, memory, &quiet, &go).unwrap();
    let checked = Checked {
        variant: "tun".to_owned(),
        point,
        speed: Ratio::of(&[(0.9, 1.0); 8]),
        judgement: Judgement::Slower,
    };
    vec![
        plain,
        swept,
        round_trips,
        file(scenario.clone(), Outcome::Ndr(vec![found])),
        file(scenario.clone(), Outcome::Soak(soaked)),
        file(scenario, Outcome::Check(vec![checked])),
    ]
}

fn tables(sections: &[Section]) -> Vec<&Table> {
    let parts = sections.iter().flat_map(|section| &section.parts);
    parts
        .filter_map(|part| match part {
            Part::Table(table) => Some(table),
            Part::Text(_) | Part::Command(_) | Part::Plot(_) | Part::Warnings(_) => None,
        })
        .collect()
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let sections = page(&everything());
    let html = html(&sections);
    for elsewhere in [
        "http:", "https:", "//", "src=", "@import", "url(", "<script", "<link",
    ] {
        assert!(!html.contains(elsewhere), "{elsewhere}");
    }
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..roxmltree::ParsingOptions::default()
    };
    let document = roxmltree::Document::parse_with_options(&html, options).unwrap();
    let elements = |name: &'static str| {
        document
            .descendants()
            .filter(move |node| node.has_tag_name(name))
    };
    let strings = |node: roxmltree::Node<'_, '_>| -> Vec<String> {
        let cells = node
            .descendants()
            .filter(|n| n.has_tag_name("td") || n.has_tag_name("th"));
        cells
            .map(|cell| cell.text().unwrap_or_default().to_owned())
            .collect()
    };
    let expected = tables(&sections);
    let found: Vec<_> = elements("table").collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.into_iter().zip(expected) {
        let cells: Vec<String> = expected
            .columns
            .iter()
            .chain(expected.rows.iter().flatten())
            .cloned()
            .collect();
        assert_eq!(strings(found), cells, "{}", expected.title);
        assert!(!expected.rows.is_empty(), "{}", expected.title);
        assert!(
            expected
                .rows
                .iter()
                .all(|row| row.len() == expected.columns.len()),
            "{}",
            expected.title
        );
    }
    let plots = sections.iter().flat_map(|section| &section.parts);
    let plots = plots.filter(|part| matches!(part, Part::Plot(_))).count();
    assert_eq!(
        (elements("svg").count(), elements("figure").count()),
        (plots, plots)
    );
    // Two offers, one sweep of each, round trips with their distribution, rates, and three over time.
    assert_eq!(plots, 2 + 1 + 2 + 1 + 3);
    assert!(
        !html.contains("#01020"),
        "a colour of a plot is not the page's"
    );
    // What people write is text, not markup.
    assert!(html.contains("a | b &lt;c&gt; &amp; d."));
    assert!(html.contains("Made Up 9000") && html.contains("ripstop-perf run models"));
}

#[test]
fn limits_are_in_every_format() {
    let sections = page(&[run(SCENARIO)]);
    for written in [html(&sections), markdown(&sections), text(&sections)] {
        for part in [
            "the sink is the limit, the path may be faster",
            "its ring was full",
            "as it should be here",
        ] {
            assert!(written.contains(part), "{part:?} is not in {written}");
        }
    }
}

/// `RIPSTOP_WRITE_GOLDEN=1 cargo test -p ripstop-perf golden` writes the file anew; look at what changes.
#[test]
fn golden_markdown() {
    let mut results = everything();
    // One run of variants side by side, and one of each other kind.
    results.drain(1..3);
    let written = markdown(&page(&results));
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/report/golden.md");
    if std::env::var_os("RIPSTOP_WRITE_GOLDEN").is_some() {
        std::fs::write(&golden, &written).unwrap();
    }
    let expected = std::fs::read_to_string(&golden).unwrap();
    let lines = written.lines().zip(expected.lines());
    for (number, (written, expected)) in lines.enumerate() {
        assert_eq!(written, expected, "line {}", number + 1);
    }
    assert_eq!(written.lines().count(), expected.lines().count());
}

#[test]
fn results_survive_a_file_and_another_version_is_said() {
    let folder = tempfile::tempdir().unwrap();
    for (number, result) in everything().into_iter().enumerate() {
        let path = folder.path().join("a/b").join(number.to_string());
        result.save(&path).unwrap();
        // Not assert_eq: it would print megabytes.
        assert!(ResultFile::load(&path).unwrap() == result, "{number}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\n  \"schema\": 1,"));
        let other = text.replacen("\"schema\": 1", "\"schema\": 2", 1);
        std::fs::write(&path, other).unwrap();
        let error = format!("{:#}", ResultFile::load(&path).unwrap_err());
        assert!(
            error.contains("version 2") && error.contains("version 1"),
            "{error}"
        );
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    for (text, says) in [
        ("{}", "no \"schema\""),
        ("x", "not a result"),
        ("{\"schema\": 1}", "damaged"),
    ] {
        let error = format!("{:#}", ResultFile::parse(text).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn text_is_aligned() {
    let mut table = Table::new("Some", vec!["a".to_owned(), "bb".to_owned()]);
    table.rows = vec![
        vec!["longer".to_owned(), "µ".to_owned()],
        vec![String::new(), "x".to_owned()],
    ];
    let section = Section {
        title: "Title".to_owned(),
        parts: vec![Part::Table(table)],
    };
    assert_eq!(
        text(&[section]),
        "Title\n=====\n\nSome\n  a       bb\n  longer  µ\n          x\n\n"
    );
}
