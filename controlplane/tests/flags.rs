//! The command line of the program, as flannel's users write it. No root needed: it ends before it does anything.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use std::process::{Command, Output};

fn run(args: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ripstop-controlplane"))
        .args(args)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

/// The message, and the exit status.
fn refused(args: &[&str], variables: &[(&str, &str)]) -> (String, Option<i32>) {
    let output = run(args, variables);
    (
        String::from_utf8(output.stderr).unwrap(),
        output.status.code(),
    )
}

#[test]
fn a_bad_flag_ends_with_2_and_names_itself() {
    for (args, message) in [
        (
            &["-nonsense"][..],
            "flag provided but not defined: -nonsense",
        ),
        (&["--public-ip"], "flag needs an argument: -public-ip"),
        (
            &["-public-ip=here"],
            "invalid value 'here' for '--public-ip",
        ),
        (
            &["-subnet-lease-renew-margin=1440"],
            "Invalid subnet-lease-renew-margin option, out of acceptable range",
        ),
    ] {
        let (text, status) = refused(args, &[]);
        assert!(text.contains(message), "{args:?}: {text}");
        assert_eq!(status, Some(2), "{args:?}");
    }
}

#[test]
fn one_dash_two_dashes_and_variables_say_the_same() {
    // The file does not exist, and which one is missing shows what was understood.
    for args in [
        &["-net-config-path", "/nowhere/given"][..],
        &["--net-config-path=/nowhere/given"],
        &[
            "-net-config-path=/other",
            "--net-config-path",
            "/nowhere/given",
            "ignored",
            "-nonsense",
        ],
    ] {
        let variables = [
            ("FLANNELD_NET_CONFIG_PATH", "/nowhere/variable"),
            ("FLANNELD_LEASE_FILE", "/nowhere/leases"),
        ];
        let (text, status) = refused(args, &variables);
        assert!(text.contains("/nowhere/given"), "{args:?}: {text}");
        assert_eq!(status, Some(1), "{args:?}");
    }
    let variables = [
        ("FLANNELD_NET_CONFIG_PATH", "/nowhere/variable"),
        ("FLANNELD_PUBLIC_IP", "here"),
        ("FLANNELD_LEASE_FILE", "/nowhere/leases"),
    ];
    let (text, status) = refused(&[], &variables);
    assert!(text.contains("/nowhere/variable"), "{text}");
    assert!(
        text.contains("FLANNELD_PUBLIC_IP=\"here\" is not used"),
        "{text}"
    );
    assert_eq!(status, Some(1));
}

#[test]
fn help_and_version_are_no_errors() {
    for flag in ["-h", "-help", "--help", "-version", "--version"] {
        let output = run(&[flag], &[]);
        assert!(output.status.success(), "{flag}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("ripstop-controlplane"), "{flag}: {text}");
    }
}

#[test]
fn two_sources_of_leases_are_named_both() {
    for (args, variables, named) in [
        (
            &["-kube-subnet-mgr", "-lease-file=/leases"][..],
            &[][..],
            ["--kube-subnet-mgr", "--lease-file"],
        ),
        (
            &["--etcd-prefix", "/p", "-kube-subnet-mgr"],
            &[],
            ["--kube-subnet-mgr", "--etcd-prefix"],
        ),
        (
            &["--lease-file=/leases"],
            &[("FLANNELD_ETCD_ENDPOINTS", "http://10.0.0.1:2379")],
            ["--lease-file", "--etcd-endpoints"],
        ),
    ] {
        let (text, status) = refused(args, variables);
        let names = named.iter().all(|name| text.contains(name));
        assert!(names, "{args:?}: {text}");
        assert_eq!(status, Some(2), "{args:?}");
    }
}
