//! Several runs of traffic, looked at as one.

use core::mem;
use core::time::Duration;

use super::flow::{Mark, TrafficHandle, TrafficReport};

/// Traffic between several pairs of hosts. Dropping it stops all of it.
#[derive(Debug)]
pub struct TrafficGroup {
    members: Vec<TrafficHandle>,
}

impl TrafficGroup {
    /// Puts running traffic together.
    #[must_use]
    pub fn new(members: Vec<TrafficHandle>) -> Self {
        Self { members }
    }

    /// The runs, in the order in which they were given.
    #[must_use]
    pub fn members(&self) -> &[TrafficHandle] {
        &self.members
    }

    /// The account so far, summed up; what is on its way counts as lost.
    #[must_use]
    pub fn snapshot(&self) -> TrafficReport {
        TrafficReport::sum(self.members.iter().map(TrafficHandle::snapshot))
    }

    /// How far the senders have come.
    #[must_use]
    pub fn mark(&self) -> Vec<Mark> {
        self.members.iter().map(TrafficHandle::mark).collect()
    }

    /// How many of the packets that were sent before the mark have not arrived: see
    /// [`TrafficHandle::lost_before`].
    #[must_use]
    pub fn lost_before(&self, marks: &[Mark], quiet: Duration) -> u64 {
        let members = self.members.iter().zip(marks);
        members
            .map(|(member, mark)| member.lost_before(mark, quiet))
            .sum()
    }

    /// Stops sending everywhere, lets what is on its way arrive, and returns each account.
    #[must_use]
    pub fn stop(mut self) -> Vec<TrafficReport> {
        self.stop_sending();
        let members = mem::take(&mut self.members);
        members.into_iter().map(TrafficHandle::wait).collect()
    }

    /// All at once, so that they fall quiet together.
    fn stop_sending(&self) {
        self.members.iter().for_each(TrafficHandle::stop_sending);
    }
}

impl Drop for TrafficGroup {
    fn drop(&mut self) {
        self.stop_sending();
    }
}
