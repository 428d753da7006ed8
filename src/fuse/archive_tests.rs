//! Archives in memory, mounted for real.

use super::{
    FuseError, ImageView, Mount, MountOptions, ViewOptions, archive,
    image::{Find, Image},
};
use crate::{
    report::{Collector, Events},
    restore::tests::memory::{Fault, Memory, Model},
    segment::SegmentLen,
};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    libc::O_DIRECT,
    unistd::{Whence, lseek},
};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant, SystemTime},
};
use tempfile::TempDir;

const SEGMENT: usize = 64 << 10;

/// A disk whose segments are holes or noise, by seed; the last has 4096 bytes.
fn model(name: &'static str, seeds: &[u64]) -> Model {
    let mut content = Vec::new();
    for seed in seeds {
        let mut state = *seed;
        content.extend((0..SEGMENT).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        }));
    }
    content.truncate(content.len() - SEGMENT + 4096);
    Model { name, content }
}

fn disks() -> Vec<Model> {
    vec![model("scsi0", &[0, 71, 72, 0, 0, 73, 0, 74]), model("efidisk0", &[81]), model("virtio1", &[0, 0])]
}

fn memory() -> Memory {
    Memory::of(&disks(), SegmentLen::new(SEGMENT as u64).expect("valid"))
}

pub(super) struct Shown {
    pub mount: Mount,
    pub dir: TempDir,
    pub log: Arc<Collector>,
}

impl Shown {
    pub fn path(&self, disk: &str) -> PathBuf {
        self.dir.path().join(disk)
    }
}

/// `None`, with the reason printed, where nothing can be mounted. The tokio runtime must have workers: the caller blocks.
pub(super) fn show(images: Vec<Arc<dyn Image>>, deadline: Duration) -> Option<Shown> {
    let (dir, log) = (tempfile::tempdir().expect("directory"), Arc::new(Collector::new()));
    let options = ViewOptions { deadline, time: SystemTime::UNIX_EPOCH, events: Events::new("100", log.clone()) };
    match Mount::start_images(
        dir.path(),
        ImageView::new(images, options),
        MountOptions { read_ahead_kib: Some(4096), ..MountOptions::default() },
    ) {
        Ok(mount) => Some(Shown { mount, dir, log }),
        Err(FuseError::NoDevice | FuseError::NoHelper) => {
            eprintln!("skipped: FUSE cannot be mounted here");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

fn images(memory: Memory) -> Vec<Arc<dyn Image>> {
    archive::open(Arc::new(memory)).expect("a sound archive").1
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_raw(result.expect_err("refused").raw_os_error().expect("from the kernel"))
}

/// Reads past the page cache: buffers have to be aligned for that.
pub(super) fn read_direct(path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(path)?;
    let mut buffer = vec![0u8; len + 4096];
    let at = buffer.as_ptr().align_offset(4096);
    let read = file.read_at(&mut buffer[at..at + len], offset)?;
    Ok(buffer[at..at + read].to_vec())
}

/// Start and end of the data, as `lseek` tells.
pub(super) fn data_map(file: &File) -> Vec<(i64, i64)> {
    let (mut map, mut at) = (Vec::new(), 0);
    loop {
        match lseek(file, at, Whence::SeekData) {
            Ok(data) => {
                at = lseek(file, data, Whence::SeekHole).expect("a hole behind it");
                map.push((data, at));
            }
            Err(Errno::ENXIO) => return map,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Of the second disk, long segments that are holes: the first has one fine segment, the third two.
#[tokio::test(flavor = "multi_thread")]
async fn fine_segments_are_part_of_the_image() {
    let long = SegmentLen::new(8 * SEGMENT as u64).expect("valid");
    let before = [model("scsi0", &[71; 24]), model("virtio1", &[0; 24])];
    let now = [model("scsi0", &[&[71; 9][..], &[72, 0], &[71; 13]].concat()), {
        let seeds: Vec<u64> = (0..24).map(|at| if [3, 16, 23].contains(&at) { 75 } else { 0 }).collect();
        model("virtio1", &seeds)
    }];
    let memory = Memory::of(&before, long).overlaid(&now[0], long, &[9, 10]).overlaid(&now[1], long, &[3, 16, 23]);
    let Some(shown) = show(images(memory), Duration::from_mins(1)) else { return };
    for disk in &now {
        assert!(fs::read(shown.path(disk.name)).expect("read") == disk.content, "{}", disk.name);
        let at = 3 * SEGMENT as u64 - 4096;
        let part = read_direct(&shown.path(disk.name), at, 8192).expect("read");
        assert!(part == disk.content[at as usize..at as usize + 8192], "{}", disk.name);
    }
    let map = data_map(&File::open(shown.path("virtio1")).expect("opened"));
    let (len, size) = (8 * SEGMENT as i64, now[1].content.len() as i64);
    assert_eq!(map, [(0, len), (2 * len, size)]);
    shown.mount.umount().expect("unmounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_the_disks_byte_for_byte() {
    let Some(shown) = show(images(memory()), Duration::from_mins(1)) else { return };
    let mut names: Vec<_> =
        fs::read_dir(shown.dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["efidisk0", "scsi0", "virtio1"]);
    for disk in disks() {
        let path = shown.path(disk.name);
        let attributes = fs::metadata(&path).expect("attributes");
        assert_eq!(attributes.len(), disk.content.len() as u64);
        assert_eq!(attributes.permissions().mode() & 0o777, 0o400);
        assert!(fs::read(&path).expect("read") == disk.content, "{} differs", disk.name);
        let mut direct = Vec::new();
        while direct.len() < disk.content.len() {
            direct.extend(read_direct(&path, direct.len() as u64, 3 * 4096).expect("read"));
        }
        assert!(direct == disk.content, "{} differs when read with O_DIRECT", disk.name);
        let mut odd = vec![0; 777];
        let file = File::open(&path).expect("open");
        let read = file.read_at(&mut odd, disk.content.len() as u64 - 100).expect("read");
        assert_eq!(odd[..read], disk.content[disk.content.len() - 100..]);
        assert_eq!(file.read_at(&mut odd, disk.content.len() as u64).expect("the end"), 0);
    }
    assert!(fs::metadata(shown.path("scsi0")).expect("attributes").blocks() * 512 < disks()[0].content.len() as u64);
    assert_eq!(shown.log.warnings(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lseek_finds_the_stored_segments() {
    let Some(shown) = show(images(memory()), Duration::from_mins(1)) else { return };
    let segment = SEGMENT as i64;
    let scsi0 = File::open(shown.path("scsi0")).expect("open");
    assert_eq!(
        data_map(&scsi0),
        [(segment, 3 * segment), (5 * segment, 6 * segment), (7 * segment, 7 * segment + 4096),]
    );
    assert_eq!(lseek(&scsi0, segment + 5, Whence::SeekData), Ok(segment + 5));
    assert_eq!(lseek(&scsi0, 3 * segment + 5, Whence::SeekHole), Ok(3 * segment + 5));
    assert_eq!(lseek(&scsi0, 8 * segment, Whence::SeekHole), Err(Errno::ENXIO));
    assert_eq!(data_map(&File::open(shown.path("virtio1")).expect("open")), []);
    assert_eq!(data_map(&File::open(shown.path("efidisk0")).expect("open")), [(0, 4096)]);
}

#[test]
fn find_agrees_with_a_look_at_every_segment() {
    let image = images(memory()).into_iter().find(|image| image.name() == "scsi0").expect("there");
    let stored = [false, true, true, false, false, true, false, true];
    for offset in (0..image.size()).step_by(SEGMENT / 4) {
        for (what, state) in [(Find::Data, true), (Find::Hole, false)] {
            let index = offset / SEGMENT as u64;
            let expected = (index..8).find(|i| stored[*i as usize] == state);
            let expected = expected.map(|i| offset.max(i * SEGMENT as u64));
            assert_eq!(image.find(offset, what), expected, "{what:?} from {offset}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_changed() {
    let Some(shown) = show(images(memory()), Duration::from_mins(1)) else { return };
    let path = shown.path("scsi0");
    assert_eq!(errno(OpenOptions::new().write(true).open(&path)), Errno::EROFS);
    assert_eq!(errno(OpenOptions::new().read(true).append(true).open(&path)), Errno::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&path)), Errno::EROFS);
    assert_eq!(errno(File::create(shown.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::create_dir(shown.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::remove_file(&path)), Errno::EROFS);
    assert_eq!(errno(fs::rename(&path, shown.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::hard_link(&path, shown.path("new"))), Errno::EROFS);
    assert_eq!(errno(std::os::unix::fs::symlink("a", shown.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::set_permissions(&path, fs::Permissions::from_mode(0o644))), Errno::EROFS);
    let file = File::open(&path).expect("open");
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, punch, 0, 65536), Err(Errno::EBADF));
    assert_eq!(shown.mount.umount().expect("unmounted"), super::Unmounted::Aborted);
    drop(file);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_segment_is_an_error_with_a_reason_and_the_rest_can_be_read() {
    for (fault, reason) in [
        (Fault::Corrupt, "digest does not match"),
        (Fault::Short, "65535"),
        (Fault::Withhold, "no segment 5 of scsi0"),
        (Fault::Fail, "connection reset"),
        (Fault::Panic, "ended unexpectedly"),
    ] {
        let Some(shown) = show(images(memory().fault("scsi0", 5, fault)), Duration::from_mins(1)) else { return };
        let (path, content) = (shown.path("scsi0"), &disks()[0].content);
        assert_eq!(errno(read_direct(&path, 5 * SEGMENT as u64, 4096)), Errno::EIO, "{fault:?}");
        let first = shown.log.warnings().remove(0);
        assert!(first.starts_with("disk `scsi0`: reading 4096 bytes at 327680 fails: "), "{first}");
        assert!(first.contains(reason), "{first}");
        // Read-ahead runs into the bad segment and must not spoil what is before it.
        let file = File::open(&path).expect("open");
        let mut good = vec![0; 5 * SEGMENT];
        file.read_exact_at(&mut good, 0).expect("all of it is sound");
        assert!(good == content[..5 * SEGMENT]);
        assert!(file.read_exact_at(&mut good[..4096], 5 * SEGMENT as u64).is_err());
        file.read_exact_at(&mut good[..SEGMENT], 6 * SEGMENT as u64).expect("behind it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_no_longer_than_the_deadline() {
    let slow = memory().before_reads(|_| thread::sleep(Duration::from_secs(2)));
    let Some(shown) = show(images(slow), Duration::from_millis(200)) else { return };
    let start = Instant::now();
    assert_eq!(errno(read_direct(&shown.path("scsi0"), SEGMENT as u64, 4096)), Errno::EIO);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(shown.log.warnings()[0].contains("no answer within 200ms"), "{:?}", shown.log.warnings());
    // A hole needs no answer of the archive.
    assert_eq!(read_direct(&shown.path("scsi0"), 0, 4096).expect("a hole"), [0; 4096]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_get_the_same_bytes_and_share_segments() {
    let memory = Arc::new(memory());
    let images = archive::open(memory.clone()).expect("a sound archive").1;
    let Some(shown) = show(images, Duration::from_mins(1)) else { return };
    let (readers, rounds) = (16, 4);
    let (barrier, content) = (Arc::new(Barrier::new(readers)), Arc::new(disks().remove(0).content));
    let threads: Vec<_> = (0..readers)
        .map(|number| {
            let (barrier, content, path) = (barrier.clone(), content.clone(), shown.path("scsi0"));
            thread::spawn(move || {
                barrier.wait();
                for round in 0..rounds {
                    let offset = (number * 7 + round * 13) % 112 * 4096;
                    let read = read_direct(&path, offset as u64, 5 * 4096).expect("read");
                    let expected = &content[offset..(offset + 5 * 4096).min(content.len())];
                    assert!(read == expected, "reader {number} at {offset}");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert!(memory.reads() <= 4, "4 segments were read {} times", memory.reads());
}
