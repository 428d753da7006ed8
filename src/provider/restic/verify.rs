//! Is what the repository has what the segment tables say?
//!
//! Used twice: before a backup, to confirm a base archive, and after it, before the new snapshot becomes visible. The
//! check reads every directory again, compares names, sizes, times and the number of segments, and looks up every blob in
//! the index and its pack in the repository's list of files. It does not read the segments themselves.

use super::layout::{self, Shape};
use crate::segment::{SegmentRecord, SegmentTable};
use rustic_core::{
    DataId, FileType, IndexedFullStatus, Repository, RusticError, TreeId, WriteBackend,
    repofile::{Node, PackId, Tree},
};
use std::collections::HashMap;

/// Why a disk is not complete.
#[derive(Debug, thiserror::Error)]
pub(super) enum Gap {
    /// It is not; in words.
    #[error("{0}")]
    Missing(String),
    /// The repository could not be read.
    #[error("the repository cannot be read")]
    Rustic(#[source] Box<RusticError>),
}

impl From<Box<RusticError>> for Gap {
    fn from(error: Box<RusticError>) -> Self {
        Self::Rustic(error)
    }
}

fn missing<T>(text: impl Into<String>) -> Result<T, Gap> {
    Err(Gap::Missing(text.into()))
}

/// A blob that stands for the pack it is in: index files list packs as a whole.
#[derive(Clone, Copy)]
enum Probe {
    Data(DataId),
    Tree(TreeId),
}

/// What was found of one disk.
pub(super) struct DiskFound {
    /// The directories of segments.
    shards: HashMap<u64, TreeId>,
    /// The packs that all of it is in.
    packs: HashMap<PackId, Probe>,
}

/// A disk of a base archive, as it was confirmed.
pub(super) struct Base<'a> {
    pub(super) table: &'a SegmentTable,
    pub(super) found: &'a DiskFound,
}

/// The repository's contents as its files tell now.
pub(super) struct Inventory<'a> {
    repository: &'a Repository<IndexedFullStatus>,
    packs: HashMap<PackId, u32>,
}

impl<'a> Inventory<'a> {
    /// Lists the packs. The index is that of `repository`, which was to be read just before.
    pub(super) fn new(repository: &'a Repository<IndexedFullStatus>, backend: &dyn WriteBackend) -> Result<Self, Gap> {
        let packs = backend.list_with_size(FileType::Pack)?.into_iter().map(|(id, size)| (PackId::from(id), size));
        Ok(Self { repository, packs: packs.collect() })
    }

    /// Reads a directory.
    pub(super) fn tree(&self, id: TreeId) -> Result<Tree, Gap> {
        self.pack(Probe::Tree(id))?;
        Ok(self.repository.get_tree(&id)?)
    }

    /// The pack of a blob, if that exists and is long enough to hold it; and the blob's own length.
    fn pack(&self, blob: Probe) -> Result<(PackId, u64), Gap> {
        let (entry, id) = match blob {
            Probe::Data(id) => (self.repository.get_index_entry(&id), id.to_string()),
            Probe::Tree(id) => (self.repository.get_index_entry(&id), id.to_string()),
        };
        let Ok(entry) = entry else {
            return missing(format!("blob {id} is not in the repository's index"));
        };
        let end = u64::from(entry.location.offset) + u64::from(entry.location.length);
        match self.packs.get(&entry.pack) {
            None => missing(format!(
                "pack {} with blob {id} does not exist; `restic repair index` (before 0.16: `rebuild-index`) makes the next backup store it again",
                *entry.pack
            )),
            Some(size) if u64::from(*size) < end => missing(format!("pack {} is truncated", *entry.pack)),
            Some(_) => Ok((entry.pack, u64::from(entry.data_length()))),
        }
    }

    /// A file's content is in the repository and has the size that its node says.
    pub(super) fn file(&self, node: &Node, found: &mut DiskFound) -> Result<(), Gap> {
        let mut size = 0;
        for id in node.content.iter().flatten() {
            let (pack, len) = self.pack(Probe::Data(*id))?;
            found.packs.entry(pack).or_insert(Probe::Data(*id));
            size += len;
        }
        if !node.is_file() || size != node.meta.size {
            return missing(format!("file `{}` has {size} of {} bytes", node.name, node.meta.size));
        }
        Ok(())
    }

    /// Whether all packs that a disk was found in are still as they were.
    fn still_there(&self, found: &DiskFound) -> bool {
        found.packs.iter().all(|(pack, probe)| self.pack(*probe).is_ok_and(|(now, _)| now == *pack))
    }

    /// Compares a disk's directory with its table.
    ///
    /// With a base, directories that are the base's own are not read again, and every other unchanged segment must have
    /// the base's content.
    pub(super) fn disk(
        &self,
        directory: TreeId,
        table: &SegmentTable,
        shape: Shape,
        base: Option<Base<'_>>,
    ) -> Result<DiskFound, Gap> {
        let trusted = base.as_ref().is_some_and(|base| self.still_there(base.found));
        let old: HashMap<u64, &[SegmentRecord]> =
            base.as_ref().map(|base| layout::by_shard(base.table.records()).collect()).unwrap_or_default();
        let mut found = DiskFound::empty();
        self.note_tree(directory, &mut found)?;
        let mut nodes = self.tree(directory)?.nodes.into_iter();
        for (shard, records) in layout::by_shard(table.records()) {
            let name = layout::shard_name(shard);
            let Some(node) = nodes.next().filter(|node| node.name == name && node.is_dir()) else {
                return missing(format!("directory `{name}` is not where it should be"));
            };
            let Some(tree) = node.subtree else {
                return missing(format!("directory `{name}` is empty"));
            };
            let before = base.as_ref().and_then(|base| base.found.shards.get(&shard)).copied();
            let same = before == Some(tree) && old.get(&shard).is_some_and(|old| *old == records);
            if !(trusted && same) {
                let nodes = self.shard(tree, records, shape, &mut found)?;
                if let (Some(before), Some(old)) = (before.filter(|b| *b != tree), old.get(&shard)) {
                    self.same_content(&nodes, records, before, old)?;
                }
            }
            found.shards.insert(shard, tree);
        }
        if let Some(node) = nodes.next() {
            return missing(format!("`{}` should not be there", node.name));
        }
        if trusted && let Some(base) = base {
            found.packs.extend(base.found.packs.iter().map(|(pack, probe)| (*pack, *probe)));
        }
        Ok(found)
    }

    fn note_tree(&self, id: TreeId, found: &mut DiskFound) -> Result<(), Gap> {
        let (pack, _) = self.pack(Probe::Tree(id))?;
        found.packs.entry(pack).or_insert(Probe::Tree(id));
        Ok(())
    }

    fn shard(
        &self,
        id: TreeId,
        records: &[SegmentRecord],
        shape: Shape,
        found: &mut DiskFound,
    ) -> Result<Vec<Node>, Gap> {
        self.note_tree(id, found)?;
        let nodes = self.tree(id)?.nodes;
        if nodes.len() != records.len() {
            return missing(format!("a directory has {} segments instead of {}", nodes.len(), records.len()));
        }
        for (node, record) in nodes.iter().zip(records) {
            let name = layout::segment_name(record.index);
            if node.name != name {
                return missing(format!("segment {} is missing", record.index));
            }
            if Some(node.meta.size) != shape.len(record.index) || node.meta.mtime != layout::time(record.stored_at) {
                return missing(format!("segment {} has another size or time than its table says", record.index));
            }
            self.file(node, found)?;
        }
        Ok(nodes)
    }

    /// Several parents may have a file of the same name, size and time. That its content is the base's is checked here.
    fn same_content(
        &self,
        nodes: &[Node],
        records: &[SegmentRecord],
        before: TreeId,
        old: &[SegmentRecord],
    ) -> Result<(), Gap> {
        let before: HashMap<String, Node> = self.tree(before)?.nodes.into_iter().map(|n| (n.name.clone(), n)).collect();
        for (node, record) in nodes.iter().zip(records) {
            let unchanged = old.binary_search_by_key(&record.index, |r| r.index).is_ok_and(|at| old[at] == *record);
            if unchanged && before.get(&node.name).is_none_or(|old| old.content != node.content) {
                return missing(format!(
                    "unchanged segment {} has another content than in its base archive",
                    record.index
                ));
            }
        }
        Ok(())
    }
}

impl DiskFound {
    pub(super) fn empty() -> Self {
        Self { shards: HashMap::new(), packs: HashMap::new() }
    }
}

/// The node of a name in a directory.
pub(super) fn child<'t>(tree: &'t Tree, name: &str) -> Option<&'t Node> {
    tree.nodes.iter().find(|node| node.name == name)
}

/// The directory of a name in a directory.
pub(super) fn subtree(tree: &Tree, name: &str) -> Option<TreeId> {
    child(tree, name).filter(|node| node.is_dir())?.subtree
}
