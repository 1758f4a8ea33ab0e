//! A model of a type of its own over shared weights: leases a model, computes on the one copy of its pages that all
//! processes share, and tells how alike two texts are. It also embeds, so that `Model::embed` works on it.
//!
//! `cargo run -p worker-sdk --features local --example provide_similarity [MODEL]`; callers:
//! `client.model("custom/similarity")?.call(b"first text\nsecond text", &CallOptions::default())`.
//!
//! In: two lines of UTF-8. Out: their cosine, in decimal.

use worker_sdk::{AttachedModel, Client, Operation, ProvidedJob, ProviderError, ProviderSpec, SdkError};

fn cosine(attached: &AttachedModel, job: &ProvidedJob) -> Result<Vec<u8>, ProviderError> {
    let text = std::str::from_utf8(job.payload()).map_err(|e| ProviderError::bad_input(e.to_string()))?;
    let (first, second) =
        text.split_once('\n').ok_or_else(|| ProviderError::bad_input("give two lines, one for each text"))?;
    let vectors = attached.embed(&[first, second]).map_err(|e| ProviderError::failed(e.to_string()))?;
    let dot = |a: usize, b: usize| -> f32 { vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum() };
    let cosine = dot(0, 1) / (dot(0, 0) * dot(1, 1)).sqrt();
    Ok(format!("{cosine:.6}").into_bytes())
}

fn embed(attached: &AttachedModel, job: &ProvidedJob) -> Result<Vec<u8>, ProviderError> {
    let vectors = attached.embed(&job.texts()?).map_err(|e| ProviderError::failed(e.to_string()))?;
    job.embeddings(&vectors.to_vecs())
}

fn main() -> Result<(), SdkError> {
    let model = std::env::args().nth(1).unwrap_or_default();
    let client = Client::connect()?;
    let attached = client.model(&model)?.attach()?;
    let description = attached.description();
    let spec = ProviderSpec::new("custom/similarity")
        .kind("text-similarity")
        .describe("tells how alike two texts are", "two lines of UTF-8", "a number from -1 to 1 in decimal")
        // Other weights are another model.
        .fingerprint(attached.fingerprint())
        .call()
        .embed(description.output_dim);
    let provider = client.provide(spec)?;
    eprintln!("providing {} with the weights of {}", provider.model_id(), description.model_id);
    provider.serve(|job| match job.operation() {
        Operation::Embed => embed(&attached, job),
        _ => cosine(&attached, job),
    })
}
