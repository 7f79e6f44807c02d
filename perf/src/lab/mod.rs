//! The lab itself: what is in it, how it comes up, how all of it goes away.
//!
//! ```text
//!             fabric namespace: bridge br0 10.199.0.1/24, a port per node, one for the attacker
//!        ┌────────────┴────────────┬──────────────────────────┐
//!   node namespace            node namespace             attacker namespace
//!   eth0 10.199.0.11          eth0 10.199.0.12           eth0 10.199.0.66
//!   cni0 10.244.1.1/24        cni0 10.244.2.1/24
//!        │                         │
//!   pod namespace             pod namespace
//!   eth0 10.244.1.2           eth0 10.244.2.2
//! ```
//!
//! Every lab leaves a description in `/run/ripstop-lab/<name>.json`. While it names an owner, the
//! lab belongs to that process; when the owner was killed before it could take the lab down, the
//! next lab to come up does it. A lab without owner ([`Lab::persist`]) stays until someone opens
//! it by name and takes it down.

mod borrowed;
mod node;
mod plan;
mod process;
mod ripstop;
mod setup;
mod userland;

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{self as this_process, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use borrowed::Borrowed;
pub use node::{Lease, Leases, Node, NodeKind, Pod};
pub use plan::{Backend, BondMode, Families, Underlay};
pub use ripstop::{DETOUR_TABLE, Workers};

use plan::Plan;
pub(crate) use setup::set_offloads;

use crate::address::{self, Family};
use crate::counters::{KernelCounters, LinkCounters};
use crate::frame::{Ethernet, Inner, Ipv4, Udp, Vxlan, VxlanFrame};
use crate::netns::{self, Netns};
use crate::stack::{Frame, Header, Ipv6};
use crate::sys;

/// Where the descriptions of labs are.
const STATE_DIR: &str = "/run/ripstop-lab";

/// Environment variable with a JSON object: keys for the data-plane configuration files of every lab, so that any test
/// runs with another host door, for example.
pub const DATAPLANE_VARIABLE: &str = "RIPSTOP_LAB_DATAPLANE";

/// Adds the keys of one object to another, in place of those that it has.
fn merge(into: &mut Value, keys: Value) {
    match (into, keys) {
        (Value::Object(into), Value::Object(keys)) => into.extend(keys),
        (_, Value::Null) => {}
        (into, keys) => *into = keys,
    }
}

/// The machine's cores, for as long as the guard lives: of the tests of one process, one at a time has them.
pub fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a command line of plain words on a host, and returns what it printed.
///
/// # Errors
/// The program cannot be started, or it fails.
pub fn run(host: &dyn Host, command: &str) -> Result<String> {
    let argv: Vec<&str> = command.split_whitespace().collect();
    host.output(&argv)
}

/// Anything in the lab that has a network namespace and an address: node, pod, fabric, attacker.
pub trait Host: Sync {
    /// The namespace.
    fn netns(&self) -> &Netns;

    /// The address under which the others know it.
    fn address(&self) -> Ipv4Addr;

    /// The same for IPv6.
    fn address6(&self) -> Ipv6Addr;

    /// The address of a family.
    fn address_of(&self, family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => self.address().into(),
            Family::Ipv6 => self.address6().into(),
        }
    }

    /// The short name, such as `n1` or `n1p0`.
    fn name(&self) -> &str;

    /// Runs a program inside to its end.
    ///
    /// # Errors
    /// The program cannot be started. Its own failure is in the [`Output`].
    fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.netns().exec(argv)
    }

    /// Runs a program inside to its end and returns what it printed; its failure is an error.
    ///
    /// # Errors
    /// The program cannot be started, or it fails.
    fn output(&self, argv: &[&str]) -> Result<String> {
        self.netns().output(argv)
    }

    /// The kernel's protocol counters inside.
    ///
    /// # Errors
    /// The namespace is gone.
    fn kernel_counters(&self) -> Result<KernelCounters> {
        self.netns().run(KernelCounters::read)?
    }

    /// The counters of one interface inside.
    ///
    /// # Errors
    /// There is no such interface.
    fn link_counters(&self, interface: &str) -> Result<LinkCounters> {
        LinkCounters::from_ip_json(
            &self.output(&["ip", "-s", "-j", "link", "show", "dev", interface])?,
        )
    }
}

/// The underlay: one switch between all nodes.
#[derive(Debug)]
pub struct Fabric {
    netns: Netns,
}

impl Fabric {
    /// The switch port that leads to a node. All that the node sends and gets passes here, also
    /// what XDP takes away before the node's own packet sockets could see it.
    #[must_use]
    pub fn port(node: u8) -> String {
        Self::uplink_port(node, 0)
    }

    /// The same for one of a node's uplinks, or of the NICs of its bond; they count from 0.
    #[must_use]
    pub fn uplink_port(node: u8, uplink: u8) -> String {
        match uplink {
            0 => format!("n{node}"),
            _ => format!("n{node}u{uplink}"),
        }
    }

    /// The switch's end of a node's bond, where it has one: both ports joined.
    #[must_use]
    pub fn bond(node: u8) -> String {
        format!("n{node}b")
    }

    /// The bridge of a segment, which is also its router's interface.
    #[must_use]
    pub fn bridge(segment: u8) -> String {
        format!("br{segment}")
    }
}

impl Host for Fabric {
    fn netns(&self) -> &Netns {
        &self.netns
    }

    fn address(&self) -> Ipv4Addr {
        address::FABRIC
    }

    fn address6(&self) -> Ipv6Addr {
        address::FABRIC6
    }

    fn name(&self) -> &'static str {
        "fabric"
    }
}

/// Someone on the underlay who is nobody's peer.
#[derive(Debug)]
pub struct Attacker {
    netns: Netns,
}

impl Host for Attacker {
    fn netns(&self) -> &Netns {
        &self.netns
    }

    fn address(&self) -> Ipv4Addr {
        address::ATTACKER
    }

    fn address6(&self) -> Ipv6Addr {
        address::ATTACKER6
    }

    fn name(&self) -> &'static str {
        "attacker"
    }
}

/// What is written down about a lab: enough to rebuild every name in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Description {
    name: String,
    owner: Option<process::Identity>,
    dir: PathBuf,
    plan: Plan,
    queues: u16,
    nodes: Vec<NodeKind>,
    pods: u8,
    /// What is the first node's `eth0`, where that is no veth of the lab's own.
    #[serde(default)]
    borrowed: Option<Borrowed>,
}

impl Description {
    fn path(name: &str) -> PathBuf {
        Path::new(STATE_DIR).join(format!("{name}.json"))
    }

    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
    }

    /// Claims the name: false when another lab has it. The file appears complete or not at all.
    fn claim(&self) -> Result<bool> {
        fs::create_dir_all(STATE_DIR).context(STATE_DIR)?;
        let draft = self.draft()?;
        let outcome = fs::hard_link(&draft, Self::path(&self.name));
        fs::remove_file(&draft).with_context(|| format!("{}", draft.display()))?;
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error).with_context(|| format!("claim the lab name {}", self.name)),
        }
    }

    fn replace(&self) -> Result<()> {
        let draft = self.draft()?;
        fs::rename(&draft, Self::path(&self.name))
            .with_context(|| format!("describe lab {}", self.name))
    }

    fn draft(&self) -> Result<PathBuf> {
        let draft = Path::new(STATE_DIR).join(format!(".{}.{}", self.name, this_process::id()));
        let text = serde_json::to_string_pretty(self).context("describe the lab")?;
        fs::write(&draft, text).with_context(|| format!("{}", draft.display()))?;
        Ok(draft)
    }
}

/// What a lab shall contain.
#[derive(Debug, Clone)]
#[must_use]
pub struct LabBuilder {
    name: Option<String>,
    nodes: Vec<NodeKind>,
    pods: u8,
    plan: Plan,
    queues: u16,
    dataplane: Value,
    borrowed: Option<Borrowed>,
}

impl LabBuilder {
    /// Adds nodes that run Ripstop (once their processes are started).
    pub fn ripstop(mut self, count: u8) -> Self {
        self.nodes.extend((0..count).map(|_| NodeKind::Ripstop));
        self
    }

    /// Adds nodes without Ripstop: the Linux kernel alone, programmed as flannel leaves it.
    pub fn linux(mut self, count: u8) -> Self {
        self.nodes.extend((0..count).map(|_| NodeKind::PlainLinux));
        self
    }

    /// Pods on each node; 1 unless said otherwise.
    pub fn pods(mut self, count: u8) -> Self {
        self.pods = count;
        self
    }

    /// MTU of the underlay; pods have the tunnel's overhead less. 1500 unless said otherwise.
    pub fn mtu(mut self, mtu: u16) -> Self {
        self.plan.mtu = mtu;
        self
    }

    /// The IPv4 network of the pods, in prefix notation: one that has `10.244.0.0/16`, which is what it is unless said
    /// otherwise, and room for the leases of nodes that the lab does not have.
    pub fn pod_network(mut self, network: impl Into<String>) -> Self {
        self.plan.network = network.into();
        self
    }

    /// flannel's backend; VXLAN unless said otherwise.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.plan.backend = backend;
        self
    }

    /// Sends packets to peers of the same segment without a tunnel.
    pub fn direct_routing(mut self) -> Self {
        self.plan.direct = true;
        self
    }

    /// The address families; IPv4 alone unless said otherwise.
    pub fn families(mut self, families: Families) -> Self {
        self.plan.families = families;
        self
    }

    /// The segment of each node, in order, at most 99; all are on segment 0 unless said otherwise.
    /// The fabric routes between them.
    pub fn segments(mut self, segments: &[u8]) -> Self {
        self.plan.segments = segments.to_vec();
        self
    }

    /// So many routers on each segment, 1 or 2, and the nodes' default route goes over all of them.
    pub fn routers(mut self, count: u8) -> Self {
        self.plan.routers = count;
        self
    }

    /// So many uplinks of each node, 1 or 2, each on a segment of its own, and the nodes' default
    /// route goes over all of them.
    pub fn uplinks(mut self, count: u8) -> Self {
        self.plan.uplinks = count;
        self
    }

    /// What the interface is made of that a node has its addresses on; a NIC unless said otherwise. The fabric
    /// itself and its routers are on a tagged underlay as well, the attacker is not.
    pub fn underlay(mut self, underlay: Underlay) -> Self {
        self.plan.underlay = underlay;
        self
    }

    /// Receive and transmit queues of each NIC of a node; 1 unless said otherwise.
    pub fn queues(mut self, count: u16) -> Self {
        self.queues = count;
        self
    }

    /// A NIC of this machine as the first node's `eth0`. The fabric has no port for that node then: what it sends goes out on
    /// the wire. The lab must be brought up in the namespace that the NIC was looked at in.
    pub fn nic(mut self, nic: Borrowed) -> Self {
        self.borrowed = Some(nic);
        self
    }

    /// A name of one's own; without, the lab invents one that is free.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keys to add to (or change in) every data-plane configuration file, on top of those of the environment
    /// ([`DATAPLANE_VARIABLE`]).
    pub fn dataplane_config(mut self, keys: Value) -> Self {
        merge(&mut self.dataplane, keys);
        self
    }

    /// Brings the lab up. No Ripstop process runs in it yet.
    ///
    /// # Errors
    /// [`DATAPLANE_VARIABLE`] is not JSON, not root, a name that is taken, more nodes or pods than addresses, or the kernel refuses
    /// something; what was already there is taken down again.
    pub fn up(self) -> Result<Lab> {
        ensure!(
            sys::is_root(),
            "the lab makes network namespaces: run it as root"
        );
        ensure!(!self.nodes.is_empty(), "a lab needs at least one node");
        ensure!(
            self.nodes.len() <= address::NODES_MAX.into(),
            "at most {} nodes",
            address::NODES_MAX
        );
        ensure!(
            self.pods <= address::PODS_MAX,
            "at most {} pods on a node",
            address::PODS_MAX
        );
        ensure!((1..=64).contains(&self.queues), "1 to 64 queues");
        ensure!(
            self.plan.mtu >= 576 + address::VXLAN_OVERHEAD,
            "MTU {} is too small for a pod network",
            self.plan.mtu
        );
        ensure!(
            self.plan.families().next().is_some(),
            "flannel has no {} without IPv4",
            self.plan.backend.name()
        );
        let ways = [self.plan.routers, self.plan.uplinks];
        ensure!(
            ways.iter().all(|count| (1..=2).contains(count)),
            "1 or 2 routers and uplinks"
        );
        ensure!(
            self.plan.underlay == Underlay::Nic
                || (ways == [1, 1] && self.plan.segments.is_empty()),
            "a tagged or bonded underlay has one segment, with one router"
        );
        ensure!(
            self.plan
                .segments
                .iter()
                .all(|segment| *segment < address::SECOND_UPLINK),
            "segments from 0 to {}",
            address::SECOND_UPLINK - 1
        );
        ensure!(
            self.borrowed.is_none() || (self.plan.underlay == Underlay::Nic && ways == [1, 1]),
            "a NIC of this machine is one uplink, without a tag"
        );
        sweep();
        let mut dataplane = match env::var(DATAPLANE_VARIABLE) {
            Ok(text) => serde_json::from_str(&text).context(DATAPLANE_VARIABLE)?,
            Err(_) => Value::Null,
        };
        merge(&mut dataplane, self.dataplane.clone());
        let description = self.claim_name()?;
        let lab = Lab::of(description);
        lab.set_up(&dataplane)
            .with_context(|| format!("bring up lab {}", lab.name()))?;
        Ok(lab)
    }

    /// Brings the lab up, runs a test in it, and takes it down. When the test fails, it first prints
    /// the kernel state of each node and the end of each log.
    ///
    /// # Errors
    /// As [`LabBuilder::up`]; otherwise the test's own.
    #[expect(
        clippy::print_stderr,
        reason = "a dump is for the person who reads the failed test"
    )]
    pub fn run<T>(self, test: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
        let lab = self.up()?;
        test(&lab).inspect_err(|_error| eprintln!("{}", lab.dump()))
    }

    fn claim_name(&self) -> Result<Description> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mut description = Description {
            name: String::new(),
            owner: Some(process::Identity::of_this_process()?),
            dir: PathBuf::new(),
            plan: self.plan.clone(),
            queues: self.queues,
            nodes: self.nodes.clone(),
            pods: self.pods,
            borrowed: self.borrowed.clone(),
        };
        for _attempt in 0..1000 {
            description.name = match &self.name {
                Some(name) => name.clone(),
                None => format!(
                    "{:x}-{}",
                    this_process::id(),
                    COUNTER.fetch_add(1, Ordering::Relaxed)
                ),
            };
            check_name(&description.name)?;
            description.dir = directory_of(&description.name);
            if description.claim()? {
                return Ok(description);
            }
            if let Some(name) = &self.name {
                bail!("lab {name:?} is already up (ripstop-perf lab down --name {name})");
            }
        }
        bail!("no free lab name; see {STATE_DIR}");
    }
}

/// Where a lab's files are: in memory, as a node's `/run` is, because the run directories hold
/// shared memory that workers write all the time.
fn directory_of(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        env::temp_dir()
    };
    parent.join(format!("ripstop-lab-{name}"))
}

fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        (1..=24).contains(&name.len()) && name.chars().all(good) && !name.starts_with('-'),
        "lab name {name:?}: use 1 to 24 of a-z, 0-9 and -, not starting with -"
    );
    Ok(())
}

/// Takes down the labs whose owner was killed before it could. A lab that cannot be read or taken
/// down is none of the caller's business.
fn sweep() {
    let Ok(entries) = fs::read_dir(STATE_DIR) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Ok(description) = Description::read(&path) else {
            continue;
        };
        if description
            .owner
            .as_ref()
            .is_some_and(|owner| !owner.is_alive())
        {
            let lab = Lab::of(description);
            // They would go on in a namespace without a name, on CPUs that others measure on.
            lab.nodes.iter().for_each(Node::adopt_processes);
            drop(lab);
        }
    }
}

/// The lab that has a NIC of this name, if there is one.
fn lab_with(nic: &str) -> Option<String> {
    let mut labs = Lab::names().into_iter();
    labs.find(|name| {
        let description = Description::read(&Description::path(name));
        let borrowed = description.ok().and_then(|lab| lab.borrowed);
        borrowed.is_some_and(|borrowed| borrowed.nic() == nic)
    })
}

/// A pod network in network namespaces. Dropping it ends its processes, deletes its namespaces
/// and removes its files; with a panic under way it first prints what its processes logged.
#[derive(Debug)]
pub struct Lab {
    description: Description,
    fabric: Fabric,
    attacker: Attacker,
    nodes: Vec<Node>,
    keep: bool,
}

impl Lab {
    /// Starts to describe a lab.
    pub fn builder() -> LabBuilder {
        LabBuilder {
            name: None,
            nodes: Vec::new(),
            pods: 1,
            plan: Plan::flat(),
            queues: 1,
            dataplane: Value::Object(serde_json::Map::new()),
            borrowed: None,
        }
    }

    /// Opens a lab that was left behind by [`Lab::persist`]. Dropping what this returns leaves the
    /// lab up; [`Lab::down`] takes it down.
    ///
    /// # Errors
    /// There is no such lab.
    pub fn open(name: &str) -> Result<Self> {
        check_name(name)?;
        let path = Description::path(name);
        ensure!(
            path.exists(),
            "there is no lab {name:?}; up are: {}",
            Self::names().join(", ")
        );
        let mut lab = Self::of(Description::read(&path)?);
        lab.keep = true;
        for node in &lab.nodes {
            node.adopt_processes();
        }
        Ok(lab)
    }

    /// The names of all labs that are up on this machine.
    #[must_use]
    pub fn names() -> Vec<String> {
        let entries = fs::read_dir(STATE_DIR).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                entry
                    .file_name()
                    .to_str()?
                    .strip_suffix(".json")
                    .map(str::to_owned)
            })
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        names
    }

    /// Leaves the lab up, processes and all, when this value is dropped and when this process ends.
    ///
    /// # Errors
    /// The lab's description cannot be written, or a node's tunnel is a thread of this process; the
    /// lab still belongs to this process then.
    pub fn persist(mut self) -> Result<()> {
        ensure!(
            !self.nodes.iter().any(Node::has_userland_tunnel),
            "a plain node's {} tunnel is made in userland, by this process",
            self.description.plan.backend.name()
        );
        self.description.owner = None;
        self.description.replace()?;
        self.keep = true;
        Ok(())
    }

    /// Takes the lab down, and says what went wrong with that.
    ///
    /// # Errors
    /// A namespace or a file could not be removed.
    pub fn down(mut self) -> Result<()> {
        self.keep = true;
        self.take_down()
    }

    fn of(description: Description) -> Self {
        let namespace = |host: &str| Netns::named(format!("rs-{}-{host}", description.name));
        let nodes = (1..)
            .zip(&description.nodes)
            .map(|(index, kind)| {
                let pods = (0..description.pods)
                    .map(|pod| Pod::new(index, pod, namespace(&Pod::name_of(index, pod))));
                let netns = namespace(&Node::name_of(index));
                Node::new(
                    index,
                    *kind,
                    netns,
                    &description.dir,
                    &description.plan,
                    description.queues,
                    pods.collect(),
                )
            })
            .collect();
        Self {
            fabric: Fabric {
                netns: namespace("fabric"),
            },
            attacker: Attacker {
                netns: namespace("attacker"),
            },
            nodes,
            keep: false,
            description,
        }
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// The directory of all the lab's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.description.dir
    }

    /// MTU of the underlay.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.plan().mtu
    }

    /// MTU of the pods' interfaces: what fits the tunnels of all their families.
    #[must_use]
    pub fn pod_mtu(&self) -> u16 {
        self.plan().interface_mtu()
    }

    /// The longest packet that a pod of this family can send to another node.
    #[must_use]
    pub fn pod_mtu_of(&self, family: Family) -> u16 {
        self.plan().pod_mtu(family)
    }

    /// flannel's backend.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.plan().backend
    }

    /// What the nodes' underlay interfaces are made of.
    #[must_use]
    pub fn underlay(&self) -> Underlay {
        self.plan().underlay
    }

    /// The families of the pods.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        self.plan().families().collect()
    }

    /// Whether packets between two nodes go without a tunnel.
    #[must_use]
    pub fn is_direct(&self, one: u8, other: u8) -> bool {
        self.plan().is_direct(one, other)
    }

    fn plan(&self) -> &Plan {
        &self.description.plan
    }

    /// The NIC of this machine that is the node's `eth0`, if it is one.
    fn borrowed(&self, node: &Node) -> Option<&Borrowed> {
        let borrowed = self.description.borrowed.as_ref();
        borrowed.filter(|_nic| node.index() == 1)
    }

    /// Where a borrowed NIC is at home.
    fn home(&self) -> Netns {
        Netns::named(format!("rs-{}-home", self.name()))
    }

    /// The underlay switch.
    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// The attacker on the underlay.
    #[must_use]
    pub fn attacker(&self) -> &Attacker {
        &self.attacker
    }

    /// All nodes, in order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node; they count from 1, as in their addresses.
    ///
    /// # Panics
    /// There is no such node.
    #[must_use]
    pub fn node(&self, index: u8) -> &Node {
        let node = self.nodes.iter().find(|node| node.index() == index);
        node.unwrap_or_else(|| panic!("the lab has {} nodes and no node {index}", self.nodes.len()))
    }

    /// A pod of a node; pods count from 0.
    ///
    /// # Panics
    /// There is no such node or pod.
    #[must_use]
    pub fn pod(&self, node: u8, pod: u8) -> &Pod {
        self.node(node).pod(pod)
    }

    /// Everything with a namespace: fabric, attacker, nodes, pods.
    #[must_use]
    pub fn hosts(&self) -> Vec<&dyn Host> {
        let mut hosts: Vec<&dyn Host> = vec![&self.fabric, &self.attacker];
        for node in &self.nodes {
            hosts.push(node);
            hosts.extend(node.pods().iter().map(|pod| pod as &dyn Host));
        }
        hosts
    }

    /// A host by its short name: `n1`, `n1p0`, `fabric`, `attacker`.
    ///
    /// # Errors
    /// There is no such host; the error lists those there are.
    pub fn host(&self, name: &str) -> Result<&dyn Host> {
        let hosts = self.hosts();
        let Some(host) = hosts.iter().find(|host| host.name() == name) else {
            let names: Vec<&str> = hosts.iter().map(|host| host.name()).collect();
            bail!(
                "no {name:?} in lab {}; there are {}",
                self.name(),
                names.join(", ")
            );
        };
        Ok(*host)
    }

    /// Pairs of pods on different nodes, both ways: the first pod of each node.
    #[must_use]
    pub fn pod_pairs(&self) -> Vec<(&Pod, &Pod)> {
        let mut pairs = Vec::new();
        for from in &self.nodes {
            for to in self.nodes.iter().filter(|to| to.index() != from.index()) {
                if let (Some(from), Some(to)) = (from.pods().first(), to.pods().first()) {
                    pairs.push((from, to));
                }
            }
        }
        pairs
    }

    /// The lease file that all nodes read unless they were given one of their own.
    #[must_use]
    pub fn lease_file(&self) -> PathBuf {
        self.description.dir.join("leases.json")
    }

    /// The leases of all nodes of this lab.
    #[must_use]
    pub fn leases(&self) -> Leases {
        Leases {
            leases: self.nodes.iter().map(Node::lease).collect(),
        }
    }

    /// Replaces the shared lease file at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_leases(&self, leases: &Leases) -> Result<()> {
        leases.write(&self.lease_file())
    }

    /// A tunnel packet as node `from` would send it to node `to`: a UDP datagram between their
    /// first pods, correct in every field. Tests change what they want wrong.
    #[must_use]
    pub fn tunnel_frame(&self, from: u8, to: u8) -> VxlanFrame {
        VxlanFrame {
            ethernet: Ethernet::ipv4(address::underlay_mac(from), address::underlay_mac(to)),
            ip: Ipv4::udp(address::underlay(from), address::underlay(to)),
            udp: Udp::ports(49_152, address::VXLAN_PORT),
            vxlan: Vxlan::vni(address::VNI),
            inner_ethernet: Ethernet::ipv4(address::vtep_mac(from), address::vtep_mac(to)),
            inner: Inner::Udp {
                ip: Ipv4 {
                    ttl: 63,
                    ..Ipv4::udp(address::pod(from, 0), address::pod(to, 0))
                },
                udp: Udp::ports(4000, 4001),
                payload: b"ripstop".to_vec(),
            },
            truncate_to: None,
        }
    }

    /// A UDP packet between the first pods of two nodes as their nodes route it: one hop counted down.
    #[must_use]
    pub fn pod_packet(&self, from: u8, to: u8, family: Family) -> Frame {
        let ip = match family {
            Family::Ipv4 => Header::Ipv4(Ipv4 {
                ttl: 63,
                ..Ipv4::udp(address::pod(from, 0), address::pod(to, 0))
            }),
            Family::Ipv6 => Header::Ipv6(Ipv6 {
                hop_limit: 63,
                ..Ipv6::udp(address::pod6(from, 0), address::pod6(to, 0))
            }),
        };
        Frame {
            headers: vec![ip, Header::Udp(Udp::ports(4000, 4001))],
            payload: b"ripstop".to_vec(),
            truncate_to: None,
        }
    }

    /// The same as node `from` would send it to node `to` without a tunnel.
    #[must_use]
    pub fn direct_frame(&self, from: u8, to: u8, family: Family) -> Frame {
        let mut frame = self.pod_packet(from, to, family);
        let (source, destination) = (address::underlay_mac(from), address::underlay_mac(to));
        let ethernet = Ethernet::ip(family, source, destination);
        frame.headers.insert(0, Header::Ethernet(ethernet));
        frame
    }

    /// The same through the backend's tunnel, if it has one; correct in every field.
    #[must_use]
    pub fn backend_frame(&self, from: u8, to: u8, family: Family) -> Frame {
        let mut frame = self.direct_frame(from, to, family);
        let ip = match family {
            Family::Ipv4 => Header::Ipv4(Ipv4::udp(
                self.node(from).address(),
                self.node(to).address(),
            )),
            Family::Ipv6 => Header::Ipv6(Ipv6::udp(
                self.node(from).address6(),
                self.node(to).address6(),
            )),
        };
        let tunnel = match self.backend() {
            Backend::Vxlan => {
                let vtep = |node| match family {
                    Family::Ipv4 => address::vtep_mac(node),
                    Family::Ipv6 => address::vtep_mac6(node),
                };
                vec![
                    ip,
                    Header::Udp(Udp::ports(49_152, address::VXLAN_PORT)),
                    Header::Vxlan(Vxlan::vni(address::VNI)),
                    Header::Ethernet(Ethernet::ip(family, vtep(from), vtep(to))),
                ]
            }
            Backend::Ipip => vec![Header::Ipv4(Ipv4 {
                protocol: 4,
                ttl: 63,
                ..Ipv4::udp(self.node(from).address(), self.node(to).address())
            })],
            Backend::Udp => vec![
                ip,
                Header::Udp(Udp::ports(address::UDP_PORT, address::UDP_PORT)),
            ],
            Backend::HostGw => Vec::new(),
        };
        frame.headers.splice(1..1, tunnel);
        frame
    }

    /// The topology as text, with every address.
    #[must_use]
    pub fn picture(&self) -> String {
        let mut text = String::new();
        let mtu = self.mtu();
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        line(format!("lab {} in {}", self.name(), self.dir().display()));
        line(String::new());
        line(format!(
            "fabric  br0 {}/24, MTU {mtu}  (the switch)",
            address::FABRIC
        ));
        line(format!(
            "├─ attacker  eth0 {} {}",
            address::ATTACKER,
            address::ATTACKER_MAC
        ));
        for (position, node) in self.nodes.iter().enumerate() {
            let last = position + 1 == self.nodes.len();
            let (branch, trunk) = if last {
                ("└─", "   ")
            } else {
                ("├─", "│  ")
            };
            let index = node.index();
            let plan = self.plan();
            let both = |ip: Ipv4Addr, ip6: Ipv6Addr| -> String {
                let of = plan.families().map(|family| match family {
                    Family::Ipv4 => ip.to_string(),
                    Family::Ipv6 => ip6.to_string(),
                });
                of.collect::<Vec<_>>().join(" ")
            };
            let mac = address::underlay_mac(index);
            line(format!(
                "{branch} {}  {}  {} {} {mac}",
                node.name(),
                node.kind().explain(),
                plan.interfaces().join(" "),
                both(node.address(), node.address6()),
            ));
            line(format!(
                "{trunk}     {}  VTEP {}  lease {}",
                plan.backend.name(),
                address::vtep_mac(index),
                both(address::subnet(index), address::subnet6(index)),
            ));
            if node.kind() == NodeKind::Ripstop {
                line(format!("{trunk}     {}", node.process_summary()));
            }
            line(format!(
                "{trunk}     cni0 {}, MTU {}",
                both(address::gateway(index), address::gateway6(index)),
                self.pod_mtu()
            ));
            for pod in node.pods() {
                line(format!(
                    "{trunk}     └─ {}  eth0 {} {}",
                    pod.name(),
                    both(pod.address(), pod.address6()),
                    pod.mac()
                ));
            }
        }
        text
    }

    /// What one wants to see when a test failed: the kernel state of each node and the end of each log.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut text = self.picture();
        text.push_str("\n--- every link: packets, dropped, errors\n");
        for host in self.hosts() {
            text.push_str(&traffic_of_links(host));
        }
        for node in &self.nodes {
            text.push_str(&node.dump());
        }
        text
    }

    fn take_down(&self) -> Result<()> {
        for node in &self.nodes {
            node.kill_dataplane();
            node.kill_controlplane();
            node.stop_userland_tunnel();
        }
        let (hosts, home) = (self.hosts(), self.home());
        let mut namespaces: Vec<&Netns> = hosts.iter().map(|host| host.netns()).collect();
        if let (Some(borrowed), Some(node)) = (&self.description.borrowed, self.nodes.first()) {
            // Its namespace may destroy it.
            borrowed.give_back(&home, node.netns())?;
            namespaces.push(&home);
        }
        netns::delete(&namespaces)?;
        gone(fs::remove_dir_all(self.dir()))
            .with_context(|| format!("remove {}", self.dir().display()))?;
        let description = Description::path(self.name());
        gone(fs::remove_file(&description))
            .with_context(|| format!("remove {}", description.display()))
    }
}

/// A line for each link of a host: where packets got lost shows at a glance.
fn traffic_of_links(host: &dyn Host) -> String {
    let output = host.output(&["ip", "-s", "-j", "link"]).unwrap_or_default();
    let links: Value = serde_json::from_str(&output).unwrap_or_default();
    let line = |link: &Value| {
        let of = |direction: &str| {
            let count = |name: &str| link["stats64"][direction][name].as_u64().unwrap_or(0);
            let [packets, dropped, errors] = ["packets", "dropped", "errors"].map(count);
            format!("{direction} {packets:>9} {dropped:>6} {errors:>6}")
        };
        let name = link["ifname"].as_str().unwrap_or("?");
        format!("{:<9} {name:<9} {}   {}\n", host.name(), of("rx"), of("tx"))
    };
    links.as_array().into_iter().flatten().map(line).collect()
}

/// What someone else has removed is removed.
fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(()) | Err(_) => outcome,
    }
}

impl Drop for Lab {
    #[expect(
        clippy::print_stderr,
        reason = "a drop has nobody to return an error to"
    )]
    fn drop(&mut self) {
        if self.keep {
            self.nodes.iter().for_each(Node::release_processes);
            return;
        }
        if thread::panicking() {
            eprintln!("{}", self.dump());
        }
        if let Err(error) = self.take_down() {
            eprintln!("taking down lab {}: {error:#}", self.name());
        }
    }
}

/// Waits until a condition holds, looking every few milliseconds.
///
/// # Errors
/// It did not hold within the time; the error names it.
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    loop {
        if condition() {
            return Ok(());
        }
        ensure!(
            start.elapsed() < within,
            "after {within:?} still not: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}
