//! End-to-end tests with real processes. Here lies what they share: the program under test, a broker of a test's own, and
//! the checks that nothing is left behind. The tests themselves lie in `tests/tests/`.

pub mod census;
pub mod program;
pub mod running;
pub mod schema;
pub mod tiny_model;
