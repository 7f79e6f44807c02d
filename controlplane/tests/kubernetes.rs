//! The manifest and the chart are what Kubernetes and our programs understand, to the last key.
//!
//! Every object becomes its type of k8s-openapi and JSON again: what is not there any more is a key that Kubernetes does not
//! know. The files in the ConfigMaps are read by the code that reads them on a node, and the programs take their flags (as
//! root: in a network namespace).
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

#[path = "common/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, Namespace, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use ripstop_cni::config::NetConf as PluginConf;
use ripstop_cni::subnet_env::SubnetEnv;
use ripstop_controlplane::netconf::{Backend, NetConf};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tool::tool;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

/// The objects of a text, each checked against its type.
fn objects(text: &str) -> Result<Vec<Value>, String> {
    let objects: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    for object in &objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let check = match kind {
            "ClusterRole" => understood::<ClusterRole>,
            "ClusterRoleBinding" => understood::<ClusterRoleBinding>,
            "ConfigMap" => understood::<ConfigMap>,
            "DaemonSet" => understood::<DaemonSet>,
            "Namespace" => understood::<Namespace>,
            "ServiceAccount" => understood::<ServiceAccount>,
            _ => return Err(format!("{kind} {name}: no such kind is expected here")),
        };
        check(object).map_err(|error| format!("{kind} {name}: {error}"))?;
    }
    Ok(objects)
}

fn understood<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let again = serde_json::to_value(typed).unwrap();
    match first_difference(object, &again, "") {
        Some(path) => Err(format!("Kubernetes does not know {path}")),
        None => Ok(()),
    }
}

/// The first place where `again` has not what `given` has.
fn first_difference(given: &Value, again: &Value, path: &str) -> Option<String> {
    match (given, again) {
        (Value::Object(given), Value::Object(again)) => given.iter().find_map(|(key, value)| {
            let path = format!("{path}.{key}");
            match again.get(key) {
                Some(again) => first_difference(value, again, &path),
                None => Some(path),
            }
        }),
        (Value::Array(given), Value::Array(again)) if given.len() == again.len() => {
            let mut pairs = given.iter().zip(again).enumerate();
            pairs.find_map(|(at, (given, again))| {
                first_difference(given, again, &format!("{path}[{at}]"))
            })
        }
        _ => (given != again).then(|| path.to_owned()),
    }
}

fn one<T: DeserializeOwned>(objects: &[Value], kind: &str, name: &str) -> T {
    let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let object = objects.iter().find(is_it);
    let object = object.unwrap_or_else(|| panic!("there is no {kind} {name}"));
    serde_json::from_value(object.clone()).unwrap()
}

fn file(objects: &[Value], map: &str, name: &str) -> String {
    let map: ConfigMap = one(objects, "ConfigMap", map);
    map.data.unwrap().remove(name).unwrap()
}

fn net_conf(objects: &[Value]) -> String {
    file(objects, "kube-flannel-cfg", "net-conf.json")
}

fn container(objects: &[Value], name: &str) -> Option<Container> {
    let set: DaemonSet = one(objects, "DaemonSet", "kube-flannel-ds");
    let pod = set.spec.unwrap().template.spec.unwrap();
    let all = pod.containers.into_iter();
    all.chain(pod.init_containers.unwrap_or_default())
        .find(|container| container.name == name)
}

/// What must hold of every way to deploy it.
fn check(objects: &[Value]) {
    plugins_configuration(&file(objects, "kube-flannel-cfg", "cni-conf.json"));
    let set: DaemonSet = one(objects, "DaemonSet", "kube-flannel-ds");
    let spec = set.spec.unwrap();
    let pod = spec.template.spec.unwrap();
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    for (key, value) in spec.selector.match_labels.unwrap() {
        assert_eq!(
            labels.get(&key),
            Some(&value),
            "the selector finds its pods"
        );
    }
    assert_eq!(labels["app"], "flannel");
    assert_eq!(pod.host_network, Some(true));
    assert_eq!(
        pod.priority_class_name.as_deref(),
        Some("system-node-critical")
    );
    assert_eq!(pod.service_account_name.as_deref(), Some("flannel"));

    // Volumes and mounts name each other.
    let volumes: BTreeSet<_> = pod
        .volumes
        .unwrap()
        .into_iter()
        .map(|volume| volume.name)
        .collect();
    let containers = || {
        pod.containers
            .iter()
            .chain(pod.init_containers.iter().flatten())
    };
    let mounts = containers().flat_map(|container| container.volume_mounts.iter().flatten());
    let mounted: BTreeSet<_> = mounts.map(|mount| mount.name.clone()).collect();
    assert_eq!(mounted, volumes);
    for container in containers().filter(|container| container.name != "kube-network-policies") {
        let context = container.security_context.as_ref().unwrap();
        let name = &container.name;
        assert_eq!(context.privileged, Some(false), "{name}");
        assert_eq!(context.allow_privilege_escalation, Some(false), "{name}");
        assert_eq!(context.read_only_root_filesystem, Some(true), "{name}");
        let dropped = context
            .capabilities
            .as_ref()
            .unwrap()
            .drop
            .as_ref()
            .unwrap();
        assert_eq!(dropped, &["ALL"], "{name}");
    }
    // Who waits for a file that this very pod writes waits for ever.
    for container in pod.init_containers.iter().flatten() {
        let words = container.args.iter().chain(&container.command).flatten();
        assert!(words.clone().all(|word| !word.contains("wait-for")));
        assert!(words.clone().all(|word| !word.contains("conflist")));
    }
    takes_its_flags(&container(objects, "kube-flannel").unwrap());
    let role: ClusterRole = one(objects, "ClusterRole", "flannel");
    let may = |resource: &str, verb: &str| {
        role.rules.iter().flatten().any(|rule| {
            let has = |list: &[String], word: &str| list.iter().any(|item| item == word);
            has(rule.resources.as_deref().unwrap_or_default(), resource) && has(&rule.verbs, verb)
        })
    };
    for (resource, verb) in [
        ("nodes", "list"),
        ("nodes", "watch"),
        ("nodes/status", "patch"),
        ("pods", "get"),
        ("events", "create"),
        ("events", "patch"),
    ] {
        assert!(may(resource, verb), "{resource} {verb}");
    }
    assert!(!may("nodes", "patch") && !may("secrets", "get"));
}

/// Every plugin of the list is one that a node has, and ours makes a delegate's configuration of its part.
fn plugins_configuration(text: &str) {
    let list: Value = serde_json::from_str(text).unwrap();
    let mut flannels = 0;
    for plugin in list["plugins"].as_array().unwrap() {
        if plugin["type"] != "flannel" {
            continue;
        }
        flannels += 1;
        // What a runtime makes of the list for one plugin.
        let mut plugin = plugin.clone();
        plugin["name"] = list["name"].clone();
        plugin["cniVersion"] = list["cniVersion"].clone();
        let conf = PluginConf::parse(plugin.to_string().as_bytes()).unwrap();
        assert_eq!(conf.name, "cbr0");
        let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        let delegate = conf.delegate(&SubnetEnv::parse(env).unwrap()).unwrap();
        assert_eq!(delegate.plugin, "bridge");
    }
    assert_eq!(flannels, 1);
}

/// Runs the control plane with the container's arguments up to where it needs a file that is not there.
fn takes_its_flags(container: &Container) {
    assert_eq!(container.command.as_deref().unwrap(), ["/opt/bin/flanneld"]);
    let args = container.args.as_deref().unwrap_or_default();
    // In a network of its own, where nobody else has the port.
    let output = Command::new("/usr/bin/unshare")
        .args(["--net", env!("CARGO_BIN_EXE_ripstop-controlplane")])
        .args(args)
        // Outside of a pod it has to be told where the API server is.
        .args([
            "--net-config-path=/nonexistent/net-conf.json",
            "--kube-api-url=http://127.0.0.1:1",
        ])
        .env_clear()
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    assert!(said.contains("/nonexistent/net-conf.json"), "{said}");
}

#[test]
fn the_manifest_takes_the_place_of_flannels() {
    let text = fs::read_to_string(configs().join("kubernetes/ripstop.yml")).unwrap();
    let objects = objects(&text).unwrap();
    check(&objects);
    let names: Vec<String> = objects
        .iter()
        .map(|object| {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let metadata = &object["metadata"];
            [&object["kind"], &metadata["namespace"], &metadata["name"]]
                .map(text)
                .join(" ")
        })
        .collect();
    assert_eq!(
        names,
        [
            "Namespace - kube-flannel",
            "ServiceAccount kube-flannel flannel",
            "ClusterRole - flannel",
            "ClusterRoleBinding - flannel",
            "ConfigMap kube-flannel kube-flannel-cfg",
            "ConfigMap kube-flannel ripstop-dataplane-cfg",
            "DaemonSet kube-flannel kube-flannel-ds",
        ]
    );
    let conf = NetConf::parse(net_conf(&objects).as_bytes()).unwrap();
    assert!(matches!(conf.backend, Backend::Vxlan { .. }));
    let set: DaemonSet = one(&objects, "DaemonSet", "kube-flannel-ds");
    // Kubernetes refuses to change it, so it has to be that of the manifest that flannel releases.
    let selector = set.spec.unwrap().selector.match_labels.unwrap();
    assert_eq!(
        json!(selector),
        json!({"app": "flannel", "k8s-app": "flannel"})
    );
    let flanneld = container(&objects, "kube-flannel").unwrap();
    for argument in ["--ip-masq", "--kube-subnet-mgr", "--healthz-port=8081"] {
        assert!(
            flanneld
                .args
                .as_ref()
                .unwrap()
                .iter()
                .any(|arg| arg == argument)
        );
    }
    let port = flanneld.ports.unwrap().remove(0);
    assert_eq!(
        (port.container_port, port.name.as_deref()),
        (8081, Some("healthz"))
    );
}

/// The check finds what it is there for.
#[test]
fn what_kubernetes_does_not_know_is_named() {
    let text = fs::read_to_string(configs().join("kubernetes/ripstop.yml")).unwrap();
    for (good, bad, named) in [
        (
            "hostNetwork: true",
            "hostNetworks: true",
            "DaemonSet kube-flannel-ds: Kubernetes does not know .spec.template.spec.hostNetworks",
        ),
        (
            "periodSeconds: 30",
            "periodSecond: 30",
            ".spec.template.spec.containers[0].livenessProbe.periodSecond",
        ),
        (
            "path: /dev/net/tun, type",
            "path: /dev/net/tun, typ",
            ".hostPath.typ",
        ),
        ("verbs: [patch]", "verb: [patch]", "ClusterRole flannel: "),
        (
            "kind: ServiceAccount\nmetadata",
            "kind: ServiceAcount\nmetadata",
            "ServiceAcount",
        ),
        ("periodSeconds: 30", "periodSeconds: often", "invalid type"),
        (
            "  name: kube-flannel\n",
            "  name: kube-flannel\n  name: twice\n",
            "name",
        ),
    ] {
        let spoiled = text.replacen(good, bad, 1);
        assert_ne!(spoiled, text, "{good}");
        let error = objects(&spoiled).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}

fn chart(helm: &Path, values: &Value) -> Result<Vec<Value>, String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("values.json");
    fs::write(&file, values.to_string()).unwrap();
    let output = Command::new(helm)
        .args([
            "template",
            "flannel",
            "--namespace",
            "kube-flannel",
            "--values",
        ])
        .arg(file)
        .arg(configs().join("kubernetes/chart"))
        .env("HOME", directory.path())
        .output()
        .map_err(|error| format!("{}: {error}", helm.display()))?;
    match output.status.success() {
        true => objects(&String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn the_chart_comes_to_the_manifest() {
    let Some(helm) = tool("helm", "RIPSTOP_HELM", "the_chart_comes_to_the_manifest") else {
        return;
    };
    let text = fs::read_to_string(configs().join("kubernetes/ripstop.yml")).unwrap();
    let manifest = objects(&text).unwrap();
    let selector = json!({"ripstop": {"selectorLabels": {"app": "flannel", "k8s-app": "flannel"}}});
    let rendered = chart(&helm, &selector).unwrap();
    check(&rendered);
    for name in ["kube-flannel", "ripstop-dataplane", "install-cni-plugin"] {
        let (ours, manifest) = (
            container(&rendered, name).unwrap(),
            container(&manifest, name).unwrap(),
        );
        assert_eq!(json!(ours), json!(manifest));
    }
    let (ours, manifest): (Value, Value) = (
        one(&rendered, "DaemonSet", "kube-flannel-ds"),
        one(&manifest, "DaemonSet", "kube-flannel-ds"),
    );
    let spec = |set: &Value| set["spec"]["template"]["spec"].clone();
    let (ours, manifest) = (spec(&ours), spec(&manifest));
    let keys = |pod: &Value| pod.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&ours), keys(&manifest));
    let sorted = |pod: &Value| {
        let volumes = pod["volumes"].as_array().unwrap();
        volumes
            .iter()
            .map(Value::to_string)
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(sorted(&ours), sorted(&manifest));
}

/// Each value of flannel's chart ends up where flannel's chart puts it.
#[test]
fn values_of_flannels_chart_say_the_same_here() {
    let Some(helm) = tool(
        "helm",
        "RIPSTOP_HELM",
        "values_of_flannels_chart_say_the_same_here",
    ) else {
        return;
    };
    let conf = |values: Value| -> Value {
        let objects = chart(&helm, &values).unwrap();
        check(&objects);
        serde_json::from_str(&net_conf(&objects)).unwrap()
    };
    for (values, expected) in [
        (
            json!({}),
            json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}),
        ),
        (
            json!({"podCidr": "", "podCidrv6": "fd00::/48", "flannel": {"enableNFTables": true, "backend": "host-gw"}}),
            json!({"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "EnableNFTables": true, "Backend": {"Type": "host-gw"}}),
        ),
        (
            json!({"flannel": {"backendPort": 4789, "vni": 4097, "GBP": true, "directRouting": true, "mtu": 1480, "macPrefix": "0E-2A"}, "ripstop": {"dscp": "inherit"}}),
            json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "Port": 4789, "VNI": 4097, "GBP": true, "DirectRouting": true, "MTU": 1480, "MacPrefix": "0E-2A", "DSCP": "inherit"}}),
        ),
        (
            json!({"flannel": {"backend": "ipip", "directRouting": true, "vni": 7}, "ripstop": {"dscp": 0}}),
            json!({"Network": "10.244.0.0/16", "Backend": {"Type": "ipip", "DirectRouting": true, "DSCP": 0}}),
        ),
        (
            json!({"flannel": {"backend": "udp", "backendPort": 8286}}),
            json!({"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": 8286}}),
        ),
    ] {
        let rendered = conf(values);
        assert_eq!(rendered, expected);
        NetConf::parse(rendered.to_string().as_bytes()).unwrap();
    }
    // Flannel's chart leaves the mode without quotes, and a key of digits would be a number.
    let wireguard = conf(
        json!({"flannel": {"backend": "wireguard", "backendPort": 1, "backendPortv6": 2, "psk": 12, "tunnelMode": "separate", "keepaliveInterval": 25, "mtu": 1420}}),
    );
    let expected = json!({"Type": "wireguard", "ListenPort": 1, "ListenPortV6": 2, "PSK": "12", "Mode": "separate", "PersistentKeepaliveInterval": 25, "MTU": 1420});
    assert_eq!(wireguard["Backend"], expected);

    let objects = chart(&helm, &json!({
        "global": {"imagePullSecrets": [{"name": "key"}]},
        "flannel": {
            "image": {"repository": "host:5000/ripstop", "tag": 1.5},
            "flannel_cni": {"image": {"repository": "other/flannel-cni-plugin", "tag": "v1"}},
            "cniBinDir": "/bin/cni", "cniConfDir": "/etc/with \"quotes\": yes",
            "args": ["--ip-masq", "--kube-subnet-mgr", "-iface=eth1", "--iface", "10.0.0.1", "--public-ip=192.0.2.1"],
            "resources": {"limits": {"memory": "100Mi"}}, "tolerations": [], "nodeSelector": {"rack": "7"},
            "healthz": {"port": 9000, "livenessProbe": {"periodSeconds": 3}},
            "cniConf": "{\"name\": \"cbr0\", \"cniVersion\": \"1.0.0\", \"plugins\": [{\"type\": \"flannel\"}]}\n",
        },
        "ripstop": {"noMasquerade": ["10.0.0.0/8"], "dataplane": {"args": ["--log-level=debug"]}},
    }))
    .unwrap();
    check(&objects);
    let set: Value = one(&objects, "DaemonSet", "kube-flannel-ds");
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "key"}]));
    assert_eq!(
        (&pod["nodeSelector"], &pod["tolerations"]),
        (&json!({"rack": "7"}), &Value::Null)
    );
    let text = pod["volumes"].to_string();
    assert!(
        text.contains("\"/bin/cni\"") && text.contains(r#"/etc/with \"quotes\": yes"#),
        "{text}"
    );
    let flanneld = container(&objects, "kube-flannel").unwrap();
    let args = flanneld.args.unwrap();
    assert_eq!(flanneld.image.as_deref(), Some("host:5000/ripstop:1.5"));
    assert_eq!(
        json!(flanneld.resources),
        json!({"limits": {"memory": "100Mi"}, "requests": {"cpu": "100m", "memory": "50Mi"}})
    );
    for argument in [
        "--healthz-port=9000",
        "--no-masquerade=10.0.0.0/8",
        "-iface=eth1",
    ] {
        assert!(args.iter().any(|arg| arg == argument), "{args:?}");
    }
    assert_eq!(flanneld.liveness_probe.unwrap().period_seconds, Some(3));
    let dataplane = container(&objects, "ripstop-dataplane").unwrap();
    assert_eq!(
        dataplane.args.unwrap(),
        ["--iface=eth1", "--iface=10.0.0.1", "--log-level=debug"]
    );
    let plugin = container(&objects, "install-cni-plugin").unwrap();
    assert_eq!(plugin.image.as_deref(), Some("other/flannel-cni-plugin:v1"));
    assert_eq!(plugin.command.unwrap(), ["cp"]);
}

#[test]
fn parts_of_the_chart_can_be_left_out_and_added() {
    let Some(helm) = tool(
        "helm",
        "RIPSTOP_HELM",
        "parts_of_the_chart_can_be_left_out_and_added",
    ) else {
        return;
    };
    let objects = chart(
        &helm,
        &json!({
            "flannel": {"skipCNIConfigInstallation": true, "healthz": {"port": 0}},
            "ripstop": {"dataplane": {"enabled": false}},
        }),
    )
    .unwrap();
    check(&objects);
    assert!(container(&objects, "ripstop-dataplane").is_none());
    let flanneld = container(&objects, "kube-flannel").unwrap();
    assert_eq!(flanneld.args.unwrap(), ["--ip-masq", "--kube-subnet-mgr"]);
    assert!(flanneld.liveness_probe.is_none() && flanneld.ports.is_none());

    assert!(container(&chart(&helm, &json!({})).unwrap(), "kube-network-policies").is_none());
    let objects = chart(&helm, &json!({"netpol": {"enabled": true}})).unwrap();
    check(&objects);
    let policies = container(&objects, "kube-network-policies").unwrap();
    assert_eq!(
        policies.image.as_deref(),
        Some("registry.k8s.io/networking/kube-network-policies:v1.0.0")
    );
    let role: ClusterRole = one(&objects, "ClusterRole", "flannel");
    let text = json!(role).to_string();
    for resource in [
        "networkpolicies",
        "adminnetworkpolicies",
        "baselineadminnetworkpolicies",
        "namespaces",
    ] {
        assert!(text.contains(&format!("\"{resource}\"")), "{text}");
    }
    // Two files for two queues instead of the template.
    let files = json!({"template.json": null, "eth0-q0.json": {"nic": "eth0", "queue": 0, "cpu": 2}, "eth0-q1.json": {"nic": "eth0", "queue": 1, "cpu": 3}});
    let objects = chart(
        &helm,
        &json!({
            "flannel": {"args": ["--kube-subnet-mgr", "--iface-regex=^10[.]"]},
            "ripstop": {"dataplane": {"config": files}},
        }),
    )
    .unwrap();
    let map: ConfigMap = one(&objects, "ConfigMap", "ripstop-dataplane-cfg");
    assert_eq!(map.data.unwrap().len(), 2);
    // The data plane chooses by itself, and would choose otherwise.
    let error = chart(
        &helm,
        &json!({"flannel": {"args": ["--iface-can-reach=192.0.2.1"]}}),
    )
    .unwrap_err();
    assert!(
        error.contains("--iface-can-reach=192.0.2.1") && error.contains("name the NIC"),
        "{error}"
    );
}
