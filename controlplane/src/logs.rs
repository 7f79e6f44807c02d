//! What is logged, and how: our own flags, and klog's that flannel's users write.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The flags about logs.
#[derive(Debug, Clone, clap::Args)]
pub struct LogFlags {
    /// error, warn, info, debug, trace, or a filter as tracing-subscriber takes it [default: info, or what --v says]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<EnvFilter>,
    /// How logs are written: for people, or a JSON object a line
    #[arg(
        long,
        env = "RIPSTOP_LOG_FORMAT",
        value_name = "text|json",
        default_value = "text"
    )]
    pub log_format: Format,
    /// Flannel's verbosity, 0 to 10: up to 3 is info, up to 5 debug, beyond trace
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub v: i32,
    /// Taken for flannel's sake, and not used: see --log-level
    #[arg(long, value_name = "PATTERN=NUMBER,…", default_value = "")]
    pub vmodule: String,
    /// Taken for flannel's sake, and not used
    #[arg(
        long = "log_backtrace_at",
        value_name = "FILE:LINE",
        default_value = ""
    )]
    pub log_backtrace_at: String,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// What flannel's verbosity is here. Of the libraries below us, more than info helps nobody.
fn directives(verbosity: i32) -> &'static str {
    match verbosity {
        ..=3 => "info",
        4..=5 => "info,kube_client=off,ripstop_controlplane=debug",
        6.. => "info,kube_client=off,ripstop_controlplane=trace",
    }
}

/// The Kubernetes client has a line for each request that fails, as an error and without its object: for as long as the
/// API server is away, several a second. We say it once, so that is for those who debug, or ask for it by name.
fn without_client(filter: EnvFilter) -> EnvFilter {
    const CLIENT: &str = "kube_client";
    let debugs = filter.max_level_hint() > Some(LevelFilter::INFO);
    match format!("{CLIENT}=off").parse() {
        Ok(off) if !debugs && !filter.to_string().contains(CLIENT) => filter.add_directive(off),
        Ok(_) | Err(_) => filter,
    }
}

impl LogFlags {
    /// Starts logging to stderr, for the whole process.
    pub fn start(&self) {
        let filter = self.log_level.clone();
        let filter = filter.unwrap_or_else(|| EnvFilter::new(directives(self.v)));
        let filter = without_client(filter);
        let subscriber = tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_target(false)
            .with_env_filter(filter);
        match self.log_format {
            Format::Text => subscriber
                .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .init(),
            // Fields are keys of the object itself, beside the message.
            Format::Json => subscriber.json().flatten_event(true).init(),
        }
        for (flag, value) in [
            ("vmodule", &self.vmodule),
            ("log_backtrace_at", &self.log_backtrace_at),
        ] {
            if !value.is_empty() {
                tracing::debug!(
                    "--{flag}={value} is not used: --log-level takes filters by module"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_own_lines_are_for_those_who_ask() {
        let is_off = |filter: &str| {
            let filter = without_client(EnvFilter::new(filter));
            filter.to_string().contains("kube_client=off")
        };
        for filter in ["info", "warn", "error", "off", "info,hyper=warn"] {
            assert!(is_off(filter), "{filter}");
        }
        for filter in [
            "debug",
            "trace",
            "info,kube_client=error",
            "info,hyper=debug",
        ] {
            assert!(!is_off(filter), "{filter}");
        }
    }

    #[test]
    fn verbosity_is_a_level() {
        for (verbosity, level) in [(-1, "info"), (0, "info"), (2, "info"), (3, "info")] {
            assert_eq!(directives(verbosity), level);
        }
        for (verbosity, level) in [
            (4, "debug"),
            (5, "debug"),
            (6, "trace"),
            (10, "trace"),
            (99, "trace"),
        ] {
            assert!(directives(verbosity).ends_with(level), "{verbosity}");
        }
    }
}
