//! Frames: a stream in pieces of any size, and bodies decoded as every message there is.

use super::reader::Reader;
use shm_layout::code::Code;
use shm_layout::image::Task;
use shm_layout::limits::MAX_FRAME_BODY_BYTES;
use shm_layout::wire::{
    Acquire, Alert, AnswerFrame, BackingKind, BrokerMessage, CacheDescription, CacheInsertKey, CacheReport,
    CacheTotals, ClientMessage, CodeCount, Decode, DurationCounts, Encode, EngineMetrics, EngineReport,
    EngineTotals, FrameBuffer, FromEngine, FromLoader, GenerationReport, HEAD_BYTES, Hello, JobFrame,
    LaneDescription, LastError, Leased, LoadProgress, Metrics, ModelCommand, ModelDescription, ModelDetail,
    ModelOutcome, ModelReport, ModelState, Operation, Priority, ProcessReferences, Provide, ProvidedReport,
    ProvidedTotals, ProviderChildReport, ProviderJob, ProviderReport, Refusal, SessionReport, StatusReport,
    Superseded, ToEngine, UnloadMode, Welcome, decode_body, encode_frame,
};
use shm_layout::wire::{NamedPrompt, TaskFacts};

/// First byte even: the rest is one body. Odd: the rest is a stream, fed in pieces whose sizes the first bytes choose.
pub fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    let shape = input.u8();
    if shape & 1 == 0 {
        bodies(input.rest());
        return;
    }
    let step = usize::from(shape >> 1) + 1;
    let mut buffer = FrameBuffer::new();
    let (mut fed, mut given) = (0, 0);
    while !input.is_empty() {
        let piece = input.take(step);
        fed += piece.len();
        buffer.extend(piece);
        loop {
            match buffer.next_frame() {
                Ok(Some((head, body))) => {
                    assert_eq!(head.body_bytes as usize, body.len());
                    assert!(body.len() <= MAX_FRAME_BODY_BYTES);
                    given += HEAD_BYTES + body.len();
                    bodies(&body);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert_eq!(buffer.pending_bytes(), fed - given);
        assert_eq!(buffer.has_partial_frame(), fed != given);
    }
}

fn bodies(body: &[u8]) {
    round_trip::<ClientMessage>(body);
    round_trip::<BrokerMessage>(body);
    round_trip::<ToEngine>(body);
    round_trip::<FromEngine>(body);
    round_trip::<FromLoader>(body);
}

/// There is one encoding of each message: what decodes, encodes to the same bytes.
fn round_trip<T: Encode + Decode<()>>(body: &[u8]) {
    if let Ok(message) = decode_body::<T>(body) {
        let frame = encode_frame(9, &message).expect("what fitted a frame fits it again");
        assert_eq!(&frame[HEAD_BYTES..], body);
    }
}

fn facts() -> TaskFacts {
    TaskFacts {
        labels: vec!["yes".into(), "no".into()],
        prompts: vec![NamedPrompt { name: "query".into(), text: "query: ".into() }],
        default_prompt: Some("query".into()),
        ..TaskFacts::of(Task::Embed)
    }
}

fn description() -> ModelDescription {
    ModelDescription {
        model_id: "all-MiniLM-L6-v2".into(),
        generation: 1,
        output_dim: 384,
        max_seq_tokens: 256,
        image_bytes: 90 << 20,
        fingerprint: 0x0123_4567_89ab_cdef,
        content_hash: [9; 32],
        backing: BackingKind::SealedMemfd,
        facts: facts(),
    }
}

fn job() -> JobFrame {
    JobFrame {
        lease_id: 2,
        job_id: 3,
        operation: Operation::Embed,
        priority: Priority::Bulk,
        deadline_ns: 5,
        payload: shm_layout::payload::encode_texts(&["hello", "world"]).unwrap_or_default(),
    }
}

fn answer() -> AnswerFrame {
    AnswerFrame {
        job_id: 3,
        status: Code::Overloaded,
        payload: b"busy".to_vec(),
        queue_us: 1,
        execution_us: 2,
    }
}

fn progress() -> LoadProgress {
    LoadProgress { stage: "compile".into(), done_bytes: 1, total_bytes: 2 }
}

fn status() -> StatusReport {
    StatusReport {
        version: "0.1.0".into(),
        broker_pid: 10,
        boot_id: 11,
        uptime_us: 12,
        default_model: "m".into(),
        models: vec![ModelReport {
            model_id: "m".into(),
            state: ModelState::Ready,
            description: Some(description()),
            load_us: 1,
            leases: 1,
            lease_pids: vec![20, 21],
            loads: 1,
            idle_us: 0,
            error: Some("e".into()),
            cache: Some(CacheReport {
                entries: 1,
                capacity: 2,
                region_bytes: 3,
                totals: CacheTotals::default(),
            }),
            detail: detail(),
        }],
        engines: vec![EngineReport {
            pid: 30,
            incarnation: 1,
            restarts: 0,
            lanes: 1,
            threads: 2,
            totals: EngineTotals { jobs: 1, texts: 2, tokens: 3, errors: 4, queued_jobs: 5 },
        }],
        sessions: vec![SessionReport {
            session_id: 1,
            pid: 20,
            client_name: "c".into(),
            leases: 1,
            lanes: 1,
            socket_jobs: 0,
            age_us: 1,
        }],
        faults: 0,
        open_descriptors: 9,
        provided: vec![ProvidedReport {
            model_id: "custom/x".into(),
            generation: 1 << 63,
            kind: "k".into(),
            description: "d".into(),
            input_kind: "i".into(),
            output_kind: "o".into(),
            operations: vec![Operation::Call],
            output_dim: 0,
            fingerprint: 3,
            providers: vec![ProviderReport {
                session_id: 1,
                pid: 2,
                in_flight: 3,
                max_in_flight: 4,
                faults: 5,
                withdrawn: false,
            }],
            leases: 1,
            lease_pids: vec![7],
            queued_jobs: 0,
            absent_us: 0,
            totals: ProvidedTotals::default(),
            last_fault: Some("f".into()),
            children: vec![ProviderChildReport { pid: 2, starts: 1, last_exit: None }],
        }],
        metrics: Box::new(Metrics {
            load: durations(),
            errors: vec![CodeCount { code: Code::Overloaded, count: 3 }],
            ..Metrics::default()
        }),
        alerts: vec![Alert {
            name: "memory".into(),
            severity: "warning".into(),
            message: "x".into(),
            age_us: 1,
        }],
    }
}

fn offer() -> Provide {
    Provide {
        model_id: "custom/x".into(),
        kind: "k".into(),
        description: "d".into(),
        input_kind: "i".into(),
        output_kind: "o".into(),
        fingerprint: 3,
        operations: vec![Operation::Call, Operation::Embed],
        output_dim: 4,
        max_seq_tokens: 0,
        max_in_flight: 2,
        max_input_bytes: 100,
        max_output_bytes: 100,
        job_timeout_ms: 1000,
    }
}

fn durations() -> DurationCounts {
    DurationCounts { counts: vec![0, 1, 2], sum_us: 7 }
}

fn detail() -> ModelDetail {
    ModelDetail {
        ids: vec!["embedding".into()],
        kind: Some("embedding".into()),
        last_error: Some(LastError { code: Code::OutOfMemory, message: "x".into(), age_us: 2 }),
        generations: vec![GenerationReport {
            generation: 1,
            image_bytes: 2,
            backing: BackingKind::SealedMemfd,
            is_current: true,
            is_served: false,
            leases: 1,
            age_us: 3,
        }],
        references: vec![ProcessReferences { pid: 20, count: 1 }],
        ..ModelDetail::default()
    }
}

fn client_messages() -> Vec<(&'static str, ClientMessage)> {
    let hello = Hello { protocol_major: 2, protocol_minor: 0, layout_hash: 7, client_name: "worker".into() };
    let acquire = Acquire { model: "m".into(), want_lane: true, want_image: false, wait_ms: 1000 };
    vec![
        ("hello", ClientMessage::Hello(hello)),
        ("acquire", ClientMessage::Acquire(acquire)),
        ("release", ClientMessage::Release { lease_id: 2 }),
        ("submit", ClientMessage::Submit(job())),
        ("cancel", ClientMessage::Cancel { job_id: 3 }),
        ("status", ClientMessage::Status),
        ("shutdown", ClientMessage::Shutdown { drain_ms: 5000 }),
        ("ping", ClientMessage::Ping),
        ("provide", ClientMessage::Provide(offer())),
        ("provider-answer", ClientMessage::ProviderAnswer(answer())),
        ("withdraw", ClientMessage::Withdraw { model_id: "custom/x".into() }),
        ("model-reload", ClientMessage::Model(ModelCommand::Reload { model: "m".into(), wait_ms: 5 })),
        (
            "model-unload",
            ClientMessage::Model(ModelCommand::Unload { model: "m".into(), mode: UnloadMode::Force }),
        ),
    ]
}

fn broker_messages() -> Vec<(&'static str, BrokerMessage)> {
    let welcome = Welcome {
        protocol_major: 2,
        protocol_minor: 0,
        session_id: 1,
        boot_id: 2,
        broker_pid: 3,
        version: "0.1.0".into(),
    };
    let lane = Some(LaneDescription { lane_id: 1, region_bytes: 1 << 24 });
    vec![
        ("welcome", BrokerMessage::Welcome(welcome)),
        (
            "refused",
            BrokerMessage::Refused(Refusal {
                code: Code::TooMany,
                message: "too many leases".into(),
                retry_after_ms: 0,
            }),
        ),
        (
            "leased",
            BrokerMessage::Leased(Leased {
                lease_id: 2,
                model: description(),
                lane,
                image: true,
                cache: Some(CacheDescription { region_bytes: 4096 }),
            }),
        ),
        ("released", BrokerMessage::Released),
        ("progress", BrokerMessage::Progress(progress())),
        ("answer", BrokerMessage::Answer(answer())),
        ("status-report", BrokerMessage::Status(status())),
        ("shutting-down", BrokerMessage::ShuttingDown),
        ("provided", BrokerMessage::Provided { generation: 1 << 63 }),
        (
            "provider-job",
            BrokerMessage::ProviderJob(ProviderJob {
                relay_id: 1,
                generation: 1 << 63,
                operation: Operation::Call,
                priority: Priority::Interactive,
                deadline_ns: 0,
                attempts: 0,
                payload: vec![1, 2],
            }),
        ),
        ("provider-cancel", BrokerMessage::ProviderCancel { relay_id: 1 }),
        ("withdrawn", BrokerMessage::Withdrawn),
        (
            "model-reloaded",
            BrokerMessage::Model(ModelOutcome::Reloaded { model: description(), replaced: 1, load_us: 2 }),
        ),
        ("superseded", BrokerMessage::Superseded(Superseded { lease_id: 2, generation: 3 })),
    ]
}

fn child_messages() -> Vec<(&'static str, Vec<u8>)> {
    let backing = BackingKind::ImageFile;
    let to_engine = [
        ("load-model", ToEngine::LoadModel { generation: 1, image_bytes: 2, backing, cache: None }),
        ("add-lane", ToEngine::AddLane { lane_id: 1, generation: 2 }),
        ("job", ToEngine::Job { relay_id: 1, session_id: 2, generation: 3, attempts: 0, job: job() }),
        ("drain", ToEngine::Drain),
        ("probe", ToEngine::Probe { generation: 1 }),
    ];
    let from_engine = [
        ("ready", FromEngine::Ready { threads: 2 }),
        (
            "model-failed",
            FromEngine::ModelFailed { generation: 1, code: Code::BadResult, message: "nan".into() },
        ),
        ("engine-answer", FromEngine::Answer(answer())),
        ("totals", FromEngine::Totals(EngineTotals::default())),
        (
            "probed",
            FromEngine::Probed { generation: 1, code: Code::BadResult, message: "x".into(), probe_us: 2 },
        ),
        (
            "metrics",
            FromEngine::Metrics(EngineMetrics {
                queue: durations(),
                execution: durations(),
                errors: vec![CodeCount { code: Code::BadPayload, count: 1 }],
            }),
        ),
        (
            "cache-insert",
            FromEngine::CacheInsert {
                generation: 1,
                bulk: true,
                keys: vec![CacheInsertKey { low: 1, high: 2, left_ms: 0 }],
                values: vec![0, 0, 128, 63],
            },
        ),
    ];
    let from_loader = [
        ("loader-progress", FromLoader::Progress(progress())),
        ("loaded", FromLoader::Loaded { model_id: "m".into(), image_bytes: 3, backing, facts: facts() }),
        ("failed", FromLoader::Failed { code: Code::DiskFull, message: "full".into() }),
    ];
    let mut out = Vec::new();
    out.extend(to_engine.into_iter().map(|(name, m)| (name, frame(&m))));
    out.extend(from_engine.into_iter().map(|(name, m)| (name, frame(&m))));
    out.extend(from_loader.into_iter().map(|(name, m)| (name, frame(&m))));
    out
}

fn frame<T: Encode>(message: &T) -> Vec<u8> {
    encode_frame(1, message).unwrap_or_default()
}

/// Inputs to start from: every message as a body, streams in small pieces, and cut or lying heads.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut frames: Vec<(&str, Vec<u8>)> = Vec::new();
    frames.extend(client_messages().into_iter().map(|(name, m)| (name, frame(&m))));
    frames.extend(broker_messages().into_iter().map(|(name, m)| (name, frame(&m))));
    frames.extend(child_messages());
    let mut seeds = Vec::new();
    let mut stream = vec![7];
    for (name, frame) in &frames {
        seeds.push((format!("body-{name}"), [&[0][..], &frame[HEAD_BYTES..]].concat()));
        stream.extend_from_slice(frame);
    }
    seeds.push(("stream-of-all".into(), stream));
    if let Some((_, hello)) = frames.first() {
        seeds.push(("stream-byte-by-byte".into(), [&[1][..], hello].concat()));
        seeds.push(("stream-cut".into(), [&[255][..], &hello[..20]].concat()));
        let mut lying = [&[255][..], hello].concat();
        lying[5..9].fill(0xff);
        seeds.push(("stream-lying-length".into(), lying));
    }
    seeds
}
