//! The CNI plugin `flannel`: a runtime calls it with `CNI_*` variables and a configuration on stdin.

use std::env;
use std::io::{self, Write as _};
use std::process::ExitCode;

use ripstop_cni::plugin;

fn main() -> ExitCode {
    let reply = plugin::run(|name| env::var(name).ok(), io::stdin().lock());
    for note in &reply.notes {
        // Nobody has to read them.
        let _ = writeln!(io::stderr(), "{note}");
    }
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(&reply.stdout)
        .and_then(|()| stdout.flush())
    {
        Ok(()) => ExitCode::from(reply.code),
        // The runtime has not got the answer, so it must not take this for a success.
        Err(_) => ExitCode::from(reply.code.max(1)),
    }
}
