//! Flannel's command line on top of clap's: the syntax of Go's `flag` package, and `FLANNELD_*` variables.
//!
//! Arguments are rewritten into the one form that clap takes (`--name=value`), which needs only the names of the flags
//! and which of them are switches; clap has both. One or two dashes are the same; a switch takes its value behind `=`
//! only; the last of several values counts, but for lists; the first argument that is no flag ends the flags, and what
//! follows is ignored. An empty value leaves a flag at its default, as Go's text flags are empty by default.

use std::ffi::OsString;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command};

/// What is wrong with a command line, in the words of Go's `flag` package where it has any.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Dashes without a name.
    #[error("bad flag syntax: {0}: write --name or --name=value")]
    Syntax(String),
    /// Nobody knows this flag.
    #[error("flag provided but not defined: -{0}: --help lists all")]
    Unknown(String),
    /// The last argument is a flag that lacks its value.
    #[error("flag needs an argument: -{0}: write --{0}=VALUE")]
    NoValue(String),
    /// The value of a switch is neither true nor false.
    #[error("invalid boolean value {value:?} for -{name}: write --{name} or --{name}=false")]
    Switch {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
    },
    /// An argument is not text.
    #[error("argument {0:?} is not UTF-8")]
    Text(OsString),
}

/// Rewrites a command line, program name first, into clap's form.
///
/// # Errors
/// On what Go's `flag` package refuses. Values are not looked at: clap does that.
pub fn rewrite(
    command: &Command,
    args: impl IntoIterator<Item = OsString>,
) -> Result<Vec<OsString>, FlagError> {
    let mut args = args.into_iter();
    let mut given = Given {
        program: args.next().unwrap_or_default(),
        flags: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let text = arg.into_string().map_err(FlagError::Text)?;
        let Some(name) = text.strip_prefix('-').filter(|name| !name.is_empty()) else {
            break;
        };
        let name = match name.strip_prefix('-') {
            Some("") => break,
            Some(name) => name,
            None => name,
        };
        if name.starts_with(['-', '=']) {
            return Err(FlagError::Syntax(text));
        }
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        // Clap adds these two when it builds the command.
        if matches!(name, "h" | "help" | "version") {
            let name = if name == "version" { name } else { "help" };
            given.flags.push((name.to_owned(), None));
            continue;
        }
        let flag = command
            .get_arguments()
            .find(|flag| flag.get_long() == Some(name))
            .ok_or_else(|| FlagError::Unknown(name.to_owned()))?;
        let value = match value {
            Some(value) => value,
            None if is_switch(flag) => "true".to_owned(),
            None => {
                let next = args.next().map(OsString::into_string);
                let next = next.ok_or_else(|| FlagError::NoValue(name.to_owned()))?;
                next.map_err(FlagError::Text)?
            }
        };
        given.set(flag, name, value)?;
    }
    Ok(given.arguments())
}

/// Adds the values of `FLANNELD_*` variables for flags that are not on the command line, as [`rewrite`] has left it.
/// Returns what had to be left out: a bad value is reported and not used, as with flannel.
pub fn add_environment(
    command: &Command,
    args: &mut Vec<OsString>,
    variable: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for flag in command.get_arguments() {
        let Some(name) = flag.get_long() else {
            continue;
        };
        let is_given = args.iter().filter_map(|arg| arg.to_str()).any(|arg| {
            let rest = arg
                .strip_prefix("--")
                .and_then(|arg| arg.strip_prefix(name));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        });
        let key = format!("FLANNELD_{}", name.to_uppercase().replace('-', "_"));
        let Some(value) = variable(&key).filter(|value| !is_given && !value.is_empty()) else {
            continue;
        };
        let mut alone = Given {
            program: args.first().cloned().unwrap_or_default(),
            flags: Vec::new(),
        };
        let outcome = match alone.set(flag, name, value.clone()) {
            Ok(()) => command
                .clone()
                .try_get_matches_from(alone.arguments())
                .map_err(|error| refusal(&error)),
            Err(FlagError::Switch { .. }) => Err("neither true nor false".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(_) => args.extend(alone.arguments().into_iter().skip(1)),
            Err(reason) => problems.push(format!(
                "{key}={value:?} is not used: {reason}; --{name} takes {}: correct it or remove it",
                form(flag)
            )),
        }
    }
    problems
}

/// Takes away the flags whose value is empty, once variables can no longer take their place.
pub fn drop_empty(args: &mut Vec<OsString>) {
    let empty = |arg: &OsString| matches!(arg.to_str()?.split_once('=')?, (_, "")).then_some(());
    args.retain(|arg| empty(arg).is_none());
}

/// What is wrong with a value, without clap's words around it.
fn refusal(error: &clap::Error) -> String {
    let cause = core::error::Error::source(error).map(ToString::to_string);
    cause.unwrap_or_else(|| "it is none of the values that there are".to_owned())
}

/// What a flag takes, as people read it.
fn form(flag: &Arg) -> String {
    let names: Vec<String> = match is_switch(flag) {
        true => vec!["true".to_owned(), "false".to_owned()],
        false => {
            let values = flag.get_possible_values().into_iter();
            values.map(|value| value.get_name().to_owned()).collect()
        }
    };
    if !names.is_empty() {
        return names.join(" or ");
    }
    let names = flag.get_value_names().unwrap_or_default().iter();
    let name = names.map(ToString::to_string).collect::<Vec<_>>().join(" ");
    match flag.get_help() {
        Some(help) => format!("{name} ({help})"),
        None => name,
    }
}

/// The flags of a command line, in order. Without a value: a switch that is on.
struct Given {
    program: OsString,
    flags: Vec<(String, Option<String>)>,
}

impl Given {
    fn set(&mut self, flag: &Arg, name: &str, value: String) -> Result<(), FlagError> {
        let value = match is_switch(flag).then(|| switched(&value)) {
            None => value,
            Some(Some(on)) => on.to_string(),
            Some(None) => {
                return Err(FlagError::Switch {
                    name: name.to_owned(),
                    value,
                });
            }
        };
        if !matches!(flag.get_action(), ArgAction::Append) {
            self.flags.retain(|(other, _)| other != name);
        }
        match (flag.get_action(), &*value) {
            (ArgAction::SetTrue, "true") => self.flags.push((name.to_owned(), None)),
            (ArgAction::SetTrue, _) => {}
            _ => self.flags.push((name.to_owned(), Some(value))),
        }
        Ok(())
    }

    fn arguments(&self) -> Vec<OsString> {
        let text = |(name, value): &(String, Option<String>)| match value {
            Some(value) => format!("--{name}={value}"),
            None => format!("--{name}"),
        };
        let flags = self.flags.iter().map(text).map(OsString::from);
        core::iter::once(self.program.clone())
            .chain(flags)
            .collect()
    }
}

/// Whether a flag needs no value.
fn is_switch(flag: &Arg) -> bool {
    matches!(flag.get_action(), ArgAction::SetTrue)
        || flag.get_value_parser().type_id() == ValueParser::bool().type_id()
}

/// What Go's `strconv.ParseBool` makes of a text.
fn switched(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let switch = |name: &'static str| {
            Arg::new(name)
                .long(name)
                .num_args(0..=1)
                .default_missing_value("true")
                .value_parser(ValueParser::bool())
        };
        Command::new("flanneld")
            .version("1")
            .arg(switch("ip-masq"))
            .arg(Arg::new("on").long("on").action(ArgAction::SetTrue))
            .arg(Arg::new("iface").long("iface").action(ArgAction::Append))
            .arg(Arg::new("public-ip").long("public-ip"))
            .arg(
                Arg::new("format")
                    .long("format")
                    .value_parser(["text", "json"]),
            )
            .arg(
                Arg::new("resync")
                    .long("iptables-resync")
                    .value_name("SECONDS")
                    .help("How often")
                    .value_parser(clap::value_parser!(u32)),
            )
    }

    fn rewritten(args: &[&str]) -> Result<Vec<String>, FlagError> {
        let args = core::iter::once(&"flanneld").chain(args);
        let args = rewrite(&command(), args.map(OsString::from))?;
        let text = |arg: OsString| arg.into_string().unwrap();
        Ok(args.into_iter().skip(1).map(text).collect())
    }

    #[test]
    fn go_syntax_becomes_claps() {
        for (given, expected) in [
            (&["-ip-masq"][..], &["--ip-masq=true"][..]),
            (&["--ip-masq=F"], &["--ip-masq=false"]),
            (&["--ip-masq", "--ip-masq=0"], &["--ip-masq=false"]),
            // A switch never takes the next argument: that ends the flags.
            (&["--ip-masq", "false", "-on"], &["--ip-masq=true"]),
            (&["-on"], &["--on"]),
            (&["-on=false"], &[]),
            (
                &["-iface", "eth0", "-iface=eth1"],
                &["--iface=eth0", "--iface=eth1"],
            ),
            (
                &["-public-ip", "1.2.3.4", "--public-ip=2.3.4.5"],
                &["--public-ip=2.3.4.5"],
            ),
            // A value may look like a flag, and be empty, and hold an equals sign.
            (&["-public-ip", "-x"], &["--public-ip=-x"]),
            (&["-public-ip="], &["--public-ip="]),
            (&["-public-ip=a=b"], &["--public-ip=a=b"]),
            (&["--", "-nonsense"], &[]),
            (&["-", "-nonsense"], &[]),
            (&["-h"], &["--help"]),
            (&["--version"], &["--version"]),
        ] {
            assert_eq!(rewritten(given).unwrap(), expected, "{given:?}");
        }
    }

    #[test]
    fn an_empty_value_is_given_and_is_the_default() {
        let mut args: Vec<OsString> = ["flanneld", "--public-ip=", "--iface=a="]
            .map(Into::into)
            .into();
        let variable = |key: &str| (key == "FLANNELD_PUBLIC_IP").then(|| "9.9.9.9".to_owned());
        assert_eq!(add_environment(&command(), &mut args, variable), [""; 0]);
        drop_empty(&mut args);
        assert_eq!(args, ["flanneld", "--iface=a="]);
    }

    #[test]
    fn what_go_refuses_is_refused_in_its_words() {
        for (given, expected) in [
            (
                &["--nonsense"][..],
                "flag provided but not defined: -nonsense",
            ),
            (&["---ip-masq"], "bad flag syntax: ---ip-masq"),
            (&["--=x"], "bad flag syntax: --=x"),
            (&["-public-ip"], "flag needs an argument: -public-ip"),
            (
                &["--ip-masq=yes"],
                "invalid boolean value \"yes\" for -ip-masq",
            ),
        ] {
            let error = rewritten(given).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{given:?}: {error}");
        }
    }

    #[test]
    fn variables_fill_in_what_the_command_line_leaves_out() {
        let environment = |key: &str| match key {
            "FLANNELD_IFACE" => Some("eth7".to_owned()),
            "FLANNELD_PUBLIC_IP" => Some("9.9.9.9".to_owned()),
            "FLANNELD_IP_MASQ" => Some("maybe".to_owned()),
            "FLANNELD_IPTABLES_RESYNC" => Some("soon".to_owned()),
            "FLANNELD_FORMAT" => Some("xml".to_owned()),
            "FLANNELD_ON" => Some("1".to_owned()),
            _ => None,
        };
        let mut args: Vec<OsString> = ["flanneld", "--public-ip=1.2.3.4"].map(Into::into).into();
        let problems = add_environment(&command(), &mut args, environment);
        let args: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            args,
            ["flanneld", "--public-ip=1.2.3.4", "--on", "--iface=eth7"]
        );
        assert_eq!(
            problems,
            [
                "FLANNELD_IP_MASQ=\"maybe\" is not used: neither true nor false; --ip-masq takes true or false: correct it or remove it",
                "FLANNELD_FORMAT=\"xml\" is not used: it is none of the values that there are; --format takes text or json: correct it or remove it",
                "FLANNELD_IPTABLES_RESYNC=\"soon\" is not used: invalid digit found in string; --iptables-resync takes SECONDS (How often): correct it or remove it",
            ]
        );
    }
}
