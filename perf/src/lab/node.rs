//! Nodes and pods: who they are, the files Ripstop finds on a node, and its processes there.

use core::net::{Ipv4Addr, Ipv6Addr};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Host;
use super::plan::{Backend, Plan};
use super::process::Process;
use super::userland::UserlandTunnel;
use crate::address::{self, Family, Mac};
use crate::netns::Netns;

const DATAPLANE: &str = "ripstop-dataplane";
const CONTROLPLANE: &str = "ripstop-controlplane";
const CLI: &str = "ripstop";

/// What moves a node's pod traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeKind {
    /// The Ripstop processes do, once they are started.
    Ripstop,
    /// The kernel does, programmed exactly as flannel leaves it.
    PlainLinux,
}

impl NodeKind {
    pub(super) fn explain(self) -> &'static str {
        match self {
            Self::Ripstop => "Ripstop",
            Self::PlainLinux => "plain Linux",
        }
    }
}

/// One node's entry in the lease file. Of each family it has everything or nothing; the MAC addresses
/// are VXLAN's alone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Lease {
    /// Name of the node.
    pub node: String,
    /// Where tunnel packets for it go.
    #[serde(rename = "publicIP", skip_serializing_if = "Option::is_none")]
    pub public_ip: Option<Ipv4Addr>,
    /// The pods it has, in prefix notation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// MAC address of its tunnel end point.
    #[serde(rename = "vtepMAC", skip_serializing_if = "Option::is_none")]
    pub vtep_mac: Option<String>,
    /// The same for IPv6.
    #[serde(rename = "publicIPv6", skip_serializing_if = "Option::is_none")]
    pub public_ipv6: Option<Ipv6Addr>,
    /// The same for IPv6.
    #[serde(rename = "ipv6Subnet", skip_serializing_if = "Option::is_none")]
    pub ipv6_subnet: Option<String>,
    /// The same for IPv6.
    #[serde(rename = "vtepMACv6", skip_serializing_if = "Option::is_none")]
    pub vtep_mac_v6: Option<String>,
}

impl Lease {
    /// The lease of a node of a flat VXLAN lab over IPv4; also of one that the lab does not have.
    #[must_use]
    pub fn of_node(index: u8) -> Self {
        Self::of_plan(&Plan::flat(), index)
    }

    pub(super) fn of_plan(plan: &Plan, index: u8) -> Self {
        let mut lease = Self {
            node: Node::name_of(index),
            ..Self::default()
        };
        let vxlan = plan.backend == Backend::Vxlan;
        for family in plan.families() {
            match family {
                Family::Ipv4 => {
                    lease.public_ip = Some(address::underlay_in(plan.segment(index), index));
                    lease.subnet = Some(address::subnet_prefix(index));
                    lease.vtep_mac = vxlan.then(|| address::vtep_mac(index).to_string());
                }
                Family::Ipv6 => {
                    lease.public_ipv6 = Some(address::underlay6_in(plan.segment(index), index));
                    lease.ipv6_subnet = Some(address::subnet6_prefix(index));
                    lease.vtep_mac_v6 = vxlan.then(|| address::vtep_mac6(index).to_string());
                }
            }
        }
        lease
    }
}

/// A lease file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leases {
    /// One entry per node.
    pub leases: Vec<Lease>,
}

impl Leases {
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        replace_file(
            path,
            &serde_json::to_string_pretty(self).context("leases as JSON")?,
        )
    }
}

/// Replaces a file by rename: a reader sees the old one or the new one, whole.
pub(super) fn replace_file(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).with_context(|| format!("{}", draft.display()))?;
    fs::rename(&draft, path).with_context(|| format!("{}", path.display()))
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    name: String,
    node: u8,
    index: u8,
    netns: Netns,
}

impl Pod {
    pub(super) fn new(node: u8, index: u8, netns: Netns) -> Self {
        Self {
            name: Self::name_of(node, index),
            node,
            index,
            netns,
        }
    }

    pub(super) fn name_of(node: u8, index: u8) -> String {
        format!("n{node}p{index}")
    }

    /// The number of its node.
    #[must_use]
    pub fn node(&self) -> u8 {
        self.node
    }

    /// Its number on the node.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// MAC address of its `eth0`.
    #[must_use]
    pub fn mac(&self) -> Mac {
        address::pod_mac(self.node, self.index)
    }
}

impl Host for Pod {
    fn netns(&self) -> &Netns {
        &self.netns
    }

    fn address(&self) -> Ipv4Addr {
        address::pod(self.node, self.index)
    }

    fn address6(&self) -> Ipv6Addr {
        address::pod6(self.node, self.index)
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// A node: its namespace, its files, its processes.
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    kind: NodeKind,
    netns: Netns,
    pods: Vec<Pod>,
    lab_dir: PathBuf,
    plan: Plan,
    queues: u16,
    dataplane: Mutex<Option<Process>>,
    controlplane: Mutex<Option<Process>>,
    userland: Mutex<Option<UserlandTunnel>>,
}

impl Node {
    pub(super) fn new(
        index: u8,
        kind: NodeKind,
        netns: Netns,
        lab_dir: &Path,
        plan: &Plan,
        queues: u16,
        pods: Vec<Pod>,
    ) -> Self {
        Self {
            name: Self::name_of(index),
            index,
            kind,
            netns,
            pods,
            lab_dir: lab_dir.to_owned(),
            plan: plan.clone(),
            queues,
            dataplane: Mutex::new(None),
            controlplane: Mutex::new(None),
            userland: Mutex::new(None),
        }
    }

    pub(super) fn name_of(index: u8) -> String {
        format!("n{index}")
    }

    /// Its number, which is in all its addresses.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The segment of its first uplink.
    #[must_use]
    pub fn segment(&self) -> u8 {
        self.plan.segment(self.index)
    }

    /// Segment and MAC address of one of its uplinks, which count from 0. A bond is one uplink, and its second
    /// NIC is asked for as if it were another.
    #[must_use]
    pub fn uplink(&self, number: u8) -> (u8, Mac) {
        match (number, self.plan.underlay.bond()) {
            (0, _) => (self.segment(), address::underlay_mac(self.index)),
            (_, Some(_)) => (self.segment(), address::second_uplink_mac(self.index)),
            (_, None) => (
                address::SECOND_UPLINK + self.segment(),
                address::second_uplink_mac(self.index),
            ),
        }
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Its entry in the lease file.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease::of_plan(&self.plan, self.index)
    }

    /// Whether its tunnel is made by a thread of the lab, because its kernel has no such device.
    #[must_use]
    pub fn has_userland_tunnel(&self) -> bool {
        locked(&self.userland).is_some()
    }

    pub(super) fn keep_userland_tunnel(&self, tunnel: UserlandTunnel) {
        *locked(&self.userland) = Some(tunnel);
    }

    pub(super) fn stop_userland_tunnel(&self) {
        *locked(&self.userland) = None;
    }

    /// What moves its pod traffic.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        self.kind
    }

    /// Its pods.
    #[must_use]
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// One of its pods.
    ///
    /// # Panics
    /// There is no such pod.
    #[must_use]
    pub fn pod(&self, index: u8) -> &Pod {
        let pod = self.pods.get(usize::from(index));
        pod.unwrap_or_else(|| {
            panic!(
                "{} has {} pods and no pod {index}",
                self.name,
                self.pods.len()
            )
        })
    }

    /// The directory of its files.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.lab_dir.join(&self.name)
    }

    /// The run directory that its processes share.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// The directory of its data-plane configuration, one file per queue.
    #[must_use]
    pub fn config_dir(&self) -> PathBuf {
        self.dir().join("config")
    }

    /// Its net-conf.json.
    #[must_use]
    pub fn net_conf_file(&self) -> PathBuf {
        self.dir().join("net-conf.json")
    }

    /// Replaces its net-conf.json at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_net_conf(&self, net_conf: &Value) -> Result<()> {
        replace_file(&self.net_conf_file(), &format!("{net_conf:#}"))
    }

    /// The configuration file of one queue of its first uplink.
    #[must_use]
    pub fn queue_config_file(&self, queue: u16) -> PathBuf {
        self.nic_config_file("eth0", queue)
    }

    fn nic_config_file(&self, nic: &str, queue: u16) -> PathBuf {
        self.config_dir().join(format!("{nic}-q{queue}.json"))
    }

    /// Replaces the configuration file of one queue at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_queue_config(&self, queue: u16, config: &Value) -> Result<()> {
        replace_file(&self.queue_config_file(queue), &format!("{config:#}"))
    }

    /// The lease file that its control plane reads when it is started: its own if there is one,
    /// otherwise the one that the lab shares.
    #[must_use]
    pub fn lease_file(&self) -> PathBuf {
        let own = self.own_lease_file();
        if own.exists() {
            own
        } else {
            self.lab_dir.join("leases.json")
        }
    }

    fn own_lease_file(&self) -> PathBuf {
        self.dir().join("leases.json")
    }

    /// Gives this node a lease file of its own, or replaces it at once. A control plane that was
    /// started with the shared file stays with that one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_leases(&self, leases: &Leases) -> Result<()> {
        leases.write(&self.own_lease_file())
    }

    /// Makes the files with which Ripstop starts.
    pub(super) fn write_files(&self, dataplane: &Value) -> Result<()> {
        for dir in [self.run_dir(), self.config_dir()] {
            fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        }
        self.write_net_conf(&self.plan.net_conf())?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        // All nodes of a lab share the machine's CPUs: neighbours take different ones.
        for (uplink, nic) in self.plan.nics().iter().enumerate() {
            for queue in 0..self.queues {
                let mut config = serde_json::json!({
                    "nic": nic,
                    "queue": queue,
                    "cpu": (usize::from(self.index) + uplink + usize::from(queue)) % cpus,
                    "mode": "auto",
                    "polling": "adaptive",
                });
                if let (Some(config), Some(keys)) = (config.as_object_mut(), dataplane.as_object())
                {
                    config.extend(keys.clone());
                }
                replace_file(&self.nic_config_file(nic, queue), &format!("{config:#}"))?;
            }
        }
        Ok(())
    }

    /// Starts the data plane.
    ///
    /// # Errors
    /// It runs already, is not built, or cannot be started. That it comes up is not waited for.
    pub fn start_dataplane(&self) -> Result<()> {
        self.start_dataplane_with(&[])
    }

    /// Starts the data plane with further arguments.
    ///
    /// # Errors
    /// As [`Node::start_dataplane`].
    pub fn start_dataplane_with(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.dataplane_command(&[])?;
        command.args(arguments);
        self.start(&self.dataplane, &mut command, DATAPLANE)
    }

    /// The data plane as a command for the caller to run, behind programs that change what it may
    /// do: `["taskset", "-c", "0"]`. The lab does not know a process that is started so.
    ///
    /// # Errors
    /// It is not built.
    pub fn dataplane_command(&self, wrapper: &[&str]) -> Result<Command> {
        let mut command = self.wrapped(wrapper, DATAPLANE)?;
        command.arg("--config-dir").arg(self.config_dir());
        command.arg("--run-dir").arg(self.run_dir());
        Ok(command)
    }

    /// Starts the control plane.
    ///
    /// # Errors
    /// It runs already, is not built, or cannot be started. That it comes up is not waited for.
    pub fn start_controlplane(&self) -> Result<()> {
        self.start_controlplane_with(&[])
    }

    /// Starts the control plane with further arguments. If they say that leases come from Kubernetes or etcd, it is
    /// not told of the lease file.
    ///
    /// # Errors
    /// As [`Node::start_controlplane`].
    pub fn start_controlplane_with(&self, arguments: &[&str]) -> Result<()> {
        let elsewhere = ["--kube-subnet-mgr", "--etcd-"];
        let elsewhere = |argument: &&str| elsewhere.iter().any(|flag| argument.starts_with(flag));
        let takes_file = !arguments.iter().any(elsewhere);
        let mut command = self.controlplane(&[], takes_file)?;
        command.args(arguments);
        self.start(&self.controlplane, &mut command, CONTROLPLANE)
    }

    /// The control plane as a command for the caller to run: see [`Node::dataplane_command`].
    ///
    /// # Errors
    /// It is not built.
    pub fn controlplane_command(&self, wrapper: &[&str]) -> Result<Command> {
        self.controlplane(wrapper, true)
    }

    fn controlplane(&self, wrapper: &[&str], takes_file: bool) -> Result<Command> {
        let mut command = self.wrapped(wrapper, CONTROLPLANE)?;
        command.arg("--net-config-path").arg(self.net_conf_file());
        if takes_file {
            command.arg("--lease-file").arg(self.lease_file());
        }
        let interfaces = self.plan.interfaces();
        command.args(["--node-name", &self.name, "--iface", &interfaces[0]]);
        command.arg("--run-dir").arg(self.run_dir());
        let subnet_file = self.net_conf_file().with_file_name("subnet.env");
        command.arg("--subnet-file").arg(subnet_file);
        Ok(command)
    }

    fn wrapped(&self, wrapper: &[&str], program: &str) -> Result<Command> {
        let program = binary(program)?;
        Ok(match wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = self.netns.command(first);
                command.args(rest).arg(program);
                command
            }
            None => self.netns.command(program),
        })
    }

    fn start(
        &self,
        slot: &Mutex<Option<Process>>,
        command: &mut Command,
        program: &str,
    ) -> Result<()> {
        let mut slot = locked(slot);
        ensure!(
            !slot.as_ref().is_some_and(Process::is_running),
            "{program} already runs on {}",
            self.name
        );
        // Collects the one before, which has ended, ahead of the new record.
        *slot = None;
        *slot = Some(
            Process::start(command, program, &self.dir())
                .with_context(|| format!("on {}", self.name))?,
        );
        Ok(())
    }

    /// Ends the data plane with SIGKILL and waits until it is gone. Nothing happens when none runs.
    pub fn kill_dataplane(&self) {
        *locked(&self.dataplane) = None;
    }

    /// Ends the control plane with SIGKILL and waits until it is gone. Nothing happens when none runs.
    pub fn kill_controlplane(&self) {
        *locked(&self.controlplane) = None;
    }

    /// Sends the data plane a signal.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_dataplane(&self, signal: i32) -> Result<()> {
        signal_process(&self.dataplane, signal, DATAPLANE, &self.name)
    }

    /// Sends the control plane a signal.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_controlplane(&self, signal: i32) -> Result<()> {
        signal_process(&self.controlplane, signal, CONTROLPLANE, &self.name)
    }

    /// Whether the data plane runs. One that was stopped by a signal does; one that has ended does not.
    #[must_use]
    pub fn dataplane_is_running(&self) -> bool {
        locked(&self.dataplane)
            .as_ref()
            .is_some_and(Process::is_running)
    }

    /// Whether the control plane runs. One that was stopped by a signal does; one that has ended does not.
    #[must_use]
    pub fn controlplane_is_running(&self) -> bool {
        locked(&self.controlplane)
            .as_ref()
            .is_some_and(Process::is_running)
    }

    /// Process id of the data plane, while it has one.
    #[must_use]
    pub fn dataplane_pid(&self) -> Option<i32> {
        locked(&self.dataplane).as_ref().map(Process::pid)
    }

    /// Process id of the control plane, while it has one.
    #[must_use]
    pub fn controlplane_pid(&self) -> Option<i32> {
        locked(&self.controlplane).as_ref().map(Process::pid)
    }

    /// Everything that the data plane has printed on this node.
    #[must_use]
    pub fn dataplane_log(&self) -> String {
        fs::read_to_string(Process::log_path(&self.dir(), DATAPLANE)).unwrap_or_default()
    }

    /// Everything that the control plane has printed on this node.
    #[must_use]
    pub fn controlplane_log(&self) -> String {
        fs::read_to_string(Process::log_path(&self.dir(), CONTROLPLANE)).unwrap_or_default()
    }

    /// Runs the operator's command line on this node and reads its answer as JSON, so `--json`
    /// belongs to the arguments.
    ///
    /// # Errors
    /// It fails, or does not answer in JSON.
    pub fn ripstop(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.ripstop_text(arguments)?;
        serde_json::from_str(&text)
            .with_context(|| format!("answer of ripstop {}: {text:?}", arguments.join(" ")))
    }

    /// Runs the operator's command line on this node and returns what it printed.
    ///
    /// # Errors
    /// It fails.
    pub fn ripstop_text(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.netns.command(binary(CLI)?);
        let output = command
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(arguments)
            .output()
            .context("start ripstop")?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!(
                "ripstop {} on {}: {}: {stderr}",
                arguments.join(" "),
                self.name,
                output.status
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(super) fn adopt_processes(&self) {
        *locked(&self.dataplane) = Process::adopt(DATAPLANE, &self.dir());
        *locked(&self.controlplane) = Process::adopt(CONTROLPLANE, &self.dir());
    }

    /// In the hands of a lab that stays up, the processes outlive this value.
    pub(super) fn release_processes(&self) {
        for slot in [&self.dataplane, &self.controlplane] {
            if let Some(process) = locked(slot).take() {
                process.release();
            }
        }
    }

    pub(super) fn process_summary(&self) -> String {
        let state = |pid: Option<i32>, running: bool| match pid {
            Some(pid) if running => format!("pid {pid}"),
            Some(_) | None => "not running".to_owned(),
        };
        let dataplane = state(self.dataplane_pid(), self.dataplane_is_running());
        let controlplane = state(self.controlplane_pid(), self.controlplane_is_running());
        format!("data plane: {dataplane}, control plane: {controlplane}")
    }

    pub(super) fn dump(&self) -> String {
        let mut text = String::new();
        let commands: [&[&str]; 10] = [
            &["ip", "-br", "addr"],
            &["ip", "-d", "-s", "link"],
            &["ip", "rule"],
            &["ip", "-6", "rule"],
            &["ip", "route", "show", "table", "all", "type", "unicast"],
            &[
                "ip", "-6", "route", "show", "table", "all", "type", "unicast",
            ],
            &["ip", "neigh"],
            &["bridge", "fdb"],
            &["nft", "list", "ruleset"],
            &["nstat", "-az", "Ip*", "Udp*", "Tcp*Err*", "Icmp*Err*"],
        ];
        for command in commands {
            let output = self
                .output(command)
                .unwrap_or_else(|error| format!("{error:#}\n"));
            text.push_str(&format!(
                "\n--- {}: {}\n{output}",
                self.name,
                command.join(" ")
            ));
        }
        for (program, log) in [
            (DATAPLANE, self.dataplane_log()),
            (CONTROLPLANE, self.controlplane_log()),
        ] {
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines
                .get(lines.len().saturating_sub(60)..)
                .unwrap_or_default()
                .join("\n");
            text.push_str(&format!(
                "\n--- {}: end of the log of {program}\n{tail}\n",
                self.name
            ));
        }
        text
    }
}

impl Host for Node {
    fn netns(&self) -> &Netns {
        &self.netns
    }

    fn address(&self) -> Ipv4Addr {
        address::underlay_in(self.segment(), self.index)
    }

    fn address6(&self) -> Ipv6Addr {
        address::underlay6_in(self.segment(), self.index)
    }

    fn name(&self) -> &str {
        &self.name
    }
}

fn locked<T>(slot: &Mutex<Option<T>>) -> MutexGuard<'_, Option<T>> {
    // What is in here is replaced in one go, so it is whole at every moment, also when a holder of the lock has panicked.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal_process(
    slot: &Mutex<Option<Process>>,
    signal: i32,
    program: &str,
    node: &str,
) -> Result<()> {
    match &*locked(slot) {
        Some(process) => process.signal(signal).with_context(|| format!("on {node}")),
        None => bail!("{program} was not started on {node}"),
    }
}

/// Finds one of Ripstop's programs: where `RIPSTOP_BIN_DIR` says, or beside this program, or one
/// directory up (test programs are in `target/<profile>/deps`).
fn binary(name: &str) -> Result<PathBuf> {
    let dirs: Vec<PathBuf> = match env::var_os("RIPSTOP_BIN_DIR") {
        Some(dir) => vec![PathBuf::from(dir)],
        None => {
            let this = env::current_exe().context("path of this program")?;
            this.ancestors()
                .skip(1)
                .take(2)
                .map(Path::to_owned)
                .collect()
        }
    };
    match dirs
        .iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
    {
        Some(path) => Ok(path),
        None => {
            let tried: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
            bail!(
                "{name} is in none of {}; build it with: cargo build --workspace",
                tried.join(", ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_file_has_the_keys_of_version_1() {
        let leases = Leases {
            leases: vec![Lease::of_node(1)],
        };
        let json = serde_json::to_value(&leases).expect("JSON");
        let expected = serde_json::json!({"leases": [{
            "node": "n1", "publicIP": "10.199.0.11", "subnet": "10.244.1.0/24", "vtepMAC": "02:52:53:00:00:01",
        }]});
        assert_eq!(json, expected);
    }

    #[test]
    fn a_program_that_is_not_built_is_named() {
        let error = binary("ripstop-no-such-program")
            .expect_err("is not there")
            .to_string();
        assert!(
            error.contains("ripstop-no-such-program") && error.contains("cargo build"),
            "{error}"
        );
    }
}
