//! Waiting for many descriptors at once: a thin safe face of epoll. What an event leads to must not be known here.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::OsError;

/// Most events that one [`Poller::wait`] gives; the rest comes with the next call.
pub const MAX_EVENTS_PER_WAIT: usize = 256;

/// What to wait for. Hang-ups and errors are always reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Report when there is something to read (or to accept).
    pub readable: bool,
    /// Report when there is room to write.
    pub writable: bool,
    /// Report changes only, not states: for doorbells, which are never read.
    pub edge_triggered: bool,
}

impl Interest {
    /// Readable, as a state.
    pub const READABLE: Interest = Interest { readable: true, writable: false, edge_triggered: false };
    /// Readable and writable, as states.
    pub const READ_WRITE: Interest = Interest { readable: true, writable: true, edge_triggered: false };
    /// A doorbell: one event a ring, nothing to read.
    pub const DOORBELL: Interest = Interest { readable: true, writable: false, edge_triggered: true };
    /// Only hang-ups and errors.
    pub const HANGUP_ONLY: Interest = Interest { readable: false, writable: false, edge_triggered: false };

    fn flags(self) -> EpollFlags {
        let mut flags = EpollFlags::EPOLLRDHUP;
        flags.set(EpollFlags::EPOLLIN, self.readable);
        flags.set(EpollFlags::EPOLLOUT, self.writable);
        flags.set(EpollFlags::EPOLLET, self.edge_triggered);
        flags
    }
}

/// What happened to one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollEvent {
    /// The number the descriptor was added with.
    pub token: u64,
    /// There is something to read, or the bell rang, or (pidfd) the process ended.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The peer is gone or will send nothing more; what it sent before can still be read.
    pub hangup: bool,
    /// The descriptor is in error.
    pub error: bool,
}

/// A set of descriptors to wait for. Safe to share: threads may add and remove while another waits.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// An empty set, close-on-exec.
    pub fn new() -> Result<Self, OsError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|e| OsError::new("making a poller (epoll)", e))?;
        Ok(Self { epoll })
    }

    /// Adds a descriptor under `token`. Remove it before closing it: copies of it elsewhere (a passed descriptor)
    /// would keep reporting.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<(), OsError> {
        self.epoll
            .add(fd, EpollEvent::new(interest.flags(), token))
            .map_err(|e| OsError::new("watching a descriptor", e))
    }

    /// Changes what a descriptor is watched for, or its token.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<(), OsError> {
        self.epoll
            .modify(fd, &mut EpollEvent::new(interest.flags(), token))
            .map_err(|e| OsError::new("changing what a descriptor is watched for", e))
    }

    /// Stops watching a descriptor.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), OsError> {
        self.epoll.delete(fd).map_err(|e| OsError::new("no longer watching a descriptor", e))
    }

    /// Waits until something happened or `timeout` is over (`None`: without end; rounded up to 1 ms, zero only
    /// looks). `events` is cleared and filled; it stays empty on a timeout or a signal. Gives the number of events.
    pub fn wait(&self, events: &mut Vec<PollEvent>, timeout: Option<Duration>) -> Result<usize, OsError> {
        let limit = timeout.map_or(EpollTimeout::NONE, |t| {
            let ms = t.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::MAX)
        });
        let mut raw = [EpollEvent::empty(); MAX_EVENTS_PER_WAIT];
        events.clear();
        match self.epoll.wait(&mut raw, limit) {
            Ok(count) => {
                events.extend(raw.iter().take(count).map(PollEvent::from_raw));
                Ok(count)
            }
            Err(nix::Error::EINTR) => Ok(0),
            Err(e) => Err(OsError::new("waiting for events", e)),
        }
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl PollEvent {
    fn from_raw(event: &EpollEvent) -> Self {
        let flags = event.events();
        Self {
            token: event.data(),
            readable: flags.contains(EpollFlags::EPOLLIN),
            writable: flags.contains(EpollFlags::EPOLLOUT),
            hangup: flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP),
            error: flags.contains(EpollFlags::EPOLLERR),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Doorbell;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn look(poller: &Poller) -> Vec<PollEvent> {
        let mut events = Vec::new();
        poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
        events
    }

    #[test]
    fn each_ring_is_one_event_without_reading() {
        let (poller, bell) = (Poller::new().unwrap(), Doorbell::new().unwrap());
        poller.add(&bell, 5, Interest::DOORBELL).unwrap();
        assert_eq!(look(&poller), []);
        for _ in 0..3 {
            bell.ring().unwrap();
            let events = look(&poller);
            assert_eq!(events.len(), 1);
            assert!(events[0].token == 5 && events[0].readable && !events[0].hangup);
            assert_eq!(look(&poller), []);
        }
        poller.remove(&bell).unwrap();
        bell.ring().unwrap();
        assert_eq!(look(&poller), []);
    }

    #[test]
    fn hangups_and_data_are_told_apart() {
        let poller = Poller::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        poller.add(&ours, 1, Interest::READABLE).unwrap();
        theirs.write_all(b"x").unwrap();
        let event = look(&poller)[0];
        assert!(event.readable && !event.hangup && !event.writable);
        drop(theirs);
        assert!(look(&poller)[0].hangup);
        poller.modify(&ours, 2, Interest::READ_WRITE).unwrap();
        assert_eq!(look(&poller)[0].token, 2);
    }

    #[test]
    fn a_wait_ends_with_its_time_or_with_a_ring_from_another_thread() {
        let (poller, bell) = (Poller::new().unwrap(), Doorbell::new().unwrap());
        poller.add(&bell, 9, Interest::DOORBELL).unwrap();
        let mut events = Vec::new();
        assert_eq!(poller.wait(&mut events, Some(Duration::from_micros(10))).unwrap(), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring().unwrap());
            while poller.wait(&mut events, None).unwrap() == 0 {}
        });
        assert_eq!(events[0].token, 9);
    }
}
