//! Health checks and measurements: asked for by the broker, answered beside whatever is computed.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::Rig;
use shm_layout::code::Code;
use shm_layout::wire::{FromEngine, Operation, Priority, ToEngine};

fn probed(rig: &mut Rig, generation: u64) -> (Code, String) {
    rig.broker.send(&ToEngine::Probe { generation }, vec![]);
    let is_ours =
        |m: &FromEngine| matches!(m, FromEngine::Probed { generation: of, .. } if *of == generation);
    match rig.broker.expect(is_ours) {
        FromEngine::Probed { code, message, .. } => (code, message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_health_check_says_whether_the_model_computes_what_it_should() {
    let mut rig = Rig::start();
    assert_eq!(probed(&mut rig, 1), (Code::Ok, String::new()));
    assert_eq!(probed(&mut rig, 7).0, Code::ModelUnavailable, "nobody loaded it");
    rig.model.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(probed(&mut rig, 1), (Code::BadResult, "asked to break".to_owned()));
    let _ = rig.hang_up();
}

#[test]
fn a_health_check_is_answered_while_a_batch_is_computed_and_keeps_the_model_until_then() {
    let mut rig = Rig::start();
    let mut client = rig.client(1);
    let gated = client.embed(Priority::Interactive, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    assert_eq!(probed(&mut rig, 1).0, Code::Ok);
    rig.broker.send(&ToEngine::Probe { generation: 1 }, vec![]);
    rig.broker.send(&ToEngine::UnloadModel { generation: 1 }, vec![]);
    rig.broker.expect(|m| matches!(m, FromEngine::Probed { generation: 1, code: Code::Ok, .. }));
    rig.model.gate.open();
    assert_eq!(client.code(gated), Code::Ok);
    rig.broker.expect(|m| *m == FromEngine::ModelUnloaded { generation: 1 });
    let _ = rig.hang_up();
}

#[test]
fn what_jobs_took_and_how_they_failed_is_measured() {
    let mut rig = Rig::start();
    rig.broker.job(1, 0, Operation::Embed, &["one"]);
    rig.broker.job(2, 0, Operation::Embed, &["REFUSE"]);
    assert_eq!(rig.broker.answer(1).0, Code::Ok);
    assert_eq!(rig.broker.answer(2).0, Code::BadPayload);
    rig.broker.send(&ToEngine::Totals, vec![]);
    let FromEngine::Metrics(measured) = rig.broker.expect(|m| matches!(m, FromEngine::Metrics(_))) else {
        panic!("no metrics")
    };
    assert_eq!((measured.queue.total(), measured.execution.total()), (2, 2));
    assert_eq!(
        measured.errors.iter().map(|e| (e.code, e.count)).collect::<Vec<_>>(),
        [(Code::BadPayload, 1)]
    );
    let _ = rig.hang_up();
}
