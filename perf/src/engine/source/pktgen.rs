//! The kernel's own generator (`net/core/pktgen.c`), driven through `/proc/net/pktgen` of the interface's namespace.
//!
//! Its packets carry pktgen's header instead of ours: one sequence for all, no checksum. It knows no tunnel, no mixture
//! of sizes and no window. One control file rules all its threads of a namespace, so one source at a time.

use core::fmt::Write as _;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};

use super::super::kernel::{Properties, monotonic_ns, nanoseconds};
use super::super::packet::TEST_PORT;
use super::super::{Place, Progress, Source, SourceReport};
use crate::measure::{Limit, Rate, Size, Stream};
use crate::netns::Netns;

/// Where it is controlled, in the namespace of the calling thread.
const CONTROL: &str = "/proc/thread-self/net/pktgen";
const ETHERNET_BYTES: u16 = 14;
/// How long a stop may take before it is asked for again.
const STOP_AGAIN: Duration = Duration::from_millis(10);

pub(super) struct Generator {
    netns: Netns,
    interface: String,
    driver: String,
    thread: String,
    commands: Vec<String>,
    inner_bytes: u16,
    sending: Option<Sending>,
}

struct Sending {
    thread: JoinHandle<Result<()>>,
    ender: JoinHandle<Result<()>>,
    rate: Rate,
    duration: Duration,
    begin_ns: u64,
}

impl Generator {
    pub(super) fn new(place: &Place<'_>, stream: &Stream, properties: &Properties) -> Result<Self> {
        let (commands, inner_bytes) = commands(stream)?;
        ensure!(properties.ethernet, "pktgen makes Ethernet frames only");
        place.netns.run(|| {
            ensure!(
                Path::new(CONTROL).join("pgctrl").exists(),
                "pktgen is not here: modprobe pktgen (the kernel needs CONFIG_NET_PKTGEN)"
            );
            Ok(())
        })??;
        Ok(Self {
            netns: place.netns.clone(),
            interface: place.interface.clone(),
            driver: properties.driver.clone(),
            thread: format!("kpktgend_{}", place.cpu.unwrap_or(0)),
            commands,
            inner_bytes,
            sending: None,
        })
    }

    fn stop(&self) -> Result<()> {
        self.netns.run(|| write("pgctrl", "stop"))?
    }
}

/// Writes a line to a control file.
fn write(file: &str, line: &str) -> Result<()> {
    fs::write(format!("{CONTROL}/{file}"), format!("{line}\n"))
        .with_context(|| format!("pktgen: {file}: {line}"))
}

/// What makes the device send a stream, but for its rate, and the inner bytes of a packet.
fn commands(stream: &Stream) -> Result<(Vec<String>, u16)> {
    let Size::Bytes(bytes) = stream.size else {
        bail!("pktgen cannot mix sizes")
    };
    ensure!(stream.tunnel.is_none(), "pktgen makes no tunnel packets");
    let (Some(first), Some(last)) = (stream.to.first(), stream.to.last()) else {
        bail!("a stream without destination")
    };
    let six = if first.is_ipv6() { "6" } else { "" };
    let number = |address: &core::net::IpAddr| match address {
        core::net::IpAddr::V4(four) => u128::from(four.to_bits()),
        core::net::IpAddr::V6(six) => six.to_bits(),
    };
    let row = stream
        .to
        .windows(2)
        .all(|pair| number(&pair[0]) + 1 == number(&pair[1]));
    ensure!(
        row && (six.is_empty() || stream.to.len() == 1),
        "pktgen takes destinations that follow one another (IPv6: one only)"
    );
    let flows = u16::try_from(stream.flows.max(1)).ok();
    // The upper end is not one of them, unless both are the same.
    let end = flows.and_then(|flows| stream.first_port.checked_add(flows));
    let end = end.context("pktgen's flows are source ports: there are fewer")?;
    let end = if stream.flows > 1 {
        end
    } else {
        stream.first_port
    };
    let mut lines = vec![
        "count 0".to_owned(),
        "clone_skb 0".to_owned(),
        format!("pkt_size {}", bytes + ETHERNET_BYTES),
        format!("dst_mac {}", stream.to_mac),
        format!("src_mac {}", stream.from_mac),
        format!("udp_src_min {}", stream.first_port),
        format!("udp_src_max {end}"),
        format!("udp_dst_min {TEST_PORT}"),
        format!("udp_dst_max {TEST_PORT}"),
    ];
    if six.is_empty() {
        lines.extend([
            format!("dst_min {first}"),
            format!("dst_max {last}"),
            format!("src_min {}", stream.from),
            format!("src_max {}", stream.from),
        ]);
    } else {
        // Over IPv6 a UDP packet must have a checksum.
        lines.extend([
            format!("dst6 {first}"),
            format!("src6 {}", stream.from),
            "flag UDPCSUM".to_owned(),
        ]);
    }
    Ok((lines, bytes))
}

/// How a rate is said.
fn pace(rate: Rate) -> Result<String> {
    match rate {
        Rate::Max => Ok("delay 0".into()),
        Rate::Pps(pps) => Ok(format!("ratep {pps}")),
        Rate::Window(_) => bail!("pktgen knows no window"),
    }
}

/// What a device's file says of the last run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outcome {
    sent: u64,
    errors: u64,
    elapsed: Duration,
}

/// Reads a device's file: `pkts-sofar: 100  errors: 0`, and further down `Result: OK: 1234(c1200+d34) usec, …`.
fn parse(text: &str) -> Result<Outcome> {
    let after = |label: &str| {
        let rest = text.split_once(label).map(|(_, rest)| rest.trim_start());
        let digits = rest.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        digits.flatten().unwrap_or_default().parse::<u64>()
    };
    let complaint = || format!("pktgen says:\n{text}");
    Ok(Outcome {
        sent: after("pkts-sofar:").with_context(complaint)?,
        errors: after("errors:").with_context(complaint)?,
        elapsed: Duration::from_micros(after("Result: OK:").with_context(complaint)?),
    })
}

impl Source for Generator {
    fn start(
        &mut self,
        rate: Rate,
        duration: Duration,
        _feedback: Option<Arc<Progress>>,
    ) -> Result<()> {
        ensure!(self.sending.is_none(), "the source is sending already");
        let pace = pace(rate)?;
        self.netns.run(|| {
            write(&self.thread, "rem_device_all")?;
            write(&self.thread, &format!("add_device {}", self.interface))?;
            for line in self.commands.iter().chain([&pace]) {
                write(&self.interface, line)?;
            }
            Ok::<_, anyhow::Error>(())
        })??;
        let begin_ns = monotonic_ns();
        // "start" returns when the device has ended, which somebody has to do.
        let ended = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (netns, ended) = (self.netns.clone(), Arc::clone(&ended));
            move || {
                let outcome = netns.run(|| write("pgctrl", "start"));
                ended.store(true, Ordering::Relaxed);
                outcome?
            }
        });
        let netns = self.netns.clone();
        let ender = thread::spawn(move || {
            thread::sleep(duration);
            // Until it works: a stop before the start, on a machine in a hurry, is lost.
            while !ended.load(Ordering::Relaxed) {
                netns.run(|| write("pgctrl", "stop"))??;
                thread::sleep(STOP_AGAIN);
            }
            Ok(())
        });
        self.sending = Some(Sending {
            thread,
            ender,
            rate,
            duration,
            begin_ns,
        });
        Ok(())
    }

    fn is_sending(&self) -> bool {
        let sending = self.sending.as_ref();
        sending.is_some_and(|sending| !sending.thread.is_finished())
    }

    fn finish(&mut self) -> Result<SourceReport> {
        let sending = self.sending.take().context("the source was not started")?;
        for thread in [sending.ender, sending.thread] {
            match thread.join() {
                Ok(outcome) => outcome?,
                Err(_panic) => bail!("the source's thread panicked"),
            }
        }
        let path = format!("{CONTROL}/{}", self.interface);
        let text = self
            .netns
            .run(|| fs::read_to_string(&path).context(path))??;
        let result = parse(&text)?;
        let mut limits = Vec::new();
        if let Rate::Pps(pps) = sending.rate {
            let asked = u128::from(pps) * u128::from(nanoseconds(sending.duration)) / 1_000_000_000;
            if u128::from(result.sent) * 1000 < asked * 999 {
                limits.push(Limit::Source(format!(
                    "offered {} of the {asked} packets that were asked for",
                    result.sent
                )));
            }
        }
        if result.errors > 0 {
            let mut text = String::new();
            write!(text, "the interface refused {} packets", result.errors)?;
            limits.push(Limit::Source(text));
        }
        Ok(SourceReport {
            sent: result.sent,
            sent_by_flow: vec![result.sent],
            bytes: result.sent * u64::from(self.inner_bytes),
            first_ns: sending.begin_ns,
            elapsed: result.elapsed,
            // Its thread is the kernel's, and busy as long as it runs.
            cpu: result.elapsed,
            limits,
        })
    }

    fn describe(&self) -> String {
        format!(
            "pktgen, {} on {} ({})",
            self.thread, self.interface, self.driver
        )
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        if self.sending.is_some() {
            // The device's threads then end by themselves.
            drop(self.stop());
        }
        let remove = || write(&self.thread, "rem_device_all");
        drop(self.netns.run(remove));
    }
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use super::*;
    use crate::address::Mac;

    fn stream() -> Stream {
        Stream {
            to_mac: Mac([2, 0, 0, 0, 0, 1]),
            from_mac: Mac([2, 0, 0, 0, 0, 2]),
            from: Ipv4Addr::new(10, 244, 1, 2).into(),
            to: vec![
                Ipv4Addr::new(10, 244, 2, 2).into(),
                Ipv4Addr::new(10, 244, 2, 3).into(),
            ],
            first_port: 20_000,
            flows: 64,
            size: Size::Bytes(64),
            tunnel: None,
        }
    }

    #[test]
    fn a_stream_is_said_in_its_words() {
        let (lines, bytes) = commands(&stream()).expect("it can");
        assert_eq!(bytes, 64);
        let expected = [
            "count 0",
            "clone_skb 0",
            "pkt_size 78",
            "dst_mac 02:00:00:00:00:01",
            "src_mac 02:00:00:00:00:02",
            "udp_src_min 20000",
            "udp_src_max 20064",
            "udp_dst_min 9",
            "udp_dst_max 9",
            "dst_min 10.244.2.2",
            "dst_max 10.244.2.3",
            "src_min 10.244.1.2",
            "src_max 10.244.1.2",
        ];
        assert_eq!(lines, expected);
        assert_eq!(pace(Rate::Pps(1000)).expect("it can"), "ratep 1000");
        assert_eq!(pace(Rate::Max).expect("it can"), "delay 0");
        assert!(pace(Rate::Window(1)).is_err());
    }

    #[test]
    fn what_it_cannot_is_refused() {
        let far = Ipv4Addr::new(10, 244, 9, 9).into();
        let changes: [fn(&mut Stream); 4] = [
            |stream| stream.size = Size::Imix,
            |stream| stream.flows = 60_000,
            |stream| stream.to.clear(),
            |stream| {
                let (from, to) = (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST);
                stream.tunnel = Some(crate::measure::Tunnel::Ipip { from, to });
            },
        ];
        for change in changes {
            let mut stream = stream();
            change(&mut stream);
            assert!(commands(&stream).is_err(), "{stream:?}");
        }
        let mut scattered = stream();
        scattered.to.push(far);
        assert!(commands(&scattered).is_err());
    }

    #[test]
    fn its_report_is_read() {
        // As `pktgen_if_show` and `show_results` write it.
        let text = "Params: count 0  min_pkt_size: 78  max_pkt_size: 78\n     flows: 0 flowlen: 0\n\
            Current:\n     pkts-sofar: 123456  errors: 7\n     started: 10us  stopped: 20us idle: 3us\n\
            Result: OK: 500123(c400100+d100023) usec, 123456 (78byte,0frags)\n  246000pps 153Mb/sec (153504000bps) errors: 7\n";
        let outcome = Outcome {
            sent: 123_456,
            errors: 7,
            elapsed: Duration::from_micros(500_123),
        };
        assert_eq!(parse(text).expect("reads"), outcome);
        assert!(parse("Result: Idle").is_err());
    }
}
