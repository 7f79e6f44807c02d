//! A lease source that runs on a thread, and what it tells.

use core::time::Duration;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::Receiver;
use ripstop_controlplane::lease::{Lease, LeaseEvent, LeaseSet, LeaseSink, LeaseSource};
use ripstop_controlplane::sys::Wake;

use super::Namespace;

/// A source that runs; it ends with the value.
pub(crate) struct Source {
    events: Option<Receiver<LeaseEvent>>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// Runs it in a namespace.
    pub(crate) fn start(namespace: &Namespace, source: impl LeaseSource + 'static) -> Self {
        let (queue, events) = crossbeam::channel::unbounded();
        let sink = LeaseSink::new(queue, Arc::new(Wake::new().unwrap()));
        // A thread inherits the namespace of the one that starts it.
        let run = move || Box::new(source).run(&sink);
        let thread = namespace.enter(|| std::thread::spawn(run));
        Self {
            events: Some(events),
            thread: Some(thread),
        }
    }

    pub(crate) fn next(&self) -> LeaseEvent {
        let events = self.events.as_ref().unwrap();
        events
            .recv_timeout(Duration::from_secs(60))
            .expect("an event")
    }

    /// The next set; what is told of problems before is passed over.
    pub(crate) fn set(&self) -> Arc<LeaseSet> {
        loop {
            if let LeaseEvent::Set { leases, .. } = self.next() {
                return leases;
            }
        }
    }

    /// Sets until there is one with these peers.
    pub(crate) fn peers(&self, wanted: &[&str]) -> Arc<LeaseSet> {
        loop {
            let set = self.set();
            if described(&set) == wanted {
                return set;
            }
        }
    }

    /// Problems until there is one that says this.
    pub(crate) fn problem(&self, wanted: &str) -> String {
        loop {
            if let LeaseEvent::Failed(problem) = self.next()
                && problem.contains(wanted)
            {
                return problem;
            }
        }
    }

    pub(crate) fn recovered(&self) {
        while !matches!(self.next(), LeaseEvent::Recovered) {}
    }

    /// Nothing is told for a while.
    pub(crate) fn assert_quiet(&self, time: Duration) {
        let start = Instant::now();
        while let Some(rest) = time.checked_sub(start.elapsed()) {
            let told = self.events.as_ref().unwrap().recv_timeout(rest);
            assert!(told.is_err(), "{told:?}");
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.events = None;
        // It notices with its next event, which there is when it is told anything; a test that fails does not wait.
        drop(self.thread.take());
    }
}

/// Peers as `n2 10.244.2.0/24 10.199.0.12 02:..`.
pub(crate) fn described(set: &LeaseSet) -> Vec<String> {
    let describe = |lease: &Lease| {
        let mac = lease
            .vtep_mac
            .map(|mac| format!(" {mac}"))
            .unwrap_or_default();
        format!("{} {} {}{mac}", lease.node, lease.subnet, lease.public_ip)
    };
    set.peers.iter().map(describe).collect()
}
