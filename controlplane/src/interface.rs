//! Which interface carries the tunnel packets, and under which address.
//!
//! Pure: the choice is made from lists of links, addresses and routes, anew whenever one of them changes.

use core::fmt;
use core::net::Ipv4Addr;

use crate::mac::Mac;
use crate::netlink::message::{Address, Link, Route};

/// The interface that tunnel packets leave by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Largest packet, outer headers included.
    pub mtu: u32,
    /// Our address there: the outer source address.
    pub address: Ipv4Addr,
}

/// What the operator and the own lease say about the interface.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// `--iface` values, names or addresses, in order.
    pub ifaces: Vec<String>,
    /// `--public-ip`.
    pub public_ip: Option<Ipv4Addr>,
    /// Public IP in this node's own lease.
    pub lease_ip: Option<Ipv4Addr>,
}

/// Why no interface can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterfaceError {
    /// No `--iface` value names an interface or an address.
    #[error("Failed to find interface to use that matches --iface {}: the interfaces are {present}", .wanted.join(", "))]
    NoMatch {
        /// What was asked for.
        wanted: Vec<String>,
        /// What is there.
        present: String,
    },
    /// The public IP is nobody's.
    #[error(
        "no interface has the address {address} given with --public-ip: the interfaces are {present}; correct it, or name the interface with --iface"
    )]
    NoOwner {
        /// The address.
        address: Ipv4Addr,
        /// What is there.
        present: String,
    },
    /// There is nothing to go by.
    #[error(
        "Failed to find any valid interface to use: no default route{}: name the interface with --iface",
        .lease_ip.map(|ip| format!(", and no interface has the own lease's public IP {ip}")).unwrap_or_default()
    )]
    NoDefault {
        /// The address in the own lease.
        lease_ip: Option<Ipv4Addr>,
    },
    /// The interface has no address to send from.
    #[error(
        "interface {name} has no usable IPv4 address: give it one, or name another with --iface"
    )]
    NoAddress {
        /// Its name.
        name: String,
    },
    /// The interface has no Ethernet address or no MTU.
    #[error(
        "interface {name} {lacks}: only Ethernet interfaces can carry the tunnel; name another with --iface"
    )]
    Unfit {
        /// Its name.
        name: String,
        /// What is missing.
        lacks: &'static str,
    },
    /// The lease and the interface contradict each other.
    #[error(
        "the own lease says public IP {lease}, but interface {name} has {present}: correct the lease, or name the right interface with --iface"
    )]
    LeaseMismatch {
        /// Address in the lease.
        lease: Ipv4Addr,
        /// Interface chosen.
        name: String,
        /// Its addresses.
        present: String,
    },
}

/// The kernel's view, as far as the choice depends on it.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// All links.
    pub links: &'a [Link],
    /// All IPv4 addresses.
    pub addresses: &'a [Address],
    /// Routes of the main table.
    pub routes: &'a [Route],
}

struct List<T>(Vec<T>);

impl<T: fmt::Display> fmt::Display for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (index, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl View<'_> {
    fn by_name(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    fn owner(&self, address: Ipv4Addr) -> Option<&Link> {
        let owner = self
            .addresses
            .iter()
            .find(|candidate| candidate.net.addr() == address)?;
        self.links.iter().find(|link| link.index == owner.link)
    }

    /// The first default route of the dump, as flannel takes it.
    fn default_route(&self) -> Option<&Link> {
        let route = self
            .routes
            .iter()
            .find(|route| route.destination.prefix_len() == 0 && route.link != 0)?;
        self.links.iter().find(|link| link.index == route.link)
    }

    /// Flannel's order: global before link-local, permanent before not; never deprecated, loopback or multicast.
    fn usable_addresses(&self, link: u32) -> Vec<Ipv4Addr> {
        let mut usable: Vec<&Address> = self
            .addresses
            .iter()
            .filter(|address| address.link == link && !address.deprecated)
            .filter(|address| {
                !address.net.addr().is_loopback() && !address.net.addr().is_multicast()
            })
            .collect();
        usable.sort_by_key(|address| (address.net.addr().is_link_local(), !address.permanent));
        usable
            .into_iter()
            .map(|address| address.net.addr())
            .collect()
    }

    fn names(&self) -> String {
        List(
            self.links
                .iter()
                .filter(|link| !link.loopback)
                .map(|link| link.name.clone())
                .collect(),
        )
        .to_string()
    }
}

/// Chooses the interface and the address.
pub fn select(selection: &Selection, view: View<'_>) -> Result<Underlay, InterfaceError> {
    let mut fixed = None;
    let link = if !selection.ifaces.is_empty() {
        selection
            .ifaces
            .iter()
            .find_map(|wanted| match wanted.parse::<Ipv4Addr>() {
                Ok(address) => view.owner(address).inspect(|_| fixed = Some(address)),
                Err(_) => view.by_name(wanted),
            })
            .ok_or_else(|| InterfaceError::NoMatch {
                wanted: selection.ifaces.clone(),
                present: view.names(),
            })?
    } else if let Some(address) = selection.public_ip {
        fixed = Some(address);
        view.owner(address).ok_or_else(|| InterfaceError::NoOwner {
            address,
            present: view.names(),
        })?
    } else {
        // A lease that names an address of ours leaves no choice; flannel, which writes the lease itself, has none yet.
        let owner = selection.lease_ip.and_then(|address| view.owner(address));
        owner
            .or_else(|| view.default_route())
            .ok_or(InterfaceError::NoDefault {
                lease_ip: selection.lease_ip,
            })?
    };
    let usable = view.usable_addresses(link.index);
    let address = match (selection.public_ip.or(selection.lease_ip), fixed) {
        (Some(wanted), _) if usable.contains(&wanted) => wanted,
        (_, Some(fixed)) => fixed,
        _ => *usable.first().ok_or_else(|| InterfaceError::NoAddress {
            name: link.name.clone(),
        })?,
    };
    if let Some(lease) = selection.lease_ip.filter(|&lease| lease != address) {
        let present = List(usable).to_string();
        return Err(InterfaceError::LeaseMismatch {
            lease,
            name: link.name.clone(),
            present,
        });
    }
    let unfit = |lacks| InterfaceError::Unfit {
        name: link.name.clone(),
        lacks,
    };
    let mac = link
        .mac
        .filter(|mac| !mac.is_zero())
        .ok_or_else(|| unfit("has no Ethernet address"))?;
    if link.mtu == 0 {
        return Err(unfit("has MTU 0"));
    }
    Ok(Underlay {
        index: link.index,
        name: link.name.clone(),
        mac,
        mtu: link.mtu,
        address,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        let mac = Some(Mac([2, 0, 0, 0, 0, u8::try_from(index).unwrap()]));
        let loopback = name == "lo";
        Link {
            index,
            name: name.to_owned(),
            mac,
            mtu: 1500,
            up: true,
            running: true,
            loopback,
            vxlan: None,
        }
    }

    fn address(link: u32, net: &str) -> Address {
        let net: ipnet::Ipv4Net = net.parse().unwrap();
        Address {
            link,
            net,
            global: true,
            permanent: true,
            secondary: false,
            deprecated: false,
        }
    }

    fn default_route(link: u32) -> Route {
        Route {
            table: 254,
            destination: "0.0.0.0/0".parse().unwrap(),
            link,
            gateway: Some(Ipv4Addr::new(10, 0, 0, 254)),
            onlink: false,
            source: None,
            protocol: 3,
            scope: 0,
            priority: 0,
        }
    }

    fn selection(ifaces: &[&str], public_ip: Option<&str>, lease_ip: Option<&str>) -> Selection {
        Selection {
            ifaces: ifaces.iter().map(|&name| name.to_owned()).collect(),
            public_ip: public_ip.map(|text| text.parse().unwrap()),
            lease_ip: lease_ip.map(|text| text.parse().unwrap()),
        }
    }

    #[test]
    fn the_choice_follows_flannels_order() {
        let links = [link(1, "lo"), link(2, "eth0"), link(3, "eth1")];
        let mut temporary = address(3, "10.2.0.9/24");
        temporary.permanent = false;
        let mut old = address(3, "10.2.0.8/24");
        old.deprecated = true;
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(2, "169.254.7.7/16"),
            address(2, "10.0.0.1/24"),
            address(2, "10.0.0.2/24"),
            temporary,
            old,
            address(3, "10.2.0.1/24"),
        ];
        let routes = [default_route(3), default_route(2)];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &routes,
        };
        let cases = [
            (selection(&[], None, None), "eth1", "10.2.0.1"),
            (selection(&["nope", "eth0"], None, None), "eth0", "10.0.0.1"),
            (selection(&["10.0.0.2"], None, None), "eth0", "10.0.0.2"),
            (
                selection(&["eth0"], Some("10.0.0.2"), None),
                "eth0",
                "10.0.0.2",
            ),
            (selection(&[], Some("10.0.0.2"), None), "eth0", "10.0.0.2"),
            (selection(&[], None, Some("10.0.0.2")), "eth0", "10.0.0.2"),
            (
                selection(&["eth0"], None, Some("10.0.0.2")),
                "eth0",
                "10.0.0.2",
            ),
        ];
        for (selection, name, address) in cases {
            let chosen =
                select(&selection, view).unwrap_or_else(|error| panic!("{selection:?}: {error}"));
            assert_eq!(
                (chosen.name.as_str(), chosen.address.to_string().as_str()),
                (name, address),
                "{selection:?}"
            );
        }
        let cases = [
            (
                selection(&["nope", "10.9.9.9"], None, None),
                "matches --iface nope, 10.9.9.9",
            ),
            (selection(&[], Some("10.9.9.9"), None), "10.9.9.9"),
            (
                selection(&["eth1"], None, Some("10.0.0.1")),
                "own lease says public IP 10.0.0.1, but interface eth1",
            ),
            (
                selection(&[], None, Some("10.9.9.9")),
                "own lease says public IP 10.9.9.9",
            ),
        ];
        for (selection, wanted) in cases {
            let error = select(&selection, view)
                .expect_err("no interface fits")
                .to_string();
            assert!(error.contains(wanted), "{error:?} lacks {wanted:?}");
        }
        let view = View {
            routes: &[],
            ..view
        };
        assert_eq!(
            select(&selection(&[], None, None), view),
            Err(InterfaceError::NoDefault { lease_ip: None })
        );
    }

    #[test]
    fn an_interface_must_be_ethernet_with_an_address() {
        let mut tunnel = link(2, "tun0");
        tunnel.mac = None;
        let links = [tunnel, link(3, "eth1")];
        let addresses = [address(2, "10.0.0.1/24")];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &[],
        };
        assert!(matches!(
            select(&selection(&["tun0"], None, None), view),
            Err(InterfaceError::Unfit { .. })
        ));
        assert!(matches!(
            select(&selection(&["eth1"], None, None), view),
            Err(InterfaceError::NoAddress { .. })
        ));
    }
}
