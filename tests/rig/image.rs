//! Images: making them, and reading them for comparison.

use super::disk::{DiskSpec, Format};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
};

/// Makes an image of `disk`'s size and format, with its content.
pub fn make_image(path: &Path, disk: &DiskSpec) {
    fs::create_dir_all(path.parent().expect("images lie in a directory")).unwrap();
    let run = |command: &mut Command| {
        let output = command.output().expect("qemu-img runs");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    match (&disk.content, disk.format) {
        (None, Format::Raw) => File::create(path).unwrap().set_len(disk.size).unwrap(),
        (None, Format::Qcow2) => {
            run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg(disk.size.to_string()));
        }
        (Some(content), format) => {
            let length = fs::metadata(content).unwrap().len();
            assert_eq!(length, disk.size, "{} has another size than {}", content.display(), disk.name);
            let formats = ["convert", "-q", "-f", "raw", "-O", format.as_str()];
            run(Command::new("qemu-img").args(formats).arg(content).arg(path));
        }
    }
}

/// A raw image that is being compared.
pub struct Image {
    file: File,
    length: u64,
}

impl Image {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    pub fn len(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        self.file
            .read_exact_at(buffer, offset)
            .unwrap_or_else(|error| panic!("the image cannot be read at offset {offset}: {error}"));
    }
}
