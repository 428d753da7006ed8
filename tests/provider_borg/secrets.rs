//! Passphrases, keys and encryption.

use crate::fixture::*;
use pvebackup::{
    provider::{
        ErrorKind, Provider,
        borg::{BorgProvider, Passphrase},
    },
    report::{Collector, Events},
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::Duration,
};

/// What every process that belongs to a borg of ours shows to whoever lists processes, while it works.
fn nothing_is_seen(passphrase: impl Fn(&std::path::Path) -> Passphrase) {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.passphrase = passphrase(dir.path());
    let mut f = Fixture::with(dir, options);
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (state, keep) = (f.options.directory.clone(), seen.clone());
    let stored =
        f.backup_while(Disk::full("scsi0", &content), move |_| keep.lock().unwrap().extend(processes_of(&state)));
    let id = stored.unwrap().id;
    assert!(f.restored(&id, "scsi0") == content);
    let seen = seen.lock().unwrap();
    assert!(seen.iter().any(|p| p.1.iter().any(|word| word == "create")), "borg was not found");
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "something that is not for borg");
    for (_, arguments, environment) in seen.iter() {
        for word in arguments.iter().chain(environment) {
            assert!(!word.contains("horse"), "{arguments:?} {environment:?}");
        }
        for variable in environment {
            let name = variable.split('=').next().unwrap();
            assert!(!name.starts_with("CARGO") && !name.starts_with("NEXTEST"), "{variable}");
            assert!(name != "BORG_PASSPHRASE" && name != "BORG_NEW_PASSPHRASE");
        }
    }
}

#[test]
fn no_process_shows_a_passphrase_that_is_in_a_file() {
    nothing_is_seen(|dir| Passphrase::File(dir.join("passphrase")));
}

#[test]
fn no_process_shows_a_passphrase_that_was_given() {
    nothing_is_seen(|_| Passphrase::given("correct horse"));
}

#[test]
#[ignore = "much like a file: `scripts/faults` runs it"]
fn no_process_shows_a_passphrase_that_a_program_prints() {
    nothing_is_seen(|dir| Passphrase::Command(vec!["cat".into(), dir.join("passphrase").display().to_string()]));
}

fn round_trip(f: &mut Fixture) {
    let mut content: Content = (0..20).map(|i| (i, segment_bytes(1, i))).collect();
    let first = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let base = Some(f.use_base(&first, "scsi0"));
    let changes = [(3, Change::Data(segment_bytes(2, 3)))].into();
    content.insert(3, segment_bytes(2, 3));
    let second = f.backup(vec![Disk { name: "scsi0", base, changes }]).unwrap().id;
    assert!(f.restored(&second, "scsi0") == content);
}

#[test]
fn keys_are_in_our_state_or_where_the_user_wants_them() {
    for elsewhere in [false, true] {
        if !possible() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path());
        options.encryption = "keyfile-blake2".into();
        let mut keys = options.directory.join("config/keys");
        if elsewhere {
            keys = dir.path().join("keys");
            fs::create_dir(&keys).unwrap();
            options.keys_dir = Some(keys.clone());
        }
        let mut f = Fixture::with(dir, options);
        let key = fs::read_dir(&keys).unwrap().next().expect("a key").unwrap();
        assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        if elsewhere {
            round_trip(&mut f);
        }
    }
}

#[test]
fn a_repository_can_be_authenticated_only() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.encryption = "authenticated-blake2".into();
    options.compression = Some("auto,zstd,3".into());
    options.extra_arguments =
        ["--comment", "by pvebackup", "--umask=0077", "--chunker-params", "fixed,65536"].map(str::to_owned).into();
    let mut f = Fixture::with(dir, options.clone());
    let text = fs::read_to_string(f.repository().join("config")).unwrap();
    assert!(text.contains("key = "), "its key is in the repository: {text}");
    round_trip(&mut f);
    // Another host, where borg has never seen it.
    options.directory = f.dir.path().join("empty");
    BorgProvider::open(options.clone()).unwrap().repository_id().unwrap();
    options.directory = f.dir.path().join("unasked");
    options.encryption = "repokey".into();
    let unasked = BorgProvider::open(options).unwrap().repository_id().unwrap_err();
    assert!(unasked.kind == ErrorKind::Credentials && unasked.message.contains("`encryption`"), "{unasked}");
    let info = f.borg(&["info", "--json", &format!("{}::{}", f.repository().display(), f.names()[0])]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["archives"][0]["comment"], "by pvebackup");
    assert_eq!(info["archives"][0]["chunker_params"][1], 65536);
}

#[test]
fn borgs_progress_becomes_ours() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.progress_pause = Duration::from_millis(50);
    let mut f = Fixture::with(dir, options);
    let events = Arc::new(Collector::new());
    f.provider.report_to(&Events::new("100", events.clone()));
    let content: Content = (0..50).map(|i| (i, segment_bytes(1, i))).collect();
    let slow = |_| std::thread::sleep(Duration::from_millis(20));
    f.backup_while(Disk::full("scsi0", &content), slow).unwrap();
    let told = events.infos();
    assert!(told.iter().any(|line| line.starts_with("borg has gone through ")), "{told:?}");
    assert!(events.warnings().is_empty(), "{:?}", events.warnings());
}
