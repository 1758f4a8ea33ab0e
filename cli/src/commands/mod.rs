//! One module a command. This file only chooses which runs.

mod children;
mod config;
mod control;
mod demo;
mod doctor;
mod documents;
mod embed;
mod load;
mod metrics_json;
mod model;
pub(crate) mod provided;
mod serve;
mod texts;
mod worker;

use crate::args::{Arguments, Command, RouteArg};
use crate::configuration::CommandLine;
use crate::failure::Failure;
use crate::{logging, terminal};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;
use worker_sdk::{Client, ClientBuilder, Fallback, Model, ModelRequest, Route, StartBroker};

/// Whether and how this command shares models, as the configuration says; unset in commands that read none.
static SHARING: OnceLock<settings::Sharing> = OnceLock::new();

/// What of it the program's own subprocesses are told, by their environment.
fn sharing_environment() -> Vec<(&'static str, String)> {
    let Some(sharing) = SHARING.get() else { return Vec::new() };
    vec![
        (worker_sdk::SHARING_VARIABLES[0], sharing.enabled.to_string()),
        (worker_sdk::ROLLOUT_VARIABLES[0], sharing.rollout_percent.to_string()),
        (worker_sdk::FALLBACK_VARIABLE, sharing.fallback.name().to_owned()),
    ]
}

/// Runs the command that was asked for.
///
/// # Errors
/// [`Failure`] with a message and an exit code.
pub(crate) fn run(arguments: Arguments) -> Result<(), Failure> {
    let line = CommandLine::new(&arguments)?;
    match &arguments.command {
        // The broker and its children choose their own logs.
        Command::Serve(_) | Command::Engine(_) | Command::LoadModel(_) => {}
        _ => logging::init("warn", None, false)?,
    }
    let socket = match &arguments.command {
        // What reads the configuration itself, and what is told everything by whoever started it.
        Command::Serve(_)
        | Command::Config(_)
        | Command::Doctor(_)
        | Command::Demo(_)
        | Command::Engine(_)
        | Command::LoadModel(_)
        | Command::IndexDocument(_)
        | Command::Worker(_) => arguments.socket,
        _ => {
            let effective = line.load()?;
            let settings = effective.settings();
            // Set once, here; nothing else of a command depends on it.
            let _ = SHARING.set(settings.sharing.clone());
            settings.serve.socket.clone()
        }
    };
    match arguments.command {
        Command::Serve(args) => serve::run(line, args),
        Command::Config(args) => config::run(line, args),
        Command::ReloadConfig(args) => control::reload_config(socket, &args),
        Command::Stop(args) => control::stop(socket, &args),
        Command::Status(args) => control::status(socket, &args),
        Command::Models(args) => control::models(socket, &args),
        Command::Model(args) => model::run(socket, &args),
        Command::Embed(args) => embed::run(socket, args),
        Command::Summarize(args) => texts::summarize(socket, &args, line.load()?.settings()),
        Command::Generate(args) => texts::generate(socket, &args),
        Command::Similar(args) => texts::similar(socket, &args),
        Command::Rank(args) => texts::rank(socket, &args),
        Command::Classify(args) => texts::classify(socket, &args),
        Command::Index(args) => documents::index(socket, &args),
        Command::Search(args) => documents::search(socket, &args),
        Command::Load(args) => load::run(socket, &args),
        Command::Doctor(args) => doctor::run(&line, &args),
        Command::Demo(args) => demo::run(&args),
        Command::Engine(args) => children::engine(args),
        Command::LoadModel(args) => children::load_model(args),
        Command::IndexDocument(args) => documents::index_one(socket, &args),
        Command::Worker(args) => worker::run(socket, &args),
    }
}

/// A client of the broker at `socket`, or at the default one. `Never` for commands that only look at one that runs.
fn client(socket: Option<PathBuf>, name: &str, start: Option<StartBroker>) -> ClientBuilder {
    let mut builder = Client::builder().name(name);
    if let Some(sharing) = SHARING.get() {
        let fallback = match sharing.fallback {
            settings::Fallback::Error => Fallback::Error,
            settings::Fallback::Local => Fallback::Local,
        };
        builder =
            builder.sharing(sharing.enabled).rollout_percent(sharing.rollout_percent).fallback(fallback);
    }
    if let Some(socket) = socket {
        builder = builder.socket(socket);
    }
    if let Ok(program) = std::env::current_exe() {
        builder = builder.broker_program(program);
    }
    match start {
        Some(start) => builder.start_broker(start),
        None => builder,
    }
}

/// A lease on `name` with a progress bar while it loads.
fn lease(client: &Client, name: &str, route: RouteArg) -> Result<Model, Failure> {
    let route = match route {
        RouteArg::Lane => Route::Lane,
        RouteArg::Socket => Route::Socket,
    };
    let request = ModelRequest::new(model_name(name)).route(route).progress(terminal::load_progress());
    Ok(client.model_with(request)?)
}

/// A model name as the broker understands it: a folder is named by its absolute path, since the broker has another
/// working directory.
fn model_name(name: &str) -> String {
    let (model, _) = model_loader::split_precision(name);
    let is_path = model.starts_with(['.', '/', '~']) || std::path::Path::new(model).is_dir();
    match (is_path, std::fs::canonicalize(model)) {
        // With the precision that stood behind it.
        (true, Ok(path)) => path.to_string_lossy().into_owned() + &name[model.len()..],
        _ => name.to_owned(),
    }
}

/// Seconds from the command line as a duration; nonsense becomes zero.
fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::ZERO)
}
