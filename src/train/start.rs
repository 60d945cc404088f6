//! A run from its start to its end. At the start everything is loaded, and what a checkpoint tells
//! is put back.

use super::batch::Batches;
use super::checkpoints::CheckpointManager;
use super::inputs::{self, Digests};
use super::lock::RunLock;
use super::outlook::Outlook;
use super::own::{Own, OwnReward};
use super::preflight::preflight;
use super::records::Records;
use super::resume::{self, Begin};
use super::run::Run;
use super::stages::Stages;
use super::state::RunState;
use super::{COMPARED, Trainer};
use crate::checkpoint::{self, Identity, Reader, Resume};
use crate::comm::{World, agreed, binding_advice, exchange, phase};
use crate::config::RunConfig;
use crate::data::PromptSet;
use crate::device;
use crate::error::{Error, Result};
use crate::evaluate::evaluated;
use crate::flow::Solver;
use crate::interrupt::Interrupt;
use crate::objective::Objective;
use crate::observe::{Progress, logging, report};
use crate::optim::Sharded;
use crate::params::Layout;
use crate::pipeline::Pipeline;
use crate::plan::Plan;
use crate::policy::Policies;
use crate::reward::{self, Reward, RewardConfig, Rewards};
use candle_core::Device;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All updates are done; one line that says what came of it and where to look (rank 0's words).
    Done(String),
    /// A signal asked the run to stop. A checkpoint was saved; the same command continues.
    Interrupted(String),
}

/// Trains as `config` says, with the caller's `own` rewards and objective where it brings some,
/// from the start or from a checkpoint. Every rank calls it.
///
/// # Errors
/// What the program says when a run ends with an error, the same on every rank but for faults of
/// one rank's machine.
pub fn train(config: &RunConfig, own: Own, resume: &Resume, world: &World) -> Result<Outcome> {
    let outlook = Outlook::new(world.rank() == 0);
    let answering = outlook.clone();
    let interrupt = Interrupt::install(move |signal| answering.answer(signal))?;
    let warnings = preflight(config, world)?;
    let Some(begin) = resume::begin(config, resume, &interrupt, world)? else {
        let signal = interrupt.requested().unwrap_or("a signal on another rank");
        let out = config.run.out.display();
        return Ok(Outcome::Interrupted(format!("{signal}: left {out} as it was; the same command starts again")));
    };
    let mut run = start(config, own, begin, warnings, outlook, world)?;
    if run.until_done(&|world| interrupt.agreed(world))? {
        let signal = interrupt.requested().unwrap_or("a signal on another rank");
        let (update, out) = (run.trainer.state.update, config.run.out.display());
        return Ok(Outcome::Interrupted(format!(
            "{signal}: saved update {update} of {} in {out}; the same command continues",
            config.run.updates
        )));
    }
    Ok(Outcome::Done(run.finish()?))
}

/// Loads what a run works on, and goes on from the checkpoint that was chosen, if one was.
/// Collective.
pub(super) fn start<'a>(
    config: &'a RunConfig,
    own: Own,
    begin: Begin,
    warnings: Vec<String>,
    outlook: Outlook,
    world: &World,
) -> Result<Run<'a>> {
    let Begin { lock, checkpoint } = begin;
    let terminal = logging::init(world.rank(), Some(&config.run.out), &config.log.level)?;
    outlook.show_on(&terminal);
    let plan = Plan::of(config, world.world_size())?;
    if world.rank() == 0 {
        warnings.iter().chain(&plan.notes).for_each(|warning| tracing::warn!("{warning}"));
    }
    let stages = Stages::new(config, &own.rewards)?;
    let objective = objective(config, own.objective)?;
    let eval_prompts = config.eval_prompts()?;

    phase("load");
    let place = world.place();
    let (device, why) = device::select(config.parallel.device, place.local_rank, place.ranks_on_host)?;
    let world = &world.on(&device, Duration::from_secs(config.parallel.deadline_s))?;
    // Before prompts are encoded and weights are read: what is wrong with a reward is told now.
    let [rewards, eval_rewards] = load_rewards(config, &own.rewards, &device, world)?;
    let prompts = inputs::prompts(&stages, (&config.data.eval, &eval_prompts))?;
    inputs::agree(&prompts, world)?; // before they decide which prompts are encoded
    let pipeline = load_pipeline(config, &plan, &stages, &eval_prompts, &device, world)?;
    let around = config.model.part_digests()?;
    inputs::agree(&inputs::weights(&config.model, &pipeline.base_digest, &around)?, world)?;
    let parts = Parts { pipeline, around, stages, rewards, objective };
    let (trainer, state, identity) = load_trainer(config, parts, &prompts, checkpoint.as_deref(), world)?;

    lock.as_ref().map_or(Ok(()), RunLock::check)?; // loading may have taken long
    let resumed = checkpoint.as_ref().map(|_| state.update);
    let records = Records::open(&config.run.out, resumed, world.rank() == 0)?;
    // A run that is done, of which nothing more is trained, keeps the configuration that it was
    // trained with.
    if world.rank() == 0 && (checkpoint.is_none() || state.update < config.run.updates) {
        config.write(&config.run.out)?;
    }
    let mut progress = Progress::new(config.run.updates, world.rank() == 0, &terminal);
    introduce(&mut progress, &trainer, &state, checkpoint.as_deref(), why);

    // New for each life of the run, the same on every rank.
    let generation = exchange(&*world.host, &nanoseconds())?[0];
    Ok(Run {
        config,
        trainer,
        eval_prompts,
        prompts,
        eval_rewards,
        checkpoints: CheckpointManager::new(&config.run, identity, state.best, generation),
        iteration: state.iteration,
        before: state.update,
        fruitless: 0,
        unevaluated: state.unevaluated,
        records,
        progress,
        outlook,
        begun: Instant::now(),
        lock,
    })
}

/// What a trainer is made of beside its parameters.
struct Parts {
    pipeline: Pipeline,
    /// Digests of what stands around the transformer.
    around: Digests,
    stages: Stages,
    rewards: Rewards,
    objective: Box<dyn Objective>,
}

/// The trainer with the parameters of the base model or of a checkpoint, where the run stands, and
/// what its checkpoints are known by. Collective.
fn load_trainer(
    config: &RunConfig,
    parts: Parts,
    prompts: &Digests,
    checkpoint: Option<&Path>,
    world: &World,
) -> Result<(Trainer, RunState, Identity)> {
    let Parts { mut pipeline, around, mut stages, rewards, objective } = parts;
    let base = pipeline.take_base(); // of which this rank may read its parts only
    let specs = pipeline.model.specs();
    let trainable = config.model.trainable;
    let layout = Layout::new(&specs, trainable);
    let mut vectors = Sharded::new(&*base, &layout, config.parallel.shard, &*world.device)?;
    let identity = Identity::new(config.digest()?, pipeline.base_digest.clone(), &layout, config.run.seed);
    let identity = Identity { parts: around, ..identity };
    let state = match checkpoint {
        None => fresh(config, &stages, prompts.clone()),
        Some(path) => {
            let reader = checkpoint::open(path)?;
            warn_of_changes(&reader, path, config, &identity)?;
            restore(&reader, path, prompts, &mut stages, &mut vectors)?
        }
    };
    let policies = Policies::new(&*base, &specs, trainable, &vectors, state.old_is_policy, world)?;
    let trainer = Trainer {
        world: world.clone(),
        config: config.clone(),
        batches: Batches::new(config, objective.requirements().trajectory),
        pipeline,
        stages,
        rewards,
        objective,
        layout,
        state: vectors,
        policies,
        skipped: state.skipped,
    };
    Ok((trainer, state, identity))
}

/// What is minimised: the caller's own objective, or the configuration's.
fn objective(config: &RunConfig, own: Option<Box<dyn Objective>>) -> Result<Box<dyn Objective>> {
    let Some(own) = own else { return Ok(config.objective()) };
    if own.requirements().trajectory && config.sampler.solver != Solver::Sde {
        return Err(Error::Usage(format!(
            "the caller's objective trains on the steps of stochastic rollouts, and sampler.solver = {:?}; set \
             sampler.solver = \"sde\"",
            config.sampler.solver
        )));
    }
    tracing::info!("trained with the caller's objective, in the place of [method]: {own:?}");
    Ok(own)
}

/// The rewards of training and of evaluations, which share their models; all are ready. Collective.
fn load_rewards(config: &RunConfig, own: &[OwnReward], device: &Device, world: &World) -> Result<[Rewards; 2]> {
    let loader = reward::Loader::new(candle_core::utils::get_num_threads(), device);
    let rewards = match own {
        [] => [loader.build(&config.reward)?, loader.build(&evaluated(config))?],
        own => {
            let mut names: Vec<&str> = own.iter().map(|own| own.reward.name()).collect();
            tracing::info!("scored by the caller's rewards, in the place of [[reward]]: {}", names.join(", "));
            names.sort_unstable();
            if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Error::Usage(format!("reward {}: named twice; give each a name of its own", twice[0])));
            }
            let boxed = || own.iter().map(|own| Box::new(own.reward.clone()) as Box<dyn Reward>).collect::<Vec<_>>();
            let is_new = |check: &RewardConfig| names.iter().all(|name| *name != check.label());
            let configured = RunConfig { reward: Vec::new(), ..config.clone() };
            let checks: Vec<RewardConfig> = evaluated(&configured).into_iter().filter(is_new).collect();
            [boxed(), boxed().into_iter().chain(loader.build(&checks)?).collect()]
        }
    };
    let [trained, evaluated] = rewards.map(Rewards::from);
    agreed(evaluated.iter().try_for_each(|reward| reward.ready()), &*world.host)?;
    Ok([trained, evaluated])
}

/// The model with its base weights, after all prompts that the run draws and shows are encoded.
/// Collective.
fn load_pipeline(
    config: &RunConfig,
    plan: &Plan,
    stages: &Stages,
    eval_prompts: &PromptSet,
    device: &Device,
    world: &World,
) -> Result<Pipeline> {
    let mut texts = Vec::new();
    for prompt in stages.drawn(&plan.stages, plan.prompts) {
        texts.extend(prompt.texts(config.sampler.is_guided()));
    }
    let guided = config.eval.sampler(&config.sampler).is_guided();
    let shown = config.eval.count(eval_prompts.len()).max(COMPARED);
    for prompt in eval_prompts.prompts.iter().take(shown) {
        texts.extend(prompt.texts(guided));
    }
    Pipeline::prepare(&config.model, &texts, device, &*world.host)?;
    Pipeline::load(&config.model, config.run.seed, device)
}

/// Where a run stands that begins.
fn fresh(config: &RunConfig, stages: &Stages, prompts: Digests) -> RunState {
    RunState {
        update: 0,
        iteration: 0,
        best: None,
        skipped: 0,
        stages: stages.begun(),
        unevaluated: true,
        old_is_policy: config.old_policy_decay().eta(0) == 0.0,
        prompts,
    }
}

/// Refuses a checkpoint of another model, and warns of what the configuration says otherwise now.
fn warn_of_changes(reader: &Reader, path: &Path, config: &RunConfig, identity: &Identity) -> Result<()> {
    let (changes, of_evaluations) = match RunConfig::of_run(path) {
        None => Default::default(),
        Some(earlier) => (config.changes_since(&earlier)?, config.evaluation_changes_since(&earlier)?),
    };
    for warning in reader.check_identity(identity, &changes)? {
        tracing::warn!("{warning}");
    }
    for change in of_evaluations {
        let path = path.display();
        tracing::warn!("checkpoint {path}: {change}: evaluations do not compare with the earlier ones");
    }
    Ok(())
}

/// Puts back what a checkpoint holds: the vectors, and which stages have begun; returns where its
/// run stood.
fn restore(
    reader: &Reader,
    path: &Path,
    prompts: &Digests,
    stages: &mut Stages,
    vectors: &mut Sharded,
) -> Result<RunState> {
    let refused = |message| Error::Checkpoint { path: path.to_path_buf(), message };
    let state = RunState::of_checkpoint(reader.state()).map_err(refused)?;
    for name in inputs::changed(prompts, &state.prompts) {
        let path = path.display();
        tracing::warn!("checkpoint {path}: {name} held other prompts: the run is another one from here on");
    }
    stages.restore(&state.stages, state.update).map_err(refused)?;
    vectors.restore(reader.read(&vectors.held())?.vectors, state.update)?;
    Ok(state)
}

/// The first lines of a run.
fn introduce(
    progress: &mut Progress,
    trainer: &Trainer,
    state: &RunState,
    checkpoint: Option<&Path>,
    device: impl std::fmt::Display,
) {
    let Trainer { world, config, stages, .. } = trainer;
    progress.note(&format!("{}: {}; on {device}", config.run.name, world.describe()));
    if let Some(advice) = binding_advice() {
        progress.note(&advice);
    }
    if let Some(path) = checkpoint {
        progress.note(&format!("continues after update {} from {}", state.update, path.display()));
        progress.resume_at(state.update);
    }
    if stages.are_several() {
        progress.note(&stages.now().to_string());
    }
    let page = config.run.out.join(report::FILE);
    progress.note(&format!("{} is written anew after each evaluation", page.display()));
    let threads = candle_core::utils::get_num_threads();
    tracing::debug!("rank {} on {}, {threads} threads, update {}", world.rank(), world.hostname(), state.update);
}

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}
