//! Foo-over-UDP receive ports: what makes the kernel take `udp` backend packets out of their UDP datagrams.
//!
//! The kernel does not load the module on demand, unlike those of the tunnel devices: somebody has to run `modprobe`.
//!
//! They are configured by generic netlink, for which the route netlink client has no messages; the few that are needed
//! are written here by hand (include/uapi/linux/fou.h, genetlink.h).

use std::io;
use std::process::Command;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_GENERIC;

use crate::netlink::message::{attributes, u16_at};
use crate::netlink::{NetlinkError, Refusal, Talk};

/// Number of the generic netlink controller, which knows the others' numbers.
const CONTROLLER: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const FOU_CMD_ADD: u8 = 1;
const FOU_CMD_DEL: u8 = 2;
const FOU_CMD_GET: u8 = 3;
const FOU_ATTR_PORT: u16 = 1;
const FOU_ATTR_AF: u16 = 2;
const FOU_ATTR_IPPROTO: u16 = 3;
const FOU_ATTR_TYPE: u16 = 4;
const FOU_ENCAP_DIRECT: u8 = 1;
/// IPv4 in the payload.
const IPPROTO_IPIP: u8 = 4;
const AF_INET: u8 = 2;

/// Why a receive port cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FouError {
    /// The kernel has no foo-over-UDP.
    #[error("standby missing: kernel lacks fou; load the module fou (CONFIG_NET_FOU){modprobe}")]
    Missing {
        /// What came of loading it, if that was tried: a clause to end the sentence with.
        modprobe: String,
    },
    /// Talking to the kernel failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel refuses.
    #[error("standby: receive UDP port {port}: {refusal}{hint}")]
    Refused {
        /// The port.
        port: u16,
        /// The kernel's answer.
        refusal: Refusal,
        /// What to do about it.
        hint: &'static str,
    },
}

/// Has `modprobe` load the module; what came of it, as a clause, unless it is loaded.
pub fn load_module() -> Result<(), String> {
    // A service's PATH may lack the directory.
    for program in ["modprobe", "/usr/sbin/modprobe"] {
        return match Command::new(program).arg("fou").output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(format!(": running modprobe: {error}")),
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let errors = String::from_utf8_lossy(&output.stderr);
                let reason = errors.lines().next().unwrap_or("no reason given");
                Err(format!(": {}", reason.trim()))
            }
        };
    }
    Err(": there is no program modprobe here to do it".to_owned())
}

/// A connection to the kernel's foo-over-UDP, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Fou {
    talk: Talk,
    family: u16,
}

fn attribute(kind: u16, value: &[u8], into: &mut Vec<u8>) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    into.extend(length.to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

/// struct genlmsghdr: command, version, two bytes reserved.
fn request(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

fn port_request(command: u8, port: u16) -> Vec<u8> {
    let mut payload = request(command);
    attribute(FOU_ATTR_PORT, &port.to_be_bytes(), &mut payload);
    attribute(FOU_ATTR_AF, &[AF_INET], &mut payload);
    if command == FOU_CMD_ADD {
        attribute(FOU_ATTR_IPPROTO, &[IPPROTO_IPIP], &mut payload);
        attribute(FOU_ATTR_TYPE, &[FOU_ENCAP_DIRECT], &mut payload);
    }
    payload
}

/// Port and protocol of one entry of a listing.
fn listed(payload: &[u8]) -> Option<(u16, u8)> {
    let (mut port, mut protocol) = (None, None);
    for (kind, value) in attributes(payload.get(4..)?) {
        match kind {
            FOU_ATTR_PORT => port = value.try_into().ok().map(u16::from_be_bytes),
            FOU_ATTR_IPPROTO => protocol = value.first().copied(),
            _ => {}
        }
    }
    Some((port?, protocol?))
}

impl Fou {
    /// Opens a connection, if the module is there.
    pub fn open() -> Result<Self, FouError> {
        let mut talk = Talk::open(NETLINK_GENERIC)?;
        let mut payload = request(CTRL_CMD_GETFAMILY);
        attribute(CTRL_ATTR_FAMILY_NAME, b"fou\0", &mut payload);
        let mut family = None;
        let refusal = talk.ask(CONTROLLER, NLM_F_REQUEST | NLM_F_ACK, &payload, |payload| {
            let found = attributes(payload.get(4..).unwrap_or_default())
                .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID);
            family = family.or(found.and_then(|(_, value)| u16_at(value, 0)));
        })?;
        match (refusal, family) {
            (None, Some(family)) => Ok(Self { talk, family }),
            (Some(refusal), _) if refusal.errno != libc::ENOENT => Err(NetlinkError::Dump {
                what: "the fou family",
                refusal,
            }
            .into()),
            _ => Err(FouError::Missing {
                modprobe: String::new(),
            }),
        }
    }

    /// Whether IPv4 is received on the port.
    fn has(&mut self, port: u16) -> Result<bool, FouError> {
        let mut found = false;
        let payload = request(FOU_CMD_GET);
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let refusal = self.talk.ask(self.family, flags, &payload, |payload| {
            found |= listed(payload) == Some((port, IPPROTO_IPIP));
        })?;
        match refusal {
            Some(refusal) => Err(NetlinkError::Dump {
                what: "fou ports",
                refusal,
            }
            .into()),
            None => Ok(found),
        }
    }

    fn change(&mut self, command: u8, port: u16) -> Result<Option<Refusal>, FouError> {
        let payload = port_request(command, port);
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        Ok(self.talk.ask(self.family, flags, &payload, |_| {})?)
    }

    /// Has IPv4 received on the port; whether that took a change.
    pub fn ensure(&mut self, port: u16) -> Result<bool, FouError> {
        if self.has(port)? {
            return Ok(false);
        }
        match self.change(FOU_CMD_ADD, port)? {
            None => Ok(true),
            Some(refusal) => Err(FouError::Refused {
                port,
                hint: match refusal.errno {
                    libc::EADDRINUSE => {
                        ": another program has the port; stop flanneld, or change Backend.Port"
                    }
                    _ => "",
                },
                refusal,
            }),
        }
    }

    /// Gives the port back; whether it was ours to give.
    pub fn remove(&mut self, port: u16) -> Result<bool, FouError> {
        if !self.has(port)? {
            return Ok(false);
        }
        match self.change(FOU_CMD_DEL, port)? {
            None => Ok(true),
            Some(refusal) => Err(FouError::Refused {
                port,
                refusal,
                hint: "",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_kernel_reads() {
        #[rustfmt::skip]
        let add = [
            1, 1, 0, 0,
            // Port 8285 in network order, IPv4, protocol 4, direct.
            6, 0, 1, 0, 0x20, 0x5d, 0, 0,
            5, 0, 2, 0, 2, 0, 0, 0,
            5, 0, 3, 0, 4, 0, 0, 0,
            5, 0, 4, 0, 1, 0, 0, 0,
        ];
        assert_eq!(port_request(FOU_CMD_ADD, 8285), add);
        assert_eq!(port_request(FOU_CMD_DEL, 8285)[4..], add[4..20]);
        assert_eq!(listed(&add), Some((8285, 4)));
        assert_eq!(listed(&add[..10]), None);
    }
}
