//! Nodes that know each other by etcd alone: they take leases, pods talk, and go on whatever happens to etcd.
//!
//! ```text
//!   n1p0 ─ n1 ═══ fabric ═══ n2 ─ n2p0
//!            \      │  \    /
//!              etcd      n3 ─ n3p0
//! ```
//!
//! The lab has its pods before there are leases; so each node finds the subnet of its pods in `subnet.env`, as after a
//! restart, and takes it by a transaction.

#![expect(clippy::print_stdout, reason = "how long each took is worth reading")]
#![expect(
    clippy::panic_in_result_fn,
    reason = "a test asserts; what only has to work goes through `?`"
)]

#[expect(dead_code, reason = "it is made for more tests than this one")]
#[path = "../../controlplane/tests/common/etcd.rs"]
mod etcd;

use core::time::Duration;
use std::fs;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context as _, Result};
use etcd::{Entry, Etcd};
use ripstop_perf::{Host, Lab, Node, TrafficHandle, UdpFlow, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// The node's keys in etcd.
fn of(etcd: &Etcd, node: &Node) -> Vec<Entry> {
    let sign = format!(r#""{}""#, node.address());
    let entries = etcd.list(SUBNETS).into_iter();
    entries
        .filter(|entry| entry.value.contains(&sign))
        .collect()
}

/// Whether a node knows a peer's subnet.
fn knows(node: &Node, subnet: &str) -> bool {
    let leases = node.ripstop_text(&["leases"]);
    leases.is_ok_and(|text| text.contains(subnet))
}

/// Pods on all nodes send to their neighbours.
fn traffic(lab: &Lab, pairs: &[(u8, u8)]) -> Result<Vec<TrafficHandle>> {
    let mut runs = Vec::new();
    for &(from, to) in pairs {
        let flow = UdpFlow::new(lab.pod(from, 0), lab.pod(to, 0));
        runs.push(flow.flows(2).rate(500).start()?);
    }
    for run in &runs {
        wait_until("traffic flows", PATIENCE, || run.snapshot().received > 100)?;
    }
    Ok(runs)
}

fn assert_perfect(what: &str, runs: Vec<TrafficHandle>) {
    for run in runs {
        let report = run.stop();
        println!("{what}: {report}");
        assert!(report.is_perfect(), "{what}: {report}");
    }
}

#[test]
fn pods_talk_whatever_happens_to_etcd() -> Result<()> {
    Lab::builder().name("etcd").ripstop(3).pods(1).run(|lab| {
        let host = lab.fabric().address().to_string();
        let mut etcd = lab.fabric().netns().run(|| Etcd::start(&host))?;
        let url = etcd.url.clone();
        let conf = fs::read_to_string(lab.node(1).net_conf_file()).context("net-conf.json")?;
        etcd.put("/coreos.com/network/config", &conf);
        let file = |node: &Node| node.net_conf_file().with_file_name("subnet.env");
        for node in lab.nodes() {
            let n = node.index();
            let env = format!(
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{n}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
            );
            fs::write(file(node), env).context("subnet.env")?;
        }
        let start = Instant::now();
        for node in lab.ripstop_nodes() {
            node.start_dataplane()?;
            node.start_controlplane_with(&["--etcd-endpoints", &url])?;
        }
        for node in lab.ripstop_nodes() {
            node.wait_for_detour(2)?;
        }
        println!("three nodes have leases and forward after {:?}", start.elapsed());
        let key = |n: u8| format!("{SUBNETS}10.244.{n}.0-24");
        for node in lab.nodes() {
            let own = of(&etcd, node);
            assert_eq!(own.len(), 1, "{own:?}");
            assert_eq!(own[0].key, key(node.index()));
        }
        let all = [(1, 2), (2, 3), (3, 1)];
        let runs = traffic(lab, &all)?;

        etcd.kill();
        sleep(Duration::from_secs(5));
        // Where nobody looks, there is news, and the history before it is cut off.
        etcd.restart_at(&url.replace("2379", "3379"));
        let stranger = r#"{"PublicIP":"10.199.0.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;
        etcd.put(&key(99), stranger);
        etcd.compact();
        etcd.kill();
        etcd.restart_at(&url);
        let back = Instant::now();
        wait_until("all nodes have the news", PATIENCE, || {
            lab.nodes().iter().all(|node| knows(node, "10.244.99.0/24"))
        })?;
        println!("after a kill and a compaction all have the news {:?} after etcd's start", back.elapsed());

        let before = of(&etcd, lab.node(2)).remove(0);
        etcd.delete(&before.key);
        let deleted = Instant::now();
        let is_back = |before: &Entry| {
            let now = of(&etcd, lab.node(2)).pop();
            now.is_some_and(|now| now.created > before.created && now.key == before.key)
        };
        wait_until("the deleted lease is back", PATIENCE, || is_back(&before))?;
        println!("a deleted lease is back after {:?}", deleted.elapsed());
        let before = of(&etcd, lab.node(2)).remove(0);
        etcd.call(move |mut client| async move { client.lease_revoke(before.lease).await });
        let over = Instant::now();
        wait_until("the lease that was over is back", PATIENCE, || is_back(&before))?;
        println!("a lease that was over is back after {:?}", over.elapsed());
        for node in lab.nodes() {
            wait_until("both peers are in the detour", PATIENCE, || {
                node.detour().is_ok_and(|routes| routes.len() == 2)
            })?;
        }
        sleep(Duration::from_secs(1));
        assert_perfect("killed, compacted, deleted, over", runs);

        // Nobody who is robbed keeps what he had, but the others go on.
        let runs = traffic(lab, &[(1, 2), (2, 1)])?;
        let thief = stranger.replace("0.99", "0.98").replace(":99", ":98");
        etcd.put(&key(3), &thief);
        let stolen = Instant::now();
        let robbed = lab.node(3);
        wait_until("the robbed node has another lease", PATIENCE, || {
            of(&etcd, robbed).len() == 1
        })?;
        println!("the robbed node has another lease after {:?}", stolen.elapsed());
        let own = of(&etcd, robbed).remove(0);
        let name = own.key.strip_prefix(SUBNETS).context("key")?;
        let (address, _) = name.split_once('-').context("key")?;
        let subnet = name.replace('-', "/");
        wait_until("the others know it", PATIENCE, || {
            [1, 2].iter().all(|&n| knows(lab.node(n), &subnet))
        })?;
        wait_until("its new address answers", PATIENCE, || {
            let ping = ["ping", "-c", "1", "-W", "1", address];
            lab.pod(1, 0).output(&ping).is_ok()
        })?;
        println!("its new subnet {subnet} is reached {:?} after the theft", stolen.elapsed());
        let first = format!("{}.1", address.strip_suffix(".0").context("a /24")?);
        wait_until("subnet.env follows", PATIENCE, || {
            fs::read_to_string(file(robbed)).is_ok_and(|text| text.contains(&format!("={first}/24")))
        })?;
        // The pods that are cut off are named.
        wait_until("it says who is cut off", PATIENCE, || {
            robbed.controlplane_log().contains("lease 10.244.3.0/24 belongs to 10.199.0.98")
        })?;
        let key_now = etcd.list(&key(3));
        assert_eq!(key_now[0].value, thief, "the thief's key is the thief's");
        assert_perfect("one of three robbed", runs);
        Ok(())
    })
}
