//! libFuzzer's door to `entries::wordpiece`; nothing else lives here.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::wordpiece::run(data));
