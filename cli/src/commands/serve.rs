//! `serve`: the broker in the foreground.

use crate::args::{Backing, Precision, ServeArgs};
use crate::failure::{Exit, Failure};
use crate::logging;
use broker::BrokerConfig;
use model_loader::PrecisionChoice;
use shm_layout::wire::BackingKind;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Folder of saved vectors in the cache folder.
const VECTORS_FOLDER: &str = "vectors";

impl From<Backing> for BackingKind {
    fn from(backing: Backing) -> BackingKind {
        match backing {
            Backing::Memfd => BackingKind::SealedMemfd,
            Backing::File => BackingKind::ImageFile,
            Backing::PosixShm => BackingKind::PosixShm,
        }
    }
}

impl From<Precision> for PrecisionChoice {
    fn from(precision: Precision) -> PrecisionChoice {
        match precision {
            Precision::F32 => PrecisionChoice::F32,
            Precision::Bf16 => PrecisionChoice::Bf16,
            Precision::Int8 => PrecisionChoice::Int8,
            Precision::Auto => PrecisionChoice::Auto,
        }
    }
}

/// Runs the broker until it is told to leave.
pub(super) fn run(socket: Option<PathBuf>, args: ServeArgs) -> Result<(), Failure> {
    logging::init("info", args.log_file.as_deref(), args.log_json)?;
    let socket =
        socket.unwrap_or_else(|| shm_os::run_dir::default_run_dir().join(worker_sdk::SOCKET_FILE_NAME));
    let cache_dir = match args.cache_dir {
        Some(dir) => dir,
        None => model_source::default_cache_dir().map_err(|e| Failure::new(Exit::Failed, e.to_string()))?,
    };
    let cache_dir = std::path::absolute(&cache_dir)?;
    let program: OsString = std::env::current_exe()?.into();
    let mut engine = vec![program.clone(), "engine".into()];
    if let Some(threads) = args.threads {
        engine.extend(["--threads".into(), threads.to_string().into()]);
    }
    if args.inspectable {
        engine.push("--inspectable".into());
    }
    let persist = args.cache_persist && args.cache_entries > 0;
    if persist {
        engine.extend(["--vectors-dir".into(), cache_dir.join(VECTORS_FOLDER).into()]);
    }
    let loader = vec![
        program,
        "load-model".into(),
        "--precision".into(),
        PrecisionChoice::from(args.precision).name().into(),
    ];
    let mut config = BrokerConfig::new(socket, cache_dir, super::model_name(&args.model), engine, loader);
    config.backing = args.backing.into();
    config.idle_exit = args.idle_exit.map(Duration::from_secs);
    config.allow_other_users = args.allow_other_users;
    config.cache_entries = args.cache_entries;
    config.cache_ttl = Duration::from_secs(args.cache_ttl);
    config.cache_persist = persist;
    config.providers = args.providers;
    if let Some(fd) = args.ready_fd {
        let mut ready = open_inherited(fd)?;
        config.on_ready = Some(Box::new(move || {
            // Whoever started us may be gone; the broker serves all the same.
            let _ = ready.write_all(b"ready\n");
        }));
    }
    Ok(broker::run(config)?)
}

/// A descriptor that was inherited under a number, as a file of its own; the inherited one stays with the process.
pub(super) fn open_inherited(fd: i32) -> Result<File, Failure> {
    let path = format!("/proc/self/fd/{fd}");
    File::options().write(true).open(Path::new(&path)).map_err(|e| {
        Failure::new(Exit::Usage, format!("descriptor {fd} was not handed to this process: {e}"))
    })
}
