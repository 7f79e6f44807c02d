//! The last set of a source, kept on disk for a start while the source is away.
//!
//! ```text
//!   {"version":1,"node":"n1","own":"n1","source":"kube","network":"10.244.0.0/16",…,"at":"2026-11-22T08:00:00Z"}
//!   {"version":1,"leases":[{"node":"n1","publicIP":…},…]}      as a lease file has it
//!   1f2e3d4c5b6a7988                                           FNV-1a of the two lines before
//! ```
//!
//! [`Kept`] stands between a source and the loop. What the source tells passes through at once; a thread beside it
//! writes the latest set, some time after it came, so that a wave of changes is written once. If the source has no set
//! soon after the start, the kept one takes its place, and status says so, until the source has one.
//!
//! The file is read as a lease file is, so a set from it holds what every set holds. One that is damaged, or belongs to
//! another node, network, backend or kind of source, is named and not used.

use core::time::Duration;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use k8s_openapi::jiff;
use serde::{Deserialize, Serialize};

use super::{LeaseEvent, LeaseSet, LeaseSink, LeaseSource, file};
use crate::netconf::NetConf;
use crate::sys::Wake;

/// Name of the file in the run directory.
pub const KEPT_FILE: &str = "leases.kept";
/// How long the source may take before the kept set stands in for its own.
const PATIENCE: Duration = Duration::from_secs(1);
/// A set is written this long after it came, or not at all if another came meanwhile.
const COALESCE: Duration = Duration::from_secs(2);
/// What this program writes, and all that it reads.
const VERSION: u32 = 1;

/// Why a kept set is not used.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It was written by, or for, something else.
    #[error("its {what} is {theirs}, here it is {ours}")]
    Foreign {
        /// What differs.
        what: &'static str,
        /// As the file has it.
        theirs: String,
        /// As it is.
        ours: String,
    },
}

/// The first line: whose set it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    version: u32,
    node: String,
    /// Name of the own lease's node.
    own: String,
    source: String,
    network: Option<String>,
    #[serde(rename = "ipv6Network")]
    network6: Option<String>,
    backend: String,
    /// When the set was written, RFC 3339.
    at: String,
}

/// Where a node's set is kept.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
    node: String,
    /// The first word of what the source calls itself.
    source: String,
    conf: NetConf,
}

impl Store {
    /// The file in `run_dir` of node `node`, for a source that calls itself `source`.
    pub fn new(run_dir: &Path, node: String, source: &str, conf: NetConf) -> Self {
        let source = source.split(' ').next().unwrap_or_default().to_owned();
        Self {
            path: run_dir.join(KEPT_FILE),
            node,
            source,
            conf,
        }
    }

    fn header(&self, own: &str, at: String) -> Header {
        Header {
            version: VERSION,
            node: self.node.clone(),
            own: own.to_owned(),
            source: self.source.clone(),
            network: self.conf.network.map(|net| net.to_string()),
            network6: self.conf.network6.map(|net| net.to_string()),
            backend: self.conf.backend.name().to_owned(),
            at,
        }
    }

    /// Writes a set, whole or not at all.
    pub fn write(&self, set: &LeaseSet) -> Result<(), KeptError> {
        let own = set.own.iter().find_map(|(_, own)| own.as_ref());
        let own = own.map(|own| &*own.node).unwrap_or_default();
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        let temporary = self
            .path
            .with_file_name(format!(".{KEPT_FILE}.{}", std::process::id()));
        let mut output = Summed {
            output: BufWriter::new(File::create(&temporary)?),
            sum: FNV_BASIS,
        };
        let json = |error: serde_json::Error| KeptError::Io(error.into());
        serde_json::to_writer(&mut output, &self.header(own, now.to_string())).map_err(json)?;
        output.write_all(b"\n")?;
        file::write(set, &mut output).map_err(json)?;
        output.write_all(b"\n")?;
        let sum = output.sum;
        writeln!(output.output, "{sum:016x}")?;
        output.output.flush()?;
        std::fs::rename(temporary, &self.path)?;
        Ok(())
    }

    /// The set and when it was written; none if there is no file.
    pub fn read(&self) -> Result<Option<(LeaseSet, String)>, KeptError> {
        let damaged = |what: &str| KeptError::Damaged(what.to_owned());
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n');
        let (Some(header), Some(leases), Some(sum), None) =
            (lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err(damaged("it has not three lines"));
        };
        let written = [header, leases].into_iter().flatten();
        let right = format!("{:016x}\n", written.fold(FNV_BASIS, fnv));
        if sum != right.as_bytes() {
            return Err(damaged("its check sum is wrong"));
        }
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| KeptError::Damaged(error.to_string()))?;
        let wanted = self.header(&header.own, header.at.clone());
        let net = |net: &Option<String>| net.clone().unwrap_or_else(|| "none".to_owned());
        for (what, theirs, ours) in [
            (
                "format's version",
                header.version.to_string(),
                VERSION.to_string(),
            ),
            ("node", header.node, wanted.node),
            ("kind of source", header.source, wanted.source),
            ("Network", net(&header.network), net(&wanted.network)),
            ("IPv6Network", net(&header.network6), net(&wanted.network6)),
            ("backend", header.backend, wanted.backend),
        ] {
            if theirs != ours {
                return Err(KeptError::Foreign { what, theirs, ours });
            }
        }
        let set = file::parse(leases, &header.own, &self.conf)
            .map_err(|error| KeptError::Damaged(error.to_string()))?;
        Ok(Some((set, header.at)))
    }
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// One step of FNV-1a, which finds what a cable or a full disk does to a file. It keeps nobody out.
fn fnv(sum: u64, byte: &u8) -> u64 {
    (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
}

/// Sums up what is written.
struct Summed<W> {
    output: W,
    sum: u64,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.output.write(bytes)?;
        self.sum = bytes.iter().take(written).fold(self.sum, fnv);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// A source whose last set outlives the process.
pub struct Kept {
    source: Box<dyn LeaseSource>,
    store: Store,
}

impl core::fmt::Debug for Kept {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Kept")
            .field("source", &self.source.describe())
            .field("store", &self.store)
            .finish()
    }
}

impl Kept {
    /// Keeps the sets of `source` in `run_dir`, for node `node` in the network of `conf`.
    pub fn new(source: Box<dyn LeaseSource>, run_dir: &Path, node: String, conf: NetConf) -> Self {
        let store = Store::new(run_dir, node, &source.describe(), conf);
        Self { source, store }
    }
}

/// Whose set is in force.
enum Phase {
    /// Nobody's, until then.
    Waiting(Instant),
    /// The kept one, or nobody's if it cannot be used; and what is to be said of it.
    Kept(String),
    /// The source's, or nobody's if nothing is kept.
    Source,
}

impl LeaseSource for Kept {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn run(self: Box<Self>, sink: &LeaseSink) {
        let Self { source, store } = *self;
        let (queue, events) = crossbeam::channel::unbounded();
        let (keep, kept) = crossbeam::channel::unbounded();
        let name = source.describe();
        let started = || -> io::Result<()> {
            let inner = LeaseSink::new(queue, Arc::new(Wake::new()?));
            let store = store.clone();
            let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
            thread("lease source").spawn(move || source.run(&inner))?;
            thread("lease keeper").spawn(move || keep_all(&store, &kept))?;
            Ok(())
        };
        if let Err(error) = started() {
            sink.send(LeaseEvent::Failed(format!("{name}: start: {error}")));
            return;
        }
        let mut phase = Phase::Waiting(Instant::now() + PATIENCE);
        // What the source says is wrong.
        let mut problem: Option<String> = None;
        loop {
            let event = match &phase {
                Phase::Waiting(until) => events.recv_deadline(*until),
                Phase::Kept(_) | Phase::Source => events.recv().map_err(RecvTimeoutError::from),
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    let path = store.path.display();
                    let said = match store.read() {
                        Ok(None) => {
                            phase = Phase::Source;
                            continue;
                        }
                        Ok(Some((set, at))) => {
                            let set = LeaseEvent::Set {
                                leases: Arc::new(set),
                                seen: Instant::now(),
                            };
                            if !sink.send(set) {
                                return;
                            }
                            format!("leases from {at}, kept on disk")
                        }
                        Err(error) => format!("leases kept in {path} are not used: {error}"),
                    };
                    let notice = notice(&said, &name, problem.as_deref());
                    phase = Phase::Kept(said);
                    if !sink.send(LeaseEvent::Failed(notice)) {
                        return;
                    }
                    continue;
                }
            };
            match &event {
                LeaseEvent::Set { leases, .. } => {
                    phase = Phase::Source;
                    // A keeper that could not write has said why, and tries again.
                    let _ended = keep.send(Arc::clone(leases));
                }
                LeaseEvent::Failed(text) => problem = Some(text.clone()),
                LeaseEvent::Recovered => problem = None,
            }
            let event = match (event, &phase) {
                (LeaseEvent::Failed(_) | LeaseEvent::Recovered, Phase::Kept(said)) => {
                    LeaseEvent::Failed(notice(said, &name, problem.as_deref()))
                }
                (event, _) => event,
            };
            if !sink.send(event) {
                return;
            }
        }
    }
}

/// What is wrong while the source has no set.
fn notice(said: &str, name: &str, problem: Option<&str>) -> String {
    match problem {
        None => format!("{said}; {name} not reached"),
        Some(problem) => format!("{said}; {name} has no others: {problem}"),
    }
}

/// Writes the latest of the sets that come.
fn keep_all(store: &Store, sets: &Receiver<Arc<LeaseSet>>) {
    let mut failed = false;
    while let Ok(first) = sets.recv() {
        std::thread::sleep(COALESCE);
        let set = sets.try_iter().last().unwrap_or(first);
        let result = store.write(&set);
        if let Err(error) = &result
            && !failed
        {
            let path = store.path.display();
            tracing::warn!("leases cannot be kept in {path}: {error}");
        }
        failed = result.is_err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::PerFamily;
    use crate::lease::Lease;

    const VXLAN: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

    fn conf(text: &str) -> NetConf {
        NetConf::parse(text.as_bytes()).unwrap()
    }

    fn lease(n: u8) -> Lease {
        Lease {
            node: format!("n{n}").into(),
            public_ip: format!("10.199.0.{n}").parse().unwrap(),
            subnet: format!("10.244.{n}.0/24").parse().unwrap(),
            vtep_mac: format!("02:52:53:00:00:{n:02x}").parse().ok(),
        }
    }

    fn lease6(n: u8) -> Lease {
        Lease {
            public_ip: format!("fd00:199::{n}").parse().unwrap(),
            subnet: format!("fd00:10:244:{n}::/64").parse().unwrap(),
            ..lease(n)
        }
    }

    fn set(peers: &[Lease]) -> LeaseSet {
        LeaseSet {
            own: PerFamily {
                v4: Some(lease(1)),
                v6: Some(lease6(1)),
            },
            peers: peers.to_vec(),
        }
    }

    fn store(directory: &Path) -> Store {
        Store::new(directory, "n1".to_owned(), "kube https://x", conf(VXLAN))
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path());
        assert!(store.read().unwrap().is_none());
        for peers in [&[lease(2), lease(3), lease6(3)][..], &[]] {
            let set = set(peers);
            store.write(&set).unwrap();
            let (read, at) = store.read().unwrap().unwrap();
            assert_eq!(read, set);
            assert!(at.len() == 20 && at.ends_with('Z'), "{at}");
        }
        let names = std::fs::read_dir(directory.path()).unwrap();
        assert_eq!(names.count(), 1, "nothing else is left");
    }

    #[test]
    fn what_is_damaged_or_anothers_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path());
        store.write(&set(&[lease(2)])).unwrap();
        let path = directory.path().join(KEPT_FILE);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            for damaged in [
                good[..at].to_vec(),
                [&good[..at], &[good[at] ^ 1], &good[at + 1..]].concat(),
            ] {
                std::fs::write(&path, &damaged).unwrap();
                let error = store.read().expect_err("damaged");
                assert!(matches!(error, KeptError::Damaged(_)), "{at}: {error}");
            }
        }
        std::fs::write(&path, &good).unwrap();
        assert!(store.read().unwrap().is_some());
        let other = |node: &str, source: &str, text: &str| {
            let store = Store::new(directory.path(), node.to_owned(), source, conf(text));
            store.read().expect_err("foreign").to_string()
        };
        let v4 = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        for (error, wanted) in [
            (
                other("n2", "kube y", VXLAN),
                "its node is n1, here it is n2",
            ),
            (
                other("n1", "etcd", VXLAN),
                "its kind of source is kube, here it is etcd",
            ),
            (
                other("n1", "kube", &VXLAN.replace("10.244.0", "10.0.0")),
                "its Network is 10.244.0.0/16, here it is 10.0.0.0/16",
            ),
            (
                other("n1", "kube", v4),
                "its IPv6Network is fd00:10:244::/48, here it is none",
            ),
            (
                other("n1", "kube", &VXLAN.replace("vxlan", "host-gw")),
                "its backend is vxlan, here it is host-gw",
            ),
        ] {
            assert_eq!(error, wanted);
        }
        let later = String::from_utf8(good).unwrap();
        let later = later.replacen("\"version\":1", "\"version\":2", 1);
        let body = later
            .rsplit_once('\n')
            .unwrap()
            .0
            .rsplit_once('\n')
            .unwrap()
            .0;
        let body = format!("{body}\n");
        let sum = body.as_bytes().iter().fold(FNV_BASIS, fnv);
        std::fs::write(&path, format!("{body}{sum:016x}\n")).unwrap();
        assert_eq!(
            store.read().expect_err("of the future").to_string(),
            "its format's version is 2, here it is 1"
        );
    }

    /// A source that tells what the test says.
    struct Played(Receiver<LeaseEvent>);

    impl LeaseSource for Played {
        fn describe(&self) -> String {
            "kube https://x".to_owned()
        }

        fn run(self: Box<Self>, sink: &LeaseSink) {
            while let Ok(event) = self.0.recv() {
                sink.send(event);
            }
        }
    }

    fn play(directory: &Path) -> (crossbeam::channel::Sender<LeaseEvent>, Receiver<LeaseEvent>) {
        let (play, played) = crossbeam::channel::unbounded();
        let (queue, events) = crossbeam::channel::unbounded();
        let sink = LeaseSink::new(queue, Arc::new(Wake::new().unwrap()));
        let kept = Kept::new(
            Box::new(Played(played)),
            directory,
            "n1".to_owned(),
            conf(VXLAN),
        );
        std::thread::spawn(move || Box::new(kept).run(&sink));
        (play, events)
    }

    fn next(events: &Receiver<LeaseEvent>) -> LeaseEvent {
        events.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn expect_set(events: &Receiver<LeaseEvent>, wanted: &LeaseSet) {
        let event = next(events);
        let LeaseEvent::Set { leases, .. } = &event else {
            panic!("{event:?}")
        };
        assert_eq!(**leases, *wanted);
    }

    fn expect_problem(events: &Receiver<LeaseEvent>, wanted: &str) {
        let event = next(events);
        let LeaseEvent::Failed(problem) = &event else {
            panic!("{event:?}")
        };
        assert!(problem.ends_with(wanted), "{problem}");
    }

    fn told(set: &LeaseSet) -> LeaseEvent {
        LeaseEvent::Set {
            leases: Arc::new(set.clone()),
            seen: Instant::now(),
        }
    }

    #[test]
    fn the_last_set_stands_in_until_there_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let (play, events) = play(directory.path());
        // Nothing is kept, so nothing is told until the source tells it; and a wave is written once.
        std::thread::sleep(PATIENCE + Duration::from_millis(200));
        assert!(events.try_recv().is_err());
        let last = set(&[lease(2), lease(3)]);
        for set in [&set(&[]), &set(&[lease(2)]), &last] {
            play.send(told(set)).unwrap();
            expect_set(&events, set);
        }
        let store = store(directory.path());
        let start = Instant::now();
        let kept = loop {
            if let Some((kept, _)) = store.read().unwrap() {
                break kept;
            }
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(kept, last, "the first that is written is the last");
        // The next life.
        let (play, events) = self::play(directory.path());
        play.send(LeaseEvent::Failed("no route".to_owned()))
            .unwrap();
        expect_problem(&events, "no route");
        expect_set(&events, &last);
        expect_problem(
            &events,
            "kept on disk; kube https://x has no others: no route",
        );
        play.send(LeaseEvent::Recovered).unwrap();
        expect_problem(&events, "kept on disk; kube https://x not reached");
        let current = set(&[lease(4)]);
        play.send(told(&current)).unwrap();
        expect_set(&events, &current);
        play.send(LeaseEvent::Failed("gone".to_owned())).unwrap();
        expect_problem(&events, "gone");
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_source_that_answers_soon_is_not_stood_in_for() {
        let directory = tempfile::tempdir().unwrap();
        store(directory.path()).write(&set(&[lease(2)])).unwrap();
        let (play, events) = play(directory.path());
        let current = set(&[lease(3)]);
        play.send(told(&current)).unwrap();
        expect_set(&events, &current);
        std::thread::sleep(PATIENCE + Duration::from_millis(200));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn one_that_cannot_be_used_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(KEPT_FILE), "x").unwrap();
        let (play, events) = play(directory.path());
        let said = "leases.kept are not used: it is damaged: it has not three lines";
        expect_problem(&events, &format!("{said}; kube https://x not reached"));
        play.send(LeaseEvent::Failed("no route".to_owned()))
            .unwrap();
        expect_problem(
            &events,
            &format!("{said}; kube https://x has no others: no route"),
        );
        let current = set(&[lease(3)]);
        play.send(told(&current)).unwrap();
        expect_set(&events, &current);
    }
}
