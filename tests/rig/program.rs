//! The program under test, with directories of its own.

use super::Vm;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;

/// An installation of the program: configuration, state, sockets, fleecing images, restored images.
pub struct Program {
    dir: TempDir,
    pve_root: Option<PathBuf>,
    extra: Vec<(String, String)>,
}

/// How a call ended.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Program {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("pvb").tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        Self { dir, pve_root: None, extra: Vec::new() }
    }

    /// Another installation with the same configuration file and the same variables.
    pub fn beside(&self) -> Self {
        let other = Self { extra: self.extra.clone(), ..Self::new() };
        fs::copy(self.dir().join("etc/config.toml"), other.dir().join("etc/config.toml")).unwrap();
        other
    }

    /// Proxmox VE's files are below `root`.
    pub fn pve_root(mut self, root: &Path) -> Self {
        self.pve_root = Some(root.to_owned());
        self
    }

    /// An environment variable for every call.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.extra.push((name.into(), value.into()));
        self
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn state(&self) -> PathBuf {
        self.dir().join("state")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    pub fn fleecing(&self) -> PathBuf {
        self.dir().join("fleecing")
    }

    /// Writes the configuration file.
    pub fn configure(&self, text: &str) {
        fs::write(self.dir().join("etc/config.toml"), text).unwrap();
    }

    /// A call of the program, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        // A copy, for users who may not look into the build's directory.
        let program = std::env::var_os("PVEBACKUP_TEST_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_pvebackup").into());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("PVEBACKUP_CONFIG_DIR", self.dir().join("etc"))
            .env("PVEBACKUP_STATE_DIR", self.state())
            .env("PVEBACKUP_RUN_DIR", self.run_dir())
            .env("PVEBACKUP_FLEECING_DIR", self.fleecing())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(root) = &self.pve_root {
            command.env("PVEBACKUP_PVE_ROOT", root);
        }
        command.envs(self.extra.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &[&str]) -> Run {
        Run::of(&self.command(arguments).output().expect("the program starts"))
    }

    /// Starts the program and does not wait.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().expect("the program starts")
    }

    /// `vm --json` on a machine that is no Proxmox guest.
    pub fn backup_arguments<'a>(socket: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["vm", "--json", "--qmp", socket, "--name", "guest"], more].concat()
    }

    /// Backs up a machine that is no Proxmox guest.
    pub fn backup(&self, vm: &Vm, more: &[&str]) -> Run {
        let socket = vm.qmp_socket().display().to_string();
        self.run(&Self::backup_arguments(&socket, more))
    }

    /// Restores an archive into a new directory and returns it.
    pub fn restore(&self, guest: &str, archive: &str) -> PathBuf {
        let number = fs::read_dir(self.dir()).unwrap().count();
        let dir = self.dir().join(format!("restored-{number}"));
        let path = dir.display().to_string();
        self.run(&["restore", archive, "--guest", guest, "--to-dir", &path]).ok();
        dir
    }
}

impl Run {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// It has to have succeeded without a warning.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// It has to have ended with this code.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// The events of `--json`.
    pub fn events(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        self.stdout.lines().map(parse).collect()
    }

    /// The summary of `--json`.
    #[track_caller]
    pub fn summary(&self) -> Value {
        let events = self.events();
        events.into_iter().find(|e| e["type"] == "summary").unwrap_or_else(|| panic!("no summary: {}", self.stdout))
    }

    /// What was planned for a disk: action and reason.
    #[track_caller]
    pub fn plan(&self, disk: &str) -> (String, String) {
        let events = self.events();
        let plan = events.iter().find(|e| e["type"] == "disk-plan" && e["disk"] == disk);
        let plan = plan.unwrap_or_else(|| panic!("no plan for {disk}: {}", self.stdout));
        let text = |key: &str| plan[key].as_str().unwrap_or_default().to_owned();
        (text("action"), text("reason"))
    }

    /// Bytes read from the exports.
    #[track_caller]
    pub fn read_bytes(&self) -> u64 {
        self.summary()["read_bytes"].as_u64().expect("a number")
    }
}
