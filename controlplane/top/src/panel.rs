//! The view: rates as lines, drawn into a part of a terminal or written as text.

use core::fmt::Write as _;
use core::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget as _, Wrap};
use ripstop_fib::stats::{KernelCounter, XdpCounter};

use crate::rates::{self, Count, Figures, Nic, Rates, Worker};
use crate::snapshot::DataPlane;
use crate::table::{self, Align, Column, Table, cell, lay_out, percent, short};

/// Intervals that `+` and `-` go through, in milliseconds.
const INTERVALS_MS: [u64; 9] = [100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000];

/// Workers that stay in sight before the NICs are.
const WORKERS_FIRST: usize = 3;

/// The kernel's statistics that count packets; the others count empty rings.
const LOST: [KernelCounter; 5] = [
    KernelCounter::RxDropped,
    KernelCounter::RxRingFull,
    KernelCounter::HostDropped,
    KernelCounter::RxInvalidDescriptors,
    KernelCounter::TxInvalidDescriptors,
];

/// What is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// A line for each worker, and the NICs.
    Workers,
    /// A line for each reason that packets were not forwarded for, by worker and NIC.
    Drops,
}

/// By what workers are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As the data plane lists them.
    Place,
    /// Most packets first.
    Packets,
    /// Most drops first.
    Drops,
    /// Least idle first.
    Busy,
}

impl Order {
    const ALL: [(Self, &str); 4] = [
        (Self::Place, "place"),
        (Self::Packets, "packets"),
        (Self::Drops, "drops"),
        (Self::Busy, "busy"),
    ];

    fn name(self) -> &'static str {
        let mut all = Self::ALL.iter();
        all.find(|(order, _)| *order == self)
            .map_or("", |(_, name)| name)
    }

    fn next(self) -> Self {
        let mut all = Self::ALL.iter().cycle().map(|(order, _)| *order);
        all.find(|order| *order == self);
        all.next().unwrap_or(self)
    }
}

/// What a key asks of whoever shows the panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// To end.
    Quit,
}

/// The view and what its user has chosen.
#[derive(Debug, Clone)]
pub struct Panel {
    title: String,
    /// What is shown.
    pub view: View,
    /// By what workers are sorted.
    pub order: Order,
    /// Whether the figures stand still.
    pub paused: bool,
    /// Time between two looks.
    pub interval: Duration,
    /// Why there are no figures.
    pub problem: Option<String>,
    scroll: usize,
    /// Rows that were in sight when it was drawn last.
    page: usize,
}

impl Panel {
    /// A panel with a title and the time between two looks.
    pub fn new(title: impl Into<String>, interval: Duration) -> Self {
        Self {
            title: title.into(),
            view: View::Workers,
            order: Order::Place,
            paused: false,
            interval,
            problem: None,
            scroll: 0,
            page: 1,
        }
    }

    /// Takes a key.
    pub fn key(&mut self, key: KeyEvent) -> Asked {
        if key.kind == KeyEventKind::Release {
            return Asked::Nothing;
        }
        let page = self.page.max(1);
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "most keys of a keyboard mean nothing here"
        )]
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Asked::Quit;
            }
            KeyCode::Char('q') | KeyCode::Esc => return Asked::Quit,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('d') => {
                self.view = match self.view {
                    View::Workers => View::Drops,
                    View::Drops => View::Workers,
                };
                self.scroll = 0;
            }
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('+' | '=') => {
                let mut longer = INTERVALS_MS.iter().map(|ms| Duration::from_millis(*ms));
                self.interval = longer
                    .find(|interval| *interval > self.interval)
                    .unwrap_or(self.interval);
            }
            KeyCode::Char('-') => {
                let mut shorter = INTERVALS_MS
                    .iter()
                    .rev()
                    .map(|ms| Duration::from_millis(*ms));
                self.interval = shorter
                    .find(|interval| *interval < self.interval)
                    .unwrap_or(self.interval);
            }
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll = self.scroll.saturating_add(1),
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(page),
            KeyCode::PageDown => self.scroll = self.scroll.saturating_add(page),
            KeyCode::Home => self.scroll = 0,
            KeyCode::End => self.scroll = usize::MAX,
            _ => {}
        }
        Asked::Nothing
    }

    /// Draws the rates into `area`, as much as there is room for.
    pub fn draw(&mut self, rates: &Rates, area: Rect, buffer: &mut Buffer) {
        let area = area.intersection(buffer.area);
        if area.is_empty() {
            return;
        }
        let height = usize::from(area.height);
        let width = Some(usize::from(area.width));
        let mut lines = vec![self.header(rates)];
        let body = height.saturating_sub(2);
        if let Some(message) = self.message(rates) {
            let below = Rect {
                y: area.y.saturating_add(1),
                height: area.height.saturating_sub(2),
                ..area
            };
            Paragraph::new(message)
                .wrap(Wrap { trim: true })
                .render(below, buffer);
            self.keys(&mut lines, height, 0);
        } else if self.view == View::Drops {
            let Table { head, rows } = drops(rates, width);
            lines.push(head);
            let of = rows.len();
            lines.extend(self.in_sight(rows, body.saturating_sub(1)));
            self.keys(&mut lines, height, of);
        } else {
            let (Table { head, rows }, total) = self.workers(rates, width);
            let nics = nics(rates, width);
            // The heading, the total and the line of drops; an empty line and the heading of the NICs.
            let room = body.saturating_sub(3);
            let nics_height = 2 + nics.rows.len();
            let with_nics = room >= nics_height + rows.len().min(WORKERS_FIRST);
            let room = match with_nics {
                true => room - nics_height,
                false => room,
            };
            let of = rows.len();
            lines.push(head);
            lines.extend(self.in_sight(rows, room));
            lines.push(total);
            lines.push(drops_in_a_line(&rates.total));
            if with_nics {
                lines.extend([Line::default(), nics.head]);
                lines.extend(nics.rows);
            }
            self.keys(&mut lines, height, of);
        }
        for (y, line) in (area.y..area.bottom()).zip(&lines) {
            buffer.set_line(area.x, y, line, area.width);
        }
    }

    /// Everything as text, in lines as long as they are.
    pub fn text(&self, rates: &Rates) -> String {
        let mut lines = vec![self.header(rates)];
        if let Some(message) = self.message(rates) {
            lines.push(message);
        } else {
            let (Table { head, rows }, total) = self.workers(rates, None);
            lines.extend([Line::default(), head]);
            lines.extend(rows);
            lines.push(total);
            for Table { head, rows } in [nics(rates, None), drops(rates, None)] {
                lines.extend([Line::default(), head]);
                lines.extend(rows);
            }
        }
        let mut text = String::new();
        for line in lines {
            let _ = writeln!(text, "{}", line.to_string().trim_end());
        }
        text
    }

    fn header(&self, rates: &Rates) -> Line<'static> {
        let mut text = String::new();
        match rates.data_plane {
            DataPlane::Running { pid, .. } => {
                let _ = match rates.workers.len() {
                    1 => write!(text, "1 worker"),
                    workers => write!(text, "{workers} workers"),
                };
                let stuck = rates.workers.iter().filter(|worker| worker.stuck).count();
                if stuck > 0 {
                    let _ = write!(text, ", {stuck} stuck");
                }
                let uptime = table::age(rates.uptime_s.unwrap_or(0).saturating_mul(1000));
                let _ = write!(text, ", up {uptime}, data plane {pid}");
            }
            DataPlane::Never | DataPlane::Ended => text.push_str("no data plane"),
        }
        let _ = match rates.generation {
            Some(generation) => write!(text, ", table {generation}"),
            None => write!(text, ", no table"),
        };
        let _ = match rates.interval_s {
            Some(interval) => write!(text, ", over {interval:.1} s"),
            None => write!(text, ", no rates yet"),
        };
        if self.paused {
            text.push_str(", paused");
        }
        Line::from(vec![
            Span::raw(self.title.clone()).add_modifier(Modifier::BOLD),
            Span::raw("  "),
            Span::raw(text),
        ])
    }

    /// What there is to say in place of figures.
    fn message(&self, rates: &Rates) -> Option<Line<'static>> {
        if let Some(problem) = &self.problem {
            return Some(Line::from(problem.clone()).fg(Color::Red));
        }
        match rates.data_plane {
            DataPlane::Running { .. } => None,
            DataPlane::Never => Some("no data plane has run here: start ripstop-dataplane, or name its directory with --run-dir".into()),
            DataPlane::Ended => Some("the data plane does not run: the kernel's path carries the traffic".into()),
        }
    }

    /// What the keys do; the last line of what is drawn.
    fn keys(&self, lines: &mut Vec<Line<'static>>, height: usize, rows: usize) {
        if height < 3 {
            return;
        }
        lines.resize(height - 1, Line::default());
        let mut text = String::from("q quit  p pause  ");
        let _ = match self.view {
            View::Workers => write!(text, "d drops  s sort: {}  ", self.order.name()),
            View::Drops => write!(text, "d workers  "),
        };
        let _ = write!(text, "+/- every {}", table::seconds(self.interval));
        if rows > self.page {
            let first = self.scroll + 1;
            let last = (self.scroll + self.page).min(rows);
            let _ = write!(text, "  arrows: {first}-{last} of {rows}");
        }
        lines.push(Line::from(text).add_modifier(Modifier::DIM));
    }

    /// The rows that are in sight where there is room for `page`.
    fn in_sight(&mut self, rows: Vec<Line<'static>>, page: usize) -> Vec<Line<'static>> {
        self.page = page;
        self.scroll = self.scroll.min(rows.len().saturating_sub(page));
        rows.into_iter().skip(self.scroll).take(page).collect()
    }

    /// The workers, and the line of all together.
    fn workers(&self, rates: &Rates, width: Option<usize>) -> (Table, Line<'static>) {
        let mut workers: Vec<&Worker> = rates.workers.iter().collect();
        let descending = |key: &dyn Fn(&Worker) -> f64, one: &Worker, other: &Worker| {
            key(other).total_cmp(&key(one))
        };
        let unknown = |rate: Option<f64>| rate.unwrap_or(0.0);
        workers.sort_by(|one, other| match self.order {
            Order::Place => core::cmp::Ordering::Equal,
            Order::Packets => {
                descending(&|worker| unknown(worker.figures.received_per_s), one, other)
            }
            Order::Drops => descending(&|worker| unknown(worker.figures.dropped.per_s), one, other),
            Order::Busy => descending(&|worker| -worker.figures.idle.unwrap_or(1.0), one, other),
        });
        let mut rows: Vec<_> = workers
            .into_iter()
            .map(|worker| worker_row(worker, rates.generation))
            .collect();
        let mut total: Vec<_> = ["total", "", "", "", "", "", ""].map(cell).into();
        total.extend(figure_cells(&rates.total));
        rows.push(total);
        let mut table = lay_out(&WORKER_COLUMNS, &rows, width);
        let total = table.rows.pop().unwrap_or_default();
        (table, total.add_modifier(Modifier::BOLD))
    }
}

const fn left(title: &'static str, width_min: usize, rank: u8) -> Column {
    Column {
        title,
        align: Align::Left,
        width_min,
        rank,
    }
}

const fn right(title: &'static str, width_min: usize, rank: u8) -> Column {
    Column {
        align: Align::Right,
        ..left(title, width_min, rank)
    }
}

const WORKER_COLUMNS: [Column; 23] = [
    left("WORKER", 7, 0),
    right("CPU", 3, 14),
    left("MODE", 9, 11),
    left("POLLING", 8, 13),
    left("DOOR", 4, 12),
    right("TABLE", 5, 15),
    right("BEAT", 5, 7),
    right("ENCAP/S", 5, 1),
    right("ENC B/S", 5, 8),
    right("DECAP/S", 5, 2),
    right("DEC B/S", 5, 9),
    right("CYC/PKT", 5, 5),
    right("PKT/BURST", 5, 6),
    right("IDLE", 4, 3),
    right("FREE", 4, 16),
    right("RECV", 4, 10),
    right("SEND", 4, 17),
    right("HELD", 4, 18),
    right("DROPS/S", 5, 4),
    right("DROPS", 5, 19),
    right("KDROP/S", 5, 20),
    right("KFULL/S", 5, 10),
    right("KLOST", 5, 21),
];

fn worker_row(worker: &Worker, published: Option<u64>) -> Vec<Span<'static>> {
    let behind = published.is_some_and(|published| published != worker.generation);
    let generation = cell(worker.generation.to_string());
    let beat = match (worker.stuck, worker.heartbeat_ms) {
        (false, Some(ms)) => cell(table::age(ms)),
        (_, None) => cell("stuck").fg(Color::Red),
        (true, Some(ms)) => cell(format!("stuck {}", table::age(ms))).fg(Color::Red),
    };
    let name = cell(worker.name());
    let mut row = vec![
        match worker.stuck {
            true => name.fg(Color::Red),
            false => name,
        },
        cell(worker.cpu.to_string()),
        cell(worker.mode),
        cell(worker.polling),
        cell(worker.door),
        match behind {
            true => generation.fg(Color::Yellow),
            false => generation,
        },
        beat,
    ];
    row.extend(figure_cells(&worker.figures));
    row
}

/// The columns that workers and their total have in common.
fn figure_cells(figures: &Figures) -> [Span<'static>; 16] {
    let frames = &figures.frames;
    let share = |part: u64| cell(percent(rates::ratio(part, frames.all())));
    let alarm = |count: Count| {
        let style = match count.per_s {
            Some(rate) if rate > 0.0 => Style::new().fg(Color::Yellow),
            Some(_) | None => Style::new(),
        };
        cell(short(count.per_s)).style(style)
    };
    let lost = LOST.iter().fold(0, |sum: u64, counter| {
        sum.saturating_add(figures.kernel(*counter).total)
    });
    [
        cell(short(figures.encapsulated.packets_per_s)),
        cell(short(figures.encapsulated.bytes_per_s)),
        cell(short(figures.decapsulated.packets_per_s)),
        cell(short(figures.decapsulated.bytes_per_s)),
        cell(short(figures.cycles_per_packet)),
        cell(short(figures.packets_per_burst)),
        cell(percent(figures.idle)),
        share(frames.free),
        share(frames.receiving),
        share(frames.transmitting),
        share(frames.held),
        alarm(figures.dropped),
        cell(table::grouped(figures.dropped.total)),
        alarm(figures.kernel(KernelCounter::RxDropped)),
        alarm(figures.kernel(KernelCounter::RxRingFull)),
        cell(table::grouped(lost)),
    ]
}

/// Why packets were dropped, all workers together.
fn drops_in_a_line(total: &Figures) -> Line<'static> {
    let mut counts: Vec<&Count> = total.drops.iter().filter(|count| count.total > 0).collect();
    counts.sort_by(|one, other| worst_first(one, other));
    if counts.is_empty() {
        return Line::from("no drops");
    }
    let mut text = String::from("drops/s:");
    for count in counts {
        let _ = write!(text, "  {} {}", count.name, short(count.per_s));
    }
    Line::from(text)
}

fn worst_first(one: &Count, other: &Count) -> core::cmp::Ordering {
    let rate = |count: &Count| count.per_s.unwrap_or(0.0);
    let by_rate = rate(other).total_cmp(&rate(one));
    by_rate.then(other.total.cmp(&one.total))
}

/// Every reason that packets were not forwarded for, worst first.
fn drops(rates: &Rates, width: Option<usize>) -> Table {
    const COLUMNS: [Column; 4] = [
        left("WHERE", 7, 2),
        left("REASON", 16, 0),
        right("PER S", 5, 1),
        right("TOTAL", 5, 3),
    ];
    let mut counts: Vec<(String, Count)> = Vec::new();
    for worker in &rates.workers {
        let drops = worker.figures.drops.iter();
        counts.extend(drops.map(|count| (worker.name(), *count)));
        let lost = LOST.iter().map(|counter| worker.figures.kernel(*counter));
        counts.extend(lost.map(|count| (format!("{} socket", worker.name()), count)));
    }
    for nic in &rates.nics {
        counts.extend(
            nic.punts()
                .map(|count| (format!("{} xdp", nic.nic), *count)),
        );
    }
    counts.retain(|(_, count)| count.total > 0);
    counts.sort_by(|(_, one), (_, other)| worst_first(one, other));
    let row = |(place, count): &(String, Count)| {
        vec![
            cell(place.as_str()),
            cell(count.name),
            cell(short(count.per_s)),
            cell(table::grouped(count.total)),
        ]
    };
    let rows: Vec<_> = counts.iter().map(row).collect();
    if rows.is_empty() {
        return Table {
            head: Line::from("nothing was dropped"),
            rows: Vec::new(),
        };
    }
    let mut table = lay_out(&COLUMNS, &rows, width);
    // As much of it as there is room for.
    table.head.push_span("MEANING");
    for (line, (_, count)) in table.rows.iter_mut().zip(&counts) {
        let words: Vec<_> = count.explanation.split_whitespace().collect();
        line.push_span(words.join(" "));
    }
    table
}

fn nics(rates: &Rates, width: Option<usize>) -> Table {
    const COLUMNS: [Column; 9] = [
        left("NIC", 7, 0),
        right("QUEUES", 6, 4),
        left("XDP", 7, 5),
        right("REDIRECT/S", 5, 1),
        right("PUNT/S", 5, 2),
        right("OTHER/S", 5, 3),
        right("REDIRECTED", 5, 6),
        right("PUNTED", 5, 7),
        right("OTHER", 5, 8),
    ];
    let row = |nic: &Nic| {
        let (redirected, other) = (
            nic.count(XdpCounter::Redirected),
            nic.count(XdpCounter::PassedOther),
        );
        let punted = nic.punts().map(|count| count.total);
        let punts_per_s = nic.punts().map(|count| count.per_s).sum::<Option<f64>>();
        vec![
            cell(nic.nic.as_str()),
            cell(nic.queues.to_string()),
            cell(nic.attached),
            cell(short(redirected.per_s)),
            cell(short(punts_per_s)),
            cell(short(other.per_s)),
            cell(table::grouped(redirected.total)),
            cell(table::grouped(punted.fold(0, u64::saturating_add))),
            cell(table::grouped(other.total)),
        ]
    };
    let rows: Vec<_> = rates.nics.iter().map(row).collect();
    lay_out(&COLUMNS, &rows, width)
}
