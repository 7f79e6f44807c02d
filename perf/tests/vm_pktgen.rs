//! The kernel's packet generator as the source of a flood, and as the harness's: in a guest of the VM lab (`make test-vm`).
//!
//! ```text
//!   pktgen ─ flannel.1 of n2 (plain Linux) ─ fabric ─ XDP program of n1 ─ worker ─ rip0 ─ n1p0
//!      sent          =        what each of them has counted, going on or lost, with nothing left over
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use std::fs;

use core::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{check_conservation, quiet, xdp};
use ripstop_fib::stats::{Counter, KernelCounter, XdpCounter};
use ripstop_perf::measure::{
    BedPlan, Direction, Offer, Path, PodSide, Rate, Size, SourceKind, Topology, Variant, Work,
};
use ripstop_perf::{Fabric, Host, Lab, Node, address, bed};

/// Where the generator is controlled, of the namespace of the calling thread.
const CONTROL: &str = "/proc/thread-self/net/pktgen";
const PACKETS: u64 = 100_000;

/// Sends small packets from a pod of the Linux node to one of the Ripstop node, as fast as the kernel can, and returns how many
/// have left.
fn flood(from: &Node, to: &Node) -> Result<u64> {
    let (near, far) = (from.index(), to.index());
    from.netns().run(|| {
        let write = |file: &str, line: &str| {
            fs::write(format!("{CONTROL}/{file}"), format!("{line}\n"))
                .with_context(|| format!("pktgen: {file}: {line}"))
        };
        write("kpktgend_0", "rem_device_all")?;
        write("kpktgend_0", "add_device flannel.1")?;
        for line in [
            format!("count {PACKETS}"),
            "pkt_size 60".to_owned(),
            "delay 0".to_owned(),
            format!("src_mac {}", address::vtep_mac(near)),
            format!("dst_mac {}", address::vtep_mac(far)),
            format!("src_min {}", address::pod(near, 0)),
            format!("src_max {}", address::pod(near, 0)),
            format!("dst {}", address::pod(far, 0)),
            // Discard (RFC 863); many flows, so many source ports of the tunnel.
            "udp_dst_min 9".to_owned(),
            "udp_dst_max 9".to_owned(),
            "udp_src_min 20000".to_owned(),
            "udp_src_max 20063".to_owned(),
        ] {
            write("flannel.1", &line)?;
        }
        // Returns when all is sent.
        write("pgctrl", "start")?;
        let report =
            fs::read_to_string(format!("{CONTROL}/flannel.1")).context("pktgen: report")?;
        let sent = report
            .split("pkts-sofar: ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let errors = report
            .split("errors: ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        println!(
            "{}",
            report.lines().rev().take(2).collect::<Vec<_>>().join("\n")
        );
        let (sent, errors): (u64, u64) =
            (sent.unwrap_or("0").parse()?, errors.unwrap_or("0").parse()?);
        Ok(sent - errors)
    })?
}

#[test]
fn every_packet_of_a_flood_has_a_fate() -> Result<()> {
    vm::run(&["modprobe", "pktgen"])?;
    Lab::builder().ripstop(1).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let (victim, source) = (lab.node(1), lab.node(2));
        // Nobody listens on the discard port: without this, the pod would answer each packet.
        let pod = lab.pod(1, 0);
        pod.output(&["nft", "add table ip silent; add chain ip silent input { type filter hook input priority 0; }; \
            add rule ip silent input udp dport 9 counter drop"])?;
        let port = Fabric::port(victim.index());
        let before = quiet(lab, victim)?;
        let (switch, door, inside) = (lab.fabric().link_counters(&port)?, victim.link_counters("rip0")?, listed(pod)?);
        let uplink = source.link_counters("eth0")?;
        let sent = flood(source, victim)?;
        let after = quiet(lab, victim)?;
        let lost_before_xdp = lab.fabric().link_counters(&port)?.tx_dropped - switch.tx_dropped
            + source.link_counters("eth0")?.tx_dropped - uplink.tx_dropped;
        let seen = xdp(&after, XdpCounter::Redirected) - xdp(&before, XdpCounter::Redirected);
        let stalled = xdp(&after, XdpCounter::Stalled) - xdp(&before, XdpCounter::Stalled);
        let kernel = |counter| after.kernel(counter) - before.kernel(counter);
        let (ring_full, no_memory) = (kernel(KernelCounter::RxRingFull), kernel(KernelCounter::RxDropped));
        let total = |counter| after.total(counter) - before.total(counter);
        let (received, delivered) = (total(Counter::NicRxPackets), total(Counter::HostTxPackets));
        let door_lost = victim.link_counters("rip0")?.rx_dropped - door.rx_dropped;
        let arrived = listed(pod)? - inside;
        println!(
            "sent {sent}; lost before the XDP program {lost_before_xdp}; redirected {seen}, left to the kernel {stalled}; ring full {ring_full}, \
             no memory {no_memory}; received {received}; dropped {:?}; delivered {delivered}, lost at the door {door_lost}; in the pod {arrived}",
            after.drops()
        );
        assert_eq!(sent, PACKETS, "packets that the generator could send");
        assert_eq!(sent, lost_before_xdp + seen + stalled, "packets at the XDP program");
        check_conservation(victim.name(), &after)?;
        assert_eq!(arrived, delivered - door_lost + stalled, "packets in the pod");
        ensure!(arrived > 0, "nothing has arrived");
        Ok(())
    })
}

/// Packets that the pod's filter has counted and thrown away.
fn listed(pod: &dyn Host) -> Result<u64> {
    let text = pod.output(&["nft", "list chain ip silent input"])?;
    let count = text
        .split("packets ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    count
        .and_then(|count| count.parse().ok())
        .with_context(|| format!("no count in {text}"))
}

/// What the harness is to send.
fn offer(rate: Rate, size: Size) -> Offer {
    Offer {
        work: Work::Packets,
        rate,
        duration: Duration::from_millis(500),
        size,
        flows: 16,
        destinations: 1,
        count_only: true,
    }
}

fn plan(direction: Direction, backend: &str) -> BedPlan {
    BedPlan {
        topology: Topology::Gateway,
        direction,
        pod_side: PodSide::Pod,
        backend: backend.to_owned(),
        leases: 1,
        source: SourceKind::Pktgen,
        mtu: 1500,
        underlay_offloads: false,
    }
}

fn variant(path: Path) -> Variant {
    Variant {
        path,
        dataplane: serde_json::Map::new(),
        placement: None,
    }
}

/// The harness drives it through every path that a guest has, and says what it cannot make.
#[test]
fn the_harness_measures_with_it() -> Result<()> {
    vm::run(&["modprobe", "pktgen"])?;
    for backend in ["vxlan", "ipip"] {
        for path in [Path::Kernel, Path::Ripstop, Path::Routing] {
            let mut bed = bed::open(&plan(Direction::Encap, backend), &variant(path))?;
            for rate in [Rate::Pps(500), Rate::Max] {
                let trial = bed.trial(&offer(rate, Size::Bytes(64)))?;
                println!(
                    "{backend} {path:?} {rate:?}: sent {}, received {}, lost {}, drops {:?}, limits {:?}; {}",
                    trial.sent,
                    trial.received,
                    trial.lost,
                    trial.drops,
                    trial.limits,
                    bed.description()
                );
                ensure!(trial.received > 0, "nothing has arrived");
                assert_eq!(trial.sent, trial.received + trial.lost);
                if rate == Rate::Pps(500) {
                    assert_eq!(trial.lost, 0, "at so low a rate");
                    let pps = trial.sent as f64 / trial.elapsed.as_secs_f64();
                    assert!(pps < 1000.0, "{pps} packets a second of 500");
                }
                assert!(bed.description().contains("pktgen, kpktgend_0 on eth0"));
            }
            for (refused, why) in [
                (offer(Rate::Window(64), Size::Bytes(64)), "knows no window"),
                (offer(Rate::Max, Size::Imix), "cannot mix sizes"),
            ] {
                let Err(error) = bed.trial(&refused) else {
                    panic!("{refused:?} was sent");
                };
                let said = format!("{error:#}");
                assert!(said.contains(why), "{said}");
            }
        }
    }
    let mut decap = bed::open(&plan(Direction::Decap, "vxlan"), &variant(Path::Kernel))?;
    let Err(error) = decap.trial(&offer(Rate::Max, Size::Bytes(64))) else {
        panic!("pktgen has made tunnel packets");
    };
    let said = format!("{error:#}");
    assert!(said.contains("makes no tunnel packets"), "{said}");
    Ok(())
}
