//! Processes of providers: started with the broker's socket in their environment, killed and reaped. They have no link:
//! what they provide they offer over the socket, like any client.

use super::children::StartError;
use super::event_loop::{EventLoop, Token};
use crate::config::ProviderCommand;
use crate::core::{ChildExit, Event};
use shm_os::process::{ChildLimits, SpawnedChild, spawn_limited};
use shm_os::{Interest, OsError};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tracing::warn;

/// Names the broker's socket to a provider's process; the SDK reads it.
const SOCKET_VARIABLE: &str = "MODELBROKER_SOCKET";
/// With [`START_NEVER`] keeps a provider's process from starting a broker of its own.
const START_VARIABLE: &str = "MODELBROKER_START";
const START_NEVER: &str = "never";

/// The processes, by their place in the configuration.
pub(crate) struct ProviderProcesses {
    commands: Vec<ProviderCommand>,
    running: Vec<Option<SpawnedChild>>,
    socket: PathBuf,
}

impl ProviderProcesses {
    /// None of them runs yet.
    ///
    /// # Errors
    /// [`OsError`] when the working folder is needed for the socket's path and cannot be had.
    pub(crate) fn new(commands: Vec<ProviderCommand>, socket: &Path) -> Result<ProviderProcesses, OsError> {
        let socket = std::path::absolute(socket)
            .map_err(|e| OsError::new(format!("naming {} in full", socket.display()), e))?;
        let running = commands.iter().map(|_| None).collect();
        Ok(ProviderProcesses { commands, running, socket })
    }

    fn child(&mut self, child: u64) -> Option<&mut Option<SpawnedChild>> {
        self.running.get_mut(usize::try_from(child).ok()?)
    }

    /// SIGKILL, to the whole group that it leads. It is reaped when its pidfd says so.
    pub(crate) fn kill(&mut self, child: usize) {
        if let Some(Some(process)) = self.running.get_mut(child)
            && let Err(error) = process.kill()
        {
            warn!(pid = process.pid(), "a provider's process could not be killed: {error}");
        }
    }

    /// Kills one and waits for it.
    pub(crate) fn end_one(&mut self, child: u64) {
        if let Some(mut process) = self.child(child).and_then(Option::take)
            && let Err(error) = process.kill().and_then(|()| process.wait().map(drop))
        {
            warn!(pid = process.pid(), "a provider's process could not be ended: {error}");
        }
    }

    /// Kills all and waits for them.
    pub(crate) fn end(&mut self) {
        (0..self.running.len() as u64).for_each(|child| self.end_one(child));
    }
}

impl EventLoop {
    pub(crate) fn start_provider(&mut self, child: usize) {
        let event = match self.try_start_provider(child) {
            Ok(pid) => Event::ProviderStarted { child, pid },
            Err(error) => Event::ProviderNotStarted { child, message: error.to_string() },
        };
        self.events.push_back(event);
    }

    fn try_start_provider(&mut self, child: usize) -> Result<u32, StartError> {
        let Some(wanted) = self.providers.commands.get(child) else {
            let none = std::io::Error::other("there is no such provider");
            return Err(OsError::new("starting a provider", none).into());
        };
        let mut command = Command::new(&wanted.program);
        command.args(&wanted.args).stdin(Stdio::null()).stdout(Stdio::null());
        command.env(SOCKET_VARIABLE, &self.providers.socket).env(START_VARIABLE, START_NEVER);
        let limits = ChildLimits {
            parent_death_signal: true,
            new_session: true,
            no_core_dump: true,
            ..ChildLimits::default()
        };
        let mut process = spawn_limited(command, limits)?;
        let token = Token::ProviderPid(child as u64).pack();
        if let Err(error) = self.poller.add(process.pidfd(), token, Interest::READABLE) {
            let _ = process.kill();
            let _ = process.wait();
            return Err(error.into());
        }
        let pid = process.pid();
        if let Some(place) = self.providers.running.get_mut(child) {
            *place = Some(process);
        }
        Ok(pid)
    }

    /// A provider's process ended: the rest of its group is killed, it is reaped, and the core decides what comes next.
    pub(crate) fn provider_ended(&mut self, child: u64) {
        let Some(Some(process)) = self.providers.child(child) else { return };
        let _ = process.kill();
        let exit = match process.wait_nonblocking() {
            Ok(None) => return,
            Ok(Some(status)) => {
                status.signal().map_or(ChildExit::Status(status.code().unwrap_or(-1)), ChildExit::Signal)
            }
            Err(error) => {
                warn!(pid = process.pid(), "a provider's process could not be waited for: {error}");
                ChildExit::Status(-1)
            }
        };
        let _ = self.poller.remove(process.pidfd());
        if let Some(place) = self.providers.child(child) {
            *place = None;
        }
        if let Ok(child) = usize::try_from(child) {
            self.events.push_back(Event::ProviderExited { child, exit });
        }
    }
}
