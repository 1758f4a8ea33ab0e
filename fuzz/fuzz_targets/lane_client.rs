//! libFuzzer's door to `entries::layout::lane_client`; nothing else lives here.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| entries::layout::lane_client::run(data));
