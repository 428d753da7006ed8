//! The disks of a running guest: what the configuration names, joined with what QEMU has.

use super::{
    Disk, DiskKind, Guest, GuestError, GuestKind,
    plain::Description,
    proxmox_config::{self, Drive, ProxmoxConfig},
};
use crate::qmp::{
    Session,
    command::block::{BlockDevice, BlockNode, QueryBlock},
};
use serde_json::Value;
use std::{collections::HashSet, path::PathBuf};

/// No guest has more disks, and no archive takes more.
const MAX_DISKS: usize = 256;
/// What fits a signed file offset.
const MAX_SIZE: u64 = i64::MAX as u64;
/// Size of TPM state when the configuration does not tell; QEMU tells once it is attached.
const TPM_SIZE: u64 = 4 << 20;

/// The disks of a guest.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Disks to back up.
    pub disks: Vec<Disk>,
    /// Disks that are left out, and why.
    pub skipped: Vec<(String, String)>,
    /// The guest's own name as QEMU or the configuration tells it.
    pub name: Option<String>,
    /// Configuration to archive with these disks (`guest.conf`).
    pub config: Vec<u8>,
    /// Drives of the configuration that QEMU does not have: an error unless they are asked to be left out.
    missing: Vec<String>,
    /// Proxmox's: the configuration without map lines, and its drives.
    proxmox: Option<(Vec<u8>, Vec<Drive>)>,
}

/// Asks QEMU for the guest's disks and joins them with the configuration.
///
/// # Errors
/// When QEMU cannot be asked, tells nonsense, or the configuration cannot be understood.
pub async fn disks(guest: &Guest, session: &mut Session) -> Result<Found, GuestError> {
    let fronts = session.execute(&QueryBlock {}).await.map_err(|e| GuestError::of_qmp(guest, e))?;
    if fronts.len() > 4 * MAX_DISKS {
        return Err(GuestError::Answer(format!("{} block devices", fronts.len())));
    }
    let mut found = match guest.kind {
        GuestKind::Proxmox => {
            let config = ProxmoxConfig::parse(&guest.config)?;
            let mut found = join(&config, &fronts);
            found.name.clone_from(&guest.name);
            found.proxmox = Some((guest.config.clone(), config.drives));
            found
        }
        GuestKind::Plain => {
            let mut found = plain_disks(&fronts);
            let description = Description::ask(session, &fronts).await.map_err(|e| GuestError::of_qmp(guest, e))?;
            found.config = description.to_bytes();
            found.name = description.name;
            found
        }
    };
    if found.disks.len() > MAX_DISKS {
        return Err(GuestError::Answer(format!("{} disks", found.disks.len())));
    }
    if let Some(disk) = found.disks.iter().find(|d| d.size > MAX_SIZE) {
        return Err(GuestError::Answer(format!("disk `{}` of {} bytes", disk.name, disk.size)));
    }
    found.archive_config();
    Ok(found)
}

/// Keeps the disks named in `only` (all if it is empty) without those in `skip`.
///
/// # Errors
/// [`GuestError::NoSuchDisk`] for a name that the guest does not have, [`GuestError::NotInQemu`] for a disk of the
/// configuration that is wanted and not there, [`GuestError::NoDisks`] when nothing is left.
pub fn select(mut found: Found, only: &[String], skip: &[String]) -> Result<Found, GuestError> {
    let exists = |name: &String| {
        found.disks.iter().any(|d| d.name == *name || d.device == *name)
            || found.missing.contains(name)
            || found.skipped.iter().any(|(skipped, _)| skipped == name)
    };
    if let Some(name) = only.iter().chain(skip).find(|name| !exists(name)) {
        let known = found.disks.iter().map(|d| d.name.clone()).collect();
        return Err(GuestError::NoSuchDisk { name: name.clone(), known });
    }
    // Asked for by name, a disk must not be passed over for a reason of its own.
    if let Some((name, reason)) = found.skipped.iter().find(|(name, _)| only.contains(name)) {
        return Err(GuestError::Unsuitable { name: name.clone(), reason: reason.clone() });
    }
    let named = |list: &[String], name: &str, device: &str| list.iter().any(|n| n == name || n == device);
    let wanted =
        |name: &str, device: &str| (only.is_empty() || named(only, name, device)) && !named(skip, name, device);
    if let Some(name) = found.missing.iter().find(|name| wanted(name, name)) {
        return Err(GuestError::NotInQemu { name: name.clone() });
    }
    for name in std::mem::take(&mut found.missing) {
        found.skipped.push((name, "QEMU does not have it".into()));
    }
    let (disks, left_out) = found.disks.into_iter().partition(|d| wanted(&d.name, &d.device));
    found.disks = disks;
    found.skipped.extend(left_out.into_iter().map(|disk: Disk| (disk.name, "left out as asked".into())));
    if found.disks.is_empty() {
        return Err(GuestError::NoDisks { skipped: found.skipped });
    }
    found.archive_config();
    Ok(found)
}

impl Found {
    fn archive_config(&mut self) {
        let Some((text, drives)) = &self.proxmox else { return };
        let archived: Vec<&Drive> =
            drives.iter().filter(|d| self.disks.iter().any(|disk| disk.name == d.key)).collect();
        self.config = proxmox_config::archived(text, &archived);
    }
}

/// Joins the drives of a Proxmox configuration with `query-block`.
fn join(config: &ProxmoxConfig, fronts: &[BlockDevice]) -> Found {
    let mut found = Found::default();
    let mut seen = HashSet::new();
    for drive in &config.drives {
        let front = fronts.iter().position(|front| is_front_of(front, &drive.key));
        seen.extend(front);
        if let Some(reason) = drive.excluded {
            found.skipped.push((drive.key.clone(), reason.into()));
            continue;
        }
        if drive.kind == DiskKind::Tpm {
            found.disks.push(tpm(drive));
            continue;
        }
        let front = front.and_then(|at| fronts.get(at));
        match front.and_then(|front| Some((front, front.inserted.as_ref()?))) {
            Some((front, inserted)) => found.disks.push(Disk {
                name: drive.key.clone(),
                kind: drive.kind,
                ..disk(front, inserted, drive.device())
            }),
            None => found.missing.push(drive.key.clone()),
        }
    }
    for (_, front) in fronts.iter().enumerate().filter(|(at, _)| !seen.contains(at)) {
        // UEFI code and the like come without any line in the configuration.
        if front.inserted.as_ref().is_some_and(|inserted| !inserted.ro) {
            found.skipped.push((safe_name(&shown_name(front)), "not in the configuration of the VM".into()));
        }
    }
    found
}

/// Whether a device of QEMU is the drive `key` of a Proxmox VM, started with `-drive` or with `-blockdev`.
fn is_front_of(front: &BlockDevice, key: &str) -> bool {
    let qdev = front.qdev.as_deref().unwrap_or_default();
    let drive = |name: &str| name.strip_prefix("drive-") == Some(key);
    qdev == key
        || peripheral(qdev) == Some(key)
        || (key == "efidisk0" && matches!(qdev, "/machine/system.flash1" | "/machine/virt.flash1"))
        || drive(&front.device)
        || front.inserted.as_ref().is_some_and(|inserted| inserted.node_name.as_deref().is_some_and(&drive))
}

/// `X` of `/machine/peripheral/X/…`: the id of a device whose block front end is a part of it.
fn peripheral(qdev: &str) -> Option<&str> {
    qdev.strip_prefix("/machine/peripheral/")?.split('/').next()
}

fn disk(front: &BlockDevice, inserted: &BlockNode, device: String) -> Disk {
    Disk {
        name: String::new(),
        device,
        kind: DiskKind::Drive,
        qdev: front.qdev.clone().unwrap_or_default(),
        node: inserted.node_name.clone().unwrap_or_default(),
        driver: inserted.drv.clone(),
        size: inserted.image.virtual_size,
        identity: identity(&inserted.file),
        volume: None,
    }
}

/// TPM state has no device in QEMU: it is attached for the backup.
fn tpm(drive: &Drive) -> Disk {
    Disk {
        name: drive.key.clone(),
        device: drive.device(),
        kind: DiskKind::Tpm,
        qdev: String::new(),
        node: drive.device(),
        driver: if drive.format.as_deref() == Some("qcow2") { "qcow2".into() } else { "raw".into() },
        size: drive.size.unwrap_or(TPM_SIZE),
        identity: drive.volume.clone(),
        volume: Some(PathBuf::from(&drive.volume)),
    }
}

/// The disks of a guest of which only QEMU knows: everything that it may write.
fn plain_disks(fronts: &[BlockDevice]) -> Found {
    let mut found = Found::default();
    let mut names = HashSet::new();
    let mut nodes = HashSet::new();
    for front in fronts {
        let name = unique(&safe_name(&shown_name(front)), &mut names);
        let qdev = front.qdev.as_deref().unwrap_or_default();
        let reason = match &front.inserted {
            None => Some("no medium"),
            Some(_) if qdev.is_empty() => Some("not attached to a device"),
            Some(_) if front.tray_open.is_some() => Some("CD-ROM drive"),
            Some(inserted) if inserted.ro => Some("read-only"),
            Some(inserted) if !nodes.insert(inserted.node_name.clone()) => Some("a second device on the same image"),
            Some(_) => None,
        };
        match (reason, &front.inserted) {
            (None, Some(inserted)) => {
                let device = if front.device.is_empty() { name.clone() } else { front.device.clone() };
                let kind = if is_flash(qdev) { DiskKind::Efi } else { DiskKind::Drive };
                found.disks.push(Disk { name, kind, ..disk(front, inserted, device) });
            }
            (reason, _) => found.skipped.push((name, reason.unwrap_or("no medium").into())),
        }
    }
    found
}

/// `/machine/system.flash1`: what a PC's firmware and its variables are on.
fn is_flash(qdev: &str) -> bool {
    flash(qdev).is_some()
}

fn flash(qdev: &str) -> Option<&str> {
    let (machine, number) = qdev.strip_prefix("/machine/")?.split_once(".flash")?;
    (!machine.contains('/') && number.bytes().all(|b| b.is_ascii_digit())).then_some(number)
}

/// The name that people know a device by.
fn shown_name(front: &BlockDevice) -> String {
    let plain = |name: &str| name.strip_prefix("drive-").unwrap_or(name).to_owned();
    let qdev = front.qdev.as_deref().unwrap_or_default();
    let node =
        front.inserted.as_ref().and_then(|i| i.node_name.as_deref()).filter(|n| !n.is_empty() && !n.starts_with('#'));
    if !front.device.is_empty() {
        plain(&front.device)
    } else if let Some(id) = peripheral(qdev) {
        id.to_owned()
    } else if let Some(number) = flash(qdev) {
        format!("pflash{number}")
    } else if !qdev.is_empty() && !qdev.starts_with('/') {
        qdev.to_owned()
    } else if let Some(node) = node {
        plain(node)
    } else {
        qdev.rsplit('/').find(|part| !part.is_empty() && *part != "virtio-backend").unwrap_or("disk").to_owned()
    }
}

/// A name that can be a file's and nothing else.
fn safe_name(name: &str) -> String {
    let safe: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(56)
        .collect();
    if safe.is_empty() { "disk".into() } else { safe }
}

fn unique(name: &str, taken: &mut HashSet<String>) -> String {
    let mut candidate = name.to_owned();
    let mut number = 2;
    while !taken.insert(candidate.clone()) {
        candidate = format!("{name}-{number}");
        number += 1;
    }
    candidate
}

/// What identifies an image: the innermost file of QEMU's `json:{…}` description, without what filters above it add.
/// Credentials in it are left out, as it is written to records and archives.
pub(super) fn identity(file: &str) -> String {
    let Some(Ok(mut value)) = file.strip_prefix("json:").map(serde_json::from_str::<Value>) else {
        return without_credentials(file);
    };
    // The depth of the description is bounded by the JSON parser.
    while let Some(inner) = value.get_mut("file").filter(|inner| inner.is_object()) {
        value = inner.take();
    }
    match value.get("filename").and_then(Value::as_str) {
        Some(name) => without_credentials(name),
        None => value.to_string(),
    }
}

fn without_credentials(name: &str) -> String {
    if let Some((scheme, rest)) = name.split_once("://") {
        let authority = rest.split('/').next().unwrap_or_default();
        if let Some((user, _)) = authority.rsplit_once('@') {
            return format!("{scheme}://{}", &rest[user.len() + 1..]);
        }
    } else if name.starts_with("rbd:") {
        let kept: Vec<&str> = name.split(':').filter(|part| !part.starts_with("key=")).collect();
        return kept.join(":");
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn fronts(value: Value) -> Vec<BlockDevice> {
        serde_json::from_value(value).unwrap()
    }

    fn names(found: &Found) -> Vec<&str> {
        found.disks.iter().map(|d| d.name.as_str()).collect()
    }

    /// As `pve-qemu` 10 with machine version 10.0 answers.
    fn blockdev_vm() -> Vec<BlockDevice> {
        fronts(json!([
            {"device": "", "qdev": "/machine/system.flash0", "locked": false, "removable": false, "type": "unknown",
             "inserted": {"node-name": "pflash0", "drv": "throttle", "ro": true, "file": "/usr/share/OVMF_CODE.fd", "image": {"virtual-size": 3_653_632}}},
            {"device": "", "qdev": "/machine/system.flash1",
             "inserted": {"node-name": "drive-efidisk0", "drv": "throttle", "file": "x", "image": {"virtual-size": 540_672}}},
            {"device": "", "qdev": "scsi0", "inserted": {"node-name": "drive-scsi0", "drv": "throttle", "ro": false,
             "file": "json:{\"throttle-group\": \"throttle-drive-scsi0\", \"driver\": \"throttle\", \"file\": {\"driver\": \"raw\", \"file\": {\"driver\": \"host_device\", \"filename\": \"/dev/pve/vm-100-disk-0\"}}}",
             "image": {"virtual-size": 67_108_864}}},
            {"device": "", "qdev": "/machine/peripheral/virtio2/virtio-backend",
             "inserted": {"node-name": "drive-virtio2", "drv": "throttle", "file": "/x.qcow2", "image": {"virtual-size": 16_777_216}}},
            {"device": "", "qdev": "ide2", "removable": true, "tray_open": false},
            {"device": "", "qdev": "extra0", "inserted": {"node-name": "extra", "drv": "raw", "file": "/e", "image": {"virtual-size": 512}}}
        ]))
    }

    #[test]
    fn the_disks_of_a_blockdev_vm_are_matched_by_device() {
        let config = ProxmoxConfig::parse(
            b"bios: ovmf\nefidisk0: a:e,size=4M\nide2: none,media=cdrom\nscsi0: a:b\nvirtio2: a:c\ntpmstate0: /dev/pve/tpm,size=4M\nscsi3: a:d\nscsi4: a:x,backup=0\n",
        )
        .unwrap();
        let found = join(&config, &blockdev_vm());
        assert_eq!(names(&found), ["scsi0", "virtio2", "efidisk0", "tpmstate0"]);
        assert_eq!(found.missing, ["scsi3"]);
        let skipped: Vec<_> = found.skipped.iter().map(|(n, r)| (n.as_str(), r.as_str())).collect();
        assert_eq!(
            skipped,
            [
                ("ide2", "CD-ROM drive"),
                ("scsi4", "backup=0 in the configuration"),
                ("extra0", "not in the configuration of the VM")
            ]
        );
        let [scsi0, virtio2, efi, tpm] = &found.disks[..] else { panic!("{:?}", found.disks) };
        assert_eq!(
            (scsi0.device.as_str(), scsi0.node.as_str(), scsi0.size),
            ("drive-scsi0", "drive-scsi0", 67_108_864)
        );
        assert_eq!(scsi0.identity, "/dev/pve/vm-100-disk-0");
        assert_eq!(virtio2.qdev, "/machine/peripheral/virtio2/virtio-backend");
        assert_eq!((efi.kind, efi.size), (DiskKind::Efi, 540_672));
        assert_eq!((tpm.kind, tpm.device.as_str()), (DiskKind::Tpm, "drive-tpmstate0-backup"));
        assert_eq!(tpm.volume.as_deref(), Some(std::path::Path::new("/dev/pve/tpm")));
    }

    #[test]
    fn the_disks_of_a_drive_vm_are_matched_and_keep_their_generated_nodes() {
        let config = ProxmoxConfig::parse(b"scsi0: a:b\nscsi1: a:c\n").unwrap();
        let found = join(
            &config,
            &fronts(json!([
                {"device": "drive-scsi1", "qdev": "scsi1", "inserted": {"node-name": "#block331", "drv": "qcow2", "image": {"virtual-size": 1}}},
                {"device": "drive-scsi0", "qdev": "scsi0", "inserted": {"node-name": "#block157", "drv": "raw", "image": {"virtual-size": 2}}}
            ])),
        );
        assert_eq!(names(&found), ["scsi0", "scsi1"]);
        assert_eq!(found.disks[0].node, "#block157");
        assert_eq!(found.disks[0].device, "drive-scsi0");
        assert!(found.missing.is_empty() && found.skipped.is_empty());
    }

    #[test]
    fn scsi1_is_not_taken_for_scsi10() {
        let config = ProxmoxConfig::parse(b"scsi1: a:b\n").unwrap();
        let found = join(
            &config,
            &fronts(json!([{"qdev": "scsi10", "device": "drive-scsi10",
                "inserted": {"node-name": "drive-scsi10", "image": {"virtual-size": 1}}}])),
        );
        assert_eq!(found.missing, ["scsi1"]);
    }

    #[test]
    fn everything_a_plain_guest_may_write_is_a_disk() {
        let found = plain_disks(&fronts(json!([
            {"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "inserted": {"node-name": "n0", "drv": "qcow2", "image": {"virtual-size": 1}}},
            {"device": "drive-sd", "qdev": "sd0", "inserted": {"node-name": "#block1", "drv": "raw", "image": {"virtual-size": 2}}},
            {"device": "", "qdev": "/machine/system.flash0", "inserted": {"node-name": "code", "drv": "raw", "ro": true, "image": {"virtual-size": 3}}},
            {"device": "", "qdev": "/machine/system.flash1", "inserted": {"node-name": "vars", "drv": "raw", "image": {"virtual-size": 4}}},
            {"device": "ide1-cd0", "qdev": "/machine/unattached/device[23]", "removable": true, "tray_open": false},
            {"device": "cd", "qdev": "cd", "removable": true, "tray_open": false, "inserted": {"node-name": "iso", "image": {"virtual-size": 5}}},
            {"device": "spare", "removable": true, "inserted": {"node-name": "spare", "image": {"virtual-size": 6}}},
            {"device": "", "qdev": "/machine/peripheral-anon/device[0]/virtio-backend", "inserted": {"node-name": "drive-../x", "drv": "raw", "image": {"virtual-size": 7}}},
            {"device": "", "qdev": "multi", "inserted": {"node-name": "n0", "drv": "qcow2", "image": {"virtual-size": 1}}},
            {"device": "", "qdev": "/machine/peripheral-anon/device[1]/virtio-backend", "inserted": {"node-name": "#block7", "drv": "raw", "image": {"virtual-size": 8}}},
            {"device": "sd", "qdev": "sd1", "inserted": {"node-name": "#block9", "drv": "raw", "image": {"virtual-size": 9}}}
        ])));
        assert_eq!(names(&found), ["vda", "sd", "pflash1", "x", "device_1_", "sd-2"]);
        assert_eq!(found.disks[2].kind, DiskKind::Efi);
        assert_eq!(found.disks[1].device, "drive-sd");
        let skipped: Vec<_> = found.skipped.iter().map(|(n, r)| (n.as_str(), r.as_str())).collect();
        assert_eq!(
            skipped,
            [
                ("pflash0", "read-only"),
                ("ide1-cd0", "no medium"),
                ("cd", "CD-ROM drive"),
                ("spare", "not attached to a device"),
                ("multi", "a second device on the same image")
            ]
        );
    }

    #[test]
    fn an_identity_is_the_innermost_file_without_credentials() {
        assert_eq!(identity("/images/a.raw"), "/images/a.raw");
        assert_eq!(identity(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}"#), "/a");
        assert_eq!(
            identity(r#"json:{"driver":"raw","file":{"driver":"rbd","pool":"p","image":"i"}}"#),
            r#"{"driver":"rbd","image":"i","pool":"p"}"#
        );
        assert_eq!(identity("nbd://user:secret@host/disk@1"), "nbd://host/disk@1");
        assert_eq!(identity("rbd:p/i:id=admin:key=secret:conf=/c"), "rbd:p/i:id=admin:conf=/c");
        assert_eq!(identity("json:{broken"), "json:{broken");
    }

    fn proxmox_found() -> Found {
        let text = b"scsi0: a:b\nvirtio2: a:c\nscsi3: a:d\nscsi4: a:x,backup=0\n".to_vec();
        let config = ProxmoxConfig::parse(&text).unwrap();
        let mut found = join(&config, &blockdev_vm());
        found.proxmox = Some((text, config.drives));
        found.archive_config();
        found
    }

    #[test]
    fn a_disk_that_qemu_does_not_have_is_an_error_unless_left_out() {
        let name = |n: &str| vec![n.to_owned()];
        assert!(matches!(select(proxmox_found(), &[], &[]), Err(GuestError::NotInQemu { name }) if name == "scsi3"));
        let chosen = select(proxmox_found(), &[], &name("scsi3")).unwrap();
        assert_eq!(names(&chosen), ["scsi0", "virtio2"]);
        assert!(chosen.skipped.contains(&("scsi3".into(), "QEMU does not have it".into())));
        assert_eq!(names(&select(proxmox_found(), &name("drive-virtio2"), &[]).unwrap()), ["virtio2"]);
    }

    #[test]
    fn the_archived_configuration_maps_only_the_chosen_disks() {
        let chosen = select(proxmox_found(), &["virtio2".into()], &[]).unwrap();
        let text = String::from_utf8(chosen.config).unwrap();
        assert!(text.ends_with("backup=0\n#qmdump#map:virtio2:drive-virtio2:a:raw:\n"), "{text}");
        assert!(chosen.skipped.contains(&("scsi0".into(), "left out as asked".into())));
    }

    #[test]
    fn names_that_do_not_exist_or_cannot_be_are_errors() {
        let name = |n: &str| vec![n.to_owned()];
        let unknown = select(proxmox_found(), &[], &name("scsi9")).unwrap_err();
        assert_eq!(unknown.to_string(), "no disk `scsi9`; there are: scsi0, virtio2");
        assert!(matches!(select(proxmox_found(), &name("scsi4"), &[]), Err(GuestError::Unsuitable { .. })));
        let all = ["scsi0", "virtio2", "scsi3"].map(str::to_owned);
        assert!(matches!(select(proxmox_found(), &[], &all), Err(GuestError::NoDisks { .. })));
    }

    proptest! {
        #[test]
        fn shown_names_are_unique_and_safe(
            devices in prop::collection::vec(("[ -~é]{0,12}", prop::option::of("[ -~é/]{0,80}"), prop::option::of("[ -~#é]{0,70}")), 0..12)
        ) {
            let fronts: Vec<BlockDevice> = devices.iter().map(|(device, qdev, node)| BlockDevice {
                device: device.clone(),
                qdev: qdev.clone(),
                inserted: node.clone().map(|node_name| BlockNode { node_name: Some(node_name), ..BlockNode::default() }),
                ..BlockDevice::default()
            }).collect();
            let found = plain_disks(&fronts);
            let names: Vec<&String> = found.disks.iter().map(|d| &d.name).chain(found.skipped.iter().map(|(n, _)| n)).collect();
            prop_assert_eq!(names.len(), fronts.len());
            prop_assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
            for name in names {
                prop_assert!(name.len() <= 64 && name.as_bytes()[0].is_ascii_alphanumeric() && !name.contains('/'));
            }
        }

        #[test]
        fn any_file_name_has_an_identity(file in "(json:)?[ -~]{0,60}") {
            let _ = identity(&file);
        }
    }
}
