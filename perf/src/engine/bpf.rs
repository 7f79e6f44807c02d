//! Loads and attaches the programs of `bpf/engine.bpf.c`; the layouts that both sides share are in `bpf/engine.h`.
//!
//! Nothing is pinned. Programs are attached by links, which go with the process; on kernels before 6.6, which have no
//! link for [`Hook::Ingress`](super::Hook), by a filter that is taken off on drop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::{MapCore, MapHandle, Object, ObjectBuilder, PrintLevel, TC_INGRESS, TcHookBuilder};

use super::kernel::{self, AttachPoint, Words};
use super::packet::{Form, Places, STRETCHES, Shape, TABLE_BYTES};
use crate::address::Family;
use crate::measure::Tunnel;
use crate::netns::Netns;

/// The compiled programs. Aligned, because libelf reads its tables in place.
#[repr(C, align(8))]
struct Aligned<Bytes: ?Sized>(Bytes);
static OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/engine.bpf.o")));

/// Sockets that the program has room for (`ENGINE_QUEUES_MAX`).
pub(super) const QUEUES_MAX: u32 = 64;
const HEADERS_MAX: usize = 192;
/// Size of `struct engine_config`.
const CONFIG_BYTES: usize = 72;
/// Size of `struct engine_form`.
const FORM_BYTES: usize = HEADERS_MAX + 8 + 2 * STRETCHES;
/// Size of `struct engine_flow` in words.
const FLOW_WORDS: usize = 4;
/// Size of `struct engine_slot` in words.
pub(super) const SLOT_WORDS: usize = 8;
/// Size of `struct engine_note` without what follows its last field.
pub(super) const NOTE_BYTES: usize = 12;

/// `struct engine_config`.
#[derive(Debug)]
pub(super) struct Config {
    bytes: Vec<u8>,
}

impl Config {
    /// What a sink has to know.
    pub(super) fn of_sink(tunnel: Option<&Tunnel>, family: Family, link: bool) -> Self {
        Self::of(tunnel, family, link, &Places::of(tunnel, family, link))
    }

    fn of(tunnel: Option<&Tunnel>, family: Family, link: bool, places: &Places) -> Self {
        let (kind, port, vni) = match tunnel {
            None => (0, 0, 0),
            Some(Tunnel::Vxlan { vni, port, .. }) => (1, *port, *vni),
            Some(Tunnel::Udp { port, .. }) => (2, *port, 0),
            Some(Tunnel::Ipip { .. }) => (3, 0, 0),
        };
        let words = [
            kind,
            if link { 14 } else { 0 },
            word(places.inner),
            u32::from(family == Family::Ipv6),
            port.to_be().into(),
            (vni << 8).to_be(),
        ];
        Self {
            bytes: words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
        }
    }

    /// What a generator has to know.
    pub(super) fn of_generator(
        tunnel: Option<&Tunnel>,
        shape: &Shape,
        link: bool,
        interface: u32,
    ) -> Self {
        let places = &shape.places;
        let mut config = Self::of(tunnel, shape.family, link, places);
        let words = [
            interface,
            word(shape.flows.len()),
            word(shape.order.len()),
            word(places.outer_port.unwrap_or(0)),
            word(places.to),
            word(places.port),
            word(places.checksum),
            word(places.payload),
            word(shape.frame_bytes_max()),
        ];
        let words = words.iter().flat_map(|word| word.to_ne_bytes());
        config
            .bytes
            .extend(words.chain(shape.order.iter().copied()));
        config
    }
}

fn word(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// How large the maps are that are not the same for all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Flows of a generator.
    pub(super) flows: usize,
    /// Bytes of the ring to user space, a power of two.
    pub(super) ring: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: 1,
            ring: 4096,
        }
    }
}

/// One of the programs, loaded.
#[derive(Debug)]
pub(super) struct Program {
    object: Object,
    name: &'static str,
}

impl Program {
    pub(super) fn load(name: &'static str, config: &Config, sizes: Sizes) -> Result<Self> {
        libbpf_rs::set_print(Some((PrintLevel::Warn, |_level, message| {
            // The verifier's words, which tell a developer why a program is refused.
            drop(io::Write::write_all(&mut io::stderr(), message.as_bytes()));
        })));
        let mut open = ObjectBuilder::default()
            .name("engine")?
            .open_memory(&OBJECT.0)
            .context("open the BPF object")?;
        for mut program in open.progs_mut() {
            let wanted = program.name() == name;
            program.set_autoload(wanted);
        }
        let cpus = libbpf_rs::num_possible_cpus().context("number of CPUs")?;
        for mut map in open.maps_mut() {
            let map_name = map.name().to_string_lossy().into_owned();
            match &*map_name {
                "slots" => map.set_max_entries(word(cpus))?,
                "flows" => map.set_max_entries(word(sizes.flows))?,
                "ring" => map.set_max_entries(sizes.ring)?,
                _ if map_name.ends_with(".rodata") => {
                    let value = map.initial_value_mut().context("no configuration")?;
                    ensure!(
                        value.len() >= CONFIG_BYTES && config.bytes.len() <= CONFIG_BYTES,
                        "the object's configuration has {} bytes",
                        value.len()
                    );
                    value[..config.bytes.len()].copy_from_slice(&config.bytes);
                }
                _ => {}
            }
        }
        let object = open.load().with_context(|| {
            format!("load the BPF program {name} (Linux 6.1 or later, as root)")
        })?;
        Ok(Self { object, name })
    }

    pub(super) fn program(&self) -> Result<libbpf_rs::Program<'_>> {
        let mut programs = self.object.progs();
        programs
            .find(|program| program.name() == self.name)
            .with_context(|| format!("no BPF program {}", self.name))
    }

    pub(super) fn map(&self, name: &str) -> Result<MapHandle> {
        let mut maps = self.object.maps();
        let map = maps
            .find(|map| map.name() == name)
            .with_context(|| format!("no BPF map {name}"))?;
        MapHandle::try_from(&map).with_context(|| format!("hold the BPF map {name}"))
    }

    /// The words of a map that can be mapped.
    pub(super) fn words(&self, name: &str) -> Result<Words> {
        let map = self.map(name)?;
        let entry = map.value_size().div_ceil(8);
        let count = usize::try_from(entry)? * usize::try_from(map.max_entries())?;
        Words::map(map.as_fd(), count).with_context(|| format!("map the BPF map {name}"))
    }

    /// Attaches the program to an interface of a namespace, which the calling thread is in.
    pub(super) fn attach(
        &self,
        netns: &Netns,
        name: &str,
        interface: u32,
        point: AttachPoint,
    ) -> Result<Attached> {
        let program = self.program()?;
        let error = match kernel::link(program.as_fd(), interface, point) {
            Ok(link) => return Ok(Attached::Link(link)),
            Err(error) => error,
        };
        match point {
            AttachPoint::Driver => Err(anyhow!(error)).with_context(|| {
                format!(
                    "attach XDP to {name} in its driver (another program may be there: ip link)"
                )
            }),
            // Kernels before 6.6 do not know this kind of link.
            AttachPoint::Ingress if error.raw_os_error() == Some(libc::EINVAL) => {
                let program = program.as_fd().try_clone_to_owned()?;
                Filter::attach(program, netns, interface)
                    .with_context(|| format!("filter at the ingress of {name}"))
                    .map(Attached::Filter)
            }
            AttachPoint::Ingress => {
                Err(anyhow!(error)).with_context(|| format!("attach to the ingress of {name}"))
            }
        }
    }
}

/// A program on an interface, until this is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held open")]
pub(super) enum Attached {
    Link(OwnedFd),
    Filter(Filter),
}

/// A filter, for kernels before 6.6, which do not know links for this. A thread inside the namespace holds it.
#[derive(Debug)]
pub(super) struct Filter {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Filter {
    fn attach(program: OwnedFd, netns: &Netns, interface: u32) -> Result<Self> {
        let (end, ended) = mpsc::channel::<()>();
        let (ready, answer) = mpsc::channel();
        let (netns, interface) = (netns.clone(), i32::try_from(interface)?);
        let thread = thread::spawn(move || {
            let failed = ready.clone();
            let attached = netns.run(move || {
                let mut hook = TcHookBuilder::new(program.as_fd())
                    .ifindex(interface)
                    .replace(true)
                    .handle(1)
                    .priority(1)
                    .hook(TC_INGRESS);
                let attached = hook.create().and_then(|mut hook| hook.attach());
                let Ok(mut hook) = attached.map_err(|error| ready.send(Err(anyhow!(error)))) else {
                    return;
                };
                drop(ready.send(Ok(())));
                // Nobody sends: this returns when the other end is dropped.
                let _dropped = ended.recv();
                // An interface that has gone took the filter with it.
                drop(hook.detach());
            });
            if let Err(error) = attached {
                drop(failed.send(Err(error)));
            }
        });
        let filter = Self {
            end: Some(end),
            thread: Some(thread),
        };
        answer.recv()??;
        Ok(filter)
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It has no way to panic that would not have been printed.
            drop(thread.join());
        }
    }
}

/// The bytes of `struct engine_form`.
pub(super) fn form_bytes(form: &Form) -> Result<Vec<u8>> {
    ensure!(
        form.headers.len() + super::packet::PAYLOAD_MIN <= HEADERS_MAX,
        "headers of {} bytes",
        form.headers.len()
    );
    let mut bytes = form.headers.clone();
    bytes.resize(HEADERS_MAX, 0);
    bytes.extend(u32::from(form.sum).to_ne_bytes());
    bytes.extend(word(form.payload).to_ne_bytes());
    bytes.extend(form.pattern_sums.iter().flat_map(|sum| sum.to_ne_bytes()));
    ensure!(bytes.len() == FORM_BYTES, "a form of {} bytes", bytes.len());
    Ok(bytes)
}

/// The words of all flows, each from sequence number 0 on.
pub(super) fn flow_words(shape: &Shape) -> impl Iterator<Item = u64> {
    shape.flows.iter().flat_map(|flow| {
        let mut bytes = [0; FLOW_WORDS * 8];
        bytes[..16].copy_from_slice(&flow.to);
        bytes[16..18].copy_from_slice(&flow.port.to_be_bytes());
        bytes[18..20].copy_from_slice(&flow.outer_port.to_be_bytes());
        bytes[20..24].copy_from_slice(&u32::from(flow.sum).to_ne_bytes());
        let mut words = [0; FLOW_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            *word = u64::from_ne_bytes(eight);
        }
        words
    })
}

/// The table as a map's value.
pub(super) fn table_bytes(shape: &Shape) -> &[u8; TABLE_BYTES] {
    &shape.table
}

/// A map's entry by number.
pub(super) fn set(map: &MapHandle, entry: u32, value: &[u8]) -> Result<()> {
    map.update(&entry.to_ne_bytes(), value, libbpf_rs::MapFlags::ANY)
        .with_context(|| format!("entry {entry} of a BPF map"))
}

/// Puts a socket into a map of sockets.
pub(super) fn set_socket(map: &MapHandle, queue: u32, socket: BorrowedFd<'_>) -> Result<()> {
    use std::os::fd::AsRawFd;
    set(map, queue, &socket.as_raw_fd().to_ne_bytes())
}
