#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pvebackup::fuzzing::run("journal", bytes);
});
