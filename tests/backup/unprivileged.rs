//! What works without root: everything on a QEMU of the same user.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

/// Runs a test of this binary as the user `nobody`, with a copy of the program.
fn as_nobody(test: &str) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: the tests run without root anyhow");
        return;
    }
    // Where the build puts its files nobody else may look.
    let dir = tempfile::Builder::new().prefix("pvb").tempdir().unwrap();
    let tmp = dir.path().join("tmp");
    fs::create_dir(&tmp).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&tmp, 0o1777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let copy = |from: &Path, name: &str| {
        let to = dir.path().join(name);
        fs::copy(from, &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        to
    };
    let tests = copy(&env::current_exe().unwrap(), "tests");
    let program = copy(Path::new(env!("CARGO_BIN_EXE_pvebackup")), "pvebackup");
    // The bounding set stays: a user's processes have it, and what is set-uid root (fusermount3) needs it.
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
        .arg(tests)
        .args(["--exact", test, "--nocapture"])
        .env("PVEBACKUP_TEST_PROGRAM", program)
        .env("TMPDIR", &tmp)
        .env("HOME", &tmp)
        .current_dir(&tmp)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed") && !text.contains("skipped:"), "{text}");
}

#[test]
fn a_user_backs_up_and_restores_his_own_machine() {
    as_nobody("matrix::stock_ide_raw_and_sata_qcow2");
}

/// The view is mounted, and a dead one unmounted, by fusermount3.
#[test]
fn a_user_backs_up_into_borg_and_clears_up_after_a_run_that_was_killed() {
    let set_uid = |path: &&str| fs::metadata(path).is_ok_and(|m| m.uid() == 0 && m.mode() & 0o4000 != 0);
    if !["/usr/bin/fusermount3", "/bin/fusermount3"].iter().any(set_uid) {
        println!("skipped: there is no fusermount3 that is set-uid root");
        return;
    }
    // fusermount3 opens it as who called.
    if !fs::metadata("/dev/fuse").is_ok_and(|device| device.mode() & 0o006 == 0o006) {
        println!("skipped: /dev/fuse is not open to everybody");
        return;
    }
    if !crate::rig::borg::possible() {
        return;
    }
    as_nobody("borg::a_run_that_is_killed_leaves_no_archive_in_borg");
}
