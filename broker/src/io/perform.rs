//! Does what the core decided, action by action, and finds the descriptors that actions name.

use super::caches::Cache;
use super::event_loop::EventLoop;
use super::memory;
use crate::core::{Action, Attachment, Event};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, Refusal};
use shm_os::Doorbell;
use shm_os::doorbell::DoorbellError;
use shm_os::lane_mapping::{LaneMapping, LaneMappingError};
use std::os::fd::OwnedFd;
use tracing::warn;

/// The broker's descriptors of a lane; it maps the region only to initialise it.
pub(crate) struct LaneDescriptors {
    region: OwnedFd,
    doorbell: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error(transparent)]
    Region(#[from] LaneMappingError),
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
}

fn make_lane(lane_id: u64) -> Result<LaneDescriptors, LaneError> {
    let (region, _) = LaneMapping::create(lane_id)?;
    Ok(LaneDescriptors { region, doorbell: Doorbell::new()?.into() })
}

impl EventLoop {
    /// Hands every waiting event to the core and does what it says, until nothing is left to do.
    pub(crate) fn run_events(&mut self) {
        while let Some(event) = self.events.pop_front() {
            for action in self.core.handle(self.now_ns, event) {
                self.perform(action);
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send { session, request_id, message, attachments } => {
                self.send(session, request_id, message, &attachments);
            }
            Action::Close { session } => self.close_client(session),
            Action::MakeLane { lane_id } => {
                let outcome = match make_lane(lane_id) {
                    Ok(lane) => {
                        self.lanes.insert(lane_id, lane);
                        Ok(())
                    }
                    Err(error) => Err(error.to_string()),
                };
                self.events.push_back(Event::LaneMade { lane_id, outcome });
            }
            Action::CloseLane { lane_id } => {
                self.lanes.remove(&lane_id);
                self.descriptor_freed();
            }
            Action::StartLoader { load_id, model } => self.start_loader(load_id, &model),
            Action::KillLoader { load_id } => self.kill_loader(load_id),
            Action::KeepImage { load_id, generation } => {
                if let Some(fd) = self.offered_images.remove(&load_id) {
                    self.images.insert(generation, fd);
                }
            }
            Action::DiscardImage { load_id } => {
                self.offered_images.remove(&load_id);
            }
            Action::CloseImage { generation } => {
                self.images.remove(&generation);
                self.caches.remove(&generation);
                self.descriptor_freed();
            }
            Action::MakeCache { generation, dim, fingerprint } => {
                let made = Cache::make(self.cache_entries, self.cache_ttl, dim, fingerprint);
                let cache = match made {
                    Ok(cache) => {
                        let description = cache.description();
                        self.caches.insert(generation, cache);
                        Some(description)
                    }
                    Err(error) => {
                        warn!(generation, "no vector cache for this model, it is served without: {error}");
                        None
                    }
                };
                self.events.push_back(Event::CacheMade { generation, cache });
            }
            Action::SupersedeCache { generation, by } => {
                if let Some(cache) = self.caches.get(&generation) {
                    cache.supersede(by);
                }
            }
            Action::FillCache { generation, bulk, keys, values } => {
                if let Some(cache) = self.caches.get_mut(&generation) {
                    cache.fill(self.now_ns, bulk, &keys, &values);
                }
            }
            Action::StartEngine { incarnation } => self.start_engine(incarnation),
            Action::KillEngine { incarnation } => self.kill_engine(incarnation),
            Action::ToEngine { message, attachments } => self.engine.say(message, attachments),
            Action::StartProvider { child } => self.start_provider(child),
            Action::KillProvider { child } => self.providers.kill(child),
            Action::ReadConfiguration => self.read_configuration(),
            Action::Reconfigure { loader_command, cache_entries, cache_ttl } => {
                self.loader_command = loader_command;
                self.cache_entries = cache_entries;
                self.cache_ttl = cache_ttl;
            }
            Action::LookAtMemory => {
                let caches =
                    self.caches.iter().map(|(generation, cache)| (*generation, cache.used_bytes())).collect();
                self.events.push_back(Event::Memory { available_bytes: memory::available_bytes(), caches });
            }
            Action::Exit => self.exiting = true,
        }
    }

    fn send(
        &mut self,
        session: u64,
        request_id: u64,
        mut message: BrokerMessage,
        attachments: &[Attachment],
    ) {
        if let BrokerMessage::Status(report) = &mut message {
            report.open_descriptors = open_descriptors();
            let measured = &mut report.metrics.memory;
            measured.available_bytes = memory::available_bytes();
            measured.cache_bytes = self.caches.values().map(Cache::used_bytes).sum();
            for model in &mut report.models {
                if let (Some(cache), Some(description)) = (&mut model.cache, &model.description)
                    && let Some(held) = self.caches.get(&description.generation)
                {
                    held.report(cache);
                }
            }
        }
        match self.descriptors(attachments) {
            Some(Ok(fds)) => self.send_client(session, request_id, &message, fds),
            failed => {
                // The core counts the lease as granted: only the end of the session takes it back for certain.
                let why = failed.and_then(Result::err).map_or("gone".to_owned(), |e| e.to_string());
                warn!(session, "a lease's descriptors cannot be sent: {why}");
                let message =
                    "the broker is out of descriptors; close sessions, or raise `ulimit -n`".to_owned();
                let refusal = Refusal { code: Code::TooMany, message, retry_after_ms: 1000 };
                self.send_client(session, request_id, &BrokerMessage::Refused(refusal), Vec::new());
                self.close_client(session);
                self.events.push_back(Event::ClientGone { session });
            }
        }
    }

    /// Copies of the descriptors that attachments name; `None` when one of them is closed.
    pub(crate) fn descriptors(&self, attachments: &[Attachment]) -> Option<std::io::Result<Vec<OwnedFd>>> {
        let mut named = Vec::new();
        for attachment in attachments {
            match attachment {
                Attachment::Lane(lane_id) => {
                    let lane = self.lanes.get(lane_id)?;
                    named.extend([&lane.region, &lane.doorbell]);
                }
                Attachment::Image(generation) => named.push(self.images.get(generation)?),
                Attachment::Cache(generation) => named.push(&self.caches.get(generation)?.region),
            }
        }
        Some(named.into_iter().map(OwnedFd::try_clone).collect())
    }
}

/// Descriptors that this process has open.
fn open_descriptors() -> u32 {
    // Since Linux 6.2 the folder's size is their number; before, it is 0 and they are counted, less the one used for it.
    let told = std::fs::metadata("/proc/self/fd").map_or(0, |meta| meta.len());
    let count = if told > 0 {
        usize::try_from(told).unwrap_or(usize::MAX)
    } else {
        std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count).saturating_sub(1)
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}
