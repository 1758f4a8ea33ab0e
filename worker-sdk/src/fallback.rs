//! The way back: when the shared model cannot be had, the process loads it for itself, as it did before there was a broker,
//! and returns to the shared one when that can be had again. What a model computes with is `compute`'s.
//!
//! No thread waits for the broker's return: a call that comes after a pause tries it, for [`RETURN_TRY`] at most, and goes on
//! privately where that fails.

use crate::compute::{Computer, check_process};
use crate::error::SdkError;
use crate::fork_cell::ForkCell;
use crate::seat::Seat;
use crate::sharing::Way;
use crate::time::Deadline;
use model_loader::{LoadRequest, PrecisionChoice, load_image};
use model_source::SourceOptions;
use shm_layout::code::Code;
use shm_layout::wire::{BackingKind, LoadProgress, ModelDescription};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Pause before the first attempt to return to the shared model, and the longest; it doubles in between.
const RETURN_BASE: Duration = Duration::from_secs(1);
const RETURN_CAP: Duration = Duration::from_secs(60);
/// How long one attempt to return may hold up the call that makes it.
const RETURN_TRY: Duration = Duration::from_millis(500);
/// The model of programs that name none, where neither the broker nor the environment has said another; as `serve`.
const DEFAULT_MODEL: &str = "sentence-transformers/all-MiniLM-L6-v2";
/// Environment variables that a broker takes its default model and precision from.
const MODEL_VARIABLE: &str = "MODELBROKER_MODEL";
const PRECISION_VARIABLE: &str = "MODELBROKER_PRECISION";

/// A model's private way, for one handle; each process that forks has a state of its own.
#[derive(Debug)]
pub(crate) struct PrivateWay {
    /// Sharing is switched off for this program: there is nothing to return to.
    forced: bool,
    name: String,
    cache_dir: Option<PathBuf>,
    states: ForkCell<State>,
}

#[derive(Debug, Default)]
struct State {
    now: Mutex<Now>,
    /// Held while the model is loaded: one load, however many threads ask.
    loading: Mutex<()>,
}

#[derive(Debug, Default)]
struct Now {
    model: Option<Arc<Computer>>,
    /// When a call next tries to return; `None` on the shared way.
    return_at: Option<Instant>,
    pauses: u32,
    /// What the shared model was when it was last leased.
    shared: Option<Arc<ModelDescription>>,
}

/// Whether a failure of the shared way is a reason to go on privately. A job that killed engines is none, nor what is wrong
/// with the texts, nor a caller whose own time is over.
pub(crate) fn is_reason(error: &SdkError) -> bool {
    match error {
        SdkError::Refused { code, .. } => !matches!(
            code,
            Code::DeadlineExceeded
                | Code::Cancelled
                | Code::EmptyInput
                | Code::TooLarge
                | Code::InvalidUtf8
                | Code::BadPayload
                | Code::OutputTooSmall
                | Code::JobCrashedEngine
        ),
        SdkError::Fault { .. } | SdkError::SharingOff { .. } => true,
        error => error.is_broker_absence(),
    }
}

impl PrivateWay {
    pub(crate) fn new(name: String, forced: bool, cache_dir: Option<PathBuf>) -> PrivateWay {
        PrivateWay { forced, name, cache_dir, states: ForkCell::new() }
    }

    fn state(&self) -> Arc<State> {
        self.states.get_or_make(Arc::default)
    }

    /// Which way the last call went.
    pub(crate) fn in_use(&self) -> Way {
        let fell = self.states.get().is_some_and(|state| state.lock().return_at.is_some());
        if self.forced || fell { Way::Private } else { Way::Shared }
    }

    /// Does something on the shared model, or on a private one where that cannot be had.
    pub(crate) fn run<R>(
        &self,
        seat: &Seat,
        on_shared: impl FnOnce() -> Result<R, SdkError>,
        privately: impl FnOnce(&Computer) -> Result<R, SdkError>,
    ) -> Result<R, SdkError> {
        if self.choose(seat) == Way::Private {
            return privately(&*self.model(None, &mut |_| {})?);
        }
        on_shared().or_else(|error| privately(&*self.fall_back(seat, error, &mut |_| {})?))
    }

    /// The way that a call takes; tries to return where it is time for that.
    fn choose(&self, seat: &Seat) -> Way {
        if self.forced {
            return Way::Private;
        }
        let state = self.state();
        let mut now = state.lock();
        match now.return_at {
            None => return Way::Shared,
            Some(at) if at > Instant::now() => return Way::Private,
            // Others go on privately while this call tries.
            Some(_) => now.wait_longer(),
        }
        drop(now);
        let back = seat.is_linked() || seat.open(Deadline::after(Some(RETURN_TRY)), &mut |_| {}).is_ok();
        if !back {
            return Way::Private;
        }
        tracing::info!(model = %self.name, "back on the shared model; the private one is let go of");
        let mut now = state.lock();
        now.return_at = None;
        now.pauses = 0;
        let model = now.model.take();
        drop(now);
        // Unmapped outside of the lock, by whoever computes with it last.
        drop(model);
        Way::Shared
    }

    /// The private model because of a failure of the shared way; that failure again where it is no reason.
    pub(crate) fn fall_back(
        &self,
        seat: &Seat,
        error: SdkError,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Arc<Computer>, SdkError> {
        if !is_reason(&error) {
            return Err(error);
        }
        tracing::warn!(model = %self.name, code = error.code(), reason = %error, "going on with a private model");
        let state = self.state();
        let known = seat.known_model();
        let mut now = state.lock();
        if now.return_at.is_none() {
            now.wait_longer();
        }
        if known.is_some() {
            now.shared = known;
        }
        drop(now);
        self.model(Some(error), progress)
    }

    /// The private model, loaded now if it is not. `because`: the failure that is told too where loading fails.
    pub(crate) fn model(
        &self,
        because: Option<SdkError>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Arc<Computer>, SdkError> {
        let state = self.state();
        let held = |state: &State| state.lock().model.clone();
        if let Some(model) = held(&state) {
            return Ok(model);
        }
        let _loading = state.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = held(&state) {
            return Ok(model);
        }
        let shared = state.lock().shared.clone();
        let loaded = check_process()
            .and_then(|()| load(&self.name, self.cache_dir.as_deref(), shared.as_deref(), progress));
        match (loaded, because) {
            (Ok(model), _) => {
                let model = Arc::new(model);
                state.lock().model = Some(Arc::clone(&model));
                Ok(model)
            }
            (Err(private), Some(shared)) => {
                let private = private.to_string().into();
                Err(SdkError::BothFailed { shared: Arc::new(shared), private })
            }
            (Err(private), None) => Err(private),
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Now {
    fn wait_longer(&mut self) {
        let pause = RETURN_BASE.saturating_mul(1 << self.pauses.min(16)).min(RETURN_CAP);
        self.pauses += 1;
        self.return_at = Some(Instant::now() + pause);
    }
}

/// Loads a model into this process: the compiled image from the cache folder, compiled now if it is not there, mapped where it
/// lies. Processes that do this share its pages through the page cache, but not their tokenizers and activations.
fn load(
    name: &str,
    cache_dir: Option<&Path>,
    shared: Option<&ModelDescription>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Computer, SdkError> {
    let failed = |error: &dyn std::fmt::Display| SdkError::Local(error.to_string().into());
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let reference = match (name, shared) {
        ("", Some(shared)) => shared.model_id.clone(),
        ("", None) => variable(MODEL_VARIABLE).unwrap_or_else(|| DEFAULT_MODEL.to_owned()),
        (name, _) => name.to_owned(),
    };
    let precision = match variable(PRECISION_VARIABLE) {
        Some(name) => precision(&name)?,
        None => PrecisionChoice::default(),
    };
    let mut source = SourceOptions::from_env().map_err(|error| failed(&error))?;
    if let Some(folder) = cache_dir {
        source.cache_dir = folder.to_owned();
    }
    let request = LoadRequest { reference, precision, backing: BackingKind::ImageFile.into(), source };
    let loaded = load_image(&request, progress).map_err(|error| failed(&error))?;
    let computer = Computer::new(loaded.image.map().map_err(|error| failed(&error))?)?;
    tracing::info!(model = %loaded.model_id, cached = loaded.from_cache, "loaded privately");
    if let Some(shared) = shared
        && shared.fingerprint != computer.info().fingerprint
    {
        return Err(SdkError::Local(
            format!(
                "the model in this process ({}) is another than the shared one ({}): vectors of both must not be mixed; name \
                 the model with its precision, as in `{}`",
                loaded.model_id, shared.model_id, shared.model_id
            )
            .into(),
        ));
    }
    Ok(computer)
}

fn precision(name: &str) -> Result<PrecisionChoice, SdkError> {
    PrecisionChoice::from_name(name).ok_or_else(|| {
        SdkError::Argument(format!("{PRECISION_VARIABLE} is {name:?}: give f32, bf16, int8 or auto"))
    })
}

/// What a private model is, in a broker's terms; generation 0.
pub(crate) fn describe(computer: &Computer) -> ModelDescription {
    let info = computer.info();
    ModelDescription {
        model_id: info.id.clone(),
        generation: 0,
        output_dim: u32::try_from(info.output_dim).unwrap_or(u32::MAX),
        max_seq_tokens: u32::try_from(info.max_seq_tokens).unwrap_or(u32::MAX),
        image_bytes: computer.image_bytes() as u64,
        fingerprint: info.fingerprint,
        content_hash: info.content_hash,
        backing: BackingKind::ImageFile,
        facts: computer.facts().clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_call_is_no_reason_to_fall_back() {
        let refused = |code| SdkError::Refused { code, message: String::new(), retry_after: Duration::ZERO };
        for code in
            [Code::ModelLoadError, Code::LoadTimeout, Code::TooMany, Code::Overloaded, Code::ShuttingDown]
        {
            assert!(is_reason(&refused(code)), "{code}");
        }
        for code in [Code::TooLarge, Code::JobCrashedEngine, Code::Cancelled, Code::DeadlineExceeded] {
            assert!(!is_reason(&refused(code)), "{code}");
        }
        assert!(is_reason(&SdkError::hung_up("x")));
        assert!(!is_reason(&SdkError::DeadlineExceeded(Duration::ZERO)));
        assert!(!is_reason(&SdkError::Argument("x".into())));
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut now = Now::default();
        let mut before = Duration::ZERO;
        for _ in 0..40 {
            now.wait_longer();
            let pause = now.return_at.unwrap().saturating_duration_since(Instant::now());
            assert!(pause + Duration::from_millis(200) >= before && pause <= RETURN_CAP);
            before = pause;
        }
    }
}
