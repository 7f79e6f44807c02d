//! Bad input: each is refused by name, with what to do about it, and whatever ran before goes on.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0      traffic all the time, to which nothing may happen
//!                    ║
//!                    n3                     where everything is wrong
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[path = "common/kube.rs"]
mod kube;

use core::time::Duration;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;

use anyhow::{Context, Result};
use ripstop_fib::map::{self, DATAPLANE_LOCK, FIB_FILE, STATS_FILE};
use ripstop_fib::stats::Stats;
use ripstop_fib::sync::Ordering;
use ripstop_fib::{Publisher, Region};
use ripstop_perf::{
    Host, Lab, Leases, Node, Ping, TrafficGroup, UdpFlow, machine, run, wait_until,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// Traffic both ways between n1 and n2, already flowing.
fn steady(lab: &Lab) -> Result<TrafficGroup> {
    let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
    let flow = |from, to| UdpFlow::new(from, to).flows(2).rate(2000).start();
    let traffic = TrafficGroup::new(vec![flow(one, other)?, flow(other, one)?]);
    wait_until("traffic flows", PATIENCE, || {
        let members = traffic.members().iter();
        members
            .map(|member| member.snapshot().received)
            .all(|received| received > 100)
    })?;
    Ok(traffic)
}

fn assert_undisturbed(traffic: TrafficGroup) {
    for report in traffic.stop() {
        assert!(report.is_perfect(), "{report}");
    }
}

/// n1 and n2 at work, n3 with its files and nothing running.
fn beside_traffic(test: impl FnOnce(&Lab, &Node) -> Result<()>) -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(3).run(|lab| {
        let mut working = lab.leases();
        working.leases.truncate(2);
        lab.write_leases(&working)?;
        for node in [lab.node(1), lab.node(2)] {
            node.start_dataplane()?;
            node.start_controlplane()?;
        }
        for node in [lab.node(1), lab.node(2)] {
            node.wait_for_detour(1)?;
        }
        let traffic = steady(lab)?;
        test(lab, lab.node(3))?;
        for node in [lab.node(1), lab.node(2)] {
            assert!(node.dataplane_is_running() && node.controlplane_is_running());
            assert_eq!(node.detour()?.len(), 1, "{}", node.name());
        }
        assert_undisturbed(traffic);
        Ok(())
    })
}

/// Runs a process that has to refuse to start, within seconds, and say all of this.
fn refused(what: &str, command: &mut Command, parts: &[&str]) -> Result<()> {
    let output = command.output().with_context(|| what.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(1),
        "{what}: {}, said {said}",
        output.status
    );
    for part in parts {
        assert!(said.contains(part), "{what}: {part:?} is not in {said}");
        if part.contains(' ') {
            let times = said.matches(part).count();
            assert_eq!(times, 1, "{what}: {part:?} is said {times} times in {said}");
        }
    }
    assert!(!said.contains("panicked"), "{what}: {said}");
    Ok(())
}

/// Has the data plane of a node refuse to start; programs that take something away from it stand in front.
fn dataplane_refused(node: &Node, what: &str, wrapper: &[&str], parts: &[&str]) -> Result<()> {
    let limited = [&["timeout", "10"], wrapper].concat();
    refused(what, &mut node.dataplane_command(&limited)?, parts)
}

/// The links of a node, and the XDP programs on them.
fn links(node: &Node) -> Result<BTreeSet<String>> {
    let links: Value = serde_json::from_str(&run(node, "ip -d -j link")?)?;
    let links = links.as_array().context("links")?;
    Ok(links
        .iter()
        .map(|link| format!("{} {}", link["ifname"], link["xdp"]))
        .collect())
}

#[test]
fn a_wrong_configuration_is_refused() -> Result<()> {
    beside_traffic(|_lab, node| {
        let good: Value = serde_json::from_str(&fs::read_to_string(node.queue_config_file(0))?)?;
        let untouched = links(node)?;
        let file = node.queue_config_file(0).display().to_string();
        let with = |keys: Value| {
            let mut config = good.clone();
            if let (Some(config), Some(keys)) = (config.as_object_mut(), keys.as_object()) {
                config.extend(keys.clone());
            }
            config
        };
        let one_cpu: &[&str] = &["taskset", "-c", "0"];
        let cases: [(&str, Value, &[&str], &[&str]); 10] = [
            (
                "unknown NIC",
                json!({ "nic": "eth9" }),
                &[],
                &["nic: eth9 does not exist", "use one of", "eth0"],
            ),
            (
                "queue beyond the NIC's count",
                json!({ "queue": 5 }),
                &[],
                &["has 1 receive queue(s)", "no queue 5", "ethtool -L eth0"],
            ),
            (
                "CPU outside the cpuset",
                json!({ "cpu": 1 }),
                one_cpu,
                &["may not run on CPU 1, only on 0", "widen its cpuset"],
            ),
            (
                "ring size",
                json!({ "rings": { "rx": 1000 } }),
                &[],
                &["rings.rx: 1000 is not a power of two", "use 1024"],
            ),
            (
                "UMEM smaller than its rings",
                json!({ "umem": { "frames": 100 } }),
                &[],
                &[
                    "umem.frames: 100 is fewer than the 10368",
                    "or leave the key out",
                ],
            ),
            (
                "unknown key",
                json!({ "processors": [1] }),
                &[],
                &[
                    "unknown field `processors`",
                    "expected one of",
                    "configs/dataplane/README.md",
                ],
            ),
            (
                "CPUs that are no text",
                json!({ "cpus": [1] }),
                &[],
                &[
                    "invalid type: sequence",
                    "cpus as text like \"0-3,8\", or \"auto\"",
                ],
            ),
            (
                "unknown mode",
                json!({ "mode": "fast" }),
                &[],
                &["unknown variant `fast`", "zero-copy"],
            ),
            (
                "no memory for frames",
                json!({}),
                &[
                    "prlimit",
                    "--memlock=1048576",
                    "setpriv",
                    "--bounding-set=-ipc_lock",
                ],
                &[
                    "42467328 bytes of locked memory",
                    "the limit is 1048576",
                    "CAP_IPC_LOCK",
                    "ulimit -l",
                ],
            ),
            (
                "no right to AF_XDP sockets",
                json!({}),
                &["setpriv", "--bounding-set=-net_raw"],
                &["lacks CAP_NET_RAW", "run it as root or grant"],
            ),
        ];
        for (what, keys, wrapper, parts) in cases {
            node.write_queue_config(0, &with(keys))?;
            dataplane_refused(node, what, wrapper, parts)?;
            if wrapper.is_empty() {
                dataplane_refused(node, what, &[], &[&file])?;
            }
            assert_eq!(links(node)?, untouched, "{what} left something");
        }

        let all = [
            "setpriv",
            "--bounding-set=-net_admin,-net_raw,-bpf,-sys_admin",
        ];
        let parts = ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF"];
        dataplane_refused(node, "no rights", &all, &parts)?;

        node.write_queue_config(0, &good)?;
        let double = node.queue_config_file(1);
        node.write_queue_config(1, &good)?;
        let parts = [
            "both are for NIC eth0 queue 0",
            &file,
            &double.display().to_string(),
        ];
        dataplane_refused(node, "duplicate queue", &[], &parts)?;
        fs::write(&double, "{ \"nic\": \"eth0\", ")?;
        let parts = ["eth0-q1.json", "not JSON", "rename"];
        dataplane_refused(node, "half-written file", &[], &parts)?;

        // Everything that is wrong, in one go.
        node.write_queue_config(0, &with(json!({ "burst": 1000, "rings": { "tx": 3 } })))?;
        let parts = ["burst: 1000", "rings.tx: 3", "eth0-q1.json: not JSON"];
        dataplane_refused(node, "three errors", &[], &parts)?;

        fs::remove_file(double)?;
        fs::remove_file(node.queue_config_file(0))?;
        dataplane_refused(
            node,
            "no configuration",
            &[],
            &["no *.json file", "write one per NIC queue"],
        )?;
        assert_eq!(links(node)?, untouched);
        Ok(())
    })
}

/// A program that lets everything pass, as someone else's.
const FOREIGN_PROGRAM: &str = r#"
__attribute__((section("xdp"), used)) int somebodys(void *context) { return 2; }
char licence[] __attribute__((section("license"), used)) = "GPL";
"#;

#[test]
fn what_belongs_to_others_is_left_to_them() -> Result<()> {
    beside_traffic(|lab, node| {
        let source = lab.dir().join("somebodys.c");
        let object = lab.dir().join("somebodys.o");
        fs::write(&source, FOREIGN_PROGRAM)?;
        let compiled = Command::new("clang")
            .args(["-O2", "-g", "-target", "bpf", "-c"])
            .args([&source, Path::new("-o"), &object])
            .status()
            .context("start clang (package clang)")?;
        assert!(compiled.success());
        run(
            node,
            &format!("ip link set dev eth0 xdp obj {} sec xdp", object.display()),
        )?;
        let with_program = links(node)?;
        dataplane_refused(
            node,
            "foreign XDP program",
            &[],
            &[
                "NIC eth0 already runs XDP program",
                "somebodys",
                "ip link set dev eth0 xdp",
            ],
        )?;
        assert_eq!(links(node)?, with_program);
        assert!(
            with_program.iter().any(|link| link.contains("prog")),
            "{with_program:?}"
        );
        run(node, "ip link set dev eth0 xdp off")?;

        run(node, "ip tuntap add dev rip0 mode tun")?;
        let with_device = links(node)?;
        dataplane_refused(node, "foreign rip0", &[], &["rip0", "ip link del rip0"])?;
        assert_eq!(links(node)?, with_device);
        run(node, "ip link del rip0")?;

        // A second instance, of either process, on a run directory that is in use.
        let working = lab.node(1);
        let pid = working.dataplane_pid().context("pid")?.to_string();
        let parts = ["dataplane.lock", "in use by process", &pid, "--run-dir"];
        dataplane_refused(working, "second data plane", &[], &parts)?;
        let pid = working.controlplane_pid().context("pid")?.to_string();
        let parts = ["controlplane.lock", "in use by process", &pid, "--run-dir"];
        let mut command = working.controlplane_command(&["timeout", "10"])?;
        refused("second control plane", &mut command, &parts)
    })
}

#[test]
fn a_region_of_something_else_is_refused() -> Result<()> {
    beside_traffic(|_lab, node| {
        let path = node.run_dir().join(FIB_FILE);
        let name = path.display().to_string();
        let fix = "stop Ripstop on this node, remove the file, start again";
        // Bytes to write over the region's at a place; none for a file that is cut short.
        type Damage = Option<(u64, &'static [u8])>;
        let version: &'static [u8] = &[77, 0, 0, 0, 0, 0, 0, 0];
        let length: &'static [u8] = &[5, 0, 0, 0, 0, 0, 0, 0];
        let cases: [(&str, Damage, &str); 4] = [
            ("magic", Some((0, b"garbage!")), "wrong magic"),
            ("version", Some((8, version)), "layout version 77"),
            ("length", Some((16, length)), "header claims 5 words"),
            ("too short", None, ""),
        ];
        for (what, damage, part) in cases {
            drop(map::open_or_create_fib(&node.run_dir()).context("fib region")?);
            match damage {
                Some((place, bytes)) => open(&path)?.write_all_at(bytes, place)?,
                None => fs::write(&path, "short")?,
            }
            let parts = [&name, part, fix];
            dataplane_refused(node, what, &[], &parts)?;
            let mut command = node.controlplane_command(&["timeout", "10"])?;
            refused(what, &mut command, &parts)?;
            fs::remove_file(&path)?;
        }
        Ok(())
    })
}

fn open(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.with_context(|| format!("{}", path.display()))
}

#[test]
fn a_damaged_table_is_not_used() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let traffic = steady(lab)?;
        let node = lab.node(1);
        node.kill_controlplane();
        let good = node.workers()?.generation();
        let damaged = publish_damaged(node)?;
        assert_eq!(damaged, good + 1);
        wait_until("the table is refused", PATIENCE, || {
            node.dataplane_log().contains("new table refused")
        })?;
        let log = node.dataplane_log();
        for part in [
            "the table's checksum is",
            "the workers go on with the one they have",
        ] {
            assert!(log.contains(part), "{part:?} is not in {log}");
        }
        let before = node.workers()?;
        wait_until("workers go on", PATIENCE, || {
            node.workers().is_ok_and(|now| {
                now.encapsulated() > before.encapsulated() + 500
                    && now.decapsulated() > before.decapsulated() + 500
            })
        })?;
        let after = node.workers()?;
        assert_eq!(after.generation(), good, "workers keep the good table");

        // A control plane that starts finds the damage and publishes over it.
        node.start_controlplane()?;
        wait_until("a whole table is in use", PATIENCE, || {
            node.workers()
                .is_ok_and(|workers| workers.generation() > damaged)
        })?;
        node.wait_for_detour(1)?;
        assert_undisturbed(traffic);

        // With nothing but a damaged table the data plane stays out of the way.
        node.kill_controlplane();
        node.kill_dataplane();
        publish_damaged(node)?;
        let seen = node.dataplane_log().len();
        node.start_dataplane()?;
        wait_until("the table is refused at the start", PATIENCE, || {
            node.dataplane_log()[seen..].contains("new table refused")
        })?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        for (from, to) in [(one, other), (other, one)] {
            assert_eq!(
                Ping::new(from, to).count(3).run()?.received,
                3,
                "the standby"
            );
        }
        assert_eq!(node.workers()?.generation(), 0);
        node.start_controlplane()?;
        node.wait_for_detour(1)?;
        assert_eq!(Ping::new(one, other).run()?.received, 1);
        Ok(())
    })
}

/// Publishes the current table of a node once more, with a bit of its last word flipped.
fn publish_damaged(node: &Node) -> Result<u64> {
    let run_dir = node.run_dir();
    let fib = map::open_fib_for_publishing(&run_dir).context("fib region")?;
    let region = Region::attach(fib.words()).context("fib region")?;
    let (_, words) = region.snapshot().context("no table")?;
    let mut image: Vec<u64> = words
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .collect();
    *image.last_mut().context("empty table")? ^= 1;
    let alive = map::lock_owner(&run_dir, DATAPLANE_LOCK)?.is_some();
    let stats = map::open_stats(&run_dir).context("stats region")?;
    let stats = Stats::attach(stats.words()).context("stats region")?;
    let pins = || if alive { stats.pins() } else { Vec::new() };
    let generation = Publisher::adopt(region).publish(&image, pins);
    generation.context("publish")
}

#[test]
fn garbage_in_place_of_statistics_leads_to_the_standby() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        lab.start_ripstop()?;
        let traffic = steady(lab)?;
        let node = lab.node(1);
        let path = node.run_dir().join(STATS_FILE);
        let garbage = node.dir().join("garbage");
        fs::write(&garbage, vec![0x5a; 4096])?;
        fs::rename(&garbage, &path)?;
        wait_until("the traffic is led to the standby", PATIENCE, || {
            node.detour().is_ok_and(|detour| detour.is_empty())
        })?;
        let log = node.controlplane_log();
        for part in [
            "look at the data plane",
            &path.display().to_string(),
            "remove the file",
        ] {
            assert!(log.contains(part), "{part:?} is not in {log}");
        }
        let error = node
            .ripstop_text(&["status"])
            .map(drop)
            .expect_err("garbage");
        let text = format!("{error:#}");
        assert!(text.contains(&path.display().to_string()), "{text}");
        sleep(Duration::from_millis(300));

        // Restarted, it makes a region of its own in place of whatever is there.
        node.kill_dataplane();
        let killed = traffic.mark();
        fs::write(&path, "garbage once more")?;
        node.start_dataplane()?;
        node.wait_for_detour(1)?;
        let before = node.workers()?.encapsulated();
        wait_until("workers carry it again", PATIENCE, || {
            node.workers()
                .is_ok_and(|workers| workers.encapsulated() > before + 500)
        })?;
        let lost_by_the_kill = traffic.lost_before(&killed, Duration::from_millis(300));
        let lost: u64 = traffic.stop().iter().map(|report| report.lost).sum();
        assert_eq!(lost, lost_by_the_kill, "by anything but the kill");
        Ok(())
    })
}

/// Nodes of a cluster that are wrong in each way, one after the other, while the good ones talk.
#[test]
fn a_bad_node_of_the_cluster_is_named_and_disturbs_nobody() -> Result<()> {
    let _machine = machine();
    Lab::builder().ripstop(2).run(|lab| {
        let (api, kubeconfig) = kube::serve(lab)?;
        let kubeconfig = kubeconfig.as_str();
        for node in lab.nodes() {
            let subnet = node.lease().subnet.context("subnet")?;
            api.create(node.name(), &[&subnet], &json!({}));
            node.start_dataplane()?;
            node.start_controlplane_with(&["--kube-subnet-mgr", "--kubeconfig-file", kubeconfig])?;
        }
        lab.ripstop_nodes().try_for_each(|node| node.wait_for_detour(1))?;
        let traffic = steady(lab)?;
        let node = lab.node(1);
        let routes = || node.output(&["ip", "route", "show", "proto", "82"]);
        let before = routes()?;
        let annotations = |key: &str, value: &str| {
            let mut all = json!({
                "flannel.alpha.coreos.com/backend-type": "vxlan",
                "flannel.alpha.coreos.com/backend-data": r#"{"VNI":1,"VtepMAC":"02:52:53:00:00:07"}"#,
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/public-ip": "10.199.0.17",
            });
            if !key.is_empty() {
                all[format!("flannel.alpha.coreos.com/{key}")] = value.into();
            }
            all
        };
        let subnet = "10.244.7.0/24";
        for (key, value, cidr, words) in [
            ("backend-data", "null", subnet, "has no \"VtepMAC\": write it like"),
            ("backend-data", "", subnet, "is not JSON"),
            ("backend-data", "{\"VNI\":1,\"VtepMAC\":", subnet, "is not JSON"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"seven"}"#, subnet, "has the VtepMAC \"seven\""),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:07"}"#, subnet, "has the VtepMAC 01:00:5e:00:00:07, which is"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":7}"#, subnet, "has no \"VtepMAC\""),
            ("public-ip", "", subnet, "has no flannel.alpha.coreos.com/public-ip: start flannel or Ripstop there"),
            ("public-ip", "10.199.0", subnet, "is not an IPv4 address"),
            ("public-ip", "fd00:199::17", subnet, "is not an IPv4 address"),
            ("public-ip", "10.244.7.1", subnet, "lies inside the pod network 10.244.0.0/16"),
            ("backend-type", "host-gw", subnet, "and this node \"vxlan\": ignored"),
            ("", "", "10.245.7.0/24", "is not inside the pod network 10.244.0.0/16"),
            ("", "", "10.244.7.0/31", "has no room for pods"),
            ("", "", "10.244.2.0/25", "overlaps 10.244.2.0/24 of the older node \"n2\""),
            ("", "", "", "has no IPv4 PodCIDR: assign one"),
        ] {
            let cidrs: Vec<&str> = Some(cidr).into_iter().filter(|cidr| !cidr.is_empty()).collect();
            let seen = node.controlplane_log().len();
            api.create("bad", &cidrs, &annotations(key, value));
            let named = |log: &str| log.contains("node \"bad\"") && log.contains(words);
            let what = format!("{key} {value:?} of {cidr:?} is named with {words:?}");
            let outcome = wait_until(&what, PATIENCE, || {
                node.controlplane_log()
                    .get(seen..)
                    .is_some_and(|log| log.lines().any(named))
            });
            outcome.with_context(|| {
                let log = node.controlplane_log();
                log.get(seen..).unwrap_or_default().to_owned()
            })?;
            assert_eq!(routes()?, before, "{what}");
            api.delete("bad");
        }
        // The very same node without the mistake is a peer.
        api.create("bad", &[subnet], &annotations("", ""));
        wait_until("a good one is a peer", PATIENCE, || {
            routes().is_ok_and(|routes| routes.contains(subnet))
        })?;
        assert_undisturbed(traffic);
        Ok(())
    })
}

#[test]
fn a_control_plane_refuses_and_waits() -> Result<()> {
    beside_traffic(|lab, node| {
        let good = fs::read_to_string(node.net_conf_file())?;
        let cases: [(&str, &str, &[&str]); 4] = [
            (
                "half-written",
                "{ \"Network\": ",
                &["net-conf.json", "error parsing subnet config"],
            ),
            (
                "no network",
                "{ \"Backend\": { \"Type\": \"vxlan\" } }",
                &["net-conf.json", "\"Network\": \"10.244.0.0/16\""],
            ),
            (
                "unknown backend",
                "{ \"Network\": \"10.244.0.0/16\", \"Backend\": { \"Type\": \"pigeon\" } }",
                &[
                    "unknown backend type: pigeon",
                    "vxlan, ipip, udp, host-gw, alloc",
                ],
            ),
            (
                "a backend to come",
                "{ \"Network\": \"10.244.0.0/16\", \"Backend\": { \"Type\": \"wireguard\" } }",
                &["wireguard", "not implemented in this version of Ripstop"],
            ),
        ];
        for (what, text, parts) in cases {
            fs::write(node.net_conf_file(), text)?;
            let mut command = node.controlplane_command(&["timeout", "10"])?;
            refused(what, &mut command, parts)?;
        }
        fs::write(node.net_conf_file(), good)?;

        // Leases that are not there or not good are waited for, and said so.
        node.write_leases(&Leases::default())?;
        let file = node.lease_file();
        fs::write(&file, "{ \"leases\": [ { \"node\": \"n")?;
        node.start_controlplane()?;
        let logged = |part: &'static str| {
            let what = format!("logged: {part}");
            wait_until(&what, PATIENCE, || node.controlplane_log().contains(part))
        };
        logged("waiting for it")?;
        let log = node.controlplane_log();
        for part in [
            file.display().to_string().as_str(),
            "line 1",
            "rename it into place",
        ] {
            assert!(log.contains(part), "{part:?} is not in {log}");
        }
        assert!(node.controlplane_is_running());
        assert_eq!(node.fib_generation()?, 0, "nothing to publish");
        let mut leases = lab.leases();
        leases.leases.swap(0, 2);
        node.write_leases(&leases)?;
        logged("published")?;

        // An interface that is not there is waited for as well.
        node.kill_controlplane();
        run(node, "ip link set eth0 down")?;
        run(node, "ip link set eth0 name uplink0")?;
        node.start_controlplane()?;
        logged("provided: --iface eth0: the interfaces are")?;
        assert!(node.controlplane_is_running());
        run(node, "ip link set uplink0 name eth0")?;
        run(node, "ip link set eth0 up")?;
        wait_until("it works again", PATIENCE, || {
            let log = node.controlplane_log();
            log.rfind("works again part=\"underlay\"") > log.rfind("provided: --iface")
        })?;
        Ok(())
    })
}
