//! The whole lab on another kernel: in a guest of the VM lab (`make test-vm`). Pods of all nodes talk in every way, and the
//! books of the Ripstop nodes balance to the packet.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ═╗
//!   n2p0 ─ n2 ─ rip0 ─ worker ═╬═ fabric
//!   n3p0 ─ n3 ─ flannel.1 ═════╝   (plain Linux)
//! ```

#![expect(clippy::print_stdout, reason = "numbers for whoever reads the log")]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod vm;

use anyhow::{Result, ensure};
use ripstop_perf::{
    Host, Lab, Ping, UDP_PAYLOAD_MIN, UdpFlow, tcp_transfer, udp_echo, udp_payload_max,
};
use vm::Books;

/// Two nodes with Ripstop, one without. Each node sends every other one what `exchange` sends one way, and gets as much.
fn between_all(exchange: impl Fn(&Lab, &dyn Host, &dyn Host) -> Result<u64>) -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        let books = Books::open(lab)?;
        let mut packets = 0;
        for (from, to) in lab.pod_pairs() {
            packets = exchange(lab, from, to)?;
        }
        let peers = u64::try_from(lab.nodes().len())? - 1;
        let by_standby = books.close(lab, |_node| (packets * peers, packets * peers))?;
        println!("packets on the standby: {by_standby}");
        Ok(())
    })
}

#[test]
fn icmp_and_udp_arrive_byte_for_byte() -> Result<()> {
    between_all(|lab, from, to| {
        const PINGS: u16 = 3;
        let full = udp_payload_max(lab.pod_mtu());
        for ping in [
            Ping::new(from, to),
            Ping::new(from, to).payload_bytes(0),
            Ping::new(from, to).full(lab.pod_mtu()),
        ] {
            let report = ping.count(PINGS).run()?;
            ensure!(
                (report.received, report.ttl) == (PINGS, Some(62)),
                "{from:?} to {to:?}: {report:?}"
            );
        }
        let sizes = [0, 1, 17, 511, full - 1, full];
        let echo = udp_echo(from, to, &sizes)?;
        ensure!(
            (echo.received, &echo.failed) == (sizes.len(), &vec![]),
            "{from:?} to {to:?}: {echo:?}"
        );
        // Every question is sent here and answered there, and later the other way round.
        Ok(2 * (3 * u64::from(PINGS) + u64::try_from(sizes.len())?))
    })
}

#[test]
fn datagrams_arrive_whole_and_in_fragments() -> Result<()> {
    between_all(|lab, from, to| {
        const ROUNDS: u64 = 10;
        // Data of a fragment comes in units of 8 bytes.
        let fragment = (u64::from(lab.pod_mtu()) - 20) / 8 * 8;
        let full = udp_payload_max(lab.pod_mtu());
        let sizes = [UDP_PAYLOAD_MIN, full, full + 1, 4000, 20_000];
        let datagrams = u64::try_from(sizes.len())? * ROUNDS;
        let flow = UdpFlow::new(from, to).payload_sizes(&sizes);
        let report = flow.rate(40).count(datagrams).run()?;
        let bad = report.lost + report.duplicated + report.corrupt + report.foreign;
        ensure!(
            report.received == datagrams && bad == 0,
            "{from:?} to {to:?}: {report}"
        );
        let mut one_way = 0;
        for size in sizes {
            let packets = (u64::try_from(size)? + 8).div_ceil(fragment);
            one_way += if size <= full { 1 } else { packets };
        }
        Ok(ROUNDS * one_way)
    })
}

/// Segments and acknowledgements are as many as TCP likes, so the packets are not counted.
#[test]
fn tcp_streams_arrive_byte_for_byte() -> Result<()> {
    Lab::builder().ripstop(2).linux(1).run(|lab| {
        lab.start_ripstop()?;
        for (from, to) in lab.pod_pairs() {
            println!("{:?}", tcp_transfer(from, to, 500_003)?);
        }
        for node in lab.ripstop_nodes() {
            common::check_conservation(node.name(), &common::quiet(lab, node)?)?;
        }
        Ok(())
    })
}
