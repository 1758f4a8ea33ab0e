//! libFuzzer's door to `entries::layout::saved`; nothing else lives here.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::layout::saved::run(data));
