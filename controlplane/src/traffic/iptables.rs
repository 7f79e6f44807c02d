//! The rules in iptables: flannel's chains, flannel's text.
//!
//! One `iptables-save` for each family tells what is there, one `iptables-restore --noflush` changes what is wrong: a
//! chain that is named in its input is emptied and filled anew, in one commit of its table (legacy iptables replaces the
//! whole table, iptables-nft commits one transaction). What others have in these tables is not touched.

use core::fmt::Write as _;
use std::io::{BufRead as _, BufReader};

use super::{MARK, Rule, TrafficError, Verdict, Wanted};
use crate::family::{Family, PerFamily};
use crate::sys::{has_program, run_program, spawn_program};

/// A chain of ours, and what leads to it.
#[derive(Debug, Clone, Copy)]
struct Chain {
    table: &'static str,
    /// The kernel's chain that has a jump to ours.
    hook: &'static str,
    name: &'static str,
    comment: &'static str,
}

/// Flannel's chains.
const CHAINS: [Chain; 2] = [
    Chain {
        table: "nat",
        hook: "POSTROUTING",
        name: "FLANNEL-POSTRTG",
        comment: "flanneld masq",
    },
    Chain {
        table: "filter",
        hook: "FORWARD",
        name: "FLANNEL-FWD",
        comment: "flanneld forward",
    },
];

/// The first version with `--random-fully`, and with `--wait` for `iptables-restore`, as flannel takes it.
const CAPABLE: [u32; 3] = [1, 6, 2];
/// How long another program may hold the lock of the tables: a second less than how often flannel looks.
const WAIT: &str = "--wait=4";
const PACKAGE: &str = "iptables";

/// Which of the kernel's two places the programs work on: the same names of chains may be in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Variant {
    /// What the system calls iptables.
    #[default]
    Installed,
    /// The kernel's old tables.
    Legacy,
    /// nftables, in tables of iptables' names.
    Nft,
}

impl Variant {
    /// The one that `iptables` is not, by the words of `iptables --version`; versions that do not say it are legacy.
    fn other(version: &str) -> Self {
        match version.contains("(nf_tables)") {
            true => Self::Legacy,
            false => Self::Nft,
        }
    }

    /// The programs of a family: the one that tells the version, the one that reads, the one that writes.
    fn programs(self, family: Family) -> [&'static str; 3] {
        match (self, family) {
            (Self::Installed, Family::V4) => ["iptables", "iptables-save", "iptables-restore"],
            (Self::Installed, Family::V6) => ["ip6tables", "ip6tables-save", "ip6tables-restore"],
            (Self::Legacy, Family::V4) => [
                "iptables-legacy",
                "iptables-legacy-save",
                "iptables-legacy-restore",
            ],
            (Self::Legacy, Family::V6) => [
                "ip6tables-legacy",
                "ip6tables-legacy-save",
                "ip6tables-legacy-restore",
            ],
            (Self::Nft, Family::V4) => {
                ["iptables-nft", "iptables-nft-save", "iptables-nft-restore"]
            }
            (Self::Nft, Family::V6) => [
                "ip6tables-nft",
                "ip6tables-nft-save",
                "ip6tables-nft-restore",
            ],
        }
    }

    /// Whether there can be rules at all. To ask the old tables makes the kernel have them, so it is not asked twice.
    fn may_have_rules(self, family: Family) -> bool {
        let names = match family {
            Family::V4 => "/proc/thread-self/net/ip_tables_names",
            Family::V6 => "/proc/thread-self/net/ip6_tables_names",
        };
        self != Self::Legacy || std::fs::read_to_string(names).is_ok_and(|names| !names.is_empty())
    }
}

/// What people call the rules of a family.
pub(super) fn place(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables chains FLANNEL-POSTRTG and FLANNEL-FWD",
        Family::V6 => "ip6tables chains FLANNEL-POSTRTG and FLANNEL-FWD",
    }
}

/// Whether there is what this mode needs.
pub(super) fn is_installed() -> bool {
    Variant::Installed
        .programs(Family::V4)
        .iter()
        .all(|program| has_program(program))
}

impl Chain {
    /// The rules as `iptables-save` lists them.
    fn lines(&self, rules: &[Rule], random_fully: bool) -> Vec<String> {
        let Self { name, comment, .. } = self;
        let line = |rule: &Rule| {
            let mut line = format!("-A {name}");
            if rule.marked {
                let _ = write!(line, " -m mark --mark {MARK:#x}/{MARK:#x}");
            }
            for (option, condition) in [("-s", rule.source), ("-d", rule.destination)] {
                if let Some(condition) = condition {
                    let not = if condition.inside { "" } else { " !" };
                    let _ = write!(line, "{not} {option} {}", condition.net);
                }
            }
            let target = match (rule.verdict, random_fully) {
                (Verdict::Return, _) => "RETURN",
                (Verdict::Accept, _) => "ACCEPT",
                (Verdict::Masquerade, true) => "MASQUERADE --random-fully",
                (Verdict::Masquerade, false) => "MASQUERADE",
            };
            let _ = write!(line, " -m comment --comment \"{comment}\" -j {target}");
            line
        };
        rules.iter().map(line).collect()
    }

    /// The jump without the command before it.
    fn jump(&self) -> String {
        let Self { name, comment, .. } = self;
        format!("-m comment --comment \"{comment}\" -j {name}")
    }
}

/// What is there of one chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Present {
    exists: bool,
    /// Its rules, as listed.
    rules: Vec<String>,
    /// Rules that lead to it: chain, position in that chain from 1, rest of the line.
    jumps: Vec<(String, usize, String)>,
}

impl Present {
    /// The jumps of the kernel's chain.
    fn hooked<'a>(&'a self, chain: &'a Chain) -> impl Iterator<Item = (usize, &'a str)> {
        let hooked = self.jumps.iter().filter(|(from, ..)| from == chain.hook);
        hooked.map(|(_, position, rest)| (*position, rest.as_str()))
    }

    /// What leads from here to these rules, or to no chain at all if there are none; none where nothing is to be done.
    fn mend(&self, chain: &Chain, rules: &[String]) -> Option<String> {
        let Chain {
            table, hook, name, ..
        } = chain;
        let mut text = String::new();
        let delete = |text: &mut String, (from, _, rest): &(String, usize, String)| {
            let _ = writeln!(text, "-D {from} {rest}");
        };
        if rules.is_empty() {
            if !self.exists && self.jumps.is_empty() {
                return None;
            }
            let _ = writeln!(text, ":{name} - [0:0]");
            self.jumps.iter().for_each(|jump| delete(&mut text, jump));
            let _ = writeln!(text, "-X {name}");
        } else {
            let jump = chain.jump();
            let is_hooked = self.hooked(chain).map(|(_, rest)| rest).eq([jump.as_str()]);
            if self.rules == rules && is_hooked {
                return None;
            }
            if self.rules != rules {
                // With --noflush, naming a chain of one's own empties it.
                let _ = writeln!(text, ":{name} - [0:0]\n{}", rules.join("\n"));
            }
            if !is_hooked {
                let hooked = self.jumps.iter().filter(|(from, ..)| from == hook);
                hooked.for_each(|jump| delete(&mut text, jump));
                let _ = match self.hooked(chain).next() {
                    // In the place of the first: what stands behind it does so on purpose.
                    Some((position, _)) => writeln!(text, "-I {hook} {position} {jump}"),
                    None => writeln!(text, "-A {hook} {jump}"),
                };
            }
        }
        Some(format!("*{table}\n{text}COMMIT\n"))
    }
}

/// What is there of both chains, out of the lines of `iptables-save`.
fn parse(lines: impl Iterator<Item = String>) -> [Present; 2] {
    let mut present = [Present::default(), Present::default()];
    let mut table = String::new();
    // The chain whose rules are listed, and how many there were.
    let mut current = (String::new(), 0);
    for line in lines {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
            current = (String::new(), 0);
            continue;
        }
        let declared = line
            .strip_prefix(':')
            .and_then(|rest| rest.split(' ').next());
        let rule = line
            .strip_prefix("-A ")
            .and_then(|rest| rest.split_once(' '));
        if let Some((name, _)) = rule {
            let position = if current.0 == name { current.1 + 1 } else { 1 };
            current = (name.to_owned(), position);
        }
        for (chain, present) in CHAINS.iter().zip(&mut present) {
            if chain.table != table {
                continue;
            }
            present.exists |= declared == Some(chain.name);
            match rule {
                Some((name, _)) if name == chain.name => present.rules.push(line.clone()),
                Some((name, rest)) if leads_to(rest, chain.name) => {
                    present
                        .jumps
                        .push((name.to_owned(), current.1, rest.to_owned()));
                }
                Some(_) | None => {}
            }
        }
    }
    present
}

/// Whether a rule hands packets to a chain.
fn leads_to(rule: &str, chain: &str) -> bool {
    let words: Vec<&str> = rule.split(' ').collect();
    words.windows(2).any(|pair| {
        let [option, target] = pair else { return false };
        ["-j", "-g"].contains(option) && *target == chain
    })
}

/// What there is to know about a family's rules.
#[derive(Debug, Default)]
struct Known {
    wanted: Wanted,
    /// Nothing is wanted, and nothing was found.
    away: bool,
    /// How this version of iptables lists what we have set, if not in the words in which we set it: seen once, and seen
    /// twice, when it counts.
    listed: Option<[Present; 2]>,
    confirmed: bool,
}

/// The rules in iptables, and what is known about them.
#[derive(Debug, Default)]
pub(super) struct Iptables {
    variant: Variant,
    /// Whether the program of a family has what [`CAPABLE`] says.
    capable: PerFamily<Option<bool>>,
    known: PerFamily<Known>,
}

impl Iptables {
    /// The rules in the place that is not the installed iptables' own; nothing where none is installed.
    pub(super) fn elsewhere() -> Option<Self> {
        let [program, ..] = Variant::Installed.programs(Family::V4);
        let output = run_program(program, &["--version"], "").ok()?;
        Some(Self {
            variant: Variant::other(&String::from_utf8_lossy(&output.stdout)),
            ..Self::default()
        })
    }

    /// Makes a family's chains what they should be; whether anything was changed.
    pub(super) fn keep(&mut self, family: Family, wanted: &Wanted) -> Result<bool, TrafficError> {
        let known = self.known.get(family);
        if known.wanted == *wanted && known.away {
            return Ok(false);
        }
        let before = core::mem::take(self.known.get_mut(family));
        let mut known = if before.wanted == *wanted {
            before
        } else {
            Known {
                wanted: wanted.clone(),
                ..Known::default()
            }
        };
        let result = self.mend(family, wanted, &mut known);
        *self.known.get_mut(family) = known;
        result
    }

    fn mend(
        &mut self,
        family: Family,
        wanted: &Wanted,
        known: &mut Known,
    ) -> Result<bool, TrafficError> {
        let rules = [wanted.masquerade(family), wanted.forward(family)];
        let nothing = rules.iter().all(Vec::is_empty);
        if nothing && !self.variant.may_have_rules(family) {
            known.away = true;
            return Ok(false);
        }
        let present = match read(self.variant, family) {
            // What is not installed has left nothing.
            Err(TrafficError::Missing { .. }) if nothing => {
                known.away = true;
                return Ok(false);
            }
            present => present?,
        };
        let capable = self.capable(family)?;
        let random_fully = wanted.random_fully && capable;
        let mend = |present: &[Present; 2]| -> String {
            let chains = CHAINS.iter().zip(&rules).zip(present);
            chains
                .filter_map(|((chain, rules), present)| {
                    present.mend(chain, &chain.lines(rules, random_fully))
                })
                .collect()
        };
        let text = mend(&present);
        known.away = nothing && text.is_empty();
        if text.is_empty() || (known.confirmed && known.listed.as_ref() == Some(&present)) {
            return Ok(false);
        }
        let [_, _, program] = self.variant.programs(family);
        let mut arguments = vec!["--noflush"];
        arguments.extend(Some(WAIT).filter(|_| capable));
        let output = run_program(program, &arguments, &text)
            .map_err(|error| TrafficError::run(program, PACKAGE, error))?;
        if !output.status.success() {
            return Err(TrafficError::refused(program, &output.stderr));
        }
        if !nothing {
            tracing::info!(%family, "masquerade and forward rules set in iptables");
            let after = read(self.variant, family)?;
            if mend(&after).is_empty() {
                known.listed = None;
            } else {
                known.confirmed = known.listed.as_ref() == Some(&after);
                known.listed = Some(after);
            }
        }
        Ok(true)
    }

    /// Asks the program of a family for its version, once.
    fn capable(&mut self, family: Family) -> Result<bool, TrafficError> {
        if let Some(known) = self.capable.get(family) {
            return Ok(*known);
        }
        let [program, ..] = self.variant.programs(family);
        let output = run_program(program, &["--version"], "")
            .map_err(|error| TrafficError::run(program, PACKAGE, error))?;
        let capable = version(&String::from_utf8_lossy(&output.stdout)) >= CAPABLE;
        *self.capable.get_mut(family) = Some(capable);
        Ok(capable)
    }
}

/// The version in the words of `iptables --version`, such as `iptables v1.8.9 (nf_tables)`; zeros if there is none.
fn version(text: &str) -> [u32; 3] {
    let words = text.split_whitespace();
    let numbers = words.filter_map(|word| word.strip_prefix('v')).next();
    let mut parts = numbers.unwrap_or_default().split('.');
    core::array::from_fn(|_| parts.next().and_then(|part| part.parse().ok()).unwrap_or(0))
}

/// What is there. The listing of a node with many services is long, so it is never held as a whole.
fn read(variant: Variant, family: Family) -> Result<[Present; 2], TrafficError> {
    let [_, program, _] = variant.programs(family);
    let failed = |error| TrafficError::run(program, PACKAGE, error);
    let mut child = spawn_program(program, &[]).map_err(failed)?;
    let mut broken = None;
    let present = child.stdout.take().map_or_else(Default::default, |stdout| {
        let lines = BufReader::new(stdout).lines();
        parse(lines.map_while(|line| line.map_err(|error| broken = Some(error)).ok()))
    });
    let output = child.wait_with_output().map_err(failed)?;
    if let Some(error) = broken {
        return Err(failed(error));
    }
    if !output.status.success() {
        return Err(TrafficError::refused(program, &output.stderr));
    }
    Ok(present)
}

#[cfg(test)]
mod tests {
    use super::super::{Networks, recorded};
    use super::*;

    /// What `iptables-save` printed where flannel had set its rules.
    const RECORDED: &str = include_str!("../../tests/recorded/iptables.txt");

    fn present(text: &str) -> [Present; 2] {
        parse(text.lines().map(str::to_owned))
    }

    /// What is done to what is there; nothing if it is right.
    fn mended(text: &str, wanted: &Wanted) -> String {
        let rules = [wanted.masquerade(Family::V4), wanted.forward(Family::V4)];
        let all = CHAINS.iter().zip(&rules).zip(present(text));
        all.filter_map(|((chain, rules), present)| {
            present.mend(chain, &chain.lines(rules, wanted.random_fully))
        })
        .collect()
    }

    #[test]
    fn flannels_recorded_rules_are_ours() {
        assert_eq!(mended(RECORDED, &recorded()), "");
        // In IPv6 they are recorded as the same rules with these prefixes.
        let six = RECORDED
            .replace("10.244.1.0/24", "fd10:244:0:1::/64")
            .replace("10.244.0.0/16", "fd10:244::/48")
            .replace("224.0.0.0/4", "ff00::/8");
        let wanted = recorded();
        let [masquerade, forward] = present(&six);
        let lines = |chain: &Chain, rules: Vec<Rule>| chain.lines(&rules, true);
        assert_eq!(
            lines(&CHAINS[0], wanted.masquerade(Family::V6)),
            masquerade.rules
        );
        assert_eq!(lines(&CHAINS[1], wanted.forward(Family::V6)), forward.rules);
    }

    #[test]
    fn what_is_wrong_is_mended_and_nothing_else() {
        let rules = |from: &str, name: &str| {
            let ours = from
                .lines()
                .filter(|line| line.starts_with(&format!("-A {name}")));
            ours.map(|line| format!("{line}\n")).collect::<String>()
        };
        let masquerade = format!(
            "*nat\n:FLANNEL-POSTRTG - [0:0]\n{}COMMIT\n",
            rules(RECORDED, "FLANNEL-POSTRTG")
        );
        let jump = "-m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n";
        let (first, third) = (
            "-A FLANNEL-POSTRTG -m mark",
            "-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment \"flanneld masq\" -j RETURN\n",
        );
        let hooked = format!("-A POSTROUTING {jump}");
        for (what, text, expected) in [
            (
                "missing rule",
                RECORDED.replace(third, ""),
                masquerade.clone(),
            ),
            (
                "misordered",
                RECORDED
                    .replace(third, "")
                    .replace(first, &format!("{third}{first}")),
                masquerade.clone(),
            ),
            (
                "duplicated",
                RECORDED.replace(third, &format!("{third}{third}")),
                masquerade.clone(),
            ),
            (
                "missing jump",
                RECORDED.replace(&hooked, ""),
                format!("*nat\n{hooked}COMMIT\n"),
            ),
            (
                "duplicated jump behind others",
                RECORDED.replace(
                    &hooked,
                    &format!(
                        "-A POSTROUTING -o x -j ACCEPT\n{hooked}-A POSTROUTING -j RETURN\n{hooked}"
                    ),
                ),
                format!(
                    "*nat\n-D POSTROUTING {jump}-D POSTROUTING {jump}-I POSTROUTING 2 {jump}COMMIT\n"
                ),
            ),
            (
                "a jump of another form",
                RECORDED.replace(&hooked, "-A POSTROUTING -g FLANNEL-POSTRTG\n"),
                format!("*nat\n-D POSTROUTING -g FLANNEL-POSTRTG\n-I POSTROUTING 1 {jump}COMMIT\n"),
            ),
        ] {
            assert_eq!(mended(&text, &recorded()), expected, "{what}");
        }
        let [nat, filter] = ["", ":FLANNEL-POSTRTG - [0:0]\n"]
            .map(|more| mended(&format!("*nat\n{more}COMMIT\n"), &recorded()));
        assert_eq!(nat, filter, "an empty chain is no chain");
        assert!(
            nat.contains(&hooked) && nat.contains("-A FORWARD -m comment"),
            "{nat}"
        );
    }

    #[test]
    fn nothing_of_flannels_stays_where_nothing_is_wanted() {
        // A jump of somebody else's would keep the chain.
        let text = RECORDED.replace("COMMIT\n*nat", "-A MINE -j FLANNEL-FWD\nCOMMIT\n*nat");
        assert_eq!(
            mended(&text, &Wanted::default()),
            "*nat\n:FLANNEL-POSTRTG - [0:0]\n\
             -D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
             -X FLANNEL-POSTRTG\nCOMMIT\n\
             *filter\n:FLANNEL-FWD - [0:0]\n\
             -D FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
             -D MINE -j FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT\n"
        );
        assert_eq!(
            mended(
                "*nat\n:MINE - [0:0]\n-A MINE -j ACCEPT\nCOMMIT\n",
                &Wanted::default()
            ),
            ""
        );
        let forward = Wanted {
            masquerade: false,
            ..recorded()
        };
        let text = mended(RECORDED, &forward);
        assert!(
            text.contains("-X FLANNEL-POSTRTG") && !text.contains("filter"),
            "{text}"
        );
    }

    #[test]
    fn exempt_destinations_stand_before_the_masquerade() {
        let wanted = Wanted {
            no_masquerade: [
                "192.168.0.7/16",
                "fd00::/8",
                "10.0.0.1/32",
                "192.168.0.0/16",
                "0.0.0.0/0",
            ]
            .map(|net| net.parse().unwrap())
            .into(),
            random_fully: false,
            ..recorded()
        };
        let lines = CHAINS[0].lines(&wanted.masquerade(Family::V4), false);
        let end = "-m comment --comment \"flanneld masq\" -j";
        assert_eq!(
            lines[4..],
            [
                format!("-A FLANNEL-POSTRTG -s 10.244.0.0/16 {end} RETURN"),
                format!("-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.0.0.1/32 {end} RETURN"),
                format!("-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 192.168.0.0/16 {end} RETURN"),
                format!("-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 {end} MASQUERADE"),
                format!("-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 {end} MASQUERADE"),
            ]
        );
        assert_eq!(wanted.masquerade(Family::V6).len(), 7);
        assert_eq!(
            Wanted {
                families: PerFamily {
                    v4: wanted.families.v4,
                    v6: None::<Networks>
                },
                ..wanted
            }
            .masquerade(Family::V6),
            []
        );
    }

    #[test]
    fn versions_are_read() {
        for (text, expected) in [
            ("iptables v1.8.9 (nf_tables)\n", [1, 8, 9]),
            ("iptables v1.6.1\n", [1, 6, 1]),
            ("ip6tables v1.10 (legacy)", [1, 10, 0]),
            ("", [0, 0, 0]),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
        assert!([1, 10, 0] >= CAPABLE && [1, 6, 1] < CAPABLE);
    }
}
