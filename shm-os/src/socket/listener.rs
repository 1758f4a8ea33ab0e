//! The listening side: a socket that appears complete, or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use interprocess::local_socket::traits::Listener as _;
use interprocess::local_socket::{GenericFilePath, ListenerOptions, ToFsName};
use interprocess::os::unix::local_socket::ListenerOptionsExt;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, FdFlag, fcntl, renameat};
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, UnixAddr, getsockname, getsockopt, sockopt};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Connection, SocketError, check_path, set_nonblocking};
use crate::{OsError, fork_generation, run_dir};

/// First descriptor that a service manager passes.
const FIRST_ACTIVATION_FD: i32 = 3;

/// A listening socket. Dropping it removes its path, if the path still leads to this socket.
#[derive(Debug)]
pub struct Listener {
    inner: interprocess::local_socket::Listener,
    place: Option<Place>,
}

/// Where a socket that we made lies.
#[derive(Debug)]
struct Place {
    folder: File,
    name: OsString,
    path: PathBuf,
    identity: (u64, u64),
    fork_generation: u64,
}

/// Binds a listening socket (mode 0600) at `path`, whose folder is made (0700) or must be private already.
///
/// It is bound and listening under a temporary name before it is renamed to `path`, so nobody is ever refused by a
/// socket that is not ready, and a left-over socket there is replaced. So hold the folder's
/// [`LockFile`](crate::run_dir::LockFile) before calling: the socket of a running broker would be replaced as well.
pub fn bind_listener(path: &Path) -> Result<Listener, SocketError> {
    check_path(path)?;
    let bad_path = || SocketError::BadPath { path: path.into() };
    let name = path.file_name().ok_or_else(bad_path)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    run_dir::ensure_private_dir(parent)?;
    let folder = run_dir::open_private_dir(parent)?;
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.into() });
        }
        _ => {}
    }
    // Through the open folder: short however long the path is, and in the very folder that was checked.
    let temporary = format!(".bind-{}", std::process::id());
    let bind_path = format!("/proc/self/fd/{}/{temporary}", folder.as_raw_fd());
    let failed = |e| OsError::new(format!("binding a socket in {}", parent.display()), e);
    // Left by a killed process of the same number; the folder is private and its lock is held.
    let _ = unlinkat(&folder, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
    let inner = ListenerOptions::new()
        .name(bind_path.as_str().to_fs_name::<GenericFilePath>().map_err(failed)?)
        .mode(0o600)
        .reclaim_name(false)
        .create_sync()
        .map_err(failed)?;
    let stat = nix::sys::stat::fstatat(&folder, temporary.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(|e| failed(e.into()))?;
    if let Err(e) = renameat(&folder, temporary.as_str(), &folder, name) {
        let _ = unlinkat(&folder, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        return Err(OsError::new(format!("renaming a socket to {}", path.display()), e).into());
    }
    let identity = (stat.st_dev, stat.st_ino);
    let place =
        Place { folder, name: name.into(), path: path.into(), identity, fork_generation: fork_generation() };
    Ok(Listener { inner, place: Some(place) })
}

/// The listening socket that a service manager passed (systemd's LISTEN_PID and LISTEN_FDS protocol), given those
/// variables' values; `None` when there is none or it is not meant for this process. Takes the first descriptor; it
/// must be a listening Unix stream socket. Its path is the service manager's and is not removed. Call at most once,
/// before other descriptors are opened.
pub fn listener_from_systemd(
    pid: Option<&OsStr>,
    count: Option<&OsStr>,
) -> Result<Option<Listener>, SocketError> {
    let number = |text: Option<&OsStr>| text.and_then(OsStr::to_str).and_then(|t| t.parse::<u32>().ok());
    if number(pid) != Some(std::process::id()) || number(count).unwrap_or(0) == 0 {
        return Ok(None);
    }
    // SAFETY: fcntl on a number only asks; a closed one gives EBADF.
    if unsafe { libc::fcntl(FIRST_ACTIVATION_FD, libc::F_GETFD) } == -1 {
        return Err(SocketError::BadActivation);
    }
    // SAFETY: open, checked above; by the protocol, and the contract of this function, nobody else here owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_ACTIVATION_FD) };
    adopt_listener(fd).map(Some)
}

fn adopt_listener(fd: OwnedFd) -> Result<Listener, SocketError> {
    let is_unix =
        getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok_and(|a| a.family() == Some(AddressFamily::Unix));
    let is_stream = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream);
    if !is_unix || !is_stream || getsockopt(&fd, sockopt::AcceptConn) != Ok(true) {
        return Err(SocketError::BadActivation);
    }
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|e| OsError::new("preparing a passed socket", e))?;
    set_nonblocking(fd.as_fd(), false)?;
    let inner = interprocess::local_socket::Listener::UdSocket(fd.into());
    Ok(Listener { inner, place: None })
}

impl Listener {
    /// Takes the next connection; `None` when none is waiting (non-blocking listeners) or a peer gave up meanwhile.
    /// The connection blocks. At the limit of descriptors the error's errno is EMFILE: stop accepting for a while.
    pub fn accept(&self) -> Result<Option<Connection>, SocketError> {
        match self.inner.accept() {
            Ok(stream) => Ok(Some(Connection { stream })),
            Err(e) => match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => Ok(None),
                _ => Err(OsError::new("accepting a connection", e).into()),
            },
        }
    }

    /// Makes [`accept`](Self::accept) return at once when nobody waits. Connections block all the same.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), SocketError> {
        Ok(set_nonblocking(self.as_fd(), nonblocking)?)
    }

    /// Where the socket lies; `None` for one passed by a service manager.
    pub fn path(&self) -> Option<&Path> {
        self.place.as_ref().map(|place| place.path.as_path())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let interprocess::local_socket::Listener::UdSocket(inner) = &self.inner;
        inner.as_fd()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.fork_generation != fork_generation() {
            return;
        }
        let there = self.path.symlink_metadata().map(|meta| (meta.dev(), meta.ino()));
        if there.is_ok_and(|identity| identity == self.identity) {
            let _ = unlinkat(&self.folder, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}
