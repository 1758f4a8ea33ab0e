//! The trait through which long work reports how far it is. No drawing: that is the caller's.

/// Receives the progress of downloads and unpacking. Phases come one after another and never nest.
pub trait Progress {
    /// A phase begins. `what` is one line for people; `total_bytes` is `None` where the amount is unknown, and an
    /// estimate where a wheel is fetched.
    fn begin(&mut self, what: &str, total_bytes: Option<u64>);
    /// `bytes` more were done in the current phase.
    fn advance(&mut self, bytes: u64);
    /// The phase is over, whether it succeeded or not.
    fn end(&mut self);
}

/// Ignores all progress.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&mut self, _what: &str, _total_bytes: Option<u64>) {}
    fn advance(&mut self, _bytes: u64) {}
    fn end(&mut self) {}
}

/// A phase that ends when dropped, so that an early return can't leave a progress bar hanging.
pub(crate) struct Phase<'a>(&'a mut dyn Progress);

impl<'a> Phase<'a> {
    pub(crate) fn begin(progress: &'a mut dyn Progress, what: &str, total_bytes: Option<u64>) -> Phase<'a> {
        progress.begin(what, total_bytes);
        Phase(progress)
    }

    pub(crate) fn advance(&mut self, bytes: u64) {
        if bytes > 0 {
            self.0.advance(bytes);
        }
    }
}

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
