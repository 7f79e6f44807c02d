//! What the kernel of a node or pod counted: protocol errors and interface packets.

use core::fmt;
use core::ops::AddAssign;
use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

/// Counters that rise when a packet arrives with a wrong checksum or a wrong length. In a lab
/// without attackers none of them may rise anywhere.
const DAMAGE: [&str; 15] = [
    "Icmp.InCsumErrors",
    "Icmp.InErrors",
    "Icmp6.InCsumErrors",
    "Icmp6.InErrors",
    "Ip6.InHdrErrors",
    "Ip6.InTruncatedPkts",
    "Ip.InHdrErrors",
    "IpExt.InCsumErrors",
    "IpExt.InTruncatedPkts",
    "Tcp.InCsumErrors",
    "Tcp.InErrs",
    "Udp.InCsumErrors",
    "Udp6.InCsumErrors",
    "UdpLite.InCsumErrors",
    "UdpLite.InErrors",
];

/// The protocol counters of one network namespace, or the difference of two readings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelCounters {
    values: BTreeMap<String, i64>,
}

impl KernelCounters {
    /// Reads `snmp`, `netstat` and `snmp6` of the namespace of the calling thread.
    pub(crate) fn read() -> Result<Self> {
        let mut values = BTreeMap::new();
        for file in ["snmp", "netstat"] {
            let path = format!("/proc/thread-self/net/{file}");
            parse(&fs::read_to_string(&path).context(path)?, &mut values);
        }
        // A kernel without IPv6 does not have this one.
        let six = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
        parse_6(&six, &mut values);
        Ok(Self { values })
    }

    /// One counter, such as `Udp.InCsumErrors`; 0 when this kernel does not have it.
    #[must_use]
    pub fn value(&self, name: &str) -> i64 {
        self.values.get(name).copied().unwrap_or_default()
    }

    /// What was counted after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let values = self
            .values
            .iter()
            .map(|(name, value)| (name.clone(), value - earlier.value(name)))
            .collect();
        Self { values }
    }

    /// The counters of damaged packets (wrong checksum, wrong length) that are not zero.
    #[must_use]
    pub fn damage(&self) -> Vec<(&'static str, i64)> {
        DAMAGE
            .iter()
            .map(|name| (*name, self.value(name)))
            .filter(|(_, value)| *value != 0)
            .collect()
    }
}

impl fmt::Display for KernelCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.values.iter().filter(|(_, value)| **value != 0) {
            writeln!(f, "{name} {value}")?;
        }
        Ok(())
    }
}

/// Both files come in pairs of lines: `Udp: InDatagrams NoPorts …` and `Udp: 17 0 …`.
fn parse(text: &str, values: &mut BTreeMap<String, i64>) {
    let mut lines = text.lines();
    while let (Some(names), Some(numbers)) = (lines.next(), lines.next()) {
        let Some((protocol, names)) = names.split_once(':') else {
            continue;
        };
        let numbers = numbers.split_whitespace().skip(1);
        for (name, number) in names.split_whitespace().zip(numbers) {
            if let Ok(number) = number.parse() {
                values.insert(format!("{protocol}.{name}"), number);
            }
        }
    }
}

/// A line for each: `Udp6InDatagrams 17`. They become `Udp6.InDatagrams` and so on.
fn parse_6(text: &str, values: &mut BTreeMap<String, i64>) {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(number)) = (words.next(), words.next())
            && let Some((protocol, name)) = name.split_once('6')
            && let Ok(number) = number.parse()
        {
            values.insert(format!("{protocol}6.{name}"), number);
        }
    }
}

/// Packets and bytes that one interface has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are those of ip -s link")]
pub struct LinkCounters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

impl AddAssign for LinkCounters {
    fn add_assign(&mut self, other: Self) {
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.rx_errors += other.rx_errors;
        self.rx_dropped += other.rx_dropped;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.tx_errors += other.tx_errors;
        self.tx_dropped += other.tx_dropped;
    }
}

impl LinkCounters {
    /// Reads the output of `ip -s -j link show dev X`.
    pub(crate) fn from_ip_json(text: &str) -> Result<Self> {
        let links: Value = serde_json::from_str(text).context("output of ip -s -j link")?;
        let value = |direction: &str, name: &str| {
            let pointer = format!("/0/stats64/{direction}/{name}");
            links
                .pointer(&pointer)
                .and_then(Value::as_u64)
                .with_context(|| format!("{pointer} in {text}"))
        };
        Ok(Self {
            rx_packets: value("rx", "packets")?,
            rx_bytes: value("rx", "bytes")?,
            rx_errors: value("rx", "errors")?,
            rx_dropped: value("rx", "dropped")?,
            tx_packets: value("tx", "packets")?,
            tx_bytes: value("tx", "bytes")?,
            tx_errors: value("tx", "errors")?,
            tx_dropped: value("tx", "dropped")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_damage_counts_as_damage() {
        let read = |text: &str| {
            let mut values = BTreeMap::new();
            parse(text, &mut values);
            KernelCounters { values }
        };
        let before = read(
            "Udp: InDatagrams InErrors InCsumErrors\nUdp: 5 0 1\nTcp: MaxConn InErrs\nTcp: -1 0\n",
        );
        let after = read(
            "Udp: InDatagrams InErrors InCsumErrors\nUdp: 9 2 3\nTcp: MaxConn InErrs\nTcp: -1 0\n",
        );
        let difference = after.since(&before);
        assert_eq!(difference.value("Udp.InDatagrams"), 4);
        assert_eq!(difference.value("Tcp.NoSuchCounter"), 0);
        assert_eq!(difference.damage(), [("Udp.InCsumErrors", 2)]);
    }
}
