//! `demo`: the main job end to end, in a folder of its own with a broker of its own: documents indexed by subprocesses,
//! questions answered, memory counted. This file is the order of things; the parts are beside it.

mod corpus;
mod documents;
mod memory;
mod report;
mod stage;

use super::worker::interrupt::Interrupt;
use crate::args::DemoArgs;
use crate::failure::{Exit, Failure};
use crate::terminal;
use memory::{LiveWorkers, ProcessMemory, Way, Workers};
use model_loader::{LoadRequest, PrecisionChoice, load_image};
use model_source::SourceOptions;
use report::{Group, Outcome};
use shm_os::image_backing::BackingKind;
use stage::{DemoBroker, Folder, interrupted};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use worker_sdk::{Client, LoadProgress, Model, ModelRequest};

/// Most workers at once.
const MAX_WORKERS: usize = 64;
/// Processes started to see how long attaching takes, besides the workers that are measured.
const ATTACH_SAMPLES: usize = 16;
/// How often an interruption is looked for.
const SLICE: Duration = Duration::from_millis(50);

/// Runs the demo and prints what came of it. Whatever happens, nothing is left running and no file is left behind.
pub(super) fn run(args: &DemoArgs) -> Result<(), Failure> {
    if !(1..=MAX_WORKERS).contains(&args.workers) {
        return Err(Failure::new(Exit::Usage, format!("--workers must be from 1 to {MAX_WORKERS}")));
    }
    let interrupt = Interrupt::install()?;
    let folder = Folder::create()?;
    let corpus = match &args.corpus {
        Some(corpus) => corpus.clone(),
        None => {
            corpus::write_to(&folder.corpus())?;
            folder.corpus()
        }
    };
    let questions = corpus::questions_of(&corpus)?;

    let model_name = super::model_name(&args.model);
    say("starting a broker");
    let broker = DemoBroker::start(&folder, &model_name, &interrupt)?;
    let client = broker.client()?;
    say(&format!("getting the model {}", args.model));
    let model = lease(&client, model_name, &interrupt)?;
    let description = model.description()?;

    say(&format!("indexing {} with {} subprocesses at a time", corpus.display(), args.workers));
    let documents =
        documents::index(&broker, &folder, &corpus, &description.model_id, args.workers, &interrupt)?;
    say("asking questions");
    let answers = documents::ask(&folder, &model, &questions)?;

    say("counting memory");
    // This process looks at every page of the image, so that each one is counted whoever else has touched it.
    let attached = model.attach()?;
    attached.verify()?;
    let workers = Workers { socket: broker.socket(), model: &description.model_id, interrupt: &interrupt };
    let mut attach_us: Vec<u64> = Vec::new();
    for _ in 0..ATTACH_SAMPLES {
        let probe = workers.start(&Way::Thin, 1)?;
        attach_us.extend(probe.figures()?.iter().map(|worker| worker.report.ready_us));
        probe.finish()?;
    }
    let thin = Group::measure(workers.start(&Way::Thin, args.workers)?, common(&client)?)?;
    attach_us.extend(thin.workers.iter().map(|worker| worker.report.ready_us));
    let attached_group = Group::measure(workers.start(&Way::Attached, args.workers)?, common(&client)?)?;
    drop(attached);
    let image = compiled_image(&description.model_id)?;
    let private = Group::measure(workers.start(&Way::Private(image), args.workers)?, Vec::new())?;
    interrupted(&interrupt)?;

    drop((model, client));
    broker.stop()?;
    let outcome = Outcome {
        model_id: description.model_id.clone(),
        image_bytes: description.image_bytes,
        documents,
        answers,
        attach_p50_us: memory::median(attach_us),
        thin,
        attached: attached_group,
        private,
    };
    if args.json {
        println!("{}", outcome.json());
    } else {
        outcome.print();
    }
    outcome.verdict()
}

/// Leases the model; loading it may mean a long download, which the user may end.
fn lease(client: &Client, model_name: String, interrupt: &Interrupt) -> Result<Model, Failure> {
    let (sender, loaded) = channel();
    let client = client.clone();
    std::thread::spawn(move || {
        let request = ModelRequest::new(model_name).progress(progress());
        // Nobody listens any more when the demo was ended.
        let _ = sender.send(client.model_with(request));
    });
    loop {
        match loaded.recv_timeout(SLICE) {
            Ok(model) => return Ok(model?),
            Err(RecvTimeoutError::Timeout) => interrupted(interrupt)?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new(Exit::Failed, "the thread that waits for the model ended"));
            }
        }
    }
}

/// What is being done, for people.
fn say(what: &str) {
    eprintln!("demo: {what}");
}

/// A bar on a terminal; elsewhere a line for each stage.
fn progress() -> Box<dyn FnMut(LoadProgress) + Send> {
    if terminal::is_interactive() {
        return Box::new(terminal::load_progress());
    }
    let mut stage = String::new();
    Box::new(move |progress| {
        if stage != progress.stage {
            stage.clone_from(&progress.stage);
            say(&format!("  {stage} ({})", terminal::bytes(progress.total_bytes)));
        }
    })
}

/// The processes that every group of workers shares: this one, the broker, the engines.
fn common(client: &Client) -> Result<Vec<(&'static str, ProcessMemory)>, Failure> {
    let status = client.status()?;
    let mut all = vec![("broker", ProcessMemory::of_sharer(status.broker_pid)?)];
    for engine in &status.engines {
        all.push(("engine", ProcessMemory::of_sharer(engine.pid)?));
    }
    all.push(("demo", ProcessMemory::of_sharer(std::process::id())?));
    Ok(all)
}

/// The file with the compiled image, for workers that load it on their own.
fn compiled_image(model: &str) -> Result<PathBuf, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(Exit::Model, e.to_string());
    let source = SourceOptions::from_env().map_err(|e| failed(&e))?;
    let request = LoadRequest {
        reference: model.to_owned(),
        precision: PrecisionChoice::default(),
        backing: BackingKind::ImageFile.into(),
        source,
    };
    let loaded = load_image(&request, &mut |_| {}).map_err(|e| failed(&e))?;
    loaded.image.path.ok_or_else(|| failed(&"the compiled image is in no file"))
}

impl Group {
    /// Reads the memory of workers that live and of `common`, then lets the workers end.
    fn measure(live: LiveWorkers, common: Vec<(&'static str, ProcessMemory)>) -> Result<Group, Failure> {
        let workers = live.figures()?;
        live.finish()?;
        Ok(Group { common, workers })
    }
}
