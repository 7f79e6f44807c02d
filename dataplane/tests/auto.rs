//! What templates come to on machines of many shapes, and what is said about those that come to nothing.

#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use ripstop_dataplane::auto::{self, NetFiles, Resolved};
use ripstop_dataplane::config::{
    self, Capabilities, ConfigErrors, Configured, HostFacts, NumaNode, Polling,
};
use ripstop_dataplane::nic::Nic;

fn load(files: &[(&str, &str)]) -> Result<Configured, ConfigErrors> {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    config::load_dir(directory.path())
}

/// A machine with these CPUs, those that share the core of another one, CPUs of NUMA nodes, and NICs with their queues and
/// node.
fn machine(cpus: &str, siblings: &[u32], nodes: &[&[u32]], nics: &[(&str, u32, u32)]) -> HostFacts {
    let nic = |(index, (name, rx_queues, node)): (usize, &(&str, u32, u32))| {
        let nic = Nic {
            name: (*name).into(),
            index: u32::try_from(index).unwrap() + 2,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            up: true,
            rx_queues: *rx_queues,
            driver: "mlx5_core".into(),
            numa_node: Some(*node),
        };
        ((*name).to_owned(), nic)
    };
    let node = |cpus: &&[u32]| NumaNode {
        cpus: cpus.iter().copied().collect(),
        ..NumaNode::default()
    };
    let allowed = cpus.split(',').map(|cpu| cpu.parse().unwrap());
    HostFacts {
        cpus: allowed.collect(),
        nics: nics.iter().enumerate().map(nic).collect(),
        nic_names: nics.iter().map(|(name, ..)| (*name).to_owned()).collect(),
        locked_bytes_max: None,
        capabilities: Capabilities::from_bits(u64::MAX),
        huge_pages_free: 0,
        huge_pages_total: 0,
        numa_nodes: (0..).zip(nodes.iter().map(node)).collect(),
        siblings: siblings.iter().copied().collect(),
    }
}

struct Plan {
    /// NIC, queue, CPU.
    placed: Vec<(String, u32, u32)>,
    polling: BTreeSet<&'static str>,
    said: String,
    files: BTreeMap<String, String>,
}

fn plan(host: &HostFacts, files: &[(&str, &str)]) -> Result<Plan, ConfigErrors> {
    let configured = load(files)?;
    let ifaces = ["nic-of-nobody".to_owned(), "lo".to_owned()];
    let resolved = auto::resolve(configured.templates, &ifaces, &NetFiles::default())?;
    expand(host, &configured.workers, &resolved, 64)
}

fn expand(
    host: &HostFacts,
    fixed: &[config::WorkerConfig],
    resolved: &[Resolved],
    places: usize,
) -> Result<Plan, ConfigErrors> {
    let mut said = Vec::new();
    let workers = auto::expand(fixed, resolved, host, places, |text| said.push(text))?;
    let place = |worker: &auto::Worker| {
        let config = &worker.config;
        (config.nic.clone(), config.queue, config.cpu)
    };
    let polling = |worker: &auto::Worker| match worker.config.polling {
        Polling::Busy => "busy",
        Polling::Adaptive => "adaptive",
    };
    Ok(Plan {
        placed: workers.iter().map(place).collect(),
        polling: workers.iter().map(polling).collect(),
        said: said.join("\n"),
        files: (workers.iter())
            .map(|worker| (worker.file_name(), worker.text.clone()))
            .collect(),
    })
}

const ETH0: &str = r#"{"nic": "eth0", "queues": "auto"}"#;
const BUSY: &str = r#"{"nic": "eth0", "queues": "auto", "polling": "busy"}"#;

/// CPUs of `eth0`'s queues, in the order of the queues.
fn cpus_of(host: &HostFacts, template: &str) -> Vec<u32> {
    let plan = plan(host, &[("template.json", template)]).unwrap();
    let queues: Vec<u32> = plan.placed.iter().map(|(_, queue, _)| *queue).collect();
    let expected = host.nics["eth0"].rx_queues;
    assert_eq!(queues, (0..expected).collect::<Vec<_>>());
    plan.placed.iter().map(|(_, _, cpu)| *cpu).collect()
}

#[test]
fn each_queue_gets_the_best_cpu_that_is_left() {
    // Eight CPUs in four cores on two nodes: 0,4 1,5 on the first, 2,6 3,7 on the second.
    let nodes: &[&[u32]] = &[&[0, 1, 4, 5], &[2, 3, 6, 7]];
    let two_nodes =
        |queues, node, cpus| machine(cpus, &[4, 5, 6, 7], nodes, &[("eth0", queues, node)]);
    let all = "0,1,2,3,4,5,6,7";
    for (queues, node, cpus, expected) in [
        (1, 0, all, &[1][..]),
        // The node's other core, then the second threads, then the far node.
        (4, 0, all, &[1, 0, 4, 5]),
        (4, 1, all, &[2, 3, 6, 7]),
        (8, 1, all, &[2, 3, 6, 7, 1, 0, 4, 5]),
        // A cpuset: never outside it, near or not.
        (2, 1, "0,1", &[1, 0]),
        (3, 1, "1,2,6", &[2, 6, 1]),
        // Fewer CPUs than queues: each gets its share.
        (5, 1, "2,3", &[2, 3, 2, 3, 2]),
        (3, 0, "0", &[0, 0, 0]),
    ] {
        let host = two_nodes(queues, node, cpus);
        assert_eq!(cpus_of(&host, ETH0), expected, "{queues} queues, {cpus}");
    }
    // One node, or none that is told: which one the NIC names makes no difference.
    let flat = machine("0,1,2", &[], &[&[0, 1, 2]], &[("eth0", 3, 1)]);
    assert_eq!(cpus_of(&flat, ETH0), [1, 2, 0]);
    let chosen = r#"{"nic": "eth0", "queues": "auto", "cpus": "0,2-9"}"#;
    assert_eq!(cpus_of(&flat, chosen), [2, 0, 2]);
}

#[test]
fn nics_share_the_near_cpus_and_leave_those_of_others() {
    let nodes: &[&[u32]] = &[&[0, 1, 2, 3], &[4, 5]];
    let nics = [("eth0", 2, 0), ("eth1", 2, 0)];
    let host = machine("0,1,2,3,4,5", &[], nodes, &nics);
    let eth1 = r#"{"nic": "eth1", "queues": "auto"}"#;
    let both = plan(&host, &[("a.json", ETH0), ("b.json", eth1)]).unwrap();
    let placed = |nic: &str, queue, cpu| (nic.to_owned(), queue, cpu);
    assert_eq!(
        both.placed,
        [
            placed("eth0", 0, 1),
            placed("eth1", 0, 2),
            placed("eth0", 1, 3),
            placed("eth1", 1, 0),
        ]
    );
    // A file of its own takes its queue out of the template, and its CPU is the last to be taken again.
    let own = r#"{"nic": "eth0", "queue": 0, "cpu": 3}"#;
    let rest = plan(&host, &[("a.json", ETH0), ("eth0-q0.json", own)]).unwrap();
    assert_eq!(rest.placed, [placed("eth0", 1, 1)]);
    let rest = plan(&host, &[("b.json", eth1), ("eth0-q0.json", own)]).unwrap();
    assert_eq!(rest.placed, [placed("eth1", 0, 1), placed("eth1", 1, 2)]);
    let some = r#"{"nic": "eth0", "queues": "1"}"#;
    assert_eq!(
        plan(&host, &[("a.json", some)]).unwrap().placed,
        [placed("eth0", 1, 1)]
    );
}

#[test]
fn workers_that_never_sleep_leave_room_or_learn_to() {
    let nodes: &[&[u32]] = &[&[0, 1, 2, 3]];
    for (queues, polling, said) in [
        (3, "busy", None),
        (4, "adaptive", Some("no CPU would be left")),
        (5, "adaptive", Some("too few")),
    ] {
        let host = machine("0,1,2,3", &[], nodes, &[("eth0", queues, 0)]);
        let plan = plan(&host, &[("template.json", BUSY)]).unwrap();
        assert_eq!(plan.polling, BTreeSet::from([polling]), "{queues} queues");
        assert_eq!(
            plan.said.contains("adaptive"),
            said.is_some(),
            "{}",
            plan.said
        );
        assert!(
            plan.said.contains(said.unwrap_or_default()),
            "{}",
            plan.said
        );
        let in_file = format!("\"polling\": \"{polling}\"");
        assert!(plan.files["eth0-q0.json"].contains(&in_file));
    }
    // Only those that share: two of three, when the template has two CPUs of four.
    let host = machine("0,1,2,3", &[], nodes, &[("eth0", 3, 0)]);
    let two = BUSY.replace('}', r#", "cpus": "2-3"}"#);
    let plan = plan(&host, &[("template.json", &two)]).unwrap();
    assert!(
        plan.said.contains("polling of 2 worker(s)"),
        "{}",
        plan.said
    );
    assert_eq!(plan.polling.len(), 2);
}

#[test]
fn the_choice_is_explained() {
    let nodes: &[&[u32]] = &[&[0, 1], &[2, 3]];
    let host = machine("0,1,2,3", &[], nodes, &[("eth0", 2, 1)]);
    let plan = plan(&host, &[("template.json", ETH0)]).unwrap();
    for part in [
        "template.json: NIC eth0 (named there) has 2 receive queue(s)",
        "NUMA node 1 (CPUs 2-3)",
        "of 0-3 allowed: 0 on 2, 1 on 3",
    ] {
        assert!(plan.said.contains(part), "{part:?} is not in {}", plan.said);
    }
}

#[test]
fn there_are_never_more_workers_than_places() {
    let host = machine("0,1,2,3", &[], &[], &[("eth0", 200, 0)]);
    let configured = load(&[("template.json", ETH0)]).unwrap();
    let resolved = auto::resolve(configured.templates, &[], &NetFiles::default()).unwrap();
    let plan = expand(&host, &[], &resolved, 64).unwrap();
    assert_eq!(plan.placed.len(), 64);
    assert!(
        plan.said.contains("200 queues want a worker"),
        "{}",
        plan.said
    );
}

/// The files say exactly what the workers do, and go beside the template without a conflict.
#[test]
fn what_is_written_is_what_would_run() {
    let template = r#"{
        "nic": "eth0", "queues": "auto", "mode": "copy", "polling": "busy", "burst": 32, "hugePages": false,
        "rings": {"rx": 64, "tx": 64, "fill": 128, "completion": 64}, "umem": {"frameSize": 2048},
        "busyPoll": {"microseconds": 20, "budget": 64}, "interrupt": "auto",
        "napiDeferral": {"hardIrqs": 2, "timeoutMicroseconds": 200}
    }"#;
    let host = machine("0,1,2", &[], &[], &[("eth0", 3, 0)]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("template.json"), template).unwrap();
    let configured = config::load_dir(directory.path()).unwrap();
    let resolved = auto::resolve(configured.templates, &[], &NetFiles::default()).unwrap();
    let workers = auto::expand(&[], &resolved, &host, 64, |_| ()).unwrap();
    let written = auto::write(directory.path(), &workers).unwrap();
    assert_eq!(
        written,
        ["eth0-q0.json", "eth0-q1.json", "eth0-q2.json"].map(path)
    );

    let again = config::load_dir(directory.path()).unwrap();
    assert_eq!(again.templates, [resolved[0].template.clone()]);
    let mut meant: Vec<_> = workers.iter().map(|worker| worker.config.clone()).collect();
    for (worker, file) in meant.iter_mut().zip(written) {
        worker.file = file;
    }
    assert_eq!(again.workers, meant);
    let rest = auto::expand(&again.workers, &resolved, &host, 61, |_| ()).unwrap();
    assert_eq!(rest, []);

    // What somebody may have edited is not written over.
    fs::remove_file(path("eth0-q0.json")).unwrap();
    let error = auto::write(directory.path(), &workers)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("eth0-q1.json") && error.contains("nothing was written"),
        "{error}"
    );
    assert!(!path("eth0-q0.json").exists());
    let other = directory.path().join("a/b");
    assert_eq!(auto::write(&other, &workers).unwrap().len(), 3);
}

#[test]
fn bad_templates_are_one_clear_error_each() {
    let table: &[(&str, &[&str])] = &[
        (r#"{"queues": "auto"}"#, &["missing field `nic`"]),
        (
            r#"{"nic": "eth0", "queues": 4}"#,
            &["invalid type: integer `4`"],
        ),
        (
            r#"{"nic": "eth0", "queues": "all"}"#,
            &["queues: \"all\"", "\"auto\"", "0-3,8"],
        ),
        (r#"{"nic": "eth0", "queues": "3-1"}"#, &["queues: \"3-1\""]),
        (
            r#"{"nic": "eth0", "queues": "auto", "cpus": "0,"}"#,
            &["cpus: \"0,\""],
        ),
        (
            r#"{"nic": "eth0", "queues": "auto", "cpus": [1]}"#,
            &["invalid type: sequence"],
        ),
        (
            r#"{"nic": "eth0", "queues": "auto", "queue": 0}"#,
            &["queue and queues do not go together"],
        ),
        (
            r#"{"nic": "eth0", "queues": "auto", "cpu": 0}"#,
            &["cpu and queues do not go together"],
        ),
        (
            r#"{"nic": "eth0", "queue": 0, "cpu": 0, "cpus": "1"}"#,
            &["queue and cpus do not"],
        ),
        (
            r#"{"nic": "eth0", "queues": "auto", "burst": 0}"#,
            &["burst: 0"],
        ),
        (
            r#"{"nic": "a-name-of-16-byt", "queues": "auto"}"#,
            &["a-name-of-16-byt"],
        ),
        (
            r#"{"nic": "eth0", "queues": "auto", "speed": 1}"#,
            &["unknown field `speed`", "line 1"],
        ),
    ];
    for (text, parts) in table {
        let errors = load(&[("template.json", text)]).unwrap_err();
        let said = errors.to_string();
        assert_eq!(errors.errors().len(), 1, "{said}");
        for part in parts.iter().chain(&["template.json: "]) {
            assert!(said.contains(part), "{part:?} is not in: {said}");
        }
    }
}

#[test]
fn a_file_without_queues_is_for_one_queue() {
    let errors = load(&[("q.json", r#"{"nic": "eth0", "cpus": "1"}"#)]).unwrap_err();
    let said = errors.to_string();
    assert_eq!(errors.errors().len(), 2, "{said}");
    for part in ["missing field `queue`", "missing field `cpu`"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn templates_that_fit_nothing_here_are_told() {
    let host = machine("0,1", &[], &[], &[("eth0", 2, 0)]);
    let said = |files: &[(&str, &str)]| plan(&host, files).err().unwrap().to_string();
    let unknown = said(&[("template.json", &ETH0.replace("eth0", "eth7"))]);
    for part in ["template.json: nic: eth7 does not exist", "use one of eth0"] {
        assert!(unknown.contains(part), "{unknown}");
    }
    let nowhere = said(&[("template.json", &ETH0.replace('}', r#", "cpus": "6-7"}"#))]);
    for part in ["cpus: ", "none of 6-7", "only on 0-1"] {
        assert!(nowhere.contains(part), "{nowhere}");
    }
    let twice = said(&[("a.json", ETH0), ("b.json", ETH0)]);
    for part in ["a.json and ", "b.json", "templates for NIC eth0"] {
        assert!(twice.contains(part), "{twice}");
    }
    let auto = ETH0.replace("eth0", "auto");
    // The first of the interfaces named that exists is taken: here lo, which the machine above lacks.
    let loopback = said(&[("template.json", &auto)]);
    assert!(loopback.contains("nic: lo does not exist"), "{loopback}");
    let templates = load(&[("template.json", &auto)]).unwrap().templates;
    let none = NetFiles::below(Path::new("/nonexistent"));
    let no_route = auto::resolve(templates.clone(), &[], &none)
        .unwrap_err()
        .to_string();
    for part in ["nic: \"auto\" finds none", "no default route", "--iface"] {
        assert!(no_route.contains(part), "{no_route}");
    }
    let nobody = ["nic-of-nobody".to_owned(), "192.0.2.77".to_owned()];
    let nobody = auto::resolve(templates, &nobody, &none)
        .unwrap_err()
        .to_string();
    for part in ["--iface nic-of-nobody, 192.0.2.77", "lo"] {
        assert!(nobody.contains(part), "{nobody}");
    }
}
