//! Configuration files of Proxmox VE's VMs: `/etc/pve/qemu-server/VMID.conf`.
//!
//! Only the main section tells what runs: `[PENDING]`, `[special:…]` and snapshot sections follow it and are passed over.
//! A line that we do not need may be anything; a drive that cannot be understood is an error, because leaving a disk out
//! unnoticed is worse than no backup.

use super::{DiskKind, GuestError};

/// What a configuration says that matters to a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxmoxConfig {
    /// `name`.
    pub name: Option<String>,
    /// `lock`: something else is at work on the VM.
    pub lock: Option<String>,
    /// `template`.
    pub template: bool,
    /// `agent`.
    pub agent: Agent,
    /// Every drive, CD-ROMs and unused volumes too, in Proxmox's order.
    pub drives: Vec<Drive>,
}

/// What the `agent` option says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Agent {
    /// No guest agent.
    #[default]
    Off,
    /// There is one, but file systems must not be frozen (`freeze-fs=0`).
    NoFreeze,
    /// There is one, and it may freeze file systems.
    On,
}

/// One drive of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// `scsi0`, `efidisk0`, …
    pub key: String,
    /// Volume id or path.
    pub volume: String,
    /// What it is for.
    pub kind: DiskKind,
    /// `size` in bytes. Informational only: QEMU knows better.
    pub size: Option<u64>,
    /// Image format: `format`, or what the volume's name ends in.
    pub format: Option<String>,
    /// Why it is no part of a backup.
    pub excluded: Option<&'static str>,
}

impl Drive {
    /// Id of the storage; none for an absolute path.
    pub fn storage(&self) -> Option<&str> {
        if self.volume.starts_with('/') { None } else { self.volume.split_once(':').map(|(storage, _)| storage) }
    }

    /// QEMU's name of the device while it is backed up.
    pub fn device(&self) -> String {
        match self.kind {
            DiskKind::Tpm => format!("drive-{}-backup", self.key),
            DiskKind::Drive | DiskKind::Efi => format!("drive-{}", self.key),
        }
    }
}

/// Keys of drives that can be backed up, with the number of the last: in Proxmox's order.
const BUSES: [(&str, usize); 6] =
    [("ide", 3), ("scsi", 30), ("virtio", 15), ("sata", 5), ("efidisk", 0), ("tpmstate", 0)];
const UNUSED: (&str, usize) = ("unused", 255);

/// Bus and number of a drive's key. No leading zeros, as `scsi00` is no key of Proxmox's.
fn drive_key(key: &str) -> Option<(usize, usize)> {
    let digits = key.find(|c: char| c.is_ascii_digit())?;
    let (bus, number) = key.split_at(digits);
    if number.len() > 3 || (number.len() > 1 && number.starts_with('0')) {
        return None;
    }
    let number: usize = number.parse().ok()?;
    let place = BUSES.iter().chain([&UNUSED]).position(|(name, last)| *name == bus && number <= *last)?;
    Some((place, number))
}

/// Whether a line begins a section, which ends the one before.
fn is_section(line: &[u8]) -> bool {
    let line = line.trim_ascii_end();
    line.starts_with(b"[") && line.ends_with(b"]")
}

/// The lines of the main section, each with its line end.
fn main_section(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|b| *b == b'\n').take_while(|line| !is_section(line))
}

/// Proxmox's booleans.
fn boolean(text: &str) -> Option<bool> {
    let is = |words: [&str; 4]| words.iter().any(|w| text.eq_ignore_ascii_case(w));
    if is(["1", "on", "yes", "true"]) {
        Some(true)
    } else if is(["0", "off", "no", "false"]) {
        Some(false)
    } else {
        None
    }
}

/// `32G`, `528K`, `4M`, `1.5T`, or bytes.
fn size(text: &str) -> Option<u64> {
    let (number, factor) = match text.char_indices().last()? {
        (at, 'K') => (&text[..at], 1_u64 << 10),
        (at, 'M') => (&text[..at], 1 << 20),
        (at, 'G') => (&text[..at], 1 << 30),
        (at, 'T') => (&text[..at], 1 << 40),
        _ => (text, 1),
    };
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    match number.parse::<u64>() {
        Ok(number) => number.checked_mul(factor),
        Err(_) => number.parse::<f64>().ok().map(|n| n * factor as f64).filter(|n| *n < 9e18).map(|n| n as u64),
    }
}

/// A property string: a first item without name, then `name=value`, separated by commas.
struct Properties<'a> {
    first: Option<&'a str>,
    named: Vec<(&'a str, &'a str)>,
}

impl<'a> Properties<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let mut properties = Self { first: None, named: Vec::new() };
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                Some((name, value)) => properties.named.push((name.trim(), value.trim())),
                None if properties.first.is_none() => properties.first = Some(part),
                None => return Err(format!("`{part}` has no name")),
            }
        }
        Ok(properties)
    }

    fn get(&self, names: &[&str]) -> Option<&'a str> {
        self.named.iter().find(|(name, _)| names.contains(name)).map(|(_, value)| *value)
    }

    fn boolean(&self, names: &[&str]) -> Result<Option<bool>, String> {
        self.get(names)
            .map(|value| boolean(value).ok_or_else(|| format!("`{}={value}` is no boolean", names[0])))
            .transpose()
    }
}

fn drive(key: &str, place: usize, value: &str) -> Result<Drive, String> {
    let properties = Properties::parse(value)?;
    let volume = properties
        .first
        .or_else(|| properties.get(&["file", "volume"]))
        .ok_or_else(|| "it names no volume".to_owned())?
        .to_owned();
    let (bus, _) = BUSES.get(place).unwrap_or(&UNUSED);
    let kind = match *bus {
        "efidisk" => DiskKind::Efi,
        "tpmstate" => DiskKind::Tpm,
        _ => DiskKind::Drive,
    };
    let cdrom = properties.get(&["media"]) == Some("cdrom") || volume == "none" || volume == "cdrom";
    let excluded = if *bus == UNUSED.0 {
        Some("not attached to the VM")
    } else if volume.rsplit([':', '/']).next().is_some_and(is_cloud_init) {
        Some("cloud-init drive, made from the configuration")
    } else if cdrom {
        Some("CD-ROM drive")
    } else if properties.boolean(&["backup"])? == Some(false) {
        Some("backup=0 in the configuration")
    } else {
        None
    };
    let extension = || {
        let (_, extension) = volume.rsplit_once('.')?;
        matches!(extension, "raw" | "qcow2" | "vmdk").then_some(extension)
    };
    let format = properties.get(&["format"]).or_else(extension).map(str::to_owned);
    let size = properties.get(&["size"]).and_then(size);
    Ok(Drive { key: key.to_owned(), volume, kind, size, format, excluded })
}

/// `vm-100-cloudinit`, `vm-100-cloudinit.qcow2`.
fn is_cloud_init(name: &str) -> bool {
    let Some((number, rest)) = name.strip_prefix("vm-").and_then(|rest| rest.split_once('-')) else { return false };
    let rest = rest.split_once('.').map_or(rest, |(stem, _)| stem);
    rest == "cloudinit" && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
}

impl ProxmoxConfig {
    /// Reads the main section.
    ///
    /// # Errors
    /// [`GuestError::Config`] names the line of a drive, or of another option that we act on, that cannot be understood.
    pub fn parse(text: &[u8]) -> Result<Self, GuestError> {
        let mut config = Self::default();
        let mut ovmf = false;
        let mut drives: Vec<((usize, usize), Drive)> = Vec::new();
        for (number, line) in main_section(text).enumerate() {
            let bad = |what: String| GuestError::Config { line: number + 1, what };
            let line = String::from_utf8_lossy(line);
            let line = line.trim_end();
            if line.starts_with('#') {
                continue;
            }
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim_start();
            match key {
                "name" => config.name = Some(value.to_owned()),
                "lock" => config.lock = Some(value.to_owned()),
                "template" => config.template = boolean(value).ok_or_else(|| bad(format!("template: `{value}`")))?,
                "bios" => ovmf = value == "ovmf",
                "agent" => config.agent = Agent::parse(value).map_err(|what| bad(format!("agent: {what}")))?,
                _ => {
                    let Some(place) = drive_key(key) else { continue };
                    let drive = drive(key, place.0, value).map_err(|what| bad(format!("{key}: {what}")))?;
                    if drives.iter().any(|(at, _)| *at == place) {
                        return Err(bad(format!("{key} is there twice")));
                    }
                    drives.push((place, drive));
                }
            }
        }
        drives.sort_by_key(|(place, _)| *place);
        config.drives = drives.into_iter().map(|(_, drive)| drive).collect();
        for drive in config.drives.iter_mut().filter(|d| d.kind == DiskKind::Efi && !ovmf) {
            drive.excluded.get_or_insert("bios is not ovmf");
        }
        Ok(config)
    }
}

impl Agent {
    fn parse(value: &str) -> Result<Self, String> {
        let properties = Properties::parse(value)?;
        let enabled = properties.first.or_else(|| properties.get(&["enabled"])).unwrap_or("0");
        let enabled = boolean(enabled).ok_or_else(|| format!("`{enabled}` is no boolean"))?;
        let freeze = properties.boolean(&["freeze-fs", "freeze-fs-on-backup", "guest-fsfreeze"])?.unwrap_or(true);
        Ok(match (enabled, freeze) {
            (false, _) => Self::Off,
            (true, false) => Self::NoFreeze,
            (true, true) => Self::On,
        })
    }
}

/// The configuration as vzdump archives it: the main section, byte for byte, without unused volumes, lock and parent,
/// then one line for every drive in the backup, which tells a restore what the device names mean.
pub fn archived(text: &[u8], drives: &[&Drive]) -> Vec<u8> {
    let dropped = |line: &[u8]| {
        let unused = line.strip_prefix(b"unused").is_some_and(|rest| {
            let rest = rest.trim_ascii_start();
            let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
            digits > 0 && rest.get(digits) == Some(&b':')
        });
        unused || [&b"#vzdump#"[..], b"#qmdump#", b"lock:", b"parent:"].iter().any(|start| line.starts_with(start))
    };
    let mut archived: Vec<u8> = main_section(text).filter(|line| !dropped(line)).flatten().copied().collect();
    if !archived.is_empty() && !archived.ends_with(b"\n") {
        archived.push(b'\n');
    }
    let mut drives = drives.to_vec();
    drives.sort_by(|a, b| a.key.cmp(&b.key));
    for drive in drives {
        // A volume whose name tells no format is one of a block storage.
        let (storage, default_format) = drive.storage().map_or(("", ""), |storage| (storage, "raw"));
        let format = drive.format.as_deref().unwrap_or(default_format);
        archived.extend_from_slice(
            format!("#qmdump#map:{}:{}:{storage}:{format}:\n", drive.key, drive.device()).as_bytes(),
        );
    }
    archived
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WEB: &[u8] = b"#web server\n#scsi9: not a disk\nagent: 1,freeze-fs=1\nbios: ovmf\nboot: order=scsi0\n\
        efidisk0: local-lvm:vm-100-disk-1,efitype=4m,pre-enrolled-keys=1,size=4M\nide2: local-lvm:vm-100-cloudinit,media=cdrom\n\
        lock: backup\nmachine: q35\nname: web\nparent: before-upgrade\nsata0: none,media=cdrom\n\
        scsi0: local-lvm:vm-100-disk-0,discard=on,iothread=1,size=32G\nscsi10: local:100/vm-100-disk-5.qcow2,size=1.5G\n\
        scsi1: tank:vm-100-disk-2,backup=0,size=100G\nscsi2: /dev/sdb,backup=yes\nscsihw: virtio-scsi-single\n\
        tpmstate0: local-lvm:vm-100-disk-3,size=4M,version=v2.0\nunused0: local-lvm:vm-100-disk-9\n\n\
        [special:fleecing]\nfleecing-images: local-lvm:vm-100-fleece-0\n\n[before-upgrade]\nscsi5: local-lvm:gone\nname: old\n";

    fn included(config: &ProxmoxConfig) -> Vec<&str> {
        config.drives.iter().filter(|d| d.excluded.is_none()).map(|d| d.key.as_str()).collect()
    }

    fn excluded(config: &ProxmoxConfig, key: &str) -> Option<&'static str> {
        config.drives.iter().find(|d| d.key == key).unwrap().excluded
    }

    #[test]
    fn only_the_main_section_counts_and_drives_come_in_proxmox_order() {
        let config = ProxmoxConfig::parse(WEB).unwrap();
        assert_eq!(config.name.as_deref(), Some("web"));
        assert_eq!(config.lock.as_deref(), Some("backup"));
        assert_eq!(config.agent, Agent::On);
        assert!(!config.template);
        assert_eq!(included(&config), ["scsi0", "scsi2", "scsi10", "efidisk0", "tpmstate0"]);
        assert_eq!(excluded(&config, "scsi1"), Some("backup=0 in the configuration"));
        assert_eq!(excluded(&config, "ide2"), Some("cloud-init drive, made from the configuration"));
        assert_eq!(excluded(&config, "sata0"), Some("CD-ROM drive"));
        assert_eq!(excluded(&config, "unused0"), Some("not attached to the VM"));
        let scsi10 = config.drives.iter().find(|d| d.key == "scsi10").unwrap();
        assert_eq!((scsi10.storage(), scsi10.format.as_deref()), (Some("local"), Some("qcow2")));
        assert_eq!(scsi10.size, Some(3 << 29));
        assert_eq!(config.drives.iter().find(|d| d.key == "scsi2").unwrap().storage(), None);
    }

    #[test]
    fn the_archived_form_keeps_every_byte_but_what_a_restore_must_not_see() {
        let config = ProxmoxConfig::parse(WEB).unwrap();
        let drives: Vec<&Drive> = config.drives.iter().filter(|d| d.excluded.is_none()).collect();
        let text = String::from_utf8(archived(WEB, &drives)).unwrap();
        assert!(text.starts_with("#web server\n#scsi9: not a disk\nagent: 1,freeze-fs=1\n"));
        for gone in ["unused0", "lock:", "parent:", "[special", "scsi5", "fleecing", "old"] {
            assert!(!text.contains(gone), "{gone} is still in {text}");
        }
        assert!(text.contains("scsi1: tank:vm-100-disk-2,backup=0,size=100G\n"), "a disk left out stays a line");
        assert!(text.ends_with(
            "#qmdump#map:efidisk0:drive-efidisk0:local-lvm:raw:\n#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n\
             #qmdump#map:scsi10:drive-scsi10:local:qcow2:\n#qmdump#map:scsi2:drive-scsi2:::\n\
             #qmdump#map:tpmstate0:drive-tpmstate0-backup:local-lvm:raw:\n"
        ));
        let again = String::from_utf8(archived(text.as_bytes(), &drives)).unwrap();
        assert_eq!(again, text, "map lines of a restored configuration do not pile up");
        let no_newline = archived(b"name: a\xff", &drives[..1]);
        assert_eq!(no_newline, b"name: a\xff\n#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n");
    }

    #[test]
    fn an_efi_disk_counts_only_with_ovmf() {
        let seabios = ProxmoxConfig::parse(b"efidisk0: a:b\nscsi0: a:c\n").unwrap();
        assert_eq!(included(&seabios), ["scsi0"]);
        assert_eq!(excluded(&seabios, "efidisk0"), Some("bios is not ovmf"));
        assert_eq!(included(&ProxmoxConfig::parse(b"efidisk0: a:b\nbios: ovmf\n").unwrap()), ["efidisk0"]);
    }

    #[test]
    fn the_agent_option_has_many_spellings() {
        let agent = |value: &str| ProxmoxConfig::parse(format!("agent: {value}\n").as_bytes()).map(|c| c.agent);
        assert_eq!(agent("1").unwrap(), Agent::On);
        assert_eq!(agent("0").unwrap(), Agent::Off);
        assert_eq!(agent("enabled=1,fstrim_cloned_disks=1,type=virtio").unwrap(), Agent::On);
        assert_eq!(agent("1,freeze-fs-on-backup=0").unwrap(), Agent::NoFreeze);
        assert_eq!(agent("enabled=yes,guest-fsfreeze=off").unwrap(), Agent::NoFreeze);
        assert_eq!(agent("on,freeze-fs=no").unwrap(), Agent::NoFreeze);
        assert_eq!(agent("fstrim_cloned_disks=1").unwrap(), Agent::Off);
        assert!(agent("maybe").is_err());
        assert!(agent("1,freeze-fs=perhaps").is_err());
        assert_eq!(ProxmoxConfig::parse(b"").unwrap().agent, Agent::Off);
    }

    #[test]
    fn every_spelling_of_backup_is_understood_and_anything_else_is_an_error() {
        let parse = |value: &str| ProxmoxConfig::parse(format!("x: y\nscsi0: a:b,backup={value}\n").as_bytes());
        for yes in ["1", "on", "yes", "true", "On"] {
            assert_eq!(included(&parse(yes).unwrap()), ["scsi0"]);
        }
        for no in ["0", "off", "no", "false", "FALSE"] {
            assert!(included(&parse(no).unwrap()).is_empty());
        }
        let error = parse("maybe").unwrap_err();
        assert_eq!(error.to_string(), "line 2 of the configuration: scsi0: `backup=maybe` is no boolean");
    }

    #[test]
    fn keys_outside_proxmox_ranges_are_no_drives() {
        let text = b"ide4: a:b\nscsi31: a:b\nvirtio16: a:b\nsata6: a:b\nefidisk1: a:b\ntpmstate1: a:b\nscsi00: a:b\n\
            scsi01: a:b\nscsihw: virtio-scsi-pci\nnet0: virtio=AA\nvirtio15: a:b\nscsi30: a:b\nide3: a:b\nsata5: a:b\n";
        assert_eq!(included(&ProxmoxConfig::parse(text).unwrap()), ["ide3", "scsi30", "virtio15", "sata5"]);
    }

    #[test]
    fn a_drive_that_cannot_be_understood_is_an_error_with_its_line() {
        for (text, line) in [
            (&b"scsi0: \n"[..], 1),
            (b"name: x\nscsi0: backup=1\n", 2),
            (b"scsi0: a:b,c:d\n", 1),
            (b"scsi0: a:b\nname: x\nscsi0: a:c\n", 3),
            (b"template: maybe\n", 1),
        ] {
            match ProxmoxConfig::parse(text) {
                Err(GuestError::Config { line: at, .. }) => assert_eq!(at, line),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_volume_may_be_named_and_anywhere() {
        let config = ProxmoxConfig::parse(b"scsi0: size=4M,file=a:b\nvirtio0: volume=c:d,format=raw\n").unwrap();
        assert_eq!(config.drives[0].volume, "a:b");
        assert_eq!(config.drives[0].size, Some(4 << 20));
        assert_eq!(config.drives[1].format.as_deref(), Some("raw"));
    }

    #[test]
    fn cdroms_and_cloud_init_are_recognised_by_value() {
        for (value, reason) in [
            ("none", "CD-ROM drive"),
            ("cdrom", "CD-ROM drive"),
            ("local:iso/debian.iso,media=cdrom", "CD-ROM drive"),
            ("local:100/vm-100-cloudinit.qcow2,media=cdrom", "cloud-init drive, made from the configuration"),
        ] {
            let config = ProxmoxConfig::parse(format!("ide2: {value}\n").as_bytes()).unwrap();
            assert_eq!(excluded(&config, "ide2"), Some(reason), "{value}");
        }
        assert_eq!(included(&ProxmoxConfig::parse(b"ide2: local:vm-100-cloudinitial\n").unwrap()), ["ide2"]);
    }

    #[test]
    fn a_template_and_windows_line_ends_are_understood() {
        let config =
            ProxmoxConfig::parse(b"template: 1\r\nname: t\r\nscsi0: a:b,backup=0\r\n[snap]\r\nscsi1: a:c\r\n").unwrap();
        assert!(config.template);
        assert_eq!(config.name.as_deref(), Some("t"));
        assert_eq!(config.drives.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_configuration(text in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(config) = ProxmoxConfig::parse(&text) {
                let _ = archived(&text, &config.drives.iter().collect::<Vec<_>>());
            }
        }

        #[test]
        fn any_lines_of_the_right_form_are_an_error_or_keep_every_disk(
            lines in prop::collection::vec(("(ide|scsi|virtio|sata|unused|efidisk|agent|[a-z]{1,5})[0-9]{0,3}", "[ -~é]{0,40}"), 0..20)
        ) {
            let text = lines.iter().map(|(k, v)| format!("{k}: {v}")).collect::<Vec<_>>().join("\n");
            if let Ok(config) = ProxmoxConfig::parse(text.as_bytes()) {
                let keys = lines.iter().filter(|(k, _)| drive_key(k).is_some()).count();
                prop_assert_eq!(config.drives.len(), keys);
            }
        }

        #[test]
        fn a_size_never_overflows(text in "[0-9.]{0,30}[KMGTé]?") {
            let _ = size(&text);
        }
    }
}
