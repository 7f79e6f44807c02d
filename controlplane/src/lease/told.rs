//! What sources that follow a cluster share: how they wait for news, and what they have told the loop.

use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{LeaseEvent, LeaseSet, LeaseSink};

/// Changes come in bursts; a burst is answered once.
const COALESCE: Duration = Duration::from_millis(10);

/// The runtime of a source's own thread.
pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Takes the news that come within `wait`, and those that follow at once; when the first of them came,
/// or the wait began.
pub(super) async fn gather<N>(
    news: &mut mpsc::Receiver<N>,
    wait: Duration,
    mut take: impl FnMut(N),
) -> Instant {
    let start = Instant::now();
    let Ok(Some(first)) = tokio::time::timeout(wait, news.recv()).await else {
        return start;
    };
    let seen = Instant::now();
    take(first);
    tokio::time::sleep(COALESCE).await;
    while let Ok(more) = news.try_recv() {
        take(more);
    }
    seen
}

/// What the loop was told, so that it is told nothing twice.
#[derive(Debug, Default)]
pub(super) struct Told {
    set: Option<Arc<LeaseSet>>,
    problem: Option<String>,
}

impl Told {
    /// There is a set.
    pub(super) fn has_set(&self) -> bool {
        self.set.is_some()
    }

    /// Tells a set, if it is another than before; false when nobody listens.
    pub(super) fn set(&mut self, set: LeaseSet, seen: Instant, sink: &LeaseSink) -> bool {
        if self.set.as_deref() == Some(&set) {
            return true;
        }
        let leases = Arc::new(set);
        self.set = Some(Arc::clone(&leases));
        // A set is also the word that all is well.
        self.problem = None;
        sink.send(LeaseEvent::Set { leases, seen })
    }

    /// Tells what is wrong, if that is another thing than before; false when nobody listens.
    pub(super) fn problems(&mut self, problems: &[&Option<String>], sink: &LeaseSink) -> bool {
        let problems: Vec<&str> = problems.iter().filter_map(|text| text.as_deref()).collect();
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        if problem == self.problem {
            return true;
        }
        self.problem.clone_from(&problem);
        sink.send(match problem {
            Some(problem) => LeaseEvent::Failed(problem),
            None => LeaseEvent::Recovered,
        })
    }
}
