//! What `/proc/<pid>/stat` says of a process (proc_pid_stat(5)).

use std::fs;

/// The fields that somebody here asks for.
#[derive(Debug)]
pub(crate) struct ProcStat {
    pub(crate) name: String,
    /// Of its first thread.
    pub(crate) state: char,
    pub(crate) parent: u32,
    /// CPU time, user and system: hundredths of a second (USER_HZ, which is 100 on every architecture that Ripstop runs on).
    pub(crate) ticks: u64,
    /// A first thread that waits for others is one of them.
    pub(crate) threads: u64,
    /// In clock ticks since boot.
    pub(crate) start_time: u64,
}

impl ProcStat {
    /// Of a process that is there.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        // The name in parentheses may itself contain any character, also `)`.
        let (begin, end) = (text.find('(')?, text.rfind(')')?);
        let fields: Vec<&str> = text.get(end + 1..)?.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            name: text.get(begin + 1..end)?.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            ticks: number(11)? + number(12)?,
            threads: number(17)?,
            start_time: number(19)?,
        })
    }
}
