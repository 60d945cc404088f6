//! The local cluster and its jobs.

use crate::runs::Training;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The longest that anything may take: noticing that a node is dead takes half a minute.
const TIMEOUT: Duration = Duration::from_secs(240);

/// What `slurm-local.sh` returns where privileges are missing.
const NO_PRIVILEGE: i32 = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A cluster, and in its folder the logs of the jobs.
pub struct Batch {
    folder: PathBuf,
}

/// The cluster, for one test at a time; none where this machine does not allow it.
pub fn cluster() -> Option<MutexGuard<'static, Batch>> {
    static CLUSTER: OnceLock<Option<Mutex<Batch>>> = OnceLock::new();
    let cluster = CLUSTER.get_or_init(|| start().map(Mutex::new)).as_ref()?;
    Some(cluster.lock().unwrap_or_else(PoisonError::into_inner))
}

/// It ends with this process, and its folder too.
fn start() -> Option<Batch> {
    let batch = Batch { folder: std::env::temp_dir().join(format!("flowrl-slurm-{}", std::process::id())) };
    let output = batch.command("launch/slurm-local.sh").args(["up", "2", "4"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {
            std::fs::create_dir(batch.jobs()).unwrap();
            Some(batch)
        }
        Some(NO_PRIVILEGE) => {
            // Not by a macro, whose words the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "\n!!!!!! SKIPPED: the tests on Slurm: {}", said.trim());
            None
        }
        _ => panic!("launch/slurm-local.sh up: {}{said}", String::from_utf8_lossy(&output.stdout)),
    }
}

impl Batch {
    fn jobs(&self) -> PathBuf {
        self.folder.join("jobs")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(root().join(program));
        command
            .env("FLOWRL_SLURM", &self.folder)
            .env("FLOWRL_OWNER", std::process::id().to_string())
            .env("FLOWRL_HOME", root())
            .env("FLOWRL_BIN", env!("CARGO_BIN_EXE_flowrl-dist"))
            .env("FLOWRL_PAUSE", "1")
            .env("RAYON_NUM_THREADS", "1")
            .env_remove("FLOWRL_TOKEN");
        command
    }

    /// A command of `slurm-local.sh`.
    pub fn local(&self, arguments: &[&str]) -> String {
        let output = self.command("launch/slurm-local.sh").args(arguments).output().unwrap();
        success(arguments, output)
    }

    /// A command of Slurm's.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.command("launch/slurm-local.sh").arg("exec").args(arguments).output().unwrap();
        success(arguments, output)
    }

    /// The training as a job of 2 nodes with 2 ranks each, until update `updates`.
    pub fn submit(&self, options: &[&str], training: &Training, updates: u64) -> Job<'_> {
        let command = training.command(1, updates);
        let arguments = command.get_args().map(|argument| argument.to_str().unwrap()).collect::<Vec<_>>();
        self.submit_arguments(options, &arguments)
    }

    /// The program with these arguments as a job.
    pub fn submit_arguments(&self, options: &[&str], arguments: &[&str]) -> Job<'_> {
        let script = root().join("slurm/train_glyphs.sh").display().to_string();
        let folder = format!("--chdir={}", self.jobs().display());
        let all =
            [&["sbatch", "--parsable", "--cpus-per-task=1", &folder], options, &[script.as_str()], arguments].concat();
        let id = self.run(&all).trim().to_owned();
        let log = self.jobs().join(format!("flowrl-glyphs-{id}.log"));
        Job { batch: self, id, log }
    }
}

fn success(arguments: &[&str], output: Output) -> String {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {stdout}{stderr}");
    stdout.into_owned()
}

/// A job that was submitted.
pub struct Job<'a> {
    batch: &'a Batch,
    pub id: String,
    log: PathBuf,
}

/// What Slurm says of a job.
#[derive(Debug)]
pub struct State {
    pub state: String,
    pub restarts: u32,
    /// Exit code and signal: "0:0".
    pub exit_code: String,
}

impl Job<'_> {
    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn state(&self) -> State {
        let text = self.batch.run(&["scontrol", "--oneliner", "show", "job", &self.id]);
        let value = |key: &str| {
            let found = text.split_whitespace().find_map(|word| word.strip_prefix(key));
            found.unwrap_or_else(|| panic!("no {key} in {text}")).to_owned()
        };
        State {
            state: value("JobState="),
            restarts: value("Restarts=").parse().unwrap(),
            exit_code: value("ExitCode="),
        }
    }

    /// Waits until `ready`.
    pub fn until(&self, what: &str, ready: impl Fn() -> bool) {
        let end = Instant::now() + TIMEOUT;
        while !ready() {
            assert!(Instant::now() < end, "{what} did not come: {:?}\n{}", self.state(), self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until Slurm is done with it.
    pub fn finish(&self) -> State {
        let waiting = ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"];
        self.until("the end", || !waiting.contains(&self.state().state.as_str()));
        self.state()
    }
}
