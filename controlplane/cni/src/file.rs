//! Files that readers see whole or not at all.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// Replaces a file, or makes it: written as `.<name>.tmp*` beside it, brought to the disk, renamed. The mode is exactly
/// the one given, whatever the umask. Nothing is left behind by a failure.
///
/// # Errors
/// What the system says: no such directory, no right to write there, a full disk.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path does not end in a file name",
        ));
    };
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".tmp");
    let mut temporary = tempfile::Builder::new()
        .prefix(&prefix)
        .tempfile_in(parent(path))?;
    temporary.write_all(content)?;
    let file = temporary.as_file();
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Makes a directory with exactly this mode, and those above it; one that is there keeps its mode.
///
/// # Errors
/// What the system says.
pub fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// The directory that a file is in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}
