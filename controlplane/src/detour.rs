//! The detour: routes to peers through `rip0`, and the rule that leads to them before the main table is asked.
//!
//! `rip0` exists only while the data plane's process does, and the kernel removes its routes with it, so traffic is
//! back on the standby without anybody acting. What this module adds is caution while the process lives: a route is
//! there only when every worker can forward by it, and a data plane that stands still loses the rule.

use core::net::Ipv4Addr;

use hashbrown::HashSet;
use ipnet::Ipv4Net;

use crate::netlink::message::{self, Link, Route, RouteFilter, Rule};
use crate::netlink::{Netlink, NetlinkError, Request};
use crate::standby::{PROTOCOL, relax_reverse_path};

/// The data plane's device.
pub const DEVICE: &str = "rip0";
/// Number of Ripstop's routing table ("Ri").
pub const TABLE: u32 = 0x5269;
/// Place of the rule: behind an operator's own, before the main table's 32766.
pub const RULE_PRIORITY: u32 = 32_000;

/// The rule that leads to table `table`.
pub fn rule(table: u32) -> Rule {
    Rule {
        priority: RULE_PRIORITY,
        table,
        protocol: PROTOCOL,
        matches_all: true,
    }
}

/// What has to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Index of `rip0`, if it exists.
    pub link: Option<u32>,
    /// Our table.
    pub table: u32,
    /// Source of the node's own packets: the address of the VXLAN device.
    pub source: Ipv4Addr,
    /// Subnets that every worker can send to.
    pub subnets: HashSet<Ipv4Net>,
    /// The rule is to be there.
    pub active: bool,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Remove a rule.
    DeleteRule(Rule),
    /// Remove a route.
    DeleteRoute(Route),
    /// Install a route.
    SetRoute(Route),
    /// Install the rule.
    AddRule(Rule),
}

impl Op {
    fn request(&self) -> Request {
        match self {
            Self::DeleteRule(rule) => message::delete_rule(rule),
            Self::DeleteRoute(route) => message::delete_route(route),
            Self::SetRoute(route) => message::replace_route(route),
            Self::AddRule(rule) => message::add_rule(rule),
        }
    }

    /// It makes workers get less traffic: to be done before they are told to forget something.
    pub fn withdraws(&self) -> bool {
        match self {
            Self::DeleteRule(_) | Self::DeleteRoute(_) => true,
            Self::SetRoute(_) | Self::AddRule(_) => false,
        }
    }
}

impl core::fmt::Display for Op {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::DeleteRule(rule) => {
                write!(f, "delete rule {} to table {}", rule.priority, rule.table)
            }
            Self::DeleteRoute(route) => write!(
                f,
                "delete route {} from table {}",
                route.destination, route.table
            ),
            Self::SetRoute(route) => write!(
                f,
                "set route {} in table {}",
                route.destination, route.table
            ),
            Self::AddRule(rule) => write!(f, "add rule {} to table {}", rule.priority, rule.table),
        }
    }
}

/// The rule is ours, in the right form or not.
pub fn is_our_rule(candidate: &Rule, table: u32) -> bool {
    candidate.protocol == PROTOCOL && candidate.table == table
}

/// What has to change, withdrawals first and the rule last.
pub fn ops(desired: &Desired, routes: &[Route], rules: &[Rule]) -> Vec<Op> {
    let wanted_rule = rule(desired.table);
    let mut ops = Vec::new();
    let mut present = false;
    for candidate in rules
        .iter()
        .filter(|candidate| is_our_rule(candidate, desired.table))
    {
        // A duplicate goes, too.
        if desired.active && *candidate == wanted_rule && !present {
            present = true;
        } else {
            ops.push(Op::DeleteRule(candidate.clone()));
        }
    }
    let route = |link, subnet| Route {
        table: desired.table,
        destination: subnet,
        link,
        gateway: None,
        onlink: false,
        source: Some(desired.source),
        protocol: PROTOCOL,
        scope: 0,
        priority: 0,
    };
    let mut right = HashSet::new();
    for candidate in routes {
        let is_wanted = desired.subnets.contains(&candidate.destination)
            && desired
                .link
                .is_some_and(|link| same_but_scope(candidate, &route(link, candidate.destination)));
        if is_wanted {
            right.insert(candidate.destination);
        } else if candidate.protocol == PROTOCOL {
            ops.push(Op::DeleteRoute(candidate.clone()));
        }
    }
    if let Some(link) = desired.link {
        let mut missing: Vec<_> = desired.subnets.difference(&right).copied().collect();
        missing.sort_unstable();
        ops.extend(
            missing
                .into_iter()
                .map(|subnet| Op::SetRoute(route(link, subnet))),
        );
    }
    if desired.active && !present {
        ops.push(Op::AddRule(wanted_rule));
    }
    ops
}

/// The kernel may store a route without gateway under another scope than asked for.
fn same_but_scope(a: &Route, b: &Route) -> bool {
    Route {
        scope: 0,
        ..a.clone()
    } == Route {
        scope: 0,
        ..b.clone()
    }
}

/// Looks at the table and the rules; what has to change.
pub fn plan(netlink: &mut Netlink, desired: &Desired) -> Result<Vec<Op>, NetlinkError> {
    let routes = netlink.routes(RouteFilter {
        table: desired.table,
        link: 0,
    })?;
    Ok(ops(desired, &routes, &netlink.rules()?))
}

/// Makes the changes; what the kernel refused, explained.
pub fn apply(netlink: &mut Netlink, ops: &[Op]) -> Result<Vec<String>, NetlinkError> {
    let requests: Vec<Request> = ops.iter().map(Op::request).collect();
    let failures = netlink.execute(&requests)?;
    Ok(failures
        .iter()
        .filter(|failure| {
            let gone = matches!(failure.refusal.errno, libc::ESRCH | libc::ENOENT);
            !(gone && ops[failure.index].withdraws())
        })
        .map(|failure| format!("{}: {}", ops[failure.index], failure.refusal))
        .collect())
}

/// Sets the MTU of `rip0`, has it up and lets packets in from peers that are not routed there.
pub fn prepare_device(
    netlink: &mut Netlink,
    link: &Link,
    mtu: u32,
) -> Result<Vec<String>, NetlinkError> {
    let mut refused = Vec::new();
    if link.mtu != mtu
        && let Err(refusal) = netlink.execute_one(message::set_mtu(link.index, mtu))?
    {
        refused.push(format!("set MTU of {DEVICE} to {mtu}: {refusal}"));
    }
    if !link.up
        && let Err(refusal) = netlink.execute_one(message::set_up(link.index))?
    {
        refused.push(format!("set {DEVICE} up: {refusal}"));
    }
    relax_reverse_path(DEVICE);
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subnet(n: u8) -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 244, n, 0), 24)
    }

    fn desired(link: Option<u32>, subnets: &[u8], active: bool) -> Desired {
        Desired {
            link,
            table: TABLE,
            source: Ipv4Addr::new(10, 244, 1, 0),
            subnets: subnets.iter().map(|&n| subnet(n)).collect(),
            active,
        }
    }

    fn apply_to(routes: &mut Vec<Route>, rules: &mut Vec<Rule>, ops: &[Op]) {
        for op in ops {
            match op {
                Op::DeleteRule(rule) => {
                    let at = rules.iter().position(|other| other == rule).unwrap();
                    rules.remove(at);
                }
                Op::DeleteRoute(route) => routes.retain(|other| other != route),
                Op::SetRoute(route) => {
                    routes.retain(|other| other.destination != route.destination);
                    routes.push(Route {
                        scope: 253,
                        ..route.clone()
                    });
                }
                Op::AddRule(rule) => rules.push(rule.clone()),
            }
        }
    }

    #[test]
    fn the_rule_goes_first_and_comes_last() {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        let up = ops(&desired(Some(5), &[2, 3], true), &routes, &rules);
        assert!(
            matches!(up[..], [Op::SetRoute(_), Op::SetRoute(_), Op::AddRule(_)]),
            "{up:?}"
        );
        apply_to(&mut routes, &mut rules, &up);
        assert_eq!(ops(&desired(Some(5), &[2, 3], true), &routes, &rules), []);
        let stalled = ops(&desired(Some(5), &[2, 3], false), &routes, &rules);
        assert_eq!(stalled, [Op::DeleteRule(rule(TABLE))]);
        let lost = ops(&desired(Some(5), &[3], false), &routes, &rules);
        assert!(
            matches!(lost[..], [Op::DeleteRule(_), Op::DeleteRoute(_)]),
            "{lost:?}"
        );
    }

    #[test]
    fn foreign_rules_and_routes_in_the_table_stay() {
        let foreign = Rule {
            protocol: 3,
            ..rule(TABLE)
        };
        let selective = Rule {
            matches_all: false,
            ..rule(TABLE)
        };
        let ops = ops(
            &desired(Some(5), &[], true),
            &[],
            &[foreign, selective.clone()],
        );
        assert_eq!(ops, [Op::DeleteRule(selective), Op::AddRule(rule(TABLE))]);
    }

    proptest! {
        #[test]
        fn the_difference_applied_is_the_desired_state(
            steps in proptest::collection::vec(
                (proptest::option::of(5..7u32), proptest::collection::vec(0..6u8, 0..5), any::<bool>()), 1..6)
        ) {
            let (mut routes, mut rules) = (Vec::new(), Vec::new());
            for (link, subnets, active) in steps {
                let desired = desired(link, &subnets, active);
                let changes = ops(&desired, &routes, &rules);
                // Withdrawals come before everything else.
                let first_addition = changes.iter().position(|op| !op.withdraws()).unwrap_or(changes.len());
                prop_assert!(changes[first_addition..].iter().all(|op| !op.withdraws()));
                apply_to(&mut routes, &mut rules, &changes);
                prop_assert_eq!(ops(&desired, &routes, &rules), []);
                let expected = if link.is_some() { desired.subnets.len() } else { 0 };
                prop_assert_eq!(routes.len(), expected);
                prop_assert_eq!(rules.len(), usize::from(active));
            }
        }
    }
}
