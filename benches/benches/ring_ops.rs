//! What each operation of a lane costs by itself, in one thread and with nothing contended: a floor for `ring`, and the
//! place to see a change to the lane's code. `cargo bench -p benches --bench ring_ops`.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use shm_layout::code::Code;
use shm_layout::lane::{ClientLane, EngineLane, Geometry, JobRequest};
use shm_layout::wire::{Operation, Priority};
use shm_os::lane_mapping::LaneMapping;
use std::hint::black_box;
use std::os::fd::AsFd;

struct Lane {
    client: ClientLane<LaneMapping>,
    engine: EngineLane<LaneMapping>,
}

impl Lane {
    fn new() -> Lane {
        let (fd, mapping) = LaneMapping::create(1).expect("a lane region");
        let client = LaneMapping::map(fd.as_fd()).expect("its second mapping");
        let client = ClientLane::new(client, Geometry::V1).expect("the client's end");
        let (engine, _) = EngineLane::adopt(mapping, Geometry::V1).expect("the engine's end");
        Lane { client, engine }
    }
}

fn request<'a>(input: &'a [&'a [u8]]) -> JobRequest<'a> {
    JobRequest {
        operation: Operation::Embed,
        priority: Priority::Interactive,
        deadline_ns: 0,
        input,
        output_capacity_bytes: input.iter().map(|piece| piece.len()).sum(),
    }
}

fn round_trip(lane: &mut Lane, input: &[u8], scratch: &mut Vec<u8>, output: &mut Vec<u8>) {
    lane.client.submit(&request(&[input])).expect("room");
    black_box(lane.client.needs_doorbell());
    let mut jobs = Vec::with_capacity(1);
    lane.engine.drain(16, &mut jobs).expect("an honest client");
    for job in jobs {
        lane.engine.read_input(&job, scratch);
        lane.engine.complete(job, Code::Ok, scratch, 0, 0).expect("an honest client");
    }
    black_box(lane.engine.needs_wake());
    lane.client.reap(16, |_, slot| slot.copy_to(output)).expect("an honest engine");
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lane");
    for bytes in [64_usize, 2 << 10, 64 << 10, 1 << 20] {
        group.throughput(Throughput::Bytes(2 * bytes as u64));
        let input = vec![7; bytes];
        let (mut scratch, mut output) = (Vec::new(), Vec::new());
        let mut lane = Lane::new();
        group.bench_function(BenchmarkId::new("submit_drain_complete_reap", bytes), |b| {
            b.iter(|| round_trip(&mut lane, &input, &mut scratch, &mut output));
        });
    }
    group.throughput(Throughput::Elements(1));
    let mut lane = Lane::new();
    group.bench_function("has_completions", |b| b.iter(|| lane.client.has_completions()));
    group.bench_function("needs_doorbell", |b| {
        // Swap the armed word that a fresh lane has, so that only the look is measured.
        lane.client.needs_doorbell();
        b.iter(|| lane.client.needs_doorbell());
    });
    group.bench_function("drain_empty", |b| {
        let mut jobs = Vec::new();
        b.iter(|| lane.engine.drain(16, &mut jobs));
    });
    group.bench_function("submit_64_bytes", |b| {
        let input = [7; 64];
        b.iter_batched_ref(
            Lane::new,
            |lane| lane.client.submit(&request(&[&input])).expect("room"),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    benches(&mut criterion);
    criterion.final_summary();
}
