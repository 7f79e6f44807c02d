//! `ripstop cleanup`: takes away everything that is Ripstop's, and only that.

use std::io;
use std::path::{Path, PathBuf};

use ripstop_fib::map::{
    CONTROLPLANE_LOCK, DATAPLANE_LOCK, FIB_FILE, MapError, STATS_FILE, lock_owner, open_fib,
};
use ripstop_fib::{Backend, Image, Region};
use serde::Serialize;

use crate::detour;
use crate::family::Family;
use crate::fou::{Fou, FouError};
use crate::guard;
use crate::netlink::message::{self, RouteFilter};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};
use crate::rules::{self, FilterError};
use crate::standby::{self, PROTOCOL, TABLE_MAIN};
use crate::state::{STATE_FILE, State};
use crate::traffic::{self, TrafficError, blackhole};

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
    /// The receive port stays.
    #[error(transparent)]
    Fou(#[from] FouError),
    /// The filter or the guard stays.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A masquerade or forward rule stays.
    #[error("masquerade and forward rules: {0}")]
    Traffic(#[from] TrafficError),
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

/// Removes rules, routes, filter, guard and files; with `with_standby`, also what flannel would leave: the kernel's own
/// path, whatever the backend, masquerade and forward rules.
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
    for family in Family::ALL {
        done.note(remove_rules(&mut netlink, family, table));
        for table in [table, detour::host_table(table)] {
            done.note(remove_routes(&mut netlink, family, table, "detour routes"));
        }
    }
    if with_standby {
        // A device takes its neighbours, forwarding entries and routes with it; what is left is elsewhere.
        for removed in remove_devices(&mut netlink, state.as_ref(), run_dir)? {
            done.note(removed);
        }
        for family in Family::ALL {
            done.note(remove_routes(
                &mut netlink,
                family,
                TABLE_MAIN,
                "routes of the main table",
            ));
        }
        done.note(remove_port(state.as_ref(), run_dir));
        // Without these, pods that still run would reach nobody outside.
        let (removed, errors) = traffic::remove();
        done.removed.extend(removed);
        for error in errors {
            done.note(Err(error.into()));
        }
        for family in Family::ALL {
            done.note(remove_blackholes(&mut netlink, family));
        }
    }
    done.note(match rules::remove() {
        Ok(true) => Ok(Some(format!(
            "peer filter (nftables tables {})",
            rules::TABLE
        ))),
        Ok(false) => Ok(None),
        Err(error) => Err(error.into()),
    });
    done.note(match rules::remove_guard() {
        Ok(true) => Ok(Some(format!("guard (nftables table {})", guard::TABLE))),
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

fn remove_rules(
    netlink: &mut Netlink,
    family: Family,
    table: u32,
) -> Result<Option<String>, CleanupError> {
    let rules = netlink.rules(family)?;
    let requests: Vec<_> = rules
        .iter()
        .filter(|rule| detour::is_our_rule(rule, table))
        .map(message::delete_rule)
        .collect();
    execute(
        netlink,
        &requests,
        format!("{family} rule to table {table}"),
    )
}

fn remove_routes(
    netlink: &mut Netlink,
    family: Family,
    table: u32,
    what: &str,
) -> Result<Option<String>, CleanupError> {
    let routes = netlink.routes(RouteFilter {
        protocol: PROTOCOL,
        ..RouteFilter::table(family, table)
    })?;
    let requests: Vec<_> = routes.iter().map(message::delete_route).collect();
    execute(
        netlink,
        &requests,
        format!("{} {family} {what} (table {table})", requests.len()),
    )
}

fn remove_blackholes(
    netlink: &mut Netlink,
    family: Family,
) -> Result<Option<String>, CleanupError> {
    let outcome = blackhole::keep(netlink, family, None)?;
    Ok((outcome.changed > 0).then(|| format!("{family} blackhole route")))
}

/// Backend and port of the forwarding table, if there is one.
fn from_table(run_dir: &Path) -> Option<(Vec<String>, Option<u16>)> {
    let mapping = open_fib(run_dir).ok()?;
    let (_, words) = Region::attach(mapping.words()).ok()?.snapshot()?;
    let node = Image::attach(&words).ok()?.node();
    Some(match node.backend {
        Backend::Vxlan => (standby::vxlan_names(node.vni).into(), None),
        Backend::Ipip => (vec![standby::IPIP_DEVICE.to_owned()], None),
        Backend::Udp => (vec![standby::UDP_DEVICE.to_owned()], Some(node.udp_port)),
        Backend::Alloc | Backend::HostGw => (Vec::new(), None),
    })
}

/// The tunnel devices, by what the control plane or the forwarding table say, or by the routes that lie on them; never
/// another one.
fn remove_devices(
    netlink: &mut Netlink,
    state: Option<&State>,
    run_dir: &Path,
) -> Result<Vec<Result<Option<String>, CleanupError>>, CleanupError> {
    let known = match state {
        Some(state) => state.standby_devices.clone(),
        None => from_table(run_dir).map_or(Vec::new(), |(names, _)| names),
    };
    let links = netlink.links()?;
    let ours = standby::stale_devices(netlink, &links, &[], &known)?;
    let remove = |link: message::Link| {
        let what = format!("device {}", link.name);
        execute(netlink, &[message::delete_link(link.index)], what)
    };
    Ok(ours.into_iter().map(remove).collect())
}

/// The UDP port that the kernel takes `udp` backend packets from.
fn remove_port(state: Option<&State>, run_dir: &Path) -> Result<Option<String>, CleanupError> {
    let port = match state {
        Some(state) => state.fou_port,
        None => from_table(run_dir).and_then(|(_, port)| port),
    };
    let Some(port) = port else { return Ok(None) };
    let removed = match Fou::open() {
        // What the kernel does not have, it does not hold.
        Err(FouError::Missing { .. }) => false,
        Err(error) => return Err(error.into()),
        Ok(mut fou) => fou.remove(port)?,
    };
    Ok(removed.then(|| format!("foo-over-UDP port {port}")))
}
