//! Exports of a real QEMU storage daemon, mounted for real.

use super::{
    archive_tests::{data_map, read_direct, show},
    export::{ExportImage, ExportOptions},
    image::Image,
};
use crate::{
    extent::{Extent, Extents},
    nbd::{Client, ConnectOptions},
    segment::Content,
};
use bytes::BytesMut;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use tempfile::TempDir;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB + 4096;
const CLUSTER: u64 = 64 * KIB;
const HOLE: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

/// A snapshot access: the disk, what a guest would overwrite, and a socket to read from.
struct Access {
    child: Child,
    room: TempDir,
}

impl Drop for Access {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Access {
    /// `None`, with the reason printed, without a storage daemon.
    fn start() -> Option<Self> {
        let room = tempfile::tempdir().expect("directory");
        let [disk, fleece, socket] = ["disk.raw", "fleece.raw", "nbd.sock"].map(|name| room.path().join(name));
        let content: Vec<u8> = (0..SIZE).map(byte).collect();
        fs::write(&disk, content).expect("write");
        File::create(&fleece).and_then(|file| file.set_len(SIZE)).expect("create");
        let node = |name: &str, path: &PathBuf| {
            format!("driver=file,node-name={name},discard=unmap,filename={}", path.display())
        };
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node("disk", &disk), "--blockdev", &node("fleece", &fleece)])
            .args(["--blockdev", "driver=copy-before-write,node-name=cbw,discard=unmap,file=disk,target=fleece"])
            .args(["--blockdev", "driver=snapshot-access,node-name=snapshot,discard=unmap,file=cbw"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=0", socket.display())])
            .args(["--export", "type=nbd,id=snapshot,node-name=snapshot,name=snapshot,writable=on"])
            .args(["--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on"])
            .stdin(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            eprintln!("skipped: qemu-storage-daemon is not installed");
            return None;
        };
        let access = Self { child, room };
        for _ in 0..1000 {
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                return Some(access);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("qemu-storage-daemon opens no socket");
    }

    async fn connect(&self) -> Client {
        let options = ConnectOptions {
            socket: self.room.path().join("nbd.sock"),
            export: "snapshot".into(),
            contexts: Vec::new(),
            deadline: Duration::from_secs(20),
            longest_read: ConnectOptions::LONGEST_READ,
        };
        Client::connect(&options).await.expect("connects")
    }

    async fn image(&self, content: Extents<Content>) -> Vec<Arc<dyn Image>> {
        let clients = vec![self.connect().await, self.connect().await];
        let options = ExportOptions { grain: CLUSTER, largest_request: None };
        vec![Arc::new(ExportImage::new("scsi0".into(), content, clients, options))]
    }

    /// Writes as the guest would, and tells the bytes that the fleecing image has then.
    fn guest_writes(&self, offset: u64, len: u64) -> u64 {
        let url = format!("nbd+unix:///guest?socket={}", self.room.path().join("nbd.sock").display());
        let write = format!("write -P 0xEE {offset} {len}");
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", &write, &url]).output().expect("qemu-io");
        assert!(output.status.success(), "{output:?}");
        self.fleeced()
    }

    fn fleeced(&self) -> u64 {
        fs::metadata(self.room.path().join("fleece.raw")).expect("attributes").blocks() * 512
    }
}

fn byte(at: u64) -> u8 {
    (at / 512 % 251) as u8 + 1
}

fn expected(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

fn extents(list: &[(u64, Content)]) -> Extents<Content> {
    let mut offset = 0;
    let list = list.iter().map(|(end, state)| {
        let extent = Extent { offset, len: end - offset, state: *state };
        offset = *end;
        extent
    });
    Extents::from_ordered(SIZE, list.collect::<Vec<_>>()).expect("covers the disk")
}

fn all_data() -> Extents<Content> {
    Extents::uniform(SIZE, Content::Data)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_reads_as_the_disk_was_and_ends_where_it_ends() {
    let Some(access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(30)) else { return };
    access.guest_writes(MIB + 512, 3 * MIB);
    assert!(fs::read(shown.path("scsi0")).expect("read") == expected(0, SIZE));
    assert_eq!(read_direct(&shown.path("scsi0"), SIZE - 4096, 65536).expect("read"), expected(SIZE - 4096, 4096));
    assert_eq!(shown.log.warnings(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changed_can_be_read() {
    let Some(access) = Access::start() else { return };
    let map = extents(&[
        (MIB, Content::Clean),
        (2 * MIB, Content::Data),
        (3 * MIB, Content::Zero),
        (4 * MIB, Content::Data),
        (SIZE, Content::Clean),
    ]);
    let Some(shown) = show(access.image(map).await, Duration::from_secs(30)) else { return };
    let file = File::open(shown.path("scsi0")).expect("open");
    assert_eq!(data_map(&file), [(MIB as i64, 2 * MIB as i64), (3 * MIB as i64, 4 * MIB as i64)]);
    let mut buffer = vec![1; MIB as usize];
    file.read_exact_at(&mut buffer, MIB).expect("dirty");
    assert!(buffer == expected(MIB, MIB));
    file.read_exact_at(&mut buffer, 2 * MIB).expect("zero");
    assert!(buffer.iter().all(|b| *b == 0));
    // What begins in a dirty range is read up to its end, whatever lies behind.
    assert_eq!(file.read_at(&mut buffer, 4 * MIB - 8192).expect("the rest"), 8192);
    assert!(buffer[..8192] == expected(4 * MIB - 8192, 8192));
    assert_eq!(shown.log.warnings(), [""; 0]);
    for offset in [0, MIB - 4096, 4 * MIB, SIZE - 4096] {
        let error = file.read_at(&mut buffer[..4096], offset).expect_err("clean");
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
        let log = shown.log.warnings();
        let last = log.last().expect("told");
        assert!(last.contains(&format!("byte {offset} is outside of what changed")), "{last}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_punched_hole_gives_whole_clusters_away() {
    let Some(access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(30)) else { return };
    let before = access.guest_writes(0, 4 * MIB);
    assert!(before >= 4 * MIB, "{before}");
    let mut file = OpenOptions::new().read(true).write(true).open(shown.path("scsi0")).expect("open for punching");

    fallocate(&file, HOLE, CLUSTER as i64 / 2, 2 * CLUSTER as i64).expect("cuts inwards");
    assert_eq!(data_map(&file), [(0, CLUSTER as i64), (2 * CLUSTER as i64, SIZE as i64)]);
    // Less than a cluster is remembered until the rest of it follows.
    fallocate(&file, HOLE, 2 * CLUSTER as i64 + CLUSTER as i64 / 2, CLUSTER as i64 / 2).expect("nothing to do");
    assert_eq!(data_map(&file), [(0, CLUSTER as i64), (3 * CLUSTER as i64, SIZE as i64)]);
    fallocate(&file, HOLE, MIB as i64, 3 * MIB as i64).expect("punches");
    assert!(access.fleeced() <= before - 3 * MIB, "{} of {before}", access.fleeced());
    fallocate(&file, HOLE, 8 * MIB as i64, 4 * MIB as i64).expect("the last, short cluster; cut at the end");
    fallocate(&file, HOLE, SIZE as i64 + 4096, 4096).expect("nothing there");
    fallocate(&file, HOLE, MIB as i64, MIB as i64).expect("once more");
    assert_eq!(
        data_map(&file),
        [(0, CLUSTER as i64), (3 * CLUSTER as i64, MIB as i64), (4 * MIB as i64, 8 * MIB as i64)]
    );

    // Gone here, and in QEMU.
    let mut buffer = vec![0; 4096];
    assert!(file.read_at(&mut buffer, MIB).is_err());
    assert!(shown.log.warnings().iter().any(|line| line.contains("was discarded")), "{:?}", shown.log.warnings());
    let client = access.connect().await;
    let error = client.read(MIB, BytesMut::zeroed(4096)).await.map(drop).expect_err("discarded");
    assert!(error.is_unreadable(), "{error}");
    // QEMU 10 keeps a short last cluster, but nobody may count on that.
    assert!(file.read_at(&mut buffer, 8 * MIB).is_err());
    // The rest is as it was.
    assert!(read_direct(&shown.path("scsi0"), 0, CLUSTER as usize).expect("read") == expected(0, CLUSTER));
    assert!(read_direct(&shown.path("scsi0"), 4 * MIB, 4 * MIB as usize).expect("read") == expected(4 * MIB, 4 * MIB));

    let modes = [
        FallocateFlags::empty(),
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
        FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
    ];
    for mode in modes {
        assert_eq!(fallocate(&file, mode, 0, CLUSTER as i64), Err(Errno::EOPNOTSUPP), "{mode:?}");
    }
    assert_eq!(file.write(&[1]).expect_err("refused").raw_os_error(), Some(Errno::EROFS as i32));
    assert_eq!(file.set_len(0).expect_err("refused").raw_os_error(), Some(Errno::EROFS as i32));
    assert_eq!(file.read_at(&mut buffer, 0).expect("still there"), 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_get_errors_when_qemu_is_gone() {
    let Some(mut access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(5)) else { return };
    let path = shown.path("scsi0");
    assert!(read_direct(&path, 0, 4096).is_ok());
    access.child.kill().expect("kill");
    access.child.wait().expect("gone");
    assert_eq!(read_direct(&path, 0, 4096).expect_err("gone").raw_os_error(), Some(Errno::EIO as i32));
    assert!(shown.log.warnings()[0].contains("closed"), "{:?}", shown.log.warnings());
}
