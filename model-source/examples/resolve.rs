//! Resolves the model references given as arguments and prints where each lies and how long that took.
//! `cargo run -p model-source --example resolve -- all-MiniLM-L6-v2`

use model_source::{ModelRef, Progress, SourceError, SourceOptions, resolve};
use std::process::ExitCode;
use std::time::Instant;

/// One line per phase, and its bytes at the end.
#[derive(Default)]
struct Lines {
    done_bytes: u64,
}

impl Progress for Lines {
    fn begin(&mut self, what: &str, total_bytes: Option<u64>) {
        self.done_bytes = 0;
        eprintln!("{what} ({total_bytes:?} bytes) ...");
    }
    fn advance(&mut self, bytes: u64) {
        self.done_bytes += bytes;
    }
    fn end(&mut self) {
        eprintln!("... {} bytes", self.done_bytes);
    }
}

fn run(reference: &str) -> Result<(), SourceError> {
    let began = Instant::now();
    let model = resolve(&ModelRef::parse(reference)?, &SourceOptions::from_env()?, &mut Lines::default())?;
    println!("{} {:?} {} ({:.0?})", model.id, model.origin, model.folder.display(), began.elapsed());
    Ok(())
}

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for reference in std::env::args().skip(1) {
        let began = Instant::now();
        if let Err(error) = run(&reference) {
            eprintln!("{error}\n({:.0?})", began.elapsed());
            code = ExitCode::FAILURE;
        }
    }
    code
}
