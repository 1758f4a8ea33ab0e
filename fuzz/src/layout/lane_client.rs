//! The client's end of a lane against an engine that writes what it likes: every job is reaped at most once, and no
//! output is longer than the room that was given.

use super::lane_support::{Guarded, LARGEST_SLOT_BYTES, SMALL, Side, region, scribble};
use super::reader::Reader;
use shm_layout::code::Code;
use shm_layout::lane::{ClientLane, EngineLane, HeapLaneMemory, JobRequest, LaneMemory, Ticket};
use shm_layout::wire::{Operation, Priority};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The input is a program: each byte is a step of the client, of an honest engine, or a write by a dishonest one.
pub fn run(data: &[u8]) {
    let memory = region();
    let mut input = Reader::new(data);
    let Ok(mut client) = ClientLane::new(Guarded::new(&memory, Side::Client), SMALL) else {
        panic!("a fresh region is this layout's");
    };
    let mut outstanding: HashMap<Ticket, usize> = HashMap::new();
    let mut last: Option<Ticket> = None;
    while !input.is_empty() {
        let step = input.u8();
        let choice = usize::from(input.u8());
        match step % 9 {
            0 | 1 => {
                let bytes = [3; LARGEST_SLOT_BYTES + 1];
                let request = JobRequest {
                    operation: Operation::Embed,
                    priority: Priority::Interactive,
                    deadline_ns: 0,
                    input: &[&bytes[..choice % 50]],
                    output_capacity_bytes: choice.wrapping_mul(5) % (LARGEST_SLOT_BYTES + 2),
                };
                let before = client.in_flight();
                match client.submit(&request) {
                    Ok(ticket) => {
                        assert!(outstanding.insert(ticket, request.output_capacity_bytes).is_none());
                        assert_eq!(client.in_flight(), before + 1);
                        last = Some(ticket);
                    }
                    Err(_) => assert_eq!(client.in_flight(), before, "a refusal changes nothing"),
                }
            }
            2 | 3 => {
                let reaped = client.reap(choice, |completion, output| {
                    let room =
                        outstanding.remove(&completion.ticket).expect("reaped once, and only what was asked");
                    assert!(completion.output_bytes <= room);
                    assert_eq!(output.to_vec().len(), completion.output_bytes);
                });
                if reaped.is_err() {
                    // A lane whose engine broke the protocol is not used any further.
                    return;
                }
                assert_eq!(client.in_flight(), outstanding.len());
            }
            4 => {
                client.needs_doorbell();
                let _ = client.has_completions();
                let _ = client.prepare_wait();
            }
            5 => {
                if let Some(ticket) = last {
                    client.cancel(ticket);
                    assert_eq!(client.is_in_flight(ticket), outstanding.contains_key(&ticket));
                }
            }
            6 => honest_engine(&memory, choice),
            7 => forge(&memory, &mut input),
            _ => scribble(&memory, &mut input),
        }
    }
}

fn honest_engine(memory: &Arc<HeapLaneMemory>, choice: usize) {
    let Ok((mut engine, mut jobs)) = EngineLane::adopt(Guarded::new(memory, Side::Engine), SMALL) else {
        return;
    };
    if engine.drain(choice, &mut jobs).is_err() {
        return;
    }
    let output = [9; 32];
    for job in jobs {
        if engine.complete(job, Code::Ok, &output[..choice % 33], 0, 0).is_err() {
            return;
        }
    }
    engine.needs_wake();
}

/// A completion whose fields the input chooses, published.
fn forge(memory: &HeapLaneMemory, input: &mut Reader<'_>) {
    let [_, completions, ..] = SMALL.table_offsets();
    let position = input.word();
    let mut entry = Vec::new();
    entry.extend_from_slice(&u64::from(input.word()).to_le_bytes());
    entry.extend_from_slice(&position.to_le_bytes());
    for _ in 0..5 {
        entry.extend_from_slice(&input.word().to_le_bytes());
    }
    memory.write(completions + 64 * (position as usize % SMALL.jobs), &entry);
    memory.store_u32(640, position.wrapping_add(1), Ordering::Release);
}

/// Inputs to start from.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let submit = [0, 10];
    let reap = [2, 16];
    let serve = [6, 16];
    // position, sequence, cell, status, output_bytes, queue_us, execution_us as small words.
    let forged = |fields: [u8; 7]| [&[7, 0][..], &fields].concat();
    let program = |steps: &[&[u8]]| steps.concat();
    let mut seeds = vec![
        ("honest-round".into(), program(&[&submit, &serve, &reap])),
        ("honest-wrap".into(), [submit, serve, reap].concat().repeat(12)),
        ("full".into(), program(&[&submit, &submit, &submit, &submit, &submit, &serve, &reap, &submit])),
        ("sleep-and-cancel".into(), program(&[&submit, &[4, 0], &[5, 0], &serve, &[4, 0], &reap, &[5, 0]])),
        ("forged-right".into(), program(&[&submit, &forged([0, 1, 0, 0, 4, 0, 0]), &reap])),
        (
            "forged-twice".into(),
            program(&[&submit, &forged([0, 1, 0, 0, 4, 0, 0]), &reap, &forged([1, 1, 0, 0, 4, 0, 0]), &reap]),
        ),
        ("forged-other-job".into(), program(&[&submit, &forged([0, 9, 0, 0, 4, 0, 0]), &reap])),
        ("forged-other-cell".into(), program(&[&submit, &forged([0, 1, 3, 0, 4, 0, 0]), &reap])),
        ("forged-cell-outside".into(), program(&[&submit, &forged([0, 1, 16, 0, 4, 0, 0]), &reap])),
        ("forged-status".into(), program(&[&submit, &forged([0, 1, 0, 9, 4, 0, 0]), &reap])),
        ("forged-length".into(), program(&[&submit, &forged([0, 1, 0, 0, 16, 0, 0]), &reap])),
        ("forged-position".into(), program(&[&submit, &forged([2, 1, 0, 0, 4, 0, 0]), &reap])),
    ];
    for word in 0..6u8 {
        for (name, value) in [("max", 16u8), ("three", 3), ("half", 18)] {
            let lie = [8, 0, 0, word, value];
            seeds.push((
                format!("control-{word}-{name}"),
                program(&[&submit, &lie, &reap, &submit, &serve, &reap]),
            ));
        }
    }
    seeds
}
