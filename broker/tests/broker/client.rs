//! A client as the tests need one: frames in, frames out, nothing hidden.

use crate::process::LONG;
use shm_layout::code::Code;
use shm_layout::lane::LAYOUT_HASH;
use shm_layout::wire::{
    Acquire, AnswerFrame, BrokerMessage, ClientMessage, Hello, JobFrame, Leased, LoadProgress, Operation,
    PROTOCOL_MAJOR, Priority, Refusal, StatusReport,
};
use shm_os::framed::{FramedError, FramedStream};
use shm_os::socket::{AllowedPeer, connect};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

pub(crate) struct Client {
    pub(crate) stream: FramedStream,
    last_request: u64,
    last_job: u64,
    backlog: VecDeque<(u64, BrokerMessage)>,
    pub(crate) progress: Vec<LoadProgress>,
}

pub(crate) fn hello() -> Hello {
    Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: 0,
        layout_hash: LAYOUT_HASH,
        client_name: "test".into(),
    }
}

impl Client {
    /// Connected, nothing said.
    pub(crate) fn connect(socket: &Path) -> Client {
        let connection = connect(socket, LONG, AllowedPeer::SameUser).expect("the broker listens");
        let stream = FramedStream::new(connection.into()).expect("a stream");
        Client { stream, last_request: 0, last_job: 0, backlog: VecDeque::new(), progress: Vec::new() }
    }

    /// Connected, session open.
    pub(crate) fn open(socket: &Path) -> Client {
        let mut client = Client::connect(socket);
        let request = client.ask(ClientMessage::Hello(hello()));
        assert!(matches!(client.reply(request), BrokerMessage::Welcome(_)));
        client
    }

    /// Sends a message under a new request id.
    pub(crate) fn ask(&mut self, message: ClientMessage) -> u64 {
        self.try_ask(message).expect("the broker reads")
    }

    pub(crate) fn try_ask(&mut self, message: ClientMessage) -> Result<u64, FramedError> {
        self.last_request += 1;
        self.stream.send(self.last_request, &message, Vec::new(), LONG)?;
        Ok(self.last_request)
    }

    /// Sends bytes that need not be a frame.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        use std::io::Write;
        let copy = self.stream.as_fd().try_clone_to_owned().expect("a copy");
        std::os::unix::net::UnixStream::from(copy).write_all(bytes).expect("room in the socket");
    }

    fn next(&mut self) -> Result<(u64, BrokerMessage), FramedError> {
        Ok(self.stream.receive::<BrokerMessage>(LONG)?.expect("a frame in time"))
    }

    /// What answers a request; load progress is put aside, other frames are kept for later.
    pub(crate) fn reply(&mut self, request: u64) -> BrokerMessage {
        if let Some(at) = self.backlog.iter().position(|(id, _)| *id == request) {
            return self.backlog.remove(at).expect("it is there").1;
        }
        loop {
            match self.next().expect("the broker is there") {
                (_, BrokerMessage::Progress(progress)) => self.progress.push(progress),
                (id, message) if id == request => return message,
                other => self.backlog.push_back(other),
            }
        }
    }

    pub(crate) fn refusal(&mut self, request: u64) -> Refusal {
        match self.reply(request) {
            BrokerMessage::Refused(refusal) => refusal,
            other => panic!("no refusal but {other:?}"),
        }
    }

    pub(crate) fn answer(&mut self, request: u64) -> AnswerFrame {
        match self.reply(request) {
            BrokerMessage::Answer(answer) => answer,
            other => panic!("no answer but {other:?}"),
        }
    }

    pub(crate) fn status(&mut self) -> StatusReport {
        let request = self.ask(ClientMessage::Status);
        match self.reply(request) {
            BrokerMessage::Status(report) => report,
            other => panic!("no report but {other:?}"),
        }
    }

    pub(crate) fn pings(&mut self) {
        let request = self.ask(ClientMessage::Ping);
        assert_eq!(self.reply(request), BrokerMessage::Pong);
    }

    pub(crate) fn asks_for(&mut self, model: &str, want_lane: bool, want_image: bool, wait_ms: u32) -> u64 {
        self.ask(ClientMessage::Acquire(Acquire { model: model.into(), want_lane, want_image, wait_ms }))
    }

    pub(crate) fn granted(&mut self, request: u64) -> (Leased, Vec<OwnedFd>) {
        match self.reply(request) {
            BrokerMessage::Leased(leased) => {
                let count = 2 * usize::from(leased.lane.is_some())
                    + usize::from(leased.image)
                    + usize::from(leased.cache.is_some());
                let fds = self.stream.take_descriptors(count).expect("descriptors come with a lease");
                (leased, fds)
            }
            other => panic!("no lease but {other:?}"),
        }
    }

    /// A lease on `m` for jobs on the socket.
    pub(crate) fn lease(&mut self) -> u64 {
        let request = self.asks_for("m", false, false, 60_000);
        self.granted(request).0.lease_id
    }

    /// A lease on `m` with a lane; gives lease and lane.
    pub(crate) fn lane(&mut self) -> (u64, u64) {
        let request = self.asks_for("m", true, false, 60_000);
        let (leased, _) = self.granted(request);
        (leased.lease_id, leased.lane.expect("a lane").lane_id)
    }

    /// Submits a job; gives its request and its id.
    pub(crate) fn submit(&mut self, lease_id: u64, payload: &str) -> (u64, u64) {
        self.try_submit(lease_id, payload).expect("the broker reads")
    }

    pub(crate) fn try_submit(&mut self, lease_id: u64, payload: &str) -> Result<(u64, u64), FramedError> {
        self.last_job += 1;
        let job = JobFrame {
            lease_id,
            job_id: self.last_job,
            operation: Operation::Embed,
            priority: Priority::Interactive,
            deadline_ns: 0,
            payload: payload.into(),
        };
        Ok((self.try_ask(ClientMessage::Submit(job))?, self.last_job))
    }

    /// Runs a job that succeeds; gives its answer as text.
    pub(crate) fn runs(&mut self, lease_id: u64, payload: &str) -> String {
        let (request, job_id) = self.submit(lease_id, payload);
        let answer = self.answer(request);
        assert_eq!((answer.status, answer.job_id), (Code::Ok, job_id));
        String::from_utf8(answer.payload).expect("text")
    }

    /// Everything that still comes until the broker closes the connection.
    pub(crate) fn until_closed(&mut self) -> Vec<BrokerMessage> {
        let mut seen: Vec<BrokerMessage> = self.backlog.drain(..).map(|(_, m)| m).collect();
        loop {
            match self.next() {
                Ok((_, message)) => seen.push(message),
                Err(FramedError::Closed) => return seen,
                Err(error) => panic!("not closed but {error}"),
            }
        }
    }

    /// Expects to be refused with this code and closed; gives the message.
    pub(crate) fn is_refused_and_closed(&mut self, code: Code) -> String {
        match self.until_closed().pop() {
            Some(BrokerMessage::Refused(refusal)) if refusal.code == code => refusal.message,
            other => panic!("not refused with {code} but {other:?}"),
        }
    }
}
