//! The runtime's network configuration (`10-flannel.conflist`), installed when the node can forward.
//!
//! From the moment it is there, the kubelet calls the node ready and makes pods. So an init container is the wrong place
//! for it: that ends before this process begins. It is kept as its source says from then on, and never removed: like
//! routes and devices it outlives the process.

use core::str::FromStr;
use core::time::Duration;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ripstop_cni::install_conf::{InstallError, install};

use crate::problems::Problems;

/// How often both files are compared.
const EVERY: Duration = Duration::from_secs(5);
/// How soon a failure is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Flags of the node's files.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConflistFlags {
    /// Keep DEST as SRC from when the node can forward, such as
    /// /etc/kube-flannel/cni-conf.json:/etc/cni/net.d/10-flannel.conflist
    #[arg(long, value_name = "SRC:DEST")]
    install_cni_conf: Option<Conflist>,
}

/// Which file goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflist {
    source: PathBuf,
    dest: PathBuf,
}

impl FromStr for Conflist {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let paths = text.split_once(':');
        match paths.filter(|(source, dest)| !source.is_empty() && !dest.is_empty()) {
            Some((source, dest)) => Ok(Self {
                source: source.into(),
                dest: dest.into(),
            }),
            None => Err("it takes two files, SRC:DEST"),
        }
    }
}

/// Keeps the file.
#[derive(Debug)]
pub struct Keeper {
    conflist: Option<Conflist>,
    not_before: Option<Instant>,
}

impl Keeper {
    const PROBLEM: &str = "conflist";

    /// Keeps what the flags say; without one, nothing.
    pub fn new(flags: ConflistFlags) -> Self {
        Self {
            conflist: flags.install_cni_conf,
            not_before: None,
        }
    }

    /// To be called again and again, while the node can forward.
    pub fn look(&mut self, now: Instant, problems: &mut Problems) {
        let Some(Conflist { source, dest }) = &self.conflist else {
            return;
        };
        if self.not_before.is_some_and(|time| now < time) {
            return;
        }
        let outcome = keep(source, dest);
        self.not_before = Some(now + if outcome.is_ok() { EVERY } else { AGAIN });
        match outcome {
            Ok(installed) => {
                if installed {
                    tracing::info!(path = %dest.display(), "CNI configuration installed");
                }
                problems.clear(Self::PROBLEM);
            }
            Err(error) => problems.raise(
                Self::PROBLEM,
                format!(
                    "{error}: until {} is there, no pods are made on this node",
                    dest.display()
                ),
            ),
        }
    }
}

/// Makes `dest` what `source` is. True if it was not.
fn keep(source: &Path, dest: &Path) -> Result<bool, InstallError> {
    // What is wrong with the source, `install` says.
    let wanted = std::fs::read(source).ok();
    if wanted.is_some() && std::fs::read(dest).ok() == wanted {
        return Ok(false);
    }
    install(source, dest).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_are_named() {
        let conflist = "/etc/a.json:/etc/cni/net.d/10-flannel.conflist".parse::<Conflist>();
        let conflist = conflist.unwrap();
        assert_eq!(conflist.source, Path::new("/etc/a.json"));
        assert_eq!(
            conflist.dest,
            Path::new("/etc/cni/net.d/10-flannel.conflist")
        );
        for text in ["", "/a", ":/a", "/a:", ":"] {
            assert!(text.parse::<Conflist>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_file_is_kept_as_its_source_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut keeper = Keeper {
            conflist: Some(Conflist {
                source: path("source"),
                dest: path("net.d/dest"),
            }),
            not_before: None,
        };
        let mut problems = Problems::default();
        let mut now = Instant::now();
        let mut look = |problems: &mut Problems| {
            now += EVERY;
            keeper.look(now, problems);
            problems.list().join("\n")
        };
        assert!(look(&mut problems).contains("No such file"));
        std::fs::write(path("source"), "one").unwrap();
        assert!(look(&mut problems).contains("mounted here and writable?"));
        std::fs::create_dir(path("net.d")).unwrap();
        let read = || std::fs::read_to_string(path("net.d/dest")).unwrap_or_default();
        assert_eq!((&*look(&mut problems), &*read()), ("", "one"));
        // What others do to it is undone, and what the source says next is followed.
        std::fs::remove_file(path("net.d/dest")).unwrap();
        assert_eq!((&*look(&mut problems), &*read()), ("", "one"));
        std::fs::write(path("source"), "two").unwrap();
        assert_eq!((&*look(&mut problems), &*read()), ("", "two"));
        // A source that goes takes nothing with it.
        std::fs::remove_file(path("source")).unwrap();
        assert!(!look(&mut problems).is_empty());
        assert_eq!(read(), "two");
    }
}
