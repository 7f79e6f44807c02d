//! How a lab comes up: the batches for `ip` and `bridge`, namespace by namespace.
//!
//! A wire is not a veth. A veth hands its peer whatever it was given: frames of 64 KB, checksums
//! left for hardware to fill in. An AF_XDP socket would see those, and no NIC ever delivers them.
//! So every offload is off on both ends of every underlay link; what crosses it has been cut to
//! the MTU and summed by the sender.

use core::time::Duration;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Fabric, Host, Lab, Node, NodeKind, wait_until};
use crate::address;
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

impl Lab {
    pub(super) fn set_up(&self, dataplane: &Value) -> Result<()> {
        self.write_files(dataplane)?;
        let hosts = self.hosts();
        let namespaces: Vec<&Netns> = hosts.iter().map(|host| host.netns()).collect();
        netns::create(&namespaces)?;
        self.set_up_fabric()?;
        for node in &self.nodes {
            self.set_up_node(node)?;
            for pod in node.pods() {
                let index = node.index();
                let gateway = address::gateway(index);
                pod.netns().batch(
                    "ip",
                    &format!(
                        "link set lo up\n\
                     link set eth0 up\n\
                     addr add {}/24 dev eth0\n\
                     route add default via {gateway}\n\
                     route add {} via {gateway}\n",
                        pod.address(),
                        address::POD_NETWORK,
                    ),
                )?;
            }
            if node.kind() == NodeKind::PlainLinux {
                self.program_as_flannel(node)?;
            }
        }
        wait_until("every link is up", Duration::from_secs(10), || {
            self.links_are_up()
        })
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
        let (mtu, queues) = (self.description.mtu, self.description.queues);
        let namespace = self.fabric.netns();
        // A switch does not look into the packets that pass it. With these on, the bridge would
        // throw away the malformed ones that tests send, and join fragments.
        for family in ["iptables", "ip6tables", "arptables"] {
            namespace.sysctl(&format!("net/bridge/bridge-nf-call-{family}"), "0")?;
        }
        let mut lines = format!(
            "link set lo up\n\
             link add name br0 mtu {mtu} type bridge mcast_snooping 0\n\
             addr add {}/24 dev br0\n\
             link set br0 up\n",
            address::FABRIC
        );
        let mut port = |name: &str, mac: address::Mac, peer: &Netns| {
            let queues = format!("numrxqueues {queues} numtxqueues {queues}");
            lines.push_str(&format!(
                "link add name {name} mtu {mtu} {queues} type veth \
                 peer name eth0 address {mac} mtu {mtu} {queues} netns {}\n\
                 link set {name} master br0 up\n",
                peer.name(),
            ));
        };
        port("attacker", address::ATTACKER_MAC, self.attacker.netns());
        for node in &self.nodes {
            port(
                &Fabric::port(node.index()),
                address::underlay_mac(node.index()),
                node.netns(),
            );
        }
        namespace.batch("ip", &lines)?;
        let ports: Vec<String> = self
            .nodes
            .iter()
            .map(|node| Fabric::port(node.index()))
            .collect();
        let ports = ports.iter().map(String::as_str).chain(["attacker"]);
        make_a_wire(namespace, &ports.collect::<Vec<_>>())?;
        make_a_wire(self.attacker.netns(), &["eth0"])?;
        self.attacker.netns().batch(
            "ip",
            &format!(
                "link set lo up\n\
             link set eth0 up\n\
             addr add {}/24 dev eth0\n\
             route add default via {}\n",
                address::ATTACKER,
                address::FABRIC,
            ),
        )
    }

    fn set_up_node(&self, node: &Node) -> Result<()> {
        let (index, pod_mtu) = (node.index(), self.pod_mtu());
        let namespace = node.netns();
        make_a_wire(namespace, &["eth0"])?;
        let forwarding = namespace.sysctl("net/ipv4/ip_forward", "1")?;
        ensure!(forwarding, "this kernel does not forward IPv4");
        let mut lines = format!(
            "link set lo up\n\
             link set eth0 up\n\
             addr add {}/24 dev eth0\n\
             route add default via {}\n\
             link add name cni0 address {} mtu {pod_mtu} type bridge\n\
             addr add {}/24 brd + dev cni0\n\
             link set cni0 up\n",
            address::underlay(index),
            address::FABRIC,
            address::gateway_mac(index),
            address::gateway(index),
        );
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

    /// The kernel state that flannel leaves behind on a node: vxlan device, and for each peer a
    /// permanent neighbour, an FDB entry and an onlink route; forward and masquerade rules.
    fn program_as_flannel(&self, node: &Node) -> Result<()> {
        let index = node.index();
        let namespace = node.netns();
        let mut links = format!(
            "link add name flannel.1 address {} mtu {} type vxlan \
             id {} local {} dev eth0 dstport {} nolearning\n\
             addr add {}/32 dev flannel.1\n\
             link set flannel.1 up\n",
            address::vtep_mac(index),
            self.pod_mtu(),
            address::VNI,
            address::underlay(index),
            address::VXLAN_PORT,
            address::subnet(index),
        );
        let mut fdb = String::new();
        for peer in self
            .nodes
            .iter()
            .map(Node::index)
            .filter(|peer| *peer != index)
        {
            let (subnet, vtep) = (address::subnet(peer), address::vtep_mac(peer));
            links.push_str(&format!(
                "neigh replace {subnet} lladdr {vtep} dev flannel.1 nud permanent\n\
                 route add {subnet}/24 via {subnet} dev flannel.1 onlink\n",
            ));
            let public = address::underlay(peer);
            fdb.push_str(&format!(
                "fdb add {vtep} dev flannel.1 dst {public} self permanent\n"
            ));
        }
        namespace.batch("ip", &links)?;
        namespace.sysctl("net/ipv6/conf/flannel.1/accept_ra", "0")?;
        namespace.batch("bridge", &fdb)?;
        let rules = node.dir().join("flannel.nft");
        fs::write(&rules, flannel_rules(index)).with_context(|| format!("{}", rules.display()))?;
        namespace
            .output(&["nft", "-f", &rules.to_string_lossy()])
            .context("package nftables")
            .map(drop)
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

/// The rules of flannel's nftables mode.
fn flannel_rules(node: u8) -> String {
    let (network, subnet) = (address::POD_NETWORK, address::subnet_prefix(node));
    format!(
        "table ip flannel-ipv4 {{
  comment \"rules for flannel-ipv4\"
  chain postrtg {{
    comment \"chain to manage traffic masquerading by flannel\"
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    ip saddr {subnet} ip daddr {network} return
    ip saddr {network} ip daddr {subnet} return
    ip saddr != {subnet} ip daddr {network} return
    ip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random
    ip saddr != {network} ip daddr {network} masquerade fully-random
  }}
  chain forward {{
    comment \"chain to accept flannel traffic\"
    type filter hook forward priority filter; policy accept;
    ip saddr {network} accept
    ip daddr {network} accept
  }}
}}
table ip6 flannel-ipv6 {{
  comment \"rules for flannel-ipv6\"
}}
"
    )
}

/// Switches the offloads of interfaces off.
fn make_a_wire(namespace: &Netns, interfaces: &[&str]) -> Result<()> {
    namespace.run(|| {
        for interface in interfaces {
            let mut command = Command::new("ethtool");
            command.args(["-K", interface]);
            for offload in OFFLOADS {
                command.args([offload, "off"]);
            }
            let output = command
                .output()
                .context("start ethtool (package ethtool)")?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "switch off offloads of {interface}: {stderr}"
            );
        }
        Ok(())
    })?
}
