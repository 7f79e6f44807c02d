//! Who else uses the CPUs while a trial runs.
//!
//! Processes of ours are this one and those that it started, down to their children. Threads of the kernel are part of every
//! path. All others are foreign: their CPU time is missing from the measurement, and disturbs it.

use core::num::NonZero;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::stats::whole;
use crate::proc_stat::ProcStat;

/// CPU time of processes that are not ours, during a trial.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Foreign {
    /// Hundredths of a second, of all of them.
    pub ticks: u64,
    /// What all CPUs had to give in that time, in the same unit.
    pub of_ticks: u64,
    /// The one that took most of it.
    pub most: Option<String>,
}

/// A look at all processes.
#[derive(Debug)]
pub struct Neighbours {
    proc: PathBuf,
    own: u32,
    began: Instant,
    /// By pid and start time.
    before: BTreeMap<(u32, u64), ProcStat>,
}

impl Neighbours {
    /// Looks at what they have used so far.
    #[must_use]
    pub fn look() -> Self {
        Self::look_below(Path::new("/proc"), process::id())
    }

    fn look_below(proc: &Path, own: u32) -> Self {
        Self {
            proc: proc.to_owned(),
            own,
            began: Instant::now(),
            before: processes(proc),
        }
    }

    /// What the foreign ones have used since. One that began and ended in between is not seen.
    #[must_use]
    pub fn since(&self) -> Foreign {
        let now = processes(&self.proc);
        let parents = parents(&now);
        let cpus = thread::available_parallelism().map_or(1, NonZero::get) as u64;
        let hundredths = whole(self.began.elapsed().as_secs_f64() * 100.0);
        let mut foreign = Foreign {
            of_ticks: hundredths.saturating_mul(cpus),
            ..Foreign::default()
        };
        let mut most = 0;
        for (identity, process) in &now {
            if is_ours(identity.0, self.own, &parents) {
                continue;
            }
            let before = self.before.get(identity).map_or(0, |before| before.ticks);
            let ticks = process.ticks.saturating_sub(before);
            foreign.ticks += ticks;
            if ticks > most {
                most = ticks;
                foreign.most = Some(process.name.clone());
            }
        }
        foreign
    }
}

/// Resident bytes of the processes that this one started, down to their children, by name.
#[must_use]
pub fn memory_of_ours() -> BTreeMap<String, u64> {
    let proc = Path::new("/proc");
    let all = processes(proc);
    let parents = parents(&all);
    let mut memory = BTreeMap::new();
    for ((pid, _), process) in &all {
        // Threads of the kernel have no memory of their own.
        if *pid == process::id() || !is_ours(*pid, process::id(), &parents) {
            continue;
        }
        let status = fs::read_to_string(proc.join(pid.to_string()).join("status"));
        let status = status.unwrap_or_default();
        let resident = status.lines().find_map(|line| {
            let kilobytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            kilobytes.parse::<u64>().ok()
        });
        if let Some(kilobytes) = resident {
            *memory.entry(process.name.clone()).or_default() += kilobytes * 1024;
        }
    }
    memory
}

fn parents(processes: &BTreeMap<(u32, u64), ProcStat>) -> HashMap<u32, u32> {
    let pairs = processes.iter();
    pairs
        .map(|((pid, _), process)| (*pid, process.parent))
        .collect()
}

/// Whether a process is this one, one below it, or a thread of the kernel (all of which are children of 2).
fn is_ours(pid: u32, own: u32, parents: &HashMap<u32, u32>) -> bool {
    let mut at = pid;
    // Longer than any chain of parents; a pid that was given out again in between could make a ring.
    for _ in 0..1000 {
        if at == own || at == 2 {
            return true;
        }
        match parents.get(&at) {
            Some(parent) if *parent != 0 => at = *parent,
            Some(_) | None => return false,
        }
    }
    false
}

fn processes(proc: &Path) -> BTreeMap<(u32, u64), ProcStat> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let process = ProcStat::parse(&stat)?;
            Some(((pid, process.start_time), process))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn write(proc: &Path, pid: u32, name: &str, parent: u32, ticks: [u64; 2], start: u64) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(&folder).unwrap();
        let [user, system] = ticks;
        let zeroes = "0 ".repeat(9);
        let text =
            format!("{pid} ({name}) R {parent} {zeroes}{user} {system} 0 0 20 0 1 0 {start} 0 0\n");
        fs::write(folder.join("stat"), text).unwrap();
    }

    #[test]
    fn only_others_are_foreign() {
        let folder = tempfile::tempdir().unwrap();
        let proc = folder.path();
        fs::create_dir(proc.join("sys")).unwrap();
        let all = |step: u64| {
            write(proc, 1, "init", 0, [step, 0], 1);
            write(proc, 2, "kthreadd", 0, [100 * step, 0], 1);
            write(proc, 20, "ksoftirqd/0", 2, [100 * step, 0], 1);
            write(proc, 300, "ripstop-perf", 1, [100 * step, 0], 7);
            write(proc, 301, "ripstop-datapla", 300, [100 * step, 0], 8);
            write(proc, 400, "c) R 300", 1, [10 * step, 5 * step], 9);
        };
        all(1);
        let neighbours = Neighbours::look_below(proc, 300);
        assert_eq!(
            (neighbours.since().ticks, neighbours.since().most),
            (0, None)
        );
        all(3);
        // Of the same pid, but another process: all of its time is of the trial.
        write(proc, 1, "init", 0, [4, 0], 2);
        let foreign = neighbours.since();
        assert_eq!(foreign.ticks, 20 + 10 + 4);
        assert_eq!(foreign.most.as_deref(), Some("c) R 300"));
    }

    #[test]
    fn this_process_is_ours() {
        let parents = parents(&processes(Path::new("/proc")));
        assert!(parents.contains_key(&process::id()));
        assert!(is_ours(process::id(), process::id(), &parents));
        assert!(!is_ours(1, process::id(), &parents));
        // A program that has only just begun has hardly any memory: it has begun once it answers.
        let mut child = process::Command::new("cat")
            .stdin(process::Stdio::piped())
            .stdout(process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"?").unwrap();
        let mut answer = [0];
        let answered = child.stdout.as_mut().unwrap().read_exact(&mut answer);
        let memory = memory_of_ours();
        child.kill().unwrap();
        child.wait().unwrap();
        answered.unwrap();
        assert!(
            memory.get("cat").is_some_and(|bytes| *bytes > 4096),
            "{memory:?}"
        );
    }
}
