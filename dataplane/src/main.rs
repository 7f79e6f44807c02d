//! The data-plane process: see `host` for what it does.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use ripstop_dataplane::{auto, host};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

/// Poll-mode tunnel gateway: moves pod packets between nodes on AF_XDP sockets.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory with one JSON file per NIC queue, or a template with "queues": "auto".
    #[arg(long, default_value = "/etc/ripstop/dataplane")]
    config_dir: PathBuf,
    /// Directory of the shared-memory regions, the same as the control plane's.
    #[arg(long, default_value = "/run/ripstop")]
    run_dir: PathBuf,
    /// Interface, or its address, whose NICs a template with "nic": "auto" means; the first that exists is used
    /// [default: the default route's]
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP")]
    iface: Vec<String>,
    /// Checks the configuration against this machine and exits.
    #[arg(long)]
    check: bool,
    /// Writes what templates come to on this machine, one file per NIC queue, into a directory and exits.
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    generate_configs: Option<PathBuf>,
    /// What to log: error, warn, info, debug, or a filter such as "info,ripstop_dataplane::xdp=debug".
    #[arg(long, default_value = "info")]
    log_level: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", explained(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, but for those whose words it has said already.
fn explained(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&arguments.log_level)
        .with_context(|| format!("--log-level {:?} is not a log filter", arguments.log_level));
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false);
    subscriber
        .with_env_filter(
            filter
                .as_ref()
                .map_or_else(|_| EnvFilter::new("info"), Clone::clone),
        )
        .init();
    filter?;
    // A variable may be set and empty.
    let given = arguments.iface.iter().filter(|iface| !iface.is_empty());
    let ifaces: Vec<String> = given.cloned().collect();
    if let Some(directory) = &arguments.generate_configs {
        let planned = host::plan(&arguments.config_dir, &ifaces)?;
        for path in auto::write(directory, &planned.chosen).context("--generate-configs")? {
            tracing::info!("{} written", path.display());
        }
        return Ok(());
    }
    if arguments.check {
        let (workers, _facts) = host::check(&arguments.config_dir, &ifaces)?;
        tracing::info!(
            workers = workers.len(),
            "the configuration is good for this machine"
        );
        return Ok(());
    }
    let (sender, receiver) = crossbeam::channel::bounded(1);
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("catch SIGTERM and SIGINT")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                // A second signal while the first is being obeyed changes nothing.
                let _ = sender.try_send(signal);
            }
        })
        .context("start the signal thread")?;
    let options = host::Options {
        config_dir: arguments.config_dir.clone(),
        ifaces,
        run_dir: arguments.run_dir.clone(),
    };
    host::run(&options, &receiver)?;
    Ok(())
}
