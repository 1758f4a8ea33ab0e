//! A lease as one seat holds it: the session it came over, and the lane or the socket that its jobs go through. Who
//! waits for what is `seat`'s.

use super::jobs::{Entry, Push, Wire};
use crate::cache::ClientCache;
use crate::error::SdkError;
use crate::session::{JobReply, Reply, Sent, Session};
use crate::settings::Route;
use crate::split::output_capacity_bytes;
use shm_layout::code::Code;
use shm_layout::lane::{ClientLane, Geometry, JobRequest, LaneFault, REGION_BYTES, SubmitError, Ticket};
use shm_layout::wire::{ClientMessage, JobFrame, Leased, ModelDescription, Partial, is_provided};
use shm_os::Doorbell;
use shm_os::lane_mapping::LaneMapping;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most dimensions that a model may claim: one vector must fit an answer.
const MAX_DIM: u32 = 1 << 17;
/// Completions taken at once.
const REAP_MOST: usize = 64;

/// What came over the socket for a job.
#[derive(Debug)]
pub(super) enum Mail {
    /// Its end.
    End(Arrival),
    /// A piece of its answer.
    Piece { job: u64, partial: Partial },
}

/// One job's end, whichever way it came.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) job: u64,
    pub(super) status: Code,
    /// The result when `status` is Ok, else a message.
    pub(super) bytes: Vec<u8>,
    pub(super) retry_after: Duration,
}

#[derive(Debug)]
pub(super) struct LaneEnd {
    pub(super) mapping: Arc<LaneMapping>,
    pub(super) client: ClientLane<Arc<LaneMapping>>,
    doorbell: Doorbell,
    tickets: HashMap<Ticket, u64>,
}

#[derive(Debug)]
pub(super) struct Link {
    /// Tells one link of a seat from the next.
    pub(super) number: u64,
    pub(super) session: Arc<Session>,
    pub(super) model: Arc<ModelDescription>,
    /// When something was last heard from the other side.
    pub(super) heard: Instant,
    lease_id: u64,
    pub(super) lane: Option<LaneEnd>,
    /// The generation's cache, until the seat has taken it.
    pub(super) cache: Option<ClientCache>,
    socket_jobs: HashMap<u64, u64>,
}

impl Link {
    /// Takes up a lease; gives it back when it is not what was asked for.
    pub(super) fn from_reply(
        number: u64,
        session: Arc<Session>,
        reply: Reply,
        route: Route,
    ) -> Result<Link, SdkError> {
        let Reply::Leased(leased, mut fds) = reply else {
            let what = "it answered a request for a lease with something else".into();
            return Err(SdkError::Fault { peer: "the broker", what });
        };
        // The last of them, when it is there.
        let cache_fd = leased.cache.and_then(|_| fds.pop());
        let lane = match Link::check(&leased, fds, route) {
            Ok(lane) => lane,
            Err(error) => {
                session.tell(&ClientMessage::Release { lease_id: leased.lease_id });
                return Err(error);
            }
        };
        let mapping = lane.as_ref().map(|lane| Arc::downgrade(&lane.mapping)).unwrap_or_default();
        let cache = ClientCache::map(leased.cache, cache_fd, &leased.model, mapping);
        Ok(Link {
            number,
            session,
            lease_id: leased.lease_id,
            model: Arc::new(leased.model),
            heard: Instant::now(),
            lane,
            cache,
            socket_jobs: HashMap::new(),
        })
    }

    fn check(leased: &Leased, fds: Vec<OwnedFd>, route: Route) -> Result<Option<LaneEnd>, SdkError> {
        let fault = |what: String| SdkError::Fault { peer: "the broker", what };
        if is_provided(leased.model.generation) {
            // Its jobs travel as frames, whatever was asked for.
            return match leased.model.output_dim {
                0..=MAX_DIM => Ok(None),
                dim => Err(fault(format!("it leased a model of {dim} dimensions"))),
            };
        }
        if !(1..=MAX_DIM).contains(&leased.model.output_dim) {
            return Err(fault(format!("it leased a model of {} dimensions", leased.model.output_dim)));
        }
        match (route, &leased.lane) {
            (Route::Socket, _) => return Ok(None),
            (Route::Lane, None) => return Err(fault("it gave no lane with the lease".into())),
            (Route::Lane, Some(lane)) if lane.region_bytes != REGION_BYTES => {
                return Err(fault(format!(
                    "it gave a lane of {} bytes instead of {REGION_BYTES}",
                    lane.region_bytes
                )));
            }
            (Route::Lane, Some(_)) => {}
        }
        let mut fds = fds.into_iter();
        let (Some(region), Some(doorbell)) = (fds.next(), fds.next()) else {
            return Err(fault("it gave a lane without its descriptors".into()));
        };
        let mapping = Arc::new(LaneMapping::map(region.as_fd()).map_err(|error| fault(error.to_string()))?);
        mapping.prefault_tables();
        let doorbell = Doorbell::from_received(doorbell).map_err(|error| fault(error.to_string()))?;
        let client =
            ClientLane::new(Arc::clone(&mapping), Geometry::V1).map_err(|error| fault(error.to_string()))?;
        Ok(Some(LaneEnd { mapping, client, doorbell, tickets: HashMap::new() }))
    }

    /// Whether a client's process computes the model, not an engine.
    pub(super) fn is_provided(&self) -> bool {
        is_provided(self.model.generation)
    }

    pub(super) fn dim(&self) -> usize {
        self.model.output_dim as usize
    }

    /// Sends a job if there is room for it. On a lane the engine is not woken yet: see [`Link::ring`].
    pub(super) fn push(&mut self, seat_id: u64, wire_id: u64, id: u64, entry: &Entry) -> Push {
        let spec = &entry.spec;
        let capacity = entry.capacity_bytes.unwrap_or_else(|| {
            output_capacity_bytes(spec.operation, spec.texts, spec.payload.len(), self.dim())
        });
        let deadline_ns = spec.deadline.as_monotonic_ns();
        if let Some(lane) = &mut self.lane {
            let request = JobRequest {
                operation: spec.operation,
                priority: spec.priority,
                deadline_ns,
                input: &[&spec.payload],
                output_capacity_bytes: capacity,
            };
            return match lane.client.submit(&request) {
                Ok(ticket) => {
                    lane.tickets.insert(ticket, id);
                    Push::Sent(Wire::Lane(ticket))
                }
                Err(SubmitError::JobsFull(_) | SubmitError::ArenaFull(_)) => Push::Full,
                Err(error @ SubmitError::TooLarge(_)) => Push::Failed(SdkError::Refused {
                    code: Code::TooLarge,
                    message: error.to_string(),
                    retry_after: Duration::ZERO,
                }),
            };
        }
        let job = JobFrame {
            lease_id: self.lease_id,
            job_id: wire_id,
            operation: spec.operation,
            priority: spec.priority,
            deadline_ns,
            payload: spec.payload.clone(),
        };
        match self.session.send_job(seat_id, job) {
            Ok(Sent::Yes) => {
                self.socket_jobs.insert(wire_id, id);
                Push::Sent(Wire::Socket(wire_id))
            }
            // A session that has just ended is found by whoever leads; until then nothing goes out.
            Ok(Sent::Full) | Err(SdkError::Disconnected { .. }) => Push::Full,
            Err(_) if !self.session.is_alive() => Push::Full,
            Err(error) => Push::Failed(error),
        }
    }

    /// Wakes the engine if it sleeps; to be called after jobs were pushed.
    pub(super) fn ring(&self) {
        if let Some(lane) = &self.lane
            && lane.client.needs_doorbell()
            && let Err(error) = lane.doorbell.ring()
        {
            tracing::warn!(%error, "the engine could not be woken");
        }
    }

    /// Tells the engine that nobody wants this answer.
    pub(super) fn cancel(&self, wire: Wire) {
        match (wire, &self.lane) {
            (Wire::Lane(ticket), Some(lane)) => lane.client.cancel(ticket),
            (Wire::Socket(job_id), _) => self.session.tell(&ClientMessage::Cancel { job_id }),
            (Wire::Lane(_), None) => {}
        }
    }

    /// Takes what has been completed in the lane. On a fault, what came before it is given all the same.
    pub(super) fn reap(&mut self) -> (Vec<Arrival>, Option<LaneFault>) {
        let Some(lane) = &mut self.lane else { return (Vec::new(), None) };
        if !lane.client.has_completions() {
            return (Vec::new(), None);
        }
        let mut arrivals = Vec::new();
        let tickets = &mut lane.tickets;
        let outcome = lane.client.reap(REAP_MOST, |completion, output| {
            if let Some(job) = tickets.remove(&completion.ticket) {
                let (status, bytes) = (completion.status, output.to_vec());
                arrivals.push(Arrival { job, status, bytes, retry_after: Duration::ZERO });
            }
        });
        self.heard = Instant::now();
        (arrivals, outcome.err())
    }

    /// Matches answers that came over the socket with their jobs.
    pub(super) fn sort(&mut self, mail: Vec<JobReply>) -> Vec<Mail> {
        if !mail.is_empty() {
            self.heard = Instant::now();
        }
        mail.into_iter()
            .filter_map(|reply| match reply {
                JobReply::Answered(answer) => self.socket_jobs.remove(&answer.job_id).map(|job| {
                    let (status, bytes) = (answer.status, answer.payload);
                    Mail::End(Arrival { job, status, bytes, retry_after: Duration::ZERO })
                }),
                JobReply::Refused { job_id, refusal } => self.socket_jobs.remove(&job_id).map(|job| {
                    Mail::End(Arrival {
                        job,
                        status: refusal.code,
                        bytes: refusal.message.into_bytes(),
                        retry_after: Duration::from_millis(u64::from(refusal.retry_after_ms)),
                    })
                }),
                JobReply::Piece(partial) => {
                    self.socket_jobs.get(&partial.job_id).map(|job| Mail::Piece { job: *job, partial })
                }
            })
            .collect()
    }

    /// Whether its model was replaced by another generation, as far as was read.
    pub(super) fn is_superseded(&self) -> bool {
        self.session.is_superseded(self.lease_id)
    }

    /// Gives the lease back.
    pub(super) fn release(self) {
        self.session.forget_superseded(self.lease_id);
        if self.session.is_alive() {
            self.session.tell(&ClientMessage::Release { lease_id: self.lease_id });
        }
    }
}
