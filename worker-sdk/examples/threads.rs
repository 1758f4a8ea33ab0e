//! Many threads on one model: `cargo run -p worker-sdk --example threads`.

use std::time::{Duration, Instant};
use worker_sdk::{Client, EmbedOptions, SdkError};

fn main() -> Result<(), SdkError> {
    let model = Client::connect()?.model("")?;
    let options = EmbedOptions::default().timeout(Duration::from_secs(30));
    let started = Instant::now();
    let counts: Vec<Result<usize, SdkError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let (model, options) = (&model, &options);
                scope.spawn(move || {
                    let texts: Vec<String> =
                        (0..100).map(|i| format!("thread {thread}, sentence {i}")).collect();
                    model.embed_with(&texts, options).map(|vectors| vectors.len())
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let total: usize = counts.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().sum();
    println!("{total} vectors in {:?}, {} reconnections", started.elapsed(), model.reconnects());
    Ok(())
}
