//! Any bytes as a lease file: the parser never panics, and a set that it accepts keeps what `LeaseSet` promises.
#![no_main]

use std::collections::HashSet;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use ripstop_controlplane::family::Family;
use ripstop_controlplane::lease::file::parse;
use ripstop_controlplane::netconf::NetConf;

/// One network of IPv4 alone with VTEP MACs, one of both families with, and one of both without.
static CONFS: LazyLock<[NetConf; 3]> = LazyLock::new(|| {
    [
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"host-gw"}}"#,
    ]
    .map(|text| NetConf::parse(text.as_bytes()).expect("a configuration"))
});

fuzz_target!(|data: &[u8]| {
    for conf in CONFS.iter() {
        check(data, conf);
    }
});

fn check(data: &[u8], conf: &NetConf) {
    let set = match parse(data, "n1", conf) {
        Ok(set) => set,
        Err(error) => {
            assert!(!error.to_string().is_empty(), "an error says something");
            return;
        }
    };
    for family in Family::ALL {
        let own = set.own(family);
        assert_eq!(own.is_some(), conf.network(family).is_some());
        let Some((own, network)) = own.zip(conf.network(family)) else {
            assert_eq!(set.peers(family).count(), 0);
            continue;
        };
        assert_eq!(&*own.node, "n1");
        let all: Vec<_> = std::iter::once(own).chain(set.peers(family)).collect();
        let names: HashSet<_> = all.iter().map(|lease| &lease.node).collect();
        assert_eq!(names.len(), all.len(), "names are unique");
        if conf.backend.vxlan().is_some() {
            let macs: HashSet<_> = all.iter().map(|lease| lease.vtep_mac.expect("vxlan has one")).collect();
            assert_eq!(macs.len(), all.len(), "VTEP MACs are unique");
        }
        for (at, lease) in all.iter().enumerate() {
            assert_eq!(Family::of(lease.public_ip), family);
            assert!(network.contains(&lease.subnet), "subnets lie in the network");
            assert_eq!(lease.subnet, lease.subnet.trunc(), "host bits are clear");
            for other in &all[at + 1..] {
                let overlap = lease.subnet.contains(&other.subnet) || other.subnet.contains(&lease.subnet);
                assert!(!overlap, "subnets do not overlap");
            }
        }
    }
}
