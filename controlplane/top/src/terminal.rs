//! The panel on the whole of a terminal, until its user has seen enough.
//!
//! The terminal is given back as it was whatever happens: when the view ends, when a signal asks the process to end, and
//! when the program panics.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;
use std::{io, panic};

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ripstop_fib::map::MapError;
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::panel::{Asked, Panel};
use crate::rates::Rates;
use crate::snapshot::Snapshot;

/// Signals that end the view.
const SIGNALS: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];
/// How long a signal may go unnoticed.
const SIGNAL_PATIENCE: Duration = Duration::from_millis(100);
/// The first rates come soon.
const FIRST_INTERVAL: Duration = Duration::from_millis(250);

/// Why the view ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The user wanted it, or all frames have been shown.
    Done,
    /// This signal came. Whoever gets this ends the process by it.
    Signal(i32),
}

/// A terminal that is ours until this is dropped or the program panics, in whatever thread: raw, and on its other screen.
#[derive(Debug)]
pub struct Screen<W: io::Write> {
    /// To draw on.
    pub terminal: Terminal<CrosstermBackend<W>>,
    taken: Taken<W>,
}

impl<W: io::Write + 'static> Screen<W> {
    /// Takes the terminal behind an output: `io::stdout` or `io::stderr`.
    ///
    /// # Errors
    /// There is no terminal, or none that can be used.
    pub fn take(out: fn() -> W) -> io::Result<Self> {
        let taken = Taken::new(out);
        let after = panic::take_hook();
        let on_panic = taken.clone();
        panic::set_hook(Box::new(move |panic| {
            on_panic.give_back();
            after(panic);
        }));
        // It may come half way: what is left is given back as well.
        let terminal = taken.enter().inspect_err(|_error| taken.give_back())?;
        Ok(Self { terminal, taken })
    }

    /// False once a panic has given it back: then it is not to be drawn on.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.taken.is_ours.load(Ordering::Relaxed)
    }
}

impl<W: io::Write> Drop for Screen<W> {
    fn drop(&mut self) {
        self.taken.give_back();
    }
}

/// What is known of a terminal in every thread that may have to give it back.
#[derive(Debug)]
struct Taken<W> {
    is_ours: Arc<AtomicBool>,
    out: fn() -> W,
}

impl<W> Clone for Taken<W> {
    fn clone(&self) -> Self {
        Self {
            is_ours: Arc::clone(&self.is_ours),
            out: self.out,
        }
    }
}

impl<W: io::Write> Taken<W> {
    fn new(out: fn() -> W) -> Self {
        Self {
            is_ours: Arc::new(AtomicBool::new(true)),
            out,
        }
    }

    fn enter(&self) -> io::Result<Terminal<CrosstermBackend<W>>> {
        enable_raw_mode()?;
        execute!((self.out)(), EnterAlternateScreen)?;
        Terminal::new(CrosstermBackend::new((self.out)()))
    }

    /// There is nobody to tell of a terminal that is gone.
    fn give_back(&self) {
        if self.is_ours.swap(false, Ordering::Relaxed) {
            let _ = disable_raw_mode();
            let _ = execute!((self.out)(), LeaveAlternateScreen, Show);
        }
    }
}

/// Signals that are noted down until this is dropped.
struct Noted {
    last: Arc<AtomicUsize>,
    ids: Vec<SigId>,
}

impl Noted {
    fn new() -> io::Result<Self> {
        let mut noted = Self {
            last: Arc::default(),
            ids: Vec::new(),
        };
        for signal in SIGNALS {
            let number = usize::try_from(signal).unwrap_or_default();
            let last = Arc::clone(&noted.last);
            let id = signal_hook::flag::register_usize(signal, last, number)?;
            noted.ids.push(id);
        }
        Ok(noted)
    }

    fn signal(&self) -> Option<i32> {
        let number = i32::try_from(self.last.load(Ordering::Relaxed)).ok()?;
        (number != 0).then_some(number)
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

/// Shows the panel until its user quits, a signal comes, or `frames` rates have been shown. `look` is asked for a
/// snapshot every interval; that it fails is shown, and tried again.
///
/// # Errors
/// When the terminal cannot be used.
pub fn live(
    panel: &mut Panel,
    frames: Option<u64>,
    look: &mut dyn FnMut() -> Result<Snapshot, MapError>,
) -> io::Result<End> {
    let signals = Noted::new()?;
    let mut screen = Screen::take(io::stdout)?;
    let mut before: Option<Snapshot> = None;
    let mut rates = Rates::default();
    let mut shown = 0;
    let mut looked = Instant::now();
    let mut is_due = true;
    let mut is_drawn = false;
    loop {
        if is_due {
            is_drawn = false;
            looked = Instant::now();
            let seen = look();
            if !panel.paused {
                panel.problem = seen.as_ref().err().map(ToString::to_string);
            }
            let seen = seen.ok();
            shown += u64::from(before.is_some() || seen.is_none());
            if let Some(now) = seen {
                if !panel.paused {
                    rates = Rates::between(before.as_ref(), &now);
                }
                before = Some(now);
            }
        }
        if !is_drawn {
            screen
                .terminal
                .draw(|frame| panel.draw(&rates, frame.area(), frame.buffer_mut()))?;
            is_drawn = true;
        }
        if frames.is_some_and(|frames| shown >= frames) {
            return Ok(End::Done);
        }
        let left = until_next(panel, shown).saturating_sub(looked.elapsed());
        if event::poll(left.min(SIGNAL_PATIENCE))? {
            // A key, or another size.
            is_drawn = false;
            if let Event::Key(key) = event::read()?
                && panel.key(key) == Asked::Quit
            {
                return Ok(End::Done);
            }
        }
        if let Some(signal) = signals.signal() {
            return Ok(End::Signal(signal));
        }
        // Asked again: a changed interval counts from the last look.
        is_due = looked.elapsed() >= until_next(panel, shown);
    }
}

/// Time from one look to the next.
fn until_next(panel: &Panel, shown: u64) -> Duration {
    match shown {
        0 => panel.interval.min(FIRST_INTERVAL),
        _ => panel.interval,
    }
}
