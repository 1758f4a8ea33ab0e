//! What a peer can do wrong in a lane.

/// The peer broke the lane's protocol. The lane is not used any further; whose fault it is follows from who reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneFault {
    /// The region's header is not of this layout.
    #[error("lane header: field {0} is not what this layout writes")]
    Header(&'static str),
    /// A ring index is further ahead than the ring is long.
    #[error("{ring} index ran ahead: head {head}, tail {tail}, capacity {capacity}")]
    IndexOutOfRange {
        /// Which ring.
        ring: &'static str,
        /// Reader's position.
        head: u32,
        /// Writer's position.
        tail: u32,
        /// Entries in the ring.
        capacity: u32,
    },
    /// An entry does not carry its own position.
    #[error("{ring} entry at position {expected} says it is at {found}")]
    Tripwire {
        /// Which ring.
        ring: &'static str,
        /// Where it was read.
        expected: u32,
        /// What it says.
        found: u32,
    },
    /// A job cell that does not exist.
    #[error("job cell {0} does not exist")]
    NoSuchCell(u32),
    /// A job cell was submitted again before its answer was taken, or submitted without a sequence.
    #[error("job cell {0} was submitted while it was in flight")]
    CellInFlight(u32),
    /// A completion for a job that is not in flight.
    #[error("completion for cell {0}, which has no such job in flight")]
    NotInFlight(u32),
    /// An arena slot that does not exist, or a length over its size.
    #[error("{what} slot: class {class}, index {index}, {len_bytes} bytes is not in the arena")]
    BadSlot {
        /// `input` or `output`.
        what: &'static str,
        /// Slot class.
        class: u16,
        /// Number in the class.
        index: u16,
        /// Claimed length in bytes.
        len_bytes: u32,
    },
    /// A number that is not in the protocol.
    #[error("{what} {value} is not in the protocol")]
    UnknownNumber {
        /// Which field.
        what: &'static str,
        /// What was found.
        value: u32,
    },
}
