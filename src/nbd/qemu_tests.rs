//! The client against `qemu-nbd` and `qemu-storage-daemon`, and `nbdkit` for what QEMU 10 does no more: compact headers.

use super::{Client, ConnectOptions, Connections, Framing, NbdError, StatusExtent};
use bytes::BytesMut;
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const BASE: &str = "base:allocation";
const DIRTY: &str = "qemu:dirty-bitmap:changes";

/// Ends its process when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn options(&self, export: &str, contexts: &[&str]) -> ConnectOptions {
        let contexts = contexts.iter().map(|name| (*name).to_owned()).collect();
        ConnectOptions {
            socket: self.socket.clone(),
            export: export.into(),
            contexts,
            deadline: Duration::from_secs(20),
            longest_read: ConnectOptions::LONGEST_READ,
        }
    }

    async fn connect(&self, contexts: &[&str]) -> Result<Client, NbdError> {
        Client::connect(&self.options("disk", contexts)).await
    }
}

/// A room for images, or `None` with the reason printed when a program is missing.
fn room(programs: &[&str]) -> Option<tempfile::TempDir> {
    for program in programs {
        if Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            eprintln!("skipped: {program} is not installed");
            return None;
        }
    }
    Some(tempfile::tempdir().unwrap())
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether a server has got as far as `listen`: the socket file is there a moment earlier. To connect would use up a client.
fn listens(socket: &Path) -> bool {
    const LISTENING: &str = " 00010000 ";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| line.contains(LISTENING) && line.ends_with(socket.to_str().unwrap()))
}

fn serve(room: &Path, program: &str, args: &[&str]) -> Server {
    let socket = room.join("nbd.sock");
    let child = Command::new(program).args(args).stdin(Stdio::null()).spawn().unwrap();
    let server = Server { child, socket };
    for _ in 0..1000 {
        if listens(&server.socket) {
            return server;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{program} {args:?} opens no socket");
}

fn qemu_nbd(room: &Path, image: &Path, more: &[&str]) -> Server {
    let (socket, image) = (room.join("nbd.sock"), image.to_str().unwrap());
    let fixed = ["--persistent", "--shared=8", "--export-name=disk", "--discard=unmap", "--socket"];
    let args = [&fixed[..], &[socket.to_str().unwrap()], more, &[image]].concat();
    serve(room, "qemu-nbd", &args)
}

fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// A raw image: data, a hole, data up to an end that is no multiple of anything big.
fn sparse_raw(room: &Path) -> (PathBuf, Vec<u8>) {
    use std::os::unix::fs::FileExt;
    let path = room.join("disk.raw");
    let mut content = vec![0; (100 * MIB + 1536) as usize];
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (offset, len) in [(0, 3 * MIB), (50 * MIB, 20 * MIB + 4096), (100 * MIB, 1536)] {
        let data = noise(offset + 1, len);
        file.write_all_at(&data, offset).unwrap();
        content[offset as usize..(offset + len) as usize].copy_from_slice(&data);
    }
    (path, content)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_parallel_reads_over_several_connections_return_the_image() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, content) = sparse_raw(room.path());
    let server = qemu_nbd(room.path(), &image, &["--format=raw", "--read-only"]);
    let connections = Connections::open(&server.options("disk", &[]), 3).await.unwrap();
    assert_eq!((connections.count(), connections.first().size()), (3, content.len() as u64));
    assert_eq!(connections.first().info().framing, Framing::Extended);
    assert!(connections.first().is_read_only() && !connections.first().can_trim());

    let mut tasks = tokio::task::JoinSet::new();
    for (n, len) in [4 * KIB, 100 * KIB, MIB, 4 * MIB, 333].into_iter().cycle().take(300).enumerate() {
        let (connections, n) = (connections.clone(), n as u64);
        let offset = (n * 7_654_321) % (content.len() as u64 - len);
        tasks.spawn(async move {
            let (bytes, only_holes) = connections.read(offset, BytesMut::zeroed(len as usize)).await.unwrap();
            (offset, bytes, only_holes)
        });
    }
    let mut holes = 0;
    while let Some(read) = tasks.join_next().await {
        let (offset, bytes, only_holes) = read.unwrap();
        let expected = &content[offset as usize..][..bytes.len()];
        assert!(bytes == expected, "{} bytes at {offset}", bytes.len());
        assert!(!only_holes || expected.iter().all(|byte| *byte == 0));
        holes += u32::from(only_holes);
    }
    assert!(holes > 50, "{holes}");
    connections.disconnect().await.unwrap();
}

#[tokio::test]
async fn a_read_of_the_whole_disk_is_split_and_joined() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, content) = sparse_raw(room.path());
    let server = qemu_nbd(room.path(), &image, &["--format=raw"]);
    let client = server.connect(&[]).await.unwrap();
    assert_eq!((client.info().min_block, client.info().max_block), (1, 32 << 20));
    let (bytes, only_holes) = client.read(0, BytesMut::from(&vec![7; content.len()][..])).await.unwrap();
    assert!(bytes == content && !only_holes);
}

#[tokio::test]
async fn base_allocation_tells_data_from_holes() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, content) = sparse_raw(room.path());
    let server = qemu_nbd(room.path(), &image, &["--format=raw"]);
    let client = server.connect(&[BASE]).await.unwrap();
    let map = client.block_status(BASE, 0, client.size()).await.unwrap();
    let data = |(len, flags)| StatusExtent { len, flags };
    let expected = [(3 * MIB, 0), (47 * MIB, 3), (20 * MIB + 4096, 0), (30 * MIB - 4096, 3), (1536, 0)];
    assert_eq!(map, expected.map(data));
    let inside = client.block_status(BASE, 2 * MIB, 2 * MIB).await.unwrap();
    assert_eq!(inside, [(MIB, 0), (MIB, 3)].map(data));
    assert_eq!(map.iter().map(|extent| extent.len).sum::<u64>(), content.len() as u64);
}

#[tokio::test]
async fn a_dirty_bitmap_and_the_allocation_share_a_connection() {
    let Some(room) = room(&["qemu-nbd", "qemu-img", "qemu-io"]) else { return };
    let image = room.path().join("disk.qcow2");
    let name = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "10G"]);
    run("qemu-img", &["bitmap", "--add", "-g", "64K", name, "changes"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 64k", "-c", "write -P 2 9G 100k", name]);
    let server = qemu_nbd(room.path(), &image, &["--format=qcow2", "--read-only", "-B", "changes"]);
    let client = server.connect(&[DIRTY, BASE]).await.unwrap();
    assert!(client.info().can_select_context());
    let dirty = client.block_status(DIRTY, 0, client.size()).await.unwrap();
    let expected =
        [(MIB, 0), (64 * KIB, 1), (9 * 1024 * MIB - MIB - 64 * KIB, 0), (128 * KIB, 1), (1024 * MIB - 128 * KIB, 0)];
    assert_eq!(dirty, expected.map(|(len, flags)| StatusExtent { len, flags }));
    let allocated = client.block_status(BASE, 0, client.size()).await.unwrap();
    assert_eq!(allocated.iter().filter(|extent| extent.flags == 0).map(|extent| extent.len).sum::<u64>(), 164 * KIB);

    let missing = server.connect(&[BASE, "qemu:dirty-bitmap:other"]).await.err().unwrap();
    assert!(matches!(&missing, NbdError::ContextMissing(name) if name == "qemu:dirty-bitmap:other"), "{missing:?}");
}

#[tokio::test]
async fn trimmed_ranges_read_as_holes() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, _) = sparse_raw(room.path());
    let server = qemu_nbd(room.path(), &image, &["--format=raw"]);
    let client = server.connect(&[BASE]).await.unwrap();
    assert!(client.can_trim() && !client.is_read_only());
    client.trim(51 * MIB, 2 * MIB).await.unwrap();
    assert!(client.read(51 * MIB, BytesMut::zeroed(2 << 20)).await.unwrap().1);
    let map = client.block_status(BASE, 51 * MIB, 3 * MIB).await.unwrap();
    assert_eq!(map, [(2 * MIB, 3), (MIB, 0)].map(|(len, flags)| StatusExtent { len, flags }));
    client.trim(0, client.size()).await.unwrap();
    let (bytes, _) = client.read(0, BytesMut::from(&[9; 4096][..])).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn an_unknown_export_is_refused_in_the_servers_words() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, _) = sparse_raw(room.path());
    let server = qemu_nbd(room.path(), &image, &["--format=raw"]);
    for contexts in [&[][..], &[BASE]] {
        let error = Client::connect(&server.options("other", contexts)).await.err().unwrap();
        assert!(matches!(&error, NbdError::NoExport { export, .. } if export == "other"), "{error:?}");
        assert!(error.to_string().contains("other"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_dies_closes_the_connection() {
    let Some(room) = room(&["qemu-nbd"]) else { return };
    let (image, _) = sparse_raw(room.path());
    let mut server = qemu_nbd(room.path(), &image, &["--format=raw"]);
    let client = server.connect(&[]).await.unwrap();
    client.read(0, BytesMut::zeroed(512)).await.unwrap();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let error = client.read(0, BytesMut::zeroed(512)).await.unwrap_err();
    assert!(matches!(error, NbdError::Closed { .. }), "{error:?}");
    let error = server.connect(&[]).await.err().unwrap();
    assert!(matches!(error, NbdError::Io { doing: "connect to", .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_without_extended_headers_is_read_and_trimmed() {
    let Some(room) = room(&["nbdkit"]) else { return };
    let (image, content) = sparse_raw(room.path());
    let socket = room.path().join("nbd.sock");
    let (file, socket) = (image.to_str().unwrap(), socket.to_str().unwrap());
    let server = serve(room.path(), "nbdkit", &["--foreground", "--exit-with-parent", "--unix", socket, "file", file]);
    let client = server.connect(&[BASE]).await.unwrap();
    assert_eq!((client.info().framing, client.size()), (Framing::Compact, content.len() as u64));
    let map = client.block_status(BASE, 0, client.size()).await.unwrap();
    assert_eq!(map[..2], [(3 * MIB, 0), (47 * MIB, 3)].map(|(len, flags)| StatusExtent { len, flags }));
    let (bytes, _) = client.read(0, BytesMut::zeroed(content.len())).await.unwrap();
    assert!(bytes == content);
    client.trim(0, MIB).await.unwrap();
    let (bytes, _) = client.read(0, BytesMut::zeroed(2 << 20)).await.unwrap();
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 0) && bytes[1 << 20..] == content[1 << 20..2 << 20]);
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn a_failing_read_tells_number_and_leaves_the_connection() {
    let Some(room) = room(&["nbdkit"]) else { return };
    let socket = room.path().join("nbd.sock");
    let trigger = room.path().join("fail");
    let when = format!("error-pread-file={}", trigger.display());
    let fixed = ["--foreground", "--exit-with-parent", "--unix", socket.to_str().unwrap(), "--filter=error", "pattern"];
    let more = ["size=1M", "error-pread=EIO", "error-pread-rate=100%", &when];
    let server = serve(room.path(), "nbdkit", &[&fixed[..], &more].concat());
    let client = server.connect(&[]).await.unwrap();
    client.read(0, BytesMut::zeroed(4096)).await.unwrap();
    std::fs::write(&trigger, "").unwrap();
    let error = client.read(512, BytesMut::zeroed(4096)).await.unwrap_err();
    assert!(matches!(error, NbdError::Refused { errno: 5, offset: 512, len: 4096, .. }), "{error:?}");
    std::fs::remove_file(&trigger).unwrap();
    let (bytes, _) = client.read(512, BytesMut::zeroed(16)).await.unwrap();
    assert_eq!(bytes[..], [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 8]);
}

/// A snapshot access as a backup reads it: a bitmap says what is dirty, the rest is unreadable, and so is what was trimmed.
fn snapshot_access(room: &Path) -> Option<(Server, Vec<u8>)> {
    let (disk, fleecing, socket) = (room.join("disk.qcow2"), room.join("fleecing.raw"), room.join("nbd.sock"));
    let content = noise(1, 8 * MIB);
    std::fs::write(room.join("content"), &content).unwrap();
    std::fs::File::create(&fleecing).unwrap().set_len(8 * MIB).unwrap();
    let name = disk.to_str()?;
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", room.join("content").to_str()?, name]);
    run("qemu-img", &["bitmap", "--add", "-g", "64K", name, "changes"]);
    // Rewritten with what is there, so that the content stays known.
    std::fs::write(room.join("piece"), &content[(2 * MIB) as usize..(4 * MIB) as usize]).unwrap();
    let write = format!("write -s {} 2M 2M", room.join("piece").display());
    run("qemu-io", &["-f", "qcow2", "-c", &write, name]);
    let blockdevs = [
        format!("driver=file,node-name=disk-file,filename={name}"),
        "driver=qcow2,node-name=disk-node,file=disk-file".into(),
        format!("driver=raw,node-name=fleecing,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}", fleecing.display()),
        "driver=copy-before-write,node-name=cbw,file=disk-node,target=fleecing,bitmap.node=disk-node,bitmap.name=changes".into(),
        "driver=snapshot-access,node-name=access,file=cbw,discard=unmap".into(),
    ];
    let nbd_server = format!("addr.type=unix,addr.path={}", socket.display());
    let mut args = Vec::new();
    for blockdev in &blockdevs {
        args.extend(["--blockdev", blockdev]);
    }
    args.extend(["--nbd-server", &nbd_server, "--export"]);
    args.push(
        "type=nbd,id=export,node-name=access,name=disk,writable=on,bitmaps.0.node=disk-node,bitmaps.0.name=changes",
    );
    Some((serve(room, "qemu-storage-daemon", &args), content))
}

#[tokio::test]
async fn a_snapshot_access_is_read_trimmed_and_unreadable_elsewhere() {
    let Some(room) = room(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) else { return };
    let (server, content) = snapshot_access(room.path()).unwrap();
    let client = server.connect(&[BASE, DIRTY]).await.unwrap();
    let dirty = [(2 * MIB, 0), (2 * MIB, 1), (4 * MIB, 0)].map(|(len, flags)| StatusExtent { len, flags });
    assert_eq!(client.block_status(DIRTY, 0, 8 * MIB).await.unwrap(), dirty);
    for _ in 0..3 {
        assert!(client.block_status(BASE, 0, 8 * MIB).await.unwrap_err().is_unreadable());
        assert_eq!(client.block_status(DIRTY, 0, 8 * MIB).await.unwrap(), dirty);
    }
    let (bytes, _) = client.read(2 * MIB, BytesMut::zeroed(2 << 20)).await.unwrap();
    assert!(bytes == content[2 << 20..4 << 20]);
    let error = client.read(MIB, BytesMut::zeroed(2 << 20)).await.unwrap_err();
    assert!(error.is_unreadable() && !error.is_fatal(), "{error:?}");

    client.trim(2 * MIB, MIB).await.unwrap();
    assert!(client.read(2 * MIB, BytesMut::zeroed(4096)).await.unwrap_err().is_unreadable());
    let (bytes, _) = client.read(3 * MIB, BytesMut::zeroed(1 << 20)).await.unwrap();
    assert!(bytes == content[3 << 20..4 << 20]);
    assert_eq!(client.block_status(DIRTY, 0, 8 * MIB).await.unwrap(), dirty);
    client.disconnect().await.unwrap();
}
