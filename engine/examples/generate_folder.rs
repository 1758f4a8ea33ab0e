//! Compiles a generator's folder and measures it: `generate_folder FOLDER PRECISION PROMPT_WORDS TOKENS BATCH`.
//!
//! Prints how long a prompt of so many words takes, and tokens per second of BATCH answers of TOKENS tokens together.
//! `benches/peers/generators.py` makes folders and is its user.

use engine::compile::Precision;
use engine::{CompileOptions, GenerateOptions, Generation, Generator, Prompt, compile_folder};
use shm_layout::image::HeapImage;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, precision, words, tokens, batch] = arguments.as_slice() else {
        return Err("usage: generate_folder FOLDER PRECISION PROMPT_WORDS TOKENS BATCH".into());
    };
    let precision = Precision::ALL
        .into_iter()
        .find(|known| known.name() == precision)
        .ok_or("precision: f32, bf16 or int8")?;
    let (words, tokens, batch): (usize, usize, usize) = (words.parse()?, tokens.parse()?, batch.parse()?);
    let options = CompileOptions { model_id: "example/model".into(), precision, ..CompileOptions::default() };
    let mut image = Vec::new();
    let started = Instant::now();
    compile_folder(Path::new(folder), &options, &mut image, &mut |_| {})?;
    eprintln!("compiled {} MB in {:?}", image.len() >> 20, started.elapsed());
    let held = Arc::new(HeapImage::new(&image));
    drop(image);
    let started = Instant::now();
    let generator = Generator::load(held)?;
    eprintln!(
        "loaded in {:?}, {} threads, {}",
        started.elapsed(),
        engine::threads(),
        generator.info().cpu_path
    );
    generator.probe()?;
    let prompt = "word ".repeat(words);
    let options = GenerateOptions {
        max_output_tokens: tokens,
        min_output_tokens: tokens,
        ..GenerateOptions::default()
    };
    let begin = || generator.begin(&Prompt::Text(&prompt), &options);
    let mut answers = (0..batch).map(|_| begin()).collect::<Result<Vec<Generation>, _>>()?;
    let prompt_tokens: usize = answers.iter().map(Generation::prompt_tokens).sum();
    let started = Instant::now();
    while answers.iter().any(|answer| answer.output_tokens() == 0) {
        generator.step(&mut answers.iter_mut().collect::<Vec<_>>())?;
    }
    let first = started.elapsed();
    let before: usize = answers.iter().map(Generation::output_tokens).sum();
    let (started, busy) = (Instant::now(), busy_seconds());
    while answers.iter().any(|answer| !answer.is_done()) {
        generator.step(&mut answers.iter_mut().collect::<Vec<_>>())?;
    }
    let after: usize = answers.iter().map(Generation::output_tokens).sum();
    let rate = (after - before) as f64 / started.elapsed().as_secs_f64();
    let busy = (after - before) as f64 / (busy_seconds() - busy).max(1e-9);
    println!(
        "{} batch {batch}: prompts of {prompt_tokens} tokens in {first:.2?}, then {rate:.1} tokens/s, {busy:.1} for each second that this thread ran",
        precision.name()
    );
    Ok(())
}

/// Seconds that this thread was running, for machines that do other things too; all of the work with one thread.
fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = stat.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok());
    first.unwrap_or_default() / 1e9
}
