//! Beds that are arithmetic: the truth about them is known, so that searches and statistics can be held against it.

use core::time::Duration;
use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::stats::whole;
use crate::measure::{Bed, CpuTimes, Limit, Offer, Rate, Size, Trial, WorkerCost, histogram};

/// Repeatable random numbers (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A path with a capacity.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// Packets a second that it takes without loss.
    pub(crate) capacity: f64,
    /// Of each trial's capacity, up to so much is missing or on top.
    pub(crate) noise: f64,
    /// Probability that a trial loses a packet, however low the rate.
    pub(crate) hiccup: f64,
    /// Share of packets that are lost at any rate.
    pub(crate) loss: f64,
    /// What the source can send at most.
    pub(crate) source: f64,
    /// Box-wide seconds for a million packets.
    pub(crate) cpu: f64,
    /// Whether packets take 1 to 100 microseconds, instead of nobody knows how long.
    pub(crate) timed: bool,
    /// What every trial says.
    pub(crate) limits: Vec<Limit>,
    /// From this trial on, trials fail.
    pub(crate) breaks_at: Option<u32>,
    pub(crate) random: Random,
    pub(crate) trials: u32,
}

impl Model {
    pub(crate) fn new(capacity: f64, seed: u64) -> Self {
        Self {
            capacity,
            noise: 0.0,
            hiccup: 0.0,
            loss: 0.0,
            source: 1e12,
            cpu: 1.0,
            timed: false,
            limits: Vec::new(),
            breaks_at: None,
            random: Random::new(seed),
            trials: 0,
        }
    }
}

impl Bed for Model {
    fn description(&self) -> String {
        format!("model of {:.0} packets/s", self.capacity)
    }

    fn trial(&mut self, offer: &Offer) -> Result<Trial> {
        self.trials += 1;
        if self.breaks_at.is_some_and(|at| self.trials >= at) {
            bail!("the model broke");
        }
        let off = self.random.between(-self.noise, self.noise);
        let capacity = self.capacity * (1.0 + off);
        let offered = match offer.rate {
            Rate::Pps(rate) => rate as f64,
            Rate::Max => self.source.min(10.0 * capacity),
            Rate::Window(_) => capacity,
        };
        let sent_rate = offered.min(self.source);
        let taken_rate = sent_rate.min(capacity) * (1.0 - self.loss);
        let seconds = offer.duration.as_secs_f64();
        let sent = whole(sent_rate * seconds);
        let mut received = whole(taken_rate * seconds).min(sent);
        if self.random.between(0.0, 1.0) < self.hiccup {
            received = received.saturating_sub(1);
        }
        let mut limits = self.limits.clone();
        if sent_rate < offered {
            limits.push(Limit::Source(format!("no more than {:.0}", self.source)));
        }
        let bytes = match offer.size {
            Size::Bytes(bytes) => u64::from(bytes),
            Size::Imix => 353,
        };
        let mut latency = None;
        if self.timed {
            let times = latency.insert(histogram::new()?);
            for nanoseconds in 1..=100 {
                times.record(nanoseconds * 1000)?;
            }
        }
        let busy = Duration::from_secs_f64(received as f64 * self.cpu / 1e6);
        Ok(Trial {
            sent,
            received,
            received_bytes: received * bytes,
            lost: sent - received,
            elapsed: offer.duration,
            latency,
            cpus: CpuTimes {
                user: busy / 4,
                system: busy / 4,
                irq: Duration::ZERO,
                softirq: busy / 2,
                steal: Duration::ZERO,
                idle: offer.duration,
            },
            workers: Some(WorkerCost {
                packets: received,
                busy_turns: received / 32,
                busy_cycles: received * 250,
                idle_cycles: received * 50,
            }),
            drops: BTreeMap::from([("model.full".to_owned(), sent - received)]),
            limits,
            ..Trial::default()
        })
    }
}
