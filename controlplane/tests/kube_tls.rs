//! The way to the API server: TLS, certificates, tokens, the pod's own account. Needs root, for namespaces.
//!
//! The program runs as a process, against the API service of the tests behind TLS.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "times are printed, never asserted")]

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::api::{Api, Connection};
use common::eventually;
use common::node::{CONTROLPLANE, Node, wait_exit};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, date_time_ymd,
};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use serde_json::json;

/// Signs certificates.
struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
struct Identity {
    certificate: Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self {
            certificate: params.self_signed(&key).unwrap(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Signs for a name or address, until that year.
    fn sign(&self, name: &str, use_: ExtendedKeyUsagePurpose, until: i32) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![use_];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity { certificate, key }
    }

    fn server(&self, name: &str) -> Identity {
        self.sign(name, ExtendedKeyUsagePurpose::ServerAuth, 2090)
    }

    fn client(&self) -> Identity {
        self.sign("n1", ExtendedKeyUsagePurpose::ClientAuth, 2090)
    }

    fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// A server with this identity, which knows clients by our signature.
    fn serve(&self, identity: &Identity) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
                .allow_unauthenticated()
                .build()
                .unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![identity.certificate.der().clone()],
                PrivateKeyDer::Pkcs8(identity.key.serialize_der().into()),
            );
        Arc::new(config.unwrap())
    }
}

struct Tls(StreamOwned<ServerConnection, TcpStream>);

impl Connection for Tls {
    fn is_known(&self) -> bool {
        self.0.conn.peer_certificates().is_some()
    }
}

impl Read for Tls {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Tls {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A node with an API server behind TLS in its namespace; without credentials nobody gets anything.
struct Rig {
    node: Node,
    api: Api,
    authority: Authority,
    serving: Arc<Mutex<Arc<ServerConfig>>>,
}

const TOKEN: &str = "abc.DEF-123";

impl Rig {
    fn new() -> Self {
        let node = Node::new(1);
        node.namespace.ip("route add default via 10.199.0.2");
        let authority = Authority::new();
        let identity = authority.server("127.0.0.1");
        let serving = Arc::new(Mutex::new(authority.serve(&identity)));
        let current = Arc::clone(&serving);
        let listener = node
            .namespace
            .enter(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let api = Api::serve_by(listener, move |mut stream| {
            let config = Arc::clone(&current.lock().unwrap());
            let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
            while connection.is_handshaking() {
                connection.complete_io(&mut stream)?;
            }
            Ok(Tls(StreamOwned::new(connection, stream)))
        });
        api.habits(|habits| habits.credentials = Some(format!("Bearer {TOKEN}")));
        api.create("n1", &["10.244.1.0/24"], &json!({}));
        Self {
            node,
            api,
            authority,
            serving,
        }
    }

    /// Writes a file; its path.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.node.directory.path().join(name)
    }

    /// A kubeconfig with these fields of the cluster and the user; its path.
    fn kubeconfig(&self, cluster: &serde_json::Value, user: &serde_json::Value) -> String {
        let mut cluster = cluster.clone();
        cluster["server"] = format!("https://{}", self.api.address).into();
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
        });
        self.file("kubeconfig", &text.to_string())
    }

    fn start(&self, kubeconfig: &str) -> common::Process {
        let flags = ["--kube-subnet-mgr", "--kubeconfig-file", kubeconfig];
        self.node.start_through(&[CONTROLPLANE], &flags)
    }

    /// Somebody takes an annotation away, and the program puts it back.
    fn wait_written(&self, what: &str) {
        self.api
            .change("n1", |node| node["metadata"]["annotations"] = json!({}));
        let (_, took) = eventually(what, || {
            let node = self.api.node("n1");
            let written = &node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"];
            (written == "10.199.0.1").then_some(())
        });
        println!("{what}: {took:?}");
    }

    fn wait_problem(&self, wanted: &str) {
        eventually(wanted, || {
            let problems = self.node.state().problems;
            problems
                .iter()
                .any(|problem| problem.contains(wanted))
                .then_some(())
        });
    }
}

fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for bytes in text.as_bytes().chunks(3) {
        let word = bytes
            .iter()
            .fold(0, |word: u32, byte| word << 8 | u32::from(*byte));
        let word = word << (8 * (3 - bytes.len()));
        for at in 0..4 {
            let digit = usize::try_from(word >> (18 - 6 * at) & 63).unwrap();
            let digit = if at <= bytes.len() {
                DIGITS[digit]
            } else {
                b'='
            };
            encoded.push(char::from(digit));
        }
    }
    encoded
}

#[test]
fn each_kind_of_credentials_opens_the_door() {
    let rig = Rig::new();
    let ca = rig.authority.pem();
    let client = rig.authority.client();
    let (certificate, key) = (client.certificate.pem(), client.key.serialize_pem());
    let ca_file = rig.file("ca.pem", &ca);
    let data = json!({"certificate-authority-data": base64(&ca)});
    let file = json!({"certificate-authority": ca_file});
    // Files end in a line feed more often than not.
    let token_file = rig.file("token", &format!("{TOKEN}\n"));
    for (what, cluster, user) in [
        (
            "certificate in the kubeconfig",
            &data,
            json!({"client-certificate-data": base64(&certificate), "client-key-data": base64(&key)}),
        ),
        (
            "certificate in files",
            &file,
            json!({"client-certificate": rig.file("client.pem", &certificate), "client-key": rig.file("key.pem", &key)}),
        ),
        ("token in the kubeconfig", &data, json!({"token": TOKEN})),
        ("token in a file", &file, json!({"tokenFile": token_file})),
    ] {
        let process = rig.start(&rig.kubeconfig(cluster, &user));
        rig.wait_written(what);
        drop(process);
    }
    // Another name than the address.
    let identity = rig.authority.server("api.example.com");
    *rig.serving.lock().unwrap() = rig.authority.serve(&identity);
    let mut named = data.clone();
    named["tls-server-name"] = "api.example.com".into();
    let _process = rig.start(&rig.kubeconfig(&named, &json!({"token": TOKEN})));
    rig.wait_written("tls-server-name");
}

#[test]
fn what_is_replaced_while_it_runs_is_read_anew() {
    let rig = Rig::new();
    let ca_file = rig.file("ca.pem", &rig.authority.pem());
    let token_file = rig.file("token", TOKEN);
    let kubeconfig = rig.kubeconfig(
        &json!({"certificate-authority": ca_file}),
        &json!({"tokenFile": token_file}),
    );
    let _process = rig.start(&kubeconfig);
    rig.wait_written("at first");
    rig.api
        .habits(|habits| habits.credentials = Some("Bearer second".to_owned()));
    rig.api.cut();
    rig.wait_problem("the API server answers 401");
    rig.file("token", "second");
    rig.wait_written("another token");
    let other = Authority::new();
    let identity = other.server("127.0.0.1");
    *rig.serving.lock().unwrap() = other.serve(&identity);
    rig.api.habits(|habits| habits.down = true);
    rig.api.cut();
    rig.wait_problem("nodes:");
    rig.api.habits(|habits| habits.down = false);
    rig.wait_problem("not signed by the certificate authority given");
    rig.file("ca.pem", &other.pem());
    rig.wait_written("another certificate authority");
}

#[test]
fn what_stands_against_a_connection_is_said() {
    let rig = Rig::new();
    let ca = json!({"certificate-authority-data": base64(&rig.authority.pem())});
    let user = json!({"token": TOKEN});
    let (stranger, other_name, expired) = (
        Authority::new(),
        rig.authority.server("api.example.com"),
        rig.authority
            .sign("127.0.0.1", ExtendedKeyUsagePurpose::ServerAuth, 2021),
    );
    let right = rig.authority.server("127.0.0.1");
    let unknown = json!({"certificate-authority-data": base64(&stranger.pem())});
    for (identity, cluster, user, wanted) in [
        (
            &right,
            &unknown,
            &user,
            "not signed by the certificate authority given",
        ),
        (&right, &json!({}), &user, "certificate"),
        (&other_name, &ca, &user, "set tls-server-name"),
        (&expired, &ca, &user, "renew the server's certificate"),
        (
            &right,
            &ca,
            &json!({}),
            "answers 401: Unauthorized: check the credentials",
        ),
        (
            &right,
            &ca,
            &json!({"token": "wrong"}),
            "answers 401: Unauthorized: check the credentials",
        ),
    ] {
        *rig.serving.lock().unwrap() = rig.authority.serve(identity);
        let process = rig.start(&rig.kubeconfig(cluster, user));
        rig.wait_problem(wanted);
        process.signal(libc::SIGTERM);
        let (code, log) = wait_exit(process);
        assert_eq!(code, 0, "{log}");
        println!("{:?}", rig.node.state().problems);
        fs::remove_file(rig.node.run_dir().join("controlplane.json")).unwrap();
    }
    assert!(rig.api.node("n1")["metadata"]["annotations"] == json!({}));
    // A file that is not there ends the start.
    let missing = json!({"certificate-authority": "/nonexistent/ca.pem"});
    let (code, log) = wait_exit(rig.start(&rig.kubeconfig(&missing, &user)));
    assert!(code == 1 && log.contains("/nonexistent/ca.pem"), "{log}");
}

#[test]
fn a_pod_uses_its_own_account() {
    let rig = Rig::new();
    // The account's folder has a fixed path, so the program gets a /run of its own.
    let account = rig.path("own-run/secrets/kubernetes.io/serviceaccount");
    fs::create_dir_all(&account).unwrap();
    let write = |name: &str, text: &str| fs::write(account.join(name), text).unwrap();
    write("ca.crt", &rig.authority.pem());
    write("namespace", "kube-flannel");
    write("token", TOKEN);
    let own_run = rig.path("own-run");
    let mount = "mount --bind \"$0\" /run && exec \"$@\"";
    let host = format!("KUBERNETES_SERVICE_HOST={}", rig.api.address.ip());
    let port = format!("KUBERNETES_SERVICE_PORT={}", rig.api.address.port());
    let command = [
        "env",
        &host,
        &port,
        "unshare",
        "--mount",
        "sh",
        "-c",
        mount,
        own_run.to_str().unwrap(),
        CONTROLPLANE,
    ];
    assert!(Path::new("/run").is_dir());
    let _process = rig.node.start_through(&command, &["--kube-subnet-mgr"]);
    rig.wait_written("the pod's account");
    // The kubelet replaces it by and by.
    rig.api
        .habits(|habits| habits.credentials = Some("Bearer second".to_owned()));
    rig.api.cut();
    rig.wait_problem("the API server answers 401");
    write("token", "second");
    rig.wait_written("another token");
}
