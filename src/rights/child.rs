//! Children's environment.

use std::{env, ffi::OsStr, process::Command};

/// What a program needs to find its files, its user's agents and its language. Everything else stays with us: secrets in
/// variables, `LD_PRELOAD`, settings of tools that we call in a certain way.
const PASSED_ON: &[&str] = &[
    "CREDENTIALS_DIRECTORY",
    "DBUS_SESSION_BUS_ADDRESS",
    "GNUPGHOME",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LOGNAME",
    "PASSWORD_STORE_DIR",
    "PATH",
    "SSH_AUTH_SOCK",
    "TMPDIR",
    "TZ",
    "USER",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
];

fn is_passed_on(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| PASSED_ON.contains(&name) || name.starts_with("LC_"))
}

/// A command with a clean environment. Descriptors are closed by the kernel: all of ours are opened with `O_CLOEXEC`.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(env::vars_os().filter(|(name, _)| is_passed_on(name)));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_sees_what_it_needs_and_no_descriptor_of_ours() {
        let secret = tempfile::NamedTempFile::new().unwrap();
        let script = "env; for fd in /proc/self/fd/*; do readlink $fd; done";
        let output = command("sh").args(["-c", script]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("PATH="), "{text}");
        // Cargo tells its tests this, and nobody else needs it.
        assert!(env::var_os("CARGO_MANIFEST_DIR").is_some() && !text.contains("CARGO"), "{text}");
        assert!(!text.contains(secret.path().to_str().unwrap()), "{text}");
    }
}
