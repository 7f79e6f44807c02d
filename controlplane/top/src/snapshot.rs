//! What the stats region says at one moment.

use std::io;
use std::path::Path;

use ripstop_fib::Region;
use ripstop_fib::map::{self, DATAPLANE_LOCK, MapError, STATS_FILE, lock_owner};
use ripstop_fib::publish::ImageRef;
use ripstop_fib::stats::{NicStats, Stats, WorkerStats};
use ripstop_fib::sync::Ordering;

/// The process that workers belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DataPlane {
    /// There is no trace of one.
    #[default]
    Never,
    /// It has ended.
    Ended,
    /// It runs.
    Running {
        /// Its process, 0 if it does not say.
        pid: u32,
        /// When it started, CLOCK_MONOTONIC in nanoseconds.
        started_ns: u64,
    },
}

/// What a data plane has published at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The moment, CLOCK_MONOTONIC in nanoseconds.
    pub at_ns: u64,
    /// Whose workers these are.
    pub data_plane: DataPlane,
    /// Generation of the forwarding table that is published; none where there is no table.
    pub generation: Option<u64>,
    /// The workers; none unless the data plane runs.
    pub workers: Vec<WorkerStats>,
    /// The NICs; none unless the data plane runs.
    pub nics: Vec<NicStats>,
}

impl Snapshot {
    /// Reads the regions in `run_dir`. That there are none is no error.
    ///
    /// # Errors
    /// When the stats region, or the lock of the data plane, is there but cannot be read.
    pub fn read(run_dir: &Path) -> Result<Self, MapError> {
        let owner = lock_owner(run_dir, DATAPLANE_LOCK)?;
        let mapping = match map::open_stats(run_dir) {
            Ok(mapping) => Some(mapping),
            Err(MapError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut snapshot = Self {
            generation: published_generation(run_dir),
            ..Self::default()
        };
        if let Some(mapping) = &mapping {
            let stats = Stats::attach(mapping.words()).map_err(|source| MapError::Region {
                path: run_dir.join(STATS_FILE),
                source,
            })?;
            snapshot.data_plane = match owner {
                // Until a data plane that starts has made its region, the one before has left its own.
                Some(pid) if pid == 0 || u64::from(pid) == stats.pid() => {
                    snapshot.workers = stats.workers();
                    snapshot.nics = stats.nics();
                    let started_ns = stats.started_ns();
                    DataPlane::Running { pid, started_ns }
                }
                Some(_) | None => DataPlane::Ended,
            };
        }
        // Last, so that no heartbeat lies ahead of it.
        snapshot.at_ns = map::monotonic_ns();
        Ok(snapshot)
    }
}

fn published_generation(run_dir: &Path) -> Option<u64> {
    let mapping = map::open_fib(run_dir).ok()?;
    let region = Region::attach(mapping.words()).ok()?;
    let current = ImageRef(region.current().load(Ordering::Relaxed));
    Some(current.generation()).filter(|&generation| generation > 0)
}
