//! Two virtual hosts.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What `hosts-local.sh` returns where privileges are missing.
const NO_PRIVILEGE: i32 = 3;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const PROGRAM: &str = env!("CARGO_BIN_EXE_flowrl-dist");

/// The hosts a and b; they end with it.
pub struct Hosts {
    folder: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// The hosts, for one test at a time; none where this machine does not allow them.
pub fn hosts() -> Option<Hosts> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let hosts = Hosts { folder: tempfile::tempdir().unwrap(), _alone: alone };
    let output = hosts.script(&["up", "a", "b"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Some(hosts),
        Some(NO_PRIVILEGE) => {
            // Not by a macro, whose words the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "\n!!!!!! SKIPPED: the tests of network faults: {}", said.trim());
            None
        }
        _ => panic!("launch/hosts-local.sh up: {said}"),
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _ = self.script(&["down"]).status();
    }
}

impl Hosts {
    fn script(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(format!("{ROOT}/launch/hosts-local.sh"));
        command
            .args(arguments)
            .env("FLOWRL_HOSTS", self.folder.path().join("hosts"))
            .env("FLOWRL_BIN", PROGRAM)
            .env("FLOWRL_TOKEN", "the tests' word")
            .env("RAYON_NUM_THREADS", "1");
        command
    }

    /// A command of `hosts-local.sh`.
    pub fn local(&self, arguments: &[&str]) -> String {
        let output = self.script(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `launch/mpirun.sh` on host a, with a rank on each, which does not try again by itself.
    pub fn mpirun(&self, arguments: &[&str]) -> Command {
        let (agent, hostfile) = (self.folder.path().join("agent"), self.folder.path().join("hosts.txt"));
        // Like ssh: a host, then a command for its shell. mpirun itself keeps this machine's processes: it starts the
        // agent, which looks for the host's.
        let text = format!("#!/bin/sh\nhost=$1\nshift\nexec {ROOT}/launch/hosts-local.sh on \"$host\" sh -c \"$*\"\n");
        std::fs::write(&agent, text).unwrap();
        std::fs::set_permissions(&agent, PermissionsExt::from_mode(0o755)).unwrap();
        let address = |host| self.local(&["address", host]).trim().to_owned();
        std::fs::write(&hostfile, format!("{} slots=1\n{} slots=1\n", address("a"), address("b"))).unwrap();
        let script = format!("{ROOT}/launch/mpirun.sh");
        let mut command = self.script(&["near", "a", &script, "--hostfile", hostfile.to_str().unwrap()]);
        command
            .args(arguments)
            .env("FLOWRL_MPIRUN_FLAGS", format!("--mca plm_rsh_agent {}", agent.display()))
            .env("FLOWRL_NETWORK", "eth0")
            .env("FLOWRL_TRIES", "1");
        command
    }

    /// One rank of two, which meet over TCP.
    pub fn rank(&self, host: &str, rank: usize, arguments: &[&str]) -> Command {
        let mut command = self.script(&["on", host, PROGRAM]);
        command
            .args(arguments)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", "a")
            .env("MASTER_PORT", "29500");
        command
    }

    /// Waits until no rank is left on a host: its own deadline ends one that was cut off.
    pub fn wait_for_end(&self, host: &str) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.script(&["on", host, "pgrep", "-x", "flowrl-dist"]).output().unwrap().status.success() {
            assert!(Instant::now() < end, "a rank is left on {host}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
