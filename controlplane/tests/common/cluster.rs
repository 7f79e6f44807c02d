//! A cluster as a test sees it: the API service of our own, or a real API server.
//!
//! `RIPSTOP_TEST_KUBECONFIG` names the kubeconfig of a real one. It needs no kubelet and no controllers: tests make Node
//! objects there, and nothing else. Names end in a word of their own for each [`Cluster`], and annotations have a prefix of
//! their own, so that other nodes, and other runs beside this one, are strangers that are passed over. What a test made, it
//! removes, also when it fails.
//!
//! ```text
//!   namespace of the test: 127.0.0.1:p ──► our own API service
//!                                    or ──► relay ──► the real server     (TLS passes through; its name is the real one's)
//! ```
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use core::hash::{BuildHasher as _, Hasher as _};
use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeSet;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

use super::api::Api;

/// The annotations' prefix in tests, whatever it is on the server.
const USUAL: &str = "flannel.alpha.coreos.com/";

/// A cluster without nodes.
pub(crate) struct Cluster {
    backing: Backing,
    /// What names end in; empty on our own service.
    word: String,
    made: Mutex<BTreeSet<String>>,
}

enum Backing {
    Mock(Api),
    Real(Box<Real>),
}

struct Real {
    runtime: tokio::runtime::Runtime,
    client: Client,
    relay: Relay,
    kubeconfig: Kubeconfig,
}

impl Cluster {
    /// What the environment says; it can be reached at the address of `listener`.
    pub(crate) fn new(listener: TcpListener) -> Self {
        match std::env::var_os("RIPSTOP_TEST_KUBECONFIG").filter(|path| !path.is_empty()) {
            None => Self::mock_only(listener),
            Some(path) => {
                let random = std::hash::RandomState::new().build_hasher().finish();
                Self {
                    backing: Backing::Real(Box::new(Real::new(path.as_ref(), listener))),
                    word: format!("{random:016x}"),
                    made: Mutex::default(),
                }
            }
        }
    }

    /// Our own service in any case, for what no real one does at will.
    pub(crate) fn mock_only(listener: TcpListener) -> Self {
        Self {
            backing: Backing::Mock(Api::serve(listener)),
            word: String::new(),
            made: Mutex::default(),
        }
    }

    /// Our own service, if it is that.
    pub(crate) fn mock(&self) -> Option<&Api> {
        match &self.backing {
            Backing::Mock(api) => Some(api),
            Backing::Real(_) => None,
        }
    }

    /// The name of node `n`.
    pub(crate) fn name(&self, n: &str) -> String {
        match &self.backing {
            Backing::Mock(_) => n.to_owned(),
            Backing::Real(_) => format!("{n}.{}", self.word),
        }
    }

    /// For `--kube-annotation-prefix`.
    pub(crate) fn prefix(&self) -> String {
        match &self.backing {
            Backing::Mock(_) => USUAL.trim_end_matches('/').to_owned(),
            Backing::Real(_) => format!("t{}.example.com", self.word),
        }
    }

    /// A kubeconfig that leads here from the listener's namespace.
    pub(crate) fn kubeconfig(&self) -> String {
        match &self.backing {
            Backing::Mock(api) => api.kubeconfig(),
            Backing::Real(real) => serde_json::to_string(&real.kubeconfig).unwrap(),
        }
    }

    /// Makes a node.
    pub(crate) fn create(&self, n: &str, cidrs: &[&str], annotations: &Value) {
        match &self.backing {
            Backing::Mock(api) => api.create(n, cidrs, annotations),
            Backing::Real(real) => {
                self.made.lock().unwrap().insert(self.name(n));
                let mut node = json!({
                    "apiVersion": "v1", "kind": "Node",
                    "metadata": {"name": self.name(n), "annotations": self.outward(annotations)},
                });
                if let Some(first) = cidrs.first() {
                    node["spec"] = json!({"podCIDR": first, "podCIDRs": cidrs});
                }
                real.ask("POST", "/api/v1/nodes", "application/json", Some(&node));
            }
        }
    }

    /// Gives a node its pod CIDRs. One that has some is deleted and made anew with its annotations, as there is no other way.
    pub(crate) fn assign(&self, n: &str, cidrs: &[&str]) {
        let node = self.node(n);
        if node["spec"]["podCIDR"]
            .as_str()
            .is_some_and(|cidr| !cidr.is_empty())
        {
            self.delete(n);
            self.create(n, cidrs, &self.usual(&node));
            return;
        }
        let spec = json!({"podCIDR": cidrs[0], "podCIDRs": cidrs});
        match &self.backing {
            Backing::Mock(api) => api.change(n, |node| node["spec"] = spec),
            Backing::Real(real) => real.patch(&self.path(n), &json!({"spec": spec})),
        }
    }

    /// Sets one of flannel's annotations.
    pub(crate) fn annotate(&self, n: &str, key: &str, value: &str) {
        self.patch_annotations(n, &json!({format!("{USUAL}{key}"): value}));
    }

    /// Changes annotations; those that are null go.
    pub(crate) fn patch_annotations(&self, n: &str, annotations: &Value) {
        match &self.backing {
            Backing::Mock(api) => api.change(n, |node| {
                let all = node["metadata"]["annotations"].as_object_mut().unwrap();
                for (key, value) in annotations.as_object().unwrap() {
                    all.insert(key.clone(), value.clone());
                }
                all.retain(|_, value| !value.is_null());
            }),
            Backing::Real(real) => {
                let annotations = self.outward(annotations);
                real.patch(
                    &self.path(n),
                    &json!({"metadata": {"annotations": annotations}}),
                );
            }
        }
    }

    /// Sets conditions, by type.
    pub(crate) fn set_conditions(&self, n: &str, conditions: &Value) {
        match &self.backing {
            Backing::Mock(api) => {
                api.change(n, |node| node["status"]["conditions"] = conditions.clone());
            }
            Backing::Real(real) => {
                let body = json!({"status": {"conditions": conditions}});
                let path = format!("{}/status", self.path(n));
                real.ask(
                    "PATCH",
                    &path,
                    "application/strategic-merge-patch+json",
                    Some(&body),
                );
            }
        }
    }

    pub(crate) fn delete(&self, n: &str) {
        match &self.backing {
            Backing::Mock(api) => api.delete(n),
            Backing::Real(real) => {
                real.ask("DELETE", &self.path(n), "application/json", None);
            }
        }
    }

    /// The node as the server has it.
    pub(crate) fn node(&self, n: &str) -> Value {
        match &self.backing {
            Backing::Mock(api) => api.node(n),
            Backing::Real(real) => real.ask("GET", &self.path(n), "application/json", None),
        }
    }

    /// The annotations of a node, with flannel's names.
    pub(crate) fn annotations_of(&self, n: &str) -> Value {
        self.usual(&self.node(n))
    }

    /// One of flannel's annotations.
    pub(crate) fn annotation(&self, n: &str, key: &str) -> Value {
        self.annotations_of(n)[format!("{USUAL}{key}")].clone()
    }

    /// A condition of a node; null if it has none of this type.
    pub(crate) fn condition(&self, n: &str, kind: &str) -> Value {
        let node = self.node(n);
        let conditions = node["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten();
        let mut found = conditions.filter(|condition| condition["type"] == kind);
        found.next().cloned().unwrap_or_default()
    }

    /// Cuts off all watches.
    pub(crate) fn cut(&self) {
        match &self.backing {
            Backing::Mock(api) => api.cut(),
            Backing::Real(real) => real.relay.cut(),
        }
    }

    /// Makes the server go away, or come back.
    pub(crate) fn set_down(&self, down: bool) {
        match &self.backing {
            Backing::Mock(api) => {
                api.habits(|habits| habits.down = down);
                api.cut();
            }
            Backing::Real(real) => {
                real.relay.down.store(down, Ordering::Relaxed);
                real.relay.cut();
            }
        }
    }

    fn path(&self, n: &str) -> String {
        format!("/api/v1/nodes/{}", self.name(n))
    }

    /// The annotations of a node, with flannel's names.
    fn usual(&self, node: &Value) -> Value {
        let found = node["metadata"]["annotations"]
            .as_object()
            .into_iter()
            .flatten();
        let own = format!("{}/", self.prefix());
        let usual = |(key, value): (&String, &Value)| (key.replace(&own, USUAL), value.clone());
        Value::Object(found.map(usual).collect())
    }

    /// With the names that they have on the server.
    fn outward(&self, annotations: &Value) -> Value {
        let own = format!("{}/", self.prefix());
        let all = annotations.as_object().into_iter().flatten();
        Value::Object(
            all.map(|(key, value)| (key.replace(USUAL, &own), value.clone()))
                .collect(),
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Backing::Real(real) = &self.backing else {
            return;
        };
        for name in self.made.get_mut().iter().flat_map(|made| made.iter()) {
            // It may be gone; another failure is not worth a panic within a panic.
            let _gone = real.try_ask(
                "DELETE",
                &format!("/api/v1/nodes/{name}"),
                "application/json",
                None,
            );
        }
    }
}

impl Real {
    fn new(path: &std::path::Path, listener: TcpListener) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut kubeconfig = Kubeconfig::read_from(path).unwrap();
        let options = KubeConfigOptions::default();
        let config = runtime
            .block_on(Config::from_custom_kubeconfig(kubeconfig.clone(), &options))
            .unwrap();
        let url = config.cluster_url.clone();
        let host = url.host().unwrap().trim_matches(['[', ']']).to_owned();
        let port = url.port_u16().unwrap_or(match url.scheme_str() {
            Some("http") => 80,
            _ => 443,
        });
        let client = runtime.block_on(async { Client::try_from(config).unwrap() });
        let address = listener.local_addr().unwrap();
        for named in &mut kubeconfig.clusters {
            if let Some(cluster) = &mut named.cluster {
                cluster.server = Some(format!(
                    "{}://{address}",
                    url.scheme_str().unwrap_or("https")
                ));
                cluster.tls_server_name.get_or_insert_with(|| host.clone());
            }
        }
        Self {
            runtime,
            client,
            relay: Relay::start(listener, (host, port)),
            kubeconfig,
        }
    }

    fn try_ask(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> Result<Value, kube::Error> {
        let body = body.map(Value::to_string).unwrap_or_default().into_bytes();
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("Content-Type", kind)
            .body(body)
            .unwrap();
        // One after another, as the runtime is one thread's.
        self.runtime.block_on(self.client.request::<Value>(request))
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Value {
        let answer = self.try_ask(method, path, kind, body);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn patch(&self, path: &str, body: &Value) {
        self.ask("PATCH", path, "application/merge-patch+json", Some(body));
    }
}

/// Carries connections from one namespace to a server that only another reaches.
struct Relay {
    down: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    fn start(listener: TcpListener, server: (String, u16)) -> Self {
        let relay = Self {
            down: Arc::default(),
            open: Arc::default(),
        };
        let (down, open) = (Arc::clone(&relay.down), Arc::clone(&relay.open));
        // It waits for connections until the process ends.
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                if down.load(Ordering::Relaxed) {
                    continue;
                }
                // A client sees what it would see of a server that cannot be reached.
                let Ok(far) = TcpStream::connect((server.0.as_str(), server.1)) else {
                    continue;
                };
                for socket in [&near, &far] {
                    socket.set_nodelay(true).unwrap();
                }
                open.lock()
                    .unwrap()
                    .extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                carry(near.try_clone().unwrap(), far.try_clone().unwrap());
                carry(far, near);
            }
        });
        relay
    }

    fn cut(&self) {
        for socket in self.open.lock().unwrap().drain(..) {
            // It may be closed already.
            let _closed = socket.shutdown(Shutdown::Both);
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let _cut = std::io::copy(&mut from, &mut to);
        let _closed = to.shutdown(Shutdown::Both);
    });
}
