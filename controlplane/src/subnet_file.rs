//! `subnet.env`, the file that pods wait for: written when the node can really forward, and kept right from then on.
//!
//! It is never removed: like routes and devices it outlives the process, so that pods can be made while it restarts.

use std::io;
use std::path::Path;

use ipnet::IpNet;
use ripstop_cni::subnet_env::SubnetEnv;

use crate::family::Family;
use crate::lease::LeaseSet;
use crate::netconf::NetConf;

/// What the file has to say. The MTU is the smaller family's: pods have one for both.
pub fn wanted(
    conf: &NetConf,
    leases: &LeaseSet,
    underlay_mtu: u32,
    ip_masq: bool,
) -> Option<SubnetEnv> {
    let mut env = SubnetEnv {
        mtu: conf
            .families()
            .map(|family| conf.pod_mtu(family, underlay_mtu))
            .min()?,
        ip_masq,
        ..SubnetEnv::default()
    };
    for family in Family::ALL {
        let Some(network) = conf.network(family) else {
            continue;
        };
        // All families that are on, or pods would be made without one of them.
        match (network, leases.own(family)?.subnet) {
            (IpNet::V4(network), IpNet::V4(subnet)) => {
                env.networks = vec![network];
                env.subnet = Some(subnet);
            }
            (IpNet::V6(network), IpNet::V6(subnet)) => {
                env.networks_v6 = vec![network];
                env.subnet_v6 = Some(subnet);
            }
            (IpNet::V4(_), IpNet::V6(_)) | (IpNet::V6(_), IpNet::V4(_)) => return None,
        }
    }
    Some(env)
}

/// Writes the file unless it says the same already. True if it was written.
pub fn keep(path: &Path, wanted: &SubnetEnv) -> io::Result<bool> {
    if std::fs::read(path).is_ok_and(|present| present == wanted.render().as_bytes()) {
        return Ok(false);
    }
    wanted.write(path)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::PerFamily;
    use crate::lease::Lease;

    fn lease(ip: &str, subnet: &str) -> Option<Lease> {
        Some(Lease {
            node: "n1".into(),
            public_ip: ip.parse().unwrap(),
            subnet: subnet.parse().unwrap(),
            vtep_mac: None,
        })
    }

    fn conf(text: &str) -> NetConf {
        NetConf::parse(text.as_bytes()).unwrap()
    }

    fn text(conf: &NetConf, own: PerFamily<Option<Lease>>, ip_masq: bool) -> Option<String> {
        let leases = LeaseSet {
            own,
            peers: Vec::new(),
        };
        wanted(conf, &leases, 1500, ip_masq).map(|env| env.render())
    }

    #[test]
    fn it_says_what_flannel_says() {
        let one = conf(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let own = || PerFamily {
            v4: lease("10.199.0.11", "10.244.1.0/24"),
            v6: None,
        };
        assert_eq!(
            text(&one, own(), true).as_deref(),
            Some(
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
            )
        );
        let both = conf(
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#,
        );
        assert_eq!(
            text(&both, own(), false),
            None,
            "one family's lease is missing"
        );
        let own = PerFamily {
            v6: lease("fd00:199::11", "fd00:10:244:1::/64"),
            ..own()
        };
        assert_eq!(
            text(&both, own, false).as_deref(),
            Some(
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
                 FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
                 FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
            )
        );
    }

    #[test]
    fn a_file_that_is_right_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flannel/subnet.env");
        let env = SubnetEnv {
            mtu: 1450,
            ..SubnetEnv::default()
        };
        assert!(keep(&path, &env).unwrap());
        assert!(!keep(&path, &env).unwrap());
        std::fs::write(&path, "half a li").unwrap();
        assert!(keep(&path, &env).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), env.render());
    }
}
