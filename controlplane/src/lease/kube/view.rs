//! From Nodes to leases: who is a peer, who is not and why, and who keeps what two nodes claim.
//!
//! Pure. A node that cannot be used is named with what to change, and disturbs no other. Families are apart: a node that
//! has nothing of IPv6 yet is reached by IPv4, where flannel would drop it whole. Of two nodes that claim one subnet or one
//! VTEP MAC address, the older keeps it, so that all nodes decide alike and a newcomer cannot take what is in use.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::annotations::{self, Key, Prefix};
use super::node::Node;
use crate::family::{Family, PerFamily};
use crate::lease::claims::{Conflict, add_problem, settle};
use crate::lease::{Lease, LeaseSet};
use crate::netconf::NetConf;

/// What our own node's object says its subnets are; flannel's words where it has some.
pub fn own_subnets(node: &Node, conf: &NetConf) -> Result<PerFamily<Option<IpNet>>, String> {
    let name = &node.name;
    match node.pod_cidrs.len() {
        0 => {
            return Err(format!(
                "node {name:?} pod cidr not assigned: have the controller manager allocate node CIDRs, or set spec.podCIDR"
            ));
        }
        1 | 2 => {}
        _ => {
            return Err(format!(
                "node {name:?} pod cidrs should be IPv4/IPv6 only or dualstack"
            ));
        }
    }
    let mut subnets = PerFamily::default();
    for text in &node.pod_cidrs {
        let net = prefix(text).map_err(|problem| {
            format!("node {name:?} has the PodCIDR {text:?}, which {problem}")
        })?;
        *subnets.get_mut(Family::of_net(net)) = Some(net);
    }
    for family in Family::ALL {
        let Some(network) = conf.network(family) else {
            *subnets.get_mut(family) = None;
            continue;
        };
        let what = match family {
            Family::V4 => "PodCIDR",
            Family::V6 => "IPv6 PodCIDR",
        };
        match subnets.get(family) {
            None => {
                return Err(format!(
                    "node {name:?} has no {what}, but {family} is on in net-conf.json: assign one, or turn {family} off"
                ));
            }
            Some(subnet) if !network.contains(subnet) => {
                return Err(format!(
                    "subnet \"{network}\" specified in the flannel net config doesn't contain \"{subnet}\" {what} of the {name:?} node"
                ));
            }
            Some(_) => {}
        }
    }
    Ok(subnets)
}

/// A subnet with room for pods; host bits do not count, as with flannel.
fn prefix(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text
        .parse()
        .map_err(|_error| "is not a prefix like 10.244.1.0/24".to_owned())?;
    let max = Family::of_net(net).bits() - 2;
    if net.prefix_len() > max {
        return Err(format!(
            "has no room for pods: use a prefix of /{max} or shorter"
        ));
    }
    Ok(net.trunc())
}

/// Who we are, for the comparison with others.
#[derive(Debug, Clone)]
pub struct Own {
    /// Our node's name.
    pub node: Arc<str>,
    /// When it was made.
    pub created: Box<str>,
    /// Our leases.
    pub leases: PerFamily<Option<Lease>>,
}

/// What came of looking at all nodes.
#[derive(Debug, Default)]
pub struct View {
    /// The peers' leases as a set wants them: sorted by subnet, IPv4 first.
    pub peers: Vec<Lease>,
    /// Members that are not used, or not in all families, and why.
    pub skipped: BTreeMap<Arc<str>, String>,
    /// Families in which an older node has our VTEP MAC address.
    pub own_mac_taken: PerFamily<bool>,
    /// The older node that has our subnet.
    pub own_subnet_taken: Option<String>,
}

impl View {
    /// Looks at all nodes as seen by `own`.
    pub fn of<'a>(
        nodes: impl Iterator<Item = &'a Node>,
        own: &Own,
        prefix: &Prefix,
        conf: &NetConf,
    ) -> Self {
        let mut view = Self::default();
        let mut claims = Vec::new();
        for (_, lease) in own.leases.iter() {
            claims.extend(lease.iter().map(|lease| (&*own.created, lease.clone())));
        }
        for node in nodes.filter(|node| node.is_member() && node.name != own.node) {
            let (leases, problem) = peer_leases(node, prefix, conf);
            claims.extend(leases.into_iter().map(|lease| (&*node.created, lease)));
            if let Some(problem) = problem {
                view.skipped.insert(Arc::clone(&node.name), problem);
            }
        }
        // Of nodes of one second, and of a node's two families, any order will do that is the same everywhere.
        claims.sort_unstable_by(|(created, lease), (other_created, other)| {
            (created, &lease.node, lease.family()).cmp(&(
                other_created,
                &other.node,
                other.family(),
            ))
        });
        let claims = claims.into_iter();
        let claims = claims.map(|(_, lease)| (Arc::clone(&lease.node), lease));
        let settled = settle(claims, |node| *node == own.node);
        view.peers = settled.peers;
        view.own_mac_taken = settled.own_mac_taken;
        view.own_subnet_taken = settled.own_subnet_taken.map(|(older, theirs, ours)| {
            format!(
                "PodCIDR {ours} of this node {:?} overlaps {theirs} of the older node {older:?}, which keeps it: delete the one that is wrong",
                own.node
            )
        });
        for (node, lease, conflict) in settled.refused {
            add_problem(&mut view.skipped, &node, &refusal(&lease, &conflict));
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

/// What stands against a node's lease, and what to do.
fn refusal(lease: &Lease, conflict: &Conflict) -> String {
    match conflict {
        Conflict::Mac(older) => format!(
            "has the same VtepMAC {} as the older node {older:?}, which keeps it: remove flannel's annotations from the newer and restart its flannel",
            lease.vtep_mac.unwrap_or_default()
        ),
        Conflict::Subnet(older, subnet) => format!(
            "has the PodCIDR {}, which overlaps {subnet} of the older node {older:?}, which keeps it: delete the Node object that is wrong",
            lease.subnet
        ),
    }
}

/// A member's leases, and what stands against those that are missing.
fn peer_leases(node: &Node, prefix: &Prefix, conf: &NetConf) -> (Vec<Lease>, Option<String>) {
    let (theirs, ours) = (
        node.annotation(Key::BackendType).unwrap_or_default(),
        annotations::backend_type(conf.backend),
    );
    if theirs != ours {
        let name = prefix.name(Key::BackendType);
        return (
            Vec::new(),
            Some(format!(
                "has {name} {theirs:?} and this node {ours:?}: ignored"
            )),
        );
    }
    if node.pod_cidrs.len() > 2 {
        let problem = format!(
            "pod cidrs should be IPv4/IPv6 only or dualstack: spec.podCIDRs is {:?}",
            node.pod_cidrs
        );
        return (Vec::new(), Some(problem));
    }
    let (mut leases, mut problems) = (Vec::new(), Vec::new());
    for family in conf.families() {
        match peer_lease(node, family, prefix, conf) {
            Ok(lease) => leases.extend(lease),
            Err(problem) => problems.push(problem),
        }
    }
    if leases.is_empty() && problems.is_empty() {
        let names: Vec<_> = conf
            .families()
            .map(|family| prefix.name(Key::public_ip(family)))
            .collect();
        problems.push(format!(
            "has no {}: start flannel or Ripstop there",
            names.join(" or ")
        ));
    }
    (leases, (!problems.is_empty()).then(|| problems.join("; ")))
}

/// A member's lease of one family; none if it has nothing of the family.
fn peer_lease(
    node: &Node,
    family: Family,
    prefix: &Prefix,
    conf: &NetConf,
) -> Result<Option<Lease>, String> {
    let key = Key::public_ip(family);
    let Some(text) = node.text(key) else {
        return Ok(None);
    };
    let wrong =
        |key: Key, text: &str, problem: String| format!("{} {text:?} {problem}", prefix.name(key));
    let public_ip =
        annotations::public_ip(text, family).map_err(|problem| wrong(key, text, problem))?;
    let mut cidrs = node.pod_cidrs.iter();
    let cidr = cidrs.find(|cidr| cidr.contains(':') == (family == Family::V6));
    let cidr = cidr.ok_or_else(|| {
        format!(
            "has no {family} PodCIDR: assign one, spec.podCIDRs is {:?}",
            node.pod_cidrs
        )
    })?;
    let subnet = self::prefix(cidr).map_err(|problem| format!("PodCIDR {cidr:?} {problem}"))?;
    if let Some(network) = conf.network(family) {
        if !network.contains(&subnet) {
            return Err(format!(
                "PodCIDR {subnet} is not inside the pod network {network} of net-conf.json"
            ));
        }
        if network.contains(&public_ip) {
            let problem = format!(
                "lies inside the pod network {network}: a tunnel to it would lead into itself; write the underlay address"
            );
            return Err(wrong(key, text, problem));
        }
    }
    let vtep_mac = match conf.backend.vxlan() {
        None => None,
        Some(_) => {
            let key = Key::backend_data(family);
            let text = node.annotation(key).unwrap_or_default();
            Some(annotations::vtep_mac(text).map_err(|problem| wrong(key, text, problem))?)
        }
    };
    Ok(Some(Lease {
        node: Arc::clone(&node.name),
        public_ip,
        subnet,
        vtep_mac,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::annotations::DEFAULT_PREFIX;
    use super::super::node::read_page;
    use super::*;

    /// Node n1 with these pod CIDRs.
    fn node(cidrs: &[&str]) -> Node {
        let text = serde_json::json!({"items": [{"metadata": {"name": "n1"}, "spec": {"podCIDRs": cidrs}}]});
        let prefix = Prefix::new(DEFAULT_PREFIX).unwrap();
        let page = read_page(text.to_string().as_bytes(), &prefix, "n1").unwrap();
        page.nodes.into_iter().next().unwrap()
    }

    fn own(cidrs: &[&str], conf: &str) -> Result<[Option<String>; 2], String> {
        let conf = NetConf::parse(conf.as_bytes()).unwrap();
        let found = own_subnets(&node(cidrs), &conf)?;
        Ok([found.v4, found.v6].map(|net| net.map(|net| net.to_string())))
    }

    const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

    #[test]
    fn our_own_subnets_are_those_of_the_families_that_are_on() {
        let is =
            |v4: Option<&str>, v6: Option<&str>| Ok([v4.map(str::to_owned), v6.map(str::to_owned)]);
        let (net, net6) = ("10.244.1.0/24", "fd00:10:244:1::/64");
        assert_eq!(own(&[net], V4), is(Some(net), None));
        assert_eq!(own(&[net6, net], V4), is(Some(net), None));
        assert_eq!(own(&[net6, net], DUAL), is(Some(net), Some(net6)));
        // Of two of one family flannel takes the last, and host bits do not count.
        assert_eq!(
            own(&["10.244.7.0/24", "10.244.1.9/24"], V4),
            is(Some(net), None)
        );
    }

    #[test]
    fn what_is_wrong_with_them_is_said_in_flannels_words() {
        for (cidrs, conf, wanted) in [
            (&[][..], V4, r#"node "n1" pod cidr not assigned"#),
            (
                &["10.244.1.0/24", "10.244.2.0/24", "fd00::/64"],
                DUAL,
                r#"node "n1" pod cidrs should be IPv4/IPv6 only or dualstack"#,
            ),
            (
                &["10.245.1.0/24"],
                V4,
                r#"subnet "10.244.0.0/16" specified in the flannel net config doesn't contain "10.245.1.0/24" PodCIDR of the "n1" node"#,
            ),
            // Wider than the network is not inside it.
            (
                &["10.0.0.0/8"],
                V4,
                r#"subnet "10.244.0.0/16" specified in the flannel net config doesn't contain "10.0.0.0/8" PodCIDR of the "n1" node"#,
            ),
            (
                &["10.244.1.0/24", "fd00:10:245::/64"],
                DUAL,
                r#"subnet "fd00:10:244::/48" specified in the flannel net config doesn't contain "fd00:10:245::/64" IPv6 PodCIDR of the "n1" node"#,
            ),
            (&["10.244.1.0/24"], DUAL, r#"node "n1" has no IPv6 PodCIDR"#),
            (&["10.244.1.0/31"], V4, "has no room for pods"),
            (&["nonsense"], V4, "is not a prefix"),
        ] {
            let error = own(cidrs, conf).expect_err(wanted);
            assert!(error.contains(wanted), "{error}");
        }
    }
}
