//! The live view: what the nodes under test carry while trials run, beside how far the experiment is.
//!
//! ```text
//!   bed: which nodes ─► Progress::watch ─┐
//!   statistics region, /proc/net/dev ────┴─► View ─► standard error, once a second
//! ```
//!
//! A thread of the lowest priority looks; no process under test is asked. What it costs is in the figures, as all of the
//! machine's CPU time is. Results go to standard output and to files and know nothing of it but the command line.

use core::fmt::Write as _;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _, stderr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use indicatif::{FormattedDuration, ProgressBar};
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyEvent};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Stylize as _;
use ratatui::text::Line;
use ripstop_top::terminal::Screen;
use ripstop_top::{Asked, Panel, Rates, Snapshot};
use signal_hook::consts::{SIGINT, SIGQUIT};

use crate::measure::Watched;
use crate::netns::Netns;
use crate::sys;

/// Time between two looks, unless the user wants another.
const INTERVAL: Duration = Duration::from_secs(1);
/// No user gets more looks than these.
const INTERVAL_MIN: Duration = Duration::from_millis(500);
/// How long a key, a signal or the end may go unnoticed.
const PATIENCE: Duration = Duration::from_millis(100);
/// Lines above the nodes: what is being done, how far it is, an empty one.
const HEAD: u16 = 3;
/// Characters of the bar.
const BAR: u64 = 30;

/// Packets and drops of an interface, received and sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    received: u64,
    sent: u64,
    dropped: u64,
}

/// A node on the screen.
#[derive(Debug)]
enum Node {
    Workers(Box<Workers>),
    Kernel(Kernel),
}

impl Node {
    fn new(watched: &Watched) -> Self {
        match watched {
            Watched::Workers { name, run_dir } => Self::Workers(Box::new(Workers {
                run_dir: run_dir.clone(),
                panel: Panel::new(name.clone(), INTERVAL),
                before: None,
                rates: Rates::default(),
            })),
            Watched::Kernel(netns) => Self::Kernel(Kernel {
                netns: netns.clone(),
                links: Default::default(),
                at: [Instant::now(); 2],
            }),
        }
    }

    fn look(&mut self) {
        match self {
            Self::Workers(workers) => workers.look(),
            // One that is being taken down shows what was seen last.
            Self::Kernel(kernel) => {
                if let Ok(links) = links(&kernel.netns) {
                    kernel.saw(links, Instant::now());
                }
            }
        }
    }

    fn draw(&mut self, area: Rect, buffer: &mut Buffer) {
        match self {
            Self::Workers(workers) => workers.panel.draw(&workers.rates, area, buffer),
            Self::Kernel(kernel) => set_lines(kernel.lines(), area, buffer),
        }
    }

    fn panel(&mut self) -> Option<&mut Panel> {
        match self {
            Self::Workers(workers) => Some(&mut workers.panel),
            Self::Kernel(_) => None,
        }
    }
}

/// A node of Ripstop.
#[derive(Debug)]
struct Workers {
    run_dir: PathBuf,
    panel: Panel,
    before: Option<Snapshot>,
    rates: Rates,
}

impl Workers {
    fn look(&mut self) {
        match Snapshot::read(&self.run_dir) {
            Ok(snapshot) => self.saw(snapshot),
            Err(error) => self.panel.problem = Some(error.to_string()),
        }
    }

    fn saw(&mut self, snapshot: Snapshot) {
        self.panel.problem = None;
        if !self.panel.paused {
            self.rates = Rates::between(self.before.as_ref(), &snapshot);
        }
        self.before = Some(snapshot);
    }
}

/// A node of the kernel alone.
#[derive(Debug)]
struct Kernel {
    netns: Netns,
    /// At the first look, at the one before, and at the last.
    links: [BTreeMap<String, Link>; 3],
    /// Of the last two.
    at: [Instant; 2],
}

impl Kernel {
    fn saw(&mut self, seen: BTreeMap<String, Link>, now: Instant) {
        let [first, before, last] = &mut self.links;
        if first.is_empty() {
            first.clone_from(&seen);
            last.clone_from(&seen);
        }
        *before = core::mem::replace(last, seen);
        self.at = [self.at[1], now];
    }

    fn lines(&self) -> Vec<Line<'static>> {
        let [first, before, last] = &self.links;
        let seconds = self.at[1].duration_since(self.at[0]).as_secs_f64();
        let rate = |now: u64, before: u64| match seconds {
            s if s > 0.0 => now.saturating_sub(before) as f64 / s,
            _ => 0.0,
        };
        let name = self.netns.name();
        let head = format!("{name}  the kernel carries packets: there are no workers");
        let titles = format!(
            "{:<12}{:>12}{:>12}{:>14}{:>14}{:>10}",
            "INTERFACE", "RX/S", "TX/S", "RX", "TX", "DROPPED"
        );
        let mut lines = vec![Line::from(head).bold(), Line::from(titles).dim()];
        lines.extend(last.iter().map(|(name, now)| {
            let [first, before] =
                [first, before].map(|links| links.get(name).copied().unwrap_or_default());
            Line::from(format!(
                "{name:<12}{:>12.0}{:>12.0}{:>14}{:>14}{:>10}",
                rate(now.received, before.received),
                rate(now.sent, before.sent),
                now.received.saturating_sub(first.received),
                now.sent.saturating_sub(first.sent),
                now.dropped.saturating_sub(first.dropped)
            ))
        }));
        lines
    }
}

/// Writes one line below the other, as far as there is room.
fn set_lines<'a>(lines: impl IntoIterator<Item = Line<'a>>, area: Rect, buffer: &mut Buffer) {
    for (y, line) in (area.y..area.bottom()).zip(lines) {
        buffer.set_line(area.x, y, &line, area.width);
    }
}

/// Counters of a namespace's interfaces, without the loopback.
fn links(netns: &Netns) -> Result<BTreeMap<String, Link>> {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
    Ok(parse(&text))
}

/// Reads `/proc/net/dev`: two lines of titles, then eight figures received and eight sent after each name, of which the
/// second are packets and the fourth drops (net/core/net-procfs.c).
fn parse(text: &str) -> BTreeMap<String, Link> {
    let line = |line: &str| {
        let (name, figures) = line.split_once(':')?;
        let figures: Vec<u64> = figures
            .split_whitespace()
            .map(|figure| figure.parse().unwrap_or_default())
            .collect();
        let at = |place: usize| figures.get(place).copied().unwrap_or_default();
        let link = Link {
            received: at(1),
            sent: at(9),
            dropped: at(3) + at(11),
        };
        Some((name.trim().to_owned(), link)).filter(|(name, _)| name != "lo")
    };
    text.lines().skip(2).filter_map(line).collect()
}

/// The whole screen.
#[derive(Debug, Default)]
struct View {
    watched: Vec<Watched>,
    nodes: Vec<Node>,
}

impl View {
    /// Looks at these nodes from here on.
    fn watch(&mut self, watched: &[Watched]) {
        if self.watched != watched {
            self.nodes = watched.iter().map(Node::new).collect();
            self.watched = watched.to_vec();
        }
    }

    fn look(&mut self) {
        self.nodes.iter_mut().for_each(Node::look);
    }

    /// Gives a key to all panels.
    fn key(&mut self, key: KeyEvent) -> Asked {
        // Also where there is no panel, it is known what ends the view.
        let mut asked = Panel::new("", INTERVAL).key(key);
        for panel in self.nodes.iter_mut().filter_map(Node::panel) {
            if panel.key(key) == Asked::Quit {
                asked = Asked::Quit;
            }
        }
        asked
    }

    fn interval(&mut self) -> Duration {
        let wanted = self.nodes.iter_mut().find_map(Node::panel);
        wanted
            .map_or(INTERVAL, |panel| panel.interval)
            .max(INTERVAL_MIN)
    }

    fn draw(&mut self, bar: &ProgressBar, area: Rect, buffer: &mut Buffer) {
        let head = [
            Line::from(bar.message()).bold(),
            Line::from(how_far(bar)).dim(),
        ];
        set_lines(head, area, buffer);
        let below = Rect {
            y: area.bottom().min(area.y.saturating_add(HEAD)),
            height: area.height.saturating_sub(HEAD),
            ..area
        };
        if self.nodes.is_empty() {
            let nobody = "a path is being set up or taken down, or has no node to look at";
            set_lines([Line::from(nobody)], below, buffer);
            return;
        }
        let parts = Layout::vertical(self.nodes.iter().map(|_node| Constraint::Fill(1)));
        for (node, part) in self.nodes.iter_mut().zip(&*parts.split(below)) {
            node.draw(*part, buffer);
        }
    }
}

/// A bar of text, with what a user may do.
fn how_far(bar: &ProgressBar) -> String {
    let (done, all) = (bar.position(), bar.length().unwrap_or_default());
    let mut text = String::new();
    if let Some(full) = (BAR * done).checked_div(all) {
        let cells = (0..BAR).map(|cell| if cell < full { '#' } else { '.' });
        text.extend(cells);
        let left = FormattedDuration(bar.eta());
        let _ = write!(text, " {done}/{all}, left: {left}");
    } else {
        let _ = write!(text, "{done} trials");
    }
    let _ = write!(
        text,
        ", for {}; q ends after this trial",
        FormattedDuration(bar.elapsed())
    );
    text
}

/// The thread that shows it, until this is dropped.
#[derive(Debug)]
pub(super) struct Live {
    watched: Arc<Mutex<Vec<Watched>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Live {
    /// Shows `bar`, until `stop` is set, by a key too, or this is dropped.
    ///
    /// # Errors
    /// Standard error is no terminal, or none that can be used.
    pub(super) fn start(bar: ProgressBar, stop: Arc<AtomicBool>) -> Result<Self> {
        ensure!(
            stderr().is_terminal(),
            "--live needs a terminal, and standard error is none"
        );
        let quit = signal_hook::flag::register(SIGQUIT, Arc::clone(&stop));
        quit.context("watch for SIGQUIT")?;
        let mut screen = Screen::take(stderr).context("use the terminal")?;
        let mut live = Self {
            watched: Arc::default(),
            over: Arc::default(),
            thread: None,
        };
        let (watched, over) = (Arc::clone(&live.watched), Arc::clone(&live.over));
        live.thread = Some(thread::spawn(move || {
            // Where that is refused, it looks at ordinary priority.
            let _ = sys::set_thread_nice(19);
            let shown = show(&mut screen, &bar, &watched, &[&over, &stop]);
            drop(screen);
            let last = match shown {
                Ok(Asked::Quit) => signal_hook::low_level::raise(SIGINT),
                Ok(Asked::Nothing) => Ok(()),
                Err(error) => writeln!(stderr(), "the live view ended: {error}"),
            };
            if stop.load(Ordering::Relaxed) && last.is_ok() {
                let _ = writeln!(
                    stderr(),
                    "ends after this trial and takes the path down; Ctrl-C ends at once"
                );
            }
        }));
        Ok(live)
    }

    /// Looks at these nodes from here on.
    pub(super) fn watch(&self, watched: Vec<Watched>) {
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = watched;
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            drop(thread.join());
        }
    }
}

/// Looks and draws until one of the flags is set or the user has seen enough.
fn show(
    screen: &mut Screen<io::Stderr>,
    bar: &ProgressBar,
    watched: &Mutex<Vec<Watched>>,
    flags: &[&AtomicBool],
) -> io::Result<Asked> {
    let mut view = View::default();
    let mut looked: Option<Instant> = None;
    let mut is_drawn = false;
    while screen.is_ours() && !flags.iter().any(|flag| flag.load(Ordering::Relaxed)) {
        if looked.is_none_or(|looked| looked.elapsed() >= view.interval()) {
            let now = watched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            view.watch(&now);
            view.look();
            looked = Some(Instant::now());
            is_drawn = false;
        }
        if !is_drawn {
            screen
                .terminal
                .draw(|frame| view.draw(bar, frame.area(), frame.buffer_mut()))?;
            is_drawn = true;
        }
        if event::poll(PATIENCE)? {
            // A key, or another size.
            is_drawn = false;
            if let Event::Key(key) = event::read()?
                && view.key(key) == Asked::Quit
            {
                return Ok(Asked::Quit);
            }
        }
    }
    Ok(Asked::Nothing)
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyModifiers};
    use ripstop_fib::stats::{
        Counter, Door, Gauge, Mode, Polling, Transmit, WorkerCounters, WorkerIdentity, WorkerStats,
    };
    use ripstop_top::DataPlane;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn ripstop() -> Watched {
        Watched::Workers {
            name: "n1".to_owned(),
            run_dir: "/nowhere".into(),
        }
    }

    /// A data plane with a worker that has encapsulated so many packets, so many seconds after its start.
    fn snapshot(seconds: u64, packets: u64) -> Snapshot {
        let mut counters = WorkerCounters::default();
        counters.add(Counter::HostRxPackets, packets);
        counters.add(Counter::NicTxPackets, packets);
        let worker = WorkerStats {
            identity: WorkerIdentity {
                nic: "eth0".to_owned(),
                queue: 3,
                cpu: 1,
                mode: Mode::Copy,
                wants_zero_copy: false,
                polling: Polling::Busy,
                transmit: [Transmit::AfXdp; 2],
                door: Door::Veth,
                frames: 4096,
                frame_size: 2048,
                huge_pages: false,
                numa_node: None,
            },
            heartbeat_ns: seconds * SECOND,
            generation: 1,
            counters,
            gauges: [0; Gauge::COUNT],
            kernel: Default::default(),
        };
        Snapshot {
            at_ns: seconds * SECOND,
            data_plane: DataPlane::Running {
                pid: 4711,
                started_ns: 0,
            },
            generation: Some(1),
            workers: vec![worker],
            nics: Vec::new(),
        }
    }

    /// The view's only node.
    fn node(view: &mut View) -> &mut Node {
        view.nodes.first_mut().unwrap()
    }

    fn saw_workers(view: &mut View, snapshot: Snapshot) {
        match node(view) {
            Node::Workers(workers) => workers.saw(snapshot),
            Node::Kernel(_) => unreachable!("it has workers"),
        }
    }

    fn saw_links(view: &mut View, links: BTreeMap<String, Link>, now: Instant) {
        match node(view) {
            Node::Workers(_) => unreachable!("it has none"),
            Node::Kernel(kernel) => kernel.saw(links, now),
        }
    }

    fn bar() -> ProgressBar {
        let bar = ProgressBar::hidden();
        bar.set_length(36);
        bar.inc(12);
        bar.set_message("round 2/6, ripstop: 64 bytes");
        bar
    }

    fn shown(view: &mut View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let bar = bar();
        terminal
            .draw(|frame| view.draw(&bar, frame.area(), frame.buffer_mut()))
            .unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn workers_are_shown_below_how_far_it_is() {
        let mut view = View::default();
        view.watch(&[ripstop()]);
        for (seconds, packets) in [(10, 0), (12, 500_000)] {
            saw_workers(&mut view, snapshot(seconds, packets));
        }
        let screen = shown(&mut view, 120, 20);
        for part in [
            "round 2/6, ripstop: 64 bytes",
            "##########.................... 12/36",
            "q ends after this trial",
            "data plane 4711",
            "eth0/3",
            "250k",
        ] {
            assert!(screen.contains(part), "{part:?} is not in\n{screen}");
        }
        // No terminal is too small.
        for (width, height) in [(1, 1), (5, 3), (40, 4)] {
            shown(&mut view, width, height);
        }
    }

    #[test]
    fn the_kernel_has_no_workers_and_shows_its_interfaces() {
        let titles = "Inter-|   Receive\n face |bytes    packets errs drop fifo frame\n";
        let at = |packets: u64| {
            let lines = format!(
                "    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\nflannel.1: 1 7 0 0 0 0 0 0 64000 {packets} 0 5 0 0 0 0\n"
            );
            parse(&format!("{titles}{lines}"))
        };
        let mut view = View::default();
        view.watch(&[Watched::Kernel(Netns::of_this_thread())]);
        let start = Instant::now();
        for (seconds, packets) in [(0, 1000), (1, 3000), (3, 9000)] {
            saw_links(&mut view, at(packets), start + Duration::from_secs(seconds));
        }
        let screen = shown(&mut view, 100, 12);
        assert!(screen.contains("there are no workers"), "{screen}");
        let line = screen.lines().find(|line| line.contains("flannel.1"));
        let figures: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        assert_eq!(figures[1..6], ["0", "3000", "0", "8000", "0"]);
        assert!(!screen.contains(" lo "), "{screen}");
    }

    #[test]
    fn it_looks_at_what_is_up_and_at_nothing_in_between() {
        let mut view = View::default();
        assert!(shown(&mut view, 80, 10).contains("set up or taken down"));
        view.watch(&[ripstop()]);
        saw_workers(&mut view, snapshot(10, 0));
        view.watch(&[ripstop()]);
        assert!(shown(&mut view, 100, 10).contains("4711"), "the same node");
        view.watch(&[]);
        assert!(view.nodes.is_empty());
    }

    #[test]
    fn keys_choose_and_end_but_never_look_more_than_twice_a_second() {
        let key = |code| KeyEvent::new(code, KeyModifiers::NONE);
        let mut view = View::default();
        assert_eq!(view.key(key(KeyCode::Char('q'))), Asked::Quit);
        view.watch(&[ripstop()]);
        let c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(view.key(c), Asked::Quit);
        assert_eq!(view.interval(), INTERVAL);
        for _ in 0..9 {
            assert_eq!(view.key(key(KeyCode::Char('-'))), Asked::Nothing);
        }
        assert_eq!(view.interval(), INTERVAL_MIN);
    }
}
