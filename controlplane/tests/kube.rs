//! The `kube` lease source against an API service. Needs root, for network namespaces.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "times are printed, never asserted")]

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use cluster::Cluster;
use common::api::{self, Api};
use common::{Namespace, VXLAN, conf, eventually};
use crossbeam::channel::Receiver;
use ripstop_controlplane::family::{Family, PerFamily};
use ripstop_controlplane::interface::Selection;
use ripstop_controlplane::lease::kube::annotations::Prefix;
use ripstop_controlplane::lease::kube::{self, KubeSource, Server, Settings};
use ripstop_controlplane::lease::{LeaseEvent, LeaseSet, LeaseSink, LeaseSource as _};
use ripstop_controlplane::sys::Wake;
use serde_json::{Value, json};

/// A node of a cluster: its namespace, in which the API server can be reached.
struct Rig {
    cluster: Cluster,
    kubeconfig: tempfile::NamedTempFile,
    namespace: Namespace,
    /// The far end of its cable.
    _outside: Namespace,
}

impl Rig {
    /// With the API server that the environment names, or the mock.
    fn new() -> Self {
        Self::with(Cluster::new)
    }

    /// With the mock, for its bad habits.
    fn mock_only() -> Self {
        Self::with(Cluster::mock_only)
    }

    fn with(cluster: impl FnOnce(TcpListener) -> Cluster) -> Self {
        let (namespace, outside) = Namespace::node(1);
        namespace.ip("route add default via 10.199.0.254");
        namespace.ip("-6 route add default via fd00:199::fe");
        let cluster = cluster(namespace.enter(|| TcpListener::bind("127.0.0.1:0").unwrap()));
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kubeconfig.path(), cluster.kubeconfig()).unwrap();
        Self {
            cluster,
            kubeconfig,
            namespace,
            _outside: outside,
        }
    }

    /// The mock.
    fn api(&self) -> &Api {
        self.cluster.mock().unwrap()
    }

    fn settings(&self, text: &str) -> Settings {
        let conf = conf(text);
        Settings {
            node: self.cluster.name("n1"),
            selection: Selection {
                families: PerFamily {
                    v4: conf.network.is_some(),
                    v6: conf.network6.is_some(),
                },
                host_gw: text.contains("host-gw"),
                ..Selection::default()
            },
            conf,
            prefix: Prefix::new(&self.cluster.prefix()).unwrap(),
            set_network_available: true,
            ready: Arc::new(AtomicBool::new(false)),
            silent: kube::SILENT,
            recheck: kube::RECHECK,
        }
    }

    fn start(&self, settings: Settings) -> Source {
        self.start_by(self.kubeconfig.path(), settings)
    }

    fn start_by(&self, kubeconfig: &Path, settings: Settings) -> Source {
        let ready = Arc::clone(&settings.ready);
        let server = Server::new(None, Some(kubeconfig)).unwrap();
        let source = KubeSource::new(server, settings).unwrap();
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

    /// The next problem that has to do with this.
    fn problem(&self, about: &str) -> String {
        loop {
            if let LeaseEvent::Failed(problem) = self.next()
                && problem.contains(about)
            {
                return problem;
            }
        }
    }

    fn recovered(&self) {
        while !matches!(self.next(), LeaseEvent::Recovered) {}
    }

    /// Nothing more was told.
    fn assert_quiet(&self) {
        let told = self.events.as_ref().unwrap().try_recv();
        assert!(told.is_err(), "{told:?}");
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
        // What follows the dot is of this run.
        let node = lease.node.split('.').next().unwrap();
        format!("{node} {} {}{mac}", lease.subnet, lease.public_ip)
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
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &Value::Null);
    cluster.create("n2", &["10.244.2.0/24"], &node2());
    cluster.create(
        "n3",
        &["10.244.3.0/24"],
        &json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"}),
    );
    let source = rig.start(rig.settings(VXLAN));
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
    wait_annotations(
        cluster,
        &json!({
            "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#),
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": "10.199.0.1",
        }),
    );
    let patches = |api: &Api| api.requests("PATCH");
    if let Some(api) = cluster.mock() {
        let [patch] = &patches(api)[..] else {
            panic!("{:?}", patches(api))
        };
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
            api.requests("LIST")[0].target,
            "/api/v1/nodes?limit=500&resourceVersion=0"
        );
        let watch = &api.requests("WATCH")[0];
        let seconds: u32 = watch.query("timeoutSeconds").unwrap().parse().unwrap();
        assert!((300..600).contains(&seconds));
        assert_eq!(
            watch.target,
            format!(
                "/api/v1/nodes?allowWatchBookmarks=true&resourceVersion=103&timeoutSeconds={seconds}&watch=true"
            )
        );
    }
    // The condition comes only when the node can forward.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(cluster.condition("n1", "NetworkUnavailable"), Value::Null);
    source.ready.store(true, Ordering::Relaxed);
    let (condition, _) = eventually("the condition", || {
        let condition = cluster.condition("n1", "NetworkUnavailable");
        (!condition.is_null()).then_some(condition)
    });
    let at = condition["lastHeartbeatTime"].as_str().unwrap();
    assert!(at.len() == 20 && at.ends_with('Z'), "{at}");
    assert_eq!(
        condition,
        json!({"type": "NetworkUnavailable", "status": "False", "lastHeartbeatTime": at, "lastTransitionTime": at,
            "reason": "FlannelIsUp", "message": "Flannel is running on this node"})
    );
    if let Some(api) = cluster.mock() {
        let patch = patches(api).pop().unwrap();
        assert_eq!(patch.target, "/api/v1/nodes/n1/status");
        assert_eq!(
            patch.body,
            format!(
                r#"{{"status":{{"conditions":[{{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"{at}","lastTransitionTime":"{at}","reason":"FlannelIsUp","message":"Flannel is running on this node"}}]}}}}"#
            )
        );
    }
    // Nothing more is written once all is as it should be.
    let version = || cluster.node("n1")["metadata"]["resourceVersion"].clone();
    let before = version();
    std::thread::sleep(Duration::from_millis(3500));
    assert_eq!(version(), before);
    if let Some(api) = cluster.mock() {
        assert_eq!(patches(api).len(), 2);
    }
    source.assert_quiet();
}

/// The annotations of a peer of ours, VXLAN over IPv4.
fn member(n: u8) -> Value {
    json!({
        "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"02:52:53:00:00:{n:02x}"}}"#),
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": format!("10.199.0.{n}"),
    })
}

fn peer(n: u8) -> String {
    format!("n{n} 10.244.{n}.0/24 10.199.0.{n} 02:52:53:00:00:{n:02x}")
}

/// Waits until node n1 has these annotations and no others.
fn wait_annotations(cluster: &Cluster, wanted: &Value) {
    eventually(&format!("annotations {wanted}"), || {
        (cluster.annotations_of("n1") == *wanted).then_some(())
    });
}

/// Waits until node n1 has this public IP.
fn wait_public_ip(cluster: &Cluster, wanted: &str) -> Duration {
    eventually(&format!("public-ip {wanted}"), || {
        (cluster.annotation("n1", "public-ip") == wanted).then_some(())
    })
    .1
}

#[test]
fn each_backend_writes_what_flannel_writes() {
    let vxlan6 = common::dual(r#"{"Type":"vxlan","VNI":4096}"#);
    let host_gw6 = common::dual(r#"{"Type":"host-gw"}"#);
    for (text, kind, has_v6) in [
        (vxlan6, "vxlan", true),
        (common::backend(r#"{"Type":"host-gw"}"#), "host-gw", false),
        (host_gw6, "host-gw", true),
        (common::backend(r#"{"Type":"ipip"}"#), "ipip", false),
        (common::backend(r#"{"Type":"udp"}"#), "", false),
        (common::backend(r#"{"Type":"alloc"}"#), "", false),
    ] {
        let rig = Rig::new();
        rig.cluster.create(
            "n1",
            &["fd00:10:244:1::/64", "10.244.1.0/24"],
            &json!({"other": "kept"}),
        );
        let source = rig.start(rig.settings(&text));
        let set = source.set();
        let data = |family| match set.own(family).unwrap().vtep_mac {
            Some(mac) => format!(r#"{{"VNI":4096,"VtepMAC":"{mac}"}}"#),
            None => "null".to_owned(),
        };
        let mut wanted = json!({
            "other": "kept",
            "flannel.alpha.coreos.com/backend-data": data(Family::V4),
            "flannel.alpha.coreos.com/backend-type": kind,
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": "10.199.0.1",
        });
        if has_v6 {
            wanted["flannel.alpha.coreos.com/backend-v6-data"] = data(Family::V6).into();
            wanted["flannel.alpha.coreos.com/public-ipv6"] = "fd00:199::1".into();
            let macs = [Family::V4, Family::V6].map(|family| set.own(family).unwrap().vtep_mac);
            assert!(macs[0].is_none() || macs[0] != macs[1], "{macs:?}");
        }
        wait_annotations(&rig.cluster, &wanted);
        if let Some(api) = rig.cluster.mock() {
            assert_eq!(api.requests("PATCH").len(), 1, "{text}");
        }
    }
}

#[test]
fn families_are_apart() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24", "fd00:10:244:1::/64"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24", "fd00:10:244:2::/64"], &member(2));
    cluster.create("n3", &["fd00:10:244:3::/64", "10.244.3.0/24"], &member(3));
    cluster.annotate("n3", "public-ipv6", "fd00:199::3");
    cluster.annotate(
        "n3",
        "backend-v6-data",
        r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:02"}"#,
    );
    // One half that is wrong leaves the other.
    cluster.create("n4", &["10.244.4.0/24", "fd00:10:244:4::/64"], &member(4));
    cluster.annotate("n4", "public-ipv6", "fe80::4");
    let source = rig.start(rig.settings(&common::dual(r#"{"Type":"vxlan"}"#)));
    let (n2, n3, n4) = (peer(2), peer(3), peer(4));
    let n3v6 = "n3 fd00:10:244:3::/64 fd00:199::3 02:52:53:00:00:02";
    source.peers(&[&n2, &n3, &n4, n3v6]);
    // Flannel sees a change only if it concerns both families.
    cluster.annotate("n3", "public-ipv6", "fd00:199::33");
    source.peers(&[
        &n2,
        &n3,
        &n4,
        "n3 fd00:10:244:3::/64 fd00:199::33 02:52:53:00:00:02",
    ]);
    cluster.annotate("n3", "public-ip", "10.199.0.33");
    source.peers(&[
        &n2,
        "n3 10.244.3.0/24 10.199.0.33 02:52:53:00:00:03",
        &n4,
        "n3 fd00:10:244:3::/64 fd00:199::33 02:52:53:00:00:02",
    ]);
}

#[test]
fn the_own_subnet_may_come_late_and_change() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    let name = cluster.name("n1");
    let source = rig.start(rig.settings(VXLAN));
    source.problem(&format!("node {name:?} not found"));
    cluster.create("n1", &[], &json!({}));
    source.problem(&format!("node {name:?} pod cidr not assigned"));
    cluster.assign("n1", &["10.245.1.0/24"]);
    source.problem(&format!(
        r#"subnet "10.244.0.0/16" specified in the flannel net config doesn't contain "10.245.1.0/24" PodCIDR of the "{name}" node"#
    ));
    assert_eq!(
        cluster.annotations_of("n1"),
        json!({}),
        "nothing is written for a node that cannot take part"
    );
    cluster.assign("n1", &["fd00::/64"]);
    source.problem(&format!("node {name:?} has no PodCIDR"));
    cluster.assign("n1", &["10.244.1.0/24"]);
    let wait_own = |wanted: &str| {
        while source.set().own(Family::V4).unwrap().subnet.to_string() != wanted {}
    };
    wait_own("10.244.1.0/24");
    cluster.assign("n1", &["10.244.9.0/24"]);
    wait_own("10.244.9.0/24");
    // Taken away: the last set stays, and the problem is said.
    cluster.delete("n1");
    source.problem("not found");
    cluster.create("n1", &["10.244.9.0/24"], &json!({}));
    source.recovered();
    // A node made anew has annotations anew.
    wait_public_ip(cluster, "10.199.0.1");
    // An older node has it already.
    cluster.delete("n1");
    cluster.create("n0", &["10.244.9.0/25"], &member(2));
    cluster.create("n1", &["10.244.9.0/24"], &json!({}));
    source.problem(&format!(
        "overlaps 10.244.9.0/25 of the older node {:?}",
        cluster.name("n0")
    ));
}

fn own_mac(set: &LeaseSet) -> String {
    set.own(Family::V4).unwrap().vtep_mac.unwrap().to_string()
}

#[test]
fn the_mac_is_kept() {
    let stored = json!({"flannel.alpha.coreos.com/backend-data": r#"{ "VNI": 1, "VtepMAC": "02:11:22:33:44:55" }"#});
    let rig = Rig::new();
    rig.cluster.create("n1", &["10.244.1.0/24"], &stored);
    let source = rig.start(rig.settings(VXLAN));
    assert_eq!(own_mac(&source.set()), "02:11:22:33:44:55");
    // A device that is there says what peers know.
    let rig = Rig::new();
    rig.cluster.create("n1", &["10.244.1.0/24"], &stored);
    rig.namespace
        .ip("link add flannel.1 address 02:66:77:88:99:aa type vxlan id 1 dev eth0 dstport 8472");
    let source = rig.start(rig.settings(VXLAN));
    assert_eq!(own_mac(&source.set()), "02:66:77:88:99:aa");
    eventually("the annotation follows", || {
        let data = rig.cluster.annotation("n1", "backend-data");
        (data == r#"{"VNI":1,"VtepMAC":"02:66:77:88:99:aa"}"#).then_some(())
    });
}

#[test]
fn of_two_with_one_mac_the_older_keeps_it() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n0", &["10.244.2.0/24"], &json!({}));
    cluster.create(
        "n1",
        &["10.244.1.0/24"],
        &json!({"flannel.alpha.coreos.com/backend-data": "null"}),
    );
    let source = rig.start(rig.settings(VXLAN));
    let set = source.set();
    let first = set.own(Family::V4).unwrap().vtep_mac.unwrap();
    assert_eq!(
        first.0[0] & 3,
        2,
        "{first} is one station's, and locally administered"
    );
    // An older node comes with the same one: the younger takes another.
    let mut annotations = member(2);
    annotations["flannel.alpha.coreos.com/backend-data"] =
        format!(r#"{{"VNI":1,"VtepMAC":"{first}"}}"#).into();
    cluster.patch_annotations("n0", &annotations);
    let set = source.peers(&[&format!("n0 10.244.2.0/24 10.199.0.2 {first}")]);
    let other = own_mac(&set);
    assert_ne!(first.to_string(), other);
    eventually("the annotation follows", || {
        let data = cluster.annotation("n1", "backend-data");
        data.as_str()?.contains(&other).then_some(())
    });
}

#[test]
fn public_ips_are_followed_live() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    let source = rig.start(rig.settings(VXLAN));
    let own = |set: &LeaseSet| set.own(Family::V4).unwrap().public_ip.to_string();
    assert_eq!(own(&source.set()), "10.199.0.1");
    let wait = |text: &str| wait_public_ip(cluster, text);
    wait("10.199.0.1");
    cluster.annotate("n1", "public-ip-overwrite", "192.0.2.7");
    wait("192.0.2.7");
    // What is no address is not passed on.
    cluster.annotate("n1", "public-ip-overwrite", "192.0.2");
    wait("10.199.0.1");
    cluster.annotate("n1", "public-ip-overwrite", "");
    // Someone else's hand.
    cluster.annotate("n1", "public-ip", "10.199.0.99");
    wait("10.199.0.1");
    rig.namespace.ip("addr add 10.199.0.111/24 dev eth0");
    cluster.annotate("n1", "node-public-ip", "10.199.0.111");
    assert_eq!(own(&source.set()), "10.199.0.111");
    wait("10.199.0.111");
    cluster.annotate("n1", "node-public-ip", "10.199.0.222");
    source.problem("10.199.0.222");
    cluster.annotate("n1", "node-public-ip", "");
    assert_eq!(own(&source.set()), "10.199.0.1");
}

#[test]
fn the_kernels_word_is_enough_to_follow_addresses() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.namespace.ip("link add eth1 type veth peer name peer1");
    rig.namespace.ip("link set peer1 up");
    rig.namespace.ip("addr add 10.198.0.1/24 dev eth1");
    rig.namespace.ip("link set eth1 up");
    let mut settings = rig.settings(VXLAN);
    // Nobody asks, so what comes is what was announced.
    settings.recheck = Duration::from_secs(3600);
    let source = rig.start(settings);
    let wait = |text: &str| {
        while source.set().own(Family::V4).unwrap().public_ip.to_string() != text {}
        let took = wait_public_ip(cluster, text);
        println!("public-ip {text} after {took:?} more");
    };
    wait("10.199.0.1");
    // The address, the interface of the default route, and the interface itself.
    rig.namespace.ip("addr add 10.199.0.111/24 dev eth0");
    rig.namespace.ip("addr del 10.199.0.1/24 dev eth0");
    rig.namespace.ip("addr replace 10.199.0.111/24 dev eth0");
    rig.namespace.ip("route replace default via 10.199.0.254");
    wait("10.199.0.111");
    rig.namespace.ip("route replace default via 10.198.0.254");
    wait("10.198.0.1");
    rig.namespace.ip("link del eth1");
    source.problem("our own public IP");
    rig.namespace.ip("route add default via 10.199.0.254");
    wait("10.199.0.111");
}

#[test]
fn what_others_write_is_put_right() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({"kept": "x"}));
    let source = rig.start(rig.settings(VXLAN));
    let mac = own_mac(&source.set());
    let wanted = json!({
        "kept": "x",
        "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#),
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": "10.199.0.1",
    });
    wait_annotations(cluster, &wanted);
    source.ready.store(true, Ordering::Relaxed);
    let wait_condition = || {
        eventually("the condition", || {
            (cluster.condition("n1", "NetworkUnavailable")["status"] == "False").then_some(())
        });
    };
    wait_condition();
    // A cloud provider says otherwise; other conditions are left alone.
    let others = json!({"type": "Ready", "status": "True", "lastHeartbeatTime": null, "lastTransitionTime": null});
    cluster.set_conditions(
        "n1",
        &json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}, others]),
    );
    wait_condition();
    assert_eq!(cluster.condition("n1", "Ready")["status"], "True");
    for gone in [
        &json!({"flannel.alpha.coreos.com/public-ip": null}),
        &json!({
            "flannel.alpha.coreos.com/backend-data": null,
            "flannel.alpha.coreos.com/backend-type": "host-gw",
            "flannel.alpha.coreos.com/kube-subnet-manager": null,
            "flannel.alpha.coreos.com/public-ip": null,
        }),
    ] {
        cluster.patch_annotations("n1", gone);
        wait_annotations(cluster, &wanted);
    }
}

#[test]
fn mock_only_refused_writes_are_tried_again() {
    let rig = Rig::mock_only();
    let api = rig.api();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.habits(|habits| habits.refusals = vec![("PATCH", 500, 2), ("PATCH", 429, 1)]);
    let source = rig.start(rig.settings(VXLAN));
    source.set();
    source.problem("own annotations: patch nodes/status: the API server answers 500");
    source.recovered();
    eventually("the patch", || {
        (api.requests("PATCH").len() == 4).then_some(())
    });
    api.habits(|habits| habits.refusals = vec![("PATCH", 403, 1000)]);
    api.annotate("n1", "backend-type", "host-gw");
    source.problem("patch of nodes/status");
}

#[test]
fn peers_are_followed_and_bad_ones_disturb_nobody() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    let source = rig.start(rig.settings(VXLAN));
    let n2 = peer(2);
    source.peers(&[&n2]);
    // The annotations may be there before the pod CIDR.
    cluster.create("n3", &[], &member(3));
    cluster.create("n7", &["10.244.7.0/24"], &member(7));
    source.peers(&[&n2, &peer(7)]);
    cluster.delete("n7");
    source.peers(&[&n2]);
    cluster.assign("n3", &["10.244.3.0/24"]);
    source.peers(&[&n2, &peer(3)]);
    // Every change of what a lease is made of.
    cluster.assign("n3", &["10.244.33.0/24"]);
    source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:03"]);
    // A VNI is each node's own business, as with flannel.
    cluster.annotate(
        "n3",
        "backend-data",
        r#"{"VNI":7,"VtepMAC":"02:52:53:00:00:33"}"#,
    );
    source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:33"]);
    for (key, bad, good) in [
        ("kube-subnet-manager", "True", "true"),
        ("kube-subnet-manager", "false", "true"),
        ("backend-type", "host-gw", "vxlan"),
        ("backend-type", "wireguard", "vxlan"),
        ("public-ip", "10.199.0", "10.199.0.3"),
        ("public-ip", "127.0.0.1", "10.199.0.3"),
        ("public-ip", "10.244.7.7", "10.199.0.3"),
        ("public-ip", "", "10.199.0.3"),
        (
            "backend-data",
            "null",
            r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:33"}"#,
        ),
    ] {
        cluster.annotate("n3", key, bad);
        source.peers(&[&n2]);
        cluster.annotate("n3", key, good);
        source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:33"]);
    }
    for bad in ["10.245.3.0/24", "10.244.3.0/31"] {
        cluster.assign("n3", &[bad]);
        source.peers(&[&n2]);
        cluster.assign("n3", &["10.244.3.0/24"]);
        source.peers(&[&n2, "n3 10.244.3.0/24 10.199.0.3 02:52:53:00:00:33"]);
    }
    // The older keeps what two claim, and the younger is there when it is free.
    cluster.create("n4", &["10.244.2.128/25"], &member(4));
    let mut same_mac = member(3);
    same_mac["flannel.alpha.coreos.com/backend-data"] =
        r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:33"}"#.into();
    cluster.create("n5", &["10.244.5.0/24"], &same_mac);
    cluster.create("n6", &["10.244.6.0/24"], &member(6));
    source.peers(&[
        &n2,
        "n3 10.244.3.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    cluster.delete("n3");
    source.peers(&[
        &n2,
        "n5 10.244.5.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    cluster.delete("n2");
    source.peers(&[
        "n4 10.244.2.128/25 10.199.0.4 02:52:53:00:00:04",
        "n5 10.244.5.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    source.assert_quiet();
}

#[test]
fn mock_only_what_no_api_server_takes_is_survived() {
    let rig = Rig::mock_only();
    let api = rig.api();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.create("n2", &["10.244.2.0/24"], &member(2));
    api.create("n3", &["10.244.3.0/24"], &member(3));
    let source = rig.start(rig.settings(VXLAN));
    source.peers(&[&peer(2), &peer(3)]);
    // Somebody writes into the data base: a pod CIDR that changes, is none, or is one of three; no annotations at all.
    let assign = |n: &str, cidrs: &[&str]| {
        api.corrupt(n, |node| {
            node["spec"] = json!({"podCIDR": cidrs[0], "podCIDRs": cidrs});
        });
    };
    assign("n3", &["10.244.33.0/24"]);
    source.peers(&[&peer(2), "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:03"]);
    for bad in [&["x"][..], &["10.244.3.0/24", "10.244.4.0/24", "fd00::/64"]] {
        assign("n3", bad);
        source.peers(&[&peer(2)]);
        assign("n3", &["10.244.3.0/24"]);
        source.peers(&[&peer(2), &peer(3)]);
    }
    api.corrupt("n3", |node| node["metadata"]["annotations"] = Value::Null);
    source.peers(&[&peer(2)]);
    // A node goes that never came.
    api.delete_unknown("n99");
    api.corrupt("n3", |node| node["metadata"]["annotations"] = member(3));
    source.peers(&[&peer(2), &peer(3)]);
    assign("n1", &["fd00::/64", "10.244.1.0/24", "10.244.2.0/24"]);
    source.problem("node \"n1\" pod cidrs should be IPv4/IPv6 only or dualstack");
    assign("n1", &["10.244.1.0/24"]);
    source.recovered();
    source.assert_quiet();
}

#[test]
fn mock_only_watches_that_fail_lose_nothing() {
    let rig = Rig::mock_only();
    let api = rig.api();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.habits(|habits| habits.refusals = vec![("LIST", 503, 1), ("WATCH", 429, 1)]);
    let mut settings = rig.settings(VXLAN);
    settings.silent = Duration::from_secs(1);
    let source = rig.start(settings);
    source.peers(&[]);
    let mut members: Vec<String> = Vec::new();
    let mut n = 1;
    let mut join = || {
        n += 1;
        api.create(&format!("n{n}"), &[&format!("10.244.{n}.0/24")], &member(n));
        members.push(peer(n));
        members.clone()
    };
    let sees = |members: &[String]| {
        source.peers(&members.iter().map(String::as_str).collect::<Vec<_>>());
    };
    sees(&join());
    api.cut();
    sees(&join());
    // Expired while it lags behind.
    api.habits(|habits| habits.held = true);
    join();
    let members = join();
    api.expire();
    api.habits(|habits| habits.held = false);
    sees(&members);
    let lists = api.requests("LIST");
    let relist = lists.last().unwrap();
    assert!(
        relist.query("resourceVersionMatch") == Some("NotOlderThan")
            && relist.query("limit") == Some("500"),
        "{relist:?}"
    );
    // Late and in another order.
    api.habits(|habits| (habits.held, habits.reversed) = (true, true));
    join();
    let members = join();
    api.habits(|habits| habits.held = false);
    sees(&members);
    api.habits(|habits| habits.reversed = false);
    // Silent watches are renewed, and bookmarks are where they go on.
    let watches = api.requests("WATCH").len();
    eventually("a new list and watch", || {
        (api.requests("WATCH").len() > watches).then_some(())
    });
    api.habits(|habits| habits.bookmarks = Some(Duration::from_millis(100)));
    api.expire();
    sees(&join());
    source.assert_quiet();
}

#[test]
fn an_api_server_that_goes_and_comes_back() {
    let rig = Rig::new();
    let cluster = &rig.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    let source = rig.start(rig.settings(VXLAN));
    source.peers(&[&peer(2)]);
    wait_public_ip(cluster, "10.199.0.1");
    // Watches alone.
    cluster.cut();
    cluster.create("n3", &["10.244.3.0/24"], &member(3));
    source.peers(&[&peer(2), &peer(3)]);
    cluster.set_down(true);
    source.problem("nodes:");
    std::thread::sleep(Duration::from_secs(4));
    source.assert_quiet();
    cluster.delete("n2");
    cluster.annotate("n1", "public-ip", "10.199.0.99");
    let start = std::time::Instant::now();
    cluster.set_down(false);
    source.peers(&[&peer(3)]);
    println!("API server back: {:?} to the new set", start.elapsed());
    wait_public_ip(cluster, "10.199.0.1");
}

#[test]
fn mock_only_an_api_server_with_another_data_base() {
    let rig = Rig::mock_only();
    let api = rig.api();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.create("n2", &["10.244.2.0/24"], &member(2));
    let source = rig.start(rig.settings(VXLAN));
    source.peers(&[&peer(2)]);
    wait_public_ip(&rig.cluster, "10.199.0.1");
    rig.cluster.set_down(true);
    source.problem("nodes:");
    api.reset();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.create("n3", &["10.244.3.0/24"], &member(3));
    rig.cluster.set_down(false);
    source.peers(&[&peer(3)]);
    eventually("our annotations are there too", || {
        (api.requests("PATCH").len() >= 2).then_some(())
    });
}

/// The program itself on a node, with the API server in its namespace.
struct Program {
    cluster: Cluster,
    node: common::node::Node,
    kubeconfig: String,
}

impl Program {
    fn new(cluster: impl FnOnce(TcpListener) -> Cluster) -> Self {
        let node = common::node::Node::new(1);
        node.namespace.ip("route add default via 10.199.0.2");
        let listener = node
            .namespace
            .enter(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let cluster = cluster(listener);
        let path = node.directory.path().join("kubeconfig");
        std::fs::write(&path, cluster.kubeconfig()).unwrap();
        Self {
            cluster,
            node,
            kubeconfig: path.to_str().unwrap().to_owned(),
        }
    }

    fn start(&self) -> common::Process {
        let (name, prefix) = (self.cluster.name("n1"), self.cluster.prefix());
        let flags = [
            "--kube-subnet-mgr",
            "--kubeconfig-file",
            &self.kubeconfig,
            "--node-name",
            &name,
            "--kube-annotation-prefix",
            &prefix,
        ];
        self.node
            .start_through(&[common::node::CONTROLPLANE], &flags)
    }

    /// The kernel's path to others: subnet and MAC address, MAC and public IP, subnet, each list sorted.
    fn standby(&self) -> [Vec<String>; 3] {
        let lines = |program: &str, arguments: &str, line: fn(&str) -> Option<String>| {
            let output = self.node.namespace.try_command(program, arguments);
            let text = String::from_utf8(output.stdout).unwrap();
            let mut found: Vec<String> = text.lines().filter_map(line).collect();
            found.sort();
            found
        };
        [
            lines("ip", "-4 neigh show dev flannel.1 nud permanent", |line| {
                let mut words = line.split_whitespace();
                Some(format!("{} {}", words.next()?, words.nth(1)?))
            }),
            lines("bridge", "fdb show dev flannel.1", |line| {
                let (mac, rest) = line.split_once(" dst ")?;
                Some(format!("{mac} {}", rest.split_whitespace().next()?))
            }),
            lines("ip", "-4 route show dev flannel.1", |line| {
                let mut words = line.split_whitespace();
                Some(words.next()?.to_owned())
            }),
        ]
    }

    /// Waits until the kernel's path leads to these, `(subnet, MAC, public IP)`, and to nobody else.
    fn wait_standby(&self, what: &str, peers: &[(u8, u8, u8)]) {
        let mac = |n: u8| format!("02:52:53:00:00:{n:02x}");
        let lines = |line: &dyn Fn(&(u8, u8, u8)) -> String| {
            let mut lines: Vec<String> = peers.iter().map(line).collect();
            lines.sort();
            lines
        };
        let wanted = [
            lines(&|(net, n, _)| format!("10.244.{net}.0 {}", mac(*n))),
            lines(&|(_, n, ip)| format!("{} 10.199.0.{ip}", mac(*n))),
            lines(&|(net, ..)| format!("10.244.{net}.0/24")),
        ];
        let (_, took) = eventually(&format!("{what}: {wanted:?}"), || {
            (self.standby() == wanted).then_some(())
        });
        println!("{what}: {took:?}");
    }
}

fn backend_data(vni: u32, n: u8) -> String {
    format!(r#"{{"VNI":{vni},"VtepMAC":"02:52:53:00:00:{n:02x}"}}"#)
}

/// Each row of what flannel was seen to do over time, down to the kernel; the rows where it goes wrong, right.
#[test]
fn over_time_the_kernel_holds_what_the_nodes_say() {
    let program = Program::new(Cluster::new);
    let cluster = &program.cluster;
    let wait = |what: &str, peers: &[(u8, u8, u8)]| program.wait_standby(what, peers);
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    // A foreign implementation, or a tool, that writes the annotations is a full member.
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    cluster.create("n3", &["10.244.3.0/24"], &member(3));
    cluster.create("n4", &["10.244.4.0/24"], &Value::Null);
    let mut wireguard = member(5);
    wireguard["flannel.alpha.coreos.com/backend-type"] = "wireguard".into();
    cluster.create("n5", &["10.244.5.0/24"], &wireguard);
    let process = program.start();
    wait("members", &[(2, 2, 2), (3, 3, 3)]);
    let set = |key: &str, value: &str| cluster.annotate("n2", key, value);
    set("backend-data", &backend_data(1, 0x22));
    wait("MAC of a peer", &[(2, 0x22, 2), (3, 3, 3)]);
    set("public-ip", "10.199.0.22");
    wait("public IP of a peer", &[(2, 0x22, 22), (3, 3, 3)]);
    set("backend-data", &backend_data(7, 0x23));
    wait("VNI of a peer", &[(2, 0x23, 22), (3, 3, 3)]);
    for (key, bad, good) in [
        ("kube-subnet-manager", "false", "true"),
        ("backend-type", "host-gw", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"nonsense"}"#, ""),
    ] {
        set(key, bad);
        wait(&format!("{key} {bad}"), &[(3, 3, 3)]);
        match key {
            "backend-data" => set(key, &backend_data(1, 0x23)),
            _ => set(key, good),
        }
        wait(&format!("{key} as before"), &[(2, 0x23, 22), (3, 3, 3)]);
    }
    cluster.delete("n2");
    wait("node deleted", &[(3, 3, 3)]);
    cluster.create("n6", &[], &member(6));
    // A change of another node shows that this one was looked at and passed over.
    cluster.annotate("n3", "public-ip", "10.199.0.33");
    wait("no pod CIDR yet", &[(3, 3, 33)]);
    cluster.assign("n6", &["10.244.6.0/24"]);
    wait("pod CIDR assigned late", &[(3, 3, 33), (6, 6, 6)]);
    cluster.assign("n6", &["10.244.66.0/24"]);
    wait("another pod CIDR", &[(3, 3, 33), (66, 6, 6)]);
    // What is to go is gone already, and nothing waits for it.
    program.node.namespace.ip("route del 10.244.66.0/24");
    program
        .node
        .namespace
        .ip("neigh del 10.244.66.0 dev flannel.1");
    cluster.delete("n6");
    wait("a deleted node without entries", &[(3, 3, 33)]);
    // Two with one MAC address, two with one pod CIDR: the older has it, the younger gets it.
    let mut same_mac = member(7);
    same_mac["flannel.alpha.coreos.com/backend-data"] = backend_data(1, 3).into();
    cluster.create("n7", &["10.244.7.0/24"], &same_mac);
    cluster.create("n8", &["10.244.3.0/24"], &member(8));
    cluster.create("n9", &["10.244.9.0/24"], &member(9));
    wait("MAC and pod CIDR twice", &[(3, 3, 33), (9, 9, 9)]);
    cluster.delete("n3");
    wait("the older is gone", &[(7, 3, 7), (3, 8, 8), (9, 9, 9)]);
    cluster.delete("n7");
    wait("the younger too", &[(3, 8, 8), (9, 9, 9)]);
    // The device is deleted under it.
    let mac = || {
        let link = program.node.namespace.ip("-o link show flannel.1");
        let mut words = link.split_whitespace();
        words.find(|word| *word == "link/ether");
        words.next().unwrap().to_owned()
    };
    let before = mac();
    program.node.namespace.ip("link del flannel.1");
    wait("the device is deleted", &[(3, 8, 8), (9, 9, 9)]);
    assert_eq!(mac(), before);
    // Others reach us elsewhere; the device's own address stays.
    cluster.annotate("n1", "public-ip-overwrite", "192.0.2.1");
    wait_public_ip(cluster, "192.0.2.1");
    let link = program.node.namespace.ip("-d link show flannel.1");
    assert!(link.contains("local 10.199.0.1 "), "{link}");
    // Killed and started anew it writes nothing; without its device it makes one with the same MAC address.
    let version = || cluster.node("n1")["metadata"]["resourceVersion"].clone();
    eventually("the condition", || {
        (cluster.condition("n1", "NetworkUnavailable")["reason"] == "FlannelIsUp").then_some(())
    });
    let (settled, kernel) = (version(), program.standby());
    process.signal(libc::SIGTERM);
    let (code, log) = common::node::wait_exit(process);
    assert_eq!((code, program.standby()), (0, kernel), "{log}");
    assert_eq!(
        log.matches(&cluster.name("n5")).count(),
        1,
        "a node of another backend is named once: {log}"
    );
    assert!(
        !log.contains(&cluster.name("n4")),
        "a node without annotations is not worth a word: {log}"
    );
    program.node.namespace.ip("link del flannel.1");
    let process = program.start();
    wait("started without its device", &[(3, 8, 8), (9, 9, 9)]);
    assert_eq!((mac(), version()), (before, settled));
    process.signal(libc::SIGKILL);
}

#[test]
fn a_restart_without_the_api_server() {
    let program = Program::new(Cluster::new);
    let cluster = &program.cluster;
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    let process = program.start();
    program.wait_standby("with the API server", &[(2, 2, 2)]);
    let file = program.node.run_dir().join("leases.kept");
    eventually("the set is kept", || {
        std::fs::read_to_string(&file)
            .is_ok_and(|text| text.contains("10.244.2.0/24"))
            .then_some(())
    });
    process.signal(libc::SIGKILL);
    drop(process);
    cluster.set_down(true);
    program.node.namespace.ip("link del flannel.1");
    let process = program.start();
    program.wait_standby("without", &[(2, 2, 2)]);
    let problem = |wanted: &str| {
        eventually(wanted, || {
            let problems = program.node.state().problems;
            problems
                .iter()
                .any(|problem| problem.contains(wanted))
                .then_some(())
        });
    };
    problem("leases from 20");
    problem("list nodes");
    cluster.annotate("n2", "public-ip", "10.199.0.3");
    cluster.set_down(false);
    program.wait_standby("with again", &[(2, 2, 3)]);
    eventually("all is well", || {
        let problems = program.node.state().problems;
        (!problems.iter().any(|problem| problem.contains("leases"))).then_some(())
    });
    process.signal(libc::SIGKILL);
    drop(process);
    // What is damaged is named and not used.
    cluster.set_down(true);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("10.244.2.0", "10.244.3.0")).unwrap();
    let process = program.start();
    problem("leases.kept are not used: it is damaged: its check sum is wrong");
    process.signal(libc::SIGTERM);
    let (code, log) = common::node::wait_exit(process);
    assert_eq!(code, 0, "{log}");
    assert!(!log.contains("leases loaded"), "{log}");
    // What is wrong is said once, by us: the client's own line for each try would fill the disk.
    assert!(!log.contains("failed with error"), "{log}");
}

#[test]
fn loop_and_source_choose_the_same_interface() {
    let program = Program::new(Cluster::new);
    let cluster = &program.cluster;
    let ip = |arguments: &str| program.node.namespace.ip(arguments);
    ip("link add eth1 type veth peer name peer1");
    ip("link set peer1 up");
    ip("addr add 10.198.0.1/24 dev eth1");
    ip("link set eth1 up");
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    let _process = program.start();
    let wait = |interface: &str, address: &str| {
        let (_, took) = eventually(&format!("{interface} with {address}"), || {
            let state = program.node.state();
            let said = cluster.annotation("n1", "public-ip") == address;
            let link = program
                .node
                .namespace
                .try_command("ip", "-d link show flannel.1");
            let link = String::from_utf8(link.stdout).unwrap();
            let made = link.contains(&format!("local {address} dev {interface} "));
            (said && made && state.underlay.as_deref() == Some(interface)).then_some(())
        });
        println!("{interface} with {address}: {took:?}");
    };
    wait("eth0", "10.199.0.1");
    for _time in 0..2 {
        ip("route replace default via 10.198.0.254");
        wait("eth1", "10.198.0.1");
        ip("route replace default via 10.199.0.2");
        wait("eth0", "10.199.0.1");
    }
    // The address moves and takes its routes along.
    ip("addr del 10.198.0.1/24 dev eth1");
    ip("addr del 10.199.0.1/24 dev eth0");
    ip("addr add 10.199.0.1/24 dev eth1");
    ip("route add default via 10.199.0.2");
    wait("eth1", "10.199.0.1");
}

fn memory_kib(process: &common::Process, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(what))
        .unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[test]
fn the_program_programs_the_kernel_and_says_so() {
    let program = Program::new(Cluster::new);
    let (node, cluster) = (&program.node, &program.cluster);
    cluster.create("n1", &["10.244.1.0/24"], &json!({}));
    cluster.create("n2", &["10.244.2.0/24"], &member(2));
    let process = program.start();
    node.wait_resolved(&[&cluster.name("n2")]);
    program.wait_standby("the kernel's path", &[(2, 2, 2)]);
    eventually("the condition", || {
        (cluster.condition("n1", "NetworkUnavailable")["reason"] == "FlannelIsUp").then_some(())
    });
    // Pods are told of the subnet, and told again when somebody takes the file away.
    let subnet_file = node.directory.path().join("flannel/subnet.env");
    for _time in 0..2 {
        let (text, _) = eventually("the subnet file", || {
            std::fs::read_to_string(&subnet_file).ok()
        });
        assert_eq!(
            text,
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
        std::fs::remove_file(&subnet_file).unwrap();
    }
    let data = cluster.annotation("n1", "backend-data");
    let device = node.namespace.ip("link show flannel.1");
    // As flannel cuts it out.
    let mac = data.as_str().unwrap().split(":\"").nth(1).unwrap();
    let mac = mac.trim_end_matches("\"}");
    assert!(device.contains(mac), "{data} {device}");
    // The API server is killed: what others delete is put back all the same.
    cluster.set_down(true);
    eventually("the problem is said", || {
        let problems = node.state().problems;
        let mut said = problems.iter();
        said.any(|problem| problem.contains("; the leases before stay in force"))
            .then_some(())
    });
    node.namespace.ip("route del 10.244.2.0/24");
    node.wait_ip("route", |routes| routes.contains("10.244.2.0/24"));
    process.signal(libc::SIGTERM);
    let (code, log) = common::node::wait_exit(process);
    assert_eq!(code, 0, "{log}");
    assert_eq!(
        log.matches("; the leases before stay in force").count(),
        1,
        "{log}"
    );
}

#[test]
fn mock_only_bad_flags_and_variables_say_why() {
    let program = Program::new(Cluster::mock_only);
    let (node, kubeconfig) = (&program.node, &program.kubeconfig);
    let api = program.cluster.mock().unwrap();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    api.place("kube-flannel", "pod-x", "n1");
    let run = |variables: &[&str], flags: &[&str]| {
        let conf = node.directory.path().join("net-conf.json");
        let run_dir = node.run_dir();
        let subnet_file = node.directory.path().join("subnet.env");
        let own = [
            "--subnet-file",
            subnet_file.to_str().unwrap(),
            "--net-config-path",
            conf.to_str().unwrap(),
            "--run-dir",
            run_dir.to_str().unwrap(),
            "--kube-subnet-mgr",
        ];
        let arguments = [
            &["-u", "NODE_NAME"],
            variables,
            &[common::node::CONTROLPLANE],
            &own,
            flags,
        ]
        .concat();
        node.namespace.spawn("env", &arguments)
    };
    let file = ["--kubeconfig-file", kubeconfig.as_str()];
    for (variables, flags, wanted) in [
        (
            &[][..],
            &["--kube-annotation-prefix", "a.b/c/d", file[0], file[1]][..],
            "subnet/kube: prefix can contain at most single slash",
        ),
        (
            &[],
            &["--kube-annotation-prefix", "Nope", file[0], file[1]],
            "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*",
        ),
        (
            &["EVENT_QUEUE_DEPTH=many"],
            &file,
            "env EVENT_QUEUE_DEPTH=many format error",
        ),
        (
            &[],
            &file,
            "env variables POD_NAME and POD_NAMESPACE must be set",
        ),
        (
            &["KUBERNETES_SERVICE_HOST="],
            &[],
            "in-cluster configuration",
        ),
        (
            &[],
            &["--kubeconfig-file", "/nonexistent"],
            "kubeconfig /nonexistent",
        ),
    ] {
        let (code, log) = common::node::wait_exit(run(variables, flags));
        assert!(code == 1 && log.contains(wanted), "{wanted}: {code} {log}");
    }
    // The pod's node; a URL alone will do.
    let url = api.address.to_string();
    let process = run(
        &[
            "POD_NAME=pod-x",
            "POD_NAMESPACE=kube-flannel",
            "EVENT_QUEUE_DEPTH=5000",
            "CONT_WHEN_CACHE_NOT_READY=true",
        ],
        &[
            "--kube-api-url",
            &url,
            "--kubeconfig-file=",
            "--set-node-network-unavailable=false",
            "--kube-annotation-prefix",
            "org.com/x",
        ],
    );
    eventually("annotations with a prefix of their own", || {
        (api.node("n1")["metadata"]["annotations"]["org.com/x-backend-type"] == "vxlan")
            .then_some(())
    });
    assert_eq!(node.state().node, "n1");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(
        api.node("n1")["status"],
        json!({}),
        "the condition is left alone"
    );
    drop(process);
}

/// A node as a kubelet reports it, mostly images: about 10 KiB.
fn report(api: &Api, name: &str) {
    let image = |n: u8| json!({"names": [format!("registry.example.com/some/image-{n}@sha256:{}", "0".repeat(64))], "sizeBytes": 12_345_678});
    api.change(name, |node| {
        node["status"]["images"] = (0..50).map(image).collect();
    });
}

#[test]
fn mock_only_five_thousand_nodes_are_little() {
    const NODES: u16 = 5000;
    const CHURN: u16 = 1000;
    // With what a debug build and another allocator take.
    const PEAK_KIB: u64 = 60 << 10;
    const GROWTH_KIB: u64 = 8 << 10;
    let program = Program::new(Cluster::mock_only);
    let (node, api) = (&program.node, program.cluster.mock().unwrap());
    node.write_conf(r#"{"Network":"10.64.0.0/10","Backend":{"Type":"vxlan"}}"#);
    api.create("n1", &["10.127.1.0/24"], &json!({}));
    let data = |round: u8, i: u16| {
        let [a, b] = i.to_be_bytes();
        format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:{round:02x}:{a:02x}:{b:02x}"}}"#)
    };
    for i in 0..NODES {
        let annotations = json!({
            "flannel.alpha.coreos.com/backend-data": data(0, i),
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": format!("172.16.{}.{}", i / 250, i % 250),
        });
        let name = format!("node-{i}");
        let cidr = format!("10.{}.{}.0/24", 64 + i / 256, i % 256);
        api.create(&name, &[&cidr], &annotations);
        report(api, &name);
    }
    // A server that answers from its cache sends all at once.
    api.habits(|habits| habits.no_pages = true);
    let entries = |round: u8| {
        let output = node
            .namespace
            .try_command("bridge", "fdb show dev flannel.1");
        let text = String::from_utf8(output.stdout).unwrap();
        text.matches(&format!("02:00:00:{round:02x}:")).count()
    };
    let start = std::time::Instant::now();
    let process = program.start();
    eventually("published", || {
        (node.fib()?.1.len() == usize::from(NODES) + 1).then_some(())
    });
    let published = start.elapsed();
    eventually("the standby is complete", || {
        // Five thousand lines each time.
        std::thread::sleep(Duration::from_millis(200));
        (entries(0) == usize::from(NODES)).then_some(())
    });
    let routes = node.namespace.ip("-o route show dev flannel.1");
    assert_eq!(routes.lines().count(), usize::from(NODES));
    println!(
        "{NODES} nodes: {published:?} from start to publication, {:?} to the whole standby, peak RSS {} KiB",
        start.elapsed(),
        memory_kib(&process, "VmHWM:")
    );
    let mut resident = Vec::new();
    for round in 1..=3 {
        let start = std::time::Instant::now();
        for i in 0..CHURN {
            api.annotate(&format!("node-{i}"), "backend-data", &data(round, i));
            if i == CHURN / 2 {
                match round {
                    // The watch goes on where it was, or all nodes are listed anew, page by page.
                    1 => api.cut(),
                    _ => {
                        api.habits(|habits| habits.no_pages = false);
                        api.expire();
                    }
                }
            }
        }
        eventually("the churn has arrived", || {
            std::thread::sleep(Duration::from_millis(100));
            (entries(round) == usize::from(CHURN)).then_some(())
        });
        resident.push(memory_kib(&process, "VmRSS:"));
        println!(
            "{CHURN} nodes changed: {:?}, RSS {} KiB",
            start.elapsed(),
            resident[resident.len() - 1]
        );
    }
    assert_eq!(
        entries(0) + entries(3),
        usize::from(NODES),
        "nothing is lost, nothing is left"
    );
    let peak = memory_kib(&process, "VmHWM:");
    assert!(peak < PEAK_KIB, "{peak} KiB for {NODES} nodes");
    let grown = resident[2].saturating_sub(resident[0]);
    assert!(grown < GROWTH_KIB, "churn costs memory: {resident:?} KiB");
}
