//! Any bytes as a lease file: the parser never panics, and a set that it accepts keeps what `LeaseSet` promises.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use ripstop_controlplane::lease::file::parse;

fuzz_target!(|data: &[u8]| {
    let network = "10.244.0.0/16".parse().expect("a prefix");
    match parse(data, "n1", network) {
        Ok(set) => {
            assert_eq!(set.own.node, "n1");
            let all: Vec<_> = std::iter::once(&set.own).chain(&set.peers).collect();
            let names: HashSet<_> = all.iter().map(|lease| &lease.node).collect();
            let macs: HashSet<_> = all.iter().map(|lease| lease.vtep_mac.to_string()).collect();
            assert_eq!(
                (names.len(), macs.len()),
                (all.len(), all.len()),
                "names and VTEP MACs are unique"
            );
            for (at, lease) in all.iter().enumerate() {
                assert!(
                    network.contains(&lease.subnet),
                    "subnets lie in the network"
                );
                assert_eq!(lease.subnet, lease.subnet.trunc(), "host bits are clear");
                for other in &all[at + 1..] {
                    let overlap = lease.subnet.contains(&other.subnet)
                        || other.subnet.contains(&lease.subnet);
                    assert!(!overlap, "subnets do not overlap");
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty(), "an error says something"),
    }
});
