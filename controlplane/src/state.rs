//! What the control plane says about itself to the operator's CLI: `<run-dir>/controlplane.json`.

use core::net::IpAddr;
use std::io;
use std::path::Path;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::traffic::Mode;

/// Name of the file in the run directory.
pub const STATE_FILE: &str = "controlplane.json";

/// A control plane's own account, as of its last change.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// This node's name.
    pub node: String,
    /// Where leases come from.
    pub lease_source: String,
    /// How packets reach other nodes, as `net-conf.json` calls it.
    #[serde(default)]
    pub backend: String,
    /// The standby's tunnel devices.
    #[serde(default)]
    pub standby_devices: Vec<String>,
    /// The UDP port that the kernel takes `udp` backend packets from, if it does.
    #[serde(default)]
    pub fou_port: Option<u16>,
    /// The families whose tunnel packets are filtered.
    #[serde(default)]
    pub filtered: Vec<String>,
    /// Pods may not send in the name of nodes.
    #[serde(default)]
    pub guard: bool,
    /// The masquerade and forward rules.
    #[serde(default)]
    pub rules: Option<RulesState>,
    /// The underlay interface, if one was found.
    pub underlay: Option<String>,
    /// The interfaces that workers send by, with their NICs.
    #[serde(default)]
    pub uplinks: Vec<String>,
    /// Our outer addresses.
    #[serde(default)]
    pub public_ips: Vec<IpAddr>,
    /// MTU of the pods in IPv4.
    #[serde(default)]
    pub pod_mtu: Option<u32>,
    /// MTU of the pods in IPv6.
    #[serde(default)]
    pub pod_mtu6: Option<u32>,
    /// Our routing table.
    pub table: u32,
    /// Peers that workers cannot send to, and why, for the first few.
    pub unresolved: Vec<String>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// The parts that have these problems, each once.
    #[serde(default)]
    pub problem_parts: Vec<String>,
    /// When the control plane started, in seconds since 1970.
    #[serde(default)]
    pub started: f64,
}

/// The masquerade and forward rules that a control plane keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RulesState {
    /// Who holds them.
    pub mode: Mode,
    /// Pods talk to the outside in the name of their node.
    pub masquerade: bool,
    /// Forwarded packets from and to pods are accepted.
    pub forward: bool,
    /// Destinations that pods reach with their own address.
    pub no_masquerade: Vec<IpNet>,
}

impl State {
    /// Reads the account that a control plane left in `run_dir`.
    pub fn read(run_dir: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(run_dir.join(STATE_FILE))?;
        serde_json::from_slice(&bytes).map_err(io::Error::other)
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        let temporary = run_dir.join(format!(".{STATE_FILE}.{}", std::process::id()));
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(temporary, run_dir.join(STATE_FILE))
    }
}
