//! The terminal is given back. The program under test is this one again, on a terminal that the test has made.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]
#![expect(unsafe_code, reason = "pseudo terminals have no safe interface in std")]

use core::time::Duration;
use std::os::unix::process::ExitStatusExt as _;

use ripstop_top::terminal::{End, live};
use ripstop_top::{Panel, Snapshot};

mod pty;

use pty::{LEAVE, Session, set_size};

/// What a test wants of its child.
const WANTED: &str = "RIPSTOP_TEST_TERMINAL";

/// Runs the test `this_is_the_child` on a terminal of 80 by 24.
fn session(wanted: &str) -> Session {
    let this = std::env::current_exe().unwrap();
    Session::of(&this, (80, 24), |command| {
        let child = ["--exact", "this_is_the_child", "--ignored", "--nocapture"];
        command.args(child).env(WANTED, wanted);
    })
}

/// The same, up and drawn.
fn drawn() -> Session {
    let session = session("nothing");
    // Spaces are skipped, not written.
    session.until("it is drawn", |seen| seen.contains("ripstop-dataplane"));
    assert!(session.is_raw());
    session
}

#[test]
#[ignore = "run by the other tests, on a terminal that they make"]
fn this_is_the_child() {
    let Ok(wanted) = std::env::var(WANTED) else {
        return;
    };
    let mut panel = Panel::new("a test", Duration::from_millis(100));
    let mut looks = 0;
    let mut look = || {
        looks += 1;
        assert!(wanted != "panic" || looks < 3, "as wanted");
        Ok(Snapshot::default())
    };
    let frames = (wanted == "count").then_some(3);
    let code = match live(&mut panel, frames, &mut look).unwrap() {
        End::Done => looks,
        End::Signal(signal) => {
            signal_hook::low_level::emulate_default_handler(signal).unwrap();
            99
        }
    };
    std::process::exit(code);
}

#[test]
fn the_terminal_is_given_back_when_the_user_quits() {
    for key in ["q", "\u{3}", "\u{1b}"] {
        let mut session = drawn();
        session.keys(key);
        assert!(session.end().code().unwrap() < 99, "{key:?}");
    }
}

#[test]
fn the_terminal_is_given_back_after_so_many_looks() {
    assert_eq!(session("count").end().code(), Some(4));
}

#[test]
fn the_terminal_is_given_back_when_the_program_panics() {
    let session = session("panic");
    session.until("the message", |seen| {
        let message = seen.find("as wanted");
        message.is_some() && message > seen.find(LEAVE)
    });
    assert_eq!(session.end().code(), Some(101));
}

#[test]
fn the_terminal_is_given_back_when_a_signal_comes() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let session = drawn();
        session.kill(signal);
        assert_eq!(session.end().signal(), Some(signal));
    }
}

#[test]
fn a_terminal_may_change_its_size_to_anything() {
    let mut session = drawn();
    for size in [(40, 10), (1, 1), (0, 0), (300, 100)] {
        set_size(&session.keyboard, size);
        std::thread::sleep(Duration::from_millis(20));
    }
    session.keys("q");
    assert!(session.end().code().unwrap() < 99);
}
