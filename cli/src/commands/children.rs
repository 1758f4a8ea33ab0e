//! What the broker starts: engines and loaders. Each speaks frames with it over an inherited descriptor.

use crate::args::{EngineArgs, LoadModelArgs};
use crate::failure::{Exit, Failure};
use crate::logging;
use engine_host::{HostError, HostOptions};
use model_loader::LoadRequest;
use model_source::SourceOptions;
use shm_os::process::take_inherited;

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, error.to_string())
}

/// Serves jobs until the broker says otherwise or is gone.
pub(super) fn engine(args: EngineArgs) -> Result<(), Failure> {
    logging::init("info", None, false)?;
    let link = take_inherited(args.link_fd).map_err(failed)?;
    let options =
        HostOptions { threads: args.threads, dumpable: args.inspectable, vectors_dir: args.vectors_dir };
    match engine_host::run(link, options) {
        // The broker's end is this process's end; nothing is wrong here.
        Ok(()) | Err(HostError::BrokerGone) => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Loads one model and hands its image to the broker.
pub(super) fn load_model(args: LoadModelArgs) -> Result<(), Failure> {
    logging::init("info", None, false)?;
    let link = take_inherited(args.link_fd).map_err(failed)?;
    let mut source = SourceOptions::from_env().map_err(failed)?;
    source.cache_dir = args.cache_dir;
    let request = LoadRequest {
        reference: args.model,
        precision: args.precision.into(),
        backing: args.backing.into(),
        source,
    };
    if model_loader::run(link, &request).map_err(failed)? { Ok(()) } else { Err(Failure::told(Exit::Model)) }
}
