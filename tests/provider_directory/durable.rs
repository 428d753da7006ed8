//! Killed at any system call, and after a power failure: what counts as an archive is one.

use super::{fixture::*, retention::ids};
use pvebackup::{archive::ArchiveId, provider::Provider};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Names the repository for the children.
const REPOSITORY: &str = "PVEBACKUP_TEST_DURABLE_DIRECTORY";

fn of_child() -> Fixture {
    let mut f = Fixture::opened(PathBuf::from(std::env::var_os(REPOSITORY).unwrap()));
    let newest = f.provider.list(None).unwrap().pop().unwrap();
    f.clock = newest.name.time();
    f
}

#[test]
#[ignore = "runs as a child of other tests"]
fn pruning_child() {
    let mut f = of_child();
    let archives: Vec<ArchiveId> = f.provider.list(None).unwrap().into_iter().map(|a| a.id).collect();
    f.prune(&archives[..2]);
}

#[test]
#[ignore = "runs as a child of other tests"]
fn backup_child() {
    let mut f = of_child();
    let newest = f.provider.list(None).unwrap().pop().unwrap().id;
    let base = Some(f.use_base(&newest, "scsi0"));
    f.backup(vec![Disk { name: "scsi0", base, changes: next_changes().into_iter().map(Ok).collect() }]).unwrap();
}

fn next_changes() -> Vec<(u64, Option<Vec<u8>>)> {
    vec![(2, Some(segment_bytes(77, 2))), (7, None), (SEGMENTS - 1, Some(segment_bytes(77, SEGMENTS - 1)))]
}

fn strace(root: &Path, child: &str, arguments: &[&str]) -> Output {
    Command::new("strace")
        .args(["-f", "-qq"])
        .args(arguments)
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", &format!("durable::{child}")])
        .env(REPOSITORY, root)
        .output()
        .unwrap()
}

fn cannot_trace() -> bool {
    let can = Command::new("strace").args(["-o", "/dev/null", "true"]).status().is_ok_and(|status| status.success());
    if !can {
        eprintln!("skipped: strace cannot trace here");
    }
    !can
}

/// Runs `child` on copies of the repository, each time killed when it enters another system call, and looks at what is left.
/// Returns how often which call was the last.
fn killed_at_every(
    f: &Fixture,
    child: &str,
    calls: &'static [&'static str],
    look: impl Fn(Fixture, bool),
) -> BTreeMap<&'static str, u32> {
    let mut cases = BTreeMap::new();
    for call in calls.iter().copied() {
        for nth in 1.. {
            let place = tempfile::tempdir().unwrap();
            let root = place.path().join("repository");
            assert!(Command::new("cp").arg("-a").arg(&f.root).arg(&root).status().unwrap().success());
            let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:when={nth}"));
            let output = strace(&root, child, &["-o", "/dev/null", "-e", &trace, "-e", &inject]);
            let killed = output.status.code() != Some(0);
            assert!(!killed || output.status.code().is_none(), "{call} {nth}: {output:?}");
            let mut it = Fixture::opened(root);
            it.clock = f.clock;
            look(it, killed);
            if !killed {
                break;
            }
            *cases.entry(call).or_insert(0) += 1;
        }
    }
    println!("killed at: {cases:?}");
    cases
}

#[test]
fn retention_that_is_killed_leaves_all_archives_what_they_were() {
    if cannot_trace() {
        return;
    }
    let mut f = Fixture::new();
    let history = f.history(4, 21);
    let calls = &["copy_file_range", "pwritev", "fsync", "renameat", "unlinkat"];
    let cases = killed_at_every(&f, "pruning_child", calls, |mut it, killed| {
        let listed = it.provider.list(None).unwrap();
        let left: Vec<_> = history.iter().filter(|(id, _)| listed.iter().any(|a| a.id == *id)).cloned().collect();
        assert!(if killed { left.len() >= 2 } else { left.len() == 2 }, "{} are left", left.len());
        it.assert_history(&left);
        // The next run settles it, and the one after has nothing to do.
        it.prune(&ids(&left[..left.len() - 2]));
        it.assert_history(&left[left.len() - 2..]);
        it.begin();
        it.assert_nothing_half();
    });
    // The images, their descriptions, and their places; the archive's own.
    assert!(cases["pwritev"] > 5 && cases["fsync"] > 10 && cases["renameat"] >= 6, "{cases:?}");
}

#[test]
fn a_backup_that_is_killed_leaves_a_right_archive_or_none() {
    if cannot_trace() {
        return;
    }
    let mut f = Fixture::new();
    let history = f.history(3, 22);
    let mut next = history.last().unwrap().1.clone();
    for (index, change) in next_changes() {
        match change {
            Some(bytes) => next.insert(index, bytes),
            None => next.remove(&index),
        };
    }
    let calls = &["mkdirat", "pwritev", "fsync", "renameat"];
    let cases = killed_at_every(&f, "backup_child", calls, |mut it, killed| {
        let mut expected = history.clone();
        let listed = it.provider.list(None).unwrap();
        if let Some(made) = listed.get(history.len()) {
            expected.push((made.id.clone(), next.clone()));
        }
        assert!(killed || expected.len() == 4, "it is there");
        it.assert_history(&expected);
        // Built on what the generation record says, which may be either.
        let base = Some(it.use_base(&history.last().unwrap().0, "scsi0"));
        it.clock = f.clock + jiff::Span::new().hours(5);
        let again =
            it.backup(vec![Disk { name: "scsi0", base, changes: next_changes().into_iter().map(Ok).collect() }]);
        expected.push((again.unwrap().id, next.clone()));
        it.assert_history(&expected);
        it.assert_nothing_half();
    });
    assert!(cases["fsync"] > 5 && cases["renameat"] >= 2, "{cases:?}");
}

/// What a power failure could undo, by the system calls that a child made below a directory.
#[derive(Default)]
struct Volatile {
    /// Files that were written to, and not synced since.
    files: BTreeSet<PathBuf>,
    /// Directories in which a name changed, and that were not synced since.
    dirs: BTreeSet<PathBuf>,
}

impl Volatile {
    fn below(&self, at: &Path) -> Vec<&PathBuf> {
        self.files.iter().chain(&self.dirs).filter(|path| path.starts_with(at)).collect()
    }
}

/// The paths of the descriptors in a line of `strace -y`, and its quoted names.
fn parse(line: &str) -> Option<(&str, Vec<PathBuf>, Vec<&str>)> {
    let line = line.split_once(' ')?.1.trim_start();
    let (call, rest) = line.split_once('(')?;
    let paths = rest.split('<').skip(1).filter_map(|part| Some(PathBuf::from(part.split_once('>')?.0))).collect();
    Some((call, paths, rest.split('"').skip(1).step_by(2).collect()))
}

fn assert_synced_in_order(f: &Fixture, child: &str) -> usize {
    let log = f.root.with_extension("strace");
    let calls = "trace=write,pwrite64,pwritev,copy_file_range,openat,mkdirat,fsync,fdatasync,renameat,unlinkat";
    let output = strace(&f.root, child, &["-y", "-s", "64", "-o", log.to_str().unwrap(), "-e", calls]);
    assert!(output.status.success(), "{output:?}");
    let mut volatile = Volatile::default();
    let mut renames = 0;
    for line in fs::read_to_string(log).unwrap().lines() {
        let Some((call, paths, names)) = parse(line) else { continue };
        let Some(path) = paths.first().filter(|path| path.starts_with(&f.root)).cloned() else { continue };
        match call {
            "write" | "pwrite64" | "pwritev" => _ = volatile.files.insert(path),
            "copy_file_range" => _ = volatile.files.insert(paths[1].clone()),
            "openat" if line.contains("O_EXCL") => _ = volatile.dirs.insert(path),
            "mkdirat" => _ = volatile.dirs.insert(path),
            "fsync" => _ = (volatile.files.remove(&path), volatile.dirs.remove(&path)),
            "renameat" => {
                renames += 1;
                let from = path.join(names[0]);
                assert_eq!(volatile.below(&from), Vec::<&PathBuf>::new(), "{line}");
                if names[1].ends_with(".removed") {
                    assert_eq!(volatile.below(&f.root), Vec::<&PathBuf>::new(), "{line}");
                }
                volatile.dirs.insert(path);
            }
            _ => {}
        }
    }
    assert_eq!(volatile.below(&f.root), Vec::<&PathBuf>::new(), "at the end of {child}");
    renames
}

#[test]
fn what_counts_is_on_the_disk_before_it_counts() {
    if cannot_trace() {
        return;
    }
    let mut f = Fixture::new();
    f.history(4, 23);
    // The archive and its log; two images with their descriptions, and two archives that go.
    assert_eq!(assert_synced_in_order(&f, "backup_child"), 2);
    assert_eq!(assert_synced_in_order(&f, "pruning_child"), 6);
}
