//! What a delegate was told on `ADD`, kept for `DEL`: `<dataDir>/<container id>`.
//!
//! flannel names the file by the container alone, so that a second attachment of the same sandbox overwrites the first
//! one's. Here `eth0`, which every Kubernetes runtime calls the pod's own interface, has flannel's name, and any other
//! interface has `<container id>:<interface>`: a colon is in neither, so that no two attachments share a file and none
//! looks like a container id. A file of flannel's for another interface than `eth0` is found all the same, as long as it
//! is of the same network; since it may be `eth0`'s after all, it is used and left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config::{Attachment, is_plain_name};
use crate::file;

const FIRST_INTERFACE: &str = "eth0";

/// A configuration that was saved.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) path: PathBuf,
    pub(crate) conf: Vec<u8>,
    /// Whether it may be of another interface of the same sandbox.
    pub(crate) shared: bool,
}

impl Saved {
    /// The delegate that it is for; none if the file is damaged.
    pub(crate) fn plugin(&self) -> Option<String> {
        self.field("type").filter(|plugin| !plugin.is_empty())
    }

    /// The network that it is of.
    pub(crate) fn network(&self) -> Option<String> {
        self.field("name")
    }

    fn field(&self, key: &str) -> Option<String> {
        let mut map: Map<String, Value> = serde_json::from_slice(&self.conf).ok()?;
        match map.remove(key) {
            Some(Value::String(text)) => Some(text),
            Some(_) | None => None,
        }
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

pub(crate) fn path(dir: &Path, attachment: &Attachment) -> PathBuf {
    let Attachment {
        container_id,
        ifname,
    } = attachment;
    if ifname == FIRST_INTERFACE {
        dir.join(container_id)
    } else {
        dir.join(format!("{container_id}:{ifname}"))
    }
}

/// Saves a configuration, replacing the one before. Mode and directory are flannel's.
pub(crate) fn save(dir: &Path, attachment: &Attachment, conf: &[u8]) -> io::Result<()> {
    file::make_dir(dir, 0o700)?;
    file::write_atomic(&path(dir, attachment), conf, 0o600)
}

/// Finds what was saved for an attachment to a network.
pub(crate) fn find(
    dir: &Path,
    attachment: &Attachment,
    network: &str,
) -> io::Result<Option<Saved>> {
    let own = path(dir, attachment);
    if let Some(saved) = read(own.clone())? {
        return Ok(Some(saved));
    }
    let first = dir.join(&attachment.container_id);
    if first == own {
        return Ok(None);
    }
    Ok(read(first)?
        .filter(|saved| saved.network().as_deref() == Some(network))
        .map(|saved| Saved {
            shared: true,
            ..saved
        }))
}

pub(crate) fn read(path: PathBuf) -> io::Result<Option<Saved>> {
    match fs::read(&path) {
        Ok(conf) => Ok(Some(Saved {
            path,
            conf,
            shared: false,
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files of attachments that are not among the valid ones, of any network. flannel's name stands for a container
/// whose interface is not known, so it is stale only if none of that container's is valid.
pub(crate) fn stale(dir: &Path, valid: &[Attachment]) -> io::Result<Vec<(PathBuf, Attachment)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut stale = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let (container_id, ifname) = match name.split_once(':') {
            Some((container_id, ifname)) => (container_id, Some(ifname)),
            None => (name, None),
        };
        let in_use = valid.iter().any(|valid| {
            valid.container_id == container_id && ifname.is_none_or(|ifname| valid.ifname == ifname)
        });
        // Anything else in the directory, such as a file that is being written, is nobody's.
        if !in_use && is_plain_name(container_id) && entry.file_type()?.is_file() {
            let attachment = Attachment {
                container_id: container_id.to_owned(),
                ifname: ifname.unwrap_or(FIRST_INTERFACE).to_owned(),
            };
            stale.push((entry.path(), attachment));
        }
    }
    stale.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(stale)
}
