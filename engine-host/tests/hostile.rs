//! Clients that write garbage into every field of their lane, before and while the engine looks: the engine lives, and
//! an honest client beside them notices nothing.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::{Client, Rig};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use shm_layout::code::Code;
use shm_layout::lane::{CONTROL_FIELDS, Geometry, LaneMemory};
use shm_layout::table::offset_of;
use shm_layout::wire::{FromEngine, Operation, Priority};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// One write of a hostile client.
#[derive(Debug, Clone)]
enum Garbage {
    Control(usize, u32),
    Bytes(usize, Vec<u8>),
    Honest,
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let small = prop_oneof![0u32..4, 120u32..140, any::<u32>()];
    prop_oneof![
        (0..CONTROL_FIELDS.len(), small).prop_map(|(field, value)| Garbage::Control(field, value)),
        (0..Geometry::V1.arena_offset() - 256, prop::collection::vec(any::<u8>(), 1..256))
            .prop_map(|(at, bytes)| Garbage::Bytes(at, bytes)),
        // Rings and cells with small numbers get further than noise.
        (1024..Geometry::V1.arena_offset() - 256, prop::collection::vec(0u8..3, 1..256))
            .prop_map(|(at, bytes)| Garbage::Bytes(at, bytes)),
        Just(Garbage::Honest),
    ]
}

fn apply(client: &mut Client, garbage: &Garbage) {
    match garbage {
        Garbage::Control(field, value) => {
            client.lane.memory().store_u32(CONTROL_FIELDS[*field].offset, *value, Ordering::Release);
        }
        Garbage::Bytes(at, bytes) => client.lane.memory().write(*at, bytes),
        Garbage::Honest => {
            let _ = client.embed(Priority::Interactive, &["honest", "work"]);
        }
    }
}

fn serves(client: &mut Client) {
    let ticket = client.embed(Priority::Interactive, &["still", "there"]);
    assert_eq!(client.code(ticket), Code::Ok);
    client.check_vectors();
}

#[test]
fn garbage_in_every_field_hurts_only_its_writer() {
    let mut rig = Rig::start();
    let honest = rig.client(1);
    let shared = Mutex::new((rig, honest, 2u64));
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() };
    let strategy = (prop::collection::vec(garbage(), 1..8), any::<bool>());
    TestRunner::new(config)
        .run(&strategy, |(writes, before)| {
            let mut guard = shared.lock().unwrap();
            let (rig, honest, lane_id) = &mut *guard;
            *lane_id += 1;
            let mut hostile = Client::new(*lane_id);
            if !before {
                rig.broker.add_lane(&hostile, 1);
            }
            for write in &writes {
                apply(&mut hostile, write);
            }
            hostile.bell.ring().unwrap();
            if before {
                rig.broker.add_lane(&hostile, 1);
            }
            serves(honest);
            rig.broker.drop_lane(*lane_id);
            rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id: *lane_id });
            Ok(())
        })
        .unwrap();
}

#[test]
fn fields_that_change_while_they_are_read_hurt_only_their_writer() {
    let mut rig = Rig::start();
    let mut honest = rig.client(1);
    for lane_id in 2..42 {
        let mut hostile = rig.client(lane_id);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| write_noise(&mut hostile, &stop));
            for _ in 0..8 {
                serves(&mut honest);
            }
            stop.store(true, Ordering::Relaxed);
        });
        rig.broker.drop_lane(lane_id);
        rig.broker.expect(|message| *message == FromEngine::LaneDropped { lane_id });
    }
}

/// Submits jobs and scribbles over their cells, and now and then over the ring and its tail.
fn write_noise(hostile: &mut Client, stop: &AtomicBool) {
    let tail = offset_of(CONTROL_FIELDS, "submission_tail");
    let [ring, _, cells, _] = Geometry::V1.table_offsets();
    let mut noise = hostile.lane_id;
    while !stop.load(Ordering::Relaxed) {
        let _ = hostile.try_submit(Operation::Embed, Priority::Bulk, 0, &["x", "y"]);
        hostile.bell.ring().unwrap();
        for _ in 0..50 {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = cells + 16 + (noise >> 33) as usize % 100;
            hostile.lane.memory().write(at, &noise.to_le_bytes()[..1 + (noise >> 60 & 3) as usize]);
        }
        if (noise >> 40).is_multiple_of(64) {
            hostile.lane.memory().write(ring, &noise.to_le_bytes());
            hostile.lane.memory().store_u32(tail, (noise >> 50) as u32 & 127, Ordering::Release);
        }
    }
}
