//! The annotations by which flannel's nodes know each other: their names, what is written into them, how they are read.
//!
//! Pure. Values are flannel's to the byte, since a flannel that comes back finds its MAC address in them by cutting the
//! text at `:"`; reading takes any JSON that says the same.

use core::net::IpAddr;

use serde_json::Value;

use crate::family::Family;
use crate::mac::Mac;
use crate::netconf::Backend;

/// The prefix of flannel's annotations unless the operator says otherwise.
pub const DEFAULT_PREFIX: &str = "flannel.alpha.coreos.com";

/// An annotation, by what follows the prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// What peers must know of the IPv4 tunnel end point, as JSON.
    BackendData,
    /// The backend's name; empty for `udp` and `alloc`.
    BackendType,
    /// What peers must know of the IPv6 tunnel end point, as JSON.
    BackendV6Data,
    /// `true` on every node that takes part.
    SubnetManager,
    /// The administrator's `--public-ip` for one node.
    NodePublicIp,
    /// The administrator's `--public-ipv6` for one node.
    NodePublicIpv6,
    /// Where tunnel packets over IPv4 go.
    PublicIp,
    /// What the administrator wants in [`Key::PublicIp`] instead (NAT).
    PublicIpOverwrite,
    /// Where tunnel packets over IPv6 go.
    PublicIpv6,
    /// What the administrator wants in [`Key::PublicIpv6`] instead.
    PublicIpv6Overwrite,
}

impl Key {
    const ALL: [Self; 10] = [
        Self::BackendData,
        Self::BackendType,
        Self::BackendV6Data,
        Self::SubnetManager,
        Self::NodePublicIp,
        Self::NodePublicIpv6,
        Self::PublicIp,
        Self::PublicIpOverwrite,
        Self::PublicIpv6,
        Self::PublicIpv6Overwrite,
    ];

    fn suffix(self) -> &'static str {
        match self {
            Self::BackendData => "backend-data",
            Self::BackendType => "backend-type",
            Self::BackendV6Data => "backend-v6-data",
            Self::SubnetManager => "kube-subnet-manager",
            Self::NodePublicIp => "node-public-ip",
            Self::NodePublicIpv6 => "node-public-ipv6",
            Self::PublicIp => "public-ip",
            Self::PublicIpOverwrite => "public-ip-overwrite",
            Self::PublicIpv6 => "public-ipv6",
            Self::PublicIpv6Overwrite => "public-ipv6-overwrite",
        }
    }

    /// The backend's data of a family.
    pub fn backend_data(family: Family) -> Self {
        match family {
            Family::V4 => Self::BackendData,
            Family::V6 => Self::BackendV6Data,
        }
    }

    /// The public IP of a family.
    pub fn public_ip(family: Family) -> Self {
        match family {
            Family::V4 => Self::PublicIp,
            Family::V6 => Self::PublicIpv6,
        }
    }

    /// What overrides the public IP of a family for others.
    pub fn overwrite(family: Family) -> Self {
        match family {
            Family::V4 => Self::PublicIpOverwrite,
            Family::V6 => Self::PublicIpv6Overwrite,
        }
    }

    /// What stands for `--public-ip` or `--public-ipv6`.
    pub fn node_public_ip(family: Family) -> Self {
        match family {
            Family::V4 => Self::NodePublicIp,
            Family::V6 => Self::NodePublicIpv6,
        }
    }
}

/// Why `--kube-annotation-prefix` cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// More than one slash.
    #[error("subnet/kube: prefix can contain at most single slash")]
    Slashes,
    /// Not a name that Kubernetes takes.
    #[error(
        "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*, like flannel.alpha.coreos.com or example.com/flannel"
    )]
    Form,
}

/// What all names of annotations begin with; ends in `/` or `-`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Completes and checks a prefix as flannel does.
    pub fn new(text: &str) -> Result<Self, PrefixError> {
        let mut prefix = text.to_owned();
        match prefix.matches('/').count() {
            0 => prefix.push('/'),
            1 => {}
            _ => return Err(PrefixError::Slashes),
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        let is_label = |label: &str| {
            let allowed = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte)
            };
            !label.is_empty() && label.bytes().all(allowed)
        };
        let (domain, rest) = prefix.split_once('/').ok_or(PrefixError::Form)?;
        let is_domain = domain.contains('.') && domain.split('.').all(is_label);
        let is_rest = rest.is_empty() || rest.strip_suffix('-').is_some_and(is_label);
        if is_domain && is_rest {
            Ok(Self(prefix))
        } else {
            Err(PrefixError::Form)
        }
    }

    /// The whole name of an annotation.
    pub fn name(&self, key: Key) -> String {
        format!("{}{}", self.0, key.suffix())
    }

    /// The annotation with this name.
    pub fn key(&self, name: &str) -> Option<Key> {
        let suffix = name.strip_prefix(&self.0)?;
        Key::ALL.into_iter().find(|key| key.suffix() == suffix)
    }
}

/// What flannel calls the backend in the annotation.
pub fn backend_type(backend: Backend) -> &'static str {
    match backend {
        Backend::Vxlan(_) | Backend::HostGw | Backend::Ipip { .. } => backend.name(),
        Backend::Udp { .. } | Backend::Alloc => "",
    }
}

/// The text of `backend-data` or `backend-v6-data`.
pub fn backend_data(backend: Backend, vtep_mac: Option<Mac>) -> String {
    match (backend.vxlan(), vtep_mac) {
        (Some(vxlan), Some(mac)) => format!(r#"{{"VNI":{},"VtepMAC":"{mac}"}}"#, vxlan.vni),
        _ => "null".to_owned(),
    }
}

/// The MAC address in `backend-data`, or what is wrong with the text. Keys in any case, order and spacing will do.
pub fn vtep_mac(text: &str) -> Result<Mac, String> {
    const LIKE: &str = r#"write it like {"VNI":1,"VtepMAC":"02:52:53:00:00:01"}"#;
    let value: Value =
        serde_json::from_str(text).map_err(|error| format!("is not JSON ({error}): {LIKE}"))?;
    let found = value.as_object().and_then(|object| {
        let mut entries = object.iter().rev();
        entries.find_map(|(key, value)| key.eq_ignore_ascii_case("VtepMAC").then_some(value))
    });
    let mac = found
        .and_then(Value::as_str)
        .ok_or_else(|| format!("has no \"VtepMAC\": {LIKE}"))?;
    let mac: Mac = mac
        .parse()
        .map_err(|error| format!("has the VtepMAC {mac:?}: {error}"))?;
    match crate::lease::vtep_mac_problem(mac) {
        None => Ok(mac),
        Some(problem) => Err(format!("has the VtepMAC {mac}, which is {problem}: {LIKE}")),
    }
}

/// A public IP of a family, or what is wrong with the text.
pub fn public_ip(text: &str, family: Family) -> Result<IpAddr, String> {
    let address: Option<IpAddr> = text.parse().ok();
    let address = address
        .filter(|address| Family::of(*address) == family)
        .ok_or_else(|| format!("is not an {family} address: write the node's underlay address"))?;
    match crate::lease::public_ip_problem(address) {
        None => Ok(address),
        Some(problem) => Err(problem.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netconf::NetConf;
    use proptest::prelude::*;

    #[test]
    fn a_prefix_is_completed_as_flannel_does() {
        for (text, name) in [
            (DEFAULT_PREFIX, "flannel.alpha.coreos.com/backend-type"),
            ("org.com/", "org.com/backend-type"),
            ("org.com/x", "org.com/x-backend-type"),
            ("org.com/x-", "org.com/x-backend-type"),
            ("a.b-c.d_e/f_1", "a.b-c.d_e/f_1-backend-type"),
        ] {
            let prefix = Prefix::new(text).expect(text);
            assert_eq!(prefix.name(Key::BackendType), name);
            assert_eq!(prefix.key(name), Some(Key::BackendType));
            assert_eq!(prefix.key(&format!("{name}x")), None);
        }
        for text in ["org.com/a/b", "//"] {
            assert_eq!(Prefix::new(text), Err(PrefixError::Slashes), "{text}");
        }
        for text in [
            "",
            "org",
            "org/",
            "Org.com",
            "org.com/X",
            "org.com/-",
            ".com/",
            "org..com",
            "org.com/a.b",
        ] {
            assert_eq!(Prefix::new(text), Err(PrefixError::Form), "{text}");
        }
    }

    fn backend(text: &str) -> Backend {
        let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{text}}}"#);
        NetConf::parse(text.as_bytes()).unwrap().backend
    }

    #[test]
    fn values_are_flannels_to_the_byte() {
        let mac = Some("52:8f:9c:a4:c4:55".parse().unwrap());
        for (text, kind, data) in [
            (
                r#"{"Type":"vxlan"}"#,
                "vxlan",
                r#"{"VNI":1,"VtepMAC":"52:8f:9c:a4:c4:55"}"#,
            ),
            (
                r#"{"Type":"vxlan","VNI":4096}"#,
                "vxlan",
                r#"{"VNI":4096,"VtepMAC":"52:8f:9c:a4:c4:55"}"#,
            ),
            (r#"{"Type":"host-gw"}"#, "host-gw", "null"),
            (r#"{"Type":"ipip"}"#, "ipip", "null"),
            (r#"{"Type":"udp"}"#, "", "null"),
            (r#"{"Type":"alloc"}"#, "", "null"),
        ] {
            let backend = backend(text);
            assert_eq!(backend_type(backend), kind);
            assert_eq!(
                backend_data(backend, mac.filter(|_| backend.vxlan().is_some())),
                data
            );
        }
    }

    #[test]
    fn a_mac_is_found_in_any_json_that_has_it() {
        let mac = Ok("c6:d2:32:6f:8f:44".parse().unwrap());
        for text in [
            r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
            r#"{"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
            r#" { "vtepmac" : "C6-D2-32-6F-8F-44", "VNI" : "x", "more": [1] } "#,
        ] {
            assert_eq!(vtep_mac(text), mac, "{text}");
        }
        for (text, wanted) in [
            ("", "not JSON"),
            ("null", "no \"VtepMAC\""),
            ("[]", "no \"VtepMAC\""),
            (r#"{"VNI":1}"#, "no \"VtepMAC\""),
            (r#"{"VtepMAC":7}"#, "no \"VtepMAC\""),
            (r#"{"VtepMAC":"c6:d2"}"#, "not an Ethernet address"),
            (r#"{"VtepMAC":"00:00:00:00:00:00"}"#, "zero"),
            (r#"{"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#, "group address"),
        ] {
            let error = vtep_mac(text).expect_err(text);
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_annotation_makes_it_panic(text in ".{0,60}", mac in "[0-9a-fé:-]{0,20}", ip in "[0-9a-f.:%]{0,40}") {
            let _ = vtep_mac(&text);
            let _ = vtep_mac(&serde_json::json!({"VNI": text, "VtepMAC": mac}).to_string());
            for family in Family::ALL {
                let _ = public_ip(&ip, family);
            }
            let _ = Prefix::new(&text);
        }

        #[test]
        fn what_is_written_is_read(bytes: [u8; 6], vni in 1u32..10_000) {
            let mac = Mac([bytes[0] & 0xfe | 2, bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]]);
            let backend = backend(&format!(r#"{{"Type":"vxlan","VNI":{vni}}}"#));
            prop_assert_eq!(vtep_mac(&backend_data(backend, Some(mac))), Ok(mac));
        }
    }
}
