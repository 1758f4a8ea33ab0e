//! How a failure is told outside of Rust: the codes that users know, HTTP statuses, exit codes, and the error body. The one map
//! from [`Code`] and [`SdkError`] to all of them; docs/errors.md is made from it.

use crate::error::SdkError;
use shm_layout::code::Code;
use std::fmt::Write as _;
use std::time::Duration;

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The codes of error bodies: few, and for good. What happened exactly stands in the body's details.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorCode { $($(#[$doc])* $name,)* }

        impl ErrorCode {
            /// Each of them.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)*];

            /// Its name in error bodies.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(ErrorCode::$name => $text,)* }
            }
        }
    };
}

error_codes! {
    /// No model, or none of this id, is configured, or the configuration cannot be used.
    ModelNotConfigured = "MODEL_NOT_CONFIGURED",
    /// The model is of another type than what was asked of it.
    InvalidModelType = "INVALID_MODEL_TYPE",
    /// No such type or architecture is supported.
    UnsupportedModelType = "UNSUPPORTED_MODEL_TYPE",
    /// The model was not found anywhere.
    ModelNotFound = "MODEL_NOT_FOUND",
    /// The model could not be loaded.
    ModelLoadError = "MODEL_LOAD_ERROR",
    /// The same, of a text2text model.
    T5ModelLoadError = "T5_MODEL_LOAD_ERROR",
    /// The same, of a custom type.
    CustomModelLoadError = "CUSTOM_MODEL_LOAD_ERROR",
    /// A program or library that is needed is not installed.
    MissingDependency = "MISSING_DEPENDENCY",
    /// The request cannot be computed as it was made.
    GenerateEmbeddingsError = "GENERATE_EMBEDDINGS_ERROR",
    /// Computing failed.
    EmbeddingError = "EMBEDDING_ERROR",
    /// A device could not be set up.
    DeviceSetupError = "DEVICE_SETUP_ERROR",
    /// The cache failed.
    CacheError = "CACHE_ERROR",
    /// The model cannot be had just now.
    ModelUnavailable = "MODEL_UNAVAILABLE",
}

/// What kind of model a failure is about, where that is known: some codes name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum About {
    /// Any model, or none.
    #[default]
    Any,
    /// A text2text model.
    Text2Text,
    /// A custom type.
    Custom,
}

/// How a failure is told: one row of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorRow {
    /// Code of the error body.
    pub code: ErrorCode,
    /// HTTP status.
    pub http_status: u16,
    /// Exit code of the program; docs/operations.md says what each means.
    pub exit_code: u8,
}

const fn row(code: ErrorCode, http_status: u16, exit_code: u8) -> ErrorRow {
    ErrorRow { code, http_status, exit_code }
}

/// Exit codes, as the program has them.
mod exit {
    pub(super) const FAILED: u8 = 1;
    pub(super) const USAGE: u8 = 2;
    pub(super) const NO_BROKER: u8 = 3;
    pub(super) const MODEL: u8 = 4;
    pub(super) const INPUT: u8 = 5;
    pub(super) const BUSY: u8 = 6;
}

use ErrorCode::{
    EmbeddingError, GenerateEmbeddingsError, InvalidModelType, ModelLoadError, ModelNotConfigured,
    ModelNotFound, ModelUnavailable, UnsupportedModelType,
};

/// The row of a protocol code. [`Code::Ok`] has one too, so that a peer that calls a success a failure cannot break anything.
#[must_use]
pub const fn row_of_code(code: Code) -> ErrorRow {
    match code {
        Code::Ok | Code::ProtocolVersion | Code::LayoutMismatch | Code::BadFrame | Code::BadState => {
            row(ModelUnavailable, 502, exit::FAILED)
        }
        Code::PermissionDenied => row(ModelUnavailable, 403, exit::FAILED),
        Code::ModelNotFound => row(ModelNotFound, 404, exit::MODEL),
        Code::ModelInvalid | Code::ModelLoadError => row(ModelLoadError, 500, exit::MODEL),
        Code::ModelUnsupported => row(UnsupportedModelType, 422, exit::MODEL),
        Code::DiskFull => row(ModelLoadError, 507, exit::MODEL),
        Code::ModelUnavailable | Code::OutOfMemory => row(ModelUnavailable, 503, exit::MODEL),
        Code::ModelInUse => row(ModelUnavailable, 409, exit::BUSY),
        Code::LoadTimeout | Code::ShuttingDown => row(ModelUnavailable, 503, exit::BUSY),
        Code::Overloaded | Code::TooMany => row(ModelUnavailable, 429, exit::BUSY),
        Code::DeadlineExceeded => row(ModelUnavailable, 504, exit::BUSY),
        Code::Cancelled => row(GenerateEmbeddingsError, 499, exit::FAILED),
        Code::Stale => row(ModelUnavailable, 409, exit::FAILED),
        Code::EmptyInput | Code::InvalidUtf8 | Code::BadPayload => {
            row(GenerateEmbeddingsError, 400, exit::INPUT)
        }
        Code::TooLarge => row(GenerateEmbeddingsError, 413, exit::INPUT),
        Code::OutputTooSmall => row(GenerateEmbeddingsError, 500, exit::INPUT),
        Code::UnsupportedOperation => row(InvalidModelType, 400, exit::FAILED),
        Code::WrongTask => row(InvalidModelType, 400, exit::MODEL),
        Code::ProviderFailed => row(ErrorCode::CustomModelLoadError, 502, exit::FAILED),
        Code::ProviderTimeout => row(ModelUnavailable, 504, exit::BUSY),
        Code::JobCrashedEngine | Code::BadResult | Code::Internal => row(EmbeddingError, 500, exit::FAILED),
        Code::DeviceSetupError => row(ErrorCode::DeviceSetupError, 503, exit::FAILED),
        Code::ConfigInvalid => row(ModelNotConfigured, 422, exit::USAGE),
    }
}

/// The row of a failure of the SDK.
#[must_use]
pub fn row_of_error(error: &SdkError) -> ErrorRow {
    match error {
        SdkError::NoBroker { .. }
        | SdkError::StartFailed { .. }
        | SdkError::Connect(_)
        | SdkError::Disconnected { .. } => row(ModelUnavailable, 503, exit::NO_BROKER),
        SdkError::WouldBlock => row(ModelUnavailable, 429, exit::BUSY),
        SdkError::Argument(_) => row(GenerateEmbeddingsError, 400, exit::USAGE),
        SdkError::Fault { .. } => row(ModelUnavailable, 502, exit::FAILED),
        SdkError::ModelChanged { .. } => row(ModelUnavailable, 409, exit::FAILED),
        SdkError::SharingOff { .. } => row(ModelUnavailable, 503, exit::USAGE),
        other => other.protocol_code().map_or(row(EmbeddingError, 500, exit::FAILED), row_of_code),
    }
}

impl ErrorCode {
    /// The code that names the kind of model, where there is one.
    #[must_use]
    pub const fn about(self, about: About) -> ErrorCode {
        match (self, about) {
            (ModelLoadError, About::Text2Text) => ErrorCode::T5ModelLoadError,
            (ModelLoadError, About::Custom) => ErrorCode::CustomModelLoadError,
            _ => self,
        }
    }
}

/// An error body: `{"success": false, "code", "message", "details": {"reason", "retryable", "retry_after_ms"}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorBody {
    /// `code`.
    pub code: ErrorCode,
    /// `message`: what happened, and what to do about it.
    pub message: String,
    /// `details.reason`: what happened exactly, as a stable upper-case name ([`SdkError::code`]).
    pub reason: &'static str,
    /// `details.retryable`: whether the same may succeed later.
    pub retryable: bool,
    /// `details.retry_after_ms`: when a new attempt makes sense; zero where that is not known.
    pub retry_after: Duration,
}

impl ErrorBody {
    /// The body of a failure.
    #[must_use]
    pub fn of(error: &SdkError, about: About) -> ErrorBody {
        let retry_after = match error {
            SdkError::Refused { retry_after, .. } => *retry_after,
            _ => Duration::ZERO,
        };
        ErrorBody {
            code: row_of_error(error).code.about(about),
            message: error.to_string(),
            reason: error.code(),
            retryable: error.is_retryable(),
            retry_after,
        }
    }

    /// The body as one line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            "{{\"success\":false,\"code\":{},\"message\":{},\"details\":{{\"reason\":{},\"retryable\":{},\
             \"retry_after_ms\":{}}}}}",
            quoted(self.code.name()),
            quoted(&self.message),
            quoted(self.reason),
            self.retryable,
            self.retry_after.as_millis()
        )
    }
}

/// A text as a JSON string. Here, since a thin worker has no JSON library.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if (c as u32) < 0x20 || c == '\u{7f}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_row_that_makes_sense() {
        for code in Code::ALL {
            let row = row_of_code(*code);
            assert!((400..600).contains(&row.http_status), "{code}");
            assert!((1..=9).contains(&row.exit_code), "{code}");
        }
        let names: std::collections::HashSet<&str> = ErrorCode::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), 13);
    }

    #[test]
    fn retryable_refusals_are_no_faults_of_the_caller() {
        for code in Code::ALL {
            let refused =
                SdkError::Refused { code: *code, message: String::new(), retry_after: Duration::ZERO };
            let status = row_of_error(&refused).http_status;
            if refused.is_retryable() {
                assert!(matches!(status, 409 | 429 | 503 | 504), "{code}: {status}");
            }
        }
    }

    #[test]
    fn a_body_is_json_whatever_the_message() {
        let error = SdkError::Refused {
            code: Code::ModelLoadError,
            message: "a \"b\" \\ c\n\u{1}ü".into(),
            retry_after: Duration::from_millis(250),
        };
        assert_eq!(
            ErrorBody::of(&error, About::Text2Text).to_json(),
            "{\"success\":false,\"code\":\"T5_MODEL_LOAD_ERROR\",\"message\":\"MODEL_LOAD_ERROR: a \\\"b\\\" \\\\ \
             c\\n\\u0001ü\",\"details\":{\"reason\":\"MODEL_LOAD_ERROR\",\"retryable\":true,\"retry_after_ms\":250}}"
        );
        let none = SdkError::NoBroker { socket: "/x".into(), reason: "r".into() };
        let body = ErrorBody::of(&none, About::Any);
        assert_eq!((body.code, body.reason), (ErrorCode::ModelUnavailable, "NO_BROKER"));
    }
}
