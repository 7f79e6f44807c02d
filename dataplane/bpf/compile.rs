//! Compiles BPF programs, for the build scripts of all crates that have any.

use core::error::Error;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use libbpf_cargo::SkeletonBuilder;

/// Compiles each `bpf/<name>.bpf.c` of the crate that is being built to `<name>.bpf.o` in its output directory.
pub(crate) fn programs(names: &[&str]) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-env-changed=CC");

    // -mcpu=v3 (kernel 5.1): 32-bit jumps and arithmetic, which clang 14 does not use unasked.
    let mut arguments = ["-mcpu=v3", "-Wall", "-Werror"].map(str::to_owned).to_vec();
    // The object is part of the binary: keep the builder's directories out of its line table.
    let here = env::var("CARGO_MANIFEST_DIR")?;
    arguments.push(format!("-ffile-prefix-map={here}=."));
    arguments.push("-fdebug-compilation-dir=.".into());
    arguments.extend(kernel_headers()?.map(|headers| format!("-I{}", headers.display())));
    let directory = PathBuf::from(env::var("OUT_DIR")?);
    for name in names {
        let source = format!("bpf/{name}.bpf.c");
        SkeletonBuilder::new()
            .source(&source)
            .obj(directory.join(format!("{name}.bpf.o")))
            .clang_args(&arguments)
            .build()
            .map_err(|error| {
                format!(
                    "compile {source}: {error:#}\n\
                     The build needs clang 14 or later and the kernel's headers: \
                     apt-get install clang linux-libc-dev"
                )
            })?;
    }
    Ok(())
}

/// Where `asm/types.h` is, if clang does not find it by itself: Debian keeps it in a directory named after the machine,
/// which clang does not search when it compiles for BPF.
fn kernel_headers() -> Result<Option<PathBuf>, Box<dyn Error>> {
    let has_types = |directory: &Path| directory.join("asm/types.h").is_file();
    if has_types(Path::new("/usr/include")) {
        return Ok(None);
    }
    let compiler = env::var("CC").unwrap_or_else(|_| "gcc".into());
    let mut names = vec![format!("{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH")?)];
    if let Ok(answer) = Command::new(compiler).arg("-print-multiarch").output() {
        names.insert(0, String::from_utf8(answer.stdout)?.trim().to_owned());
    }
    names
        .iter()
        .filter(|name| !name.is_empty())
        .map(|name| Path::new("/usr/include").join(name))
        .find(|directory| has_types(directory))
        .map(Some)
        .ok_or_else(|| "asm/types.h is missing: apt-get install linux-libc-dev".into())
}
