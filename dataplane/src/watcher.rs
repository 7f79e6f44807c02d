//! The watcher: the one thread beside the workers. It checks each new image before any worker may use it, tells the
//! XDP programs which tunnel is ours, and publishes what only the kernel knows.
//!
//! A worker never sees an image that has not been checked, and never waits for the check: the watcher pins the new
//! image, compares its checksum, and only then names it to the workers.

use ripstop_fib::publish::ImageRef;
use ripstop_fib::stats::{NicStats, Stats, XdpCounter};
use ripstop_fib::sync::Ordering;
use ripstop_fib::{Image, ImageError, Reader, Region};

use crate::xdp::TunnelMatch;

/// Follows the fib region for the workers.
#[derive(Debug)]
pub struct TableWatcher<'r> {
    region: Region<'r>,
    stats: Stats<'r>,
    /// Pins the image that the workers may use.
    accepted: Reader<'r>,
    /// Pins the image that is being checked.
    checking: Reader<'r>,
    refused: ImageRef,
}

/// An image that the workers may use from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Its generation.
    pub generation: u64,
    /// Which packets are ours.
    pub tunnel: TunnelMatch,
    /// Size of the image in bytes.
    pub bytes: usize,
}

impl<'r> TableWatcher<'r> {
    /// Starts with nothing accepted.
    pub fn new(region: Region<'r>, stats: Stats<'r>) -> Self {
        let (first, second) = stats.watcher_pins();
        let (accepted, checking) = (Reader::new(region, first), Reader::new(region, second));
        Self {
            region,
            stats,
            accepted,
            checking,
            refused: ImageRef::default(),
        }
    }

    /// Looks for a new image; `None` when there is none.
    ///
    /// # Errors
    /// When the new image cannot be used: the workers stay with the one they have. Reported once per image.
    pub fn look(&mut self) -> Option<Result<Accepted, ImageError>> {
        let current = ImageRef(self.region.current().load(Ordering::Relaxed));
        if current == self.accepted.pinned() || current == self.refused {
            return None;
        }
        self.checking.follow(self.region.current());
        let found = self.checking.pinned();
        if found.generation() == 0 {
            return None;
        }
        let image = Image::attach(self.checking.words());
        match image.and_then(|image| image.verify().map(|()| image)) {
            Ok(image) => {
                let node = image.node();
                // SYNC publish: passes on what `follow` has acquired.
                self.stats.accepted().store(found.0, Ordering::Release);
                core::mem::swap(&mut self.accepted, &mut self.checking);
                self.checking.unpin();
                let tunnel = TunnelMatch {
                    local: node
                        .v4
                        .map_or(core::net::Ipv4Addr::UNSPECIFIED, |local| local.address),
                    port: node.udp_port,
                    vni: node.vni,
                };
                Some(Ok(Accepted {
                    generation: found.generation(),
                    tunnel,
                    bytes: image.size_bytes(),
                }))
            }
            Err(error) => {
                self.refused = found;
                self.checking.unpin();
                Some(Err(error))
            }
        }
    }
}

/// Puts the XDP program's counters into the form of the stats region.
pub fn nic_stats(
    nic: &str,
    queues: u32,
    native: bool,
    counters: &crate::xdp::XdpCounters,
) -> NicStats {
    let mut values = [0; XdpCounter::COUNT];
    for (value, (_, frames)) in values.iter_mut().zip(counters.iter()) {
        *value = frames;
    }
    NicStats {
        nic: nic.to_owned(),
        queues,
        native,
        counters: values,
    }
}
