//! Archives that somebody prepared, in real repositories, given to the program as a user would: every one is refused with a
//! reason, and nothing is written outside of the destination.
#![cfg(feature = "restic")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

#[path = "../rig/mod.rs"]
mod rig;
mod tree;

use rig::Program;
use rustic_backend::BackendOptions;
use rustic_core::{BackupOptions, Credentials, PathList, Repository, RepositoryOptions, SnapshotOptions, StringList};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tree::{DISK, LEN, Tree};

/// What is expected of an archive.
struct Case {
    name: &'static str,
    change: fn(&mut Tree),
    /// Exit codes that are fine.
    codes: &'static [i32],
    /// What the message says.
    says: &'static str,
}

const MISMATCH: &[i32] = &[25];

/// The collection. What is not here can be no part of a tree: borg and restic have every path once.
const CASES: &[Case] = &[
    Case { name: "no manifest", change: |t| t.remove("manifest.json"), codes: &[20, 25], says: "manifest" },
    Case {
        name: "a manifest that is none",
        change: |t| t.write("manifest.json", b"{}"),
        codes: MISMATCH,
        says: "manifest",
    },
    Case {
        name: "an endless manifest",
        change: |t| t.write("manifest.json", &vec![b' '; 17 << 20]),
        codes: MISMATCH,
        says: "",
    },
    Case {
        name: "a later version",
        change: |t| t.manifest(|m| m["version"] = 3.into()),
        codes: MISMATCH,
        says: "version",
    },
    Case {
        name: "a disk above",
        change: |t| t.manifest(|m| m["disks"][0]["name"] = "../../up".into()),
        codes: MISMATCH,
        says: "name",
    },
    Case {
        name: "a disk at an absolute path",
        change: |t| t.manifest(|m| m["disks"][0]["name"] = "/etc/up".into()),
        codes: MISMATCH,
        says: "name",
    },
    Case {
        name: "a disk with a line end",
        change: |t| t.manifest(|m| m["disks"][0]["name"] = "a\nb".into()),
        codes: MISMATCH,
        says: "name",
    },
    Case {
        name: "a disk twice",
        change: |t| {
            t.manifest(|m| {
                let d = m["disks"][0].clone();
                m["disks"].as_array_mut().unwrap().push(d);
            });
        },
        codes: MISMATCH,
        says: "twice",
    },
    Case {
        name: "more disks than any guest has",
        change: |t| {
            t.manifest(|m| {
                let d = m["disks"][0].clone();
                m["disks"] = (0..5000)
                    .map(|n| {
                        let mut d = d.clone();
                        d["name"] = format!("scsi{n}").into();
                        d
                    })
                    .collect();
            });
        },
        codes: MISMATCH,
        says: "disks",
    },
    Case {
        name: "a disk of 16 EiB",
        change: |t| t.manifest(|m| m["disks"][0]["size"] = u64::MAX.into()),
        codes: MISMATCH,
        says: "",
    },
    Case {
        name: "a disk larger than any file",
        change: |t| t.manifest(|m| m["disks"][0]["size"] = (i64::MAX as u64 - 511).into()),
        codes: &[1, 23, 25],
        says: "",
    },
    Case {
        name: "a disk smaller than its table",
        change: |t| t.manifest(|m| m["disks"][0]["size"] = LEN.into()),
        codes: MISMATCH,
        says: "",
    },
    Case {
        name: "a segment length of 3",
        change: |t| t.manifest(|m| m["disks"][0]["segment_len"] = 3.into()),
        codes: MISMATCH,
        says: "segment length",
    },
    Case {
        name: "a digest of something else",
        change: |t| t.manifest(|m| m["disks"][0]["digest"] = "00".repeat(32).into()),
        codes: MISMATCH,
        says: "",
    },
    Case { name: "a missing table", change: |t| t.remove("disks/scsi0.segments"), codes: &[20, 25], says: "" },
    Case { name: "a table that is cut", change: |t| t.table(|b| b.truncate(60)), codes: MISMATCH, says: "truncated" },
    Case {
        name: "a table out of order",
        change: |t| {
            t.table(|b| {
                let (a, c) = (b[8..56].to_vec(), b[56..104].to_vec());
                b[8..56].copy_from_slice(&c);
                b[56..104].copy_from_slice(&a);
            });
        },
        codes: MISMATCH,
        says: "order",
    },
    Case {
        name: "a segment twice in the table",
        change: |t| {
            t.table(|b| {
                let a = b[8..56].to_vec();
                b[56..104].copy_from_slice(&a);
            });
        },
        codes: MISMATCH,
        says: "order",
    },
    Case {
        name: "a segment behind the end",
        change: |t| {
            t.table(|b| {
                let at = b.len() - 48;
                b[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            });
        },
        codes: MISMATCH,
        says: "behind the end",
    },
    Case {
        name: "an endless table",
        change: |t| t.write("disks/scsi0.segments", &vec![0; 4 << 20]),
        codes: MISMATCH,
        says: "",
    },
    Case { name: "a missing segment", change: |t| t.remove(tree::SECOND), codes: &[20, 25], says: "disk `scsi0`" },
    Case {
        name: "a segment that is too long",
        change: |t| t.write(tree::SECOND, &vec![1; 2 * LEN as usize]),
        codes: MISMATCH,
        says: "disk `scsi0`",
    },
    Case {
        name: "a segment that is too short",
        change: |t| t.write(tree::SECOND, b"short"),
        codes: MISMATCH,
        says: "disk `scsi0`",
    },
    Case {
        name: "other content",
        change: |t| t.write(tree::SECOND, &vec![1; LEN as usize]),
        codes: MISMATCH,
        says: "digest",
    },
    Case {
        name: "a link instead of a segment",
        change: |t| t.link(tree::SECOND),
        codes: &[20, 25],
        says: "disk `scsi0`",
    },
    Case { name: "a link instead of the manifest", change: |t| t.link("manifest.json"), codes: &[20, 25], says: "" },
    Case { name: "a link instead of a disk", change: |t| t.link_directory("disks/scsi0"), codes: &[20, 25], says: "" },
    Case {
        name: "a directory instead of a segment",
        change: |t| t.directory(tree::SECOND),
        codes: &[20, 25],
        says: "disk `scsi0`",
    },
    Case {
        name: "a pipe instead of a segment",
        change: |t| t.pipe(tree::SECOND),
        codes: &[20, 25],
        says: "disk `scsi0`",
    },
];

/// A place with a secret, a destination, and a program that knows a target.
struct Stage {
    program: Program,
    secret: PathBuf,
}

impl Stage {
    fn new(configuration: &str) -> Self {
        let program = Program::new();
        let secret = program.dir().join("secret");
        fs::write(&secret, "for nobody").unwrap();
        program.configure(&configuration.replace("DIR", &program.dir().display().to_string()));
        // A password that the program makes opens quickly.
        if configuration.contains("borg") {
            fs::write(program.dir().join("key"), "correct horse\n").unwrap();
        }
        program.run(&["target", "init"]).ok();
        Self { program, secret }
    }

    fn repository(&self) -> PathBuf {
        self.program.dir().join("repository")
    }

    /// All files outside of where the program keeps its own things, with their content's length.
    fn around(&self) -> BTreeMap<PathBuf, u64> {
        fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, u64>) {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let meta = entry.metadata().unwrap();
                found.insert(entry.path(), meta.len());
                if meta.is_dir() {
                    walk(&entry.path(), found);
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(self.program.dir(), &mut found);
        let own = [self.repository(), self.program.state(), self.program.run_dir(), self.program.dir().join("to")];
        found.retain(|path, _| !own.iter().any(|own| path.starts_with(own)) && path != self.program.dir());
        found.into_iter().filter(|(path, _)| path.is_file()).collect()
    }

    /// Restores, and shows what the archive says of itself.
    fn refuse(&self, case: &Case, archive: &str) {
        let to = self.program.dir().join("to");
        let before = self.around();
        let run = self.program.run(&["restore", archive, "--to-dir", to.to_str().unwrap()]);
        let code = run.code.unwrap_or(-1);
        assert!(case.codes.contains(&code), "{}: exit code {code}: {}", case.name, run.stderr);
        assert!(run.stderr.contains("error:") && run.stderr.contains(case.says), "{}: {}", case.name, run.stderr);
        assert!(
            !run.stderr.contains("panicked") && !run.stderr.contains("for nobody"),
            "{}: {}",
            case.name,
            run.stderr
        );
        // It reads nothing else.
        if case.name.contains("manifest") || case.name.contains("disk") {
            let run = self.program.run(&["info", archive]);
            assert!(
                matches!(run.code, Some(0 | 20 | 25)) && !run.stderr.contains("panicked"),
                "{}: {}",
                case.name,
                run.stderr
            );
        }
        assert_eq!(self.around(), before, "{}", case.name);
        assert_eq!(fs::read(&self.secret).unwrap(), b"for nobody");
        // What is at the destination is no image under its own name, and no link.
        for entry in fs::read_dir(&to).into_iter().flatten().map(Result::unwrap) {
            assert!(entry.metadata().unwrap().is_file(), "{}: {}", case.name, entry.path().display());
            assert_ne!(entry.file_name(), "scsi0.raw", "{}: a disk that is not whole has its name", case.name);
        }
        let _ = fs::remove_dir_all(&to);
    }

    /// The tree as it is has to be restored, or the cases would show nothing.
    fn accept(&self, archive: &str) {
        let dir = self.program.dir().join("to");
        self.program.run(&["restore", archive, "--to-dir", dir.to_str().unwrap()]).ok();
        assert!(fs::read(dir.join("scsi0.raw")).unwrap() == DISK.concat());
        fs::remove_dir_all(&dir).unwrap();
    }
}

fn archive_name(number: usize) -> String {
    format!("pve-qemu-100-2026-01-31T02:{:02}:{:02}Z", number / 60, number % 60)
}

#[test]
fn hostile_archives_in_borg_are_refused() {
    if Command::new("borg").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: there is no borg");
        return;
    }
    let stage = Stage::new(
        "[defaults]\ntarget = 't'\n[target.t]\nprovider = 'borg'\nrepository = 'DIR/repository'\npassphrase-file = 'DIR/key'\n",
    );
    let store = |tree: &Tree, name: &str| {
        let output = Command::new("borg")
            .args(["create", &format!("{}::{name}", stage.repository().display()), "."])
            .current_dir(tree.path())
            .env("BORG_PASSPHRASE", "correct horse")
            .env("BORG_BASE_DIR", stage.program.dir().join("state/attacker"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .env("BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    // What manifests and tables say is judged by the same code as in restic; borg's way of reading files is its own.
    play(&stage, store, |case| {
        ["segment", "link", "above", "missing", "endless"].iter().any(|word| case.name.contains(word))
    });
}

#[test]
fn hostile_snapshots_in_restic_are_refused() {
    let stage = Stage::new(
        "[defaults]\ntarget = 't'\n[target.t]\nprovider = 'restic'\nrepository = 'DIR/repository'\npassword-file = 'DIR/key'\n",
    );
    let mut place = BackendOptions::default();
    place.repository = Some(stage.repository().display().to_string());
    let mut how = RepositoryOptions::default();
    how.no_cache = true;
    let password = Credentials::password(fs::read_to_string(stage.program.dir().join("key")).unwrap().trim_end());
    let repository = Repository::new(&how, &place.to_backends().unwrap()).unwrap().open(&password).unwrap();
    let indexed = repository.to_indexed_ids().unwrap();
    let store = |tree: &Tree, name: &str| {
        let options = SnapshotOptions::default().label(name.to_owned()).host("100".to_owned());
        let mut snapshot = options.to_snapshot().unwrap();
        snapshot.tags = "pvebackup".parse::<StringList>().unwrap();
        let mut backup = BackupOptions::default();
        backup.as_path = Some("/".into());
        let paths = PathList::from_string(tree.path().to_str().unwrap()).unwrap();
        indexed.backup(&backup, &paths, snapshot).unwrap();
    };
    play(&stage, store, |_| true);
}

fn play(stage: &Stage, store: impl Fn(&Tree, &str), chosen: impl Fn(&Case) -> bool) {
    let good = Tree::new(&stage.secret);
    store(&good, &archive_name(0));
    stage.accept(&archive_name(0));
    let mut failed = Vec::new();
    let cases: Vec<&Case> = CASES.iter().filter(|case| chosen(case)).collect();
    for (number, case) in cases.iter().enumerate() {
        let mut tree = Tree::new(&stage.secret);
        (case.change)(&mut tree);
        let name = archive_name(number + 1);
        store(&tree, &name);
        if catch_unwind(AssertUnwindSafe(|| stage.refuse(case, &name))).is_err() {
            failed.push(case.name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    // Nothing of this keeps anybody from the good ones.
    let list = stage.program.run(&["list"]).ok().stdout;
    assert!(list.lines().filter(|line| line.contains("pve-qemu-100-")).count() > cases.len(), "{list}");
    stage.accept(&archive_name(0));
}

#[test]
fn hostile_directories_are_refused() {
    let stage = Stage::new("[defaults]\ntarget = 't'\n[target.t]\nprovider = 'directory'\npath = 'DIR/repository'\n");
    let guest = stage.repository().join("100");
    let archives = fs::read_dir(&guest).map_or(0, Iterator::count);
    assert_eq!(archives, 0);
    // What a directory looks like is made by a backup; see `tests/provider_directory/hostile.rs` for its images. Here is what
    // stands around them.
    fs::create_dir_all(&guest).unwrap();
    let elsewhere = stage.program.dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("guest.conf"), "for nobody").unwrap();
    symlink(&elsewhere, guest.join("qemu-1769824927")).unwrap();
    fs::create_dir(guest.join("qemu-1769824928")).unwrap();
    symlink(&stage.secret, guest.join("qemu-1769824928/manifest.json")).unwrap();
    fs::create_dir(guest.join("qemu-99999999999999999999")).unwrap();
    fs::create_dir(guest.join("qemu--1")).unwrap();
    symlink(stage.program.dir(), stage.repository().join("101")).unwrap();
    let before = stage.around();
    let list = stage.program.run(&["list"]);
    assert!(
        !list.stdout.contains("for nobody") && !list.stderr.contains("panicked"),
        "{} {}",
        list.stdout,
        list.stderr
    );
    for second in [7, 8] {
        let name = format!("pve-qemu-100-2026-01-31T02:02:0{second}Z");
        let to = stage.program.dir().join("to");
        let run = stage.program.run(&["restore", &name, "--to-dir", to.to_str().unwrap()]);
        assert!(matches!(run.code, Some(20 | 25)), "{:?} {}", run.code, run.stderr);
        assert!(!run.stderr.contains("for nobody"), "{}", run.stderr);
    }
    assert_eq!(stage.around(), before);
}
