//! The borg to test with.

use std::{env, path::Path, path::PathBuf, process::Command};

/// Names another borg than that of `PATH`.
const CHOICE: &str = "PVEBACKUP_TEST_BORG";

/// The borg to test with.
pub fn program() -> PathBuf {
    env::var_os(CHOICE).map_or_else(|| "borg".into(), PathBuf::from)
}

/// Whether it can be tested with, and if not, why. Who has chosen a borg wants no tests that are skipped.
pub fn possible() -> bool {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: there is no /dev/fuse");
        return false;
    }
    let started = Command::new(program()).arg("--version").output();
    let works = started.as_ref().is_ok_and(|output| output.status.success());
    assert!(works || env::var_os(CHOICE).is_none(), "{CHOICE}: {} does not work: {started:?}", program().display());
    if !works {
        eprintln!("skipped: {} does not work: {started:?}", program().display());
    }
    works
}
