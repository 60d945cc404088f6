//! The rewards of an iteration: this rank's scores, and all ranks' scores in the order of the images.

use super::Trainer;
use crate::advantage::{AdvantageMap, Advantages, Scores, group_advantages};
use crate::batching::share;
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::observe::Metrics;
use crate::reward::{Scoring, check_scores};
use candle_core::{Device, Tensor};
use std::collections::BTreeSet;

/// This rank's scores.
pub(super) struct Scored {
    /// Each reward's, an image each.
    pub rewards: Vec<Scores>,
    /// Images with a score that could not be had.
    pub failed: BTreeSet<usize>,
}

/// All ranks' scores.
pub(super) struct Gathered {
    /// The group of each image, [N].
    pub groups: Vec<usize>,
    /// Each reward's scores, [N].
    pub rewards: Vec<Scores>,
    /// Groups in which a score could not be had: their images cannot be compared.
    pub dropped: BTreeSet<usize>,
}

impl Trainer {
    /// The scores of this rank's images, once all are there, with the weights of the stage in force.
    pub(super) fn scored(&self, scoring: Scoring, prompts: &[Prompt], metrics: &mut Metrics) -> Result<Scored> {
        let (attempts, busy) = scoring.finish()?;
        metrics.max("time.reward_busy", busy.as_secs_f64());
        let (mut rewards, mut failed) = (Vec::with_capacity(self.rewards.len()), BTreeSet::new());
        for ((reward, config), attempt) in self.rewards.iter().zip(&self.config.reward).zip(attempts) {
            failed.extend(attempt.failed);
            let weight = self.stages.now().weight(config.label());
            rewards.push(Scores { name: reward.name().to_owned(), weight, scores: attempt.scores });
        }
        check_scores(&rewards, prompts, &failed)?;
        Ok(Scored { rewards, failed })
    }

    /// All ranks' scores, by one all-gather of rows (prompt, whether a score failed, each reward's score), in f64. A score
    /// that does not apply travels as NaN; one that is not finite was refused before.
    pub(super) fn gather(&self, scored: &Scored, prompts: &[Prompt]) -> Result<Gathered> {
        const HEAD: usize = 2;
        let width = HEAD + scored.rewards.len();
        let ranks = self.world.world_size();
        let count = self.config.batch.prompts * self.config.batch.images_per_prompt;
        let sizes: Vec<usize> = (0..ranks).map(|r| share(count, r, ranks).len()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let mut rows = vec![0.0; largest * width];
        for (i, row) in rows.chunks_exact_mut(width).take(prompts.len()).enumerate() {
            (row[0], row[1]) = (prompts[i].index as f64, f64::from(u8::from(scored.failed.contains(&i))));
            scored.rewards.iter().zip(&mut row[HEAD..]).for_each(|(s, cell)| *cell = s.scores[i].unwrap_or(f64::NAN));
        }
        let all = self.world.host.all_gather(&Tensor::from_vec(rows, largest * width, &Device::Cpu)?)?;
        let all = all.to_vec1::<f64>()?;
        if self.world.rank() == 0 {
            let parts = all.chunks_exact(largest * width).zip(&sizes);
            warn_of_others(parts.map(|(rank, &size)| rank.chunks_exact(width).take(size).any(|row| row[1] != 0.0)));
        }
        let rows: Vec<&[f64]> = all
            .chunks_exact(largest * width)
            .zip(&sizes)
            .flat_map(|(rank, &size)| rank.chunks_exact(width).take(size))
            .collect(); // [N]
        let column = |k: usize| rows.iter().map(|r| Some(r[HEAD + k]).filter(|score| !score.is_nan())).collect();
        let of_all = |(k, s): (usize, &Scores)| Scores { scores: column(k), ..s.clone() };
        Ok(Gathered {
            groups: rows.iter().map(|r| r[0] as usize).collect(),
            rewards: scored.rewards.iter().enumerate().map(of_all).collect(),
            dropped: rows.iter().filter(|r| r[1] != 0.0).map(|r| r[0] as usize).collect(),
        })
    }
}

/// Other ranks' warnings only reach their log files, so rank 0 says on the terminal that there are some. `fails` tells of
/// each rank whether it has images without a score.
fn warn_of_others(fails: impl Iterator<Item = bool>) {
    let others: Vec<usize> = fails.enumerate().skip(1).filter_map(|(rank, fails)| fails.then_some(rank)).collect();
    if let Some(first) = others.first() {
        let count = others.len();
        tracing::warn!("images of {count} other rank(s) have no score: logs/rank_{first:05}.log says why of the first");
    }
}

impl Gathered {
    /// The advantages, [N]; those of dropped groups are 0, and their scores count nowhere.
    ///
    /// # Errors
    /// As [`group_advantages`]; [`Error::Reward`] if no group is left.
    pub fn advantages(&self, map: &AdvantageMap) -> Result<Advantages> {
        let kept: Vec<usize> = (0..self.groups.len()).filter(|&i| !self.dropped.contains(&self.groups[i])).collect();
        if kept.is_empty() {
            let name = self.rewards.iter().map(|reward| reward.name.as_str()).collect::<Vec<_>>().join(", ");
            let message = "no group of this iteration has all its scores; see the warnings, and start the server again";
            return Err(Error::Reward { name, message: message.to_string() });
        }
        let of_kept = |s: &Scores| Scores { scores: kept.iter().map(|&i| s.scores[i]).collect(), ..s.clone() };
        let rewards: Vec<Scores> = self.rewards.iter().map(of_kept).collect();
        let groups: Vec<usize> = kept.iter().map(|&i| self.groups[i]).collect();
        let advantages = group_advantages(&rewards, &groups, map)?;
        let mut values = vec![0.0; self.groups.len()];
        kept.iter().zip(&advantages.values).for_each(|(&i, &value)| values[i] = value);
        Ok(Advantages { values, ..advantages })
    }

    /// What the metrics say of the rewards and their advantages.
    pub fn describe(&self, advantages: &Advantages, metrics: &mut Metrics) {
        for Scores { name, scores, .. } in &self.rewards {
            let known: Vec<f64> = scores.iter().copied().flatten().collect();
            let count = known.len().max(1) as f64;
            let mean = known.iter().sum::<f64>() / count;
            let variance = known.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / count;
            metrics.set(&format!("reward.{name}.mean"), mean);
            metrics.set(&format!("reward.{name}.std"), variance.sqrt());
        }
        metrics.set("advantage.zero_groups", advantages.zero_groups);
        metrics.set("advantage.clipped", advantages.clipped);
        metrics.set("advantage.rms", advantages.rms);
        metrics.set("advantage.effective", advantages.effective);
        metrics.set("advantage.temperature", advantages.temperature);
        metrics.set("images", self.groups.len() as f64);
        metrics.set("dropped_groups", self.dropped.len() as f64);
    }
}
