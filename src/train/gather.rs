//! The rewards of an iteration: this rank's scores, and all ranks' scores in the order of the images.

use super::Trainer;
use crate::advantage::{Advantages, Scores};
use crate::data::Prompt;
use crate::error::Result;
use crate::evaluate::share;
use crate::observe::Metrics;
use crate::reward::check_scores;
use candle_core::{Device, Tensor};

/// All ranks' scores.
pub(super) struct Gathered {
    /// The group of each image, [N].
    pub groups: Vec<usize>,
    /// Each reward's scores, [N].
    pub rewards: Vec<Scores>,
}

impl Trainer {
    /// The scores of this rank's images.
    pub(super) fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Scores>> {
        let mut all = Vec::with_capacity(self.rewards.len());
        for (reward, config) in self.rewards.iter().zip(&self.config.reward) {
            let scores = reward.score(images, prompts)?;
            all.push(Scores { name: reward.name().to_owned(), weight: config.weight, scores });
        }
        check_scores(&all, prompts)?;
        Ok(all)
    }

    /// All ranks' scores, by one all-gather of rows (prompt, each reward's score), in f64. A score that does not apply
    /// travels as NaN; one that is not finite was refused before.
    pub(super) fn gather(&self, scores: &[Scores], prompts: &[Prompt]) -> Result<Gathered> {
        let width = 1 + scores.len();
        let ranks = self.world.world_size();
        let count = self.config.batch.prompts * self.config.batch.images_per_prompt;
        let sizes: Vec<usize> = (0..ranks).map(|r| share(count, r, ranks).len()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let mut rows = vec![0.0; largest * width];
        for (i, row) in rows.chunks_exact_mut(width).take(prompts.len()).enumerate() {
            row[0] = prompts[i].index as f64;
            scores.iter().zip(&mut row[1..]).for_each(|(s, cell)| *cell = s.scores[i].unwrap_or(f64::NAN));
        }
        let all = self.world.host.all_gather(&Tensor::from_vec(rows, largest * width, &Device::Cpu)?)?;
        let all = all.to_vec1::<f64>()?;
        let rows: Vec<&[f64]> = all
            .chunks_exact(largest * width)
            .zip(&sizes)
            .flat_map(|(rank, &size)| rank.chunks_exact(width).take(size))
            .collect(); // [N]
        let column = |k: usize| rows.iter().map(|r| Some(r[1 + k]).filter(|score| !score.is_nan())).collect();
        let of_all = |(k, s): (usize, &Scores)| Scores { scores: column(k), ..s.clone() };
        Ok(Gathered {
            groups: rows.iter().map(|r| r[0] as usize).collect(),
            rewards: scores.iter().enumerate().map(of_all).collect(),
        })
    }
}

impl Gathered {
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
    }
}
