//! What the tests share: a hub on the loopback interface, model files, options that touch nothing of this machine.

#![allow(dead_code, unreachable_pub, missing_docs)]

use model_source::{Attempt, Outcome, Place, Progress, SourceError, SourceOptions};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub const COMMIT: &str = "00112233445566778899aabbccddeeff00112233";

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A safetensors file with one tensor.
pub fn safetensors(data: &[u8]) -> Vec<u8> {
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, data.len());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The files of a small whole model, some that nobody should want among them.
pub fn model_files() -> BTreeMap<String, Vec<u8>> {
    let modules = r#"[{"path":"","type":"sentence_transformers.models.Transformer"},
        {"path":"1_Pooling","type":"sentence_transformers.models.Pooling"}]"#;
    let weights = safetensors(&(0..200_000_u32).map(|i| (i % 251) as u8).collect::<Vec<_>>());
    [
        ("config.json", b"{\"a\":1}".to_vec()),
        ("tokenizer.json", b"{\"b\":2}".to_vec()),
        ("modules.json", modules.as_bytes().to_vec()),
        ("1_Pooling/config.json", b"{}".to_vec()),
        ("model.safetensors", weights),
        ("pytorch_model.bin", b"pickle".to_vec()),
        ("README.md", b"# readme".to_vec()),
        (".gitattributes", b"x".to_vec()),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .collect()
}

pub fn write_model(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// Options that reach nothing: no Python, no Hugging Face cache, an endpoint to be set.
pub fn options(cache: &Path, endpoint: &str) -> SourceOptions {
    let mut options = SourceOptions::new(cache.to_path_buf());
    options.hub_endpoint = endpoint.to_owned();
    options.pip.pythons.clear();
    options.limits.retry_pause = Duration::from_millis(1);
    options
}

pub fn tried(error: &SourceError) -> &[Attempt] {
    match error {
        SourceError::NotFound { tried, .. } => tried,
        other => panic!("not the expected error: {other}"),
    }
}

pub fn attempt(error: &SourceError, place: Place) -> (Outcome, &str) {
    let attempt = tried(error).iter().find(|attempt| attempt.place == place).expect("the place was tried");
    (attempt.outcome, &attempt.why)
}

/// Every file below `dir`, and every link, by its path.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .flat_map(|path| if path.is_dir() && !path.is_symlink() { files_below(&path) } else { vec![path] })
        .collect();
    files.sort();
    files
}

/// Asserts that the cache holds nothing but lock files.
pub fn assert_nothing_left(cache: &Path) {
    let left: Vec<_> = files_below(cache).into_iter().filter(|path| !path.ends_with("lock")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    for model in std::fs::read_dir(cache.join("models")).into_iter().flatten() {
        for entry in std::fs::read_dir(model.unwrap().path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with("tmp-"), "left behind: {name}");
        }
    }
}

#[derive(Default)]
pub struct Recorder {
    pub phases: Vec<(String, Option<u64>, u64)>,
    pub open: i32,
}

impl Progress for Recorder {
    fn begin(&mut self, what: &str, total_bytes: Option<u64>) {
        assert_eq!(self.open, 0, "phases don't nest");
        self.open += 1;
        self.phases.push((what.to_owned(), total_bytes, 0));
    }
    fn advance(&mut self, bytes: u64) {
        self.phases.last_mut().unwrap().2 += bytes;
    }
    fn end(&mut self) {
        self.open -= 1;
    }
}

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

#[derive(Default, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close after that many bytes of the body, with the full length announced.
    pub cut_at: Option<usize>,
    /// Send nothing more after the head until the server ends.
    pub stall: bool,
}

impl Reply {
    pub fn ok(body: &[u8]) -> Reply {
        Reply { status: 200, body: body.to_vec(), ..Reply::default() }
    }
    pub fn status(status: u16) -> Reply {
        Reply { status, ..Reply::default() }
    }
    pub fn with(mut self, name: &str, value: &str) -> Reply {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
    pub fn redirect(to: &str) -> Reply {
        Reply::status(302).with("Location", to)
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// An HTTP server on 127.0.0.1 that answers each GET by a function and closes the connection.
pub struct Server {
    pub port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<(AtomicBool, Mutex<()>, Condvar)>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new((AtomicBool::new(false), Mutex::new(()), Condvar::new()));
        let (log, ending, handler) = (Arc::clone(&requests), Arc::clone(&stop), Arc::new(handler));
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ending.0.load(Ordering::SeqCst) {
                    break;
                }
                let (log, ending, handler) = (Arc::clone(&log), Arc::clone(&ending), Arc::clone(&handler));
                std::thread::spawn(move || serve(stream.unwrap(), &log, &ending, handler.as_ref()));
            }
        });
        Server { port, requests, stop, acceptor: Some(acceptor) }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub fn paths(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.path).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::SeqCst);
        drop(self.stop.1.lock().unwrap());
        self.stop.2.notify_all();
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

fn serve(
    mut stream: TcpStream,
    log: &Mutex<Vec<Request>>,
    stop: &(AtomicBool, Mutex<()>, Condvar),
    handler: &Handler,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let Ok(line) = line else { return };
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = handler(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    if stream.write_all(head.as_bytes()).is_err() {
        return;
    }
    if reply.stall {
        let mut guard = stop.1.lock().unwrap();
        while !stop.0.load(Ordering::SeqCst) {
            guard = stop.2.wait(guard).unwrap();
        }
        return;
    }
    let _ = stream.write_all(&reply.body[..reply.cut_at.unwrap_or(reply.body.len())]);
}

/// The listing that the hub's API gives for these files; `*.safetensors` are large files with a digest.
pub fn listing(files: &BTreeMap<String, Vec<u8>>) -> String {
    let siblings: Vec<String> = files
        .iter()
        .map(|(name, bytes)| {
            let lfs = if name.ends_with(".safetensors") {
                format!(r#","lfs":{{"sha256":"{}","size":{},"pointerSize":134}}"#, sha256(bytes), bytes.len())
            } else {
                String::new()
            };
            format!(r#"{{"rfilename":"{name}","size":{},"blobId":"x"{lfs}}}"#, bytes.len())
        })
        .collect();
    format!(r#"{{"id":"org/name","sha":"{COMMIT}","siblings":[{}]}}"#, siblings.join(","))
}

/// What a plain hub answers: the listing, and the files by range.
pub fn plain_hub(files: &BTreeMap<String, Vec<u8>>, request: &Request) -> Reply {
    if request.path.starts_with("/api/models/") {
        return Reply::ok(listing(files).as_bytes());
    }
    let Some((_, name)) = request.path.split_once(&format!("/resolve/{COMMIT}/")) else {
        return Reply::status(404);
    };
    let Some(bytes) = files.get(name) else { return Reply::status(404) };
    match request.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')) {
        Some(start) => {
            let start: usize = start.parse().unwrap();
            let mut reply = Reply::ok(&bytes[start..]);
            reply.status = 206;
            reply.with("Content-Range", &format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()))
        }
        None => Reply::ok(bytes),
    }
}
