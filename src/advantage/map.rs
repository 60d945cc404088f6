//! The maps from a group's normalised rewards to its advantages.

use super::deviation;
use serde::{Deserialize, Serialize};

/// How several rewards become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// The weighted sum of the scores, normalised (DiffusionNFT, FlowAWR, AdvantageFlow).
    Sum,
    /// The weighted sum of each reward's normalised scores (MixGRPO's advantage aggregation), so that a reward's scale
    /// does not decide what it counts.
    Normalised,
}

/// What a reward's distance from its group's mean is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normaliser {
    /// Standard deviation of all rewards of the iteration + 1e-4 (DiffusionNFT, FlowAWR, Flow-GRPO:
    /// flow_grpo/stat_tracking.py with `global_std`).
    GlobalStd,
    /// Root mean square of the distances from the group means, over all images (AdvantageFlow). Where it is below 1e-8 or
    /// 1e-4 of the rewards' own root mean square, there is no signal: every advantage is 0.
    PooledRms,
    /// Standard deviation within the group + 1e-4.
    GroupStd,
    /// Nothing: advantages are in the reward's own units (PEPG).
    None,
}

/// How a normalised reward becomes an advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Map {
    /// It is the advantage.
    Linear,
    /// `w - 1`, `w = K softmax(a / temperature)` within the group.
    Softmax,
    /// `e / max(std(e) + 1e-4, 1e-2)` with `e = softmax(a / temperature) - 1/K` within the group: for rule rewards,
    /// where a group's best image often stands alone.
    GatedSoftmax,
    /// `w - 1` with w within 1 + `map_clip` and of mean 1, and the temperature raised until the weights' effective sample
    /// size is K/3 on average: no image is the whole group, and bounding does not push away from all of it.
    TemperedSoftmax,
}

/// Rewards to advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdvantageMap {
    /// How several rewards become one.
    pub aggregate: Aggregate,
    /// The scale of a reward.
    pub normaliser: Normaliser,
    /// Bound of the normalised reward.
    pub clip: f64,
    /// The map.
    pub map: Map,
    /// Temperature of the softmax maps.
    pub temperature: f64,
    /// Bound of a softmax map's advantage.
    pub map_clip: f64,
}

/// One group's advantages.
pub(super) struct Mapped {
    pub values: Vec<f64>,
    /// Whether the map's bound changed a value.
    pub bounded: Vec<bool>,
    /// Effective sample size of the weights as a share of the group.
    pub effective: f64,
}

impl AdvantageMap {
    /// FlowAWR's for model rewards (released program, flow_grpo/stat_tracking.py at 05e993aa).
    pub const FLOW_AWR: Self = Self {
        aggregate: Aggregate::Sum,
        normaliser: Normaliser::GlobalStd,
        clip: 5.0,
        map: Map::Softmax,
        temperature: 1.0,
        map_clip: 3.0,
    };
    /// FlowAWR's paper, equation 11: no bounds.
    pub const FLOW_AWR_PAPER: Self = Self { clip: f64::INFINITY, map_clip: f64::INFINITY, ..Self::FLOW_AWR };
    /// FlowAWR's robust form.
    pub const ROBUST: Self = Self { normaliser: Normaliser::PooledRms, map: Map::TemperedSoftmax, ..Self::FLOW_AWR };
    /// AdvantageFlow's: linear in units of the pooled within-group deviation, within 1.
    pub const ADVANTAGE_FLOW: Self =
        Self { normaliser: Normaliser::PooledRms, clip: 1.0, map: Map::Linear, ..Self::FLOW_AWR };
    /// DiffusionNFT's, Flow-GRPO's and AWM's: linear in units of the global deviation, within 5.
    pub const DIFFUSION_NFT: Self = Self { map: Map::Linear, ..Self::FLOW_AWR };

    /// PEPG's: the distance from the group's mean as it is.
    pub const CENTRED: Self = Self { normaliser: Normaliser::None, clip: f64::INFINITY, ..Self::DIFFUSION_NFT };

    /// Largest advantage that the map can give.
    pub fn bound(&self) -> f64 {
        match self.map {
            Map::Linear => self.clip,
            Map::Softmax | Map::GatedSoftmax | Map::TemperedSoftmax => self.map_clip,
        }
    }

    /// Smallest advantage that the map can give.
    pub fn lowest(&self) -> f64 {
        match self.map {
            Map::Linear => -self.clip,
            Map::GatedSoftmax => -self.map_clip,
            Map::Softmax | Map::TemperedSoftmax => -1.0,
        }
    }

    /// The temperature for the groups that have a signal.
    pub(super) fn temperature_for(&self, groups: &[Vec<f64>]) -> f64 {
        let effective = |temperature: f64| {
            let sum: f64 = groups.iter().map(|a| effective(&weights(a, temperature))).sum();
            sum / groups.len().max(1) as f64
        };
        const WANTED: f64 = 1.0 / 3.0;
        if self.map != Map::TemperedSoftmax || groups.is_empty() || effective(self.temperature) >= WANTED {
            return self.temperature;
        }
        let (mut low, mut high) = (self.temperature, 2.0 * self.temperature);
        while effective(high) < WANTED {
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            match effective(middle) < WANTED {
                true => low = middle,
                false => high = middle,
            }
        }
        high
    }

    /// The advantages of one group of normalised rewards.
    pub(super) fn mapped(&self, a: &[f64], temperature: f64) -> Mapped {
        if self.map == Map::Linear {
            return Mapped { values: a.to_vec(), bounded: vec![false; a.len()], effective: 1.0 };
        }
        let k = a.len() as f64;
        let weights = weights(a, temperature);
        let free: Vec<f64> = match self.map {
            Map::GatedSoftmax => {
                let excess: Vec<f64> = weights.iter().map(|w| (w - 1.0) / k).collect();
                let gate = (deviation(&excess) + 1e-4).max(1e-2);
                excess.iter().map(|e| e / gate).collect()
            }
            _ => weights.iter().map(|w| w - 1.0).collect(),
        };
        let values: Vec<f64> = match self.map {
            Map::TemperedSoftmax => filled(&weights, 1.0 + self.map_clip).iter().map(|w| w - 1.0).collect(),
            _ => free.iter().map(|a| a.clamp(-self.map_clip, self.map_clip)).collect(),
        };
        let bounded = match self.map {
            Map::TemperedSoftmax => weights.iter().map(|&w| w > 1.0 + self.map_clip).collect(),
            _ => values.iter().zip(&free).map(|(bounded, free)| bounded != free).collect(),
        };
        Mapped { values, bounded, effective: effective(&weights) }
    }
}

/// `K softmax(a / temperature)`.
fn weights(a: &[f64], temperature: f64) -> Vec<f64> {
    let largest = a.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = a.iter().map(|a| libm::exp((a - largest) / temperature)).collect();
    let mean = powers.iter().sum::<f64>() / a.len() as f64;
    powers.into_iter().map(|p| p / mean).collect()
}

/// Effective sample size as a share of their number.
fn effective(weights: &[f64]) -> f64 {
    let sum: f64 = weights.iter().sum();
    sum * sum / weights.iter().map(|w| w * w).sum::<f64>() / weights.len() as f64
}

/// Weights of mean 1 with none above `most`: what the bound takes from some is given to the others in proportion.
fn filled(weights: &[f64], most: f64) -> Vec<f64> {
    let mut out = weights.to_vec();
    loop {
        let full = out.iter().filter(|&&w| w >= most).count();
        let rest: f64 = out.iter().filter(|&&w| w < most).sum();
        let factor = (out.len() as f64 - most * full as f64) / rest;
        if full == 0 || full == out.len() || factor <= 0.0 {
            return out.into_iter().map(|w| w.min(most)).collect();
        }
        out.iter_mut().for_each(|w| *w = if *w >= most { most } else { *w * factor });
        if out.iter().filter(|&&w| w >= most).count() == full {
            return out;
        }
    }
}
