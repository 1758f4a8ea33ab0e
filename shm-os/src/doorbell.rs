//! A doorbell: an eventfd by which one process tells another to look at its lane. Who looks at what must not be
//! known here.
//!
//! The receiving side registers it edge-triggered with a [`Poller`](crate::Poller) and never reads it: each ring is
//! an event, no read is paid for, and a peer that fills the counter stops only its own bell. The receiver must not
//! *write* a bell that a peer holds too: the peer can clear O_NONBLOCK and make that block for ever.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::OsError;

/// An eventfd that only ever says "look".
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
}

/// Why a descriptor is no doorbell.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// The descriptor received is something else.
    #[error("the descriptor received as a doorbell is not an eventfd: its sender is faulty")]
    NotAnEventfd,
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

impl Doorbell {
    /// Makes a doorbell: counter 0, non-blocking, close-on-exec.
    pub fn new() -> Result<Self, DoorbellError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| OsError::new("making a doorbell (eventfd)", e))?;
        Ok(Self { fd: event.into() })
    }

    /// Takes a received descriptor after checking that it is an eventfd, and makes it non-blocking.
    pub fn from_received(fd: OwnedFd) -> Result<Self, DoorbellError> {
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let target =
            std::fs::read_link(link).map_err(|e| OsError::new("identifying a doorbell in /proc", e))?;
        if target.as_os_str() != "anon_inode:[eventfd]" {
            return Err(DoorbellError::NotAnEventfd);
        }
        crate::socket::set_nonblocking(fd.as_fd(), true)?;
        Ok(Self { fd })
    }

    /// Rings. A full counter is as good as a ring: the receiver has an event pending, or never looks.
    pub fn ring(&self) -> Result<(), DoorbellError> {
        loop {
            match nix::unistd::write(&self.fd, &1u64.to_ne_bytes()) {
                Ok(_) | Err(nix::Error::EAGAIN) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(OsError::new("ringing a doorbell", e).into()),
            }
        }
    }

    /// Sets the counter back to 0; gives whether it had been rung. Only for a bell that stays in this process (a
    /// waker between threads): on a shared one a peer can make this block.
    pub fn silence(&self) -> Result<bool, DoorbellError> {
        let mut counter = [0; 8];
        loop {
            match nix::unistd::read(&self.fd, &mut counter) {
                Ok(_) => return Ok(true),
                Err(nix::Error::EAGAIN) => return Ok(false),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(OsError::new("silencing a doorbell", e).into()),
            }
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Doorbell> for OwnedFd {
    fn from(bell: Doorbell) -> Self {
        bell.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_never_block_even_with_a_full_counter() {
        let bell = Doorbell::new().unwrap();
        nix::unistd::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring().unwrap();
        assert!(bell.silence().unwrap());
        assert!(!bell.silence().unwrap());
    }

    #[test]
    fn only_an_eventfd_is_taken_for_a_doorbell() {
        let bell = Doorbell::new().unwrap();
        let copy = bell.as_fd().try_clone_to_owned().unwrap();
        Doorbell::from_received(copy).unwrap().ring().unwrap();
        assert!(bell.silence().unwrap());
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(Doorbell::from_received(reader.into()), Err(DoorbellError::NotAnEventfd)));
    }
}
