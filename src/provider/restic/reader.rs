//! Reading an archive.

use super::{
    backend::Farewell,
    error::{Secrets, wrap},
    layout, verify,
};
use crate::provider::{ArchiveReader, ErrorKind, ProviderError};
use bytes::{Bytes, BytesMut};
use rustic_core::{
    BlobId, IndexedFullStatus, Repository, RusticError, TreeId,
    repofile::{BlobType, Node, Tree},
};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

/// Directories of segments that are kept in memory: 16 Ki segments, some 8 MiB.
const KEPT_DIRECTORIES: usize = 64;

type Key = (String, u64);
/// The directories that one disk has.
type Directories = Arc<HashMap<u64, TreeId>>;

/// The directories read last.
#[derive(Default)]
struct Kept {
    trees: HashMap<Key, Arc<Tree>>,
    order: VecDeque<Key>,
}

/// One snapshot, with the index of its repository: some 50 bytes for every blob that the repository has.
pub(super) struct Reader {
    repository: Repository<IndexedFullStatus>,
    secrets: Secrets,
    root: Tree,
    disks: Option<Tree>,
    directories: Mutex<HashMap<String, Directories>>,
    kept: Mutex<Kept>,
    _farewell: Option<Arc<Farewell>>,
}

impl Reader {
    pub(super) fn new(
        repository: Repository<IndexedFullStatus>,
        secrets: Secrets,
        root: TreeId,
        farewell: Option<Arc<Farewell>>,
    ) -> Result<Self, ProviderError> {
        let damaged =
            |e: Box<RusticError>| wrap(&secrets, ErrorKind::Damaged, "the archive's directory cannot be read", &e);
        let root = repository.get_tree(&root).map_err(damaged)?;
        let disks = match verify::subtree(&root, layout::DISKS) {
            Some(id) => Some(repository.get_tree(&id).map_err(damaged)?),
            None => None,
        };
        Ok(Self {
            repository,
            secrets,
            root,
            disks,
            directories: Mutex::default(),
            kept: Mutex::default(),
            _farewell: farewell,
        })
    }

    fn disks(&self) -> Result<&Tree, ProviderError> {
        self.disks.as_ref().ok_or_else(|| ProviderError::new(ErrorKind::NotFound, "the archive has no disks"))
    }

    /// The content of a file; its size is checked against the index before anything is read.
    fn content(&self, node: &Node, what: &str, limit: u64) -> Result<Bytes, ProviderError> {
        let damaged = |text: String| ProviderError::new(ErrorKind::Damaged, format!("{what} {text}"));
        if !node.is_file() {
            return Err(damaged("is no file".into()));
        }
        if node.meta.size > limit {
            return Err(damaged(format!("has {} bytes, at most {limit} are expected", node.meta.size)));
        }
        let content = node.content.as_deref().unwrap_or_default();
        let mut size = 0u64;
        for id in content {
            let entry = self
                .repository
                .get_index_entry(id)
                .map_err(|_| damaged(format!("needs blob {id}, which is not in the repository's index")))?;
            size += u64::from(entry.data_length());
        }
        if size != node.meta.size {
            return Err(damaged(format!("has {size} bytes in the repository instead of {}", node.meta.size)));
        }
        let read = |id: &rustic_core::DataId| {
            self.repository
                .get_blob_cached(&BlobId::from(*id), BlobType::Data)
                .map_err(|e| wrap(&self.secrets, ErrorKind::Damaged, format!("{what} cannot be read"), &e))
        };
        let bytes = match content {
            [] => Bytes::new(),
            [id] => read(id)?,
            ids => {
                let mut joined = BytesMut::with_capacity(size as usize);
                for id in ids {
                    joined.extend_from_slice(&read(id)?);
                }
                joined.freeze()
            }
        };
        if bytes.len() as u64 != size {
            return Err(damaged(format!("gave {} bytes instead of {size}", bytes.len())));
        }
        Ok(bytes)
    }

    fn tree(&self, disk: &str, id: TreeId) -> Result<Tree, ProviderError> {
        self.repository.get_tree(&id).map_err(|e| {
            wrap(&self.secrets, ErrorKind::Damaged, format!("a directory of disk `{disk}` cannot be read"), &e)
        })
    }

    fn directories(&self, disk: &str) -> Result<Directories, ProviderError> {
        let mut known = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directories) = known.get(disk) {
            return Ok(Arc::clone(directories));
        }
        let id = verify::subtree(self.disks()?, disk)
            .ok_or_else(|| ProviderError::new(ErrorKind::NotFound, format!("the archive has no disk `{disk}`")))?;
        let nodes = self.tree(disk, id)?.nodes.into_iter();
        let directories: Directories = Arc::new(
            nodes.filter_map(|node| Some((u64::from_str_radix(&node.name, 16).ok()?, node.subtree?))).collect(),
        );
        known.insert(disk.to_owned(), Arc::clone(&directories));
        Ok(directories)
    }

    fn shard(&self, disk: &str, shard: u64) -> Result<Arc<Tree>, ProviderError> {
        let key = (disk.to_owned(), shard);
        if let Some(tree) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).trees.get(&key) {
            return Ok(Arc::clone(tree));
        }
        let id = self.directories(disk)?.get(&shard).copied().ok_or_else(|| {
            let name = layout::shard_name(shard);
            ProviderError::new(ErrorKind::NotFound, format!("disk `{disk}` has no directory `{name}` in the archive"))
        })?;
        let tree = Arc::new(self.tree(disk, id)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.trees.insert(key.clone(), Arc::clone(&tree)).is_none() {
            kept.order.push_back(key);
        }
        if kept.order.len() > KEPT_DIRECTORIES
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.trees.remove(&oldest);
        }
        Ok(tree)
    }
}

fn no_member(name: &str) -> ProviderError {
    ProviderError::new(ErrorKind::NotFound, format!("the archive has no `{name}`"))
}

impl ArchiveReader for Reader {
    fn member(&self, name: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        let node = verify::child(&self.root, name).filter(|_| name != layout::DISKS).ok_or_else(|| no_member(name))?;
        self.content(node, &format!("member `{name}`"), limit).map(Vec::from)
    }

    fn table(&self, disk: &str, limit: u64) -> Result<Vec<u8>, ProviderError> {
        let name = layout::table_name(disk);
        let node = verify::child(self.disks()?, &name).ok_or_else(|| no_member(&name))?;
        self.content(node, &format!("the segment table of disk `{disk}`"), limit).map(Vec::from)
    }

    fn segment(&self, disk: &str, index: u64, len: u64) -> Result<Bytes, ProviderError> {
        let what = format!("segment {index} of disk `{disk}`");
        let shard = self.shard(disk, layout::shard(index))?;
        let name = layout::segment_name(index);
        let node = match shard.nodes.binary_search_by(|node| node.name.as_str().cmp(&name)) {
            Ok(at) => &shard.nodes[at],
            Err(_) => return Err(ProviderError::new(ErrorKind::NotFound, format!("{what} is not in the archive"))),
        };
        let bytes = self.content(node, &what, len)?;
        if bytes.len() as u64 != len {
            return Err(ProviderError::new(
                ErrorKind::Damaged,
                format!("{what} has {} bytes instead of {len}", bytes.len()),
            ));
        }
        Ok(bytes)
    }
}
