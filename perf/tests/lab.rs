//! The lab tested on itself, with plain Linux nodes only: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 ─ flannel.1 ═══ fabric ═══ flannel.1 ─ n2 ─ n2p0
//!                               ║
//!                            attacker
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::panic::AssertUnwindSafe;
use core::time::Duration;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use ripstop_perf::{
    Capture, Direction, Fabric, Host, Injector, Ipv4, KernelCounters, Lab, Leases, Ping,
    UDP_PAYLOAD_MIN, Udp, UdpChecksum, UdpFlow, VxlanFrame, address, tcp_transfer, udp_echo,
    udp_payload_max, wait_until, wire_faults,
};

const SECOND: Duration = Duration::from_secs(1);

/// Reads the counters of every host of a lab.
fn counters(lab: &Lab) -> Result<Vec<(String, KernelCounters)>> {
    lab.hosts()
        .iter()
        .map(|host| Ok((host.name().to_owned(), host.kernel_counters()?)))
        .collect()
}

fn assert_no_damage(lab: &Lab, before: &[(String, KernelCounters)]) -> Result<()> {
    for ((name, before), (_, after)) in before.iter().zip(counters(lab)?) {
        assert_eq!(
            after.since(before).damage(),
            [],
            "damaged packets arrived at {name}"
        );
    }
    Ok(())
}

#[test]
fn pods_of_plain_linux_nodes_talk() -> Result<()> {
    let lab = Lab::builder().linux(2).pods(2).up()?;
    let before = counters(&lab)?;
    let mtu = lab.pod_mtu();
    assert_eq!(lab.pod_pairs().len(), 2);
    for (from, to) in lab.pod_pairs() {
        for ping in [
            Ping::new(from, to),
            Ping::new(from, to).payload_bytes(1),
            Ping::new(from, to).full(mtu),
        ] {
            let report = ping.count(3).run()?;
            assert_eq!(
                (report.received, report.failed),
                (3, vec![]),
                "{} to {}",
                from.name(),
                to.name()
            );
            assert_eq!(report.ttl, Some(62), "two routers between pods");
        }
        let full = udp_payload_max(mtu);
        let echo = udp_echo(from, to, &[0, 1, 64, 511, 1000, full - 1, full])?;
        assert_eq!(echo.failed, [], "{} to {}", from.name(), to.name());
        let tcp = tcp_transfer(from, to, 3_000_001)?;
        assert_eq!(tcp.bytes_each_way, 3_000_001);
    }
    // Within a node, and from a node itself: no tunnel, and the tunnel's own address.
    assert_eq!(Ping::new(lab.pod(1, 0), lab.pod(1, 1)).run()?.received, 1);
    assert_eq!(Ping::new(lab.node(1), lab.pod(2, 1)).run()?.received, 1);
    // Out of the pod network, masqueraded.
    assert_eq!(Ping::new(lab.pod(1, 0), lab.fabric()).run()?.received, 1);
    assert_no_damage(&lab, &before)
}

#[test]
fn a_packet_above_the_mtu_is_refused_and_not_cut() -> Result<()> {
    let lab = Lab::builder().linux(2).mtu(1400).up()?;
    let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
    assert_eq!(lab.pod_mtu(), 1350);
    assert_eq!(Ping::new(from, to).full(1350).run()?.received, 1);
    let ping = Ping::new(from, to).full(1351).run()?;
    assert_eq!(ping.received, 0);
    assert!(
        ping.failed[0].contains("Message too long"),
        "{:?}",
        ping.failed
    );
    let echo = udp_echo(from, to, &[udp_payload_max(1350), udp_payload_max(1351)])?;
    assert_eq!(echo.received, 1);
    assert_eq!(echo.failed[0].0, udp_payload_max(1351));
    // Without DF the pod sends fragments, and the far end joins them.
    assert_eq!(Ping::new(from, to).payload_bytes(4000).run()?.received, 1);
    Ok(())
}

#[test]
fn a_plain_linux_node_is_as_flannel_leaves_it() -> Result<()> {
    let lab = Lab::builder().linux(3).up()?;
    let node = lab.node(1);
    let link = node.output(&["ip", "-d", "link", "show", "flannel.1"])?;
    for part in [
        "mtu 1450",
        "link/ether 02:52:53:00:00:01",
        "vxlan id 1 local 10.199.0.11 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto",
        " udpcsum noudp6zerocsumtx noudp6zerocsumrx",
        "addrgenmode eui64",
    ] {
        assert!(link.contains(part), "{part:?} is not in {link}");
    }
    let addresses = node.output(&["ip", "-4", "-br", "addr", "show", "flannel.1"])?;
    assert!(addresses.contains("10.244.1.0/32"), "{addresses}");
    let lines = |argv: &[&str]| -> Result<Vec<String>> {
        let mut lines: Vec<String> = node
            .output(argv)?
            .lines()
            .map(|line| line.trim().to_owned())
            .collect();
        lines.sort();
        Ok(lines)
    };
    assert_eq!(
        lines(&["ip", "-d", "route", "show", "table", "main"])?,
        [
            "unicast 10.199.0.0/24 dev eth0 proto kernel scope link src 10.199.0.11",
            "unicast 10.244.1.0/24 dev cni0 proto kernel scope link src 10.244.1.1",
            "unicast 10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto boot scope global onlink",
            "unicast 10.244.3.0/24 via 10.244.3.0 dev flannel.1 proto boot scope global onlink",
            "unicast default via 10.199.0.1 dev eth0 proto boot scope global",
        ]
    );
    assert_eq!(
        lines(&["ip", "-4", "neigh", "show", "dev", "flannel.1"])?,
        [
            "10.244.2.0 lladdr 02:52:53:00:00:02 PERMANENT",
            "10.244.3.0 lladdr 02:52:53:00:00:03 PERMANENT"
        ]
    );
    assert_eq!(
        lines(&["bridge", "fdb", "show", "dev", "flannel.1"])?,
        [
            "02:52:53:00:00:02 dst 10.199.0.12 self permanent",
            "02:52:53:00:00:03 dst 10.199.0.13 self permanent",
        ]
    );
    let pod_routes = lab.pod(1, 0).output(&["ip", "route"])?;
    assert!(
        pod_routes.contains("default via 10.244.1.1"),
        "{pod_routes}"
    );
    assert!(
        pod_routes.contains("10.244.0.0/16 via 10.244.1.1"),
        "{pod_routes}"
    );
    Ok(())
}

#[test]
fn plain_linux_packets_look_as_on_a_wire() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let capture = Capture::start(lab.fabric(), &Fabric::port(1), 60_000)?;
    tcp_transfer(lab.pod(1, 0), lab.pod(2, 0), 8 << 20)?;
    let full = udp_payload_max(lab.pod_mtu());
    assert_eq!(
        udp_echo(lab.pod(1, 0), lab.pod(2, 0), &[1, full])?.failed,
        []
    );
    let captured = capture.stop();
    assert_eq!(captured.missed, 0);
    let (mut tunneled, mut full_size) = ([0, 0], 0);
    for frame in &captured.frames {
        let faults = wire_faults(&frame.bytes, lab.mtu());
        assert_eq!(
            faults,
            Vec::<String>::new(),
            "{:?} frame of {} bytes",
            frame.direction,
            frame.bytes.len()
        );
        let Ok(packet) = VxlanFrame::parse(&frame.bytes) else {
            continue;
        };
        full_size += usize::from(frame.bytes.len() == 1514);
        let (from, to) = match frame.direction {
            Direction::In => (1, 2),
            Direction::Out => (2, 1),
        };
        tunneled[usize::from(frame.direction == Direction::Out)] += 1;
        // The fields that flannel fixes; the source port and the identification are free.
        let expected = lab.tunnel_frame(from, to);
        assert_eq!(packet.ethernet, expected.ethernet);
        assert_eq!(packet.vxlan, expected.vxlan);
        assert_eq!(packet.inner_ethernet, expected.inner_ethernet);
        assert_eq!(
            packet.ip,
            Ipv4 {
                identification: packet.ip.identification,
                ..expected.ip
            }
        );
        assert_eq!(
            packet.udp,
            Udp {
                source: packet.udp.source,
                ..expected.udp
            }
        );
    }
    // 8 MB each way in segments of 1398 bytes.
    assert!(
        tunneled[0] > 6000 && tunneled[1] > 6000,
        "{tunneled:?} tunnel packets"
    );
    assert!(full_size > 11_000, "{full_size} full-size frames");
    Ok(())
}

#[test]
fn without_the_wire_s_settings_the_look_test_fails() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let offloads = [
        "ethtool", "-K", "eth0", "tx", "on", "sg", "on", "gso", "on", "tso", "on",
    ];
    lab.node(1).output(&offloads)?;
    let capture = Capture::start(lab.fabric(), &Fabric::port(1), 10_000)?;
    tcp_transfer(lab.pod(1, 0), lab.pod(2, 0), 2 << 20)?;
    let captured = capture.stop();
    let faults: Vec<String> = captured
        .frames
        .iter()
        .flat_map(|frame| wire_faults(&frame.bytes, lab.mtu()))
        .collect();
    assert!(
        faults.iter().any(|fault| fault.contains("checksum")),
        "an unfinished checksum goes unnoticed"
    );
    Ok(())
}

#[test]
fn a_flow_is_counted_packet_by_packet() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let before = counters(&lab)?;
    let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
    let links = to.link_counters("eth0")?;
    let sizes = [UDP_PAYLOAD_MIN, 64, 500, udp_payload_max(lab.pod_mtu())];
    let there = UdpFlow::new(from, to)
        .flows(4)
        .payload_sizes(&sizes)
        .rate(10_000)
        .count(8001)
        .start()?;
    let back = UdpFlow::new(to, from)
        .rate(2000)
        .duration(SECOND / 2)
        .start()?;
    let (there, back) = (there.wait(), back.wait());
    assert!(there.is_perfect(), "{there}");
    assert_eq!((there.sent, there.received), (8001, 8001));
    assert!(back.is_perfect(), "{back}");
    assert!(there.latency_p50 > Duration::ZERO && there.latency_p50 <= there.latency_p99);
    let arrived = to.link_counters("eth0")?.rx_packets - links.rx_packets;
    assert!(arrived >= 8001, "the interface counted {arrived} packets");
    assert_no_damage(&lab, &before)
}

#[test]
fn a_background_flow_can_be_watched_and_stopped() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let flow = UdpFlow::new(lab.pod(2, 0), lab.pod(1, 0))
        .flows(2)
        .rate(5000)
        .start()?;
    wait_until("500 packets have arrived", 10 * SECOND, || {
        flow.snapshot().received >= 500
    })?;
    // A capture ends when it is stopped, not when the traffic ends, and one that is full says so.
    let capture = Capture::start(lab.node(1), "eth0", 100)?;
    capture.wait_for(100, 10 * SECOND)?;
    let captured = capture.stop();
    assert_eq!(captured.frames.len(), 100);
    assert!(captured.missed > 0);
    let report = flow.stop();
    assert!(report.is_perfect() && report.received >= 500, "{report}");
    Ok(())
}

/// An nft rule in the receiving pod throws packets away ahead of the socket and counts them: the
/// sink must miss exactly so many.
#[test]
fn the_sink_is_honest_about_loss() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
    let rules = lab.dir().join("loss.nft");
    fs::write(
        &rules,
        "table ip loss {
           counter lost { }
           chain input {
             type filter hook input priority 0;
             ip protocol udp numgen inc mod 10 < 3 counter name lost drop
           }
         }",
    )?;
    to.output(&["nft", "-f", &rules.to_string_lossy()])?;
    let report = UdpFlow::new(from, to)
        .flows(3)
        .rate(10_000)
        .count(5000)
        .run()?;
    let counter = to.output(&["nft", "list", "counter", "ip", "loss", "lost"])?;
    let dropped: u64 = counter
        .split_whitespace()
        .skip_while(|word| *word != "packets")
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("nft prints the counter");
    assert_eq!(dropped, 1500, "three of ten");
    assert_eq!(
        (report.sent, report.received, report.lost),
        (5000, 3500, 1500),
        "{report}"
    );
    assert_eq!(
        (
            report.duplicated,
            report.reordered,
            report.corrupt,
            report.sink_drops
        ),
        (0, 0, 0, 0),
        "{report}"
    );
    assert!(
        !report.is_perfect() && report.longest_gap_packets >= 1,
        "{report}"
    );
    Ok(())
}

/// A bit flipped on the way, with a checksum that hides it, is seen by the sink all the same; so are
/// packets that arrive twice.
#[test]
fn the_sink_is_honest_about_damage_and_duplicates() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
    // Flips a bit in the pattern of each packet's payload; the kernel corrects the checksum for it.
    let rules = lab.dir().join("damage.nft");
    fs::write(
        &rules,
        "table ip damage {
           chain input {
             type filter hook input priority 0;
             udp length > 100 @th,512,16 set 0x1234
           }
         }",
    )?;
    to.output(&["nft", "-f", &rules.to_string_lossy()])?;
    let report = UdpFlow::new(from, to)
        .payload_sizes(&[50, 120])
        .rate(2000)
        .count(400)
        .run()?;
    assert_eq!(
        (report.received, report.corrupt, report.lost),
        (200, 200, 200),
        "{report}"
    );

    to.output(&["nft", "flush", "ruleset"])?;
    let capture = Capture::start_filtered(lab.fabric(), &Fabric::port(2), 1000, |frame| {
        frame.direction == Direction::Out && VxlanFrame::parse(&frame.bytes).is_ok()
    })?;
    let flow = UdpFlow::new(from, to)
        .rate(2000)
        .count(100)
        .drain(2 * SECOND)
        .start()?;
    capture.wait_for(100, 10 * SECOND)?;
    let captured = capture.stop();
    let injector = Injector::open(lab.fabric(), &Fabric::port(2))?;
    for frame in &captured.frames[..20] {
        injector.send(&frame.bytes)?;
    }
    let report = flow.wait();
    assert_eq!(
        (report.received, report.duplicated, report.lost),
        (100, 20, 0),
        "{report}"
    );
    Ok(())
}

#[test]
fn injected_frames_arrive_as_built() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let good = lab.tunnel_frame(1, 2);
    let mut frames = vec![good.clone()];
    let mut change = |change: fn(&mut VxlanFrame)| {
        let mut frame = good.clone();
        change(&mut frame);
        frames.push(frame);
    };
    change(|frame| frame.ip.source = address::ATTACKER);
    change(|frame| frame.ip.ttl = 1);
    change(|frame| frame.ip.options = vec![1; 8]);
    change(|frame| frame.ip.checksum = Some(0xdead));
    change(|frame| frame.ip.total_length = Some(1400));
    change(|frame| frame.ip.more_fragments = true);
    change(|frame| frame.udp.length = Some(9));
    change(|frame| frame.udp.checksum = UdpChecksum::Wrong(0xdead));
    change(|frame| frame.vxlan.vni = 2);
    change(|frame| frame.truncate_to = Some(45));
    let mut expected: Vec<Vec<u8>> = frames.iter().map(VxlanFrame::encode).collect();
    let capture = Capture::start_filtered(lab.node(2), "eth0", 100, |frame| {
        frame.direction == Direction::In && frame.bytes.starts_with(&address::underlay_mac(2).0)
    })?;
    let injector = Injector::open(lab.attacker(), "eth0")?;
    for frame in &expected {
        injector.send(frame)?;
    }
    capture.wait_for(expected.len(), 10 * SECOND)?;
    // A real exchange may have crossed (neighbour discovery); what was injected must all be there.
    for frame in capture.stop().frames {
        expected.retain(|other| *other != frame.bytes);
    }
    assert_eq!(
        expected,
        Vec::<Vec<u8>>::new(),
        "frames that did not arrive as built"
    );
    assert!(
        injector.send(&vec![0; 1515]).is_err(),
        "longer than the wire"
    );
    Ok(())
}

/// Kernel VXLAN alone lets anyone in who finds the port: the frame that `tunnel_frame` builds is
/// taken for a peer's. Tests of Ripstop's peer filter rest on this frame being good.
#[test]
fn the_good_frame_reaches_the_pod_and_a_bad_one_does_not() -> Result<()> {
    let lab = Lab::builder().linux(2).up()?;
    let injector = Injector::open(lab.attacker(), "eth0")?;
    let udp_to_nobody = |counters: &KernelCounters| counters.value("Udp.NoPorts");
    let pod = lab.pod(2, 0);
    let before = pod.kernel_counters()?;
    injector.send(&lab.tunnel_frame(1, 2).encode())?;
    wait_until("the datagram is in the pod", 10 * SECOND, || {
        pod.kernel_counters()
            .is_ok_and(|now| udp_to_nobody(&now.since(&before)) == 1)
    })?;
    let mut wrong_vni = lab.tunnel_frame(1, 2);
    wrong_vni.vxlan.vni = 2;
    injector.send(&wrong_vni.encode())?;
    let mut damaged = lab.tunnel_frame(1, 2);
    damaged.ip.checksum = Some(0xdead);
    let node = lab.node(2).kernel_counters()?;
    injector.send(&damaged.encode())?;
    wait_until("the node counts the damage", 10 * SECOND, || {
        lab.node(2)
            .kernel_counters()
            .is_ok_and(|now| !now.since(&node).damage().is_empty())
    })?;
    assert_eq!(udp_to_nobody(&pod.kernel_counters()?.since(&before)), 1);
    Ok(())
}

#[test]
fn queues_are_as_many_as_asked_for() -> Result<()> {
    let lab = Lab::builder().ripstop(1).linux(1).queues(3).up()?;
    let link = lab.node(1).output(&["ip", "-d", "link", "show", "eth0"])?;
    assert!(link.contains("numtxqueues 3 numrxqueues 3"), "{link}");
    let queues = lab.node(1).output(&["ls", "/sys/class/net/eth0/queues"])?;
    assert_eq!(queues.matches("rx-").count(), 3, "{queues}");
    Ok(())
}

#[test]
fn a_ripstop_node_has_its_files_and_nothing_of_flannel() -> Result<()> {
    let lab = Lab::builder().ripstop(1).linux(1).queues(2).up()?;
    let node = lab.node(1);
    let read = |path: &Path| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    };
    assert_eq!(
        read(&node.net_conf_file())?,
        serde_json::json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
    );
    for queue in 0..2 {
        let config = read(&node.queue_config_file(queue))?;
        assert_eq!(
            (&config["nic"], &config["queue"]),
            (&"eth0".into(), &queue.into())
        );
    }
    let leases: Leases = serde_json::from_value(read(&node.lease_file())?)?;
    assert_eq!(leases, lab.leases());
    assert_eq!(leases.leases.len(), 2);
    let mut fewer = lab.leases();
    fewer.leases.pop();
    node.write_leases(&fewer)?;
    assert_eq!(
        serde_json::from_value::<Leases>(read(&node.lease_file())?)?,
        fewer
    );
    assert_eq!(
        serde_json::from_value::<Leases>(read(&lab.lease_file())?)?,
        lab.leases()
    );
    let links = node.output(&["ip", "-br", "link"])?;
    assert!(
        !links.contains("flannel") && links.contains("cni0"),
        "{links}"
    );
    assert_eq!(
        Ping::new(node, lab.node(2)).run()?.received,
        1,
        "the underlay works"
    );
    assert_eq!(
        node.output(&["cat", "/proc/sys/net/ipv4/ip_forward"])?
            .trim(),
        "1"
    );
    Ok(())
}

/// Names of the namespaces of a lab that are there.
fn namespaces(lab: &str) -> Vec<String> {
    let prefix = format!("rs-{lab}-");
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

fn assert_gone(lab: &str, dir: &Path) {
    assert_eq!(namespaces(lab), Vec::<String>::new());
    assert!(!dir.exists(), "{} is still there", dir.display());
    assert!(!Lab::names().contains(&lab.to_owned()));
}

#[test]
fn nothing_is_left_after_a_drop() -> Result<()> {
    let lab = Lab::builder().linux(1).ripstop(1).up()?;
    let (name, dir) = (lab.name().to_owned(), lab.dir().to_owned());
    assert_eq!(namespaces(&name).len(), 6);
    assert!(Lab::names().contains(&name));
    drop(lab);
    assert_gone(&name, &dir);
    Ok(())
}

#[test]
fn nothing_is_left_after_a_panic() -> Result<()> {
    let lab = Lab::builder().linux(1).up()?;
    let (name, dir) = (lab.name().to_owned(), lab.dir().to_owned());
    let outcome = panic::catch_unwind(AssertUnwindSafe(move || {
        let _flow = UdpFlow::new(lab.node(1), lab.pod(1, 0)).start();
        panic!("on purpose");
    }));
    assert!(outcome.is_err());
    assert_gone(&name, &dir);
    Ok(())
}

#[test]
fn a_failed_test_takes_its_lab_with_it() {
    let mut found = None;
    let outcome: Result<()> = Lab::builder().linux(1).run(|lab| {
        let dump = lab.dump();
        for part in [
            "n1p0",
            "10.199.0.11",
            "flannel.1",
            "table ip flannel-ipv4",
            "ripstop-dataplane",
        ] {
            assert!(dump.contains(part), "{part:?} is not in {dump}");
        }
        found = Some((lab.name().to_owned(), lab.dir().to_owned()));
        wait_until("never", Duration::ZERO, || false)
    });
    assert!(outcome.is_err_and(|error| error.to_string().contains("still not: never")));
    let (name, dir) = found.expect("the test ran");
    assert_gone(&name, &dir);
}

#[test]
fn nothing_is_left_of_a_lab_that_could_not_come_up() -> Result<()> {
    let name = format!("half-{}", std::process::id());
    let obstacle = format!("rs-{name}-n1");
    assert!(
        Command::new("ip")
            .args(["netns", "add", &obstacle])
            .status()?
            .success()
    );
    let error = Lab::builder()
        .linux(1)
        .name(&name)
        .up()
        .expect_err("a namespace is in the way");
    assert!(format!("{error:#}").contains(&obstacle), "{error:#}");
    assert_eq!(namespaces(&name), Vec::<String>::new());
    assert!(!Lab::names().contains(&name));
    Ok(())
}

#[test]
fn two_labs_run_side_by_side() -> Result<()> {
    let (one, two) = (Lab::builder().linux(2).up()?, Lab::builder().linux(2).up()?);
    assert_ne!(one.name(), two.name());
    let flow = |lab: &Lab| {
        UdpFlow::new(lab.pod(1, 0), lab.pod(2, 0))
            .rate(2000)
            .count(1000)
            .start()
    };
    let flows = (flow(&one)?, flow(&two)?);
    assert_eq!(Ping::new(two.pod(1, 0), two.pod(2, 0)).run()?.received, 1);
    for report in [flows.0.wait(), flows.1.wait()] {
        assert!(report.is_perfect(), "{report}");
    }
    drop(one);
    assert_eq!(Ping::new(two.pod(2, 0), two.pod(1, 0)).run()?.received, 1);
    Ok(())
}

#[test]
fn bad_labs_are_refused() {
    let error = |lab: Result<Lab>| format!("{:#}", lab.expect_err("is refused"));
    assert!(error(Lab::builder().up()).contains("at least one node"));
    assert!(error(Lab::builder().linux(51).up()).contains("at most 50 nodes"));
    assert!(error(Lab::builder().linux(1).name("UP").up()).contains("lab name"));
    assert!(error(Lab::builder().linux(1).mtu(100).up()).contains("MTU"));
    assert!(error(Lab::open("no-such-lab")).contains("no lab"));
}

/// The command line leaves a lab up, finds it again, and takes it down.
#[test]
fn the_command_line_brings_up_runs_and_takes_down() -> Result<()> {
    let name = format!("cli-{}", std::process::id());
    let run = |arguments: &[&str]| -> Result<(bool, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ripstop-perf"));
        let output = command.arg("lab").args(arguments).output()?;
        Ok((
            output.status.success(),
            String::from_utf8([output.stdout, output.stderr].concat())?,
        ))
    };
    let up = run(&[
        "up",
        "--name",
        &name,
        "--nodes",
        "1",
        "--linux",
        "2",
        "--no-ripstop",
    ])?;
    assert!(up.0 && up.1.contains("n3p0  eth0 10.244.3.2"), "{}", up.1);
    let again = run(&["up", "--name", &name, "--nodes", "1", "--no-ripstop"])?;
    assert!(!again.0 && again.1.contains("already up"), "{}", again.1);
    // Another lab of this process must not take it for an orphan.
    drop(Lab::builder().linux(1).up()?);
    let show = run(&["show", "--name", &name])?;
    assert!(
        show.0 && show.1.contains("10.199.0.66") && show.1.contains("plain Linux"),
        "{}",
        show.1
    );
    let ping = run(&[
        "exec",
        "--name",
        &name,
        "n2p0",
        "--",
        "ping",
        "-c",
        "1",
        "-W",
        "5",
        "10.244.3.2",
    ])?;
    assert!(ping.0 && ping.1.contains("1 received"), "{}", ping.1);
    let nobody = run(&["exec", "--name", &name, "n9", "--", "true"])?;
    assert!(!nobody.0 && nobody.1.contains("n1p0"), "{}", nobody.1);
    let down = run(&["down", "--name", &name])?;
    assert!(down.0, "{}", down.1);
    assert_eq!(namespaces(&name), Vec::<String>::new());
    assert!(!run(&["show", "--name", &name])?.0);
    Ok(())
}

/// Stands in for a Ripstop program: prints its arguments and stays, under the program's name.
fn write_stand_in(dir: &Path, program: &str, script: &str) -> Result<()> {
    let path = dir.join(program);
    fs::write(
        &path,
        format!("#!/bin/bash\necho {program} \"$@\"\n{script}\n"),
    )?;
    Ok(fs::set_permissions(
        &path,
        fs::Permissions::from_mode(0o755),
    )?)
}

#[test]
fn the_command_line_starts_and_ends_processes() -> Result<()> {
    let name = format!("procs-{}", std::process::id());
    let bin = std::env::temp_dir().join(format!("ripstop-perf-{name}"));
    fs::create_dir_all(&bin)?;
    let run = |arguments: &[&str]| -> Result<(bool, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ripstop-perf"));
        command.env("RIPSTOP_BIN_DIR", &bin);
        let output = command
            .arg("lab")
            .args(arguments)
            .args(["--name", &name])
            .output()?;
        Ok((
            output.status.success(),
            String::from_utf8([output.stdout, output.stderr].concat())?,
        ))
    };
    let missing = run(&["up", "--nodes", "1"])?;
    assert!(
        !missing.0 && missing.1.contains("cargo build --workspace"),
        "{}",
        missing.1
    );
    assert_eq!(namespaces(&name), Vec::<String>::new());

    write_stand_in(
        &bin,
        "ripstop-dataplane",
        "exec -a ripstop-dataplane sleep 600",
    )?;
    write_stand_in(&bin, "ripstop-controlplane", "echo no leases; exit 1")?;
    let ended = run(&["up", "--nodes", "1"])?;
    assert!(
        !ended.0 && ended.1.contains("did not stay up") && ended.1.contains("no leases"),
        "{}",
        ended.1
    );
    assert_eq!(namespaces(&name), Vec::<String>::new());

    write_stand_in(
        &bin,
        "ripstop-controlplane",
        "exec -a ripstop-controlplane sleep 600",
    )?;
    let up = run(&["up", "--nodes", "2", "--linux", "1"])?;
    assert!(up.0, "{}", up.1);
    let lab = Lab::open(&name)?;
    let processes: Vec<(i32, i32)> = lab
        .nodes()
        .iter()
        .filter_map(|node| Some((node.dataplane_pid()?, node.controlplane_pid()?)))
        .collect();
    assert_eq!(processes.len(), 2, "none on the plain Linux node");
    assert!(
        up.1.contains(&format!("data plane: pid {}", processes[0].0)),
        "{}",
        up.1
    );
    let node = lab.node(1);
    let inside = node.output(&["ip", "netns", "pids", node.netns().name()])?;
    for pid in [processes[0].0, processes[0].1] {
        assert!(
            inside.lines().any(|line| line == pid.to_string()),
            "{pid} is not among {inside}"
        );
    }
    let dir = lab.dir().join("n1");
    let expected = format!(
        "ripstop-controlplane --net-config-path {} --lease-file {} --node-name n1 --iface eth0 --run-dir {} --subnet-file {}\n",
        dir.join("net-conf.json").display(),
        lab.lease_file().display(),
        dir.join("run").display(),
        dir.join("subnet.env").display(),
    );
    assert_eq!(node.controlplane_log(), expected);
    let expected = format!(
        "ripstop-dataplane --config-dir {} --run-dir {}\n",
        dir.join("config").display(),
        dir.join("run").display()
    );
    assert_eq!(node.dataplane_log(), expected);
    // The lab that was opened ends processes that another run has started.
    node.signal_dataplane(libc::SIGTERM)?;
    wait_until("the data plane has ended", 10 * SECOND, || {
        !node.dataplane_is_running()
    })?;
    assert!(node.signal_dataplane(libc::SIGTERM).is_err());
    node.kill_controlplane();
    assert_eq!(node.controlplane_pid(), None);
    drop(lab);
    let down = run(&["down"])?;
    assert!(down.0, "{}", down.1);
    for (dataplane, controlplane) in processes {
        for pid in [dataplane, controlplane] {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            assert!(!command_line.starts_with(b"ripstop-"), "{pid} still runs");
        }
    }
    assert_eq!(namespaces(&name), Vec::<String>::new());
    fs::remove_dir_all(&bin)?;
    Ok(())
}

/// A lab whose owner was killed is taken down by the next one.
#[test]
fn an_orphaned_lab_is_swept() -> Result<()> {
    let name = format!("orphan-{}", std::process::id());
    Lab::builder().linux(1).name(&name).up()?.persist()?;
    // Give it an owner that is no more: this process's pid, started at another time.
    let path = Path::new("/run/ripstop-lab").join(format!("{name}.json"));
    let mut state: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    state["owner"] = serde_json::json!({ "pid": std::process::id(), "start_time": 1 });
    let dir = Lab::open(&name)?.dir().to_owned();
    fs::write(&path, state.to_string())?;
    drop(Lab::builder().linux(1).up()?);
    // A lab of another test may have come first, and still be at it.
    wait_until("the orphan is gone", 10 * SECOND, || !path.exists())?;
    assert_gone(&name, &dir);
    Ok(())
}
