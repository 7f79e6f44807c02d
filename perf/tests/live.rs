//! The underlay changes while traffic flows: who has nothing to do with it loses nothing. As root, for real.
//!
//! ```text
//!   n1 (Ripstop) ─┐                      ┌─ n3
//!                 ├─ segment 0 ═ router ═ segment 1
//!   n2, n4       ─┘     (or two)
//! ```
//!
//! Each step prints what it has cost the flows that it concerns, which is bounded; what it has cost the others is
//! asserted to be nothing.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::time::Duration;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ripstop_fib::stats::Counter;
use ripstop_perf::{
    Backend, Capture, Direction, Fabric, Families, Family, Frame, Header, Host, Lab, LabBuilder,
    Mac, Node, Ping, TrafficHandle, TrafficReport, UdpFlow, address, machine, run,
    tcp_transfer_over, udp_payload_max, wait_until,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);
/// Packets a second of each flow.
const RATE: u64 = 1000;
/// A packet that is not there after so long without any straggler is lost.
const QUIET: Duration = Duration::from_millis(400);
/// What a worker's queue of rip0 holds, and loses when the worker gives the queue up: mostly nothing, but on busy cores
/// what has come in while it waited for one.
const GONE_MAX: u64 = 2048;
/// How long traffic runs on after a change.
const AFTERWARDS: Duration = Duration::from_millis(1500);

/// Flows that a change concerns, and flows that it does not.
struct Live {
    related: Vec<(String, TrafficHandle)>,
    unrelated: Vec<(String, TrafficHandle)>,
}

impl Live {
    /// Starts traffic both ways between the first pods of pairs of nodes.
    fn start(lab: &Lab, related: &[[u8; 2]], unrelated: &[[u8; 2]]) -> Result<Self> {
        let start = |pairs: &[[u8; 2]]| -> Result<Vec<(String, TrafficHandle)>> {
            let both_ways = pairs
                .iter()
                .flat_map(|[one, other]| [[one, other], [other, one]]);
            both_ways
                .map(|[from, to]| {
                    let flow = UdpFlow::new(lab.pod(*from, 0), lab.pod(*to, 0))
                        .flows(8)
                        .payload_sizes(&[64, 400, 900])
                        .rate(RATE);
                    Ok((format!("n{from} to n{to}"), flow.start()?))
                })
                .collect()
        };
        let live = Self {
            related: start(related)?,
            unrelated: start(unrelated)?,
        };
        for (name, handle) in live.related.iter().chain(&live.unrelated) {
            wait_until(&format!("traffic flows from {name}"), PATIENCE, || {
                handle.snapshot().received > RATE / 4
            })?;
        }
        Ok(live)
    }

    /// Makes a change, and checks that all related flows arrive whole again. Prints what it has cost, and returns how
    /// many packets of the related flows are lost.
    #[expect(clippy::print_stdout, reason = "what a change costs is for the reader")]
    fn step(&self, what: &str, change: impl FnOnce() -> Result<()>) -> Result<u64> {
        let lost = |flows: &[(String, TrafficHandle)]| -> Vec<u64> {
            let of =
                |(_, handle): &(String, TrafficHandle)| handle.lost_before(&handle.mark(), QUIET);
            flows.iter().map(of).collect()
        };
        // Of packets that were only late, the first count is too high.
        let since = |before: &[u64], after: &[u64]| -> Vec<u64> {
            let pairs = before.iter().zip(after);
            pairs
                .map(|(before, after)| after.saturating_sub(*before))
                .collect()
        };
        let before = lost(&self.related);
        let start = Instant::now();
        change().with_context(|| what.to_owned())?;
        let took = start.elapsed();
        std::thread::sleep(AFTERWARDS);
        let after = lost(&self.related);
        // What is sent from here on arrives.
        std::thread::sleep(Duration::from_millis(300));
        let later = since(&after, &lost(&self.related));
        let cost = since(&before, &after);
        let names = self.related.iter().map(|(name, _)| name);
        let costs: Vec<String> = names
            .zip(&cost)
            .map(|(name, lost)| format!("{name} {lost}"))
            .collect();
        println!(
            "{what} ({took:.1?}): lost of {RATE}/s: {}",
            costs.join(", ")
        );
        ensure!(
            later.iter().all(|lost| *lost == 0),
            "{what}: still losing after {AFTERWARDS:?}: {later:?}"
        );
        Ok(cost.iter().sum())
    }

    /// Ends all traffic; the unrelated flows must have lost nothing at all.
    #[expect(clippy::print_stdout, reason = "the account is for the reader")]
    fn finish(self, lab: &Lab) -> Result<()> {
        let stop = |flows: Vec<(String, TrafficHandle)>| -> Vec<(String, TrafficReport)> {
            flows
                .into_iter()
                .map(|(name, handle)| (name, handle.stop()))
                .collect()
        };
        let (related, unrelated) = (stop(self.related), stop(self.unrelated));
        for (name, report) in &related {
            println!("  related   {name}: {report}");
            assert_eq!((report.duplicated, report.corrupt), (0, 0), "{name}");
        }
        for (name, report) in &unrelated {
            println!("  unrelated {name}: {report}");
        }
        for node in lab.ripstop_nodes() {
            let door = node.link_counters("rip0")?;
            println!(
                "  {}: drops {:?}, rip0 {door:?}",
                node.name(),
                node.workers()?.drops()
            );
        }
        for (name, report) in unrelated {
            // Order is not asked for: the pods' own kernels shuffle a flow when the cores are busy.
            assert_eq!(
                (report.lost, report.duplicated, report.corrupt),
                (0, 0, 0),
                "{name}: {report}"
            );
        }
        Ok(())
    }
}

/// What a node sends to a pod of another: the next frame with its address on the node's port.
fn next_frame(lab: &Lab, from: u8, uplink: u8, to: u8) -> Result<Frame> {
    let [wanted, own] = [address::pod(to, 0).octets(), address::pod(from, 0).octets()];
    let ends = [own, wanted].concat();
    let port = Fabric::uplink_port(from, uplink);
    let capture = Capture::start_filtered(lab.fabric(), &port, 1, move |frame| {
        frame.direction == Direction::In && frame.bytes.windows(8).any(|window| window == ends)
    })?;
    capture.wait_for(1, PATIENCE)?;
    let frames = capture.stop().frames;
    Frame::parse(&frames[0].bytes)
}

fn destination_mac(frame: &Frame) -> Option<Mac> {
    frame.headers.iter().find_map(|header| match header {
        Header::Ethernet(ethernet) => Some(ethernet.destination),
        Header::Vlan(..)
        | Header::Ipv4(_)
        | Header::Ipv6(_)
        | Header::Udp(_)
        | Header::Vxlan(_)
        | Header::Raw(_) => None,
    })
}

/// Waits until what a node sends to another has this form.
fn wait_for_form(
    lab: &Lab,
    what: &str,
    [from, uplink, to]: [u8; 3],
    form: impl Fn(&Frame) -> bool,
) -> Result<()> {
    let start = Instant::now();
    loop {
        let frame = next_frame(lab, from, uplink, to)?;
        if form(&frame) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "still not {what}: {frame:?}");
    }
}

/// An ARP announcement: this address is at this MAC.
fn announcement(ip: core::net::Ipv4Addr, mac: Mac) -> Vec<u8> {
    let ethernet = [&[0xff; 6], mac.0.as_slice(), &[0x08, 0x06]].concat();
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    let (octets, nobody) = (ip.octets(), [0xff; 6]);
    let mut frame = [
        ethernet.as_slice(),
        &kind,
        &mac.0,
        &octets,
        &nobody,
        &octets,
    ]
    .concat();
    frame.resize(60, 0);
    frame
}

/// Two Ripstop nodes on one segment, and plain nodes on it and behind a router.
fn routed() -> LabBuilder {
    Lab::builder().ripstop(2).linux(2).segments(&[0, 0, 1, 0])
}

fn workers_carry(node: &Node, packets: u64) -> Result<()> {
    let before = node.workers()?.total(Counter::NicTxPackets);
    wait_until("workers carry traffic", PATIENCE, || {
        let now = node
            .workers()
            .map(|workers| workers.total(Counter::NicTxPackets));
        now.is_ok_and(|now| now >= before + packets)
    })
}

#[test]
fn the_gateways_mac_address_changes() -> Result<()> {
    let _machine = machine();
    routed().run(|lab| {
        lab.start_ripstop()?;
        let live = Live::start(lab, &[[1, 3]], &[[1, 2], [1, 4]])?;
        let other = Mac([0x02, 0x52, 0x53, 0x07, 0, 0]);
        for (what, mac) in [
            ("another MAC address of the gateway", other),
            ("the first one again", address::router_mac(0, 0)),
        ] {
            live.step(what, || {
                run(lab.fabric(), &format!("ip link set br0 address {mac}"))?;
                for node in [1, 2, 4] {
                    let wire = ripstop_perf::Injector::open(lab.fabric(), &Fabric::port(node))?;
                    wire.send(&announcement(address::router(0, 0), mac))?;
                }
                wait_for_form(lab, "sent to the new address", [1, 0, 3], |frame| {
                    destination_mac(frame) == Some(mac)
                })
            })?;
        }
        workers_carry(lab.node(1), RATE)?;
        live.finish(lab)
    })
}

#[test]
fn the_underlays_route_changes() -> Result<()> {
    let _machine = machine();
    routed().routers(2).run(|lab| {
        let node = lab.node(1);
        let far = "10.199.1.0/24";
        run(
            node,
            &format!("ip route add {far} via {}", address::router(0, 0)),
        )?;
        lab.start_ripstop()?;
        let live = Live::start(lab, &[[1, 3]], &[[1, 2], [1, 4]])?;
        for number in [1, 0] {
            let via = address::router(0, number);
            live.step(&format!("the route over {via}"), || {
                run(node, &format!("ip route replace {far} via {via}"))?;
                wait_for_form(lab, "sent over the new router", [1, 0, 3], |frame| {
                    destination_mac(frame) == Some(address::router_mac(0, number))
                })
            })?;
        }
        // Both at once: each flow keeps to one, and both are used.
        live.step("the route over both", || {
            let [one, other] = [0, 1].map(|number| address::router(0, number));
            run(
                node,
                &format!("ip route replace {far} nexthop via {one} nexthop via {other}"),
            )?;
            for number in [0, 1] {
                wait_for_form(lab, "sent over both", [1, 0, 3], |frame| {
                    destination_mac(frame) == Some(address::router_mac(0, number))
                })?;
            }
            Ok(())
        })?;
        workers_carry(node, RATE)?;
        live.finish(lab)
    })
}

#[test]
fn a_peer_is_reached_without_a_tunnel_and_with_one_again() -> Result<()> {
    let _machine = machine();
    routed().direct_routing().run(|lab| {
        let node = lab.node(1);
        lab.start_ripstop()?;
        let live = Live::start(lab, &[[1, 2]], &[[1, 3], [1, 4]])?;
        let form = |what: &str, packets: usize| {
            wait_for_form(lab, what, [1, 0, 2], |frame| frame.packets() == packets)
        };
        form("without a tunnel", 1)?;
        let peer = format!("{}/32", lab.node(2).address());
        for _round in 0..2 {
            live.step("a gateway before the peer", || {
                run(
                    node,
                    &format!("ip route add {peer} via {}", address::FABRIC),
                )?;
                form("in the tunnel", 2)
            })?;
            live.step("no gateway", || {
                run(node, &format!("ip route del {peer}"))?;
                form("without a tunnel", 1)
            })?;
        }
        workers_carry(node, RATE)?;
        live.finish(lab)
    })
}

/// Workers send by both uplinks once every peer is reached by both: to n2 there are two ways from the start, so its
/// flows move over and back with those to n3.
#[test]
fn a_second_uplink_comes_and_goes() -> Result<()> {
    let _machine = machine();
    let lab = Lab::builder().ripstop(2).linux(1).segments(&[0, 1, 2]);
    lab.uplinks(2).run(|lab| {
        let node = lab.node(1);
        let [first, second] = [0, 1].map(|uplink| address::router(node.uplink(uplink).0, 0));
        let over_one = format!("via {first} dev eth0");
        let over_both = format!("nexthop {over_one} nexthop via {second} dev eth1");
        let peer = lab.node(2).address();
        run(node, &format!("ip route add {peer}/32 {over_both}"))?;
        run(node, &format!("ip route replace default {over_one}"))?;
        lab.start_ripstop()?;
        let live = Live::start(lab, &[[1, 2], [1, 3]], &[[2, 3]])?;
        for _round in 0..2 {
            let cost = live.step("a second uplink", || {
                run(node, &format!("ip route replace default {over_both}"))?;
                // The flows are many enough that some take each of both.
                for (uplink, name) in [(1, "second"), (0, "first")] {
                    for to in [2, 3] {
                        next_frame(lab, 1, uplink, to)
                            .with_context(|| format!("nothing to n{to} over the {name} uplink"))?;
                    }
                }
                Ok(())
            })?;
            assert_eq!(cost, 0, "packets lost for a second uplink");
            let cost = live.step("the second uplink gone", || {
                run(node, &format!("ip route replace default {over_one}")).map(drop)
            })?;
            // What its worker's queue of rip0 holds goes with it.
            assert!(cost <= GONE_MAX, "{cost} packets lost");
        }
        // The router is told by another protocol.
        let home = node.address();
        run(lab.fabric(), &format!("ip route replace {home}/32 dev br0"))?;
        live.step("a second uplink", || {
            run(node, &format!("ip route replace default {over_both}"))?;
            next_frame(lab, 1, 1, 3).map(drop)
        })?;
        live.step("the second uplink's link down", || {
            run(node, "ip link set eth1 down").map(drop)
        })?;
        workers_carry(node, RATE)?;
        live.finish(lab)
    })
}

/// MTU of a node's device.
fn mtu_of(node: &Node, device: &str) -> Result<String> {
    let link = node.output(&["ip", "-o", "link", "show", device])?;
    let mut words = link.split_whitespace().skip_while(|word| *word != "mtu");
    let mtu = words.nth(1).with_context(|| link.clone())?;
    Ok(mtu.to_owned())
}

/// Defect 11 of flannel: a device that is there keeps the MTU that it was made with.
#[test]
fn the_underlays_mtu_changes() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(1);
        // Short packets have nothing to do with it.
        let live = Live::start(lab, &[], &[[1, 2], [1, 3]])?;
        for (underlay, fits) in [(1400_u16, 1350_u16), (1500, 1450)] {
            live.step(&format!("an MTU of {underlay}"), || {
                run(node, &format!("ip link set eth0 mtu {underlay}"))?;
                for device in ["flannel.1", "rip0"] {
                    wait_until(&format!("{device} follows"), PATIENCE, || {
                        mtu_of(node, device).is_ok_and(|mtu| mtu == fits.to_string())
                    })?;
                }
                Ok(())
            })?;
            // The pod is told, and then fits.
            let full = Ping::new(lab.pod(1, 0), lab.pod(2, 0)).full(1450).run()?;
            assert_eq!(full.received == 1, fits == 1450, "{:?}", full.failed);
            if fits < 1450 {
                assert!(
                    full.failed[0].contains("Message too long"),
                    "{:?}",
                    full.failed
                );
            }
            let fitting = Ping::new(lab.pod(1, 0), lab.pod(2, 0)).full(fits).run()?;
            assert_eq!(fitting.failed, Vec::<String>::new(), "{fits} bytes");
            run(lab.pod(1, 0), "ip route flush cache")?;
        }
        live.finish(lab)
    })
}

/// Everything that the standby of a node consists of.
fn standby(node: &Node, device: &str) -> Result<Vec<String>> {
    let mut state = Vec::new();
    for command in [
        format!("ip -4 route show dev {device}"),
        format!("ip -6 route show dev {device} proto 82"),
        format!("ip neigh show dev {device} nud permanent"),
        format!("bridge fdb show dev {device}"),
    ] {
        let argv: Vec<&str> = command.split_whitespace().collect();
        let text = node.output(&argv)?;
        let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
        lines.sort();
        state.extend(lines);
    }
    Ok(state)
}

/// Defect 9 of flannel: a device that was deleted comes back without what leads to the peers.
#[test]
fn a_deleted_device_comes_back_with_all_its_peers() -> Result<()> {
    let _machine = machine();
    let lab = Lab::builder().ripstop(2).linux(1).families(Families::Dual);
    lab.run(|lab| {
        lab.start_ripstop()?;
        let node = lab.node(1);
        let live = Live::start(lab, &[], &[[1, 2], [1, 3]])?;
        for device in ["flannel.1", "flannel-v6.1"] {
            let before = standby(node, device)?;
            ensure!(before.len() >= 6, "{device}: {before:?}");
            live.step(&format!("{device} deleted"), || {
                run(node, &format!("ip link del {device}"))?;
                wait_until(&format!("{device} is back, whole"), PATIENCE, || {
                    standby(node, device).is_ok_and(|state| state == before)
                })
            })?;
        }
        live.finish(lab)?;
        // And it carries traffic.
        node.kill_dataplane();
        for family in Family::ALL {
            for to in [2, 3] {
                tcp_transfer_over(family, lab.pod(1, 0), lab.pod(to, 0), 100_000)?;
            }
        }
        Ok(())
    })
}

/// Defect 12 of flannel, VXLAN over IPv6 counted as 50 bytes; and 11 again: another MTU in net-conf.json takes effect
/// on the device that is there.
#[test]
fn the_mtu_is_that_of_the_tunnel() -> Result<()> {
    let _machine = machine();
    Lab::builder()
        .ripstop(2)
        .families(Families::Ipv6)
        .run(|lab| {
            lab.start_ripstop()?;
            let node = lab.node(1);
            assert_eq!(mtu_of(node, "flannel-v6.1")?, "1430");
            assert_eq!(mtu_of(node, "rip0")?, "1430");
            assert_eq!(lab.backend(), Backend::Vxlan);
            let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
            let full = Ping::over(Family::Ipv6, one, other).full(1430).run()?;
            assert_eq!(full.failed, Vec::<String>::new());

            node.kill_controlplane();
            node.write_net_conf(&json!({
                "EnableIPv4": false,
                "EnableIPv6": true,
                "IPv6Network": address::POD_NETWORK6,
                "Backend": { "Type": "vxlan", "MTU": 1400 },
            }))?;
            node.start_controlplane()?;
            wait_until("the device has the new MTU", PATIENCE, || {
                mtu_of(node, "flannel-v6.1").is_ok_and(|mtu| mtu == "1330")
            })?;
            wait_until("rip0 has the new MTU", PATIENCE, || {
                mtu_of(node, "rip0").is_ok_and(|mtu| mtu == "1330")
            })?;
            let bytes = udp_payload_max(1300);
            let ping = Ping::over(Family::Ipv6, one, other)
                .payload_bytes(bytes)
                .run()?;
            assert_eq!(ping.failed, Vec::<String>::new());
            Ok(())
        })
}
