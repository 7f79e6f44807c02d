//! The programs with what the manifest gives them and no more: its capabilities, a read-only root, a read-only `/proc/sys`
//! and `/sys`. Pods talk all the same, and the CNI configuration appears when they can.
//!
//! ```text
//!   n1p0 ─ n1: as in a container ═══ n2: as root ─ n2p0
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::time::Duration;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use ripstop_dataplane::config;
use ripstop_perf::{Host, Lab, Node, UdpFlow, tcp_transfer};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

/// Arguments: capabilities, a directory for the host's settings, the program and its arguments. What is under a mount of
/// its own, as the lab's directory, stays writable, as what the manifest mounts.
const CONTAINER: &str = r#"
set -e
capabilities=$1 settings=$2
shift 2
mount --bind /proc/sys/net "$settings/net"
mount --bind /proc/sys /proc/sys
for place in /proc/sys /sys /; do mount -o remount,bind,ro "$place"; done
if touch /etc/ripstop-least-privilege 2>/dev/null; then echo 'the root is writable' >&2; exit 9; fi
exec setpriv --bounding-set="-all$capabilities" --inh-caps=-all --no-new-privs "$@"
"#;

/// A process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn manifest() -> Result<Vec<Value>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/kubernetes/ripstop.yml");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    serde_saphyr::from_multiple(&text).context("manifest")
}

fn found<'a>(list: &'a Value, name: &str) -> Result<&'a Value> {
    let mut items = list.as_array().context("a list")?.iter();
    items
        .find(|item| item["name"] == name)
        .with_context(|| format!("no {name} in the manifest"))
}

/// The capabilities of one of the manifest's containers.
fn capabilities(container: &str) -> Result<Vec<String>> {
    let objects = manifest()?;
    let set = objects.iter().find(|object| object["kind"] == "DaemonSet");
    let pod = &set.context("DaemonSet")?["spec"]["template"]["spec"];
    let context = &found(&pod["containers"], container)?["securityContext"];
    let names = context["capabilities"]["add"].as_array();
    let names = names.context("capabilities")?.iter();
    let lower = |name: &Value| Some(name.as_str()?.to_lowercase());
    names.map(|name| lower(name).context("a name")).collect()
}

/// The words that put a program into such a container.
fn container(node: &Node, capabilities: &[String]) -> Result<Vec<String>> {
    let settings = settings(node);
    fs::create_dir_all(settings.join("net"))?;
    let list: String = capabilities
        .iter()
        .map(|name| format!(",+{name}"))
        .collect();
    let settings = settings.display().to_string();
    let words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        CONTAINER,
        "sh",
    ];
    let words = words.into_iter().map(str::to_owned);
    Ok(words.chain([list, settings]).collect())
}

/// Where the host's `/proc/sys` is for the container.
fn settings(node: &Node) -> PathBuf {
    node.dir().join("proc-sys")
}

fn wrapped(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

fn start(command: &mut Command, node: &Node, log: &str) -> Result<Running> {
    let log = fs::File::create(node.dir().join(log))?;
    let process = command
        .env("RIPSTOP_PROC_SYS", settings(node))
        .env("XTABLES_LOCKFILE", node.dir().join("xtables.lock"))
        .stdin(Stdio::null())
        .stderr(log)
        .spawn();
    Ok(Running(process.context("start in a container")?))
}

/// The template of the manifest's ConfigMap.
fn template() -> Result<String> {
    let objects = manifest()?;
    let is_it = |object: &&Value| object["metadata"]["name"] == "ripstop-dataplane-cfg";
    let map = objects.iter().find(is_it).context("ConfigMap")?;
    let text = map["data"]["template.json"]
        .as_str()
        .context("template.json")?;
    config::File::parse(Path::new("template.json"), text)?;
    Ok(text.to_owned())
}

#[test]
fn the_manifests_capabilities_are_enough() -> Result<()> {
    Lab::builder().name("least").ripstop(2).run(|lab| {
        let (one, other) = (lab.node(1), lab.node(2));
        // As systemd has it for new devices: without our setting, rip0 would check reverse paths.
        let default = "/proc/sys/net/ipv4/conf/default/rp_filter";
        one.netns()
            .run(|| fs::write(default, "2"))?
            .context(default)?;
        other.start_dataplane()?;
        other.start_controlplane()?;

        fs::remove_dir_all(one.config_dir())?;
        fs::create_dir(one.config_dir())?;
        fs::write(one.config_dir().join("template.json"), template()?)?;
        let words = container(one, &capabilities("ripstop-dataplane")?)?;
        let mut command = one.dataplane_command(&wrapped(&words))?;
        let _dataplane = start(&mut command, one, "dataplane.log")?;

        let notified = UnixDatagram::bind(one.dir().join("notify"))?;
        notified.set_read_timeout(Some(PATIENCE))?;
        let (source, conflist) = (
            one.dir().join("cni-conf.json"),
            one.dir().join("10-flannel.conflist"),
        );
        fs::write(&source, "{}\n")?;
        let words = container(one, &capabilities("kube-flannel")?)?;
        let mut command = one.controlplane_command(&wrapped(&words))?;
        command
            .arg("--ip-masq")
            .env("NOTIFY_SOCKET", one.dir().join("notify"));
        command.arg(format!(
            "--install-cni-conf={}:{}",
            source.display(),
            conflist.display()
        ));
        ensure!(!conflist.exists());
        let _controlplane = start(&mut command, one, "controlplane.log")?;

        let logs = || {
            ["dataplane.log", "controlplane.log"].map(|log| fs::read_to_string(one.dir().join(log)))
        };
        let mut word = [0; 64];
        let length = notified
            .recv(&mut word)
            .with_context(|| format!("READY=1: {:?}", logs()))?;
        assert_eq!(word.get(..length), Some(&b"READY=1\n"[..]));
        assert_eq!(fs::read_to_string(&conflist).context("conflist")?, "{}\n");
        assert!(one.dir().join("subnet.env").exists());

        for node in lab.ripstop_nodes() {
            node.wait_for_detour(1)
                .with_context(|| format!("{:?}", logs()))?;
        }
        let (from, to) = (lab.pod(1, 0), lab.pod(2, 0));
        let flow = UdpFlow::new(from, to)
            .flows(4)
            .rate(2000)
            .count(4000)
            .start()?;
        tcp_transfer(to, from, 1_000_000)?;
        let report = flow.wait();
        println!("{report}");
        assert!(report.is_perfect(), "{report}");
        let filter = one.output(&["cat", "/proc/sys/net/ipv4/conf/rip0/rp_filter"])?;
        assert_eq!(filter.trim(), "0", "{:?}", logs());
        let rules = one.output(&["nft", "list", "ruleset"])?;
        let rules = rules + &one.output(&["iptables-save"])?;
        for part in ["FLANNEL-POSTRTG", "table ip ripstop"] {
            assert!(
                rules.contains(part),
                "{part} is not in {rules}\n{:?}",
                logs()
            );
        }
        let [dataplane, controlplane] = logs().map(Result::unwrap_or_default);
        for complaint in [" ERROR ", " WARN "] {
            assert!(!dataplane.contains(complaint), "{dataplane}");
            assert!(!controlplane.contains(complaint), "{controlplane}");
        }
        // It runs at a priority that only SYS_NICE gives.
        assert!(!dataplane.contains("CAP_SYS_NICE"), "{dataplane}");
        Ok(())
    })
}

/// Each capability has its reason: without it, the program says so.
#[test]
fn none_of_the_data_planes_capabilities_can_be_left_out() -> Result<()> {
    Lab::builder().name("leastdp").ripstop(1).run(|lab| {
        let node = lab.node(1);
        let all = capabilities("ripstop-dataplane")?;
        assert!(all.len() >= 4, "{all:?}");
        for missing in &all {
            let rest: Vec<String> = all
                .iter()
                .filter(|name| *name != missing)
                .cloned()
                .collect();
            let words = container(node, &rest)?;
            // As low as containers may have it, so that the memory must not be counted.
            let limit = ["prlimit", "--memlock=65536"].map(str::to_owned);
            let words: Vec<String> = limit.into_iter().chain(words).collect();
            let command = node.dataplane_command(&wrapped(&words))?;
            let log = format!("without-{missing}.log");
            let said = said(command, node, &log)?;
            println!("{said}");
            let name = format!("CAP_{}", missing.to_uppercase());
            assert!(said.contains(&name), "{name} is not in {said}");
        }
        Ok(())
    })
}

/// What a data plane says until it ends or is up.
fn said(mut command: Command, node: &Node, log: &str) -> Result<String> {
    let mut process = start(&mut command, node, log)?;
    let read = || fs::read_to_string(node.dir().join(log)).unwrap_or_default();
    ripstop_perf::wait_until("it has ended, or runs", PATIENCE, || {
        // The worker's own words come last.
        let up = read().contains("ordinary priority");
        up || !matches!(process.0.try_wait(), Ok(None))
    })?;
    Ok(read())
}
