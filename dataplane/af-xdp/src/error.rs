//! What can go wrong while a UMEM or a socket is set up, and what to do about it.

use core::fmt;
use core::time::Duration;
use std::io;

/// Why the environment refused a UMEM or a socket.
#[derive(Debug)]
pub enum Error {
    /// A setting that no kernel would take.
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: u64,
        /// The rule that the value breaks.
        rule: &'static str,
    },
    /// There is no such interface in this network namespace.
    NoInterface {
        /// Name or index as given.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The process lacks a capability.
    NotPermitted {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The UMEM is larger than the memory that this process may lock.
    LockedMemory {
        /// Size of the UMEM in bytes.
        bytes: u64,
        /// The process's limit in bytes.
        limit: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has too few free huge pages of 2 MiB.
    NoHugePages {
        /// Huge pages wanted.
        pages: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another socket holds the queue, and went on doing so for as long as we were told to wait.
    QueueBusy {
        /// Interface and queue.
        object: String,
        /// How long was waited.
        waited: Duration,
    },
    /// Neither driver nor kernel offers the mode asked for.
    ModeRefused {
        /// Interface and queue.
        object: String,
        /// The mode that was asked for last.
        mode: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The UMEM's first socket decided something that this socket cannot change.
    Inherited {
        /// Interface and queue.
        object: String,
        /// What was decided.
        decided: &'static str,
    },
    /// Any other refusal.
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// The kernel's answer.
        source: io::Error,
        /// What usually causes it; may be empty.
        advice: &'static str,
    },
}

impl Error {
    /// A refusal whose usual reasons are the same wherever it occurs.
    pub(crate) fn system(
        operation: &'static str,
        object: impl Into<String>,
        source: io::Error,
    ) -> Self {
        let object = object.into();
        let advice = match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                return Self::NotPermitted {
                    operation,
                    object,
                    source,
                };
            }
            Some(libc::EAFNOSUPPORT) => "the kernel is built without CONFIG_XDP_SOCKETS",
            Some(libc::ENOPROTOOPT) => "the kernel does not know this option; it is too old",
            Some(libc::ENETDOWN) => "the interface is down or gone",
            Some(libc::ENODEV | libc::ENXIO) => "the interface is gone",
            Some(libc::ENOMEM) => "the kernel is out of memory; use fewer or smaller rings",
            Some(libc::EMFILE) => "the process has too many open files; raise LimitNOFILE",
            _ => "",
        };
        Self::System {
            operation,
            object,
            source,
            advice,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting { name, value, rule } => write!(f, "{name} = {value}: {rule}"),
            Self::NoInterface { interface, source } => write!(
                f,
                "interface {interface}: {source}; it must exist in this network namespace"
            ),
            Self::NotPermitted {
                operation,
                object,
                source,
            } => write!(
                f,
                "{operation} {object}: {source}; needs CAP_NET_RAW, and CAP_NET_ADMIN and CAP_BPF \
                 for the XDP program"
            ),
            Self::LockedMemory {
                bytes,
                limit,
                source,
            } => write!(
                f,
                "register UMEM of {bytes} bytes: {source}; RLIMIT_MEMLOCK is {limit} bytes: set \
                 LimitMEMLOCK=infinity or give the process CAP_IPC_LOCK"
            ),
            Self::NoHugePages { pages, source } => write!(
                f,
                "map UMEM of {pages} huge pages of 2 MiB: {source}; raise sysctl vm.nr_hugepages by \
                 {pages}, or turn huge pages off"
            ),
            Self::QueueBusy { object, waited } => write!(
                f,
                "bind {object}: still held by another socket after {} ms; one process at a time \
                 can own a queue",
                waited.as_millis()
            ),
            Self::ModeRefused {
                object,
                mode,
                source,
            } => write!(
                f,
                "bind {object} in {mode} mode: {source}; the driver may lack it, or the queue may \
                 not exist"
            ),
            Self::Inherited { object, decided } => write!(
                f,
                "bind {object}: the first socket on this UMEM decided {decided}, which all others \
                 share"
            ),
            Self::System {
                operation,
                object,
                source,
                advice: "",
            } => write!(f, "{operation} {object}: {source}"),
            Self::System {
                operation,
                object,
                source,
                advice,
            } => write!(f, "{operation} {object}: {source}; {advice}"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Setting { .. } | Self::QueueBusy { .. } | Self::Inherited { .. } => None,
            Self::NoInterface { source, .. }
            | Self::NotPermitted { source, .. }
            | Self::LockedMemory { source, .. }
            | Self::NoHugePages { source, .. }
            | Self::ModeRefused { source, .. }
            | Self::System { source, .. } => Some(source),
        }
    }
}
