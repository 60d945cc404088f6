//! The run around the iterations: evaluate, save, log, leave when asked.

use super::checkpoints::CheckpointManager;
use super::inputs::Digests;
use super::lock::RunLock;
use super::outlook::{Outlook, Work};
use super::records::Records;
use super::state::{Evaluated, RunState};
use super::{COMPARED, Trainer};
use crate::comm::{World, phase};
use crate::config::{RUN_CONFIG, RunConfig};
use crate::data::PromptSet;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Gallery, main_reward};
use crate::fs;
use crate::observe::{Metrics, Progress, report};
use crate::optim::NotFinite;
use crate::reward::Rewards;
use crate::shard::Weights;
use std::path::Path;
use std::time::Instant;

/// A run in progress.
pub(super) struct Run<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) trainer: Trainer,
    pub(super) eval_prompts: PromptSet,
    /// Of all prompt sets.
    pub(super) prompts: Digests,
    pub(super) eval_rewards: Rewards,
    pub(super) checkpoints: CheckpointManager,
    /// Iterations done.
    pub(super) iteration: u64,
    /// The update before the last iteration.
    pub(super) before: u64,
    /// Iterations in a row without an update.
    pub(super) fruitless: u64,
    /// Whether the evaluation that is due at this update is not done yet.
    pub(super) unevaluated: bool,
    pub(super) records: Records,
    pub(super) progress: Progress,
    pub(super) outlook: Outlook,
    pub(super) begun: Instant,
    /// On rank 0.
    pub(super) lock: Option<RunLock>,
}

impl Run<'_> {
    /// Trains, evaluates and saves until all updates are taken, or until the ranks are `asked` to
    /// leave, which all are told alike; then saves at once, without an evaluation, and returns
    /// true.
    pub(super) fn until_done(&mut self, asked: &dyn Fn(&World) -> Result<bool>) -> Result<bool> {
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
            self.checkpoints.poll(&*self.trainer.world.host)?;
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
            self.checkpoints.finish(&*self.trainer.world.host)?;
            self.records.flush();
        }
        Ok(leaving)
    }

    /// Fails on rank 0, which ends all ranks, where another run has taken over the folder, or it
    /// was removed or moved. Before anything is written into it: what is written where nobody finds
    /// it would be lost without a word.
    fn check_lock(&self) -> Result<()> {
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

    /// Whether what comes every `every` updates is due: at the end, and when the last iteration
    /// went past a multiple; 0 is at the end only.
    fn due(&self, every: u64) -> bool {
        self.done() || (every > 0 && self.before / every < self.trainer.state.update / every)
    }

    fn world(&self) -> &World {
        &self.trainer.world
    }

    /// Where the run stands.
    fn state(&self) -> RunState {
        let Trainer { state, skipped, stages, policies, .. } = &self.trainer;
        RunState {
            update: state.update,
            iteration: self.iteration,
            best: self.checkpoints.best_with(state.update),
            skipped: *skipped,
            stages: stages.begun(),
            unevaluated: self.unevaluated,
            old_is_policy: policies.old_is_policy,
            prompts: self.prompts.clone(),
        }
    }

    /// Begins a checkpoint of this update; training goes on while it is written.
    fn save(&mut self) -> Result<()> {
        self.check_lock()?;
        self.checkpoints.wait(&*self.trainer.world.host)?;
        self.check_lock()?; // that may have taken long
        self.keep_config()?;
        self.progress.aside("checkpoint");
        let (state, shard) = (self.state(), self.trainer.state.snapshot()?);
        self.checkpoints.begin(&state, shard, &*self.trainer.world.host)
    }

    /// Writes the configuration again if it was removed meanwhile: checkpoints are used with it. By
    /// rank 0.
    fn keep_config(&self) -> Result<()> {
        let path = self.config.run.out.join(RUN_CONFIG);
        if self.world().rank() != 0 || path.exists() {
            return Ok(());
        }
        tracing::warn!("{}: was removed while the run goes on: it is written again", path.display());
        fs::write(&path, self.config.to_toml()?)
    }

    /// Prepares to end the run with an error that all ranks share: waits for the save in progress
    /// and, after a failed reward, which is no fault of the run's, saves the present state as well.
    fn ended_by(&mut self, error: Error) -> Error {
        let saved = match error {
            Error::NotFinite(_) => self.checkpoints.wait(&*self.trainer.world.host),
            Error::Reward { .. } => self.save().and_then(|()| self.checkpoints.finish(&*self.trainer.world.host)),
            _ => return error,
        };
        match (saved, error) {
            (Ok(()), Error::Reward { name, message }) => {
                let update = self.trainer.state.update;
                let saved = format!("saved update {update}: the same command continues once that is mended");
                Error::Reward { name, message: format!("{message}; {saved}") }
            }
            (Ok(()), error) => error,
            (Err(e), error) => {
                tracing::warn!("{e}");
                error
            }
        }
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
        let main = self.eval_rewards.first().and_then(|first| main_reward(first.name(), &metrics));
        self.checkpoints.evaluated(main.map(|reward| Evaluated { update, reward }));
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

    /// The last checkpoint, the pictures before and after, the report, and the last line, which is
    /// rank 0's.
    pub(super) fn finish(mut self) -> Result<String> {
        self.outlook.begin(Work::Finish);
        self.check_lock()?;
        self.checkpoints.finish(&*self.trainer.world.host)?;
        self.progress.aside("report");
        let count = COMPARED.min(self.eval_prompts.len());
        let policies = &self.trainer.policies;
        let none = Rewards::default();
        let (_, before) = self.sampled(&*policies.reference, count, &none)?;
        let (_, after) = self.sampled(&*policies.with(self.trainer.state.ema())?, count, &none)?;
        self.progress.finish();
        if self.world().rank() != 0 {
            return Ok(String::new());
        }
        self.check_lock()?;
        let out = &self.config.run.out;
        let title = format!("after update {}", self.trainer.state.update);
        self.records.finish(&before, &after, &title)?;
        let page = report::write(out)?;
        let seconds = self.begun.elapsed().as_secs();
        let change = summary(out)?;
        Ok(format!(
            "{change} after {} updates, {seconds} s here; look at {} and {}",
            self.trainer.state.update,
            page.display(),
            out.join("samples/before_after.png").display()
        ))
    }
}

/// The run ends after as many iterations in a row without an update.
const MOST_FRUITLESS: u64 = 10;

/// "held-out ocr 0.512 -> 0.873, exact 0.310 -> 0.745", from the log's first and last evaluation.
fn summary(out: &Path) -> Result<String> {
    let path = out.join("metrics.jsonl");
    let text = crate::fs::read_to_string(&path)?;
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
