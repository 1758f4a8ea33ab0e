//! The program modelbroker.
fn main() {}
