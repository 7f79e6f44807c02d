//! The route that refuses what is for no pod (`--ip-blackhole-route`).
//!
//! Where every pod has a route of its own and no bridge has the subnet, a packet for a pod that is gone would follow the
//! default route, and come back.

use ipnet::IpNet;

use crate::family::Family;
use crate::netlink::message;
use crate::netlink::{Netlink, NetlinkError};
use crate::standby::{PROTOCOL, TABLE_MAIN};

/// What was done.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Routes added and removed.
    pub changed: usize,
    /// What the kernel refused.
    pub refused: Option<String>,
}

/// Makes `wanted`, and no other subnet of this family, one of which the kernel refuses what no other route takes. A
/// route of that kind to the same subnet will do, whoever made it; removed are only our own.
pub fn keep(
    netlink: &mut Netlink,
    family: Family,
    wanted: Option<IpNet>,
) -> Result<Outcome, NetlinkError> {
    let wanted = wanted.map(|subnet| subnet.trunc());
    let present = netlink.blackholes(family, TABLE_MAIN)?;
    let is_wanted = |subnet: IpNet| wanted == Some(subnet);
    let stale = present
        .iter()
        .filter(|route| route.protocol == PROTOCOL && !is_wanted(route.destination));
    let missing = wanted.filter(|_| !present.iter().any(|route| is_wanted(route.destination)));
    let mut requests: Vec<_> = stale.map(message::delete_blackhole).collect();
    requests.extend(missing.map(|subnet| message::add_blackhole(subnet, TABLE_MAIN, PROTOCOL)));
    if requests.is_empty() {
        return Ok(Outcome::default());
    }
    let failures = netlink.execute(&requests)?;
    Ok(Outcome {
        changed: requests.len() - failures.len(),
        refused: failures.first().map(|failure| failure.refusal.to_string()),
    })
}
