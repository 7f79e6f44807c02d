//! Underlays that are more than one NIC or less than all of its frames: in a guest of the VM lab (`make test-vm`), whose kernels
//! have 802.1Q and bonding.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ┬ worker ─ eth0 ┐                    one tag on all frames, or
//!                    └ worker ─ eth1 ┴ bond0 ═╗           two NICs of which one is in use, or
//!   n2p0 ─ n2 ─ the same ═════════════════════╬═ fabric   two NICs that share the flows, the switch's two ports joined, too
//!   n3p0 ─ n3 ─ kernel: eth0.100, bond0 ══════╝
//! ```

#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
mod talk;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use core::time::Duration;
use std::collections::BTreeMap;
use std::thread;

use anyhow::{Context, Result, ensure};
use common::{check_conservation, quiet, xdp};
use ripstop_fib::stats::{Counter, XdpCounter};
use ripstop_perf::{
    Backend, BondMode, Capture, Direction, Fabric, Families, Family, Frame, Header, Host, Injector,
    Lab, LabBuilder, Node, TrafficGroup, UdpFlow, Underlay, Workers, wait_until,
};
use serde_json::Value;
use signal_hook::consts::SIGTERM;
use talk::{Carried, check_no_damage, talk};
use vm::PATIENCE;

/// The 802.1Q id of the labs' underlays.
const ID: u16 = 100;
const ETHERTYPE_VLAN: u16 = 0x8100;
/// A service provider's tag (IEEE 802.1ad).
const ETHERTYPE_QINQ: u16 = 0x88a8;
/// Flows of a kind that is spread over two NICs: that all of them draw the same one happens once in 2^63 times.
const FLOWS: u16 = 64;
/// Packets a second each way, of which a guest may carry fewer.
const RATE: u64 = 200;
/// How long nothing may be lost for a change to be over.
const SETTLING: Duration = Duration::from_secs(2);
/// The longest that a flow may stand still when a NIC fails: 50 ms until the bond knows, the rest is the guest's slowness.
const STANDSTILL: Duration = Duration::from_secs(30);
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_secs(1);

/// Brings up two Ripstop nodes and a plain one, runs every kind of traffic among them and then `more`. Packets have gone through
/// the workers, and nothing is missing in the books.
fn every_kind_of_traffic(
    builder: LabBuilder,
    underlay: Underlay,
    more: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    builder.underlay(underlay).ripstop(2).linux(1).run(|lab| {
        ensure!(
            !lab.node(3).has_userland_tunnel(),
            "this kernel has no {} device",
            lab.backend().name()
        );
        lab.start_ripstop()?;
        let before = common::kernel_counters(lab)?;
        for pair in [[1, 2], [1, 3]] {
            for family in lab.families() {
                talk(lab, family, pair)?;
            }
        }
        for node in lab.ripstop_nodes() {
            workers_carry_all(lab, node)?;
        }
        more(lab)?;
        // What comes by another NIC than before is the kernel's until the table names that one.
        for node in lab.ripstop_nodes() {
            check_conservation(node.name(), &quiet(lab, node)?)?;
        }
        check_no_damage(lab, &before)
    })
}

/// What the standby has carried is what workers have left to it because they did not get to run: the XDP program counts what
/// came in meanwhile, and the control plane says when it has taken their routes away.
fn workers_carry_all(lab: &Lab, node: &Node) -> Result<()> {
    let workers = quiet(lab, node)?;
    check_conservation(node.name(), &workers)?;
    let carried = Carried::by(node)?;
    let [out, into] = carried.kernel;
    let stalled = xdp(&workers, XdpCounter::Stalled);
    let nics: Vec<_> = workers
        .nics
        .iter()
        .map(|nic| (&nic.nic, nic.native))
        .collect();
    println!(
        "{}: {carried:?}, native {nics:?}, {:?}",
        node.name(),
        workers.xdp()
    );
    ensure!(nics.iter().all(|(_, native)| *native), "{nics:?}");
    let has_devices = lab.backend().device(Family::Ipv4).is_some();
    ensure!(
        !has_devices || into == stalled,
        "{}: {into} packets came in over the standby, {stalled} were left to it",
        node.name()
    );
    let withdrawn = node.controlplane_log().contains("active=false");
    ensure!(
        out == 0 || withdrawn,
        "{}: {out} packets left over the standby, and the workers had their routes",
        node.name()
    );
    Ok(())
}

/// A counter of the workers of each of a node's NICs.
fn by_nic(node: &Node, counter: Counter) -> Result<BTreeMap<String, u64>> {
    let mut sums = BTreeMap::new();
    for worker in node.workers()?.workers {
        *sums.entry(worker.identity.nic).or_default() += worker.counters.get(counter);
    }
    Ok(sums)
}

/// How much the workers of each NIC have sent and received since.
fn grown(node: &Node, since: &[BTreeMap<String, u64>; 2]) -> Result<BTreeMap<String, [u64; 2]>> {
    let mut both: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    for (way, counter) in [Counter::NicTxPackets, Counter::NicRxPackets]
        .into_iter()
        .enumerate()
    {
        for (nic, now) in by_nic(node, counter)? {
            let before = since[way].get(&nic).copied().unwrap_or_default();
            both.entry(nic).or_default()[way] = now - before;
        }
    }
    Ok(both)
}

fn sent_and_received(node: &Node) -> Result<[BTreeMap<String, u64>; 2]> {
    Ok([
        by_nic(node, Counter::NicTxPackets)?,
        by_nic(node, Counter::NicRxPackets)?,
    ])
}

/// Flows among all nodes go over both NICs, each way.
fn both_nics_carry(lab: &Lab) -> Result<()> {
    for family in lab.families() {
        let nodes: Vec<&Node> = lab.ripstop_nodes().collect();
        let before = nodes.iter().map(|node| sent_and_received(node));
        let before = before.collect::<Result<Vec<_>>>()?;
        for (from, to) in lab.pod_pairs() {
            let count = u64::from(FLOWS) * 4;
            let flow = UdpFlow::new(from, to).over(family).flows(FLOWS);
            let report = flow.rate(RATE).count(count).run()?;
            ensure!(
                (report.received, report.corrupt) == (count, 0),
                "{} to {}: {report}",
                from.name(),
                to.name()
            );
        }
        for (node, before) in nodes.iter().zip(&before) {
            let what = format!("{family}: both NICs of {} send and receive", node.name());
            let carried = wait_until(&what, PATIENCE, || {
                grown(node, before).is_ok_and(|nics| {
                    nics.len() == 2 && nics.values().flatten().all(|packets| *packets > 0)
                })
            });
            let nics = grown(node, before)?;
            println!("{family} {}: {nics:?}", node.name());
            carried.with_context(|| format!("{nics:?}"))?;
        }
    }
    Ok(())
}

/// The port of a bond that carries everything.
fn active_port(node: &Node) -> Result<String> {
    let output = node.output(&["ip", "-d", "-j", "link", "show", "dev", "bond0"])?;
    let links: Value = serde_json::from_str(&output).context("output of ip -j link")?;
    let active = links[0]["linkinfo"]["info_data"]["active_slave"].as_str();
    Ok(active.unwrap_or_default().to_owned())
}

/// Takes one NIC's link away under traffic, and gives it back; then the other one's. Each time the other one takes over, and
/// nothing is lost any more. `is_spread` says whether both are in use while both are there.
fn each_nic_fails(lab: &Lab, is_spread: bool) -> Result<()> {
    let node = lab.node(1);
    let pods = [1, 2, 3].map(|index| lab.pod(index, 0));
    let family = *lab.families().last().context("a family")?;
    let flow = |from, to| {
        let flow = UdpFlow::new(from, to).over(family);
        flow.flows(FLOWS).rate(RATE / 2).start()
    };
    let traffic = TrafficGroup::new(vec![
        flow(pods[0], pods[1])?,
        flow(pods[1], pods[0])?,
        flow(pods[0], pods[2])?,
        flow(pods[2], pods[0])?,
    ]);
    // Workers of these NICs carry traffic both ways, and nobody loses a packet from here on.
    let settled = |what: &str, nics: &[&str]| -> Result<()> {
        let before = sent_and_received(node)?;
        let carried = wait_until(&format!("{what}: {nics:?} carry"), PATIENCE, || {
            grown(node, &before).is_ok_and(|grown| {
                let enough = |nic: &&str| grown[*nic].iter().all(|packets| *packets > 50);
                nics.iter().all(enough)
            })
        });
        carried.with_context(|| format!("{:?}", grown(node, &before)))?;
        // A guest that has to wait for its turn loses packets everywhere, but not for ever.
        let mut lost = u64::MAX;
        wait_until(
            &format!("{what}: nothing is lost any more"),
            PATIENCE,
            || {
                thread::sleep(SETTLING);
                let before = lost;
                lost = traffic.lost_before(&traffic.mark(), QUIET);
                lost == before
            },
        )
        .with_context(|| format!("{lost} lost"))?;
        println!("{what}: lost so far {lost}, {:?}", grown(node, &before)?);
        Ok(())
    };
    let set = |port: &str, state: &str| {
        let line = format!("ip link set {port} {state}");
        vm::command(lab.fabric(), &line)
    };
    let both: &[&str] = if is_spread { &["eth0", "eth1"] } else { &[] };
    settled("both links", both)?;
    for (uplink, failing, other) in [(0, "eth0", "eth1"), (1, "eth1", "eth0")] {
        let port = Fabric::uplink_port(node.index(), uplink);
        set(&port, "down")?;
        if !is_spread {
            wait_until(&format!("{other} has taken over"), PATIENCE, || {
                active_port(node).is_ok_and(|port| port == other)
            })?;
        }
        let rest = [other];
        settled(&format!("without {failing}"), &rest)?;
        let idle = sent_and_received(node)?;
        set(&port, "up")?;
        settled(
            &format!("{failing} is back"),
            if is_spread { both } else { &rest },
        )?;
        if !is_spread {
            let carried = grown(node, &idle)?;
            ensure!(
                carried[failing] == [0, 0],
                "{failing} only stands by, and the workers have carried {carried:?}"
            );
        }
    }
    for report in traffic.stop() {
        println!("{report}");
        ensure!(
            (report.duplicated, report.corrupt, report.foreign) == (0, 0, 0),
            "{report}"
        );
        ensure!(report.longest_gap < STANDSTILL, "{report}");
    }
    Ok(())
}

/// What a node would send to another, with these tags in place of the underlay's.
fn with_tags(lab: &Lab, family: Family, tags: &[(u16, u16)]) -> Frame {
    let mut frame = lab.backend_frame(2, 1, family);
    let mut inside = match family {
        Family::Ipv4 => 0x0800,
        Family::Ipv6 => 0x86dd,
    };
    for (ethertype, tag) in tags.iter().rev() {
        frame.headers.insert(1, Header::Vlan(*tag, inside));
        inside = *ethertype;
    }
    for ethernet in frame.ethernets().take(1) {
        ethernet.ethertype = inside;
    }
    frame
}

/// What a worker and the XDP program have counted of packets that might be ours.
fn counted(workers: &Workers) -> (u64, u64) {
    let ours = workers.total(Counter::NicRxPackets) + xdp(workers, XdpCounter::Stalled);
    (ours, xdp(workers, XdpCounter::OtherVlan))
}

/// Who is to get a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Ours,
    Kernels,
    Nobodys,
}

/// These 802.1Q tags, outermost first, each with its EtherType.
fn tags(ids: &[u16]) -> Vec<(u16, u16)> {
    ids.iter().map(|id| (ETHERTYPE_VLAN, *id)).collect()
}

/// Only frames with the underlay's tag and no other reach a worker.
fn only_our_tag(lab: &Lab) -> Result<()> {
    const ROUNDS: u64 = 10;
    let node = lab.node(1);
    let wire = Injector::open(lab.fabric(), &Fabric::port(1))?;
    // What is not ours, the kernel has no interface for, or gives to the one below, where it is as good as untagged.
    let cases = [
        ("our tag", tags(&[ID]), Whose::Ours),
        (
            "our tag, with a priority",
            tags(&[5 << 13 | ID]),
            Whose::Ours,
        ),
        ("another tag", tags(&[ID + 1]), Whose::Nobodys),
        ("no tag", tags(&[]), Whose::Kernels),
        ("a priority alone", tags(&[5 << 13]), Whose::Kernels),
        ("our tag twice", tags(&[ID, ID]), Whose::Nobodys),
        (
            "our tag as a provider's",
            vec![(ETHERTYPE_QINQ, ID)],
            Whose::Nobodys,
        ),
    ];
    for family in lab.families() {
        for (name, tags, whose) in &cases {
            let what = || format!("{family}, {name}");
            let frame = with_tags(lab, family, tags).encode();
            let before = counted(&quiet(lab, node)?);
            let marker = b"ripstop";
            let arrivals = Capture::start_filtered(lab.pod(1, 0), "eth0", 1000, |frame| {
                frame.direction == Direction::In && common::find(&frame.bytes, marker).is_some()
            })?;
            (0..ROUNDS).try_for_each(|_round| wire.send(&frame))?;
            let after = counted(&quiet(lab, node)?);
            let found = (after.0 - before.0, after.1 - before.1);
            let expected = match whose {
                Whose::Ours => (ROUNDS, 0),
                Whose::Kernels | Whose::Nobodys => (0, ROUNDS),
            };
            ensure!(
                found == expected,
                "{}: for workers and not ours are {found:?} and not {expected:?}",
                what()
            );
            if *whose == Whose::Ours {
                arrivals.wait_for(10, PATIENCE).with_context(what)?;
            }
            let arrived = arrivals.stop().frames.len();
            println!("{}: {arrived} arrived", what());
            ensure!(
                *whose != Whose::Nobodys || arrived == 0,
                "{}: {arrived} arrived",
                what()
            );
        }
    }
    Ok(())
}

fn dual(backend: Backend) -> LabBuilder {
    Lab::builder().backend(backend).families(Families::Dual)
}

#[test]
fn vxlan_over_a_vlan() -> Result<()> {
    every_kind_of_traffic(dual(Backend::Vxlan), Underlay::Vlan(ID), |_lab| Ok(()))
}

#[test]
fn ipip_over_a_vlan() -> Result<()> {
    let lab = Lab::builder().backend(Backend::Ipip);
    every_kind_of_traffic(lab, Underlay::Vlan(ID), |_lab| Ok(()))
}

#[test]
fn host_gw_over_a_vlan() -> Result<()> {
    every_kind_of_traffic(dual(Backend::HostGw), Underlay::Vlan(ID), |_lab| Ok(()))
}

/// On a lab of their own, where the kernel has nothing to carry that is not ours.
#[test]
fn only_frames_of_our_vlan_are_ours() -> Result<()> {
    let ipip = Lab::builder().backend(Backend::Ipip);
    for lab in [dual(Backend::Vxlan), ipip] {
        lab.underlay(Underlay::Vlan(ID)).ripstop(2).run(|lab| {
            lab.start_ripstop()?;
            only_our_tag(lab)
        })?;
    }
    Ok(())
}

#[test]
fn vxlan_over_a_bond_with_a_spare_nic() -> Result<()> {
    let underlay = Underlay::Bond(BondMode::ActiveBackup);
    every_kind_of_traffic(dual(Backend::Vxlan), underlay, |lab| {
        each_nic_fails(lab, false)
    })
}

#[test]
fn vxlan_over_a_bond_of_two_nics() -> Result<()> {
    let underlay = Underlay::Bond(BondMode::BalanceXor);
    every_kind_of_traffic(dual(Backend::Vxlan), underlay, |lab| {
        both_nics_carry(lab)?;
        each_nic_fails(lab, true)
    })
}

#[test]
fn ipip_over_a_bond_agreed_upon_with_the_switch() -> Result<()> {
    let lab = Lab::builder().backend(Backend::Ipip);
    every_kind_of_traffic(lab, Underlay::Bond(BondMode::Lacp), both_nics_carry)
}

#[test]
fn vxlan_over_a_vlan_on_a_bond_with_a_spare_nic() -> Result<()> {
    let underlay = Underlay::VlanOnBond(BondMode::ActiveBackup, ID);
    let lab = Lab::builder().families(Families::Ipv6);
    every_kind_of_traffic(lab, underlay, |lab| each_nic_fails(lab, false))
}

#[test]
fn ipip_over_a_vlan_on_a_bond_of_two_nics() -> Result<()> {
    let underlay = Underlay::VlanOnBond(BondMode::BalanceXor, ID);
    let lab = Lab::builder().backend(Backend::Ipip);
    every_kind_of_traffic(lab, underlay, both_nics_carry)
}

/// Whether a node's NIC takes tags off the frames that it receives, as ethtool says.
fn takes_tags_off(node: &Node) -> Result<bool> {
    let text = node.output(&["ethtool", "-k", "eth0"])?;
    Ok(text.contains("rx-vlan-offload: on"))
}

/// The XDP program would not see a tag that the NIC has taken off: the data plane has it leave the tags on, and undoes that.
#[test]
fn a_driver_leaves_the_tags_on() -> Result<()> {
    let lab = Lab::builder().underlay(Underlay::Vlan(ID));
    lab.ripstop(1).linux(1).run(|lab| {
        let node = lab.node(1);
        vm::plug_in(lab, node, 1)?;
        ensure!(takes_tags_off(node)?, "eth0 of n1 leaves tags on by itself");
        lab.start_ripstop()?;
        vm::reaches_the_switch(node)?;
        talk(lab, Family::Ipv4, [1, 2])?;
        workers_carry_all(lab, node)?;
        ensure!(!takes_tags_off(node)?, "eth0 of n1 takes tags off");
        node.signal_dataplane(SIGTERM)?;
        wait_until("the data plane has ended", PATIENCE, || {
            !node.dataplane_is_running()
        })?;
        ensure!(takes_tags_off(node)?, "eth0 of n1 leaves tags on for ever");
        Ok(())
    })
}

/// The kernel takes a NIC with a running worker into a bond, and lets it go: only a program on the bond itself would be in the way.
#[test]
fn a_nic_with_a_worker_leaves_its_bond_and_comes_back() -> Result<()> {
    let underlay = Underlay::Bond(BondMode::BalanceXor);
    Lab::builder().underlay(underlay).ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(1);
        let (port, bond) = (Fabric::uplink_port(1, 1), Fabric::bond(1));
        both_nics_carry(lab)?;
        // The switch first: it would go on sending there.
        vm::command(lab.fabric(), &format!("ip link set {port} nomaster"))?;
        vm::command(node, "ip link set eth1 nomaster")?;
        wait_until("the node's table has eth0 alone", PATIENCE, || {
            node.controlplane_log().contains("bond0 (eth0)")
        })?;
        let start = sent_and_received(node)?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        for (from, to) in [(one, other), (other, one)] {
            let report = UdpFlow::new(from, to)
                .flows(FLOWS)
                .rate(RATE)
                .count(256)
                .run()?;
            ensure!((report.received, report.corrupt) == (256, 0), "{report}");
        }
        let carried = grown(node, &start)?;
        println!("without eth1: {carried:?}");
        ensure!(carried["eth1"] == [0, 0], "{carried:?}");
        vm::command(node, "ip link set eth1 down")?;
        vm::command(node, "ip link set eth1 master bond0")?;
        vm::command(lab.fabric(), &format!("ip link set {port} down"))?;
        vm::command(lab.fabric(), &format!("ip link set {port} master {bond}"))?;
        both_nics_carry(lab)?;
        ensure!(node.dataplane_is_running(), "{}", node.dataplane_log());
        check_conservation(node.name(), &quiet(lab, node)?)
    })
}
