//! What a source asks the kernel: which addresses are ours, and which MAC address our tunnel device has.

use core::net::IpAddr;

use crate::family::{Family, PerFamily};
use crate::interface::{self, InterfaceError, Selection};
use crate::mac::Mac;
use crate::netconf::Backend;
use crate::netlink::{Netlink, NetlinkError};
use crate::standby::device_name;

/// The kernel, in the network namespace of the thread that asks first.
#[derive(Default)]
pub(super) struct Kernel {
    netlink: Option<Netlink>,
}

impl Kernel {
    fn netlink(&mut self) -> Result<&mut Netlink, NetlinkError> {
        match &mut self.netlink {
            Some(netlink) => Ok(netlink),
            none => Ok(none.insert(Netlink::open()?)),
        }
    }

    /// The addresses of the interface that the loop will choose too.
    pub(super) fn addresses(
        &mut self,
        selection: &Selection,
    ) -> Result<Result<PerFamily<Option<IpAddr>>, InterfaceError>, NetlinkError> {
        let netlink = self.netlink()?;
        let (links, addresses) = (netlink.links()?, netlink.addresses()?);
        let chosen = interface::look(netlink, selection, &links, &addresses)?;
        Ok(chosen.map(|underlay| underlay.addresses))
    }

    /// The MAC address of the backend's device, if there is one that is fit for a tunnel end point.
    pub(super) fn device_mac(
        &mut self,
        backend: Backend,
        family: Family,
    ) -> Result<Option<Mac>, NetlinkError> {
        let name = device_name(backend, family);
        let links = self.netlink()?.links()?;
        let device = links.iter().find(|link| Some(&link.name) == name.as_ref());
        Ok(device.and_then(|link| {
            link.mac
                .filter(|mac| super::vtep_mac_problem(*mac).is_none())
        }))
    }

    /// All our addresses.
    pub(super) fn all_addresses(&mut self) -> Result<Vec<IpAddr>, NetlinkError> {
        let addresses = self.netlink()?.addresses()?;
        Ok(addresses
            .into_iter()
            .map(|address| address.net.addr())
            .collect())
    }
}
