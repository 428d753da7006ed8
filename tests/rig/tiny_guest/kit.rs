//! Kernel and initramfs of the tiny guest: made once and kept in a cache.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

/// Modules that the guest loads; what they depend on is looked up. Those that are built in are not missed.
const MODULES: [&str; 6] = ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "ext4"];

const INIT: &str = include_str!("init.sh");
const LITMUS: &str = include_str!("litmus.c");

/// What is needed to boot the tiny guest.
#[derive(Clone, Debug)]
pub struct TinyKit {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl TinyKit {
    /// The kit, or `None` after saying why the test is skipped. With `PVEBACKUP_TEST_NO_SKIP` set, it panics instead.
    pub fn or_skip() -> Option<&'static Self> {
        static KIT: OnceLock<Result<TinyKit, String>> = OnceLock::new();
        match KIT.get_or_init(Self::make) {
            Ok(kit) => Some(kit),
            Err(reason) if env::var_os("PVEBACKUP_TEST_NO_SKIP").is_some() => panic!("no tiny guest: {reason}"),
            Err(reason) => {
                // Past the harness's capture, so that it is seen.
                let _ = writeln!(std::io::stderr(), "SKIPPED (no tiny guest): {reason}");
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        let cache = env::var_os("PVEBACKUP_TEST_CACHE")
            .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
        let cache = cache.join("tiny-guest");
        fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
        let guard = File::create(cache.join("lock")).map_err(|error| error.to_string())?;
        guard.lock().map_err(|error| error.to_string())?;
        let package = kernel_package(&cache)?;
        let tree = cache.join("kernel");
        if !tree.exists() {
            let unpacked = cache.join("kernel.new");
            let _ = fs::remove_dir_all(&unpacked);
            run(Command::new("dpkg-deb").arg("-x").args([&package, &unpacked]))?;
            decompress_kernel(&unpacked)?;
            fs::rename(&unpacked, &tree).map_err(|error| error.to_string())?;
        }
        let initramfs = cache.join("initramfs.cpio");
        make_initramfs(&cache, &tree, &initramfs)?;
        Ok(Self { kernel: tree.join("vmlinux"), initramfs })
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> =
        fs::read_dir(directory).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

/// Debian's kernel for virtual machines, downloaded the first time.
fn kernel_package(cache: &Path) -> Result<PathBuf, String> {
    let cached = || files(cache).into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    if let Some(package) = cached() {
        return Ok(package);
    }
    let depends = run(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let name = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let name = name.ok_or("apt knows no linux-image-cloud-amd64 (apt-get update?)")?;
    run(Command::new("apt-get").args(["download", &format!("linux-image-{name}")]).current_dir(cache))?;
    cached().ok_or_else(|| "apt-get downloaded nothing".to_owned())
}

/// Decompressing it here saves the guest several seconds under TCG.
fn decompress_kernel(tree: &Path) -> Result<(), String> {
    let images = files(&tree.join("boot"));
    let image = images
        .iter()
        .find(|path| path.display().to_string().contains("vmlinuz-"))
        .ok_or("no vmlinuz in the package")?;
    let bytes = fs::read(image).map_err(|error| error.to_string())?;
    // The boot protocol's header: sectors of setup code, then where in the rest the payload lies.
    let word = |at: usize| bytes.get(at..at + 4).map(|word| u32::from_le_bytes(word.try_into().unwrap()) as usize);
    let setup = (usize::from(*bytes.get(0x1f1).ok_or("vmlinuz is too short")?) + 1) * 512;
    let (offset, length) = word(0x248).zip(word(0x24c)).ok_or("vmlinuz is too short")?;
    let payload = bytes.get(setup + offset..setup + offset + length).ok_or("vmlinuz has no payload")?;
    let (program, tail) = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", 4),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", 4),
        [0xfd, b'7', b'z', b'X', ..] => ("xz", 4),
        [0x1f, 0x8b, ..] => ("gzip", 0),
        _ => return Err("vmlinuz is compressed in an unknown way".into()),
    };
    let target = File::create(tree.join("vmlinux")).map_err(|error| error.to_string())?;
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(target)
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    // All but gzip are followed by the size of the content.
    let written = child.stdin.take().ok_or("no pipe")?.write_all(&payload[..payload.len() - tail]);
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() && written.is_ok() { Ok(()) } else { Err(format!("{program} cannot decompress the kernel")) }
}

/// All modules of the kernel, by name.
fn modules(tree: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in files(&directory) {
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) {
                found.insert(name.replace('-', "_"), path);
            }
        }
    }
    found
}

/// Adds `name` to the order of loading, after what it depends on.
fn order(name: &str, all: &BTreeMap<String, PathBuf>, order_so_far: &mut Vec<String>) {
    let Some(path) = all.get(name) else { return };
    if order_so_far.iter().any(|loaded| loaded == name) {
        return;
    }
    let bytes = fs::read(path).unwrap_or_default();
    let mark = b"\0depends=";
    if let Some(at) = bytes.windows(mark.len()).position(|window| window == mark) {
        let list: Vec<u8> = bytes[at + mark.len()..].iter().copied().take_while(|byte| *byte != 0).collect();
        for dependency in String::from_utf8_lossy(&list).split(',').filter(|word| !word.is_empty()) {
            order(&dependency.replace('-', "_"), all, order_so_far);
        }
    }
    order_so_far.push(name.to_owned());
}

fn make_initramfs(cache: &Path, tree: &Path, target: &Path) -> Result<(), String> {
    let stamp = cache.join("initramfs.stamp");
    let wanted = format!("{INIT}\n{LITMUS}\n{MODULES:?}\n");
    if target.exists() && fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(());
    }
    let root = cache.join("initramfs");
    let _ = fs::remove_dir_all(&root);
    let text = |error: std::io::Error| error.to_string();
    fs::create_dir_all(root.join("bin")).map_err(text)?;
    fs::create_dir_all(root.join("modules")).map_err(text)?;
    let put = |name: &str, source: &Path| {
        fs::copy(source, root.join(name)).map(|_| ()).map_err(|error| format!("{}: {error}", source.display()))
    };

    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|path| path.exists());
    put("bin/busybox", busybox.ok_or("no busybox (busybox-static)")?)?;
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).map_err(text)?;
    fs::write(root.join("init"), INIT).map_err(text)?;
    run(Command::new("chmod").arg("755").arg(root.join("init")))?;
    let source = cache.join("litmus.c");
    fs::write(&source, LITMUS).map_err(text)?;
    run(Command::new("cc").args(["-static", "-O1", "-o"]).args([&root.join("bin/litmus"), &source]))?;

    let all = modules(&tree.join("lib/modules"));
    let mut loading = Vec::new();
    for name in MODULES {
        order(name, &all, &mut loading);
    }
    for name in &loading {
        put(&format!("modules/{name}"), &all[name])?;
    }
    fs::write(root.join("modules/order"), loading.join("\n")).map_err(text)?;

    // Without the agent the guest is of use as well.
    let agent = ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"].into_iter().map(Path::new).find(|path| path.exists());
    if let Some(agent) = agent {
        put("bin/qemu-ga", agent)?;
        let libraries = run(Command::new("ldd").arg(agent))?;
        let libraries: BTreeSet<&str> = libraries.split_whitespace().filter(|word| word.starts_with('/')).collect();
        for library in libraries {
            let place = library.trim_start_matches('/');
            fs::create_dir_all(root.join(place).parent().ok_or("a library has a directory")?).map_err(text)?;
            put(place, Path::new(library))?;
        }
    }
    let archive = format!("cd '{}' && find . | cpio --quiet -o -H newc -R 0:0", root.display());
    let mut cpio = Command::new("sh");
    let archive = cpio.args(["-c", &archive]).output().map_err(text)?;
    if !archive.status.success() {
        return Err(format!("cpio: {}", String::from_utf8_lossy(&archive.stderr)));
    }
    fs::write(target, archive.stdout).map_err(text)?;
    fs::write(stamp, wanted).map_err(text)
}
