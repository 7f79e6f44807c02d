//! The examples under `configs/` are what the programs accept.

use std::path::{Path, PathBuf};

use ripstop_controlplane::lease::file;
use ripstop_controlplane::netconf::NetConf;

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(name)
}

#[test]
fn the_examples_fit_together() {
    let conf = NetConf::load(&config("net-conf.json")).unwrap();
    let bytes = std::fs::read(config("leases.json")).unwrap();
    for node in ["n1", "n2", "n3"] {
        let leases = file::parse(&bytes, node, &conf).unwrap();
        assert_eq!(&*leases.own.v4.as_ref().unwrap().node, node);
        assert_eq!(leases.peers.len(), 2);
    }
}
