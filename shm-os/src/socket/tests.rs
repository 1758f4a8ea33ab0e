//! Sockets against real peers in this process; other processes are in the crate's integration tests.

use super::*;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

const SOON: Duration = Duration::from_secs(5);

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn temp_file_with(text: &str) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn descriptors_arrive_with_their_bytes() {
    let (a, b) = socketpair().unwrap();
    let files = [temp_file_with("one"), temp_file_with("two")];
    let borrowed = files.each_ref().map(|file| file.as_fd());
    assert_eq!(send_with_fds(a.as_fd(), b"hello", &borrowed).unwrap(), 5);
    let (mut bytes, mut fds) = ([0; 16], Vec::new());
    assert_eq!(recv_with_fds(b.as_fd(), &mut bytes, &mut fds, 8).unwrap(), 5);
    assert_eq!(&bytes[..5], b"hello");
    assert_eq!(fds.len(), 2);
    for (fd, text) in fds.iter().zip(["one", "two"]) {
        let flags = fcntl(fd, FcntlArg::F_GETFD).unwrap();
        assert_ne!(flags & libc::FD_CLOEXEC, 0);
        let mut content = vec![0; 3];
        std::os::unix::fs::FileExt::read_exact_at(
            &std::fs::File::from(fd.try_clone().unwrap()),
            &mut content,
            0,
        )
        .unwrap();
        assert_eq!(content, text.as_bytes());
    }
}

#[test]
fn more_descriptors_than_asked_for_are_an_error_and_closed() {
    let file = temp_file_with("x");
    for (sent, allowed) in [(1, 0), (2, 1), (5, 3), (4, 3)] {
        let (a, b) = socketpair().unwrap();
        send_with_fds(a.as_fd(), b"x", &vec![file.as_fd(); sent]).unwrap();
        let mut fds = Vec::new();
        let result = recv_with_fds(b.as_fd(), &mut [0; 4], &mut fds, allowed);
        assert!(
            matches!(result, Err(SocketError::DescriptorsLost { max_fds }) if max_fds == allowed),
            "{result:?}"
        );
        assert!(fds.is_empty());
    }
    // Each one sent was closed: the file has one descriptor left, ours. Others' tests open and close meanwhile, so
    // the links to this very file are counted.
    let ino = file.metadata().unwrap().ino();
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let to_file =
        links.filter(|link| std::fs::metadata(link.path()).is_ok_and(|meta| meta.ino() == ino)).count();
    assert_eq!(to_file, 1);
}

#[test]
fn the_most_descriptors_fit_and_one_more_does_not() {
    let (a, b) = socketpair().unwrap();
    let file = temp_file_with("x");
    let many = vec![file.as_fd(); MAX_PASSED_FDS + 1];
    assert!(matches!(send_with_fds(a.as_fd(), b"x", &many), Err(SocketError::BadMessage { .. })));
    assert!(matches!(send_with_fds(a.as_fd(), b"", &many[..1]), Err(SocketError::BadMessage { .. })));
    send_with_fds(a.as_fd(), b"x", &many[1..]).unwrap();
    let mut fds = Vec::new();
    recv_with_fds(b.as_fd(), &mut [0; 1], &mut fds, MAX_PASSED_FDS).unwrap();
    assert_eq!(fds.len(), MAX_PASSED_FDS);
}

#[test]
fn trying_never_waits_and_the_end_is_told() {
    let (a, b) = socketpair().unwrap();
    let mut fds = Vec::new();
    assert_eq!(try_recv_with_fds(b.as_fd(), &mut [0; 4], &mut fds, 1).unwrap(), None);
    let block = vec![0; 64 << 10];
    while try_send_with_fds(a.as_fd(), &block, &[]).unwrap().is_some() {}
    set_nonblocking(a.as_fd(), true).unwrap();
    let full = send_with_fds(a.as_fd(), &block, &[]).unwrap_err();
    assert!(full.is_would_block() && !full.is_disconnect());
    drop(b);
    assert!(send_with_fds(a.as_fd(), b"x", &[]).unwrap_err().is_disconnect());
    let (a, b) = socketpair().unwrap();
    drop(a);
    assert_eq!(recv_with_fds(b.as_fd(), &mut [0; 4], &mut fds, 1).unwrap(), 0);
}

#[test]
fn a_bound_socket_is_private_and_gone_with_its_listener() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("run/broker.sock");
    let listener = bind_listener(&path).unwrap();
    assert_eq!(path.symlink_metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary name stays");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().unwrap().is_none());

    let mut client = connect(&path, SOON, AllowedPeer::SameUser).unwrap();
    let mut server = listener.accept().unwrap().unwrap();
    client.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    let us = PeerCredentials {
        pid: std::process::id().cast_signed(),
        uid: run_dir_uid(),
        gid: nix::unistd::getegid().as_raw(),
    };
    assert_eq!(server.peer_credentials().unwrap(), us);
    assert_eq!(client.peer_credentials().unwrap(), us);
    drop(listener);
    assert!(!path.exists());
    assert!(matches!(connect(&path, SOON, AllowedPeer::SameUser), Err(SocketError::NotThere { .. })));
}

fn run_dir_uid() -> u32 {
    crate::run_dir::effective_uid()
}

#[test]
fn binding_replaces_a_stale_socket_without_a_refused_window() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("run/s");
    crate::run_dir::ensure_private_dir(path.parent().unwrap()).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(matches!(connect(&path, SOON, AllowedPeer::SameUser), Err(SocketError::Stale { .. })));
    let first = bind_listener(&path).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // One listener replaces the other all the time; connecting never fails.
            for _ in 0..200 {
                connect(&path, SOON, AllowedPeer::SameUser).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Release);
        });
        let mut old = vec![first];
        while !stop.load(std::sync::atomic::Ordering::Acquire) {
            old.push(bind_listener(&path).unwrap());
            for listener in &old {
                listener.set_nonblocking(true).unwrap();
                while listener.accept().unwrap().is_some() {}
            }
            if old.len() > 4 {
                drop(old.remove(0));
            }
        }
    });
    assert!(!path.exists(), "the last one removed it, the others left it alone");
}

#[test]
fn bad_paths_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let long = temp.path().join("x".repeat(120));
    for result in [connect(&long, SOON, AllowedPeer::Anyone).map(drop), bind_listener(&long).map(drop)] {
        let error = result.unwrap_err();
        assert!(matches!(error, SocketError::PathTooLong { .. }));
        assert!(error.to_string().contains("107"), "{error}");
    }
    let file = temp.path().join("d/file");
    crate::run_dir::ensure_private_dir(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(bind_listener(&file), Err(SocketError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let open_dir = temp.path().join("open");
    std::fs::create_dir(&open_dir).unwrap();
    std::fs::set_permissions(&open_dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert!(matches!(bind_listener(&open_dir.join("s")), Err(SocketError::Folder(_))));
    assert!(matches!(check_path(Path::new("/")), Err(SocketError::BadPath { .. })));
}

#[test]
fn a_path_of_full_length_works() {
    let temp = tempfile::tempdir().unwrap();
    let base = temp.path().join("d").join("x");
    let fill = MAX_SOCKET_PATH_BYTES - base.as_os_str().len() + 1;
    let path = temp.path().join("d").join("x".repeat(fill));
    assert_eq!(path.as_os_str().len(), MAX_SOCKET_PATH_BYTES);
    let _listener = bind_listener(&path).unwrap();
    connect(&path, SOON, AllowedPeer::SameUser).unwrap();
}

#[test]
fn a_full_queue_is_waited_for_and_then_told() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("full");
    let socket =
        nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &UnixAddr::new(&path).unwrap()).unwrap();
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    let error = loop {
        match connect(&path, Duration::from_millis(5), AllowedPeer::SameUser) {
            Ok(connection) => waiting.push(connection),
            Err(error) => break error,
        }
        assert!(waiting.len() < 100);
    };
    assert!(matches!(error, SocketError::ConnectTimedOut { waited_ms, .. } if waited_ms >= 5), "{error}");
}

#[test]
fn only_allowed_peers_pass() {
    let peer = PeerCredentials { pid: 1, uid: 4242, gid: 1 };
    AllowedPeer::Anyone.check(peer).unwrap();
    AllowedPeer::User(4242).check(peer).unwrap();
    for rule in [AllowedPeer::SameUser, AllowedPeer::User(1)] {
        assert!(matches!(rule.check(peer), Err(SocketError::ForeignPeer { peer_uid: 4242, .. })));
    }
}

#[test]
fn writing_to_a_closed_peer_is_an_error_not_a_signal() {
    let (mut a, b) = Connection::pair().unwrap();
    let copy = a.try_clone().unwrap();
    drop(b);
    assert_eq!(a.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    copy.shutdown().unwrap();
    let mut rest = Vec::new();
    assert_eq!(a.read_to_end(&mut rest).unwrap(), 0);
}

#[test]
fn timeouts_and_activation() {
    let (mut a, _b) = Connection::pair().unwrap();
    a.set_timeouts(Some(Duration::from_millis(1)), None).unwrap();
    assert_eq!(a.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let none = |pid: Option<&str>, count: Option<&str>| {
        listener_from_systemd(pid.map(AsRef::as_ref), count.map(AsRef::as_ref)).unwrap().is_none()
    };
    assert!(none(None, None) && none(Some("1"), Some("1")) && none(Some("x"), None));
    assert!(none(Some(&std::process::id().to_string()), Some("0")));
    assert!(open_fds() > 0);
}
