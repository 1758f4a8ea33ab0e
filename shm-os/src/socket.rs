//! Unix stream sockets: binding without a refused window, connecting to the right user's peer, knowing who the peer
//! is, passing descriptors. What is said over them must not be known here.

mod fds;
mod listener;
mod peer;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use interprocess::local_socket::Stream;
use interprocess::local_socket::traits::Stream as _;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr};

pub use fds::{MAX_PASSED_FDS, recv_with_fds, send_with_fds, try_recv_with_fds, try_send_with_fds};
pub use listener::{Listener, bind_listener, listener_from_systemd};
pub use peer::{AllowedPeer, PeerCredentials, peer_credentials, peer_pidfd};

use crate::OsError;
use crate::run_dir::RunDirError;

/// Longest path that a Unix socket address can hold, bytes (`sun_path` less its terminator).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Pauses between attempts to connect while the listener's queue is full.
const CONNECT_RETRY_PAUSE: Duration = Duration::from_millis(1);

/// Why a socket operation failed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "the socket path has {len_bytes} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible: choose a shorter one \
         with --socket or MODELBROKER_SOCKET ({})", path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length, bytes.
        len_bytes: usize,
    },
    /// The path names no file in a folder, or has a zero byte.
    #[error("{path:?} is no socket path: name a file in a private folder")]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket lies at the path.
    #[error("{} exists and is not a socket: remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Nothing lies at the path.
    #[error("no broker is running: {} does not exist (start one with `modelbroker serve`)", path.display())]
    NotThere {
        /// The path.
        path: PathBuf,
    },
    /// A socket lies at the path, but nobody listens.
    #[error("no broker answers at {}: its socket is left over (start one with `modelbroker serve`)", path.display())]
    Stale {
        /// The path.
        path: PathBuf,
    },
    /// The listener's queue stayed full.
    #[error("the broker at {} did not take the connection within {waited_ms} ms: it is overloaded or stopped", path.display())]
    ConnectTimedOut {
        /// The path.
        path: PathBuf,
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// The process at the other end belongs to another user.
    #[error("the peer belongs to user {peer_uid}, only {allowed_uid} is allowed: check who owns the socket")]
    ForeignPeer {
        /// The peer's uid.
        peer_uid: u32,
        /// The uid allowed.
        allowed_uid: u32,
    },
    /// More descriptors than one message can carry, or descriptors without a byte to go with.
    #[error(
        "{fds} descriptors with {bytes} bytes cannot be sent: 1 byte at least, {MAX_PASSED_FDS} descriptors at most"
    )]
    BadMessage {
        /// Descriptors given.
        fds: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// Descriptors were cut off; those that arrived were closed. The message's bytes are lost: end the connection.
    #[error(
        "descriptors were lost: the peer sent more than {max_fds}, or this process has no descriptor free (ulimit -n)"
    )]
    DescriptorsLost {
        /// How many were allowed.
        max_fds: usize,
    },
    /// The socket would block, or its timeout ran out.
    #[error("the socket is not ready")]
    WouldBlock,
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The descriptor handed over by the service manager is not a listening stream socket.
    #[error(
        "the descriptor passed by the service manager is no listening Unix stream socket: use ListenStream="
    )]
    BadActivation,
    /// The socket's folder can't be used.
    #[error(transparent)]
    Folder(#[from] RunDirError),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

impl SocketError {
    /// Whether nothing is wrong: the socket is only not ready, or its timeout ran out.
    pub fn is_would_block(&self) -> bool {
        matches!(self, SocketError::WouldBlock)
    }

    /// Whether the peer is gone.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, SocketError::Closed)
    }

    /// Whether this process or the machine is out of descriptors: stop accepting until some are closed.
    pub fn is_descriptor_limit(&self) -> bool {
        matches!(self, SocketError::Os(e) if matches!(e.errno(), Some(libc::EMFILE | libc::ENFILE)))
    }
}

/// A connected stream. Reads and writes retry nothing and never raise SIGPIPE; `&Connection` reads and writes too.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
}

impl Connection {
    /// A connected pair inside this process, close-on-exec.
    pub fn pair() -> Result<(Connection, Connection), SocketError> {
        let (a, b) = socketpair()?;
        Ok((a.into(), b.into()))
    }

    /// Switches blocking off or on, for this descriptor and every copy of it.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), SocketError> {
        Ok(set_nonblocking(self.as_fd(), nonblocking)?)
    }

    /// How long a blocking read or write may take before it fails as "would block"; `None`: for ever.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> Result<(), SocketError> {
        let failed = |e| OsError::new("setting a socket's timeout", e);
        // Zero would mean "for ever" to the system; it is refused by it as invalid here.
        self.stream.set_recv_timeout(read).map_err(failed)?;
        self.stream.set_send_timeout(write).map_err(failed)?;
        Ok(())
    }

    /// A second handle of the same connection.
    pub fn try_clone(&self) -> Result<Connection, SocketError> {
        let fd = self
            .as_fd()
            .try_clone_to_owned()
            .map_err(|e| OsError::new("copying a socket's descriptor", e))?;
        Ok(fd.into())
    }

    /// Ends the connection in both directions: all handles of it, here and in forked children, see its end.
    pub fn shutdown(&self) -> Result<(), SocketError> {
        match nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&self.as_fd()), Shutdown::Both) {
            Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
            Err(e) => Err(OsError::new("closing a connection", e).into()),
        }
    }

    /// Who is at the other end, as the kernel recorded it at connect.
    pub fn peer_credentials(&self) -> Result<PeerCredentials, SocketError> {
        peer_credentials(self.as_fd())
    }

    /// A handle of the peer's process; `None` where the kernel has none to give or the peer is gone.
    pub fn peer_pidfd(&self) -> Result<Option<OwnedFd>, SocketError> {
        peer_pidfd(self.as_fd())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let Stream::UdSocket(stream) = &self.stream;
        stream.as_fd()
    }
}

impl From<OwnedFd> for Connection {
    /// The descriptor must be a connected Unix stream socket; with any other each operation fails.
    fn from(fd: OwnedFd) -> Self {
        Self { stream: Stream::UdSocket(fd.into()) }
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        let Stream::UdSocket(stream) = connection.stream;
        stream.into()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl Write for &Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not the stream's own write: that raises SIGPIPE in programs that do not ignore it.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.as_fd());
        nix::sys::socket::send(fd, bytes, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Two connected Unix stream sockets, blocking, close-on-exec.
pub fn socketpair() -> Result<(OwnedFd, OwnedFd), SocketError> {
    nix::sys::socket::socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| OsError::new("making a socket pair", e).into())
}

/// Connects to the socket at `path` and checks whose process listens there. Waits up to `timeout` only while the
/// listener's queue is full. The connection blocks; see [`Connection::set_timeouts`].
pub fn connect(path: &Path, timeout: Duration, allowed: AllowedPeer) -> Result<Connection, SocketError> {
    check_path(path)?;
    let address = UnixAddr::new(path).map_err(|_| SocketError::BadPath { path: path.into() })?;
    let started = Instant::now();
    // Not the crate's own connect with a timeout: it takes EAGAIN (full queue) for "in progress", but on Unix sockets
    // nothing is, and the stream would stay unconnected.
    let socket = nix::sys::socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .map_err(|e| OsError::new("making a socket", e))?;
    loop {
        match nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if started.elapsed() < timeout => std::thread::sleep(CONNECT_RETRY_PAUSE),
            Err(Errno::EAGAIN) => {
                let waited_ms = started.elapsed().as_millis();
                return Err(SocketError::ConnectTimedOut { path: path.into(), waited_ms });
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(SocketError::NotThere { path: path.into() }),
            Err(Errno::ECONNREFUSED) => return Err(SocketError::Stale { path: path.into() }),
            Err(e) => return Err(OsError::new(format!("connecting to {}", path.display()), e).into()),
        }
    }
    let connection = Connection::from(socket);
    connection.set_nonblocking(false)?;
    allowed.check(connection.peer_credentials()?)?;
    Ok(connection)
}

/// Checks that a path fits a socket address and names a file.
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_SOCKET_PATH_BYTES {
        return Err(SocketError::PathTooLong { path: path.into(), len_bytes: bytes.len() });
    }
    if path.file_name().is_none() || bytes.contains(&0) || bytes.ends_with(b"/") {
        return Err(SocketError::BadPath { path: path.into() });
    }
    Ok(())
}

/// Sets or clears O_NONBLOCK, for this descriptor and every copy of it, in whichever process.
pub fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> Result<(), OsError> {
    let set = || {
        let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        flags.set(OFlag::O_NONBLOCK, nonblocking);
        fcntl(fd, FcntlArg::F_SETFL(flags))
    };
    set().map(drop).map_err(|e: Errno| OsError::new("switching a descriptor's blocking", e))
}

#[cfg(test)]
mod tests;
