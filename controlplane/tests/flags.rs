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
        text.contains("FLANNELD_PUBLIC_IP=\"here\" is not used: invalid IPv4 address syntax; --public-ip takes IP (Address that"),
        "{text}"
    );
    assert_eq!(status, Some(1));
}

#[test]
fn help_and_version_are_no_errors() {
    for flag in ["-h", "-help", "--help", "-version", "--version"] {
        let output = run(&[flag], &[]);
        assert!(output.status.success(), "{flag}");
        // Flannel's version goes to stderr.
        let text = match flag.ends_with("version") {
            true => output.stderr,
            false => output.stdout,
        };
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("ripstop-controlplane"), "{flag}: {text}");
    }
}

#[test]
fn logs_are_as_the_flags_say() {
    let conf = "--net-config-path=/nowhere/net-conf.json";
    let lines = |args: &[&str], variables: &[(&str, &str)]| {
        let (text, status) = refused(&[&[conf, "--lease-file=/leases"], args].concat(), variables);
        assert_eq!(status, Some(1), "{args:?}: {text}");
        text
    };
    let unused = "--vmodule=lease=4 is not used";
    let vmodule = ["-vmodule=lease=4", "-log_backtrace_at=main.go:1"];
    for (verbosity, said) in [
        ("-v=0", false),
        ("-v=3", false),
        ("--v=4", true),
        ("-v=10", true),
    ] {
        let text = lines(&[&[verbosity], &vmodule[..]].concat(), &[]);
        assert_eq!(text.contains(unused), said, "{verbosity}: {text}");
        assert!(text.contains("/nowhere/net-conf.json"), "{text}");
    }
    assert!(lines(&vmodule, &[("FLANNELD_V", "5")]).contains(unused));
    assert!(lines(&vmodule, &[("FLANNELD_LOG_LEVEL", "debug")]).contains(unused));
    for (args, variables) in [
        (&["--log-format=json"][..], &[][..]),
        (&[], &[("RIPSTOP_LOG_FORMAT", "json")]),
        (&[], &[("FLANNELD_LOG_FORMAT", "json")]),
    ] {
        let text = lines(args, variables);
        for line in text.lines() {
            let object: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(object["level"], "ERROR", "{object}");
            assert!(
                object["message"].as_str().unwrap().contains("/nowhere"),
                "{object}"
            );
        }
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let (text, status) = refused(&["--log-format=xml"], &[]);
    assert!(text.contains("[possible values: text, json]"), "{text}");
    assert_eq!(status, Some(2));
}

#[test]
fn a_health_address_that_cannot_be_had_ends_with_1_and_says_what_to_do() {
    // Somebody has the port.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--healthz-port={}", taken.local_addr().unwrap().port());
    for (args, words) in [
        (
            &["--healthz-ip=nowhere", "--healthz-port=8081"][..],
            &["--healthz-ip \"nowhere\"", "0.0.0.0"][..],
        ),
        (
            &["--healthz-ip=192.0.2.1", "--healthz-port=8081"],
            &["192.0.2.1:8081", "no such address"],
        ),
        (
            &["--healthz-ip=127.0.0.1", &port],
            &["another program has the port", "--healthz-port"],
        ),
    ] {
        let (text, status) = refused(args, &[]);
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
        assert_eq!(status, Some(1), "{text}");
    }
    let (_, status) = refused(&["--healthz-port=-1"], &[]);
    assert_eq!(status, Some(2));
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
