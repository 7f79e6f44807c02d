//! Kubernetes Events on our Node, which `kubectl describe node` shows.
//!
//! A thread of its own, which nothing waits for: what cannot be delivered is lost. News of one kind within ten minutes
//! are one Event with a count, written at most once a minute, so that nothing can flood the API server.

use core::time::Duration;
use std::collections::BTreeMap;
use std::time::Instant;

use k8s_openapi::jiff;
use kube::{Client, Config};
use serde_json::json;
use tokio::time::timeout;

use super::KubeError;
use crate::health::watch::{News, Reason, Watcher};
use crate::health::{Health, Outcome};
use crate::lease::told::runtime;

/// Node Events are in this namespace, whoever writes them.
const NAMESPACE: &str = "default";
/// Who we say we are.
const COMPONENT: &str = "ripstop";
/// How often it is looked for news.
const LOOK: Duration = Duration::from_secs(1);
/// Longer than any healthy server needs.
const ANSWER: Duration = Duration::from_secs(15);
/// Least time between two writes of one kind.
const EVERY: Duration = Duration::from_secs(60);
/// News of one kind that are further apart are two Events.
const SERIES: Duration = Duration::from_secs(600);
/// Least time between two tries.
const RETRY: Duration = Duration::from_secs(5);
/// What could not be delivered by then is old.
const STALE: Duration = Duration::from_secs(300);
/// Longest message, in bytes; servers refuse longer ones.
const MESSAGE_MAX: usize = 1024;

/// One kind's current Event.
#[derive(Debug, Clone)]
struct Series {
    /// The object's name.
    name: String,
    /// In RFC 3339.
    first: String,
    last: String,
    last_at: Instant,
    count: u32,
    message: String,
    /// The server has it.
    posted: bool,
    /// The server does not have the latest of it, since then.
    unsent: Option<Instant>,
    /// The earliest time of the next write.
    not_before: Instant,
}

/// What is to be written, and when.
#[derive(Debug)]
struct Book {
    node: String,
    series: BTreeMap<Reason, Series>,
}

/// A request to write an Event.
#[derive(Debug, Clone, PartialEq)]
struct Write {
    reason: Reason,
    method: &'static str,
    path: String,
    body: serde_json::Value,
}

impl Book {
    fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            series: BTreeMap::new(),
        }
    }

    /// Takes news down.
    fn note(&mut self, news: News, now: Instant) {
        let stamp = jiff::Timestamp::now();
        let last = stamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut message = news.message;
        while message.len() > MESSAGE_MAX {
            message.pop();
        }
        if let Some(series) = self.series.get_mut(&news.reason)
            && now.saturating_duration_since(series.last_at) < SERIES
        {
            series.count = series.count.saturating_add(1);
            series.last = last;
            series.last_at = now;
            series.message = message;
            series.unsent.get_or_insert(now);
            return;
        }
        let series = Series {
            // As the kubelet names its own: unique, and told apart from other nodes'.
            name: format!("{}.{:x}", self.node, stamp.as_nanosecond()),
            first: last.clone(),
            last,
            last_at: now,
            count: 1,
            message,
            posted: false,
            unsent: Some(now),
            not_before: now,
        };
        self.series.insert(news.reason, series);
    }

    /// The next write that is due.
    fn due(&self, now: Instant) -> Option<Write> {
        let mut due = self.series.iter();
        let (reason, series) =
            due.find(|(_, series)| series.unsent.is_some() && series.not_before <= now)?;
        let kind = match reason.is_warning() {
            true => "Warning",
            false => "Normal",
        };
        let path = format!("/api/v1/namespaces/{NAMESPACE}/events");
        Some(match series.posted {
            false => Write {
                reason: *reason,
                method: "POST",
                path,
                body: json!({
                    "apiVersion": "v1",
                    "kind": "Event",
                    "metadata": {"name": series.name, "namespace": NAMESPACE},
                    // The kubelet's way to name a node: its name for the uid.
                    "involvedObject": {"kind": "Node", "name": self.node, "uid": self.node},
                    "reason": reason.name(),
                    "message": series.message,
                    "type": kind,
                    "source": {"component": COMPONENT, "host": self.node},
                    "firstTimestamp": series.first,
                    "lastTimestamp": series.last,
                    "count": series.count,
                    "reportingComponent": COMPONENT,
                    "reportingInstance": self.node,
                }),
            },
            true => Write {
                reason: *reason,
                method: "PATCH",
                path: format!("{path}/{}", series.name),
                body: json!({
                    "count": series.count,
                    "lastTimestamp": series.last,
                    "message": series.message,
                }),
            },
        })
    }

    /// What came of a write: the answer's status, or none without an answer.
    fn written(&mut self, write: &Write, status: Result<(), Option<u16>>, now: Instant) -> Outcome {
        let Some(series) = self.series.get_mut(&write.reason) else {
            return Outcome::GivenUp;
        };
        match status {
            Ok(()) => {
                series.posted = true;
                series.unsent = None;
                series.not_before = now + EVERY;
                Outcome::Sent
            }
            // It has expired there: told anew.
            Err(Some(404)) if series.posted => {
                series.posted = false;
                series.not_before = now + RETRY;
                Outcome::Refused
            }
            // Too many requests, and the server's own trouble, may pass; other refusals do not.
            Err(Some(code)) if code != 429 && code < 500 => {
                series.unsent = None;
                series.not_before = now + EVERY;
                Outcome::Refused
            }
            Err(_) => {
                series.not_before = now + RETRY;
                match series.unsent {
                    Some(since) if now.saturating_duration_since(since) < STALE => Outcome::Refused,
                    Some(_) | None => {
                        series.unsent = None;
                        Outcome::GivenUp
                    }
                }
            }
        }
    }
}

/// Watches and tells, on a thread of its own, for as long as the process lives.
///
/// # Errors
/// When there is no thread or runtime for it.
pub fn start(
    config: Config,
    node: &str,
    watcher: Watcher,
    health: std::sync::Arc<Health>,
) -> Result<(), KubeError> {
    let runtime = runtime()?;
    let book = Book::new(node);
    std::thread::Builder::new()
        .name("events".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(tell(config, book, watcher, &health)) {
                tracing::warn!("Kubernetes Events are not written: {error}");
            }
        })?;
    Ok(())
}

async fn tell(
    config: Config,
    mut book: Book,
    mut watcher: Watcher,
    health: &Health,
) -> Result<(), KubeError> {
    // Most nodes never have anything to tell.
    let mut client: Option<Client> = None;
    let mut named = false;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = Instant::now();
        for news in watcher.look() {
            tracing::debug!(reason = news.reason.name(), "{}", news.message);
            book.note(news, now);
        }
        let Some(write) = book.due(now) else { continue };
        let client = match &client {
            Some(client) => client,
            None => {
                let made = Client::try_from(config.clone());
                client.insert(made.map_err(|error| KubeError::Client(Box::new(error)))?)
            }
        };
        let answer = send(client, &write).await;
        let status = match &answer {
            Ok(()) => Ok(()),
            Err((code, _)) => Err(*code),
        };
        health.event(book.written(&write, status, Instant::now()));
        if let Err((code, problem)) = answer {
            tracing::debug!("Kubernetes Event: {problem}");
            if code == Some(403) && !core::mem::replace(&mut named, true) {
                tracing::warn!(
                    "Kubernetes Events are not written: {problem}: add {{apiGroups: [\"\"], resources: [events], verbs: [create, patch]}} to the ClusterRole"
                );
            }
        }
    }
}

/// Sends a request; the status of a refusal, if there was an answer, and its words.
async fn send(client: &Client, write: &Write) -> Result<(), (Option<u16>, String)> {
    let kind = match write.method {
        "PATCH" => "application/strategic-merge-patch+json",
        _ => "application/json",
    };
    let request = http::Request::builder()
        .method(write.method)
        .uri(&write.path)
        .header(http::header::CONTENT_TYPE, kind)
        .body(write.body.to_string().into_bytes())
        .map_err(|error| (None, error.to_string()))?;
    match timeout(ANSWER, client.request_text(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(status))) => Err((
            Some(status.code),
            format!("the API server answers {}: {}", status.code, status.message),
        )),
        Ok(Err(error)) => Err((None, crate::explained(&error.into()))),
        Err(_late) => Err((None, format!("no answer for {} s", ANSWER.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(reason: Reason, message: &str) -> News {
        News {
            reason,
            message: message.to_owned(),
        }
    }

    #[test]
    fn repetitions_are_one_event_with_a_count() {
        let mut book = Book::new("n1");
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(book.due(start), None);
        book.note(news(Reason::StandbyInUse, "one"), start);
        let post = book.due(start).unwrap();
        assert_eq!(
            (post.method, post.path.as_str()),
            ("POST", "/api/v1/namespaces/default/events")
        );
        let name = post.body["metadata"]["name"].as_str().unwrap().to_owned();
        assert!(name.starts_with("n1."), "{name}");
        assert_eq!(
            post.body["involvedObject"],
            json!({"kind": "Node", "name": "n1", "uid": "n1"})
        );
        assert_eq!(
            (&post.body["type"], &post.body["count"]),
            (&json!("Warning"), &json!(1))
        );
        assert_eq!(book.written(&post, Ok(()), start), Outcome::Sent);
        assert_eq!(book.due(at(600)), None, "nothing new");
        // A hundred in ten seconds are one write, a minute after the first.
        for second in 1..=100 {
            book.note(news(Reason::StandbyInUse, "again"), at(second / 10));
        }
        book.note(news(Reason::WorkersInUse, "back"), at(10));
        let other = book.due(at(10)).unwrap();
        assert_eq!(
            (other.reason, &other.body["type"]),
            (Reason::WorkersInUse, &json!("Normal"))
        );
        assert_eq!(book.written(&other, Ok(()), at(10)), Outcome::Sent);
        assert_eq!(book.due(at(59)), None);
        let patch = book.due(at(60)).unwrap();
        assert_eq!(
            (patch.method, patch.path),
            ("PATCH", format!("/api/v1/namespaces/default/events/{name}"))
        );
        assert_eq!(patch.body["count"], 101);
        assert_eq!(patch.body["message"], "again");
        // Long after, it is another Event.
        let patch = book.due(at(60)).unwrap();
        assert_eq!(book.written(&patch, Ok(()), at(60)), Outcome::Sent);
        book.note(news(Reason::StandbyInUse, "later"), at(700));
        let post = book.due(at(700)).unwrap();
        assert_eq!((post.method, &post.body["count"]), ("POST", &json!(1)));
    }

    #[test]
    fn what_is_refused_is_lost_and_what_is_late_is_tried_again() {
        let mut book = Book::new("n1");
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        book.note(news(Reason::LeaseProblem, &"é".repeat(600)), start);
        let post = book.due(start).unwrap();
        assert_eq!(post.body["message"].as_str().unwrap().len(), 1024);
        assert_eq!(book.written(&post, Err(None), start), Outcome::Refused);
        assert_eq!(book.due(at(4)), None);
        assert!(book.due(at(5)).is_some());
        assert_eq!(book.written(&post, Err(Some(503)), at(5)), Outcome::Refused);
        assert_eq!(book.written(&post, Err(None), at(300)), Outcome::GivenUp);
        assert_eq!(book.due(at(3600)), None);
        book.note(news(Reason::LeaseProblem, "b"), at(301));
        let post = book.due(at(310)).unwrap();
        assert_eq!(
            book.written(&post, Err(Some(403)), at(310)),
            Outcome::Refused
        );
        assert_eq!(book.due(at(3600)), None, "lost");
        // An Event that the server has forgotten is posted again.
        book.note(news(Reason::LeaseProblem, "c"), at(400));
        let post = book.due(at(400)).unwrap();
        assert_eq!(book.written(&post, Ok(()), at(400)), Outcome::Sent);
        book.note(news(Reason::LeaseProblem, "d"), at(401));
        let patch = book.due(at(460)).unwrap();
        assert_eq!(
            book.written(&patch, Err(Some(404)), at(460)),
            Outcome::Refused
        );
        assert_eq!(book.due(at(465)).unwrap().method, "POST");
    }
}
