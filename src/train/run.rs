//! The run around the iterations: start or resume, evaluate, save, log, leave when asked.

use super::Trainer;
use super::inputs::{self, Digests};
use super::lock::RunLock;
use super::outlook::{Outlook, Work};
use super::points::Points;
use super::preflight::preflight;
use super::records::Records;
use super::resume::{self, Begin};
use super::saving::{Best, OLD_IS_POLICY, Scored, UNEVALUATED};
use super::stages::Stages;
use crate::checkpoint::{self, Identity, Resume, Saver};
use crate::comm::{World, agreed, binding_advice, exchange, phase};
use crate::config::RunConfig;
use crate::data::PromptSet;
use crate::device;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Gallery, evaluated, main_reward};
use crate::interrupt::Interrupt;
use crate::observe::{Metrics, Progress, logging, report};
use crate::optim::{NotFinite, Sharded};
use crate::params::Layout;
use crate::pipeline::Pipeline;
use crate::plan::Plan;
use crate::policy::Policies;
use crate::reward::{self, Rewards};
use crate::shard::Weights;
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

/// Trains as `config` says, from the start or from a checkpoint.
pub fn train(config: &RunConfig, resume: &Resume, world: &World) -> Result<Outcome> {
    let outlook = Outlook::new(world.rank() == 0);
    let answering = outlook.clone();
    let interrupt = Interrupt::install(move |signal| answering.answer(signal))?;
    let warnings = preflight(config, world)?;
    let Some(begin) = resume::begin(config, resume, &interrupt, world)? else {
        let signal = interrupt.requested().unwrap_or("a signal on another rank");
        let out = config.run.out.display();
        return Ok(Outcome::Interrupted(format!("{signal}: left {out} as it was; the same command starts again")));
    };
    let mut run = Run::start(config, begin, warnings, outlook, world)?;
    if run.until_done(&|world| interrupt.agreed(world))? {
        let signal = interrupt.requested().unwrap_or("a signal on another rank");
        let (update, out) = (run.trainer.state.update, config.run.out.display());
        return Ok(Outcome::Interrupted(format!(
            "{signal}: saved update {update} of {} in {out}; the same command continues",
            config.run.updates
        )));
    }
    run.finish()
}

/// A run in progress.
pub(super) struct Run<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) trainer: Trainer,
    eval_prompts: PromptSet,
    /// Of all prompt sets.
    pub(super) prompts: Digests,
    eval_rewards: Rewards,
    pub(super) saver: Saver,
    pub(super) best: Best,
    /// Why the last checkpoint is not there.
    pub(super) unsaved: Option<Error>,
    /// Iterations done.
    pub(super) iteration: u64,
    /// The update before the last iteration.
    before: u64,
    /// Iterations in a row without an update.
    fruitless: u64,
    /// Whether the evaluation that is due at this update is not done yet.
    pub(super) unevaluated: bool,
    records: Records,
    pub(super) progress: Progress,
    outlook: Outlook,
    begun: Instant,
    /// On rank 0.
    lock: Option<RunLock>,
}

impl<'a> Run<'a> {
    fn start(
        config: &'a RunConfig,
        Begin { lock, checkpoint: chosen }: Begin,
        warnings: Vec<String>,
        outlook: Outlook,
        world: &World,
    ) -> Result<Self> {
        let out = &config.run.out;
        let terminal = logging::init(world.rank(), Some(out), &config.log.level)?;
        outlook.show_on(&terminal);
        warnings.iter().filter(|_| world.rank() == 0).for_each(|warning| tracing::warn!("{warning}"));
        let plan = Plan::of(config, world.world_size())?;
        plan.notes.iter().filter(|_| world.rank() == 0).for_each(|note| tracing::warn!("{note}"));
        let (mut stages, eval_prompts) = (Stages::new(config)?, config.eval_prompts()?);
        phase("load");
        let place = world.place();
        let (device, why) = device::select(config.parallel.device, place.local_rank, place.ranks_on_host)?;
        let world = &world.on(&device, Duration::from_secs(config.parallel.deadline_s))?;
        // Before prompts are encoded and weights are read: what is wrong with a reward is told now.
        let threads = candle_core::utils::get_num_threads();
        let loader = reward::Loader::new(threads, &device); // one for both: they share their models
        let rewards: Rewards = loader.build(&config.reward)?.into();
        let eval_rewards: Rewards = loader.build(&evaluated(config))?.into();
        agreed(eval_rewards.iter().try_for_each(|reward| reward.ready()), &*world.host)?;
        let prompts = inputs::prompts(&stages, (&config.data.eval, &eval_prompts))?;
        inputs::agree(&prompts, world)?; // before they decide which prompts are encoded
        let drawn = stages.drawn(&plan.stages, plan.prompts);
        let looked_at = eval_prompts.prompts.iter().take(config.eval.count(eval_prompts.len()).max(COMPARED));
        let trained = drawn.into_iter().flat_map(|prompt| prompt.texts(config.sampler.is_guided()));
        let guided = config.eval.sampler(&config.sampler).is_guided();
        let texts: Vec<&str> = trained.chain(looked_at.flat_map(|prompt| prompt.texts(guided))).collect();
        Pipeline::prepare(&config.model, &texts, &device, &*world.host)?;
        let mut pipeline = Pipeline::load(&config.model, config.run.seed, &device)?;
        inputs::agree(&inputs::weights(&config.model, &pipeline.base_digest)?, world)?;
        let base = pipeline.take_base(); // of which this rank may read its parts only
        let trainable = config.model.trainable;
        let layout = Layout::new(&pipeline.model.specs(), trainable);
        let mut state = Sharded::new(&*base, &layout, config.parallel.shard, &*world.device)?;
        let base_digest = pipeline.base_digest.clone();
        let identity = Identity::new(config.digest()?, base_digest, &layout, config.run.seed);
        let (mut iteration, mut best, mut skipped, mut unevaluated) = (0, Best::default(), 0, true);
        let mut old_is_policy = None;
        if let Some(path) = &chosen {
            let reader = checkpoint::open(path)?;
            let (changes, of_evaluations) = match RunConfig::of_run(path) {
                None => Default::default(),
                Some(earlier) => (config.changes_since(&earlier)?, config.evaluation_changes_since(&earlier)?),
            };
            for warning in reader.check_identity(&identity, &changes)? {
                tracing::warn!("{warning}");
            }
            for change in of_evaluations {
                let path = path.display();
                tracing::warn!("checkpoint {path}: {change}: evaluations do not compare with the earlier ones");
            }
            (iteration, best) = (reader.state().iteration, Best::of_checkpoint(reader.state()));
            skipped = reader.state().extra["skipped"].as_u64().unwrap_or(0);
            unevaluated = reader.state().extra[UNEVALUATED].as_bool().unwrap_or(reader.state().update == 0);
            for name in inputs::changed(&prompts, reader.state()) {
                let path = path.display();
                tracing::warn!("checkpoint {path}: {name} held other prompts: the run is another one from here on");
            }
            old_is_policy = reader.state().extra[OLD_IS_POLICY].as_bool();
            stages.restore(reader.state()).map_err(|message| Error::Checkpoint { path: path.clone(), message })?;
            state.restore(reader.read(&state.held())?.vectors, reader.state().update)?;
        }
        let update = state.update;
        let old_is_policy = old_is_policy.unwrap_or_else(|| config.old_policy_decay().eta(update) == 0.0);
        let policies = Policies::new(&*base, &pipeline.model.specs(), trainable, &state, old_is_policy, world)?;
        let first = world.rank() == 0;
        lock.as_ref().map_or(Ok(()), RunLock::check)?; // loading may have taken long
        let records = Records::open(out, chosen.is_some().then_some(update), first)?;
        // A run that is done, of which nothing more is trained, keeps the configuration that it was trained with.
        if first && (chosen.is_none() || update < config.run.updates) {
            config.write(out)?;
        }
        let mut progress = Progress::new(config.run.updates, first, &terminal);
        progress.note(&format!("{}: {}; on {why}", config.run.name, world.describe()));
        if let Some(advice) = binding_advice() {
            progress.note(&advice);
        }
        if let Some(path) = &chosen {
            progress.note(&format!("continues after update {update} from {}", path.display()));
            progress.resume_at(update);
        }
        if stages.are_several() {
            progress.note(&stages.now().to_string());
        }
        progress.note(&format!("{} is written anew after each evaluation", out.join(report::FILE).display()));
        tracing::debug!("rank {} on {}, {threads} threads, update {update}", world.rank(), world.hostname());
        let trainer = Trainer {
            world: world.clone(),
            config: config.clone(),
            pipeline,
            stages,
            rewards,
            objective: config.objective(),
            points: Points::new(config),
            layout,
            state,
            policies,
            skipped,
        };
        // New for each life of the run, the same on every rank.
        let generation = exchange(&*world.host, &nanoseconds())?[0];
        let saver = Saver::new(&checkpoint::root(out), identity, generation);
        let begun = Instant::now();
        Ok(Self {
            config,
            trainer,
            eval_prompts,
            prompts,
            eval_rewards,
            saver,
            best,
            unsaved: None,
            iteration,
            before: update,
            fruitless: 0,
            unevaluated,
            records,
            progress,
            outlook,
            begun,
            lock,
        })
    }

    /// Trains, evaluates and saves until all updates are taken, or until the ranks are `asked` to leave, which all are told
    /// alike; then saves at once, without an evaluation, and returns true.
    fn until_done(&mut self, asked: &dyn Fn(&World) -> Result<bool>) -> Result<bool> {
        let mut leaving = asked(self.world())?;
        if !leaving && self.unevaluated {
            self.evaluate().map_err(|e| self.ended_by(e))?;
            if self.iteration > 0 {
                self.save()?; // of the same update: now with its evaluation
            }
            leaving = asked(self.world())?;
        }
        while !leaving && !self.done() {
            self.iteration().map_err(|e| self.ended_by(e))?;
            self.look_after_saving()?;
            self.unevaluated = self.due(self.config.run.eval_every);
            leaving = asked(self.world())?;
            if !leaving && self.unevaluated {
                self.evaluate().map_err(|e| self.ended_by(e))?;
                leaving = asked(self.world())?;
            }
            if !leaving && self.due(self.config.run.checkpoint_every) {
                self.save()?;
            }
        }
        if leaving {
            self.outlook.begin(Work::Saving);
            self.save()?;
            self.saved_at_last()?;
            self.records.flush();
        }
        Ok(leaving)
    }

    /// Fails on rank 0, which ends all ranks, where another run has taken over the folder, or it was removed or moved. Before
    /// anything is written into it: what is written where nobody finds it would be lost without a word.
    pub(super) fn check_lock(&self) -> Result<()> {
        self.lock.as_ref().map_or(Ok(()), RunLock::check)
    }

    fn iteration(&mut self) -> Result<()> {
        self.outlook.begin(Work::Iteration);
        self.before = self.trainer.state.update;
        let progress = &mut self.progress;
        let updates = match self.trainer.iteration(self.iteration, &mut |name| progress.phase(name)) {
            Err(Error::NotFinite(what)) if self.config.optim.not_finite == NotFinite::Skip => {
                self.trainer.skip(&what);
                Vec::new()
            }
            updates => updates?,
        };
        self.iteration += 1;
        self.fruitless = if updates.is_empty() { self.fruitless + 1 } else { 0 };
        if self.fruitless == MOST_FRUITLESS {
            return Err(Error::NotFinite(format!(
                "{MOST_FRUITLESS} iterations in a row were left out because something was not finite: start again from an \
                 earlier checkpoint with a smaller optim.lr"
            )));
        }
        let every = self.config.parallel.check_every;
        if self.iteration.is_multiple_of(every) {
            self.trainer.check_replicas()?;
        }
        self.check_lock()?;
        for (i, metrics) in updates.iter().enumerate() {
            let update = self.before + 1 + i as u64;
            self.records.update(update, metrics);
            let value = |name| metrics.get(name).unwrap_or(f64::NAN);
            tracing::debug!(
                "update {update}: loss {:.5}, gradient norm {:.4}, {:.2} s",
                value("loss"),
                value("grad_norm"),
                value("time.total")
            );
            self.progress.update(update, metrics);
        }
        Ok(())
    }

    /// Whether all updates are taken.
    fn done(&self) -> bool {
        self.trainer.state.update >= self.config.run.updates
    }

    /// Whether what comes every `every` updates is due: at the end, and when the last iteration went past a multiple;
    /// 0 is at the end only.
    fn due(&self, every: u64) -> bool {
        self.done() || (every > 0 && self.before / every < self.trainer.state.update / every)
    }

    pub(super) fn world(&self) -> &World {
        &self.trainer.world
    }

    /// The EMA's scores on the evaluation prompts, into the log, with a grid of pictures.
    fn evaluate(&mut self) -> Result<()> {
        phase("evaluate");
        self.outlook.begin(Work::Evaluation);
        self.progress.aside("evaluate");
        let since = Instant::now();
        let sent = self.world().sent();
        let ema = self.trainer.policies.with(self.trainer.state.ema())?;
        let count = self.config.eval.count(self.eval_prompts.len());
        let (mut metrics, gallery) = self.sampled(&*ema, count, &self.eval_rewards)?;
        metrics.set("sent.eval", (self.world().sent() - sent) as f64);
        metrics.set("time.eval", since.elapsed().as_secs_f64());
        let update = self.trainer.state.update;
        self.best.evaluated = main_reward(self.config, &metrics).map(|reward| Scored { update, reward });
        self.unevaluated = false;
        self.check_lock()?;
        self.records.evaluation(update, &metrics, &gallery)?;
        self.progress.evaluation(update, &metrics);
        Ok(())
    }

    fn sampled(&self, params: &dyn Weights, count: usize, rewards: &Rewards) -> Result<(Metrics, Gallery)> {
        let eval = &self.config.eval;
        let sampler = eval.sampler(&self.config.sampler);
        let evaluation = Evaluation {
            prompts: &self.eval_prompts.prompts[..count],
            images_per_prompt: eval.images_per_prompt,
            sampler: &sampler,
            micro_batch: self.config.batch.micro_batch,
            seed: eval.seed,
            overlap: self.config.parallel.reward_overlap,
        };
        evaluation.run(&self.trainer.pipeline, params, rewards, self.world())
    }

    /// The last checkpoint, the pictures before and after, the report, and the last line.
    fn finish(mut self) -> Result<Outcome> {
        self.outlook.begin(Work::Finish);
        self.check_lock()?;
        self.saved_at_last()?;
        self.progress.aside("report");
        let count = COMPARED.min(self.eval_prompts.len());
        let policies = &self.trainer.policies;
        let none = Rewards::default();
        let (_, before) = self.sampled(&*policies.reference, count, &none)?;
        let (_, after) = self.sampled(&*policies.with(self.trainer.state.ema())?, count, &none)?;
        self.progress.finish();
        if self.world().rank() != 0 {
            return Ok(Outcome::Done(String::new()));
        }
        self.check_lock()?;
        let out = &self.config.run.out;
        let title = format!("after update {}", self.trainer.state.update);
        self.records.finish(&before, &after, &title)?;
        let page = report::write(out)?;
        let seconds = self.begun.elapsed().as_secs();
        let change = summary(out)?;
        Ok(Outcome::Done(format!(
            "{change} after {} updates, {seconds} s here; look at {} and {}",
            self.trainer.state.update,
            page.display(),
            out.join("samples/before_after.png").display()
        )))
    }
}

/// The run ends after as many iterations in a row without an update.
const MOST_FRUITLESS: u64 = 10;

/// Prompts in the picture of before and after.
const COMPARED: usize = 12;

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// "held-out ocr 0.512 -> 0.873, exact 0.310 -> 0.745", from the log's first and last evaluation.
fn summary(out: &Path) -> Result<String> {
    let path = out.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let evaluations: Vec<serde_json::Value> = text
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .filter(|v: &serde_json::Value| !v["eval.images"].is_null())
        .collect();
    let (Some(first), Some(last)) = (evaluations.first(), evaluations.last()) else {
        return Ok("no evaluation".into());
    };
    let names = last.as_object().into_iter().flatten().map(|(k, _)| k.as_str());
    let parts = names.filter(|k| k.ends_with(".mean") || *k == "eval.exact").filter_map(|k| {
        let (a, b) = (first[k].as_f64()?, last[k].as_f64()?);
        let short = k.trim_start_matches("eval.").trim_start_matches("reward.").trim_end_matches(".mean");
        Some(format!("{short} {a:.3} -> {b:.3}"))
    });
    Ok(format!("held-out {}", parts.collect::<Vec<_>>().join(", ")))
}

#[cfg(test)]
mod tests;
