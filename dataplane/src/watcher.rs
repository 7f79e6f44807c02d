//! The watcher: the one thread beside the workers. It checks each new image before any worker may use it, tells the
//! XDP programs which tunnel is ours, and publishes what only the kernel knows.
//!
//! A worker never sees an image that has not been checked, and never waits for the check: the watcher pins the new
//! image, compares its checksum, and only then names it to the workers.

use ripstop_fib::publish::ImageRef;
use ripstop_fib::stats::{NicStats, Stats, XdpCounter};
use ripstop_fib::sync::Ordering;
use ripstop_fib::{Backend, Image, ImageError, Local, Node, Reader, Region};

use crate::xdp::{Direct, Match, Tunnel, TunnelMatch};

/// Follows the fib region for the workers.
#[derive(Debug)]
pub struct TableWatcher<'r> {
    region: Region<'r>,
    stats: Stats<'r>,
    /// Pins the image that the workers may use.
    accepted: Reader<'r>,
    /// Pins the image that is being checked.
    checking: Reader<'r>,
    refused: ImageRef,
}

/// An image that the workers may use from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Its generation.
    pub generation: u64,
    /// What it says about this node.
    pub node: Node,
    /// Size of the image in bytes.
    pub bytes: usize,
}

impl<'r> TableWatcher<'r> {
    /// Starts with nothing accepted.
    pub fn new(region: Region<'r>, stats: Stats<'r>) -> Self {
        let (first, second) = stats.watcher_pins();
        let (accepted, checking) = (Reader::new(region, first), Reader::new(region, second));
        Self {
            region,
            stats,
            accepted,
            checking,
            refused: ImageRef::default(),
        }
    }

    /// Looks for a new image; `None` when there is none. `before` is called with a good one before any worker sees it.
    ///
    /// # Errors
    /// When the new image cannot be used: the workers stay with the one they have. Reported once per image.
    pub fn look(&mut self, before: impl FnOnce(&Node)) -> Option<Result<Accepted, ImageError>> {
        let current = ImageRef(self.region.current().load(Ordering::Relaxed));
        if current == self.accepted.pinned() || current == self.refused {
            return None;
        }
        self.checking.follow(self.region.current());
        let found = self.checking.pinned();
        if found.generation() == 0 {
            return None;
        }
        let image = Image::attach(self.checking.words());
        match image.and_then(|image| image.verify().map(|()| image)) {
            Ok(image) => {
                let node = image.node();
                before(&node);
                // SYNC publish: passes on what `follow` has acquired.
                self.stats.accepted().store(found.0, Ordering::Release);
                core::mem::swap(&mut self.accepted, &mut self.checking);
                self.checking.unpin();
                Some(Ok(Accepted {
                    generation: found.generation(),
                    node,
                    bytes: image.size_bytes(),
                }))
            }
            Err(error) => {
                self.refused = found;
                self.checking.unpin();
                Some(Err(error))
            }
        }
    }
}

/// What is ours on the NIC of this index. On one that the image does not name, nothing is.
pub fn tunnel_match(node: &Node, ifindex: u32) -> TunnelMatch {
    let Some(nic) = node.nic(ifindex) else {
        return TunnelMatch::OFF;
    };
    TunnelMatch {
        tunnel: match node.backend {
            Backend::Vxlan => Tunnel::Vxlan {
                port: node.udp_port,
                vni: node.vni,
            },
            Backend::Udp => Tunnel::Udp {
                port: node.udp_port,
            },
            Backend::Ipip => Tunnel::Ipip,
            Backend::HostGw => Tunnel::None,
            Backend::Alloc => return TunnelMatch::OFF,
        },
        vlan: (nic.vlan != 0).then_some(nic.vlan),
        v4: node.v4.map(|local| family(node, &local)),
        v6: node.v6.map(|local| family(node, &local)),
    }
}

fn family<A: Copy>(node: &Node, local: &Local<A>) -> Match<A> {
    Match {
        local: local.address,
        direct: node.direct.then_some(Direct {
            subnet: local.subnet,
            network: local.network,
        }),
    }
}

/// The MTU that the host door must have: the larger of both families'. The routes of the other one carry a smaller.
/// `None` if the node has no data path.
pub fn host_door_mtu(node: &Node) -> Option<u16> {
    let v4 = node.v4.map(|local| local.pod_mtu);
    let v6 = node.v6.map(|local| local.pod_mtu);
    v4.max(v6).filter(|_| node.backend != Backend::Alloc)
}

/// Puts the XDP program's counters into the form of the stats region.
pub fn nic_stats(
    nic: &str,
    queues: u32,
    native: bool,
    counters: &crate::xdp::XdpCounters,
) -> NicStats {
    let mut values = [0; XdpCounter::COUNT];
    for (value, (_, frames)) in values.iter_mut().zip(counters.iter()) {
        *value = frames;
    }
    NicStats {
        nic: nic.to_owned(),
        queues,
        native,
        counters: values,
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use ripstop_fib::{Dscp, NICS, NicRecord};

    use super::*;

    fn local<A: Copy>(address: A, pod_mtu: u16) -> Local<A> {
        Local {
            address,
            subnet: (address, 24),
            network: (address, 16),
            pod_mtu,
            vtep_mac: [0; 6],
        }
    }

    /// NIC 2 untagged, NIC 5 with VLAN 100.
    fn node(backend: Backend, direct: bool) -> Node {
        let mut nics = [NicRecord::default(); NICS];
        nics[0].ifindex = 2;
        nics[1] = NicRecord {
            ifindex: 5,
            uplink: 1,
            vlan: 100,
        };
        Node {
            backend,
            v4: Some(local(Ipv4Addr::LOCALHOST, 1450)),
            v6: Some(local(Ipv6Addr::LOCALHOST, 1430)),
            udp_port: 8472,
            vni: 7,
            direct,
            dscp: Dscp::Inherit,
            flow_seed: 0,
            nics,
        }
    }

    #[test]
    fn each_backend_has_its_match() {
        let table = [
            (Backend::Vxlan, Tunnel::Vxlan { port: 8472, vni: 7 }),
            (Backend::Udp, Tunnel::Udp { port: 8472 }),
            (Backend::Ipip, Tunnel::Ipip),
            (Backend::HostGw, Tunnel::None),
        ];
        for (backend, tunnel) in table {
            for direct in [false, true] {
                let node = node(backend, direct);
                let ours = tunnel_match(&node, 2);
                assert_eq!((ours.tunnel, ours.vlan), (tunnel, None));
                let v4 = ours.v4.unwrap();
                assert_eq!(v4.local, Ipv4Addr::LOCALHOST);
                let expected = direct.then_some(Direct {
                    subnet: (Ipv4Addr::LOCALHOST, 24),
                    network: (Ipv4Addr::LOCALHOST, 16),
                });
                assert_eq!(v4.direct, expected);
                assert_eq!(ours.v6.unwrap().direct.is_some(), direct);
                assert_eq!(tunnel_match(&node, 5).vlan, Some(100));
            }
        }
    }

    #[test]
    fn nothing_is_ours_on_other_nics_and_without_a_data_path() {
        let vxlan = node(Backend::Vxlan, true);
        for ifindex in [0, 1, 3] {
            assert_eq!(tunnel_match(&vxlan, ifindex), TunnelMatch::OFF);
        }
        let alloc = node(Backend::Alloc, false);
        assert_eq!(tunnel_match(&alloc, 2), TunnelMatch::OFF);
        assert_eq!(host_door_mtu(&alloc), None);
    }

    #[test]
    fn the_host_door_has_the_larger_mtu() {
        let mut node = node(Backend::Vxlan, false);
        assert_eq!(host_door_mtu(&node), Some(1450));
        node.v4 = None;
        assert_eq!(host_door_mtu(&node), Some(1430));
        node.v4 = Some(local(Ipv4Addr::LOCALHOST, 1400));
        assert_eq!(host_door_mtu(&node), Some(1430));
    }
}
