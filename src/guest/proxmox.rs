//! Finding a VM of Proxmox VE.

use super::{
    Guest, GuestError, GuestId, GuestKind,
    proxmox_config::{self, Agent, ProxmoxConfig},
};
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// No file in `/etc/pve` can be larger.
const CONFIG_LIMIT: u64 = 1 << 20;

/// Finds VM `id` below `root` (`/` but for tests): its configuration in `etc/pve`, its sockets in `run/qemu-server`.
///
/// # Errors
/// When there is no such VM on this node, when it is locked, a template or not running, or when its configuration cannot be
/// understood.
pub fn find(root: &Path, id: &GuestId) -> Result<Guest, GuestError> {
    let path = root.join("etc/pve/qemu-server").join(format!("{id}.conf"));
    let not_found = || GuestError::NotFound { id: id.clone(), looked: vec![path.clone()] };
    // Proxmox's range of VMIDs; anything else must not become part of a path.
    if !(3..=9).contains(&id.as_str().len()) || !id.as_str().bytes().all(|b| b.is_ascii_digit()) {
        return Err(not_found());
    }
    let Some(text) = read_if_exists(&path)? else { return Err(elsewhere(root, id).unwrap_or_else(not_found)) };
    let config = ProxmoxConfig::parse(&text)?;
    if config.template {
        return Err(GuestError::Template(id.clone()));
    }
    if let Some(lock) = config.lock {
        return Err(GuestError::Locked { id: id.clone(), lock });
    }
    let socket = |kind: &str| root.join("run/qemu-server").join(format!("{id}.{kind}"));
    let qmp = socket("qmp");
    if !qmp.try_exists().unwrap_or(false) {
        return Err(GuestError::NotRunning { id: id.clone(), socket: qmp });
    }
    Ok(Guest {
        id: id.clone(),
        name: config.name,
        kind: GuestKind::Proxmox,
        qmp,
        agent: (config.agent == Agent::On).then(|| socket("qga")),
        config: proxmox_config::archived(&text, &[]),
        firewall: read_if_exists(&root.join("etc/pve/firewall").join(format!("{id}.fw")))?,
    })
}

/// Where else the id is in use.
fn elsewhere(root: &Path, id: &GuestId) -> Option<GuestError> {
    let name = format!("{id}.conf");
    if root.join("etc/pve/lxc").join(&name).exists() {
        return Some(GuestError::Container(id.clone()));
    }
    fs::read_dir(root.join("etc/pve/nodes")).ok()?.flatten().find_map(|node| {
        let here = node.path().join("qemu-server").join(&name).exists();
        here.then(|| GuestError::OtherNode { id: id.clone(), node: node.file_name().to_string_lossy().into_owned() })
    })
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>, GuestError> {
    let read = |path: &Path| -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(path)?.take(CONFIG_LIMIT + 1).read_to_end(&mut text)?;
        if text.len() as u64 > CONFIG_LIMIT {
            return Err(io::Error::other(format!("it is larger than {CONFIG_LIMIT} bytes")));
        }
        Ok(text)
    };
    match read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(GuestError::Read { path: PathBuf::from(path), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn find_in(root: &tempfile::TempDir, id: &str) -> Result<Guest, GuestError> {
        find(root.path(), &id.parse().unwrap())
    }

    #[test]
    fn a_running_vm_is_found_with_sockets_and_firewall() {
        let root = host(&[
            ("etc/pve/qemu-server/100.conf", "agent: 1\nname: web\nscsi0: a:b\nunused0: a:c\n[snap]\nname: old\n"),
            ("etc/pve/firewall/100.fw", "[OPTIONS]\nenable: 1\n"),
            ("run/qemu-server/100.qmp", ""),
        ]);
        let guest = find_in(&root, "100").unwrap();
        assert_eq!(guest.name.as_deref(), Some("web"));
        assert_eq!(guest.qmp, root.path().join("run/qemu-server/100.qmp"));
        assert_eq!(guest.agent, Some(root.path().join("run/qemu-server/100.qga")));
        assert_eq!(guest.config, b"agent: 1\nname: web\nscsi0: a:b\n");
        assert_eq!(guest.firewall.as_deref(), Some(&b"[OPTIONS]\nenable: 1\n"[..]));
    }

    #[test]
    fn an_agent_that_must_not_freeze_is_no_agent() {
        let root = host(&[("etc/pve/qemu-server/100.conf", "agent: 1,freeze-fs=0\n"), ("run/qemu-server/100.qmp", "")]);
        assert_eq!(find_in(&root, "100").unwrap().agent, None);
    }

    #[test]
    fn why_a_vm_cannot_be_backed_up_is_told() {
        let root = host(&[
            ("etc/pve/qemu-server/101.conf", "lock: migrate\nscsi0: a:b\n"),
            ("etc/pve/qemu-server/102.conf", "template: 1\nscsi0: a:b\n"),
            ("etc/pve/qemu-server/103.conf", "scsi0: a:b\n"),
            ("etc/pve/lxc/104.conf", ""),
            ("etc/pve/nodes/pve2/qemu-server/105.conf", ""),
        ]);
        let why = |id| find_in(&root, id).unwrap_err();
        assert!(matches!(why("101"), GuestError::Locked { lock, .. } if lock == "migrate"));
        assert!(matches!(why("102"), GuestError::Template(_)));
        assert!(matches!(why("103"), GuestError::NotRunning { .. }));
        assert!(matches!(why("104"), GuestError::Container(_)));
        assert!(matches!(why("105"), GuestError::OtherNode { node, .. } if node == "pve2"));
        assert!(matches!(why("106"), GuestError::NotFound { .. }));
    }

    #[test]
    fn only_a_vmid_becomes_part_of_a_path() {
        let root = host(&[("etc/pve/qemu-server/web.conf", ""), ("etc/pve/qemu-server/1.conf", "")]);
        assert!(matches!(find_in(&root, "web"), Err(GuestError::NotFound { .. })));
        assert!(matches!(find_in(&root, "1"), Err(GuestError::NotFound { .. })));
    }

    #[test]
    fn a_huge_configuration_is_not_read() {
        let root = host(&[("etc/pve/qemu-server/100.conf", &"#".repeat(2 << 20))]);
        assert!(matches!(find_in(&root, "100"), Err(GuestError::Read { .. })));
    }
}
