//! The hub over HTTP, against a server on the loopback interface that behaves well, badly, or breaks off.

mod support;

use model_source::{
    ModelRef, NoProgress, Origin, Outcome, Place, ResolvedModel, SourceError, SourceOptions, resolve,
};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::*;

fn ask(options: &SourceOptions) -> Result<ResolvedModel, SourceError> {
    resolve(&ModelRef::parse("org/name").unwrap(), options, &mut NoProgress)
}

/// Runs against a hub that answers so; gives the result, and checks that a failure leaves nothing.
fn against(
    handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    change: impl FnOnce(&mut SourceOptions),
) -> (Result<ResolvedModel, SourceError>, Vec<Request>) {
    let cache = tempfile::tempdir().unwrap();
    let hub = Server::start(handler);
    let mut options = options(cache.path(), &hub.url());
    change(&mut options);
    let result = ask(&options);
    if result.is_err() {
        assert_nothing_left(cache.path());
        assert!(
            ask(&SourceOptions { offline: true, ..options }).is_err(),
            "a failed download is not found later"
        );
    }
    (result, hub.requests())
}

fn refusal(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> (Outcome, String) {
    let (result, _) = against(handler, |_| {});
    let error = result.unwrap_err();
    let (outcome, why) = attempt(&error, Place::Hub);
    (outcome, why.to_owned())
}

fn is_weights(request: &Request) -> bool {
    request.path.ends_with("model.safetensors")
}

#[test]
fn a_model_is_fetched_once_verified_and_kept() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let served = files.clone();
    let content = Server::start(move |request| match request.path.as_str() {
        "/signed?key=1" => Reply::ok(&served["model.safetensors"]),
        _ => Reply::status(404),
    });
    // As the public hub does it: small files from itself, large ones from another host, with their digest named.
    let (served, content_url) = (files.clone(), format!("http://localhost:{}/signed?key=1", content.port));
    let hub = Server::start(move |request| {
        if is_weights(request) {
            let etag = format!("\"{}\"", sha256(&served["model.safetensors"]));
            return Reply::redirect(&content_url).with("X-Linked-ETag", &etag);
        }
        plain_hub(&served, request)
    });
    let mut options = options(cache.path(), &hub.url());
    options.hub_cdn_hosts = vec!["localhost".to_owned()];
    options.token = Some("hf_secret".to_owned());

    let mut progress = Recorder::default();
    let model = resolve(&ModelRef::parse("org/name").unwrap(), &options, &mut progress).unwrap();
    assert_eq!((model.id.as_str(), model.origin), ("org/name", Origin::Hub));
    assert_eq!(model.revision.as_deref(), Some(COMMIT));
    let wanted =
        ["1_Pooling/config.json", "config.json", "model.safetensors", "modules.json", "tokenizer.json"];
    for name in wanted {
        assert_eq!(std::fs::read(model.folder.join(name)).unwrap(), files[name], "{name}");
    }
    assert_eq!(files_below(&model.folder).len(), wanted.len() + 1, "those and our own record");

    assert!(hub.requests().iter().all(|request| request.headers["authorization"] == "Bearer hf_secret"));
    assert!(content.requests().iter().all(|request| !request.headers.contains_key("authorization")));
    assert_eq!(content.requests().len(), 1);
    assert_eq!(hub.requests().len(), 1 + wanted.len());
    let (what, total, done) = &progress.phases[0];
    assert!(what.contains("org/name") && progress.open == 0);
    // modules.json was needed to know what to fetch, before the total was known.
    assert_eq!(Some(*done), *total);

    let again = ask(&options).unwrap();
    assert_eq!((again.origin, &again.folder), (Origin::OwnCache, &model.folder));
    assert_eq!(ask(&SourceOptions { offline: true, ..options.clone() }).unwrap().revision, model.revision);
    assert_eq!(hub.requests().len(), 1 + wanted.len(), "nothing was asked again");
    let pinned = ModelRef::parse(&format!("org/name@{COMMIT}")).unwrap();
    assert_eq!(resolve(&pinned, &options, &mut NoProgress).unwrap().origin, Origin::OwnCache);
}

#[test]
fn shards_are_fetched_and_evil_names_refused() {
    let mut files = model_files();
    files.remove("model.safetensors");
    for part in ["m-1.safetensors", "m-2.safetensors"] {
        files.insert(part.to_owned(), safetensors(part.as_bytes()));
    }
    let index = r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#;
    files.insert("model.safetensors.index.json".to_owned(), index.as_bytes().to_vec());
    let served = files.clone();
    let (result, requests) = against(move |request| plain_hub(&served, request), |_| {});
    assert_eq!(result.unwrap().origin, Origin::Hub);
    assert!(requests.iter().any(|request| request.path.ends_with("/m-2.safetensors")));

    let index = r#"{"weight_map":{"a":"../../../m-1.safetensors"}}"#;
    files.insert("model.safetensors.index.json".to_owned(), index.as_bytes().to_vec());
    let (outcome, why) = refusal(move |request| plain_hub(&files, request));
    assert!(outcome == Outcome::Unusable && why.contains("index.json"), "{why}");
}

#[test]
fn a_body_that_breaks_off_is_resumed() {
    let (files, count) = (model_files(), AtomicUsize::new(0));
    let (result, requests) = against(
        move |request| {
            let mut reply = plain_hub(&files, request);
            if is_weights(request) && count.fetch_add(1, Ordering::SeqCst) == 0 {
                reply.cut_at = Some(150_000);
            }
            reply
        },
        |_| {},
    );
    assert_eq!(result.unwrap().origin, Origin::Hub);
    let ranges: Vec<_> =
        requests.iter().filter(|r| is_weights(r)).map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [None, Some("bytes=150000-".to_owned())]);
}

#[test]
fn a_server_that_ignores_the_range_is_read_from_the_start() {
    let (files, count) = (model_files(), AtomicUsize::new(0));
    let cache = tempfile::tempdir().unwrap();
    let hub = Server::start(move |request| {
        let mut request = request.clone();
        request.headers.remove("range");
        let mut reply = plain_hub(&files, &request);
        if is_weights(&request) && count.fetch_add(1, Ordering::SeqCst) < 2 {
            reply.cut_at = Some(99_000);
        }
        reply
    });
    let mut progress = Recorder::default();
    let options = options(cache.path(), &hub.url());
    resolve(&ModelRef::parse("org/name").unwrap(), &options, &mut progress).unwrap();
    assert_eq!(Some(progress.phases[0].2), progress.phases[0].1, "no byte is reported twice");
}

#[test]
fn a_body_that_always_breaks_off_is_an_error() {
    let files = model_files();
    let (outcome, why) = refusal(move |request| {
        let mut reply = plain_hub(&files, request);
        reply.cut_at = is_weights(request).then_some(10);
        reply
    });
    assert!(outcome == Outcome::Unreachable && why.contains("model.safetensors"), "{why}");
}

#[test]
fn wrong_content_is_refused() {
    let files = model_files();
    let (outcome, why) = refusal(move |request| {
        let mut reply = plain_hub(&files, request);
        if is_weights(request) {
            *reply.body.last_mut().unwrap() ^= 1;
        }
        reply
    });
    assert!(outcome == Outcome::Refused && why.contains("SHA-256"), "{why}");

    let files = model_files();
    let (outcome, why) = refusal(move |request| {
        let mut reply = plain_hub(&files, request);
        if is_weights(request) {
            reply.body.push(0);
        }
        reply
    });
    assert!(outcome == Outcome::Refused && why.contains("announced"), "{why}");

    let files = model_files();
    let (outcome, why) = refusal(move |request| {
        let reply = plain_hub(&files, request);
        if is_weights(request) { reply.with("X-Linked-Etag", &"0".repeat(64)) } else { reply }
    });
    assert!(outcome == Outcome::Unusable && why.contains("contradicts"), "{why}");

    // Right by its digest, but cut before it was put on the hub.
    let mut files = model_files();
    files.get_mut("model.safetensors").unwrap().truncate(1000);
    let (outcome, why) = refusal(move |request| plain_hub(&files, request));
    assert!(outcome == Outcome::Unusable && why.contains("header describes"), "{why}");
}

#[test]
fn redirects_that_are_not_the_hubs_own_are_refused() {
    let content = Server::start(|_| Reply::ok(b"stolen"));
    let away = format!("http://localhost:{}/x", content.port);

    let (files, target) = (model_files(), away.clone());
    let (outcome, why) =
        refusal(move |r| if is_weights(r) { Reply::redirect(&target) } else { plain_hub(&files, r) });
    assert!(outcome == Outcome::Refused && why.contains("another host"), "{why}");

    // An allowed host, but a file whose digest nobody named.
    let (files, target) = (model_files(), away.clone());
    let small = move |r: &Request| {
        if r.path.ends_with("/config.json") { Reply::redirect(&target) } else { plain_hub(&files, r) }
    };
    let (result, _) = against(small, |options| options.hub_cdn_hosts = vec!["localhost".to_owned()]);
    let error = result.unwrap_err();
    assert_eq!(attempt(&error, Place::Hub).0, Outcome::Refused);

    for target in ["ftp://x/", "", "/loop"] {
        let (outcome, why) = refusal(move |_| Reply::redirect(target));
        assert!(outcome == Outcome::Refused && why.contains("redirect"), "{why}");
    }
    assert!(content.requests().is_empty());
}

#[test]
fn a_renamed_model_is_followed_on_the_same_host() {
    let files = model_files();
    let (result, _) = against(
        move |request| match request.path.strip_prefix("/api/models/org/name/") {
            Some(rest) => Reply::status(307).with("Location", &format!("/api/models/new/name/{rest}")),
            None => plain_hub(&files, request),
        },
        |_| {},
    );
    assert_eq!(result.unwrap().id, "org/name");
}

#[test]
fn each_status_says_what_to_do() {
    for (status, outcome, text) in [
        (401, Outcome::Refused, "HF_TOKEN"),
        (403, Outcome::Refused, "HF_TOKEN"),
        (404, Outcome::Absent, "spelling"),
        (429, Outcome::Unreachable, "try again"),
        (500, Outcome::Unreachable, "500"),
        (418, Outcome::Unreachable, "418"),
    ] {
        let (seen, why) = refusal(move |_| Reply::status(status));
        assert!(seen == outcome && why.contains(text), "{status}: {seen:?} {why}");
    }
    let (_, why) = refusal(|_| Reply::status(429).with("Retry-After", "9999"));
    assert!(why.contains("9999 s"), "{why}");
    for body in ["", "{}", "[1]", r#"{"sha":"main","siblings":[]}"#, "<html>"] {
        assert_eq!(refusal(move |_| Reply::ok(body.as_bytes())).0, Outcome::Unusable, "{body}");
    }
}

#[test]
fn passing_troubles_are_tried_again() {
    for trouble in [Reply::status(503), Reply::status(429).with("Retry-After", "0")] {
        let (files, count) = (model_files(), AtomicUsize::new(0));
        let (result, _) = against(
            move |request| {
                if count.fetch_add(1, Ordering::SeqCst) % 2 == 0 {
                    trouble.clone()
                } else {
                    plain_hub(&files, request)
                }
            },
            |_| {},
        );
        assert_eq!(result.unwrap().origin, Origin::Hub);
    }
}

#[test]
fn a_silent_server_costs_the_time_limit_only() {
    for silent_at_listing in [true, false] {
        let files = model_files();
        let (result, _) = against(
            move |request| {
                let mut reply = plain_hub(&files, request);
                reply.stall = silent_at_listing || is_weights(request);
                reply
            },
            |options| {
                options.limits.stall = Duration::from_millis(100);
                options.limits.retries = 1;
            },
        );
        let error = result.unwrap_err();
        assert_eq!(attempt(&error, Place::Hub).0, Outcome::Unreachable);
    }
}

#[test]
fn no_pickle_is_ever_asked_for() {
    let mut files = model_files();
    files.remove("model.safetensors");
    let (result, requests) = against(move |request| plain_hub(&files, request), |_| {});
    let error = result.unwrap_err();
    let (outcome, why) = attempt(&error, Place::Hub);
    assert!(
        outcome == Outcome::Unusable && why.contains("pytorch_model.bin") && why.contains("convert"),
        "{why}"
    );
    assert!(requests.iter().all(|request| !request.path.ends_with(".bin")));
}

#[test]
fn announced_sizes_over_the_limit_are_not_fetched() {
    let files = model_files();
    let (result, requests) =
        against(move |request| plain_hub(&files, request), |options| options.limits.max_file_bytes = 1000);
    let error = result.unwrap_err();
    assert!(attempt(&error, Place::Hub).1.contains("over the limit"));
    assert!(!requests.iter().any(is_weights));
    let files: BTreeMap<_, _> = model_files();
    let (result, _) =
        against(move |request| plain_hub(&files, request), |options| options.limits.max_model_bytes = 1000);
    assert!(attempt(&result.unwrap_err(), Place::Hub).1.contains("over the limit"));
}

#[test]
fn an_unreachable_hub_is_named_with_the_other_places() {
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(cache.path(), &{
        let gone = Server::start(|_| Reply::status(500));
        gone.url()
    });
    options.hf_hub_cache = Some(cache.path().join("hf"));
    let error = ask(&options).unwrap_err();
    let places: Vec<_> = tried(&error).iter().map(|attempt| attempt.place).collect();
    assert_eq!(places, [Place::OwnCache, Place::HuggingFaceCache, Place::Hub]);
    assert_eq!(attempt(&error, Place::Hub).0, Outcome::Unreachable);
    let text = error.to_string();
    for part in ["org/name", "127.0.0.1", "models--org--name", "What to do", "HTTPS_PROXY"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    options.hub_endpoint = "huggingface.co".to_owned();
    assert!(attempt(&ask(&options).unwrap_err(), Place::Hub).1.contains("HF_ENDPOINT"));
}

#[test]
fn many_at_once_download_once() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let hub = Server::start(move |request| plain_hub(&files, request));
    let options = options(cache.path(), &hub.url());
    let origins: Vec<Origin> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(|| ask(&options).unwrap().origin)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(origins.iter().filter(|origin| **origin == Origin::Hub).count(), 1);
    assert_eq!(hub.requests().iter().filter(|request| is_weights(request)).count(), 1);
}

#[test]
fn a_damaged_copy_is_fetched_again() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let hub = Server::start(move |request| plain_hub(&files, request));
    let options = options(cache.path(), &hub.url());
    let first = ask(&options).unwrap();
    let weights = first.folder.join("model.safetensors");
    std::fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(500).unwrap();
    let error = ask(&SourceOptions { offline: true, ..options.clone() }).unwrap_err();
    assert_eq!(attempt(&error, Place::OwnCache).0, Outcome::Unusable);
    assert_eq!(ask(&options).unwrap().origin, Origin::Hub);
    assert_eq!(ask(&options).unwrap().origin, Origin::OwnCache);
}
