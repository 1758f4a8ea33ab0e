//! Calls a model that somebody provides, once or many times:
//! `cargo run -p worker-sdk --example call -- custom/language "wie heißt diese sprache" 1000`.

use std::time::{Duration, Instant};
use worker_sdk::{CallOptions, Client, SdkError};

fn main() -> Result<(), SdkError> {
    let mut arguments = std::env::args().skip(1);
    let id = arguments.next().unwrap_or_else(|| "custom/language".into());
    let text = arguments.next().unwrap_or_else(|| "what language is this".into());
    let calls: usize = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(1).max(1);
    let model = Client::connect()?.model(&id)?;
    let mut times: Vec<Duration> = Vec::with_capacity(calls);
    let mut answer = Vec::new();
    for _ in 0..calls {
        let started = Instant::now();
        answer = model.call(text.as_bytes(), &CallOptions::default().timeout(Duration::from_secs(10)))?;
        times.push(started.elapsed());
    }
    print!("{}", String::from_utf8_lossy(&answer));
    times.sort_unstable();
    eprintln!(
        "{calls} calls, half of them within {:?}, 99 % within {:?}",
        times[calls / 2],
        times[calls * 99 / 100]
    );
    Ok(())
}
