//! Scenario files: which paths are compared, by which offers, how often.
//!
//! `perf/scenarios/*.json`, one experiment each, described in `perf/README.md`. Whatever is wrong in a file is an error that
//! names the file, the key and the way out.

use core::time::Duration;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::stats::ROUNDS_MAX;
use crate::measure::{BedPlan, Offer, Path as Way, Rate, Size, Topology, Variant, Work};

macro_rules! built_in {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("../../scenarios/", $name, ".json")),
        )
    };
}

/// The scenarios that come with the program, by name.
pub const BUILT_IN: [(&str, &str); 19] = [
    built_in!("calibrate"),
    built_in!("check"),
    built_in!("round-trips"),
    built_in!("scale-flows"),
    built_in!("scale-leases-uniform"),
    built_in!("scale-leases"),
    built_in!("scale-workers"),
    built_in!("sizes-decap"),
    built_in!("sizes-encap"),
    built_in!("small-udp-decap-pod"),
    built_in!("small-udp-decap"),
    built_in!("small-udp-encap-pod"),
    built_in!("small-udp-encap"),
    built_in!("small-udp-gateway-decap"),
    built_in!("small-udp-gateway"),
    built_in!("smoke"),
    built_in!("tcp-eight"),
    built_in!("tcp-one"),
    built_in!("testpmd"),
];

/// An experiment: paths, what is offered to them, and how often.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without `.json`; the file itself does not say it.
    #[serde(default)]
    pub name: String,
    /// What it shows, in a sentence.
    pub about: String,
    /// The set-up of every variant, but for what it changes itself.
    pub plan: BedPlan,
    /// The variant that all others are compared with.
    pub baseline: String,
    /// What is compared, by name.
    pub variants: BTreeMap<String, PlannedVariant>,
    /// Further comparisons: the first variant with the second.
    #[serde(default)]
    pub also: Vec<[String; 2]>,
    /// What each variant is offered: every combination.
    pub offers: Offers,
    /// What else is varied.
    #[serde(default)]
    pub sweep: Option<Sweep>,
    /// Length of a trial.
    pub seconds: f64,
    /// Length of the trial after a bed is opened that does not count.
    pub warm_up_seconds: f64,
    /// How often each variant is set up and measured.
    pub rounds: u32,
}

/// A variant, and what it changes in the set-up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlannedVariant {
    /// See [`Variant::path`].
    pub path: Way,
    /// See [`Variant::dataplane`].
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub dataplane: Map<String, Value>,
    /// See [`Variant::placement`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// Keys of the plan that are different for this variant.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub plan: Map<String, Value>,
}

/// What is offered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Offers {
    /// What kind of traffic.
    pub work: Work,
    /// How fast: `"max"`, `{"pps": 10000}`, `{"window": 512}`.
    pub rates: Vec<Rate>,
    /// Sizes of inner packets: bytes, or `"imix"`.
    #[serde(with = "sizes")]
    pub sizes: Vec<Size>,
    /// Flows, or TCP streams.
    #[serde(default = "just_one")]
    pub flows: Vec<u32>,
    /// Leases that packets go to; no more than there are.
    #[serde(default = "just_one")]
    pub destinations: Vec<u32>,
}

/// One more thing that is varied; each value is compared with the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Sweep {
    /// What.
    pub over: Over,
    /// To what.
    pub values: Vec<u32>,
}

/// What a sweep varies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// Leases in the table.
    Leases,
    /// Flows of the traffic.
    Flows,
    /// Leases that the traffic goes to.
    Destinations,
    /// Workers of the node under test, each on a CPU of its own.
    Workers,
}

impl Over {
    /// As in a scenario file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Leases => "leases",
            Self::Flows => "flows",
            Self::Destinations => "destinations",
            Self::Workers => "workers",
        }
    }
}

/// What distinguishes one measurement of a variant from another: what was offered, and where a sweep stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Point {
    /// What the sweep varied, and to what.
    #[serde(default)]
    pub sweep: Option<(Over, u32)>,
    /// See [`Offer`].
    pub work: Work,
    /// See [`Offer`].
    pub rate: Rate,
    /// See [`Offer`].
    pub size: Size,
    /// See [`Offer`].
    pub flows: u32,
    /// See [`Offer`].
    pub destinations: u32,
}

impl Point {
    /// What to offer there.
    #[must_use]
    pub fn offer(&self, duration: Duration) -> Offer {
        Offer {
            work: self.work,
            rate: self.rate,
            duration,
            size: self.size,
            flows: self.flows,
            destinations: self.destinations,
            count_only: false,
        }
    }

    /// The same without the sweep: what other values of it are compared at.
    #[must_use]
    pub fn apart_from_sweep(&self) -> Self {
        let mut point = self.clone();
        match point.sweep.take().map(|(over, _)| over) {
            Some(Over::Flows) => point.flows = 0,
            // With more leases there may be more that packets go to.
            Some(Over::Leases | Over::Destinations) => point.destinations = 0,
            Some(Over::Workers) | None => {}
        }
        point
    }
}

/// Measurements that one set-up serves.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// What the sweep makes of the plan.
    pub sweep: Option<(Over, u32)>,
    /// What is offered, in this order.
    pub points: Vec<Point>,
}

impl Scenario {
    /// Reads a file, or takes the built-in scenario of that name.
    ///
    /// # Errors
    /// There is no such scenario, or something in it is wrong.
    pub fn load(name_or_file: &str) -> Result<Self> {
        let path = Path::new(name_or_file);
        if path.extension().is_some_and(|ending| ending == "json") {
            let text = fs::read_to_string(path).with_context(|| name_or_file.to_owned())?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            return Self::parse(&stem, &text).with_context(|| name_or_file.to_owned());
        }
        let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_file) else {
            bail!(
                "there is no scenario {name_or_file:?}: take one of {}, or name a file that ends in .json",
                BUILT_IN.map(|(name, _)| name).join(", ")
            );
        };
        Self::parse(name, text).with_context(|| format!("perf/scenarios/{name}.json"))
    }

    /// All that come with the program.
    ///
    /// # Errors
    /// One of them is wrong, which a test excludes.
    pub fn built_in() -> Result<Vec<Self>> {
        BUILT_IN.iter().map(|(name, _)| Self::load(name)).collect()
    }

    /// From the text of a file.
    ///
    /// # Errors
    /// It is not what a scenario has to be; the error names the key and the way out.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut scenario: Self =
            serde_json::from_str(text).map_err(|error| explain(&error, text))?;
        ensure!(
            scenario.name.is_empty() || scenario.name == name,
            "\"name\" is {:?}: leave it out, the file's own name is taken",
            scenario.name
        );
        name.clone_into(&mut scenario.name);
        scenario.check()?;
        Ok(scenario)
    }

    /// Says what cannot be run.
    ///
    /// # Errors
    /// A key has a value that makes no sense.
    pub fn check(&self) -> Result<()> {
        let known = || {
            let names: Vec<&str> = self.variants.keys().map(String::as_str).collect();
            names.join(", ")
        };
        ensure!(
            self.variants.contains_key(&self.baseline),
            "\"baseline\" is {:?}, which is no variant: take one of {}",
            self.baseline,
            known()
        );
        for name in self.also.iter().flatten() {
            ensure!(
                self.variants.contains_key(name),
                "\"also\" names {name:?}, which is no variant: take one of {}",
                known()
            );
        }
        ensure!(
            (1..=ROUNDS_MAX).contains(&self.rounds),
            "\"rounds\" is {}: take 1 to {ROUNDS_MAX}",
            self.rounds
        );
        for (key, seconds, least) in [
            ("seconds", self.seconds, 0.01),
            ("warmUpSeconds", self.warm_up_seconds, 0.0),
        ] {
            ensure!(
                (least..=3600.0).contains(&seconds),
                "\"{key}\" is {seconds}: take {least} to 3600"
            );
        }
        let offers = &self.offers;
        let swept = self.sweep.as_ref().map(|sweep| &sweep.values);
        for (key, none) in [
            ("offers.rates", offers.rates.is_empty()),
            ("offers.sizes", offers.sizes.is_empty()),
            ("offers.flows", offers.flows.is_empty()),
            ("offers.destinations", offers.destinations.is_empty()),
            ("sweep.values", swept.is_some_and(Vec::is_empty)),
        ] {
            ensure!(!none, "\"{key}\" is empty: write at least one value");
        }
        for (key, values) in [
            ("offers.flows", Some(&offers.flows)),
            ("offers.destinations", Some(&offers.destinations)),
            ("sweep.values", swept),
        ] {
            let zero = values.is_some_and(|values| values.contains(&0));
            ensure!(!zero, "\"{key}\" has a 0: begin at 1");
        }
        for rate in &offers.rates {
            ensure!(
                !matches!(rate, Rate::Pps(0) | Rate::Window(0)),
                "\"offers.rates\" has a 0: begin at 1"
            );
        }
        for size in &offers.sizes {
            if let Size::Bytes(bytes) = *size {
                let mtu = self.plan.mtu;
                ensure!(
                    (64..=mtu).contains(&bytes),
                    "\"offers.sizes\" has {bytes}: take 64 to the underlay's MTU, {mtu}, less the tunnel's headers"
                );
            }
        }
        for stage in self.stages() {
            for name in self.variants.keys() {
                self.plan_of(name, &stage)
                    .with_context(|| format!("\"variants.{name}.plan\""))?;
            }
        }
        Ok(())
    }

    /// Says what of it cannot be measured across a wire to another machine.
    ///
    /// # Errors
    /// There is something; the error names what can be run instead.
    pub fn check_crossing(&self) -> Result<()> {
        for stage in self.stages() {
            for name in self.variants.keys() {
                if self.plan_of(name, &stage)?.topology == Topology::Gateway
                    && self.offers.work == Work::Packets
                {
                    continue;
                }
                let all = Self::built_in()?;
                let others = all.iter().filter(|other| {
                    other.plan.topology == Topology::Gateway && other.offers.work == Work::Packets
                });
                let others: Vec<&str> = others.map(|other| other.name.as_str()).collect();
                bail!(
                    "{} needs a pod at both ends, and across a wire go packets of the engines through a gateway: \
                     take one of {}, or a file of your own with \"topology\": \"gateway\" and \"work\": \"packets\"",
                    self.name,
                    others.join(", ")
                );
            }
        }
        let is_testpmd = |path| matches!(path, Way::TestpmdAfxdp | Way::TestpmdNull);
        let (testpmd, others): (Vec<_>, Vec<_>) =
            (self.variants.iter()).partition(|(_, variant)| is_testpmd(variant.path));
        if let Some((name, _)) = testpmd.first() {
            let others = others.iter().map(|(name, _)| format!("--only {name}"));
            bail!(
                "the variant {name} of {} is testpmd's, which does not go across a wire: leave it out ({})",
                self.name,
                others.collect::<Vec<_>>().join(" ")
            );
        }
        Ok(())
    }

    /// The measurements, by set-up.
    #[must_use]
    pub fn stages(&self) -> Vec<Stage> {
        let values = |over: Over| match &self.sweep {
            Some(sweep) if sweep.over == over => Some(sweep.values.clone()),
            Some(_) | None => None,
        };
        let by_set_up = [Over::Leases, Over::Workers]
            .into_iter()
            .find_map(|over| Some((over, values(over)?)));
        let Some((over, values)) = by_set_up else {
            return vec![Stage {
                sweep: None,
                points: self.points(None),
            }];
        };
        let stage = |value: &u32| Stage {
            sweep: Some((over, *value)),
            points: self.points(Some((over, *value))),
        };
        values.iter().map(stage).collect()
    }

    fn points(&self, set_up: Option<(Over, u32)>) -> Vec<Point> {
        let mut sweeps = vec![set_up];
        if let Some(sweep) = &self.sweep
            && matches!(sweep.over, Over::Flows | Over::Destinations)
        {
            let values = sweep.values.iter();
            sweeps = values.map(|value| Some((sweep.over, *value))).collect();
        }
        let leases = match set_up {
            Some((Over::Leases, leases)) => leases,
            Some(_) | None => self.plan.leases,
        };
        let offers = &self.offers;
        let mut points = Vec::new();
        for sweep in sweeps {
            for size in &offers.sizes {
                for flows in &offers.flows {
                    for destinations in &offers.destinations {
                        for rate in &offers.rates {
                            let swept = |over| sweep.filter(|(swept, _)| *swept == over);
                            let value = |over, or| swept(over).map_or(or, |(_, value)| value);
                            let point = Point {
                                sweep,
                                work: offers.work,
                                rate: *rate,
                                size: *size,
                                flows: value(Over::Flows, *flows),
                                destinations: value(Over::Destinations, *destinations).min(leases),
                            };
                            if !points.contains(&point) {
                                points.push(point);
                            }
                        }
                    }
                }
            }
        }
        points
    }

    /// The set-up of a variant at a stage.
    ///
    /// # Errors
    /// There is no such variant, or what it changes is no key of a plan.
    pub fn plan_of(&self, variant: &str, stage: &Stage) -> Result<BedPlan> {
        let changes = &self.named(variant)?.plan;
        let mut value = serde_json::to_value(&self.plan)?;
        if let Some(plan) = value.as_object_mut() {
            plan.extend(changes.clone());
        }
        let mut plan: BedPlan = serde_json::from_value(value)
            .map_err(|error| explain(&error, &Value::from(changes.clone()).to_string()))?;
        if let Some((Over::Leases, leases)) = stage.sweep {
            plan.leases = leases;
        }
        Ok(plan)
    }

    /// What a bed is told of a variant at a stage.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn variant(&self, name: &str, stage: &Stage) -> Result<Variant> {
        let planned = self.named(name)?;
        let mut placement = planned.placement.clone();
        if let (Some((Over::Workers, workers)), Way::Ripstop) = (stage.sweep, planned.path) {
            // CPU 0 is the source's, and from four CPUs on CPU 2 the sink's.
            let cpus = (1..).filter(|cpu| *cpu != 2);
            let cpus = cpus.take(usize::try_from(workers)?);
            let cpus: Vec<String> = cpus.map(|cpu: u32| cpu.to_string()).collect();
            let words = placement.into_iter();
            let words = words.chain([format!("workers={}", cpus.join("+"))]);
            placement = Some(words.collect::<Vec<_>>().join(","));
        }
        Ok(Variant {
            path: planned.path,
            dataplane: planned.dataplane.clone(),
            placement,
        })
    }

    /// Whether there is a variant of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn has(&self, variant: &str) -> Result<()> {
        self.named(variant).map(|_there| ())
    }

    fn named(&self, variant: &str) -> Result<&PlannedVariant> {
        self.variants.get(variant).with_context(|| {
            let names: Vec<&str> = self.variants.keys().map(String::as_str).collect();
            format!(
                "scenario {} has no variant {variant:?}: take one of {}",
                self.name,
                names.join(", ")
            )
        })
    }

    /// Leaves only these variants. Without the baseline among them, the first of them takes its place.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn keep_only(&mut self, variants: &[String]) -> Result<()> {
        let Some(first) = variants.first() else {
            return Ok(());
        };
        for name in variants {
            self.named(name)?;
        }
        self.variants.retain(|name, _| variants.contains(name));
        self.also
            .retain(|pair| pair.iter().all(|name| variants.contains(name)));
        if !variants.contains(&self.baseline) {
            first.clone_into(&mut self.baseline);
        }
        Ok(())
    }

    /// The baseline first, then the others.
    #[must_use]
    pub fn variant_names(&self) -> Vec<&str> {
        let names = self.variants.keys().map(String::as_str);
        let others = names.filter(|name| *name != self.baseline);
        core::iter::once(self.baseline.as_str())
            .chain(others)
            .collect()
    }
}

fn just_one() -> Vec<u32> {
    vec![1]
}

/// Says which key is wrong and how to mend it, from what serde says.
fn explain(error: &serde_json::Error, text: &str) -> anyhow::Error {
    let message = error.to_string();
    let message = message
        .split(" at line ")
        .next()
        .unwrap_or_default()
        .to_owned();
    let place = match error.line() {
        0 => String::new(),
        line => format!("line {line}: "),
    };
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (key, expected) = rest.split_once(", ").unwrap_or((rest, "expected none"));
        return anyhow!("{place}unknown key {key}: take it out or mend it, {expected}");
    }
    if let Some(key) = message.strip_prefix("missing field ") {
        return anyhow!("{place}key {key} is missing: add it (perf/README.md says what it means)");
    }
    let key = key_before(text, error.line(), error.column());
    let key = key.map_or_else(String::new, |key| format!("key \"{key}\": "));
    anyhow!("{place}{key}{message}: perf/README.md says what it may be")
}

/// The key that stands last before a place of the text.
fn key_before(text: &str, line: usize, column: usize) -> Option<String> {
    let lines: Vec<&str> = text.lines().take(line).collect();
    let (last, before) = lines.split_last()?;
    let end = last
        .char_indices()
        .nth(column)
        .map_or(last.len(), |(i, _)| i);
    let read = format!("{}\n{}", before.join("\n"), last.get(..end)?);
    let colon = read.match_indices("\":").last()?.0;
    let key = read.get(..colon)?;
    Some(key.get(key.rfind('"')? + 1..)?.to_owned())
}

/// Sizes as a person writes them: `64`, `"imix"`.
mod sizes {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::Value;

    use crate::measure::Size;

    pub(super) fn serialize<S: Serializer>(sizes: &[Size], to: S) -> Result<S::Ok, S::Error> {
        let value = |size: &Size| match size {
            Size::Bytes(bytes) => Value::from(*bytes),
            Size::Imix => Value::from("imix"),
        };
        sizes.iter().map(value).collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Size>, D::Error> {
        let size = |value: &Value| match value {
            Value::String(text) if text == "imix" => Ok(Size::Imix),
            Value::Number(number) => number
                .as_u64()
                .and_then(|bytes| u16::try_from(bytes).ok())
                .map(Size::Bytes)
                .ok_or_else(|| D::Error::custom(format!("{number} is no size in bytes"))),
            other @ (Value::Null
            | Value::Bool(_)
            | Value::String(_)
            | Value::Array(_)
            | Value::Object(_)) => Err(D::Error::custom(format!(
                "{other} is no size: write bytes, or \"imix\""
            ))),
        };
        Vec::<Value>::deserialize(from)?.iter().map(size).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{
        "about": "a test",
        "plan": {"topology": "gateway", "direction": "encap", "backend": "vxlan", "leases": 100, "mtu": 1500},
        "baseline": "kernel",
        "variants": {
            "kernel": {"path": "kernel"},
            "tun": {"path": "ripstop", "dataplane": {"polling": "busy"}, "plan": {"underlayOffloads": true}}
        },
        "offers": {"work": "packets", "rates": ["max", {"pps": 1000}], "sizes": [64, "imix"], "destinations": [1000]},
        "seconds": 1,
        "warmUpSeconds": 0.1,
        "rounds": 6
    }"#;

    fn with(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replacen(from, to, 1)
    }

    #[test]
    fn every_scenario_file_is_built_in_and_right() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut files: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let names = BUILT_IN.map(|(name, _)| format!("{name}.json"));
        assert_eq!(files, names);
        for scenario in Scenario::built_in().unwrap() {
            assert!(scenario.about.len() > 20, "{}", scenario.name);
            let text = serde_json::to_string(&scenario).unwrap();
            let again = Scenario::parse(&scenario.name, &text).unwrap();
            assert_eq!(again, scenario);
        }
    }

    #[test]
    fn stages_are_all_combinations() {
        let scenario = Scenario::parse("x", GOOD).unwrap();
        let stages = scenario.stages();
        assert_eq!((stages.len(), stages[0].points.len()), (1, 4));
        // No more destinations than leases.
        assert!(
            stages[0]
                .points
                .iter()
                .all(|point| point.destinations == 100)
        );
        assert_eq!(scenario.variant_names(), ["kernel", "tun"]);
        let offloads = |name| {
            scenario
                .plan_of(name, &stages[0])
                .unwrap()
                .underlay_offloads
        };
        assert_eq!([offloads("kernel"), offloads("tun")], [false, true]);

        let swept = |over: &str| {
            let sweep =
                format!(r#""sweep": {{"over": "{over}", "values": [1, 10]}}, "seconds": 1,"#);
            Scenario::parse("x", &with(r#""seconds": 1,"#, &sweep)).unwrap()
        };
        let leases = swept("leases");
        let stages = leases.stages();
        assert_eq!((stages.len(), stages[1].points.len()), (2, 4));
        assert_eq!(leases.plan_of("tun", &stages[1]).unwrap().leases, 10);
        assert_eq!(stages[1].points[0].destinations, 10);
        let flows = swept("flows").stages();
        assert_eq!((flows.len(), flows[0].points.len()), (1, 8));
        assert_eq!(flows[0].points[7].flows, 10);
        let workers = swept("workers");
        let stages = workers.stages();
        let placement = |name, stage| workers.variant(name, &stages[stage]).unwrap().placement;
        assert_eq!(placement("tun", 0).unwrap(), "workers=1");
        let ten = "workers=1+3+4+5+6+7+8+9+10+11";
        assert_eq!(placement("tun", 1).unwrap(), ten);
        assert_eq!(placement("kernel", 1), None);
    }

    #[test]
    fn wrong_files_are_refused_with_key_and_way_out() {
        for (from, to, parts) in [
            (
                r#""rounds""#,
                r#""round""#,
                &["line 12", "unknown key `round`", "`rounds`"][..],
            ),
            (
                r#""polling""#,
                r#""polling": "busy"}, "x": {"y""#,
                &["unknown key `x`", "`dataplane`"],
            ),
            (
                r#""about": "a test","#,
                "",
                &["key `about` is missing", "README"],
            ),
            (
                r#""seconds": 1"#,
                r#""seconds": "1""#,
                &["line 10", "key \"seconds\"", "invalid type"],
            ),
            (
                r#""baseline": "kernel""#,
                r#""baseline": "linux""#,
                &["\"baseline\"", "\"linux\"", "kernel, tun"],
            ),
            (
                r#""rounds": 6"#,
                r#""rounds": 0"#,
                &["\"rounds\" is 0", "1 to 1000"],
            ),
            (
                r#""rounds": 6"#,
                r#""rounds": 6, "also": [["tun", "veth"]]"#,
                &["\"also\"", "\"veth\"", "kernel, tun"],
            ),
            (r#"0.1"#, "-1", &["\"warmUpSeconds\" is -1", "3600"]),
            (r#"64, "imix""#, "", &["\"offers.sizes\" is empty"]),
            (r#"64, "imix""#, "63", &["\"offers.sizes\" has 63", "64 to"]),
            (
                r#"64, "imix""#,
                r#""max""#,
                &["key \"sizes\"", "\"max\" is no size", "imix"],
            ),
            (r#"1000]"#, "0]", &["\"offers.destinations\" has a 0"]),
            (
                r#"{"pps": 1000}"#,
                r#"{"pps": 0}"#,
                &["\"offers.rates\" has a 0"],
            ),
            (
                r#""underlayOffloads""#,
                r#""underlay""#,
                &["\"variants.tun.plan\"", "unknown key `underlay`"],
            ),
            (
                r#""about""#,
                r#""name": "y", "about""#,
                &["\"name\" is \"y\"", "leave it out"],
            ),
            (
                "packets",
                "packet",
                &["key \"work\"", "unknown variant `packet`", "`packets`"],
            ),
        ] {
            let error = format!("{:#}", Scenario::parse("x", &with(from, to)).unwrap_err());
            for part in parts {
                assert!(error.contains(part), "{to}: {part:?} is not in: {error}");
            }
        }
    }

    #[test]
    fn an_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("bad.json");
        fs::write(&file, "{}").unwrap();
        let file = file.to_str().unwrap();
        let error = format!("{:#}", Scenario::load(file).unwrap_err());
        assert!(error.contains(file), "{error}");
        let error = format!("{:#}", Scenario::load("no-such").unwrap_err());
        assert!(
            error.contains("no-such") && error.contains("smoke"),
            "{error}"
        );
    }

    #[test]
    fn only_some_variants() {
        let mut scenario = Scenario::parse("x", GOOD).unwrap();
        scenario.keep_only(&["tun".to_owned()]).unwrap();
        assert_eq!(
            (scenario.baseline.as_str(), scenario.variants.len()),
            ("tun", 1)
        );
        let error = scenario.keep_only(&["kernel".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("\"kernel\""), "{error}");
    }
}
