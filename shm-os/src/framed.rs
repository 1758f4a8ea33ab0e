//! Frames and descriptors over a Unix stream socket, for an event loop and for blocking callers alike. What the frames
//! mean must not be known here: messages are `shm-layout`'s.

use crate::OsError;
use crate::socket::{self, SocketError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use shm_layout::limits::MAX_FRAME_DESCRIPTORS;
use shm_layout::wire::{CodecError, FrameBuffer, FrameHead, HeadError, decode_body, encode_frame};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Most bytes taken from the socket in one [`FramedStream::fill`], so that one busy peer does not hold up the others.
const MAX_FILL_BYTES: usize = 256 * 1024;
/// Bytes asked for in one system call.
const READ_BYTES: usize = 32 * 1024;
/// Most descriptors that may have arrived without the frame that explains them.
const MAX_PENDING_DESCRIPTORS: usize = 4 * MAX_FRAME_DESCRIPTORS;

/// Why a frame was not sent or received. All but [`FramedError::TimedOut`] end the connection.
#[derive(Debug, thiserror::Error)]
pub enum FramedError {
    /// The peer has closed its end, or is dead.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer did not take the frame in time.
    #[error("the peer did not read for {0:?}")]
    TimedOut(Duration),
    /// The bytes are not frames.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A frame's body is not the message that was expected.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Fewer descriptors came than the frame needs, or more than any frame explains.
    #[error("{found} descriptors came with a frame that needs {needed}")]
    Descriptors {
        /// How many the frame needs.
        needed: usize,
        /// How many there are.
        found: usize,
    },
    /// The socket failed.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Another system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Whether the peer may still send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// The connection stands; what was there has been read, or `MAX_FILL_BYTES` of it.
    Open,
    /// The peer will send nothing more. Whole frames may still wait in [`FramedStream::next_frame`].
    Closed,
}

/// Whether everything is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Nothing is left to be sent.
    Done,
    /// The socket takes no more for now: wait until it is writable.
    Blocked,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Travel with the first byte; closed here once that is out.
    fds: Vec<OwnedFd>,
}

/// A stream of frames. The socket is non-blocking; the blocking calls wait by `poll`.
#[derive(Debug)]
pub struct FramedStream {
    fd: OwnedFd,
    input: FrameBuffer,
    closed: bool,
    descriptors: VecDeque<OwnedFd>,
    output: VecDeque<Outgoing>,
    queued_bytes: usize,
}

impl FramedStream {
    /// Takes a connected stream socket and makes it non-blocking.
    ///
    /// # Errors
    /// When the descriptor's flags cannot be changed.
    pub fn new(fd: OwnedFd) -> Result<FramedStream, FramedError> {
        socket::set_nonblocking(fd.as_fd(), true)?;
        Ok(FramedStream {
            fd,
            input: FrameBuffer::new(),
            closed: false,
            descriptors: VecDeque::new(),
            output: VecDeque::new(),
            queued_bytes: 0,
        })
    }

    /// Reads what is there, at most `MAX_FILL_BYTES`.
    ///
    /// # Errors
    /// When the socket fails, or more descriptors came than any frames explain.
    pub fn fill(&mut self) -> Result<Fill, FramedError> {
        let mut chunk = [0; READ_BYTES];
        let mut taken = 0;
        while taken < MAX_FILL_BYTES && !self.closed {
            // Frames with descriptors are taken in portions, the rest waits in the socket: a peer that hands over many
            // objects in a row is no faulty one.
            if taken > 0 && self.descriptors.len() > MAX_PENDING_DESCRIPTORS - MAX_FRAME_DESCRIPTORS {
                break;
            }
            let mut fds = Vec::new();
            match socket::recv_with_fds(self.fd.as_fd(), &mut chunk, &mut fds, MAX_FRAME_DESCRIPTORS) {
                Ok(0) => self.closed = true,
                Ok(count) => {
                    self.input.extend(&chunk[..count]);
                    taken += count;
                }
                Err(error) if error.is_would_block() => break,
                Err(error) if error.is_disconnect() => self.closed = true,
                Err(error) => return Err(error.into()),
            }
            self.descriptors.extend(fds);
            if self.descriptors.len() > MAX_PENDING_DESCRIPTORS {
                return Err(FramedError::Descriptors { needed: 0, found: self.descriptors.len() });
            }
        }
        Ok(if self.closed { Fill::Closed } else { Fill::Open })
    }

    /// The next whole frame that has arrived.
    ///
    /// # Errors
    /// [`FramedError::Head`] when what arrived is not a frame.
    pub fn next_frame(&mut self) -> Result<Option<(FrameHead, Vec<u8>)>, FramedError> {
        Ok(self.input.next_frame()?)
    }

    /// The descriptors of the frame that was just taken, in the order in which they were sent.
    ///
    /// # Errors
    /// [`FramedError::Descriptors`] when fewer arrived.
    pub fn take_descriptors(&mut self, count: usize) -> Result<Vec<OwnedFd>, FramedError> {
        if self.descriptors.len() < count {
            return Err(FramedError::Descriptors { needed: count, found: self.descriptors.len() });
        }
        Ok(self.descriptors.drain(..count).collect())
    }

    /// Descriptors that arrived and were not taken.
    #[must_use]
    pub fn pending_descriptors(&self) -> usize {
        self.descriptors.len()
    }

    /// Whether part of a frame has arrived and the rest has not.
    #[must_use]
    pub fn has_partial_frame(&self) -> bool {
        self.input.has_partial_frame()
    }

    /// Puts a frame into the outgoing queue. The caller bounds the queue by [`FramedStream::queued_bytes`].
    ///
    /// # Errors
    /// [`FramedError::Codec`] when the message does not fit a frame.
    pub fn queue<T: shm_layout::wire::Encode>(
        &mut self,
        request_id: u64,
        message: &T,
        fds: Vec<OwnedFd>,
    ) -> Result<(), FramedError> {
        let bytes = encode_frame(request_id, message)?;
        self.queued_bytes += bytes.len();
        self.output.push_back(Outgoing { bytes, sent: 0, fds });
        Ok(())
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// [`FramedError::Closed`] when the peer is gone.
    pub fn flush(&mut self) -> Result<Flush, FramedError> {
        while let Some(front) = self.output.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = front.fds.iter().map(AsFd::as_fd).collect();
            match socket::send_with_fds(self.fd.as_fd(), &front.bytes[front.sent..], &fds) {
                Ok(count) => {
                    drop(fds);
                    if count > 0 {
                        front.fds.clear();
                    }
                    front.sent += count;
                    self.queued_bytes -= count;
                    if front.sent == front.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(error) if error.is_would_block() => return Ok(Flush::Blocked),
                Err(error) if error.is_disconnect() => return Err(FramedError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Flush::Done)
    }

    /// Bytes queued and not yet taken by the socket.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Sends one frame, waiting until the socket has taken all of it.
    ///
    /// # Errors
    /// [`FramedError::TimedOut`] when the peer did not read in time (part of the frame may be out: close then),
    /// [`FramedError::Closed`] when it is gone.
    pub fn send<T: shm_layout::wire::Encode>(
        &mut self,
        request_id: u64,
        message: &T,
        fds: Vec<OwnedFd>,
        timeout: Duration,
    ) -> Result<(), FramedError> {
        self.queue(request_id, message, fds)?;
        let until = Instant::now().checked_add(timeout);
        while self.flush()? == Flush::Blocked {
            if !self.poll(PollFlags::POLLOUT, until)? {
                return Err(FramedError::TimedOut(timeout));
            }
        }
        Ok(())
    }

    /// Waits for one frame and decodes it; `None` when none came in time.
    ///
    /// # Errors
    /// [`FramedError::Closed`] when the peer is gone and all its frames are taken.
    pub fn receive<T: shm_layout::wire::Decode<()>>(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<(u64, T)>, FramedError> {
        let until = Instant::now().checked_add(timeout);
        loop {
            if let Some((head, body)) = self.next_frame()? {
                return Ok(Some((head.request_id, decode_body(&body)?)));
            }
            if self.closed {
                return Err(FramedError::Closed);
            }
            if !self.poll(PollFlags::POLLIN, until)? {
                return Ok(None);
            }
            self.fill()?;
        }
    }

    /// Waits until the socket is ready; false when the time ran out. `None` = a time too far off to name: no limit.
    fn poll(&self, flags: PollFlags, until: Option<Instant>) -> Result<bool, OsError> {
        loop {
            let timeout = until.map_or(PollTimeout::NONE, |until| {
                let left = until.saturating_duration_since(Instant::now());
                // Rounded up, so that the last millisecond is waited for and not spun through.
                PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [PollFd::new(self.fd.as_fd(), flags)];
            match poll(&mut fds, timeout) {
                Ok(0) if until.is_some_and(|until| Instant::now() >= until) => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(OsError::new("waiting for a socket", errno)),
            }
        }
    }
}

impl AsFd for FramedStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::wire::{ClientMessage, FromLoader, LoadProgress};

    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (FramedStream, FramedStream) {
        let (a, b) = socket::socketpair().unwrap();
        (FramedStream::new(a).unwrap(), FramedStream::new(b).unwrap())
    }

    #[test]
    fn frames_and_descriptors_arrive_in_order() {
        let (mut a, mut b) = pair();
        let doorbell = crate::Doorbell::new().unwrap();
        let fd = doorbell.as_fd().try_clone_to_owned().unwrap();
        a.send(1, &ClientMessage::Ping, vec![], LONG).unwrap();
        a.send(2, &ClientMessage::Status, vec![fd], LONG).unwrap();
        a.send(3, &ClientMessage::Ping, vec![], LONG).unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let (id, message) = b.receive::<ClientMessage>(LONG).unwrap().unwrap();
            if message == ClientMessage::Status {
                assert_eq!(b.take_descriptors(1).unwrap().len(), 1);
            }
            seen.push(id);
        }
        assert_eq!(seen, [1, 2, 3]);
        assert_eq!(b.pending_descriptors(), 0);
        drop(a);
        assert!(matches!(b.receive::<ClientMessage>(LONG), Err(FramedError::Closed)));
    }

    #[test]
    fn many_frames_with_descriptors_in_a_row_are_taken_in_portions() {
        let (mut a, mut b) = pair();
        let doorbell = crate::Doorbell::new().unwrap();
        for id in 0..40 {
            let fds = (0..2).map(|_| doorbell.as_fd().try_clone_to_owned().unwrap()).collect();
            a.send(id, &ClientMessage::Ping, fds, LONG).unwrap();
        }
        for id in 0..40 {
            assert_eq!(b.receive::<ClientMessage>(LONG).unwrap(), Some((id, ClientMessage::Ping)));
            assert_eq!(b.take_descriptors(2).unwrap().len(), 2);
        }
        for id in 0..40 {
            let fd = doorbell.as_fd().try_clone_to_owned().unwrap();
            a.send(id, &ClientMessage::Ping, vec![fd], LONG).unwrap();
        }
        // Whoever never takes them is told so, and holds few.
        let outcome = (0..40).find_map(|_| b.fill().err());
        assert!(matches!(outcome, Some(FramedError::Descriptors { .. })));
    }

    #[test]
    fn large_frames_pass_while_the_peer_reads() {
        let (mut a, mut b) = pair();
        let big = FromLoader::Failed { code: shm_layout::code::Code::Internal, message: "x".repeat(900_000) };
        let expected = big.clone();
        let reader = std::thread::spawn(move || b.receive::<FromLoader>(LONG).unwrap().unwrap().1);
        a.send(9, &big, vec![], LONG).unwrap();
        assert_eq!(reader.join().unwrap(), expected);
    }

    #[test]
    fn a_peer_that_never_reads_is_noticed() {
        let (mut a, _b) = pair();
        let progress =
            FromLoader::Progress(LoadProgress { stage: "x".repeat(100_000), done_bytes: 0, total_bytes: 0 });
        let outcome = (0..1000).find_map(|id| a.send(id, &progress, vec![], Duration::from_millis(1)).err());
        assert!(matches!(outcome, Some(FramedError::TimedOut(_))));
        assert!(a.queued_bytes() > 0);
    }
}
