//! The control plane of a Ripstop node.
//!
//! It turns leases into three things: the kernel's own path, complete at all times (the standby); the forwarding
//! table that the data plane's workers read; and the detour through `rip0` that traffic takes while workers are alive. It works level-triggered: desired state from sources, actual state from the kernel, act on
//! the difference. Events only make it look sooner.
//!
//! ```text
//!   lease/file ──┐                         ┌─► standby ─► tunnel device, neighbours, FDB, routes (kernel)
//!   netconf ─────┤                         ├─► rules, guard ─► nftables: peer filter, no pod as a node
//!   interface ───┼─► reconcile (main loop) ┤
//!   nexthop ─────┤      ▲                  ├─► compile ─► publish ─► fib region ─► workers
//!   netlink ─────┘      └── stats region   └─► detour ──► rip0 routes and rules, while workers are alive
//! ```

pub mod cleanup;
pub mod compile;
pub mod conflist;
pub mod detour;
pub mod family;
pub mod fou;
pub mod goflags;
pub mod guard;
pub mod health;
pub mod interface;
mod keeper;
pub mod lease;
pub mod logs;
pub mod mac;
pub mod netconf;
pub mod netlink;
pub mod nexthop;
pub mod problems;
pub mod publish;
pub mod reconcile;
pub mod report;
pub mod rules;
pub mod standby;
pub mod state;
pub mod subnet_file;
pub mod sys;
pub mod table;
pub mod traffic;
pub mod uplink;

/// Where the shared regions are unless the operator says otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/ripstop";

/// An error with its causes, but for those whose words it has said already.
pub fn explained(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_named_once() {
        let cause = || anyhow::anyhow!("no such file");
        assert_eq!(
            explained(&cause().context("read a.json")),
            "read a.json: no such file"
        );
        assert_eq!(
            explained(&cause().context("a.json: no such file, create it")),
            "a.json: no such file, create it"
        );
    }
}
