//! Workers that leave the cutting to the kernel, in a whole lab: everything is carried, and where it would not arrive
//! they cut: as root, for real. Needs Linux 6.17.
//!
//! ```text
//!   n1p0 ─ n1 ─ rip0 ─ worker ─┬─ rip0-gso0 ─ eth0 ═══ fabric ═══ worker ─ rip0 ─ n2 ─ n2p0
//!                              └─ AF_XDP ─────┘            ╚═════ n3 (plain Linux) ─ n3p0
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "every test binary uses its own part")]
mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use anyhow::Result;
use cells::Cell;
use common::{PATIENCE, check_books};
use ripstop_fib::stats::Counter;
use ripstop_perf::{
    Families, Family, Host, Lab, LabBuilder, Node, machine, tcp_transfer_over, wait_until,
};
use serde_json::json;

/// Less than a packet, one, some, and so many that windows grow to their full size.
const TRANSFERS: [u64; 5] = [1, 1398, 1399, 100_000, 8_000_000];

fn lab() -> LabBuilder {
    Lab::builder()
        .ripstop(2)
        .dataplane_config(json!({ "transmit": "tunnel-gso" }))
}

/// TCP of every size, both ways.
fn bulk(lab: &Lab, family: Family, [one, other]: [u8; 2]) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        for bytes in TRANSFERS {
            tcp_transfer_over(family, lab.pod(from, 0), lab.pod(to, 0), bytes)?;
        }
    }
    Ok(())
}

/// How the first worker says that it transmits.
fn kind(node: &Node) -> Result<String> {
    let status = node.ripstop(&["status", "--json", "--interval", "0"])?;
    let kind = &status["dataPlane"]["workers"][0]["transmit"];
    Ok(kind.as_str().unwrap_or_default().to_owned())
}

/// How many super-packets have left whole, by the kernel's count of those that came in at the workers' TAP devices.
fn left_whole(node: &Node, workers: u32) -> Result<u64> {
    (0..workers)
        .map(|worker| Ok(node.link_counters(&format!("rip0-gso{worker}"))?.rx_packets))
        .sum()
}

#[test]
fn it_carries_everything_over_both_families() -> Result<()> {
    let _machine = machine();
    lab()
        .linux(1)
        .queues(2)
        .families(Families::Dual)
        .run(|lab| {
            lab.start_ripstop()?;
            for family in [Family::Ipv4, Family::Ipv6] {
                let before = left_whole(lab.node(1), 2)?;
                for pair in [[1, 2], [1, 3]] {
                    bulk(lab, family, pair)?;
                }
                // Some hundred of 64 KiB, if the machine leaves TCP the time to grow its windows.
                let whole = left_whole(lab.node(1), 2)? - before;
                assert!(whole > 50, "{whole} super-packets, {family:?}");
                for cell in Cell::ALL {
                    cell.check(lab, family, 1, 2)?;
                }
            }
            for node in lab.ripstop_nodes() {
                assert_eq!(kind(node)?, "tunnel-gso");
                let workers = check_books(lab, node)?;
                let handed = workers.total(Counter::HostRxSuperPackets);
                let whole = left_whole(node, 2)?;
                assert_eq!(whole, handed, "{}: none was cut by a worker", node.name());
                // With the process they go.
                node.kill_dataplane();
                wait_until("the devices have gone", PATIENCE, || {
                    let links = node.output(&["ip", "-br", "link"]);
                    links.is_ok_and(|links| !links.contains("rip0"))
                })?;
            }
            Ok(())
        })
}

/// A receiver would drop what is unfinished: where the NIC leaves checksums to it, workers cut.
#[test]
fn where_checksums_would_be_left_to_the_receiver_workers_cut() -> Result<()> {
    let _machine = machine();
    lab().run(|lab| {
        let offload = |node: u8, onoff| {
            lab.node(node)
                .output(&["ethtool", "-K", "eth0", "tx", onoff])
                .map(drop)
        };
        let says = |node: u8, what: &str| lab.node(node).dataplane_log().contains(what);
        offload(1, "on")?;
        lab.start_ripstop()?;
        offload(1, "off")?;
        assert_eq!(kind(lab.node(1))?, "af-xdp");
        assert!(says(1, "ethtool -K eth0 tx off"));
        bulk(lab, Family::Ipv4, [1, 2])?;
        assert!(left_whole(lab.node(2), 1)? > 20);
        // While it is on, what the node itself sends is unfinished, too, and no pod's business.
        offload(2, "on")?;
        wait_until("the worker has noticed", PATIENCE, || {
            says(2, "checksum offload was switched on")
        })?;
        let before = left_whole(lab.node(2), 1)?;
        bulk(lab, Family::Ipv4, [1, 2])?;
        assert_eq!(left_whole(lab.node(2), 1)?, before);
        offload(2, "off")?;
        wait_until("the worker has noticed", PATIENCE, || {
            says(2, "sent whole again")
        })?;
        bulk(lab, Family::Ipv4, [1, 2])?;
        assert!(left_whole(lab.node(2), 1)? > before + 20);
        lab.ripstop_nodes()
            .try_for_each(|node| check_books(lab, node).map(drop))
    })
}

/// Through a door without super-packets there are none to leave whole.
#[test]
fn a_door_without_super_packets_is_told_so() -> Result<()> {
    let _machine = machine();
    let doors = [json!({ "kind": "veth" }), json!({ "offload": "off" })];
    for door in doors {
        let keys = json!({ "transmit": "tunnel-gso", "hostDoor": door });
        Lab::builder()
            .ripstop(2)
            .dataplane_config(keys)
            .run(|lab| {
                lab.start_ripstop()?;
                assert_eq!(kind(lab.node(1))?, "af-xdp");
                let log = lab.node(1).dataplane_log();
                assert!(log.contains("\"tunnel-gso\" means nothing"), "{log}");
                Cell::Tcp.check(lab, Family::Ipv4, 1, 2)
            })?;
    }
    Ok(())
}
