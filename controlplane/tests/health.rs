//! Health and metrics of the program as a probe, a Prometheus and an operator see them. Needs root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use common::api::Api;
use common::node::{CONTROLPLANE, FakeDataPlane, Node, wait_exit};
use common::{Process, VXLAN, backend, eventually, lease};
use ripstop_controlplane::health::metrics::{Metric, readme_table};
use ripstop_fib::DropReason;
use ripstop_fib::stats::{Counter, Mode, NicStats, XdpCounter};
use serde_json::{Value, json};

const PORT: &str = "--healthz-port=8081";

/// Asks by HTTP in the node's namespace: status and body. None while nobody listens.
fn get(node: &Node, host: &str, path: &str) -> Option<(u16, String)> {
    let text = node.namespace.enter(|| {
        let mut stream = TcpStream::connect((host, 8081)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        Some(text)
    })?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let kind = match path {
        "/metrics" => "content-type: text/plain; version=0.0.4; charset=utf-8",
        _ => "content-type: text/plain; charset=utf-8",
    };
    assert!(head.contains(kind), "{head}");
    Some((status, body.to_owned()))
}

fn wait_answer(node: &Node, path: &str, wanted: (u16, &str)) -> Duration {
    let what = format!("{path} answers {wanted:?}");
    let answer = || get(node, "127.0.0.1", path);
    eventually(&what, || {
        answer()
            .is_some_and(|(status, body)| (status, body.as_str()) == wanted)
            .then_some(())
    })
    .1
}

const RUNNING: (u16, &str) = (200, "flanneld is running");
const READY: (u16, &str) = (200, "flanneld is ready");
const NOT_READY: (u16, &str) = (503, "flanneld is not ready yet");

fn stop(process: Process) -> String {
    process.signal(libc::SIGTERM);
    let (code, log) = wait_exit(process);
    assert_eq!(code, 0, "{log}");
    log
}

/// What a Prometheus would take, or the first thing that it would not.
fn parsed(text: &str) -> Result<BTreeMap<String, f64>, String> {
    let (mut kinds, mut helped) = (BTreeMap::new(), BTreeSet::new());
    let mut series = BTreeMap::new();
    let mut current = String::new();
    let mut finished = BTreeSet::new();
    let is_name = |name: &str| {
        let mut letters = name.chars();
        letters
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
            && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
    };
    if !text.ends_with('\n') {
        return Err("the last line has no end".to_owned());
    }
    for line in text.lines() {
        let wrong = |what: &str| Err(format!("{what}: {line}"));
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap_or((help, ""));
            if help.is_empty() || !helped.insert(name.to_owned()) {
                return wrong("no help, or twice");
            }
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap_or((kind, ""));
            if !["counter", "gauge", "histogram"].contains(&kind) || !is_name(name) {
                return wrong("kind or name");
            }
            if kinds.insert(name.to_owned(), kind.to_owned()).is_some() || !helped.contains(name) {
                return wrong("twice, or before its help");
            }
            if (kind == "counter") != name.ends_with("_total") {
                return wrong("counters, and only they, end in _total");
            }
            finished.insert(core::mem::replace(&mut current, name.to_owned()));
            if finished.contains(name) {
                return wrong("a family in two places");
            }
            continue;
        }
        let (id, value) = line.rsplit_once(' ').ok_or_else(|| line.to_owned())?;
        let Ok(value) = value.parse::<f64>() else {
            return wrong("no number");
        };
        let (name, labels) = match id.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or("=")),
            None => (id, ""),
        };
        let family = match kinds.get(&current).map(String::as_str) {
            Some("histogram") => ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap_or(""),
            Some(_) => name,
            None => "",
        };
        if family != current || !is_name(name) {
            return wrong("not of the family above");
        }
        let mut rest = labels;
        let mut names = BTreeSet::new();
        while !rest.is_empty() {
            let Some((label, value)) = rest.split_once("=\"") else {
                return wrong("labels");
            };
            if !is_name(label) || !names.insert(label) {
                return wrong("label name");
            }
            // To the next quote that no backslash precedes; of those only three.
            let mut escaped = false;
            let mut end = None;
            for (at, letter) in value.char_indices() {
                match (escaped, letter) {
                    (true, '\\' | '"' | 'n') => escaped = false,
                    (true, _) => return wrong("escape"),
                    (false, '\\') => escaped = true,
                    (false, '"') => {
                        end = Some(at);
                        break;
                    }
                    (false, _) => {}
                }
            }
            let Some(end) = end else {
                return wrong("label without end");
            };
            rest = &value[end + 1..];
            rest = match rest.strip_prefix(',') {
                Some("") => return wrong("comma"),
                Some(more) => more,
                None if rest.is_empty() => rest,
                None => return wrong("no comma"),
            };
        }
        if series.insert(id.to_owned(), value).is_some() {
            return wrong("twice");
        }
    }
    match helped.iter().find(|name| !kinds.contains_key(*name)) {
        Some(name) => Err(format!("{name} has help and no kind")),
        None => Ok(series),
    }
}

fn metrics(node: &Node) -> BTreeMap<String, f64> {
    let (status, text) = get(node, "127.0.0.1", "/metrics").unwrap();
    assert_eq!(status, 200, "{text}");
    parsed(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

#[test]
fn the_validator_refuses_what_prometheus_refuses() {
    let good = "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"1\"} 1\na_total{x=\"\\\\ \\\" \\n,}\"} 2\n";
    assert_eq!(parsed(good).unwrap().len(), 2);
    for (from, to) in [
        ("x=\"1\"} 1", "x=\"1\"} one"),
        ("x=\"1\"", "1x=\"1\""),
        ("x=\"1\"", "x=\"1\",x=\"1\""),
        ("x=\"1\"", "x=\"\\x\""),
        ("x=\"1\"", "x=\"1"),
        ("x=\"1\"} 1\n", "x=\"1\"} 1\na_total{x=\"1\"} 1\n"),
        ("a_total{x=\"1\"}", "b_total{x=\"1\"}"),
        ("counter", "number"),
        ("# HELP a_total A.\n", ""),
        ("# TYPE a_total counter\n", ""),
        (
            "# TYPE a_total counter\n",
            "# TYPE a_total counter\n# TYPE a_total counter\n",
        ),
        (
            "# HELP a_total A.\n",
            "# HELP a_total A.\n# HELP a_total A.\n",
        ),
        ("counter", "gauge"),
        ("2\n", "2"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert!(parsed(&bad).is_err(), "{bad}");
    }
    let bad = good.replace("a_total", "a");
    assert!(parsed(&bad).is_err(), "{bad}");
}

#[test]
fn ready_means_that_peers_are_programmed_here_and_there() {
    let node = Node::new(1);
    // Alive before any source has anything to say, and not ready.
    let process = node.start_through(&[CONTROLPLANE], &[PORT, "--healthz-ip", "::"]);
    let took = wait_answer(&node, "/healthz", RUNNING);
    println!("listening after {took:?}");
    wait_answer(&node, "/readyz", NOT_READY);
    let (_, text) = get(&node, "::1", "/readyz?verbose").unwrap();
    assert_eq!(text, "flanneld is not ready yet\nno leases yet\n");
    assert_eq!(get(&node, "::1", "/").unwrap().0, 404);
    // Ready with the last route.
    node.write_leases(&[lease(1), lease(2), lease(3)]);
    let took = wait_answer(&node, "/readyz", READY);
    println!("ready {took:?} after the leases came");
    let routes = node.namespace.ip("route show dev flannel.1");
    assert!(
        routes.contains("10.244.2.0/24") && routes.contains("10.244.3.0/24"),
        "{routes}"
    );
    let env = node.directory.path().join("flannel/subnet.env");
    assert!(env.exists());
    // Workers that have not taken up the table yet.
    let data_plane = FakeDataPlane::start(&node);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    wait_answer(&node, "/readyz", READY);
    let generation = node.wait_resolved(&["n2", "n3"]);
    data_plane.accept_until.store(generation, Ordering::Relaxed);
    let mut added = lease(4);
    added.public_ip = "10.199.0.2".parse().unwrap();
    node.write_leases(&[lease(1), lease(2), lease(3), added]);
    wait_answer(&node, "/readyz", NOT_READY);
    let (_, text) = get(&node, "127.0.0.1", "/readyz?verbose").unwrap();
    assert!(text.contains("workers have not taken up"), "{text}");
    assert_eq!(metrics(&node)["ripstop_ready"], 0.0);
    data_plane.accept_until.store(u64::MAX, Ordering::Relaxed);
    wait_answer(&node, "/readyz", READY);
    // Workers that stand still are none: the kernel's path is complete.
    data_plane.accept_until.store(1, Ordering::Relaxed);
    wait_answer(&node, "/readyz", NOT_READY);
    data_plane.stalled.store(true, Ordering::Relaxed);
    wait_answer(&node, "/readyz", READY);
    // The subnet file cannot be written.
    std::fs::remove_dir_all(env.parent().unwrap()).unwrap();
    std::fs::write(env.parent().unwrap(), "").unwrap();
    wait_answer(&node, "/readyz", NOT_READY);
    std::fs::remove_file(env.parent().unwrap()).unwrap();
    wait_answer(&node, "/readyz", READY);
    wait_answer(&node, "/healthz", RUNNING);
    let log = stop(process);
    assert!(
        log.contains("not ready: no leases yet") && !log.contains("not taken up"),
        "told until it was ready once: {log}"
    );
}

#[test]
fn an_entry_that_the_kernel_refuses_is_named_and_delays_nothing() {
    let node = Node::new(1);
    node.write_conf(&backend(r#"{"Type":"host-gw"}"#));
    // Such a route needs a gateway on the link, which this one is not.
    let mut far = lease(3);
    far.public_ip = "172.16.8.8".parse().unwrap();
    node.write_leases(&[lease(1), lease(2), far]);
    let process = node.start_through(&["env", "FLANNELD_HEALTHZ_PORT=8081", CONTROLPLANE], &[]);
    wait_answer(&node, "/readyz", READY);
    let seen = metrics(&node);
    println!("{:?}", node.state().problems);
    assert_eq!(seen["ripstop_problem{part=\"standby\"}"], 1.0);
    assert_eq!(seen["ripstop_standby_complete"], 1.0);
    assert!(seen["ripstop_reconcile_failures_total{step=\"standby\"}"] > 0.0);
    assert!(
        node.namespace
            .ip("route")
            .contains("10.244.2.0/24 via 10.199.0.2")
    );
    stop(process);
}

#[test]
fn the_exposition_is_valid_whole_and_moves() {
    let node = Node::new(1);
    node.write_leases(&[lease(1), lease(2), lease(3)]);
    let process = node.start_through(&[CONTROLPLANE], &[PORT]);
    node.wait_resolved(&["n2", "n3"]);
    let data_plane = FakeDataPlane::start(&node);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    eventually("the filter and the guard", || {
        let listing = node.namespace.try_command("nft", "list tables");
        let listing = String::from_utf8(listing.stdout).unwrap();
        (listing.contains("ip ripstop") && listing.contains("ripstop-guard")).then_some(())
    });
    data_plane.change(|shown| {
        shown.counters.add(Counter::NicRxPackets, 1000);
        shown.counters.add(Counter::NicRxBytes, 1_000_000);
        shown.counters.add(Counter::Turns, 50);
        shown.counters.add(Counter::BusyTurns, 40);
        shown.counters.add(Counter::BusyCycles, 120_000);
        shown.counters.drops[DropReason::InnerSource.index()] = 7;
        shown.kernel[3] = 5;
        shown.mode = Mode::ZeroCopy;
        // A name that needs every escape.
        shown.nic = Some(NicStats {
            nic: "a\"b\\c\nd".to_owned(),
            queues: 2,
            native: true,
            counters: [3; XdpCounter::COUNT],
        });
    });
    // The counters of nft are read every two seconds at most.
    let wanted = "ripstop_filter_drops_total{reason=\"guard_node_source\"}";
    eventually("all figures", || {
        let now = metrics(&node);
        let busy = "ripstop_worker_turns_total{nic=\"eth0\",queue=\"0\",state=\"busy\"}";
        (now.contains_key(wanted) && now.get(busy) == Some(&40.0)).then_some(())
    });
    let before = metrics(&node);
    let worker = |name: &str, labels: &str| {
        before[&format!("ripstop_worker_{name}{{nic=\"eth0\",queue=\"0\"{labels}}}")]
    };
    assert_eq!(
        worker("packets_total", ",port=\"nic\",direction=\"receive\""),
        1000.0
    );
    assert_eq!(
        worker("bytes_total", ",port=\"nic\",direction=\"receive\""),
        1e6
    );
    assert_eq!(worker("drops_total", ",reason=\"inner_source\""), 7.0);
    assert_eq!(worker("turns_total", ",state=\"idle\""), 10.0);
    assert_eq!(worker("cycles_total", ",state=\"busy\""), 120_000.0);
    assert_eq!(
        worker("socket_drops_total", ",reason=\"rx_ring_full\""),
        5.0
    );
    assert!(worker("heartbeat_age_seconds", "") < 1.0);
    for (id, value) in [
        (
            "ripstop_worker_info{nic=\"eth0\",queue=\"0\",cpu=\"0\",mode=\"zero-copy\",polling=\"adaptive\",host_door=\"tun\",huge_pages=\"false\",numa_node=\"\"}",
            1.0,
        ),
        ("ripstop_nic_queues{nic=\"a\\\"b\\\\c\\nd\"}", 2.0),
        ("ripstop_process_up{process=\"controlplane\"}", 1.0),
        ("ripstop_process_up{process=\"dataplane\"}", 1.0),
        ("ripstop_leases{family=\"ipv4\"}", 3.0),
        ("ripstop_leases{family=\"ipv6\"}", 0.0),
        ("ripstop_peers{family=\"ipv4\",state=\"resolved\"}", 2.0),
        ("ripstop_peers{family=\"ipv4\",state=\"unresolved\"}", 0.0),
        ("ripstop_detour_active", 1.0),
        ("ripstop_detour_routes", 2.0),
        ("ripstop_standby_in_use", 0.0),
        ("ripstop_standby_complete", 1.0),
        ("ripstop_ready", 1.0),
        ("ripstop_standby_entries_healed_total", 0.0),
        ("ripstop_reconcile_failures_total{step=\"standby\"}", 0.0),
    ] {
        assert_eq!(before.get(id), Some(&value), "{id}");
    }
    assert!(!before.keys().any(|id| id.starts_with("ripstop_problem")));
    let generation = before["ripstop_fib_generation"];
    assert!(generation >= 1.0 && before["ripstop_fib_generation_taken_up"] == generation);
    let started = before["ripstop_process_start_time_seconds{process=\"controlplane\"}"];
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!((now - 60.0..now).contains(&started), "{started} at {now}");

    // Somebody deletes a route; a lease comes; one peer cannot be reached.
    node.namespace.ip("route del 10.244.2.0/24");
    node.wait_ip("route", |routes| routes.contains("10.244.2.0/24"));
    let mut far = lease(4);
    far.public_ip = "172.16.8.8".parse().unwrap();
    node.write_leases(&[lease(1), lease(2), lease(3), far]);
    eventually("the figures follow", || {
        let now = metrics(&node);
        let is = |id: &str, value: f64| now[id] == value;
        (is("ripstop_peers{family=\"ipv4\",state=\"unresolved\"}", 1.0)
            && is("ripstop_standby_in_use", 1.0)
            && is("ripstop_standby_entries_healed_total", 1.0)
            && is(
                "ripstop_fib_generation_taken_up",
                now["ripstop_fib_generation"],
            )
            && now["ripstop_take_up_duration_seconds_count"] >= 1.0)
            .then_some(())
    });
    let after = metrics(&node);
    assert!(after["ripstop_reconcile_rounds_total"] > before["ripstop_reconcile_rounds_total"]);
    for histogram in ["publish", "lease_to_published"] {
        let count = format!("ripstop_{histogram}_duration_seconds_count");
        assert!(after[&count] > before[&count], "{count}");
        let sum = after[&format!("ripstop_{histogram}_duration_seconds_sum")];
        println!("{histogram}: {:.6} s each", sum / after[&count]);
    }

    // All that the list promises is there, once something is wrong, too.
    node.write_lease_text("{");
    eventually("the problem", || {
        let now = metrics(&node);
        now.contains_key("ripstop_problem{part=\"leases\"}")
            .then_some(())
    });
    let text = get(&node, "127.0.0.1", "/metrics").unwrap().1;
    for metric in Metric::ALL {
        let kind = format!("# TYPE {} {}\n", metric.name(), metric.kind_name());
        assert!(text.contains(&kind), "{kind}");
        for label in metric.labels() {
            let line = text
                .lines()
                .find(|line| line.starts_with(&format!("{}{{", metric.name())));
            assert!(
                line.unwrap().contains(&format!("{label}=\"")),
                "{metric:?} {label}"
            );
        }
    }
    let start = std::time::Instant::now();
    for _ in 0..20 {
        metrics(&node);
    }
    println!("{} bytes in {:?}", text.len(), start.elapsed() / 20);

    // The same from outside, with and without the process, but for what only it knows.
    let ids =
        |series: &BTreeMap<String, f64>| -> BTreeSet<String> { series.keys().cloned().collect() };
    let known = ids(&parsed(&text).unwrap());
    let cli = || {
        let (text, code) = node.cli("metrics");
        assert_eq!(code, 0, "{text}");
        parsed(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
    };
    let outside = cli();
    let missing: Vec<_> = known.difference(&ids(&outside)).cloned().collect();
    let live = [
        "reconcile",
        "duration_seconds",
        "standby_entries",
        "kubernetes",
        "ready",
        "standby_complete",
    ];
    assert!(
        missing
            .iter()
            .all(|id| live.iter().any(|part| id.contains(part))),
        "{missing:?}"
    );
    assert_eq!(outside["ripstop_detour_routes"], 2.0);
    assert_eq!(outside["ripstop_problem{part=\"leases\"}"], 1.0);
    process.signal(libc::SIGKILL);
    drop(process);
    data_plane.change(|shown| shown.counters.add(Counter::NicRxPackets, 1));
    eventually("workers are seen without a control plane", || {
        let packets = "ripstop_worker_packets_total{nic=\"eth0\",queue=\"0\",port=\"nic\",direction=\"receive\"}";
        (cli()[packets] == 1001.0).then_some(())
    });
    let dead = cli();
    assert_eq!(dead["ripstop_process_up{process=\"controlplane\"}"], 0.0);
    assert_eq!(dead["ripstop_process_up{process=\"dataplane\"}"], 1.0);
    assert_eq!(dead["ripstop_leases{family=\"ipv4\"}"], 4.0);
    assert!(!dead.contains_key("ripstop_problem{part=\"leases\"}"));
    // For the textfile collector.
    let file = node.directory.path().join("ripstop.prom");
    let (text, code) = node.cli(&format!("metrics --output {}", file.display()));
    assert_eq!((text.as_str(), code), ("", 0));
    parsed(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(node.cli("metrics --output /nowhere/ripstop.prom").1, 1);
    assert_eq!(node.cli("metrics --json").1, 1);
}

#[test]
fn the_readme_and_the_dashboard_name_what_there_is() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let table = readme_table();
    assert!(
        readme.contains(&table),
        "the README's table of metrics is:\n{table}"
    );
    let dashboard = std::fs::read(root.join("../configs/grafana/ripstop.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    let mut expressions = Vec::new();
    collect_expressions(&dashboard, &mut expressions);
    assert!(expressions.len() > 20, "{expressions:?}");
    for expression in &expressions {
        let words =
            expression.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
        let mut count = 0;
        for word in words.filter(|word| word.starts_with("ripstop_")) {
            let is_it = |metric: &&Metric| match metric.kind_name() {
                "histogram" => ["_bucket", "_sum", "_count"]
                    .iter()
                    .any(|end| word.strip_suffix(end) == Some(metric.name())),
                _ => word == metric.name(),
            };
            assert!(
                Metric::ALL.iter().any(|metric| is_it(&metric)),
                "{word}: {expression}"
            );
            count += 1;
        }
        assert!(count > 0, "{expression}");
    }
}

fn collect_expressions(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match (key.as_str(), value) {
                    ("expr", Value::String(text)) => out.push(text.clone()),
                    (_, value) => collect_expressions(value, out),
                }
            }
        }
        Value::Array(values) => values
            .iter()
            .for_each(|value| collect_expressions(value, out)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A node of a cluster, with the API server in its namespace.
fn cluster() -> (Node, Api) {
    let node = Node::new(1);
    node.write_conf(VXLAN);
    node.namespace.ip("route add default via 10.199.0.254");
    let api = Api::serve(
        node.namespace
            .enter(|| TcpListener::bind("127.0.0.1:0").unwrap()),
    );
    api.create("n1", &["10.244.1.0/24"], &Value::Null);
    let peer = json!({
        "flannel.alpha.coreos.com/backend-data": r#"{"VNI":1,"VtepMAC":"12:d3:27:c5:15:72"}"#,
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": "10.199.0.2",
    });
    api.create("n2", &["10.244.2.0/24"], &peer);
    (node, api)
}

fn start_kube(node: &Node, api: &Api) -> Process {
    let kubeconfig = node.directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig()).unwrap();
    let flags = [
        PORT,
        "--kube-subnet-mgr",
        "--kubeconfig-file",
        kubeconfig.to_str().unwrap(),
    ];
    node.start_through(&[CONTROLPLANE], &flags)
}

fn event(api: &Api, reason: &str) -> Option<Value> {
    let mut events = api.events().into_iter();
    events.find(|event| event["reason"] == reason)
}

#[test]
fn operators_are_told_by_events_on_the_node() {
    let (node, api) = cluster();
    let process = start_kube(&node, &api);
    node.wait_resolved(&["n2"]);
    let data_plane = FakeDataPlane::start(&node);
    node.wait_ip("route get 10.244.2.7", |route| route.contains("dev rip0"));
    // The worker wants zero-copy and has it not.
    let (short, took) = eventually("an event", || event(&api, "ZeroCopyUnavailable"));
    println!("told after {took:?}: {short}");
    let stamp = short["firstTimestamp"].as_str().unwrap().to_owned();
    assert!(stamp.len() == 20 && stamp.ends_with('Z'), "{stamp}");
    let name = short["metadata"]["name"].as_str().unwrap().to_owned();
    let message = short["message"].as_str().unwrap().to_owned();
    assert!(message.contains("eth0 queue 0 (copy)"), "{message}");
    assert_eq!(
        short,
        json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": "default"},
            "involvedObject": {"kind": "Node", "name": "n1", "uid": "n1"},
            "reason": "ZeroCopyUnavailable", "message": message, "type": "Warning",
            "source": {"component": "ripstop", "host": "n1"},
            "firstTimestamp": stamp, "lastTimestamp": stamp, "count": 1,
            "reportingComponent": "ripstop", "reportingInstance": "n1",
        })
    );
    let posts = || {
        let requests = api.requests("EVENT").into_iter();
        requests.filter(|request| request.method == "POST").count()
    };
    assert_eq!(posts(), 1);
    // Watched all the time: the loop has seen the detour, the events thread within a second.
    std::thread::sleep(Duration::from_millis(1500));
    data_plane.stalled.store(true, Ordering::Relaxed);
    let (fallen, _) = eventually("an event", || event(&api, "StandbyInUse"));
    let message = fallen["message"].as_str().unwrap();
    assert!(message.contains("no sign of life"), "{message}");
    data_plane.stalled.store(false, Ordering::Relaxed);
    let (back, _) = eventually("an event", || event(&api, "WorkersInUse"));
    assert_eq!(back["type"], "Normal");
    // A scan, for long: one event.
    for _ in 0..30 {
        data_plane.change(|shown| shown.counters.drops[DropReason::UnknownPeer.index()] += 2000);
        std::thread::sleep(Duration::from_millis(100));
    }
    let (burst, _) = eventually("an event", || event(&api, "UnknownSources"));
    assert!(burst["message"].as_str().unwrap().contains("ripstop drops"));
    assert_eq!(posts(), 4, "{:?}", api.events());
    eventually("they are counted", || {
        (metrics(&node)["ripstop_kubernetes_events_total{outcome=\"sent\"}"] >= 4.0).then_some(())
    });
    stop(process);
}

#[test]
fn events_that_are_refused_disturb_nothing() {
    let (node, api) = cluster();
    api.habits(|habits| habits.refusals = vec![("EVENT", 403, usize::MAX)]);
    let process = start_kube(&node, &api);
    node.wait_resolved(&["n2"]);
    let _data_plane = FakeDataPlane::start(&node);
    let refused = "ripstop_kubernetes_events_total{outcome=\"refused\"}";
    eventually("a refusal", || {
        let now = metrics(&node);
        (now[refused] == 1.0).then_some(())
    });
    // Leases go on, and the node is ready.
    wait_answer(&node, "/readyz", READY);
    api.delete("n2");
    node.wait_resolved(&[]);
    let log = stop(process);
    assert_eq!(
        log.matches("Kubernetes Events are not written").count(),
        1,
        "{log}"
    );
    assert!(
        log.contains("resources: [events], verbs: [create, patch]"),
        "{log}"
    );
}

#[test]
fn a_server_that_is_away_is_no_reason_to_be_dead() {
    let (node, api) = cluster();
    api.habits(|habits| habits.frozen = true);
    let process = start_kube(&node, &api);
    let took = wait_answer(&node, "/healthz", RUNNING);
    println!("listening after {took:?}, without an answer of the API server");
    wait_answer(&node, "/readyz", NOT_READY);
    api.habits(|habits| habits.frozen = false);
    wait_answer(&node, "/readyz", READY);
    stop(process);
    // Nor is an etcd, which even the configuration has to come from.
    let process = node.start_through(
        &[CONTROLPLANE],
        &[PORT, "--etcd-endpoints=http://127.0.0.1:1"],
    );
    wait_answer(&node, "/healthz", RUNNING);
    wait_answer(&node, "/readyz", NOT_READY);
    stop(process);
}
