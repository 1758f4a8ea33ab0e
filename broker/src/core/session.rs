//! What is known of each connection: who it is and how far it got. Its leases, lanes and jobs are kept by those.

use shm_layout::limits::MAX_CLIENT_NAME_BYTES;
use std::collections::BTreeMap;

/// One connection that was let in.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    pub(crate) client_name: String,
    pub(crate) opened_ns: u64,
    /// When `Hello` must have come; `None` once it has.
    pub(crate) hello_deadline_ns: Option<u64>,
    /// Whether the client can use lanes: it named the right layout.
    pub(crate) shared_memory: bool,
    /// Requests for leases that wait.
    pub(crate) waiting: usize,
    /// Status reports that wait for the engine's counters.
    pub(crate) status_waiting: usize,
}

/// All sessions.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    map: BTreeMap<u64, Session>,
    /// Sessions without `Hello`, so that timers cost nothing when there are none.
    awaiting_hello: usize,
}

impl Sessions {
    pub(crate) fn insert(&mut self, id: u64, pid: u32, uid: u32, now_ns: u64, hello_deadline_ns: u64) {
        let session = Session {
            pid,
            uid,
            client_name: String::new(),
            opened_ns: now_ns,
            hello_deadline_ns: Some(hello_deadline_ns),
            shared_memory: false,
            waiting: 0,
            status_waiting: 0,
        };
        self.awaiting_hello += 1;
        if let Some(replaced) = self.map.insert(id, session) {
            self.awaiting_hello -= usize::from(replaced.hello_deadline_ns.is_some());
        }
    }

    pub(crate) fn get(&self, id: u64) -> Option<&Session> {
        self.map.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Session> {
        self.map.get_mut(&id)
    }

    pub(crate) fn remove(&mut self, id: u64) -> Option<Session> {
        let session = self.map.remove(&id)?;
        self.awaiting_hello -= usize::from(session.hello_deadline_ns.is_some());
        Some(session)
    }

    /// Marks a session as open.
    pub(crate) fn open(&mut self, id: u64, client_name: &str, shared_memory: bool) {
        let Some(session) = self.map.get_mut(&id) else { return };
        self.awaiting_hello -= usize::from(session.hello_deadline_ns.take().is_some());
        session.client_name = printable(client_name);
        session.shared_memory = shared_memory;
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Session)> {
        self.map.iter().map(|(id, session)| (*id, session))
    }

    /// Sessions whose `Hello` is overdue.
    pub(crate) fn overdue(&self, now_ns: u64) -> Vec<u64> {
        if self.awaiting_hello == 0 {
            return Vec::new();
        }
        let late = |s: &Session| s.hello_deadline_ns.is_some_and(|deadline| deadline <= now_ns);
        self.map.iter().filter(|(_, s)| late(s)).map(|(id, _)| *id).collect()
    }

    /// The earliest instant at which a `Hello` is overdue.
    pub(crate) fn next_timer_ns(&self) -> Option<u64> {
        if self.awaiting_hello == 0 {
            return None;
        }
        self.map.values().filter_map(|s| s.hello_deadline_ns).min()
    }
}

/// A client's own name as it may stand in logs and reports: control characters replaced, cut to the limit.
fn printable(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        let c = if c.is_control() { '?' } else { c };
        if out.len() + c.len_utf8() > MAX_CLIENT_NAME_BYTES {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_timers_follow_the_sessions_that_owe_one() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.next_timer_ns(), None);
        sessions.insert(1, 10, 7, 0, 50);
        sessions.insert(2, 10, 7, 0, 40);
        assert_eq!(sessions.next_timer_ns(), Some(40));
        sessions.open(2, "x", true);
        assert_eq!(sessions.next_timer_ns(), Some(50));
        assert_eq!(sessions.overdue(50), [1]);
        sessions.remove(1);
        assert_eq!(sessions.next_timer_ns(), None);
        sessions.remove(2);
        assert!(sessions.is_empty());
    }

    #[test]
    fn names_are_cut_at_a_character_and_made_printable() {
        assert_eq!(printable("a\nb\x1b[31m"), "a?b?[31m");
        let long = "ä".repeat(100);
        assert_eq!(printable(&long).len(), MAX_CLIENT_NAME_BYTES);
    }
}
