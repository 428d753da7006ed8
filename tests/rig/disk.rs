//! The disks of a test machine and what they look like on QEMU's command line.

use serde_json::json;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

/// The device that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    VirtioBlk,
    VirtioScsi,
    Ide,
    Sata,
}

/// How the drive is put on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `-blockdev`, as libvirt does it: nodes `libvirt-N-format` and `libvirt-N-storage`.
    Blockdev,
    /// `-drive`: backend `drive-NAME`, generated node names.
    Drive,
    /// Proxmox VE 9: throttle node `drive-NAME` over format node `f…` over file node `e…`.
    Proxmox,
}

/// The image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Which thread of QEMU serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    Main,
    Thread,
}

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Name of the device: `scsi0`, `virtio1`, `ide0`, `sata0`.
    pub name: String,
    /// Bytes, a multiple of 512.
    pub size: u64,
    pub bus: Bus,
    pub style: Style,
    pub format: Format,
    pub io: Io,
    /// A raw image to start from; empty otherwise. Its size has to be `size`.
    pub content: Option<PathBuf>,
    /// The image, where the rig is not to make one in the machine's directory.
    pub image: Option<PathBuf>,
}

impl DiskSpec {
    pub fn new(name: &str, size: u64) -> Self {
        let bus = match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            "virtio" => Bus::VirtioBlk,
            "ide" => Bus::Ide,
            "sata" => Bus::Sata,
            _ => Bus::VirtioScsi,
        };
        Self {
            name: name.into(),
            size,
            bus,
            style: Style::Blockdev,
            format: Format::Raw,
            io: Io::Main,
            content: None,
            image: None,
        }
    }

    /// The name by which `qemu-io -d` and `qom-set` find the device.
    pub fn qdev(&self) -> String {
        match self.bus {
            Bus::VirtioBlk => format!("/machine/peripheral/{}/virtio-backend", self.name),
            Bus::VirtioScsi | Bus::Ide | Bus::Sata => self.name.clone(),
        }
    }

    /// Number at the end of the name.
    pub fn index(&self) -> usize {
        let digits = self.name.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.parse().unwrap_or_else(|_| panic!("disk name `{}` has no number at its end", self.name))
    }
}

/// Command-line words for `disks`; `images[i]` is the image of `disks[i]`, `volids[i]` its Proxmox volume id.
pub fn arguments(disks: &[DiskSpec], images: &[PathBuf], volids: &[String]) -> Vec<String> {
    let mut words = Vec::new();
    let mut controllers = BTreeSet::new();
    let mut push = |option: &str, value: String| words.extend([option.to_owned(), value]);
    for (number, disk) in disks.iter().enumerate() {
        let (name, image) = (&disk.name, images[number].display().to_string());
        let iothread = match disk.io {
            Io::Main => String::new(),
            Io::Thread => {
                push("-object", format!("iothread,id=iothread-{name}"));
                format!(",iothread=iothread-{name}")
            }
        };
        let drive = match disk.style {
            Style::Blockdev => {
                let node = format!("libvirt-{}-format", number + 1);
                let file = json!({
                    "driver": "file", "node-name": format!("libvirt-{}-storage", number + 1), "filename": image,
                    "auto-read-only": true, "discard": "unmap",
                });
                let format = json!({
                    "driver": disk.format.as_str(), "node-name": node, "read-only": false, "discard": "unmap", "file": file,
                });
                push("-blockdev", format.to_string());
                node
            }
            Style::Drive => {
                let id = format!("drive-{name}");
                let format = disk.format.as_str();
                push("-drive", format!("file={image},if=none,id={id},discard=on,format={format},detect-zeroes=unmap"));
                id
            }
            Style::Proxmox => {
                let hash = proxmox_hash(name, &volids[number]);
                let cache = json!({"direct": false, "no-flush": false});
                push(
                    "-object",
                    json!({"id": format!("throttle-drive-{name}"), "limits": {}, "qom-type": "throttle-group"})
                        .to_string(),
                );
                let file = json!({
                    "driver": "file", "node-name": format!("e{hash}"), "filename": image, "aio": "threads", "cache": cache,
                    "discard": "unmap", "detect-zeroes": "unmap", "read-only": false,
                });
                let format = json!({
                    "driver": disk.format.as_str(), "node-name": format!("f{hash}"), "cache": cache,
                    "discard": "unmap", "detect-zeroes": "unmap", "read-only": false, "file": file,
                });
                let throttle = json!({
                    "driver": "throttle", "node-name": format!("drive-{name}"),
                    "throttle-group": format!("throttle-drive-{name}"),
                    "discard": "unmap", "detect-zeroes": "unmap", "read-only": false, "file": format,
                });
                push("-blockdev", throttle.to_string());
                format!("drive-{name}")
            }
        };
        let index = disk.index();
        // Report, as a guest without an operator: a failed write must reach the guest, and the test.
        let device = format!("drive={drive},id={name},werror=report,rerror=report");
        match disk.bus {
            Bus::VirtioBlk => push("-device", format!("virtio-blk-pci,{device}{iothread}")),
            Bus::VirtioScsi => {
                let controller = match disk.io {
                    Io::Main => "scsihw0".to_owned(),
                    Io::Thread => format!("virtioscsi{index}"),
                };
                if controllers.insert(controller.clone()) {
                    push("-device", format!("virtio-scsi-pci,id={controller}{iothread}"));
                }
                push("-device", format!("scsi-hd,bus={controller}.0,channel=0,scsi-id=0,lun={index},{device}"));
            }
            Bus::Ide => push("-device", format!("ide-hd,bus=ide.{index},unit=0,{device}")),
            Bus::Sata => {
                if controllers.insert("ahci0".to_owned()) {
                    push("-device", "ahci,id=ahci0".into());
                }
                push("-device", format!("ide-hd,bus=ahci0.{index},unit=0,{device}"));
            }
        }
    }
    words
}

/// What Proxmox names the nodes of a drive after: 30 hex digits.
pub fn proxmox_hash(name: &str, volid: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", "printf %s \"$1\" | sha256sum", "sh", &format!("drive={name},volid={volid}")])
        .output()
        .expect("sha256sum runs");
    String::from_utf8(output.stdout).expect("hex digits")[..30].to_owned()
}

/// Where the image of disk number `number` lies below the machine's directory. With a Proxmox volume id its place is that of
/// a `dir` storage.
pub fn image_path(dir: &Path, disk: &DiskSpec, number: usize, vmid: u32) -> PathBuf {
    if let Some(image) = &disk.image {
        return image.clone();
    }
    dir.join(format!("vz/images/{vmid}/{}", volume_name(disk, number, vmid)))
}

/// Volume name without the directory: `vm-100-disk-0.raw`.
pub fn volume_name(disk: &DiskSpec, number: usize, vmid: u32) -> String {
    format!("vm-{vmid}-disk-{number}.{}", disk.format.as_str())
}
