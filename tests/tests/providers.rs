//! Models that processes of the user provide: real ones, killed and restarted under load, and hostile ones. No call may be
//! lost, answered twice or answered wrongly, and whoever misbehaves must be the only one to notice.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shm_layout::code::Code;
use shm_layout::payload::{EmbeddingRows, decode_texts, encode_embeddings};
use shm_layout::wire::{
    AnswerFrame, BrokerMessage, ClientMessage, Hello, Operation, PROTOCOL_MAJOR, PROTOCOL_MINOR, Provide,
    ProvidedReport, ProviderJob, encode_frame,
};
use shm_os::framed::FramedStream;
use shm_os::socket::{AllowedPeer, connect};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tests::program::example;
use tests::running::{Broker, PATIENCE, eventually};
use worker_sdk::{CallOptions, Client, Model, ProviderError, ProviderSpec, ProviderStop, Route, SdkError};

fn provided(broker: &Broker, id: &str) -> Option<ProvidedReport> {
    broker.status().provided.into_iter().find(|model| model.model_id == id)
}

fn refused_with(outcome: Result<Vec<u8>, SdkError>) -> Code {
    match outcome {
        Err(SdkError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

fn call(model: &Model, payload: &[u8]) -> Result<Vec<u8>, SdkError> {
    model.call(payload, &CallOptions::default())
}

/// A model that gives back what it gets, the other way round, served by threads of this process.
struct Reverse {
    thread: Option<std::thread::JoinHandle<Result<(), SdkError>>>,
    stop: ProviderStop,
}

fn reversed(payload: &[u8]) -> Vec<u8> {
    payload.iter().rev().copied().collect()
}

impl Reverse {
    fn serve(client: &Client, id: &str) -> Reverse {
        let provider = client.provide(ProviderSpec::new(id).threads(2)).unwrap();
        let stop = provider.stopper();
        let thread = std::thread::spawn(move || {
            provider.serve(|job| match job.payload() {
                b"panic" => panic!("asked to"),
                b"refuse" => Err(ProviderError::bad_input("not this")),
                b"hold" => {
                    while !job.is_cancelled() {
                        std::thread::yield_now();
                    }
                    Err(ProviderError::cancelled())
                }
                payload => Ok(reversed(payload)),
            })
        });
        Reverse { thread: Some(thread), stop }
    }

    fn end(mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Reverse {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

#[test]
fn calls_travel_and_a_handler_that_panics_fails_its_job_only() {
    let broker = Broker::start(&[]);
    let client = broker.client();
    let waiting = std::thread::scope(|scope| {
        // Asked for before it is there.
        let early = scope.spawn(|| client.model("custom/reverse"));
        let reverse = Reverse::serve(&client, "custom/reverse");
        (early.join().unwrap().unwrap(), reverse)
    });
    let (model, reverse) = waiting;
    assert_eq!(call(&model, b"abc").unwrap(), b"cba");
    assert_eq!(call(&model, b"").unwrap(), b"");
    let large: Vec<u8> = (0..1 << 20).map(|n: u32| n as u8).collect();
    assert_eq!(call(&model, &large).unwrap(), reversed(&large));
    assert!(matches!(call(&model, &vec![0; (1 << 20) + 1]), Err(SdkError::Input(_))));
    assert_eq!(refused_with(call(&model, b"panic")), Code::ProviderFailed);
    assert_eq!(refused_with(call(&model, b"refuse")), Code::BadPayload);
    // Futures of any kind: many at once, taken in another order, cancelled, timed out.
    let jobs: Vec<_> =
        (0..40u8).map(|n| model.submit_call(&[n, n + 1], &CallOptions::bulk()).unwrap()).collect();
    for (n, job) in jobs.into_iter().enumerate().rev() {
        assert_eq!(job.wait().unwrap(), [n as u8 + 1, n as u8]);
    }
    let held = model.submit_call(b"hold", &CallOptions::default()).unwrap();
    held.cancel();
    assert!(matches!(held.wait(), Err(SdkError::Cancelled)));
    let hasty = CallOptions::default().timeout(Duration::from_millis(50));
    assert!(matches!(model.call(b"hold", &hasty), Err(SdkError::DeadlineExceeded(_))));
    // What it does not offer, and what only an engine's model has.
    let error = model.embed(&["x"]).unwrap_err();
    assert_eq!(error.protocol_code(), Some(Code::UnsupportedOperation), "{error}");
    let error = model.attach().unwrap_err();
    assert_eq!(error.protocol_code(), Some(Code::UnsupportedOperation), "{error}");
    let report = provided(&broker, "custom/reverse").unwrap();
    assert_eq!((report.providers.len(), report.providers[0].faults, report.leases), (1, 0, 1));
    reverse.end();
    assert_eq!(provided(&broker, "custom/reverse").unwrap().providers.len(), 0);
    let error =
        client.model_with(worker_sdk::ModelRequest::new("custom/none").wait(Duration::ZERO)).unwrap_err();
    assert_eq!(error.protocol_code(), Some(Code::ModelNotFound), "{error}");
    assert!(
        client.provide(ProviderSpec::new("all-MiniLM-L6-v2")).is_err(),
        "nobody steps into a model's place"
    );
    assert!(broker.run(&["status"], b"").status.success());
    broker.stop();
}

#[test]
fn models_of_engines_take_no_calls() {
    let broker = Broker::start(&[]);
    for route in [Route::Lane, Route::Socket] {
        assert_eq!(refused_with(call(&broker.model(route), b"x")), Code::UnsupportedOperation);
    }
    broker.stop();
}

#[test]
fn providers_return_with_the_broker() {
    let broker = Broker::start(&[]);
    let client = broker.client();
    let reverse = Reverse::serve(&client, "custom/reverse");
    let model = client.model("custom/reverse").unwrap();
    let (over, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let broker = std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let n = calls.fetch_add(1, Ordering::Relaxed).to_le_bytes();
                assert_eq!(call(&model, &n).unwrap(), reversed(&n));
            }
        });
        let mut broker = broker;
        for _ in 0..3 {
            let seen = calls.load(Ordering::Relaxed);
            eventually("calls go on", || (calls.load(Ordering::Relaxed) > seen + 20).then_some(()));
            let folder = broker.kill_at_once();
            broker = Broker::start_in(folder, &[]);
        }
        let seen = calls.load(Ordering::Relaxed);
        eventually("calls go on", || (calls.load(Ordering::Relaxed) > seen + 20).then_some(()));
        over.store(true, Ordering::Relaxed);
        caller.join().unwrap();
        broker
    });
    assert!(model.reconnects() >= 3);
    reverse.end();
    broker.stop();
}

/// What the language identifier answers first: language and letters.
fn first_line(answer: &[u8]) -> (String, usize) {
    let text = std::str::from_utf8(answer).unwrap();
    let mut fields = text.lines().next().unwrap().split('\t');
    (fields.next().unwrap().to_owned(), fields.nth(1).unwrap().parse().unwrap())
}

#[test]
fn killed_providers_cost_no_call_and_double_none() {
    const THREADS: usize = 4;
    const KILLS: usize = 8;
    let program = example("provide_language");
    let command = format!("custom/language={}", program.display());
    // Two processes that share the work.
    let broker = Broker::start(&["--provider", &command, "--provider", &command]);
    let client = broker.client();
    let model = client.model("custom/language").unwrap();
    let sentences = [
        ("de", "der hund läuft schnell durch den garten und bellt "),
        ("en", "the dog runs quickly through the garden and barks "),
        ("fr", "le chien court vite dans le jardin et il aboie "),
        ("ko", "개가 정원을 빠르게 달리며 짖는다 "),
    ];
    let (over, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (model, over, calls) = (&model, &over, &calls);
                scope.spawn(move || {
                    let mut round = 0;
                    while !over.load(Ordering::Relaxed) {
                        let (language, sentence) = sentences[(thread + round) % sentences.len()];
                        // Every text has a length of its own, so that an answer tells which one it belongs to.
                        let text = sentence.repeat(1 + round % 9);
                        let letters = text.chars().filter(|c| c.is_alphabetic()).count();
                        let answer = call(model, text.as_bytes()).expect("no call is lost");
                        assert_eq!(first_line(&answer), (language.to_owned(), letters));
                        calls.fetch_add(1, Ordering::Relaxed);
                        round += 1;
                    }
                })
            })
            .collect();
        for _ in 0..KILLS {
            let seen = calls.load(Ordering::Relaxed);
            eventually("calls are answered", || (calls.load(Ordering::Relaxed) >= seen + 50).then_some(()));
            let pid = eventually("a provider is there", || {
                provided(&broker, "custom/language")?.providers.first().map(|provider| provider.pid)
            });
            kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
            eventually("its death is noticed", || {
                let model = provided(&broker, "custom/language")?;
                (!model.providers.iter().any(|provider| provider.pid == pid)).then_some(())
            });
        }
        over.store(true, Ordering::Relaxed);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
    });
    let report = eventually("both are back", || {
        provided(&broker, "custom/language").filter(|model| model.providers.len() == 2)
    });
    let starts: u64 = report.children.iter().map(|child| child.starts).sum();
    assert_eq!(starts as usize, 2 + KILLS);
    // Each call was answered by one provider, once; those of dead ones were given again.
    assert_eq!(report.totals.jobs, calls.load(Ordering::Relaxed));
    assert_eq!((report.totals.errors, report.totals.timeouts), (0, 0));
    assert!(report.providers.iter().all(|provider| provider.faults == 0 && provider.in_flight == 0));
    let pids: Vec<u32> = report.providers.iter().map(|provider| provider.pid).collect();
    broker.stop();
    assert!(pids.into_iter().all(tests::census::is_gone), "its processes end with the broker");
}

/// A process that is killed when the test ends, however it ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_provider_computes_on_shared_weights() {
    let program = example("provide_similarity");
    let broker = Broker::start(&[]);
    let start = || {
        let mut command = Command::new(&program);
        command.env("MODELBROKER_SOCKET", broker.socket()).env("MODELBROKER_START", "never");
        Process(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("the example can be run"))
    };
    let first = start();
    let texts = ["a cat sits on the mat", "a kitten rests on a rug", "interest rates rose again"];
    let engine = broker.model(Route::Lane);
    let expected = engine.embed(&texts).unwrap();
    let client = broker.client();
    let model = eventually("the provider has loaded", || client.model("custom/similarity").ok());
    let same = |found: &worker_sdk::Embeddings| found.values() == expected.values();
    assert!(same(&model.embed(&texts).unwrap()), "bit for bit what the engine computes");
    let cosine = |a: usize, b: usize| -> f64 {
        let answer = call(&model, format!("{}\n{}", texts[a], texts[b]).as_bytes()).unwrap();
        String::from_utf8(answer).unwrap().parse().unwrap()
    };
    let dot = |a: usize, b: usize| -> f32 { expected[a].iter().zip(&expected[b]).map(|(x, y)| x * y).sum() };
    assert!((cosine(0, 1) - f64::from(dot(0, 1))).abs() < 1e-5);
    assert!(cosine(0, 1) > cosine(0, 2));
    assert_eq!(refused_with(call(&model, b"one line")), Code::BadPayload);
    // It holds a lease on the weights, and a second one may take over when it is killed.
    let pid = first.0.id();
    assert!(broker.status().models[0].lease_pids.contains(&pid));
    let _second = start();
    eventually("both provide", || provided(&broker, "custom/similarity").filter(|m| m.providers.len() == 2));
    drop(first);
    assert!(same(&model.embed(&texts).unwrap()));
    broker.stop();
}

/// A provider that speaks frames itself, and may say anything.
struct Rogue {
    stream: FramedStream,
}

fn hello() -> ClientMessage {
    ClientMessage::Hello(Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: PROTOCOL_MINOR,
        layout_hash: 0,
        client_name: "rogue".into(),
    })
}

fn offer(id: &str) -> Provide {
    Provide {
        model_id: id.into(),
        kind: "rogue".into(),
        description: String::new(),
        input_kind: String::new(),
        output_kind: String::new(),
        fingerprint: 1,
        operations: vec![Operation::Call, Operation::Embed],
        output_dim: 4,
        max_seq_tokens: 0,
        max_in_flight: 4,
        max_input_bytes: 1000,
        max_output_bytes: 1000,
        job_timeout_ms: 60_000,
    }
}

impl Rogue {
    fn enter(broker: &Broker, offer: Provide) -> Rogue {
        let connection = connect(&broker.socket(), PATIENCE, AllowedPeer::SameUser).unwrap();
        let mut rogue = Rogue { stream: FramedStream::new(connection.into()).unwrap() };
        rogue.says(&hello());
        rogue.says(&ClientMessage::Provide(offer));
        while !matches!(rogue.hears(), Some(BrokerMessage::Provided { .. })) {}
        rogue
    }

    fn says(&mut self, message: &ClientMessage) -> bool {
        self.stream.send(1, message, vec![], PATIENCE).is_ok()
    }

    /// `None`: thrown out.
    fn hears(&mut self) -> Option<BrokerMessage> {
        let (_, message) = self.stream.receive(PATIENCE).ok()?.expect("the broker says something");
        if let BrokerMessage::Refused(refusal) = &message {
            assert_eq!(refusal.code, Code::ProviderFailed, "{}", refusal.message);
        }
        Some(message)
    }

    fn job(&mut self) -> ProviderJob {
        loop {
            if let BrokerMessage::ProviderJob(job) = self.hears().expect("it is not thrown out yet") {
                return job;
            }
        }
    }

    fn answers(&mut self, relay_id: u64, payload: Vec<u8>) -> bool {
        let frame = AnswerFrame { job_id: relay_id, status: Code::Ok, payload, queue_us: 0, execution_us: 0 };
        self.says(&ClientMessage::ProviderAnswer(frame))
    }

    /// Waits until it is thrown out.
    fn await_end(mut self) {
        while self.hears().is_some() {}
    }
}

/// Runs `attack` while an honest provider and its caller work, then checks that these noticed nothing. The attacker's
/// process is this one, as the honest one's is: it must not be kept out with it, so that one provides from its own.
fn beside_an_honest_provider(broker: &Broker, attack: impl FnOnce()) {
    let client = broker.client();
    let honest = client.model("custom/language").unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds == 0 {
                let answer = call(&honest, "ein ganz gewöhnlicher satz".as_bytes()).expect("it is served");
                assert_eq!(first_line(&answer).0, "de");
                rounds += 1;
            }
        });
        attack();
        over.store(true, Ordering::Relaxed);
        caller.join().expect("the honest caller noticed nothing");
    });
    assert_eq!(honest.reconnects(), 0);
    let report = provided(broker, "custom/language").unwrap();
    assert_eq!((report.totals.errors, report.totals.retries, report.children[0].starts), (0, 0, 1));
}

fn with_honest_provider() -> Broker {
    let program = example("provide_language");
    Broker::start(&["--provider", &format!("custom/language={}", program.display())])
}

#[test]
fn a_provider_that_never_answers_fails_its_jobs_and_is_dropped() {
    let broker = with_honest_provider();
    beside_an_honest_provider(&broker, || {
        let rogue = Rogue::enter(&broker, Provide { job_timeout_ms: 100, ..offer("custom/silent") });
        let model = broker.client().model("custom/silent").unwrap();
        for _ in 0..2 {
            assert_eq!(refused_with(call(&model, b"x")), Code::ProviderTimeout);
        }
        rogue.await_end();
        let report = provided(&broker, "custom/silent").unwrap();
        assert!(report.providers.is_empty() && report.last_fault.is_some());
        // The process may not come back at once, and is told when it may.
        let refused = broker.client().provide(ProviderSpec::new("custom/silent"));
        assert!(matches!(refused, Err(SdkError::Refused { retry_after, .. }) if !retry_after.is_zero()));
    });
    broker.stop();
}

#[test]
fn double_unknown_oversized_and_misshapen_answers_harm_nobody_else() {
    let broker = with_honest_provider();
    beside_an_honest_provider(&broker, || {
        let mut rogue = Rogue::enter(&broker, offer("custom/liar"));
        let model = broker.client().model("custom/liar").unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| call(&model, b"first"));
            let job = rogue.job();
            assert!(
                rogue.answers(job.relay_id, b"once".to_vec())
                    && rogue.answers(job.relay_id, b"twice".to_vec())
            );
            assert_eq!(asked.join().unwrap().unwrap(), b"once");
            // Vectors of a wrong length, too few of them, and one that is no number: the caller's SDK sees it, asks
            // again a few times, and then says whose fault it is.
            let asked = scope.spawn(|| model.embed(&["a", "b"]));
            for round in 0.. {
                let texts = match rogue.hears() {
                    Some(BrokerMessage::ProviderJob(job)) => {
                        let count = decode_texts(&job.payload).unwrap().len();
                        let (dim, rows) = [(3, count), (4, 1), (4, count)][round % 3];
                        let values = vec![f32::NAN; dim * rows];
                        let bad = EmbeddingRows { dim, fingerprint: 1, cached: vec![false; rows], values };
                        rogue.answers(job.relay_id, encode_embeddings(&bad));
                        count
                    }
                    _ => 0,
                };
                assert!(texts == 2 || texts == 0);
                if round == 3 {
                    break;
                }
            }
            let error = asked.join().unwrap().unwrap_err();
            assert!(matches!(error, SdkError::Fault { peer: "the provider", .. }), "{error}");
            let asked = scope.spawn(|| call(&model, b"big"));
            let job = rogue.job();
            rogue.answers(job.relay_id, vec![0; 1001]);
            assert_eq!(refused_with(asked.join().unwrap()), Code::ProviderFailed);
        });
        rogue.answers(u64::MAX, vec![]);
        rogue.await_end();
    });
    broker.stop();
}

#[test]
fn a_flood_of_answers_is_cut_off() {
    let broker = with_honest_provider();
    beside_an_honest_provider(&broker, || {
        let mut rogue = Rogue::enter(&broker, offer("custom/flood"));
        for round in 0..100_000u64 {
            if !rogue.answers(round, vec![0; 100]) {
                break;
            }
        }
        rogue.await_end();
    });
    broker.stop();
}

#[test]
fn dying_at_any_byte_of_a_registration_or_an_answer_leaves_nothing() {
    let broker = with_honest_provider();
    let frames: Vec<u8> = [hello(), ClientMessage::Provide(offer("custom/dying"))]
        .iter()
        .flat_map(|message| encode_frame(1, message).unwrap())
        .collect();
    beside_an_honest_provider(&broker, || {
        for cut in (0..=frames.len()).step_by(7) {
            let mut stream = UnixStream::connect(broker.socket()).unwrap();
            stream.write_all(&frames[..cut]).unwrap();
        }
        // Garbage behind a registration; it had a job, which its next provider gets.
        let model = {
            let _first = Rogue::enter(&broker, offer("custom/dying"));
            broker.client().model("custom/dying").unwrap()
        };
        std::thread::scope(|scope| {
            let mut rogue = Rogue::enter(&broker, offer("custom/dying"));
            let asked = scope.spawn(|| call(&model, b"x"));
            let job = rogue.job();
            assert_eq!(job.attempts, 0);
            let frame = AnswerFrame {
                job_id: job.relay_id,
                status: Code::Ok,
                payload: vec![1; 500],
                queue_us: 0,
                execution_us: 0,
            };
            // Half an answer is none.
            let half = encode_frame(0, &ClientMessage::ProviderAnswer(frame)).unwrap();
            let mut raw =
                UnixStream::from(std::os::fd::AsFd::as_fd(&rogue.stream).try_clone_to_owned().unwrap());
            raw.write_all(&half[..half.len() / 2]).unwrap();
            drop((raw, rogue));
            let mut next = Rogue::enter(&broker, offer("custom/dying"));
            let job = next.job();
            assert_eq!(job.attempts, 1);
            next.answers(job.relay_id, b"whole".to_vec());
            assert_eq!(asked.join().unwrap().unwrap(), b"whole");
        });
    });
    // The honest provider has two: its client's, and the one over which it provides.
    eventually("only the honest provider is left", || {
        let status = broker.status();
        (status.sessions.len() == 3 && status.provided.iter().map(|m| m.providers.len()).sum::<usize>() == 1)
            .then_some(())
    });
    broker.stop();
}
