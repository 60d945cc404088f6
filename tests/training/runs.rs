//! Runs of the program on the embedded task, small enough for seconds, and what they leave.

use crate::common::{Job, Output, on_ranks};
use flowrl_dist::checkpoint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest that a run may take, on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(180);

/// Updates of the runs that are compared.
pub const UPDATES: u64 = 4;

/// 3 x 5 images, which no number of ranks here divides, so that groups are split and micro-batches are padded.
const SMALL: [&str; 10] = [
    "batch.prompts=3",
    "batch.images_per_prompt=5",
    "batch.micro_batch=4",
    "batch.timesteps=2",
    "sampler.steps=4",
    "eval.steps=4",
    "eval.prompts=5",
    "run.eval_every=2",
    "run.checkpoint_every=0",
    "run.keep_last=2",
];

/// One at a time: a run uses all cores, and waits for its peers without sleeping.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run folder and the settings of its runs.
pub struct Training {
    folder: tempfile::TempDir,
    settings: Vec<String>,
}

impl Training {
    pub fn new(settings: &[&str]) -> Self {
        let settings = SMALL.iter().chain(settings).map(|setting| setting.to_string()).collect();
        Self { folder: tempfile::tempdir().unwrap(), settings }
    }

    /// The program on `ranks` ranks, without mpirun for one, until update `updates`.
    pub fn command(&self, ranks: usize, updates: u64) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        let mut command = if ranks == 1 { Command::new(program) } else { on_ranks(ranks, program) };
        command.arg("--out").arg(self.folder.path()).arg("--set").arg(format!("run.updates={updates}"));
        self.settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        command
    }

    /// What `plan` says of it on `ranks` ranks.
    pub fn plan(&self, ranks: usize) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        command.args(["plan", "--json", "--ranks", &ranks.to_string()]);
        self.settings.iter().for_each(|setting| {
            command.args(["--set", setting]);
        });
        serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
    }

    /// Runs on `ranks` ranks until update `updates`.
    pub fn run(&self, ranks: usize, updates: u64) -> Output {
        // Long runs of the stress test: ten seconds an update even where others keep the machine busy.
        let limit = TIMEOUT.max(Duration::from_secs(10 * updates));
        Job::start(&mut self.command(ranks, updates)).finish(limit).success()
    }

    /// A copy of the folder, to go on from it in another way.
    pub fn copy(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").arg("-r").arg(self.path(".")).arg(folder.path()).status();
        assert!(copied.unwrap().success());
        Self { folder, settings: self.settings.clone() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The update of the newest complete checkpoint.
    pub fn saved(&self) -> Option<u64> {
        checkpoint::newest(&self.path("checkpoints")).unwrap().map(|found| found.update)
    }

    /// Whether the metrics of an update are written.
    pub fn logged(&self, update: u64) -> bool {
        let text = std::fs::read_to_string(self.path("metrics.jsonl")).unwrap_or_default();
        text.contains(&format!("{{\"update\":{update},"))
    }

    /// The newest update whose metrics are written.
    pub fn newest_logged(&self) -> u64 {
        let text = std::fs::read_to_string(self.path("metrics.jsonl")).unwrap_or_default();
        let update = |line: &str| serde_json::from_str::<Value>(line).ok()?["update"].as_u64();
        text.lines().filter_map(update).max().unwrap_or(0)
    }

    /// What the run has come to: its metrics and the newest checkpoint.
    pub fn record(&self) -> Record {
        let newest = checkpoint::newest(&self.path("checkpoints")).unwrap().unwrap();
        let reader = checkpoint::open(&newest.path).unwrap();
        let whole = 0..reader.manifest().identity.total;
        let shard = reader.read(std::slice::from_ref(&whole)).unwrap();
        let state = (reader.state().update, reader.state().iteration);
        Record { metrics: metrics(&self.path("metrics.jsonl")), vectors: shard.vectors, state }
    }
}

/// The lines without the times, which no two runs have in common.
fn metrics(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().retain(|name, _| !name.starts_with("time."));
        line
    };
    text.lines().map(timeless).collect()
}

/// What a run came to.
pub struct Record {
    pub metrics: Vec<Value>,
    pub vectors: BTreeMap<String, Vec<f32>>,
    /// Update and iteration.
    pub state: (u64, u64),
}

impl Record {
    /// Fails unless everything is equal bit for bit.
    pub fn assert_equal(&self, other: &Self) {
        assert_eq!(self.metrics.len(), other.metrics.len());
        self.metrics.iter().zip(&other.metrics).for_each(|(a, b)| assert_eq!(a, b));
        assert_eq!(self.state, other.state);
        assert!(self.vectors.keys().eq(other.vectors.keys()));
        for (name, vector) in &self.vectors {
            let different = vector.iter().zip(&other.vectors[name]).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!((vector.len(), different), (other.vectors[name].len(), 0), "{name}: length, different elements");
        }
    }

    /// L2 norm of the difference by L2 norm, of each vector.
    pub fn distances(&self, other: &Self) -> BTreeMap<&str, f64> {
        let distance = |name: &String| distance(&self.vectors[name], &other.vectors[name]);
        self.vectors.keys().map(|name| (name.as_str(), distance(name))).collect()
    }

    /// Fails unless the parameters agree within 1e-6 of their norm, and the moments, which an error of the gradient's
    /// scale would show in, within 1e-4; tells how close they are.
    pub fn assert_close(&self, other: &Self, what: &str) {
        assert_eq!(self.state, other.state);
        let distances = self.distances(other);
        let figures: Vec<String> = distances.iter().map(|(name, distance)| format!("{name} {distance:.1e}")).collect();
        eprintln!("{what}: {}", figures.join(", "));
        for (name, distance) in distances {
            let limit = if name.starts_with("exp_avg") { 1e-4 } else { 1e-6 };
            assert!(distance <= limit, "{what}: {name} differs by {distance:e}");
        }
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// The run of `UPDATES` updates that nothing disturbed; made once, by a test that is [`alone`].
pub fn unbroken(ranks: usize) -> Arc<Record> {
    static UNBROKEN: Mutex<BTreeMap<usize, Arc<Record>>> = Mutex::new(BTreeMap::new());
    let mut known = UNBROKEN.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry(ranks).or_insert_with(|| Arc::new(finished(&[], ranks))).clone()
}

/// A run from start to end.
pub fn finished(settings: &[&str], ranks: usize) -> Record {
    let training = Training::new(settings);
    training.run(ranks, UPDATES);
    training.record()
}
