//! Reading the configuration again: one reading at a time, an answer for whoever asked, nothing changed by a bad one.

use super::*;
use crate::config::BrokerConfig;
use crate::reloaded::{LiveSettings, Reloaded};

fn live(model: &str) -> LiveSettings {
    let config =
        BrokerConfig::new("/s".into(), "/c".into(), model.into(), vec!["e".into()], vec!["l".into()]);
    LiveSettings { cache_entries: 0, ..LiveSettings::of(&config) }
}

fn reloaded(model: &str) -> Reloaded {
    Reloaded { live: live(model), applied: vec!["model: a -> b".into()], pending: vec!["x".repeat(10_000)] }
}

impl World {
    fn has_read(&mut self, outcome: Result<Reloaded, String>) {
        assert!(self.reading, "nobody asked");
        self.reading = false;
        self.happens(Event::ConfigurationRead(Box::new(outcome)));
    }
}

#[test]
fn a_reading_answers_those_who_asked_before_it_and_the_next_the_others() {
    let mut world = World::new(Limits::default());
    let (first, second) = (world.connect(), world.connect());
    let early = world.asks(first, ClientMessage::ReloadConfiguration);
    let late = [
        world.asks(second, ClientMessage::ReloadConfiguration),
        world.asks(second, ClientMessage::ReloadConfiguration),
    ];
    world.has_read(Ok(reloaded("new")));
    let [BrokerMessage::ConfigurationReloaded(what)] = world.answers(first, early)[..] else {
        panic!("no answer")
    };
    assert_eq!((what.applied.len(), what.pending.len()), (1, 1));
    assert!(what.pending[0].len() < 1000, "an answer is bounded");
    assert!(late.iter().all(|request| world.answers(second, *request).is_empty()), "the file may be newer");
    assert_eq!((world.core.config.default_model.as_str(), world.cache_entries), ("new", Some(0)));
    assert!(!world.core.config.caches);
    world.has_read(Err("line 3".into()));
    for request in late {
        let refusal = world.refusal(second, request);
        assert_eq!((refusal.code, refusal.message.as_str()), (Code::ConfigInvalid, "line 3"));
    }
    assert!(!world.reading);
    assert_eq!(world.core.config.default_model, "new", "a bad one changes nothing");
}

#[test]
fn signals_during_a_reading_are_one_more_reading() {
    let mut world = World::new(Limits::default());
    for _ in 0..3 {
        world.happens(Event::ReloadSignal);
    }
    world.has_read(Ok(reloaded("one")));
    world.has_read(Ok(reloaded("two")));
    assert!(!world.reading);
    assert_eq!(world.core.config.default_model, "two");
}

#[test]
fn guests_floods_and_those_who_left_do_no_harm() {
    let mut world = World::new(Limits::default());
    world.core.config.allow_other_users = true;
    world.open.insert(100);
    world.happens(Event::Connected { session: 100, pid: 1, uid: UID + 1 });
    world.asks(100, hello());
    let request = world.asks(100, ClientMessage::ReloadConfiguration);
    assert_eq!(world.refusal(100, request).code, Code::PermissionDenied);
    assert!(!world.reading);
    let session = world.connect();
    let requests: Vec<u64> =
        (0..100).map(|_| world.asks(session, ClientMessage::ReloadConfiguration)).collect();
    assert_eq!(world.refusal(session, requests[99]).code, Code::Overloaded);
    world.leaves(session);
    world.has_read(Ok(reloaded("new")));
    // Those who asked for the next one are gone too.
    assert!(!world.reading);
}

#[test]
fn an_id_means_the_new_source_to_whoever_asks_next_and_holders_keep_the_old_one() {
    let mut world = World::new(Limits::default());
    let with = |source: &str| {
        let models = vec![crate::ModelSettings::new("mine", source, crate::ModelKind::Embedding)];
        let live =
            LiveSettings { models, unload_after: std::time::Duration::from_secs(1), ..live("default") };
        Ok(Reloaded { live, applied: Vec::new(), pending: Vec::new() })
    };
    world.happens(Event::ReloadSignal);
    world.has_read(with("org/old"));
    let holder = world.connect();
    let asked = world.asks(holder, acquire("mine", false, 1000));
    assert_eq!(world.loaders.values().collect::<Vec<_>>(), ["org/old"]);
    world.loader_finishes("org/old");
    world.engine_works();
    world.lease(holder, asked);
    world.happens(Event::ReloadSignal);
    world.has_read(with("org/new"));
    let other = world.connect();
    world.asks(other, acquire("mine", false, 1000));
    assert_eq!(world.loaders.values().collect::<Vec<_>>(), ["org/new"]);
    let names: Vec<String> = world.status().models.into_iter().map(|model| model.model_id).collect();
    assert!(names.contains(&"org/old".to_owned()), "it is held still: {names:?}");
    // Not configured any more: it leaves when nobody uses it, by the new idle time.
    world.leaves(holder);
    world.now_ns += 1100 * MS;
    world.happens(Event::Tick);
    assert_eq!(world.images.len(), 0, "the old one is let go of");
}
