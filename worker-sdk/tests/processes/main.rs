//! What needs processes of its own: forking after connecting, starting brokers, counting what is left over. One test
//! after the other, without the test harness: a fork must not copy the harness's threads, and counts must be exact.
//!
//! Called with `serve` this program is a broker, as `modelbroker serve` is: with a lock, a readiness pipe and a log.

#[path = "../peer/mod.rs"]
mod peer;

mod fork;
mod leaks;
mod serve;
mod start;

use std::io::Write;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "serve") {
        return serve::run(&arguments[1..]);
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let tests: [(&str, fn()); 9] = [
        ("nothing_is_left_when_the_last_handle_is_gone", leaks::nothing_is_left_when_the_last_handle_is_gone),
        ("a_child_gets_a_session_of_its_own", fork::a_child_gets_a_session_of_its_own),
        ("forks_at_any_instant_harm_neither_side", fork::forks_at_any_instant_harm_neither_side),
        ("a_grandchild_works_too", fork::a_grandchild_works_too),
        ("a_broker_is_started_when_none_runs", start::a_broker_is_started_when_none_runs),
        ("racing_starters_get_one_broker", start::racing_starters_get_one_broker),
        ("a_failed_start_shows_the_log", start::a_failed_start_shows_the_log),
        (
            "a_broker_that_is_dead_before_it_is_connected_to_is_started_again",
            start::a_broker_that_is_dead_before_it_is_connected_to_is_started_again,
        ),
        ("a_killed_broker_is_started_again", start::a_killed_broker_is_started_again),
    ];
    println!("\nrunning {} tests", tests.len());
    for (name, test) in tests {
        if filter.is_none_or(|filter| name.contains(filter.as_str())) {
            print!("test {name} ... ");
            // Or each forked child prints it once more as it leaves.
            std::io::stdout().flush().expect("standard output takes it");
            test();
            println!("ok");
        }
    }
    println!();
}
