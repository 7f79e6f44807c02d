//! The AF_XDP generator: writes each packet into a frame of a UMEM, and has the kernel or the device send it.

use core::time::Duration;
use std::time::Instant;

use af_xdp::{
    Frame, Interface, Socket, SocketHandle, SocketOptions, Transmitter, Umem, UmemOptions,
};
use anyhow::Result;

use super::super::Place;
use super::super::packet::Shape;
use super::Engine;

const RING: u32 = 2048;
const BURST: usize = 64;
/// How long the interface may take for what is in the ring at the end.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Generator {
    umem: Umem,
    transmitter: Transmitter,
    handle: SocketHandle,
    burst: Vec<Frame>,
    shape: Shape,
    flow: usize,
    place: usize,
    sequences: Vec<u32>,
}

impl Generator {
    pub(super) fn open(place: &Place<'_>, shape: Shape) -> Result<Self> {
        let mut umem = Umem::new(&UmemOptions {
            frames: 2 * RING,
            frame_size: if shape.frame_bytes_max() > 1900 {
                4096
            } else {
                2048
            },
            ..UmemOptions::default()
        })?;
        let options = SocketOptions {
            fill_entries: 16,
            rx_entries: 16,
            tx_entries: RING,
            completion_entries: 2 * RING,
            // A burst in one call, where the kernel lets us say so.
            tx_budget: Some(u32::try_from(BURST)?),
            ..SocketOptions::default()
        };
        let socket = place.netns.run(|| {
            let interface = Interface::by_name(&place.interface)?;
            Socket::open(&mut umem, &interface, 0, &options)
        })??;
        Ok(Self {
            umem,
            transmitter: socket.transmitter,
            handle: socket.handle,
            burst: Vec::with_capacity(BURST),
            sequences: vec![0; shape.flows.len()],
            shape,
            flow: 0,
            place: 0,
        })
    }

    /// Writes the next packet of the stream into a frame.
    #[inline]
    fn write(&mut self, frame: &mut Frame, now_ns: u64) -> Result<()> {
        let form = usize::from(self.shape.order[self.place]);
        let length = self.shape.frame_bytes(form);
        frame.reset(0)?;
        frame.set_len(length)?;
        let sequence = &mut self.sequences[self.flow];
        let bytes = self.umem.packet_mut(frame);
        self.shape.write(form, self.flow, *sequence, now_ns, bytes);
        *sequence = sequence.wrapping_add(1);
        self.flow += 1;
        if self.flow == self.shape.flows.len() {
            self.flow = 0;
        }
        self.place += 1;
        if self.place == self.shape.order.len() {
            self.place = 0;
        }
        Ok(())
    }
}

impl Engine for Generator {
    const BURST: u64 = BURST as u64;

    fn begin(&mut self) -> Result<()> {
        self.sequences.fill(0);
        (self.flow, self.place) = (0, 0);
        Ok(())
    }

    #[inline]
    fn send(&mut self, packets: u64, now_ns: u64) -> Result<u64> {
        self.transmitter.reclaim(&mut self.umem, 4 * BURST);
        // Never more than the ring has room for: what is written has its sequence number, and must go.
        let room = usize::try_from(RING)?.saturating_sub(self.transmitter.in_tx());
        let packets = usize::try_from(packets)?.min(BURST).min(room);
        for _ in 0..packets {
            let Some(mut frame) = self.umem.take() else {
                break;
            };
            self.write(&mut frame, now_ns)?;
            self.burst.push(frame);
        }
        let sent = self.transmitter.send(&mut self.umem, &mut self.burst);
        self.transmitter.kick()?;
        Ok(u64::try_from(sent)?)
    }

    fn end(&mut self) -> Result<u64> {
        let begin = Instant::now();
        while self.transmitter.kick()? > 0 && begin.elapsed() < PATIENCE {
            self.transmitter.reclaim(&mut self.umem, 4 * BURST);
        }
        self.transmitter
            .reclaim(&mut self.umem, 2 * usize::try_from(RING)?);
        Ok(u64::try_from(self.transmitter.in_tx())?)
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn describe(&self) -> String {
        format!("AF_XDP generator ({} mode)", self.handle.mode())
    }
}
