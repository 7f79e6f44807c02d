//! Templates become workers: which NIC, which of its queues, and which CPU for each.
//!
//! ```text
//!   "nic": "auto"     ─► --iface, else the default route ─► below VLAN and bond ─► NICs
//!   "queues": "auto"  ─► the receive queues in use, less those that have a file of their own
//!   "cpus": "auto"    ─► the CPUs allowed: fewest workers first, then the NIC's NUMA node, then whole cores, CPU 0 last
//! ```
//!
//! [`resolve`] asks the machine for NICs, [`expand`] is a plain function of what [`HostFacts`] say. A worker that comes out of
//! it is what a file for its queue would be, and [`Worker::text`] is that file.

use core::fmt::Write as _;
use core::net::IpAddr;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{
    ConfigError, ConfigErrors, HostFacts, Polling, Template, WorkerConfig, format_cpu_list,
};
use crate::nic::{Nic, interface_of};

/// A template with its NICs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The template.
    pub template: Template,
    /// Names of the NICs: several below a bond.
    pub nics: Vec<String>,
    /// Why these, for people.
    pub why: String,
}

/// A worker that a template has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// What it does; its file is the template.
    pub config: WorkerConfig,
    /// The file that says the same for this queue alone.
    pub text: String,
}

impl Worker {
    /// The name of that file.
    pub fn file_name(&self) -> String {
        format!("{}-q{}.json", self.config.nic, self.config.queue)
    }
}

/// What the network says about the interfaces of this namespace, in files.
#[derive(Debug)]
pub struct NetFiles(PathBuf);

impl Default for NetFiles {
    /// The calling thread's network namespace.
    fn default() -> Self {
        Self("/proc/thread-self/net".into())
    }
}

impl NetFiles {
    /// Those below `root`.
    pub fn below(root: &Path) -> Self {
        Self(root.to_owned())
    }

    fn read(&self, file: &str) -> String {
        // A kernel without the protocol or the module has no such file.
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    /// The interface of the first default route, IPv4 before IPv6.
    fn default_route(&self) -> Option<String> {
        /// RTF_REJECT (linux/route.h): there is no way.
        const REJECT: u32 = 0x200;
        let (v4, v6) = (self.read("route"), self.read("ipv6_route"));
        let usable = |flags: &str| u32::from_str_radix(flags, 16).is_ok_and(|f| f & REJECT == 0);
        let v4 = v4.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                [name, "00000000", _, flags, _, _, _, "00000000", ..] if usable(flags) => {
                    Some((*name).to_owned())
                }
                _ => None,
            }
        });
        let to_all = |net: &str| net.bytes().all(|digit| digit == b'0');
        let v6 = v6.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                [net, "00", _, "00", _, _, _, _, flags, name] if to_all(net) && usable(flags) => {
                    Some((*name).to_owned())
                }
                _ => None,
            }
        });
        v4.or(v6)
    }

    /// The NICs below an interface: that of a VLAN, those of a bond, else itself.
    fn nics_below(&self, name: &str) -> Vec<String> {
        let values = |text: &str, key: &str| -> Vec<String> {
            let lines = text
                .lines()
                .filter_map(|line| line.trim().strip_prefix(key));
            lines.map(|value| value.trim().to_owned()).collect()
        };
        let mut lower = values(&self.read(&format!("vlan/{name}")), "Device:");
        lower.extend(values(
            &self.read(&format!("bonding/{name}")),
            "Slave Interface:",
        ));
        // An interface is never below itself; the kernel sees to that.
        match lower.is_empty() {
            true => vec![name.to_owned()],
            false => lower
                .iter()
                .flat_map(|name| self.nics_below(name))
                .collect(),
        }
    }
}

/// Finds the NICs of templates. `ifaces` are the values of `--iface`, names or addresses, of which the first that exists is
/// taken, as flannel does; without any it is the default route's interface.
///
/// # Errors
/// There is no such interface, or two templates are for one NIC.
pub fn resolve(
    templates: Vec<Template>,
    ifaces: &[String],
    net: &NetFiles,
) -> Result<Vec<Resolved>, ConfigErrors> {
    let mut errors = Vec::new();
    let mut found: Vec<Resolved> = Vec::new();
    for template in templates {
        let (nics, why) = match &template.nic {
            Some(nic) => (vec![nic.clone()], "named there".to_owned()),
            None => match underlay(ifaces, net) {
                Ok((interface, why)) => {
                    let nics = net.nics_below(&interface);
                    let why = match nics.as_slice() {
                        [only] if *only == interface => why,
                        _ => format!("below {interface}, {why}"),
                    };
                    (nics, why)
                }
                Err(problem) => {
                    errors.push(ConfigError::NoUnderlay {
                        file: template.file.clone(),
                        problem,
                    });
                    continue;
                }
            },
        };
        for other in &found {
            if let Some(nic) = nics.iter().find(|nic| other.nics.contains(nic)) {
                errors.push(ConfigError::DuplicateTemplate {
                    first: other.template.file.clone(),
                    second: template.file.clone(),
                    nic: nic.clone(),
                });
            }
        }
        found.push(Resolved {
            template,
            nics,
            why,
        });
    }
    ConfigErrors::unless(errors, found)
}

/// The interface that tunnel packets leave by, and why it is taken; or what is wrong.
fn underlay(ifaces: &[String], net: &NetFiles) -> Result<(String, String), String> {
    if ifaces.is_empty() {
        return net
            .default_route()
            .map(|name| (name, "the default route's interface".to_owned()))
            .ok_or_else(|| "there is no default route".to_owned());
    }
    let existing = Nic::names();
    let matching = |wanted: &String| match wanted.parse::<IpAddr>() {
        Ok(address) => interface_of(address),
        Err(_) => existing.contains(wanted).then(|| wanted.clone()),
    };
    let name = ifaces.iter().find_map(matching).ok_or_else(|| {
        format!(
            "there is no interface for --iface {}, only {}",
            ifaces.join(", "),
            existing.join(", ")
        )
    })?;
    Ok((name, "by --iface".to_owned()))
}

/// A queue that gets a worker.
struct Place<'a> {
    resolved: &'a Resolved,
    nic: &'a Nic,
    queue: u32,
}

/// Makes workers of templates. `fixed` are those that have files of their own: their queues are left out, and their CPUs
/// are taken last. `places` is how many workers there may be beside them. What was decided, and why, goes to `explain`.
///
/// # Errors
/// A NIC that is not there, or no CPU to run on.
pub fn expand(
    fixed: &[WorkerConfig],
    resolved: &[Resolved],
    host: &HostFacts,
    places: usize,
    mut explain: impl FnMut(String),
) -> Result<Vec<Worker>, ConfigErrors> {
    let mut errors = Vec::new();
    let mut wanted = Vec::new();
    for resolved in resolved {
        let template = &resolved.template;
        if cpus_of(template, host).is_empty() {
            errors.push(ConfigError::NoCpu {
                file: template.file.clone(),
                wanted: format_cpu_list(template.cpus.as_ref().unwrap_or(&host.cpus)),
                allowed: format_cpu_list(&host.cpus),
            });
        }
        for name in &resolved.nics {
            let Some(nic) = host.nics.get(name) else {
                errors.push(ConfigError::UnknownNic {
                    file: template.file.clone(),
                    nic: name.clone(),
                    existing: host.nic_names.clone(),
                });
                continue;
            };
            let all = || (0..nic.rx_queues).collect();
            let queues: BTreeSet<u32> = template.queues.clone().unwrap_or_else(all);
            let has_file =
                |queue| (fixed.iter()).any(|worker| (&worker.nic, worker.queue) == (name, queue));
            let free = queues.into_iter().filter(|queue| !has_file(*queue));
            wanted.extend(free.map(|queue| Place {
                resolved,
                nic,
                queue,
            }));
        }
    }
    ConfigErrors::unless(errors, ())?;
    // Queue by queue over all NICs, so that each gets its share of the near CPUs; the sort keeps the order otherwise.
    wanted.sort_by_key(|place| place.queue);
    if wanted.len() > places {
        explain(format!(
            "{} queues want a worker and there is room for {places}: the kernel carries the packets of the rest",
            wanted.len()
        ));
        wanted.truncate(places);
    }
    let mut load: BTreeMap<u32, usize> = BTreeMap::new();
    for worker in fixed {
        *load.entry(worker.cpu).or_default() += 1;
    }
    let mut workers: Vec<(&Place<'_>, WorkerConfig)> = Vec::new();
    for place in &wanted {
        let template = &place.resolved.template;
        let near = host
            .node_of(place.nic)
            .and_then(|n| host.numa_nodes.get(&n));
        let last = |cpu: &u32| {
            (
                load.get(cpu).copied().unwrap_or(0),
                near.is_some_and(|node| !node.cpus.contains(cpu)),
                host.siblings.contains(cpu),
                // Where the kernel does most of its own work.
                *cpu == 0,
            )
        };
        let Some(cpu) = cpus_of(template, host).into_iter().min_by_key(last) else {
            continue;
        };
        *load.entry(cpu).or_default() += 1;
        let config = WorkerConfig {
            nic: place.nic.name.clone(),
            queue: place.queue,
            cpu,
            ..template.worker.clone()
        };
        workers.push((place, config));
    }
    let configs = workers.iter_mut().map(|(_, config)| config).collect();
    if let Some(reason) = calm_down(fixed, configs, &load, host) {
        explain(reason);
    }
    for resolved in resolved {
        for name in &resolved.nics {
            let of_nic = || (workers.iter()).filter(|(place, _)| place.nic.name == *name);
            if let Some((place, _)) = of_nic().next() {
                let pairs = of_nic().map(|(_, worker)| (worker.queue, worker.cpu));
                explain(explanation(resolved, place.nic, pairs, host));
            }
        }
    }
    let finished = workers.into_iter().map(|(place, config)| Worker {
        text: text(&place.resolved.template, &config),
        config,
    });
    Ok(finished.collect())
}

fn cpus_of(template: &Template, host: &HostFacts) -> BTreeSet<u32> {
    match &template.cpus {
        Some(cpus) => cpus.intersection(&host.cpus).copied().collect(),
        None => host.cpus.clone(),
    }
}

/// A worker that never sleeps has its CPU for itself, and one CPU is left for all else: where there are too few, workers
/// sleep when there is nothing to do. Says so, if it comes to that.
fn calm_down(
    fixed: &[WorkerConfig],
    workers: Vec<&mut WorkerConfig>,
    load: &BTreeMap<u32, usize>,
    host: &HostFacts,
) -> Option<String> {
    let busy = |worker: &WorkerConfig| worker.polling == Polling::Busy;
    let spinning = (fixed.iter()).chain(workers.iter().map(|worker| &**worker));
    let taken: BTreeSet<u32> = (spinning.filter(|worker| busy(worker)))
        .map(|worker| worker.cpu)
        .collect();
    let none_left = host.cpus.is_subset(&taken);
    let mut calmed = 0;
    for worker in workers {
        let shared = load.get(&worker.cpu).is_some_and(|workers| *workers > 1);
        if busy(worker) && (shared || none_left) {
            worker.polling = Polling::Adaptive;
            calmed += 1;
        }
    }
    (calmed > 0).then(|| {
        format!(
            "polling of {calmed} worker(s) is adaptive and not busy: {} for that",
            match none_left {
                true => "no CPU would be left for anything else; there are too few",
                false => "they share a CPU; there are too few",
            }
        )
    })
}

fn explanation(
    resolved: &Resolved,
    nic: &Nic,
    pairs: impl Iterator<Item = (u32, u32)>,
    host: &HostFacts,
) -> String {
    let pairs: Vec<String> = pairs
        .map(|(queue, cpu)| format!("{queue} on {cpu}"))
        .collect();
    let mut text = format!(
        "{}: NIC {} ({}) has {} receive queue(s)",
        resolved.template.file.display(),
        nic.name,
        resolved.why,
        nic.rx_queues,
    );
    if let Some((number, node)) = host
        .node_of(nic)
        .and_then(|number| Some((number, host.numa_nodes.get(&number)?)))
    {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            " and is on NUMA node {number} (CPUs {})",
            format_cpu_list(&node.cpus)
        );
    }
    let _ = write!(
        text,
        "; queues on CPUs, of {} allowed: {}",
        format_cpu_list(&cpus_of(&resolved.template, host)),
        pairs.join(", ")
    );
    text
}

/// The file for one queue: what it is for, then the template's own keys.
fn text(template: &Template, worker: &WorkerConfig) -> String {
    let mut lines = vec![
        format!("  \"nic\": {}", serde_json::Value::from(&*worker.nic)),
        format!("  \"queue\": {}", worker.queue),
        format!("  \"cpu\": {}", worker.cpu),
    ];
    let calmed = worker.polling != template.worker.polling;
    lines.extend(
        template
            .keys
            .iter()
            .map(|(key, value)| match calmed && key == "polling" {
                true => "  \"polling\": \"adaptive\"".to_owned(),
                false => format!("  \"{key}\": {value}"),
            }),
    );
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

/// Writes a file for each worker into `directory`, which is made if need be.
///
/// # Errors
/// A file of that name is there: then none is written. Or the kernel refuses.
pub fn write(directory: &Path, workers: &[Worker]) -> io::Result<Vec<PathBuf>> {
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |source: io::Error| io::Error::new(source.kind(), format!("{path}: {source}"))
    };
    fs::create_dir_all(directory).map_err(at(directory))?;
    let paths: Vec<PathBuf> = (workers.iter())
        .map(|worker| directory.join(worker.file_name()))
        .collect();
    if let Some(path) = paths.iter().find(|path| path.exists()) {
        let there =
            "it is there already, and nothing was written: move it away, or give another directory";
        return Err(at(path)(io::Error::new(
            io::ErrorKind::AlreadyExists,
            there,
        )));
    }
    for (path, worker) in paths.iter().zip(workers) {
        fs::write(path, &worker.text).map_err(at(path))?;
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `/proc/net` of these files.
    fn net(files: &[(&str, &str)]) -> (tempfile::TempDir, NetFiles) {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let net = NetFiles::below(root.path());
        (root, net)
    }

    const HEADER: &str =
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
    const ZEROS: &str = "00000000000000000000000000000000";

    #[test]
    fn the_default_route_is_found() {
        let v4 = |lines: &str| format!("{HEADER}{lines}");
        let to_part = "eth9\t00000000\t010200C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n";
        let refused = "*\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0\n";
        let good = "eth1\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n";
        let later = "eth2\t00000000\t010200C0\t0003\t0\t0\t200\t00000000\t0\t0\t0\n";
        let v6 = format!(
            "{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200       lo\n\
             fd000000000000000000000000000000 40 {ZEROS} 00 {ZEROS} 00000100 00000001 00000000 00000001 eth8\n\
             {ZEROS} 00 {ZEROS} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth6\n"
        );
        let all = v4(&[to_part, refused, good, later].concat());
        for (route, ipv6_route, expected) in [
            (&*all, &*v6, Some("eth1")),
            (&*v4(&[to_part, refused].concat()), &v6, Some("eth6")),
            (&*v4(to_part), "", None),
            ("", "", None),
        ] {
            let (_root, net) = net(&[("route", route), ("ipv6_route", ipv6_route)]);
            assert_eq!(net.default_route().as_deref(), expected, "{route}");
        }
        let (_root, net) = net(&[]);
        assert_eq!(net.default_route(), None);
    }

    #[test]
    fn below_vlan_and_bond_are_nics() {
        let (_root, net) = net(&[
            ("vlan/config", "VLAN Dev name | VLAN ID\n"),
            (
                "vlan/bond0.7",
                "bond0.7  VID: 7\t REORDER_HDR: 1\n      total frames received   12\nDevice: bond0\nINGRESS priority mappings: 0:0\n",
            ),
            (
                "bonding/bond0",
                "Ethernet Channel Bonding Driver: v6.1\n\nCurrently Active Slave: eth1\n\n\
                 Slave Interface: eth0\nMII Status: up\n\nSlave Interface: eth1\nMII Status: up\n",
            ),
        ]);
        assert_eq!(net.nics_below("bond0.7"), ["eth0", "eth1"]);
        assert_eq!(net.nics_below("bond0"), ["eth0", "eth1"]);
        assert_eq!(net.nics_below("eth0"), ["eth0"]);
    }
}
