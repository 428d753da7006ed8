//! A tree as the program stores it, and what can be done to it.

use nix::sys::stat::Mode;
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::LazyLock,
};
use tempfile::TempDir;

/// Segment length in bytes.
pub const LEN: u64 = 64 << 10;
/// Path of the second segment.
pub const SECOND: &str = "disks/scsi0/000000/0000000001";

/// The disk's content by segment.
pub static DISK: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| [1u8, 2, 3].map(|n| vec![0x10 + n; LEN as usize]));

/// A tree in a directory of its own.
pub struct Tree {
    dir: TempDir,
    secret: PathBuf,
}

impl Tree {
    pub fn new(secret: &Path) -> Self {
        let mut tree = Self { dir: TempDir::new().unwrap(), secret: secret.to_owned() };
        let mut table = b"pvbseg1\n".to_vec();
        for (index, segment) in DISK.iter().enumerate() {
            tree.write(&format!("disks/scsi0/000000/{index:010x}"), segment);
            table.extend((index as u64).to_le_bytes());
            table.extend(1_769_824_928_000_000i64.to_le_bytes());
            table.extend(blake3::hash(segment).as_bytes());
        }
        let digest = tree.put_table(&table);
        tree.write("guest.conf", b"name: web01\n");
        let manifest = serde_json::json!({
            "version": 1, "program": "0.1.0", "archive": "pve-qemu-100-2026-01-31T02:00:00Z", "guest_kind": "plain",
            "instant": "2026-01-31T02:02:08Z", "consistency": {"frozen": false},
            "disks": [{
                "name": "scsi0", "device": "drive-scsi0", "size": 3 * LEN, "segment_len": LEN, "data_bytes": 3 * LEN,
                "digest": digest, "bitmap_action": "new", "reason": "first backup",
            }],
        });
        tree.write("manifest.json", manifest.to_string().as_bytes());
        tree
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn write(&mut self, path: &str, bytes: &[u8]) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), bytes).unwrap();
    }

    pub fn remove(&mut self, path: &str) {
        fs::remove_file(self.at(path)).unwrap();
    }

    pub fn manifest(&mut self, change: impl FnOnce(&mut Value)) {
        let mut manifest = serde_json::from_slice(&fs::read(self.at("manifest.json")).unwrap()).unwrap();
        change(&mut manifest);
        self.write("manifest.json", manifest.to_string().as_bytes());
    }

    /// Writes the table and returns its digest.
    fn put_table(&mut self, bytes: &[u8]) -> String {
        self.write("disks/scsi0.segments", bytes);
        let mut hasher = blake3::Hasher::new();
        for record in bytes.get(8..).unwrap_or_default().chunks_exact(48) {
            hasher.update(&record[..8]).update(&record[16..]);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Changes the table, and lets the manifest vouch for it.
    pub fn table(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.at("disks/scsi0.segments")).unwrap();
        change(&mut bytes);
        let digest = self.put_table(&bytes);
        self.manifest(|manifest| manifest["disks"][0]["digest"] = digest.into());
    }

    /// A link to what must not be read.
    pub fn link(&mut self, path: &str) {
        self.remove(path);
        symlink(&self.secret, self.at(path)).unwrap();
    }

    pub fn link_directory(&mut self, path: &str) {
        fs::remove_dir_all(self.at(path)).unwrap();
        symlink(self.secret.parent().unwrap(), self.at(path)).unwrap();
    }

    pub fn directory(&mut self, path: &str) {
        self.remove(path);
        fs::create_dir(self.at(path)).unwrap();
    }

    pub fn pipe(&mut self, path: &str) {
        self.remove(path);
        nix::unistd::mkfifo(&self.at(path), Mode::S_IRUSR).unwrap();
    }
}
