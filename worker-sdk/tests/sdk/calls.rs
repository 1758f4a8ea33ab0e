//! What callers ask for when nothing goes wrong: lists, threads, futures, cancellation, deadlines, refusals.

use crate::peer::{DIM, FINGERPRINT, Peer, assert_right, block_on, eventually, place, texts, vector};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use worker_sdk::{
    Client, Code, EmbedOptions, Model, ModelRequest, PayloadError, Priority, Route, SdkError, StartBroker,
};

fn both_routes(peer: &Peer) -> [Model; 2] {
    let client = peer.client();
    [Route::Lane, Route::Socket].map(|route| client.model_with(ModelRequest::new("m").route(route)).unwrap())
}

#[test]
fn both_routes_give_the_same_vectors_in_order() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let texts = ["a", "", "grüße", "cached one"];
    let mut seen = Vec::new();
    for model in both_routes(&peer) {
        let rows = model.embed(&texts).unwrap();
        assert_right(&texts, &rows);
        assert_eq!((rows.dim(), rows.fingerprint()), (DIM, FINGERPRINT));
        assert_eq!(rows.cached(), [false, false, false, true]);
        assert_eq!(model.embed_with(&texts, &EmbedOptions::bulk()).unwrap(), rows);
        assert_eq!(model.submit(&texts, &EmbedOptions::default()).unwrap().wait().unwrap(), rows);
        let description = model.description().unwrap();
        assert_eq!((description.model_id.as_str(), description.output_dim), ("m", DIM as u32));
        seen.push(rows);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(&seen[0][2], vector("grüße", FINGERPRINT));
}

#[test]
fn an_empty_list_is_an_empty_result() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let none: [&str; 0] = [];
        let rows = model.embed(&none).unwrap();
        assert_eq!((rows.len(), rows.dim(), rows.fingerprint()), (0, DIM, FINGERPRINT));
        assert!(model.submit(&none, &EmbedOptions::default()).unwrap().wait().unwrap().is_empty());
        assert!(model.token_spans(&none).unwrap().is_empty());
    }
    assert_eq!(peer.behaviour.jobs.load(SeqCst), 0);
}

#[test]
fn long_lists_are_split_and_keep_their_order() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let mut texts = texts(2500);
        texts[1234] = "y".repeat(512 * 1024);
        let before = peer.behaviour.jobs.load(SeqCst);
        assert_right(&texts, &model.embed(&texts).unwrap());
        assert!(peer.behaviour.jobs.load(SeqCst) - before >= 2500 / 64);
        assert_right(&texts, &block_on(model.submit(&texts, &EmbedOptions::bulk()).unwrap()).unwrap());
    }
}

#[test]
fn an_overlong_text_is_a_clear_error_and_nothing_is_computed() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let mut texts = texts(100);
        texts[99] = "x".repeat(512 * 1024 + 1);
        let error = model.embed(&texts).unwrap_err();
        assert!(matches!(error, SdkError::Input(PayloadError::TextTooLong { index: 99, .. })), "{error}");
        assert_eq!((error.code(), error.is_retryable()), ("TOO_LARGE", false));
        assert!(error.to_string().contains("split"));
    }
    assert_eq!(peer.behaviour.jobs.load(SeqCst), 0);
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "a text of one token")]
fn token_spans_come_back_also_when_there_are_more_than_expected() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let spans = model.token_spans(&["two words", "", "one"]).unwrap();
        assert_eq!(spans, [vec![0..3, 4..9], vec![], vec![0..3]]);
        // Three tokens a byte and then some: more than the room first made for the answer.
        let text = "z".repeat(9000);
        let spans = model.token_spans(&[text.as_str(), "a"]).unwrap();
        assert_eq!(spans[0].len(), 3 * text.len() + 999);
        assert_eq!(spans[1], [0..1]);
    }
}

#[test]
fn many_threads_share_a_lane() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        std::thread::scope(|scope| {
            for thread in 0..10 {
                let model = model.clone();
                scope.spawn(move || {
                    for round in 0..100 {
                        let texts: Vec<String> =
                            (0..1 + round % 4).map(|i| format!("{thread} {round} {i}")).collect();
                        match round % 3 {
                            0 => assert_right(&texts, &model.embed(&texts).unwrap()),
                            1 => {
                                let job = model.submit(&texts, &EmbedOptions::default()).unwrap();
                                assert_right(&texts, &job.wait().unwrap());
                            }
                            _ => {
                                let job = model.submit(&texts, &EmbedOptions::default()).unwrap();
                                assert_right(&texts, &block_on(job).unwrap());
                            }
                        }
                    }
                });
            }
        });
    }
    assert_eq!(peer.behaviour.jobs.load(SeqCst), 2 * 10 * 100);
}

#[test]
fn hundreds_of_futures_at_once() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let texts = texts(600);
        let jobs: Vec<_> =
            texts.chunks(1).map(|text| model.submit(text, &EmbedOptions::default()).unwrap()).collect();
        for (job, text) in jobs.into_iter().zip(texts.chunks(1)) {
            assert_right(text, &block_on(job).unwrap());
        }
    }
}

#[test]
fn jobs_can_be_asked_for_without_waiting() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        let mut job = model.submit(&["a"], &EmbedOptions::default()).unwrap();
        let mut outcome = None;
        eventually("the answer", || {
            // On the socket route somebody must read; on a lane asking is enough.
            let _ = model.embed(&["b"]).unwrap();
            outcome = job.try_take();
            outcome.is_some()
        });
        assert_right(&["a"], &outcome.unwrap().unwrap());
        assert!(matches!(job.try_take(), Some(Err(SdkError::Cancelled))));
    }
}

#[test]
fn cancelled_and_dropped_jobs_are_told_to_the_engine() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        peer.behaviour.hold.store(true, SeqCst);
        peer.behaviour.cancels.store(0, SeqCst);
        let job = model.submit(&["a"], &EmbedOptions::default()).unwrap();
        let dropped = model.submit(&["b"], &EmbedOptions::default()).unwrap();
        job.cancel();
        drop(dropped);
        eventually("two cancellations", || peer.behaviour.cancels.load(SeqCst) >= 2);
        assert!(matches!(job.wait(), Err(SdkError::Cancelled)));
        peer.behaviour.hold.store(false, SeqCst);
        assert_right(&["c"], &model.embed(&["c"]).unwrap());
    }
    assert_eq!(peer.behaviour.jobs.load(SeqCst), 2, "cancelled jobs are not computed");
}

#[test]
fn a_deadline_ends_the_call_and_cancels_the_job() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        peer.behaviour.hold.store(true, SeqCst);
        peer.behaviour.cancels.store(0, SeqCst);
        let options = EmbedOptions::default().timeout(Duration::from_millis(30));
        let started = Instant::now();
        let error = model.embed_with(&["a"], &options).unwrap_err();
        assert!(
            matches!(error, SdkError::DeadlineExceeded(_)) && started.elapsed() >= Duration::from_millis(30)
        );
        let job = model.submit(&["a"], &options).unwrap();
        assert!(matches!(block_on(job), Err(SdkError::DeadlineExceeded(_))));
        // A thread that follows another one's lead has its own deadline too.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    assert!(matches!(model.embed_with(&["a"], &options), Err(SdkError::DeadlineExceeded(_))));
                });
            }
        });
        eventually("the cancellations", || peer.behaviour.cancels.load(SeqCst) >= 6);
        peer.behaviour.hold.store(false, SeqCst);
        assert_right(&["c"], &model.embed(&["c"]).unwrap());
    }
}

#[test]
fn the_deadline_reaches_the_engine() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        peer.behaviour.deadlines_seen.store(0, SeqCst);
        model.embed(&["a"]).unwrap();
        assert_eq!(peer.behaviour.deadlines_seen.load(SeqCst), 0);
        let options = EmbedOptions::default().timeout(Duration::from_secs(60)).priority(Priority::Bulk);
        model.embed_with(&["a"], &options).unwrap();
        assert_eq!(peer.behaviour.deadlines_seen.load(SeqCst), 1);
    }
}

#[test]
fn a_full_lane_makes_submitters_wait_or_says_so() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model("m").unwrap();
    peer.behaviour.hold.store(true, SeqCst);
    let options = EmbedOptions::default();
    let mut jobs = Vec::new();
    let error = loop {
        match model.try_submit(&["a"], &options) {
            Ok(job) => jobs.push(job),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SdkError::WouldBlock) && error.is_retryable());
    assert_eq!(jobs.len(), 128);
    // `submit` takes it all the same, and `embed` waits.
    jobs.extend((0..50).map(|_| model.submit(&["a"], &options).unwrap()));
    let late = EmbedOptions::default().timeout(Duration::from_millis(20));
    assert!(matches!(model.embed_with(&["a"], &late), Err(SdkError::DeadlineExceeded(_))));
    peer.behaviour.hold.store(false, SeqCst);
    jobs.into_iter().for_each(|job| assert_right(&["a"], &job.wait().unwrap()));
}

#[test]
fn an_overloaded_engine_is_asked_again() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        peer.behaviour.overload.store(5, SeqCst);
        let texts = texts(200);
        assert_right(&texts, &model.embed(&texts).unwrap());
        peer.behaviour.overload.store(u32::MAX, SeqCst);
        let options = EmbedOptions::default().timeout(Duration::from_millis(60));
        let error = model.embed_with(&["a"], &options).unwrap_err();
        assert!(error.is_retryable());
        assert!(matches!(error.code(), "OVERLOADED" | "DEADLINE_EXCEEDED"), "{error}");
        peer.behaviour.overload.store(0, SeqCst);
    }
}

#[test]
fn failures_of_a_job_keep_their_code_and_message() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for model in both_routes(&peer) {
        peer.behaviour.fail_with.store(Code::BadResult as u32, SeqCst);
        let error = model.embed(&["a"]).unwrap_err();
        assert!(
            matches!(&error, SdkError::Refused { code: Code::BadResult, message, .. } if message == "told to fail")
        );
        assert_eq!((error.code(), error.is_retryable()), ("BAD_RESULT", false));
        peer.behaviour.fail_with.store(0, SeqCst);
        assert_right(&["b"], &model.embed(&["b"]).unwrap());
    }
}

#[test]
fn progress_is_reported_while_a_model_loads() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    peer.behaviour.loading.store(true, SeqCst);
    let steps = std::sync::Arc::new(AtomicUsize::new(0));
    let (counted, behaviour) = (std::sync::Arc::clone(&steps), std::sync::Arc::clone(&peer.behaviour));
    let request = ModelRequest::new("m").progress(move |step| {
        assert_eq!((step.stage.as_str(), step.done_bytes, step.total_bytes), ("load", 1, 2));
        if counted.fetch_add(1, SeqCst) == 3 {
            behaviour.loading.store(false, SeqCst);
        }
    });
    let model = peer.client().model_with(request).unwrap();
    assert!(steps.load(SeqCst) >= 4);
    assert_right(&["a"], &model.embed(&["a"]).unwrap());
}

#[test]
fn a_refused_model_says_why() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    peer.behaviour.refuse_lease.store(Code::ModelNotFound as u32, SeqCst);
    let error = peer.client().model("nonesuch").unwrap_err();
    assert_eq!((error.code(), error.protocol_code()), ("MODEL_NOT_FOUND", Some(Code::ModelNotFound)));
    assert!(error.to_string().contains("nonesuch"));
}

#[test]
fn another_protocol_version_is_refused_by_name() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    peer.behaviour.major.store(99, SeqCst);
    let error = peer.client().model("m").unwrap_err();
    assert_eq!(error.code(), "PROTOCOL_VERSION");
    assert!(error.to_string().contains("9.9.9"), "{error}");
}

#[test]
fn status_ping_broker_and_shutdown() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let client = peer.client();
    client.ping().unwrap();
    assert_eq!(client.status().unwrap().default_model, "test");
    assert_eq!(client.broker().unwrap().version, "9.9.9");
    assert_eq!(client.socket(), socket);
    client.shutdown(Duration::ZERO).unwrap();
    peer.wait();
    assert_eq!(client.status().unwrap_err().code(), "NO_BROKER");
}

#[test]
fn no_broker_and_none_allowed_is_a_clear_error() {
    let (_folder, socket) = place();
    let connect = || Client::builder().socket(&socket).start_broker(StartBroker::Never).connect();
    let error = connect().unwrap_err();
    assert_eq!(error.code(), "NO_BROKER");
    assert!(error.to_string().contains("modelbroker serve"), "{error}");
    // A socket that nobody listens on is the same.
    std::fs::create_dir(socket.parent().unwrap()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert_eq!(connect().unwrap_err().code(), "NO_BROKER");
    let long = socket.with_file_name("x".repeat(200));
    let error = Client::builder().socket(long).start_broker(StartBroker::Never).connect().unwrap_err();
    assert!(error.to_string().contains("107"), "{error}");
}

#[test]
fn the_lease_is_given_back_with_the_last_handle() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let client = peer.client();
    for route in [Route::Lane, Route::Socket] {
        let before = peer.behaviour.releases.load(SeqCst);
        let model = client.model_with(ModelRequest::new("m").route(route)).unwrap();
        let copy = model.clone();
        drop(model);
        // A job keeps the lease as well.
        let job = copy.submit(&["a"], &EmbedOptions::default()).unwrap();
        drop(copy);
        client.ping().unwrap();
        assert_eq!(peer.behaviour.releases.load(SeqCst), before);
        assert_right(&["a"], &job.wait().unwrap());
        eventually("the release", || peer.behaviour.releases.load(SeqCst) == before + 1);
    }
    drop(client);
    eventually("the end of the session", || peer.behaviour.open_sessions.load(SeqCst) == 0);
}

#[test]
fn attaching_is_quick() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let started = Instant::now();
            let client = peer.client();
            let model = client.model("m").unwrap();
            let took = started.elapsed();
            drop(model);
            took
        })
        .collect();
    times.sort();
    println!("attach: connect, lease, map, ready: p50 {:?}, p99 {:?}", times[100], times[198]);
    let model = peer.client().model("m").unwrap();
    let mut times: Vec<Duration> = (0..2000)
        .map(|_| {
            let started = Instant::now();
            model.embed(&["a short text"]).unwrap();
            started.elapsed()
        })
        .collect();
    times.sort();
    println!("one text through the lane: p50 {:?}, p99 {:?}", times[1000], times[1980]);
}
