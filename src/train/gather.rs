//! The scores of an iteration: this rank's, and all ranks' in the order of the images.

use super::Trainer;
use super::meter::Meter;
use crate::advantage::{Advantages, Score, Scores};
use crate::batching::share;
use crate::data::Prompt;
use crate::error::Result;
use crate::observe::Metrics;
use crate::reward::{Scoring, check_scores};
use candle_core::{Device, Tensor};

/// The scores of some images: those of this rank, or all N.
pub(super) struct ScoreTable {
    /// The group of each image.
    pub groups: Vec<usize>,
    /// By reward, one score per image.
    pub rewards: Vec<Scores>,
}

impl Trainer {
    /// The scores of this rank's images, once all are there, with the weights of the stage in
    /// force.
    pub(super) fn own_scores(&self, scoring: Scoring, prompts: &[Prompt], meter: &mut Meter) -> Result<ScoreTable> {
        let (results, busy) = scoring.finish()?;
        meter.shared.max("time.reward_busy", busy.as_secs_f64());
        let mut rewards = Vec::with_capacity(self.rewards.len());
        for (reward, result) in self.rewards.iter().zip(results) {
            let name = reward.name().to_owned();
            let weight = self.stages.now().weight(&name);
            rewards.push(Scores { name, weight, scores: result.scores });
        }
        check_scores(&rewards, prompts)?;
        Ok(ScoreTable { groups: prompts.iter().map(|prompt| prompt.index).collect(), rewards })
    }

    /// All ranks' scores, by one all-gather of rows (group, each reward's score), in f64.
    pub(super) fn gather(&self, own: &ScoreTable) -> Result<ScoreTable> {
        let width = 1 + own.rewards.len();
        let ranks = self.world.world_size();
        let images = self.config.batch.prompts * self.config.batch.images_per_prompt;
        let sizes: Vec<usize> = (0..ranks).map(|rank| share(images, rank, ranks).len()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);

        let mut sent = vec![0.0; largest * width];
        for (image, row) in sent.chunks_exact_mut(width).take(own.groups.len()).enumerate() {
            row[0] = own.groups[image] as f64;
            for (cell, reward) in row[1..].iter_mut().zip(&own.rewards) {
                *cell = reward.scores[image].to_f64();
            }
        }
        let sent = Tensor::from_vec(sent, largest * width, &Device::Cpu)?;
        let all = self.world.host.all_gather(&sent)?.to_vec1::<f64>()?;

        let mut groups = Vec::with_capacity(images);
        let mut rewards: Vec<Scores> =
            own.rewards.iter().map(|reward| Scores { scores: Vec::with_capacity(images), ..reward.clone() }).collect();
        let mut failing = Vec::new(); // ranks
        for (rank, (rows, size)) in all.chunks_exact(largest * width).zip(sizes).enumerate() {
            let rows = rows.chunks_exact(width).take(size);
            if rows.clone().flat_map(|row| &row[1..]).any(|&score| Score::from_f64(score) == Score::Failed) {
                failing.push(rank);
            }
            for row in rows {
                groups.push(row[0] as usize);
                rewards.iter_mut().zip(&row[1..]).for_each(|(of, &score)| of.scores.push(Score::from_f64(score)));
            }
        }
        if self.world.rank() == 0 {
            warn_of_others(&failing);
        }
        Ok(ScoreTable { groups, rewards })
    }
}

/// Other ranks' warnings only reach their log files, so rank 0 says on the terminal that there are
/// some.
fn warn_of_others(failing: &[usize]) {
    let others: Vec<usize> = failing.iter().copied().filter(|&rank| rank > 0).collect();
    if let Some(first) = others.first() {
        let count = others.len();
        tracing::warn!("images of {count} other rank(s) have no score: logs/rank_{first:05}.log says why of the first");
    }
}

impl ScoreTable {
    /// What the metrics say of the rewards and their advantages.
    pub fn describe(&self, advantages: &Advantages, metrics: &mut Metrics) {
        for reward in &self.rewards {
            let count = reward.values().count().max(1) as f64;
            let mean = reward.values().sum::<f64>() / count;
            let variance = reward.values().map(|s| (s - mean) * (s - mean)).sum::<f64>() / count;
            metrics.set(&format!("reward.{}.mean", reward.name), mean);
            metrics.set(&format!("reward.{}.std", reward.name), variance.sqrt());
        }
        metrics.set("advantage.zero_groups", advantages.zero_groups);
        metrics.set("advantage.clipped", advantages.clipped);
        metrics.set("advantage.rms", advantages.rms);
        metrics.set("advantage.effective", advantages.effective);
        metrics.set("advantage.temperature", advantages.temperature);
        metrics.set("images", self.groups.len() as f64);
        metrics.set("dropped_groups", advantages.dropped.len() as f64);
    }
}
