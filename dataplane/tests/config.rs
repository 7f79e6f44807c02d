//! What the configuration of the workers accepts, and what it says about the
//! rest: every error names the file, the key, the value and the way out.

#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use ripstop_dataplane::config::{
    self, BusyPoll, Capabilities, Coalesce, ConfigErrors, ConfigWarning, File, FrameSize, HostDoor,
    HostFacts, Interrupt, Mode, NapiDeferral, NumaNode, Polling, Transmit, WorkerConfig,
};
use ripstop_dataplane::nic::Nic;
use ripstop_dataplane::tun::Offloads;

const MINIMAL: &str = r#"{"nic": "eth0", "queue": 0, "cpu": 1}"#;

/// Loads a directory of these files.
fn load(files: &[(&str, &str)]) -> Result<Vec<WorkerConfig>, ConfigErrors> {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    config::load_dir(directory.path()).map(|configured| configured.workers)
}

/// One worker, from a minimal file with `keys` added.
fn worker(keys: &str) -> WorkerConfig {
    let text = format!(r#"{{"nic": "eth0", "queue": 0, "cpu": 1 {keys}}}"#);
    load(&[("eth0-q0.json", &text)]).unwrap().remove(0)
}

/// Every one of `parts` is said, in one error per line.
fn assert_says(errors: &ConfigErrors, lines: usize, parts: &[&str]) {
    let text = errors.to_string();
    assert_eq!(errors.errors().len(), lines, "{text}");
    assert_eq!(text.lines().count(), lines, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn a_minimal_file_gets_the_defaults() {
    let worker = worker("");
    assert_eq!(
        (worker.nic.as_str(), worker.queue, worker.cpu),
        ("eth0", 0, 1)
    );
    assert_eq!(worker.mode, Mode::Auto);
    let rings = [
        worker.rings.rx,
        worker.rings.tx,
        worker.rings.fill,
        worker.rings.completion,
    ];
    assert_eq!(rings.map(|ring| ring.entries()), [2048, 2048, 4096, 2048]);
    assert_eq!(worker.umem.frames(), 2048 + 2048 + 4096 + 2048 + 2 * 64);
    assert_eq!(worker.umem.frame_size(), FrameSize::Bytes4096);
    assert_eq!(worker.umem.bytes(), 10368 * 4096);
    assert!(!worker.umem.huge_pages());
    assert_eq!(worker.burst.frames(), 64);
    assert_eq!(worker.polling, Polling::Adaptive);
    assert_eq!(worker.host_door, HostDoor::Tun);
    assert_eq!(
        [worker.transmit, worker.door_transmit],
        [Transmit::AfXdp; 2]
    );
    assert_eq!(worker.host_offload, None);
    assert_eq!(worker.busy_poll, None);
    assert_eq!(worker.napi_deferral, None);
    assert_eq!(worker.interrupt, Interrupt::Keep);
}

#[test]
fn every_key_is_taken() {
    let worker = worker(
        r#", "mode": "zero-copy", "rings": {"rx": 64, "tx": 128, "fill": 256, "completion": 32768},
           "umem": {"frames": 40000, "frameSize": 2048}, "hugePages": true, "burst": 256, "polling": "busy",
           "hostDoor": {"kind": "tun", "offload": "off", "transmit": "af-xdp"}, "transmit": "af-xdp", "busyPoll": {"microseconds": 20, "budget": 64},
           "napiDeferral": {"hardIrqs": 2, "timeoutMicroseconds": 200}, "interrupt": "other-cpus""#,
    );
    assert_eq!(worker.host_offload, Some(Offloads::Off));
    let deferral = NapiDeferral {
        hard_irqs: 2,
        timeout_microseconds: 200,
    };
    assert_eq!(worker.napi_deferral, Some(deferral));
    assert_eq!(worker.interrupt, Interrupt::OtherCpus);
    assert_eq!(
        (worker.mode, worker.polling),
        (Mode::ZeroCopy, Polling::Busy)
    );
    let rings = [
        worker.rings.rx,
        worker.rings.tx,
        worker.rings.fill,
        worker.rings.completion,
    ];
    assert_eq!(rings.map(|ring| ring.entries()), [64, 128, 256, 32768]);
    assert_eq!(worker.umem.frame_size().packet_bytes_max(), 1792);
    // 40000 * 2048 is 78.125 MiB, which takes 40 huge pages.
    assert_eq!(worker.umem.bytes(), 40 << 21);
    let busy_poll = BusyPoll {
        microseconds: 20,
        budget: 64,
    };
    assert_eq!(worker.busy_poll, Some(busy_poll));
    assert_eq!(worker.coalesce, None);
    let worker = self::worker(r#", "coalesce": {"microseconds": 50, "packets": 32}"#);
    let coalesce = Coalesce {
        pause: Duration::from_micros(50),
        packets: 32,
    };
    assert_eq!(worker.coalesce, Some(coalesce));
}

#[test]
fn one_bad_value_is_one_clear_error() {
    let table: &[(&str, &[&str])] = &[
        (
            r#", "speed": 9"#,
            &[
                "unknown field `speed`",
                "line 1",
                "expected one of",
                "`queue`",
            ],
        ),
        (
            r#", "rings": {"rxx": 64}"#,
            &["unknown field `rxx`", "`rx`"],
        ),
        (
            r#", "umem": {"frame_size": 2048}"#,
            &["unknown field `frame_size`", "`frameSize`"],
        ),
        (
            r#", "hostDoor": {"kind": "tun", "name": "x"}"#,
            &["unknown field `name`"],
        ),
        (
            r#", "hostDoor": {"offload": "on"}"#,
            &["unknown variant `on`", "`auto`", "`off`"],
        ),
        (
            r#", "hostDoor": {"kind": "tap"}"#,
            &["unknown variant `tap`", "`tun`", "`veth`"],
        ),
        (
            r#", "hostDoor": {"kind": "veth", "transmit": "tunnel-gso"}"#,
            &["hostDoor.transmit: \"tunnel-gso\"", "the NIC"],
        ),
        (
            r#", "hostDoor": {"kind": "tun", "transmit": "inject"}"#,
            &["hostDoor.transmit: \"inject\"", "TUN", "\"veth\""],
        ),
        (
            r#", "hugePages": true, "transmit": "inject""#,
            &["transmit: \"inject\"", "hugePages"],
        ),
        (
            r#", "transmit": "dma""#,
            &["unknown variant `dma`", "`af-xdp`", "`inject`"],
        ),
        (
            r#", "mode": "fast""#,
            &[
                "unknown variant `fast`",
                "`auto`",
                "`zero-copy`",
                "`copy`",
                "`generic`",
            ],
        ),
        (
            r#", "polling": "lazy""#,
            &["unknown variant `lazy`", "`busy`", "`adaptive`"],
        ),
        (
            r#", "burst": "64""#,
            &["invalid type: string \"64\"", "line 1 column"],
        ),
        (
            r#", "interrupt": "far""#,
            &[
                "unknown variant `far`",
                "`keep`",
                "`auto`",
                "`worker-cpu`",
                "`other-cpus`",
            ],
        ),
        (
            r#", "napiDeferral": {"hardIrqs": 2}"#,
            &["missing field `timeoutMicroseconds`"],
        ),
        (
            r#", "napiDeferral": {"hardIrqs": 0, "timeoutMicroseconds": 200}"#,
            &["napiDeferral.hardIrqs: 0", "use 2"],
        ),
        (
            r#", "napiDeferral": {"hardIrqs": 2, "timeoutMicroseconds": 200000}"#,
            &["napiDeferral.timeoutMicroseconds: 200000", "use 200"],
        ),
        (r#", "queue": 1"#, &["duplicate field `queue`"]),
        (
            r#", "rings": {"rx": 1000}"#,
            &["rings.rx: 1000", "power of two", "64 to 32768", "use 1024"],
        ),
        (r#", "rings": {"tx": 0}"#, &["rings.tx: 0", "use 64"]),
        (r#", "rings": {"fill": 32}"#, &["rings.fill: 32", "use 64"]),
        (
            r#", "rings": {"completion": 65536}"#,
            &["rings.completion: 65536", "use 32768"],
        ),
        (
            r#", "rings": {"rx": 4294967295}"#,
            &["rings.rx: 4294967295", "use 32768"],
        ),
        (r#", "rings": {"rx": -1}"#, &["invalid value: integer `-1`"]),
        (r#", "burst": 0"#, &["burst: 0", "1 to 256"]),
        (r#", "burst": 257"#, &["burst: 257", "1 to 256"]),
        (
            r#", "umem": {"frameSize": 3000}"#,
            &["umem.frameSize: 3000", "2048", "4096"],
        ),
        (
            r#", "umem": {"frames": 10367}"#,
            &["umem.frames: 10367", "10368", "two bursts"],
        ),
        (
            r#", "umem": {"frames": 1048577}"#,
            &["umem.frames: 1048577", "1048576"],
        ),
        (
            r#", "busyPoll": {"microseconds": 20}"#,
            &["missing field `budget`"],
        ),
        (
            r#", "busyPoll": {"microseconds": 0, "budget": 64}"#,
            &["busyPoll.microseconds: 0", "use 20"],
        ),
        (
            r#", "busyPoll": {"microseconds": 20, "budget": 65536}"#,
            &["busyPoll.budget: 65536", "65535"],
        ),
        (
            r#", "coalesce": {"microseconds": 5001, "packets": 32}"#,
            &["coalesce.microseconds: 5001", "1 to 5000", "use 50"],
        ),
        (
            r#", "coalesce": {"microseconds": 50, "packets": 0}"#,
            &["coalesce.packets: 0", "use 32"],
        ),
        (
            r#", "polling": "busy", "coalesce": {"microseconds": 50, "packets": 32}"#,
            &["coalesce", "set polling to \"adaptive\""],
        ),
    ];
    for (keys, parts) in table {
        let text = format!(r#"{{"nic": "eth0", "queue": 0, "cpu": 1 {keys}}}"#);
        let errors = load(&[("eth0-q0.json", &text)]).unwrap_err();
        assert_says(&errors, 1, parts);
        assert_says(&errors, 1, &["eth0-q0.json: "]);
    }
}

#[test]
fn a_bad_file_is_one_clear_error() {
    let table: &[(&str, &[&str])] = &[
        ("", &["not JSON", "line 1"]),
        (
            r#"{"nic": "eth0", "qu"#,
            &["not JSON", "line 1 column 19", "half-written"],
        ),
        ("queue = 0", &["not JSON"]),
        ("{}", &["missing field `nic`"]),
        (r#"{"nic": "eth0", "queue": 0}"#, &["missing field `cpu`"]),
        ("[]", &["invalid"]),
        (
            r#"{"nic": "", "queue": 0, "cpu": 1}"#,
            &["nic: \"\"", "1 to 15 bytes"],
        ),
        (
            r#"{"nic": "a-name-of-16-byt", "queue": 0, "cpu": 1}"#,
            &["a-name-of-16-byt"],
        ),
        (r#"{"nic": "../eth0", "queue": 0, "cpu": 1}"#, &["../eth0"]),
        (
            r#"{"nic": "eth\n0", "queue": 0, "cpu": 1}"#,
            &[r#""eth\n0""#],
        ),
        (
            "{\"nic\": \"eth0\",\n\"queue\": 0,\n\"cpu\": 1,\n\"x\": 1}",
            &["`x`", "line 4"],
        ),
    ];
    for (text, parts) in table {
        let errors = load(&[("bad.json", text)]).unwrap_err();
        assert_says(&errors, 1, parts);
        assert_says(&errors, 1, &["bad.json: "]);
    }
}

#[test]
fn all_errors_of_a_directory_come_at_once() {
    let several =
        r#"{"nic": "eth0", "queue": 1, "cpu": 1, "burst": 0, "rings": {"rx": 3, "tx": 5}}"#;
    let errors = load(&[
        ("a.json", MINIMAL),
        ("b.json", several),
        ("c.json", "{"),
        ("d.json", MINIMAL),
    ])
    .unwrap_err();
    assert_says(
        &errors,
        5,
        &[
            "b.json: burst",
            "rings.rx: 3",
            "rings.tx: 5",
            "c.json: not JSON",
            "NIC eth0 queue 0",
        ],
    );
    // Both files of a double queue are named.
    let double = errors.errors()[4].to_string();
    assert!(
        double.contains("a.json") && double.contains("d.json"),
        "{double}"
    );
}

#[test]
fn one_nic_has_one_deferral() {
    let file = |queue: u32, hard_irqs: u32| {
        let keys = format!(
            r#", "queue": {queue}, "napiDeferral": {{"hardIrqs": {hard_irqs}, "timeoutMicroseconds": 200}}"#
        );
        MINIMAL.replace(r#", "queue": 0"#, &keys)
    };
    let same = [("a.json", &*file(0, 2)), ("b.json", &*file(1, 2))];
    load(&same).unwrap();
    let silent = MINIMAL.replace(r#""queue": 0"#, r#""queue": 2"#);
    load(&[same[0], ("c.json", &silent)]).unwrap();
    let other = file(1, 3);
    let errors = load(&[same[0], ("b.json", &other), ("c.json", &silent)]).unwrap_err();
    assert_says(
        &errors,
        1,
        &["a.json and ", "b.json", "NIC eth0", "napiDeferral differs"],
    );
}

#[test]
fn all_queues_have_one_host_door() {
    let file = |nic: &str, offload: &str| {
        let keys = format!(r#", "queue": 1, "hostDoor": {{"offload": "{offload}"}}"#);
        let text = MINIMAL.replace(r#", "queue": 0"#, &keys);
        text.replace("eth0", nic)
    };
    let (off, other) = (file("eth0", "off"), file("eth1", "off"));
    let same = [("a.json", &*off), ("b.json", MINIMAL), ("c.json", &*other)];
    let workers = load(&same).unwrap();
    let said: Vec<_> = workers.iter().map(|worker| worker.host_offload).collect();
    assert_eq!(said, [Some(Offloads::Off), None, Some(Offloads::Off)]);
    let auto = file("eth1", "auto");
    let errors = load(&[same[0], same[1], ("c.json", &auto)]).unwrap_err();
    assert_says(
        &errors,
        1,
        &["a.json and ", "c.json", "hostDoor.offload differs"],
    );
}

#[test]
fn one_node_has_one_host_door() {
    let file = |nic: &str, kind: &str| {
        MINIMAL.replace(
            r#""nic": "eth0""#,
            &format!(r#""nic": "{nic}", "hostDoor": {{"kind": "{kind}"}}"#),
        )
    };
    let (tun, veth, other) = (
        file("eth0", "tun"),
        file("eth1", "veth"),
        file("eth2", "veth"),
    );
    let workers = load(&[("a.json", &veth), ("b.json", &other)]).unwrap();
    assert_eq!(workers[0].host_door, HostDoor::Veth);
    // The door's own rings: twice rx, twice tx.
    assert_eq!(workers[0].umem.frames(), 10368 + 4 * 2048);
    let errors = load(&[("a.json", &tun), ("b.json", &veth)]).unwrap_err();
    assert_says(
        &errors,
        1,
        &[
            "a.json and ",
            "b.json",
            "\"tun\" in one",
            "\"veth\" in the other",
            "rip0",
        ],
    );
}

#[test]
fn only_json_files_count() {
    let files = [
        ("eth0-q0.json", MINIMAL),
        ("README.md", "#"),
        ("eth0-q1.json.bak", "{"),
        (".eth0-q0.json", "{"),
    ];
    assert_eq!(load(&files).unwrap().len(), 1);

    let empty = load(&[("README.md", "#")]).unwrap_err();
    assert_says(&empty, 1, &["no *.json file", "eth0-q0.json"]);
    let absent = config::load_dir(Path::new("/nonexistent/dataplane")).unwrap_err();
    assert_says(&absent, 1, &["/nonexistent/dataplane", "No such file"]);

    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("eth0-q0.json")).unwrap();
    let unreadable = config::load_dir(directory.path()).unwrap_err();
    assert_says(&unreadable, 1, &["eth0-q0.json: cannot read", "directory"]);
}

/// Two CPUs, an eth0 with two queues, all rights, little memory.
fn host() -> HostFacts {
    let eth0 = Nic {
        name: "eth0".into(),
        index: 2,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        up: true,
        rx_queues: 2,
        driver: "virtio_net".into(),
        numa_node: None,
    };
    HostFacts {
        cpus: BTreeSet::from([0, 1, 2, 3, 8]),
        nics: BTreeMap::from([("eth0".into(), eth0)]),
        nic_names: vec!["lo".into(), "eth0".into()],
        locked_bytes_max: Some(8 << 20),
        capabilities: Capabilities::from_bits(u64::MAX),
        huge_pages_free: 0,
        huge_pages_total: 5,
        numa_nodes: BTreeMap::new(),
        siblings: BTreeSet::new(),
    }
}

/// The same machine with two nodes, CPUs 2 and 3 and the NIC on the second, and huge pages enough, on the first.
fn numa_host() -> HostFacts {
    let mut host = host();
    change(&mut host, |nic| nic.numa_node = Some(1));
    let node = |cpus: &[u32], huge_pages_free| NumaNode {
        cpus: cpus.iter().copied().collect(),
        huge_pages_free,
        huge_pages_total: huge_pages_free + 2,
    };
    host.numa_nodes = BTreeMap::from([(0, node(&[0, 1, 8], 60)), (1, node(&[2, 3], 4))]);
    (host.huge_pages_free, host.huge_pages_total) = (64, 68);
    host
}

#[test]
fn huge_pages_are_wanted_on_the_node_of_the_nic() {
    let huge = worker(r#", "hugePages": true"#);
    let errors = config::check_host(core::slice::from_ref(&huge), &numa_host()).unwrap_err();
    let file = "echo 23 > /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages";
    assert_says(
        &errors,
        1,
        &["node 1", "21 huge pages", "4 are free there", file],
    );
    let mut enough = numa_host();
    enough.numa_nodes.get_mut(&1).unwrap().huge_pages_free = 21;
    config::check_host(core::slice::from_ref(&huge), &enough).unwrap();
    // Where there is one node, or the NIC belongs to none, any page will do.
    let mut one_node = numa_host();
    one_node.numa_nodes.remove(&0);
    config::check_host(core::slice::from_ref(&huge), &one_node).unwrap();
    let mut nowhere = numa_host();
    change(&mut nowhere, |nic| nic.numa_node = None);
    config::check_host(&[huge], &nowhere).unwrap();
}

#[test]
fn a_worker_far_from_its_nic_is_warned_about() {
    let warned = |cpu: &str| {
        let text = MINIMAL.replace(r#""cpu": 1"#, &format!(r#""cpu": {cpu}"#));
        let workers = load(&[("eth0-q0.json", &text)]).unwrap();
        let warnings = config::warnings(&workers, &numa_host());
        warnings.iter().map(ToString::to_string).next().unwrap()
    };
    let far = warned("1");
    for part in ["eth0-q0.json: CPU 1", "node 1 (2-3)"] {
        assert!(far.contains(part), "{far}");
    }
    assert!(!warned("2").contains("NUMA"));
}

fn change(host: &mut HostFacts, change: impl FnOnce(&mut Nic)) {
    change(host.nics.get_mut("eth0").unwrap());
}

#[test]
fn a_host_that_has_everything_passes() {
    config::check_host(&[worker("")], &host()).unwrap();
    let unlimited = HostFacts {
        locked_bytes_max: None,
        capabilities: Capabilities::from_bits(1 << 12 | 1 << 13 | 1 << 39),
        ..host()
    };
    config::check_host(&[worker("")], &unlimited).unwrap();
}

#[test]
fn what_the_host_lacks_is_said() {
    type Row<'a> = (&'a str, Box<dyn Fn(&mut HostFacts)>, &'a [&'a str]);
    let table: Vec<Row> = vec![
        (
            "",
            Box::new(|host| host.nics.clear()),
            &["eth0-q0.json: nic: eth0 does not exist", "lo, eth0"],
        ),
        (
            "",
            Box::new(|host| change(host, |nic| nic.up = false)),
            &["eth0 is down", "ip link set dev eth0 up"],
        ),
        (
            r#", "queue": 2"#,
            Box::new(|_| ()),
            &[
                "eth0-q0.json: queue:",
                "2 receive queue(s)",
                "no queue 2",
                "ethtool -L eth0",
            ],
        ),
        (
            r#", "cpu": 4"#,
            Box::new(|_| ()),
            &["eth0-q0.json: cpu:", "CPU 4", "0-3,8"],
        ),
        (
            r#", "umem": {"frameSize": 2048}"#,
            Box::new(|host| change(host, |nic| nic.driver = "igb".into())),
            &["umem.frameSize", "igb", "4096"],
        ),
        (
            "",
            Box::new(|host| host.capabilities = Capabilities::from_bits(!(1 << 14))),
            &[
                "42467328 bytes",
                "8388608",
                "CAP_IPC_LOCK",
                "LimitMEMLOCK=42467328",
                "41472",
            ],
        ),
        (
            r#", "hugePages": true"#,
            Box::new(|host| host.huge_pages_free = 1),
            &["21 huge pages", "1 are free", "echo 25"],
        ),
        (
            "",
            Box::new(|host| host.capabilities = Capabilities::from_bits(1 << 14)),
            &["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "setcap"],
        ),
        (
            "",
            Box::new(|host| host.capabilities = Capabilities::from_bits(!(1 << 13))),
            &["lacks CAP_NET_RAW (to open AF_XDP sockets): "],
        ),
        (
            r#", "hostDoor": {"kind": "veth"}"#,
            Box::new(|host| host.capabilities = Capabilities::from_bits(!(1 << 21))),
            &["CAP_SYS_ADMIN", "hostDoor.kind"],
        ),
        (
            r#", "hostDoor": {"kind": "veth"}"#,
            Box::new(|host| change(host, |nic| nic.mtu = 3507)),
            &[
                "\"veth\" takes packets of up to 3506 bytes,",
                "MTU 3507",
                "\"tun\"",
            ],
        ),
        (
            r#", "hostDoor": {"kind": "veth"}, "umem": {"frameSize": 2048}"#,
            Box::new(|host| change(host, |nic| nic.mtu = 1779)),
            &["up to 1778 bytes with umem.frameSize 2048", "MTU 1779"],
        ),
        (
            r#", "hostDoor": {"kind": "veth"}, "mode": "zero-copy""#,
            Box::new(|host| host.capabilities = Capabilities::from_bits(!(1 << 14))),
            // Twice 10368 frames for the NIC and 8192 for the door.
            &["152043520 bytes", "CAP_IPC_LOCK"],
        ),
        (
            r#", "transmit": "inject""#,
            Box::new(|_| ()),
            &["eth0-q0.json: transmit: \"inject\"", "veth"],
        ),
        (
            r#", "transmit": "inject""#,
            Box::new(|host| {
                change(host, |nic| nic.driver = "veth".into());
                host.capabilities = Capabilities::from_bits(!(1 << 21));
            }),
            &["CAP_SYS_ADMIN", "transmit"],
        ),
    ];
    for (keys, spoil, parts) in table {
        let text = match keys {
            // A key given twice is an error: replace the minimal ones.
            _ if keys.contains("\"queue\"") => MINIMAL.replace(r#", "queue": 0"#, keys),
            _ if keys.contains("\"cpu\"") => MINIMAL.replace(r#", "cpu": 1"#, keys),
            _ => MINIMAL.replace('}', &format!("{keys}}}")),
        };
        let workers = load(&[("eth0-q0.json", &text)]).unwrap();
        let mut host = host();
        spoil(&mut host);
        let errors = config::check_host(&workers, &host).unwrap_err();
        assert_says(&errors, 1, parts);
    }
}

#[test]
fn locked_memory_is_counted_over_all_workers() {
    let second = MINIMAL.replace(r#""queue": 0"#, r#""queue": 1"#);
    let workers = load(&[("q0.json", MINIMAL), ("q1.json", &second)]).unwrap();
    let one: u64 = workers[0].umem.bytes();
    let limited = |bytes| HostFacts {
        locked_bytes_max: Some(bytes),
        capabilities: Capabilities::from_bits(!(1 << 14)),
        ..host()
    };
    config::check_host(&workers, &limited(2 * one)).unwrap();
    let errors = config::check_host(&workers, &limited(2 * one - 1)).unwrap_err();
    assert_says(&errors, 1, &[&(2 * one).to_string()]);
}

#[test]
fn odd_but_working_choices_are_warned_about() {
    assert_eq!(
        config::warnings(&[worker("")], &host()),
        [ConfigWarning::UncoveredQueues {
            nic: "eth0".into(),
            queues: vec![1]
        }]
    );
    let second = MINIMAL.replace(r#""queue": 0"#, r#""polling": "busy", "queue": 1"#);
    let workers = load(&[("q0.json", MINIMAL), ("q1.json", &second)]).unwrap();
    let mut jumbo = host();
    change(&mut jumbo, |nic| nic.mtu = 3826);
    let shared = ConfigWarning::SharedCpu {
        cpu: 1,
        workers: 2,
        busy: true,
    };
    assert_eq!(config::warnings(&workers, &jumbo), [shared]);
    change(&mut jumbo, |nic| nic.mtu = 3827);
    let texts: Vec<String> = config::warnings(&workers, &jumbo)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(texts.len(), 3);
    assert!(
        texts[0].contains("q0.json") && texts[0].contains("3827"),
        "{texts:?}"
    );
    assert!(texts[2].contains("2 workers share CPU 1"), "{texts:?}");
}

#[test]
fn every_file_that_is_shipped_is_valid() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/dataplane");
    let configured = config::load_dir(&directory).unwrap();
    assert!(!configured.workers.is_empty());
    for worker in &configured.workers {
        let name = format!("{}-q{}.json", worker.nic, worker.queue);
        assert_eq!(worker.file.file_name().unwrap().to_str().unwrap(), name);
    }
    let template = config::load_dir(&directory.join("auto")).unwrap();
    assert_eq!((template.workers.len(), template.templates.len()), (0, 1));
    // So are the examples in its README; the long one says what it claims to say.
    let readme = fs::read_to_string(directory.join("README.md")).unwrap();
    let mut examples = readme.split("```json\n").skip(1).map(|rest| {
        let text = rest.split("```").next().unwrap();
        File::parse(Path::new("README.md"), text).unwrap()
    });
    let template = examples.next().unwrap();
    assert!(matches!(template, File::Template(_)), "{template:?}");
    let mut worker = || match examples.next().unwrap() {
        File::Worker(worker) => worker,
        File::Template(template) => panic!("{template:?}"),
    };
    let short = worker();
    let mut long = worker();
    assert!(long.busy_poll.take().is_some());
    assert!(long.napi_deferral.take().is_some());
    assert!(long.coalesce.take().is_some());
    assert_eq!(long.host_offload.take(), Some(Offloads::default()));
    assert_eq!(short, long);
    assert_eq!(examples.next(), None);
}
