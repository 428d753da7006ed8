//! What a Proxmox VE node looks like on disk, below a root of its own.

use super::disk::{Bus, DiskSpec, Io};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// The root directory of a pretended Proxmox VE node with one virtual machine.
#[derive(Clone, Debug)]
pub struct ProxmoxRoot {
    root: PathBuf,
    vmid: u32,
}

impl ProxmoxRoot {
    /// Lays the root out. Storage `local` (type dir) lies at `storage`; `local-lvm` (type lvmthin) beside it, with sizes rounded up
    /// to 4 MiB as there.
    pub fn create(root: &Path, vmid: u32, storage: &Path) -> Self {
        let this = Self { root: root.to_owned(), vmid };
        for directory in [
            "etc/pve/nodes/rig/qemu-server",
            "etc/pve/firewall",
            "run/qemu-server",
            "run/lock/qemu-server",
            "var/lib",
            "var/log/vzdump",
            "bin",
        ] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        symlink("nodes/rig/qemu-server", root.join("etc/pve/qemu-server")).unwrap();
        symlink("nodes/rig", root.join("etc/pve/local")).unwrap();
        symlink("../run", root.join("var/run")).unwrap();
        symlink("../run/lock", root.join("var/lock")).unwrap();
        let storages = format!(
            "dir: local\n\tpath {}\n\tcontent images,backup\n\nlvmthin: local-lvm\n\tthinpool data\n\tvgname pve\n\tcontent images\n",
            storage.display()
        );
        fs::write(root.join("etc/pve/storage.cfg"), storages).unwrap();
        fs::write(this.firewall(), "[OPTIONS]\n\nenable: 1\n\n[RULES]\n\nIN SSH(ACCEPT) -log nolog\n").unwrap();
        let lvm = storage.with_file_name("lvm");
        fs::create_dir_all(&lvm).unwrap();
        let script = PVESM
            .replace("@LOCAL@", &storage.display().to_string())
            .replace("@LVM@", &lvm.display().to_string())
            .replace("@LOG@", &root.join("pvesm.log").display().to_string());
        fs::write(this.pvesm(), script).unwrap();
        fs::set_permissions(this.pvesm(), fs::Permissions::from_mode(0o755)).unwrap();
        this
    }

    /// Writes the machine's configuration.
    pub fn write_config(
        &self,
        disks: &[DiskSpec],
        volids: &[String],
        agent: bool,
        memory_mib: u32,
        further: &[String],
    ) {
        let mut lines = vec![
            format!("cores: 1\nmemory: {memory_mib}\nname: rig{}\nostype: l26", self.vmid),
            format!("smbios1: uuid=5e1f0000-0000-4000-8000-{:012}", self.vmid),
        ];
        if agent {
            lines.push("agent: 1".into());
        }
        let single = disks.iter().any(|disk| disk.bus == Bus::VirtioScsi && disk.io == Io::Thread);
        lines.push(format!("scsihw: {}", if single { "virtio-scsi-single" } else { "virtio-scsi-pci" }));
        if let Some(first) = disks.first() {
            lines.push(format!("boot: order={}", first.name));
        }
        for (disk, volid) in disks.iter().zip(volids) {
            let iothread = if disk.io == Io::Thread { ",iothread=1" } else { "" };
            lines.push(format!("{}: {volid},discard=on{iothread},size={}", disk.name, shown_size(disk.size)));
        }
        // Proxmox sorts the keys; sections come after all of them.
        let (sections, keys): (Vec<&String>, Vec<&String>) =
            further.iter().partition(|line| line.starts_with('[') || line.contains('\n'));
        lines.extend(keys.into_iter().cloned());
        lines.sort();
        lines.extend(sections.into_iter().cloned());
        fs::write(self.config(), lines.join("\n") + "\n").unwrap();
    }

    pub fn path(&self) -> &Path {
        &self.root
    }

    pub fn vmid(&self) -> u32 {
        self.vmid
    }

    pub fn config(&self) -> PathBuf {
        self.root.join(format!("etc/pve/qemu-server/{}.conf", self.vmid))
    }

    pub fn firewall(&self) -> PathBuf {
        self.root.join(format!("etc/pve/firewall/{}.fw", self.vmid))
    }

    /// A file of the running machine: `qmp`, `qga`, `pid`.
    pub fn runtime(&self, kind: &str) -> PathBuf {
        self.root.join(format!("run/qemu-server/{}.{kind}", self.vmid))
    }

    /// The storage program.
    pub fn pvesm(&self) -> PathBuf {
        self.root.join("bin/pvesm")
    }

    /// The calls of the storage program, a line each.
    pub fn pvesm_calls(&self) -> Vec<String> {
        let log = fs::read_to_string(self.root.join("pvesm.log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

fn shown_size(bytes: u64) -> String {
    let units = [(1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    let unit = units.iter().find(|(unit, _)| bytes.is_multiple_of(*unit));
    unit.map_or_else(|| bytes.to_string(), |(unit, letter)| format!("{}{letter}", bytes / unit))
}

const PVESM: &str = r#"#!/bin/sh
# pvesm of the test rig: alloc, path, free, list and status on two directories.
local='@LOCAL@'
lvm='@LVM@'
printf '%s\n' "$*" >>'@LOG@'
fail() { echo "$1" >&2; exit 255; }
path_of() {
    case $1 in
        local:*/*) echo "$local/images/${1#local:}" ;;
        local-lvm:*) echo "$lvm/${1#local-lvm:}" ;;
        *) fail "unable to parse volume ID '$1'" ;;
    esac
}
command=$1
[ $# -gt 0 ] && shift
format=
words=
while [ $# -gt 0 ]; do
    case $1 in
        --format|-format) format=$2; shift ;;
        --format=*) format=${1#*=} ;;
        --*) shift ;;
        *) words="$words|$1" ;;
    esac
    shift
done
IFS='|'
set -f
set -- ${words#|}
unset IFS
case $command in
    alloc)
        [ $# -eq 4 ] || fail "400 not enough arguments"
        storage=$1 vmid=$2 name=$3 size=$4
        case $size in
            *G) kib=$((${size%G} * 1048576)) ;;
            *M) kib=$((${size%M} * 1024)) ;;
            *K) kib=${size%K} ;;
            *[!0-9]*|'') fail "400 Parameter verification failed. size: value does not match the regex pattern" ;;
            *) kib=$size ;;
        esac
        case $name in "vm-$vmid-"*|'') ;; *) fail "illegal name '$name' - should be 'vm-$vmid-*'" ;; esac
        case $storage in
            local)
                case $name in *.qcow2) ext=qcow2 ;; *.raw) ext=raw ;; *) fail "unable to parse volume filename '$name'" ;; esac
                [ -z "$format" ] || [ "$format" = "$ext" ] || fail "illegal name '$name' - wrong extension for format ('$ext != '$format')"
                volid="local:$vmid/$name"
                file=$(path_of "$volid")
                [ -e "$file" ] && fail "disk image '$file' already exists"
                mkdir -p "$(dirname "$file")"
                qemu-img create -f "$ext" "$file" "${kib}K" || fail "unable to create image" ;;
            local-lvm)
                [ -z "$format" ] || [ "$format" = raw ] || fail "unsupported format '$format'"
                volid="local-lvm:$name"
                file=$(path_of "$volid")
                [ -e "$file" ] && fail "lvcreate 'pve/$name' error: Logical Volume \"$name\" already exists in volume group \"pve\""
                truncate -s "$(((kib + 4095) / 4096 * 4096))K" "$file" || fail "lvcreate failed" ;;
            *) fail "storage '$storage' does not exist" ;;
        esac
        echo "successfully created '$volid'" ;;
    path) path_of "$1" ;;
    free)
        file=$(path_of "$1") || exit 255
        [ -e "$file" ] || fail "volume '$1' does not exist"
        rm -f "$file"
        echo "Removed volume '$1'" ;;
    list)
        echo "Volid Format Type Size VMID"
        case $1 in
            local) (cd "$local/images" && for file in */vm-*; do [ -e "$file" ] && echo "local:$file ${file##*.} images $(stat -c %s "$file") ${file%%/*}"; done) ;;
            local-lvm) (cd "$lvm" && for file in vm-*; do [ -e "$file" ] && echo "local-lvm:$file raw images $(stat -c %s "$file") 0"; done) ;;
        esac
        true ;;
    status)
        echo "Name Type Status Total Used Available %"
        echo "local dir active 104857600 1048576 103809024 1.00%"
        echo "local-lvm lvmthin active 104857600 1048576 103809024 1.00%" ;;
    *) fail "unknown command '$command'" ;;
esac
"#;
