//! Who keeps what two claim: the older. Sources bring claims in order of age, so that all nodes decide alike and a
//! newcomer cannot take what is in use.

use core::net::IpAddr;
use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;

use super::Lease;
use crate::family::Family;
use crate::mac::Mac;

/// What stands against a claim, and whose it is.
pub(super) enum Conflict {
    /// The VTEP MAC address is another's.
    Mac(Arc<str>),
    /// The subnet overlaps this one of another.
    Subnet(Arc<str>, IpNet),
}

/// What those who came first have. Subnets are disjoint, so only the neighbours of a place in their order can overlap it.
#[derive(Default)]
pub(super) struct Taken {
    subnets: BTreeMap<IpAddr, (IpNet, Arc<str>)>,
    macs: HashMap<(Family, Mac), Arc<str>>,
}

impl Taken {
    /// What stands against a lease, if anything does.
    pub(super) fn conflict(&self, lease: &Lease) -> Option<Conflict> {
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
    pub(super) fn insert(&mut self, lease: &Lease) {
        let node = || Arc::clone(&lease.node);
        self.subnets
            .insert(lease.subnet.network(), (lease.subnet, node()));
        if let Some(mac) = lease.vtep_mac {
            self.macs.insert((lease.family(), mac), node());
        }
    }
}
