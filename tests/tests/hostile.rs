//! A hostile client: it speaks the protocol well enough to get in, then writes garbage into its socket and into every
//! field of its lane. It must lose its own session at most; the broker, the engine and a well-behaved client beside it
//! must not notice.

use shm_layout::lane::{CONTROL_FIELDS, Geometry, LAYOUT_HASH, LaneMemory};
use shm_layout::wire::{
    Acquire, BrokerMessage, ClientMessage, HEAD_BYTES, Hello, PROTOCOL_MAJOR, PROTOCOL_MINOR, decode_body,
    encode_frame,
};
use shm_os::Doorbell;
use shm_os::framed::{FramedError, FramedStream};
use shm_os::lane_mapping::LaneMapping;
use shm_os::socket::{AllowedPeer, connect};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tests::running::{Broker, PATIENCE, eventually};
use worker_sdk::Route;

/// A small generator of repeatable garbage (xorshift64*).
struct Garbage(u64);

impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn hello() -> ClientMessage {
    ClientMessage::Hello(Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: PROTOCOL_MINOR,
        layout_hash: LAYOUT_HASH,
        client_name: "hostile".into(),
    })
}

struct Hostile {
    stream: FramedStream,
    lane: LaneMapping,
    doorbell: Doorbell,
}

impl Hostile {
    /// Gets in and gets a lane, as a good client does.
    fn enter(broker: &Broker) -> Hostile {
        let connection = connect(&broker.socket(), PATIENCE, AllowedPeer::SameUser).unwrap();
        let mut stream = FramedStream::new(connection.into()).unwrap();
        stream.send(1, &hello(), vec![], PATIENCE).unwrap();
        let acquire = Acquire { model: String::new(), want_lane: true, want_image: false, wait_ms: 60_000 };
        stream.send(2, &ClientMessage::Acquire(acquire), vec![], PATIENCE).unwrap();
        loop {
            let (_, message) =
                stream.receive::<BrokerMessage>(PATIENCE).unwrap().expect("the broker answers");
            if let BrokerMessage::Leased(leased) = message {
                let cached = usize::from(leased.cache.is_some());
                let mut fds = stream.take_descriptors(2 + cached).unwrap();
                fds.truncate(2);
                let doorbell = Doorbell::from_received(fds.pop().unwrap()).unwrap();
                let lane = LaneMapping::map(fds.pop().unwrap().as_fd()).unwrap();
                return Hostile { stream, lane, doorbell };
            }
        }
    }

    /// Whether the broker has thrown this client out.
    fn is_out(&mut self) -> bool {
        loop {
            match self.stream.receive::<BrokerMessage>(Duration::from_millis(1)) {
                Ok(None) => return false,
                Ok(Some(_)) => {}
                Err(FramedError::Closed) => return true,
                Err(_) => return true,
            }
        }
    }
}

/// Runs `attack` while a good client works, then checks that nobody but the attacker noticed.
fn beside_a_good_client(broker: &Broker, attack: impl FnOnce()) {
    let model = broker.model(Route::Lane);
    let expected = model.embed(&["a good client's text"]).unwrap().into_values();
    let engine = broker.engine_pid();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let good = scope.spawn(|| {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds == 0 {
                let found = model.embed(&["a good client's text"]).expect("a good client is served");
                assert!(found.values().iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 2e-6));
                rounds += 1;
            }
        });
        attack();
        over.store(true, Ordering::Relaxed);
        good.join().expect("the good client noticed nothing");
    });
    assert_eq!(broker.engine_pid(), engine, "the engine is the same process");
    assert_eq!(model.reconnects(), 0, "the good client kept its lane");
}

#[test]
fn garbage_in_a_lane_costs_its_writer_the_lane() {
    let broker = Broker::start(&[]);
    let region_bytes = Geometry::V1.region_bytes();
    let tables_bytes = Geometry::V1.arena_offset();
    beside_a_good_client(&broker, || {
        // Every control word in turn, with values at and over every edge.
        for field in CONTROL_FIELDS {
            for value in [1, 2, 127, 128, 129, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
                let hostile = Hostile::enter(&broker);
                hostile.lane.store_u32(field.offset, value, Ordering::Relaxed);
                hostile.lane.store_u32(256, 1, Ordering::Relaxed);
                hostile.doorbell.ring().unwrap();
            }
        }
        let mut garbage = Garbage(0x9e37_79b9_7f4a_7c15);
        for round in 0..60 {
            let hostile = Hostile::enter(&broker);
            for _ in 0..400 {
                let at =
                    garbage.next() as usize % if round % 2 == 0 { tables_bytes } else { region_bytes - 8 };
                hostile.lane.write(at, &garbage.next().to_le_bytes());
                if garbage.next().is_multiple_of(8) {
                    // A tail that promises a few entries makes the engine read the garbage.
                    hostile.lane.store_u32(256, (garbage.next() % 6) as u32, Ordering::Release);
                    hostile.doorbell.ring().unwrap();
                }
            }
        }
    });
    // An index that ran ahead is a fault for certain: its writer is thrown out.
    let mut hostile = Hostile::enter(&broker);
    hostile.lane.store_u32(256, 0x8000_0000, Ordering::Release);
    hostile.doorbell.ring().unwrap();
    eventually("the hostile client is thrown out", || hostile.is_out().then_some(()));
    eventually("nothing of it stays", || {
        let status = broker.status();
        (status.sessions.len() == 1 && status.models[0].leases == 0 && status.engines[0].lanes == 0)
            .then_some(())
    });
    assert!(broker.status().faults > 0, "faults are counted");
    broker.stop();
}

#[test]
fn garbage_on_the_socket_costs_its_writer_the_connection() {
    let broker = Broker::start(&[]);
    beside_a_good_client(&broker, || {
        let mut garbage = Garbage(7);
        let welcome = encode_frame(1, &hello()).unwrap();
        for round in 0..200u64 {
            let mut stream = UnixStream::connect(broker.socket()).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut bytes: Vec<u8> = match round % 5 {
                0 => (0..200).map(|_| garbage.next() as u8).collect(),
                // A good head, a garbage body.
                1 => {
                    let mut frame = welcome.clone();
                    frame[HEAD_BYTES..].iter_mut().for_each(|b| *b = garbage.next() as u8);
                    frame
                }
                // A length over the limit.
                2 => {
                    let mut frame = welcome.clone();
                    frame[4..8].copy_from_slice(&(u32::MAX - round as u32).to_le_bytes());
                    frame
                }
                // A good hello, then one with a flipped bit.
                3 => {
                    let mut frames = welcome.clone();
                    let mut second = welcome.clone();
                    let at = garbage.next() as usize % second.len();
                    second[at] ^= 1 << (garbage.next() % 8);
                    frames.extend(second);
                    frames
                }
                // Something else first.
                _ => encode_frame(9, &ClientMessage::Shutdown { drain_ms: 0 }).unwrap(),
            };
            if round % 7 == 0 {
                bytes.truncate(bytes.len() / 2);
            }
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            // Whatever comes back is frames.
            let mut buffer = shm_layout::wire::FrameBuffer::new();
            buffer.extend(&answer);
            while let Some((_, body)) = buffer.next_frame().expect("the broker speaks frames") {
                decode_body::<BrokerMessage>(&body).expect("the broker speaks the protocol");
            }
        }
    });
    broker.stop();
}

#[test]
fn half_a_frame_and_deaf_clients_hold_nobody_up() {
    let broker = Broker::start(&[]);
    beside_a_good_client(&broker, || {
        let frame = encode_frame(1, &hello()).unwrap();
        let mut slow: Vec<UnixStream> =
            (0..20).map(|_| UnixStream::connect(broker.socket()).unwrap()).collect();
        for (n, stream) in slow.iter_mut().enumerate() {
            stream.write_all(&frame[..1 + n % (frame.len() - 1)]).unwrap();
        }
        // Never reads: asks for the status until the broker takes no more.
        let mut deaf = UnixStream::connect(broker.socket()).unwrap();
        deaf.write_all(&frame).unwrap();
        deaf.set_nonblocking(true).unwrap();
        let ask = encode_frame(2, &ClientMessage::Status).unwrap();
        for _ in 0..20_000 {
            if deaf.write(&ask).is_err() {
                break;
            }
        }
        assert!(broker.status().sessions.len() >= 2);
    });
    eventually("only the asking session is left", || (broker.status().sessions.len() == 1).then_some(()));
    broker.stop();
}
