//! Calls the plugin as a container runtime does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

pub(crate) const FLANNEL: &str = env!("CARGO_BIN_EXE_flannel");

/// What a plugin answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    /// The answer of a plugin that succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// Code and text of the error that the specification asks for.
    #[track_caller]
    pub(crate) fn error(&self) -> (u64, String) {
        assert_eq!(self.code, 1, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap();
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        let text = format!("{}; {}", text("msg"), text("details"));
        (error["code"].as_u64().unwrap(), text)
    }
}

/// A runtime's way to call plugins.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    /// `CNI_PATH`.
    pub(crate) plugins: String,
    /// Working directory.
    pub(crate) dir: PathBuf,
    /// Network namespace of the node, if not this process's.
    pub(crate) namespace: Option<String>,
}

impl Runtime {
    /// Calls a program with these variables and this configuration.
    pub(crate) fn call(&self, program: &Path, variables: &[(&str, &str)], conf: &str) -> Answer {
        let mut command = match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program);
                command
            }
        };
        for name in [
            "COMMAND",
            "CONTAINERID",
            "NETNS",
            "IFNAME",
            "ARGS",
            "NETNS_OVERRIDE",
        ] {
            command.env_remove(format!("CNI_{name}"));
        }
        let mut child = command
            .env("CNI_PATH", &self.plugins)
            .envs(variables.iter().copied())
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may answer without having read.
        let _ = child.stdin.take().unwrap().write_all(conf.as_bytes());
        let output = child.wait_with_output().unwrap();
        Answer {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Calls a plugin for an attachment.
    pub(crate) fn attachment(
        &self,
        program: &Path,
        command: &str,
        [container_id, ifname, netns]: [&str; 3],
        conf: &str,
    ) -> Answer {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", container_id),
            ("CNI_IFNAME", ifname),
            ("CNI_NETNS", netns),
        ];
        self.call(program, &variables, conf)
    }
}
