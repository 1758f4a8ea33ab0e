//! The way back in a process that forks. One test, alone in its program: whether a process has computed before it forks counts.

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::path::PathBuf;
use tests::program::workspace;
use tests::running::{Broker, run_folder};
use worker_sdk::{Client, Fallback, SdkError, StartBroker, Way};

fn in_child(work: impl FnOnce()) {
    // SAFETY: the child uses the allocator, which glibc keeps usable across forks, and the SDK, whose use after a fork is what
    // is tested here; it leaves by `exit` and returns to none of the parent's frames.
    match unsafe { fork() }.expect("a process can fork") {
        ForkResult::Parent { child } => {
            assert_eq!(
                waitpid(child, None).expect("a child can be waited for"),
                WaitStatus::Exited(child, 0)
            );
        }
        ForkResult::Child => {
            nix::unistd::alarm::set(60);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            std::process::exit(i32::from(outcome.is_err()));
        }
    }
}

#[test]
fn a_child_loads_for_itself_returns_for_itself_and_never_waits_for_threads_that_are_gone() {
    let folder = run_folder();
    let socket = folder.path().join("b.sock");
    let tiny = workspace().join("tests/parity/tiny/bert_mean");
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fork-cache");
    let builder = Client::builder().socket(&socket).start_broker(StartBroker::Never).cache_dir(&cache);
    let client = builder.fallback(Fallback::Local).connect().expect("no broker is no failure");
    let model = client.model(&tiny.to_string_lossy()).expect("a private model");
    // Mapped, but nothing was computed yet.
    assert_eq!(model.route_in_use(), Way::Private);
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    in_child(|| {
        let rows = model.embed(&["a cat", "a dog"]).expect("the child loads the model for itself");
        assert_eq!(rows.way(), Way::Private);
        let bytes: Vec<u8> = rows.values().iter().flat_map(|value| value.to_le_bytes()).collect();
        std::io::Write::write_all(&mut &writer, &bytes).expect("the pipe has room");
    });
    drop(writer);
    let rows = model.embed(&["a cat", "a dog"]).expect("vectors");
    let mut childs = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut childs).expect("the pipe can be read");
    assert_eq!(childs, rows.values().iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    // The parent has computed: its threads are not in the child, which is told so and does not hang.
    in_child(|| match model.embed(&["a cat"]).expect_err("no threads") {
        SdkError::BothFailed { private, .. } => assert!(private.contains("forked"), "{private}"),
        error => assert!(error.to_string().contains("forked"), "{error}"),
    });
    // With a broker a child has what it needs.
    let arguments = ["--model".into(), tiny.to_string_lossy(), "--cache-dir".into(), cache.to_string_lossy()];
    let broker = Broker::start_in(folder, &arguments.each_ref().map(|argument| argument.as_ref()));
    in_child(|| {
        let there = model.embed(&["a cat", "a dog"]).expect("the child's own session");
        assert_eq!((there.way(), there.values()), (Way::Shared, rows.values()));
    });
    broker.stop();
}
