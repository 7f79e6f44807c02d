//! The units, their environment files, and the Dockerfile, by the programs that read them.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

#[path = "common/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tool::tool;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join("configs").join(file)).unwrap()
}

/// What systemd says about a unit whose program is there; nothing if all is well.
fn verify(name: &str, text: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let unit = directory.path().join(name);
    let start = text
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let program = start.split(' ').next().unwrap();
    // Any program will do; it is not run.
    fs::write(&unit, text.replace(program, "/bin/true")).unwrap();
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&unit)
        .output()
        .expect("systemd-analyze (package systemd)");
    let said = String::from_utf8(output.stderr).unwrap();
    // About other units of this machine it may say more.
    let ours = said.lines().filter(|line| line.contains(name));
    let ours: Vec<&str> = ours.collect();
    assert!(output.status.success() || !ours.is_empty(), "{said}");
    ours.join("\n")
}

#[test]
fn systemd_understands_the_units() {
    for name in ["ripstop-controlplane.service", "ripstop-dataplane.service"] {
        let text = read(&format!("systemd/{name}"));
        assert_eq!(verify(name, &text), "");
        let spoiled = text.replace("RestartSec=1", "RestartSec=soon");
        assert!(verify(name, &spoiled).contains("soon"));
        let spoiled = text.replace("ProtectHome", "ProtectsHome");
        assert!(verify(name, &spoiled).contains("ProtectsHome"));
    }
}

/// systemd passes over a capability that it does not know; the manifest is tried out, so the units are held against that.
#[test]
fn the_units_have_the_capabilities_of_the_manifest() {
    let manifest = read("kubernetes/ripstop.yml");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&manifest).unwrap();
    let set = objects
        .iter()
        .find(|object| object["kind"] == "DaemonSet")
        .unwrap();
    let containers = set["spec"]["template"]["spec"]["containers"]
        .as_array()
        .unwrap();
    for (unit, container) in [
        ("ripstop-controlplane", "kube-flannel"),
        ("ripstop-dataplane", "ripstop-dataplane"),
    ] {
        let text = read(&format!("systemd/{unit}.service"));
        let container = containers
            .iter()
            .find(|found| found["name"] == container)
            .unwrap();
        let capabilities = &container["securityContext"]["capabilities"]["add"];
        let in_manifest = capabilities
            .as_array()
            .unwrap()
            .iter()
            .map(|name| format!("CAP_{}", name.as_str().unwrap()));
        let bounding = text
            .lines()
            .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
            .unwrap();
        let mut in_unit: BTreeSet<String> = bounding.split(' ').map(str::to_owned).collect();
        if text.contains("LimitMEMLOCK=infinity") {
            in_unit.insert("CAP_IPC_LOCK".to_owned());
        }
        assert_eq!(in_unit, in_manifest.collect(), "{unit}");
    }
}

/// What nobody reads, nobody keeps right.
#[test]
fn every_file_under_configs_has_a_reader() {
    let mut left: BTreeSet<String> = files(&root().join("configs"), "");
    for (reader, files) in [
        ("tests/configs.rs", &["net-conf.json", "leases.json"][..]),
        (
            "../dataplane/tests/config.rs",
            &["dataplane/eth0-q0.json", "dataplane/auto/template.json"],
        ),
        ("tests/kubernetes.rs", &["kubernetes/ripstop.yml"]),
        (
            "tests/kubernetes.rs, through helm",
            &[
                "kubernetes/chart/Chart.yaml",
                "kubernetes/chart/values.yaml",
                "kubernetes/chart/templates/_helpers.tpl",
                "kubernetes/chart/templates/config.yaml",
                "kubernetes/chart/templates/daemonset.yaml",
                "kubernetes/chart/templates/rbac.yaml",
            ],
        ),
        (
            "this file",
            &[
                "systemd/ripstop-controlplane.service",
                "systemd/ripstop-dataplane.service",
                "systemd/controlplane.env",
                "systemd/dataplane.env",
                "container/Dockerfile",
            ],
        ),
        ("docker build", &["container/Dockerfile.dockerignore"]),
        ("make tools", &["tools"]),
        ("the metrics' tests", &["grafana/ripstop.json"]),
    ] {
        for file in files {
            assert!(left.remove(*file), "{file}, read by {reader}, is not there");
        }
    }
    left.retain(|file| !file.ends_with("README.md"));
    assert_eq!(left, BTreeSet::new(), "no test reads these");
}

/// The files below a directory, by their paths from there.
fn files(directory: &Path, prefix: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries
        .flat_map(|entry| {
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            match entry.path().is_dir() {
                true => files(&entry.path(), &format!("{name}/")),
                false => BTreeSet::from([name]),
            }
        })
        .collect()
}

/// The assignments of an environment file, those that are commented out included.
fn assignments(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(|line| line.trim_start_matches('#'));
    let pairs = lines.filter_map(|line| line.split_once('='));
    let names = pairs.filter(|(name, _)| !name.contains(' '));
    names
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn the_data_planes_environment_file_names_an_interface() {
    let variables = assignments(&read("systemd/dataplane.env"));
    assert_eq!(
        variables,
        [("FLANNELD_IFACE".to_owned(), "eth1".to_owned())]
    );
}

#[test]
fn the_control_plane_takes_its_environment_file() {
    let mut variables = assignments(&read("systemd/controlplane.env"));
    assert!(variables.len() >= 6, "{variables:?}");
    let (_, conf) = variables
        .iter_mut()
        .find(|(name, _)| name == "FLANNELD_NET_CONFIG_PATH")
        .unwrap();
    "/nonexistent/net-conf.json".clone_into(conf);
    let output = Command::new(env!("CARGO_BIN_EXE_ripstop-controlplane"))
        .env_clear()
        .envs(variables)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("/nonexistent/net-conf.json"), "{said}");
    // A variable with a mistake would be told, and passed over.
    assert!(!said.contains("is not used"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    // And every variable is a flag's, or known by another name.
    let help = Command::new(env!("CARGO_BIN_EXE_ripstop-controlplane"))
        .arg("--help")
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for (name, _) in assignments(&read("systemd/controlplane.env")) {
        let known = match name.strip_prefix("FLANNELD_") {
            Some(flag) => format!("--{} ", flag.to_lowercase().replace('_', "-")),
            None => format!("[env: {name}="),
        };
        let known = known.trim_end();
        assert!(help.contains(known), "{name}: {known} is not in {help}");
    }
}

#[test]
fn the_dockerfile_has_no_fault_and_copies_what_is_there() {
    let test = "the_dockerfile_has_no_fault_and_copies_what_is_there";
    let Some(hadolint) = tool("hadolint", "RIPSTOP_HADOLINT", test) else {
        return;
    };
    let lint = |text: &str| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("Dockerfile");
        fs::write(&file, text).unwrap();
        let output = Command::new(&hadolint)
            .args(["--failure-threshold", "style"])
            .arg(file)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.success(), said.is_empty(), "{said}");
        said
    };
    let text = read("container/Dockerfile");
    assert_eq!(lint(&text), "");
    assert!(
        lint(&text.replace("\nFROM debian:bookworm-slim", "\nFORM debian"))
            .contains("unexpected 'F'")
    );
    assert!(lint(&text.replace("bookworm-slim", "latest")).contains("latest"));

    // What is copied from the build is what `make image-files` makes; the programs of the manifest are among it.
    let mut copied = text.lines().filter_map(|line| line.strip_prefix("COPY "));
    assert_eq!(copied.next(), Some(". ."));
    assert_eq!(copied.next(), Some("--from=build /src/target/image/ /"));
    assert_eq!(copied.next(), None);
    assert!(text.contains("WORKDIR /src\n") && text.contains("RUN make image-files\n"));
    let list = Command::new("make")
        .args([
            "--dry-run",
            "--always-make",
            "image-files",
            "CARGO_TARGET_DIR=",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    let recipe = String::from_utf8(list.stdout).unwrap().replace("\\\n", " ");
    let mut files = BTreeSet::new();
    for line in recipe.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        match words.as_slice() {
            ["install", .., _] => {
                let to = words
                    .iter()
                    .find_map(|word| word.strip_prefix("--target-directory=target/image"));
                let programs = words.iter().skip(1).filter(|word| !word.starts_with('-'));
                files.extend(programs.map(|path| format!("{}/{}", to.unwrap(), name(path))));
            }
            ["ln", "-s", _, link] => {
                files.insert(link.trim_start_matches("target/image").to_owned());
            }
            _ => {}
        }
    }
    let manifest = read("kubernetes/ripstop.yml");
    for program in [
        "/flannel",
        "/opt/bin/flanneld",
        "/opt/bin/install-conf",
        "/opt/bin/ripstop",
        "/opt/bin/ripstop-controlplane",
        "/opt/bin/ripstop-dataplane",
    ] {
        assert!(files.contains(program), "{program} is not in {files:?}");
    }
    let commands = manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix("command: ["));
    let commands: Vec<&str> = commands
        .map(|command| command.trim_end_matches(']'))
        .collect();
    assert_eq!(commands.len(), 3);
    for command in commands {
        assert!(files.contains(command), "{command} is not in {files:?}");
    }
}
