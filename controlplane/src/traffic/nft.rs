//! The rules in nftables: flannel's tables, chains and comments, with what its iptables mode means.
//!
//! Three things differ from flannel's own tables: the fourth rule spares what comes from outside to a pod of *this*
//! node (flannel's spares what comes to any, so that its last rule never matches); the mark is masked; and there is no
//! empty table for a family that is off.
//!
//! A chain is emptied and filled in one transaction, never deleted and made anew: two chains on one hook, of which one
//! goes when the other comes, leave a packet that is between them without masquerade.

use core::fmt::Write as _;

use super::{MARK, Rule, TrafficError, Verdict, Wanted};
use crate::family::{Family, PerFamily};
use crate::sys::run_program;

const PROGRAM: &str = "nft";
/// The names of the tables.
pub(super) const TABLES: [&str; 2] = ["flannel-ipv4", "flannel-ipv6"];

/// The words of a family's table.
pub(super) fn place(family: Family) -> &'static str {
    match family {
        Family::V4 => "nftables table ip flannel-ipv4",
        Family::V6 => "nftables table ip6 flannel-ipv6",
    }
}

fn table(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("ip", "flannel-ipv4"),
        Family::V6 => ("ip6", "flannel-ipv6"),
    }
}

/// A chain of ours, which has rules.
#[derive(Debug)]
struct Chain {
    name: &'static str,
    comment: &'static str,
    hook: &'static str,
    rules: Vec<String>,
}

fn text(family: Family, rule: &Rule, random_fully: bool) -> String {
    let (ip, _) = table(family);
    let mut words = Vec::new();
    if rule.marked {
        words.push(format!("meta mark & {MARK:#010x} == {MARK:#010x}"));
    }
    for (side, condition) in [("saddr", rule.source), ("daddr", rule.destination)] {
        if let Some(condition) = condition {
            let not = if condition.inside { "" } else { "!= " };
            words.push(format!("{ip} {side} {not}{}", bare(condition.net)));
        }
    }
    words.push(
        match (rule.verdict, random_fully) {
            (Verdict::Return, _) => "return",
            (Verdict::Accept, _) => "accept",
            (Verdict::Masquerade, true) => "masquerade fully-random",
            (Verdict::Masquerade, false) => "masquerade",
        }
        .to_owned(),
    );
    words.join(" ")
}

/// A prefix as nft lists it: one that is an address has no length.
fn bare(net: ipnet::IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

/// The chains that a family is to have.
fn chains(family: Family, wanted: &Wanted, random_fully: bool) -> Vec<Chain> {
    let texts = |rules: Vec<Rule>| {
        let texts = rules.iter().map(|rule| text(family, rule, random_fully));
        texts.collect::<Vec<_>>()
    };
    let mut chains = vec![
        Chain {
            name: "postrtg",
            comment: "chain to manage traffic masquerading by flannel",
            hook: "type nat hook postrouting priority srcnat; policy accept;",
            rules: texts(wanted.masquerade(family)),
        },
        Chain {
            name: "forward",
            comment: "chain to accept flannel traffic",
            hook: "type filter hook forward priority filter; policy accept;",
            rules: texts(wanted.forward(family)),
        },
    ];
    chains.retain(|chain| !chain.rules.is_empty());
    chains
}

/// The whole table as nft lists it, which it also reads.
fn listing(family: Family, chains: &[Chain]) -> String {
    let (ip, name) = table(family);
    let mut text = format!("table {ip} {name} {{\n\tcomment \"rules for {name}\"\n");
    for (index, chain) in chains.iter().enumerate() {
        let gap = if index == 0 { "" } else { "\n" };
        let Chain {
            name,
            comment,
            hook,
            rules,
        } = chain;
        let _ = writeln!(
            text,
            "{gap}\tchain {name} {{\n\t\tcomment \"{comment}\"\n\t\t{hook}\n\t\t{}\n\t}}",
            rules.join("\n\t\t")
        );
    }
    text + "}\n"
}

/// The transaction that fills the chains of the table, whatever was in them.
fn fill(family: Family, chains: &[Chain]) -> String {
    let (ip, name) = table(family);
    let place = format!("{ip} {name}");
    let mut text = format!("add table {place} {{ comment \"rules for {name}\"; }}\n");
    for chain in chains {
        let Chain {
            name,
            comment,
            hook,
            rules,
        } = chain;
        let _ = writeln!(
            text,
            "add chain {place} {name} {{ {hook} comment \"{comment}\"; }}\nflush chain {place} {name}"
        );
        for rule in rules {
            let _ = writeln!(text, "add rule {place} {name} {rule}");
        }
    }
    text
}

/// The transaction that puts the whole table in the place of any other.
fn replace(family: Family, chains: &[Chain]) -> String {
    let (ip, name) = table(family);
    // "add" so that "delete" finds something.
    let listing = listing(family, chains);
    format!("add table {ip} {name}\ndelete table {ip} {name}\n{listing}")
}

/// What a table consists of, without what is in its parts.
fn parts(listing: &str) -> impl Iterator<Item = &str> {
    let lines = listing.lines().filter_map(|line| line.strip_prefix('\t'));
    lines.filter(|line| !line.starts_with('\t'))
}

/// What there is to know about a family's table.
#[derive(Debug, Default)]
struct Known {
    wanted: Wanted,
    /// Nothing is wanted, and nothing was found.
    away: bool,
    /// What nft lists when all is well.
    listed: Option<String>,
}

/// The rules in nftables, and what is known about them.
#[derive(Debug, Default)]
pub(super) struct Nft {
    known: PerFamily<Known>,
    /// The kernel cannot choose ports at random.
    not_random: bool,
    /// Transactions since [`Self::take_transactions`].
    transactions: usize,
}

impl Nft {
    /// How many transactions there were since the last question.
    pub(super) fn take_transactions(&mut self) -> usize {
        core::mem::take(&mut self.transactions)
    }

    /// Forgets what nft has listed: it may have been another's.
    pub(super) fn forget(&mut self) {
        self.known.v4.listed = None;
        self.known.v6.listed = None;
    }

    /// Makes a family's table what it should be; whether anything was changed.
    pub(super) fn keep(&mut self, family: Family, wanted: &Wanted) -> Result<bool, TrafficError> {
        let known = self.known.get(family);
        if known.wanted == *wanted && known.away {
            return Ok(false);
        }
        let same = known.wanted == *wanted;
        let listed = known.listed.clone().filter(|_| same);
        let wished = chains(family, wanted, wanted.random_fully && !self.not_random);
        let present = match list(family) {
            // What is not installed has left nothing.
            Err(TrafficError::Missing { .. }) if wished.is_empty() => None,
            listed => listed?,
        };
        let (changed, listed) = if wished.is_empty() {
            let changed = present.is_some();
            if changed {
                let (ip, name) = table(family);
                self.commit(&format!("delete table {ip} {name}\n"))?;
            }
            (changed, None)
        } else {
            // In the words of another version of nft, it is known to be right when we have set it.
            let right = listed.unwrap_or_else(|| listing(family, &wished));
            if present.as_ref() == Some(&right) {
                (false, Some(right))
            } else {
                self.load(family, wanted, &wished)?;
                tracing::info!(%family, "masquerade and forward rules set in nftables");
                (true, list(family)?)
            }
        };
        *self.known.get_mut(family) = Known {
            wanted: wanted.clone(),
            away: wished.is_empty(),
            listed,
        };
        Ok(changed)
    }

    /// Fills the chains, or, where something else stands under the name of one of them, replaces the table.
    fn load(
        &mut self,
        family: Family,
        wanted: &Wanted,
        wished: &[Chain],
    ) -> Result<(), TrafficError> {
        let is_whole = |present: Option<String>| {
            let right = listing(family, wished);
            present.is_some_and(|present| parts(&present).eq(parts(&right)))
        };
        if self.commit(&fill(family, wished)).is_ok() && is_whole(list(family)?) {
            return Ok(());
        }
        let Err(error) = self.commit(&replace(family, wished)) else {
            return Ok(());
        };
        if !wanted.random_fully || self.not_random {
            return Err(error);
        }
        let plain = chains(family, wanted, false);
        // If that is not the reason either, the first answer is the one that counts.
        if self.commit(&replace(family, &plain)).is_err() {
            return Err(error);
        }
        self.not_random = true;
        tracing::info!("this kernel does not choose ports of masqueraded flows at random");
        Ok(())
    }

    fn commit(&mut self, text: &str) -> Result<(), TrafficError> {
        let output = run_program(PROGRAM, &["-f", "-"], text).map_err(failed)?;
        if !output.status.success() {
            return Err(TrafficError::refused(PROGRAM, &output.stderr));
        }
        self.transactions += 1;
        Ok(())
    }
}

fn failed(error: std::io::Error) -> TrafficError {
    TrafficError::run(PROGRAM, "nftables", error)
}

/// A family's table as nft lists it, if there is one.
fn list(family: Family) -> Result<Option<String>, TrafficError> {
    let (ip, name) = table(family);
    let output = run_program(PROGRAM, &["-s", "list", "table", ip, name], "").map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(output.status.success().then_some(text))
}

#[cfg(test)]
mod tests {
    use super::super::recorded;
    use super::*;

    /// What `nft list ruleset` printed where flannel had set its rules.
    const RECORDED: &str = r#"table ip flannel-ipv4 {
	comment "rules for flannel-ipv4"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark 0x00004000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}

	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
}
"#;

    /// The two rules that are not flannel's: the mark is one bit of many, and who comes from outside is masqueraded on
    /// the way to another node's pod only.
    const DIFFERENCES: [(&str, &str); 2] = [
        (
            "meta mark 0x00004000 return",
            "meta mark & 0x00004000 == 0x00004000 return",
        ),
        (
            "ip saddr != 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
            "ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return",
        ),
    ];

    fn expected() -> String {
        DIFFERENCES
            .iter()
            .fold(RECORDED.to_owned(), |text, (flannels, ours)| {
                assert!(text.contains(flannels), "{flannels}");
                text.replace(flannels, ours)
            })
    }

    #[test]
    fn flannels_recorded_table_is_ours_but_for_two_rules() {
        let table = |family| listing(family, &chains(family, &recorded(), true));
        assert_eq!(table(Family::V4), expected());
        let six = expected()
            .replace("10.244.1.0/24", "fd10:244:0:1::/64")
            .replace("10.244.0.0/16", "fd10:244::/48")
            .replace("224.0.0.0/4", "ff00::/8")
            .replace("flannel-ipv4", "flannel-ipv6")
            .replace("ip ", "ip6 ");
        assert_eq!(table(Family::V6), six);
    }

    #[test]
    fn parts_are_told_from_their_content() {
        let text = expected();
        let found: Vec<&str> = parts(&text).collect();
        assert_eq!(
            found,
            [
                "comment \"rules for flannel-ipv4\"",
                "chain postrtg {",
                "}",
                "chain forward {",
                "}"
            ]
        );
        let dormant = text.replace("\tcomment \"rules", "\tflags dormant\n\tcomment \"rules");
        assert!(!parts(&dormant).eq(parts(&text)));
    }

    #[test]
    fn an_address_has_no_length() {
        let wanted = Wanted {
            no_masquerade: vec![
                "10.9.9.9/32".parse().unwrap(),
                "10.9.0.0/16".parse().unwrap(),
            ],
            ..recorded()
        };
        let text = listing(Family::V4, &chains(Family::V4, &wanted, false));
        for rule in [
            "\t\tip saddr 10.244.0.0/16 ip daddr 10.9.0.0/16 return\n\t\tip saddr 10.244.0.0/16 ip daddr 10.9.9.9 return\n",
            "ip daddr != 224.0.0.0/4 masquerade\n",
        ] {
            assert!(text.contains(rule), "{text}");
        }
    }
}
