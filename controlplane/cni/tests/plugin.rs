//! Each command of the plugin, called as a runtime calls it, with `delegate.sh` in the place of bridge and host-local.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use common::{Answer, FLANNEL, Runtime};
use serde_json::{Value, json};
use tempfile::TempDir;

const SUBNET_ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
/// What flannel's plugin 1.9.1 was seen to save.
const RECORDED: &str = r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"n1/cni/networks","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#;
const REFUSED: &str = "{\"code\": 11, \"msg\": \"no\"}\n";

/// A directory with plugins, `subnet.env`, and room for saved files.
struct Node {
    dir: TempDir,
    runtime: Runtime,
}

impl Node {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let plugins = dir.path().join("bin");
        fs::create_dir(&plugins).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/delegate.sh");
        for name in ["bridge", "host-local"] {
            symlink(&script, plugins.join(name)).unwrap();
        }
        fs::write(dir.path().join("subnet.env"), SUBNET_ENV).unwrap();
        // Any file that is not this process's namespace will do.
        fs::write(dir.path().join("netns"), "").unwrap();
        let runtime = Runtime {
            plugins: format!("{}:/nowhere", plugins.display()),
            dir: dir.path().to_owned(),
            namespace: None,
        };
        Self { dir, runtime }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The shipped configuration, with these keys changed.
    fn conf(&self, changes: Value) -> String {
        let mut conf = json!({
            "cniVersion": "0.3.1", "name": "cbr0", "type": "flannel",
            "delegate": {"hairpinMode": true, "isDefaultGateway": true},
            "ipam": {"dataDir": "n1/cni/networks"},
            "subnetFile": self.path("subnet.env"), "dataDir": self.path("saved/flannel"),
        });
        let Value::Object(changes) = changes else {
            unreachable!("a change is an object");
        };
        conf.as_object_mut().unwrap().extend(changes);
        conf.to_string()
    }

    fn attachment(
        &self,
        command: &str,
        container_id: &str,
        ifname: &str,
        changes: Value,
    ) -> Answer {
        let netns = self.path("netns").display().to_string();
        self.runtime.attachment(
            FLANNEL.as_ref(),
            command,
            [container_id, ifname, &netns],
            &self.conf(changes),
        )
    }

    fn command(&self, command: &str, changes: Value) -> Answer {
        let mut conf = json!({"cniVersion": "1.1.0"});
        let Value::Object(changes) = changes else {
            unreachable!("a change is an object");
        };
        conf.as_object_mut().unwrap().extend(changes);
        // These commands are of no attachment: what the environment says of one must not reach a DEL.
        let variables = [("CNI_COMMAND", command), ("CNI_NETNS", "/elsewhere")];
        self.runtime
            .call(FLANNEL.as_ref(), &variables, &self.conf(conf))
    }

    /// The calls that delegates have got since this was asked last.
    fn calls(&self) -> Vec<String> {
        let file = self.path("bin/calls");
        let calls = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(file);
        let netns = self.path("netns").display().to_string();
        calls
            .lines()
            .map(|line| line.replace(&netns, "netns"))
            .collect()
    }

    /// The files that are kept for `DEL`.
    fn saved(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("saved/flannel")) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn save(&self, name: &str, conf: &str) {
        fs::create_dir_all(self.path("saved/flannel")).unwrap();
        fs::write(self.path("saved/flannel").join(name), conf).unwrap();
    }

    fn delegates_fail(&self, how: &str) {
        fs::write(self.path("bin/fails"), how).unwrap();
    }

    fn delegates_mend(&self) {
        fs::remove_file(self.path("bin/fails")).unwrap();
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn add_saves_what_flannel_saves_and_hands_the_answer_on() {
    let node = Node::new();
    let answer = node.attachment("ADD", "c1", "eth0", json!({})).ok();
    assert_eq!(answer, "{\"cniVersion\": \"1.1.0\",\n  \"whatever\":1}\n");
    assert_eq!(
        node.calls(),
        [format!("bridge ADD c1 eth0 [netns] {RECORDED}")]
    );
    let file = node.path("saved/flannel/c1");
    assert_eq!(fs::read_to_string(&file).unwrap(), RECORDED);
    assert_eq!(mode(&file), 0o600);
    assert_eq!(mode(&node.path("saved/flannel")), 0o700);
    assert_eq!(node.saved(), ["c1"]);
}

#[test]
fn del_forgets_only_what_is_deleted() {
    let node = Node::new();
    node.attachment("ADD", "c1", "eth0", json!({})).ok();
    node.calls();
    let deleted = [format!("bridge DEL c1 eth0 [netns] {RECORDED}")];

    node.delegates_fail(REFUSED);
    let answer = node.attachment("DEL", "c1", "eth0", json!({}));
    assert_eq!((answer.code, answer.stdout.as_str()), (7, REFUSED));
    assert_eq!(
        (node.calls().as_slice(), node.saved()),
        (&deleted[..], vec!["c1".to_owned()])
    );

    // An answer that no runtime understands becomes one that it does.
    node.delegates_fail("panic: oh\n");
    let answer = node.attachment("DEL", "c1", "eth0", json!({}));
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(answer.code, 7);
    assert_eq!(error["msg"], "bridge failed: it printed no CNI error");
    assert_eq!(error["cniVersion"], "0.3.1");
    assert_eq!(
        (node.calls().len(), node.saved()),
        (1, vec!["c1".to_owned()])
    );
    node.delegates_mend();

    // Neither the configuration nor subnet.env of today matters for what was made yesterday.
    fs::remove_file(node.path("subnet.env")).unwrap();
    let today = json!({"delegate": {"type": "ptp"}, "prevResult": {}, "runtimeConfig": {"x": 1}});
    assert_eq!(node.attachment("DEL", "c1", "eth0", today).ok(), "");
    assert_eq!(
        (node.calls().as_slice(), node.saved()),
        (&deleted[..], vec![])
    );

    assert_eq!(node.attachment("DEL", "c1", "eth0", json!({})).ok(), "");
    assert_eq!(
        node.calls(),
        Vec::<String>::new(),
        "nothing is left to be done"
    );

    // The pod's namespace is often gone, and a runtime need not name one.
    node.save("c2", RECORDED);
    let gone = ["c2", "eth0", "/nowhere/netns"];
    node.runtime
        .attachment(FLANNEL.as_ref(), "DEL", gone, &node.conf(json!({})))
        .ok();
    assert_eq!(
        node.calls(),
        [format!("bridge DEL c2 eth0 [/nowhere/netns] {RECORDED}")]
    );
    assert_eq!(node.saved(), Vec::<String>::new());
}

#[test]
fn a_failed_add_leaves_what_del_needs_and_no_more() {
    let node = Node::new();
    for (changes, code) in [
        (json!({"delegate": {"type": "absent"}}), 999),
        (json!({"delegate": {"type": "../bin/bridge"}}), 7),
        (json!({"delegate": {"name": "x"}}), 7),
    ] {
        let (got, text) = node.attachment("ADD", "c1", "eth0", changes).error();
        assert_eq!(got, code, "{text}");
        assert_eq!(node.saved(), Vec::<String>::new(), "{text}");
    }
    let (_, text) = node
        .attachment("ADD", "c1", "eth0", json!({"delegate": {"type": "absent"}}))
        .error();
    assert!(
        text.starts_with("failed to find plugin \"absent\" in path ["),
        "{text}"
    );
    assert!(text.contains("containernetworking-plugins"), "{text}");

    // A delegate that does not run leaves nothing, but what another one has made is still to be deleted.
    fs::write(node.path("bin/broken"), "no program").unwrap();
    let broken = || json!({"delegate": {"type": "broken"}});
    let (code, text) = node.attachment("ADD", "c1", "eth0", broken()).error();
    assert_eq!(code, 5, "{text}");
    assert_eq!(node.saved(), Vec::<String>::new());
    node.save("c1", RECORDED);
    node.attachment("ADD", "c1", "eth0", broken()).error();
    assert_eq!(node.saved(), ["c1"]);
    fs::remove_file(node.path("saved/flannel/c1")).unwrap();
    assert_eq!(node.calls(), Vec::<String>::new());

    // One that ran may have left something: DEL has to work.
    node.delegates_fail(REFUSED);
    let answer = node.attachment("ADD", "c1", "eth0", json!({}));
    assert_eq!((answer.code, answer.stdout.as_str()), (7, REFUSED));
    assert_eq!(node.saved(), ["c1"]);
    // One refusal of the bridge plugin is opaque: it gets a remedy, and keeps its code and its words.
    node.delegates_fail(
        r#"{"code":999,"msg":"failed to set bridge addr: \"cni0\" already has an IP address different from 10.244.9.1/24"}"#,
    );
    let answer = node.attachment("ADD", "c1", "eth0", json!({"delegate": {"bridge": "br7"}}));
    let error: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!((answer.code, &error["code"]), (7, &json!(999)), "{error}");
    assert!(
        error["msg"]
            .as_str()
            .unwrap()
            .ends_with("different from 10.244.9.1/24")
    );
    assert!(
        error["details"]
            .as_str()
            .unwrap()
            .contains("ip link delete br7"),
        "{error}"
    );
    node.delegates_fail(REFUSED);
    node.attachment("ADD", "c1", "eth0", json!({}));
    node.delegates_mend();
    node.calls();
    node.attachment("DEL", "c1", "eth0", json!({})).ok();
    assert_eq!(
        node.calls(),
        [format!("bridge DEL c1 eth0 [netns] {RECORDED}")]
    );
    assert_eq!(node.saved(), Vec::<String>::new());
}

#[test]
fn attachments_of_one_sandbox_do_not_overwrite_each_other() {
    let node = Node::new();
    let second = || json!({"name": "other"});
    node.attachment("ADD", "c1", "eth0", json!({})).ok();
    node.attachment("ADD", "c1", "net1", second()).ok();
    assert_eq!(node.saved(), ["c1", "c1:net1"]);
    node.calls();
    for _ in 0..2 {
        node.attachment("DEL", "c1", "net1", second()).ok();
        assert_eq!(node.saved(), ["c1"]);
    }
    let other = RECORDED.replace("cbr0", "other");
    assert_eq!(
        node.calls(),
        [format!("bridge DEL c1 net1 [netns] {other}")]
    );
    node.attachment("DEL", "c1", "eth0", json!({})).ok();
    assert_eq!(node.saved(), Vec::<String>::new());
    node.calls();

    // flannel's plugin gives every interface's file the container's name. It may be eth0's after all, so it stays.
    node.save("c2", &other);
    node.attachment("DEL", "c2", "net1", second()).ok();
    assert_eq!(
        node.calls(),
        [format!("bridge DEL c2 net1 [netns] {other}")]
    );
    assert_eq!(node.saved(), ["c2"]);
}

#[test]
fn a_damaged_file_does_not_hold_a_pod_up() {
    for damage in ["", "{\"type\": ", "{}", "[]", "{\"type\": 1}"] {
        let node = Node::new();
        node.save("c1", damage);
        let answer = node.attachment("DEL", "c1", "eth0", json!({}));
        assert!(
            answer
                .stderr
                .contains("saved/flannel/c1 is not a configuration"),
            "{answer:?}"
        );
        assert_eq!(answer.ok(), "");
        assert_eq!(node.saved(), Vec::<String>::new());
    }
}

#[test]
fn check_asks_the_delegate_with_the_result_of_add() {
    let node = Node::new();
    let version = || json!({"cniVersion": "1.0.0"});
    node.attachment("ADD", "c1", "eth0", version()).ok();
    node.calls();
    let checked =
        || json!({"cniVersion": "1.0.0", "prevResult": {"ips": [], "cniVersion": "1.0.0"}});
    assert_eq!(node.attachment("CHECK", "c1", "eth0", checked()).ok(), "");
    let conf = RECORDED.replace("0.3.1", "1.0.0").replace(
        r#""type":"bridge""#,
        r#""prevResult":{"cniVersion":"1.0.0","ips":[]},"type":"bridge""#,
    );
    assert_eq!(
        node.calls(),
        [format!("bridge CHECK c1 eth0 [netns] {conf}")]
    );
    node.delegates_fail(REFUSED);
    let answer = node.attachment("CHECK", "c1", "eth0", checked());
    assert_eq!((answer.code, answer.stdout.as_str()), (7, REFUSED));

    for (container_id, changes, code, message) in [
        ("c1", json!({}), 1, "config version does not allow CHECK"),
        (
            "c1",
            version(),
            7,
            "CHECK needs \"prevResult\" in the configuration",
        ),
        ("c2", checked(), 3, "saved/flannel/c2 is not there"),
    ] {
        let (got, text) = node
            .attachment("CHECK", container_id, "eth0", changes)
            .error();
        assert_eq!(got, code, "{text}");
        assert!(text.contains(message), "{text}");
    }
}

#[test]
fn gc_deletes_what_is_not_in_use() {
    let node = Node::new();
    let other = RECORDED.replace("cbr0", "other");
    for (name, conf) in [
        ("used", RECORDED),
        ("used:net1", RECORDED),
        ("used:net2", RECORDED),
        ("half", RECORDED),
        ("half:net1", RECORDED),
        ("stale", RECORDED),
        ("stale-1:net1", RECORDED),
        ("elsewhere", &other),
        ("damaged", "{"),
        (".stale.tmp1", RECORDED),
    ] {
        node.save(name, conf);
    }
    let all = node.saved();
    for wrong in [
        json!({}),
        json!({"cni.dev/valid-attachments": [{"containerID": "used"}]}),
        json!({"cni.dev/valid-attachments": {}}),
    ] {
        let (code, text) = node.command("GC", wrong).error();
        assert_eq!(code, 7, "{text}");
        assert!(text.contains("nothing was removed"), "{text}");
        assert_eq!((node.calls(), node.saved()), (vec![], all.clone()));
    }

    let valid = json!({"cni.dev/valid-attachments": [
        {"containerID": "used", "ifname": "eth0"}, {"containerID": "used", "ifname": "net1"}, {"containerID": "half", "ifname": "net1"},
    ]});
    let handed_on = format!(
        "bridge GC   [/elsewhere] {}",
        RECORDED.replace("0.3.1", "1.1.0").replacen(
            '{',
            r#"{"cni.dev/valid-attachments":[{"containerID":"used","ifname":"eth0"},{"containerID":"used","ifname":"net1"},{"containerID":"half","ifname":"net1"}],"#,
            1
        )
    );
    let deleted = |what: &str| format!("bridge DEL {what} [] {RECORDED}");
    let calls = vec![
        deleted("stale eth0"),
        deleted("stale-1 net1"),
        deleted("used net2"),
        handed_on,
    ];

    node.delegates_fail(REFUSED);
    let (code, text) = node.command("GC", valid.clone()).error();
    assert_eq!(code, 999, "{text}");
    assert!(
        text.starts_with("3 stale attachments are left: bridge failed: no;"),
        "{text}"
    );
    assert_eq!((node.calls(), node.saved()), (calls.clone(), all));
    node.delegates_mend();

    assert_eq!(node.command("GC", valid.clone()).ok(), "");
    assert_eq!(node.calls(), calls);
    let left = [
        ".stale.tmp1",
        "damaged",
        "elsewhere",
        "half",
        "half:net1",
        "used",
        "used:net1",
    ];
    assert_eq!(node.saved(), left);

    // Plugins of an older specification are not asked for what they do not know. `null` is what Go makes of no attachment.
    fs::write(node.path("bin/old"), "").unwrap();
    assert_eq!(
        node.command("GC", json!({"cni.dev/valid-attachments": null}))
            .ok(),
        ""
    );
    assert_eq!(node.saved(), [".stale.tmp1", "damaged", "elsewhere"]);
    assert_eq!(node.calls().len(), 4);
    fs::remove_dir_all(node.path("saved")).unwrap();
    assert_eq!(node.command("GC", valid).ok(), "", "a node without pods");
}

#[test]
fn status_says_whether_pods_can_be_added() {
    let node = Node::new();
    assert_eq!(node.command("STATUS", json!({})).ok(), "");
    assert_eq!(
        node.calls(),
        [format!(
            "bridge STATUS   [/elsewhere] {}",
            RECORDED.replace("0.3.1", "1.1.0")
        )]
    );
    let not_ready = |message: &str, changes: Value| {
        let (code, text) = node.command("STATUS", changes).error();
        assert_eq!(code, 50, "{text}");
        assert!(text.contains(message), "{text}");
        assert_eq!(node.calls(), Vec::<String>::new());
    };
    not_ready(
        "failed to find plugin \"absent\"",
        json!({"delegate": {"type": "absent"}}),
    );
    not_ready(
        "failed to find plugin \"absent\"",
        json!({"ipam": {"type": "absent"}}),
    );
    not_ready("'delegate' dictionary", json!({"delegate": {"type": 1}}));
    fs::write(node.path("bin/old"), "").unwrap();
    not_ready("bridge does not speak CNI 1.1.0", json!({}));
    fs::write(node.path("subnet.env"), "FLANNEL_MTU=1450\n").unwrap();
    not_ready(
        "subnet.env is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET,",
        json!({}),
    );
    fs::write(node.path("subnet.env"), "FLANNEL_MTU\n").unwrap();
    not_ready("subnet.env line 1: FLANNEL_MTU has no value", json!({}));
    fs::remove_file(node.path("subnet.env")).unwrap();
    not_ready(
        "subnet.env: no such file or directory. Check the flannel pod log for this node.",
        json!({}),
    );
    not_ready(
        "Is the flannel pod running on this node? kubectl",
        json!({}),
    );

    fs::write(node.path("subnet.env"), SUBNET_ENV).unwrap();
    fs::remove_file(node.path("bin/old")).unwrap();
    node.delegates_fail(REFUSED);
    let answer = node.command("STATUS", json!({}));
    assert_eq!((answer.code, answer.stdout.as_str()), (7, REFUSED));
}

#[test]
fn a_bad_call_is_refused_and_changes_nothing() {
    let node = Node::new();
    let conf = node.conf(json!({}));
    let netns = node.path("netns").display().to_string();
    let refused = |variables: &[(&str, &str)], conf: &str, code: u64, message: &str| {
        let good = [
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns.as_str()),
        ];
        let variables: Vec<_> = good.iter().chain(variables).copied().collect();
        let answer = node.runtime.call(FLANNEL.as_ref(), &variables, conf);
        let (got, text) = answer.error();
        assert!(answer.stdout.contains("\"cniVersion\":\""), "{answer:?}");
        assert!(text.starts_with(message), "{text}");
        assert_eq!(got, code, "{text}");
        assert_eq!((node.calls(), node.saved()), (vec![], vec![]), "{text}");
    };
    let add = ("CNI_COMMAND", "ADD");
    refused(
        &[("CNI_COMMAND", "FLY")],
        &conf,
        4,
        "unknown CNI_COMMAND: FLY; ",
    );
    let all = [
        add,
        ("CNI_CONTAINERID", ""),
        ("CNI_IFNAME", ""),
        ("CNI_NETNS", ""),
        ("CNI_PATH", ""),
    ];
    refused(
        &all,
        &conf,
        4,
        "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing; ",
    );
    refused(
        &[("CNI_COMMAND", "DEL"), ("CNI_IFNAME", "")],
        &conf,
        4,
        "required env variables [CNI_IFNAME] missing; ",
    );
    for id in ["../c1", ".c1", "a:b", "a b", "é"] {
        refused(
            &[add, ("CNI_CONTAINERID", id)],
            &conf,
            4,
            "invalid characters in containerID: ",
        );
    }
    for (ifname, message) in [
        (
            "a/b",
            "interface name contains / or : or whitespace characters: ",
        ),
        (
            "a:b",
            "interface name contains / or : or whitespace characters: ",
        ),
        (
            "a b",
            "interface name contains / or : or whitespace characters: ",
        ),
        ("..", "interface name is . or ..: "),
        ("sixteen-letters-", "interface name is too long: "),
    ] {
        refused(&[add, ("CNI_IFNAME", ifname)], &conf, 4, message);
    }
    for command in ["ADD", "DEL"] {
        let own = [("CNI_COMMAND", command), ("CNI_NETNS", "/proc/self/ns/net")];
        refused(
            &own,
            &conf,
            8,
            "plugin's netns and netns from CNI_NETNS should not be the same; ",
        );
    }
    refused(
        &[add, ("CNI_NETNS", "/nowhere")],
        &conf,
        8,
        "CNI_NETNS /nowhere: No such file",
    );
    refused(&[add], "{", 6, "failed to load flannel netconf file: ");
    refused(&[add], "{}", 7, "missing network name; ");
    refused(
        &[add],
        &node.conf(json!({"cniVersion": "9.9.9"})),
        1,
        "incompatible CNI versions; config is \"9.9.9\", plugin supports [\"0.1.0\", ",
    );
    for command in ["GC", "STATUS"] {
        let message = format!("config version does not allow {command}; ");
        refused(
            &[("CNI_COMMAND", command)],
            &node.conf(json!({"cniVersion": "1.0.0"})),
            1,
            &message,
        );
    }
    fs::remove_file(node.path("subnet.env")).unwrap();
    let message = format!(
        "failed to load flannel 'subnet.env' file: open {}: no such file or directory. Check the flannel pod log for this node.; the node is not ready",
        node.path("subnet.env").display()
    );
    refused(&[add], &conf, 11, &message);
    fs::write(node.path("subnet.env"), SUBNET_ENV).unwrap();

    // Said to be allowed, the plugin's own namespace is.
    let own = [
        add,
        ("CNI_CONTAINERID", "c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/proc/self/ns/net"),
        ("CNI_NETNS_OVERRIDE", "1"),
    ];
    node.runtime.call(FLANNEL.as_ref(), &own, &conf).ok();
    assert_eq!(node.saved(), ["c1"]);
}

#[test]
fn versions_are_flannels() {
    let node = Node::new();
    let answer = node
        .runtime
        .call(FLANNEL.as_ref(), &[("CNI_COMMAND", "VERSION")], "")
        .ok();
    let expected = r#"{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#;
    assert_eq!(answer, expected);
    // Started by hand, it says what it is.
    let answer = node.runtime.call(FLANNEL.as_ref(), &[], "");
    assert!(
        answer.stderr.starts_with("CNI plugin flannel"),
        "{answer:?}"
    );
    assert!(answer.stderr.contains("0.1.0, 0.2.0"), "{answer:?}");
    assert_eq!(answer.ok(), "");
}
