//! Leases from the annotations of Nodes, as flannel keeps them with `--kube-subnet-mgr`.
//!
//! ```text
//!   API server ──list, watch──► api ──News──► keeper ──► view ──► whole lease sets ──► the loop
//!        ▲                                      │  ▲
//!        └──── patch of our own nodes/status ───┘  └── kernel: our addresses, our device's MAC
//! ```
//!
//! One thread with a small runtime of its own. `api` follows the nodes and never gives up; the keeper compares what
//! our own node's annotations and condition say with what they should, and writes the difference, whoever made it. Our
//! public IPs are those of the interface, so it listens to the kernel too.
//!
//! While the API server is away, and while our own node cannot be used, the last set stays in force.

pub mod annotations;
mod api;
pub mod events;
pub mod node;
pub mod view;

use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::jiff;
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde::Serialize;
use tokio::sync::mpsc;

use self::annotations::{Key, Prefix};
use self::api::{Api, ApiError, News};
use self::node::{NETWORK_UNAVAILABLE, Node};
use self::view::{Own, View};
use super::backoff::{Backoff, random_mac};
use super::claims::{leave_macs, name_skipped};
use super::kernel::Kernel;
use super::told::{Told, gather, runtime};
use super::{Lease, LeaseEvent, LeaseSink, LeaseSource};
use crate::family::{Family, PerFamily};
use crate::interface::Selection;
use crate::mac::Mac;
use crate::netconf::NetConf;
use crate::netlink::NetlinkError;
use crate::netlink::monitor::UnderlayMonitor;
use crate::sys::wait_readable;

/// How often it is looked at whether something is to be written.
const LOOK: Duration = Duration::from_secs(1);
/// The kernel is asked for our addresses this often, in case an announcement was lost.
pub const RECHECK: Duration = Duration::from_secs(5);
/// News that may wait while one is worked on.
const BACKLOG: usize = 256;
/// What was written is back by the watch in milliseconds; until then it is not written again.
const ECHO: Duration = Duration::from_secs(2);
/// A server that cannot be reached in this time is tried again rather than waited for.
const CONNECT: Duration = Duration::from_secs(5);
/// A watch that is silent for so long is given up for a new list: servers send bookmarks about once a minute.
pub const SILENT: Duration = Duration::from_secs(150);

/// Why the source cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// The file that says where the API server is and who we are.
    #[error("kubeconfig {path}: {source}: correct it, or name another with --kubeconfig-file")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: Box<kube::config::KubeconfigError>,
    },
    /// Not in a pod, or without a service account.
    #[error(
        "in-cluster configuration: {0}: outside of a pod, give --kubeconfig-file or --kube-api-url"
    )]
    InCluster(Box<kube::config::InClusterError>),
    /// `--kube-api-url` is not a URL.
    #[error("--kube-api-url {0:?} is not a URL: write one like https://10.0.0.1:6443")]
    Url(String),
    /// No thread for it.
    #[error("start: {0}")]
    Io(#[from] std::io::Error),
    /// TLS or credentials.
    #[error("client of the API server: {0}")]
    Client(Box<kube::Error>),
    /// The pod's node cannot be found out.
    #[error("which node is this: {0}")]
    Pod(String),
}

/// Where the API server is: `--kubeconfig-file`, with `--kube-api-url` in place of its server, or the pod's own account
/// if neither is given.
#[derive(Debug, Clone)]
pub struct Server {
    url: Option<http::Uri>,
    kubeconfig: Option<PathBuf>,
}

impl Server {
    /// Takes what the flags say.
    pub fn new(url: Option<&str>, kubeconfig: Option<&Path>) -> Result<Self, KubeError> {
        let url = url.map(|text| {
            let whole = match text.contains("://") {
                true => text.to_owned(),
                false => format!("http://{text}"),
            };
            whole
                .parse()
                .map_err(|_error| KubeError::Url(text.to_owned()))
        });
        Ok(Self {
            url: url.transpose()?,
            kubeconfig: kubeconfig.map(Path::to_owned),
        })
    }

    /// Reads the files. They may change while we run: certificates and tokens are replaced before they expire.
    pub async fn load(&self) -> Result<Config, KubeError> {
        let mut config = match (&self.kubeconfig, &self.url) {
            (Some(path), url) => {
                let wrong = |source| KubeError::Kubeconfig {
                    path: path.display().to_string(),
                    source: Box::new(source),
                };
                let file = Kubeconfig::read_from(path).map_err(wrong)?;
                let options = KubeConfigOptions::default();
                let mut config = Config::from_custom_kubeconfig(file, &options)
                    .await
                    .map_err(wrong)?;
                if let Some(url) = url {
                    config.cluster_url = url.clone();
                }
                config
            }
            (None, Some(url)) => Config::new(url.clone()),
            (None, None) => {
                Config::incluster().map_err(|error| KubeError::InCluster(Box::new(error)))?
            }
        };
        // Files made by hand end in a line feed, which no header may have. What is read here is read anew on a 401.
        if let Some(path) = &config.auth_info.token_file
            && let Ok(text) = std::fs::read_to_string(path)
            && text.trim() != text
        {
            config.auth_info.token = Some(text.trim().to_owned().into());
            config.auth_info.token_file = None;
        }
        config.connect_timeout = Some(CONNECT);
        // It waits longer than we do, and says nothing about it.
        config.default_retry = false;
        Ok(config)
    }

    /// [`Self::load`] for threads without a runtime.
    pub fn load_blocking(&self) -> Result<Config, KubeError> {
        runtime()?.block_on(self.load())
    }
}

/// The node that this pod is on. Tries for `patience`, as the API server may be on its way up.
pub fn node_of_pod(
    server: &Server,
    namespace: &str,
    pod: &str,
    patience: Duration,
) -> Result<String, KubeError> {
    let start = Instant::now();
    runtime()?.block_on(async {
        let prefix = Arc::new(
            Prefix::new(annotations::DEFAULT_PREFIX)
                .map_err(|error| KubeError::Pod(error.to_string()))?,
        );
        let api = Api::new(server.clone(), prefix, "".into(), SILENT).await?;
        let mut backoff = Backoff::default();
        loop {
            let problem = match api.node_of_pod(namespace, pod).await {
                Ok(node) if !node.is_empty() => return Ok(node),
                Ok(_) => {
                    format!("pod {namespace}/{pod} has no spec.nodeName: it is not scheduled yet")
                }
                Err(error) => api.mend(error).await.to_string(),
            };
            if start.elapsed() >= patience {
                return Err(KubeError::Pod(problem));
            }
            tokio::time::sleep(backoff.next()).await;
        }
    })
}

/// What the operator configured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node's name.
    pub node: String,
    /// `net-conf.json`.
    pub conf: NetConf,
    /// `--iface`, `--public-ip` and `--public-ipv6`.
    pub selection: Selection,
    /// `--kube-annotation-prefix`.
    pub prefix: Prefix,
    /// Whether to say so in the node's conditions when it can forward.
    pub set_network_available: bool,
    /// The loop sets it when the node can forward.
    pub ready: Arc<AtomicBool>,
    /// [`SILENT`], but for tests.
    pub silent: Duration,
    /// [`RECHECK`], but for tests.
    pub recheck: Duration,
}

/// Follows the nodes of a cluster.
#[derive(Debug)]
pub struct KubeSource {
    server: Server,
    /// Where it was when we were started.
    url: http::Uri,
    settings: Settings,
}

impl KubeSource {
    /// A source that asks the API server `server`, in the network namespace of the thread that it runs on.
    pub fn new(server: Server, settings: Settings) -> Result<Self, KubeError> {
        let url = server.load_blocking()?.cluster_url;
        Ok(Self {
            server,
            url,
            settings,
        })
    }

    async fn follow(self, sink: &LeaseSink) -> Result<(), KubeError> {
        let settings = self.settings;
        let (prefix, own) = (
            Arc::new(settings.prefix.clone()),
            settings.node.as_str().into(),
        );
        let api = Api::new(self.server, prefix, own, settings.silent).await?;
        let (out, mut news) = mpsc::channel(BACKLOG);
        let told = out.clone();
        std::thread::Builder::new()
            .name("addresses".to_owned())
            .spawn(move || watch_kernel(&told))?;
        let mut keeper = Keeper::new(settings, api, out);
        let mut listening = true;
        while listening {
            let seen = gather(&mut news, LOOK, |news| keeper.take(news)).await;
            listening = keeper.round(sink, seen);
        }
        Ok(())
    }
}

impl LeaseSource for KubeSource {
    fn describe(&self) -> String {
        format!("kube {}", self.url)
    }

    fn run(self: Box<Self>, sink: &LeaseSink) {
        let outcome = match runtime() {
            Ok(runtime) => runtime.block_on(self.follow(sink)),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            sink.send(LeaseEvent::Failed(error.to_string()));
        }
    }
}

/// Tells when our addresses may be others, on a thread of its own, until nobody listens. The periodic look is what there
/// is where this fails.
fn watch_kernel(out: &mpsc::Sender<News>) {
    while let Ok(mut monitor) = UnderlayMonitor::open() {
        let mut drained = Ok(false);
        while drained.is_ok() && !out.is_closed() {
            wait_readable([monitor.as_fd()], LOOK);
            drained = monitor.drain();
            // After an error as well: what it said is lost.
            if !matches!(drained, Ok(false)) && out.blocking_send(News::Kernel).is_err() {
                return;
            }
        }
        if out.is_closed() {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// A write to our own node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Annotations,
    Condition,
}

/// What the kernel said about our addresses.
struct Seen {
    /// What was asked for by the flags or the Node.
    public_ips: PerFamily<Option<IpAddr>>,
    addresses: PerFamily<Option<IpAddr>>,
    at: Instant,
}

/// What is known, what was told, and what is being written.
struct Keeper {
    settings: Settings,
    api: Api,
    follower: tokio::task::JoinHandle<()>,
    /// Our public IPs since the client was made.
    connected_from: PerFamily<Option<IpAddr>>,
    out: mpsc::Sender<News>,
    kernel: Kernel,
    /// Our addresses as last seen.
    seen: Option<Seen>,
    /// All nodes; none before the first list.
    nodes: Option<BTreeMap<Arc<str>, Node>>,
    /// Something of it changed since the last look.
    changed: bool,
    macs: PerFamily<Option<Mac>>,
    named: BTreeMap<Arc<str>, String>,
    /// Our own leases as last found.
    own: PerFamily<Option<Lease>>,
    api_problem: Option<String>,
    /// That is about certificates or credentials.
    distrust: bool,
    own_problem: Option<String>,
    write_problem: Option<String>,
    told: Told,
    /// On its way, if anything is.
    writing: Option<Write>,
    backoff: Backoff,
    write_after: Instant,
}

impl Keeper {
    fn new(settings: Settings, api: Api, out: mpsc::Sender<News>) -> Self {
        Self {
            settings,
            follower: tokio::spawn(api.clone().follow(out.clone())),
            connected_from: PerFamily::default(),
            api,
            out,
            kernel: Kernel::default(),
            seen: None,
            nodes: None,
            changed: false,
            macs: PerFamily::default(),
            named: BTreeMap::new(),
            own: PerFamily::default(),
            api_problem: None,
            distrust: false,
            own_problem: None,
            write_problem: None,
            told: Told::default(),
            writing: None,
            backoff: Backoff::default(),
            write_after: Instant::now(),
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Listed(nodes) => {
                let nodes = nodes.into_iter().map(|node| (Arc::clone(&node.name), node));
                self.nodes = Some(nodes.collect());
                self.changed = true;
                self.write_after = Instant::now();
            }
            News::Applied(node) => {
                let Some(nodes) = &mut self.nodes else { return };
                if nodes.get(&node.name) != Some(&node) {
                    if *node.name == *self.settings.node {
                        self.write_after = Instant::now();
                    }
                    nodes.insert(Arc::clone(&node.name), node);
                    self.changed = true;
                }
            }
            News::Deleted(name) => {
                let gone = self
                    .nodes
                    .as_mut()
                    .and_then(|nodes| nodes.remove(name.as_str()));
                self.changed |= gone.is_some();
            }
            // The first of a row says no less than those that follow, unless one is found that somebody has to mend.
            News::Trouble(problem, trust) => {
                if self.api_problem.is_none() || trust && !self.distrust {
                    self.api_problem = Some(problem);
                    self.distrust = trust;
                }
            }
            News::Fine => self.api_problem = None,
            News::Kernel => self.seen = None,
            News::Patched(result) => self.patched(result),
        }
    }

    /// One look at everything; false when nobody listens.
    fn round(&mut self, sink: &LeaseSink, seen: Instant) -> bool {
        let mut listening = true;
        if self.nodes.is_some() {
            match self.find_own() {
                Ok(own) => {
                    self.own_problem = None;
                    self.connect_from(&own);
                    if core::mem::take(&mut self.changed) || own != self.own {
                        self.own = own;
                        listening = self.tell_set(sink, seen);
                    }
                    if self.own_problem.is_none() {
                        self.write();
                    }
                }
                Err(problem) => {
                    self.own_problem = Some(problem);
                    // Looked at again as a whole when it is mended.
                    self.own = PerFamily::default();
                }
            }
        }
        let problems = [&self.api_problem, &self.own_problem, &self.write_problem];
        listening && self.told.problems(&problems, sink)
    }

    /// Connections from an address that is not ours any more hear nothing until they lose patience: new ones are made.
    fn connect_from(&mut self, own: &PerFamily<Option<Lease>>) {
        let mut from = PerFamily::default();
        for (family, lease) in own.iter() {
            *from.get_mut(family) = lease.as_ref().map(|lease| lease.public_ip);
        }
        let before = core::mem::replace(&mut self.connected_from, from);
        if before == from || before == PerFamily::default() {
            return;
        }
        // What made a client at the start makes one again; if not, the old one loses its patience.
        if !self.api.connect_anew() {
            return;
        }
        tracing::info!("own address changed: connecting to the API server anew");
        self.follower.abort();
        self.follower = tokio::spawn(self.api.clone().follow(self.out.clone()));
        self.writing = None;
    }

    fn own_node(&self) -> Result<&Node, String> {
        let name = &*self.settings.node;
        let node = self.nodes.as_ref().and_then(|nodes| nodes.get(name));
        node.ok_or_else(|| {
            format!("node {name:?} not found: wait for the kubelet to register it, or set NODE_NAME to the Node object's name")
        })
    }

    /// Our leases, by our Node, our interface and our device.
    fn find_own(&mut self) -> Result<PerFamily<Option<Lease>>, String> {
        let node = self.own_node()?.clone();
        let subnets = view::own_subnets(&node, &self.settings.conf)?;
        let selection = self.selection(&node);
        let kernel = |error: &dyn core::fmt::Display| format!("our own public IP: {error}");
        let recheck = self.settings.recheck;
        let seen = self
            .seen
            .as_ref()
            .filter(|seen| seen.public_ips == selection.public_ips && seen.at.elapsed() < recheck);
        let addresses = match seen {
            Some(seen) => seen.addresses,
            None => {
                let at = Instant::now();
                self.seen = None;
                let addresses = self
                    .kernel
                    .addresses(&selection)
                    .map_err(|error| kernel(&error))?;
                let addresses = addresses.map_err(|error| kernel(&error))?;
                self.seen = Some(Seen {
                    public_ips: selection.public_ips,
                    addresses,
                    at,
                });
                addresses
            }
        };
        let mut own = PerFamily::default();
        for (family, subnet) in subnets.iter() {
            if let (&Some(subnet), Some(public_ip)) = (subnet, *addresses.get(family)) {
                let vtep_mac = match self.settings.conf.backend.vxlan() {
                    None => None,
                    Some(_) => Some(self.mac(&node, family).map_err(|error| kernel(&error))?),
                };
                *own.get_mut(family) = Some(Lease {
                    node: Arc::clone(&node.name),
                    public_ip,
                    subnet,
                    vtep_mac,
                });
            }
        }
        Ok(own)
    }

    /// What the flags say, with the Node's own word for the public IPs, which goes before.
    fn selection(&self, node: &Node) -> Selection {
        let mut selection = self.settings.selection.clone();
        for family in self.settings.conf.families() {
            let text = node.text(Key::node_public_ip(family));
            let address = text.and_then(|text| annotations::public_ip(text, family).ok());
            if address.is_some() {
                *selection.public_ips.get_mut(family) = address;
            }
        }
        selection
    }

    /// Our VTEP MAC address, which peers know us by: the device's, else the one we had, else a new one. Chosen once.
    fn mac(&mut self, node: &Node, family: Family) -> Result<Mac, NetlinkError> {
        if let Some(mac) = *self.macs.get(family) {
            return Ok(mac);
        }
        let device = self.kernel.device_mac(self.settings.conf.backend, family)?;
        let stored = node
            .text(Key::backend_data(family))
            .and_then(|text| annotations::vtep_mac(text).ok());
        let mac = device.or(stored).unwrap_or_else(random_mac);
        tracing::info!(%family, %mac, device = device.is_some(), stored = stored.is_some(), "VTEP MAC address");
        *self.macs.get_mut(family) = Some(mac);
        Ok(mac)
    }

    /// Looks at all nodes and tells the set if it is another.
    fn tell_set(&mut self, sink: &LeaseSink, seen: Instant) -> bool {
        let Ok(own_node) = self.own_node() else {
            return true;
        };
        let mut own = Own {
            node: Arc::clone(&own_node.name),
            created: own_node.created.clone(),
            leases: self.own.clone(),
        };
        let (prefix, conf) = (&self.settings.prefix, &self.settings.conf);
        let look = |own: &Own| {
            View::of(
                self.nodes.iter().flat_map(BTreeMap::values),
                own,
                prefix,
                conf,
            )
        };
        let mut view = look(&own);
        if leave_macs(view.own_mac_taken, &mut own.leases, &mut self.macs) {
            view = look(&own);
            self.own.clone_from(&own.leases);
        }
        name_skipped("node", &mut self.named, &mut view.skipped);
        if let Some(problem) = view.own_subnet_taken {
            self.own_problem = Some(problem);
            return true;
        }
        self.told.set(view.into_set(own.leases), seen, sink)
    }

    /// Sends the next patch that is due.
    fn write(&mut self) {
        if self.writing.is_some() || Instant::now() < self.write_after {
            return;
        }
        let Ok(node) = self.own_node() else { return };
        let missing = self.missing_annotations(node);
        let ready =
            self.settings.set_network_available && self.settings.ready.load(Ordering::Relaxed);
        let (write, body) = if !missing.is_empty() {
            let patch = serde_json::json!({"metadata": {"annotations": missing}});
            (Write::Annotations, patch.to_string().into_bytes())
        } else if ready && !says_available(node) {
            (Write::Condition, condition_patch())
        } else {
            self.write_problem = None;
            return;
        };
        tracing::info!(patch = %String::from_utf8_lossy(&body), "own node");
        self.writing = Some(write);
        let (api, out) = (self.api.clone(), self.out.clone());
        tokio::spawn(async move {
            let patched = match api.patch(body).await {
                Ok(()) => Ok(()),
                Err(error) => Err(api.mend(error).await),
            };
            // Nobody listens any more, so nobody wants to know.
            let _closed = out.send(News::Patched(patched)).await;
        });
    }

    fn patched(&mut self, result: Result<(), ApiError>) {
        let what = self.writing.take();
        match result {
            Ok(()) => {
                self.backoff.reset();
                self.write_problem = None;
                self.write_after = Instant::now() + ECHO;
            }
            Err(error) => {
                self.write_after = Instant::now() + self.backoff.next();
                let what = match what {
                    Some(Write::Condition) => "node condition",
                    Some(Write::Annotations) | None => "own annotations",
                };
                // The first of a row may be chance, and says no less than those that follow.
                if self.backoff.failures() > 1 {
                    self.write_problem.get_or_insert(format!("{what}: {error}"));
                }
            }
        }
    }

    /// Those of our annotations that are not what they should be, with what they should be. Nothing is ever removed.
    fn missing_annotations(&self, node: &Node) -> BTreeMap<String, String> {
        let (prefix, backend) = (&self.settings.prefix, self.settings.conf.backend);
        let mut wanted = vec![
            (
                Key::BackendType,
                annotations::backend_type(backend).to_owned(),
            ),
            (Key::SubnetManager, "true".to_owned()),
        ];
        let selection = self.selection(node);
        for (family, lease) in self.own.iter() {
            let Some(lease) = lease else { continue };
            wanted.push((
                Key::backend_data(family),
                annotations::backend_data(backend, lease.vtep_mac),
            ));
            let overwrite = node.text(Key::overwrite(family));
            let overwrite = overwrite.and_then(|text| annotations::public_ip(text, family).ok());
            let public_ip = overwrite
                .or(*selection.public_ips.get(family))
                .unwrap_or(lease.public_ip);
            wanted.push((Key::public_ip(family), public_ip.to_string()));
        }
        let missing = wanted
            .into_iter()
            .filter(|(key, value)| node.annotation(*key) != Some(value));
        missing
            .map(|(key, value)| (prefix.name(key), value))
            .collect()
    }
}

/// Whether the condition says that the network is there.
fn says_available(node: &Node) -> bool {
    node.network_unavailable
        .as_ref()
        .is_some_and(|(status, _)| &**status == "False")
}

/// Flannel's patch that says so, to the byte.
fn condition_patch() -> Vec<u8> {
    #[derive(Serialize)]
    struct Patch {
        status: Status,
    }
    #[derive(Serialize)]
    struct Status {
        conditions: [Condition; 1],
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Condition {
        r#type: &'static str,
        status: &'static str,
        last_heartbeat_time: String,
        last_transition_time: String,
        reason: &'static str,
        message: &'static str,
    }
    let now = jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string();
    let condition = Condition {
        r#type: NETWORK_UNAVAILABLE,
        status: "False",
        last_heartbeat_time: now.clone(),
        last_transition_time: now,
        reason: "FlannelIsUp",
        message: "Flannel is running on this node",
    };
    let patch = Patch {
        status: Status {
            conditions: [condition],
        },
    };
    // Texts alone, which cannot fail.
    serde_json::to_vec(&patch).unwrap_or_default()
}
