//! What changed: the kernel's announcements, reduced to "look there again".
//!
//! An announcement is never applied to a picture of the kernel; it only says which part of the picture to take
//! anew. So a lost one costs time until the next periodic look, never correctness.

use core::ops::BitOrAssign;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_route::AddressFamily;
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};

use super::message::{
    Link, Neighbour, RTM_DELADDR, RTM_DELLINK, RTM_DELNEIGH, RTM_DELROUTE, RTM_DELRULE,
    RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE, RTM_NEWRULE, Route, attributes, u32_at,
};
use super::{NetlinkError, for_each_message, open_socket, receive_into};
use crate::detour::{DEVICE as DETOUR_DEVICE, host_table};
use crate::standby::{PROTOCOL, has_our_form};
use crate::sys::{borrow_netlink, force_receive_buffer};

/// Multicast groups (rtnetlink.h): links, neighbours with forwarding entries; addresses, routes and rules of IPv4; the
/// same of IPv6.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Parts of the kernel's state to look at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dirty {
    /// Links or addresses: the underlay may be another.
    pub links: bool,
    /// Standby: the VXLAN device, or routes, neighbours or forwarding entries on it.
    pub standby: bool,
    /// Detour: its device, routes or rule.
    pub detour: bool,
    /// Any other route or rule: next hops may have moved.
    pub routes: bool,
    /// Neighbours on the underlay.
    pub neighbours: bool,
}

impl Dirty {
    /// Everything.
    pub const ALL: Self = Self {
        links: true,
        standby: true,
        detour: true,
        routes: true,
        neighbours: true,
    };

    /// Something is to be looked at.
    pub fn any(self) -> bool {
        self != Self::default()
    }
}

impl BitOrAssign for Dirty {
    fn bitor_assign(&mut self, other: Self) {
        self.links |= other.links;
        self.standby |= other.standby;
        self.detour |= other.detour;
        self.routes |= other.routes;
        self.neighbours |= other.neighbours;
    }
}

/// Which objects concern whom.
#[derive(Debug, Clone, Default)]
pub struct Interests {
    /// Indexes of the tunnel devices.
    pub tunnels: Vec<u32>,
    /// Indexes of the underlay interface, and of those that next hops are on.
    pub uplinks: Vec<u32>,
    /// The first of our two routing tables.
    pub table: u32,
}

/// A subscription to the kernel's announcements.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl core::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow_netlink(&self.socket)
    }
}

impl Monitor {
    /// Subscribes. What happened before is not announced: take the first picture after this.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: subscribe(&GROUPS)?,
            buffer: Vec::new(),
        })
    }

    /// Reads all announcements that are waiting.
    pub fn drain(&mut self, interests: &Interests) -> Result<Dirty, NetlinkError> {
        let mut dirty = Dirty::default();
        loop {
            match receive_into(&self.socket, &mut self.buffer) {
                Ok(true) => for_each_message(&self.buffer, |kind, _, _, payload| {
                    dirty |= classify(kind, payload, interests);
                }),
                Ok(false) => return Ok(dirty),
                // Announcements were lost; the error is reported once and the socket goes on.
                Err(NetlinkError::Overrun) => dirty = Dirty::ALL,
                Err(error @ (NetlinkError::Open { .. } | NetlinkError::Io { .. })) => {
                    return Err(error);
                }
                Err(error @ (NetlinkError::Dump { .. } | NetlinkError::Timeout)) => {
                    return Err(error);
                }
            }
        }
    }
}

fn classify(kind: u16, payload: &[u8], interests: &Interests) -> Dirty {
    let mut dirty = Dirty::default();
    match kind {
        RTM_NEWLINK | RTM_DELLINK => {
            // Pods come and go with links of their own: only those that matter cause a look at what hangs on them.
            // The kernel drops the routes of a link that goes down without a word.
            dirty.links = true;
            if let Some(link) = Link::parse(payload) {
                // A tunnel device of a known form may be one that is missing, or one that another backend left.
                dirty.standby = interests.tunnels.contains(&link.index) || has_our_form(&link);
                dirty.detour = link.name == DETOUR_DEVICE;
                dirty.routes = interests.uplinks.contains(&link.index);
                dirty.neighbours = dirty.routes;
            }
        }
        RTM_NEWADDR | RTM_DELADDR => {
            dirty.links = true;
            dirty.standby =
                u32_at(payload, 4).is_some_and(|link| interests.tunnels.contains(&link));
        }
        RTM_NEWRULE | RTM_DELRULE => {
            dirty.detour = true;
            dirty.routes = true;
        }
        RTM_NEWROUTE | RTM_DELROUTE => match Route::parse(payload) {
            Some(route)
                if [interests.table, host_table(interests.table)].contains(&route.table) =>
            {
                dirty.detour = true;
            }
            // Ours lead to pods and never to a node.
            Some(route)
                if interests.tunnels.contains(&route.link) || route.protocol == PROTOCOL =>
            {
                dirty.standby = true;
            }
            // A route that replaced ours is announced under its own interface, so any route may concern us.
            _ => {
                dirty.routes = true;
                dirty.standby = true;
            }
        },
        RTM_NEWNEIGH | RTM_DELNEIGH => {
            let link = u32_at(payload, 4).unwrap_or_default();
            let is_fdb = payload
                .first()
                .is_some_and(|&family| family == u8::from(AddressFamily::Bridge));
            if interests.tunnels.contains(&link) {
                dirty.standby = is_fdb || Neighbour::parse(payload).is_some();
            } else if interests.uplinks.contains(&link) && !is_fdb {
                dirty.neighbours = true;
            }
        }
        _ => {}
    }
    dirty
}

/// A subscription to what the choice of an underlay interface depends on: links, addresses and default routes.
pub struct UnderlayMonitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl core::fmt::Debug for UnderlayMonitor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("UnderlayMonitor").finish_non_exhaustive()
    }
}

impl AsFd for UnderlayMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow_netlink(&self.socket)
    }
}

impl UnderlayMonitor {
    /// Subscribes. What happened before is not announced.
    pub fn open() -> Result<Self, NetlinkError> {
        /// Links; addresses and routes of IPv4; the same of IPv6 (rtnetlink.h).
        const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];
        Ok(Self {
            socket: subscribe(&GROUPS)?,
            buffer: Vec::new(),
        })
    }

    /// Reads all announcements that are waiting; whether the choice may be another after them.
    pub fn drain(&mut self) -> Result<bool, NetlinkError> {
        let mut touched = false;
        loop {
            match receive_into(&self.socket, &mut self.buffer) {
                Ok(true) => for_each_message(&self.buffer, |kind, _, _, payload| {
                    touched |= match kind {
                        RTM_NEWLINK | RTM_DELLINK | RTM_NEWADDR | RTM_DELADDR => true,
                        // Routes to peers come by the thousand.
                        RTM_NEWROUTE | RTM_DELROUTE => Route::parse(payload)
                            .is_some_and(|route| route.destination.prefix_len() == 0),
                        _ => false,
                    };
                }),
                Ok(false) => return Ok(touched),
                Err(NetlinkError::Overrun) => touched = true,
                Err(error) => return Err(error),
            }
        }
    }
}

fn subscribe(groups: &[u32]) -> Result<Socket, NetlinkError> {
    let socket = open_socket(NETLINK_ROUTE)?;
    for &group in groups {
        socket
            .add_membership(group)
            .map_err(|source| NetlinkError::Open {
                step: "subscribe to changes",
                source,
            })?;
    }
    Ok(socket)
}

/// A subscription to changes of some nftables tables.
pub struct RulesetMonitor {
    socket: Socket,
    buffer: Vec<u8>,
    tables: Vec<Vec<u8>>,
    touched: bool,
}

impl core::fmt::Debug for RulesetMonitor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("RulesetMonitor").finish_non_exhaustive()
    }
}

impl AsFd for RulesetMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow_netlink(&self.socket)
    }
}

impl RulesetMonitor {
    /// Subscribes to changes of the tables with these names.
    pub fn open(tables: &[&str]) -> Result<Self, NetlinkError> {
        /// `NFNLGRP_NFTABLES` (nfnetlink.h).
        const GROUP: u32 = 7;
        let socket = open_socket(NETLINK_NETFILTER)?;
        // A transaction of 15,000 elements is announced in some hundred datagrams at once.
        let step = |step| move |source| NetlinkError::Open { step, source };
        force_receive_buffer(&socket, 16 << 20).map_err(step("enlarge receive buffer"))?;
        socket
            .add_membership(GROUP)
            .map_err(step("subscribe to ruleset changes"))?;
        let terminated = |name: &&str| [name.as_bytes(), &[0]].concat();
        Ok(Self {
            socket,
            buffer: Vec::new(),
            tables: tables.iter().map(terminated).collect(),
            touched: false,
        })
    }

    /// Reads all announcements that are waiting; how many transactions touched the tables.
    pub fn drain(&mut self) -> Result<usize, NetlinkError> {
        /// `NFNL_SUBSYS_NFTABLES`, the high byte of every message type.
        const SUBSYSTEM: u16 = 10 << 8;
        /// `NFT_MSG_NEWGEN`, which ends each transaction.
        const NEW_GENERATION: u16 = SUBSYSTEM | 15;
        let mut batches = 0;
        while receive_into(&self.socket, &mut self.buffer)? {
            let (tables, touched) = (&self.tables, &mut self.touched);
            for_each_message(&self.buffer, |kind, _, _, payload| {
                if kind == NEW_GENERATION {
                    batches += usize::from(*touched);
                    *touched = false;
                    return;
                }
                // struct nfgenmsg is four bytes; attribute 1 of every other message names the table.
                let attributes_start = payload.get(4..).unwrap_or_default();
                *touched |= attributes(attributes_start)
                    .any(|(kind, value)| kind == 1 && tables.iter().any(|table| value == *table));
            });
        }
        Ok(batches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interests() -> Interests {
        Interests {
            tunnels: vec![7],
            uplinks: vec![2],
            table: 0x5269,
        }
    }

    fn link(index: u32, name: &str) -> Vec<u8> {
        let mut payload = vec![0; 16];
        payload[4..8].copy_from_slice(&index.to_ne_bytes());
        let length = u16::try_from(5 + name.len()).unwrap();
        payload.extend(length.to_ne_bytes());
        payload.extend(3u16.to_ne_bytes());
        payload.extend(name.as_bytes());
        payload.push(0);
        payload
    }

    #[test]
    fn only_links_that_matter_cause_more_than_a_look_at_links() {
        let links = Dirty {
            links: true,
            ..Dirty::default()
        };
        for (payload, expected) in [
            (link(30, "veth1"), links),
            (
                link(7, "flannel.1"),
                Dirty {
                    standby: true,
                    ..links
                },
            ),
            (
                link(31, "rip0"),
                Dirty {
                    detour: true,
                    ..links
                },
            ),
            (
                link(2, "eth0"),
                Dirty {
                    routes: true,
                    neighbours: true,
                    ..links
                },
            ),
            (vec![], links),
        ] {
            assert_eq!(classify(RTM_NEWLINK, &payload, &interests()), expected);
            assert_eq!(classify(RTM_DELLINK, &payload, &interests()), expected);
        }
    }
}
