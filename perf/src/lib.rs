//! Performance as the lab: a pod network in network namespaces, with real frames and real processes.
//!
//! Tests, the demo and the benchmarks say what they need (three Ripstop nodes, one plain Linux
//! VXLAN node, two pods each), get it within a second or two, run traffic whose every byte is
//! checked, kill processes in between, and have everything taken down when the [`Lab`] is dropped.
//!
//! ```no_run
//! use ripstop_perf::{Lab, Ping};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::builder().linux(2).pods(1).up()?;
//! let report = Ping::new(lab.pod(1, 0), lab.pod(2, 0)).count(3).run()?;
//! assert_eq!(report.received, 3);
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here touches the machine's own interfaces, routes or sysctls: all of it happens in
//! namespaces that the lab made and that carry the lab's name.

pub mod address;
pub mod bed;
mod counters;
pub mod engine;
pub mod experiment;
mod frame;
mod lab;
pub mod measure;
mod netns;
mod packet;
mod proc_stat;
pub mod report;
mod stack;
mod sys;
mod traffic;

pub use address::{Family, Mac};
pub use counters::{KernelCounters, LinkCounters};
pub use frame::{Ethernet, Inner, Ipv4, Udp, UdpChecksum, Vxlan, VxlanFrame, transport_checksum};
pub use lab::{
    Attacker, Backend, BondMode, Borrowed, DATAPLANE_VARIABLE, DETOUR_TABLE, Fabric, Families,
    Host, Lab, LabBuilder, Lease, Leases, Node, NodeKind, Pod, Underlay, Workers, machine, run,
    wait_until,
};
pub use netns::Netns;
pub use packet::{Capture, Captured, CapturedFrame, Direction, Injector};
pub use stack::{Frame, Header, Ipv6, icmp, icmp6, wire_faults};
pub use traffic::{
    EchoReport, Mark, Ping, PingReport, TcpReport, TrafficGroup, TrafficHandle, TrafficReport,
    UDP_PAYLOAD_MIN, UdpFlow, tcp_transfer, tcp_transfer_over, udp_echo, udp_echo_over,
    udp_payload_max, udp_payload_max_over,
};
