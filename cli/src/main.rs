//! The program modelbroker: reads its arguments, runs one command, turns its failure into a message and an exit code.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod failure;
mod logging;
mod terminal;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                eprintln!("modelbroker: {message}");
            }
            failure.exit().into()
        }
    }
}
