//! Leases from a JSON file, watched.
//!
//! ```json
//! {"version": 1, "leases": [
//!   {"node": "n1", "publicIP": "10.199.0.11", "subnet": "10.244.1.0/24", "vtepMAC": "02:52:53:00:00:01",
//!    "publicIPv6": "fd00:199::11", "ipv6Subnet": "fd00:10:244:1::/64", "vtepMACv6": "02:52:53:00:06:01"}
//! ]}
//! ```
//!
//! Each family is optional as a whole; a VTEP MAC is needed for VXLAN only.
//!
//! [`parse`] is pure: bytes in, a checked [`LeaseSet`] or an error that names the entry and the fix out. The
//! watcher looks at the *directory*, because editors and config maps replace files by rename, and reads again
//! every few seconds in case an event was lost. A bad file never disturbs the set that is in force.

use core::net::IpAddr;
use core::time::Duration;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use serde::Deserialize;
use serde::ser::{SerializeStruct as _, Serializer as _};

use super::{
    Lease, LeaseEvent, LeaseSet, LeaseSink, LeaseSource, public_ip_problem, vtep_mac_problem,
};
use crate::family::{Family, PerFamily};
use crate::mac::Mac;
use crate::netconf::NetConf;
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
    #[serde(borrow, default, rename = "publicIP")]
    public_ip: Text<'a>,
    #[serde(borrow, default)]
    subnet: Text<'a>,
    #[serde(borrow, default, rename = "vtepMAC")]
    vtep_mac: Text<'a>,
    #[serde(borrow, default, rename = "publicIPv6")]
    public_ip6: Text<'a>,
    #[serde(borrow, default, rename = "ipv6Subnet")]
    subnet6: Text<'a>,
    #[serde(borrow, default, rename = "vtepMACv6")]
    vtep_mac6: Text<'a>,
}

/// A text that may be missing. Serde borrows through one type, not through an `Option` of it.
#[derive(Deserialize, Default)]
#[serde(from = "Option<Borrowed<'a>>")]
struct Text<'a>(#[serde(borrow)] Option<Cow<'a, str>>);

#[derive(Deserialize)]
struct Borrowed<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> From<Option<Borrowed<'a>>> for Text<'a> {
    fn from(text: Option<Borrowed<'a>>) -> Self {
        Self(text.map(|Borrowed(text)| text))
    }
}

/// The keys of one family.
struct Keys {
    family: Family,
    public_ip: &'static str,
    subnet: &'static str,
    vtep_mac: &'static str,
    network: &'static str,
    switch: &'static str,
    example_ip: &'static str,
    example_subnet: &'static str,
    /// The longest prefix that has room for pods.
    prefix_max: u8,
}

const KEYS: [Keys; 2] = [
    Keys {
        family: Family::V4,
        public_ip: "publicIP",
        subnet: "subnet",
        vtep_mac: "vtepMAC",
        network: "Network",
        switch: "EnableIPv4",
        example_ip: "10.199.0.11",
        example_subnet: "10.244.1.0/24",
        prefix_max: 30,
    },
    Keys {
        family: Family::V6,
        public_ip: "publicIPv6",
        subnet: "ipv6Subnet",
        vtep_mac: "vtepMACv6",
        network: "IPv6Network",
        switch: "EnableIPv6",
        example_ip: "fd00:199::11",
        example_subnet: "fd00:10:244:1::/64",
        prefix_max: 126,
    },
];

/// Reads and checks a lease file as seen by node `own_node` in the network that `conf` describes.
pub fn parse(bytes: &[u8], own_node: &str, conf: &NetConf) -> Result<LeaseSet, LeaseFileError> {
    let file: RawFile<'_> =
        serde_json::from_slice(bytes).map_err(|error| LeaseFileError::Json {
            line: error.line(),
            column: error.column(),
            reason: without_position(&error.to_string()),
        })?;
    if let Some(version) = file.version.filter(|&version| version != 1) {
        return Err(LeaseFileError::Version(version));
    }
    check_names(&file.leases)?;
    let mut leases = Vec::with_capacity(file.leases.len() * conf.families().count());
    for (index, raw) in file.leases.iter().enumerate() {
        let wrong = |problem| LeaseFileError::Entry {
            entry: index + 1,
            node: raw.node.to_string(),
            problem,
        };
        if raw.node.is_empty() {
            return Err(wrong("\"node\" is empty: give the node's name".to_owned()));
        }
        let node: Arc<str> = raw.node.as_ref().into();
        for keys in &KEYS {
            let lease = check(raw, &node, keys, conf).map_err(wrong)?;
            if lease.is_none() && raw.node == own_node && conf.network(keys.family).is_some() {
                return Err(wrong(format!(
                    "has no {:?}, but it is this node's and {} is on in net-conf.json: add {:?} and {:?}",
                    keys.subnet, keys.family, keys.public_ip, keys.subnet
                )));
            }
            leases.extend(lease.map(|lease| (index + 1, lease)));
        }
        if leases.last().is_none_or(|(entry, _)| *entry != index + 1) {
            return Err(wrong(
                "has no subnet: give \"publicIP\" and \"subnet\", or \"publicIPv6\" and \"ipv6Subnet\"".to_owned(),
            ));
        }
    }
    check_unique(&mut leases)?;
    // check_unique leaves them sorted by subnet.
    let mut own = PerFamily::default();
    let entries = file.leases.len();
    let mut peers = Vec::with_capacity(leases.len());
    for (_, lease) in leases {
        if &*lease.node == own_node {
            let family = lease.family();
            *own.get_mut(family) = Some(lease);
        } else {
            peers.push(lease);
        }
    }
    if own == PerFamily::default() {
        return Err(LeaseFileError::OwnNodeMissing {
            node: own_node.to_owned(),
            entries,
        });
    }
    Ok(LeaseSet { own, peers })
}

/// Writes a set as a lease file, which [`parse`] reads back as the same set.
pub fn write(set: &LeaseSet, output: impl std::io::Write) -> serde_json::Result<()> {
    let mut nodes: BTreeMap<&str, PerFamily<Option<&Lease>>> = BTreeMap::new();
    let own = set.own.iter().filter_map(|(_, own)| own.as_ref());
    for lease in own.chain(&set.peers) {
        *nodes
            .entry(&lease.node)
            .or_default()
            .get_mut(lease.family()) = Some(lease);
    }
    let entry = |(node, leases): (&&str, &PerFamily<Option<&Lease>>)| {
        let mut entry = BTreeMap::from([("node", (*node).to_owned())]);
        for keys in &KEYS {
            if let Some(lease) = leases.get(keys.family) {
                entry.insert(keys.public_ip, lease.public_ip.to_string());
                entry.insert(keys.subnet, lease.subnet.to_string());
                entry.extend(lease.vtep_mac.map(|mac| (keys.vtep_mac, mac.to_string())));
            }
        }
        entry
    };
    let mut serializer = serde_json::Serializer::new(output);
    let mut file = serializer.serialize_struct("LeaseFile", 2)?;
    file.serialize_field("version", &1)?;
    file.serialize_field("leases", &Sequence(|| nodes.iter().map(entry)))?;
    file.end()
}

/// Entries that are made while they are written, not before.
struct Sequence<F>(F);

impl<I: Iterator<Item: serde::Serialize>, F: Fn() -> I> serde::Serialize for Sequence<F> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// serde_json ends its messages with the position, which the error carries in fields of its own.
fn without_position(message: &str) -> String {
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message.to_owned(),
    }
}

/// One family of one entry; none where the entry has nothing of it.
fn check(
    raw: &RawLease<'_>,
    node: &Arc<str>,
    keys: &Keys,
    conf: &NetConf,
) -> Result<Option<Lease>, String> {
    let (public_ip, subnet, vtep_mac) = match keys.family {
        Family::V4 => (&raw.public_ip, &raw.subnet, &raw.vtep_mac),
        Family::V6 => (&raw.public_ip6, &raw.subnet6, &raw.vtep_mac6),
    };
    let (Text(Some(public_ip)), Text(Some(subnet))) = (public_ip, subnet) else {
        if public_ip.0.is_none() && subnet.0.is_none() && vtep_mac.0.is_none() {
            return Ok(None);
        }
        let missing = if subnet.0.is_none() {
            keys.subnet
        } else {
            keys.public_ip
        };
        return Err(format!(
            "{missing:?} is missing: {:?} and {:?} belong together; add it, or remove what there is of {}",
            keys.public_ip, keys.subnet, keys.family
        ));
    };
    let family = keys.family;
    let Some(network) = conf.network(family) else {
        return Err(format!(
            "{:?} is given, but {family} is off in net-conf.json: remove it, or set {:?}: true and {:?} there",
            keys.subnet, keys.switch, keys.network
        ));
    };
    let public_ip = address(public_ip, keys)?;
    let subnet = prefix(subnet, keys, network)?;
    if network.contains(&public_ip) {
        return Err(format!(
            "{:?} {public_ip} lies inside the pod network {network}: a tunnel to it would lead into itself; use the underlay address",
            keys.public_ip
        ));
    }
    let vtep_mac = match (conf.backend.vxlan(), vtep_mac) {
        (Some(_), Text(Some(text))) => Some(mac(text, keys)?),
        (Some(_), Text(None)) => {
            return Err(format!(
                "{:?} is missing: the vxlan backend needs one, like \"02:52:53:00:00:01\"",
                keys.vtep_mac
            ));
        }
        (None, _) => None,
    };
    Ok(Some(Lease {
        node: Arc::clone(node),
        public_ip,
        subnet,
        vtep_mac,
    }))
}

fn address(text: &str, keys: &Keys) -> Result<IpAddr, String> {
    let key = keys.public_ip;
    let address: Option<IpAddr> = text.parse().ok();
    let address = address
        .filter(|address| Family::of(*address) == keys.family)
        .ok_or_else(|| {
            format!(
                "{key:?} is {text:?}, not an {} address: write one like {:?}",
                keys.family, keys.example_ip
            )
        })?;
    match public_ip_problem(address) {
        Some(problem) => Err(format!("{key:?} {address} {problem}")),
        None => Ok(address),
    }
}

fn prefix(text: &str, keys: &Keys, network: IpNet) -> Result<IpNet, String> {
    let key = keys.subnet;
    let subnet: Option<IpNet> = text.parse().ok();
    let subnet = subnet
        .filter(|subnet| Family::of_net(*subnet) == keys.family)
        .ok_or_else(|| {
            format!(
                "{key:?} is {text:?}, not an {} prefix: write one like {:?}",
                keys.family, keys.example_subnet
            )
        })?;
    if subnet.trunc() != subnet {
        return Err(format!(
            "{key:?} {subnet} has host bits set: write {}",
            subnet.trunc()
        ));
    }
    if subnet.prefix_len() > keys.prefix_max {
        return Err(format!(
            "{key:?} {subnet} has no room for pods: use a prefix of /{} or shorter",
            keys.prefix_max
        ));
    }
    if !network.contains(&subnet) {
        return Err(format!(
            "{key:?} {subnet} is not inside the pod network {network} of net-conf.json"
        ));
    }
    Ok(subnet)
}

fn mac(text: &str, keys: &Keys) -> Result<Mac, String> {
    let key = keys.vtep_mac;
    let mac: Mac = text
        .parse()
        .map_err(|error| format!("{key:?} is {text:?}: {error}"))?;
    match vtep_mac_problem(mac) {
        Some(problem) => Err(format!(
            "{key:?} {mac} is {problem}: use a unicast address, best a locally administered one (second digit 2, 6, a or e)"
        )),
        None => Ok(mac),
    }
}

fn conflict(a: (usize, &str), b: (usize, &str), problem: String) -> LeaseFileError {
    let (first, second) = if a.0 < b.0 { (a, b) } else { (b, a) };
    LeaseFileError::Conflict {
        first: first.0,
        first_node: first.1.to_owned(),
        second: second.0,
        second_node: second.1.to_owned(),
        problem,
    }
}

fn check_names(entries: &[RawLease<'_>]) -> Result<(), LeaseFileError> {
    let mut names: Vec<(&str, usize)> = entries
        .iter()
        .enumerate()
        .map(|(index, raw)| (raw.node.as_ref(), index + 1))
        .collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(conflict(
            (pair[0].1, pair[0].0),
            (pair[1].1, pair[1].0),
            "name the same node: a node has one lease; remove one or correct its name".to_owned(),
        )),
        None => Ok(()),
    }
}

/// Finds entries that contradict each other, by sorting; leaves the entries sorted by subnet.
fn check_unique(leases: &mut [(usize, Lease)]) -> Result<(), LeaseFileError> {
    let adjacent = |leases: &[(usize, Lease)],
                    problem: &dyn Fn(&Lease, &Lease) -> Option<String>| {
        for pair in leases.windows(2) {
            let [a, b] = pair else { continue };
            if let Some(problem) = problem(&a.1, &b.1) {
                return Err(conflict((a.0, &a.1.node), (b.0, &b.1.node), problem));
            }
        }
        Ok(())
    };
    // The families have devices, and so forwarding entries, of their own.
    leases.sort_unstable_by_key(|(entry, lease)| (lease.family(), lease.vtep_mac, *entry));
    adjacent(leases, &|a, b| {
        let mac = a.vtep_mac?;
        (a.vtep_mac == b.vtep_mac && a.family() == b.family()).then(|| {
            format!(
                "have the same VTEP MAC {mac}: one forwarding entry cannot serve two nodes; give each its own"
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
    conf: NetConf,
}

impl FileSource {
    /// A source that reads `path` for node `node`, whose pods live in the networks of `conf`.
    pub fn new(path: PathBuf, node: String, conf: NetConf) -> Self {
        Self { path, node, conf }
    }

    fn read(&self) -> Result<(Vec<u8>, Result<LeaseSet, LeaseFileError>), std::io::Error> {
        let bytes = std::fs::read(&self.path)?;
        let leases = parse(&bytes, &self.node, &self.conf);
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

    fn conf(text: &str) -> NetConf {
        NetConf::parse(text.as_bytes()).unwrap()
    }

    fn vxlan() -> NetConf {
        conf(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#)
    }

    fn dual(backend: &str) -> NetConf {
        conf(&format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{{"Type":"{backend}"}}}}"#
        ))
    }

    fn entry(node: &str, ip: &str, subnet: &str, mac: &str) -> String {
        format!(r#"{{"node":"{node}","publicIP":"{ip}","subnet":"{subnet}","vtepMAC":"{mac}"}}"#)
    }

    fn parse_entries(entries: &[String]) -> Result<LeaseSet, LeaseFileError> {
        let text = format!(r#"{{"leases":[{}]}}"#, entries.join(","));
        parse(text.as_bytes(), "n1", &vxlan())
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
        let own = set.own(Family::V4).unwrap();
        assert_eq!(&*own.node, "n1");
        assert_eq!(own.vtep_ip(), "10.244.1.0".parse::<IpAddr>().unwrap());
        assert_eq!((set.own(Family::V6), set.count()), (None, 3));
        let nodes: Vec<_> = set.peers.iter().map(|lease| &*lease.node).collect();
        assert_eq!(nodes, ["n2", "n3"]);
    }

    #[test]
    fn version_one_is_accepted_and_others_are_not() {
        let network = &vxlan();
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

    /// The IPv6 half of an entry.
    fn with_v6(entry: &str, ip: &str, subnet: &str, mac: &str) -> String {
        let entry = entry.trim_end_matches('}');
        format!(r#"{entry},"publicIPv6":"{ip}","ipv6Subnet":"{subnet}","vtepMACv6":"{mac}"}}"#)
    }

    fn own_dual() -> String {
        with_v6(
            &own(),
            "fd00:199::11",
            "fd00:10:244:1::/64",
            "02:52:53:00:06:01",
        )
    }

    #[test]
    fn both_families_of_a_node_are_leases_of_their_own() {
        // The MAC of one family may appear in the other: the devices are not the same.
        let peer = with_v6(
            &entry("n2", "10.199.0.12", "10.244.2.0/24", "02:52:53:00:00:02"),
            "fd00:199::12",
            "fd00:10:244:2::/64",
            "02:52:53:00:00:01",
        );
        let four = entry("n3", "10.199.0.13", "10.244.3.0/24", "02:52:53:00:00:03");
        let text = format!(r#"{{"leases":[{peer},{},{four}]}}"#, own_dual());
        let set = parse(text.as_bytes(), "n1", &dual("vxlan")).unwrap();
        assert_eq!(set.count(), 5);
        let nodes = |family| -> Vec<_> {
            let nodes = set.peers(family).map(|lease| lease.node.to_string());
            nodes.collect()
        };
        assert_eq!(nodes(Family::V4), ["n2", "n3"]);
        assert_eq!(nodes(Family::V6), ["n2"]);
        let own = set.own(Family::V6).unwrap();
        assert_eq!(own.public_ip, "fd00:199::11".parse::<IpAddr>().unwrap());
        assert_eq!(own.vtep_mac, Some(Mac([2, 0x52, 0x53, 0, 6, 1])));
    }

    #[test]
    fn other_backends_need_no_mac_and_ignore_one() {
        let text = r#"{"leases":[{"node":"n1","publicIP":"10.199.0.11","subnet":"10.244.1.0/24"},
            {"node":"n2","publicIP":"10.199.0.12","subnet":"10.244.2.0/24","vtepMAC":"zz"}]}"#;
        let error = parse(text.as_bytes(), "n1", &vxlan())
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"vtepMAC\" is missing"), "{error}");
        let conf = conf(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}"#);
        let set = parse(text.as_bytes(), "n1", &conf).unwrap();
        assert_eq!((set.count(), set.peers[0].vtep_mac), (2, None));
    }

    #[test]
    fn families_must_agree_with_the_configuration() {
        let mac = "02:52:53:00:06:02";
        let peer = |ip: &str, subnet: &str| {
            let four = entry("n2", "10.199.0.12", "10.244.2.0/24", "02:52:53:00:00:02");
            with_v6(&four, ip, subnet, mac)
        };
        let cases: &[(&str, NetConf, Vec<String>, &[&str])] = &[
            (
                "own half missing",
                dual("vxlan"),
                vec![own()],
                &["entry 1", "ipv6Subnet", "IPv6 is on"],
            ),
            (
                "family off",
                vxlan(),
                vec![own_dual()],
                &["entry 1", "IPv6 is off", "EnableIPv6"],
            ),
            (
                "half a family",
                dual("vxlan"),
                vec![
                    own_dual(),
                    r#"{"node":"n2","publicIPv6":"fd00:199::12"}"#.to_owned(),
                ],
                &["entry 2", "\"ipv6Subnet\" is missing"],
            ),
            (
                "nothing",
                dual("vxlan"),
                vec![own_dual(), r#"{"node":"n2"}"#.to_owned()],
                &["entry 2", "has no subnet"],
            ),
            (
                "v4 in v6",
                dual("vxlan"),
                vec![own_dual(), peer("10.1.1.1", "fd00:10:244:2::/64")],
                &["entry 2", "publicIPv6", "not an IPv6 address"],
            ),
            (
                "link-local",
                dual("vxlan"),
                vec![own_dual(), peer("fe80::1", "fd00:10:244:2::/64")],
                &["entry 2", "publicIPv6", "global"],
            ),
            (
                "outside",
                dual("vxlan"),
                vec![own_dual(), peer("fd00:199::12", "fd00:10:245:2::/64")],
                &["entry 2", "ipv6Subnet", "fd00:10:244::/48"],
            ),
            (
                "overlap",
                dual("vxlan"),
                vec![own_dual(), peer("fd00:199::12", "fd00:10:244:1:8000::/65")],
                &["entries 1", "and 2", "overlap"],
            ),
            (
                "in the pod network",
                dual("vxlan"),
                vec![own_dual(), peer("fd00:10:244:9::1", "fd00:10:244:2::/64")],
                &["entry 2", "inside the pod network"],
            ),
        ];
        for (name, conf, entries, wanted) in cases {
            let text = format!(r#"{{"leases":[{}]}}"#, entries.join(","));
            let error = parse(text.as_bytes(), "n1", conf)
                .expect_err(name)
                .to_string();
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
            let error = parse(&text.as_bytes()[..end], "n1", &vxlan());
            assert!(
                matches!(error, Err(LeaseFileError::Json { .. })),
                "{end}: {error:?}"
            );
        }
    }

    #[test]
    fn unknown_keys_and_trailing_text_are_refused() {
        let network = &vxlan();
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
        let conf = conf(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#);
        let start = Instant::now();
        let set = parse(text.as_bytes(), "node-7", &conf).unwrap();
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
        let source = Box::new(FileSource::new(path.clone(), "n1".to_owned(), vxlan()));
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
            let _ = parse(&bytes, "n1", &vxlan());
        }

        #[test]
        fn no_text_in_the_fields_makes_it_panic(
            node in ".{0,8}", ip in "[0-9.]{0,15}", subnet in "[0-9./]{0,18}", mac in "[0-9a-f:é]{0,18}"
        ) {
            let text = serde_json::json!({"leases":[{"node":node,"publicIP":ip,"subnet":subnet,"vtepMAC":mac}]});
            let _ = parse(text.to_string().as_bytes(), "n1", &vxlan());
        }
    }
}
