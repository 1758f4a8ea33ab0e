//! Which lanes exist and how far each is handed over. Regions and doorbells themselves are kept by the I/O side.

use std::collections::BTreeMap;

/// How far a lane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LaneState {
    /// Its region is being made; the answer to this request is due.
    Making { request_id: u64, want_image: bool },
    /// The client has it; `in_engine` tells whether the present engine was told of it.
    Live { in_engine: bool },
    /// Its client is gone; the engine still maps it.
    Dropping,
}

/// One lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lane {
    pub(crate) session: u64,
    pub(crate) lease_id: u64,
    pub(crate) generation: u64,
    pub(crate) state: LaneState,
}

/// All lanes.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    map: BTreeMap<u64, Lane>,
    last_id: u64,
}

impl Lanes {
    /// An id for a new lane, unique in the broker's life.
    pub(crate) fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(crate) fn insert(&mut self, lane_id: u64, lane: Lane) {
        self.map.insert(lane_id, lane);
    }

    pub(crate) fn get(&self, lane_id: u64) -> Option<Lane> {
        self.map.get(&lane_id).copied()
    }

    pub(crate) fn set(&mut self, lane_id: u64, state: LaneState) {
        if let Some(lane) = self.map.get_mut(&lane_id) {
            lane.state = state;
        }
    }

    pub(crate) fn remove(&mut self, lane_id: u64) -> Option<Lane> {
        self.map.remove(&lane_id)
    }

    /// Lanes that exist, those that the engine has not let go of counted.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Lanes that clients have.
    pub(crate) fn live(&self) -> impl Iterator<Item = (u64, Lane)> {
        self.map.iter().filter(|(_, l)| matches!(l.state, LaneState::Live { .. })).map(|(id, l)| (*id, *l))
    }

    /// The engine is gone and with it its mappings: lanes without client end, the others must be handed over again.
    pub(crate) fn engine_gone(&mut self) {
        self.map.retain(|_, lane| lane.state != LaneState::Dropping);
        for lane in self.map.values_mut() {
            if let LaneState::Live { in_engine } = &mut lane.state {
                *in_engine = false;
            }
        }
    }
}
