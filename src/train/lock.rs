//! One run at a time in a run folder: rank 0 holds `OUT/.running`, and gives a sign of life in it every few seconds.
//!
//! Clocks of hosts are not compared: whoever finds the file watches it. A holder that gives a sign of life holds the folder. One
//! whose process is seen to be gone, or that gives no sign for [`PATIENCE`], has ended, whatever ended it, and its place is taken:
//! at once where a killed run is started again on the same machine, after that time where its node died.

use crate::comm::{World, exchange, hostname};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const NAME: &str = ".running";

/// Time between signs of life.
const BEAT: Duration = Duration::from_secs(5);

/// A holder without a sign of life for so long has ended. Network file systems may show a change late.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time between two looks at the file of another.
const LOOK: Duration = Duration::from_millis(500);

/// Who holds a run folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Holder {
    host: String,
    pid: u32,
    /// The batch system's number of the job, if there is one.
    job: Option<String>,
    /// Of this boot of this machine, and of its process ids, which containers may have of their own.
    machine: String,
    /// When the process started, in the machine's ticks since its boot.
    started: u64,
    /// Differs between two locks of one process.
    number: u64,
    /// The last sign of life, in milliseconds since 1970: of one length, so that it can be written over in place.
    sign_ms: u64,
}

/// A run folder that this process holds, until it is dropped.
pub(super) struct RunLock {
    path: PathBuf,
    holder: Holder,
    /// Dropped, it ends the thread that gives the signs of life.
    running: Option<Sender<()>>,
    beating: Option<JoinHandle<()>>,
}

/// Takes the run folder, which is made if absent; on rank 0, the others wait. Collective.
///
/// # Errors
/// [`Error::Usage`] where the folder cannot be made or written, and where another run holds it.
pub(super) fn hold(out: &Path, world: &World) -> Result<Option<RunLock>> {
    let mut claim = (world.rank() == 0).then(|| Claim::new(out, BEAT, PATIENCE)).transpose()?;
    loop {
        let lock = claim.as_mut().map_or(Ok(None), Claim::attempt)?;
        // In rounds: a collective that waited for all of it could outlast the deadline.
        if exchange(&*world.host, &lock.is_some())?[0] {
            return Ok(lock);
        }
    }
}

/// An attempt to hold a folder.
struct Claim {
    out: PathBuf,
    beat: Duration,
    patience: Duration,
    /// What another's file held at the first look, and since when it is watched.
    watched: Option<(Vec<u8>, Instant)>,
}

impl Claim {
    fn new(out: &Path, beat: Duration, patience: Duration) -> Result<Self> {
        fs::create_dir_all(out).map_err(|e| unusable(out, &e))?;
        Ok(Self { out: out.to_path_buf(), beat, patience, watched: None })
    }

    /// The lock, if it can be had now.
    fn attempt(&mut self) -> Result<Option<RunLock>> {
        let path = self.out.join(NAME);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return RunLock::new(path, file, self.beat).map(Some),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(unusable(&self.out, &e)),
        }
        let found = match fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None), // given up meanwhile
            found => found.map_err(|e| unusable(&self.out, &e))?,
        };
        let holder = parse(&found);
        let gone = holder.as_ref().is_some_and(Holder::is_gone);
        match &self.watched {
            _ if gone => return self.take_over(path),
            None => {
                let (out, seconds) = (self.out.display(), self.patience.as_secs());
                eprintln!(
                    "flowrl-dist: {out} was last used by {}: looking for up to {seconds} s whether it still is",
                    name(holder.as_ref())
                );
                self.watched = Some((found, Instant::now()));
            }
            Some((first, _)) if *first != found => {
                let (out, who) = (self.out.display(), name(holder.as_ref()));
                return Err(Error::Usage(format!(
                    "run folder {out}: {who} is training in it; end that run, wait for its end, or pass another --out"
                )));
            }
            Some((_, since)) if since.elapsed() >= self.patience => return self.take_over(path),
            Some(_) => {}
        }
        std::thread::sleep(LOOK.min(self.beat));
        Ok(None)
    }

    /// Puts an own file in the place of one whose holder has ended; of several that do, the last one stays.
    fn take_over(&mut self, path: PathBuf) -> Result<Option<RunLock>> {
        let own = path.with_file_name(format!("{NAME}-{}-{}", hostname(), std::process::id()));
        let file = File::create(&own).map_err(|e| unusable(&self.out, &e))?;
        let mut lock = RunLock::new(own.clone(), file, self.beat)?;
        fs::rename(&own, &path).map_err(|e| unusable(&self.out, &e))?;
        lock.path = path;
        self.watched = None;
        Ok(lock.check().is_ok().then_some(lock))
    }
}

impl RunLock {
    /// In an open, empty file.
    fn new(path: PathBuf, mut file: File, beat: Duration) -> Result<Self> {
        let holder = Holder::this_process();
        file.write_all(&holder.encoded()?).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
        let (running, ended) = channel();
        let mut next = holder.clone();
        let work = move || {
            while ended.recv_timeout(beat) == Err(RecvTimeoutError::Timeout) {
                next.sign_ms = milliseconds();
                // In the file itself, whatever stands under its name by now. One sign that cannot be written is no harm.
                let _ = next.encoded().map(|bytes| file.write_all_at(&bytes, 0).and_then(|()| file.sync_data()));
            }
        };
        let beating = std::thread::Builder::new().name("sign of life".into()).spawn(work);
        let beating =
            beating.map_err(|e| Error::Failed(format!("the thread of the signs of life could not be started: {e}")))?;
        Ok(Self { path, holder, running: Some(running), beating: Some(beating) })
    }

    /// Whether this process still holds the folder: one that was stopped for long has lost it.
    ///
    /// # Errors
    /// [`Error::Failed`] that names the new holder.
    pub fn check(&self) -> Result<()> {
        // Only another's word counts: a file system may be away for a while.
        match fs::read(&self.path).ok().as_deref().and_then(parse) {
            Some(other) if !self.holder.is_same(&other) => Err(Error::Failed(format!(
                "run folder {}: {} took it over while this process gave no sign of life; this run ends and saves nothing more",
                self.path.parent().unwrap_or(&self.path).display(),
                name(Some(&other))
            ))),
            _ => Ok(()),
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(beating) = self.beating.take() {
            let _ = beating.join();
        }
        if self.check().is_ok() {
            // What is left of it is taken over by the next run.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn this_process() -> Self {
        let pid = std::process::id();
        let job = ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"].iter().find_map(|name| std::env::var(name).ok());
        let started = started(pid).unwrap_or(0);
        let number = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        Self { host: hostname(), pid, job, machine: machine(), started, number, sign_ms: milliseconds() }
    }

    fn is_same(&self, other: &Self) -> bool {
        Self { sign_ms: 0, ..self.clone() } == Self { sign_ms: 0, ..other.clone() }
    }

    /// Whether its process has certainly ended: no other machine, and no other container, can tell.
    fn is_gone(&self) -> bool {
        self.machine == machine() && started(self.pid) != Some(self.started)
    }

    fn encoded(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_string(self).map_err(|e| Error::Failed(format!("no JSON: {e}")))?;
        Ok(format!("{text}\n").into_bytes())
    }
}

fn parse(bytes: &[u8]) -> Option<Holder> {
    serde_json::from_slice(bytes).ok()
}

/// "process 12 on n1 (job 77)".
fn name(holder: Option<&Holder>) -> String {
    let Some(Holder { host, pid, job, .. }) = holder else { return "another process".into() };
    format!("process {pid} on {host}{}", job.as_ref().map_or(String::new(), |job| format!(" (job {job})")))
}

fn unusable(out: &Path, e: &std::io::Error) -> Error {
    Error::Usage(format!(
        "run folder {}: cannot be made or written ({e}); name one that can with --out or run.out",
        out.display()
    ))
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

fn milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_millis(400);

    /// Until it holds the folder or is refused.
    fn claimed(out: &Path) -> Result<RunLock> {
        let mut claim = Claim::new(out, SHORT, LONG)?;
        loop {
            if let Some(lock) = claim.attempt()? {
                return Ok(lock);
            }
        }
    }

    /// Leaves the file of a holder like this process but for `change`.
    fn left(out: &Path, change: impl FnOnce(&mut Holder)) -> Holder {
        let mut holder = Holder::this_process();
        change(&mut holder);
        fs::write(out.join(NAME), holder.encoded().unwrap()).unwrap();
        holder
    }

    #[test]
    fn a_folder_is_held_by_one_run_and_free_after_it() {
        let out = tempfile::tempdir().unwrap();
        let lock = claimed(out.path()).unwrap();
        let refused = claimed(out.path()).err().unwrap();
        let who = format!("process {} on {}", std::process::id(), hostname());
        assert!(matches!(refused, Error::Usage(_)), "{refused}");
        assert!(refused.to_string().contains(&format!("{who} is training in it; end that run")), "{refused}");
        lock.check().unwrap();
        drop(lock);
        assert!(!out.path().join(NAME).exists());
        let since = Instant::now();
        drop(claimed(out.path()).unwrap());
        assert!(since.elapsed() < LONG);
    }

    #[test]
    fn what_a_killed_process_left_is_taken_at_once() {
        let out = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for change in [|holder: &mut Holder| holder.started += 1, |holder: &mut Holder| holder.started -= 1] {
            left(out.path(), change); // another process of the same number
            let since = Instant::now();
            drop(claimed(out.path()).unwrap());
            assert!(since.elapsed() < LONG, "{:?}", since.elapsed());
        }
        let gone = left(out.path(), |holder| holder.pid = child.id());
        assert!(gone.is_gone());
        claimed(out.path()).unwrap().check().unwrap();
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_silent_machine_is_waited_for_and_one_that_gives_signs_is_not_disturbed() {
        let out = tempfile::tempdir().unwrap();
        let elsewhere = |holder: &mut Holder| (holder.machine, holder.host) = ("another".into(), "n9".into());
        left(out.path(), elsewhere);
        let since = Instant::now();
        drop(claimed(out.path()).unwrap());
        assert!(since.elapsed() >= LONG, "{:?}", since.elapsed());

        let mut holder = left(out.path(), elsewhere);
        holder.job = Some("77".into());
        let refused = std::thread::scope(|scope| {
            let claim = scope.spawn(|| claimed(out.path()).err());
            while !claim.is_finished() {
                holder.sign_ms += 1;
                // Never empty: a sign of life is written over the last one.
                let file = OpenOptions::new().write(true).open(out.path().join(NAME)).unwrap();
                file.write_all_at(&holder.encoded().unwrap(), 0).unwrap();
                std::thread::sleep(SHORT);
            }
            claim.join().unwrap().unwrap().to_string()
        });
        assert!(refused.contains(&format!("process {} on n9", std::process::id())), "{refused}");
    }

    #[test]
    fn a_run_that_was_stopped_for_long_learns_that_another_took_over() {
        let out = tempfile::tempdir().unwrap();
        let stopped = claimed(out.path()).unwrap();
        let other = left(out.path(), |holder| (holder.host, holder.number) = ("n9".into(), 1));
        let lost = stopped.check().unwrap_err().to_string();
        assert!(lost.contains(" on n9 took it over while this process gave no sign of life"), "{lost}");
        drop(stopped);
        assert_eq!(parse(&fs::read(out.path().join(NAME)).unwrap()), Some(other), "the other's file stays");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_a_mistake() {
        for out in ["/proc/none", "/etc/passwd/none"] {
            let error = claimed(Path::new(out)).err().unwrap();
            assert!(matches!(error, Error::Usage(_)), "{error}");
            assert!(
                error.to_string().starts_with(&format!("run folder {out}: cannot be made or written (")),
                "{error}"
            );
        }
    }
}
