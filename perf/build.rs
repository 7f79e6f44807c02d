//! Compiles the engines' BPF programs. The objects are embedded in the library, so that the running machine needs neither clang nor
//! any file.

use core::error::Error;

#[path = "../dataplane/bpf/compile.rs"]
mod compile;

fn main() -> Result<(), Box<dyn Error>> {
    compile::programs(&["engine"])
}
