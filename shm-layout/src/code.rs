//! The one list of refusals and failures that crosses a process boundary. A lane completion's status, a job frame's
//! status and an error frame all carry one of these; exit codes are derived from it in one place, in the `cli` crate.

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// Why something asked of a peer was not done. The numbers are part of the protocol and are never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Code { $($(#[$doc])* $name = $value,)* }

        impl Code {
            /// Every code, in the order of its number.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The code of a number that a peer wrote; `None` where there is no such code.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Code> {
                match number { $($value => Some(Code::$name),)* _ => None }
            }

            /// The stable upper-case name, as it stands in JSON output and in documents.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }
        }
    };
}

codes! {
    /// Done. A lane completion or an answer frame with this status carries its result.
    Ok = 0, "OK";
    /// The peer speaks another protocol version. Use one version of modelbroker for both sides.
    ProtocolVersion = 1, "PROTOCOL_VERSION";
    /// The peer was built with another shared-memory layout.
    LayoutMismatch = 2, "LAYOUT_MISMATCH";
    /// A frame that cannot be understood: unknown kind, bad length, undecodable body.
    BadFrame = 3, "BAD_FRAME";
    /// A message that is not allowed in this state of the session (for example anything before `Hello`).
    BadState = 4, "BAD_STATE";
    /// The peer is not allowed to do this (another user).
    PermissionDenied = 5, "PERMISSION_DENIED";
    /// No such model in any place that was looked at.
    ModelNotFound = 10, "MODEL_NOT_FOUND";
    /// The model's files are wrong: truncated, lying, or of a shape that the configuration contradicts.
    ModelInvalid = 11, "MODEL_INVALID";
    /// The model's architecture is not supported.
    ModelUnsupported = 12, "MODEL_UNSUPPORTED";
    /// Loading failed for a reason outside the model: limits, disk, memory, a killed loader.
    ModelLoadError = 13, "MODEL_LOAD_ERROR";
    /// The model is loaded but no engine can serve it now.
    ModelUnavailable = 14, "MODEL_UNAVAILABLE";
    /// The model did not become ready within the time that the caller gave.
    LoadTimeout = 15, "LOAD_TIMEOUT";
    /// There is no space left where an image was to be written.
    DiskFull = 16, "DISK_FULL";
    /// There is not enough memory for the model, also when everything idle is given up.
    OutOfMemory = 17, "OUT_OF_MEMORY";
    /// A limit of work in flight is reached; try again later, or with less at a time.
    Overloaded = 20, "OVERLOADED";
    /// The caller's deadline passed before the job was computed.
    DeadlineExceeded = 21, "DEADLINE_EXCEEDED";
    /// The caller cancelled the job.
    Cancelled = 22, "CANCELLED";
    /// The peer is on its way out and takes no new work.
    ShuttingDown = 23, "SHUTTING_DOWN";
    /// A lease, lane or generation that is not (or no longer) the caller's.
    Stale = 24, "STALE";
    /// A limit on sessions, leases or lanes is reached.
    TooMany = 25, "TOO_MANY";
    /// The model is in use and was not to be taken from those who use it.
    ModelInUse = 26, "MODEL_IN_USE";
    /// A list with nothing in it.
    EmptyInput = 30, "EMPTY_INPUT";
    /// Input over a limit of size or count.
    TooLarge = 31, "TOO_LARGE";
    /// Text that is not valid UTF-8.
    InvalidUtf8 = 32, "INVALID_UTF8";
    /// A payload whose lengths contradict each other.
    BadPayload = 33, "BAD_PAYLOAD";
    /// An operation that this model or this version does not know.
    UnsupportedOperation = 34, "UNSUPPORTED_OPERATION";
    /// The answer does not fit into the room that the caller gave.
    OutputTooSmall = 35, "OUTPUT_TOO_SMALL";
    /// The model is of another kind than the operation needs: an embedding model cannot rank or write, nor the others embed.
    WrongTask = 36, "WRONG_TASK";
    /// This job was running each time an engine died and is not tried again.
    JobCrashedEngine = 40, "JOB_CRASHED_ENGINE";
    /// The result failed the engine's own checks (not finite, not of unit norm) and is withheld.
    BadResult = 41, "BAD_RESULT";
    /// A failure inside the peer that none of the others names.
    Internal = 42, "INTERNAL";
    /// The provider of the model failed this job, or its answer was not one, or it died with it too often.
    ProviderFailed = 50, "PROVIDER_FAILED";
    /// The provider of the model did not answer this job within the time that it allows itself.
    ProviderTimeout = 51, "PROVIDER_TIMEOUT";
    /// The configuration cannot be used; what held before holds on.
    ConfigInvalid = 53, "CONFIG_INVALID";
    /// A device that a model is to be computed on cannot be set up, or failed; the model is computed on the CPU.
    DeviceSetupError = 54, "DEVICE_SETUP_ERROR";
}

// In a frame a code is its number as a u16, so that the numbers above are the whole of its encoding.
impl Encode for Code {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        (*self as u16).encode(encoder)
    }
}

impl<C> Decode<C> for Code {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let number = u16::decode(decoder)?;
        Code::from_number(u32::from(number)).ok_or(DecodeError::Other("a code that is not in the protocol"))
    }
}

impl<'de, C> BorrowDecode<'de, C> for Code {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Code::decode(decoder)
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    #[test]
    fn numbers_and_names_round_trip_and_are_unique() {
        let mut names = std::collections::HashSet::new();
        for code in Code::ALL {
            assert_eq!(Code::from_number(*code as u32), Some(*code));
            assert!(names.insert(code.name()));
        }
        assert_eq!(Code::from_number(9999), None);
    }
}
