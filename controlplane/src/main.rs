//! The control-plane process: reads its configuration, starts the lease source, runs the loop.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::sync::atomic::AtomicBool;
use core::time::Duration;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory as _, FromArgMatches as _, Parser};
use ipnet::IpNet;
use ripstop_controlplane::conflist::ConflistFlags;
use ripstop_controlplane::family::PerFamily;
use ripstop_controlplane::health::Health;
use ripstop_controlplane::health::metrics::Scraper;
use ripstop_controlplane::health::server::{self, HealthFlags};
use ripstop_controlplane::health::watch::Watcher;
use ripstop_controlplane::interface::{Pattern, Selection};
use ripstop_controlplane::lease::etcd::flags::EtcdFlags;
use ripstop_controlplane::lease::etcd::{self, EtcdSource};
use ripstop_controlplane::lease::file::FileSource;
use ripstop_controlplane::lease::kept::Kept;
use ripstop_controlplane::lease::kube::annotations::{DEFAULT_PREFIX, Prefix};
use ripstop_controlplane::lease::kube::{self, KubeSource, events};
use ripstop_controlplane::lease::{LeaseSink, LeaseSource};
use ripstop_controlplane::logs::LogFlags;
use ripstop_controlplane::netconf::{Backend, NetConf};
use ripstop_controlplane::reconcile::{Reconciler, Settings};
use ripstop_controlplane::sys::{Signals, Wake, hostname};
use ripstop_controlplane::traffic::{self, Mode};
use ripstop_controlplane::{DEFAULT_RUN_DIR, detour, explained, goflags};

/// How long to ask which node this pod is on; then the kubelet starts us anew.
const POD_PATIENCE: Duration = Duration::from_secs(10);

/// Control plane of a Ripstop node: keeps the kernel's path and the workers' forwarding table as the leases say.
#[derive(Debug, Parser)]
#[command(name = "ripstop-controlplane", version)]
struct Flags {
    /// Network configuration, as flannel reads it
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/kube-flannel/net-conf.json"
    )]
    net_config_path: PathBuf,
    /// Leases of all nodes; watched [default: /etc/ripstop/leases.json, if it exists and no other source is named]
    #[arg(long, value_name = "FILE")]
    lease_file: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// This node's name [default: the host's, or with --kube-subnet-mgr that of the node of pod POD_NAME in POD_NAMESPACE]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Interface, or its address, for traffic between nodes; the first that exists is used
    #[arg(long, value_name = "NAME|IP")]
    iface: Vec<String>,
    /// Regular expression for an address of the interface, or its name; looked at after --iface
    #[arg(long, value_name = "REGEX")]
    iface_regex: Vec<Pattern>,
    /// The interface is the one by which this address is reached; looked at last
    #[arg(long, value_name = "IP")]
    iface_can_reach: Option<IpAddr>,
    /// Address that other nodes reach this one by
    #[arg(long, value_name = "IP")]
    public_ip: Option<Ipv4Addr>,
    /// IPv6 address that other nodes reach this one by
    #[arg(long, value_name = "IP")]
    public_ipv6: Option<Ipv6Addr>,
    /// Take the leases from the nodes of the Kubernetes cluster
    #[arg(long)]
    kube_subnet_mgr: bool,
    /// URL of the Kubernetes API server [default: the kubeconfig's, or the pod's own cluster]
    #[arg(long, value_name = "URL")]
    kube_api_url: Option<String>,
    /// Kubeconfig with the API server and credentials [default: the pod's service account]
    #[arg(long, value_name = "FILE")]
    kubeconfig_file: Option<PathBuf>,
    /// What the names of the nodes' annotations begin with
    #[arg(long, value_name = "PREFIX", default_value = DEFAULT_PREFIX)]
    kube_annotation_prefix: String,
    /// Set the node's condition NetworkUnavailable to False once it can forward
    #[arg(long, value_name = "BOOL", default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    set_node_network_unavailable: bool,
    /// Directory of the regions shared with the data plane
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Number of the routing table for the routes through rip0
    #[arg(long, value_name = "NUMBER", default_value_t = detour::TABLE, value_parser = clap::value_parser!(u32).range(1..))]
    route_table: u32,
    /// Drop what pods send in the name of nodes (nftables table inet ripstop-guard); off takes the table away
    #[arg(
        long,
        env = "RIPSTOP_GUARD",
        value_name = "on|off",
        default_value = "on"
    )]
    guard: Switch,
    /// Have pods talk to the outside in the name of their node
    #[arg(long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    ip_masq: bool,
    /// Leave the ports of masqueraded flows to the kernel's usual choice
    #[arg(long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    ip_masq_fully_random_disable: bool,
    /// Accept what is forwarded from and to pods
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    iptables_forward_rules: bool,
    /// How often masquerade and forward rules are looked at
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    iptables_resync: u64,
    /// Destination that pods reach with their own address; repeatable, or separated by commas
    #[arg(
        long,
        env = "RIPSTOP_NO_MASQUERADE",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = Exempt::parse
    )]
    no_masquerade: Vec<Exempt>,
    /// Where pods find this node's subnet [default: /run/flannel/subnet.env, but not written with --lease-file]
    #[arg(long, value_name = "FILE")]
    subnet_file: Option<PathBuf>,
    /// Keep a route that refuses what is for no pod of this node
    #[arg(long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    ip_blackhole_route: bool,
    #[command(flatten)]
    conflist: ConflistFlags,
    #[command(flatten)]
    health: HealthFlags,
    #[command(flatten)]
    logs: LogFlags,
}

/// Where leases are looked for if nothing is said about it.
const LEASE_FILE: &str = "/etc/ripstop/leases.json";

/// Where the leases are.
enum Source {
    Kube(Box<Kube>),
    File(PathBuf),
    Etcd(etcd::Access),
}

impl Flags {
    /// Leases come from one place.
    fn check_source(&self) -> Result<(), String> {
        let kube = self.kube_subnet_mgr.then_some("--kube-subnet-mgr");
        match (&self.lease_file, kube.or(self.etcd.given())) {
            (Some(_), Some(other)) => Err(format!(
                "--lease-file and {other} (or their FLANNELD_ variables) name two sources of leases: remove one of them"
            )),
            _ => Ok(()),
        }
    }

    fn source(&self) -> anyhow::Result<Source> {
        if self.kube_subnet_mgr {
            // As with flannel, whose unit files may have both.
            if let Some(flag) = self.etcd.given() {
                tracing::warn!("{flag} is not used with --kube-subnet-mgr");
            }
            return Ok(Source::Kube(Box::new(Kube::new(self)?)));
        }
        let usual = || PathBuf::from(LEASE_FILE);
        match (&self.lease_file, self.etcd.given()) {
            (Some(path), _) => Ok(Source::File(path.clone())),
            (None, None) if usual().exists() => Ok(Source::File(usual())),
            (None, _) => {
                let (access, odd) = self.etcd.access();
                for odd in odd {
                    tracing::warn!("{odd}");
                }
                Ok(Source::Etcd(access))
            }
        }
    }
}

/// A flag with a value, so that its environment variable can say either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

/// A prefix, or nothing: an environment variable may be set and empty.
#[derive(Debug, Clone)]
struct Exempt(Option<IpNet>);

impl Exempt {
    fn parse(text: &str) -> Result<Self, ipnet::AddrParseError> {
        let text = text.trim();
        let net = (!text.is_empty()).then(|| text.parse());
        net.transpose().map(Self)
    }
}

/// The flags as flannel takes them, and what is wrong with variables that are not used.
fn flags() -> Result<(Flags, Vec<String>), clap::Error> {
    let mut command = Flags::command();
    let mut args = goflags::rewrite(&command, std::env::args_os())
        .map_err(|error| command.error(ErrorKind::InvalidValue, error))?;
    let variable = |key: &str| std::env::var(key).ok();
    let problems = goflags::add_environment(&command, &mut args, variable);
    goflags::drop_empty(&mut args);
    let matches = command.try_get_matches_from_mut(args)?;
    let flags = Flags::from_arg_matches(&matches)?;
    flags
        .check_source()
        .map_err(|error| command.error(ErrorKind::ArgumentConflict, error))?;
    Ok((flags, problems))
}

fn main() -> ExitCode {
    let (flags, unused) = match flags() {
        Ok(flags) => flags,
        // As flannel does.
        Err(error) if error.kind() == ErrorKind::DisplayVersion => {
            let _nobody_reads = write!(std::io::stderr(), "{error}");
            return ExitCode::SUCCESS;
        }
        // Help goes to stdout and ends with 0, errors to stderr and with 2.
        Err(error) => error.exit(),
    };
    flags.logs.start();
    for problem in unused {
        tracing::warn!("{problem}");
    }
    match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", explained(&error));
            ExitCode::FAILURE
        }
    }
}

/// What `--kube-subnet-mgr` needs, checked.
struct Kube {
    server: kube::Server,
    prefix: Prefix,
}

impl Kube {
    fn new(flags: &Flags) -> anyhow::Result<Self> {
        let prefix =
            Prefix::new(&flags.kube_annotation_prefix).context("Failed to create SubnetManager")?;
        // There is no bounded queue to size; flannel's check is kept.
        if let Some(depth) = environment("EVENT_QUEUE_DEPTH") {
            anyhow::ensure!(
                depth.parse::<i64>().is_ok(),
                "env EVENT_QUEUE_DEPTH={depth} format error: it takes a number, and is not used"
            );
        }
        if environment("CONT_WHEN_CACHE_NOT_READY").is_some() {
            tracing::debug!(
                "CONT_WHEN_CACHE_NOT_READY is not used: the API server is waited for without an end"
            );
        }
        let url = flags.kube_api_url.as_deref();
        let server = kube::Server::new(url, flags.kubeconfig_file.as_deref())
            .and_then(|server| server.load_blocking().map(|_config| server))
            .context("Failed to create SubnetManager")?;
        Ok(Self { server, prefix })
    }

    fn node_of_pod(&self) -> anyhow::Result<String> {
        let (Some(pod), Some(namespace)) = (environment("POD_NAME"), environment("POD_NAMESPACE"))
        else {
            anyhow::bail!(
                "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME or --node-name"
            );
        };
        Ok(kube::node_of_pod(
            &self.server,
            &namespace,
            &pod,
            POD_PATIENCE,
        )?)
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn run(flags: Flags) -> anyhow::Result<()> {
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::take_over().context("take over SIGTERM and SIGINT")?;
    let health = Arc::new(Health::new().context("prepare metrics")?);
    // Before anything that may have to be waited for.
    if let Some(listener) = server::listen(&flags.health)? {
        let scraper = Scraper::new(&flags.run_dir, Some(Arc::clone(&health)));
        server::start(listener, Arc::clone(&health), scraper)?;
    }
    let source = flags.source()?;
    let (conf, pools) = match &source {
        Source::Kube(_) | Source::File(_) => {
            (NetConf::load(&flags.net_config_path)?, PerFamily::default())
        }
        Source::Etcd(access) => {
            let found = etcd::wait_for_config(access, &flags.run_dir, &signals);
            match found.context("wait for the network configuration")? {
                Some(config) => (config.conf, config.pools),
                None => return Ok(()),
            }
        }
    };
    let named = flags.node_name.filter(|name| !name.is_empty());
    let node = match (named, &source) {
        (Some(name), _) => name,
        (None, Source::Kube(kube)) => kube.node_of_pod()?,
        (None, Source::File(_) | Source::Etcd(_)) => {
            hostname().context("read the host name; give --node-name")?
        }
    };
    let subnet_file = flags.subnet_file.or_else(|| {
        let usual = PathBuf::from(ripstop_cni::subnet_env::DEFAULT_PATH);
        (!matches!(source, Source::File(_))).then_some(usual)
    });
    let mut selection = Selection {
        ifaces: flags.iface,
        patterns: flags.iface_regex,
        can_reach: flags.iface_can_reach,
        public_ips: PerFamily {
            v4: flags.public_ip.map(IpAddr::V4),
            v6: flags.public_ipv6.map(IpAddr::V6),
        },
        lease_ips: PerFamily::default(),
        families: PerFamily {
            v4: conf.network.is_some(),
            v6: conf.network6.is_some(),
        },
        host_gw: conf.backend == Backend::HostGw,
    };
    let ready = Arc::new(AtomicBool::new(false));
    let source: Box<dyn LeaseSource> = match source {
        Source::Kube(kube) => {
            let watcher = Watcher::new(flags.run_dir.clone(), Arc::clone(&health));
            events::start(
                kube.server.load_blocking()?,
                &node,
                watcher,
                Arc::clone(&health),
            )?;
            let settings = kube::Settings {
                node: node.clone(),
                conf: conf.clone(),
                selection: selection.clone(),
                prefix: kube.prefix,
                set_network_available: flags.set_node_network_unavailable,
                ready: Arc::clone(&ready),
                silent: kube::SILENT,
                recheck: kube::RECHECK,
            };
            // Whether a public IP is the interface's is for the source to say, which knows the Node's word for it too.
            selection.public_ips = PerFamily::default();
            let source =
                KubeSource::new(kube.server, settings).context("Failed to create SubnetManager")?;
            let (run_dir, node) = (&flags.run_dir, node.clone());
            Box::new(Kept::new(Box::new(source), run_dir, node, conf.clone()))
        }
        Source::Etcd(access) => {
            let settings = etcd::Settings {
                node: node.clone(),
                access,
                config: etcd::Config {
                    conf: conf.clone(),
                    pools,
                },
                selection: selection.clone(),
                subnet_file: subnet_file.clone().unwrap_or_default(),
                ttl: etcd::TTL,
                margin: Duration::from_secs(flags.etcd.subnet_lease_renew_margin * 60),
                silent: etcd::SILENT,
            };
            // As above.
            selection.public_ips = PerFamily::default();
            let source = Box::new(EtcdSource::new(settings));
            Box::new(Kept::new(
                source,
                &flags.run_dir,
                node.clone(),
                conf.clone(),
            ))
        }
        Source::File(path) => Box::new(FileSource::new(path, node.clone(), conf.clone())),
    };
    let mut reconciler = Reconciler::new(Settings {
        node: node.clone(),
        selection,
        traffic: traffic::Settings {
            mode: Mode::choose(conf.nftables),
            masquerade: flags.ip_masq,
            forward: flags.iptables_forward_rules,
            random_fully: !flags.ip_masq_fully_random_disable,
            no_masquerade: flags
                .no_masquerade
                .into_iter()
                .filter_map(|Exempt(net)| net)
                .collect(),
            resync: Duration::from_secs(flags.iptables_resync),
            blackhole: flags.ip_blackhole_route,
        },
        conf,
        run_dir: flags.run_dir,
        table: flags.route_table,
        guard: flags.guard == Switch::On,
        lease_source: source.describe(),
        subnet_file,
        conflist: flags.conflist,
        ready,
        health,
    })?;
    tracing::info!(node, leases = source.describe(), "control plane started");
    let wake = Arc::new(Wake::new()?);
    let (queue, events) = crossbeam::channel::unbounded();
    let sink = LeaseSink::new(queue, Arc::clone(&wake));
    std::thread::Builder::new()
        .name("leases".to_owned())
        .spawn(move || source.run(&sink))?;
    reconciler.run(&events, &wake, &signals);
    tracing::info!("control plane stopped; routes, devices and the forwarding table stay in place");
    Ok(())
}
