//! Exports of a real QEMU storage daemon, mounted for real.

use super::{
    Wanted,
    archive_tests::{data_map, read_direct, show},
    export::{ExportImage, ExportOptions, LONGEST_READ},
    image::Image,
};
use crate::{
    extent::{Extent, Extents},
    nbd::{Client, ConnectOptions, Lane},
    segment::Content,
};
use bytes::BytesMut;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::signal::{Signal, kill},
    unistd::Pid,
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

    fn signal(&self, signal: Signal) {
        let pid = self.child.id() as i32;
        kill(Pid::from_raw(pid), signal).expect("it lives");
        // Its threads do not stop at once.
        let stopped = |task: procfs::process::Task| task.stat().is_ok_and(|stat| stat.state == 'T');
        let threads = || procfs::process::Process::new(pid).and_then(|process| process.tasks()).expect("it lives");
        while signal == Signal::SIGSTOP && !threads().flatten().all(stopped) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    async fn connect(&self) -> Client {
        self.connect_within(Duration::from_secs(20)).await
    }

    async fn connect_within(&self, deadline: Duration) -> Client {
        Client::connect(&self.options(deadline)).await.expect("connects")
    }

    fn options(&self, deadline: Duration) -> ConnectOptions {
        ConnectOptions {
            socket: self.room.path().join("nbd.sock"),
            export: "snapshot".into(),
            contexts: Vec::new(),
            deadline,
            longest_read: ConnectOptions::LONGEST_READ,
        }
    }

    async fn image(&self, content: Extents<Content>) -> Vec<Arc<dyn Image>> {
        self.image_with_lanes_of(self, content).await
    }

    async fn image_with_lanes_of(&self, other: &Self, content: Extents<Content>) -> Vec<Arc<dyn Image>> {
        self.image_of(other, content, None).await
    }

    async fn image_of(
        &self,
        other: &Self,
        content: Extents<Content>,
        largest_request: Option<u32>,
    ) -> Vec<Arc<dyn Image>> {
        let clients = vec![self.connect().await, self.connect().await];
        let options = ExportOptions { grain: CLUSTER, largest_request };
        let image = ExportImage::new("scsi0".into(), content, clients, options);
        let lanes = vec![other.lane().await, other.lane().await];
        vec![Arc::new(image.with_lanes(lanes))]
    }

    async fn lane(&self) -> Lane<Wanted> {
        let options = ConnectOptions { longest_read: LONGEST_READ, ..self.options(Duration::from_secs(20)) };
        Lane::connect(&options).await.expect("connects")
    }

    async fn image_within(&self, deadline: Duration) -> Vec<Arc<dyn Image>> {
        let clients = vec![self.connect_within(deadline).await];
        let options = ExportOptions { grain: CLUSTER, largest_request: None };
        let image = ExportImage::new("scsi0".into(), all_data(), clients, options);
        vec![Arc::new(image.with_lanes(vec![self.lane().await]))]
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
async fn who_reads_in_order_is_read_ahead_of_and_never_beyond_what_can_be_read() {
    let Some(access) = Access::start() else { return };
    let map = extents(&[(MIB, Content::Clean), (5 * MIB + 4096, Content::Data), (SIZE, Content::Clean)]);
    let Some(shown) = show(access.image(map).await, Duration::from_secs(30)) else { return };
    let file = File::open(shown.path("scsi0")).expect("open");
    // Lengths that fit what is fetched ahead, that lie across its borders, and as long as the kernel's longest.
    for step in [64 * KIB, 96 * KIB, 300 * KIB, MIB] {
        let (mut at, mut buffer) = (MIB, vec![0; step as usize]);
        loop {
            let read = file.read_at(&mut buffer, at).expect("all of it can be read") as u64;
            assert_eq!(read, step.min(5 * MIB + 4096 - at), "short only where it ends");
            assert!(buffer[..read as usize] == expected(at, read), "{read} bytes at {at}");
            at += read;
            if at == 5 * MIB + 4096 {
                break;
            }
        }
        assert_eq!(shown.log.warnings(), [""; 0], "nothing failed, neither seen nor unseen");
    }
    let error = file.read_at(&mut [0; 4096], 5 * MIB + 4096).expect_err("clean");
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    assert_eq!(shown.log.warnings().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_in_order_or_elsewhere_gets_what_was_there() {
    let Some(access) = Access::start() else { return };
    let map = [
        (MIB, Content::Data),
        (MIB + 4096, Content::Zero),
        (3 * MIB - 512, Content::Data),
        (4 * MIB, Content::Zero),
        (SIZE, Content::Data),
    ];
    let mut content = expected(0, SIZE);
    content[MIB as usize..][..4096].fill(0);
    content[3 * MIB as usize - 512..4 * MIB as usize].fill(0);
    for largest_request in [None, Some(CLUSTER as u32)] {
        let images = access.image_of(&access, extents(&map), largest_request).await;
        let Some(shown) = show(images, Duration::from_secs(30)) else { return };
        std::thread::scope(|scope| {
            for mut dice in 1..5u64 {
                let (path, content) = (shown.path("scsi0"), &content);
                scope.spawn(move || {
                    let (file, mut at) = (File::open(path).expect("open"), 0);
                    for _ in 0..300 {
                        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        // Seldom elsewhere, and now and then back to what was read before.
                        at = match dice >> 60 {
                            0 => dice % SIZE,
                            1 => at / 2,
                            _ if at == SIZE => 0,
                            _ => at,
                        };
                        let lens = [512, 64 * KIB, 128 * KIB, 300_001, MIB];
                        let mut buffer = vec![1; lens[(dice >> 40) as usize % lens.len()] as usize];
                        let read = file.read_at(&mut buffer, at).expect("read") as u64;
                        assert_eq!(read, (buffer.len() as u64).min(SIZE - at));
                        assert!(buffer[..read as usize] == content[at as usize..][..read as usize], "{read} at {at}");
                        at += read;
                    }
                });
            }
        });
        assert_eq!(shown.log.warnings(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_pages_are_not_kept_can_be_mapped_as_shared_memory() {
    let Some(access) = Access::start() else { return };
    let kernel = nix::sys::utsname::uname().expect("a kernel").release().to_string_lossy().into_owned();
    let version: Vec<u32> = kernel.split(['.', '-']).map_while(|number| number.parse().ok()).collect();
    if version < vec![6, 6] {
        eprintln!("skipped: Linux {kernel} cannot do that");
        return;
    }
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(30)) else { return };
    let map = "import mmap, sys; f = open(sys.argv[1], 'rb'); \
               sys.stdout.buffer.write(mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)[:])";
    let Ok(output) = Command::new("python3").args(["-c", map]).arg(shown.path("scsi0")).output() else {
        eprintln!("skipped: python3 is not installed");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == expected(0, SIZE));
    assert_eq!(shown.log.warnings(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_fetched_ahead_is_given_away_with_the_rest() {
    let Some(access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(30)) else { return };
    let file = OpenOptions::new().read(true).write(true).open(shown.path("scsi0")).expect("open for punching");
    let mut buffer = vec![0; CLUSTER as usize];
    for at in (0..MIB).step_by(CLUSTER as usize) {
        file.read_exact_at(&mut buffer, at).expect("read");
    }
    std::thread::sleep(Duration::from_millis(100));
    fallocate(&file, HOLE, (MIB + CLUSTER) as i64, CLUSTER as i64).expect("punches");
    file.read_exact_at(&mut buffer, MIB).expect("before the hole");
    let error = file.read_at(&mut buffer, MIB + CLUSTER).expect_err("in it");
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    assert!(shown.log.warnings()[0].contains("was discarded"), "{:?}", shown.log.warnings());
    file.read_exact_at(&mut buffer, MIB + 2 * CLUSTER).expect("behind it");
    assert!(buffer == expected(MIB + 2 * CLUSTER, CLUSTER));
    // As borg would: what was read is given away at once.
    for at in (2 * MIB..4 * MIB).step_by(CLUSTER as usize) {
        file.read_exact_at(&mut buffer, at).expect("read");
        assert!(buffer == expected(at, CLUSTER));
        fallocate(&file, HOLE, at as i64, CLUSTER as i64).expect("punches");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_past_the_page_cache_get_what_they_asked_for() {
    let Some(access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(30)) else { return };
    let path = shown.path("scsi0");
    std::thread::scope(|scope| {
        for reader in 0..16u64 {
            let path = &path;
            scope.spawn(move || {
                for round in 0..64u64 {
                    let offset = (reader * 131 + round * 977) % (SIZE / 4096) * 4096;
                    let len = if round % 8 == 0 { MIB } else { 4096 }.min(SIZE - offset);
                    let read = read_direct(path, offset, len as usize).expect("read");
                    assert!(read == expected(offset, len), "reader {reader}: {len} bytes at {offset}");
                }
            });
        }
    });
    assert_eq!(shown.log.warnings(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_hangs_keeps_no_reader_longer_than_the_deadline() {
    let Some(access) = Access::start() else { return };
    // Once with a deadline that the connections keep, once with one that they do not know.
    for deadline in [Duration::from_secs(2), Duration::from_secs(1)] {
        let images = access.image_within(Duration::from_secs(2)).await;
        let Some(shown) = show(images, deadline) else { return };
        let path = shown.path("scsi0");
        assert!(read_direct(&path, 0, 4096).is_ok());
        // One reads in order; what was fetched ahead of it is there.
        let (file, mut buffer, mut at) = (File::open(&path).expect("open"), vec![0; CLUSTER as usize], 0);
        while at < MIB {
            at += file.read_at(&mut buffer, at).expect("read") as u64;
        }
        access.signal(Signal::SIGSTOP);
        let begun = std::time::Instant::now();
        let error = read_direct(&path, 0, 4096).expect_err("hangs");
        let waited = begun.elapsed();
        let (in_order, begun) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                loop {
                    let begun = std::time::Instant::now();
                    match file.read_at(&mut buffer, at) {
                        Ok(read) => at += read as u64,
                        Err(error) => return (error, begun),
                    }
                }
            });
            reader.join().expect("ends")
        });
        let waited_in_order = begun.elapsed();
        access.signal(Signal::SIGCONT);
        for (error, waited) in [(error, waited), (in_order, waited_in_order)] {
            assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
            assert!(waited < deadline + Duration::from_secs(3), "{waited:?}");
        }
        assert!(waited >= deadline, "{waited:?}");
        assert!(shown.log.warnings()[0].contains("within"), "{:?}", shown.log.warnings());
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn reads_across_a_border_that_no_request_may_cross_are_whole() {
    let Some(access) = Access::start() else { return };
    let images = access.image_of(&access, all_data(), Some(CLUSTER as u32)).await;
    let Some(shown) = show(images, Duration::from_secs(20)) else { return };
    let path = shown.path("scsi0");
    for (offset, len) in [(0, CLUSTER), (CLUSTER - 4096, 8192), (CLUSTER / 2, 2 * CLUSTER), (3 * CLUSTER, 4096)] {
        assert!(read_direct(&path, offset, len as usize).expect("read") == expected(offset, len), "{len} at {offset}");
    }
    assert_eq!(shown.log.warnings(), [""; 0]);
}

/// The first connections that are asked lead to a server that dies; the others know better.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_connection_fails_to_bring_is_asked_of_another() {
    let (Some(access), Some(mut other)) = (Access::start(), Access::start()) else { return };
    let images = access.image_with_lanes_of(&other, all_data()).await;
    let Some(shown) = show(images, Duration::from_secs(20)) else { return };
    let path = shown.path("scsi0");
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let path = &path;
            scope.spawn(move || {
                for round in 0..400u64 {
                    let offset = (reader * 131 + round * 977) % (SIZE / 4096) * 4096;
                    let read = read_direct(path, offset, 4096).expect("read");
                    assert!(read == expected(offset, read.len() as u64), "reader {reader}: {offset}");
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert!(fs::read(&path).expect("read in order") == expected(0, SIZE));
                }
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        other.child.kill().expect("kill");
    });
    assert_eq!(shown.log.warnings(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_killed_leaves_the_others_alone() {
    let Some(access) = Access::start() else { return };
    let Some(shown) = show(access.image(all_data()).await, Duration::from_secs(20)) else { return };
    let path = shown.path("scsi0");
    for _ in 0..10 {
        access.signal(Signal::SIGSTOP);
        let input = format!("if={}", path.display());
        let reader =
            Command::new("dd").args([&input, "of=/dev/null", "bs=4096", "iflag=direct", "status=none"]).spawn();
        let mut reader = reader.expect("dd");
        std::thread::sleep(Duration::from_millis(20));
        // Interrupted while its read is under way.
        reader.kill().expect("kill");
        access.signal(Signal::SIGCONT);
        reader.wait().expect("gone");
        assert!(read_direct(&path, MIB, 8192).expect("read") == expected(MIB, 8192));
    }
    assert_eq!(shown.log.warnings(), [""; 0]);
}
