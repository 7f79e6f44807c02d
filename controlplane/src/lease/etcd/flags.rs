//! Flannel's flags for etcd.

use std::path::PathBuf;

use super::api::Access;
use super::schema::{DEFAULT_PREFIX, Keys};

/// Flannel's default endpoints.
const DEFAULT_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";

/// Flags as flannel has them. All but the margin say that leases are in etcd.
#[derive(Debug, Clone, clap::Args)]
pub struct EtcdFlags {
    /// Take the leases from etcd at these URLs, separated by commas [default: http://127.0.0.1:4001,http://127.0.0.1:2379]
    #[arg(long, value_name = "URLS")]
    etcd_endpoints: Option<String>,
    /// What the keys in etcd begin with [default: /coreos.com/network]
    #[arg(long, value_name = "PREFIX")]
    etcd_prefix: Option<String>,
    /// Key of the client certificate for etcd
    #[arg(long, value_name = "FILE")]
    etcd_keyfile: Option<String>,
    /// Client certificate for etcd
    #[arg(long, value_name = "FILE")]
    etcd_certfile: Option<String>,
    /// Certificate authority of etcd [default: the system's]
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<String>,
    /// User of etcd
    #[arg(long, value_name = "NAME")]
    etcd_username: Option<String>,
    /// Its password
    #[arg(long, value_name = "PASSWORD")]
    etcd_password: Option<String>,
    /// How long before its end the lease in etcd is renewed
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = margin)]
    pub subnet_lease_renew_margin: u64,
}

fn margin(text: &str) -> Result<u64, String> {
    let minutes = text
        .parse()
        .ok()
        .filter(|minutes| (1..1440).contains(minutes));
    minutes.ok_or_else(|| {
        "Invalid subnet-lease-renew-margin option, out of acceptable range: use 1 to 1439"
            .to_owned()
    })
}

impl EtcdFlags {
    /// The first flag that says that leases are in etcd.
    pub fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--etcd-endpoints", &self.etcd_endpoints),
            ("--etcd-prefix", &self.etcd_prefix),
            ("--etcd-keyfile", &self.etcd_keyfile),
            ("--etcd-certfile", &self.etcd_certfile),
            ("--etcd-cafile", &self.etcd_cafile),
            ("--etcd-username", &self.etcd_username),
            ("--etcd-password", &self.etcd_password),
        ];
        let mut given = flags.into_iter().filter(|(_, value)| value.is_some());
        given.next().map(|(name, _)| name)
    }

    /// What they say, and what is odd about it.
    pub fn access(&self) -> (Access, Vec<String>) {
        let endpoints = self.etcd_endpoints.clone();
        let endpoints = endpoints.unwrap_or_else(|| DEFAULT_ENDPOINTS.to_owned());
        let mut parts: Vec<String> = endpoints
            .split(',')
            .map(|endpoint| endpoint.trim().to_owned())
            .filter(|endpoint| !endpoint.is_empty())
            .collect();
        if parts.is_empty() {
            // Commas alone: whoever connects there says so.
            parts.push(endpoints);
        }
        let endpoints = parts;
        let mut odd = Vec::new();
        let identity = match (&self.etcd_certfile, &self.etcd_keyfile) {
            (Some(certificate), Some(key)) => {
                Some((PathBuf::from(certificate), PathBuf::from(key)))
            }
            (None, None) => None,
            (Some(_), None) => {
                odd.push("--etcd-certfile is not used: it needs --etcd-keyfile too".to_owned());
                None
            }
            (None, Some(_)) => {
                odd.push("--etcd-keyfile is not used: it needs --etcd-certfile too".to_owned());
                None
            }
        };
        let ca = self.etcd_cafile.as_ref().map(PathBuf::from);
        let is_plain = |endpoint: &String| {
            endpoint.starts_with("http://")
                || (identity.is_none() && !endpoint.starts_with("https://"))
        };
        let plain: Vec<&str> = endpoints
            .iter()
            .filter(|endpoint| is_plain(endpoint))
            .map(String::as_str)
            .collect();
        if !plain.is_empty() && (identity.is_some() || ca.is_some() || !odd.is_empty()) {
            odd.push(format!(
                "no certificate provided: connecting to etcd with http. This is insecure: write --etcd-endpoints with https:// instead of {}",
                plain.join(", ")
            ));
        }
        let user = self.etcd_username.clone();
        let user = user.map(|name| (name, self.etcd_password.clone().unwrap_or_default()));
        let access = Access {
            endpoints,
            keys: Keys::new(self.etcd_prefix.as_deref().unwrap_or(DEFAULT_PREFIX)),
            user,
            identity,
            ca,
        };
        (access, odd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        etcd: EtcdFlags,
    }

    fn flags(args: &[&str]) -> Result<EtcdFlags, String> {
        let args = core::iter::once(&"program").chain(args);
        let program = Program::try_parse_from(args).map_err(|error| error.to_string())?;
        Ok(program.etcd)
    }

    #[test]
    fn defaults_are_flannels() {
        let flags = flags(&[]).unwrap();
        assert_eq!((flags.given(), flags.subnet_lease_renew_margin), (None, 60));
        let (access, odd) = flags.access();
        assert_eq!(
            access.endpoints,
            ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]
        );
        assert_eq!(access.keys.config(), "/coreos.com/network/config");
        assert!(odd.is_empty() && access.user.is_none() && access.identity.is_none());
    }

    #[test]
    fn a_margin_of_a_day_or_of_nothing_is_refused_in_flannels_words() {
        for margin in ["0", "1440", "-1", "soon"] {
            let flag = format!("--subnet-lease-renew-margin={margin}");
            let error = flags(&[&flag]).unwrap_err();
            let words = "Invalid subnet-lease-renew-margin option, out of acceptable range";
            assert!(error.contains(words), "{margin}: {error}");
        }
        for margin in ["1", "1439"] {
            flags(&["--subnet-lease-renew-margin", margin]).unwrap();
        }
    }

    #[test]
    fn half_a_certificate_and_plain_text_are_warned_of() {
        for (args, warnings) in [
            (
                &["--etcd-keyfile=k"][..],
                &["--etcd-keyfile is not used", "no certificate provided"][..],
            ),
            (
                &["--etcd-certfile=c", "--etcd-endpoints=https://e:1"],
                &["--etcd-certfile is not used"],
            ),
            (&["--etcd-cafile=a"], &["no certificate provided"]),
            (&["--etcd-cafile=a", "--etcd-endpoints=https://e:1"], &[]),
            (
                &[
                    "--etcd-keyfile=k",
                    "--etcd-certfile=c",
                    "--etcd-endpoints=e:1",
                ],
                &[],
            ),
            (
                &[
                    "--etcd-keyfile=k",
                    "--etcd-certfile=c",
                    "--etcd-endpoints=http://e:1",
                ],
                &["no certificate provided"],
            ),
        ] {
            let flags = flags(args).unwrap();
            assert!(flags.given().is_some());
            let (_, odd) = flags.access();
            assert_eq!(odd.len(), warnings.len(), "{args:?}: {odd:?}");
            for (odd, warning) in odd.iter().zip(warnings) {
                assert!(odd.starts_with(warning), "{args:?}: {odd}");
            }
        }
    }
}
