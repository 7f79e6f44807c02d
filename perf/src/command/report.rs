//! `report`: result files as text, Markdown or one HTML page.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use ripstop_perf::experiment::ResultFile;
use ripstop_perf::report::{html, markdown, page, text};

#[derive(Args)]
pub(crate) struct Report {
    /// Result files, in the order in which they are to be told.
    #[arg(required = true)]
    results: Vec<PathBuf>,
    /// Write one HTML page here.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write Markdown here.
    #[arg(long)]
    markdown: Option<PathBuf>,
}

impl Report {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let results: Result<Vec<ResultFile>> = self
            .results
            .iter()
            .map(|path| ResultFile::load(path))
            .collect();
        let sections = page(&results?);
        let write = |path: &PathBuf, what: String| {
            fs::write(path, what).with_context(|| path.display().to_string())
        };
        if let Some(path) = &self.html {
            write(path, html(&sections))?;
        }
        if let Some(path) = &self.markdown {
            write(path, markdown(&sections))?;
        }
        if self.html.is_none() && self.markdown.is_none() {
            print!("{}", text(&sections));
        }
        Ok(ExitCode::SUCCESS)
    }
}
