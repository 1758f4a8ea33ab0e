//! One HTTP GET against the hub: time-outs, redirects by rule, token, status to error. Knows nothing of models.

use crate::endpoint::{Endpoint, Hop};
use crate::error::printable;
use crate::options::SourceOptions;
use crate::store::is_sha256;
use std::io::{self, Read};
use std::time::Duration;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Most redirects of one request; the hub itself needs two.
const MAX_REDIRECTS: usize = 5;
/// Largest file of certificate authorities, in bytes.
const MAX_CA_BUNDLE_BYTES: u64 = 8 << 20;

/// How a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    #[error("broke off: {0}")]
    Broken(String),
    #[error("answered {0}")]
    Status(u16),
    #[error("limits requests (429); {}", match .retry_after { Some(s) => format!("try again in {} s", s.as_secs()),
        None => "try again later, or set HF_TOKEN".to_owned() })]
    RateLimited { retry_after: Option<Duration> },
    #[error("redirected where it may not: {0}")]
    Redirect(String),
    #[error("cannot be asked: {0}")]
    Setup(String),
}

/// What the hub's own answers said of a large file on the way to its content.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Linked {
    pub(crate) sha256: Option<String>,
    pub(crate) size_bytes: Option<u64>,
}

pub(crate) struct Client {
    agent: Agent,
    pub(crate) endpoint: Endpoint,
    token: Option<String>,
}

impl Client {
    pub(crate) fn new(options: &SourceOptions) -> Result<Client, HttpError> {
        let endpoint = Endpoint::new(&options.hub_endpoint, &options.hub_cdn_hosts)
            .map_err(|reason| HttpError::Setup(format!("HF_ENDPOINT: {reason}")))?;
        let limits = &options.limits;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("modelbroker/", env!("CARGO_PKG_VERSION")))
            // A compressed body would not have the length and digest that are checked.
            .accept_encoding("identity")
            .timeout_resolve(Some(limits.connect))
            .timeout_connect(Some(limits.connect))
            .timeout_send_request(Some(limits.stall))
            .timeout_recv_response(Some(limits.stall))
            .timeout_per_read(Some(limits.stall))
            .timeout_per_write(Some(limits.stall));
        if endpoint.is_loopback() {
            config = config.proxy(None);
        }
        if let Some(path) = &options.ca_bundle {
            let roots = read_roots(path)
                .map_err(|reason| HttpError::Setup(format!("certificates {}: {reason}", path.display())))?;
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Client { agent: config.build().new_agent(), endpoint, token: options.token.clone() })
    }

    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Asks for `path` of the endpoint, from byte `start` on. `sha256` is what the content is known to have: without it
    /// (or one in the hub's own answer) no redirect leads to another host.
    pub(crate) fn get(
        &self,
        path: &str,
        start: u64,
        sha256: Option<&str>,
    ) -> Result<(Response<Body>, Linked), HttpError> {
        let mut url = self.endpoint.url(path);
        let mut linked = Linked::default();
        let mut at_endpoint = true;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if start > 0 {
                request = request.header("Range", format!("bytes={start}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| self.endpoint.may_carry_token(&url)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| from_ureq(&error))?;
            if at_endpoint {
                linked.read(response.headers());
            }
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok((response, linked)),
                StatusCode::MOVED_PERMANENTLY
                | StatusCode::FOUND
                | StatusCode::SEE_OTHER
                | StatusCode::TEMPORARY_REDIRECT
                | StatusCode::PERMANENT_REDIRECT => {}
                StatusCode::TOO_MANY_REQUESTS => {
                    let retry_after =
                        header(response.headers(), "retry-after").and_then(|text| text.trim().parse().ok());
                    return Err(HttpError::RateLimited { retry_after: retry_after.map(Duration::from_secs) });
                }
                status => return Err(HttpError::Status(status.as_u16())),
            }
            let location = header(response.headers(), "location")
                .ok_or_else(|| HttpError::Redirect("it names no target".to_owned()))?;
            let (target, hop) = self.endpoint.redirect(&url, location).map_err(HttpError::Redirect)?;
            if hop == Hop::CrossHost && sha256.is_none() && linked.sha256.is_none() {
                let reason = "to another host, for content whose SHA-256 the hub did not name".to_owned();
                return Err(HttpError::Redirect(reason));
            }
            at_endpoint = hop == Hop::SameOrigin;
            url = target;
        }
        Err(HttpError::Redirect(format!("over {MAX_REDIRECTS} times")))
    }
}

impl Linked {
    fn read(&mut self, headers: &HeaderMap) {
        let etag =
            header(headers, "x-linked-etag").map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        if let Some(etag) = etag.filter(|etag| is_sha256(etag)) {
            self.sha256 = Some(etag.to_owned());
        }
        if let Some(size) = header(headers, "x-linked-size").and_then(|size| size.parse().ok()) {
            self.size_bytes = Some(size);
        }
    }
}

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Reads a whole small body.
pub(crate) fn read_body(response: Response<Body>, limit_bytes: u64) -> Result<Vec<u8>, HttpError> {
    let mut bytes = Vec::new();
    body_reader(response)
        .take(limit_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| HttpError::Broken(error.to_string()))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(HttpError::Broken(format!("its answer is longer than {limit_bytes} bytes")));
    }
    Ok(bytes)
}

/// The body without ureq's own limit: callers count.
pub(crate) fn body_reader(response: Response<Body>) -> impl Read {
    response.into_body().into_with_config().limit(u64::MAX).reader()
}

fn from_ureq(error: &ureq::Error) -> HttpError {
    use ureq::Timeout;
    let text = printable(&error.to_string(), 200);
    match error {
        ureq::Error::HostNotFound => {
            HttpError::Unreachable("its name does not resolve (no network?)".to_owned())
        }
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
            HttpError::Unreachable("no connection within the time limit".to_owned())
        }
        ureq::Error::Timeout(_) => {
            HttpError::Broken("it fell silent for longer than the time limit".to_owned())
        }
        ureq::Error::Io(io)
            if matches!(
                io.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
            ) =>
        {
            HttpError::Broken(text)
        }
        ureq::Error::Protocol(_) => HttpError::Broken(text),
        _ => HttpError::Unreachable(text),
    }
}

fn read_roots(path: &std::path::Path) -> Result<RootCerts, String> {
    let mut pem = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_CA_BUNDLE_BYTES).read_to_end(&mut pem).map_err(|error| error.to_string())?;
    let certs: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(cert)) => Some(cert),
            _ => None,
        })
        .collect();
    if certs.is_empty() {
        return Err("no certificate in PEM format in it".to_owned());
    }
    Ok(RootCerts::new_with_certs(&certs))
}
