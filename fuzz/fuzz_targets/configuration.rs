//! libFuzzer's door to `entries::configuration`; nothing else lives here.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::configuration::run(data));
