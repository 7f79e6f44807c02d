//! The control plane's API service for tests, on the fabric of a lab.

#[expect(dead_code, reason = "it is made for more tests than one")]
#[path = "../../../controlplane/tests/common/api.rs"]
pub(crate) mod api;

use std::fs;
use std::net::TcpListener;

use anyhow::{Context as _, Result};
use api::Api;
use ripstop_perf::{Host as _, Lab};

/// Serves on the fabric; the service, and the kubeconfig by which nodes find it.
pub(crate) fn serve(lab: &Lab) -> Result<(Api, String)> {
    let address = (lab.fabric().address(), 0);
    let listener = lab.fabric().netns().run(|| TcpListener::bind(address))?;
    let api = Api::serve(listener.context("listen in the fabric")?);
    let kubeconfig = lab.dir().join("kubeconfig");
    fs::write(&kubeconfig, api.kubeconfig()).context("kubeconfig")?;
    let kubeconfig = kubeconfig.to_str().context("path")?.to_owned();
    Ok((api, kubeconfig))
}
