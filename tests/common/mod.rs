//! Runs programs under mpirun, with a timeout, and leaves nothing behind.
#![allow(dead_code)] // not every test program uses all of this

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Every process of a run carries this variable, so that leftovers are found whatever became of their parents.
const TOKEN: &str = "FLOWRL_TEST_RUN";

/// Selects what a test program does when it is started again as a rank.
pub const ROLE: &str = "FLOWRL_TEST_ROLE";

/// What a run under mpirun came to.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
    /// When the job was over.
    pub ended: SystemTime,
    token: String,
}

impl Output {
    /// The exit code, 128 + signal for a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails with the whole output unless the run succeeded.
    pub fn success(self) -> Self {
        assert!(self.status.success(), "{self}");
        self
    }

    /// Time between the last `event()` of a rank and the end of the job.
    pub fn since_event(&self) -> Duration {
        let events = self.stderr.lines().filter_map(|line| line.split_once("EVENT ")?.1.trim().parse::<f64>().ok());
        let event = events.reduce(f64::max).unwrap_or_else(|| panic!("no event was printed\n{self}"));
        let ended = self.ended.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        Duration::from_secs_f64((ended - event).max(0.0))
    }

    /// Fails where a process of the run is still there 2 s after its end.
    pub fn assert_no_leftovers(&self) {
        let patience = Instant::now() + Duration::from_secs(2);
        while !processes(&self.token).is_empty() {
            assert!(Instant::now() < patience, "processes are left: {:?}\n{self}", processes(&self.token));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { status, stdout, stderr, elapsed, .. } = self;
        write!(f, "{status} after {elapsed:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// Prints the time, for `Output::since_event`.
pub fn event() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    eprintln!("EVENT {:.6}", now.as_secs_f64());
}

/// Runs `program` on `ranks` ranks of this host. Fails where mpirun is absent; after `timeout` the run is killed and
/// the test fails with its output.
pub fn mpirun(ranks: usize, program: &Path, args: &[&str], envs: &[(&str, &str)], timeout: Duration) -> Output {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let token = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
    let start = Instant::now();
    let mut child = Command::new("mpirun")
        .args(["--oversubscribe", "-n", &ranks.to_string()])
        .arg(program)
        .args(args)
        .envs(envs.iter().copied())
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env(TOKEN, &token)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("mpirun: {e}. Install Open MPI (Debian: openmpi-bin libopenmpi-dev)"));
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let status = wait(&mut child, start + timeout);
    let (elapsed, ended) = (start.elapsed(), SystemTime::now());
    if status.is_none() {
        kill(&token);
    }
    let finished = status.unwrap_or_else(|| child.wait().unwrap());
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    let output = Output { status: finished, stdout, stderr, elapsed, ended, token };
    assert!(status.is_some(), "no end after {timeout:?}, killed: {output}");
    output
}

/// Runs the test `worker` of this test program on `ranks` ranks, in the given role.
pub fn workers(ranks: usize, role: &str, timeout: Duration) -> Output {
    let program = std::env::current_exe().unwrap();
    mpirun(ranks, &program, &["worker", "--exact", "--nocapture", "--test-threads=1"], &[(ROLE, role)], timeout)
}

/// The exit status, or none when it is past `end`.
fn wait(child: &mut Child, end: Instant) -> Option<ExitStatus> {
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Reads a pipe to its end on a thread, so that a full pipe stops nobody.
fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The processes of a run; zombies have no environment and do not count.
fn processes(token: &str) -> Vec<String> {
    let variable = format!("{TOKEN}={token}");
    let marked = |folder: &PathBuf| {
        let environment = std::fs::read(folder.join("environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
    };
    let folders = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    folders.filter(marked).filter_map(|folder| Some(folder.file_name()?.to_string_lossy().into_owned())).collect()
}

fn kill(token: &str) {
    for pid in processes(token) {
        let _ = Command::new("kill").args(["-KILL", &pid]).status();
    }
}
