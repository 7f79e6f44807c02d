//! Nodes that know each other by the Kubernetes API alone: pods talk, and go on when the API server is killed.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0
//!            \      ║       /
//!             \     n3 ─ n3p0
//!              API service of the tests, or a relay to the API server of RIPSTOP_TEST_KUBECONFIG
//! ```

#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "it is made for more tests than this one")]
#[path = "../../controlplane/tests/common/api.rs"]
mod api;
#[expect(dead_code, reason = "it is made for more tests than this one")]
#[path = "../../controlplane/tests/common/cluster.rs"]
mod cluster;

use core::time::Duration;
use std::fs;
use std::net::TcpListener;
use std::thread::sleep;

use anyhow::{Context as _, Result};
use cluster::Cluster;
use ripstop_perf::{Host, Lab, Ping, UdpFlow, wait_until};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn pods_talk_without_a_lease_file_and_without_the_api_server() -> Result<()> {
    Lab::builder().name("kube").ripstop(3).pods(1).run(|lab| {
        let address = (lab.fabric().address(), 0);
        let listener = lab.fabric().netns().run(|| TcpListener::bind(address))?;
        let cluster = Cluster::new(listener.context("listen in the fabric")?);
        let kubeconfig = lab.dir().join("kubeconfig");
        fs::write(&kubeconfig, cluster.kubeconfig()).context("kubeconfig")?;
        let kubeconfig = kubeconfig.to_str().context("path")?;
        for node in lab.nodes() {
            let subnet = node.lease().subnet.context("subnet")?;
            cluster.create(node.name(), &[&subnet], &json!({}));
        }
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            let (name, prefix) = (cluster.name(node.name()), cluster.prefix());
            node.start_controlplane_with(&[
                "--kube-subnet-mgr",
                "--kubeconfig-file",
                kubeconfig,
                "--node-name",
                &name,
                "--kube-annotation-prefix",
                &prefix,
            ])?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(2)?;
        }
        wait_until(
            "all nodes say that their network is there",
            PATIENCE,
            || {
                lab.nodes().iter().all(|node| {
                    let condition = cluster.condition(node.name(), "NetworkUnavailable");
                    condition["status"] == "False"
                })
            },
        )?;
        for (from, to) in [(1, 2), (2, 3), (3, 1)] {
            let ping = Ping::new(lab.pod(from, 0), lab.pod(to, 0));
            assert_eq!(ping.run()?.received, 1, "from n{from} to n{to}");
        }
        let (one, other) = (lab.pod(1, 0), lab.pod(2, 0));
        let traffic = UdpFlow::new(one, other).flows(4).rate(2000).start()?;
        wait_until("traffic flows", PATIENCE, || {
            traffic.snapshot().received > 100
        })?;
        // Connections are cut and nobody answers any more, which is more than a restart does.
        cluster.set_down(true);
        sleep(Duration::from_secs(5));
        let report = traffic.stop();
        println!("without an API server: {report}");
        assert!(report.is_perfect(), "{report}");
        for node in lab.ripstop_nodes() {
            assert_eq!(node.detour()?.len(), 2, "the workers keep the peers");
        }
        Ok(())
    })
}
