//! Who holds a run folder.

use crate::error::{Error, Result};
use crate::hostname::hostname;
use serde::{Deserialize, Serialize};
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a holder's file, always the same number, so that a sign of life is written over the last one in place.
const BLOCK: usize = 1024;

/// Who holds a run folder, or wants to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Holder {
    pub host: String,
    pub pid: u32,
    /// The batch system's number of the job, if there is one.
    pub job: Option<String>,
    /// Of this boot of this machine, and of its process ids, which containers may have of their own.
    pub machine: String,
    /// When the process started, in the machine's ticks since its boot.
    pub started: u64,
    /// Differs between two locks of one process.
    pub number: u64,
    /// The last sign of life, in milliseconds since 1970.
    pub sign_ms: u64,
}

impl Holder {
    pub fn this_process() -> Self {
        let pid = std::process::id();
        let job = ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"].iter().find_map(|name| std::env::var(name).ok());
        let started = started(pid).unwrap_or(0);
        let number = since_epoch().map_or(0, |d| d.as_nanos() as u64);
        let mut holder = Self { host: hostname(), pid, job, machine: machine(), started, number, sign_ms: 0 };
        holder.sign();
        holder
    }

    /// Gives a sign of life.
    pub fn sign(&mut self) {
        self.sign_ms = since_epoch().map_or(0, |d| d.as_millis() as u64);
    }

    /// The name of its file, which no other holder has: `n1-4711-1764400000000000000`.
    pub fn file_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let host: String = self.host.chars().take(100).map(plain).collect();
        format!("{host}-{}-{}", self.pid, self.number)
    }

    /// Whether its process has certainly ended: no other machine, and no other container, can tell.
    pub fn is_gone(&self) -> bool {
        self.machine == machine() && started(self.pid) != Some(self.started)
    }

    /// What stands in its file: JSON, and spaces.
    pub fn encoded(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_string(self).map_err(|e| Error::Failed(format!("no JSON: {e}")))?;
        let mut bytes = format!("{text:<width$}", width = BLOCK - 1).into_bytes();
        bytes.push(b'\n');
        Ok(bytes)
    }

    pub fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// "process 12 on n1 (job 77)".
pub(super) fn name(holder: Option<&Holder>) -> String {
    let Some(Holder { host, pid, job, .. }) = holder else { return "another process".into() };
    format!("process {pid} on {host}{}", job.as_ref().map_or(String::new(), |job| format!(" (job {job})")))
}

fn machine() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let processes = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), processes.display())
}

/// When a process of this machine started; none where there is no such process, or one that has ended and is not waited for.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect(); // a name may hold anything
    if ["Z", "X"].contains(fields.first()?) { None } else { fields.get(19)?.parse().ok() }
}

fn since_epoch() -> Option<std::time::Duration> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok()
}
