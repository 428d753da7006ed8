#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pvebackup::fuzzing::run("qcow2-header", bytes);
});
