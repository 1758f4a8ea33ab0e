//! libFuzzer's door to `entries::model_files`; nothing else lives here.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::model_files::run(data));
