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
    token: Token,
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

    /// Fails where a process of the run is still there 10 s after its end.
    pub fn assert_no_leftovers(&self) {
        let patience = Instant::now() + Duration::from_secs(10);
        while !processes(&self.token.0).is_empty() {
            assert!(Instant::now() < patience, "processes are left: {:?}\n{self}", processes(&self.token.0));
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
    Job::start(on_ranks(ranks, program).args(args).envs(envs.iter().copied())).finish(timeout)
}

/// `mpirun` of `program` on `ranks` ranks of this host; arguments that are added are the program's.
pub fn on_ranks(ranks: usize, program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "-n", &ranks.to_string()])
        .arg(program)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command
}

/// A run that goes on while the test does something to it. Dropped, it is killed.
pub struct Job {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    start: Instant,
    token: Token,
}

impl Job {
    /// Starts a command. Its panics print no backtrace: looking up the names of a large program takes seconds, in which
    /// its peers wait for its last word.
    pub fn start(command: &mut Command) -> Self {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let token = Token(format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed)));
        let mut child = command
            .env(TOKEN, &token.0)
            .envs([("RUST_BACKTRACE", "0"), ("RUST_LIB_BACKTRACE", "0")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("{command:?}: {e}. For mpirun install Open MPI (Debian: openmpi-bin libopenmpi-dev)")
            });
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        Self { child, stdout, stderr, start: Instant::now(), token }
    }

    /// Waits until `ready`; fails where the run ends before, or after `timeout`.
    pub fn until(&mut self, what: &str, timeout: Duration, ready: impl Fn() -> bool) {
        let end = Instant::now() + timeout;
        while !ready() {
            assert_eq!(self.child.try_wait().unwrap(), None, "the run ended before {what}");
            assert!(Instant::now() < end, "{what} did not come within {timeout:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal to the process that was started: mpirun, or the program itself.
    pub fn signal(&self, name: &str) {
        send(name, &self.child.id().to_string());
    }

    /// Sends a signal to one rank of a run under mpirun.
    pub fn signal_rank(&self, name: &str, rank: usize) {
        let ranks = self.processes_of(rank);
        assert_eq!(ranks.len(), 1, "processes of rank {rank}: {ranks:?}");
        send(name, &ranks[0]);
    }

    /// Whether a rank of a run under mpirun lives.
    pub fn has_rank(&self, rank: usize) -> bool {
        self.processes_of(rank).len() == 1
    }

    /// Whether what was started has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn processes_of(&self, rank: usize) -> Vec<String> {
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let mut ranks = processes(&self.token.0);
        ranks.retain(|pid| has_variable(&PathBuf::from("/proc").join(pid), &variable));
        ranks
    }

    /// Waits for the end. After `timeout` the run is killed and the test fails with its output.
    pub fn finish(mut self, timeout: Duration) -> Output {
        let status = wait(&mut self.child, Instant::now() + timeout);
        let (elapsed, ended) = (self.start.elapsed(), SystemTime::now());
        if status.is_none() {
            self.token.kill();
        }
        let finished = status.unwrap_or_else(|| self.child.wait().unwrap());
        let (stdout, stderr) = (self.stdout.join().unwrap(), self.stderr.join().unwrap());
        let output = Output { status: finished, stdout, stderr, elapsed, ended, token: self.token };
        assert!(status.is_some(), "no end after {timeout:?}, killed: {output}");
        output
    }
}

/// The full name of a test of the module whose `module_path!()` is given.
pub fn test_of(module: &str, name: &str) -> String {
    let (_, path) = module.split_once("::").expect("a module of the test program");
    format!("{path}::{name}")
}

/// Runs the test `worker` of a module (`module_path!()`) on `ranks` ranks, in the given role.
pub fn workers(module: &str, ranks: usize, role: &str, timeout: Duration) -> Output {
    let program = std::env::current_exe().unwrap();
    mpirun(
        ranks,
        &program,
        &[&test_of(module, "worker"), "--exact", "--nocapture", "--test-threads=1"],
        &[(ROLE, role)],
        timeout,
    )
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

/// Marks the processes of a run; dropped, it kills those that are left.
#[derive(Debug)]
struct Token(String);

impl Token {
    fn kill(&self) {
        processes(&self.0).iter().for_each(|pid| send("KILL", pid));
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The processes of a run; zombies have no environment and do not count.
fn processes(token: &str) -> Vec<String> {
    let variable = format!("{TOKEN}={token}");
    let folders = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let marked = folders.filter(|folder| has_variable(folder, &variable));
    marked.filter_map(|folder| Some(folder.file_name()?.to_string_lossy().into_owned())).collect()
}

fn has_variable(folder: &Path, variable: &str) -> bool {
    let environment = std::fs::read(folder.join("environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
}

fn send(signal: &str, pid: &str) {
    let _ = Command::new("kill").args(["-s", signal, pid]).status();
}
