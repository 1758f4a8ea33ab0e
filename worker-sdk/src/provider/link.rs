//! A provider's connection: made, greeted and registered in one go. What comes over it is `serve`'s affair.

use crate::error::SdkError;
use crate::settings::Settings;
use crate::time::Deadline;
use shm_layout::wire::{
    BrokerMessage, ClientMessage, Decode, FrameHead, Hello, PROTOCOL_MAJOR, PROTOCOL_MINOR, Provide,
    decode_body,
};
use shm_os::framed::{FramedError, FramedStream};
use shm_os::socket::{self, SocketError};

/// Request ids of this connection; jobs come under id 0.
const HELLO_ID: u64 = 1;
const PROVIDE_ID: u64 = 2;
pub(super) const WITHDRAW_ID: u64 = 3;

/// A connection over which a model is provided.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) stream: FramedStream,
    /// Jobs that came before anybody served.
    pub(super) early: Vec<BrokerMessage>,
}

/// A failure of the connection, as callers of the SDK know it.
pub(super) fn failure(error: &FramedError) -> SdkError {
    match error {
        FramedError::Head(_) | FramedError::Codec(_) | FramedError::Descriptors { .. } => {
            SdkError::Fault { peer: "the broker", what: error.to_string() }
        }
        other => SdkError::hung_up(other.to_string()),
    }
}

pub(super) fn decode<T: Decode<()>>(body: &[u8]) -> Result<T, SdkError> {
    decode_body(body).map_err(|error| SdkError::Fault { peer: "the broker", what: error.to_string() })
}

impl Link {
    /// Connects, says hello and offers the model.
    pub(super) fn register(
        settings: &Settings,
        offer: &Provide,
        deadline: Deadline,
    ) -> Result<Link, SdkError> {
        let timeout = deadline.left_within(settings.connect_timeout);
        let deadline = Deadline::after(Some(timeout));
        let connection =
            socket::connect(&settings.socket, timeout, settings.peer).map_err(|error| match error {
                SocketError::NotThere { .. } | SocketError::Stale { .. } | SocketError::Closed => {
                    SdkError::NoBroker {
                        socket: settings.socket.clone(),
                        reason: "none is listening there: run `modelbroker serve`".into(),
                    }
                }
                error => SdkError::Connect(error.to_string()),
            })?;
        let mut stream = FramedStream::new(connection.into()).map_err(|error| failure(&error))?;
        let hello = ClientMessage::Hello(Hello {
            protocol_major: PROTOCOL_MAJOR,
            protocol_minor: PROTOCOL_MINOR,
            layout_hash: 0,
            client_name: settings.name.clone(),
        });
        stream.queue(HELLO_ID, &hello, Vec::new()).map_err(|error| failure(&error))?;
        let provide = ClientMessage::Provide(offer.clone());
        stream.send(PROVIDE_ID, &provide, Vec::new(), timeout).map_err(|error| failure(&error))?;
        let mut link = Link { stream, early: Vec::new() };
        loop {
            let left = deadline.left_within(timeout);
            let received = link.stream.receive::<BrokerMessage>(left).map_err(|error| failure(&error))?;
            let Some((request_id, message)) = received else {
                return Err(SdkError::hung_up("it did not answer the offer in time"));
            };
            match message {
                BrokerMessage::Welcome(_) => {}
                BrokerMessage::Provided { .. } if request_id == PROVIDE_ID => return Ok(link),
                BrokerMessage::Refused(refusal) => return Err(SdkError::refused(refusal)),
                BrokerMessage::ShuttingDown => return Err(SdkError::hung_up("it is leaving")),
                // Behind the registration, before anybody serves.
                other => link.early.push(other),
            }
        }
    }

    /// The next message that has arrived.
    pub(super) fn next(&mut self) -> Result<Option<(FrameHead, BrokerMessage)>, SdkError> {
        match self.stream.next_frame() {
            Ok(None) => Ok(None),
            Ok(Some((head, body))) => Ok(Some((head, decode(&body)?))),
            Err(error) => Err(failure(&error)),
        }
    }
}
