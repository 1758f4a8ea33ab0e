//! From a configuration to a running broker and back: folder, lock, socket, signals; afterwards nothing is left behind.

use crate::config::BrokerConfig;
use crate::core::check_provided_id;
use crate::error::BrokerError;
use crate::io::EventLoop;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use shm_os::OsError;
use shm_os::run_dir::{LockFile, effective_uid, ensure_private_dir};
use shm_os::socket::{bind_listener, check_path};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// Mode of the run folder and of the socket when other users are let in: they may pass and connect, not list.
const OPEN_FOLDER_MODE: u32 = 0o711;
const OPEN_SOCKET_MODE: u32 = 0o666;
const PRIVATE_FOLDER_MODE: u32 = 0o700;

/// Serves until told to leave: by SIGTERM or SIGINT (the first drains, the second ends at once), by a client's
/// `Shutdown`, or by being idle for as long as configured. SIGHUP has the configuration read again. Blocks; children live as long as the calling thread.
///
/// Raises this process's soft limit of open descriptors to the hard one, and handles those signals while it runs.
///
/// # Errors
/// [`BrokerError::AlreadyRunning`] when another broker holds the lock; the others name what is wrong with folder, path
/// or system. Nothing is left behind in either case.
pub fn run(mut config: BrokerConfig) -> Result<(), BrokerError> {
    for (command, child) in [(&config.engine_command, "engine"), (&config.loader_command, "loader")] {
        if command.is_empty() {
            return Err(BrokerError::NoCommand { child });
        }
    }
    check_providers(&config)?;
    check_path(&config.socket_path)?;
    let run_dir = parent_of(&config.socket_path)?;
    if config.allow_other_users {
        make_private_again(&run_dir);
    }
    ensure_private_dir(&run_dir)?;
    let lock_dir = parent_of(&config.lock_path)?;
    if lock_dir != run_dir {
        ensure_private_dir(&lock_dir)?;
    }
    let Some(lock) = LockFile::try_lock(&config.lock_path)? else {
        return Err(BrokerError::AlreadyRunning { pid: LockFile::holder_pid(&config.lock_path) });
    };
    raise_descriptor_limit();
    let (signals, _registered) = Signals::register(&[SIGTERM, SIGINT])?;
    let (hangups, _registered_too) = Signals::register(&[SIGHUP])?;
    let listener = bind_listener(&config.socket_path)?;
    listener.set_nonblocking(true)?;
    let opened =
        config.allow_other_users.then(|| OpenedFolder::open(&run_dir, &config.socket_path)).transpose()?;
    let on_ready = config.on_ready.take();
    let socket_path = config.socket_path.clone();
    let event_loop = EventLoop::new(config, listener, signals, hangups)?;
    info!(socket = %socket_path.display(), "broker listens");
    if let Some(on_ready) = on_ready {
        on_ready();
    }
    let outcome = event_loop.run();
    drop(opened);
    drop(lock);
    info!("broker left");
    Ok(outcome?)
}

fn check_providers(config: &BrokerConfig) -> Result<(), BrokerError> {
    for (index, provider) in config.providers.iter().enumerate() {
        let bad = |why: String| BrokerError::BadProvider { model_id: provider.model_id.clone(), why };
        check_provided_id(&provider.model_id).map_err(bad)?;
        if provider.program.is_empty() {
            return Err(bad("its command is empty: name a program".to_owned()));
        }
        let most = config.limits.max_provider_processes;
        if index >= most {
            return Err(bad(format!("{most} processes for providers are the limit: name fewer")));
        }
    }
    Ok(())
}

fn parent_of(path: &Path) -> Result<PathBuf, BrokerError> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(_)) if parent.as_os_str().is_empty() => Ok(PathBuf::from(".")),
        (Some(parent), Some(_)) => Ok(parent.to_path_buf()),
        _ => Err(BrokerError::BadPath { path: path.to_path_buf() }),
    }
}

/// Closes a folder of this user that an earlier broker, which was killed, had opened for others.
fn make_private_again(folder: &Path) {
    let ours = std::fs::symlink_metadata(folder).is_ok_and(|meta| {
        meta.is_dir() && meta.uid() == effective_uid() && meta.mode() & 0o7777 == OPEN_FOLDER_MODE
    });
    if ours {
        // If it fails, the check of the folder says so.
        let _ = std::fs::set_permissions(folder, Permissions::from_mode(PRIVATE_FOLDER_MODE));
    }
}

/// A run folder that other users may pass; private again when dropped.
struct OpenedFolder(PathBuf);

impl OpenedFolder {
    fn open(folder: &Path, socket: &Path) -> Result<OpenedFolder, OsError> {
        for (path, mode) in [(socket, OPEN_SOCKET_MODE), (folder, OPEN_FOLDER_MODE)] {
            std::fs::set_permissions(path, Permissions::from_mode(mode))
                .map_err(|e| OsError::new(format!("opening {} for other users", path.display()), e))?;
        }
        Ok(OpenedFolder(folder.to_path_buf()))
    }
}

impl Drop for OpenedFolder {
    fn drop(&mut self) {
        make_private_again(&self.0);
    }
}

/// Signals as bytes in a socket; unregistered when dropped.
struct Signals(Vec<SigId>);

impl Signals {
    fn register(wanted: &[i32]) -> Result<(UnixStream, Signals), OsError> {
        let failed = |e| OsError::new("preparing to be signalled", e);
        let (reader, writer) = UnixStream::pair().map_err(failed)?;
        reader.set_nonblocking(true).map_err(failed)?;
        let mut registered = Signals(Vec::new());
        for signal in wanted {
            let writer = writer.try_clone().map_err(failed)?;
            registered.0.push(signal_hook::low_level::pipe::register(*signal, writer).map_err(failed)?);
        }
        Ok((reader, registered))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.0.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

/// Lets the broker have as many descriptors as it may.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(errno) = raised {
        warn!("the limit of open descriptors could not be raised: {errno}");
    }
}
