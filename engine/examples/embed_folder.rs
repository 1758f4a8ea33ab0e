//! Compiles a model folder and embeds texts: `embed_folder FOLDER TEXTS.json OUT.f32 [--time SECONDS]`.
//!
//! `TEXTS.json` is a list of strings; `OUT.f32` gets the vectors as little-endian floats, one behind the other. With `--time`
//! the batch is computed again for that long and the rate is printed. The parity scripts are its user.

use engine::{CompileOptions, Model, compile_folder, verify_image};
use shm_layout::image::HeapImage;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, texts, out, options @ ..] = arguments.as_slice() else {
        return Err("usage: embed_folder FOLDER TEXTS.json OUT.f32 [--time SECONDS]".into());
    };
    let started = Instant::now();
    let mut image = Vec::new();
    let options_compile = CompileOptions { model_id: "example/model".into(), ..CompileOptions::default() };
    let summary = compile_folder(Path::new(folder), &options_compile, &mut image, &mut |_| {})?;
    eprintln!(
        "compiled {} bytes, {} tensors in {:?}",
        summary.total_bytes,
        summary.tensor_count,
        started.elapsed()
    );
    let started = Instant::now();
    verify_image(&image)?;
    eprintln!("verified in {:?}", started.elapsed());
    let image = Arc::new(HeapImage::new(&image));
    let started = Instant::now();
    let model = Model::load(image)?;
    eprintln!("loaded in {:?}: {:?}", started.elapsed(), model.info());
    let started = Instant::now();
    model.warm()?;
    eprintln!("tokenizer built in {:?}, {} threads", started.elapsed(), engine::threads());
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let vectors = model.embed(&texts)?;
    let different = texts
        .iter()
        .zip(vectors.rows())
        .filter(|(text, row)| !model.embed(&[text]).is_ok_and(|alone| alone.values == **row))
        .count();
    eprintln!("{different} of {} vectors differ in any bit between batch and single", texts.len());
    let bytes: Vec<u8> = vectors.values.iter().flat_map(|value| value.to_le_bytes()).collect();
    std::fs::write(out, bytes)?;
    if let [flag, seconds] = options
        && flag == "--time"
    {
        let limit = Duration::from_secs_f64(seconds.parse()?);
        let (started, mut rounds) = (Instant::now(), 0u32);
        while started.elapsed() < limit {
            model.embed(&texts)?;
            rounds += 1;
        }
        let each = started.elapsed() / rounds.max(1);
        println!("{:.1} texts/s, {each:?} a batch", texts.len() as f64 / each.as_secs_f64());
    }
    Ok(())
}
