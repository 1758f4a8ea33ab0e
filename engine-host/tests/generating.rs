//! Text that is generated, with the test as the broker: company, pieces, turns with other work, failures, and the end.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::double::{FINGERPRINT, WRITING_IMAGE_BYTES};
use common::{Broker, Rig};
use shm_layout::code::Code;
use shm_layout::wire::{
    FinishReason, FromEngine, GenerateAnswer, GeneratePrompt, GenerateRequest, GenerateSettings, JobFrame,
    Operation, Partial, Priority, ToEngine, decode_body, encode_body,
};

/// The generation of the model that writes; the rig's own embeds.
const WRITER: u64 = 3;

fn rig() -> Rig {
    let mut rig = Rig::start();
    rig.broker.load_sized(WRITER, WRITING_IMAGE_BYTES);
    rig.broker.expect(|message| *message == FromEngine::ModelReady { generation: WRITER });
    rig
}

fn ask(
    broker: &mut Broker,
    relay_id: u64,
    attempts: u32,
    generation: u64,
    text: &str,
    most: u32,
    stream: bool,
) {
    let settings = GenerateSettings { max_output_tokens: most, ..GenerateSettings::default() };
    let request = GenerateRequest { prompt: GeneratePrompt::Text(text.into()), settings, stream };
    send(broker, relay_id, attempts, generation, encode_body(&request).unwrap(), 0);
}

fn send(
    broker: &mut Broker,
    relay_id: u64,
    attempts: u32,
    generation: u64,
    payload: Vec<u8>,
    deadline_ns: u64,
) {
    let job = JobFrame {
        lease_id: 0,
        job_id: 0,
        operation: Operation::Generate,
        priority: Priority::Interactive,
        deadline_ns,
        payload,
    };
    broker.send(&ToEngine::Job { relay_id, session_id: 1, generation, attempts, job }, vec![]);
}

fn answer(broker: &mut Broker, relay_id: u64) -> GenerateAnswer {
    let (code, payload) = broker.answer(relay_id);
    assert_eq!(code, Code::Ok, "{}", String::from_utf8_lossy(&payload));
    decode_body(&payload).unwrap()
}

#[test]
fn texts_are_written_to_their_end_or_to_the_length() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, WRITER, "to be END", 10, false);
    ask(&mut rig.broker, 2, 0, WRITER, "on and", 5, false);
    let first = answer(&mut rig.broker, 1);
    assert_eq!((first.text.as_str(), first.finish), ("to be END ", FinishReason::Stop));
    assert_eq!((first.prompt_tokens, first.output_tokens, first.fingerprint), (3, 3, FINGERPRINT));
    assert_eq!(first.token_ids, [2, 2, 3]);
    let second = answer(&mut rig.broker, 2);
    assert_eq!((second.text.as_str(), second.finish), ("on and on and on ", FinishReason::Length));
    assert!(!rig.broker.has(|message| matches!(message, FromEngine::Partial(_))), "nobody asked for pieces");
}

#[test]
fn pieces_come_in_order_and_are_the_text() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, WRITER, "one two three", 7, true);
    let mut text = String::new();
    loop {
        let message =
            rig.broker.expect(|message| matches!(message, FromEngine::Partial(_) | FromEngine::Answer(_)));
        match message {
            FromEngine::Partial(Partial { job_id, offset_bytes, text: piece }) => {
                assert_eq!((job_id, offset_bytes), (1, text.len() as u64));
                text += &piece;
            }
            FromEngine::Answer(answer) => {
                assert_eq!(decode_body::<GenerateAnswer>(&answer.payload).unwrap().text, text);
                break;
            }
            _ => unreachable!(),
        }
    }
    assert_eq!(text, "one two three one two three one ");
}

#[test]
fn those_that_come_later_join_and_other_work_has_its_turns() {
    let mut rig = rig();
    let mut client = rig.client(7);
    // The first stands at the gate in its first step; the others come meanwhile.
    ask(&mut rig.broker, 1, 0, WRITER, "GATE", 1, false);
    rig.model.gate.wait_for_arrival();
    let ticket = client.embed(Priority::Interactive, &["a text"]);
    for relay_id in 2..6 {
        ask(&mut rig.broker, relay_id, 0, WRITER, "word", 100, false);
    }
    // What was sent before is read by now.
    rig.broker.send(&ToEngine::Totals, vec![]);
    rig.broker.expect(|message| matches!(message, FromEngine::Totals(_)));
    rig.model.gate.open();
    assert_eq!(client.code(ticket), Code::Ok);
    for relay_id in 1..6 {
        answer(&mut rig.broker, relay_id);
    }
    let steps = rig.model.steps.lock().unwrap().clone();
    assert_eq!(steps[0], 1);
    assert!(steps[1..].iter().all(|together| *together == 4), "{steps:?}");
    assert_eq!(steps.len(), 101);
}

#[test]
fn only_the_one_to_blame_fails() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, WRITER, "GATE", 1, false);
    rig.model.gate.wait_for_arrival();
    ask(&mut rig.broker, 2, 0, WRITER, "good words END", 100, true);
    ask(&mut rig.broker, 3, 0, WRITER, "x PANIC", 100, false);
    ask(&mut rig.broker, 4, 0, WRITER, "x y REFUSE", 100, false);
    rig.broker.send(&ToEngine::Totals, vec![]);
    rig.broker.expect(|message| matches!(message, FromEngine::Totals(_)));
    rig.model.gate.open();
    assert_eq!(answer(&mut rig.broker, 2).text, "good words END ");
    assert_eq!(rig.broker.answer(3).0, Code::Internal);
    assert_eq!(rig.broker.answer(4), (Code::BadPayload, b"asked to refuse".to_vec()));
}

#[test]
fn each_reason_not_to_write_has_its_code() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, 1, "to an embedding model", 5, false);
    assert_eq!(rig.broker.answer(1).0, Code::WrongTask);
    ask(&mut rig.broker, 2, 0, 99, "to nobody", 5, false);
    assert_eq!(rig.broker.answer(2).0, Code::ModelUnavailable);
    ask(&mut rig.broker, 3, 8, WRITER, "killed engines", 5, false);
    assert_eq!(rig.broker.answer(3).0, Code::JobCrashedEngine);
    send(&mut rig.broker, 4, 0, WRITER, vec![0xff; 40], 0);
    assert_eq!(rig.broker.answer(4).0, Code::BadPayload);
    let request = GenerateRequest {
        prompt: GeneratePrompt::Chat(Vec::new()),
        settings: GenerateSettings::default(),
        stream: false,
    };
    send(&mut rig.broker, 5, 0, WRITER, encode_body(&request).unwrap(), 0);
    assert_eq!(rig.broker.answer(5).0, Code::TooLarge);
    let request = GenerateRequest { prompt: GeneratePrompt::Text("a".into()), ..request };
    send(&mut rig.broker, 6, 0, WRITER, encode_body(&request).unwrap(), 1);
    assert_eq!(rig.broker.answer(6).0, Code::DeadlineExceeded);
    // By a lane there is none.
    rig.broker.job(7, 0, Operation::Embed, &["still served"]);
    assert_eq!(rig.broker.answer(7).0, Code::Ok);
}

#[test]
fn a_cancelled_text_ends_at_its_next_token() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, WRITER, "GATE on and on", u32::MAX, false);
    rig.model.gate.wait_for_arrival();
    ask(&mut rig.broker, 2, 0, WRITER, "waits", u32::MAX, false);
    rig.broker.send(&ToEngine::CancelJob { relay_id: 1 }, vec![]);
    rig.broker.send(&ToEngine::CancelJob { relay_id: 2 }, vec![]);
    rig.broker.send(&ToEngine::Totals, vec![]);
    rig.broker.expect(|message| matches!(message, FromEngine::Totals(_)));
    rig.model.gate.open();
    assert_eq!(rig.broker.answer(1).0, Code::Cancelled);
    assert_eq!(rig.broker.answer(2).0, Code::Cancelled);
}

#[test]
fn a_drain_waits_for_texts_under_way() {
    let mut rig = rig();
    ask(&mut rig.broker, 1, 0, WRITER, "GATE and END", 10, false);
    rig.model.gate.wait_for_arrival();
    rig.broker.send(&ToEngine::Drain, vec![]);
    ask(&mut rig.broker, 2, 0, WRITER, "too late", 10, false);
    assert_eq!(rig.broker.answer(2).0, Code::ShuttingDown);
    rig.model.gate.open();
    assert_eq!(answer(&mut rig.broker, 1).text, "GATE and END ");
    assert!(rig.outcome().is_ok());
}
