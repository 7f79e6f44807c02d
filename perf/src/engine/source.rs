//! What all sources share: choosing one, and a thread that sends.

mod af_xdp;
mod live;
mod pktgen;

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};

use super::kernel::{self, Properties};
use super::pace::{Pace, Turn};
use super::packet::Shape;
use super::{Place, Progress, Source, SourceReport};
use crate::measure::{Rate, SourceKind, Stream};
use crate::netns::Netns;
use crate::sys;

pub(super) fn make(
    place: &Place<'_>,
    stream: &Stream,
    kind: SourceKind,
) -> Result<Box<dyn Source>> {
    let properties = place
        .netns
        .run(|| kernel::properties(&place.interface))?
        .with_context(|| format!("interface {}", place.interface))?;
    ensure!(properties.up, "interface {} is down", place.interface);
    let shape = Shape::of(stream, properties.ethernet)?;
    let af_xdp = |shape| -> Result<Box<dyn Source>> {
        let engine = af_xdp::Generator::open(place, shape)?;
        Ok(Box::new(Threaded::new(place, &properties, engine)))
    };
    let live = |shape| -> Result<Box<dyn Source>> {
        let engine = live::Generator::load(place, stream, shape, &properties)?;
        Ok(Box::new(Threaded::new(place, &properties, engine)))
    };
    match kind {
        SourceKind::AfXdp => af_xdp(shape),
        SourceKind::LiveFrames => live(shape),
        SourceKind::Pktgen => Ok(Box::new(pktgen::Generator::new(
            place,
            stream,
            &properties,
        )?)),
        SourceKind::Auto if properties.driver == "veth" => {
            live(shape.clone()).or_else(|_not_through_this_pair| af_xdp(shape))
        }
        SourceKind::Auto => af_xdp(shape),
    }
}

/// An engine that sends from a thread.
trait Engine: Send + 'static {
    /// Packets of one turn at full speed; a turn of a rate is at most as long.
    const BURST: u64;

    /// Begins anew: each flow from sequence number 0 on.
    fn begin(&mut self) -> Result<()>;

    /// Sends so many packets at this time, or fewer, and says how many.
    fn send(&mut self, packets: u64, now_ns: u64) -> Result<u64>;

    /// Sees to it that all is handed over; returns how many of what `send` took were not.
    fn end(&mut self) -> Result<u64>;

    fn shape(&self) -> &Shape;

    fn describe(&self) -> String;
}

/// A source that sends from a thread.
struct Threaded<E: Engine> {
    netns: Netns,
    cpu: Option<usize>,
    description: String,
    stop: Arc<AtomicBool>,
    state: State<E>,
}

enum State<E> {
    Idle(E),
    Sending(JoinHandle<(E, Result<SourceReport>)>),
    /// The engine went down with its thread.
    Lost,
}

impl<E: Engine> Threaded<E> {
    fn new(place: &Place<'_>, properties: &Properties, engine: E) -> Self {
        Self {
            netns: place.netns.clone(),
            cpu: place.cpu,
            description: format!(
                "{} on {} ({})",
                engine.describe(),
                place.interface,
                properties.driver
            ),
            stop: Arc::default(),
            state: State::Idle(engine),
        }
    }
}

impl<E: Engine> Source for Threaded<E> {
    fn start(
        &mut self,
        rate: Rate,
        duration: Duration,
        feedback: Option<Arc<Progress>>,
    ) -> Result<()> {
        if let Rate::Window(_) = rate {
            ensure!(feedback.is_some(), "a window needs the sink's progress");
        }
        let mut engine = match core::mem::replace(&mut self.state, State::Lost) {
            State::Idle(engine) => engine,
            state @ (State::Sending(_) | State::Lost) => {
                self.state = state;
                bail!("the source is sending already, or broken");
            }
        };
        self.stop.store(false, Ordering::Relaxed);
        let (netns, cpu, stop) = (self.netns.clone(), self.cpu, Arc::clone(&self.stop));
        self.state = State::Sending(thread::spawn(move || {
            let outcome = netns
                .run(|| send(&mut engine, cpu, &stop, rate, duration, feedback))
                .and_then(core::convert::identity);
            (engine, outcome)
        }));
        Ok(())
    }

    fn is_sending(&self) -> bool {
        matches!(&self.state, State::Sending(thread) if !thread.is_finished())
    }

    fn finish(&mut self) -> Result<SourceReport> {
        match core::mem::replace(&mut self.state, State::Lost) {
            State::Sending(thread) => {
                let Ok((engine, outcome)) = thread.join() else {
                    bail!("the source's thread panicked");
                };
                self.state = State::Idle(engine);
                outcome
            }
            state @ (State::Idle(_) | State::Lost) => {
                self.state = state;
                bail!("the source was not started, or is broken")
            }
        }
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl<E: Engine> Drop for Threaded<E> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let State::Sending(thread) = core::mem::replace(&mut self.state, State::Lost) {
            // A panic has been printed, and an error has nobody to go to.
            drop(thread.join());
        }
    }
}

/// The thread: sends what is due until the time is over.
fn send<E: Engine>(
    engine: &mut E,
    cpu: Option<usize>,
    stop: &AtomicBool,
    rate: Rate,
    duration: Duration,
    feedback: Option<Arc<Progress>>,
) -> Result<SourceReport> {
    if let Some(cpu) = cpu {
        sys::pin(0, cpu).with_context(|| format!("keep the source to CPU {cpu}"))?;
    }
    kernel::sleep_exactly();
    engine.begin()?;
    let cpu_before = kernel::thread_cpu();
    let mut pace = Pace::new(rate, duration, E::BURST, feedback)?;
    let mut sent = 0;
    let mut first_ns = None;
    while !stop.load(Ordering::Relaxed) {
        let now = kernel::monotonic_ns();
        match pace.turn(now) {
            Turn::Send(due) => {
                first_ns.get_or_insert(now);
                let packets = engine.send(due, now)?;
                pace.sent(packets);
                sent += packets;
            }
            Turn::Wait => pace.wait(now),
            Turn::End => break,
        }
    }
    sent -= engine.end()?;
    let end = kernel::monotonic_ns();
    let first_ns = first_ns.unwrap_or(pace.begin_ns());
    let (sent_by_flow, bytes) = split(engine.shape(), sent);
    Ok(SourceReport {
        sent,
        sent_by_flow,
        bytes,
        first_ns,
        elapsed: Duration::from_nanos(end - first_ns),
        cpu: kernel::thread_cpu() - cpu_before,
        limits: pace.limits(end),
    })
}

/// How many of the first packets of a stream are each flow's, and their inner bytes: flows and sizes come in turn.
fn split(shape: &Shape, sent: u64) -> (Vec<u64>, u64) {
    let share = |count: usize, number: usize| {
        let (count, number) = (
            u64::try_from(count).unwrap_or(1),
            u64::try_from(number).unwrap_or(0),
        );
        sent / count + u64::from(number < sent % count)
    };
    let flows = shape.flows.len();
    let by_flow = (0..flows).map(|flow| share(flows, flow)).collect();
    let bytes = shape.order.iter().enumerate().map(|(place, form)| {
        let inner = shape.forms[usize::from(*form)].inner;
        share(shape.order.len(), place) * u64::try_from(inner).unwrap_or(0)
    });
    (by_flow, bytes.sum())
}
