//! Whether what is being loaded still fits: into the budget, and into what the system and the control group have. Relief
//! comes in this order: vectors of idle models, idle models, a refusal that names the figures. Reading is the I/O side's.

use super::lifecycle::Why;
use super::models::{EntryState, Reload};
use super::{Action, Core, nanos};
use shm_layout::code::Code;
use shm_layout::wire::{BackingKind, LoadProgress, Refusal};
use tracing::info;

/// Stages of a load whose total is the size of the image.
const SIZED_STAGES: [&str; 2] = ["compile", "copy"];

/// What is known of memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// What the system and the control group had left when it was last looked at.
    pub(crate) available_bytes: Option<u64>,
    /// What the vectors of each generation's cache took then.
    pub(crate) caches: Vec<(u64, u64)>,
    /// When it was last asked for.
    asked_ns: Option<u64>,
}

impl Core {
    /// Notes how large an image becomes, and has memory looked at now and then while it grows.
    pub(super) fn watch_memory(&mut self, now_ns: u64, id: u64, news: &LoadProgress) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        if !SIZED_STAGES.contains(&news.stage.as_str()) || news.total_bytes == 0 {
            return;
        }
        let is_new = entry.planned_bytes != news.total_bytes;
        entry.planned_bytes = news.total_bytes;
        // What is compiled into a file is copied afterwards: only then the image itself grows.
        entry.done_bytes = if news.stage == "copy" { news.done_bytes.min(news.total_bytes) } else { 0 };
        let interval_ns = nanos(self.config.limits.memory_check_interval);
        let is_due = self.memory.asked_ns.is_none_or(|at| now_ns.saturating_sub(at) >= interval_ns);
        if is_new || is_due {
            self.memory.asked_ns = Some(now_ns);
            self.actions.push(Action::LookAtMemory);
        }
    }

    /// Memory was looked at: every load under way must still fit, or give way.
    pub(super) fn memory_seen(&mut self, now_ns: u64, available_bytes: Option<u64>, caches: Vec<(u64, u64)>) {
        self.memory.available_bytes = available_bytes;
        self.memory.caches = caches;
        self.look_for_alerts(now_ns);
        let loading: Vec<u64> =
            self.models.entries.iter().filter(|(_, e)| e.load_id().is_some()).map(|(id, _)| *id).collect();
        for id in loading {
            if let Some(lacking) = self.make_fit(now_ns, id) {
                self.refuse_for_memory(now_ns, id, &lacking);
            }
        }
    }

    /// Gives up what is idle until a load fits; what is lacking when it does not.
    fn make_fit(&mut self, now_ns: u64, id: u64) -> Option<Lacking> {
        loop {
            let lacking = self.lacking(id)?;
            let idle_cache =
                self.memory.caches.iter().position(|(generation, bytes)| {
                    *bytes > 0
                        && self.models.images.get(generation).is_some_and(|image| {
                            self.models.is_current(*generation) && !self.in_use(image.entry)
                        })
                });
            if let Some(at) = idle_cache {
                let (generation, bytes) = self.memory.caches.swap_remove(at);
                self.memory.available_bytes = self.memory.available_bytes.map(|n| n.saturating_add(bytes));
                self.drop_cache(now_ns, generation);
            } else if let Some(victim) = self.least_recently_used() {
                let generation = self.unload(now_ns, victim, Why::Memory)?;
                let held = self.models.images.get(&generation);
                let bytes = held
                    .filter(|i| takes_memory(i.description.backing))
                    .map_or(0, |i| i.description.image_bytes);
                // Given back when engine and broker have let go of it, in milliseconds.
                self.memory.available_bytes = self.memory.available_bytes.map(|n| n.saturating_add(bytes));
            } else {
                return Some(lacking);
            }
        }
    }

    /// What a load lacks; `None` = it fits.
    fn lacking(&self, id: u64) -> Option<Lacking> {
        let entry = self.models.entries.get(&id)?;
        if entry.planned_bytes == 0 {
            return None;
        }
        if let Some(budget_bytes) = self.config.policy.memory_budget_bytes {
            let held_bytes = self.held_bytes() + self.cache_bytes();
            let planned_bytes: u64 = self
                .models
                .entries
                .values()
                .filter(|e| e.load_id().is_some())
                .fold(0, |sum, e| sum.saturating_add(e.planned_bytes));
            let coming_bytes =
                if entry.load_id().is_some() { planned_bytes } else { planned_bytes + entry.planned_bytes };
            if held_bytes.saturating_add(coming_bytes) > budget_bytes {
                let available_bytes = budget_bytes.saturating_sub(held_bytes);
                return Some(Lacking { needed_bytes: coming_bytes, available_bytes, of_budget: true });
            }
        }
        let available_bytes = self.memory.available_bytes?;
        let needed_bytes = (entry.planned_bytes - entry.done_bytes.min(entry.planned_bytes))
            .saturating_add(self.limits().memory_reserve_bytes);
        let has_grown = entry.load_id().is_some();
        (has_grown && needed_bytes > available_bytes).then_some(Lacking {
            needed_bytes,
            available_bytes,
            of_budget: false,
        })
    }

    /// Images that are wanted or held, in bytes; those that nobody wants any more leave in this very turn.
    pub(super) fn held_bytes(&self) -> u64 {
        let stays = |generation: &u64| self.models.is_wanted(*generation) || self.leases.holds(*generation);
        let images = self.models.images.iter().filter(|(generation, _)| stays(generation));
        images.fold(0, |sum, (_, image)| sum.saturating_add(image.description.image_bytes))
    }

    /// Vectors in caches, in bytes, as last looked at.
    pub(super) fn cache_bytes(&self) -> u64 {
        let kept = self.memory.caches.iter().filter(|(g, _)| self.models.images.contains_key(g));
        kept.fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn refuse_for_memory(&mut self, now_ns: u64, id: u64, lacking: &Lacking) {
        let refusal = lacking.refusal(self);
        let Some(entry) = self.models.entries.get(&id) else { return };
        info!(event = "model.load.no_memory", model = entry.name(), "{}", refusal.message);
        if let Some(load_id) = entry.load_id() {
            self.actions.push(Action::KillLoader { load_id });
        }
        match (&entry.state, &entry.reload) {
            (EntryState::Loading { .. }, _) => self.fail_model(now_ns, id, refusal),
            (_, Some(Reload::Loading { .. })) => self.fail_reload(now_ns, id, refusal),
            _ => {}
        }
    }
}

/// Whether a backing's pages are memory that only letting go of them gives back. A file's are the page cache's.
fn takes_memory(backing: BackingKind) -> bool {
    matches!(backing, BackingKind::SealedMemfd | BackingKind::PosixShm)
}

/// What a load lacks.
struct Lacking {
    needed_bytes: u64,
    available_bytes: u64,
    of_budget: bool,
}

impl Lacking {
    fn refusal(&self, core: &Core) -> Refusal {
        let Lacking { needed_bytes, available_bytes, of_budget } = self;
        let (place, advice) = if *of_budget {
            ("of the budget (serve.memory_budget_bytes)", "raise it")
        } else {
            ("of the system's and the control group's memory", "free some")
        };
        let in_use = core.models.entries.values().filter(|e| e.generation().is_some()).count();
        let message = format!(
            "{needed_bytes} bytes are needed and {available_bytes} bytes {place} are left, everything idle given up; {in_use} \
             other models are in use: unload one, or {advice}"
        );
        Refusal { code: Code::OutOfMemory, message, retry_after_ms: 0 }
    }
}
