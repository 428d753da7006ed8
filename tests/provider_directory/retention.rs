//! Archives are removed, and at every moment the others are what they were.

use super::fixture::*;
use pvebackup::{
    archive::ArchiveId,
    backup::{ProviderThread, prune},
    provider::{
        Outcome, Provider, PruneRequest, Pruned,
        directory::{DirectoryOptions, DirectoryProvider, OnChain},
    },
};
use std::{collections::BTreeMap, fs};
use tokio_util::sync::CancellationToken;

pub type History = Vec<(ArchiveId, Content)>;

impl Fixture {
    pub fn prune(&mut self, remove: &[ArchiveId]) -> Vec<Pruned> {
        let request = self.request(remove);
        self.provider.prune(request).unwrap()
    }

    fn request(&self, remove: &[ArchiveId]) -> PruneRequest {
        PruneRequest { guest: "100".into(), remove: remove.to_vec(), dry_run: false, cancel: self.cancel.clone() }
    }

    fn refusing(&mut self) {
        let mut options = DirectoryOptions::new(&self.root);
        options.on_chain = OnChain::Refuse;
        self.provider = DirectoryProvider::open(&options).unwrap();
    }

    /// A full backup and `count - 1` incremental ones, with zeroes over data and data over zeroes.
    pub fn history(&mut self, count: u64, seed: u64) -> History {
        let mut random = random(seed);
        let mut now: Content = (0..SEGMENTS).step_by(7).map(|i| (i, segment_bytes(seed, i))).collect();
        let mut history = vec![(self.backup(vec![Disk::full("scsi0", &now)]).unwrap().id, now.clone())];
        for round in 1..count {
            let mut changes: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
            for _ in 0..=random(12) {
                let index = random(SEGMENTS);
                changes.insert(index, (random(3) > 0).then(|| segment_bytes(seed + round, index)));
            }
            for index in now.keys().copied().filter(|_| random(10) == 0) {
                changes.entry(index).or_insert(None);
            }
            let base = Some(self.use_base(&history.last().unwrap().0, "scsi0"));
            let disk = Disk { name: "scsi0", base, changes: changes.clone().into_iter().map(Ok).collect() };
            let id = self.backup(vec![disk]).unwrap().id;
            for (index, change) in changes {
                match change {
                    Some(bytes) => now.insert(index, bytes),
                    None => now.remove(&index),
                };
            }
            history.push((id, now.clone()));
        }
        history
    }

    /// Exactly these archives are there, each of them right, and the newest can be built on.
    #[track_caller]
    pub fn assert_history(&mut self, history: &[(ArchiveId, Content)]) {
        let listed: Vec<ArchiveId> = self.provider.list(Some("100")).unwrap().into_iter().map(|a| a.id).collect();
        assert_eq!(listed, history.iter().map(|h| h.0.clone()).collect::<Vec<_>>());
        for (id, content) in history {
            assert!(self.restored(id, "scsi0") == *content, "archive {id}");
        }
        self.use_base(&history.last().unwrap().0, "scsi0");
    }

    #[track_caller]
    pub fn assert_nothing_half(&self) {
        let mut open = vec![self.root.join("100")];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
                let name = entry.file_name().unwrap().to_str().unwrap();
                assert!(!name.ends_with(".partial") && !name.ends_with(".removed"), "{}", entry.display());
                if entry.is_dir() {
                    open.push(entry);
                }
            }
        }
    }
}

pub fn ids(history: &[(ArchiveId, Content)]) -> Vec<ArchiveId> {
    history.iter().map(|h| h.0.clone()).collect()
}

#[test]
fn whatever_is_merged_the_others_are_what_they_were() {
    for seed in 1..4 {
        let mut f = Fixture::new();
        let mut random = random(seed);
        let mut history = f.history(16, seed * 100);
        while history.len() > 2 {
            let newest = history.len() - 1;
            let remove: Vec<usize> = (0..newest).filter(|_| random(4) == 0).collect();
            let named: Vec<ArchiveId> = remove.iter().map(|i| history[*i].0.clone()).collect();
            let fates = f.prune(&named);
            assert!(fates.iter().all(|fate| matches!(fate, Pruned::Removed | Pruned::Merged)), "{fates:?}");
            for index in remove.into_iter().rev() {
                history.remove(index);
            }
            f.assert_history(&history);
            f.assert_nothing_half();
        }
        for (id, content) in &history {
            assert_sound(&f.image(id, "scsi0"));
            assert_converts_to(&f.image(id, "scsi0"), content);
        }
        let (full, _) = qemu_img(&["info", f.image(&history[0].0, "scsi0").to_str().unwrap()]);
        assert!(full);
    }
}

#[test]
fn the_oldest_that_is_left_needs_no_other_and_the_chain_goes_on() {
    let mut f = Fixture::new();
    let history = f.history(6, 5);
    assert_eq!(f.prune(&ids(&history[..3])), vec![Pruned::Merged; 3]);
    let (_, text) = qemu_img(&["info", f.image(&history[3].0, "scsi0").to_str().unwrap()]);
    assert!(!text.contains("backing file"), "{text}");
    f.assert_history(&history[3..]);
    // A merged image is as good a base as any, also for an archive that is merged again.
    assert_eq!(f.prune(&ids(&history[3..5])), vec![Pruned::Merged; 2]);
    f.assert_history(&history[5..]);
    assert_converts_to(&f.image(&history[5].0, "scsi0"), &history[5].1);
}

#[test]
fn an_archive_may_have_several_above_it_and_disks_of_their_own() {
    let mut f = Fixture::new();
    let a: Content = (0..60).map(|i| (i, segment_bytes(1, i))).collect();
    let one = f.backup(vec![Disk::full("a", &a), Disk::full("b", &a)]).unwrap().id;
    let above = |f: &mut Fixture, disk: &'static str, index: u64| {
        let base = Some(f.use_base(&one, disk));
        f.backup(vec![Disk { name: disk, base, changes: vec![Ok((index, Some(segment_bytes(index, index))))] }])
            .unwrap()
            .id
    };
    // A run that stored its archive and died then leaves one that the next does not build on.
    let above = [above(&mut f, "a", 5), above(&mut f, "a", 70), above(&mut f, "b", 8)];
    assert_eq!(f.prune(std::slice::from_ref(&one)), [Pruned::Merged]);
    for (id, (disk, index)) in above.iter().zip([("a", 5), ("a", 70), ("b", 8)]) {
        let mut expected = a.clone();
        expected.insert(index, segment_bytes(index, index));
        assert!(f.restored(id, disk) == expected, "{id}");
        assert_converts_to(&f.image(id, disk), &expected);
        assert_sound(&f.image(id, disk));
        f.use_base(id, disk);
    }
    assert!(!f.archive(&one).exists());
}

#[test]
fn a_target_that_refuses_keeps_what_is_built_on_until_all_of_it_goes() {
    let mut f = Fixture::new();
    f.refusing();
    let mut history = f.history(4, 9);
    let fates = f.prune(&ids(&history[..2]));
    let stays = |fate: &Pruned| matches!(fate, Pruned::Kept(why) if why.contains("builds on it"));
    assert!(fates.iter().all(stays), "{fates:?}");
    f.assert_history(&history);
    let full: Content = (0..9).map(|i| (i, segment_bytes(1, i))).collect();
    history.push((f.backup(vec![Disk::full("scsi0", &full)]).unwrap().id, full));
    let mut request = f.request(&ids(&history[..4]));
    request.dry_run = true;
    assert_eq!(f.provider.prune(request).unwrap(), vec![Pruned::Removed; 4]);
    f.assert_history(&history);
    assert_eq!(f.prune(&ids(&history[..4])), vec![Pruned::Removed; 4]);
    f.assert_history(&history[4..]);
}

#[test]
fn what_must_not_go_stays_and_why_is_told() {
    let mut f = Fixture::new();
    let history = f.history(4, 11);
    let kept = |fates: &[Pruned], why: &str| {
        let [Pruned::Kept(reason)] = fates else { panic!("{fates:?}") };
        assert!(reason.contains(why), "{reason}");
    };
    let newest = history[3].0.clone();
    kept(&f.prune(&[newest]), "newest");
    for id in ["100/qemu-5", "101/qemu-5", "", "../100"] {
        kept(&f.prune(&[ArchiveId(id.into())]), "no archive of this guest");
    }
    let reader = f.provider.open(&history[0].0).unwrap();
    kept(&f.prune(&ids(&history[..1])), "being read");
    drop(reader);
    let stopped = CancellationToken::new();
    stopped.cancel();
    let mut request = f.request(&ids(&history[..1]));
    request.cancel = stopped;
    kept(&f.provider.prune(request).unwrap(), "stopped");
    f.assert_history(&history);

    // An image that somebody wrote to must not get a seal that says otherwise.
    let image = f.image(&history[0].0, "scsi0");
    fs::OpenOptions::new().append(true).open(&image).unwrap().set_len(fs::metadata(&image).unwrap().len() + 1).unwrap();
    kept(&f.prune(&ids(&history[..1])), "changed since its backup");
    assert_eq!(f.provider.list(None).unwrap().len(), 4);

    // What an image builds on is not known any more: nothing goes.
    fs::write(f.image(&history[2].0, "scsi0"), b"QFI\xfb").unwrap();
    let request = f.request(&ids(&history[..1]));
    let error = f.provider.prune(request).unwrap_err().to_string();
    assert!(error.contains("not clear what image"), "{error}");
    assert_eq!(f.provider.list(None).unwrap().len(), 4);
    f.assert_nothing_half();
}

#[test]
fn what_a_run_has_just_made_stays_though_the_clock_was_set_back() {
    let mut f = Fixture::new();
    let old = f.history(2, 31);
    f.clock = f.clock.checked_sub(jiff::Span::new().hours(48)).unwrap();
    let content: Content = [(1, segment_bytes(1, 1))].into();
    let made = f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id;
    let rules = "keep-last=1".parse().unwrap();
    let mut provider = ProviderThread::new(Box::new(DirectoryProvider::open(&DirectoryOptions::new(&f.root)).unwrap()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let judged = runtime.block_on(prune("100", &rules, &mut provider, Some(&made), false, &f.cancel)).unwrap();
    // It is the newest by its name, too, so that the one place is its own.
    let kept: Vec<&ArchiveId> = judged.iter().filter(|j| j.pruned.is_none()).map(|j| &j.archive.id).collect();
    assert_eq!((kept, judged.len()), (vec![&made], old.len() + 1), "{judged:?}");
    assert!(f.restored(&made, "scsi0") == content);
}

#[test]
fn logs_of_failed_backups_do_not_pile_up() {
    let mut f = Fixture::new();
    for _ in 0..13 {
        f.begin();
        f.provider.backup_cleanup(&Outcome::Failure("no".into())).unwrap();
        f.provider.handle_log("log\n").unwrap();
    }
    let failed = f.ending(".failed");
    assert_eq!(failed.len(), 10);
    let last = fs::read_to_string(f.root.join("100").join(failed.last().unwrap()).join("backup.log")).unwrap();
    assert_eq!(last, "log\n");
    f.clock = "2026-01-31T02:00:07Z".parse().unwrap();
    assert!(failed[0] > format!("qemu-{}", f.clock.as_second() + 3 * 3600), "the oldest went");
}
