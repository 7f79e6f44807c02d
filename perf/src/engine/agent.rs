//! Engines on another machine: an agent there does what a client here asks, over one TCP connection.
//!
//! ```text
//!   Peer ── RemoteSource, RemoteSink ══ a line of JSON each way ══ serve ── Source, Sink ── interface
//! ```
//!
//! The client speaks first, with the protocol's version and a token; an agent that hears anything else hangs up. There is
//! one client at a time. When it is gone, whatever was sending stops. Lines are bounded. Nothing is encrypted: the token
//! keeps strangers of a test network from starting a flood, and no more.
//!
//! For a window ([`Rate::Window`]) the source has to know how far the sink is. A far sink is asked again and again, and
//! answers when there is something to tell; a far source is told while the client waits for its end. Either is some 0.2 ms
//! late, so that a window of 512 allows two million packets a second and no more.

use core::net::SocketAddr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::kernel::{self, monotonic_ns};
use super::{
    Detail, Place, Progress, Sink, SinkOptions, SinkReport, Source, SourceReport, await_carrier,
    wire_end,
};
use crate::address::Mac;
use crate::measure::{Rate, SourceKind, Stream, WireEnd};
use crate::netns::Netns;
use crate::sys;

/// Both sides must speak the same.
const VERSION: u32 = 2;
/// Bytes of the longest line: a stream to 100,000 destinations, or the counts of as many flows.
const LINE_MAX: u64 = 8 << 20;
/// The first line of a client.
const GREETING_MAX: u64 = 4096;
/// How long a client may take to greet, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often an agent that waits for a source looks whether its client is still there.
const LOOK: Duration = Duration::from_millis(20);
/// The longest that an agent sends without being asked again.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);
/// A far sink's progress is told when so many packets have come, or fewer and nobody was told for `TELL`, or after `TELL_MAX`.
const TELL_PACKETS: u64 = 64;
const TELL: Duration = Duration::from_micros(200);
const TELL_MAX: Duration = Duration::from_millis(5);
/// How often it is looked at.
const GLANCE: Duration = Duration::from_micros(50);
/// An answer to another question.
const UNEXPECTED: &str = "the agent answers something else";
/// The shortest token.
pub const TOKEN_MIN: usize = 16;

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Hello {
        version: u32,
        token: String,
    },
    OpenSource {
        stream: Stream,
        kind: SourceKind,
    },
    Start {
        rate: Rate,
        duration: Duration,
    },
    FinishSource,
    OpenSink {
        stream: Stream,
        detail: Detail,
        options: SinkOptions,
    },
    Reset,
    FinishSink {
        sent_by_flow: Vec<u64>,
    },
    /// How many packets have come, once that is more than this.
    Progress {
        after: u64,
    },
    /// So many packets of the source's window have come. Has no answer, and is for `FinishSource` to hear.
    Arrived {
        packets: u64,
    },
    /// Waits until the NIC has a carrier, which engines may have taken from it.
    AwaitCarrier,
    /// The source, if there is one, is not needed any more.
    CloseSource,
    /// The same of the sink.
    CloseSink,
}

/// What an agent answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Hello {
        version: u32,
        boot: String,
        mac: Mac,
        end: WireEnd,
    },
    Done,
    Arrived(u64),
    Opened(String),
    Sent(SourceReport),
    Came(Box<SinkReport>),
    Failed(String),
}

/// What an agent is.
#[derive(Debug, Clone)]
pub struct Agent {
    /// The interface that its engines work on, in the namespace of the thread that serves.
    pub interface: String,
    /// What a client must know; at least [`TOKEN_MIN`] bytes.
    pub token: String,
    /// The CPU for the engine's thread.
    pub cpu: Option<usize>,
}

impl Agent {
    /// Serves one client after the other, until `stop`.
    ///
    /// # Errors
    /// The token is too short, or the listener broke. What a client does wrong is told to it.
    pub fn serve(&self, listener: &TcpListener, stop: &AtomicBool) -> Result<()> {
        ensure!(
            self.token.len() >= TOKEN_MIN,
            "a token of at least {TOKEN_MIN} characters is needed"
        );
        listener.set_nonblocking(true)?;
        let busy = AtomicBool::new(false);
        thread::scope(|scope| {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) if busy.swap(true, Ordering::AcqRel) => {
                        drop(refuse(&stream));
                    }
                    Ok((stream, client)) => {
                        let busy = &busy;
                        scope.spawn(move || {
                            if let Err(error) = self.session(&stream, stop) {
                                complain(&format!("{client}: {error:#}"));
                            }
                            busy.store(false, Ordering::Release);
                        });
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK),
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        return Err(error).context("accept a client");
                    }
                }
            }
            Ok(())
        })
    }

    /// One client, from its greeting to its end. Engines end with it.
    fn session(&self, stream: &TcpStream, stop: &AtomicBool) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        notice_a_dead_end(stream)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        match read(&mut lines, GREETING_MAX)? {
            Some(Request::Hello { version, token }) if same(&token, &self.token) => {
                if version != VERSION {
                    let why = format!(
                        "the client speaks version {version}, this agent {VERSION}: take ripstop-perf of one commit on both machines"
                    );
                    write(stream, &Answer::Failed(why.clone()))?;
                    bail!(why);
                }
            }
            Some(_) => bail!("it does not know the token"),
            None => return Ok(()),
        }
        let hello = match wire_end(&Netns::of_this_thread(), &self.interface) {
            Ok((mac, end)) => Answer::Hello {
                version: VERSION,
                boot: boot(),
                mac,
                end,
            },
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        write(stream, &hello)?;
        stream.set_read_timeout(Some(LOOK))?;
        kernel::sleep_exactly();
        let mut engines = Engines::default();
        while let Some(request) = await_line(&mut lines, stream, stop)? {
            if let Request::Arrived { .. } = request {
                // It was on its way when the source had ended.
                continue;
            }
            let answer = self.answer(request, &mut engines, &mut lines, stream, stop);
            let answer = answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
            write(stream, &answer)?;
        }
        Ok(())
    }

    fn answer(
        &self,
        request: Request,
        engines: &mut Engines,
        lines: &mut BufReader<TcpStream>,
        stream: &TcpStream,
        stop: &AtomicBool,
    ) -> Result<Answer> {
        let Engines {
            source,
            sink,
            arrived,
        } = engines;
        let netns = Netns::of_this_thread();
        let place = Place {
            netns: &netns,
            interface: self.interface.clone(),
            cpu: self.cpu,
        };
        match request {
            Request::Hello { .. } => bail!("hello again"),
            Request::OpenSource { stream, kind } => {
                // The old one first: a queue has but one socket.
                *source = None;
                let opened = source.insert(super::source(&place, &stream, kind)?);
                Ok(Answer::Opened(opened.describe()))
            }
            Request::Start { rate, duration } => {
                ensure!(duration <= DURATION_MAX, "longer than a day");
                let source = source.as_mut().context("no source was opened")?;
                *arrived = matches!(rate, Rate::Window(_)).then(|| Arc::new(Progress::far()));
                source.start(rate, duration, arrived.clone())?;
                Ok(Answer::Done)
            }
            Request::FinishSource => {
                let open = source.as_mut().context("no source was opened")?;
                while open.is_sending() {
                    let goes_on = match arrived {
                        Some(arrived) => hear(arrived, lines, stream, stop)?,
                        None => !is_gone(stream),
                    };
                    if stop.load(Ordering::Relaxed) || !goes_on {
                        *source = None;
                        bail!("stopped");
                    }
                }
                Ok(Answer::Sent(open.finish()?))
            }
            Request::OpenSink {
                stream,
                detail,
                options,
            } => {
                *sink = None;
                let opened = sink.insert(super::sink_with(&place, &stream, detail, &options)?);
                Ok(Answer::Opened(opened.describe()))
            }
            Request::Reset => {
                let sink = sink.as_mut().context("no sink was opened")?;
                sink.reset()?;
                Ok(Answer::Arrived(sink.progress().packets()))
            }
            Request::Progress { after } => {
                let sink = sink.as_ref().context("no sink was opened")?;
                Ok(Answer::Arrived(come(&sink.progress(), after)))
            }
            Request::Arrived { .. } => bail!("out of turn"),
            Request::AwaitCarrier => {
                await_carrier(&netns, &self.interface)?;
                Ok(Answer::Done)
            }
            Request::FinishSink { sent_by_flow } => {
                let sink = sink.as_mut().context("no sink was opened")?;
                Ok(Answer::Came(Box::new(sink.finish(&sent_by_flow)?)))
            }
            Request::CloseSource => {
                *source = None;
                Ok(Answer::Done)
            }
            Request::CloseSink => {
                *sink = None;
                Ok(Answer::Done)
            }
        }
    }
}

/// The engines of a client.
#[derive(Default)]
struct Engines {
    source: Option<Box<dyn Source>>,
    sink: Option<Box<dyn Sink>>,
    /// Packets of the source's window that have come, as the client tells.
    arrived: Option<Arc<Progress>>,
}

/// Waits a moment for what the client tells of its sink; whether the client is still there.
fn hear(
    arrived: &Progress,
    lines: &mut BufReader<TcpStream>,
    stream: &TcpStream,
    stop: &AtomicBool,
) -> Result<bool> {
    if !is_readable(lines, stream, TELL_MAX)? {
        return Ok(true);
    }
    match await_line(lines, stream, stop)? {
        None => Ok(false),
        Some(Request::Arrived { packets }) => {
            arrived.set(packets);
            Ok(true)
        }
        Some(_) => bail!("the client asks while it waits for the source"),
    }
}

/// Waits until a sink has something to tell to whom this number was told before.
fn come(sink: &Progress, after: u64) -> u64 {
    let begin = Instant::now();
    loop {
        let (packets, waited) = (sink.packets(), begin.elapsed());
        let enough =
            packets >= after.saturating_add(TELL_PACKETS) || (packets > after && waited >= TELL);
        if enough || waited >= TELL_MAX {
            return packets;
        }
        thread::sleep(GLANCE);
    }
}

/// Whether there is something to read, or comes within this time (in whole milliseconds).
fn is_readable(
    lines: &BufReader<TcpStream>,
    stream: &TcpStream,
    within: Duration,
) -> io::Result<bool> {
    if !lines.buffer().is_empty() {
        return Ok(true);
    }
    match kernel::wait_readable(&mut [kernel::readable(stream.as_fd())], within) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        outcome => outcome,
    }
}

#[expect(
    clippy::print_stderr,
    reason = "an agent has no other place to say what its clients did"
)]
fn complain(what: &str) {
    eprintln!("agent: {what}");
}

/// A machine that is gone says nothing: has the kernel ask it.
fn notice_a_dead_end(stream: &TcpStream) -> Result<()> {
    sys::set_option(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    for (option, value) in [
        (libc::TCP_KEEPIDLE, 3),
        (libc::TCP_KEEPINTVL, 1),
        (libc::TCP_KEEPCNT, 3),
    ] {
        sys::set_option(stream, libc::IPPROTO_TCP, option, value)?;
    }
    Ok(())
}

/// Tells a second client that there is a first.
fn refuse(stream: &TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(LOOK))?;
    write(stream, &Answer::Failed("the agent has a client".into()))
}

/// Whether two tokens are equal, in a time that does not tell how much of them is.
fn same(one: &str, other: &str) -> bool {
    let pairs = one.bytes().zip(other.bytes());
    let difference = pairs.fold(0, |difference, (a, b)| difference | (a ^ b));
    one.len() == other.len() && difference == 0
}

/// What tells one boot of one machine from all others: whether two ends share a clock.
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

fn write(mut stream: &TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).context("write to the other end")
}

/// Reads a line; `None` at the end of the connection.
fn read<T: for<'a> Deserialize<'a>>(lines: &mut impl BufRead, bytes_max: u64) -> Result<Option<T>> {
    let mut line = Vec::new();
    lines.take(bytes_max).read_until(b'\n', &mut line)?;
    parse(&line, bytes_max)
}

fn parse<T: for<'a> Deserialize<'a>>(line: &[u8], bytes_max: u64) -> Result<Option<T>> {
    match line.split_last() {
        None => Ok(None),
        Some((b'\n', line)) => Ok(Some(
            serde_json::from_slice(line).context("a line that makes no sense")?,
        )),
        Some(_) if line.len() as u64 >= bytes_max => bail!("a line of more than {bytes_max} bytes"),
        Some(_) => bail!("a line was cut off"),
    }
}

/// Reads a line from a stream whose reads time out, until `stop`.
fn await_line(
    lines: &mut BufReader<TcpStream>,
    stream: &TcpStream,
    stop: &AtomicBool,
) -> Result<Option<Request>> {
    let mut line = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let left = LINE_MAX.saturating_sub(line.len() as u64);
        match lines.by_ref().take(left).read_until(b'\n', &mut line) {
            Ok(_) => return parse(&line, LINE_MAX),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("read from the client"),
        }
    }
    drop(stream.shutdown(std::net::Shutdown::Both));
    Ok(None)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Whether the other end has hung up; waits a moment for it.
fn is_gone(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]) {
        Ok(0) => true,
        // It speaks before its turn, and is heard when that comes.
        Ok(_) => {
            thread::sleep(LOOK);
            false
        }
        Err(error) => !is_timeout(&error),
    }
}

/// A new token, from the kernel's random numbers.
///
/// # Errors
/// `/dev/urandom` is not there.
pub fn new_token() -> Result<String> {
    let mut bytes = [0; 16];
    let mut random = fs::File::open("/dev/urandom").context("/dev/urandom")?;
    random.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether an interface of the calling thread's namespace has a default route: the machine would be cut off.
///
/// # Errors
/// `/proc` is not there.
pub fn has_default_route(interface: &str) -> Result<bool> {
    let four = fs::read_to_string("/proc/thread-self/net/route").context("/proc/net/route")?;
    // A kernel without IPv6 does not have this one.
    let six = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
    Ok(routes_by_default(&four, &six, interface))
}

/// IPv4: interface, destination, … and the mask as the eighth field. IPv6: destination, prefix length, … interface last.
fn routes_by_default(four: &str, six: &str, interface: &str) -> bool {
    let zero = |text: &str| text.bytes().all(|digit| digit == b'0');
    let by_four = four.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        matches!(fields[..], [name, to, _, _, _, _, _, mask, ..] if name == interface && zero(to) && zero(mask))
    });
    by_four
        || six.lines().any(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            matches!(fields[..], [to, length, .., name] if name == interface && zero(to) && zero(length))
        })
}

/// A question and its answer; nothing if the other end hung up instead.
fn exchange(connection: &mut BufReader<TcpStream>, request: &Request) -> Result<Option<Answer>> {
    write(connection.get_ref(), request)?;
    answer(connection)
}

fn answer(connection: &mut BufReader<TcpStream>) -> Result<Option<Answer>> {
    match read(connection, LINE_MAX)? {
        Some(Answer::Failed(why)) => bail!("the agent says: {why}"),
        answer => Ok(answer),
    }
}

/// A connection to an agent.
#[derive(Debug, Clone)]
pub struct Peer {
    connection: Arc<Mutex<BufReader<TcpStream>>>,
    name: String,
    address: SocketAddr,
    mac: Mac,
    end: WireEnd,
    /// Whether it is on this machine, so that both have one clock.
    shares_clock: bool,
}

impl Peer {
    /// Connects from the namespace of the calling thread.
    ///
    /// # Errors
    /// Nobody is there, or does not want this client.
    pub fn connect(agent: SocketAddr, token: &str) -> Result<Self> {
        let connect = || -> Result<Self> {
            let stream = TcpStream::connect_timeout(&agent, PATIENCE)?;
            stream.set_nodelay(true)?;
            notice_a_dead_end(&stream)?;
            let mut connection = BufReader::new(stream);
            let hello = Request::Hello {
                version: VERSION,
                token: token.to_owned(),
            };
            let answer = exchange(&mut connection, &hello)?;
            let Answer::Hello {
                version,
                boot: there,
                mac,
                end,
            } = answer.context("it hung up: is the token right?")?
            else {
                bail!(UNEXPECTED);
            };
            ensure!(
                version == VERSION,
                "it speaks version {version}, we {VERSION}"
            );
            let here = boot();
            Ok(Self {
                connection: Arc::new(Mutex::new(connection)),
                name: format!("{} of {agent}", end.nic),
                address: agent,
                mac,
                end,
                shares_clock: !here.is_empty() && here == there,
            })
        };
        connect().with_context(|| format!("agent at {agent}"))
    }

    fn ask(&self, request: &Request) -> Result<Answer> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        exchange(&mut connection, request)?.context("the agent has hung up")
    }

    /// Asks for a source's end, and tells meanwhile how many packets of its window have come.
    fn ask_and_tell(&self, request: &Request, arrived: impl Fn() -> u64) -> Result<Answer> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        write(connection.get_ref(), request)?;
        let mut told = 0;
        while !is_readable(&connection, connection.get_ref(), Duration::ZERO)? {
            let packets = arrived();
            if packets > told {
                write(connection.get_ref(), &Request::Arrived { packets })?;
                told = packets;
            }
            thread::sleep(2 * GLANCE);
        }
        answer(&mut connection)?.context("the agent has hung up")
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// This end of the connection to it.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn local_address(&self) -> Result<SocketAddr> {
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(connection.get_ref().local_addr()?)
    }

    /// The Ethernet address of its NIC.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Its NIC and its machine.
    #[must_use]
    pub fn end(&self) -> &WireEnd {
        &self.end
    }

    /// Whether it is on this machine, so that both have one clock.
    #[must_use]
    pub fn shares_clock(&self) -> bool {
        self.shares_clock
    }

    fn open(&self, request: &Request) -> Result<String> {
        let answer = self.ask(request).with_context(|| self.name.clone())?;
        let Answer::Opened(description) = answer else {
            bail!(UNEXPECTED);
        };
        Ok(format!("{description}, by the agent at {}", self.name))
    }

    fn order(&self, request: &Request) -> Result<()> {
        let answer = self.ask(request).with_context(|| self.name.clone())?;
        let Answer::Done = answer else {
            bail!(UNEXPECTED);
        };
        Ok(())
    }

    /// Waits until its NIC has a carrier, which the opening of an engine at either end may have taken from it.
    ///
    /// # Errors
    /// It has none for long, or the connection broke.
    pub fn await_carrier(&self) -> Result<()> {
        self.order(&Request::AwaitCarrier)
    }

    /// As [`engine::source`](super::source), there. It ends when it is dropped, and with the connection.
    ///
    /// # Errors
    /// As there, or the connection broke.
    pub fn source(&self, stream: &Stream, kind: SourceKind) -> Result<Box<dyn Source>> {
        let stream = stream.clone();
        Ok(Box::new(RemoteSource {
            description: self.open(&Request::OpenSource { stream, kind })?,
            peer: self.clone(),
            until: None,
            begin_ns: 0,
            feedback: None,
        }))
    }

    /// As [`engine::sink_with`](super::sink_with), there. It ends when it is dropped, and with the connection.
    ///
    /// # Errors
    /// As there, or the connection broke.
    pub fn sink(
        &self,
        stream: &Stream,
        detail: Detail,
        options: &SinkOptions,
    ) -> Result<Box<dyn Sink>> {
        let (stream, options) = (stream.clone(), options.clone());
        Ok(Box::new(RemoteSink {
            description: self.open(&Request::OpenSink {
                stream,
                detail,
                options,
            })?,
            peer: self.clone(),
            progress: Arc::new(Progress::far()),
            watch: Mutex::new(None),
        }))
    }
}

/// A source at an agent.
#[derive(Debug)]
struct RemoteSource {
    peer: Peer,
    description: String,
    until: Option<Instant>,
    begin_ns: u64,
    /// The sink, and its count at the start.
    feedback: Option<(Arc<Progress>, u64)>,
}

impl Source for RemoteSource {
    fn start(
        &mut self,
        rate: Rate,
        duration: Duration,
        feedback: Option<Arc<Progress>>,
    ) -> Result<()> {
        ensure!(
            feedback.is_some() || !matches!(rate, Rate::Window(_)),
            "a window needs the sink's progress"
        );
        let feedback = feedback.filter(|_| matches!(rate, Rate::Window(_)));
        self.feedback = feedback.map(|sink| (Arc::clone(&sink), sink.packets()));
        self.begin_ns = monotonic_ns();
        self.peer.order(&Request::Start { rate, duration })?;
        self.until = Some(Instant::now() + duration);
        Ok(())
    }

    fn is_sending(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }

    fn finish(&mut self) -> Result<SourceReport> {
        self.until = None;
        let answer = match self.feedback.take() {
            None => self.peer.ask(&Request::FinishSource)?,
            Some((sink, base)) => self
                .peer
                .ask_and_tell(&Request::FinishSource, || sink.packets() - base)?,
        };
        let Answer::Sent(mut report) = answer else {
            bail!(UNEXPECTED);
        };
        if !self.peer.shares_clock {
            report.first_ns = self.begin_ns;
        }
        Ok(report)
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for RemoteSource {
    fn drop(&mut self) {
        // An agent that is gone has closed it as well.
        drop(self.peer.ask(&Request::CloseSource));
    }
}

/// A sink at an agent.
#[derive(Debug)]
struct RemoteSink {
    peer: Peer,
    description: String,
    progress: Arc<Progress>,
    /// What asks for the progress, from the first time that somebody wants to know until the end of the trial.
    watch: Mutex<Option<Watch>>,
}

/// A thread that keeps asking an agent for its sink's progress.
#[derive(Debug)]
struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(peer: &Peer, progress: &Arc<Progress>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (peer, progress, stop) = (peer.clone(), Arc::clone(progress), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let after = progress.packets();
                    match peer.ask(&Request::Progress { after }) {
                        Ok(Answer::Arrived(packets)) => progress.set(packets),
                        // Whoever asks for the report hears what is wrong.
                        Ok(_) | Err(_) => return,
                    }
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            drop(thread.join());
        }
    }
}

impl RemoteSink {
    fn watch(&self) -> MutexGuard<'_, Option<Watch>> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for RemoteSink {
    fn progress(&self) -> Arc<Progress> {
        self.watch()
            .get_or_insert_with(|| Watch::start(&self.peer, &self.progress));
        Arc::clone(&self.progress)
    }

    fn reset(&mut self) -> Result<()> {
        *self.watch() = None;
        let Answer::Arrived(packets) = self.peer.ask(&Request::Reset)? else {
            bail!(UNEXPECTED);
        };
        self.progress.set(packets);
        Ok(())
    }

    fn finish(&mut self, sent_by_flow: &[u64]) -> Result<SinkReport> {
        *self.watch() = None;
        let sent_by_flow = sent_by_flow.to_vec();
        let Answer::Came(mut report) = self.peer.ask(&Request::FinishSink { sent_by_flow })? else {
            bail!(UNEXPECTED);
        };
        if !self.peer.shares_clock {
            // Its clock is not the source's.
            report.latency = None;
            (report.first_ns, report.last_ns) = (None, None);
        }
        Ok(*report)
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for RemoteSink {
    fn drop(&mut self) {
        *self.watch() = None;
        // An agent that is gone has closed it as well.
        drop(self.peer.ask(&Request::CloseSink));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_whole() {
        let read =
            |text: &str| read::<u32>(&mut text.as_bytes(), 8).map_err(|error| error.to_string());
        assert_eq!(read(""), Ok(None));
        assert_eq!(read("12\n34\n"), Ok(Some(12)));
        assert_eq!(read("12"), Err("a line was cut off".into()));
        assert_eq!(
            read("12345678\n"),
            Err("a line of more than 8 bytes".into())
        );
        assert_eq!(read("x\n"), Err("a line that makes no sense".into()));
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same("abc", "abc"));
        assert!(!same("abc", "abd") && !same("abc", "abcd") && !same("", "a"));
        let [one, other] = [new_token().expect("random"), new_token().expect("random")];
        assert!(one.len() >= TOKEN_MIN && one != other);
    }

    #[test]
    fn the_default_route_is_found_in_either_family() {
        let four = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth1\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let zeros = "0".repeat(32);
        let six = format!(
            "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth2\n\
             fd000000000000000000000000000000 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     eth1\n"
        );
        let found =
            ["eth0", "eth1", "eth2", "eth3"].map(|name| routes_by_default(four, &six, name));
        assert_eq!(found, [true, false, true, false]);
    }

    #[test]
    fn a_report_survives_the_way() {
        let mut latency = crate::measure::histogram::new().expect("bounds");
        for value in [1, 1000, 1_000_003, 33_000_000_000] {
            latency.record_n(value, 3).expect("in bounds");
        }
        let report = SinkReport {
            received: 12,
            lost: 1,
            latency: Some(latency),
            ..SinkReport::default()
        };
        let text = serde_json::to_string(&report).expect("serializes");
        let back: SinkReport = serde_json::from_str(&text).expect("parses");
        assert_eq!(back.latency, report.latency);
        assert_eq!((back.received, back.lost), (12, 1));
    }
}
