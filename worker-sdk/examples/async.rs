//! Several lists at once as futures, with the smallest executor there is: `cargo run -p worker-sdk --example async`.
//! Any runtime's `block_on` or `spawn` does in place of the one here.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::Thread;
use worker_sdk::{Client, EmbedOptions, SdkError};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

fn main() -> Result<(), SdkError> {
    let model = Client::connect()?.model("")?;
    let lists: Vec<Vec<String>> =
        (0..4).map(|l| (0..50).map(|i| format!("list {l}, sentence {i}")).collect()).collect();
    // All lists are on their way before the first is awaited.
    let jobs: Vec<_> =
        lists.iter().map(|list| model.submit(list, &EmbedOptions::bulk())).collect::<Result<_, _>>()?;
    block_on(async {
        for (number, job) in jobs.into_iter().enumerate() {
            println!("list {number}: {} vectors", job.await?.len());
        }
        Ok(())
    })
}
