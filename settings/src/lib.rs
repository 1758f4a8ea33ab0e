//! The one configuration: every key with its type, range and default; the layers that give it a value (defaults, a TOML file,
//! the environment, flags); and every problem with them, all at once.
//!
//! | module | what lives there |
//! |---|---|
//! | `table` | the keys: all that is known of each, from which documents, schema and the template file are made |
//! | `value` | values of a key, read from TOML or from text |
//! | `file`, `environment` | the two layers that people write |
//! | `resolve` | the layers put together: a value and its origin for each key |
//! | `settings` | the same as a typed structure |
//! | `problem`, `nearest` | what is wrong, where, and the nearest right thing |
//! | `document`, `schema` | the keys for people, and for editors |
//! | `change` | what differs between two configurations, and what of it a running broker can take up |
//!
//! What must not be here: sockets, processes, the meaning of a setting. Nothing is read from the process: files are read by
//! [`ConfigFile::read`] alone, the environment is handed in.
#![forbid(unsafe_code)]

mod change;
mod document;
mod environment;
mod file;
pub mod limits;
mod nearest;
mod problem;
mod resolve;
mod schema;
mod settings;
mod table;
mod value;

pub use change::{Change, changes, in_force};
pub use document::{markdown_table, template, variables_of};
pub use environment::{CORE_PREFIX, OTHER_VARIABLES, PREFIX, UNCHECKED_PREFIXES};
pub use file::{CONFIG_FILE_NAME, CONFIG_VARIABLE, ConfigFile, config_path};
pub use problem::{Origin, Problem, Problems};
pub use resolve::{Effective, FlagValue, Setting, Sources, resolve};
pub use schema::schema;
pub use settings::{
    Backing, Device, EmbeddingCache, Fallback, Model, ModelType, Precision, Serve, Settings, Sharing,
};
pub use table::{Kind, Live, Spec, default_models, model_table, table};
pub use value::Value;
