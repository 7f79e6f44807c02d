//! The two address families: nearly everything exists once for each, and they never mix.

use core::fmt;
use core::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// The family of a prefix.
    pub fn of_net(net: IpNet) -> Self {
        Self::of(net.addr())
    }

    /// Length of the prefix that is one address.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// Its number in a forwarding table's lease records.
    pub fn number(self) -> u8 {
        match self {
            Self::V4 => ripstop_fib::FAMILY_IPV4,
            Self::V6 => ripstop_fib::FAMILY_IPV6,
        }
    }

    pub(crate) fn netlink(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }

    pub(crate) fn from_netlink(number: u8) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|family| u8::from(family.netlink()) == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One value for each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct PerFamily<T> {
    /// IPv4's.
    pub v4: T,
    /// IPv6's.
    pub v6: T,
}

impl<T> PerFamily<T> {
    /// The value of one family.
    pub fn get(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The value of one family, to change it.
    pub fn get_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Both, IPv4's first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL
            .into_iter()
            .map(|family| (family, self.get(family)))
    }
}

/// The prefix that holds one address alone.
pub fn host(address: IpAddr) -> IpNet {
    IpNet::new_assert(address, Family::of(address).bits())
}
