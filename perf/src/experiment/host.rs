//! What a figure has to be read with: the machine, its kernel, what is checked out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::measure::{WireEnd, WireFacts};

/// The machine and its software.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Host {
    /// Model of the processor.
    pub cpu: String,
    /// CPUs that the kernel has.
    pub cpus: u32,
    /// NUMA nodes.
    pub numa_nodes: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// What the kernel was told at its start about isolation and mitigations.
    pub boot: Vec<String>,
    /// Distribution.
    pub system: String,
    /// What the kernel does about each weakness of the processor, without those that it has not.
    pub mitigations: BTreeMap<String, String>,
    /// Governor of the processor's frequency; nothing where the kernel does not set it.
    pub governor: Option<String>,
    /// Whether the machine is a guest, and whose, as far as it can be seen.
    pub hypervisor: Option<String>,
    /// What the kernel reads time from.
    pub clock_source: String,
    /// One, five and fifteen minutes, when the file was made.
    pub load: String,
    /// Commit of the working directory.
    pub commit: String,
    /// Whether it has changes that are in no commit.
    pub dirty: bool,
    /// The wire to another machine, where there was one. Modes of drivers are told by each trial's bed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire: Option<WireFacts>,
}

impl Host {
    /// Reads what is below a root directory, and asks git.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let line = |path: &str| text(path).trim().to_owned();
        let cpuinfo = text("proc/cpuinfo");
        let field = |name: &str| {
            let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(key, _)| key.trim() == name);
            found.map(|(_, value)| value.trim().to_owned())
        };
        let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor"));
        let memory = text("proc/meminfo");
        let memory = memory.lines().find_map(|l| l.strip_prefix("MemTotal:"));
        let kilobytes = memory.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
        let boot = text("proc/cmdline");
        let boot = boot.split_whitespace().filter(|word| {
            let about = [
                "isolcpus",
                "nohz_full",
                "rcu_nocbs",
                "mitigations",
                "nosmt",
                "idle",
                "processor.",
                "intel_",
                "amd_",
            ];
            about.iter().any(|start| word.starts_with(start))
        });
        let system = text("etc/os-release");
        let system = system.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
        let is_guest =
            field("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
        let vendor = line("sys/class/dmi/id/sys_vendor");
        let maker = if vendor.is_empty() {
            "unknown".to_owned()
        } else {
            vendor
        };
        let governor = line("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        let (commit, dirty) = checked_out();
        Self {
            cpu: field("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: count(cpus),
            numa_nodes: count(list(&root.join("sys/devices/system/node")).filter(|n| {
                n.strip_prefix("node")
                    .is_some_and(|id| id.parse::<u32>().is_ok())
            })),
            memory_bytes: kilobytes.map_or(0, |kilobytes: u64| kilobytes * 1024),
            kernel: line("proc/sys/kernel/osrelease"),
            boot: boot.map(str::to_owned).collect(),
            system: system.unwrap_or_default().trim_matches('"').to_owned(),
            mitigations: mitigations(&root.join("sys/devices/system/cpu/vulnerabilities")),
            governor: (!governor.is_empty()).then_some(governor),
            hypervisor: is_guest.then_some(maker),
            clock_source: line("sys/devices/system/clocksource/clocksource0/current_clocksource"),
            load: line("proc/loadavg")
                .split(' ')
                .take(3)
                .collect::<Vec<_>>()
                .join(" "),
            commit,
            dirty,
            wire: None,
        }
    }

    /// Each fact with its name, for a table.
    #[must_use]
    pub fn rows(&self) -> Vec<[String; 2]> {
        let machine = match &self.hypervisor {
            Some(whose) => format!("virtual ({whose})"),
            None => "bare metal".to_owned(),
        };
        let governor = self.governor.clone();
        let mitigations = self.mitigations.iter();
        let mitigations: Vec<String> = mitigations
            .map(|(name, what)| format!("{name}: {what}"))
            .collect();
        let gibibytes = self.memory_bytes as f64 / f64::from(1_u32 << 30);
        let tree = if self.dirty { " with changes" } else { "" };
        let row = |name: &str, value: String| [name.to_owned(), value];
        let wire = self.wire.iter().flat_map(|wire| {
            let peer = format!("{}, agent at {}", end(&wire.far), wire.agent);
            [row("wire", end(&wire.near)), row("peer", peer)]
        });
        let mut rows = vec![
            row(
                "processor",
                format!(
                    "{}, {} CPUs, {} NUMA node(s)",
                    self.cpu, self.cpus, self.numa_nodes
                ),
            ),
            row("machine", machine),
            row("memory", format!("{gibibytes:.1} GiB")),
            row("kernel", self.kernel.clone()),
            row("boot options", or_none(&self.boot.join(" "))),
            row("system", self.system.clone()),
            row("mitigations", or_none(&mitigations.join("; "))),
            row(
                "governor",
                governor.unwrap_or_else(|| "not the kernel's".to_owned()),
            ),
            row("clock source", self.clock_source.clone()),
            row("load average", self.load.clone()),
            row("commit", format!("{}{tree}", self.commit)),
        ];
        rows.extend(wire);
        rows
    }
}

fn end(end: &WireEnd) -> String {
    let speed = match end.speed_mbps {
        Some(speed) => format!("{speed} Mb/s"),
        None => "unknown speed".to_owned(),
    };
    let driver = or_none(&end.driver);
    format!(
        "{}, driver {driver}, {speed}, kernel {}",
        end.nic, end.kernel
    )
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "none" } else { text }.to_owned()
}

fn count<T>(things: impl Iterator<Item = T>) -> u32 {
    u32::try_from(things.count()).unwrap_or(u32::MAX)
}

fn list(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

fn mitigations(folder: &Path) -> BTreeMap<String, String> {
    let read = |name: String| {
        let text = fs::read_to_string(folder.join(&name)).ok()?;
        let text = text.trim();
        (text != "Not affected").then(|| (name, text.to_owned()))
    };
    list(folder).filter_map(read).collect()
}

/// Commit of the working directory, and whether it has changes.
fn checked_out() -> (String, bool) {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let changes = git(&["status", "--porcelain", "--untracked-files=no"]);
    (commit, changes.is_some_and(|changes| !changes.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_a_made_up_machine() {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [
            (
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Made Up 9000\nflags\t\t: fpu hypervisor tsc\n\nprocessor\t: 1\n",
            ),
            (
                "proc/meminfo",
                "MemTotal:        2097152 kB\nMemFree: 1 kB\n",
            ),
            ("proc/cmdline", "root=/dev/vda isolcpus=1 mitigations=off\n"),
            ("proc/sys/kernel/osrelease", "6.99.0\n"),
            ("proc/loadavg", "0.10 0.20 0.30 1/100 4242\n"),
            (
                "etc/os-release",
                "NAME=\"x\"\nPRETTY_NAME=\"Some Linux 1\"\n",
            ),
            ("sys/class/dmi/id/sys_vendor", "QEMU\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/meltdown",
                "Not affected\n",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/retbleed",
                "Mitigation: IBPB\n",
            ),
            (
                "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
                "performance\n",
            ),
            (
                "sys/devices/system/clocksource/clocksource0/current_clocksource",
                "tsc\n",
            ),
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            ("sys/devices/system/node/has_cpu", "0\n"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::read(root.path());
        assert_eq!(
            (host.cpu.as_str(), host.cpus, host.numa_nodes),
            ("Made Up 9000", 2, 1)
        );
        assert_eq!(
            (host.memory_bytes, host.kernel.as_str()),
            (2 << 30, "6.99.0")
        );
        assert_eq!(host.boot, ["isolcpus=1", "mitigations=off"]);
        assert_eq!(
            (host.system.as_str(), host.load.as_str()),
            ("Some Linux 1", "0.10 0.20 0.30")
        );
        assert_eq!(
            host.mitigations,
            BTreeMap::from([("retbleed".to_owned(), "Mitigation: IBPB".to_owned())])
        );
        assert_eq!(host.governor.as_deref(), Some("performance"));
        assert_eq!(host.hypervisor.as_deref(), Some("QEMU"));
        assert_eq!(host.clock_source, "tsc");
        assert!(
            host.rows()
                .iter()
                .all(|[name, value]| !name.is_empty() && !value.is_empty())
        );
    }

    #[test]
    fn a_machine_that_tells_nothing() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::read(root.path());
        assert_eq!(
            (host.cpu.as_str(), host.cpus, host.hypervisor),
            ("unknown", 0, None)
        );
    }
}
