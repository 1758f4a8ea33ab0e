//! `index`, `search` and the subprocess that indexes one document.

use crate::args::{IndexArgs, IndexDocumentArgs, RouteArg, SearchArgs};
use crate::failure::{Exit, Failure};
use crate::terminal::bold;
use doc_pipeline::sdk_model::SdkModel;
use doc_pipeline::supervise::{self, CancelToken, SuperviseOptions};
use doc_pipeline::wire::{DocumentReport, Outcome};
use doc_pipeline::{
    ChunkOptions, IndexOptions, ModelIdentity, SearchOptions, Store, index_document, limits, search_store,
    walk,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Indexes documents, one subprocess each.
pub(super) fn index(socket: Option<PathBuf>, args: &IndexArgs) -> Result<(), Failure> {
    let walked = walk::expand(&args.paths).map_err(|e| Failure::new(Exit::Input, e.to_string()))?;
    for problem in &walked.problems {
        eprintln!("modelbroker: {}: {}", problem.path.display(), problem.message);
    }
    if walked.documents.is_empty() {
        return Err(Failure::new(Exit::Input, "there is no document to index in what was given"));
    }
    // Before any subprocess starts: the model is loaded once, with a progress bar, and the store is known to fit it.
    let client = super::client(socket.clone(), "index", None).connect()?;
    let model = super::lease(&client, &args.model, RouteArg::Lane)?;
    let store = std::path::absolute(&args.store)?;
    let identity = ModelIdentity::of(&SdkModel::new(model.clone())?);
    drop(Store::open_or_create(&store, &identity)?);
    let program = std::env::current_exe()?;
    let command = |document: &Path| {
        let mut command = Command::new(&program);
        command.arg("--socket").arg(client.socket()).envs(super::sharing_environment());
        command.arg("index-document").arg(document).arg("--store").arg(&store);
        // The canonical id, so that every subprocess gets the very model that was checked above.
        command.arg("--model").arg(&identity.model_id);
        for (name, value) in
            [("--chunk-tokens", args.chunk_tokens), ("--overlap-tokens", args.overlap_tokens)]
        {
            if let Some(value) = value {
                command.arg(name).arg(value.to_string());
            }
        }
        command
    };
    let options =
        SuperviseOptions { jobs: args.jobs, time_limit: Duration::from_secs(args.document_timeout) };
    let show = !args.json;
    let cancel = cancelled_by_signals()?;
    let summary = supervise::run(&walked.documents, &options, &cancel, command, |report| {
        if show {
            print_report(report);
        }
    });
    if args.json {
        println!("{}", serde_json::to_string(&summary).unwrap_or_default());
    } else {
        println!(
            "{} documents: {} indexed, {} replaced, {} unchanged, {} failed; {} chunks, {} tokens in {:.1} s",
            summary.documents,
            summary.indexed,
            summary.replaced,
            summary.unchanged,
            summary.failed,
            summary.chunks,
            summary.tokens,
            summary.elapsed_ms as f64 / 1e3
        );
        for failure in &summary.failures {
            let path = failure.path.display().to_string();
            match failure.message.contains(&path) {
                true => eprintln!("modelbroker: {}", failure.message),
                false => eprintln!("modelbroker: {path}: {}", failure.message),
            }
        }
    }
    if summary.failed > 0 || !walked.problems.is_empty() {
        return Err(Failure::told(Exit::Partly));
    }
    Ok(())
}

/// A token that SIGINT and SIGTERM cancel: the subprocesses lead groups of their own and do not hear of them.
fn cancelled_by_signals() -> Result<CancelToken, Failure> {
    let cancel = CancelToken::new();
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let token = cancel.clone();
    // Ends with the process: a command indexes once.
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            token.cancel();
        }
    });
    Ok(cancel)
}

fn print_report(report: &DocumentReport) {
    let what = match &report.outcome {
        Outcome::Unchanged { .. } => "unchanged".to_owned(),
        Outcome::Indexed { chunks, .. } => format!("{chunks} chunks"),
        Outcome::Replaced { chunks, previous_chunks, .. } => {
            format!("{chunks} chunks in place of {previous_chunks}")
        }
        Outcome::Failed { .. } => "FAILED".to_owned(),
    };
    let mut out = std::io::stdout().lock();
    // A closed pipe must not end the indexing.
    let _ = writeln!(out, "{}: {what}", report.path.display());
}

/// Indexes one document in this process and prints its report.
pub(super) fn index_one(socket: Option<PathBuf>, args: &IndexDocumentArgs) -> Result<(), Failure> {
    if !supervise::die_with_supervisor() {
        return Err(Failure::new(Exit::Failed, "the process that started this one is gone"));
    }
    supervise::bound_memory(limits::DOCUMENT_MEMORY_BYTES_MAX)?;
    let client = super::client(socket, "index-document", None).connect()?;
    let model = SdkModel::new(super::lease(&client, &args.model, RouteArg::Lane)?)?;
    let mut store = Store::open_or_create(&args.store, &ModelIdentity::of(&model))?;
    let defaults = ChunkOptions::default();
    let options = IndexOptions {
        chunk: ChunkOptions {
            target_tokens: args.chunk_tokens.unwrap_or(defaults.target_tokens),
            overlap_tokens: args.overlap_tokens.unwrap_or(defaults.overlap_tokens),
        },
    };
    let result = index_document(&args.path, &mut store, &model, &options);
    println!("{}", DocumentReport::new(args.path.clone(), &result).to_line());
    match result {
        Ok(_) => Ok(()),
        Err(_) => Err(Failure::told(Exit::Failed)),
    }
}

/// Searches a store and prints what was found.
pub(super) fn search(socket: Option<PathBuf>, args: &SearchArgs) -> Result<(), Failure> {
    let mut store = Store::open_existing(&args.store)?;
    let name = args.model.clone().unwrap_or_else(|| store.identity().model_id.clone());
    let client = super::client(socket, "search", None).connect()?;
    let model = SdkModel::new(super::lease(&client, &name, RouteArg::Lane)?)?;
    let hits = search_store(&mut store, &model, &args.query, &SearchOptions { results: args.k })?;
    if args.json {
        println!("{}", serde_json::json!({ "query": args.query, "hits": hits }));
        return Ok(());
    }
    if hits.is_empty() {
        println!("nothing found: the store is empty");
    }
    for hit in &hits {
        let place = hit.heading_path.join(" › ");
        println!("{}. {}  score {:.4}, cosine {:.3}", hit.rank, bold(&hit.document), hit.score, hit.cosine);
        if !place.is_empty() {
            println!("   {place}");
        }
        for line in hit.snippet.lines().filter(|line| !line.trim().is_empty()).take(6) {
            println!("   {line}");
        }
        println!();
    }
    Ok(())
}
