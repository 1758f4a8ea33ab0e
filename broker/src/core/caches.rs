//! Vector caches: one for each generation, made before anybody is told of the generation, filled by what engines say, gone
//! with the generation. Pages and writing are the I/O side's.

use super::models::CacheSide;
use super::{Action, Core};
use shm_layout::image::Task;
use shm_layout::wire::{CacheDescription, CacheInsertKey};
use tracing::warn;

impl Core {
    /// Has the cache of a new generation made; the generation is offered once it is there.
    pub(super) fn make_cache(&mut self, now_ns: u64, generation: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        let wanted = self.models.entries.get(&image.entry).is_none_or(|entry| entry.settings.cache);
        // What is not a vector of one text is not kept.
        if !self.config.caches || !wanted || image.description.facts.task != Task::Embed {
            self.cache_made(now_ns, generation, None);
            return;
        }
        let (dim, fingerprint) = (image.description.output_dim, image.description.fingerprint);
        self.actions.push(Action::MakeCache { generation, dim, fingerprint });
    }

    /// The cache is there, or there is none: either way the generation is served.
    pub(super) fn cache_made(&mut self, now_ns: u64, generation: u64, cache: Option<CacheDescription>) {
        // Retired meanwhile: what was made went with its image.
        let Some(image) = self.models.images.get_mut(&generation) else { return };
        image.cache = cache.map_or(CacheSide::Absent, CacheSide::Made);
        self.offer_model(generation);
        self.grant_waiters(now_ns, generation);
    }

    /// What an engine has computed. A generation that is gone, or has no cache, gets nothing: vectors may come after the
    /// engine was told to let go.
    pub(super) fn fill_cache(
        &mut self,
        generation: u64,
        bulk: bool,
        keys: Vec<CacheInsertKey>,
        values: Vec<u8>,
    ) {
        let Some(image) = self.models.images.get(&generation) else { return };
        if image.cache.description().is_none() {
            return;
        }
        let wanted = keys.len().checked_mul(4 * image.description.output_dim as usize);
        if wanted != Some(values.len()) {
            warn!(
                generation,
                "the engine sent vectors of another length than its model's; they are not kept"
            );
            return;
        }
        self.actions.push(Action::FillCache { generation, bulk, keys, values });
    }
}
