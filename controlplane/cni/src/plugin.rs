//! The plugin's commands (CNI specification 1.1.0, section 2).
//!
//! | command | what it does |
//! |---|---|
//! | `ADD` | makes the delegate's configuration from `subnet.env`, saves it, calls the delegate; its answer is ours |
//! | `DEL` | calls the delegate with what was saved, and only when that went well forgets it |
//! | `CHECK` | calls the delegate with what was saved and the result of `ADD` |
//! | `GC` | does `DEL` for what is saved of this network and not in use, then hands the command on |
//! | `STATUS` | could `ADD` be served? `subnet.env`, the delegate and its address plugin are asked |
//!
//! A failed `ADD` leaves the saved file if the delegate has run: it may have left an address or an interface, and the
//! runtime's `DEL`, which the specification demands after every `ADD`, gives them back by that file. Calling the
//! delegate's `DEL` here instead would tear down a living pod where a runtime has added it twice. A delegate that did
//! not run has left nothing, and so do we.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::{Attachment, Delegate, NetConf, VERSIONS, Version, is_plain_name, with_keys};
use crate::delegate::{Failed, Plugin};
use crate::error::{CniError, Code};
use crate::saved::{self, Saved};
use crate::subnet_env::{ReadError, SubnetEnv};

const NOT_READY: &str = "the node is not ready for pods: this file is written once it can forward. Is the flannel pod running on this \
    node? kubectl -n kube-flannel get pods -o wide; kubectl -n kube-flannel logs -l app=flannel --all-containers";

/// What the process answers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// For the runtime.
    pub stdout: Vec<u8>,
    /// For whoever reads its log.
    pub notes: Vec<String>,
    /// Exit code.
    pub code: u8,
}

enum Failure {
    Own(CniError),
    Delegate(Failed),
}

impl From<CniError> for Failure {
    fn from(error: CniError) -> Self {
        Self::Own(error)
    }
}

/// Does what the environment asks for. `variable` looks up a `CNI_*` variable; stdin is read if the command needs it.
pub fn run(variable: impl Fn(&str) -> Option<String>, stdin: impl Read) -> Reply {
    let variable = |name| variable(name).unwrap_or_default();
    let command = variable("CNI_COMMAND");
    match command.as_str() {
        "" => {
            let about = format!(
                "CNI plugin flannel of Ripstop {}",
                env!("CARGO_PKG_VERSION")
            );
            let spoken = format!("CNI protocol versions supported: {}", VERSIONS.join(", "));
            Reply {
                notes: vec![about, spoken],
                ..Reply::default()
            }
        }
        "VERSION" => Reply {
            stdout: json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS})
                .to_string()
                .into_bytes(),
            ..Reply::default()
        },
        _ => {
            let mut notes = Vec::new();
            let mut version = "1.1.0".to_owned();
            let outcome = call(&command, variable, stdin, &mut version, &mut notes);
            let (stdout, code) = match outcome {
                Ok(stdout) => (stdout, 0),
                Err(Failure::Own(error)) => (error.json(&version).into_bytes(), 1),
                Err(Failure::Delegate(failed)) => {
                    let own = || failed.error.json(&version).into_bytes();
                    (failed.stdout.unwrap_or_else(own), failed.code)
                }
            };
            Reply {
                stdout,
                notes,
                code,
            }
        }
    }
}

/// The bridge plugin's refusal of a bridge that is still of the node's subnet before this one, with what to do about it; any
/// other answer as it is.
fn explained(mut failed: Failed, conf: &[u8]) -> Failed {
    let answer = failed.stdout.as_deref().unwrap_or_default();
    let Ok(Value::Object(mut error)) = serde_json::from_slice(answer) else {
        return failed;
    };
    let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default();
    if text("msg").contains("already has an IP address different from")
        && text("details").is_empty()
    {
        let conf: Value = serde_json::from_slice(conf).unwrap_or_default();
        let bridge = conf.get("bridge").and_then(Value::as_str);
        let bridge = bridge.unwrap_or("cni0");
        let details = format!(
            "{bridge} is of another subnet that this node had before: when the pods on it are gone (kubectl drain), run `ip link delete \
             {bridge}` on the node; the next pod makes it anew"
        );
        error.insert("details".to_owned(), details.into());
        failed.stdout = Some(Value::Object(error).to_string().into_bytes());
    }
    failed
}

/// A command with all that it needs.
struct Call {
    conf: NetConf,
    attachment: Attachment,
    cni_path: String,
}

fn call(
    command: &str,
    variable: impl Fn(&'static str) -> String,
    mut stdin: impl Read,
    version: &mut String,
    notes: &mut Vec<String>,
) -> Result<Vec<u8>, Failure> {
    let needed: &[&str] = match command {
        "ADD" | "CHECK" => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
        "DEL" => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
        "GC" => &["CNI_PATH"],
        "STATUS" => &[],
        _ => {
            return Err(environment(format!("unknown CNI_COMMAND: {command}")).into());
        }
    };
    let missing: Vec<&str> = needed
        .iter()
        .filter(|name| variable(name).is_empty())
        .copied()
        .collect();
    if !missing.is_empty() {
        let missing = missing.join(",");
        return Err(environment(format!("required env variables [{missing}] missing")).into());
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).map_err(|error| {
        CniError::new(
            Code::Io,
            format!("error reading from stdin: {error}"),
            "the runtime passes the configuration there",
        )
    })?;
    let conf = NetConf::parse(&bytes)?;
    if !conf.cni_version.is_empty() {
        version.clone_from(&conf.cni_version);
    }
    let call = Call {
        conf,
        attachment: Attachment {
            container_id: variable("CNI_CONTAINERID"),
            ifname: variable("CNI_IFNAME"),
        },
        cni_path: variable("CNI_PATH"),
    };
    let since = |first: Version| {
        if call.conf.version < first {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!("config version does not allow {command}"),
                format!("\"cniVersion\" is {:?}", call.conf.cni_version),
            ));
        }
        Ok(())
    };
    match command {
        "GC" => {
            since(Version::V1_1_0)?;
            return call.gc(notes);
        }
        "STATUS" => {
            since(Version::V1_1_0)?;
            return call.status();
        }
        _ => {}
    }
    check_attachment(&call.attachment)?;
    let allowed = variable("CNI_NETNS_OVERRIDE");
    if !(allowed == "1" || allowed.eq_ignore_ascii_case("true")) {
        check_netns(&variable("CNI_NETNS"), command != "DEL")?;
    }
    match command {
        "ADD" => call.add(),
        "DEL" => call.del(notes),
        _ => {
            since(Version::V0_4_0)?;
            call.check()
        }
    }
}

impl Call {
    fn add(&self) -> Result<Vec<u8>, Failure> {
        let Delegate { plugin, conf, .. } = self.conf.delegate(&self.subnet_env()?)?;
        let plugin = Plugin::find(&plugin, &self.cni_path)?;
        let (dir, attachment) = (&self.conf.data_dir, &self.attachment);
        let before = saved::path(dir, attachment).exists();
        saved::save(dir, attachment, &conf).map_err(|error| {
            CniError::new(
                Code::Io,
                format!(
                    "save the delegate's configuration in {}: {error}",
                    dir.display()
                ),
                "without it the pod could not be deleted; is the disk full or read-only?",
            )
        })?;
        match plugin.call(&conf, &[]) {
            Ok(ended) => ended.map_err(|failed| Failure::Delegate(explained(failed, &conf))),
            Err(not_run) => {
                // What an earlier ADD has saved is still needed by its DEL.
                if !before && let Ok(Some(saved)) = saved::read(saved::path(dir, attachment)) {
                    // The error that matters is the one that is returned.
                    let _ = saved.remove();
                }
                Err(not_run.into())
            }
        }
    }

    fn del(&self, notes: &mut Vec<String>) -> Result<Vec<u8>, Failure> {
        let Some(saved) = self.saved()? else {
            return Ok(Vec::new());
        };
        self.del_saved(&saved, &[], notes)?;
        Ok(Vec::new())
    }

    /// Has the delegate delete what was saved, and forgets it.
    fn del_saved(
        &self,
        saved: &Saved,
        variables: &[(&str, &str)],
        notes: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let file = saved.path.display();
        match saved.plugin() {
            Some(plugin) => {
                Plugin::find(&plugin, &self.cni_path)?
                    .call(&saved.conf, variables)?
                    .map_err(Failure::Delegate)?;
            }
            None => notes.push(format!(
                "{file} is not a configuration, so that nothing can be deleted by it; it is removed"
            )),
        }
        if !saved.shared
            && let Err(error) = saved.remove()
        {
            notes.push(format!("remove {file}: {error}"));
        }
        Ok(())
    }

    fn check(&self) -> Result<Vec<u8>, Failure> {
        let prev_result = self.conf.prev_result()?;
        let version = self.conf.cni_version.as_str();
        let keys = [("prevResult", prev_result), ("cniVersion", version.into())];
        let unknown = || {
            let file = saved::path(&self.conf.data_dir, &self.attachment);
            CniError::new(
                Code::UnknownContainer,
                format!("{} is not there or not a configuration", file.display()),
                "DEL cannot give back what this pod holds: delete the pod, then look for its address in the IPAM plugin's directory",
            )
        };
        let saved = self.saved()?.ok_or_else(unknown)?;
        let plugin = saved.plugin().ok_or_else(unknown)?;
        let conf = with_keys(&saved.conf, &keys).ok_or_else(unknown)?;
        Plugin::find(&plugin, &self.cni_path)?
            .call(&conf, &[])?
            .map_err(Failure::Delegate)
    }

    fn gc(&self, notes: &mut Vec<String>) -> Result<Vec<u8>, Failure> {
        let valid = self.conf.valid_attachments()?;
        let dir = &self.conf.data_dir;
        let mut failures = Vec::new();
        for (path, attachment) in
            saved::stale(dir, &valid).map_err(|error| unreadable(dir, &error))?
        {
            let saved = match saved::read(path) {
                Ok(Some(saved)) => saved,
                Ok(None) => continue,
                Err(error) => {
                    failures.push(error.to_string());
                    continue;
                }
            };
            // Other networks may keep their files in the same directory, and this list is not about them.
            if saved.network().as_ref() != Some(&self.conf.name) {
                continue;
            }
            let variables = [
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", attachment.container_id.as_str()),
                ("CNI_IFNAME", attachment.ifname.as_str()),
                ("CNI_NETNS", ""),
                ("CNI_ARGS", ""),
            ];
            match self.del_saved(&saved, &variables, notes) {
                Ok(()) => notes.push(format!(
                    "removed {} of container {}, which is not in use",
                    attachment.ifname, attachment.container_id
                )),
                Err(Failure::Own(error)) => failures.push(error.to_string()),
                Err(Failure::Delegate(failed)) => failures.push(failed.error.to_string()),
            }
        }
        let handed_on = self.hand_on_gc();
        if failures.is_empty() {
            return handed_on;
        }
        Err(CniError::new(
            Code::Internal,
            format!(
                "{} stale attachments are left: {}",
                failures.len(),
                failures.join("; ")
            ),
            "their saved configurations are kept; the next GC tries again",
        )
        .into())
    }

    fn hand_on_gc(&self) -> Result<Vec<u8>, Failure> {
        let Delegate { plugin, conf, .. } = self.conf.delegate(&self.subnet_env()?)?;
        let plugin = Plugin::find(&plugin, &self.cni_path)?;
        if !plugin.speaks("1.1.0")? {
            return Ok(Vec::new());
        }
        let valid = self.conf.valid_attachments()?;
        let valid = valid
            .iter()
            .map(|valid| json!({"containerID": valid.container_id, "ifname": valid.ifname}));
        let keys = [("cni.dev/valid-attachments", Value::Array(valid.collect()))];
        let conf = with_keys(&conf, &keys).unwrap_or(conf);
        plugin.call(&conf, &[])?.map_err(Failure::Delegate)
    }

    fn status(&self) -> Result<Vec<u8>, Failure> {
        let not_available = |error: CniError| CniError {
            code: Code::NotAvailable,
            ..error
        };
        let env = self.subnet_env().map_err(not_available)?;
        let Delegate { plugin, ipam, conf } = self.conf.delegate(&env).map_err(not_available)?;
        if self.cni_path.is_empty() {
            return Ok(Vec::new());
        }
        let find = |name| Plugin::find(name, &self.cni_path).map_err(not_available);
        let (bridge, ipam_plugin) = (find(&plugin)?, find(&ipam)?);
        for (name, asked) in [(&plugin, &bridge), (&ipam, &ipam_plugin)] {
            if !asked
                .speaks(&self.conf.cni_version)
                .map_err(not_available)?
            {
                return Err(CniError::new(
                    Code::NotAvailable,
                    format!("{name} does not speak CNI {}", self.conf.cni_version),
                    "install newer reference CNI plugins, or set an older \"cniVersion\" in the conflist",
                )
                .into());
            }
        }
        // The delegate asks its address plugin itself, as the specification wants it.
        bridge.call(&conf, &[])?.map_err(Failure::Delegate)
    }

    fn saved(&self) -> Result<Option<Saved>, CniError> {
        let dir = &self.conf.data_dir;
        saved::find(dir, &self.attachment, &self.conf.name).map_err(|error| unreadable(dir, &error))
    }

    fn subnet_env(&self) -> Result<SubnetEnv, CniError> {
        SubnetEnv::read(&self.conf.subnet_file).map_err(|error| {
            let code = match error {
                ReadError::Absent(_) => Code::TryAgainLater,
                ReadError::Unreadable { .. } | ReadError::Content { .. } => Code::Internal,
            };
            CniError::new(
                code,
                format!(
                    "failed to load flannel 'subnet.env' file: {error}. Check the flannel pod log for this node."
                ),
                NOT_READY,
            )
        })
    }
}

fn environment(msg: String) -> CniError {
    CniError::new(
        Code::Environment,
        msg,
        "this is the container runtime's doing",
    )
}

fn unreadable(dir: &Path, error: &std::io::Error) -> CniError {
    CniError::new(
        Code::Io,
        format!("read saved configurations in {}: {error}", dir.display()),
        "DEL needs what ADD has saved there",
    )
}

/// The names become part of a path, so they are checked before anything else.
fn check_attachment(attachment: &Attachment) -> Result<(), CniError> {
    let Attachment {
        container_id,
        ifname,
    } = attachment;
    if !is_plain_name(container_id) {
        return Err(environment(format!(
            "invalid characters in containerID: {container_id:?}"
        )));
    }
    let fault = if ifname.len() > 15 {
        "interface name is too long"
    } else if ifname == "." || ifname == ".." {
        "interface name is . or .."
    } else if ifname.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace()) {
        "interface name contains / or : or whitespace characters"
    } else {
        return Ok(());
    };
    Err(environment(format!("{fault}: {ifname:?}")))
}

/// The pod's namespace must not be the node's: the delegate would work on the node's own interfaces.
fn check_netns(netns: &str, needed: bool) -> Result<(), CniError> {
    let wrong = |msg: String| CniError::new(Code::Netns, msg, "nothing was changed");
    let identity = |path: &str| fs::metadata(path).map(|data| (data.dev(), data.ino()));
    match identity(netns) {
        Err(error) if needed => Err(wrong(format!("CNI_NETNS {netns}: {error}"))),
        // It is gone, and what was in it: DEL gives back the rest.
        Err(_) => Ok(()),
        Ok(theirs) => match identity("/proc/self/ns/net") {
            Ok(ours) if ours == theirs => Err(wrong(
                "plugin's netns and netns from CNI_NETNS should not be the same".to_owned(),
            )),
            Ok(_) | Err(_) => Ok(()),
        },
    }
}
