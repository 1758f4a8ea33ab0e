//! Hub URLs: the endpoint taken apart, and which redirects may be followed. Pure: no request is made here.

use ureq::http::Uri;

/// Where the public hub keeps large files; hosts end with one of these.
const PUBLIC_CDN_SUFFIXES: [&str; 2] = [".hf.co", ".huggingface.co"];
/// Longest URL that is followed, in bytes (signed ones have about 1500).
const MAX_URL_BYTES: usize = 8 << 10;

/// The base of a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    origin: Origin,
    /// Path prefix without a slash at its end.
    base: String,
    cdn_hosts: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    https: bool,
    host: String,
    port: u16,
}

/// Where a redirect leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hop {
    /// To the endpoint itself: the token may go along.
    SameOrigin,
    /// To a content network: no token, and only for content whose SHA-256 is known beforehand.
    CrossHost,
}

impl Endpoint {
    pub(crate) fn new(url: &str, cdn_hosts: &[String]) -> Result<Endpoint, String> {
        let uri = parse(url)?;
        if uri.query().is_some() {
            return Err("it has a query".to_owned());
        }
        let base = uri.path().trim_end_matches('/').to_owned();
        Ok(Endpoint { origin: origin_of(&uri)?, base, cdn_hosts: cdn_hosts.to_vec() })
    }

    /// `path` begins with a slash and is made of validated parts.
    pub(crate) fn url(&self, path: &str) -> String {
        let Origin { https, host, port } = &self.origin;
        let scheme = if *https { "https" } else { "http" };
        let default_port = if *https { 443 } else { 80 };
        if *port == default_port {
            format!("{scheme}://{host}{}{path}", self.base)
        } else {
            format!("{scheme}://{host}:{port}{}{path}", self.base)
        }
    }

    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.origin.host)
    }

    /// The token goes to the endpoint only, and in clear text only to this machine.
    pub(crate) fn may_carry_token(&self, url: &str) -> bool {
        let same = parse(url).and_then(|uri| origin_of(&uri)).is_ok_and(|origin| origin == self.origin);
        same && (self.origin.https || self.is_loopback())
    }

    /// Resolves the `Location` of an answer to `from`, and says what kind of hop that is.
    pub(crate) fn redirect(&self, from: &str, location: &str) -> Result<(String, Hop), String> {
        if location.len() > MAX_URL_BYTES {
            return Err("its target is too long".to_owned());
        }
        let from = origin_of(&parse(from)?)?;
        let target = if location.starts_with('/') && !location.starts_with("//") {
            let scheme = if from.https { "https" } else { "http" };
            format!("{scheme}://{}:{}{location}", from.host, from.port)
        } else {
            location.to_owned()
        };
        let to = origin_of(&parse(&target)?)?;
        if to == self.origin {
            return Ok((target, Hop::SameOrigin));
        }
        if self.origin.https && !to.https {
            return Err(format!("it leads from https to http ({})", to.host));
        }
        let public = PUBLIC_CDN_SUFFIXES.iter().any(|suffix| to.host.ends_with(suffix));
        if to.host == self.origin.host || (public && to.https) || self.cdn_hosts.contains(&to.host) {
            return Ok((target, Hop::CrossHost));
        }
        Err(format!(
            "it leads to another host ({}); if that is right, add it to MODELBROKER_HUB_CDN_HOSTS",
            to.host
        ))
    }
}

fn parse(url: &str) -> Result<Uri, String> {
    url.parse::<Uri>().map_err(|error| format!("not a URL: {error}"))
}

fn origin_of(uri: &Uri) -> Result<Origin, String> {
    let https = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err("a URL must begin with https:// or http://".to_owned()),
    };
    let authority = uri.authority().ok_or("it names no host")?;
    if authority.as_str().contains('@') {
        return Err("it contains a user name or password".to_owned());
    }
    let host = authority.host().to_ascii_lowercase();
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
    Ok(Origin { https, host, port })
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let public = Endpoint::new("https://huggingface.co", &[]).unwrap();
        assert_eq!(public.url("/a"), "https://huggingface.co/a");
        let mirror = Endpoint::new("http://127.0.0.1:81/hf/", &[]).unwrap();
        assert_eq!(mirror.url("/a"), "http://127.0.0.1:81/hf/a");
        assert!(mirror.is_loopback() && !public.is_loopback());
        for bad in [
            "",
            "huggingface.co",
            "ftp://x",
            "https://",
            "https://u:p@x",
            "https://x/?q",
            "file:///etc/passwd",
        ] {
            assert!(Endpoint::new(bad, &[]).is_err(), "{bad}");
        }
    }

    #[test]
    fn tokens_stay_with_the_endpoint() {
        let public = Endpoint::new("https://huggingface.co", &[]).unwrap();
        assert!(
            public.may_carry_token("https://huggingface.co/x")
                && public.may_carry_token("https://HuggingFace.co:443/")
        );
        for other in [
            "http://huggingface.co/x",
            "https://huggingface.co:444/",
            "https://huggingface.co.evil/x",
            "https://a.hf.co/",
        ] {
            assert!(!public.may_carry_token(other), "{other}");
        }
        let plain = Endpoint::new("http://mirror.example", &[]).unwrap();
        assert!(!plain.may_carry_token("http://mirror.example/x"), "not in clear text");
        assert!(Endpoint::new("http://[::1]:8", &[]).unwrap().may_carry_token("http://[::1]:8/x"));
    }

    #[test]
    fn redirects() {
        let hosts = ["cdn.example".to_owned()];
        let hub = Endpoint::new("https://huggingface.co", &hosts).unwrap();
        let go = |location: &str| hub.redirect("https://huggingface.co/a/b", location);
        assert_eq!(go("/c?x=1").unwrap(), ("https://huggingface.co:443/c?x=1".to_owned(), Hop::SameOrigin));
        for cdn in ["https://cdn-lfs.hf.co/x", "https://cas-bridge.xethub.hf.co/x", "https://cdn.example/x"] {
            assert_eq!(go(cdn).unwrap().1, Hop::CrossHost, "{cdn}");
        }
        for bad in [
            "http://huggingface.co/x",
            "http://cdn-lfs.hf.co/x",
            "https://evil/",
            "https://evilhf.co/",
            "//evil/x",
            "x",
            "https://hf.co.evil/",
            "file:///x",
            "https://u@cdn-lfs.hf.co/",
            "http://169.254.169.254/",
            "",
        ] {
            assert!(go(bad).is_err(), "{bad}");
        }
    }
}
