//! Clients that die, lie, dawdle or are too many: each is felt by itself alone.

use crate::client::{Client, hello};
use crate::process::{Broker, CHILD, SIGKILL, ended, serve, signal, temp, until};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, ClientMessage, Hello, encode_frame};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

#[test]
fn a_dead_client_leaves_no_lease_lane_or_descriptor() {
    let broker = Broker::start(&[]);
    let mut watcher = broker.client();
    watcher.lease();
    ended(broker.loads()[0].split_once(' ').unwrap().1.parse().unwrap());
    let before = watcher.status();
    for round in 0..3 {
        let clients: Vec<Client> = (0..10)
            .map(|n| {
                let mut client = broker.client();
                for _ in 0..3 {
                    let request = client.asks_for("m", true, true, 60_000);
                    client.granted(request);
                }
                let lease = client.lease();
                client.submit(lease, "hold");
                if n % 2 == round % 2 {
                    client.raw(b"MBF1 half a frame"[..7].into());
                }
                client
            })
            .collect();
        until(&mut watcher, "all there", |r| {
            r.engines[0].lanes == 30 && r.engines[0].totals.queued_jobs == 10
        });
        drop(clients);
        let after = until(&mut watcher, "all gone", |r| {
            r.sessions.len() == 1 && r.engines[0].lanes == 0 && r.engines[0].totals.queued_jobs == 0
        });
        assert_eq!(after.models[0].leases, 1);
        assert_eq!(after.open_descriptors, before.open_descriptors);
        assert_eq!(after.faults, 0);
    }
}

#[test]
fn a_killed_client_is_noticed_though_its_child_holds_the_socket() {
    let broker = Broker::start(&[]);
    let mut watcher = broker.client();
    let mut client = Command::new(CHILD)
        .arg("client")
        .arg(&broker.folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "holding\n");
    let report = watcher.status();
    assert_eq!((report.sessions.len(), report.engines[0].lanes), (2, 1));
    assert_eq!(report.models[0].lease_pids, [client.id()]);
    signal(client.id(), SIGKILL);
    // Its heir reads our pipe and keeps the socket open until the pipe is closed, after this.
    until(&mut watcher, "session gone", |r| r.sessions.len() == 1 && r.engines[0].lanes == 0);
    client.wait().unwrap();
}

#[test]
fn whoever_breaks_the_protocol_is_told_why_and_closed() {
    let broker = Broker::start(&["half_frame_ms=40", "hello_ms=40"]);
    let mut other = broker.client();
    let socket = broker.socket();
    let mut faults = 0;
    let mut faulty = |prepare: &dyn Fn(&mut Client), open: bool, code: Code, says: &str| {
        let mut client = if open { Client::open(&socket) } else { Client::connect(&socket) };
        prepare(&mut client);
        let message = client.is_refused_and_closed(code);
        assert!(message.contains(says), "{message}");
        faults += 1;
    };
    faulty(&|c| c.raw(b"GET / HTTP/1.1\r\n\r\n"), true, Code::BadFrame, "not a modelbroker frame");
    let mut long = encode_frame(1, &ClientMessage::Ping).unwrap();
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    faulty(&|c| c.raw(&long), true, Code::BadFrame, "the limit is");
    let mut unknown = encode_frame(1, &ClientMessage::Ping).unwrap();
    unknown[16] = 99;
    faulty(&|c| c.raw(&unknown), true, Code::BadFrame, "decoded");
    faulty(
        &|c| {
            c.ask(ClientMessage::Ping);
        },
        false,
        Code::BadState,
        "must be Hello",
    );
    faulty(
        &|c| {
            c.ask(ClientMessage::Hello(hello()));
        },
        true,
        Code::BadState,
        "once",
    );
    let whole = encode_frame(1, &ClientMessage::Ping).unwrap();
    faulty(&|c| c.raw(&whole[..10]), true, Code::BadFrame, "not completed");
    faulty(&|c| c.raw(&whole[..17]), true, Code::BadFrame, "not completed");
    faulty(&|_| {}, false, Code::BadState, "no Hello");
    let with_descriptor = |c: &mut Client| {
        let fd = c.stream.as_fd().try_clone_to_owned().unwrap();
        c.stream.send(9, &ClientMessage::Ping, vec![fd], crate::process::LONG).unwrap();
    };
    faulty(&with_descriptor, true, Code::BadFrame, "descriptors");
    assert_eq!(other.status().faults, faults);
    assert_eq!(other.status().sessions.len(), 1);
}

#[test]
fn another_version_is_refused_by_name() {
    let broker = Broker::start(&[]);
    for (hello, code) in [
        (Hello { protocol_major: 99, ..hello() }, Code::ProtocolVersion),
        (Hello { layout_hash: 1, ..hello() }, Code::LayoutMismatch),
    ] {
        let mut client = Client::connect(&broker.socket());
        client.ask(ClientMessage::Hello(hello));
        client.is_refused_and_closed(code);
    }
    let mut client = Client::connect(&broker.socket());
    let request = client.ask(ClientMessage::Hello(Hello { layout_hash: 0, ..hello() }));
    assert!(matches!(client.reply(request), BrokerMessage::Welcome(_)));
    let request = client.asks_for("m", true, false, 1000);
    assert_eq!(client.refusal(request).code, Code::LayoutMismatch);
    client.lease();
}

#[test]
fn a_client_that_never_reads_is_dropped_alone() {
    let broker = Broker::start(&["outgoing_queue_bytes=100000", "outgoing_stall_ms=50"]);
    let mut other = broker.client();
    let mut mute = broker.client();
    let lease = mute.lease();
    // Far more than fits the queue and the socket's buffer together.
    for n in 0..40 {
        if mute.try_submit(lease, "fill 100000").is_err() {
            break;
        }
        if n % 8 == 0 {
            other.pings();
        }
    }
    until(&mut other, "mute client gone", |r| r.sessions.len() == 1);
    other.pings();
}

#[test]
fn a_slow_reader_gets_everything() {
    let broker = Broker::start(&["outgoing_queue_bytes=100000"]);
    let mut slow = broker.client();
    let lease = slow.lease();
    let requests: Vec<u64> = (0..40).map(|_| slow.submit(lease, "fill 100000").0).collect();
    let mut other = broker.client();
    until(&mut other, "queue full", |r| r.engines[0].totals.jobs >= 3);
    for request in requests {
        assert_eq!(slow.answer(request).payload.len(), 100_000);
    }
    slow.pings();
}

#[test]
fn a_flood_of_requests_is_read_no_faster_than_it_is_answered() {
    let broker = Broker::start(&["outgoing_queue_bytes=100000"]);
    let mut other = broker.client();
    let mut flooder = broker.client();
    let peak_kb = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before_kb = peak_kb();
    let copy = flooder.stream.as_fd().try_clone_to_owned().unwrap();
    const PINGS: usize = 100_000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The descriptor does not block, as the reader's does not: full means try again.
            let flood = encode_frame(1, &ClientMessage::Ping).unwrap().repeat(1000);
            let mut stream = std::os::unix::net::UnixStream::from(copy);
            for _ in 0..PINGS / 1000 {
                let mut rest = &flood[..];
                while !rest.is_empty() {
                    match std::io::Write::write(&mut stream, rest) {
                        Ok(count) => rest = &rest[count..],
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                            std::thread::yield_now()
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
        scope.spawn(|| (0..PINGS).for_each(|_| assert_eq!(flooder.reply(1), BrokerMessage::Pong)));
        (0..20).for_each(|_| other.pings());
    });
    let grown_kb = peak_kb() - before_kb;
    assert!(grown_kb < 1200, "the broker grew by {grown_kb} KiB");
}

#[test]
fn too_many_sessions_are_refused_until_one_ends() {
    let broker = Broker::start(&["max_sessions=4"]);
    let mut clients: Vec<Client> = (0..4).map(|_| broker.client()).collect();
    Client::connect(&broker.socket()).is_refused_and_closed(Code::TooMany);
    clients.pop();
    until(&mut clients[0], "one gone", |r| r.sessions.len() == 3);
    broker.client().pings();
}

#[test]
fn a_session_has_its_limits() {
    let broker = Broker::start(&["max_leases_per_session=3", "max_lanes=2", "max_session_jobs=2"]);
    let mut client = broker.client();
    client.lane();
    let (lease, _) = client.lane();
    let request = client.asks_for("m", true, false, 1000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::TooMany);
    assert!(refusal.message.contains("lanes"), "{}", refusal.message);
    client.lease();
    let request = client.asks_for("m", false, false, 1000);
    assert_eq!(client.refusal(request).code, Code::TooMany);
    for _ in 0..2 {
        client.submit(lease, "hold");
    }
    let (request, _) = client.submit(lease, "echo x");
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::Overloaded);
    assert!(
        refusal.retry_after_ms > 0 && refusal.message.contains("2 jobs of this session"),
        "{}",
        refusal.message
    );
}

#[test]
fn out_of_descriptors_means_refused_and_served_again_later() {
    let temp = temp();
    let real = serve(temp.path(), &[]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 300; exec \"$0\" \"$@\""]).arg(real.get_program()).args(real.get_args());
    limited.stdout(Stdio::piped());
    let mut broker = Broker::spawn(limited, temp.path());
    assert_eq!(broker.line(), "ready");
    let mut first = broker.client();
    first.lease();
    let (mut open, mut refused) = (Vec::new(), 0);
    for _ in 0..200 {
        let mut client = Client::connect(&broker.socket());
        // A refused client may find its Hello already unwanted; what counts is what it reads.
        let said = client.try_ask(ClientMessage::Hello(hello()));
        match client.stream.receive::<BrokerMessage>(crate::process::LONG) {
            Ok(Some((_, BrokerMessage::Welcome(_)))) => open.push(client),
            Ok(Some((_, BrokerMessage::Refused(refusal)))) => {
                assert_eq!(refusal.code, Code::TooMany);
                refused += 1;
            }
            other => panic!("{said:?} {other:?}"),
        }
    }
    assert!(open.len() >= 50 && refused >= 20, "{} {refused}", open.len());
    first.pings();
    open.clear();
    until(&mut first, "room again", |r| r.sessions.len() == 1);
    broker.client().lane();
}
