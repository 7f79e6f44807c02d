//! What is drawn.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod common;

use core::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;
use ripstop_fib::DropReason;
use ripstop_fib::stats::XdpCounter;
use ripstop_top::{Asked, DataPlane, Order, Panel, Rates, Snapshot, View};

use common::{SECOND, START, snapshot, worker, works};

fn panel() -> Panel {
    Panel::new("ripstop top", Duration::from_secs(1))
}

/// `count` workers, of which the last is stuck, the one before it has an old table, and each does less than the next.
fn rates(count: u32) -> Rates {
    let before = snapshot(START, (0..count).map(worker).collect());
    let mut now = snapshot(START + SECOND, before.workers.clone());
    for (place, worker) in (1..).zip(&mut now.workers[..]) {
        if place < count {
            works(worker, 1_000_000 * u64::from(place));
        }
        if place + 1 == count {
            worker.generation = 16;
        }
    }
    let nic = &mut now.nics[0].counters;
    nic[XdpCounter::Redirected as usize] = 1_000_000;
    nic[XdpCounter::Fragment as usize] = 3;
    nic[XdpCounter::NoSocket as usize] = 4;
    Rates::between(Some(&before), &now)
}

fn drawn(panel: &mut Panel, rates: &Rates, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| panel.draw(rates, frame.area(), frame.buffer_mut()))
        .unwrap();
    lines(terminal.backend().buffer())
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let rows = buffer.content().chunks(usize::from(buffer.area.width));
    rows.map(|row| {
        let text: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.trim_end().to_owned()
    })
    .collect()
}

fn press(panel: &mut Panel, code: KeyCode) -> Asked {
    panel.key(KeyEvent::new(code, KeyModifiers::NONE))
}

/// The first cell of each line of the table.
fn first_words(lines: &[String]) -> Vec<&str> {
    lines
        .iter()
        .map(|line| line.split(' ').next().unwrap())
        .collect()
}

#[test]
fn a_wide_terminal_shows_everything() {
    let frame = drawn(&mut panel(), &rates(3), 220, 14);
    assert_eq!(
        frame,
        [
            "ripstop top  3 workers, 1 stuck, up 1h, data plane 4711, table 17, over 1.0 s",
            "WORKER   CPU  MODE       POLLING   DOOR  TABLE      BEAT  ENCAP/S  ENC B/S  DECAP/S  DEC B/S  CYC/PKT  PKT/BURST  IDLE  FREE  RECV  SEND  HELD  DROPS/S  DROPS  KDROP/S  KFULL/S  KLOST",
            "eth1/0     2  zero-copy  adaptive  tun      17       3ms    1.00M     150M    1.00M     100M      120         40   50%   49%   50%    1%    0%       30     30        0        5      5",
            "eth1/1     3  zero-copy  adaptive  tun      16       3ms    2.00M     300M    2.00M     200M      120         40   50%   49%   50%    1%    0%       30     30        0        5      5",
            "eth1/2     4  zero-copy  adaptive  tun      17  stuck 1s        0        0        0        0        -          -     -   49%   50%    1%    0%        0      0        0        0      0",
            "total                                                       3.00M     450M    3.00M     300M      120         40   50%   49%   50%    1%    0%       60     60        0       10     10",
            "drops/s:  unknown_peer 40  too_big 20",
            "",
            "NIC      QUEUES  XDP      REDIRECT/S  PUNT/S  OTHER/S  REDIRECTED  PUNTED  OTHER",
            "eth1          4  native        1.00M       7        0   1,000,000       7      0",
            "",
            "",
            "",
            "q quit  p pause  d drops  s sort: place  +/- every 1 s",
        ]
    );
}

#[test]
fn an_ordinary_terminal_shows_what_matters_most() {
    let frame = drawn(&mut panel(), &rates(3), 80, 12);
    assert_eq!(
        frame,
        [
            "ripstop top  3 workers, 1 stuck, up 1h, data plane 4711, table 17, over 1.0 s",
            "WORKER       BEAT  ENCAP/S  ENC B/S  DECAP/S  CYC/PKT  PKT/BURST  IDLE  DROPS/S",
            "eth1/0        3ms    1.00M     150M    1.00M      120         40   50%       30",
            "eth1/1        3ms    2.00M     300M    2.00M      120         40   50%       30",
            "eth1/2   stuck 1s        0        0        0        -          -     -        0",
            "total                3.00M     450M    3.00M      120         40   50%       60",
            "drops/s:  unknown_peer 40  too_big 20",
            "",
            "NIC      QUEUES  XDP      REDIRECT/S  PUNT/S  OTHER/S  REDIRECTED  PUNTED  OTHER",
            "eth1          4  native        1.00M       7        0   1,000,000       7      0",
            "",
            "q quit  p pause  d drops  s sort: place  +/- every 1 s",
        ]
    );
}

#[test]
fn a_small_terminal_shows_some_of_it() {
    let frame = drawn(&mut panel(), &rates(3), 40, 10);
    assert_eq!(
        frame,
        [
            "ripstop top  3 workers, 1 stuck, up 1h,",
            "WORKER   ENCAP/S  DECAP/S  IDLE  DROPS/S",
            "eth1/0     1.00M    1.00M   50%       30",
            "eth1/1     2.00M    2.00M   50%       30",
            "eth1/2         0        0     -        0",
            "total      3.00M    3.00M   50%       60",
            "drops/s:  unknown_peer 40  too_big 20",
            "",
            "",
            "q quit  p pause  d drops  s sort: place",
        ]
    );
}

#[test]
fn reasons_have_a_view_of_their_own() {
    let mut panel = panel();
    press(&mut panel, KeyCode::Char('d'));
    let frame = drawn(&mut panel, &rates(2), 52, 9);
    assert_eq!(
        frame,
        [
            "ripstop top  2 workers, 1 stuck, up 1h, data plane 4",
            "WHERE          REASON            PER S  TOTAL  MEANI",
            "eth1/0         unknown_peer         20     20  The o",
            "eth1/0         too_big              10     10  The p",
            "eth1/0 socket  rx_ring_full          5      5  Packe",
            "eth1 xdp       no_socket             4      4  Such",
            "eth1 xdp       fragment              3      3  Fragm",
            "",
            "q quit  p pause  d workers  +/- every 1 s",
        ]
    );
    let nothing = Rates::between(None, &snapshot(START, vec![worker(0)]));
    assert_eq!(drawn(&mut panel, &nothing, 80, 5)[1], "nothing was dropped");
}

#[test]
fn text_has_all_of_it() {
    let text = panel().text(&rates(2));
    let lines: Vec<_> = text.lines().collect();
    let (tables, reasons) = lines.split_at(9);
    assert!(reasons[3].ends_with(DropReason::TooBig.explanation()));
    assert_eq!(
        tables,
        [
            "ripstop top  2 workers, 1 stuck, up 1h, data plane 4711, table 17, over 1.0 s",
            "",
            "WORKER   CPU  MODE       POLLING   DOOR  TABLE      BEAT  ENCAP/S  ENC B/S  DECAP/S  DEC B/S  CYC/PKT  PKT/BURST  IDLE  FREE  RECV  SEND  HELD  DROPS/S  DROPS  KDROP/S  KFULL/S  KLOST",
            "eth1/0     2  zero-copy  adaptive  tun      16       3ms    1.00M     150M    1.00M     100M      120         40   50%   49%   50%    1%    0%       30     30        0        5      5",
            "eth1/1     3  zero-copy  adaptive  tun      17  stuck 1s        0        0        0        0        -          -     -   49%   50%    1%    0%        0      0        0        0      0",
            "total                                                       1.00M     150M    1.00M     100M      120         40   50%   49%   50%    1%    0%       30     30        0        5      5",
            "",
            "NIC      QUEUES  XDP      REDIRECT/S  PUNT/S  OTHER/S  REDIRECTED  PUNTED  OTHER",
            "eth1          4  native        1.00M       7        0   1,000,000       7      0",
        ]
    );
}

#[test]
fn that_there_is_nothing_to_show_is_said() {
    let mut panel = panel();
    let none = |data_plane| {
        let snapshot = Snapshot {
            data_plane,
            generation: None,
            workers: Vec::new(),
            ..snapshot(START, Vec::new())
        };
        Rates::between(None, &snapshot)
    };
    let never = none(DataPlane::Never);
    let frame = drawn(&mut panel, &never, 80, 5).join("\n");
    assert!(frame.contains("no data plane has run here"), "{frame}");
    assert!(panel.text(&never).contains("no data plane has run here"));
    let frame = drawn(&mut panel, &none(DataPlane::Ended), 80, 5).join("\n");
    assert!(frame.contains("the data plane does not run"), "{frame}");
    panel.problem = Some("the region is of another version".to_owned());
    let frame = drawn(&mut panel, &rates(2), 80, 5).join("\n");
    assert!(frame.contains("of another version"), "{frame}");
}

#[test]
fn sixty_four_workers_can_be_scrolled_through() {
    let (mut panel, rates) = (panel(), rates(64));
    let (width, height) = (80, 24);
    let frame = drawn(&mut panel, &rates, width, height);
    // Header, heading, rows, total, drops, empty line, heading and line of the NIC, keys.
    assert_eq!(
        first_words(&frame)[2..18],
        (0..16)
            .map(|queue| format!("eth1/{queue}"))
            .collect::<Vec<_>>()
    );
    assert_eq!(
        first_words(&frame)[18..],
        ["total", "drops/s:", "", "NIC", "eth1", "q"]
    );
    assert!(frame[23].ends_with("arrows: 1-16 of 64"), "{}", frame[23]);
    let mut first_after = |key| {
        press(&mut panel, key);
        first_words(&drawn(&mut panel, &rates, width, height))[2].to_owned()
    };
    assert_eq!(first_after(KeyCode::Down), "eth1/1");
    assert_eq!(first_after(KeyCode::PageDown), "eth1/17");
    assert_eq!(first_after(KeyCode::Up), "eth1/16");
    assert_eq!(first_after(KeyCode::PageUp), "eth1/0");
    assert_eq!(first_after(KeyCode::PageUp), "eth1/0");
    assert_eq!(first_after(KeyCode::End), "eth1/48");
    assert_eq!(first_after(KeyCode::Down), "eth1/48");
    assert_eq!(first_after(KeyCode::Home), "eth1/0");
}

#[test]
fn workers_are_sorted() {
    let (mut panel, rates) = (panel(), rates(3));
    let mut sorted = || {
        press(&mut panel, KeyCode::Char('s'));
        let frame = drawn(&mut panel, &rates, 80, 12);
        let names = first_words(&frame)[2..5].join(" ");
        (panel.order, names)
    };
    assert_eq!(
        sorted(),
        (Order::Packets, "eth1/1 eth1/0 eth1/2".to_owned())
    );
    assert_eq!(sorted().0, Order::Drops);
    assert_eq!(sorted(), (Order::Busy, "eth1/0 eth1/1 eth1/2".to_owned()));
    assert_eq!(sorted().0, Order::Place);
}

#[test]
fn keys_do_what_they_say() {
    let mut panel = panel();
    for key in [KeyCode::Char('q'), KeyCode::Esc] {
        assert_eq!(press(&mut panel, key), Asked::Quit);
    }
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(panel.key(control_c), Asked::Quit);
    let released = KeyEvent {
        kind: KeyEventKind::Release,
        ..control_c
    };
    assert_eq!(panel.key(released), Asked::Nothing);
    assert_eq!(press(&mut panel, KeyCode::Char('c')), Asked::Nothing);
    press(&mut panel, KeyCode::Char('p'));
    assert!(panel.paused && drawn(&mut panel, &rates(2), 120, 5)[0].contains("paused"));
    press(&mut panel, KeyCode::Char('d'));
    assert_eq!(panel.view, View::Drops);
    let mut interval_after = |key| {
        press(&mut panel, KeyCode::Char(key));
        panel.interval.as_millis()
    };
    assert_eq!([interval_after('+'), interval_after('+')], [2000, 5000]);
    for _ in 0..20 {
        interval_after('-');
    }
    assert_eq!(interval_after('-'), 100);
    for _ in 0..20 {
        interval_after('+');
    }
    assert_eq!(interval_after('+'), 60_000);
}

#[test]
fn no_size_and_no_part_of_a_screen_is_too_small() {
    let mut panel = panel();
    let rates = [rates(2), rates(64), Rates::default()];
    for view in [View::Workers, View::Drops] {
        panel.view = view;
        for rates in &rates {
            for width in [0, 1, 2, 7, 20, 40, 81, 300] {
                for height in 0..30 {
                    let mut buffer = Buffer::empty(Rect::new(0, 0, width, height));
                    panel.draw(rates, buffer.area, &mut buffer);
                    press(&mut panel, KeyCode::PageDown);
                }
            }
        }
    }
    // A part of another program's screen: nothing outside of it is touched.
    let mut buffer = Buffer::filled(Rect::new(0, 0, 50, 20), ratatui::buffer::Cell::new("#"));
    let area = Rect::new(5, 5, 40, 10);
    panel.draw(&rates[1], area, &mut buffer);
    for (place, line) in (0..).zip(lines(&buffer)) {
        let outside = !(area.y..area.bottom()).contains(&place);
        let (before, after) = (&line[..5], &line[line.len() - 5..]);
        assert_eq!((before, after), ("#####", "#####"), "{line}");
        assert_eq!(line.chars().all(|cell| cell == '#'), outside, "{line}");
    }
    panel.draw(&rates[1], Rect::new(45, 15, 40, 40), &mut buffer);
}
