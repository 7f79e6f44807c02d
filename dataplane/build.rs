//! Compiles the XDP programs. The objects are embedded in the library, so that the running machine needs neither clang nor
//! any file.

use core::error::Error;

#[path = "bpf/compile.rs"]
mod compile;

fn main() -> Result<(), Box<dyn Error>> {
    compile::programs(&["ripstop", "door", "inject", "tunnel_gso"])
}
