//! Who keeps what two claim: the older. Sources bring claims in order of age, so that all nodes decide alike and a
//! newcomer cannot take what is in use.

use core::net::IpAddr;
use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;

use super::Lease;
use super::backoff::random_mac;
use crate::family::{Family, PerFamily};
use crate::mac::Mac;

/// How many are named in one go.
const NAMED_MAX: usize = 20;

/// What stands against a claim, and whose it is.
pub(super) enum Conflict {
    /// The VTEP MAC address is another's.
    Mac(Arc<str>),
    /// The subnet overlaps this one of another.
    Subnet(Arc<str>, IpNet),
}

/// What those who came first have. Subnets are disjoint, so only the neighbours of a place in their order can overlap it.
#[derive(Default)]
struct Taken {
    subnets: BTreeMap<IpAddr, (IpNet, Arc<str>)>,
    macs: HashMap<(Family, Mac), Arc<str>>,
}

impl Taken {
    /// What stands against a lease, if anything does.
    fn conflict(&self, lease: &Lease) -> Option<Conflict> {
        let (first, last) = (lease.subnet.network(), lease.subnet.broadcast());
        let before = self.subnets.range(..=last).next_back();
        if let Some((_, (net, node))) = before
            && net.broadcast() >= first
            && Family::of_net(*net) == lease.family()
        {
            return Some(Conflict::Subnet(Arc::clone(node), *net));
        }
        let node = self.macs.get(&(lease.family(), lease.vtep_mac?))?;
        Some(Conflict::Mac(Arc::clone(node)))
    }

    /// Lets it have what nothing stands against.
    fn insert(&mut self, lease: &Lease) {
        let node = || Arc::clone(&lease.node);
        self.subnets
            .insert(lease.subnet.network(), (lease.subnet, node()));
        if let Some(mac) = lease.vtep_mac {
            self.macs.insert((lease.family(), mac), node());
        }
    }
}

/// What came of settling all claims. `K` is what a source calls a claimant.
pub(super) struct Settled<K> {
    /// The others' leases that nothing stands against: sorted by subnet, IPv4 first.
    pub(super) peers: Vec<Lease>,
    /// Families in which an older one has our VTEP MAC address.
    pub(super) own_mac_taken: PerFamily<bool>,
    /// The older one that has our subnet, or overlaps it: who, its subnet, and ours.
    pub(super) own_subnet_taken: Option<(Arc<str>, IpNet, IpNet)>,
    /// The others that something stands against.
    pub(super) refused: Vec<(K, Lease, Conflict)>,
}

/// Decides who keeps what, by claims in order of age. `is_own` tells ours.
pub(super) fn settle<K>(
    claims: impl IntoIterator<Item = (K, Lease)>,
    is_own: impl Fn(&K) -> bool,
) -> Settled<K> {
    let mut settled = Settled {
        peers: Vec::new(),
        own_mac_taken: PerFamily::default(),
        own_subnet_taken: None,
        refused: Vec::new(),
    };
    let mut taken = Taken::default();
    for (claimant, lease) in claims {
        match (taken.conflict(&lease), is_own(&claimant)) {
            (None, is_own) => {
                taken.insert(&lease);
                if !is_own {
                    settled.peers.push(lease);
                }
            }
            (Some(Conflict::Mac(_)), true) => {
                *settled.own_mac_taken.get_mut(lease.family()) = true;
            }
            (Some(Conflict::Subnet(older, subnet)), true) => {
                settled.own_subnet_taken = Some((older, subnet, lease.subnet));
            }
            (Some(conflict), false) => settled.refused.push((claimant, lease, conflict)),
        }
    }
    settled
        .peers
        .sort_unstable_by_key(|lease| (lease.subnet.network(), lease.subnet.prefix_len()));
    settled
}

/// Adds to what stands against somebody.
pub(super) fn add_problem(skipped: &mut BTreeMap<Arc<str>, String>, name: &Arc<str>, text: &str) {
    let problem = skipped.entry(Arc::clone(name)).or_default();
    if !problem.is_empty() {
        problem.push_str("; ");
    }
    problem.push_str(text);
}

/// Gives our leases another VTEP MAC address in the families in which an older one has ours; whether there were any.
pub(super) fn leave_macs(
    taken: PerFamily<bool>,
    leases: &mut PerFamily<Option<Lease>>,
    macs: &mut PerFamily<Option<Mac>>,
) -> bool {
    for family in Family::ALL {
        if let (true, Some(lease)) = (*taken.get(family), leases.get_mut(family)) {
            let mac = random_mac();
            tracing::warn!(%family, taken = ?lease.vtep_mac, %mac, "an older node has our VTEP MAC address: taking another");
            lease.vtep_mac = Some(mac);
            *macs.get_mut(family) = Some(mac);
        }
    }
    taken != PerFamily::default()
}

/// Names those that have come to be skipped, or for another reason, once. A whole cluster of another backend is not
/// worth a line each.
pub(super) fn name_skipped(
    kind: &str,
    named: &mut BTreeMap<Arc<str>, String>,
    skipped: &mut BTreeMap<Arc<str>, String>,
) {
    let news = skipped
        .iter()
        .filter(|(node, reason)| named.get(*node) != Some(reason));
    let count = news.clone().count();
    for (node, reason) in news.take(NAMED_MAX) {
        tracing::warn!("{kind} {node:?} {reason}");
    }
    if count > NAMED_MAX {
        tracing::warn!("and {} more {kind}s are skipped", count - NAMED_MAX);
    }
    for node in named
        .keys()
        .filter(|node| !skipped.contains_key(*node))
        .take(NAMED_MAX)
    {
        tracing::info!("nothing stands against {kind} {node:?}");
    }
    core::mem::swap(named, skipped);
}
