//! The engine of the tests. A job's payload says what becomes of it; `FOLDER/engine`, read at the start, says how the
//! engine as a whole misbehaves.

use crate::LONG;
use shm_layout::code::Code;
use shm_layout::wire::{AnswerFrame, EngineTotals, FromEngine, ToEngine};
use shm_os::framed::{FramedError, FramedStream};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

struct Engine {
    link: FramedStream,
    mode: String,
    models: BTreeMap<u64, OwnedFd>,
    lanes: BTreeMap<u64, Vec<OwnedFd>>,
    /// Jobs that were begun and are answered when told so.
    held: BTreeSet<u64>,
    jobs: u64,
}

pub(crate) fn run(folder: &Path, link: FramedStream) -> ExitCode {
    let mode = std::fs::read_to_string(folder.join("engine")).unwrap_or_default();
    let mode = mode.trim().to_owned();
    if mode == "dies-at-start" {
        return ExitCode::from(9);
    }
    let mut engine = Engine {
        link,
        mode,
        models: BTreeMap::new(),
        lanes: BTreeMap::new(),
        held: BTreeSet::new(),
        jobs: 0,
    };
    if engine.mode != "never-ready" {
        engine.say(&FromEngine::Ready { threads: 3 });
    }
    loop {
        match engine.link.receive::<ToEngine>(LONG) {
            Ok(Some((_, ToEngine::Drain))) if engine.mode != "ignores-drain" => {
                engine.release();
                return ExitCode::SUCCESS;
            }
            Ok(Some((_, message))) => engine.take(message),
            Ok(None) | Err(FramedError::Closed) => return ExitCode::SUCCESS,
            Err(error) => panic!("the broker speaks nonsense: {error}"),
        }
    }
}

impl Engine {
    fn say(&mut self, message: &FromEngine) {
        if let Err(error) = self.link.send(0, message, Vec::new(), LONG) {
            eprintln!("fake engine: {error}");
            std::process::exit(0);
        }
    }

    fn answer(&mut self, relay_id: u64, status: Code, payload: Vec<u8>) {
        self.jobs += 1;
        self.say(&FromEngine::Answer(AnswerFrame {
            job_id: relay_id,
            status,
            payload,
            queue_us: 1,
            execution_us: 2,
        }));
    }

    fn release(&mut self) {
        for relay_id in std::mem::take(&mut self.held) {
            self.answer(relay_id, Code::Ok, b"released".to_vec());
        }
    }

    fn take(&mut self, message: ToEngine) {
        match message {
            ToEngine::LoadModel { generation, cache, .. } => {
                let count = 1 + usize::from(cache.is_some());
                let mut fds = self.link.take_descriptors(count).expect("the image comes with it");
                self.models.insert(generation, fds.remove(0));
                match self.mode.as_str() {
                    "refuses-models" => self.say(&FromEngine::ModelFailed {
                        generation,
                        code: Code::ModelUnsupported,
                        message: "refused by the test".into(),
                    }),
                    "silent-on-models" => {}
                    _ => self.say(&FromEngine::ModelReady { generation }),
                }
            }
            ToEngine::UnloadModel { generation } => {
                self.models.remove(&generation);
                self.say(&FromEngine::ModelUnloaded { generation });
            }
            ToEngine::AddLane { lane_id, generation } => {
                let fds = self.link.take_descriptors(2).expect("region and doorbell come with it");
                assert!(self.models.contains_key(&generation), "a lane of an unknown model");
                shm_os::lane_mapping::LaneMapping::map(fds[0].as_fd()).expect("the region is a lane's");
                assert!(self.lanes.insert(lane_id, fds).is_none(), "a lane twice");
            }
            ToEngine::DropLane { lane_id } => {
                assert!(self.lanes.remove(&lane_id).is_some(), "an unknown lane is dropped");
                self.say(&FromEngine::LaneDropped { lane_id });
            }
            ToEngine::Job { relay_id, generation, attempts, job, .. } => {
                assert!(self.models.contains_key(&generation), "a job of an unknown model");
                self.job(relay_id, attempts, &job.payload);
            }
            ToEngine::CancelJob { relay_id } => {
                if self.held.remove(&relay_id) {
                    self.answer(relay_id, Code::Cancelled, b"cancelled".to_vec());
                }
            }
            ToEngine::Drain => {}
            ToEngine::Probe { generation } => {
                assert!(self.models.contains_key(&generation), "a probe of an unknown model");
                let (code, message) = (Code::Ok, String::new());
                self.say(&FromEngine::Probed { generation, code, message, probe_us: 5 });
            }
            ToEngine::Totals => {
                let queued_jobs = self.held.len() as u32;
                self.say(&FromEngine::Totals(EngineTotals {
                    jobs: self.jobs,
                    queued_jobs,
                    ..EngineTotals::default()
                }));
            }
        }
    }

    fn job(&mut self, relay_id: u64, attempts: u32, payload: &[u8]) {
        let text = String::from_utf8_lossy(payload).into_owned();
        let (verb, rest) = text.split_once(' ').unwrap_or((&text, ""));
        if verb != "unstarted" {
            self.say(&FromEngine::JobStarted { relay_id });
        }
        match verb {
            "echo" => self.answer(relay_id, Code::Ok, rest.into()),
            "hold" | "unstarted" => {
                self.held.insert(relay_id);
            }
            "release" => {
                self.answer(relay_id, Code::Ok, Vec::new());
                self.release();
            }
            "crash" => std::process::abort(),
            "crash-until" if attempts < rest.parse().expect("a number") => std::process::abort(),
            "crash-until" => self.answer(relay_id, Code::Ok, attempts.to_string().into()),
            "pid" => self.answer(relay_id, Code::Ok, std::process::id().to_string().into()),
            "lanes" => {
                let lanes: Vec<String> = self.lanes.keys().map(u64::to_string).collect();
                self.answer(relay_id, Code::Ok, lanes.join(",").into());
            }
            "fill" => self.answer(relay_id, Code::Ok, vec![7; rest.parse().expect("a number")]),
            "fault" => {
                self.say(&FromEngine::LaneFault {
                    lane_id: rest.parse().expect("a lane"),
                    message: "tail beyond capacity".into(),
                });
                self.answer(relay_id, Code::Ok, Vec::new());
            }
            "lingers" => {
                let copy = self.link.as_fd().try_clone_to_owned().expect("a copy of the link");
                std::os::unix::net::UnixStream::from(copy)
                    .shutdown(std::net::Shutdown::Both)
                    .expect("it was open");
                std::thread::sleep(LONG);
            }
            "garbage" => {
                let copy = self.link.as_fd().try_clone_to_owned().expect("a copy of the link");
                std::os::unix::net::UnixStream::from(copy).write_all(&[0xa5; 100]).expect("room for garbage");
            }
            other => self.answer(relay_id, Code::UnsupportedOperation, other.into()),
        }
    }
}
