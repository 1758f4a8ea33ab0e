//! The SDK against a real peer inside the test process: both routes, many threads, futures, outages, faults.

#[path = "../peer/mod.rs"]
mod peer;

mod calls;
mod faults;
mod outage;
