//! Two networks behind a host door, in a network namespace of the test's own.

use std::fs;
use std::net::UdpSocket;

use crate::common::{ip, own_namespace};

/// Gives the calling thread a network namespace with addresses, forwarding, and the door that `open` makes as the way to
/// the networks.
pub(crate) fn behind<T>(open: impl FnOnce() -> T) -> T {
    own_namespace();
    for family in ["ipv4", "ipv6"] {
        forward(family, "1");
    }
    ip("link set lo up");
    ip("address add 192.0.2.1/32 dev lo");
    ip("address add 2001:db8::1/128 dev lo nodad");
    let door = open();
    ip("route add 10.244.0.0/16 dev rip0");
    ip("route add fd00::/16 dev rip0");
    door
}

/// Turns forwarding on ("1") or off.
pub(crate) fn forward(family: &str, forwarding: &str) {
    let path = format!("/proc/sys/net/{family}/conf/all/forwarding");
    fs::write(path, forwarding).unwrap();
}

/// Sends `flows` UDP packets of different flows to a pod behind the host door.
pub(crate) fn send(to: &str, flows: usize) {
    for _ in 0..flows {
        let any = if to.contains('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.send_to(b"hello", to).unwrap();
    }
}
