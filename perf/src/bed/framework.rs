//! DPDK's testpmd between ports that make and swallow frames by themselves: what its framework costs where no packet
//! comes from anywhere.

use std::thread;

use anyhow::{Result, ensure};

use super::Setup;
use super::meter::CpuWindow;
use super::testpmd::{Forward, Options, Ports, Testpmd};
use crate::measure::{Bed, Offer, Rate, Size, Trial, Work};

struct Framework {
    main_cpu: usize,
    forward_cpu: usize,
}

pub(super) fn open(setup: &Setup) -> Result<Box<dyn Bed>> {
    // Asked for here, so that a missing program is not a failed trial.
    super::testpmd::program()?;
    let workers = setup.placement.gateway_workers();
    Ok(Box::new(Framework {
        main_cpu: setup.placement.source_cpu(),
        forward_cpu: workers.first().copied().unwrap_or_default(),
    }))
}

impl Bed for Framework {
    fn description(&self) -> String {
        "DPDK's testpmd on null ports, which make and swallow frames".to_owned()
    }

    fn trial(&mut self, offer: &Offer) -> Result<Trial> {
        ensure!(
            offer.work == Work::Packets && offer.rate == Rate::Max,
            "null ports always have packets: only \"packets\" at the rate \"max\""
        );
        let size = match offer.size {
            Size::Bytes(bytes) => bytes,
            Size::Imix => 64,
        };
        let ports = Ports::Null { size, copy: false };
        let options = Options::new(ports, Forward::Io, self.main_cpu, self.forward_cpu);
        let mut testpmd = Testpmd::start(&options)?;
        let mut trial = Trial::default();
        let window = CpuWindow::open()?;
        let before = testpmd.counts()?;
        thread::sleep(offer.duration);
        let after = testpmd.counts()?;
        window.close(&mut trial)?;
        for (now, then) in after.ports.iter().zip(&before.ports) {
            trial.sent += now.rx_packets - then.rx_packets;
            trial.received += now.tx_packets - then.tx_packets;
        }
        trial.lost = trial.sent.saturating_sub(trial.received);
        trial.received_bytes = trial.received * u64::from(size);
        trial.elapsed = after.at.duration_since(before.at);
        Ok(trial)
    }
}
