//! What only real processes show: images and lanes shared, descriptors passed, locks and sockets of the dead, limits
//! of children. The second process is this test binary again, running `helper`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::time::Duration;

use shm_os::futex::{futex_wait, futex_wake};
use shm_os::image_backing::{
    BackingKind, ImageBacking, ImageFile, ImageKey, PosixShm, SealedMemfd, map_published,
};
use shm_os::process::{ChildLimits, ProcessError, SpawnedChild, spawn_limited};
use shm_os::run_dir::LockFile;
use shm_os::smaps;
use shm_os::socket::{self, AllowedPeer, Connection, recv_with_fds, send_with_fds};
use shm_os::{Doorbell, Interest, Poller, SharedMapping, memfd};

const ROLE: &str = "SHM_OS_TEST_ROLE";
const ARGUMENT: &str = "SHM_OS_TEST_ARGUMENT";
/// The helper's end of the conversation.
const HELPER_FD: i32 = 3;
const SOON: Duration = Duration::from_secs(20);

/// Starts this binary as a helper in a role; gives the child and our end of the conversation.
fn start(role: &str, argument: &str, mut limits: ChildLimits) -> (SpawnedChild, Connection) {
    let (ours, theirs) = Connection::pair().unwrap();
    limits.inherit_fds.push((theirs.into(), HELPER_FD));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "helper", "--ignored", "--test-threads=1"]);
    command.env(ROLE, role).env(ARGUMENT, argument).stdout(Stdio::null());
    let child = spawn_limited(command, limits).unwrap();
    ours.set_timeouts(Some(SOON), Some(SOON)).unwrap();
    (child, ours)
}

fn line(connection: &Connection) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while (&mut &*connection).read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

fn say(connection: &Connection, text: &str) {
    (&mut &*connection).write_all(format!("{text}\n").as_bytes()).unwrap();
}

/// Not a test: the other process. Does nothing unless it was started by one.
#[test]
#[ignore = "the second process of the other tests"]
fn helper() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let argument = std::env::var(ARGUMENT).unwrap_or_default();
    // SAFETY: the starter placed this descriptor for us, and nothing else in this process owns it.
    let talk = Connection::from(unsafe { OwnedFd::from_raw_fd(HELPER_FD) });
    match role.as_str() {
        "map_image" => map_image(&talk),
        "lane" => lane(&talk),
        "lock" => {
            let lock = LockFile::try_lock(argument.as_ref()).unwrap();
            say(&talk, if lock.is_some() { "locked" } else { "busy" });
            line(&talk);
        }
        "descriptors" => {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let numbers = links.filter(|link| link.path().read_link().is_ok_and(|t| !t.starts_with("/proc")));
            let mut numbers: Vec<i32> =
                numbers.map(|link| link.file_name().to_string_lossy().parse().unwrap()).collect();
            numbers.sort_unstable();
            say(&talk, &format!("{numbers:?}"));
        }
        "limits" => {
            let limit = |r| nix::sys::resource::getrlimit(r).unwrap().0;
            use nix::sys::resource::Resource::{RLIMIT_AS, RLIMIT_CORE, RLIMIT_CPU, RLIMIT_NOFILE};
            let limits = [RLIMIT_AS, RLIMIT_CPU, RLIMIT_NOFILE, RLIMIT_CORE].map(limit);
            // SAFETY: these calls take numbers only.
            let (nice, leads) =
                unsafe { (libc::getpriority(libc::PRIO_PROCESS, 0), libc::getsid(0) == libc::getpid()) };
            say(&talk, &format!("{limits:?} {nice} {leads}"));
        }
        "connect" => {
            let connection = socket::connect(argument.as_ref(), SOON, AllowedPeer::SameUser).unwrap();
            line(&talk);
            drop(connection);
        }
        "grandparent" => {
            let limits = ChildLimits { parent_death_signal: true, ..Default::default() };
            let (child, inner) = start("wait", "", limits);
            assert_eq!(line(&inner), "ready");
            say(&talk, &child.pid().to_string());
            line(&talk);
            std::process::exit(0);
        }
        "wait" => {
            say(&talk, "ready");
            line(&talk);
        }
        "family" => {
            let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
            say(&talk, &child.id().to_string());
            child.wait().unwrap();
        }
        "unregistered_sigbus" => {
            shm_os::sigbus::install().unwrap();
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            // SAFETY: that it faults is the test.
            let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
            file.set_len(0).unwrap();
            // SAFETY: in range.
            let byte = unsafe { map.as_ptr().read_volatile() };
            say(&talk, &format!("survived with {byte}"));
        }
        other => panic!("no role {other}"),
    }
}

fn map_image(talk: &Connection) {
    let (mut head, mut fds) = ([0; 9], Vec::new());
    assert_eq!(recv_with_fds(talk.as_fd(), &mut head, &mut fds, 1).unwrap(), 9);
    let kind = BackingKind::from_u8(head[0]).unwrap();
    let len_bytes = u64::from_le_bytes(head[1..].try_into().unwrap());
    let fd = fds.pop().unwrap();
    let mapping = map_published(fd.as_fd(), kind, len_bytes).unwrap();
    let sum: u64 = mapping.as_bytes().iter().map(|byte| u64::from(*byte)).sum();
    say(talk, &sum.to_string());
    line(talk);
}

#[test]
fn each_backing_is_one_copy_in_two_processes() {
    const LEN_BYTES: u64 = 8 << 20;
    let temp = tempfile::tempdir().unwrap();
    let file = ImageFile::open(&temp.path().join("cache")).unwrap();
    for backing in [&SealedMemfd as &dyn ImageBacking, &file, &PosixShm] {
        let mut writer = backing.reserve(&ImageKey::new("shared").unwrap(), LEN_BYTES).unwrap();
        writer.window().fill(3);
        let image = writer.publish().unwrap();
        let (mut child, talk) = start("map_image", "", ChildLimits::default());
        let mut head = vec![image.kind.as_u8()];
        head.extend(image.len_bytes.to_le_bytes());
        assert_eq!(send_with_fds(talk.as_fd(), &head, &[image.fd_read_only.as_fd()]).unwrap(), 9);
        assert_eq!(line(&talk), (3 * LEN_BYTES).to_string());
        let mapping = image.map().unwrap();
        assert!(mapping.as_bytes().iter().all(|byte| *byte == 3));

        let inode = File::from(image.fd_read_only.try_clone().unwrap()).metadata().unwrap().ino();
        let [ours, theirs] =
            [std::process::id(), child.pid()].map(|pid| smaps::memory_by_inode(pid, inode).unwrap().0);
        assert_eq!((ours.rss_bytes, theirs.rss_bytes), (LEN_BYTES, LEN_BYTES), "{backing:?}");
        assert_eq!(ours.pss_bytes + theirs.pss_bytes, LEN_BYTES, "one copy: {backing:?}");
        assert_eq!(ours.private_bytes() + theirs.private_bytes(), 0, "{backing:?}");
        say(&talk, "bye");
        assert!(child.wait().unwrap().success());
    }
    let left = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let ours = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("modelbroker-")).count();
    assert_eq!(ours, 0, "no named shared memory is left");
}

/// The helper's half of `a_lane_carries_words_wakes_and_rings`.
fn lane(talk: &Connection) {
    let (mut byte, mut fds) = ([0; 1], Vec::new());
    recv_with_fds(talk.as_fd(), &mut byte, &mut fds, 2).unwrap();
    let bell = Doorbell::from_received(fds.pop().unwrap()).unwrap();
    let lane = SharedMapping::map_lane(fds.pop().unwrap().as_fd(), 8192).unwrap();
    word(&lane, 0).store(1, std::sync::atomic::Ordering::Release);
    bell.ring().unwrap();
    while word(&lane, 128).load(std::sync::atomic::Ordering::Acquire) == 0 {
        futex_wait(&lane, 128, 0, Some(Duration::from_secs(1))).unwrap();
    }
    say(talk, "woken");
}

fn word(mapping: &SharedMapping, offset: usize) -> &std::sync::atomic::AtomicU32 {
    assert!(offset + 4 <= mapping.len_bytes() && offset.is_multiple_of(4));
    // SAFETY: in range and aligned, checked above; accessed as an atomic only.
    unsafe { &*mapping.base().as_ptr().add(offset).cast() }
}

#[test]
fn a_lane_carries_words_wakes_and_rings() {
    let region = memfd::create_lane_region(8192).unwrap();
    let lane = SharedMapping::map_lane(region.as_fd(), 8192).unwrap();
    let (bell, poller) = (Doorbell::new().unwrap(), Poller::new().unwrap());
    // Armed before the descriptors leave, or the first ring is lost.
    poller.add(&bell, 1, Interest::DOORBELL).unwrap();
    let (mut child, talk) = start("lane", "", ChildLimits::default());
    send_with_fds(talk.as_fd(), b"x", &[region.as_fd(), bell.as_fd()]).unwrap();
    let mut events = Vec::new();
    assert_eq!(poller.wait(&mut events, Some(SOON)).unwrap(), 1);
    assert_eq!(word(&lane, 0).load(std::sync::atomic::Ordering::Acquire), 1);
    // The helper may not sleep yet: woken or not, it sees the word.
    word(&lane, 128).store(1, std::sync::atomic::Ordering::Release);
    futex_wake(&lane, 128, 1).unwrap();
    assert_eq!(line(&talk), "woken");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_lock_is_freed_by_the_death_of_its_holder() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("lock");
    let (mut child, talk) = start("lock", path.to_str().unwrap(), ChildLimits::default());
    assert_eq!(line(&talk), "locked");
    assert!(LockFile::try_lock(&path).unwrap().is_none());
    assert_eq!(LockFile::holder_pid(&path), Some(child.pid()));
    let (mut second, second_talk) = start("lock", path.to_str().unwrap(), ChildLimits::default());
    assert_eq!(line(&second_talk), "busy");
    say(&second_talk, "bye");
    second.wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(path.exists(), "a killed process removes nothing");
    assert!(LockFile::try_lock(&path).unwrap().is_some());
}

#[test]
fn a_child_has_the_descriptors_given_and_no_others() {
    // Deliberately inheritable: it must not reach the child all the same.
    let leaked = File::open("/dev/null").unwrap();
    nix::fcntl::fcntl(&leaked, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let limits = ChildLimits {
        inherit_fds: vec![(null(), 9), (null(), 4), (null(), 63), (null(), 5)],
        ..Default::default()
    };
    let (mut child, talk) = start("descriptors", "", limits);
    assert_eq!(line(&talk), "[0, 1, 2, 3, 4, 5, 9, 63]");
    assert!(child.wait().unwrap().success());
}

#[test]
fn descriptors_that_trade_places_arrive_where_they_should() {
    // Each one's target is the other's number: a plain row of dup2 would lose one.
    let temp = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        std::fs::write(temp.path().join(name), name).unwrap();
        // Numbers that nothing else in this process takes meanwhile.
        let file = File::open(temp.path().join(name)).unwrap();
        let raw = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(50)).unwrap();
        // SAFETY: just made, owned by nobody else.
        unsafe { OwnedFd::from_raw_fd(raw) }
    };
    let (a, b) = (open("a"), open("b"));
    let (number_a, number_b) = (std::os::fd::AsRawFd::as_raw_fd(&a), std::os::fd::AsRawFd::as_raw_fd(&b));
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("readlink /proc/self/fd/{number_a} /proc/self/fd/{number_b}; :"));
    command.stdout(Stdio::piped());
    let limits = ChildLimits { inherit_fds: vec![(a, number_b), (b, number_a)], ..Default::default() };
    let mut child = spawn_limited(command, limits).unwrap();
    let mut text = String::new();
    child.child_mut().stdout.take().unwrap().read_to_string(&mut text).unwrap();
    child.wait().unwrap();
    let names: Vec<_> = text.lines().map(|line| line.rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["b", "a"], "{text}");
}

#[test]
fn bad_targets_and_missing_programs_are_told() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    for targets in [vec![2], vec![-1], vec![64], vec![7, 7]] {
        let inherit_fds = targets.iter().map(|target| (null(), *target)).collect();
        let result = spawn_limited(Command::new("true"), ChildLimits { inherit_fds, ..Default::default() });
        assert!(matches!(result, Err(ProcessError::BadTarget { .. })), "{targets:?}");
    }
    let inherit_fds = vec![(null(), 3), (null(), 4)];
    let result = spawn_limited(
        Command::new("/nonexistent/program"),
        ChildLimits { inherit_fds, ..Default::default() },
    );
    assert!(matches!(result, Err(ProcessError::Spawn { .. })), "{result:?}");
}

#[test]
fn limits_reach_the_child() {
    let limits = ChildLimits {
        address_space_bytes: Some(8 << 30),
        cpu_seconds: Some(100),
        open_files: Some(77),
        nice: Some(3),
        new_session: true,
        no_core_dump: true,
        ..Default::default()
    };
    let (mut child, talk) = start("limits", "", limits);
    // SAFETY: takes numbers only.
    let nice = (unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) } + 3).min(19);
    assert_eq!(line(&talk), format!("[{}, 100, 77, 0] {nice} true", 8u64 << 30));
    assert!(child.wait().unwrap().success());
    assert!(child.wait_nonblocking().unwrap().is_some());
}

#[test]
fn a_connected_process_is_known_and_its_death_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("run/s");
    let listener = socket::bind_listener(&path).unwrap();
    let (mut child, _talk) = start("connect", path.to_str().unwrap(), ChildLimits::default());
    let connection = listener.accept().unwrap().unwrap();
    let peer = connection.peer_credentials().unwrap();
    assert_eq!(peer.pid.cast_unsigned(), child.pid());
    let pidfd = connection.peer_pidfd().unwrap().unwrap();
    let poller = Poller::new().unwrap();
    poller.add(&pidfd, 7, Interest::READABLE).unwrap();
    poller.add(&connection, 8, Interest::HANGUP_ONLY).unwrap();
    let mut events = Vec::new();
    assert_eq!(poller.wait(&mut events, Some(Duration::ZERO)).unwrap(), 0);
    child.kill().unwrap();
    let (mut ended, mut hung_up) = (false, false);
    while !(ended && hung_up) {
        assert!(poller.wait(&mut events, Some(SOON)).unwrap() > 0);
        ended |= events.iter().any(|event| event.token == 7 && event.readable);
        hung_up |= events.iter().any(|event| event.token == 8 && event.hangup);
    }
    child.wait().unwrap();
    assert!(!child.signal(0).unwrap());
    drop(pidfd);
    // Ended and waited for: there may be a handle of the dead, but no living process.
    if let Some(late) = connection.peer_pidfd().unwrap() {
        assert!(!shm_os::process::pidfd_send_signal(late.as_fd(), 0).unwrap());
    }
}

#[test]
fn a_child_dies_with_its_parent_when_asked_to() {
    let (mut parent, talk) = start("grandparent", "", ChildLimits::default());
    let grandchild: i32 = line(&talk).parse().unwrap();
    let pidfd = shm_os::process::pidfd_open(grandchild).unwrap();
    say(&talk, "go");
    assert!(parent.wait().unwrap().success());
    let poller = Poller::new().unwrap();
    poller.add(&pidfd, 1, Interest::READABLE).unwrap();
    assert_eq!(poller.wait(&mut Vec::new(), Some(SOON)).unwrap(), 1);
}

#[test]
fn killing_a_session_leader_kills_its_family() {
    let (mut child, talk) = start("family", "", ChildLimits { new_session: true, ..Default::default() });
    let member: i32 = line(&talk).parse().unwrap();
    let pidfd = shm_os::process::pidfd_open(member).unwrap();
    child.kill().unwrap();
    let poller = Poller::new().unwrap();
    poller.add(&pidfd, 1, Interest::READABLE).unwrap();
    assert_eq!(poller.wait(&mut Vec::new(), Some(SOON)).unwrap(), 1);
    child.wait().unwrap();
    child.kill().unwrap();
}

#[test]
fn a_fault_outside_registered_ranges_still_kills() {
    let limits = ChildLimits { no_core_dump: true, ..Default::default() };
    let (mut child, talk) = start("unregistered_sigbus", "", limits);
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGBUS), "{status}");
    assert_eq!(line(&talk), "");
}

#[test]
fn nothing_stays_after_images_lanes_and_connections() {
    // A round first: lazily made things (thread-locals, the handler's page) count from then on.
    let round = || {
        let mut writer = SealedMemfd.reserve(&ImageKey::new("x").unwrap(), 1 << 16).unwrap();
        writer.window()[0] = 1;
        let image = writer.publish().unwrap();
        let (a, b) = (image.map().unwrap(), image.map().unwrap());
        let region = memfd::create_lane_region(8192).unwrap();
        let lane = SharedMapping::map_lane(region.as_fd(), 8192).unwrap();
        let inode = |fd: &OwnedFd| File::from(fd.try_clone().unwrap()).metadata().unwrap().ino();
        let inodes = [inode(&image.fd_read_only), inode(&region)];
        for inode in inodes {
            assert!(smaps::memory_by_inode(std::process::id(), inode).unwrap().1 > 0);
        }
        drop((a, b, lane, image, region));
        inodes
    };
    let pid = std::process::id();
    let open_inodes = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links
            .filter_map(|link| std::fs::metadata(link.path()).ok())
            .map(|meta| meta.ino())
            .collect::<Vec<_>>()
    };
    for _ in 0..3 {
        for inode in round() {
            assert_eq!(smaps::memory_by_inode(pid, inode).unwrap().1, 0, "no mapping of it");
            assert!(!open_inodes().contains(&inode), "no descriptor of it");
        }
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"x", 0).unwrap();
}
