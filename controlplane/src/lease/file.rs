//! Leases from a JSON file, watched.
//!
//! ```json
//! {"version": 1, "leases": [
//!   {"node": "n1", "publicIP": "10.199.0.11", "subnet": "10.244.1.0/24", "vtepMAC": "02:52:53:00:00:01"}
//! ]}
//! ```
//!
//! [`parse`] is pure: bytes in, a checked [`LeaseSet`] or an error that names the entry and the fix out. The
//! watcher looks at the *directory*, because editors and config maps replace files by rename, and reads again
//! every few seconds in case an event was lost. A bad file never disturbs the set that is in force.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ipnet::Ipv4Net;
use serde::Deserialize;

use super::{Lease, LeaseEvent, LeaseSet, LeaseSink, LeaseSource};
use crate::mac::Mac;
use crate::sys::Inotify;

/// How long a writer may be silent before the file is looked at without an event.
const RECHECK: Duration = Duration::from_secs(2);

/// Why a lease file cannot be used. Entries are counted from 1.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseFileError {
    /// The text is not the JSON that is expected.
    #[error(
        "line {line}, column {column}: {reason}. If the file is still being written, write it elsewhere and rename it into place"
    )]
    Json {
        /// Line of the error, from 1.
        line: usize,
        /// Column of the error.
        column: usize,
        /// What the parser says.
        reason: String,
    },
    /// The file announces a format of the future.
    #[error(
        "\"version\" is {0}, but only version 1 is known: set \"version\": 1 or upgrade Ripstop"
    )]
    Version(u64),
    /// One field of one entry is wrong.
    #[error("entry {entry} (node {node:?}): {problem}")]
    Entry {
        /// Number of the entry in the list.
        entry: usize,
        /// Its node name.
        node: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// Two entries contradict each other.
    #[error("entries {first} (node {first_node:?}) and {second} (node {second_node:?}) {problem}")]
    Conflict {
        /// Number of the entry that comes first in the file.
        first: usize,
        /// Its node.
        first_node: String,
        /// Number of the other one.
        second: usize,
        /// Its node.
        second_node: String,
        /// What they share and what to change.
        problem: String,
    },
    /// There is no lease for this node.
    #[error(
        "no entry for this node, {node:?}: add one, or start with --node-name set to one of the {entries} names in the file"
    )]
    OwnNodeMissing {
        /// The name that was looked for.
        node: String,
        /// How many entries there are.
        entries: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile<'a> {
    version: Option<u64>,
    #[serde(borrow)]
    leases: Vec<RawLease<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLease<'a> {
    #[serde(borrow)]
    node: Cow<'a, str>,
    #[serde(borrow, rename = "publicIP")]
    public_ip: Cow<'a, str>,
    #[serde(borrow)]
    subnet: Cow<'a, str>,
    #[serde(borrow, rename = "vtepMAC")]
    vtep_mac: Cow<'a, str>,
}

/// Reads and checks a lease file as seen by node `own_node` in the pod network `network`.
pub fn parse(bytes: &[u8], own_node: &str, network: Ipv4Net) -> Result<LeaseSet, LeaseFileError> {
    let file: RawFile<'_> =
        serde_json::from_slice(bytes).map_err(|error| LeaseFileError::Json {
            line: error.line(),
            column: error.column(),
            reason: without_position(&error.to_string()),
        })?;
    if let Some(version) = file.version.filter(|&version| version != 1) {
        return Err(LeaseFileError::Version(version));
    }
    let mut leases = Vec::with_capacity(file.leases.len());
    for (index, raw) in file.leases.iter().enumerate() {
        let lease = check(raw, network).map_err(|problem| LeaseFileError::Entry {
            entry: index + 1,
            node: raw.node.to_string(),
            problem,
        })?;
        leases.push((index + 1, lease));
    }
    check_unique(&mut leases)?;
    // check_unique leaves them sorted by subnet.
    let Some(own) = leases.iter().position(|(_, lease)| lease.node == own_node) else {
        return Err(LeaseFileError::OwnNodeMissing {
            node: own_node.to_owned(),
            entries: leases.len(),
        });
    };
    let (_, own) = leases.remove(own);
    Ok(LeaseSet {
        own,
        peers: leases.into_iter().map(|(_, lease)| lease).collect(),
    })
}

/// serde_json ends its messages with the position, which the error carries in fields of its own.
fn without_position(message: &str) -> String {
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message.to_owned(),
    }
}

fn check(raw: &RawLease<'_>, network: Ipv4Net) -> Result<Lease, String> {
    if raw.node.is_empty() {
        return Err("\"node\" is empty: give the node's name".to_owned());
    }
    let public_ip: Ipv4Addr = raw.public_ip.parse().map_err(|_not_one| {
        format!(
            "\"publicIP\" is {:?}, not an IPv4 address: write one like \"10.199.0.11\"",
            raw.public_ip
        )
    })?;
    if public_ip.is_unspecified()
        || public_ip.is_loopback()
        || public_ip.is_multicast()
        || public_ip.is_broadcast()
    {
        return Err(format!(
            "\"publicIP\" {public_ip} cannot be the address of a node: use its underlay address"
        ));
    }
    let subnet: Ipv4Net = raw.subnet.parse().map_err(|_not_one| {
        format!(
            "\"subnet\" is {:?}, not an IPv4 prefix: write one like \"10.244.1.0/24\"",
            raw.subnet
        )
    })?;
    if subnet.trunc() != subnet {
        return Err(format!(
            "\"subnet\" {subnet} has host bits set: write {}",
            subnet.trunc()
        ));
    }
    if subnet.prefix_len() > 30 {
        return Err(format!(
            "\"subnet\" {subnet} has no room for pods: use a prefix of /30 or shorter"
        ));
    }
    if !network.contains(&subnet) {
        return Err(format!(
            "\"subnet\" {subnet} is not inside the pod network {network} of net-conf.json"
        ));
    }
    if network.contains(&public_ip) {
        return Err(format!(
            "\"publicIP\" {public_ip} lies inside the pod network {network}: a tunnel to it would lead into itself; use the underlay address"
        ));
    }
    let vtep_mac: Mac = raw
        .vtep_mac
        .parse()
        .map_err(|error| format!("\"vtepMAC\" is {:?}: {error}", raw.vtep_mac))?;
    if vtep_mac.is_zero() || vtep_mac.is_multicast() {
        return Err(format!(
            "\"vtepMAC\" {vtep_mac} is {}: use a unicast address, best a locally administered one (second digit 2, 6, a or e)",
            if vtep_mac.is_zero() {
                "zero"
            } else {
                "a group address"
            }
        ));
    }
    Ok(Lease {
        node: raw.node.to_string(),
        public_ip,
        subnet,
        vtep_mac,
    })
}

/// Finds entries that contradict each other, by sorting; leaves the entries sorted by subnet.
fn check_unique(leases: &mut [(usize, Lease)]) -> Result<(), LeaseFileError> {
    let adjacent = |leases: &[(usize, Lease)],
                    problem: &dyn Fn(&Lease, &Lease) -> Option<String>| {
        for pair in leases.windows(2) {
            let [a, b] = pair else { continue };
            if let Some(problem) = problem(&a.1, &b.1) {
                let (first, second) = if a.0 < b.0 { (a, b) } else { (b, a) };
                return Err(LeaseFileError::Conflict {
                    first: first.0,
                    first_node: first.1.node.clone(),
                    second: second.0,
                    second_node: second.1.node.clone(),
                    problem,
                });
            }
        }
        Ok(())
    };
    leases.sort_unstable_by(|a, b| a.1.node.cmp(&b.1.node).then(a.0.cmp(&b.0)));
    adjacent(leases, &|a, b| {
        (a.node == b.node).then(|| {
            "name the same node: a node has one lease; remove one or correct its name".to_owned()
        })
    })?;
    leases.sort_unstable_by_key(|(entry, lease)| (lease.vtep_mac, *entry));
    adjacent(leases, &|a, b| {
        (a.vtep_mac == b.vtep_mac).then(|| {
            format!(
                "have the same VTEP MAC {}: one forwarding entry cannot serve two nodes; give each its own",
                a.vtep_mac
            )
        })
    })?;
    // Sorted by start, widest first: a prefix overlaps some earlier one only if it overlaps its neighbour or lies
    // inside the widest prefix so far, and then also inside every one between, so neighbours suffice.
    leases.sort_unstable_by_key(|(entry, lease)| {
        (lease.subnet.network(), lease.subnet.prefix_len(), *entry)
    });
    adjacent(leases, &|a, b| {
        if a.subnet == b.subnet && a.public_ip == b.public_ip {
            return Some(format!(
                "repeat public IP {} and subnet {}: remove one",
                a.public_ip, a.subnet
            ));
        }
        a.subnet.contains(&b.subnet).then(|| {
            format!(
                "overlap: {} and {}; every node needs a subnet of its own",
                a.subnet, b.subnet
            )
        })
    })
}

/// Watches one lease file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    node: String,
    network: Ipv4Net,
}

impl FileSource {
    /// A source that reads `path` for node `node`, whose pods live in `network`.
    pub fn new(path: PathBuf, node: String, network: Ipv4Net) -> Self {
        Self {
            path,
            node,
            network,
        }
    }

    fn read(&self) -> Result<(Vec<u8>, Result<LeaseSet, LeaseFileError>), std::io::Error> {
        let bytes = std::fs::read(&self.path)?;
        let leases = parse(&bytes, &self.node, self.network);
        Ok((bytes, leases))
    }
}

/// What the last look at the file found, to tell news from repetition.
#[derive(Default)]
struct Seen {
    bytes: Option<Vec<u8>>,
    leases: Option<Arc<LeaseSet>>,
    failure: Option<String>,
}

impl FileSource {
    /// Looks at the file once; the event to report, if there is news.
    fn look(&self, seen: &mut Seen, since: Instant) -> Option<LeaseEvent> {
        let path = self.path.display();
        let failure = match self.read() {
            Ok((bytes, _)) if seen.bytes.as_ref() == Some(&bytes) => return None,
            Ok((bytes, Ok(leases))) => {
                seen.bytes = Some(bytes);
                let recovered = seen.failure.take().is_some();
                if seen.leases.as_deref() == Some(&leases) {
                    return recovered.then_some(LeaseEvent::Recovered);
                }
                let leases = Arc::new(leases);
                seen.leases = Some(Arc::clone(&leases));
                return Some(LeaseEvent::Set {
                    leases,
                    seen: since,
                });
            }
            Ok((bytes, Err(error))) => {
                seen.bytes = Some(bytes);
                format!("lease file {path}: {error}")
            }
            Err(error) => {
                seen.bytes = None;
                format!("lease file {path}: {error}: create it, or name another with --lease-file")
            }
        };
        if seen.failure.as_ref() == Some(&failure) {
            return None;
        }
        seen.failure = Some(failure.clone());
        Some(LeaseEvent::Failed(failure))
    }

    fn watch(&self) -> Option<Inotify> {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Inotify::watch_directory(directory).ok()
    }
}

impl LeaseSource for FileSource {
    fn describe(&self) -> String {
        format!("file {}", self.path.display())
    }

    fn run(self: Box<Self>, sink: &LeaseSink) {
        let mut seen = Seen::default();
        let mut since = Instant::now();
        let mut watch = None;
        loop {
            // Watch first, then read: a change between the two is reported by the watch.
            if watch.is_none() {
                watch = self.watch();
            }
            if let Some(event) = self.look(&mut seen, since)
                && !sink.send(event)
            {
                return;
            }
            match &watch {
                // A directory that is replaced takes its watch with it: begin again.
                Some(inotify) => {
                    if !inotify.wait(RECHECK) {
                        watch = None;
                    }
                }
                None => std::thread::sleep(Duration::from_millis(500)),
            }
            since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Write as _;

    const NETWORK: &str = "10.244.0.0/16";

    fn entry(node: &str, ip: &str, subnet: &str, mac: &str) -> String {
        format!(r#"{{"node":"{node}","publicIP":"{ip}","subnet":"{subnet}","vtepMAC":"{mac}"}}"#)
    }

    fn parse_entries(entries: &[String]) -> Result<LeaseSet, LeaseFileError> {
        let text = format!(r#"{{"leases":[{}]}}"#, entries.join(","));
        parse(text.as_bytes(), "n1", NETWORK.parse().unwrap())
    }

    fn own() -> String {
        entry("n1", "10.199.0.11", "10.244.1.0/24", "02:52:53:00:00:01")
    }

    #[test]
    fn a_good_file_is_sorted_and_split() {
        let set = parse_entries(&[
            entry("n3", "10.199.0.13", "10.244.3.0/24", "02:52:53:00:00:03"),
            own(),
            entry("n2", "10.199.0.12", "10.244.2.0/24", "02:52:53:00:00:02"),
        ])
        .unwrap();
        assert_eq!(set.own.node, "n1");
        assert_eq!(set.own.vtep_ip(), Ipv4Addr::new(10, 244, 1, 0));
        let nodes: Vec<_> = set.peers.iter().map(|lease| lease.node.as_str()).collect();
        assert_eq!(nodes, ["n2", "n3"]);
    }

    #[test]
    fn version_one_is_accepted_and_others_are_not() {
        let network = NETWORK.parse().unwrap();
        let text = format!(r#"{{"version":1,"leases":[{}]}}"#, own());
        assert!(parse(text.as_bytes(), "n1", network).is_ok());
        let text = format!(r#"{{"version":2,"leases":[{}]}}"#, own());
        assert_eq!(
            parse(text.as_bytes(), "n1", network),
            Err(LeaseFileError::Version(2))
        );
    }

    #[test]
    fn each_mistake_names_its_place_and_its_fix() {
        let peer = |ip: &str, subnet: &str, mac: &str| vec![own(), entry("n2", ip, subnet, mac)];
        let mac = "02:52:53:00:00:02";
        let cases: &[(&str, Vec<String>, &[&str])] = &[
            (
                "bad ip",
                peer("10.199.0", "10.244.2.0/24", mac),
                &["entry 2", "n2", "publicIP", "10.199.0"],
            ),
            (
                "loopback",
                peer("127.0.0.1", "10.244.2.0/24", mac),
                &["entry 2", "publicIP"],
            ),
            (
                "pod ip",
                peer("10.244.9.9", "10.244.2.0/24", mac),
                &["entry 2", "inside the pod network"],
            ),
            (
                "bad subnet",
                peer("10.199.0.12", "10.244.2.0", mac),
                &["entry 2", "subnet"],
            ),
            (
                "host bits",
                peer("10.199.0.12", "10.244.2.1/24", mac),
                &["entry 2", "host bits", "10.244.2.0/24"],
            ),
            (
                "outside",
                peer("10.199.0.12", "10.245.2.0/24", mac),
                &["entry 2", "10.244.0.0/16"],
            ),
            (
                "tiny",
                peer("10.199.0.12", "10.244.2.0/31", mac),
                &["entry 2", "/30"],
            ),
            (
                "zero mac",
                peer("10.199.0.12", "10.244.2.0/24", "00:00:00:00:00:00"),
                &["entry 2", "zero"],
            ),
            (
                "group mac",
                peer("10.199.0.12", "10.244.2.0/24", "01:52:53:00:00:02"),
                &["entry 2", "group"],
            ),
            (
                "bad mac",
                peer("10.199.0.12", "10.244.2.0/24", "02:52"),
                &["entry 2", "vtepMAC"],
            ),
            (
                "same mac",
                peer("10.199.0.12", "10.244.2.0/24", "02:52:53:00:00:01"),
                &["entries 1", "and 2", "VTEP MAC"],
            ),
            (
                "overlap",
                peer("10.199.0.12", "10.244.1.128/25", mac),
                &["entries 1", "and 2", "overlap"],
            ),
            (
                "repeated",
                peer("10.199.0.11", "10.244.1.0/24", mac),
                &["entries 1", "and 2", "repeat public IP"],
            ),
            (
                "same node",
                vec![own(), entry("n1", "10.199.0.12", "10.244.2.0/24", mac)],
                &["entries 1", "same node"],
            ),
            (
                "own missing",
                vec![entry("n2", "10.199.0.12", "10.244.2.0/24", mac)],
                &["n1", "--node-name"],
            ),
            (
                "no name",
                vec![own(), entry("", "10.199.0.12", "10.244.2.0/24", mac)],
                &["entry 2", "node"],
            ),
        ];
        for (name, entries, wanted) in cases {
            let error = parse_entries(entries).expect_err(name).to_string();
            for part in *wanted {
                assert!(error.contains(part), "{name}: {error:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn an_overlap_is_found_across_entries_between() {
        let set = parse_entries(&[
            own(),
            entry("n2", "10.199.0.12", "10.244.128.0/17", "02:52:53:00:00:02"),
            entry("n3", "10.199.0.13", "10.244.129.0/24", "02:52:53:00:00:03"),
            entry("n4", "10.199.0.14", "10.244.200.0/24", "02:52:53:00:00:04"),
        ]);
        assert!(
            matches!(
                set,
                Err(LeaseFileError::Conflict {
                    first: 2,
                    second: 3,
                    ..
                })
            ),
            "{set:?}"
        );
    }

    #[test]
    fn every_prefix_of_a_good_file_is_an_error() {
        let text = format!(r#"{{"leases":[{}]}}"#, own());
        for end in 0..text.len() {
            let error = parse(&text.as_bytes()[..end], "n1", NETWORK.parse().unwrap());
            assert!(
                matches!(error, Err(LeaseFileError::Json { .. })),
                "{end}: {error:?}"
            );
        }
    }

    #[test]
    fn unknown_keys_and_trailing_text_are_refused() {
        let network = NETWORK.parse().unwrap();
        for text in [
            r#"{"leases":[],"extra":1}"#,
            r#"{"leases":[{"node":"n1","publicIP":"10.199.0.11","subnet":"10.244.1.0/24","vtepMAC":"02:52:53:00:00:01","mtu":1}]}"#,
            r#"{"leases":[]} x"#,
            r#"[]"#,
            "\u{feff}{}",
        ] {
            let error = parse(text.as_bytes(), "n1", network);
            assert!(
                matches!(error, Err(LeaseFileError::Json { line: 1, .. })),
                "{text}: {error:?}"
            );
        }
    }

    #[test]
    fn fifteen_thousand_leases_are_read_in_one_go() {
        let mut text = String::from(r#"{"leases":["#);
        for i in 0..15_000u32 {
            let (a, b) = (i / 250, i % 250);
            let _ = write!(
                text,
                r#"{}{{"node":"node-{i}","publicIP":"172.16.{a}.{b}","subnet":"10.{}.{}.0/24","vtepMAC":"02:52:00:00:{a:02x}:{b:02x}"}}"#,
                if i == 0 { "" } else { "," },
                i / 256,
                i % 256
            );
        }
        text.push_str("]}");
        let network = "10.0.0.0/8".parse().unwrap();
        let start = Instant::now();
        let set = parse(text.as_bytes(), "node-7", network).unwrap();
        println!("15,000 leases parsed and checked in {:?}", start.elapsed());
        assert_eq!(set.peers.len(), 14_999);
    }

    #[test]
    fn a_file_replaced_by_rename_is_noticed_and_a_bad_one_is_reported_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("leases.json");
        let replace = |text: &str| {
            let temporary = directory.path().join("leases.json.tmp");
            std::fs::write(&temporary, text).unwrap();
            std::fs::rename(&temporary, &path).unwrap();
        };
        replace(&format!(r#"{{"leases":[{}]}}"#, own()));
        let (queue, events) = crossbeam::channel::unbounded();
        let sink = LeaseSink::new(queue, Arc::new(Wake::new().unwrap()));
        let source = Box::new(FileSource::new(
            path.clone(),
            "n1".to_owned(),
            NETWORK.parse().unwrap(),
        ));
        let thread = std::thread::spawn(move || source.run(&sink));
        let next = || events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(matches!(next(), LeaseEvent::Set { .. }));
        replace("{\"leases\":[");
        let LeaseEvent::Failed(reason) = next() else {
            panic!("the bad file was not reported")
        };
        assert!(
            reason.contains("leases.json") && reason.contains("line 1"),
            "{reason}"
        );
        replace(&format!(r#"{{ "leases": [{}]}}"#, own()));
        assert!(matches!(next(), LeaseEvent::Recovered));
        let two = [
            own(),
            entry("n2", "10.199.0.12", "10.244.2.0/24", "02:52:53:00:00:02"),
        ];
        replace(&format!(r#"{{"leases":[{}]}}"#, two.join(",")));
        let LeaseEvent::Set { leases, .. } = next() else {
            panic!("the change was not reported")
        };
        assert_eq!(leases.peers.len(), 1);
        drop(events);
        replace("{}");
        thread.join().unwrap();
    }

    use crate::sys::Wake;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes, "n1", NETWORK.parse().unwrap());
        }

        #[test]
        fn no_text_in_the_fields_makes_it_panic(
            node in ".{0,8}", ip in "[0-9.]{0,15}", subnet in "[0-9./]{0,18}", mac in "[0-9a-f:é]{0,18}"
        ) {
            let text = serde_json::json!({"leases":[{"node":node,"publicIP":ip,"subnet":subnet,"vtepMAC":mac}]});
            let _ = parse(text.to_string().as_bytes(), "n1", NETWORK.parse().unwrap());
        }
    }
}
