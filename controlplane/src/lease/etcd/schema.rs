//! The keys and values by which flannel's nodes know each other in etcd: how they are written, how they are read.
//!
//! ```text
//!   <prefix>/config                                      net-conf.json
//!   <prefix>/subnets/10.5.52.0-24                        a node's lease; IPv4 alone
//!   <prefix>/subnets/10.12.13.0-24&fd00:12:13::-56       both families
//!   <prefix>/subnets/0.0.0.0-0&fd00:12:13::-56           IPv6 alone, in the form that flannel's reader takes
//! ```
//!
//! Pure. What is written is flannel's to the byte; what is read may be anything that flannel takes for the same.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::Serialize;
use serde_json::Value;

use crate::family::{Family, PerFamily};
use crate::lease::kube::annotations;
use crate::lease::public_ip_problem;
use crate::mac::Mac;
use crate::netconf::Backend;

/// The prefix of flannel's keys unless the operator says otherwise.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// Where the keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// With the slash that follows, if there is anything before it.
    base: String,
}

impl Keys {
    /// Keys below `--etcd-prefix`, which is cleaned as Go cleans paths: flannel joins the names of its keys that way.
    pub fn new(prefix: &str) -> Self {
        let mut parts: Vec<&str> = Vec::new();
        for part in prefix.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        let mut base = if prefix.starts_with('/') { "/" } else { "" }.to_owned();
        for part in parts {
            base.push_str(part);
            base.push('/');
        }
        Self { base }
    }

    /// Where the network configuration is.
    pub fn config(&self) -> String {
        format!("{}config", self.base)
    }

    /// What the keys of all leases begin with.
    pub fn subnets(&self) -> String {
        format!("{}subnets/", self.base)
    }

    /// The key of a lease.
    pub fn lease(&self, subnets: &Subnets) -> String {
        format!("{}{}", self.subnets(), key_name(subnets))
    }

    /// What all keys begin with that claim the same first subnet: no second may come to be beside a lease's own.
    pub fn rivals(&self, subnets: &Subnets) -> String {
        let key = self.lease(subnets);
        match (subnets.v4, key.rsplit_once('-')) {
            (Some(net), _) => format!("{}{}-", self.subnets(), net.network()),
            (None, Some((first, _))) => format!("{first}-"),
            (None, None) => key,
        }
    }
}

/// The subnets of a lease.
pub type Subnets = PerFamily<Option<IpNet>>;

/// The last part of a lease's key.
pub fn key_name(subnets: &Subnets) -> String {
    let part = |net: IpNet| format!("{}-{}", net.network(), net.prefix_len());
    let first = subnets.v4.map_or_else(|| "0.0.0.0-0".to_owned(), part);
    match subnets.v6 {
        Some(second) => format!("{first}&{}", part(second)),
        None => first,
    }
}

/// The subnets that the last part of a key names. Like flannel's reader it looks at the end only, and takes host bits.
pub fn parse_key_name(name: &str) -> Result<Subnets, String> {
    const LIKE: &str =
        "is not a subnet: its last part is like 10.5.52.0-24, or 10.5.52.0-24&fd00:5:52::-64";
    let wrong = || LIKE.to_owned();
    let (first, second) = match name.split_once('&') {
        Some((first, second)) => (first, Some(second)),
        None => (name, None),
    };
    let net = |text: &str, max: u8, address: fn(&str) -> Option<IpAddr>| {
        let (text, len) = text.rsplit_once('-')?;
        let digits = !len.is_empty() && len.bytes().all(|byte| byte.is_ascii_digit());
        let len = len.parse().ok().filter(|len| digits && *len <= max)?;
        IpNet::new(address(text)?, len).ok()
    };
    let first = net(first, 31, ipv4).ok_or_else(wrong)?;
    let v6 = match second {
        Some(second) => Some(net(second, 127, ipv6).ok_or_else(wrong)?.trunc()),
        None => None,
    };
    let nothing = first.prefix_len() == 0;
    if nothing && v6.is_none() {
        return Err(wrong());
    }
    Ok(PerFamily {
        v4: (!nothing).then(|| first.trunc()),
        v6,
    })
}

/// The address at the end of a text: its last four numbers.
fn ipv4(text: &str) -> Option<IpAddr> {
    let is_part = |c: char| c.is_ascii_digit() || c == '.';
    let start = text.rfind(|c| !is_part(c)).map_or(0, |at| {
        at + text
            .get(at..)
            .and_then(|rest| rest.chars().next())
            .map_or(1, char::len_utf8)
    });
    let mut parts: Vec<&str> = text.get(start..)?.rsplitn(5, '.').collect();
    parts.truncate(4);
    parts.reverse();
    parts.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
}

fn ipv6(text: &str) -> Option<IpAddr> {
    let is_part = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte) || byte == b':';
    let parsed = text.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    parsed.filter(|_| text.bytes().all(is_part))
}

/// What a node writes about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Where tunnel packets for it go.
    pub public_ips: PerFamily<Option<IpAddr>>,
    /// Its tunnel end points; VXLAN alone has them.
    pub vtep_macs: PerFamily<Option<Mac>>,
}

impl Attributes {
    /// The value, as flannel writes it.
    pub fn render(&self, backend: Backend) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Attrs {
            #[serde(rename = "PublicIP")]
            public_ip: IpAddr,
            #[serde(rename = "PublicIPv6")]
            public_ipv6: Option<IpAddr>,
            #[serde(skip_serializing_if = "str::is_empty")]
            backend_type: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            backend_data: Option<Vxlan>,
            #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
            backend_v6_data: Option<Vxlan>,
        }
        #[derive(Serialize)]
        struct Vxlan {
            #[serde(rename = "VNI")]
            vni: u32,
            #[serde(rename = "VtepMAC")]
            vtep_mac: String,
        }
        let data = |family: Family| {
            let (vxlan, mac) = (backend.vxlan()?, (*self.vtep_macs.get(family))?);
            Some(Vxlan {
                vni: vxlan.vni,
                vtep_mac: mac.to_string(),
            })
        };
        let attrs = Attrs {
            public_ip: self.public_ips.v4.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            public_ipv6: self.public_ips.v6,
            backend_type: annotations::backend_type(backend),
            backend_data: data(Family::V4),
            backend_v6_data: data(Family::V6),
        };
        // Texts and numbers alone, which cannot fail.
        serde_json::to_string(&attrs).unwrap_or_default()
    }
}

/// What another node has written, as far as it makes sense by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Where tunnel packets for it go; none where it says nothing.
    pub public_ips: PerFamily<Option<IpAddr>>,
    /// Its backend; empty for `udp`, `alloc` and reservations.
    pub backend_type: String,
    /// Its tunnel end points, each a MAC address or what is wrong with it; none where it says nothing.
    pub vtep_macs: PerFamily<Option<Result<Mac, String>>>,
}

impl Record {
    /// Reads a value. Keys in any case, order and spacing will do, and what is not known is passed over.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        const LIKE: &str = r#"its value is like {"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:52:53:00:00:01"}}"#;
        let value: BTreeMap<String, Value> = serde_json::from_slice(bytes)
            .map_err(|error| format!("is not a JSON object ({error}): {LIKE}"))?;
        // As in Go, the exact name before one that differs in case.
        let field = |name: &str| {
            let other = || value.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            let exact = value.get(name).or_else(|| other().map(|(_, value)| value));
            exact.filter(|value| !value.is_null())
        };
        let mut record = Self::default();
        for (family, name) in [(Family::V4, "PublicIP"), (Family::V6, "PublicIPv6")] {
            let Some(value) = field(name) else { continue };
            let address: Option<IpAddr> = value.as_str().and_then(|text| text.parse().ok());
            let address = address
                .filter(|address| Family::of(*address) == family)
                .ok_or_else(|| {
                    format!("has the {name} {value}, which is no {family} address: {LIKE}")
                })?;
            // Flannel's way to say that there is none.
            if address.is_unspecified() {
                continue;
            }
            if let Some(problem) = public_ip_problem(address) {
                return Err(format!("has the {name} {address}, which {problem}"));
            }
            *record.public_ips.get_mut(family) = Some(address);
        }
        if let Some(kind) = field("BackendType") {
            let kind = kind.as_str();
            kind.ok_or_else(|| format!("has a BackendType that is no text: {LIKE}"))?
                .clone_into(&mut record.backend_type);
        }
        for (family, name) in [(Family::V4, "BackendData"), (Family::V6, "BackendV6Data")] {
            *record.vtep_macs.get_mut(family) = field(name).map(|data| {
                annotations::vtep_mac(&data.to_string())
                    .map_err(|problem| format!("{name} {problem}"))
            });
        }
        Ok(record)
    }

    /// A VTEP MAC address, if it is one.
    pub fn mac(&self, family: Family) -> Option<Mac> {
        self.vtep_macs.get(family).as_ref()?.as_ref().ok().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netconf::NetConf;
    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    fn backend(text: &str) -> Backend {
        let text = format!(r#"{{"Network":"10.5.0.0/16","Backend":{text}}}"#);
        NetConf::parse(text.as_bytes()).unwrap().backend
    }

    fn mac(text: &str) -> Option<Mac> {
        Some(text.parse().unwrap())
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn of(v4: &str, v6: &str) -> Subnets {
        let net = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
        PerFamily {
            v4: net(v4),
            v6: net(v6),
        }
    }

    #[test]
    fn keys_are_flannels() {
        let keys = Keys::new(DEFAULT_PREFIX);
        assert_eq!(keys.config(), "/coreos.com/network/config");
        for (subnets, name) in [
            (of("10.5.52.0/24", ""), "10.5.52.0-24"),
            (
                of("10.12.13.0/24", "fd00:12:13::/56"),
                "10.12.13.0-24&fd00:12:13::-56",
            ),
            (of("", "fd00:0:0:1::/64"), "0.0.0.0-0&fd00:0:0:1::-64"),
        ] {
            assert_eq!(
                keys.lease(&subnets),
                format!("/coreos.com/network/subnets/{name}")
            );
            assert_eq!(parse_key_name(name), Ok(subnets));
        }
        for (prefix, config) in [
            ("/a//b/", "/a/b/config"),
            ("a/./b/../c", "a/c/config"),
            ("/", "/config"),
            ("", "config"),
        ] {
            assert_eq!(Keys::new(prefix).config(), config, "{prefix}");
        }
        assert_eq!(
            keys.rivals(&of("10.12.13.0/24", "fd00:12:13::/56")),
            "/coreos.com/network/subnets/10.12.13.0-"
        );
        assert_eq!(
            keys.rivals(&of("", "fd00:12:13::/56")),
            "/coreos.com/network/subnets/0.0.0.0-0&fd00:12:13::-"
        );
    }

    #[test]
    fn keys_are_read_as_flannel_reads_them() {
        for (name, subnets) in [
            ("10.5.52.7-24", of("10.5.52.0/24", "")),
            ("x10.5.52.0-24", of("10.5.52.0/24", "")),
            ("1.10.5.52.0-24", of("10.5.52.0/24", "")),
            ("ü10.5.52.0-024", of("10.5.52.0/24", "")),
            ("0.0.0.0-0&fd00::-127", of("", "fd00::/127")),
        ] {
            assert_eq!(parse_key_name(name), Ok(subnets), "{name}");
        }
        for name in [
            "",
            "-",
            "&",
            "10.5.52.0",
            "10.5.52.0-",
            "10.5.52.0-32",
            "10.5.52-24",
            "10.5.52.256-24",
            "10.5.52.0-24 ",
            "10.5.52.0-24&",
            "10.5.52.0-24&fd00::-128",
            "10.5.52.0-24&FD00::-64",
            "10.5.52.0-24&10.0.0.0-8",
            "10.5.52.0-+4",
            "0.0.0.0-0",
            "fd00::-64",
            "10.5.52.0-24&fd00::-56&",
        ] {
            assert!(parse_key_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn values_are_flannels() {
        let both = PerFamily {
            v4: mac("c6:d2:32:6f:8f:44"),
            v6: mac("02:00:00:00:00:06"),
        };
        let value = |v4: Option<IpAddr>, v6: Option<IpAddr>, kind: &str| {
            let mut macs = both;
            macs.v4 = macs.v4.filter(|_| v4.is_some());
            macs.v6 = macs.v6.filter(|_| v6.is_some());
            let attributes = Attributes {
                public_ips: PerFamily { v4, v6 },
                vtep_macs: macs,
            };
            attributes.render(backend(kind))
        };
        let (four, six) = (ip("192.168.64.3"), ip("fd00:199::3"));
        for (given, expected) in [
            (
                value(four, None, r#"{"Type":"vxlan"}"#),
                r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
            ),
            (
                value(four, six, r#"{"Type":"vxlan","VNI":7}"#),
                r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00:199::3","BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":7,"VtepMAC":"02:00:00:00:00:06"}}"#,
            ),
            (
                value(None, six, r#"{"Type":"vxlan"}"#),
                r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:199::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:06"}}"#,
            ),
            (
                value(four, None, r#"{"Type":"host-gw"}"#),
                r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}"#,
            ),
            (
                value(four, None, r#"{"Type":"udp"}"#),
                r#"{"PublicIP":"192.168.64.3","PublicIPv6":null}"#,
            ),
        ] {
            assert_eq!(given, expected);
            let read = Record::parse(given.as_bytes()).unwrap();
            assert_eq!(Record::parse(&read_again(&given)), Ok(read));
        }
    }

    /// The same with other spacing, order and case.
    fn read_again(value: &str) -> Vec<u8> {
        let value: BTreeMap<String, Value> = serde_json::from_str(value).unwrap();
        let value: BTreeMap<_, _> = value
            .iter()
            .map(|(key, value)| (key.to_lowercase(), value))
            .collect();
        serde_json::to_vec_pretty(&value).unwrap()
    }

    #[test]
    fn what_a_value_lacks_is_none_and_what_is_wrong_is_said() {
        let reservation = Record::parse(br#"{"PublicIP":"10.37.7.195"}"#).unwrap();
        assert_eq!(reservation.public_ips.v4, ip("10.37.7.195"));
        assert_eq!(
            (reservation.mac(Family::V4), &*reservation.backend_type),
            (None, "")
        );
        let record = Record::parse(
            br#"{"PublicIP":"10.37.7.195","BackendType":"vxlan","BackendData":{"VtepMAC":"x"}}"#,
        )
        .unwrap();
        assert!(matches!(record.vtep_macs.v4, Some(Err(_))), "{record:?}");
        for (value, expected) in [
            ("", "is not a JSON object"),
            ("[]", "is not a JSON object"),
            (r#"{"PublicIP":"10.0.0.1"} x"#, "is not a JSON object"),
            (r#"{"PublicIP":"ten"}"#, "no IPv4 address"),
            (r#"{"PublicIP":7}"#, "no IPv4 address"),
            (
                r#"{"PublicIP":"127.0.0.1"}"#,
                "cannot be the address of a node",
            ),
            (
                r#"{"PublicIP":"10.0.0.1","PublicIPv6":"10.0.0.1"}"#,
                "no IPv6 address",
            ),
            (r#"{"PublicIP":"10.0.0.1","BackendType":[]}"#, "no text"),
        ] {
            let problem = Record::parse(value.as_bytes()).unwrap_err();
            assert!(problem.contains(expected), "{value}: {problem}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(v4: Option<(u32, u8)>, v6: Option<(u128, u8)>) {
            let v4 = v4.map(|(bits, len)| Ipv4Net::new(Ipv4Addr::from_bits(bits), 1 + len % 31).unwrap().trunc());
            let v6 = v6.map(|(bits, len)| Ipv6Net::new(Ipv6Addr::from_bits(bits), len % 128).unwrap().trunc());
            // `::ffff:1.2.3.4` is no form of a prefix.
            prop_assume!(v6.is_none_or(|net| net.addr().to_ipv4_mapped().is_none()) && (v4.is_some() || v6.is_some()));
            let subnets = PerFamily { v4: v4.map(IpNet::V4), v6: v6.map(IpNet::V6) };
            prop_assert_eq!(parse_key_name(&key_name(&subnets)), Ok(subnets));
        }

        #[test]
        fn no_text_makes_it_panic(name: String, value: Vec<u8>, at in 0..200usize) {
            let _any = (parse_key_name(&name), Record::parse(&value));
            let mut golden = br#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#.to_vec();
            golden.truncate(at);
            golden.extend(&value);
            let _any = Record::parse(&golden);
        }
    }
}
