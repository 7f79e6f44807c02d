//! The plugin's configuration, and the one that it makes for its delegate.

use core::net::IpAddr;
use std::collections::BTreeMap;
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Map, Value, json};

use crate::error::{CniError, Code};
use crate::go_json;
use crate::subnet_env::{self, SubnetEnv};

/// Where flannel's plugin keeps what it needs for `DEL`.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/cni/flannel";

const LOOK_AT_CONFLIST: &str = "look at the plugin of type \"flannel\" in the runtime's configuration, /etc/cni/net.d/10-flannel.conflist";

/// Versions of the specification, oldest first.
pub const VERSIONS: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];

/// One of [`VERSIONS`]; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(usize);

impl Version {
    /// The first that has `CHECK`.
    pub const V0_4_0: Self = Self(4);
    /// The first that has `GC` and `STATUS`.
    pub const V1_1_0: Self = Self(6);

    fn of(text: &str) -> Option<Self> {
        VERSIONS.iter().position(|known| *known == text).map(Self)
    }
}

/// An interface of a container: what a runtime adds and deletes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The runtime's name for the sandbox.
    pub container_id: String,
    /// The interface inside.
    pub ifname: String,
}

/// The configuration on stdin, checked as far as every command needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// `cniVersion`; empty if it is not there, which means 0.1.0.
    pub cni_version: String,
    /// The same as a version that is spoken here.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// Where `subnet.env` is.
    pub subnet_file: PathBuf,
    /// Where configurations are kept for `DEL`.
    pub data_dir: PathBuf,
    delegate: Map<String, Value>,
    ipam: Map<String, Value>,
    runtime_config: Option<Map<String, Value>>,
    prev_result: Option<Value>,
    valid_attachments: Option<Value>,
}

impl NetConf {
    /// Reads it as Go does: keys in any case, `null` as if it were not there, unknown keys passed over.
    ///
    /// # Errors
    /// It is not a JSON object of the form that is expected, has no name, or a version that is not spoken.
    pub fn parse(bytes: &[u8]) -> Result<Self, CniError> {
        let malformed = |problem: String| {
            CniError::new(
                Code::Decoding,
                format!("failed to load flannel netconf file: {problem}"),
                LOOK_AT_CONFLIST,
            )
        };
        let mut map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        let string = |map: &mut Map<String, Value>, key| match take(map, key) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(malformed(format!("{key:?} is {other}, not a string"))),
        };
        let object = |map: &mut Map<String, Value>, key| match take(map, key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => Err(malformed(format!("{key:?} is {other}, not an object"))),
        };
        let or = |text: String, default: &str| {
            PathBuf::from(if text.is_empty() { default } else { &text })
        };

        let name = string(&mut map, "name")?;
        if name.is_empty() {
            return Err(CniError::new(
                Code::Configuration,
                "missing network name",
                LOOK_AT_CONFLIST,
            ));
        }
        if !is_plain_name(&name) {
            return Err(CniError::new(
                Code::Configuration,
                "invalid characters found in network name",
                format!(
                    "{name:?} may have letters, digits, '_', '.' and '-', and starts with a letter or a digit"
                ),
            ));
        }
        let cni_version = string(&mut map, "cniVersion")?;
        let spoken = if cni_version.is_empty() {
            "0.1.0"
        } else {
            &cni_version
        };
        let version = Version::of(spoken).ok_or_else(|| {
            CniError::new(
                Code::IncompatibleVersion,
                "incompatible CNI versions",
                format!("config is {spoken:?}, plugin supports {VERSIONS:?}"),
            )
        })?;
        Ok(Self {
            version,
            name,
            subnet_file: or(string(&mut map, "subnetFile")?, subnet_env::DEFAULT_PATH),
            data_dir: or(string(&mut map, "dataDir")?, DEFAULT_DATA_DIR),
            delegate: object(&mut map, "delegate")?.unwrap_or_default(),
            ipam: object(&mut map, "ipam")?.unwrap_or_default(),
            runtime_config: object(&mut map, "runtimeConfig")?,
            prev_result: take(&mut map, "prevResult"),
            // Not `take`: here, `null` is a list that is empty, and no list at all is a mistake.
            valid_attachments: map.remove("cni.dev/valid-attachments"),
            cni_version,
        })
    }

    /// `prevResult`, without which there is nothing to check against.
    ///
    /// A route without a gateway has that of the first address of its family: so `ADD` put it into the kernel, but the
    /// reference plugins' `CHECK` looks for one without any, and finds no route of flannel's.
    ///
    /// # Errors
    /// It is not there.
    pub fn prev_result(&self) -> Result<Value, CniError> {
        let mut result = self.prev_result.clone().ok_or_else(|| {
            CniError::new(
                Code::Configuration,
                "CHECK needs \"prevResult\" in the configuration",
                "the runtime has to pass the result of ADD",
            )
        })?;
        let text = |value: &Value, key| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let ips = result.get("ips").and_then(Value::as_array);
        let gateways: Vec<String> = ips
            .into_iter()
            .flatten()
            .filter_map(|ip| text(ip, "gateway"))
            .collect();
        let routes = result.get_mut("routes").and_then(Value::as_array_mut);
        for route in routes.into_iter().flatten() {
            let Some(dst) = text(route, "dst").filter(|_| text(route, "gw").is_none()) else {
                continue;
            };
            let of_same_family = |gateway: &&String| gateway.contains(':') == dst.contains(':');
            if let Some(gateway) = gateways.iter().find(of_same_family)
                && let Value::Object(route) = route
            {
                route.insert("gw".to_owned(), gateway.as_str().into());
            }
        }
        Ok(result)
    }

    /// The attachments that `GC` leaves alone.
    ///
    /// # Errors
    /// They are not there, or not of the form that is expected: all others would be deleted.
    pub fn valid_attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let wrong = |problem: String| {
            CniError::new(
                Code::Configuration,
                format!("\"cni.dev/valid-attachments\" {problem}"),
                "nothing was removed; the runtime has to pass the attachments that are in use",
            )
        };
        let list = match &self.valid_attachments {
            None => return Err(wrong("is missing".to_owned())),
            Some(Value::Null) => return Ok(Vec::new()),
            Some(value) => value
                .as_array()
                .ok_or_else(|| wrong(format!("is {value}, not a list")))?,
        };
        let attachment = |value: &Value| {
            let field = |key| value.get(key).and_then(Value::as_str).map(str::to_owned);
            Some(Attachment {
                container_id: field("containerID")?,
                ifname: field("ifname")?,
            })
        };
        list.iter()
            .map(|value| {
                attachment(value).ok_or_else(|| {
                    wrong(format!("has {value}, not {{\"containerID\", \"ifname\"}}"))
                })
            })
            .collect()
    }

    /// The configuration of the delegate: what the user put under `delegate`, and what the network asks for.
    ///
    /// # Errors
    /// `delegate` or `ipam` say what they must not, or what cannot be understood.
    pub fn delegate(&self, env: &SubnetEnv) -> Result<Delegate, CniError> {
        let wrong = |msg: &str| CniError::new(Code::Configuration, msg, LOOK_AT_CONFLIST);
        let plugin = match self.delegate.get("type") {
            None => "bridge",
            Some(Value::String(plugin)) => plugin,
            Some(_) => {
                return Err(wrong(
                    "'delegate' dictionary, if present, must have (string) 'type' field",
                ));
            }
        };
        for key in ["name", "ipam"] {
            if self.delegate.contains_key(key) {
                return Err(wrong(&format!(
                    "'delegate' dictionary must not have '{key}' field, it'll be set by flannel"
                )));
            }
        }
        let mut conf: BTreeMap<String, String> = encoded(&self.delegate);
        let mut default = |key: &str, value: Value| {
            conf.entry(key.to_owned())
                .or_insert_with(|| go_json::encode(&value));
        };
        default("type", plugin.into());
        default("ipMasq", (!env.ip_masq).into());
        default("mtu", env.mtu.into());
        if plugin == "bridge" {
            default("isGateway", true.into());
        }
        let mut set = |key: &str, text: String| conf.insert(key.to_owned(), text);
        set("name", go_json::encode(&self.name.as_str().into()));
        if !self.cni_version.is_empty() {
            set(
                "cniVersion",
                go_json::encode(&self.cni_version.as_str().into()),
            );
        }
        if let Some(runtime_config) = &self.runtime_config {
            set("runtimeConfig", go_json::object(&encoded(runtime_config)));
        }
        set("ipam", self.delegate_ipam(env)?);
        Ok(Delegate {
            plugin: plugin.to_owned(),
            ipam: match self.ipam.get("type") {
                Some(Value::String(plugin)) => plugin.clone(),
                Some(_) | None => DEFAULT_IPAM.to_owned(),
            },
            conf: go_json::object(&conf).into_bytes(),
        })
    }

    fn delegate_ipam(&self, env: &SubnetEnv) -> Result<String, CniError> {
        let mut ipam = encoded(&self.ipam);
        ipam.entry("type".to_owned())
            .or_insert_with(|| go_json::encode(&DEFAULT_IPAM.into()));
        let subnets = env.subnet.as_ref().map(Ipv4Net::to_string);
        let subnets_v6 = env.subnet_v6.as_ref().map(Ipv6Net::to_string);
        let ranges = subnets.into_iter().chain(subnets_v6);
        ipam.insert(
            "ranges".to_owned(),
            go_json::array(ranges.map(|subnet| go_json::encode(&json!([{ "subnet": subnet }])))),
        );
        let mut routes = self.user_routes().map_err(|problem| {
            CniError::new(
                Code::Configuration,
                format!(
                    "failed to assemble Delegate IPAM: failed to read IPAM routes: failed to parse ipam.routes: {problem}"
                ),
                LOOK_AT_CONFLIST,
            )
        })?;
        let networks = env.networks.iter().map(Ipv4Net::to_string);
        let networks_v6 = env.networks_v6.iter().map(Ipv6Net::to_string);
        routes.extend(
            networks
                .chain(networks_v6)
                .map(|network| go_json::encode(&json!({ "dst": network }))),
        );
        ipam.insert("routes".to_owned(), go_json::array(routes.into_iter()));
        Ok(go_json::object(&ipam))
    }

    /// The user's routes, in the order of fields that the CNI library gives them; what it does not know is dropped.
    fn user_routes(&self) -> Result<Vec<String>, String> {
        let routes = match self.ipam.get("routes") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(routes)) => routes,
            Some(other) => return Err(format!("{other} is not a list")),
        };
        routes.iter().map(user_route).collect()
    }
}

const DEFAULT_IPAM: &str = "host-local";

/// A delegate and what it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegate {
    /// The plugin's name.
    pub plugin: String,
    /// The name of the plugin that gives out addresses to it.
    pub ipam: String,
    /// Its configuration: what is on its stdin and in the saved file.
    pub conf: Vec<u8>,
}

/// A delegate's configuration with further keys, as commands other than `ADD` and `DEL` need them.
pub(crate) fn with_keys(conf: &[u8], keys: &[(&str, Value)]) -> Option<Vec<u8>> {
    let mut map: Map<String, Value> = serde_json::from_slice(conf).ok()?;
    for (key, value) in keys {
        map.insert((*key).to_owned(), value.clone());
    }
    Some(go_json::encode(&Value::Object(map)).into_bytes())
}

/// What container ids and names of networks consist of.
pub(crate) fn is_plain_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn encoded(map: &Map<String, Value>) -> BTreeMap<String, String> {
    map.iter()
        .map(|(key, value)| (key.clone(), go_json::encode(value)))
        .collect()
}

/// Takes the value of a key in any case, the exact one first; `null` is none.
fn take(map: &mut Map<String, Value>, key: &str) -> Option<Value> {
    let found = if map.contains_key(key) {
        key.to_owned()
    } else {
        map.keys()
            .find(|found| found.eq_ignore_ascii_case(key))?
            .clone()
    };
    map.remove(&found).filter(|value| !value.is_null())
}

fn user_route(route: &Value) -> Result<String, String> {
    let Value::Object(fields) = route else {
        return Err(format!("{route} is not an object"));
    };
    let mut fields = fields.clone();
    let address = |value: Value| -> Option<IpAddr> { value.as_str()?.parse().ok() };
    let network = |value: Value| -> Option<IpNet> { value.as_str()?.parse().ok() };
    let mut members = Vec::new();
    let dst = take(&mut fields, "dst")
        .and_then(network)
        .ok_or_else(|| format!("{route}: \"dst\" is not a network"))?;
    members.push(format!("\"dst\":\"{dst}\""));
    if let Some(gateway) = take(&mut fields, "gw").filter(|gateway| gateway != "") {
        let gateway =
            address(gateway).ok_or_else(|| format!("{route}: \"gw\" is not an address"))?;
        members.push(format!("\"gw\":\"{gateway}\""));
    }
    for key in ["mtu", "advmss", "priority", "table", "scope"] {
        let Some(value) = take(&mut fields, key) else {
            continue;
        };
        let number = value
            .as_i64()
            .ok_or_else(|| format!("{route}: {key:?} is not a whole number"))?;
        // The library leaves out a zero where it cannot be told from nothing.
        if number != 0 || matches!(key, "table" | "scope") {
            members.push(format!("{key:?}:{number}"));
        }
    }
    Ok(format!("{{{}}}", members.join(",")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env(lines: &str) -> SubnetEnv {
        SubnetEnv::parse(&format!("{lines}\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n")).unwrap()
    }

    fn v4() -> SubnetEnv {
        env("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24")
    }

    fn rendered(conf: &str, env: &SubnetEnv) -> String {
        let delegate = NetConf::parse(conf.as_bytes())
            .unwrap()
            .delegate(env)
            .unwrap();
        String::from_utf8(delegate.conf).unwrap()
    }

    /// The first three are what flannel's own tests expect, the next two what its plugin was seen to save for the shipped
    /// conflist.
    #[test]
    fn delegates_configuration_is_flannels_byte_for_byte() {
        let plain = r#"{"name": "cni-flannel", "type": "flannel"}"#;
        let shipped = r#"{"cniVersion": "0.3.1", "name": "cbr0", "type": "flannel", "ipam": {"dataDir": "n1/cni/networks"},
            "delegate": {"hairpinMode": true, "isDefaultGateway": true}}"#;
        let recorded = |lines: &str| SubnetEnv {
            mtu: 1450,
            ..env(lines)
        };
        for (conf, env, expected) in [
            (
                plain,
                v4(),
                r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#,
            ),
            (
                plain,
                env("FLANNEL_NETWORK=10.1.0.0/16,192.168.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24"),
                r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#,
            ),
            (
                plain,
                env("FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64"),
                r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"fc00::/64"}]],"routes":[{"dst":"fc00::/48"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#,
            ),
            (
                shipped,
                recorded("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24"),
                r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"n1/cni/networks","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#,
            ),
            (
                shipped,
                recorded(
                    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd10:244::/48\nFLANNEL_IPV6_SUBNET=fd10:244:0:1::1/64",
                ),
                r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"n1/cni/networks","ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd10:244:0:1::/64"}]],"routes":[{"dst":"10.244.0.0/16"},{"dst":"fd10:244::/48"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#,
            ),
            // What the user says wins; the daemon that does not masquerade leaves it to the bridge.
            (
                r#"{"name": "n", "CNIVERSION": "1.0.0", "runtimeConfig": {"bandwidth": {"b": 1e3, "a": "<"}},
                    "delegate": {"type": "ptp", "mtu": 9000, "ipMasq": null}}"#,
                SubnetEnv {
                    ip_masq: false,
                    ..v4()
                },
                r#"{"cniVersion":"1.0.0","ipMasq":null,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"mtu":9000,"name":"n","runtimeConfig":{"bandwidth":{"a":"\u003c","b":1000}},"type":"ptp"}"#,
            ),
            (
                r#"{"name": "n", "delegate": {"isGateway": false, "runtimeConfig": 1, "cniVersion": "0.4.0"}}"#,
                SubnetEnv {
                    ip_masq: false,
                    ..v4()
                },
                r#"{"cniVersion":"0.4.0","ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":false,"mtu":1472,"name":"n","runtimeConfig":1,"type":"bridge"}"#,
            ),
            (
                r#"{"name": "n", "ipam": {"type": "my-ipam", "unknown-param": "unknown-value", "ranges": 5, "routes": [
                    {"dst": "10.96.0.7/12"}, {"gw": "10.1.17.20", "DST": "192.168.244.0/24", "scope": 0, "mtu": 0, "advmss": 9, "x": 1}]}}"#,
                v4(),
                r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.96.0.7/12"},{"dst":"192.168.244.0/24","gw":"10.1.17.20","advmss":9,"scope":0},{"dst":"10.1.0.0/16"}],"type":"my-ipam","unknown-param":"unknown-value"},"isGateway":true,"mtu":1472,"name":"n","type":"bridge"}"#,
            ),
        ] {
            assert_eq!(rendered(conf, &env), expected);
        }
    }

    #[test]
    fn every_mistake_is_named() {
        let decoding = "failed to load flannel netconf file: ";
        for (conf, code, message) in [
            ("", 6, decoding),
            ("[]", 6, decoding),
            ("{\"name\": \"n\"} x", 6, decoding),
            (
                r#"{"name": 5}"#,
                6,
                "failed to load flannel netconf file: \"name\" is 5, not a string",
            ),
            (
                r#"{"name": "n", "delegate": []}"#,
                6,
                "failed to load flannel netconf file: \"delegate\" is [], not an object",
            ),
            (
                r#"{"name": "n", "ipam": "x"}"#,
                6,
                "failed to load flannel netconf file: \"ipam\" is \"x\", not an object",
            ),
            (r#"{"type": "flannel"}"#, 7, "missing network name"),
            (
                r#"{"name": "../n"}"#,
                7,
                "invalid characters found in network name",
            ),
            (
                r#"{"name": "n", "cniVersion": "1.2.0"}"#,
                1,
                "incompatible CNI versions",
            ),
            (
                r#"{"name": "n", "delegate": {"type": 1}}"#,
                7,
                "'delegate' dictionary, if present, must have (string) 'type' field",
            ),
            (
                r#"{"name": "n", "delegate": {"name": "x"}}"#,
                7,
                "'delegate' dictionary must not have 'name' field, it'll be set by flannel",
            ),
            (
                r#"{"name": "n", "delegate": {"ipam": {}}}"#,
                7,
                "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel",
            ),
            (
                r#"{"name": "n", "ipam": {"routes": [{"dst": "x"}]}}"#,
                7,
                "failed to assemble Delegate IPAM: failed to read IPAM routes: failed to parse ipam.routes: {\"dst\":\"x\"}: \"dst\" is not a network",
            ),
            (
                r#"{"name": "n", "ipam": {"routes": [{}]}}"#,
                7,
                "failed to assemble Delegate IPAM: ",
            ),
            (
                r#"{"name": "n", "ipam": {"routes": {}}}"#,
                7,
                "failed to assemble Delegate IPAM: ",
            ),
            (
                r#"{"name": "n", "ipam": {"routes": [{"dst": "10.0.0.0/8", "gw": 1}]}}"#,
                7,
                "failed to assemble Delegate IPAM: ",
            ),
            (
                r#"{"name": "n", "ipam": {"routes": [{"dst": "10.0.0.0/8", "mtu": "9"}]}}"#,
                7,
                "failed to assemble Delegate IPAM: ",
            ),
        ] {
            let error = NetConf::parse(conf.as_bytes())
                .and_then(|parsed| parsed.delegate(&v4()))
                .unwrap_err();
            assert_eq!(error.code.number(), code, "{conf}: {error}");
            if message.ends_with(": ") {
                assert!(error.msg.starts_with(message), "{conf}: {error}");
            } else {
                assert_eq!(error.msg, message, "{conf}");
            }
            assert_ne!(error.details, "", "{conf}");
        }
    }

    #[test]
    fn versions_are_in_order() {
        for (version, text) in [(Version::V0_4_0, "0.4.0"), (Version::V1_1_0, "1.1.0")] {
            assert_eq!(Version::of(text), Some(version));
        }
        let defaults =
            NetConf::parse(br#"{"name": "n", "subnetFile": null, "dataDir": ""}"#).unwrap();
        assert_eq!(Some(defaults.version), Version::of("0.1.0"));
        assert_eq!(
            defaults.subnet_file,
            PathBuf::from("/run/flannel/subnet.env")
        );
        assert_eq!(defaults.data_dir, PathBuf::from("/var/lib/cni/flannel"));
    }

    #[test]
    fn routes_to_check_are_those_of_the_kernel() {
        let conf = |result: Value| {
            NetConf::parse(
                json!({"name": "n", "prevResult": result})
                    .to_string()
                    .as_bytes(),
            )
            .unwrap()
        };
        let result = |gateways: [&str; 3]| {
            let route = |(dst, gw): (&str, &str)| match gw {
                "" => json!({ "dst": dst }),
                gw => json!({"dst": dst, "gw": gw}),
            };
            let dsts = ["10.0.0.0/8", "fd00::/48", "0.0.0.0/0"];
            let routes: Vec<Value> = dsts.into_iter().zip(gateways).map(route).collect();
            json!({
                "ips": [{"address": "fd00::2/64", "gateway": "fd00::1"}, {"gateway": "10.0.0.1"}, {"gateway": "10.0.9.1"}, {}],
                "routes": routes,
            })
        };
        let completed = conf(result(["", "", "10.0.0.7"])).prev_result().unwrap();
        assert_eq!(completed, result(["10.0.0.1", "fd00::1", "10.0.0.7"]));
        for other in [
            json!({}),
            json!([]),
            json!({"routes": [1, {"dst": "10.0.0.0/8"}], "ips": 5}),
        ] {
            assert_eq!(conf(other.clone()).prev_result().unwrap(), other);
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            Just(json!("10.0.0.0/8")),
        ];
        let key = prop_oneof![
            4 => prop::sample::select(vec!["name", "type", "delegate", "ipam", "routes", "dst", "gw", "mtu", "cniVersion", "dataDir", "runtimeConfig"])
                .prop_map(str::to_owned),
            1 => any::<String>(),
        ];
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(key.clone(), inner, 0..6)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever is on stdin gets an answer, and what is made of it is JSON that means the same when it is read again.
        #[test]
        fn any_configuration_is_answered(bytes in any::<Vec<u8>>(), delegate in json(), ipam in json(), other in json()) {
            let _ = NetConf::parse(&bytes);
            let _ = NetConf::parse(other.to_string().as_bytes());
            let conf = json!({"name": "n", "delegate": delegate, "ipam": ipam, "cni.dev/valid-attachments": other});
            if let Ok(conf) = NetConf::parse(conf.to_string().as_bytes()) {
                let _ = conf.valid_attachments();
                if let Ok(delegate) = conf.delegate(&v4()) {
                    let again = with_keys(&delegate.conf, &[]);
                    prop_assert_eq!(again, Some(delegate.conf));
                }
            }
        }
    }
}
