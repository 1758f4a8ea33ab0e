//! Embeds the arguments, or a few sentences: `cargo run -p worker-sdk --example embed -- "a cat" "a dog"`.

use worker_sdk::{Client, ModelRequest, SdkError};

fn main() -> Result<(), SdkError> {
    let mut texts: Vec<String> = std::env::args().skip(1).collect();
    if texts.is_empty() {
        texts = ["a cat sits on the mat", "a kitten rests on a rug", "interest rates rose again"]
            .map(String::from)
            .into();
    }
    let client = Client::connect()?;
    let model = client.model_with(ModelRequest::new("").progress(|step| {
        eprintln!("{}: {} of {} bytes", step.stage, step.done_bytes, step.total_bytes);
    }))?;
    let description = model.description()?;
    let vectors = model.embed(&texts)?;
    println!(
        "{} ({} dimensions, fingerprint {:016x})",
        description.model_id,
        vectors.dim(),
        vectors.fingerprint()
    );
    for (text, vector) in texts.iter().zip(&vectors) {
        let likeness: f32 = vector.iter().zip(&vectors[0]).map(|(a, b)| a * b).sum();
        println!("{likeness:6.3}  {text}");
    }
    Ok(())
}
