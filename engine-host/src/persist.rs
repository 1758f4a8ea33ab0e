//! Keeps caches over restarts, on a thread of its own: reads saved vectors when a model is loaded and has the broker put them
//! into the cache; writes what a cache holds into a file every minute, when its model goes, and at the end. Serving never
//! waits for any of it. The bytes of a file are `shm_layout::cache`'s, files are `shm_os::private_files`'.

use crate::cache::{Cache, vectors_at_once};
use crate::link::Link;
use shm_layout::cache::{
    CacheKey, MAX_CACHE_ENTRIES, SAVED_FILE_ENDING, SAVED_HEADER_BYTES, SavedFormat, SavedRecord,
};
use shm_layout::wire::{CacheInsertKey, FromEngine};
use shm_os::private_files::{PrivateFileError, PrivateFolder};
use shm_os::process::monotonic_ns;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant, SystemTime};

/// How often caches in which something is new are saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);
/// How long the engine's end waits for the last saving.
const MAX_LAST_SAVE: Duration = Duration::from_secs(10);
/// How long a saving waits until the broker has written what it was sent last.
const MAX_SETTLE: Duration = Duration::from_millis(500);
/// How long restoring waits for a broker that takes nothing, before it gives up.
const MAX_RESTORE_STALL: Duration = Duration::from_secs(10);
/// Pause between two looks at the link or the cache.
const PAUSE: Duration = Duration::from_millis(1);
/// Bytes of saved vectors in one message to the broker, unless one vector has more.
const MAX_RESTORE_MESSAGE_BYTES: usize = 64 << 10;
/// Records that are read of one file: as many as the largest cache has entries.
const MAX_SAVED_RECORDS: usize = MAX_CACHE_ENTRIES;
/// Files of saved vectors that are left in the folder; those changed the longest time ago go.
const MAX_SAVED_FILES: usize = 64;
/// Bytes that are read or written at once.
const FILE_BUFFER_BYTES: usize = 256 << 10;

/// What the thread is told.
enum Order {
    Load(Kept),
    Unload {
        generation: u64,
    },
    /// Save everything, say so, end.
    End(SyncSender<()>),
}

/// A cache that is kept.
struct Kept {
    generation: u64,
    cache: Arc<Cache>,
    format: SavedFormat,
    /// The cache's count of new vectors when it was last saved; `None` = the file is not known to hold what the cache does.
    saved: Option<u64>,
    /// When the last vector in the file expires, wall clock in ms; 0 = nothing is in it.
    file_expires_at_ms: u64,
    /// What the broker was sent last of the file.
    last_restored: Option<CacheKey>,
}

impl Kept {
    /// Waits until the broker has written what it was sent last, and with it all before; not for long, since it may have had no
    /// room for it.
    fn settle(&mut self) {
        let until = Instant::now() + MAX_SETTLE;
        for key in [self.last_restored.take(), self.cache.newest()].into_iter().flatten() {
            while !self.cache.contains(key) && Instant::now() < until {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// The engine's hold on the thread.
#[derive(Debug)]
pub(crate) struct Keeper {
    orders: Sender<Order>,
}

impl Keeper {
    /// Starts the thread. Nothing is read or made before a model is loaded.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(folder: PathBuf, link: Arc<Link>) -> io::Result<Keeper> {
        let (orders, incoming) = channel();
        let work = Work {
            incoming,
            waiting: VecDeque::new(),
            link,
            folder: Folder::Unopened(folder),
            kept: Vec::new(),
        };
        std::thread::Builder::new().name("engine-vectors".into()).spawn(move || work.run())?;
        Ok(Keeper { orders })
    }

    /// Restores a generation's cache and keeps it from now on. `identity` names all that its vectors depend on.
    pub(crate) fn load(&self, generation: u64, cache: &Arc<Cache>, identity: [u8; 32]) {
        match SavedFormat::new(identity, cache.dim()) {
            Ok(format) => {
                let cache = Arc::clone(cache);
                self.say(Order::Load(Kept {
                    generation,
                    cache,
                    format,
                    saved: None,
                    file_expires_at_ms: 0,
                    last_restored: None,
                }));
            }
            Err(error) => tracing::warn!(generation, %error, "this model's vectors are not kept"),
        }
    }

    /// Saves a generation's cache and lets go of it.
    pub(crate) fn unload(&self, generation: u64) {
        self.say(Order::Unload { generation });
    }

    /// Saves everything and waits for that, for [`MAX_LAST_SAVE`] at most.
    pub(crate) fn finish(&self) {
        let (done, is_done) = sync_channel(1);
        self.say(Order::End(done));
        if let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(MAX_LAST_SAVE) {
            tracing::warn!("saving vectors takes too long; those of the last minute may be lost");
        }
    }

    fn say(&self, order: Order) {
        // The thread ends early only by a panic, which has been told; serving goes on.
        let _ = self.orders.send(order);
    }
}

/// The folder of files.
enum Folder {
    Unopened(PathBuf),
    Open(PrivateFolder),
    /// Something failed: nothing is tried again.
    Off,
}

/// Whether the thread was told something that goes before what it does.
#[derive(Debug, PartialEq, Eq)]
struct Interrupted;

struct Work {
    incoming: Receiver<Order>,
    /// Orders that came while something else was done.
    waiting: VecDeque<Order>,
    link: Arc<Link>,
    folder: Folder,
    kept: Vec<Kept>,
}

fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Work {
    fn run(mut self) {
        let mut next_save = Instant::now() + SAVE_INTERVAL;
        loop {
            let order = match self.waiting.pop_front() {
                Some(order) => Ok(order),
                None => self.incoming.recv_timeout(next_save.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Load(kept)) => self.load(kept),
                Ok(Order::Unload { generation }) => {
                    if let Some(at) = self.kept.iter().position(|kept| kept.generation == generation) {
                        let mut kept = self.kept.swap_remove(at);
                        self.save(&mut kept);
                    }
                }
                Ok(Order::End(done)) => {
                    for mut kept in std::mem::take(&mut self.kept) {
                        self.save(&mut kept);
                    }
                    let _ = done.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {
                    for mut kept in std::mem::take(&mut self.kept) {
                        self.save(&mut kept);
                        self.kept.push(kept);
                    }
                    next_save = Instant::now() + SAVE_INTERVAL;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if matches!(self.folder, Folder::Off) {
                // The caches' memory goes with them.
                self.kept.clear();
            }
        }
    }

    /// The folder, unless persistence is off or goes off now.
    fn folder(&mut self) -> Option<&PrivateFolder> {
        if let Folder::Unopened(path) = &self.folder {
            match PrivateFolder::open(path) {
                Ok(folder) => self.folder = Folder::Open(folder),
                Err(error) => self.turn_off(&error),
            }
        }
        match &self.folder {
            Folder::Open(folder) => Some(folder),
            Folder::Unopened(_) | Folder::Off => None,
        }
    }

    fn turn_off(&mut self, error: &PrivateFileError) {
        tracing::warn!(%error, "vectors cannot be saved; from now on they are not, serving goes on");
        self.folder = Folder::Off;
    }

    fn load(&mut self, mut new: Kept) {
        // Another generation of the same image would write the same file: the newest does.
        if let Some(at) = self.kept.iter().position(|kept| kept.format == new.format) {
            let mut old = self.kept.swap_remove(at);
            self.save(&mut old);
        }
        let Some(folder) = self.folder() else { return };
        let name = new.format.file_name();
        let file = folder.read(&name);
        let was_empty = new.cache.is_empty();
        match file {
            Ok(None) => {}
            Ok(Some(file)) => {
                if self.restore(&mut new, file).is_err() {
                    // The file holds more than the cache: it stays as it is.
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "saved vectors are not read; the file will be replaced");
            }
        }
        // A cache that a dead engine filled holds more than the file; of this engine's own vectors none is in it.
        new.saved = was_empty.then_some(0);
        self.kept.push(new);
    }

    /// Sends what a file holds to the broker.
    fn restore(&mut self, kept: &mut Kept, file: File) -> Result<(), Interrupted> {
        let (generation, begun) = (kept.generation, Instant::now());
        let mut file = BufReader::with_capacity(FILE_BUFFER_BYTES, file);
        let mut header = [0; SAVED_HEADER_BYTES];
        let checked = file.read_exact(&mut header).map_err(|error| error.to_string());
        let checked =
            checked.and_then(|()| kept.format.check_header(&header).map_err(|fault| fault.to_string()));
        if let Err(error) = checked {
            tracing::warn!(generation, error, "saved vectors are not read; the file will be replaced");
            return Ok(());
        }
        let (mut restored, mut damaged, mut expired) = (0, 0, 0);
        let mut record = vec![0; kept.format.record_bytes()];
        let at_once = vectors_at_once(kept.cache.dim(), MAX_RESTORE_MESSAGE_BYTES);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for _ in 0..MAX_SAVED_RECORDS {
            // A record that is cut off is the end as well: whole files end with a whole one.
            if restored >= kept.cache.slots() || file.read_exact(&mut record).is_err() {
                break;
            }
            let before = values.len();
            let Ok(SavedRecord { key, expires_at_ms }) = kept.format.decode(&record, &mut values) else {
                damaged += 1;
                continue;
            };
            kept.file_expires_at_ms =
                kept.file_expires_at_ms.max(if expires_at_ms == 0 { u64::MAX } else { expires_at_ms });
            let left_ms = expires_at_ms.saturating_sub(wall_clock_ms());
            if expires_at_ms != 0 && left_ms == 0 {
                expired += 1;
                values.truncate(before);
                continue;
            }
            if kept.cache.contains(key) {
                values.truncate(before);
                continue;
            }
            restored += 1;
            kept.last_restored = Some(key);
            keys.push(CacheInsertKey { low: key.low, high: key.high, left_ms });
            if keys.len() >= at_once {
                self.send(generation, &mut keys, &mut values)?;
            }
        }
        if !keys.is_empty() {
            self.send(generation, &mut keys, &mut values)?;
        }
        let took_us = begun.elapsed().as_micros() as u64;
        tracing::info!(generation, restored, expired, damaged, took_us, "saved vectors were read");
        Ok(())
    }

    /// Sends vectors once the link's queue is empty. As bulk work: what is computed meanwhile is not displaced.
    fn send(
        &mut self,
        generation: u64,
        keys: &mut Vec<CacheInsertKey>,
        values: &mut Vec<u8>,
    ) -> Result<(), Interrupted> {
        let until = Instant::now() + MAX_RESTORE_STALL;
        while self.link.queued_bytes() > 0 {
            self.pause(generation)?;
            if Instant::now() >= until {
                tracing::warn!(generation, "the broker takes no saved vectors; they are not restored");
                return Err(Interrupted);
            }
        }
        let (keys, values) = (std::mem::take(keys), std::mem::take(values));
        self.link.send(&FromEngine::CacheInsert { generation, bulk: true, keys, values });
        Ok(())
    }

    /// A short sleep, unless the generation is to go or the engine to end.
    fn pause(&mut self, generation: u64) -> Result<(), Interrupted> {
        let order = match self.incoming.recv_timeout(PAUSE) {
            Ok(order) => order,
            Err(RecvTimeoutError::Timeout) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(Interrupted),
        };
        let interrupts = match &order {
            Order::Load(_) => false,
            Order::Unload { generation: unloaded } => *unloaded == generation,
            Order::End(_) => true,
        };
        self.waiting.push_back(order);
        if interrupts { Err(Interrupted) } else { Ok(()) }
    }

    /// Writes what a cache holds into its file, if that is something new.
    fn save(&mut self, kept: &mut Kept) {
        let count = kept.cache.count_of_new();
        let is_new = kept.saved != Some(count);
        let has_expired = kept.file_expires_at_ms != 0 && kept.file_expires_at_ms <= wall_clock_ms();
        if !is_new && !has_expired {
            return;
        }
        kept.settle();
        let Some(folder) = self.folder() else { return };
        let (name, begun) = (kept.format.file_name(), Instant::now());
        let saved = if is_new {
            let mut expires_at_ms = 0;
            let replaced = folder.replace(&name, |file| {
                expires_at_ms = write(&kept.cache, &kept.format, file)?;
                Ok(())
            });
            folder.keep_newest(SAVED_FILE_ENDING, MAX_SAVED_FILES);
            replaced.map(|()| expires_at_ms)
        } else {
            folder.remove(&name).map(|()| 0)
        };
        match saved {
            Ok(expires_at_ms) => {
                (kept.saved, kept.file_expires_at_ms) = (Some(count), expires_at_ms);
                let took_us = begun.elapsed().as_micros() as u64;
                tracing::debug!(generation = kept.generation, took_us, "vectors were saved");
            }
            Err(error) => self.turn_off(&error),
        }
    }
}

/// Writes header and records; gives when the last one expires, wall clock in ms, or `u64::MAX` for never, 0 for no record.
fn write(cache: &Cache, format: &SavedFormat, file: &mut File) -> io::Result<u64> {
    let (now_ns, now_ms) = (monotonic_ns(), wall_clock_ms());
    let mut last_ms = 0;
    let mut bytes = Vec::with_capacity(format.record_bytes());
    let mut out = BufWriter::with_capacity(FILE_BUFFER_BYTES, file);
    out.write_all(&format.header())?;
    cache.walk(now_ns, |key, expires_at_ns, vector| {
        // Rounded up to the next ms, so that 0 stays what it means.
        let left_ms = (expires_at_ns.saturating_sub(now_ns)).div_ceil(1_000_000);
        let expires_at_ms = if expires_at_ns == 0 { 0 } else { now_ms.saturating_add(left_ms).max(1) };
        last_ms = last_ms.max(if expires_at_ms == 0 { u64::MAX } else { expires_at_ms });
        bytes.clear();
        // What the broker let in is finite and of this length.
        if format.encode(SavedRecord { key, expires_at_ms }, vector, &mut bytes).is_ok() {
            out.write_all(&bytes)?;
        }
        Ok::<(), io::Error>(())
    })?;
    out.flush()?;
    Ok(last_ms)
}
