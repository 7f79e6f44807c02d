//! The files that a flannel node is known by, and the CNI plugin `flannel` that reads them.
//!
//! ```text
//!   control plane ── writes ──► subnet.env ──┐                            ┌─► delegate (bridge, host-local)
//!   install-conf ── writes ──► conflist      ├─► flannel: conf of the ────┤
//!                                 │          │   delegate, one call       └─► <dataDir>/<container id>: what DEL needs
//!                                 └► runtime ┘   per CNI command
//! ```
//!
//! Formats are flannel's to the byte, so that pods made by its plugin can be deleted by this one and the other way
//! round. Everything here is synchronous and short-lived; nothing talks to the control plane except through files.

pub mod config;
mod delegate;
pub mod error;
pub mod file;
mod go_json;
pub mod install_conf;
pub mod plugin;
mod saved;
pub mod subnet_env;

pub use subnet_env::SubnetEnv;
