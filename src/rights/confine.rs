//! What a process that reads archives gives up.
//!
//! Everything here binds the calling thread and what it starts afterwards, and can never be taken back: it belongs before the
//! first thread. What the kernel does not offer is left out.

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, path_beneath_rules,
};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The newest version of landlock whose rights are known here to be missed by nobody.
const LANDLOCK: ABI = ABI::V5;

/// What programs expect to be able to write to, whatever they do.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/pts", "/dev/ptmx", "/dev/shm"];

/// Rights of root that reading an archive and writing files for others takes.
const KEPT: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
];

/// System calls that neither we nor borg, ssh or a password command need: into other processes, the kernel and the mounts.
const FORBIDDEN: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Further ones, for who does not mount.
const FORBIDDEN_MOUNTS: &[libc::c_long] = &[
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_umount2,
];

/// What is still needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Reads an archive and writes below `writable`; makes no TCP connection unless `network`. What does not exist yet may be
    /// made in the nearest directory that does.
    Files {
        /// Files and directories.
        writable: Vec<PathBuf>,
        /// Whether the repository is on another host.
        network: bool,
    },
    /// Also mounts: the file system is not confined, because the kernel takes mounting away with it. Only for root; others mount
    /// by a setuid program, which a confined process cannot start.
    Mount,
}

/// What was given up, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GivenUp {
    /// Writing outside of what is needed (landlock).
    pub files: bool,
    /// All capabilities but those to read and write files.
    pub capabilities: bool,
    /// System calls.
    pub system_calls: bool,
}

impl Confinement {
    /// Gives up everything else, for the calling thread and those that it will start.
    pub fn apply(&self) -> GivenUp {
        let mounts = *self == Self::Mount;
        if mounts && !nix::unistd::geteuid().is_root() {
            return GivenUp::default();
        }
        // In this order: setting up a filter takes rights, and landlock a system call.
        let files = match self {
            Self::Files { writable, network } => confine_files(writable, *network).unwrap_or_else(|error| {
                tracing::debug!(%error, "landlock");
                false
            }),
            Self::Mount => false,
        };
        let capabilities = drop_capabilities(mounts).map_err(|error| tracing::debug!(%error, "capabilities")).is_ok();
        let system_calls = forbid_system_calls(mounts).map_err(|error| tracing::debug!(error, "seccomp")).is_ok();
        let given_up = GivenUp { files, capabilities, system_calls };
        tracing::debug!(?given_up, "confined");
        given_up
    }
}

fn confine_files(writable: &[PathBuf], network: bool) -> Result<bool, RulesetError> {
    let rights = AccessFs::from_write(LANDLOCK);
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(rights)?;
    if !network {
        rules = rules.handle_access(AccessNet::from_all(LANDLOCK))?;
    }
    let paths = writable.iter().map(|path| existing(path)).chain(DEVICES.iter().map(Path::new));
    let status = rules.create()?.add_rules(path_beneath_rules(paths, rights))?.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// The path, or its nearest ancestor that exists.
fn existing(path: &Path) -> &Path {
    let found = path.ancestors().find(|path| path.exists());
    // What is relative ends in nothing.
    found.filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn drop_capabilities(mounts: bool) -> Result<(), caps::errors::CapsError> {
    let mut kept: CapsHashSet = KEPT.iter().copied().collect();
    if mounts {
        kept.insert(Capability::CAP_SYS_ADMIN);
    }
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for other in caps::read(None, CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *other)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        let left = caps::read(None, set)?.intersection(&kept).copied().collect();
        caps::set(None, set, &left)?;
    }
    Ok(())
}

fn forbid_system_calls(mounts: bool) -> Result<(), String> {
    let more = if mounts { &[] } else { FORBIDDEN_MOUNTS };
    let rules: BTreeMap<i64, Vec<_>> = FORBIDDEN.iter().chain(more).map(|call| (*call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().map_err(|_| "unknown architecture".to_owned())?;
    // The kernel's own answer to who may not: everybody can handle it.
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, denied, arch).map_err(|error| error.to_string())?;
    let program: BpfProgram = filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use std::{fs, net::TcpStream, thread};

    /// The calling thread can never go back.
    fn confined<T: Send + 'static>(confinement: Confinement, then: impl FnOnce(GivenUp) -> T + Send + 'static) -> T {
        thread::spawn(move || then(confinement.apply())).join().unwrap()
    }

    #[test]
    fn who_reads_archives_writes_only_where_told() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("file"), "before").unwrap();
        let (to, away) = (inside.path().join("new"), outside.path().to_owned());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let given_up = confined(Confinement::Files { writable: vec![to.clone()], network: false }, move |given_up| {
            fs::create_dir(&to).unwrap();
            fs::write(to.join("disk"), "data").unwrap();
            fs::rename(to.join("disk"), to.join("renamed")).unwrap();
            fs::write("/dev/null", "x").unwrap();
            assert_eq!(fs::read(away.join("file")).unwrap(), b"before", "reading is not confined");
            if given_up.files {
                let denied = |what: std::io::Result<()>| {
                    let error = what.unwrap_err().raw_os_error().unwrap();
                    assert!([libc::EACCES, libc::EPERM, libc::EXDEV].contains(&error), "{error}");
                };
                denied(fs::write(away.join("new"), "x"));
                denied(fs::write(away.join("file"), "after"));
                denied(fs::remove_file(away.join("file")));
                denied(fs::create_dir(away.join("dir")));
                denied(std::os::unix::fs::symlink("/etc", away.join("link")));
                denied(fs::rename(to.join("renamed"), away.join("moved")));
                denied(fs::OpenOptions::new().write(true).truncate(true).open(away.join("file")).map(drop));
                assert!(TcpStream::connect(address).is_err());
                // A child is bound, too.
                let script = format!("echo x > {}", away.join("child").display());
                assert!(!std::process::Command::new("sh").args(["-c", &script]).status().unwrap().success());
            }
            given_up
        });
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"before");
        if !given_up.files {
            println!("skipped: writing elsewhere (the kernel has no landlock)");
        }
    }

    #[test]
    fn the_kernel_and_other_processes_are_out_of_reach() {
        // Outlives the thread, which could not remove it.
        let here = tempfile::tempdir().unwrap();
        let place = here.path().to_owned();
        let given_up = confined(Confinement::Files { writable: vec![], network: true }, move |given_up| {
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
            assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
            let effective = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
            assert_eq!(effective & !KEPT.iter().map(Capability::bitmask).sum::<u64>(), 0, "{effective:#x}");
            let mounted =
                nix::mount::mount(Some("none"), &place, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>);
            assert_eq!(mounted, Err(Errno::EPERM));
            given_up
        });
        assert!(given_up.system_calls && given_up.capabilities);
    }

    #[test]
    fn who_mounts_keeps_that_right_and_no_other() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting (not root)");
            return;
        }
        confined(Confinement::Mount, |given_up| {
            assert!(given_up.system_calls && given_up.capabilities && !given_up.files);
            let effective = caps::read(None, CapSet::Effective).unwrap();
            assert!(effective.contains(&Capability::CAP_SYS_ADMIN) && !effective.contains(&Capability::CAP_SYS_MODULE));
        });
    }

    #[test]
    fn what_does_not_exist_yet_is_made_in_what_does() {
        assert_eq!(existing(Path::new("/proc/self/no/such")), Path::new("/proc/self"));
        assert_eq!(existing(Path::new("no-such-name")), Path::new("."));
    }
}
