//! The link to the broker: frames in, one reader at a time; frames out, from any thread, without waiting. What the
//! messages lead to is not known here.

use shm_layout::wire::{FromEngine, ToEngine, decode_body};
use shm_os::framed::{Fill, Flush, FramedError, FramedStream};
use shm_os::{Interest, OsError, PollEvent, Poller};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Readable and writable, edge-triggered: while frames wait for room in the socket.
const EDGE_READ_WRITE: Interest = Interest { readable: true, writable: true, edge_triggered: true };
/// Readable, edge-triggered: two threads wait for the same events, and one is to wake for each.
const EDGE_READ: Interest = Interest { readable: true, writable: false, edge_triggered: true };

/// Why the link is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The broker is gone.
    #[error("the broker closed the link")]
    Closed,
    /// What came is not what a broker of this version sends.
    #[error(transparent)]
    Framed(#[from] FramedError),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// The engine's end of the link.
#[derive(Debug)]
pub(crate) struct Link {
    stream: Mutex<FramedStream>,
    // Held by the thread that reads: frames are handled in their order. Never taken while `stream` is held.
    turn: Mutex<()>,
    // Says whether something is left to be read: edges do not tell.
    level: Poller,
    poller: Arc<Poller>,
    token: u64,
    waits_for_room: AtomicBool,
    // The first failure of a send; taken up by the next reader.
    failed: Mutex<Option<LinkError>>,
}

impl Link {
    /// Takes the descriptor and watches it under `token`.
    pub(crate) fn new(fd: OwnedFd, poller: Arc<Poller>, token: u64) -> Result<Link, LinkError> {
        let stream = FramedStream::new(fd)?;
        let level = Poller::new()?;
        level.add(&stream, 0, Interest::READABLE)?;
        poller.add(&stream, token, EDGE_READ)?;
        Ok(Link {
            stream: Mutex::new(stream),
            turn: Mutex::new(()),
            level,
            poller,
            token,
            waits_for_room: AtomicBool::new(false),
            failed: Mutex::new(None),
        })
    }

    fn stream(&self) -> MutexGuard<'_, FramedStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until nothing is left and hands each message with its descriptors to `handle`, in order.
    ///
    /// # Errors
    /// [`LinkError::Closed`] once the broker has closed and everything it sent before is handled.
    pub(crate) fn read(&self, mut handle: impl FnMut(ToEngine, Vec<OwnedFd>)) -> Result<(), LinkError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events: Vec<PollEvent> = Vec::new();
        loop {
            if let Some(error) = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Err(error);
            }
            let state = self.stream().fill()?;
            loop {
                // The lock is not held while a message is handled: loading a model takes milliseconds.
                let mut stream = self.stream();
                let Some((_, body)) = stream.next_frame()? else { break };
                let message: ToEngine = decode_body(&body).map_err(FramedError::from)?;
                let fds = stream.take_descriptors(descriptors_of(&message))?;
                drop(stream);
                handle(message, fds);
            }
            if state == Fill::Closed {
                return Err(LinkError::Closed);
            }
            if self.level.wait(&mut events, Some(Duration::ZERO))? == 0 {
                return Ok(());
            }
        }
    }

    /// Sends a message, or queues it where the socket is full. A failure shows at the next read.
    pub(crate) fn send(&self, message: &FromEngine) {
        let mut stream = self.stream();
        let outcome = stream.queue(0, message, Vec::new()).map_err(LinkError::from);
        let outcome = outcome.and_then(|()| self.flush_locked(&mut stream));
        drop(stream);
        self.note(outcome);
    }

    /// Bytes that wait for room in the socket.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.stream().queued_bytes()
    }

    /// The socket may have room again.
    pub(crate) fn on_writable(&self) {
        let outcome = self.flush_locked(&mut self.stream());
        self.note(outcome);
    }

    fn note(&self, outcome: Result<(), LinkError>) {
        if let Err(error) = outcome {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    fn flush_locked(&self, stream: &mut FramedStream) -> Result<(), LinkError> {
        let blocked = stream.flush()? == Flush::Blocked;
        // Under the stream's lock, so that two threads cannot exchange the order of their changes.
        if blocked != self.waits_for_room.swap(blocked, Ordering::Relaxed) {
            self.poller.modify(&*stream, self.token, if blocked { EDGE_READ_WRITE } else { EDGE_READ })?;
        }
        Ok(())
    }

    /// Waits until everything queued is out, for at most `timeout`; false when it is not.
    pub(crate) fn finish(&self, timeout: Duration) -> Result<bool, LinkError> {
        let until = Instant::now() + timeout;
        let room = Poller::new()?;
        let writable = Interest { readable: false, writable: true, edge_triggered: false };
        room.add(&*self.stream(), 0, writable)?;
        let mut events = Vec::new();
        while self.stream().flush()? == Flush::Blocked {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            room.wait(&mut events, Some(left))?;
        }
        Ok(true)
    }
}

/// Descriptors that travel with a message.
fn descriptors_of(message: &ToEngine) -> usize {
    match message {
        ToEngine::LoadModel { cache, .. } => 1 + usize::from(cache.is_some()),
        ToEngine::AddLane { .. } => 2,
        _ => 0,
    }
}

/// A message that is sent when this value is dropped, if it was asked for: the last field of what it reports the end of.
#[derive(Debug)]
pub(crate) struct Farewell {
    link: Arc<Link>,
    message: FromEngine,
    announced: AtomicBool,
}

impl Farewell {
    /// Nothing is sent until [`Farewell::announce`] was called.
    pub(crate) fn new(link: &Arc<Link>, message: FromEngine) -> Farewell {
        Farewell { link: Arc::clone(link), message, announced: AtomicBool::new(false) }
    }

    /// Send the message at the end.
    pub(crate) fn announce(&self) {
        self.announced.store(true, Ordering::Relaxed);
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if *self.announced.get_mut() {
            self.link.send(&self.message);
        }
    }
}
