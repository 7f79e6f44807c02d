//! Result files: everything that was measured, raw, with what is needed to understand and repeat it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::host::Host;
use super::ndr::NdrResult;
use super::neighbours::Foreign;
use super::scenario::{Point, Scenario};
use super::soak::SoakResult;
use super::stats::Ratio;
use super::summary::Summary;
use crate::measure::{Trial, WireFacts};

/// The layout of result files. A change that an older program would misread makes it the next number.
pub const SCHEMA: u64 = 1;

/// A result file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResultFile {
    /// [`SCHEMA`].
    pub schema: u64,
    /// When it began, in UTC (RFC 3339).
    pub date: String,
    /// The command line that repeats it.
    pub command_line: Vec<String>,
    /// The machine.
    pub host: Host,
    /// What was run.
    pub scenario: Scenario,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Variants side by side.
    Run(RunResult),
    /// Searches for the highest rate.
    Ndr(Vec<NdrResult>),
    /// One variant for long.
    Soak(SoakResult),
    /// Two sets of programs side by side.
    Check(Vec<Checked>),
}

/// Trials of variants side by side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunResult {
    /// Every trial but those to warm up, in the order in which they were made.
    pub trials: Vec<TrialRecord>,
    /// What could not be measured, and why.
    pub failures: Vec<Failure>,
    /// Whether it was ended before its time.
    pub interrupted: bool,
    /// What the trials come to; follows from them.
    pub summary: Summary,
}

/// One trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrialRecord {
    /// From 0.
    pub round: u32,
    /// Which variant.
    pub variant: String,
    /// What was offered.
    pub point: Point,
    /// What the bed says of itself: devices, drivers, modes.
    pub bed: String,
    /// Who else used the CPUs.
    pub foreign: Foreign,
    /// What was measured.
    pub measured: Trial,
}

/// What could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Failure {
    /// From 0.
    pub round: u32,
    /// Which variant.
    pub variant: String,
    /// What was offered; nothing if the bed did not come up.
    pub point: Option<Point>,
    /// Why.
    pub why: String,
}

/// Two sets of programs at one point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Checked {
    /// Which variant.
    pub variant: String,
    /// Where.
    pub point: Point,
    /// How fast the second is, the first being 1. Nothing if one of them could not be measured.
    pub speed: Option<Ratio>,
    /// What that says.
    pub judgement: super::check::Judgement,
}

impl ResultFile {
    /// For what begins here and now.
    #[must_use]
    pub fn new(scenario: Scenario, outcome: Outcome, began: jiff::Timestamp) -> Self {
        Self {
            schema: SCHEMA,
            date: began.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            command_line: std::env::args().collect(),
            host: Host::read(Path::new("/")),
            scenario,
            outcome,
        }
    }

    /// The same over a wire to another machine, if there is one.
    #[must_use]
    pub fn over(mut self, wire: Option<WireFacts>) -> Self {
        self.host.wire = wire;
        self
    }

    /// Writes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let text = serde_json::to_string_pretty(self).context("write the result as JSON")?;
        fs::write(path, text + "\n").with_context(|| path.display().to_string())
    }

    /// Reads one.
    ///
    /// # Errors
    /// It cannot be read, is no result file, or one of another version.
    pub fn load(path: &Path) -> Result<Self> {
        let parse = || {
            let text = fs::read_to_string(path)?;
            Self::parse(&text)
        };
        parse().with_context(|| path.display().to_string())
    }

    /// From the text of a file.
    ///
    /// # Errors
    /// As for [`ResultFile::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("not a result file")?;
        match value.get("schema").and_then(Value::as_u64) {
            Some(SCHEMA) => {}
            Some(other) => bail!(
                "a result file of version {other}, this program reads version {SCHEMA}: read it with the ripstop-perf of its \
                 commit, or measure again"
            ),
            None => bail!("not a result file: it has no \"schema\""),
        }
        serde_json::from_value(value).context("a damaged result file")
    }

    /// The name of its scenario and of what was done with it, for a title.
    #[must_use]
    pub fn title(&self) -> String {
        let name = &self.scenario.name;
        match &self.outcome {
            Outcome::Run(_) => name.clone(),
            Outcome::Ndr(_) => format!("{name}: no-drop rate"),
            Outcome::Soak(_) => format!("{name}: soak"),
            Outcome::Check(_) => format!("{name}: two commits"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as the first programs of schema 1 wrote it.
    const KEPT: &str = include_str!("kept.json");

    #[test]
    fn a_file_that_was_kept_is_read_and_would_be_written_the_same() {
        let result = ResultFile::parse(KEPT).unwrap();
        let kept: Value = serde_json::from_str(KEPT).unwrap();
        assert_eq!(serde_json::to_value(&result).unwrap(), kept);
        let Outcome::Run(run) = result.outcome else {
            unreachable!("it is a run");
        };
        let trial = &run.trials[0].measured;
        let latencies = [0.01, 0.5, 0.9, 1.0].map(|share| trial.latency_at(share));
        assert_eq!(
            latencies,
            [41_407, 116_927, 141_439, 146_431].map(Some),
            "nanoseconds"
        );
        assert!((trial.busy_seconds() - 0.2).abs() < 1e-9);
        assert!((trial.cpu_seconds() - 0.59).abs() < 1e-9);
    }
}
