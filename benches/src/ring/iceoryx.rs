//! Both ends of an iceoryx2 request-response service, polled or with an event each way. Payloads are copied in and out on
//! both sides, because that is what a lane does: its users hold texts and vectors of their own.

use super::{Caller, Patience, STUCK_AFTER, WAIT_SLICE};
use anyhow::{Context, anyhow, ensure};
use iceoryx2::port::client::Client;
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::server::Server;
use iceoryx2::prelude::*;
use std::fmt::Debug;
use std::time::Instant;

const SERVICE_NAME: &str = "bench/ring";
const TO_SERVER_NAME: &str = "bench/ring/to-server";
const TO_CLIENT_NAME: &str = "bench/ring/to-client";

/// The errors of iceoryx2 have no common type.
fn fault<E: Debug>(what: &'static str) -> impl Fn(E) -> anyhow::Error {
    move |error| anyhow!("iceoryx2: {what}: {error:?}")
}

/// What both ends hold.
struct Common {
    node: Node<ipc::Service>,
    notifier: Notifier<ipc::Service>,
    listener: Listener<ipc::Service>,
}

impl Common {
    fn new(root: &str, notifies: &str, listens: &str) -> anyhow::Result<Common> {
        set_log_level(LogLevel::Error);
        let mut config = Config::default();
        let root = Path::new(root.as_bytes()).map_err(fault("the folder's name"))?;
        config.global.set_root_path(&root);
        let node = NodeBuilder::new()
            .config(&config)
            .signal_handling_mode(SignalHandlingMode::Disabled)
            .create::<ipc::Service>()
            .map_err(fault("making a node"))?;
        let event = |name: &str| {
            let name = ServiceName::new(name).map_err(fault("a service's name"))?;
            node.service_builder(&name).event().open_or_create().map_err(fault("making an event service"))
        };
        let notifier = event(notifies)?.notifier_builder().create().map_err(fault("making a notifier"))?;
        let listener = event(listens)?.listener_builder().create().map_err(fault("making a listener"))?;
        Ok(Common { node, notifier, listener })
    }

    /// Sleeps until an event; returns without one now and then, as when two were sent and the first wait took both.
    fn sleep(&self) -> anyhow::Result<()> {
        self.listener.timed_wait(|_| {}, WAIT_SLICE).map(|_| ()).map_err(fault("waiting for an event"))
    }

    fn notify(&self) -> anyhow::Result<()> {
        self.notifier.notify().map(|_| ()).map_err(fault("sending an event"))
    }
}

/// The asking end.
pub(super) struct IceoryxCaller {
    client: Client<ipc::Service, [u8], (), [u8], ()>,
    common: Common,
    sleeps: bool,
}

impl IceoryxCaller {
    /// Connects to the service that the echoing end has made.
    pub(super) fn new(root: &str, bytes: usize) -> anyhow::Result<IceoryxCaller> {
        let common = Common::new(root, TO_SERVER_NAME, TO_CLIENT_NAME)?;
        let name = ServiceName::new(SERVICE_NAME).map_err(fault("a service's name"))?;
        let service = common
            .node
            .service_builder(&name)
            .request_response::<[u8], [u8]>()
            .open()
            .map_err(fault("opening the service"))?;
        let client = service
            .client_builder()
            .initial_max_slice_len(bytes)
            .create()
            .map_err(fault("making a client"))?;
        Ok(IceoryxCaller { client, common, sleeps: false })
    }

    /// Whether to sleep while waiting, or to poll.
    pub(super) fn events(&mut self, sleeps: bool) -> &mut IceoryxCaller {
        self.sleeps = sleeps;
        self
    }
}

impl Caller for IceoryxCaller {
    #[inline]
    fn call(&mut self, input: &[u8], output: &mut Vec<u8>) -> anyhow::Result<()> {
        let request = self.client.loan_slice_uninit(input.len()).map_err(fault("borrowing a request"))?;
        let pending = request.write_from_slice(input).send().map_err(fault("sending a request"))?;
        if self.sleeps {
            self.common.notify()?;
        }
        let mut patience = Patience::new();
        let until = if self.sleeps { Some(Instant::now() + STUCK_AFTER) } else { None };
        loop {
            if let Some(response) = pending.receive().map_err(fault("receiving a response"))? {
                output.resize(input.len(), 0);
                let payload = response.payload();
                ensure!(payload.len() == output.len(), "a response of {} bytes", payload.len());
                output.copy_from_slice(payload);
                return Ok(());
            }
            match until {
                Some(until) => {
                    self.common.sleep()?;
                    ensure!(Instant::now() < until, "no answer for {STUCK_AFTER:?}");
                }
                None => patience.spin()?,
            }
        }
    }
}

/// The echoing end.
pub(super) struct IceoryxEcho {
    server: Server<ipc::Service, [u8], (), [u8], ()>,
    common: Common,
    payload: Vec<u8>,
}

impl IceoryxEcho {
    /// Makes the service for payloads of up to `bytes`.
    pub(super) fn new(root: &str, bytes: usize) -> anyhow::Result<IceoryxEcho> {
        let common = Common::new(root, TO_CLIENT_NAME, TO_SERVER_NAME)?;
        let name = ServiceName::new(SERVICE_NAME).map_err(fault("a service's name"))?;
        let service = common
            .node
            .service_builder(&name)
            .request_response::<[u8], [u8]>()
            .create()
            .map_err(fault("making the service"))?;
        let server = service
            .server_builder()
            .initial_max_slice_len(bytes)
            .create()
            .map_err(fault("making a server"))?;
        Ok(IceoryxEcho { server, common, payload: Vec::with_capacity(bytes) })
    }

    /// Echoes so many times, polling or asleep between them.
    pub(super) fn echo(&mut self, round_trips: u32, sleeps: bool) -> anyhow::Result<()> {
        let mut left = round_trips;
        let mut patience = Patience::new();
        while left > 0 {
            let Some(request) = self.server.receive().map_err(fault("receiving a request"))? else {
                if sleeps {
                    self.common.sleep()?
                } else {
                    patience.spin()?
                }
                continue;
            };
            patience = Patience::new();
            self.payload.clear();
            self.payload.extend_from_slice(request.payload());
            let response =
                request.loan_slice_uninit(self.payload.len()).map_err(fault("borrowing a response"))?;
            response.write_from_slice(&self.payload).send().map_err(fault("sending a response"))?;
            if sleeps {
                self.common.notify().context("waking the client")?;
            }
            left -= 1;
        }
        Ok(())
    }
}
