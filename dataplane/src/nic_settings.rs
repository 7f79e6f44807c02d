//! What the data plane changes on a NIC and on its interrupts, and how it is put back.
//!
//! ```text
//!   read what is ──► write it to <run-dir>/nic-settings.json ──► change it ──► … ──► put it back, remove the file
//!                                        │
//!                                 killed here: the next start finds the file and puts back first
//! ```
//!
//! The record is on disk before the change is made, so that whatever happens in between, what was can be found. What
//! somebody else has changed since is theirs and stays: a value is put back only if it still is the one that was set
//! here, on the same interface.

#![expect(
    unsafe_code,
    reason = "a sysfs of the thread's own namespace takes system calls that libc does not wrap"
)]

use core::fmt;
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::nic::{Feature, Nic};

/// Name of the record in the run directory.
pub const FILE: &str = "nic-settings.json";

/// Something that can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    /// Whether the NIC takes VLAN tags off received frames (`ethtool -K … rxvlan`): `on` or `off`.
    RxVlanOffload,
    /// Whether received packets of a flow are merged (`ethtool -K … gro`): `on` or `off`.
    Gro,
    /// How often a NIC's interrupt is put off while it is polled (`napi_defer_hard_irqs`).
    NapiDeferHardIrqs,
    /// How long it is put off, in nanoseconds (`gro_flush_timeout`).
    GroFlushTimeout,
    /// CPUs that an interrupt of this number may go to, as a list such as `0-3,8`.
    IrqAffinity(u32),
}

impl Setting {
    fn feature(self) -> Option<Feature> {
        match self {
            Self::RxVlanOffload => Some(Feature::RxVlanOffload),
            Self::Gro => Some(Feature::Gro),
            Self::NapiDeferHardIrqs | Self::GroFlushTimeout | Self::IrqAffinity(_) => None,
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RxVlanOffload => f.write_str("rx-vlan-offload"),
            Self::Gro => f.write_str("gro"),
            Self::NapiDeferHardIrqs => f.write_str("napi_defer_hard_irqs"),
            Self::GroFlushTimeout => f.write_str("gro_flush_timeout"),
            Self::IrqAffinity(irq) => write!(f, "affinity of interrupt {irq}"),
        }
    }
}

/// One change, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Change {
    nic: String,
    ifindex: u32,
    setting: Setting,
    before: String,
    ours: String,
}

/// Why a NIC is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// The record cannot be written, so that nothing was changed.
    #[error("{}: {source}; NIC settings are left alone, because what they were could not be recorded", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not have the setting, or refuses the value.
    #[error("{nic}: {setting}: {source}")]
    Refused {
        /// NIC.
        nic: String,
        /// What was asked or changed.
        setting: Setting,
        /// Why.
        source: io::Error,
    },
    /// The kernel took the value and has another one all the same.
    #[error(
        "{nic}: {setting} stays {found}, where {wanted} is wanted: the driver does not change it"
    )]
    Stays {
        /// NIC.
        nic: String,
        /// What was changed.
        setting: Setting,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: String,
    },
}

/// The changes of one run of the data plane. What is still changed when this is dropped is put back.
#[derive(Debug)]
pub struct NicSettings {
    machine: Machine,
    path: PathBuf,
    changes: Vec<Change>,
}

impl NicSettings {
    /// Puts back what a data plane that was killed has left, then has nothing changed.
    ///
    /// To be called by the only data plane on this run directory.
    pub fn open(run_dir: &Path) -> Self {
        Self::on(Machine::this(), run_dir)
    }

    fn on(machine: Machine, run_dir: &Path) -> Self {
        let path = run_dir.join(FILE);
        let changes = match fs::read(&path).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(changes)) => changes,
            Ok(Err(error)) => {
                tracing::error!(%error, "{}: not understood; what an earlier data plane changed on the NICs stays changed: compare them with a NIC of another node, then remove the file", path.display());
                Vec::new()
            }
            // None is the rule.
            Err(_absent) => Vec::new(),
        };
        let mut left = Self {
            machine,
            path,
            changes,
        };
        if !left.changes.is_empty() {
            tracing::info!("putting back what a data plane that was killed has changed");
            left.restore();
        }
        left
    }

    /// Changes a setting of a NIC to `value`, unless it is so already.
    pub fn set(&mut self, nic: &Nic, setting: Setting, value: &str) -> Result<(), SettingError> {
        let refused = |source| SettingError::Refused {
            nic: nic.name.clone(),
            setting,
            source,
        };
        let found = self.machine.read(nic, setting).map_err(refused)?;
        if found == value {
            return Ok(());
        }
        let same = |change: &&mut Change| (change.ifindex, change.setting) == (nic.index, setting);
        // A second change of the same setting keeps what was before the first.
        match self.changes.iter_mut().find(same) {
            Some(change) => value.clone_into(&mut change.ours),
            None => self.changes.push(Change {
                nic: nic.name.clone(),
                ifindex: nic.index,
                setting,
                before: found.clone(),
                ours: value.to_owned(),
            }),
        }
        self.record()?;
        self.machine.write(nic, setting, value).map_err(refused)?;
        let now = self.machine.read(nic, setting).map_err(refused)?;
        if now != value {
            return Err(SettingError::Stays {
                nic: nic.name.clone(),
                setting,
                found: now,
                wanted: value.to_owned(),
            });
        }
        tracing::info!(nic = nic.name, %setting, before = found, now, "NIC setting changed until the data plane stops");
        Ok(())
    }

    /// Puts back one setting of a NIC, if it was changed.
    pub fn put_back(&mut self, nic: &Nic, setting: Setting) {
        self.put_back_if(|change| (change.ifindex, change.setting) == (nic.index, setting));
    }

    /// Puts back everything.
    pub fn restore(&mut self) {
        self.put_back_if(|_change| true);
    }

    /// The interrupt of a receive queue, if it can be told which that is.
    pub fn queue_interrupt(&self, nic: &Nic, queue: u32) -> Option<u32> {
        self.machine.queue_interrupt(nic, queue)
    }

    /// All CPUs but these, as a list.
    pub fn cpus_except(&self, cpus: &BTreeSet<u32>) -> Option<String> {
        self.machine.cpus_except(cpus)
    }

    /// The last change is the first to be put back. What the kernel refuses to take back stays on record.
    fn put_back_if(&mut self, wanted: impl Fn(&Change) -> bool) {
        let (mut back, mut kept): (Vec<_>, Vec<_>) = core::mem::take(&mut self.changes)
            .into_iter()
            .partition(|change| wanted(change));
        if back.is_empty() {
            self.changes = kept;
            return;
        }
        while let Some(change) = back.pop() {
            if let Err(source) = self.machine.put_back(&change) {
                tracing::error!(nic = change.nic, setting = %change.setting, %source, "could not be put back to {}; the next start tries again", change.before);
                kept.push(change);
            }
        }
        self.changes = kept;
        if let Err(error) = self.record() {
            tracing::error!("{error}");
        }
    }

    /// Writes the record, as a whole or not at all.
    fn record(&self) -> Result<(), SettingError> {
        let write = || {
            if self.changes.is_empty() {
                return match fs::remove_file(&self.path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            let text = serde_json::to_vec_pretty(&self.changes)?;
            let partial = self.path.with_extension("json.partial");
            let mut file = fs::File::create(&partial)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&partial, &self.path)
        };
        write().map_err(|source| SettingError::Record {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for NicSettings {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Where settings are read and written.
#[derive(Debug)]
struct Machine {
    sys: PathBuf,
    proc: PathBuf,
    /// Keeps a sysfs of our own mounted.
    _sysfs: Option<OwnedFd>,
}

impl Machine {
    /// `/sys/class/net` shows the NICs of the namespace that it was mounted in, which a process that entered another one
    /// by setns(2) is not in. So a sysfs is mounted in this one, nowhere in the tree of files; without the right to do
    /// that (CAP_SYS_ADMIN), the ordinary one must do, and `directory` compares.
    fn this() -> Self {
        let sysfs = own_sysfs().ok();
        let sys = sysfs.as_ref().map_or_else(
            || PathBuf::from("/sys"),
            |mount| PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())),
        );
        Self {
            sys,
            proc: PathBuf::from("/proc"),
            _sysfs: sysfs,
        }
    }

    /// The NIC's directory in sysfs, if it is about the same NIC.
    fn directory(&self, nic: &Nic) -> io::Result<PathBuf> {
        let directory = self.sys.join("class/net").join(&nic.name);
        let index = fs::read_to_string(directory.join("ifindex"))?;
        if index.trim() == nic.index.to_string() {
            return Ok(directory);
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "/sys shows another network namespace; CAP_SYS_ADMIN lets this process look at its own",
        ))
    }

    fn file(&self, nic: &Nic, setting: Setting) -> io::Result<PathBuf> {
        match setting {
            Setting::NapiDeferHardIrqs => Ok(self.directory(nic)?.join("napi_defer_hard_irqs")),
            Setting::GroFlushTimeout => Ok(self.directory(nic)?.join("gro_flush_timeout")),
            Setting::IrqAffinity(irq) => Ok(self.proc.join(format!("irq/{irq}/smp_affinity_list"))),
            Setting::RxVlanOffload | Setting::Gro => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn read(&self, nic: &Nic, setting: Setting) -> io::Result<String> {
        if let Some(feature) = setting.feature() {
            let on = feature.is_on(&nic.name)?;
            return Ok(if on { "on" } else { "off" }.to_owned());
        }
        let text = fs::read_to_string(self.file(nic, setting)?)?;
        Ok(text.trim().to_owned())
    }

    fn write(&self, nic: &Nic, setting: Setting, value: &str) -> io::Result<()> {
        if let Some(feature) = setting.feature() {
            return feature.switch(&nic.name, value == "on");
        }
        fs::write(self.file(nic, setting)?, value)
    }

    /// An interface that is gone has nothing to put back; one of the same name that was made since is another.
    fn put_back(&self, change: &Change) -> io::Result<()> {
        let Some(nic) = Nic::open(&change.nic)
            .ok()
            .filter(|nic| nic.index == change.ifindex)
        else {
            tracing::info!(nic = change.nic, setting = %change.setting, "the NIC is gone, and the setting with it");
            return Ok(());
        };
        let found = self.read(&nic, change.setting)?;
        if found != change.ours {
            if found != change.before {
                tracing::info!(nic = change.nic, setting = %change.setting, found, "left alone: somebody else has changed it since");
            }
            return Ok(());
        }
        self.write(&nic, change.setting, &change.before)?;
        tracing::info!(nic = change.nic, setting = %change.setting, now = change.before, "NIC setting put back");
        Ok(())
    }

    fn queue_interrupt(&self, nic: &Nic, queue: u32) -> Option<u32> {
        let device = self.directory(nic).ok()?.join("device");
        // A virtio device has its interrupts at its PCI parent.
        let irqs = ["msi_irqs", "../msi_irqs"]
            .iter()
            .find_map(|place| fs::read_dir(device.join(place)).ok())?;
        let irqs: BTreeSet<u32> = irqs
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        let table = fs::read_to_string(self.proc.join("interrupts")).ok()?;
        let mut found = table.lines().filter_map(|line| {
            let (number, rest) = line.split_once(':')?;
            let number = number.trim().parse().ok()?;
            let name = rest.split_whitespace().last()?;
            (irqs.contains(&number) && receive_queue(name) == Some(queue)).then_some(number)
        });
        // Two of one number are names that are not understood.
        found.next().filter(|_| found.next().is_none())
    }

    fn cpus_except(&self, cpus: &BTreeSet<u32>) -> Option<String> {
        let online = fs::read_to_string(self.sys.join("devices/system/cpu/online")).ok()?;
        let online = crate::config::parse_cpu_list(online.trim())?;
        let rest: BTreeSet<u32> = online.difference(cpus).copied().collect();
        (!rest.is_empty()).then(|| crate::config::format_cpu_list(&rest))
    }
}

/// The number of the receive queue that an interrupt of this name is for, by what drivers call theirs: `eth0-TxRx-3`,
/// `eth0-rx-3`, `virtio0-input.3`, `mlx5_comp3@pci:0000:08:00.0`.
fn receive_queue(name: &str) -> Option<u32> {
    let name = name.split('@').next()?.to_ascii_lowercase();
    let number_at = name.rfind(|c: char| !c.is_ascii_digit())? + 1;
    let (kind, number) = name.split_at(number_at);
    let receives = ["rx", "input", "comp"]
        .iter()
        .any(|word| kind.contains(word));
    number.parse().ok().filter(|_| receives)
}

/// A sysfs that shows the network namespace of the calling thread, mounted where only its descriptor leads.
pub(crate) fn own_sysfs() -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let descriptor = |answer: libc::c_long| {
        let number = libc::c_int::try_from(answer).map_err(io::Error::other)?;
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just given to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // SAFETY: takes a terminated string and a number.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"sysfs".as_ptr(), FSOPEN_CLOEXEC) };
    let context = descriptor(context)?;
    let nothing = core::ptr::null::<libc::c_char>();
    // SAFETY: an open context; this command takes neither key nor value.
    let status = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        )
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: an open context and plain numbers.
    let mount =
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    descriptor(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of files, in which the NIC is the loopback: every namespace has it, always under index 1.
    struct Rig {
        root: tempfile::TempDir,
        nic: Nic,
    }

    const DEFER: &str = "sys/class/net/lo/napi_defer_hard_irqs";
    const AFFINITY: &str = "proc/irq/41/smp_affinity_list";

    impl Rig {
        fn new() -> Self {
            let rig = Self {
                root: tempfile::tempdir().unwrap(),
                nic: Nic::open("lo").unwrap(),
            };
            rig.write("sys/class/net/lo/ifindex", "1\n");
            rig.write(DEFER, "0\n");
            rig.write("sys/class/net/lo/gro_flush_timeout", "0\n");
            rig.write("sys/devices/system/cpu/online", "0-3\n");
            rig.write(AFFINITY, "0-3\n");
            rig
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self, file: &str) -> String {
            let text = fs::read_to_string(self.root.path().join(file)).unwrap();
            text.trim().to_owned()
        }

        fn recorded(&self) -> bool {
            self.root.path().join(FILE).exists()
        }

        fn open(&self) -> NicSettings {
            let machine = Machine {
                sys: self.root.path().join("sys"),
                proc: self.root.path().join("proc"),
                _sysfs: None,
            };
            NicSettings::on(machine, self.root.path())
        }
    }

    #[test]
    fn what_was_changed_is_put_back() {
        let rig = Rig::new();
        let mut settings = rig.open();
        settings
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "0")
            .unwrap();
        assert!(!rig.recorded(), "it was so already");
        settings
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "2")
            .unwrap();
        settings
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "7")
            .unwrap();
        settings
            .set(&rig.nic, Setting::IrqAffinity(41), "1")
            .unwrap();
        assert_eq!(
            (rig.read(DEFER), rig.read(AFFINITY)),
            ("7".into(), "1".into())
        );
        assert!(rig.recorded());
        settings.put_back(&rig.nic, Setting::NapiDeferHardIrqs);
        assert_eq!(
            (rig.read(DEFER), rig.read(AFFINITY)),
            ("0".into(), "1".into())
        );
        assert!(rig.recorded());
        drop(settings);
        assert_eq!(rig.read(AFFINITY), "0-3");
        assert!(!rig.recorded());
    }

    #[test]
    fn a_start_after_a_kill_puts_back_first() {
        let rig = Rig::new();
        let mut killed = rig.open();
        killed
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "2")
            .unwrap();
        // What a killed process has no time for.
        killed.changes.clear();
        drop(killed);
        assert_eq!((rig.read(DEFER), rig.recorded()), ("2".into(), true));
        let next = rig.open();
        assert_eq!((rig.read(DEFER), rig.recorded()), ("0".into(), false));
        drop(next);
        assert_eq!(rig.read(DEFER), "0");
    }

    #[test]
    fn what_others_have_changed_since_is_theirs() {
        let rig = Rig::new();
        let mut settings = rig.open();
        settings
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "2")
            .unwrap();
        rig.write(DEFER, "5");
        drop(settings);
        assert_eq!((rig.read(DEFER), rig.recorded()), ("5".into(), false));

        // An interface of that name and another index is another one.
        let mut settings = rig.open();
        settings
            .set(&rig.nic, Setting::NapiDeferHardIrqs, "2")
            .unwrap();
        settings.changes[0].ifindex = 77;
        drop(settings);
        assert_eq!((rig.read(DEFER), rig.recorded()), ("2".into(), false));
    }

    #[test]
    fn nothing_is_changed_that_cannot_be_recorded() {
        let rig = Rig::new();
        let mut settings = rig.open();
        settings.path = rig.root.path().join("no/such/directory").join(FILE);
        let error = settings.set(&rig.nic, Setting::NapiDeferHardIrqs, "2");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("left alone"), "{error}");
        assert_eq!(rig.read(DEFER), "0");
    }

    #[test]
    fn what_cannot_be_put_back_stays_on_record() {
        let rig = Rig::new();
        let mut settings = rig.open();
        settings
            .set(&rig.nic, Setting::IrqAffinity(41), "1")
            .unwrap();
        fs::remove_file(rig.root.path().join(AFFINITY)).unwrap();
        drop(settings);
        assert!(rig.recorded());
        rig.write(AFFINITY, "1");
        drop(rig.open());
        assert_eq!((rig.read(AFFINITY), rig.recorded()), ("0-3".into(), false));
    }

    #[test]
    fn a_damaged_record_and_another_namespace_are_told() {
        let rig = Rig::new();
        rig.write(FILE, "[{");
        let mut settings = rig.open();
        rig.write("sys/class/net/lo/ifindex", "9");
        let error = settings.set(&rig.nic, Setting::GroFlushTimeout, "1");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("lo: gro_flush_timeout"), "{error}");
        assert!(error.contains("another network namespace"), "{error}");
    }

    #[test]
    fn the_interrupt_of_a_queue_is_found_by_its_name() {
        let table = [
            ("eth0-TxRx-0", Some(0)),
            ("i40e-eth0-TxRx-12", Some(12)),
            ("eth0-rx-3", Some(3)),
            ("eth0-Tx-Rx-3", Some(3)),
            ("eth0-rxtx-1", Some(1)),
            ("virtio0-input.2", Some(2)),
            ("virtio0-output.2", None),
            ("virtio0-config", None),
            ("mlx5_comp5@pci:0000:08:00.0", Some(5)),
            ("mlx5_async0@pci:0000:08:00.0", None),
            ("eth0-tx-3", None),
            ("eth0", None),
            ("123", None),
            ("ena-mgmnt@pci:0000:00:05.0", None),
        ];
        for (name, queue) in table {
            assert_eq!(receive_queue(name), queue, "{name}");
        }

        let rig = Rig::new();
        rig.write(
            "proc/interrupts",
            "           CPU0       CPU1\n  \
               40:          0          0  IR-PCI-MSIX-0000:00:03.0   0-edge      virtio0-config\n  \
               41:         10          0  IR-PCI-MSIX-0000:00:03.0   1-edge      virtio0-input.0\n  \
               42:         10          0  IR-PCI-MSIX-0000:00:03.0   2-edge      virtio0-output.0\n  \
               43:         10          0  IR-PCI-MSIX-0000:00:03.0   3-edge      virtio0-input.1\n  \
               51:         10          0  IR-PCI-MSIX-0000:00:04.0   1-edge      virtio1-input.0\n \
              NMI:          0          0   Non-maskable interrupts\n",
        );
        let settings = rig.open();
        let irq = |queue| settings.queue_interrupt(&rig.nic, queue);
        assert_eq!(irq(0), None, "no device behind it, as a veth has none");
        rig.write("sys/class/net/lo/device/nothing", "");
        for irq in 40..=43 {
            rig.write(&format!("sys/class/net/lo/msi_irqs/{irq}"), "msix");
        }
        assert_eq!((irq(0), irq(1), irq(2)), (Some(41), Some(43), None));
        // A second interrupt that could be meant.
        rig.write("sys/class/net/lo/msi_irqs/51", "msix");
        assert_eq!((irq(0), irq(1)), (None, Some(43)));
    }

    #[test]
    fn other_cpus_are_those_that_are_online() {
        let rig = Rig::new();
        let settings = rig.open();
        let except = |cpus: &[u32]| settings.cpus_except(&cpus.iter().copied().collect());
        assert_eq!(except(&[1]).as_deref(), Some("0,2-3"));
        assert_eq!(except(&[9]).as_deref(), Some("0-3"));
        assert_eq!(except(&[0, 1, 2, 3]), None);
    }
}
