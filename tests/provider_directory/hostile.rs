//! Images that somebody else put there, and images that somebody changed.

use crate::fixture::*;
use pvebackup::{
    archive::ArchiveId,
    provider::{ErrorKind, Provider},
};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, symlink},
    path::Path,
    time::{Duration, SystemTime},
};

/// Three archives, each on top of the one before, and the last one's content.
fn chain(f: &mut Fixture) -> (Vec<ArchiveId>, Content) {
    let mut content: Content = (0..60).map(|i| (i, segment_bytes(1, i))).collect();
    let mut ids = vec![f.backup(vec![Disk::full("scsi0", &content)]).unwrap().id];
    for round in 2..4 {
        let base = Some(f.use_base(&ids[ids.len() - 1], "scsi0"));
        let bytes = segment_bytes(round, round);
        content.insert(round, bytes.clone());
        ids.push(f.backup(vec![Disk { name: "scsi0", base, changes: vec![Ok((round, Some(bytes)))] }]).unwrap().id);
    }
    (ids, content)
}

/// Tries to read a segment that lies in the oldest image.
fn read(f: &mut Fixture, id: &ArchiveId) -> Result<Vec<u8>, ErrorKind> {
    let reader = f.provider.open(id).map_err(|e| e.kind)?;
    reader.segment("scsi0", 0, LEN).map(|bytes| bytes.to_vec()).map_err(|e| e.kind)
}

#[track_caller]
fn rebase(image: &Path, backing: &str, format: &str) {
    let (ok, text) = qemu_img(&["rebase", "-u", "-f", "qcow2", "-F", format, "-b", backing, image.to_str().unwrap()]);
    assert!(ok, "{text}");
}

#[test]
fn no_backing_file_but_the_expected_one_is_opened() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let secret = f.root.join("secret.raw");
    fs::write(&secret, vec![7; 64 << 20]).unwrap();
    let image = f.image(&ids[2], "scsi0");
    let saved = fs::read(&image).unwrap();
    let absolute = f.image(&ids[1], "scsi0").display().to_string();
    let cases = [
        (secret.to_str().unwrap(), "raw"),
        ("../../secret.raw", "raw"),
        (absolute.as_str(), "qcow2"),
        ("../../100/qemu-1/scsi0.qcow2", "qcow2"),
        ("nbd:localhost:10809", "raw"),
        ("json:{\"driver\":\"null-co\"}", "raw"),
    ];
    for (backing, format) in cases {
        rebase(&image, backing, format);
        assert!(f.refused(&ids[2], "scsi0").contains("none of this guest's images") || format == "raw", "{backing}");
        assert_eq!(read(&mut f, &ids[2]), Err(ErrorKind::Damaged), "{backing}");
        fs::write(&image, &saved).unwrap();
    }
    // The right name, but as raw: what the guest wrote to its disk would become an image header.
    let right = format!("../{}/scsi0.qcow2", ids[1].0.trim_start_matches("100/"));
    rebase(&image, &right, "raw");
    assert!(f.refused(&ids[2], "scsi0").contains("not marked as qcow2"));
    assert_eq!(read(&mut f, &ids[2]), Err(ErrorKind::Damaged));
}

#[test]
fn an_external_data_file_is_not_opened() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let image = f.image(&ids[0], "scsi0");
    fs::remove_file(&image).unwrap();
    let data = f.root.join("data.raw").display().to_string();
    let size = SIZE.next_multiple_of(512).to_string();
    let options = format!("data_file={data},data_file_raw=on");
    let (ok, text) = qemu_img(&["create", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), &size]);
    assert!(ok, "{text}");
    for id in &ids {
        assert!(f.refused(id, "scsi0").contains("incompatible features"));
        assert_eq!(read(&mut f, id), Err(ErrorKind::Damaged));
    }
}

#[test]
fn a_missing_link_is_noticed() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let (middle, away) = (f.archive(&ids[1]), f.root.join("away"));
    fs::rename(&middle, &away).unwrap();
    assert!(f.refused(&ids[2], "scsi0").contains("there is no archive"));
    assert_eq!(read(&mut f, &ids[2]), Err(ErrorKind::Damaged));
    f.use_base(&ids[0], "scsi0");
    // A link to where it is now is no directory.
    symlink(&away, &middle).unwrap();
    f.refused(&ids[2], "scsi0");
    assert_eq!(read(&mut f, &ids[2]), Err(ErrorKind::Damaged));
    fs::remove_file(&middle).unwrap();
    fs::rename(&away, &middle).unwrap();
    f.use_base(&ids[2], "scsi0");
    let manifest = middle.join("manifest.json");
    fs::rename(&manifest, middle.join("other")).unwrap();
    assert!(f.refused(&ids[2], "scsi0").contains("manifest"), "not complete");
}

#[test]
fn a_circle_ends() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let name = ids[2].0.trim_start_matches("100/").to_owned();
    rebase(&f.image(&ids[0], "scsi0"), &format!("../{name}/scsi0.qcow2"), "qcow2");
    assert!(f.refused(&ids[2], "scsi0").contains("circle"));
    assert_eq!(read(&mut f, &ids[2]), Err(ErrorKind::Damaged));
}

#[test]
fn an_image_that_was_written_to_is_no_base() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let image = f.image(&ids[0], "scsi0");
    let modified = fs::metadata(&image).unwrap().modified().unwrap();
    let file = OpenOptions::new().write(true).read(true).open(&image).unwrap();
    let touched = |by: Duration| {
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        file.set_modified(modified + by).unwrap();
    };
    touched(Duration::from_secs(2));
    assert!(f.refused(&ids[2], "scsi0").contains("changed since"));
    touched(Duration::ZERO);
    f.use_base(&ids[2], "scsi0");
    // Truncated.
    let len = file.metadata().unwrap().len();
    file.set_len(len - 65536).unwrap();
    touched(Duration::ZERO);
    assert!(f.refused(&ids[2], "scsi0").contains("changed since"));
}

#[test]
fn an_image_that_was_replaced_is_no_base() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    let image = f.image(&ids[0], "scsi0");
    let (modified, len) = {
        let metadata = fs::metadata(&image).unwrap();
        (metadata.modified().unwrap(), metadata.len())
    };
    let keep_time = |image: &Path, modified: SystemTime| {
        OpenOptions::new().write(true).open(image).unwrap().set_modified(modified).unwrap();
    };
    // Another backup's image, with the same length, time and layout.
    let other: Content = (0..60).map(|i| (i, segment_bytes(9, i))).collect();
    let second = f.backup(vec![Disk::full("scsi0", &other)]).unwrap().id;
    let saved = fs::read(&image).unwrap();
    let mut foreign = fs::read(f.image(&second, "scsi0")).unwrap();
    assert_eq!(foreign.len() as u64, len, "the test's own premise");
    // imago writes the names of features in an order of its own every time.
    foreign[..65536].copy_from_slice(&saved[..65536]);
    fs::write(&image, foreign).unwrap();
    keep_time(&image, modified);
    for id in [&ids[2], &ids[0]] {
        let reason = f.refused(id, "scsi0");
        assert!(reason.contains("another content"), "{reason}");
    }

    // One that was made by another program from the same content.
    fs::write(&image, &saved).unwrap();
    let copy = f.root.join("copy.qcow2");
    let (ok, text) =
        qemu_img(&["convert", "-f", "qcow2", "-O", "qcow2", image.to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(ok, "{text}");
    fs::rename(&copy, &image).unwrap();
    keep_time(&image, modified);
    assert!(f.refused(&ids[0], "scsi0").contains("changed since"));
}

#[test]
fn an_archive_under_another_name_is_not_taken_for_that() {
    let mut f = Fixture::new();
    let (ids, _) = chain(&mut f);
    fs::rename(f.archive(&ids[2]), f.root.join("100/qemu-12345")).unwrap();
    fs::create_dir(f.root.join("101")).unwrap();
    fs::rename(f.archive(&ids[1]), f.root.join(ids[1].0.replace("100/", "101/"))).unwrap();
    let listed: Vec<ArchiveId> = f.provider.list(None).unwrap().into_iter().map(|a| a.id).collect();
    assert_eq!(listed, ids[..1]);
    assert_eq!(read(&mut f, &ArchiveId("100/qemu-12345".into())), Err(ErrorKind::Damaged));
}

#[test]
fn bytes_at_random_never_panic() {
    let mut f = Fixture::new();
    let (ids, content) = chain(&mut f);
    let image = f.image(&ids[0], "scsi0");
    let file = OpenOptions::new().write(true).read(true).open(&image).unwrap();
    // Header, refcount table and block, L1, the first L2 table.
    let tables = 6 * 65536;
    let mut saved = vec![0; tables];
    file.read_exact_at(&mut saved, 0).unwrap();
    let mut random = random(3);
    let mut noticed = 0;
    for _ in 0..300 {
        for _ in 0..=random(4) {
            let at = if random(2) == 0 { random(240) } else { random(6) * 65536 + random(64) };
            file.write_all_at(&[random(256) as u8], at).unwrap();
        }
        match read(&mut f, &ids[2]) {
            Ok(bytes) if bytes == content[&0] => {}
            _ => noticed += 1,
        }
        f.query(&ids[2], "scsi0");
        file.write_all_at(&saved, 0).unwrap();
    }
    assert!(noticed > 20, "{noticed}");
    assert_eq!(read(&mut f, &ids[2]), Ok(content[&0].clone()));
}
