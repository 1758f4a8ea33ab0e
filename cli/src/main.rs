//! The program modelbroker: reads its arguments, runs one command, turns its failure into a message and an exit code.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod configuration;
mod failure;
mod logging;
mod terminal;

use clap::{CommandFactory, FromArgMatches};
use std::process::ExitCode;

/// The command without the environment variables that are set to nothing: they count as unset.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
            true => arg.env(clap::builder::Resettable::Reset),
            false => arg,
        })
        .mut_subcommands(without_empty_variables)
}

/// Whether the command was asked for JSON: then its failure is told as an error body.
fn wants_json(command: &args::Command) -> bool {
    use args::Command;
    match command {
        Command::Status(args) | Command::Models(args) | Command::ReloadConfig(args) => args.json,
        Command::Model(args) => args.json,
        Command::Config(args) => args.json,
        Command::Doctor(args) => args.json,
        Command::Summarize(args) => args.json,
        Command::Generate(args) => args.json,
        Command::Similar(args) => args.corpus.json,
        Command::Rank(args) => args.corpus.json,
        Command::Classify(args) => args.json,
        Command::Index(args) => args.json,
        Command::Search(args) => args.json,
        Command::Load(args) => args.json,
        Command::Demo(args) => args.json,
        _ => false,
    }
}

fn main() -> ExitCode {
    let mut matches = without_empty_variables(args::Arguments::command()).get_matches();
    let arguments = args::Arguments::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.exit());
    let as_json = wants_json(&arguments.command);
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if as_json {
                if let Some(body) = failure.to_json() {
                    eprintln!("{body}");
                }
            } else if let Some(message) = failure.message() {
                eprintln!("modelbroker: {message}");
            }
            failure.exit().into()
        }
    }
}
