//! Publishing the forwarding table, and watching what the workers make of it.
//!
//! The fib region outlives every process: a control plane that starts goes on from the generation it finds and
//! publishes only if its own view differs from the content by a bit.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use ripstop_fib::map::{
    self, CONTROLPLANE_LOCK, DATAPLANE_LOCK, MapError, Mapping, ProcessLock, lock_owner,
    open_fib_for_publishing, open_stats,
};
use ripstop_fib::publish::{PublishError, RegionError};
use ripstop_fib::stats::Stats;
use ripstop_fib::sync::Ordering;
use ripstop_fib::{FAMILY_IPV4, FAMILY_IPV6, Image, LeaseRecord, Publisher, Region, Word};

/// A worker whose heartbeat is older than this is taken for stopped.
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(1);

/// Why the region cannot be published in.
#[derive(Debug, thiserror::Error)]
pub enum FibError {
    /// The file is not there, not ours or not of this version.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The header has changed under us.
    #[error("{path}: {source}: stop Ripstop on this node, remove the file, start again")]
    Region {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RegionError,
    },
    /// No room for the image.
    #[error("publish forwarding table: {0}")]
    Publish(PublishError),
}

/// What publishing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The image is current under this generation.
    New(u64),
    /// It was current already.
    Unchanged(u64),
}

impl Published {
    /// Generation of the image.
    pub fn generation(self) -> u64 {
        match self {
            Self::New(generation) | Self::Unchanged(generation) => generation,
        }
    }
}

/// The fib region, held for writing by this process alone.
#[derive(Debug)]
pub struct Fib {
    mapping: Mapping,
    run_dir: PathBuf,
    _lock: ProcessLock,
}

impl Fib {
    /// Takes the lock and opens the region, making an empty one if there is none.
    pub fn open(run_dir: &Path) -> Result<Self, FibError> {
        let lock = ProcessLock::acquire(run_dir, CONTROLPLANE_LOCK)?;
        let mapping = open_fib_for_publishing(run_dir)?;
        Ok(Self {
            mapping,
            run_dir: run_dir.to_owned(),
            _lock: lock,
        })
    }

    fn publisher(&self) -> Result<Publisher<'_>, FibError> {
        let region = Region::attach(self.mapping.words()).map_err(|source| FibError::Region {
            path: self.run_dir.join(map::FIB_FILE),
            source,
        })?;
        Ok(Publisher::adopt(region))
    }

    /// Generation that is current, 0 if none.
    pub fn generation(&self) -> Result<u64, FibError> {
        Ok(self.publisher()?.generation())
    }

    /// Makes `image` current, unless it is already.
    pub fn publish(&self, image: &[u64]) -> Result<Published, FibError> {
        let mut publisher = self.publisher()?;
        if publisher
            .current_words()
            .is_some_and(|current| same(current, image))
        {
            return Ok(Published::Unchanged(publisher.generation()));
        }
        // Opened for each image: a data plane that restarted has its pins in a new region. One that is dead holds
        // none, whatever its region says.
        let alive = lock_owner(&self.run_dir, DATAPLANE_LOCK)?.is_some();
        let stats = match open_stats(&self.run_dir) {
            Ok(stats) => Some(stats),
            Err(MapError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                None
            }
            Err(_) if !alive => None,
            // A data plane of another version: which images it holds cannot be told.
            Err(error) => return Err(error.into()),
        };
        let pins = || match &stats {
            Some(stats) if alive => Stats::attach(stats.words())
                .map(|stats| stats.pins())
                .unwrap_or_default(),
            _ => Vec::new(),
        };
        publisher
            .publish(image, pins)
            .map(Published::New)
            .map_err(FibError::Publish)
    }

    /// Subnets that the current image can send to, if it is whole: what workers may be forwarding by already.
    pub fn resolved_subnets(&self) -> Result<Vec<IpNet>, FibError> {
        let publisher = self.publisher()?;
        let image = publisher
            .current_words()
            .and_then(|words| Image::attach(words).ok());
        let Some(image) = image.filter(|image| image.verify().is_ok()) else {
            return Ok(Vec::new());
        };
        let resolved = image
            .leases()
            .filter(|lease| lease.resolved && !lease.local);
        Ok(resolved.filter_map(|lease| subnet(&lease)).collect())
    }
}

/// The subnet of a lease record.
pub fn subnet(lease: &LeaseRecord) -> Option<IpNet> {
    IpNet::new(address(lease, lease.subnet)?, lease.prefix_len).ok()
}

/// An address in a lease record.
pub fn address(lease: &LeaseRecord, number: u128) -> Option<IpAddr> {
    match lease.family {
        FAMILY_IPV4 => Some(Ipv4Addr::from(u32::try_from(number).ok()?).into()),
        FAMILY_IPV6 => Some(Ipv6Addr::from(number).into()),
        _ => None,
    }
}

fn same(current: &[Word], image: &[u64]) -> bool {
    current.len() == image.len()
        && current
            .iter()
            .zip(image)
            .all(|(current, wanted)| current.load(Ordering::Relaxed) == *wanted)
}

/// What the data plane says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DataPlane {
    /// A process holds the data plane's lock.
    pub alive: bool,
    /// Workers that it announced.
    pub workers: usize,
    /// Every worker's heartbeat is recent.
    pub fresh: bool,
    /// The oldest generation that a worker forwards by; 0 if one has none.
    pub generation: u64,
    /// The NICs that have a worker, by name, each once.
    pub nics: Vec<String>,
}

impl DataPlane {
    /// Looks at the run directory.
    pub fn observe(run_dir: &Path) -> Result<Self, MapError> {
        let alive = lock_owner(run_dir, DATAPLANE_LOCK)?.is_some();
        if !alive {
            return Ok(Self::default());
        }
        let mapping = match open_stats(run_dir) {
            Ok(mapping) => mapping,
            // It has just started.
            Err(MapError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self {
                    alive,
                    ..Self::default()
                });
            }
            Err(error) => return Err(error),
        };
        let path = run_dir.join(map::STATS_FILE);
        let stats =
            Stats::attach(mapping.words()).map_err(|source| MapError::Region { path, source })?;
        let workers = stats.workers();
        // After the heartbeats were read, or one could seem to lie in the future.
        let now_ns = map::monotonic_ns();
        let max_ns = u64::try_from(HEARTBEAT_MAX.as_nanos()).unwrap_or(u64::MAX);
        let mut nics: Vec<String> = workers
            .iter()
            .map(|worker| worker.identity.nic.clone())
            .collect();
        nics.sort_unstable();
        nics.dedup();
        Ok(Self {
            alive,
            nics,
            workers: workers.len(),
            fresh: workers
                .iter()
                .all(|worker| now_ns.saturating_sub(worker.heartbeat_ns) < max_ns),
            generation: workers
                .iter()
                .map(|worker| worker.generation)
                .min()
                .unwrap_or(0),
        })
    }

    /// It runs, and its workers move.
    pub fn is_alive(&self) -> bool {
        self.alive && self.workers > 0 && self.fresh
    }

    /// Traffic may be sent to it.
    pub fn is_forwarding(&self) -> bool {
        self.is_alive() && self.generation > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ripstop_fib::publish::{SLOT_WORDS, SLOTS, region_words};
    use ripstop_fib::stats::{
        Door, Gauge, Mode, Polling, Transmit, WorkerCounters, WorkerIdentity,
    };
    use ripstop_fib::{Backend, Dscp, ImageBuilder, Local, NICS, NicRecord, Node, Route};

    fn image(vni: u32) -> Vec<u64> {
        let node = Node {
            backend: Backend::Vxlan,
            v4: Some(Local {
                address: Ipv4Addr::new(10, 199, 0, 1),
                subnet: (Ipv4Addr::new(10, 244, 1, 0), 24),
                network: (Ipv4Addr::new(10, 244, 0, 0), 16),
                pod_mtu: 1450,
                vtep_mac: [2, 0, 0, 0, 0, 1],
            }),
            v6: None,
            udp_port: 8472,
            vni,
            direct: false,
            dscp: Dscp::Fixed(0),
            flow_seed: 0,
            nics: [NicRecord::default(); NICS],
        };
        let mut image = ImageBuilder::new(node);
        image.route4(Ipv4Addr::new(10, 244, 1, 0), 24, Route::Local);
        image.build().unwrap()
    }

    #[test]
    fn a_restart_continues_and_publishes_only_news() {
        let directory = tempfile::tempdir().unwrap();
        let fib = Fib::open(directory.path()).unwrap();
        assert_eq!(fib.generation().unwrap(), 0);
        assert_eq!(fib.publish(&image(1)).unwrap(), Published::New(1));
        assert_eq!(fib.publish(&image(1)).unwrap(), Published::Unchanged(1));
        drop(fib);
        let fib = Fib::open(directory.path()).unwrap();
        assert_eq!(fib.publish(&image(1)).unwrap(), Published::Unchanged(1));
        assert_eq!(fib.publish(&image(2)).unwrap(), Published::New(2));
    }

    #[test]
    fn only_one_control_plane_publishes() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Fib::open(directory.path()).unwrap();
        let error = Fib::open(directory.path()).unwrap_err().to_string();
        assert!(
            error.contains("in use by process") && error.contains("--run-dir"),
            "{error}"
        );
    }

    #[test]
    fn a_foreign_region_is_refused_and_left_alone() {
        let words = region_words(SLOTS, SLOT_WORDS);
        for (what, damage) in [("magic", 0), ("version", 8), ("words", 16)] {
            let directory = tempfile::tempdir().unwrap();
            drop(Fib::open(directory.path()).unwrap());
            let path = directory.path().join(map::FIB_FILE);
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"garbage!", damage).unwrap();
            let error = Fib::open(directory.path()).unwrap_err().to_string();
            assert!(
                error.contains(what) && error.contains("remove the file"),
                "{what}: {error}"
            );
            assert_eq!(
                std::fs::metadata(&path).unwrap().len(),
                words as u64 * 8,
                "{what}"
            );
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(map::FIB_FILE), b"short").unwrap();
        let error = Fib::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("remove the file"), "{error}");
    }

    #[test]
    fn a_damaged_image_is_published_over() {
        let directory = tempfile::tempdir().unwrap();
        let fib = Fib::open(directory.path()).unwrap();
        fib.publish(&image(1)).unwrap();
        let publisher = fib.publisher().unwrap();
        let words = publisher.current_words().unwrap();
        words[words.len() - 1].fetch_xor(1, Ordering::Relaxed);
        assert_eq!(fib.resolved_subnets().unwrap(), []);
        assert_eq!(fib.publish(&image(1)).unwrap(), Published::New(2));
    }

    fn heartbeat(stats: &Stats<'_>, worker: usize, generation: u64, now_ns: u64) {
        stats.write_worker(
            worker,
            &WorkerCounters::default(),
            &[0; Gauge::COUNT],
            generation,
            now_ns,
        );
    }

    #[test]
    fn the_data_plane_counts_only_alive_and_fresh() {
        let directory = tempfile::tempdir().unwrap();
        let observe = || DataPlane::observe(directory.path()).unwrap();
        assert_eq!(observe(), DataPlane::default());
        let lock = ProcessLock::acquire(directory.path(), DATAPLANE_LOCK).unwrap();
        let mapping = map::create_stats(directory.path(), 1, map::monotonic_ns()).unwrap();
        let stats = Stats::attach(mapping.words()).unwrap();
        assert!(!observe().is_forwarding(), "no workers yet");
        let identity = WorkerIdentity {
            nic: "eth0".to_owned(),
            queue: 0,
            cpu: 0,
            mode: Mode::Copy,
            wants_zero_copy: false,
            polling: Polling::Adaptive,
            door: Door::Tun,
            transmit: [Transmit::AfXdp; 2],
            frames: 64,
            frame_size: 2048,
            huge_pages: false,
            numa_node: None,
        };
        stats.write_identity(0, &identity);
        stats.write_identity(1, &identity);
        stats.announce(2, 0);
        assert!(!observe().is_forwarding(), "no heartbeat yet");
        let now = map::monotonic_ns();
        heartbeat(&stats, 0, 7, now);
        heartbeat(&stats, 1, 6, now);
        let seen = observe();
        assert!(
            seen.is_forwarding()
                && seen.generation == 6
                && seen.workers == 2
                && seen.nics == ["eth0"],
            "{seen:?}"
        );
        heartbeat(&stats, 1, 7, now - 1_500_000_000);
        assert!(!observe().is_forwarding(), "one heartbeat is old");
        heartbeat(&stats, 1, 7, map::monotonic_ns());
        assert!(observe().is_forwarding());
        drop(lock);
        assert_eq!(observe(), DataPlane::default(), "whatever a dead one left");
    }
}
