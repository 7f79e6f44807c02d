//! Which key is ours, and which subnet to take if none is.
//!
//! Pure: from what is in etcd and what we know of ourselves. A lease has no owner's name in it, only a public IP and, with
//! VXLAN, a MAC address; two nodes behind one address look alike to flannel, which lets the one steal the other's lease.
//! Here a lease is ours for certain if it has our MAC address; probably, if it is the subnet that we had before; and for
//! want of anything else if it has our public IP. It is not ours if it has our public IP, another MAC address than our
//! device, and is not the subnet that we had.

use core::net::IpAddr;
use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::schema::{Record, Subnets};
use crate::family::{Family, PerFamily};
use crate::mac::Mac;
use crate::netconf::Pool;

/// Free subnets of which one is chosen, as in flannel.
const CHOICE: usize = 100;

/// A key below `subnets/` with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What the key says, or what is wrong with it.
    pub subnets: Result<Subnets, String>,
    /// What the value says, or what is wrong with it.
    pub record: Result<Record, String>,
    /// The value.
    pub value: Vec<u8>,
    /// Revision at which the key was made: its age.
    pub created: i64,
    /// Revision at which it was last written.
    pub changed: i64,
    /// The etcd lease that it ends with; 0 for a reservation, which does not end.
    pub lease: i64,
}

/// All of them, by the last part of their keys.
pub type Entries = BTreeMap<Arc<str>, Entry>;

/// What this process has held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Last part of the key.
    pub name: Arc<str>,
    /// What it says.
    pub subnets: Subnets,
    /// The public IPs that we wrote.
    pub public_ips: PerFamily<Option<IpAddr>>,
}

/// What we know of ourselves.
#[derive(Debug, Clone, Copy)]
pub struct Us<'a> {
    /// Where subnets come from, in the families that are on.
    pub pools: &'a PerFamily<Option<Pool>>,
    /// The public IPs that others shall use.
    pub public_ips: PerFamily<Option<IpAddr>>,
    /// The MAC addresses of our tunnel end points, where there are any yet.
    pub macs: PerFamily<Option<Mac>>,
    /// What we have held since we run.
    pub held: Option<&'a Held>,
    /// What we had before we ran, by `subnet.env`.
    pub previous: Subnets,
}

/// How things stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// This is our lease.
    Ours(Arc<str>),
    /// This is our lease, and cannot be used with this configuration.
    Misfit(Arc<str>),
    /// We have none.
    None,
}

/// What came of looking for our lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// How things stand.
    pub standing: Standing,
    /// What we held is another's, and how that is known.
    pub stolen: Option<String>,
    /// Leases that have our public IP and are not used, and why.
    pub others: BTreeMap<Arc<str>, String>,
}

impl Us<'_> {
    fn families(&self) -> impl Iterator<Item = Family> {
        let on = |family: &Family| self.pools.get(*family).is_some();
        Family::ALL.into_iter().filter(on)
    }

    /// The public IP that leases are known by is that of IPv4, if it is on.
    fn is_at(&self, record: &Record, ips: PerFamily<Option<IpAddr>>) -> bool {
        self.families().next().is_some_and(|family| {
            let theirs = record.public_ips.get(family);
            theirs.is_some() && theirs == ips.get(family)
        })
    }

    /// Whether a record has our public IP, or our MAC address.
    pub fn is_ours(&self, record: &Record) -> bool {
        self.is_at(record, self.public_ips) || self.mark(record) == Some(true)
    }

    /// Whether the MAC addresses say that it is ours, or that it is not; nothing if they say nothing.
    fn mark(&self, record: &Record) -> Option<bool> {
        let pairs = self
            .families()
            .filter_map(|family| Some((record.mac(family)?, (*self.macs.get(family))?)));
        pairs
            .map(|(theirs, ours)| theirs == ours)
            .reduce(|one, other| one || other)
    }

    /// Whether a lease's subnets are such as would be chosen.
    pub fn fits(&self, subnets: &Subnets) -> bool {
        self.families().all(|family| {
            let (pool, subnet) = (self.pools.get(family), subnets.get(family));
            pool.zip(*subnet)
                .is_some_and(|(pool, subnet)| pool.contains(subnet))
        })
    }

    /// Looks for our lease.
    pub fn find(&self, entries: &Entries) -> Found {
        let mut found = Found {
            standing: Standing::None,
            stolen: None,
            others: BTreeMap::new(),
        };
        if let Some(held) = self.held
            && let Some(entry) = entries.get(&held.name)
        {
            match &entry.record {
                Ok(record) => match (
                    self.is_at(record, self.public_ips) || self.is_at(record, held.public_ips),
                    self.mark(record),
                ) {
                    (true, None | Some(true)) => {
                        found.standing = Standing::Ours(Arc::clone(&held.name));
                    }
                    (true, Some(false)) => {
                        found.stolen = Some("was written by another node with the same public IP: give each its own with --public-ip".to_owned());
                    }
                    (false, _) => {
                        let thief = record.public_ips.v4.or(record.public_ips.v6);
                        let thief = thief.map_or_else(|| "nobody".to_owned(), |ip| ip.to_string());
                        found.stolen = Some(format!("belongs to {thief}"));
                    }
                },
                // Nobody's claim, and where ours was.
                Err(_) => found.standing = Standing::Ours(Arc::clone(&held.name)),
            }
        }
        let mut best: Option<((u8, i64), &Arc<str>)> = None;
        for (name, entry) in entries {
            let (Ok(subnets), Ok(record)) = (&entry.subnets, &entry.record) else {
                continue;
            };
            let is_held = self.held.is_some_and(|held| held.name == *name);
            let had = self.families().any(|family| {
                let subnet = subnets.get(family);
                subnet.is_some() && subnet == self.previous.get(family)
            });
            // Our address may have changed while we did not run.
            let moved = had && self.mark(record) == Some(true);
            if is_held || !(moved || self.is_at(record, self.public_ips)) {
                continue;
            }
            let rank = match self.mark(record) {
                Some(true) => 0,
                _ if had => 1,
                None => 2,
                Some(false) => {
                    let problem = "has our public IP and another VTEP MAC address: another node uses the same public IP; give each its own with --public-ip";
                    found.others.insert(Arc::clone(name), problem.to_owned());
                    continue;
                }
            };
            if entry.lease == 0 && !self.fits(subnets) {
                let problem = "is reserved for us and does not fit the network configuration: correct one of the two";
                found.others.insert(Arc::clone(name), problem.to_owned());
                continue;
            }
            found.others.insert(
                Arc::clone(name),
                "has our public IP too, and is not used: it ends by itself".to_owned(),
            );
            if best.is_none_or(|(before, _)| (rank, entry.created) < before) {
                best = Some(((rank, entry.created), name));
            }
        }
        if let (Standing::None, Some((_, name))) = (&found.standing, best) {
            found.others.remove(name);
            found.standing = Standing::Ours(Arc::clone(name));
        }
        if let Standing::Ours(name) = &found.standing {
            let subnets = entries
                .get(name)
                .and_then(|entry| entry.subnets.as_ref().ok());
            if !subnets.is_some_and(|subnets| self.fits(subnets)) {
                found.standing = Standing::Misfit(Arc::clone(name));
            }
        }
        found
    }

    /// Subnets for us: those that `wanted` names where they are free, else one of the first free ones, by chance.
    pub fn choose(
        &self,
        entries: &Entries,
        wanted: &[Subnets],
        dice: u64,
    ) -> Result<Subnets, String> {
        let mut chosen = Subnets::default();
        for family in self.families() {
            let Some(pool) = self.pools.get(family) else {
                continue;
            };
            let taken = Taken::new(entries, family);
            let wanted = wanted.iter().filter_map(|subnets| *subnets.get(family));
            let is_free = |net: &IpNet| pool.contains(*net) && taken.end(*net).is_none();
            let subnet = match wanted.into_iter().find(is_free) {
                Some(subnet) => subnet,
                None => taken.free(pool, dice).ok_or_else(|| {
                    format!(
                        "out of subnets: every /{} from {} to {} is taken; give the network a shorter prefix, or remove leases of nodes that are gone",
                        pool.len, pool.min, pool.max
                    )
                })?,
            };
            *chosen.get_mut(family) = Some(subnet);
        }
        Ok(chosen)
    }
}

/// What of a family has been claimed, however badly: disjoint ranges in order.
struct Taken(Vec<(IpAddr, IpAddr)>);

impl Taken {
    fn new(entries: &Entries, family: Family) -> Self {
        let subnets = entries
            .values()
            .filter_map(|entry| entry.subnets.as_ref().ok());
        let nets = subnets.filter_map(|subnets| *subnets.get(family));
        let mut all: Vec<_> = nets.map(|net| (net.network(), net.broadcast())).collect();
        all.sort_unstable();
        let mut ranges: Vec<(IpAddr, IpAddr)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match ranges.last_mut() {
                Some((_, end)) if *end >= first => *end = last.max(*end),
                _ => ranges.push((first, last)),
            }
        }
        Self(ranges)
    }

    /// The end of the range that a subnet overlaps.
    fn end(&self, net: IpNet) -> Option<IpAddr> {
        let after = self
            .0
            .partition_point(|(first, _)| *first <= net.broadcast());
        let (_, end) = self.0.get(after.checked_sub(1)?)?;
        (*end >= net.network()).then_some(*end)
    }

    fn free(&self, pool: &Pool, dice: u64) -> Option<IpNet> {
        let mut free = Vec::new();
        let mut next = pool.first();
        while let Some(net) = next.filter(|_| free.len() < CHOICE) {
            let end = self.end(net);
            if end.is_none() {
                free.push(net);
            }
            // Past the whole range at once: one bad key may cover a network.
            next = pool.after(end.unwrap_or(net.broadcast()).max(net.broadcast()));
        }
        let count = u64::try_from(free.len()).ok()?;
        let at = usize::try_from(dice.checked_rem(count)?).ok()?;
        free.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::etcd::schema::{key_name, parse_key_name};
    use crate::netconf::NetConf;
    use proptest::prelude::*;

    const V4: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;
    const OURS: &str = "02:00:00:00:00:01";

    fn pools(conf: &str) -> PerFamily<Option<Pool>> {
        NetConf::parse_with_pools(conf.as_bytes()).unwrap().1
    }

    /// Keys with a public IP, a MAC address and the revision at which they were made; a revision below 0 is a reservation.
    fn entries(all: &[(&str, &str, &str, i64)]) -> Entries {
        let entry = |&(name, ip, mac, created): &(&str, &str, &str, i64)| {
            let data = match mac {
                "" => String::new(),
                mac => {
                    format!(r#","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}"#)
                }
            };
            let value = format!(r#"{{"PublicIP":"{ip}"{data}}}"#).into_bytes();
            let entry = Entry {
                subnets: parse_key_name(name),
                record: Record::parse(&value),
                value,
                created: created.abs(),
                changed: created.abs(),
                lease: created.max(0),
            };
            (name.into(), entry)
        };
        all.iter().map(entry).collect()
    }

    fn us<'a>(
        pools: &'a PerFamily<Option<Pool>>,
        mac: &str,
        held: Option<&'a Held>,
        previous: &str,
    ) -> Us<'a> {
        Us {
            pools,
            public_ips: PerFamily {
                v4: Some("10.0.0.1".parse().unwrap()),
                v6: None,
            },
            macs: PerFamily {
                v4: mac.parse().ok(),
                v6: None,
            },
            held,
            previous: parse_key_name(previous).unwrap_or_default(),
        }
    }

    fn held(name: &str) -> Held {
        Held {
            name: name.into(),
            subnets: parse_key_name(name).unwrap(),
            public_ips: PerFamily {
                v4: Some("10.0.0.1".parse().unwrap()),
                v6: None,
            },
        }
    }

    fn ours(name: &str) -> Standing {
        Standing::Ours(name.into())
    }

    #[test]
    fn a_lease_is_known_by_mac_then_by_subnet_then_by_public_ip() {
        let pools = pools(V4);
        let all = entries(&[
            ("10.5.1.0-24", "10.0.0.1", "02:00:00:00:00:09", 5),
            ("10.5.2.0-24", "10.0.0.1", OURS, 7),
            ("10.5.3.0-24", "10.0.0.1", "02:00:00:00:00:08", 6),
            ("10.5.4.0-24", "10.0.0.2", OURS, 1),
        ]);
        for (mac, previous, expected) in [
            (OURS, "10.5.3.0-24", ours("10.5.2.0-24")),
            ("", "10.5.3.0-24", ours("10.5.3.0-24")),
            ("", "10.5.9.0-24", ours("10.5.1.0-24")),
            ("", "", ours("10.5.1.0-24")),
            ("02:00:00:00:00:07", "10.5.3.0-24", ours("10.5.3.0-24")),
            // Its address is another than when it was written, and all else is ours.
            (OURS, "10.5.4.0-24", ours("10.5.4.0-24")),
            ("02:00:00:00:00:07", "10.5.4.0-24", Standing::None),
            // A device of ours, and none of these leases is its.
            ("02:00:00:00:00:07", "", Standing::None),
        ] {
            let found = us(&pools, mac, None, previous).find(&all);
            assert_eq!(found.standing, expected, "{mac} {previous}");
            assert_eq!(found.stolen, None);
            let one_of_three = expected != Standing::None && expected != ours("10.5.4.0-24");
            let unused = if one_of_three { 2 } else { 3 };
            assert_eq!(found.others.len(), unused, "{:?}", found.others);
        }
    }

    #[test]
    fn what_was_held_stays_ours_until_another_has_it() {
        let pools = pools(V4);
        let before = held("10.5.2.0-24");
        let at = |ip: &str, mac: &str| {
            let all = entries(&[
                ("10.5.1.0-24", "10.0.0.1", "02:00:00:00:00:09", 5),
                ("10.5.2.0-24", ip, mac, 7),
            ]);
            us(&pools, OURS, Some(&before), "").find(&all)
        };
        assert_eq!(at("10.0.0.1", OURS).standing, ours("10.5.2.0-24"));
        // Someone removed what makes it usable; nobody else claims it.
        assert_eq!(at("10.0.0.1", "").standing, ours("10.5.2.0-24"));
        assert_eq!(at("nonsense", OURS).standing, ours("10.5.2.0-24"));
        let stolen = at("10.0.0.2", OURS);
        assert_eq!(stolen.standing, Standing::None);
        assert!(stolen.stolen.unwrap().contains("10.0.0.2"));
        let twin = at("10.0.0.1", "02:00:00:00:00:07");
        assert_eq!(twin.standing, Standing::None);
        assert!(twin.stolen.unwrap().contains("same public IP"));
        // Gone, and nobody has it: neither stolen nor, by another MAC address, the other one.
        let gone = us(&pools, OURS, Some(&before), "").find(&entries(&[(
            "10.5.1.0-24",
            "10.0.0.1",
            "02:00:00:00:00:09",
            5,
        )]));
        assert_eq!((gone.standing, gone.stolen), (Standing::None, None));
        // Our own address changed since we wrote it.
        let mut moved = us(&pools, OURS, Some(&before), "");
        moved.public_ips.v4 = Some("10.0.0.77".parse().unwrap());
        let all = entries(&[("10.5.2.0-24", "10.0.0.1", OURS, 7)]);
        assert_eq!(moved.find(&all).standing, ours("10.5.2.0-24"));
    }

    #[test]
    fn what_does_not_fit_is_said_and_a_reservation_is_not_touched() {
        let pools = pools(V4);
        for name in [
            "10.5.0.0-24",
            "10.5.2.0-25",
            "10.6.2.0-24",
            "0.0.0.0-0&fd00::-64",
        ] {
            let all = entries(&[(name, "10.0.0.1", OURS, 7)]);
            assert_eq!(
                us(&pools, OURS, None, "").find(&all).standing,
                Standing::Misfit(name.into())
            );
            let all = entries(&[(name, "10.0.0.1", "", -7)]);
            let found = us(&pools, OURS, None, "").find(&all);
            assert_eq!(found.standing, Standing::None);
            assert!(
                found.others.values().all(|text| text.contains("reserved")),
                "{found:?}"
            );
        }
        let all = entries(&[("10.5.2.0-24", "10.0.0.1", "", -7)]);
        assert_eq!(
            us(&pools, OURS, None, "").find(&all).standing,
            ours("10.5.2.0-24")
        );
        // A key of IPv4 alone when IPv6 is on.
        let both = self::pools(DUAL);
        let all = entries(&[("10.5.2.0-24", "10.0.0.1", OURS, 7)]);
        assert_eq!(
            us(&both, OURS, None, "").find(&all).standing,
            Standing::Misfit("10.5.2.0-24".into())
        );
    }

    #[test]
    fn a_subnet_is_taken_if_it_is_free_and_else_drawn_from_the_first_hundred() {
        let pools = pools(V4);
        let us = us(&pools, OURS, None, "");
        let want = |name: &str| parse_key_name(name).unwrap();
        let all = entries(&[
            ("10.5.1.0-24", "10.0.0.2", OURS, 5),
            ("10.5.2.0-25", "nonsense", "", 5),
        ]);
        let chosen = |wanted: &[Subnets], dice| key_name(&us.choose(&all, wanted, dice).unwrap());
        assert_eq!(chosen(&[want("10.5.9.0-24")], 7), "10.5.9.0-24");
        assert_eq!(
            chosen(&[want("10.5.1.0-24"), want("10.5.8.0-24")], 7),
            "10.5.8.0-24"
        );
        assert_eq!(
            chosen(&[want("10.5.2.0-24"), want("10.6.8.0-24")], 0),
            "10.5.3.0-24"
        );
        assert_eq!(chosen(&[], 99), "10.5.102.0-24");
        assert_eq!(chosen(&[], 100), "10.5.3.0-24");
        let all = entries(&[("10.0.0.0-8", "10.0.0.2", OURS, 5)]);
        assert!(
            us.choose(&all, &[], 0)
                .unwrap_err()
                .starts_with("out of subnets")
        );
    }

    #[test]
    fn a_key_that_covers_half_a_network_does_not_take_half_an_eternity() {
        let pools = pools(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/8","Backend":{"Type":"vxlan"}}"#,
        );
        let us = us(&pools, OURS, None, "");
        let all = entries(&[("0.0.0.0-0&fd00::-9", "10.0.0.2", OURS, 5)]);
        let chosen = us.choose(&all, &[], 0).unwrap();
        assert_eq!(key_name(&chosen), "0.0.0.0-0&fd80::-64");
    }

    proptest! {
        #[test]
        fn what_is_chosen_is_free_and_of_the_pool(
            taken in prop::collection::vec((0..256u16, 22..28u8), 0..80),
            len in 18..30u64,
            dice: u64,
        ) {
            let conf = format!(r#"{{"Network":"10.5.0.0/16","SubnetLen":{len},"Backend":{{"Type":"vxlan"}}}}"#);
            let pools = pools(&conf);
            let names: Vec<String> = taken.iter().map(|(third, len)| format!("10.5.{third}.0-{len}")).collect();
            let names: Vec<_> = names.iter().map(|name| (&**name, "10.0.0.2", OURS, 1)).collect();
            let all = entries(&names);
            let pool = pools.v4.unwrap();
            // The dumb way: every subnet of the network, one after the other.
            let network: IpNet = "10.5.0.0/16".parse().unwrap();
            let nets: Vec<IpNet> = all.values().map(|entry| entry.subnets.clone().unwrap().v4.unwrap()).collect();
            let overlaps = |net: &IpNet| nets.iter().any(|other| other.contains(net) || net.contains(other));
            let free: Vec<IpNet> = network.subnets(pool.len).unwrap().skip(1).filter(|net| !overlaps(net)).take(CHOICE).collect();
            match us(&pools, OURS, None, "").choose(&all, &[], dice) {
                Ok(chosen) => prop_assert!(free.contains(&chosen.v4.unwrap())),
                Err(_) => prop_assert!(free.is_empty()),
            }
        }
    }
}
