//! The engines on themselves: what a source has sent a sink has seen, and damage that was put there is reported, exactly.
//!
//! ```text
//!   n1                     n2                        n1        n3: forwards, and does harm      n2
//!   source ═══ veth ═══ sink          or             source ═ veth ═ left ─ thread ─ right ═ veth ═ sink
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use ripstop_perf::address::{self, Mac};
use ripstop_perf::engine::agent::Peer;
use ripstop_perf::engine::{self, Detail, Hook, Place, Sink, SinkOptions, Source};
use ripstop_perf::measure::{Limit, Rate, Size, SourceKind, Stream, Trial, Tunnel};
use ripstop_perf::{Capture, Direction, Host, Injector, Lab, wait_until};

/// The tests need the cores for themselves.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A generous limit.
const WAIT: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(150);

/// A veth pair between two hosts: `near` on the one, `far` on the other. Neither speaks by itself.
fn wire(one: &dyn Host, near: &str, other: &dyn Host, far: &str) -> Result<()> {
    let there = other.netns().name();
    one.output(&[
        "ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", there,
    ])?;
    for (host, end) in [(one, near), (other, far)] {
        host.output(&[
            "sysctl",
            "-qw",
            &format!("net.ipv6.conf.{end}.disable_ipv6=1"),
        ])?;
        host.output(&["ip", "link", "set", end, "up"])?;
        // The peer of a source polls, so that it takes live frames without an XDP program, too. Linux 6.18 wants this
        // after "up".
        host.output(&["ethtool", "-K", end, "gro", "on"])?;
    }
    Ok(())
}

fn stream(size: Size) -> Stream {
    Stream {
        to_mac: Mac([2, 0, 0, 0, 0, 2]),
        from_mac: Mac([2, 0, 0, 0, 0, 1]),
        from: Ipv4Addr::new(10, 244, 1, 2).into(),
        to: vec![
            Ipv4Addr::new(10, 244, 2, 2).into(),
            Ipv4Addr::new(10, 244, 3, 2).into(),
        ],
        first_port: 20_000,
        flows: 7,
        size,
        tunnel: None,
    }
}

fn vxlan() -> Tunnel {
    Tunnel::Vxlan {
        from: address::underlay(1),
        to: address::underlay(2),
        vni: 1,
        port: address::VXLAN_PORT,
        inner_to_mac: address::vtep_mac(2),
        inner_from_mac: address::vtep_mac(1),
    }
}

/// Streams of every family and tunnel.
fn streams() -> Vec<Stream> {
    let (from, to) = (address::underlay(1), address::underlay(2));
    let mut six = stream(Size::Bytes(90));
    six.from = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2).into();
    six.to = vec![IpAddr::V6(Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2))];
    let with = |tunnel, stream: &Stream| Stream {
        tunnel: Some(tunnel),
        ..stream.clone()
    };
    let four = stream(Size::Bytes(64));
    vec![
        with(vxlan(), &four),
        with(vxlan(), &six),
        with(Tunnel::Ipip { from, to }, &stream(Size::Imix)),
        with(
            Tunnel::Udp {
                from,
                to,
                port: address::UDP_PORT,
            },
            &stream(Size::Bytes(1450)),
        ),
        four,
        six,
        stream(Size::Imix),
    ]
}

fn at<'a>(host: &'a dyn Host, interface: &str) -> Place<'a> {
    Place {
        netns: host.netns(),
        interface: interface.to_owned(),
        cpu: None,
    }
}

fn sink(
    host: &dyn Host,
    interface: &str,
    stream: &Stream,
    detail: Detail,
    hook: Hook,
) -> Result<Box<dyn Sink>> {
    let options = SinkOptions {
        hook,
        ..SinkOptions::default()
    };
    engine::sink_with(&at(host, interface), stream, detail, &options)
}

/// A trial in which nothing may be wrong.
fn perfect(source: &mut dyn Source, sink: &mut dyn Sink, rate: Rate) -> Result<Trial> {
    let trial = engine::trial(source, sink, rate, SHORT)?;
    let what = format!("{} to {}: {trial:?}", source.describe(), sink.describe());
    ensure!(trial.sent > 100, "few were sent: {what}");
    assert_eq!((trial.received, trial.lost), (trial.sent, 0), "{what}");
    assert_eq!(
        (trial.reordered, trial.duplicated, trial.corrupt),
        (0, 0, 0),
        "{what}"
    );
    Ok(trial)
}

#[test]
fn what_was_sent_is_what_came() -> Result<()> {
    let _alone = alone();
    Lab::builder().linux(2).pods(1).run(|lab| {
        wire(lab.node(1), "source", lab.node(2), "sink")?;
        for stream in streams() {
            for (detail, hook) in [
                (Detail::Count, Hook::Xdp),
                (Detail::Count, Hook::Ingress),
                (Detail::Check, Hook::Xdp),
                (Detail::Check, Hook::Ingress),
            ] {
                let mut sink = sink(lab.node(2), "sink", &stream, detail, hook)?;
                for kind in [SourceKind::AfXdp, SourceKind::LiveFrames] {
                    let mut source = engine::source(&at(lab.node(1), "source"), &stream, kind)?;
                    // Twice: an engine can be used again.
                    for rate in [Rate::Window(128), Rate::Pps(10_000)] {
                        let trial = perfect(&mut *source, &mut *sink, rate)?;
                        let limits = trial
                            .limits
                            .iter()
                            .filter(|limit| !matches!(limit, Limit::Source(_)));
                        assert_eq!(limits.count(), 0, "{:?}", trial.limits);
                        let bytes = match stream.size {
                            Size::Bytes(bytes) => trial.sent * u64::from(bytes),
                            Size::Imix => trial.received_bytes,
                        };
                        assert_eq!(trial.received_bytes, bytes, "{}", sink.describe());
                        assert_eq!(trial.latency.is_some(), detail == Detail::Check);
                        if let Some(latency) = trial.latency {
                            assert_eq!(latency.len(), trial.received);
                            assert!(latency.max() < 10_000_000_000, "{} ns", latency.max());
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn the_source_is_chosen_by_what_gets_through() -> Result<()> {
    let _alone = alone();
    Lab::builder().linux(2).pods(1).run(|lab| {
        wire(lab.node(1), "source", lab.node(2), "sink")?;
        let (stream, place) = (stream(Size::Bytes(64)), at(lab.node(1), "source"));
        let chosen = || {
            Ok::<_, anyhow::Error>(engine::source(&place, &stream, SourceKind::Auto)?.describe())
        };
        drop(engine::source(&place, &stream, SourceKind::LiveFrames)?);
        ensure!(chosen()?.contains("live frames"), "{}", chosen()?);
        // A veth whose peer does not poll throws live frames away.
        lab.node(2)
            .output(&["ethtool", "-K", "sink", "gro", "off"])?;
        ensure!(chosen()?.contains("AF_XDP"), "{}", chosen()?);
        let refused = engine::source(&place, &stream, SourceKind::LiveFrames);
        let Err(error) = refused.map(drop) else {
            bail!("live frames through a veth that takes none");
        };
        ensure!(format!("{error:#}").contains("must poll"), "{error:#}");
        Ok(())
    })
}

/// What becomes of the frames between two interfaces.
#[derive(Default)]
struct Harm {
    seen: u64,
    dropped: u64,
    repeated: u64,
    swapped: u64,
    corrupted: u64,
    held: Option<Vec<u8>>,
}

impl Harm {
    /// Passes a frame on, or does it some harm.
    fn pass(&mut self, mut frame: Vec<u8>, out: &Injector) -> Result<()> {
        self.seen += 1;
        match self.seen {
            n if n % 10 == 0 => {
                self.dropped += 1;
                return Ok(());
            }
            // Held back until the next good one has gone.
            n if n % 17 == 0 && self.held.is_none() => {
                self.held = Some(frame);
                return Ok(());
            }
            n if n % 19 == 0 => {
                self.corrupted += 1;
                if let Some(last) = frame.last_mut() {
                    *last ^= 1;
                }
                return out.send(&frame);
            }
            n if n % 13 == 0 => {
                self.repeated += 1;
                out.send(&frame)?;
            }
            _ => {}
        }
        out.send(&frame)?;
        if let Some(held) = self.held.take() {
            self.swapped += 1;
            out.send(&held)?;
        }
        Ok(())
    }
}

/// A source and a sink with somebody between them.
fn between(
    lab: &Lab,
    mut pass: impl FnMut(Vec<u8>, &Injector) -> Result<()> + Send + 'static,
) -> Result<Capture> {
    wire(lab.node(1), "source", lab.node(3), "left")?;
    wire(lab.node(3), "right", lab.node(2), "sink")?;
    // Whole packets, not what GRO makes of them.
    lab.node(3)
        .output(&["ethtool", "-K", "left", "gro", "off"])?;
    let out = Injector::open(lab.node(3), "right")?;
    let pass = Mutex::new(move |frame: &[u8]| pass(frame.to_vec(), &out));
    Capture::start_filtered(lab.node(3), "left", 0, move |frame| {
        if frame.direction == Direction::In {
            let mut pass = pass.lock().unwrap_or_else(PoisonError::into_inner);
            pass(&frame.bytes).expect("forwards");
        }
        false
    })
}

#[test]
fn harm_is_reported_exactly() -> Result<()> {
    let _alone = alone();
    for hook in [Hook::Xdp, Hook::Ingress] {
        Lab::builder().linux(3).pods(1).run(|lab| {
            let harm = Arc::new(Mutex::new(Harm::default()));
            let forwarder = between(lab, {
                let harm = Arc::clone(&harm);
                move |frame, out| {
                    harm.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .pass(frame, out)
                }
            })?;
            let mut stream = stream(Size::Bytes(200));
            (stream.flows, stream.tunnel) = (1, Some(vxlan()));
            stream.to.truncate(1);
            let mut source =
                engine::source(&at(lab.node(1), "source"), &stream, SourceKind::AfXdp)?;
            let mut sink = sink(lab.node(2), "sink", &stream, Detail::Check, hook)?;
            let trial = engine::trial(
                &mut *source,
                &mut *sink,
                Rate::Pps(2_000),
                Duration::from_millis(700),
            )?;
            assert_eq!(
                forwarder.stop().missed,
                0,
                "frames that the forwarder did not see"
            );
            let harm = harm.lock().unwrap_or_else(PoisonError::into_inner);
            assert_eq!(harm.seen, trial.sent);
            ensure!(
                harm.swapped > 3 && harm.corrupted > 3,
                "little harm was done in {} packets",
                harm.seen
            );
            let lost = harm.dropped + u64::from(harm.held.is_some());
            let expected = (lost, harm.swapped, harm.repeated, harm.corrupted);
            let found = (trial.lost, trial.reordered, trial.duplicated, trial.corrupt);
            assert_eq!(found, expected, "lost, late, twice, wrong: {hook:?}");
            assert_eq!(trial.received, trial.sent - lost - harm.corrupted);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn delay_is_in_the_latency() -> Result<()> {
    let _alone = alone();
    const DELAY: Duration = Duration::from_millis(20);
    Lab::builder().linux(3).pods(1).run(|lab| {
        let _forwarder = between(lab, |frame, out| {
            std::thread::sleep(DELAY);
            out.send(&frame)
        })?;
        let stream = stream(Size::Bytes(64));
        let mut source = engine::source(&at(lab.node(1), "source"), &stream, SourceKind::AfXdp)?;
        let mut sink = sink(lab.node(2), "sink", &stream, Detail::Check, Hook::Auto)?;
        let trial = engine::trial(
            &mut *source,
            &mut *sink,
            Rate::Pps(20),
            Duration::from_millis(500),
        )?;
        ensure!(trial.sent >= 5 && trial.lost == 0, "{trial:?}");
        let latency = trial.latency.context("a checking sink has latencies")?;
        let least = Duration::from_nanos(latency.min());
        // The histogram has three digits.
        assert!(least >= DELAY * 99 / 100, "{least:?}");
        Ok(())
    })
}

#[test]
fn who_is_too_slow_is_named() -> Result<()> {
    let _alone = alone();
    Lab::builder().linux(2).pods(1).run(|lab| {
        wire(lab.node(1), "source", lab.node(2), "sink")?;
        let stream = stream(Size::Bytes(64));
        for kind in [SourceKind::AfXdp, SourceKind::LiveFrames] {
            let mut source = engine::source(&at(lab.node(1), "source"), &stream, kind)?;
            {
                let mut sink = sink(lab.node(2), "sink", &stream, Detail::Count, Hook::Xdp)?;
                let trial = engine::trial(&mut *source, &mut *sink, Rate::Pps(1_000_000_000), SHORT)?;
                let said = |limit: &Limit| matches!(limit, Limit::Source(text) if text.contains("asked for"));
                assert!(trial.limits.iter().any(said), "{:?}", trial.limits);
                let trial = engine::trial(&mut *source, &mut *sink, Rate::Max, SHORT)?;
                let said = |limit: &Limit| matches!(limit, Limit::Source(text) if text.contains("always busy"));
                assert_eq!(trial.lost == 0, trial.limits.iter().any(said), "{:?}", trial.limits);
            }
            for hook in [Hook::Xdp, Hook::Ingress] {
                let options = SinkOptions {
                    hook,
                    ring_entries: 16,
                    rest: Duration::from_millis(30),
                    ..SinkOptions::default()
                };
                let mut sink = engine::sink_with(&at(lab.node(2), "sink"), &stream, Detail::Check, &options)?;
                let trial = engine::trial(&mut *source, &mut *sink, Rate::Pps(20_000), SHORT)?;
                ensure!(trial.lost > 100, "the sink was too fast: {trial:?}");
                let room = format!("no room for {} packets", trial.lost);
                let said = |limit: &Limit| matches!(limit, Limit::Sink(text) if text.contains(&room));
                assert!(trial.limits.iter().any(said), "{room}: {:?}", trial.limits);
                assert_eq!((trial.reordered, trial.duplicated, trial.corrupt), (0, 0, 0));
            }
        }
        Ok(())
    })
}

/// The agent's program, ended with the value.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // Gone already, or going now.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

const TOKEN: &str = "a token that nobody guesses";
const PORT: u16 = 7000;

fn agent(host: &dyn Host, address: Ipv4Addr, nic: &str, token: &Path) -> Result<Agent> {
    let mut command = host.netns().command(env!("CARGO_BIN_EXE_ripstop-perf"));
    command.args([
        "agent",
        "--listen",
        &format!("{address}:{PORT}"),
        "--nic",
        nic,
        "--token-file",
    ]);
    let mut child = command.arg(token).stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().context("no output")?;
    let agent = Agent(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    ensure!(
        line.contains(&format!("agent for {nic}")),
        "it says {line:?}"
    );
    Ok(agent)
}

fn connect(host: &dyn Host, address: Ipv4Addr, token: &str) -> Result<Peer> {
    host.netns()
        .run(|| Peer::connect((address, PORT).into(), token))?
}

#[test]
fn a_trial_through_agents() -> Result<()> {
    let _alone = alone();
    let mut token = tempfile::NamedTempFile::new()?;
    writeln!(token, "{TOKEN}")?;
    Lab::builder().linux(2).pods(1).run(|lab| {
        let (one, two) = (lab.node(1), lab.node(2));
        wire(one, "source", two, "sink")?;
        let _near = agent(one, address::underlay(1), "source", token.path())?;
        let mut far = agent(two, address::underlay(2), "sink", token.path())?;
        ensure!(connect(one, address::underlay(1), "a token that is none").is_err());
        let near_peer = connect(one, address::underlay(1), TOKEN)?;
        let far_peer = connect(one, address::underlay(2), TOKEN)?;
        let second = connect(one, address::underlay(2), TOKEN).map(drop);
        ensure!(format!("{second:?}").contains("has a client"), "{second:?}");

        let stream = stream(Size::Imix);
        let mut sink = far_peer.sink(&stream, Detail::Check, &SinkOptions::default())?;
        let mut source = near_peer.source(&stream, SourceKind::Auto)?;
        let trial = perfect(&mut *source, &mut *sink, Rate::Pps(20_000))?;
        ensure!(
            trial
                .latency
                .is_some_and(|latency| latency.len() == trial.sent)
        );
        perfect(&mut *source, &mut *sink, Rate::Window(256))?;

        // A client that is lost: the source that it has started ends long before its time, and the agent takes another.
        let sent = || -> Result<u64> { Ok(one.link_counters("source")?.tx_packets) };
        source.start(Rate::Pps(10_000), Duration::from_secs(600), None)?;
        let before = sent()?;
        wait_until("packets leave", WAIT, || {
            sent().is_ok_and(|now| now > before)
        })?;
        drop((source, near_peer));
        wait_until("nothing leaves any more", WAIT, || {
            let before = sent().unwrap_or_default();
            std::thread::sleep(Duration::from_millis(200));
            sent().is_ok_and(|now| now == before)
        })?;
        wait_until("the agent takes a client", WAIT, || {
            connect(one, address::underlay(1), TOKEN).is_ok()
        })?;

        // An agent that is killed leaves nothing on the interface.
        let attached = || {
            two.output(&["ip", "link", "show", "sink"])
                .is_ok_and(|text| text.contains("xdp"))
        };
        ensure!(attached(), "no XDP program while the sink is there");
        far.0.kill()?;
        far.0.wait()?;
        wait_until("the program is gone", WAIT, || !attached())?;
        ensure!(sink.finish(&[]).is_err(), "a sink without its agent");
        Ok(())
    })
}

#[test]
fn the_interface_of_the_default_route_is_refused() -> Result<()> {
    let _alone = alone();
    Lab::builder().linux(1).pods(1).run(|lab| {
        let pod = lab.pod(1, 0);
        let program = env!("CARGO_BIN_EXE_ripstop-perf");
        let output = pod.exec(&[program, "agent", "--listen", "127.0.0.1:0", "--nic", "eth0"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("--yes-this-is-the-default-route"),
            "{said}"
        );
        Ok(())
    })
}

/// What each engine costs and reaches on a veth pair; for perf/README.md. Run it by name, in release, on a quiet machine.
#[test]
#[ignore = "measures, and holds nothing"]
fn ceilings() -> Result<()> {
    const ROUNDS: usize = 5;
    let _alone = alone();
    Lab::builder().linux(2).pods(1).run(|lab| {
        wire(lab.node(1), "source", lab.node(2), "sink")?;
        let mut table: BTreeMap<_, Vec<[f64; 3]>> = BTreeMap::new();
        for round in 0..ROUNDS * 32 {
            let size = [64, 1450][round % 2];
            let kind = [SourceKind::AfXdp, SourceKind::LiveFrames][round / 2 % 2];
            let detail = [Detail::Count, Detail::Check][round / 4 % 2];
            let hook = [Hook::Xdp, Hook::Ingress][round / 8 % 2];
            let rate = [Rate::Max, Rate::Window(256)][round / 16 % 2];
            let stream = stream(Size::Bytes(size));
            let mut place = at(lab.node(2), "sink");
            place.cpu = Some(1);
            let options = SinkOptions { hook, ..SinkOptions::default() };
            let mut sink = engine::sink_with(&place, &stream, detail, &options)?;
            let mut place = at(lab.node(1), "source");
            place.cpu = Some(0);
            let mut source = engine::source(&place, &stream, kind)?;
            let trial = engine::trial(&mut *source, &mut *sink, rate, Duration::from_millis(300))?;
            let (sent, received) = (to_float(trial.sent), to_float(trial.received));
            table.entry(format!("{kind:?} {detail:?} {hook:?} {rate:?} {size}")).or_default().push([
                received / trial.elapsed.as_secs_f64() / 1e6,
                trial.source_cpu.as_secs_f64() * 1e9 / sent,
                trial.sink_cpu.as_secs_f64() * 1e9 / received,
            ]);
        }
        println!("load {}", std::fs::read_to_string("/proc/loadavg")?);
        println!("engines: million packets/s; ns of the source, of the sink per packet: median (least - most)");
        for (name, rows) in table {
            let columns = [0, 1, 2].map(|column| {
                let mut values: Vec<_> = rows.iter().map(|row| row[column]).collect();
                values.sort_unstable_by(f64::total_cmp);
                let places = if column == 0 { 2 } else { 0 };
                let [least, middle, most] = [0, ROUNDS / 2, ROUNDS - 1].map(|at| values[at]);
                format!("{middle:.places$} ({least:.places$} - {most:.places$})")
            });
            println!("{name}: {}", columns.join(" | "));
        }
        Ok(())
    })
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn to_float(count: u64) -> f64 {
    count as f64
}
