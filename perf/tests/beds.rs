//! Every bed carries what it is given, by the path that it is named after: as root, for real.
//!
//! ```text
//!   gateway   [pod or door] ── n1: kernel, Ripstop ── eth0 ═══ [the switch's end]    packets, either way
//!   pods      n1p0 ── n1 ═══ fabric ═══ n2 ── n2p0                                   TCP, round trips, packets
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]
#![expect(
    clippy::print_stdout,
    reason = "what was measured is worth reading when a test fails"
)]

use core::time::Duration;

use std::process;
use std::thread;

use anyhow::{Context, Result};
use ripstop_perf::measure::{
    Bed, BedPlan, Direction, Offer, Path, PodSide, Rate, Size, SourceKind, Topology, Trial,
    Variant, Work,
};
use ripstop_perf::{DETOUR_TABLE, Lab, bed, machine, run};
use serde_json::json;

const PATHS: [Path; 3] = [Path::Kernel, Path::Ripstop, Path::Routing];
const DURATION: Duration = Duration::from_millis(500);

/// Packets a second that every path here takes without loss, also when others use the machine.
const RATE: Rate = Rate::Pps(2000);

/// The most packets that a source sends to find out whether they arrive.
const PROBES_MAX: u64 = 64;

fn plan(topology: Topology, direction: Direction) -> BedPlan {
    BedPlan {
        topology,
        direction,
        pod_side: PodSide::Pod,
        backend: "vxlan".to_owned(),
        leases: 1,
        source: SourceKind::Auto,
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

fn offer(work: Work, rate: Rate) -> Offer {
    Offer {
        work,
        rate,
        duration: DURATION,
        size: Size::Bytes(64),
        flows: 4,
        destinations: 1,
        count_only: false,
    }
}

fn trial(bed: &mut dyn Bed, offer: &Offer) -> Result<Trial> {
    let trial = bed.trial(offer)?;
    println!(
        "{}\n  sent {} received {} lost {} in {:.2?}; drops {:?}; limits {:?}",
        bed.description(),
        trial.sent,
        trial.received,
        trial.lost,
        trial.elapsed,
        trial.drops,
        trial.limits
    );
    Ok(trial)
}

/// What holds for every trial that loses nothing.
fn assert_whole(trial: &Trial) {
    assert!(trial.received > 0, "nothing arrived");
    assert_eq!(trial.received, trial.sent);
    assert_eq!(
        [trial.lost, trial.reordered, trial.duplicated, trial.corrupt],
        [0; 4]
    );
    let cpus = trial.cpus;
    let all = cpus.user + cpus.system + cpus.irq + cpus.softirq + cpus.steal + cpus.idle;
    assert!(
        all > DURATION / 2,
        "the machine's time stood still: {cpus:?}"
    );
}

/// The lab of the only bed that this process has.
fn lab() -> Result<Lab> {
    let ours = format!("{:x}-", process::id());
    let names = Lab::names();
    let name = names.iter().find(|name| name.starts_with(&ours));
    Lab::open(name.context("no bed is up")?)
}

/// Packets that the kernel's tunnel device of the node under test has sent and received.
fn standby() -> Result<u64> {
    let counters = lab()?.node(1).standby_counters()?;
    Ok(counters.tx_packets + counters.rx_packets)
}

/// What a node under test had to do with the packets of a trial: its workers once, or the kernel's tunnel device.
fn assert_path(path: Path, trial: &Trial, by_standby: u64) {
    let by_workers = trial.workers.map(|workers| workers.packets);
    match path {
        Path::Ripstop => assert_eq!((by_workers, by_standby), (Some(trial.sent), 0)),
        Path::Kernel => {
            assert_eq!(by_workers, None);
            // Before the trial a source may have tried whether its frames get through.
            let trials = by_standby - trial.sent;
            assert!(trials < PROBES_MAX, "{by_standby} for {}", trial.sent);
        }
        Path::Routing | Path::Wire | Path::TestpmdAfxdp | Path::TestpmdNull => {
            assert_eq!((by_workers, by_standby), (None, 0));
        }
    }
}

/// A trial in which everything must arrive by the path that it is named after.
fn whole_trial(plan: &BedPlan, variant: &Variant, offer: &Offer) -> Result<Trial> {
    let mut bed = bed::open(plan, variant)?;
    let before = standby()?;
    let trial = trial(&mut *bed, offer)?;
    assert_whole(&trial);
    assert_path(variant.path, &trial, standby()? - before);
    Ok(trial)
}

fn packets_through_gateways(variant: &Variant) -> Result<()> {
    let _machine = machine();
    for direction in [Direction::Encap, Direction::Decap] {
        for pod_side in [PodSide::Pod, PodSide::Door] {
            if (variant.path, pod_side) == (Path::Routing, PodSide::Door) {
                continue;
            }
            let plan = BedPlan {
                pod_side,
                ..plan(Topology::Gateway, direction)
            };
            let trial = whole_trial(&plan, variant, &offer(Work::Packets, RATE))?;
            assert_eq!(trial.received_bytes, 64 * trial.received);
            let times = trial.latency.context("times")?;
            assert_eq!(times.len(), trial.received);
        }
    }
    Ok(())
}

#[test]
fn the_kernel_s_gateway_carries_packets() -> Result<()> {
    packets_through_gateways(&variant(Path::Kernel))
}

#[test]
fn ripstop_s_gateway_carries_packets() -> Result<()> {
    packets_through_gateways(&variant(Path::Ripstop))
}

#[test]
fn ripstop_s_gateway_with_a_veth_door_carries_packets() -> Result<()> {
    let mut variant = variant(Path::Ripstop);
    variant
        .dataplane
        .insert("hostDoor".to_owned(), json!({ "kind": "veth" }));
    packets_through_gateways(&variant)
}

#[test]
fn plain_forwarding_carries_packets() -> Result<()> {
    packets_through_gateways(&variant(Path::Routing))
}

#[test]
fn a_wire_carries_packets() -> Result<()> {
    let _machine = machine();
    for direction in [Direction::Encap, Direction::Decap] {
        let offer = offer(Work::Packets, RATE);
        whole_trial(
            &plan(Topology::Gateway, direction),
            &variant(Path::Wire),
            &offer,
        )?;
    }
    Ok(())
}

#[test]
fn other_backends_carry_packets() -> Result<()> {
    let _machine = machine();
    for (backend, directions) in [
        ("ipip", &[Direction::Encap, Direction::Decap][..]),
        ("udp", &[Direction::Encap, Direction::Decap]),
        ("host-gw", &[Direction::Encap]),
    ] {
        for direction in directions {
            let plan = BedPlan {
                backend: backend.to_owned(),
                leases: 10,
                ..plan(Topology::Gateway, *direction)
            };
            let mut offer = offer(Work::Packets, RATE);
            offer.size = Size::Imix;
            if *direction == Direction::Encap {
                offer.destinations = 10;
            }
            whole_trial(&plan, &variant(Path::Ripstop), &offer)?;
        }
    }
    Ok(())
}

#[test]
fn packets_go_to_a_thousand_leases() -> Result<()> {
    let _machine = machine();
    for path in PATHS {
        let plan = BedPlan {
            leases: 1000,
            ..plan(Topology::Gateway, Direction::Encap)
        };
        let mut offer = offer(Work::Packets, Rate::Pps(10_000));
        offer.destinations = 1000;
        let trial = whole_trial(&plan, &variant(path), &offer)?;
        assert!(trial.sent > 1000, "not every lease had a packet");
    }
    Ok(())
}

#[test]
fn a_window_loses_nothing() -> Result<()> {
    let _machine = machine();
    for path in PATHS {
        for direction in [Direction::Encap, Direction::Decap] {
            let plan = plan(Topology::Gateway, direction);
            let offer = offer(Work::Packets, Rate::Window(64));
            let trial = whole_trial(&plan, &variant(path), &offer)?;
            let busy = trial.workers.is_none_or(|workers| workers.busy_turns > 0);
            assert!(busy, "{:?}", trial.workers);
        }
    }
    Ok(())
}

#[test]
fn softirqs_are_where_they_are_placed() -> Result<()> {
    let _machine = machine();
    for words in ["rps", "threaded"] {
        for direction in [Direction::Encap, Direction::Decap] {
            let mut variant = variant(Path::Kernel);
            variant.placement = Some(words.to_owned());
            let mut bed = bed::open(&plan(Topology::Gateway, direction), &variant)?;
            let interface = match direction {
                Direction::Encap => "pod0",
                Direction::Decap => "eth0",
            };
            let other_cpu = thread::available_parallelism()?.get() > 1;
            let (file, value) = match words {
                // A mask of CPUs: that of CPU 1, if there is one.
                "rps" if other_cpu => ("queues/rx-0/rps_cpus", "2"),
                "rps" => ("queues/rx-0/rps_cpus", "1"),
                _ => ("threaded", "1"),
            };
            let file = format!("/sys/class/net/{interface}/{file}");
            let is = run(lab()?.node(1), &format!("cat {file}"))?;
            assert_eq!(is.trim().trim_start_matches(['0', ',']), value, "{file}");
            assert_whole(&trial(&mut *bed, &offer(Work::Packets, RATE))?);
        }
    }
    Ok(())
}

#[test]
fn pods_send_packets_to_each_other() -> Result<()> {
    let _machine = machine();
    for path in PATHS {
        let mut bed = bed::open(&plan(Topology::Pods, Direction::Encap), &variant(path))?;
        let trial = trial(&mut *bed, &offer(Work::Packets, RATE))?;
        assert_whole(&trial);
        if let Some(workers) = trial.workers {
            assert_eq!(
                workers.packets,
                2 * trial.sent,
                "both nodes' workers saw it"
            );
        }
    }
    Ok(())
}

#[test]
fn two_beds_do_not_see_each_other() -> Result<()> {
    let _machine = machine();
    let carries = |path: Path| {
        move || -> Result<Trial> {
            let mut bed = bed::open(&plan(Topology::Gateway, Direction::Encap), &variant(path))?;
            trial(&mut *bed, &offer(Work::Packets, RATE))
        }
    };
    let trials = thread::scope(|scope| {
        let threads = [Path::Ripstop, Path::Kernel].map(|path| scope.spawn(carries(path)));
        threads.map(|thread| thread.join().expect("no panic"))
    });
    for trial in trials {
        assert_whole(&trial?);
    }
    Ok(())
}

#[test]
fn a_bed_notices_that_another_path_carries_its_packets() -> Result<()> {
    let _machine = machine();
    let plan = plan(Topology::Gateway, Direction::Encap);
    let mut bed = bed::open(&plan, &variant(Path::Ripstop))?;
    let mut refused = |part: &str| -> Result<()> {
        let outcome = bed.trial(&offer(Work::Packets, RATE));
        let error = format!("{:#}", outcome.err().context("is refused")?);
        assert!(error.contains(part), "{error}");
        Ok(())
    };
    let lab = lab()?;
    let node = lab.node(1);
    // The control plane would put the rule back.
    node.signal_controlplane(libc::SIGSTOP)?;
    run(node, &format!("ip rule del table {DETOUR_TABLE}"))?;
    refused("the workers saw 0 ")?;
    node.kill_dataplane();
    refused("no data plane runs")
}

#[test]
fn tcp_streams_move_bytes_on_every_path() -> Result<()> {
    let _machine = machine();
    for path in PATHS {
        for offloads in [false, true] {
            let mut plan = plan(Topology::Pods, Direction::Encap);
            plan.underlay_offloads = offloads;
            let mut bed = bed::open(&plan, &variant(path))?;
            let trial = trial(&mut *bed, &offer(Work::Tcp, Rate::Max))?;
            let rate = trial.received_bytes as f64 * 8.0 / trial.elapsed.as_secs_f64() / 1e9;
            println!(
                "  {rate:.2} Gbit/s, source {:?} sink {:?}",
                trial.source_cpu, trial.sink_cpu
            );
            assert!(
                trial.received_bytes > 1 << 20,
                "{} bytes",
                trial.received_bytes
            );
            assert_eq!(trial.corrupt, 0);
            assert!(trial.elapsed >= DURATION);
            assert_eq!(trial.workers.is_some(), path == Path::Ripstop);
        }
    }
    Ok(())
}

#[test]
fn round_trips_have_times() -> Result<()> {
    let _machine = machine();
    for path in PATHS {
        let mut bed = bed::open(&plan(Topology::Pods, Direction::Encap), &variant(path))?;
        let trial = trial(&mut *bed, &offer(Work::RoundTrips, Rate::Pps(200)))?;
        assert_whole(&trial);
        let times = trial.latency.expect("times");
        println!(
            "  p50 {} ns p99 {} ns",
            times.value_at_quantile(0.5),
            times.value_at_quantile(0.99)
        );
        assert_eq!(times.len(), trial.received);
        // 200 a second for half a second, and the last may be under way at its end.
        assert!((1..=101).contains(&trial.sent), "{}", trial.sent);
        assert!(times.min() > 1000, "no path through two nodes is that fast");
    }
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_refused_with_a_reason() {
    let refused = |plan: BedPlan, path: Path, part: &str| {
        let error = bed::open(&plan, &variant(path)).err().expect("is refused");
        assert!(format!("{error:#}").contains(part), "{error:#}");
    };
    let gateway = || plan(Topology::Gateway, Direction::Encap);
    let with_backend = |backend: &str| BedPlan {
        backend: backend.to_owned(),
        ..gateway()
    };
    refused(with_backend("wireguard"), Path::Kernel, "none of vxlan");
    refused(with_backend("udp"), Path::Kernel, "flannel's own");
    refused(with_backend("host-gw"), Path::Kernel, "routing");
    refused(
        plan(Topology::Pods, Direction::Encap),
        Path::Wire,
        "no pods",
    );
    let decap = BedPlan {
        direction: Direction::Decap,
        ..with_backend("host-gw")
    };
    refused(decap, Path::Ripstop, "without a tunnel");
    let many = BedPlan {
        leases: 1_000_000,
        ..gateway()
    };
    refused(many, Path::Kernel, "leases");
    let mut placed = variant(Path::Kernel);
    placed.placement = Some("nonsense".to_owned());
    let error = bed::open(&gateway(), &placed).err().expect("is refused");
    assert!(format!("{error:#}").contains("nonsense"), "{error:#}");
}
