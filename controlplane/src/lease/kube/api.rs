//! The four things asked of the API server: list nodes, watch them, patch our own, and once, which node a pod is on.

use core::time::Duration;
use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use futures_util::{AsyncReadExt as _, FutureExt as _, StreamExt as _};
use kube::Client;
use kube::api::WatchEvent;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::annotations::Prefix;
use super::node::{Node, Page, RawNode, read_page};
use super::{KubeError, Server};
use crate::lease::backoff::{Backoff, random};

/// Nodes asked for at once, as flannel does.
const PAGE: u32 = 500;
/// Longer than any healthy server needs for the first byte of an answer, or for the next of a list.
const ANSWER: Duration = Duration::from_secs(15);
/// Size and number of the pieces in which a list is handed to its decoder.
const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 2;
/// A watch that was good for this long, or told something, is no failure when it ends.
const GOOD: Duration = Duration::from_secs(2);

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// The server says no.
    #[error("{what}: the API server answers {code}: {message}{}", hint(*.code))]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// No server, no connection, or no complete answer.
    #[error("{what}: {problem}")]
    Failed {
        /// What was asked for.
        what: &'static str,
        /// The error with its causes.
        problem: String,
    },
}

fn hint(code: u16) -> &'static str {
    match code {
        401 => ": check the credentials (kubeconfig or service account token)",
        403 => {
            ": the ClusterRole needs list and watch of nodes, patch of nodes/status and get of pods"
        }
        _ => "",
    }
}

/// What to do about a connection that did not come about, as rustls tells it.
fn remedy(problem: &str) -> &'static str {
    let has = |word: &str| problem.contains(word);
    if has("UnknownIssuer") || has("BadSignature") {
        ": the server's certificate is not signed by the certificate authority given (certificate-authority in the kubeconfig, or the service account's ca.crt)"
    } else if has("NotValidForName") || has("not valid for name") {
        ": the server's certificate is for another name or address: correct the URL, or set tls-server-name in the kubeconfig"
    } else if ["xpired", "NotValidYet", "not valid yet"]
        .into_iter()
        .any(has)
    {
        ": renew the server's certificate, or set the clock"
    } else if has("received fatal alert") {
        ": the server does not take our certificate (client-certificate in the kubeconfig), or does not know it"
    } else {
        ""
    }
}

async fn connect(server: &Server) -> Result<Client, KubeError> {
    let config = server.load().await?;
    Client::try_from(config).map_err(|error| KubeError::Client(Box::new(error)))
}

impl ApiError {
    fn new(what: &'static str, error: kube::Error) -> Self {
        if let kube::Error::Api(status) = error {
            let (code, message) = (status.code, status.message);
            Self::Refused {
                what,
                code,
                message,
            }
        } else {
            let mut problem = crate::explained(&error.into());
            problem.push_str(remedy(&problem));
            Self::Failed { what, problem }
        }
    }

    /// Fresh credentials or certificates may be the cure.
    fn is_about_trust(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == 401,
            Self::Failed { problem, .. } => {
                problem.contains("certificate") || problem.contains("fatal alert")
            }
        }
    }

    /// Adds what else is wrong.
    fn with(self, more: &KubeError) -> Self {
        match self {
            Self::Refused {
                what,
                code,
                message,
            } => Self::Refused {
                what,
                code,
                message: format!("{message}; {more}"),
            },
            Self::Failed { what, problem } => Self::Failed {
                what,
                problem: format!("{problem}; {more}"),
            },
        }
    }

    fn silent(what: &'static str) -> Self {
        let problem = format!("no answer for {} s", ANSWER.as_secs());
        Self::Failed { what, problem }
    }

    /// What was asked for is too long ago for the server to know.
    fn is_gone(&self) -> bool {
        matches!(self, Self::Refused { code: 410, .. })
    }
}

/// What the follower tells about the cluster.
#[derive(Debug)]
pub(super) enum News {
    /// These are all nodes.
    Listed(Vec<Node>),
    /// This node is there, or is different.
    Applied(Node),
    /// This one is gone.
    Deleted(String),
    /// The server cannot be asked, and why; and whether certificates or credentials are at fault.
    Trouble(String, bool),
    /// It can.
    Fine,
    /// Our addresses may be others.
    Kernel,
    /// What came of a patch.
    Patched(Result<(), ApiError>),
}

/// From where a list may come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Age {
    /// Anything the server has in memory.
    Any,
    /// What it has in memory, if that is not older than what we have seen.
    NotOlder(String),
    /// What is in force.
    Latest,
}

/// How a watch ended that did not fail.
#[derive(Debug)]
enum End {
    /// The server closed it, as it does now and then.
    Closed,
    /// It said nothing for too long.
    Silent,
}

/// The API as seen by one node.
#[derive(Clone)]
pub(super) struct Api {
    server: Server,
    /// Made anew when the server does not take our credentials, or we not its certificate.
    client: Arc<RwLock<Client>>,
    prefix: Arc<Prefix>,
    own: Arc<str>,
    /// A watch that says nothing for so long is given up, and all nodes are listed.
    silent: Duration,
}

impl Api {
    pub(super) async fn new(
        server: Server,
        prefix: Arc<Prefix>,
        own: Arc<str>,
        silent: Duration,
    ) -> Result<Self, KubeError> {
        let client = connect(&server).await?;
        Ok(Self {
            server,
            client: Arc::new(RwLock::new(client)),
            prefix,
            own,
            silent,
        })
    }

    fn client(&self) -> Client {
        let client = self.client.read();
        client.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads certificates, keys and tokens anew, if that may help: they are replaced before they expire.
    pub(super) async fn mend(&self, error: ApiError) -> ApiError {
        if !error.is_about_trust() {
            return error;
        }
        match connect(&self.server).await {
            Ok(client) => {
                self.replace(client);
                error
            }
            Err(cannot) => error.with(&cannot),
        }
    }

    /// Makes a client that has no connections yet; false if that takes more than reading files.
    pub(super) fn connect_anew(&self) -> bool {
        let client = connect(&self.server).now_or_never().and_then(Result::ok);
        let made = client.is_some();
        client.into_iter().for_each(|client| self.replace(client));
        made
    }

    fn replace(&self, client: Client) {
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
    }

    /// Follows all nodes until nobody listens.
    pub(super) async fn follow(self, out: mpsc::Sender<News>) {
        let mut backoff = Backoff::default();
        let mut age = Age::Any;
        while !out.is_closed() {
            let mut next: fn(String) -> Age = Age::NotOlder;
            let mut version = match self.list(&age).await {
                Ok((version, nodes)) => {
                    if out.send(News::Listed(nodes)).await.is_err() {
                        return;
                    }
                    version
                }
                Err(error) => {
                    // A server that does not know that version any more, or not yet, knows what is in force.
                    if matches!(error, ApiError::Refused { .. }) && age != Age::Any {
                        age = Age::Latest;
                    }
                    self.pause(&mut backoff, error, &out).await;
                    continue;
                }
            };
            while !out.is_closed() {
                let start = Instant::now();
                let before = version.clone();
                let end = self.watch(&mut version, &mut backoff, &out).await;
                let good = version != before || start.elapsed() >= GOOD;
                if good {
                    backoff.reset();
                }
                match end {
                    Ok(End::Closed) if good => {}
                    Ok(End::Closed) => tokio::time::sleep(backoff.next()).await,
                    // It may be waiting for a version that will not come.
                    Ok(End::Silent) => break,
                    Err(error) if error.is_gone() => {
                        tokio::time::sleep(backoff.next()).await;
                        break;
                    }
                    Err(error) => {
                        self.pause(&mut backoff, error, &out).await;
                        if self.is_ahead(&version).await {
                            next = |_| Age::Latest;
                            break;
                        }
                    }
                }
            }
            age = next(version);
        }
    }

    /// Whether the cluster's version is before `version`: it then has another past, and a watch from there waits for long.
    async fn is_ahead(&self, version: &str) -> bool {
        let number = |text: &str| text.parse::<u64>().ok();
        let theirs = self.page("/api/v1/nodes?limit=1").await;
        let theirs = theirs.ok().and_then(|page| number(&page.version));
        theirs.is_some_and(|theirs| number(version).is_some_and(|ours| theirs < ours))
    }

    /// Waits after a failure; from the second in a row on it is worth a word.
    async fn pause(&self, backoff: &mut Backoff, error: ApiError, out: &mpsc::Sender<News>) {
        let error = self.mend(error).await;
        if backoff.failures() > 0 {
            let _closed = out
                .send(News::Trouble(error.to_string(), error.is_about_trust()))
                .await;
        }
        tokio::time::sleep(backoff.next()).await;
    }

    /// All nodes, and the version at which they are so.
    async fn list(&self, age: &Age) -> Result<(String, Vec<Node>), ApiError> {
        let mut nodes = Vec::new();
        let mut more: Option<String> = None;
        loop {
            let from = match (&more, age) {
                (Some(token), _) => format!("&continue={}", encoded(token)),
                (None, Age::Any) => "&resourceVersion=0".to_owned(),
                (None, Age::NotOlder(version)) => {
                    format!(
                        "&resourceVersion={}&resourceVersionMatch=NotOlderThan",
                        encoded(version)
                    )
                }
                (None, Age::Latest) => String::new(),
            };
            let page = self
                .page(&format!("/api/v1/nodes?limit={PAGE}{from}"))
                .await?;
            nodes.extend(page.nodes);
            more = page.more;
            if more.is_none() {
                return Ok((page.version, nodes));
            }
        }
    }

    async fn page(&self, uri: &str) -> Result<Page, ApiError> {
        const WHAT: &str = "list nodes";
        let stream = timeout(
            ANSWER,
            self.client()
                .request_stream(request("GET", uri, Vec::new())?),
        )
        .await;
        let stream = stream.map_err(|_late| ApiError::silent(WHAT))?;
        let stream = stream.map_err(|error| ApiError::new(WHAT, error))?;
        let mut stream = core::pin::pin!(stream);
        let (chunks, received) = mpsc::channel(CHUNKS);
        let (prefix, own) = (Arc::clone(&self.prefix), Arc::clone(&self.own));
        let decoder = tokio::task::spawn_blocking(move || {
            let chunks = Chunks {
                received,
                rest: VecDeque::new(),
            };
            read_page(std::io::BufReader::new(chunks), &prefix, &own)
        });
        let failed = |problem: String| ApiError::Failed {
            what: WHAT,
            problem,
        };
        loop {
            let mut chunk = vec![0; CHUNK];
            let read = timeout(ANSWER, stream.read(&mut chunk)).await;
            let read = read.map_err(|_late| ApiError::silent(WHAT))?;
            match read.map_err(|error| failed(crate::explained(&error.into())))? {
                0 => break,
                length => chunk.truncate(length),
            }
            // A decoder that has ended has its reasons, which it tells below.
            if chunks.send(chunk).await.is_err() {
                break;
            }
        }
        drop(chunks);
        match decoder.await {
            Ok(page) => page.map_err(|error| failed(format!("the answer cannot be read: {error}"))),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Watches from `version` on, and moves it along, until the watch ends.
    async fn watch(
        &self,
        version: &mut String,
        backoff: &mut Backoff,
        out: &mpsc::Sender<News>,
    ) -> Result<End, ApiError> {
        const WHAT: &str = "watch nodes";
        // Spread, so that servers do not see all nodes come back at once.
        let seconds = 300 + random() % 300;
        let uri = format!(
            "/api/v1/nodes?allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={seconds}&watch=true",
            encoded(version)
        );
        let events = timeout(
            ANSWER,
            self.client()
                .request_events::<RawNode>(request("GET", &uri, Vec::new())?),
        )
        .await;
        let events = events.map_err(|_late| ApiError::silent(WHAT))?;
        let events = events.map_err(|error| ApiError::new(WHAT, error))?;
        if out.send(News::Fine).await.is_err() {
            return Ok(End::Closed);
        }
        let mut events = core::pin::pin!(events);
        loop {
            let event = match timeout(self.silent, events.next()).await {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(End::Closed),
                Err(_silent) => return Ok(End::Silent),
            };
            let news = match event.map_err(|error| ApiError::new(WHAT, error))? {
                WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
                    raw.resource_version().clone_into(version);
                    News::Applied(Node::keep(raw, &self.prefix, &self.own))
                }
                WatchEvent::Deleted(raw) => {
                    raw.resource_version().clone_into(version);
                    News::Deleted(raw.name().to_owned())
                }
                WatchEvent::Bookmark(bookmark) => {
                    *version = bookmark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) => {
                    return Err(ApiError::new(WHAT, kube::Error::Api(status)));
                }
            };
            backoff.reset();
            if out.send(news).await.is_err() {
                return Ok(End::Closed);
            }
        }
    }

    /// Patches the status of our own node.
    pub(super) async fn patch(&self, body: Vec<u8>) -> Result<(), ApiError> {
        const WHAT: &str = "patch nodes/status";
        let uri = format!("/api/v1/nodes/{}/status", self.own);
        let answer = timeout(
            ANSWER,
            self.client().request_text(request("PATCH", &uri, body)?),
        )
        .await;
        let answer = answer.map_err(|_late| ApiError::silent(WHAT))?;
        answer.map(drop).map_err(|error| ApiError::new(WHAT, error))
    }

    /// The node that a pod is on.
    pub(super) async fn node_of_pod(&self, namespace: &str, pod: &str) -> Result<String, ApiError> {
        const WHAT: &str = "get pod";
        #[derive(serde::Deserialize)]
        struct Pod {
            spec: Spec,
        }
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec {
            #[serde(default)]
            node_name: String,
        }
        let uri = format!(
            "/api/v1/namespaces/{}/pods/{}",
            encoded(namespace),
            encoded(pod)
        );
        let answer = timeout(
            ANSWER,
            self.client()
                .request::<Pod>(request("GET", &uri, Vec::new())?),
        )
        .await;
        let answer = answer.map_err(|_late| ApiError::silent(WHAT))?;
        Ok(answer
            .map_err(|error| ApiError::new(WHAT, error))?
            .spec
            .node_name)
    }
}

fn request(method: &str, uri: &str, body: Vec<u8>) -> Result<http::Request<Vec<u8>>, ApiError> {
    let mut request = http::Request::builder().method(method).uri(uri);
    if !body.is_empty() {
        request = request.header(
            http::header::CONTENT_TYPE,
            "application/strategic-merge-patch+json",
        );
    }
    request.body(body).map_err(|error| ApiError::Failed {
        what: "make a request",
        problem: error.to_string(),
    })
}

/// A value as it may stand in a query (RFC 3986, 2.3: what is not unreserved is encoded).
fn encoded(text: &str) -> String {
    use core::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _infallible = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// A list that arrives in pieces, as a reader for the thread that decodes it.
struct Chunks {
    received: mpsc::Receiver<Vec<u8>>,
    rest: VecDeque<u8>,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.received.blocking_recv().unwrap_or_default().into();
        }
        self.rest.read(buffer)
    }
}
