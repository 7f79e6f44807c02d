//! Every backend of flannel, with itself and with plain Linux, in every kind of traffic: as root, for real.
//!
//! ```text
//!   n1p0 ─ n1 (Ripstop) ═══╗
//!   n2p0 ─ n2 (Ripstop) ═══╬══ fabric, for DirectRouting with a router between two segments
//!   n3p0 ─ n3 (plain Linux)╝
//! ```
//!
//! A cell holds when everything arrives byte for byte, and, where Ripstop runs, the workers' counters say that it
//! went through them and the standby's stand still. The table is printed; README.md has it.

mod cells;
#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use core::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use cells::Cell;
use common::{PATIENCE, kernel_counters};
use ripstop_fib::stats::Counter;
use ripstop_perf::{
    Backend, Families, Family, Host, KernelCounters, Lab, LabBuilder, Node, NodeKind, wait_until,
};

/// A lab of the matrix: what joins its nodes.
#[derive(Debug, Clone, Copy)]
struct Setting {
    name: &'static str,
    backend: Backend,
    direct: bool,
    families: Families,
}

const SETTINGS: [Setting; 10] = [
    setting("vxlan", Backend::Vxlan, false, Families::Ipv4),
    setting("vxlan", Backend::Vxlan, false, Families::Ipv6),
    setting("vxlan", Backend::Vxlan, true, Families::Ipv4),
    setting("vxlan", Backend::Vxlan, true, Families::Ipv6),
    setting("ipip", Backend::Ipip, false, Families::Ipv4),
    setting("ipip", Backend::Ipip, true, Families::Ipv4),
    setting("udp", Backend::Udp, false, Families::Ipv4),
    setting("host-gw", Backend::HostGw, false, Families::Ipv4),
    setting("host-gw", Backend::HostGw, false, Families::Ipv6),
    setting("vxlan, dual stack", Backend::Vxlan, false, Families::Dual),
];

const fn setting(
    name: &'static str,
    backend: Backend,
    direct: bool,
    families: Families,
) -> Setting {
    Setting {
        name,
        backend,
        direct,
        families,
    }
}

impl Setting {
    /// With DirectRouting, half of the nodes are behind a router.
    fn lab(&self, [ripstop, linux]: [u8; 2]) -> LabBuilder {
        let builder = Lab::builder()
            .backend(self.backend)
            .families(self.families)
            .ripstop(ripstop)
            .linux(linux);
        if !self.direct {
            return builder;
        }
        let segments: Vec<u8> = [ripstop, linux]
            .iter()
            .flat_map(|count| (0..*count).map(|number| number % 2))
            .collect();
        builder.direct_routing().segments(&segments)
    }

    fn row_name(&self, lab: &Lab, pair: [u8; 2]) -> String {
        match (self.direct, lab.is_direct(pair[0], pair[1])) {
            (true, true) => format!("{}, DirectRouting: same segment", self.name),
            (true, false) => format!("{}, DirectRouting: behind a router", self.name),
            (false, _) => self.name.to_owned(),
        }
    }
}

/// One line of the table.
struct Row {
    name: String,
    with: &'static str,
    family: Family,
    userland: bool,
    outcomes: Vec<Result<()>>,
}

impl Row {
    fn new(setting: &Setting, lab: &Lab, pair: [u8; 2], family: Family) -> Self {
        let nodes = pair.map(|index| lab.node(index));
        let plain = |node: &&Node| node.kind() == NodeKind::PlainLinux;
        Self {
            name: setting.row_name(lab, pair),
            with: match nodes.iter().filter(|node| plain(node)).count() {
                0 => "Ripstop ↔ Ripstop",
                1 => "Ripstop ↔ Linux",
                _ => "Linux ↔ Linux",
            },
            family,
            // Next to each other the nodes use no tunnel.
            userland: !lab.is_direct(pair[0], pair[1])
                && nodes.iter().any(|node| node.has_userland_tunnel()),
            outcomes: Vec::new(),
        }
    }
}

/// The table in Markdown.
fn table(rows: &[Row]) -> String {
    let mut text = String::from("| backend | between | family |");
    let mut rule = String::from("|---|---|---|");
    for cell in Cell::ALL {
        text.push_str(&format!(" {} |", cell.name()));
        rule.push_str(":-:|");
    }
    text = format!("{text}\n{rule}\n");
    for row in rows {
        let mark = if row.userland { " ¹" } else { "" };
        write!(
            text,
            "| {} | {}{mark} | {} |",
            row.name, row.with, row.family
        )
        .unwrap_or_default();
        for outcome in &row.outcomes {
            text.push_str(if outcome.is_ok() {
                " ok |"
            } else {
                " **fails** |"
            });
        }
        text.push('\n');
    }
    for backend in [Backend::Ipip, Backend::Udp] {
        let cells = " – |".repeat(Cell::ALL.len());
        writeln!(text, "| {} | | IPv6 |{cells}", backend.name()).unwrap_or_default();
    }
    text.push_str("\n–: flannel does not have it.");
    if rows.iter().any(|row| row.userland) {
        text.push_str(
            " ¹: the plain node's tunnel is the lab's own in userland: flannel's udp backend is a process, \
             and for ipip this kernel has no device.",
        );
    }
    text.push('\n');
    text
}

#[expect(
    clippy::print_stdout,
    reason = "the table is for the reader of the test"
)]
fn finish(what: &str, rows: &[Row], start: Instant) -> Result<()> {
    println!(
        "\n{what}, {:.0} s:\n\n{}",
        start.elapsed().as_secs_f64(),
        table(rows)
    );
    let mut failures = Vec::new();
    for row in rows {
        for (cell, outcome) in Cell::ALL.iter().zip(&row.outcomes) {
            if let Err(error) = outcome {
                failures.push(format!(
                    "{} {} {} {}: {error:#}",
                    row.name,
                    row.with,
                    row.family,
                    cell.name()
                ));
            }
        }
    }
    ensure!(
        failures.is_empty(),
        "{} cells fail:\n{}",
        failures.len(),
        failures.join("\n")
    );
    Ok(())
}

/// The instrument itself: what the matrix asks of Ripstop, plain Linux nodes do.
#[test]
fn plain_linux_nodes_do_all_of_it() -> Result<()> {
    let start = Instant::now();
    let mut rows = Vec::new();
    for setting in SETTINGS {
        let nodes = if setting.direct { 3 } else { 2 };
        setting.lab([0, nodes]).run(|lab| {
            for other in 2..=nodes {
                for family in lab.families() {
                    let mut row = Row::new(&setting, lab, [1, other], family);
                    for cell in Cell::ALL {
                        row.outcomes.push(cell.check(lab, family, 1, other));
                    }
                    rows.push(row);
                }
            }
            Ok(())
        })?;
    }
    finish("Plain Linux", &rows, start)
}

/// What went which way on a node: out of and into its workers, and over the standby's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Carried {
    out: u64,
    into: u64,
    standby: [u64; 2],
}

impl Carried {
    fn by(node: &Node) -> Result<Self> {
        let (workers, standby) = (node.workers()?, node.standby_counters()?);
        Ok(Self {
            out: workers.total(Counter::NicTxPackets),
            into: workers.total(Counter::NicRxPackets),
            standby: [standby.rx_packets, standby.tx_packets],
        })
    }
}

/// Runs a cell; the workers of the Ripstop nodes among the two must have carried it.
fn check_cell(lab: &Lab, family: Family, pair: [u8; 2], cell: Cell) -> Result<()> {
    let nodes: Vec<&Node> = pair
        .iter()
        .map(|index| lab.node(*index))
        .filter(|node| node.kind() == NodeKind::Ripstop)
        .collect();
    let before = nodes
        .iter()
        .map(|node| Carried::by(node))
        .collect::<Result<Vec<_>>>()?;
    cell.check(lab, family, pair[0], pair[1])?;
    let least = cell.packets_min();
    for (node, before) in nodes.into_iter().zip(before) {
        let mut now = before;
        // What the workers count they publish now and then.
        let counted = wait_until("the workers have carried it", PATIENCE, || {
            now = Carried::by(node).unwrap_or(before);
            now.out >= before.out + least && now.into >= before.into + least
        });
        counted.with_context(|| {
            let (out, into) = (now.out - before.out, now.into - before.into);
            format!(
                "workers of {} have sent {out} and received {into} packets of at least {least}",
                node.name()
            )
        })?;
        ensure!(
            now.standby == before.standby,
            "the standby of {} has carried {:?} and not {:?} packets",
            node.name(),
            now.standby,
            before.standby
        );
    }
    Ok(())
}

/// Fails if the kernel of any host has met a wrong checksum or length since.
fn check_no_damage(lab: &Lab, before: &[(String, KernelCounters)]) -> Result<()> {
    for ((name, before), (_, after)) in before.iter().zip(kernel_counters(lab)?) {
        // A pod that is told about packets of which its kernel knows nothing counts that as an error.
        let of_packets =
            |(what, _): &(&str, i64)| !matches!(*what, "Icmp.InErrors" | "Icmp6.InErrors");
        let damage: Vec<_> = after
            .since(before)
            .damage()
            .into_iter()
            .filter(of_packets)
            .collect();
        ensure!(
            damage.is_empty(),
            "damaged packets arrived at {name}: {damage:?}"
        );
    }
    Ok(())
}

/// Every cell that flannel has.
#[test]
fn ripstop_does_all_of_it_with_itself_and_with_linux() -> Result<()> {
    let start = Instant::now();
    let mut rows = Vec::new();
    for setting in SETTINGS {
        // With DirectRouting n1 and n3 are neighbours, as n4 is, and n2 and n5 are behind a router.
        let nodes = if setting.direct { [3, 2] } else { [2, 1] };
        let lab = setting.lab(nodes).up()?;
        let started = lab.start_ripstop();
        let mut dump = started.is_err();
        for other in 2..=nodes[0] + nodes[1] {
            for family in lab.families() {
                let mut row = Row::new(&setting, &lab, [1, other], family);
                for cell in Cell::ALL {
                    let before = kernel_counters(&lab)?;
                    let outcome = match &started {
                        Ok(()) => check_cell(&lab, family, [1, other], cell),
                        Err(error) => Err(anyhow!("Ripstop has not started: {error:#}")),
                    };
                    let outcome = outcome.and_then(|()| check_no_damage(&lab, &before));
                    dump |= outcome.is_err();
                    row.outcomes.push(outcome);
                }
                rows.push(row);
            }
        }
        if dump {
            print_dump(&setting, &lab);
        }
        lab.down()?;
    }
    finish("Ripstop", &rows, start)
}

#[expect(clippy::print_stderr, reason = "for the reader of a failed test")]
fn print_dump(setting: &Setting, lab: &Lab) {
    eprintln!("{setting:?}\n{}", lab.dump());
}
