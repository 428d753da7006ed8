#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pvebackup::fuzzing::run("qmp-graph", bytes);
});
