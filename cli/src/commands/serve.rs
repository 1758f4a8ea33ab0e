//! `serve`: the broker in the foreground, set up as the configuration says, and told anew when it is read again.

use crate::args::{Backing, Precision, ServeArgs};
use crate::configuration::CommandLine;
use crate::failure::{Exit, Failure};
use crate::logging;
use broker::{BrokerConfig, DeviceChoice, LiveSettings, ModelKind, ModelSettings, Reloaded};
use model_loader::PrecisionChoice;
use settings::{Device, Effective, Live, ModelType, Settings, changes, in_force};
use shm_os::image_backing::{BackingChoice, BackingKind};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Folder of saved vectors in the cache folder.
const VECTORS_FOLDER: &str = "vectors";

impl From<Backing> for BackingChoice {
    fn from(backing: Backing) -> BackingChoice {
        match backing {
            Backing::Auto => BackingChoice::Auto,
            Backing::Memfd => BackingKind::SealedMemfd.into(),
            Backing::File => BackingKind::ImageFile.into(),
            Backing::PosixShm => BackingKind::PosixShm.into(),
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

/// What the settings do not say of a broker: it is the same after each reading.
struct Surroundings {
    program: OsString,
    preload: Vec<String>,
    /// Seconds after which a broker that a client started leaves, where the settings say nothing.
    client_idle_exit: Option<Duration>,
}

/// Runs the broker until it is told to leave.
pub(super) fn run(line: CommandLine, args: ServeArgs) -> Result<(), Failure> {
    let line = line.with_serve(&args)?;
    let effective = line.load()?;
    let settings = effective.settings();
    let client_log = args.log_file.filter(|_| args.started_by_client);
    logging::init(
        "info",
        settings.serve.log_file.as_deref().or(client_log.as_deref()),
        settings.serve.log_json,
    )?;
    refuse_if_disabled(&effective)?;
    let surroundings = Surroundings {
        program: std::env::current_exe()?.into(),
        preload: args.preload.iter().map(|name| super::model_name(name)).collect(),
        client_idle_exit: args.idle_exit.filter(|_| args.started_by_client).map(Duration::from_secs),
    };
    let mut config = broker_config(settings, &surroundings, args.inspectable)?;
    config.providers = args.providers;
    if let Some(fd) = args.ready_fd {
        let mut ready = open_inherited(fd)?;
        config.on_ready = Some(Box::new(move || {
            // Whoever started us may be gone; the broker serves all the same.
            let _ = ready.write_all(b"ready\n");
        }));
    }
    let mut held = effective;
    config.on_reload = Some(Box::new(move || {
        let read = line.load().map_err(|problems| problems.to_string())?;
        let (next, reloaded) = reread(&held, &read, &surroundings)
            .map_err(|failure| failure.message().unwrap_or("the configuration cannot be used").to_owned())?;
        held = next;
        Ok(reloaded)
    }));
    Ok(broker::run(config)?)
}

fn refuse_if_disabled(effective: &Effective) -> Result<(), Failure> {
    if effective.settings().enabled {
        return Ok(());
    }
    let origin = effective.get("enabled").map(|setting| setting.origin.to_string()).unwrap_or_default();
    let why =
        format!("modelbroker is switched off: enabled = false ({origin}); set it to true to serve models");
    Err(Failure::new(Exit::Usage, why))
}

/// What a configuration that was read again leads to: the one that holds from now on, and what the broker is told.
fn reread(
    held: &Effective,
    read: &Effective,
    surroundings: &Surroundings,
) -> Result<(Effective, Reloaded), Failure> {
    let next = in_force(held, read);
    let live = LiveSettings::of(&broker_config(next.settings(), surroundings, false)?);
    let (mut applied, mut pending) = (Vec::new(), Vec::new());
    for change in changes(held, read) {
        match change.live {
            Live::Now => applied.push(change.to_string()),
            Live::NextLoad => applied.push(format!("{change} (for models that are loaded from now on)")),
            Live::Clients => applied.push(format!("{change} (clients read it when they start)")),
            Live::Restart => pending.push(format!("{change} (needs a restart of the broker)")),
        }
    }
    Ok((next, Reloaded { live, applied, pending }))
}

/// The broker's configuration as the settings say.
fn broker_config(
    settings: &Settings,
    surroundings: &Surroundings,
    inspectable: bool,
) -> Result<BrokerConfig, Failure> {
    let serve = &settings.serve;
    let socket = serve
        .socket
        .clone()
        .unwrap_or_else(|| shm_os::run_dir::default_run_dir().join(worker_sdk::SOCKET_FILE_NAME));
    let cache_dir = match &serve.cache_dir {
        Some(dir) => dir.clone(),
        None => model_source::default_cache_dir().map_err(|e| Failure::new(Exit::Failed, e.to_string()))?,
    };
    let cache_dir = std::path::absolute(&cache_dir)?;
    let cache = &settings.embedding_cache;
    let persist = cache.persist_to_disk && cache.entries > 0;
    let engine = engine_command(settings, surroundings, inspectable, persist.then_some(&cache_dir));
    let loader = vec![
        surroundings.program.clone(),
        "load-model".into(),
        "--precision".into(),
        serve.precision.name().into(),
    ];
    let mut config = BrokerConfig::new(socket, cache_dir, super::model_name(&serve.model), engine, loader);
    config.backing = match serve.backing {
        settings::Backing::Auto => BackingChoice::Auto,
        settings::Backing::Memfd => BackingKind::SealedMemfd.into(),
        settings::Backing::File => BackingKind::ImageFile.into(),
        settings::Backing::PosixShm => BackingKind::PosixShm.into(),
    };
    config.idle_exit = serve.idle_exit.or(surroundings.client_idle_exit);
    config.allow_other_users = serve.allow_other_users;
    config.cache_entries = cache.entries;
    config.cache_ttl = cache.ttl;
    config.cache_persist = persist;
    config.models = settings.models.iter().filter_map(|model| configured(model, settings)).collect();
    config.preload = if settings.auto_initialize { surroundings.preload.clone() } else { Vec::new() };
    config.unload_after = settings.sharing.unload_after;
    config.max_shared_models = settings.sharing.max_shared_models;
    config.memory_budget_bytes = serve.memory_budget_bytes;
    config.log_model_usage = settings.log_model_usage;
    config.memory_monitoring = settings.memory_monitoring;
    Ok(config)
}

fn engine_command(
    settings: &Settings,
    surroundings: &Surroundings,
    inspectable: bool,
    vectors_in: Option<&PathBuf>,
) -> Vec<OsString> {
    let mut engine = vec![surroundings.program.clone(), "engine".into()];
    if settings.serve.threads > 0 {
        engine.extend(["--threads".into(), settings.serve.threads.to_string().into()]);
    }
    if inspectable {
        engine.push("--inspectable".into());
    }
    if let Some(cache_dir) = vectors_in {
        engine.extend(["--vectors-dir".into(), cache_dir.join(VECTORS_FOLDER).into()]);
    }
    engine
}

/// A configured model as the broker knows it; `None` for those that it does not serve.
fn configured(model: &settings::Model, settings: &Settings) -> Option<ModelSettings> {
    let kind = match model.kind {
        ModelType::Embedding => ModelKind::Embedding,
        ModelType::Text2Text => ModelKind::Text2Text,
        ModelType::Reranker => ModelKind::Reranker,
        ModelType::Classifier => ModelKind::Classifier,
        ModelType::Chat => ModelKind::Chat,
        ModelType::Custom => ModelKind::Custom,
        // Asked over a network by whoever uses it; nothing of it is loaded here.
        ModelType::Remote => return None,
    };
    // A custom type without weights is what its provider calls it.
    let source = model.source().unwrap_or_else(|| format!("custom/{}", model.id));
    let mut known = ModelSettings::new(&model.id, super::model_name(&source), kind);
    known.preload = model.preload && settings.auto_initialize;
    known.unload_after = model.unload_after;
    known.shared = model.shared;
    known.cache = model.cache_embeddings;
    known.device = match model.device.unwrap_or(settings.device_preference) {
        Device::Auto => DeviceChoice::Auto,
        Device::Cpu => DeviceChoice::Cpu,
        Device::Cuda(number) => DeviceChoice::Cuda(number),
    };
    Some(known)
}

/// A descriptor that was inherited under a number, as a file of its own; the inherited one stays with the process.
pub(super) fn open_inherited(fd: i32) -> Result<File, Failure> {
    let path = format!("/proc/self/fd/{fd}");
    File::options().write(true).open(Path::new(&path)).map_err(|e| {
        Failure::new(Exit::Usage, format!("descriptor {fd} was not handed to this process: {e}"))
    })
}
