//! A real etcd for tests, and what is asked of it. It and its client live in the network namespace of the thread that
//! starts it; its data is in a directory that is removed with it.

use core::time::Duration;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use etcd_client::{Client, ConnectOptions, Error, GetOptions, PutOptions};
use tokio::runtime::{Builder, Runtime};

type Job = Box<dyn FnOnce(&Runtime) + Send>;

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) lease: i64,
    pub(crate) created: i64,
    pub(crate) changed: i64,
}

/// An etcd that is killed on drop.
pub(crate) struct Etcd {
    child: Child,
    directory: tempfile::TempDir,
    /// `http://<host>:2379`, or what TLS makes of it.
    pub(crate) url: String,
    arguments: Vec<String>,
    /// How the test itself connects.
    pub(crate) options: ConnectOptions,
    jobs: Sender<Job>,
}

impl Etcd {
    /// Starts it on port 2379 of an address of this namespace, and waits until it answers.
    pub(crate) fn start(host: &str) -> Self {
        Self::start_with(&format!("http://{host}:2379"), &[], ConnectOptions::new())
    }

    /// Starts it with further arguments.
    pub(crate) fn start_with(url: &str, arguments: &[&str], options: ConnectOptions) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let (jobs, queue) = channel::<Job>();
        // A thread of its own, because what it starts and connects to is in this thread's namespace.
        std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("runtime");
            queue.into_iter().for_each(|job| job(&runtime));
        });
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        let etcd = Self {
            child: run(directory.path(), url, &arguments),
            directory,
            url: url.to_owned(),
            arguments,
            options,
            jobs,
        };
        etcd.wait();
        etcd
    }

    fn wait(&self) {
        let start = Instant::now();
        while self
            .try_call(|mut client| async move { client.get("/", None).await })
            .is_err()
        {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "etcd does not answer"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill etcd");
        self.child.wait().expect("wait for etcd");
    }

    pub(crate) fn signal(&self, signal: i32) {
        let arguments = [format!("-{signal}"), self.child.id().to_string()];
        let status = Command::new("kill").args(arguments).status();
        assert!(status.expect("kill").success());
    }

    /// Starts it again with the data that it has. The namespace is that of the thread again.
    pub(crate) fn restart(&mut self) {
        let url = self.url.clone();
        self.restart_at(&url);
    }

    /// Starts it again at another address.
    pub(crate) fn restart_at(&mut self, url: &str) {
        url.clone_into(&mut self.url);
        let (directory, arguments) = (self.directory.path().to_owned(), self.arguments.clone());
        let (url, (done, started)) = (self.url.clone(), channel());
        let job = move |_: &Runtime| drop(done.send(run(&directory, &url, &arguments)));
        self.jobs.send(Box::new(job)).expect("thread");
        self.child = started.recv().expect("etcd");
    }

    /// Forgets all data; it must not run.
    pub(crate) fn wipe(&self) {
        std::fs::remove_dir_all(self.directory.path().join("data")).expect("data");
    }

    pub(crate) fn try_call<T, F>(
        &self,
        job: impl FnOnce(Client) -> F + Send + 'static,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>>,
    {
        let (done, answer) = channel();
        let (url, options) = (self.url.clone(), self.options.clone());
        let options = options
            .with_connect_timeout(Duration::from_secs(5))
            .with_timeout(Duration::from_secs(5));
        let job = move |runtime: &Runtime| {
            let answer =
                runtime.block_on(async { job(Client::connect([url], Some(options)).await?).await });
            drop(done.send(answer));
        };
        self.jobs.send(Box::new(job)).expect("thread");
        answer.recv().expect("answer")
    }

    /// Asks it something, and waits until it answers: it may be on its way up.
    pub(crate) fn call<T, F>(&self, job: impl Fn(Client) -> F + Clone + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>>,
    {
        let start = Instant::now();
        loop {
            match self.try_call(job.clone()) {
                Ok(answer) => return answer,
                Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.call(move |mut client| {
            let (key, value) = (key.clone(), value.clone());
            async move { client.put(key, value, None).await }
        });
    }

    /// Puts a key that ends with an etcd lease; the lease.
    pub(crate) fn put_for(&self, key: &str, value: &str, seconds: i64) -> i64 {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.call(move |mut client| {
            let (key, value) = (key.clone(), value.clone());
            async move {
                let lease = client.lease_grant(seconds, None).await?.id();
                let options = PutOptions::new().with_lease(lease);
                client.put(key, value, Some(options)).await.map(|_| lease)
            }
        })
    }

    pub(crate) fn delete(&self, key: &str) {
        let key = key.to_owned();
        self.call(move |mut client| {
            let key = key.clone();
            async move { client.delete(key, None).await }
        });
    }

    /// All keys below a prefix.
    pub(crate) fn list(&self, prefix: &str) -> Vec<Entry> {
        let prefix = prefix.to_owned();
        let list = self.call(move |mut client| {
            let prefix = prefix.clone();
            async move {
                client
                    .get(prefix, Some(GetOptions::new().with_prefix()))
                    .await
            }
        });
        let entry = |kv: &etcd_client::KeyValue| Entry {
            key: kv.key_str().expect("text").to_owned(),
            value: kv.value_str().expect("text").to_owned(),
            lease: kv.lease(),
            created: kv.create_revision(),
            changed: kv.mod_revision(),
        };
        list.kvs().iter().map(entry).collect()
    }

    /// For how many seconds an etcd lease was granted, and how many are left.
    pub(crate) fn time_to_live(&self, lease: i64) -> (i64, i64) {
        let answer = self
            .call(move |mut client| async move { client.lease_time_to_live(lease, None).await });
        (answer.granted_ttl(), answer.ttl())
    }

    /// Forgets all history.
    pub(crate) fn compact(&self) {
        self.call(|mut client| async move {
            let now = client.get("/", None).await?;
            let revision = now.header().map_or(0, |header| header.revision());
            client.compact(revision, None).await
        });
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn run(directory: &Path, url: &str, arguments: &[String]) -> Child {
    let peer = "http://127.0.0.1:2380";
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"));
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(directory.join("data"))
        .args([
            "--name",
            "test",
            "--listen-client-urls",
            url,
            "--advertise-client-urls",
            url,
        ])
        .args([
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
        ])
        .args(["--initial-cluster", &format!("test={peer}")])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.expect("log"));
    command
        .spawn()
        .expect("etcd: install the package etcd-server")
}
