//! Pods as a container runtime makes them: `subnet.env` by the control plane, our plugin, Debian's bridge, host-local and
//! portmap; their packets by the workers. As root, for real.
//!
//! ```text
//!   runtime ── ADD, CHECK, DEL, GC, STATUS ──► flannel ──► bridge ──► host-local
//!                                                 │           └──► portmap
//!   n1p0, n1p1 ─ cni0 ─ n1 ═══ fabric ═══ n2 ─ cni0 ─ n2p0, n2p1
//!                        └── subnet.env ◄── control plane ◄── API service
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[path = "common/kube.rs"]
mod kube;

use core::net::SocketAddr;
use core::time::Duration;
use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;

use anyhow::{Context as _, Result, bail, ensure};
use kube::api::Api;
use ripstop_perf::{Host, Lab, Node, Ping, Pod, TrafficGroup, UdpFlow, run, wait_until};
use serde_json::{Value, json};

/// How long a wait may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where Debian's containernetworking-plugins are.
const PLUGINS: &str = "/usr/lib/cni";
/// The conflist of flannel's ConfigMap; the versions are those of flannel's and of a newer one.
const VERSIONS: [&str; 2] = ["0.3.1", "1.0.0"];

/// What a plugin answered.
#[derive(Debug)]
struct Answer {
    code: i32,
    stdout: String,
}

impl Answer {
    fn ok(self) -> Result<Value> {
        ensure!(self.code == 0, "{self:?}");
        if self.stdout.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&self.stdout).with_context(|| self.stdout.clone())
    }

    /// Code and text of an error.
    fn error(&self) -> Result<(u64, String)> {
        ensure!(self.code != 0, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).context("a CNI error")?;
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        let code = error["code"].as_u64().context("code")?;
        Ok((code, format!("{}; {}", text("msg"), text("details"))))
    }
}

/// A runtime on a node, with the conflist that flannel ships. Its directories are the test's.
struct Runtime<'a> {
    node: &'a Node,
    version: &'static str,
}

impl Runtime<'_> {
    fn dir(&self) -> PathBuf {
        self.node.dir().join("cni")
    }

    fn saved(&self) -> PathBuf {
        self.dir().join("flannel")
    }

    fn subnet_file(&self) -> PathBuf {
        self.node.net_conf_file().with_file_name("subnet.env")
    }

    fn network(&self) -> Value {
        json!({"name": "cbr0", "cniVersion": self.version, "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true},
             "subnetFile": self.subnet_file(), "dataDir": self.saved(),
             "ipam": {"dataDir": self.dir().join("networks")}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]})
    }

    /// The configuration of one plugin of the list, as a runtime makes it.
    fn conf(&self, plugin: &Value, previous: &Value, ports: &Value) -> Value {
        let mut conf = plugin.clone();
        conf["name"] = "cbr0".into();
        conf["cniVersion"] = self.version.into();
        if !previous.is_null() {
            conf["prevResult"] = previous.clone();
        }
        if conf["capabilities"]["portMappings"] == true {
            conf["runtimeConfig"] = json!({"portMappings": ports});
        }
        conf
    }

    /// Calls a plugin. Where it is, `CNI_PATH` says.
    fn call(
        &self,
        plugin: &str,
        command: &str,
        pod: Option<(&str, &Pod)>,
        conf: &Value,
    ) -> Result<Answer> {
        let ours = programs()?;
        let program = [&ours, Path::new(PLUGINS)].map(|dir| dir.join(plugin));
        let program = program.iter().find(|program| program.is_file());
        let program = program.with_context(|| {
            format!("no {plugin}: cargo build --workspace, and the Debian package containernetworking-plugins")
        })?;
        let mut command_line = self.node.netns().command(program);
        command_line.env("CNI_COMMAND", command);
        command_line.env("CNI_PATH", format!("{}:{PLUGINS}", ours.display()));
        if let Some((id, pod)) = pod {
            let netns = format!("/run/netns/{}", pod.netns().name());
            for (name, value) in [("CONTAINERID", id), ("IFNAME", "eth0"), ("NETNS", &netns)] {
                command_line.env(format!("CNI_{name}"), value);
            }
        }
        let mut child = command_line
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start the plugin")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        // It may answer without having read.
        let _unread = stdin.write_all(conf.to_string().as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("the plugin's answer")?;
        Ok(Answer {
            code: output.status.code().context("ended by a signal")?,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        })
    }

    fn plugins(&self) -> Vec<Value> {
        self.network()["plugins"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }

    /// Adds a pod by the whole list; the last result.
    fn add(&self, id: &str, pod: &Pod, ports: &Value) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in self.plugins() {
            let conf = self.conf(&plugin, &result, ports);
            let name = plugin["type"].as_str().context("type")?;
            let answer = self.call(name, "ADD", Some((id, pod)), &conf)?;
            result = answer.ok().with_context(|| format!("{name} ADD {id}"))?;
        }
        Ok(result)
    }

    /// Checks it, and deletes it in the other order.
    fn each(&self, command: &str, id: &str, pod: &Pod, result: &Value) -> Result<()> {
        let mut plugins = self.plugins();
        if command == "DEL" {
            plugins.reverse();
        }
        for plugin in plugins {
            let conf = self.conf(&plugin, result, &json!([]));
            let name = plugin["type"].as_str().context("type")?;
            let answer = self.call(name, command, Some((id, pod)), &conf)?;
            answer
                .ok()
                .with_context(|| format!("{name} {command} {id}"))?;
        }
        Ok(())
    }

    /// A command that is of no pod; those came with version 1.1.0.
    fn of_the_network(&self, command: &str, changes: &Value) -> Result<Answer> {
        let plugins = self.plugins();
        let mut conf = self.conf(
            plugins.first().context("flannel")?,
            &Value::Null,
            &json!([]),
        );
        conf["cniVersion"] = "1.1.0".into();
        for (key, value) in changes.as_object().context("changes")? {
            conf[key] = value.clone();
        }
        self.call("flannel", command, None, &conf)
    }

    /// Names of files in one of the runtime's directories, those of pods alone.
    fn files(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.dir().join(dir)).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let pods = names.filter(|name| name != "lock" && !name.starts_with("last_reserved"));
        let mut names: Vec<String> = pods.collect();
        names.sort();
        names
    }

    /// Nothing is left of any pod.
    fn is_empty(&self) -> Result<()> {
        assert_eq!(self.files("flannel"), Vec::<String>::new());
        assert_eq!(self.files("networks/cbr0"), Vec::<String>::new());
        let veths = self
            .node
            .output(&["ip", "-o", "link", "show", "type", "veth"])?;
        let pods = veths.lines().filter(|line| line.contains("master cni0"));
        assert_eq!(pods.count(), 0, "{veths}");
        Ok(())
    }

    /// What flannel's plugin keeps of a pod, as recorded.
    fn recorded(&self) -> Value {
        let networks = self.dir().join("networks");
        let subnet = self.node.lease().subnet;
        json!({"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":networks,
            "ranges":[[{"subnet":subnet}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},
            "isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"})
    }
}

/// Where our programs are: as the lab finds them.
fn programs() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("RIPSTOP_BIN_DIR") {
        return Ok(dir.into());
    }
    let this = env::current_exe().context("path of this program")?;
    let dir = this.ancestors().nth(2).context("target directory")?;
    Ok(dir.to_owned())
}

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| Some(ip["address"].as_str()?.split('/').next()?.to_owned()))
        .collect()
}

/// Two Ripstop nodes of a cluster, without pods: what the lab has made of them is taken away.
fn cluster(test: impl FnOnce(&Lab, &Api, [Runtime<'_>; 2]) -> Result<()>) -> Result<()> {
    Lab::builder().ripstop(2).pods(2).run(|lab| {
        let (api, _kubeconfig) = kube::serve(lab)?;
        for node in lab.nodes() {
            let subnet = node.lease().subnet.context("subnet")?;
            api.create(node.name(), &[&subnet], &json!({}));
            for pod in node.pods() {
                run(node, &format!("ip link del pod{}", pod.index()))?;
            }
            run(node, "ip link del cni0")?;
        }
        let [one, other] = [1, 2].map(|index| lab.node(index));
        let [old, new] = VERSIONS;
        let runtimes = [(one, old), (other, new)].map(|(node, version)| Runtime { node, version });
        test(lab, &api, runtimes)
    })
}

fn kubeconfig(lab: &Lab) -> PathBuf {
    lab.dir().join("kubeconfig")
}

fn start(lab: &Lab) -> Result<()> {
    let kubeconfig = kubeconfig(lab);
    let kubeconfig = kubeconfig.to_str().context("path")?;
    for node in lab.ripstop_nodes() {
        node.start_dataplane()?;
        node.start_controlplane_with(&[
            "--kube-subnet-mgr",
            "--kubeconfig-file",
            kubeconfig,
            "--ip-masq",
        ])?;
    }
    Ok(())
}

/// Sends some text from outside to a port of a node; the pod's answer.
fn through_a_host_port(lab: &Lab, pod: &Pod) -> Result<String> {
    let at = SocketAddr::new(pod.address().into(), 80);
    let listener = pod
        .netns()
        .run(|| TcpListener::bind(at))?
        .context("listen in the pod")?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut text = [0; 4];
        stream.read_exact(&mut text)?;
        stream.write_all(b"pong")
    });
    let node = SocketAddr::new(lab.node(pod.node()).address().into(), 8080);
    let answer = lab
        .attacker()
        .netns()
        .run(move || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&node, Duration::from_secs(10))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"ping")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
    match server.join() {
        Ok(served) => served.context("in the pod")?,
        Err(_panic) => bail!("the pod's server panicked"),
    }
    Ok(answer)
}

#[test]
fn pods_of_a_runtime_talk_by_the_workers() -> Result<()> {
    cluster(|lab, _api, runtimes| {
        let [one, other] = &runtimes;
        // A node that is not ready says so, and what to look at.
        let (code, text) = one.of_the_network("STATUS", &json!({}))?.error()?;
        println!("STATUS before: {code}: {text}");
        assert_eq!(code, 50, "{text}");
        for part in ["subnet.env", "kubectl"] {
            assert!(text.contains(part), "{text}");
        }
        let plugins = one.plugins();
        let conf = one.conf(
            plugins.first().context("flannel")?,
            &Value::Null,
            &json!([]),
        );
        let early = one.call("flannel", "ADD", Some(("early", lab.pod(1, 0))), &conf)?;
        let (_, text) = early.error()?;
        println!("ADD before: {text}");
        assert!(
            text.contains("subnet.env") && text.contains("kubectl"),
            "{text}"
        );
        one.is_empty()?;

        start(lab)?;
        for runtime in &runtimes {
            wait_until("subnet.env is there", PATIENCE, || {
                runtime.subnet_file().exists()
            })?;
            runtime.node.wait_for_detour(1)?;
        }
        let (index, subnet_env) = (one.node.index(), fs::read_to_string(one.subnet_file())?);
        let expected = format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{index}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(subnet_env, expected);
        // Debian's bridge may not speak 1.1.0, which is then the only thing that is wrong.
        let status = one.of_the_network("STATUS", &json!({}))?;
        if status.code != 0 {
            let (code, text) = status.error()?;
            println!("STATUS after: {code}: {text}");
            assert!(
                text.contains("does not speak CNI 1.1.0") && !text.contains("subnet.env"),
                "{text}"
            );
        }

        let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        let mut results = Vec::new();
        for runtime in &runtimes {
            let pod = runtime.node.pod(0);
            let ports = if runtime.node.index() == 1 {
                &ports
            } else {
                &json!([])
            };
            let result = runtime.add("ours", pod, ports)?;
            assert_eq!(result["cniVersion"], runtime.version);
            assert_eq!(addresses(&result), [pod.address().to_string()]);
            let saved = fs::read_to_string(runtime.saved().join("ours")).context("saved file")?;
            let mut recorded = runtime.recorded();
            recorded["cniVersion"] = runtime.version.into();
            assert_eq!(
                saved,
                recorded.to_string(),
                "byte for byte what flannel's plugin keeps"
            );
            results.push(result);
            // flannel's plugin does the same: it keeps this file, and calls the bridge with it.
            let (pod, recorded) = (runtime.node.pod(1), runtime.recorded());
            let theirs = runtime
                .call("bridge", "ADD", Some(("theirs", pod)), &recorded)?
                .ok()?;
            fs::write(runtime.saved().join("theirs"), recorded.to_string())
                .context("saved file")?;
            assert_eq!(addresses(&theirs), [pod.address().to_string()]);
        }
        let before: u64 = carried(lab)?;
        let flow = |from, to| UdpFlow::new(from, to).flows(2).rate(500).start();
        let mut flows = Vec::new();
        for (one, other) in [(0, 0), (1, 1), (0, 1)] {
            let (one, other) = (lab.pod(1, one), lab.pod(2, other));
            flows.extend([flow(one, other)?, flow(other, one)?]);
        }
        let traffic = TrafficGroup::new(flows);
        sleep(Duration::from_secs(2));
        let sent: u64 = traffic.stop().iter().try_fold(0, |sent, report| {
            ensure!(report.is_perfect(), "{report}");
            Ok(sent + report.sent)
        })?;
        let by_workers = carried(lab)? - before;
        println!("{sent} packets between pods, none lost, {by_workers} by workers");
        assert!(by_workers >= sent, "workers carried {by_workers} of {sent}");
        assert_eq!(through_a_host_port(lab, lab.pod(1, 0))?, "pong");
        assert_eq!(Ping::new(lab.pod(1, 0), lab.pod(1, 1)).run()?.received, 1);

        let new = results.get(1).context("result")?;
        other.each("CHECK", "ours", lab.pod(2, 0), new)?;
        // The pods of each plugin are deleted by the other one's means; the old way round is a bridge with the kept file.
        for (runtime, result) in runtimes.iter().zip(&results) {
            let [first, second] = [0, 1].map(|pod| runtime.node.pod(pod));
            runtime.each("DEL", "theirs", second, &Value::Null)?;
            assert_eq!(runtime.files("flannel"), ["ours"]);
            if runtime.node.index() == 1 {
                let saved = fs::read_to_string(runtime.saved().join("ours")).context("saved")?;
                let saved: Value = serde_json::from_str(&saved).context("saved")?;
                runtime
                    .call("bridge", "DEL", Some(("ours", first)), &saved)?
                    .ok()?;
                fs::remove_file(runtime.saved().join("ours")).context("saved")?;
            }
            for _again in 0..2 {
                runtime.each("DEL", "ours", first, result)?;
            }
            runtime.is_empty()?;
        }
        // What was never deleted, GC gives back.
        other.add("kept", lab.pod(2, 0), &json!([]))?;
        other.add("lost", lab.pod(2, 1), &json!([]))?;
        run(lab.pod(2, 1), "ip link del eth0")?;
        let valid =
            json!({"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]});
        other.of_the_network("GC", &valid)?.ok()?;
        assert_eq!(other.files("flannel"), ["kept"]);
        assert_eq!(other.files("networks/cbr0").len(), 1);
        other.each("DEL", "kept", lab.pod(2, 0), &Value::Null)?;
        other.is_empty()
    })
}

/// Packets that the workers of all nodes have sent to other nodes.
fn carried(lab: &Lab) -> Result<u64> {
    // Counters are published every few milliseconds.
    sleep(Duration::from_millis(100));
    let mut nodes = lab.ripstop_nodes();
    nodes.try_fold(0, |sum, node| Ok(sum + node.workers()?.encapsulated()))
}

/// A node comes back with another subnet, and `cni0` still has an address of the one before.
#[test]
fn a_bridge_of_another_subnet_is_named_with_its_cure() -> Result<()> {
    cluster(|lab, api, [runtime, _]| {
        start(lab)?;
        wait_until("subnet.env is there", PATIENCE, || {
            runtime.subnet_file().exists()
        })?;
        let (node, pod) = (runtime.node, lab.pod(1, 0));
        runtime.add("old", pod, &json!([]))?;
        // As when it joins anew.
        api.delete(node.name());
        api.create(node.name(), &["10.244.9.0/24"], &json!({}));
        wait_until("subnet.env follows", PATIENCE, || {
            fs::read_to_string(runtime.subnet_file())
                .is_ok_and(|text| text.contains("FLANNEL_SUBNET=10.244.9.1/24"))
        })?;
        let plugins = runtime.plugins();
        let conf = runtime.conf(
            plugins.first().context("flannel")?,
            &Value::Null,
            &json!([]),
        );
        let second = lab.pod(1, 1);
        let refused = runtime.call("flannel", "ADD", Some(("new", second)), &conf)?;
        let (code, text) = refused.error()?;
        println!("ADD with the old bridge: {code}: {text}");
        for part in ["cni0", "10.244.9.1/24", "ip link delete cni0"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        // The runtime cleans up after its failed ADD; the old pod goes as it came.
        runtime.each("DEL", "new", second, &Value::Null)?;
        runtime.each("DEL", "old", pod, &Value::Null)?;
        run(node, "ip link delete cni0")?;
        let result = runtime.add("new", second, &json!([]))?;
        let given = addresses(&result);
        assert!(
            given.len() == 1 && given.concat().starts_with("10.244.9."),
            "{given:?}"
        );
        runtime.each("DEL", "new", second, &Value::Null)?;
        runtime.is_empty()
    })
}
