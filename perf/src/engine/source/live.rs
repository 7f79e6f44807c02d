//! XDP live frames: a program writes each packet on a page of the kernel's own, and redirects it to the interface
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18, `net/bpf/test_run.c`). No skb is made.
//!
//! The kernel is asked for many frames at a time. Each such call would take some 20 ms if the program were attached
//! nowhere, because the kernel then makes and unmakes its trampoline. So it is attached to one end of a veth pair, in a
//! namespace without a name that goes with this value, or with the process.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::thread;
use std::time::Instant;

use super::super::Place;
use super::super::bpf::{self, Attached, Config, Program, Sizes};
use super::super::kernel::{self, AttachPoint, Properties, Words};
use super::super::packet::Shape;
use super::Engine;
use crate::measure::Stream;
use crate::netns::Netns;
use af_xdp::Interface;
use anyhow::{Context, Result, anyhow, bail, ensure};

/// Frames of one call.
const BURST: u32 = 4096;
/// How long frames may take to appear in the interface's counters.
const PATIENCE: Duration = Duration::from_millis(250);
/// Frames that try whether any get through.
const PROBES: u32 = 8;

pub(super) struct Generator {
    /// Ahead of the program, so that a drop detaches first.
    _attached: Attached,
    /// The namespace of the pair.
    _home: File,
    program: OwnedFd,
    flows: Words,
    state: Words,
    shape: Shape,
    /// What each frame is before the program has written it.
    blank: Vec<u8>,
}

impl Generator {
    pub(super) fn load(
        place: &Place<'_>,
        stream: &Stream,
        shape: Shape,
        properties: &Properties,
    ) -> Result<Self> {
        let index = place
            .netns
            .run(|| Interface::by_name(&place.interface))??
            .index();
        let config =
            Config::of_generator(stream.tunnel.as_ref(), &shape, properties.ethernet, index);
        let sizes = Sizes {
            flows: shape.flows.len(),
            ..Sizes::default()
        };
        let program = Program::load("generate", &config, sizes)?;
        let forms = program.map("forms")?;
        for (number, form) in (0..).zip(&shape.forms) {
            bpf::set(&forms, number, &bpf::form_bytes(form)?)?;
        }
        bpf::set(&program.map("table")?, 0, bpf::table_bytes(&shape))?;
        let (home, attached) = attach_at_home(&program)?;
        let mut generator = Self {
            _attached: attached,
            _home: home,
            flows: program.words("flows")?,
            state: program.words("state")?,
            program: program.program()?.as_fd().try_clone_to_owned()?,
            blank: vec![0; shape.frame_bytes_max()],
            shape,
        };
        place.netns.run(|| generator.probe(&place.interface))??;
        Ok(generator)
    }

    /// Runs the program on so many frames. The calling thread is in the interface's namespace.
    fn run(&self, frames: u32) -> Result<()> {
        match kernel::run_live(self.program.as_fd(), &self.blank, frames) {
            // A signal came: the program's state says how far the kernel was.
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                Err(error).context("BPF_PROG_RUN with live frames (Linux 5.18 or later)")
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Sends a few frames, and sees whether the interface counts them: one that cannot take XDP frames, or a veth whose
    /// peer does not poll, throws all of them away.
    fn probe(&mut self, interface: &str) -> Result<()> {
        let before = sent_by(interface)?;
        self.begin()?;
        self.run(PROBES)?;
        let begin = Instant::now();
        while sent_by(interface)? < before + u64::from(PROBES) {
            ensure!(
                begin.elapsed() < PATIENCE,
                "{interface} takes no live frames. The peer of a veth must poll: an XDP program on it, or `ethtool -K PEER gro on` once it is up"
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Packets that an interface of the calling thread's namespace has sent.
fn sent_by(interface: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").context("/proc/net/dev")?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, counters) = lines
        .find(|(name, _)| name.trim() == interface)
        .with_context(|| format!("no counters of {interface}"))?;
    // Eight of receiving, then bytes and packets of sending.
    let packets = counters
        .split_whitespace()
        .nth(9)
        .context("too few counters")?;
    Ok(packets.parse()?)
}

/// Attaches the program to a veth pair in a namespace of its own.
fn attach_at_home(program: &Program) -> Result<(File, Attached)> {
    thread::scope(|scope| {
        let made = scope.spawn(|| {
            kernel::unshare_network().context("make a network namespace")?;
            // A child is born in the namespace of the thread that starts it.
            let output = Command::new("ip")
                .args([
                    "link", "add", "live0", "type", "veth", "peer", "name", "live1",
                ])
                .output()
                .context("start ip (package iproute2)")?;
            if !output.status.success() {
                bail!(
                    "make a veth pair: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            let interface = Interface::by_name("live0")?;
            let here = Netns::of_this_thread();
            let attached =
                program.attach(&here, "live0", interface.index(), AttachPoint::Driver)?;
            let home =
                File::open("/proc/thread-self/ns/net").context("hold a network namespace")?;
            Ok((home, attached))
        });
        made.join()
            .unwrap_or_else(|_panic| Err(anyhow!("a thread panicked")))
    })
}

impl Engine for Generator {
    const BURST: u64 = BURST as u64;

    fn begin(&mut self) -> Result<()> {
        for (word, value) in self.flows.iter().zip(bpf::flow_words(&self.shape)) {
            word.store(value, Ordering::Relaxed);
        }
        self.state
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(())
    }

    fn send(&mut self, packets: u64, _now_ns: u64) -> Result<u64> {
        let frames = u32::try_from(packets).unwrap_or(BURST).min(BURST);
        let before = self
            .state
            .get(1)
            .map_or(0, |word| word.load(Ordering::Relaxed));
        self.run(frames)?;
        let after = self
            .state
            .get(1)
            .map_or(0, |word| word.load(Ordering::Relaxed));
        Ok(after - before)
    }

    fn end(&mut self) -> Result<u64> {
        Ok(0)
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn describe(&self) -> String {
        "XDP live frames".to_owned()
    }
}
