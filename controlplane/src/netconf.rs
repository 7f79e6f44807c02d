//! `net-conf.json`, read as flannel reads it.
//!
//! Flannel's parser ignores the case of keys, ignores unknown keys, lets the last of several equal keys win and
//! treats `null` as "not given" for numbers and booleans; files in the wild rely on it. What flannel accepts but
//! this version cannot do is refused by name: an option that is silently ignored is a bug that someone else finds.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
pub use ripstop_fib::Dscp;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::family::{Family, PerFamily};

/// The kernel's default VXLAN port, used when `Port` is 0 or absent.
pub const VXLAN_PORT_DEFAULT: u16 = 8472;
/// Flannel's port for the `udp` backend.
pub const UDP_PORT_DEFAULT: u16 = 8285;

/// A checked network configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConf {
    /// The network that all IPv4 pod subnets come from, host bits clear; none without IPv4.
    pub network: Option<Ipv4Net>,
    /// The same for IPv6.
    pub network6: Option<Ipv6Net>,
    /// How packets reach other nodes.
    pub backend: Backend,
    /// The priority bits of outer headers.
    pub dscp: Dscp,
    /// Masquerade and forward rules are kept in nftables instead of iptables.
    pub nftables: bool,
}

/// How packets reach other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Not at all: there are leases and nothing else.
    Alloc,
    /// By plain routes through the other nodes.
    HostGw,
    /// In VXLAN.
    Vxlan(Vxlan),
    /// As IP in IP.
    Ipip {
        /// Nodes on the same link are reached by plain routes.
        direct_routing: bool,
    },
    /// As IP in UDP.
    Udp {
        /// UDP port.
        port: u16,
    },
}

/// The `vxlan` backend's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// MTU of the underlay, when given; pods get less by the overhead. Otherwise the interface's.
    pub mtu: Option<u32>,
    /// Whether the kernel's VXLAN device learns addresses from packets.
    pub learning: bool,
    /// Whether firewall marks travel along (group policy extension).
    pub gbp: bool,
    /// Nodes on the same link are reached by plain routes.
    pub direct_routing: bool,
}

impl Backend {
    /// Its name in `net-conf.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alloc => "alloc",
            Self::HostGw => "host-gw",
            Self::Vxlan(_) => "vxlan",
            Self::Ipip { .. } => "ipip",
            Self::Udp { .. } => "udp",
        }
    }

    /// Its tunnel's settings, if the tunnel is VXLAN.
    pub fn vxlan(self) -> Option<Vxlan> {
        match self {
            Self::Vxlan(vxlan) => Some(vxlan),
            Self::Alloc | Self::HostGw | Self::Ipip { .. } | Self::Udp { .. } => None,
        }
    }

    /// Packets to at least some nodes are encapsulated.
    pub fn is_tunnel(self) -> bool {
        match self {
            Self::Vxlan(_) | Self::Ipip { .. } | Self::Udp { .. } => true,
            Self::Alloc | Self::HostGw => false,
        }
    }

    /// Which nodes are reached by plain routes.
    pub fn direct(self) -> Direct {
        match self {
            Self::HostGw => Direct::All,
            Self::Vxlan(Vxlan { direct_routing, .. }) | Self::Ipip { direct_routing } => {
                if direct_routing {
                    Direct::OnLink
                } else {
                    Direct::None
                }
            }
            Self::Alloc | Self::Udp { .. } => Direct::None,
        }
    }

    /// What a packet grows by: for VXLAN the outer IP, UDP and VXLAN headers and the inner Ethernet header.
    pub fn overhead(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Alloc | Self::HostGw, _) => 0,
            (Self::Vxlan(_), Family::V4) => 50,
            (Self::Vxlan(_), Family::V6) => 70,
            (Self::Ipip { .. }, _) => 20,
            (Self::Udp { .. }, _) => 28,
        }
    }
}

/// Which nodes are reached by plain routes instead of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// None.
    None,
    /// Those that the kernel's routing reaches without a gateway.
    OnLink,
    /// All.
    All,
}

impl NetConf {
    /// The pod network of one family; none where the family is off.
    pub fn network(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.network.map(IpNet::V4),
            Family::V6 => self.network6.map(IpNet::V6),
        }
    }

    /// The families that are on.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        Family::ALL
            .into_iter()
            .filter(|&family| self.network(family).is_some())
    }

    /// MTU of the pods and of the tunnel devices, above an underlay of `underlay_mtu`.
    pub fn pod_mtu(&self, family: Family, underlay_mtu: u32) -> u32 {
        self.backend
            .vxlan()
            .and_then(|vxlan| vxlan.mtu)
            .unwrap_or(underlay_mtu)
            .saturating_sub(self.backend.overhead(family))
    }
}

/// Why a network configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetConfError {
    /// The file cannot be read.
    #[error(
        "network configuration {path}: {source}: create it, or name another with --net-config-path"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is there, its content is not usable.
    #[error("network configuration {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<NetConfError>,
    },
    /// Not JSON, or not an object.
    #[error("error parsing subnet config: {0}")]
    Json(#[from] serde_json::Error),
    /// A key has a value of the wrong type or form.
    #[error("error parsing subnet config: {key}: {problem}")]
    Value {
        /// The key, with its parent.
        key: &'static str,
        /// What was expected.
        problem: String,
    },
    /// Both families are switched off.
    #[error(
        "none defined stack: EnableIPv4 and EnableIPv6 are false; set at least one of them to true"
    )]
    NoStack,
    /// The network is not given.
    #[error(
        "please define a correct Network parameter in the flannel config, like \"Network\": \"10.244.0.0/16\""
    )]
    NoNetwork,
    /// The IPv6 network is not given.
    #[error(
        "please define a correct IPv6Network parameter in the flannel config, like \"IPv6Network\": \"fd00:10:244::/48\""
    )]
    NoNetwork6,
    /// Subnets do not fit where nodes choose them from; flannel's words.
    #[error("{0}")]
    Pool(String),
    /// The backend is IPv4's alone.
    #[error(
        "the {backend} backend carries IPv4 only, as in flannel: set \"EnableIPv6\": false, or use \"Backend\": {{\"Type\": \"vxlan\"}} or \"host-gw\""
    )]
    Ipv4Only {
        /// Its name.
        backend: &'static str,
    },
    /// Flannel itself does not know the backend.
    #[error(
        "unknown backend type: {0}: set Backend.Type to one of vxlan, ipip, udp, host-gw, alloc"
    )]
    UnknownBackend(String),
    /// Flannel knows it, this version does not.
    #[error("{what} is not implemented in this version of Ripstop: {fix}")]
    Unsupported {
        /// The setting.
        what: String,
        /// What to write instead.
        fix: &'static str,
    },
}

/// Flannel's registered backends that this version does not have.
const FOREIGN_BACKENDS: [&str; 4] = ["extension", "ipsec", "tencent-vpc", "wireguard"];

impl NetConf {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, NetConfError> {
        let bytes = std::fs::read(path).map_err(|source| NetConfError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&bytes).map_err(|source| NetConfError::File {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// Checks the text of a configuration.
    pub fn parse(bytes: &[u8]) -> Result<Self, NetConfError> {
        Self::read(bytes).map(|(conf, _)| conf)
    }

    /// Checks the text of a configuration by which nodes choose their own subnets, and from where.
    pub fn parse_with_pools(bytes: &[u8]) -> Result<(Self, PerFamily<Option<Pool>>), NetConfError> {
        let (conf, bounds) = Self::read(bytes)?;
        let mut pools = PerFamily::default();
        for family in conf.families() {
            if let Some(network) = conf.network(family) {
                *pools.get_mut(family) = Some(Pool::new(network, *bounds.get(family))?);
            }
        }
        Ok((conf, pools))
    }

    fn read(bytes: &[u8]) -> Result<(Self, PerFamily<Bounds>), NetConfError> {
        let entries = object(serde_json::from_slice(bytes)?, "the file")?;
        let mut ipv4 = true;
        let mut ipv6 = false;
        let mut nftables = false;
        let (mut network, mut network6) = (None, None);
        let mut bounds = PerFamily::<Bounds>::default();
        // Flannel's default when the key is absent, whatever its documentation says.
        let mut backend = RawBackend {
            kind: Some("udp".to_owned()),
            entries: Vec::new(),
        };
        for (key, value) in entries {
            let key = key.to_ascii_lowercase();
            match key.as_str() {
                "enableipv4" => boolean("EnableIPv4", &value, &mut ipv4)?,
                "enableipv6" => boolean("EnableIPv6", &value, &mut ipv6)?,
                "enablenftables" => boolean("EnableNFTables", &value, &mut nftables)?,
                "network" => network = Some(ipv4_network(&value)?),
                "ipv6network" => network6 = Some(cidr("IPv6Network", &value)?),
                // Subnet allocation is the etcd source's; the types are checked all the same, as flannel does.
                "subnetlen" => unsigned("SubnetLen", &value, &mut bounds.v4.len)?,
                "ipv6subnetlen" => unsigned("IPv6SubnetLen", &value, &mut bounds.v6.len)?,
                "subnetmin" => bounds.v4.min = address("SubnetMin", &value)?,
                "subnetmax" => bounds.v4.max = address("SubnetMax", &value)?,
                "ipv6subnetmin" => bounds.v6.min = address("IPv6SubnetMin", &value)?,
                "ipv6subnetmax" => bounds.v6.max = address("IPv6SubnetMax", &value)?,
                "backend" => backend = RawBackend::parse(value)?,
                _ => {}
            }
        }
        if !ipv4 && !ipv6 {
            return Err(NetConfError::NoStack);
        }
        let (backend, dscp) = backend.check()?;
        let given = network.filter(|network| network.prefix_len() > 0);
        if ipv4 && given.is_none() {
            return Err(NetConfError::NoNetwork);
        }
        let given6 = match network6.filter(|network| ipv6 && network.prefix_len() > 0) {
            Some(network) => Some(ipv6_network(network)?),
            None if ipv6 => return Err(NetConfError::NoNetwork6),
            None => None,
        };
        if let Some(vxlan) = backend.vxlan() {
            // Names of interfaces end at 15 characters (IFNAMSIZ): "flannel." and "flannel-v6." leave this much.
            let (name, max) = match ipv6 {
                true => ("flannel-v6", 9_999),
                false => ("flannel", 9_999_999),
            };
            if vxlan.vni > max {
                return Err(NetConfError::Value {
                    key: "Backend.VNI",
                    problem: format!(
                        "{}: the device {name}.{} would have a longer name than the kernel allows: use 1 to {max}",
                        vxlan.vni, vxlan.vni
                    ),
                });
            }
        }
        if let (true, Backend::Ipip { .. } | Backend::Udp { .. }) = (ipv6, backend) {
            return Err(NetConfError::Ipv4Only {
                backend: backend.name(),
            });
        }
        let conf = Self {
            network: given.filter(|_| ipv4),
            network6: given6,
            backend,
            dscp,
            nftables,
        };
        Ok((conf, bounds))
    }
}

/// Where nodes choose their subnets from, when they do that themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Prefix length of each subnet.
    pub len: u8,
    /// The first that may be chosen.
    pub min: IpAddr,
    /// The last.
    pub max: IpAddr,
}

/// `SubnetLen`, `SubnetMin` and `SubnetMax` of a family as they stand in the file; 0 is not given.
#[derive(Debug, Clone, Copy, Default)]
struct Bounds {
    len: u64,
    min: Option<IpAddr>,
    max: Option<IpAddr>,
}

impl Pool {
    /// Flannel's checks and defaults, in its order.
    fn new(network: IpNet, bounds: Bounds) -> Result<Self, NetConfError> {
        let problem = NetConfError::Pool;
        let (family, have) = (Family::of_net(network), network.prefix_len());
        let (bits, prefix, name) = match family {
            Family::V4 => (family.bits(), "", "network"),
            Family::V6 => (family.bits(), "IPv6", "IPv6Network"),
        };
        let usual = match family {
            Family::V4 => 24,
            Family::V6 => 64,
        };
        let len = match u8::try_from(bounds.len) {
            // Not given. A node needs four addresses, and the first of the subnets is not used.
            Ok(0) if have > bits - 4 => {
                return Err(problem(format!(
                    "{name} is too small. Minimum useful network prefix is /{}",
                    bits - 4
                )));
            }
            Ok(0) if have <= usual - 2 => usual,
            Ok(0) => have + 2,
            Ok(len) if len <= bits - 2 => len,
            _ => {
                return Err(problem(format!(
                    "SubnetLen must be less than /{}",
                    bits - 1
                )));
            }
        };
        if len < have + 2 {
            return Err(problem(
                "network must be able to accommodate at least four subnets".to_owned(),
            ));
        }
        let size = 1 << (bits - len);
        let first = number(network.network());
        let last = number(network.broadcast());
        let bound = |what: &str, given: Option<IpAddr>, default: u128| {
            let Some(given) = given else {
                return Ok(address_of(family, default));
            };
            if !network.contains(&given) {
                return Err(problem(format!(
                    "{prefix}{what} is not in the range of the {prefix}Network"
                )));
            }
            if !number(given).is_multiple_of(size) {
                return Err(problem(format!(
                    "{prefix}{what} is not on a SubnetLen boundary: {given}"
                )));
            }
            Ok(given)
        };
        Ok(Self {
            len,
            min: bound("SubnetMin", bounds.min, first + size)?,
            max: bound("SubnetMax", bounds.max, last - (size - 1))?,
        })
    }

    /// Whether a subnet could have been chosen from here.
    pub fn contains(&self, subnet: IpNet) -> bool {
        let network = subnet.network();
        Family::of(self.min) == Family::of(network)
            && subnet.prefix_len() == self.len
            && (self.min..=self.max).contains(&network)
    }

    /// The first subnet.
    pub fn first(&self) -> Option<IpNet> {
        self.at(number(self.min))
    }

    /// The first subnet of which nothing comes before or at `address`.
    pub fn after(&self, address: IpAddr) -> Option<IpNet> {
        let size = 1 << (Family::of(self.min).bits() - self.len);
        let next = (number(address) / size).checked_add(1)?.checked_mul(size)?;
        self.at(next.max(number(self.min)))
    }

    fn at(&self, first: u128) -> Option<IpNet> {
        let address = address_of(Family::of(self.min), first);
        let net = IpNet::new(address, self.len).ok();
        net.filter(|_| first <= number(self.max))
    }
}

/// An address as a number.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address with a number, which is one of the family.
fn address_of(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

struct RawBackend {
    kind: Option<String>,
    entries: Vec<(String, Json)>,
}

impl RawBackend {
    fn parse(value: Json) -> Result<Self, NetConfError> {
        let entries = match value {
            Json::Null => Vec::new(),
            value @ (Json::Bool(_)
            | Json::Number(_)
            | Json::String(_)
            | Json::Array
            | Json::Object(_)) => object(value, "Backend")?,
        };
        let mut kind = None;
        for (key, value) in &entries {
            if key.eq_ignore_ascii_case("type") {
                match value {
                    Json::String(text) => kind = Some(text.clone()),
                    Json::Null => {}
                    other @ (Json::Bool(_) | Json::Number(_) | Json::Array | Json::Object(_)) => {
                        return Err(wrong("Backend.Type", "a string", other));
                    }
                }
            }
        }
        Ok(Self { kind, entries })
    }

    fn check(&self) -> Result<(Backend, Dscp), NetConfError> {
        let kind = self.kind.as_deref().unwrap_or_default().to_lowercase();
        let backend = match kind.as_str() {
            "alloc" => Backend::Alloc,
            "host-gw" => Backend::HostGw,
            "vxlan" => Backend::Vxlan(self.vxlan()?),
            "ipip" => {
                let mut direct_routing = false;
                for value in self.values("directrouting") {
                    boolean("Backend.DirectRouting", value, &mut direct_routing)?;
                }
                Backend::Ipip { direct_routing }
            }
            "udp" => Backend::Udp {
                port: self.port(UDP_PORT_DEFAULT)?,
            },
            foreign if FOREIGN_BACKENDS.contains(&foreign) => {
                return Err(NetConfError::Unsupported {
                    what: format!("backend type {foreign:?}"),
                    fix: "set Backend.Type to one of vxlan, ipip, udp, host-gw, alloc",
                });
            }
            _ => return Err(NetConfError::UnknownBackend(kind)),
        };
        Ok((backend, self.dscp()?))
    }

    /// Every value of a key, in any case of its letters.
    fn values(&self, key: &str) -> impl Iterator<Item = &Json> {
        self.entries
            .iter()
            .filter(move |(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value)
    }

    fn port(&self, default: u16) -> Result<u16, NetConfError> {
        let mut port = 0;
        for value in self.values("port") {
            integer("Backend.Port", value, &mut port)?;
        }
        match u16::try_from(port) {
            Ok(0) => Ok(default),
            Ok(port) => Ok(port),
            Err(_) => Err(NetConfError::Value {
                key: "Backend.Port",
                problem: format!("{port} is out of range: use 1 to 65535, or 0 for {default}"),
            }),
        }
    }

    /// `DSCP`, which is Ripstop's own key: flannel ignores it.
    fn dscp(&self) -> Result<Dscp, NetConfError> {
        let mut dscp = Dscp::Fixed(0);
        for value in self.values("dscp") {
            dscp = match value {
                Json::Null => continue,
                Json::String(text) if text.eq_ignore_ascii_case("inherit") => Dscp::Inherit,
                Json::Number(number) => {
                    let fixed = number.as_u64().and_then(|dscp| u8::try_from(dscp).ok());
                    let fixed = fixed.filter(|dscp| *dscp < 64);
                    Dscp::Fixed(fixed.ok_or_else(|| NetConfError::Value {
                        key: "Backend.DSCP",
                        problem: format!("{number} is out of range: use 0 to 63, or \"inherit\""),
                    })?)
                }
                other @ (Json::Bool(_) | Json::String(_) | Json::Array | Json::Object(_)) => {
                    return Err(wrong("Backend.DSCP", "0 to 63, or \"inherit\"", other));
                }
            };
        }
        Ok(dscp)
    }

    fn vxlan(&self) -> Result<Vxlan, NetConfError> {
        let (mut vni, mut mtu) = (1, 0);
        let (mut gbp, mut learning, mut direct_routing) = (false, false, false);
        for (key, value) in &self.entries {
            match key.to_ascii_lowercase().as_str() {
                "vni" => integer("Backend.VNI", value, &mut vni)?,
                "mtu" => integer("Backend.MTU", value, &mut mtu)?,
                "gbp" => boolean("Backend.GBP", value, &mut gbp)?,
                "learning" => boolean("Backend.Learning", value, &mut learning)?,
                "directrouting" => boolean("Backend.DirectRouting", value, &mut direct_routing)?,
                // Name and MacPrefix are for Windows nodes, which share the file.
                _ => {}
            }
        }
        let range = |key, problem: String| NetConfError::Value { key, problem };
        let vni = u32::try_from(vni)
            .ok()
            .filter(|vni| (1..1 << 24).contains(vni))
            .ok_or_else(|| {
                range(
                    "Backend.VNI",
                    format!("{vni} is out of range: use 1 to 16777215"),
                )
            })?;
        let mtu = match mtu {
            0 => None,
            given => Some(
                u32::try_from(given)
                    .ok()
                    .filter(|mtu| (118..=65535).contains(mtu))
                    .ok_or_else(|| {
                        range(
                            "Backend.MTU",
                            format!("{given} is out of range: use 118 to 65535, or 0"),
                        )
                    })?,
            ),
        };
        Ok(Vxlan {
            vni,
            port: self.port(VXLAN_PORT_DEFAULT)?,
            mtu,
            learning,
            gbp,
            direct_routing,
        })
    }
}

/// A JSON value that keeps the order and the repetitions of keys, which decide what flannel sees.
#[derive(Debug)]
enum Json {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    String(String),
    Array,
    Object(Vec<(String, Json)>),
}

impl Json {
    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array => "an array",
            Self::Object(_) => "an object",
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;
        impl<'de> Visitor<'de> for AnyValue {
            type Value = Json;

            fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Number(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Number(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(serde_json::Number::from_f64(value).map_or(Json::Null, Json::Number))
            }
            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::String(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
                while items.next_element::<Json>()?.is_some() {}
                Ok(Json::Array)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Json::Object(entries))
            }
        }
        deserializer.deserialize_any(AnyValue)
    }
}

fn wrong(key: &'static str, expected: &str, found: &Json) -> NetConfError {
    NetConfError::Value {
        key,
        problem: format!("expected {expected}, found {}", found.name()),
    }
}

fn object(value: Json, key: &'static str) -> Result<Vec<(String, Json)>, NetConfError> {
    match value {
        Json::Object(entries) => Ok(entries),
        Json::Null => Ok(Vec::new()),
        other @ (Json::Bool(_) | Json::Number(_) | Json::String(_) | Json::Array) => {
            Err(wrong(key, "an object", &other))
        }
    }
}

fn boolean(key: &'static str, value: &Json, into: &mut bool) -> Result<(), NetConfError> {
    match value {
        Json::Bool(given) => *into = *given,
        Json::Null => {}
        other @ (Json::Number(_) | Json::String(_) | Json::Array | Json::Object(_)) => {
            return Err(wrong(key, "true or false", other));
        }
    }
    Ok(())
}

fn integer(key: &'static str, value: &Json, into: &mut i64) -> Result<(), NetConfError> {
    match value {
        Json::Null => Ok(()),
        Json::Number(number) => match number.as_i64() {
            Some(given) => {
                *into = given;
                Ok(())
            }
            None => Err(NetConfError::Value {
                key,
                problem: format!("{number} is not an integer that fits"),
            }),
        },
        other @ (Json::Bool(_) | Json::String(_) | Json::Array | Json::Object(_)) => {
            Err(wrong(key, "an integer", other))
        }
    }
}

fn unsigned(key: &'static str, value: &Json, into: &mut u64) -> Result<(), NetConfError> {
    let mut given = i64::try_from(*into).unwrap_or(i64::MAX);
    integer(key, value, &mut given)?;
    *into = u64::try_from(given).map_err(|_negative| NetConfError::Value {
        key,
        problem: format!("{given} is negative"),
    })?;
    Ok(())
}

fn cidr(key: &'static str, value: &Json) -> Result<IpNet, NetConfError> {
    let Json::String(text) = value else {
        return Err(wrong(key, "a prefix like \"10.244.0.0/16\"", value));
    };
    text.parse().map_err(|_not_one| NetConfError::Value {
        key,
        problem: format!("invalid CIDR address: {text}"),
    })
}

fn ipv4_network(value: &Json) -> Result<Ipv4Net, NetConfError> {
    match cidr("Network", value)? {
        IpNet::V4(network) => Ok(network.trunc()),
        IpNet::V6(network) => Err(NetConfError::Value {
            key: "Network",
            problem: format!("invalid IPv4 CIDR format: {network}"),
        }),
    }
}

/// Flannel does not look at what it does not use.
fn ipv6_network(network: IpNet) -> Result<Ipv6Net, NetConfError> {
    match network {
        IpNet::V6(network) => Ok(network.trunc()),
        IpNet::V4(network) => Err(NetConfError::Value {
            key: "IPv6Network",
            problem: format!("invalid IPv6 CIDR format: {network}"),
        }),
    }
}

/// An address; the unspecified one is none, as in flannel.
fn address(key: &'static str, value: &Json) -> Result<Option<IpAddr>, NetConfError> {
    let Json::String(text) = value else {
        return Err(wrong(key, "an IP address", value));
    };
    let address = if key.starts_with("IPv6") {
        text.parse().map(IpAddr::V6).ok()
    } else {
        text.parse().map(IpAddr::V4).ok()
    };
    match address {
        Some(address) => Ok(Some(address).filter(|address| !address.is_unspecified())),
        None => Err(NetConfError::Value {
            key,
            problem: format!("invalid IP address: {text:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> NetConf {
        NetConf::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn vxlan(text: &str) -> Vxlan {
        parsed(&format!(
            r#"{{"Network":"10.244.0.0/16","Backend":{text}}}"#
        ))
        .backend
        .vxlan()
        .expect("the type is vxlan")
    }

    #[test]
    fn defaults_are_flannels() {
        let conf = parsed(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
        assert_eq!(conf.network, Some("10.244.0.0/16".parse().unwrap()));
        assert_eq!((conf.network6, conf.dscp), (None, Dscp::Fixed(0)));
        assert!(!conf.nftables);
        assert_eq!(
            conf.backend,
            Backend::Vxlan(Vxlan {
                vni: 1,
                port: 8472,
                mtu: None,
                learning: false,
                gbp: false,
                direct_routing: false,
            })
        );
        // An absent backend is udp, whatever flannel's documentation says.
        let conf = parsed(r#"{"Network":"10.244.0.0/16"}"#);
        assert_eq!(conf.backend, Backend::Udp { port: 8285 });
    }

    #[test]
    fn pools_are_flannels() {
        let pool = |text: &str| {
            let text = format!(r#"{{{text},"Backend":{{"Type":"vxlan"}}}}"#);
            NetConf::parse_with_pools(text.as_bytes()).map(|(_, pools)| pools)
        };
        let four = |text: &str| {
            let pools = pool(text).unwrap();
            let pool = pools.v4.unwrap();
            format!("/{} {} {}", pool.len, pool.min, pool.max)
        };
        let six = |text: &str| {
            let text = format!(r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":{text}"#);
            pool(&text).map(|pools| {
                let pool = pools.v6.unwrap();
                format!("/{} {} {}", pool.len, pool.min, pool.max)
            })
        };
        for (text, expected) in [
            (r#""Network":"10.5.0.0/16""#, "/24 10.5.1.0 10.5.255.0"),
            (r#""Network":"10.5.0.0/22""#, "/24 10.5.1.0 10.5.3.0"),
            (r#""Network":"10.5.0.0/23""#, "/25 10.5.0.128 10.5.1.128"),
            (r#""Network":"10.5.0.0/28""#, "/30 10.5.0.4 10.5.0.12"),
            (
                r#""Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0""#,
                "/20 10.10.0.0 10.99.0.0",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetMin":"0.0.0.0","subnetlen":null"#,
                "/24 10.5.1.0 10.5.255.0",
            ),
        ] {
            assert_eq!(four(text), expected, "{text}");
        }
        for (text, expected) in [
            (r#""fd00:5::/48""#, "/64 fd00:5:0:1:: fd00:5:0:ffff::"),
            (r#""fd00:5::/62""#, "/64 fd00:5:0:1:: fd00:5:0:3::"),
            (
                r#""fd00:5::/63""#,
                "/65 fd00:5:0:0:8000:: fd00:5:0:1:8000::",
            ),
            (
                r#""fd00:5::/48","IPv6SubnetLen":56,"IPv6SubnetMax":"fd00:5:0:700::""#,
                "/56 fd00:5:0:100:: fd00:5:0:700::",
            ),
        ] {
            assert_eq!(six(text).unwrap(), expected, "{text}");
        }
        for (text, expected) in [
            (
                r#""SubnetLen":24"#,
                "please define a correct Network parameter in the flannel config",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetLen":31"#,
                "SubnetLen must be less than /31",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetLen":256"#,
                "SubnetLen must be less than /31",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetLen":17"#,
                "network must be able to accommodate at least four subnets",
            ),
            (
                r#""Network":"10.5.0.0/29""#,
                "network is too small. Minimum useful network prefix is /28",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetMin":"10.4.0.0""#,
                "SubnetMin is not in the range of the Network",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetMax":"10.6.0.0""#,
                "SubnetMax is not in the range of the Network",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetMin":"10.5.1.1""#,
                "SubnetMin is not on a SubnetLen boundary: 10.5.1.1",
            ),
            (
                r#""Network":"10.5.0.0/16","SubnetMax":"10.5.1.128""#,
                "SubnetMax is not on a SubnetLen boundary: 10.5.1.128",
            ),
        ] {
            let error = pool(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
        for (text, expected) in [
            (
                r#""::/0""#,
                "please define a correct IPv6Network parameter in the flannel config",
            ),
            (
                r#""fd00:5::/48","IPv6SubnetLen":127"#,
                "SubnetLen must be less than /127",
            ),
            (
                r#""fd00:5::/48","IPv6SubnetLen":49"#,
                "network must be able to accommodate at least four subnets",
            ),
            (
                r#""fd00:5::/125""#,
                "IPv6Network is too small. Minimum useful network prefix is /124",
            ),
            (
                r#""fd00:5::/48","IPv6SubnetMin":"fd00:6::""#,
                "IPv6SubnetMin is not in the range of the IPv6Network",
            ),
            (
                r#""fd00:5::/48","IPv6SubnetMax":"fd00:5::1""#,
                "IPv6SubnetMax is not on a SubnetLen boundary: fd00:5::1",
            ),
        ] {
            let error = six(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn accepts_what_flannel_accepts() {
        let default = Vxlan {
            vni: 1,
            port: 8472,
            mtu: None,
            learning: false,
            gbp: false,
            direct_routing: false,
        };
        let cases: &[(&str, Vxlan)] = &[
            (r#"{"type":"VXLAN","vni":7}"#, Vxlan { vni: 7, ..default }),
            (r#"{"TYPE":"vxlan","Port":0}"#, default),
            (
                r#"{"Type":"vxlan","Port":4789,"MTU":9000}"#,
                Vxlan {
                    port: 4789,
                    mtu: Some(9000),
                    ..default
                },
            ),
            (
                r#"{"Type":"vxlan","VNI":5,"vni":6}"#,
                Vxlan { vni: 6, ..default },
            ),
            (
                r#"{"Type":"vxlan","VNI":5,"vni":null}"#,
                Vxlan { vni: 5, ..default },
            ),
            (
                r#"{"Type":"vxlan","Learning":true,"GBP":false,"DirectRouting":null}"#,
                Vxlan {
                    learning: true,
                    ..default
                },
            ),
            (
                r#"{"Type":"vxlan","gbp":true,"directrouting":true}"#,
                Vxlan {
                    gbp: true,
                    direct_routing: true,
                    ..default
                },
            ),
            (
                r#"{"Type":"vxlan","Name":"flannel.4096","MacPrefix":"0E-2A"}"#,
                default,
            ),
            (
                r#"{"Type":"vxlan","Unheard":{"of":[1,{"a":null}]}}"#,
                default,
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(vxlan(text), *expected, "{text}");
        }
    }

    #[test]
    fn keys_fold_case_last_wins_and_host_bits_are_cleared() {
        let text = r#"{"network":"10.0.0.0/8","NETWORK":"10.244.7.9/16","EnableIPv4":null,"EnableIPv6":false,
            "enableNFTables":true,"SubnetLen":24,"SubnetMin":"10.244.1.0","unknown":[1,2],"backend":{"Type":"udp"},"Backend":{"Type":"vxlan"}}"#;
        assert_eq!(parsed(text).network, Some("10.244.0.0/16".parse().unwrap()));
        assert!(parsed(text).nftables);
    }

    #[test]
    fn every_backend_is_read() {
        let backend = |text: &str| {
            parsed(&format!(
                r#"{{"Network":"10.244.0.0/16","Backend":{text}}}"#
            ))
            .backend
        };
        let ipip = |direct_routing| Backend::Ipip { direct_routing };
        for (text, expected) in [
            (r#"{"Type":"alloc"}"#, Backend::Alloc),
            (r#"{"Type":"Host-GW"}"#, Backend::HostGw),
            (r#"{"Type":"ipip"}"#, ipip(false)),
            (r#"{"Type":"ipip","DIRECTROUTING":true}"#, ipip(true)),
            (r#"{"Type":"udp"}"#, Backend::Udp { port: 8285 }),
            (r#"{"Type":"udp","port":9000}"#, Backend::Udp { port: 9000 }),
            // A key of another backend is an unknown one.
            (r#"{"Type":"udp","VNI":"x"}"#, Backend::Udp { port: 8285 }),
        ] {
            assert_eq!(backend(text), expected, "{text}");
        }
    }

    #[test]
    fn families_are_switched_on_one_by_one() {
        let vxlan = r#""Backend":{"Type":"vxlan"}"#;
        let both = parsed(&format!(
            r#"{{"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::7/48","EnableIPv6":true,{vxlan}}}"#
        ));
        assert_eq!(both.families().count(), 2);
        assert_eq!(both.network6, Some("fd00:10:244::/48".parse().unwrap()));
        let mtu = |family| both.pod_mtu(family, 1500);
        assert_eq!((mtu(Family::V4), mtu(Family::V6)), (1450, 1430));
        let six = parsed(&format!(
            r#"{{"EnableIPv4":false,"IPv6Network":"fd00:10:244::/48","EnableIPv6":true,{vxlan}}}"#
        ));
        assert_eq!(six.families().collect::<Vec<_>>(), [Family::V6]);
        let four = parsed(&format!(
            r#"{{"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48",{vxlan}}}"#
        ));
        assert_eq!(four.network6, None);
    }

    #[test]
    fn dscp_is_fixed_or_inherited() {
        let dscp = |text: &str| {
            NetConf::parse(
                format!(
                    r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"ipip","dscp":{text}}}}}"#
                )
                .as_bytes(),
            )
            .map(|conf| conf.dscp)
        };
        assert_eq!(dscp("46").unwrap(), Dscp::Fixed(46));
        assert_eq!(dscp("null").unwrap(), Dscp::Fixed(0));
        assert_eq!(dscp("\"inherit\"").unwrap(), Dscp::Inherit);
        for bad in ["64", "-1", "1.5", "\"outer\"", "true"] {
            let error = dscp(bad).expect_err(bad).to_string();
            assert!(error.contains("Backend.DSCP"), "{bad}: {error}");
        }
    }

    #[test]
    fn refuses_with_a_reason() {
        let vxlan = r#""Backend":{"Type":"vxlan"}"#;
        let cases: &[(String, &str)] = &[
            (String::new(), "error parsing subnet config"),
            ("[]".into(), "expected an object"),
            (
                format!(r#"{{"Network":"10.244.0.0/16",{vxlan}}} x"#),
                "trailing",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16",{vxlan}}} // x"#),
                "trailing",
            ),
            (
                format!(r#"{{"Network":"",{vxlan}}}"#),
                "invalid CIDR address",
            ),
            (format!(r#"{{"Network":null,{vxlan}}}"#), "found null"),
            (
                format!(r#"{{"Network":"fd00::/48",{vxlan}}}"#),
                "invalid IPv4 CIDR format",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0",{vxlan}}}"#),
                "invalid CIDR address: 10.244.0.0",
            ),
            (format!(r#"{{{vxlan}}}"#), "please define a correct Network"),
            (
                format!(r#"{{"Network":"10.244.0.0/16","EnableIPv4":false,{vxlan}}}"#),
                "none defined stack",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16","EnableIPv4":"yes",{vxlan}}}"#),
                "EnableIPv4",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,{vxlan}}}"#),
                "please define a correct IPv6Network",
            ),
            (
                format!(
                    r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"10.0.0.0/8",{vxlan}}}"#
                ),
                "invalid IPv6 CIDR format",
            ),
            (
                r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}}"#
                    .into(),
                "the ipip backend carries IPv4 only",
            ),
            (
                r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#.into(),
                "the udp backend carries IPv4 only",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16","SubnetLen":-1,{vxlan}}}"#),
                "SubnetLen",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16","SubnetLen":24.0,{vxlan}}}"#),
                "SubnetLen",
            ),
            (
                format!(r#"{{"Network":"10.244.0.0/16","SubnetMin":null,{vxlan}}}"#),
                "SubnetMin",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{}}"#.into(),
                "unknown backend type: ",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":null}"#.into(),
                "unknown backend type: ",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":7}"#.into(),
                "Backend: expected an object",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlann"}}"#.into(),
                "unknown backend type: vxlann",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777215}}"#.into(),
                "use 1 to 9999999",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":10000}}"#
                    .into(),
                "flannel-v6.10000 would have a longer name",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":70000}}"#.into(),
                "Backend.Port",
            ),
        ];
        for name in FOREIGN_BACKENDS {
            let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{name}"}}}}"#);
            let error = NetConf::parse(text.as_bytes()).expect_err(name).to_string();
            assert!(
                error.contains(&format!("backend type {name:?} is not implemented")),
                "{error}"
            );
        }
        for (text, wanted) in cases {
            let error = NetConf::parse(text.as_bytes()).expect_err(text).to_string();
            assert!(error.contains(wanted), "{text}: {error:?} lacks {wanted:?}");
        }
    }

    #[test]
    fn refuses_vxlan_settings_with_a_reason() {
        for (text, wanted) in [
            (r#"{"Type":"vxlan","GBP":1}"#, "Backend.GBP"),
            (
                r#"{"Type":"vxlan","DirectRouting":"yes"}"#,
                "Backend.DirectRouting",
            ),
            (r#"{"Type":"vxlan","VNI":16777216}"#, "Backend.VNI"),
            (r#"{"Type":"vxlan","VNI":"1"}"#, "Backend.VNI"),
            (r#"{"Type":"vxlan","Port":65536}"#, "Backend.Port"),
            (r#"{"Type":"vxlan","Port":1e3}"#, "Backend.Port"),
            (r#"{"Type":"vxlan","MTU":99}"#, "Backend.MTU"),
            (r#"{"Type":true}"#, "Backend.Type"),
        ] {
            let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{text}}}"#);
            let error = NetConf::parse(text.as_bytes())
                .expect_err(&text)
                .to_string();
            assert!(error.contains(wanted), "{text}: {error:?} lacks {wanted:?}");
        }
    }
}
