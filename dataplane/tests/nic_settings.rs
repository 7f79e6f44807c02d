//! What is changed on a NIC, on veth devices of this kernel.
//!
//! Needs root. Each test works in an unnamed network namespace of its own
//! thread, which the kernel removes with the thread.

#![expect(unsafe_code, reason = "system calls by hand")]
#![expect(clippy::unwrap_used, reason = "also in the helpers of the tests")]

use core::time::Duration;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use ripstop_dataplane::nic::{Feature, Nic};
use ripstop_dataplane::nic_settings::{FILE, NicSettings, Setting};

#[expect(dead_code, reason = "every test binary uses its own part")]
mod common;

use common::{ip, own_namespace};

/// Gives the calling thread a network namespace of its own, with a veth.
fn veth() -> Nic {
    own_namespace();
    ip("link add sx0 type veth peer name sx1");
    // A veth merges nothing unless it is told to.
    Feature::Gro.switch("sx0", true).unwrap();
    Nic::open("sx0").unwrap()
}

/// All settings of a veth, changed.
fn change(settings: &mut NicSettings, nic: &Nic) {
    settings.set(nic, Setting::RxVlanOffload, "off").unwrap();
    settings.set(nic, Setting::Gro, "off").unwrap();
    settings.set(nic, Setting::NapiDeferHardIrqs, "2").unwrap();
    settings
        .set(nic, Setting::GroFlushTimeout, "200000")
        .unwrap();
}

/// What the kernel says, with files of the namespace's own sysfs.
fn state(nic: &Nic) -> (bool, bool, String) {
    // A mount namespace of its own, so that the new sysfs is seen nowhere else.
    let script = "mount -t sysfs sysfs /sys && cd /sys/class/net/sx0 && echo $(cat napi_defer_hard_irqs gro_flush_timeout)";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    (
        Feature::RxVlanOffload.is_on(&nic.name).unwrap(),
        Feature::Gro.is_on(&nic.name).unwrap(),
        text.trim().to_owned(),
    )
}

const UNTOUCHED: (bool, bool, &str) = (true, true, "0 0");
const CHANGED: (bool, bool, &str) = (false, false, "2 200000");

fn assert_state(nic: &Nic, (vlan, gro, files): (bool, bool, &str)) {
    assert_eq!(state(nic), (vlan, gro, files.to_owned()));
}

#[test]
fn a_veth_is_changed_and_put_back() {
    let nic = veth();
    let run_dir = tempfile::tempdir().unwrap();
    assert_state(&nic, UNTOUCHED);
    let mut settings = NicSettings::open(run_dir.path());
    assert_eq!(settings.queue_interrupt(&nic, 0), None);
    change(&mut settings, &nic);
    assert_state(&nic, CHANGED);
    assert!(run_dir.path().join(FILE).exists());
    drop(settings);
    assert_state(&nic, UNTOUCHED);
    assert!(!run_dir.path().join(FILE).exists());
}

#[test]
fn a_setting_that_the_driver_does_not_have_is_told() {
    veth();
    let lo = Nic::open("lo").unwrap();
    let run_dir = tempfile::tempdir().unwrap();
    let mut settings = NicSettings::open(run_dir.path());
    // It has no such offload, so it is as wanted; and cannot be switched on.
    settings.set(&lo, Setting::RxVlanOffload, "off").unwrap();
    let error = settings.set(&lo, Setting::RxVlanOffload, "on").unwrap_err();
    assert!(
        error.to_string().starts_with("lo: rx-vlan-offload"),
        "{error}"
    );
}

/// Environment variable that tells the child of the next test its run directory.
const RUN_DIR: &str = "RIPSTOP_TEST_NIC_SETTINGS";

#[test]
#[ignore = "the child of a_killed_process_is_cleaned_up_after, useless by itself"]
fn change_until_killed() {
    let Ok(run_dir) = std::env::var(RUN_DIR) else {
        return;
    };
    let mut settings = NicSettings::open(Path::new(&run_dir));
    change(&mut settings, &Nic::open("sx0").unwrap());
    println!("\nchanged");
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_process_is_cleaned_up_after() {
    let nic = veth();
    let run_dir = tempfile::tempdir().unwrap();
    // The child is forked from this thread and so shares its namespace.
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "change_until_killed"])
        .env(RUN_DIR, run_dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let changed = lines.map_while(Result::ok).any(|line| line == "changed");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(changed);
    assert_state(&nic, CHANGED);
    drop(NicSettings::open(run_dir.path()));
    assert_state(&nic, UNTOUCHED);
    assert!(!run_dir.path().join(FILE).exists());
}
