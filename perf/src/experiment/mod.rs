//! Experiments: which paths are measured against each other, how often, and what that allows to say.
//!
//! ```text
//!   scenario ──► runner ──► trials ──► figures ──► summary (medians, ratios, warnings) ──► result file ──► report
//!                  │
//!                  ├ ndr     the highest rate without loss
//!                  ├ soak    one variant for long
//!                  └ check   two sets of programs: is the second slower?
//! ```
//!
//! Nothing here knows how a bed is made: whoever runs an experiment says how beds are opened, and the tests give models whose
//! truth they know. `perf/README.md` says how the figures are to be read.

pub mod check;
pub mod compare;
pub mod figures;
pub mod host;
mod live;
#[cfg(test)]
pub(crate) mod model;
pub mod ndr;
pub mod neighbours;
pub mod progress;
pub mod result;
pub mod runner;
pub mod scenario;
pub mod soak;
pub mod stats;
pub mod summary;

pub use figures::Figure;
pub use ndr::{NdrOptions, NdrResult};
pub use progress::Progress;
pub use result::{Outcome, ResultFile, RunResult};
pub use scenario::{Point, Scenario};
pub use soak::{SoakOptions, SoakResult};
