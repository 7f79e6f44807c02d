//! Puts a configuration file where a container runtime looks for it, so that the runtime sees all of it or none.

use core::time::Duration;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use crate::file;
use crate::subnet_env::{ReadError, SubnetEnv};

/// How often a file that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why a file was not installed. What was at the destination is still there.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The file to install cannot be read.
    #[error("error installing {source_path:?}: {error}")]
    Source {
        /// The file.
        source_path: PathBuf,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
    /// The destination cannot be written.
    #[error(
        "error installing {source_path:?}: {error}. Is {} a directory of the host that is mounted here and writable?",
        file::parent(.dest).display()
    )]
    Dest {
        /// The file to install.
        source_path: PathBuf,
        /// Where it should go.
        dest: PathBuf,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
    /// What was waited for did not come.
    #[error("gave up after {}: {error}. Is flanneld running on this node, and what does its log say?", seconds(*.waited))]
    Timeout {
        /// How long.
        waited: Duration,
        /// What was still wrong at the end.
        #[source]
        error: ReadError,
    },
}

/// Copies a file with its mode to `dest`, by way of `.<name>.tmp*` in the same directory and a rename. The directory has
/// to be there: one that is made here would be one that no runtime reads.
///
/// # Errors
/// The file cannot be read or the destination not written.
pub fn install(source: &Path, dest: &Path) -> Result<(), InstallError> {
    let read = || -> io::Result<_> {
        let mut file = File::open(source)?;
        let mut content = Vec::new();
        file.read_to_end(&mut content)?;
        Ok((content, file.metadata()?.permissions().mode() & 0o7777))
    };
    let (content, mode) = read().map_err(|error| InstallError::Source {
        source_path: source.to_owned(),
        error,
    })?;
    file::write_atomic(dest, &content, mode).map_err(|error| InstallError::Dest {
        source_path: source.to_owned(),
        dest: dest.to_owned(),
        error,
    })
}

/// Waits until a `subnet.env` is there and whole, for ever if no limit is given. `waiting` is told what is missing, once
/// for each thing that is.
///
/// # Errors
/// The time is up.
pub fn wait_for(
    path: &Path,
    limit: Option<Duration>,
    mut waiting: impl FnMut(&ReadError),
) -> Result<(), InstallError> {
    let start = Instant::now();
    let mut told = String::new();
    loop {
        let Err(error) = SubnetEnv::read(path) else {
            return Ok(());
        };
        let waited = start.elapsed();
        if limit.is_some_and(|limit| waited >= limit) {
            return Err(InstallError::Timeout { waited, error });
        }
        let text = error.to_string();
        if told != text {
            waiting(&error);
            told = text;
        }
        let left = limit.map_or(LOOK_EVERY, |limit| limit - waited);
        thread::sleep(left.min(LOOK_EVERY));
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
