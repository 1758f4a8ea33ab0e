//! The one thread pool that models compute on, sized once per process. What runs on it lives elsewhere.

use std::cell::Cell;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Most threads that may be asked for.
const MAX_THREADS: usize = 1024;

/// Why the number of threads could not be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ThreadsError {
    /// Computing has begun, or the number was set before, to something else.
    #[error(
        "compute threads are already set to {now}; call set_threads once, before the first model computes"
    )]
    AlreadySet {
        /// Threads in use.
        now: usize,
    },
    /// Not a sensible number.
    #[error("{asked} compute threads were asked for; allowed is 1 to {MAX_THREADS}")]
    Range {
        /// Threads asked for.
        asked: usize,
    },
    /// The system refused to start them.
    #[error("compute threads could not be started: {reason}; lower the number or raise the process limit")]
    Start {
        /// What the system said.
        reason: String,
    },
}

/// Threads of this process: `pool` is `None` when one thread, the caller's, computes.
pub(crate) struct Threads {
    count: usize,
    pool: Option<rayon::ThreadPool>,
}

static THREADS: OnceLock<Threads> = OnceLock::new();

impl Threads {
    fn start(count: usize) -> Result<Self, ThreadsError> {
        if count == 0 || count > MAX_THREADS {
            return Err(ThreadsError::Range { asked: count });
        }
        if count == 1 {
            return Ok(Threads { count, pool: None });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| ThreadsError::Start { reason: error.to_string() })?;
        Ok(Threads { count, pool: Some(pool) })
    }

    /// As [`Threads::run`], but no other call of this does anything meanwhile on these threads: for work whose threads wait
    /// for each other, and so that models together use one budget of threads.
    pub(crate) fn run_alone<R: Send>(&self, many: bool, work: impl FnOnce(usize) -> R + Send) -> R {
        // Taken on the caller's thread: a thread of the pool that waited here would be missing in the team it waits for.
        static AT_WORK: Mutex<()> = Mutex::new(());
        let _at_work = (many && self.pool.is_some() && !IS_ALONE.get())
            .then(|| AT_WORK.lock().unwrap_or_else(PoisonError::into_inner));
        self.run(many, work)
    }

    /// Runs `work` with up to `count` threads at hand; on the caller's thread when one is enough.
    pub(crate) fn run<R: Send>(&self, many: bool, work: impl FnOnce(usize) -> R + Send) -> R {
        match &self.pool {
            Some(pool) if many && !IS_ALONE.get() => pool.install(|| work(self.count)),
            _ => work(1),
        }
    }
}

thread_local! {
    static IS_ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, in which models compute on the calling thread and no other, without waiting for what the others do. For breaks of
/// [`crate::Model::forward_with_breaks`].
pub fn on_this_thread<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_ALONE.set(self.0);
        }
    }
    let _restore = Restore(IS_ALONE.replace(true));
    work()
}

/// Threads when nobody says otherwise: the CPUs this process may use, or `RAYON_NUM_THREADS`, or `CANDLE_NUM_THREADS`.
fn default_count() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.trim().parse::<usize>().ok())
        .filter(|count| *count > 0)
        .unwrap_or(cpus)
        .min(MAX_THREADS)
}

/// The pool, started on first use. When the default number can't be started, the caller's thread computes alone.
pub(crate) fn pool() -> &'static Threads {
    THREADS.get_or_init(|| {
        Threads::start(default_count()).unwrap_or_else(|error| {
            tracing::warn!(%error, "computing on one thread");
            Threads { count: 1, pool: None }
        })
    })
}

/// Sets how many threads all models of this process compute on. Call it once, before the first model computes; later calls
/// succeed only with the same number. After a fork call it in the child before computing: threads do not survive forks.
///
/// # Errors
/// [`ThreadsError`] when the number is out of range, another one is in use, or the threads can't be started.
pub fn set_threads(count: usize) -> Result<(), ThreadsError> {
    if let Some(now) = THREADS.get() {
        return if now.count == count { Ok(()) } else { Err(ThreadsError::AlreadySet { now: now.count }) };
    }
    let mut started = Some(Threads::start(count)?);
    let now = THREADS.get_or_init(|| started.take().unwrap_or(Threads { count: 1, pool: None }));
    if now.count == count { Ok(()) } else { Err(ThreadsError::AlreadySet { now: now.count }) }
}

/// Number of threads that models of this process compute on.
pub fn threads() -> usize {
    pool().count
}
