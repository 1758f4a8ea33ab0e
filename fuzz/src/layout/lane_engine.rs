//! The engine's end of a lane against a client that writes what it likes, whenever it likes, also between two steps.

use super::lane_support::{Guarded, LARGEST_SLOT_BYTES, SMALL, Side, region, scribble};
use super::reader::Reader;
use shm_layout::code::Code;
use shm_layout::lane::{CheckedJob, ClientLane, EngineLane, HeapLaneMemory, JobRequest, LaneMemory};
use shm_layout::wire::{Operation, Priority};
use std::sync::Arc;

/// The input is a program: each byte is a step of the engine, of an honest client, or a write by a dishonest one.
pub fn run(data: &[u8]) {
    let memory = region();
    let mut input = Reader::new(data);
    if input.u8() & 1 == 1 {
        // The region as a whole is the input's.
        let bytes = input.take(SMALL.region_bytes());
        memory.write(0, bytes);
    }
    let mut client = ClientLane::new(Guarded::new(&memory, Side::Client), SMALL).ok();
    let mut engine: Option<EngineLane<Guarded>> = None;
    let mut held: Vec<CheckedJob> = Vec::new();
    let mut bytes = Vec::new();
    while !input.is_empty() {
        let step = input.u8();
        let choice = usize::from(input.u8());
        match step % 11 {
            0 => adopt(&memory, &mut engine, &mut held),
            1 | 2 => scribble(&memory, &mut input),
            3 => submit(&mut client, choice),
            4 => {
                if let Some(client) = &mut client {
                    let _ = client.reap(choice, |_, output| {
                        assert!(output.to_vec().len() <= LARGEST_SLOT_BYTES);
                    });
                }
            }
            _ => {
                if engine.is_none() {
                    adopt(&memory, &mut engine, &mut held);
                }
                let Some(lane) = &mut engine else { continue };
                let ok = match step % 11 {
                    5 | 6 => lane.drain(choice, &mut held).is_ok(),
                    7 if !held.is_empty() => {
                        let job = &held[choice % held.len()];
                        lane.begin(job);
                        lane.read_input(job, &mut bytes);
                        assert!(bytes.len() <= LARGEST_SLOT_BYTES);
                        let _ = lane.is_cancelled(job);
                        true
                    }
                    8 | 9 if !held.is_empty() => {
                        let job = held.swap_remove(choice % held.len());
                        let output = [0x5a; LARGEST_SLOT_BYTES + 1];
                        let status = Code::ALL[choice % Code::ALL.len()];
                        lane.complete(job, status, &output[..choice % output.len()], 1, 2).is_ok()
                    }
                    10 => lane.arm().is_ok(),
                    _ => {
                        lane.needs_wake();
                        true
                    }
                };
                // At most one job per cell is ever held, whatever the client claims.
                assert!(held.len() <= SMALL.jobs);
                if !ok {
                    // A lane that faulted is no longer served.
                    engine = None;
                    held.clear();
                }
            }
        }
    }
}

fn adopt(memory: &Arc<HeapLaneMemory>, engine: &mut Option<EngineLane<Guarded>>, held: &mut Vec<CheckedJob>) {
    held.clear();
    *engine = None;
    if let Ok((lane, recovered)) = EngineLane::adopt(Guarded::new(memory, Side::Engine), SMALL) {
        *held = recovered;
        *engine = Some(lane);
    }
}

fn submit(client: &mut Option<ClientLane<Guarded>>, choice: usize) {
    let Some(client) = client else { return };
    let input = [7; LARGEST_SLOT_BYTES];
    let request = JobRequest {
        operation: if choice & 1 == 0 { Operation::Embed } else { Operation::Tokenize },
        priority: if choice & 2 == 0 { Priority::Interactive } else { Priority::Bulk },
        deadline_ns: 0,
        input: &[&input[..choice % 40], &input[..choice % 7]],
        output_capacity_bytes: choice % 70,
    };
    if client.submit(&request).is_ok() {
        client.needs_doorbell();
    }
}

/// Inputs to start from: honest traffic, deaths at each point, and the lies that matter.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let adopt = [0, 0];
    let submit = [3, 20];
    let drain = [5, 16];
    let begin = [7, 0];
    let complete = [8, 0];
    let reap = [4, 16];
    let arm = [10, 0];
    let round = [submit, drain, begin, complete, reap].concat();
    let program = |steps: &[&[u8]]| [&[0][..], &steps.concat()].concat();
    let mut seeds = vec![
        ("honest-round".into(), program(&[&adopt, &round])),
        ("honest-wrap".into(), program(&[&adopt, &round, &round, &round, &round, &round, &round])),
        ("full-rings".into(), program(&[&adopt, &submit, &submit, &submit, &submit, &submit, &drain])),
        (
            "out-of-order".into(),
            program(&[&adopt, &submit, &submit, &submit, &drain, &[8, 2], &[8, 1], &[8, 0], &reap]),
        ),
        ("death-before-drain".into(), program(&[&adopt, &submit, &adopt, &drain, &complete, &reap])),
        ("death-after-drain".into(), program(&[&adopt, &submit, &drain, &begin, &adopt, &complete, &reap])),
        ("death-after-complete".into(), program(&[&adopt, &submit, &drain, &complete, &adopt, &reap])),
        ("sleep".into(), program(&[&adopt, &arm, &submit, &drain, &complete, &[6, 0], &arm])),
        ("never-reaps".into(), program(&[&adopt, &submit, &drain, &complete, &submit, &drain, &complete])),
    ];
    // Scribbles: kind, then its operands as `scribble` reads them.
    for word in 0..6u8 {
        for (name, value) in [("max", &[16u8][..]), ("five", &[5]), ("half", &[18])] {
            let lie = [&[1, 0, 0, word][..], value].concat();
            seeds.push((
                format!("control-{word}-{name}"),
                program(&[&adopt, &submit, &lie, &drain, &complete, &adopt]),
            ));
        }
    }
    for cell_word in 0..12u16 {
        let [_, _, client_cells, _] = SMALL.table_offsets();
        let word = (client_cells - SMALL.table_offsets()[0]) as u16 / 4 + cell_word;
        let lie = [&[1, 0, 1][..], &word.to_le_bytes(), &[16]].concat();
        seeds.push((
            format!("cell-word-{cell_word}"),
            program(&[&adopt, &submit, &lie, &drain, &complete, &reap]),
        ));
    }
    let same_cell =
        program(&[&adopt, &submit, &[1, 0, 3, 1, 0], &[1, 0, 0, 0, 2], &drain, &complete, &complete]);
    seeds.push(("one-cell-twice".into(), same_cell));
    seeds.push(("garbage-region".into(), [&[1][..], &[0xa5; 3000], &adopt, &drain].concat()));
    seeds
}
