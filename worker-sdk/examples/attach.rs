//! Computes in this process on the shared pages, and compares with the engine's answer:
//! `cargo run -p worker-sdk --features local --example attach`.

use std::time::Instant;
use worker_sdk::{Client, SdkError};

fn main() -> Result<(), SdkError> {
    let texts = ["a cat sits on the mat", "a kitten rests on a rug"];
    let model = Client::connect()?.model("")?;
    let started = Instant::now();
    let attached = model.attach()?;
    println!("attached to {} bytes in {:?}, none of them copied", attached.image_bytes(), started.elapsed());
    let here = attached.embed(&texts)?;
    let there = model.embed(&texts)?;
    println!("bit for bit the same as the engine's: {}", here.values() == there.values());
    Ok(())
}
