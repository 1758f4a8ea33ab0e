//! Commands on texts that give no vectors: `summarize`, `generate`, `similar`, `rank`, `classify`. Reading texts is shared with
//! `embed`.

use super::embed::Lines;
use crate::args::{
    ClassifyArgs, CorpusArgs, GenerateArgs, InputFormat, RankArgs, RouteArg, SimilarArgs, SummarizeArgs,
};
use crate::failure::{Exit, Failure};
use serde_json::{Value, json};
use settings::Settings;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;
use std::time::Duration;
use worker_sdk::{
    CallOptions, ChatMessage, EmbedOptions, GenerateAnswer, GeneratePrompt, GenerateSettings, Model, Prompt,
    Ranked, SummaryOptions,
};

/// Longest text that is read from stdin as one, in bytes.
const MAX_INPUT_BYTES: u64 = shm_layout::limits::MAX_TEXT_BYTES as u64;
/// Most texts of a corpus file.
const MAX_CORPUS_TEXTS: usize = 1_000_000;
/// Characters of a text that are shown beside its score.
const SHOWN_CHARS: usize = 100;

fn model(socket: Option<PathBuf>, command: &str, name: &str, route: RouteArg) -> Result<Model, Failure> {
    let client = super::client(socket, command, None).connect()?;
    super::lease(&client, name, route)
}

/// The text of an argument; of stdin for `-` or none.
fn text_of(argument: Option<&str>) -> Result<String, Failure> {
    if let Some(text) = argument.filter(|text| *text != "-") {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_INPUT_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        let message = format!("stdin has more than {MAX_INPUT_BYTES} bytes: split the text");
        return Err(Failure::new(Exit::Input, message));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::new(Exit::Input, format!("stdin is not UTF-8 at its byte {at}"))
    })
}

/// The texts of a corpus file, or of stdin for `-`.
fn corpus_of(args: &CorpusArgs) -> Result<Vec<String>, Failure> {
    if args.corpus.as_os_str() == "-" {
        return read_corpus(io::stdin().lock(), args.input);
    }
    let file = File::open(&args.corpus).map_err(|error| {
        Failure::new(Exit::Input, format!("the corpus {} cannot be read: {error}", args.corpus.display()))
    })?;
    read_corpus(BufReader::new(file), args.input)
}

fn read_corpus(reader: impl io::BufRead, format: InputFormat) -> Result<Vec<String>, Failure> {
    let mut lines = Lines::new(reader, format);
    let mut texts = Vec::new();
    loop {
        let batch = lines.next_batch()?;
        if batch.is_empty() {
            break;
        }
        texts.extend(batch);
        if texts.len() > MAX_CORPUS_TEXTS {
            let message =
                format!("the corpus has more than {MAX_CORPUS_TEXTS} texts: index it instead, and search");
            return Err(Failure::new(Exit::Input, message));
        }
    }
    if texts.is_empty() {
        return Err(Failure::new(Exit::Input, "the corpus has no texts: give one a line"));
    }
    Ok(texts)
}

/// `summarize`: a text to a shorter one.
pub(super) fn summarize(
    socket: Option<PathBuf>,
    args: &SummarizeArgs,
    settings: &Settings,
) -> Result<(), Failure> {
    let text = text_of(args.text.as_deref())?;
    let configured = settings.models.iter().find(|model| model.id == args.model);
    let usual = SummaryOptions::default();
    let choose = |asked: Option<u32>, of: fn(&settings::Model) -> usize, usual: u32| {
        let configured = configured.map(|model| u32::try_from(of(model)).unwrap_or(u32::MAX));
        asked.or(configured).unwrap_or(usual)
    };
    let model = model(socket, "summarize", &args.model, RouteArg::Socket)?;
    let options = SummaryOptions {
        max_input_tokens: choose(
            args.max_input_length,
            |model| model.max_input_tokens,
            usual.max_input_tokens,
        ),
        max_output_tokens: choose(
            args.max_output_length,
            |model| model.max_output_tokens,
            usual.max_output_tokens,
        ),
        num_beams: choose(args.num_beams, |model| model.num_beams, usual.num_beams),
        ..usual
    };
    let call = CallOptions::default().timeout(Duration::from_secs(args.timeout));
    let answer = model.summarize(&text, &options, &call)?;
    print_answer(&answer, args.json)
}

fn print_answer(answer: &GenerateAnswer, as_json: bool) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    if as_json {
        let document = json!({
            "text": answer.text,
            "finish_reason": answer.finish.name(),
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "token_ids": answer.token_ids,
            "fingerprint": format!("{:016x}", answer.fingerprint),
        });
        writeln!(out, "{document}")?;
    } else {
        writeln!(out, "{}", answer.text.trim())?;
    }
    Ok(out.flush()?)
}

/// `generate`: how a model goes on, shown as it comes.
pub(super) fn generate(socket: Option<PathBuf>, args: &GenerateArgs) -> Result<(), Failure> {
    let text = text_of(args.prompt.as_deref())?;
    let model = model(socket, "generate", &args.model, RouteArg::Socket)?;
    let message = |role: &str, content: String| ChatMessage { role: role.into(), content };
    let is_chat = !args.raw && model.description()?.facts.has_chat_template;
    if !is_chat && args.system.is_some() {
        return Err(Failure::new(
            Exit::Usage,
            "--system needs a chat model, whose template has a place for it: put it into the prompt",
        ));
    }
    let prompt = if is_chat {
        let system = args.system.iter().map(|text| message("system", text.clone()));
        GeneratePrompt::Chat(system.chain([message("user", text)]).collect())
    } else {
        GeneratePrompt::Text(text)
    };
    let settings = GenerateSettings {
        max_input_tokens: args.max_input_length,
        max_output_tokens: args.max_output_length,
        num_beams: args.num_beams,
        early_stopping: args.num_beams > 1,
        no_repeat_ngram_size: args.no_repeat_ngram_size,
        repetition_penalty: args.repetition_penalty,
        length_penalty: args.length_penalty,
        do_sample: args.temperature.is_some_and(|temperature| temperature > 0.0),
        temperature: args.temperature.filter(|temperature| *temperature > 0.0).unwrap_or(1.0),
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        stop: args.stop.clone(),
        ..GenerateSettings::default()
    };
    let call = CallOptions::default().timeout(Duration::from_secs(args.timeout));
    if args.json || args.num_beams > 1 {
        return print_answer(&model.generate(prompt, &settings, &call)?, args.json);
    }
    let mut out = io::stdout().lock();
    for piece in model.stream(prompt, &settings, &call)? {
        out.write_all(piece?.as_bytes())?;
        out.flush()?;
    }
    writeln!(out)?;
    Ok(out.flush()?)
}

fn prompt(name: Option<&String>) -> Prompt {
    name.map_or(Prompt::ModelDefault, |name| Prompt::Named(name.clone()))
}

/// `similar`: the texts of a corpus that are most like a query.
pub(super) fn similar(socket: Option<PathBuf>, args: &SimilarArgs) -> Result<(), Failure> {
    let corpus = corpus_of(&args.corpus)?;
    let model = model(socket, "similar", &args.model, RouteArg::Lane)?;
    let options = EmbedOptions::default()
        .timeout(Duration::from_secs(args.timeout))
        .prompt(prompt(args.prompt_name.as_ref()));
    let found = model.similar(&args.query, &corpus, args.k, &options)?;
    print_ranked(&found, &corpus, args.corpus.json)
}

/// `rank`: the texts of a corpus in the order of how well they answer a query, by a reranker.
pub(super) fn rank(socket: Option<PathBuf>, args: &RankArgs) -> Result<(), Failure> {
    let corpus = corpus_of(&args.corpus)?;
    let model = model(socket, "rank", &args.model, RouteArg::Lane)?;
    let options = EmbedOptions::default().timeout(Duration::from_secs(args.timeout));
    let mut found = model.rank_with(&args.query, &corpus, &options)?;
    found.truncate(args.k);
    print_ranked(&found, &corpus, args.corpus.json)
}

fn print_ranked(found: &[Ranked], corpus: &[String], as_json: bool) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    if as_json {
        let row = |ranked: &Ranked| json!({"index": ranked.index, "score": ranked.score, "text": corpus[ranked.index]});
        let rows: Vec<Value> = found.iter().map(row).collect();
        writeln!(out, "{}", json!({ "results": rows }))?;
    } else {
        for ranked in found {
            let text: String =
                corpus[ranked.index].chars().filter(|c| !c.is_control()).take(SHOWN_CHARS).collect();
            writeln!(out, "{:.4}  {}: {text}", ranked.score, ranked.index)?;
        }
    }
    Ok(out.flush()?)
}

/// `classify`: texts to the labels of a classifier.
pub(super) fn classify(socket: Option<PathBuf>, args: &ClassifyArgs) -> Result<(), Failure> {
    let texts = if args.texts.is_empty() || args.texts == ["-"] {
        read_corpus(io::stdin().lock(), args.input)?
    } else {
        args.texts.clone()
    };
    let model = model(socket, "classify", &args.model, RouteArg::Lane)?;
    let mut out = io::stdout().lock();
    for (index, labels) in model.classify(&texts)?.iter().enumerate() {
        if args.json {
            let labels: Vec<Value> =
                labels.iter().map(|label| json!({"label": label.label, "score": label.score})).collect();
            writeln!(out, "{}", json!({"index": index, "labels": labels}))?;
        } else if let Some(best) = labels.first() {
            writeln!(out, "{:.4}  {}", best.score, best.label)?;
        }
    }
    Ok(out.flush()?)
}
