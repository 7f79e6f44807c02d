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
    /// The far end of its cable.
    _outside: Namespace,
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
            _outside: outside,
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

/// Waits until a node has flannel's annotations as wanted, other than those named.
fn wait_annotations(api: &Api, wanted: &Value) {
    let found = || api.node("n1")["metadata"]["annotations"].clone();
    eventually(&format!("annotations {wanted}"), || {
        (found() == *wanted).then_some(())
    });
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
        rig.api.create(
            "n1",
            &["fd00:10:244:1::/64", "10.244.1.0/24"],
            &json!({"other": "kept"}),
        );
        let source = rig.start(Rig::settings(&text));
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
        wait_annotations(&rig.api, &wanted);
        assert_eq!(rig.api.requests("PATCH").len(), 1, "{text}");
    }
}

#[test]
fn families_are_apart() {
    let rig = Rig::new();
    rig.api
        .create("n1", &["10.244.1.0/24", "fd00:10:244:1::/64"], &json!({}));
    rig.api
        .create("n2", &["10.244.2.0/24", "fd00:10:244:2::/64"], &member(2));
    rig.api
        .create("n3", &["fd00:10:244:3::/64", "10.244.3.0/24"], &member(3));
    rig.api.annotate("n3", "public-ipv6", "fd00:199::3");
    rig.api.annotate(
        "n3",
        "backend-v6-data",
        r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:02"}"#,
    );
    // One half that is wrong leaves the other.
    rig.api
        .create("n4", &["10.244.4.0/24", "fd00:10:244:4::/64"], &member(4));
    rig.api.annotate("n4", "public-ipv6", "fe80::4");
    let source = rig.start(Rig::settings(&common::dual(r#"{"Type":"vxlan"}"#)));
    let (n2, n3, n4) = (peer(2), peer(3), peer(4));
    let n3v6 = "n3 fd00:10:244:3::/64 fd00:199::3 02:52:53:00:00:02";
    source.peers(&[&n2, &n3, &n4, n3v6]);
    // Flannel sees a change only if it concerns both families.
    rig.api.annotate("n3", "public-ipv6", "fd00:199::33");
    source.peers(&[
        &n2,
        &n3,
        &n4,
        "n3 fd00:10:244:3::/64 fd00:199::33 02:52:53:00:00:02",
    ]);
    rig.api.annotate("n3", "public-ip", "10.199.0.33");
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
    let source = rig.start(Rig::settings(VXLAN));
    assert!(source.problem().contains("node \"n1\" not found"));
    rig.api.create("n1", &[], &json!({}));
    assert!(
        source
            .problem()
            .contains("node \"n1\" pod cidr not assigned")
    );
    let assign = |cidrs: &[&str]| {
        rig.api.change("n1", |node| {
            node["spec"] = json!({"podCIDR": cidrs[0], "podCIDRs": cidrs});
        });
    };
    assign(&["10.245.1.0/24"]);
    assert!(source.problem().contains(
        r#"subnet "10.244.0.0/16" specified in the flannel net config doesn't contain "10.245.1.0/24" PodCIDR of the "n1" node"#
    ));
    assert!(
        rig.api.requests("PATCH").is_empty(),
        "nothing is written for a node that cannot take part"
    );
    assign(&["fd00::/64", "10.244.1.0/24", "10.244.2.0/24"]);
    assert!(
        source
            .problem()
            .contains("node \"n1\" pod cidrs should be IPv4/IPv6 only or dualstack")
    );
    assign(&["fd00::/64"]);
    assert!(source.problem().contains("node \"n1\" has no PodCIDR"));
    assign(&["10.244.1.0/24"]);
    let own = |set: &LeaseSet| set.own(Family::V4).unwrap().subnet.to_string();
    assert_eq!(own(&source.set()), "10.244.1.0/24");
    assign(&["10.244.9.0/24"]);
    assert_eq!(own(&source.set()), "10.244.9.0/24");
    // Taken away: the last set stays, and the problem is said.
    rig.api.delete("n1");
    assert!(source.problem().contains("not found"));
    rig.api.create("n1", &["10.244.9.0/24"], &json!({}));
    source.recovered();
    eventually("a node made anew has annotations anew", || {
        rig.api.node("n1")["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
            .is_string()
            .then_some(())
    });
    // An older node has it already.
    rig.api.create("n2", &["10.244.9.0/25"], &member(2));
    rig.api.change("n2", |node| {
        node["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z".into();
    });
    assert!(
        source
            .problem()
            .contains("overlaps 10.244.9.0/25 of the older node \"n2\"")
    );
}

#[test]
fn the_mac_is_kept() {
    let mac = |set: &LeaseSet| set.own(Family::V4).unwrap().vtep_mac.unwrap().to_string();
    let stored = json!({"flannel.alpha.coreos.com/backend-data": r#"{ "VNI": 1, "VtepMAC": "02:11:22:33:44:55" }"#});
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &stored);
    let source = rig.start(Rig::settings(VXLAN));
    assert_eq!(mac(&source.set()), "02:11:22:33:44:55");
    drop(source);
    rig.namespace
        .ip("link add flannel.1 address 02:66:77:88:99:aa type vxlan id 1 dev eth0 dstport 8472");
    let source = rig.start(Rig::settings(VXLAN));
    assert_eq!(mac(&source.set()), "02:66:77:88:99:aa");
    let rig = Rig::new();
    rig.api.create(
        "n1",
        &["10.244.1.0/24"],
        &json!({"flannel.alpha.coreos.com/backend-data": "null"}),
    );
    let source = rig.start(Rig::settings(VXLAN));
    let set = source.set();
    let first = set.own(Family::V4).unwrap().vtep_mac.unwrap();
    assert_eq!(
        first.0[0] & 3,
        2,
        "{first} is one station's, and locally administered"
    );
    // An older node comes with the same one: the younger takes another.
    rig.api.create("n2", &["10.244.2.0/24"], &member(2));
    rig.api.annotate(
        "n2",
        "backend-data",
        &format!(r#"{{"VNI":1,"VtepMAC":"{first}"}}"#),
    );
    rig.api.change("n2", |node| {
        node["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z".into();
    });
    let set = source.peers(&[&format!("n2 10.244.2.0/24 10.199.0.2 {first}")]);
    let other = set.own(Family::V4).unwrap().vtep_mac.unwrap();
    assert_ne!(first, other);
    eventually("the annotation follows", || {
        let data =
            rig.api.node("n1")["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"]
                .clone();
        data.as_str()?.contains(&other.to_string()).then_some(())
    });
}

#[test]
fn public_ips_are_followed_live() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    let source = rig.start(Rig::settings(VXLAN));
    let own = |set: &LeaseSet| set.own(Family::V4).unwrap().public_ip.to_string();
    assert_eq!(own(&source.set()), "10.199.0.1");
    let wait = |text: &str| {
        eventually(&format!("public-ip {text}"), || {
            (rig.api.node("n1")["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
                == text)
                .then_some(())
        });
    };
    wait("10.199.0.1");
    rig.api.annotate("n1", "public-ip-overwrite", "192.0.2.7");
    wait("192.0.2.7");
    // What is no address is not passed on.
    rig.api.annotate("n1", "public-ip-overwrite", "192.0.2");
    wait("10.199.0.1");
    rig.api.annotate("n1", "public-ip-overwrite", "");
    // Someone else's hand.
    rig.api.annotate("n1", "public-ip", "10.199.0.99");
    wait("10.199.0.1");
    rig.namespace.ip("addr add 10.199.0.111/24 dev eth0");
    rig.api.annotate("n1", "node-public-ip", "10.199.0.111");
    assert_eq!(own(&source.set()), "10.199.0.111");
    wait("10.199.0.111");
    rig.api.annotate("n1", "node-public-ip", "10.199.0.222");
    assert!(source.problem().contains("10.199.0.222"));
    rig.api.annotate("n1", "node-public-ip", "");
    assert_eq!(own(&source.set()), "10.199.0.1");
    // The address changes under it.
    rig.namespace.ip("addr del 10.199.0.1/24 dev eth0");
    rig.namespace.ip("addr replace 10.199.0.111/24 dev eth0");
    rig.namespace.ip("route replace default via 10.199.0.254");
    assert_eq!(own(&source.set()), "10.199.0.111");
    wait("10.199.0.111");
}

#[test]
fn what_others_write_is_put_right_and_refusals_are_tried_again() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.api
        .habits(|habits| habits.refusals = vec![("PATCH", 500, 2), ("PATCH", 429, 1)]);
    let source = rig.start(Rig::settings(VXLAN));
    source.set();
    let problem = source.problem();
    assert!(
        problem.contains("own annotations: patch nodes/status: the API server answers 500"),
        "{problem}"
    );
    source.recovered();
    eventually("the patch", || {
        (rig.api.requests("PATCH").len() == 4).then_some(())
    });
    source.ready.store(true, Ordering::Relaxed);
    let condition = || rig.api.node("n1")["status"]["conditions"][0]["status"].clone();
    eventually("the condition", || (condition() == "False").then_some(()));
    // A cloud provider says otherwise; other conditions are left alone.
    rig.api.change("n1", |node| {
        node["status"]["conditions"] = json!([
            {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}, {"type": "Ready", "status": "True"}]);
    });
    eventually("the condition again", || {
        (condition() == "False").then_some(())
    });
    assert_eq!(
        rig.api.node("n1")["status"]["conditions"][1],
        json!({"type": "Ready", "status": "True"})
    );
    rig.api.change("n1", |node| {
        node["metadata"]["annotations"] = json!({"kept": "x"});
    });
    eventually("all annotations", || {
        (rig.api.node("n1")["metadata"]["annotations"]
            .as_object()?
            .len()
            == 5)
            .then_some(())
    });
    rig.api
        .habits(|habits| habits.refusals = vec![("PATCH", 403, 1000)]);
    rig.api.annotate("n1", "backend-type", "host-gw");
    let problem = source.problem();
    assert!(problem.contains("patch of nodes/status"), "{problem}");
}

#[test]
fn peers_are_followed_and_bad_ones_disturb_nobody() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.api.create("n2", &["10.244.2.0/24"], &member(2));
    let source = rig.start(Rig::settings(VXLAN));
    let n2 = peer(2);
    source.peers(&[&n2]);
    rig.api.create("n3", &["10.244.3.0/24"], &member(3));
    source.peers(&[&n2, &peer(3)]);
    // Every change of what a lease is made of, the pod CIDR alone included.
    rig.api.change("n3", |node| {
        node["spec"] = json!({"podCIDR": "10.244.33.0/24"});
    });
    source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:03"]);
    rig.api.annotate(
        "n3",
        "backend-data",
        r#"{"VNI":7,"VtepMAC":"02:52:53:00:00:33"}"#,
    );
    source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:33"]);
    for (key, bad, good) in [
        ("kube-subnet-manager", "True", "true"),
        ("backend-type", "host-gw", "vxlan"),
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
        rig.api.annotate("n3", key, bad);
        source.peers(&[&n2]);
        rig.api.annotate("n3", key, good);
        source.peers(&[&n2, "n3 10.244.33.0/24 10.199.0.3 02:52:53:00:00:33"]);
    }
    for bad in ["10.245.3.0/24", "x", "10.244.3.0/31"] {
        rig.api
            .change("n3", |node| node["spec"] = json!({"podCIDR": bad}));
        source.peers(&[&n2]);
        rig.api.change("n3", |node| {
            node["spec"] = json!({"podCIDR": "10.244.3.0/24"});
        });
        source.peers(&[&n2, "n3 10.244.3.0/24 10.199.0.3 02:52:53:00:00:33"]);
    }
    // The older keeps what two claim, and the younger is there when it is free.
    rig.api.create("n4", &["10.244.2.128/25"], &member(4));
    rig.api.create("n5", &["10.244.5.0/24"], &member(3));
    rig.api.annotate(
        "n5",
        "backend-data",
        r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:33"}"#,
    );
    rig.api.create("n6", &["10.244.6.0/24"], &member(6));
    source.peers(&[
        &n2,
        "n3 10.244.3.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    rig.api.delete("n3");
    source.peers(&[
        &n2,
        "n5 10.244.5.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    rig.api.delete("n2");
    source.peers(&[
        "n4 10.244.2.128/25 10.199.0.4 02:52:53:00:00:04",
        "n5 10.244.5.0/24 10.199.0.3 02:52:53:00:00:33",
        &peer(6),
    ]);
    source.assert_quiet();
}

#[test]
fn watches_that_fail_lose_nothing() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.api
        .habits(|habits| habits.refusals = vec![("LIST", 503, 1), ("WATCH", 429, 1)]);
    let mut settings = Rig::settings(VXLAN);
    settings.silent = Duration::from_secs(1);
    let source = rig.start(settings);
    source.peers(&[]);
    let mut members: Vec<String> = Vec::new();
    let mut n = 1;
    let mut join = |source: &Source| {
        n += 1;
        rig.api
            .create(&format!("n{n}"), &[&format!("10.244.{n}.0/24")], &member(n));
        members.push(peer(n));
        let _ = source;
        members.clone()
    };
    let sees = |source: &Source, members: &[String]| {
        source.peers(&members.iter().map(String::as_str).collect::<Vec<_>>());
    };
    let members = join(&source);
    sees(&source, &members);
    rig.api.cut();
    let members = join(&source);
    sees(&source, &members);
    // Expired while it lags behind.
    rig.api.habits(|habits| habits.held = true);
    join(&source);
    let members = join(&source);
    rig.api.expire();
    rig.api.habits(|habits| habits.held = false);
    sees(&source, &members);
    let lists = rig.api.requests("LIST");
    let relist = lists.last().unwrap();
    assert!(
        relist.query("resourceVersionMatch") == Some("NotOlderThan")
            && relist.query("limit") == Some("500"),
        "{relist:?}"
    );
    // Late and in another order.
    rig.api
        .habits(|habits| (habits.held, habits.reversed) = (true, true));
    join(&source);
    let members = join(&source);
    rig.api.habits(|habits| habits.held = false);
    sees(&source, &members);
    rig.api.habits(|habits| habits.reversed = false);
    // Silent watches are renewed, and bookmarks are where they go on.
    let watches = rig.api.requests("WATCH").len();
    eventually("a new list and watch", || {
        (rig.api.requests("WATCH").len() > watches).then_some(())
    });
    rig.api
        .habits(|habits| habits.bookmarks = Some(Duration::from_millis(100)));
    rig.api.expire();
    let members = join(&source);
    sees(&source, &members);
    source.assert_quiet();
}

#[test]
fn an_api_server_that_goes_and_comes_back() {
    let rig = Rig::new();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.api.create("n2", &["10.244.2.0/24"], &member(2));
    let source = rig.start(Rig::settings(VXLAN));
    source.peers(&[&peer(2)]);
    eventually("the patch", || {
        let annotations = &rig.api.node("n1")["metadata"]["annotations"];
        annotations["flannel.alpha.coreos.com/public-ip"]
            .is_string()
            .then_some(())
    });
    rig.api.habits(|habits| habits.down = true);
    rig.api.cut();
    let problem = source.problem();
    assert!(problem.contains("nodes:"), "{problem}");
    std::thread::sleep(Duration::from_secs(4));
    source.assert_quiet();
    // With another data base behind it.
    rig.api.reset();
    rig.api.create("n1", &["10.244.1.0/24"], &json!({}));
    rig.api.create("n3", &["10.244.3.0/24"], &member(3));
    let start = std::time::Instant::now();
    rig.api.habits(|habits| habits.down = false);
    source.peers(&[&peer(3)]);
    println!("API server back: {:?} to the new set", start.elapsed());
    eventually("our annotations are there too", || {
        (rig.api.requests("PATCH").len() >= 2).then_some(())
    });
}

/// The program itself, with an API service in its namespace.
fn program(count: u16, fat: bool) -> (common::node::Node, Api, String) {
    let node = common::node::Node::new(1);
    node.namespace.ip("route add default via 10.199.0.2");
    let api = Api::serve(
        node.namespace
            .enter(|| TcpListener::bind("127.0.0.1:0").unwrap()),
    );
    let path = node.directory.path().join("kubeconfig");
    std::fs::write(&path, api.kubeconfig()).unwrap();
    api.create("n1", &["10.244.1.0/24"], &json!({}));
    for i in 0..count {
        let (a, b) = (i / 250, i % 250);
        let annotations = json!({
            "flannel.alpha.coreos.com/backend-data": "null",
            "flannel.alpha.coreos.com/backend-type": "",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": format!("172.16.{a}.{b}"),
        });
        let name = format!("node-{i}");
        api.create(
            &name,
            &[&format!("10.{}.{}.0/24", 64 + i / 256, i % 256)],
            &annotations,
        );
        if fat {
            // What a kubelet reports, mostly images: about 10 KiB.
            let image = |n: u8| json!({"names": [format!("registry.example.com/some/image-{n}@sha256:{}", "0".repeat(64))], "sizeBytes": 12_345_678});
            api.change(&name, |node| {
                node["status"]["images"] = (0..50).map(image).collect();
            });
        }
    }
    (node, api, path.to_str().unwrap().to_owned())
}

fn rss_kib(process: &common::Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[test]
fn the_program_programs_the_kernel_and_says_so() {
    let (node, api, kubeconfig) = program(0, false);
    api.create("n2", &["10.244.2.0/24"], &member(2));
    let flags = ["--kube-subnet-mgr", "--kubeconfig-file", &kubeconfig];
    let process = node.start_through(&[common::node::CONTROLPLANE], &flags);
    node.wait_resolved(&["n2"]);
    node.wait_ip("route", |routes| {
        routes.contains("10.244.2.0/24 via 10.244.2.0 dev flannel.1")
    });
    eventually("the condition", || {
        (api.node("n1")["status"]["conditions"][0]["reason"] == "FlannelIsUp").then_some(())
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
    let data =
        api.node("n1")["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"].clone();
    let device = node.namespace.ip("link show flannel.1");
    let mac = data
        .as_str()
        .unwrap()
        .split(":\"")
        .nth(1)
        .unwrap()
        .trim_end_matches("\"}")
        .to_owned();
    assert!(device.contains(&mac), "{data} {device}");
    // The API server is killed: what others delete is put back all the same.
    api.habits(|habits| habits.down = true);
    api.cut();
    eventually("the problem is said", || {
        node.state()
            .problems
            .iter()
            .any(|problem| problem.contains("; the leases before stay in force"))
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
fn bad_flags_and_variables_say_why() {
    let (node, api, kubeconfig) = program(0, false);
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

#[test]
fn five_thousand_nodes_are_little() {
    const NODES: u16 = 5000;
    let mut measured = Vec::new();
    for (count, no_pages) in [(0, false), (NODES, false), (NODES, true)] {
        let (node, api, kubeconfig) = program(count, true);
        node.write_conf(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"alloc"}}"#);
        api.habits(|habits| habits.no_pages = no_pages);
        let flags = ["--kube-subnet-mgr", "--kubeconfig-file", &kubeconfig];
        let start = std::time::Instant::now();
        let process = node.start_through(&[common::node::CONTROLPLANE], &flags);
        // With alloc the kernel is left alone, so what there is more is the source's, and the table's.
        let wanted = usize::from(count) + 1;
        eventually("published", || {
            (node.fib()?.1.len() == wanted).then_some(())
        });
        let took = start.elapsed();
        eventually("annotated", || {
            (!api.requests("PATCH").is_empty()).then_some(())
        });
        let lists = api.requests("LIST").len();
        println!(
            "{count} nodes in {lists} lists: {took:?} from start to publication, peak RSS {} KiB",
            rss_kib(&process)
        );
        measured.push(rss_kib(&process));
    }
    let grown = measured.iter().max().unwrap() - measured[0];
    assert!(grown < 40 << 10, "{grown} KiB for {NODES} nodes");
}
