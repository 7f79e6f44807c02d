//! How a CNI plugin says what went wrong: JSON on stdout and a failing exit (CNI specification 1.1.0, section 2, "Error").

use serde_json::json;

/// The specification's codes, those that this plugin uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version is not spoken, or has no such command.
    IncompatibleVersion,
    /// The attachment is not known; nothing has to be cleaned up.
    UnknownContainer,
    /// A `CNI_*` variable is missing or malformed.
    Environment,
    /// A file or a process failed.
    Io,
    /// What should be JSON is not, or has not the form that is expected.
    Decoding,
    /// The configuration says something that cannot be done.
    Configuration,
    /// The network namespace cannot be used.
    Netns,
    /// The same call may succeed in a while.
    TryAgainLater,
    /// `ADD` cannot be served.
    NotAvailable,
    /// Anything else, as flannel's plugin numbers it.
    Internal,
}

impl Code {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnknownContainer => 3,
            Self::Environment => 4,
            Self::Io => 5,
            Self::Decoding => 6,
            Self::Configuration => 7,
            Self::Netns => 8,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::Internal => 999,
        }
    }
}

/// An error for the runtime. Runtimes show `msg` and `details` joined by "; ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}; {details}")]
pub struct CniError {
    /// What kind it is.
    pub code: Code,
    /// What happened, in flannel's words where it has some.
    pub msg: String,
    /// What to do about it.
    pub details: String,
}

impl CniError {
    /// An error with its remedy; both are one line.
    pub fn new(code: Code, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: details.into(),
        }
    }

    /// The text for stdout. `version` is that of the configuration.
    #[must_use]
    pub fn json(&self, version: &str) -> String {
        json!({
            "cniVersion": version, "code": self.code.number(), "msg": self.msg, "details": self.details,
        })
        .to_string()
    }
}
