//! Which interface carries the tunnel packets, and under which address.
//!
//! A public IP may also lie on the loopback interface, as where nodes announce themselves by BGP over several uplinks.
//! It then says nothing about the interface, which is the default route's or `--iface`'s, and is an address there all
//! the same; flannel would take `lo`, which can carry nothing.
//!
//! [`select`] is pure: it chooses from lists of links, addresses and routes. [`look`] asks the kernel for what it needs;
//! the question is put anew whenever one of them changes.

use core::fmt;
use core::net::IpAddr;
use core::str::FromStr;

use regex::Regex;

use crate::family::{Family, PerFamily};
use crate::mac::Mac;
use crate::netlink::message::{Address, Link, Route, RouteFilter};
use crate::netlink::{Netlink, NetlinkError};
use crate::standby::TABLE_MAIN;

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
    /// Our addresses there: the outer source addresses of the families that are on.
    pub addresses: PerFamily<Option<IpAddr>>,
}

/// What the operator and the own lease say about the interface.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// `--iface` values, names or addresses, in order.
    pub ifaces: Vec<String>,
    /// `--iface-regex` values, in order; they come after all `ifaces`.
    pub patterns: Vec<Pattern>,
    /// `--iface-can-reach`; it comes last.
    pub can_reach: Option<IpAddr>,
    /// `--public-ip` and `--public-ipv6`.
    pub public_ips: PerFamily<Option<IpAddr>>,
    /// Public IPs in this node's own leases.
    pub lease_ips: PerFamily<Option<IpAddr>>,
    /// Which families are on.
    pub families: PerFamily<bool>,
    /// The other nodes send to our public IP as to a router, so it must be the interface's own.
    pub host_gw: bool,
}

impl Selection {
    fn families(&self) -> impl Iterator<Item = Family> {
        Family::ALL
            .into_iter()
            .filter(|&family| *self.families.get(family))
    }

    /// The flags that name an interface, as they were written.
    fn flags(&self) -> String {
        let ifaces = self.ifaces.iter().map(|value| format!("--iface {value}"));
        let patterns = self.patterns.iter();
        let patterns = patterns.map(|value| format!("--iface-regex {value}"));
        let can_reach = self.can_reach.iter();
        let can_reach = can_reach.map(|value| format!("--iface-can-reach {value}"));
        List(ifaces.chain(patterns).chain(can_reach).collect()).to_string()
    }

    fn has_flags(&self) -> bool {
        !self.ifaces.is_empty() || !self.patterns.is_empty() || self.can_reach.is_some()
    }
}

/// A regular expression that has to match somewhere in an address or a name, as Go's `regexp` takes it.
#[derive(Debug, Clone)]
pub struct Pattern(Regex);

impl FromStr for Pattern {
    type Err = regex::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Regex::new(text).map(Self)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Why no interface can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterfaceError {
    /// None of the flags that name one names an interface or an address that is there.
    #[error(
        "Failed to find interface to use that matches the interfaces and/or regexes provided: {wanted}: the interfaces are {present}"
    )]
    NoMatch {
        /// What was asked for.
        wanted: String,
        /// What is there.
        present: String,
    },
    /// The public IP is nobody's.
    #[error(
        "no interface has the address {address} given with --public-ip or --public-ipv6: the interfaces are {present}; correct it, or name the interface with --iface"
    )]
    NoOwner {
        /// The address.
        address: IpAddr,
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
        lease_ip: Option<IpAddr>,
    },
    /// The families' default routes lead elsewhere each.
    #[error(
        "Failed to find any valid interface to use: v6 default route interface {v6} must be the same with v4 default route interface {v4}: name the interface with --iface"
    )]
    DefaultsDiffer {
        /// Interface of the IPv4 default route.
        v4: String,
        /// Interface of the IPv6 default route.
        v6: String,
    },
    /// The families' addresses are on different interfaces.
    #[error(
        "v6 interface {v6} must be the same with v4 interface {v4}: both addresses of a node belong on one interface; correct them, or name the interface with --iface"
    )]
    OwnersDiffer {
        /// Interface of the IPv4 address.
        v4: String,
        /// Interface of the IPv6 address.
        v6: String,
    },
    /// With host-gw the public IP is the other nodes' next hop.
    #[error(
        "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by host-gw backend: {public_ip} is not an address of {name} ({present}); correct the lease or --public-ip, or name the right interface with --iface"
    )]
    PublicIpDiffers {
        /// The public IP.
        public_ip: IpAddr,
        /// The interface.
        name: String,
        /// Its addresses.
        present: String,
    },
    /// The interface has no address to send from.
    #[error(
        "interface {name} has no usable {family} address: give it one, or name another with --iface"
    )]
    NoAddress {
        /// Which family lacks one.
        family: Family,
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
        lease: IpAddr,
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
    /// All addresses.
    pub addresses: &'a [Address],
    /// Routes of the main table, both families.
    pub routes: &'a [Route],
    /// The route to `--iface-can-reach`, if there is one: its interface, and our address there.
    pub reaching: Option<(u32, Option<IpAddr>)>,
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

impl<'a> View<'a> {
    fn by_name(&self, name: &str) -> Option<&'a Link> {
        self.links.iter().find(|link| link.name == name)
    }

    fn by_index(&self, index: u32) -> Option<&'a Link> {
        self.links.iter().find(|link| link.index == index)
    }

    fn owner(&self, address: IpAddr) -> Option<&'a Link> {
        let owner = self
            .addresses
            .iter()
            .find(|candidate| candidate.net.addr() == address)?;
        self.by_index(owner.link)
    }

    /// The address is the node's and belongs to no link.
    fn is_on_loopback(&self, address: IpAddr) -> bool {
        !address.is_loopback() && self.owner(address).is_some_and(|link| link.loopback)
    }

    /// The first default route of the dump, as flannel takes it.
    fn default_route(&self, family: Family) -> Option<&'a Link> {
        let route = self.routes.iter().find(|route| {
            let to_all = route.destination.prefix_len() == 0;
            to_all && Family::of_net(route.destination) == family && route.link != 0
        })?;
        self.by_index(route.link)
    }

    /// Flannel's order: global before link-local, permanent before not, stable before temporary; never deprecated,
    /// loopback or multicast.
    fn usable_addresses(&self, link: u32, family: Family) -> Vec<IpAddr> {
        let mut usable: Vec<&Address> = self
            .addresses
            .iter()
            .filter(|address| address.link == link && !address.deprecated)
            .filter(|address| Family::of_net(address.net) == family)
            .filter(|address| {
                !address.net.addr().is_loopback() && !address.net.addr().is_multicast()
            })
            .collect();
        usable.sort_by_key(|address| {
            let (is_link_local, is_temporary) = match address.net.addr() {
                IpAddr::V4(ip) => (ip.is_link_local(), false),
                IpAddr::V6(ip) => (ip.is_unicast_link_local(), address.secondary),
            };
            (is_link_local, !address.permanent, is_temporary)
        });
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

/// The interface on which both families' addresses are, as far as any of them is on one.
fn common_owner<'a>(
    view: &View<'a>,
    selection: &Selection,
    addresses: &PerFamily<Option<IpAddr>>,
) -> Result<Option<&'a Link>, InterfaceError> {
    let owner = |family| {
        let on = *selection.families.get(family);
        let address = addresses.get(family).filter(|_| on)?;
        view.owner(address).filter(|link| !link.loopback)
    };
    match (owner(Family::V4), owner(Family::V6)) {
        (Some(v4), Some(v6)) if v4.index != v6.index => Err(InterfaceError::OwnersDiffer {
            v4: v4.name.clone(),
            v6: v6.name.clone(),
        }),
        (v4, v6) => Ok(v4.or(v6)),
    }
}

/// The interface of the default route, which both families must agree on.
fn by_default_route<'a>(
    view: &View<'a>,
    selection: &Selection,
) -> Result<Option<&'a Link>, InterfaceError> {
    let mut found: Option<&Link> = None;
    for family in selection.families() {
        let Some(link) = view.default_route(family) else {
            return Ok(None);
        };
        if let Some(v4) = found.filter(|v4| v4.index != link.index) {
            return Err(InterfaceError::DefaultsDiffer {
                v4: v4.name.clone(),
                v6: link.name.clone(),
            });
        }
        found = Some(link);
    }
    Ok(found)
}

/// The interface that the flags name, with the addresses that they leave no choice of.
fn by_flags<'a>(
    view: &View<'a>,
    selection: &Selection,
) -> Option<(&'a Link, PerFamily<Option<IpAddr>>)> {
    let one = |address: IpAddr| {
        let mut fixed = PerFamily::default();
        *fixed.get_mut(Family::of(address)) = Some(address);
        fixed
    };
    let named = |wanted: &String| match wanted.parse::<IpAddr>() {
        Ok(address) => view.owner(address).map(|link| (link, one(address))),
        Err(_) => view
            .by_name(wanted)
            .map(|link| (link, PerFamily::default())),
    };
    // Every family that is on must have an address that matches.
    let with_addresses = |pattern: &Pattern, link: &Link| {
        let mut fixed = PerFamily::default();
        for family in selection.families() {
            let mut usable = view.usable_addresses(link.index, family).into_iter();
            let found = usable.find(|address| pattern.0.is_match(&address.to_string()))?;
            *fixed.get_mut(family) = Some(found);
        }
        Some(fixed)
    };
    let matching = |pattern: &Pattern| {
        let links = || view.links.iter().filter(|link| !link.loopback);
        let by_address = links().find_map(|link| Some((link, with_addresses(pattern, link)?)));
        let by_name = || links().find(|link| pattern.0.is_match(&link.name));
        by_address.or_else(|| by_name().map(|link| (link, PerFamily::default())))
    };
    let reaching = || {
        let (index, source) = view.reaching?;
        let fixed = source.map_or_else(PerFamily::default, one);
        view.by_index(index).map(|link| (link, fixed))
    };
    let ifaces = selection.ifaces.iter().find_map(named);
    ifaces
        .or_else(|| selection.patterns.iter().find_map(matching))
        .or_else(reaching)
}

/// Chooses by what the kernel says at this moment, and of it asks for no more than it takes.
pub fn look(
    netlink: &mut Netlink,
    selection: &Selection,
    links: &[Link],
    addresses: &[Address],
) -> Result<Result<Underlay, InterfaceError>, NetlinkError> {
    let reaching = match selection.can_reach {
        Some(address) => netlink.route_to(address)?,
        None => None,
    };
    let view = View {
        links,
        addresses,
        routes: &[],
        reaching,
    };
    let chosen = select(selection, view);
    // The main table is large; it is read only when nothing else decides.
    if !matches!(chosen, Err(InterfaceError::NoDefault { .. })) {
        return Ok(chosen);
    }
    let mut routes = Vec::new();
    for family in Family::ALL {
        routes.extend(netlink.routes(RouteFilter::table(family, TABLE_MAIN))?);
    }
    let routes = &routes;
    Ok(select(selection, View { routes, ..view }))
}

/// Chooses the interface and the addresses.
pub fn select(selection: &Selection, view: View<'_>) -> Result<Underlay, InterfaceError> {
    let mut fixed = PerFamily::default();
    let link = if selection.has_flags() {
        let (link, addresses) =
            by_flags(&view, selection).ok_or_else(|| InterfaceError::NoMatch {
                wanted: selection.flags(),
                present: view.names(),
            })?;
        fixed = addresses;
        link
    } else if let Some(address) = selection.public_ips.v4.or(selection.public_ips.v6) {
        fixed = selection.public_ips;
        match common_owner(&view, selection, &selection.public_ips)? {
            Some(owner) => owner,
            None if view.is_on_loopback(address) => by_default_route(&view, selection)?
                .ok_or(InterfaceError::NoDefault { lease_ip: None })?,
            None => {
                return Err(InterfaceError::NoOwner {
                    address,
                    present: view.names(),
                });
            }
        }
    } else {
        // A lease that names an address of ours leaves no choice; flannel, which writes the lease itself, has none yet.
        match common_owner(&view, selection, &selection.lease_ips)? {
            Some(owner) => owner,
            None => by_default_route(&view, selection)?.ok_or(InterfaceError::NoDefault {
                lease_ip: selection.lease_ips.v4.or(selection.lease_ips.v6),
            })?,
        }
    };
    let mut addresses = PerFamily::default();
    for family in selection.families() {
        let address = address_on(selection, &view, link, family, *fixed.get(family))?;
        *addresses.get_mut(family) = Some(address);
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
        addresses,
    })
}

/// Our address of one family on the interface.
fn address_on(
    selection: &Selection,
    view: &View<'_>,
    link: &Link,
    family: Family,
    fixed: Option<IpAddr>,
) -> Result<IpAddr, InterfaceError> {
    let usable = view.usable_addresses(link.index, family);
    let (public_ip, lease) = (
        *selection.public_ips.get(family),
        *selection.lease_ips.get(family),
    );
    // To host-gw's peers it would be no next hop.
    let floats = |wanted| !selection.host_gw && view.is_on_loopback(wanted);
    let address = match (public_ip.or(lease), fixed) {
        (Some(wanted), _) if usable.contains(&wanted) || floats(wanted) => wanted,
        (_, Some(fixed)) if usable.contains(&fixed) => fixed,
        _ => *usable.first().ok_or_else(|| InterfaceError::NoAddress {
            family,
            name: link.name.clone(),
        })?,
    };
    let present = || List(usable.clone()).to_string();
    if let Some(public_ip) = public_ip.or(lease)
        && selection.host_gw
        && public_ip != address
    {
        return Err(InterfaceError::PublicIpDiffers {
            public_ip,
            name: link.name.clone(),
            present: present(),
        });
    }
    match lease.filter(|&lease| lease != address) {
        Some(lease) => Err(InterfaceError::LeaseMismatch {
            lease,
            name: link.name.clone(),
            present: present(),
        }),
        None => Ok(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mac: Some(Mac([2, 0, 0, 0, 0, u8::try_from(index).unwrap()])),
            mtu: 1500,
            up: true,
            running: true,
            loopback: name == "lo",
            ..Link::default()
        }
    }

    fn address(link: u32, net: &str) -> Address {
        let net = net.parse().unwrap();
        Address {
            link,
            net,
            global: true,
            permanent: true,
            secondary: false,
            deprecated: false,
        }
    }

    fn default_route(link: u32, to: &str) -> Route {
        Route {
            link,
            ..Route::to(to.parse().unwrap(), 254, 3)
        }
    }

    fn selection(ifaces: &[&str], public_ip: Option<&str>, lease_ip: Option<&str>) -> Selection {
        let v4 = |text: Option<&str>| PerFamily {
            v4: text.map(|text| text.parse().unwrap()),
            v6: None,
        };
        Selection {
            ifaces: ifaces.iter().map(|&name| name.to_owned()).collect(),
            patterns: Vec::new(),
            can_reach: None,
            public_ips: v4(public_ip),
            lease_ips: v4(lease_ip),
            families: PerFamily {
                v4: true,
                v6: false,
            },
            host_gw: false,
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
        let routes = [default_route(3, "0.0.0.0/0"), default_route(2, "0.0.0.0/0")];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &routes,
            reaching: None,
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
                (
                    chosen.name.as_str(),
                    chosen.addresses.v4.unwrap().to_string().as_str()
                ),
                (name, address),
                "{selection:?}"
            );
        }
        let cases = [
            (
                selection(&["nope", "10.9.9.9"], None, None),
                "provided: --iface nope, --iface 10.9.9.9: the interfaces are eth0, eth1",
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
    fn expressions_match_addresses_before_names() {
        let links = [
            link(1, "lo"),
            link(2, "eth0"),
            link(3, "eth1"),
            link(4, "wan7"),
        ];
        let addresses = [
            address(1, "10.9.0.1/32"),
            address(2, "10.0.0.1/24"),
            address(2, "fd00:199::1/64"),
            address(3, "192.168.7.1/24"),
            address(3, "192.168.7.2/24"),
            address(4, "172.16.0.4/24"),
            address(4, "fd00:200::4/64"),
        ];
        let routes = [default_route(2, "0.0.0.0/0")];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &routes,
            reaching: Some((4, Some("172.16.0.4".parse().unwrap()))),
        };
        let chosen = |ifaces: &[&str], patterns: &[&str], can_reach: Option<&str>, dual: bool| {
            let mut selection = selection(ifaces, None, None);
            selection.patterns = patterns.iter().map(|text| text.parse().unwrap()).collect();
            selection.can_reach = can_reach.map(|text| text.parse().unwrap());
            selection.families.v6 = dual;
            let view = View {
                reaching: view.reaching.filter(|_| can_reach.is_some()),
                ..view
            };
            select(&selection, view).map(|chosen| {
                let address = chosen.addresses.v4.unwrap().to_string();
                (chosen.name, address)
            })
        };
        let is = |name: &str, address: &str| Ok((name.to_owned(), address.to_owned()));
        // Unanchored, and the address that matches is the one.
        assert_eq!(
            chosen(&[], &["168.*[.]2"], None, false),
            is("eth1", "192.168.7.2")
        );
        assert_eq!(
            chosen(&[], &["^wan"], None, false),
            is("wan7", "172.16.0.4")
        );
        // What matches the name of one and the address of another; the loopback's is never taken.
        assert_eq!(chosen(&[], &["7"], None, false), is("eth1", "192.168.7.1"));
        assert!(chosen(&[], &["^10[.]9"], None, false).is_err());
        // The order: interfaces, expressions, reach.
        let (nope, eth0) = (["nope"], ["nope", "eth0"]);
        let far = Some("8.8.8.8");
        assert_eq!(chosen(&eth0, &["wan"], far, false), is("eth0", "10.0.0.1"));
        assert_eq!(
            chosen(&nope, &["^x", "eth1"], far, false),
            is("eth1", "192.168.7.1")
        );
        assert_eq!(chosen(&nope, &["^x"], far, false), is("wan7", "172.16.0.4"));
        // With both families an address of each has to match, or else the name.
        assert_eq!(
            chosen(&[], &["[.]4$|::4$"], None, true),
            is("wan7", "172.16.0.4")
        );
        assert_eq!(
            chosen(&[], &["^172|^eth0"], None, true),
            is("eth0", "10.0.0.1")
        );
        let error = chosen(&nope, &["^x"], None, false).unwrap_err().to_string();
        assert!(
            error.ends_with("--iface nope, --iface-regex ^x: the interfaces are eth0, eth1, wan7"),
            "{error}"
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
            reaching: None,
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

    #[test]
    fn both_families_share_an_interface() {
        let links = [link(1, "lo"), link(2, "eth0"), link(3, "eth1")];
        let mut temporary = address(2, "fd00:199::9/64");
        temporary.secondary = true;
        let addresses = [
            address(2, "10.0.0.1/24"),
            address(2, "fe80::1/64"),
            temporary,
            address(2, "fd00:199::1/64"),
            address(3, "10.2.0.1/24"),
            address(3, "fd00:200::1/64"),
        ];
        let (v4, v6) = ("0.0.0.0/0", "::/0");
        let same = [default_route(2, v4), default_route(2, v6)];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &same,
            reaching: None,
        };
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let dual = Selection {
            families: PerFamily { v4: true, v6: true },
            ..Selection::default()
        };
        let chosen = select(&dual, view).unwrap();
        assert_eq!(chosen.name, "eth0");
        assert_eq!(chosen.addresses.v6, ip("fd00:199::1"));
        let by_lease = Selection {
            lease_ips: PerFamily {
                v4: ip("10.2.0.1"),
                v6: ip("fd00:200::1"),
            },
            ..dual.clone()
        };
        assert_eq!(select(&by_lease, view).unwrap().name, "eth1");
        let apart = [default_route(2, v4), default_route(3, v6)];
        let error = select(
            &dual,
            View {
                routes: &apart,
                ..view
            },
        )
        .unwrap_err();
        assert!(
            error.to_string().contains("v6 default route interface eth1 must be the same with v4 default route interface eth0"),
            "{error}"
        );
        let owners = Selection {
            public_ips: PerFamily {
                v4: ip("10.0.0.1"),
                v6: ip("fd00:200::1"),
            },
            ..dual.clone()
        };
        let error = select(&owners, view).unwrap_err().to_string();
        assert!(
            error.contains("v6 interface eth1 must be the same with v4 interface eth0"),
            "{error}"
        );
        // IPv6 alone needs nothing of IPv4.
        let six = Selection {
            families: PerFamily {
                v4: false,
                v6: true,
            },
            public_ips: PerFamily {
                v4: None,
                v6: ip("fd00:200::1"),
            },
            ..Selection::default()
        };
        let chosen = select(&six, view).unwrap();
        assert_eq!((chosen.name.as_str(), chosen.addresses.v4), ("eth1", None));
        assert_eq!(chosen.addresses.v6, ip("fd00:200::1"));
    }

    #[test]
    fn a_public_ip_may_be_on_the_loopback_interface() {
        let links = [link(1, "lo"), link(2, "eth0"), link(3, "eth1")];
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(1, "10.200.0.1/32"),
            address(1, "fd00:200::1/128"),
            address(2, "10.0.0.1/31"),
            address(2, "fe80::1/64"),
            address(3, "fe80::2/64"),
        ];
        let routes = [default_route(2, "0.0.0.0/0"), default_route(2, "::/0")];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &routes,
            reaching: None,
        };
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let floating = PerFamily {
            v4: ip("10.200.0.1"),
            v6: ip("fd00:200::1"),
        };
        let by_lease = Selection {
            lease_ips: floating,
            families: PerFamily { v4: true, v6: true },
            ..Selection::default()
        };
        let by_flag = Selection {
            public_ips: floating,
            ..by_lease.clone()
        };
        // An interface without an address of its own, as between BGP neighbours.
        let by_name = Selection {
            ifaces: vec!["eth1".to_owned()],
            ..by_lease.clone()
        };
        for (selection, name) in [(&by_lease, "eth0"), (&by_flag, "eth0"), (&by_name, "eth1")] {
            let chosen = select(selection, view).unwrap();
            assert_eq!((chosen.name.as_str(), chosen.addresses), (name, floating));
        }
        let without_default = View {
            routes: &[],
            ..view
        };
        assert_eq!(
            select(&by_flag, without_default),
            Err(InterfaceError::NoDefault { lease_ip: None })
        );
        // What nobody has is nobody's, and no next hop of others.
        let nobodys = Selection {
            lease_ips: PerFamily {
                v4: ip("10.200.0.9"),
                v6: None,
            },
            ..by_lease.clone()
        };
        assert!(matches!(
            select(&nobodys, view),
            Err(InterfaceError::LeaseMismatch { .. })
        ));
        let host_gw = Selection {
            host_gw: true,
            ..by_lease
        };
        assert!(matches!(
            select(&host_gw, view),
            Err(InterfaceError::PublicIpDiffers { .. })
        ));
    }

    #[test]
    fn host_gw_needs_the_interfaces_own_address() {
        let links = [link(2, "eth0")];
        let addresses = [address(2, "10.0.0.1/24")];
        let view = View {
            links: &links,
            addresses: &addresses,
            routes: &[],
            reaching: None,
        };
        let mut behind_nat = selection(&["eth0"], Some("192.0.2.7"), None);
        behind_nat.host_gw = true;
        let error = select(&behind_nat, view).unwrap_err().to_string();
        assert!(
            error.contains("your PublicIP differs from interface IP") && error.contains("host-gw"),
            "{error}"
        );
        behind_nat.host_gw = false;
        assert!(select(&behind_nat, view).is_ok());
    }
}
