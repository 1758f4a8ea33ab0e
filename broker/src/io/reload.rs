//! The thread that reads the configuration again, and the way to and from it: files may lie on disks that hang, and the event
//! loop waits for none. It starts with the first request and sleeps between requests.

use super::event_loop::{EventLoop, Token};
use crate::core::Event;
use crate::reloaded::{ReadAgain, Reloaded};
use shm_os::Interest;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use tracing::warn;

/// Requests and answers under way at once; the core has one.
const UNDER_WAY: usize = 1;
/// What is said where nobody can read a configuration.
const NOTHING_TO_READ: &str =
    "this broker was started without a configuration that could be read again; restart it";

/// The event loop's end of the thread.
pub(crate) struct Reloader {
    requests: SyncSender<()>,
    outcomes: Receiver<Result<Reloaded, String>>,
    wake: UnixStream,
}

impl AsFd for Reloader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Reloader {
    /// Starts the thread. It ends when this end is gone and it has nothing to read.
    ///
    /// # Errors
    /// When the system has no descriptor or no thread left.
    pub(crate) fn start(mut read_again: ReadAgain) -> std::io::Result<Reloader> {
        let (wake, mut waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (requests, wanted) = sync_channel::<()>(UNDER_WAY);
        let (done, outcomes) = sync_channel(UNDER_WAY);
        std::thread::Builder::new().name("reload".into()).spawn(move || {
            // A panic of the callback closes the socket, which the event loop sees as an end without an answer.
            while wanted.recv().is_ok() {
                if done.send(read_again()).is_err() || waker.write_all(&[1]).is_err() {
                    return;
                }
            }
        })?;
        Ok(Reloader { requests, outcomes, wake })
    }

    /// Asks for one reading; false when the thread is gone.
    pub(crate) fn ask(&self) -> bool {
        self.requests.try_send(()).is_ok()
    }

    /// What was read, if anything was; whether the thread is gone.
    pub(crate) fn take(&mut self) -> (Vec<Result<Reloaded, String>>, bool) {
        let mut bytes = [0; 8];
        let ended = matches!((&self.wake).read(&mut bytes), Ok(0));
        (self.outcomes.try_iter().collect(), ended)
    }
}

/// The answer where there is nobody to ask.
fn nothing_to_read() -> Event {
    Event::ConfigurationRead(Box::new(Err(NOTHING_TO_READ.to_owned())))
}

impl EventLoop {
    /// Asks the thread, starting it where it does not run.
    pub(crate) fn read_configuration(&mut self) {
        if self.reloader.is_none()
            && let Some(read_again) = self.on_reload.take()
        {
            let started = Reloader::start(read_again).map_err(|e| e.to_string()).and_then(|reloader| {
                let watched = self.poller.add(&reloader, Token::Reloader.pack(), Interest::READABLE);
                watched.map(|()| reloader).map_err(|e| e.to_string())
            });
            match started {
                Ok(reloader) => self.reloader = Some(reloader),
                Err(error) => warn!("the configuration can no longer be read again: {error}"),
            }
        }
        if !self.reloader.as_ref().is_some_and(Reloader::ask) {
            self.events.push_back(nothing_to_read());
        }
    }

    /// The thread has read it, or has ended.
    pub(crate) fn reloader_ready(&mut self) {
        let Some(reloader) = &mut self.reloader else { return };
        let (outcomes, ended) = reloader.take();
        let answered = !outcomes.is_empty();
        self.events.extend(outcomes.into_iter().map(|outcome| Event::ConfigurationRead(Box::new(outcome))));
        if ended {
            warn!("the thread that reads the configuration ended");
            self.end_reloader();
            if !answered {
                self.events.push_back(nothing_to_read());
            }
        }
    }

    /// Lets go of the thread.
    pub(crate) fn end_reloader(&mut self) {
        if let Some(reloader) = self.reloader.take() {
            let _ = self.poller.remove(&reloader);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_os::Poller;

    fn wait(reloader: &Reloader) {
        let poller = Poller::new().unwrap();
        poller.add(reloader, 1, Interest::READABLE).unwrap();
        poller.wait(&mut Vec::new(), None).unwrap();
    }

    #[test]
    fn every_request_has_one_answer_and_a_panic_is_an_end() {
        let mut count = 0;
        let mut reloader = Reloader::start(Box::new(move || {
            count += 1;
            assert!(count < 3, "the third one panics, as this test wants it");
            Err(format!("reading {count}"))
        }))
        .unwrap();
        for number in 1..3 {
            assert!(reloader.ask());
            wait(&reloader);
            let (outcomes, ended) = reloader.take();
            assert_eq!((outcomes, ended), (vec![Err(format!("reading {number}"))], false));
        }
        assert!(reloader.ask());
        wait(&reloader);
        assert_eq!(reloader.take(), (vec![], true));
    }
}
