//! One client's connection: its stream, its process, and what of it is timed.

use shm_os::Interest;
use shm_os::framed::FramedStream;
use std::os::fd::OwnedFd;

/// A connection.
pub(crate) struct Connection {
    pub(crate) stream: FramedStream,
    /// Readable when the client's process ends, even while another process holds its socket.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Set once the connection only lives until what is queued is written, or until then.
    pub(crate) closing_until_ns: Option<u64>,
    /// Since when a frame has been incomplete.
    pub(crate) half_frame_since_ns: Option<u64>,
    /// Since when the client, over its outgoing bound, has taken nothing; and what was queued then.
    pub(crate) stalled: Option<(u64, usize)>,
    /// What the poller watches it for.
    pub(crate) interest: Interest,
}

/// What a connection's timers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timed {
    /// Nothing is due; the next instant at which something may be.
    Not(Option<u64>),
    /// A frame was begun and not completed in time.
    HalfFrame,
    /// The client does not read.
    Stalled,
    /// It had its time to read why it was refused.
    Lingered,
}

/// The bounds that a connection's timers need, in ns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionBounds {
    pub(crate) half_frame_ns: u64,
    pub(crate) stall_ns: u64,
    pub(crate) outgoing_bytes: usize,
}

impl Connection {
    pub(crate) fn new(stream: FramedStream, pidfd: Option<OwnedFd>) -> Connection {
        Connection {
            stream,
            pidfd,
            closing_until_ns: None,
            half_frame_since_ns: None,
            stalled: None,
            interest: Interest::READABLE,
        }
    }

    /// Whether frames are taken from it now. Not while it is being closed, nor while it leaves its answers unread.
    pub(crate) fn takes_input(&self) -> bool {
        self.closing_until_ns.is_none() && self.stalled.is_none()
    }

    /// Notes how much is queued; a client over the bound is stalled from the moment it last took something.
    pub(crate) fn note_queue(&mut self, now_ns: u64, bounds: ConnectionBounds) {
        let queued = self.stream.queued_bytes();
        self.stalled = match self.stalled {
            _ if queued <= bounds.outgoing_bytes => None,
            Some((since_ns, before)) if queued >= before => Some((since_ns, before)),
            _ => Some((now_ns, queued)),
        };
    }

    /// What the poller should watch for now.
    pub(crate) fn wanted_interest(&self, blocked: bool) -> Interest {
        Interest { readable: self.takes_input(), writable: blocked, edge_triggered: false }
    }

    /// Whether any timer runs.
    pub(crate) fn timed(&self, now_ns: u64, bounds: ConnectionBounds) -> Timed {
        if let Some(until_ns) = self.closing_until_ns {
            return if until_ns <= now_ns { Timed::Lingered } else { Timed::Not(Some(until_ns)) };
        }
        let half_ns = self.half_frame_since_ns.map(|since| since.saturating_add(bounds.half_frame_ns));
        if half_ns.is_some_and(|due| due <= now_ns) {
            return Timed::HalfFrame;
        }
        let stall_ns = self.stalled.map(|(since, _)| since.saturating_add(bounds.stall_ns));
        if stall_ns.is_some_and(|due| due <= now_ns) {
            return Timed::Stalled;
        }
        Timed::Not([half_ns, stall_ns].into_iter().flatten().min())
    }
}
