//! `ripstop cleanup`: takes away everything that is Ripstop's, and only that.

use std::io;
use std::path::{Path, PathBuf};

use ripstop_fib::map::{
    CONTROLPLANE_LOCK, DATAPLANE_LOCK, FIB_FILE, MapError, STATS_FILE, lock_owner, open_fib,
};
use ripstop_fib::{Image, Region};
use serde::Serialize;

use crate::detour;
use crate::netlink::message::{self, Link, RouteFilter};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};
use crate::rules::{self, FilterError};
use crate::standby::{self, PROTOCOL, TABLE_MAIN};
use crate::state::{STATE_FILE, State};

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A process would put everything back.
    #[error("the {process} runs (pid {pid}): stop it first, or give --force")]
    Running {
        /// Which.
        process: &'static str,
        /// Its process id.
        pid: u32,
    },
    /// The run directory cannot be looked at.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Talking to the kernel failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel refused.
    #[error("{what}: {refusal}")]
    Refused {
        /// What was to be removed.
        what: String,
        /// The kernel's answer.
        refusal: Refusal,
    },
    /// The filter stays.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A file stays.
    #[error("remove {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// What was done.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cleanup {
    /// What was removed.
    pub removed: Vec<String>,
    /// What could not be removed, and why.
    pub left: Vec<String>,
}

impl Cleanup {
    fn note(&mut self, result: Result<Option<String>, CleanupError>) {
        match result {
            Ok(removed) => self.removed.extend(removed),
            Err(error) => self.left.push(error.to_string()),
        }
    }
}

impl core::fmt::Display for Cleanup {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.removed.is_empty() && self.left.is_empty() {
            return f.write_str("nothing of Ripstop's was found\n");
        }
        for removed in &self.removed {
            writeln!(f, "removed {removed}")?;
        }
        for left in &self.left {
            writeln!(f, "left: {left}")?;
        }
        Ok(())
    }
}

/// Removes rule, routes, filter and files; with `with_standby`, also the kernel's VXLAN path.
pub fn cleanup(run_dir: &Path, force: bool, with_standby: bool) -> Result<Cleanup, CleanupError> {
    for (process, name) in [
        ("control plane", CONTROLPLANE_LOCK),
        ("data plane", DATAPLANE_LOCK),
    ] {
        if let Some(pid) = lock_owner(run_dir, name)?
            && !force
        {
            return Err(CleanupError::Running { process, pid });
        }
    }
    let mut done = Cleanup::default();
    let state = State::read(run_dir).ok();
    let table = state.as_ref().map_or(detour::TABLE, |state| state.table);
    let mut netlink = Netlink::open()?;
    done.note(remove_rules(&mut netlink, table));
    done.note(remove_routes(&mut netlink, table, "detour routes"));
    if with_standby {
        // The device takes its neighbours, forwarding entries and routes with it; what is left is elsewhere.
        done.note(remove_device(&mut netlink, state.as_ref(), run_dir));
        done.note(remove_routes(
            &mut netlink,
            TABLE_MAIN,
            "routes of the main table",
        ));
    }
    done.note(match rules::remove() {
        Ok(true) => Ok(Some(format!(
            "peer filter (nftables table ip {})",
            rules::TABLE
        ))),
        Ok(false) => Ok(None),
        Err(error) => Err(error.into()),
    });
    for name in [
        FIB_FILE,
        STATS_FILE,
        STATE_FILE,
        CONTROLPLANE_LOCK,
        DATAPLANE_LOCK,
    ] {
        let path = run_dir.join(name);
        done.note(match std::fs::remove_file(&path) {
            Ok(()) => Ok(Some(path.display().to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CleanupError::File { path, source }),
        });
    }
    // Somebody else's files keep it.
    let _kept = std::fs::remove_dir(run_dir);
    Ok(done)
}

fn execute(
    netlink: &mut Netlink,
    requests: &[Request],
    what: String,
) -> Result<Option<String>, CleanupError> {
    if requests.is_empty() {
        return Ok(None);
    }
    let failures = netlink.execute(requests)?;
    let gone = |errno| matches!(errno, libc::ESRCH | libc::ENOENT | libc::ENODEV);
    match failures
        .into_iter()
        .find(|failure| !gone(failure.refusal.errno))
    {
        Some(failure) => Err(CleanupError::Refused {
            what,
            refusal: failure.refusal,
        }),
        None => Ok(Some(what)),
    }
}

fn remove_rules(netlink: &mut Netlink, table: u32) -> Result<Option<String>, CleanupError> {
    let rules = netlink.rules()?;
    let requests: Vec<_> = rules
        .iter()
        .filter(|rule| detour::is_our_rule(rule, table))
        .map(message::delete_rule)
        .collect();
    execute(netlink, &requests, format!("rule to table {table}"))
}

fn remove_routes(
    netlink: &mut Netlink,
    table: u32,
    what: &str,
) -> Result<Option<String>, CleanupError> {
    let routes = netlink.routes(RouteFilter { table, link: 0 })?;
    let requests: Vec<_> = routes
        .iter()
        .filter(|route| route.protocol == PROTOCOL)
        .map(message::delete_route)
        .collect();
    execute(
        netlink,
        &requests,
        format!("{} {what} (table {table})", requests.len()),
    )
}

/// The VXLAN device, by what the control plane or the forwarding table say; never another one.
fn remove_device(
    netlink: &mut Netlink,
    state: Option<&State>,
    run_dir: &Path,
) -> Result<Option<String>, CleanupError> {
    let from_table = || {
        let mapping = open_fib(run_dir).ok()?;
        let (_, words) = Region::attach(mapping.words()).ok()?.snapshot()?;
        Some(standby::device_name(Image::attach(&words).ok()?.node().vni))
    };
    let links = netlink.links()?;
    let name = state
        .map(|state| state.standby_device.clone())
        .or_else(from_table);
    let is_ours = |link: &Link| {
        let of_that_name = name.as_ref() == Some(&link.name);
        of_that_name
            && link
                .vxlan
                .as_ref()
                .is_some_and(|vxlan| standby::device_name(vxlan.vni) == link.name)
    };
    let mut found = links.iter().find(|link| is_ours(link));
    if found.is_none() {
        // The run directory is gone: the device is known by the routes that lie on it.
        let routes = netlink.routes(RouteFilter {
            table: TABLE_MAIN,
            link: 0,
        })?;
        found = links.iter().find(|link| {
            let carries_ours = routes
                .iter()
                .any(|route| route.link == link.index && route.protocol == PROTOCOL);
            carries_ours
                && link
                    .vxlan
                    .as_ref()
                    .is_some_and(|vxlan| standby::device_name(vxlan.vni) == link.name)
        });
    }
    match found {
        Some(link) => execute(
            netlink,
            &[message::delete_link(link.index)],
            format!("device {}", link.name),
        ),
        None => Ok(None),
    }
}
