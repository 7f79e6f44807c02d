//! The `kube` lease source against an API service. Needs root, for network namespaces.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;

use common::api::Api;
use common::{Namespace, VXLAN, conf, eventually};
use crossbeam::channel::Receiver;
use ripstop_controlplane::family::{Family, PerFamily};
use ripstop_controlplane::interface::Selection;
use ripstop_controlplane::lease::kube::annotations::{DEFAULT_PREFIX, Prefix};
use ripstop_controlplane::lease::kube::{self, KubeSource, Settings};
use ripstop_controlplane::lease::{LeaseEvent, LeaseSet, LeaseSink, LeaseSource as _};
use ripstop_controlplane::sys::Wake;
use serde_json::{Value, json};

/// A node of a cluster: its namespace, with the API service in it.
struct Rig {
    namespace: Namespace,
    outside: Namespace,
    api: Api,
}

impl Rig {
    fn new() -> Self {
        let (namespace, outside) = Namespace::node(1);
        namespace.ip("route add default via 10.199.0.254");
        namespace.ip("-6 route add default via fd00:199::fe");
        let api = Api::serve(namespace.enter(|| TcpListener::bind("127.0.0.1:0").unwrap()));
        Self {
            namespace,
            outside,
            api,
        }
    }

    fn settings(text: &str) -> Settings {
        let conf = conf(text);
        Settings {
            node: "n1".to_owned(),
            selection: Selection {
                families: PerFamily {
                    v4: conf.network.is_some(),
                    v6: conf.network6.is_some(),
                },
                host_gw: text.contains("host-gw"),
                ..Selection::default()
            },
            conf,
            prefix: Prefix::new(DEFAULT_PREFIX).unwrap(),
            set_network_available: true,
            ready: Arc::new(AtomicBool::new(false)),
            silent: kube::SILENT,
        }
    }

    fn start(&self, settings: Settings) -> Source {
        let ready = Arc::clone(&settings.ready);
        let url = self.api.address.to_string();
        let source = KubeSource::new(kube::config(Some(&url), None).unwrap(), settings);
        let (queue, events) = crossbeam::channel::unbounded();
        let sink = LeaseSink::new(queue, Arc::new(Wake::new().unwrap()));
        // A thread inherits the namespace of the one that starts it.
        let thread = self
            .namespace
            .enter(|| std::thread::spawn(move || Box::new(source).run(&sink)));
        Source {
            events: Some(events),
            ready,
            thread: Some(thread),
        }
    }
}

/// A source that runs; it ends with the value.
struct Source {
    events: Option<Receiver<LeaseEvent>>,
    ready: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    fn next(&self) -> LeaseEvent {
        let events = self.events.as_ref().unwrap();
        events
            .recv_timeout(Duration::from_secs(60))
            .expect("an event")
    }

    /// The next set; what is told of problems before is passed over.
    fn set(&self) -> Arc<LeaseSet> {
        loop {
            if let LeaseEvent::Set { leases, .. } = self.next() {
                return leases;
            }
        }
    }

    /// Sets until there is one with these peers.
    fn peers(&self, wanted: &[&str]) -> Arc<LeaseSet> {
        loop {
            let set = self.set();
            if described(&set) == wanted {
                return set;
            }
        }
    }

    /// The next problem.
    fn problem(&self) -> String {
        loop {
            if let LeaseEvent::Failed(problem) = self.next() {
                return problem;
            }
        }
    }

    fn recovered(&self) {
        while !matches!(self.next(), LeaseEvent::Recovered) {}
    }

    fn is_quiet(&self) -> bool {
        self.events.as_ref().unwrap().is_empty()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.events = None;
        // It notices with its next event, which there is when it is told anything; a test that fails does not wait.
        drop(self.thread.take());
    }
}

/// Peers as `n2 10.244.2.0/24 10.199.0.12 02:..`.
fn described(set: &LeaseSet) -> Vec<String> {
    let describe = |lease: &ripstop_controlplane::lease::Lease| {
        let mac = lease
            .vtep_mac
            .map(|mac| format!(" {mac}"))
            .unwrap_or_default();
        format!("{} {} {}{mac}", lease.node, lease.subnet, lease.public_ip)
    };
    set.peers.iter().map(describe).collect()
}

/// What flannel wrote on node2 of the recorded lab.
fn node2() -> Value {
    json!({
        "flannel.alpha.coreos.com/backend-data": r#"{"VNI":1,"VtepMAC":"12:d3:27:c5:15:72"}"#,
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": "10.199.0.12",
        "volumes.kubernetes.io/controller-managed-attach-detach": "true",
    })
}

const NODE2: &str = "n2 10.244.2.0/24 10.199.0.12 12:d3:27:c5:15:72";

#[test]
fn a_node_joins_by_one_patch_and_sees_its_peers() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &Value::Null);
    rig.api.create("n2", &["10.244.2.0/24"], &node2());
    rig.api.create(
        "n3",
        &["10.244.3.0/24"],
        &json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"}),
    );
    let source = rig.start(Rig::settings(VXLAN));
    let set = source.set();
    assert_eq!(described(&set), [NODE2]);
    let own = set.own(Family::V4).unwrap();
    assert_eq!(
        (own.public_ip, own.subnet),
        (
            "10.199.0.1".parse().unwrap(),
            "10.244.1.0/24".parse().unwrap()
        )
    );
    let mac = own.vtep_mac.unwrap();
    let patches = || rig.api.requests("PATCH");
    eventually("a patch", || (!patches().is_empty()).then_some(()));
    let patch = &patches()[0];
    assert_eq!(
        (patch.target.as_str(), patch.content_type.as_str()),
        (
            "/api/v1/nodes/n1/status",
            "application/strategic-merge-patch+json"
        )
    );
    // Recorded of flannel, but for the values of this node.
    assert_eq!(
        patch.body,
        format!(
            r#"{{"metadata":{{"annotations":{{"flannel.alpha.coreos.com/backend-data":"{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"10.199.0.1"}}}}}}"#
        )
    );
    assert_eq!(
        rig.api.requests("LIST")[0].target,
        "/api/v1/nodes?limit=500&resourceVersion=0"
    );
    let watch = &rig.api.requests("WATCH")[0];
    let seconds: u32 = watch.query("timeoutSeconds").unwrap().parse().unwrap();
    assert!((300..600).contains(&seconds));
    assert_eq!(
        watch.target,
        format!(
            "/api/v1/nodes?allowWatchBookmarks=true&resourceVersion=103&timeoutSeconds={seconds}&watch=true"
        )
    );
    // The condition comes only when the node can forward.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(patches().len(), 1);
    source.ready.store(true, Ordering::Relaxed);
    eventually("the condition", || (patches().len() == 2).then_some(()));
    let patch = patches().pop().unwrap();
    assert_eq!(patch.target, "/api/v1/nodes/n1/status");
    let condition = &rig.api.node("n1")["status"]["conditions"][0];
    let at = condition["lastHeartbeatTime"].as_str().unwrap();
    assert_eq!(
        patch.body,
        format!(
            r#"{{"status":{{"conditions":[{{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"{at}","lastTransitionTime":"{at}","reason":"FlannelIsUp","message":"Flannel is running on this node"}}]}}}}"#
        )
    );
    assert!(at.len() == 20 && at.ends_with('Z'), "{at}");
    // Nothing more is written once all is as it should be.
    std::thread::sleep(Duration::from_millis(3500));
    assert_eq!(patches().len(), 2);
    assert!(source.is_quiet());
}
