//! What the kernel asks of the segment view.

use super::{DISKS, MANIFEST, Node, SegmentView, State, TTL, segment_name, shard_name};
use crate::fuse::LARGEST_REQUEST;
use fuser::{
    Errno, FileHandle, Filesystem, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};
use std::{ffi::OsStr, io, time::Duration};

impl Filesystem for SegmentView {
    fn init(&mut self, _request: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        let _ = kernel.set_max_write(LARGEST_REQUEST);
        // Attributes come with the names: a reader that looks at every file, as borg does, asks nothing more of us.
        let _ = kernel.add_capabilities(InitFlags::FUSE_DO_READDIRPLUS);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.lock();
        let found = name
            .to_str()
            .ok_or(Errno::ENOENT)
            .and_then(|name| self.find(&mut state, Node::of(parent), name))
            .and_then(|node| self.attributes(&state, node));
        match found {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(&self.lock(), Node::of(inode)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // The kernel opens files by itself from now on. borg opens every file before it knows that it need not read it, and asking
        // us would be the largest part of what that costs.
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if self.failure().is_some() {
            return reply.error(Errno::EIO);
        }
        let content = self.content(&mut self.lock(), Node::of(inode), offset, u64::from(size));
        match content {
            Ok((bytes, finished)) => {
                reply.data(&bytes);
                if finished {
                    // While the reader works on it.
                    self.lock().settle();
                }
            }
            Err(failure) => reply.error(self.fail(failure)),
        }
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = list(&self.lock(), Node::of(inode), offset, |next, node, name| {
            reply.add(INodeNo(node.inode()), next, node.kind(), name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let state = self.lock();
        let listed = list(&state, Node::of(inode), offset, |next, node, name| {
            // The manifest is made when somebody looks it up, which must not be spared.
            let ttl = if node == Node::Manifest { Duration::ZERO } else { TTL };
            self.attributes(&state, node)
                .is_ok_and(|attributes| reply.add(attributes.ino, next, name, &ttl, &attributes, Generation(0)))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }
}

/// Calls `add` with the entries of a directory behind `offset`, each with the offset of the next, until it says that it has no room.
fn list(state: &State, node: Node, offset: u64, mut add: impl FnMut(u64, Node, &str) -> bool) -> Result<(), Errno> {
    // The first two are the directory itself and its parent.
    for at in offset..2 {
        if add(at + 1, node, if at == 0 { "." } else { ".." }) {
            return Ok(());
        }
    }
    let from = offset.max(2) - 2;
    let disk = |at: usize| state.disks.get(at).ok_or(Errno::ENOENT);
    let entries: Box<dyn Iterator<Item = (Node, String)>> = match node {
        Node::Root => {
            let members = state.members.iter().enumerate().map(|(at, member)| (Node::Member(at), member.0.clone()));
            Box::new(members.chain([(Node::Disks, DISKS.to_owned()), (Node::Manifest, MANIFEST.to_owned())]))
        }
        Node::Disks => Box::new(state.disks.iter().enumerate().flat_map(|(at, disk)| {
            let name = &disk.plan.name;
            [(Node::Disk(at), name.clone()), (Node::Table(at), format!("{name}.segments"))]
        })),
        Node::Shard(at, shard) => {
            let records = disk(at)?.shard(shard).iter();
            Box::new(records.map(move |record| (Node::Segment(at, record.index), segment_name(record.index))))
        }
        // Of the possibly many of a disk those before the offset are not looked at.
        Node::Disk(at) => {
            let (disk, mut from) = (disk(at)?, from);
            while let Some(shard) = disk.next_shard(from) {
                from = shard + 1;
                if add(from + 2, Node::Shard(at, shard), &shard_name(shard)) {
                    break;
                }
            }
            return Ok(());
        }
        Node::Member(_) | Node::Segment(..) | Node::Table(_) | Node::Manifest => return Err(Errno::ENOTDIR),
    };
    for (next, (node, name)) in (3..).zip(entries).skip(from as usize) {
        if add(next, node, &name) {
            break;
        }
    }
    Ok(())
}
