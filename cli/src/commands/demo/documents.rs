//! The demo's documents: indexed by one subprocess each, then asked.

use super::corpus::Question;
use super::stage::{DemoBroker, Folder};
use crate::commands::worker::interrupt::Interrupt;
use crate::failure::{Exit, Failure};
use doc_pipeline::sdk_model::SdkModel;
use doc_pipeline::supervise::{self, CancelToken, SuperviseOptions};
use doc_pipeline::wire::Summary;
use doc_pipeline::{Hit, SearchOptions, Store, search_store, walk};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use worker_sdk::Model;

/// Longest time for one document.
const DOCUMENT_TIME_LIMIT: Duration = Duration::from_secs(120);
/// Results looked at for each question.
const RESULTS: usize = 5;
const SLICE: Duration = Duration::from_millis(50);

/// Indexes a folder, `jobs` subprocesses at a time; gives what became of the documents.
pub(crate) fn index(
    broker: &DemoBroker,
    folder: &Folder,
    corpus: &Path,
    model: &str,
    jobs: usize,
    interrupt: &Interrupt,
) -> Result<Summary, Failure> {
    let walked = walk::expand(&[corpus.to_owned()]).map_err(|e| Failure::new(Exit::Input, e.to_string()))?;
    if walked.documents.is_empty() {
        return Err(Failure::new(Exit::Input, format!("there is no document in {}", corpus.display())));
    }
    let (program, store) = (std::env::current_exe()?, folder.store());
    let command = |document: &Path| {
        let mut command = Command::new(&program);
        command.arg("--socket").arg(broker.socket()).arg("index-document").arg(document);
        command.arg("--store").arg(&store).args(["--model", model]);
        // A subprocess that finds the demo's broker gone must not start another one.
        command.env(worker_sdk::START_VARIABLE, "never");
        command
    };
    let options = SuperviseOptions { jobs, time_limit: DOCUMENT_TIME_LIMIT };
    let (cancel, done) = (CancelToken::new(), AtomicBool::new(false));
    let summary = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if interrupt.is_set() {
                    cancel.cancel();
                    return;
                }
                std::thread::sleep(SLICE);
            }
        });
        let summary = supervise::run(&walked.documents, &options, &cancel, command, |_| {});
        done.store(true, Ordering::Relaxed);
        summary
    });
    super::stage::interrupted(interrupt)?;
    for failure in &summary.failures {
        eprintln!("modelbroker: {}", failure.message);
    }
    Ok(summary)
}

/// A question and what was found.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) question: Question,
    /// The best result.
    pub(crate) best: Option<Hit>,
    /// The result that has the answer, where it is among the first.
    pub(crate) answer: Option<Hit>,
}

impl Answer {
    /// Whether the best result is of the expected document, and the answer is among the first results.
    pub(crate) fn is_right(&self) -> bool {
        match (&self.best, &self.answer) {
            (Some(best), Some(answer)) => best.document == answer.document,
            _ => false,
        }
    }
}

/// Searches the store for each question.
pub(crate) fn ask(folder: &Folder, model: &Model, questions: &[Question]) -> Result<Vec<Answer>, Failure> {
    let mut store = Store::open_existing(&folder.store())?;
    let model = SdkModel::new(model.clone())?;
    questions
        .iter()
        .map(|question| {
            let options = SearchOptions { results: RESULTS };
            let hits = search_store(&mut store, &model, &question.question, &options)?;
            let answer = hits.iter().find(|hit| has_answer(hit, question)).cloned();
            Ok(Answer { question: question.clone(), best: hits.into_iter().next(), answer })
        })
        .collect()
}

fn has_answer(hit: &Hit, question: &Question) -> bool {
    let name = Path::new(&hit.document).file_name().and_then(|name| name.to_str());
    name == Some(&question.document) && hit.snippet.contains(&question.phrase)
}
