//! What the system tests share: nodes at rest, and what their books must say then.

use core::time::Duration;
use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use ripstop_fib::DropReason;
use ripstop_fib::map::monotonic_ns;
use ripstop_fib::stats::{Counter, Gauge, KernelCounter, XdpCounter};
use ripstop_perf::{Host, KernelCounters, Lab, Node, Workers, wait_until};

/// How long a wait may take on a machine that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// An ICMP echo reply to no request: nobody answers an answer.
pub(crate) const ECHO_REPLY: [u8; 16] = [0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// For so long nothing may change for a node to count as quiet: longer than between two publications of any counter.
const QUIET: Duration = Duration::from_millis(250);

/// Waits until nothing happens any more on a node and all that has happened is counted.
pub(crate) fn quiet(node: &Node) -> Result<Workers> {
    let mut last = node.workers()?;
    let (mut account, mut since) = (account_of(&last), monotonic_ns());
    let mut failure = None;
    wait_until(&format!("{} is quiet", node.name()), PATIENCE, || {
        match node.workers() {
            Ok(now) => last = now,
            Err(error) => failure = Some(error),
        }
        let now = account_of(&last);
        if now != account {
            (account, since) = (now, monotonic_ns());
        }
        // Every worker has published after what could have been the last change, and the watcher has had the time to.
        let published = last
            .workers
            .iter()
            .all(|worker| worker.heartbeat_ns > since);
        let rested = Duration::from_nanos(monotonic_ns() - since) > QUIET;
        failure.is_some() || (published && rested)
    })?;
    failure.map_or(Ok(last), Err)
}

/// All that is counted of packets and frames, apart from neighbour discovery, which never ends.
fn account_of(workers: &Workers) -> Vec<u64> {
    const LOOP: [Counter; 4] = [
        Counter::Turns,
        Counter::BusyTurns,
        Counter::Sleeps,
        Counter::Kicks,
    ];
    let mut account = Vec::new();
    for worker in &workers.workers {
        let counters = Counter::ALL
            .iter()
            .filter(|counter| !LOOP.contains(counter));
        account.extend(counters.map(|counter| worker.counters.get(*counter)));
        account.extend(worker.counters.drops);
        account.extend(worker.gauges);
        account.extend(LOST.map(|counter| worker.kernel[counter as usize]));
    }
    for nic in &workers.nics {
        let outcomes = XdpCounter::ALL
            .iter()
            .filter(|outcome| **outcome != XdpCounter::PassedOther);
        account.extend(outcomes.map(|outcome| nic.counters[*outcome as usize]));
    }
    account
}

/// What the kernel calls packets that it took for a socket and did not deliver.
const LOST: [KernelCounter; 2] = [KernelCounter::RxDropped, KernelCounter::RxRingFull];

/// One outcome of the XDP program, over all NICs.
pub(crate) fn xdp(workers: &Workers, outcome: XdpCounter) -> u64 {
    workers
        .nics
        .iter()
        .map(|nic| nic.counters[outcome as usize])
        .sum()
}

/// All packets that did not go on, or were left to the kernel, by place and reason; reasons that did not occur are left
/// out. What is not for the tunnel at all does not count.
pub(crate) fn refusals(workers: &Workers) -> BTreeMap<String, u64> {
    let drops = DropReason::ALL.iter().map(|reason| {
        let of_workers = workers.workers.iter();
        let count = of_workers
            .map(|worker| worker.counters.drops[reason.index()])
            .sum();
        (by_worker(*reason), count)
    });
    let outcomes = XdpCounter::ALL
        .iter()
        .filter(|outcome| !matches!(outcome, XdpCounter::Redirected | XdpCounter::PassedOther))
        .map(|outcome| (by_xdp(*outcome), xdp(workers, *outcome)));
    drops
        .chain(outcomes)
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// The name of a worker's reason in [`refusals`]; the XDP program has reasons of the same names.
pub(crate) fn by_worker(reason: DropReason) -> String {
    format!("worker: {}", reason.name())
}

/// The name of an outcome of the XDP program in [`refusals`].
pub(crate) fn by_xdp(outcome: XdpCounter) -> String {
    format!("xdp: {}", outcome.name())
}

/// The refusals that came after `before`.
pub(crate) fn refused_since(now: &Workers, before: &Workers) -> BTreeMap<String, u64> {
    let before = refusals(before);
    let grown = refusals(now).into_iter().map(|(reason, count)| {
        let earlier = before.get(&reason).copied().unwrap_or_default();
        (reason, count - earlier)
    });
    grown.filter(|(_, count)| *count > 0).collect()
}

/// What must hold for the workers of a node at rest: no packet and no frame has got lost.
pub(crate) fn check_conservation(name: &str, workers: &Workers) -> Result<()> {
    for worker in &workers.workers {
        let what = || format!("{name} queue {}: {worker:#?}", worker.identity.queue);
        let count = |counter| worker.counters.get(counter);
        let received = count(Counter::NicRxPackets) + count(Counter::HostRxPackets);
        let sent = count(Counter::NicTxPackets) + count(Counter::HostTxPackets);
        let dropped = worker.counters.drops_total();
        ensure!(
            received == sent + dropped,
            "{received} packets received are not {sent} transmitted and {dropped} dropped; {}",
            what()
        );
        let (frames, of) = (
            worker.gauges.iter().sum::<u64>(),
            u64::from(worker.identity.frames),
        );
        ensure!(
            frames == of,
            "{frames} of {of} frames are accounted for; {}",
            what()
        );
        for gauge in [Gauge::Held, Gauge::Transmitting] {
            let frames = worker.gauges[gauge as usize];
            ensure!(
                frames == 0,
                "{frames} frames are {}; {}",
                gauge.name(),
                what()
            );
        }
    }
    let redirected = xdp(workers, XdpCounter::Redirected);
    let arrived = workers.total(Counter::NicRxPackets);
    let lost: u64 = LOST
        .into_iter()
        .map(|counter| workers.kernel(counter))
        .sum();
    ensure!(
        redirected == arrived + lost,
        "{name}: of {redirected} frames for the sockets {arrived} arrived and {lost} are known to be lost: {workers:#?}"
    );
    Ok(())
}

/// The protocol counters of every host of a lab.
pub(crate) fn kernel_counters(lab: &Lab) -> Result<Vec<(String, KernelCounters)>> {
    let hosts = lab.hosts();
    hosts
        .iter()
        .map(|host| Ok((host.name().to_owned(), host.kernel_counters()?)))
        .collect()
}

/// Fails if the kernel of any host has met a wrong checksum or length since.
pub(crate) fn check_no_damage(lab: &Lab, before: &[(String, KernelCounters)]) -> Result<()> {
    for ((name, before), (_, after)) in before.iter().zip(kernel_counters(lab)?) {
        let damage = after.since(before).damage();
        ensure!(
            damage.is_empty(),
            "damaged packets arrived at {name}: {damage:?}"
        );
    }
    Ok(())
}

/// The position of `needle` in `bytes`.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
}
