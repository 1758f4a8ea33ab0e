//! An engine in this process, with the test as its broker and its clients: every answer, refusal and ending.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::double::{DoubleLoader, PANICKING_IMAGE_BYTES, REFUSED_IMAGE_BYTES, spans_of};
use common::{Broker, Client, Rig, check_rows};
use engine_host::{HostError, HostOptions, run_with};
use shm_layout::code::Code;
use shm_layout::lane::{CONTROL_FIELDS, JobRequest, LaneMemory};
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::payload::{decode_token_spans, encode_texts};
use shm_layout::table::offset_of;
use shm_layout::wire::{FromEngine, Operation, Priority, ToEngine};
use shm_os::process::monotonic_ns;
use std::sync::atomic::Ordering;

const INTERACTIVE: Priority = Priority::Interactive;
const BULK: Priority = Priority::Bulk;

#[test]
fn both_routes_give_the_same_answers() {
    let mut rig = Rig::start();
    let mut client = rig.client(7);
    let texts = ["", "one", "grüße an alle", "\u{1f600} and so on"];
    let embed = client.embed(INTERACTIVE, &texts);
    let tokenize = client.try_submit(Operation::Tokenize, BULK, 0, &texts).unwrap();
    rig.broker.job(1, 0, Operation::Embed, &texts);
    rig.broker.job(2, 0, Operation::Tokenize, &texts);
    let (code, by_lane) = client.answer(embed);
    assert_eq!(code, Code::Ok);
    check_rows(&by_lane, &texts);
    assert_eq!(rig.broker.answer(1), (Code::Ok, by_lane));
    rig.broker.expect(|message| *message == FromEngine::JobStarted { relay_id: 1 });
    let (code, by_lane) = client.answer(tokenize);
    assert_eq!(code, Code::Ok);
    let spans = decode_token_spans(&by_lane, &texts).unwrap();
    assert!(spans.iter().zip(texts).all(|(spans, text)| *spans == spans_of(text)));
    assert_eq!(rig.broker.answer(2), (Code::Ok, by_lane));
    rig.broker.send(&ToEngine::Totals, vec![]);
    let totals = rig.broker.expect(|message| matches!(message, FromEngine::Totals(_)));
    let FromEngine::Totals(totals) = totals else { panic!("{totals:?}") };
    assert_eq!((totals.jobs, totals.texts, totals.errors, totals.queued_jobs), (4, 16, 0, 0));
    assert!(totals.tokens > 16);
    assert!(matches!(rig.hang_up(), Err(HostError::BrokerGone)));
}

#[test]
fn bad_jobs_get_their_codes_and_good_ones_beside_them_their_answers() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let mut raw = |payload: &[u8], output_capacity_bytes| {
        let request = JobRequest {
            operation: Operation::Embed,
            priority: INTERACTIVE,
            deadline_ns: 0,
            input: &[payload],
            output_capacity_bytes,
        };
        client.raw(&request).unwrap()
    };
    let mut bad_utf8 = encode_texts(&["ab"]).unwrap();
    *bad_utf8.last_mut().unwrap() = 0xff;
    let cases = [
        (raw(b"abc", 1000), Code::BadPayload),
        (raw(&[], 1000), Code::BadPayload),
        (raw(&[0; 8], 1000), Code::EmptyInput),
        (raw(&bad_utf8, 1000), Code::InvalidUtf8),
        (raw(&encode_texts(&["a"; 9]).unwrap(), 100), Code::OutputTooSmall),
        (raw(b"abc", 5), Code::BadPayload),
        (client.try_submit(Operation::Embed, BULK, 1, &["late"]).unwrap(), Code::DeadlineExceeded),
        (client.embed(BULK, &["NAN"]), Code::BadResult),
        (client.embed(BULK, &["REFUSE"]), Code::BadPayload),
        (client.embed(BULK, &["x", "PANIC"]), Code::Internal),
        (client.embed(BULK, &["fine"]), Code::Ok),
    ];
    for (ticket, expected) in cases {
        let (code, payload) = client.answer(ticket);
        assert_eq!(code, expected);
        if code != Code::Ok {
            let message = String::from_utf8(payload).unwrap();
            assert!(!message.is_empty() && !message.contains('/'), "{message}");
        }
    }
    client.check_vectors();
    // Broken entries of a relayed job.
    rig.broker.job(5, MAX_JOB_ATTEMPTS, Operation::Embed, &["a"]);
    assert_eq!(rig.broker.answer(5).0, Code::JobCrashedEngine);
}

#[test]
fn a_panic_hits_only_the_job_that_causes_it() {
    let mut rig = Rig::start();
    let (mut gate, mut a, mut b) = (rig.client(1), rig.client(2), rig.client(3));
    let held = gate.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    let innocent = a.embed(INTERACTIVE, &["one", "two"]);
    let guilty = b.embed(INTERACTIVE, &["PANIC"]);
    let also_innocent = b.embed(INTERACTIVE, &["three"]);
    rig.model.gate.open();
    assert_eq!(gate.code(held), Code::Ok);
    assert_eq!(a.code(innocent), Code::Ok);
    assert_eq!(b.code(guilty), Code::Internal);
    assert_eq!(b.code(also_innocent), Code::Ok);
    a.check_vectors();
    b.check_vectors();
    let passes = rig.model.passes.lock().unwrap().clone();
    let shared = |pass: &Vec<String>| pass.len() > 1 && pass.contains(&"PANIC".to_owned());
    assert!(passes.iter().any(shared), "it did share a batch: {passes:?}");
    assert!(passes.contains(&vec!["PANIC".to_owned()]), "and the guilty one was found alone: {passes:?}");
}

#[test]
fn interactive_texts_are_computed_in_the_breaks_of_bulk() {
    let mut rig = Rig::start();
    let (mut bulk, mut person) = (rig.client(1), rig.client(2));
    let held = bulk.embed(BULK, &["REST", "much else"]);
    rig.model.gate.wait_for_arrival();
    // On another lane, on the same one, and over the socket; also one that fails there, and one that panics.
    let one = person.embed(INTERACTIVE, &["one"]);
    assert_eq!(person.code(one), Code::Ok);
    let bad = person.embed(INTERACTIVE, &["REFUSE"]);
    assert_eq!(person.code(bad), Code::BadPayload);
    let panics = bulk.embed(INTERACTIVE, &["PANIC"]);
    assert_eq!(bulk.code(panics), Code::Internal);
    let same_lane = bulk.embed(INTERACTIVE, &["two"]);
    assert_eq!(bulk.code(same_lane), Code::Ok);
    rig.broker.job(1, 0, Operation::Embed, &["three"]);
    assert_eq!(rig.broker.answer(1).0, Code::Ok);
    // Bulk waits for its turn.
    let later = person.embed(BULK, &["four"]);
    let last = person.embed(INTERACTIVE, &["five"]);
    assert_eq!(person.code(last), Code::Ok);
    let passes = rig.model.passes.lock().unwrap().concat();
    assert!(!passes.iter().any(|text| text == "REST" || text == "four"), "{passes:?}");
    rig.model.gate.open();
    assert_eq!((bulk.code(held), person.code(later)), (Code::Ok, Code::Ok));
    bulk.check_vectors();
    person.check_vectors();
}

#[test]
fn a_lane_that_breaks_its_rules_while_bulk_is_computed_is_the_only_one_lost() {
    let mut rig = Rig::start();
    let (mut bulk, hostile, mut person) = (rig.client(1), rig.client(2), rig.client(3));
    let held = bulk.embed(BULK, &["REST"]);
    rig.model.gate.wait_for_arrival();
    let tail = offset_of(CONTROL_FIELDS, "submission_tail");
    hostile.lane.memory().store_u32(tail, 77_777, Ordering::Release);
    rig.broker.expect(|message| matches!(message, FromEngine::LaneFault { lane_id: 2, .. }));
    let one = person.embed(INTERACTIVE, &["one"]);
    assert_eq!(person.code(one), Code::Ok);
    rig.model.gate.open();
    assert_eq!(bulk.code(held), Code::Ok);
}

#[test]
fn a_model_that_fails_its_probe_ends_the_engine() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    client.embed(INTERACTIVE, &["BREAK"]);
    assert!(matches!(rig.outcome(), Err(HostError::ModelBroken { .. })));
}

#[test]
fn deadlines_and_cancellations_hold_in_the_queue_and_during_compute() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let soon_ns = monotonic_ns() + 3_000_000;
    // Computed too late, cancelled while computed, expired and cancelled in the queue; one in its right.
    let late = client.try_submit(Operation::Embed, INTERACTIVE, 0, &["GATE"]).unwrap();
    rig.model.gate.wait_for_arrival();
    let queued_late = client.try_submit(Operation::Embed, INTERACTIVE, soon_ns, &["a"]).unwrap();
    let cancelled = client.embed(INTERACTIVE, &["b"]);
    let good = client.try_submit(Operation::Embed, INTERACTIVE, monotonic_ns() + (1 << 40), &["c"]).unwrap();
    rig.broker.job(1, 0, Operation::Embed, &["d"]);
    rig.broker.send(&ToEngine::CancelJob { relay_id: 1 }, vec![]);
    rig.broker.send(&ToEngine::CancelJob { relay_id: 99 }, vec![]);
    assert_eq!(rig.broker.answer(1).0, Code::Cancelled);
    client.lane.cancel(cancelled);
    client.lane.cancel(late);
    while monotonic_ns() < soon_ns {
        std::thread::yield_now();
    }
    rig.model.gate.open();
    assert_eq!(client.code(late), Code::Cancelled);
    assert_eq!(client.code(cancelled), Code::Cancelled);
    assert_eq!(client.code(queued_late), Code::DeadlineExceeded);
    assert_eq!(client.code(good), Code::Ok);
    let passes = rig.model.passes.lock().unwrap().concat();
    assert_eq!(passes, ["GATE", "c"], "what nobody wants is not computed");
}

#[test]
fn a_dropped_lane_is_unmapped_once_its_running_batch_ends() {
    let mut rig = Rig::start();
    let (mut doomed, mut other) = (rig.client(1), rig.client(2));
    let _ = doomed.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    for _ in 0..20 {
        let _ = doomed.embed(INTERACTIVE, &["queued"]);
    }
    let dropped = FromEngine::LaneDropped { lane_id: 1 };
    rig.broker.drop_lane(1);
    assert!(!rig.broker.has(|message| *message == dropped), "the batch still has a job of it");
    drop(doomed);
    rig.model.gate.open();
    rig.broker.expect(|message| *message == dropped);
    let ticket = other.embed(INTERACTIVE, &["x"]);
    assert_eq!(other.code(ticket), Code::Ok);
    rig.broker.drop_lane(2);
    rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id: 2 });
    rig.broker.drop_lane(3);
    rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id: 3 });
    let passes = rig.model.passes.lock().unwrap().concat();
    assert_eq!(passes, ["GATE", "x"], "queued jobs of a dropped lane are not computed");
}

#[test]
fn a_client_that_dies_with_a_full_lane_leaves_the_others_alone() {
    let mut rig = Rig::start();
    let (mut dead, mut alive) = (rig.client(1), rig.client(2));
    let _ = alive.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    while dead.try_submit(Operation::Embed, BULK, 0, &["y"; 8]).is_ok() {}
    drop(dead);
    rig.broker.drop_lane(1);
    rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id: 1 });
    rig.model.gate.open();
    let ticket = alive.embed(BULK, &["z"]);
    assert_eq!(alive.code(ticket), Code::Ok);
    assert!(!rig.model.passes.lock().unwrap().concat().contains(&"y".to_owned()));
}

#[test]
fn a_faulty_client_loses_its_lane_and_nobody_else_does() {
    let mut rig = Rig::start();
    let (bad, mut good) = (rig.client(1), rig.client(2));
    let tail = offset_of(CONTROL_FIELDS, "submission_tail");
    bad.lane.memory().store_u32(tail, 100_000, Ordering::Release);
    bad.bell.ring().unwrap();
    let fault = rig.broker.expect(|message| matches!(message, FromEngine::LaneFault { lane_id: 1, .. }));
    assert!(matches!(fault, FromEngine::LaneFault { message, .. } if message.contains("ran ahead")));
    bad.bell.ring().unwrap();
    let ticket = good.embed(INTERACTIVE, &["x"]);
    assert_eq!(good.code(ticket), Code::Ok);
    rig.broker.drop_lane(1);
    rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id: 1 });
    // A lane that is broken before it is added, and descriptors that are no lane.
    let broken = Client::new(3);
    broken.lane.memory().store_u32(tail, 100_000, Ordering::Release);
    rig.broker.add_lane(&broken, 1);
    rig.broker.expect(|message| matches!(message, FromEngine::LaneFault { lane_id: 3, .. }));
    let null = || std::fs::File::open("/dev/null").unwrap().into();
    rig.broker.send(&ToEngine::AddLane { lane_id: 4, generation: 1 }, vec![null(), null()]);
    rig.broker.expect(|message| matches!(message, FromEngine::LaneFault { lane_id: 4, .. }));
    let ticket = good.embed(INTERACTIVE, &["y"]);
    assert_eq!(good.code(ticket), Code::Ok);
}

#[test]
fn models_come_fail_and_go() {
    let mut rig = Rig::start();
    rig.broker.load_sized(2, REFUSED_IMAGE_BYTES);
    rig.broker.load_sized(3, PANICKING_IMAGE_BYTES);
    for generation in [2, 3] {
        let is =
            |m: &FromEngine| matches!(m, FromEngine::ModelFailed { generation: of, .. } if *of == generation);
        rig.broker.expect(is);
    }
    rig.broker.load(4);
    let (mut with_one, mut with_four, mut with_none) = (rig.client(1), Client::new(2), Client::new(3));
    rig.broker.add_lane(&with_four, 4);
    rig.broker.add_lane(&with_none, 2);
    let ticket = with_none.embed(INTERACTIVE, &["x"]);
    assert_eq!(with_none.code(ticket), Code::ModelUnavailable);
    let running = with_one.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    rig.broker.job(1, 0, Operation::Embed, &["queued"]);
    let unloaded = FromEngine::ModelUnloaded { generation: 1 };
    rig.broker.send(&ToEngine::UnloadModel { generation: 1 }, vec![]);
    assert_eq!(rig.broker.answer(1).0, Code::ModelUnavailable);
    assert!(!rig.broker.has(|message| *message == unloaded), "a batch still uses it");
    rig.model.gate.open();
    assert_eq!(with_one.code(running), Code::Ok);
    rig.broker.expect(|message| *message == unloaded);
    let ticket = with_one.embed(INTERACTIVE, &["x"]);
    assert_eq!(with_one.code(ticket), Code::ModelUnavailable);
    let ticket = with_four.embed(INTERACTIVE, &["x"]);
    assert_eq!(with_four.code(ticket), Code::Ok);
    rig.broker.send(&ToEngine::UnloadModel { generation: 77 }, vec![]);
    rig.broker.expect(|message| *message == FromEngine::ModelUnloaded { generation: 77 });
}

#[test]
fn a_drain_answers_what_was_accepted_and_ends_well() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let mut tickets = vec![client.embed(INTERACTIVE, &["GATE"])];
    rig.model.gate.wait_for_arrival();
    for _ in 0..100 {
        tickets.push(client.embed(BULK, &["a", "b", "c"]));
    }
    rig.broker.job(1, 0, Operation::Embed, &["before"]);
    rig.broker.send(&ToEngine::Drain, vec![]);
    rig.broker.job(2, 0, Operation::Embed, &["after"]);
    assert_eq!(rig.broker.answer(2).0, Code::ShuttingDown);
    let after = client.embed(INTERACTIVE, &["after"]);
    rig.model.gate.open();
    assert_eq!(rig.broker.answer(1).0, Code::Ok);
    for ticket in tickets {
        assert_eq!(client.code(ticket), Code::Ok);
    }
    client.check_vectors();
    assert!(rig.outcome().is_ok());
    client.reap();
    assert!(!client.answers.contains_key(&after), "it waits in the lane for the next engine");
}

#[test]
fn an_idle_engine_drains_at_once_and_a_lost_broker_ends_it_in_the_middle() {
    let mut rig = Rig::start();
    rig.broker.send(&ToEngine::Drain, vec![]);
    assert!(rig.outcome().is_ok());
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let _ = client.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    let model = rig.model.clone();
    assert!(matches!(rig.hang_up(), Err(HostError::BrokerGone)));
    model.gate.open();
}

#[test]
fn suspects_are_computed_alone() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let held = client.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    for (relay_id, attempts) in [(1, 0), (2, 2), (3, 1)] {
        let text = format!("attempts {attempts}");
        rig.broker.job(relay_id, attempts, Operation::Embed, &[&text]);
    }
    // Everything is queued behind the gate once the engine has answered a later message.
    rig.broker.has(|_| false);
    rig.model.gate.open();
    for relay_id in [1, 2, 3] {
        assert_eq!(rig.broker.answer(relay_id).0, Code::Ok);
    }
    assert_eq!(client.code(held), Code::Ok);
    let passes = rig.model.passes.lock().unwrap().clone();
    assert!(passes.contains(&vec!["attempts 2".to_owned()]), "{passes:?}");
}

#[test]
fn one_interactive_text_passes_a_hundred_bulk_jobs_and_clients_take_turns() {
    let mut rig = Rig::start();
    let (mut bulk, mut small, mut person) = (rig.client(1), rig.client(2), rig.client(3));
    let held = person.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    let long = "word ".repeat(60);
    for _ in 0..100 {
        let _ = bulk.embed(BULK, &[long.as_str(); 16]);
    }
    let _ = small.embed(BULK, &["small"]);
    let _ = person.embed(INTERACTIVE, &["person"]);
    rig.model.gate.open();
    assert_eq!(person.code(held), Code::Ok);
    for client in [&mut bulk, &mut small, &mut person] {
        client.wait_for_all();
        client.check_vectors();
    }
    let passes = rig.model.passes.lock().unwrap().clone();
    let first_of = |text: &str| passes.iter().position(|pass| pass.iter().any(|t| t == text)).unwrap();
    let first_bulk = first_of(&long);
    assert!(first_of("person") < first_bulk, "interactive goes first");
    // 100 jobs wait; the small one takes its turn after a quantum of them.
    assert!(first_of("small") <= first_bulk + 2, "{} {first_bulk}", first_of("small"));
}

#[test]
fn many_clients_on_many_threads_get_every_answer_once() {
    let mut rig = Rig::start();
    let clients: Vec<Client> = (1..=6).map(|lane_id| rig.client(lane_id)).collect();
    std::thread::scope(|scope| {
        for mut client in clients {
            scope.spawn(move || {
                let priority = if client.lane_id % 2 == 0 { BULK } else { INTERACTIVE };
                let mut tickets = Vec::new();
                for job in 0..250usize {
                    let texts: Vec<String> =
                        (0..1 + job % 7).map(|text| format!("{} {job} {text}", client.lane_id)).collect();
                    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                    loop {
                        match client.try_submit(Operation::Embed, priority, 0, &texts) {
                            Ok(ticket) => break tickets.push(ticket),
                            Err(_) => client.wait(std::time::Duration::from_millis(50)),
                        };
                    }
                    if job % 5 == 0 {
                        client.reap();
                    }
                }
                client.wait_for_all();
                assert!(tickets.iter().all(|ticket| client.answers[ticket].0 == Code::Ok));
                client.check_vectors();
            });
        }
        for relay_id in 0..200 {
            rig.broker.job(relay_id, 0, Operation::Embed, &["relayed", "twice"]);
        }
        for relay_id in 0..200 {
            let (code, payload) = rig.broker.answer(relay_id);
            assert_eq!(code, Code::Ok);
            check_rows(&payload, &["relayed", "twice"]);
        }
    });
    rig.broker.send(&ToEngine::Totals, vec![]);
    let totals = rig.broker.expect(|message| matches!(message, FromEngine::Totals(_)));
    assert!(matches!(totals, FromEngine::Totals(t) if t.jobs == 1700 && t.queued_jobs == 0), "{totals:?}");
}

#[test]
fn a_drain_ends_when_the_last_waiting_jobs_are_given_up() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let soon_ns = monotonic_ns() + 3_000_000;
    let running = client.embed(INTERACTIVE, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    let expiring = client.try_submit(Operation::Embed, INTERACTIVE, soon_ns, &["a"]).unwrap();
    rig.broker.send(&ToEngine::Drain, vec![]);
    rig.broker.has(|_| false);
    while monotonic_ns() < soon_ns {
        std::thread::yield_now();
    }
    rig.model.gate.open();
    assert_eq!(client.code(running), Code::Ok);
    assert_eq!(client.code(expiring), Code::DeadlineExceeded);
    assert!(rig.outcome().is_ok());
}

#[test]
fn an_engine_takes_many_lanes_that_were_announced_before_it_looked() {
    let (ours, theirs) = shm_os::socket::socketpair().unwrap();
    let mut broker = Broker::new(ours);
    broker.load_sized(1, 1);
    let mut clients: Vec<Client> = (1..=60).map(Client::new).collect();
    for client in &clients {
        broker.add_lane(client, 1);
    }
    let tickets: Vec<_> = clients.iter_mut().map(|client| client.embed(BULK, &["x"])).collect();
    let options = HostOptions { threads: 1, dumpable: true, ..HostOptions::default() };
    let engine = std::thread::spawn(move || run_with(theirs, DoubleLoader::default(), options));
    for (client, ticket) in clients.iter_mut().zip(tickets) {
        assert_eq!(client.code(ticket), Code::Ok);
    }
    drop(broker);
    assert!(matches!(engine.join().unwrap(), Err(HostError::BrokerGone)));
}
