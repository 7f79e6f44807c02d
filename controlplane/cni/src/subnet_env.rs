//! `subnet.env`: what a node's CNI plugin has to know of the network.
//!
//! ```text
//! FLANNEL_NETWORK=10.244.0.0/16
//! FLANNEL_SUBNET=10.244.1.1/24            the FIRST usable address of the subnet
//! FLANNEL_IPV6_NETWORK=fd10:244::/48
//! FLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64
//! FLANNEL_MTU=1450
//! FLANNEL_IPMASQ=true                     the daemon masquerades, so the bridge need not
//! ```
//!
//! A family that is off has no lines. Scripts source the file, so order, names and form are fixed.

use core::fmt::{Display, Write as _};
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::file;

/// Where flannel and everything around it looks for the file.
pub const DEFAULT_PATH: &str = "/run/flannel/subnet.env";

/// The content of `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SubnetEnv {
    /// IPv4 networks of all pods; flanneld writes one. None without IPv4.
    pub networks: Vec<Ipv4Net>,
    /// This node's IPv4 pod subnet, as a network.
    pub subnet: Option<Ipv4Net>,
    /// IPv6 networks of all pods.
    pub networks_v6: Vec<Ipv6Net>,
    /// This node's IPv6 pod subnet, as a network.
    pub subnet_v6: Option<Ipv6Net>,
    /// MTU of pod interfaces, in bytes.
    pub mtu: u32,
    /// Whether the daemon masquerades what leaves the network.
    pub ip_masq: bool,
}

/// What is wrong with the text of a `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Keys without which the file is of no use; of two families, one suffices.
    #[error("is missing {}", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// A line that cannot be used.
    #[error("line {line}: {key}{problem}")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// The key on it.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Why a `subnet.env` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there: the node is not ready for pods.
    #[error("open {}: no such file or directory", .0.display())]
    Absent(PathBuf),
    /// It cannot be read.
    #[error("read {}: {error}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        error: io::Error,
    },
    /// Its content is of no use.
    #[error("{} {error}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: ParseError,
    },
}

impl SubnetEnv {
    /// The text of the file.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut line = |key: &str, value: &dyn Display| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "FLANNEL_{key}={value}");
        };
        if !self.networks.is_empty() {
            line("NETWORK", &joined(self.networks.iter().map(Ipv4Net::trunc)));
        }
        if let Some(subnet) = self.subnet {
            let first = Ipv4Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            line("SUBNET", &format_args!("{first}/{}", subnet.prefix_len()));
        }
        if !self.networks_v6.is_empty() {
            let networks = self.networks_v6.iter().map(Ipv6Net::trunc);
            line("IPV6_NETWORK", &joined(networks));
        }
        if let Some(subnet) = self.subnet_v6 {
            let first = Ipv6Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            line(
                "IPV6_SUBNET",
                &format_args!("{first}/{}", subnet.prefix_len()),
            );
        }
        line("MTU", &self.mtu);
        line("IPMASQ", &self.ip_masq);
        text
    }

    /// Reads the text of a file as flannel's plugin does: lines without a known key are passed over, networks may be
    /// lists, the last line of a key counts, and `FLANNEL_IPMASQ` is true if it is exactly `true`.
    ///
    /// # Errors
    /// A known key without a value that can be used, or keys that are missing.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let (mut env, mut mtu, mut ip_masq) = (Self::default(), None, None);
        for (number, line) in (1..).zip(text.split('\n')) {
            let line = line.strip_suffix('\r').unwrap_or(line);
            let (key, value) = match line.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (line, None),
            };
            let wrong = |problem: String| ParseError::Line {
                line: number,
                key: key.to_owned(),
                problem,
            };
            let value = || value.ok_or_else(|| wrong(" has no value: write KEY=VALUE".to_owned()));
            match key {
                "FLANNEL_NETWORK" => env.networks = networks(value()?, "IPv4").map_err(wrong)?,
                "FLANNEL_SUBNET" => env.subnet = Some(network(value()?, "IPv4").map_err(wrong)?),
                "FLANNEL_IPV6_NETWORK" => {
                    env.networks_v6 = networks(value()?, "IPv6").map_err(wrong)?;
                }
                "FLANNEL_IPV6_SUBNET" => {
                    env.subnet_v6 = Some(network(value()?, "IPv6").map_err(wrong)?);
                }
                "FLANNEL_MTU" => mtu = Some(parse_mtu(value()?).map_err(wrong)?),
                "FLANNEL_IPMASQ" => ip_masq = Some(value()? == "true"),
                _ => {}
            }
        }
        env.networks = env.networks.iter().map(Ipv4Net::trunc).collect();
        env.subnet = env.subnet.as_ref().map(Ipv4Net::trunc);
        env.networks_v6 = env.networks_v6.iter().map(Ipv6Net::trunc).collect();
        env.subnet_v6 = env.subnet_v6.as_ref().map(Ipv6Net::trunc);
        drop_repeated(&mut env.networks);
        drop_repeated(&mut env.networks_v6);

        let mut missing = Vec::new();
        if env.networks.is_empty() && env.networks_v6.is_empty() {
            missing.extend(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]);
        }
        if env.subnet.is_none() && env.subnet_v6.is_none() {
            missing.extend(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]);
        }
        match mtu {
            Some(mtu) => env.mtu = mtu,
            None => missing.push("FLANNEL_MTU"),
        }
        match ip_masq {
            Some(ip_masq) => env.ip_masq = ip_masq,
            None => missing.push("FLANNEL_IPMASQ"),
        }
        if missing.is_empty() {
            Ok(env)
        } else {
            Err(ParseError::Missing(missing))
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, cannot be read, or [`Self::parse`] refuses its content.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let bytes = fs::read(path).map_err(|error| {
            let path = path.to_owned();
            if error.kind() == io::ErrorKind::NotFound {
                ReadError::Absent(path)
            } else {
                ReadError::Unreadable { path, error }
            }
        })?;
        Self::parse(&String::from_utf8_lossy(&bytes)).map_err(|error| ReadError::Content {
            path: path.to_owned(),
            error,
        })
    }

    /// Writes a file so that readers see the content before or this one: mode 0644, in a directory that is made with mode
    /// 0755 if it is not there.
    ///
    /// # Errors
    /// The directory or the file cannot be written; what was there stays.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        file::make_dir(file::parent(path), 0o755)?;
        file::write_atomic(path, self.render().as_bytes(), 0o644)
    }
}

fn joined(networks: impl Iterator<Item = impl Display>) -> String {
    networks
        .map(|network| network.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

fn networks<N: FromStr>(list: &str, family: &str) -> Result<Vec<N>, String> {
    list.split(',').map(|text| network(text, family)).collect()
}

fn network<N: FromStr>(text: &str, family: &str) -> Result<N, String> {
    let Ok(network) = text.parse() else {
        return Err(format!(
            ": invalid CIDR address: {text:?} is not an {family} network"
        ));
    };
    Ok(network)
}

fn parse_mtu(text: &str) -> Result<u32, String> {
    // `parse` alone would take a sign.
    if text.starts_with(|c: char| c.is_ascii_digit())
        && let Ok(mtu) = text.parse()
    {
        return Ok(mtu);
    }
    Err(format!(": {text:?} is not a number of bytes"))
}

fn drop_repeated<N: Copy + PartialEq>(networks: &mut Vec<N>) {
    let mut seen = Vec::new();
    networks.retain(|network| {
        let first = !seen.contains(network);
        seen.push(*network);
        first
    });
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    // As recorded from flannel 0.28.9.
    const V4: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd10:244::/48\nFLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn v4() -> SubnetEnv {
        SubnetEnv {
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            subnet: Some("10.244.1.0/24".parse().unwrap()),
            mtu: 1450,
            ip_masq: true,
            ..SubnetEnv::default()
        }
    }

    fn dual() -> SubnetEnv {
        SubnetEnv {
            networks_v6: vec!["fd10:244::/48".parse().unwrap()],
            subnet_v6: Some("fd10:244:0:1::/64".parse().unwrap()),
            ..v4()
        }
    }

    #[test]
    fn text_is_flannels_byte_for_byte() {
        let v6 = SubnetEnv {
            networks: vec![],
            subnet: None,
            mtu: 8920,
            ip_masq: false,
            ..dual()
        };
        let v6_text = "FLANNEL_IPV6_NETWORK=fd10:244::/48\nFLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64\nFLANNEL_MTU=8920\nFLANNEL_IPMASQ=false\n";
        for (env, text) in [(v4(), V4), (dual(), DUAL), (v6, v6_text)] {
            assert_eq!(env.render(), text);
            assert_eq!(SubnetEnv::parse(text), Ok(env));
        }
    }

    #[test]
    fn what_others_write_is_understood() {
        let env = SubnetEnv::parse(
            "# flannel\n\nFLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_NETWORK=10.244.3.9/16,10.1.0.0/16,10.244.0.0/16\r\n\
             OTHER\nFLANNEL_SUBNET=10.244.1.77/24\n FLANNEL_MTU=9\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=True",
        );
        let expected = SubnetEnv {
            networks: vec![
                "10.244.0.0/16".parse().unwrap(),
                "10.1.0.0/16".parse().unwrap(),
            ],
            ip_masq: false,
            ..v4()
        };
        assert_eq!(env, Ok(expected));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let without = |key: &str| -> String {
            DUAL.split_inclusive('\n')
                .filter(|line| !line.contains(key))
                .collect()
        };
        for (text, message) in [
            (
                String::new(),
                "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ",
            ),
            (
                without("NETWORK"),
                "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK",
            ),
            (
                without("SUBNET"),
                "is missing FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET",
            ),
            (without("MTU"), "is missing FLANNEL_MTU"),
            (without("IPMASQ"), "is missing FLANNEL_IPMASQ"),
            (
                "\nFLANNEL_MTU\n".to_owned(),
                "line 2: FLANNEL_MTU has no value: write KEY=VALUE",
            ),
            (
                "FLANNEL_IPMASQ".to_owned(),
                "line 1: FLANNEL_IPMASQ has no value: write KEY=VALUE",
            ),
            (
                "FLANNEL_MTU=+9".to_owned(),
                "line 1: FLANNEL_MTU: \"+9\" is not a number of bytes",
            ),
            (
                "FLANNEL_MTU=99999999999".to_owned(),
                "line 1: FLANNEL_MTU: \"99999999999\" is not a number of bytes",
            ),
            (
                "FLANNEL_NETWORK=10.0.0.0/8,".to_owned(),
                "line 1: FLANNEL_NETWORK: invalid CIDR address: \"\" is not an IPv4 network",
            ),
            (
                "FLANNEL_SUBNET=10.0.0.0".to_owned(),
                "line 1: FLANNEL_SUBNET: invalid CIDR address: \"10.0.0.0\" is not an IPv4 network",
            ),
            (
                "FLANNEL_IPV6_SUBNET=10.0.0.0/8".to_owned(),
                "line 1: FLANNEL_IPV6_SUBNET: invalid CIDR address: \"10.0.0.0/8\" is not an IPv6 network",
            ),
        ] {
            assert_eq!(
                SubnetEnv::parse(&text).unwrap_err().to_string(),
                message,
                "{text:?}"
            );
        }
    }

    /// One family of each pair suffices, whichever it is.
    #[test]
    fn either_family_is_enough() {
        for missing in [
            "FLANNEL_NETWORK",
            "FLANNEL_SUBNET",
            "IPV6_NETWORK",
            "IPV6_SUBNET",
        ] {
            let text: String = DUAL
                .split_inclusive('\n')
                .filter(|line| !line.contains(missing))
                .collect();
            assert!(SubnetEnv::parse(&text).is_ok(), "{text}");
        }
    }

    #[test]
    fn files_are_replaced_whole_with_their_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/flannel/subnet.env");
        let error = SubnetEnv::read(&path).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("open {}: no such file or directory", path.display())
        );
        for env in [v4(), dual()] {
            env.write(&path).unwrap();
            assert_eq!(SubnetEnv::read(&path).unwrap(), env);
            // A reader that has the file open keeps the old content.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let old = fs::File::open(&path).unwrap();
        v4().write(&path).unwrap();
        assert_eq!(io::read_to_string(old).unwrap(), DUAL);
        assert_eq!(fs::read_to_string(&path).unwrap(), V4);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o644);
        assert_eq!(mode(path.parent().unwrap()), 0o755);
        let names = fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 1, "nothing but the file");
        fs::write(&path, "FLANNEL_MTU=1450\n").unwrap();
        let error = SubnetEnv::read(&path).unwrap_err().to_string();
        let expected = "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_IPMASQ";
        assert_eq!(error, format!("{} {expected}", path.display()));
        let error = v4().write(dir.path().join("run").as_path()).unwrap_err();
        assert!(dir.path().join("run").is_dir(), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Any text gives an answer, and what is taken from it is written so that it is read the same.
        #[test]
        fn any_text_is_answered(lines in prop::collection::vec(line(), 0..12)) {
            if let Ok(env) = SubnetEnv::parse(&lines.join("\n")) {
                prop_assert_eq!(SubnetEnv::parse(&env.render()), Ok(env));
            }
        }
    }

    fn line() -> impl Strategy<Value = String> {
        let key = prop::sample::select(vec![
            "FLANNEL_NETWORK",
            "FLANNEL_SUBNET",
            "FLANNEL_IPV6_NETWORK",
            "FLANNEL_IPV6_SUBNET",
            "FLANNEL_MTU",
            "FLANNEL_IPMASQ",
        ]);
        let cidr4 =
            (any::<Ipv4Addr>(), 0..40_u8).prop_map(|(address, len)| format!("{address}/{len}"));
        let cidr6 =
            (any::<Ipv6Addr>(), 0..140_u8).prop_map(|(address, len)| format!("{address}/{len}"));
        let value = prop_oneof![
            cidr4,
            cidr6,
            any::<u16>().prop_map(|mtu| mtu.to_string()),
            Just("true".to_owned()),
            any::<String>()
        ];
        prop_oneof![
            4 => (key, value).prop_map(|(key, value)| format!("{key}={value}")),
            1 => any::<String>(),
        ]
    }
}
