//! Programs that are not in Debian: `make tools` gets them where it can.

#![expect(clippy::print_stdout, reason = "what is not run must be seen")]
use std::path::{Path, PathBuf};

/// A program: where the variable says, where `make tools` puts it, or in the path. Without one, says which test has not
/// been run for want of it.
pub(crate) fn tool(name: &str, variable: &str, test: &str) -> Option<PathBuf> {
    let of_make = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = core::iter::once(of_make).chain(std::env::split_paths(&path));
    let mut places = folders.map(|folder| folder.join(name));
    let found = std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| places.find(|place| place.exists()));
    if found.is_none() {
        println!(
            "NOT RUN {test}: there is no {name}; `make tools` gets it, or {variable} names it"
        );
    }
    found
}
