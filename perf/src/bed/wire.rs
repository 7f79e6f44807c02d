//! The two ends of a path: engines of this machine, or those of an agent at the other end of a wire.
//!
//! ```text
//!   in the lab            n1 eth0 ═══ veth ═══ port n1 of the fabric [source or sink]
//!   between machines      n1 eth0 = eth1 of this machine ═══ cable ═══ eth1 of the other [the agent's source or sink]
//! ```

use core::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use crate::address::Mac;
use crate::engine::agent::Peer;
use crate::engine::{self, Detail, Place, Sink, SinkOptions, Source, await_carrier, wire_end};
use crate::lab::Borrowed;
use crate::measure::{SourceKind, Stream, WireEnd, WireFacts};
use crate::netns::Netns;

/// A wire to another machine: a NIC of this one, and an agent at its other end, for as long as the value lives.
#[derive(Debug, Clone)]
pub struct Wire {
    borrowed: Borrowed,
    mac: Mac,
    near: WireEnd,
    peer: Peer,
}

impl Wire {
    /// Looks at a NIC of the calling thread's namespace, and connects to the agent. The NIC stays where it is until a bed is
    /// opened.
    ///
    /// # Errors
    /// The NIC cannot be had (the message says why; `in_use` allows one that has addresses), or the agent is not there, does
    /// not know the token, or is reached over the NIC itself.
    pub fn connect(nic: &str, in_use: bool, agent: SocketAddr, token: &str) -> Result<Self> {
        let borrowed = Borrowed::look(nic, in_use)?;
        let (mac, near) = wire_end(&Netns::of_this_thread(), nic)?;
        let peer = Peer::connect(agent, token)?;
        ensure!(
            !borrowed.has(peer.local_address()?.ip()),
            "the agent at {agent} is reached over {nic} itself, which is away while it is measured: give --peer an address of that machine on another network"
        );
        Ok(Self {
            borrowed,
            mac,
            near,
            peer,
        })
    }

    /// The NIC of this machine.
    #[must_use]
    pub fn nic(&self) -> &str {
        self.borrowed.nic()
    }

    /// The agent, which has the other end.
    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The Ethernet addresses of this machine's NIC and of the agent's.
    pub(super) fn macs(&self) -> [Mac; 2] {
        [self.mac, self.peer.mac()]
    }

    /// For the result file.
    #[must_use]
    pub fn facts(&self) -> WireFacts {
        WireFacts {
            near: self.near.clone(),
            far: self.peer.end().clone(),
            agent: self.peer.address().to_string(),
        }
    }

    pub(super) fn borrowed(&self) -> Borrowed {
        self.borrowed.clone()
    }
}

/// Where an engine of a bed runs.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// On this machine.
    Here {
        netns: Netns,
        interface: String,
        cpu: usize,
    },
    /// At an agent, on the interface and the CPU that it was started for.
    There(Peer),
}

impl End {
    /// Makes a source there.
    pub(super) fn source(&self, stream: &Stream, kind: SourceKind) -> Result<Box<dyn Source>> {
        match self {
            Self::Here {
                netns,
                interface,
                cpu,
            } => engine::source(&place(netns, interface, *cpu), stream, kind),
            Self::There(peer) => peer.source(stream, kind).context("source at the peer"),
        }
    }

    /// Makes a sink there for what comes from another end.
    pub(super) fn sink(
        &self,
        from: &Self,
        stream: &Stream,
        detail: Detail,
    ) -> Result<Box<dyn Sink>> {
        let options = SinkOptions {
            foreign_clock: !(self.has_this_clock() && from.has_this_clock()),
            ..SinkOptions::default()
        };
        match self {
            Self::Here {
                netns,
                interface,
                cpu,
            } => engine::sink_with(&place(netns, interface, *cpu), stream, detail, &options),
            Self::There(peer) => peer
                .sink(stream, detail, &options)
                .context("sink at the peer"),
        }
    }

    /// Waits until what is sent there gets through.
    pub(super) fn await_carrier(&self) -> Result<()> {
        match self {
            Self::Here {
                netns, interface, ..
            } => await_carrier(netns, interface),
            Self::There(peer) => peer.await_carrier(),
        }
    }

    fn has_this_clock(&self) -> bool {
        match self {
            Self::Here { .. } => true,
            Self::There(peer) => peer.shares_clock(),
        }
    }

    /// Its interface, for a person.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Here { interface, .. } => interface.clone(),
            Self::There(peer) => format!("{} of {}", peer.end().nic, peer.address()),
        }
    }
}

fn place<'a>(netns: &'a Netns, interface: &str, cpu: usize) -> Place<'a> {
    Place {
        netns,
        interface: interface.to_owned(),
        cpu: Some(cpu),
    }
}
