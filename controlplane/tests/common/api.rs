//! An API service for tests: nodes, in memory, with the bad habits of real ones on demand.
//!
//! It lists (in pages, or at once like a server that answers from its cache), watches (with bookmarks; late, out of
//! order, cut off or expired), merges strategic patches into `nodes/status`, and remembers what it was asked. It refuses
//! what a real one refuses, so that a test that passes here has a chance there: names, annotations and pod CIDRs are
//! checked, a pod CIDR is set once, a name is used once, a status patch leaves the spec alone, and queries that
//! contradict themselves are errors.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::{Value, json};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) content_type: String,
    /// `Authorization`.
    pub(crate) credentials: String,
    pub(crate) body: String,
}

impl Request {
    fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    pub(crate) fn query(&self, key: &str) -> Option<&str> {
        let query = self.target.split_once('?')?.1;
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// LIST, WATCH, GET, PATCH; EVENT for a write of an Event.
    pub(crate) fn verb(&self) -> &str {
        match (self.method.as_str(), self.path()) {
            ("GET", "/api/v1/nodes") if self.query("watch") == Some("true") => "WATCH",
            ("GET", "/api/v1/nodes") => "LIST",
            ("POST" | "PATCH", path) if path.contains("/events") => "EVENT",
            (method, _) => method,
        }
    }
}

/// What it does besides its duty.
#[derive(Debug, Clone, Default)]
pub(crate) struct Habits {
    /// Connections are closed at once, those there are as well.
    pub(crate) down: bool,
    /// Nobody gets an answer, and watches say nothing.
    pub(crate) frozen: bool,
    /// Watches say nothing of what changes, but live.
    pub(crate) held: bool,
    /// Held news come out last first.
    pub(crate) reversed: bool,
    /// The limit counts for nothing, as with a server that answers from its cache.
    pub(crate) no_pages: bool,
    /// Bookmarks come this often.
    pub(crate) bookmarks: Option<Duration>,
    /// Answers to so many requests with a verb: this status.
    pub(crate) refusals: Vec<(&'static str, u16, usize)>,
    /// Without this `Authorization`, or a client certificate, the answer is 401.
    pub(crate) credentials: Option<String>,
}

/// A connection as somebody made it.
pub(crate) trait Connection: Read + Write {
    /// The client has shown a certificate that we trust.
    fn is_known(&self) -> bool;
}

impl Connection for TcpStream {
    fn is_known(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct State {
    version: u64,
    nodes: BTreeMap<String, Value>,
    /// Version, kind of event and node, in order.
    events: Vec<(u64, &'static str, Value)>,
    /// Versions before this are forgotten.
    oldest: u64,
    /// Watches of earlier generations are cut off.
    generation: u64,
    created: u64,
    habits: Habits,
    requests: Vec<Request>,
    pods: BTreeMap<String, String>,
    /// Kubernetes Events by name.
    events_of_nodes: BTreeMap<String, Value>,
    closed: bool,
}

struct World {
    state: Mutex<State>,
    news: Condvar,
}

/// The service; it ends with the value.
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    world: Arc<World>,
}

impl Api {
    /// Serves what comes to `listener`, whichever namespace that is in.
    pub(crate) fn serve(listener: TcpListener) -> Self {
        Self::serve_by(listener, Ok)
    }

    /// The same, with something between the wire and us.
    pub(crate) fn serve_by<C: Connection>(
        listener: TcpListener,
        accept: impl Fn(TcpStream) -> std::io::Result<C> + Clone + Send + 'static,
    ) -> Self {
        let world = Arc::new(World {
            state: Mutex::new(State {
                version: 100,
                ..State::default()
            }),
            news: Condvar::new(),
        });
        let api = Self {
            address: listener.local_addr().unwrap(),
            world: Arc::clone(&world),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let world = Arc::clone(&world);
                if world.state().closed {
                    return;
                }
                let accept = accept.clone();
                std::thread::spawn(move || {
                    let stream = stream.unwrap();
                    // A client that hangs up has its reasons.
                    let _ended = stream
                        .set_nodelay(true)
                        .and_then(|()| world.talk(accept(stream)?));
                });
            }
        });
        api
    }

    /// A kubeconfig that leads here.
    pub(crate) fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"http://{}\"}}}}]\nusers: [{{name: u, user: {{}}}}]\n",
            self.address
        )
    }

    /// Makes a node; each is a second younger than the one before.
    pub(crate) fn create(&self, name: &str, cidrs: &[&str], annotations: &Value) {
        let mut state = self.world.state();
        state.created += 1;
        let created = format!(
            "2026-11-22T{:02}:{:02}:{:02}Z",
            state.created / 3600,
            state.created / 60 % 60,
            state.created % 60
        );
        let mut node = json!({
            "metadata": {
                "name": name, "uid": format!("00000000-0000-4000-8000-{:012}", state.created), "creationTimestamp": created,
                "annotations": annotations,
                "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:metadata": {"f:annotations": {".": {}}}}}],
            },
            "spec": {}, "status": {},
        });
        if let Some(first) = cidrs.first() {
            node["spec"] = json!({"podCIDR": first, "podCIDRs": cidrs});
        }
        assert!(
            !state.nodes.contains_key(name),
            "409: nodes \"{name}\" already exists"
        );
        check_node(None, &node).unwrap_or_else(|problem| panic!("422: {name}: {problem}"));
        state.put("ADDED", name, node);
        self.world.news.notify_all();
    }

    /// Changes a node.
    pub(crate) fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.world.state();
        let mut node = state.nodes[name].clone();
        change(&mut node);
        check_node(Some(&state.nodes[name]), &node)
            .unwrap_or_else(|problem| panic!("422: {name}: {problem}"));
        state.put("MODIFIED", name, node);
        self.world.news.notify_all();
    }

    /// Changes a node in ways that the API does not allow: by another hand in its data base.
    pub(crate) fn corrupt(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.world.state();
        let mut node = state.nodes[name].clone();
        change(&mut node);
        state.put("MODIFIED", name, node);
        self.world.news.notify_all();
    }

    /// Tells that a node is gone which nobody knew.
    pub(crate) fn delete_unknown(&self, name: &str) {
        let mut state = self.world.state();
        state.record("DELETED", json!({"metadata": {"name": name}}));
        self.world.news.notify_all();
    }

    /// Sets an annotation of flannel's.
    pub(crate) fn annotate(&self, name: &str, key: &str, value: &str) {
        self.change(name, |node| {
            node["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{key}")] =
                value.into();
        });
    }

    pub(crate) fn delete(&self, name: &str) {
        let mut state = self.world.state();
        let node = state.nodes.remove(name).unwrap();
        state.record("DELETED", node);
        self.world.news.notify_all();
    }

    pub(crate) fn node(&self, name: &str) -> Value {
        self.world.state().nodes[name].clone()
    }

    /// The node that a pod is on.
    pub(crate) fn place(&self, namespace: &str, pod: &str, node: &str) {
        let key = format!("{namespace}/{pod}");
        self.world.state().pods.insert(key, node.to_owned());
    }

    /// The Kubernetes Events that were written.
    pub(crate) fn events(&self) -> Vec<Value> {
        let state = self.world.state();
        state.events_of_nodes.values().cloned().collect()
    }

    /// Changes its habits.
    pub(crate) fn habits(&self, change: impl FnOnce(&mut Habits)) {
        change(&mut self.world.state().habits);
        self.world.news.notify_all();
    }

    /// Cuts all watches off.
    pub(crate) fn cut(&self) {
        self.world.state().generation += 1;
        self.world.news.notify_all();
    }

    /// Forgets what was: watches that lag behind are told 410.
    pub(crate) fn expire(&self) {
        let mut state = self.world.state();
        state.version += 10;
        state.oldest = state.version;
        state.events.clear();
        self.world.news.notify_all();
    }

    /// Forgets all nodes and starts from a lower version, as a server with another data base does.
    pub(crate) fn reset(&self) {
        let mut state = self.world.state();
        state.nodes.clear();
        state.events.clear();
        state.version = 10;
        state.oldest = 10;
        state.generation += 1;
        self.world.news.notify_all();
    }

    /// What it was asked, all or with one verb.
    pub(crate) fn requests(&self, verb: &str) -> Vec<Request> {
        let state = self.world.state();
        let requests = state.requests.iter();
        requests
            .filter(|request| verb.is_empty() || request.verb() == verb)
            .cloned()
            .collect()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let mut state = self.world.state();
        state.closed = true;
        state.habits = Habits::default();
        state.generation += 1;
        self.world.news.notify_all();
    }
}

impl State {
    fn record(&mut self, kind: &'static str, mut node: Value) -> Value {
        self.version += 1;
        node["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.events.push((self.version, kind, node.clone()));
        node
    }

    fn put(&mut self, kind: &'static str, name: &str, node: Value) {
        let node = self.record(kind, node);
        self.nodes.insert(name.to_owned(), node);
    }
}

/// Whether a watch goes on.
#[derive(PartialEq, Eq)]
enum Watching {
    On,
    Over,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// One connection, request after request.
    fn talk(&self, connection: impl Connection) -> std::io::Result<()> {
        // Nobody sends a second request before the first is answered.
        let mut input = BufReader::new(connection);
        while let Some(request) = read_request(&mut input)? {
            let output = input.get_mut();
            {
                let mut state = self.state();
                if !state.habits.down {
                    state.requests.push(request.clone());
                }
                state = self
                    .news
                    .wait_while(state, |state| state.habits.frozen)
                    .unwrap();
                if state.habits.down || state.closed {
                    return Ok(());
                }
            }
            let known = output.is_known();
            if let Some(code) = self.refusal(request.verb()) {
                write_answer(output, code, &status(code, "as the test wants it"))?;
            } else if !known && self.is_stranger(&request) {
                write_answer(output, 401, &status(401, "Unauthorized"))?;
            } else if let Some(problem) = contradiction(&request) {
                write_answer(output, 400, &status(400, problem))?;
            } else if request.verb() == "WATCH" {
                return self.watch(&request, output);
            } else {
                let (code, answer) = self.answer(&request);
                write_answer(output, code, &answer)?;
            }
        }
        Ok(())
    }

    fn refusal(&self, verb: &str) -> Option<u16> {
        let mut state = self.state();
        let mut refusals = state.habits.refusals.iter_mut();
        let (_, code, left) = refusals.find(|(refused, _, left)| *refused == verb && *left > 0)?;
        *left -= 1;
        Some(*code)
    }

    fn is_stranger(&self, request: &Request) -> bool {
        let state = self.state();
        let wanted = state.habits.credentials.as_ref();
        wanted.is_some_and(|wanted| *wanted != request.credentials)
    }

    fn answer(&self, request: &Request) -> (u16, Value) {
        let path: Vec<&str> = request.path().split('/').skip(1).collect();
        match (request.method.as_str(), &path[..]) {
            ("GET", ["api", "v1", "nodes"]) => self.list(request),
            ("GET", ["api", "v1", "namespaces", namespace, "pods", pod]) => {
                match self.state().pods.get(&format!("{namespace}/{pod}")) {
                    Some(node) => (
                        200,
                        json!({"metadata": {"name": pod}, "spec": {"nodeName": node}}),
                    ),
                    None => (404, status(404, "no such pod")),
                }
            }
            ("PATCH", ["api", "v1", "nodes", name, "status"]) => {
                if request.content_type != "application/strategic-merge-patch+json" {
                    return (415, status(415, "not a strategic merge patch"));
                }
                let mut state = self.state();
                let Some(mut node) = state.nodes.get(*name).cloned() else {
                    return (404, status(404, "no such node"));
                };
                let Ok(patch) = serde_json::from_str::<Value>(&request.body) else {
                    return (400, status(400, "not JSON"));
                };
                let version = &patch["metadata"]["resourceVersion"];
                if !version.is_null() && *version != node["metadata"]["resourceVersion"] {
                    return (409, status(409, "the object has been modified"));
                }
                merge(&mut node, &patch);
                // The status subresource is for the status, and takes annotations besides.
                node["spec"] = state.nodes[*name]["spec"].clone();
                if let Err(problem) = check_node(Some(&state.nodes[*name]), &node) {
                    return (422, status(422, &problem));
                }
                // What changes nothing is no event.
                if state.nodes[*name] != node {
                    state.put("MODIFIED", name, node);
                    self.news.notify_all();
                }
                (200, state.nodes[*name].clone())
            }
            (method, ["api", "v1", "namespaces", "default", "events", name @ ..]) => {
                let body: Value = serde_json::from_str(&request.body).unwrap();
                let new = body["metadata"]["name"].as_str().unwrap_or_default();
                let name = name.first().copied().unwrap_or(new).to_owned();
                let events = &mut self.state().events_of_nodes;
                match (method, events.contains_key(&name)) {
                    ("POST", false) | ("PATCH", true) => {
                        merge(events.entry(name).or_default(), &body);
                        (200, body)
                    }
                    _ => (404, status(404, "no such event, or one that is there")),
                }
            }
            _ => (404, status(404, "no such thing here")),
        }
    }

    fn list(&self, request: &Request) -> (u16, Value) {
        let state = self.state();
        let wanted: u64 = request
            .query("resourceVersion")
            .unwrap_or("0")
            .parse()
            .unwrap();
        if wanted > state.version {
            return (504, status(504, "Too large resource version"));
        }
        let limit = match state.habits.no_pages {
            true => usize::MAX,
            false => request
                .query("limit")
                .map_or(usize::MAX, |limit| limit.parse().unwrap()),
        };
        let skip = request
            .query("continue")
            .map_or(0, |token| token.parse().unwrap());
        let items: Vec<&Value> = state.nodes.values().skip(skip).take(limit).collect();
        let more =
            (skip + items.len() < state.nodes.len()).then(|| (skip + items.len()).to_string());
        let metadata = json!({"resourceVersion": state.version.to_string(), "continue": more.unwrap_or_default()});
        (
            200,
            json!({"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items}),
        )
    }

    fn watch(&self, request: &Request, output: &mut impl Write) -> std::io::Result<()> {
        write!(
            output,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )?;
        let mut at: u64 = request.query("resourceVersion").unwrap().parse().unwrap();
        let generation = self.state().generation;
        let bookmarks = request.query("allowWatchBookmarks") == Some("true");
        let mut bookmarked = bookmarks.then(Instant::now);
        loop {
            let (events, watching) = self.news_since(&mut at, generation, &mut bookmarked);
            for (kind, object) in events {
                let line = format!("{}\n", json!({"type": kind, "object": object}));
                write!(output, "{:x}\r\n{line}\r\n", line.len())?;
            }
            if watching == Watching::Over {
                // The last chunk: an orderly end.
                return write!(output, "0\r\n\r\n");
            }
        }
    }

    /// Waits for something to say to a watch that is at `at`.
    fn news_since(
        &self,
        at: &mut u64,
        generation: u64,
        bookmarked: &mut Option<Instant>,
    ) -> (Vec<(&'static str, Value)>, Watching) {
        let mut state = self.state();
        loop {
            if state.generation != generation || state.habits.down || state.closed {
                return (Vec::new(), Watching::Over);
            }
            if !state.habits.frozen {
                if *at < state.oldest {
                    return (
                        vec![("ERROR", status(410, "too old resource version"))],
                        Watching::Over,
                    );
                }
                let news = state.events.iter().filter(|(version, ..)| version > at);
                let mut news: Vec<_> = news.map(|(_, kind, node)| (*kind, node.clone())).collect();
                if !news.is_empty() && !state.habits.held {
                    if state.habits.reversed {
                        news.reverse();
                    }
                    *at = state.version;
                    return (news, Watching::On);
                }
                if let (Some(every), Some(last)) = (state.habits.bookmarks, *bookmarked)
                    && last.elapsed() >= every
                    && !state.habits.held
                {
                    *bookmarked = Some(Instant::now());
                    *at = state.version;
                    let metadata = json!({"resourceVersion": state.version.to_string(), "creationTimestamp": null});
                    let object = json!({"kind": "Node", "apiVersion": "v1", "metadata": metadata});
                    return (vec![("BOOKMARK", object)], Watching::On);
                }
            }
            state = self
                .news
                .wait_timeout(state, Duration::from_millis(50))
                .unwrap()
                .0;
        }
    }
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code})
}

/// A strategic merge as far as nodes need it: maps by key, conditions by type.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match (key.as_str(), value) {
            (_, Value::Null) => drop(target.as_object_mut().unwrap().remove(key)),
            ("conditions", Value::Array(conditions)) => {
                let mut all = target["conditions"].as_array().cloned().unwrap_or_default();
                for condition in conditions {
                    match all
                        .iter_mut()
                        .find(|known| known["type"] == condition["type"])
                    {
                        Some(known) => merge(known, condition),
                        None => all.push(condition.clone()),
                    }
                }
                target["conditions"] = all.into();
            }
            _ => merge(&mut target[key], value),
        }
    }
}

/// What a real server says about a query that cannot be meant.
fn contradiction(request: &Request) -> Option<&'static str> {
    let has = |key| request.query(key).is_some();
    if has("continue") && has("resourceVersion") {
        return Some("specifying resource version is not allowed when using continue");
    }
    if has("resourceVersionMatch") && request.verb() == "WATCH" {
        return Some("resourceVersionMatch is forbidden for watch");
    }
    (has("resourceVersionMatch") && !has("resourceVersion"))
        .then_some("resourceVersionMatch is forbidden unless resourceVersion is provided")
}

/// What a real server checks of a Node, as far as tests come near it.
fn check_node(old: Option<&Value>, new: &Value) -> Result<(), String> {
    let metadata = &new["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    if !is_subdomain(name) {
        return Err(format!(
            "metadata.name {name:?}: not a lower-case RFC 1123 subdomain"
        ));
    }
    let mut size = 0;
    for (key, value) in metadata["annotations"].as_object().into_iter().flatten() {
        let value = value.as_str();
        let value = value.ok_or_else(|| format!("metadata.annotations: {key:?} is no string"))?;
        size += key.len() + value.len();
        let (domain, word) = key
            .split_once('/')
            .map_or((None, &**key), |(domain, word)| (Some(domain), word));
        let is_word = (1..=63).contains(&word.len())
            && word
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && word.starts_with(|first: char| first.is_ascii_alphanumeric())
            && word.ends_with(|last: char| last.is_ascii_alphanumeric());
        if !is_word || domain.is_some_and(|domain| !is_subdomain(domain)) {
            return Err(format!(
                "metadata.annotations: {key:?} is no qualified name"
            ));
        }
    }
    if size > 256 << 10 {
        return Err("metadata.annotations: more than 256 KiB".to_owned());
    }
    let cidrs = new["spec"]["podCIDRs"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let first = cidrs.first().cloned().unwrap_or_default();
    if new["spec"].get("podCIDR").cloned().unwrap_or_default() != first {
        return Err("spec.podCIDR: not the first of spec.podCIDRs".to_owned());
    }
    let mut families = Vec::new();
    for cidr in &cidrs {
        let (address, length) = cidr
            .as_str()
            .and_then(|text| text.split_once('/'))
            .unwrap_or_default();
        let address: core::net::IpAddr = address
            .parse()
            .map_err(|_bad| format!("spec.podCIDRs: {cidr} is no CIDR"))?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        if length.parse::<u8>().map_or(true, |length| length > max) {
            return Err(format!("spec.podCIDRs: {cidr} is no CIDR"));
        }
        if families.contains(&address.is_ipv4()) {
            return Err(
                "spec.podCIDRs: may specify no more than one CIDR for each IP family".to_owned(),
            );
        }
        families.push(address.is_ipv4());
    }
    let Some(old) = old else { return Ok(()) };
    for field in ["name", "uid", "creationTimestamp"] {
        if old["metadata"][field] != metadata[field] {
            return Err(format!("metadata.{field}: field is immutable"));
        }
    }
    let before = &old["spec"]["podCIDRs"];
    if before.as_array().is_some_and(|before| !before.is_empty())
        && *before != new["spec"]["podCIDRs"]
    {
        return Err(
            "spec.podCIDRs: node updates may not change podCIDR except from \"\" to valid"
                .to_owned(),
        );
    }
    Ok(())
}

/// Lower-case labels with dots between them.
fn is_subdomain(text: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

fn read_request(input: &mut BufReader<impl Connection>) -> std::io::Result<Option<Request>> {
    let mut first = String::new();
    if input.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut words = first.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let (mut length, mut content_type, mut credentials) = (0, String::new(), String::new());
    loop {
        let mut line = String::new();
        input.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap(),
            "content-type" => value.trim().clone_into(&mut content_type),
            "authorization" => value.trim().clone_into(&mut credentials),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    let body = String::from_utf8(body).unwrap();
    Ok(Some(Request {
        method,
        target,
        content_type,
        credentials,
        body,
    }))
}

fn write_answer(output: &mut impl Write, code: u16, answer: &Value) -> std::io::Result<()> {
    let text = answer.to_string();
    write!(
        output,
        "HTTP/1.1 {code} Answer\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )
}
