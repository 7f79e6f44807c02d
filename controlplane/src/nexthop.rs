//! The underlay next hop of every peer, as the kernel's own routing and neighbour tables give it.
//!
//! Workers bypass the kernel, so nothing else would keep their neighbours alive or notice that one has moved. The
//! entries stay ordinary dynamic ones: they are kept fresh by asking the kernel to use them, as a packet would.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::time::Instant;

use hashbrown::{HashMap, HashSet};

use crate::interface::Underlay;
use crate::mac::Mac;
use crate::netlink::message::{self, Neighbour, Reachability, RouteAnswer};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};

/// How often the kernel is asked to resolve the same neighbour. Its own attempts take three seconds.
const POKE_INTERVAL: Duration = Duration::from_secs(1);

/// What is known about the way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHop {
    /// Frames go to this Ethernet address.
    Resolved(Mac),
    /// They cannot be sent by a worker.
    Unresolved(Reason),
}

/// Why a worker cannot send to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No route leads there; the error number.
    NoRoute(i32),
    /// The route leads out of another interface; its index.
    OtherInterface(u32),
    /// The address is our own, or a broadcast address.
    NotUnicast,
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
            Self::NotUnicast => write!(f, "the address is our own or a broadcast address"),
            Self::Resolving => write!(f, "the next hop is being resolved"),
            Self::Silent => write!(f, "the next hop does not answer to ARP"),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Via {
    /// Through this neighbour on the underlay: the gateway, or the peer itself.
    Neighbour(Ipv4Addr),
    Nothing(Reason),
}

/// The ways to all peers.
#[derive(Debug, Default)]
pub struct NextHops {
    routes: HashMap<Ipv4Addr, Via>,
    neighbours: HashMap<Ipv4Addr, Neighbour>,
    poked: HashMap<Ipv4Addr, Instant>,
}

impl NextHops {
    /// Forgets the answers of the routing tables: something in them has changed.
    pub fn forget_routes(&mut self) {
        self.routes.clear();
    }

    /// Brings the knowledge up to date: looks up routes that are not known yet, takes a new picture of the
    /// neighbours, and has the kernel resolve or confirm those that need it. Returns the first refusal of that.
    pub fn update(
        &mut self,
        netlink: &mut Netlink,
        underlay: &Underlay,
        source: Ipv4Addr,
        peers: impl Iterator<Item = Ipv4Addr>,
        now: Instant,
    ) -> Result<Option<Refusal>, NetlinkError> {
        let peers: HashSet<Ipv4Addr> = peers.collect();
        self.routes.retain(|peer, _| peers.contains(peer));
        let unknown: Vec<Ipv4Addr> = peers
            .into_iter()
            .filter(|peer| !self.routes.contains_key(peer))
            .collect();
        let answers = netlink.lookup_routes(source, &unknown)?;
        for (peer, answer) in unknown.into_iter().zip(answers) {
            self.routes.insert(peer, via(peer, answer, underlay.index));
        }
        let neighbours = netlink.neighbours(underlay.index)?;
        self.neighbours = neighbours
            .into_iter()
            .map(|neighbour| (neighbour.address, neighbour))
            .collect();
        let requests = self.pokes(underlay.index, now);
        let failures = netlink.execute(&requests)?;
        Ok(failures.into_iter().next().map(|failure| failure.refusal))
    }

    /// Which neighbours the kernel should be asked to use.
    fn pokes(&mut self, link: u32, now: Instant) -> Vec<Request> {
        let in_use: HashSet<Ipv4Addr> = self.routes.values().filter_map(Via::neighbour).collect();
        self.poked.retain(|address, _| in_use.contains(address));
        let mut requests = Vec::new();
        for address in in_use {
            let state = self
                .neighbours
                .get(&address)
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
                .get(&address)
                .is_some_and(|&last| now.duration_since(last) < POKE_INTERVAL);
            if wanted && !recently {
                self.poked.insert(address, now);
                requests.push(message::use_neighbour(link, address));
            }
        }
        requests
    }

    /// The way to one peer.
    pub fn get(&self, peer: Ipv4Addr) -> NextHop {
        let address = match self.routes.get(&peer) {
            Some(Via::Neighbour(address)) => address,
            Some(Via::Nothing(reason)) => return NextHop::Unresolved(*reason),
            None => return NextHop::Unresolved(Reason::Resolving),
        };
        match self.neighbours.get(address) {
            Some(Neighbour {
                mac: Some(mac),
                state,
                ..
            }) if state.is_usable() && !mac.is_zero() => NextHop::Resolved(*mac),
            Some(Neighbour {
                state: Reachability::Failed,
                ..
            }) => NextHop::Unresolved(Reason::Silent),
            _ => NextHop::Unresolved(Reason::Resolving),
        }
    }

    /// The Ethernet address towards a peer, if frames can be sent.
    pub fn mac(&self, peer: Ipv4Addr) -> Option<Mac> {
        match self.get(peer) {
            NextHop::Resolved(mac) => Some(mac),
            NextHop::Unresolved(_) => None,
        }
    }

    /// Number of neighbours that serve all peers.
    pub fn neighbours_in_use(&self) -> usize {
        self.routes
            .values()
            .filter_map(Via::neighbour)
            .collect::<HashSet<_>>()
            .len()
    }
}

impl Via {
    fn neighbour(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Neighbour(address) => Some(*address),
            Self::Nothing(_) => None,
        }
    }
}

fn via(peer: Ipv4Addr, answer: Result<RouteAnswer, Refusal>, underlay: u32) -> Via {
    match answer {
        Err(refusal) => Via::Nothing(Reason::NoRoute(refusal.errno)),
        Ok(answer) if !answer.unicast => Via::Nothing(Reason::NotUnicast),
        Ok(answer) if answer.link != underlay => Via::Nothing(Reason::OtherInterface(answer.link)),
        Ok(answer) => Via::Neighbour(answer.gateway.unwrap_or(peer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Ipv4Addr = Ipv4Addr::new(10, 199, 0, 2);

    fn hops(state: Option<Reachability>) -> NextHops {
        let mut hops = NextHops::default();
        hops.routes.insert(PEER, Via::Neighbour(PEER));
        if let Some(state) = state {
            let mac = state.is_usable().then_some(Mac([2, 0, 0, 0, 0, 2]));
            hops.neighbours.insert(
                PEER,
                Neighbour {
                    link: 2,
                    address: PEER,
                    mac,
                    state,
                },
            );
        }
        hops
    }

    #[test]
    fn each_state_is_used_and_poked_as_it_should() {
        let resolved = NextHop::Resolved(Mac([2, 0, 0, 0, 0, 2]));
        let resolving = NextHop::Unresolved(Reason::Resolving);
        for (state, expected, poked) in [
            (None, resolving, true),
            (Some(Reachability::Permanent), resolved, false),
            (Some(Reachability::Confirmed), resolved, false),
            (Some(Reachability::Stale), resolved, true),
            (Some(Reachability::Probing), resolved, false),
            (Some(Reachability::Incomplete), resolving, false),
            (
                Some(Reachability::Failed),
                NextHop::Unresolved(Reason::Silent),
                true,
            ),
        ] {
            let mut hops = hops(state);
            assert_eq!(hops.get(PEER), expected, "{state:?}");
            let now = Instant::now();
            assert_eq!(hops.pokes(2, now).len(), usize::from(poked), "{state:?}");
            assert_eq!(
                hops.pokes(2, now + POKE_INTERVAL / 2).len(),
                0,
                "{state:?}: too soon"
            );
            assert_eq!(
                hops.pokes(2, now + POKE_INTERVAL).len(),
                usize::from(poked),
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_thousand_peers_behind_a_gateway_poke_one_neighbour() {
        let gateway = Ipv4Addr::new(10, 199, 0, 254);
        let mut hops = NextHops::default();
        for i in 0..1000 {
            let answer = RouteAnswer {
                link: 2,
                gateway: Some(gateway),
                unicast: true,
            };
            let peer = Ipv4Addr::from_bits(PEER.to_bits() + i);
            hops.routes.insert(peer, via(peer, Ok(answer), 2));
        }
        assert_eq!(hops.neighbours_in_use(), 1);
        assert_eq!(hops.pokes(2, Instant::now()).len(), 1);
    }

    #[test]
    fn only_unicast_routes_through_the_underlay_count() {
        let answer = RouteAnswer {
            link: 3,
            gateway: None,
            unicast: true,
        };
        assert!(matches!(
            via(PEER, Ok(answer), 2),
            Via::Nothing(Reason::OtherInterface(3))
        ));
        let answer = RouteAnswer {
            link: 2,
            unicast: false,
            gateway: None,
        };
        assert!(matches!(
            via(PEER, Ok(answer), 2),
            Via::Nothing(Reason::NotUnicast)
        ));
        let refusal = Refusal {
            errno: libc::ENETUNREACH,
            explanation: None,
        };
        assert!(matches!(
            via(PEER, Err(refusal), 2),
            Via::Nothing(Reason::NoRoute(libc::ENETUNREACH))
        ));
    }
}
