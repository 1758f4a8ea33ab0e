//! A program for the broker's tests: a broker with given limits, an engine and a loader that do as they are told and
//! speak the real frames. Computes nothing, loads nothing.
//!
//! | first argument | what it is |
//! |---|---|
//! | `serve FOLDER [name=value…]` | a broker on `FOLDER/run/socket` whose children are this program |
//! | `engine FOLDER --link-fd 3` | an engine; `FOLDER/engine` may hold how it misbehaves, jobs say what they want |
//! | `client FOLDER` | a client with a lease and a lane, whose own child keeps its socket open when it is killed |
//! | `loader FOLDER --link-fd 3 --model NAME …` | a loader; the model's name says what it does |
#![forbid(unsafe_code)]

mod fake_engine;
mod fake_loader;

use broker::{BrokerConfig, BrokerError, Limits};
use shm_layout::wire::{Acquire, BrokerMessage, ClientMessage, Hello, PROTOCOL_MAJOR};
use shm_os::framed::FramedStream;
use shm_os::process::take_inherited;
use shm_os::socket::{AllowedPeer, connect};
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Longer than any test.
const LONG: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = PathBuf::from(arguments.get(1).map_or(".", String::as_str));
    match arguments.first().map(String::as_str) {
        Some("serve") => serve(&folder, &arguments[2..]),
        Some("engine") => fake_engine::run(&folder, link()),
        Some("loader") => {
            let model = arguments.iter().skip_while(|a| *a != "--model").nth(1).expect("a model is named");
            fake_loader::run(&folder, model, link())
        }
        Some("client") => hold_a_lease(&folder),
        _ => panic!("see the head of this file"),
    }
}

/// The link that the broker gives its children, as number 3.
fn link() -> FramedStream {
    FramedStream::new(take_inherited(3).expect("the broker passes the link")).expect("the link is a socket")
}

fn hold_a_lease(folder: &Path) -> ExitCode {
    let connection =
        connect(&folder.join("run/socket"), LONG, AllowedPeer::SameUser).expect("the broker listens");
    let copy = connection.as_fd().try_clone_to_owned().expect("a copy");
    let mut stream = FramedStream::new(connection.into()).expect("a stream");
    let hello = Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: 0,
        layout_hash: shm_layout::lane::LAYOUT_HASH,
        client_name: "forks".into(),
    };
    stream.send(1, &ClientMessage::Hello(hello), vec![], LONG).expect("sent");
    let wish = Acquire { model: "m".into(), want_lane: true, want_image: true, wait_ms: 60_000 };
    stream.send(2, &ClientMessage::Acquire(wish), vec![], LONG).expect("sent");
    loop {
        let (_, message) = stream.receive::<BrokerMessage>(LONG).expect("a frame").expect("in time");
        match message {
            BrokerMessage::Welcome(_) | BrokerMessage::Progress(_) => {}
            BrokerMessage::Leased(_) => break,
            other => panic!("no lease but {other:?}"),
        }
    }
    // The heir holds the socket for as long as the test holds the pipe that it reads.
    let mut heir = std::process::Command::new("cat").stdout(copy).spawn().expect("cat");
    println!("holding");
    std::io::stdout().flush().expect("stdout is a pipe to the test");
    let _ = heir.wait();
    ExitCode::SUCCESS
}

fn serve(folder: &Path, settings: &[String]) -> ExitCode {
    let this = std::env::current_exe().expect("this program has a path").into_os_string();
    let child =
        |kind: &str| -> Vec<OsString> { vec![this.clone(), kind.into(), folder.as_os_str().to_owned()] };
    let mut config = BrokerConfig::new(
        folder.join("run/socket"),
        folder.join("cache"),
        "default-model".into(),
        child("engine"),
        child("loader"),
    );
    for setting in settings {
        let (name, value) = setting.split_once('=').expect("name=value");
        set(&mut config, name, value);
    }
    config.on_ready = Some(Box::new(|| {
        println!("ready");
        std::io::stdout().flush().expect("stdout is a pipe to the test");
    }));
    match broker::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::from(if matches!(error, BrokerError::AlreadyRunning { .. }) { 3 } else { 4 })
        }
    }
}

fn set(config: &mut BrokerConfig, name: &str, value: &str) {
    let number = || value.parse::<usize>().expect("a number");
    let ms = || Duration::from_millis(value.parse().expect("a number of ms"));
    let limits: &mut Limits = &mut config.limits;
    match name {
        "max_sessions" => limits.max_sessions = number(),
        "max_leases_per_session" => limits.max_leases_per_session = number(),
        "max_lanes" => limits.max_lanes = number(),
        "max_session_jobs" => limits.max_session_jobs = number(),
        "outgoing_stall_ms" => limits.outgoing_stall = ms(),
        "outgoing_queue_bytes" => limits.outgoing_queue_bytes = number(),
        "half_frame_ms" => limits.half_frame_timeout = ms(),
        "hello_ms" => limits.hello_timeout = ms(),
        "load_timeout_ms" => limits.load_timeout = ms(),
        "loader_address_space_bytes" => limits.loader_address_space_bytes = number() as u64,
        "loader_cpu_seconds" => limits.loader_cpu_seconds = number() as u64,
        "drain_ms" => limits.drain_timeout = ms(),
        "engine_start_ms" => limits.engine_start_timeout = ms(),
        "idle_exit_ms" => config.idle_exit = Some(ms()),
        "engine_program" => config.engine_command[0] = value.into(),
        "socket" => config.socket_path = value.into(),
        other => panic!("no setting {other}"),
    }
}
