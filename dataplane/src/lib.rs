//! The data plane of Ripstop: pinned workers that move pod packets between AF_XDP sockets and the host door.
//!
//! Read in this order: [`worker`] (the loop), [`forward`] (the decision about one packet), [`verdict`] and
//! [`ripstop_fib::DropReason`] (what can become of a packet), then [`host`] (how it all is set up).
//!
//! What is absent: no lock, no allocation, no log and no clock on a packet's way; no word to Kubernetes or etcd; no
//! call to the control plane, ever. All that comes from there is the fib region in shared memory.

pub mod auto;
pub mod config;
pub mod door;
mod ecn;
pub mod encap;
mod flow;
pub mod forward;
pub mod host;
pub mod inject;
mod inner;
pub mod kind;
pub mod memory;
pub mod nic;
pub mod nic_queue;
pub mod nic_settings;
pub mod offload;
pub mod pace;
pub mod port;
pub mod table;
pub mod tun;
pub mod tunnel_gso;
pub mod verdict;
pub mod veth;
pub mod watcher;
pub mod wire;
pub mod worker;
pub mod xdp;
