//! A wish that a thread of its own keeps fulfilled: what takes programs or large transactions, beside the main loop,
//! which has heartbeats to watch.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::sys::Wake;

/// What is wanted, and the thread that sees to it.
#[derive(Debug)]
pub(crate) struct Keeper<W> {
    desk: Arc<Desk<W>>,
    thread: Option<JoinHandle<()>>,
}

/// Where the wish lies, and what the thread says of it.
#[derive(Debug)]
pub(crate) struct Desk<W> {
    state: Mutex<State<W>>,
    /// Signalled when the wish is another.
    pub(crate) wake: Wake,
}

#[derive(Debug)]
struct State<W> {
    wanted: Option<W>,
    stop: bool,
    problems: Vec<String>,
}

impl<W> Desk<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is wrong; true if it was something else before.
    pub(crate) fn report(&self, problems: Vec<String>) -> bool {
        let mut state = self.lock();
        let is_news = state.problems != problems;
        state.problems = problems;
        is_news
    }
}

impl<W: Clone> Desk<W> {
    /// The wish, if there is one yet; nothing at all when the thread has to end.
    pub(crate) fn wanted(&self) -> Option<Option<W>> {
        // Cleared before the wish is read: one that comes later wakes the wait for the next.
        self.wake.clear();
        let state = self.lock();
        (!state.stop).then(|| state.wanted.clone())
    }
}

impl<W: Clone + PartialEq + Send + 'static> Keeper<W> {
    /// Starts the thread, in the network namespace of the caller. `work` ends when [`Desk::wanted`] says so.
    pub(crate) fn start(
        name: &str,
        work: impl FnOnce(&Desk<W>) + Send + 'static,
    ) -> io::Result<Self> {
        let desk = Arc::new(Desk {
            state: Mutex::new(State {
                wanted: None,
                stop: false,
                problems: Vec::new(),
            }),
            wake: Wake::new()?,
        });
        let for_thread = Arc::clone(&desk);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&for_thread))?;
        Ok(Self {
            desk,
            thread: Some(thread),
        })
    }

    /// Says what should be from here on.
    pub(crate) fn set(&self, wanted: W) {
        self.change(|present| {
            let is_news = present.as_ref() != Some(&wanted);
            *present = Some(wanted);
            is_news
        });
    }

    /// Changes what was said before; `change` tells if it did.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Option<W>) -> bool) {
        if change(&mut self.desk.lock().wanted) {
            self.desk.wake.signal();
        }
    }

    /// What stands in the way.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.desk.lock().problems.clone()
    }
}

impl<W> Drop for Keeper<W> {
    /// Ends the thread; what it has done stays.
    fn drop(&mut self) {
        self.desk.lock().stop = true;
        self.desk.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
