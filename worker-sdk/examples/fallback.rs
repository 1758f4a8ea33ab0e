//! Goes on with a model of its own where no broker can be had, and says which way it went:
//! `cargo run -p worker-sdk --features local --example fallback`. Try it with `MODELBROKER_START=never` and no broker, or with
//! `MODELBROKER_SHARING_ENABLED=false`.

use worker_sdk::{Client, Fallback, SdkError, Way};

fn main() -> Result<(), SdkError> {
    let client = Client::builder().fallback(Fallback::Local).connect()?;
    let model = client.model("")?;
    let vectors = model.embed(&["a cat sits on the mat", "a kitten rests on a rug"])?;
    let way = match vectors.way() {
        Way::Shared => "the shared model",
        Way::Private => "a model of this process",
    };
    println!("{} vectors of {} dimensions from {way}", vectors.len(), vectors.dim());
    Ok(())
}
