//! What the kernel asks of the segment view.

use super::{DISKS, MANIFEST, Node, SegmentView, TTL, segment_name, shard_name};
use fuser::{
    Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, Request,
};
use std::{ffi::OsStr, io};

impl Filesystem for SegmentView {
    fn init(&mut self, _request: &Request, kernel: &mut KernelConfig) -> io::Result<()> {
        // No FUSE_ASYNC_DIO: pieces of a segment are wanted one after the other.
        let _ = kernel.set_max_write(1 << 20);
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

    fn open(&self, _request: &Request, _inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != fuser::OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        // Past the page cache: it would read ahead, and keep what is read once. Closing asks nothing of us.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
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
                // The reader has all of it and has no way to ask again: a second read of this file fails the backup.
                if let Some(data) = finished {
                    data.stored();
                }
            }
            Err(failure) => reply.error(self.fail(failure)),
        }
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.lock();
        let node = Node::of(inode);
        // An entry's offset is where the next one begins. The first two are the directory itself and its parent.
        let mut add = |next: u64, node: Node, name: &str| {
            let kind = match node {
                Node::Root | Node::Disks | Node::Disk(_) | Node::Shard(..) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            reply.add(INodeNo(node.inode()), next, kind, name)
        };
        let mut at = offset;
        while at < 2 {
            if add(at + 1, node, if at == 0 { "." } else { ".." }) {
                return reply.ok();
            }
            at += 1;
        }
        let mut from = at - 2;
        match node {
            Node::Root => {
                let mut list: Vec<(Node, &str)> =
                    state.members.iter().enumerate().map(|(at, m)| (Node::Member(at), m.0.as_str())).collect();
                list.extend([(Node::Disks, DISKS), (Node::Manifest, MANIFEST)]);
                for (node, name) in list.into_iter().skip(from as usize) {
                    from += 1;
                    if add(from + 2, node, name) {
                        break;
                    }
                }
            }
            Node::Disks => {
                let list = state.disks.iter().enumerate().flat_map(|(at, disk)| {
                    let name = &disk.plan.name;
                    [(Node::Disk(at), name.clone()), (Node::Table(at), format!("{name}.segments"))]
                });
                for (node, name) in list.skip(from as usize) {
                    from += 1;
                    if add(from + 2, node, &name) {
                        break;
                    }
                }
            }
            Node::Disk(disk) => {
                let Some(it) = state.disks.get(disk) else { return reply.error(Errno::ENOENT) };
                while let Some(shard) = it.next_shard(from) {
                    from = shard + 1;
                    if add(from + 2, Node::Shard(disk, shard), &shard_name(shard)) {
                        break;
                    }
                }
            }
            Node::Shard(disk, shard) => {
                let Some(it) = state.disks.get(disk) else { return reply.error(Errno::ENOENT) };
                for record in it.shard(shard).iter().skip(from as usize) {
                    from += 1;
                    if add(from + 2, Node::Segment(disk, record.index), &segment_name(record.index)) {
                        break;
                    }
                }
            }
            _ => return reply.error(Errno::ENOTDIR),
        }
        reply.ok();
    }
}
