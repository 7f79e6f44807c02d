//! `--nic`, `--peer`: a wire to another machine in place of the lab's own.

use core::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use ripstop_perf::bed::{self, Wire};
use ripstop_perf::experiment::Scenario;
use ripstop_perf::measure::{Bed, BedPlan, Variant, WireFacts};

use super::read_token;

/// Where packets go from the node under test.
#[derive(Args)]
pub(crate) struct Across {
    /// Measure across a wire: this NIC is the node's under test while that is up, and comes back afterwards.
    #[arg(long, value_name = "INTERFACE", requires_all = ["peer", "token_file"])]
    nic: Option<String>,
    /// The agent at the wire's other end (`ripstop-perf agent`), over another network.
    #[arg(long, value_name = "ADDRESS:PORT", requires = "nic")]
    peer: Option<SocketAddr>,
    /// A file with the agent's token.
    #[arg(long, value_name = "FILE", requires = "nic")]
    token_file: Option<PathBuf>,
    /// Take the NIC although it has IP addresses. They come back, its routes do not.
    #[arg(long, requires = "nic")]
    nic_in_use: bool,
}

/// What opens beds: in the lab, or across a wire.
pub(crate) struct Opener {
    wire: Option<Wire>,
}

impl Across {
    /// Connects to the agent, if there is one to be.
    pub(crate) fn opener(&self, scenario: &Scenario) -> Result<Opener> {
        let (Some(nic), Some(peer), Some(file)) = (&self.nic, self.peer, &self.token_file) else {
            return Ok(Opener { wire: None });
        };
        scenario.check_crossing()?;
        let token = read_token(file)?;
        let wire = Wire::connect(nic, self.nic_in_use, peer, &token)?;
        Ok(Opener { wire: Some(wire) })
    }
}

impl Opener {
    /// Sets a path up.
    pub(crate) fn open(&self, plan: &BedPlan, variant: &Variant) -> Result<Box<dyn Bed>> {
        match &self.wire {
            Some(wire) => bed::open_across(plan, variant, wire),
            None => bed::open(plan, variant),
        }
    }

    /// The wire, for the result file.
    pub(crate) fn facts(&self) -> Option<WireFacts> {
        self.wire.as_ref().map(Wire::facts)
    }
}
