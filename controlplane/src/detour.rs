//! The detour: routes to peers through `rip0`, and the rules that lead to them before the main table is asked. Once for
//! each address family.
//!
//! `rip0` exists only while the data plane's process does, and the kernel removes its routes with it, so traffic is
//! back on the standby without anybody acting. What this module adds is caution while the process lives: a route is
//! there only when every worker can forward by it, and a data plane that stands still loses the rules.
//!
//! ```text
//!   all peers in the tunnel     32000: from all          lookup 21097   all peers
//!   all peers direct            32000: from <network>    lookup 21097   all peers
//!   some direct                 32000: from <network>    lookup 21097   all peers
//!                               32001: from all          lookup 21098   those in the tunnel
//! ```
//!
//! From the whole pod network, and not only from our own subnet: so a pod that pretends to be another node's comes to
//! the workers, who refuse it.
//!
//! To a direct peer the node's own packets have the underlay's address as their source, as with flannel, so they stay
//! on the plain route; into the tunnel they have the first address of the lease.

use core::net::IpAddr;

use hashbrown::HashSet;
use ipnet::IpNet;

use crate::family::{Family, host};
use crate::netconf::Direct;
use crate::netlink::message::{self, Link, Route, RouteFilter, Rule};
use crate::netlink::{Netlink, NetlinkError, Request};
use crate::standby::{PROTOCOL, relax_reverse_path};

/// The data plane's device.
pub const DEVICE: &str = "rip0";
/// Number of Ripstop's routing table ("Ri").
pub const TABLE: u32 = 0x5269;
/// Place of the rule: behind an operator's own, before the main table's 32766.
pub const RULE_PRIORITY: u32 = 32_000;
/// With the group policy extension, packets that carry a policy take the kernel's device, which writes it into the
/// header: the low half of the mark.
const POLICY_MARK: (u32, u32) = (0, 0xffff);

/// The second table: what the node's own packets may take, where that is not all of the first.
pub fn host_table(table: u32) -> u32 {
    table.saturating_add(1)
}

/// What has to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Address family.
    pub family: Family,
    /// Index of `rip0`, if it exists.
    pub link: Option<u32>,
    /// Our table.
    pub table: u32,
    /// Which peers are direct.
    pub direct: Direct,
    /// Packets with a firewall mark in its low half take the standby.
    pub policies: bool,
    /// The network that all subnets come from.
    pub network: IpNet,
    /// Our own subnet; its first address is the source of the node's own packets in the tunnel.
    pub own_subnet: IpNet,
    /// Largest packet, where that is less than the device's.
    pub mtu: Option<u32>,
    /// Subnets of tunnelled peers that every worker can send to.
    pub tunnelled: HashSet<IpNet>,
    /// The same for direct peers.
    pub plain: HashSet<IpNet>,
    /// The rules are to be there.
    pub active: bool,
}

impl Desired {
    /// The rules, in the order of their places.
    pub fn rules(&self) -> Vec<Rule> {
        let rule = |priority, table, source| Rule {
            family: self.family,
            priority,
            table,
            protocol: PROTOCOL,
            source,
            mark: if self.policies { POLICY_MARK } else { (0, 0) },
            plain: true,
        };
        let from_pods = rule(RULE_PRIORITY, self.table, Some(self.network));
        match self.direct {
            Direct::None => vec![rule(RULE_PRIORITY, self.table, None)],
            Direct::All => vec![from_pods],
            Direct::OnLink => vec![
                from_pods,
                rule(RULE_PRIORITY + 1, host_table(self.table), None),
            ],
        }
    }

    /// All routes, by table and destination.
    fn routes(&self) -> Vec<Route> {
        let Some(link) = self.link else {
            return Vec::new();
        };
        let route = |table, subnet, source| Route {
            link,
            source,
            mtu: self.mtu,
            ..Route::to(subnet, table, PROTOCOL)
        };
        let source: Option<IpAddr> = Some(self.own_subnet.network());
        let tunnelled = |table| {
            let subnets = self.tunnelled.iter();
            subnets.map(move |&subnet| route(table, subnet, source))
        };
        let plain = self.plain.iter();
        let mut routes: Vec<Route> = tunnelled(self.table)
            .chain(plain.map(|&subnet| route(self.table, subnet, None)))
            .collect();
        if self.direct == Direct::OnLink {
            routes.extend(tunnelled(host_table(self.table)));
        }
        routes.sort_unstable_by_key(|route| (route.table, route.destination));
        routes
    }

    /// Subnets that are routed through the device.
    pub fn subnets(&self) -> usize {
        self.tunnelled.len() + self.plain.len()
    }
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
    candidate.protocol == PROTOCOL && [table, host_table(table)].contains(&candidate.table)
}

/// What has to change, withdrawals first and the rules last.
pub fn ops(desired: &Desired, routes: &[Route], rules: &[Rule]) -> Vec<Op> {
    let mut missing_rules = if desired.active {
        desired.rules()
    } else {
        Vec::new()
    };
    let mut ops = Vec::new();
    for candidate in rules
        .iter()
        .filter(|candidate| is_our_rule(candidate, desired.table))
    {
        // A duplicate goes, too.
        match missing_rules.iter().position(|rule| rule == candidate) {
            Some(at) => {
                missing_rules.remove(at);
            }
            None => ops.push(Op::DeleteRule(candidate.clone())),
        }
    }
    let mut missing = desired.routes();
    let key = |route: &Route| (route.table, route.destination);
    let mut right = HashSet::new();
    for candidate in routes {
        let wanted = missing
            .binary_search_by_key(&key(candidate), key)
            .ok()
            .and_then(|at| missing.get(at));
        match wanted {
            Some(wanted) if same_but_scope(candidate, wanted) => {
                right.insert(key(candidate));
            }
            // Replaced in one step below: a peer that changes its form is not without a route for a moment.
            Some(wanted) if candidate.priority == wanted.priority => {}
            _ if candidate.protocol == PROTOCOL => ops.push(Op::DeleteRoute(candidate.clone())),
            _ => {}
        }
    }
    missing.retain(|route| !right.contains(&key(route)));
    ops.extend(missing.into_iter().map(Op::SetRoute));
    ops.extend(missing_rules.into_iter().map(Op::AddRule));
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

/// Looks at the tables and the rules; what has to change.
pub fn plan(netlink: &mut Netlink, desired: &Desired) -> Result<Vec<Op>, NetlinkError> {
    let mut routes = Vec::new();
    for table in [desired.table, host_table(desired.table)] {
        routes.extend(netlink.routes(RouteFilter::table(desired.family, table))?);
    }
    Ok(ops(desired, &routes, &netlink.rules(desired.family)?))
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

/// Has `rip0` up with the node's own addresses in its leases, and lets packets in from peers that are not routed there.
/// Its MTU is the data plane's to set, which knows when its workers have taken a new one up.
///
/// The addresses are those of the tunnel devices; having them here as well, the node's own packets keep their source
/// whatever happens to those, and where the kernel has no such device at all.
pub fn prepare_device(
    netlink: &mut Netlink,
    link: &Link,
    wanted: &[IpAddr],
) -> Result<Vec<String>, NetlinkError> {
    let mut requests = Vec::new();
    if !link.up {
        requests.push((format!("set {DEVICE} up"), message::set_up(link.index)));
    }
    let mut present = netlink.addresses()?;
    present.retain(|address| address.link == link.index);
    for &address in wanted {
        if !present.iter().any(|there| there.net == host(address)) {
            let request = message::add_address(link.index, host(address));
            requests.push((format!("give {DEVICE} the address {address}"), request));
        }
    }
    let is_link_local = |net: IpNet| match net {
        IpNet::V4(_) => false,
        IpNet::V6(net) => net.addr().is_unicast_link_local(),
    };
    // The device is Ripstop's alone.
    for address in &present {
        let is_wanted = wanted.iter().any(|&wanted| address.net == host(wanted));
        if !is_wanted && !is_link_local(address.net) {
            let request = message::delete_address(link.index, address.net);
            requests.push((
                format!("take the address {} from {DEVICE}", address.net),
                request,
            ));
        }
    }
    let mut refused = Vec::new();
    for (what, request) in requests {
        if let Err(refusal) = netlink.execute_one(request)? {
            refused.push(format!("{what}: {refusal}"));
        }
    }
    relax_reverse_path(DEVICE);
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subnet(n: u8) -> IpNet {
        format!("10.244.{n}.0/24").parse().unwrap()
    }

    fn network() -> IpNet {
        "10.244.0.0/16".parse().unwrap()
    }

    fn desired(link: Option<u32>, subnets: &[u8], active: bool) -> Desired {
        Desired {
            family: Family::V4,
            link,
            table: TABLE,
            direct: Direct::None,
            policies: false,
            network: network(),
            own_subnet: subnet(1),
            mtu: None,
            tunnelled: subnets.iter().map(|&n| subnet(n)).collect(),
            plain: HashSet::new(),
            active,
        }
    }

    /// The rule of a backend whose peers are all in the tunnel.
    fn rule() -> Rule {
        desired(None, &[], true).rules().remove(0)
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
                    let key = |route: &Route| (route.table, route.destination);
                    routes.retain(|other| key(other) != key(route));
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
        assert_eq!(stalled, [Op::DeleteRule(rule())]);
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
            ..rule()
        };
        let selective = Rule {
            plain: false,
            ..rule()
        };
        let ops = ops(
            &desired(Some(5), &[], true),
            &[],
            &[foreign, selective.clone()],
        );
        assert_eq!(ops, [Op::DeleteRule(selective), Op::AddRule(rule())]);
    }

    #[test]
    fn the_nodes_own_packets_to_direct_peers_stay_on_the_plain_route() {
        let rules = |direct, policies| {
            let desired = Desired {
                direct,
                policies,
                ..desired(Some(5), &[], true)
            };
            let fields = |rule: Rule| (rule.priority, rule.table, rule.source, rule.mark);
            desired.rules().into_iter().map(fields).collect::<Vec<_>>()
        };
        let all = (0, 0);
        let pods = (RULE_PRIORITY, TABLE, Some(network()), all);
        assert_eq!(
            rules(Direct::None, false),
            [(RULE_PRIORITY, TABLE, None, all)]
        );
        assert_eq!(rules(Direct::All, false), [pods]);
        assert_eq!(
            rules(Direct::OnLink, false),
            [pods, (RULE_PRIORITY + 1, TABLE + 1, None, all)]
        );
        assert_eq!(
            rules(Direct::None, true),
            [(RULE_PRIORITY, TABLE, None, (0, 0xffff))]
        );
        let mixed = Desired {
            direct: Direct::OnLink,
            plain: [subnet(3)].into(),
            ..desired(Some(5), &[2], true)
        };
        let routes: Vec<_> = mixed
            .routes()
            .into_iter()
            .map(|route| (route.table, route.destination, route.source))
            .collect();
        let source = Some(subnet(1).network());
        assert_eq!(
            routes,
            [
                (TABLE, subnet(2), source),
                (TABLE, subnet(3), None),
                (TABLE + 1, subnet(2), source)
            ]
        );
    }

    #[test]
    fn a_peer_that_becomes_direct_is_never_without_its_route() {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        let before = Desired {
            direct: Direct::OnLink,
            ..desired(Some(5), &[2, 3], true)
        };
        let up = ops(&before, &routes, &rules);
        apply_to(&mut routes, &mut rules, &up);
        let after = Desired {
            plain: [subnet(2)].into(),
            tunnelled: [subnet(3)].into(),
            ..before
        };
        let change = ops(&after, &routes, &rules);
        let of_table = |op: &Op, table| match op {
            Op::SetRoute(route) | Op::DeleteRoute(route) => route.table == table,
            Op::AddRule(_) | Op::DeleteRule(_) => true,
        };
        assert_eq!(change.len(), 2, "{change:?}");
        assert!(
            matches!(&change[0], Op::DeleteRoute(_)) && of_table(&change[0], TABLE + 1),
            "{change:?}"
        );
        assert!(
            matches!(&change[1], Op::SetRoute(_)) && of_table(&change[1], TABLE),
            "{change:?}"
        );
        apply_to(&mut routes, &mut rules, &change);
        assert_eq!(ops(&after, &routes, &rules), []);
    }

    #[test]
    fn a_smaller_mtu_is_corrected_in_place() {
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        let up = ops(&desired(Some(5), &[2], true), &routes, &rules);
        apply_to(&mut routes, &mut rules, &up);
        let smaller = Desired {
            mtu: Some(1430),
            ..desired(Some(5), &[2], true)
        };
        let change = ops(&smaller, &routes, &rules);
        assert!(
            matches!(&change[..], [Op::SetRoute(route)] if route.mtu == Some(1430)),
            "{change:?}"
        );
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
                let expected = if link.is_some() { desired.subnets() } else { 0 };
                prop_assert_eq!(routes.len(), expected);
                prop_assert_eq!(rules.len(), usize::from(active));
            }
        }
    }
}
