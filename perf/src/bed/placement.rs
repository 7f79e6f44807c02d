//! Which CPU does what: [`Variant::placement`](crate::measure::Variant::placement).
//!
//! Words with commas between them:
//!
//! | word | means |
//! |---|---|
//! | `source=0`, `sink=0` | the CPU of the engine's thread, or of the process at that end |
//! | `workers=1+2` | in a gateway one worker, on a queue of its own, on each of these; between pods the first node's worker, the second's |
//! | `queues=2` | between pods each NIC has so many queues, where Ripstop runs with a worker each, on neighbouring CPUs |
//! | `rps` | packets on their way into the node under test are handed to another CPU (receive packet steering) |
//! | `threaded` | a kernel thread on another CPU takes them in (threaded NAPI) |
//! | `kernel=1` | that other CPU |
//! | `one-sided` | between pods only the first node runs Ripstop, and the kernel answers at the other |
//!
//! Without a word the source and the sink have CPU 0, the workers and that other CPU are CPU 1, and from four CPUs on the
//! sink has CPU 2. On veth the receiver's soft interrupt runs where the sender is: without `rps` and `threaded` the
//! kernel's path runs on the source's CPU.

use std::fs::File;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use super::meter::{napi_threads, shell};
use crate::lab::set_offloads;
use crate::netns::Netns;
use crate::sys;

/// Who takes in the packets of the node under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Softirqs {
    /// The CPU that sent them.
    Sender,
    /// Receive packet steering to this one.
    Rps(usize),
    /// A kernel thread on this one.
    Threaded(usize),
}

/// Which CPU does what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) softirqs: Softirqs,
    /// What was asked for, where it was.
    pub(super) source: Option<usize>,
    pub(super) sink: Option<usize>,
    pub(super) workers: Vec<usize>,
    /// Queues of each NIC between pods.
    pub(super) queues: u16,
    /// Whether only the first of two nodes runs Ripstop.
    pub(super) one_sided: bool,
    cpus: usize,
}

impl Placement {
    pub(super) fn parse(words: Option<&str>) -> Result<Self> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        Self::of(words.unwrap_or_default(), cpus).with_context(|| format!("placement {words:?}"))
    }

    fn of(words: &str, cpus: usize) -> Result<Self> {
        let (mut softirqs, mut kernel) = (None, 1_usize.min(cpus - 1));
        let mut placement = Self {
            softirqs: Softirqs::Sender,
            source: None,
            sink: None,
            workers: Vec::new(),
            queues: 1,
            one_sided: false,
            cpus,
        };
        let cpu = |text: &str| -> Result<usize> {
            let cpu = text.parse().with_context(|| format!("CPU {text:?}"))?;
            ensure!(
                cpu < cpus,
                "there is no CPU {cpu}, the last is {}",
                cpus - 1
            );
            Ok(cpu)
        };
        for word in words
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
        {
            match word.split_once('=') {
                None if word == "rps" => softirqs = Some(Softirqs::Rps as fn(usize) -> Softirqs),
                None if word == "threaded" => softirqs = Some(Softirqs::Threaded),
                None if word == "one-sided" => placement.one_sided = true,
                Some(("source", text)) => placement.source = Some(cpu(text)?),
                Some(("sink", text)) => placement.sink = Some(cpu(text)?),
                Some(("kernel", text)) => kernel = cpu(text)?,
                Some(("workers", text)) => {
                    placement.workers = text.split('+').map(cpu).collect::<Result<_>>()?;
                }
                Some(("queues", text)) => {
                    placement.queues = text.parse().with_context(|| format!("queues {text:?}"))?;
                    ensure!(
                        (1..=64).contains(&placement.queues),
                        "a NIC has 1 to 64 queues, not {text}"
                    );
                }
                None | Some(_) => bail!(
                    "{word:?} is none of rps, threaded, one-sided, source=CPU, sink=CPU, kernel=CPU, workers=CPU+CPU, queues=NUMBER"
                ),
            }
        }
        ensure!(
            placement.workers.is_empty() || placement.queues == 1,
            "\"workers\" names the CPU of each node's one worker, \"queues\" asks for several: leave one out"
        );
        if let Some(kind) = softirqs {
            placement.softirqs = kind(kernel);
        }
        Ok(placement)
    }

    /// Whether busy workers, one on each of so many nodes, leave a CPU to whoever sends and answers.
    pub(super) fn has_room_for_busy(&self, nodes: usize) -> bool {
        nodes < self.cpus
    }

    /// CPU of a source of packets.
    pub(super) fn source_cpu(&self) -> usize {
        self.source.unwrap_or(0)
    }

    /// CPU of a sink of packets.
    pub(super) fn sink_cpu(&self) -> usize {
        self.sink.unwrap_or(if self.cpus < 4 { 0 } else { 2 })
    }

    /// CPUs of the workers of a gateway.
    pub(super) fn gateway_workers(&self) -> Vec<usize> {
        if self.workers.is_empty() {
            return vec![1.min(self.cpus - 1)];
        }
        self.workers.clone()
    }

    /// Has the packets that arrive at an interface taken in where they shall be.
    pub(super) fn apply(&self, netns: &Netns, interface: &str) -> Result<()> {
        match self.softirqs {
            Softirqs::Sender => Ok(()),
            Softirqs::Rps(cpu) => {
                let mask = cpu_mask(cpu);
                let line = format!(
                    "for queue in /sys/class/net/{interface}/queues/rx-*; do echo {mask} > $queue/rps_cpus || exit 1; done"
                );
                shell(netns, &line).map(drop)
            }
            Softirqs::Threaded(cpu) => make_threaded(netns, interface, cpu),
        }
    }

    pub(super) fn describe(&self) -> String {
        match self.softirqs {
            Softirqs::Sender => "receive work on the sender's CPU".to_owned(),
            Softirqs::Rps(cpu) => format!("receive work steered to CPU {cpu} (RPS)"),
            Softirqs::Threaded(cpu) => format!("receive work in a thread on CPU {cpu}"),
        }
    }
}

/// A set of one CPU as `/sys` takes it: hexadecimal, 32 CPUs to a word.
fn cpu_mask(cpu: usize) -> String {
    let low_words = ",00000000".repeat(cpu / 32);
    format!("{:x}{low_words}", 1_u32 << (cpu % 32))
}

fn make_threaded(netns: &Netns, interface: &str, cpu: usize) -> Result<()> {
    // The kernel does not say which threads are whose; so that those that appear are ours, one at a time makes some.
    let lock = File::create("/run/ripstop-lab/.threaded").context("/run/ripstop-lab/.threaded")?;
    lock.lock().context("lock /run/ripstop-lab/.threaded")?;
    let before = napi_threads(interface)?;
    // A veth without XDP has its own receive routine, the thing to be put into a thread, with GRO only.
    set_offloads_of_receive(netns, interface)?;
    shell(
        netns,
        &format!("echo 1 > /sys/class/net/{interface}/threaded"),
    )?;
    let threads = napi_threads(interface)?;
    let ours: Vec<i32> = threads
        .into_iter()
        .filter(|thread| !before.contains(thread))
        .collect();
    ensure!(
        !ours.is_empty(),
        "this kernel made no thread for {interface}"
    );
    for thread in ours {
        sys::pin(thread, cpu).with_context(|| format!("pin thread {thread} of {interface}"))?;
    }
    Ok(())
}

/// Gives a veth a receive routine of its own (NAPI), which takes frames without an skb as well.
pub(super) fn set_offloads_of_receive(netns: &Netns, interface: &str) -> Result<()> {
    netns
        .output(&["ethtool", "-K", interface, "gro", "on"])
        .map(drop)
}

/// Lets a link pass the kernel's 64 KB packets, at one of its ends.
pub(super) fn pass_large_packets(netns: &Netns, interface: &str) -> Result<()> {
    set_offloads(netns, &[interface], true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read() {
        let of = |words| Placement::of(words, 4).expect("is read");
        let plain = of("");
        assert_eq!((plain.source_cpu(), plain.sink_cpu()), (0, 2));
        assert_eq!(plain.gateway_workers(), [1]);
        assert_eq!(plain.softirqs, Softirqs::Sender);
        let all = of("threaded, kernel=3,source=2,sink=1,workers=0+3");
        assert_eq!(all.softirqs, Softirqs::Threaded(3));
        assert_eq!((all.source_cpu(), all.sink_cpu()), (2, 1));
        assert_eq!(all.gateway_workers(), [0, 3]);
        assert_eq!(of("rps").softirqs, Softirqs::Rps(1));
        assert_eq!((plain.queues, of("queues=2").queues), (1, 2));
        let two = Placement::of("", 2).expect("is read");
        assert_eq!((two.sink_cpu(), two.gateway_workers()), (0, vec![1]));
        let one = Placement::of("rps", 1).expect("is read");
        assert_eq!(
            (one.softirqs, one.gateway_workers()),
            (Softirqs::Rps(0), vec![0])
        );
    }

    #[test]
    fn wrong_words_are_named() {
        for (words, part) in [
            ("source=7", "the last is 3"),
            ("sink", "none of"),
            ("worker=1", "none of"),
            ("workers=1+x", "CPU \"x\""),
            ("queues=0", "1 to 64"),
            ("queues=2,workers=0+1", "leave one out"),
        ] {
            let error = Placement::of(words, 4).expect_err("is wrong");
            assert!(format!("{error:#}").contains(part), "{words}: {error:#}");
        }
    }

    #[test]
    fn masks_have_a_word_for_32_cpus() {
        assert_eq!(cpu_mask(1), "2");
        assert_eq!(cpu_mask(33), "2,00000000");
    }
}
