//! `load`: the load generator. This file starts the client processes, listens to them and stops them; what they do is in
//! `load::client`, what they found in `load::report`.

pub(super) mod client;
mod plan;
mod report;
mod texts;

use super::worker::interrupt::Interrupt;
use super::worker::process::{Said, WorkerProcess};
use crate::args::{LoadArgs, RouteArg};
use crate::failure::{Exit, Failure};
use plan::{ClientLine, Plan, Reference};
use report::Outcome;
use std::io::{BufWriter, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use worker_sdk::{EmbedOptions, Model};

/// Most client processes, and most threads of one.
const MAX_CLIENTS: usize = 256;
const MAX_THREADS: usize = 256;
/// Least and most interactive requests of a thread in a second.
const MIN_RATE: f64 = 0.01;
const MAX_RATE: f64 = 1e6;
/// Most texts in one request.
const MAX_BATCH: usize = 4096;
/// Longest run, in seconds (a day).
const MAX_DURATION_S: f64 = 86_400.0;
/// Fewest texts of a run, and fewest of a thread: its consecutive requests differ, and so do those of all threads.
const MIN_TEXTS: usize = 64;
const MIN_TEXTS_A_THREAD: usize = 4;
/// How often an interruption is looked for.
const SLICE: Duration = Duration::from_millis(50);
/// How long clients may take to be ready, beyond the timeout of one request.
const START_GRACE: Duration = Duration::from_secs(60);
/// How long clients may take beyond the end and the timeout to say what they measured.
const END_GRACE: Duration = Duration::from_secs(20);

/// Runs a load and prints what was measured.
pub(super) fn run(socket: Option<PathBuf>, args: &LoadArgs) -> Result<(), Failure> {
    check(args)?;
    let client = super::client(socket, "load", None).connect()?;
    // Held until the end, so that the model stays; also the route by which the reference is computed.
    let model = super::lease(&client, &args.model, args.route)?;
    let interrupt = Interrupt::install()?;
    let threads = args.clients * args.threads;
    let count = MIN_TEXTS.max(threads * MIN_TEXTS_A_THREAD).min(texts::MAX_TEXTS);
    let texts = texts::make(args.seed, count, args.tokens);
    let bulk_texts = match args.bulk_tokens {
        Some(tokens) if tokens != args.tokens => texts::make(args.seed, count, tokens),
        _ => Vec::new(),
    };
    let (_file, reference) = match args.verify {
        true => {
            let all: Vec<&String> = texts.iter().chain(&bulk_texts).collect();
            make_reference(&model, &all, args, &interrupt).map(|(file, r)| (Some(file), Some(r)))?
        }
        false => (None, None),
    };
    let mut dealt = plan::deal(threads, args.bulk, args.batch, args.bulk_batch, &texts, &bulk_texts);
    if args.no_repeat {
        plan::make_fresh(&mut dealt, args.seed, args.tokens, args.bulk_tokens.unwrap_or(args.tokens));
    }
    let model_id = model.description()?.model_id.clone();
    let mut run = Run::start(args.clients, client.socket())?;
    for (process, threads) in run.processes.iter_mut().zip(dealt.chunks(args.threads)) {
        process.tell(&Plan {
            rate: args.rate,
            model: model_id.clone(),
            socket_route: args.route == RouteArg::Socket,
            duration_ms: millis(args.duration),
            timeout_ms: millis(args.timeout),
            cached: args.cached,
            threads: threads.to_vec(),
            reference: reference.clone(),
        })?;
    }
    let outcome = run.finish(args, &interrupt)?;
    if args.json {
        println!("{}", outcome.json(args));
    } else {
        outcome.print(args);
    }
    outcome.verdict()
}

fn millis(seconds: f64) -> u64 {
    u64::try_from(super::seconds(seconds).as_millis()).unwrap_or(u64::MAX)
}

fn check(args: &LoadArgs) -> Result<(), Failure> {
    let least_tokens = if args.no_repeat { texts::MIN_FRESH_TOKENS } else { texts::MIN_TOKENS } as f64;
    let bounds = [
        ("clients", args.clients as f64, 1.0, MAX_CLIENTS as f64),
        ("threads", args.threads as f64, 1.0, MAX_THREADS as f64),
        ("duration", args.duration, 0.0, MAX_DURATION_S),
        ("tokens", args.tokens as f64, least_tokens, texts::MAX_TOKENS as f64),
        (
            "bulk-tokens",
            args.bulk_tokens.unwrap_or(args.tokens) as f64,
            least_tokens,
            texts::MAX_TOKENS as f64,
        ),
        ("rate", args.rate.unwrap_or(1.0), MIN_RATE, MAX_RATE),
        ("batch", args.batch as f64, 1.0, MAX_BATCH as f64),
        ("bulk", args.bulk, 0.0, 1.0),
        ("bulk-batch", args.bulk_batch as f64, 1.0, MAX_BATCH as f64),
        ("timeout", args.timeout, 0.001, MAX_DURATION_S),
    ];
    for (name, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(Failure::new(
                Exit::Usage,
                format!("--{name} must be from {least} to {most}, not {value}"),
            ));
        }
    }
    if args.clients * args.threads > texts::MAX_TEXTS / MIN_TEXTS_A_THREAD {
        let most = texts::MAX_TEXTS / MIN_TEXTS_A_THREAD;
        return Err(Failure::new(Exit::Usage, format!("--clients times --threads must be at most {most}")));
    }
    Ok(())
}

/// Computes each text by itself, while nothing else is asked, and writes the vectors into a file that ends with the run.
fn make_reference(
    model: &Model,
    texts: &[&String],
    args: &LoadArgs,
    interrupt: &Interrupt,
) -> Result<(NamedTempFile, Reference), Failure> {
    let file = tempfile::Builder::new().prefix("modelbroker-load-").tempfile()?;
    let mut out = BufWriter::new(file.as_file());
    let options = EmbedOptions::default().timeout(super::seconds(args.timeout)).bypass_cache(true);
    let (mut dim, mut fingerprint) = (0, 0);
    for (number, text) in texts.iter().enumerate() {
        if interrupt.is_set() {
            return Err(Failure::new(Exit::Failed, "ended before the load began"));
        }
        let vector = model.embed_with(&[text], &options)?;
        if number > 0 && (dim, fingerprint) != (vector.dim(), vector.fingerprint()) {
            return Err(Failure::new(
                Exit::Model,
                "the model was replaced while the reference was computed; run again",
            ));
        }
        (dim, fingerprint) = (vector.dim(), vector.fingerprint());
        for value in vector.values() {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.flush()?;
    drop(out);
    let path = file.path().to_owned();
    Ok((file, Reference { path, dim, fingerprint }))
}

/// The client processes and what has been heard of them.
struct Run {
    processes: Vec<WorkerProcess>,
    said: Receiver<(usize, Said)>,
    ready: Vec<bool>,
    ended: Vec<bool>,
    results: Vec<Option<plan::ClientResult>>,
}

impl Run {
    fn start(clients: usize, socket: &std::path::Path) -> Result<Run, Failure> {
        let (sender, said) = channel();
        let processes = (0..clients)
            .map(|number| WorkerProcess::start(socket, "load", "", number, sender.clone()))
            .collect::<Result<_, _>>()?;
        Ok(Run {
            processes,
            said,
            ready: vec![false; clients],
            ended: vec![false; clients],
            results: vec![None; clients],
        })
    }

    /// Lets all begin at once, waits for their results, or for the user.
    fn finish(mut self, args: &LoadArgs, interrupt: &Interrupt) -> Result<Outcome, Failure> {
        let timeout = super::seconds(args.timeout);
        let mut outcome = Outcome::default();
        let settled = |run: &Run| run.ready.iter().zip(&run.ended).all(|(ready, ended)| *ready || *ended);
        self.listen(Instant::now() + timeout + START_GRACE, |run| settled(run) || interrupt.is_set())?;
        if interrupt.is_set() {
            return Err(Failure::new(Exit::Failed, "ended before the load began"));
        }
        for process in &mut self.processes {
            process.tell(&"go")?;
        }
        let end = Instant::now() + super::seconds(args.duration) + timeout + END_GRACE;
        let all_ended = |run: &Run| run.ended.iter().all(|ended| *ended);
        self.listen(end, |run| all_ended(run) || interrupt.is_set())?;
        if interrupt.is_set() {
            outcome.interrupted = true;
            self.processes.iter_mut().for_each(WorkerProcess::hang_up);
            self.listen(Instant::now() + timeout + END_GRACE, all_ended)?;
        }
        for ((process, result), ended) in self.processes.iter_mut().zip(self.results).zip(self.ended) {
            // One that is still there is stuck; its handle kills it.
            let killed = ended && process.wait()?.signal().is_some();
            match result {
                Some(result) => outcome.clients.push(result),
                None if killed => outcome.killed.push(process.pid()),
                None => outcome.failed.push(process.pid()),
            }
        }
        Ok(outcome)
    }

    /// Takes what the clients say until `done`, or `end`.
    fn listen(&mut self, end: Instant, done: impl Fn(&Run) -> bool) -> Result<(), Failure> {
        while !done(self) && Instant::now() < end {
            let (number, said) = match self.said.recv_timeout(SLICE) {
                Ok(said) => said,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            match said {
                Said::End => self.ended[number] = true,
                Said::Line(line) => match serde_json::from_str(&line) {
                    Ok(ClientLine::Ready) => self.ready[number] = true,
                    Ok(ClientLine::Done(result)) => self.results[number] = Some(result),
                    Err(error) => {
                        let message = format!("a client process said what is not understood: {error}");
                        return Err(Failure::new(Exit::Failed, message));
                    }
                },
            }
        }
        Ok(())
    }
}
