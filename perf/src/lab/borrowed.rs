//! A NIC of the machine in a lab: it takes the place of the first node's `eth0`, and comes back when the lab goes.
//!
//! ```text
//!   where the run began (kept as rs-<lab>-home)          rs-<lab>-n1
//!   eth1  10.0.0.1/24, up   ─────── lend ──────────────►  eth0  (the lab's addresses)
//!                           ◄────── give back ─────────
//! ```
//!
//! A NIC that moves loses its addresses, its routes and its state. What is needed to put them back is in the lab's
//! description before it goes, so that whoever takes the lab down can do it, also when the lab's own process was killed. A
//! namespace that vanishes gives a physical NIC back to the machine by itself, under the name that it has then; a virtual one
//! vanishes with it. So the NIC goes first, and the namespace after it. Routes of its own and settings below
//! `/proc/sys/net` do not come back.

use core::net::IpAddr;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::engine::agent::has_default_route;
use crate::netns::Netns;
use crate::sys;

/// Its name in the lab.
pub(super) const NAME: &str = "eth0";
/// The longest name of an interface.
const NAME_MAX: usize = 15;

/// A NIC as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrowed {
    nic: String,
    up: bool,
    mtu: u64,
    addresses: Vec<Address>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Address {
    local: IpAddr,
    length: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    broadcast: Option<IpAddr>,
}

impl Borrowed {
    /// Looks at a NIC of the calling thread's namespace. It stays where it is until a lab that was built with it comes up.
    ///
    /// # Errors
    /// There is no such NIC, the machine cannot do without it, or somebody uses it and `in_use` is false. The message says
    /// which, and what to do.
    pub fn look(nic: &str, in_use: bool) -> Result<Self> {
        // It may be in a lab whose owner was killed.
        super::sweep();
        let output = Command::new("ip")
            .args(["-d", "-j", "address", "show"])
            .output()
            .context("start ip (package iproute2)")?;
        let links: Value = serde_json::from_slice(&output.stdout).context("output of ip -j")?;
        let has_default = has_default_route(nic)?;
        let is_here = (links.as_array().into_iter().flatten()).any(|link| link["ifname"] == nic);
        if !is_here && let Some(lab) = super::lab_with(nic) {
            bail!(
                "{nic} is in the lab {lab}: wait until that run ends, or end it (ripstop-perf lab down --name {lab})"
            );
        }
        Self::of(&links, nic, has_default, in_use)
    }

    fn of(links: &Value, nic: &str, has_default_route: bool, in_use: bool) -> Result<Self> {
        let links = links.as_array().context("output of ip -j")?;
        let text = |link: &Value, key: &str| link[key].as_str().unwrap_or_default().to_owned();
        let Some(link) = links.iter().find(|link| link["ifname"] == nic) else {
            let names = links.iter().map(|link| text(link, "ifname"));
            let names: Vec<String> = names.filter(|name| name != "lo").collect();
            bail!(
                "this machine has no NIC {nic:?}: --nic takes one of {}",
                names.join(", ")
            );
        };
        ensure!(
            link["link_type"] == "ether" && nic.len() <= NAME_MAX,
            "{nic} is no NIC (its link type is {}): name one that has a cable",
            text(link, "link_type")
        );
        ensure!(
            !has_default_route,
            "{nic} has this machine's default route, and would be taken away from it: take another NIC"
        );
        let master = text(link, "master");
        ensure!(
            master.is_empty(),
            "{nic} is a port of {master}: take it out first (ip link set {nic} nomaster)"
        );
        // A tunnel's device has what is below it in its own data, others beside their name, where a veth has its other end.
        let on_top = links.iter().find(|other| {
            let own = &other["linkinfo"];
            let below = other["link"] == nic && own["info_kind"] != "veth";
            below || own["info_data"]["link"] == nic
        });
        if let Some(on_top) = on_top {
            let name = text(on_top, "ifname");
            bail!("{name} is on {nic}, and would be gone: remove it first (ip link delete {name})");
        }
        ensure!(
            link["xdp"].is_null(),
            "somebody has an XDP program on {nic}: end that first"
        );
        let addresses = link["addr_info"].as_array().map(Vec::as_slice);
        let addresses = addresses.unwrap_or_default().iter();
        let addresses: Vec<Address> = addresses.filter_map(Address::of).collect();
        if let Some(Address { local, .. }) = addresses.first() {
            ensure!(
                in_use,
                "{nic} has the address {local}, so somebody may need it; if it may be away for a while: --nic-in-use. Its addresses come back, its routes do not"
            );
        }
        let flags = link["flags"].as_array().map(Vec::as_slice);
        Ok(Self {
            nic: nic.to_owned(),
            up: flags.unwrap_or_default().contains(&Value::from("UP")),
            mtu: link["mtu"].as_u64().context("a NIC without an MTU")?,
            addresses,
        })
    }

    /// The name under which it was found.
    #[must_use]
    pub fn nic(&self) -> &str {
        &self.nic
    }

    /// Whether an address is one of its own.
    #[must_use]
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|own| own.local == address)
    }

    /// Gives the calling thread's namespace, where the NIC is, a name for the way back, and moves the NIC to a node.
    pub(super) fn lend(&self, home: &Netns, node: &Netns, mtu: u16) -> Result<()> {
        let nic = &self.nic;
        let lend = || -> Result<()> {
            // A thread may be elsewhere than its process.
            let thread = sys::thread_id().to_string();
            let arguments = ["netns", "attach", home.name(), &thread];
            let output = Command::new("ip").args(arguments).output();
            let output = output.context("start ip (package iproute2)")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "ip netns attach: {said}");
            let node_name = node.name();
            home.batch(
                "ip",
                &format!(
                    "link set dev {nic} down\nlink set dev {nic} netns {node_name} name {NAME}\n"
                ),
            )?;
            node.batch("ip", &format!("link set dev {NAME} mtu {mtu}\n"))
        };
        lend().with_context(|| format!("take {nic} into the lab"))
    }

    /// Moves the NIC back, if it is in the node, and makes it what it was. Does nothing where this was done before.
    pub(super) fn give_back(&self, home: &Netns, node: &Netns) -> Result<()> {
        if !home.exists() {
            return Ok(());
        }
        let nic = &self.nic;
        let give_back = || -> Result<()> {
            if node.exists() && has(node, NAME)? && !has(home, nic)? {
                let home_name = home.name();
                node.batch(
                    "ip",
                    &format!("link set dev {NAME} down\nlink set dev {NAME} netns {home_name} name {nic}\n"),
                )?;
            }
            // It may have been taken out of the machine.
            if has(home, nic)? {
                home.batch("ip", &self.state())?;
            }
            Ok(())
        };
        give_back().with_context(|| {
            format!(
                "give {nic} back; by hand: ip -n {} link set dev {NAME} netns {} name {nic}",
                node.name(),
                home.name()
            )
        })
    }

    /// The lines for `ip` that make it what it was.
    fn state(&self) -> String {
        let nic = &self.nic;
        let mut lines = format!("link set dev {nic} mtu {}\n", self.mtu);
        if self.up {
            lines += &format!("link set dev {nic} up\n");
        }
        for address in &self.addresses {
            lines += &format!("address replace {} dev {nic}\n", address.words());
        }
        lines
    }
}

impl Address {
    /// One that must be put back. Link-local ones come by themselves.
    fn of(value: &Value) -> Option<Self> {
        let ip = |key: &str| value[key].as_str()?.parse::<IpAddr>().ok();
        let scope = value["scope"].as_str()?;
        if scope == "link" || scope == "host" {
            return None;
        }
        Some(Self {
            local: ip("local")?,
            length: u8::try_from(value["prefixlen"].as_u64()?).ok()?,
            peer: ip("address"),
            broadcast: ip("broadcast"),
        })
    }

    fn words(&self) -> String {
        let mut words = match self.peer {
            Some(peer) => format!("{} peer {peer}/{}", self.local, self.length),
            None => format!("{}/{}", self.local, self.length),
        };
        if let Some(broadcast) = self.broadcast {
            words += &format!(" broadcast {broadcast}");
        }
        words
    }
}

/// Whether a namespace has an interface of that name.
fn has(netns: &Netns, interface: &str) -> Result<bool> {
    let links = netns.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let links = links.context("/proc/net/dev")?;
    let mut names = links.lines().filter_map(|line| line.split_once(':'));
    Ok(names.any(|(name, _)| name.trim() == interface))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn links() -> Value {
        json!([
            {"ifname": "lo", "link_type": "loopback", "flags": ["LOOPBACK", "UP"], "mtu": 65536, "addr_info": []},
            {"ifname": "eth0", "link_type": "ether", "flags": ["UP"], "mtu": 1500, "addr_info": []},
            {"ifname": "eth1", "link_type": "ether", "flags": ["BROADCAST", "UP"], "mtu": 9000, "addr_info": [
                {"family": "inet", "local": "192.0.2.1", "prefixlen": 24, "broadcast": "192.0.2.255", "scope": "global"},
                {"family": "inet", "local": "192.0.2.9", "address": "198.51.100.1", "prefixlen": 32, "scope": "global"},
                {"family": "inet6", "local": "2001:db8::1", "prefixlen": 64, "scope": "global"},
                {"family": "inet6", "local": "fe80::1", "prefixlen": 64, "scope": "link"},
            ]},
            {"ifname": "eth2", "link_type": "ether", "flags": [], "mtu": 1500, "addr_info": [], "master": "br7"},
            {"ifname": "eth3", "link_type": "ether", "flags": [], "mtu": 1500, "addr_info": [
                {"family": "inet6", "local": "fe80::3", "prefixlen": 64, "scope": "link"},
            ]},
            {"ifname": "eth3.5", "link": "eth3", "link_type": "ether", "linkinfo": {"info_kind": "vlan"}},
            {"ifname": "eth4", "link_type": "ether", "flags": [], "mtu": 1500, "addr_info": []},
            {"ifname": "flannel.1", "link_type": "ether", "linkinfo": {"info_kind": "vxlan", "info_data": {"link": "eth4"}}},
            {"ifname": "eth5", "link_type": "ether", "flags": [], "mtu": 1500, "addr_info": [], "xdp": {"mode": 1}},
            {"ifname": "eth6", "link_type": "ether", "flags": [], "mtu": 1500, "addr_info": []},
            {"ifname": "peer6", "link": "eth6", "link_type": "ether", "linkinfo": {"info_kind": "veth"}},
        ])
    }

    #[test]
    fn a_nic_is_put_back_as_it_was() {
        let eth1 = Borrowed::of(&links(), "eth1", false, true).expect("may be had");
        assert_eq!(
            eth1.state(),
            "link set dev eth1 mtu 9000\n\
             link set dev eth1 up\n\
             address replace 192.0.2.1/24 broadcast 192.0.2.255 dev eth1\n\
             address replace 192.0.2.9 peer 198.51.100.1/32 dev eth1\n\
             address replace 2001:db8::1/64 dev eth1\n"
        );
        assert!(eth1.has([192, 0, 2, 1].into()) && !eth1.has([192, 0, 2, 2].into()));
        let eth6 = Borrowed::of(&links(), "eth6", false, false).expect("a veth is a NIC");
        assert_eq!(eth6.state(), "link set dev eth6 mtu 1500\n");
        let text = serde_json::to_string(&eth1).expect("serializes");
        assert_eq!(
            serde_json::from_str::<Borrowed>(&text).expect("parses"),
            eth1
        );
    }

    #[test]
    fn what_cannot_be_had_is_said_with_a_way_out() {
        for (nic, default, parts) in [
            ("eth9", false, ["\"eth9\"", "--nic takes one of eth0, eth1"]),
            ("lo", false, ["lo is no NIC", "loopback"]),
            (
                "eth0",
                true,
                ["eth0 has this machine's default route", "another NIC"],
            ),
            (
                "eth1",
                false,
                ["eth1 has the address 192.0.2.1", "--nic-in-use"],
            ),
            ("eth2", false, ["eth2 is a port of br7", "nomaster"]),
            (
                "eth3",
                false,
                ["eth3.5 is on eth3", "ip link delete eth3.5"],
            ),
            (
                "eth4",
                false,
                ["flannel.1 is on eth4", "ip link delete flannel.1"],
            ),
            ("eth5", false, ["XDP program on eth5", "end that first"]),
        ] {
            let error = Borrowed::of(&links(), nic, default, false).expect_err(nic);
            let said = error.to_string();
            assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        }
    }
}
