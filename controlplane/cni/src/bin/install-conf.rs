//! Installs the runtime's network configuration, if wanted only when the node is ready for pods.

use core::time::Duration;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ripstop_cni::install_conf::{install, wait_for};

/// Copies SRC to DEST so that readers see all of it or none.
///
/// With --wait-for, the copy is made only when the network of the node is up. Do not use that in an init container of the
/// pod that writes FILE: the pod's own containers start only when the init containers have ended.
#[derive(Debug, Parser)]
#[command(name = "install-conf", version)]
struct Flags {
    /// File to install, such as /etc/kube-flannel/cni-conf.json
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Where it goes, such as /etc/cni/net.d/10-flannel.conflist; the directory has to be there
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// First wait until this subnet.env is there and whole
    #[arg(long, value_name = "FILE")]
    wait_for: Option<PathBuf>,
    /// How long to wait [default: for ever]
    #[arg(long, value_name = "SECONDS", requires = "wait_for")]
    timeout: Option<u32>,
}

fn main() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) => {
            let _ = error.print();
            // flannel's exits with 1 on wrong usage.
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let timeout = flags
        .timeout
        .map(|seconds| Duration::from_secs(seconds.into()));
    let waited = flags.wait_for.map_or(Ok(()), |file| {
        wait_for(&file, timeout, |error| say(&format!("waiting: {error}")))
    });
    match waited.and_then(|()| install(&flags.source, &flags.dest)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    // There is nobody else to tell.
    let _ = writeln!(io::stderr(), "{line}");
}
