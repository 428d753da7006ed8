//! Disks with long segments, of which small changes are stored by themselves.

use super::*;
use bytes::Bytes;
use pvebackup::{
    extent::{Extent, Extents},
    provider::{DiskInput, DiskQuery, Expected, FineInput, Incremental},
    report::{Collector, Events},
    restore::{Destination, ImageFormat, Overwrite, RestoreRequest, restore},
    segment::{Content as State, DiskTables, Segment, SegmentData, SegmentLen, Task, layers::divide, tasks},
};
use std::{path::Path, sync::Arc};

pub const LONG: u64 = 512 << 10;
/// The last segment has two fine ones, of which the second is short.
pub const LONG_SIZE: u64 = 24 * LONG + LEN + 512;
const UNITS: u64 = LONG_SIZE.div_ceil(LEN);

fn long() -> SegmentLen {
    SegmentLen::new(LONG).unwrap()
}

/// A disk's bytes, and what became of each 64 KiB of it since the base.
#[derive(Clone)]
pub struct LongDisk {
    pub content: Vec<u8>,
    changes: BTreeMap<u64, State>,
}

fn unit(index: u64) -> std::ops::Range<usize> {
    (index * LEN) as usize..LONG_SIZE.min((index + 1) * LEN) as usize
}

impl LongDisk {
    pub fn new() -> Self {
        Self { content: vec![0; LONG_SIZE as usize], changes: BTreeMap::new() }
    }

    pub fn write(&mut self, index: u64, seed: u64) {
        let range = unit(index);
        let len = range.len();
        self.content[range].copy_from_slice(&segment_bytes(seed, index)[..len]);
        self.changes.insert(index, State::Data);
    }

    /// Makes it zero, which QEMU knows or does not.
    pub fn clear(&mut self, index: u64, known: bool) {
        self.content[unit(index)].fill(0);
        self.changes.insert(index, if known { State::Zero } else { State::Data });
    }

    fn map(&self, full: bool) -> Extents<State> {
        let state = |index| {
            let zero = || self.content[unit(index)].iter().all(|byte| *byte == 0);
            match self.changes.get(&index) {
                _ if full => [State::Data, State::Zero][usize::from(zero())],
                Some(state) => *state,
                None => State::Clean,
            }
        };
        let extents =
            (0..UNITS).map(|index| Extent { offset: index * LEN, len: unit(index).len() as u64, state: state(index) });
        Extents::from_ordered(LONG_SIZE, extents).unwrap()
    }

    /// What the copy engine makes of tasks.
    fn segments(&self, tasks: Vec<Task>) -> Vec<Segment> {
        let segment = |task: Task| {
            let bytes = &self.content[task.offset as usize..(task.offset + task.len) as usize];
            let data = bytes.iter().any(|byte| *byte != 0);
            assert!(!(task.zero && data));
            let data = data.then(|| SegmentData::new(Bytes::copy_from_slice(bytes), |_| {}));
            Segment { index: task.index, data }
        };
        tasks.into_iter().map(segment).collect()
    }
}

fn tables(f: &mut Fixture, base: &ArchiveId) -> DiskTables {
    let query = DiskQuery { name: "scsi0".into(), size: LONG_SIZE, segment_len: long(), base: base.clone() };
    f.provider.repository_id().unwrap();
    match f.provider.query_incremental(&[query]).unwrap().remove(0) {
        Incremental::Use(tables) => tables,
        Incremental::New(reason) => panic!("not confirmed: {reason}"),
    }
}

/// A backup as a run makes it; returns the archive, and how many segments and fine segments were read for it.
pub fn backup(f: &mut Fixture, disk: &mut LongDisk, base: Option<&ArchiveId>) -> (ArchiveId, usize, usize) {
    f.clock = f.clock.checked_add(1.hour()).unwrap();
    let name = f.provider.backup_init("100", f.clock).unwrap();
    let base = base.map(|id| (id.clone(), tables(f, id)));
    let map = disk.map(base.is_none());
    let division = base.as_ref().map(|(_, tables)| divide(&map, long(), &tables.fine, true).unwrap());
    let whole = division.as_ref().map_or(&map, |division| &division.segments);
    let whole: Vec<Task> = tasks(whole, long()).filter(|task| base.is_some() || !task.zero).collect();
    let expected = whole.iter().map(|task| Expected { index: task.index, zero: task.zero }).collect();
    let read = whole.iter().filter(|task| !task.zero).count();
    let mut input = f.input(name.clone(), Vec::new());
    let instant = input.instant;
    input.manifest = Box::new(move |tables| manifest(name, instant, &[("scsi0".into(), LONG_SIZE, long())], tables));
    let ok = |segments: Vec<Segment>| Box::new(segments.into_iter().map(Ok));
    let mut read_fine = 0;
    let fine = division.map(|division| {
        let parts: Vec<Task> = tasks(&division.fine, SegmentLen::FINE).collect();
        read_fine = parts.len();
        let expected = parts.iter().map(|task| task.index).collect();
        FineInput { base: division.kept, expected, changed: ok(disk.segments(parts)) }
    });
    input.disks.push(DiskInput {
        name: "scsi0".into(),
        size: LONG_SIZE,
        segment_len: long(),
        base: base.map(|(id, tables)| (id, tables.segments)),
        expected,
        changed: ok(disk.segments(whole)),
        fine,
    });
    let id = f.provider.backup(input).unwrap().id;
    disk.changes.clear();
    (id, read, read_fine)
}

fn restored(f: &mut Fixture, archive: &ArchiveId, to: &Path) -> Vec<u8> {
    let reader = f.provider.open(archive).unwrap();
    let request = RestoreRequest {
        destination: Destination::Disks(vec![("scsi0".into(), to.to_owned())]),
        format: ImageFormat::Raw,
        overwrite: Overwrite::Refused,
    };
    let events = Events::new("100", Arc::new(Collector::new()));
    restore(reader.as_ref(), &request, &events, &f.cancel).unwrap();
    let bytes = fs::read(to).unwrap();
    fs::remove_file(to).unwrap();
    bytes
}

#[test]
fn every_archive_of_a_history_with_fine_segments_is_the_disk_as_it_was() {
    let Some(mut f) = Fixture::new() else { return };
    let mut random = random(11);
    let mut disk = LongDisk::new();
    (0..UNITS).filter(|index| index % 24 < 16).for_each(|index| disk.write(index, 1));
    let (first, read, _) = backup(&mut f, &mut disk, None);
    assert_eq!(read as u64, (0..25).filter(|index| index % 3 < 2).count() as u64);
    let mut history = vec![(first, disk.content.clone())];
    let (mut most, mut again, mut parts) = (0, 0, 0);
    for round in 2..14u64 {
        match round {
            // Everything of a segment: what lies over it goes.
            5 => (16..24).for_each(|index| disk.clear(index, true)),
            6 => (16..24).for_each(|index| disk.write(index, round)),
            // Our own copies of the tables are lost: the archive has them, too.
            8 => fs::remove_file(f.options.directory.join("tables/100/scsi0+64k")).unwrap(),
            9 => fs::remove_dir_all(f.options.directory.join("tables")).unwrap(),
            _ => {}
        }
        for _ in 0..random(12) {
            let index = random(UNITS);
            match random(5) {
                0 => disk.clear(index, true),
                1 => disk.clear(index, false),
                _ => disk.write(index, round),
            }
        }
        let base = history.last().unwrap().0.clone();
        let (id, read, read_fine) = backup(&mut f, &mut disk, Some(&base));
        let fine = tables(&mut f, &id).fine.records().len();
        (most, again, parts) = (most.max(fine), again + read, parts + read_fine);
        history.push((id, disk.content.clone()));
    }
    assert!(most > 10 && again > 5 && parts > 20, "{most} fine segments at most, {again} and {parts} read");
    let before = history.last().unwrap().0.clone();
    let (idle, read, read_fine) = backup(&mut f, &mut disk, Some(&before));
    assert_eq!((read, read_fine), (0, 0));
    history.push((idle, disk.content.clone()));
    let image = f.dir.path().join("image");
    for (id, content) in &history {
        assert!(restored(&mut f, id, &image) == *content, "archive {id}");
    }
    f.borg(&["check", "--verify-data", &f.repository().display().to_string()]);
}

#[test]
fn fine_segments_are_read_in_any_order() {
    let Some(mut f) = Fixture::new() else { return };
    let mut disk = LongDisk::new();
    let (first, ..) = backup(&mut f, &mut disk, None);
    // One in each segment, all of them over holes, and both of the last.
    let written: Vec<u64> = (0..24).map(|segment| segment * 8 + segment % 8).chain([UNITS - 2]).collect();
    for index in &written {
        disk.write(*index, 3);
    }
    let (second, read, read_fine) = backup(&mut f, &mut disk, Some(&first));
    assert_eq!((read, read_fine), (0, 25));
    let reader = f.provider.open(&second).unwrap();
    for index in written.iter().rev().chain(&written) {
        let bytes = reader.segment("scsi0+64k", *index, unit(*index).len() as u64).unwrap();
        assert!(bytes == disk.content[unit(*index)], "{index}");
    }
    assert_eq!(reader.segment("scsi0+64k", 1, LEN).unwrap_err().kind, ErrorKind::NotFound);
    let image = f.dir.path().join("image");
    assert!(restored(&mut f, &second, &image) == disk.content);
}
