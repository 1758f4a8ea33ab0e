//! The loader of the tests. The model's name is `WHAT` or `WHAT:ID`: what it does, and which canonical id it reports.
//! Each start adds a line to `FOLDER/loads`.

use crate::LONG;
use shm_layout::code::Code;
use shm_layout::image::{
    Family, HEADER_BYTES, HeaderValues, Isa, PAGE_ALIGN_BYTES, Pooling, Precision, SECTION_ENTRY_BYTES,
    TENSOR_ENTRY_BYTES, Task,
};
use shm_layout::wire::{BackingKind, FromLoader, LoadProgress, TaskFacts};
use shm_os::framed::FramedStream;
use shm_os::memfd::{create_writable_image, seal_image};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

pub(crate) fn run(folder: &Path, model: &str, mut link: FramedStream) -> ExitCode {
    let mut log =
        OpenOptions::new().append(true).create(true).open(folder.join("loads")).expect("a log of loads");
    writeln!(log, "{model} {}", std::process::id()).expect("room in the log");
    let (what, model_id) = model.split_once(':').unwrap_or((model, model));
    let raw_link = link.as_fd().try_clone_to_owned().expect("a copy of the link");
    let mut say = |message: &FromLoader, fds: Vec<OwnedFd>| {
        if let Err(error) = link.send(0, message, fds, LONG) {
            eprintln!("fake loader: {error}");
            std::process::exit(0);
        }
    };
    let progress = |stage: &str, done_bytes| {
        FromLoader::Progress(LoadProgress { stage: stage.into(), done_bytes, total_bytes: 100 })
    };
    say(&progress("compile", 1), vec![]);
    let first = !folder.join("been-here").exists();
    match what {
        "crash" => std::process::abort(),
        "crash-once" if first => {
            File::create(folder.join("been-here")).expect("a mark");
            std::process::abort()
        }
        "quits" => return ExitCode::from(17),
        "missing" => {
            let message = "looked in A and B; set MODEL_CACHE_DIR".to_owned();
            say(&FromLoader::Failed { code: Code::ModelNotFound, message }, vec![]);
            return ExitCode::SUCCESS;
        }
        "garbage" => {
            std::os::unix::net::UnixStream::from(raw_link).write_all(&[0xa5; 100]).expect("room for garbage");
            std::thread::sleep(LONG);
        }
        // A load of unknown length: until the test says so.
        "waits" => {
            while !folder.join("go").exists() {
                std::thread::sleep(Duration::from_millis(1));
            }
            say(&progress("verify", 99), vec![]);
        }
        "never" => std::thread::sleep(LONG),
        "spins" => loop {
            std::hint::spin_loop();
        },
        "eats-memory" => {
            let hog = vec![1u8; 8 << 30];
            assert!(hog[hog.len() / 2] == 1);
        }
        _ => {}
    }
    let (header, total) = header();
    let image_bytes = if what == "lying" { total + 1 } else { total };
    let fd = create_writable_image(total).expect("a memory object");
    let file = File::from(fd);
    let header = if what == "corrupt" { [0; HEADER_BYTES] } else { header };
    file.write_all_at(&header, 0).expect("room for a header");
    let fd = OwnedFd::from(file);
    if what != "unsealed" {
        seal_image(fd.as_fd()).expect("it is not mapped");
    }
    let fds = if what == "bare" { vec![] } else { vec![fd] };
    let backing = BackingKind::SealedMemfd;
    say(
        &FromLoader::Loaded {
            model_id: model_id.into(),
            image_bytes,
            backing,
            facts: TaskFacts::of(Task::Embed),
        },
        fds,
    );
    ExitCode::SUCCESS
}

fn header() -> ([u8; HEADER_BYTES], u64) {
    let sections_offset = HEADER_BYTES as u64;
    let directory_offset = sections_offset + SECTION_ENTRY_BYTES as u64;
    let names_offset = directory_offset + TENSOR_ENTRY_BYTES as u64;
    let data_offset = (names_offset + 64).next_multiple_of(PAGE_ALIGN_BYTES);
    let total_bytes = data_offset + PAGE_ALIGN_BYTES;
    let values = HeaderValues {
        total_bytes,
        content_hash: [3; 32],
        family: Family::Bert,
        task: Task::Embed,
        precision: Precision::F32,
        isa: Isa::Any,
        pooling: Pooling::MEAN,
        normalize: true,
        lower_case: true,
        hidden_dim: 384,
        output_dim: 384,
        max_seq_tokens: 256,
        vocab_size: 30522,
        layer_count: 6,
        section_count: 1,
        sections_offset,
        tensor_count: 1,
        directory_offset,
        names_offset,
        names_bytes: 64,
        data_offset,
    };
    (values.encode(), total_bytes)
}
