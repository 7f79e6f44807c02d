//! What is asked of etcd: list and watch leases, and the three transactions that make, change and delete our own key.
//!
//! One endpoint is spoken to at a time. The client's own balancer sends every second request to a server that is not
//! there, and one of flannel's two default endpoints usually is not.

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions,
    Identity, KeyValue, PutOptions, TlsOptions, Txn, TxnOp, WatchOptions, WatchResponse,
};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::schema::{Keys, Subnets};
use crate::lease::backoff::{Backoff, random};

/// Longer than any healthy server needs for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Longer than any healthy server needs to take a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// A server that does not answer to a ping of the connection is gone. Servers refuse more than one in 5 s.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// A watch that was good for this long is no failure when it ends.
const GOOD: Duration = Duration::from_secs(2);
/// The longest answer taken; 4 MB, the client's usual, is a list of 20,000 leases.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// All is listed again after this long, and up to once more of it, in case news was lost.
const RELIST: Duration = Duration::from_secs(600);

/// Where etcd is, and who we are there.
#[derive(Debug, Clone)]
pub struct Access {
    /// URLs, or hosts with ports; never empty.
    pub endpoints: Vec<String>,
    /// Where the keys are.
    pub keys: Keys,
    /// `--etcd-username` and `--etcd-password`.
    pub user: Option<(String, String)>,
    /// `--etcd-certfile` and `--etcd-keyfile`.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// `--etcd-cafile`; without, the system's authorities are trusted.
    pub ca: Option<PathBuf>,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// No connection, no answer, or a refusal.
    #[error("etcd {endpoint}: {what}: {problem}")]
    Failed {
        /// Who was asked.
        endpoint: String,
        /// For what.
        what: &'static str,
        /// The error with its causes.
        problem: String,
    },
    /// The history does not go back so far, or is another.
    #[error("etcd {0}: the history of the leases is cut off: all are listed again")]
    Gone(String),
}

/// A connection to one endpoint.
#[derive(Clone)]
pub(super) struct Connection {
    endpoint: Arc<str>,
    client: Client,
}

impl core::fmt::Debug for Connection {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Connection({})", self.endpoint)
    }
}

impl Access {
    /// The endpoint with its scheme. `http://` is never TLS, whatever certificates there are, as with flannel.
    fn url(&self, endpoint: &str) -> Result<(String, bool), String> {
        match endpoint.split_once("://") {
            Some(("http", _)) => Ok((endpoint.to_owned(), false)),
            Some(("https", _)) => Ok((endpoint.to_owned(), true)),
            Some((scheme, _)) => Err(format!(
                "{scheme}:// is not known: write --etcd-endpoints with http:// or https://"
            )),
            None if self.identity.is_some() => Ok((format!("https://{endpoint}"), true)),
            None => Ok((format!("http://{endpoint}"), false)),
        }
    }

    /// Files are read for each connection: certificates are replaced while we run.
    fn tls(&self) -> Result<TlsOptions, String> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let mut tls = TlsOptions::new();
        tls = match &self.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(read(ca)?)),
            None => tls.with_native_roots(),
        };
        if let Some((certificate, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(tls)
    }

    /// Connects to one endpoint, and logs in.
    pub(super) async fn connect(&self, endpoint: &str) -> Result<Connection, ApiError> {
        const WHAT: &str = "connect";
        let failed = |problem: String| ApiError::Failed {
            endpoint: endpoint.to_owned(),
            what: WHAT,
            problem,
        };
        let (url, is_secure) = self.url(endpoint).map_err(failed)?;
        // A member that has lost its leader must say so, or it would tell of nothing for ever.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING.0, PING.1)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if is_secure {
            options = options.with_tls(self.tls().map_err(failed)?);
        }
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        let client = answer(endpoint, WHAT, Client::connect([url], Some(options))).await?;
        Ok(Connection {
            endpoint: endpoint.into(),
            client,
        })
    }
}

/// Waits for an answer, but not for ever.
async fn answer<T>(
    endpoint: &str,
    what: &'static str,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, ApiError> {
    let problem = match timeout(ANSWER, request).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => described(error),
        Err(_late) => format!("no answer for {} s", ANSWER.as_secs()),
    };
    Err(ApiError::Failed {
        endpoint: endpoint.to_owned(),
        what,
        problem,
    })
}

/// The client's errors do not tell their causes by themselves.
fn described(error: Error) -> String {
    match error {
        Error::TransportError(error) => crate::explained(&error.into()),
        Error::GRpcStatus(status) => {
            let mut text = status.message().to_owned();
            let mut source = core::error::Error::source(&status);
            while let Some(error) = source {
                let cause = error.to_string();
                if !text.contains(&cause) {
                    text = format!("{text}: {cause}");
                }
                source = error.source();
            }
            if [
                "authentication failed",
                "permission denied",
                "user name is empty",
                "invalid auth token",
            ]
            .iter()
            .any(|sign| text.contains(sign))
            {
                text.push_str(": check --etcd-username, --etcd-password and that user's role");
            }
            text
        }
        error @ (Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::IoError(_)
        | Error::WatchError(_)
        | Error::Utf8Error(_)
        | Error::LeaseKeepAliveError(_)
        | Error::ElectError(_)
        | Error::InvalidMetadataValue(_)
        | Error::EndpointError(_)
        | Error::EndpointsNotManaged
        | Error::Internal(_)) => error.to_string(),
    }
}

/// A key and its value as etcd tells them.
#[derive(Debug)]
pub(super) struct Raw {
    /// Last part of the key.
    pub(super) name: String,
    pub(super) value: Vec<u8>,
    pub(super) created: i64,
    pub(super) changed: i64,
    pub(super) lease: i64,
}

impl Raw {
    fn new(kv: &KeyValue, subnets: &str) -> Self {
        let key = String::from_utf8_lossy(kv.key());
        Self {
            name: key.strip_prefix(subnets).unwrap_or(&key).to_owned(),
            value: kv.value().to_vec(),
            created: kv.create_revision(),
            changed: kv.mod_revision(),
            lease: kv.lease(),
        }
    }
}

/// What the follower tells, and what came of what was asked meanwhile.
#[derive(Debug)]
pub(super) enum News {
    /// This connection stands.
    Connected(Box<Connection>),
    /// These are all leases, at a revision.
    Listed(i64, Vec<Raw>),
    /// A lease is there, or is different.
    Put(Raw),
    /// A lease is gone since a revision.
    Deleted(i64, String),
    /// What the network configuration says.
    Config(Option<Vec<u8>>),
    /// Nobody answers, and why.
    Trouble(String),
    /// Somebody does.
    Fine,
    /// What came of a write.
    Wrote(Result<Outcome, ApiError>),
    /// What came of keeping an etcd lease alive: its id, when that was asked, and for how long it lives; 0 is gone.
    Kept(i64, Instant, Result<i64, ApiError>),
}

/// A write to our own key. Each compares with what it was decided upon, so it never takes what another has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Write {
    /// Makes it, if neither it nor a rival is there.
    Create {
        subnets: Subnets,
        name: String,
        rivals: String,
        value: String,
        ttl: Duration,
    },
    /// Changes its value, if nobody has since `changed`.
    Update {
        name: String,
        changed: i64,
        value: String,
        lease: i64,
    },
    /// Deletes it, if nobody has changed it.
    Delete { name: String, changed: i64 },
}

impl core::fmt::Display for Write {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Create { name, value, .. } => write!(f, "make {name} with {value}"),
            Self::Update { name, value, .. } => write!(f, "change {name} to {value}"),
            Self::Delete { name, .. } => write!(f, "delete {name}"),
        }
    }
}

/// How a write ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is in force since this revision, with this etcd lease if it made one.
    Won(i64, Option<(i64, Instant, Duration)>),
    /// Another was faster.
    Lost,
}

impl Connection {
    async fn ask<T>(
        &self,
        what: &'static str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, ApiError> {
        answer(&self.endpoint, what, request).await
    }

    /// The network configuration; nothing if the key is not there.
    pub(super) async fn config(&self, keys: &Keys) -> Result<Option<Vec<u8>>, ApiError> {
        let mut kv = self.client.kv_client();
        let found = self.ask("get the network configuration", kv.get(keys.config(), None));
        let found = found.await?;
        Ok(found.kvs().first().map(|kv| kv.value().to_vec()))
    }

    /// All leases, the revision at which they are so, and which cluster says it.
    async fn list(&self, keys: &Keys) -> Result<(Position, Vec<Raw>), ApiError> {
        let mut kv = self
            .client
            .kv_client()
            .max_decoding_message_size(ANSWER_BYTES_MAX);
        let (prefix, options) = (keys.subnets(), GetOptions::new().with_prefix());
        let list = self.ask("list leases", kv.get(prefix.as_str(), Some(options)));
        let list = list.await?;
        let raws = list.kvs().iter().map(|kv| Raw::new(kv, &prefix)).collect();
        let position = list
            .header()
            .map_or_else(Position::default, |header| Position {
                cluster: header.cluster_id(),
                revision: header.revision(),
            });
        Ok((position, raws))
    }

    /// Carries out a write.
    pub(super) async fn write(&self, keys: &Keys, write: Write) -> Result<Outcome, ApiError> {
        let key = |name: &str| format!("{}{name}", keys.subnets());
        let unchanged =
            |name: &str, changed| Compare::mod_revision(key(name), CompareOp::Equal, changed);
        let mut granted = None;
        let (what, txn) = match &write {
            Write::Create {
                name,
                rivals,
                value,
                ttl,
                subnets: _,
            } => {
                let asked = Instant::now();
                let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
                let mut leases = self.client.lease_client();
                let grant = self.ask("grant an etcd lease", leases.grant(seconds, None));
                let grant = grant.await?;
                granted = Some((grant.id(), asked, duration(grant.ttl())));
                let options = PutOptions::new().with_lease(grant.id());
                let absent = Compare::version(key(name), CompareOp::Equal, 0);
                let alone = Compare::version(rivals.as_str(), CompareOp::Equal, 0).with_prefix();
                let put = TxnOp::put(key(name), value.as_str(), Some(options));
                (
                    "create our lease",
                    Txn::new().when([absent, alone]).and_then([put]),
                )
            }
            Write::Update {
                name,
                changed,
                value,
                lease,
            } => {
                let options = PutOptions::new().with_lease(*lease);
                let put = TxnOp::put(key(name), value.as_str(), Some(options));
                let txn = Txn::new().when([unchanged(name, *changed)]);
                ("change our lease", txn.and_then([put]))
            }
            Write::Delete { name, changed } => {
                let txn = Txn::new().when([unchanged(name, *changed)]);
                let delete = TxnOp::delete(key(name), None);
                ("delete our lease", txn.and_then([delete]))
            }
        };
        let mut kv = self.client.kv_client();
        let answer = self.ask(what, kv.txn(txn)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        if answer.succeeded() {
            return Ok(Outcome::Won(revision, granted));
        }
        if let Some((id, ..)) = granted {
            // Otherwise it would end by itself, a day later.
            let _ends_anyway = self
                .ask(
                    "revoke an etcd lease",
                    self.client.lease_client().revoke(id),
                )
                .await;
        }
        Ok(Outcome::Lost)
    }

    /// Keeps an etcd lease alive; for how many seconds it lives from now on, 0 if it is gone.
    pub(super) async fn keep(&self, lease: i64) -> Result<i64, ApiError> {
        let mut leases = self.client.lease_client();
        let kept = async {
            // The client keeps the first answer to itself.
            let (mut keeper, mut answers) = match leases.keep_alive(lease).await {
                Err(Error::LeaseKeepAliveError(_)) => return Ok(0),
                other => other?,
            };
            keeper.keep_alive().await?;
            Ok(answers.message().await?.map_or(0, |answer| answer.ttl()))
        };
        self.ask("renew our lease", kept).await
    }
}

fn duration(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// How far the leases are known, and whose they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Position {
    cluster: u64,
    revision: i64,
}

/// Follows the leases.
#[derive(Debug, Clone)]
pub(super) struct Follower {
    pub(super) access: Access,
    /// A watch that does not even answer for so long is given up, and all is listed.
    pub(super) silent: Duration,
}

impl Follower {
    /// Follows all leases until nobody listens.
    pub(super) async fn run(self, out: mpsc::Sender<News>) {
        let mut backoff = Backoff::default();
        let (mut position, mut failures) = (None, 0usize);
        let count = self.access.endpoints.len().max(1);
        for endpoint in self.access.endpoints.iter().cycle() {
            loop {
                let mut fine = None;
                let end = self.session(endpoint, &mut position, &mut fine, &out).await;
                if out.is_closed() {
                    return;
                }
                if fine.is_some_and(|since: Instant| since.elapsed() >= GOOD) {
                    backoff.reset();
                    failures = 0;
                }
                let error = match end {
                    Ok(()) => continue,
                    Err(error) => error,
                };
                failures += 1;
                if let ApiError::Gone(_) = error {
                    tracing::info!("{error}");
                    position = None;
                    tokio::time::sleep(backoff.next()).await;
                    continue;
                }
                // One that is not there is no trouble as long as another is, and one failure may be chance.
                if failures > count {
                    let _closed = out.send(News::Trouble(error.to_string())).await;
                }
                if failures.is_multiple_of(count) {
                    tokio::time::sleep(backoff.next()).await;
                }
                break;
            }
        }
    }

    /// One connection, as long as it is good, and since when it is. Without error: all is to be listed again.
    async fn session(
        &self,
        endpoint: &str,
        position: &mut Option<Position>,
        fine: &mut Option<Instant>,
        out: &mpsc::Sender<News>,
    ) -> Result<(), ApiError> {
        const WHAT: &str = "watch leases";
        let keys = &self.access.keys;
        let connection = self.access.connect(endpoint).await?;
        let tell = async |news: News| {
            // Whether anybody listens is asked by the caller.
            let _closed = out.send(news).await;
        };
        tell(News::Connected(Box::new(connection.clone()))).await;
        let mut at = match *position {
            Some(at) => at,
            None => {
                let (at, raws) = connection.list(keys).await?;
                *position = Some(at);
                tell(News::Listed(at.revision, raws)).await;
                // After the list: a change in between comes again by the watch.
                tell(News::Config(connection.config(keys).await?)).await;
                at
            }
        };
        let mut watch = connection
            .client
            .watch_client()
            .max_decoding_message_size(ANSWER_BYTES_MAX);
        let options = || {
            WatchOptions::new()
                .with_start_revision(at.revision + 1)
                .with_progress_notify()
        };
        let stream = watch.watch(keys.subnets(), Some(options().with_prefix()));
        let (mut requests, mut responses) = connection.ask(WHAT, stream).await?.split();
        let also = requests.watch(keys.config(), Some(options()));
        connection.ask(WHAT, also).await?;
        let list_again = Instant::now() + RELIST + RELIST.mul_f64(f64::from(spread()));
        let mut heard = Instant::now();
        while !out.is_closed() {
            if Instant::now() >= list_again {
                *position = None;
                return Ok(());
            }
            let next = timeout(self.silent / 4, responses.message()).await;
            let response = match next {
                Ok(Ok(Some(response))) => response,
                Ok(Ok(None)) => {
                    let ended = async { Err(Error::WatchError("the server ended it".to_owned())) };
                    return connection.ask(WHAT, ended).await;
                }
                Ok(Err(error)) => return connection.ask(WHAT, async { Err(error) }).await,
                Err(_quiet) if heard.elapsed() >= self.silent => {
                    // It may be waiting for a revision that will not come.
                    *position = None;
                    let silent = format!("nothing heard for {} s", heard.elapsed().as_secs());
                    let silent = async { Err(Error::WatchError(silent)) };
                    return connection.ask(WHAT, silent).await;
                }
                Err(_quiet) => {
                    connection.ask(WHAT, requests.request_progress()).await?;
                    continue;
                }
            };
            heard = Instant::now();
            self.check(&connection, &response, at)?;
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                at.revision = at.revision.max(kv.mod_revision());
                let is_put = event.event_type() == EventType::Put;
                let raw = Raw::new(kv, &keys.subnets());
                tell(match (is_put, kv.key() == keys.config().as_bytes()) {
                    (true, true) => News::Config(Some(raw.value)),
                    (false, true) => News::Config(None),
                    (true, false) => News::Put(raw),
                    (false, false) => News::Deleted(raw.changed, raw.name),
                })
                .await;
            }
            *position = Some(at);
            if fine.replace(fine.unwrap_or(heard)).is_none() {
                tell(News::Fine).await;
            }
        }
        Ok(())
    }

    /// Whether a watch goes on, from where we are.
    fn check(
        &self,
        connection: &Connection,
        response: &WatchResponse,
        at: Position,
    ) -> Result<(), ApiError> {
        let gone = || Err(ApiError::Gone(connection.endpoint.to_string()));
        if response.compact_revision() != 0 {
            return gone();
        }
        if response.canceled() {
            return Err(ApiError::Failed {
                endpoint: connection.endpoint.to_string(),
                what: "watch leases",
                problem: response.cancel_reason().to_owned(),
            });
        }
        match response.header() {
            // Another past than the one that we know: an etcd that was made anew, or from a backup.
            Some(header)
                if response.created()
                    && (header.revision() < at.revision || header.cluster_id() != at.cluster) =>
            {
                gone()
            }
            _ => Ok(()),
        }
    }
}

/// A number from 0 to 1, so that nodes do not come all at once.
fn spread() -> f32 {
    let sixteen = u16::try_from(random() & 0xffff).unwrap_or(0);
    f32::from(sixteen) / f32::from(u16::MAX)
}
