//! How a lab comes up: the batches for `ip` and `bridge`, namespace by namespace.
//!
//! A wire is not a veth. A veth hands its peer whatever it was given: frames of 64 KB, checksums
//! left for hardware to fill in. An AF_XDP socket would see those, and no NIC ever delivers them.
//! So every offload is off on both ends of every underlay link; what crosses it has been cut to
//! the MTU and summed by the sender.

use core::net::IpAddr;
use core::time::Duration;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::plan::{Backend, BondMode, Plan};
use super::userland::{TunnelKind, UserlandTunnel};
use super::{Fabric, Host, Lab, Node, NodeKind, Pod, wait_until};
use crate::address::{self, Family, Mac};
use crate::netns::{self, Netns};

/// What `ethtool -K` switches off on an underlay link.
const OFFLOADS: [&str; 12] = [
    "tx",
    "sg",
    "tso",
    "gso",
    "gro",
    "rxvlan",
    "txvlan",
    "tx-sctp-segmentation",
    "tx-udp-segmentation",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-gso-list",
];

/// How long links of the lab's own may take to come up, and a NIC, which has to agree with its other end on a speed.
const LINKS: Duration = Duration::from_secs(10);
const CARRIER: Duration = Duration::from_secs(30);

impl Lab {
    pub(super) fn set_up(&self, dataplane: &Value) -> Result<()> {
        self.write_files(dataplane)?;
        let hosts = self.hosts();
        let namespaces: Vec<&Netns> = hosts.iter().map(|host| host.netns()).collect();
        netns::create(&namespaces)?;
        if self.plan().families.has(Family::Ipv6) {
            // Nobody has another's address here, and to find out takes a second in which neighbours
            // cannot be asked for.
            for namespace in &namespaces {
                let known = namespace.sysctl("net/ipv6/conf/default/dad_transmits", "0")?;
                ensure!(known, "this kernel has no IPv6");
            }
        }
        self.set_up_fabric()?;
        for node in &self.nodes {
            self.set_up_node(node)?;
            for pod in node.pods() {
                self.set_up_pod(pod)?;
            }
            if node.kind() == NodeKind::PlainLinux {
                self.program_as_flannel(node)?;
            }
        }
        let (what, within) = match &self.description.borrowed {
            None => ("every link is up".to_owned(), LINKS),
            Some(borrowed) => (
                format!(
                    "{} has a carrier: is the cable in, and the NIC at its other end up?",
                    borrowed.nic()
                ),
                CARRIER,
            ),
        };
        wait_until(&what, within, || self.links_are_up())
    }

    fn write_files(&self, dataplane: &Value) -> Result<()> {
        // Left over from a machine that went down: the name is ours, or it could not be claimed.
        if fs::symlink_metadata(self.dir()).is_ok_and(|old| old.is_dir() && old.uid() == 0) {
            fs::remove_dir_all(self.dir()).with_context(|| format!("{}", self.dir().display()))?;
        }
        fs::create_dir(self.dir()).with_context(|| format!("{}", self.dir().display()))?;
        self.write_leases(&self.leases())?;
        self.nodes
            .iter()
            .try_for_each(|node| node.write_files(dataplane))
    }

    fn set_up_fabric(&self) -> Result<()> {
        let (plan, mtu, queues) = (self.plan(), self.mtu(), self.description.queues);
        let namespace = self.fabric.netns();
        // A switch does not look into the packets that pass it. With these on, the bridge would
        // throw away the malformed ones that tests send, and join fragments.
        for family in ["iptables", "ip6tables", "arptables"] {
            namespace.sysctl(&format!("net/bridge/bridge-nf-call-{family}"), "0")?;
        }
        let segments = plan.all_segments();
        if segments.len() > 1 {
            set_forwarding(namespace, plan)?;
            // It does what it is told, and teaches nobody another way.
            for conf in ["all", "default"] {
                namespace.sysctl(&format!("net/ipv4/conf/{conf}/send_redirects"), "0")?;
            }
            // Tunnels keep to a path by their ports.
            namespace.sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
            namespace.sysctl("net/ipv6/fib_multipath_hash_policy", "1")?;
        }
        // Each router answers for its own address alone.
        namespace.sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
        namespace.sysctl("net/ipv4/conf/all/arp_announce", "2")?;
        let mut lines = "link set lo up\n".to_owned();
        for segment in &segments {
            let bridge = Fabric::bridge(*segment);
            let (interface, tagged) = tagged(&bridge, plan);
            lines.push_str(&format!(
                "link add name {bridge} address {} mtu {mtu} type bridge mcast_snooping 0\n\
                 link set {bridge} up\n{tagged}{}",
                address::router_mac(*segment, 0),
                self.router_addresses(&interface, *segment, 0),
            ));
            for number in 1..plan.routers {
                let router = format!("gw{segment}");
                lines.push_str(&format!(
                    "link add name {router} link {bridge} address {} mtu {mtu} type macvlan mode bridge\n\
                     {}link set {router} up\n",
                    address::router_mac(*segment, number),
                    self.router_addresses(&router, *segment, number),
                ));
            }
        }
        let mut ports = Vec::new();
        let mut port = |name: String, nic: &str, mac: Mac, peer: &Netns| {
            let queues = format!("numrxqueues {queues} numtxqueues {queues}");
            ports.push(name.clone());
            format!(
                "link add name {name} mtu {mtu} {queues} type veth \
                 peer name {nic} address {mac} mtu {mtu} {queues} netns {}\n",
                peer.name(),
            )
        };
        let plug = |port: &str, segment| {
            format!("link set {port} master {} up\n", Fabric::bridge(segment))
        };
        let attacker = self.attacker.netns();
        lines += &port(
            "attacker".to_owned(),
            "eth0",
            address::ATTACKER_MAC,
            attacker,
        );
        lines += &plug("attacker", 0);
        for node in &self.nodes {
            let index = node.index();
            if self.borrowed(node).is_some() {
                continue;
            }
            for (uplink, nic) in (0..).zip(plan.nics()) {
                let (_, mac) = node.uplink(uplink);
                let name = Fabric::uplink_port(index, uplink);
                lines += &port(name, nic, mac, node.netns());
            }
            let ports = (0..).zip(plan.nics()).map(|(uplink, _nic)| {
                let (segment, _) = node.uplink(uplink);
                (Fabric::uplink_port(index, uplink), segment)
            });
            match plan.underlay.bond().filter(|mode| mode.has_two_ends()) {
                None => lines.extend(ports.map(|(port, segment)| plug(&port, segment))),
                Some(mode) => {
                    let ports: Vec<String> = ports.map(|(port, _segment)| port).collect();
                    lines += &bond(
                        &Fabric::bond(index),
                        mode,
                        address::switch_mac(index),
                        mtu,
                        &ports,
                    );
                    lines += &plug(&Fabric::bond(index), node.segment());
                }
            }
        }
        if plan.uplinks > 1 {
            for node in &self.nodes {
                lines.push_str(&routes_back(plan, node));
            }
        }
        namespace.batch("ip", &lines)?;
        let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
        make_a_wire(namespace, &ports)?;
        make_a_wire(attacker, &["eth0"])?;
        let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
        for family in plan.families.iter() {
            lines.push_str(&match family {
                Family::Ipv4 => format!(
                    "addr add {}/24 dev eth0\nroute add default via {}\n",
                    address::ATTACKER,
                    address::FABRIC
                ),
                Family::Ipv6 => format!(
                    "addr add {}/64 dev eth0 nodad\nroute add ::/0 via {}\n",
                    address::ATTACKER6,
                    address::FABRIC6
                ),
            });
        }
        attacker.batch("ip", &lines)
    }

    fn router_addresses(&self, interface: &str, segment: u8, number: u8) -> String {
        let of = |family| match family {
            Family::Ipv4 => format!(
                "addr add {}/24 dev {interface}\n",
                address::router(segment, number)
            ),
            Family::Ipv6 => format!(
                "addr add {}/64 dev {interface} nodad\n",
                address::router6(segment, number)
            ),
        };
        self.plan().families.iter().map(of).collect()
    }

    fn set_up_node(&self, node: &Node) -> Result<()> {
        let (plan, index, pod_mtu) = (self.plan(), node.index(), self.pod_mtu());
        let namespace = node.netns();
        match self.borrowed(node) {
            // It is on a wire, and keeps what it can do for the kernel's path.
            Some(borrowed) => borrowed.lend(&self.home(), namespace, plan.mtu)?,
            None => make_a_wire(namespace, plan.nics())?,
        }
        set_forwarding(namespace, plan)?;
        let mut lines = "link set lo up\n".to_owned();
        if let Some(mode) = plan.underlay.bond() {
            let (_, mac) = node.uplink(0);
            lines += &bond("bond0", mode, mac, plan.mtu, plan.nics());
            lines += &tagged("bond0", plan).1;
        } else {
            for nic in plan.nics() {
                lines += &format!("link set {nic} up\n{}", tagged(nic, plan).1);
            }
        }
        for (uplink, nic) in (0..).zip(plan.interfaces()) {
            // What comes back may come back over either uplink.
            if plan.uplinks > 1 {
                namespace.sysctl(&format!("net/ipv4/conf/{nic}/rp_filter"), "0")?;
                namespace.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
            }
            let (segment, _mac) = node.uplink(uplink);
            for family in plan.families.iter() {
                lines.push_str(&match family {
                    Family::Ipv4 => format!(
                        "addr add {}/24 dev {nic}\n",
                        address::underlay_in(segment, index)
                    ),
                    Family::Ipv6 => format!(
                        "addr add {}/64 dev {nic} nodad\n",
                        address::underlay6_in(segment, index)
                    ),
                });
            }
        }
        for family in plan.families.iter() {
            lines.push_str(&default_route(node, family));
        }
        lines.push_str(&format!(
            "link add name cni0 address {} mtu {pod_mtu} type bridge\n",
            address::gateway_mac(index),
        ));
        for family in plan.families() {
            lines.push_str(&match family {
                Family::Ipv4 => format!("addr add {}/24 brd + dev cni0\n", address::gateway(index)),
                Family::Ipv6 => {
                    format!("addr add {}/64 dev cni0 nodad\n", address::gateway6(index))
                }
            });
        }
        lines.push_str("link set cni0 up\n");
        for pod in node.pods() {
            lines.push_str(&format!(
                "link add name pod{number} mtu {pod_mtu} type veth \
                 peer name eth0 address {mac} mtu {pod_mtu} netns {peer}\n\
                 link set pod{number} master cni0 up\n\
                 link set pod{number} type bridge_slave hairpin on\n",
                number = pod.index(),
                mac = pod.mac(),
                peer = pod.netns().name(),
            ));
        }
        namespace.batch("ip", &lines)
    }

    /// As the CNI plugin leaves a pod: an address, the default route, and one for the pod network.
    fn set_up_pod(&self, pod: &Pod) -> Result<()> {
        let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
        for family in self.plan().families() {
            lines.push_str(&match family {
                Family::Ipv4 => format!(
                    "addr add {}/24 dev eth0\n\
                     route add default via {gateway}\n\
                     route add {} via {gateway}\n",
                    pod.address(),
                    self.plan().network,
                    gateway = address::gateway(pod.node()),
                ),
                Family::Ipv6 => format!(
                    "addr add {}/64 dev eth0 nodad\n\
                     route add ::/0 via {gateway}\n\
                     route add {} via {gateway}\n",
                    pod.address6(),
                    address::POD_NETWORK6,
                    gateway = address::gateway6(pod.node()),
                ),
            });
        }
        pod.netns().batch("ip", &lines)
    }

    /// The kernel state that flannel leaves behind on a node: the tunnel's device, what leads to each
    /// peer, and forward and masquerade rules.
    fn program_as_flannel(&self, node: &Node) -> Result<()> {
        match self.backend() {
            Backend::Vxlan => self
                .families()
                .into_iter()
                .try_for_each(|family| self.program_vxlan(node, family))?,
            Backend::Ipip => self.program_ipip(node)?,
            Backend::Udp => self.program_udp(node)?,
            Backend::HostGw => {}
        }
        let mut routes = String::new();
        for peer in self.peers_of(node) {
            for family in self.families() {
                routes.push_str(&self.flannel_route(node, peer, family));
            }
        }
        let namespace = node.netns();
        namespace.batch("ip", &routes)?;
        let rules = node.dir().join("flannel.nft");
        fs::write(&rules, flannel_rules(self.plan(), node.index()))
            .with_context(|| format!("{}", rules.display()))?;
        namespace
            .output(&["nft", "-f", &rules.to_string_lossy()])
            .context("package nftables")
            .map(drop)
    }

    fn peers_of<'a>(&'a self, node: &Node) -> impl Iterator<Item = &'a Node> {
        let index = node.index();
        self.nodes.iter().filter(move |peer| peer.index() != index)
    }

    /// A vxlan device, and for each peer that it leads to a permanent neighbour and an FDB entry.
    fn program_vxlan(&self, node: &Node, family: Family) -> Result<()> {
        let index = node.index();
        let namespace = node.netns();
        let device = if family == Family::Ipv4 {
            "flannel.1"
        } else {
            "flannel-v6.1"
        };
        let (mac, host_route) = match family {
            Family::Ipv4 => (
                address::vtep_mac(index),
                format!("{}/32", address::subnet(index)),
            ),
            Family::Ipv6 => (
                address::vtep_mac6(index),
                format!("{}/128 nodad", address::subnet6(index)),
            ),
        };
        let mut links = format!(
            "link add name {device} address {mac} mtu {} type vxlan \
             id {} local {} dev {} dstport {} nolearning\n\
             addr add dev {device} {host_route}\n\
             link set {device} up\n",
            self.pod_mtu_of(family),
            address::VNI,
            node.address_of(family),
            self.underlay().interface(),
            address::VXLAN_PORT,
        );
        let mut fdb = String::new();
        for peer in self.peers_of(node) {
            if self.is_direct(index, peer.index()) {
                continue;
            }
            let (subnet, vtep) = match family {
                Family::Ipv4 => (
                    address::subnet(peer.index()).to_string(),
                    address::vtep_mac(peer.index()),
                ),
                Family::Ipv6 => (
                    address::subnet6(peer.index()).to_string(),
                    address::vtep_mac6(peer.index()),
                ),
            };
            links.push_str(&format!(
                "neigh replace {subnet} lladdr {vtep} dev {device} nud permanent\n"
            ));
            let public = peer.address_of(family);
            fdb.push_str(&format!(
                "fdb add {vtep} dev {device} dst {public} self permanent\n"
            ));
        }
        namespace.batch("ip", &links)?;
        namespace.sysctl(&format!("net/ipv6/conf/{device}/accept_ra"), "0")?;
        namespace.batch("bridge", &fdb)
    }

    /// An ipip device; a thread of ours in place of it where the kernel has none.
    fn program_ipip(&self, node: &Node) -> Result<()> {
        let (index, mtu) = (node.index(), self.pod_mtu_of(Family::Ipv4));
        let namespace = node.netns();
        let local = node.address();
        let device = "flannel.ipip";
        let made = namespace.exec(&[
            "ip",
            "link",
            "add",
            "name",
            device,
            "type",
            "ipip",
            "local",
            &local.to_string(),
            "ttl",
            "inherit",
            "nopmtudisc",
        ])?;
        if !made.status.success() {
            self.start_userland_tunnel(node, device, TunnelKind::Ipip)?;
        }
        let lines = format!(
            "link set {device} mtu {mtu}\naddr add {}/32 dev {device}\nlink set {device} up\n",
            address::subnet(index),
        );
        namespace.batch("ip", &lines)
    }

    /// flannel's own process on a TUN device, for which a thread of ours stands in.
    fn program_udp(&self, node: &Node) -> Result<()> {
        let (index, mtu) = (node.index(), self.pod_mtu_of(Family::Ipv4));
        let device = "flannel0";
        self.start_userland_tunnel(node, device, TunnelKind::Udp)?;
        let lines = format!(
            "link set {device} mtu {mtu}\n\
             addr add {}/32 dev {device}\n\
             link set {device} up\n\
             route add {} dev {device}\n",
            address::subnet(index),
            self.plan().network,
        );
        node.netns().batch("ip", &lines)
    }

    fn start_userland_tunnel(&self, node: &Node, device: &str, kind: TunnelKind) -> Result<()> {
        let peers = self
            .peers_of(node)
            .map(|peer| (address::subnet(peer.index()), peer.address()))
            .collect();
        let tunnel =
            UserlandTunnel::start(node, device, kind, self.pod_mtu_of(Family::Ipv4), peers);
        node.keep_userland_tunnel(tunnel?);
        Ok(())
    }

    /// flannel's route to the pods of a peer.
    fn flannel_route(&self, node: &Node, peer: &Node, family: Family) -> String {
        let (subnet, first) = match family {
            Family::Ipv4 => (
                address::subnet_prefix(peer.index()),
                address::subnet(peer.index()).to_string(),
            ),
            Family::Ipv6 => (
                address::subnet6_prefix(peer.index()),
                address::subnet6(peer.index()).to_string(),
            ),
        };
        let public = peer.address_of(family);
        match (self.is_direct(node.index(), peer.index()), self.backend()) {
            (true, Backend::Ipip) => format!(
                "route add {subnet} via {public} dev {} onlink\n",
                self.underlay().interface()
            ),
            (true, _) => format!("route add {subnet} via {public}\n"),
            (false, Backend::Ipip) => {
                format!("route add {subnet} via {public} dev flannel.ipip onlink\n")
            }
            // One route for all peers is there.
            (false, Backend::Udp) => String::new(),
            (false, backend) => match backend.device(family) {
                Some(device) => format!("route add {subnet} via {first} dev {device} onlink\n"),
                None => String::new(),
            },
        }
    }

    fn links_are_up(&self) -> bool {
        self.hosts().iter().all(|host| {
            let links = host
                .output(&["ip", "-j", "link", "show", "up"])
                .unwrap_or_default();
            let Ok(Value::Array(links)) = serde_json::from_str(&links) else {
                return false;
            };
            let mut states = links.iter().filter_map(|link| link["operstate"].as_str());
            // Loopback and flannel.1 have no carrier to speak of.
            states.all(|state| state == "UP" || state == "UNKNOWN")
        })
    }
}

/// The interface on top of `lower` that has the underlay's tag, and the commands that make it: none without a tag.
fn tagged(lower: &str, plan: &Plan) -> (String, String) {
    match plan.underlay.vlan() {
        None => (lower.to_owned(), String::new()),
        Some(id) => (
            format!("{lower}.{id}"),
            format!(
                "link add link {lower} name {lower}.{id} type vlan id {id}\n\
                 link set {lower}.{id} up\n"
            ),
        ),
    }
}

/// The commands that join interfaces, which are down, and switch all of them on.
fn bond<S: AsRef<str>>(name: &str, mode: BondMode, mac: Mac, mtu: u16, ports: &[S]) -> String {
    let mut lines = format!(
        "link add name {name} address {mac} mtu {mtu} type bond {}\n",
        mode.options()
    );
    for port in ports {
        lines += &format!("link set {} master {name}\n", port.as_ref());
    }
    lines + &format!("link set {name} up\n")
}

/// Makes a namespace a router for the plan's families.
fn set_forwarding(namespace: &Netns, plan: &Plan) -> Result<()> {
    for family in plan.families.iter() {
        let key = match family {
            Family::Ipv4 => "net/ipv4/ip_forward",
            Family::Ipv6 => "net/ipv6/conf/all/forwarding",
        };
        let forwarding = namespace.sysctl(key, "1")?;
        ensure!(forwarding, "this kernel does not forward {family}");
    }
    Ok(())
}

/// A node's default route, over all routers of all its uplinks' segments.
fn default_route(node: &Node, family: Family) -> String {
    let plan = node.plan();
    let mut hops = Vec::new();
    for (uplink, nic) in (0..).zip(plan.interfaces()) {
        let (segment, _mac) = node.uplink(uplink);
        for number in 0..plan.routers {
            let router: IpAddr = match family {
                Family::Ipv4 => address::router(segment, number).into(),
                Family::Ipv6 => address::router6(segment, number).into(),
            };
            hops.push(format!("via {router} dev {nic}"));
        }
    }
    let to = match family {
        Family::Ipv4 => "default",
        Family::Ipv6 => "::/0",
    };
    match hops.as_slice() {
        [only] => format!("route add {to} {only}\n"),
        several => format!("route add {to} nexthop {}\n", several.join(" nexthop ")),
    }
}

/// The fabric's routes to a node over both its uplinks.
fn routes_back(plan: &Plan, node: &Node) -> String {
    let mut lines = String::new();
    for family in plan.families.iter() {
        let hops: Vec<String> = (0..plan.uplinks)
            .map(|uplink| {
                let (segment, _mac) = node.uplink(uplink);
                let via: IpAddr = match family {
                    Family::Ipv4 => address::underlay_in(segment, node.index()).into(),
                    Family::Ipv6 => address::underlay6_in(segment, node.index()).into(),
                };
                format!("nexthop via {via} dev {}", Fabric::bridge(segment))
            })
            .collect();
        let bits = if family == Family::Ipv4 { 32 } else { 128 };
        let address = node.address_of(family);
        lines.push_str(&format!("route add {address}/{bits} {}\n", hops.join(" ")));
    }
    lines
}

/// The rules of flannel's nftables mode. It makes both tables, and fills those of its families.
fn flannel_rules(plan: &Plan, node: u8) -> String {
    let table = |family: Family| {
        let (ip, name, network, subnet, groups) = match family {
            Family::Ipv4 => (
                "ip",
                "flannel-ipv4",
                plan.network.as_str(),
                address::subnet_prefix(node),
                "224.0.0.0/4",
            ),
            Family::Ipv6 => (
                "ip6",
                "flannel-ipv6",
                address::POD_NETWORK6,
                address::subnet6_prefix(node),
                "ff00::/8",
            ),
        };
        if !plan.families().any(|of_plan| of_plan == family) {
            return format!("table {ip} {name} {{\n  comment \"rules for {name}\"\n}}\n");
        }
        format!(
            "table {ip} {name} {{
  comment \"rules for {name}\"
  chain postrtg {{
    comment \"chain to manage traffic masquerading by flannel\"
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    {ip} saddr {subnet} {ip} daddr {network} return
    {ip} saddr {network} {ip} daddr {subnet} return
    {ip} saddr != {subnet} {ip} daddr {network} return
    {ip} saddr {network} {ip} daddr != {groups} masquerade fully-random
    {ip} saddr != {network} {ip} daddr {network} masquerade fully-random
  }}
  chain forward {{
    comment \"chain to accept flannel traffic\"
    type filter hook forward priority filter; policy accept;
    {ip} saddr {network} accept
    {ip} daddr {network} accept
  }}
}}
"
        )
    };
    Family::ALL.into_iter().map(table).collect()
}

/// Switches the offloads of interfaces off.
fn make_a_wire(namespace: &Netns, interfaces: &[&str]) -> Result<()> {
    set_offloads(namespace, interfaces, false)
}

/// Switches the offloads of interfaces, all that a veth can have.
///
/// # Errors
/// `ethtool` is not there, or it could change nothing.
pub(crate) fn set_offloads(namespace: &Netns, interfaces: &[&str], on: bool) -> Result<()> {
    let state = if on { "on" } else { "off" };
    namespace.run(|| {
        for interface in interfaces {
            let mut command = Command::new("ethtool");
            command.args(["-K", interface]);
            for offload in OFFLOADS {
                command.args([offload, state]);
            }
            let output = command
                .output()
                .context("start ethtool (package ethtool)")?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "switch offloads of {interface} {state}: {stderr}"
            );
        }
        Ok(())
    })?
}
