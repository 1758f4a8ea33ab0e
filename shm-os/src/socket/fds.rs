//! Bytes with descriptors over a Unix stream socket. Descriptors that were not asked for never stay open.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::SocketError;
use crate::OsError;

/// Most descriptors in one message (the kernel's SCM_MAX_FD).
pub const MAX_PASSED_FDS: usize = 253;

/// Bytes of a control message with the most descriptors, in u64s so that it is aligned for `cmsghdr`.
const CONTROL_WORDS: usize = (size_of::<libc::cmsghdr>() + MAX_PASSED_FDS * 4).div_ceil(8) + 1;

/// Sends `bytes` with copies of `fds` (at most [`MAX_PASSED_FDS`]) as the socket's mode and timeout say; gives how many
/// bytes were taken, at least 1. All descriptors go with the first byte: send the rest of the bytes without them.
pub fn send_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, SocketError> {
    send(socket, bytes, fds, 0)?.ok_or(SocketError::WouldBlock)
}

/// Like [`send_with_fds`], but never waits: `None` when there is no room, and nothing was sent.
pub fn try_send_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<Option<usize>, SocketError> {
    send(socket, bytes, fds, libc::MSG_DONTWAIT)
}

/// Receives up to `bytes.len()` bytes and up to `max_fds` descriptors (close-on-exec), appended to `fds`; gives the
/// number of bytes, 0 at the end of the stream. More descriptors than `max_fds`, or none free in this process, is
/// [`SocketError::DescriptorsLost`]: none is kept, and the bytes are lost, so the connection must end.
pub fn recv_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
) -> Result<usize, SocketError> {
    receive(socket, bytes, fds, max_fds, 0)?.ok_or(SocketError::WouldBlock)
}

/// Like [`recv_with_fds`], but never waits: `None` when nothing is there.
pub fn try_recv_with_fds(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
) -> Result<Option<usize>, SocketError> {
    receive(socket, bytes, fds, max_fds, libc::MSG_DONTWAIT)
}

fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> Result<Option<usize>, SocketError> {
    if bytes.is_empty() || fds.len() > MAX_PASSED_FDS {
        return Err(SocketError::BadMessage { fds: fds.len(), bytes: bytes.len() });
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let payload_bytes = u32::try_from(size_of_val(fds)).unwrap_or(u32::MAX);
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only calculate. The control buffer holds MAX_PASSED_FDS descriptors, so the
        // header and the numbers written here fit; a BorrowedFd is its number.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(payload_bytes) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload_bytes) as usize;
            let numbers = libc::CMSG_DATA(header).cast::<libc::c_int>();
            for (index, fd) in fds.iter().enumerate() {
                numbers.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    loop {
        // SAFETY: `message` points to `part`, `bytes` and `control`, which live across the call; sendmsg only reads.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags | libc::MSG_NOSIGNAL) };
        if let Ok(count) = usize::try_from(sent) {
            return Ok(Some(count));
        }
        let error = OsError::last("sending a message with descriptors");
        match error.errno() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return Ok(None),
            Some(libc::EPIPE | libc::ECONNRESET) => return Err(SocketError::Closed),
            _ => return Err(error.into()),
        }
    }
}

fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
    flags: libc::c_int,
) -> Result<Option<usize>, SocketError> {
    let max_fds = max_fds.min(MAX_PASSED_FDS);
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if max_fds > 0 {
        message.msg_control = control.as_mut_ptr().cast();
    }
    // CMSG_LEN, not CMSG_SPACE: the padding would have room for one descriptor too many. Set for each try: the call
    // overwrites it.
    // SAFETY: CMSG_LEN only calculates.
    let room_bytes = if max_fds == 0 { 0 } else { unsafe { libc::CMSG_LEN((max_fds * 4) as u32) as usize } };
    let count = loop {
        message.msg_controllen = room_bytes;
        // SAFETY: `message` points to `part`, `bytes` and `control`, writable for the lengths told and alive.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags | libc::MSG_CMSG_CLOEXEC) };
        if let Ok(count) = usize::try_from(got) {
            break count;
        }
        let error = OsError::last("receiving a message with descriptors");
        match error.errno() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return Ok(None),
            Some(libc::ECONNRESET) => return Err(SocketError::Closed),
            _ => return Err(error.into()),
        }
    };
    let received = take_descriptors(&message);
    if message.msg_flags & libc::MSG_CTRUNC != 0 || received.len() > max_fds {
        // `received` is dropped here: each is closed.
        return Err(SocketError::DescriptorsLost { max_fds });
    }
    fds.extend(received);
    Ok(Some(count))
}

/// Takes ownership of each descriptor in a received message, so that none can leak.
fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut owned = Vec::new();
    // SAFETY: the message was filled by recvmsg, so the CMSG macros walk valid headers inside its control buffer.
    // Each SCM_RIGHTS number is a new descriptor of this process that nobody else owns, and is taken once.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let payload_bytes = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let numbers = libc::CMSG_DATA(header).cast::<libc::c_int>();
                for index in 0..payload_bytes / size_of::<libc::c_int>() {
                    owned.push(OwnedFd::from_raw_fd(numbers.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    owned
}
