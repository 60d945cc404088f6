//! The configuration of a run: the parts that the modules own, read from TOML and the command line, checked before
//! anything else is touched.

mod changes;
mod load;
mod paths;
mod renamed;
mod shift;
mod stages;
mod validate;
mod written;

pub(crate) use paths::file_name;
pub use stages::{RunStage, StageConfig};

use crate::comm::Backend;
use crate::data::{Format, PromptSet, Split};
use crate::device::DeviceChoice;
use crate::engine::Checkpointing;
use crate::error::Error;
use crate::flow::{SamplerConfig, Solver};
use crate::objective::{AdvantageConfig, MethodConfig, Objective};
use crate::optim::{OldPolicyDecay, OldPolicySchedule, OptimConfig};
use crate::pipeline::ModelConfig;
use crate::reward::{Overlap, RewardConfig};
use crate::shard::Sharding;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use std::path::{Path, PathBuf};

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run itself.
    #[serde(default)]
    pub run: RunSection,
    /// The base model and what of it is trained.
    #[serde(default)]
    pub model: ModelConfig,
    /// Prompts.
    #[serde(default)]
    pub data: DataConfig,
    /// Sizes of an iteration.
    #[serde(default)]
    pub batch: BatchConfig,
    /// How the rollouts are sampled.
    #[serde(default)]
    pub sampler: SamplerConfig,
    /// How the evaluations are sampled.
    #[serde(default)]
    pub eval: EvalConfig,
    /// The method.
    #[serde(default)]
    pub method: MethodConfig,
    /// What differs from the method's own map from rewards to advantages.
    #[serde(default)]
    pub advantage: AdvantageConfig,
    /// The rewards.
    #[serde(default)]
    pub reward: Vec<RewardConfig>,
    /// What changes of rewards and prompts in the course of the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stage: Vec<StageConfig>,
    /// How the old policy follows.
    #[serde(default)]
    pub old_policy: OldPolicyConfig,
    /// The average that is evaluated.
    #[serde(default)]
    pub ema: EmaConfig,
    /// The optimizer.
    #[serde(default)]
    pub optim: OptimConfig,
    /// Ranks and their state.
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// Messages.
    #[serde(default)]
    pub log: LogConfig,
}

/// `[run]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunSection {
    /// Title of the report.
    pub name: String,
    /// Seed of every random number: prompts, noise, timesteps, adapters; evaluations have their
    /// own.
    pub seed: u64,
    /// Optimizer updates in all.
    pub updates: u64,
    /// Run folder: config, metrics, samples, checkpoints, report, logs. `--out` overrides it.
    pub out: PathBuf,
    /// Updates between evaluations; 0: at the start and the end only.
    pub eval_every: u64,
    /// Updates between checkpoints; 0: at the end only, and when a signal asks to leave.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept; older ones are deleted.
    pub keep_last: usize,
    /// Keeps the checkpoint with the best evaluation of the first reward, too (checkpoints/BEST).
    pub keep_best: bool,
}

impl Default for RunSection {
    fn default() -> Self {
        Self {
            name: "flowrl".into(),
            seed: 42,
            updates: 1000,
            out: "runs/flowrl".into(),
            eval_every: 10,
            checkpoint_every: 10,
            keep_last: 3,
            keep_best: true,
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Prompts to train on: "glyphs" (numbers of three digits), "glyphs-4" (of four), "shapes"
    /// ("two red circles left of a blue square", by GenEval's tags), or a file (one prompt a line; JSON objects with "prompt", one a line or in a list; or a table with a
    /// header that names "prompt"), or a folder with train.txt or train_metadata.jsonl.
    /// "negative_prompt" is what guidance leads away from, other keys go to remote rewards.
    pub train: String,
    /// Prompts to evaluate, of the same form (test.txt, ...); "glyphs" and "shapes" are held
    /// out from training.
    pub eval: String,
    /// How prompt files are written: "auto": by what they hold; "text": each line is a prompt as it
    /// stands; "jsonl": a JSON object a line.
    pub format: Format,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { train: "glyphs".into(), eval: "glyphs".into(), format: Format::Auto }
    }
}

/// `[batch]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// P: different prompts of an iteration, over all ranks (48 x 24 images: DiffusionNFT).
    pub prompts: usize,
    /// K: images of each prompt, the group that advantages compare; 2 or more.
    pub images_per_prompt: usize,
    /// B: samples that go through the model at once on a rank; changes memory and speed only.
    pub micro_batch: usize,
    /// Optimizer updates made from one iteration's images; each takes its share of every group.
    pub updates_per_iteration: usize,
    /// Timesteps an image is trained at; left out: 99 % of `sampler.steps`, rounded down, or
    /// `sampler.sde.window`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timesteps: Option<usize>,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { prompts: 48, images_per_prompt: 24, micro_batch: 8, updates_per_iteration: 1, timesteps: None }
    }
}

/// `[eval]`: how evaluations are sampled: always the same prompts and noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// As in `[sampler]`, whose shift is used here too.
    pub solver: Solver,
    /// Solver steps.
    pub steps: usize,
    /// Prompts, from the start of `data.eval`; 0: all.
    pub prompts: usize,
    /// Images of each prompt.
    pub images_per_prompt: usize,
    /// Classifier-free guidance; 1: none.
    pub guidance: f64,
    /// Seed of the noise: the same for every `run.seed`, so that runs are compared on the same
    /// noise.
    pub seed: u64,
}

impl EvalConfig {
    /// The sampler of an evaluation: what `[eval]` leaves open is that of the rollouts.
    pub fn sampler(&self, rollouts: &SamplerConfig) -> SamplerConfig {
        SamplerConfig { solver: self.solver, steps: self.steps, guidance: self.guidance, ..rollouts.clone() }
    }

    /// Prompts of an evaluation on a set that holds so many.
    pub fn count(&self, held: usize) -> usize {
        if self.prompts == 0 { held } else { self.prompts.min(held) }
    }
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { solver: Solver::Dpm2, steps: 10, prompts: 0, images_per_prompt: 1, guidance: 1.0, seed: 42 }
    }
}

/// `[old_policy]`: the policy that samples; after an iteration it becomes eta old + (1 - eta)
/// policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OldPolicyConfig {
    /// eta after n updates (DiffusionNFT, return_decay): 0: 0 (on policy); 1: min(0.001 n, 0.5); 2:
    /// 0 before update 75, then min(0.0075 (n - 75), 0.999).
    #[serde(deserialize_with = "schedule")]
    pub schedule: OldPolicySchedule,
    /// Another rise of eta with an update; left out: the schedule's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Another largest eta; left out: the schedule's, or the method's own (awm: 0.3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Default for OldPolicyConfig {
    fn default() -> Self {
        Self { schedule: OldPolicySchedule::Linear, rate: None, max: None }
    }
}

/// Any other value is an error that lists the schedules.
fn schedule<'de, D: Deserializer<'de>>(deserializer: D) -> Result<OldPolicySchedule, D::Error> {
    let kind = u8::deserialize(deserializer).ok().and_then(|kind| OldPolicySchedule::try_from(kind).ok());
    kind.ok_or_else(|| D::Error::custom("must be 0 (on policy), 1 (linear) or 2 (delayed)"))
}

/// `[ema]`: the average that is evaluated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Decay of the weights that are evaluated, at update n: min((1 + n) / (10 + n), decay).
    pub decay: f64,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.9 }
    }
}

/// `[parallel]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// "auto": by the launcher that is found; "solo": one rank; "mpi": mpirun or srun --mpi=pmix;
    /// "tcp": no MPI.
    pub backend: Backend,
    /// "auto": the GPU where there is one that works; "cpu"; "cuda": the GPU, or an error that says
    /// why not.
    pub device: DeviceChoice,
    /// What the ranks share out: "none"; "optimizer": master weights, moments, old policy, EMA;
    /// "full": the model's weights too, gathered stage by stage when they are used.
    pub shard: Sharding,
    /// Stages that run again in the backward pass: 0: none, keeps all activations; 1: each; n: each
    /// n-th; never the last block.
    pub checkpoint_activations: Checkpointing,
    /// Images are scored while the next ones are sampled: "auto": by servers, and beside a GPU;
    /// "on"; "off": after.
    pub reward_overlap: Overlap,
    /// Iterations between comparisons of what must be equal on all ranks; 0: never.
    pub check_every: u64,
    /// Seconds that a rank waits for a peer before the job ends with exit code 75.
    pub deadline_s: u64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            device: DeviceChoice::Auto,
            shard: Sharding::Optimizer,
            checkpoint_activations: Checkpointing::EACH,
            reward_overlap: Overlap::Auto,
            check_every: 10,
            deadline_s: 600,
        }
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// "error" .. "trace", also by module; the terminal shows info and above, logs/ all.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info,flowrl_dist=debug".into() }
    }
}

/// What a configuration is loaded for: which of the prompts and folders that it names must be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To use the model: none of them.
    Model,
    /// To evaluate: the prompts of the evaluations.
    Evaluation,
    /// To train: the prompts that are trained on and the run folder, too.
    Training,
}

/// What a bare `flowrl-dist` runs.
const EMBEDDED: &str = include_str!("../../configs/glyphs/flow-awr.toml");

impl RunConfig {
    /// [`RunConfig::load_for`] training.
    ///
    /// # Errors
    /// As there.
    pub fn load(file: Option<&Path>, set: &[String]) -> Result<Self, Error> {
        Self::load_for(Use::Training, file, set)
    }

    /// Reads `file` (nothing: the embedded task), applies `key.path=value` settings, checks everything, but of the files
    /// and folders that it names only those that the `purpose` needs, and takes from the model's files what the configuration
    /// leaves to them.
    ///
    /// # Errors
    /// [`Error::Usage`]: one line with file, key, value and remedy; [`Error::File`]: a file of the model's.
    pub fn load_for(purpose: Use, file: Option<&Path>, set: &[String]) -> Result<Self, Error> {
        let mut config: RunConfig = load::read(file, EMBEDDED, set, |config| validate::check(config, purpose))?;
        config.resolve_shift()?;
        Ok(config)
    }

    /// The prompts that are evaluated.
    pub fn eval_prompts(&self) -> Result<PromptSet, Error> {
        PromptSet::load(&self.data.eval, Split::Eval, self.data.format)
    }

    /// Whether the files that the run needs beside its prompts are there and whole: the model's and the rewards'.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Usage`]: what is absent.
    pub fn check_files(&self) -> Result<(), Error> {
        self.model.check_files()?;
        let check =
            |(i, reward): (usize, &RewardConfig)| reward.settings.check_files().map_err(|e| format!("reward[{i}].{e}"));
        self.reward.iter().enumerate().try_for_each(check).map_err(Error::Usage)
    }

    /// Timesteps an image is trained at.
    pub fn timesteps(&self) -> usize {
        let steps = self.sampler.steps;
        let all = match (self.sampler.solver, self.sampler.sde.window) {
            (Solver::Sde, Some(window)) if window < steps => window,
            _ => steps * 99 / 100,
        };
        self.batch.timesteps.unwrap_or(all).max(1)
    }

    /// How the old policy follows.
    pub fn old_policy_decay(&self) -> OldPolicyDecay {
        let OldPolicyConfig { schedule, rate, max } = self.old_policy;
        let published = self.method.old_policy(schedule);
        OldPolicyDecay { rate: rate.unwrap_or(published.rate), max: max.unwrap_or(published.max), ..published }
    }

    /// Whether the old policy is set to the policy after every iteration, however that is configured.
    pub fn is_on_policy(&self) -> bool {
        self.old_policy_decay().is_zero()
    }

    /// Whether the old policy is another than the policy in update `update` of an iteration: on policy too, after the
    /// iteration's first update has moved the policy.
    pub fn old_policy_lags(&self, update: usize) -> bool {
        update > 0 || !self.is_on_policy()
    }

    /// What an update minimises.
    pub fn objective(&self) -> Box<dyn Objective> {
        self.method.objective(&self.advantage.resolve(&self.method))
    }
}

/// File of a run folder with the configuration of the run.
pub const RUN_CONFIG: &str = "config.toml";

/// The file that stands where a folder, or a folder that it lies in, should be.
pub(crate) fn file_in_the_way(folder: &Path) -> Option<&Path> {
    folder.ancestors().find(|path| path.is_file())
}

/// Reads any other configuration (pretraining, a machine file, served rewards); `check` returns one line: key, value,
/// remedy.
pub fn read<T: DeserializeOwned>(
    file: &Path,
    set: &[String],
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<T, Error> {
    load::read(Some(file), "", set, check)
}

#[cfg(test)]
mod tests;
