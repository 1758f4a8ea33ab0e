//! What a lane adds to computing: one text at a time through an idle engine whose model costs nothing. Prints; asserts only
//! that every answer came. Run with `--release -- --ignored --nocapture`.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::Rig;
use shm_layout::code::Code;
use shm_layout::wire::{Operation, Priority};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5000;

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 1000].as_nanos() as f64 / 1000.0;
    println!("{what}: p50 {:.1} µs, p90 {:.1}, p99 {:.1}, p999 {:.1}", at(500), at(900), at(990), at(999));
}

#[test]
#[ignore = "a measurement, for an otherwise idle machine"]
fn one_text_at_a_time() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let pause = std::env::var("PAUSE_US").ok().and_then(|us| us.parse().ok()).unwrap_or(0);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        // An idle engine: asleep, not just done with the last one.
        std::thread::sleep(Duration::from_micros(pause));
        let begun = Instant::now();
        let ticket = client.embed(Priority::Interactive, &["a short text of about sixteen tokens to embed"]);
        assert_eq!(client.code(ticket), Code::Ok);
        times.push(begun.elapsed());
        client.answers.clear();
    }
    report("lane", times);
    let mut times = Vec::new();
    for relay_id in 0..ROUNDS as u64 {
        std::thread::sleep(Duration::from_micros(pause));
        let begun = Instant::now();
        rig.broker.job(relay_id, 0, Operation::Embed, &["a short text of about sixteen tokens to embed"]);
        assert_eq!(rig.broker.answer(relay_id).0, Code::Ok);
        times.push(begun.elapsed());
    }
    report("link", times);
}

#[test]
#[ignore = "a measurement, for an otherwise idle machine"]
fn jobs_a_second() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let (begun, jobs) = (Instant::now(), 100_000);
    let mut left = jobs;
    while left > 0 || client.lane.in_flight() > 0 {
        while left > 0 && client.lane.in_flight() < 64 {
            let _ = client.embed(Priority::Bulk, &["a short text of about sixteen tokens to embed"]);
            left -= 1;
        }
        client.wait(Duration::from_millis(50));
        client.answers.clear();
    }
    println!("{:.0} jobs/s", jobs as f64 / begun.elapsed().as_secs_f64());
}
