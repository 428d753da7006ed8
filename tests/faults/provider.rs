//! Providers that are killed, hang or lie, and repositories that are full, read-only or gone.

use crate::{
    bench::{Bench, Small, fails_with, in_the_middle, long, process_with, said},
    rig::{Kind, Run, Site, SmallFs},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

const KINDS: [Kind; 2] = [Kind::Stock, Kind::Proxmox];

/// borg's `create` for the bench's repository.
fn borg_create(site: &Site) -> Pid {
    process_with(&["borg", "create", site.program.dir().to_str().unwrap()])
}

#[test]
fn borg_is_killed() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("provider killed", "borg", kind) else { return };
        let times = if long() { 6 } else { 1 };
        for time in 0..times {
            let act = |site: &Site, _: &_| {
                let pid = borg_create(site);
                std::thread::sleep(Duration::from_millis(200 * time));
                kill(pid, Signal::SIGKILL).unwrap();
            };
            bench.case(
                &format!("borg is killed {time}"),
                |site| in_the_middle(site, act),
                |run| {
                    fails_with(run, 1, &["borg", "guest"]);
                },
            );
        }
        bench.verdict();
    }
}

/// Nobody can tell a borg that hangs from a slow one; but whoever stops the run does not wait for it, and nothing stays.
#[test]
fn borg_hangs() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("provider hung", "borg", kind) else { return };
        let act = |site: &Site, run: &std::process::Child| {
            kill(borg_create(site), Signal::SIGSTOP).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            kill(Pid::from_raw(i32::try_from(run.id()).unwrap()), Signal::SIGINT).unwrap();
        };
        bench.case(
            "borg hangs",
            |site| in_the_middle(site, act),
            |run| assert_eq!(run.code, Some(130), "{}", said(run)),
        );
        bench.verdict();
    }
}

/// A borg that does `what` in place of some of its work.
fn lying_borg(site: &Site, what: &str) -> PathBuf {
    let path = site.program.dir().join("bin/borg");
    let repository = site.program.dir().join("repository/borg");
    let script =
        format!("#!/bin/sh\nreal=/usr/bin/borg\nrepository='{}'\n{what}\nexec $real \"$@\"\n", repository.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn borg_lies() {
    let lies = [
        (
            "it says that it has stored what it did not read",
            r#"[ "$1" = create ] && { echo '{"archive":{"stats":{"nfiles":99,"deduplicated_size":1}}}'; exit 0; }"#,
        ),
        (
            "it loses the archive when that gets its name",
            r#"[ "$1" = rename ] && {
                $real "$@" || exit
                for name; do :; done
                $real delete "$repository::$name" >&2 || exit
                exit 0
            }"#,
        ),
        (
            "it reads everything and stores nothing",
            r#"[ "$1" = create ] && {
                n=$(find guest.conf firewall.conf disks manifest.json -type f -exec cat {} + -print0 2>/dev/null | tr -dc '\0' | wc -c)
                echo "{\"archive\":{\"stats\":{\"nfiles\":$n,\"deduplicated_size\":1}}}"
                exit 0
            }"#,
        ),
    ];
    for kind in KINDS {
        let Some(mut bench) = Bench::new("provider lies", "borg", kind) else { return };
        for (name, script) in lies {
            let run = |site: &Site| {
                let borg = lying_borg(site, script);
                let run = site.backup(&[]);
                fs::remove_file(borg).unwrap();
                run
            };
            bench.case(name, run, |run| fails_with(run, 1, &["archive", "guest"]));
        }
        bench.verdict();
    }
}

/// Runs a backup while every new file below `dir` whose path `goes` goes.
fn with_files_going(site: &Site, dir: &Path, goes: impl Fn(&Path) -> bool + Sync) -> Run {
    fn files(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => files(&entry.path(), found),
                _ => found.push(entry.path()),
            }
        }
    }
    let mut old = Vec::new();
    files(dir, &mut old);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                let mut now = Vec::new();
                files(dir, &mut now);
                for file in now.iter().filter(|file| goes(file) && !old.contains(file)) {
                    let _ = fs::remove_file(file);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let run = site.backup(&[]);
        ended.store(true, Ordering::SeqCst);
        run
    })
}

#[test]
fn a_repository_loses_what_is_written_to_it() {
    // Of restic's repository only the one directory: to look through all takes longer than its files are needed.
    for (provider, below, what) in [("restic", "index", ""), ("directory", "", ".qcow2")] {
        for kind in KINDS {
            let Some(mut bench) = Bench::new("repository forgets", provider, kind) else { return };
            let place = bench.repository().join(below);
            bench.case(
                &format!("{provider}: {below}{what} goes"),
                |site| with_files_going(site, &place, |file| file.to_str().unwrap().contains(what)),
                |run| assert!(matches!(run.code, Some(1 | 25)) && run.stderr.contains("guest"), "{}", said(run)),
            );
            bench.verdict();
        }
    }
}

/// Room for the archives of all cases, in MiB. borg wants more than it needs.
fn room(provider: &str) -> u64 {
    if provider == "borg" { 1024 } else { 512 }
}

/// borg takes its time: in the normal run on one kind of access only, which has no part in it.
fn kinds(provider: &str) -> &'static [Kind] {
    if provider == "borg" && !long() { &KINDS[..1] } else { &KINDS }
}

fn full(provider: &'static str) {
    for kind in kinds(provider) {
        let small = Some((Small::Repository, room(provider)));
        let Some(mut bench) = Bench::with("repository full", provider, *kind, small, "") else { return };
        let spares: &[u64] = match provider {
            _ if long() => &[0, 4, 8, 16, 32, 64, 256, 1024],
            "borg" => &[0],
            _ => &[0, 16],
        };
        for spare in spares {
            bench.small().leave(spare << 10);
            let path = bench.small().path().to_owned();
            let judge = |run: &Run| match run.code {
                Some(0 | 3) if *spare > 0 => {}
                _ => fails_with(run, 23, &["repository"]),
            };
            bench.case_between(
                &format!("{provider}: {spare} KiB are free"),
                |site| site.backup(&[]),
                judge,
                |_| SmallFs::resize_at(&path, room(provider)),
            );
        }
        bench.verdict();
    }
}

#[test]
fn a_restic_repository_that_is_full() {
    full("restic");
}

#[test]
fn a_borg_repository_that_is_full() {
    full("borg");
}

#[test]
fn a_directory_that_is_full() {
    full("directory");
}

fn read_only(provider: &'static str) {
    for kind in kinds(provider) {
        let small = Some((Small::Repository, room(provider)));
        let Some(mut bench) = Bench::with("repository read-only", provider, *kind, small, "") else { return };
        let path = bench.small().path().to_owned();
        bench.small().read_only();
        bench.case_between(
            &format!("{provider}: read-only"),
            |site| site.backup(&[]),
            |run| fails_with(run, 1, &["repository", "ead-only"]),
            |_| SmallFs::writable_at(&path),
        );
        bench.verdict();
    }
}

#[test]
fn a_restic_repository_that_is_read_only() {
    read_only("restic");
}

#[test]
fn a_borg_repository_that_is_read_only() {
    read_only("borg");
}

#[test]
fn a_directory_that_is_read_only() {
    read_only("directory");
}

#[test]
fn a_repository_that_is_gone_in_the_middle() {
    for kind in KINDS {
        let Some(mut bench) = Bench::new("repository gone", "restic", kind) else { return };
        let (repository, aside) = (bench.repository(), bench.site.program.dir().join("aside"));
        bench.case_between(
            "gone in the middle",
            |site| in_the_middle(site, |_, _| fs::rename(&repository, &aside).unwrap()),
            |run| {
                assert!(
                    matches!(run.code, Some(1 | 10 | 20 | 25)) && run.stderr.contains("repository"),
                    "{}",
                    said(run)
                );
            },
            |_| {
                let _ = fs::remove_dir_all(&repository);
                fs::rename(&aside, &repository).unwrap();
            },
        );
        bench.verdict();
    }
}
