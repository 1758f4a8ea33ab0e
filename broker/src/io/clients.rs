//! Clients' connections: accepting, reading, writing, closing. Every client gets its turn, and what one does or leaves
//! undone is felt by that one alone.

use super::connection::{Connection, Timed};
use super::event_loop::{EventLoop, Token};
use crate::core::Event;
use shm_layout::code::Code;
use shm_layout::wire::{AnswerFrame, BrokerMessage, ClientMessage, Refusal, decode_body};
use shm_os::framed::{Fill, Flush, FramedStream};
use shm_os::socket::{self, SocketError};
use shm_os::{Interest, OsError};
use std::fs::File;
use std::os::fd::OwnedFd;
use tracing::{debug, warn};

/// Most connections accepted before the others get their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Connections that may linger, refused, beside the sessions.
const MAX_LINGERING: usize = 256;
/// When a client that found no descriptor may come back, in ms.
const RETRY_DESCRIPTORS_MS: u32 = 1000;

/// A descriptor held back, so that at the limit a client can still be told so.
pub(crate) fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

impl EventLoop {
    pub(crate) fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok(Some(connection)) => self.admit(connection),
                Ok(None) => return,
                Err(error) if error.is_descriptor_limit() => {
                    self.refuse_at_descriptor_limit(&error);
                    return;
                }
                Err(error) => {
                    warn!("a connection could not be accepted: {error}");
                    return;
                }
            }
        }
    }

    /// With the descriptor held back, takes one connection to tell it why it cannot stay; when even that fails, accepts
    /// nothing until something is closed.
    fn refuse_at_descriptor_limit(&mut self, error: &SocketError) {
        warn!("out of descriptors, refusing connections: {error}");
        self.reserve = None;
        if let Ok(Some(connection)) = self.listener.accept() {
            refuse_and_drop(
                connection.into(),
                "the broker is out of descriptors; close sessions, or raise `ulimit -n`",
            );
        }
        self.reserve = reserve();
        if self.reserve.is_none() {
            self.set_accepting(false);
        }
    }

    /// Watches the listener, or stops watching it.
    pub(crate) fn set_accepting(&mut self, accepting: bool) {
        if self.accepting == accepting {
            return;
        }
        let changed = if accepting {
            self.poller.add(&self.listener, Token::Listener.pack(), Interest::READABLE)
        } else {
            self.poller.remove(&self.listener)
        };
        match changed {
            Ok(()) => self.accepting = accepting,
            Err(error) => warn!("the listener could not be switched: {error}"),
        }
    }

    /// A descriptor was closed: there may be room again.
    pub(crate) fn descriptor_freed(&mut self) {
        if !self.accepting {
            if self.reserve.is_none() {
                self.reserve = reserve();
            }
            if self.reserve.is_some() {
                self.set_accepting(true);
            }
        }
    }

    fn admit(&mut self, connection: socket::Connection) {
        let peer = match connection.peer_credentials() {
            Ok(peer) => peer,
            Err(error) => {
                debug!("a connection without credentials: {error}");
                return;
            }
        };
        let full = self.connections.len() >= self.limits.max_sessions.saturating_add(MAX_LINGERING);
        let pidfd = match connection.peer_pidfd() {
            Ok(pidfd) if !full => pidfd,
            Ok(_) => {
                refuse_and_drop(connection.into(), "too many connections; close some first");
                return;
            }
            Err(error) => {
                debug!("a connection whose process cannot be watched: {error}");
                refuse_and_drop(
                    connection.into(),
                    "the broker is out of descriptors; close sessions, or raise `ulimit -n`",
                );
                return;
            }
        };
        self.last_session += 1;
        let session = self.last_session;
        let Ok(stream) = FramedStream::new(connection.into()) else { return };
        let watched =
            self.poller.add(&stream, Token::Client(session).pack(), Interest::READABLE).and_then(|()| {
                pidfd.as_ref().map_or(Ok(()), |fd| {
                    self.poller.add(fd, Token::ClientPid(session).pack(), Interest::READABLE)
                })
            });
        if let Err(error) = watched {
            warn!("a connection could not be watched: {error}");
            return;
        }
        self.connections.insert(session, Connection::new(stream, pidfd));
        let pid = u32::try_from(peer.pid).unwrap_or(0);
        self.events.push_back(Event::Connected { session, pid, uid: peer.uid });
    }

    /// Reads what a client sent, and handles at most one turn's worth of frames.
    pub(crate) fn client_ready(&mut self, session: u64, hangup: bool) {
        let Some(connection) = self.connections.get_mut(&session) else { return };
        if !connection.takes_input() {
            if hangup {
                self.client_gone(session);
            }
            return;
        }
        // Frames that wait for their turn come first: what is read is bounded by what is handled.
        if self.more_frames.contains(&session) {
            return;
        }
        match connection.stream.fill() {
            Ok(Fill::Open) => {
                self.take_frames(session);
            }
            Ok(Fill::Closed) => {
                // What it said last is still heard, one turn's worth.
                self.take_frames(session);
                self.run_events();
                self.client_gone(session);
            }
            Err(error) => self.client_fault(session, error.to_string()),
        }
    }

    /// Handles frames that are there, until the turn is over.
    pub(crate) fn take_frames(&mut self, session: u64) {
        for _ in 0..self.limits.frames_per_turn {
            let Some(connection) = self.connections.get_mut(&session) else { return };
            if !connection.takes_input() {
                return;
            }
            if connection.stream.pending_descriptors() > 0 {
                self.client_fault(session, "clients must not send descriptors".into());
                return;
            }
            match connection.stream.next_frame() {
                Ok(Some((head, body))) => {
                    connection.half_frame_since_ns = None;
                    match decode_body::<ClientMessage>(&body) {
                        Ok(message) => {
                            let request_id = head.request_id;
                            self.events.push_back(Event::Client { session, request_id, message });
                            self.run_events();
                        }
                        Err(error) => {
                            self.client_fault(session, error.to_string());
                            return;
                        }
                    }
                }
                Ok(None) => {
                    if connection.stream.has_partial_frame() {
                        connection.half_frame_since_ns.get_or_insert(self.now_ns);
                        self.timed.insert(session);
                    }
                    return;
                }
                Err(error) => {
                    self.client_fault(session, error.to_string());
                    return;
                }
            }
        }
        self.more_frames.insert(session);
    }

    fn client_fault(&mut self, session: u64, message: String) {
        self.events.push_back(Event::ClientFault { session, code: Code::BadFrame, message });
    }

    /// Forgets a connection and tells the core.
    pub(crate) fn client_gone(&mut self, session: u64) {
        if self.drop_connection(session) {
            self.events.push_back(Event::ClientGone { session });
        }
    }

    /// Closes a connection's descriptors; whether it was one that the core still knew.
    pub(crate) fn drop_connection(&mut self, session: u64) -> bool {
        let Some(connection) = self.connections.remove(&session) else { return false };
        let _ = self.poller.remove(&connection.stream);
        if let Some(pidfd) = &connection.pidfd {
            let _ = self.poller.remove(pidfd);
        }
        self.timed.remove(&session);
        let was_known = connection.closing_until_ns.is_none();
        drop(connection);
        self.descriptor_freed();
        was_known
    }

    /// Queues a frame for a client.
    pub(crate) fn send_client(
        &mut self,
        session: u64,
        request_id: u64,
        message: &BrokerMessage,
        fds: Vec<OwnedFd>,
    ) {
        let Some(connection) = self.connections.get_mut(&session) else { return };
        if let Err(error) = connection.stream.queue(request_id, message, fds) {
            // Only what is over a frame's limit; whoever asked gets an answer all the same.
            warn!(session, "an answer could not be encoded: {error}");
            let code = Code::TooLarge;
            let text = "the answer does not fit into a frame; ask for less at a time".to_owned();
            let instead = match message {
                BrokerMessage::Answer(answer) => BrokerMessage::Answer(AnswerFrame {
                    status: code,
                    payload: text.into_bytes(),
                    ..answer.clone()
                }),
                _ => BrokerMessage::Refused(Refusal { code, message: text, retry_after_ms: 0 }),
            };
            let _ = connection.stream.queue(request_id, &instead, Vec::new());
        }
        self.dirty.insert(session);
    }

    /// Writes to every client that has something queued as much as it takes.
    pub(crate) fn flush_clients(&mut self) {
        for session in std::mem::take(&mut self.dirty) {
            self.flush_client(session);
        }
    }

    pub(crate) fn flush_client(&mut self, session: u64) {
        let Some(connection) = self.connections.get_mut(&session) else { return };
        let blocked = match connection.stream.flush() {
            Ok(Flush::Done) => false,
            Ok(Flush::Blocked) => true,
            Err(_) => {
                self.client_gone(session);
                return;
            }
        };
        if !blocked && connection.closing_until_ns.is_some() {
            self.drop_connection(session);
            return;
        }
        let could = connection.takes_input();
        connection.note_queue(self.now_ns, self.bounds);
        if connection.stalled.is_some() || connection.closing_until_ns.is_some() {
            self.timed.insert(session);
        }
        if !could && connection.takes_input() {
            // Frames that arrived before the pause lie in the buffer; no event tells of them.
            self.more_frames.insert(session);
        }
        let wanted = connection.wanted_interest(blocked);
        if wanted != connection.interest {
            match self.poller.modify(&connection.stream, Token::Client(session).pack(), wanted) {
                Ok(()) => connection.interest = wanted,
                Err(error) => {
                    log_unwatchable(session, &error);
                    self.client_gone(session);
                }
            }
        }
    }

    /// Lets a connection live only until what is queued is written.
    pub(crate) fn close_client(&mut self, session: u64) {
        let until_ns = self.now_ns.saturating_add(crate::core::nanos(self.limits.close_linger));
        if let Some(connection) = self.connections.get_mut(&session) {
            connection.closing_until_ns = Some(until_ns);
            self.dirty.insert(session);
        }
    }

    /// Acts on connections' timers; gives the next instant at which one may be due.
    pub(crate) fn connection_timers(&mut self) -> Option<u64> {
        let mut next: Option<u64> = None;
        for session in self.timed.iter().copied().collect::<Vec<_>>() {
            let state = self.connections.get(&session).map(|c| c.timed(self.now_ns, self.bounds));
            match state {
                None | Some(Timed::Not(None)) => {
                    self.timed.remove(&session);
                }
                Some(Timed::Not(Some(due))) => next = Some(next.map_or(due, |n| n.min(due))),
                Some(Timed::HalfFrame) => {
                    if let Some(connection) = self.connections.get_mut(&session) {
                        connection.half_frame_since_ns = None;
                    }
                    let seconds = self.limits.half_frame_timeout.as_secs_f32();
                    self.client_fault(
                        session,
                        format!("a frame was begun and not completed within {seconds} s"),
                    );
                }
                Some(Timed::Stalled) => {
                    warn!(session, "a client does not read its answers; its connection is closed");
                    self.client_gone(session);
                }
                Some(Timed::Lingered) => {
                    self.drop_connection(session);
                }
            }
        }
        next
    }
}

fn log_unwatchable(session: u64, error: &OsError) {
    warn!(session, "a connection can no longer be watched: {error}");
}

/// Tells a connection that was never admitted why, as far as it takes it at once, and closes it.
fn refuse_and_drop(fd: OwnedFd, message: &str) {
    let Ok(mut stream) = FramedStream::new(fd) else { return };
    let refusal =
        Refusal { code: Code::TooMany, message: message.to_owned(), retry_after_ms: RETRY_DESCRIPTORS_MS };
    if stream.queue(0, &BrokerMessage::Refused(refusal), Vec::new()).is_ok() {
        let _ = stream.flush();
    }
}
