//! `/healthz`, `/readyz` and `/metrics` over HTTP, on a thread of its own.
//!
//! It listens before any lease source is waited for, and answers from what the loop said last, so a slow API server or
//! a long round delays no probe. The bodies of the first two are flannel's, to the byte.

use core::convert::Infallible;
use core::time::Duration;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Health;
use super::metrics::Scraper;

/// Most connections at a time; what comes beyond them waits.
const CONNECTIONS: usize = 256;
/// A client that has not said what it wants by then is not worth a connection.
const HEADERS: Duration = Duration::from_secs(5);
/// Longest life of a connection.
const CONNECTION: Duration = Duration::from_secs(30);
/// The wait after a connection could not be taken, such as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Where to listen.
#[derive(Debug, Clone, clap::Args)]
pub struct HealthFlags {
    /// Address of /healthz, /readyz and /metrics
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub healthz_ip: String,
    /// Port of /healthz, /readyz and /metrics; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub healthz_port: u16,
}

/// Why there is no health server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address means nothing.
    #[error(
        "--healthz-ip {0:?} is not an address: write one of this node's, or 0.0.0.0 or :: for all"
    )]
    Address(String),
    /// The kernel refuses.
    #[error("health server: listen on {address}: {source}: {}", hint(.source))]
    Listen {
        /// Where.
        address: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No thread or runtime for it.
    #[error("health server: start: {0}")]
    Start(#[from] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::AddrInUse {
        "another program has the port (a flanneld that still runs?): stop it, or choose another with --healthz-port"
    } else if error.kind() == io::ErrorKind::AddrNotAvailable {
        "this node has no such address: correct --healthz-ip"
    } else {
        "correct --healthz-ip and --healthz-port"
    }
}

/// Takes the address; none if the port is 0.
///
/// # Errors
/// When it is no address, or cannot be had.
pub fn listen(flags: &HealthFlags) -> Result<Option<TcpListener>, ServerError> {
    let HealthFlags {
        healthz_ip,
        healthz_port,
    } = flags;
    if *healthz_port == 0 {
        return Ok(None);
    }
    let host = healthz_ip.trim();
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    // Go's empty address is all of both families.
    let host = match bare.unwrap_or(host) {
        "" => "::",
        host => host,
    };
    let wrong = || ServerError::Address(healthz_ip.clone());
    let address = (host, *healthz_port).to_socket_addrs();
    let address = address
        .map_err(|_unknown| wrong())?
        .next()
        .ok_or_else(wrong)?;
    let failed = |source| ServerError::Listen {
        address: address.to_string(),
        source,
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    tracing::info!(%address, "health server: /healthz, /readyz, /metrics");
    Ok(Some(listener))
}

/// Answers on a thread of its own, for as long as the process lives.
///
/// # Errors
/// When there is no thread for it.
pub fn start(
    listener: TcpListener,
    health: Arc<Health>,
    scraper: Scraper,
) -> Result<(), ServerError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // For scrapes, which are made one at a time.
        .max_blocking_threads(2)
        .build()?;
    let answers = Arc::new(Answers {
        health,
        scraper: Arc::new(Mutex::new(scraper)),
    });
    std::thread::Builder::new()
        .name("health".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(accept(listener, answers)) {
                tracing::error!("health server: {error}");
            }
        })?;
    Ok(())
}

async fn accept(listener: TcpListener, answers: Arc<Answers>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // It is never closed.
        let place = Arc::clone(&room).acquire_owned().await;
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let answers = Arc::clone(&answers);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let answers = Arc::clone(&answers);
                async move { Ok::<_, Infallible>(answers.answer(&request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A client that hangs up has its reasons.
            let _ended = timeout(CONNECTION, connection).await;
            drop(place);
        });
    }
}

struct Answers {
    health: Arc<Health>,
    scraper: Arc<Mutex<Scraper>>,
}

impl Answers {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, kind, body) = match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => self.metrics().await,
            (&Method::GET | &Method::HEAD, path) => {
                let verbose = request.uri().query() == Some("verbose");
                let (status, body) = probe(&self.health, path, verbose, Instant::now());
                (status, TEXT, body)
            }
            (_, _) => (
                StatusCode::METHOD_NOT_ALLOWED,
                TEXT,
                "only GET and HEAD\n".to_owned(),
            ),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    }

    async fn metrics(&self) -> (StatusCode, HeaderValue, String) {
        let scraper = Arc::clone(&self.scraper);
        let scrape = tokio::task::spawn_blocking(move || {
            let mut scraper = scraper.lock().unwrap_or_else(PoisonError::into_inner);
            scraper.text().map_err(|error| error.to_string())
        });
        let result = scrape.await.map_err(|error| error.to_string());
        match result.and_then(|text| text) {
            Ok(text) => (StatusCode::OK, METRICS, text),
            Err(problem) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                TEXT,
                format!("{problem}\n"),
            ),
        }
    }
}

/// What a probe is told at `now`. With `?verbose`, `/readyz` says what is missing.
fn probe(health: &Health, path: &str, verbose: bool, now: Instant) -> (StatusCode, String) {
    match path {
        "/healthz" => match health.still(now) {
            None => (StatusCode::OK, "flanneld is running".to_owned()),
            Some(problem) => (StatusCode::INTERNAL_SERVER_ERROR, problem),
        },
        "/readyz" => match health.round().unready {
            None => (StatusCode::OK, "flanneld is ready".to_owned()),
            Some(reason) if verbose => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("flanneld is not ready yet\n{reason}\n"),
            ),
            Some(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "flanneld is not ready yet".to_owned(),
            ),
        },
        _ => (
            StatusCode::NOT_FOUND,
            "not found: there are /healthz, /readyz and /metrics\n".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Round, STILL};
    use super::*;

    #[test]
    fn probes_are_answered_in_flannels_words() {
        let health = Health::new().unwrap();
        let ask = |path, later| {
            let (status, body) = probe(&health, path, false, Instant::now() + later);
            (status.as_u16(), body)
        };
        let now = Duration::ZERO;
        assert_eq!(
            ask("/healthz", now),
            (200, "flanneld is running".to_owned())
        );
        let not_yet = (503, "flanneld is not ready yet".to_owned());
        assert_eq!(ask("/readyz", now), not_yet);
        health.tell(Round::default());
        assert_eq!(ask("/readyz", now), (200, "flanneld is ready".to_owned()));
        let (status, body) = ask("/healthz", STILL + Duration::from_secs(1));
        assert!(status == 500 && body.contains("stands still"), "{body}");
        health.tell(Round {
            unready: Some("one thing".to_owned()),
            ..Round::default()
        });
        assert_eq!(ask("/readyz", now), not_yet);
        let (_, body) = probe(&health, "/readyz", true, Instant::now());
        assert_eq!(body, "flanneld is not ready yet\none thing\n");
        assert_eq!(ask("/", now).0, 404);
    }

    #[test]
    fn addresses_are_taken_as_flannel_takes_them() {
        let flags = |ip: &str, port| HealthFlags {
            healthz_ip: ip.to_owned(),
            healthz_port: port,
        };
        assert!(listen(&flags("nonsense", 0)).unwrap().is_none(), "off");
        for bad in ["nonsense", "300.1.1.1", "::1::"] {
            let error = listen(&flags(bad, 1)).unwrap_err().to_string();
            assert!(
                error.contains("--healthz-ip") && error.contains(bad),
                "{error}"
            );
        }
        for good in ["127.0.0.1", "::1", "[::1]", "localhost", ""] {
            // Whoever has the first ones.
            let listener = (20_000..30_000)
                .find_map(|port| listen(&flags(good, port)).ok().flatten())
                .unwrap();
            let address = listener.local_addr().unwrap();
            let error = listen(&flags(good, address.port()))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&address.to_string()) && error.contains("--healthz-port"),
                "{good}: {error}"
            );
        }
        let error = listen(&flags("192.0.2.1", 1)).unwrap_err().to_string();
        assert!(error.contains("no such address"), "{error}");
    }
}
