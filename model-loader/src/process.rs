//! The loader as a child process: loads one model, tells the broker on its link how it went, ends.

use crate::facts::facts_of;
use crate::load::{LoadRequest, load_image};
use shm_layout::code::Code;
use shm_layout::limits::MAX_MESSAGE_BYTES;
use shm_layout::wire::{FromLoader, LoadProgress};
use shm_os::framed::{FramedError, FramedStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Longest wait for the broker to read a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest time between two progress messages of the same stage.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// Loads the model and reports to the broker at the other end of `link`: progress, then one `Loaded` (with the image's
/// read-only descriptor) or one `Failed`. Gives whether the model was loaded.
///
/// # Errors
/// [`FramedError`] when the broker is gone: the load is abandoned then.
pub fn run(link: OwnedFd, request: &LoadRequest) -> Result<bool, FramedError> {
    let mut link = FramedStream::new(link)?;
    let mut last: Option<(Instant, LoadProgress)> = None;
    let mut lost = None;
    let outcome = load_image(request, &mut |progress| {
        let due = last.as_ref().is_none_or(|(at, before)| {
            before.stage != progress.stage
                || progress.done_bytes >= progress.total_bytes
                || at.elapsed() >= PROGRESS_EVERY
        });
        if due && lost.is_none() {
            last = Some((Instant::now(), progress.clone()));
            lost = link.send(0, &FromLoader::Progress(progress), Vec::new(), SEND_TIMEOUT).err();
        }
    });
    if let Some(error) = lost {
        return Err(error);
    }
    let outcome = outcome.map_err(|error| (error.code(), error.to_string())).and_then(|loaded| {
        let facts = facts_of(&loaded.image).map_err(|why| (Code::ModelInvalid, why))?;
        Ok((loaded, facts))
    });
    let (message, fds, loaded) = match outcome {
        Ok((loaded, facts)) => {
            tracing::info!(
                model = loaded.model_id,
                bytes = loaded.image.len_bytes,
                cached = loaded.from_cache,
                "loaded"
            );
            let message = FromLoader::Loaded {
                model_id: loaded.model_id,
                image_bytes: loaded.image.len_bytes,
                backing: loaded.image.kind,
                facts,
            };
            (message, vec![loaded.image.fd_read_only], true)
        }
        Err((code, error)) => {
            tracing::warn!(error, "load failed");
            (FromLoader::Failed { code, message: cut(error) }, Vec::new(), false)
        }
    };
    debug_assert!(!matches!(&message, FromLoader::Failed { code: Code::Ok, .. }));
    link.send(0, &message, fds, SEND_TIMEOUT)?;
    Ok(loaded)
}

fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
    }
    message
}
