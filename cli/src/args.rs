//! The command line: every subcommand and option, with the texts that `--help` shows. No behaviour.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

mod texts;

pub(crate) use texts::{ClassifyArgs, CorpusArgs, GenerateArgs, RankArgs, SimilarArgs, SummarizeArgs};

/// One copy of each model's weights per machine, used by every process on it.
#[derive(Debug, Parser)]
#[command(name = "modelbroker", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// The broker's socket [default: MODELBROKER_SOCKET, else broker.sock in the user's run folder]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// The configuration file [default: MODELBROKER_CONFIG, else ~/.config/modelbroker/config.toml if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Give a key of the configuration another value; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = crate::configuration::key_and_value)]
    pub(crate) set: Vec<(String, String)>,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 bad arguments, 3 no broker, 4 the model cannot be had, \
5 input refused, 6 busy or too slow (try again), 7 partly done, 8 a check found something wrong, 9 a broker runs already.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the broker in the foreground
    Serve(ServeArgs),
    /// Ask the running broker to finish its work and leave
    Stop(StopArgs),
    /// Show models, engines and sessions
    Status(JsonArgs),
    /// Show the models that the broker knows
    Models(JsonArgs),
    /// Load, unload, reload, check or list models
    Model(ModelArgs),
    /// Turn texts into vectors
    Embed(EmbedArgs),
    /// Make a text shorter, with a text-to-text model
    Summarize(SummarizeArgs),
    /// Write text: how a chat or text-to-text model goes on from a prompt
    Generate(GenerateArgs),
    /// Find the texts of a file that are most like a query
    Similar(SimilarArgs),
    /// Put the texts of a file in the order of how well they answer a query, with a reranker
    Rank(RankArgs),
    /// Give texts the labels of a classifier
    Classify(ClassifyArgs),
    /// Index documents into a store, one subprocess per document
    Index(IndexArgs),
    /// Search a store
    Search(SearchArgs),
    /// Generate load and measure it
    Load(LoadArgs),
    /// Say what is wrong with this machine or setup, and how to fix it
    Doctor(DoctorArgs),
    /// Show the settings that hold and where each comes from
    Config(ConfigArgs),
    /// Have the running broker read its configuration again
    ReloadConfig(JsonArgs),
    /// Show the main job end to end: one copy of a model, many processes
    Demo(DemoArgs),
    /// Compute jobs (started by the broker)
    #[command(hide = true)]
    Engine(EngineArgs),
    /// Load a model (started by the broker)
    #[command(hide = true)]
    LoadModel(LoadModelArgs),
    /// Index one document (started by `index`)
    #[command(hide = true)]
    IndexDocument(IndexDocumentArgs),
    /// One worker process of `load` or `demo` (started by them)
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// What holds an image's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backing {
    /// By size: memfd below 512 MiB, file from there on
    Auto,
    /// A sealed memory object: nobody can change it, not even its owner
    Memfd,
    /// A read-only file in the cache folder: a restart maps it again at once
    File,
    /// A POSIX shared-memory object
    PosixShm,
}

/// Precision of a model's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// Single precision: the vectors of sentence-transformers
    F32,
    /// bfloat16: half the memory, cosine above 0.9999
    Bf16,
    /// 8-bit integers: a quarter of the memory, cosine above 0.995
    Int8,
    /// bf16 where this CPU has instructions for it, else f32
    Auto,
}

impl Backing {
    /// The word in settings.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Backing::Auto => "auto",
            Backing::Memfd => "memfd",
            Backing::File => "file",
            Backing::PosixShm => "posix-shm",
        }
    }
}

impl Precision {
    /// The word in settings.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
            Precision::Auto => "auto",
        }
    }
}

/// Settings of `serve`. Each stands for a key of the configuration, whose default, variables and file hold where it is not
/// given.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Model for clients that name none: configured id, name or folder
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Where models and images are cached
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// What images lie in
    #[arg(long, value_enum)]
    pub(crate) backing: Option<Backing>,
    /// Precision of models that are asked for without one; a model's name may end in `:f32`, `:bf16`, `:int8` or `:auto`
    #[arg(long, value_enum)]
    pub(crate) precision: Option<Precision>,
    /// Compute threads of the engine; 0 = the cores that this process may use
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u64>,
    /// Leave after so many seconds without any session
    #[arg(long, value_name = "SECONDS")]
    pub(crate) idle_exit: Option<u64>,
    /// Append log lines to this file instead of stderr
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Log lines as JSON
    #[arg(long)]
    pub(crate) log_json: bool,
    /// Let processes of other users in
    #[arg(long)]
    pub(crate) allow_other_users: bool,
    /// Vectors that the cache of each loaded model holds at most; 0 = no cache
    #[arg(long, value_name = "N")]
    pub(crate) cache_entries: Option<u64>,
    /// How long a vector is kept, in seconds; 0 = as long as the model is loaded
    #[arg(long, value_name = "SECONDS")]
    pub(crate) cache_ttl: Option<u64>,
    /// Keep the caches' vectors in files in the cache folder, over restarts
    #[arg(long)]
    pub(crate) cache_persist: bool,
    /// How long a model that nobody uses stays loaded, in seconds; 0 = for ever
    #[arg(long, value_name = "SECONDS")]
    pub(crate) unload_after: Option<u64>,
    /// Models loaded at once; 0 = no such bound
    #[arg(long, value_name = "N")]
    pub(crate) max_models: Option<u64>,
    /// Bytes that models and caches may take, or a text such as "8 GiB"
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_budget: Option<String>,
    /// Models loaded at start and kept, beside those configured so; may be repeated
    #[arg(long, value_name = "MODEL")]
    pub(crate) preload: Vec<String>,
    /// A client started it: `--idle-exit` and `--log-file` hold only where the configuration says nothing
    #[arg(long, hide = true)]
    pub(crate) started_by_client: bool,
    /// Keep a process running that provides the model custom/NAME; may be given several times
    #[arg(long = "provider", value_name = "ID=COMMAND", value_parser = crate::commands::provided::parse_command)]
    pub(crate) providers: Vec<broker::ProviderCommand>,
    /// Leave the engine readable for this user's other processes, so that its memory can be counted
    #[arg(long, hide = true)]
    pub(crate) inspectable: bool,
    /// Descriptor that is written to and closed once the socket accepts connections
    #[arg(long, value_name = "N", hide = true)]
    pub(crate) ready_fd: Option<i32>,
}

/// Which part of the configuration is looked at.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Print JSON: {key: {"value": …, "origin": "…"}}
    #[arg(long)]
    pub(crate) json: bool,
    /// What else to do
    #[command(subcommand)]
    pub(crate) action: Option<ConfigAction>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigAction {
    /// Say what is wrong with the configuration; ends with 2 when something is
    Check {
        /// Look at this file instead
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of the configuration file
    Schema,
    /// Write a configuration file with every key, commented out
    Init {
        /// Where to [default: where it would be read]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: ModelCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Load a model and wait until it is served
    Load {
        /// Model id, alias or folder
        id: String,
        /// Longest wait, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        timeout: u64,
    },
    /// Let go of a model and give its memory back; refused while somebody uses it
    Unload {
        /// Model id, alias or folder
        id: String,
        /// If it is in use, unload it as soon as it is not
        #[arg(long, conflicts_with = "force")]
        when_idle: bool,
        /// Forget it even if it is in use: who holds it keeps it, who asks next loads it anew
        #[arg(long)]
        force: bool,
    },
    /// Load a model anew beside the present one and switch; nobody who uses it fails
    Reload {
        /// Model id, alias or folder
        id: String,
        /// Longest wait, in seconds; the reload goes on after it
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        timeout: u64,
    },
    /// Have a model compute something known
    Health {
        /// Model id, alias or folder
        id: String,
        /// Longest wait, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u64,
    },
    /// Show the models that the broker knows, or one of them
    List {
        /// Model id, alias or folder
        id: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Longest wait for the work that was accepted, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain: u64,
}

#[derive(Debug, Args)]
pub(crate) struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `doctor` looks at.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Also read every compiled image in the cache and check its hash; damaged ones are removed
    #[arg(long)]
    pub(crate) images: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How texts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InputFormat {
    /// One text a line
    Lines,
    /// One JSON object a line: {"text": "…"}
    Jsonl,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// One JSON object a line: {"index": 0, "embedding": […], "cached": false}
    Jsonl,
    /// One JSON document
    Json,
    /// A NumPy array of float32, rows x dimension
    Npy,
}

#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    /// Model id or folder [default: the broker's default model]
    #[arg(long, value_name = "ID", default_value = "")]
    pub(crate) model: String,
    /// How stdin is read
    #[arg(long, value_enum, default_value = "lines")]
    pub(crate) input: InputFormat,
    /// How vectors are written
    #[arg(long, value_enum, default_value = "jsonl")]
    pub(crate) format: OutputFormat,
    /// Send jobs through shared memory or as frames on the socket
    #[arg(long, value_enum, default_value = "lane")]
    pub(crate) route: RouteArg,
    /// Longest wait for an answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Compute every text, whatever the cache holds, and keep nothing in it
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Put the model's prompt of this name before each text [default: the model's own default, if it has one]
    #[arg(long, value_name = "NAME", conflicts_with = "prompt")]
    pub(crate) prompt_name: Option<String>,
    /// Put this before each text
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Give the first so many numbers of each vector, made of norm one again (for models trained for it)
    #[arg(long, value_name = "N")]
    pub(crate) dimensions: Option<usize>,
    /// Texts; `-` (or none) reads stdin
    #[arg(value_name = "TEXT")]
    pub(crate) texts: Vec<String>,
}

/// How jobs travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RouteArg {
    /// Through shared memory, straight to the engine
    Lane,
    /// As frames on the socket, through the broker
    Socket,
}

#[derive(Debug, Args)]
pub(crate) struct IndexArgs {
    /// Files and folders (.md, .txt, .html, .csv and the like)
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The store, a SQLite file; made when it does not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) store: PathBuf,
    /// Subprocesses at once
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) jobs: usize,
    /// Model id or folder [default: the broker's default model]
    #[arg(long, value_name = "ID", default_value = "")]
    pub(crate) model: String,
    /// Tokens a chunk aims at
    #[arg(long, value_name = "N")]
    pub(crate) chunk_tokens: Option<usize>,
    /// Tokens that neighbouring chunks share
    #[arg(long, value_name = "N")]
    pub(crate) overlap_tokens: Option<usize>,
    /// Longest time for one document, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) document_timeout: u64,
    /// Print the summary as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct IndexDocumentArgs {
    /// The document
    pub(crate) path: PathBuf,
    /// The store
    #[arg(long)]
    pub(crate) store: PathBuf,
    /// Model id
    #[arg(long, default_value = "")]
    pub(crate) model: String,
    /// Tokens a chunk aims at
    #[arg(long)]
    pub(crate) chunk_tokens: Option<usize>,
    /// Tokens that neighbouring chunks share
    #[arg(long)]
    pub(crate) overlap_tokens: Option<usize>,
    /// Report attach time and memory on stderr as one JSON line, and stay until stdin ends
    #[arg(long)]
    pub(crate) report_memory: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SearchArgs {
    /// What to look for
    pub(crate) query: String,
    /// The store
    #[arg(long, value_name = "FILE")]
    pub(crate) store: PathBuf,
    /// How many results
    #[arg(short, long = "results", value_name = "N", default_value_t = 5)]
    pub(crate) k: usize,
    /// Model id or folder [default: the one that the store was made with]
    #[arg(long, value_name = "ID")]
    pub(crate) model: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Client processes
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) clients: usize,
    /// Threads in each client
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) threads: usize,
    /// How long, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) duration: f64,
    /// Tokens of a text, about
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) tokens: usize,
    /// Tokens of a text of a bulk request, about [default: as --tokens]
    #[arg(long, value_name = "N")]
    pub(crate) bulk_tokens: Option<usize>,
    /// Interactive requests of a thread in a second, at uneven distances; their time counts from when they are due [default: one
    /// after the other]
    #[arg(long, value_name = "PER_SECOND")]
    pub(crate) rate: Option<f64>,
    /// Texts in one interactive request
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) batch: usize,
    /// How jobs travel
    #[arg(long, value_enum, default_value = "lane")]
    pub(crate) route: RouteArg,
    /// Share of threads that send bulk requests, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub(crate) bulk: f64,
    /// Texts in one bulk request
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) bulk_batch: usize,
    /// Longest wait for one answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub(crate) timeout: f64,
    /// Let texts be answered from the cache; without this each is computed
    #[arg(long)]
    pub(crate) cached: bool,
    /// Check every answer against a reference that is computed first
    #[arg(long)]
    pub(crate) verify: bool,
    /// Send no text twice instead of a few in turn: nothing can be answered from what was computed before
    #[arg(long, conflicts_with = "verify")]
    pub(crate) no_repeat: bool,
    /// Seed of the texts: the same one gives the same texts
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Model id or folder [default: the broker's default model]
    #[arg(long, value_name = "ID", default_value = "")]
    pub(crate) model: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Add to the JSON how often each time occurred, so that several runs can be added up
    #[arg(long, requires = "json")]
    pub(crate) histogram: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Documents to index [default: the corpus shipped with the source]
    #[arg(long, value_name = "DIR")]
    pub(crate) corpus: Option<PathBuf>,
    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) workers: usize,
    /// Model id or folder
    #[arg(long, value_name = "ID", default_value = "sentence-transformers/all-MiniLM-L6-v2")]
    pub(crate) model: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Descriptor of the link to the broker
    #[arg(long)]
    pub(crate) link_fd: i32,
    /// Compute threads; 0 = the cores that this process may use
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Leave this process readable for debuggers and this user's other processes
    #[arg(long)]
    pub(crate) inspectable: bool,
    /// Folder in which caches are kept over restarts
    #[arg(long, value_name = "DIR")]
    pub(crate) vectors_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct LoadModelArgs {
    /// Descriptor of the link to the broker
    #[arg(long)]
    pub(crate) link_fd: i32,
    /// Model id or folder
    #[arg(long)]
    pub(crate) model: String,
    /// Precision when the model's name has none
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) precision: Precision,
    /// What the image shall lie in
    #[arg(long, value_enum)]
    pub(crate) backing: Backing,
    /// Cache folder
    #[arg(long)]
    pub(crate) cache_dir: PathBuf,
}

/// What a worker process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkerRole {
    /// Sends load as the JSON plan on stdin says
    Load,
    /// Loads the model privately, embeds, reports memory (what sharing is compared with)
    Private,
    /// Attaches the shared image, embeds, reports memory
    Attached,
    /// Connects as a thin worker, embeds, reports memory
    Thin,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// What to do
    #[arg(value_enum)]
    pub(crate) role: WorkerRole,
    /// Model id or folder
    #[arg(long, default_value = "")]
    pub(crate) model: String,
}
