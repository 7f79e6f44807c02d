//! The underlay next hops of every peer, as the kernel's own routing and neighbour tables give them.
//!
//! Workers bypass the kernel, so nothing else would keep their neighbours alive or notice that one has moved. The
//! entries stay ordinary dynamic ones: they are kept fresh by asking the kernel to use them, as a packet would.
//!
//! The same answers tell which peers are reached by a plain route instead of the tunnel, level-triggered: whenever
//! anything in the routing changes, all of them are asked for again.

use core::net::IpAddr;
use core::time::Duration;
use std::time::Instant;

use hashbrown::{HashMap, HashSet};

use crate::family::{Family, PerFamily};
use crate::mac::Mac;
use crate::netconf::Direct;
use crate::netlink::message::{self, Hop, Neighbour, Reachability, RouteAnswer};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};
use crate::uplink::{Exit, Uplink};

/// How often the kernel is asked to resolve the same neighbour. Its own attempts take three seconds.
const POKE_INTERVAL: Duration = Duration::from_secs(1);

/// How frames get to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Ways {
    /// Packets go there as they are, without a tunnel.
    pub direct: bool,
    /// The next hops, at least one for every uplink; none where workers cannot send to the peer.
    pub paths: Vec<Path>,
}

/// One next hop of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// Number of the uplink.
    pub uplink: u8,
    /// Ethernet address of the next hop.
    pub mac: Mac,
    /// Share of the flows, from 1.
    pub weight: u16,
}

/// Why a worker cannot send to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No route leads there; the error number.
    NoRoute(i32),
    /// The route leads out of another interface than the workers send by; its index.
    OtherInterface(u32),
    /// One of the uplinks has no route there; its interface's index.
    NotByUplink(u32),
    /// The address is our own, or a broadcast address.
    NotUnicast,
    /// Plain routes need the node on the link itself.
    BehindGateway,
    /// The neighbour is being asked for.
    Resolving,
    /// The neighbour does not answer.
    Silent,
}

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NoRoute(errno) => write!(
                f,
                "no route ({})",
                std::io::Error::from_raw_os_error(*errno)
            ),
            Self::OtherInterface(index) => {
                write!(f, "the route leaves by another interface (index {index})")
            }
            Self::NotByUplink(index) => write!(
                f,
                "no route leaves by interface {index}, which other nodes are reached by as well"
            ),
            Self::NotUnicast => write!(f, "the address is our own or a broadcast address"),
            Self::BehindGateway => write!(
                f,
                "the node is behind a gateway, and host-gw needs all nodes on one link"
            ),
            Self::Resolving => write!(f, "the next hop is being resolved"),
            Self::Silent => write!(
                f,
                "the next hop does not answer to ARP or neighbour discovery"
            ),
        }
    }
}

/// A neighbour on an interface.
type Place = (u32, IpAddr);

/// What the routing tables say about a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    Known {
        /// The interface of a plain route to the peer.
        direct: Option<u32>,
        /// The neighbours that packets go to, with their shares of the flows.
        places: Box<[(Place, u16)]>,
    },
    Nothing(Reason),
}

/// How to ask for the ways.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// Our own outer addresses.
    pub sources: PerFamily<Option<IpAddr>>,
    /// Transport protocol of tunnel packets.
    pub protocol: u8,
    /// Which peers are reached without the tunnel.
    pub direct: Direct,
    /// The underlay interface.
    pub underlay: u32,
}

/// The ways to all peers.
#[derive(Debug, Default)]
pub struct NextHops {
    routes: HashMap<IpAddr, Route>,
    /// The routing has changed since they were asked for.
    outdated: bool,
    neighbours: HashMap<Place, Neighbour>,
    /// Interfaces that the ways lead out of.
    links: Vec<u32>,
    poked: HashMap<Place, Instant>,
}

impl NextHops {
    /// Something in the routing tables has changed: their answers are asked for anew.
    pub fn forget_routes(&mut self) {
        self.outdated = true;
    }

    /// Brings the knowledge up to date: looks up routes that are not known yet, takes a new picture of the
    /// neighbours, and has the kernel resolve or confirm those that need it. Returns the first refusal of that.
    pub fn update(
        &mut self,
        netlink: &mut Netlink,
        query: Query,
        peers: impl Iterator<Item = IpAddr>,
        now: Instant,
    ) -> Result<Option<Refusal>, NetlinkError> {
        let peers: HashSet<IpAddr> = peers.collect();
        self.routes.retain(|peer, _| peers.contains(peer));
        let mut unknown = PerFamily::<Vec<IpAddr>>::default();
        for peer in peers {
            if self.outdated || !self.routes.contains_key(&peer) {
                unknown.get_mut(Family::of(peer)).push(peer);
            }
        }
        for (family, unknown) in unknown.iter() {
            let Some(source) = *query.sources.get(family) else {
                continue;
            };
            let answers = netlink.lookup_routes(source, unknown, query.protocol)?;
            for (&peer, answer) in unknown.iter().zip(answers) {
                self.routes.insert(peer, route(peer, answer, query));
            }
        }
        self.outdated = false;
        let links: HashSet<(Family, u32)> = self
            .places()
            .map(|(link, address)| (Family::of(address), link))
            .collect();
        self.links = links.iter().map(|&(_, link)| link).collect();
        self.neighbours.clear();
        for (family, link) in links {
            let neighbours = netlink.neighbours(family, link)?;
            self.neighbours.extend(
                neighbours
                    .into_iter()
                    .map(|neighbour| ((neighbour.link, neighbour.address), neighbour)),
            );
        }
        let requests = self.pokes(now);
        let failures = netlink.execute(&requests)?;
        Ok(failures.into_iter().next().map(|failure| failure.refusal))
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        self.routes.values().flat_map(|route| match route {
            Route::Known { places, .. } => places.iter().map(place as fn(&(Place, u16)) -> Place),
            Route::Nothing(_) => [].iter().map(place as fn(&(Place, u16)) -> Place),
        })
    }

    /// Which neighbours the kernel should be asked to use.
    fn pokes(&mut self, now: Instant) -> Vec<Request> {
        let in_use: HashSet<Place> = self.places().collect();
        self.poked.retain(|place, _| in_use.contains(place));
        let mut requests = Vec::new();
        for place in in_use {
            let state = self
                .neighbours
                .get(&place)
                .map_or(Reachability::Failed, |neighbour| neighbour.state);
            let wanted = match state {
                // Permanent ones would become dynamic.
                Reachability::Permanent | Reachability::Confirmed => false,
                // The kernel is at it.
                Reachability::Probing | Reachability::Incomplete => false,
                Reachability::Stale | Reachability::Failed => true,
            };
            let recently = self
                .poked
                .get(&place)
                .is_some_and(|&last| now.duration_since(last) < POKE_INTERVAL);
            if wanted && !recently {
                self.poked.insert(place, now);
                requests.push(message::use_neighbour(place.0, place.1));
            }
        }
        requests
    }

    /// The Ethernet address of a neighbour, if frames can be sent to it.
    fn mac(&self, place: Place) -> Result<Mac, Reason> {
        match self.neighbours.get(&place) {
            Some(Neighbour {
                mac: Some(mac),
                state,
                ..
            }) if state.is_usable() && !mac.is_zero() => Ok(*mac),
            Some(Neighbour {
                state: Reachability::Failed,
                ..
            }) => Err(Reason::Silent),
            _ => Err(Reason::Resolving),
        }
    }

    /// The interface of a plain route to a peer, where the backend asks for one.
    pub fn direct(&self, peer: IpAddr) -> Option<u32> {
        match self.routes.get(&peer)? {
            Route::Known { direct, .. } => *direct,
            Route::Nothing(_) => None,
        }
    }

    /// The interfaces by which a peer can be reached.
    pub fn exits(&self, peer: IpAddr) -> Vec<Exit> {
        match self.routes.get(&peer) {
            Some(Route::Known { places, .. }) => places
                .iter()
                .map(|&(place, _)| Exit {
                    link: place.0,
                    usable: self.mac(place).is_ok(),
                })
                .collect(),
            Some(Route::Nothing(_)) | None => Vec::new(),
        }
    }

    /// The ways to a peer by these uplinks, or why workers have none.
    pub fn ways(&self, peer: IpAddr, uplinks: &[Uplink]) -> Result<Ways, Reason> {
        let (direct, places) = match self.routes.get(&peer) {
            Some(Route::Known { direct, places }) => (direct.is_some(), places),
            Some(Route::Nothing(reason)) => return Err(*reason),
            None => return Err(Reason::Resolving),
        };
        let mut paths = Vec::with_capacity(places.len());
        for (number, uplink) in (0u8..).zip(uplinks) {
            let mut reason = Reason::NotByUplink(uplink.link);
            let before = paths.len();
            for &(place, weight) in places.iter().filter(|(place, _)| place.0 == uplink.link) {
                match self.mac(place) {
                    Ok(mac) => paths.push(Path {
                        uplink: number,
                        mac,
                        weight,
                    }),
                    Err(unknown) => reason = unknown,
                }
            }
            if paths.len() == before {
                let elsewhere =
                    |uplink: &Uplink| places.iter().any(|(place, _)| place.0 == uplink.link);
                return Err(match places.first() {
                    Some((place, _)) if !uplinks.iter().any(elsewhere) => {
                        Reason::OtherInterface(place.0)
                    }
                    _ => reason,
                });
            }
        }
        Ok(Ways { direct, paths })
    }

    /// The interfaces that the ways lead out of.
    pub fn links(&self) -> &[u32] {
        &self.links
    }

    /// Number of neighbours that serve all peers.
    pub fn neighbours_in_use(&self) -> usize {
        self.places().collect::<HashSet<_>>().len()
    }
}

fn place(place: &(Place, u16)) -> Place {
    place.0
}

/// Reads an answer of the routing tables.
fn route(peer: IpAddr, answer: Result<RouteAnswer, Refusal>, query: Query) -> Route {
    let RouteAnswer { unicast, hops } = match answer {
        Err(refusal) => return Route::Nothing(Reason::NoRoute(refusal.errno)),
        Ok(answer) => answer,
    };
    if !unicast {
        return Route::Nothing(Reason::NotUnicast);
    }
    let direct = match (query.direct, &hops[..]) {
        (Direct::None, _) => None,
        // Exactly one result and no gateway, as flannel decides.
        (
            Direct::OnLink,
            [
                Hop {
                    link,
                    gateway: None,
                    ..
                },
            ],
        ) => Some(*link),
        (Direct::OnLink, _) => None,
        (Direct::All, _) => {
            let on_link = |hop: &&Hop| hop.link == query.underlay && hop.gateway.is_none();
            return match hops.iter().find(on_link) {
                Some(hop) => Route::Known {
                    direct: Some(hop.link),
                    places: Box::new([((hop.link, peer), 1)]),
                },
                None => Route::Nothing(match hops.first() {
                    Some(hop) if hop.gateway.is_none() => Reason::OtherInterface(hop.link),
                    _ => Reason::BehindGateway,
                }),
            };
        }
    };
    let place = |hop: &Hop| ((hop.link, hop.gateway.unwrap_or(peer)), hop.weight);
    Route::Known {
        direct,
        places: hops.iter().map(place).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 199, 0, 2));
    const MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn query(direct: Direct) -> Query {
        Query {
            sources: PerFamily::default(),
            protocol: 17,
            direct,
            underlay: 2,
        }
    }

    fn hop(link: u32, gateway: Option<&str>, weight: u16) -> Hop {
        let gateway = gateway.map(|text| text.parse().unwrap());
        Hop {
            link,
            gateway,
            weight,
        }
    }

    fn answer(hops: &[Hop]) -> Result<RouteAnswer, Refusal> {
        Ok(RouteAnswer {
            unicast: true,
            hops: hops.to_vec(),
        })
    }

    fn uplinks(links: &[u32]) -> Vec<Uplink> {
        let uplink = |&link| Uplink {
            link,
            name: format!("eth{link}"),
            mac: Mac([2, 0, 0, 0, 1, 0]),
            vlan: None,
            nics: vec![(link, format!("eth{link}"))],
        };
        links.iter().map(uplink).collect()
    }

    fn neighbour(hops: &mut NextHops, link: u32, address: IpAddr, state: Reachability) {
        let mac = state.is_usable().then_some(MAC);
        let neighbour = Neighbour {
            link,
            address,
            mac,
            state,
        };
        hops.neighbours.insert((link, address), neighbour);
    }

    fn hops(state: Option<Reachability>) -> NextHops {
        let mut hops = NextHops::default();
        let route = route(PEER, answer(&[hop(2, None, 1)]), query(Direct::None));
        hops.routes.insert(PEER, route);
        if let Some(state) = state {
            neighbour(&mut hops, 2, PEER, state);
        }
        hops
    }

    #[test]
    fn each_state_is_used_and_poked_as_it_should() {
        let resolved = Ok(Ways {
            direct: false,
            paths: vec![Path {
                uplink: 0,
                mac: MAC,
                weight: 1,
            }],
        });
        let resolving = Err(Reason::Resolving);
        for (state, expected, poked) in [
            (None, &resolving, true),
            (Some(Reachability::Permanent), &resolved, false),
            (Some(Reachability::Confirmed), &resolved, false),
            (Some(Reachability::Stale), &resolved, true),
            (Some(Reachability::Probing), &resolved, false),
            (Some(Reachability::Incomplete), &resolving, false),
            (Some(Reachability::Failed), &Err(Reason::Silent), true),
        ] {
            let mut hops = hops(state);
            assert_eq!(hops.ways(PEER, &uplinks(&[2])), *expected, "{state:?}");
            let now = Instant::now();
            assert_eq!(hops.pokes(now).len(), usize::from(poked), "{state:?}");
            assert_eq!(
                hops.pokes(now + POKE_INTERVAL / 2).len(),
                0,
                "{state:?}: too soon"
            );
            assert_eq!(
                hops.pokes(now + POKE_INTERVAL).len(),
                usize::from(poked),
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_thousand_peers_behind_a_gateway_poke_one_neighbour() {
        let mut hops = NextHops::default();
        for i in 0..1000 {
            let peer = IpAddr::V4(Ipv4Addr::from_bits(0xac10_0000 + i));
            let answer = answer(&[hop(2, Some("10.199.0.254"), 1)]);
            hops.routes
                .insert(peer, route(peer, answer, query(Direct::None)));
        }
        assert_eq!(hops.neighbours_in_use(), 1);
        assert_eq!(hops.pokes(Instant::now()).len(), 1);
    }

    #[test]
    fn only_unicast_routes_count() {
        let local = RouteAnswer {
            unicast: false,
            hops: vec![hop(2, None, 1)],
        };
        assert_eq!(
            route(PEER, Ok(local), query(Direct::None)),
            Route::Nothing(Reason::NotUnicast)
        );
        let refusal = Refusal {
            errno: libc::ENETUNREACH,
            explanation: None,
        };
        assert_eq!(
            route(PEER, Err(refusal), query(Direct::None)),
            Route::Nothing(Reason::NoRoute(libc::ENETUNREACH))
        );
    }

    #[test]
    fn a_peer_needs_a_path_by_every_uplink() {
        let mut hops = hops(Some(Reachability::Confirmed));
        let reason = |hops: &NextHops, links: &[u32]| hops.ways(PEER, &uplinks(links)).unwrap_err();
        assert_eq!(reason(&hops, &[3]), Reason::OtherInterface(2));
        assert_eq!(reason(&hops, &[2, 3]), Reason::NotByUplink(3));
        let both = answer(&[
            hop(2, Some("10.199.0.254"), 2),
            hop(2, Some("10.199.0.253"), 1),
            hop(3, Some("10.198.0.254"), 1),
        ]);
        hops.routes
            .insert(PEER, route(PEER, both, query(Direct::None)));
        let ip = |text: &str| text.parse().unwrap();
        neighbour(&mut hops, 2, ip("10.199.0.254"), Reachability::Confirmed);
        neighbour(&mut hops, 2, ip("10.199.0.253"), Reachability::Confirmed);
        assert_eq!(reason(&hops, &[2, 3]), Reason::Resolving);
        neighbour(&mut hops, 3, ip("10.198.0.254"), Reachability::Stale);
        let path = |uplink, weight| Path {
            uplink,
            mac: MAC,
            weight,
        };
        let ways = hops.ways(PEER, &uplinks(&[2, 3])).unwrap();
        assert_eq!(ways.paths, [path(0, 2), path(0, 1), path(1, 1)]);
        // One of two next hops by the same interface fails: the other carries all.
        neighbour(&mut hops, 2, ip("10.199.0.254"), Reachability::Failed);
        let ways = hops.ways(PEER, &uplinks(&[2, 3])).unwrap();
        assert_eq!(ways.paths, [path(0, 1), path(1, 1)]);
        neighbour(&mut hops, 3, ip("10.198.0.254"), Reachability::Failed);
        assert_eq!(reason(&hops, &[2, 3]), Reason::Silent);
        assert_eq!(hops.ways(PEER, &uplinks(&[2])).unwrap().paths, [path(0, 1)]);
    }

    #[test]
    fn direct_is_one_result_without_a_gateway() {
        let on_link = [hop(2, None, 1)];
        let gateway = [hop(2, Some("10.199.0.254"), 1)];
        let two = [hop(2, None, 1), hop(3, None, 1)];
        let elsewhere = [hop(3, None, 1)];
        let direct = |hops: &[Hop], mode| match route(PEER, answer(hops), query(mode)) {
            Route::Known { direct, .. } => direct,
            Route::Nothing(_) => None,
        };
        for (hops, by_direct_routing, by_host_gw) in [
            (&on_link[..], Some(2), Some(2)),
            (&gateway, None, None),
            (&two, None, Some(2)),
            (&elsewhere, Some(3), None),
        ] {
            assert_eq!(direct(hops, Direct::None), None, "{hops:?}");
            assert_eq!(direct(hops, Direct::OnLink), by_direct_routing, "{hops:?}");
            assert_eq!(direct(hops, Direct::All), by_host_gw, "{hops:?}");
        }
        assert_eq!(
            route(PEER, answer(&gateway), query(Direct::All)),
            Route::Nothing(Reason::BehindGateway)
        );
    }
}
