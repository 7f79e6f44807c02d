//! `lab`: the lab of nodes, pods and an underlay switch, by hand.

use core::time::Duration;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use ripstop_perf::{Lab, Node, NodeKind, UdpFlow, wait_until};

#[derive(Subcommand)]
pub(crate) enum LabCommand {
    /// Bring a lab up and leave it running.
    Up(Up),
    /// End a lab's processes and remove all of it.
    Down(Name),
    /// Show a lab's topology with all addresses.
    Show(Name),
    /// Run a program on a node (n1), in a pod (n1p0), on the fabric or as the attacker.
    Exec {
        #[command(flatten)]
        name: Name,
        /// Where: n1, n1p0, fabric, attacker.
        host: String,
        /// What, after `--`.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Send UDP packets from one host to another and print the account of them.
    Traffic(Traffic),
    /// Print the kernel state of each node and the end of each log.
    Dump(Name),
    /// List the labs that are up.
    List,
}

#[derive(Args)]
pub(crate) struct Name {
    /// Name of the lab.
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Args)]
pub(crate) struct Traffic {
    #[command(flatten)]
    name: Name,
    /// Where they come from: n1p0, for instance.
    from: String,
    /// Where they go: n2p0, for instance.
    to: String,
    /// Packets a second.
    #[arg(long, default_value_t = 20_000)]
    rate: u64,
    /// For how long.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Flows, each with a source port of its own.
    #[arg(long, default_value_t = 4)]
    flows: u16,
    /// Bytes of UDP payload in each packet.
    #[arg(long, default_value_t = 64)]
    payload_bytes: usize,
}

#[derive(Args)]
pub(crate) struct Up {
    #[command(flatten)]
    name: Name,
    /// Nodes that run Ripstop.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Further nodes that speak VXLAN with the Linux kernel alone.
    #[arg(long, default_value_t = 0)]
    linux: u8,
    /// Pods on each node.
    #[arg(long, default_value_t = 1)]
    pods: u8,
    /// MTU of the underlay.
    #[arg(long, default_value_t = 1500)]
    mtu: u16,
    /// Queues of each node's eth0.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Do not start the Ripstop processes.
    #[arg(long)]
    no_ripstop: bool,
}

pub(crate) fn run(command: LabCommand) -> Result<()> {
    match command {
        LabCommand::Up(up) => bring_up(up),
        LabCommand::Down(name) => Lab::open(&name.name)?.down(),
        LabCommand::Show(name) => {
            print!("{}", Lab::open(&name.name)?.picture());
            Ok(())
        }
        LabCommand::Exec { name, host, argv } => exec(&name.name, &host, &argv),
        LabCommand::Traffic(traffic) => send(&traffic),
        LabCommand::Dump(name) => {
            print!("{}", Lab::open(&name.name)?.dump());
            Ok(())
        }
        LabCommand::List => {
            Lab::names().iter().for_each(|name| println!("{name}"));
            Ok(())
        }
    }
}

fn bring_up(up: Up) -> Result<()> {
    let builder = Lab::builder()
        .name(up.name.name)
        .ripstop(up.nodes)
        .linux(up.linux)
        .pods(up.pods);
    let lab = builder.mtu(up.mtu).queues(up.queues).up()?;
    if !up.no_ripstop {
        let nodes = || {
            lab.nodes()
                .iter()
                .filter(|node| node.kind() == NodeKind::Ripstop)
        };
        for node in nodes() {
            node.start_dataplane()?;
            node.start_controlplane()?;
        }
        // One that finds something wrong says so and ends within moments.
        let ended = |node: &&Node| !node.dataplane_is_running() || !node.controlplane_is_running();
        let early_end = wait_until("a process has ended", Duration::from_millis(500), || {
            nodes().any(|node| ended(&node))
        });
        if early_end.is_ok() {
            bail!("a Ripstop process did not stay up:\n{}", lab.dump());
        }
    }
    print!("{}", lab.picture());
    println!();
    let option = format!("--name {}", lab.name());
    println!("try:  ripstop-perf lab exec {option} n1p0 -- ping -c 3 10.244.2.2");
    println!("      ripstop-perf lab exec {option} n1 -- ip -d link show");
    println!("end:  ripstop-perf lab down {option}");
    lab.persist()
}

fn send(traffic: &Traffic) -> Result<()> {
    let lab = Lab::open(&traffic.name.name)?;
    let flow = UdpFlow::new(lab.host(&traffic.from)?, lab.host(&traffic.to)?)
        .flows(traffic.flows)
        .payload_sizes(&[traffic.payload_bytes])
        .rate(traffic.rate)
        .duration(Duration::from_secs(traffic.seconds));
    println!("{}", flow.run()?);
    Ok(())
}

/// Becomes the program, so that terminals and signals work as they should.
fn exec(lab: &str, host: &str, argv: &[String]) -> Result<()> {
    let lab = Lab::open(lab)?;
    let (program, arguments) = argv.split_first().context("nothing to run")?;
    let mut command = lab.host(host)?.netns().command(program);
    let error = command.args(arguments).exec();
    Err(error).with_context(|| format!("run {program} in {host}"))
}
