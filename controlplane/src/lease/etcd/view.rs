//! From what is in etcd to leases: who is a peer, who is not and why, and who keeps what two nodes claim.
//!
//! Pure. A lease that cannot be used is named with what to change, and disturbs no other. Of two that overlap or have one
//! VTEP MAC address the older key keeps it, so that all nodes decide alike. Leases have no node's name in them; a peer is
//! called by its public IP.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::plan::{Entries, Entry};
use super::schema::{Record, Subnets};
use crate::family::{Family, PerFamily};
use crate::lease::claims::{Conflict, add_problem, settle};
use crate::lease::kube::annotations;
use crate::lease::{Lease, LeaseSet};
use crate::netconf::NetConf;

/// Who we are, for the comparison with others.
#[derive(Debug, Clone)]
pub struct Own {
    /// Last part of our key.
    pub name: Arc<str>,
    /// Revision at which it was made.
    pub created: i64,
    /// Our leases.
    pub leases: PerFamily<Option<Lease>>,
}

/// What came of looking at all leases.
#[derive(Debug, Default)]
pub struct View {
    /// The peers' leases as a set wants them: sorted by subnet, IPv4 first.
    pub peers: Vec<Lease>,
    /// Keys that are not used, or not in all families, and why.
    pub skipped: BTreeMap<Arc<str>, String>,
    /// Families in which an older lease has our VTEP MAC address.
    pub own_mac_taken: PerFamily<bool>,
    /// The older lease that overlaps ours.
    pub own_subnet_taken: Option<Arc<str>>,
}

impl View {
    /// Looks at all entries as seen by `own`. Those in `passed` are not peers, for a reason that is known.
    pub fn of(
        entries: &Entries,
        own: &Own,
        conf: &NetConf,
        passed: BTreeMap<Arc<str>, String>,
    ) -> Self {
        let mut view = Self {
            skipped: passed,
            ..Self::default()
        };
        let mut claims = Vec::new();
        for (_, lease) in own.leases.iter() {
            claims.extend(
                lease
                    .iter()
                    .map(|lease| (own.created, &own.name, lease.clone())),
            );
        }
        let mut by_age: Vec<_> = entries.iter().collect();
        by_age.sort_unstable_by_key(|(name, entry)| (entry.created, Arc::clone(name)));
        let mut nodes = BTreeSet::new();
        for (name, entry) in by_age {
            if *name == own.name || view.skipped.contains_key(name) {
                continue;
            }
            let (leases, problem) = match (&entry.subnets, &entry.record) {
                (Err(problem), _) | (_, Err(problem)) => (Vec::new(), Some(problem.clone())),
                (Ok(subnets), Ok(record)) => {
                    let ip = record.public_ips.v4.or(record.public_ips.v6);
                    let ip: Arc<str> = ip
                        .map_or_else(|| name.to_string(), |ip| ip.to_string())
                        .into();
                    // Two nodes behind one address are two nodes.
                    let node = match nodes.insert(Arc::clone(&ip)) {
                        true => ip,
                        false => format!("{ip} {name}").into(),
                    };
                    peer_leases(entry, subnets, record, &node, conf)
                }
            };
            claims.extend(leases.into_iter().map(|lease| (entry.created, name, lease)));
            if let Some(problem) = problem {
                view.skipped.insert(Arc::clone(name), problem);
            }
        }
        claims.sort_unstable_by(
            |(created, name, lease), (other_created, other_name, other)| {
                (created, name, lease.family()).cmp(&(other_created, other_name, other.family()))
            },
        );
        let claims = claims.into_iter();
        let claims = claims.map(|(_, name, lease)| (Arc::clone(name), lease));
        let settled = settle(claims, |name| *name == own.name);
        view.peers = settled.peers;
        view.own_mac_taken = settled.own_mac_taken;
        view.own_subnet_taken = settled.own_subnet_taken.map(|(older, ..)| older);
        for (name, lease, conflict) in settled.refused {
            add_problem(&mut view.skipped, &name, &refusal(&lease, &conflict));
        }
        view
    }

    /// The set, with our own leases.
    pub fn into_set(self, own: PerFamily<Option<Lease>>) -> LeaseSet {
        LeaseSet {
            own,
            peers: self.peers,
        }
    }
}

/// What stands against a lease, and what to do.
fn refusal(lease: &Lease, conflict: &Conflict) -> String {
    match conflict {
        Conflict::Mac(older) => format!(
            "has the same VtepMAC {} as the older lease of {older}, which keeps it: delete this key, and restart flannel on {}",
            lease.vtep_mac.unwrap_or_default(),
            lease.public_ip
        ),
        Conflict::Subnet(older, subnet) => format!(
            "overlaps {subnet} of {older}, which is older and keeps it: delete the key that is wrong"
        ),
    }
}

/// An entry's leases, and what stands against those that are missing.
fn peer_leases(
    entry: &Entry,
    subnets: &Subnets,
    record: &Record,
    node: &Arc<str>,
    conf: &NetConf,
) -> (Vec<Lease>, Option<String>) {
    let (theirs, ours) = (
        &*record.backend_type,
        annotations::backend_type(conf.backend),
    );
    if theirs != ours {
        // A reservation that nobody has taken is as it should be.
        let waits = entry.lease == 0 && theirs.is_empty();
        let problem = format!("has BackendType {theirs:?} and this node {ours:?}: ignored");
        return (Vec::new(), (!waits).then_some(problem));
    }
    let (mut leases, mut problems) = (Vec::new(), Vec::new());
    for family in conf.families() {
        match peer_lease(family, subnets, record, node, conf) {
            Ok(lease) => leases.extend(lease),
            Err(problem) => problems.push(problem),
        }
    }
    if leases.is_empty() && problems.is_empty() {
        problems.push("has no public IP with a subnet of a family that is on: start flannel or Ripstop there with this network configuration".to_owned());
    }
    (leases, (!problems.is_empty()).then(|| problems.join("; ")))
}

/// An entry's lease of one family; none if it has nothing of the family.
fn peer_lease(
    family: Family,
    subnets: &Subnets,
    record: &Record,
    node: &Arc<str>,
    conf: &NetConf,
) -> Result<Option<Lease>, String> {
    let (Some(subnet), Some(public_ip)) = (*subnets.get(family), *record.public_ips.get(family))
    else {
        return Ok(None);
    };
    let max = family.bits() - 2;
    if subnet.prefix_len() > max {
        return Err(format!(
            "has no room for pods in {subnet}: a subnet is a /{max} or shorter"
        ));
    }
    if let Some(network) = conf.network(family) {
        if !network.contains(&subnet) {
            return Err(format!(
                "is not inside the pod network {network} of the network configuration"
            ));
        }
        if network.contains(&public_ip) {
            return Err(format!(
                "has the public IP {public_ip}, which lies inside the pod network {network}: a tunnel to it would lead into itself; start that node with --public-ip"
            ));
        }
    }
    let vtep_mac = match (conf.backend.vxlan(), record.vtep_macs.get(family)) {
        (None, _) => None,
        (Some(_), Some(mac)) => Some(mac.clone()?),
        (Some(_), None) => {
            return Err(format!(
                "has no VtepMAC for {family}: restart flannel on {public_ip}"
            ));
        }
    };
    Ok(Some(Lease {
        node: Arc::clone(node),
        public_ip,
        subnet,
        vtep_mac,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::etcd::schema::parse_key_name;

    const V4: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;

    fn entries(all: &[(&str, &str, i64)]) -> Entries {
        let entry = |&(name, value, created): &(&str, &str, i64)| {
            let entry = Entry {
                subnets: parse_key_name(name),
                record: Record::parse(value.as_bytes()),
                value: value.into(),
                created,
                changed: created,
                lease: 1,
            };
            (name.into(), entry)
        };
        all.iter().map(entry).collect()
    }

    fn value(ip: &str, mac: u8) -> String {
        format!(
            r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{mac:02x}"}}}}"#
        )
    }

    fn look(conf: &str, created: i64, all: &[(&str, &str, i64)]) -> View {
        let conf = NetConf::parse(conf.as_bytes()).unwrap();
        let own = Own {
            name: "10.5.1.0-24".into(),
            created,
            leases: PerFamily {
                v4: Some(Lease {
                    node: "us".into(),
                    public_ip: "10.0.0.1".parse().unwrap(),
                    subnet: "10.5.1.0/24".parse().unwrap(),
                    vtep_mac: Some("02:00:00:00:00:01".parse().unwrap()),
                }),
                v6: None,
            },
        };
        View::of(&entries(all), &own, &conf, BTreeMap::new())
    }

    fn peers(view: &View) -> Vec<String> {
        let text = |lease: &Lease| format!("{} {}", lease.node, lease.subnet);
        view.peers.iter().map(text).collect()
    }

    #[test]
    fn bad_entries_are_named_and_disturb_no_other() {
        let (two, three) = (value("10.0.0.2", 2), value("10.0.0.3", 3));
        let inside = value("10.5.7.7", 7);
        let view = look(
            V4,
            1,
            &[
                ("10.5.2.0-24", &two, 2),
                ("nonsense", &two, 3),
                ("10.5.4.0-24", "{", 3),
                (
                    "10.5.5.0-24",
                    r#"{"PublicIP":"10.0.0.5","BackendType":"host-gw"}"#,
                    3,
                ),
                (
                    "10.5.6.0-24",
                    r#"{"PublicIP":"10.0.0.6","BackendType":"vxlan"}"#,
                    3,
                ),
                ("10.5.7.0-24", &inside, 3),
                ("10.6.8.0-24", &value("10.0.0.8", 8), 3),
                ("10.5.9.0-31", &value("10.0.0.9", 9), 3),
                (
                    "10.5.10.0-24",
                    r#"{"PublicIP":"10.0.0.10","BackendType":"vxlan","BackendData":{"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
                    3,
                ),
                ("10.5.3.0-24", &three, 4),
            ],
        );
        assert_eq!(
            peers(&view),
            ["10.0.0.2 10.5.2.0/24", "10.0.0.3 10.5.3.0/24"]
        );
        for (name, problem) in [
            ("nonsense", "not a subnet"),
            ("10.5.4.0-24", "not a JSON object"),
            ("10.5.5.0-24", "host-gw"),
            ("10.5.6.0-24", "no VtepMAC"),
            ("10.5.7.0-24", "lies inside the pod network"),
            ("10.6.8.0-24", "not inside the pod network"),
            ("10.5.9.0-31", "no room for pods"),
            ("10.5.10.0-24", "group address"),
        ] {
            assert!(
                view.skipped[name].contains(problem),
                "{name}: {:?}",
                view.skipped
            );
        }
        assert_eq!(view.skipped.len(), 8);
    }

    #[test]
    fn the_older_keeps_what_two_claim() {
        let all = [
            ("10.5.2.0-24", value("10.0.0.2", 2), 5),
            ("10.5.2.128-25", value("10.0.0.3", 3), 4),
            ("10.5.4.0-24", value("10.0.0.4", 3), 6),
        ];
        let all: Vec<_> = all
            .iter()
            .map(|(name, value, created)| (*name, &**value, *created))
            .collect();
        let view = look(V4, 1, &all);
        assert_eq!(peers(&view), ["10.0.0.3 10.5.2.128/25"]);
        assert!(view.skipped["10.5.2.0-24"].contains("10.5.2.128/25 of 10.0.0.3"));
        assert!(view.skipped["10.5.4.0-24"].contains("same VtepMAC 02:00:00:00:00:03"));
    }

    #[test]
    fn against_an_older_we_lose_and_against_a_younger_we_win() {
        let (rival, twin) = (value("10.0.0.2", 2), value("10.0.0.3", 1));
        let all = [("10.5.0.0-23", &*rival, 5), ("10.5.3.0-24", &*twin, 5)];
        let view = look(V4, 4, &all);
        assert_eq!(
            (view.own_subnet_taken.clone(), view.own_mac_taken.v4),
            (None, false)
        );
        assert!(view.peers.is_empty());
        let view = look(V4, 6, &all);
        assert_eq!(view.own_subnet_taken.as_deref(), Some("10.0.0.2"));
        let view = look(V4, 6, &all[1..]);
        assert!(view.own_mac_taken.v4);
        assert_eq!(peers(&view), ["10.0.0.3 10.5.3.0/24"]);
    }

    #[test]
    fn two_nodes_behind_one_address_have_two_names() {
        let (one, other) = (value("10.0.0.2", 2), value("10.0.0.2", 3));
        let view = look(
            V4,
            1,
            &[("10.5.2.0-24", &one, 5), ("10.5.3.0-24", &other, 4)],
        );
        assert_eq!(
            peers(&view),
            ["10.0.0.2 10.5.2.0-24 10.5.2.0/24", "10.0.0.2 10.5.3.0/24"]
        );
    }

    #[test]
    fn families_are_apart() {
        let both = r#"{"PublicIP":"10.0.0.2","PublicIPv6":"fd00:1::2","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:02"},"BackendV6Data":{"VtepMAC":"02:00:00:00:06:02"}}"#;
        let four = value("10.0.0.3", 3);
        let all = [
            ("10.5.2.0-24&fd00:5:0:2::-64", both, 2),
            ("10.5.3.0-24", &*four, 3),
        ];
        let view = look(DUAL, 1, &all);
        assert_eq!(
            peers(&view),
            [
                "10.0.0.2 10.5.2.0/24",
                "10.0.0.3 10.5.3.0/24",
                "10.0.0.2 fd00:5:0:2::/64"
            ]
        );
        assert!(view.skipped.is_empty(), "{:?}", view.skipped);
        let view = look(V4, 1, &all);
        assert_eq!(
            peers(&view),
            ["10.0.0.2 10.5.2.0/24", "10.0.0.3 10.5.3.0/24"]
        );
    }
}
