//! What every disk holds, and held after each of the guest's operations.

use super::image::Image;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
    path::Path,
};

/// Blocks of the model, and of the comparison.
const BLOCK: u64 = 64 * 1024;

static ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// What one operation did to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Fill { offset: u64, length: u64, byte: u8 },
    Bytes { offset: u64, data: Vec<u8> },
    Resize { size: u64 },
}

impl Change {
    fn blocks(&self) -> std::ops::Range<u64> {
        let (offset, length) = match self {
            Self::Fill { offset, length, .. } => (*offset, *length),
            Self::Bytes { offset, data } => (*offset, data.len() as u64),
            Self::Resize { .. } => (0, 0),
        };
        if length == 0 { 0..0 } else { offset / BLOCK..(offset + length).div_ceil(BLOCK) }
    }
}

/// Content of a disk; blocks that are not there are zero.
#[derive(Clone, Debug, Default)]
pub struct Content {
    size: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl Content {
    pub fn empty(size: u64) -> Self {
        Self { size, blocks: BTreeMap::new() }
    }

    pub fn of_image(path: &Path) -> Self {
        let image = Image::open(path).expect("the image opens");
        let mut content = Self::empty(image.len());
        let mut buffer = vec![0; BLOCK as usize];
        for index in 0..image.len().div_ceil(BLOCK) {
            let length = BLOCK.min(image.len() - index * BLOCK) as usize;
            buffer.fill(0);
            image.read(index * BLOCK, &mut buffer[..length]);
            if buffer != ZEROES {
                content.blocks.insert(index, buffer.clone().into());
            }
        }
        content
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn bytes(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        for index in offset / BLOCK..(offset + length).div_ceil(BLOCK) {
            let Some(block) = self.blocks.get(&index) else { continue };
            let (from, to) = (offset.max(index * BLOCK), (offset + length).min((index + 1) * BLOCK));
            bytes[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&block[(from - index * BLOCK) as usize..(to - index * BLOCK) as usize]);
        }
        bytes
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Fill { offset, length, byte } => self.put(*offset, *length, |_, part| part.fill(*byte)),
            Change::Bytes { offset, data } => self.put(*offset, data.len() as u64, |at, part| {
                part.copy_from_slice(&data[at..at + part.len()]);
            }),
            Change::Resize { size } => {
                if *size < self.size {
                    self.put(*size, self.size - size, |_, part| part.fill(0));
                }
                self.size = *size;
            }
        }
    }

    /// Lets `fill` set the part of every block that lies in the range, given how far into the range it begins.
    fn put(&mut self, offset: u64, length: u64, fill: impl Fn(usize, &mut [u8])) {
        let mut at = offset;
        while at < offset + length {
            let (index, within) = (at / BLOCK, (at % BLOCK) as usize);
            let count = (BLOCK - within as u64).min(offset + length - at) as usize;
            let block = self.blocks.entry(index).or_insert_with(|| ZEROES.into());
            fill((at - offset) as usize, &mut block[within..within + count]);
            if **block == ZEROES {
                self.blocks.remove(&index);
            }
            at += count as u64;
        }
    }

    /// The first difference in every block.
    fn differences(&self, image: &Image, buffer: &mut [u8]) -> Differences {
        let blocks = self.size.max(image.len()).div_ceil(BLOCK);
        (0..blocks).filter_map(|index| Some((index, self.difference(image, index, buffer)?))).collect()
    }

    /// First difference between block `index` and the image: offset, byte expected, byte found. Past the image's end
    /// everything is zero (the sizes are compared apart).
    fn difference(&self, image: &Image, index: u64, buffer: &mut [u8]) -> Option<(u64, u8, u8)> {
        let start = index * BLOCK;
        buffer.fill(0);
        if start < image.len() {
            let length = BLOCK.min(image.len() - start) as usize;
            image.read(start, &mut buffer[..length]);
        }
        let expected: &[u8] = self.blocks.get(&index).map_or(&ZEROES, |block| block);
        if expected == buffer {
            return None;
        }
        let at = expected.iter().zip(buffer.iter()).position(|(expected, found)| expected != found)?;
        Some((start + at as u64, expected[at], buffer[at]))
    }
}

type Differences = BTreeMap<u64, (u64, u8, u8)>;

/// Where an image differs from every state that was asked for; shown for the state with the fewest differing blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstDifference {
    pub disk: String,
    /// Operations after which the disk was most like the image.
    pub prefix: usize,
    /// Size of the disk then, and of the image.
    pub size: u64,
    pub image_size: u64,
    /// Differing blocks of 64 KiB.
    pub blocks: usize,
    /// First differing byte; the sizes differ if there is none.
    pub offset: Option<u64>,
    pub expected: u8,
    pub found: u8,
}

impl fmt::Display for FirstDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, prefix, size, image_size, blocks, expected, found, .. } = self;
        write!(f, "{disk}: the image is of no state asked for; it is most like the one after {prefix} operations: ")?;
        match self.offset {
            None => write!(f, "size {size} expected, {image_size} found"),
            Some(offset) => write!(
                f,
                "{blocks} blocks of 64 KiB differ, first at offset {offset} ({offset:#x}): {expected:#04x} expected, {found:#04x} found",
            ),
        }
    }
}

/// Images that are each of a state of their disk, but of no common instant (or one is of no state at all).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    /// Per disk the numbers of operations after which it looked like its image.
    pub disks: Vec<(String, Result<BTreeSet<usize>, FirstDifference>)>,
}

impl fmt::Display for Torn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the images are of no common instant: ")?;
        for (disk, found) in &self.disks {
            match found {
                Ok(prefixes) => write!(f, "{disk} after {prefixes:?} operations; ")?,
                Err(difference) => write!(f, "{difference}; ")?,
            }
        }
        Ok(())
    }
}

/// The disks of one machine and the log of all operations on them, in the order of their completion.
#[derive(Default)]
pub struct Oracle {
    base: BTreeMap<String, Content>,
    now: BTreeMap<String, Content>,
    log: Vec<(String, Change)>,
}

impl Oracle {
    pub fn add_disk(&mut self, disk: &str, content: Content) {
        self.base.insert(disk.into(), content.clone());
        self.now.insert(disk.into(), content);
    }

    pub fn now(&self, disk: &str) -> &Content {
        self.now.get(disk).unwrap_or_else(|| panic!("no disk `{disk}`"))
    }

    pub fn record(&mut self, disk: &str, change: Change) {
        self.now.get_mut(disk).unwrap_or_else(|| panic!("no disk `{disk}`")).apply(&change);
        self.log.push((disk.into(), change));
    }

    pub fn len(&self) -> usize {
        self.log.len()
    }

    pub fn log(&self) -> &[(String, Change)] {
        &self.log
    }

    /// The disk after the first `prefix` operations.
    pub fn content_at(&self, disk: &str, prefix: usize) -> Content {
        let mut content = self.base[disk].clone();
        self.changes(disk, 0, prefix).for_each(|change| content.apply(change));
        content
    }

    fn changes<'a>(&'a self, disk: &'a str, from: usize, to: usize) -> impl Iterator<Item = &'a Change> {
        self.log[from..to].iter().filter(move |(name, _)| name == disk).map(|(_, change)| change)
    }

    /// All numbers of operations in `window` after which `disk` was byte for byte like the raw image at `path`.
    pub fn matching(
        &self,
        disk: &str,
        path: &Path,
        window: RangeInclusive<usize>,
    ) -> Result<BTreeSet<usize>, FirstDifference> {
        let image = Image::open(path).unwrap_or_else(|error| panic!("{} cannot be opened: {error}", path.display()));
        let (from, to) = (*window.start(), (*window.end()).min(self.log.len()));
        assert!(from <= to, "the window {window:?} lies outside the log of {} operations", self.log.len());
        let mut content = self.content_at(disk, from);
        let mut buffer = vec![0; BLOCK as usize];
        let mut differing = content.differences(&image, &mut buffer);
        let mut found = BTreeSet::new();
        let mut best: Option<FirstDifference> = None;
        for prefix in from..=to {
            if prefix > from {
                let (name, change) = &self.log[prefix - 1];
                if name == disk {
                    content.apply(change);
                    if matches!(change, Change::Resize { .. }) {
                        differing = content.differences(&image, &mut buffer);
                    }
                    for index in change.blocks() {
                        match content.difference(&image, index, &mut buffer) {
                            Some(difference) => differing.insert(index, difference),
                            None => differing.remove(&index),
                        };
                    }
                }
            }
            if differing.is_empty() && content.size() == image.len() {
                found.insert(prefix);
            } else if best.as_ref().is_none_or(|best| differing.len() < best.blocks) {
                let first = differing.first_key_value().map(|(_, first)| *first);
                best = Some(FirstDifference {
                    disk: disk.into(),
                    prefix,
                    size: content.size(),
                    image_size: image.len(),
                    blocks: differing.len(),
                    offset: first.map(|first| first.0),
                    expected: first.map_or(0, |first| first.1),
                    found: first.map_or(0, |first| first.2),
                });
            }
        }
        match best {
            Some(best) if found.is_empty() => Err(best),
            _ => Ok(found),
        }
    }

    /// The last number of operations in `window` after which all the disks looked like their images at once.
    pub fn matching_instant(&self, images: &[(&str, &Path)], window: RangeInclusive<usize>) -> Result<usize, Torn> {
        let disks: Vec<_> =
            images.iter().map(|(disk, path)| ((*disk).to_owned(), self.matching(disk, path, window.clone()))).collect();
        let mut common: Option<BTreeSet<usize>> = None;
        for (_, found) in &disks {
            let found = found.clone().unwrap_or_default();
            common = Some(match common {
                None => found,
                Some(common) => common.intersection(&found).copied().collect(),
            });
        }
        common.and_then(|common| common.last().copied()).ok_or(Torn { disks })
    }
}
