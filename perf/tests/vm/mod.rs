//! What tests inside a guest of the VM lab share: the guest's kernel, its real NICs, its devices as the emulator sees them.

use core::time::Duration;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use ripstop_fib::stats::{Counter, XdpCounter};
use ripstop_perf::{
    Fabric, Host, KernelCounters, Lab, LinkCounters, Node, Ping, Workers, address, wait_until,
};
use serde_json::{Value, json};

use crate::common::{
    by_xdp, check_conservation, check_no_damage, kernel_counters, quiet, refused_since, xdp,
};

/// How long a wait may take in a guest that is itself waiting for its turn.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The MAC addresses with which `perf/vm/run --wire` makes its two NICs.
const NEAR: &str = "02:52:53:0f:00:01";
const FAR: &str = "02:52:53:0f:00:02";

/// Version of the guest's kernel, such as (6, 12).
pub(crate) fn kernel() -> Result<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
    let mut numbers = release.split(['.', '-']).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("kernel release {release:?}"),
    }
}

/// Says that a test cannot run here, and why. `perf/vm/test` counts it as not run, not as passed.
pub(crate) fn not_run(reason: &str) -> Result<()> {
    let thread = thread::current();
    let test = thread.name().context("name of the test")?;
    let dir = Path::new("/out/not-run");
    fs::create_dir_all(dir).context("/out: is this a guest?")?;
    fs::write(dir.join(test), reason).context("/out/not-run")
}

/// Hands a table, a log or a number to the one who reads the results.
pub(crate) fn note(file: &str, text: &str) -> Result<()> {
    fs::write(Path::new("/out").join(file), text).with_context(|| format!("/out/{file}"))
}

/// A node's `eth0` made of the guest's real NIC instead of a veth: its queues are the driver's. The switch of the lab gets
/// the NIC at the other end of the wire, under the name that the node's port always has.
///
/// ```text
///   fabric br0 ── n1 = far NIC ══ the emulator's wire ══ near NIC = eth0 of node n1
/// ```
pub(crate) fn plug_in(lab: &Lab, node: &Node, queues: u16) -> Result<()> {
    let port = Fabric::port(node.index());
    lab.fabric().output(&["ip", "link", "del", &port])?;
    rename(&nic(FAR)?, lab.fabric(), &port)?;
    let mtu = lab.mtu();
    command(
        lab.fabric(),
        &format!("ip link set {port} mtu {mtu} master br0 up"),
    )?;
    plug_in_near(lab, node, queues)
}

/// The node's end alone: of a NIC that has been away.
pub(crate) fn plug_in_near(lab: &Lab, node: &Node, queues: u16) -> Result<()> {
    rename(&nic(NEAR)?, node, "eth0")?;
    let (index, mtu) = (node.index(), lab.mtu());
    // A driver that already has so many refuses to be told.
    if channel_count(node)? != u64::from(queues) {
        set_channels(node, queues)?;
    }
    let mac = address::underlay_mac(index);
    let interface = lab.underlay().interface();
    let mut lines = vec![
        // As everywhere in the lab: the sender sums. The emulated igb does not sum what is in a tunnel.
        "ethtool -K eth0 tx off".to_owned(),
        format!("ip link set eth0 address {mac}"),
        format!("ip link set eth0 mtu {mtu} up"),
    ];
    if let Some(id) = lab.underlay().vlan() {
        lines.push(format!(
            "ip link add link eth0 name {interface} type vlan id {id}"
        ));
        lines.push(format!("ip link set {interface} up"));
    }
    lines.push(format!(
        "ip addr add {}/24 dev {interface}",
        address::underlay(index)
    ));
    // The device before it took its routes along.
    lines.push(format!("ip route replace default via {}", address::FABRIC));
    lines.iter().try_for_each(|line| command(node, line))?;
    reaches_the_switch(node)
}

/// Moves a NIC of the guest into a namespace of the lab.
fn rename(nic: &str, host: &dyn Host, name: &str) -> Result<()> {
    let namespace = host.netns().name();
    run(&["ip", "link", "set", nic, "down"])?;
    run(&["ip", "link", "set", nic, "netns", namespace, "name", name]).map(drop)
}

/// Runs a command line in a namespace.
pub(crate) fn command(host: &dyn Host, line: &str) -> Result<()> {
    let argv: Vec<&str> = line.split(' ').collect();
    host.output(&argv).map(drop)
}

/// Gives the node's NIC another number of queues.
pub(crate) fn set_channels(node: &Node, queues: u16) -> Result<()> {
    command(node, &format!("ethtool -L eth0 combined {queues}"))
}

/// The near NIC on its bus: to be asked for while the NIC is in the guest's own namespace.
#[derive(Debug, Clone)]
pub(crate) struct BusDevice {
    path: PathBuf,
}

impl BusDevice {
    pub(crate) fn of_near() -> Result<Self> {
        let path = Path::new("/sys/class/net").join(nic(NEAR)?).join("device");
        let path = fs::canonicalize(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Self { path })
    }

    /// Its driver as a folder, which it has while it is bound.
    pub(crate) fn driver(&self) -> Result<PathBuf> {
        let link = self.path.join("driver");
        fs::canonicalize(&link).with_context(|| format!("{}", link.display()))
    }

    /// Takes a driver off the device, or gives it one.
    pub(crate) fn set_bound(&self, driver: &Path, bound: bool) -> Result<()> {
        let file = driver.join(if bound { "bind" } else { "unbind" });
        let name = self.path.file_name().context("a device has a name")?;
        let name = name.to_string_lossy();
        fs::write(&file, name.as_bytes()).with_context(|| format!("{name} > {}", file.display()))
    }

    /// Its NUMA node, where the guest has several. A virtio device has it from the PCI device that it is on.
    pub(crate) fn numa_node(&self) -> Result<Option<u16>> {
        if !Path::new("/sys/devices/system/node/node1").exists() {
            return Ok(None);
        }
        let mut files = self.path.ancestors().map(|path| path.join("numa_node"));
        let file = files.find(|file| file.exists()).context("no numa_node")?;
        let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        Ok(Some(text.trim().parse().with_context(|| text.clone())?))
    }
}

/// The emulator's monitor, which speaks QMP: a JSON object a line.
#[derive(Debug)]
pub(crate) struct Monitor {
    port: BufReader<File>,
}

impl Monitor {
    pub(crate) fn open() -> Result<Self> {
        let port = File::options().read(true).write(true).open("/dev/monitor");
        let mut monitor = Self {
            port: BufReader::new(port.context("/dev/monitor: is this a guest?")?),
        };
        // The first of the guest's programs that speaks to it has to begin so, and the others may not.
        drop(monitor.execute("qmp_capabilities", &json!({})));
        Ok(monitor)
    }

    /// Runs one command, and waits for its end.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let id = format!("{command} {arguments}");
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        writeln!(self.port.get_mut(), "{request}").context("write to the monitor")?;
        loop {
            let mut line = String::new();
            let bytes = self
                .port
                .read_line(&mut line)
                .context("the monitor's answer")?;
            ensure!(bytes > 0, "the monitor has gone");
            let answer: Value = serde_json::from_str(&line).unwrap_or_default();
            // The rest are events.
            if answer["id"] == id.as_str() {
                ensure!(answer["error"].is_null(), "{id}: {}", answer["error"]);
                return Ok(());
            }
        }
    }
}

/// What `perf/vm/run --wire` calls the near NIC for the monitor.
pub(crate) const NEAR_DEVICE: &str = "near";

/// Waits until a packet really comes back: a carrier is reported up before it carries.
pub(crate) fn reaches_the_switch(node: &Node) -> Result<()> {
    let what = format!("{} reaches the switch", node.name());
    wait_until(&what, PATIENCE, || {
        let ping = Ping::to_address(node, address::FABRIC).count(1).run();
        ping.is_ok_and(|report| report.received == 1)
    })
}

/// Channels of a node's NIC that are in use.
pub(crate) fn channel_count(node: &Node) -> Result<u64> {
    let text = node.output(&["ethtool", "-l", "eth0"])?;
    let current = text.split("Current").nth(1).context("ethtool -l")?;
    let line = current.lines().find(|line| line.starts_with("Combined:"));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("channels in {text:?}"))
}

/// The name that a NIC of the guest has at the moment. One that a lab has used comes back when the lab's namespaces are
/// gone, which the kernel does in its own time.
fn nic(mac: &str) -> Result<String> {
    let mut found = None;
    let what = format!("the NIC {mac} is in the guest's own namespace (perf/vm/run --wire)");
    wait_until(&what, PATIENCE, || {
        let links = run(&["ip", "-j", "link"]).unwrap_or_default();
        let links: Value = serde_json::from_str(&links).unwrap_or_default();
        // The permanent address is told only where another one was set.
        let is_it =
            |link: &&Value| link["permaddr"].as_str().or(link["address"].as_str()) == Some(mac);
        let link = links.as_array().and_then(|links| links.iter().find(is_it));
        found = link
            .and_then(|link| link["ifname"].as_str())
            .map(str::to_owned);
        found.is_some()
    })?;
    found.context(what)
}

/// Runs a program of the guest, outside all namespaces of the lab.
pub(crate) fn run(argv: &[&str]) -> Result<String> {
    let (program, arguments) = argv.split_first().context("nothing to run")?;
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("start {program}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {stderr}", argv.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What the books of all Ripstop nodes say before some traffic, to be compared with what they say after it.
///
/// A guest shares its CPUs with whatever else its host does. When a worker does not get to run for a second, its packets
/// take the kernel's path, as they must, and are no loss: they are counted on the standby device.
pub(crate) struct Books {
    kernel: Vec<(String, KernelCounters)>,
    nodes: BTreeMap<u8, (Workers, LinkCounters)>,
}

impl Books {
    pub(crate) fn open(lab: &Lab) -> Result<Self> {
        let nodes = lab.ripstop_nodes().map(|node| {
            let standby = node.standby_counters()?;
            Ok((node.index(), (quiet(lab, node)?, standby)))
        });
        Ok(Self {
            nodes: nodes.collect::<Result<_>>()?,
            kernel: kernel_counters(lab)?,
        })
    }

    /// Exactly so many packets came to each node from others and left it for others; none was refused or damaged, and all
    /// frames are there. Says how many of them the standby has carried.
    pub(crate) fn close(&self, lab: &Lab, expected: impl Fn(&Node) -> (u64, u64)) -> Result<u64> {
        let mut by_standby = 0;
        for node in lab.ripstop_nodes() {
            let name = node.name();
            let (before, standby_before) =
                self.nodes.get(&node.index()).context("was read before")?;
            let (after, standby) = (quiet(lab, node)?, node.standby_counters()?);
            check_conservation(name, &after)?;
            let grown = |counter| after.total(counter) - before.total(counter);
            let (standby_in, standby_out) = (
                standby.rx_packets - standby_before.rx_packets,
                standby.tx_packets - standby_before.tx_packets,
            );
            let arrived = grown(Counter::NicRxPackets) + standby_in;
            let left = grown(Counter::NicTxPackets) + standby_out;
            let stalled = xdp(&after, XdpCounter::Stalled) - xdp(before, XdpCounter::Stalled);
            let mut refused = refused_since(&after, before);
            refused.remove(&by_xdp(XdpCounter::Stalled));
            ensure!(refused.is_empty(), "refused by {name}: {refused:?}");
            ensure!(
                standby_in == stalled,
                "{name}: {standby_in} packets on the standby, {stalled} were left to it"
            );
            ensure!(
                (arrived, left) == expected(node),
                "{name}: {arrived} packets arrived and {left} left; expected are {:?}; on the standby {standby_in}, {standby_out}",
                expected(node)
            );
            by_standby += standby_in + standby_out;
        }
        check_no_damage(lab, &self.kernel)?;
        Ok(by_standby)
    }
}
