//! What a worker links to use the models of the user's broker: sessions, leases, embedding calls. Thin: no weights, no
//! tokenizer, no framework; with the feature `local` a worker can also compute itself, on the pages that all share.
//!
//! What must not be here: the broker's side of anything, and the engine's (but for calling it in `attach`).
//!
//! # Blocking
//! ```no_run
//! let client = worker_sdk::Client::connect()?;      // starts a broker when none runs
//! let model = client.model("all-MiniLM-L6-v2")?;    // loads it when nobody has yet; "" is the default model
//! let vectors = model.embed(&["a cat", "a dog"])?;
//! assert_eq!(vectors.len(), 2);
//! println!("{} dimensions, first number {}", vectors.dim(), vectors[0][0]);
//! # Ok::<(), worker_sdk::SdkError>(())
//! ```
//! Lists of any length are fine: they are cut into jobs within the limits, some of which are in flight at once, and come
//! back in order. An empty list gives an empty result. A single text over 512 KiB is an error that names it.
//!
//! # Asynchronous, on any runtime
//! ```no_run
//! use worker_sdk::{Client, EmbedOptions, SdkError};
//!
//! async fn vectors(texts: &[String]) -> Result<worker_sdk::Embeddings, SdkError> {
//!     let model = Client::connect()?.model("")?;    // milliseconds when the model is loaded; blocking
//!     model.submit(texts, &EmbedOptions::bulk())?.await
//! }
//! ```
//! A [`Job`] can also be waited for ([`Job::wait`]), asked ([`Job::try_take`]) and cancelled; dropping it cancels it.
//!
//! # Timeouts, priorities, progress
//! ```no_run
//! use std::time::Duration;
//! use worker_sdk::{Client, EmbedOptions, ModelRequest, StartBroker};
//!
//! let client = Client::builder().name("indexer").start_broker(StartBroker::Never).connect()?;
//! let model = client.model_with(
//!     ModelRequest::new("all-MiniLM-L6-v2")
//!         .wait(Duration::from_secs(120))
//!         .progress(|step| eprintln!("{}: {} of {} bytes", step.stage, step.done_bytes, step.total_bytes)),
//! )?;
//! let options = EmbedOptions::bulk().timeout(Duration::from_secs(5));
//! match model.embed_with(&["a cat"], &options) {
//!     Ok(vectors) => println!("{:?}", &vectors[0][..3]),
//!     Err(error) if error.is_retryable() => println!("later perhaps: {error}"),
//!     Err(error) => return Err(error),
//! }
//! # Ok::<(), worker_sdk::SdkError>(())
//! ```
//!
//! # Models of one's own type
//! ```no_run
//! use worker_sdk::{CallOptions, Client, ProviderError, ProviderSpec};
//!
//! // In the process that provides it:
//! let provider = Client::connect()?.provide(ProviderSpec::new("custom/reverse").threads(2))?;
//! provider.serve(|job| match std::str::from_utf8(job.payload()) {
//!     Ok(text) => Ok(text.chars().rev().collect::<String>().into_bytes()),
//!     Err(_) => Err(ProviderError::bad_input("this model reverses UTF-8")),
//! })?;
//!
//! // In any other:
//! let model = Client::connect()?.model("custom/reverse")?;
//! assert_eq!(model.call("abc".as_bytes(), &CallOptions::default())?, b"cba");
//! # Ok::<(), worker_sdk::SdkError>(())
//! ```
//! The broker queues, bounds and times calls as it does all jobs; providers that die are waited for or replaced by others
//! of the same id.
//!
//! # Threads
//! [`Client`] and [`Model`] are cheap to clone and may be used by any number of threads at once. No thread is started
//! for blocking calls: those who wait take turns in waiting for all. While futures are awaited and no thread is blocked
//! in a call on their model, one background thread for that model drives them.
//!
//! # When the broker goes away
//! Calls go on: the SDK connects again with pauses that grow, starts a broker if it may, takes its leases up again and
//! sends again what was not answered (computing an embedding twice does no harm). Callers see a delay. It ends with the
//! call's own timeout ([`SdkError::DeadlineExceeded`]) or, for calls without one, with the client's patience of 30 s
//! ([`SdkError::Disconnected`]). If the model that comes back is another one, a list that was half done is begun anew:
//! one result is never a mixture. An engine's death is the broker's affair and is not noticed here at all.
//!
//! # When a model is reloaded
//! The broker loads the new generation beside the old one, switches, and tells. Each [`Model`] takes it up by itself at its
//! next call (without a cache: at a call within some milliseconds); until then the old one serves. No call fails for it. [`Client::reload_model`] orders one.
//!
//! # Cache
//! A text that anybody embedded before is answered from memory that the broker shares: in this process, in microseconds,
//! without a system call, also while the broker is away. [`Embeddings::cached`] says which vectors came that way; they are
//! those that computing gives, bit for bit. [`EmbedOptions::bypass_cache`] computes all the same.
//!
//! # Forks
//! A process may fork after connecting, from any thread at any time. In the child, clients and models go on working with a
//! session of the child's own, made on first use; the parent's is not touched. Only what was in flight stays with the
//! parent: its [`Job`]s give [`SdkError::Forked`] in the child. Descriptors of the parent are closed in the child at its
//! first use of the SDK, except those that another thread of the parent was using at the instant of the fork.
//!
//! # Without a broker
//! With the feature `local` and [`Fallback::Local`] a call goes on where the shared model cannot be had: the process loads the
//! model for itself, logs that, and returns to the shared one when a later call finds it again. [`Model::route_in_use`] and
//! [`Embeddings::way`] say which it was; the vectors are the same bit for bit. How to bring programs over, step by step and
//! back, is in `docs/migration.md`.
//!
//! # Environment
//! | variable | meaning |
//! |---|---|
//! | `MODELBROKER_SOCKET` | the broker's socket; else `$XDG_RUNTIME_DIR/modelbroker/broker.sock` or `/tmp/modelbroker-UID/broker.sock` |
//! | `MODELBROKER_BIN` | the program to start a broker with; else `modelbroker` beside this program or on the `PATH` |
//! | `MODELBROKER_START` | `never`: no broker is ever started |
//! | `MODELBROKER_FALLBACK` | `local`: load a model in this process when the shared one cannot be had (`error`) |
//! | `MODELBROKER_SHARING_ENABLED`, `CORE_MODEL_MANAGER_SHARING_ENABLED` | `false`: every program loads its models itself |
//! | `MODELBROKER_SHARING_ROLLOUT_PERCENT`, `CORE_MODEL_MANAGER_SHARING_ROLLOUT_PERCENT` | share of programs that use the broker, by their names |

#![forbid(unsafe_code)]

#[cfg(feature = "local")]
mod attach;
mod cache;
mod call;
mod client;
#[cfg(feature = "local")]
mod compute;
mod connect;
mod embeddings;
mod error;
mod error_body;
#[cfg(feature = "local")]
mod fallback;
mod fork_cell;
mod generate;
mod job;
mod model;
mod models;
mod prompt;
mod provider;
mod rank;
mod seat;
mod services;
mod session;
mod settings;
mod sharing;
mod split;
mod start;
mod time;

#[cfg(feature = "local")]
pub use attach::AttachedModel;
pub use call::{CallJob, CallOptions};
pub use client::{Client, ClientBuilder};
pub use embeddings::Embeddings;
pub use error::SdkError;
pub use error_body::{About, ErrorBody, ErrorCode, ErrorRow, row_of_code, row_of_error};
pub use generate::{TextStream, user_message};
pub use job::Job;
pub use model::Model;
pub use models::{HealthyModel, LoadedModel, ReloadedModel, UnloadedModel};
pub use prompt::Prompt;
pub use provider::{ProvidedJob, Provider, ProviderError, ProviderSpec, ProviderStop};
pub use rank::{LabelScore, Ranked};
pub use services::{SUMMARY_PREFIX, SummaryOptions};
pub use settings::{
    EmbedOptions, LOG_FILE_NAME, ModelRequest, PROGRAM_VARIABLE, Route, SOCKET_FILE_NAME, SOCKET_VARIABLE,
    START_VARIABLE, StartBroker,
};
pub use sharing::{FALLBACK_VARIABLE, Fallback, ROLLOUT_VARIABLES, SHARING_VARIABLES, Way, rollout_bucket};
pub use shm_layout::code::Code;
pub use shm_layout::image::Task;
pub use shm_layout::payload::PayloadError;
pub use shm_layout::wire::{
    ChatMessage, ConfigurationReloaded, FinishReason, GenerateAnswer, GeneratePrompt, GenerateSettings,
    LoadProgress, ModelDescription, NamedPrompt, Operation, Priority, StatusReport, TaskFacts, UnloadMode,
    Welcome,
};
pub use shm_os::socket::AllowedPeer;
