//! File systems that fill up, and that can be made read-only.
#![allow(dead_code, reason = "every integration test uses a part of it")]

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::statvfs,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A small tmpfs; unmounted when it goes out of scope.
pub struct SmallFs {
    path: PathBuf,
}

impl SmallFs {
    /// Mounts one of `mib` MiB at `path`, which is made. `None`, and why, where nothing can be mounted.
    pub fn or_skip(path: PathBuf, mib: u64) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let size = format!("size={mib}m,mode=700");
        match mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str())) {
            Ok(()) => Some(Self { path }),
            Err(error) => {
                println!("skipped: no tmpfs can be mounted here ({error})");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Nothing can be written any more. Files must not be open for writing.
    pub fn read_only(&self) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &self.path, None::<&str>, flags, None::<&str>).unwrap();
    }

    /// The file system at `path` can be written again.
    pub fn writable_at(path: &Path) {
        mount(None::<&str>, path, None::<&str>, MsFlags::MS_REMOUNT, None::<&str>).unwrap();
    }

    /// Leaves `spare` bytes of room.
    pub fn leave(&self, spare: u64) {
        let now = statvfs(&self.path).unwrap();
        let used = (now.blocks() - now.blocks_free()) * now.fragment_size();
        resize(&self.path, &format!("size={}", (used + spare).next_multiple_of(now.fragment_size())));
    }

    /// The file system at `path` has room for `mib` MiB.
    pub fn resize_at(path: &Path, mib: u64) {
        resize(path, &format!("size={mib}m"));
    }
}

fn resize(path: &Path, size: &str) {
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_REMOUNT, Some(size)).unwrap();
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}
