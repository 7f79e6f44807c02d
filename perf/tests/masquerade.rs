//! In whose name packets arrive: as with flannel's iptables rules, in both modes: as root, for real.
//!
//! ```text
//!   n1p0, n1p1 ─ n1 ═╗
//!                    ╠═ fabric ─── attacker: everybody outside
//!         n2p0 ─ n2 ═╝
//! ```
//!
//! The reference is a lab of plain Linux nodes with the rules that flannel was recorded with.

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::time::Duration;
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ripstop_perf::{
    Capture, Direction, Families, Family, Frame, Header, Host, Injector, Ipv4, Lab, Node, Ping,
    address, icmp, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 7777;
/// The port whose packets carry kube-proxy's mark, and another bit.
const MARKED: u16 = 7778;
/// Another address of somebody outside.
const OUTSIDE: [&str; 2] = ["10.199.0.67", "fd00:199::67"];
/// Addresses of the pod network that the first node has on its uplink.
const ON_UPLINK: [&str; 2] = ["10.244.77.1", "fd00:10:244:77::1"];
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);
const GROUP6: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 0x1234);

fn position(family: Family) -> usize {
    match family {
        Family::Ipv4 => 0,
        Family::Ipv6 => 1,
    }
}

/// Sends from one host until it arrives at the other; whose name it bears.
fn seen(
    from: &dyn Host,
    bind: Option<IpAddr>,
    to: &dyn Host,
    destination: SocketAddr,
) -> Result<IpAddr> {
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let index = to.output(&["cat", "/sys/class/net/eth0/ifindex"])?;
    let index = index.trim().parse()?;
    let receiver = to.netns().run(|| {
        let socket = UdpSocket::bind((any, destination.port()))?;
        match destination.ip() {
            IpAddr::V4(group) if group.is_multicast() => {
                socket.join_multicast_v4(&group, &address::ATTACKER)?;
            }
            IpAddr::V6(group) if group.is_multicast() => {
                socket.join_multicast_v6(&group, index)?;
            }
            IpAddr::V4(_) | IpAddr::V6(_) => {}
        }
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok::<_, std::io::Error>(socket)
    })??;
    let sender = from
        .netns()
        .run(|| UdpSocket::bind((bind.unwrap_or(any), 0)))??;
    let start = Instant::now();
    let what = || format!("{} to {destination} at {}", from.name(), to.name());
    loop {
        // The sender's port is this call's alone, but masquerading may change it.
        sender.send_to(from.name().as_bytes(), destination)?;
        let mut buffer = [0; 64];
        if let Ok((length, source)) = receiver.recv_from(&mut buffer) {
            ensure!(buffer.get(..length) == Some(from.name().as_bytes()), what());
            return Ok(source.ip());
        }
        ensure!(start.elapsed() < PATIENCE, "{} does not arrive", what());
    }
}

/// What stands outside, and marks in the first node as kube-proxy sets them.
fn prepare(lab: &Lab) -> Result<()> {
    let (node, attacker) = (lab.node(1), lab.attacker());
    for family in Family::ALL {
        let (option, length, network, group, table) = match family {
            Family::Ipv4 => ("-4", 32, address::POD_NETWORK, "239.0.0.0/8", "main"),
            Family::Ipv6 => ("-6", 128, address::POD_NETWORK6, "ff0e::/16", "local"),
        };
        let add_address = |host: &dyn Host, address: &str| {
            let address = format!("{address}/{length}");
            let mut command = vec!["ip", option, "addr", "add", &address, "dev", "eth0"];
            // An address that is being looked for elsewhere is no source.
            command.extend(Some("nodad").filter(|_| family == Family::Ipv6));
            host.output(&command).map(drop)
        };
        add_address(attacker, OUTSIDE[position(family)])?;
        add_address(node, ON_UPLINK[position(family)])?;
        let gateway = node.address_of(family).to_string();
        attacker.output(&["ip", option, "route", "add", network, "via", &gateway])?;
        let groups = ["multicast", group, "dev", "eth0", "table", table];
        node.output(&[&["ip", option, "route", "add"], &groups[..]].concat())?;
    }
    let marks = lab.dir().join("marks.nft");
    let rule = format!("udp dport {MARKED} meta mark set 0xc001");
    std::fs::write(
        &marks,
        format!(
            "table inet marks {{\nchain pre {{\ntype filter hook prerouting priority mangle;\n{rule}\n}}\n}}\n"
        ),
    )?;
    node.output(&["nft", "-f", &marks.to_string_lossy()])?;
    Ok(())
}

/// Whose name packets bear, by who sends what to whom.
fn matrix(lab: &Lab) -> Result<BTreeMap<String, IpAddr>> {
    let (node, far) = (lab.node(1), lab.node(2));
    let (pod, neighbour, remote) = (lab.pod(1, 0), lab.pod(1, 1), lab.pod(2, 0));
    let outside = lab.attacker();
    let mut matrix = BTreeMap::new();
    for family in Family::ALL {
        let at = |host: &dyn Host| SocketAddr::new(host.address_of(family), PORT);
        let second: IpAddr = OUTSIDE[position(family)].parse()?;
        let bound = Some(node.address_of(family));
        let first = Some(outside.address_of(family));
        let on_uplink: IpAddr = ON_UPLINK[position(family)].parse()?;
        let group: IpAddr = match family {
            Family::Ipv4 => GROUP.into(),
            Family::Ipv6 => GROUP6.into(),
        };
        let marked = SocketAddr::new(outside.address_of(family), MARKED);
        let from_uplink =
            |to: IpAddr| seen(node, Some(on_uplink), outside, SocketAddr::new(to, PORT));
        for (what, source) in [
            ("pod to outside", seen(pod, None, outside, at(outside))),
            (
                "pod to another outside",
                seen(pod, None, outside, SocketAddr::new(second, PORT)),
            ),
            ("pod to outside, marked", seen(pod, None, outside, marked)),
            ("pod to another node", seen(pod, None, far, at(far))),
            ("pod to its node", seen(pod, None, node, at(node))),
            ("pod to a remote pod", seen(pod, None, remote, at(remote))),
            (
                "pod to its neighbour",
                seen(pod, None, neighbour, at(neighbour)),
            ),
            ("outside to pod", seen(outside, first, pod, at(pod))),
            // A node port leads this way.
            (
                "outside to a remote pod",
                seen(outside, first, remote, at(remote)),
            ),
            ("node to a remote pod", seen(node, None, remote, at(remote))),
            (
                "node's underlay address to a remote pod",
                seen(node, bound, remote, at(remote)),
            ),
            ("node to its pod", seen(node, None, pod, at(pod))),
            (
                "node's underlay address to its pod",
                seen(node, bound, pod, at(pod)),
            ),
            // No pod's multicast leaves its bridge; a socket of the node in a pod's name does the same to the rules.
            ("pods' address to a group", from_uplink(group)),
            (
                "pods' address to outside",
                from_uplink(outside.address_of(family)),
            ),
        ] {
            let source = source.with_context(|| format!("{family:?}: {what}"))?;
            matrix.insert(format!("{family:?}: {what}"), source);
        }
    }
    Ok(matrix)
}

/// What the matrix has to be.
fn expected(lab: &Lab) -> Result<BTreeMap<String, IpAddr>> {
    let (node, pod, outside) = (lab.node(1), lab.pod(1, 0), lab.attacker());
    let mut expected = BTreeMap::new();
    for family in Family::ALL {
        let of = |host: &dyn Host| host.address_of(family);
        let (tunnel, gateway): (IpAddr, IpAddr) = match family {
            Family::Ipv4 => (address::subnet(1).into(), address::gateway(1).into()),
            Family::Ipv6 => (address::subnet6(1).into(), address::gateway6(1).into()),
        };
        for (what, source) in [
            ("pod to outside", of(node)),
            ("pod to another outside", of(node)),
            ("pod to outside, marked", of(pod)),
            ("pod to another node", of(node)),
            ("pod to its node", of(pod)),
            ("pod to a remote pod", of(pod)),
            ("pod to its neighbour", of(pod)),
            ("outside to pod", of(outside)),
            ("outside to a remote pod", tunnel),
            ("node to a remote pod", tunnel),
            ("node's underlay address to a remote pod", tunnel),
            ("node to its pod", gateway),
            ("node's underlay address to its pod", of(node)),
            (
                "pods' address to a group",
                ON_UPLINK[position(family)].parse()?,
            ),
            ("pods' address to outside", of(node)),
        ] {
            expected.insert(format!("{family:?}: {what}"), source);
        }
    }
    Ok(expected)
}

/// Flannel's recorded rules, in the place of the tables that a plain node has.
fn as_flannel_in_iptables(lab: &Lab, node: &Node) -> Result<()> {
    for family in Family::ALL {
        let (program, table, network, subnet, groups) = match family {
            Family::Ipv4 => (
                "iptables-restore",
                ["ip", "flannel-ipv4"],
                address::POD_NETWORK,
                address::subnet_prefix(node.index()),
                "224.0.0.0/4",
            ),
            Family::Ipv6 => (
                "ip6tables-restore",
                ["ip6", "flannel-ipv6"],
                address::POD_NETWORK6,
                address::subnet6_prefix(node.index()),
                "ff00::/8",
            ),
        };
        let masq = r#"-m comment --comment "flanneld masq" -j"#;
        let forward = r#"-m comment --comment "flanneld forward" -j"#;
        let chain = "-A FLANNEL-POSTRTG";
        let text = format!(
            "*filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD {forward} FLANNEL-FWD\n\
             -A FLANNEL-FWD -s {network} {forward} ACCEPT\n-A FLANNEL-FWD -d {network} {forward} ACCEPT\nCOMMIT\n\
             *nat\n:FLANNEL-POSTRTG - [0:0]\n-A POSTROUTING {masq} FLANNEL-POSTRTG\n\
             {chain} -m mark --mark 0x4000/0x4000 {masq} RETURN\n\
             {chain} -s {subnet} -d {network} {masq} RETURN\n\
             {chain} -s {network} -d {subnet} {masq} RETURN\n\
             {chain} ! -s {network} -d {subnet} {masq} RETURN\n\
             {chain} -s {network} ! -d {groups} {masq} MASQUERADE --random-fully\n\
             {chain} ! -s {network} -d {network} {masq} MASQUERADE --random-fully\nCOMMIT\n"
        );
        let file = lab.dir().join(format!("{}-{program}", node.name()));
        std::fs::write(&file, text)?;
        node.output(&[&["nft", "delete", "table"], &table[..]].concat())?;
        node.output(&[program, &file.to_string_lossy()])?;
    }
    Ok(())
}

/// Starts the control plane in a mode, and waits for the rules of that one and no other.
fn start_controlplane(node: &Node, nftables: bool, flags: &[&str]) -> Result<()> {
    let text = std::fs::read_to_string(node.net_conf_file())?;
    let mut conf: serde_json::Value = serde_json::from_str(&text)?;
    conf["EnableNFTables"] = nftables.into();
    node.write_net_conf(&conf)?;
    node.start_controlplane_with(&[&["--ip-masq"], flags].concat())?;
    wait_until("the rules of this mode alone", PATIENCE, || {
        let tables = node.output(&["nft", "list", "ruleset"]).unwrap_or_default();
        let of = |name: &str| tables.contains(&format!("table ip6 {name}"));
        let chains = node.output(&["ip6tables-save"]).unwrap_or_default();
        let (tables, chains) = (of("flannel-ipv6"), chains.contains("FLANNEL-POSTRTG"));
        (tables, chains) == (nftables, !nftables)
    })
    .with_context(|| node.controlplane_log())
}

#[expect(clippy::print_stdout, reason = "the matrix is for people to read")]
fn check(name: &str, matrix: &BTreeMap<String, IpAddr>, expected: &BTreeMap<String, IpAddr>) {
    for (what, source) in matrix {
        println!("{name}: {what}: {source}");
    }
    assert_eq!(matrix, expected, "{name}");
}

#[test]
fn sources_are_those_of_flannels_iptables_rules_in_both_modes() -> Result<()> {
    let flannels = Lab::builder()
        .linux(2)
        .pods(2)
        .families(Families::Dual)
        .run(|lab| {
            lab.nodes()
                .iter()
                .try_for_each(|node| as_flannel_in_iptables(lab, node))?;
            prepare(lab)?;
            let flannels = matrix(lab)?;
            check("flannel", &flannels, &expected(lab)?);
            Ok(flannels)
        })?;
    Lab::builder()
        .ripstop(2)
        .pods(2)
        .families(Families::Dual)
        .run(|lab| {
            prepare(lab)?;
            for node in lab.ripstop_nodes() {
                node.start_dataplane()?;
            }
            for (name, nftables) in [("iptables", false), ("nftables", true)] {
                for node in lab.ripstop_nodes() {
                    node.kill_controlplane();
                    start_controlplane(node, nftables, &[])?;
                }
                for node in lab.ripstop_nodes() {
                    node.wait_for_detour(2)?;
                }
                let before = lab.node(1).workers()?.encapsulated();
                check(name, &matrix(lab)?, &flannels);
                check_unknown_to_conntrack(lab)?;
                wait_until("the workers have carried it", PATIENCE, || {
                    let workers = lab.node(1).workers();
                    // To a remote pod in each family: its own, another's, and twice the node's.
                    workers.is_ok_and(|workers| workers.encapsulated() >= before + 9)
                })?;
            }
            check_exempt(lab)
        })
}

/// What belongs to no connection that the kernel knows of passes as well, with its own address: an answer that nobody
/// has asked for.
fn check_unknown_to_conntrack(lab: &Lab) -> Result<()> {
    let (pod, remote) = (lab.pod(1, 0), lab.pod(2, 0));
    let [source, destination] = [pod.address(), remote.address()];
    let capture = Capture::start_filtered(remote, "eth0", 10, move |frame| {
        let parts = (frame.bytes.get(26..34), frame.bytes.get(34));
        frame.direction == Direction::In
            && parts
                == (
                    Some(&[source.octets(), destination.octets()].concat()),
                    Some(&0),
                )
    })?;
    let frame = Frame {
        headers: vec![
            Header::Ethernet(ripstop_perf::Ethernet::ipv4(
                pod.mac(),
                address::gateway_mac(1),
            )),
            Header::Ipv4(Ipv4 {
                protocol: 1,
                ..Ipv4::udp(source, destination)
            }),
        ],
        payload: icmp(0, 0, &[0xab, 0xcd, 0, 1, 1, 2, 3, 4]),
        truncate_to: None,
    };
    Injector::open(pod, "eth0")?.send(&frame.encode())?;
    capture.wait_for(1, PATIENCE)
}

/// Destinations that pods reach with their own address; all others they do not.
fn check_exempt(lab: &Lab) -> Result<()> {
    let node = lab.node(1);
    for nftables in [false, true] {
        node.kill_controlplane();
        let exempt = format!("{}/32,{}/128", OUTSIDE[0], OUTSIDE[1]);
        start_controlplane(node, nftables, &["--no-masquerade", &exempt])?;
        let mut wanted = expected(lab)?;
        for family in Family::ALL {
            let what = format!("{family:?}: pod to another outside");
            wanted.insert(what, lab.pod(1, 0).address_of(family));
        }
        wait_until("the exempt destinations", PATIENCE, || {
            let text = node.output(&["nft", "list", "ruleset"]).unwrap_or_default();
            OUTSIDE.iter().all(|address| text.contains(address))
        })?;
        check("exempt", &matrix(lab)?, &wanted);
        // And the answers come back.
        let second: IpAddr = OUTSIDE[0].parse()?;
        let report = Ping::to_address(lab.pod(1, 0), second).count(3).run()?;
        assert_eq!((report.received, &report.failed), (3, &vec![]));
    }
    Ok(())
}
