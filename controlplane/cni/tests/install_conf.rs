//! The program that puts the conflist where the runtime finds it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Runs it under a umask that would take every permission of others.
fn command(arguments: &[&Path]) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "umask 077; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_install-conf"),
        ])
        .args(arguments);
    command
}

fn run(arguments: &[&Path]) -> Output {
    command(arguments).output().unwrap()
}

#[track_caller]
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_is_replaced_whole_with_its_mode() {
    let dir = TempDir::new().unwrap();
    let (source, dest) = (
        dir.path().join("cni-conf.json"),
        dir.path().join("10-flannel.conflist"),
    );
    for (content, mode) in [("{\"name\": \"cbr0\"}\n", 0o644), ("{}", 0o640)] {
        fs::write(&source, content).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(mode)).unwrap();
        let before = fs::File::open(&dest).ok();
        let output = run(&[&source, &dest]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read_to_string(&dest).unwrap(), content);
        assert_eq!(
            fs::metadata(&dest).unwrap().permissions().mode() & 0o7777,
            mode
        );
        assert_eq!(names(dir.path()), ["10-flannel.conflist", "cni-conf.json"]);
        if let Some(before) = before {
            let text = std::io::read_to_string(before).unwrap();
            assert_eq!(
                text, "{\"name\": \"cbr0\"}\n",
                "who has it open reads the old file to its end"
            );
        }
    }
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_changed() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("source"), "{}").unwrap();
    fs::create_dir(path("directory")).unwrap();
    for (source, dest, message) in [
        ("absent", "dest", "No such file or directory"),
        ("directory", "dest", "Is a directory"),
        ("source", "nowhere/dest", "Is "),
        ("source", "directory", "Is a directory"),
    ] {
        let text = failure(&run(&[&path(source), &path(dest)]));
        assert!(
            text.starts_with(&format!("error installing {:?}: ", path(source))),
            "{text}"
        );
        assert!(text.contains(message), "{text}");
        assert_eq!(names(dir.path()), ["directory", "source"]);
        assert_eq!(names(&path("directory")), Vec::<String>::new());
    }
    let text = failure(&run(&[&path("source"), &path("nowhere/dest")]));
    assert!(text.contains("mounted here and writable?"), "{text}");
    assert!(failure(&run(&[])).contains("Usage: install-conf"));
    assert!(failure(&run(&[&path("source")])).contains("<DEST>"));
}

/// The conflist appears when the node is ready: not before, and not for half a file.
#[test]
fn the_file_waits_for_subnet_env() {
    let dir = TempDir::new().unwrap();
    let (source, dest, env) = (
        dir.path().join("source"),
        dir.path().join("dest"),
        dir.path().join("subnet.env"),
    );
    fs::write(&source, "{}").unwrap();
    let text = failure(&run(&[
        &source,
        &dest,
        "--wait-for".as_ref(),
        &env,
        "--timeout".as_ref(),
        "0".as_ref(),
    ]));
    assert!(text.starts_with("gave up after 0.0 s: open "), "{text}");
    assert!(
        text.contains("no such file or directory. Is flanneld running"),
        "{text}"
    );

    let mut child = command(&[
        &source,
        &dest,
        "--wait-for".as_ref(),
        &env,
        "--timeout".as_ref(),
        "60".as_ref(),
    ])
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(
        said.next()
            .unwrap()
            .unwrap()
            .contains("no such file or directory")
    );
    fs::write(&env, "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n").unwrap();
    // It may have looked while the file was still empty.
    let line = said
        .find(|line| {
            line.as_ref()
                .is_ok_and(|line| line.ends_with("FLANNEL_IPV6_SUBNET"))
        })
        .unwrap();
    assert!(
        line.unwrap()
            .contains("subnet.env is missing FLANNEL_NETWORK,")
    );
    assert!(!dest.exists());
    let network = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n";
    fs::write(
        &env,
        format!("{network}FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"),
    )
    .unwrap();
    assert!(child.wait().unwrap().success());
    assert!(dest.exists());
}
