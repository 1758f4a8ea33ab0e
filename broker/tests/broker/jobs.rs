//! Jobs on the socket: accepted or refused, cancelled, late, and each answered once.

use crate::process::{Broker, until};
use shm_layout::code::Code;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::wire::{ClientMessage, JobFrame, Operation, Priority};

#[test]
fn a_cancelled_job_is_answered_once() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let lease = client.lease();
    let (request, job_id) = client.submit(lease, "hold");
    for _ in 0..2 {
        client.ask(ClientMessage::Cancel { job_id });
    }
    assert_eq!(client.answer(request).status, Code::Cancelled);
    client.ask(ClientMessage::Cancel { job_id });
    client.runs(lease, "release");
    drop(broker);
    assert_eq!(client.until_closed(), []);
}

#[test]
fn jobs_that_cannot_be_run_are_refused_by_name() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let lease_id = client.lease();
    let job = |job_id, deadline_ns, bytes| JobFrame {
        lease_id,
        job_id,
        operation: Operation::Tokenize,
        priority: Priority::Bulk,
        deadline_ns,
        payload: vec![b'x'; bytes],
    };
    let request = client.ask(ClientMessage::Submit(job(1000, 1, 4)));
    assert_eq!(client.refusal(request).code, Code::DeadlineExceeded);
    let request = client.ask(ClientMessage::Submit(job(1000, 0, MAX_PAYLOAD_BYTES + 1)));
    assert_eq!(client.refusal(request).code, Code::TooLarge);
    let request = client.ask(ClientMessage::Submit(JobFrame { lease_id: 77, ..job(1, 0, 4) }));
    assert_eq!(client.refusal(request).code, Code::Stale);
    client.submit(lease_id, "hold");
    let request = client.ask(ClientMessage::Submit(job(1, 0, 4)));
    assert_eq!(client.refusal(request).code, Code::BadState);
    let request = client.ask(ClientMessage::Submit(job(1002, 0, MAX_PAYLOAD_BYTES)));
    assert_eq!(client.answer(request).status, Code::UnsupportedOperation);
}

#[test]
fn another_session_cannot_use_a_lease_or_cancel_a_job() {
    let broker = Broker::start(&[]);
    let (mut a, mut b) = (broker.client(), broker.client());
    let lease = a.lease();
    let (held, job_id) = a.submit(lease, "hold");
    let (request, _) = b.submit(lease, "echo x");
    assert_eq!(b.refusal(request).code, Code::Stale);
    b.ask(ClientMessage::Cancel { job_id });
    let request = b.ask(ClientMessage::Release { lease_id: lease });
    assert_eq!(b.refusal(request).code, Code::Stale);
    until(&mut b, "still held", |r| r.engines[0].totals.queued_jobs == 1);
    a.runs(lease, "release");
    assert_eq!(a.answer(held).status, Code::Ok);
}

#[test]
fn many_clients_with_many_jobs_get_their_own_answers() {
    let broker = Broker::start(&[]);
    std::thread::scope(|scope| {
        for c in 0..8 {
            let broker = &broker;
            scope.spawn(move || {
                let mut client = broker.client();
                let lease = client.lease();
                for batch in 0..10 {
                    let text = |n: usize| format!("{c}/{batch}/{n}");
                    let requests: Vec<u64> =
                        (0..30).map(|n| client.submit(lease, &format!("echo {}", text(n))).0).collect();
                    for (n, request) in requests.into_iter().enumerate() {
                        assert_eq!(client.answer(request).payload, text(n).into_bytes());
                    }
                }
            });
        }
    });
}
