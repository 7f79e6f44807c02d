//! What the system tests share: nodes at rest, and what their books must say then.

use core::time::Duration;
use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ripstop_fib::DropReason;
use ripstop_fib::map::monotonic_ns;
use ripstop_fib::stats::{Counter, Gauge, KernelCounter, XdpCounter};
use ripstop_perf::{
    Fabric, Host, Injector, KernelCounters, Lab, Node, Workers, address, wait_until,
};
use serde_json::Value;

/// How long a wait may take on a machine that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// An ICMP echo reply to no request: nobody answers an answer.
pub(crate) const ECHO_REPLY: [u8; 16] = [0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Frames that make sure that a data plane has counted what came before them. So many, because now and then a frame of
/// neighbour discovery is counted in the same place.
const PROBES: u64 = 16;

/// Waits until nothing happens any more on a node and all that has happened is counted.
pub(crate) fn quiet(lab: &Lab, node: &Node) -> Result<Workers> {
    let mut before = account_of(&settled(lab, node)?.0);
    let start = Instant::now();
    loop {
        let (workers, _) = settled(lab, node)?;
        let account = account_of(&workers);
        if account == before {
            return Ok(workers);
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "after {PATIENCE:?} {} is still not quiet",
            node.name()
        );
        before = account;
    }
}

/// Reads what a node has counted, in a state that has all that happened before the call; and how many frames were sent
/// to the node for that.
pub(crate) fn settled(lab: &Lab, node: &Node) -> Result<(Workers, u64)> {
    let wire = Injector::open(lab.fabric(), &Fabric::port(node.index()))?;
    let probe = probe(lab, node);
    let start = monotonic_ns();
    let published = |what: &str, condition: &dyn Fn(&Workers) -> bool| {
        let what = format!("{} has published {what}", node.name());
        wait_until(&what, PATIENCE, || {
            node.workers().is_ok_and(|workers| condition(&workers))
        })
    };
    published("the counters of its workers", &|workers| {
        workers
            .workers
            .iter()
            .all(|worker| worker.heartbeat_ns > start)
    })?;
    // The kernel's counters are published after those of the XDP program. Where the second are seen for the second time,
    // both are there from the first.
    for _time in 0..2 {
        let before = xdp(&node.workers()?, XdpCounter::PassedOther);
        (0..PROBES).try_for_each(|_probe| wire.send(&probe))?;
        published("the counters of its XDP program", &|workers| {
            xdp(workers, XdpCounter::PassedOther) >= before + PROBES
        })?;
    }
    Ok((node.workers()?, 2 * PROBES))
}

/// The books of a node's workers agree with themselves and with those of the kernel's device, where a super-packet is
/// one packet. Returns them.
pub(crate) fn check_books(lab: &Lab, node: &Node) -> Result<Workers> {
    let workers = quiet(lab, node)?;
    check_conservation(node.name(), &workers)?;
    let door = node.link_counters("rip0")?;
    let total = |counter| workers.total(counter);
    let counted = [
        total(Counter::HostRxPackets) + total(Counter::HostRxSuperPackets)
            - total(Counter::HostRxCutPackets),
        total(Counter::HostTxPackets) + total(Counter::HostTxSuperPackets)
            - total(Counter::HostTxJoinedPackets),
    ];
    let kernels = [door.tx_packets, door.rx_packets];
    ensure!(
        counted == kernels,
        "{}: the workers count {counted:?} at the host door, the kernel {kernels:?} at rip0",
        node.name()
    );
    Ok(workers)
}

/// A frame of no known protocol, with the underlay's tag.
fn probe(lab: &Lab, node: &Node) -> Vec<u8> {
    let addresses = [
        address::underlay_mac(node.index()).0,
        address::ATTACKER_MAC.0,
    ];
    let tag = match lab.underlay().vlan() {
        Some(id) => [[0x81, 0x00], id.to_be_bytes()].concat(),
        None => Vec::new(),
    };
    [addresses.as_flattened(), &tag, &[0x88, 0xb5], &[0; 46]].concat()
}

/// All that is counted of packets and frames, apart from neighbour discovery, which never ends.
fn account_of(workers: &Workers) -> Vec<u64> {
    const LOOP: [Counter; 7] = [
        Counter::Turns,
        Counter::BusyTurns,
        Counter::Sleeps,
        Counter::Kicks,
        Counter::BusyCycles,
        Counter::IdleCycles,
        Counter::AsleepCycles,
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
const LOST: [KernelCounter; 3] = [
    KernelCounter::RxDropped,
    KernelCounter::RxRingFull,
    KernelCounter::HostDropped,
];

/// The counters of a table of nftables, without those that are zero.
pub(crate) fn nft_counts(node: &Node, table: [&str; 2]) -> Result<BTreeMap<String, u64>> {
    let list = ["nft", "-j", "list", "counters", "table"];
    let text = node.output(&[&list[..], &table].concat())?;
    let answer: Value = serde_json::from_str(&text).context("answer of nft")?;
    let objects = answer["nftables"].as_array().context("answer of nft")?;
    let counters = objects.iter().filter_map(|object| {
        let counter = object.get("counter")?;
        let name = counter["name"].as_str()?.to_owned();
        Some((name, counter["packets"].as_u64()?))
    });
    Ok(counters.filter(|(_, packets)| *packets > 0).collect())
}

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
    let lost = workers.kernel(KernelCounter::RxDropped) + workers.kernel(KernelCounter::RxRingFull);
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
