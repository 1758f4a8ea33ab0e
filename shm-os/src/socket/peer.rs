//! Who is at the other end of a socket, and whether that is allowed.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{getsockopt, sockopt};

use super::SocketError;
use crate::{OsError, process, run_dir};

/// A process as the kernel recorded it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id; may name another process once this one ended: use [`peer_pidfd`] to watch it.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// Whose processes may be at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedPeer {
    /// This process's effective user.
    SameUser,
    /// One named user.
    User(u32),
    /// Anybody who got through the folder's permissions.
    Anyone,
}

impl AllowedPeer {
    /// [`SocketError::ForeignPeer`] for those not allowed.
    pub fn check(self, peer: PeerCredentials) -> Result<(), SocketError> {
        let allowed_uid = match self {
            AllowedPeer::Anyone => return Ok(()),
            AllowedPeer::SameUser => run_dir::effective_uid(),
            AllowedPeer::User(uid) => uid,
        };
        if peer.uid == allowed_uid {
            Ok(())
        } else {
            Err(SocketError::ForeignPeer { peer_uid: peer.uid, allowed_uid })
        }
    }
}

/// The credentials of the process at the other end (`SO_PEERCRED`).
pub fn peer_credentials(fd: BorrowedFd<'_>) -> Result<PeerCredentials, SocketError> {
    let found = getsockopt(&fd, sockopt::PeerCredentials)
        .map_err(|e| OsError::new("asking who is at the other end of a socket", e))?;
    Ok(PeerCredentials { pid: found.pid(), uid: found.uid(), gid: found.gid() })
}

/// A pidfd of the process at the other end (`SO_PEERPIDFD`, Linux 6.5; else by its pid): readable when that process
/// ends, at once, whoever else holds its socket. `None` when the peer is gone already or the kernel has no pidfds.
///
/// By pid it could name a successor, if the peer ended and its number was given out anew before this call: treat it as
/// a hint then, beside the socket's own hang-up.
pub fn peer_pidfd(fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>, SocketError> {
    let mut raw: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `raw` and `len` are writable and of the size told; the kernel writes one descriptor.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut raw).cast(),
            &raw mut len,
        )
    };
    if result == 0 && raw >= 0 {
        // SAFETY: the kernel just made this descriptor for us (close-on-exec).
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(raw) }));
    }
    let error = OsError::last("asking for the peer's process");
    match error.errno() {
        // The peer has ended and been waited for.
        Some(libc::ESRCH | libc::ENODATA | libc::EINVAL) => Ok(None),
        Some(libc::ENOPROTOOPT) => Ok(process::pidfd_open(peer_credentials(fd)?.pid).ok()),
        _ => Err(error.into()),
    }
}
