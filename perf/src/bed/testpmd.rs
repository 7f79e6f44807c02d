//! DPDK's testpmd as a baseline: frames from one interface to another by a poll-mode program, with AF_XDP ports, and
//! between ports that make and swallow frames by themselves (the framework's own ceiling).
//!
//! ```text
//!   source ── veth ── net_af_xdp0 ┐ testpmd, one CPU ┌ net_af_xdp1 ── veth ── sink
//!                                 └──────────────────┘
//! ```
//!
//! What it cannot do is put packets into a tunnel: testpmd leaves that to the NIC by flow rules (`vxlan_encap`), which
//! neither port has ("Function not implemented"), and its checksum engine looks into tunnels but makes none. So it is a
//! baseline of layer 2 forwarding: less work per packet than a tunnel takes.
//!
//! Debian has the program in the package dpdk-dev, not in dpdk. Senders on the far end of a veth must complete their
//! checksums themselves (`ethtool -K … tx off`): AF_XDP hands frames on as they are. A testpmd that is killed leaves its
//! XDP program on the interfaces.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::address::Mac;
use crate::netns::Netns;
use crate::sys;

const PROGRAM: &str = "dpdk-testpmd";
/// Longest wait for an answer: the start takes seconds on a busy machine, and links are waited for for nine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for the end, before it is asked for with more force.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Lines kept to say what went wrong.
const LAST_LINES: usize = 20;
const PORTS: usize = 2;

/// What the two ports are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// AF_XDP sockets on queue 0 of two interfaces of the namespace.
    AfXdp([String; PORTS]),
    /// Ports that always have a burst of frames to receive and swallow what is sent.
    Null {
        /// Bytes of a frame.
        size: u16,
        /// Frames are copied from and to the port's memory, as a driver without zero-copy has to.
        copy: bool,
    },
}

/// What is done with a frame on its way from one port to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// Nothing; the frame is not even looked at.
    Io,
    /// Ethernet addresses are set: the port's own, and these for frames that leave port 0 and port 1.
    Mac([Mac; PORTS]),
    /// As `Mac`, and headers are parsed and their checksums computed in software.
    Csum([Mac; PORTS]),
}

/// How testpmd is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// Namespace to run in; none for the machine's own, in which no AF_XDP port belongs.
    pub namespace: Option<Netns>,
    /// Its ports.
    pub ports: Ports,
    /// What it does.
    pub forward: Forward,
    /// CPU of the thread that takes commands, idle while frames are forwarded.
    pub main_cpu: usize,
    /// CPU of the thread that forwards, both ways.
    pub forward_cpu: usize,
    /// Frames of the pool that both ports share.
    pub frames: u32,
    /// Most frames of a burst.
    pub burst: u16,
}

impl Options {
    /// With what testpmd itself takes for its ring sizes: 8192 frames, bursts of 32.
    #[must_use]
    pub fn new(ports: Ports, forward: Forward, main_cpu: usize, forward_cpu: usize) -> Self {
        Self {
            namespace: None,
            ports,
            forward,
            main_cpu,
            forward_cpu,
            frames: 8192,
            burst: 32,
        }
    }

    /// The arguments; `prefix` names what the program keeps in the file system.
    fn arguments(&self, prefix: &str) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "--no-huge",
            "-m",
            "256",
            "--no-pci",
            "--no-shconf",
            "--no-telemetry",
            "--log-level=lib.eal:warning",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!(
            "--lcores=0@{},1@{}",
            self.main_cpu, self.forward_cpu
        ));
        arguments.push(format!("--file-prefix={prefix}"));
        for port in 0..PORTS {
            arguments.push(match &self.ports {
                Ports::AfXdp(interfaces) => {
                    format!("--vdev=net_af_xdp{port},iface={}", interfaces[port])
                }
                Ports::Null { size, copy } => {
                    format!("--vdev=net_null{port},size={size},copy={}", u8::from(*copy))
                }
            });
        }
        arguments.push("--".to_owned());
        let mode = match self.forward {
            Forward::Io => "io",
            Forward::Mac(_) => "mac",
            Forward::Csum(_) => "csum",
        };
        arguments.extend(["-i".to_owned(), format!("--forward-mode={mode}")]);
        arguments.push(format!("--total-num-mbufs={}", self.frames));
        arguments.push(format!("--burst={}", self.burst));
        if let Forward::Mac(peers) | Forward::Csum(peers) = self.forward {
            let peers = peers.iter().enumerate();
            arguments.extend(peers.map(|(port, peer)| format!("--eth-peer={port},{peer}")));
        }
        arguments
    }
}

/// What a port has counted since it was started. Frames that came before it forwarded are received and thrown away: take
/// the difference of two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes of those. Null ports count none.
    pub rx_bytes: u64,
    /// Frames that the kernel dropped at the port's socket.
    pub rx_missed: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Bytes of those. Null ports count none.
    pub tx_bytes: u64,
    /// Frames that the port took and could not send.
    pub tx_errors: u64,
    /// Frames that testpmd dropped because the port took no more.
    pub tx_dropped: u64,
}

/// What both ports have counted, and when.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Between the question and the answer.
    pub at: Instant,
    /// By port.
    pub ports: [PortCounts; PORTS],
}

/// Where the program is.
///
/// # Errors
/// When it is not installed; says how to get it.
pub fn program() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(PROGRAM));
    places
        .find(|place| place.exists())
        .with_context(|| format!("there is no {PROGRAM}: apt-get install dpdk-dev"))
}

/// A testpmd that forwards, until this is dropped.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    commands: Option<ChildStdin>,
    lines: Receiver<String>,
    last: VecDeque<String>,
    command_line: String,
    /// What it keeps in the file system.
    files: PathBuf,
}

impl Testpmd {
    /// Starts testpmd and waits until it forwards.
    ///
    /// # Errors
    /// When it is not installed, or does not come to forward; with what it said last.
    pub fn start(options: &Options) -> Result<Self> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let program = program()?;
        let prefix = format!(
            "ripstop-{}-{}",
            std::process::id(),
            RUNS.fetch_add(1, Ordering::Relaxed)
        );
        let arguments = options.arguments(&prefix);
        // Its answers would be kept back until they fill a buffer. Each of these replaces itself: one process.
        let mut command = match &options.namespace {
            Some(namespace) => {
                let mut command = namespace.command("stdbuf");
                command.arg("-oL").arg(&program);
                command
            }
            None => {
                let mut command = Command::new("stdbuf");
                command.arg("-oL").arg(&program);
                command
            }
        };
        let mut child = command
            .args(&arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {PROGRAM}"))?;
        let (sender, lines) = channel();
        read_lines(child.stdout.take(), &sender);
        read_lines(child.stderr.take(), &sender);
        let mut testpmd = Self {
            commands: child.stdin.take(),
            child,
            lines,
            last: VecDeque::new(),
            command_line: format!("{PROGRAM} {}", arguments.join(" ")),
            files: Path::new("/var/run/dpdk").join(prefix),
        };
        testpmd.command("start")?;
        let started = testpmd.until("to start forwarding", |line| {
            line.contains(" packet forwarding - ports=")
        })?;
        // It would go on without the ports that it could not open.
        if !started.contains(&format!("ports={PORTS} ")) {
            return Err(testpmd.failure("did not open its ports"));
        }
        // It answers when the forwarding thread has been started.
        testpmd.counts()?;
        Ok(testpmd)
    }

    /// How it was started, for a report.
    #[must_use]
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What its ports have counted so far. Only the idle thread is asked.
    ///
    /// # Errors
    /// When it has ended or does not answer.
    pub fn counts(&mut self) -> Result<Counts> {
        let asked = Instant::now();
        let mut ports = [PortCounts::default(); PORTS];
        self.command("show port stats all")?;
        for (number, port) in ports.iter_mut().enumerate() {
            let values = self.section(&format!("NIC statistics for port {number} "), |line| {
                line.trim().chars().all(|letter| letter == '#')
            })?;
            *port = PortCounts {
                rx_packets: values.take("RX-packets")?,
                rx_bytes: values.take("RX-bytes")?,
                rx_missed: values.take("RX-missed")?,
                tx_packets: values.take("TX-packets")?,
                tx_bytes: values.take("TX-bytes")?,
                tx_errors: values.take("TX-errors")?,
                tx_dropped: 0,
            };
        }
        let at = asked + asked.elapsed() / 2;
        self.command("show fwd stats all")?;
        for (number, port) in ports.iter_mut().enumerate() {
            let values = self
                .section(&format!("Forward statistics for port {number} "), |line| {
                    line.trim().chars().all(|letter| letter == '-')
                })?;
            port.tx_dropped = values.take("TX-dropped")?;
        }
        // The sum of all ports, so that it is not taken for something else's answer.
        self.until("for the end of its statistics", |line| {
            line.trim().len() > 10 && line.trim().chars().all(|letter| letter == '+')
        })?;
        Ok(Counts { at, ports })
    }

    /// Ends it and returns what its ports counted.
    ///
    /// # Errors
    /// When it did not answer, or had to be killed.
    pub fn stop(mut self) -> Result<Counts> {
        let counts = self.counts()?;
        ensure!(self.end(), "{PROGRAM} did not end when it was asked to");
        Ok(counts)
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let written = match &mut self.commands {
            Some(commands) => writeln!(commands, "{command}"),
            None => bail!("{PROGRAM} takes no more commands"),
        };
        // A program that has ended has said why.
        if written.is_err() {
            self.until(command, |_line| false)?;
        }
        Ok(())
    }

    /// Reads to a line that is wanted.
    fn until(&mut self, what: &str, is_wanted: impl Fn(&str) -> bool) -> Result<String> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if self.last.len() == LAST_LINES {
                        self.last.pop_front();
                    }
                    self.last.push_back(line.clone());
                    if is_wanted(&line) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.failure(&format!("was waited for in vain: {what}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failure(&format!("ended: {what}")));
                }
            }
        }
    }

    /// What went wrong, and what it said last.
    fn failure(&self, what: &str) -> anyhow::Error {
        let said: Vec<_> = self.last.iter().map(String::as_str).collect();
        anyhow!(
            "{PROGRAM} {what}; it was started by `{}`, and said last:\n{}",
            self.command_line,
            said.join("\n")
        )
    }

    /// The values between a title and a line that ends the section.
    fn section(&mut self, title: &str, is_end: impl Fn(&str) -> bool) -> Result<Values> {
        self.until(title, |line| line.contains(title))?;
        let mut values = Values::default();
        loop {
            let line = self.until(title, |line| !line.trim().is_empty())?;
            if is_end(&line) {
                return Ok(values);
            }
            values.add(&line);
        }
    }

    /// Asks it to end, with more and more force. False if only the last one helped, or it failed.
    fn end(&mut self) -> bool {
        // At the end of its input it ends, too.
        if let Some(mut commands) = self.commands.take() {
            let _ = writeln!(commands, "quit");
        }
        let mut ended = self.wait();
        if ended.is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            let _ = sys::signal(pid, libc::SIGTERM);
            ended = self.wait();
        }
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.files);
        ended == Some(true)
    }

    /// Whether it ended well, if it ends soon.
    fn wait(&mut self) -> Option<bool> {
        let give_up = Instant::now() + END_PATIENCE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status.success()),
                Ok(None) if Instant::now() < give_up => thread::sleep(Duration::from_millis(10)),
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // Whoever has waited for it has nothing to ask.
        if let Ok(None) = self.child.try_wait() {
            self.end();
        }
        let _ = std::fs::remove_dir_all(&self.files);
    }
}

/// Sends the lines of a stream until it ends.
fn read_lines(stream: Option<impl Read + Send + 'static>, lines: &Sender<String>) {
    let lines = lines.clone();
    thread::spawn(move || {
        let stream = stream.into_iter().map(BufReader::new);
        for line in stream.flat_map(|stream| stream.lines().map_while(Result::ok)) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
}

/// Values by name, as testpmd prints them: `RX-packets: 5   RX-missed: 0`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Values(Vec<(String, u64)>);

impl Values {
    fn add(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        while let Some(name) = words.next() {
            let name = name.strip_suffix(':').map(str::to_owned);
            if let Some((name, Ok(value))) = name.zip(words.next().map(str::parse)) {
                self.0.push((name, value));
            }
        }
    }

    fn take(&self, name: &str) -> Result<u64> {
        let mut values = self.0.iter();
        let found = values.find(|(other, _)| other == name);
        found
            .map(|(_, value)| *value)
            .with_context(|| format!("{PROGRAM} did not say {name}"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::netns;

    /// A source and a sink with testpmd's namespace between them; gone when this is dropped.
    struct Wires {
        namespaces: [Netns; 3],
    }

    const MACS: [Mac; 2] = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
    const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];
    const INTERFACES: [&str; 2] = ["tp0", "tp1"];
    /// Each waits for its answer, and testpmd spins on a CPU that it shares.
    const REQUESTS: u32 = 20;

    impl Wires {
        fn new(name: &str) -> Self {
            let pid = std::process::id();
            let namespace = |place| Netns::named(format!("tpmd-{pid}-{name}-{place}"));
            let wires = Self {
                namespaces: ["source", "middle", "sink"].map(namespace),
            };
            let [source, middle, sink] = &wires.namespaces;
            netns::create(&[source, middle, sink]).unwrap();
            for (((end, mac), address), interface) in [source, sink]
                .into_iter()
                .zip(MACS)
                .zip(ADDRESSES)
                .zip(INTERFACES)
            {
                let middle = middle.name();
                end.batch(
                    "ip",
                    &format!(
                        "link add end address {mac} type veth peer name {interface} netns {middle}\n\
                         address add {address}/24 dev end\nlink set end up\n"
                    ),
                )
                .unwrap();
                // Checksums are complete before AF_XDP sees them.
                end.output(&["ethtool", "-K", "end", "tx", "off"]).unwrap();
            }
            middle
                .batch("ip", "link set tp0 up\nlink set tp1 up\n")
                .unwrap();
            wires
        }

        fn options(&self, forward: Forward) -> Options {
            let interfaces = INTERFACES.map(str::to_owned);
            Options {
                namespace: Some(self.namespaces[1].clone()),
                ..Options::new(Ports::AfXdp(interfaces), forward, 0, 0)
            }
        }

        /// Sends requests until `count` of them have been answered.
        fn talk(&self, count: u32) {
            let [source, _, sink] = &self.namespaces;
            let socket = |namespace: &Netns, address: &str| {
                let socket = namespace.run(|| UdpSocket::bind((address, 7007)).unwrap());
                let socket = socket.unwrap();
                socket
                    .set_read_timeout(Some(Duration::from_millis(200)))
                    .unwrap();
                socket
            };
            let (ours, theirs) = (socket(source, ADDRESSES[0]), socket(sink, ADDRESSES[1]));
            let give_up = Instant::now() + PATIENCE;
            let mut bytes = [0; 64];
            for number in 0..count {
                let request = number.to_be_bytes();
                let mut is_answered = false;
                while !is_answered {
                    assert!(Instant::now() < give_up, "request {number} is lost");
                    // The peer's neighbour entry may be missing at first.
                    let _ = ours.send_to(&request, (ADDRESSES[1], 7007));
                    if let Ok((length, from)) = theirs.recv_from(&mut bytes) {
                        let _ = theirs.send_to(&bytes[..length], from);
                    }
                    while let Ok(length) = ours.recv(&mut bytes)
                        && !is_answered
                    {
                        is_answered = bytes[..length] == request;
                    }
                }
            }
        }
    }

    impl Drop for Wires {
        fn drop(&mut self) {
            let [source, middle, sink] = &self.namespaces;
            let _ = netns::delete(&[source, middle, sink]);
        }
    }

    /// Whether the program is there; if not, says which test is not run for want of it.
    fn is_there(test: &str) -> bool {
        match program() {
            Ok(_) => true,
            Err(error) => {
                println!("NOT RUN {test}: {error}");
                false
            }
        }
    }

    #[test]
    fn packets_go_through_and_are_counted() {
        if !is_there("packets_go_through_and_are_counted") {
            return;
        }
        let wires = Wires::new("modes");
        // What leaves port 0 goes to the source, what leaves port 1 to the sink.
        for forward in [Forward::Io, Forward::Mac(MACS), Forward::Csum(MACS)] {
            let mut testpmd = Testpmd::start(&wires.options(forward)).unwrap();
            println!("{}", testpmd.command_line());
            wires.talk(REQUESTS);
            let counts = testpmd.counts().unwrap();
            println!("{forward:?}: {counts:?}");
            for port in counts.ports {
                let requests = u64::from(REQUESTS);
                assert!(port.rx_packets >= requests && port.tx_packets >= requests);
                // The smallest frame that carries a request.
                assert!(port.rx_bytes >= requests * 46 && port.tx_bytes >= requests * 46);
            }
            let files = testpmd.files.clone();
            let pid = testpmd.pid();
            let last = testpmd.stop().unwrap();
            assert!(last.at > counts.at && last.ports[0].rx_packets >= counts.ports[0].rx_packets);
            assert!(!files.exists() && !Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    #[test]
    fn two_run_side_by_side_and_null_ports_need_no_wire() {
        if !is_there("two_run_side_by_side_and_null_ports_need_no_wire") {
            return;
        }
        for copy in [false, true] {
            let options = Options::new(Ports::Null { size: 64, copy }, Forward::Io, 0, 0);
            let mut both = [(); 2].map(|()| Testpmd::start(&options).unwrap());
            for testpmd in &mut both {
                let first = testpmd.counts().unwrap();
                let start = Instant::now();
                let second = loop {
                    let second = testpmd.counts().unwrap();
                    if second.ports[0].tx_packets > first.ports[0].tx_packets {
                        break second;
                    }
                    assert!(start.elapsed() < PATIENCE, "nothing is forwarded");
                    thread::sleep(Duration::from_millis(100));
                };
                println!("copy {copy}: {first:?} {second:?}");
            }
        }
    }

    #[test]
    fn what_fails_is_said() {
        if !is_there("what_fails_is_said") {
            return;
        }
        let interfaces = ["no-such-0", "no-such-1"].map(str::to_owned);
        let options = Options::new(Ports::AfXdp(interfaces), Forward::Io, 0, 0);
        let error = format!("{:#}", Testpmd::start(&options).unwrap_err());
        assert!(error.contains("did not open its ports"), "{error}");
        assert!(error.contains("no-such-0"), "{error}");
    }

    #[test]
    fn values_are_read() {
        let mut values = Values::default();
        values.add("  RX-packets: 5          RX-missed: 1          RX-bytes:  406");
        values.add("  RX-nombuf:  0");
        assert_eq!(values.take("RX-bytes").unwrap(), 406);
        assert_eq!(values.take("RX-nombuf").unwrap(), 0);
        let error = values.take("TX-bytes").unwrap_err().to_string();
        assert_eq!(error, "dpdk-testpmd did not say TX-bytes");
    }
}
