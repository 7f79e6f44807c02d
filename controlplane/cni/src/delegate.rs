//! Other plugins, called as a runtime calls them.

use std::env;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::error::{CniError, Code};

/// How a plugin ended, if not well.
#[derive(Debug)]
pub(crate) struct Failed {
    /// What it printed, if it is an error that a runtime understands.
    pub(crate) stdout: Option<Vec<u8>>,
    /// Its exit code; 1 if a signal ended it.
    pub(crate) code: u8,
    /// What it said was wrong.
    pub(crate) error: CniError,
}

/// A plugin that was found in `CNI_PATH`.
#[derive(Debug)]
pub(crate) struct Plugin {
    name: String,
    path: PathBuf,
}

impl Plugin {
    /// Looks it up. Only a plain name is looked for: a configuration must not choose programs elsewhere.
    pub(crate) fn find(name: &str, cni_path: &str) -> Result<Self, CniError> {
        if name.is_empty() || name.contains('/') {
            return Err(CniError::new(
                Code::Configuration,
                format!("invalid plugin name: {name:?}"),
                "'type' is the name of a program in CNI_PATH, without a directory",
            ));
        }
        let path = env::split_paths(cni_path)
            .filter(|dir| !dir.as_os_str().is_empty())
            .map(|dir| dir.join(name))
            .find(|path| path.is_file());
        match path {
            Some(path) => Ok(Self {
                name: name.to_owned(),
                path,
            }),
            None => Err(CniError::new(
                Code::Internal,
                format!("failed to find plugin {name:?} in path [{cni_path}]"),
                format!(
                    "install the reference CNI plugins on this node, so that one of these directories has {name} (Debian: package \
                     containernetworking-plugins, in /usr/lib/cni)"
                ),
            )),
        }
    }

    /// Calls it with this process's environment but for some variables; stderr is ours. What it printed, if it ended well.
    pub(crate) fn call(
        &self,
        conf: &[u8],
        variables: &[(&str, &str)],
    ) -> Result<Result<Vec<u8>, Failed>, CniError> {
        let not_run = |error: io::Error| {
            CniError::new(
                Code::Io,
                format!("run {}: {error}", self.path.display()),
                "is the file a program for this machine?",
            )
        };
        let mut child = Command::new(&self.path)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(not_run)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin may end without having read all; how it ends says what there is to say.
            let _ = stdin.write_all(conf);
        }
        let output = child.wait_with_output().map_err(not_run)?;
        if output.status.success() {
            return Ok(Ok(output.stdout));
        }
        let said: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        let said = said.as_ref().and_then(|error| error.get("msg")?.as_str());
        let error = CniError::new(
            Code::Internal,
            format!(
                "{} failed: {}",
                self.name,
                said.unwrap_or("it printed no CNI error")
            ),
            format!("{}; stderr may say more", output.status),
        );
        let code = output.status.code().map(u8::try_from);
        Ok(Err(Failed {
            code: match code {
                Some(Ok(code)) => code,
                Some(Err(_)) | None => 1,
            },
            stdout: said.is_some().then_some(output.stdout),
            error,
        }))
    }

    /// Whether it says that it speaks a version.
    pub(crate) fn speaks(&self, version: &str) -> Result<bool, CniError> {
        let question = format!("{{\"cniVersion\":\"{version}\"}}");
        let Ok(answer) = self.call(question.as_bytes(), &[("CNI_COMMAND", "VERSION")])? else {
            return Ok(false);
        };
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let versions = answer.get("supportedVersions").and_then(Value::as_array);
        Ok(versions.is_some_and(|versions| versions.iter().any(|spoken| spoken == version)))
    }
}
