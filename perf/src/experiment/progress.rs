//! A bar on the terminal for what takes long. It is silent where nobody watches: in a pipe, in CI, in tests.

use core::sync::atomic::AtomicBool;
use core::time::Duration;
use std::sync::Arc;

use anyhow::Result;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::live::Live;
use crate::measure::Watched;

/// The bar, or the whole live view.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    live: Option<Live>,
}

impl Progress {
    /// On standard error, if that is a terminal.
    #[must_use]
    pub fn on_terminal() -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left: {eta})  {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self { bar, live: None }
    }

    /// With what the nodes under test carry, on the whole of the terminal. `stop` ends it, and is set when the user ends it.
    ///
    /// # Errors
    /// Standard error is no terminal.
    pub fn live(stop: &Arc<AtomicBool>) -> Result<Self> {
        let bar = ProgressBar::hidden();
        let live = Live::start(bar.clone(), Arc::clone(stop))?;
        Ok(Self {
            bar,
            live: Some(live),
        })
    }

    /// Nowhere.
    #[must_use]
    pub fn hidden() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            live: None,
        }
    }

    /// So many steps lie ahead.
    pub fn begin(&self, steps: u64) {
        self.bar.reset();
        self.bar.set_length(steps);
        if !self.bar.is_hidden() {
            self.bar.enable_steady_tick(Duration::from_millis(500));
        }
    }

    /// These nodes are under test from here on.
    pub fn watch(&self, watched: Vec<Watched>) {
        if let Some(live) = &self.live {
            live.watch(watched);
        }
    }

    /// What is being done.
    pub fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// So many steps are done, or not to be done.
    pub fn skip(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// All is done.
    pub fn end(&self) {
        self.watch(Vec::new());
        self.bar.finish_and_clear();
    }
}
