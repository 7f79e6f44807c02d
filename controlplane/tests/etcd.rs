//! The `etcd` lease source against a real etcd. Needs root, for network namespaces, and the package etcd-server.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use core::time::Duration;
use std::path::Path;
use std::process::Command;

use common::etcd::{Entry, Etcd};
use common::node::{Node, wait_exit};
use common::source::{Source, described};
use common::{Namespace, eventually};
use etcd_client::{Certificate, ConnectOptions, Identity, Permission, PermissionType, TlsOptions};
use ripstop_cni::subnet_env::SubnetEnv;
use ripstop_controlplane::family::{Family, PerFamily};
use ripstop_controlplane::interface::Selection;
use ripstop_controlplane::lease::LeaseSet;
use ripstop_controlplane::lease::etcd::schema::{DEFAULT_PREFIX, Keys};
use ripstop_controlplane::lease::etcd::{self, Access, Config, EtcdSource, Settings};
use ripstop_controlplane::netconf::NetConf;

const URL: &str = "http://127.0.0.1:2379";
const CONFIG: &str = "/coreos.com/network/config";
const SUBNETS: &str = "/coreos.com/network/subnets/";
/// A node chooses its subnet by chance, up to `SubnetMax`. What a test gives to a peer later lies above that, or it might
/// be the node's.
const V4: &str = r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.99.0","Backend":{"Type":"vxlan"}}"#;
const DUAL: &str = r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.99.0","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;
/// Longer than a source needs for anything that it does by itself.
const WHILE: Duration = Duration::from_secs(3);

/// What flannel writes for a node.
fn value(ip: &str, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

fn key(name: &str) -> String {
    format!("{SUBNETS}{name}")
}

/// A node, with etcd in its namespace.
struct Rig {
    namespace: Namespace,
    /// The far end of its cable.
    _outside: Namespace,
    etcd: Etcd,
    directory: tempfile::TempDir,
}

impl Rig {
    fn new(config: &str) -> Self {
        Self::with(config, |namespace| {
            namespace.enter(|| Etcd::start("127.0.0.1"))
        })
    }

    fn with(config: &str, start: impl FnOnce(&Namespace) -> Etcd) -> Self {
        let (namespace, outside) = Namespace::node(1);
        let rig = Self {
            etcd: start(&namespace),
            namespace,
            _outside: outside,
            directory: tempfile::tempdir().unwrap(),
        };
        rig.etcd.put(CONFIG, config);
        rig
    }

    /// For a source with this configuration; it has address 10.199.0.1.
    fn settings(&self, config: &str) -> Settings {
        let (conf, pools) = NetConf::parse_with_pools(config.as_bytes()).unwrap();
        Settings {
            node: "n1".to_owned(),
            access: Access {
                endpoints: vec![URL.to_owned()],
                keys: Keys::new(DEFAULT_PREFIX),
                user: None,
                identity: None,
                ca: None,
            },
            selection: Selection {
                ifaces: vec!["eth0".to_owned()],
                families: PerFamily {
                    v4: conf.network.is_some(),
                    v6: conf.network6.is_some(),
                },
                ..Selection::default()
            },
            config: Config { conf, pools },
            subnet_file: self.directory.path().join("subnet.env"),
            ttl: etcd::TTL,
            margin: Duration::from_secs(3600),
            silent: etcd::SILENT,
        }
    }

    fn start(&self, settings: Settings) -> Source {
        Source::start(&self.namespace, EtcdSource::new(settings))
    }

    fn had(&self, subnet: &str) {
        let env = SubnetEnv {
            networks: vec!["10.5.0.0/16".parse().unwrap()],
            subnet: Some(subnet.parse().unwrap()),
            mtu: 1450,
            ..SubnetEnv::default()
        };
        env.write(&self.directory.path().join("subnet.env"))
            .unwrap();
    }

    /// The leases that have this public IP.
    fn of(&self, ip: &str) -> Vec<Entry> {
        let sign = format!(r#""{ip}""#);
        let entries = self.etcd.list(SUBNETS);
        entries
            .into_iter()
            .filter(|entry| entry.value.contains(&sign))
            .collect()
    }

    /// The one lease of the node.
    fn own(&self) -> Entry {
        let own = self.of("10.199.0.1");
        assert_eq!(own.len(), 1, "{own:?}");
        own[0].clone()
    }
}

fn subnet(set: &LeaseSet, family: Family) -> String {
    set.own(family).unwrap().subnet.to_string()
}

/// The name that a key has for a set.
fn key_of(set: &LeaseSet) -> String {
    key(&subnet(set, Family::V4).replace('/', "-"))
}

const PEER: &str = "10.199.0.12 10.5.152.0/24 10.199.0.12 c6:d2:32:6f:8f:44";

#[test]
fn a_node_takes_a_lease_in_flannels_form_and_sees_its_peers() {
    let rig = Rig::new(V4);
    let lease = rig.etcd.put_for(
        &key("10.5.152.0-24"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
        86_400,
    );
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert_eq!(described(&set), [PEER]);
    let own = rig.own();
    let mac = set.own(Family::V4).unwrap().vtep_mac.unwrap();
    assert_eq!(
        (own.key.clone(), own.value.clone()),
        (key_of(&set), value("10.199.0.1", &mac.to_string()))
    );
    assert_eq!(rig.etcd.time_to_live(own.lease).0, 86_400);
    assert_ne!(own.lease, lease);
    // Peers come, change and go.
    rig.etcd.put(
        &key("10.5.153.0-24"),
        &value("10.199.0.13", "c6:d2:32:6f:8f:45"),
    );
    source.peers(&[
        PEER,
        "10.199.0.13 10.5.153.0/24 10.199.0.13 c6:d2:32:6f:8f:45",
    ]);
    rig.etcd.put(
        &key("10.5.153.0-24"),
        &value("10.199.0.14", "c6:d2:32:6f:8f:46"),
    );
    source.peers(&[
        PEER,
        "10.199.0.14 10.5.153.0/24 10.199.0.14 c6:d2:32:6f:8f:46",
    ]);
    rig.etcd.delete(&key("10.5.153.0-24"));
    source.peers(&[PEER]);
    assert_eq!(rig.own(), own, "nothing of ours was written again");
}

#[test]
fn a_lease_is_found_again_by_public_ip_with_its_mac() {
    let rig = Rig::new(V4);
    let text = value("10.199.0.1", "c6:d2:32:6f:8f:44");
    rig.etcd.put_for(&key("10.5.9.0-24"), &text, 86_400);
    let before = rig.own();
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert_eq!(subnet(&set, Family::V4), "10.5.9.0/24");
    assert_eq!(
        set.own(Family::V4).unwrap().vtep_mac,
        "c6:d2:32:6f:8f:44".parse().ok()
    );
    source.assert_quiet(WHILE);
    assert_eq!(rig.own(), before, "what is right is not written");
}

#[test]
fn a_reservation_is_taken_and_stays_one() {
    let rig = Rig::new(V4);
    rig.etcd
        .put(&key("10.5.9.0-24"), r#"{"PublicIP":"10.199.0.1"}"#);
    // Somebody else's is nobody's peer yet, and not free.
    rig.etcd
        .put(&key("10.5.10.0-24"), r#"{"PublicIP":"10.199.0.12"}"#);
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert_eq!(
        (key_of(&set), described(&set)),
        (key("10.5.9.0-24"), vec![])
    );
    let wanted = value(
        "10.199.0.1",
        &set.own(Family::V4).unwrap().vtep_mac.unwrap().to_string(),
    );
    eventually("the value is complete", || {
        (rig.own().value == wanted).then_some(())
    });
    source.assert_quiet(WHILE);
    assert_eq!(rig.own().lease, 0, "it has no end");
}

#[test]
fn the_subnet_of_before_is_taken_again_if_it_is_free() {
    let rig = Rig::new(V4);
    rig.had("10.5.77.0/24");
    let source = rig.start(rig.settings(V4));
    assert_eq!(subnet(&source.set(), Family::V4), "10.5.77.0/24");
    drop(source);
    rig.etcd.delete(&key("10.5.77.0-24"));
    let thief = value("10.199.0.12", "c6:d2:32:6f:8f:44");
    rig.etcd.put(&key("10.5.77.0-24"), &thief);
    let source = rig.start(rig.settings(V4));
    assert_ne!(subnet(&source.set(), Family::V4), "10.5.77.0/24");
    assert_eq!(rig.of("10.199.0.12")[0].value, thief);
}

#[test]
fn a_lease_that_does_not_fit_is_given_up() {
    let rig = Rig::new(V4);
    rig.etcd.put_for(
        &key("10.6.9.0-24"),
        &value("10.199.0.1", "c6:d2:32:6f:8f:44"),
        86_400,
    );
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert!(subnet(&set, Family::V4).starts_with("10.5."), "{set:?}");
    assert_eq!(rig.own().key, key_of(&set));
}

/// Several nodes want one subnet at one moment; and there are fewer subnets than nodes.
#[test]
fn a_lost_race_is_run_again_until_all_is_taken() {
    const SMALL: &str = r#"{"Network":"10.5.0.0/28","Backend":{"Type":"host-gw"}}"#;
    let rig = Rig::new(SMALL);
    rig.had("10.5.0.4/30");
    let start = |n: u8| {
        rig.namespace
            .ip(&format!("addr add 10.199.0.{n}/24 dev eth0"));
        let mut settings = rig.settings(SMALL);
        settings.selection.public_ips.v4 = Some(format!("10.199.0.{n}").parse().unwrap());
        rig.start(settings)
    };
    let sources = [21, 22, 23].map(start);
    let mut taken: Vec<_> = sources
        .iter()
        .map(|source| subnet(&source.set(), Family::V4))
        .collect();
    taken.sort_unstable();
    assert_eq!(taken, ["10.5.0.12/30", "10.5.0.4/30", "10.5.0.8/30"]);
    let late = start(24);
    late.problem("out of subnets");
    let gone = rig.of("10.199.0.22").remove(0);
    // A third has it, and gives it back: whoever is faster of the two without a lease gets it.
    rig.etcd.put(&gone.key, r#"{"PublicIP":"10.199.0.99"}"#);
    sources[1].problem("out of subnets");
    rig.etcd.delete(&gone.key);
    let (owner, took) = eventually("somebody has it", || {
        let both = ["10.199.0.22", "10.199.0.24"].map(|ip| rig.of(ip));
        both.into_iter().flatten().next()
    });
    println!("taken {took:?} after it was free");
    assert_eq!(owner.key, gone.key);
}

/// A key that says nothing lies where the subnet of before would go: it is not seen as taken, and can never be made.
#[test]
fn a_subnet_that_cannot_be_had_is_left_for_another() {
    let rig = Rig::new(V4);
    rig.had("10.5.77.0/24");
    rig.etcd.put(&key("10.5.77.0-x"), "");
    let source = rig.start(rig.settings(V4));
    assert_ne!(subnet(&source.set(), Family::V4), "10.5.77.0/24");
    assert_eq!(rig.etcd.list(&key("10.5.77.0-x")).len(), 1);
}

#[test]
fn a_lease_is_renewed_before_it_ends_and_ends_when_nobody_does() {
    let rig = Rig::new(V4);
    let mut settings = rig.settings(V4);
    (settings.ttl, settings.margin) = (Duration::from_secs(9), Duration::from_secs(6));
    let source = rig.start(settings);
    let _set = source.set();
    let before = rig.own();
    let (granted, mut lowest) = (rig.etcd.time_to_live(before.lease).0, i64::MAX);
    assert_eq!(granted, 9);
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(15) {
        lowest = lowest.min(rig.etcd.time_to_live(before.lease).1);
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("of 9 s, never less than {lowest} s were left in 15 s");
    assert!(lowest > 0);
    assert_eq!(rig.own(), before, "it is renewed without being written");
    drop(source);
    // A source that has ended does not notice until it is told something.
    rig.etcd.put(
        &key("10.5.152.0-24"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
    );
    eventually("the lease is over", || {
        rig.of("10.199.0.1").is_empty().then_some(())
    });
}

#[test]
fn a_stolen_lease_is_never_stolen_back() {
    let rig = Rig::new(V4);
    let source = rig.start(rig.settings(V4));
    let before = source.set();
    let thief = value("10.199.0.12", "c6:d2:32:6f:8f:44");
    rig.etcd.put(&key_of(&before), &thief);
    let after = source.set();
    assert_ne!(key_of(&before), key_of(&after));
    assert_eq!(described(&after).len(), 1, "the thief is a peer");
    assert_eq!(rig.own().key, key_of(&after));
    assert_eq!(
        before.own(Family::V4).unwrap().vtep_mac,
        after.own(Family::V4).unwrap().vtep_mac
    );
    source.assert_quiet(WHILE);
    assert_eq!(rig.etcd.list(&key_of(&before))[0].value, thief);
}

#[test]
fn a_lost_subnet_is_said_as_long_as_pods_are_in_it() {
    let rig = Rig::new(V4);
    let source = rig.start(rig.settings(V4));
    let before = source.set();
    let bridge = before
        .own(Family::V4)
        .unwrap()
        .subnet
        .hosts()
        .next()
        .unwrap();
    rig.namespace.ip("link add cni0 type bridge");
    rig.namespace.ip(&format!("addr add {bridge}/24 dev cni0"));
    rig.etcd
        .put(&key_of(&before), &value("10.199.0.12", "c6:d2:32:6f:8f:44"));
    source.set();
    let problem = source.problem("belongs to 10.199.0.12");
    assert!(problem.contains(&subnet(&before, Family::V4)), "{problem}");
    rig.namespace.ip("link del cni0");
    source.recovered();
}

#[test]
fn two_nodes_behind_one_public_ip_do_not_share_a_lease() {
    let rig = Rig::new(V4);
    // Our device was here before, and another's key has our address.
    rig.namespace
        .ip("link add flannel.1 address 02:00:00:00:00:77 type vxlan id 1 dev eth0 dstport 8472");
    let other = value("10.199.0.1", "c6:d2:32:6f:8f:44");
    rig.etcd.put_for(&key("10.5.9.0-24"), &other, 86_400);
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert_ne!(key_of(&set), key("10.5.9.0-24"));
    assert_eq!(
        set.own(Family::V4).unwrap().vtep_mac,
        "02:00:00:00:00:77".parse().ok()
    );
    assert_eq!(rig.etcd.list(&key("10.5.9.0-24"))[0].value, other);
    assert!(
        described(&set).is_empty(),
        "nobody can be reached at our own address"
    );
    // While we run, it takes ours.
    rig.etcd.put(&key_of(&set), &other);
    let after = source.set();
    assert_ne!(key_of(&set), key_of(&after));
    assert_eq!(rig.etcd.list(&key_of(&set))[0].value, other);
}

#[test]
fn a_deleted_lease_is_made_again_and_nothing_changes() {
    let rig = Rig::new(V4);
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    let before = rig.own();
    rig.etcd.delete(&before.key);
    let (after, took) = eventually("the lease is back", || {
        rig.of("10.199.0.1")
            .pop()
            .filter(|entry| entry.created != before.created)
    });
    println!("made again after {took:?}");
    assert_eq!(
        (after.key, after.value),
        (before.key.clone(), before.value.clone())
    );
    // Its etcd lease ends, and the key with it.
    rig.etcd
        .call(move |mut client| async move { client.lease_revoke(after.lease).await });
    eventually("the lease is back", || {
        rig.of("10.199.0.1")
            .pop()
            .filter(|entry| entry.created != after.created)
    });
    source.assert_quiet(WHILE);
    assert_eq!(rig.own().key, key_of(&set));
}

#[test]
fn of_two_that_overlap_the_younger_gives_way() {
    let rig = Rig::new(V4);
    rig.etcd.put(
        &key("10.5.8.0-23"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
    );
    rig.etcd.put_for(
        &key("10.5.9.0-24"),
        &value("10.199.0.1", "c6:d2:32:6f:8f:45"),
        86_400,
    );
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    assert_ne!(key_of(&set), key("10.5.9.0-24"));
    assert_eq!(rig.own().key, key_of(&set));
    assert_eq!(
        described(&set),
        ["10.199.0.12 10.5.8.0/23 10.199.0.12 c6:d2:32:6f:8f:44"]
    );
    // One that comes later is ignored, and an older MAC address is not taken twice.
    let mac = set.own(Family::V4).unwrap().vtep_mac.unwrap().to_string();
    rig.etcd
        .put(&key("10.5.200.0-24"), &value("10.199.0.13", &mac));
    source.assert_quiet(WHILE);
    assert_eq!(rig.own().key, key_of(&set));
}

#[test]
fn bad_keys_and_values_disturb_nobody() {
    let rig = Rig::new(V4);
    for (name, value) in [
        ("nonsense", ""),
        ("10.5.160.0-24", "{"),
        (
            "10.5.161.0-24",
            r#"{"PublicIP":"ten","BackendType":"vxlan"}"#,
        ),
        (
            "10.5.162.0-24",
            r#"{"PublicIP":"10.199.0.62","BackendType":"host-gw"}"#,
        ),
        (
            "10.5.163.0-24",
            r#"{"PublicIP":"10.199.0.63","BackendType":"vxlan","BackendData":{"VtepMAC":"x"}}"#,
        ),
    ] {
        rig.etcd.put(&key(name), value);
    }
    rig.etcd.put(
        &key("10.5.152.0-24"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
    );
    let source = rig.start(rig.settings(V4));
    assert_eq!(described(&source.set()), [PEER]);
    source.assert_quiet(Duration::from_secs(1));
    rig.etcd.put(
        &key("10.5.160.0-24"),
        &value("10.199.0.60", "c6:d2:32:6f:8f:60"),
    );
    source.peers(&[
        PEER,
        "10.199.0.60 10.5.160.0/24 10.199.0.60 c6:d2:32:6f:8f:60",
    ]);
    // Our own value is nobody's claim, so it is put right.
    let own = rig.own();
    rig.etcd.put(&own.key, "nonsense");
    eventually("our value is right again", || {
        (rig.of("10.199.0.1").pop()?.value == own.value).then_some(())
    });
}

#[test]
fn the_last_set_stays_while_etcd_is_away_and_news_come_when_it_is_back() {
    let mut rig = Rig::new(V4);
    rig.etcd.put(
        &key("10.5.152.0-24"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
    );
    let source = rig.start(rig.settings(V4));
    let set = source.set();
    let before = rig.own();
    rig.etcd.kill();
    let problem = source.problem("etcd http://127.0.0.1:2379");
    println!("away: {problem}");
    source.assert_quiet(WHILE);
    // What happens while it cannot be reached comes by the history.
    rig.etcd.restart_at("http://127.0.0.1:3379");
    rig.etcd.put(
        &key("10.5.153.0-24"),
        &value("10.199.0.13", "c6:d2:32:6f:8f:45"),
    );
    rig.etcd.delete(&key("10.5.152.0-24"));
    rig.etcd.kill();
    rig.etcd.restart_at(URL);
    let back = std::time::Instant::now();
    let three = "10.199.0.13 10.5.153.0/24 10.199.0.13 c6:d2:32:6f:8f:45";
    source.peers(&[three]);
    println!("news {:?} after the start of etcd", back.elapsed());
    // And by a list, when the history is cut off.
    rig.etcd.kill();
    rig.etcd.restart_at("http://127.0.0.1:3379");
    rig.etcd.delete(&key("10.5.153.0-24"));
    rig.etcd.put(
        &key("10.5.152.0-24"),
        &value("10.199.0.12", "c6:d2:32:6f:8f:44"),
    );
    rig.etcd.compact();
    rig.etcd.kill();
    rig.etcd.restart_at(URL);
    let after = source.peers(&[PEER]);
    assert_eq!((key_of(&set), rig.own()), (key_of(&after), before));
    // An etcd that has forgotten everything is followed too, and gets our lease again.
    rig.etcd.kill();
    rig.etcd.wipe();
    rig.etcd.restart();
    rig.etcd.put(CONFIG, V4);
    eventually("our lease is back", || {
        rig.of("10.199.0.1")
            .pop()
            .filter(|own| own.key == key_of(&set))
    });
}

#[test]
fn a_change_of_the_network_configuration_is_said() {
    let rig = Rig::new(V4);
    let source = rig.start(rig.settings(V4));
    source.set();
    rig.etcd.put(CONFIG, &V4.replace("vxlan", "host-gw"));
    source.problem("has changed: restart");
    rig.etcd.put(CONFIG, "{");
    source.problem("goes on with what it was");
    rig.etcd.delete(CONFIG);
    source.problem("is gone from etcd");
    // Another form of the same is no change.
    rig.etcd.put(CONFIG, &V4.replace(':', " : "));
    source.recovered();
}

#[test]
fn both_families_share_a_key() {
    let rig = Rig::new(DUAL);
    let peer = r#"{"PublicIP":"10.199.0.12","PublicIPv6":"fd00:199::12","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:46"}}"#;
    rig.etcd.put(&key("10.5.152.0-24&fd00:5:0:52::-64"), peer);
    let source = rig.start(rig.settings(DUAL));
    let set = source.set();
    assert_eq!(
        described(&set),
        [
            PEER,
            "10.199.0.12 fd00:5:0:52::/64 fd00:199::12 c6:d2:32:6f:8f:46"
        ]
    );
    let [four, six] = [Family::V4, Family::V6].map(|family| set.own(family).unwrap().clone());
    let own = rig.own();
    let name = format!("{}-24&{}-64", four.subnet.network(), six.subnet.network());
    let wanted = format!(
        r#"{{"PublicIP":"10.199.0.1","PublicIPv6":"fd00:199::1","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
        four.vtep_mac.unwrap(),
        six.vtep_mac.unwrap()
    );
    assert_eq!((own.key, own.value), (key(&name), wanted));
}

#[test]
fn ipv6_alone_works() {
    let rig = Rig::new(V6);
    let peer = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:199::12","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:46"}}"#;
    rig.etcd.put(&key("0.0.0.0-0&fd00:5:0:52::-64"), peer);
    let start = || rig.start(rig.settings(V6));
    let source = start();
    let set = source.set();
    assert_eq!(
        described(&set),
        ["fd00:199::12 fd00:5:0:52::/64 fd00:199::12 c6:d2:32:6f:8f:46"]
    );
    let six = set.own(Family::V6).unwrap().clone();
    assert!(set.own(Family::V4).is_none());
    let own = rig.of("fd00:199::1").pop().unwrap();
    let wanted = format!(
        r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:199::1","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
        six.vtep_mac.unwrap()
    );
    assert_eq!(
        (own.key, own.value),
        (
            key(&format!("0.0.0.0-0&{}-64", six.subnet.network())),
            wanted
        )
    );
    // It is known again by its IPv6 address.
    drop(source);
    assert_eq!(start().set().own(Family::V6), Some(&six));
}

#[test]
fn a_password_is_used_and_a_wrong_one_is_said() {
    let mut rig = Rig::new(V4);
    rig.etcd
        .try_call(|mut client| async move {
            client.user_add("root", "rootpass", None).await?;
            client.role_add("root").await?;
            client.user_grant_role("root", "root").await?;
            client.role_add("flannel").await?;
            let all =
                Permission::new(PermissionType::Readwrite, "/coreos.com/network/").with_prefix();
            client.role_grant_permission("flannel", all).await?;
            client.user_add("flannel", "secret", None).await?;
            client.user_grant_role("flannel", "flannel").await?;
            client.auth_enable().await
        })
        .unwrap();
    rig.etcd.options = ConnectOptions::new().with_user("root", "rootpass");
    let with = |user: Option<(&str, &str)>| {
        let mut settings = rig.settings(V4);
        settings.access.user = user.map(|(name, password)| (name.to_owned(), password.to_owned()));
        settings
    };
    for user in [None, Some(("flannel", "wrong"))] {
        let source = rig.start(with(user));
        source.problem("check --etcd-username, --etcd-password");
    }
    let source = rig.start(with(Some(("flannel", "secret"))));
    assert_eq!(key_of(&source.set()), rig.own().key);
}

/// An authority, and certificates for a server at 127.0.0.1 and a client, as PEM files.
fn certificates(directory: &Path) {
    let script = r#"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca
        for name in server client; do
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $name.key -out $name.csr -subj /CN=$name
            printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' > $name.ext
            openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $name.pem -days 2 -extfile $name.ext
        done"#;
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn tls_takes_both_certificates_and_nothing_less() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path());
    let path = |name: &str| directory.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let read = |name: &str| std::fs::read(path(name)).unwrap();
    let options = ConnectOptions::new().with_tls(
        TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read("ca.pem")))
            .identity(Identity::from_pem(read("client.pem"), read("client.key"))),
    );
    let url = "https://127.0.0.1:2379";
    let (ca, certificate, server_key) = (text("ca.pem"), text("server.pem"), text("server.key"));
    let arguments = [
        "--client-cert-auth",
        "--trusted-ca-file",
        &ca,
        "--cert-file",
        &certificate,
        "--key-file",
        &server_key,
    ];
    let rig = Rig::with(V4, |namespace| {
        namespace.enter(|| Etcd::start_with(url, &arguments, options))
    });
    let with = |endpoint: &str, ca: Option<&str>, client: bool| {
        let mut settings = rig.settings(V4);
        settings.access.endpoints = vec![endpoint.to_owned()];
        settings.access.ca = ca.map(path);
        settings.access.identity = client.then(|| (path("client.pem"), path("client.key")));
        settings
    };
    // Neither without our certificate, nor in plain text, nor to a server that nobody vouches for.
    for settings in [
        with(url, Some("ca.pem"), false),
        with(URL, Some("ca.pem"), true),
        with(url, Some("client.pem"), true),
        with(url, Some("missing.pem"), true),
    ] {
        let problem = rig.start(settings).problem("etcd http");
        println!("{problem}");
        assert!(rig.of("10.199.0.1").is_empty());
    }
    // An endpoint without a scheme is TLS if there are certificates.
    for endpoint in [url, "127.0.0.1:2379"] {
        let source = rig.start(with(endpoint, Some("ca.pem"), true));
        assert_eq!(key_of(&source.set()), rig.own().key);
    }
}

#[test]
fn an_endpoint_that_is_not_there_is_no_trouble_as_long_as_another_is() {
    let rig = Rig::new(V4);
    let mut settings = rig.settings(V4);
    settings
        .access
        .endpoints
        .insert(0, "http://127.0.0.1:4001".to_owned());
    let source = rig.start(settings);
    assert!(matches!(
        source.next(),
        ripstop_controlplane::lease::LeaseEvent::Set { .. }
    ));
}

/// A watch that is silent is asked, and given up if it does not answer.
#[test]
fn an_etcd_that_stands_still_is_noticed() {
    let rig = Rig::new(V4);
    let mut settings = rig.settings(V4);
    settings.silent = Duration::from_secs(2);
    let source = rig.start(settings);
    source.set();
    // It answers, so silence alone is nothing.
    source.assert_quiet(Duration::from_secs(5));
    rig.etcd.signal(libc::SIGSTOP);
    source.problem("etcd http://127.0.0.1:2379");
    rig.etcd.signal(libc::SIGCONT);
    source.recovered();
}

#[test]
fn the_program_waits_for_the_configuration_and_takes_a_lease() {
    let node = Node::new(1);
    let etcd = node.namespace.enter(|| Etcd::start("127.0.0.1"));
    let flags = ["--etcd-endpoints", URL, "--iface", "eth0"];
    let start = || node.start_through(&[common::node::CONTROLPLANE], &flags);
    let process = start();
    std::thread::sleep(Duration::from_secs(1));
    process.signal(libc::SIGTERM);
    let (code, errors) = wait_exit(process);
    assert_eq!(code, 0, "{errors}");
    let message =
        "flannel config not found in etcd store. Did you create your config using etcdv3 API?";
    assert_eq!(errors.matches(message).count(), 1, "{errors}");

    let process = start();
    etcd.put(
        CONFIG,
        r#"{"Network":"10.5.0.0/30","Backend":{"Type":"vxlan"}}"#,
    );
    etcd.put(CONFIG, V4);
    let file = node.directory.path().join("flannel/subnet.env");
    let (env, _) = eventually("subnet.env", || SubnetEnv::read(&file).ok());
    let own = etcd.list(SUBNETS);
    let subnet = env.subnet.unwrap();
    assert_eq!(own[0].key, key(&subnet.to_string().replace('/', "-")));
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
    // The next run finds both the key and the file.
    std::fs::remove_file(&file).unwrap();
    let process = start();
    let (again, _) = eventually("subnet.env", || SubnetEnv::read(&file).ok());
    assert_eq!(again, env);
    assert_eq!(etcd.list(SUBNETS), own);

    // A run that finds no etcd at all goes by what the one before has kept.
    etcd.put(
        &key("10.5.200.0-24"),
        &value("10.199.0.9", "02:00:00:00:00:09"),
    );
    let route = || {
        node.namespace
            .ip("route show 10.5.200.0/24")
            .contains("flannel.1")
    };
    let kept = node.run_dir().join("leases.kept");
    let is_kept = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("10.5.200.0"));
    eventually("the peer, also on disk", || {
        (route() && is_kept()).then_some(())
    });
    process.signal(libc::SIGTERM);
    assert_eq!(wait_exit(process).0, 0);
    drop(etcd);
    node.namespace.ip("route del 10.5.200.0/24");
    let process = start();
    let (_, took) = eventually("the route without etcd", || route().then_some(()));
    println!("mended without etcd after {took:?}");
    drop(process);
}
