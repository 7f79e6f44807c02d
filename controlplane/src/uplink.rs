//! The uplinks: interfaces that packets to other nodes leave by, and the NICs that each is made of.
//!
//! ```text
//!   eth0                the NIC itself
//!   eth0.100            NIC eth0, frames tagged with 100
//!   bond0               its ports: the active one with active-backup, otherwise those that have carrier
//!   bond0.100           the same, tagged
//! ```
//!
//! Routes with several next hops may leave by several interfaces; a worker can only send by its own NIC, so a peer is
//! the workers' only if it can be reached by every uplink. Pure.

use hashbrown::HashMap;
use ripstop_fib::{NICS, NicRecord, UPLINKS};

use crate::mac::Mac;
use crate::netlink::message::{BondLink, Link, LinkKind};

/// An interface of the underlay, with the NICs below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Index of the interface that routes name.
    pub link: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address: the source of frames.
    pub mac: Mac,
    /// 802.1Q id of its frames.
    pub vlan: Option<u16>,
    /// The NICs: index and name.
    pub nics: Vec<(u32, String)>,
}

impl Uplink {
    /// Takes an interface apart; none where it is no Ethernet interface or has a form that workers cannot serve.
    pub fn of(links: &[Link], index: u32) -> Option<Self> {
        let by_index = |index: u32| links.iter().find(|link| index != 0 && link.index == index);
        let link = by_index(index)?;
        let mac = link.mac.filter(|mac| !mac.is_zero())?;
        let (carrier, vlan) = match link.kind {
            LinkKind::Vlan(id) => (by_index(link.lower)?, Some(id)),
            LinkKind::Other | LinkKind::Vxlan(_) | LinkKind::Ipip(_) | LinkKind::Bond(_) => {
                (link, None)
            }
        };
        let nic = |link: &Link| (link.index, link.name.clone());
        let nics = match &carrier.kind {
            LinkKind::Bond(bond) => ports(links, carrier.index, *bond).map(nic).collect(),
            LinkKind::Other => vec![nic(carrier)],
            // A tag within a tag, or a tunnel: its frames are not ours to write.
            LinkKind::Vlan(_) | LinkKind::Vxlan(_) | LinkKind::Ipip(_) => return None,
        };
        Some(Self {
            link: index,
            name: link.name.clone(),
            mac,
            vlan,
            nics,
        })
    }
}

/// The ports of a bond that carry packets.
fn ports(links: &[Link], bond: u32, settings: BondLink) -> impl Iterator<Item = &Link> {
    links.iter().filter(move |link| {
        let is_port = link.master == bond && link.up && link.running;
        is_port && (!settings.active_backup || link.index == settings.active)
    })
}

/// The NICs of all uplinks, as the forwarding table lists them.
pub fn nic_records(uplinks: &[Uplink]) -> [NicRecord; NICS] {
    let mut records = [NicRecord::default(); NICS];
    let all = (0u8..).zip(uplinks).flat_map(|(number, uplink)| {
        let record = move |(ifindex, _): &(u32, String)| NicRecord {
            ifindex: *ifindex,
            uplink: number,
            vlan: uplink.vlan.unwrap_or(0),
        };
        uplink.nics.iter().map(record)
    });
    for (record, nic) in records.iter_mut().zip(all) {
        *record = nic;
    }
    records
}

/// One way to a peer: the interface, and whether frames can be sent there at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Interface index.
    pub link: u32,
    /// The next hop there is known.
    pub usable: bool,
}

/// Chooses the interfaces that workers send by, the underlay interface first, then by index.
///
/// The interface that reaches most peers is one. Another is added only if no peer is lost to the workers by that: one
/// that the route to does not name, or at least does not reach at all. A next hop that is silent for some
/// peers loses those, and one that is silent for all loses the uplink.
pub fn choose<P: AsRef<[Exit]>>(underlay: u32, peers: &[P]) -> Vec<u32> {
    let mut counts: HashMap<u32, usize> = HashMap::new();
    for peer in peers {
        let mut seen: Vec<u32> = usable(peer.as_ref()).collect();
        seen.sort_unstable();
        seen.dedup();
        for link in seen {
            *counts.entry(link).or_default() += 1;
        }
    }
    let mut candidates: Vec<(u32, usize)> = counts.into_iter().collect();
    candidates
        .sort_unstable_by_key(|&(link, count)| (core::cmp::Reverse(count), link != underlay, link));
    let mut chosen: Vec<u32> = Vec::new();
    for (candidate, _) in candidates {
        let covered = |peer: &&P| {
            chosen
                .iter()
                .all(|link| usable(peer.as_ref()).any(|usable| usable == *link))
        };
        let keeps_all = peers.iter().filter(covered).all(|peer| {
            let mut exits = peer.as_ref().iter();
            exits.any(|exit| exit.link == candidate)
        });
        if chosen.is_empty() || (keeps_all && chosen.len() < UPLINKS) {
            chosen.push(candidate);
        }
    }
    if chosen.is_empty() {
        chosen.push(underlay);
    }
    chosen.sort_unstable_by_key(|&link| (link != underlay, link));
    chosen
}

fn usable(exits: &[Exit]) -> impl Iterator<Item = u32> {
    exits
        .iter()
        .filter(|exit| exit.usable)
        .map(|exit| exit.link)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: LinkKind) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mac: Some(Mac([2, 0, 0, 0, 0, 7])),
            up: true,
            running: true,
            kind,
            ..Link::default()
        }
    }

    fn bond(active_backup: bool, active: u32) -> LinkKind {
        LinkKind::Bond(BondLink {
            active_backup,
            active,
        })
    }

    #[test]
    fn each_form_of_interface_comes_down_to_its_nics() {
        let port = |index, name: &str| Link {
            master: 10,
            ..link(index, name, LinkKind::Other)
        };
        let vlan = |index, name: &str, lower| Link {
            lower,
            ..link(index, name, LinkKind::Vlan(100))
        };
        let mut unplugged = port(5, "eth3");
        unplugged.running = false;
        let mut without_mac = link(8, "tun0", LinkKind::Other);
        without_mac.mac = None;
        let mut links = vec![
            link(2, "eth0", LinkKind::Other),
            port(3, "eth1"),
            port(4, "eth2"),
            unplugged,
            vlan(6, "eth0.100", 2),
            vlan(7, "bond0.100", 10),
            without_mac,
            vlan(9, "eth0.100.5", 6),
            link(10, "bond0", bond(false, 0)),
        ];
        let nics = |links: &[Link], index| -> Option<(Option<u16>, Vec<u32>)> {
            let uplink = Uplink::of(links, index)?;
            Some((uplink.vlan, uplink.nics.iter().map(|nic| nic.0).collect()))
        };
        assert_eq!(nics(&links, 2), Some((None, vec![2])));
        assert_eq!(nics(&links, 6), Some((Some(100), vec![2])));
        assert_eq!(nics(&links, 10), Some((None, vec![3, 4])));
        assert_eq!(nics(&links, 7), Some((Some(100), vec![3, 4])));
        assert_eq!(nics(&links, 8), None);
        assert_eq!(nics(&links, 9), None);
        assert_eq!(nics(&links, 77), None);
        links.pop();
        links.push(link(10, "bond0", bond(true, 4)));
        assert_eq!(nics(&links, 10), Some((None, vec![4])));
        assert_eq!(nics(&links, 7), Some((Some(100), vec![4])));
        let uplinks = [
            Uplink::of(&links, 2).unwrap(),
            Uplink::of(&links, 7).unwrap(),
        ];
        let records = nic_records(&uplinks);
        let record = |ifindex, uplink, vlan| NicRecord {
            ifindex,
            uplink,
            vlan,
        };
        assert_eq!(
            records[..3],
            [record(2, 0, 0), record(4, 1, 100), NicRecord::default()]
        );
    }

    fn exits(list: &[(u32, bool)]) -> Vec<Exit> {
        let exit = |&(link, usable): &(u32, bool)| Exit { link, usable };
        list.iter().map(exit).collect()
    }

    #[test]
    fn an_uplink_is_added_only_where_no_peer_is_lost() {
        type Peers<'a> = &'a [&'a [(u32, bool)]];
        let cases: &[(&str, Peers<'_>, &[u32])] = &[
            ("nothing known", &[], &[2]),
            ("nothing resolved", &[&[(2, false)]], &[2]),
            ("one", &[&[(2, true)], &[(2, true)]], &[2]),
            (
                "two for all",
                &[&[(2, true), (3, true)], &[(3, true), (2, true)]],
                &[2, 3],
            ),
            (
                "one peer on the first alone",
                &[&[(2, true), (3, true)], &[(2, true)]],
                &[2],
            ),
            (
                "one peer on the second alone",
                &[&[(2, true), (3, true)], &[(3, true)]],
                &[3],
            ),
            (
                "apart: the underlay wins",
                &[&[(3, true)], &[(2, true)]],
                &[2],
            ),
            (
                "most peers elsewhere",
                &[&[(3, true)], &[(3, true)], &[(2, true)]],
                &[3],
            ),
            (
                "the second is silent",
                &[&[(2, true), (3, false)], &[(2, true), (3, false)]],
                &[2],
            ),
            ("the first is silent", &[&[(2, false), (3, true)]], &[3]),
            (
                "one is still being asked",
                &[&[(2, true), (3, true)], &[(2, true), (3, false)]],
                &[2, 3],
            ),
            (
                "a dead peer counts for nothing",
                &[&[(2, true), (3, true)], &[(2, false)]],
                &[2, 3],
            ),
            (
                "at most four",
                &[&[(2, true), (3, true), (4, true), (5, true), (6, true)]],
                &[2, 3, 4, 5],
            ),
        ];
        for (name, peers, expected) in cases {
            let peers: Vec<_> = peers.iter().map(|list| exits(list)).collect();
            assert_eq!(choose(2, &peers), *expected, "{name}");
        }
    }
}
