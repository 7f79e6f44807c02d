//! Nodes that know each other by the Kubernetes API alone: pods talk, and go on when the API server is killed.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0
//!            \      │       /
//!             API service (lists, watches, merges patches)
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "it is made for more tests than this one")]
#[path = "../../controlplane/tests/common/api.rs"]
mod api;

use core::time::Duration;
use std::fs;
use std::net::TcpListener;
use std::thread::sleep;

use anyhow::{Context as _, Result};
use api::Api;
use ripstop_perf::{Host, Lab, Ping, UdpFlow, wait_until};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn pods_talk_without_a_lease_file_and_without_the_api_server() -> Result<()> {
    Lab::builder().name("kube").ripstop(2).pods(1).run(|lab| {
        let address = (lab.fabric().address(), 0);
        let listener = lab.fabric().netns().run(|| TcpListener::bind(address))?;
        let api = Api::serve(listener.context("listen in the fabric")?);
        let kubeconfig = lab.dir().join("kubeconfig");
        fs::write(&kubeconfig, api.kubeconfig()).context("kubeconfig")?;
        let kubeconfig = kubeconfig.to_str().context("path")?;
        for node in lab.nodes() {
            let subnet = node.lease().subnet.context("subnet")?;
            api.create(node.name(), &[&subnet], &json!({}));
        }
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane_with(&["--kube-subnet-mgr", "--kubeconfig-file", kubeconfig])?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(1)?;
        }
        wait_until(
            "both nodes say that their network is there",
            PATIENCE,
            || {
                lab.nodes().iter().all(|node| {
                    let node = api.node(node.name());
                    node["status"]["conditions"][0]["status"] == "False"
                })
            },
        )?;
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        assert_eq!(Ping::new(one, other).run()?.received, 1);
        let traffic = UdpFlow::new(one, other).flows(4).rate(2000).start()?;
        wait_until("traffic flows", PATIENCE, || {
            traffic.snapshot().received > 100
        })?;
        // Connections are cut and nobody answers any more, which is more than a restart does.
        api.habits(|habits| habits.down = true);
        drop(api);
        sleep(Duration::from_secs(5));
        let report = traffic.stop();
        println!("without an API server: {report}");
        assert!(report.is_perfect(), "{report}");
        for node in lab.ripstop_nodes() {
            let output = node.detour()?;
            assert_eq!(output.len(), 1, "the workers keep the peer");
        }
        Ok(())
    })
}
