//! Engine and loaders as processes: started with limits, spoken to over a socket pair, killed and reaped.

use super::event_loop::{EventLoop, Token};
use super::images::check_image;
use crate::core::{Attachment, ChildExit, Event};
use shm_layout::code::Code;
use shm_layout::wire::{Decode, FromEngine, FromLoader, ToEngine, decode_body};
use shm_os::framed::{Fill, Flush, FramedError, FramedStream};
use shm_os::process::{ChildLimits, ProcessError, SpawnedChild, spawn_limited};
use shm_os::{Interest, Poller, socket};
use std::collections::{HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use tracing::warn;

/// The number of the link's descriptor in a child.
const LINK_FD: i32 = 3;
/// How often a link is read after its process ended: everything that can lie in a socket's buffer, many times over.
const LAST_READS: usize = 64;
/// When a frame for the engine is tried again that found no free descriptor, in ns.
pub(crate) const RETRY_DESCRIPTORS_NS: u64 = 50_000_000;

/// How long a child that closed its link may take to end, in ns.
const EXIT_GRACE_NS: u64 = 100_000_000;

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
    #[error(transparent)]
    Framed(#[from] FramedError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Os(#[from] shm_os::OsError),
}

/// A child with its link.
pub(crate) struct Child {
    process: SpawnedChild,
    link: Option<FramedStream>,
    link_interest: Interest,
    link_token: u64,
    /// When it is killed if it has not ended by itself: set once it closed its link, as it does on its way out. Killed at
    /// once it could not say any more by its exit how it went.
    pub(crate) kill_at_ns: Option<u64>,
}

/// What reading a link gave.
pub(crate) enum LinkState {
    /// More may come.
    Open,
    /// The child closed it.
    Closed,
    /// It carries nonsense; the reason.
    Nonsense(String),
}

impl Child {
    pub(crate) fn start(
        poller: &Poller,
        argv: &[OsString],
        mut limits: ChildLimits,
        link_token: u64,
        pid_token: u64,
    ) -> Result<Child, StartError> {
        let (ours, theirs) = socket::socketpair()?;
        let link = FramedStream::new(ours)?;
        let mut command = Command::new(argv.first().map(OsString::as_os_str).unwrap_or(OsStr::new("")));
        command.args(argv.iter().skip(1)).stdin(Stdio::null()).stdout(Stdio::null());
        limits.inherit_fds = vec![(theirs, LINK_FD)];
        limits.parent_death_signal = true;
        limits.new_session = true;
        limits.no_core_dump = true;
        let process = spawn_limited(command, limits)?;
        let mut child = Child {
            process,
            link: Some(link),
            link_interest: Interest::READABLE,
            link_token,
            kill_at_ns: None,
        };
        let watched = poller.add(child.process.pidfd(), pid_token, Interest::READABLE).and_then(|()| {
            child.link.as_ref().map_or(Ok(()), |link| poller.add(link, link_token, Interest::READABLE))
        });
        if let Err(error) = watched {
            let _ = poller.remove(child.process.pidfd());
            child.kill();
            let _ = child.process.wait();
            return Err(error.into());
        }
        Ok(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL, to the whole group that it leads. It is reaped when its pidfd says so.
    pub(crate) fn kill(&mut self) {
        if let Err(error) = self.process.kill() {
            warn!(pid = self.process.pid(), "a child could not be killed: {error}");
        }
    }

    /// Closes the link.
    pub(crate) fn close_link(&mut self, poller: &Poller) {
        if let Some(link) = self.link.take() {
            let _ = poller.remove(&link);
        }
    }

    /// The exit of an ended child; `None` while it lives. The rest of its group is killed before.
    pub(crate) fn reap(&mut self, poller: &Poller) -> Option<ChildExit> {
        self.kill();
        match self.process.wait_nonblocking() {
            Ok(None) => None,
            Ok(Some(status)) => {
                let _ = poller.remove(self.process.pidfd());
                Some(
                    status.signal().map_or(ChildExit::Status(status.code().unwrap_or(-1)), ChildExit::Signal),
                )
            }
            Err(error) => {
                warn!(pid = self.process.pid(), "a child could not be waited for: {error}");
                let _ = poller.remove(self.process.pidfd());
                Some(ChildExit::Status(-1))
            }
        }
    }

    /// Kills and waits.
    pub(crate) fn end(&mut self) {
        self.kill();
        if let Err(error) = self.process.wait() {
            warn!(pid = self.process.pid(), "a child could not be waited for: {error}");
        }
    }

    /// Reads what is there; whole messages go to `take`, with the link for their descriptors. `take` says whether the
    /// link is to be read further.
    fn read<T: Decode<()>>(&mut self, mut take: impl FnMut(T, &mut FramedStream) -> bool) -> LinkState {
        let Some(link) = self.link.as_mut() else { return LinkState::Closed };
        let filled = link.fill();
        loop {
            match link.next_frame() {
                Ok(None) => break,
                Ok(Some((_, body))) => match decode_body::<T>(&body) {
                    Ok(message) => {
                        if !take(message, link) {
                            return LinkState::Open;
                        }
                    }
                    Err(error) => return LinkState::Nonsense(error.to_string()),
                },
                Err(error) => return LinkState::Nonsense(error.to_string()),
            }
        }
        match filled {
            Ok(Fill::Open) => LinkState::Open,
            Ok(Fill::Closed) => LinkState::Closed,
            Err(error) => LinkState::Nonsense(error.to_string()),
        }
    }
}

/// The engine and what is still to be said to it. Descriptors are copied only when a frame is about to be written, so
/// that handing over a thousand lanes takes two free descriptors, not two thousand.
#[derive(Default)]
pub(crate) struct EngineLink {
    pub(crate) child: Option<Child>,
    pub(crate) incarnation: u64,
    outbox: VecDeque<(ToEngine, Vec<Attachment>)>,
    /// Lanes whose hand-over was left out because they were closed before it was written.
    skipped: HashSet<u64>,
    /// Set once writing failed: nothing more is written to this incarnation.
    broken: bool,
    /// Set when no descriptor was free.
    pub(crate) retry_at_ns: Option<u64>,
}

impl EngineLink {
    pub(crate) fn say(&mut self, message: ToEngine, attachments: Vec<Attachment>) {
        if !self.broken && self.child.as_ref().is_some_and(|child| child.link.is_some()) {
            self.outbox.push_back((message, attachments));
        }
    }

    fn forget(&mut self) {
        self.outbox.clear();
        self.skipped.clear();
        self.retry_at_ns = None;
    }
}

impl EventLoop {
    pub(crate) fn start_engine(&mut self, incarnation: u64) {
        let mut argv = self.engine_command.clone();
        argv.extend(["--link-fd".into(), LINK_FD.to_string().into()]);
        let (link_token, pid_token) =
            (Token::EngineLink(incarnation).pack(), Token::EnginePid(incarnation).pack());
        self.engine.forget();
        self.engine.broken = false;
        match Child::start(&self.poller, &argv, ChildLimits::default(), link_token, pid_token) {
            Ok(child) => {
                let pid = child.pid();
                self.engine.incarnation = incarnation;
                self.engine.child = Some(child);
                self.events.push_back(Event::EngineStarted { incarnation, pid });
            }
            Err(error) => {
                self.events.push_back(Event::EngineNotStarted { incarnation, message: error.to_string() });
            }
        }
    }

    pub(crate) fn kill_engine(&mut self, incarnation: u64) {
        if self.engine.incarnation == incarnation
            && let Some(child) = self.engine.child.as_mut()
        {
            child.kill();
        }
    }

    pub(crate) fn engine_link_ready(&mut self, incarnation: u64) {
        if self.engine.incarnation != incarnation {
            return;
        }
        let Some(child) = self.engine.child.as_mut() else { return };
        let events = &mut self.events;
        let state = child.read::<FromEngine>(|message, _| {
            events.push_back(Event::Engine { incarnation, message });
            true
        });
        match state {
            LinkState::Open => return,
            LinkState::Closed => child.kill_at_ns = Some(self.now_ns.saturating_add(EXIT_GRACE_NS)),
            LinkState::Nonsense(why) => {
                let reason = format!("it speaks nonsense: {why}");
                self.events.push_back(Event::EngineLinkLost { incarnation, reason });
            }
        }
        child.close_link(&self.poller);
        self.engine.forget();
    }

    pub(crate) fn engine_ended(&mut self, incarnation: u64) {
        if self.engine.incarnation != incarnation {
            return;
        }
        // What it said before it died counts: answers that are there need no second engine.
        for _ in 0..LAST_READS {
            if self.engine.child.as_ref().is_none_or(|child| child.link.is_none()) {
                break;
            }
            self.engine_link_ready(incarnation);
        }
        let Some(child) = self.engine.child.as_mut() else { return };
        if let Some(exit) = child.reap(&self.poller) {
            child.close_link(&self.poller);
            self.engine.child = None;
            self.engine.forget();
            self.events.push_back(Event::EngineExited { incarnation, exit });
        }
    }

    /// Writes as much to the engine as it takes.
    pub(crate) fn pump_engine(&mut self, now_ns: u64) {
        let incarnation = self.engine.incarnation;
        while !self.engine.broken {
            let Some(child) = self.engine.child.as_mut() else { return };
            let Some(link) = child.link.as_mut() else { return };
            let blocked = match link.flush() {
                Ok(Flush::Done) => false,
                Ok(Flush::Blocked) => true,
                Err(error) => {
                    // What it said before is still read, at the latest when its process has ended.
                    if matches!(error, FramedError::Closed) {
                        child.kill_at_ns = Some(now_ns.saturating_add(EXIT_GRACE_NS));
                    } else {
                        let reason = format!("its link fails: {error}");
                        self.events.push_back(Event::EngineLinkLost { incarnation, reason });
                    }
                    self.engine.forget();
                    self.engine.broken = true;
                    return;
                }
            };
            let wanted = if blocked { Interest::READ_WRITE } else { Interest::READABLE };
            if wanted != child.link_interest && self.poller.modify(&*link, child.link_token, wanted).is_ok() {
                child.link_interest = wanted;
            }
            if blocked {
                return;
            }
            let Some((message, attachments)) = self.engine.outbox.pop_front() else { return };
            let fds = match self.descriptors(&attachments) {
                Some(Ok(fds)) => fds,
                Some(Err(error)) => {
                    warn!("no descriptor for the engine, trying again: {error}");
                    self.engine.outbox.push_front((message, attachments));
                    self.engine.retry_at_ns = Some(now_ns.saturating_add(RETRY_DESCRIPTORS_NS));
                    return;
                }
                None => {
                    // Closed since: its lane or generation ended before the engine was told of it.
                    if let ToEngine::AddLane { lane_id, .. } = message {
                        self.engine.skipped.insert(lane_id);
                    }
                    continue;
                }
            };
            self.engine.retry_at_ns = None;
            if let ToEngine::DropLane { lane_id } = message
                && self.engine.skipped.remove(&lane_id)
            {
                let message = FromEngine::LaneDropped { lane_id };
                self.events.push_back(Event::Engine { incarnation, message });
                continue;
            }
            let queued =
                self.engine.child.as_mut().and_then(|c| c.link.as_mut()).map(|l| l.queue(0, &message, fds));
            if let Some(Err(error)) = queued {
                let reason = format!("a message to it cannot be encoded: {error}");
                self.events.push_back(Event::EngineLinkLost { incarnation, reason });
                return;
            }
        }
    }

    /// Ends children that closed their link and live on.
    pub(crate) fn child_timers(&mut self) {
        let now_ns = self.now_ns;
        let due = |child: &mut Child| {
            let is_due = child.kill_at_ns.is_some_and(|at| at <= now_ns);
            if is_due {
                child.kill_at_ns = None;
            }
            is_due
        };
        for child in self.loaders.values_mut() {
            if due(child) {
                child.kill();
            }
        }
        if self.engine.child.as_mut().is_some_and(due) {
            let (incarnation, reason) =
                (self.engine.incarnation, "it closed its link and did not leave".to_owned());
            self.events.push_back(Event::EngineLinkLost { incarnation, reason });
        }
    }

    /// When [`EventLoop::child_timers`] has something to do.
    pub(crate) fn next_child_timer_ns(&self) -> Option<u64> {
        self.loaders.values().chain(&self.engine.child).filter_map(|child| child.kill_at_ns).min()
    }

    pub(crate) fn start_loader(&mut self, load_id: u64, model: &str) {
        let mut argv = self.loader_command.clone();
        argv.extend(["--link-fd".into(), LINK_FD.to_string().into()]);
        argv.extend(["--model".into(), model.into()]);
        argv.extend(["--backing".into(), self.backing.name().into()]);
        argv.extend(["--cache-dir".into(), self.cache_dir.clone().into_os_string()]);
        let limits = ChildLimits {
            address_space_bytes: Some(self.limits.loader_address_space_bytes),
            cpu_seconds: Some(self.limits.loader_cpu_seconds),
            ..ChildLimits::default()
        };
        let (link_token, pid_token) = (Token::LoaderLink(load_id).pack(), Token::LoaderPid(load_id).pack());
        match Child::start(&self.poller, &argv, limits, link_token, pid_token) {
            Ok(child) => {
                self.loaders.insert(load_id, child);
            }
            Err(error) => {
                self.events.push_back(Event::LoaderNotStarted { load_id, message: error.to_string() });
            }
        }
    }

    /// Kills a loader; it is reaped when its pidfd says so, and its link is not read any more.
    pub(crate) fn kill_loader(&mut self, load_id: u64) {
        self.offered_images.remove(&load_id);
        if let Some(child) = self.loaders.get_mut(&load_id) {
            child.close_link(&self.poller);
            child.kill();
        }
    }

    pub(crate) fn loader_link_ready(&mut self, load_id: u64) {
        let Some(child) = self.loaders.get_mut(&load_id) else { return };
        let (events, offered) = (&mut self.events, &mut self.offered_images);
        let state = child.read::<FromLoader>(|message, link| match message {
            FromLoader::Progress(progress) => {
                events.push_back(Event::LoaderProgress { load_id, progress });
                true
            }
            FromLoader::Loaded { model_id, image_bytes, backing, facts } => {
                let fd = link.take_descriptors(1).map(|mut fds| fds.pop());
                events.push_back(match taken(fd, model_id, image_bytes, backing, facts) {
                    Ok((fd, facts)) => {
                        offered.insert(load_id, fd);
                        Event::LoaderImage { load_id, facts }
                    }
                    Err(why) => {
                        let message = format!("what the loader handed over is no usable image: {why}");
                        Event::LoaderFailed { load_id, code: Code::ModelLoadError, message }
                    }
                });
                // It has nothing more to say.
                false
            }
            FromLoader::Failed { code, message } => {
                events.push_back(Event::LoaderFailed { load_id, code, message });
                false
            }
        });
        match state {
            LinkState::Open => {}
            // Its end says how it went.
            LinkState::Closed => {
                child.close_link(&self.poller);
                child.kill_at_ns = Some(self.now_ns.saturating_add(EXIT_GRACE_NS));
            }
            LinkState::Nonsense(why) => {
                child.close_link(&self.poller);
                child.kill();
                let message = format!("the loader speaks nonsense: {why}");
                self.events.push_back(Event::LoaderFailed { load_id, code: Code::ModelLoadError, message });
            }
        }
    }

    pub(crate) fn loader_ended(&mut self, load_id: u64) {
        for _ in 0..LAST_READS {
            if self.loaders.get(&load_id).is_none_or(|child| child.link.is_none()) {
                break;
            }
            self.loader_link_ready(load_id);
        }
        let Some(child) = self.loaders.get_mut(&load_id) else { return };
        if let Some(exit) = child.reap(&self.poller) {
            child.close_link(&self.poller);
            self.loaders.remove(&load_id);
            self.events.push_back(Event::LoaderExited { load_id, exit });
        }
    }
}

/// The image of a `Loaded` message, checked.
fn taken(
    fd: Result<Option<OwnedFd>, FramedError>,
    model_id: String,
    image_bytes: u64,
    backing: shm_layout::wire::BackingKind,
    facts: shm_layout::wire::TaskFacts,
) -> Result<(OwnedFd, crate::core::ImageFacts), String> {
    use std::os::fd::AsFd;
    let fd = fd.map_err(|e| e.to_string())?.ok_or("no descriptor came with it")?;
    let facts = check_image(fd.as_fd(), model_id, image_bytes, backing, facts).map_err(|e| e.to_string())?;
    Ok((fd, facts))
}
