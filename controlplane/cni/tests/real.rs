//! The plugin with Debian's bridge, host-local and portmap, called in a runtime's order: as root, for real.
//!
//! ```text
//!        node (a network namespace): cni0 10.244.1.1/24, fd10:244:0:1::1/64
//!         ┌──────┴──────┐
//!     pod 10.244.1.2   pod 10.244.1.3          everything that is kept on disk is in a directory of the test
//! ```

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use common::{Answer, FLANNEL, Runtime};
use ripstop_cni::SubnetEnv;
use serde_json::{Value, json};
use tempfile::TempDir;

const PLUGINS: &str = "/usr/lib/cni";
const FLANNEL_SAVED: &str = r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"n1/cni/networks","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace, removed with everything in it on drop.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new() -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let namespace = Self {
            name: format!("rcni-{}-{number}", std::process::id()),
        };
        let output = Command::new("ip")
            .args(["netns", "add", &namespace.name])
            .output();
        let output = output.expect("these tests need root and the Debian package iproute2");
        assert!(output.status.success(), "needs root: {output:?}");
        namespace.ip("link set lo up");
        namespace
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Whether a command succeeds inside, and what it prints.
    fn run(&self, command: &str) -> (bool, String) {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name])
            .args(command.split_whitespace())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (
            output.status.success(),
            text + &String::from_utf8_lossy(&output.stderr),
        )
    }

    #[track_caller]
    fn ip(&self, arguments: &str) -> String {
        let (success, text) = self.run(&format!("ip {arguments}"));
        assert!(success, "ip {arguments}: {text}");
        text
    }

    /// One packet there and back; a new address or neighbour may take a moment.
    #[track_caller]
    fn reaches(&self, address: &str) {
        let start = Instant::now();
        loop {
            let (success, text) = self.run(&format!("ping -n -c 1 -W 1 {address}"));
            if success {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{address}: {text}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

struct Node {
    namespace: Namespace,
    dir: TempDir,
    runtime: Runtime,
    version: &'static str,
}

impl Node {
    fn new(version: &'static str) -> Self {
        for plugin in ["bridge", "host-local", "portmap"] {
            let program = Path::new(PLUGINS).join(plugin);
            assert!(
                program.exists(),
                "{program:?} is missing: install the Debian package containernetworking-plugins (make setup does)"
            );
        }
        let (namespace, dir) = (Namespace::new(), TempDir::new().unwrap());
        let runtime = Runtime {
            plugins: PLUGINS.to_owned(),
            dir: dir.path().to_owned(),
            namespace: Some(namespace.name.clone()),
        };
        Self {
            namespace,
            dir,
            runtime,
            version,
        }
    }

    fn subnet_env(&self, lines: &str) {
        let text = format!("{lines}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n");
        let env = SubnetEnv::parse(&text).unwrap();
        env.write(&self.dir.path().join("run/subnet.env")).unwrap();
    }

    fn v4(self) -> Self {
        self.subnet_env("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24");
        self
    }

    fn dual_stack(self) -> Self {
        self.subnet_env(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
             FLANNEL_IPV6_NETWORK=fd10:244::/48\nFLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64",
        );
        self
    }

    /// The flannel part of the shipped conflist; only directories are the test's own.
    fn conf(&self, changes: Value) -> String {
        let mut conf = json!({
            "cniVersion": self.version, "name": "cbr0", "type": "flannel",
            "delegate": {"hairpinMode": true, "isDefaultGateway": true},
            "ipam": {"dataDir": "n1/cni/networks"},
            "subnetFile": self.dir.path().join("run/subnet.env"), "dataDir": self.saved(),
        });
        let Value::Object(changes) = changes else {
            unreachable!("a change is an object");
        };
        conf.as_object_mut().unwrap().extend(changes);
        conf.to_string()
    }

    fn flannel(&self, command: &str, id: &str, netns: &str, changes: Value) -> Answer {
        let attachment = [id, "eth0", netns];
        self.runtime
            .attachment(FLANNEL.as_ref(), command, attachment, &self.conf(changes))
    }

    /// The second plugin of the shipped conflist.
    fn portmap(&self, command: &str, id: &str, netns: &str, prev_result: &Value) -> Answer {
        let conf = json!({
            "cniVersion": self.version, "name": "cbr0", "type": "portmap", "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
            "prevResult": prev_result,
        });
        let program = Path::new(PLUGINS).join("portmap");
        self.runtime
            .attachment(&program, command, [id, "eth0", netns], &conf.to_string())
    }

    #[track_caller]
    fn add(&self, id: &str, pod: &Namespace) -> Value {
        let answer = self.flannel("ADD", id, &pod.path(), json!({})).ok();
        serde_json::from_str(&answer).unwrap()
    }

    fn saved(&self) -> PathBuf {
        self.dir.path().join("n1/cni/flannel")
    }

    /// The addresses that host-local has given out, with the attachment.
    fn given_out(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("n1/cni/networks/cbr0")) else {
            return Vec::new();
        };
        let entries = entries.map(Result::unwrap);
        let mut addresses: Vec<String> = entries
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
            .filter(|(name, _)| name.contains(['.', ':']) && !name.starts_with("last_reserved"))
            .map(|(name, path)| {
                let owner = fs::read_to_string(path).unwrap();
                format!("{name} {}", owner.replace("\r\n", " "))
            })
            .collect();
        addresses.sort();
        addresses
    }

    fn saved_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.saved()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The node's ends of pods' interfaces.
    fn veths(&self) -> usize {
        self.namespace.ip("-o link show type veth").lines().count()
    }

    #[track_caller]
    fn is_as_before(&self) {
        assert_eq!(self.given_out(), Vec::<String>::new());
        assert_eq!(self.saved_names(), Vec::<String>::new());
        assert_eq!(self.veths(), 0);
    }
}

fn addresses(result: &Value) -> Vec<&str> {
    let ips = result["ips"].as_array().unwrap();
    ips.iter()
        .map(|ip| ip["address"].as_str().unwrap())
        .collect()
}

/// ADD, CHECK, DEL and DEL again of two pods, through both plugins of the conflist.
fn life_of_pods(node: &Node, gateways: &[&str], expected: [&[&str]; 2]) {
    let pods = [("one", Namespace::new()), ("two", Namespace::new())];
    let mut results = Vec::new();
    for ((id, pod), expected) in pods.iter().zip(expected) {
        let result = node.add(id, pod);
        assert_eq!(result["cniVersion"], node.version);
        assert_eq!(addresses(&result), expected);
        assert!(pod.ip("link show eth0").contains("mtu 1450"));
        let routes = pod.ip("route");
        assert!(
            routes.contains("default via 10.244.1.1 dev eth0"),
            "{routes}"
        );
        assert!(
            routes.contains("10.244.0.0/16 via 10.244.1.1 dev eth0"),
            "{routes}"
        );
        let chained = node.portmap("ADD", id, &pod.path(), &result).ok();
        let chained: Value = serde_json::from_str(&chained).unwrap();
        assert_eq!(
            addresses(&chained),
            expected,
            "what follows in the chain understands the result"
        );
        results.push(chained);
    }
    let bridge = node.namespace.ip("addr show cni0");
    for gateway in gateways {
        assert!(bridge.contains(gateway), "{bridge}");
    }
    assert_eq!(node.veths(), 2);
    for (_, pod) in &pods {
        for address in expected.concat().iter().chain(gateways) {
            pod.reaches(address.split('/').next().unwrap());
        }
    }
    let port_rules = || {
        let (success, rules) = node.namespace.run("iptables -w -t nat -S");
        assert!(success, "{rules}");
        rules.contains("10.244.1.2:80")
    };
    assert!(port_rules());

    let (id, pod) = &pods[0];
    let check = || node.flannel("CHECK", id, &pod.path(), json!({"prevResult": results[0]}));
    if node.version == "0.3.1" {
        assert_eq!(check().error().0, 1);
    } else {
        assert_eq!(check().ok(), "");
        let address = expected[0][0];
        pod.ip(&format!("addr del {address} dev eth0"));
        let (_, text) = check().error();
        assert!(
            text.contains("eth0") || text.contains("10.244.1.2"),
            "{text}"
        );
    }

    node.portmap("DEL", id, &pod.path(), &results[0]).ok();
    assert!(!port_rules());
    for _ in 0..2 {
        assert_eq!(node.flannel("DEL", id, &pod.path(), json!({})).ok(), "");
        assert!(!pod.ip("-o link").contains("eth0"));
        assert_eq!(node.saved_names(), ["two"]);
        assert_eq!(node.veths(), 1);
        assert_eq!(node.given_out().len(), expected[0].len());
    }
    // The other one's namespace is gone before DEL, as after a crash.
    let (id, pod) = &pods[1];
    let path = pod.path();
    node.portmap("DEL", id, "", &results[1]).ok();
    pod.ip("link del eth0");
    let [_, (_, pod)] = pods;
    drop(pod);
    assert_eq!(node.flannel("DEL", "two", &path, json!({})).ok(), "");
    node.is_as_before();
}

#[test]
fn pods_live_and_die_by_the_shipped_conflist() {
    let addresses: [&[&str]; 2] = [&["10.244.1.2/24"], &["10.244.1.3/24"]];
    for version in ["0.3.1", "0.4.0"] {
        life_of_pods(&Node::new(version).v4(), &["10.244.1.1"], addresses);
    }
}

#[test]
fn pods_live_and_die_with_both_families() {
    let addresses: [&[&str]; 2] = [
        &["10.244.1.2/24", "fd10:244:0:1::2/64"],
        &["10.244.1.3/24", "fd10:244:0:1::3/64"],
    ];
    for version in ["0.3.1", "1.0.0"] {
        let node = Node::new(version).dual_stack();
        life_of_pods(&node, &["10.244.1.1", "fd10:244:0:1::1"], addresses);
    }
}

/// flannel's plugin hands the bridge what it saves; the bridge is called with that here, once in its place and once ours.
#[test]
fn pods_of_flannels_plugin_are_deleted_by_ours_and_the_other_way_round() {
    let node = Node::new("0.3.1").v4();
    let bridge = Path::new(PLUGINS).join("bridge");
    let pod = Namespace::new();
    let attachment = ["theirs", "eth0", &pod.path()];
    node.runtime
        .attachment(&bridge, "ADD", attachment, FLANNEL_SAVED)
        .ok();
    fs::create_dir_all(node.saved()).unwrap();
    fs::write(node.saved().join("theirs"), FLANNEL_SAVED).unwrap();
    assert_eq!(node.given_out(), ["10.244.1.2 theirs eth0"]);
    assert_eq!(
        node.flannel("DEL", "theirs", &pod.path(), json!({})).ok(),
        ""
    );
    node.is_as_before();

    node.add("ours", &pod);
    let file = node.saved().join("ours");
    assert_eq!(fs::read_to_string(&file).unwrap(), FLANNEL_SAVED);
    assert_eq!(node.given_out(), ["10.244.1.3 ours eth0"]);
    let attachment = ["ours", "eth0", &pod.path()];
    node.runtime
        .attachment(&bridge, "DEL", attachment, FLANNEL_SAVED)
        .ok();
    fs::remove_file(file).unwrap();
    node.is_as_before();
}

/// An ADD that fails for want of an address leaves others alone, and its DEL leaves nothing.
#[test]
fn the_last_address_comes_back() {
    let node = Node::new("1.0.0");
    node.subnet_env("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/30");
    let (one, two) = (Namespace::new(), Namespace::new());
    assert_eq!(addresses(&node.add("one", &one)), ["10.244.1.2/30"]);
    let failed = node.flannel("ADD", "two", &two.path(), json!({}));
    let (_, text) = failed.error();
    assert!(text.contains("no IP addresses available"), "{text}");
    assert_eq!(node.flannel("DEL", "two", &two.path(), json!({})).ok(), "");
    assert_eq!(node.saved_names(), ["one"]);
    one.reaches("10.244.1.1");
    node.flannel("DEL", "one", &one.path(), json!({})).ok();
    assert_eq!(addresses(&node.add("two", &two)), ["10.244.1.2/30"]);
    two.reaches("10.244.1.1");
    node.flannel("DEL", "two", &two.path(), json!({})).ok();
    node.is_as_before();
}

#[test]
fn gc_gives_back_what_was_never_deleted() {
    let node = Node::new("1.0.0").dual_stack();
    let (kept, lost) = (Namespace::new(), Namespace::new());
    node.add("kept", &kept);
    node.add("lost", &lost);
    assert_eq!(node.given_out().len(), 4);
    lost.ip("link del eth0");
    drop(lost);
    let valid = json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]});
    let gc = || {
        let variables = [("CNI_COMMAND", "GC")];
        node.runtime
            .call(FLANNEL.as_ref(), &variables, &node.conf(valid.clone()))
    };
    assert_eq!(gc().ok(), "");
    assert_eq!(
        node.given_out(),
        ["10.244.1.2 kept eth0", "fd10:244:0:1::2 kept eth0"]
    );
    assert_eq!(node.saved_names(), ["kept"]);
    kept.reaches("fd10:244:0:1::1");
    assert_eq!(gc().ok(), "");
    node.flannel("DEL", "kept", &kept.path(), json!({})).ok();
    node.is_as_before();
}

/// A node is ready when there is a `subnet.env` and plugins that speak the configuration's version.
#[test]
fn status_is_that_of_the_node() {
    let node = Node::new("1.1.0");
    let status = || {
        let variables = [("CNI_COMMAND", "STATUS")];
        node.runtime
            .call(FLANNEL.as_ref(), &variables, &node.conf(json!({})))
    };
    let (code, text) = status().error();
    assert_eq!(code, 50, "{text}");
    assert!(
        text.contains("run/subnet.env: no such file or directory"),
        "{text}"
    );
    node.subnet_env("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24");

    // What ADD does is the measure, whichever version of the plugins this Debian has.
    let (pod, answer) = (Namespace::new(), status());
    let added = node.flannel("ADD", "one", &pod.path(), json!({}));
    println!("STATUS {}, ADD {}", answer.code, added.code);
    assert_eq!(answer.code == 0, added.code == 0, "{answer:?} {added:?}");
    if answer.code != 0 {
        let (code, text) = answer.error();
        assert_eq!(code, 50, "{text}");
        assert!(
            text.starts_with("bridge does not speak CNI 1.1.0;"),
            "{text}"
        );
    }
    node.flannel("DEL", "one", &pod.path(), json!({}));
}
