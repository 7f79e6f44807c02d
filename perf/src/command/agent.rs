//! `ripstop-perf agent`: an engine that a scenario on another machine uses.

use core::net::SocketAddr;
use core::sync::atomic::AtomicBool;
use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use ripstop_perf::engine::agent::{Agent, has_default_route, new_token};

use super::read_token;

/// Send and take test packets on an interface of this machine, for a client elsewhere.
#[derive(Args)]
pub(crate) struct Options {
    /// Where to listen: this address and port, and nowhere else.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// The interface to send from and to take from. Everything on it that is no test packet goes on as before.
    #[arg(long, value_name = "INTERFACE")]
    nic: String,
    /// A file with what a client must know. Without it, a token is made and printed.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The CPU for the engine.
    #[arg(long)]
    cpu: Option<usize>,
    /// Use the interface although this machine's default route is on it: a flood may cut the machine off.
    #[arg(long)]
    yes_this_is_the_default_route: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        options.yes_this_is_the_default_route || !has_default_route(&options.nic)?,
        "the default route is on {}: a flood may cut this machine off. If that is meant: --yes-this-is-the-default-route",
        options.nic
    );
    let token = match &options.token_file {
        Some(file) => read_token(file)?,
        None => new_token()?,
    };
    let listener = TcpListener::bind(options.listen)
        .with_context(|| format!("listen on {}", options.listen))?;
    if options.token_file.is_none() {
        println!("token {token}");
    }
    println!("agent for {} at {}", options.nic, listener.local_addr()?);
    let agent = Agent {
        interface: options.nic.clone(),
        token,
        cpu: options.cpu,
    };
    // An interrupt ends the process, and with it all that it has attached.
    agent.serve(&listener, &AtomicBool::new(false))
}
